"""GenEval's own detector: OpenMMLab's Mask2Former weights in transformers' model of the same architecture.

    mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth    mmdetection 2's names
    mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth    the same weights, 3's names

Not only names differ: q, k and v are stacked, and patch merging unfolds channels first, pixels by rows,
where transformers concatenates pixels by columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nitro_e.rewards.geneval.tasks import CLASSES

PATTERN = "mask2former_swin*.pth"
LEVELS, POINTS = 3, 4  # of deformable attention

ENCODER, DECODER = "model.pixel_level_module.encoder.", "model.transformer_module.decoder."
PIXELS = "model.pixel_level_module.decoder."
NAMES = (  # mmdetection -> transformers, in this order; the first three: 2's names to 3's
    (r"(pixel_decoder\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.0\.", r"\1.cross_attn."),
    (r"(transformer_decoder\.layers\.\d+)\.attentions\.1\.", r"\1.self_attn."),
    (r"\.ffns?(\.0)?\.layers\.0\.0\.", ".fc1."),
    (r"\.ffns?(\.0)?\.layers\.1\.", ".fc2."),
    (r"^backbone\.patch_embed\.projection\.", ENCODER + "embeddings.patch_embeddings.projection."),
    (r"^backbone\.patch_embed\.norm\.", ENCODER + "embeddings.norm."),
    (r"^backbone\.norm0\.", ENCODER + "hidden_states_norms.stage1."),
    (r"^backbone\.norm1\.", ENCODER + "hidden_states_norms.stage2."),
    (r"^backbone\.norm2\.", ENCODER + "hidden_states_norms.stage3."),
    (r"^backbone\.norm3\.", ENCODER + "hidden_states_norms.stage4."),
    (r"^backbone\.stages\.", ENCODER + "encoder.layers."),
    (r"(\.blocks\.\d+)\.fc1\.", r"\1.intermediate.dense."),
    (r"(\.blocks\.\d+)\.fc2\.", r"\1.output.dense."),
    (r"(\.blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(\.blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"\.attn\.w_msa\.proj\.", ".attention.output.dense."),
    (r"\.attn\.w_msa\.relative_position_bias_table", ".attention.self.relative_position_bias_table"),
    (r"^panoptic_head\.pixel_decoder\.input_convs\.(\d)\.conv\.", PIXELS + r"input_projections.\1.0."),
    (r"^panoptic_head\.pixel_decoder\.input_convs\.(\d)\.gn\.", PIXELS + r"input_projections.\1.1."),
    (r"^panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv\.", PIXELS + "adapter_1.0."),
    (r"^panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn\.", PIXELS + "adapter_1.1."),
    (r"^panoptic_head\.pixel_decoder\.output_convs\.0\.conv\.", PIXELS + "layer_1.0."),
    (r"^panoptic_head\.pixel_decoder\.output_convs\.0\.gn\.", PIXELS + "layer_1.1."),
    (r"^panoptic_head\.pixel_decoder\.mask_feature\.", PIXELS + "mask_projection."),
    (r"^panoptic_head\.pixel_decoder\.level_encoding\.weight$", PIXELS + "level_embed"),
    (r"^panoptic_head\.pixel_decoder\.encoder\.", PIXELS + "encoder."),
    (r"(model\.pixel_level_module\.decoder\.encoder\.layers\.\d+)\.norms\.0\.", r"\1.self_attn_layer_norm."),
    (r"(model\.pixel_level_module\.decoder\.encoder\.layers\.\d+)\.norms\.1\.", r"\1.final_layer_norm."),
    (r"^panoptic_head\.transformer_decoder\.post_norm\.", DECODER + "layernorm."),
    (r"^panoptic_head\.transformer_decoder\.", DECODER),
    (r"\.cross_attn\.attn\.", ".cross_attn."),
    (r"\.self_attn\.attn\.", ".self_attn."),
    (r"\.norms\.0\.", ".cross_attn_layer_norm."),
    (r"\.norms\.1\.", ".self_attn_layer_norm."),
    (r"\.norms\.2\.", ".final_layer_norm."),
    (r"^panoptic_head\.query_embed\.", "model.transformer_module.queries_embedder."),
    (r"^panoptic_head\.query_feat\.", "model.transformer_module.queries_features."),
    (r"^panoptic_head\.level_embed\.", "model.transformer_module.level_embed."),
    (r"^panoptic_head\.cls_embed\.", "class_predictor."),
    (r"^panoptic_head\.mask_embed\.0\.", DECODER + "mask_predictor.mask_embedder.0.0."),
    (r"^panoptic_head\.mask_embed\.2\.", DECODER + "mask_predictor.mask_embedder.1.0."),
    (r"^panoptic_head\.mask_embed\.4\.", DECODER + "mask_predictor.mask_embedder.2.0."),
)


def find(folder: str) -> Path | None:
    """The checkpoint in a folder; None if there is none."""
    files = sorted(Path(folder).glob(PATTERN)) if Path(folder).is_dir() else []
    return files[0] if files else None


def load(file: Path) -> tuple[Any, dict]:
    """transformers' model and its report on loading; the sizes are the checkpoint's."""
    from transformers import Mask2FormerForUniversalSegmentation

    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    state = rename(checkpoint.get("state_dict", checkpoint))
    return Mask2FormerForUniversalSegmentation.from_pretrained(
        None, config=config_of(state), state_dict=state, output_loading_info=True
    )


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmdetection's names and layouts -> those of transformers' checkpoints."""
    renamed = {}
    for key, value in state.items():
        if key.endswith("relative_position_index") or key.startswith("panoptic_head.loss"):
            continue
        if ".downsample." in key:
            value = _reorder_merged(value)
        name = key
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.w_msa.qkv." in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                renamed[name.replace(".attn.w_msa.qkv.", f".attention.self.{part}.")] = rows
        elif name.startswith(DECODER) and ".self_attn.in_proj_" in name:
            for part, rows in zip("qkv", value.chunk(3)):
                renamed[name.replace("in_proj_", f"{part}_proj.")] = rows
        else:
            renamed[name] = value
    return renamed


