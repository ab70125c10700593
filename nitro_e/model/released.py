"""The released weight format (hub repository `amd/Nitro-E`): names, shapes, and PEFT LoRA folders over those names.

One table, `released_names`, maps each of our parameters to the released tensors it is made of; reading and writing
both follow it, so a round trip is exact. Released tensors that are no parameters of ours: the position table
`pos_embed.pos_embed` (recomputed, compared) and the REPA projector `projectors.*` (training only).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nitro_e.config import ConfigError
from nitro_e.model.emmdit import EMMDiT, ModelConfig
from nitro_e.model.layers import sincos_table

POSITION_TABLE = "pos_embed.pos_embed"
PROJECTOR = "projectors."


def released_names(config: ModelConfig) -> dict[str, list[str]]:
    """Our parameter name -> released names, to be concatenated along the first axis and flattened to our shape."""
    if config.modulation != "affine" or not config.qk_norm:
        raise ConfigError(
            "the released format has modulation 'affine' and qk_norm on; this model has "
            f"modulation '{config.modulation}' and qk_norm {config.qk_norm}"
        )
    names: dict[str, list[str]] = {}

    def linear(ours: str, *theirs: str) -> None:
        for kind in ("weight", "bias"):
            names[f"{ours}.{kind}"] = [f"{name}.{kind}" for name in theirs]

    linear("patch", "pos_embed.proj")
    linear("text", "context_embedder")
    linear("time.linear_in", "adaln_single.emb.timestep_embedder.linear_1")
    linear("time.linear_out", "adaln_single.emb.timestep_embedder.linear_2")
    linear("shared_modulation.linear", "adaln_single.linear")
    for path, ratio in enumerate(config.compression):
        for ours, theirs in ((0, 1), (2, 3)):
            linear(f"compress.paths.{path}.{ours}", f"tokencompressor.0.0.body{ratio}x.{theirs}")
            linear(f"reconstruct.paths.{path}.{ours}", f"tokenreconstructor.0.0.body{ratio}x.{theirs}")
    if config.compression:
        linear("reconstruct.merge.0", "tokenreconstructor.0.0.mergers.0")
        linear("reconstruct.merge.2", "tokenreconstructor.0.0.mergers.2")
    linear("out", "proj_out")

    block_names = [f"block_groups.{g}.{i}" for g, count in enumerate(config.groups) for i in range(count)]
    for index, theirs in enumerate(block_names):
        ours, last = f"blocks.{index}", index == config.depth - 1
        _stream(names, linear, f"{ours}.image", theirs, IMAGE, updated=True)
        _stream(names, linear, f"{ours}.text", theirs, TEXT, updated=not last)
    return names


# Released names of one stream's parts within a block.
IMAGE = dict(suffix="", norm="norm1", qkv=("to_q", "to_k", "to_v"), q="norm_q", k="norm_k", out="to_out.0", mlp="ff")
TEXT = dict(
    suffix="_c", norm="norm1_context", qkv=("add_q_proj", "add_k_proj", "add_v_proj"), q="norm_added_q",
    k="norm_added_k", out="to_add_out", mlp="ff_context",
)  # fmt: skip


def _stream(names: dict, linear: Any, ours: str, theirs: str, part: dict, updated: bool) -> None:
    attention = f"{ours}.attention" if updated else ours  # the last block's text is the attention input alone
    linear(f"{attention}.norm", f"{theirs}.{part['norm']}")
    linear(f"{attention}.qkv", *(f"{theirs}.attn.{name}" for name in part["qkv"]))
    names[f"{attention}.q_norm.weight"] = [f"{theirs}.attn.{part['q']}.weight"]
    names[f"{attention}.k_norm.weight"] = [f"{theirs}.attn.{part['k']}.weight"]
    if updated:
        names[f"{ours}.modulation.bias"] = [f"{theirs}.scale_shift_bias{part['suffix']}"]
        names[f"{ours}.modulation.scale"] = [f"{theirs}.scale_shift_scale{part['suffix']}"]
        linear(f"{ours}.attention_out", f"{theirs}.attn.{part['out']}")
        linear(f"{ours}.mlp.0", f"{theirs}.{part['mlp']}.net.0.proj")
        linear(f"{ours}.mlp.2", f"{theirs}.{part['mlp']}.net.2")


def is_released(state: dict[str, Any]) -> bool:
    return POSITION_TABLE in state and "adaln_single.linear.weight" in state


def infer_config(state: dict[str, Tensor], base_grid: int, attention: tuple[str, ...]) -> ModelConfig:
    """The config of a released state dict. Weights do not show the training grid and the attention cycle."""
    blocks = [re.match(r"block_groups\.(\d+)\.(\d+)\.", name) for name in state]
    indices = {(int(match[1]), int(match[2])) for match in blocks if match}
    groups = tuple(sum(group == g for group, _ in indices) for g in range(3))
    ratios = sorted(int(match[1]) for name in state if (match := re.match(r"tokencompressor\.0\.0\.body(\d+)x\.1\.bias", name)))
    width, channels, patch_size, _ = state["pos_embed.proj.weight"].shape
    return ModelConfig(
        latent_channels=channels,
        text_width=state["context_embedder.weight"].shape[1],
        patch_size=patch_size,
        width=width,
        heads=width // state["block_groups.0.0.attn.norm_q.weight"].shape[0],
        mlp_ratio=state["block_groups.0.0.ff.net.0.proj.weight"].shape[0] / width,
        groups=groups,
        compression=tuple(ratios),
        attention=attention,
        base_grid=base_grid,
        position_table=int(state[POSITION_TABLE].shape[1] ** 0.5),
    )


def from_released(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Released state dict -> ours. Missing, unknown or misshapen tensors raise ConfigError naming them."""
    names = released_names(config)
    wanted = {name for parts in names.values() for name in parts}
    extra = [name for name in state if name not in wanted and name != POSITION_TABLE and not name.startswith(PROJECTOR)]
    missing = sorted(wanted - state.keys())
    if missing or extra:
        raise ConfigError(f"not the released format of this config: missing {missing[:3]}, unknown {extra[:3]}")
    shapes = _shapes(config)
    ours = {}
    for name, parts in names.items():
        tensor = torch.cat([state[part] for part in parts])
        if tensor.numel() != shapes[name].numel():
            raise ConfigError(f"{parts[0]} has shape {list(state[parts[0]].shape)}, which does not fit {name} {list(shapes[name])}")
        ours[name] = tensor.reshape(shapes[name])
    _check_position_table(state[POSITION_TABLE], config)
    return ours


