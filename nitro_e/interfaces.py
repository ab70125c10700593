"""What the parts of the project promise each other: structural protocols, no base classes to inherit.

Ranges and shapes used everywhere:
    pixels    (B, 3, H, W) float, -1..1
    raw       (B, C, h, w) latents as the codec produces them; this is what shards store
    latents   (B, C, h, w) latents scaled to about unit variance; this is what the model sees
    t         (B,) float in 0..1; t = 0 is data, t = 1 is noise
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor


class TextEmbedding(NamedTuple):
    """Prompt tokens. A NamedTuple, so that DDP, torch.compile and pytrees see through it."""

    tokens: Tensor  # (B, L, D) float
    mask: Tensor  # (B, L) bool, True = a real token


class TextEncoder(Protocol):
    width: int  # D
    length: int  # L, the same for every prompt

    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        """Embed prompts; "" is the null prompt of classifier-free guidance."""


class LatentCodec(Protocol):
    channels: int
    stride: int  # pixels per latent cell, per side

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """pixels -> raw latents."""

    def normalize(self, raw: Tensor) -> Tensor:
        """raw latents -> latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """latents -> pixels (the inverse of both steps, clipped to -1..1)."""


class VisionEncoder(Protocol):
    width: int

    def features(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """pixels -> (B, h*w, width) patch features on the grid (h, w), row by row."""


class Denoiser(Protocol):
    """What samplers take: an EMMDiT, a guided one, a test lambda."""

    def __call__(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """Velocity `noise - data` at (x, t): (B, C, h, w)."""


@dataclass
class Batch:
    """One micro-batch on the training device."""

    latents: Tensor  # (B, C, h, w)
    text: TextEmbedding
    prompts: list[str]
    keys: list[str]  # "shard.tar:key" of every sample, for reports
    features: Tensor | None = None  # (B, h*w, F), only when REPA asks for it
    info: list[dict] = field(default_factory=list)  # the sample's json member, if any
