"""The one way in which this package uses torch's DataLoader: items arrive as the dataset makes them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from nitro_e.config import TrainingError


def load(dataset: Dataset, workers: int, *, seed: int = 0, **options: Any) -> Iterator[Any]:
    """Yield what `dataset` makes in `workers` processes, uncollated; closing the iterator ends them.

    Random numbers of the workers follow from `seed`; torch's global generator is not drawn from. Raises
    TrainingError, with the likely reason, when a worker was killed.
    """
    loader = DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=_identity,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    try:
        yield from loader
    # ConnectionError and EOFError: the worker died while handing over a batch
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"a DataLoader worker ended: {' '.join(str(error).split())[:200]}; most likely the machine ran"
            " out of memory (lower data.workers or batch.per_device), or, after a bus error, a shard was cut"
            " while in use"
        ) from None


def _identity(item: Any) -> Any:
    return item


def _ignore_interrupts(worker: int) -> None:
    """Leave signals to the training process, which saves and then ends its workers.

    Ctrl-C and job managers signal the whole process group.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
