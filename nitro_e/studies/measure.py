"""From a finished training to what a study keeps of it: costs, validation losses, scores of drawn images."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from nitro_e.evaluation import diversity, results
from nitro_e.evaluation.benchmarks import Benchmark, benchmark
from nitro_e.evaluation.evaluate import Evaluation, Options, evaluate
from nitro_e.record.environment import device_name, git_commit
from nitro_e.stages import validation
from nitro_e.studies.plan import Equal, Setting, Study, Trial, at_equal_flops, judged, trial
from nitro_e.studies.record import Losses, Measured, Record, Scores, Spent, subject
from nitro_e.studies.training import at_equal_time, cost_of, is_done, pair_for_time, seconds_before

DIGITS = 6  # of stored losses


def done(plan: Study, name: str, equal: Equal) -> list[Trial]:
    """List the finished trainings of a variant, by seed."""
    seeds = plan.seeds_of(name)
    if equal == "seconds":  # of the others the steps are not known yet
        seeds = tuple(s for s in seeds if all(is_done(each.folder) for each in pair_for_time(plan, name, s)))
    make = {"steps": trial, "flops": at_equal_flops, "seconds": at_equal_time}[equal]
    found = [make(plan, name, seed) for seed in seeds]
    return [each for each in found if is_done(each.folder)]


def measured(plan: Study, name: str, equal: Equal, out: Path, record: Record) -> list[Measured]:
    """List what is known of a variant's trainings, or of the base, by seed: from the record, or of what is trained here."""
    trained = plan.is_trained(name)
    here = {each.seed: each for each in done(plan, name, equal)} if trained else {None: None}
    found = []
    for seed in plan.seeds_of(name) if trained else (None,):
        known = record.find(name, seed, equal)
        settings = plan.settings_of(name)
        missing = settings if known is None else known.without(settings)
        if seed in here and (missing or known is None):
            scores = tuple(scores_at(plan, here[seed], setting, out) for setting in missing)
            known = describe(plan, name, equal, here[seed], (*(known.scores if known else ()), *scores))
            record.add(known)
        if known is not None:
            found.append(known)
    return found


def describe(
    plan: Study, name: str, equal: Equal, each: Trial | None, scores: tuple[Scores, ...]
) -> Measured:
    """Join the scores of a training, or of the base, with its costs, its losses and what they hold for."""
    spent = losses = None
    if each is not None:
        cost = cost_of(each.folder, each.config)
        spent = Spent(device=device_name(), before=seconds_before(plan, each), cost=cost)
        losses = losses_of(each) if plan.validation is not None else None
    seed = None if each is None else each.seed
    return Measured(
        variant=name,
        seed=seed,
        equal=equal,
        run=None if each is None else each.folder.name,
        of=subject(plan, name, seed),
        revision=git_commit(),
        spent=spent,
        losses=losses,
        scores=scores,
    )


def losses_of(each: Trial) -> Losses:
    """Read the validation losses of a training."""
    read = validation.read(each.folder)
    return Losses(
        images=hashlib.sha256(json.dumps(read.keys).encode()).hexdigest(),
        times=read.times,
        by_image=read.values.mean(axis=1).round(DIGITS).tolist(),
        by_time=read.values.mean(axis=0).round(DIGITS).tolist(),
    )


def scores_at(plan: Study, each: Trial | None, setting: Setting, out: Path) -> Scores:
    """Score one training, or the base, at one setting."""
    found = scored(plan, each, setting, out)
    title, first = next(iter(found.results[0].scores.items()))
    theirs = None if plan.base is None else scored(plan, None, plan.reference or setting, out).results[0]
    spread = math.nan if plan.diversity is None else diversity_of(plan, each, setting, out)
    rows = found.results[0].rows
    return Scores(
        setting=setting,
        scores={title: score.overall.value for title, score in found.results[0].scores.items()},
        by_task=results.by_task(found.prompts, rows, title),
        difference=theirs and results.compare(found.prompts, rows, theirs.rows, title)["overall"],
        seen=None if first.seen is None else first.seen.value,
        unseen=None if first.unseen is None else first.unseen.value,
        diversity=None if math.isnan(spread) else spread,
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
    options = Options.of_this_machine()
    return evaluate(
        on or judged(plan), [source], {key: [value] for key, value in setting.items()}, options, place
    )
