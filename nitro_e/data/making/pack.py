"""Pack captioned images, in the layouts people have, into shards `images-*.tar` (jpg|png|webp, txt, json).

    folder        images in any tree; captions from a table, .txt files beside them, or file names
    table         a CSV, JSON lines or parquet table that names image files
    parquet       parquet files that hold the images themselves
    webdataset    tars with captions inside (img2dataset output is this)
    sa1b          SA-1B tars (sa_1.jpg + sa_1.json); masks are dropped, captions come from a table
    journeydb     JourneyDB: imgs/000.tgz, ... or extracted folders, and its annotation file

Image bytes are copied as they are; only formats other than JPEG, PNG and WebP, and images above --resize, are
encoded anew. Every image is decoded once, so that a broken one is found here. Keys are NAME_NUMBER; where a
sample came from, the columns of --keep, and all captions of an image that has several (`captions`) are in its
json. Folders and tables are shuffled over all shards; archives keep their order (training shuffles 64 shards at
a time). Formats that Pillow cannot read on this machine are skipped, counted and named. Left out: downloading,
deduplication by content; --min-side and --max-aspect are the only filters, a recipe has more (`data.where`).
"""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

from PIL import ExifTags, Image, ImageOps

from nitro_e.config import Config, ConfigError, Ge, Le, Seed, read_text
from nitro_e.data.catalog import IMAGES, expand_shards
from nitro_e.data.decode import BadSample, decode_caption, decode_info, image_problem, to_rgb
from nitro_e.data.index import ShardIndex, read_members, scan_tar
from nitro_e.data.making.captions import (
    LARGEST_KEPT,
    CaptionTable,
    captions_in,
    kept_values,
    open_parquet,
    rows,
    several,
    stem,
    value_at,
)
from nitro_e.data.making.jobs import JobConfig, Result, each, publish_entry, run_job
from nitro_e.data.making.writer import write_shard
from nitro_e.data.manifests import digest
from nitro_e.data.order import permutation
from nitro_e.data.problems import Problem

QUARTER_TURNS = (5, 6, 7, 8)  # values of EXIF orientation that exchange width and height
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
# endings of images in folders and archives; whether Pillow can read one depends on the machine
SUFFIXES = tuple(f".{name}" for name in (*IMAGES, "bmp", "gif", "tif", "tiff", "avif", "heic", "heif", "jxl"))


@dataclass(frozen=True, kw_only=True)
class PackConfig(Config):
    """Options of packing; all are part of every unit's fingerprint."""

    OPTIONS: ClassVar[bool] = True

    name: str = "sample"  # key prefix
    samples_per_shard: Annotated[int, Ge(1)] = 1000
    # shorter side, pixels: larger images are made smaller (JPEG 95)
    resize: Annotated[int, Ge(1), Le(65536)] | None = None
    min_side: Annotated[int, Ge(1)] = 64  # images with a shorter side below are left out
    max_aspect: Annotated[float, Ge(1)] = 4.0  # so are those with a longer side of more shorter ones
    caption_key: str = "caption"  # in json members
    image_column: str = "image"  # of tables and parquet
    caption_column: str = "caption"
    keep: tuple[str, ...] = ()  # further columns of tables, parquet and captions that go into json
    shuffle: Seed | None = 0  # seed of the order of folders and tables; None keeps it

    def __post_init__(self):
        super().__post_init__()
        if not self.name.isidentifier():
            raise ConfigError(
                f"--name '{self.name}': use letters, digits and '_' (it becomes the start of every key)"
            )


@dataclass
class Item:
    """A sample before it is packed."""

    origin: str  # path or key in the source, for reports
    image: bytes | Path | None
    caption: str | None
    info: dict = field(default_factory=dict)
    problem: str | None = None  # known to be unusable already


# path; caption, or None: look beside the file; then, if there is any, what its json gets
ListItem = tuple[str, str | None] | tuple[str, str | None, dict]


