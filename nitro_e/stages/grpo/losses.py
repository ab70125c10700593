"""The objectives of policy-gradient post-training, as functions of velocities; every mean is over all D latent numbers.

Clipped objective: PPO (arXiv 1707.06347, eq. 7) with group advantages (GRPO, arXiv 2402.03300) over the transitions of a
sampler (Flow-GRPO, arXiv 2505.05470). Log-probabilities are means over D, not sums, so a ratio is the D-th root of the
true one: clip ranges are 1e-5 to 1e-3, and gradients are small by the same factor.
NFT: DiffusionNFT (arXiv 2509.16117), which needs only final latents and weighs a positive and a negative velocity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor

from nitro_e.config import Config, ConfigError, Ge, Gt, Le, Lt
from nitro_e.sampling import flow
from nitro_e.stages.grpo.sde import Transitions

KLKind = Literal["velocity", "gaussian", "gaussian_dt"]
StepWeight = Literal["none", "noise", "1/h"]


@dataclass(frozen=True, kw_only=True)
class KLConfig(Config):
    """The pull to the reference: beta times a KL per transition, or a mean squared velocity difference."""

    kind: KLKind = "velocity"  # gaussian: the exact KL of a transition; gaussian_dt: times h, as Flow-GRPO
    beta: Annotated[float, Ge(0)] = 1e-3  # 0: no reference is kept
    # the kind that beta is given for, which is converted to `kind`; None: the same
    units: KLKind | None = None


@dataclass(frozen=True, kw_only=True)
class ClippedConfig(Config):
    kind: Literal["clipped"] = "clipped"
    clip_low: Annotated[float, Gt(0), Lt(1)] = 3e-4  # the ratio is held in 1 - clip_low ... 1 + clip_high
    clip_high: Annotated[float, Gt(0), Lt(1)] = 3e-4
    kl: KLConfig = field(default_factory=KLConfig)
    # GRPO-Guard (arXiv 2510.22319): log-ratios without their bias, at one scale for all steps
    ratio_norm: bool = False
    # noise: by std (TempFlow-GRPO, arXiv 2508.04324); mean 1 over the trained steps
    step_weight: StepWeight = "none"


@dataclass(frozen=True, kw_only=True)
class NFTConfig(Config):
    kind: Literal["nft"] = "nft"
    # how far the two velocities reach from the old one to the new one
    beta: Annotated[float, Gt(0), Le(1)] = 1.0
    times: Annotated[int, Ge(1)] = 9  # training times per image: the first steps of the rollout's grid
    kl: KLConfig = field(default_factory=lambda: KLConfig(beta=1e-4))
    lag: Annotated[float, Ge(0)] = 1e-3  # the policy that draws is an average: decay lag * rollout ...
    max_lag: Annotated[float, Ge(0), Lt(1)] = 0.5  # ... up to this

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl.kind != "velocity" or self.kl.units not in (None, "velocity"):
            raise ConfigError("kl.kind: nft has no transitions; use velocity")


def per_sample(values: Tensor) -> Tensor:
    """Mean over everything but the rows, (B, ...) -> (B,)."""
    return values.flatten(1).mean(dim=1)


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B,) mean over D of the normal log-density, float32. std: (B, 1, 1, 1)."""
    squared = ((x_next.float() - mean) / std).square()
    return per_sample(-squared / 2) - std.log().flatten() - math.log(2 * math.pi) / 2


def log_ratio(x_next: Tensor, mean: Tensor, old: Tensor, std: Tensor, ratio_norm: bool) -> Tensor:
    """(B,) of the new transition to the old one: exactly 0 where the means are equal.

    ratio_norm: without the term -mean(delta^2) / (2 std^2), which is always negative, and times std:
    mean(eps delta) with eps = (x' - old) / std (GRPO-Guard, Section 3).
    """
    if ratio_norm:
        return per_sample((x_next.float() - old) / std * (mean - old))
    return log_prob(x_next, mean, std) - log_prob(x_next, old, std)


def clipped_objective(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """(B,) to minimise: max(-A r, -A clip(r, 1 - low, 1 + high)), PPO eq. 7."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))


def kl_coefficients(kind: KLKind, table: Transitions) -> Tensor:
    """(N,) what mean((v - v_ref)^2) is multiplied by; means of transitions differ by v_coef (v - v_ref)."""
    if kind == "velocity":
        return torch.ones_like(table.h)
    return table.gaussian_kl * (table.h if kind == "gaussian_dt" else 1)


def convert_beta(beta: float, source: KLKind, target: KLKind, table: Transitions, steps: range) -> float:
    """The weight of `target` that pulls as strongly as beta of `source`, averaged over the trained steps."""
    source_mean, target_mean = (
        kl_coefficients(kind, table)[steps.start : steps.stop].mean().item() for kind in (source, target)
    )
    return beta * source_mean / target_mean


def step_weights(kind: StepWeight, table: Transitions, steps: range) -> Tensor:
    """(N,) weights of the objective, mean 1 over the trained steps."""
    weights = {"none": torch.ones_like(table.h), "noise": table.std, "1/h": 1 / table.h}[kind]
    return weights / weights[steps.start : steps.stop].mean()


def nft_loss(
    data: Tensor, x: Tensor, t: Tensor, velocity: Tensor, old: Tensor, optimality: Tensor, beta: float
) -> Tensor:
    """(B,) DiffusionNFT's loss (arXiv 2509.16117, eq. 5, with its self-normalised weights).

    data: final latents, x: those noised to t, optimality: (B,) in 0..1. The implicit positive velocity is
    beta v + (1 - beta) old, the negative one (1 + beta) old - beta v; both are compared in data space.
    """
    losses = []
    for implicit in (beta * velocity + (1 - beta) * old, (1 + beta) * old - beta * velocity):
        error = flow.to_data(x, t, implicit) - data
        scale = per_sample(error.detach().double().abs()).clamp(min=1e-5).float()
        losses.append(per_sample(error.square()) / scale)
    positive, negative = losses
    return (optimality * positive + (1 - optimality) * negative) / beta
