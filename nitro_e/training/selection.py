"""The choice of a run's best checkpoint by a score, and the guard against scores that fall.

The scores are those that hooks log. The checkpoint with the highest one is never pruned, and its published weights are
written to `RUN/best/step-N/` too, as a model folder (`RUN@best`). A step at which a guarded score has fallen is never
the best one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

MAX_ROLLBACKS = 3  # of a run; then it ends

Scores = Mapping[str, float]


@dataclass
class Selection:
    """Compares the scores of a step with those of the steps before it.

    best: name of the score that decides; None: no checkpoint is kept for its score. bounds: name of a guarded score ->
    how far it may fall below its highest value. action: what the engine does then.
    """

    best: str | None = None
    bounds: Mapping[str, float] = field(default_factory=dict)
    action: Literal["stop", "rollback", "warn"] = "stop"
    history: dict[int, Scores] = field(default_factory=dict)  # step -> its scores

    def read(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take over the scores of an earlier attempt from the rows of its metrics."""
        names = {*self.bounds, *([self.best] if self.best else [])}
        for row in rows:
            if found := {name: row[name] for name in names if name in row}:
                self.history[row["step"]] = found

    def fallen(self, step: int, scores: Scores) -> str:
        """Say which guarded scores have fallen too far at `step`; empty if none has."""
        parts = []
        for name, bound in self.bounds.items():
            earlier = {at: past[name] for at, past in self.history.items() if at < step and name in past}
            if name not in scores or not earlier:
                continue
            at = max(earlier, key=lambda at: earlier[at])
            if earlier[at] - scores[name] > bound:
                parts.append(
                    f"{name} fell from {earlier[at]:.4g} (step {at}) to {scores[name]:.4g}, by more than {bound:g}"
                )
        return "; ".join(parts)

    def is_best(self, step: int, scores: Scores) -> bool:
        """Tell whether the deciding score is higher than at every step before at which no guarded score had fallen."""
        if self.best is None or self.best not in scores:
            return False
        return all(
            past[self.best] < scores[self.best]
            for at, past in self.history.items()
            if at < step and self.best in past and not self.fallen(at, past)
        )
