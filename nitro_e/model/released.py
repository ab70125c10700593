"""The released weight format (hub repository `amd/Nitro-E`): its names and shapes, read and written.

One table, `released_names`, maps each of our parameters to the released tensors it is made of. Reading and
writing both follow it, so a round trip is exact. Two kinds of released tensors are no parameters of ours: the
position table `pos_embed.pos_embed`, which is computed and compared, and the REPA projector `projectors.*`,
which only training uses.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import torch
from torch import Tensor

from nitro_e.config import ConfigError
from nitro_e.model.emmdit import EMMDiT, ModelConfig
from nitro_e.model.layers import sincos_table
from nitro_e.model.names import Names, block_parameters, weights_and_biases

POSITION_TABLE = "pos_embed.pos_embed"
PROJECTOR = "projectors."

# what every released model has, and its weights do not show
RELEASED_CHOICES = dict(
    compression=(2, 4),
    text_compression=1,
    path_drop=0.0,
    position_reinforcement=True,
    modulation="affine",
    qk_norm=True,
    norm="layer",
    mlp="gelu",
    value_residual=False,
    text_mask="none",
    prediction="velocity",
)
RELEASED_CYCLES = (("full", "4x1", "4x4"), ("full",))  # 512 px and 1024 px


def check_representable(config: ModelConfig) -> None:
    """Refuse a model that programs reading the released format would load as something else, or not at all."""
    for field, value in {**RELEASED_CHOICES, **config.ADOPTED}.items():
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


def released_names(config: ModelConfig) -> Names:
    """Map our parameter names to released ones, to be concatenated along the first axis and reshaped."""
    check_representable(config)
    layers = {
        "patch": ["pos_embed.proj"],
        "text": ["context_embedder"],
        "time.linear_in": ["adaln_single.emb.timestep_embedder.linear_1"],
        "time.linear_out": ["adaln_single.emb.timestep_embedder.linear_2"],
        "shared_modulation.linear": ["adaln_single.linear"],
        "reconstruct.merge.0": ["tokenreconstructor.0.0.mergers.0"],
        "reconstruct.merge.2": ["tokenreconstructor.0.0.mergers.2"],
        "out": ["proj_out"],
    }
    for path, ratio in enumerate(config.compression):
        for ours, theirs in ((0, 1), (2, 3)):
            layers[f"compress.paths.{path}.{ours}"] = [f"tokencompressor.0.0.body{ratio}x.{theirs}"]
            layers[f"reconstruct.paths.{path}.{ours}"] = [f"tokenreconstructor.0.0.body{ratio}x.{theirs}"]
    return weights_and_biases(layers) | block_parameters(config.groups)


def is_released(state: dict[str, Any]) -> bool:
    """Tell whether a state dict is in the released format."""
    return POSITION_TABLE in state and "adaln_single.linear.weight" in state


def infer_config(state: dict[str, Tensor], base_grid: int, attention: tuple[str, ...]) -> ModelConfig:
    """Infer the config of a released state dict, which does not show training grid and attention."""

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
    before, inside, after = (sum(group == wanted for group, _ in blocks) for wanted in range(3))
    return ModelConfig(
        latent_channels=channels,
        text_width=shape("context_embedder.weight", 2)[1],
        patch_size=patch_size,
        width=width,
        heads=width // shape(f"{first}.attn.norm_q.weight", 1)[0],
        mlp_ratio=shape(f"{first}.ff.net.0.proj.weight", 2)[0] / width,
        groups=(before, inside, after),
        attention=attention,
        base_grid=base_grid,
        position_table=math.isqrt(shape(POSITION_TABLE, 3)[1]),
    )


def from_released(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert a released state dict to ours, leaving out a REPA projector.

    Missing, unknown or misshapen tensors raise ConfigError naming them.
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
    """Convert a model to a released state dict, bit for bit (without a REPA projector)."""
    config = model.config
    ours = model.state_dict()
    theirs = {POSITION_TABLE: model.position.table.reshape(1, -1, config.width).clone()}
    for name, parts in released_names(config).items():
        for part, tensor in zip(parts, ours[name].chunk(len(parts))):
            theirs[part] = tensor.reshape(_released_shape(part, tensor, config)).clone()
    return theirs


@functools.lru_cache(maxsize=8)
def released_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List the tensors of the released format and their shapes, without allocating weights."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in to_released(EMMDiT(config)).items()}


def _released_shape(name: str, tensor: Tensor, config: ModelConfig) -> tuple[int, ...]:
    """Return the shape of a released tensor: linear layers on patches and folded tokens are convolutions there."""
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
