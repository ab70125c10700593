"""Imitation: on the student's own states its velocity follows the teacher's guided one (pi-Flow, arXiv 2510.14974).

The student visits states by its own sampler (`inputs.noise: chain`), so it learns to repair its own errors, and no
images are needed. From a state it goes straight on with the velocity that it predicts, as a policy that is constant
within the step; the teacher is asked there, or further along that line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from nitro_e.config import Config, Fraction, Ge, Gt, Le
from nitro_e.interfaces import Phase
from nitro_e.randomness import SampleRandom
from nitro_e.sampling.flow import expand
from nitro_e.stages.distill.inputs import DistillBatch, Prediction
from nitro_e.stages.distill.objective import Balance, Shared, per_sample


@dataclass(frozen=True, kw_only=True)
class ImitateConfig(Config):
    weight: Annotated[float, Gt(0), "to switch the objective off: imitate: null"] = 1.0  # of this objective
    guidance_scale: Annotated[float, Ge(0)] = 4.5  # of the teacher
    # samples at larger times are left out: from pure noise the teacher's velocity points at a mean
    largest_time: Annotated[float, Gt(0), Le(1)] = 0.8
    # share of the step to the sampler's next time, from its start, in which the teacher is asked; 0: at the state alone
    reach: Fraction = 0.0
    places: Annotated[int, Ge(1), Le(64)] = 1  # on that line, at which the teacher is asked


class Imitate:
    """Regression of the student's velocity to the teacher's, at the student's states or on its line from them."""

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
        """Compute (B,) |v_student - v_teacher(x_s, s)|^2, where x_s lies on the student's line at times s <= t."""
        assert prediction.t_next is not None, "DistillConfig refuses it without chains"
        config, x, t = self.config, prediction.x, prediction.t
        velocity = (x - prediction.data) / expand(t, x)
        values = torch.zeros_like(t)
        for _ in range(config.places):
            elapsed = config.reach * rng.uniform() * (t - prediction.t_next)  # (B,)
            place = x - expand(elapsed, x) * velocity.detach()
            target = self.shared.guided(place, t - elapsed, batch.text, config.guidance_scale)
            values = values + per_sample((velocity - target).square()) / config.places
        return values * (t <= config.largest_time), {}
