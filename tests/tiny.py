"""Tiny random instances of the real encoders' library classes, saved the way the hub stores them."""

from __future__ import annotations

from pathlib import Path

import torch

SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # torch 2.6 shards on GPUs only
# torch < 2.9 has no Muon, which some recipes name: there the tests read them with AdamW
OPTIMIZER = [] if hasattr(torch.optim, "Muon") else ["stage.optim.kind=adamw"]


def optimizers_of(recipe: Path, *overrides: str) -> list[str]:
    """The same for every optimiser of a recipe and its overrides: a fake score has one of its own."""
    fake = "fake" in " ".join([recipe.read_text(), *overrides])
    return [*OPTIMIZER, *(["stage.score.fake.optim.kind=adamw"] if OPTIMIZER and fake else [])]


WORDS = ["a", "red", "green", "circle", "square", "left", "of", "the", "big", "cat"]


def save_autoencoder_dc(folder: Path, seed: int = 0):
    """An AutoencoderDC with 8 latent channels, stride 4 and scaling factor 0.5; returns it."""
    from diffusers import AutoencoderDC

    torch.manual_seed(seed)
    stages = {"block_out_channels": (8, 16, 16), "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock")}
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in stages.items()}
    autoencoder = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.5,
        **sides,
    ).eval()
    autoencoder.decoder.conv_out.weight.data *= 20  # so that pixels leave -1..1 and clipping shows
    autoencoder.save_pretrained(folder, safe_serialization=True)
    return autoencoder


def save_llama(folder: Path, seed: int = 0):
    """A causal Llama of width 32 and its word tokenizer (a begin token, no padding token); returns it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<bos>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder, safe_serialization=True)
    return model


def save_dinov2(folder: Path, seed: int = 0):
    """A vision transformer of width 24 with patch 14 and a class and two register tokens; returns it."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(seed)
    sizes = {"img_size": 56, "embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 2, "init_values": 0.1}
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True, **sizes).eval()
    for parameter in vit.parameters():  # biases and registers start at zero; nothing should hide behind that
        torch.nn.init.normal_(parameter, std=0.2)
    save_for_hf(vit, str(folder), model_args=sizes, safe_serialization=True)
    return vit
