"""Train variants of recipes over several seeds, score all of them on the same prompts and noise, print one table.

    nitro-e study tools/studies/shapes_grpo.yaml            runs/NAME/..., outputs/NAME/table.md, results.json
    nitro-e study STUDY.yaml --only full lora --jobs 2        some variants, two trainings at a time

A study names a checkpoint to start from and to compare with, variants (a recipe and overrides, or nothing for the
checkpoint itself) and sampling settings. Differences to the base are paired by prompt and noise. Every part is kept:
the same command goes on after an interruption, and adds what is new in the file. What can be known to be wrong is
refused before the first training.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from nitro_e.cli import common as cli
from nitro_e.config import Config, ConfigError, Ge, Seed, TrainingError, check_file_name, from_dict, load
from nitro_e.model.pretrained import read_config
from nitro_e.record.run_folder import model_folder

Setting = dict[str, bool | int | float | str]  # fields of SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Variant(Config):
    recipe: str | None = None  # None: the base itself, untrained, an anchor
    set: tuple[str, ...] = ()  # overrides, as on train.py's command line
    settings: tuple[Setting, ...] = ()  # empty: those of the study
    seeds: tuple[Seed, ...] = ()  # empty: those of the study

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recipe is None and self.set:
            raise ConfigError("set: overrides need a recipe")


@dataclass(frozen=True, kw_only=True)
class Study(Config):
    name: str
    base: str  # checkpoint that the variants start from (unless they say otherwise) and are compared with
    variants: dict[str, Variant]
    settings: tuple[Setting, ...]
    benchmark: str = "shapes"
    num: Annotated[int, Ge(1)] = 600  # prompts
    seeds: tuple[Seed, ...] = (0,)
    # setting of the base for all differences; empty: the variant's own
    reference: Setting = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (self.name, *self.variants):
            check_file_name(name, "name" if name == self.name else "variants")
        for name in ("variants", "settings", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; a study needs at least one")


@dataclass
class Row:
    """One variant at one setting."""

    variant: str
    setting: str
    scores: list[dict[str, float]]  # of every seed: title -> overall
    differences: list[dict[str, Any]]  # of every seed: title -> Estimate
    cpu_seconds: list[float]


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("study", type=Path, help="a YAML file, see tools/studies")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="default: all")
    parser.add_argument(
        "--jobs",
        type=cli.whole(1, 512),
        default=1,
        metavar="N",
        help="trainings at a time, one thread each if more than one",
    )
    parser.add_argument("--out", type=Path, help="default: outputs/NAME")
    options = parser.parse_args(arguments)
    return cli.run(lambda: print(study(options)))


def study(options: argparse.Namespace) -> str:
    plan = load(Study, options.study)
    chosen = options.only or list(plan.variants)
    for name in chosen:
        if name not in plan.variants:
            raise ConfigError(f"--only {name}: the study has {', '.join(plan.variants)}")
    check(plan, chosen)
    jobs = [
        (name, seed)
        for name in chosen
        if plan.variants[name].recipe
        for seed in seeds_of(plan, plan.variants[name])
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: train(plan, *job, alone=options.jobs == 1), jobs))
    out = options.out or Path("outputs") / plan.name
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for name in chosen for row in score(plan, name, out)]
    text = table(plan, rows)
    (out / "table.md").write_text(text + "\n")
    (out / "results.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    return f"{text}\n\n{out / 'table.md'}, {out / 'results.json'}; images under {out}"


def check(plan: Study, chosen: Sequence[str]) -> None:
    """Refuse what can be known to be wrong before anything is trained: what judges, weights, data, keys, settings."""
    from nitro_e.evaluation.evaluate import prepare
    from nitro_e.sampling.pipeline import Use
    from nitro_e.stages.first_weights import check_first_weights
    from nitro_e.stages.recipe import RunConfig

    prepare(judged(plan), "cpu")
    base = read_config(model_folder(plan.base))
    use = from_dict(Use, base["use"], "use")
    for name in chosen:
        variant = plan.variants[name]
        settings = variant.settings or plan.settings
        with said_of(f"variants.{name}"):
            if variant.recipe is None:
                check_settings(settings, use.sampling, base["model"], use)
                continue
            overrides = overrides_of(plan, name, seeds_of(plan, variant)[0])
            config = load(RunConfig, variant.recipe, overrides)
            if not all(is_trained(plan, name, seed) for seed in seeds_of(plan, variant)):
                check_first_weights(config, overrides)
                if config.data is not None:
                    config.data.expand()
            check_settings(settings, config.published_sampling, config.model, config.components)
    with said_of("base"):  # scored at the same settings
        every = [setting for name in chosen for setting in plan.variants[name].settings or plan.settings]
        check_settings([plan.reference] if plan.reference else every, use.sampling, base["model"], use)


@contextlib.contextmanager
def said_of(part: str) -> Iterator[None]:
    """Name the part of the study that an error is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{part}: {error}") from None


def check_settings(settings: Sequence[Setting], defaults: Any, model: Any, components: Any) -> None:
    """ConfigError for settings that these weights cannot be sampled with."""
    from nitro_e.encoders.components import codec_shape, text_shape
    from nitro_e.sampling.pipeline import latent_size
    from nitro_e.sampling.samplers import with_overrides

    shape, (_, text_length) = codec_shape(components.codec), text_shape(components.text)
    for setting in settings:
        sampling = with_overrides(defaults, setting)
        if shape is not None:
            latent_size(model, shape[1], text_length, *sampling.size)


