"""Trainings of a study: each a process of its own, several side by side, and what is known of them afterwards.

A training that was cut short goes on when it is started again; a finished one is not touched. Its CPU seconds, of all
attempts, lie in `RUN/cpu_seconds.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nitro_e.config import ConfigError, TrainingError
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
    samples_per_second: float  # median of the reports, without start, validation and saving


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
            _, code, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(code)  # it is waited for already
            with self._lock:
                self._running.discard(process)
        if folder.is_dir():
            spent = folder / CPU_SECONDS
            before = json.loads(spent.read_text()) if spent.exists() else 0.0
            spent.write_text(json.dumps(round(before + usage.ru_utime + usage.ru_stime, 1)))
        if is_done(folder) or self._ended:
            return ""
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return f"{each.variant}, seed {each.seed} ended with an error, see {log}: {''.join(last)}"


def train(trainer: Trainer, plan: Study, trials: Sequence[Trial]) -> list[str]:
    """Train the trials of a study; returns a line for each that failed."""
    return trainer.run(trials, [plan.variants[each.variant].recipe or "" for each in trials])


def cost_of(folder: Path, config: RunConfig) -> Cost:
    """Read what a finished training has cost."""
    steps, batch, flops = config.engine.steps, config.batch.global_, config.flops_per_step
    return Cost(
        steps=steps,
        samples=None if batch is None else steps * batch,
        parameters=config.counted.parameters,
        flops=None if flops is None else steps * flops,
        cpu_seconds=json.loads((folder / CPU_SECONDS).read_text()),
        samples_per_second=speed_of(folder),
    )


def speed_of(folder: Path) -> float:
    """Return the median of a run's reported samples per second; the first report, with its warm-up, counts if alone."""
    speeds = [row["samples_per_second"] for row in metrics.read(folder) if "samples_per_second" in row]
    return statistics.median(speeds[1:] or speeds)


def failed(failures: Sequence[str]) -> None:
    """Raise TrainingError for trainings that failed."""
    if failures:
        raise TrainingError("; ".join(failures))
