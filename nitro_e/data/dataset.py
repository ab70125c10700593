"""Read samples by their positions in the order, and make batches (Records) of them.

Every process compares each sample with its CRC the first time it reads it, and believes the file from then
on. A sample that turns out bad (CRC, decoding, NaN, empty caption) is replaced by the next good one of its
source and columns, the same one in every run, and reported with the batch.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nitro_e.config import ConfigError
from nitro_e.data.catalog import Catalog
from nitro_e.data.decode import (
    BadSample,
    decode_array,
    decode_caption,
    decode_image,
    decode_info,
    draw_caption,
    not_finite,
)
from nitro_e.data.order import AnyOrder, Order
from nitro_e.data.problems import BadDataError, Problem
from nitro_e.data.remote import ShardCache, is_url
from nitro_e.data.spec import ArrayLayout, ReadSpec
from nitro_e.interfaces import TextEmbedding

Buffer = bytes | memoryview
OPEN_FILES = 256  # per process
ATTEMPTS = 64  # replacements tried for one position
FOLLOWING = 256  # ids that are looked up at a time to find them
CHANGED = "is not what was indexed (CRC differs; after making a shard anew: nitro-e data index --force)"


@dataclass
class Records:
    """A micro-batch on the CPU."""

    keys: list[str]  # "shard.tar:key"
    prompts: list[str]
    info: list[dict]  # the json member, {} without one
    pixels: Tensor | None = None  # (B, 3, R, R) uint8
    latents: Tensor | None = None  # (B, C, h, w) raw latents as stored, usually float16
    text: TextEmbedding | None = None  # stored (B, L, D) tokens, usually float16, and their (B, L) mask
    features: Tensor | None = None  # (B, h*w, F) stored vision features, usually float16
    extra: dict[str, Tensor] = field(default_factory=dict)  # other array members that were asked for, by name
    # (B,) bool by name ("latents", "text", "features"): samples of sources without this column, whose rows are zeros
    # and are to be computed, from their pixels or prompts; of other samples, pixels may be zeros then
    absent: dict[str, Tensor] = field(default_factory=dict)
    bad: list[Problem] = field(default_factory=list)  # samples that were replaced
    failure: str | None = None  # set by a worker instead of raising; never seen by callers

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> Records:
        tensors = {name: getattr(self, name) for name in ("pixels", "latents", "features")}
        pinned = {name: x if x is None else x.pin_memory() for name, x in tensors.items()}
        text = self.text if self.text is None else TextEmbedding(*(x.pin_memory() for x in self.text))
        extra = {name: x.pin_memory() for name, x in self.extra.items()}
        return replace(self, text=text, extra=extra, **pinned)

    def put(self, row: int, other: Records) -> None:
        """Replace the sample in `row` by the only one of `other`."""
        for mine, theirs in zip(self._columns(), other._columns()):
            if mine is not None and theirs is not None:  # both have the same columns
                mine[row] = theirs[0]

    def _columns(self) -> tuple[list | Tensor | None, ...]:
        arrays = (self.pixels, self.latents, self.features, *self.extra.values(), *(self.text or ()))
        return self.keys, self.prompts, self.info, *arrays


class TarDataset(Dataset):
    """Makes Records of positions: `dataset.__getitems__(range)`. Opens files when needed, so it can be pickled."""

    def __init__(self, catalog: Catalog, order: AnyOrder, spec: ReadSpec, specs: Sequence[ReadSpec] = ()):
        """specs: what is read of each group of an order that has groups."""
        self.catalog, self.order, self.spec, self.specs = catalog, order, spec, specs
        self._files = MappedFiles(catalog.cache)
        self._checked: np.ndarray | None = None  # (N,) bool: compared with its CRC in this process

    def __getstate__(self):
        return {**self.__dict__, "_checked": None}

    def __getitems__(self, positions: range) -> Records:
        try:
            return self._read(np.asarray(positions))
        except (ConfigError, OSError) as error:
            return Records([], [], [], failure=str(error))

    def _read(self, positions: np.ndarray) -> Records:
        draws = self.order.draws(positions) if self.spec.captions else None
        if not isinstance(self.order, Order):  # a micro-batch is part of one batch, of one group
            self.spec = self.specs[self.order.group(int(positions[0]))]
        records, failed = self.load(self.order.ids(positions), draws)
        for row, problem in failed.items():
            records.bad.append(problem)
            self._replace(records, row, int(positions[row]))
        return records

    def _replace(self, records: Records, row: int, position: int) -> None:
        """Fill a row of the batch with the next good sample of the same source and columns."""
        draws = self.order.draws(np.array([position])) if self.spec.captions else None
        absent = {name: bool(rows[row]) for name, rows in records.absent.items()}
        for sample in islice(self._following(position, absent), ATTEMPTS):
            one, failed = self.load(np.array([sample]), draws)
            if not failed:
                return records.put(row, one)
            records.bad += failed.values()
        raise BadDataError(
            f"{ATTEMPTS} samples in a row cannot be used, the last is {records.bad[-1]};"
            " look for the cause with `nitro-e data verify`"
        )

    def _following(self, position: int, absent: dict[str, bool]) -> Iterator[int]:
        """Yield the ids that come after a position in its source (which may be a union of several) and lack the same."""
        (source,), (counter,) = self.order.locate(np.array([position]))
        for start in count(int(counter) + 1, FOLLOWING):
            ids = self.order.sample(int(source), np.arange(start, start + FOLLOWING))
            alike = np.ones(len(ids), bool)
            for name, rows in self._absent(ids, self.catalog.shard_of(ids)).items():
                alike &= rows == absent[name]
            yield from ids[alike].tolist()

    def _absent(self, ids: np.ndarray, shards: np.ndarray) -> dict[str, np.ndarray]:
        """Find the samples that lack what others have: (B,) bool for each name in `Records.absent`."""
        return {
            name: self.catalog.members(member, ids, shards)[1]["offset"] == 0
            for name, member in self.spec.partial
        }

    def load(self, ids: np.ndarray, draws: np.ndarray | None = None) -> tuple[Records, dict[int, Problem]]:
        """Read samples by id, without replacement; {row: problem} tells which rows could not be read.

        draws: (B,) in [0, 1), for the choice among several captions.
        """
        if self._checked is None:
            self._checked = np.zeros(len(self.catalog), bool)
        shards, failed = self.catalog.shard_of(ids), {}
        absent = self._absent(ids, shards)
        prompts, info, chosen = self._texts(ids, shards, failed, draws)
        latents, features = (
            self._arrays(member, layout, ids, shards, failed, absent.get(name)) if layout else None
            for name, member, layout in (
                ("latents", "npy", self.spec.latents),
                ("features", "features.npy", self.spec.features),
            )
        )
        extra = {
            member: self._arrays(member, layout, ids, shards, failed) for member, layout in self.spec.extra
        }
        text = self._text(ids, shards, failed, absent.get("text"), chosen) if self.spec.text else None
        pixels = self._pixels(ids, shards, failed, absent) if self.spec.images else None
        self._checked[np.delete(ids, list(failed))] = True
        names = [self.catalog.names[shard] for shard in shards.tolist()]
        keys = self.catalog.keys(ids)
        problems = {row: Problem(names[row], keys[row], reason) for row, reason in sorted(failed.items())}
        keys = [f"{name}:{key}" for name, key in zip(names, keys)]
        flags = {name: torch.from_numpy(rows) for name, rows in absent.items()}
        return Records(keys, prompts, info, pixels, latents, text, features, extra, flags), problems

    def _contents(
        self, member: str, ids: np.ndarray, shards: np.ndarray, failed: dict[int, str]
    ) -> Iterator[memoryview | None]:
        """Yield one member of each sample; None where there is none or its CRC is wrong."""
        files, checked = self._files, self._checked[ids].tolist()
        paths, entries = self.catalog.members(member, ids, shards)
        for row, (path, (offset, size, crc)) in enumerate(zip(paths, entries.tolist())):
            content = files[path][offset : offset + size] if offset else None
            # crc 0: of a remote shard only the headers were read
            if content is not None and (
                len(content) != size or crc and not checked[row] and zlib.crc32(content) != crc
            ):
                failed.setdefault(row, f"{member} {CHANGED}")
                content = None
            yield content

    def _texts(
        self, ids: np.ndarray, shards: np.ndarray, failed: dict[int, str], draws: np.ndarray | None
    ) -> tuple[list[str], list[dict], list[str]]:
        """Read captions and json; the third list has the name of the caption that was drawn for each sample."""
        prompts, info, chosen = [""] * len(ids), [{} for _ in ids], [""] * len(ids)
        texts = self._contents("txt", ids, shards, failed)
        jsons = self._contents("json", ids, shards, failed) if self.spec.info else [None] * len(ids)
        for row, (text, content) in enumerate(zip(texts, jsons)):
            try:
                if content is not None:
                    info[row] = decode_info(content)
                if self.spec.captions:
                    draw = 0.0 if draws is None else draws[row]
                    stored = self.spec.text is not None
                    chosen[row], prompts[row] = draw_caption(
                        text, info[row], self.spec.captions, draw, first=stored
                    )
                else:
                    prompts[row] = decode_caption(text, info[row], self.spec.caption_key)
            except BadSample as error:
                failed.setdefault(row, str(error))
        return prompts, info, chosen

    def _pixels(
        self, ids: np.ndarray, shards: np.ndarray, failed: dict[int, str], absent: dict[str, np.ndarray]
    ) -> Tensor | None:
        """Decode the images of all samples, or of those whose latents or features are absent; None for no one's."""
        wanted = np.ones(len(ids), bool)
        if self.spec.images_for:
            wanted = np.any([absent[name] for name in self.spec.images_for], axis=0)
            if not wanted.any():
                return None
        pixels = np.zeros((len(ids), 3, *self.spec.size), np.uint8)
        for extension in self.spec.images:
            for row, content in enumerate(self._contents(extension, ids, shards, failed)):
                if content is not None and wanted[row] and row not in failed:
                    try:
                        pixels[row] = decode_image(content, self.spec.size)
                    except BadSample as error:
                        failed[row] = str(error)
        return torch.from_numpy(pixels)

    def _arrays(
        self,
        member: str,
        layout: ArrayLayout,
        ids: np.ndarray,
        shards: np.ndarray,
        failed: dict[int, str],
        absent: np.ndarray | None = None,
    ) -> Tensor:
        """Read `.npy` members straight into one array and view the part behind their headers: (B, *shape).

        absent: samples that need not have the member, and get zeros.
        """
        nbytes = layout.nbytes
        buffer = np.empty((len(ids), nbytes), np.uint8)
        flat = memoryview(buffer).cast("B")
        for row, content in enumerate(self._contents(member, ids, shards, failed)):
            if content is not None and len(content) == nbytes:
                flat[row * nbytes : (row + 1) * nbytes] = content
                continue
            buffer[row] = 0
            if content is not None:
                reason = f"{member} of {len(content)} bytes, expected {nbytes} for {layout.shape}"
                failed.setdefault(row, reason)
        start = len(layout.header)
        headers = (buffer[:, :start] == np.frombuffer(layout.header, np.uint8)).all(axis=1)
        if absent is not None:
            headers |= absent
        for row in np.flatnonzero(~headers).tolist():
            failed.setdefault(row, f"{member} is not a {layout.dtype} array of shape {layout.shape}")
        values = buffer[:, start:].view(layout.dtype)
        fresh = np.flatnonzero(~self._checked[ids])
        if values.dtype.kind == "f":
            for row in fresh[not_finite(values[fresh] if len(fresh) < len(ids) else values)].tolist():
                failed.setdefault(row, f"{member} has NaN or Inf")
        return torch.from_numpy(values).unflatten(1, layout.shape)

    def _text(
        self,
        ids: np.ndarray,
        shards: np.ndarray,
        failed: dict[int, str],
        absent: np.ndarray | None,
        chosen: list[str],
    ) -> TextEmbedding:
        """Read stored text, of each sample that of the caption that was drawn for it."""
        names = sorted(set(chosen))
        if names == [""]:
            return self._one_text("", ids, shards, failed, absent)
        parts = []
        for name in names:
            rows = np.flatnonzero([name == other for other in chosen])
            wrong: dict[int, str] = {}
            less = None if absent is None else absent[rows]
            suffix = "" if name in ("", "txt") else f"_{name}"
            parts.append((rows, self._one_text(suffix, ids[rows], shards[rows], wrong, less)))
            for row, reason in wrong.items():
                failed.setdefault(int(rows[row]), reason)
        (_, first), *_ = parts
        whole = TextEmbedding(*(part.new_zeros(len(ids), *part.shape[1:]) for part in first))
        for rows, text in parts:
            for mine, theirs in zip(whole, text):
                mine[rows] = theirs
        return whole

    def _one_text(
        self,
        suffix: str,
        ids: np.ndarray,
        shards: np.ndarray,
        failed: dict[int, str],
        absent: np.ndarray | None,
    ) -> TextEmbedding:
        """Read padded tokens with their mask, or ragged ones, which get zeros behind them here.

        Those of 8 bits are multiplied with their scales, to half precision.
        """
        layout, member = self.spec.text, f"text{suffix}.npy"
        if self.spec.mask is not None:
            tokens = self._arrays(member, layout, ids, shards, failed, absent)
            mask = self._arrays(f"mask{suffix}.npy", self.spec.mask, ids, shards, failed, absent)
            if self.spec.scale is not None:
                scale = self._arrays(f"scale{suffix}.npy", self.spec.scale, ids, shards, failed, absent)
                tokens = dequantize(tokens, scale)
            return TextEmbedding(tokens, mask.bool())
        samples = [np.zeros((0, layout.shape[1]))] * len(ids)
        scales: Iterable[memoryview | None] = [None] * len(ids)
        if self.spec.scale is not None:
            scales = self._contents(f"scale{suffix}.npy", ids, shards, failed)
        for row, (content, scale) in enumerate(zip(self._contents(member, ids, shards, failed), scales)):
            try:
                if content is not None:
                    samples[row] = ragged_rows(content, self.spec, scale)
            except BadSample as error:
                failed.setdefault(row, str(error))
        return pad_rows(samples, self.spec)


