"""Benchmarks by name: the prompts, the number of images of each, and the rewards that score them.

shapes    the held-out requests of the offline domain; its exact judge, strictly and by GenEval's rules
geneval   the 553 test prompts of GenEval; its verdict on detected objects
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nitro_e.config import ConfigError, did_you_mean, parse_yaml
from nitro_e.data.prompts import PromptsConfig
from nitro_e.rewards import RewardConfig
from nitro_e.rewards.geneval.rules import Detection
from nitro_e.shapes.judge import find_objects


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    name: str
    prompts: PromptsConfig
    per_prompt: int = 1  # images of each prompt
    rewards: tuple[RewardConfig, ...]  # the scores, the most important one first
    # pixels (B, 3, H, W) -> the objects in each image, shown on the page
    see: Callable[[Tensor], list[list[Detection]]] | None = None


def _shapes_score(score: str, title: str) -> RewardConfig:
    return RewardConfig(name="shapes", label=title, options={"score": score}, batch_size=256)


BENCHMARKS = {
    "shapes": Benchmark(
        name="shapes",
        prompts=PromptsConfig(source="shapes-heldout", num=600),
        rewards=(_shapes_score("strict", "strict"), _shapes_score("geneval", "GenEval")),
        see=find_objects,
    ),
    "geneval": Benchmark(
        name="geneval",
        prompts=PromptsConfig(source="geneval"),
        per_prompt=4,
        rewards=(RewardConfig(name="geneval", label="GenEval", options={"mode": "official"}),),
    ),
}


def benchmark(
    name: str,
    num: int | None = None,
    per_prompt: int | None = None,
    rewards: Sequence[str] = (),
    path: str | None = None,
    options: Sequence[str] = (),
) -> Benchmark:
    """One of BENCHMARKS, or a file of prompts with rewards by name.

    num, per_prompt: numbers of prompts, and of images of each, in place of the benchmark's; path: of the rewards'
    weights; options: "key=value", given to every reward.
    """
    if per_prompt is not None and not 1 <= per_prompt <= 10_000:
        raise ConfigError(f"--per-prompt must be at least 1 and at most 10000, got {per_prompt}")
    if name in BENCHMARKS:
        if rewards:
            raise ConfigError(f"--reward: '{name}' has its own rewards; name some only for files of prompts")
        found = BENCHMARKS[name]
    elif Path(name).suffix in (".txt", ".jsonl"):
        if not rewards:
            raise ConfigError(f"'{name}' is a file of prompts: name what scores the images, --reward NAME")
        scores = tuple(RewardConfig(name=reward) for reward in rewards)
        found = Benchmark(name=Path(name).stem, prompts=PromptsConfig(source=name), rewards=scores)
    else:
        raise ConfigError(f"unknown benchmark '{name}'" + did_you_mean(name, [*BENCHMARKS, "FILE.jsonl"]))
    given = dict(map(_option, options))
    return dataclasses.replace(
        found,
        prompts=found.prompts if num is None else dataclasses.replace(found.prompts, num=num),
        per_prompt=per_prompt or found.per_prompt,
        rewards=tuple(
            dataclasses.replace(reward, path=path or reward.path, options={**reward.options, **given})
            for reward in found.rewards
        ),
    )


def _option(text: str) -> tuple[str, bool | int | float | str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--reward-option '{text}': expected KEY=VALUE")
    option = parse_yaml(value, f"--reward-option '{text}'")
    if not isinstance(option, (bool, int, float, str)):
        raise ConfigError(f"--reward-option '{text}': expected a number, true, false or text as the value")
    return key, option


def describe(objects: Sequence[Detection]) -> str:
    """Put detected objects into words: "red circle, blue ?"."""
    return ", ".join(f"{thing.color or '?'} {thing.name or '?'}" for thing in objects) or "nothing"
