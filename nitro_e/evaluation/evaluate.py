"""A benchmark over checkpoints and sampling settings: the same prompts and noise for all of them, one table.

OUT/results.json    scores with intervals, settings, hashes
OUT/report.html     the same with images
OUT/NAME-HASH/      the images of one checkpoint and setting (evaluation.images)
OUT/real/           features of real images, for a distance
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import torch

from nitro_e.config import Config, ConfigError, Ge, Le, Seed, parse_json, read_text, to_dict
from nitro_e.data.prompts import Prompt
from nitro_e.evaluation import intervals, page, results
from nitro_e.evaluation.benchmarks import Benchmark
from nitro_e.evaluation.distances import DistanceScorer
from nitro_e.evaluation.images import ALONE, Autocast, ImageGenerator, ScoredImage, collect
from nitro_e.evaluation.reference import Reference
from nitro_e.evaluation.results import Score, plain
from nitro_e.files import sha256_of, short_hash, weights_hash, write_text
from nitro_e.interfaces import DistContext
from nitro_e.model.cpu.packing import has_bfloat16_products, pack_for_cpu
from nitro_e.model.pretrained import weights_file
from nitro_e.record.environment import default_device, environment
from nitro_e.record.templating import write_page
from nitro_e.rewards import RewardConfig, Scorer, build_rewards, reward_of_prompts
from nitro_e.sampling.noise_search import NoiseSearch, NoiseSearchConfig
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.samplers import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Options(Config):
    """Options that are the same for all checkpoints and settings."""

    OPTIONS: ClassVar[bool] = True

    seed: Seed = 0  # of prompts and noise
    batch_size: Annotated[int, Ge(1), Le(65536)] = 64
    dtype: str = "bfloat16"  # of the model's arithmetic: float32, bfloat16 or float16
    device: str = "cpu"
    codec: str | None = None  # other files than in training, see components.chosen_component
    text: str | None = None
    allow_download: tuple[str, ...] = ()  # hub repositories that the weights may have fetched
    rejudge: bool = False
    optimize_noise: str | None = None  # the reward that a start noise is searched for
    noise_search: NoiseSearchConfig | None = None  # how it is searched; only and always with that reward

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.optimize_noise is None) != (self.noise_search is None):
            raise ConfigError("optimize_noise and noise_search belong together: give both or neither")

    @classmethod
    def of_this_machine(cls) -> Options:
        """Draw on the device there is, in the type that suits it."""
        device = default_device()
        return cls(device=device, dtype=default_dtype(device))


@dataclass
class Result:
    """One checkpoint at one setting."""

    checkpoint: dict[str, Any]
    sampling: SamplingConfig
    folder: Path
    rows: list[ScoredImage]
    scores: dict[str, Score]

    @property
    def name(self) -> str:
        return f"{self.checkpoint['source']}, {setting_name(self.sampling)}"

    @property
    def images_per_second(self) -> float | None:
        """The rate of drawing; None if no image was drawn by a command that also scored it."""
        seconds = [row.seconds for row in self.rows if row.seconds > 0]
        return len(seconds) / sum(seconds) if seconds else None


@dataclass
class Comparison:
    """Two checkpoints at one setting: their paired differences by title of the score."""

    ours: Result
    theirs: Result
    differences: dict[str, dict[str, Any]]


@dataclass
class Evaluation:
    benchmark: Benchmark
    prompts: list[Prompt]
    options: Options
    judges: dict[str, str]  # title -> name and hash of the weights that score, for rewards that have some
    results: list[Result]
    comparisons: list[Comparison]

    @property
    def best(self) -> Result:
        """The result with the best first score."""
        sign = -1 if self.benchmark.lower_is_better else 1
        return max(self.results, key=lambda result: sign * next(iter(result.scores.values())).overall.value)


def evaluate(
    benchmark: Benchmark, sources: Sequence[str], grid: dict[str, Sequence[Any]], options: Options, out: Path
) -> Evaluation:
    """Draw with checkpoints at every combination of `grid`, fields of SamplingConfig -> values, and score the images.

    sources: checkpoints; the first is compared in pairs with each of the others. Writes the files named above.
    """
    benchmark = _seeded(benchmark, options.seed)
    prompts, scorer = prepare(benchmark, options.device)
    measure = None
    if benchmark.reference is not None:
        reference = Reference(benchmark.reference)
        measure = DistanceScorer(
            benchmark.name, reference, benchmark.weights, options.device, out / "real", options.rejudge
        )
    found = [
        [
            _summarize(drawn, benchmark, prompts, scorer, measure)
            for drawn in _draw_all(benchmark, prompts, scorer, source, grid, options, out)
        ]
        for source in sources
    ]
    comparisons = []
    for other in found[1:]:
        for ours, theirs in zip(found[0], other):
            differences = {
                title: results.compare(prompts, ours.rows, theirs.rows, title) for title in ours.scores
            }
            comparisons.append(Comparison(ours, theirs, differences))
    judges = scorer.sources() | ({} if measure is None else measure.sources())
    evaluation = Evaluation(benchmark, prompts, options, judges, list(itertools.chain(*found)), comparisons)
    write_text(out / "results.json", json.dumps(record(evaluation), indent=1) + "\n")
    write_report(evaluation, out / "report.html")
    return evaluation


def draw(
    benchmark: Benchmark,
    sources: Sequence[str],
    grid: dict[str, Sequence[Any]],
    options: Options,
    out: Path,
    *,
    score: bool = False,
    share: DistContext = ALONE,
) -> list[Path]:
    """Draw this process's share of the images of `evaluate`, and `score` them if so; returns their folders."""
    benchmark = _seeded(benchmark, options.seed)
    if score:
        prompts, scorer = prepare(benchmark, options.device)
    else:
        prompts, scorer = benchmark.load_prompts(), build_rewards(())
    return [
        drawn.folder
        for source in sources
        for drawn in _draw_all(benchmark, prompts, scorer, source, grid, options, out, share)
    ]


