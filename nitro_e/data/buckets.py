"""Aspect buckets: images keep about their shape instead of being cropped to a square.

Every image belongs to the size of the list whose aspect is nearest to its own, by the width and height in its json
(`pack` writes them). It is resized to cover that size, and the centre is cropped. A batch holds images of one size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from nitro_e.data.catalog import Catalog
from nitro_e.data.conditions import as_number
from nitro_e.data.manifests import digest
from nitro_e.data.order import permutation
from nitro_e.data.where import remembered, scan
from nitro_e.sizes import Size, nearest_size

Chosen = TypeVar("Chosen")
NO_SIZE = 255  # in place of the number of a bucket


def size_of_step(sizes: Sequence[Chosen], step: int, *purpose: object) -> Chosen:
    """Choose the size of a step, for stages that read no images: each has one of as many steps as there are sizes.

    Their order is drawn anew each time, and follows from the purpose, such as the seed of the run.
    """
    turn, place = divmod(step, len(sizes))
    return sizes[int(permutation(len(sizes), *purpose, "sizes", turn)[place])]


def nearest(sizes: Sequence[Size], info: dict) -> int:
    """Find the size with the aspect nearest to that of the image; NO_SIZE if its json has no width and height."""
    width, height = as_number(info.get("width")), as_number(info.get("height"))
    if not width or not height or min(width, height) <= 0:
        return NO_SIZE
    return nearest_size(sizes, width / height)


def assign(catalog: Catalog, sizes: Sequence[Size], keep: bool = True) -> np.ndarray:
    """Find the bucket of every sample: (N,) uint8. With `keep` the result is kept in the user's cache."""

    def make() -> np.ndarray:
        return scan(catalog, [True] * len(catalog.sizes), lambda _, info: nearest(sizes, info), "buckets")

    if not keep:
        return make()
    rows = hashlib.sha256(catalog.left_out.tobytes()).hexdigest()
    return remembered(f"buckets-{digest(catalog.digest, rows, sizes)[:32]}", make)
