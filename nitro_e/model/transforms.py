"""Detects forward-mode AD, the transforms of torch.func and torch.export, under which only plain operators are right.

The fast ways of computing (attention in one operator or a fused kernel, compiled blocks, checkpointing,
packed weights) know values and first gradients only. Given a tangent, some of them drop it without a word. And what
torch.export writes runs where an operator of ours is not known.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

# True while torch.export traces; torch 2.6 cannot tell
exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def transformed() -> bool:
    """Return True inside forward_ad.dual_level, torch.func.jvp, vmap and the like; never when compiling."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
