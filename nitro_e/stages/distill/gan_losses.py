"""Losses over the logits of many heads.

Logits are a list with an entry per feature map, each (B, m, n): m heads with n positions. Every head counts the same,
however many positions it has: the mean over positions comes first, then the one over heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Logits = list[Tensor]
Kind = Literal["hinge", "non_saturating", "relativistic"]


def over_heads(
    function: Callable[..., Tensor], *logits: Logits, weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Average a function of the logits, (B,). weights: (m,) per entry, of its heads; None: equal ones."""
    values = torch.cat([function(*entries).float().mean(dim=2) for entries in zip(*logits)], dim=1)  # (B, H)
    if weights is None:
        return values.mean(dim=1)
    scale = torch.cat(list(weights))  # (H,)
    return (values * scale).sum(dim=1) / scale.sum().clamp(min=1e-9)


def score(logits: Logits) -> Tensor:
    """Return the mean logit, (B,)."""
    return over_heads(lambda x: x, logits)


def discriminator_loss(kind: Kind, real: Logits, fake: Logits) -> Tensor:
    """Compute what the heads minimise, (B,).

    hinge: arXiv 1705.02894, halved; non_saturating: arXiv 1406.2661; relativistic: arXiv 1807.00734, pairs of one index.
    """
    if kind == "hinge":
        return over_heads(lambda r, f: (F.relu(1 - r) + F.relu(1 + f)) / 2, real, fake)
    if kind == "non_saturating":
        return over_heads(lambda r, f: F.softplus(-r) + F.softplus(f), real, fake)
    return over_heads(lambda r, f: F.softplus(f - r), real, fake)


def generator_loss(
    kind: Kind, fake: Logits, real: Logits | None = None, weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Compute what the student minimises, (B,); `real` is for relativistic alone, which compares with it."""
    if kind == "hinge":
        return over_heads(lambda f: -f, fake, weights=weights)
    if kind == "non_saturating":
        return over_heads(lambda f: F.softplus(-f), fake, weights=weights)
    assert real is not None, "a relativistic loss compares with the real logits"
    return over_heads(lambda f, r: F.softplus(r - f), fake, real, weights=weights)


def approximate_r1(real: Logits, perturbed: Logits) -> Tensor:
    """Compute the squared change of the logits, (B,), when the *noised* real sample is perturbed by sigma * normal.

    It is about sigma^2 |gradient|^2 (APT, arXiv 2501.08316, Section 3.4).
    """
    return over_heads(lambda a, b: (a - b).square(), real, perturbed)


def misaligned(prompts: Sequence[str]) -> tuple[list[int], list[bool]]:
    """Choose another sample for every sample: its place, and whether its prompt really differs."""
    others = [(place + 1) % len(prompts) for place in range(len(prompts))]
    return others, [prompts[other] != prompt for other, prompt in zip(others, prompts)]
