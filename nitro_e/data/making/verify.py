"""Check that shards are what they were when they were made: structure, content and bookkeeping.

Per shard: the tar's structure, every member against the CRC in its stored index, bytes and sha256 against the
manifest, captions, json, arrays (finite, one shape), samples that lack what others of the shard have, and with
`deep` every image. Over all: columns that do not match or hold no caption, shards that a manifest names and that
are gone. Left out: repair; make or copy the shard again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from nitro_e.config import ConfigError
from nitro_e.data.catalog import IMAGES, group_columns
from nitro_e.data.decode import BadSample, decode_array, decode_caption, decode_image, decode_info
from nitro_e.data.index import ShardIndex, index_path, read_members, read_stored, scan_tar
from nitro_e.data.making.jobs import each
from nitro_e.data.making.writer import RAGGED
from nitro_e.data.manifests import read_manifests
from nitro_e.data.problems import Problem
from nitro_e.data.remote import local_path
from nitro_e.files import sha256_of
from nitro_e.record.progress import bar


@dataclass
class Checked:
    """The counts and problems of one shard."""

    samples: int = 0
    nbytes: int = 0
    shapes: dict[str, list] = field(default_factory=dict)  # array member -> [[*shape, dtype], first key]
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, "S1"))
    several: bool = False  # arrays of aspect buckets: of one number of dimensions, but not of one shape
    parts: set[str] = field(default_factory=set)  # "image", "caption", array members
    problems: list[Problem] = field(default_factory=list)


@dataclass
class Report:
    """The counts and problems of all shards."""

    shards: int = 0
    samples: int = 0
    nbytes: int = 0
    repeated: int = 0  # keys that occur in several shards of one column; no fault by itself
    problems: list[Problem] = field(default_factory=list)


def verify(
    shards: Sequence[str], deep: bool = False, processes: int = 1, caption_key: str = "caption"
) -> Report:
    """Check shards (paths from `expand_shards`); every fault is one Problem naming shard and key."""
    report = Report(shards=len(shards))
    manifests = read_manifests({Path(path).parent for path in shards})
    check = partial(check_shard, entries=manifests, deep=deep, caption_key=caption_key)
    found: dict[str, Checked] = {}
    with bar(total=len(shards), desc="verify", unit="shard") as progress:
        for path, checked in each(check, processes)(shards):
            found[path] = checked
            report.samples += checked.samples
            report.nbytes += checked.nbytes
            progress.update()
            progress.set_postfix(problems=sum(len(c.problems) for c in found.values()))
    for path in shards:
        report.problems += found[path].problems
    report.problems += _across_shards(shards, found)
    listed = {Path(path).resolve() for path in shards}
    folders = {path.parent for path in listed}
    for path, entry in manifests.items():
        if path.parent in folders and path not in listed and not path.is_file():
            report.problems.append(Problem(path.name, "*", f"is in {entry['manifest']} but not on disk"))
    report.repeated = _repeated(shards, found)
    return report


def check_shard(path: str, entries: dict[Path, dict], deep: bool, caption_key: str) -> Checked:
    """Check one tar against itself, its index and its manifest entry."""
    path, checked = local_path(path), Checked()
    problem = partial(Problem, path.name)
    try:
        index = scan_tar(path)
    except (ConfigError, OSError) as error:
        checked.problems.append(problem("*", str(error)))
        return checked
    checked.samples, checked.nbytes, checked.keys = len(index.rows), index.nbytes, index.rows["__key__"]
    checked.problems += index.problems
    stored = index_path(path)
    if stored.is_file():
        try:
            checked.problems += _compare(path, index, read_stored(path, stored))
        except ConfigError as error:  # it is of a shard of another length, or damaged itself
            checked.problems.append(problem("*", str(error)))
    entry = entries.get(path.resolve())
    if entry is None and any(other.parent == path.resolve().parent for other in entries):
        checked.problems.append(problem("*", "is in no manifest of its folder: left over, or not finished"))
    if entry is not None:
        actual = (("bytes", index.nbytes), ("samples", len(index.rows)), ("sha256", sha256_of(path)))
        for name, value in actual:
            if entry[name] != value:
                reason = f"{name} is {value}, {entry['manifest']} says {entry[name]}"
                checked.problems.append(problem("*", reason))
        encoder = entry.get("encoder")
        checked.several = isinstance(encoder, dict) and bool(encoder.get("buckets"))
    checked.problems += _missing(path, index, checked)
    _check_members(path, index, checked, deep, caption_key)
    return checked


def _missing(path: Path, index: ShardIndex, checked: Checked) -> list[Problem]:
    """List the samples without an image, a caption or an array that others of this shard have."""
    parts: dict[str, np.ndarray] = {}  # (samples,) bool
    for name in index.extensions:
        part = "image" if name in IMAGES else "caption" if name in ("txt", "json") else name
        if part in ("image", "caption") or name.endswith("npy"):
            there = index.rows[name]["offset"] > 0
            parts[part] = parts.get(part, False) | there
    checked.parts = {part for part, there in parts.items() if there.any()}
    return [
        Problem(path.name, index.rows["__key__"][row].decode(errors="replace"), f"has no {part}")
        for part in sorted(checked.parts)
        for row in np.flatnonzero(~parts[part])
    ]


def _compare(path: Path, index: ShardIndex, stored: ShardIndex) -> list[Problem]:
    """List the members whose content is no longer what was indexed."""
    keys, names = index.rows["__key__"], index.rows.dtype.names
    if names != stored.rows.dtype.names or keys.tolist() != stored.rows["__key__"].tolist():
        reason = "holds other keys or members than when it was indexed: it was replaced"
        return [Problem(path.name, "*", reason)]
    return [
        Problem(path.name, keys[row].decode(errors="replace"), f"{name} has changed (CRC differs)")
        for name in index.extensions
        for row in np.flatnonzero(index.rows[name]["crc"] != stored.rows[name]["crc"])
    ]


def _check_members(path: Path, index: ShardIndex, checked: Checked, deep: bool, caption_key: str) -> None:
    """Decode what is in the shard: captions, json and arrays always, images with `deep`."""
    extensions = [name for name in index.extensions if deep or name not in IMAGES]
    for key, members in read_members(path, index, extensions):
        for name, content in members.items():
            try:
                _check_member(name, content, members, checked, key, caption_key)
            except BadSample as error:
                checked.problems.append(Problem(path.name, key, f"{name}: {error}"))


def _check_member(
    name: str, content: bytes, members: dict[str, bytes], checked: Checked, key: str, caption_key: str
) -> None:
    if name == "txt":
        decode_caption(content, {}, caption_key)
    elif name == "json":
        info = decode_info(content)
        if "txt" not in members and any(extension in members for extension in ("npy", *IMAGES)):
            decode_caption(None, info, caption_key)
    elif name in IMAGES:
        decode_image(content, 8)
    elif name.endswith("npy"):
        array = decode_array(content)
        sides = [array.ndim] if checked.several else array.shape[name.startswith(RAGGED) :]
        shape = [*sides, array.dtype.str]
        first = checked.shapes.setdefault(name, [shape, key])
        if first[0] != shape:
            raise BadSample(f"{shape}, but sample {first[1]} has {first[0]}")


def _across_shards(shards: Sequence[str], found: dict[str, Checked]) -> list[Problem]:
    """List columns and keys without partners, and arrays of another shape than in the first shard."""
    problems, groups = [], group_columns(shards)
    names = {name for columns in groups.values() for name in columns}
    for columns in groups.values():
        first = next(iter(columns.values()))
        for name in sorted(names - set(columns)):
            problems.append(
                Problem(Path(first).name, "*", f"has no '{name or 'plain'}' column, other shards do")
            )
        parts = set().union(*(found[path].parts for path in columns.values()))
        if parts and "caption" not in parts and {"image", "npy"} & parts:
            reason = "no column of this shard holds captions (txt or json)"
            problems.append(Problem(Path(first).name, "*", reason))
        base = found[first].keys
        for path in columns.values():
            for key in np.setxor1d(base, found[path].keys).tolist():
                has, lacks = (first, path) if key in base else (path, first)
                reason = f"missing; {Path(has).name} has it"
                problems.append(Problem(Path(lacks).name, key.decode(errors="replace"), reason))
    shapes: dict[str, tuple] = {}
    for path in shards:
        for name, (shape, _) in found[path].shapes.items():
            expected, where = shapes.setdefault(name, (shape, path))
            if shape != expected:
                reason = f"{name} is {shape}, in {Path(where).name} it is {expected}"
                problems.append(Problem(Path(path).name, "*", reason))
    return problems


def _repeated(shards: Sequence[str], found: dict[str, Checked]) -> int:
    """Count the keys that occur in more than one shard of the same column."""
    columns: dict[str, list[np.ndarray]] = {}
    for group in group_columns(shards).values():
        for name, path in group.items():
            columns.setdefault(name, []).append(found[path].keys)
    all_keys = [np.concatenate(keys) for keys in columns.values()]
    return max((len(keys) - len(np.unique(keys)) for keys in all_keys), default=0)
