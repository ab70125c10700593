"""The images of one setting: drawn, kept as PNG, judged, and what the judge said kept beside them.

    FOLDER/settings.json        weights, sampling, seed
    FOLDER/00012-0-a1b2c3.png   image 0 of prompt 12, and a hash of its words
    FOLDER/scores-HASH.jsonl    a line per judged image; other rewards, or weights of theirs, get another file

The noise of an image is a function of (seed, prompt's index, image's number): the same for all checkpoints,
settings, batch sizes and numbers of prompts. What is there is not drawn or judged again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nitro_e.config import ConfigError, parse_json, read_text, to_dict
from nitro_e.data.prompts import Prompt
from nitro_e.evaluation.benchmarks import Benchmark, describe
from nitro_e.files import save_png
from nitro_e.randomness import seed_of
from nitro_e.record import progress
from nitro_e.rewards import Scorer
from nitro_e.sampling.pipeline import TextToImage, to_image
from nitro_e.sampling.samplers import SamplingConfig

Autocast = Callable[[], contextlib.AbstractContextManager]


class Judged(NamedTuple):
    """One image; a score is NaN where the judge could not tell."""

    index: int  # of its prompt
    number: int  # among the images of its prompt
    prompt: str
    scores: dict[str, float]
    saw: str
    seconds: float  # drawing it took

    @property
    def file(self) -> str:
        return file_name(self.index, self.number, self.prompt)


def file_name(index: int, number: int, prompt: str) -> str:
    return f"{index:05d}-{number}-{short_hash(prompt)[:6]}.png"


def noise_seeds(seed: int, places: Sequence[tuple[int, int]]) -> list[int]:
    """One per (prompt's index, image's number)."""
    return [seed_of("evaluation", seed, *place) for place in places]


def collect(
    pipeline: TextToImage, sampling: SamplingConfig, benchmark: Benchmark, prompts: Sequence[Prompt], scorer: Scorer,
    folder: Path, *, seed: int, batch_size: int,
    autocast: Autocast = contextlib.nullcontext, rejudge: bool = False, title: str = "",
) -> list[Judged]:  # fmt: skip
    """All images of a benchmark in order, drawing and judging what `folder` does not hold yet."""
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {batch_size}")
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"scores-{short_hash([*to_dict(scorer.configs), *scorer.sources().items()])}.jsonl"
    if rejudge:
        record.unlink(missing_ok=True)
    places = [(index, number) for index in range(len(prompts)) for number in range(benchmark.per_prompt)]
    done = {place: row for place, row in read_rows(record).items() if _is_of(row, place, prompts)}
    missing = [place for place in places if place not in done]
    with progress.bar(total=len(places), initial=len(places) - len(missing), desc=title, unit="img") as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            chosen = [prompts[index] for index, _ in batch]
            pixels, seconds = _draw(pipeline, sampling, batch, chosen, folder, seed, batch_size, autocast)
            rows = _judge(pixels, batch, chosen, seconds, scorer, benchmark)
            append_rows(record, rows)
            done |= {(row.index, row.number): row for row in rows}
            bar.update(len(batch))
    return [done[place] for place in places]


def _is_of(row: Judged, place: tuple[int, int], prompts: Sequence[Prompt]) -> bool:
    return place[0] < len(prompts) and row.prompt == prompts[place[0]].text


def _draw(
    pipeline: TextToImage, sampling: SamplingConfig, places: Sequence[tuple[int, int]], prompts: Sequence[Prompt],
    folder: Path, seed: int, batch_size: int, autocast: Autocast,
) -> tuple[Tensor, float]:  # fmt: skip
    """(B, 3, H, W) in -1..1 as the PNG files hold them, and the seconds that drawing one took."""
    paths = [folder / file_name(*place, prompt.text) for place, prompt in zip(places, prompts)]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    started = time.perf_counter()
    if missing:
        drawn = draw(
            pipeline,
            sampling,
            [prompts[i].text for i in missing],
            noise_seeds(seed, [places[i] for i in missing]),
            batch_size,
            autocast,
        )
        for i, pixels in zip(missing, drawn):
            save_png(to_image(pixels), paths[i])
    seconds = (time.perf_counter() - started) / max(len(missing), 1)
    return torch.stack([read_pixels(path) for path in paths]), seconds


def draw(
    pipeline: TextToImage, sampling: SamplingConfig, prompts: Sequence[str], seeds: Sequence[int], batch_size: int,
    autocast: Autocast,
) -> Tensor:  # fmt: skip
    """(B, 3, H, W) in -1..1 on the CPU; autocast: makes the context that the model computes in."""
    with autocast():
        return pipeline.pixels(prompts, seeds=seeds, batch_size=batch_size, **to_dict(sampling))


def _judge(
    pixels: Tensor, places: Sequence[tuple[int, int]], prompts: Sequence[Prompt], seconds: float, scorer: Scorer,
    benchmark: Benchmark,
) -> list[Judged]:  # fmt: skip
    values = scorer(pixels, [p.text for p in prompts], [p.info for p in prompts]).values.tolist()
    seen = [""] * len(pixels) if benchmark.see is None else map(describe, benchmark.see(pixels))
    return [
        Judged(*place, prompt.text, dict(zip(scorer.names, row)), saw, round(seconds, 5))
        for place, prompt, row, saw in zip(places, prompts, values, seen)
    ]


# ---- files


def read_rows(path: Path) -> dict[tuple[int, int], Judged]:
    """The judged images of a file by place; damaged lines, such as a last one cut short by a kill, are left out."""
    rows = {}
    for line in read_text(path).splitlines() if path.exists() else ():
        with contextlib.suppress(ConfigError, KeyError, TypeError, AttributeError):
            entry = parse_json(line, str(path))
            entry["scores"] = {
                name: math.nan if value is None else value for name, value in entry["scores"].items()
            }
            row = Judged(**entry)
            rows[row.index, row.number] = row
    return rows


def append_rows(path: Path, rows: Sequence[Judged]) -> None:
    """Images whose score is not known are not written: the next call asks the judge again."""
    known = [row for row in rows if not any(map(math.isnan, row.scores.values()))]
    with path.open("a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # cut short by a kill
                file.write(b"\n")
        file.write(b"".join(json.dumps(row._asdict()).encode() + b"\n" for row in known))


def read_pixels(path: Path) -> Tensor:
    """(3, H, W) float32 in -1..1."""
    with Image.open(path) as image:
        array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1


def short_hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:10]
