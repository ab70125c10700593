"""Images as a start: image to image (SDEdit, arXiv 2108.01073) and inpainting (RePaint without resampling, arXiv 2201.09865).

Image to image adds noise to an image's latents up to some time and samples from there. Inpainting samples too, and
after every step puts the known part back, with the noise of that time. A latent cell is drawn anew if the mask touches
one of its pixels; in the result, pixels outside the mask are the given image's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nitro_e.config import ConfigError
from nitro_e.interfaces import LatentCodec
from nitro_e.sampling import flow

ImageInput = Image.Image | Tensor


class Edit(NamedTuple):
    """The images to start from; one row, or one per image drawn."""

    pixels: Tensor  # (B, 3, H, W) in -1..1
    mask: Tensor | None  # (B, 1, H, W) bool, True: to be drawn anew; None: everything
    strength: float  # the part of the steps that is taken

    def take(self, chosen: slice) -> Edit:
        """Pick the rows of some of the images drawn."""

        def rows(part: Tensor) -> Tensor:
            return part if len(part) == 1 else part[chosen]

        mask = None if self.mask is None else rows(self.mask)
        return Edit(rows(self.pixels), mask, self.strength)


def edit_rows(
    image: ImageInput | Sequence[ImageInput],
    mask_image: ImageInput | Sequence[ImageInput] | None,
    strength: float | None,
    size: tuple[int, int],
    images: int,
    repeat: int,
) -> Edit:
    """Read the arguments of a call: one image for all, one per prompt, or one per image drawn.

    size: (height, width) of the result, to which images and masks of the same proportions are resized. Default of
    strength: 0.6, or 1 with a mask.
    """
    strength = (0.6 if mask_image is None else 1.0) if strength is None else strength
    if not 0 < strength <= 1:
        raise ConfigError(f"strength must be above 0 and at most 1, got {strength}")
    pixels = _rows([_pixels(one, size, "image") for one in _listed(image)], "image", images, repeat)
    if mask_image is None:
        return Edit(pixels, None, strength)
    masks = [_pixels(one, size, "mask_image").mean(0, keepdim=True) > 0 for one in _listed(mask_image)]
    return Edit(pixels, _rows(masks, "mask_image", images, repeat), strength)


def remaining(times: Tensor, strength: float) -> Tensor:
    """Return the last `strength` of the steps between `times`, rounded up; at least one."""
    steps = len(times) - 1
    return times[min(int(steps - steps * strength), steps - 1) :]


class Known(NamedTuple):
    """The latents of the given images, for one batch."""

    data: Tensor  # (B or 1, C, h, w)
    noise: Tensor  # (B, C, h, w)
    cells: Tensor | None  # (B or 1, 1, h, w) bool: to be drawn anew

    def at(self, t: Tensor) -> Tensor:
        """The given images at time t (scalar)."""
        return flow.interpolate(self.data.expand_as(self.noise), self.noise, t.expand(len(self.noise)))

    def put_back(self, x: Tensor, t: Tensor) -> Tensor:
        """Replace what is not to be drawn anew."""
        return x if self.cells is None else torch.where(self.cells, x, self.at(t))


def known(edit: Edit, noise: Tensor, codec: LatentCodec) -> Known:
    """Encode the given images; noise: (B, C, h, w) on the device to sample on."""
    data = codec.normalize(codec.encode_pixels(edit.pixels)).to(noise)
    cells = None
    if edit.mask is not None:
        cells = F.max_pool2d(edit.mask.float(), codec.stride).bool().to(noise.device)
    return Known(data, noise, cells)


def composed(edit: Edit, drawn: Tensor) -> Tensor:
    """Keep the given pixels outside the mask; drawn: (B, 3, H, W) on any device."""
    if edit.mask is None:
        return drawn
    return torch.where(edit.mask.to(drawn.device), drawn, edit.pixels.to(drawn))


def _listed(given: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    if isinstance(given, Tensor) and given.ndim == 4:
        return list(given)
    return [given] if isinstance(given, (Image.Image, Tensor)) else list(given)


def _rows(parts: list[Tensor], name: str, images: int, repeat: int) -> Tensor:
    if len(parts) == images // repeat:
        parts = [part for part in parts for _ in range(repeat)]
    if len(parts) not in (1, images):
        raise ConfigError(
            f"{name}: {images} images are drawn but {len(parts)} given; give one, or one per prompt"
        )
    return torch.stack(parts)


def _pixels(image: ImageInput, size: tuple[int, int], name: str) -> Tensor:
    """Turn a PIL image, or a tensor (3 or 1, H, W) in 0..1, into pixels (C, height, width) in -1..1."""
    height, width = size
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[1:] != (height, width):
            raise ConfigError(
                f"{name}: expected a tensor (C, {height}, {width}) in 0..1, got {tuple(image.shape)}"
            )
        return image.float().cpu() * 2 - 1
    if not isinstance(image, Image.Image):
        raise ConfigError(f"{name}: expected a PIL image or a tensor, got {type(image).__name__}")
    if abs(image.width * height / (image.height * width) - 1) > 0.02:
        raise ConfigError(
            f"{name} has {image.width}x{image.height} pixels, the result {width}x{height}: crop it, or give height and width"
        )
    kind, resample = (
        ("L", Image.Resampling.NEAREST) if name == "mask_image" else ("RGB", Image.Resampling.LANCZOS)
    )
    array = np.array(image.convert(kind).resize((width, height), resample), dtype=np.float32)
    return torch.from_numpy(array.reshape(height, width, -1)).permute(2, 0, 1) / 127.5 - 1
