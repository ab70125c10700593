"""Results of a study: what its trainings cost, their validation losses and scores, all paired with the reference.

Scores that a record holds (`studies.record`) are taken from there, the others from the runs. Two intervals stand beside a difference of losses. The one of a seed is over the images of the validation: how sure it
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
from nitro_e.evaluation import diversity, intervals, results
from nitro_e.evaluation.benchmarks import Benchmark, benchmark
from nitro_e.evaluation.evaluate import Evaluation, Options, evaluate
from nitro_e.evaluation.intervals import Estimate
from nitro_e.evaluation.results import Table, plain, signed
from nitro_e.files import write_text
from nitro_e.record.charts import LabelledChart, Series, interval_chart, labelled_chart
from nitro_e.record.environment import default_device, device_name, git_commit
from nitro_e.record.pages import write_comparison
from nitro_e.record.templating import write_page
from nitro_e.stages import validation
from nitro_e.studies.plan import Equal, Setting, Study, Trial, at_equal_flops, judged, trial
from nitro_e.studies.record import Measured, Record, Scores, Spent, subject
from nitro_e.studies.training import Cost, at_equal_time, cost_of, is_done, pair_for_time, seconds_before


@dataclass
class LossRow:
    """The validation losses of one variant, and their differences to the reference's.

    Every seed is paired with the reference's same seed, or its first; the mean over seeds is compared with the mean of
    all the reference's seeds.
    """

    variant: str
    equal: Equal
    seeds: list[int]
    costs: list[Cost]
    losses: list[float]
    by_time: list[float]  # mean over seeds
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

    @property
    def title(self) -> str:
        return next(iter(self.parts[0].scores))

    @property
    def values(self) -> list[float]:
        """The first score of every seed."""
        return [each.scores[self.title] for each in self.parts]

    @property
    def differences(self) -> list[Estimate]:
        """Those of the first score, of every seed that has one."""
        return [each.differences[self.title] for each in self.parts if self.title in each.differences]

    def mean(self, name: str) -> float:
        """Average `seen`, `unseen` or `diversity` over the seeds that have it; NaN if none has."""
        known = [value for each in self.parts if (value := getattr(each, name)) is not None]
        return float(np.mean(known)) if known else math.nan


def done(plan: Study, name: str, equal: Equal) -> list[Trial]:
    """List the finished trainings of a variant, by seed."""
    seeds = plan.seeds_of(name)
    if equal == "seconds":  # of the others the steps are not known yet
        seeds = tuple(s for s in seeds if all(is_done(each.folder) for each in pair_for_time(plan, name, s)))
    make = {"steps": trial, "flops": at_equal_flops, "seconds": at_equal_time}[equal]
    found = [make(plan, name, seed) for seed in seeds]
    return [each for each in found if is_done(each.folder)]


def partner(plan: Study, seed: int) -> Trial | None:
    """Return the finished training of the reference with this seed, or with its first one; None if there is none."""
    others = {each.seed: each for each in done(plan, plan.reference_variant, "steps")}
    return others.get(seed) or next(iter(others.values()), None)


# ---- validation losses


def loss_rows(plan: Study, chosen: Sequence[str]) -> list[LossRow]:
    """Make a row per variant and kind of equality, as far as its trainings are done."""
    found: dict[tuple[str, Equal], list[Trial]] = {}
    for name in filter(plan.is_trained, chosen):
        for equal in plan.equal_of(name):
            if trials := done(plan, name, equal):
                found[name, equal] = trials
    references = done(plan, plan.reference_variant, "steps") if plan.base is None else []
    read = {
        each.folder: validation.read(each.folder)
        for trials in (*found.values(), references)
        for each in trials
    }
    losses = {folder: each.values.mean() for folder, each in read.items()}
    # one training may stand for two kinds of equality
    groups = {tuple(each.folder for each in trials) for trials in (*found.values(), references) if trials}
    deviation, freedom = intervals.pooled_deviation(
        [[losses[folder] for folder in group] for group in groups]
    )
    expected = [losses[each.folder] for each in references]
    rows = []
    for (name, equal), trials in found.items():
        row = LossRow(
            name,
            equal,
            [each.seed for each in trials],
            [cost_of(each.folder, each.config) for each in trials],
            [float(losses[each.folder]) for each in trials],
            np.mean([read[each.folder].values.mean(axis=0) for each in trials], axis=0).tolist(),
        )
        rows.append(row)
        if references and not is_reference(plan, name):
            row.difference = intervals.difference_of_means(row.losses, expected, deviation, freedom)
            partners = {each.seed: each for each in references}
            for each in trials:
                other = partners.get(each.seed, references[0])
                row.differences.append(paired(read[each.folder], read[other.folder]))
    return rows


def is_reference(plan: Study, name: str) -> bool:
    return plan.base is None and name == plan.reference_variant


def paired(ours: validation.Losses, theirs: validation.Losses) -> Estimate:
    """Return the difference of two losses with its interval over images; ConfigError if the images are others."""
    if ours.keys != theirs.keys or ours.times != theirs.times:
        raise ConfigError(
            "validation losses of other images or times cannot be compared; train again with the same"
        )
    return intervals.difference([ours.values.mean(axis=1)], [theirs.values.mean(axis=1)], bounded=False)


# ---- scores


def score_rows(plan: Study, chosen: Sequence[str], out: Path, record: Record) -> list[ScoreRow]:
    """Draw and score what the record does not hold yet; make a row per variant, kind of equality and setting."""
    rows = []
    for name in chosen:
        for equal in plan.equal_of(name) if plan.is_trained(name) else ("steps",):
            found = measured(plan, name, equal, out, record)
            for setting in plan.settings_of(name):
                pairs = [(each, part) for each in found if (part := each.at(setting)) is not None]
                if pairs:
                    trainings, parts = zip(*pairs)
                    seeds, spent = [each.seed for each in trainings], [each.spent for each in trainings]
                    rows.append(ScoreRow(name, equal, setting, seeds, list(parts), spent))
    return rows


def measured(plan: Study, name: str, equal: Equal, out: Path, record: Record) -> list[Measured]:
    """List the scores of a variant's trainings, or of the base, by seed: from the record, or of what is trained here."""
    trained = plan.is_trained(name)
    here = {each.seed: each for each in done(plan, name, equal)} if trained else {None: None}
    found = []
    for seed in plan.seeds_of(name) if trained else (None,):
        known = record.find(name, seed, equal)
        if seed in here and not all(known and known.at(setting) for setting in plan.settings_of(name)):
            known = measure(plan, name, equal, here[seed], out, known)
            record.add(known)
        if known is not None:
            found.append(known)
    return found


