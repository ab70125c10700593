"""The validation loss: the velocity error on images that are not trained on, at fixed times and with fixed noise.

    validation/loss          mean over images and times
    validation/loss_t0.0625  of each time, 1 = noise

Images, times and noise are the same at every step, in every run and on any number of processes, so two numbers differ
by the weights only. Training sees nothing of it: its random numbers, data and order stay as they are. The loss of every
image lies in `RUN/validation.npz`, by which runs are compared in pairs (`nitro-e study`).
"""

from __future__ import annotations

import contextlib
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nitro_e.config import Config, ConfigError, Ge, Gt, Le, Seed
from nitro_e.data import Data
from nitro_e.data.catalog import expand_shards
from nitro_e.data.order import OnceOrder
from nitro_e.files import atomic_file
from nitro_e.interfaces import DistContext, Model
from nitro_e.randomness import SampleRandom
from nitro_e.sampling import flow
from nitro_e.stages.assembly import Parts, Run, open_fitting
from nitro_e.stages.batches import encode

FILE = "validation.npz"


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(Config):
    """The loss on held-out images during training: every so many steps, and after the last."""

    shards: tuple[str, ...]  # webdataset tars that no training reads; written as data.shards are
    # images, the first ones of a fixed random order; null: all
    samples: Annotated[int, Ge(1), Le(1_000_000)] | None = 512
    # times at which every image is tried, 1 = noise
    times: tuple[Annotated[float, Gt(0), Le(1)], ...] = tuple((2 * index + 1) / 16 for index in range(8))
    every: Annotated[int, Ge(1)] = 500  # steps
    seed: Seed = 0  # of the noise and of the order of images
    batch_size: Annotated[int, Ge(1), Le(65536)] = 64  # images that a process takes at a time

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.times:
            raise ConfigError("times is empty; give some, or leave validation out")
        if len(set(self.times)) != len(self.times):
            raise ConfigError(f"times {list(self.times)}: they must differ")


class Losses(NamedTuple):
    """The content of `RUN/validation.npz`."""

    keys: list[str]  # (N,) of the images
    times: list[float]  # (T,)
    values: np.ndarray  # (N, T) mean squared velocity errors


class Validator:
    """Computes the validation loss of a model. Every process must call it, and gets the loss of all."""

    def __init__(
        self, config: ValidationConfig, data: Data, parts: Parts, dist: DistContext, file: Path
    ) -> None:
        """file: where the main process keeps the loss of every image."""
        self.config, self.data, self.parts, self.dist, self.file = config, data, parts, dist, file
        self.num = config.samples or len(data)
        # (P,) positions of the order, and which of them count: of aspect buckets, the last batches are filled up
        self.counted = np.ones(self.num, bool)
        if isinstance(data.order, OnceOrder):
            self.counted = data.order.counted

    def __call__(self, model: Model) -> dict[str, float]:
        values = self.losses(model).double()  # (N, T)
        if self.dist.rank == 0:
            names = self.data.keys(np.flatnonzero(self.counted))
            write(self.file, Losses(names, list(self.config.times), values.numpy()))
        means = values.mean(dim=0).tolist()
        logs = {f"validation/loss_t{time}": mean for time, mean in zip(self.config.times, means)}
        return {"validation/loss": values.mean().item(), **logs}

    @torch.no_grad()
    def losses(self, model: Model) -> Tensor:
        """Return the mean squared velocity errors of all images, float32 (N, T) on the CPU.

        Batches go to the processes in turn. They are the same for any number of them, so the result is too.
        """
        rank, world, positions = self.dist.rank, self.dist.world_size, len(self.counted)
        size, device = self.config.batch_size, self.parts.device
        found = torch.zeros(positions, len(self.config.times))
        training = model.training
        model.eval()
        with contextlib.closing(self.data.records(rank=rank, world=world)) as batches:
            for first, records in zip(range(rank * size, positions, world * size), batches):
                batch = encode(records, self.parts.codec, self.parts.text, device)
                # on the CPU: the same noise on every device
                rng = SampleRandom(self.config.seed, "validation", first=first, count=size)
                for column, time in enumerate(self.config.times):
                    noise = rng.normal(*batch.latents.shape[1:]).to(device)
                    t = batch.latents.new_full((size,), time)
                    with self.parts.autocast():
                        velocity = model(flow.interpolate(batch.latents, noise, t), t, batch.text)
                    error = velocity.float() - flow.velocity_target(batch.latents, noise)
                    squared = error.square().flatten(1).mean(dim=1).cpu()
                    # the last batch may hold images beyond the last one that counts
                    found[first : first + size, column] = squared[: positions - first]
        model.train(training)
        return self.dist.sum(found.to(device)).cpu()[torch.from_numpy(self.counted)]


def write(file: Path, losses: Losses) -> None:
    with atomic_file(file) as stream:
        np.savez(stream, keys=np.array(losses.keys), times=np.array(losses.times), values=losses.values)


def read(run: Path) -> Losses:
    """Read the losses of the newest validation of a run; ConfigError if it has none."""
    try:
        with np.load(run / FILE, allow_pickle=False) as file:
            return Losses(file["keys"].tolist(), file["times"].tolist(), file["values"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{run / FILE} cannot be read ({error}); train the run with `validation`") from None


# ---- from a recipe


def check_apart(config: Run, validation: ValidationConfig) -> None:
    """ConfigError for a shard that is trained on as well; MissingShards for one that is not there."""
    assert config.data is not None  # RunConfig refuses validation without data
    held_out = expand_shards(validation.shards, "validation.shards")
    trained = {str(Path(path).resolve()) for source in config.data.expand() for path in source}
    if both := [path for path in held_out if str(Path(path).resolve()) in trained]:
        raise ConfigError(
            f"validation.shards: '{both[0]}' is among the training data too; list other shards, or take it out of data"
        )


def open_validator(config: Run, validation: ValidationConfig, parts: Parts, dist: DistContext) -> Validator:
    """Open the held-out images as the run reads its own, in an order that depends on nothing but them."""
    assert config.data is not None
    check_apart(config, validation)
    held_out = replace(
        config.data,
        shards=validation.shards,
        sources={},
        reader="indexed",
        workers=0,
        batch_size=validation.batch_size,
    )
    once = validation.samples or 0
    data = open_fitting(config, held_out, validation.seed, "validation", parts.latent_shape, once=once)
    if (validation.samples or 1) > len(data):
        raise ConfigError(
            f"validation.samples: {validation.samples} images were asked for, the shards have {len(data)}; "
            "list more shards, or set null for all"
        )
    return Validator(validation, data, parts, dist, config.folder / FILE)


def summary(validation: ValidationConfig | None) -> list[str]:
    if validation is None:
        return []
    images = "all" if validation.samples is None else f"{validation.samples:,}"
    return [
        f"validation           {images} images at {len(validation.times)} times, every {validation.every:,} steps"
    ]
