"""Decode the members of a sample: images, captions, json, arrays. Whatever is wrong with one raises BadSample."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class BadSample(Exception):
    """This sample cannot be used; the message is the reason, without its name."""


def decode_image(content: bytes, size: int | tuple[int, int]) -> np.ndarray:
    """Decode to (3, H, W) uint8: upright, over white, resized to cover that size (bicubic), centre cropped.

    size: height and width, or the side of a square.
    """
    height, width = (size, size) if isinstance(size, int) else size
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "JPEG":
                image.draft("RGB", (2 * width, 2 * height))  # decode large ones at 1/2, 1/4, 1/8
            image = cover(to_rgb(ImageOps.exif_transpose(image)), height, width)
    except Exception as error:  # Pillow raises many kinds, SyntaxError and struct.error among them
        raise BadSample(image_problem(error)) from None
    return np.asarray(image).transpose(2, 0, 1)


def image_problem(error: Exception) -> str:
    """Say why Pillow could not read an image; the same words in every process."""
    if isinstance(error, UnidentifiedImageError):  # its message holds the address of the buffer
        return "image does not decode (it is of no format that Pillow reads here)"
    return f"image does not decode ({type(error).__name__}: {error})"


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; what is transparent becomes white, 16 bits become 8."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize an image so that it just covers height x width pixels, and crop the centre."""
    scale = max(width / image.width, height / image.height)
    columns, rows = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if (columns, rows) != image.size:
        image = image.resize((columns, rows), Image.Resampling.BICUBIC, reducing_gap=None)
    left, top = (columns - width) // 2, (rows - height) // 2
    return image.crop((left, top, left + width, top + height))


def decode_info(content: bytes) -> dict:
    try:
        info = json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"json does not parse ({error})") from None
    if not isinstance(info, dict):
        raise BadSample(f"json is a {type(info).__name__}, not an object")
    return info


def decode_caption(content: bytes | None, info: dict, caption_key: str) -> str:
    """Read the caption from the txt member, or from `info[caption_key]` without one."""
    try:
        caption = info.get(caption_key) if content is None else str(content, "utf-8")
        if content is None and isinstance(caption, str):
            caption.encode()  # JSON can hold halves of characters
    except UnicodeError:
        raise BadSample("caption is not UTF-8") from None
    if not isinstance(caption, str):
        raise BadSample(
            f"no txt, and json has no caption under '{caption_key}' (keys: {', '.join(info) or 'none'})"
        )
    caption = caption.strip()
    if not caption:
        raise BadSample("empty caption")
    return caption


def draw_caption(
    content: bytes | None, info: dict, weights: Sequence[tuple[str, float]], draw: float, first: bool = False
) -> tuple[str, str]:
    """Draw one of a sample's captions: its name, and the text.

    weights: by name, "txt" or a key of json; the captions that a sample lacks are left out of the draw, which is a
    number in [0, 1). Of a list one is drawn evenly, or the `first` taken. Raises BadSample if it has none of them.
    """
    try:
        given = {"txt": None if content is None else str(content, "utf-8")}
    except UnicodeError:
        raise BadSample("caption is not UTF-8") from None
    found = []
    for name, weight in weights:
        texts = given["txt"] if name == "txt" else info.get(name)
        texts = [
            text.strip() for text in (texts if isinstance(texts, list) else [texts]) if isinstance(text, str)
        ]
        if weight and any(texts):
            found.append((name, weight, [text for text in texts if text][: 1 if first else None]))
    if not found:
        raise BadSample(f"has none of the captions {', '.join(name for name, _ in weights)}")
    draw *= sum(weight for _, weight, _ in found)
    for choice in found:
        name, weight, texts = choice
        if draw < weight or choice is found[-1]:
            break
        draw -= weight
    text = texts[min(int(draw / weight * len(texts)), len(texts) - 1)]
    try:
        text.encode()  # JSON can hold halves of characters
    except UnicodeError:
        raise BadSample("caption is not UTF-8") from None
    return name, text


@lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    strange = dtype.kind not in "fiub" or not dtype.isnative or min(shape, default=0) < 0
    if strange or fortran and len(shape) > 1:
        raise ValueError(f"{dtype} {shape}{', Fortran order,' if fortran else ''} is not read")
    return shape, dtype


def npy_layout(content: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """Read (shape, dtype, bytes before the data) of a version 1 `.npy`; equal headers are parsed once."""
    if content[:8] != b"\x93NUMPY\x01\x00":
        raise BadSample("not a version 1 .npy file")
    start = 10 + int.from_bytes(content[8:10], "little")
    try:
        return *_npy_header(bytes(content[8:start])), start
    except Exception as error:  # numpy parses the header as Python, with all that can go wrong there
        raise BadSample(f"bad .npy header ({type(error).__name__}: {error})") from None


def decode_array(content: bytes) -> np.ndarray:
    """Decode a `.npy` member to an array (a view of `content`) and check that it is finite throughout."""
    shape, dtype, start = npy_layout(content)
    if len(content) - start != math.prod(shape) * dtype.itemsize:
        raise BadSample(f".npy holds {len(content) - start} bytes of data, its header says {shape} {dtype}")
    array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    if not_finite(array.reshape(1, -1)).any():
        raise BadSample("array has NaN or Inf")
    return array


def not_finite(rows: np.ndarray) -> np.ndarray:
    """Find the rows of (B, n) floats with a NaN or Inf: (B,) bool.

    Half precision is compared as integers, which needs no copy: +Inf is 0x7C00 and NaN lies above, and with
    the sign bit set 0xFC00 and above.
    """
    if rows.dtype != np.float16:
        return ~np.isfinite(rows).all(axis=1)
    positive = rows.view(np.int16).max(axis=1, initial=0)
    any_sign = rows.view(np.uint16).max(axis=1, initial=0)
    return (positive >= 0x7C00) | (any_sign >= 0xFC00)
