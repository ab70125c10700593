"""Sizes of images: as they are written, HEIGHTxWIDTH in pixels, and compared by their shape."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from nitro_e.config import ConfigError

Size = tuple[int, int]  # pixels: height, width


def parse_sizes(texts: Sequence[str], name: str = "data.buckets") -> tuple[Size, ...]:
    """Read sizes written as HEIGHTxWIDTH; raises ConfigError for what is none, and for repeated ones."""
    sizes = []
    for text in texts:
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
        if match is None:
            raise ConfigError(f"{name}: '{text}' is no size; write HEIGHTxWIDTH in pixels, such as 448x576")
        sizes.append((int(match[1]), int(match[2])))
    if len(set(sizes)) < len(sizes) or len(sizes) > 200:
        raise ConfigError(f"{name}: give up to 200 sizes, each once")
    return tuple(sizes)


def nearest_size(sizes: Sequence[Size], aspect: float) -> int:
    """Find the number of the size whose shape is nearest to `aspect`, width / height, as a ratio."""
    return min(range(len(sizes)), key=lambda row: abs(math.log(sizes[row][1] / sizes[row][0] / aspect)))
