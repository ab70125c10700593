"""Shards behind URLs (http, s3, gs, hf, ... through fsspec), in a cache keyed by the whole URL.

A shard is downloaded once per machine, whole, into a temporary file, its length is compared with what the
server said, and then it is renamed; processes that want the same one wait for it. The least recently used
shards are deleted beyond the limit; a reader that has one open keeps it. Only the headers of a large shard are read
by ranges, to index it. Left out: training from ranges, `pipe:` commands.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from nitro_e.config import ConfigError
from nitro_e.files import atomic_file

T = TypeVar("T")
ATTEMPTS = 5
CHUNK = 1 << 22
STALLED = 60.0  # seconds without a byte
SMALL = 4 << 20  # bytes of a shard that is rather downloaded than read by ranges
NEAR, PIECE, RUN = 1 << 16, 1 << 14, 1 << 20  # bytes; see Ranges


class MissingFile(ConfigError):
    """There is no file at this URL."""


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


class ShardCache:
    """Local copies of remote files. Can be pickled and shared by processes and runs."""

    def __init__(self, folder: str | Path | None = None, limit_bytes: float = 200e9, backoff: float = 1.0):
        self.folder = Path(folder or cache_folder()) / "shards"
        self.limit, self.backoff = limit_bytes, backoff

    def path(self, url: str) -> Path:
        digest = hashlib.sha256(url.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}-{url.rstrip('/').rsplit('/', 1)[-1][:80]}"

    def fetch(self, url: str, nbytes: int | None = None) -> Path:
        """Download the file unless it is here, and return the local copy. `nbytes` is its length, if known.

        Raises ConfigError naming the URL when it cannot be had after several attempts.
        """
        path = self.path(url)
        if not self._is_there(path, nbytes):
            with self._lock(path):
                if not self._is_there(path, nbytes):  # another process may have fetched it meanwhile
                    self._download(url, path, nbytes)
        try:
            os.utime(path)  # the time of its last use
        except FileNotFoundError:
            return self.fetch(url, nbytes)  # evicted between the two lines
        return path

    def fetch_optional(self, url: str) -> Path | None:
        """Do as `fetch` does, but return None if there is no such file."""
        path = self.path(url)
        if not path.is_file():
            try:
                self._download(url, path, None)
            except MissingFile:
                return None
        return path

    def ranges(self, url: str) -> Ranges | None:
        """Open a file for reading by ranges; None if it is small, or the server does not do it."""

        def begin() -> tuple[Any, str, int | None, bytes]:
            system, name = _open_system(url)
            size = system.info(name).get("size")
            whole = size is None or size < SMALL
            return system, name, size, b"" if whole else system.cat_file(name, start=0, end=PIECE)

        system, name, size, first = self.retried(url, begin)
        # a server without ranges sends the whole file
        return Ranges(self, url, size, system, name, first) if len(first) == PIECE else None

    def _is_there(self, path: Path, nbytes: int | None) -> bool:
        return path.is_file() and nbytes in (None, path.stat().st_size)

    def _download(self, url: str, path: Path, nbytes: int | None) -> None:
        self.retried(url, lambda: self._copy(url, path, nbytes))

    def retried(self, url: str, action: Callable[[], T]) -> T:
        """Do something with a remote file, again after a while if it fails.

        Raises MissingFile or another ConfigError naming the URL at once where trying again would not help, else after
        ATTEMPTS attempts.
        """
        for attempt in range(ATTEMPTS):
            try:
                return action()
            except Exception as raised:  # every protocol has its own
                error = _reason(url, raised)
                if isinstance(error, (FileNotFoundError, PermissionError, ImportError, ValueError)):
                    raise _failure(url, error) from None
                if attempt == ATTEMPTS - 1:
                    raise _failure(url, error, f" after {ATTEMPTS} attempts") from None
                time.sleep(self.backoff * 2**attempt)
        raise AssertionError("the loop returns or raises")

    def _copy(self, url: str, path: Path, nbytes: int | None) -> None:
        system, name = _open_system(url)
        http = url.startswith(HTTP)
        expected = system.info(name).get("size") if nbytes is None else nbytes
        self._make_room(expected or 0)
        with (
            system.open(name, "rb", **({"block_size": 0} if http else {})) as source,
            atomic_file(path) as file,
        ):
            shutil.copyfileobj(source, file, CHUNK)
            if expected is not None and file.tell() != expected:
                raise OSError(f"{file.tell()} of {expected} bytes arrived")

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        """Keep others on this machine from downloading the same file; a lock dies with its process."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(path.name + ".lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, nbytes: int) -> None:
        """Delete what was used longest ago until `nbytes` more fit."""
        files = []
        for path in self.folder.glob("??/*"):
            if path.name[0] != "." and not path.name.endswith((".lock", ".tmp")):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                files.append((status.st_mtime, status.st_size, path))
        total = nbytes + sum(size for _, size, _ in files)
        for _, size, path in sorted(files, key=lambda file: file[0]):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size


