"""Read samples in the order of `order.py`: a torch Dataset over indexed tars, and the stream of micro-batches.

    data = open_data(DataConfig(shards=("data/train-*.tar",)), need_pixels=False, seed=0, stage="pretrain")
    for records in data.records(step=1000, micro_batches_per_step=2, rank=0, world=8): ...

Global batch t holds the positions [t * B, (t + 1) * B), B = batch_size * micro_batches_per_step * world; a rank
takes its contiguous slice, a micro-batch a slice of that. The loader is a plain torch DataLoader and must not be
given to accelerate, which would split it a second time. Left out: epochs (a stage counts steps).

Every process compares each sample with its CRC the first time it reads it, and believes the file from then on.
A sample that turns out bad when read (CRC, decoding, NaN, empty caption) is replaced by the next good one of its
source, the same in every run, and reported. Training stops when more distinct samples are bad than
max(1, max_bad_fraction * data set), or, to notice early, more than max(8, 10 * max_bad_fraction * samples read).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from nitro_e.config import ConfigError
from nitro_e.data.catalog import IMAGES, Catalog, expand_shards, open_catalog
from nitro_e.data.decode import (
    BadSample,
    decode_caption,
    decode_image,
    decode_info,
    not_finite,
    npy_layout,
)
from nitro_e.data.index import Problem
from nitro_e.data.order import Order

log = logging.getLogger("nitro_e.data")
OPEN_FILES = 256  # per process
ATTEMPTS = 64  # replacements tried for one position


class BadDataError(ConfigError):
    """Too much of the data cannot be used."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One part of a mixture."""

    shards: tuple[str, ...]
    weight: float | None = None  # its share of every 512 samples, relative to the others; 0 drops the source


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the samples are and how they are read; the seed of their order belongs to the run."""

    shards: tuple[str, ...] = ()  # webdataset tars: paths, globs, brace ranges
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # or several sets; without weights, their union
    batch_size: int = 32  # samples per process and micro-batch
    resolution: int = 512  # pixels per side
    workers: int = 2  # loader processes per training process; 0 reads in the training process
    caption_key: str = "caption"  # inside the json member, where there is no txt
    use_latents: bool = True  # stored ones, if the shards have them; False decodes images instead
    max_bad_fraction: float = 0.001  # of the data set may be unusable
    tolerate_shards: int = 0  # damaged tars that are left out, and reported, instead of being an error

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("resolution", 1), ("workers", 0), ("tolerate_shards", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name}: {getattr(self, name)} must be at least {least}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"data.max_bad_fraction: {self.max_bad_fraction} must be between 0 and 1")
        if self.shards and self.sources:
            raise ConfigError("data.shards and data.sources are both given; put the shards into a source of their own")
        without = [name for name, source in self.sources.items() if source.weight is None]
        if without and len(without) < len(self.sources):
            raise ConfigError(f"data.sources.{without[0]}.weight: missing; give every source a weight, or none of them")

    @property
    def weights(self) -> list[float] | None:
        """One per source, or None for the union of all samples."""
        weights = [source.weight for source in self.sources.values()]
        return None if not weights or None in weights else weights

    def expand(self) -> list[list[str]]:
        """Files of each source; none for a source of weight 0. Raises ConfigError naming missing ones."""
        if not self.sources:
            return [expand_shards(self.shards)]
        return [
            [] if source.weight == 0 else expand_shards(source.shards, f"data.sources.{name}.shards")
            for name, source in self.sources.items()
        ]


@dataclass
class Records:
    """One micro-batch on the CPU."""

    keys: list[str]  # "shard.tar:key"
    prompts: list[str]
    info: list[dict]  # the json member, {} without one
    pixels: Tensor | None = None  # (B, 3, R, R) uint8
    latents: Tensor | None = None  # (B, C, h, w) raw latents as stored, usually float16
    bad: list[Problem] = field(default_factory=list)  # samples that were replaced
    failure: str | None = None  # set by a worker instead of raising; never seen by callers

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> Records:
        pinned = {name: getattr(self, name) for name in ("pixels", "latents")}
        return replace(self, **{name: x if x is None else x.pin_memory() for name, x in pinned.items()})


@dataclass(frozen=True)
class LatentLayout:
    """What every `npy` member looks like; settled by the first one, so that no batch can decide otherwise."""

    header: bytes
    shape: tuple[int, int, int]  # (C, h, w)
    dtype: str
    nbytes: int  # header and data


@dataclass(frozen=True)
class ReadSpec:
    """Which members are read."""

    images: tuple[str, ...]  # extensions to look for, () = no pixels
    latents: LatentLayout | None  # None = no latents
    info: bool  # the json member
    resolution: int
    caption_key: str


class TarDataset(Dataset):
    """`dataset.__getitems__(positions) -> Records`. Files are opened when needed, so it can be pickled."""

    def __init__(self, catalog: Catalog, order: Order, spec: ReadSpec):
        self.catalog, self.order, self.spec = catalog, order, spec
        self._files = OpenFiles()
        self._checked: np.ndarray | None = None  # (N,) bool: content was compared with its CRC in this process

    def __getstate__(self):
        return {**self.__dict__, "_files": OpenFiles(), "_checked": None}

    def __getitems__(self, positions: range) -> Records:
        try:
            return self._read(np.asarray(positions))
        except (ConfigError, OSError) as error:
            return Records([], [], [], failure=str(error))

    def _read(self, positions: np.ndarray) -> Records:
        records, failed = self.load(self.order.ids(positions))
        for slot, problem in failed.items():
            records.bad.append(problem)
            self._replace(records, slot, int(positions[slot]))
        return records

    def _replace(self, records: Records, slot: int, position: int) -> None:
        """Fill one slot with the next good sample of the same source."""
        (source,), (counter,) = self.order.locate(np.array([position]))
        for attempt in range(1, ATTEMPTS + 1):
            one, failed = self.load(self.order.sample(int(source), np.array([counter + attempt])))
            if not failed:
                for name in ("keys", "prompts", "info", "pixels", "latents"):
                    if getattr(records, name) is not None:
                        getattr(records, name)[slot] = getattr(one, name)[0]
                return
            records.bad += failed.values()
        raise BadDataError(
            f"{ATTEMPTS} samples in a row cannot be used, the last is {records.bad[-1]};"
            " look for the cause with `python tools/data.py verify`"
        )

    def load(self, ids: np.ndarray) -> tuple[Records, dict[int, Problem]]:
        """Samples by id, without replacement: what could be read, and {slot: problem} for the rest."""
        if self._checked is None:
            self._checked = np.zeros(len(self.catalog), bool)
        shards, failed = self.catalog.shard_of(ids).tolist(), {}
        prompts, info = self._texts(ids, shards, failed)
        latents = self._latents(ids, shards, failed) if self.spec.latents else None
        pixels = self._pixels(ids, shards, failed) if self.spec.images else None
        self._checked[np.delete(ids, list(failed))] = True
        names = [self.catalog.names[shard] for shard in shards]
        keys = [key.decode(errors="replace") for key in self.catalog.columns[0].rows["__key__"][ids].tolist()]
        problems = {slot: Problem(names[slot], keys[slot], reason) for slot, reason in sorted(failed.items())}
        keys = [f"{name}:{key}" for name, key in zip(names, keys)]
        return Records(keys, prompts, info, pixels, latents), problems

    def _contents(self, extension: str, ids, shards: list[int], failed: dict[int, str]) -> list[bytes | None]:
        """The member's bytes per sample; None where there is none or its CRC is wrong."""
        column = self.catalog.find(extension)
        if column is None:
            return [None] * len(ids)
        contents, checked = [], self._checked[ids].tolist()
        for slot, (shard, (offset, size, crc)) in enumerate(zip(shards, column.rows[extension][ids].tolist())):
            content = os.pread(self._files[column.paths[shard]], size, offset) if offset else None
            if content is not None and (len(content) != size or not checked[slot] and zlib.crc32(content) != crc):
                failed.setdefault(slot, f"{extension} is not what was indexed (CRC differs)")
                content = None
            contents.append(content)
        return contents

    def _texts(self, ids, shards: list[int], failed: dict[int, str]) -> tuple[list[str], list[dict]]:
        prompts, info = [""] * len(ids), [{} for _ in ids]
        texts = self._contents("txt", ids, shards, failed)
        jsons = self._contents("json", ids, shards, failed) if self.spec.info else [None] * len(ids)
        for slot, (text, content) in enumerate(zip(texts, jsons)):
            try:
                if content is not None:
                    info[slot] = decode_info(content)
                prompts[slot] = decode_caption(text, info[slot], self.spec.caption_key)
            except BadSample as error:
                failed.setdefault(slot, str(error))
        return prompts, info

    def _pixels(self, ids, shards: list[int], failed: dict[int, str]) -> Tensor:
        pixels = np.zeros((len(ids), 3, self.spec.resolution, self.spec.resolution), np.uint8)
        for extension in self.spec.images:
            for slot, content in enumerate(self._contents(extension, ids, shards, failed)):
                if content is not None and slot not in failed:
                    try:
                        pixels[slot] = decode_image(content, self.spec.resolution)
                    except BadSample as error:
                        failed[slot] = str(error)
        return torch.from_numpy(pixels)

    def _latents(self, ids, shards: list[int], failed: dict[int, str]) -> Tensor:
        """Read the `.npy` members straight into one array and view the part behind their headers."""
        layout, column = self.spec.latents, self.catalog.find("npy")
        nbytes, checked = layout.nbytes, self._checked[ids].tolist()
        buffer = np.empty((len(ids), nbytes), np.uint8)
        for slot, (shard, (offset, size, crc)) in enumerate(zip(shards, column.rows["npy"][ids].tolist())):
            if size != nbytes:
                failed.setdefault(slot, f"latent of {size} bytes, expected {nbytes} for {layout.shape}")
                continue
            row = buffer[slot]
            read = os.preadv(self._files[column.paths[shard]], [row], offset)
            if read != nbytes or not checked[slot] and zlib.crc32(row) != crc:
                failed.setdefault(slot, "npy is not what was indexed (CRC differs)")
        start = len(layout.header)
        headers = (buffer[:, :start] == np.frombuffer(layout.header, np.uint8)).all(axis=1)
        for slot in np.flatnonzero(~headers).tolist():
            failed.setdefault(slot, f"latent is not a {layout.dtype} array of shape {layout.shape}")
        values = buffer[:, start:].view(layout.dtype)
        fresh = np.flatnonzero(~self._checked[ids])
        for slot in fresh[not_finite(values[fresh] if len(fresh) < len(ids) else values)].tolist():
            failed.setdefault(slot, "latent has NaN or Inf")
        return torch.from_numpy(values).unflatten(1, layout.shape)  # (B, C, h, w)


