"""CLIP (Radford et al. 2021, arXiv:2103.00020), run by transformers: images and texts -> unit vectors.

Two ways of fitting an image to the encoder: `fit_short_side` (OpenAI's: short side, bicubic, center crop,
8 bits) and `fit_long_side` (HPSv2's: long side, zero padding, no rounding). Weights in transformers' format
or open_clip's (`from_open_clip`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class CLIP(nn.Module):
    """A frozen CLIPModel with its tokenizer; features are float32, whatever the dtype of the weights."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.size: int = model.config.vision_config.image_size
        self.length: int = model.config.text_config.max_position_embeddings
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1), persistent=False)

    @property
    def scale(self) -> float:
        """The trained factor of the cosines."""
        return self.model.logit_scale.float().exp().item()

    def image_features(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, size, size) in 0..1 as unit vectors (B, E)."""
        pixels = ((images.float() - self.mean) / self.std).to(self.model.dtype)
        return F.normalize(_pooled(self.model.get_image_features(pixel_values=pixels)), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Encode texts, cut at `length` tokens, as unit vectors (B, E)."""
        batch = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        features = self.model.get_text_features(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )
        return F.normalize(_pooled(features), dim=-1)


def fit_short_side(pixels: Tensor, size: int) -> Tensor:
    """Resize and crop pixels (B, 3, H, W) in -1..1 to (B, 3, size, size) in 0..1, 8 bits as by PIL."""
    height, width = pixels.shape[-2:]
    short = min(height, width)
    new = [size if side == short else int(size * side / short) for side in (height, width)]
    images = pixels.float() / 2 + 0.5
    for step in ((height, new[1]), new):  # PIL goes along rows, rounds, then along columns
        resized = _resize(images, step, antialias=True).clamp(0, 1)
        images = (resized * 255).round() / 255
        if resized.requires_grad:  # rounding has no gradient: that of the unrounded images
            images = resized + (images - resized).detach()
    top, left = (round((side - size) / 2) for side in new)
    return images[..., top : top + size, left : left + size]


def fit_long_side(pixels: Tensor, size: int, antialias: bool = True) -> Tensor:
    """Resize pixels (B, 3, H, W) in -1..1 to (B, 3, size, size) about 0..1, the short side padded with zeros."""
    height, width = pixels.shape[-2:]
    new = [round(side * size / max(height, width)) for side in (height, width)]
    images = _resize(pixels.float() / 2 + 0.5, new, antialias)
    rows, columns = size - new[0], size - new[1]
    return F.pad(images, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def _resize(images: Tensor, size: Sequence[int], antialias: bool) -> Tensor:
    if tuple(size) == tuple(images.shape[-2:]):
        return images
    return F.interpolate(images, tuple(size), mode="bicubic", align_corners=False, antialias=antialias)


def load_clip(folder: str, dtype: torch.dtype, tokenizer: Any = None) -> CLIP:
    """Load from a folder of transformers' format; the tokenizer may come from elsewhere."""
    from transformers import CLIPModel

    model, report = CLIPModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ValueError(f"it is no CLIP: {len(report['missing_keys'])} weights are missing")
    return CLIP(model.to(dtype), tokenizer or load_tokenizer(folder))


def load_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def from_open_clip(state: Mapping[str, Tensor], base: str, dtype: torch.dtype) -> CLIP:
    """Take weights of open_clip (ViT towers); `base`: folder of the config and tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig.from_pretrained(base, local_files_only=True))
    model.load_state_dict(rename_open_clip(state))
    return CLIP(model.to(dtype), load_tokenizer(base))


def rename_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert open_clip's names and layouts to CLIPModel's: projections are transposed, q, k, v are split."""
    renamed = {}
    for key, value in state.items():
        if key == "attn_mask":
            continue
        if key in ("text_projection", "visual.proj"):
            value = value.T.contiguous()
        tower = "vision_model." if key.startswith("visual.") else "text_model."
        name = key.removeprefix("visual.")
        for pattern, replacement in OPEN_CLIP:
            name = re.sub(pattern, replacement, name)
        if "in_proj_" in name:
            for part, rows in zip("qkv", value.chunk(3)):
                renamed[tower + name.replace("in_proj_", f"{part}_proj.")] = rows
        else:
            top = name in ("logit_scale", "visual_projection.weight", "text_projection.weight")
            renamed[name if top else tower + name] = value
    return renamed


# names of the vision tower (the first three), of the text tower (the next three), and of both
OPEN_CLIP = (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^ln_post\.", "post_layernorm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def _pooled(output: Any) -> Tensor:
    """Unwrap the features, which transformers 5 puts into an object."""
    return (output if isinstance(output, Tensor) else output.pooler_output).float()
