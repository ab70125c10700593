"""Scores with 95 % confidence intervals, in closed form: nothing is resampled, the same numbers come out every time.

    score       mean over tasks of the mean over a task's prompts. Wilson's interval (JASA 22, 1927) for the number of
                0/1 trials that would have the standard error of this mean (Korn & Graubard, Survey Methodology 24,
                1998): for one task and one image per prompt exactly Wilson's
    difference  of two models over the same prompts and noise: mean of the differences, normal interval
    ratio       MOVER-R (Donner & Zou, Statistical Methods in Medical Research 21, 2012), independent scores

A task whose prompts all score alike still has a spread: to find it, every task gets a quarter of a prompt at either
end of the range (as Agresti & Min, Statistics in Medicine 24, 2005). Scores that leave 0..1 have no known ends: they
get plain normal intervals. The unit is the prompt: prompts and noise are taken as drawn at random, tasks as given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nitro_e.config import ConfigError

Z = 1.959964  # the normal distribution's 97.5 % point
EXTRA = 0.25  # prompts added at either end of the range to find the spread


class Estimate(NamedTuple):
    value: float
    low: float  # of the 95 % interval
    high: float
    num: int  # prompts


UNKNOWN = Estimate(math.nan, math.nan, math.nan, 0)


def score(tasks: Sequence[Sequence[float]]) -> Estimate:
    """Mean of the tasks' means. One value per prompt, NaN = unknown and left out; a task without any makes it NaN."""
    known = [_known(values) for values in tasks]
    if not known or not all(map(len, known)):
        return UNKNOWN
    num, value = sum(map(len, known)), _mean(known)
    if min(map(np.min, known)) < 0 or max(map(np.max, known)) > 1:
        return _normal(value, _variance(known, ()), num)
    center = np.mean([(values.sum() + EXTRA) / (len(values) + 2 * EXTRA) for values in known])
    return Estimate(value, *wilson(value, center * (1 - center) / _variance(known, (0, 1))), num)


def wilson(share: float, trials: float) -> tuple[float, float]:
    """Limits for a share of successes among this many trials."""
    center = share + Z * Z / (2 * trials)
    half = Z * math.sqrt(share * (1 - share) / trials + (Z / (2 * trials)) ** 2)
    scale = 1 + Z * Z / trials
    return max((center - half) / scale, 0.0), min((center + half) / scale, 1.0)


def difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Estimate:
    """score(ours) - score(theirs), paired by prompt; a pair with an unknown value is left out."""
    if list(map(len, ours)) != list(map(len, theirs)):
        raise ConfigError("a paired comparison needs the same tasks and prompts on both sides")
    known = [_known(np.subtract(a, b)) for a, b in zip(ours, theirs)]
    if not known or not all(map(len, known)):
        return UNKNOWN
    bounded = all(_known(values).min() >= 0 and _known(values).max() <= 1 for values in (*ours, *theirs))
    return _normal(_mean(known), _variance(known, (-1, 1) if bounded else ()), sum(map(len, known)))


def ratio(top: Estimate, bottom: Estimate) -> Estimate:
    """top / bottom of independent scores that are not negative; the upper limit is infinite where bottom may be 0."""
    num = top.num + bottom.num
    if not bottom.value > 0:
        return Estimate(math.nan, 0.0, math.inf, num)
    # The limits R solve (top - R bottom)^2 = (distance to top's limit)^2 + R^2 (distance to bottom's limit)^2.
    product = top.value * bottom.value
    a, c = _lost(bottom.value, bottom.high), _lost(top.value, top.low)
    low = c / (product + math.sqrt(product**2 - a * c)) if c > 0 else 0.0
    a, c = _lost(bottom.value, bottom.low), _lost(top.value, top.high)
    high = (product + math.sqrt(product**2 - a * c)) / a if a > 0 else math.inf
    return Estimate(top.value / bottom.value, low, high, num)


def _lost(value: float, limit: float) -> float:
    """value^2 - (value - limit)^2"""
    return limit * (2 * value - limit)


def _known(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, np.float64)
    return array[~np.isnan(array)]


def _mean(tasks: Sequence[np.ndarray]) -> float:
    return math.fsum(values.mean() for values in tasks) / len(tasks)


def _variance(tasks: Sequence[np.ndarray], ends: Sequence[float]) -> float:
    """Of the mean of the tasks' means; `ends` of the range, if it has any, get EXTRA prompts each."""
    total = 0.0
    for values in tasks:
        if not ends:
            total += values.var(ddof=1) / len(values) if len(values) > 1 else math.inf
            continue
        weights = np.append(np.ones(len(values)), [EXTRA] * len(ends))
        padded = np.append(values, ends)
        center = np.average(padded, weights=weights)
        total += np.average((padded - center) ** 2, weights=weights) / len(values)
    return total / len(tasks) ** 2


def _normal(value: float, variance: float, num: int) -> Estimate:
    half = Z * math.sqrt(variance)
    return Estimate(value, value - half, value + half, num)
