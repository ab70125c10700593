"""Rewards beside distillation: the policy gradient of a few-step student (DMDR, arXiv 2511.13649).

Multistep sampling is a Gaussian policy: from its prediction x0 the student goes to a state drawn from
N((1 - s) x0, s^2). Images of one prompt are compared as in stage 3: an image's advantage A is its reward less the mean of its
group, over the group's deviation, and what is minimised is -A log N(x_s; (1 - s) x0, s^2), per dimension, over the steps
that led to it. Nothing is replayed, so there is no ratio to clip; `score` beside it keeps the student near the teacher.
The last step, to s = 0, draws nothing and learns nothing here; rewards need no gradient of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from nitro_e.config import Config, ConfigError, Ge, Gt
from nitro_e.interfaces import LatentCodec, Phase
from nitro_e.randomness import SampleRandom
from nitro_e.rewards import RewardConfig, Scorer
from nitro_e.sampling.flow import expand
from nitro_e.stages.distill.inputs import DistillBatch, Prediction
from nitro_e.stages.distill.objective import Balance, Shared, per_sample


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(Config):
    rewards: tuple[RewardConfig, ...]  # as in stage 3; the weighted sum of their plain scores counts
    weight: Annotated[float, Gt(0), "to switch the objective off: reward: null"] = 0.1  # of this objective
    start: Annotated[int, Ge(0)] = 0  # first step of the term: before it the student is distilled alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if all(reward.monitored for reward in self.rewards):
            raise ConfigError("rewards: none has a weight, so there is nothing to train on")
        for reward in self.rewards:
            if reward.monitored:
                raise ConfigError(
                    f"rewards: '{reward.title}' has weight 0, but nothing is monitored here; name it in "
                    "evaluation.rewards"
                )
            if reward.transform != "none":
                raise ConfigError(
                    f"rewards: '{reward.title}' has transform '{reward.transform}', but plain scores are compared "
                    "here; leave it out"
                )


class Judge:
    """Scores latents as images: the weighted sum of rewards (B,), NaN where one of them gives none."""

    def __init__(self, codec: LatentCodec, scorer: Scorer) -> None:
        self.codec, self.scorer = codec, scorer

    @torch.no_grad()
    def __call__(self, latents: Tensor, prompts: Sequence[str], info: Sequence[dict]) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            scores = self.scorer(self.codec.decode(latents.float()).float(), prompts, info).values  # (B, R)
        return (scores * self.scorer.weights.to(scores)).sum(dim=1)


class Reward:
    """The policy gradient at the student's x0 predictions."""

    name = "reward"
    phases: tuple[Phase, ...] = ()
    balance: Balance | None = None
    direct = False

    def __init__(self, config: PolicyGradientConfig, shared: Shared) -> None:
        self.config, self.shared = config, shared

    def weight(self, step: int) -> float:
        return self.config.weight if step >= self.config.start else 0.0

    def loss(
        self, prediction: Prediction, batch: DistillBatch, rng: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute A |x_s - (1 - s) x0|^2 / (2 s^2), (B,), per dimension; 0 for the last step of a chain."""
        assert prediction.t_next is not None and self.shared.judge is not None, "DistillConfig wants chains"
        s, end = prediction.t_next, prediction.t_next == 0
        count = int(end.int().argmax()) + 1  # steps of a chain
        ends = list(range(count - 1, len(s), count))
        scores = self.shared.judge(
            prediction.data.detach()[ends],
            [batch.prompts[row] for row in ends],
            [batch.info[row] if batch.info else {} for row in ends],
        )
        advantage = advantages(scores, batch.prompts[count - 1 :: count]).repeat_interleave(count)
        x_next = prediction.x.roll(-1, dims=0)  # of the ends that is another chain's: masked
        residual = (x_next - expand(1 - s, x_next) * prediction.data) / expand(s.clamp(min=1e-3), x_next)
        values = advantage * per_sample(residual.square()) / 2
        known = scores[scores.isfinite()]
        logs = {"score": known.mean()} if len(known) else {}
        return torch.where(end, torch.zeros_like(values), values), logs


def advantages(scores: Tensor, prompts: Sequence[str]) -> Tensor:
    """Compare scores (N,) within runs of one prompt: (score - mean) / deviation, 0 where there is none."""
    result = torch.zeros_like(scores)
    for prompt in dict.fromkeys(prompts):
        rows = [row for row, other in enumerate(prompts) if other == prompt and scores[row].isfinite()]
        if len(rows) > 1:
            group = scores[rows]
            result[rows] = (group - group.mean()) / (group.std() + 1e-4)
    return result
