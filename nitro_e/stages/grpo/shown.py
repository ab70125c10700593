"""The images of a rollout that scored best and worst, for the people who watch a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from nitro_e.record.metrics import caption
from nitro_e.sampling.sheets import image_grid

COUNT = 8  # images of a sheet


def to_bytes(pixels: Tensor) -> Tensor:
    """Turn pixels (3, H, W) in -1..1 into (H, W, 3) bytes on the CPU."""
    return (pixels.nan_to_num().clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 0).cpu()


@dataclass
class Shown:
    """Name of a sheet -> its images, each with its prompt and scores."""

    parts: dict[str, list[tuple[Tensor, str]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, images: Tensor, prompts: Sequence[str], scores: Tensor, names: Sequence[str], weights: Tensor
    ) -> Shown:
        """Choose among images (S, 3, H, W) in -1..1 by the weighted sum of their trained scores, each of unit spread.

        scores: (S, R), NaN where there is none; an image without one is not shown.
        """
        total = torch.zeros(len(scores), dtype=torch.float64)
        for values, weight in zip(scores.double().unbind(1), weights.tolist()):
            if weight:
                known = values[values.isfinite()]
                total += weight * (values - known.mean()) / (known.std(unbiased=False) + 1e-8)
        order = [index for index in total.argsort(descending=True).tolist() if total[index].isfinite()]

        def shown(chosen: Sequence[int]) -> list[tuple[Tensor, str]]:
            return [
                (to_bytes(images[index]), f"{prompts[index]}: {_said(names, scores[index])}")
                for index in chosen
            ]

        return cls({"rollout-best": shown(order[:COUNT]), "rollout-worst": shown(order[::-1][:COUNT])})

    def sheets(self) -> dict[str, Image.Image]:
        found = {}
        for name, part in self.parts.items():
            if part:
                images = [Image.fromarray(image.numpy()) for image, _ in part]
                columns = min(COUNT, len(images))
                texts = [text for _, text in part]
                found[name] = caption(image_grid(images, columns), texts, columns, images[0].size)
        return found


def _said(names: Sequence[str], scores: Tensor) -> str:
    return ", ".join(
        f"{name} {'unknown' if math.isnan(score) else f'{score:.3g}'}"
        for name, score in zip(names, scores.tolist())
    )
