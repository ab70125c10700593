"""Linear layers in 8 bits on a CPU: fixed weights per output channel, activations per token as they come.

    y = s_x * ((q_x - 128) W_q^T * s_w) + b,    W = s_w * W_q,   x = s_x * (q_x - 128)  up to rounding

with W_q in -127..127 and q_x in 1..255; s_w (N,) and s_x (one per token) bring the largest entry to 127. The product is
oneDNN's of unsigned with signed bytes: exact in 32 bits, scaled by s_w, rounded to bfloat16. (With both signed torch 2.15
takes a path a hundred times as slow on processors without AMX.) Compiled blocks compute what lies around it in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nitro_e.config import ConfigError
from nitro_e.model.cpu.packed_layer import PackedLayer

LARGEST = 127
ZERO_POINT = 128  # the level of zero


class Int8Linear(PackedLayer):
    """A linear layer of 8-bit weights and activations; input and output are bfloat16."""

    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.out_features)
        weight = linear.weight.detach().float()  # (N, K)
        self.scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST  # (N,)
        levels = (weight / self.scale[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(levels, None)
        self.zero_points = torch.zeros(linear.out_features, dtype=torch.int32)
        # a buffer, so that compiled blocks share a graph
        self.register_buffer("bias", linear.bias.detach(), persistent=False)

    def product(self, x: Tensor) -> Tensor:
        """Multiply levels (..., K) uint8 with the weight: bfloat16, without the scale of x and the bias."""
        weight = (self.weight, self.scale, self.zero_points)
        # no bias; output scale, zero point and dtype; no activation
        rest: tuple[Any, ...] = (None, 1.0, 0, torch.bfloat16, "none", [], "")
        return torch.ops.onednn.qlinear_pointwise(x, 1.0, ZERO_POINT, *weight, *rest)

    def forward(self, x: Tensor) -> Tensor:
        levels, scale = quantise_tokens(x)
        return torch.addcmul(self.bias, self.traceable_product(levels), scale)


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each token of x (..., K) to levels (..., K) uint8, and give the scale (..., 1) of x's dtype of each."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny * LARGEST) / LARGEST
    levels = (x.float() / scale.float()).round().clamp(-LARGEST, LARGEST)  # the scale is rounded too
    return (levels + ZERO_POINT).to(torch.uint8), scale


def check_int8() -> None:
    """Raise ConfigError where 8-bit products are missing, wrong or no faster."""
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        raise ConfigError(f"weights 'int8': torch {torch.__version__} has no 8-bit linear layers of oneDNN")
    if not torch.cpu._is_vnni_supported():
        raise ConfigError(
            "weights 'int8': this processor has no AVX-512 VNNI, without which 8-bit products are no faster; "
            "use bfloat16"
        )
