"""GenEval as a reward: is what the prompt asks for in the image?

    official   the benchmark's verdict, 0 or 1
    graded     the share of the request that is there, 0..1: smoother, and 1 exactly when official is

Evaluation on the benchmark uses the same reward, so training sees what evaluation sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nitro_e.config import ConfigError, did_you_mean
from nitro_e.encoders.clip import CLIP_L
from nitro_e.rewards.geneval.colors import load_color_detector
from nitro_e.rewards.geneval.detector import MASK2FORMER
from nitro_e.rewards.geneval.rules import fraction, is_correct

MODES = {"graded": fraction, "official": is_correct}


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

    def forward(self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict]) -> Tensor:
        detections = self.color_detector(pixels, info)
        scores = [MODES[self.mode](found, record) for found, record in zip(detections, info)]
        return torch.tensor(scores, dtype=torch.float32)
