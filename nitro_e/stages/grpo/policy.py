"""The trained model beside the frozen ones it is compared with, and guided velocities that can be differentiated."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nitro_e.interfaces import Denoiser, TextEmbedding
from nitro_e.stages.grpo.adapter import has_adapter, without_adapter


class Policy(nn.Module):
    """Called like the model. The frozen copies travel with it into checkpoints, so that a resume needs nothing else."""

    def __init__(self, model: nn.Module, *, reference: bool, old: bool) -> None:
        """reference: what the KL pulls to (with an adapter the model without it, no copy); old: what draws for NFT."""
        super().__init__()
        self.model = model
        self.reference = frozen(model) if reference and not has_adapter(model) else None
        self.old = frozen(model) if old else None

    def forward(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        return self.model(x, t, text)

    @contextlib.contextmanager
    def before_training(self) -> Iterator[nn.Module]:
        """The reference. Use it before the trained forward pass, without gradients."""
        with torch.no_grad():
            if self.reference is not None:
                yield self.reference
            else:
                with without_adapter(self.model) as model:
                    yield model

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """old <- decay * old + (1 - decay) * model."""
        for old, new in zip(self.old.parameters(), self.model.parameters(), strict=True):
            old.lerp_(new, 1 - decay)


def frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


class Guided(NamedTuple):
    velocity: Tensor  # (B, C, h, w) float32
    unconditional: Tensor | None  # the same, of the null prompt; None without guidance


def guided_velocity(
    model: Denoiser, x: Tensor, t: Tensor, text: TextEmbedding, null: TextEmbedding, scale: float,
    gradient: Literal["both", "cond"] = "both", bare: Denoiser | None = None,
) -> Guided:  # fmt: skip
    """Classifier-free guidance (arXiv 2207.12598); scales 0 and 1 mean none. null: one row.

    gradient: through both passes, or through the one with text alone, which halves the memory; then `bare`, the model
    without DDP around it, computes the other.
    """
    if scale in (0, 1):
        return Guided(model(x, t, text).float(), None)
    null = TextEmbedding(*(part.expand(len(x), *part.shape[1:]) for part in null))
    if gradient == "both":
        both = TextEmbedding(*(torch.cat(pair) for pair in zip(null, text)))
        without, with_text = model(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
    else:
        # In this order: autocast keeps the cast weights of the first pass, which must know its gradients.
        with_text = model(x, t, text).float()
        with torch.no_grad():
            without = bare(x, t, null).float()
    return Guided(torch.lerp(without, with_text, scale), without)
