"""Differentiating through the reward: ReFL (arXiv 2304.05977) and DRaFT-1 (arXiv 2309.17400).

The image is predicted from a state of the rollout in one step, x0 = x_t - t v(x_t, t), decoded and scored with
gradients. A window of one late step, at random places, is ReFL; the last step of the sampler with noise is nearly
DRaFT-1. It is fast, and the objective that is hacked fastest: monitor other rewards, and give `evaluation` a guard.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from nitro_e.config import Config
from nitro_e.randomness import SampleRandom
from nitro_e.sampling import flow
from nitro_e.stages.grpo.algorithm import Shared
from nitro_e.stages.grpo.kl import KLConfig
from nitro_e.stages.grpo.rollout import RolloutConfig, Rows
from nitro_e.stages.grpo.sde import Schedule


@dataclass(frozen=True, kw_only=True)
class RewardGradientConfig(Config):
    keeps_old: ClassVar[bool] = False

    kind: Literal["reward_gradient"] = "reward_gradient"  # through the codec and the reward (ReFL, DRaFT-1)
    kl: KLConfig = field(default_factory=KLConfig)

    def schedule(self, rollout: RolloutConfig) -> Schedule:
        """The steps in the window are those whose states are trained at."""
        return rollout.schedule(rollout.window)

    def rows_per_image(self, rollout: RolloutConfig) -> int:
        return rollout.window.size

    def build(self, shared: Shared) -> RewardGradient:
        return RewardGradient(self, shared)


class RewardGradient:
    """Raises the weighted sum of the trained rewards by its own gradient."""

    name = "reward_gradient"
    frozen_passes = 0.0

    def __init__(self, config: RewardGradientConfig, shared: Shared) -> None:
        self.shared = shared
        self.t = shared.schedule.sde.t.to(shared.device)  # (N,)
        self.rollout_model: nn.Module = shared.policy.model

    def before_rollout(self, rollout: int) -> None:
        pass

    def before_updates(self, updates: list[list[Rows]]) -> None:
        pass

    def loss(self, net: nn.Module, rows: Rows, rng: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        shared, t = self.shared, self.t[rows.step]
        reference = shared.reference_velocity(rows.x, t, rows.text)
        policy = shared.velocity(net, rows.x, t, rows.text)
        pixels = shared.decode(flow.to_data(rows.x, t, policy.velocity))  # (R, 3, H, W)
        texts, info = [prompt.text for prompt in rows.asked], [prompt.info for prompt in rows.asked]
        score = shared.scorer.differentiate(pixels, texts, info) * rows.finite  # (R,)
        penalty, logs = shared.kl_penalty(policy, reference, rows)
        logs |= {
            "objective": -score.mean(),
            **shared.schedule.by_step("predicted_reward", score, rows.step),
            **rows.stats,
        }
        return penalty - score.mean(), logs
