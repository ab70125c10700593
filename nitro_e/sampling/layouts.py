"""Layouts of a folder of images, as the scripts of benchmarks expect them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nitro_e.config import ConfigError
from nitro_e.files import write_text

# of a prompts file: "prompt", and perhaps "negative_prompt", "seed", "id" and anything else
Record = dict[str, Any]


class Drawing(NamedTuple):
    """One file to be: the image of one seed, or a grid of the images of several."""

    file: str  # relative to the folder
    prompt: str
    negative_prompt: str
    seeds: tuple[int, ...]
    record: dict[str, Any]  # what else the prompts file says of the prompt


def flat(prompts: Sequence[Record], num_images: int, seed: int, negative: str) -> list[Drawing]:
    """OUT/0000-a-red-circle-0.png: position, prompt, seed."""
    return [
        Drawing(
            f"{index:04d}-{slug(record['prompt'])}-{number}.png", record["prompt"], words, (number,), record
        )
        for index, (record, words, number) in enumerate(_images(prompts, num_images, seed, negative))
    ]


def geneval(prompts: Sequence[Record], num_images: int, seed: int, negative: str) -> list[Drawing]:
    """OUT/00000/samples/00000.png, with OUT/00000/metadata.jsonl beside: what GenEval's evaluation script reads."""
    return [
        Drawing(
            f"{index // num_images:05d}/samples/{index % num_images:05d}.png",
            record["prompt"],
            words,
            (number,),
            record,
        )
        for index, (record, words, number) in enumerate(_images(prompts, num_images, seed, negative))
    ]


def dpg(prompts: Sequence[Record], num_images: int, seed: int, negative: str) -> list[Drawing]:
    """OUT/ID.png, the images of a prompt in one square grid: what DPG-Bench's script reads (4 images, 2 x 2)."""
    if round(num_images**0.5) ** 2 != num_images:
        raise ConfigError(f"--num-images {num_images}: --layout dpg makes square grids; use 1 or 4")
    drawings = []
    for index, record in enumerate(prompts):
        words = record.get("negative_prompt", negative)
        first = record.get("seed", seed + index * num_images)
        name = str(record.get("id", record.get("item_id", index)))
        seeds = tuple(range(first, first + num_images))
        drawings.append(Drawing(f"{name}.png", record["prompt"], words, seeds, record))
    return drawings


def numbered(prompts: Sequence[Record], num_images: int, seed: int, negative: str) -> list[Drawing]:
    """OUT/00000.png in the order of the prompts, 00000_1.png for further images: for PartiPrompts and scorers of folders."""
    drawings = []
    for index, (record, words, number) in enumerate(_images(prompts, num_images, seed, negative)):
        prompt, image = divmod(index, num_images)
        name = f"{prompt:05d}.png" if image == 0 else f"{prompt:05d}_{image}.png"
        drawings.append(Drawing(name, record["prompt"], words, (number,), record))
    return drawings


LAYOUTS = {"flat": flat, "geneval": geneval, "dpg": dpg, "parti": numbered}


def _images(
    prompts: Sequence[Record], num_images: int, seed: int, negative: str
) -> Iterator[tuple[Record, str, int]]:
    """Yield (record, negative prompt, seed) of every image, prompt by prompt; a record's own seed counts up likewise."""
    for index, record in enumerate(prompts):
        first = record.get("seed", seed + index * num_images)
        for number in range(num_images):
            yield record, record.get("negative_prompt", negative), first + number


def write_metadata(drawings: Sequence[Drawing], folder: Path) -> None:
    """The metadata.jsonl that GenEval expects in the folder of every prompt."""
    for item in drawings:
        path = folder / Path(item.file).parent.parent / "metadata.jsonl"
        text = json.dumps(item.record) + "\n"
        if not path.exists() or path.read_text("utf-8") != text:  # other prompts may have been here before
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)


def slug(prompt: str) -> str:
    """The letters and digits of a prompt, for a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