class OpenFiles(OrderedDict):
    """path -> file descriptor; beyond OPEN_FILES the one opened first is closed."""

    def __missing__(self, path: str) -> int:
        if len(self) >= OPEN_FILES:
            os.close(self.popitem(last=False)[1])
        self[path] = os.open(path, os.O_RDONLY)
        return self[path]


class StepSampler(Sampler):
    """Endless ranges of positions: the micro-batches of one rank, beginning with optimizer step `step`."""

    def __init__(self, batch_size: int, *, step: int, micro_batches_per_step: int, rank: int, world: int):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not in a world of {world}")
        self.batch_size, self.step = batch_size, step
        self.micro_batches, self.rank, self.world = micro_batches_per_step, rank, world

    def __iter__(self) -> Iterator[range]:
        micro = (self.step * self.world + self.rank) * self.micro_batches
        while True:
            for i in range(micro, micro + self.micro_batches):
                yield range(i * self.batch_size, (i + 1) * self.batch_size)
            micro += self.world * self.micro_batches


class BadSamples:
    """Counts distinct unusable samples and stops the run when there are too many."""

    def __init__(self, total: int, fraction: float, known: list[Problem]):
        self.total, self.fraction, self.read = total, fraction, 0
        self.report: Path | None = None  # a JSON-lines file, if the run wants one
        self.seen: dict[tuple[str, str], str] = {}
        for problem in known:
            if problem.key == "*":  # a whole shard, which data.tolerate_shards allowed
                log.warning("left out: %s", problem)
        self.add([problem for problem in known if problem.key != "*"])

    def __len__(self) -> int:
        return len(self.seen)

    def add(self, problems: list[Problem], read: int = 0) -> None:
        """Count what `read` more samples brought; raises BadDataError above the limits of the module docstring."""
        self.read += read
        for problem in problems:
            if (problem.shard, problem.key) not in self.seen:
                self.seen[problem.shard, problem.key] = problem.reason
                self._tell(problem)
        limit = max(1, self.fraction * self.total)
        early = max(8, 10 * self.fraction * self.read) if self.read else limit
        if len(self) > min(limit, early) and problems:
            raise BadDataError(
                f"{len(self)} bad samples of {self.total} ({self.read} read), more than data.max_bad_fraction="
                f"{self.fraction:g} allows; the last: {problems[-1]}; find all with `python tools/data.py verify`,"
                " repair the shards or raise data.max_bad_fraction"
            )

    def _tell(self, problem: Problem) -> None:
        if len(self) <= 20:
            log.warning("bad sample %s%s", problem, " (further ones are only counted)" if len(self) == 20 else "")
        if self.report is not None:
            with open(self.report, "a") as file:
                file.write(json.dumps(asdict(problem)) + "\n")