@dataclass
class ListUnit:
    """The files of exactly one shard."""

    name: str
    items: list[ListItem]
    numbers: list[int]  # place of each file before shuffling; becomes its key
    config: PackConfig

    def key(self, number: int) -> str:
        return f"{self.config.name}_{number:08d}"

    def shard(self, part: int) -> str:
        return f"images-{self.name}.tar"

    def fingerprint(self) -> str:
        states = [
            (_state(Path(path)), _state(_sidecar(Path(path))) if caption is None else None)
            for path, caption, *_ in self.items
        ]
        return digest("list", self.items, states, self.numbers, asdict(self.config))

    def read(self) -> Iterator[tuple[int, Item]]:
        for number, (path, caption, *info) in zip(self.numbers, self.items):
            yield number, Item(path, Path(path), caption, *info)


@dataclass
class ArchiveUnit:
    """A tar, tgz or parquet file, which becomes one or more shards."""

    name: str
    path: str
    reader: Callable[..., Iterator[Item]]
    config: PackConfig
    captions: CaptionTable | None = None

    def key(self, number: int) -> str:
        return f"{self.config.name}_{self.name}_{number:06d}"

    def shard(self, part: int) -> str:
        return f"images-{self.name}-{part:03d}.tar"

    def fingerprint(self) -> str:
        path = Path(self.path)
        table = self.captions.identity if self.captions else None
        return digest(
            "archive", path.name, path.stat().st_size, self.reader.__name__, table, asdict(self.config)
        )

    def read(self) -> Iterator[tuple[int, Item]]:
        for number, item in enumerate(self.reader(Path(self.path), self.config)):
            if self.captions is not None and item.problem is None:
                found = self.captions.find(item.origin)
                if found is None:
                    item.problem = "no caption in the table"
                else:
                    item.caption, item.info = found[0], {**item.info, **found[1]}
            yield number, item


def pack(units: Sequence[ListUnit | ArchiveUnit], job: JobConfig) -> list[dict]:
    """Write the shards of all units and their manifest; see jobs.run_job."""
    if not units:
        raise ConfigError("nothing to pack; check the input path")
    return run_job("images", units, each(partial(pack_unit, out=job.out), job.processes), job)


def pack_unit(unit: ListUnit | ArchiveUnit, out: Path) -> Result:
    """Write the shards of one unit; what could not be packed is in the result."""
    result, config = Result(), unit.config
    samples = _samples(unit, result.bad)
    for part, first in enumerate(samples):
        path = out / unit.shard(part)
        result.samples += write_shard(path, chain([first], islice(samples, config.samples_per_shard - 1)))
        result.shards.append(publish_entry(path, source=config.name))
    return result


def _samples(unit: ListUnit | ArchiveUnit, bad: list[Problem]) -> Iterator[dict[str, Any]]:
    for number, item in unit.read():
        try:
            yield {"__key__": unit.key(number), **prepare(item, unit.config)}
        except BadSample as error:
            bad.append(Problem(Path(getattr(unit, "path", unit.name)).name, item.origin, str(error)))


def prepare(item: Item, config: PackConfig) -> dict[str, Any]:
    """Turn an item into members, in a fixed order. Raises BadSample."""
    if item.problem is not None:
        raise BadSample(item.problem)
    content = item.image
    if isinstance(content, Path):
        if not content.is_file():
            raise BadSample("image file is missing")
        content = content.read_bytes()
    if content is None:
        raise BadSample("no image")
    caption = (
        _read_sidecar(item.image) if item.caption is None and isinstance(item.image, Path) else item.caption
    )
    # refused as decode_caption sees it
    encoded = None if caption is None else caption.encode(errors="surrogatepass")
    caption = decode_caption(encoded, item.info, config.caption_key)
    extension, content, (width, height) = prepare_image(
        content, config.resize, config.min_side, config.max_aspect
    )
    info = {**item.info, "source": item.origin, "width": width, "height": height}
    return {extension: content, "txt": caption, "json": info}


