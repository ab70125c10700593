"""Results of a study: what its trainings cost, their validation losses and scores, all paired with the reference.

Two intervals stand beside a difference of losses. The one of a seed is over the images of the validation: how sure it
is that these two sets of weights differ. The one of the mean is over trainings: Student's t with the spread of seeds
within variants, pooled over all variants of the study. Only the second says something about the variant.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nitro_e.config import ConfigError, read_text, to_dict
from nitro_e.evaluation import intervals
from nitro_e.evaluation.intervals import Estimate
from nitro_e.evaluation.results import Table, plain, signed
from nitro_e.files import write_text
from nitro_e.record.charts import LabelledChart, Series, interval_chart, labelled_chart
from nitro_e.record.environment import git_commit
from nitro_e.record.pages import write_comparison
from nitro_e.record.templating import write_page
from nitro_e.studies.measure import done, measured
from nitro_e.studies.plan import Equal, Setting, Study
from nitro_e.studies.record import Losses, Measured, Record, Scores, Spent
from nitro_e.studies.training import Cost


@dataclass
class LossRow:
    """The validation losses of one variant, and their differences to the reference's.

    Every seed is paired with the reference's same seed, or its first; the mean over seeds is compared with the mean of
    all the reference's seeds.
    """

    variant: str
    equal: Equal
    seeds: list[int | None]
    costs: list[Cost]
    losses: list[float]
    by_time: list[float]  # mean over seeds
    images: int
    differences: list[Estimate] = field(default_factory=list)  # of every seed, paired by image
    difference: Estimate = intervals.UNKNOWN  # of the means over seeds


@dataclass
class ScoreRow:
    """One variant at one setting."""

    variant: str
    equal: Equal
    setting: Setting
    seeds: list[int | None]  # None: the base
    parts: list[Scores]  # of every seed
    spent: list[Spent | None]
    differences: list[Estimate]  # of the first score, of every seed where it is known

    @property
    def title(self) -> str:
        return next(iter(self.parts[0].scores))

    @property
    def values(self) -> list[float]:
        """The first score of every seed."""
        return [each.scores[self.title] for each in self.parts]

    def mean(self, name: str) -> float:
        """Average `seen`, `unseen` or `diversity` over the seeds that have it; NaN if none has."""
        known = [value for each in self.parts if (value := getattr(each, name)) is not None]
        return float(np.mean(known)) if known else math.nan


Found = dict[tuple[str, Equal], list[Measured]]  # (variant, kind of equality) -> by seed


def partner(references: Sequence[Measured], seed: int | None) -> Measured | None:
    """Return the reference with this seed, or the first one; None if there is none."""
    return {each.seed: each for each in references}.get(seed) or next(iter(references), None)


# ---- validation losses


def loss_rows(plan: Study, found: Found, references: Sequence[Measured]) -> list[LossRow]:
    """Make a row per variant and kind of equality."""
    trainings = {key: part for key, each in found.items() if (part := [one for one in each if one.losses])}
    # one training may stand for two kinds of equality
    groups = {
        tuple(each.run for each in part): [mean_loss(each) for each in part]
        for part in (*trainings.values(), references)
        if part
    }
    deviation, freedom = intervals.pooled_deviation(list(groups.values()))
    rows = []
    for (name, equal), part in trainings.items():
        losses = [each.losses for each in part if each.losses]
        row = LossRow(
            variant=name,
            equal=equal,
            seeds=[each.seed for each in part],
            costs=[each.spent.cost for each in part if each.spent],
            losses=[mean_loss(each) for each in part],
            by_time=np.mean([each.by_time for each in losses], axis=0).tolist(),
            images=len(losses[0].by_image),
        )
        rows.append(row)
        if references and not is_reference(plan, name):
            expected = [mean_loss(each) for each in references]
            row.difference = intervals.difference_of_means(row.losses, expected, deviation, freedom)
            for each in part:
                other = partner(references, each.seed)
                if each.losses and other and other.losses:
                    row.differences.append(paired(each.losses, other.losses))
    return rows


def mean_loss(each: Measured) -> float:
    return float(np.mean(each.losses.by_image)) if each.losses else math.nan


def is_reference(plan: Study, name: str) -> bool:
    return plan.base is None and name == plan.reference_variant


def paired(ours: Losses, theirs: Losses) -> Estimate:
    """Return the difference of two losses with its interval over images; ConfigError if the images are others."""
    if ours.images != theirs.images or ours.times != theirs.times:
        raise ConfigError(
            "validation losses of other images or times cannot be compared; train again with the same"
        )
    return intervals.difference([ours.by_image], [theirs.by_image], bounded=False)


# ---- scores


def score_rows(plan: Study, found: Found, references: Sequence[Measured]) -> list[ScoreRow]:
    """Make a row per variant, kind of equality and setting."""
    rows = []
    for (name, equal), trainings in found.items():
        for setting in plan.settings_of(name):
            pairs = [(each, part) for each in trainings if (part := each.at(setting)) is not None]
            if pairs:
                differences = [difference(plan, each, part, references) for each, part in pairs]
                rows.append(
                    ScoreRow(
                        variant=name,
                        equal=equal,
                        setting=setting,
                        seeds=[each.seed for each, _ in pairs],
                        parts=[part for _, part in pairs],
                        spent=[each.spent for each, _ in pairs],
                        differences=[each for each in differences if each is not None],
                    )
                )
    return rows


def difference(plan: Study, each: Measured, part: Scores, references: Sequence[Measured]) -> Estimate | None:
    """Return the difference of the first score to the base's, or to the reference's with the same seed."""
    if plan.base is not None:
        return part.difference
    other = partner(references, each.seed)
    theirs = other and other.at(part.setting)
    if theirs is None or part.by_task is None or theirs.by_task is None:
        return None
    return intervals.difference(list(part.by_task.values()), list(theirs.by_task.values()))


# ---- tables and files


def write(
    plan: Study, chosen: Sequence[str], out: Path, page: Path | None = None, record: Path | None = None
) -> str:
    """Score what is trained and write OUT/table.md, results.json, charts and curves.html; returns the tables.

    page: where the tables are put as well, see `insert`; of a study with a base without the lines of every setting.
    record: a file of what was measured before, and to which the rest is added, see `Record`.
    """
    out.mkdir(parents=True, exist_ok=True)
    recorded = Record(plan, record)
    found = {
        (name, equal): measured(plan, name, equal, out, recorded)
        for name in chosen
        for equal in (plan.equal_of(name) if plan.is_trained(name) else ("steps",))
    }
    references = (
        [] if plan.base is not None else measured(plan, plan.reference_variant, "steps", out, recorded)
    )
    losses, scores = loss_rows(plan, found, references), score_rows(plan, found, references)
    by_variant, by_setting = variant_table(plan, scores), score_table(plan, scores)
    text = "\n\n".join(filter(None, [loss_table(plan, losses), by_variant, by_setting]))
    write_text(out / "table.md", text + "\n")
    if page is not None:
        insert(page, plan.name, text.removesuffix(by_setting).rstrip() if by_variant else text)
    content = {
        "study": to_dict(plan),
        "revision": git_commit(),
        "losses": [dataclasses.asdict(row) for row in losses],
        "scores": [dataclasses.asdict(row) for row in scores],
    }
    write_text(out / "results.json", json.dumps(plain(content), indent=1) + "\n")
    written = [out / "table.md", out / "results.json"]
    shown = {row_name(row): row.difference for row in losses if not math.isnan(row.difference.value)}
    if shown:
        title = f"Validation loss minus that of {plan.reference_variant}"
        written.append(
            write_page(out / "differences.svg", "intervals.svg", chart=interval_chart(title, shown))
        )
    written += [
        write_page(out / f"{name}.svg", "labelled.svg", chart=chart)
        for name, chart in score_charts(plan, scores).items()
    ]
    runs = {each.folder: each for row in losses for each in done(plan, row.variant, row.equal)}
    if runs:
        written.append(write_comparison(list(runs), out / "curves.html"))
    return f"{text}\n\n{', '.join(map(str, written))}; images under {out}"


def score_charts(plan: Study, rows: Sequence[ScoreRow]) -> dict[str, LabelledChart]:
    """Draw the first score of a study with a base by the sampler's steps, and by compute at the first setting.

    Settings that differ in more than their steps are lines of their own.
    """
    by_steps: dict[str, list[tuple[float, float]]] = {}
    by_compute = []
    for row in rows if plan.base is not None and plan.settings else ():
        score = float(np.mean(row.values))
        if "steps" in row.setting:
            by_steps.setdefault(row.variant + kind_of(plan, row.setting), []).append(
                (float(row.setting["steps"]), score)
            )
        if (spent := alike(row.spent)) and row.setting.get("steps") == plan.settings[0].get("steps"):
            seconds = float(np.mean([each.cost.cpu_seconds + each.before for each in spent]))
            by_compute.append(Series(row.variant, [(seconds, score)]))
    lines = [Series(name, sorted(points)) for name, points in by_steps.items()]
    charts = {}
    if lines:
        charts["steps"] = labelled_chart("Score by steps of the sampler", lines, "steps")
    if by_compute:
        first = ", ".join(f"{key} {value}" for key, value in plan.settings[0].items())
        charts["compute"] = labelled_chart(
            f"Score at {first} by CPU seconds of training and of what it needs", by_compute, "CPU seconds"
        )
    return charts


def alike(spent: Sequence[Spent | None]) -> list[Spent]:
    """List the costs that were measured on the same kind of machine as the first seed's; times of others mean little."""
    known = [each for each in spent if each is not None]
    return [each for each in known if each.device == known[0].device]


