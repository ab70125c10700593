"""Scores with 95 % confidence intervals. The unit is the prompt: prompts and noise are taken as random, tasks as given.

    score       mean over tasks of the mean over a task's prompts. Wilson's interval (JASA 22, 1927) for one task of
                0/1 scores, else the bootstrap: prompts are drawn anew within each task
    difference  of two models, prompt by prompt: the bootstrap of the paired differences
    ratio       of two scores over different prompts: the bootstrap of both
    share       of questions, several per prompt, that are answered right: the bootstrap over prompts

The bootstrap (percentiles of 10,000 resamples) has a fixed seed: the same scores always give the same interval. A task
whose prompts all score alike still has a spread: every resample draws from the task's prompts and from a quarter of
a prompt at either end of the range. Scores that leave 0..1 have no known ends and are drawn as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nitro_e.config import ConfigError

RESAMPLES, SEED = 10_000, 0
EXTRA = 0.25  # prompts at either end of the range


class Estimate(NamedTuple):
    value: float
    low: float  # of the 95 % interval; infinite where nothing is known
    high: float
    num: int  # prompts


UNKNOWN = Estimate(math.nan, math.nan, math.nan, 0)

Tasks = Sequence[Sequence[float]]  # one value per prompt of each task; NaN = unknown and left out


def score(tasks: Tasks) -> Estimate:
    """The mean of the tasks' means; unknown if a task has no known value."""
    known = _known(tasks)
    if known is None:
        return UNKNOWN
    if len(known) == 1 and np.isin(known[0], (0, 1)).all():
        return _wilson(known[0])
    resamples = _resample(known, _ends(known), np.random.default_rng(SEED))
    return _estimate(mean(tasks), resamples, sum(map(len, known)))


def mean(tasks: Tasks) -> float:
    """The value of `score` without its interval."""
    known = _known(tasks)
    return math.nan if known is None else math.fsum(values.mean() for values in known) / len(known)


def difference(ours: Tasks, theirs: Tasks, bounded: bool = True) -> Estimate:
    """score(ours) - score(theirs), paired by prompt; a pair with an unknown value is left out.

    bounded: scores within 0..1 of which one is 0 or 1 end there; losses do not.
    """
    if list(map(len, ours)) != list(map(len, theirs)):
        raise ConfigError("a paired comparison needs the same tasks and prompts on both sides")
    pairs = [np.subtract(a, b) for a, b in zip(ours, theirs)]
    known = _known(pairs)
    if known is None:
        return UNKNOWN
    ends = (-1.0, 1.0) if bounded and _ends([*_known(ours), *_known(theirs)]) else ()
    resamples = _resample(known, ends, np.random.default_rng(SEED))
    return _estimate(mean(pairs), resamples, sum(map(len, known)))


def ratio(top: Tasks, bottom: Tasks) -> Estimate:
    """score(top) / score(bottom) over different prompts; infinite at the upper limit if bottom may be 0."""
    above, below = _known(top), _known(bottom)
    if above is None or below is None:
        return UNKNOWN
    num = sum(map(len, [*above, *below]))
    if not mean(bottom) > 0:
        return Estimate(math.nan, 0.0, math.inf, num)
    rng = np.random.default_rng(SEED)
    numerators, denominators = (_resample(tasks, _ends(tasks), rng) for tasks in (above, below))
    resamples = np.full(RESAMPLES, math.inf)
    np.divide(numerators, denominators, out=resamples, where=denominators > 0)
    return _estimate(mean(top) / mean(bottom), resamples, num)


