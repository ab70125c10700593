"""Run directories and checkpoints.

    RUN/config.yaml  metrics.jsonl  samples/  STATUS.json
    RUN/checkpoints/step-0001000/
        model/   config.json  model.safetensors      EMMDiT.from_pretrained(...), TextToImage.from_pretrained(...)
        ema/     the same, when the run keeps an average
        trainer/ what a resume needs: module and optimiser of every phase, EMA counters
        meta.json                                     written last: step, experiment, size and sha256 of every file

A checkpoint is written to `step-N.tmp`, synced, renamed when complete, and only then are old ones pruned: a kill, a
full disk or a power cut at any time leaves the previous one. A resume takes the newest whose hashes are right; one
that is damaged is renamed to `bad-step-N` and named in a warning.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nitro_e.config import ConfigError, TrainingError, did_you_mean
from nitro_e.files import sha256_of
from nitro_e.shapes.pretrained import PRETRAINED

log = logging.getLogger(__name__)

STEP = re.compile(r"step-(\d+)")
SHIPPED = {"shapes": PRETRAINED / "model"}


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:07d}"


def save(run: Path, step: int, write: Callable[[Path], None], meta: dict[str, Any]) -> Path:
    """Let `write(folder)` fill a new checkpoint and publish it. On any error nothing is left of it; OSError comes through."""
    final = folder_of(run, step)
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        files = {str(path.relative_to(temporary)): _fingerprint(path) for path in _files(temporary)}
        (temporary / "meta.json").write_text(
            json.dumps({"step": step, **meta, "files": files}, indent=1) + "\n"
        )
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        if final.exists():  # only after a resume from an older step
            shutil.rmtree(final)
        temporary.rename(final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def prune(run: Path, keep_last: int, keep_every: int = 0) -> None:
    """Delete all but the newest `keep_last` checkpoints and the milestones, every `keep_every` steps.

    What is to go is renamed first: a kill half-way leaves no half a checkpoint, only a `.tmp` for the next time.
    """
    for old in complete(run)[:-keep_last]:
        if not keep_every or step_of(old) % keep_every:
            old.rename(old.with_suffix(".tmp"))
    for leftover in (run / "checkpoints").glob("step-*.tmp"):
        shutil.rmtree(leftover)


def complete(run: Path) -> list[Path]:
    """All completely written checkpoints of a run, oldest first."""
    folders = [
        path.parent
        for path in (run / "checkpoints").glob("step-*/meta.json")
        if STEP.fullmatch(path.parent.name)
    ]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    return int(STEP.fullmatch(folder.name)[1])


def latest(run: Path) -> Path | None:
    return (complete(run) or [None])[-1]


def latest_valid(run: Path) -> Path | None:
    """The newest checkpoint whose files are what was written; damaged ones are renamed, with a warning."""
    for folder in reversed(complete(run)):
        problem = damage(folder)
        if problem is None:
            return folder
        bad = folder.with_name(f"bad-{folder.name}")
        shutil.rmtree(bad, ignore_errors=True)
        folder.rename(bad)
        log.warning(
            "checkpoint %s is damaged (%s): renamed to %s, trying the one before", folder, problem, bad.name
        )
    return None


def refuse_damaged(run: Path) -> None:
    """TrainingError if a run had checkpoints and none of them is whole: it must not begin anew unnoticed."""
    damaged = sorted(run.glob("checkpoints/bad-step-*"))
    if damaged and latest(run) is None:
        raise TrainingError(
            f"every checkpoint of {run} is damaged ({', '.join(folder.name for folder in damaged)}): put a copy back, or "
            "delete them to begin again from the start"
        )


def damage(folder: Path) -> str | None:
    """What differs from `meta.json`, or None."""
    try:
        files = read_meta(folder)["files"]
    except (ValueError, KeyError):
        return "meta.json is unreadable"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _fingerprint(path)[1] != digest:
            return f"{name} has the wrong sha256"
    return None


def read_meta(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "meta.json").read_text())


def write_status(run: Path, state: str, step: int, **details: Any) -> None:
    """`STATUS.json`, replaced atomically: running, preempted, done or failed. Job scripts decide by it."""
    temporary = run / "STATUS.json.tmp"
    temporary.write_text(
        json.dumps({"state": state, "step": step, "time": round(time.time(), 1), **details}) + "\n"
    )
    temporary.rename(run / "STATUS.json")


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Only one job may train in a run directory; the kernel frees the lock however the job ends."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another job is training in {run}; wait for it, stop it, or choose another run=..."
            ) from None
        yield


def model_folder(source: str | Path) -> Path:
    """The model folder meant by `RUN`, `RUN/checkpoints/step-N`, a model folder itself, or `shapes`, which the package ships.

    `@model` or `@ema` at the end chooses the weights of a run or checkpoint; the default is the average if there is one.
    """
    name, _, which = str(source).partition("@")
    if str(source) in SHIPPED and not Path(source).exists():
        return SHIPPED[str(source)]
    if which not in ("", "model", "ema"):
        raise ConfigError(f"'{source}': '@{which}' is unknown" + did_you_mean(which, ["model", "ema"]))
    path = Path(name)
    if not path.is_dir():
        raise ConfigError(
            f"'{name}' does not exist; give a run directory, a checkpoint, a model folder or "
            f"the name of shipped weights ({', '.join(SHIPPED)})"
        )
    if (path / "config.json").is_file() and not which:
        return path
    checkpoint = path if (path / "meta.json").is_file() else latest(path)
    if checkpoint is None:
        raise ConfigError(f"'{name}' holds no complete checkpoint; train it first: python train.py CONFIG")
    options = [folder for folder in ("ema", "model") if (checkpoint / folder).is_dir()]
    which = which or options[0]
    if which not in options:
        raise ConfigError(f"{checkpoint} has no '{which}' weights; it has: {', '.join(options)}")
    return checkpoint / which


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> list:
    """[bytes, sha256]"""
    return [path.stat().st_size, sha256_of(path)]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
