"""Read samples in the order of `order.py`: the configuration, the checks, the micro-batches.

    data = open_data(DataConfig(shards=("data/train-*.tar",)), need_pixels=False, seed=0, stage="pretrain")
    for records in data.records(step=1000, micro_batches_per_step=2, rank=0, world=8): ...

Global batch t holds the positions [t * B, (t + 1) * B), B = batch_size * micro_batches_per_step * world; a
rank takes its contiguous slice, a micro-batch a slice of that. The loader is a plain torch DataLoader and
must not be given to accelerate, which would split it a second time. Left out: epochs (a stage counts steps).

Samples that turn out bad are replaced (see dataset.py) and counted here. Training stops when more distinct
samples are bad than max(1, max_bad_fraction * data set), or, to notice early, than max(8, 10 *
max_bad_fraction * read so far).
"""

from __future__ import annotations

import json
import logging
import signal
import zipfile
import zlib
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from nitro_e.config import Config, ConfigError, Fraction, Ge, Gt, Le, TrainingError
from nitro_e.data.catalog import IMAGES, Catalog, Column, MissingShards, expand_shards, open_catalog
from nitro_e.data.dataset import ArrayLayout, BadDataError, ReadSpec, Records, TarDataset
from nitro_e.data.decode import BadSample, npy_layout
from nitro_e.data.index import Problem
from nitro_e.data.manifests import read_manifests
from nitro_e.data.order import Order
from nitro_e.data.prefetch import Prefetcher
from nitro_e.data.remote import ShardCache, is_url
from nitro_e.interfaces import TextEmbedding

