"""Vision encoder for REPA targets: DINOv2 (arXiv 2304.07193), run by timm; the only file that knows timm.

Name `dinov2-b14`. Any timm vision transformer works: a hub id, or a folder as written by
`timm.models.save_for_hf`.
Left out: gradients; the encoder is frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DINOV2_REPOSITORY = "timm/vit_base_patch14_dinov2.lvd142m"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DINOv2:
    """A frozen vision transformer; its features are the patch tokens after the final norm, always float32."""

    def __init__(self, vit: Any, device: torch.device | str = "cpu") -> None:
        self.vit = vit.eval().requires_grad_(False).to(device)
        self.width: int = vit.num_features
        self.device = torch.device(device)

    def compile(self) -> None:
        self.vit.forward_features = torch.compile(self.vit.forward_features)

    @torch.no_grad()
    def features(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """pixels (B, 3, H, W) in -1..1, resized to fit the grid (h, w) -> (B, h*w, width), row by row."""
        return patch_tokens(self.vit, pixels.to(self.device), grid).float()


def patch_tokens(vit: Any, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compute `DINOv2.features` with gradients and in the dtype of the transformer: (B, h*w, D)."""
    size = tuple(cells * side for cells, side in zip(grid, vit.patch_embed.patch_size))
    images = (pixels.float() + 1) / 2
    images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    mean, std = (images.new_tensor(values).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = ((images - mean) / std).to(next(vit.parameters()).dtype)
    tokens = vit.forward_features(images)  # (B, prefix + h*w, D)
    return tokens[:, vit.num_prefix_tokens :]


def new_dinov2(depth: int) -> Any:
    """Make a vision transformer of DINOv2-B's shape with `depth` blocks and random weights, for any image size."""
    import timm

    name = DINOV2_REPOSITORY.removeprefix("timm/").partition(".")[0]
    return timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, depth=depth)


def load_dinov2(folder: str, dtype: torch.dtype) -> Any:
    """Load a timm vision transformer without head, for any image size, on the CPU, from a folder."""
    import timm

    if not (Path(folder) / "model.safetensors").is_file():  # timm would also read pickles
        raise FileNotFoundError("there is no model.safetensors")
    name = f"local-dir:{folder}"
    return timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True).to(dtype)