def dequantize(tokens: Tensor, scale: Tensor) -> Tensor:
    """Turn tokens of 8 bits (..., L, D) and their scales (..., L) into half precision."""
    return (tokens.float() * scale[..., None]).half()


def ragged_rows(content: Buffer, spec: ReadSpec, scale: Buffer | None = None) -> np.ndarray:
    """Decode one ragged text embedding: (up to L, D); scale: the member that goes with tokens of 8 bits."""
    rows, width = decode_array(content), spec.text.shape[1]
    fits = rows.ndim == 2 and rows.shape[1] == width and len(rows) <= spec.text_length
    if not fits or rows.dtype.str != spec.text.dtype:
        raise BadSample(f"text.npy is {rows.dtype} {rows.shape}, expected up to {spec.text_length} x {width}")
    if spec.scale is None:
        return rows
    scales = np.zeros(0) if scale is None else decode_array(scale)
    if scales.shape != rows.shape[:1]:
        raise BadSample(f"scale.npy has the shape {scales.shape}, expected {rows.shape[:1]}")
    return (rows * scales[:, None]).astype(np.float16)


def pad_rows(samples: list[np.ndarray], spec: ReadSpec) -> TextEmbedding:
    """Put zeros after the real tokens of ragged text embeddings."""
    dtype = spec.text.dtype if spec.scale is None else "<f2"
    tokens = np.zeros((len(samples), spec.text_length, spec.text.shape[1]), dtype)
    mask = np.zeros(tokens.shape[:2], bool)
    for row, real in enumerate(samples):
        tokens[row, : len(real)], mask[row, : len(real)] = real, True
    return TextEmbedding(torch.from_numpy(tokens), torch.from_numpy(mask))  # (B, L, D), (B, L)


class MappedFiles(OrderedDict):
    """Maps files into memory, {path or URL: content}; beyond OPEN_FILES the one opened first is closed."""

    def __init__(self, cache: ShardCache):
        super().__init__()
        self.cache = cache

    def __reduce__(self):
        return MappedFiles, (self.cache,)  # mappings mean nothing in another process

    def __missing__(self, path: str) -> memoryview:
        if len(self) >= OPEN_FILES:
            self.popitem(last=False)
        with open(self.cache.fetch(path) if is_url(path) else path, "rb") as file:
            empty = os.fstat(file.fileno()).st_size == 0
            content = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self[path] = memoryview(content)
        return self[path]