def prepare_image(
    content: bytes, resize: int | None, min_side: int, max_aspect: float = float("inf")
) -> tuple[str, bytes, tuple[int, int]]:
    """Decode an image once to be sure, and encode it anew only if it has to be.

    Returns its extension, bytes, and (width, height) as it is seen, which EXIF may turn by a quarter.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.format == "PNG":
                image.verify()  # the checksums of its chunks, which decoding does not look at
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            kind, size = image.format, image.size
            exif = image.getexif()
            turned = exif.get(ExifTags.Base.Orientation, 1) in QUARTER_TURNS
            shorter = min(size)
            if shorter < min_side:
                raise BadSample(f"{size[0]}x{size[1]} is smaller than --min-side {min_side}")
            if max(size) > max_aspect * shorter:
                raise BadSample(f"{size[0]}x{size[1]} is longer than --max-aspect {max_aspect:g} allows")
            shrink = resize is not None and shorter > resize
            if kind in FORMATS and not shrink:
                return FORMATS[kind], content, size[::-1] if turned else size
            if shrink:
                size = tuple(max(1, round(side * resize / shorter)) for side in size)
                image = to_rgb(image).resize(size, Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            if kind == "JPEG" or shrink:
                image.save(buffer, "JPEG", quality=95, exif=exif)
                return "jpg", buffer.getvalue(), size[::-1] if turned else size
            upright = ImageOps.exif_transpose(image)
            to_rgb(upright).save(buffer, "PNG")
            return "png", buffer.getvalue(), upright.size
    except BadSample:
        raise
    except Exception as error:  # see decode.decode_image
        raise BadSample(image_problem(error)) from None


def _sidecar(path: Path) -> Path | None:
    """Find the caption file beside an image."""
    paths = (path.with_suffix(suffix) for suffix in (".txt", ".caption"))
    return next((beside for beside in paths if beside.is_file()), None)


def _read_sidecar(path: Path) -> str:
    """Read the caption file beside an image."""
    if (beside := _sidecar(path)) is None:
        raise BadSample(f"no caption file {path.with_suffix('.txt').name} beside it")
    try:
        return read_text(beside)
    except ConfigError:
        raise BadSample("caption is not UTF-8") from None


def _state(path: Path | None) -> tuple[int, int] | None:
    """Return length and time of the last change of a file, which tell that it is another; None without one."""
    if path is None or not path.is_file():
        return None
    status = path.stat()
    return status.st_size, status.st_mtime_ns


# --- readers of archives --------------------------------------------------------------------------


MEMBERS = tuple(suffix[1:] for suffix in SUFFIXES)  # of tars that may be an image, the preferred first


def read_webdataset(path: Path, config: PackConfig) -> Iterator[Item]:
    """Read the samples of a tar; captions come from txt or json, small json values are carried over."""
    index = scan_tar(path, crc=False)
    yield from _unreadable(index)
    for key, members in read_members(path, index, (*MEMBERS, "txt", "json")):
        image, problem = _image_member(members)
        if problem is not None:
            yield Item(key, None, None, problem=problem)
            continue
        try:
            info = decode_info(members["json"]) if members.get("json") else {}
            caption = members["txt"].decode() if "txt" in members else None
            if caption is None and isinstance(info.get(config.caption_key), list):
                captions = captions_in(info.pop(config.caption_key), config.caption_key)
                caption, info = next(iter(captions), None), {**info, **several(captions)}
        except BadSample as error:
            yield Item(key, image, None, problem=str(error))
        except UnicodeDecodeError:
            yield Item(key, image, None, problem="caption is not UTF-8")
        else:
            kept = {name: value for name, value in info.items() if len(repr(value)) <= LARGEST_KEPT}
            yield Item(key, image, caption, kept)


def read_sa1b(path: Path, config: PackConfig) -> Iterator[Item]:
    """Read the images of an SA-1B tar; the json beside each holds masks and is skipped."""
    index = scan_tar(path, crc=False)
    yield from _unreadable(index)
    for key, members in read_members(path, index, MEMBERS):
        image, problem = _image_member(members)
        yield Item(key, image, None, problem=problem)


def _image_member(members: dict[str, bytes]) -> tuple[bytes | None, str | None]:
    """Find the image of a sample: its content, or why it cannot be used."""
    name = next((name for name in MEMBERS if name in members), None)
    if name is None:
        return None, None
    if not readable(f".{name}"):
        return None, unreadable(name)
    return members[name], None


def readable(suffix: str) -> bool:
    """Tell whether Pillow can read files with this ending on this machine."""
    return Image.registered_extensions().get(suffix.lower()) in Image.OPEN


def unreadable(name: str) -> str:
    """Say why an image of this kind is skipped."""
    return f"a .{name} image, which Pillow cannot read here; convert it, or install a newer Pillow"


def _unreadable(index: ShardIndex) -> Iterator[Item]:
    for problem in index.problems:
        yield Item(problem.key, None, None, problem=problem.reason)


def read_tgz(path: Path, config: PackConfig) -> Iterator[Item]:
    """Read the images of a compressed tar. Damage raises ConfigError: gzip has a checksum of the whole."""
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                suffix = Path(member.name).suffix.lower()
                if member.isfile() and suffix in SUFFIXES:
                    problem = None if readable(suffix) else unreadable(suffix[1:])
                    yield Item(member.name, tar.extractfile(member).read(), None, problem=problem)
            while stream.read(1 << 20):  # to the end, where the checksum is
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ConfigError(f"{path}: damaged archive ({error}); download it again") from None


def read_parquet(path: Path, config: PackConfig) -> Iterator[Item]:
    """Read rows with the encoded image as bytes, or as Hugging Face's {bytes, path}."""
    columns = (config.image_column, config.caption_column)
    open_parquet(path)
    for number, row in enumerate(rows(path, (*columns, *config.keep))):
        image, captions = value_at(row, columns[0]), captions_in(value_at(row, columns[1]), columns[1])
        origin = f"{path.name}:{number}"
        if isinstance(image, dict):
            origin = image.get("path") or origin
            image = image.get("bytes")
        problem = None if isinstance(image, bytes) else f"column '{columns[0]}' holds no image bytes"
        info = kept_values(row, config.keep) | several(captions)
        yield Item(origin, image, next(iter(captions), None), info, problem)


