"""Where the parameters and the arithmetic of a model are: counts per part, per operation, and over the ablations.

Nothing is run or allocated: parameters are read off the model on the meta device, FLOPs (2 per multiply-add) are
counted for every linear layer and for the two matrix products of attention. Norms, activations, sums and the
position table are left out: they are below 1 % of the arithmetic. nitro-e describe prints what is counted here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from nitro_e.config import ConfigError
from nitro_e.model.emmdit import EMMDiT, ModelConfig
from nitro_e.model.layers import Grid


@dataclass(frozen=True)
class Count:
    """What one row of a table sums up. Tokens are those the part works on; FLOPs are of one latent's forward."""

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
    "time and shared modulation", "text embedding", "patch embedding", "blocks before", "compression", "blocks inside",
    "reconstruction", "blocks after", "output",
)  # fmt: skip
OPERATIONS = ("attention projections", "attention", "MLP", "modulation", "norms", "outside blocks")


def parts(config: ModelConfig, grid: Grid | None = None, text_length: int = 128) -> list[Count]:
    """Counts of each part in the order of the forward pass, without parts that are off. grid: default the training grid."""
    height, width = grid or (config.base_grid, config.base_grid)
    config.check_grid(height, width, text_length)
    full, inside, _ = config.image_tokens(height, width)
    tokens = {part: (full, 0) for part in PARTS} | {
        "time and shared modulation": (0, 0),
        "text embedding": (0, text_length),
        "blocks before": (full, text_length),
        "blocks inside": (inside, text_length),
        "blocks after": (full, text_length),
    }
    items = list(_items(config, (height, width), text_length))
    return [
        dataclasses.replace(
            _sum(part, [item for item in items if item.part == part]), image_tokens=image, text_tokens=text
        )
        for part, (image, text) in tokens.items()
        if any(item.part == part for item in items)
    ]


def operations(config: ModelConfig, grid: Grid | None = None, text_length: int = 128) -> list[Count]:
    """The same counts by kind of operation."""
    height, width = grid or (config.base_grid, config.base_grid)
    items = list(_items(config, (height, width), text_length))
    return [_sum(name, [item for item in items if item.operation == name]) for name in OPERATIONS]


def total(config: ModelConfig, grid: Grid | None = None, text_length: int = 128) -> Count:
    """Parameters and FLOPs of the whole model."""
    height, width = grid or (config.base_grid, config.base_grid)
    return _sum("total", list(_items(config, (height, width), text_length)))


def ablations(config: ModelConfig, grid: Grid, text_length: int = 128) -> list[tuple[str, ModelConfig]]:
    """Each idea of the paper switched off, or replaced by what it replaced, where the config has it and the grid allows it."""
    off = dict(compression=(), position_reinforcement=False)
    choices = {
        "compression: none": off,
        "compression: one path, (2)": dict(compression=(2,)),
        "compression: one path, (4)": dict(compression=(4,)),
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


def _sum(name: str, items: list[_Item]) -> Count:
    return Count(name, sum(item.parameters for item in items), sum(item.flops for item in items))


def _items(config: ModelConfig, grid: Grid, text_length: int) -> Iterator[_Item]:
    tokens = config.image_tokens(*grid)
    group_of_block = [group for group, count in enumerate(config.groups) for _ in range(count)]
    with torch.device("meta"):
        model = EMMDiT(config)
    for name, module in model.named_modules():
        parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if parameters:
            rows = _rows(
                config, name.split("."), tokens[0], [tokens[group] for group in group_of_block], text_length
            )
            flops = 2 * rows * module.weight.numel() if isinstance(module, nn.Linear) else 0
            yield _Item(_part(name, group_of_block), _operation(name), parameters, flops)
    for index, (group, region) in enumerate(zip(group_of_block, config.regions)):
        joint = tokens[group] + text_length
        flops = 4 * joint * (joint // region.groups) * config.width  # q k^T and the weighted sum of v
        yield _Item(_part(f"blocks.{index}", group_of_block), "attention", 0, flops)


def _rows(config: ModelConfig, name: list[str], full: int, image: list[int], text: int) -> int:
    """How many vectors a linear layer is applied to."""
    match name:
        case ["time" | "shared_modulation", *_] | ["blocks", _, _, "modulation", *_]:
            return 1
        case ["text", *_] | ["blocks", _, "text", *_]:
            return text
        case ["blocks", index, "image", *_]:
            return image[int(index)]
        case ["compress", "paths", path, *_]:
            return full // config.compression[int(path)] ** 2
    return full


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
        "reconstruct": "reconstruction",
        "out": "output",
    }[first]


def _operation(name: str) -> str:
    if not name.startswith("blocks."):
        return "outside blocks"
    found = {"modulation": "modulation", "norm": "norms", "mlp": "MLP"}
    return next((operation for key, operation in found.items() if key in name), "attention projections")