def share(right: Sequence[float], total: Sequence[float]) -> Estimate:
    """sum(right) / sum(total), of which every prompt has its part; prompts with a total of 0 are left out."""
    pairs = np.column_stack([right, total])
    pairs = pairs[pairs[:, 1] > 0]
    if not len(pairs):
        return UNKNOWN
    size = pairs[:, 1].mean()
    ends = [(0.0, size), (size, size)]
    distinct, place = np.unique([*pairs, *ends], axis=0, return_inverse=True)
    weights = np.bincount(place.ravel(), [1.0] * len(pairs) + [EXTRA] * len(ends))
    rng = np.random.default_rng(SEED)
    # (RESAMPLES, distinct) @ (distinct, 2)
    sums = rng.multinomial(len(pairs), weights / weights.sum(), size=RESAMPLES) @ distinct
    return _estimate(pairs[:, 0].sum() / pairs[:, 1].sum(), sums[:, 0] / sums[:, 1], len(pairs))


def _known(tasks: Tasks) -> list[np.ndarray] | None:
    """The known values of every task; None if a task has none."""
    arrays = [np.asarray(values, np.float64) for values in tasks]
    known = [array[~np.isnan(array)] for array in arrays]
    return known if known and all(map(len, known)) else None


def _ends(tasks: Sequence[np.ndarray]) -> tuple[float, ...]:
    """The ends of the scores' range, if no score leaves 0..1 and one is at an end; CLIPScore, say, never comes near them."""
    values = np.concatenate(tasks)
    low, high = values.min(), values.max()
    return (0.0, 1.0) if 0 <= low and high <= 1 and (low == 0 or high == 1) else ()


def _wilson(values: np.ndarray) -> Estimate:
    from scipy.stats import binomtest

    limits = binomtest(int(values.sum()), len(values)).proportion_ci(0.95, method="wilson")
    return Estimate(values.mean(), limits.low, limits.high, len(values))


def _resample(tasks: Sequence[np.ndarray], ends: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """Return (RESAMPLES,) means of the tasks' means, each task's prompts drawn with replacement; NaN for a task of one prompt
    without ends."""
    total = np.zeros(RESAMPLES)
    for values in tasks:
        if len(values) < 2 and not ends:
            return np.full(RESAMPLES, math.nan)
        distinct, place = np.unique([*values, *ends], return_inverse=True)
        weights = np.bincount(place, [1.0] * len(values) + [EXTRA] * len(ends))
        # (RESAMPLES, distinct)
        counts = rng.multinomial(len(values), weights / weights.sum(), size=RESAMPLES)
        total += counts @ distinct / len(values)
    return total / len(tasks)


def _estimate(value: float, resamples: np.ndarray, num: int) -> Estimate:
    if np.isnan(resamples).any():
        return Estimate(value, -math.inf, math.inf, num)
    low, high = np.quantile(resamples, (0.025, 0.975), method="inverted_cdf")  # some ratios are infinite
    return Estimate(value, min(float(low), value), max(float(high), value), num)


def over_seeds(differences: Sequence[Estimate]) -> Estimate:
    """Average the differences of several trainings on the same prompts: the means of values and ends.

    That is the interval of differences that err together, and too wide rather than too narrow for others.
    """
    return Estimate(
        *(math.fsum(part) / len(part) for part in list(zip(*differences))[:3]), differences[0].num
    )


def pooled_deviation(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Return the standard deviation within groups, taken to be the same in all, and its degrees of freedom."""
    squares = sum(float(np.square(np.subtract(group, np.mean(group))).sum()) for group in groups)
    freedom = sum(len(group) - 1 for group in groups)
    return (math.sqrt(squares / freedom) if freedom else math.nan), freedom


def difference_of_means(
    ours: Sequence[float], theirs: Sequence[float], deviation: float, freedom: int
) -> Estimate:
    """mean(ours) - mean(theirs), of independent values with a known pooled deviation: Student's t interval."""
    from scipy.stats import t

    value = math.fsum(ours) / len(ours) - math.fsum(theirs) / len(theirs)
    reach = (
        t.ppf(0.975, freedom) * deviation * math.sqrt(1 / len(ours) + 1 / len(theirs))
        if freedom
        else math.nan
    )
    return Estimate(value, value - reach, value + reach, len(ours))
