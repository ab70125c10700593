"""Write the offline domain as webdataset shards: png, txt (caption), json (GenEval metadata, objects drawn).

    nitro-e make-shapes data/shapes --split train --num 40000
    nitro-e make-shapes data/shapes --split heldout --num 600
    nitro-e make-shapes data/hard --num 20000 --seed 1 --tasks two_object counting color_attr

Sample i is a pure function of (seed, split, tasks, i). The same command continues: finished shards are kept.
shapes-SPLIT.png, a sheet of the first images, and shapes-SPLIT.json, the settings, lie beside the shards.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from nitro_e.cli import common as cli
from nitro_e.config import ConfigError, parse_json, read_text
from nitro_e.data.making.writer import write_shard
from nitro_e.files import atomic_file
from nitro_e.record.progress import bar
from nitro_e.shapes.render import render
from nitro_e.shapes.scenes import SPLITS, TASKS, Scene, metadata, scene


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("out", type=Path, help="directory of the shards")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--num", type=int, default=20000, help="samples in all")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolution", type=int, default=64, help="side of the images, pixels")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="in turn; default: all")
    args = parser.parse_args(argv)
    return cli.run(lambda: make_shards(**vars(args)))


def make_shards(
    out: Path,
    split: str,
    num: int,
    samples_per_shard: int = 1000,
    seed: int = 0,
    resolution: int = 64,
    tasks: Sequence[str] = TASKS,
) -> list[Path]:
    """Write what is missing of `out/shapes-SPLIT-NNNNNN.tar` and return all paths.

    Raises ConfigError for settings out of range, or other than those of the shards that `out` already holds.
    """
    settings = {"num": num, "samples_per_shard": samples_per_shard, "seed": seed, "resolution": resolution}
    limits = ((1, 10**9), (1, 10**9), (0, 2**62), (32, 2048))
    for (key, value), (least, most) in zip(settings.items(), limits):
        if not least <= value <= most:
            raise ConfigError(
                f"--{key.replace('_', '-')} {value}: must be at least {least} and at most {most}"
            )
    if len(set(tasks)) < len(tasks):
        raise ConfigError(f"--tasks {' '.join(tasks)}: names one twice; name each once")
    _check_manifest(out / f"shapes-{split}.json", settings | {"tasks": list(tasks)})
    pick = partial(_pick, seed, split, tasks)
    _write_sheet(out / f"shapes-{split}.png", pick, resolution)
    paths = []
    with bar(total=num, unit="img", desc=split) as progress:
        for first in range(0, num, samples_per_shard):
            indices = range(first, min(first + samples_per_shard, num))
            paths.append(out / f"shapes-{split}-{first // samples_per_shard:06d}.tar")
            if paths[-1].exists():
                progress.update(len(indices))
            else:
                write_shard(paths[-1], _samples(split, pick, indices, resolution, progress))
    return paths


def _check_manifest(path: Path, settings: dict) -> None:
    """Remember the settings of a split's shards; refuse to mix two sets of them under one name."""
    if path.exists():
        before = parse_json(read_text(path), str(path))
        before = {"tasks": list(TASKS)} | (before if isinstance(before, dict) else {})
        for key, value in settings.items():
            if before.get(key) != value:
                raise ConfigError(
                    f"--{key.replace('_', '-')} {value}: {path} says the shards beside it were made with "
                    f"{before.get(key)}; use that, another directory, or delete {path.with_suffix('')}*"
                )
        return
    with atomic_file(path) as file:
        file.write(json.dumps(settings).encode())


def _pick(seed: int, split: str, tasks: Sequence[str], index: int) -> Scene:
    """Make scene `index` of those with the given tasks, which take turns."""
    turn, place = divmod(index, len(tasks))
    return scene(seed, split, turn * len(TASKS) + TASKS.index(tasks[place]))


def _write_sheet(path: Path, pick: Callable[[int], Scene], resolution: int) -> None:
    """Write the first 72 images as one sheet."""
    rows, columns, side = 6, 12, resolution + 2
    images = [render(pick(index), resolution) for index in range(rows * columns)]
    framed = np.pad(np.stack(images), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    grid = framed.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(rows * side, columns * side, 3)
    with atomic_file(path) as file:
        Image.fromarray(grid).save(file, "png")


def _samples(
    split: str, pick: Callable[[int], Scene], indices: range, resolution: int, progress: tqdm
) -> Iterator[dict]:
    for index in indices:
        drawn = pick(index)
        png = io.BytesIO()
        Image.fromarray(render(drawn, resolution)).save(png, "png", compress_level=3)
        record = metadata(drawn.request)
        yield {
            "__key__": f"{split}_{index:08d}",
            "png": png.getvalue(),
            "txt": record["prompt"],
            "json": record | {"objects": [thing._asdict() for thing in drawn.objects]},
        }
        progress.update()
