"""The run directory, for whoever reads or writes one.

    RUN/config.yaml  metrics.jsonl  samples/  STATUS.json
    RUN/checkpoints/step-0001000/
        model/   config.json  model.safetensors      EMMDiT.from_pretrained(...), TextToImage.from_pretrained(...)
        ema/     the same, when the run keeps an average
        trainer/ what a resume needs: module and optimiser of every phase, EMA counters
        meta.json                                     written last: step, experiment, size and sha256 of every file
    RUN/base/                                         of a run that trains an adapter: what it is put on, as in model/,
                                                      where model/ and ema/ hold adapter/ in place of model.safetensors
    RUN/best/step-0000500/                            the weights with the highest score so far, as in model/: RUN@best

A checkpoint is complete when it has its meta.json; `training.checkpoint` writes, verifies and prunes checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nitro_e.config import ConfigError, TrainingError, did_you_mean, parse_json, read_text
from nitro_e.files import EMOJI, SHIPPED, write_text

STEP = re.compile(r"step-(\d+)")
# names of weights that the package brings along
NAMED = {
    "shapes": SHIPPED / "model",
    "shapes-grpo": SHIPPED / "grpo",
    "shapes-4step": SHIPPED / "4step",
    "emoji": EMOJI / "model",
}


def folder_of(run: Path, step: int) -> Path:
    """Name the folder of the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:07d}"


def complete(run: Path) -> list[Path]:
    """List the completely written checkpoints of a run, oldest first."""
    folders = [
        path.parent
        for path in (run / "checkpoints").glob("step-*/meta.json")
        if STEP.fullmatch(path.parent.name)
    ]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """Read the step from the name of a checkpoint's folder."""
    return int(STEP.fullmatch(folder.name)[1])


def latest(run: Path) -> Path | None:
    """Find the newest complete checkpoint of a run."""
    return (complete(run) or [None])[-1]


def best(run: Path) -> Path | None:
    """Find the model folder with the highest score of a run, which is named after its step."""
    folders = [path for path in (run / "best").glob("step-*") if STEP.fullmatch(path.name)]
    return max(folders, key=step_of, default=None)


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """Read the `meta.json` of a checkpoint. ValueError if it is not what was written, OSError if it cannot be read."""
    meta = parse_json(read_text(checkpoint / "meta.json"), "it")
    if not isinstance(meta, dict) or not isinstance(meta.get("files"), dict):
        raise ValueError("is not the record of a checkpoint")
    written = meta.pop("sha256", None)  # absent in checkpoints of earlier versions
    if written is not None and written != digest_of(meta):
        raise ValueError("has the wrong sha256")
    if meta.get("step") != step_of(checkpoint):
        raise ValueError(f"is of step {meta.get('step')!r}")
    return meta


def split_source(source: str | Path) -> tuple[str, str]:
    """Split `RUN@ema` into the folder and what is chosen of it, "" if nothing is; folders may have an @ in their names."""
    name, _, which = str(source).rpartition("@")
    chosen = name and "/" not in which and not Path(source).exists()
    return (name, which) if chosen else (str(source), "")


def model_folder(source: str | Path) -> Path:
    """Find the model folder meant by `RUN`, `RUN/checkpoints/step-N`, a model folder itself, or the name of shipped weights.

    `@model` or `@ema` at the end chooses the weights of a run or checkpoint; the default is the average if there is one.
    `RUN@best` means those with the highest score, where the recipe has `evaluation.best`.
    """
    name, which = split_source(source)
    if str(source) in NAMED and not Path(source).exists():
        return NAMED[str(source)]
    if which not in ("", "model", "ema", "best"):
        raise ConfigError(
            f"'{source}': '@{which}' is unknown" + did_you_mean(which, ["model", "ema", "best"])
        )
    path = Path(name)
    if not path.is_dir():
        raise ConfigError(
            f"'{name}' does not exist; give a run directory, a checkpoint, a model folder or "
            f"the name of shipped weights ({', '.join(NAMED)})"
        )
    if (path / "config.json").is_file() and not which:
        return path
    if which == "best":
        found = best(path)
        if found is None:
            raise ConfigError(
                f"'{name}' has no best/ weights; its recipe needs evaluation.best: the title of a reward"
            )
        return found
    checkpoint = path if (path / "meta.json").is_file() else latest(path)
    if checkpoint is None:
        raise ConfigError(f"'{name}' holds no complete checkpoint; train it first: nitro-e train CONFIG")
    options = [folder for folder in ("ema", "model") if (checkpoint / folder).is_dir()]
    which = which or options[0]
    if which not in options:
        raise ConfigError(f"{checkpoint} has no '{which}' weights; it has: {', '.join(options)}")
    return checkpoint / which


def write_status(run: Path, state: str, step: int, **details: Any) -> None:
    """Replace `STATUS.json` atomically: running, preempted, done, crashed or failed. Job scripts decide by it."""
    path = run / "STATUS.json"
    text = json.dumps({"state": state, "step": step, "time": round(time.time(), 1), **details}) + "\n"
    try:
        write_text(path, text)
    except OSError:  # a full disk still lets the text that is there be overwritten
        with path.open("r+") as file:
            file.write(text.rstrip("\n").ljust(path.stat().st_size - 1) + "\n")


def read_status(run: Path) -> dict[str, Any]:
    """Read `STATUS.json`; empty if there is none or it cannot be read."""
    try:
        status = parse_json(read_text(run / "STATUS.json"), "STATUS.json")
    except (OSError, ConfigError):
        return {}
    return status if isinstance(status, dict) else {}


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Let only one job train in a run directory; the kernel frees the lock however the job ends.

    It is a record lock (POSIX), which belongs to this process alone: data workers, which outlive a killed job by some
    seconds, do not inherit it. A directory that holds nothing else afterwards, of a refused config, is removed again.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = _is_at(file.fileno(), run / ".lock")  # not removed by another job just now
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            alone = False
        if not alone:
            raise ConfigError(
                f"another job is training in {run}; wait for it, stop it, or choose another run=..."
            )
        try:
            yield
        finally:
            if os.path.isdir(run) and os.listdir(run) == [".lock"]:
                (run / ".lock").unlink()
                run.rmdir()


class Presence:
    """Tells whether a run directory is still the one that it was when this was made, also if it was made anew."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._handle = os.open(run, os.O_RDONLY)  # held open: its number cannot be given to another

    def check(self) -> None:
        """Raise TrainingError if the directory was deleted, moved or replaced."""
        if not _is_at(self._handle, self.run):
            raise TrainingError(
                f"{self.run} was deleted, moved or replaced while this job trained in it; nothing more is written there. "
                "Put it back and run the same command again, or begin anew"
            )

    def close(self) -> None:
        os.close(self._handle)


def digest_of(record: dict[str, Any]) -> str:
    """Hash plain data (sha256), however it is laid out in a file."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _is_at(handle: int, path: Path) -> bool:
    """Tell whether the open file or directory is the one that the path names now."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
