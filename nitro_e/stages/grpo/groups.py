"""The prompts that a rollout draws, and who draws which image: functions of seed, rollout and number of processes.

The images of a rollout have indices: group * group_size + number. Process r of W draws the r-th of W equal runs of
indices, so groups lie on one process where their number allows it, and are spread over several where not; scores
travel, images do not. Image k of a group belongs to update k % U: the images of a group differ by their noise
alone, so no shuffle could mix them better, and every update gets all groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nitro_e.config import ConfigError
from nitro_e.randomness import seed_of


def group_prompts(seed: int, rollout: int, groups: int, pool: int) -> list[int]:
    """Choose the prompt numbers of the groups of a rollout: epoch by epoch, each through the whole pool in a new order."""
    positions = range(rollout * groups, (rollout + 1) * groups)
    orders = {
        epoch: np.random.default_rng(seed_of(seed, "prompts", epoch)).permutation(pool)
        for epoch in {position // pool for position in positions}
    }
    return [int(orders[position // pool][position % pool]) for position in positions]


@dataclass(frozen=True)
class Layout:
    """Spreads a rollout over processes, updates and micro-batches; ConfigError if it does not come out even."""

    groups: int
    group_size: int
    updates: int  # optimiser steps per rollout
    world: int
    accumulate: int  # micro-batches per process and update
    steps: int  # trained steps per image: rows

    def __post_init__(self) -> None:
        images = self.groups * self.group_size
        what = f"{self.groups} groups of {self.group_size}"
        if self.group_size % self.updates:
            raise ConfigError(
                f"stage.updates {self.updates} must divide stage.group_size {self.group_size}: every update gets the "
                "same share of each group"
            )
        if images % (self.world * self.updates):
            raise ConfigError(
                f"stage.groups: {what} cannot be shared by {self.world} processes and {self.updates} updates; "
                f"groups * group_size must be a multiple of {self.world * self.updates}"
            )
        rows = self.images_per_rank // self.updates * self.steps
        if rows % self.accumulate:
            raise ConfigError(
                f"accumulate {self.accumulate} must divide the {rows} rows of a process and update ({what}, "
                f"{self.steps} trained steps, {self.world} processes, {self.updates} updates)"
            )

    @property
    def images_per_rank(self) -> int:
        return self.groups * self.group_size // self.world

    @property
    def micro_batch(self) -> int:
        """Rows: images times trained steps."""
        return self.images_per_rank // self.updates * self.steps // self.accumulate

    def images(self, rank: int) -> range:
        """Indices of the images that a process draws."""
        return range(rank * self.images_per_rank, (rank + 1) * self.images_per_rank)

    def rows(self, update: int) -> tuple[Tensor, Tensor]:
        """List (image of the process, step of the window) of every row of an update, image by image."""
        images = torch.arange(update, self.images_per_rank, self.updates)
        return images.repeat_interleave(self.steps), torch.arange(self.steps).repeat(len(images))
