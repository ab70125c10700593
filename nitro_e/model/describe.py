"""Counts of a model's parameters and arithmetic: per part, per operation, and over E-MMDiT's ablations.

Nothing is run or allocated. Of an E-MMDiT, parameters are read off the model on the meta device, and FLOPs (2
per multiply-add) are counted for every linear layer and for the two matrix products of attention. Norms,
activations, sums and the position table are left out: they are below 1 % of the arithmetic. Of models of
other kinds torch's counter follows the forward pass on the meta device. `nitro-e describe` prints what is
counted here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nitro_e.config import ConfigError
from nitro_e.interfaces import Architecture, Grid, TextEmbedding
from nitro_e.model.emmdit import EMMDiT, ModelConfig


@dataclass(frozen=True)
class Count:
    """One row of a table: FLOPs are those of one latent's forward pass, tokens those that the part works on."""

    name: str
    parameters: int
    flops: int
    image_tokens: int = 0
    text_tokens: int = 0


@dataclass(frozen=True)
class _Item:
    """One leaf module, or the attention of one block."""

    part: str
    operation: str
    parameters: int
    flops: int


PARTS = (
    "time and shared modulation",
    "text embedding",
    "patch embedding",
    "blocks before",
    "compression",
    "blocks inside",
    "reconstruction",
    "blocks after",
    "output",
)
OPERATIONS = ("attention projections", "attention", "MLP", "modulation", "norms", "outside blocks")


def parts(config: Architecture, grid: Grid | None = None, text_length: int = 128) -> list[Count]:
    """Count each part: of an E-MMDiT in the order of the forward pass, without parts that are off.

    grid: by default the one an E-MMDiT is trained on, and 16 x 16 of other models.
    """
    grid = grid or usual_grid(config)
    config.check_grid(*grid, text_length)
    if not isinstance(config, ModelConfig):
        return _measured(config, grid, text_length)
    full, inside, _ = config.image_tokens(*grid)
    pooled = config.text_tokens(text_length)[1]
    pooling = text_length if config.text_compression > 1 else 0
    tokens = {part: (full, 0) for part in PARTS} | {
        "time and shared modulation": (0, 0),
        "text embedding": (0, text_length),
        "blocks before": (full, text_length),
        "compression": (full, pooling),
        "blocks inside": (inside, pooled),
        "reconstruction": (full, pooling),
        "blocks after": (full, text_length),
    }
    items = list(_items(config, grid, text_length))
    return [
        dataclasses.replace(
            _sum(part, [item for item in items if item.part == part]), image_tokens=image, text_tokens=text
        )
        for part, (image, text) in tokens.items()
        if any(item.part == part for item in items)
    ]


def operations(config: ModelConfig, grid: Grid | None = None, text_length: int = 128) -> list[Count]:
    """Count each kind of operation of an E-MMDiT."""
    items = list(_items(config, grid or usual_grid(config), text_length))
    return [_sum(name, [item for item in items if item.operation == name]) for name in OPERATIONS]


def total(config: Architecture, grid: Grid | None = None, text_length: int = 128) -> Count:
    """Count the parameters and FLOPs of the whole model."""
    return _sum("total", parts(config, grid, text_length))


def weak_pass(config: ModelConfig, grid: Grid | None = None, text_length: int = 128) -> float:
    """Return the FLOPs of a pass without the compressed blocks, as a share of those of a whole one."""
    counts = parts(config, grid, text_length)
    skipped = sum(count.flops for count in counts if count.name == "blocks inside")
    return 1 - skipped / sum(count.flops for count in counts)


def ablations(config: ModelConfig, grid: Grid, text_length: int = 128) -> list[tuple[str, ModelConfig]]:
    """List configs with one idea of the paper switched off or replaced, as far as the grid allows it."""
    off: dict[str, Any] = dict(compression=(), position_reinforcement=False)
    choices: dict[str, dict[str, Any]] = {
        "compression: none": off,
        "compression: one path, (2)": dict(compression=(2,)),
        "compression: one path, (4)": dict(compression=(4,)),
        "text compression: by 2": dict(text_compression=2),
        "text compression: by 4": dict(text_compression=4),
        "position reinforcement: off": dict(position_reinforcement=False),
        "subregion attention: off": dict(attention=("full",)),
        "modulation: AdaLN-single": dict(modulation="single"),
        "modulation: AdaLN in every block (DiT)": dict(modulation="full"),
        "qk norm: off": dict(qk_norm=False),
        "all of these: a plain MMDiT": dict(off, attention=("full",), modulation="full", qk_norm=False),
    }
    changed = []
    for name, values in choices.items():
        try:
            other = dataclasses.replace(config, **values)
            other.check_grid(*grid, text_length)
        except ConfigError:  # this choice does not divide the grid
            continue
        if other != config:
            changed.append((name, other))
    return changed


