"""Interface of a GRPO objective (`stage.algorithm` of a recipe), and the resources shared by all of them.

An algorithm says which rows it needs (an image and a time each), what to minimise over them, and keeps what it alone
needs, such as NFT's old policy. Drawing, scoring and advantages are the stage's. To add one: a config class of the form
AlgorithmConfig and a class of the form Algorithm in a file of their own, and a line in `Algorithms` in stage.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge
from nitro_e.interfaces import Denoiser, TextEmbedding
from nitro_e.randomness import SampleRandom
from nitro_e.rewards import Scorer
from nitro_e.sampling.samplers import Guided, guided_velocity
from nitro_e.stages.grpo.kl import KLConfig, KLPenalty
from nitro_e.stages.grpo.policy import Policy
from nitro_e.stages.grpo.rollout import RolloutConfig, Rows
from nitro_e.stages.grpo.sde import Schedule


@dataclass
class Shared:
    """The resources that the stage lends to its algorithm."""

    policy: Policy
    null_text: TextEmbedding  # (1, L, D): the null prompt
    schedule: Schedule  # of the rollouts
    kl: KLPenalty | None  # None: beta is 0, and there is no reference
    guidance_scale: float
    cfg_grad: Literal["both", "cond"]
    updates: int  # optimiser steps per rollout
    max_advantage: float
    # latents -> pixels (B, 3, H, W) float32, as in rollouts; with gradients
    decode: Callable[[Tensor], Tensor]
    scorer: Scorer  # of the rollouts
    autocast: Callable[[], AbstractContextManager]
    device: torch.device

    def velocity(
        self, net: Denoiser, x: Tensor, t: Tensor, text: TextEmbedding, bare: Denoiser | None = None
    ) -> Guided:
        """Compute the guided velocity of `net`; bare: the model without DDP around it, the trained one by default."""
        bare = bare or self.policy.model
        return guided_velocity(net, x, t, text, self.null_text, self.guidance_scale, self.cfg_grad, bare)

    def reference_velocity(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Guided | None:
        """Compute the velocity that the KL penalty compares with. Call it before the pass that keeps gradients."""
        if self.kl is None:
            return None
        with self.policy.before_training() as reference:
            return self.velocity(reference, x, t, text, reference)

    def kl_penalty(
        self, policy: Guided, reference: Guided | None, rows: Rows
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """Return the weighted KL of the rows to the reference, 0 without one, and its logs."""
        return (0.0, {}) if self.kl is None else self.kl(policy, reference, rows.step, rows.gate)


class Algorithm(Protocol):
    """An objective over the rows of a rollout, with its bookkeeping."""

    name: str  # of the stage, in records
    # forward passes without gradients per row, besides those of the reference and of the rollout
    frozen_passes: float

    @property
    def rollout_model(self) -> nn.Module:
        """The model that draws the images of a rollout."""

    def before_rollout(self, rollout: int) -> None:
        """Called before the images of rollout 0, 1, ... are drawn."""

    def before_updates(self, updates: list[list[Rows]]) -> None:
        """Called with the micro-batches of every update, before the first update of a rollout."""

    def loss(self, net: nn.Module, rows: Rows, rng: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what to minimise over R rows, and what to log as in Phase.loss."""


class AlgorithmConfig(Protocol):
    """The interface of an algorithm's config, which the stage asks before there is a model."""

    keeps_old: bool  # Policy keeps a frozen copy `old` for it, which also lies in checkpoints

    @property
    def kl(self) -> KLConfig:
        """The KL penalty's settings."""

    def schedule(self, rollout: RolloutConfig) -> Schedule:
        """Build the schedule of the rollouts; ConfigError if the settings do not fit it."""

    def rows_per_image(self, rollout: RolloutConfig) -> int:
        """Count the times of an image that are trained on."""

    def build(self, shared: Shared) -> Algorithm:
        """Make the algorithm."""


@dataclass(frozen=True, kw_only=True)
class FinalLatentsConfig(Config):
    """What objectives share that need no transitions, only final latents, which they noise again to some times."""

    keeps_old: ClassVar[bool] = True

    times: Annotated[int, Ge(1)] = 9  # training times per image: the first steps of the rollout's grid

    def __post_init__(self) -> None:
        super().__post_init__()
        kl: KLConfig = self.kl  # type: ignore[attr-defined]  # a field of every subclass, with a default of its own
        if kl.kind != "velocity" or kl.units not in (None, "velocity"):
            raise ConfigError(f"kl.kind: {self.kind} has no transitions; use velocity")  # type: ignore[attr-defined]

    def schedule(self, rollout: RolloutConfig) -> Schedule:
        """All steps of a rollout are steps of the ODE."""
        if self.times > rollout.steps:
            raise ConfigError(f"algorithm.times {self.times}: a rollout has {rollout.steps} steps")
        return rollout.schedule(None)

    def rows_per_image(self, rollout: RolloutConfig) -> int:
        return self.times