class Ranges:
    """The content of a remote file; slices are fetched when they are asked for.

    A slice near the last one (NEAR) is read on for RUN bytes, since a request costs as much as many bytes do; one
    farther away comes with PIECE bytes. So small members are read through and large ones are skipped.
    """

    def __init__(self, cache: ShardCache, url: str, size: int, system: Any, name: str, first: bytes):
        self.cache, self.url, self.size, self.system, self.name = cache, url, size, system, name
        self.start, self.piece = 0, first  # what was fetched last

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: slice, /) -> bytes:
        start, end, _ = place.indices(self.size)
        behind = start - (self.start + len(self.piece))
        if not (self.start <= start and end <= self.start + len(self.piece)):
            length = max(end - start, RUN if 0 <= behind < NEAR else PIECE)
            self.piece, self.start = self._fetch(start, min(start + length, self.size)), start
        return self.piece[start - self.start : end - self.start]

    def _fetch(self, start: int, end: int) -> bytes:
        def read() -> bytes:
            content = self.system.cat_file(self.name, start=start, end=end)
            if len(content) != end - start:
                raise OSError(f"{len(content)} of {end - start} bytes arrived")
            return content

        return self.cache.retried(self.url, read)


def local_path(path: str | Path) -> Path:
    """Return the path of a file, or of a URL's copy in the default cache."""
    return ShardCache().fetch(str(path)) if is_url(path) else Path(path)


def list_urls(pattern: str) -> list[str]:
    """List the URLs that match a glob, sorted."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(pattern)
        return sorted(system.unstrip_protocol(name) for name in system.glob(path))
    except Exception as error:
        raise _failure(pattern, error) from None


HTTP = ("http://", "https://")


def _open_system(url: str) -> tuple[Any, str]:
    """Find the file system of a URL, and its name there."""
    import fsspec

    options = {"client_kwargs": {"timeout": _http_timeout()}} if url.startswith(HTTP) else {}
    return fsspec.core.url_to_fs(url, **options)


def _http_timeout():
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=STALLED, sock_read=STALLED)


def _reason(url: str, error: Exception) -> Exception:
    """Return what went wrong: fsspec's http calls every failure a missing file, with the real one as its cause."""
    cause = error.__cause__
    if not (url.startswith(HTTP) and isinstance(error, FileNotFoundError) and isinstance(cause, Exception)):
        return error
    status = getattr(cause, "status", 0)  # 0: no answer
    busy = status in (408, 425, 429)  # too slow, too early, too many requests
    return error if 400 <= status < 500 and not busy else cause


def _failure(url: str, error: Exception, after: str = "") -> ConfigError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, ImportError):
        return ConfigError(f"{url}: this kind of URL needs another package: {reason}")
    kind = MissingFile if isinstance(error, FileNotFoundError) else ConfigError
    return kind(
        f"{url}: cannot be read{after} ({type(error).__name__}: {reason}); check the address and access"
    )


def cache_folder() -> Path:
    return Path(os.environ.get("NITRO_E_CACHE") or Path.home() / ".cache" / "nitro_e")