def usual_grid(config: Architecture) -> Grid:
    """Return the token grid that models are counted on unless another is given."""
    return (config.base_grid, config.base_grid) if isinstance(config, ModelConfig) else (16, 16)


def _sum(name: str, items: Sequence[Count | _Item]) -> Count:
    return Count(name, sum(item.parameters for item in items), sum(item.flops for item in items))


def _measured(config: Architecture, grid: Grid, text_length: int) -> list[Count]:
    """Count each top-level module of a model of any kind."""
    with torch.device("meta"):
        model = config.build()
        latents = torch.empty(1, config.latent_channels, *(side * config.patch_size for side in grid))
        mask = torch.ones(1, text_length, dtype=torch.bool)
        text = TextEmbedding(torch.empty(1, text_length, config.text_width), mask)
        with FlopCounterMode(display=False) as counter:
            model(latents, torch.empty(1), text)
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    counts = {
        name: (sum(p.numel() for p in module.parameters()), flops.get(f"{type(model).__name__}.{name}", 0))
        for name, module in model.named_children()
    }
    rest = sum(p.numel() for p in model.parameters()) - sum(parameters for parameters, _ in counts.values())
    outside = counter.get_total_flops() - sum(flops for _, flops in counts.values())
    counts["outside modules"] = rest, outside
    return [Count(name, *numbers) for name, numbers in counts.items() if any(numbers)]


def _items(config: ModelConfig, grid: Grid, text_length: int) -> Iterator[_Item]:
    image, text = config.image_tokens(*grid), config.text_tokens(text_length)
    group_of_block = [group for group, count in enumerate(config.groups) for _ in range(count)]
    with torch.device("meta"):
        model = EMMDiT(config)
    for name, module in model.named_modules():
        parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if parameters:
            rows = _rows(config, name.split("."), image, text, group_of_block)
            flops = 2 * rows * module.weight.numel() if isinstance(module, nn.Linear) else 0
            yield _Item(_part(name, group_of_block), _operation(name), parameters, flops)
    for index, (group, region) in enumerate(zip(group_of_block, config.regions)):
        joint = image[group] + text[group]
        flops = 4 * joint * (joint // region.groups) * config.width  # q k^T and the weighted sum of v
        yield _Item(_part(f"blocks.{index}", group_of_block), "attention", 0, flops)


def _rows(
    config: ModelConfig,
    name: list[str],
    image: Sequence[int],
    text: Sequence[int],
    group_of_block: Sequence[int],
) -> int:
    """Count the vectors that a linear layer is applied to."""
    match name:
        case ["time" | "shared_modulation", *_] | ["blocks", _, _, "modulation", *_]:
            return 1
        case ["text", *_]:
            return text[0]
        case ["compress_text" | "restore_text", *_]:
            return text[1]
        case ["blocks", index, "text", *_]:
            return text[group_of_block[int(index)]]
        case ["blocks", index, "image", *_]:
            return image[group_of_block[int(index)]]
        case ["compress", "paths", path, *_]:
            return image[0] // config.compression[int(path)] ** 2
    return image[0]


def _part(name: str, group_of_block: list[int]) -> str:
    first, *rest = name.split(".")
    if first == "blocks":
        return ("blocks before", "blocks inside", "blocks after")[group_of_block[int(rest[0])]]
    return {
        "time": "time and shared modulation",
        "shared_modulation": "time and shared modulation",
        "text": "text embedding",
        "patch": "patch embedding",
        "compress": "compression",
        "compress_text": "compression",
        "reconstruct": "reconstruction",
        "restore_text": "reconstruction",
        "drop_tokens": "reconstruction",
        "out": "output",
    }[first]


def _operation(name: str) -> str:
    if not name.startswith("blocks."):
        return "outside blocks"
    found = {"modulation": "modulation", "norm": "norms", "mlp": "MLP"}
    return next((operation for key, operation in found.items() if key in name), "attention projections")
