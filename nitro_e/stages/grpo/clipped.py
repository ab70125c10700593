"""The clipped policy-gradient objective; every mean is over all D latent numbers.

PPO (arXiv 1707.06347, eq. 7) with group advantages (GRPO, arXiv 2402.03300) over the transitions of a sampler
(Flow-GRPO, arXiv 2505.05470). Log-probabilities are means over D, not sums, so a ratio is the D-th root of the true
one: clip ranges are 1e-5 to 1e-3, and gradients are small by the same factor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from nitro_e.config import Config, Gt, Lt
from nitro_e.randomness import SampleRandom
from nitro_e.stages.grpo.algorithm import Shared
from nitro_e.stages.grpo.kl import KLConfig
from nitro_e.stages.grpo.rollout import RolloutConfig, Rows
from nitro_e.stages.grpo.sde import Schedule, Transitions, log_prob, per_sample

StepWeight = Literal["none", "noise", "1/h"]


@dataclass(frozen=True, kw_only=True)
class ClippedConfig(Config):
    keeps_old: ClassVar[bool] = False

    kind: Literal["clipped"] = "clipped"  # clipped policy gradient (Flow-GRPO)
    # the ratio is held in 1 - clip_low ... 1 + clip_high; null: 3e-4, or with ratio_norm 6e-6 at 8,192 latent numbers
    clip_low: Annotated[float, Gt(0), Lt(1)] | None = None
    clip_high: Annotated[float, Gt(0), Lt(1)] | None = None  # upper half of the clip range; null: likewise
    kl: KLConfig = field(default_factory=KLConfig)
    # GRPO-Guard (arXiv 2510.22319): log-ratios without their bias, at one scale for all steps
    ratio_norm: bool = False
    # Weights of the sampler's steps. noise: by std, mean 1 over the trained ones (TempFlow-GRPO, arXiv 2508.04324);
    # 1/h: the inverse of their length as it is, which raises the objective against the KL penalty (GRPO-Guard)
    step_weight: StepWeight = "none"

    def schedule(self, rollout: RolloutConfig) -> Schedule:
        """The steps in the window are random."""
        return rollout.schedule(rollout.window)

    def rows_per_image(self, rollout: RolloutConfig) -> int:
        return rollout.window.size

    def clip(self, numbers: int) -> tuple[float, float]:
        """Return the clip range for latents of so many numbers.

        The random part of a log-ratio, a mean over them, falls with their root. GRPO-Guard's 2e-6 is for 65,536.
        """
        chosen = 2e-6 * (65_536 / numbers) ** 0.5 if self.ratio_norm else 3e-4
        low, high = (chosen if given is None else given for given in (self.clip_low, self.clip_high))
        return low, high

    def build(self, shared: Shared) -> Clipped:
        return Clipped(self, shared)


class Clipped:
    """Raises the likelihood of the drawn transitions by their advantage, as far as the clip allows."""

    name = "grpo"

    def __init__(self, config: ClippedConfig, shared: Shared) -> None:
        self.config, self.shared = config, shared
        schedule, self.sde = shared.schedule, shared.schedule.sde.to(shared.device)
        self.weights = step_weights(config.step_weight, schedule.sde, schedule.trained()).to(shared.device)
        self.rollout_model = shared.policy.model
        # of every update but the first, in before_updates
        self.frozen_passes = (shared.updates - 1) / shared.updates

    def before_rollout(self, rollout: int) -> None:
        pass

    def before_updates(self, updates: list[list[Rows]]) -> None:
        """Keep the velocities of the rows of later updates, computed with the kernels and shapes of training."""
        for update in updates[1:]:
            for rows in update:
                with self.shared.autocast(), torch.enable_grad():
                    t = self.sde.t[rows.step]
                    rows.old = self.shared.velocity(
                        self.rollout_model, rows.x, t, rows.text
                    ).velocity.detach()

    def loss(self, net: nn.Module, rows: Rows, rng: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        shared, table = self.shared, self.sde.at(rows.step)
        # before the pass that keeps gradients
        reference = shared.reference_velocity(rows.x, table.t, rows.text)
        policy = shared.velocity(net, rows.x, table.t, rows.text)
        mean = table.mean(rows.x, policy.velocity)  # (R, C, h, w)
        old = mean.detach() if rows.old is None else table.mean(rows.x, rows.old)
        change = log_ratio(rows.x_next, mean, old, table.std, self.config.ratio_norm)  # (R,)
        clip = self.config.clip(rows.latents[0].numel())
        objective = clipped_objective(change.exp(), rows.advantage, *clip)
        penalty, logs = shared.kl_penalty(policy, reference, rows)
        logs |= {"objective": objective.mean(), **rows.stats}
        with torch.no_grad():
            logs |= self.telemetry(rows, table, mean, old, change, clip)
        return (objective * self.weights[rows.step]).mean() + penalty, logs

    def telemetry(
        self,
        rows: Rows,
        table: Transitions,
        mean: Tensor,
        old: Tensor,
        log_ratio: Tensor,
        clip: tuple[float, float],
    ) -> dict[str, Tensor]:
        """Measure how far the policy is from the one that drew, overall and per step of the sampler."""
        ratio, std = log_ratio.exp(), table.std.flatten()
        delta = per_sample((mean - old).square()).sqrt() / std  # (R,) in standard deviations of a step
        drawn = log_prob(rows.x_next, old, table.std)
        numbers = {
            "ratio": ratio,
            "ratio_error": (ratio - 1).abs(),
            "delta": delta,
            "kl_old": delta.square() / 2,  # KL(old || new) of a transition, per latent number
        }
        logs = {name: values.mean() for name, values in numbers.items()}
        for name, values in numbers.items():
            logs |= self.shared.schedule.by_step(name, values, rows.step)
        logs |= clip_shares(ratio, rows.advantage, *clip)
        logs["rollout_gap"] = (drawn - rows.log_prob).abs().mean()  # other batch shapes than in training
        return logs


def log_ratio(x_next: Tensor, mean: Tensor, old: Tensor, std: Tensor, ratio_norm: bool) -> Tensor:
    """Compute the log-ratio (B,) of the new transition to the old one: exactly 0 where the means are equal.

    ratio_norm: without the term -mean(delta^2) / (2 std^2), which is always negative, and times std:
    mean(eps delta) with eps = (x' - old) / std (GRPO-Guard, Section 3).
    """
    if ratio_norm:
        return per_sample((x_next.float() - old) / std * (mean - old))
    return log_prob(x_next, mean, std) - log_prob(x_next, old, std)


def clipped_objective(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Compute what to minimise, (B,): max(-A r, -A clip(r, 1 - low, 1 + high)), PPO eq. 7."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))


def clip_shares(ratio: Tensor, advantage: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Measure where the clip acts: the shares of rows (B,) beyond it in the direction that pays."""
    below, above = (ratio < 1 - low) & (advantage < 0), (ratio > 1 + high) & (advantage > 0)
    return {"clip_low": below.float().mean(), "clip_high": above.float().mean()}


def step_weights(kind: StepWeight, table: Transitions, steps: range) -> Tensor:
    """Return the weights (N,) of the sampler's steps; `noise` is scaled to mean 1 over the trained ones."""
    if kind == "1/h":
        return 1 / table.h
    weights = table.std if kind == "noise" else torch.ones_like(table.h)
    return weights / weights[steps.start : steps.stop].mean()
