"""Find where every member of a webdataset tar lies: one scan of the headers, kept beside the shard.

The index of a shard is a structured array, one row per sample:
    __key__                     bytes: the member name up to the first dot of its last path component
    <extension>                 (offset u8, size u4, crc u4) of its content; offset 0 = no such member
It is written once to `<folder>/.index/<shard>.npy` (or under $NITRO_E_CACHE when the folder is read-only) and
is believed from then on: a shard whose length no longer fits its index is an error, content that no longer
fits its CRC is found when it is read. `nitro-e data index --force` makes a new one.

Python's tarfile and webdataset both take a damaged header for the end of the archive. This scan does not: it
checks every header sum, the end marker, and that nothing follows it. Left out: sparse files, links.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nitro_e.config import ConfigError
from nitro_e.data.problems import Problem
from nitro_e.data.remote import SMALL, ShardCache, cache_folder, is_url
from nitro_e.files import atomic_file

log = logging.getLogger("nitro_e.data")
BLOCK = 512
MEMBER = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc", "<u4")])
MAX_EXTENSIONS = 32
# Kinds of tar members. Records (GNU long names, PAX) describe the member that follows, or the whole archive.
REGULAR, RECORDS = (b"0", b"\0", b"7"), (b"L", b"K", b"x", b"g")
KNOWN = (*REGULAR, *RECORDS, b"5")  # 5 is a folder


class DamagedTar(ConfigError):
    """The archive's structure is broken; what follows the damage cannot be trusted."""


@dataclass(frozen=True)
class ShardIndex:
    rows: np.ndarray  # (n,) structured, see the module docstring
    nbytes: int  # length of the tar
    problems: tuple[Problem, ...] = ()  # duplicate members; the first of them is in `rows`
    # where `rows` may lack CRCs, which depends on whether the shard was downloaded before it was indexed
    headers_only: bool = False

    @property
    def extensions(self) -> tuple[str, ...]:
        return tuple(name for name in self.rows.dtype.names if name != "__key__")

    def digest(self) -> str:
        """Identifies the content: keys, places, sizes and, unless `headers_only`, CRCs."""
        rows = self.rows.copy() if self.headers_only else self.rows
        for name in self.extensions if self.headers_only else ():
            rows[name]["crc"] = 0
        return hashlib.sha256(repr(rows.dtype.descr).encode() + rows.tobytes()).hexdigest()


def shard_index(path: str | Path, force: bool = False, cache: ShardCache | None = None) -> ShardIndex:
    """Read the stored index of a shard, or make one, which is then stored.

    Of a large shard behind a URL without an index beside it only the headers are fetched, where the server can do
    that: its CRCs are 0, and its content is not checked when it is read.
    Raises DamagedTar (a ConfigError) when the tar is broken or its length differs from the stored index.
    """
    if is_url(path):
        return _remote_index(str(path), cache or ShardCache())
    path = Path(path)
    stored = index_path(path)
    if not force and stored.is_file():
        return read_stored(path, stored)
    index = scan_tar(path)
    try:
        with atomic_file(stored) as file:
            file.write(_serialize(index))
    except OSError as error:
        log.warning("the index of %s is not kept (%s); set NITRO_E_CACHE to a writable folder", path, error)
    return index


def _remote_index(url: str, cache: ShardCache) -> ShardIndex:
    folder, _, name = url.rpartition("/")
    stored = index_path(cache.path(url))  # from an earlier download, which may be gone by now
    if stored.is_file():
        return _of_url(read_stored(Path(name), stored, check_length=False))
    beside = cache.fetch_optional(f"{folder}/.index/{name}.npy")
    if beside is not None:
        return read_stored(Path(name), beside, check_length=False)
    local = cache.path(url)
    ranges = None if local.is_file() else cache.ranges(url)
    if ranges is None:
        return _of_url(shard_index(cache.fetch(url)))  # stored in the cache, beside the local copy
    check_kind(ranges[:BLOCK], Path(name))
    names, places = [], []
    for member, offset, size in tar_members(ranges, Path(name)):
        names.append(member)
        places.append((offset, size, 0))
    index = _group(Path(name), names, places, len(ranges))
    local.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(index_path(local)) as file:
        file.write(_serialize(index))
    return _of_url(index)


def _of_url(index: ShardIndex) -> ShardIndex:
    """Mark the index of a large shard, which has no CRCs if it was made before the shard was downloaded."""
    return replace(index, headers_only=index.nbytes >= SMALL)


