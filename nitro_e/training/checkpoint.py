"""Checkpoints: how they are written, verified and pruned. Where they lie is told by `record.run_folder`.

A checkpoint is written to `step-N.tmp`, synced, renamed when complete, and only then are old ones pruned: a kill, a
full disk or a power cut at any time leaves the previous one. A resume takes the newest whose hashes are right; one
that is damaged, or has lost its meta.json, is renamed to `bad-step-N` and named in a warning.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nitro_e.config import TrainingError
from nitro_e.files import atomic_path, sha256_of, sync
from nitro_e.record.run_folder import STEP, best, complete, digest_of, folder_of, latest, read_meta, step_of

log = logging.getLogger(__name__)


def save(run: Path, step: int, write: Callable[[Path], None], meta: dict[str, Any]) -> Path:
    """Let `write(folder)` fill a new checkpoint and publish it. On any error nothing is left of it; OSError comes through."""
    final = folder_of(run, step)
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        files = {str(path.relative_to(temporary)): _fingerprint(path) for path in _files(temporary)}
        record = {"step": step, **meta, "files": files}
        record["sha256"] = digest_of(record)
        (temporary / "meta.json").write_text(json.dumps(record, indent=1) + "\n")
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if final.exists():  # only after a resume from an older step
            shutil.rmtree(final)
        temporary.rename(final)
        sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def prune(run: Path, keep_last: int, keep_every: int = 0) -> None:
    """Delete all but the newest `keep_last` checkpoints, the best one and the milestones, every `keep_every` steps.

    What is to go is renamed first: a kill half-way leaves no half a checkpoint, only a `.tmp` for the next time.
    """
    kept = best(run)
    for old in complete(run)[:-keep_last]:
        if (not keep_every or step_of(old) % keep_every) and (kept is None or old.name != kept.name):
            old.rename(old.with_suffix(".tmp"))
    for leftover in (run / "checkpoints").glob("step-*.tmp"):
        shutil.rmtree(leftover)


def save_base(run: Path, write: Callable[[Path], None]) -> str:
    """Let `write(folder)` fill RUN/base, the frozen weights under an adapter; returns their sha256."""
    folder = run / "base"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that began anew
    with atomic_path(folder) as temporary:
        write(temporary)
    return sha256_of(folder / "model.safetensors")


def check_base(run: Path, meta: dict[str, Any]) -> str | None:
    """Return the sha256 of RUN/base that a checkpoint names; TrainingError if the file is gone or another one."""
    if (expected := meta.get("base")) is None:
        return None
    path = run / "base" / "model.safetensors"
    if not path.is_file() or sha256_of(path) != expected:
        raise TrainingError(
            f"{path}, the weights that the adapter of {run} is trained on, is missing or not what was written; put a copy "
            "back, or delete the run's checkpoints to begin again from the start"
        )
    return expected


def publish_best(run: Path, step: int, write: Callable[[Path], None]) -> None:
    """Let `write(folder)` fill the model folder of the best step, in place of the one before; OSError comes through."""
    folder, before = run / "best" / folder_of(run, step).name, best(run)
    folder.parent.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt
    with atomic_path(folder) as temporary:
        write(temporary)
    if before is not None and before != folder:
        shutil.rmtree(before)


def latest_valid(run: Path) -> Path | None:
    """Find the newest checkpoint whose files are what was written; damaged ones are renamed, with a warning."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if STEP.fullmatch(path.name)]
    for folder in sorted(folders, key=step_of, reverse=True):
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
    """Raise TrainingError if a run had checkpoints and none is whole: it must not begin anew unnoticed."""
    damaged = sorted(run.glob("checkpoints/bad-step-*"))
    if damaged and latest(run) is None:
        raise TrainingError(
            f"every checkpoint of {run} is damaged ({', '.join(folder.name for folder in damaged)}): put a copy back, or "
            "delete them to begin again from the start"
        )


def damage(folder: Path) -> str | None:
    """Say what differs from `meta.json`, or None."""
    try:
        files = read_meta(folder)["files"]
    except (OSError, ValueError) as error:
        return f"meta.json: {error}"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _fingerprint(path)[1] != digest:
            return f"{name} has the wrong sha256"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> list:
    """Return [bytes, sha256], as `meta.json` holds them."""
    return [path.stat().st_size, sha256_of(path)]
