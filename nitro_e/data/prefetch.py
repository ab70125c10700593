"""Fetch shards behind URLs before they are needed: the order knows which ones come next."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from nitro_e.config import ConfigError
from nitro_e.data.catalog import Catalog, Column
from nitro_e.data.order import AnyOrder
from nitro_e.data.remote import is_url

THREADS = 4
WINDOWS = 2  # looked ahead
PIECE = 1 << 16  # positions examined at a time


class Prefetcher:
    """Keeps the shards of the next two windows in the cache; what fails here is reported by the reader."""

    def __init__(self, catalog: Catalog, order: AnyOrder, columns: Iterable[Column]):
        self.catalog, self.order = catalog, order
        self.columns = [column for column in columns if any(map(is_url, column.paths))]
        self.horizon = int(WINDOWS * order.window * max(1, len(catalog) // max(1, len(catalog.names))))
        self.examined = 0
        self.running: dict[str, Future] = {}
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="prefetch") if self.columns else None

    def advance(self, position: int) -> None:
        """Training has reached `position`; ask for what comes within the horizon."""
        if self.pool is None:
            return
        self.examined = max(self.examined, position)
        while self.examined < position + self.horizon:
            end = min(self.examined + PIECE, position + self.horizon)
            ids = self.order.ids(np.arange(self.examined, end))
            self.examined = end
            shards, first = np.unique(self.catalog.shard_of(ids), return_index=True)
            for shard in shards[np.argsort(first)].tolist():
                for column in self.columns:
                    self._ask(column.paths[shard])

    def _ask(self, url: str) -> None:
        self.running = {other: future for other, future in self.running.items() if not future.done()}
        if is_url(url) and url not in self.running and not self.catalog.cache.path(url).is_file():
            self.running[url] = self.pool.submit(self._fetch, url)

    def _fetch(self, url: str) -> None:
        try:
            self.catalog.cache.fetch(url)
        except ConfigError:
            pass

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
