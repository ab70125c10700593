"""When a run writes its checkpoints, what happens if it cannot, and from which one it continues."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator

from nitro_e.config import Config, ConfigError, TrainingError
from nitro_e.model.pretrained import save_pretrained
from nitro_e.record import run_folder
from nitro_e.training import checkpoint
from nitro_e.training.parallel import any_process
from nitro_e.training.state import TrainingState

if TYPE_CHECKING:
    from nitro_e.training.engine import EngineConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ResumeConfig(Config):
    """Says what may differ from the last checkpoint when a run is continued; by default nothing."""

    # data: other samples, sources, weights, captions or conditions; batch: another global batch
    allow: tuple[Literal["data", "batch"], ...] = ()

    def covers(self, key: str) -> bool:
        """Tell whether this part of a run's identity may differ."""
        return (
            "batch" in self.allow
            and key == "global batch"
            or "data" in self.allow
            and key.startswith("data ")
        )


class Saver:
    """Writes the training state into the run directory, and reads it back."""

    def __init__(
        self,
        config: EngineConfig,
        run: Path,
        state: TrainingState,
        accelerator: Accelerator,
        *,
        identity: dict[str, Any],
        use: dict[str, Any],
        resume: ResumeConfig,
    ) -> None:
        """identity: what must be the same for a resume to continue the same run, but for what `resume` allows.

        use: stored with published weights.
        """
        self.config, self.run, self.state, self.accelerator = config, run, state, accelerator
        self.identity, self.use, self.allowed = identity, use, resume
        self.changed: dict[str, Any] = {}  # parts of the identity that were allowed to differ: [before, now]
        self.saved_step: int | None = None
        self.base_digest: str | None = (
            None  # of the weights that an adapter is trained on, once they are saved
        )
        self.failures = 0  # in a row
        self._due = False

    def due(self) -> bool:
        """Tell whether a checkpoint is to be written: from every `save_every` steps and the last one on, until it is."""
        every = self.config.save_every if not self.failures else max(self.config.save_every // 2, 1)
        self._due |= self.state.step % every == 0 or self.state.step == self.config.steps
        return self._due

    def save(self) -> str | None:
        """Write a checkpoint, in which every process takes part. Returns why it failed (a full disk), or None.

        A failure is counted; it is tried again at half the interval, and training goes on from memory.
        """
        # an adapter is merged at the end, and for RUN/best
        merged = not self.state.adapted or self.state.step == self.config.steps
        published, gathered = self.state.published() if merged else {}, self.state.gather()
        self.state.check_finite(gathered, run_folder.latest(self.run))
        failure, self._due = "", False
        if self.accelerator.is_main_process:
            try:
                if self.state.adapted and self.base_digest is None:
                    base = self.state.stage.base()  # type: ignore[attr-defined]  # which a stage with an adapter has
                    self.base_digest = checkpoint.save_base(
                        self.run, lambda folder: save_pretrained(base, folder, self.use)
                    )
                checkpoint.save(
                    self.run,
                    self.state.step,
                    lambda folder: self.state.write(folder, published, gathered, self.use),
                    self._meta(),
                )
                checkpoint.prune(self.run, self.config.keep_last, self.config.keep_every)
            except OSError as error:
                failure = str(error)
                log.error(
                    "step %d could not be saved (%s); the checkpoints before it are untouched",
                    self.state.step,
                    error,
                )
        if any_process(bool(failure)):
            self.failures += 1
            return failure or "see process 0"
        self.failures, self.saved_step = 0, self.state.step
        return None

    def publish_best(self, about: dict[str, Any]) -> None:
        """Write the published weights of this step to RUN/best; about: why, for people. OSError comes through."""
        published = self.state.published()
        name = "ema" if "ema" in published else "model"
        if self.accelerator.is_main_process:
            checkpoint.publish_best(
                self.run,
                self.state.step,
                lambda folder: self.state.write_published(folder, name, published[name], self.use, about),
            )

    def roll_back(self) -> int:
        """Load the state of the best step, which is returned. The number of steps that were done stays."""
        best = run_folder.best(self.run)
        if best is None:
            raise TrainingError(f"{self.run}/best is gone: there is no checkpoint to go back to")
        step = run_folder.step_of(best)
        folder = run_folder.folder_of(self.run, step)
        if problem := checkpoint.damage(folder):
            raise TrainingError(f"{folder}, to go back to, is damaged ({problem})")
        self.state.load(folder)
        return step

    def resume(self) -> bool:
        """Continue from the newest valid checkpoint of the run directory; False if there is none."""
        with self.accelerator.main_process_first():  # the first to look renames damaged ones
            folder = checkpoint.latest_valid(self.run)
        if folder is None:
            checkpoint.refuse_damaged(self.run)
            return False
        meta = run_folder.read_meta(folder)
        keys = [
            *self.identity,
            *(key for key in meta if key.startswith("data ") and key not in self.identity),
        ]
        pairs = {key: [meta.get(key), self.identity.get(key)] for key in keys}
        self.changed = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        if refused := [key for key in self.changed if not self.allowed.covers(key)]:
            differences = "; ".join(f"{key} was {pairs[key][0]!r}, is {pairs[key][1]!r}" for key in refused)
            kinds = {"batch" if key == "global batch" else key.partition(" ")[0] for key in refused}
            on_purpose = (
                f", or continue with it on purpose: resume.allow=[{', '.join(sorted(kinds | {*self.allowed.allow}))}]"
                if kinds <= {"data", "batch"}
                else ""
            )
            raise ConfigError(
                f"{folder} is of another experiment ({differences}); give this one its own run directory:"
                f" run=...{on_purpose}"
            )
        self.base_digest = checkpoint.check_base(self.run, meta)
        self.state.load(folder)
        self.state.step, self.state.skipped = meta["step"], meta.get("skipped", 0)
        self.saved_step = self.state.step
        return True

    def _meta(self) -> dict[str, Any]:
        extras: dict[str, Any] = {"world": self.accelerator.num_processes, "skipped": self.state.skipped}
        if self.base_digest is not None:
            extras["base"] = self.base_digest
        return {**self.identity, **extras, "torch": torch.__version__}
