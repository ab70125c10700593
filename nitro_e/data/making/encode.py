"""Run the frozen encoders once over packed images: one output shard per input shard and column.

    latents-X.tar    npy       (C, h, w) float16, raw (not scaled) codec latents, with copies of txt and json
    text-X.tar       text.npy  (L, D) float16; padded: L fixed, with mask.npy (L,) uint8; ragged: real tokens.
                     With int8, text.npy is int8 and scale.npy (L,) float32 has a factor for each token
    text_NAME-X.tar  text_NAME.npy, ...: likewise of the caption under the key NAME of the json
    features-X.tar   features.npy  (h*w, F) float16 vision features on the latent grid

X is the input's name without `images-`. A shard is published after it was opened again and checked (keys,
shapes, finite, |latent| < 10,000, and the codec's round trip of its first image). Its manifest entry says
what made it. Images are decoded in processes and go to the device as bytes; a thread writes, checks and hashes a
shard while the next one is encoded. The bytes depend on the encoder, the device and the batch size, not on processes, ranks or
interruptions.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Full, Queue
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nitro_e.config import Config, ConfigError, Ge, Le, environment_number
from nitro_e.data.buckets import NO_SIZE, assign
from nitro_e.data.catalog import COLUMN, Catalog, group_columns, open_catalog
from nitro_e.data.dataset import Records, TarDataset
from nitro_e.data.loader import load
from nitro_e.data.making.jobs import JobConfig, Result, publish_entry, run_job
from nitro_e.data.making.writer import check_written, open_shard
from nitro_e.data.manifests import digest, read_manifests
from nitro_e.data.order import Order
from nitro_e.data.problems import Problem
from nitro_e.data.spec import ReadSpec, image_extensions
from nitro_e.files import add_tensors, atomic_file
from nitro_e.interfaces import LatentCodec, TextEncoder, VisionEncoder
from nitro_e.sizes import Size, parse_sizes

LARGEST = 1e4  # a latent beyond this is a failure of the codec, not an image
AHEAD = 4  # encoded batches that may wait for the writer


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(Config):
    """Options of encoding; all but batch_size and workers are part of every unit's fingerprint."""

    OPTIONS: ClassVar[bool] = True

    resolution: Annotated[int, Ge(1), Le(65536)] = 512
    buckets: tuple[
        str, ...
    ] = ()  # HEIGHTxWIDTH: each image at the one nearest to its shape, in place of a square
    text_format: Literal["padded", "ragged"] = "padded"
    text_dtype: Literal["float16", "int8"] = "float16"
    caption: str | None = None  # key of the json whose text is encoded, in place of txt
    caption_key: str = "caption"
    batch_size: Annotated[int, Ge(1), Le(65536)] = 32
    workers: Annotated[int, Ge(0), Le(512)] = 2  # processes that decode images


@dataclass
class Encoders:
    """The encoders to run, at least one. `names` says for the manifest what each is."""

    codec: LatentCodec | None = None
    text: TextEncoder | None = None
    vision: VisionEncoder | None = None
    grid: tuple[int, int] | None = None  # of the vision features; None: the codec's
    names: dict[str, Any] | None = None
    device: str = "cpu"  # that the encoders are on
    caption: str | None = None  # EncodeConfig.caption: text is that of this key of the json

    def __post_init__(self):
        if self.codec is None and self.text is None and self.vision is None:
            raise ConfigError("nothing to encode; choose --codec, --text, --vision or several of them")
        if self.vision is not None and self.grid is None and self.codec is None:
            raise ConfigError("--vision needs the latent grid; give --codec as well, or --grid H W")
        if self.caption and (self.codec or self.vision or not self.caption.isidentifier()):
            raise ConfigError(
                f"--caption {self.caption}: encode a further caption with --text alone; its key must be a word, which"
                " becomes the name of the column"
            )
        text = f"text_{self.caption}" if self.caption else "text"
        columns = {"latents": self.codec, text: self.text, "features": self.vision}
        self.columns = {name: encoder for name, encoder in columns.items() if encoder is not None}
        self.identity = {name: weights_digest(encoder) for name, encoder in self.columns.items()}

    def describe(self, column: str, config: EncodeConfig) -> dict:
        """Make the `encoder` entry of a manifest line."""
        kind = column.partition("_")[0]
        described = {"name": (self.names or {}).get(kind), "weights": self.identity[column]}
        if kind == "text":
            dtype = {"dtype": config.text_dtype} if config.text_dtype != "float16" else {}
            return {**described, "format": config.text_format, "length": self.text.length, **dtype}
        buckets = {"buckets": list(config.buckets)} if config.buckets else {}
        return {**described, "resolution": config.resolution, **buckets}


