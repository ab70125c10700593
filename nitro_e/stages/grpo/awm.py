"""Advantage weighted matching (AWM, arXiv 2509.25050): flow matching on the drawn images, weighed by their advantage.

The likelihood of an image is that of the pretraining loss, l = -mean |v(x_t, t) - (noise - x0)|^2, at the same time and
noise for the old policy and the new one; the ratio exp(l - l_old) is clipped as in PPO. Rollouts need no random steps.

It collapses without both of its guards, the clip and the penalty on the distance to an average of the policy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from nitro_e.config import Ge, Gt, Lt
from nitro_e.randomness import SampleRandom
from nitro_e.sampling import flow
from nitro_e.stages.grpo.algorithm import FinalLatentsConfig, Shared
from nitro_e.stages.grpo.clipped import clip_shares, clipped_objective
from nitro_e.stages.grpo.kl import KLConfig
from nitro_e.stages.grpo.rollout import Rows
from nitro_e.stages.grpo.sde import per_sample

Weighting = Literal["uniform", "t", "t2", "huber"]
HUBER_POWER, HUBER_SHIFT = 0.25, 1e-5  # of the generalised Huber weighting


@dataclass(frozen=True, kw_only=True)
class AWMConfig(FinalLatentsConfig):
    kind: Literal["awm"] = "awm"  # advantage weighted matching
    clip_low: Annotated[float, Gt(0), Lt(1)] = 1e-5  # the ratio is held in 1 - clip_low ... 1 + clip_high
    clip_high: Annotated[float, Gt(0), Lt(1)] = 1e-5  # upper half of the clip range
    # of the squared errors, over times: uniform, by t, by t^2, or t/p ((error + e)^p - e^p) with p = 1/4
    weighting: Weighting = "uniform"
    average: Annotated[float, Ge(0), Lt(1)] = 0.9  # decay of the policy's average, per rollout ...
    average_weight: Annotated[float, Ge(0)] = (
        0.1  # ... and what a mean squared velocity difference to it costs
    )
    kl: KLConfig = field(default_factory=lambda: KLConfig(beta=0.0))

    def build(self, shared: Shared) -> AWM:
        return AWM(self, shared)


class AWM:
    """Raises the likelihood of the drawn images by their advantage, as far as the clip and the average allow."""

    name = "awm"

    def __init__(self, config: AWMConfig, shared: Shared) -> None:
        self.config, self.shared = config, shared
        self.t = shared.schedule.ode.t.to(shared.device)  # (N,)
        assert shared.policy.old is not None, "Policy keeps it, as AWMConfig.keeps_old says"
        self.average: nn.Module = shared.policy.old
        self.rollout_model: nn.Module = shared.policy.model
        # of the average, and of every update but the first in before_updates
        self.frozen_passes = 1 + (shared.updates - 1) / shared.updates

    def before_rollout(self, rollout: int) -> None:
        """Let the average follow the trained policy."""
        if rollout > 0:
            self.shared.policy.follow(self.config.average)

    def before_updates(self, updates: list[list[Rows]]) -> None:
        """Keep the velocities of the rows of later updates, computed with the kernels and shapes of training."""
        for update in updates[1:]:
            for rows in update:
                with self.shared.autocast(), torch.enable_grad():
                    x, t, text = self.noised(rows)
                    rows.old = self.shared.velocity(self.rollout_model, x, t, text).velocity.detach()

    def noised(self, rows: Rows) -> tuple:
        """Return the rows' states x_t, their times and their text; the noise belongs to the row, whatever update it is in."""
        t = self.t[rows.step]
        return flow.interpolate(rows.latents, rows.noise(), t), t, rows.text

    def loss(self, net: nn.Module, rows: Rows, rng: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        shared, (x, t, text) = self.shared, self.noised(rows)
        reference = shared.reference_velocity(x, t, text)
        with torch.no_grad():
            average = shared.velocity(self.average, x, t, text, self.average).velocity
        policy = shared.velocity(net, x, t, text)
        target = flow.velocity_target(rows.latents, rows.noise())
        likelihood = -weighted_error(policy.velocity, target, t, self.config.weighting)  # (R,)
        old = likelihood.detach()
        if rows.old is not None:
            old = -weighted_error(rows.old, target, t, self.config.weighting)
        ratio = (likelihood - old).exp()
        objective = clipped_objective(ratio, rows.advantage, self.config.clip_low, self.config.clip_high)
        apart = per_sample((policy.velocity - average).square()) * rows.finite
        penalty, logs = shared.kl_penalty(policy, reference, rows)
        logs |= {"objective": objective.mean(), "kl_average": apart.mean(), **rows.stats}
        logs |= {"ratio_error": (ratio - 1).abs().mean(), "matching_error": -likelihood.mean()}
        logs |= clip_shares(ratio, rows.advantage, self.config.clip_low, self.config.clip_high)
        return objective.mean() + self.config.average_weight * apart.mean() + penalty, logs


def weighted_error(velocity: Tensor, target: Tensor, t: Tensor, weighting: Weighting) -> Tensor:
    """Compute the mean squared error (B,) of velocities, weighed by their times t (B,)."""
    error = per_sample((velocity - target).square())
    if weighting == "huber":
        power, shift = HUBER_POWER, HUBER_SHIFT
        return t / power * ((error + shift) ** power - shift**power)
    return error * {"uniform": torch.ones_like(t), "t": t, "t2": t.square()}[weighting]
