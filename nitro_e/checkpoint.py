"""Run directories and checkpoints.

    RUN/config.yaml  metrics.jsonl  samples/
    RUN/checkpoints/step-0001000/
        model/   config.json  model.safetensors      EMMDiT.from_pretrained(...), TextToImage.from_pretrained(...)
        ema/     the same, when the run keeps an average
        trainer/ what a resume needs: module and optimiser of every phase, EMA counters
        meta.json                                     written last: a folder without it is not a checkpoint

A checkpoint is written to `step-N.tmp` and renamed when complete, so a kill at any time leaves the previous one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nitro_e.config import ConfigError, did_you_mean

STEP = re.compile(r"step-(\d+)")


def save(run: Path, step: int, write: Callable[[Path], None], meta: dict[str, Any], keep_last: int) -> Path:
    """Let `write(folder)` fill a new checkpoint, publish it, then prune all but the newest `keep_last`."""
    root = run / "checkpoints"
    final, temporary = root / f"step-{step:07d}", root / f"step-{step:07d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    (temporary / "meta.json").write_text(json.dumps({"step": step, **meta}, indent=1) + "\n")
    _sync_tree(temporary)
    if final.exists():  # only after a resume from an older step
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(root)
    for old in complete(run)[:-keep_last]:
        shutil.rmtree(old)
    return final


def complete(run: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step-*")
    found = [(int(match[1]), path) for path in folders if (match := STEP.fullmatch(path.name)) and (path / "meta.json").is_file()]
    return [path for _, path in sorted(found)]


def latest(run: Path) -> Path | None:
    return (complete(run) or [None])[-1]


def read_meta(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "meta.json").read_text())


def model_folder(source: str | Path) -> Path:
    """The model folder meant by `RUN`, `RUN/checkpoints/step-N` or a model folder itself.

    `@model` or `@ema` at the end chooses the weights of a run or checkpoint; the default is the average if there is one.
    """
    name, _, which = str(source).partition("@")
    if which not in ("", "model", "ema"):
        raise ConfigError(f"'{source}': '@{which}' is unknown" + did_you_mean(which, ["model", "ema"]))
    path = Path(name)
    if not path.is_dir():
        raise ConfigError(f"'{name}' does not exist; give a run directory, a checkpoint or a model folder")
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


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
