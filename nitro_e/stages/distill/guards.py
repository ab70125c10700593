"""Monitors of a student while it learns, and the limits at which training stops by itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from nitro_e.config import Config, Ge, Gt, TrainingError
from nitro_e.stages.distill.inputs import DistillBatch, Prediction
from nitro_e.training.meters import masked_mean
from nitro_e.training.parallel import sum_over_processes

log = logging.getLogger(__name__)
NAMES = ("gap", "std_ratio", "mean_drift")


@dataclass(frozen=True, kw_only=True)
class GuardConfig(Config):
    """Limits that may be passed for `patience` steps in a row, of those in which the student learns."""

    gap: Annotated[float, Gt(0)] = 4.0  # between the logits of real and fake, on held-out prompts
    std_ratio: Annotated[float, Gt(0)] = 0.05  # |std of the student's data / std of the teacher's - 1|
    mean_drift: Annotated[float, Gt(0)] = 0.05  # |mean of the student's data - mean of the teacher's|
    start: Annotated[int, Ge(0)] = 3000  # steps before which nothing counts
    patience: Annotated[int, Ge(1)] = 200  # steps in a row beyond a limit before anything happens
    action: Literal["stop", "warn"] = "stop"  # stop the run, or warn only


def describe_prediction(prediction: Prediction, batch: DistillBatch, sigmas: Tensor) -> dict[str, Tensor]:
    """Compare student and teacher per sigma: ratio of standard deviations, difference of means, (sum, count) each.

    Of prompts without images these are the student's own standard deviations and means.
    """
    ours = prediction.last_data.detach().flatten(1)
    ratio, drift = ours.std(dim=1), ours.mean(dim=1)
    if batch.latents is not None:
        theirs = batch.latents.flatten(1)
        ratio, drift = ratio / theirs.std(dim=1).clamp(min=1e-6), drift - theirs.mean(dim=1)
    logs = {"std_ratio": ratio.mean(), "mean_drift": drift.mean()}
    for number, sigma in enumerate(sigmas.tolist()):
        at = (prediction.t - sigma).abs() < 1e-6
        logs |= {
            f"std_ratio_s{number}": masked_mean(ratio, at),
            f"mean_drift_s{number}": masked_mean(drift, at),
        }
    return logs


@torch.no_grad()
def check(
    config: GuardConfig, alarms: Tensor, prediction: Prediction, batch: DistillBatch, every: int = 1
) -> None:
    """Count in `alarms` (3,), a buffer of the student, the steps in a row above each limit; act if they are too many.

    every: steps from this one to the next in which the student learns.
    """
    if batch.step < config.start:
        return
    ours, theirs = prediction.data.detach(), batch.stored_latents
    gap = torch.zeros(2, device=ours.device) if batch.heldout_gap is None else batch.heldout_gap
    sums = torch.stack(
        [
            *gap.to(ours.device).double(),
            ours.double().mean(),
            ours.double().square().mean(),
            theirs.double().mean(),
            theirs.double().square().mean(),
            torch.ones((), device=ours.device).double(),
        ]
    )
    gap, count, *moments, processes = sum_over_processes(sums)
    mean, square, mean_there, square_there = (moment / processes for moment in moments)
    ratio = ((square - mean**2) / (square_there - mean_there**2)).sqrt()
    # without held-out samples the gap is NaN
    values = torch.stack([gap / count, (ratio - 1).abs(), (mean - mean_there).abs()])
    limits = torch.tensor([config.gap, config.std_ratio, config.mean_drift], dtype=values.dtype)
    limits = limits.to(values.device, non_blocking=True)
    longer = torch.where(values > limits, alarms + 1, torch.zeros_like(alarms))
    alarms.copy_(torch.where(values.isnan(), alarms, longer))
    # in the last such step of every 50, for reading the values makes a GPU wait
    if batch.step // 50 != (batch.step + every) // 50:
        act(config, alarms, values, batch.step)


def act(config: GuardConfig, alarms: Tensor, values: Tensor, step: int) -> None:
    """Stop or warn for every limit that was passed for `patience` steps."""
    for name, count, value in zip(NAMES, alarms.tolist(), values.tolist()):
        if count < config.patience:
            continue
        message = (
            f"{name} has been above {getattr(config, name):g} for {count} steps, it is {value:.3g} at step {step}: the "
            "student leaves the teacher's distribution; take an earlier checkpoint, lower stage.optim.lr, or raise "
            f"stage.guards.{name}"
        )
        if config.action == "stop":
            raise TrainingError(message)
        log.warning(message)
        alarms[NAMES.index(name)] = 0
