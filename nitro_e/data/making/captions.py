"""Read tables of captions: CSV, TSV, JSON lines (also .gz, or alone in a .tgz), parquet, folders of .txt files.

`rows` reads one; `CaptionTable` keeps one as an SQLite file beside the output, so that 25M captions need no
memory and every worker process can look them up by id. The id of a row is the file name without folder and
extension. A cell may hold one caption or a list of them.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sqlite3
import sys
import tarfile
import zlib
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from nitro_e.config import ConfigError, check_characters, did_you_mean, read_text
from nitro_e.data.manifests import digest
from nitro_e.files import atomic_path, sha256_of
from nitro_e.record.progress import bar

csv.field_size_limit(1 << 24)
HEAD = 100  # rows of a table that are searched for a column before it is said to be missing
LARGEST_KEPT = 4096  # bytes of a json value that is carried over from a source; SA-1B's masks are far larger


def stem(name: str) -> str:
    """Reduce `./000/sa_1.jpg` to `sa_1`; only a short ending without spaces counts as an extension."""
    base = name.replace("\\", "/").rsplit("/", 1)[-1]
    head, dot, extension = base.rpartition(".")
    return head if dot and head and len(extension) <= 5 and extension.isalnum() else base


def rows(path: str | Path, columns: tuple[str, ...] | None = None) -> Iterator[dict[str, Any]]:
    """Read the rows of a table; values may be None.

    Raises ConfigError if none of the first HEAD rows has one of `columns` (dots reach into objects).
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"captions '{path}' do not exist; check the path")
    table = _objects(path, columns)
    head = list(islice(table, HEAD))
    for column in columns or ():
        if head and not any(has_column(row, column) for row in head):
            names = dict.fromkeys(name for row in head for name in row if isinstance(name, str))
            raise ConfigError(f"{path}: no column '{column}'" + did_you_mean(column, list(names)))
    yield from chain(head, table)


def _objects(path: Path, columns: tuple[str, ...] | None) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_read(path, columns), 1):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: row {number} is {str(row)[:40]!r}, not an object with columns")
        yield row


def has_column(row: dict, column: str) -> bool:
    """Tell whether a row has the column; its value, or the object that it lies in, may be None."""
    if column in row:
        return True
    first, dot, rest = column.partition(".")
    inner = row.get(first)
    if not dot or first not in row:
        return False
    if isinstance(inner, list):
        return not inner or any(isinstance(item, dict) and has_column(item, rest) for item in inner)
    return inner is None or isinstance(inner, dict) and has_column(inner, rest)


