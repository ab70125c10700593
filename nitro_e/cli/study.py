"""Train variants of recipes over several seeds, compare them in pairs, print the tables.

    nitro-e study tools/studies/shapes_ablations.yaml      runs/NAME/..., outputs/NAME/table.md, results.json, ...
    nitro-e study STUDY.yaml --only full lora --jobs 2       some variants, two trainings at a time
    nitro-e study STUDY.yaml seeds=[0]                       with another value of a key of the study
    nitro-e study STUDY.yaml --list                          the trainings, numbered, with their compute; nothing is run
    nitro-e study STUDY.yaml --tables                        compare what is done, training nothing
    nitro-e study STUDY.yaml --tables --record FILE          the same, from a record too, which other machines have made
    nitro-e study STUDY.yaml --run 3                         number 3 of them alone, for an array job (tools/study_array.sh)

A study names variants (a recipe and overrides) or a grid of values, seeds, and what they are compared by: the
validation loss, and scores of samples. With `base` they start from a checkpoint and are compared with it; without,
they are trained from scratch, at equal steps or equal compute, and compared with one of them. Differences are paired by
image, or by prompt and noise. Every part is kept: the same command goes on after an interruption, and adds what is new
in the file. What can be known to be wrong is refused before the first training.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

from nitro_e.cli import common as cli
from nitro_e.config import ConfigError, load


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("study", type=Path, help="a YAML file, see tools/studies")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the study, such as seeds=[0,1]")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="default: all")
    parser.add_argument(
        "--jobs",
        type=cli.whole(1, 512),
        metavar="N",
        help="trainings at a time, one thread each if more than one; default: one per core, on a GPU one",
    )
    parser.add_argument("--out", type=Path, help="default: outputs/NAME")
    parser.add_argument(
        "--into",
        type=Path,
        metavar="PAGE",
        help="put the tables into this Markdown file too, between its marks",
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="what was measured, a line per training: those in it are not trained again, new ones are added",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the trainings with their numbers, then exit"
    )
    parser.add_argument("--tables", action="store_true", help="train nothing: compare what is done")
    parser.add_argument("--run", type=cli.whole(0, 10**6), metavar="NUMBER", help="train this one alone")
    options = parser.parse_intermixed_args(arguments)
    return cli.run(lambda: study(options))


def study(options: argparse.Namespace) -> None:
    from nitro_e.studies import plan as plans
    from nitro_e.studies import results
    from nitro_e.studies.measure import done
    from nitro_e.studies.record import Record, to_train
    from nitro_e.studies.training import Trainer, at_equal_time, failed, train

    plan = load(plans.Study, options.study, options.overrides)
    chosen = options.only or list(plan.variants)
    for name in chosen:
        if name not in plan.variants:
            raise ConfigError(f"--only {name}: the study has {', '.join(plan.variants)}")
    # the reference is trained whether it is shown or not
    needed = plan.with_origins([*([] if plan.base is not None else [plan.reference_variant]), *chosen])
    planned = plans.trials(plan, needed)
    if options.list:
        print(listing(planned, Record(plan, options.record)))
        return
    if options.run is not None and options.run >= len(planned):
        raise ConfigError(
            f"--run {options.run}: the study has the trainings 0 to {len(planned) - 1}, see --list"
        )
    if options.into is not None:
        results.check_page(options.into, plan.name)
    out = options.out or Path("outputs") / plan.name
    if options.tables:
        print(results.write(plan, chosen, out, options.into, options.record))
        return
    plans.check(plan, needed, planned)
    recorded = Record(plan, options.record)
    trainer = Trainer(1 if options.run is not None else options.jobs or usual_jobs(), plan.name)
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        if options.run is not None:
            failed(train(trainer, plan, to_train(plan, [planned[options.run]], recorded)))
            return
        failures = train(trainer, plan, to_train(plan, planned, recorded))
        timed = [name for name in chosen if plan.is_trained(name) and "seconds" in plan.equal_of(name)]
        if timed and not failures:
            again = [at_equal_time(plan, name, seed) for name in timed for seed in plan.seeds_of(name)]
            failures = train(trainer, plan, list({each.folder: each for each in again}.values()))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if failures and not any(done(plan, name, "steps") for name in chosen if plan.is_trained(name)):
        failed(failures)
    print(results.write(plan, chosen, out, options.into, options.record))
    failed(failures)


def interrupt(number: int, frame: Any) -> None:
    """End as Ctrl-C does: trainings save first."""
    raise KeyboardInterrupt


def usual_jobs() -> int:
    """One training per core that this process may use; one on a GPU."""
    import torch

    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def listing(planned: Any, recorded: Any) -> str:
    """Write a line per training: its number, name, steps, samples and FLOPs."""
    from nitro_e.studies.training import is_done

    lines = []
    for number, each in enumerate(planned):
        steps, flops, batch = each.config.engine.steps, each.config.flops_per_step, each.config.batch.global_
        compute = "" if flops is None else f"  {steps * flops:.3g} FLOP"
        samples = "" if batch is None else f"  {steps * batch:,} samples"
        state = "  done" if is_done(each.folder) else "  recorded" if recorded.holds(each) else ""
        lines.append(f"{number:>4}  {each.folder}  {steps:,} steps{samples}{compute}{state}")
    return "\n".join(lines)
