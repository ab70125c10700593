"""A faster model for sampling on a CPU: weights laid out for oneDNN once, linear layers fused with GELU.

    packed = pack_for_cpu(model)                    # a copy; the same forward, no gradients, no state dict
    packed = pack_for_cpu(model, fastest_weights())     # products in float32, on processors where they are faster
    packed = pack_for_cpu(model, weights="int8")    # with 8-bit products in the blocks, see int8.py
    packed.compile_blocks()                         # optional: fuses what lies between the products

Without it every linear layer lays its weights out anew at every call, and GELU is one more pass over the
widest activations. Any `Model` can be packed whose linear layers are called, and have a bias. Left out:
training and saving (keep the model that was packed), other devices and dtypes.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from nitro_e.config import ConfigError
from nitro_e.interfaces import Model
from nitro_e.model.cpu.int8 import Int8Linear, check_int8
from nitro_e.model.cpu.packed_layer import PackedLayer

Weights = Literal["bfloat16", "float32", "int8"]
# seconds in float32 by those in bfloat16, below which float32 is taken: it needs twice the memory
CLEARLY_FASTER = 0.8


def pack_for_cpu(model: Model, weights: Weights = "bfloat16") -> Model:
    """Copy a bfloat16 model on the CPU for inference, with packed linear layers.

    weights: `bfloat16` gives the model's velocities up to bfloat16 rounding. `float32` computes the products of the
    same numbers in float32, and rounds their sums to bfloat16. `int8` computes the linear layers
    that LoRA can be put on (those of the blocks, except modulation) in 8 bits, which costs accuracy
    (docs/speed.md); the other layers are packed in bfloat16. Raises ConfigError when this model, processor or
    build of torch cannot be packed. The copy has no parameters in its linear layers and cannot be saved.
    """
    _check(model)
    if weights == "int8":
        check_int8()
    elif weights not in ("bfloat16", "float32"):
        raise ConfigError(f"weights: unknown '{weights}' (known: bfloat16, float32, int8)")
    in_int8 = {layer.path for layer in model.adapter_layers()} if weights == "int8" else set()
    packed = copy.deepcopy(model).eval().requires_grad_(False)
    packed.register_state_dict_pre_hook(_refuse_to_save)
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    for path, module in list(packed.named_modules()):
        _pack_children(path, module, in_int8, dtype)
    return packed


@functools.cache
def fastest_weights() -> Literal["bfloat16", "float32"]:
    """Find out in which products are faster on this processor, by computing some.

    ConfigError where oneDNN has none in bfloat16.
    """
    _check_processor()
    seconds = []
    with torch.random.fork_rng(devices=()):
        linear = nn.Linear(768, 768, dtype=torch.bfloat16)
        x = torch.randn(256, 768, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        layer = PackedLinear(linear, gelu=False, dtype=dtype)
        seconds.append(_seconds(layer.product, x))
    return "float32" if seconds[1] < CLEARLY_FASTER * seconds[0] else "bfloat16"


@functools.cache
def bfloat16_slowdown() -> float:
    """Measure how many times as long as in float32 a linear layer takes in bfloat16 on this processor, as in training."""
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        product = functools.partial(nn.functional.linear, weight=weight)
        seconds[dtype] = _seconds(product, x)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def _seconds(product: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Time the fastest of eight products on one thread: several wait for each other on a busy machine."""
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(8):
            before = time.process_time()
            product(x)
            found.append(time.process_time() - before)
    finally:
        torch.set_num_threads(threads)
    return min(found)


def _pack_children(path: str, module: nn.Module, in_int8: set[str], dtype: torch.dtype) -> None:
    """Replace linear layers, and in a Sequential the tanh-GELU after one, in place."""
    children = list(module.named_children())
    following = [child for _, child in children[1:]] + [None]
    for (name, child), after in zip(children, following):
        if isinstance(child, nn.Linear) and f"{path}.{name}" in in_int8:
            setattr(module, name, Int8Linear(child))
        elif isinstance(child, nn.Linear):
            fused = isinstance(module, nn.Sequential) and is_tanh_gelu(after)
            setattr(module, name, PackedLinear(child, fused, dtype))
            if fused:
                setattr(module, str(int(name) + 1), nn.Identity())


def is_tanh_gelu(module: nn.Module | None) -> bool:
    return isinstance(module, nn.GELU) and module.approximate == "tanh"


def _refuse_to_save(*_: object) -> None:
    raise ConfigError(
        "a packed model has no weights to read and cannot be saved; save the model that was packed"
    )


def is_packed(model: nn.Module) -> bool:
    """Tell whether a model is what `pack_for_cpu` returns."""
    return any(isinstance(module, PackedLayer) for module in model.modules())


def _check(model: Model) -> None:
    if is_packed(model):
        raise ConfigError("the model is already packed")
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linears or any(linear.bias is None for linear in linears):
        raise ConfigError("pack_for_cpu: only linear layers with a bias are packed; use the model as it is")
    weight = linears[0].weight
    if weight.device.type != "cpu":
        raise ConfigError(
            f"pack_for_cpu: the model is on {weight.device}; use compile_blocks there, or move it to the CPU"
        )
    if weight.dtype != torch.bfloat16:
        raise ConfigError(
            f"pack_for_cpu: the model is {weight.dtype}; only bfloat16 is packed, give model.bfloat16()"
        )
    _check_processor()


def _check_processor() -> None:
    missing = [
        name
        for name in ("_reorder_linear_weight", "_linear_pointwise")
        if not hasattr(torch.ops.mkldnn, name)
    ]
    if missing or not torch.backends.mkldnn.is_available():
        raise ConfigError(
            f"pack_for_cpu: torch {torch.__version__} has no oneDNN linear layers; use the model as it is"
        )
    if not has_bfloat16_products():
        raise ConfigError(
            "pack_for_cpu: this processor has no AVX-512, which oneDNN needs for bfloat16; use the model as it is"
        )


def has_bfloat16_products() -> bool:
    """Tell whether this processor multiplies in bfloat16 with oneDNN; what torch does instead is many times slower."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinear(PackedLayer):
    """A linear layer whose weight is in oneDNN's layout, optionally followed by tanh-GELU; computed in `dtype`."""

    def __init__(self, linear: nn.Linear, gelu: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(linear.out_features)
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
        self.bias = linear.bias.detach().to(dtype)
        self.activation: tuple[str, list, str] = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def product(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.activation).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.traceable_product(x)