def value_at(row: dict, column: str) -> Any:
    """Look up row["a"]["b"] for column "a.b", in a list of objects for each; None where there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, list):
            value = [item.get(part) if isinstance(item, dict) else None for item in value]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def captions_in(value: Any, column: str) -> list[str]:
    """Read the captions of a cell, which holds text, a list of texts, or None.

    Raises ConfigError for an object, which has its caption in one of its own columns.
    """
    if isinstance(value, (list, tuple)):
        return [caption for item in value for caption in captions_in(item, column)]
    if isinstance(value, dict):
        names = ", ".join(f"'{column}.{name}'" for name in list(value)[:5])
        raise ConfigError(f"column '{column}' holds objects, not captions; name a column inside: {names}")
    return [] if value is None else [str(value)]


def kept_values(row: dict, columns: tuple[str, ...]) -> dict[str, Any]:
    """Pick columns of a row as plain JSON data; None and what is larger than LARGEST_KEPT is left out."""
    found = {column: value_at(row, column) for column in columns}
    plain = {name: json.loads(json.dumps(value, default=str)) for name, value in found.items()}
    return {
        name: value
        for name, value in plain.items()
        if value is not None and len(json.dumps(value)) <= LARGEST_KEPT
    }


def _read(path: Path, columns: tuple[str, ...] | None) -> Iterator[dict[str, Any]]:
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            yield {"file": file.name, "caption": read_text(file)}
        return
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".parquet"]:
        yield from _read_parquet(path, columns)
    elif suffixes[-1:] == [".tgz"] or suffixes[-2:] == [".tar", ".gz"]:
        try:
            with tarfile.open(path, "r:gz") as tar:
                for member in tar:
                    if member.isfile() and not Path(member.name).name.startswith("._"):
                        text = io.TextIOWrapper(tar.extractfile(member), encoding="utf-8", newline="")
                        yield from _read_text(text, Path(member.name).suffix.lower(), path)
        except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ConfigError(f"{path}: damaged archive ({error}); download it again") from None
    else:
        packed = suffixes[-1:] == [".gz"]
        opener = gzip.open if packed else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as text:
            yield from _read_text(text, "".join(suffixes[-2:-1] if packed else suffixes[-1:]), path)


def _read_text(text: TextIO, suffix: str, path: Path) -> Iterator[dict[str, Any]]:
    try:
        if suffix in (".csv", ".tsv"):
            table = csv.DictReader(text, delimiter="\t" if suffix == ".tsv" else ",")
            for row in table:
                if any(row.pop(None, ())):  # cells without a column; empty ones lose nothing
                    raise ConfigError(
                        f"{path}:{table.line_num}: more cells than columns ({', '.join(row)}); put quotes around"
                        f" a caption with '{table.reader.dialect.delimiter}' in it"
                    )
                yield row
        elif suffix in (".jsonl", ".json", ".ndjson"):
            head = text.readline()
            if head.lstrip().startswith("["):  # one JSON list instead of lines
                yield from json.loads(head + text.read())
                return
            while head:
                if head.strip():
                    yield json.loads(head)
                head = text.readline()
        else:
            raise ConfigError(f"{path}: '{suffix}' is not a table; use .csv, .tsv, .jsonl, .json or .parquet")
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{path}: not a valid {suffix} table (nested too deeply)") from None
    except (ValueError, csv.Error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{path}: not a valid {suffix} table ({error}); mend or convert it") from None


def _read_parquet(path: Path, columns: tuple[str, ...] | None) -> Iterator[dict[str, Any]]:
    file = open_parquet(path)
    there = file.schema_arrow.names
    names = [column if column in there else column.split(".")[0] for column in columns or there]
    for name in names:
        if name not in there:
            raise ConfigError(f"{path}: no column '{name}'" + did_you_mean(name, there))
    for batch in file.iter_batches(batch_size=1000, columns=list(dict.fromkeys(names))):
        yield from batch.to_pylist()


def open_parquet(path: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ConfigError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ConfigError(f"{path}: not a readable parquet file ({error}); download it again") from None


class CaptionTable:
    """Captions by id, in an SQLite file that is made once; each process opens its own connection."""

    def __init__(self, path: Path, identity: str):
        self.path, self.identity = path, identity  # identity: hash of what the table was made from
        self._connection: sqlite3.Connection | None = None

    @classmethod
    def build(
        cls, source: Path, folder: Path, id_column: str, caption_column: str, keep: tuple[str, ...] = ()
    ) -> CaptionTable:
        """Make the table from `source` unless it is there already; says which ids are there twice.

        keep: further columns, which `find` gives beside the caption.
        """
        if not source.exists():
            raise ConfigError(f"captions '{source}' do not exist; check the path")
        content = (
            [(path.name, path.stat().st_size) for path in sorted(source.rglob("*.txt"))]
            if source.is_dir()
            else sha256_of(source)
        )
        identity = digest(content, id_column, caption_column, *([keep] if keep else []))
        path = folder / f"table-{identity[:16]}.sqlite"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                _fill(temporary, source, id_column, caption_column, keep)
        table = cls(path, identity)
        with sqlite3.connect(path) as connection:
            twice = [key for (key,) in connection.execute("SELECT id FROM duplicates ORDER BY id")]
        if twice:
            some = ", ".join(twice[:5])
            print(f"{len(twice)} ids have several captions, the first is used: {some}", file=sys.stderr)
        return table

    def get(self, key: str) -> str | None:
        """Look up the caption of an id, or the first of several; None without one."""
        found = self.find(key)
        return found[0] if found else None

    def find(self, key: str) -> tuple[str, dict] | None:
        """Look up the caption of an id and what its sample's json gets: a list `captions` and kept columns."""
        if self._connection is None:
            self._connection = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)
        row = self._connection.execute(
            "SELECT caption, info FROM captions WHERE id = ?", (stem(key),)
        ).fetchone()
        return (row[0], json.loads(row[1])) if row else None

    def __getstate__(self):
        return {**self.__dict__, "_connection": None}


def _fill(path: Path, source: Path, id_column: str, caption_column: str, keep: tuple[str, ...]) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = OFF")
    connection.execute("CREATE TABLE captions (id TEXT PRIMARY KEY, caption TEXT, info TEXT) WITHOUT ROWID")
    connection.execute("CREATE TABLE duplicates (id TEXT)")
    for row in bar(rows(source, (id_column, caption_column, *keep)), desc="captions", unit="row"):
        key = stem(str(value_at(row, id_column)))
        captions = captions_in(value_at(row, caption_column), caption_column)
        if not captions:
            continue
        check_characters(key + "".join(captions), f"{source}: the row of {key!r}")
        info = json.dumps(kept_values(row, keep) | several(captions))
        cursor = connection.execute(
            "INSERT OR IGNORE INTO captions VALUES (?, ?, ?)", (key, captions[0], info)
        )
        if not cursor.rowcount:
            connection.execute("INSERT INTO duplicates VALUES (?)", (key,))
    connection.commit()
    connection.close()


def several(captions: list[str]) -> dict[str, list[str]]:
    """Return the json of a sample with more than one caption: all of them; its txt is the first."""
    return {"captions": captions} if len(captions) > 1 else {}
