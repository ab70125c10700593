"""Trainings of a study: each a process of its own, several side by side, and what is known of them afterwards.

A training that was cut short goes on when it is started again; a finished one is not touched. Its CPU seconds, of all
attempts, lie in `RUN/cpu_seconds.json`.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nitro_e.config import ConfigError, TrainingError
from nitro_e.files import write_text
from nitro_e.record import metrics, run_folder
from nitro_e.stages.recipe import RunConfig
from nitro_e.studies.plan import Study, Trial, trial

CPU_SECONDS = "cpu_seconds.json"


@dataclass(frozen=True)
class Cost:
    """The price of a finished training."""

    steps: int
    samples: int | None  # None: the stage makes its own
    parameters: int
    flops: (
        float | None
    )  # of the model and what is trained with it, forward and backward; frozen encoders are not counted
    cpu_seconds: float  # of the whole process: start, data, validation and samples too
    samples_per_second: float | None = None  # median of the reports, without start, validation and saving
    memory_gb: float | None = None  # largest of the reports, of the whole process or of the GPU
    trained_beside: int | None = None  # parameters of other networks that it trains: fake scores, heads


def is_done(folder: Path) -> bool:
    return run_folder.read_status(folder).get("state") == "done" and (folder / CPU_SECONDS).is_file()


def pair_for_time(plan: Study, name: str, seed: int) -> tuple[Trial, Trial]:
    """Return the trainings whose speeds decide the steps of equal time: the variant's and the reference's."""
    seeds = plan.seeds_of(plan.reference_variant)
    return trial(plan, name, seed), trial(plan, plan.reference_variant, seed if seed in seeds else seeds[0])


def at_equal_time(plan: Study, name: str, seed: int) -> Trial:
    """Make the training that takes as long as the reference's, by the speed of both at their recipes' steps."""
    same, reference = pair_for_time(plan, name, seed)
    for each in (same, reference):
        if not is_done(each.folder):
            raise ConfigError(
                f"equal: seconds: {each.folder} is not trained yet, whose speed decides the steps; train it first"
            )
    seconds_per_step = [
        (each.config.batch.global_ or 1) / speed_of(each.folder) for each in (reference, same)
    ]
    steps = round(reference.config.engine.steps * seconds_per_step[0] / seconds_per_step[1])
    return same if steps == same.config.engine.steps else trial(plan, name, seed, "seconds", max(steps, 1))


class Trainer:
    """Runs trainings side by side, and ends them all when it is interrupted: they save, and go on another time."""

    def __init__(self, jobs: int, group: str) -> None:
        """jobs: trainings at a time, one thread each if more than one; group: what trackers call them together."""
        self.jobs, self.group = jobs, group
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._ended = threading.Lock(), False

    def run(self, trials: Sequence[Trial], recipes: Sequence[str]) -> list[str]:
        """Train what is not done yet; returns a line for each that failed. The others are not held up by it."""
        open_ = [(each, recipe) for each, recipe in zip(trials, recipes) if not is_done(each.folder)]
        pool = ThreadPoolExecutor(self.jobs)
        try:
            failures = list(pool.map(lambda pair: self._train(*pair), open_))
        except BaseException:
            self.end()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return [failure for failure in failures if failure]

    def end(self) -> None:
        """Ask every training that runs to save and end; none is started any more."""
        with self._lock:
            self._ended = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)  # process.terminate() would wait for it too

    def _train(self, each: Trial, recipe: str) -> str:
        """Run or continue one training; returns why it failed, or nothing."""
        folder, log = each.folder, each.folder.with_name(f"{each.folder.name}.log")
        command = [sys.executable, "-m", "nitro_e.cli", "train", recipe, *each.overrides]
        threads = {"OMP_NUM_THREADS": "1"} if self.jobs > 1 else {}
        environment = {"WANDB_RUN_GROUP": self.group} | os.environ | threads
        folder.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            with self._lock:
                if self._ended:
                    return ""
                process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
                self._running.add(process)
            seconds = wait_for(process)
            with self._lock:
                self._running.discard(process)
        if folder.is_dir():
            spent = folder / CPU_SECONDS
            before = json.loads(spent.read_text()) if spent.exists() else 0.0
            spent.write_text(json.dumps(round(before + seconds, 1)))
        if is_done(folder) or self._ended:
            return ""
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"{each.variant}, seed {each.seed} ended with an error, see {log}: {''.join(last)}"


def train(trainer: Trainer, plan: Study, trials: Sequence[Trial]) -> list[str]:
    """Train the trials of a study, those that begin with others' weights behind them; returns a line for each that failed."""
    failures: list[str] = []
    for _, wave in itertools.groupby(sorted(trials, key=partial(depth, plan)), partial(depth, plan)):
        open_, recipes = [], []
        for each in wave:
            variant = plan.variants[each.variant]
            origin = variant.after and trial(plan, variant.after, each.seed)
            if origin and not is_done(origin.folder):
                failures.append(
                    f"{each.variant}, seed {each.seed} begins with {origin.folder}, which is not trained"
                )
                continue
            if not is_done(each.folder) and (failure := make_ready(plan, variant.needs)):
                failures.append(f"{each.variant}, seed {each.seed}: {failure}")
                continue
            open_.append(each)
            recipes.append(variant.recipe or "")
        failures += trainer.run(open_, recipes)
    return failures


