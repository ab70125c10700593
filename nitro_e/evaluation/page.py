"""The images of an evaluation's `report.html`: what was asked for, the verdict, and what the detector saw.

Failures come first in every task. Of many settings, the images of the best one are shown; of two checkpoints,
also the images that only one of them got right, side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from nitro_e.data.prompts import Prompt
from nitro_e.evaluation.images import ScoredImage
from nitro_e.evaluation.results import task_of
from nitro_e.record.templating import data_url

PER_TASK = 48  # images of a task
SIDE = 192  # pixels; larger images are shown smaller


class Card(NamedTuple):
    """One prompt, with one image or with those of two checkpoints."""

    images: list[tuple[str, str]]  # (source, verdict)
    prompt: str
    unseen: bool  # a combination that no training caption names
    good: bool


class Album(NamedTuple):
    """A section of the page."""

    title: str
    note: str
    cards: list[Card]


def by_task(
    prompts: Sequence[Prompt],
    rows: Sequence[ScoredImage],
    folder: Path,
    title: str,
    lower_is_better: bool = False,
) -> list[Album]:
    """An album per task: by the score called `title`, the worst images first."""
    tasks: dict[str, list[ScoredImage]] = {}
    for row in rows:
        tasks.setdefault(task_of(prompts[row.index]), []).append(row)
    albums = []
    for task, found in tasks.items():
        if all(row.scores[title] in (0, 1) or math.isnan(row.scores[title]) for row in found):
            shown = failures_and_successes(found, title)
            note = f"{sum(row.scores[title] == 1 for row in found)} of {len(found)} right"
        else:
            shown = worst_and_best(found, title, lower_is_better)
            note = f"{len(found)} images, the worst first"
        if len(shown) < len(found):
            note += f"; {len(shown)} of them here; all are in {folder.name}/"
        cards = [card([(folder, row)], prompts[row.index], good=row.scores[title] == 1) for row in shown]
        albums.append(Album(task, note, cards))
    return albums


def failures_and_successes(rows: Sequence[ScoredImage], title: str) -> list[ScoredImage]:
    """PER_TASK images, by rising score; at least a quarter of them successes if there are that many."""
    ordered = sorted(rows, key=lambda row: -1.0 if math.isnan(row.scores[title]) else row.scores[title])
    failures = [row for row in ordered if row.scores[title] != 1]
    successes = [row for row in ordered if row.scores[title] == 1]
    kept = max(PER_TASK - len(failures), min(PER_TASK // 4, len(successes)))
    return failures[: PER_TASK - min(kept, len(successes))] + successes[:kept]


def worst_and_best(rows: Sequence[ScoredImage], title: str, lower_is_better: bool) -> list[ScoredImage]:
    """PER_TASK images of a score that is no verdict, the worst first: three quarters worst ones, then the best."""
    sign = -1 if lower_is_better else 1
    known = [row for row in rows if not math.isnan(row.scores[title])]
    ordered = sorted(known, key=lambda row: sign * row.scores[title])
    if len(ordered) <= PER_TASK:
        return ordered
    return ordered[: PER_TASK * 3 // 4] + ordered[-PER_TASK // 4 :]


def changes(
    prompts: Sequence[Prompt],
    ours: tuple[Path, Sequence[ScoredImage]],
    theirs: tuple[Path, Sequence[ScoredImage]],
    title: str,
    lower_is_better: bool = False,
) -> list[Album]:
    """Two albums of pairs, what `ours` got better and what `theirs` did; a side is its folder and rows."""
    albums, better = [], -1 if lower_is_better else 1
    for name, sign in (("Better than the other", better), ("Worse than the other", -better)):
        pairs = zip(ours[1], theirs[1])
        found = [(a, b) for a, b in pairs if (a.scores[title] - b.scores[title]) * sign > 0]
        note = f"{len(found)} images" + (f", {PER_TASK} of them here" if len(found) > PER_TASK else "")
        cards = [
            card([(ours[0], a), (theirs[0], b)], prompts[a.index], good=sign == better)
            for a, b in found[:PER_TASK]
        ]
        albums.append(Album(name, f"{note}; left: this one, right: the other.", cards))
    return albums


def card(images: Sequence[tuple[Path, ScoredImage]], prompt: Prompt, good: bool) -> Card:
    """Read the images of one prompt, each given by its folder and row."""
    shown = []
    for folder, row in images:
        with Image.open(folder / row.file) as image:
            shown.append((data_url(image, SIDE), verdict(row)))
    return Card(shown, images[0][1].prompt, prompt.info.get("seen") is False, good)


def verdict(row: ScoredImage) -> str:
    """ "strict 0, GenEval 1; saw red circle" """
    values = ", ".join(
        f"{name} {'unknown' if math.isnan(value) else f'{value:.3g}'}" for name, value in row.scores.items()
    )
    return values + (f"; saw {row.saw}" if row.saw else "")