def to_released(model: EMMDiT) -> dict[str, Tensor]:
    """Our model -> released state dict, bit for bit, contiguous (without the REPA projector)."""
    config = model.config
    ours = model.state_dict()
    released = {POSITION_TABLE: model.position.table.reshape(1, -1, config.width).clone()}
    for name, parts in released_names(config).items():
        for part, tensor in zip(parts, ours[name].chunk(len(parts))):
            released[part] = tensor.reshape(_released_shape(part, tensor, config)).clone()
    return released


def released_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the released format, without allocating weights."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in to_released(EMMDiT(config)).items()}


def _released_shape(name: str, tensor: Tensor, config: ModelConfig) -> tuple[int, ...]:
    """1x1 maps were convolutions there."""
    if name == "pos_embed.proj.weight":
        return (config.width, config.latent_channels, config.patch_size, config.patch_size)
    if re.fullmatch(r"token(compressor|reconstructor)\.0\.0\.body\d+x\.\d\.weight", name):
        return (*tensor.shape, 1, 1)
    return tuple(tensor.shape)


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in EMMDiT(config).state_dict().items()}


def _check_position_table(table: Tensor, config: ModelConfig) -> None:
    ours = sincos_table(config.position_table, config.width, config.base_grid, config.interpolation)
    if not torch.allclose(table.float().reshape(ours.shape), ours, atol=1e-5):
        raise ConfigError(f"{POSITION_TABLE} is not the table of base_grid {config.base_grid}; give the right resolution")


# ------------------------------------------------------------------------------------------------------ LoRA


def merge_lora(state: dict[str, Tensor], folder: str | Path) -> dict[str, Tensor]:
    """Add a PEFT LoRA adapter to a released state dict: W + scale * B A for every target.

    Rank, alpha and their per-module patterns are read from `adapter_config.json`. What this cannot express exactly
    (DoRA, trained biases, saved modules, other adapter kinds, ...) raises ConfigError naming it.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no adapter_config.json: not a PEFT adapter folder") from None
    _refuse_inexact(config, folder)
    adapter = load_file(folder / "adapter_model.safetensors")
    merged, seen = dict(state), set()
    for module, a, b in _pairs(adapter, folder):
        name = f"{module}.weight"
        if name not in state:
            raise ConfigError(f"{folder}: adapter target '{module}' is not in the released model")
        rank = _matched(config.get("rank_pattern"), module, config["r"])
        alpha = _matched(config.get("alpha_pattern"), module, config["lora_alpha"])
        if a.shape[0] != rank:
            raise ConfigError(f"{folder}: '{module}' has rank {a.shape[0]}, adapter_config.json says {rank}")
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        delta = scale * (b.double() @ a.double())
        merged[name] = (state[name].double() + delta.reshape(state[name].shape)).to(state[name].dtype)
        seen.add(module)
    if not seen:
        raise ConfigError(f"{folder}: adapter_model.safetensors holds no lora_A / lora_B tensors")
    return merged


def _refuse_inexact(config: dict, folder: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{folder}: peft_type is {config.get('peft_type')!r}; only LORA can be merged")
    inexact = (
        "use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save", "target_parameters",
        "trainable_token_indices", "layer_replication", "alora_invocation_tokens", "arrow_config", "megatron_config",
    )  # fmt: skip
    for key in inexact:
        if config.get(key):
            raise ConfigError(f"{folder}: {key} = {config[key]!r} cannot be merged exactly into the released weights")
    if config.get("bias", "none") != "none":
        raise ConfigError(f"{folder}: bias = {config['bias']!r} cannot be merged exactly; only 'none' can")


def _pairs(adapter: dict[str, Tensor], folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module, A, B) of every target; any other tensor is refused."""
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


def _matched(pattern: dict | None, module: str, default: float) -> float:
    """PEFT's rule: a pattern key matches a module whose dotted name ends in it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
