"""Say in advance what a data set takes: bytes of each column as the writer writes it, GPU hours of counted FLOPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nitro_e.data.index import BLOCK, shard_index
from nitro_e.data.making.encode import EncodeConfig, text_members
from nitro_e.data.making.writer import field_bytes

# What stands for images, captions and their json where no shards can be measured: a 512 px JPEG of a photograph.
ASSUMED = {"jpg": bytes(69_000), "txt": bytes(300), "json": bytes(300)}


@dataclass(frozen=True)
class Column:
    """What is stored of every sample under one name, and the FLOPs of making it (None: not counted)."""

    name: str
    bytes_per_sample: int
    flops: float | None = 0.0


def in_tar(size: int | np.ndarray) -> int | np.ndarray:
    """Return the bytes a member takes in a tar: a header, and whole blocks."""
    return BLOCK + -(-size // BLOCK) * BLOCK


def stored(members: Mapping[str, Any]) -> int:
    """Return the bytes that one sample of these members takes in a shard."""
    return sum(int(in_tar(len(field_bytes(value)))) for value in members.values())


def measured(shards: Sequence[str]) -> int:
    """Return the mean bytes of a sample in packed shards."""
    nbytes = samples = 0
    for path in shards:
        index = shard_index(path)
        samples += len(index.rows)
        for name in index.extensions:
            there = index.rows[name][index.rows[name]["offset"] > 0]
            nbytes += int(np.sum(in_tar(there["size"].astype(np.int64))))
    return round(nbytes / max(samples, 1))


def encoded(
    latents: Sequence[int],
    text: tuple[int, int],
    features: tuple[int, int] | None,
    config: EncodeConfig,
    real_tokens: int | None = None,
) -> dict[str, int]:
    """Return the bytes of a sample in the columns that `encode` writes.

    latents: (C, h, w); text: (L, D), of which `real_tokens` (default: all) are no padding; features: (tokens, F).
    """
    mask = torch.arange(text[0]) < (real_tokens or text[0])
    members = {
        "latents": {**ASSUMED, "jpg": np.zeros(latents, np.float16)},
        "text": text_members(torch.zeros(text), mask, config),
    }
    if features is not None:
        members["features"] = {"features.npy": np.zeros(features, np.float16)}
    return {name: stored(column) for name, column in members.items()}


def lines(
    columns: Sequence[Column], images: int, samples: int, training_flops: float, teraflops: float
) -> list[str]:
    """Write the plan as a table.

    images: to be stored and encoded once; samples: seen by the training; training_flops: of one of them, forward and
    backward; teraflops: TFLOP/s that a GPU reaches.
    """
    hours = 1 / (teraflops * 1e12 * 3600)
    rate = teraflops * 1e12 / training_flops  # samples/s of a GPU
    found = [
        f"{'stored':<20}{'bytes a sample':>16}{'in all, GB':>14}{'MB/s for a GPU':>17}{'TFLOP to make':>16}{'GPU hours':>12}"
    ]
    for column in columns:
        made = ("not counted", "")
        if column.flops is not None:
            made = _cost(column.flops, images * hours) if column.flops else ("", "")
        found.append(
            f"{column.name:<20}{column.bytes_per_sample:>16,}{column.bytes_per_sample * images / 1e9:>14,.1f}"
            f"{column.bytes_per_sample * rate / 1e6:>17,.1f}{made[0]:>16}{made[1]:>12}"
        )
    in_step = [(column.name, column.flops) for column in columns if column.flops]
    found += [
        "",
        f"{'training':<50}{'TFLOP a sample':>16}{'GPU hours':>12}",
        _training(
            f"the model, {samples:,} samples ({samples / images:.1f} epochs)", training_flops, samples * hours
        ),
        *(_training(f"{name}, if made in the step", flops, samples * hours) for name, flops in in_step),
    ]
    return found


def _cost(flops: float, hours: float) -> tuple[str, str]:
    return f"{flops / 1e12:.3f}", f"{flops * hours:,.1f}"


def _training(name: str, flops: float, hours: float) -> str:
    teraflop, total = _cost(flops, hours)
    return f"{name:<50}{teraflop:>16}{total:>12}"