# --- layouts: a new kind of archive is a reader above and a line in ARCHIVES ----------------------


@dataclass(frozen=True)
class CaptionSource:
    """Captions that do not lie in the input itself."""

    table: Path | None = None  # or a folder of .txt files
    id_column: str = "id"  # of the table, for archives
    file_names: bool = False  # take the names of image files
    folder: Path = Path(".journal")  # where the table is kept for look-ups

    def open(self, config: PackConfig) -> CaptionTable | None:
        if self.table is None:
            return None
        return CaptionTable.build(self.table, self.folder, self.id_column, config.caption_column, config.keep)


def make_units(
    layout: str, inputs: Sequence[str], config: PackConfig, captions: CaptionSource
) -> list[ListUnit] | list[ArchiveUnit]:
    """Divide an input of one of LAYOUTS into units of work."""
    if layout in ARCHIVES:
        return archive_units(inputs, ARCHIVES[layout], config, captions.open(config))
    if len(inputs) > 1:
        raise ConfigError(f"pack {layout} takes one input, got {len(inputs)}; pack each into its own --out")
    return TREES[layout](Path(inputs[0]), config, captions)


def folder_units(root: Path, config: PackConfig, captions: CaptionSource) -> list[ListUnit]:
    """Take the images of a tree, in the order of their paths before shuffling.

    Captions are file names (`a_red_fox.jpg` -> "a red fox"), or come from a table, else from files beside.
    """
    if not root.is_dir():
        raise ConfigError(f"'{root}' is not a folder; give the folder that holds the images")
    files = _image_files(root)
    if captions.table is not None:
        named = _table_rows(captions.table, config, root)
        for path in files:  # those without a row are reported as having no caption
            named.setdefault(path, (path, ""))
        return list_units(list(named.values()), config)
    names = captions.file_names
    return list_units([(path, stem(path).replace("_", " ") if names else None) for path in files], config)


def table_units(table: Path, config: PackConfig, captions: CaptionSource) -> list[ListUnit]:
    """Take the image files that the rows of a table name, relative to its folder."""
    return list_units(list(_table_rows(table, config, table.parent).values()), config)


