"""The exact judge of the offline domain: pixels to objects, objects to verdicts. On the CPU, nothing learned.

Foreground is where the darkest channel is below .5: backgrounds are lighter, all palette colors darker. Its
4-connected components are the objects. Shape: soft overlap of the silhouette, brought to unit area, with
templates of all shapes at some angles. Color: nearest palette entry over the interior, by majority. What fits
no template, or has no majority color, is an object without a name or color: harmless to GenEval's rules, one
object too many to the strict verdict. Shapes that touch are one component and fit nothing. Not seen: what is
paler than any palette color.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nitro_e.config import ConfigError, did_you_mean
from nitro_e.rewards.geneval.rules import Detection, graded, is_correct, is_strict
from nitro_e.shapes.render import signed_distance
from nitro_e.shapes.scenes import COLORS, MAX_ANGLE, PALETTE, SHAPES

FOREGROUND = 0.5  # the darkest channel of foreground is below this (0..1)
SPECK_AREA = 12 / 64**2  # of the image; smaller components are noise
OBJECT_AREA = 40 / 64**2  # smaller components are something, but too small to have a name
# least soft IoU with the nearest template; sharp images reach .05 to .08 more, blurred ones .02
MIN_OVERLAP = {"circle": 0.87, "square": 0.82, "triangle": 0.80, "cross": 0.80, "star": 0.76}
MIN_AGREEMENT = 0.7  # share of the interior that is nearest to the object's color
CELLS = 24  # silhouettes are compared on a grid of CELLS x CELLS ...
REACH = 1.0  # ... that reaches this many sqrt(area) from the centroid
CHUNK = 256  # images at a time
SCORES = ("mixed", "strict", "geneval", "partial", "color")


class Verdict(NamedTuple):
    strict: bool  # GenEval's rules, and nothing else in the image
    geneval: bool  # GenEval's rules: other objects are allowed
    partial: float  # 0..1, exactly 1 if and only if strict
    objects: tuple[Detection, ...]  # boxes in pixels


class ShapesReward:
    """Scores images with the judge.

    score: "mixed" is the mean of strict and partial. "color" asks for objects of the named colors and no others,
    whatever their shapes, which is what a training from nothing learns first; NaN where no color is named.
    """

    name = "shapes"
    needs_info = True  # scores only prompts with GenEval metadata

    def __init__(self, score: str = "mixed"):
        if score not in SCORES:
            raise ConfigError(f"shapes reward: unknown score '{score}'" + did_you_mean(score, SCORES))
        self.score = score

    def __call__(self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict]) -> Tensor:
        """Score pixels (B, 3, H, W) in -1..1: (B,) float32 in 0..1. `info` is each prompt's GenEval metadata."""
        verdicts = judge(pixels, info)
        if self.score == "mixed":
            scores = [(verdict.strict + verdict.partial) / 2 for verdict in verdicts]
        elif self.score == "color":
            scores = [_colored(verdict.objects, record) for verdict, record in zip(verdicts, info)]
        else:
            scores = [float(getattr(verdict, self.score)) for verdict in verdicts]
        return torch.tensor(scores, dtype=torch.float32, device=pixels.device)


def _colored(found: Sequence[Detection], record: dict) -> float:
    """Return the share of the requested colors that some object has, divided by 1 + the objects of other colors."""
    wanted = [thing["color"] for thing in record["include"] if "color" in thing]
    if not wanted:
        return float("nan")
    there = [thing.color for thing in found]
    others = sum(color not in wanted for color in there)
    return sum(color in there for color in wanted) / len(wanted) / (1 + others)


def judge(pixels: Tensor, metadata: Sequence[dict]) -> list[Verdict]:
    """Judge each image of pixels (B, 3, H, W) in -1..1 by its record from `scenes.metadata`."""
    if len(metadata) != len(pixels):
        raise ConfigError(f"judge: {len(pixels)} images but {len(metadata)} metadata records")
    for record in metadata:
        if "include" not in record:
            raise ConfigError(f"judge: {record} has no 'include'; every prompt needs its GenEval metadata")
    return [
        Verdict(is_strict(found, record), is_correct(found, record), graded(found, record), tuple(found))
        for found, record in zip(find_objects(pixels), metadata)
    ]


