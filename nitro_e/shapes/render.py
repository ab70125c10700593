"""Render scenes: anti-aliased shapes by signed distance on a soft, noisy, light background. numpy only."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from nitro_e.shapes.scenes import EXTENT, PALETTE, Object, Scene

SHADE = 0.06  # how far a shade may lie from its palette color, per channel


def render(scene: Scene, resolution: int = 64) -> np.ndarray:
    """Draw a scene as uint8 (resolution, resolution, 3); a pure function of the scene."""
    rng = np.random.default_rng(scene.texture)
    image = _background(rng, resolution)
    for thing in scene.objects:
        shade = np.asarray(PALETTE[thing.color]) + rng.uniform(-SHADE, SHADE, 3)
        _paint(image, thing, shade.clip(0, 1).astype(np.float32))
    return (image * 255 + 0.5).astype(np.uint8)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Measure the distance to the outline of a shape of radius 1 around the origin (y down), negative inside.

    Every shape fits in a circle of radius `EXTENT`. Distances are exact next to edges, which is what
    anti-aliasing needs; corners are mitred.
    """
    if shape == "circle":
        return np.hypot(x, y) - 1
    x, y = np.abs(x), -y  # all others are symmetric; y up
    if shape == "square":
        return np.maximum(x, np.abs(y)) - EXTENT * math.sqrt(0.5)
    if shape == "cross":
        y = np.abs(y)
        return np.maximum(np.maximum(x, y) - 1.05, np.minimum(x, y) - 0.38)
    if shape == "triangle":
        return np.maximum(x * math.cos(math.pi / 6) + y * 0.5, -y) - EXTENT * 0.5
    if shape == "star":  # fold the plane to the sector between the upper tip and the next notch
        angle, distance = np.arctan2(x, y), np.hypot(x, y)
        angle = np.abs((angle + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
        tip, notch = EXTENT, EXTENT * 0.45
        notch_x, notch_y = notch * math.sin(math.pi / 5), notch * math.cos(math.pi / 5)
        slant = math.atan2(notch_x, tip - notch_y)  # of the edge's normal, from the x axis
        return distance * np.sin(angle + slant) - tip * math.sin(slant)
    raise ValueError(f"no shape '{shape}'")


def _paint(image: np.ndarray, thing: Object, shade: np.ndarray) -> None:
    """Blend one object into float32 (R, R, 3) `image`, in place."""
    size = image.shape[0]
    reach = EXTENT * thing.radius + 1 / size
    left, right = max(0, int((thing.x - reach) * size)), min(size, math.ceil((thing.x + reach) * size))
    top, bottom = max(0, int((thing.y - reach) * size)), min(size, math.ceil((thing.y + reach) * size))
    radius = thing.radius * size  # pixels
    x = (np.arange(left, right, dtype=np.float32) + (0.5 - thing.x * size)) / radius
    y = (np.arange(top, bottom, dtype=np.float32)[:, None] + (0.5 - thing.y * size)) / radius
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    distance = signed_distance(thing.shape, cos * x + sin * y, cos * y - sin * x) * radius
    alpha = (0.5 - distance).clip(0, 1).astype(np.float32)[..., None]
    patch = image[top:bottom, left:right]
    patch += alpha * (shade - patch)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a light, nearly grey background with soft spots: float32 (size, size, 3) in .7..1."""
    tint = rng.uniform(0.82, 0.97) + rng.uniform(-0.02, 0.02, 3).astype(np.float32)
    spots = 0
    for cells, strength in ((5, 0.03), (11, 0.03)):
        weights = _upsampling(size, cells)
        noise = rng.uniform(-strength, strength, (cells, cells)).astype(np.float32)
        spots = spots + weights @ noise @ weights.T
    return (spots[..., None] + tint).clip(0.7, 1).astype(np.float32)


@cache
def _upsampling(size: int, cells: int) -> np.ndarray:
    """Compute (size, cells) weights that interpolate smoothly between `cells` values."""
    place = (np.arange(size) + 0.5) / size * (cells - 1)
    index = np.minimum(place.astype(int), cells - 2)
    step = place - index
    step = step * step * (3 - 2 * step)
    weights = np.zeros((size, cells), np.float32)
    weights[np.arange(size), index] = 1 - step
    weights[np.arange(size), index + 1] = step
    return weights
