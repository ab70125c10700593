"""The record of a study: costs, losses and scores of each training, a line of JSON each.

Runs and images are large and stay on the machine that made them. A record is small: kept beside the tables, it lets
several machines, or sittings of one, add up to one table, and the table be written anew without any run. What stands in
it is not measured again; remove its line to do so. Losses of every image and scores of every prompt are in it, because
differences are paired.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nitro_e.config import ConfigError, parse_json, read_text, to_dict
from nitro_e.evaluation.intervals import Estimate
from nitro_e.evaluation.results import plain
from nitro_e.studies.plan import Equal, Setting, Study, Trial, trial
from nitro_e.studies.training import Cost

# Keys that say how fast a training is and not what is trained: they move its figures as another processor's rounding does,
# so that trainings of several machines, each at its fastest, stand in one table.
SPEED = ("engine.precision", "engine.compile", "engine.compile_encoders")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one training at one setting."""

    setting: Setting
    scores: dict[str, float]  # title -> overall
    by_task: dict[str, list[float]] | None = (
        None  # the first score of every prompt, NaN: unknown; for paired differences
    )
    difference: Estimate | None = None  # of the first score to the base, paired; without a base see `by_task`
    seen: float | None = None  # of the first score, where prompts say so
    unseen: float | None = None
    diversity: float | None = None  # ratio to the reference's; None: unknown, as where nothing is right


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The validation losses of one training."""

    images: str  # which ones, in which order: a hash
    times: list[float]
    by_image: list[float]  # mean over times
    by_time: list[float]  # mean over images


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one training has cost, and where."""

    device: str  # on which it was measured, and as a rule trained
    before: float  # CPU seconds of what it needs: stored images, the training that it begins with
    cost: Cost


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One training, or the base itself: what it has cost, its losses, and its scores at all settings."""

    variant: str
    seed: int | None  # None: the base
    equal: Equal
    run: str | None  # the folder's name; one training may stand for two kinds of equality
    of: dict[str, Any]  # what the figures hold for, see `subject`
    revision: str | None  # of the code
    spent: Spent | None = None
    losses: Losses | None = None
    scores: tuple[Scores, ...] = ()

    def at(self, setting: Setting) -> Scores | None:
        return next((each for each in self.scores if each.setting == setting), None)

    def without(self, settings: Sequence[Setting]) -> list[Setting]:
        """List the settings that it was not scored at."""
        return [setting for setting in settings if self.at(setting) is None]


def subject(plan: Study, name: str, seed: int | None) -> dict[str, Any]:
    """Describe what a training and its scores depend on; the texts of recipes and presets are not in it."""
    judged = {key: getattr(plan, key) for key in ("benchmark", "num", "base", "reference")}
    if plan.diversity is not None:
        judged["diversity"] = to_dict(plan.diversity)
    trained = {} if seed is None else {"overrides": list(trial(plan, name, seed).overrides)}
    return plain({**judged, "recipe": plan.variants[name].recipe, **trained})


def _changes(some: Sequence[str], others: Sequence[str]) -> list[str]:
    """List the overrides that are not among the others, without those of speed alone."""
    return [each for each in some if each not in others and each.partition("=")[0] not in SPEED]


def _scores(row: dict[str, Any]) -> Scores:
    """Read the scores of a line; JSON has no NaN."""
    tasks = row["by_task"] and {
        task: [math.nan if value is None else value for value in values]
        for task, values in row["by_task"].items()
    }
    difference = row["difference"] and Estimate(**row["difference"])
    return Scores(**{**row, "by_task": tasks, "difference": difference})


class Record:
    """What is known of a study's trainings; with a file it outlives the process."""

    def __init__(self, plan: Study, path: Path | None) -> None:
        """Read the file, if there is one. ConfigError for a line that is damaged or holds for another study."""
        self.plan, self.path = plan, path
        self._known: dict[tuple[str, int | None, Equal], Measured] = {}
        if path is not None and path.is_file():
            for number, line in enumerate(read_text(path).splitlines(), 1):
                if line.strip():
                    self._read(parse_json(line, f"{path}:{number}"), f"{path}:{number}")

    def _read(self, row: Any, where: str) -> None:
        try:
            found = Measured(
                **{
                    **row,
                    "spent": row["spent"] and Spent(**{**row["spent"], "cost": Cost(**row["spent"]["cost"])}),
                    "losses": row["losses"] and Losses(**row["losses"]),
                    "scores": tuple(_scores(each) for each in row["scores"]),
                }
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{where} is no line of a study's record ({error}); remove it") from None
        self._known[found.variant, found.seed, found.equal] = found

    def find(self, variant: str, seed: int | None, equal: Equal) -> Measured | None:
        """Look a training up. ConfigError if it was another one than the study's today."""
        found = self._known.get((variant, seed, equal))
        if found is None:
            return None
        expected = subject(self.plan, variant, seed)
        for key in sorted(found.of.keys() | expected.keys()):
            before, now = found.of.get(key), expected.get(key)
            if isinstance(before, list) and isinstance(now, list):  # overrides are many: those that differ
                before, now = _changes(before, now), _changes(now, before)
            if before != now:
                raise ConfigError(
                    f"{self.path}: '{variant}', seed {seed} was measured with {key} {before!r}, the study has {now!r}; "
                    "remove the line to measure it anew"
                )
        return found

    def holds(self, each: Trial) -> bool:
        """Tell whether all that the study asks of a training is known, so that it needs no run."""
        known = [found for found in self._known.values() if found.run == each.folder.name]
        checked = [self.find(found.variant, found.seed, found.equal) for found in known]
        settings = self.plan.settings_of(each.variant)
        return any(found and not found.without(settings) for found in checked)

    def add(self, measured: Measured) -> None:
        """Remember a training, and append its line; of two lines of one training the later one counts."""
        self._known[measured.variant, measured.seed, measured.equal] = measured
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(plain(dataclasses.asdict(measured))) + "\n")


def to_train(plan: Study, planned: Sequence[Trial], record: Record) -> list[Trial]:
    """List the trainings that the record does not hold, and those that they begin with.

    All of them in a study of equal seconds, whose steps follow from the speed of the runs on this machine.
    """
    if any("seconds" in plan.equal_of(each.variant) for each in planned):
        return list(planned)
    missing = [each for each in planned if not record.holds(each)]
    needed = {(name, each.seed) for each in missing for name in plan.with_origins([each.variant])}
    return [each for each in planned if each in missing or (each.variant, each.seed) in needed]
