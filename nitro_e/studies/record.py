"""The record of a study: the scores and costs of each training, a line of JSON each.

Runs and images are large and stay on the machine that made them. A record is small: kept beside the tables, it lets
several machines, or sittings of one, add up to one table, and the table be written anew without any run. What stands in
it is not measured again; remove its line to do so. Validation losses are not in it, because they are compared image by
image.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nitro_e.config import ConfigError, parse_json, read_text
from nitro_e.evaluation.intervals import Estimate
from nitro_e.evaluation.results import plain
from nitro_e.studies.plan import Equal, Setting, Study, trial


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one training at one setting."""

    setting: Setting
    scores: dict[str, float]  # title -> overall
    differences: dict[str, Estimate] = field(default_factory=dict)  # to the base or the reference, paired
    seen: float | None = None  # of the first score, where prompts say so
    unseen: float | None = None
    diversity: float | None = None  # ratio to the reference's; None: unknown, as where nothing is right


@dataclass(frozen=True, kw_only=True)
class Spent:
    """The costs of one training."""

    device: str  # that scored it, and as a rule trained it
    steps: int
    cpu_seconds: float
    before: float  # CPU seconds of what it needs: stored images, the training that it begins with
    memory_gb: float | None = None
    trained_beside: int | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One training, or the base itself, at all settings that it was scored at."""

    variant: str
    seed: int | None  # None: the base
    equal: Equal
    of: dict[str, Any]  # what the figures hold for, see `subject`
    scores: tuple[Scores, ...]
    spent: Spent | None
    revision: str | None  # of the code

    def at(self, setting: Setting) -> Scores | None:
        return next((each for each in self.scores if each.setting == setting), None)


def subject(plan: Study, name: str, seed: int | None) -> dict[str, Any]:
    """Describe what a training and its scores depend on; the texts of recipes and presets are not in it."""
    judged = {key: getattr(plan, key) for key in ("benchmark", "num", "base", "reference")}
    trained = {} if seed is None else {"overrides": list(trial(plan, name, seed).overrides)}
    return plain({**judged, "recipe": plan.variants[name].recipe, **trained})


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
            scores = tuple(
                Scores(**{**each, "differences": {t: Estimate(**e) for t, e in each["differences"].items()}})
                for each in row["scores"]
            )
            spent = None if row["spent"] is None else Spent(**row["spent"])
            found = Measured(**{**row, "scores": scores, "spent": spent})
        except (TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{where} is no line of a study's record ({error}); remove it") from None
        self._known[found.variant, found.seed, found.equal] = found

    def find(self, variant: str, seed: int | None, equal: Equal) -> Measured | None:
        """Look a training up. ConfigError if it was another one than the study's today."""
        found = self._known.get((variant, seed, equal))
        if found is None:
            return None
        expected = subject(self.plan, variant, seed)
        for key in found.of.keys() | expected.keys():
            if found.of.get(key) != expected.get(key):
                raise ConfigError(
                    f"{self.path}: '{variant}', seed {seed} was measured with {key} {found.of.get(key)!r}, the study has "
                    f"{expected.get(key)!r}; remove the line to measure it anew"
                )
        return found

    def add(self, measured: Measured) -> None:
        """Remember a training, and append its line; of two lines of one training the later one counts."""
        self._known[measured.variant, measured.seed, measured.equal] = measured
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(plain(dataclasses.asdict(measured))) + "\n")
