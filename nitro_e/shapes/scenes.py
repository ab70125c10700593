"""Scenes of the offline domain: requests in GenEval's six tasks, their captions and metadata, and layouts.

`scene(seed, split, index)` is a pure function; tasks cycle with the index. Lengths are fractions of the image
side. What a caption leaves open (colours, sizes, places) is drawn at random.

The split is over combinations. A fifth of the colour-shape pairs, of the pairs of shapes and of the
number-shape pairs, and four relations with their mirror images, never appear in `train`: no caption names
them, and no training image shows a held-out colour-shape pair even where its caption names no colour.
`heldout` alternates between requests made of seen combinations only and requests with a held-out one; a
single object of any colour is always seen.

As in GenEval, two objects are of two shapes, and held-out relations name no colours. Half of the relations in
`train` do, so that "a red circle left of a blue square" works too.
"""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np

from nitro_e.config import ConfigError, did_you_mean
from nitro_e.rewards.geneval import tasks as geneval
from nitro_e.rewards.geneval.tasks import NUMBERS, OPPOSITE, RELATIONS, TASKS, Request, Thing, plural

SPLITS = ("train", "heldout")
SHAPES = ("circle", "square", "triangle", "star", "cross")
PALETTE = {  # RGB in 0..1; every color has a channel below .3 and every background stays above .5
    "red": (0.88, 0.11, 0.14),
    "orange": (1.00, 0.52, 0.08),
    "yellow": (0.95, 0.87, 0.12),
    "green": (0.11, 0.62, 0.25),
    "cyan": (0.14, 0.80, 0.88),
    "blue": (0.14, 0.25, 0.87),
    "purple": (0.55, 0.14, 0.75),
    "black": (0.05, 0.06, 0.08),
}
COLORS = tuple(PALETTE)

# no training image shows a color with this shape
UNSEEN_COLORED = frozenset(
    zip(COLORS, ("star", "cross", "triangle", "square", "circle", "cross", "star", "triangle"))
)
UNSEEN_PAIRS = frozenset({frozenset({"circle", "star"}), frozenset({"triangle", "cross"})})
UNSEEN_COUNTS = frozenset({(2, "square"), (3, "star"), (4, "triangle")})
UNSEEN_RELATIONS = frozenset(
    {
        ("square", "left of", "star"),
        ("circle", "right of", "triangle"),
        ("star", "above", "cross"),
        ("square", "below", "cross"),
    }
)

EXTENT = 1.12  # every shape fits in a circle of this many radii
MIN_RADIUS = 7.5 / 64
MAX_RADIUS = {1: 12.5 / 64, 2: 12.5 / 64, 3: 11.5 / 64, 4: 10.0 / 64}  # by number of objects
GAP, BORDER = 2.5 / 64, 1.0 / 64  # least free space between two objects, and to the edge
MAX_ANGLE = 0.12  # radians


class Object(NamedTuple):
    shape: str
    color: str
    x: float  # center, from the left
    y: float  # center, from the top
    radius: float
    angle: float  # radians


class Scene(NamedTuple):
    request: Request
    objects: tuple[Object, ...]
    texture: int  # seed of what carries no meaning: background and shades


# every word a caption can contain
WORDS = tuple(
    sorted(
        {"a", "an", "photo", "of", "and", *SHAPES, *map(plural, SHAPES), *COLORS, *NUMBERS.values()}
        | {word for relation in RELATIONS for word in relation.split()}
    )
)
MAX_WORDS = 11  # "a photo of a red circle left of an orange square"


def scene(seed: int, split: str, index: int) -> Scene:
    """Make sample `index` of a split; ConfigError for an unknown split."""
    if split not in SPLITS:
        raise ConfigError(f"split: unknown split '{split}'" + did_you_mean(split, SPLITS))
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    tag = TASKS[index % len(TASKS)]
    seen = split == "train" or tag == "single_object" or index // len(TASKS) % 2 == 0
    colored = split == "train" and rng.random() < 0.5
    request = draw_request(rng, tag, colored)
    while is_seen(request) != seen:
        request = draw_request(rng, tag, colored)
    return Scene(request, draw_objects(rng, request), int(rng.integers(2**63)))


