"""See every stage do its work, in about nine minutes on two cores, and read the story on one page.

    nitro-e demo                     from a checkout, whose configs/shapes/quick it trains
    nitro-e demo --out outputs/two   another folder: all of it again

It makes captioned scenes and trains stage 1 from nothing. Then it fine-tunes, post-trains (GRPO) and distils the model
that the package ships. All models draw the same prompts from the same noise and are scored. A table ends it, and
OUT/report.html shows scores, curves and images. Runs, logs and images lie under OUT. The same command goes on after an
interruption, whatever ended it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_e.cli import common as cli
from nitro_e.cli.processes import cores
from nitro_e.config import ConfigError, TrainingError, parse_json, read_text
from nitro_e.files import write_text
from nitro_e.record import metrics, run_folder
from nitro_e.record.templating import duration
from nitro_e.shapes.scenes import TASKS

RECIPES = Path("configs/shapes/quick")
STAGES = ("1_pretrain", "2_finetune", "3_grpo", "4_distill")
ONE_OBJECT = ("single_object", "colors")
# data sets: share of the scenes and the tasks in it. One object is what a model can learn from nothing in two minutes.
DATA = {"one": (1 / 3, ONE_OBJECT), "all": (2 / 3, TASKS)}
PAUSE = 0.3  # seconds between two looks at the processes
QUIET = 15  # seconds after which a training that goes on is worth another line


@dataclass(frozen=True)
class Job:
    """One process of the demo."""

    name: str  # of its log and of its entry in the times
    command: list[str]  # arguments of `python -m`
    run: Path | None = None  # what it trains


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="default: %(default)s")
    parser.add_argument(
        "--recipes", type=Path, default=RECIPES, help="folder of the four recipes (default: %(default)s)"
    )
    parser.add_argument(
        "--scenes",
        type=cli.whole(64, 10**6),
        default=6144,
        metavar="N",
        help="training images (default: %(default)s)",
    )
    parser.add_argument(
        "--num",
        type=cli.whole(6, 10**5),
        default=240,
        metavar="N",
        help="prompts that are scored (default: %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=cli.whole(1, 8),
        metavar="N",
        help="of a training; default: one per GPU or core, at most 4",
    )
    options = parser.parse_args(arguments)
    return cli.run(lambda: Demo(options).run())


class Demo:
    """The parts of the demo in their order. What is finished is not done again."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out, self.num, self.scenes = options.out, options.num, options.scenes
        self.recipes = {stage: options.recipes / f"{stage}.yaml" for stage in STAGES}
        if missing := [str(path) for path in self.recipes.values() if not path.is_file()]:
            raise ConfigError(
                f"--recipes: {', '.join(missing)} not found; run the demo in a checkout, or name the folder"
            )
        self.runs = {stage: self.out / "runs" / stage for stage in STAGES}
        self.processes = options.processes or default_processes()
        self.times = self._read_times()
        self.precision: str | None = None  # of the trainings, if not the recipes'

    def run(self) -> None:
        """Do what is not done yet, print the table and write the page."""
        with ended_like_ctrl_c(), run_folder.lock(self.out):
            print(f"{self.processes} processes; logs: {self.out / 'logs'}", flush=True)
            self.precision = self.times.setdefault("precision", precision_here())
            if self.precision is not None:
                print(f"trains in {self.precision}: bfloat16 is slow on this processor", flush=True)
            for title, jobs, at_once in self._plan():
                self._part(title, jobs, at_once)
            self._tell()

    def _plan(self) -> Iterator[tuple[str, list[Job], int]]:
        """Yield the title of each part, its processes, and how many of them run at a time."""
        scenes, shares = [], []
        for name, (part, tasks) in DATA.items():
            data = self.out / "data" / name
            make = ["nitro_e.cli", "make-shapes", str(data), "--num", str(round(part * self.scenes))]
            scenes.append(Job(f"scenes-{name}", [*make, "--samples-per-shard", "512", "--tasks", *tasks]))
            encode = ["nitro_e.cli", "data", "encode", f"{data}/shapes-train-*.tar", "--out", str(data)]
            encode += ["--codec", "shapes-dc-ae", "--text", "shapes-llama", "--vision", "shapes-vit"]
            encode += ["--resolution", "64", "--world", str(self.processes)]
            # named by their number too: of another number each has another part of the data
            shares += [
                Job(f"encode-{name}-{rank}-of-{self.processes}", [*encode, "--rank", str(rank)])
                for rank in range(self.processes)
            ]
        yield f"{self.scenes:,} captioned scenes", scenes, self.processes
        yield "Their latents, text embeddings and features", shares, self.processes
        for stage, title in zip(
            STAGES, ("from nothing", "the shipped model", "the shipped model", "the shipped model")
        ):
            yield f"Stage {stage.replace('_', ', ')}: {title}", [self._training(stage)], 1
        yield f"Images of {self.num} prompts by every model, scored", self._evaluations(), self.processes

    def _training(self, stage: str) -> Job:
        """Train a stage, one process per core."""
        name, kinds = (
            ("one", ("latents", "text", "features"))
            if stage == "1_pretrain"
            else ("all", ("latents", "text"))
        )
        shards = [f"{self.out}/data/{name}/{kind}-*.tar" for kind in kinds]
        overrides = [f"run={self.runs[stage]}"]
        if self.precision is not None:
            overrides.append(f"engine.precision={self.precision}")
        if stage in ("1_pretrain", "2_finetune"):  # the others need prompts alone
            overrides.append(f"data.shards={json.dumps(shards)}")
        command = ["nitro_e.cli", "train", str(self.recipes[stage]), *overrides]
        return Job(stage, [*command, "--processes", str(self.processes)], self.runs[stage])

    def _evaluations(self) -> list[Job]:
        """One process per model and guidance; the slowest first."""
        jobs = []
        for number, (source, grid) in enumerate(self.drawn()):
            flags = [word for key, values in grid.items() for word in (f"--{key}", *map(str, values))]
            command = ["nitro_e.cli", "evaluate", "shapes", source, "--num", str(self.num), *flags]
            name = f"evaluate-{number}"
            jobs.append(Job(name, [*command, "--out", str(self.out / "images" / str(number))]))
        return jobs

    def drawn(self) -> list[tuple[str, dict[str, list[int]]]]:
        """List models with the settings they draw at: guidance scales and numbers of steps."""
        runs = {stage: str(run) for stage, run in self.runs.items()}
        return [
            ("shapes", {"guidance": [3], "steps": [20]}),
            (runs["1_pretrain"], {"guidance": [3], "steps": [20]}),
            (runs["2_finetune"], {"guidance": [3], "steps": [20]}),
            ("shapes", {"guidance": [1], "steps": [20, 6, 4, 2, 1]}),
            (runs["3_grpo"], {"guidance": [1], "steps": [6]}),
            (runs["4_distill"], {"steps": [4, 2, 1]}),
        ]

    # ---- processes

    def _part(self, title: str, jobs: Sequence[Job], at_once: int) -> None:
        """Run the processes of one part that are not done, and keep their times."""
        waiting = [job for job in jobs if not self.times.get(job.name, {}).get("done")]
        if not waiting:
            print(f"{title}: done before", flush=True)
            return
        print(title, flush=True)
        started, running = time.monotonic(), []
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append(Process(waiting.pop(0), self.out / "logs"))
                time.sleep(PAUSE)
                for process in running:
                    process.look()
                for process in [each for each in running if each.code is not None]:
                    running.remove(process)
                    self._finished(process)
        finally:
            for process in running:
                process.stop()
                self._add_times(process)
            self.times["wall"] = round(self.times.get("wall", 0.0) + time.monotonic() - started, 1)
            self._write_times()
        print(f"  {duration(time.monotonic() - started)}", flush=True)

    def _finished(self, process: Process) -> None:
        self._add_times(process)
        job, code = process.job, process.code
        done = code == 0 and (job.run is None or run_folder.read_status(job.run).get("state") == "done")
        if not done:
            raise TrainingError(
                f"{job.name} ended with code {code}, see {process.log}: {reason(process.log)}"
            )
        self.times[job.name]["done"] = True
        self._write_times()

    def _add_times(self, process: Process) -> None:
        """Add what a process took to what its attempts before took."""
        before = self.times.setdefault(process.job.name, {"seconds": 0.0, "cpu_seconds": 0.0, "done": False})
        before["seconds"] = round(before["seconds"] + process.seconds, 1)
        before["cpu_seconds"] = round(before["cpu_seconds"] + process.cpu_seconds, 1)
        self._write_times()

    def _read_times(self) -> dict[str, dict[str, Any]]:
        path = self.out / "times.json"
        found = parse_json(read_text(path), str(path)) if path.is_file() else {}
        if not isinstance(found, dict):
            raise ConfigError(f"{path} is not what the demo wrote; delete it")
        settings = {"scenes": self.scenes, "num": self.num}
        if found.setdefault("settings", settings) != settings:
            raise ConfigError(
                f"{path}: made with {found['settings']}, now {settings}; use that, or another --out"
            )
        return found

    def _write_times(self) -> None:
        write_text(self.out / "times.json", json.dumps(self.times, indent=1) + "\n")

    # ---- the end

    def _tell(self) -> None:
        """Print the table and write the page."""
        from nitro_e.evaluation.benchmarks import benchmark
        from nitro_e.evaluation.evaluate import Options, evaluate
        from nitro_e.evaluation.story import Story

        judged, options = benchmark("shapes", self.num), Options.of_this_machine()
        names = {"guidance": "guidance_scale", "steps": "steps"}
        found = [
            evaluate(
                judged,
                [source],
                {names[key]: values for key, values in grid.items()},
                options,
                self.out / "images" / str(number),
            )
            for number, (source, grid) in enumerate(self.drawn())
        ]  # read from the files that the processes left
        story = Story(
            found[0].prompts, [result for each in found for result in each.results], self.runs, self.times
        )
        print(f"\n{story.as_text()}\n")
        print(f"the story with curves and images: {story.write(self.out / 'report.html')}")


