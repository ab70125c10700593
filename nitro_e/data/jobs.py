"""Long work that makes shards: units, divided over processes and machines, done once, continued by the same command.

A unit is a piece of input whose result does not depend on any other: the same bytes come out whoever makes them and
in whatever order. When its shards are complete, verified and renamed, a journal entry says so:

    OUT/.journal/<job>/<unit>.json    what went in (a fingerprint), which shards came out, what was left out
    OUT/manifest-<job>.jsonl          one line per shard (bytes, sha256, samples, ...), when every unit is done
    OUT/bad-<job>.jsonl               one line per sample that was left out

Left out: dynamic claims between machines (units are dealt out by number, rank r does every world-th).
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from nitro_e.config import ConfigError
from nitro_e.data.index import Problem, ShardIndex, store_index
from nitro_e.data.writer import atomic_file

ALLOWED = 10  # bad samples that never stop a job, however small it is


class Unit(Protocol):
    name: str  # unique in the job; becomes a file name

    def fingerprint(self) -> str:
        """Hash of everything that the result depends on."""


@dataclass
class Result:
    """What one unit became."""

    shards: list[dict] = field(default_factory=list)  # manifest entries
    bad: list[Problem] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(entry["samples"] for entry in self.shards)


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """How the work is divided."""

    out: Path
    processes: int = 1  # on this machine, for this rank
    rank: int = 0
    world: int = 1
    overwrite: bool = False  # redo units whose input or options have changed
    max_bad_fraction: float = 0.001

    def __post_init__(self):
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"--rank {self.rank} is not between 0 and --world {self.world} - 1")
        if self.processes < 1:
            raise ConfigError(f"--processes {self.processes} must be at least 1")


def run_job(name: str, units: Sequence[Unit], work: Callable[[Any], Result], config: JobConfig) -> list[dict]:
    """Do every unit of this rank that is not done yet; return the manifest entries of those that are done.

    `work` must be picklable when processes > 1. Raises ConfigError when OUT holds the result of other input, and when
    more samples are bad than max(10, max_bad_fraction * samples).
    """
    journal = config.out / ".journal" / name
    mine = [unit for index, unit in enumerate(units) if index % config.world == config.rank]
    done = {unit.name: entry for unit in mine if (entry := _journal_entry(journal, unit, config))}
    todo = [unit for unit in mine if unit.name not in done]
    samples = sum(sum(shard["samples"] for shard in entry["shards"]) for entry in done.values())
    bad = sum(len(entry["bad"]) for entry in done.values())
    progress = tqdm(total=len(mine), initial=len(done), desc=name, unit="unit")
    with progress, concurrent_results(work, todo, config.processes) as results:
        for unit, result in results:
            samples, bad = samples + result.samples, bad + len(result.bad)
            entry = {"unit": unit.name, "fingerprint": unit.fingerprint(), "shards": result.shards,
                     "bad": [asdict(problem) for problem in result.bad]}  # fmt: skip
            _check_bad(bad, samples, result, config.max_bad_fraction)
            write_json(journal / f"{unit.name}.json", entry)
            progress.set_postfix(samples=samples, bad=bad)
            progress.update()
    return write_manifest(name, units, config.out)


def write_manifest(name: str, units: Sequence[Unit], out: Path) -> list[dict]:
    """Entries of all finished units; written to OUT once none is missing."""
    shards, bad, missing = [], [], 0
    for unit in units:
        path = out / ".journal" / name / f"{unit.name}.json"
        if path.is_file():
            entry = json.loads(path.read_text())
            shards += entry["shards"]
            bad += entry["bad"]
        else:
            missing += 1
    if missing:
        print(f"{name}: {len(units) - missing} of {len(units)} units are done; the rank that ends last writes the manifest")
    else:
        _write_lines(out / f"manifest-{name}.jsonl", shards)
        _write_lines(out / f"bad-{name}.jsonl", bad)
        total = sum(entry["samples"] for entry in shards)
        print(f"{name}: {total} samples in {len(shards)} shards, {len(bad)} left out, in {out}")
    return shards


def publish_entry(path: Path, index: ShardIndex, **extra: Any) -> dict:
    """Store the index of a finished shard and describe it for the manifest."""
    store_index(path, index)
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
    keys = index.rows["__key__"]
    return {
        "shard": path.name,
        "bytes": index.nbytes,
        "sha256": sha256,
        "samples": len(keys),
        "first": keys[0].decode() if len(keys) else None,
        "last": keys[-1].decode() if len(keys) else None,
        "members": list(index.extensions),
        **extra,
    }


def digest(*parts: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(value, ensure_ascii=False, sort_keys=True) + "\n").encode())


class concurrent_results:
    """Context: iterate over (unit, work(unit)) as they finish, in this process or in several."""

    def __init__(self, work: Callable, units: Sequence[Any], processes: int):
        self.work, self.units, self.processes, self.pool = work, units, processes, None

    def __enter__(self) -> Iterator[tuple[Any, Any]]:
        if self.processes == 1 or len(self.units) < 2:
            return ((unit, self.work(unit)) for unit in self.units)
        self.pool = concurrent.futures.ProcessPoolExecutor(
            min(self.processes, len(self.units)), initializer=_start_worker, initargs=(os.getpid(),)
        )
        return self._gather()

    def _gather(self) -> Iterator[tuple[Any, Any]]:
        pending: dict[concurrent.futures.Future, Any] = {}
        units = iter(self.units)
        while True:
            while len(pending) < 2 * self.processes and (unit := next(units, None)) is not None:
                pending[self.pool.submit(self.work, unit)] = unit
            if not pending:
                return
            finished, _ = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                unit = pending.pop(future)
                try:
                    yield unit, future.result()
                except concurrent.futures.process.BrokenProcessPool:
                    raise ConfigError(
                        f"a worker process died, probably out of memory, near unit {getattr(unit, 'name', unit)};"
                        " run the same command again with fewer --processes"
                    ) from None

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(parent: int) -> None:
    """Die at once on Ctrl-C, and soon after the parent, even if that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _journal_entry(journal: Path, unit: Unit, config: JobConfig) -> dict | None:
    """The entry of a finished unit, None when it has to be done."""
    path = journal / f"{unit.name}.json"
    if not path.is_file():
        return None
    entry = json.loads(path.read_text())
    if entry["fingerprint"] != unit.fingerprint():
        if config.overwrite:
            path.unlink()
            return None
        raise ConfigError(
            f"{config.out} holds unit '{unit.name}' made from other input or with other options;"
            " choose another --out, or redo it with --overwrite"
        )
    for shard in entry["shards"]:
        file = config.out / shard["shard"]
        if not file.is_file() or file.stat().st_size != shard["bytes"]:
            return None
    return entry


def _check_bad(bad: int, samples: int, result: Result, fraction: float) -> None:
    if result.bad and bad > max(ALLOWED, fraction * (samples + bad)):
        raise ConfigError(
            f"{bad} bad samples of {samples + bad} so far, more than --max-bad-fraction {fraction:g} allows;"
            f" the last: {result.bad[-1]}; mend the input or raise the limit"
        )


def _write_lines(path: Path, lines: list[dict]) -> None:
    with atomic_file(path) as file:
        for line in lines:
            file.write((json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n").encode())


def _sha256(file) -> str:  # Python 3.10
    state = hashlib.sha256()
    while chunk := file.read(1 << 20):
        state.update(chunk)
    return state.hexdigest()
