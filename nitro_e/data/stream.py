"""Samples from shards read one after the other, through webdataset: for more than one wants to scan.

Every loader process of every rank runs through all shards in an order of its own, shuffles samples in a
buffer, and starts afresh every CHUNK steps, with everything random keyed by (seed, stage, chunk, rank,
worker). That gives less than the indexed reader, and is said at the start:
    - the same batches only for the same number of processes and workers,
    - a sample may come several times, or not at all, before another one comes again,
    - resuming replays up to CHUNK steps of reading.
What it shares: weighted mixtures are exact in every 512 samples of a worker, no sample is lost silently (a
shard's structure is checked before its first sample is used), replacement and counting of bad samples. Left
out: columns in separate tars, reading a shard before it is wholly here.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nitro_e.config import ConfigError
from nitro_e.data.catalog import group_columns, open_catalog
from nitro_e.data.dataset import ATTEMPTS, BadDataError, ReadSpec, Records, pad_rows, ragged_rows
from nitro_e.data.decode import BadSample, decode_array, decode_caption, decode_image, decode_info
from nitro_e.data.index import DamagedTar, Problem, map_tar, tar_members
from nitro_e.data.manifests import digest
from nitro_e.data.order import BLOCK, permutation, quotas
from nitro_e.data.reader import (
    BadSamples,
    DataConfig,
    Wishes,
    identity,
    ignore_interrupts,
    read_spec,
    worker_faults_explained,
)
from nitro_e.data.remote import ShardCache, is_url
from nitro_e.interfaces import TextEmbedding

log = logging.getLogger("nitro_e.data")
CHUNK = 1000  # steps between fresh starts
BUFFER_SAMPLES, BUFFER_BYTES = 5000, 256 << 20  # of the shuffle, per loader process and source


class StreamData:
    """The interface of reader.Data, as far as a stream can keep it; `len` is an estimate."""

    def __init__(self, config: DataConfig, cache: ShardCache, wishes: Wishes, *, seed: int, stage: str):
        self.config, self.cache, self.seed, self.stage = config, cache, seed, stage
        self.sources = config.expand()
        for shards in self.sources:
            if any(len(columns) > 1 for columns in group_columns(shards).values()):
                raise ConfigError(
                    "data.reader: stream cannot join columns; use indexed, or shards that hold all members"
                )
        probe = open_catalog([shards[:1] for shards in self.sources], cache=cache)
        self.spec = read_spec(probe, config, wishes)
        if self.spec.extra:
            raise ConfigError("data.reader=stream reads no extra members; use data.reader=indexed")
        self.has_latents, self.has_pixels = self.spec.latents is not None, bool(self.spec.images)
        self.has_text, self.has_features = self.spec.text is not None, self.spec.features is not None
        self.latent_shape = self.spec.latents.shape if self.spec.latents else None
        self.text_format = None if self.spec.text is None else "padded" if self.spec.mask else "ragged"
        self.estimate = sum(int(size.sum()) * len(shards) for size, shards in zip(probe.sizes, self.sources))
        nbytes = sum(
            int(column.rows[name]["size"].sum())
            for column in probe.columns
            for name in column.rows.dtype.names[1:]
        )
        self.buffer = max(1, min(BUFFER_SAMPLES, BUFFER_BYTES * len(probe) // max(1, nbytes)))
        self.bad = BadSamples(self.estimate, config.max_bad_fraction, probe.problems)
        log.warning(
            "data.reader=stream: batches repeat only for the same number of processes and workers, epochs are"
            " not exact, and resuming reads up to %d steps again; data.reader=indexed promises more",
            CHUNK,
        )

    def __len__(self) -> int:
        return self.estimate

    def fingerprint(self) -> dict:
        """What the stream depends on besides processes and workers; shards count by name."""
        names = [[Path(path).name for path in shards] for shards in self.sources]
        mixture = quotas(self.config.weights).tolist() if self.config.weights else None
        return {
            "reader": "stream",
            "shards": digest(names),
            "seed": self.seed,
            "stage": self.stage,
            "quotas": mixture,
        }

    def keys(self, positions: range) -> list[str]:
        raise ConfigError("data.reader=stream has no positions; use data.reader=indexed to look up samples")

    def null_text(self) -> None:
        return None

    def encoders(self) -> dict[str, dict]:
        return {}

    def records(
        self,
        step: int = 0,
        *,
        micro_batches_per_step: int = 1,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
    ) -> Iterator[Records]:
        """Endless micro-batches of one rank from optimizer step `step` on; see reader.Data.records."""
        chunk, skipped = step // CHUNK, step % CHUNK * micro_batches_per_step
        if skipped:
            log.warning("data.reader=stream: reading %d steps again to resume at step %d", step % CHUNK, step)
        batches = StreamBatches(self, chunk, micro_batches_per_step, rank)
        loader = DataLoader(
            batches, batch_size=None, num_workers=self.config.workers, collate_fn=identity,
            worker_init_fn=ignore_interrupts, pin_memory=pin_memory, generator=torch.Generator(),
        )  # fmt: skip
        for number, records in enumerate(worker_faults_explained(loader)):
            if records.failure is not None:
                raise ConfigError(records.failure)
            self.bad.add(records.bad, read=len(records))
            if number >= skipped:
                yield records


@dataclass
class StreamBatches(IterableDataset):
    """Micro-batches of one rank. The loader takes them from its W workers in turn: each makes every W-th."""

    data: StreamData
    chunk: int
    micro_batches: int
    rank: int

    def __iter__(self) -> Iterator[Records]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        per_chunk = CHUNK * self.micro_batches
        for chunk in count(self.chunk):
            # The loader's turns go on over chunks, the lanes begin anew: lane i makes batches i, i + W, ...
            lane = (worker - (chunk - self.chunk) * per_chunk) % workers
            samples = self._mixed((chunk, self.rank, lane, workers))
            try:
                for _ in range(lane, per_chunk, workers):
                    yield self._batch(samples)
            except (ConfigError, OSError) as error:
                yield Records([], [], [], failure=str(error))
                return

    def _mixed(self, key: tuple) -> Iterator[dict]:
        """Samples of all sources, each source exactly its quota in every 512."""
        weights = self.data.config.weights or [float(len(shards)) for shards in self.data.sources]
        streams = [self._source(number, key) for number in range(len(self.data.sources))]
        if len(streams) == 1:
            yield from streams[0]
        slots = np.repeat(np.arange(len(streams)), quotas(weights))
        for block in count():
            order = permutation(BLOCK, self.data.seed, self.data.stage, "stream mixture", *key, block)
            for source in slots[order].tolist():
                yield next(streams[source])

    def _source(self, number: int, key: tuple) -> Iterator[dict]:
        """Raw samples of one source without end, grouped and shuffled by webdataset."""
        purpose = (self.data.seed, self.data.stage, "stream", number, *key)
        samples = webdataset.tariterators.group_by_keys(self._expand(self.data.sources[number], purpose))
        rng = random.Random(digest(*purpose))
        return webdataset.shuffle(self.data.buffer, initial=max(1, self.data.buffer // 2), rng=rng)(samples)

    def _expand(self, shards: list[str], purpose: tuple) -> Iterator[dict[str, Any]]:
        """Members of all shards, over and over, each time in another order, and {} after every shard.

        In place of webdataset's expander, which takes damage for the end of a shard: the structure of a whole
        shard is checked here before its first member is passed on.
        """
        damaged: set[str] = set()
        for epoch in count():
            for shard in permutation(len(shards), *purpose, epoch).tolist():
                url = shards[shard]
                path = Path(self.data.cache.fetch(url) if is_url(url) else url)
                try:
                    content = map_tar(path)
                    members = list(tar_members(content.obj, path))
                    _check_unique(path, members)
                except DamagedTar as error:
                    damaged.add(url)
                    if len(damaged) > self.data.config.tolerate_shards:
                        raise
                    log.warning("left out: %s", error)
                    continue
                for name, offset, size in members:
                    yield {"fname": name, "data": bytes(content[offset : offset + size]), "__url__": url}
                yield {}
            if len(damaged) == len(shards):
                raise ConfigError("data.shards: every shard is damaged; copy them again")

    def _batch(self, samples: Iterator[dict]) -> Records:
        bad, decoded = [], []
        while len(decoded) < self.data.config.batch_size:
            sample = next(samples)
            name = Path(sample["__url__"]).name
            try:
                decoded.append((f"{name}:{sample['__key__']}", *decode_sample(sample, self.data.spec)))
            except BadSample as error:
                bad.append(Problem(name, sample["__key__"], str(error)))
                if len(bad) > ATTEMPTS:
                    raise BadDataError(
                        f"{ATTEMPTS} samples of one batch cannot be used, the last is {bad[-1]}"
                    ) from None
        return self._collate(decoded, bad)

    def _collate(self, decoded: list[tuple], bad: list[Problem]) -> Records:
        keys, prompts, info, *arrays, text, mask = map(list, zip(*decoded))
        pixels, latents, features = (None if x[0] is None else torch.from_numpy(np.stack(x)) for x in arrays)
        embedding = None
        if self.data.spec.mask is not None:
            embedding = TextEmbedding(
                torch.from_numpy(np.stack(text)), torch.from_numpy(np.stack(mask)).bool()
            )
        elif self.data.spec.text is not None:
            embedding = pad_rows(text, self.data.spec)
        return Records(keys, prompts, info, pixels, latents, embedding, features, bad=bad)


def _check_unique(path: Path, members: list[tuple[str, int, int]]) -> None:
    """webdataset stops at a duplicate; it should be told apart from other faults."""
    names = [name for name, _, _ in members]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DamagedTar(f"{path}: member '{twice}' appears twice; pack the shard again")


def decode_sample(sample: dict[str, Any], spec: ReadSpec) -> tuple:
    """Raw members -> (prompt, info, pixels, latents, features, tokens, mask); None for what is not read."""
    info = decode_info(sample["json"]) if spec.info and "json" in sample else {}
    prompt = decode_caption(sample.get("txt"), info, spec.caption_key)
    pixels = None
    if spec.images:
        content = next((sample[name] for name in spec.images if name in sample), None)
        if content is None:
            raise BadSample("no image")
        pixels = decode_image(content, spec.resolution)
    latents, features, mask = (
        _array(sample, member, layout) for member, layout in
        (("npy", spec.latents), ("features.npy", spec.features), ("mask.npy", spec.mask))
    )  # fmt: skip
    text = None
    if spec.text is not None:
        padded = spec.mask is not None
        text = (
            _array(sample, "text.npy", spec.text)
            if padded
            else ragged_rows(_member(sample, "text.npy"), spec)
        )
    return prompt, info, pixels, latents, features, text, mask


def _array(sample: dict[str, Any], member: str, layout) -> np.ndarray | None:
    if layout is None:
        return None
    array = decode_array(_member(sample, member))
    if array.shape != layout.shape or array.dtype.str != layout.dtype:
        raise BadSample(f"{member} is {array.dtype} {array.shape}, expected {layout.dtype} {layout.shape}")
    return array


def _member(sample: dict[str, Any], name: str) -> bytes:
    if name not in sample:
        raise BadSample(f"no {name}")
    return sample[name]