def measure(
    plan: Study, name: str, equal: Equal, each: Trial | None, out: Path, known: Measured | None
) -> Measured:
    """Score a training, or the base, at the settings that are not known yet, and read what it has cost."""
    spent = None
    if each is not None:
        cost = cost_of(each.folder, each.config)
        spent = Spent(
            device=device_name(),
            steps=cost.steps,
            cpu_seconds=cost.cpu_seconds,
            before=seconds_before(plan, each),
            memory_gb=cost.memory_gb,
            trained_beside=cost.trained_beside,
        )
    before = () if known is None else known.scores
    missing = [setting for setting in plan.settings_of(name) if known is None or not known.at(setting)]
    seed = None if each is None else each.seed
    return Measured(
        variant=name,
        seed=seed,
        equal=equal,
        of=subject(plan, name, seed),
        scores=(*before, *(scores_at(plan, each, setting, out) for setting in missing)),
        spent=spent,
        revision=git_commit(),
    )


def scores_at(plan: Study, each: Trial | None, setting: Setting, out: Path) -> Scores:
    """Score one training, or the base, at one setting."""
    found, theirs = scored(plan, each, setting, out), opponent(plan, each, setting, out)
    scores = found.results[0].scores
    first = next(iter(scores.values()))
    spread = None if plan.diversity is None else diversity_of(plan, each, setting, out)
    return Scores(
        setting=setting,
        scores={title: score.overall.value for title, score in scores.items()},
        differences={} if theirs is None else compare(found, theirs),
        seen=None if first.seen is None else first.seen.value,
        unseen=None if first.unseen is None else first.unseen.value,
        diversity=None if spread is None or math.isnan(spread) else spread,
    )