def _reorder_merged(value: Tensor) -> Tensor:
    """The last axis from (C, row, column) to (column, row, C)."""
    if value.ndim == 1:
        return value.unflatten(0, (-1, 2, 2)).permute(2, 1, 0).reshape(value.shape)
    return value.unflatten(1, (-1, 2, 2)).permute(0, 3, 2, 1).reshape(value.shape)


def config_of(state: Mapping[str, Tensor]) -> Any:
    """A Mask2FormerConfig with the sizes of the renamed weights and COCO's classes."""
    from transformers import Mask2FormerConfig, SwinConfig

    def count(pattern: str) -> int:
        return len({match.group(1) for key in state if (match := re.match(pattern, key))})

    blocks = re.escape(ENCODER + "encoder.layers.")
    tables = [
        state[f"{ENCODER}encoder.layers.{i}.blocks.0.attention.self.relative_position_bias_table"]
        for i in range(4)
    ]
    swin = SwinConfig(
        embed_dim=len(state[ENCODER + "embeddings.norm.weight"]),
        depths=[count(rf"{blocks}{i}\.blocks\.(\d+)\.") for i in range(4)],
        num_heads=[table.shape[1] for table in tables],
        window_size=(round(tables[0].shape[0] ** 0.5) + 1) // 2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    width = state["model.transformer_module.queries_features.weight"].shape[1]
    offsets = state[PIXELS + "encoder.layers.0.self_attn.sampling_offsets.bias"]
    return Mask2FormerConfig(
        backbone_config=swin,
        feature_size=width,
        mask_feature_size=state[PIXELS + "mask_projection.weight"].shape[0],
        hidden_dim=width,
        encoder_feedforward_dim=state[PIXELS + "encoder.layers.0.fc1.weight"].shape[0],
        encoder_layers=count(re.escape(PIXELS + "encoder.layers.") + r"(\d+)\."),
        decoder_layers=count(re.escape(DECODER + "layers.") + r"(\d+)\.") + 1,
        num_attention_heads=len(offsets) // (LEVELS * POINTS * 2),
        dim_feedforward=state[DECODER + "layers.0.fc1.weight"].shape[0],
        num_queries=len(state["model.transformer_module.queries_features.weight"]),
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
