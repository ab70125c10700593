"""Tiny random instances of the reward models' library classes, in the files that the hub has of the real
ones."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from torch import nn

from nitro_e.rewards.geneval.tasks import CLASSES

WIDTH, EMBEDDING = 32, 16


def save_clip(folder: Path, seed: int = 0):
    """A CLIPModel (28 px, patch 14, two layers per tower) and a tokenizer of letters; returns it."""
    from transformers import CLIPConfig, CLIPModel

    save_clip_tokenizer(folder)
    torch.manual_seed(seed)
    tower = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    size = len(json.loads((folder / "vocab.json").read_text()))
    text = tower | {
        "vocab_size": size,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        "hidden_act": "gelu",
    }
    vision = tower | {"image_size": 28, "patch_size": 14, "hidden_act": "gelu"}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDING)
    model = CLIPModel(config).eval()
    shake(model)
    model.save_pretrained(folder)
    return model


def save_clip_tokenizer(folder: Path) -> None:
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase + string.digits + "-"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)


def shake(model: nn.Module) -> None:
    """Random values everywhere: nothing should hide behind zero biases and unit norms."""
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data += 0.2 * torch.randn_like(parameter)


class OpenCLIP(nn.Module):
    """open_clip's CLIP with ViT towers, written here after its weights' names: an independent reference."""

    class Block(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            self.mlp = nn.Sequential()
            self.mlp.add_module("c_fc", nn.Linear(width, 2 * width))
            self.mlp.add_module("gelu", nn.GELU())
            self.mlp.add_module("c_proj", nn.Linear(2 * width, width))

        def forward(self, x, mask=None):
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp(self.ln_2(x))

    class Tower(nn.Module):
        def __init__(self, width: int, heads: int, layers: int) -> None:
            super().__init__()
            self.resblocks = nn.ModuleList(OpenCLIP.Block(width, heads) for _ in range(layers))

        def forward(self, x, mask=None):
            for block in self.resblocks:
                x = block(x, mask)
            return x

    class Visual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.class_embedding = nn.Parameter(torch.randn(WIDTH))
            self.positional_embedding = nn.Parameter(torch.randn(5, WIDTH))
            self.proj = nn.Parameter(torch.randn(WIDTH, EMBEDDING))
            self.conv1 = nn.Conv2d(3, WIDTH, 14, 14, bias=False)
            self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.transformer = OpenCLIP.Tower(WIDTH, 2, 2)

        def forward(self, images):
            patches = self.conv1(images).flatten(2).transpose(1, 2)
            first = self.class_embedding.expand(len(images), 1, -1)
            x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
            return self.ln_post(self.transformer(x)[:, 0]) @ self.proj

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.visual = OpenCLIP.Visual()
        self.transformer = OpenCLIP.Tower(WIDTH, 2, 2)
        self.token_embedding = nn.Embedding(vocabulary, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(77, WIDTH))
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, EMBEDDING))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        shake(self)

    def encode_text(self, tokens):
        """tokens (B, 77), the end token has the largest number and is followed by zeros."""
        mask = torch.full((77, 77), float("-inf")).triu(1)
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask)
        return self.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection


def save_hps(folder: Path, base: Path, seed: int = 1) -> OpenCLIP:
    """HPS_v2.1_compressed.pt of an OpenCLIP; `base` gets the config and tokenizer."""
    save_clip(base)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = OpenCLIP(len(json.loads((base / "vocab.json").read_text()))).eval()
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return model


def save_aesthetic(folder: Path, name: str = "aesthetic-model.pth", seed: int = 2) -> nn.Sequential:
    """The predictor with its dropout, for embeddings of the tiny CLIP; returns it."""
    torch.manual_seed(seed)
    layers = nn.Sequential(
        *(nn.Linear(EMBEDDING, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)),
        *(nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
    ).eval()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({f"layers.{key}": value for key, value in layers.state_dict().items()}, folder / name)
    return layers


def save_mask2former(folder: Path, seed: int = 3):
    """A Mask2Former of width 32 with ten queries and COCO's classes; returns it."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(seed)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        image_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=10,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    model.save_pretrained(folder)
    return model


def save_image_reward(folder: Path, seed: int = 4):
    """ImageReward.pt and med_config.json; returns a timm ViT, a BERT with cross-attention, the head.

    BERT's token types, which BLIP does not have, are zero."""
    import timm
    from transformers import BertConfig, BertModel, BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 1}
    vision = timm.create_model("vit_base_patch16_224", num_classes=0, **sizes).eval()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder / "tokenizer")
    config = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 40,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    (folder / "med_config.json").write_text(json.dumps(config | {"encoder_width": 768}))
    # cross-attention has its own width: BERT's keys and values are replaced
    text = BertModel(
        BertConfig(**config, is_decoder=True, add_cross_attention=True, attn_implementation="eager"),
        add_pooling_layer=False,
    ).eval()
    for layer in text.encoder.layer:
        layer.crossattention.self.key, layer.crossattention.self.value = nn.Linear(64, 32), nn.Linear(64, 32)
    shake(vision)
    shake(text)
    text.embeddings.token_type_embeddings.weight.data.zero_()
    head = nn.Sequential(
        *(nn.Linear(32, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)),
        *(nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
    ).eval()
    state = {f"blip.visual_encoder.{key}": value for key, value in vision.state_dict().items()}
    for key, value in text.state_dict().items():
        if "token_type" not in key:
            state[f"blip.text_encoder.{key}"] = value
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state |= {f"mlp.layers.{key}": value for key, value in head.state_dict().items()}
    torch.save(state, folder / "ImageReward.pt")
    return vision, text, head


def save_vqa(folder: Path, seed: int = 5) -> Path:
    """A BlipForQuestionAnswering (32 px, one layer per part) with its processor, in the files of the hub."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForQuestionAnswering,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder.mkdir(parents=True, exist_ok=True)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "is",
        "there",
        "the",
        "red",
        "cat",
        "dog",
        "yes",
        "no",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
    text = {
        **sizes,
        **tokens,
        "vocab_size": len(words),
        "encoder_hidden_size": 16,
        "max_position_embeddings": 40,
    }
    config = BlipConfig(
        text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=8
    )
    torch.manual_seed(seed)
    model = BlipForQuestionAnswering(config).eval()
    shake(model)
    model.save_pretrained(folder)
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(processor, BertTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return folder
