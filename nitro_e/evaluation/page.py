"""`report.html` of an evaluation: scores, and images with what was asked for and what the judge saw, in one file.

Failures come first in every task. Of many settings, the images of the best one are shown; of two checkpoints,
also the images that only one of them got right, side by side.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from nitro_e.data.prompts import Prompt
from nitro_e.evaluation.images import Judged
from nitro_e.evaluation.results import task_of
from nitro_e.record.pages import section

PER_TASK = 48  # images of a task
SIDE = 192  # larger images are shown smaller, as JPEG


def gallery(prompts: Sequence[Prompt], rows: Sequence[Judged], folder: Path, title: str) -> str:
    """A section per task: failures by the score called `title` first, the worst ones before the others."""
    tasks: dict[str, list[Judged]] = {}
    for row in rows:
        tasks.setdefault(task_of(prompts[row.index]), []).append(row)
    parts = []
    for task, found in tasks.items():
        right = sum(row.scores[title] == 1 for row in found)
        shown = failures_and_successes(found, title)
        note = f"{right} of {len(found)} right" + (
            f"; {len(shown)} of them here, failures first; all are in {escape(folder.name)}/"
            if len(shown) < len(found)
            else ""
        )
        cards = "".join(
            card([(folder / row.file, verdict(row))], row, prompts[row.index], good=row.scores[title] == 1)
            for row in shown
        )
        parts.append(section(task, f"<p class='note'>{note}</p><div class='cards'>{cards}</div>"))
    return "".join(parts)


def failures_and_successes(rows: Sequence[Judged], title: str) -> list[Judged]:
    """PER_TASK images, by rising score; at least a quarter of them successes if there are that many."""
    ordered = sorted(rows, key=lambda row: -1.0 if math.isnan(row.scores[title]) else row.scores[title])
    failures = [row for row in ordered if row.scores[title] != 1]
    successes = [row for row in ordered if row.scores[title] == 1]
    kept = max(PER_TASK - len(failures), min(PER_TASK // 4, len(successes)))
    return failures[: PER_TASK - min(kept, len(successes))] + successes[:kept]


def changes(
    prompts: Sequence[Prompt], ours: Sequence[Judged], theirs: Sequence[Judged], folders: tuple[Path, Path], title: str
) -> str:  # fmt: skip
    """Two sections: what only `ours` got right, what only `theirs` did; both images of a prompt side by side."""
    parts = []
    for name, sign in (("Better than the other", 1), ("Worse than the other", -1)):
        found = [(a, b) for a, b in zip(ours, theirs) if (a.scores[title] - b.scores[title]) * sign > 0]
        cards = "".join(
            card(
                [(folders[0] / a.file, verdict(a)), (folders[1] / b.file, verdict(b))],
                a,
                prompts[a.index],
                good=sign > 0,
            )
            for a, b in found[:PER_TASK]
        )
        note = f"{len(found)} images" + (f", {PER_TASK} of them here" if len(found) > PER_TASK else "")
        parts.append(
            section(
                name, f"<p class='note'>{note}; left: this one, right: the other.</p><div class='cards'>{cards}</div>"
            )
        )  # fmt: skip
    return "".join(parts)


def card(images: Sequence[tuple[Path, str]], row: Judged, prompt: Prompt, good: bool) -> str:
    """Images of one prompt, what was asked for, and the judge's words on each."""
    shown = "".join(
        f"<img alt='{escape(row.prompt, quote=True)}' title='{escape(words, quote=True)}' src='{source(path)}'>"
        for path, words in images
    )
    unseen = " <em class='fair'>unseen</em>" if prompt.info.get("seen") is False else ""
    words = " | ".join(dict.fromkeys(words for _, words in images))
    return (
        f"<figure class='card {'right' if good else 'wrong'}'><div>{shown}</div>"
        f"<figcaption>{escape(row.prompt)}{unseen}</figcaption><small>{escape(words)}</small></figure>"
    )


def verdict(row: Judged) -> str:
    """ "strict 0, GenEval 1; saw red circle" """
    values = ", ".join(
        f"{name} {'unknown' if math.isnan(value) else f'{value:.3g}'}" for name, value in row.scores.items()
    )
    return values + (f"; saw {row.saw}" if row.saw else "")


def source(path: Path) -> str:
    """A data URL: small PNGs as they are."""
    data, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as image:
        if max(image.size) > SIDE:
            image = image.convert("RGB")
            image.thumbnail((SIDE, SIDE))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=88)
            data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def heading(title: str, facts: str, tiles: dict[str, Any]) -> str:
    boxes = "".join(
        f"<div class='tile'><b>{escape(str(value))}</b><span>{escape(name)}</span></div>"
        for name, value in tiles.items()
    )
    return f"<header><h1>{escape(title)}</h1><p>{escape(facts)}</p><div class='tiles'>{boxes}</div></header>"