def diversity_of(plan: Study, each: Trial | None, setting: Setting, out: Path) -> float:
    """Return the diversity of one training, or of the base, at one setting, over that of the base at the reference's."""
    assert plan.diversity is not None
    several = benchmark(plan.benchmark, plan.diversity.num, plan.diversity.per_prompt)
    found = [
        scored(plan, each, setting, out, several),
        scored(plan, None, plan.reference or setting, out, several),
    ]
    ours, theirs = (
        diversity.spreads(one.prompts, one.results[0].rows, one.results[0].folder) for one in found
    )
    return diversity.ratio(ours, theirs)


def scored(
    plan: Study, each: Trial | None, setting: Setting, out: Path, on: Benchmark | None = None
) -> Evaluation:
    """Score one training, or the base, at one setting; what was drawn before is not drawn again.

    on: another benchmark than the study's.
    """
    source = str(plan.base) if each is None else str(each.folder)
    place = out / ("base" if each is None else each.folder.name)
    place.mkdir(parents=True, exist_ok=True)
    options = Options(device=default_device())
    return evaluate(
        on or judged(plan), [source], {key: [value] for key, value in setting.items()}, options, place
    )


def opponent(plan: Study, each: Trial | None, setting: Setting, out: Path) -> Evaluation | None:
    """Score what a training is compared with: the base, or the reference with the same seed."""
    if plan.base is not None:
        return scored(plan, None, plan.reference or setting, out)
    other = None if each is None else partner(plan, each.seed)
    return None if other is None else scored(plan, other, setting, out)


def compare(ours: Evaluation, theirs: Evaluation) -> dict[str, Estimate]:
    return {
        title: results.compare(ours.prompts, ours.results[0].rows, theirs.results[0].rows, title)["overall"]
        for title in ours.results[0].scores
    }


# ---- tables and files


def write(
    plan: Study, chosen: Sequence[str], out: Path, page: Path | None = None, record: Path | None = None
) -> str:
    """Score what is trained and write OUT/table.md, results.json, charts and curves.html; returns the tables.

    page: where the tables are put as well, see `insert`; of a study with a base without the lines of every setting.
    record: a file of scores and costs, which are not measured again, and to which new ones are added.
    """
    out.mkdir(parents=True, exist_ok=True)
    losses = loss_rows(plan, chosen) if plan.validation is not None else []
    scores = score_rows(plan, chosen, out, Record(plan, record))
    by_variant, by_setting = variant_table(plan, scores), score_table(plan, scores)
    text = "\n\n".join(filter(None, [loss_table(plan, losses), by_variant, by_setting]))
    write_text(out / "table.md", text + "\n")
    if page is not None:
        insert(page, plan.name, text.removesuffix(by_setting).rstrip() if by_variant else text)
    found = {
        "study": to_dict(plan),
        "revision": git_commit(),
        "losses": [dataclasses.asdict(row) for row in losses],
        "scores": [dataclasses.asdict(row) for row in scores],
    }
    write_text(out / "results.json", json.dumps(plain(found), indent=1) + "\n")
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
            seconds = float(np.mean([each.cpu_seconds + each.before for each in spent]))
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
                f"{np.median([each.samples_per_second for each in row.costs]):.0f}",
                f"{np.mean([each.cpu_seconds for each in row.costs]):.0f}",
                f"{np.mean(row.losses):.4f}",
                " ".join(f"{loss:.4f}" for loss in row.losses),
                four(row.difference),
                "; ".join(map(four, row.differences)),
            ]
        )
    compared = "" if plan.base is not None else f", reference {plan.reference_variant}"
    assert plan.validation is not None
    images = len(validation.read(done(plan, rows[0].variant, rows[0].equal)[0].folder).keys)
    note = f"{images} images, {len(plan.validation.times)} times{compared}; 95 % intervals"
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
                f"{np.mean([0.0 if each is None else each.cpu_seconds for each in row.spent]):.0f}",
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
    memory = [each.memory_gb for each in spent if each.memory_gb is not None]
    beside = spent[0].trained_beside
    return [
        f"{spent[0].steps:,}",
        f"{np.mean([each.cpu_seconds for each in spent]):.0f}",
        f"{np.mean([each.cpu_seconds + each.before for each in spent]):.0f}",
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