def find_objects(pixels: Tensor) -> list[list[Detection]]:
    """Find the objects of each image: pixels (B, 3, H, W) in -1..1, H and W from about 48 up."""
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ConfigError(f"judge: expected pixels (B, 3, H, W), got {tuple(pixels.shape)}")
    found = []
    for chunk in pixels.detach().split(CHUNK):
        images = chunk.float().cpu().permute(0, 2, 3, 1).contiguous().numpy()  # (B, H, W, 3)
        found += _find_in_chunk(np.nan_to_num(images * 0.5 + 0.5, nan=1.0))
    return found


def _find_in_chunk(images: np.ndarray) -> list[list[Detection]]:
    """Find the objects of images (B, H, W, 3) in 0..1."""
    found: list[list[Detection]] = [[] for _ in images]
    mask = images.min(axis=-1) < FOREGROUND  # (B, H, W)
    if not mask.any():
        return found
    labels = _components(mask)  # (B, H, W) 0 = background
    image, y, x = np.nonzero(labels)
    names, component, area = np.unique(labels[image, y, x], return_inverse=True, return_counts=True)
    keep = area >= SPECK_AREA * mask[0].size
    if not keep.any():
        return found
    renumber = np.cumsum(keep) - 1
    kept = keep[component]
    image, y, x, component = image[kept], y[kept], x[kept], renumber[component[kept]]
    names, area = names[keep], area[keep]

    num = len(names)
    boxes = _boxes(component, x, y, num)  # (N, 4)
    owner = np.zeros(num, int)
    owner[component] = image
    center = np.stack([np.bincount(component, at) / area for at in (x, y)], axis=1)  # (N, 2)
    overlap = _overlaps(labels, names, owner, center, area)  # (N, shapes)
    interior = _erode(labels)[image, y, x]
    share = _color_shares(images[image, y, x], component, interior, num)  # (N, colors)
    for i in range(num):
        shape, color = overlap[i].argmax(), share[i].argmax()
        named = overlap[i, shape] >= MIN_OVERLAP[SHAPES[shape]] and area[i] >= OBJECT_AREA * mask[0].size
        found[owner[i]].append(
            Detection(
                SHAPES[shape] if named else None,
                COLORS[color] if share[i, color] > MIN_AGREEMENT else None,
                tuple(boxes[i].tolist()),
                float(overlap[i, shape]),
            )
        )
    return found


def _components(mask: np.ndarray) -> np.ndarray:
    """Label the 4-connected components of (B, H, W) bool: int64, unique over the batch, 0 outside.

    Every pixel starts with its own label; rows and columns of foreground take their largest one until none
    changes.
    """
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    rows, columns = _runs(mask), _runs(mask.swapaxes(1, 2))
    while True:
        spread = _spread(labels, *rows)
        spread = _spread(spread.swapaxes(1, 2), *columns).swapaxes(1, 2)
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def _runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the runs of equal values along the last axis: their starts in the flattened array, and lengths."""
    change = np.ones(mask.shape, bool)
    change[..., 1:] = mask[..., 1:] != mask[..., :-1]
    starts = np.flatnonzero(change)
    return starts, np.diff(starts, append=mask.size)


def _spread(labels: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.repeat(np.maximum.reduceat(labels.ravel(), starts), lengths).reshape(labels.shape)


def _boxes(component: np.ndarray, x: np.ndarray, y: np.ndarray, num: int) -> np.ndarray:
    """Bound the components that the pixels (x, y) belong to: (num, 4) left, top, right, bottom edges."""
    boxes = np.empty((num, 4))
    order = np.argsort(component, kind="stable")
    starts = np.searchsorted(component[order], np.arange(num))
    for axis, values in enumerate((x[order], y[order])):
        boxes[:, axis] = np.minimum.reduceat(values, starts)
        boxes[:, axis + 2] = np.maximum.reduceat(values, starts) + 1
    return boxes


def _overlaps(
    labels: np.ndarray, names: np.ndarray, owner: np.ndarray, center: np.ndarray, area: np.ndarray
) -> np.ndarray:
    """Compare silhouettes, centered and of unit area, with the templates: (N, shapes) soft IoU with the nearest."""
    grid = ((np.arange(CELLS) + 0.5) / CELLS * 2 - 1) * REACH
    size = np.sqrt(area)[:, None]
    labels = np.pad(labels, ((0, 0), (1, 1), (1, 1)))  # background, for places outside the image
    x0, wx = _split(center[:, :1] + grid * size + 1, labels.shape[2])  # (N, CELLS)
    y0, wy = _split(center[:, 1:] + grid * size + 1, labels.shape[1])
    silhouette = np.zeros((len(names), CELLS, CELLS), np.float32)
    for dy in (0, 1):
        for dx in (0, 1):
            weight = np.abs(1 - dy - wy)[:, :, None] * np.abs(1 - dx - wx)[:, None, :]
            label = labels[owner[:, None, None], (y0 + dy)[:, :, None], (x0 + dx)[:, None, :]]
            silhouette += weight * (label == names[:, None, None])
    silhouette = torch.from_numpy(silhouette.reshape(len(names), -1))
    templates, kind = _templates()  # (T, CELLS**2), (T,)
    difference = torch.cdist(silhouette, templates, p=1)
    total = silhouette.sum(1, keepdim=True) + templates.sum(1)
    iou = (total - difference) / (total + difference)  # sum of minima over sum of maxima
    return torch.stack([iou[:, kind == k].amax(1) for k in range(len(SHAPES))], dim=1).numpy()


def _split(place: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Split places into pixel index and fraction for linear interpolation; those outside are held at the edge."""
    place = place.clip(0, size - 1)
    index = np.minimum(place.astype(int), size - 2)
    return index, (place - index).astype(np.float32)


