"""LoRA with peft on the layers that a model offers (`Model.adapter_layers`), in files under their names.

E-MMDiT's are those of the released implementation, which has separate query, key and value layers where ours
has one `qkv`. A LoRA of each is not a LoRA of their stack, so `add_adapter` first cuts every `qkv` in three,
and `dense` puts all together again. What is written loads with `PeftModel.from_pretrained` onto the released
implementation, and with `load_pretrained(..., lora=FOLDER)` here.

Left out: LoRA outside the blocks, dropout, DoRA.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, cast

import torch
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge, Gt, Le
from nitro_e.files import save_tensors
from nitro_e.interfaces import AdapterLayer, Model
from nitro_e.model.lora import read_lora
from nitro_e.randomness import seeded

NAME = "default"  # peft's name of the adapter


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Config):
    rank: Annotated[int, Ge(1), Le(65536)] = 32  # of the LoRA
    alpha: Annotated[float, Gt(0)] = 64.0  # B A is scaled by alpha / rank
    targets: Literal["attention", "blocks"] = "attention"  # blocks: the MLPs too
    init_from: str | None = None  # a PEFT folder to go on from; it decides rank, alpha and targets


class Stacked(nn.ModuleList):
    """Linear layers that read the same input, and whose outputs are concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self], dim=-1)


def adapter_layers(model: Model) -> list[AdapterLayer]:
    """List the layers that a fresh model offers; in the model itself an adapter may have replaced them."""
    with torch.device("meta"):
        return model.config.build().adapter_layers()


def add_adapter(model: Model, config: AdapterConfig, seed: int) -> None:
    """Put LoRA layers into the model, which alone stay trainable.

    They start with A ~ N(0, 1 / rank^2) and B = 0, so that nothing changes at first, or with those of
    `init_from`. They are float32 whatever the layers are: in bfloat16 small updates would be lost.
    """
    rank, alpha, factors = config.rank, config.alpha, Factors()
    if config.init_from is not None:
        rank, alpha, factors = _read(Path(config.init_from))
    paths: dict[str, str] = {}  # name in adapter files -> path of the layer in the model
    for layer in adapter_layers(model):
        chosen = layer.attention or config.targets == "blocks"
        wanted = [name for name in layer.names if (name in factors if factors else chosen)]
        if not wanted:
            continue
        cut = len(layer.names) > 1
        if cut:
            _cut(model, layer.path, len(layer.names))
        for part, name in enumerate(layer.names):
            if name in wanted:
                paths[name] = f"{layer.path}.{part}" if cut else layer.path
    unknown = sorted(factors.keys() - paths.keys())
    if unknown or not paths:
        raise ConfigError(
            f"adapter.init_from: {config.init_from} has a target '{unknown[0]}' that this model's blocks have not; "
            "merge it into the first weights instead (nitro-e convert --lora)"
        )
    from peft import LoraConfig, inject_adapter_in_model  # seconds, for those who train an adapter

    lora = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # peft takes any number
        target_modules=sorted(paths.values()),
        init_lora_weights="gaussian",
    )
    model.requires_grad_(False)
    with seeded(seed, "adapter"):
        inject_adapter_in_model(lora, model, adapter_name=NAME)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    for name, (a, b) in factors.items():
        layer_a, layer_b = _factors(model.get_submodule(paths[name]))
        with torch.no_grad():
            layer_a.copy_(a)
            layer_b.copy_(b)


def has_adapter(model: nn.Module) -> bool:
    return any(is_lora(module) for module in model.modules())


def is_lora(module: nn.Module) -> TypeGuard[Any]:
    """Tell whether this is a LoRA layer. Nobody can have made one as long as peft is not imported."""
    return "peft" in sys.modules and isinstance(module, sys.modules["peft"].tuners.lora.LoraLayer)


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before `add_adapter`, bit for bit."""
    layers = [module for module in model.modules() if is_lora(module)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def size_of(model: Model, config: AdapterConfig) -> int:
    """Count the numbers of an adapter that a model, which may be on the meta device, would get."""
    chosen = [layer for layer in model.adapter_layers() if layer.attention or config.targets == "blocks"]
    shapes = [(len(layer.names), *model.get_parameter(f"{layer.path}.weight").shape) for layer in chosen]
    return sum(config.rank * (parts * inside + outside) for parts, outside, inside in shapes)


def is_frozen(name: str) -> bool:
    """Tell by its name whether a tensor of a model with an adapter is never trained; wrappers' prefixes do not matter."""
    return ".lora_" not in name


