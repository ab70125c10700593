"""The discriminator: small convolutional heads on the image tokens of a frozen transformer, the teacher.

After some of its blocks (taps) the tokens become feature maps. Of an E-MMDiT that is one map on the full grid
outside the compressed part, and one per compression path inside (16x16 | 8x8 and 4x4 | 16x16 for the 512 px
model), so several scales come for free. Only the heads are trained. Left out: batch statistics, and 1-D
convolutions over flattened tokens (Nitro-1, SANA-Sprint), which run across row ends and from one path into
the next.
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

from nitro_e.config import Config, Ge, Le
from nitro_e.interfaces import Architecture, Grid, Model, TextEmbedding
from nitro_e.stages.distill.gan_losses import Logits

Condition = Literal["none", "time", "time+text"]


class FeatureMap(NamedTuple):
    """A map that one head reads: image tokens after `tap` blocks."""

    tap: int
    ratio: int  # the map has 1 / ratio of the full grid's rows and columns


def feature_maps(config: Architecture, taps: Sequence[int]) -> tuple[FeatureMap, ...]:
    """List the feature maps of every tap, in the order of their tokens."""
    config.check_taps(taps)
    return tuple(FeatureMap(tap, ratio) for tap in taps for ratio in config.feature_maps(tap))


def token_maps(tokens: Tensor, grid: Grid, ratios: Sequence[int]) -> list[Tensor]:
    """Cut the image tokens (B, N, D) of one tap into its maps (B, D, rows / r, columns / r), in order."""
    sizes = [(grid[0] // ratio, grid[1] // ratio) for ratio in ratios]
    parts = tokens.split([rows * columns for rows, columns in sizes], dim=1)
    return [rearrange(part, "b (h w) d -> b d h w", h=rows) for part, (rows, _) in zip(parts, sizes)]


class Features(NamedTuple):
    """The input of the heads."""

    maps: list[Tensor]  # (B, D, h, w) of every feature map
    time: Tensor  # (B, D)
    text: Tensor  # (B, D)


class Backbone:
    """The frozen model whose features the heads read. Gradients flow to its input, none to its weights."""

    def __init__(self, model: Model, taps: Sequence[int] | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.maps = feature_maps(model.config, taps or model.config.default_taps)
        self.taps = list(dict.fromkeys(place.tap for place in self.maps))
        self.width = model.config.width

    def __call__(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Features:
        """Compute the features of noised latents (B, C, h, w) at t (B,), given text."""
        return self.with_velocity(x, t, text)[1]

    def with_velocity(self, x: Tensor, t: Tensor, text: TextEmbedding) -> tuple[Tensor, Features]:
        """Compute the velocity (B, C, h, w) and the features in one pass."""
        config = self.model.config
        grid = config.latent_grid(*x.shape[-2:])
        velocity, tokens = self.model.forward_intermediates(x, t, text, self.taps)
        maps = []
        for tap, tapped in zip(self.taps, tokens):
            maps += token_maps(tapped, grid, config.feature_maps(tap))
        return velocity.float(), Features(maps, *self.model.condition(t, text))


@dataclass(frozen=True, kw_only=True)
class HeadConfig(Config):
    width: Annotated[int, Ge(1), Le(65536)] = 256  # hidden channels
    condition: Condition = "time+text"  # what the heads are told besides features
    spectral_norm: bool = False  # normalise the heads' weights by their spectral norm


def norm_groups(width: int) -> int:
    """Choose the groups of a group norm: 32, or fewer so that each has at least 8 channels."""
    return math.gcd(32, max(width // 8, 1))


class Head(nn.Module):
    """Map a feature map to a logit per position; the condition enters as a projection (arXiv 1802.05637)."""

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
        self.project: nn.Module | None = None
        self.condition: nn.Module | None = None
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
        if self.project is None or self.condition is None:
            return logits
        known = {"time": time, "text": text}
        condition = torch.cat(
            [F.layer_norm(known[part], known[part].shape[1:]) for part in self.parts], dim=1
        )
        agreement = torch.einsum("bchw,bc->bhw", self.project(x), self.condition(condition))
        return logits + agreement.flatten(1) / math.sqrt(self.PROJECTION)


class FixedHeads(nn.Module):
    """One head per feature map."""

    def __init__(self, maps: int, features: int, config: HeadConfig) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(features, config) for _ in range(maps))

    def forward(self, features: Features, step: int) -> Logits:
        """Return logits (B, 1, h * w) for every feature map."""
        with full_precision(features) as (maps, time, text):
            return [head(x, time, text)[:, None] for head, x in zip(self.heads, maps)]


@contextlib.contextmanager
def full_precision(features: Features) -> Iterator[Features]:
    """Compute in float32, whatever the autocast: R1 compares logits that differ little."""
    with torch.autocast(features.time.device.type, enabled=False):
        yield Features([x.float() for x in features.maps], features.time.float(), features.text.float())
