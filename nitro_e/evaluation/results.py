"""Scores of judged images: per task and overall, seen and unseen combinations apart, paired differences, tables.

A task is the prompt's `tag`, as in GenEval's metadata; overall is the mean of the tasks. Where prompts say whether
they are `seen` (all their combinations occur in training), both kinds are scored over the tasks that have both.
Several images of one prompt are averaged first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nitro_e.data.prompts import Prompt
from nitro_e.evaluation import intervals as statistics
from nitro_e.evaluation.images import Judged
from nitro_e.evaluation.intervals import Estimate


@dataclass(frozen=True)
class Score:
    """One score of one setting."""

    overall: Estimate
    tasks: dict[str, Estimate]
    seen: Estimate | None = None  # over the tasks that have both kinds
    unseen: Estimate | None = None
    unseen_to_seen: Estimate | None = None
    seen_tasks: dict[str, Estimate] | None = None
    unseen_tasks: dict[str, Estimate] | None = None
    unscored: int = 0  # images the judge could not tell


def task_of(prompt: Prompt) -> str:
    return str(prompt.info.get("tag", "all"))


def summarize(prompts: Sequence[Prompt], rows: Sequence[Judged], title: str) -> Score:
    """The score called `title` of all images `rows` of these prompts."""
    values = prompt_means(len(prompts), rows, title)
    tasks = _by_task(prompts, values)
    score = Score(
        overall=statistics.score(list(tasks.values())),
        tasks={task: statistics.score([v]) for task, v in tasks.items()},
        unscored=sum(math.isnan(row.scores[title]) for row in rows),
    )
    seen, unseen = (_by_task(prompts, values, seen=kind) for kind in (True, False))
    both = [task for task in seen if task in unseen]
    if not both:
        return score
    parts = [statistics.score([kind[task] for task in both]) for kind in (seen, unseen)]
    return Score(
        score.overall, score.tasks, *parts, statistics.ratio(parts[1], parts[0]),
        *({task: statistics.score([v]) for task, v in kind.items()} for kind in (seen, unseen)), score.unscored,
    )  # fmt: skip


def compare(
    prompts: Sequence[Prompt], ours: Sequence[Judged], theirs: Sequence[Judged], title: str
) -> dict[str, Any]:
    """Paired difference ours - theirs over the same prompts and noise, and how many prompts each does better."""
    pairs = [prompt_means(len(prompts), rows, title) for rows in (ours, theirs)]
    tasks = [_by_task(prompts, values) for values in pairs]
    per_task = {task: statistics.difference([tasks[0][task]], [tasks[1][task]]) for task in tasks[0]}
    return {
        "overall": statistics.difference(list(tasks[0].values()), list(tasks[1].values())),
        "tasks": per_task,
        "better": int((pairs[0] > pairs[1]).sum()),
        "worse": int((pairs[0] < pairs[1]).sum()),
    }


def prompt_means(num: int, rows: Sequence[Judged], title: str) -> np.ndarray:
    """(num,) mean over a prompt's images; NaN if one of them has no score."""
    values: list[list[float]] = [[] for _ in range(num)]
    for row in rows:
        values[row.index].append(row.scores[title])
    return np.array([np.mean(each) if each else math.nan for each in values])


def _by_task(
    prompts: Sequence[Prompt], values: np.ndarray, seen: bool | None = None
) -> dict[str, list[float]]:
    """Task -> values of its prompts, all or those of one kind, in the order of the prompts."""
    tasks: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values):
        if seen is None or prompt.info.get("seen") is seen:
            tasks.setdefault(task_of(prompt), []).append(float(value))
    return tasks


# ---- telling


def shown(estimate: Estimate | None) -> str:
    """0.432 [0.393, 0.472]"""
    if estimate is None or math.isnan(estimate.value):
        return "–"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def short(estimate: Estimate) -> str:
    return "–" if math.isnan(estimate.value) else f"{estimate.value:.3f}"


def task_table(scores: dict[str, Score]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row per task and one for the whole; columns for every score, split into seen and unseen."""
    head, rows = ["task", "prompts"], {}
    first = next(iter(scores.values()))
    for task, estimate in first.tasks.items():
        rows[task] = [task, str(estimate.num)]
    rows["overall"] = ["overall", str(first.overall.num)]
    for title, score in scores.items():
        columns = [(title, {**score.tasks, "overall": score.overall})]
        if score.seen is not None:
            columns.append(("seen", {**score.seen_tasks, "overall": score.seen}))
            columns.append(("unseen", {**score.unseen_tasks, "overall": score.unseen}))
        for name, estimates in columns:
            head.append(name)
            for task, row in rows.items():
                row.append(shown(estimates.get(task)))
    return head, list(rows.values())


def note(scores: dict[str, Score], ratios: bool = True) -> str:
    """What the tables mean, and what is missing."""
    parts = ["overall: mean of the tasks; [..]: 95 % confidence interval"]
    first = next(iter(scores.values()))
    if first.seen is not None:
        both = [task for task in first.seen_tasks if task in first.unseen_tasks]
        parts.append(f"seen, unseen combinations: mean of the {len(both)} tasks that have both")
        if ratios:
            parts += [
                f"{title}: unseen / seen = {shown(score.unseen_to_seen)}" for title, score in scores.items()
            ]
    parts += [
        f"{title}: {score.unscored} images could not be scored and are left out"
        for title, score in scores.items()
        if score.unscored
    ]
    return "; ".join(parts)


def setting_table(
    settings: Sequence[tuple[str, dict[str, Score]]],
) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row per setting; all scores overall, and the parts of the first one, without intervals."""
    first = next(iter(settings[0][1].values()))
    split = ["seen", "unseen", "unseen / seen"] if first.seen is not None else []
    head = ["setting", *settings[0][1], *split, *first.tasks]
    rows = []
    for name, scores in settings:
        main = next(iter(scores.values()))
        parts = [main.seen, main.unseen, main.unseen_to_seen] if split else []
        values = [*parts, *main.tasks.values()]
        rows.append([name, *map(shown, (score.overall for score in scores.values())), *map(short, values)])
    return head, rows


def difference_table(differences: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row per score."""
    tasks = list(next(iter(differences.values()))["tasks"])
    rows = [
        [title, signed(found["overall"]), str(found["better"]), str(found["worse"])]
        + [signed(found["tasks"][task]) for task in tasks]
        for title, found in differences.items()
    ]
    return ["difference", "overall", "better on", "worse on", *tasks], rows


def signed(estimate: Estimate) -> str:
    """+0.031 [-0.004, +0.066]"""
    if math.isnan(estimate.value):
        return "–"
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def as_text(head: list[str], rows: list[list[str]]) -> str:
    """A table for a terminal."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]
    )


def plain(value: Any) -> Any:
    """For JSON: estimates as mappings, NaN and infinity as null."""
    if isinstance(value, Estimate):
        return plain(value._asdict())
    if isinstance(value, Score):
        return {key: plain(getattr(value, key)) for key in asdict(value)}
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
