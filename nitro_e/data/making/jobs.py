"""Long work that makes shards: divided over processes, done once, continued by the same command.

A unit is a piece of input whose result does not depend on any other: the same bytes come out whoever makes
them and in whatever order. When its shards are complete, verified and renamed, a journal entry says so:

    OUT/.journal/<job>/<unit>.json    what went in (a fingerprint), which shards came out, what was left out
    OUT/manifest-<job>.jsonl          a line per shard (bytes, sha256, samples, ...), when all units are done
    OUT/bad-<job>.jsonl               one line per sample that was left out

Left out: dynamic claims between machines (units are dealt out by number, rank r does every world-th).
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

from nitro_e.config import Config, ConfigError, Fraction, Ge, Le, read_text
from nitro_e.data.index import index_path, shard_index
from nitro_e.data.manifests import parse_record
from nitro_e.data.problems import Problem
from nitro_e.files import atomic_file, sha256_of
from nitro_e.record.progress import bar

ALLOWED = 10  # bad samples that never stop a job, however small it is


class Unit(Protocol):
    name: str  # unique in the job; becomes a file name

    def fingerprint(self) -> str:
        """Hash everything that the result depends on."""


@dataclass
class Result:
    """The shards that one unit became, and the samples that were left out."""

    shards: list[dict] = field(default_factory=list)  # manifest entries
    bad: list[Problem] = field(default_factory=list)
    samples: int = 0


@dataclass(frozen=True, kw_only=True)
class JobConfig(Config):
    """Says where the work goes and how it is divided."""

    OPTIONS: ClassVar[bool] = True

    out: Path
    processes: Annotated[int, Ge(1), Le(512)] = 1  # on this machine, for this rank
    rank: Annotated[int, Ge(0)] = 0
    world: Annotated[int, Ge(1)] = 1
    overwrite: bool = False  # redo units whose input or options have changed
    max_bad_fraction: Fraction = 0.001

    def __post_init__(self):
        super().__post_init__()
        if self.rank >= self.world:
            raise ConfigError(f"--rank {self.rank} is not between 0 and --world {self.world} - 1")


Work = Callable[[Sequence[Any]], Iterator[tuple[Any, Result]]]


def run_job(name: str, units: Sequence[Unit], work: Work, config: JobConfig) -> list[dict]:
    """Do every unit of this rank that is not done yet; return the manifest entries of those that are done.

    `work` takes the units that remain and yields (unit, result) as they are finished; `each` makes one from a
    function of a single unit. Raises ConfigError when OUT holds the result of other input, and when more
    samples are bad than max(10, max_bad_fraction * samples).
    """
    journal = config.out / ".journal" / name
    if config.overwrite and config.rank == 0:
        known = {unit.name for unit in units}
        for path in sorted(journal.glob("*.json")):
            if path.stem not in known:  # of an earlier, longer input
                _discard(path, config.out)
    mine = [unit for index, unit in enumerate(units) if index % config.world == config.rank]
    done = {unit.name: entry for unit in mine if (entry := _journal_entry(journal, unit, config))}
    todo = [unit for unit in mine if unit.name not in done]
    samples = sum(entry["samples"] for entry in done.values())
    bad = sum(len(entry["bad"]) for entry in done.values())
    progress = bar(total=len(mine), initial=len(done), desc=name, unit="unit")
    with progress, closing(work(todo)) as results:
        for unit, result in results:
            samples, bad = samples + result.samples, bad + len(result.bad)
            _check_bad(bad, samples, result, config.max_bad_fraction)
            entry = {"unit": unit.name, "fingerprint": unit.fingerprint(), **asdict(result)}
            _write_lines(journal / f"{unit.name}.json", [entry])
            progress.set_postfix(samples=samples, bad=bad)
            progress.update()
    return write_manifest(name, units, config.out)


def write_manifest(name: str, units: Sequence[Unit], out: Path) -> list[dict]:
    """Collect the entries of finished units, and write them to OUT once no unit is missing.

    Raises ConfigError if all units together have no sample.
    """
    shards, bad, samples, missing = [], [], 0, 0
    for unit in units:
        path = out / ".journal" / name / f"{unit.name}.json"
        if path.is_file():
            entry = parse_record(read_text(path), str(path), JOURNAL)
            shards += entry["shards"]
            bad += entry["bad"]
            samples += entry["samples"]
        else:
            missing += 1
    if missing:
        done = len(units) - missing
        print(f"{name}: {done} of {len(units)} units are done; the rank that ends last writes the manifest")
    else:
        _write_lines(out / f"manifest-{name}.jsonl", shards)
        _write_lines(out / f"bad-{name}.jsonl", bad)
        if not samples:
            raise ConfigError(
                f"{name}: there is no usable sample; check the input"
                + (f", and {out}/bad-{name}.jsonl" if bad else "")
            )
        print(f"{name}: {samples} samples in {len(shards)} shards, {len(bad)} left out, in {out}")
    return shards


def publish_entry(path: Path, **extra: Any) -> dict:
    """Index a finished shard and describe it for the manifest."""
    index = shard_index(path, force=True)
    keys = index.rows["__key__"]
    return {
        "shard": path.name,
        "bytes": index.nbytes,
        "sha256": sha256_of(path),
        "samples": len(keys),
        "first": keys[0].decode() if len(keys) else None,
        "last": keys[-1].decode() if len(keys) else None,
        "members": list(index.extensions),
        **extra,
    }


JOURNAL = {"fingerprint": str, "samples": int, "shards": list, "bad": list}


def each(function: Callable[[Any], Result], processes: int = 1) -> Work:
    """Make work of a picklable `function(unit)`, done in this process or in several."""
    return partial(_each, function, processes)


def _each(function: Callable, processes: int, units: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    if processes == 1 or len(units) < 2:
        for unit in units:
            yield unit, function(unit)
        return
    waiting, pending = iter(units), {}
    pool = ProcessPoolExecutor(min(processes, len(units)), initializer=_start_worker, initargs=(os.getpid(),))
    try:
        while True:
            while len(pending) < 2 * processes and (unit := next(waiting, None)) is not None:
                pending[pool.submit(function, unit)] = unit
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()
    except BrokenProcessPool:
        raise ConfigError(
            "a worker process died, most likely out of memory; run the same command again with fewer"
            " --processes"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(parent: int) -> None:
    """Die at once on Ctrl-C, and soon after the parent, even if that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _journal_entry(journal: Path, unit: Unit, config: JobConfig) -> dict | None:
    """Read the entry of a finished unit; None when it has to be done."""
    path = journal / f"{unit.name}.json"
    if not path.is_file():
        return None
    entry = parse_record(read_text(path), str(path), JOURNAL)
    if entry["fingerprint"] != unit.fingerprint():
        if config.overwrite:
            _discard(path, config.out)
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


def _discard(path: Path, out: Path) -> None:
    """Delete a journal entry and the shards it speaks of, which a glob would still find."""
    for shard in parse_record(read_text(path), str(path), JOURNAL)["shards"]:
        index_path(out / shard["shard"]).unlink(missing_ok=True)
        (out / shard["shard"]).unlink(missing_ok=True)
    path.unlink()


def _check_bad(bad: int, samples: int, result: Result, fraction: float) -> None:
    if result.bad and bad > max(ALLOWED, fraction * (samples + bad)):
        raise ConfigError(
            f"{bad} bad samples of {samples + bad} so far, more than --max-bad-fraction {fraction:g} allows;"
            f" the last: {result.bad[-1]}; mend the input or raise the limit"
        )


def _write_lines(path: Path, lines: list[dict]) -> None:
    """Write JSON lines in UTF-8; odd bytes in the names of files become JSON's escapes."""
    with atomic_file(path) as file:
        for line in lines:
            text = json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n"
            file.write(text.encode(errors="backslashreplace"))
