"""Where numbers and pictures of a run go: `metrics.jsonl` is the record, wandb a mirror that may fail.

Lines are appended; a resumed run writes a new `attempt`, and lines of an earlier attempt past the step where the new
one starts are superseded (`read` drops them).
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import time
from pathlib import Path
from typing import Any, Literal

from PIL import Image

log = logging.getLogger(__name__)

WandbMode = Literal["auto", "online", "offline", "disabled"]


class Metrics:
    """Writer of one run. Only the main process makes one that is `enabled`."""

    def __init__(self, run: Path, *, start_step: int, wandb: WandbMode, config: dict[str, Any], enabled: bool) -> None:
        self.run, self.enabled, self.failures = run, enabled, 0
        self._file = self._wandb = None
        if not enabled:
            return
        path = run / "metrics.jsonl"
        attempts = [row["attempt"] for row in _rows(path)] if path.exists() else []
        self.attempt = max(attempts, default=0) + 1
        self._file = path.open("a", buffering=1)
        self._write_line({"step": start_step, "event": "start"})
        self._start_wandb(wandb, config)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record scalars of an optimiser step."""
        if not self.enabled or not values:
            return
        self._write_line({"step": step, **values})
        self._mirror({"step": step, **values})

    def write_image(self, step: int, name: str, image: Image.Image) -> Path:
        """Save `samples/step-N-NAME.png` and mirror it."""
        path = self.run / "samples" / f"step-{step:07d}-{name}.png"
        if self.enabled:
            path.parent.mkdir(exist_ok=True)
            image.save(path)
            if self._wandb is not None:
                import wandb

                self._mirror({"step": step, name: wandb.Image(image)})
        return path

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._attempt_wandb(self._wandb.finish)

    def _write_line(self, row: dict[str, Any]) -> None:
        row = {"attempt": self.attempt, "time": round(time.time(), 3), **row}
        self._file.write(json.dumps(row) + "\n")

    def _start_wandb(self, mode: WandbMode, config: dict[str, Any]) -> None:
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError:
            log.warning("wandb is not installed: metrics go to %s only", self.run / "metrics.jsonl")
            return
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE", "online" if has_wandb_key() else "offline")
        id_file = self.run / "wandb_id.txt"
        run_id = id_file.read_text().strip() if id_file.exists() else None
        settings = wandb.Settings(silent=True, console="off")
        start = lambda: wandb.init(  # noqa: E731
            project="nitro-e", name=self.run.name, id=run_id, resume="allow", mode=mode, dir=str(self.run), config=config,
            settings=settings,
        )  # fmt: skip
        self._wandb = self._attempt_wandb(start)
        if self._wandb is not None:
            id_file.write_text(self._wandb.id)
            self._wandb.define_metric("*", step_metric="step")  # our own axis: replayed steps are not dropped

    def _mirror(self, values: dict[str, Any]) -> None:
        if self._wandb is not None:
            self._attempt_wandb(lambda: self._wandb.log(values))

    def _attempt_wandb(self, action) -> Any:
        """A tracker never stops training: three failures and it is dropped."""
        try:
            return action()
        except Exception as error:
            self.failures += 1
            log.warning("wandb failed (%d of 3): %s", self.failures, error)
            if self.failures >= 3:
                log.warning("wandb is dropped for the rest of this run")
                self._wandb = None
            return None


def has_wandb_key() -> bool:
    """Whether a login is at hand, without asking anybody: the variable, or the netrc entry of `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def read(run: Path) -> list[dict[str, Any]]:
    """The valid rows of a run in step order: of each step the newest attempt, superseded lines dropped."""
    kept: list[dict[str, Any]] = []
    for row in _rows(run / "metrics.jsonl"):
        if row.get("event") == "start":
            kept = [old for old in kept if old["step"] <= row["step"]]
        else:
            kept.append(row)
    return kept


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the line that a kill cut short
            log.warning("%s: one unreadable line skipped: %.40s", path, line)
    return rows
