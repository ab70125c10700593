"""Scores during training: the run's `evaluation` section. They are logged as `eval/...` and drawn in the report.

    eval/NAME        mean over the tasks of the prompts (plain mean where prompts have no tasks)
    eval/NAME/TASK   of each task, if there are several
    eval/NAME/unseen over prompts of unseen combinations only, where prompts say so; likewise seen

Prompts and noise are the same every time, so that scores of different steps differ by the weights only. Every process
draws its share of the images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge, Le, Seed
from nitro_e.data.prompts import PromptsConfig, load_prompts
from nitro_e.evaluation.images import Autocast, ImageGenerator
from nitro_e.evaluation.results import means
from nitro_e.interfaces import DistContext, LatentCodec, TextEncoder
from nitro_e.record import progress
from nitro_e.rewards import RewardConfig, build_rewards
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.samplers import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Config):
    """Scores during training: before the first step, every so many, and after the last."""

    prompts: PromptsConfig
    rewards: tuple[RewardConfig, ...]  # weights do not matter here
    every: Annotated[int, Ge(1)] = 500  # steps
    seed: Seed = 0  # of the noise
    batch_size: Annotated[int, Ge(1), Le(65536)] = 64  # images drawn at a time
    sampling: SamplingConfig | None = None  # None: that of the run

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rewards:
            raise ConfigError("rewards is empty; name one, or leave evaluation out")
        build_rewards(self.rewards)  # their names and titles; loads nothing


class Evaluator:
    """Call it with a model, in every process: name -> value, of all processes together."""

    def __init__(
        self, config: EvaluationConfig, sampling: SamplingConfig, codec: LatentCodec, text: TextEncoder,
        device: torch.device, autocast: Autocast, dist: DistContext | None = None,
    ) -> None:  # fmt: skip
        self.config, self.codec, self.text, self.autocast = config, codec, text, autocast
        self.device, self.dist = device, dist or DistContext()
        self.sampling = config.sampling or sampling
        self.prompts = load_prompts(config.prompts)
        self.scorer = build_rewards(config.rewards, device)
        self.scorer.check([prompt.info for prompt in self.prompts])

    def __call__(self, model: nn.Module) -> dict[str, float]:
        training = model.training
        pipeline = TextToImage(model.eval(), self.codec, self.text, self.sampling)
        values = self.dist.sum(self.draw_and_score(pipeline).to(self.device)).tolist()  # N x R
        model.train(training)
        logs: dict[str, float] = {}
        for title, column in zip(self.scorer.names, np.array(values).T):
            logs |= {f"eval/{title}{part}": value for part, value in means(self.prompts, column).items()}
            if unscored := int(np.isnan(column).sum()):
                logs[f"eval/{title}/unscored"] = float(unscored)
        return {name: value for name, value in logs.items() if not math.isnan(value)}

    def draw_and_score(self, pipeline: TextToImage) -> Tensor:
        """Return float32 (prompts, rewards): the scores of this process's prompts, zero for the others'."""
        mine = range(len(self.prompts))[self.dist.rank :: self.dist.world_size]
        values = torch.zeros(len(self.prompts), len(self.scorer.names))
        generate = ImageGenerator(
            pipeline, self.sampling, self.config.seed, self.config.batch_size, self.autocast
        )
        options = {"unit": "img", "leave": False, "disable": self.dist.rank > 0}
        with progress.bar(total=len(mine), desc="evaluation", brief=True, **options) as bar:
            for start in range(0, len(mine), self.config.batch_size):
                batch = mine[start : start + self.config.batch_size]
                texts, info = zip(*(self.prompts[index] for index in batch))
                pixels = generate(texts, [(index, 0) for index in batch])
                values[list(batch)] = self.scorer(pixels, texts, info).values
                bar.update(len(batch))
        return values