@torch.no_grad()
def dense(model: Model, merged: bool = True) -> Model:
    """Make a plain model of the weights, with the adapter added or without it."""
    state = dict(model.state_dict())
    for path in (layer.path for layer in adapter_layers(model)):
        if f"{path}.weight" in state:
            continue
        module = model.get_submodule(path)
        layers = list(module) if isinstance(module, Stacked) else [module]
        state[f"{path}.weight"] = torch.cat(
            [_weight(layer) if merged else _base(layer).weight for layer in layers]
        )
        if _base(layers[0]).bias is not None:
            state[f"{path}.bias"] = torch.cat([_base(layer).bias for layer in layers])
    plain = model.config.build_empty()
    own = {name: state[name].detach().clone() for name in plain.state_dict()}
    plain.load_state_dict(own, assign=True)
    for name, buffer in plain.named_buffers():
        buffer.data = model.get_buffer(name).clone()
    return plain.eval()


def save_adapter(model: Model, folder: Path, base: str | None = None) -> None:
    """Write a PEFT folder under the model's names: `adapter_config.json` and `adapter_model.safetensors`."""
    tensors, layers = {}, {}
    for layer in adapter_layers(model):
        module = model.get_submodule(layer.path)
        for name, part in zip(layer.names, module if isinstance(module, Stacked) else [module], strict=True):
            if is_lora(part):
                layers[name] = part
                for factor, weight in zip("AB", _factors(part)):
                    tensors[f"base_model.model.{name}.lora_{factor}.weight"] = (
                        weight.detach().contiguous().cpu()
                    )
    first = next(iter(layers.values()))
    # peft matches the ends of names: without "block_groups.0.1." they stand for the layer of every block
    targets = sorted({re.sub(r"^\w+(\.\d+)+\.", "", name) for name in layers})
    from peft import LoraConfig

    config = LoraConfig(
        r=first.r[NAME],
        lora_alpha=first.lora_alpha[NAME],
        target_modules=targets,
        init_lora_weights="gaussian",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.target_modules = targets  # peft makes it a set, whose order changes from run to run
    config.save_pretrained(str(folder))
    save_tensors(tensors, folder / "adapter_model.safetensors")


Factors = dict[str, tuple[Tensor, Tensor]]  # name of a layer in adapter files -> A, B


def _read(folder: Path) -> tuple[int, float, Factors]:
    """Read rank, alpha and factors of a PEFT folder whose targets all have the same rank and alpha."""
    config, pairs = read_lora(folder)
    ranks = {len(a) for _, a, _ in pairs}
    if (
        config.get("rank_pattern")
        or config.get("alpha_pattern")
        or config.get("use_rslora")
        or len(ranks) > 1
    ):
        raise ConfigError(
            f"adapter.init_from: {folder} has ranks or scales per layer; merge it into the first weights instead "
            "(nitro-e convert --lora)"
        )
    return ranks.pop(), config["lora_alpha"], {module: (a, b) for module, a, b in pairs}


def _cut(model: nn.Module, path: str, parts: int) -> None:
    """Replace a linear layer by `parts` layers of equal width that do the same."""
    whole = _base(model.get_submodule(path))
    biases = [None] * parts if whole.bias is None else whole.bias.detach().chunk(parts)
    layers = Stacked()
    for weight, bias in zip(whole.weight.detach().chunk(parts), biases):
        layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
        state = (
            {"weight": weight.clone()} if bias is None else {"weight": weight.clone(), "bias": bias.clone()}
        )
        layer.load_state_dict(state, assign=True)
        layers.append(layer)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layers)


def _base(layer: nn.Module) -> nn.Linear:
    """Return the linear layer itself, or the one under a LoRA."""
    base = layer.get_base_layer() if is_lora(layer) else layer
    assert isinstance(base, nn.Linear)
    return base


def _factors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the weights A and B of a LoRA layer."""
    return layer.get_parameter(f"lora_A.{NAME}.weight"), layer.get_parameter(f"lora_B.{NAME}.weight")


def _weight(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer, a LoRA added to it."""
    weight = _base(layer).weight
    return weight + layer.get_delta_weight(NAME) if is_lora(layer) else weight
