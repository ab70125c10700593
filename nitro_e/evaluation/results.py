"""Scores of images: per task and overall, seen and unseen combinations apart, paired differences, tables.

A task is the prompt's `tag`, as in GenEval's metadata; overall is the mean of the tasks. Where prompts say whether
they are `seen` (all their combinations occur in training), both kinds are scored over the tasks that have both.
Several images of one prompt are averaged first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from nitro_e.data.prompts import Prompt
from nitro_e.evaluation import intervals
from nitro_e.evaluation.images import ScoredImage
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
    unscored: int = 0  # images whose score is not known
    breakdowns: dict[str, dict[str, Estimate]] | None = None  # such as "challenge" -> each challenge's score


def task_of(prompt: Prompt) -> str:
    return str(prompt.info.get("tag", "all"))


def summarize(
    prompts: Sequence[Prompt], rows: Sequence[ScoredImage], title: str, group_by: Sequence[str] = ()
) -> Score:
    """Summarize the score called `title` of all images `rows` of these prompts.

    group_by: keys of the prompts' records, by whose values there are scores besides those by task.
    """
    values = prompt_means(len(prompts), rows, title)
    found = parts(prompts, values)
    tasks = _by_task(prompts, values)
    every = {
        "overall": intervals.score(found["overall"]),
        "tasks": {task: intervals.score([v]) for task, v in tasks.items()},
        "unscored": sum(math.isnan(row.scores[title]) for row in rows),
        "breakdowns": _by_value(prompts, values, group_by) | _by_count(len(prompts), rows, title) or None,
    }
    if "seen" not in found:
        return Score(**every)
    seen_tasks, unseen_tasks = (_by_task(prompts, values, seen=kind) for kind in (True, False))
    return Score(
        **every,
        seen=intervals.score(found["seen"]),
        unseen=intervals.score(found["unseen"]),
        unseen_to_seen=intervals.ratio(found["unseen"], found["seen"]),
        seen_tasks={task: intervals.score([v]) for task, v in seen_tasks.items()},
        unseen_tasks={task: intervals.score([v]) for task, v in unseen_tasks.items()},
    )


def _by_value(
    prompts: Sequence[Prompt], values: np.ndarray, keys: Sequence[str]
) -> dict[str, dict[str, Estimate]]:
    """Score the prompts by the values that their records have for each of the keys."""
    found: dict[str, dict[str, list[float]]] = {key: {} for key in keys}
    for prompt, value in zip(prompts, values):
        for key in keys:
            found[key].setdefault(str(prompt.info.get(key, "none")), []).append(float(value))
    return {
        key: {name: intervals.score([group]) for name, group in sorted(groups.items())}
        for key, groups in found.items()
    }


def _by_count(num: int, rows: Sequence[ScoredImage], title: str) -> dict[str, dict[str, Estimate]]:
    """Share what was right among all that a reward counted, by category; the images of a prompt are added up."""
    sums: dict[str, dict[str, np.ndarray]] = {}  # (num, 2)
    for row in rows:
        for kind, groups in (row.counts or {}).get(title, {}).items():
            for name, pair in groups.items():
                sums.setdefault(kind, {}).setdefault(name, np.zeros((num, 2)))[row.index] += pair
    return {
        kind: {name: intervals.share(*table.T) for name, table in sorted(groups.items())}
        for kind, groups in sums.items()
    }


def parts(prompts: Sequence[Prompt], values: np.ndarray) -> dict[str, list[list[float]]]:
    """Group the prompts' values by task: overall, and of seen and unseen combinations where tasks have both."""
    found = {"overall": list(_by_task(prompts, values).values())}
    seen, unseen = (_by_task(prompts, values, seen=kind) for kind in (True, False))
    if both := [task for task in seen if task in unseen]:
        found |= {"seen": [seen[task] for task in both], "unseen": [unseen[task] for task in both]}
    return found


def means(prompts: Sequence[Prompt], values: np.ndarray) -> dict[str, float]:
    """The means without intervals, by name: "" overall, "/TASK" if there are several, "/seen", "/unseen"."""
    tasks, found = _by_task(prompts, values), parts(prompts, values)
    logs = {"": intervals.mean(found.pop("overall"))}
    logs |= {f"/{task}": intervals.mean([v]) for task, v in tasks.items() if len(tasks) > 1}
    return logs | {f"/{kind}": intervals.mean(each) for kind, each in found.items()}


def interval(prompts: Sequence[Prompt], values: np.ndarray) -> tuple[float, float]:
    """Return the limits of the 95 % interval of the overall score of one value per prompt."""
    estimate = intervals.score(parts(prompts, values)["overall"])
    return estimate.low, estimate.high


def compare(
    prompts: Sequence[Prompt], ours: Sequence[ScoredImage], theirs: Sequence[ScoredImage], title: str
) -> dict[str, Any]:
    """Paired difference ours - theirs over the same prompts and noise, and how many prompts each does better."""
    a, b = (prompt_means(len(prompts), rows, title) for rows in (ours, theirs))
    a_tasks, b_tasks = (_by_task(prompts, values) for values in (a, b))
    return {
        "overall": intervals.difference(list(a_tasks.values()), list(b_tasks.values())),
        "tasks": {task: intervals.difference([a_tasks[task]], [b_tasks[task]]) for task in a_tasks},
        "better": int((a > b).sum()),
        "worse": int((a < b).sum()),
    }