def _seeded(benchmark: Benchmark, seed: int) -> Benchmark:
    """The benchmark with prompts of this seed, where prompts are made."""
    if benchmark.prompts is None:
        return benchmark
    return dataclasses.replace(benchmark, prompts=dataclasses.replace(benchmark.prompts, seed=seed))


def prepare(benchmark: Benchmark, device: str) -> tuple[list[Prompt], Scorer]:
    """Load the prompts, and the rewards with their weights; ConfigError for what is missing or does not fit."""
    prompts = benchmark.load_prompts()
    scorer = build_rewards(benchmark.rewards, device)
    scorer.check([prompt.info for prompt in prompts])
    scorer.load()
    return prompts, scorer


class Drawn(NamedTuple):
    """The images of one checkpoint at one setting, with the scores of single images."""

    checkpoint: dict[str, Any]
    sampling: SamplingConfig
    folder: Path
    rows: list[ScoredImage]


def _draw_all(
    benchmark: Benchmark,
    prompts: list[Prompt],
    scorer: Scorer,
    source: str,
    grid: dict[str, Sequence[Any]],
    options: Options,
    out: Path,
    share: DistContext = ALONE,
) -> Iterator[Drawn]:
    """Draw with one checkpoint at every setting."""
    pipeline = TextToImage.from_pretrained(
        source, options.device, codec=options.codec, text=options.text, allow_download=options.allow_download
    )
    checkpoint = identity(source, pipeline)
    climbs = options.noise_search is not None and options.noise_search.steps > 0
    autocast = lower_precision(pipeline, options.dtype, pack=not climbs)
    # all of them before the first image: a wrong one shows at once
    settings_of = [
        pipeline.settings(**dict(zip(grid, values))) for values in itertools.product(*grid.values())
    ]
    search, searched = None, {}
    if options.optimize_noise is not None and options.noise_search is not None:
        known = {prompt.text: prompt.info for prompt in prompts}
        reward = reward_of_prompts(RewardConfig(name=options.optimize_noise), known, options.device)
        search = NoiseSearch(reward, options.noise_search)
        searched = {"noise_search": {"reward": options.optimize_noise, **to_dict(options.noise_search)}}
    for sampling in settings_of:
        settings = {
            "weights": checkpoint["weights"],
            "sampling": to_dict(sampling),
            "dtype": options.dtype,
            "seed": options.seed,
            **searched,
        }
        name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{Path(source).name} {setting_name(sampling)}").strip("-")
        folder = out / f"{name}-{short_hash(settings)}"
        folder.mkdir(parents=True, exist_ok=True)
        write_text(
            folder / "settings.json", json.dumps(settings | {"checkpoint": checkpoint}, indent=1) + "\n"
        )
        generate = ImageGenerator(pipeline, sampling, options.seed, options.batch_size, autocast, search)
        title = setting_name(sampling)
        rows = collect(
            generate, benchmark, prompts, scorer, folder, rejudge=options.rejudge, title=title, share=share
        )
        yield Drawn(checkpoint, sampling, folder, rows)


