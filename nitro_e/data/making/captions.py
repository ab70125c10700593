"""Read tables of captions: CSV, TSV, JSON lines (also .gz, or alone in a .tgz), parquet, folders of .txt files.

`rows` reads one; `CaptionTable` keeps one as an SQLite file beside the output, so that 25M captions need no
memory and every worker process can look them up by id. The id of a row is the file name without folder and
extension.
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
from pathlib import Path
from typing import Any, TextIO

from nitro_e.config import ConfigError, check_characters, did_you_mean, read_text
from nitro_e.data.manifests import digest
from nitro_e.files import atomic_path, sha256_of
from nitro_e.record.progress import bar

csv.field_size_limit(1 << 24)


def stem(name: str) -> str:
    """Reduce `./000/sa_1.jpg` to `sa_1`; only a short ending without spaces counts as an extension."""
    base = name.replace("\\", "/").rsplit("/", 1)[-1]
    head, dot, extension = base.rpartition(".")
    return head if dot and head and len(extension) <= 5 and extension.isalnum() else base


def rows(path: str | Path, columns: tuple[str, ...] | None = None) -> Iterator[dict[str, Any]]:
    """Read the rows of a table. ConfigError if the first lacks one of `columns` (dots reach into objects)."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"captions '{path}' do not exist; check the path")
    first = True
    for number, row in enumerate(_read(path, columns), 1):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: row {number} is {str(row)[:40]!r}, not an object with columns")
        if first and columns is not None:
            for column in columns:
                if value_at(row, column) is None:
                    raise ConfigError(f"{path}: no column '{column}'" + did_you_mean(column, list(row)))
        first = False
        yield row


def value_at(row: dict, column: str) -> Any:
    """Look up row["a"]["b"] for column "a.b"; None where there is none."""
    if column in row:
        return row[column]
    for part in column.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


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
            yield from csv.DictReader(text, delimiter="\t" if suffix == ".tsv" else ",")
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
    names = [column.split(".")[0] for column in columns or file.schema_arrow.names]
    for name in names:
        if name not in file.schema_arrow.names:
            raise ConfigError(f"{path}: no column '{name}'" + did_you_mean(name, file.schema_arrow.names))
    for batch in file.iter_batches(batch_size=1000, columns=names):
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
    def build(cls, source: Path, folder: Path, id_column: str, caption_column: str) -> CaptionTable:
        """Make the table from `source` unless it is there already; says which ids have several captions."""
        if not source.exists():
            raise ConfigError(f"captions '{source}' do not exist; check the path")
        content = (
            [(path.name, path.stat().st_size) for path in sorted(source.rglob("*.txt"))]
            if source.is_dir()
            else sha256_of(source)
        )
        identity = digest(content, id_column, caption_column)
        path = folder / f"captions-{identity[:16]}.sqlite"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                _fill(temporary, source, id_column, caption_column)
        table = cls(path, identity)
        with sqlite3.connect(path) as connection:
            twice = [key for (key,) in connection.execute("SELECT id FROM duplicates ORDER BY id")]
        if twice:
            some = ", ".join(twice[:5])
            print(f"{len(twice)} ids have several captions, the first is used: {some}", file=sys.stderr)
        return table

    def get(self, key: str) -> str | None:
        if self._connection is None:
            self._connection = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)
        row = self._connection.execute("SELECT caption FROM captions WHERE id = ?", (stem(key),)).fetchone()
        return row[0] if row else None

    def __getstate__(self):
        return {**self.__dict__, "_connection": None}


def _fill(path: Path, source: Path, id_column: str, caption_column: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode = OFF")
    connection.execute("CREATE TABLE captions (id TEXT PRIMARY KEY, caption TEXT) WITHOUT ROWID")
    connection.execute("CREATE TABLE duplicates (id TEXT)")
    for row in bar(rows(source, (id_column, caption_column)), desc="captions", unit="row"):
        key, caption = stem(str(value_at(row, id_column))), value_at(row, caption_column)
        if caption is None:
            continue
        check_characters(key + str(caption), f"{source}: the row of {key!r}")
        cursor = connection.execute("INSERT OR IGNORE INTO captions VALUES (?, ?)", (key, str(caption)))
        if not cursor.rowcount:
            connection.execute("INSERT INTO duplicates VALUES (?)", (key,))
    connection.commit()
    connection.close()