@dataclass
class EncodeUnit:
    """An input shard with all its columns."""

    name: str
    paths: list[str]
    options: str  # digest of config and encoders
    buckets: tuple[Size, ...] = ()

    def fingerprint(self) -> str:
        return digest(self.options, open_catalog([self.paths]).digest)

    def open(self) -> tuple[Catalog, np.ndarray]:
        """Index the shard: its samples, and (N,) the bucket of each, 0 without buckets."""
        catalog = open_catalog([self.paths])
        if not self.buckets:
            return catalog, np.zeros(len(catalog), np.uint8)
        groups = assign(catalog, self.buckets, keep=False)
        catalog.keep(groups != NO_SIZE, "json has no width and height, which buckets need")
        return catalog, groups[groups != NO_SIZE]


def encode(shards: Sequence[str], encoders: Encoders, config: EncodeConfig, job: JobConfig) -> list[dict]:
    """Encode every shard (paths from `expand_shards`); see jobs.run_job. Returns the manifest entries.

    Raises ConfigError for damaged input, for two shards whose output would have one name, and when a check
    fails.
    """
    chosen = replace(config, batch_size=1, workers=0).__dict__
    for name in ("text_dtype", "caption", "buckets"):  # newer than shards that were made with their defaults
        if chosen[name] == getattr(EncodeConfig, name):
            del chosen[name]
    options = digest(chosen, encoders.identity, encoders.grid)
    units = []
    for columns in group_columns(shards).values():
        path = Path(columns.get("images") or columns.get("") or next(iter(columns.values())))
        match = COLUMN.fullmatch(path.stem)
        name = match.group(2) if match else path.stem
        units.append(
            EncodeUnit(name, list(columns.values()), options, parse_sizes(config.buckets, "--buckets"))
        )
    names = [unit.name for unit in units]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise ConfigError(
            f"two input shards are called '{min(twice)}'; encode each folder into an --out of its own"
        )
    job.out.mkdir(parents=True, exist_ok=True)
    if encoders.text is not None:
        _check_null_text(encoders, config, units, job)
    return run_job("+".join(encoders.columns), units, partial(_work, encoders, config, job.out), job)


def weights_digest(encoder: Any) -> str:
    """Hash an encoder's class, settings, vocabulary and every tensor that it holds."""
    state = hashlib.sha256(type(encoder).__name__.encode())
    for name, value in sorted(vars(encoder).items()):
        if isinstance(value, nn.Module | Tensor):
            add_tensors(state, name, value)
        elif hasattr(value, "get_vocab"):  # a tokenizer
            state.update(f"{name} {digest(value.get_vocab())}".encode())
        elif isinstance(value, int | float | str | tuple) and name != "truncated":  # which counts prompts
            state.update(f"{name} {value!r}".encode())
    return state.hexdigest()