def _summarize(
    drawn: Drawn, benchmark: Benchmark, prompts: list[Prompt], scorer: Scorer, measure: DistanceScorer | None
) -> Result:
    """Summarize the scores of the images, or their distance to real ones."""
    rows, titles = drawn.rows, scorer.names
    if measure is not None:
        values = measure(drawn.folder, [row.file for row in rows], drawn.sampling.resolution)
        rows = [row._replace(scores={measure.name: value}) for row, value in zip(rows, values)]
        titles = (measure.name,)
    scores = {title: results.summarize(prompts, rows, title, benchmark.group_by) for title in titles}
    return Result(drawn.checkpoint, drawn.sampling, drawn.folder, rows, scores)


def identity(source: str, pipeline: TextToImage) -> dict[str, Any]:
    """Identify the weights: where they lie, hashes, step."""
    assert pipeline.path is not None
    folder = pipeline.path
    meta = folder.parent / "meta.json"
    return {
        "source": str(source),
        "folder": str(folder),
        "sha256": sha256_of(weights_file(folder) if folder.is_dir() else folder),
        "weights": weights_hash(pipeline.model, pipeline.codec, pipeline.text),  # codec and text encoder too
        "step": parse_json(read_text(meta), str(meta)).get("step") if meta.is_file() else None,
        "parameters": sum(parameter.numel() for parameter in pipeline.model.parameters()),
    }


def default_dtype(device: str) -> str:
    """Name what a model draws in unless told otherwise: bfloat16, and float32 on a CPU without products in it."""
    return "float32" if device == "cpu" and not has_bfloat16_products() else "bfloat16"


def lower_precision(pipeline: TextToImage, dtype: str, pack: bool = True) -> Autocast:
    """Lower the precision of the model; returns the context to draw under.

    A CPU that can packs the weights if so; no gradient goes through packed ones.
    """
    device = next(pipeline.model.parameters()).device.type
    if dtype == "float32":
        return contextlib.nullcontext
    if device == "cpu" and dtype == "bfloat16" and pack:
        with contextlib.suppress(ConfigError):  # this processor cannot
            pipeline.model = pack_for_cpu(copy.deepcopy(pipeline.model).to(torch.bfloat16))
            return contextlib.nullcontext
    return partial(torch.autocast, device, getattr(torch, dtype))


def setting_name(sampling: SamplingConfig) -> str:
    """Name a setting in tables: "guidance 3, 20 steps, heun"."""
    guidance = f"guidance {sampling.guidance_scale:g}"
    # without guidance its kind says nothing
    guidance += "" if sampling.guidance_scale in (0, 1) else sampling.guidance_in_words()
    parts = [guidance, f"{sampling.steps} steps"]
    parts += [] if sampling.sampler == "euler" else [sampling.sampler]
    return ", ".join(parts)


# ---- tables and files


def tables(evaluation: Evaluation) -> list[results.Table]:
    """A row per task for a single result, else a row per result; then the best one by category, and the differences."""
    found = evaluation.results
    if len(found) == 1:
        shown = [results.task_table(found[0].name, found[0].scores)]
    else:
        sources = list(dict.fromkeys(result.checkpoint["source"] for result in found))
        names = [result.name if len(sources) > 1 else setting_name(result.sampling) for result in found]
        title = f"{' and '.join(sources)}, {len(found)} settings"
        shown = [results.setting_table(title, dict(zip(names, (result.scores for result in found))))]
    shown += results.breakdown_tables(evaluation.best.name, evaluation.best.scores)
    for comparison in evaluation.comparisons:
        title = f"{comparison.ours.name} minus {comparison.theirs.checkpoint['source']}, the same prompts and noise"
        shown.append(results.difference_table(title, comparison.differences))
    return shown


