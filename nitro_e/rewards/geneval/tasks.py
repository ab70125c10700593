"""The requests behind GenEval's prompts: request <-> caption, and the metadata record that the rules read.

A request is one thing, or two joined by a relation or by "and"; a thing is `count` objects of a class, of one color or
of any. The wording is GenEval's ("two benchs" too), so that reading a prompt back gives its request.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from nitro_e.config import ConfigError

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
CLASSES = (  # COCO's 80, in COCO's order; GenEval renames mouse, remote and keyboard
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


class Thing(NamedTuple):
    """`count` objects of one class; color None = any."""

    name: str
    color: str | None = None
    count: int = 1


class Request(NamedTuple):
    """A caption's content: one thing, or two joined by the relation ("and" if there is none)."""

    tag: str
    things: tuple[Thing, ...]
    relation: str | None = None


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def caption(request: Request) -> str:
    """Word a request as GenEval does: "a photo of an orange car left of a cow"."""
    phrases = []
    for name, color, count in request.things:
        noun = name if color is None else f"{color} {name}"
        article = "an" if noun[0] in "aeiou" else "a"
        phrases.append(f"{article} {noun}" if count == 1 else f"{NUMBERS[count]} {plural(noun)}")
    return "a photo of " + f" {request.relation or 'and'} ".join(phrases)


def metadata(request: Request) -> dict:
    """GenEval's record of a request; for a relation its object comes first, as there."""
    include: list[dict] = []
    for name, color, count in request.things[:: -1 if request.relation else 1]:
        include.append({"class": name, "count": count} | ({"color": color} if color else {}))
    if request.relation:
        include[1]["position"] = [request.relation, 0]
    record: dict = {"tag": request.tag, "include": include}
    if request.tag == "counting":
        record["exclude"] = [{"class": name, "count": count + 1} for name, _, count in request.things]
    return record | {"prompt": caption(request)}


def meaning(request: Request) -> tuple:
    """Equal for requests of the same image: "A and B" = "B and A", "A above B" = "B below A"."""
    things = tuple(tuple(thing) for thing in request.things)
    if request.relation is None:
        return tuple(sorted(things, key=repr))
    if request.relation in ("right of", "below"):
        return things[1], OPPOSITE[request.relation], things[0]
    return things[0], request.relation, things[1]


def read(prompt: str) -> Request:
    """The request that `caption` words as this prompt; ConfigError if there is none."""
    match = re.fullmatch(rf"a photo of (.+?)(?: ({'|'.join(RELATIONS)}|and) (.+))?", prompt)
    phrases = [phrase for phrase in match.group(1, 3) if phrase] if match else []
    things = [_phrases().get(phrase) for phrase in phrases]
    if not things or None in things:
        raise ConfigError(f"'{prompt}' is no prompt of GenEval's templates")
    relation = None if match.group(2) in (None, "and") else match.group(2)
    return Request(_tag(things, relation), tuple(things), relation)


def _tag(things: Sequence[Thing], relation: str | None) -> str:
    if relation:
        return "position"
    if len(things) == 2:
        return "color_attr" if things[0].color else "two_object"
    if things[0].count > 1:
        return "counting"
    return "colors" if things[0].color else "single_object"


@cache
def _phrases() -> dict[str, Thing]:
    """Every noun phrase of the templates -> its thing."""
    things = [Thing(name, color) for name in CLASSES for color in (None, *COLORS)]
    things += [Thing(name, None, count) for name in CLASSES for count in NUMBERS]
    return {caption(Request("", (thing,))).removeprefix("a photo of "): thing for thing in things}
