"""Time several ways of computing the same in turn, so that a busy machine disturbs all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from nitro_e.record.progress import bar

Clock = Callable[[], float]


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: str,
    seconds: float,
    rounds: int,
    name: str,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Return the best seconds of one call of each; in every round each is called for about `seconds`."""
    best = {name: _timed(call, 1, device, clock) for name, call in calls.items()}
    for _ in bar(range(rounds), brief=True, desc=name, leave=False):
        for key, call in calls.items():
            count = max(1, round(seconds / max(best[key], 1e-9)))
            best[key] = min(best[key], _timed(call, count, device, clock))
    return best


def _timed(call: Callable[[], object], count: int, device: str, clock: Clock) -> float:
    _synchronize(device)
    start = clock()
    for _ in range(count):
        call()
    _synchronize(device)
    return (clock() - start) / count


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Measure |ours - theirs| / |theirs|."""
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
