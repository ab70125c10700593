"""Diversity on the offline domain: how far images of one prompt differ in what the prompt leaves open.

A model that draws one right image from every noise has a perfect score, so scores need this beside them. The judge finds
the objects, and pairs of right images of a prompt are compared, class by class of what is asked for:

    place   distance between the mean centers of the class, in image sides
    size    difference of the mean sizes of the class (square root of a box's area), in image sides
    color   1 if the colors of the class differ, where the prompt names none

Wrong images are left out: their objects may not be those that are asked for. The mean over pairs does not depend on how
many images are right, as that over deviations would.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nitro_e.config import ConfigError
from nitro_e.data.prompts import Prompt
from nitro_e.evaluation.images import ScoredImage, read_pixels
from nitro_e.rewards.geneval.rules import Detection
from nitro_e.shapes.judge import judge


class Spread(NamedTuple):
    """Mean differences between the right images of one prompt; NaN where there is no pair, or nothing is left open."""

    place: float
    size: float
    color: float


def spreads(prompts: Sequence[Prompt], rows: Sequence[ScoredImage], folder: Path) -> list[Spread]:
    """Measure every prompt's images, which lie in `folder`."""
    found = []
    for index, prompt in enumerate(prompts):
        files = [folder / row.file for row in rows if row.index == index]
        pixels = torch.stack([read_pixels(file) for file in files])
        verdicts = judge(pixels, [prompt.info] * len(files))
        right = [verdict.objects for verdict in verdicts if verdict.strict]
        found.append(spread(right, prompt.info, math.sqrt(pixels.shape[2] * pixels.shape[3])))
    return found


def spread(right: Sequence[Sequence[Detection]], record: dict, side: float) -> Spread:
    """Compare the objects of right images of one prompt; record: its GenEval metadata, side: pixels of an image's side."""
    parts: dict[str, list[float]] = {"place": [], "size": [], "color": []}
    for wanted in record["include"]:
        looks = [_look([thing for thing in image if thing.name == wanted["class"]], side) for image in right]
        for (center, size, colors), (center2, size2, colors2) in itertools.combinations(looks, 2):
            parts["place"].append(math.dist(center, center2))
            parts["size"].append(abs(size - size2))
            if "color" not in wanted:
                parts["color"].append(float(colors != colors2))
    return Spread(*(float(np.mean(values)) if values else math.nan for values in parts.values()))


def _look(things: Sequence[Detection], side: float) -> tuple[tuple[float, float], float, list[str]]:
    """Return the mean center and mean size of objects, in image sides, and their colors in order."""
    boxes = np.array([thing.box for thing in things]) / side  # (N, 4)
    x, y = ((boxes[:, axis] + boxes[:, axis + 2]) / 2 for axis in (0, 1))
    sizes = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    return (
        (float(x.mean()), float(y.mean())),
        float(sizes.mean()),
        sorted(str(thing.color) for thing in things),
    )


def ratio(ours: Sequence[Spread], theirs: Sequence[Spread]) -> float:
    """Compare with another model's: the mean over place, size and color of the ratios of their means.

    Each is taken over the prompts of which both models have pairs; NaN if there are none.
    """
    if len(ours) != len(theirs):
        raise ConfigError("diversity is compared over the same prompts on both sides")
    ratios = []
    for a, b in zip(np.array(ours).T, np.array(theirs).T):  # (prompts,) of one attribute
        known = ~np.isnan(a) & ~np.isnan(b)
        if known.any() and b[known].mean() > 0:
            ratios.append(a[known].mean() / b[known].mean())
    return float(np.mean(ratios)) if ratios else math.nan
