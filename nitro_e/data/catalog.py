"""Find the shards and what their samples hold, before training starts.

Shards whose names differ only in a leading column word (`images-`, `latents-`, `text-`, `features-`) are
columns of one shard and are joined by key, so that training on latents never opens the images. When the list
holds equal names from several folders, columns must lie in one folder. Every shard of a source has the same columns;
another source of a mixture may have others.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from nitro_e.config import ConfigError, read_text
from nitro_e.data.index import MEMBER, DamagedTar, ShardIndex, index_path, shard_index
from nitro_e.data.manifests import digest
from nitro_e.data.problems import Problem
from nitro_e.data.remote import ShardCache, cache_folder, is_url, list_urls
from nitro_e.files import atomic_path
from nitro_e.record.progress import bar

log = logging.getLogger("nitro_e.data")
IMAGES = ("png", "jpg", "jpeg", "webp")
COLUMN = re.compile(r"(images|latents|text(?:_\w+)?|features)-(.+)")  # text_NAME: of another caption
MERGE_FROM = 100  # shards; below, opening the indices one by one is fast enough
KEEP_MERGED = 8
PRIORITY = ("text", "features", "latents", "images", "")  # where a repeated member is taken from


def priority(name: str) -> int:
    """Return the place of a column in PRIORITY."""
    return PRIORITY.index(name.partition("_")[0])


class MissingShards(ConfigError):
    """Shards that are named are not there (yet)."""


@dataclass(eq=False)
class Column:
    """A tar for each shard of the catalog, and a row for each sample."""

    name: str  # "latents", ...; "" for shards that are no column
    paths: list[str]  # "" for the shards of a source without this column
    rows: np.ndarray  # (R,) structured as in index.py; without members in such shards
    file: Path | None = None  # a .npy that holds the rows; all processes of a machine then share one copy

    def __getstate__(self):
        return self.__dict__ if self.file is None else {**self.__dict__, "rows": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self.file is not None:
            self.rows = map_rows(self.file)


@dataclass
class Catalog:
    """All samples of the data set; sample i has its members in row `rows_of(i)` of the columns.

    The rows are those of the shards, R of them, and may be mapped from a file: a sample that is left out stays in
    them, and only its place is remembered.
    """

    names: list[str]  # (S,) for reports
    sizes: list[np.ndarray]  # per source: samples in each shard
    columns: list[Column]
    digest: str  # of the content of every shard, in order
    problems: list[Problem] = field(default_factory=list)  # samples that were left out
    cache: ShardCache = field(default_factory=ShardCache)  # of the shards behind URLs
    left_out: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # rows, rising
    starts: np.ndarray = field(init=False)  # (S + 1,) first sample of each shard
    _shard_rows: np.ndarray = field(init=False)  # (S,) rows of each shard
    _holders: dict[str, tuple[list[Column], np.ndarray]] = field(init=False, default_factory=dict)

    def __post_init__(self):
        self._shard_rows = np.concatenate(self.sizes)
        self._count()

    def _count(self) -> None:
        self.starts = np.concatenate([[0], np.cumsum(np.concatenate(self.sizes))])
        # samples before each row that is left out
        self._before = self.left_out - np.arange(len(self.left_out))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows_of(self, samples: np.ndarray) -> np.ndarray:
        """Find the rows of these samples."""
        if not len(self.left_out):
            return samples
        return samples + np.searchsorted(self._before, samples, side="right")

    def holders(self, extension: str) -> tuple[list[Column], np.ndarray]:
        """Find the columns that `extension` is read from, and (S,) which of them each shard takes."""
        if extension not in self._holders:
            self._holders[extension] = self._find_holders(extension)
        return self._holders[extension]

    def _find_holders(self, extension: str) -> tuple[list[Column], np.ndarray]:
        columns = [column for column in self.columns if extension in column.rows.dtype.names]
        columns.sort(key=lambda column: priority(column.name))
        chosen = np.zeros(len(self.names), np.int64)
        if len(columns) < 2 or all("" not in column.paths for column in self.columns):
            return columns[:1], chosen
        # sources with columns of their own: the first that has the member in the shard
        starts = np.cumsum(self._shard_rows) - self._shard_rows
        for number, column in reversed(list(enumerate(columns))):
            there = np.append(column.rows[extension]["offset"] > 0, False)
            chosen[np.logical_or.reduceat(there, starts) & (self._shard_rows > 0)] = number
        return columns, chosen

    def has(self, *extensions: str) -> np.ndarray:
        """Find the samples with at least one of these members: (N,) bool."""
        found = np.zeros(int(self._shard_rows.sum()), bool)
        for extension in extensions:
            columns, chosen = self.holders(extension)
            for number, column in enumerate(columns):
                there = column.rows[extension]["offset"] > 0
                found |= there & np.repeat(chosen == number, self._shard_rows) if len(columns) > 1 else there
        return np.delete(found, self.left_out)

    def members(
        self, extension: str, samples: np.ndarray, shards: np.ndarray
    ) -> tuple[list[str], np.ndarray]:
        """Look up where a member of these samples lies: the path of each, and (B,) offset, size and crc.

        Without the member, offset is 0 and the path means nothing.
        """
        columns, chosen = self.holders(extension)
        rows, wanted = self.rows_of(samples), chosen[shards]
        if not columns:
            return [""] * len(samples), np.zeros(len(samples), MEMBER)
        entries = columns[0].rows[extension][rows]
        for number, column in enumerate(columns[1:], 1):
            there = wanted == number
            entries[there] = column.rows[extension][rows[there]]
        return [columns[k].paths[shard] for k, shard in zip(wanted.tolist(), shards.tolist())], entries

    def shard_of(self, sample: int | np.ndarray) -> int | np.ndarray:
        return np.searchsorted(self.starts, sample, side="right") - 1

    def keys(self, samples: np.ndarray) -> list[str]:
        found = self.columns[0].rows["__key__"][self.rows_of(samples)].tolist()
        return [key.decode(errors="replace") for key in found]

    def key(self, sample: int) -> str:
        return self.keys(np.array([sample]))[0]

    def describe(self, sample: int) -> str:
        """Name a sample for messages: `shard.tar:key (members: jpg, txt)`."""
        (row,) = self.rows_of(np.array([sample]))
        members = [
            name
            for column in self.columns
            for name in column.rows.dtype.names
            if name != "__key__" and column.rows[name]["offset"][row]
        ]
        return f"{self.name_of(sample)} (members: {', '.join(members) or 'none'})"

    def name_of(self, sample: int) -> str:
        return f"{self.names[int(self.shard_of(sample))]}:{self.key(sample)}"

    def keep(self, mask: np.ndarray, reason: str | None = None) -> None:
        """Leave out the samples where `mask` is False; with a reason they are problems."""
        dropped = np.flatnonzero(~mask)
        if reason is not None:
            for sample in dropped:
                self.problems.append(
                    Problem(self.names[int(self.shard_of(sample))], self.key(sample), reason)
                )
        counts = np.add.reduceat(np.append(mask, False), self.starts[:-1]) * (np.diff(self.starts) > 0)
        edges = np.cumsum([len(source) for source in self.sizes])[:-1]
        self.sizes = np.split(counts.astype(np.int64), edges)
        self.left_out = np.union1d(self.left_out, self.rows_of(dropped))
        self._count()


def expand_shards(patterns: Sequence[str], key: str = "data.shards") -> list[str]:
    """List shards in order from paths, globs, brace ranges (`a-{000..012}.tar`, `{a,b}.tar`), URLs, `@list.txt`.

    Raises MissingShards naming the files, or ConfigError for one that is listed twice. URLs are tried later.
    """
    patterns = [line for pattern in patterns for line in _read_list(pattern, key)]
    if not patterns:
        raise ConfigError(
            f"{key}: no shards; give webdataset tars, for example {key}='[\"data/train-*.tar\"]'"
        )
    paths, missing = [], []
    for pattern in patterns:
        for name in expand_braces(pattern):
            if is_url(name):
                found = list_urls(name) if glob.has_magic(name.partition("?")[0]) else [name]
            else:
                found = sorted(glob.glob(name)) if glob.has_magic(name) else [name] * Path(name).is_file()
            paths += found
            missing += [] if found else [name]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise MissingShards(
            f"{key}: missing shards: {', '.join(missing[:5])}{more}; check the path or the range"
        )
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ConfigError(f"{key}: '{twice}' is listed twice; every shard must match one pattern only")
    return paths


def _read_list(pattern: str, key: str) -> list[str]:
    """Read the lines of an `@file`; anything else is itself a pattern."""
    if not pattern.startswith("@"):
        return [pattern]
    path = Path(pattern[1:])
    if not path.is_file():
        raise MissingShards(f"{key}: list '{path}' does not exist; write one shard or pattern per line")
    return [
        line.strip() for line in read_text(path).splitlines() if line.strip() and not line.startswith("#")
    ]


def expand_braces(pattern: str) -> list[str]:
    """Expand `a{1..3}{x,y}` to a1x, a1y, a2x, ...

    Ranges keep the zero padding of their smaller number, and count down if that is the second.
    """
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if words:
        options = words.split(",")
    else:
        low, high = sorted((first, last), key=int)
        options = [f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1)][:: 1 if low == first else -1]
    rests = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + option + rest for option in options for rest in rests]


def open_catalog(
    sources: Sequence[Sequence[str]],
    tolerate_shards: int = 0,
    progress: bool = False,
    cache: ShardCache | None = None,
) -> Catalog:
    """Index the shards of every source (paths from `expand_shards`) and join their columns.

    Beyond MERGE_FROM shards the result is kept as one file per column, which the next call maps into memory.
    `progress` must stay False in worker processes: tqdm's lock does not survive a fork or a kill.
    Raises ConfigError for a damaged shard (up to `tolerate_shards` are left out instead) and for columns that
    do not match.
    """
    cache = cache or ShardCache()
    merge = sum(map(len, sources)) >= MERGE_FROM
    if merge and (kept := _kept_catalog(sources, tolerate_shards, cache)) is not None:
        return kept
    _make_indices([path for paths in sources for path in paths], cache, progress)
    if not merge:
        return _build_catalog(sources, tolerate_shards, cache)
    with one_process(digest(tolerate_shards, [list(source) for source in sources])[:32]):
        kept = _kept_catalog(sources, tolerate_shards, cache)  # another process may have made it meanwhile
        if kept is not None:
            return kept
        catalog = _build_catalog(sources, tolerate_shards, cache)
        try:
            if (folder := _merged_folder(sources, tolerate_shards, cache)) is not None:
                _write_merged(catalog, folder)
                return _read_merged(folder, cache)  # the file is shared; `catalog` is as large as all indices
        except OSError as error:
            log.warning("the joined index is not kept (%s); set NITRO_E_CACHE to a writable folder", error)
        return catalog


def _kept_catalog(
    sources: Sequence[Sequence[str]], tolerate_shards: int, cache: ShardCache
) -> Catalog | None:
    """Read the joined index of these shards, if there is one; one of which a part is gone is deleted."""
    folder = _merged_folder(sources, tolerate_shards, cache)
    if folder is None or not folder.is_dir():
        return None
    try:
        return _read_merged(folder, cache)
    except (FileNotFoundError, ValueError, EOFError):  # it was whole; something else cleans the cache
        shutil.rmtree(folder, ignore_errors=True)
        return None


@contextmanager
def one_process(name: str) -> Iterator[None]:
    """Let one process of this machine at a time do the work of this name; the others wait, and find it done."""
    try:
        path = cache_folder() / "catalogs" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
    except OSError:  # each does it, and says that it cannot be kept
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process
        yield


def _build_catalog(sources: Sequence[Sequence[str]], tolerate_shards: int, cache: ShardCache) -> Catalog:
    grouped = [group_columns(paths) for paths in sources]
    names = list(dict.fromkeys(name for groups in grouped for shards in groups.values() for name in shards))
    names.sort(key=priority, reverse=True)  # images first: the sample order is theirs
    parts: dict[str, list[tuple[str, np.ndarray]]] = {name: [] for name in names}
    shard_names, sizes, problems, damaged, content = [], [], [], 0, hashlib.sha256()
    for groups in grouped:
        sizes.append([])
        wanted = [name for name in names if any(name in shards for shards in groups.values())]
        for shards in groups.values():
            try:
                indices = {name: shard_index(shards[name], cache=cache) for name in wanted if name in shards}
            except DamagedTar as error:
                damaged += 1
                if damaged > tolerate_shards:
                    raise
                problems.append(Problem(Path(next(iter(shards.values()))).name, "*", str(error)))
                continue
            if len(indices) < len(wanted):
                absent = ", ".join(f"{name or 'plain'}-" for name in wanted if name not in shards)
                raise ConfigError(
                    f"{next(iter(shards.values()))}: no {absent} shard of the same name, as others have"
                )
            rows = _join(indices, shards, problems)
            for index in indices.values():
                content.update(index.digest().encode())
            base = rows[wanted[0]]
            keys = np.zeros(len(base), [("__key__", base["__key__"].dtype)])
            keys["__key__"] = base["__key__"]
            for name in names:
                parts[name].append((shards[name], rows[name]) if name in rows else ("", keys))
            shard_names.append(Path(shards[wanted[0]]).name)
            sizes[-1].append(len(base))
    columns = []
    for name, part in parts.items():
        paths, tables = [path for path, _ in part], [rows for _, rows in part]
        columns.append(Column(name, paths, _concatenate(tables)))
    sizes = [np.array(source, np.int64) for source in sizes]
    return Catalog(shard_names, sizes, columns, content.hexdigest(), problems, cache)


def map_rows(file: Path) -> np.ndarray:
    return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))


def _merged_folder(sources: Sequence[Sequence[str]], tolerate_shards: int, cache: ShardCache) -> Path | None:
    """Find the folder that keeps the catalog of exactly these shards and indices; None while an index is missing."""
    state = []
    for path in (path for source in sources for path in source):
        try:
            status = _index_of(path, cache).stat()
            length = None if is_url(path) else os.path.getsize(path)
        except OSError:
            return None
        state.append((path, length, status.st_size, status.st_mtime_ns))
    return cache_folder() / "catalogs" / digest(tolerate_shards, list(map(len, sources)), state)[:32]


def _index_of(path: str, cache: ShardCache) -> Path:
    return index_path(cache.path(path) if is_url(path) else path)


def _write_merged(catalog: Catalog, folder: Path) -> None:
    """Publish a catalog under its name, unless another process was faster; keep the newest few."""
    content = {
        "names": catalog.names,
        "sizes": [source.tolist() for source in catalog.sizes],
        "columns": [[column.name, column.paths] for column in catalog.columns],
        "digest": catalog.digest,
        "problems": [[problem.shard, problem.key, problem.reason] for problem in catalog.problems],
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_path(folder) as temporary:
            temporary.mkdir(exist_ok=True)  # left by a killed process that had the same number
            for number, column in enumerate(catalog.columns):
                np.save(temporary / f"{number}.npy", column.rows, allow_pickle=False)
            (temporary / "catalog.json").write_text(json.dumps(content))
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
            raise
    others = sorted(
        (path for path in folder.parent.iterdir() if path.suffix not in (".tmp", ".lock")),
        key=lambda path: path.stat().st_mtime,
    )
    for old in others[:-KEEP_MERGED]:
        shutil.rmtree(old, ignore_errors=True)


def _read_merged(folder: Path, cache: ShardCache) -> Catalog:
    content = json.loads((folder / "catalog.json").read_text())
    columns = []
    for number, (name, paths) in enumerate(content["columns"]):
        file = folder / f"{number}.npy"
        columns.append(Column(name, paths, map_rows(file), file))
    sizes = [np.array(source, np.int64) for source in content["sizes"]]
    problems = [Problem(*problem) for problem in content["problems"]]
    return Catalog(content["names"], sizes, columns, content["digest"], problems, cache)


def _make_indices(paths: list[str], cache: ShardCache, progress: bool) -> None:
    """Scan what has no index yet, and bring the indices of remote shards here, before they are read one by one.

    Each process goes in an order of its own, so that the ranks of a run share the work.
    """
    todo = [path for path in paths if not _index_of(path, cache).is_file()]
    if not todo:
        return
    random.Random(os.getpid()).shuffle(todo)
    remote = any(map(is_url, todo))
    threads = 16 if remote else 2  # scanning waits for the disk half of the time
    with ThreadPoolExecutor(threads) as pool:
        made = pool.map(partial(_make_index, cache=cache), todo)
        if progress and (remote or len(todo) > 20):
            made = bar(made, desc="index", total=len(todo), unit="shard")
        for _ in made:
            pass


def _make_index(path: str, cache: ShardCache) -> None:
    try:
        shard_index(path, cache=cache)
    except DamagedTar:
        pass  # for the loop, which may be allowed to leave it out


def group_columns(paths: Sequence[str]) -> dict[tuple, dict[str, str]]:
    """Join paths that are columns of one shard: {shard: {column name: path}} in order of first appearance."""
    stems = [Path(path).name for path in paths]
    by_folder = len(set(stems)) < len(stems)
    groups: dict[tuple, dict[str, str]] = {}
    for path, stem in zip(paths, stems):
        match = COLUMN.fullmatch(stem)
        name, rest = match.groups() if match else ("", stem)
        groups.setdefault((str(Path(path).parent) if by_folder else "", rest), {})[name] = path
    return groups


def _join(
    indices: dict[str, ShardIndex], shards: dict[str, str], problems: list[Problem]
) -> dict[str, np.ndarray]:
    """Bring the rows of one shard's columns to one order of keys; keys that a column lacks become problems."""
    for index in indices.values():
        problems += index.problems
    base, *others = indices
    keys = indices[base].rows["__key__"]
    shared = np.ones(len(keys), bool)
    for name in others:
        theirs = indices[name].rows["__key__"]
        both = np.isin(keys, theirs)
        shared &= both
        for lacks, has, missing in ((base, name, theirs[~np.isin(theirs, keys)]), (name, base, keys[~both])):
            shard, other = Path(shards[has]).name, Path(shards[lacks]).name
            problems += [Problem(shard, key.decode(errors="replace"), f"not in {other}") for key in missing]
    joined = {base: indices[base].rows[shared]}
    for name in others:
        theirs = indices[name].rows
        order = np.argsort(theirs["__key__"], kind="stable")
        joined[name] = theirs[order[np.searchsorted(theirs["__key__"], keys[shared], sorter=order)]]
    return joined


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    """Stack rows of shards that may differ in key width and extensions."""
    if not parts:
        return np.zeros(0, [("__key__", "S1")])
    width = max(part.dtype["__key__"].itemsize for part in parts)
    extensions = dict.fromkeys(name for part in parts for name in part.dtype.names[1:])
    member = next((part.dtype[1] for part in parts if len(part.dtype) > 1), None)
    rows = np.zeros(
        sum(map(len, parts)), [("__key__", f"S{width}"), *((name, member) for name in extensions)]
    )
    start = 0
    for part in parts:
        for name in part.dtype.names:
            rows[name][start : start + len(part)] = part[name]
        start += len(part)
    return rows