def depth(plan: Study, each: Trial) -> int:
    """Count the trainings that must come before this one."""
    return len(plan.with_origins([each.variant])) - 1


def make_ready(plan: Study, needs: Sequence[str]) -> str:
    """Run the commands that make what a training needs, each once; returns why one failed, or nothing.

    Of several jobs of a study on one file system, one runs a command while the others wait for it.
    """
    for name in needs:
        record = prepared(plan, name)
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.with_suffix(".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process
            if failure := prepare(plan, name):
                return failure
    return ""


def prepare(plan: Study, name: str) -> str:
    """Run one command of `prepare` unless its record says that it is done; returns why it failed, or nothing."""
    record, text = prepared(plan, name), plan.prepare[name]
    known = json.loads(record.read_text()) if record.is_file() else {}
    if known.get("command") != text:
        known = {"command": text, "cpu_seconds": 0.0, "done": False}
    if known["done"]:
        return ""
    print(f"prepare {name}: nitro-e {text}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "nitro_e.cli", *shlex.split(text)])
    try:
        usage = wait_for(process)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        usage = wait_for(process)
        raise
    finally:
        known["cpu_seconds"] = round(known["cpu_seconds"] + usage, 1)
        known["done"] = process.returncode == 0
        write_text(record, json.dumps(known) + "\n")
    return f"prepare.{name}: nitro-e {text} ended with {process.returncode}" if process.returncode else ""


def wait_for(process: subprocess.Popen[bytes]) -> float:
    """Wait for a process that nothing else waits for; returns its CPU seconds."""
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    return usage.ru_utime + usage.ru_stime


def prepared(plan: Study, name: str) -> Path:
    """Return the record of a command of `prepare`: the command, its CPU seconds of all attempts, and whether it is done."""
    return Path("runs") / plan.name / f"prepare-{name}.json"


def seconds_of(plan: Study, names: Sequence[str]) -> float:
    """Add up the CPU seconds of commands of `prepare`; one that this study did not run counts nothing."""
    records = [prepared(plan, name) for name in names]
    return sum(json.loads(record.read_text())["cpu_seconds"] for record in records if record.is_file())


def seconds_before(plan: Study, each: Trial) -> float:
    """Add up the CPU seconds of everything that a training needs: stored images, the training that it begins with."""
    variant = plan.variants[each.variant]
    if variant.after is None:
        return seconds_of(plan, variant.needs)
    origin = trial(plan, variant.after, each.seed)
    own = [name for name in variant.needs if name not in plan.variants[variant.after].needs]
    spent = cost_of(origin.folder, origin.config).cpu_seconds
    return seconds_of(plan, own) + spent + seconds_before(plan, origin)


def cost_of(folder: Path, config: RunConfig) -> Cost:
    """Read what a finished training has cost."""
    notes = [event for event in metrics.read_events(folder) if "trained_beside" in event]
    memory = [row["memory_gb"] for row in metrics.read(folder) if "memory_gb" in row]
    steps, batch, flops = config.engine.steps, config.batch.global_, config.flops_per_step
    return Cost(
        steps=steps,
        samples=None if batch is None else steps * batch,
        parameters=config.counted.parameters,
        flops=None if flops is None else steps * flops,
        cpu_seconds=json.loads((folder / CPU_SECONDS).read_text()),
        samples_per_second=speed_of(folder),
        memory_gb=max(memory, default=None),
        trained_beside=notes[-1]["trained_beside"] if notes else None,
    )


def speed_of(folder: Path) -> float:
    """Return the median of a run's reported samples per second; the first report, with its warm-up, counts if alone."""
    speeds = [row["samples_per_second"] for row in metrics.read(folder) if "samples_per_second" in row]
    return statistics.median(speeds[1:] or speeds)


def failed(failures: Sequence[str]) -> None:
    """Raise TrainingError for trainings that failed."""
    if failures:
        raise TrainingError("; ".join(failures))
