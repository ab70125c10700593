"""Samplers: functions of a velocity field, a start and a falling time grid. Guidance is a wrapper around the model.

A velocity field here is `velocity(x, t) -> Tensor` with x (B, C, h, w) and t (B,); `guide` makes one of a Denoiser.
States are float32 whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nitro_e.config import ConfigError
from nitro_e.flow import TimeGrid, time_grid
from nitro_e.interfaces import Denoiser, TextEmbedding

Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a model wants to be sampled; stored with its weights, every value can be overridden when sampling."""

    resolution: int = 512  # pixels per side
    height: int | None = None  # pixels; None: resolution
    width: int | None = None
    steps: int = 20
    guidance_scale: float = 4.5  # 0 or 1: no guidance
    sampler: Literal["euler", "heun"] = "euler"
    grid: TimeGrid = "released"
    shift: float = 1.0  # > 1 spends more steps at high noise

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        for name in ("resolution", "height", "width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.shift <= 0:
            raise ConfigError(f"shift must be positive, got {self.shift}")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.height or self.resolution, self.width or self.resolution

    def times(self) -> Tensor:
        return time_grid(self.steps, self.grid, self.shift)


def guide(model: Denoiser, text: TextEmbedding, negative: TextEmbedding, guidance_scale: float) -> Velocity:
    """Classifier-free guidance (arXiv 2207.12598): negative + scale * (text - negative).

    text, negative: embeddings of B prompts each. Scales 0 and 1 mean no guidance (the text alone, one pass).
    """
    if guidance_scale in (0, 1):
        return lambda x, t: model(x, t, text).float()
    both = TextEmbedding(*(torch.cat(pair) for pair in zip(negative, text)))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        without, with_text = model(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        return torch.lerp(without, with_text, guidance_scale)

    return velocity


def euler(velocity: Velocity, x: Tensor, times: Tensor, progress: bool = False) -> Tensor:
    """First-order steps along `times` (falling, from 1 to 0)."""
    for t, t_next in _steps(times, progress):
        x = x + (t_next - t) * velocity(x, t.expand(len(x)))
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor, progress: bool = False) -> Tensor:
    """Second-order steps (trapezoidal rule); the last one, to t = 0 where no model was trained, is an Euler step."""
    for t, t_next in _steps(times, progress):
        slope = velocity(x, t.expand(len(x)))
        guess = x + (t_next - t) * slope
        if t_next > 0:
            slope = (slope + velocity(guess, t_next.expand(len(x)))) / 2
        x = x + (t_next - t) * slope
    return x


SAMPLERS = {"euler": euler, "heun": heun}


def _steps(times: Tensor, progress: bool) -> tqdm:
    return tqdm(list(zip(times[:-1], times[1:])), desc="sampling", leave=False, disable=not progress)


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """(len(seeds), *shape) standard normal, on the CPU: each image depends on its own seed, not on its batch."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
