"""Scores during training: the run's `evaluation` section. They are logged as `eval/...` and drawn in the report.

    eval/NAME        mean over the tasks of the prompts (plain mean where prompts have no tasks)
    eval/NAME/low    its 95 % interval (evaluation.intervals), likewise high
    eval/NAME/TASK   of each task, if there are several
    eval/NAME/unseen over prompts of unseen combinations only, where prompts say so; likewise seen

Prompts and noise are the same every time, so that scores of different steps differ by the weights only. Every process
draws its share of the images. `best` keeps the checkpoint with the highest of these scores, and `guard` acts when one
falls; training.selection does both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge, Le, Seed, did_you_mean
from nitro_e.data.prompts import PromptsConfig, load_prompts
from nitro_e.evaluation.images import Autocast, ImageGenerator
from nitro_e.evaluation.results import interval, means
from nitro_e.interfaces import DistContext, LatentCodec, TextEncoder
from nitro_e.record import progress
from nitro_e.rewards import RewardConfig, build_rewards
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.samplers import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Config):
    """How far scores may fall below their highest value so far: `{pickscore: 0.3, action: rollback}`."""

    bounds: dict[str, Annotated[float, Ge(0)]]  # titles of rewards -> the largest fall, in units of the score
    # stop: the training ends; rollback: it goes on from the best checkpoint; warn: it is only said
    action: Literal["stop", "rollback", "warn"] = "stop"

    @classmethod
    def derive(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Take every other key for the title of a reward."""
        own = {key: data[key] for key in ("bounds", "action") if key in data}
        titles = {key: value for key, value in data.items() if key not in own}
        bounds = own.get("bounds", {})
        return {**own, "bounds": {**bounds, **titles} if isinstance(bounds, Mapping) else bounds}


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Config):
    """Scores during training: before the first step, every so many, and after the last."""

    prompts: PromptsConfig
    rewards: tuple[RewardConfig, ...]  # weights do not matter here
    every: Annotated[int, Ge(1)] = 500  # steps
    seed: Seed = 0  # of the noise
    batch_size: Annotated[int, Ge(1), Le(65536)] = 64  # images drawn at a time
    sampling: SamplingConfig | None = None  # None: that of the run
    best: str | None = (
        None  # title of the reward whose highest score decides which checkpoint is kept in RUN/best
    )
    guard: GuardConfig | None = None  # acts when a score falls too far

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rewards:
            raise ConfigError("rewards is empty; name one, or leave evaluation out")
        build_rewards(self.rewards)  # their names and titles; loads nothing
        titles = [reward.title for reward in self.rewards]
        named = {} if self.best is None else {"best": [self.best]}
        if self.guard is not None:
            named["guard"] = list(self.guard.bounds)
            if not self.guard.bounds:
                raise ConfigError("guard names no reward; write {pickscore: 0.3} for example")
            if self.guard.action == "rollback" and self.best is None:
                raise ConfigError(
                    "guard.action rollback goes back to the best checkpoint; set best to a reward's title"
                )
        for key, names in named.items():
            for name in names:
                if name not in titles:
                    raise ConfigError(
                        f"{key}: no reward here is called '{name}'" + did_you_mean(name, titles)
                    )


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
            low, high = interval(self.prompts, column)
            logs |= {f"eval/{title}/low": low, f"eval/{title}/high": high}
            if unscored := int(np.isnan(column).sum()):
                logs[f"eval/{title}/unscored"] = float(unscored)
        return {name: value for name, value in logs.items() if math.isfinite(value)}

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
