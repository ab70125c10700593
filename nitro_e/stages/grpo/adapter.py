"""LoRA on an EMMDiT with peft: trained on our modules, in files under the released names.

The released model has separate query, key and value layers where ours has one `qkv`; a LoRA of each is not a LoRA of
their stack. So `add_adapter` first cuts every `qkv` in three, `dense` puts all together again. What is written loads
with `PeftModel.from_pretrained` onto the released implementation, and with `load_pretrained(..., lora=FOLDER)` here.

Left out: LoRA outside the blocks, dropout, DoRA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge, Gt, Le
from nitro_e.files import save_tensors
from nitro_e.model import EMMDiT
from nitro_e.model.released import block_linears, read_lora
from nitro_e.randomness import seeded

NAME = "default"  # peft's name of the adapter
# Ends of released module names.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TARGETS = {
    "attention": tuple(f"attn.{name}" for name in ATTENTION),
    "blocks": (*(f"attn.{name}" for name in ATTENTION),
               *(f"{ff}.{part}" for ff in ("ff", "ff_context") for part in ("net.0.proj", "net.2"))),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Config):
    rank: Annotated[int, Ge(1), Le(65536)] = 32
    alpha: Annotated[float, Gt(0)] = 64.0  # updates are scaled by alpha / rank
    targets: Literal["attention", "blocks"] = "attention"  # blocks: the MLPs too
    init_from: str | None = None  # a PEFT folder to go on from; it decides rank, alpha and targets


class Stacked(nn.ModuleList):
    """Linear layers that read the same input, their outputs side by side."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self], dim=-1)


def add_adapter(model: EMMDiT, config: AdapterConfig, seed: int) -> None:
    """Put LoRA layers into the model; they alone stay trainable. A ~ N(0, 1 / rank^2), B = 0: nothing changes at first."""
    rank, alpha, factors = config.rank, config.alpha, {}
    if config.init_from is not None:
        rank, alpha, factors = _read(Path(config.init_from))
    ends = TARGETS[config.targets]
    paths: dict[str, str] = {}  # released name -> path of the layer in the model
    for ours, theirs in block_linears(model.config).items():
        wanted = [name for name in theirs if (name in factors if factors else name.endswith(ends))]
        if not wanted:
            continue
        if len(theirs) > 1:
            _cut(model, ours, len(theirs))
        paths |= {
            name: f"{ours}.{part}" if len(theirs) > 1 else ours
            for part, name in enumerate(theirs)
            if name in wanted
        }
    unknown = sorted(factors.keys() - paths.keys())
    if unknown or not paths:
        raise ConfigError(
            f"adapter.init_from: {config.init_from} has a target '{unknown[0]}' that this model's blocks have not; "
            "merge it into the first weights instead (nitro-e convert --lora)"
        )
    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(paths.values()),
        init_lora_weights="gaussian",
    )
    model.requires_grad_(False)
    with seeded(seed, "adapter"):
        inject_adapter_in_model(lora, model, adapter_name=NAME)
    for name, (a, b) in factors.items():
        layer = model.get_submodule(paths[name])
        with torch.no_grad():
            layer.lora_A[NAME].weight.copy_(a)
            layer.lora_B[NAME].weight.copy_(b)


def has_adapter(model: nn.Module) -> bool:
    return any(isinstance(module, LoraLayer) for module in model.modules())


@contextlib.contextmanager
def without_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before `add_adapter`, bit for bit."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def dense(model: EMMDiT) -> EMMDiT:
    """A plain EMMDiT with the adapter added to its weights."""
    state = dict(model.state_dict())
    targets = [path for path in block_linears(model.config) if f"{path}.weight" not in state]
    for path in targets:
        module = model.get_submodule(path)
        layers = list(module) if isinstance(module, Stacked) else [module]
        state[f"{path}.weight"] = torch.cat([_weight(layer) for layer in layers])
        state[f"{path}.bias"] = torch.cat([_base(layer).bias for layer in layers])
    with torch.device("meta"):
        plain = EMMDiT(model.config)
    own = {name: state[name].detach().clone() for name in plain.state_dict()}
    plain.load_state_dict(own, assign=True)
    plain.position.table = model.position.table.clone()
    return plain.eval()


def save_adapter(model: EMMDiT, folder: Path, base: str | None = None) -> None:
    """A PEFT folder under the released names: `adapter_config.json` and `adapter_model.safetensors`."""
    tensors, layers = {}, {}
    for ours, theirs in block_linears(model.config).items():
        module = model.get_submodule(ours)
        for name, layer in zip(theirs, module if isinstance(module, Stacked) else [module], strict=True):
            if isinstance(layer, LoraLayer):
                layers[name] = layer
                for factor, side in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                    weight = side[NAME].weight.detach().contiguous().cpu()
                    tensors[f"base_model.model.{name}.{factor}.weight"] = weight
    first = next(iter(layers.values()))
    config = LoraConfig(
        r=first.r[NAME],
        lora_alpha=first.lora_alpha[NAME],
        target_modules=sorted({".".join(name.split(".")[3:]) for name in layers}),
        init_lora_weights="gaussian",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    # peft makes it a set, whose order changes from run to run
    config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    save_tensors(tensors, folder / "adapter_model.safetensors")


def _read(folder: Path) -> tuple[int, float, dict[str, tuple[Tensor, Tensor]]]:
    """Rank, alpha and {released name: (A, B)} of a PEFT folder whose targets all have the same rank and alpha."""
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
    whole = model.get_submodule(path)
    layers = Stacked()
    for weight, bias in zip(whole.weight.detach().chunk(parts), whole.bias.detach().chunk(parts)):
        layer = nn.Linear(weight.shape[1], len(weight), device="meta")
        layer.load_state_dict({"weight": weight.clone(), "bias": bias.clone()}, assign=True)
        layers.append(layer)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layers)


def _base(layer: nn.Module) -> nn.Linear:
    return layer.base_layer if isinstance(layer, LoraLayer) else layer


def _weight(layer: nn.Module) -> Tensor:
    if not isinstance(layer, LoraLayer):
        return layer.weight
    return layer.base_layer.weight + layer.get_delta_weight(NAME)