@cache
def _templates() -> tuple[Tensor, Tensor]:
    """Draw the templates: (T, CELLS**2) silhouettes of unit area, centered, and the index of their shape.

    Blur rounds a star off until its outline at half height is nearer to a circle, hence blurred stars.
    """
    fine = (np.arange(512) + 0.5) / 512 * 4 - 2
    frequency = np.fft.fftfreq(512, 4 / 512)
    x, y = np.meshgrid(fine, fine)
    samples = ((np.arange(CELLS * 4) + 0.5) / (CELLS * 4) * 2 - 1) * REACH  # 4 x 4 in every cell
    rows = []
    variants = [(shape, 0.0) for shape in SHAPES] + [("star", 0.15)]  # blur: standard deviation in radii
    for (shape, blur), angle in product(variants, (-MAX_ANGLE, 0.0, MAX_ANGLE)):
        cos, sin = np.cos(angle), np.sin(angle)
        inside = signed_distance(shape, cos * x + sin * y, cos * y - sin * x) < 0
        kernel = np.exp(-2 * (np.pi * blur * frequency) ** 2)  # a Gaussian's spectrum
        inside = np.fft.ifft2(np.fft.fft2(inside) * kernel * kernel[:, None]).real > 0.5
        size = np.sqrt(inside.mean()) * 4
        column = np.searchsorted(fine, x[inside].mean() + samples * size)
        row = np.searchsorted(fine, y[inside].mean() + samples * size)
        rows.append(inside[row[:, None], column].reshape(CELLS, 4, CELLS, 4).mean(axis=(1, 3)).ravel())
    kind = torch.tensor([SHAPES.index(shape) for shape, _ in variants]).repeat_interleave(3)
    return torch.from_numpy(np.stack(rows)).float(), kind


def _erode(labels: np.ndarray) -> np.ndarray:
    """Find the pixels whose four neighbours belong to the same component."""
    padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
    vertical = (labels == padded[:, :-2, 1:-1]) & (labels == padded[:, 2:, 1:-1])
    return vertical & (labels == padded[:, 1:-1, :-2]) & (labels == padded[:, 1:-1, 2:])


def _color_shares(colors: np.ndarray, component: np.ndarray, interior: np.ndarray, num: int) -> np.ndarray:
    """Measure the share of each component's interior that is nearest to each palette entry: (num, colors)."""
    hollow = np.bincount(component, interior, minlength=num) == 0
    counted = interior | hollow[component]  # a component without interior counts whole
    colors, component = colors[counted], component[counted]
    palette = np.array(list(PALETTE.values()), np.float32)
    nearest = ((colors[:, None] - palette) ** 2).sum(-1).argmin(1)
    votes = np.zeros((num, len(palette)))
    np.add.at(votes, (component, nearest), 1)
    return votes / votes.sum(1, keepdims=True)