def as_text(evaluation: Evaluation) -> str:
    """The tables, for a terminal."""
    parts = [table.as_text() for table in tables(evaluation)]
    rates = [result.images_per_second for result in evaluation.results]
    speeds = sorted({f"{rate:.3g}" for rate in rates if rate is not None}, key=float)
    drawn = f"; drawn at {' to '.join(speeds[:: max(len(speeds) - 1, 1)])} per second" if speeds else ""
    return "\n\n".join([*parts, summary(evaluation) + drawn])


def summary(evaluation: Evaluation) -> str:
    """The benchmark, the options and what scored the images, in one line."""
    benchmark, options = evaluation.benchmark, evaluation.options
    judges = "".join(f"; {title} by {source}" for title, source in evaluation.judges.items())
    missing = "; ".join(["", *filter(None, [benchmark.shortfall(len(evaluation.prompts))])])
    search = options.noise_search
    noise = "" if search is None else f"; noise {search.in_words()} by {options.optimize_noise}"
    return (
        f"{benchmark.name}: {len(evaluation.prompts)} prompts, images of each: {benchmark.per_prompt}, "
        f"seed {options.seed}, {options.dtype}{noise}{judges}{missing}"
    )


def record(evaluation: Evaluation) -> dict[str, Any]:
    """Make the content of results.json."""
    benchmark = evaluation.benchmark
    return {
        "benchmark": benchmark.record(),
        "options": dataclasses.asdict(evaluation.options),
        "judges": evaluation.judges,
        "prompts": len(evaluation.prompts),
        "missing": benchmark.shortfall(len(evaluation.prompts)) or None,
        "intervals": (intervals.__doc__ or "").strip(),
        "environment": environment(),
        "results": [
            {
                "checkpoint": result.checkpoint,
                "sampling": to_dict(result.sampling),
                "images": len(result.rows),
                "images_per_second": result.images_per_second and round(result.images_per_second, 3),
                "folder": result.folder.name,
                "scores": {title: plain(score) for title, score in result.scores.items()},
            }
            for result in evaluation.results
        ],
        "differences": [
            {
                "ours": comparison.ours.folder.name,
                "theirs": comparison.theirs.folder.name,
                "scores": plain(comparison.differences),
            }
            for comparison in evaluation.comparisons
        ],
    }


def write_report(evaluation: Evaluation, path: Path) -> None:
    """Write report.html: tables, and images of the best result."""
    best, prompts = evaluation.best, evaluation.prompts
    title, score = next(iter(best.scores.items()))
    tiles = [("images", str(len(best.rows)))]
    for name, each in best.scores.items():
        tiles.append((f"{name}, mean of {len(each.tasks)} tasks", results.shown(each.overall)))
    if score.seen is not None:
        tiles.append((f"{title}, seen combinations", results.shown(score.seen)))
        tiles.append((f"{title}, unseen combinations", results.shown(score.unseen)))
        tiles.append(("unseen / seen", results.shown(score.unseen_to_seen)))
    shown = tables(evaluation)
    if len(evaluation.results) > 1:
        shown.append(results.task_table(f"The best one: {best.name}", best.scores))
    lower = evaluation.benchmark.lower_is_better
    albums = page.by_task(prompts, best.rows, best.folder, title, lower)
    for each in evaluation.comparisons[:1]:
        sides = [(side.folder, side.rows) for side in (each.ours, each.theirs)]
        albums = page.changes(prompts, *sides, title, lower) + albums
    write_page(
        path,
        "evaluation.html",
        title=f"{evaluation.benchmark.name}: {best.name}",
        summary=summary(evaluation),
        tiles=tiles,
        tables=shown,
        albums=albums,
    )