def usual_workers() -> int:
    """Return a number of processes that decode images: this rank's cores but one, from 2 to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores // max(environment_number("LOCAL_WORLD_SIZE", 1), 1) - 1, 2), 16)


# --- one unit after the other; one loader reads the images of all ----------------------------------


class UnitImages(Dataset):
    """Reads batches of (unit, bucket, sample ids) without replacement: records, and the problem of each bad row."""

    def __init__(self, units: Sequence[EncodeUnit], config: EncodeConfig, pixels: bool):
        self.units, self.config, self.pixels = units, config, pixels
        self._current: tuple[tuple[int, int], TarDataset] | None = None

    def __getitems__(self, batch: tuple[int, int, np.ndarray]) -> tuple[Records, dict[int, Problem]]:
        number, bucket, ids = batch
        if self._current is None or self._current[0] != (number, bucket):
            unit = self.units[number]
            side = self.config.resolution
            size = unit.buckets[bucket] if unit.buckets else (side, side)
            self._current = (number, bucket), self._dataset(unit.open()[0], size)
        return self._current[1].load(ids)

    def _dataset(self, catalog: Catalog, size: Size) -> TarDataset:
        images = image_extensions(catalog) if self.pixels else ()
        info = bool(catalog.holders("json")[0])
        captions = ((self.config.caption, 1.0),) if self.config.caption else ()
        spec = ReadSpec(images, info, size, self.config.caption_key, captions)
        return TarDataset(catalog, Order(catalog.sizes, seed=0, stage="encode"), spec)


def _work(
    encoders: Encoders, config: EncodeConfig, out: Path, units: Sequence[EncodeUnit]
) -> Iterator[tuple[EncodeUnit, Result]]:
    def batches():  # runs ahead of the encoder by the loader's prefetching
        for number, unit in enumerate(units):
            _, groups = unit.open()
            for bucket in np.unique(groups).tolist():
                ids = np.flatnonzero(groups == bucket)
                for start in range(0, len(ids), config.batch_size):
                    yield number, bucket, ids[start : start + config.batch_size]

    if encoders.text is not None:  # here, where what lies in `out` is known to be of the same encoder
        _write_null_text(encoders.text, out / "null-text.npz")
    pixels = encoders.codec is not None or encoders.vision is not None
    images = UnitImages(units, config, pixels)
    pinned = encoders.device.startswith("cuda")
    loaded = load(images, config.workers, batch_sampler=batches(), pin_memory=pinned)
    with ThreadPoolExecutor(1, "writer") as writer:
        before: tuple[EncodeUnit, Future[Result]] | None = None
        for unit in units:
            queue: Queue[Encoded | BaseException | None] = Queue(AHEAD)
            catalog, _ = unit.open()
            written = writer.submit(_write_unit, unit, catalog.problems, queue, encoders, config, out)
            try:
                for batch in _encoded(len(catalog), loaded, encoders, config):
                    _hand_over(batch, queue, written)
                _hand_over(None, queue, written)
            except BaseException as error:
                _hand_over(error, queue, written)
                raise
            if before is not None:
                yield before[0], before[1].result()
            before = unit, written
        if before is not None:
            yield before[0], before[1].result()


class Encoded(NamedTuple):
    """A batch as it is stored."""

    keys: list[str]  # of the samples that are good
    columns: dict[str, list[dict[str, Any]]]  # the members of each of them
    bad: list[Problem]
    psnr: float | None  # of the first image, if it was decoded again


def _encoded(size: int, stream: Iterator, encoders: Encoders, config: EncodeConfig) -> Iterator[Encoded]:
    """Encode the batches of one unit of so many samples."""
    psnr = None
    while size:
        records, failed = next(stream)
        size -= len(records)
        columns = _compute(records, failed, encoders, config)
        good = [row for row in range(len(records)) if row not in failed]
        if psnr is None and encoders.codec is not None and good:
            psnr = _round_trip(encoders.codec, records.pixels[good[0]], columns["latents"][good[0]]["npy"])
        keys = [records.keys[row].split(":", 1)[1] for row in good]
        members = {name: [rows[row] for row in good] for name, rows in columns.items()}
        yield Encoded(keys, members, list(failed.values()), psnr)


def _hand_over(item: Encoded | BaseException | None, queue: Queue, written: Future[Result]) -> None:
    """Give the writer a batch, the end, or the error that ends it; raises what went wrong with the writer."""
    while not written.done():
        try:
            return queue.put(item, timeout=1)
        except Full:
            pass
    if not isinstance(item, BaseException):
        written.result()


def _write_unit(
    unit: EncodeUnit,
    bad: Sequence[Problem],
    queue: Queue,
    encoders: Encoders,
    config: EncodeConfig,
    out: Path,
) -> Result:
    """Write all columns of one shard side by side; none appears before it is checked."""
    result, keys, psnr = Result(bad=list(bad)), [], None
    paths = {name: out / f"{name}-{unit.name}.tar" for name in encoders.columns}
    with ExitStack() as stack:
        add = {
            name: stack.enter_context(
                open_shard(path, partial(check_written, keys, path, several=bool(config.buckets)))
            )
            for name, path in paths.items()
        }
        while (batch := queue.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            keys += batch.keys
            for name, samples in batch.columns.items():
                for key, members in zip(batch.keys, samples):
                    add[name]({"__key__": key, **members})
            result.bad += batch.bad
            psnr = batch.psnr if psnr is None else psnr
    for name, path in paths.items():
        extra = {"encoder": encoders.describe(name, config)}
        if name == "latents":
            extra["psnr"] = psnr
        result.shards.append(publish_entry(path, **extra))
    result.samples = len(keys)
    return result


def _compute(
    records: Records, failed: dict[int, Problem], encoders: Encoders, config: EncodeConfig
) -> dict[str, list[dict[str, Any]]]:
    """Encode a batch: the members of every column. Samples whose result is not usable join `failed`."""
    columns: dict[str, list[dict]] = {}
    pixels = None  # (B, 3, R, R); uint8 on the way to the device
    if records.pixels is not None:
        pixels = records.pixels.to(encoders.device, non_blocking=True).float() / 127.5 - 1
    grid = encoders.grid
    if encoders.codec is not None:
        raw = encoders.codec.encode_pixels(pixels).float().cpu()  # (B, C, h, w)
        grid = grid or tuple(raw.shape[2:])
        _reject(records, failed, raw, "latent", LARGEST)
        columns["latents"] = [
            {"npy": x, "txt": prompt, **({"json": info} if info else {})}
            for x, prompt, info in zip(raw.half().numpy(), records.prompts, records.info)
        ]
    if encoders.text is not None:
        tokens, mask = encoders.text.encode(records.prompts)  # (B, L, D), (B, L)
        tokens, mask = tokens.float().cpu(), mask.cpu()
        _reject(records, failed, tokens, "text embedding", 65504)
        columns[next(name for name in encoders.columns if name.startswith("text"))] = [
            text_members(x, m, config) for x, m in zip(tokens, mask)
        ]
    if encoders.vision is not None:
        features = encoders.vision.features(pixels, grid).float().cpu()  # (B, h*w, F)
        _reject(records, failed, features, "vision features", 65504)
        columns["features"] = [{"features.npy": x} for x in features.half().numpy()]
    return columns


def text_members(tokens: Tensor, mask: Tensor, config: EncodeConfig) -> dict[str, np.ndarray]:
    """Make the members of one text embedding, (L, D) float32 and (L,) bool; see the module docstring."""
    if config.text_format == "ragged":
        tokens = tokens[mask]
    if config.text_dtype == "int8":
        values, scale = quantize(tokens)
        members = {"text": values.numpy(), "scale": scale.numpy()}
    else:
        members = {"text": tokens.half().numpy()}
    if config.text_format == "padded":
        members["mask"] = mask.numpy().astype(np.uint8)
    suffix = f"_{config.caption}" if config.caption else ""
    return {f"{name}{suffix}.npy": array for name, array in members.items()}


def quantize(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Round tokens (L, D) to 8 bits, -127 to 127 times a scale per token, (L,) float32."""
    scale = tokens.abs().amax(dim=1) / 127
    return (tokens / scale.clamp(min=1e-30)[:, None]).round().to(torch.int8), scale


