"""The trained model beside the frozen ones it is compared with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nitro_e.interfaces import TextEmbedding
from nitro_e.stages.adapter import has_adapter, is_frozen, without_adapter


class Policy(nn.Module):
    """Called like the model. The frozen copies travel with it into checkpoints, so that a resume needs nothing else."""

    def __init__(self, model: nn.Module, *, reference: bool, old: bool, refreshed: bool = False) -> None:
        """Copy what stays frozen.

        reference: for the KL penalty; with an adapter it is the model without it, and no copy, unless it is `refreshed`
        now and then. old: for algorithms that compare with an older policy.
        """
        super().__init__()
        self.model = model
        self.reference = frozen(model) if reference and (refreshed or not has_adapter(model)) else None
        self.old = frozen(model) if old else None

    def forward(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        return self.model(x, t, text)

    @contextlib.contextmanager
    def before_training(self) -> Iterator[nn.Module]:
        """Lend the reference, without gradients. Use it before the trained forward pass."""
        with torch.no_grad():
            if self.reference is not None:
                yield self.reference
            else:
                with without_adapter(self.model) as model:
                    yield model

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Average the old policy with the trained one: old <- decay * old + (1 - decay) * model."""
        assert self.old is not None
        for old, new in zip(self.old.parameters(), self.model.parameters(), strict=True):
            old.lerp_(new, 1 - decay)

    @torch.no_grad()
    def refresh(self) -> None:
        """Let the reference become the policy as it is."""
        assert self.reference is not None
        for reference, new in zip(self.reference.parameters(), self.model.parameters(), strict=True):
            reference.copy_(new)


def frozen(model: nn.Module) -> nn.Module:
    """Return a copy without gradients; under an adapter, what is never trained is shared with the model."""
    copied = copy.deepcopy(model).requires_grad_(False)
    if has_adapter(model):
        for (name, ours), theirs in zip(model.named_parameters(), copied.parameters(), strict=True):
            if is_frozen(name):
                theirs.data = ours.data
    return copied
