"""The discriminator: a frozen E-MMDiT whose image tokens are read on their own grids by small convolutional heads.

The backbone is the teacher. After some of its blocks the tokens become maps: one on the full grid outside the
compressed part, one per compression path inside (16x16 | 8x8 and 4x4 | 16x16 for the 512 px model), so that several
scales come for free. Only the heads are trained. Left out: batch statistics, and 1-D convolutions over flattened tokens
(Nitro-1, SANA-Sprint), which run across row ends and from one path into the next.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from nitro_e.config import Config, ConfigError, Ge, Le
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.stages.distill.gan_losses import Logits

Condition = Literal["none", "time", "time+text"]


class Slot(NamedTuple):
    """A place where heads look: the image tokens after `tap` blocks, those of one compression path."""

    tap: int
    ratio: int  # of the path; 1 on the full grid


def default_taps(config: ModelConfig) -> tuple[int, ...]:
    """Both ends of the compressed part, three places in it and the last block: 4, 10, 16, 19, 24 of the released model."""
    first, inside, _ = config.groups
    middle = [first + round(inside * share) for share in (6 / 16, 12 / 16, 15 / 16)]
    return tuple(sorted({max(first, 1), *middle, config.depth} - {0}))


def slots_of(config: ModelConfig, taps: Sequence[int]) -> tuple[Slot, ...]:
    """Every tap's maps, in the order of their tokens."""
    for tap in taps:
        if not 1 <= tap <= config.depth:
            raise ConfigError(f"taps {list(taps)}: block counts must be in 1 to {config.depth}")
    return tuple(
        Slot(tap, ratio)
        for tap in taps
        for ratio in ((1,) if config.on_full_grid(tap) else config.compression)
    )


def token_maps(tokens: Tensor, grid: tuple[int, int], ratios: Sequence[int]) -> list[Tensor]:
    """Image tokens (B, N, D) of one tap -> a map (B, D, h / r, w / r) per path; the paths' tokens follow each other."""
    sizes = [(grid[0] // ratio, grid[1] // ratio) for ratio in ratios]
    parts = tokens.split([rows * columns for rows, columns in sizes], dim=1)
    return [rearrange(part, "b (h w) d -> b d h w", h=rows) for part, (rows, _) in zip(parts, sizes)]


class Features(NamedTuple):
    """What heads judge."""

    maps: list[Tensor]  # (B, D, h, w) per slot
    time: Tensor  # (B, D)
    text: Tensor  # (B, D)


class Backbone:
    """The frozen model that heads read. Gradients flow through it to its input, none to its weights."""

    def __init__(self, model: EMMDiT, taps: Sequence[int] | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.slots = slots_of(model.config, taps or default_taps(model.config))
        self.taps = list(dict.fromkeys(slot.tap for slot in self.slots))
        self.width = model.config.width

    def __call__(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Features:
        """Noised latents (B, C, h, w), t (B,), text -> features. Only real text tokens count for the condition."""
        model = self.model
        grid = model.config.latent_grid(*x.shape[-2:])
        _, tokens = model.forward_intermediates(x, t, text, self.taps)
        maps = []
        for tap, tapped in zip(self.taps, tokens):
            maps += token_maps(tapped, grid, [slot.ratio for slot in self.slots if slot.tap == tap])
        words = model.text(text.tokens.to(model.text.weight.dtype)).float()  # (B, L, D)
        real = text.mask.float()[:, :, None]
        return Features(maps, model.time(t).float(), (words * real).sum(1) / real.sum(1).clamp(min=1))


@dataclass(frozen=True, kw_only=True)
class HeadConfig(Config):
    width: Annotated[int, Ge(1), Le(65536)] = 256  # hidden channels
    condition: Condition = "time+text"
    spectral_norm: bool = False


def norm_groups(width: int) -> int:
    """Groups of a group norm: 32, or fewer so that each has at least 8 channels (fewer values say little)."""
    return math.gcd(32, max(width // 8, 1))


class Head(nn.Module):
    """A map to a logit per position, the condition entering as a projection (arXiv 1802.05637)."""

    PROJECTION = 64

    def __init__(self, features: int, config: HeadConfig) -> None:
        super().__init__()
        width, groups = config.width, norm_groups(config.width)
        self.enter = nn.Conv2d(features, width, 1)
        self.norm = nn.GroupNorm(groups, width)
        self.inside = nn.Conv2d(width, width, 3, padding=1)
        self.norm_inside = nn.GroupNorm(groups, width)
        self.logit = nn.Conv2d(width, 1, 1)
        if config.spectral_norm:
            for conv in (self.enter, self.inside, self.logit):
                spectral_norm(conv)
        self.parts = {"none": (), "time": ("time",), "time+text": ("time", "text")}[config.condition]
        self.project = self.condition = None
        if self.parts:
            self.project = nn.Conv2d(width, self.PROJECTION, 1)
            self.condition = nn.Sequential(
                nn.Linear(len(self.parts) * features, width), nn.SiLU(), nn.Linear(width, self.PROJECTION)
            )

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """x (B, D, h, w), time and text (B, D) -> (B, h * w)."""
        x = F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)
        x = F.leaky_relu(self.norm(self.enter(x)), 0.2)
        x = (x + F.leaky_relu(self.norm_inside(self.inside(x)), 0.2)) / math.sqrt(2)
        logits = self.logit(x).flatten(1)  # (B, h w)
        if self.project is None:
            return logits
        known = {"time": time, "text": text}
        condition = torch.cat(
            [F.layer_norm(known[part], known[part].shape[1:]) for part in self.parts], dim=1
        )
        agreement = torch.einsum("bchw,bc->bhw", self.project(x), self.condition(condition))
        return logits + agreement.flatten(1) / math.sqrt(self.PROJECTION)


class FixedHeads(nn.Module):
    """One head per slot."""

    def __init__(self, slots: int, features: int, config: HeadConfig) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(features, config) for _ in range(slots))

    def forward(self, features: Features, step: int) -> Logits:
        """An entry (B, 1, h * w) per slot."""
        with full_precision(features) as (maps, time, text):
            return [head(x, time, text)[:, None] for head, x in zip(self.heads, maps)]


@contextlib.contextmanager
def full_precision(features: Features) -> Iterator[Features]:
    """float32 within, whatever the autocast: R1 compares logits that differ little, and heads cost next to nothing."""
    with torch.autocast(features.time.device.type, enabled=False):
        yield Features([x.float() for x in features.maps], features.time.float(), features.text.float())