def kind_of(plan: Study, setting: Setting) -> str:
    """Name what a setting has besides steps, where it differs from the study's first: ", guidance_scale 3"."""
    usual = {"force": True, **plan.settings[0], "steps": setting["steps"]}
    return "".join(f", {key} {value}" for key, value in setting.items() if usual.get(key) != value)


def row_name(row: LossRow) -> str:
    return row.variant if row.equal == "steps" else f"{row.variant}, equal {row.equal}"


def loss_table(plan: Study, rows: Sequence[LossRow]) -> str:
    """Write the validation losses and what they cost as Markdown."""
    if not rows:
        return ""
    unit = next((row for row in rows if is_reference(plan, row.variant)), rows[0]).costs[0].flops
    head = ["variant", "equal", "steps", "parameters", "FLOPs of the reference", "samples/s", "CPU s"]
    head += [
        "validation loss",
        "of each seed",
        "minus the reference [over seeds]",
        "of each seed [over images]",
    ]
    lines = []
    for row in rows:
        cost = row.costs[0]
        lines.append(
            [
                row.variant,
                row.equal,
                f"{cost.steps:,}",
                f"{cost.parameters:,}",
                f"{cost.flops / unit:.3f}" if cost.flops and unit else "–",
                f"{np.median([each.samples_per_second or math.nan for each in row.costs]):.0f}",
                f"{np.mean([each.cpu_seconds for each in row.costs]):.0f}",
                f"{np.mean(row.losses):.4f}",
                " ".join(f"{loss:.4f}" for loss in row.losses),
                four(row.difference),
                "; ".join(map(four, row.differences)),
            ]
        )
    compared = "" if plan.base is not None else f", reference {plan.reference_variant}"
    assert plan.validation is not None
    note = f"{rows[0].images} images, {len(plan.validation.times)} times{compared}; 95 % intervals"
    return f"{markdown(Table('', head, lines))}\n\n{note}"


