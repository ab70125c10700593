"""Interface of a distillation objective, and the resources shared by all objectives.

An objective scores the student's x0 prediction; everything else (one forward of the student, weights, balance,
gradients, held-out prompts, logs) is the stage's. Networks that are trained beside the student (heads, the fake
score) are phases that the objective brings along; they run before the student's, in order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nitro_e.interfaces import Denoiser, Phase, TextEmbedding
from nitro_e.randomness import SampleRandom, seed_of
from nitro_e.sampling.samplers import guided_velocity
from nitro_e.stages.distill.inputs import DistillBatch, Prediction


@dataclass
class Shared:
    """The resources that the stage lends to its objectives."""

    teacher: nn.Module  # frozen; a Denoiser
    backbone: Callable[[Sequence[int] | None], Any]  # taps -> heads.Backbone of the teacher
    null_text: TextEmbedding  # (1, L, D), (1, L): the null prompt
    predict: Callable[..., Prediction]  # (batch, rng, last=False): the student's forward of this step
    student: Denoiser  # the student's net, for objectives that call it at other inputs (`direct`)
    bare: Denoiser  # the student itself, for passes without a graph and for tangents
    heldout: float  # share of the prompts that nothing is trained on
    seed: int
    device: torch.device
    # (latents, prompts, info) -> weighted sums of rewards (B,), NaN where there is none; None: the recipe has no rewards
    judge: Callable[[Tensor, Sequence[str], Sequence[dict]], Tensor] | None = None
    # the adversarial objective, if others share its pass of the teacher (`share_score`)
    discriminator: Any = None

    def training(self, batch: DistillBatch) -> Tensor:
        """Return (B,): 1 for prompts that are trained on, 0 for held-out ones; a function of the prompt alone."""
        places = [seed_of("held out", prompt) / 2**63 for prompt in batch.prompts]
        keep = torch.tensor([float(place >= self.heldout) for place in places])
        return keep.to(batch.text.mask.device, non_blocking=True)

    @torch.no_grad()
    def guided(self, x: Tensor, t: Tensor, text: TextEmbedding, scale: float | Tensor) -> Tensor:
        """Return the teacher's velocity (B, C, h, w) with classifier-free guidance, without a graph.

        scale: for all rows, or (B,).
        """
        return guided_velocity(self.teacher, x, t, text, self.null_text, scale).velocity


class Balance(NamedTuple):
    """An objective whose scale is measured in the steps before it begins."""

    start: int  # the first step of a weight above 0
    fallback: float  # the scale while nothing has been measured


class Objective(Protocol):
    """One term of the student's loss; see OBJECTIVES in stage.py for how one is added."""

    name: str
    phases: tuple[Phase, ...]  # what is trained beside the student
    # scaled so that its gradient is `weight` times that of the others; None: not scaled
    balance: Balance | None
    direct: bool  # False: a function of prediction.data; True: it calls the student's net itself

    def weight(self, step: int) -> float:
        """Return the weight at this step; 0 leaves the objective out of it."""

    def loss(
        self, prediction: Prediction, batch: DistillBatch, rng: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what to minimise, (B,), and what to log as in Phase.loss."""


def per_sample(values: Tensor) -> Tensor:
    """Average over everything but the batch: (B, ...) -> (B,)."""
    return values.flatten(1).mean(dim=1)


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Give the weights of a module no gradients; those through it to its input remain."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