class Process:
    """A running job with its log. It has a session of its own, so that Ctrl-C reaches the demo, which then stops it."""

    def __init__(self, job: Job, logs: Path) -> None:
        self.job, self.log = job, logs / f"{job.name}.log"
        if job.run is not None:
            wait_for(job.run)
        logs.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *job.command],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
            )  # fmt: skip
        self.started = self.shown = time.monotonic()
        # of the metrics; those of earlier calls were shown then
        self.lines_read = len(metrics.read_lines(job.run)) if job.run is not None else 0
        self.seconds = self.cpu_seconds = 0.0
        self.code: int | None = None

    def look(self) -> None:
        """Show what the training has logged, and notice the end of the process."""
        if self.job.run is not None:
            self._show_progress(self.job.run)
        self._collect(os.WNOHANG)

    def stop(self) -> None:
        """End the process and all it started, and wait: a training writes a checkpoint first."""
        if self.code is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self._collect(0)

    def _collect(self, options: int) -> None:
        pid, status, usage = os.wait4(self.process.pid, options)
        if pid:
            self.code = self.process.returncode = os.waitstatus_to_exitcode(status)
            self.seconds = time.monotonic() - self.started
            self.cpu_seconds = usage.ru_utime + usage.ru_stime

    def _show_progress(self, run: Path) -> None:
        """Print every score, and another line of the metrics now and then."""
        lines = metrics.read_lines(run)
        for row in lines[self.lines_read :]:
            scored = any(name.startswith("eval/") for name in row)
            if "event" not in row and (scored or time.monotonic() - self.shown > QUIET):
                print(f"  step {row['step']:,}: {in_words(row)}", flush=True)
                self.shown = time.monotonic()
        self.lines_read = len(lines)


