"""The images of one setting: drawn, kept as PNG, scored, with the scores kept beside them.

    FOLDER/settings.json        weights, sampling, seed
    FOLDER/00012-0-a1b2c3.png   image 0 of prompt 12, and a hash of the prompt
    FOLDER/scores-HASH.jsonl    a line per scored image; other rewards, or weights of theirs, get another file

The noise of an image is a function of (seed, prompt's index, image's number): the same for all checkpoints,
settings, batch sizes and numbers of prompts. What is there is not drawn or scored again; where only the prompt's record
(such as GenEval's `include`) changed, it is scored again. Of several processes each takes every world-th batch and has
a file of scores of its own (`.rankN`); the next call in one process joins them.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nitro_e.config import ConfigError, parse_json, read_text, to_dict
from nitro_e.data.prompts import Prompt
from nitro_e.evaluation.benchmarks import Benchmark, describe
from nitro_e.files import append_lines, atomic_path, save_png, short_hash
from nitro_e.interfaces import DistContext
from nitro_e.randomness import seed_of
from nitro_e.record import progress
from nitro_e.rewards import Scorer
from nitro_e.sampling.noise_search import NoiseSearch
from nitro_e.sampling.pipeline import TextToImage, to_image
from nitro_e.sampling.samplers import SamplingConfig

ALONE = DistContext()  # this process draws everything
Autocast = Callable[[], contextlib.AbstractContextManager]


class ScoredImage(NamedTuple):
    """One image with its scores, NaN where a reward could not score it."""

    index: int  # of its prompt
    number: int  # among the images of its prompt
    prompt: str
    scores: dict[str, float]
    saw: str  # the objects detected in it, in words
    seconds: float  # that drawing it took
    # title of a score -> kind of category -> category -> (right, all), where a reward counts so
    counts: dict[str, dict[str, dict[str, tuple[int, int]]]] | None = None
    record: str = ""  # a hash of the prompt's record, by which rewards judge; "" if it has none

    @property
    def file(self) -> str:
        return file_name(self.index, self.number, self.prompt)


def file_name(index: int, number: int, prompt: str) -> str:
    return f"{index:05d}-{number}-{short_hash(prompt)[:6]}.png"


def record_hash(prompt: Prompt) -> str:
    return short_hash(prompt.info) if prompt.info else ""


def noise_seeds(seed: int, places: Sequence[tuple[int, int]]) -> list[int]:
    """The noise seed of every (prompt's index, image's number)."""
    return [seed_of("evaluation", seed, *place) for place in places]


@dataclass(frozen=True)
class ImageGenerator:
    """A pipeline with everything else that decides on its images."""

    pipeline: TextToImage
    sampling: SamplingConfig
    seed: int
    batch_size: int
    autocast: Autocast = contextlib.nullcontext  # makes the context that the model computes in
    noise_search: NoiseSearch | None = None  # draws from the noise that it finds

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size must be at least 1, got {self.batch_size}")

    def __call__(self, prompts: Sequence[str], places: Sequence[tuple[int, int]]) -> Tensor:
        """Draw (B, 3, H, W) in -1..1 on the CPU, each image with the noise of its place."""
        seeds = noise_seeds(self.seed, places)
        with self.autocast():
            settings = {**to_dict(self.sampling), "output_type": "pixels", "noise_search": self.noise_search}
            return self.pipeline(prompts, seeds=seeds, batch_size=self.batch_size, **settings).images


def collect(
    generate: ImageGenerator,
    benchmark: Benchmark,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    folder: Path,
    *,
    rejudge: bool = False,
    title: str = "",
    share: DistContext = ALONE,
) -> list[ScoredImage]:
    """Return the images of a benchmark in order; draws and scores what `folder` does not hold yet.

    share: of several processes each returns its own images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"scores-{short_hash([*to_dict(scorer.configs), *scorer.sources().items()])}.jsonl"
    if rejudge:
        for path in (record, *parts_of(record)):
            path.unlink(missing_ok=True)
    if share.world_size == 1:
        join_parts(record)
        mine = record
    else:
        mine = record.with_suffix(f".rank{share.rank}.jsonl")
    places = [(index, number) for index in range(len(prompts)) for number in range(benchmark.per_prompt)]
    # divided before what is there is left out: processes that start at different times agree on who does what
    starts = range(share.rank * generate.batch_size, len(places), share.world_size * generate.batch_size)
    own = [places[start : start + generate.batch_size] for start in starts]
    places = [place for batch in own for place in batch]
    known = {place: row for path in (record, *parts_of(record)) for place, row in read_rows(path).items()}
    done = {place: row for place, row in known.items() if _is_of(row, place, prompts)}
    batches = [[place for place in batch if place not in done] for batch in own]
    there = sum(place in done for place in places)
    with progress.bar(total=len(places), initial=there, desc=title, unit="img") as bar:
        for batch in filter(None, batches):
            chosen = [prompts[index] for index, _ in batch]
            pixels, seconds = _draw(generate, batch, chosen, folder)
            values = scorer(pixels, [p.text for p in chosen], [p.info for p in chosen]).values.tolist()
            saw = map(describe, benchmark.see(pixels)) if benchmark.see else scorer.said or [""] * len(batch)
            counts = scorer.counts or [{}] * len(batch)
            rows = [
                ScoredImage(
                    *place,
                    prompt.text,
                    dict(zip(scorer.names, row)),
                    words,
                    round(seconds, 5),
                    count or None,
                    record_hash(prompt),
                )
                for place, prompt, row, words, count in zip(batch, chosen, values, saw, counts)
            ]
            append_rows(mine, rows)
            done |= {(row.index, row.number): row for row in rows}
            bar.update(len(batch))
    return [done[place] for place in places]


