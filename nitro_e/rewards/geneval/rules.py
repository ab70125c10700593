"""GenEval's rules (Ghosh et al. 2023, arXiv:2310.11513) over detected objects, and scores built on them.

    is_correct   the benchmark's verdict: what is asked for is there; other objects are allowed
    reasons      what is wrong, in the words of the benchmark's tool; none if and only if correct
    is_strict    the same, and nothing else is there
    fraction     how much of it is there, 0..1; exactly 1 if and only if correct
    graded       the same, less for other objects; exactly 1 if and only if strict
    flow_grpo    the reward that Flow-GRPO trained on: exact numbers of every class, at most 1, negative for many too many

Pure Python, no images. The caller detects objects, and drops uncertain ones as the benchmark does (`confident`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

MIN_SCORE, MIN_SCORE_COUNTING, MAX_OBJECTS = 0.3, 0.9, 16  # of the benchmark's detector, per class
POSITION_MARGIN = 0.1  # of the summed sizes: how far centers may overlap before a relation starts to count


class Detection(NamedTuple):
    """One object found in an image; name None: of no known class, color None: not clear or not asked for."""

    name: str | None
    color: str | None
    box: tuple[float, float, float, float]  # left, top, right, bottom; y grows downwards
    score: float = 1.0


def confident(found: Sequence[Detection], metadata: dict) -> list[Detection]:
    """Keep what the benchmark looks at: of each class the best 16 objects above .3, or above .9 where it counts."""
    least = MIN_SCORE_COUNTING if metadata["tag"] == "counting" else MIN_SCORE
    kept: list[Detection] = []
    for thing in sorted(found, key=lambda thing: -thing.score):
        if thing.score > least and _count(kept, thing.name) < MAX_OBJECTS:
            kept.append(thing)
    return kept


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """The relations of `box` to `other`: none when they overlap too much, two on a diagonal."""
    offset = [(box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    size = [box[i + 2] - box[i] + other[i + 2] - other[i] for i in (0, 1)]
    beyond = [math.copysign(max(abs(o) - POSITION_MARGIN * s, 0.0), o) for o, s in zip(offset, size)]
    if all(abs(value) < 1e-3 for value in beyond):
        return set()
    dx, dy = (value / math.hypot(*offset) for value in beyond)
    tests = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in tests.items() if holds}


def is_correct(found: Sequence[Detection], metadata: dict) -> bool:
    """Give GenEval's verdict on an image. `metadata`: `include` (class, count, color?, position?), `exclude`?"""
    return not reasons(found, metadata)


def reasons(found: Sequence[Detection], metadata: dict) -> list[str]:
    """Say what is wrong in an image; empty if nothing is."""
    said: list[str] = []
    groups: list[list[Detection] | None] = []  # what satisfied each requirement, None = nothing did
    for wanted in metadata["include"]:
        name, count, color = wanted["class"], wanted["count"], wanted.get("color")
        group, wrong = _best(found, wanted), ""
        if len(group) < count:
            wrong = f"expected {name}>={count}, found {len(group)}"
        elif color is not None and any(thing.color != color for thing in group):
            colors = Counter(thing.color or "unclear" for thing in group)
            others = ", ".join(f"{number} {other}" for other, number in colors.items())
            wrong = f"expected {color} {name}>={count}, found {colors[color]} {color}; and {others}"
        elif "position" in wanted and not _is_placed(group, groups, wanted["position"]):
            relation, target = wanted["position"]
            others = groups[target]
            if others is None:
                wrong = f"no target for {name} to be {relation}"
            else:
                seen = sorted({one for a in group for b in others for one in relations(a.box, b.box)})
                wrong = f"expected {name} {relation} target, found {' and '.join(seen) or 'no relation'}"
        said += [wrong] if wrong else []
        groups.append(None if wrong else group)
    for banned in metadata.get("exclude", ()):
        number = _count(found, banned["class"])
        if number >= banned["count"]:
            said.append(f"expected {banned['class']}<{banned['count']}, found {number}")
    return said


