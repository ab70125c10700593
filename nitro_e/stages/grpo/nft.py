"""DiffusionNFT (arXiv 2509.16117): from final latents alone, a positive and a negative velocity weighed by optimality."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from nitro_e.config import Ge, Gt, Le, Lt
from nitro_e.randomness import SampleRandom
from nitro_e.sampling import flow
from nitro_e.stages.grpo.algorithm import FinalLatentsConfig, Shared
from nitro_e.stages.grpo.kl import KLConfig
from nitro_e.stages.grpo.rollout import Rows
from nitro_e.stages.grpo.sde import per_sample


@dataclass(frozen=True, kw_only=True)
class NFTConfig(FinalLatentsConfig):
    kind: Literal["nft"] = "nft"  # DiffusionNFT: forward-process regression
    # how far the two velocities reach from the old one to the new one
    beta: Annotated[float, Gt(0), Le(1)] = 1.0
    kl: KLConfig = field(default_factory=lambda: KLConfig(beta=1e-4))
    lag: Annotated[float, Ge(0)] = 1e-3  # the policy that draws is an average: decay lag * rollout ...
    max_lag: Annotated[float, Ge(0), Lt(1)] = 0.5  # ... up to this

    def build(self, shared: Shared) -> NFT:
        return NFT(self, shared)


class NFT:
    """Noises the final latents again, and moves the velocity towards or away from them by their advantage."""

    name = "nft"
    frozen_passes = 1.0

    def __init__(self, config: NFTConfig, shared: Shared) -> None:
        self.config, self.shared = config, shared
        self.sde = shared.schedule.sde.to(shared.device)
        assert shared.policy.old is not None, "Policy keeps it, as NFTConfig.keeps_old says"
        self.rollout_model: nn.Module = shared.policy.old

    def before_rollout(self, rollout: int) -> None:
        """Let the old policy follow the trained one."""
        if rollout > 0:
            self.shared.policy.follow(min(self.config.lag * rollout, self.config.max_lag))

    def before_updates(self, updates: list[list[Rows]]) -> None:
        pass

    def loss(self, net: nn.Module, rows: Rows, rng: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        shared, largest, t = self.shared, self.shared.max_advantage, self.sde.t[rows.step]
        x = flow.interpolate(rows.latents, rng.normal(*rows.latents.shape[1:]), t)
        reference = shared.reference_velocity(x, t, rows.text)
        with torch.no_grad():
            old = shared.velocity(self.rollout_model, x, t, rows.text, self.rollout_model).velocity
        policy = shared.velocity(net, x, t, rows.text)
        optimality = rows.advantage / largest / 2 + 0.5  # -largest..largest -> 0..1
        loss = nft_loss(rows.latents, x, t, policy.velocity, old, optimality, self.config.beta)  # (R,)
        objective = largest * loss * rows.finite
        penalty, logs = shared.kl_penalty(policy, reference, rows)
        change = per_sample((policy.velocity - old).square())
        logs |= {"kl_old": change.mean(), **shared.schedule.by_step("kl_old", change, rows.step)}
        logs |= {"objective": objective.mean(), **rows.stats}
        return objective.mean() + penalty, logs


def nft_loss(
    data: Tensor, x: Tensor, t: Tensor, velocity: Tensor, old: Tensor, optimality: Tensor, beta: float
) -> Tensor:
    """Compute DiffusionNFT's loss, (B,) (arXiv 2509.16117, eq. 5, with its self-normalised weights).

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
