"""What the student can be trained on: the form of an objective, and what all of them may use.

An objective takes the student's draft and says how good its data are; everything else (one forward of the student,
weights, balance, gradients, held-out prompts, logs) is the stage's. Networks that are trained beside the student (heads,
later the fake score of DMD) are phases that the objective brings along; they run before the student's, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nitro_e.interfaces import Denoiser, Phase, TextEmbedding
from nitro_e.randomness import SlotRandom, seed_of
from nitro_e.stages.distill.inputs import DistillBatch, Draft


@dataclass
class Shared:
    """What the stage lends to its objectives."""

    teacher: Denoiser  # frozen
    backbone: Callable[[Sequence[int] | None], Any]  # taps -> heads.Backbone of the teacher
    null_text: TextEmbedding  # (1, L, D), (1, L): the null prompt
    draft: Callable[..., Draft]  # (batch, rng, last=False): the student's forward of this step
    student: Denoiser  # the student's net, for objectives that call it at other inputs (`direct`)
    heldout: float  # share of the prompts that nothing is trained on
    seed: int
    device: torch.device

    def training(self, batch: DistillBatch) -> Tensor:
        """(B,) 1 for prompts that are trained on, 0 for held-out ones; a function of the prompt."""
        places = [seed_of("held out", prompt) / 2**63 for prompt in batch.prompts]
        return torch.tensor([float(place >= self.heldout) for place in places], device=batch.latents.device)


class Objective(Protocol):
    """One term of the student's loss; see OBJECTIVES in stage.py for how one is added."""

    name: str
    phases: tuple[Phase, ...]  # what is trained beside the student
    balanced: bool  # scaled so that its gradient is `weight` times that of the others; then it also has
    # `start`, the first step of a weight above 0, and `fallback`, the scale while nothing has been measured
    direct: bool  # False: a function of draft.data; True: has called the student's net itself

    def weight(self, step: int) -> float:
        """At this step; 0 leaves it out."""

    def loss(self, draft: Draft, batch: DistillBatch, rng: SlotRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) what to minimise, and what to log as in Phase.loss."""