def _reject(records: Records, failed: dict[int, Problem], values: Tensor, what: str, largest: float) -> None:
    good = (values.abs().flatten(1) < largest).all(dim=1)  # False for NaN too
    for row in torch.nonzero(~good).flatten().tolist():
        shard, key = records.keys[row].split(":", 1)
        failed.setdefault(row, Problem(shard, key, f"{what} is not finite or beyond {largest:g}"))


def _round_trip(codec: LatentCodec, pixels: Tensor, raw: np.ndarray) -> float:
    """Decode a stored latent again: PSNR in dB. A codec that does not fit its data shows here."""
    decoded = codec.decode(codec.normalize(torch.from_numpy(raw)[None])).cpu()[0]
    error = ((decoded - (pixels.float() / 127.5 - 1)) / 2).square().mean().item()
    return round(-10 * float(np.log10(max(error, 1e-10))), 2)


def _check_null_text(
    encoders: Encoders, config: EncodeConfig, units: Sequence[EncodeUnit], job: JobConfig
) -> None:
    """Refuse a second text encoder in a folder: there is one null prompt for all text in it."""
    column = next(name for name in encoders.columns if name.startswith("text"))
    made_here = {f"{column}-{unit.name}.tar" for unit in units}  # by an earlier run: `run_job` compares those
    ours = encoders.describe(column, config)
    for path, entry in read_manifests({job.out}).items():
        theirs = entry.get("encoder")
        replaced = path.name in made_here or (job.overwrite and path.name.startswith(f"{column}-"))
        if not isinstance(theirs, dict) or "length" not in theirs or replaced:
            continue
        if any(theirs.get(key) != ours[key] for key in ("weights", "length")):
            was, now = (f"{made.get('name')}, length {made.get('length')}" for made in (theirs, ours))
            raise ConfigError(
                f"{path.name} in {job.out} was encoded by another text encoder ({was}; now {now}), and a folder has one"
                " null prompt for all its text; give another --out"
            )


def _write_null_text(text: TextEncoder, path: Path) -> None:
    """Store the null prompt's embedding, for classifier-free guidance without the text encoder."""
    tokens, mask = text.encode([""])
    with atomic_file(path) as file:
        np.savez(file, tokens=tokens[0].half().cpu().numpy(), mask=mask[0].cpu().numpy())
