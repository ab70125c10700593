"""ImageReward v1.0 (Xu et al. 2023, arXiv:2304.05977) on transformers' BLIP.

A vision transformer embeds the image, a bidirectional text encoder reads the prompt and attends to the image, and a
linear head on the first token gives the score, standardised (about -2 to 2). Monitor it (weight 0): images break when
it is optimised.

The released file holds BLIP's own names; `rename_blip` turns them into transformers'.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nitro_e import files
from nitro_e.encoders.clip import MEAN, STD, fit_short_side, load_tokenizer
from nitro_e.rewards.clip_scores import linear_head

REPOSITORY, FILE, TEXT_CONFIG = "zai-org/ImageReward", "ImageReward.pt", "med_config.json"
TOKENIZER = "google-bert/bert-base-uncased"
LENGTH = 35  # tokens of a prompt
HEAD_WIDTH = 64  # of the vision transformer
CENTER, SPREAD = 0.16717362830052426, 1.0333394966054072  # of the raw scores


class ImageReward(nn.Module):
    """ImageReward. `path`: hub id or folder with ImageReward.pt and med_config.json; `tokenizer`: of BERT's."""

    def __init__(
        self,
        path: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        tokenizer: str = TOKENIZER,
    ) -> None:
        super().__init__()
        what = "reward 'imagereward'"
        self.vision, self.text, self.head = files.load(
            what,
            "path",
            path or REPOSITORY,
            lambda folder: _load(folder, dtype),
            (FILE, TEXT_CONFIG),
            revision,
        )
        self.tokenizer = files.load(what, "options.tokenizer", tokenizer, load_tokenizer, files.TOKENIZER)
        self.size: int = self.vision.config.image_size
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict]) -> Tensor:
        images = (fit_short_side(pixels, self.size) - self.mean) / self.std
        seen = self.vision(pixel_values=images.to(self.vision.dtype)).last_hidden_state  # (B, N, V)
        batch = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(seen.device)
        read = self.text(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state  # (B, L, T)
        return (self.head(read[:, 0].float())[:, 0] - CENTER) / SPREAD


def _load(folder: str, dtype: torch.dtype) -> tuple[Any, Any, nn.Module]:
    """Load vision encoder, text encoder and head."""
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    weights, config = Path(folder) / FILE, Path(folder) / TEXT_CONFIG
    if not (weights.is_file() and config.is_file()):
        raise FileNotFoundError(f"there must be {FILE} and {TEXT_CONFIG}")
    parts = rename_blip(torch.load(weights, map_location="cpu", weights_only=True))
    vision = BlipVisionModel(_vision_config(parts["vision"]))
    text = BlipTextModel(_text_config(config, vision.config.hidden_size), add_pooling_layer=False)
    head = linear_head(text.config.hidden_size)
    for module, part in ((vision, "vision"), (text, "text"), (head, "head")):
        module.load_state_dict(parts[part])
    return vision.to(dtype), text.to(dtype), head


def _vision_config(state: Mapping[str, Tensor]) -> Any:
    """A BlipVisionConfig with the sizes of the weights."""
    from transformers import BlipVisionConfig

    width, _, patch, _ = state["embeddings.patch_embedding.weight"].shape
    places = state["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=sum(key.endswith(".mlp.fc1.weight") for key in state),
        num_attention_heads=max(width // HEAD_WIDTH, 1),
        image_size=round(places**0.5) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
    )


def _text_config(file: Path, vision_width: int) -> Any:
    from transformers import BlipTextConfig

    given = json.loads(file.read_text("utf-8"))
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("max_position_embeddings", "hidden_act", "layer_norm_eps")
    return BlipTextConfig(
        **{name: given[name] for name in names}, encoder_hidden_size=vision_width, is_decoder=True
    )


def rename_blip(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Rename the released weights: {"vision", "text", "head"} with transformers' names."""
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    for key, value in state.items():
        if key.startswith("mlp.layers."):
            parts["head"][key.removeprefix("mlp.layers.")] = value
        elif key.startswith("blip.text_encoder.") and not key.endswith(".position_ids"):
            parts["text"][key.removeprefix("blip.text_encoder.")] = value
        elif key.startswith("blip.visual_encoder."):
            name = key.removeprefix("blip.visual_encoder.")
            for pattern, replacement in VISION_NAMES:
                name = re.sub(pattern, replacement, name)
            parts["vision"][name] = value
    return parts


VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
)
