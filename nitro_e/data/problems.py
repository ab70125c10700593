"""Samples that cannot be used: how they are named, counted and reported, and when there are too many.

Training stops when more distinct samples are bad than max(1, max_bad_fraction * data set), or, to notice
early, than max(8, 10 * max_bad_fraction * read so far).
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from nitro_e.config import ConfigError

log = logging.getLogger("nitro_e.data")
WARNINGS = 20  # problems that are logged one by one


class BadDataError(ConfigError):
    """Too much of the data cannot be used."""


@dataclass(frozen=True)
class Problem:
    """A sample that is not what it should be; key "*" stands for a whole shard."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}:{self.key}: {self.reason}"


class BadSamples:
    """Counts distinct bad samples and stops the run when there are too many."""

    def __init__(self, total: int, fraction: float, known: list[Problem]):
        self.total, self.fraction, self.read = total, fraction, 0
        self.report: Path | None = None  # a JSON-lines file, if the run wants one
        self.seen: dict[tuple[str, str], str] = {}
        self.elsewhere = 0  # how many of them another process counts and reports
        self._unwritten: list[Problem] = []
        for problem in known:
            if problem.key == "*":  # allowed by data.tolerate_shards
                log.warning("left out: %s", problem)
        self.add([problem for problem in known if problem.key != "*"])

    def __len__(self) -> int:
        return len(self.seen) - self.elsewhere

    def report_to(self, path: Path, rank: int) -> None:
        """Write bad samples to a file, from the first batch on.

        Those that are known already are so in every process; rank 0 alone counts and reports them.
        """
        self.report = path
        if rank:
            self.elsewhere = len(self.seen)
            self._unwritten.clear()

    def add(self, problems: list[Problem], read: int = 0) -> None:
        """Count the problems found while `read` more samples were read.

        Raises BadDataError above the limits of the module docstring.
        """
        self.read += read
        for problem in problems:
            if (problem.shard, problem.key) not in self.seen:
                self.seen[problem.shard, problem.key] = problem.reason
                self._warn(problem)
                self._unwritten.append(problem)
        if self.report is not None and self._unwritten:
            with open(self.report, "a") as file:
                file.writelines(json.dumps(asdict(problem)) + "\n" for problem in self._unwritten)
            self._unwritten.clear()
        limit = max(1, self.fraction * self.total)
        early = max(8, 10 * self.fraction * self.read) if self.read else limit
        if len(self.seen) > min(limit, early) and problems:
            raise BadDataError(
                f"{len(self.seen)} bad samples of {self.total} ({self.read} read), more than data.max_bad_fraction"
                f" {self.fraction:g} allows; the last: {problems[-1]}; find all with `nitro-e data"
                " verify`, repair the shards or raise data.max_bad_fraction"
            )

    def _warn(self, problem: Problem) -> None:
        if len(self.seen) <= WARNINGS:
            more = " (further ones are only counted)" if len(self.seen) == WARNINGS else ""
            log.warning("bad sample %s%s", problem, more)
