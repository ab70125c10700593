"""The encoders of the released weights at their real size with random weights: to measure speed and count FLOPs
without any files.

Recipes name them by `path: random` or, of the same outputs with little inside, `path: random-small`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nitro_e.encoders.codec import AutoencoderDCCodec
from nitro_e.encoders.text import LlamaText
from nitro_e.files import SHIPPED


def random_dc_ae(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> AutoencoderDCCodec:
    """Build a codec of the shape of mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers."""
    return AutoencoderDCCodec(dc_ae(dtype), device)


def random_llama(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LlamaText:
    """Build a text encoder of the shape of meta-llama/Llama-3.2-1B, with the tokenizer that the package ships."""
    return LlamaText(*llama(dtype), device)


def dc_ae(dtype: torch.dtype, small: bool = False) -> Any:
    """Make diffusers' autoencoder; small: narrow, one block per resolution."""
    from diffusers import AutoencoderDC

    stages = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    less: dict[str, Any] = {}
    if small:
        widths, layers = (32,) * 6, (1,) * 6
        less = {
            "encoder_block_out_channels": widths,
            "decoder_block_out_channels": widths,
            "encoder_layers_per_block": layers,
            "decoder_layers_per_block": layers,
        }
    with _same_numbers():
        autoencoder = AutoencoderDC(
            encoder_block_types=stages,
            decoder_block_types=stages,
            upsample_block_type="interpolate",
            downsample_block_type="conv",
            scaling_factor=0.41407,
            **less,
        )
    return autoencoder.to(dtype)


def llama(dtype: torch.dtype, small: bool = False) -> tuple[Any, Any]:
    """Make transformers' model without its head, and a tokenizer; small: one layer and few words."""
    from transformers import AutoModel, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "text", local_files_only=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer) if small else 128_256,
        hidden_size=2048,
        intermediate_size=2048 if small else 8192,
        num_hidden_layers=1 if small else 16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        tie_word_embeddings=True,
    )
    # 5 GB in float32, so it is made in the dtype that is asked for
    with _same_numbers():
        return AutoModel.from_config(config, dtype=dtype), tokenizer


def dinov2(dtype: torch.dtype, small: bool = False) -> Any:
    """Make a vision transformer of the shape of timm/vit_base_patch14_dinov2.lvd142m; small: one block."""
    from nitro_e.encoders.vision import new_dinov2

    with _same_numbers():
        return new_dinov2(1 if small else 12).to(dtype)


MAKERS = {"dc-ae-f32c32": dc_ae, "llama-3.2-1b": llama, "dinov2-b14": dinov2}


def encode_flops(name: str, resolution: int, length: int, grid: tuple[int, int]) -> float | None:
    """Count the FLOPs (2 per multiply-add) of encoding one sample; None for an encoder that is not among `MAKERS`.

    resolution: pixels a side, of the codec; length: tokens of a caption; grid: (H, W) tokens of vision features. The
    modules are built without memory and run without computing, on the meta device.
    """
    if name not in MAKERS:
        return None
    if name == "llama-3.2-1b":
        with torch.device(
            "meta"
        ):  # built, not run: transformers' rotary embedding fails there on torch < 2.7
            model = llama(torch.bfloat16)[0]
        products = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))
        attention = 2 * length**2 * model.config.hidden_size * model.config.num_hidden_layers
        return 2.0 * (length * products + attention)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        if name == "dc-ae-f32c32":
            dc_ae(torch.bfloat16).encode(torch.empty(1, 3, resolution, resolution, dtype=torch.bfloat16))
        else:
            model = dinov2(torch.bfloat16)
            height, width = (side * model.patch_embed.patch_size[0] for side in grid)
            model(torch.empty(1, 3, height, width, dtype=torch.bfloat16))
    return float(counter.get_total_flops())


@contextlib.contextmanager
def _same_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
