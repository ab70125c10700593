"""Images of many prompts in a folder: drawn once, continued by the same command, divided over processes.

    OUT/manifest.jsonl     a line per file: prompt, seeds, file name, the key below, the prompt's record
    OUT/settings-KEY.json  all settings behind a key: weights, sampling settings, precision

A file is drawn again only if its manifest line is not there, or is of another prompt, seed or key. Files are written
whole before their line is, so a kill costs at most the batch that was being drawn. Of several processes each draws every
world-th batch and has a manifest of its own; whoever finds everything drawn joins them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from nitro_e.config import ConfigError, parse_json, read_text
from nitro_e.files import append_lines, atomic_file, save_png, short_hash
from nitro_e.record.progress import bar
from nitro_e.sampling.layouts import Drawing
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.sheets import image_grid

MANIFEST = "manifest.jsonl"


def draw_folder(
    pipeline: TextToImage,
    drawings: Sequence[Drawing],
    folder: Path,
    about: Mapping[str, Any],
    *,
    overrides: Mapping[str, Any],
    batch_size: int,
    rank: int = 0,
    world: int = 1,
) -> int:
    """Draw what `folder` does not hold yet and return how many images that were in this process.

    about: everything the images depend on besides prompts and seeds, stored beside them. overrides: fields of
    SamplingConfig. ConfigError if two drawings want the same file.
    """
    check_files(drawings)
    key = short_hash(about)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / f"settings-{key}.json") as file:
        file.write(json.dumps(about, indent=1).encode())
    known = read_manifest(folder)

    def missing(item: Drawing) -> bool:
        return known.get(item.file) != line_of(item, key) or not (folder / item.file).is_file()

    # Divided before what is there is left out: processes that start at different times agree on who draws what.
    own = list(batched(drawings, batch_size))[rank::world]
    batches = [batch for batch in ([item for item in batch if missing(item)] for batch in own) if batch]
    total = sum(len(item.seeds) for batch in batches for item in batch)
    mine = folder / (MANIFEST if world == 1 else f"manifest.rank{rank}.jsonl")
    with bar(total=total, desc="sample", unit="img") as shown:
        for batch in batches:
            _draw_batch(pipeline, batch, folder, about, overrides, single=len(batches) == 1)
            append_lines(mine, [line_of(item, key) for item in batch])
            shown.update(sum(len(item.seeds) for item in batch))
    join_manifests(folder, drawings, key)
    return total


def batched(drawings: Iterable[Drawing], batch_size: int) -> Iterator[list[Drawing]]:
    """Lists of drawings with about `batch_size` images each; a drawing is never divided."""
    batch: list[Drawing] = []
    for item in drawings:
        if batch and sum(len(other.seeds) for other in batch) + len(item.seeds) > batch_size:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _draw_batch(
    pipeline: TextToImage,
    batch: Sequence[Drawing],
    folder: Path,
    about: Mapping[str, Any],
    overrides: Mapping[str, Any],
    single: bool,
) -> None:
    repeated = [item for item in batch for _ in item.seeds]
    drawn = pipeline(
        [item.prompt for item in repeated],
        negative_prompt=[item.negative_prompt for item in repeated],
        seeds=[seed for item in batch for seed in item.seeds],
        batch_size=len(repeated),
        progress=single,
        **overrides,
    )
    images = iter(drawn.images)
    for item in batch:
        own = [next(images) for _ in item.seeds]
        path = folder / item.file
        path.parent.mkdir(parents=True, exist_ok=True)
        image = own[0] if len(own) == 1 else image_grid(own, columns=round(len(own) ** 0.5), gap=0)
        details = {**about["sampling"], "negative_prompt": item.negative_prompt, "seed": item.seeds[0]}
        save_png(image, path, png_text(item.prompt, {**details, "model": about["model"]}))


def png_text(prompt: str, details: Mapping[str, Any]) -> PngInfo:
    """The text entries of a PNG: its prompt and settings."""
    info = PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_itxt("settings", json.dumps(details))
    return info


def check_files(drawings: Sequence[Drawing]) -> None:
    """ConfigError for names that come twice or lead out of the folder."""
    seen: set[str] = set()
    for item in drawings:
        if item.file in seen:
            raise ConfigError(f"two prompts want the file '{item.file}'; give every prompt its own id")
        if Path(item.file).is_absolute() or ".." in Path(item.file).parts:
            raise ConfigError(f"file '{item.file}' lies outside the folder; use ids without '/' and '..'")
        seen.add(item.file)


# ---- manifests


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest line of every file, from the manifests of all processes; a last line cut short by a kill is left out."""
    lines: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("manifest*.jsonl"), key=lambda path: path.name != MANIFEST):
        with contextlib.suppress(FileNotFoundError):  # joined by another process meanwhile
            for text in read_text(path).splitlines():
                with contextlib.suppress(ConfigError, KeyError, TypeError):
                    line = parse_json(text, str(path))
                    lines[line["file"]] = line
    return lines


def line_of(item: Drawing, key: str) -> dict[str, Any]:
    """Make the manifest's line of a file; equal lines are equal images."""
    return {**item._asdict(), "seeds": list(item.seeds), "key": key}


def join_manifests(folder: Path, drawings: Sequence[Drawing], key: str) -> None:
    """Write one manifest, in the order of the drawings, once all of them are there; the processes' own are removed."""
    lines = read_manifest(folder)
    if not all(lines.get(item.file) == line_of(item, key) for item in drawings):
        return  # another process is still drawing
    wanted = [item.file for item in drawings]
    order = dict.fromkeys([*(file for file in lines if file not in set(wanted)), *wanted])
    with atomic_file(folder / MANIFEST) as file:
        file.write(b"".join(json.dumps(lines[name]).encode() + b"\n" for name in order))
    for path in folder.glob("manifest.rank*.jsonl"):
        path.unlink(missing_ok=True)
