"""Benchmarks by name: which prompts, how many pictures of each, and what judges them.

shapes    the held-out requests of the offline domain; its exact judge, strictly and by GenEval's rules
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from nitro_e.config import ConfigError, did_you_mean
from nitro_e.geneval.rules import Detection
from nitro_e.prompts import PromptsConfig
from nitro_e.rewards import RewardConfig
from nitro_e.shapes.judge import find_objects


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    name: str
    prompts: PromptsConfig
    per_prompt: int = 1  # pictures of each prompt
    rewards: tuple[RewardConfig, ...]  # the scores, the most important one first
    see: Callable[[Tensor], list[list[Detection]]] | None = None  # pixels (B, 3, H, W) -> objects, for people


def _shapes_score(score: str, title: str) -> RewardConfig:
    return RewardConfig(name="shapes", label=title, options={"score": score}, batch_size=256)


BENCHMARKS = {
    "shapes": Benchmark(
        name="shapes",
        prompts=PromptsConfig(source="shapes-heldout", num=600),
        rewards=(_shapes_score("strict", "strict"), _shapes_score("geneval", "GenEval")),
        see=find_objects,
    ),
}


def benchmark(name: str, num: int | None = None, per_prompt: int | None = None) -> Benchmark:
    """One of BENCHMARKS; `num` prompts and `per_prompt` pictures of each instead of its own numbers."""
    if name not in BENCHMARKS:
        raise ConfigError(f"unknown benchmark '{name}'" + did_you_mean(name, list(BENCHMARKS)))
    if per_prompt is not None and per_prompt < 1:
        raise ConfigError(f"--per-prompt must be at least 1, got {per_prompt}")
    found = BENCHMARKS[name]
    prompts = found.prompts if num is None else dataclasses.replace(found.prompts, num=num)
    return dataclasses.replace(found, prompts=prompts, per_prompt=per_prompt or found.per_prompt)


def describe(objects: Sequence[Detection]) -> str:
    """What a judge saw, in words: "red circle, blue ?"."""
    return ", ".join(f"{thing.color or '?'} {thing.name or '?'}" for thing in objects) or "nothing"
