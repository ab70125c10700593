"""Vision encoders for REPA targets, run by timm; the only file that knows timm.

    dinov2-b14    DINOv2 (arXiv 2304.07193), the released choice
    dinov3-b16    DINOv3 (arXiv 2508.10104); a gated repository
    siglip2-b16   SigLIP 2 (arXiv 2502.14786)
    clip-b16      CLIP (arXiv 2103.00020)

Each has the normalisation that it was trained with. `path` may name any other timm vision transformer of the same kind:
a hub id, or a folder as written by `timm.models.save_for_hf`.
Left out: gradients; the encoder is frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

DINOV2_REPOSITORY = "timm/vit_base_patch14_dinov2.lvd142m"
DINOV3_REPOSITORY = "timm/vit_base_patch16_dinov3.lvd1689m"
SIGLIP2_REPOSITORY = "timm/vit_base_patch16_siglip_224.v2_webli"
CLIP_REPOSITORY = "timm/vit_base_patch16_clip_224.openai"
Color = tuple[float, float, float]
# of pixels in 0..1, per channel
IMAGENET_MEAN: Color = (0.485, 0.456, 0.406)
IMAGENET_STD: Color = (0.229, 0.224, 0.225)


class DINOv2:
    """A frozen vision transformer; its features are the patch tokens after the final norm, always float32."""

    MEAN: ClassVar[Color] = IMAGENET_MEAN
    STD: ClassVar[Color] = IMAGENET_STD

    def __init__(self, vit: Any, device: torch.device | str = "cpu") -> None:
        self.vit = vit.eval().requires_grad_(False).to(device)
        self.width: int = vit.num_features
        self.device = torch.device(device)

    def compile(self) -> None:
        self.vit.forward_features = torch.compile(self.vit.forward_features)

    @torch.no_grad()
    def features(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """pixels (B, 3, H, W) in -1..1, resized to fit the grid (h, w) -> (B, h*w, width), row by row."""
        return patch_tokens(self.vit, pixels.to(self.device), grid, self.MEAN, self.STD).float()


class DINOv3(DINOv2):
    """DINOv3, with ImageNet's normalisation as DINOv2."""


class SigLIP2(DINOv2):
    """The vision tower of SigLIP 2."""

    MEAN = STD = (0.5, 0.5, 0.5)


class CLIPVision(DINOv2):
    """The vision tower of OpenAI's CLIP."""

    MEAN = (0.48145466, 0.4578275, 0.40821073)
    STD = (0.26862954, 0.26130258, 0.27577711)


def patch_tokens(
    vit: Any, pixels: Tensor, grid: tuple[int, int], mean: Color = IMAGENET_MEAN, std: Color = IMAGENET_STD
) -> Tensor:
    """Compute `DINOv2.features` with gradients and in the dtype of the transformer: (B, h*w, D)."""
    size = tuple(cells * side for cells, side in zip(grid, vit.patch_embed.patch_size))
    images = (pixels.float() + 1) / 2
    images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    center, spread = (
        torch.tensor(values).to(images, non_blocking=True).reshape(1, 3, 1, 1) for values in (mean, std)
    )
    images = ((images - center) / spread).to(next(vit.parameters()).dtype)
    tokens = vit.forward_features(images)  # (B, prefix + h*w, D)
    return tokens[:, vit.num_prefix_tokens :]


def new_dinov2(depth: int) -> Any:
    """Make a vision transformer of DINOv2-B's shape with `depth` blocks and random weights, for any image size."""
    import timm

    name = DINOV2_REPOSITORY.removeprefix("timm/").partition(".")[0]
    return timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True, depth=depth)


def load_vit(folder: str, dtype: torch.dtype) -> Any:
    """Load a timm vision transformer without head, for any image size, on the CPU, from a folder."""
    return load_timm(folder, dtype, num_classes=0, dynamic_img_size=True)


def load_timm(folder: str, dtype: torch.dtype, **arguments: Any) -> Any:
    """Load any timm model from a folder that `timm.models.save_for_hf` wrote, on the CPU."""
    import timm

    if not (Path(folder) / "model.safetensors").is_file():  # timm would also read pickles
        raise FileNotFoundError("there is no model.safetensors")
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **arguments).to(dtype)
