"""Detects forward-mode AD, the transforms of torch.func and torch.export, under which only plain operators are right.

The fast ways of computing (attention in one operator or a fused kernel, compiled blocks, checkpointing,
packed weights) know values and first gradients only. Given a tangent, some of them drop it without a word. And what
torch.export writes runs where an operator of ours is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

# True while torch.export traces; torch 2.6 cannot tell
exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def transformed() -> bool:
    """Return True inside forward_ad.dual_level, torch.func.jvp, vmap and the like; never when compiling."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class OneProductPerTangent(TorchFunctionMode):
    """Inside it, and in forward_ad.dual_level, a linear layer multiplies a tangent by its weights and no more.

    torch computes W dx + dW x, with a whole matrix of zeros for dW if the weights have no tangent: three products of
    matrices where two are enough.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and forward_ad._current_level >= 0:
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute F.linear of tensors of which any may have a tangent."""
    value, tangent = forward_ad.unpack_dual(input)
    constant = all(forward_ad.unpack_dual(x).tangent is None for x in (weight, bias) if x is not None)
    if tangent is None or not constant:
        return F.linear(input, weight, bias)
    return forward_ad.make_dual(F.linear(value, weight, bias), F.linear(tangent, weight))