def heldout_prompts(num: int, seed: int = 0) -> list[dict]:
    """List the first `num` held-out requests: GenEval metadata, with `prompt` and `seen`.

    If `num` is a multiple of 12 they are balanced over tasks, and in each task but single_object over seen and
    unseen combinations.
    """
    return [metadata(scene(seed, "heldout", index).request) for index in range(num)]


def draw_request(rng: np.random.Generator, tag: str, colored: bool) -> Request:
    """Draw a request of a task, seen or not, each combination as likely; with `colored`, relations name colors."""
    first, second = (SHAPES[i] for i in rng.permutation(len(SHAPES))[:2])
    color, other = (COLORS[i] for i in rng.permutation(len(COLORS))[:2])
    if tag == "single_object":
        return Request(tag, (Thing(first),))
    if tag == "colors":
        return Request(tag, (Thing(first, color),))
    if tag == "counting":
        return Request(tag, (Thing(first, count=int(rng.integers(2, 5))),))
    if tag == "two_object":
        return Request(tag, (Thing(first), Thing(second)))
    if tag == "color_attr":
        return Request(tag, (Thing(first, color), Thing(second, other)))
    things = (Thing(first, color), Thing(second, other)) if colored else (Thing(first), Thing(second))
    return Request(tag, things, RELATIONS[rng.integers(len(RELATIONS))])


def is_seen(request: Request) -> bool:
    """Say whether a request is made only of combinations that training shows."""
    shapes = [thing.name for thing in request.things]
    if any((thing.color, thing.name) in UNSEEN_COLORED for thing in request.things):
        return False
    if any((thing.count, thing.name) in UNSEEN_COUNTS for thing in request.things):
        return False
    if frozenset(shapes) in UNSEEN_PAIRS:
        return False
    if request.relation is None:
        return True
    first, second = shapes
    stated, mirrored = (first, request.relation, second), (second, OPPOSITE[request.relation], first)
    return stated not in UNSEEN_RELATIONS and mirrored not in UNSEEN_RELATIONS


caption = geneval.caption


def metadata(request: Request) -> dict:
    """Make GenEval's record of a request, plus `seen`."""
    return geneval.metadata(request) | {"seen": is_seen(request)}


def draw_objects(rng: np.random.Generator, request: Request) -> tuple[Object, ...]:
    """Draw objects that fulfil a request, apart from each other and inside the image."""
    looks = []
    for shape, color, count in request.things:
        color = color or rng.choice([color for color in COLORS if (color, shape) not in UNSEEN_COLORED])
        looks += [(shape, str(color))] * count  # the objects of one count share a color
    places = _draw_places(rng, len(looks), request.relation)
    return tuple(Object(*look, *place) for look, place in zip(looks, places))


def _draw_places(rng: np.random.Generator, num: int, relation: str | None) -> list[list[float]]:
    """Draw [x, y, radius, angle] of `num` objects: the first of many layouts that keeps gaps and relation."""
    tries = 32 if num < 4 else 128
    while True:
        radius = rng.uniform(MIN_RADIUS, MAX_RADIUS[num], (tries, num))
        margin = EXTENT * radius + BORDER
        x, y = margin + rng.random((2, tries, num)) * (1 - 2 * margin)
        good = np.ones(tries, bool)
        for i, j in combinations(range(num), 2):
            distance = np.hypot(x[:, i] - x[:, j], y[:, i] - y[:, j])
            good &= distance >= EXTENT * (radius[:, i] + radius[:, j]) + GAP
        if relation:
            good &= _related(relation, x, y, radius)
        if good.any():
            row = good.argmax()
            angle = rng.uniform(-MAX_ANGLE, MAX_ANGLE, num)
            return np.stack([x[row], y[row], radius[row], angle], axis=1).tolist()


def _related(relation: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Find layouts whose object 0 is in `relation` to object 1, and in no other, by GenEval's rule with some room."""
    dx, dy = x[:, 0] - x[:, 1], y[:, 0] - y[:, 1]
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("left of", "above"):
        along = -along
    slack = 0.1 * 2 * EXTENT * radius.sum(axis=1)
    distance = np.hypot(dx, dy)
    return (along - slack > 0.6 * distance) & (np.abs(across) - slack < 0.4 * distance)