def judged(plan: Study) -> Any:
    """Return the benchmark that the study scores on."""
    from nitro_e.evaluation.benchmarks import benchmark

    with said_of("benchmark"):
        return benchmark(plan.benchmark, plan.num, None)


def overrides_of(plan: Study, name: str, seed: int) -> list[str]:
    """Return the overrides that make a variant's recipe into its run of one seed."""
    own = [f"run={folder_of(plan, name, seed)}", f"name={plan.name}-{name}", f"seed={seed}"]
    return [*own, f"init_from={plan.base}", *plan.variants[name].set]


def seeds_of(plan: Study, variant: Variant) -> tuple[int, ...]:
    return variant.seeds or plan.seeds


def folder_of(plan: Study, name: str, seed: int) -> Path:
    return Path("runs") / plan.name / f"{name}-{seed}"


def is_trained(plan: Study, name: str, seed: int) -> bool:
    folder = folder_of(plan, name, seed)
    status, spent = folder / "STATUS.json", folder / "cpu_seconds.json"
    return status.exists() and spent.exists() and json.loads(status.read_text())["state"] == "done"


def train(plan: Study, name: str, seed: int, alone: bool) -> None:
    """Run or continue one training as a process of its own; its CPU seconds are kept beside it."""
    variant, folder = plan.variants[name], folder_of(plan, name, seed)
    spent = folder / "cpu_seconds.json"
    if is_trained(plan, name, seed):
        return
    command = [sys.executable, "-m", "nitro_e.cli", "train", variant.recipe, *overrides_of(plan, name, seed)]
    environment = {"WANDB_RUN_GROUP": plan.name} | os.environ | ({} if alone else {"OMP_NUM_THREADS": "1"})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, code, usage = os.wait4(process.pid, 0)
    if folder.is_dir():
        before = json.loads(spent.read_text()) if spent.exists() else 0.0
        spent.write_text(json.dumps(round(before + usage.ru_utime + usage.ru_stime, 1)))
    if code != 0:
        last = Path(log.name).read_text(errors="replace").strip().splitlines()[-1:]
        raise TrainingError(f"{name}, seed {seed} ended with an error, see {log.name}: {''.join(last)}")


def score(plan: Study, name: str, out: Path) -> list[Row]:
    """The rows of one variant, a setting each."""
    from nitro_e.evaluation.evaluate import Options, evaluate
    from nitro_e.record.environment import default_device

    variant, rows = plan.variants[name], []
    chosen, options = judged(plan), Options(device=default_device())
    trained = variant.recipe is not None
    for setting in variant.settings or plan.settings:
        row = Row(name, ", ".join(f"{key} {value}" for key, value in setting.items()), [], [], [])
        for seed in seeds_of(plan, variant) if trained else (0,):
            folder = folder_of(plan, name, seed)
            source = str(folder) if trained else plan.base
            place = out / (f"{name}-{seed}" if trained else "base")
            place.mkdir(parents=True, exist_ok=True)
            found = evaluate(
                chosen, [source], {key: [value] for key, value in setting.items()}, options, place
            )
            theirs = evaluate(
                chosen,
                [plan.base],
                {key: [value] for key, value in (plan.reference or setting).items()},
                options,
                out / "base",
            )
            row.scores.append({title: each.overall.value for title, each in found.results[0].scores.items()})
            row.differences.append(compare(found, theirs))
            row.cpu_seconds.append(json.loads((folder / "cpu_seconds.json").read_text()) if trained else 0.0)
        rows.append(row)
    return rows


def compare(ours: Any, theirs: Any) -> dict[str, Any]:
    from nitro_e.evaluation import results

    return {
        title: results.compare(ours.prompts, ours.results[0].rows, theirs.results[0].rows, title)["overall"]
        for title in ours.results[0].scores
    }


def table(plan: Study, rows: list[Row]) -> str:
    """Markdown: the first score's mean over seeds, every seed's, and the paired differences with 95 % intervals."""
    title = next(iter(rows[0].scores[0]))
    head = [
        "variant",
        "setting",
        f"{title} (mean of seeds)",
        "of each seed",
        "minus base: mean",
        "of each seed",
        "CPU s",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        scores = [each[title] for each in row.scores]
        differences = [each[title] for each in row.differences]
        lines.append(
            f"| {row.variant} | {row.setting} | {np.mean(scores):.3f} | {' '.join(f'{s:.3f}' for s in scores)} "
            f"| {np.mean([each[0] for each in differences]):+.3f} "
            f"| {' '.join(f'{value:+.3f} [{low:+.3f}, {high:+.3f}]' for value, low, high, _ in differences)} "
            f"| {np.mean(row.cpu_seconds):.0f} |"
        )
    where = f", base at {plan.reference}" if plan.reference else ""
    return "\n".join(
        [
            *lines,
            "",
            f"{plan.num} prompts of {plan.benchmark}, base {plan.base}{where}; 95 % intervals, paired",
        ]
    )
