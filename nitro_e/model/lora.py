"""LoRA adapters in PEFT folders: read strictly, and merged into a state dict.

What W + scale * B A cannot express exactly is refused by name: DoRA, trained biases, saved modules, ...
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nitro_e.config import ConfigError, parse_json, read_text
from nitro_e.interfaces import AdapterLayer
from nitro_e.model.weights import check_finite

# entries of adapter_config.json that leave W + scale * B A as it is; any other that is set is refused
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave W as it is


def merge_lora(state: dict[str, Tensor], folder: str | Path, strength: float = 1.0) -> dict[str, Tensor]:
    """Add a PEFT LoRA adapter to a released state dict: W + strength * scale * B A for every target.

    Rank, alpha and their per-module patterns are read from `adapter_config.json`; targets are the tensors of
    `adapter_model.safetensors`. Raises ConfigError naming what cannot be merged exactly.
    """
    folder = Path(folder)
    config, pairs = read_lora(folder)
    merged = dict(state)
    for module, a, b in pairs:
        name = f"{module}.weight"
        if name not in state:
            raise ConfigError(f"{folder}: adapter target '{module}' is not in the released model")
        # convolutions have flat kernels here
        weight, a, b = state[name], a.double().flatten(1), b.double().flatten(1)
        rank, ranks = len(a), _matched(config.get("rank_pattern"), module, config["r"])
        if rank not in ranks:
            raise ConfigError(f"{folder}: '{module}' has rank {rank}, adapter_config.json says {ranks[0]}")
        alpha, *others = _matched(config.get("alpha_pattern"), module, config["lora_alpha"])
        if others:
            raise ConfigError(
                f"{folder}: alpha_pattern gives '{module}' both {alpha} and {others[0]}; no telling which it had"
            )
        if b.shape != (len(weight), rank) or a.shape[1] != weight[0].numel():
            raise ConfigError(
                f"{folder}: '{module}' has LoRA factors {list(b.shape)} x {list(a.shape)} for a weight {list(weight.shape)}"
            )
        scale = strength * alpha / (rank**0.5 if config.get("use_rslora") else rank)
        change = (scale * (b @ a)).reshape(weight.shape)  # on the CPU, as Apple's GPUs lack float64
        merged[name] = (weight.cpu().double() + change).to(weight)
    return merged


@torch.no_grad()
def add_lora(parameters: Mapping[str, Tensor], layers: Sequence[AdapterLayer], folder: Path) -> None:
    """Add an adapter to a model's own parameters in place, in their precision, as the training that wrote it does.

    layers: those that the model offers. For adapters of our training: one rank and one alpha for all.
    """
    config, pairs = read_lora(folder)
    factors = {module: (a, b) for module, a, b in pairs}
    for layer in layers:
        weight = parameters[f"{layer.path}.weight"]
        for name, rows in zip(layer.names, weight.chunk(len(layer.names))):
            if name in factors:
                a, b = factors.pop(name)
                rows += (b @ a) * (config["lora_alpha"] / len(a))
    if factors:
        raise ConfigError(f"{folder}: adapter target '{next(iter(factors))}' is not in the model")


def read_lora(folder: Path) -> tuple[dict[str, Any], list[tuple[str, Tensor, Tensor]]]:
    """Read `adapter_config.json` of a PEFT folder, and (module, A, B) of every target; see `merge_lora`."""
    return _read_adapter_config(folder), list(_pairs(_read_adapter(folder), folder))


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    try:
        config = parse_json(read_text(folder / "adapter_config.json"), f"{folder}/adapter_config.json")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder} has no adapter_config.json: not a PEFT adapter folder") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ConfigError(f"{folder}: peft_type is {kind!r}; only LORA can be merged")
    for key, value in config.items():
        if value and key not in HARMLESS:
            raise ConfigError(
                f"{folder}: {key} = {value!r} cannot be merged exactly into the released weights"
            )
    for key, exact in {"bias": ("none", None), "init_lora_weights": PLAIN_STARTS}.items():
        if config.get(key) not in exact:
            raise ConfigError(
                f"{folder}: {key} = {config[key]!r} cannot be merged exactly into the released weights; only {exact} can"
            )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or config[key] <= 0:
            raise ConfigError(
                f"{folder}: {key} = {config.get(key)!r} in adapter_config.json is not a positive number"
            )
    return config


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    try:
        adapter = load_file(path)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; save the adapter with PEFT's save_pretrained (safetensors)"
        ) from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file ({error})") from None
    if not adapter:
        raise ConfigError(f"{path} holds no lora_A / lora_B tensors")
    check_finite(adapter, path)
    return adapter


def _pairs(adapter: dict[str, Tensor], folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (module, A, B) of every target; any other tensor is refused."""
    pattern = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.items():
        match = pattern.fullmatch(name)
        if match is None:
            raise ConfigError(f"{folder}: tensor '{name}' is not a LoRA factor and cannot be merged exactly")
        found.setdefault(match[1], {})[match[2]] = tensor
    for module, pair in found.items():
        if pair.keys() != {"A", "B"}:
            raise ConfigError(f"{folder}: '{module}' lacks one of its two LoRA factors")
        yield module, pair["A"], pair["B"]


def _matched(pattern: dict | None, module: str, default: float) -> list[float]:
    """Return the distinct values of the pattern keys that match a module's name or its end (PEFT's rule).

    PEFT takes the first match, but saves the keys sorted, so of several only the tensors can tell.
    """
    values = [value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)]
    return list(dict.fromkeys(values)) or [default]
