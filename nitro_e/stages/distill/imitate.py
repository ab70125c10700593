"""Imitation: on the student's own states its velocity follows the teacher's guided one (pi-Flow, arXiv 2510.14974).

The student visits states by its own sampler (`inputs.noise: chain`), so it learns to repair its own errors, and no
images are needed. From a state it follows its policy to the sampler's next time without the network: the path of
sampling/policy.py, or, with a single prediction, a straight line. The teacher is asked at the state, or further along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from nitro_e.config import Config, Fraction, Ge, Gt, Le
from nitro_e.interfaces import Phase
from nitro_e.randomness import SampleRandom
from nitro_e.stages.distill.inputs import DistillBatch, Prediction
from nitro_e.stages.distill.objective import Balance, Shared, per_sample

EARLIEST = 0.02  # least time at which a path is compared: an error of its data counts 1 / s^2


@dataclass(frozen=True, kw_only=True)
class ImitateConfig(Config):
    weight: Annotated[float, Gt(0), "to switch the objective off: imitate: null"] = 1.0  # of this objective
    guidance_scale: Annotated[float, Ge(0)] = 4.5  # of the teacher
    # samples at larger times are left out: from pure noise the teacher's velocity points at a mean
    largest_time: Annotated[float, Gt(0), Le(1)] = 0.8
    # share of the step to the sampler's next time, from its start, in which the teacher is asked; 0: at the state alone
    reach: Fraction = 0.0
    places: Annotated[int, Ge(1), Le(64)] = 1  # on that path, at which the teacher is asked


class Imitate:
    """Regression of the student's velocity to the teacher's, at the student's states or on its path from them."""

    name = "imitate"
    phases: tuple[Phase, ...] = ()
    balance: Balance | None = None
    direct = False

    def __init__(self, config: ImitateConfig, shared: Shared) -> None:
        self.config, self.shared = config, shared

    def weight(self, step: int) -> float:
        return self.config.weight

    def loss(
        self, prediction: Prediction, batch: DistillBatch, rng: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute (B,) |v_student - v_teacher|^2 at x_s and s, where x_s lies on the student's path at times s <= t."""
        config, policy = self.config, prediction.policy
        values = torch.zeros_like(policy.t)
        for _ in range(config.places):
            s = policy.t - config.reach * rng.uniform() * (policy.t - policy.t_next)  # (B,)
            s = s.clamp(min=EARLIEST)
            x = policy.state(s).detach()
            target = self.shared.guided(x, s, batch.text, config.guidance_scale)
            values = values + per_sample((policy.velocity(x, s) - target).square()) / config.places
        return values * (policy.t <= config.largest_time), {}
