"""Write webdataset tars: USTAR, mtime 0, so that the same samples give the same bytes.

webdataset's TarWriter would give other bytes: it sorts the members of a sample by name, and writes names that
do not fit as PAX records.

A shard appears under its name only when it is complete (temporary file, fsync, rename). A sample is a dict:
    {"__key__": "sa1b_0000042", "jpg": bytes, "txt": "a dog", "json": {...}, "npy": ndarray}
Left out: PAX records (names longer than USTAR allows are refused), compression, appending.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from nitro_e.config import ConfigError
from nitro_e.data.decode import decode_array
from nitro_e.data.index import index_path, read_members, scan_tar
from nitro_e.files import atomic_file

RAGGED = ("text", "scale")  # arrays of which ragged text has as many rows as its caption has tokens


def write_shard(
    path: str | Path, samples: Iterable[dict[str, Any]], check: Callable[[Path], None] | None = None
) -> int:
    """Write one tar atomically and return the number of samples in it; see `open_shard`."""
    count = 0
    with open_shard(path, check) as add:
        for sample in samples:
            add(sample)
            count += 1
    return count


@contextmanager
def open_shard(
    path: str | Path, check: Callable[[Path], None] | None = None
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give the block a function that adds samples to a new tar, which is published when the block ends well.

    Values: bytes as they are, str as UTF-8, ndarray as .npy, dict and list as JSON. `check` is given the
    finished temporary file; the shard is published only if it does not raise. Raises ConfigError for a key
    that is empty, repeated, or holds a dot or a slash (a reader would split it).
    """
    seen: set[str] = set()

    def add(sample: dict[str, Any]) -> None:
        key = check_key(sample["__key__"])
        if key in seen:
            raise ConfigError(f"{path}: key '{key}' appears twice; keys must be unique")
        seen.add(key)
        for extension, value in sample.items():
            if not extension.startswith("__"):
                _add_member(tar, f"{key}.{extension}", field_bytes(value))

    with atomic_file(path) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            yield add
        if check is not None:
            file.flush()
            check(Path(file.name))
        index_path(path).unlink(missing_ok=True)  # it describes what was here before


def write_shards(
    samples: Iterable[dict[str, Any]], pattern: str, samples_per_shard: int = 1000
) -> list[Path]:
    """Write `samples` in order to `pattern % 0`, `pattern % 1`, ...; every shard but the last is full."""
    samples = iter(samples)
    paths = []
    for first in samples:
        path = Path(pattern % len(paths))
        write_shard(path, chain([first], islice(samples, samples_per_shard - 1)))
        paths.append(path)
    return paths


def check_written(keys: list[str], final: Path, path: Path, several: bool = False) -> None:
    """Open the shard at `path` again, before it becomes `final`: every key in order, arrays finite, of one shape.

    Only the first axis of ragged text may differ; with `several`, of aspect buckets, shapes may. Raises ConfigError.
    """
    index, layouts = scan_tar(path), {}
    found = []
    arrays = [name for name in index.extensions if name.endswith("npy")]
    for key, members in read_members(path, index, arrays):
        found.append(key)
        for name, content in members.items():
            array = decode_array(content)
            shape = (array.ndim,) if several else array.shape[name.startswith(RAGGED) :]
            layout = shape, array.dtype.str
            if layout != layouts.setdefault(name, layout):
                raise ConfigError(
                    f"{final}: {name} of {key} is {layout}, of the first sample {layouts[name]}; this is a"
                    " fault of the encoder"
                )
    if found != keys:
        raise ConfigError(
            f"{final}: was not written as it should be (keys differ); check the disk and run again"
        )


def check_key(key: str) -> str:
    if not key or "." in key or "/" in key or not key.isprintable():
        raise ConfigError(f"sample key {key!r}: must be printable, not empty, without '.' and '/'; rename it")
    return key


def field_bytes(value: Any) -> bytes:
    """Encode a Python value as a member's content."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, np.ndarray):
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.ascontiguousarray(value), version=(1, 0), allow_pickle=False)
        return buffer.getvalue()
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False, sort_keys=True).encode(errors="backslashreplace")
    raise TypeError(f"cannot store a {type(value).__name__} in a shard")


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # mtime 0, uid and gid 0, mode 0644
    info.size = len(content)
    try:
        tar.addfile(info, io.BytesIO(content))
    except ValueError as error:
        raise ConfigError(f"member '{name}' does not fit a USTAR header ({error}); shorten the key") from None
