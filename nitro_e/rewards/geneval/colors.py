"""Images to the objects that GenEval's rules judge: the detector's confident ones, and CLIP for their colors.

CLIP names a color only for the best `count` objects of a class whose color the prompt names. It sees the object alone,
on gray; the nearest of ten color names wins, each the mean of three phrasings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitro_e import files
from nitro_e.encoders.clip import CLIP, CLIP_L, fit_short_side
from nitro_e.rewards.clip_scores import shared_clip
from nitro_e.rewards.geneval.detector import MASK2FORMER, Detector, Found, load_detector
from nitro_e.rewards.geneval.rules import Detection, confident
from nitro_e.rewards.geneval.tasks import COLORS
from nitro_e.rewards.reuse import reuse

GRAY = 153 / 255 * 2 - 1  # behind the object, in -1..1
PHRASES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
CROPS = 16  # at a time


class ColorDetector(nn.Module):
    """pixels (B, 3, H, W) in -1..1 and their metadata -> detections for `is_correct` and `fraction`."""

    def __init__(self, detector: Detector, clip: CLIP) -> None:
        super().__init__()
        self.detector, self.clip = detector, clip
        self._colors: dict[str, Tensor] = {}  # class -> (10, E) on the CPU

    def forward(self, pixels: Tensor, metadata: Sequence[dict]) -> list[list[Detection]]:
        return [
            self._look(image, found, record)
            for image, found, record in zip(pixels, self.detector(pixels), metadata, strict=True)
        ]

    def _look(self, image: Tensor, found: list[Found], record: dict) -> list[Detection]:
        things = confident([one.thing for one in found], record)
        masks = {one.thing: one.mask for one in found}
        for wanted in record["include"]:
            if "color" not in wanted:
                continue
            best = [i for i, thing in enumerate(things) if thing.name == wanted["class"]][: wanted["count"]]
            crops = [crop(image, masks[things[i]._replace(color=None)], things[i].box) for i in best]
            for i, color in zip(best, self.colors(crops, wanted["class"])):
                things[i] = things[i]._replace(color=color)
        return things

    def colors(self, crops: Sequence[Tensor], name: str) -> list[str]:
        """Name the color of each crop (3, h, w) of an object of this class."""
        if not crops:
            return []
        images = torch.cat([fit_short_side(one[None], self.clip.size) for one in crops])  # (N, 3, S, S)
        features = torch.cat([self.clip.image_features(part) for part in images.split(CROPS)])  # (N, E)
        return [COLORS[i] for i in (features @ self._color_features(name).to(features).T).argmax(1).tolist()]

    def _color_features(self, name: str) -> Tensor:
        if name not in self._colors:
            texts = [phrase.format(color=color, name=name) for color in COLORS for phrase in PHRASES]
            features = self.clip.text_features(texts).unflatten(0, (len(COLORS), len(PHRASES)))  # (10, 3, E)
            self._colors[name] = F.normalize(features.mean(1), dim=-1).cpu()
        return self._colors[name]


def crop(image: Tensor, mask: Tensor, box: Sequence[float]) -> Tensor:
    """Cut the box out of an image, with gray outside the mask: (3, h, w) in -1..1."""
    left, top, right, bottom = (round(edge) for edge in box)
    return torch.where(mask, image, GRAY)[:, top:bottom, left:right]


def load_color_detector(
    detector: str = MASK2FORMER, clip: str = CLIP_L, revision: str | None = None
) -> ColorDetector:
    """Load detector and color classifier from hub ids or folders; ConfigError if they cannot be loaded."""

    def load(folder: str) -> Detector:
        is_folder = Path(detector).expanduser().is_dir()
        return load_detector(folder, None if is_folder else f"{detector} at {Path(folder).name}")

    return ColorDetector(
        reuse(
            ("geneval's detector", detector, revision),
            lambda: files.load("geneval's detector", "path", detector, load, files.TRANSFORMER, revision),
        ),
        shared_clip("geneval's colors", "options.clip", clip, torch.float32),
    )
