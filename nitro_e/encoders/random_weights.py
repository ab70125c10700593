"""The encoders of the released weights at their real size with random weights: to measure speed without any files."""

from __future__ import annotations

import torch

from nitro_e.encoders.codec import AutoencoderDCCodec
from nitro_e.encoders.text import LlamaText
from nitro_e.files import SHIPPED


def random_dc_ae(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> AutoencoderDCCodec:
    """Build a codec of the shape of mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers."""
    from diffusers import AutoencoderDC

    stages = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = AutoencoderDC(
            encoder_block_types=stages,
            decoder_block_types=stages,
            upsample_block_type="interpolate",
            downsample_block_type="conv",
            scaling_factor=0.41407,
        )
    return AutoencoderDCCodec(autoencoder.to(dtype), device)


def random_llama(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LlamaText:
    """Build a text encoder of the shape of meta-llama/Llama-3.2-1B, with the tokenizer that the package ships."""
    from transformers import AutoModel, AutoTokenizer, LlamaConfig

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        tie_word_embeddings=True,
    )
    # 5 GB in float32, so it is made in the dtype that is asked for
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModel.from_config(config, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "text", local_files_only=True)
    return LlamaText(model, tokenizer, device)
