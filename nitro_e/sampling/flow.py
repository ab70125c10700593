"""Rectified flow: the only home of x_t, the velocity, the draws of t and the time grids.

Conventions (Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206): t = 0 is data, t = 1 is noise,

    x_t = (1 - t) * data + t * noise,    velocity = dx_t / dt = noise - data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from nitro_e.config import Config, ConfigError, Ge, Gt, Le


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, ..., 1), to multiply `like`."""
    return t.reshape(-1, *([1] * (like.ndim - 1)))


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Compute x_t on the straight path. data, noise: (B, ...); t: (B,)."""
    t = expand(t, data)
    return (1 - t) * data + t * noise


def velocity_target(data: Tensor, noise: Tensor) -> Tensor:
    return noise - data


def to_data(x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """Predict x0 from a velocity at (x, t): x - t v, exact at t = 1. x, velocity: (B, ...); t: (B,)."""
    return x - expand(t, x) * velocity


def to_noise(x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """Predict the noise from a velocity at (x, t): x + (1 - t) v. x, velocity: (B, ...); t: (B,)."""
    return x + (1 - expand(t, x)) * velocity


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move time towards noise for larger grids: s t / (1 + (s - 1) t) (arXiv 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


MODE_SCALE = 2 / (math.pi - 2)  # up to here the map of the `mode` law is monotonic


@dataclass(frozen=True, kw_only=True)
class TimestepConfig(Config):
    """The distribution of training times."""

    # distribution of training times (arXiv 2403.03206, section 3.1)
    kind: Literal["logit_normal", "uniform", "mode", "cosmap"] = "logit_normal"
    mean: float = 0.0  # logit_normal: mean of the logit; positive means more noise
    std: Annotated[float, Gt(0)] = 1.0  # logit_normal: deviation of the logit
    # mode: how much the middle (above 0) or the ends (below 0) are preferred; 0 is uniform
    scale: Annotated[float, Ge(-1), Le(MODE_SCALE)] = 1.29
    shift: Annotated[float, Gt(0)] = 1.0  # see shift_time
    quantize: bool = False  # to the released grid 1/1000, 2/1000, ..., 1


def training_times(config: TimestepConfig, normal: Tensor) -> Tensor:
    """Turn standard normal draws into training times in 0..1, (B,) -> (B,).

    Taking the draws as input keeps all randomness in the caller. Equations are those of arXiv 2403.03206.
    """
    t = torch.special.ndtr(normal)  # the normal distribution function makes a normal draw uniform
    if config.kind == "logit_normal":
        # eq. 19
        t = torch.sigmoid(config.mean + config.std * normal)
    elif config.kind == "mode":
        # eq. 20
        t = 1 - t - config.scale * (torch.cos(math.pi / 2 * t).square() - 1 + t)
    elif config.kind == "cosmap":
        # eq. 21: cosine diffusion's signal-to-noise ratios
        t = 1 - 1 / (torch.tan(math.pi / 2 * t) + 1)
    t = shift_time(t, config.shift)
    if config.quantize:
        t = torch.ceil(t * 1000).clamp(1, 1000) / 1000
    return t


@dataclass(frozen=True, kw_only=True)
class WeightConfig(Config):
    """The weight of the squared velocity error at time t, over and above how often t is drawn."""

    # min_snr: arXiv 2303.09556; sigmoid: arXiv 2303.00848 and 2410.19324
    kind: Literal["uniform", "min_snr", "sigmoid"] = "uniform"
    gamma: Annotated[float, Gt(0)] = 5.0  # min_snr: largest weight of the squared error of the x0 prediction
    bias: Annotated[float, Ge(-50), Le(50)] = (
        0.0  # sigmoid: log SNR at which the weight of the noise's error is 1/2
    )


def loss_weight(config: WeightConfig, t: Tensor) -> Tensor:
    """Compute the weight of the squared velocity error at t, (B,) -> (B,).

    With SNR = ((1 - t) / t)^2, the squared errors of x0 and of the noise are t^2 and (1 - t)^2 times that of the
    velocity. min_snr weighs the error of x0 with min(SNR, gamma). sigmoid weighs the error of the noise with
    sigmoid(bias - log SNR), integrated over log SNR for uniform t: d log SNR / dt = -2 / (t (1 - t)).
    """
    if config.kind == "min_snr":
        return torch.minimum((1 - t).square(), config.gamma * t.square())
    if config.kind == "sigmoid":
        return 2 * t * (1 - t) / (t.square() + math.exp(-config.bias) * (1 - t).square())
    return torch.ones_like(t)


TimeGrid = Literal["released", "linear"]


def time_grid(steps: int, kind: TimeGrid = "released", shift: float = 1.0) -> Tensor:
    """Build the (steps + 1,) falling times of a sampler, from 1 to 0, float32.

    `released` is what diffusers' FlowMatchEulerDiscreteScheduler(1000) gives and the released checkpoints expect:
    linspace(1000, 1, steps) / 1000, then 0; its last step is a tiny one. `linear` has equal steps.
    """
    if steps < 1:
        raise ConfigError(f"the number of sampling steps must be at least 1, got {steps}")
    if kind == "released":
        times = torch.cat([torch.linspace(1000, 1, steps, dtype=torch.float64) / 1000, torch.zeros(1)])
    elif kind == "linear":
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    else:
        raise ConfigError(f"unknown time grid '{kind}' (known: released, linear)")
    return shift_time(times, shift).float()
