"""The base of linear layers whose weights only oneDNN can read, so that torch.compile can trace around them.

torch.compile cannot trace tensors in oneDNN's layout. So one operator of torch's registry stands for the product, and
finds its layer by a number in a tensor: an input, so that blocks share a graph.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor, nn

from nitro_e.config import ConfigError
from nitro_e.model.transforms import transformed

_handles = itertools.count()
_layers: weakref.WeakValueDictionary[int, PackedLayer] = weakref.WeakValueDictionary()
_library = torch.library.Library("nitro_e", "FRAGMENT")
_library.define("packed_product(Tensor x, Tensor handle, int width) -> Tensor")


class PackedLayer(nn.Module):
    """Without parameters and derivatives. A subclass has `product` and calls `traceable_product` in `forward`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        handle = next(_handles)
        _layers[handle] = self
        self.register_buffer("handle", torch.tensor(handle), persistent=False)

    def __deepcopy__(self, memo: dict) -> PackedLayer:
        return self  # it never changes

    def product(self, x: Tensor) -> Tensor:
        """Multiply x (..., K) with the packed weight: (..., width) bfloat16."""
        raise NotImplementedError

    def traceable_product(self, x: Tensor) -> Tensor:
        """Compute `product` as one node of a graph; ConfigError where derivatives are asked for."""
        if transformed() or (x.requires_grad and torch.is_grad_enabled()):
            raise ConfigError(
                "a packed model has no derivatives and no torch.func transforms; use the model that was packed"
            )
        return torch.ops.nitro_e.packed_product(x, self.handle, self.width)


@torch.library.impl(_library, "packed_product", "CPU")
def _packed_product(x: Tensor, handle: Tensor, width: int) -> Tensor:
    return _layers[int(handle.item())].product(x)


@torch.library.register_fake("nitro_e::packed_product", lib=_library)
def _packed_product_shape(x: Tensor, handle: Tensor, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width, dtype=torch.bfloat16)