def scan_tar(path: str | Path, crc: bool = True) -> ShardIndex:
    """Index one tar by its headers. With `crc` the content is read too, otherwise every crc is 0.

    Raises DamagedTar naming the shard and the byte where its structure breaks.
    """
    path = Path(path)
    view = map_tar(path)
    names, places = [], []
    for name, offset, size in tar_members(view.obj, path):
        names.append(name)
        places.append((offset, size, zlib.crc32(view[offset : offset + size]) if crc else 0))
    return _group(path, names, places, len(view))


def read_members(
    path: str | Path, index: ShardIndex, extensions: Sequence[str] | None = None
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and {extension: content} of every sample of the tar; of all extensions, or of those given."""
    names = [name for name in index.extensions if extensions is None or name in extensions]
    with open(path, "rb") as file:
        for row in index.rows:
            members = {}
            for name in names:
                offset, size, _ = row[name].tolist()
                if offset:
                    file.seek(offset)
                    members[name] = file.read(size)
            yield row["__key__"].decode(errors="replace"), members


def map_tar(path: Path) -> memoryview:
    """Map the file into memory; raises DamagedTar when it cannot be a tar."""
    nbytes = os.path.getsize(path)
    with open(path, "rb") as file:
        check_kind(file.read(BLOCK), path)
        if nbytes < 2 * BLOCK or nbytes % BLOCK:
            raise _damage(path, nbytes, f"{nbytes} bytes is not a whole number of tar blocks (cut short?)")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def check_kind(head: bytes, path: Path) -> None:
    """Raise DamagedTar if a file begins like something that is often taken for a tar."""
    for start, kind, remedy in (
        (b"\x1f\x8b", "compressed with gzip", "gunzip it: members are read in place"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstandard", "unpack it: members are read in place"),
        (b"PK\x03\x04", "a zip archive", "repack it as tar"),
        (b"version https://git-lfs", "a pointer of Git LFS, not the file", "fetch it with `git lfs pull`"),
        (b"<", "a web page, not a tar", "download it again; the address may need a login"),
    ):
        if head.lstrip().startswith(start):
            raise DamagedTar(f"{path}: is {kind}; {remedy}")


class Bytes(Protocol):
    """The content of a file, of which slices are taken: a map, or something that fetches them."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: slice, /) -> bytes: ...


def tar_members(data: Bytes, path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of every regular file, after checking the structure of the whole archive."""
    headers: dict[int, bytes] = {}
    found = []
    offset, name, size = 0, None, None  # name and size that a record gave for the member that follows it
    while True:
        if offset + BLOCK > len(data):
            raise _damage(path, offset, "no end marker (cut between two members?)")
        header, start = data[offset : offset + BLOCK], offset + BLOCK
        if header[0] == 0 and not any(header):
            break
        headers[offset] = header
        kind, length = header[156:157], _number(header[124:136])
        if length is None:
            raise _damage(path, offset, "corrupt header")
        if kind not in RECORDS and size is not None:
            length = size
        if kind not in KNOWN or start + length > len(data):
            _check_sums(headers, path)  # only a good header may speak of a kind or a cut
            reason = "cut inside" if kind in KNOWN else "only files and folders are read, not"
            raise _damage(path, offset, f"{reason} member '{_name(header)}'")
        if kind == b"L":
            name = data[start : start + length].rstrip(b"\0").decode(errors="surrogateescape")
        elif kind == b"x":
            records = _pax_records(data[start : start + length], path, start)
            name, size = records.get("path", name), records.get("size", size)
        elif kind not in RECORDS:
            if kind in REGULAR:
                found.append((_name(header) if name is None else name, start, length))
            name = size = None
        offset = start + -(-length // BLOCK) * BLOCK
    _check_sums(headers, path)
    rest = data[offset : len(data)]
    if len(rest) < 2 * BLOCK:
        raise _damage(path, offset, "half an end marker (cut short?)")
    if any(rest):
        raise _damage(path, offset, "data after the end marker (a zeroed header?)")
    yield from found


def _check_sums(headers: dict[int, bytes], path: Path) -> None:
    """Compare the sums of all headers, {offset: block}; the first wrong one is the damage."""
    blocks = np.frombuffer(bytearray().join(headers.values()), np.uint8).reshape(-1, BLOCK)
    stored = [_number(bytes(field)) for field in blocks[:, 148:156]]
    blocks[:, 148:156] = ord(" ")
    sums = blocks.sum(axis=1, dtype=np.int64)
    for offset, want, got in zip(headers, stored, sums.tolist()):
        if want != got:
            raise _damage(path, offset, "corrupt header")


def _group(path: Path, names: list[str], places: list[tuple], nbytes: int) -> ShardIndex:
    """Make one row per key, in order of first appearance, from the members of a tar."""
    row_of: dict[str, int] = {}
    cells: dict[str, dict[int, tuple]] = {}
    problems = []
    for name, place in zip(names, places):
        if name.startswith("__") and "__" in name[2:].partition("/")[0]:
            continue  # webdataset's own metadata
        key, extension = split_name(name)
        if key is None:
            problems.append(
                Problem(path.name, _printable(name), "member name has no extension; it is not read")
            )
            continue
        row = row_of.setdefault(key, len(row_of))
        column = cells.setdefault(extension, {})
        if row in column:
            reason = f"duplicate member '{_printable(extension)}'; the first one is used"
            problems.append(Problem(path.name, _printable(key), reason))
        else:
            column[row] = place
    if len(cells) > MAX_EXTENSIONS:
        raise ConfigError(
            f"{path}: {len(cells)} different extensions ({', '.join(list(cells)[:4])}, ...): keys must not"
            " contain dots, because a webdataset key ends at the first one; repack with `nitro-e data pack`"
        )
    encoded = [key.encode(errors="surrogateescape") for key in row_of]
    width = max(map(len, encoded), default=1)
    rows = np.zeros(len(encoded), [("__key__", f"S{width}"), *((extension, MEMBER) for extension in cells)])
    rows["__key__"] = encoded
    for extension, column in cells.items():
        rows[extension][list(column.keys())] = np.array(list(column.values()), MEMBER)
    return ShardIndex(rows, nbytes, tuple(problems))


def split_name(name: str) -> tuple[str | None, str]:
    """Split `a/b.c.d` into `a/b` and `c.d`: webdataset's rule, extension in lower case; (None, "") without one."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension:
        return None, ""
    return folder + slash + stem, extension.lower()


def _printable(name: str) -> str:
    """Replace what is no UTF-8 in a name, as in the keys of a catalog."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _number(field: bytes) -> int | None:
    """Read a tar number: octal digits, or base 256 when the top bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return None


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode(errors="surrogateescape")


def _pax_records(content: bytes, path: Path, offset: int) -> dict[str, Any]:
    """Read `path` and `size` of a PAX record, if it has them."""
    records = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(content):
            raise _damage(path, offset, "corrupt PAX record")
        keyword, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        if keyword == b"size":
            if not value.isdigit():
                raise _damage(path, offset, "corrupt PAX record")
            records["size"] = int(value)
        elif keyword == b"path":
            records["path"] = value.decode(errors="surrogateescape")
        content = content[int(length) :]
    return records


def _damage(path: Path, offset: int, reason: str) -> DamagedTar:
    return DamagedTar(
        f"{path}: damaged tar at byte {offset}: {reason}; copy the shard again, or take it off the list"
    )


def _serialize(index: ShardIndex) -> bytes:
    """Encode an index: the rows as .npy, then nbytes and the problems as a second .npy of text."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, index.rows, allow_pickle=False)
    lines = [str(index.nbytes), *(json.dumps([problem.key, problem.reason]) for problem in index.problems)]
    np.lib.format.write_array(buffer, np.frombuffer("\n".join(lines).encode(), np.uint8), allow_pickle=False)
    return buffer.getvalue()


def read_stored(path: Path, stored: Path, check_length: bool = True) -> ShardIndex:
    try:
        with open(stored, "rb") as file:
            rows = np.lib.format.read_array(file, allow_pickle=False)
            first, *lines = np.lib.format.read_array(file, allow_pickle=False).tobytes().decode().split("\n")
        # older indices have a tab between the two, which JSON never holds
        pairs = [line.split("\t", 1) if "\t" in line else json.loads(line) for line in lines]
        problems = tuple(Problem(path.name, key, reason) for key, reason in pairs)
        index = ShardIndex(rows, int(first), problems)
    except (ValueError, TypeError, EOFError) as error:
        raise ConfigError(f"{stored} is not an index of this version ({error}); delete it") from None
    actual = os.path.getsize(path) if check_length else index.nbytes
    if actual != index.nbytes:
        raise DamagedTar(
            f"{path}: {actual} bytes, but its index was made when it had {index.nbytes}: cut short or"
            " replaced; if you replaced it, run `nitro-e data index --force` on it"
        )
    return index


def index_path(shard: str | Path) -> Path:
    """Say where the index of a shard is kept: `.index` beside it, or the user's cache if that is read-only."""
    shard = Path(shard).absolute()
    beside = shard.parent / ".index"
    # the mode too: root may write anywhere
    writable = os.access(shard.parent, os.W_OK) and shard.parent.stat().st_mode & 0o222
    if beside.is_dir() or writable:
        return beside / f"{shard.name}.npy"
    return (
        cache_folder() / "index" / f"{hashlib.sha256(str(shard).encode()).hexdigest()[:16]}-{shard.name}.npy"
    )
