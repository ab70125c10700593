"""Read shards one after the other with webdataset's own pipeline, for data sets too large to scan first.

    shards shuffled -> split by rank and worker -> tar members -> samples -> shuffle buffer -> mixture -> batches

The order depends on the layout: the same processes, workers and first step give the same batches, another
layout gives others. All processes together read every sample once in an epoch, but none waits for another.
A run that is resumed at step N shuffles anew, with a seed of N. A mixture holds its weights on average.

This module adds two things to webdataset. A shard is downloaded, and its structure checked, before its first
sample is used: webdataset takes a damaged header for the end of the tar. Bad samples are counted and reported.
Left out: columns in separate tars, extra members.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds

from nitro_e.config import ConfigError
from nitro_e.data.catalog import Catalog, group_columns
from nitro_e.data.data_config import DataConfig
from nitro_e.data.dataset import ATTEMPTS, Records, dequantize, pad_rows, ragged_rows
from nitro_e.data.decode import BadSample, decode_array, decode_caption, decode_image, decode_info
from nitro_e.data.index import DamagedTar, scan_tar
from nitro_e.data.loader import load
from nitro_e.data.manifests import digest
from nitro_e.data.order import quotas
from nitro_e.data.problems import BadDataError, Problem
from nitro_e.data.reader import Data
from nitro_e.data.remote import is_url
from nitro_e.data.spec import ArrayLayout, ReadSpec
from nitro_e.interfaces import TextEmbedding
from nitro_e.randomness import seed_of

log = logging.getLogger("nitro_e.data")
BUFFER_SAMPLES, BUFFER_BYTES = 5000, 256 << 20  # of the shuffle, per loader process and source


class StreamData(Data):
    """A data set that is read as a stream. `catalog` has the first shard of each source; `len` is an estimate."""

    def __init__(
        self,
        config: DataConfig,
        catalog: Catalog,
        spec: ReadSpec,
        sources: list[list[str]],
        *,
        seed: int,
        stage: str,
    ):
        if any(len(columns) > 1 for shards in sources for columns in group_columns(shards).values()):
            raise ConfigError(
                "data.reader: stream cannot join columns; use indexed, or shards that hold all members"
            )
        if spec.partial:
            raise ConfigError(
                "data.reader: stream needs the same columns in every source; use indexed, or encode them all"
            )
        if spec.extra:
            raise ConfigError("data.reader=stream reads no extra members; use data.reader=indexed")
        self.seed, self.stage = seed, stage
        self.estimate = sum(int(size.sum()) * len(shards) for size, shards in zip(catalog.sizes, sources))
        if config.weights is None:
            sources, self.weights = [[path for shards in sources for path in shards]], [1.0]
        else:
            self.weights = quotas(config.weights).tolist()
        self.sources = sources
        super().__init__(config, catalog, spec, order=None)
        log.warning(
            "data.reader=stream: the order of samples depends on the number of processes and workers, and a"
            " resumed run shuffles anew; data.reader=indexed promises more"
        )

    def __len__(self) -> int:
        return self.estimate

    def fingerprint(self) -> dict:
        """List what the stream depends on besides step, processes and workers; shards count by name."""
        names = [[Path(path).name for path in shards] for shards in self.sources]
        return {
            "reader": "stream",
            "shards": digest(names),
            "seed": self.seed,
            "stage": self.stage,
            "quotas": self.weights,
        }

    def keys(self, positions: range | np.ndarray) -> list[str]:
        raise ConfigError("data.reader=stream has no positions; use data.reader=indexed to look up samples")

    def records(
        self,
        step: int = 0,
        *,
        micro_batches_per_step: int = 1,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
    ) -> Iterator[Records]:
        """Yield micro-batches of one rank without end, shuffled anew for each first `step`; see Data.records."""
        readers = world * max(1, self.config.workers)
        used = [(shards, weight) for shards, weight in zip(self.sources, self.weights) if weight]
        for shards, _ in used:
            if len(shards) < readers:
                raise ConfigError(
                    f"data.reader=stream: {len(shards)} shards ({Path(shards[0]).name}, ...) for {readers}"
                    " loader processes, of which each needs one; lower data.workers, or use data.reader=indexed"
                )
        seed = seed_of(self.seed, self.stage, "stream", step)
        batches = Batches(self.config, self.catalog, self.spec)
        pipeline = wds.DataPipeline(
            wds.RandomMix(
                [batches.source(shards, seed, rank, world) for shards, _ in used],
                [weight for _, weight in used],
            ),
            batches.decoded,
            wds.batched(self.config.batch_size, batches.collate, partial=False),
            batches.failures_last,
        )
        seed = seed_of(seed, rank)
        if not self.config.workers:
            random.seed(seed)  # for RandomMix; in worker processes torch does it, from the loader's seed
        yield from self._counted(
            load(pipeline, self.config.workers, seed=seed, batch_size=None, pin_memory=pin_memory)
        )


class Batches:
    """Stages of the pipeline that webdataset does not have: whole shards, decoding, counting of bad samples."""

    def __init__(self, config: DataConfig, catalog: Catalog, spec: ReadSpec):
        self.spec, self.cache, self.tolerated = spec, catalog.cache, config.tolerate_shards
        self.bad: list[Problem] = []  # found since the last batch
        self.damaged: set[str] = set()  # shards that were left out
        nbytes = sum(
            int(x.rows[name]["size"].sum()) for x in catalog.columns for name in x.rows.dtype.names[1:]
        )
        self.buffer = max(1, min(BUFFER_SAMPLES, BUFFER_BYTES * len(catalog) // max(1, nbytes)))

    def source(self, shards: list[str], seed: int, rank: int, world: int) -> wds.DataPipeline:
        """Make the pipeline of one source: raw samples of this rank's part of every epoch, without end."""
        return wds.DataPipeline(
            wds.SimpleShardList(shards),
            # the same on all ranks and workers, of which each then takes its own part
            wds.detshuffle(len(shards), len(shards), seed),
            wds.slice(rank, None, world),
            wds.split_by_worker,
            self.whole_shards,
            wds.tariterators.tar_file_expander,
            # goes on after a member that is there twice, which `whole_shards` has reported
            partial(wds.tariterators.group_by_keys, handler=wds.ignore_and_continue),
            wds.detshuffle(self.buffer, max(1, self.buffer // 2), seed),
        ).repeat()

    def whole_shards(self, shards: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Open each shard after checking its structure from the first to the last header."""
        usable = 0
        for shard in shards:
            url = shard["url"]
            path = Path(self.cache.fetch(url) if is_url(url) else url)
            try:
                problems = scan_tar(path, crc=False).problems
            except DamagedTar as error:
                self.damaged.add(url)
                if len(self.damaged) > self.tolerated:
                    raise
                log.warning("left out: %s", error)
                continue
            usable += 1
            # of a copy in the cache, the URL has the name
            self.bad += [replace(problem, shard=Path(url).name) for problem in problems]
            with open(path, "rb") as stream:
                yield {"url": url, "stream": stream}
        if not usable:
            raise ConfigError(
                "data.reader=stream: every shard of a loader process is damaged; copy them again, or lower"
                " data.workers"
            )

    def decoded(self, samples: Iterator[dict[str, Any]]) -> Iterator[tuple]:
        """Decode samples, leaving out bad ones; raises BadDataError when ATTEMPTS in a row are bad."""
        failures = 0
        for sample in samples:
            name, key = Path(sample["__url__"]).name, sample["__key__"]
            try:
                decoded = decode_sample(sample, self.spec)
            except BadSample as error:
                failures += 1
                self.bad.append(Problem(name, key, str(error)))
                if failures == ATTEMPTS:
                    raise BadDataError(
                        f"{ATTEMPTS} samples in a row cannot be used, the last is {self.bad[-1]}; look for"
                        " the cause with `nitro-e data verify`"
                    ) from None
                continue
            failures = 0
            yield f"{name}:{key}", *decoded

    def collate(self, samples: list[tuple]) -> Records:
        """Make a batch of decoded samples, and report the bad ones found since the last."""
        keys, prompts, info, *arrays, text, mask, scale = map(list, zip(*samples))
        pixels, latents, features = (None if x[0] is None else torch.from_numpy(np.stack(x)) for x in arrays)
        embedding = None
        if self.spec.mask is not None:
            tokens = torch.from_numpy(np.stack(text))
            if self.spec.scale is not None:
                tokens = dequantize(tokens, torch.from_numpy(np.stack(scale)))
            embedding = TextEmbedding(tokens, torch.from_numpy(np.stack(mask)).bool())
        elif self.spec.text is not None:
            embedding = pad_rows(text, self.spec)
        bad, self.bad = self.bad, []
        return Records(keys, prompts, info, pixels, latents, embedding, features, bad=bad)

    def failures_last(self, batches: Iterator[Records]) -> Iterator[Records]:
        """Pass batches on; an error becomes the last one, which says what it was and ends the reading."""
        try:
            yield from batches
        except (ConfigError, OSError) as error:
            yield Records([], [], [], failure=str(error))


def decode_sample(sample: dict[str, Any], spec: ReadSpec) -> tuple:
    """Decode raw members to (prompt, info, pixels, latents, features, tokens, mask, scale); None for what is not read.

    scale: of padded tokens of 8 bits; ragged ones are multiplied with theirs here.
    """
    info = decode_info(sample["json"]) if spec.info and "json" in sample else {}
    prompt = decode_caption(sample.get("txt"), info, spec.caption_key)
    pixels = text = scale = None
    if spec.images:
        content = next((sample[name] for name in spec.images if name in sample), None)
        if content is None:
            raise BadSample("no image")
        pixels = decode_image(content, spec.size)
    latents = _array(sample, "npy", spec.latents)
    features = _array(sample, "features.npy", spec.features)
    mask = _array(sample, "mask.npy", spec.mask)
    if mask is not None:
        text = _array(sample, "text.npy", spec.text)
        scale = _array(sample, "scale.npy", spec.scale)
    elif spec.text is not None:
        scales = None if spec.scale is None else _member(sample, "scale.npy")
        text = ragged_rows(_member(sample, "text.npy"), spec, scales)
    return prompt, info, pixels, latents, features, text, mask, scale


def _array(sample: dict[str, Any], member: str, layout: ArrayLayout | None) -> np.ndarray | None:
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