def by_task(prompts: Sequence[Prompt], rows: Sequence[ScoredImage], title: str) -> dict[str, list[float]]:
    """Task -> a score of its prompts, each averaged over its images; NaN if one of them has none."""
    return _by_task(prompts, prompt_means(len(prompts), rows, title))


def prompt_means(num: int, rows: Sequence[ScoredImage], title: str) -> np.ndarray:
    """Average a prompt's images, (num,); NaN if one of them has no score."""
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


# ---- tables


class Table(NamedTuple):
    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    def as_text(self) -> str:
        """The table for a terminal."""
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines)]
        padded = [map(str.ljust, line, widths) for line in lines]
        return "\n".join(
            [self.title, *("  ".join(line).rstrip() for line in padded), *filter(None, [self.note])]
        )


def shown(estimate: Estimate | None) -> str:
    """0.432 [0.393, 0.472]"""
    if estimate is None or math.isnan(estimate.value):
        return "–"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def short(estimate: Estimate) -> str:
    """0.432"""
    return "–" if math.isnan(estimate.value) else f"{estimate.value:.3f}"


def signed(estimate: Estimate) -> str:
    """+0.031 [-0.004, +0.066]"""
    if math.isnan(estimate.value):
        return "–"
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def task_table(title: str, scores: Mapping[str, Score]) -> Table:
    """A row per task and one for the whole; columns for every score, split into seen and unseen."""
    first = next(iter(scores.values()))
    counts = {**first.tasks, "overall": first.overall}
    head, rows = ["task", "prompts"], [[task, str(estimate.num)] for task, estimate in counts.items()]
    for name, score in scores.items():
        columns = [(name, {**score.tasks, "overall": score.overall})]
        if score.seen is not None:
            columns.append(("seen", {**score.seen_tasks, "overall": score.seen}))
            columns.append(("unseen", {**score.unseen_tasks, "overall": score.unseen}))
        for column, estimates in columns:
            head.append(column)
            for row in rows:
                row.append(shown(estimates.get(row[0])))
    return Table(title, head, rows, note(scores))


def setting_table(title: str, settings: Mapping[str, Mapping[str, Score]]) -> Table:
    """A row per setting; all scores overall, and the parts of the first one, without intervals."""
    some = next(iter(settings.values()))
    main, first = next(iter(some.items()))
    split = ["seen", "unseen", "unseen / seen"] if first.seen is not None else []
    rows = []
    for name, scores in settings.items():
        score = scores[main]
        parts = [score.seen, score.unseen, score.unseen_to_seen] if split else []
        overall = [shown(each.overall) for each in scores.values()]
        rows.append([name, *overall, *map(short, [*parts, *score.tasks.values()])])
    return Table(
        title, ["setting", *some, *split, *first.tasks], rows, f"{note(some, ratios=False)}; parts: {main}"
    )


def breakdown_tables(title: str, scores: Mapping[str, Score]) -> list[Table]:
    """Make a table for everything that scores are broken down by besides tasks; a column per score that is."""
    kinds = dict.fromkeys(kind for score in scores.values() for kind in score.breakdowns or {})
    tables = []
    for kind in kinds:
        found = {name: (score.breakdowns or {}).get(kind, {}) for name, score in scores.items()}
        found = {name: groups for name, groups in found.items() if groups}
        first = next(iter(found.values()))
        rows = [
            [group, str(estimate.num), *(shown(groups.get(group)) for groups in found.values())]
            for group, estimate in first.items()
        ]
        tables.append(Table(f"{title}, by {kind}", [kind, "prompts", *found], rows))
    return tables


def difference_table(title: str, differences: Mapping[str, dict[str, Any]]) -> Table:
    """A row per score."""
    tasks = list(next(iter(differences.values()))["tasks"])
    rows = [
        [name, signed(found["overall"]), str(found["better"]), str(found["worse"])]
        + [signed(found["tasks"][task]) for task in tasks]
        for name, found in differences.items()
    ]
    return Table(title, ["difference", "overall", "better on", "worse on", *tasks], rows)


def note(scores: Mapping[str, Score], ratios: bool = True) -> str:
    """Explain what the columns of a table mean, and what is missing."""
    parts = ["overall: mean of the tasks; [..]: 95 % confidence interval"]
    first = next(iter(scores.values()))
    if first.seen is not None:
        both = [task for task in first.seen_tasks if task in first.unseen_tasks]
        parts.append(f"seen, unseen combinations: mean of the {len(both)} tasks that have both")
        if ratios:
            parts += [f"{name}: unseen / seen = {shown(s.unseen_to_seen)}" for name, s in scores.items()]
    parts += [
        f"{name}: {score.unscored} images could not be scored and are left out"
        for name, score in scores.items()
        if score.unscored
    ]
    return "; ".join(parts)


def plain(value: Any) -> Any:
    """Make JSON of scores: estimates as mappings, NaN and infinity as null."""
    if isinstance(value, Estimate):
        return plain(value._asdict())
    if isinstance(value, Score):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
