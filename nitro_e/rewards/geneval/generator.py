"""GenEval's 553 test prompts, and training prompts of the same templates that ask for none of the same images.

A test prompt is excluded by its meaning, not by its words: "a B and an A" and "a B right of an A" are
as forbidden as "an A and a B" and "an A left of a B". All single objects are tested, so none is trained.
"""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from nitro_e.rewards.geneval.tasks import (
    CLASSES,
    COLORS,
    NUMBERS,
    RELATIONS,
    Request,
    Thing,
    meaning,
    metadata,
    read,
)

# Flow-GRPO, arXiv:2505.05470
SHARES = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}
UNSEEN = 20  # classes that objects="seen" leaves out

Objects = Literal["all", "seen", "unseen"]


def test_prompts() -> list[dict]:
    """The benchmark's 553 records, in its order."""
    return [metadata(request) for request in _test_requests()]


test_prompts.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test


def train_prompts(num: int, seed: int = 0, objects: Objects = "all") -> list[dict]:
    """Records of `num` random prompts; record i depends on (seed, i) alone. Some repeat, as chance has it.

    `objects`: "seen" draws from 60 of the 80 classes, "unseen" from the other 20 (which 20 is fixed)."""
    return [metadata(_draw_untested(np.random.default_rng([seed, index]), objects)) for index in range(num)]


def classes(objects: Objects) -> tuple[str, ...]:
    unseen = sorted(CLASSES, key=lambda name: zlib.crc32(name.encode()))[:UNSEEN]
    return tuple(name for name in CLASSES if objects == "all" or (name in unseen) == (objects == "unseen"))


def _draw_untested(rng: np.random.Generator, objects: Objects) -> Request:
    shares = np.array(list(SHARES.values())) / sum(SHARES.values())
    tag = str(rng.choice(list(SHARES), p=shares))
    while True:
        request = _draw(rng, tag, classes(objects))
        if meaning(request) not in _tested():
            return request


def _draw(rng: np.random.Generator, tag: str, names: tuple[str, ...]) -> Request:
    """Any request of a task, uniformly: two different classes, two different colors, no colored person."""
    if tag in ("colors", "color_attr"):
        names = tuple(name for name in names if name != "person")
    first, second = (names[i] for i in rng.choice(len(names), 2, replace=False))
    color, other = (COLORS[i] for i in rng.choice(len(COLORS), 2, replace=False))
    if tag == "colors":
        return Request(tag, (Thing(first, color),))
    if tag == "counting":
        return Request(tag, (Thing(first, count=int(rng.choice(list(NUMBERS)))),))
    if tag == "color_attr":
        return Request(tag, (Thing(first, color), Thing(second, other)))
    relation = str(rng.choice(RELATIONS)) if tag == "position" else None
    return Request(tag, (Thing(first), Thing(second)), relation)


@cache
def _tested() -> frozenset[tuple]:
    return frozenset(meaning(request) for request in _test_requests())


@cache
def _test_requests() -> tuple[Request, ...]:
    lines = (Path(__file__).parent / "test_prompts.txt").read_text("utf-8").splitlines()
    return tuple(read(line) for line in lines)
