"""GenEval as a reward: is what the prompt asks for in the image?

    official   the benchmark's verdict, 0 or 1
    graded     the share of the request that is there, 0..1: smoother, and 1 exactly when official is
    flow_grpo  what Flow-GRPO trained on

The benchmark's own detector is OpenMMLab's; with the default one, Meta's, a warning says that the number is another.

Evaluation on the benchmark uses the same reward, so training sees what evaluation sees.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nitro_e.config import ConfigError, did_you_mean
from nitro_e.encoders.clip import CLIP_L
from nitro_e.rewards.geneval.colors import load_color_detector
from nitro_e.rewards.geneval.detector import MASK2FORMER
from nitro_e.rewards.geneval.rules import Detection, flow_grpo, fraction, in_words, is_correct, reasons

MODES = {"graded": fraction, "official": is_correct, "flow_grpo": flow_grpo}

log = logging.getLogger(__name__)


class GenEvalReward(nn.Module):
    """`path`: hub id or folder of the detector; `clip`: likewise of the color classifier. Float32 only."""

    needs_info = True

    def __init__(
        self, path: str | None = None, revision: str | None = None, mode: str = "graded", clip: str = CLIP_L
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ConfigError(f"reward 'geneval': unknown mode '{mode}'" + did_you_mean(mode, list(MODES)))
        self.mode = mode
        self.color_detector = load_color_detector(path or MASK2FORMER, clip, revision)
        self.source = self.color_detector.detector.source
        self.said: list[str] = []  # of each image of the last call: what was seen, and what is wrong
        if path is None:
            self.source += " (not GenEval's detector)"
            log.warning(
                "reward 'geneval': %s is not the benchmark's detector, so scores are not comparable with published ones; "
                "fetch OpenMMLab's and set path (docs/rewards.md, GenEval's number)",
                MASK2FORMER,
            )

    def forward(self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict]) -> Tensor:
        detections = self.color_detector(pixels, info)
        self.said = [_said(found, record) for found, record in zip(detections, info)]
        scores = [MODES[self.mode](found, record) for found, record in zip(detections, info)]
        return torch.tensor(scores, dtype=torch.float32)


def _said(found: Sequence[Detection], record: dict) -> str:
    return ": ".join(filter(None, [in_words(found), "; ".join(reasons(found, record))]))
