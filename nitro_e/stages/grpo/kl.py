"""The KL penalty of GRPO: what moving away from the reference costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from nitro_e.config import Config, Ge
from nitro_e.sampling.samplers import Guided
from nitro_e.stages.grpo.sde import Schedule, Transitions, per_sample

KLKind = Literal["velocity", "gaussian", "gaussian_dt"]


@dataclass(frozen=True, kw_only=True)
class KLConfig(Config):
    """The KL penalty: beta times a KL per transition, or times a mean squared velocity difference."""

    kind: KLKind = "velocity"  # gaussian: the exact KL of a transition; gaussian_dt: times h, as Flow-GRPO
    beta: Annotated[float, Ge(0)] = 1e-3  # 0: no reference is kept
    # the kind that beta is given for, which is converted to `kind`; None: the same
    units: KLKind | None = None

    def weight(self, schedule: Schedule) -> float:
        """Return the weight of `kind`: beta, converted from its units."""
        if self.units is None or self.units == self.kind:
            return self.beta
        return convert_beta(self.beta, self.units, self.kind, schedule.sde, schedule.trained())


def kl_coefficients(kind: KLKind, table: Transitions) -> Tensor:
    """Return (N,) factors that turn mean((v - v_ref)^2) into the KL of every step of the sampler.

    The means of two transitions differ by v_coef (v - v_ref).
    """
    if kind == "velocity":
        return torch.ones_like(table.h)
    return table.gaussian_kl * (table.h if kind == "gaussian_dt" else 1)


def convert_beta(beta: float, source: KLKind, target: KLKind, table: Transitions, steps: range) -> float:
    """Find the weight of `target` that penalises as much as beta of `source`, averaged over the trained steps."""
    source_mean, target_mean = (
        kl_coefficients(kind, table)[steps.start : steps.stop].mean().item() for kind in (source, target)
    )
    return beta * source_mean / target_mean


class KLPenalty:
    """The weighted KL of rows, and its logs in velocity units whatever `kind` is trained on."""

    def __init__(self, config: KLConfig, schedule: Schedule, device: torch.device) -> None:
        self.schedule = schedule
        # (N,) per step of the sampler
        self.weights = (config.weight(schedule) * kl_coefficients(config.kind, schedule.sde)).to(device)

    def __call__(
        self, policy: Guided, reference: Guided | None, step: Tensor
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Compare velocities of R rows, at steps (R,) of the sampler; without a reference the penalty is 0."""
        if reference is None:
            return 0.0, {}
        kl = per_sample((policy.velocity - reference.velocity).square())  # (R,)
        logs = {"kl": kl.mean(), **self.schedule.by_step("kl", kl, step)}
        if policy.unconditional is not None and reference.unconditional is not None:
            # the null prompt's velocity: guidance reads it, and no reward holds it in place
            drift = policy.unconditional.detach() - reference.unconditional
            logs["null_drift"] = drift.square().mean()
        return (kl * self.weights[step]).mean(), logs
