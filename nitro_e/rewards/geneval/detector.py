"""Objects in images: Mask2Former (Cheng et al. 2022, arXiv:2112.01527), run by transformers, read as GenEval does.

GenEval runs mmdetection; transformers' own post-processing gives other scores, and loses overlapping objects.
This one follows mmdetection:

* the best 100 of queries x classes are candidates, and overlapping objects stay;
* images that are not square are padded with gray, as mmdetection 2 does for this network;
* masks are upsampled to the network's input, cropped, resized to the image and cut at 0;
* the score is the class probability times the mean mask probability inside the mask;
* boxes are tight, right and bottom edges exclusive.

Float32 only: in less precision it finds next to nothing.

GenEval's own weights are OpenMMLab's (`openmmlab`), which have no hub repository. The default ones are Meta's, of the
same architecture and data but calibrated differently, so .9 for counting is not quite the same threshold: print
`source` beside every score.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitro_e.config import ConfigError
from nitro_e.rewards.geneval import openmmlab
from nitro_e.rewards.geneval.rules import MIN_SCORE, Detection
from nitro_e.rewards.geneval.tasks import CLASSES

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
SHORT_SIDE, LONG_SIDE, DIVISOR = 800, 1333, 32  # of the network's input
MAX_CANDIDATES = 100
# weights that may be missing: the loss's, unused ones, and those computed on loading
UNUSED = r"^criterion\.|\.swin\.layernorm\.|\.relative_position_index$"
GRAY = 128 / 255  # of the padding
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB


class Found(NamedTuple):
    thing: Detection  # without a color
    mask: Tensor  # (H, W) bool


class Detector(nn.Module):
    """pixels (B, 3, H, W) in -1..1 -> the objects of each with a score above `min_score`, best first."""

    def __init__(self, model: Any, source: str, min_score: float = MIN_SCORE) -> None:
        super().__init__()
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        if len(labels) != len(CLASSES) or (labels[0], labels[-1]) != (CLASSES[0], CLASSES[-1]):
            raise ConfigError(
                f"the detector has {len(labels)} classes; it must have COCO's 80 in COCO's order"
            )
        self.model = model.float().eval().requires_grad_(False)
        self.source = source
        self.min_score = min_score
        self.register_buffer("mean", torch.tensor(MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("padding", torch.full((1, 3, 1, 1), GRAY), persistent=False)

    def forward(self, pixels: Tensor) -> list[list[Found]]:
        images, size = self.prepare(pixels)
        output = self.model(pixel_values=images)
        return [
            select(classes, masks, images.shape[-2:], size, pixels.shape[-2:], self.min_score)
            for classes, masks in zip(
                output.class_queries_logits.float(), output.masks_queries_logits.float()
            )
        ]

    def prepare(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The network's input (B, 3, h, w), padded, and the size of the image in it."""
        height, width = pixels.shape[-2:]
        factor = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
        size = (int(height * factor + 0.5), int(width * factor + 0.5))
        images = F.interpolate(pixels.float() / 2 + 0.5, size, mode="bilinear", align_corners=False)
        padded = [side + -side % DIVISOR for side in size]
        canvas = self.padding.expand(len(pixels), 3, *padded).clone()
        canvas[..., : size[0], : size[1]] = (images * 255).round() / 255  # mmdetection resizes 8-bit images
        return (canvas - self.mean) / self.std, size


def select(
    classes: Tensor,  # (Q, 81) logits, the last one of "nothing"
    masks: Tensor,  # (Q, h, w) logits at any resolution
    padded: tuple[int, int],
    inner: tuple[int, int],
    size: tuple[int, int],
    min_score: float,
) -> list[Found]:
    """One image's objects above `min_score`, best first; masks and boxes in pixels of `size`."""
    probabilities = classes.softmax(-1)[:, :-1]  # (Q, 80)
    scores, index = probabilities.flatten().topk(min(MAX_CANDIDATES, probabilities.numel()))
    scores, index = scores[scores > min_score], index[scores > min_score]  # mask scores only lower them
    query, label = index // probabilities.shape[1], index % probabilities.shape[1]
    found = []
    for score, q, k in zip(scores.tolist(), query.tolist(), label.tolist()):
        logits = _resize(_resize(masks[q], padded)[: inner[0], : inner[1]], size)  # (H, W)
        mask = logits > 0
        score *= ((logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)).item()
        if score > min_score:
            found.append(Found(Detection(CLASSES[k], None, _box(mask), score), mask))
    return sorted(found, key=lambda one: -one.thing.score)


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image[None, None], tuple(size), mode="bilinear", align_corners=False)[0, 0]


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    """left, top, right, bottom of a mask that is not empty."""
    columns, rows = mask.any(0).nonzero(), mask.any(1).nonzero()
    return (columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1)


def load_detector(folder: str, name: str | None = None) -> Detector:
    """Load a folder of transformers' format or with OpenMMLab's checkpoint; `name`: its `source`, if not the folder."""
    from transformers import Mask2FormerForUniversalSegmentation, logging

    file = openmmlab.find(folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports what is checked below
    try:
        if file is not None:
            model, report = openmmlab.load(file)
        else:
            model, report = Mask2FormerForUniversalSegmentation.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    finally:
        logging.set_verbosity(verbosity)
    missing = [key for key in report["missing_keys"] if not re.search(UNUSED, key)]
    if missing or report["mismatched_keys"]:
        raise ValueError(f"it is no Mask2Former: {len(missing)} weights are missing")
    return Detector(model, file.stem if file is not None else name or folder)
