"""The order of samples: which one stands at a position is a pure function of (seed, stage, position).

A stage reads positions 0, 1, 2, ... without end. Nothing is remembered between positions, so any of them can
be reached at once, and neither processes nor workers can change what a global batch holds.

    mixture   every block of 512 positions holds each source exactly round(512 * weight) times, shuffled
    source    reads its samples in epochs; every epoch holds each sample exactly once
    epoch     permutes the shards, cuts them into windows of 64, and shuffles the samples inside each window,
              so that reading stays within 64 files while order is as good as random

Randomness is Philox's raw stream keyed by a hash, which numpy promises never to change; a permutation is the
sort of random numbers with the index in their low bits. Left out: sampling with replacement.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from nitro_e.config import ConfigError

BLOCK = 512
WINDOW = 64
REMEMBERED = 8  # permutations kept per table; they are recomputed when needed


class Order:
    """Gives the sample id at every position.

    shard_sizes: for every source the number of samples in each of its shards. Sample ids count through the
    shards of source 0, then of source 1, and so on.
    weights: one per source (0 drops it), or None for the union of all samples.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int]],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        stage: str,
        window: int = WINDOW,
    ):
        sizes = [np.asarray(source, np.int64) for source in shard_sizes]
        if weights is None:
            sizes, weights = [np.concatenate(sizes)], [1.0]
        self.sizes, self.seed, self.stage, self.window = sizes, seed, stage, window
        self.totals = np.array([source.sum() for source in sizes])
        self.firsts = []  # per source: the id of each shard's first sample
        base = 0
        for source in sizes:
            self.firsts.append(base + np.cumsum(source) - source)
            base += int(source.sum())
        self.quotas = quotas(weights)
        self._block_sources = np.repeat(np.arange(len(sizes), dtype=np.uint16), self.quotas)
        self._block_ranks = np.arange(BLOCK) - np.repeat(np.cumsum(self.quotas) - self.quotas, self.quotas)
        for source, quota in enumerate(self.quotas):
            if quota and not self.totals[source]:
                raise ConfigError(
                    f"source {source} has weight {weights[source]} but no samples; add shards or set 0"
                )
        self._tables: dict[str, dict] = {"epoch": {}, "window": {}}

    def ids(self, positions: range | np.ndarray) -> np.ndarray:
        """Look up the sample ids (int64) at `positions`."""
        sources, counters = self.locate(positions)
        ids = np.empty(len(counters), np.int64)
        for source in np.unique(sources):
            chosen = sources == source
            ids[chosen] = self.sample(int(source), counters[chosen])
        return ids

    def locate(self, positions: range | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find, for each position, its source and how many samples of that source stand before it."""
        positions = np.asarray(positions, np.int64)
        if len(self.sizes) == 1:
            return np.zeros_like(positions), positions
        blocks, places = np.divmod(positions, BLOCK)
        sources, ranks = np.empty(len(positions), np.uint16), np.empty_like(positions)
        for block in np.unique(blocks):
            chosen = blocks == block
            mixed = self._block_sources[self._permutation(BLOCK, "mixture", block)]
            rank = np.empty(BLOCK, np.int64)  # places of the same source before, in this block
            rank[np.argsort(mixed, kind="stable")] = self._block_ranks
            sources[chosen], ranks[chosen] = mixed[places[chosen]], rank[places[chosen]]
        return sources, blocks * self.quotas[sources] + ranks

    def sample(self, source: int, counters: np.ndarray) -> np.ndarray:
        """Look up the ids that a source gives at `counters` (0, 1, 2, ... over all its epochs)."""
        epochs, rest = np.divmod(np.asarray(counters, np.int64), self.totals[source])
        ids = np.empty(len(rest), np.int64)
        for epoch in np.unique(epochs):
            _, edges = self._epoch(source, int(epoch))
            windows = np.searchsorted(edges, rest, side="right") - 1
            for window in np.unique(windows[epochs == epoch]):
                chosen = (epochs == epoch) & (windows == window)
                ids[chosen] = self._window(source, int(epoch), int(window))[rest[chosen] - edges[window]]
        return ids

    def draws(self, positions: np.ndarray) -> np.ndarray:
        """Draw a number in [0, 1) for each position, for the choice of one of a sample's captions."""
        blocks, places = np.divmod(np.asarray(positions, np.int64), BLOCK)
        found = np.empty(len(places))
        for block in np.unique(blocks):
            bits = philox(self.seed, self.stage, "captions", block).random_raw(BLOCK)
            found[blocks == block] = (bits >> np.uint64(11))[places[blocks == block]] * 2.0**-53
        return found

    def fingerprint(self) -> dict:
        """List what the order depends on besides the content of the shards."""
        sizes = hashlib.sha256(b"|".join(source.tobytes() for source in self.sizes)).hexdigest()[:16]
        return {
            "seed": self.seed,
            "stage": self.stage,
            "window": self.window,
            "quotas": self.quotas.tolist(),
            "shard_sizes": sizes,
        }

    def _epoch(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order the shards of an epoch, and count the samples before each window (and, last, in all)."""

        def build():
            shards = self._permutation(len(self.sizes[source]), "shards", source, epoch)
            before = np.concatenate([[0], np.cumsum(self.sizes[source][shards])])
            return shards, np.append(before[: len(shards) : self.window], before[-1])

        return self._remember("epoch", (source, epoch), build)

    def _window(self, source: int, epoch: int, window: int) -> np.ndarray:
        """Shuffle the sample ids of one window."""

        def build():
            shards = self._epoch(source, epoch)[0][window * self.window : (window + 1) * self.window]
            first, size = self.firsts[source][shards], self.sizes[source][shards]
            ids = np.arange(size.sum()) + np.repeat(first - (np.cumsum(size) - size), size)
            return ids[self._permutation(len(ids), "samples", source, epoch, window)]

        return self._remember("window", (source, epoch, window), build)

    def _remember(self, table: str, key: tuple, build):
        entries = self._tables[table]
        if key not in entries:
            if len(entries) >= REMEMBERED * len(self.sizes):
                entries.pop(next(iter(entries)))
            entries[key] = build()
        return entries[key]

    def _permutation(self, n: int, *purpose) -> np.ndarray:
        return permutation(n, self.seed, self.stage, *purpose)

    def __getstate__(self):
        return {**self.__dict__, "_tables": {"epoch": {}, "window": {}}}


class BucketOrder:
    """Gives the sample id at every position where a batch holds samples of one group (an aspect bucket) only.

    Every 512 batches hold each group by its share of the samples, shuffled. Within a group the order is that of `Order`:
    every epoch of the group has each of its samples once. Everything is a function of (seed, stage, position).
    """

    def __init__(
        self,
        shard_sizes: Sequence[np.ndarray],
        weights: Sequence[float] | None,
        groups: np.ndarray,
        batch: int,
        *,
        seed: int,
        stage: str,
    ):
        """groups: (N,) of each sample, 0 to K - 1, none of them empty. batch: samples of a global batch."""
        self.batch, self.sources = batch, len(shard_sizes)
        sizes = np.concatenate(shard_sizes)
        shards = np.repeat(np.arange(len(sizes)), sizes)
        edges = np.cumsum([len(source) for source in shard_sizes])[:-1]
        totals = [max(int(source.sum()), 1) for source in shard_sizes]
        self.members: list[np.ndarray] = []  # the samples of each group
        self.orders: list[Order] = []
        shares = []
        for group in range(int(groups.max()) + 1):
            members = np.flatnonzero(groups == group).astype(np.uint32)
            parts = np.split(np.bincount(shards[members], minlength=len(sizes)), edges)
            part_weights = None
            if weights is not None:  # so that all groups together have the weights of the mixture
                part_weights = [w * part.sum() / n for w, part, n in zip(weights, parts, totals)]
                least = sum(part_weights) / BLOCK  # no source is lost to rounding
                part_weights = [w and max(w, least) for w in part_weights]
            shares.append(len(members) if part_weights is None else sum(part_weights))
            self.members.append(members)
            self.orders.append(Order(parts, part_weights, seed=seed, stage=f"{stage}/bucket {group}"))
        self.choice = Order([np.array([1])] * len(shares), shares, seed=seed, stage=f"{stage}/buckets")
        self.window = max(order.window for order in self.orders)

    def group(self, position: int) -> int:
        """Return the group of the batch that holds this position."""
        return int(self.choice.locate(np.array([position // self.batch]))[0][0])

    def ids(self, positions: range | np.ndarray) -> np.ndarray:
        """Look up the sample ids (int64) at `positions`."""
        groups, counters = self._counters(positions)
        ids = np.empty(len(counters), np.int64)
        for group in np.unique(groups):
            chosen = groups == group
            ids[chosen] = self.members[group][self.orders[group].ids(counters[chosen])]
        return ids

    def _counters(self, positions: range | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the group of each position, and how many positions of it stand before."""
        batches, places = np.divmod(np.asarray(positions, np.int64), self.batch)
        groups, before = self.choice.locate(batches)
        return groups, before * self.batch + places

    def locate(self, positions: range | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find, for each position, its part (a source of a group) and how many samples of that stand before it."""
        groups, counters = self._counters(positions)
        found = [
            self.orders[group].locate(np.array([counter]))
            for group, counter in zip(groups.tolist(), counters.tolist())
        ]
        parts = [group * self.sources + int(source[0]) for group, (source, _) in zip(groups.tolist(), found)]
        return np.array(parts), np.array([int(counter[0]) for _, counter in found])

    def sample(self, part: int, counters: np.ndarray) -> np.ndarray:
        """Look up the ids that a part gives at `counters` (0, 1, 2, ... over all its epochs)."""
        group, source = divmod(part, self.sources)
        return self.members[group][self.orders[group].sample(source, counters)].astype(np.int64)

    def draws(self, positions: np.ndarray) -> np.ndarray:
        """Draw a number in [0, 1) for each position, as `Order.draws` does."""
        return self.choice.draws(positions)

    def fingerprint(self) -> dict:
        """List what the order depends on besides the content of the shards."""
        groups = hashlib.sha256(b"|".join(members.tobytes() for members in self.members)).hexdigest()[:16]
        quotas = [order.quotas.tolist() for order in self.orders]
        return {**self.choice.fingerprint(), "batch": self.batch, "buckets": groups, "bucket_quotas": quotas}


class OnceOrder:
    """Gives each of some samples once, in batches of one group (an aspect bucket): for measurements, not for training.

    The samples are the first ones of a shuffle of all. The last batch of a group is filled up with samples of the group
    that were there already; `counted` tells them apart.
    """

    window = WINDOW

    def __init__(
        self,
        shard_sizes: Sequence[np.ndarray],
        groups: np.ndarray,
        batch: int,
        num: int,
        *,
        seed: int,
        stage: str,
    ):
        """groups: (N,) of each sample. batch: samples of a batch. num: samples in all; 0: all there are."""
        self.batch = batch
        order = Order(shard_sizes, seed=seed, stage=stage)
        chosen = order.ids(np.arange(min(num or len(groups), len(groups))))
        self.members = [np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)]
        parts, counted, of_batches = [], [], []
        for group in np.unique(groups[chosen]).tolist():
            ids = chosen[groups[chosen] == group]
            batches = -(-len(ids) // batch)
            parts.append(np.resize(ids, batches * batch))
            counted.append(np.arange(batches * batch) < len(ids))
            of_batches += [group] * batches
        self._ids, self.counted = np.concatenate(parts), np.concatenate(counted)  # (P,)
        self._groups = np.array(of_batches)
        self._seed, self._stage = seed, stage

    def group(self, position: int) -> int:
        """Return the group of the batch that holds this position."""
        return int(self._groups[position // self.batch % len(self._groups)])

    def ids(self, positions: range | np.ndarray) -> np.ndarray:
        """Look up the sample ids (int64) at `positions`; after the last comes the first again."""
        return self._ids[np.asarray(positions, np.int64) % len(self._ids)]

    def locate(self, positions: range | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find, for each position, its group and the place of its sample in the group."""
        ids = self.ids(positions)
        groups = np.array([self.group(position) for position in np.asarray(positions).tolist()])
        places = [int(np.searchsorted(self.members[group], id)) for group, id in zip(groups, ids)]
        return groups, np.array(places)

    def sample(self, group: int, counters: np.ndarray) -> np.ndarray:
        """Look up the ids that follow each other in a group, which stand in for bad samples."""
        return self.members[group][np.asarray(counters) % len(self.members[group])]

    def draws(self, positions: np.ndarray) -> np.ndarray:
        """Draw a number in [0, 1) for each position, as `Order.draws` does."""
        return Order([np.array([1])], seed=self._seed, stage=self._stage).draws(positions)

    def fingerprint(self) -> dict:
        """Describe the samples and their batches."""
        ids = hashlib.sha256(self._ids.tobytes()).hexdigest()[:16]
        return {"once": ids, "batch": self.batch}


AnyOrder = Order | BucketOrder | OnceOrder


def philox(*key) -> np.random.Philox:
    """Make a stream of random bits that is a function of the key's parts only."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


def permutation(n: int, *key) -> np.ndarray:
    """Permute range(n) at random, as a function of the key's parts only."""
    bits = np.uint64(max(1, int(n - 1).bit_length()))
    values = philox(*key).random_raw(n) >> bits << bits
    values |= np.arange(n, dtype=np.uint64)
    values.sort()
    return (values & (np.uint64(1) << bits) - np.uint64(1)).astype(np.int64)


def quotas(weights: Sequence[float]) -> np.ndarray:
    """Count the places of each source in a block of 512, by largest remainder; 0 only for weight 0.

    Raises ConfigError for negative or all-zero weights, and for one too small for a single place.
    """
    shares = np.asarray(weights, np.float64)
    if not np.isfinite(shares).all() or (shares < 0).any() or not shares.sum():
        raise ConfigError(f"weights {list(weights)}: must be finite, not negative, and not all 0")
    shares = shares / shares.sum() * BLOCK
    counts = np.floor(shares).astype(np.int64)
    by_remainder = np.argsort(counts - shares, kind="stable")
    counts[by_remainder[: BLOCK - counts.sum()]] += 1
    for weight, count in zip(weights, counts):
        if weight > 0 and count == 0:
            raise ConfigError(
                f"weight {weight} of {list(weights)} is less than 1/{BLOCK} of the mixture; use 0 or more"
            )
    return counts