def _image_files(root: Path) -> list[str]:
    """List the images of a tree that Pillow can read; how many others there are is printed."""
    files = sorted(
        str(path) for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    skipped = Counter(suffix for path in files if not readable(suffix := Path(path).suffix.lower()))
    for suffix, count in sorted(skipped.items()):
        print(f"skipped {count} times {unreadable(suffix[1:])}", file=sys.stderr)
    return [path for path in files if Path(path).suffix.lower() not in skipped]


def _table_rows(table: Path, config: PackConfig, root: Path) -> dict[str, ListItem]:
    """Read {path of an image: its item}; raises ConfigError for an image that is named twice."""
    items: dict[str, ListItem] = {}
    twice = []
    for row in rows(table, (config.image_column, config.caption_column, *config.keep)):
        path = str(root / str(value_at(row, config.image_column)))
        if path in items:
            twice.append(path)
        captions = captions_in(value_at(row, config.caption_column), config.caption_column)
        info = kept_values(row, config.keep) | several(captions)
        caption = next(iter(captions), "")
        items.setdefault(path, (path, caption, info) if info else (path, caption))
    if twice:
        raise ConfigError(
            f"{table}: {len(twice)} images appear twice, the first is {twice[0]}; leave one row per image"
        )
    return items


def list_units(items: Sequence[ListItem], config: PackConfig) -> list[ListUnit]:
    """Cut files into shards; a sample's number is its place before shuffling."""
    numbers = list(range(len(items)))
    if config.shuffle is not None:
        numbers = permutation(len(items), "pack", config.shuffle).tolist()
    size = config.samples_per_shard
    units = []
    for start in range(0, len(items), size):
        part = numbers[start : start + size]
        units.append(ListUnit(f"{start // size:06d}", [items[i] for i in part], part, config))
    return units


def archive_units(
    patterns: Iterable[str],
    reader: Callable[..., Iterator[Item]],
    config: PackConfig,
    captions: CaptionTable | None = None,
) -> list[ArchiveUnit]:
    """Make one unit per archive, numbered in the order given."""
    if reader in IMAGES_ONLY and captions is None:
        raise ConfigError(
            f"pack {reader.__name__.removeprefix('read_')} needs --captions: the tars hold none"
        )
    paths = expand_shards(list(patterns), "input")
    return [ArchiveUnit(f"{i:05d}", path, reader, config, captions) for i, path in enumerate(paths)]


def journeydb_units(
    root: Path, config: PackConfig, captions: CaptionSource
) -> list[ListUnit] | list[ArchiveUnit]:
    """Take `imgs/*.tgz` or extracted `imgs/*/`, with captions from the annotation file found beside them."""
    tables = sorted(path for path in root.glob("*anno*.json*") if path.is_file())
    if len(tables) != 1:
        raise ConfigError(
            f"{root}: expected one annotation file *anno*.jsonl[.tgz], found {len(tables)}; pass --captions"
        )
    images = root / "imgs" if (root / "imgs").is_dir() else root
    table = CaptionTable.build(tables[0], captions.folder, "img_path", config.caption_column, config.keep)
    if archives := sorted(map(str, images.glob("*.tgz"))):
        return archive_units(archives, read_tgz, config, table)
    found = {path: table.find(path) or ("", {}) for path in _image_files(images)}
    items = [(path, caption, info) if info else (path, caption) for path, (caption, info) in found.items()]
    return list_units(items, config)


ARCHIVES: dict[str, Callable[[Path, PackConfig], Iterator[Item]]] = {
    "parquet": read_parquet,
    "webdataset": read_webdataset,
    "img2dataset": read_webdataset,
    "sa1b": read_sa1b,
}
IMAGES_ONLY = (read_sa1b, read_tgz)  # these need a table of captions
TREES: dict[str, Callable[[Path, PackConfig, CaptionSource], list]] = {
    "folder": folder_units,
    "table": table_units,
    "journeydb": journeydb_units,
}
LAYOUTS = (*TREES, *ARCHIVES)
CAPTION_COLUMN = {"journeydb": "prompt"}  # others: "caption"
