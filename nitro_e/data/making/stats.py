"""Look into shards: counts, sizes and captions of all, and the first samples as they are."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from nitro_e.config import ConfigError
from nitro_e.data.catalog import IMAGES
from nitro_e.data.decode import BadSample, decode_array, decode_image
from nitro_e.data.index import read_members, shard_index
from nitro_e.data.remote import local_path
from nitro_e.record.progress import bar


def stats(shards: Sequence[str], probe: int = 16) -> dict:
    """Count samples and members of all shards; captions, sizes and latents of the first `probe` of each."""
    members, sizes, kinds = Counter(), Counter(), Counter()
    words, sides, moments, samples = [], [], [], 0
    for path in bar(shards, desc="stats", unit="shard"):
        index = shard_index(path)
        samples += len(index.rows)
        for name in index.extensions:
            there = index.rows[name]["offset"] > 0
            members[name] += int(there.sum())
            sizes[name] += int(index.rows[name]["size"][there].sum())
        for key, content in _samples(path, probe):
            if "txt" in content:
                words.append(len(content["txt"].decode(errors="replace").split()))
            with _readable(path, key):
                if "npy" in content:
                    latent = decode_array(content["npy"]).astype(np.float64)
                    kinds[f"latent {latent.shape}"] += 1
                    moments.append((latent.mean(), latent.std()))
                for name in (name for name in IMAGES if name in content):
                    with Image.open(io.BytesIO(content[name])) as image:
                        sides.append(min(image.size))
                        kinds[f"{image.format} {image.mode}"] += 1
    return {
        "shards": len(shards),
        "samples": samples,
        "members": {
            name: {"count": members[name], "mean_bytes": round(sizes[name] / max(1, members[name]))}
            for name in members
        },
        "caption_words": _quantiles(words),
        "image_shorter_side": _quantiles(sides),
        "kinds": dict(kinds),
        "latent_mean": float(np.mean([m for m, _ in moments])) if moments else None,
        "latent_std": float(np.mean([s for _, s in moments])) if moments else None,
        "probed": len(words) or len(sides) or len(moments),
    }


def head(shards: Sequence[str], count: int, sheet: Path | None = None) -> list[dict]:
    """Describe the first samples as plain data; `sheet` gets their images side by side in one PNG."""
    found, tiles = [], []
    for path in shards:
        for key, content in _samples(path, count - len(found)):
            line = {
                "sample": f"{Path(path).name}:{key}",
                "members": {name: len(c) for name, c in content.items()},
            }
            line["caption"] = content["txt"].decode(errors="replace") if "txt" in content else None
            with _readable(path, key):
                for name in content:
                    if name.endswith("npy"):
                        array = decode_array(content[name])
                        line[name] = f"{array.dtype} {array.shape}"
                image = next((content[name] for name in IMAGES if name in content), None)
                if image is not None and sheet is not None:
                    tiles.append(decode_image(image, 128).transpose(1, 2, 0))
            found.append(line)
        if len(found) >= count:
            break
    if sheet is not None:
        if not tiles:
            raise ConfigError(f"--sheet {sheet}: the first {count} samples have no images")
        columns = int(np.ceil(np.sqrt(len(tiles))))
        canvas = Image.new("RGB", (128 * columns, 128 * -(-len(tiles) // columns)), "white")
        for i, tile in enumerate(tiles):
            canvas.paste(Image.fromarray(tile), (128 * (i % columns), 128 * (i // columns)))
        canvas.save(sheet)
    return found


@contextlib.contextmanager
def _readable(path: str, key: str) -> Iterator[None]:
    """Raise ConfigError for a sample that cannot be decoded."""
    try:
        yield
    except (BadSample, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{Path(path).name}:{key}: {error}; nitro-e data verify --deep finds all such samples"
        ) from None


def _samples(path: str, count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Read key and {extension: content} of the first samples of a shard."""
    return islice(read_members(local_path(path), shard_index(path)), max(0, count))


def _quantiles(values: list[int]) -> dict[str, float] | None:
    if not values:
        return None
    quantiles = np.quantile(values, [0, 0.1, 0.5, 0.9, 1]).tolist()
    return dict(zip(("min", "10%", "median", "90%", "max"), quantiles)) | {
        "mean": round(float(np.mean(values)), 2)
    }
