"""The released weight format (hub repository `amd/Nitro-E`): names, shapes, and PEFT LoRA folders over those names.

One table, `released_names`, maps each of our parameters to the released tensors it is made of; reading and writing
both follow it, so a round trip is exact. Released tensors that are no parameters of ours: the position table
`pos_embed.pos_embed` (recomputed, compared) and the REPA projector `projectors.*` (training only).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nitro_e.config import ConfigError, parse_json, read_text
from nitro_e.model.emmdit import EMMDiT, ModelConfig
from nitro_e.model.layers import sincos_table
from nitro_e.model.weights import check_finite

POSITION_TABLE = "pos_embed.pos_embed"
PROJECTOR = "projectors."

# What every released model has, and weights do not show.
RELEASED_CHOICES = dict(
    compression=(2, 4), position_reinforcement=True, modulation="affine", qk_norm=True, text_mask="none"
)
RELEASED_CYCLES = (("full", "4x1", "4x4"), ("full",))  # 512 px and 1024 px


def check_representable(config: ModelConfig) -> None:
    """Refuse a model that programs reading the released format would load as something else, or not at all."""
    for field, value in RELEASED_CHOICES.items():
        if getattr(config, field) != value:
            raise ConfigError(
                f"the released format has {field} {_plain(value)} only; this model has {_plain(getattr(config, field))}"
            )
    if config.attention not in RELEASED_CYCLES:
        known = " or ".join(str(_plain(cycle)) for cycle in RELEASED_CYCLES)
        raise ConfigError(
            f"the released format has attention {known} only; this model has {_plain(config.attention)}"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def released_names(config: ModelConfig) -> dict[str, list[str]]:
    """Our parameter name -> released names, to be concatenated along the first axis and flattened to our shape."""
    check_representable(config)
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
    linear("reconstruct.merge.0", "tokenreconstructor.0.0.mergers.0")
    linear("reconstruct.merge.2", "tokenreconstructor.0.0.mergers.2")
    linear("out", "proj_out")

    _blocks(names, linear, config)
    return names


def block_linears(config: ModelConfig) -> dict[str, list[str]]:
    """Our linear layers inside blocks -> the released layers they are made of (three for qkv): what LoRA may be put on.

    Also for models that have no file in the released format.
    """
    found: dict[str, list[str]] = {}
    _blocks({}, lambda ours, *theirs: found.update({ours: list(theirs)}), config)
    return {ours: theirs for ours, theirs in found.items() if not ours.endswith(".norm")}


def _blocks(names: dict, linear: Any, config: ModelConfig) -> None:
    block_names = [f"block_groups.{g}.{i}" for g, count in enumerate(config.groups) for i in range(count)]
    for index, theirs in enumerate(block_names):
        ours, last = f"blocks.{index}", index == config.depth - 1
        _stream(names, linear, f"{ours}.image", theirs, IMAGE, updated=True)
        _stream(names, linear, f"{ours}.text", theirs, TEXT, updated=not last)


# Released names of one stream's parts within a block.
IMAGE = dict(
    suffix="", norm="norm1", qkv=("to_q", "to_k", "to_v"), q="norm_q", k="norm_k", out="to_out.0", mlp="ff"
)
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

    def shape(name: str, dimensions: int) -> torch.Size:
        if name not in state or state[name].ndim != dimensions:
            raise ConfigError(f"not the released format: it needs a {dimensions}-dimensional tensor '{name}'")
        return state[name].shape

    matches = [re.match(r"block_groups\.([012])\.(\d+)\.", name) for name in state]
    blocks = sorted({(int(match[1]), int(match[2])) for match in matches if match})
    if not blocks:
        raise ConfigError("not the released format: it has no tensors under 'block_groups.'")
    first = "block_groups.{}.{}".format(*blocks[0])
    width, channels, patch_size, _ = shape("pos_embed.proj.weight", 4)
    return ModelConfig(
        latent_channels=channels,
        text_width=shape("context_embedder.weight", 2)[1],
        patch_size=patch_size,
        width=width,
        heads=width // shape(f"{first}.attn.norm_q.weight", 1)[0],
        mlp_ratio=shape(f"{first}.ff.net.0.proj.weight", 2)[0] / width,
        groups=tuple(sum(group == g for group, _ in blocks) for g in range(3)),
        attention=attention,
        base_grid=base_grid,
        position_table=math.isqrt(shape(POSITION_TABLE, 3)[1]),
    )


def from_released(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Released state dict -> ours. Missing, unknown or misshapen tensors raise ConfigError naming them.

    The REPA projector, if it is there, is left out: it is no part of the model.
    """
    wanted = released_shapes(config)
    wrong = {
        "missing": [name for name in wanted if name not in state],
        "unknown": [name for name in state if name not in wanted and not name.startswith(PROJECTOR)],
        "misshapen": [
            f"{name} {list(state[name].shape)} instead of {list(shape)}"
            for name, shape in wanted.items()
            if name in state and tuple(state[name].shape) != shape
        ],
    }
    detail = "; ".join(f"{len(names)} {what}, such as {names[0]}" for what, names in wrong.items() if names)
    if detail:
        raise ConfigError(f"not the released format of this config: {detail}")
    _check_position_table(state[POSITION_TABLE], config)
    shapes = _shapes(config)
    return {
        name: torch.cat([state[part] for part in parts]).reshape(shapes[name])
        for name, parts in released_names(config).items()
    }


