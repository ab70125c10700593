"""Advantages: how much better than the other images of its prompt an image was. Pure functions, float64.

Scores stand in (G, K, R): groups, images of a group, rewards; NaN = could not be scored. Such a score takes no part in
any statistic and its image gets advantage 0 from that reward; so does a group with fewer than two scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from nitro_e.config import Config, Gt

EPSILON = 1e-4  # added to every standard deviation


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig(Config):
    # The differences to the group's mean are divided by: within: their root mean square over the whole rollout, so that
    # every reward has unit scale; batch: the std of all scores (Flow-GRPO); group: the std of the group (GRPO)
    std: Literal["within", "batch", "group"] = "within"
    clip: Annotated[float, Gt(0)] = 5.0  # largest advantage
    # multiply what is better than its group by how far it is from the nearest image of the group (GARDO, arXiv
    # 2512.24138), in the features of components.vision
    diversity: bool = False


def advantages(
    scores: Tensor, weights: Tensor, config: AdvantageConfig, features: Tensor | None = None
) -> Tensor:
    """Compute advantages (G, K) from scores (G, K, R) and weights (R,), of which 0 leaves a reward out.

    features: (G, K, D) of the images, where config.diversity asks for them.

    Several rewards: each is normalised alone, then the weighted sum once more by its root mean square over the rollout.
    (MixGRPO, arXiv 2507.21802, aggregates in the same order, but with each group's own std.)
    """
    total = scores.new_zeros(scores.shape[:2], dtype=torch.float64)
    trained = [index for index, weight in enumerate(weights.tolist()) if weight]
    for index in trained:
        total += weights[index].double() * normalised(scores[..., index].double(), config.std)
    if len(trained) > 1:
        total = total / (total.square().mean().sqrt() + EPSILON)
    if config.diversity:
        assert features is not None
        total = torch.where(total > 0, total * isolation(features), total)
    return total.clamp(-config.clip, config.clip)


def isolation(features: Tensor) -> Tensor:
    """Measure how far each image is from the nearest other one of its group, relative to the group's mean: (G, K).

    The distance is 1 - cosine of features (G, K, D). In a group of equal images it is 1 for all. One whose features are
    not finite is far from all others, and not in the mean.
    """
    valid = features.isfinite().all(dim=2)  # (G, K)
    unit = torch.nn.functional.normalize(features.double().masked_fill(~valid[..., None], 0.0), dim=2)
    distance = 1 - (unit @ unit.mT).clamp(-1, 1)  # (G, K, K)
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = distance.amin(dim=2)  # (G, K)
    mean = _mean(nearest, valid, dim=1, keepdim=True)
    return torch.where(mean > 1e-9, nearest / mean.clamp(min=1e-9), 1.0)


def normalised(scores: Tensor, std: str) -> Tensor:
    """Compute the advantages (G, K) of one reward."""
    valid = usable(scores)
    centered = centre(scores, valid)
    if std == "group":
        scale = _mean(centered.square(), valid, dim=1, keepdim=True).sqrt()
    elif std == "batch":
        everything = scores[valid]
        scale = everything.std(unbiased=False) if len(everything) else scores.new_ones(())
    else:
        scale = _mean(centered.square(), valid).sqrt()
    return centered / (scale + EPSILON)


def usable(scores: Tensor) -> Tensor:
    """Tell which images (G, K) are scored and in a group with at least two scores."""
    valid = scores.isfinite()
    return valid & (valid.sum(dim=1, keepdim=True) >= 2)


def centre(scores: Tensor, valid: Tensor) -> Tensor:
    """Subtract the group's mean from the scores; 0 where not valid."""
    scores = scores.masked_fill(~valid, 0.0)
    return (scores - _mean(scores, valid, dim=1, keepdim=True)).masked_fill(~valid, 0.0)


def score_statistics(
    scores: Tensor, names: tuple[str, ...], weights: Tensor, applies: Tensor
) -> dict[str, Tensor]:
    """Summarise a rollout's scores (G, K, R) for the log.

    Per reward: mean, std, std within the groups that have two scores, and the share of images without a score among the
    groups whose prompt it `applies` (G, R) to. Over all: the share of groups whose trained scores are all equal, so
    that they teach nothing.
    """
    logs: dict[str, Tensor] = {}
    flat = torch.ones(len(scores), dtype=torch.bool, device=scores.device)  # (G,)
    for index, name in enumerate(names):
        values = scores[..., index].double()
        scored, valid = values[values.isfinite()], usable(values)
        within = _mean(centre(values, valid).square(), valid, dim=1).sqrt()  # (G,)
        if applies[:, index].any():
            logs[f"reward/{name}/invalid"] = 1 - values[applies[:, index]].isfinite().double().mean()
        if len(scored):
            logs[f"reward/{name}"] = scored.mean()
            logs[f"reward/{name}/std"] = scored.std(unbiased=False)
        if valid.any():
            logs[f"reward/{name}/within_std"] = within[valid.any(dim=1)].mean()
        if weights[index]:
            flat &= within < 1e-8
    logs["zero_std_ratio"] = flat.double().mean()
    return logs


def _mean(values: Tensor, valid: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """Take the mean of the valid values; 0 where there is none."""
    if dim is None:
        return (values * valid).sum() / valid.sum().clamp(min=1)
    return (values * valid).sum(dim, keepdim=keepdim) / valid.sum(dim, keepdim=keepdim).clamp(min=1)
