"""Samples by position: tars, an order and a specification of what to read -> Records.

Every process compares each sample with its CRC the first time it reads it, and believes the file from then
on. A sample that turns out bad (CRC, decoding, NaN, empty caption) is replaced by the next good one of its
source, the same one in every run, and reported with the batch.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nitro_e.config import ConfigError
from nitro_e.data.catalog import Catalog
from nitro_e.data.decode import BadSample, decode_array, decode_caption, decode_image, decode_info, not_finite
from nitro_e.data.order import Order
from nitro_e.data.problems import BadDataError, Problem
from nitro_e.data.remote import ShardCache, is_url
from nitro_e.data.spec import ArrayLayout, ReadSpec
from nitro_e.interfaces import TextEmbedding

OPEN_FILES = 256  # per process
ATTEMPTS = 64  # replacements tried for one position
CHANGED = "is not what was indexed (CRC differs; after making a shard anew: nitro-e data index --force)"


@dataclass
class Records:
    """One micro-batch on the CPU."""

    keys: list[str]  # "shard.tar:key"
    prompts: list[str]
    info: list[dict]  # the json member, {} without one
    pixels: Tensor | None = None  # (B, 3, R, R) uint8
    latents: Tensor | None = None  # (B, C, h, w) raw latents as stored, usually float16
    text: TextEmbedding | None = None  # stored (B, L, D) tokens, usually float16, and their (B, L) mask
    features: Tensor | None = None  # (B, h*w, F) stored vision features, usually float16
    extra: dict[str, Tensor] = field(default_factory=dict)  # other array members that were asked for, by name
    bad: list[Problem] = field(default_factory=list)  # samples that were replaced
    failure: str | None = None  # set by a worker instead of raising; never seen by callers

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> Records:
        tensors = {name: getattr(self, name) for name in ("pixels", "latents", "features")}
        pinned = {name: x if x is None else x.pin_memory() for name, x in tensors.items()}
        text = self.text if self.text is None else TextEmbedding(*(x.pin_memory() for x in self.text))
        return replace(
            self, text=text, extra={name: x.pin_memory() for name, x in self.extra.items()}, **pinned
        )

    def put(self, slot: int, other: Records) -> None:
        """Replace one sample by the only one of `other`."""
        for mine, theirs in ((self.keys, other.keys), (self.prompts, other.prompts), (self.info, other.info)):
            mine[slot] = theirs[0]
        tensors = [
            (self.pixels, other.pixels),
            (self.latents, other.latents),
            (self.features, other.features),
        ]
        extra = [(self.extra[name], other.extra[name]) for name in self.extra]
        for mine, theirs in (*tensors, *extra, *zip(self.text or (), other.text or ())):
            if mine is not None:
                mine[slot] = theirs[0]


class TarDataset(Dataset):
    """`dataset.__getitems__(positions) -> Records`. Files are opened when needed, so it can be pickled."""

    def __init__(self, catalog: Catalog, order: Order, spec: ReadSpec):
        self.catalog, self.order, self.spec = catalog, order, spec
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
                return records.put(slot, one)
            records.bad += failed.values()
        raise BadDataError(
            f"{ATTEMPTS} samples in a row cannot be used, the last is {records.bad[-1]};"
            " look for the cause with `nitro-e data verify`"
        )

    def load(self, ids: np.ndarray) -> tuple[Records, dict[int, Problem]]:
        """Samples by id, without replacement: what could be read, and {slot: problem} for the rest."""
        if self._checked is None:
            self._checked = np.zeros(len(self.catalog), bool)
        shards, failed = self.catalog.shard_of(ids).tolist(), {}
        prompts, info = self._texts(ids, shards, failed)
        latents, features = (
            self._arrays(member, layout, ids, shards, failed) if layout else None
            for member, layout in (("npy", self.spec.latents), ("features.npy", self.spec.features))
        )
        extra = {
            member: self._arrays(member, layout, ids, shards, failed) for member, layout in self.spec.extra
        }
        text = self._text(ids, shards, failed) if self.spec.text else None
        pixels = self._pixels(ids, shards, failed) if self.spec.images else None
        self._checked[np.delete(ids, list(failed))] = True
        names = [self.catalog.names[shard] for shard in shards]
        keys = [key.decode(errors="replace") for key in self.catalog.columns[0].rows["__key__"][ids].tolist()]
        problems = {slot: Problem(names[slot], keys[slot], reason) for slot, reason in sorted(failed.items())}
        keys = [f"{name}:{key}" for name, key in zip(names, keys)]
        return Records(keys, prompts, info, pixels, latents, text, features, extra), problems

    def _contents(self, extension: str, ids, shards: list[int], failed: dict[int, str]) -> list[bytes | None]:
        """The member's bytes per sample; None where there is none or its CRC is wrong."""
        column = self.catalog.find(extension)
        if column is None:
            return [None] * len(ids)
        contents, checked = [], self._checked[ids].tolist()
        for slot, (shard, (offset, size, crc)) in enumerate(
            zip(shards, column.rows[extension][ids].tolist())
        ):
            content = bytes(self._files[column.paths[shard]][offset : offset + size]) if offset else None
            if content is not None and (
                len(content) != size or not checked[slot] and zlib.crc32(content) != crc
            ):
                failed.setdefault(slot, f"{extension} {CHANGED}")
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

    def _arrays(
        self, member: str, layout: ArrayLayout, ids, shards: list[int], failed: dict[int, str]
    ) -> Tensor:
        """Read `.npy` members straight into one array and view the part behind their headers: (B, *shape)."""
        column, nbytes, checked = self.catalog.find(member), layout.nbytes, self._checked[ids].tolist()
        buffer = np.empty((len(ids), nbytes), np.uint8)
        flat = memoryview(buffer).cast("B")
        for slot, (shard, (offset, size, crc)) in enumerate(zip(shards, column.rows[member][ids].tolist())):
            content = self._files[column.paths[shard]][offset : offset + size]
            if size != nbytes:
                failed.setdefault(slot, f"{member} of {size} bytes, expected {nbytes} for {layout.shape}")
                buffer[slot] = 0
            elif len(content) != size or not checked[slot] and zlib.crc32(content) != crc:
                failed.setdefault(slot, f"{member} {CHANGED}")
                buffer[slot] = 0
            else:
                flat[slot * nbytes : (slot + 1) * nbytes] = content
        start = len(layout.header)
        headers = (buffer[:, :start] == np.frombuffer(layout.header, np.uint8)).all(axis=1)
        for slot in np.flatnonzero(~headers).tolist():
            failed.setdefault(slot, f"{member} is not a {layout.dtype} array of shape {layout.shape}")
        values = buffer[:, start:].view(layout.dtype)
        fresh = np.flatnonzero(~self._checked[ids])
        if values.dtype.kind == "f":
            for slot in fresh[not_finite(values[fresh] if len(fresh) < len(ids) else values)].tolist():
                failed.setdefault(slot, f"{member} has NaN or Inf")
        return torch.from_numpy(values).unflatten(1, layout.shape)

    def _text(self, ids, shards: list[int], failed: dict[int, str]) -> TextEmbedding:
        """Stored prompt tokens: padded ones with their mask, ragged ones padded with zeros here."""
        layout = self.spec.text
        if self.spec.mask is not None:
            tokens = self._arrays("text.npy", layout, ids, shards, failed)
            return TextEmbedding(tokens, self._arrays("mask.npy", self.spec.mask, ids, shards, failed).bool())
        rows = []
        for slot, content in enumerate(self._contents("text.npy", ids, shards, failed)):
            try:
                rows.append(
                    ragged_rows(content, self.spec) if content is not None else np.zeros((0, layout.shape[1]))
                )
            except BadSample as error:
                failed.setdefault(slot, str(error))
                rows.append(np.zeros((0, layout.shape[1])))
        return pad_rows(rows, self.spec)


def ragged_rows(content: bytes, spec: ReadSpec) -> np.ndarray:
    """One ragged text embedding: (up to L, D)."""
    rows, layout = decode_array(content), spec.text
    if (
        rows.ndim != 2
        or rows.shape[1] != layout.shape[1]
        or len(rows) > spec.text_length
        or rows.dtype.str != layout.dtype
    ):
        raise BadSample(
            f"text.npy is {rows.dtype} {rows.shape}, expected up to {spec.text_length} x {layout.shape[1]}"
        )
    return rows


def pad_rows(samples: list[np.ndarray], spec: ReadSpec) -> TextEmbedding:
    """Ragged text embeddings with zeros after the real tokens."""
    tokens = np.zeros((len(samples), spec.text_length, spec.text.shape[1]), spec.text.dtype)
    mask = np.zeros(tokens.shape[:2], bool)
    for slot, rows in enumerate(samples):
        tokens[slot, : len(rows)], mask[slot, : len(rows)] = rows, True
    return TextEmbedding(torch.from_numpy(tokens), torch.from_numpy(mask))  # (B, L, D), (B, L)


class MappedFiles(OrderedDict):
    """path or URL -> its content, mapped into memory; beyond OPEN_FILES the one opened first is closed."""

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