def to_released(model: EMMDiT) -> dict[str, Tensor]:
    """Our model -> released state dict, bit for bit, contiguous (without the REPA projector)."""
    config = model.config
    ours = model.state_dict()
    released = {POSITION_TABLE: model.position.table.reshape(1, -1, config.width).clone()}
    for name, parts in released_names(config).items():
        for part, tensor in zip(parts, ours[name].chunk(len(parts))):
            released[part] = tensor.reshape(_released_shape(part, tensor, config)).clone()
    return released


@functools.lru_cache(maxsize=8)
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


@functools.lru_cache(maxsize=8)
def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in EMMDiT(config).state_dict().items()}


def _check_position_table(table: Tensor, config: ModelConfig) -> None:
    ours = sincos_table(config.position_table, config.width, config.base_grid, config.interpolation).to(
        table.dtype
    )
    tolerance = max(1e-5, torch.finfo(table.dtype).eps)
    if not torch.allclose(table.reshape(ours.shape).float(), ours.float(), rtol=0, atol=tolerance):
        raise ConfigError(
            f"{POSITION_TABLE} is not the table of base_grid {config.base_grid}; give the right resolution"
        )


# ------------------------------------------------------------------------------------------------------ LoRA

# Entries of adapter_config.json that may be set without changing W + scale * B A. Any other that is set is refused.
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # init_lora_weights that leave W as it is


def merge_lora(state: dict[str, Tensor], folder: str | Path) -> dict[str, Tensor]:
    """Add a PEFT LoRA adapter to a released state dict: W + scale * B A for every target.

    Rank, alpha and their per-module patterns are read from `adapter_config.json`; targets are the tensors of
    `adapter_model.safetensors`. What this cannot express exactly (DoRA, trained biases, saved modules, starts that
    change W, other adapter kinds, ...) raises ConfigError naming it.
    """
    folder = Path(folder)
    config, pairs = read_lora(folder)
    merged = dict(state)
    for module, a, b in pairs:
        name = f"{module}.weight"
        if name not in state:
            raise ConfigError(f"{folder}: adapter target '{module}' is not in the released model")
        # of a convolution: flat kernels
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
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        merged[name] = (weight.double() + (scale * (b @ a)).reshape(weight.shape)).to(weight.dtype)
    return merged


def read_lora(folder: Path) -> tuple[dict[str, Any], list[tuple[str, Tensor, Tensor]]]:
    """`adapter_config.json` of a PEFT folder, and (module, A, B) of every target. ConfigError as for `merge_lora`."""
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


def _matched(pattern: dict | None, module: str, default: float) -> list[float]:
    """The distinct values of the pattern keys that match the module's dotted name or the end of it (PEFT's rule).

    PEFT takes the first match, but saves the keys sorted, so of several only the tensors can tell.
    """
    values = [value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)]
    return list(dict.fromkeys(values)) or [default]