def four(estimate: Estimate) -> str:
    """Write a difference of losses with its interval, to four digits."""
    if math.isnan(estimate.value):
        return "–"
    interval = "" if math.isnan(estimate.low) else f" [{estimate.low:+.4f}, {estimate.high:+.4f}]"
    return f"{estimate.value:+.4f}{interval}"


def score_table(plan: Study, rows: Sequence[ScoreRow]) -> str:
    """Write the first score as Markdown: means over seeds, every seed's, and the paired differences."""
    if not rows:
        return ""
    against = "base" if plan.base is not None else plan.reference_variant
    head = ["variant", *(["equal"] if plan.base is None else []), "setting"]
    head += [f"{rows[0].title} (mean of seeds)"]
    head += ["of each seed", f"minus {against}: mean", "of each seed", "CPU s"]
    split = any(not math.isnan(row.mean("unseen")) for row in rows)
    head += [*(["seen", "unseen"] if split else []), *(["diversity"] if plan.diversity else [])]
    lines = []
    for row in rows:
        lines.append(
            [
                row.variant,
                *([row.equal] if plan.base is None else []),
                ", ".join(f"{key} {value}" for key, value in row.setting.items()),
                f"{np.mean(row.values):.3f}",
                " ".join(f"{score:.3f}" for score in row.values),
                f"{np.mean([each.value for each in row.differences]):+.3f}" if row.differences else "–",
                " ".join(map(signed, row.differences)) or "–",
                f"{np.mean([0.0 if each is None else each.cost.cpu_seconds for each in row.spent]):.0f}",
                *([known(row.mean("seen"), 3), known(row.mean("unseen"), 3)] if split else []),
                *([known(row.mean("diversity"))] if plan.diversity else []),
            ]
        )
    where = f" at {plan.reference}" if plan.reference else ""
    base = f"base {plan.base}{where}" if plan.base is not None else f"reference {against}"
    note = f"{plan.num} prompts of {plan.benchmark}, {base}; 95 % intervals, paired"
    return f"{markdown(Table('', head, lines))}\n\n{note}"