class Data:
    """An opened data set. `has_latents` says whether `Records.latents` are there, `latent_shape` their (C, h, w)."""

    def __init__(self, config: DataConfig, catalog: Catalog, order: Order, spec: ReadSpec):
        self.config, self.catalog, self.order, self.spec = config, catalog, order, spec
        self.has_latents = spec.latents is not None
        self.latent_shape = spec.latents.shape if spec.latents else None
        self.has_pixels = bool(spec.images)
        total = len(catalog) + len(catalog.problems)
        self.bad = BadSamples(total, config.max_bad_fraction, catalog.problems)

    def __len__(self) -> int:
        return len(self.catalog)

    def fingerprint(self) -> dict:
        """Content and order as plain data; a run resumes exactly only when it is equal."""
        return {"samples": len(self), "content": self.catalog.digest, **self.order.fingerprint()}

    def keys(self, positions: range) -> list[str]:
        """`shard.tar:key` at these positions, without reading any sample (and so before any replacement)."""
        return [self.catalog.name_of(sample) for sample in self.order.ids(positions)]

    def records(
        self, step: int = 0, *, micro_batches_per_step: int = 1, rank: int = 0, world: int = 1, pin_memory: bool = False
    ) -> Iterator[Records]:
        """Endless micro-batches of one rank from optimizer step `step` on; closing the iterator ends the workers.

        Raises BadDataError when too many samples are bad, ConfigError when a shard can no longer be read.
        """
        sampler = StepSampler(
            self.config.batch_size, step=step, micro_batches_per_step=micro_batches_per_step, rank=rank, world=world
        )
        loader = DataLoader(
            TarDataset(self.catalog, self.order, self.spec),
            batch_sampler=sampler,
            num_workers=self.config.workers,
            collate_fn=identity,
            worker_init_fn=ignore_interrupts,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        for records in loader:
            if records.failure is not None:
                raise ConfigError(records.failure)
            self.bad.add(records.bad, read=len(records))
            yield records


def open_data(
    config: DataConfig, *, need_pixels: bool, use_latents: bool = True, seed: int, stage: str, latent_shape=None
) -> Data:
    """Index the shards, check that every sample has what is needed, and fix the order.

    Stored latents (`npy`) are used if the shards have them, unless `use_latents` is False; otherwise, or if
    `need_pixels`, images are decoded. `latent_shape` (C, h, w) is what stored latents must have, if given.
    Raises ConfigError for missing or damaged shards, captions, images, or latents of another shape.
    """
    catalog = open_catalog(config.expand(), config.tolerate_shards)
    if not len(catalog):
        raise ConfigError(f"data.shards: no samples in {len(catalog.names)} shards {catalog.names[:3]}; pack some first")
    latents = _check_latents(catalog) if use_latents and config.use_latents else False
    _check_members(catalog, ("txt", "json"), "caption (txt or json)", "captions")
    if need_pixels or not latents:
        _check_members(catalog, IMAGES, f"image ({', '.join(IMAGES)})", "images")
    images = image_spec(catalog) if need_pixels or not latents else ()
    layout = _latent_layout(catalog, latent_shape) if latents else None
    spec = ReadSpec(images, layout, _wants_info(catalog, images, latents), config.resolution, config.caption_key)
    data = Data(config, catalog, Order(catalog.sizes, config.weights, seed=seed, stage=stage), spec)
    _check_captions(data)
    return data


def _check_latents(catalog: Catalog) -> bool:
    """Whether all samples have latents; some with and some without is an error."""
    has = catalog.has("npy")
    if has.any() and not has.all():
        with_, without = int(np.argmax(has)), int(np.argmin(has))
        raise ConfigError(
            f"data.shards: {int(has.sum())} of {len(has)} samples have latents: {catalog.describe(with_)},"
            f" but {catalog.describe(without)}; encode all shards, or list only one kind"
        )
    return bool(has.all())


def _check_members(catalog: Catalog, extensions: tuple[str, ...], what: str, remedy: str) -> None:
    """A shard in which no sample has any of `extensions` is an error, single samples without are left out."""
    has = catalog.has(*extensions)
    for shard, (first, last) in enumerate(zip(catalog.starts[:-1], catalog.starts[1:])):
        if last > first and not has[first:last].any():
            raise ConfigError(
                f"data.shards: no sample of {catalog.names[shard]} has a {what}, for example"
                f" {catalog.describe(first)}; add {remedy} with `python tools/data.py pack`, or drop the shard"
            )
    if not has.all():
        catalog.keep(has, f"no {what}")


def image_spec(catalog: Catalog) -> tuple[str, ...]:
    """The image extensions that occur, in the order in which they are preferred."""
    return tuple(name for name in IMAGES if catalog.find(name))


def _wants_info(catalog: Catalog, images: tuple[str, ...], latents: bool) -> bool:
    """json is read where captions need it, or where it lies in tars that are read anyway."""
    column, captions = catalog.find("json"), catalog.find("txt")
    if column is None or captions is None or not catalog.has("txt").all():
        return column is not None
    return column in [catalog.find(name) for name in ("txt", *images, *["npy"] * latents)]


def _latent_layout(catalog: Catalog, expected: tuple[int, int, int] | None) -> LatentLayout:
    """Layout of the first latent that can be read."""
    column = catalog.find("npy")
    with open(column.paths[0], "rb") as file:
        offset, size, _ = column.rows["npy"][0].tolist()
        file.seek(offset)
        content = file.read(size)
    try:
        shape, dtype, start = npy_layout(content)
    except BadSample as error:
        raise ConfigError(f"{catalog.name_of(0)}: the first latent cannot be read: {error}; encode it again") from None
    if len(shape) != 3 or dtype.kind != "f" or expected is not None and shape != tuple(expected):
        raise ConfigError(
            f"{catalog.name_of(0)}: latents are {dtype} {shape}, the model needs floats of shape"
            f" {tuple(expected) if expected else '(C, h, w)'}; encode for this codec and resolution,"
            " or set data.use_latents=false"
        )
    return LatentLayout(content[:start], shape, dtype.str, len(content))


def _check_captions(data: Data) -> None:
    """Where captions come from json, the first sample must have the configured key."""
    if data.catalog.find("txt") is not None:
        return
    dataset = TarDataset(data.catalog, data.order, replace(data.spec, images=(), latents=None))
    _, failed = dataset.load(np.array([0]))
    if 0 in failed and "no caption under" in failed[0].reason:
        raise ConfigError(f"{failed[0]}; set data.caption_key to the right one")


def identity(records: Records) -> Records:
    return records


def ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training process ends its workers
