"""The KL penalty of GRPO: what moving away from the reference costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from nitro_e.config import Config, Ge, Gt, Lt
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
    # rollouts after which the policy becomes its own reference (GARDO, arXiv 2512.24138); null: the first weights stay
    refresh_every: Annotated[int, Ge(1)] | None = None
    # share of the images that the penalty acts on, those whose trained rewards rank them highest above what the monitored
    # rewards do (GARDO); all of a rollout in which no monitored reward is scored; null: all
    gate: Annotated[float, Gt(0), Lt(1)] | None = None

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
        self, policy: Guided, reference: Guided | None, step: Tensor, gate: Tensor
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Compare velocities of R rows, at steps (R,) of the sampler; without a reference the penalty is 0.

        gate: (R,) 1 where the penalty acts, 0 elsewhere. What is logged are the velocities' distances in all rows.
        """
        if reference is None:
            return 0.0, {}
        kl = per_sample((policy.velocity - reference.velocity).square())  # (R,)
        logs = {"kl": kl.mean(), **self.schedule.by_step("kl", kl, step)}
        if policy.unconditional is not None and reference.unconditional is not None:
            # the null prompt's velocity: guidance reads it, and no reward holds it in place
            drift = policy.unconditional.detach() - reference.unconditional
            logs["null_drift"] = drift.square().mean()
        return (kl * self.weights[step] * gate).mean(), logs


def doubtful(trained: Tensor, monitored: Tensor, share: float) -> Tensor:
    """Choose the images (G, K) that may please the trained rewards alone: 1 for the most doubtful ones, 0 for the others.

    trained, monitored: (G, K, R) win rates within the groups, NaN where there is none. The doubt of an image is the mean
    of the first less the mean of the second; of the whole rollout the given share of images is chosen, and all where no
    image has a doubt.
    """
    doubt = trained.nanmean(dim=2) - monitored.nanmean(dim=2)  # (G, K)
    if doubt.isnan().all():
        return torch.ones_like(doubt)
    doubt = doubt.nan_to_num(-1.0)
    count = max(round(share * doubt.numel()), 1)
    gate = torch.zeros_like(doubt).flatten()
    gate[doubt.flatten().topk(count).indices] = 1
    return gate.view_as(doubt)