def _is_of(row: ScoredImage, place: tuple[int, int], prompts: Sequence[Prompt]) -> bool:
    """Tell whether a row scores what is asked for now; rows of earlier versions say nothing of the prompt's record."""
    if place[0] >= len(prompts):
        return False
    prompt = prompts[place[0]]
    return (row.prompt, row.record) == (prompt.text, record_hash(prompt))


def _draw(
    generate: ImageGenerator, places: Sequence[tuple[int, int]], prompts: Sequence[Prompt], folder: Path
) -> tuple[Tensor, float]:
    """Draw what has no PNG file yet: (B, 3, H, W) in -1..1 as the files hold them, and the seconds per drawn image."""
    paths = [folder / file_name(*place, prompt.text) for place, prompt in zip(places, prompts)]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    started = time.perf_counter()
    if missing:
        drawn = generate([prompts[i].text for i in missing], [places[i] for i in missing])
        for i, pixels in zip(missing, drawn):
            save_png(to_image(pixels), paths[i])
    seconds = (time.perf_counter() - started) / max(len(missing), 1)
    return torch.stack([read_pixels(path) for path in paths]), seconds


# ---- files


def read_rows(path: Path) -> dict[tuple[int, int], ScoredImage]:
    """Read the scored images of a file by place; damaged lines, such as one cut short by a kill, are left out."""
    rows = {}
    for line in read_text(path).splitlines() if path.exists() else ():
        with contextlib.suppress(ConfigError, KeyError, TypeError, AttributeError):
            entry = parse_json(line, str(path))
            entry["scores"] = {
                name: math.nan if value is None else value for name, value in entry["scores"].items()
            }
            row = ScoredImage(**entry)
            rows[row.index, row.number] = row
    return rows


def parts_of(record: Path) -> list[Path]:
    """List the files of scores that several processes have written beside `record`."""
    return sorted(record.parent.glob(f"{record.stem}.rank*.jsonl"))


def join_parts(record: Path) -> None:
    """Put the scores of several processes into one file, in the order of the images."""
    parts = parts_of(record)
    if not parts:
        return
    rows = {place: row for path in (record, *parts) for place, row in read_rows(path).items()}
    with atomic_path(record) as path:
        append_rows(path, [rows[place] for place in sorted(rows)])
    for part in parts:
        part.unlink()


def append_rows(path: Path, rows: Sequence[ScoredImage]) -> None:
    """Append images whose scores are all known; the next call scores the others again."""
    known = [row for row in rows if not any(map(math.isnan, row.scores.values()))]
    append_lines(path, [row._asdict() for row in known])


def read_pixels(path: Path) -> Tensor:
    """Read a PNG: (3, H, W) float32 in -1..1."""
    with Image.open(path) as image:
        array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1