@contextlib.contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Let other signals that end a program stop the processes below too."""
    signals = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before):
            signal.signal(number, handler)


def precision_here() -> str | None:
    """Name the precision to train in instead of the recipes' bfloat16; None where that is fast enough."""
    import torch

    from nitro_e.model.cpu.packing import bfloat16_slowdown
    from nitro_e.training.engine import SLOW_BFLOAT16

    slow = not torch.cuda.is_available() and bfloat16_slowdown() > SLOW_BFLOAT16
    return "float32" if slow else None


def wait_for(run: Path) -> None:
    """Wait for a training that an earlier call left behind when it was killed."""
    told = False
    while True:
        try:
            with run_folder.lock(run):
                return
        except ConfigError:
            if not told:
                print(f"  waiting for the training in {run} that an earlier call started", flush=True)
            told = True
            time.sleep(PAUSE)


def reason(log: Path) -> str:
    """Find the line of a log that says why a process ended: its last error, or else its last line."""
    lines = read_text(log).strip().splitlines() or [""]
    return next((line for line in reversed(lines) if re.match("error: |training stopped: ", line)), lines[-1])


def in_words(row: dict[str, Any]) -> str:
    """Put a line of metrics into words: "strict 0.012, partial 0.310", or "loss 1.203, 96 samples/s"."""
    scores, rewards = (
        [
            f"{name.removeprefix(kind)} {value:.3f}"
            for name, value in row.items()
            if re.fullmatch(kind + r"[^/]+", name)
        ]
        for kind in ("eval/", "reward/")
    )
    loss = [f"loss {row['loss']:.3f}"] if "loss" in row else []
    speed = [f"{row['samples_per_second']:.0f} samples/s"] if "samples_per_second" in row else []
    return ", ".join(scores or [*(rewards or loss), *speed])


def default_processes() -> int:
    """Choose one process per GPU, or else per core: 1, 2 or 4, which divide the recipes' batches."""
    import torch

    there = torch.cuda.device_count() or cores()
    return max(count for count in (1, 2, 4) if count <= there)
