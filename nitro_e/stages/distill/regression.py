"""Objectives that regress the student's x0 prediction to a known target: the diffusion loss, and reflow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nitro_e.config import Config, ConfigError, Fraction, Ge, Gt, Le
from nitro_e.interfaces import Phase
from nitro_e.randomness import SampleRandom
from nitro_e.sampling import flow
from nitro_e.sampling.flow import expand
from nitro_e.stages.distill.inputs import DistillBatch, Prediction
from nitro_e.stages.distill.objective import Balance, Shared, per_sample


@dataclass(frozen=True, kw_only=True)
class DecayConfig(Config):
    """A cosine from 1 to `floor` between two steps."""

    start: Annotated[int, Ge(0)] = 5000  # step at which the weight begins to fall
    end: Annotated[int, Ge(1)] = 20000  # step at which it has reached the floor
    floor: Fraction = 0.1  # what remains of the weight

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.start < self.end:
            raise ConfigError(f"start {self.start} must be before end {self.end}")

    def factor(self, step: int) -> float:
        share = min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(Config):
    """The target is the teacher's image (`pair`), or its guided x0 prediction at the student's input (`teacher`).

    Either way it carries the teacher's guidance: a target without guidance cannot teach an unguided student.
    """

    # pair: the stored image; teacher: the teacher's guided prediction
    target: Literal["pair", "teacher"] = "pair"
    guidance_scale: Annotated[float, Ge(0)] = 4.5  # of target `teacher`
    space: Literal["data", "velocity"] = "data"  # velocity: errors divided by t
    kind: Literal["smooth_l1", "mse"] = "smooth_l1"  # the distance to the target
    beta: Annotated[float, Gt(0)] = 1.0  # of smooth_l1
    weight: Annotated[float, Gt(0), "to switch the objective off: diffusion: null"] = 1.0  # of this objective
    decay: DecayConfig | None = None
    on_rollout: bool = True  # also train on the student's own states
    # ignore t above this; 0.5 with fresh noise, where above it the target is only a conditional mean
    largest_time: Annotated[float, Gt(0), Le(1)] = 1.0


class Diffusion:
    """Regression of the student's x0 prediction to the target."""

    name = "diffusion"
    phases: tuple[Phase, ...] = ()
    balance: Balance | None = None
    direct = False

    def __init__(self, config: DiffusionConfig, shared: Shared) -> None:
        self.config, self.shared = config, shared

    def weight(self, step: int) -> float:
        return self.config.weight * (self.config.decay.factor(step) if self.config.decay else 1.0)

    def loss(
        self, prediction: Prediction, batch: DistillBatch, rng: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        residual = prediction.data - self.target(prediction, batch)
        if config.space == "velocity":
            residual = residual / expand(prediction.t, residual)
        if config.kind == "mse":
            values = residual.square()
        else:
            values = F.smooth_l1_loss(
                residual, torch.zeros_like(residual), beta=config.beta, reduction="none"
            )
        wanted = (
            prediction.t <= config.largest_time
            if prediction.on_path or config.on_rollout
            else torch.zeros_like(prediction.t)
        )
        return per_sample(values) * wanted, {}

    def target(self, prediction: Prediction, batch: DistillBatch) -> Tensor:
        """Return the target, (B, C, h, w) data."""
        if self.config.target == "pair":
            return batch.stored_latents
        x, t = prediction.x, prediction.t
        return flow.to_data(x, t, self.shared.guided(x, t, batch.text, self.config.guidance_scale))


@dataclass(frozen=True, kw_only=True)
class ReflowConfig(Config):
    weight: Annotated[float, Gt(0), "to switch it off: reflow: null"] = 1.0  # of this objective


class Reflow:
    """Flow matching on the stored pairs, |v - (noise - data)|^2 (InstaFlow, arXiv 2309.06380, eq. 6).

    On the pair's path x - data = t (noise - data), so the velocity's error is that of the data divided by t.
    """

    name = "reflow"
    phases: tuple[Phase, ...] = ()
    balance: Balance | None = None
    direct = False

    def __init__(self, config: ReflowConfig, shared: Shared) -> None:
        self.config = config

    def weight(self, step: int) -> float:
        return self.config.weight

    def loss(
        self, prediction: Prediction, batch: DistillBatch, rng: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        error = (prediction.data - batch.stored_latents) / expand(prediction.t, prediction.data)
        return per_sample(error.square()), {}