log = logging.getLogger("nitro_e.data")


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Config):
    """One part of a mixture."""

    shards: tuple[str, ...]
    # its share of every 512 samples, relative to the others; 0 drops the source
    weight: Annotated[float, Ge(0)] | None = None


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Where the samples are and how they are read; the seed of their order belongs to the run."""

    shards: tuple[str, ...] = ()  # webdataset tars: paths, globs, brace ranges
    # or several sets; without weights, their union
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    # stream: no scan of all shards at the start, a weaker order
    reader: Literal["indexed", "stream"] = "indexed"
    batch_size: Annotated[int, Ge(1), Le(65536)] = 32  # samples per process and micro-batch
    resolution: Annotated[int, Ge(1), Le(65536)] = 512  # pixels per side
    # loader processes per training process; 0 reads in the training process
    workers: Annotated[int, Ge(0), Le(512)] = 2
    caption_key: str = "caption"  # inside the json member, where there is no txt
    use_latents: bool = True  # stored ones, if the shards have them; False decodes images instead
    max_bad_fraction: Fraction = 0.001  # of the data set may be unusable
    # damaged tars that are left out, and reported, instead of being an error
    tolerate_shards: Annotated[int, Ge(0)] = 0
    cache: str | None = None  # folder for shards behind URLs; None: $NITRO_E_CACHE or ~/.cache/nitro_e
    cache_gb: Annotated[float, Gt(0)] = 200.0  # its size

    def __post_init__(self):
        super().__post_init__()
        if self.shards and self.sources:
            raise ConfigError(
                "data.shards and data.sources are both given; put the shards into a source of their own"
            )
        without = [name for name, source in self.sources.items() if source.weight is None]
        if without and len(without) < len(self.sources):
            raise ConfigError(
                f"data.sources.{without[0]}.weight: missing; give every source a weight, or none of them"
            )

    @property
    def weights(self) -> list[float] | None:
        """One per source, or None for the union of all samples."""
        weights = [source.weight for source in self.sources.values()]
        return None if not weights or None in weights else weights

    def expand(self) -> list[list[str]]:
        """Files of each source; none for a source of weight 0. Raises MissingShards naming those of all sources."""
        if not self.sources:
            return [expand_shards(self.shards)]
        found, missing = [], []
        for name, source in self.sources.items():
            try:
                dropped = source.weight == 0
                found.append([] if dropped else expand_shards(source.shards, f"data.sources.{name}.shards"))
            except MissingShards as error:
                missing.append(str(error))
        if missing:
            raise MissingShards("; ".join(missing))
        return found


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
        """Count what `read` more samples brought; raises BadDataError above the limits of the module
        docstring.
        """
        self.read += read
        for problem in problems:
            if (problem.shard, problem.key) not in self.seen:
                self.seen[problem.shard, problem.key] = problem.reason
                self._tell(problem)
        limit = max(1, self.fraction * self.total)
        early = max(8, 10 * self.fraction * self.read) if self.read else limit
        if len(self) > min(limit, early) and problems:
            raise BadDataError(
                f"{len(self)} bad samples of {self.total} ({self.read} read), more than data.max_bad_fraction"
                f" {self.fraction:g} allows; the last: {problems[-1]}; find all with `nitro-e data"
                " verify`, repair the shards or raise data.max_bad_fraction"
            )

    def _tell(self, problem: Problem) -> None:
        if len(self) <= 20:
            log.warning(
                "bad sample %s%s", problem, " (further ones are only counted)" if len(self) == 20 else ""
            )
        if self.report is not None:
            with open(self.report, "a") as file:
                file.write(json.dumps(asdict(problem)) + "\n")


class Data:
    """An opened data set; what `Records` will hold is settled.

    has_latents, has_pixels, has_text, has_features; latent_shape (C, h, w), text_format "padded" or "ragged",
    or None.
    """

    def __init__(self, config: DataConfig, catalog: Catalog, order: Order, spec: ReadSpec):
        self.config, self.catalog, self.order, self.spec = config, catalog, order, spec
        self.has_latents, self.has_pixels = spec.latents is not None, bool(spec.images)
        self.has_text, self.has_features = spec.text is not None, spec.features is not None
        self.latent_shape = spec.latents.shape if spec.latents else None
        self.text_format = None if spec.text is None else "padded" if spec.mask else "ragged"
        total = len(catalog) + len(catalog.problems)
        self.bad = BadSamples(total, config.max_bad_fraction, catalog.problems)

    def __len__(self) -> int:
        return len(self.catalog)

    def null_text(self) -> TextEmbedding | None:
        """The null prompt's embedding, (1, L, D) and (1, L), if `encode` left one beside the stored text."""
        column = self.catalog.find("text.npy") if self.has_text else None
        path = Path(column.paths[0]).parent / "null-text.npz" if column else None
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                return TextEmbedding(*(torch.from_numpy(file[name])[None] for name in ("tokens", "mask")))
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigError(
                f"{path} is damaged ({error}); encode the text again (nitro-e data encode --text ... --overwrite)"
            ) from None

    def encoders(self) -> dict[str, dict]:
        """What made each column, from the manifest beside its first shard: {"latents": {"name": ...}}."""
        made = {}
        for column in self.catalog.columns:
            if column.paths:
                path = Path(column.paths[0])
                entry = read_manifests({path.parent}).get(path.resolve(), {})
                if "encoder" in entry:
                    made[column.name] = entry["encoder"]
        return made

    def fingerprint(self) -> dict:
        """Content and order as plain data; a run resumes exactly only when it is equal."""
        return {"samples": len(self), "content": self.catalog.digest, **self.order.fingerprint()}

    def keys(self, positions: range) -> list[str]:
        """`shard.tar:key` at these positions, without reading any sample (and so before any replacement)."""
        return [self.catalog.name_of(sample) for sample in self.order.ids(positions)]

    def records(
        self,
        step: int = 0,
        *,
        micro_batches_per_step: int = 1,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
    ) -> Generator[Records, None, None]:
        """Endless micro-batches of one rank from optimizer step `step` on.

        Closing the iterator ends the workers. Raises BadDataError when too many samples are bad, ConfigError
        when a shard can no longer be read, TrainingError when a worker was killed.
        """
        sampler = StepSampler(
            self.config.batch_size,
            step=step,
            micro_batches_per_step=micro_batches_per_step,
            rank=rank,
            world=world,
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
        stride = self.config.batch_size * world  # positions that all ranks use up with one micro-batch each
        position = step * micro_batches_per_step * stride
        prefetcher = Prefetcher(self.catalog, self.order, self._columns())
        try:
            prefetcher.advance(position)
            for records in worker_faults_explained(loader):
                if records.failure is not None:
                    raise ConfigError(records.failure)
                self.bad.add(records.bad, read=len(records))
                position += stride
                prefetcher.advance(position)
                yield records
        finally:
            prefetcher.close()

    def _columns(self) -> list[Column]:
        """The columns whose tars are read."""
        spec = self.spec
        members = ["txt", *spec.images, *(member for member, _ in spec.extra)]
        wanted = [
            ("json", spec.info),
            ("npy", spec.latents),
            ("features.npy", spec.features),
            ("text.npy", spec.text),
        ]
        members += [member for member, layout in wanted if layout]
        found = [self.catalog.find(member) for member in members]
        return [column for column in self.catalog.columns if column in found]


def open_data(
    config: DataConfig,
    *,
    need_pixels: bool,
    seed: int,
    stage: str,
    use_latents: bool = True,
    use_text: bool = False,
    use_features: bool = False,
    extra: tuple[str, ...] = (),
    latent_shape: tuple[int, int, int] | None = None,
    text_length: int = 128,
) -> Data:
    """Index the shards, check that every sample has what is needed, and fix the order.

    Stored latents (`npy`) are used if the shards have them, unless `use_latents` is False, and so are text
    embeddings and vision features where `use_text`, `use_features` ask for them. Images are decoded when
    there are no latents, or when `need_pixels` (for a vision encoder) and there are no stored features.
    `latent_shape` (C, h, w) is what stored latents must have, if given; `text_length` is L of stored text.
    `extra` names more `.npy` members that every sample must have, all of one shape (`noise.npy` of synthetic
    pairs); they arrive in `Records.extra`. Raises ConfigError for missing or damaged shards, captions,
    images, or arrays of another shape.
    """
    wishes = Wishes(
        need_pixels,
        use_latents and config.use_latents,
        use_text,
        use_features,
        extra,
        latent_shape,
        text_length,
    )
    cache = ShardCache(config.cache, config.cache_gb * 1e9)
    if config.reader == "stream":
        from nitro_e.data.stream import StreamData  # the only module that needs webdataset

        return StreamData(config, cache, wishes, seed=seed, stage=stage)
    catalog = open_catalog(config.expand(), config.tolerate_shards, True, cache)
    spec = read_spec(catalog, config, wishes)
    return Data(config, catalog, Order(catalog.sizes, config.weights, seed=seed, stage=stage), spec)


@dataclass(frozen=True)
class Wishes:
    """What the caller of `open_data` asked for; explained there."""

    need_pixels: bool
    use_latents: bool
    use_text: bool
    use_features: bool
    extra: tuple[str, ...]
    latent_shape: tuple[int, int, int] | None
    text_length: int


def read_spec(catalog: Catalog, config: DataConfig, wishes: Wishes) -> ReadSpec:
    """Settle what is read, after checking that all samples have it. Raises ConfigError; see `open_data`."""
    if not len(catalog):
        raise ConfigError(
            f"data.shards: no samples in {len(catalog.names)} shards {catalog.names[:3]}; pack some first"
        )
    latents = wishes.use_latents and _all_or_none(catalog, "npy", "latents")
    text = wishes.use_text and _all_or_none(catalog, "text.npy", "text embeddings")
    features = wishes.use_features and _all_or_none(catalog, "features.npy", "vision features")
    pixels = not latents or wishes.need_pixels and not features
    _check_members(catalog, ("txt", "json"), "caption (txt or json)", "captions")
    if pixels:
        _check_members(catalog, IMAGES, f"image ({', '.join(IMAGES)})", "images")
    for member in wishes.extra:
        if not _all_or_none(catalog, member, f"'{member}'"):
            raise ConfigError(
                f"data.shards: no sample has '{member}': {catalog.describe(0)}; list shards that have it"
            )
    images = image_spec(catalog) if pixels else ()
    spec = ReadSpec(
        images=images,
        info=_wants_info(catalog, images, latents),
        resolution=config.resolution,
        caption_key=config.caption_key,
        latents=_latent_layout(catalog, wishes.latent_shape) if latents else None,
        features=_layout(catalog, "features.npy", 2) if features else None,
        extra=tuple((member, _layout(catalog, member)) for member in wishes.extra),
        text=_text_layout(catalog, wishes.text_length) if text else None,
        mask=_layout(catalog, "mask.npy", 1)
        if text and _all_or_none(catalog, "mask.npy", "text masks")
        else None,
        text_length=wishes.text_length,
    )
    _check_captions(catalog, spec)
    return spec


def _all_or_none(catalog: Catalog, member: str, what: str) -> bool:
    """Whether all samples have this member; some with and some without is an error."""
    has = catalog.has(member)
    if has.any() and not has.all():
        with_, without = int(np.argmax(has)), int(np.argmin(has))
        raise ConfigError(
            f"data.shards: {int(has.sum())} of {len(has)} samples have {what}: {catalog.describe(with_)},"
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
                f" {catalog.describe(first)}; add {remedy} with `nitro-e data pack`, or drop it"
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


def _layout(catalog: Catalog, member: str, dimensions: int | None = None) -> ArrayLayout:
    """Layout of the first array of this member."""
    column = catalog.find(member)
    offset, size, _ = column.rows[member][0].tolist()
    path = column.paths[int(catalog.shard_of(0))]
    with open(catalog.cache.fetch(path) if is_url(path) else path, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    try:
        shape, dtype, start = npy_layout(content)
        if dimensions is not None and len(shape) != dimensions:
            raise BadSample(f"{len(shape)} dimensions, expected {dimensions}")
    except BadSample as error:
        raise ConfigError(
            f"{catalog.name_of(0)}: the first {member} cannot be used: {error}; encode it again"
        ) from None
    return ArrayLayout(content[:start], shape, dtype.str, len(content))


def _latent_layout(catalog: Catalog, expected: tuple[int, int, int] | None) -> ArrayLayout:
    layout = _layout(catalog, "npy", 3)
    if np.dtype(layout.dtype).kind != "f" or expected is not None and layout.shape != tuple(expected):
        raise ConfigError(
            f"{catalog.name_of(0)}: latents are {np.dtype(layout.dtype)} {layout.shape}, the model needs"
            f" floats of shape {tuple(expected) if expected else '(C, h, w)'}; encode for this codec and"
            " resolution, or set data.use_latents=false"
        )
    return layout


def _text_layout(catalog: Catalog, length: int) -> ArrayLayout:
    layout, padded = _layout(catalog, "text.npy", 2), catalog.find("mask.npy") is not None
    if padded and layout.shape[0] != length:
        raise ConfigError(
            f"{catalog.name_of(0)}: stored text has {layout.shape[0]} tokens, the text encoder {length};"
            " encode it with the same --text-length"
        )
    return layout


def _check_captions(catalog: Catalog, spec: ReadSpec) -> None:
    """Where captions come from json, the first sample must have the configured key."""
    if catalog.find("txt") is not None:
        return
    only_captions = replace(spec, images=(), latents=None, text=None, features=None)
    _, failed = TarDataset(catalog, Order(catalog.sizes, seed=0, stage="check"), only_captions).load(
        np.array([0])
    )
    if 0 in failed and "no caption under" in failed[0].reason:
        raise ConfigError(f"{failed[0]}; set data.caption_key to the right one")


def worker_faults_explained(loader: DataLoader) -> Iterator[Records]:
    """The loader's items; a worker process that was killed raises TrainingError with the likely reason."""
    try:
        yield from loader
    except (
        RuntimeError,
        ConnectionError,
        EOFError,
    ) as error:  # the latter two: it died while handing over a batch
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"a DataLoader worker ended: {' '.join(str(error).split())[:200]}; most likely the machine ran out of memory"
            " (lower data.workers or data.batch_size), or, after a bus error, a shard was cut while in use"
        ) from None


def identity(records: Records) -> Records:
    return records


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C and job managers signal the whole process group: the training process saves, then ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