def is_strict(found: Sequence[Detection], metadata: dict) -> bool:
    """GenEval's verdict, and no object besides the requested ones."""
    asked = sum(wanted["count"] for wanted in metadata["include"])
    return len(found) == asked and is_correct(found, metadata)


def fraction(found: Sequence[Detection], metadata: dict) -> float:
    """The mean over the parts of a request; other objects in the image do not matter.

    The parts are: of every class the share that is there (where the number is asked for, a surplus counts like a
    lack), the share with the right color, and whether the relation holds. An absent object earns nothing for its
    color or its place."""
    exact = _exact(metadata)
    parts, groups = [], []
    for wanted in metadata["include"]:
        group, number = _best(found, wanted), _count(found, wanted["class"])
        complete = len(group) == wanted["count"]
        missing = abs(number - wanted["count"]) if wanted["class"] in exact else wanted["count"] - len(group)
        parts.append(max(0.0, 1 - missing / wanted["count"]))
        if "color" in wanted:
            parts.append(sum(thing.color == wanted["color"] for thing in group) / wanted["count"])
        if "position" in wanted:
            parts.append(float(complete and _is_placed(group, groups, wanted["position"])))
        groups.append(group if complete else None)
    return sum(parts) / len(parts)


def graded(found: Sequence[Detection], metadata: dict) -> float:
    """`fraction`, divided by 1 + the number of objects that the request does not ask for."""
    exact = _exact(metadata)
    asked = sum(
        _count(found, wanted["class"]) if wanted["class"] in exact else len(_best(found, wanted))
        for wanted in metadata["include"]
    )
    return fraction(found, metadata) / (1 + len(found) - asked)


def flow_grpo(found: Sequence[Detection], metadata: dict) -> float:
    """Score as the reward server of Flow-GRPO does (arXiv 2505.05470), two oddities included.

    The mean over parts: of every class 1 - |wanted - found| / wanted, which has no lower bound; its color's and place's
    share, 0 where the number is wrong. A relation that does not hold counts twice, as 0 and as 1.
    """
    parts: list[float] = []
    groups: list[list[Detection] | None] = []
    for wanted in metadata["include"]:
        name, count = wanted["class"], wanted["count"]
        group, number = _best(found, wanted), _count(found, name)
        parts.append(1 - abs(count - number) / count)
        holds = number == count
        if not holds:
            parts += [0.0] if "color" in wanted or "position" in wanted else []
        elif "color" in wanted:
            right = sum(thing.color == wanted["color"] for thing in group)
            parts.append(right / count)
            holds = right == count
        if holds and "position" in wanted:
            if groups[wanted["position"][1]] is None:
                parts.append(0.0)
                holds = False
            else:
                holds = _is_placed(group, groups, wanted["position"])
                parts += [1.0] if holds else [0.0, 1.0]
        groups.append(group if holds else None)
    return sum(parts) / len(parts) if parts else 0.0


def in_words(found: Sequence[Detection]) -> str:
    """Count detected objects in words: "2 cup, 1 red dog"."""
    things = Counter(f"{thing.color} {thing.name}" if thing.color else str(thing.name) for thing in found)
    return ", ".join(f"{number} {name}" for name, number in things.items()) or "nothing"


def _exact(metadata: dict) -> set[str]:
    """The classes whose number is asked for."""
    return {wanted["class"] for wanted in metadata.get("exclude", ())}


def _best(found: Sequence[Detection], wanted: dict) -> list[Detection]:
    """The `count` most certain objects of a class."""
    same = [thing for thing in found if thing.name == wanted["class"]]
    return sorted(same, key=lambda thing: -thing.score)[: wanted["count"]]


def _count(found: Sequence[Detection], name: str) -> int:
    return sum(thing.name == name for thing in found)


def _is_placed(group: list[Detection], groups: list[list[Detection] | None], position: Sequence) -> bool:
    """Tell whether all objects of a group stand so to all of an earlier one; position = [relation, index]."""
    relation, target = position
    others = groups[target]
    return others is not None and all(relation in relations(a.box, b.box) for a in group for b in others)
