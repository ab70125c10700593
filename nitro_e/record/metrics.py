"""Numbers and images of a run: files in the run directory are the record, a tracker is a mirror that may fail.

    RUN/metrics.jsonl                  one line per report, each with its attempt, step and time; events are lines too
    RUN/samples/step-0001000-NAME.png  images; what was asked for is in the text entries `prompts` and `cells`
    RUN/wandb/ or RUN/tensorboard/     what the tracker keeps

Lines are only ever appended. A resumed run starts a new attempt; lines of earlier attempts past the step where it
starts are superseded, and `read` drops them. Training never stops for a tracker: after three failures it is dropped.
A full disk does not stop training either, but is reported as an error at every line until the disk has room again.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nitro_e.config import Config, ConfigError, parse_json
from nitro_e.files import save_png
from nitro_e.record.environment import environment

log = logging.getLogger(__name__)

# auto: wandb with a login at hand, else tensorboard if installed, else none. WANDB_MODE is obeyed.
Tracker = Literal["auto", "none", "wandb", "wandb:offline", "tensorboard"]
MAX_FAILURES = 3
PROMPTS, CELLS = "prompts", "cells"  # text entries of a captioned sheet


@dataclass(frozen=True, kw_only=True)
class WandBConfig(Config):
    """Says where runs are shown on Weights & Biases; what is not set here comes from the environment variables."""

    project: str | None = None  # None: $WANDB_PROJECT, or nitro-e
    entity: str | None = None  # user or team; None: $WANDB_ENTITY, or the account's default
    group: str | None = None  # of runs that belong together, such as seeds; None: $WANDB_RUN_GROUP, or none
    tags: tuple[str, ...] = ()  # of the run


class Metrics:
    """Writes the numbers, images and events of one attempt of a run; only in the main process is it `enabled`."""

    def __init__(
        self,
        run: Path,
        *,
        start_step: int,
        config: dict[str, Any],
        enabled: bool,
        tracker: Tracker = "auto",
        wandb: WandBConfig = WandBConfig(),
    ) -> None:
        self.run, self.enabled, self.step, self.wandb = run, enabled, start_step, wandb
        self.failures, self.mirror = 0, None
        if not enabled:
            return
        path = run / "metrics.jsonl"
        self.attempt = 1 + max((row.get("attempt", 0) for row in read_lines(run)), default=0)
        self._lines = _Lines(path)
        self.event(start_step, "start", environment=environment())
        self._start_tracker(tracker, config)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record scalars of an optimiser step."""
        if self.enabled and values:
            self._write_line(step, values)
            self._guard(lambda mirror: mirror.log(step, values))

    def write_image(self, step: int, name: str, image: Image.Image) -> Path:
        """Save `samples/step-N-NAME.png` with its captions, if it has some (`caption`), then mirror it."""
        path = self.run / "samples" / f"step-{step:07d}-{name}.png"
        if self.enabled:
            try:
                path.parent.mkdir(exist_ok=True)
                save_png(image, path, _captions(image))
            except OSError as error:
                log.error("%s could not be written: %s", path, error)
                self.event(step, "warning", message=f"{path.name} could not be written: {error}")
            self._guard(lambda mirror: mirror.log_image(step, name, image))
        return path

    def event(self, step: int, event: str, **details: Any) -> None:
        """Record something that happened, such as a skipped step or a checkpoint that could not be written."""
        if self.enabled:
            self._write_line(step, {"event": event, **details})

    def close(self) -> None:
        """End the attempt: the tracker gets what it has not sent, the file is closed."""
        if self.enabled:
            self._guard(lambda mirror: mirror.close())
            self.mirror = None
            self._lines.close()

    def _write_line(self, step: int, values: dict[str, Any]) -> None:
        self.step = step
        row = {"attempt": self.attempt, "time": round(time.time(), 3), "step": step, **values}
        self._lines.append(json.dumps(row))

    def _start_tracker(self, tracker: Tracker, config: dict[str, Any]) -> None:
        kind, _, mode = tracker.partition(":")
        if kind == "auto":
            kind = _best_tracker()
        mode = mode or os.environ.get("WANDB_MODE", "online")
        if kind == "wandb" and mode == "online" and not has_wandb_key():
            self._warn(
                "wandb has no key (wandb login, or WANDB_API_KEY): offline; send it later with wandb sync"
            )
            mode = "offline"
        if kind == "none" or (kind == "wandb" and mode == "disabled"):
            return
        if kind == "tensorboard":
            self.mirror = self._attempt(lambda: TensorBoard(self.run, config, start_step=self.step))
            return
        self.mirror = self._attempt(lambda: WandB(self.run, config, mode, place=self.wandb))
        if self.mirror is None and mode == "online":
            self._warn("wandb cannot be reached: offline; send it later with wandb sync")
            self.mirror = self._attempt(lambda: WandB(self.run, config, "offline", place=self.wandb))

    def _guard(self, action: Callable[[Any], None]) -> None:
        if self.mirror is not None:
            self._attempt(lambda: action(self.mirror))
            if self.failures >= MAX_FAILURES:
                self._warn(
                    f"the tracker failed {self.failures} times and is dropped; {self._lines.path} goes on"
                )
                self.mirror = None

    def _attempt(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # whatever a tracker raises is not worth a training run
            self.failures += 1
            self._warn(f"tracker failure {self.failures} of {MAX_FAILURES}: {type(error).__name__}: {error}")
            return None

    def _warn(self, message: str) -> None:
        log.warning(message)
        self.event(self.step, "warning", message=message)


class WandB:
    """Mirrors a run to Weights & Biases. The id is kept in the run directory, so a resumed run continues the same page."""

    def __init__(self, run: Path, config: dict[str, Any], mode: str, place: WandBConfig) -> None:
        import wandb

        id_file = run / "wandb_id.txt"
        settings = {"silent": True, "console": "off", "init_timeout": 30}
        # Without a timeout, a run without network would never end.
        if "finish_timeout" in getattr(wandb.Settings, "model_fields", {}):
            settings["finish_timeout"] = 60
        self.wandb = wandb
        self.page = wandb.init(
            project=place.project or os.environ.get("WANDB_PROJECT") or "nitro-e",
            entity=place.entity,
            group=place.group,
            tags=list(place.tags) or None,
            name=run.name,
            id=id_file.read_text().strip() if id_file.exists() else None,
            resume="allow",
            mode=mode,
            dir=str(run),
            config=config,
            settings=wandb.Settings(**settings),
        )
        id_file.write_text(self.page.id)
        self.page.define_metric("*", step_metric="step")  # our own axis: replayed steps are not dropped

    def log(self, step: int, values: dict[str, float]) -> None:
        self.page.log({"step": step, **values})

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        captioned = [self.wandb.Image(cell, caption=prompt) for cell, prompt in cells(image)]
        self.page.log({"step": step, name: captioned or self.wandb.Image(image)})

    def close(self) -> None:
        self.page.finish()


class TensorBoard:
    """Mirrors a run to `RUN/tensorboard`; what an earlier attempt wrote past the starting step is purged there too."""

    def __init__(self, run: Path, config: dict[str, Any], start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=start_step + 1)
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=1)}\n```", start_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class _Lines:
    """A file of lines that survives a full disk: what could not be written is kept and tried again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        cut_short = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
        self._file = path.open("ab", buffering=0)
        # a kill in the middle of a line: do not glue the next one to it
        self._pending = b"\n" if cut_short else b""

    def append(self, line: str) -> None:
        failed_before = self._pending not in (b"", b"\n")
        self._pending += line.encode() + b"\n"
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            lines = self._pending.count(b"\n")
            log.error(
                "CANNOT WRITE %s (%s): %d lines are held in memory; free some space", self.path, error, lines
            )
        else:
            if failed_before:
                log.warning("%s can be written again; no line was lost", self.path)

    def close(self) -> None:
        if self._pending:
            log.error(
                "LOST: the last %d lines of %s could not be written", self._pending.count(b"\n"), self.path
            )
        self._file.close()


def caption(sheet: Image.Image, prompts: Sequence[str], columns: int, size: tuple[int, int]) -> Image.Image:
    """Note in a sheet of images, each of `size` (width, height), their prompts, row by row, as text entries."""
    sheet.info[PROMPTS] = json.dumps(list(prompts))
    sheet.info[CELLS] = json.dumps({"columns": columns, "size": size})
    return sheet


def cells(sheet: Image.Image) -> list[tuple[Image.Image, str]]:
    """Cut a captioned sheet into its images, each with its prompt; a sheet without captions gives none."""
    if PROMPTS not in sheet.info or CELLS not in sheet.info:
        return []
    prompts, layout = json.loads(sheet.info[PROMPTS]), json.loads(sheet.info[CELLS])
    columns, (width, height) = layout["columns"], layout["size"]
    rows = -(-len(prompts) // columns)
    found = []
    for index, prompt in enumerate(prompts):
        row, column = divmod(index, columns)
        left = column * (sheet.width - width) // max(columns - 1, 1)  # the gaps between images are equal
        top = row * (sheet.height - height) // max(rows - 1, 1)
        found.append((sheet.crop((left, top, left + width, top + height)), prompt))
    return found


def has_wandb_key() -> bool:
    """Tell whether there is a login on this machine: the environment variable, or the netrc entry of `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def read(run: Path) -> list[dict[str, Any]]:
    """Read the valid rows of a run in step order: the newest attempt of each step, without superseded lines and events."""
    kept: list[dict[str, Any]] = []
    for row in read_lines(run):
        if row.get("event") == "start":
            kept = [old for old in kept if old["step"] <= row["step"]]
        elif "event" not in row:
            kept.append(row)
    return kept


def read_events(run: Path) -> list[dict[str, Any]]:
    """Read what happened, in the order of the file: the start of every attempt, warnings, skipped steps."""
    return [row for row in read_lines(run) if "event" in row]


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Read all lines of a run as they stand in the file, superseded ones and events too."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = parse_json(line, "line")
        except ConfigError:
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int and type(row.get("attempt", 0)) is int:
            rows.append(row)
        elif line:  # cut short by a kill, or damaged
            log.warning("%s: one unreadable line skipped: %.40s", path, line)
    return rows


def _captions(image: Image.Image) -> PngInfo:
    """Collect the text entries of a captioned sheet."""
    text = PngInfo()
    for name in (PROMPTS, CELLS):
        if name in image.info:
            text.add_itxt(name, image.info[name])
    return text


def _best_tracker() -> str:
    wanted = os.environ.get("WANDB_MODE")
    if find_spec("wandb") and (wanted in ("online", "offline") or (wanted is None and has_wandb_key())):
        return "wandb"
    return "tensorboard" if find_spec("tensorboard") else "none"