def known(value: float, digits: int = 2) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def variant_table(plan: Study, rows: Sequence[ScoreRow]) -> str:
    """Write a line per variant of a study with a base as Markdown: its score at every setting, and what it has cost.

    Scores are means over seeds, with those of the seeds behind them; memory is the largest. Seconds are of the machine
    of the first seed. The rest is that of the first setting.
    """
    if plan.base is None or not any(plan.is_trained(row.variant) for row in rows):
        return ""
    wanted = [named(setting) for setting in plan.settings]
    head = ["variant", *(f"{rows[0].title}, {name}" for name in wanted), "minus base at the first"]
    head += ["unseen", *(["diversity"] if plan.diversity else [])]
    head += ["steps", "CPU s", "with what it needs", "peak memory, GB", "trained beside", "needs"]
    lines = []
    for name in dict.fromkeys(row.variant for row in rows):
        found = {named(row.setting): row for row in rows if row.variant == name}
        first = found.get(wanted[0]) if wanted else None
        line = [name, *(by_seed(found[key].values) if key in found else "–" for key in wanted)]
        line.append(signed(intervals.over_seeds(first.differences)) if first and first.differences else "–")
        line.append(known(first.mean("unseen") if first else math.nan, 3))
        if plan.diversity:
            line.append(known(first.mean("diversity") if first else math.nan))
        lines.append([*line, *costs_of(plan, name, next(iter(found.values())))])
    lines.sort(key=lambda line: line[1], reverse=True)
    table = markdown(Table("", head, lines))
    return f"{table}{seeds_note([row for row in rows if wanted and named(row.setting) == wanted[0]])}"


def by_seed(values: Sequence[float]) -> str:
    """Write the mean, and behind it the values of several seeds."""
    each = " ".join(f"{value:.3f}" for value in values)
    return f"{np.mean(values):.3f} ({each})" if len(values) > 1 else f"{values[0]:.3f}"


def seeds_note(rows: Sequence[ScoreRow]) -> str:
    """Say how much two trainings of one variant differ, if any has two."""
    several = [row.values for row in rows if len(row.values) > 1]
    if not several:
        return ""
    deviation, freedom = intervals.pooled_deviation(several)
    return (
        f"\n\nIn brackets the seeds. Trainings of one variant have a standard deviation of {deviation:.3f} in the first "
        f"column ({freedom} degrees of freedom); the interval of a mean is the mean of the seeds' intervals."
    )


def named(setting: Setting) -> str:
    """Name a setting by what decides the images: "guidance_scale 1, steps 4"."""
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in setting.items()
        if key != "force"
    )


def costs_of(plan: Study, name: str, row: ScoreRow) -> list[str]:
    """Return the cells of a variant's costs: steps, CPU seconds, peak memory, parameters beside, and what it needs."""
    spent, variant = alike(row.spent), plan.variants[name]
    if not spent:
        return ["–"] * 6
    costs = [each.cost for each in spent]
    memory = [cost.memory_gb for cost in costs if cost.memory_gb is not None]
    beside = costs[0].trained_beside
    return [
        f"{costs[0].steps:,}",
        f"{np.mean([cost.cpu_seconds for cost in costs]):.0f}",
        f"{np.mean([each.cost.cpu_seconds + each.before for each in spent]):.0f}",
        f"{max(memory):.1f}" if memory else "–",
        "–" if beside is None else f"{beside:,}",
        ", ".join([*variant.needs, *([variant.after] if variant.after else [])]) or "–",
    ]


def check_page(page: Path, name: str) -> None:
    """ConfigError for a page that has no place for the tables called `name`."""
    begin, end = marks(name)
    text = read_text(page)
    if text.count(begin) != 1 or end not in text.partition(begin)[2]:
        raise ConfigError(
            f"{page} has no lines '{begin}' and '{end}', between which tables are put; write them"
        )


def insert(page: Path, name: str, tables: str) -> None:
    """Put tables into a page, in place of those that are there."""
    check_page(page, name)
    begin, end = marks(name)
    before, _, rest = read_text(page).partition(begin)
    write_text(page, f"{before}{begin}\n{tables}\n{end}{rest.partition(end)[2]}")


def marks(name: str) -> tuple[str, str]:
    """Return the lines of a page between which the tables called `name` stand."""
    return f"<!-- begin {name} -->", f"<!-- end {name} -->"


def markdown(table: Table) -> str:
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
