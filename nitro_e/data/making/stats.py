"""What is in the shards, what comes at a step, and what a data set of some size will cost.

Storage is counted from the tar format, compute from the FLOPs of one sample (multiply and add are two):
DC-AE and E-MMDiT at 512 px scale with the number of pixels, Llama 3.2 1B with 128 tokens per caption.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from nitro_e.config import Config, ConfigError, Ge, Gt
from nitro_e.data.catalog import IMAGES
from nitro_e.data.decode import BadSample, decode_array, decode_image
from nitro_e.data.index import BLOCK, shard_index
from nitro_e.data.remote import local_path
from nitro_e.record.progress import bar

# TFLOP per sample at 512 px, counted with torch's FlopCounterMode.
DC_AE_ENCODE, LLAMA_TRUNK, DINOV2_FORWARD, TRAIN_STEP = 1.295, 0.251, 0.046, 0.241
TEXT_WIDTH, TEXT_LENGTH, VISION_WIDTH, LATENT_CHANNELS, STRIDE = 2048, 128, 768, 32, 32


def stats(shards: Sequence[str], probe: int = 16) -> dict:
    """Counts over all shards; sizes, captions and latents from the first `probe` samples of each shard."""
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
    """The first samples as plain data; with `sheet` their images side by side in one PNG."""
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
    """ConfigError for a sample that is not."""
    try:
        yield
    except (BadSample, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{Path(path).name}:{key}: {error}; nitro-e data verify --deep finds all such samples"
        ) from None


def _samples(path: str, count: int):
    """(key, {extension: bytes}) of the first samples of a shard."""
    index = shard_index(path)
    with open(local_path(path), "rb") as file:
        for row in index.rows[: max(0, count)]:
            content = {}
            for name in index.extensions:
                offset, size, _ = row[name].tolist()
                if offset:
                    file.seek(offset)
                    content[name] = file.read(size)
            yield row["__key__"].decode(errors="replace"), content


def _quantiles(values: list[int]) -> dict[str, float] | None:
    if not values:
        return None
    quantiles = np.quantile(values, [0, 0.1, 0.5, 0.9, 1]).tolist()
    return dict(zip(("min", "10%", "median", "90%", "max"), quantiles)) | {
        "mean": round(float(np.mean(values)), 2)
    }


@dataclass(frozen=True, kw_only=True)
class Plan(Config):
    """Assumptions of `plan_lines`."""

    OPTIONS: ClassVar[bool] = True

    images: Annotated[int, Ge(1)] = 25_000_000
    resolution: Annotated[int, Ge(1)] = 512
    image_bytes: Annotated[int, Ge(1)] = 69_000  # a 512 px JPEG
    caption_bytes: Annotated[int, Ge(0)] = 200
    tokens: Annotated[float, Gt(0)] = 66.0  # real tokens per caption, for ragged text
    samples_trained: Annotated[int, Ge(0)] = 307_000_000  # 150,000 steps of 2,048
    tflops: Annotated[float, Gt(0)] = 300.0  # sustained, per device
    samples_per_second: Annotated[float, Gt(0)] = 2370.0  # what training consumes


def member_bytes(size: float) -> float:
    """A member in a tar: its header and whole blocks of content."""
    return BLOCK + np.ceil(size / BLOCK) * BLOCK


def plan_storage(plan: Plan) -> dict[str, float]:
    """Bytes per sample of each column, as `pack` and `encode` write it."""
    cells = plan.resolution / STRIDE
    npy = 128  # header of a small .npy
    caption = member_bytes(plan.caption_bytes)
    return {
        "images (jpg, txt, json)": member_bytes(plan.image_bytes) + 2 * caption,
        "latents (npy, txt, json)": member_bytes(npy + 2 * LATENT_CHANNELS * cells**2) + 2 * caption,
        "text padded": member_bytes(npy + 2 * TEXT_LENGTH * TEXT_WIDTH) + member_bytes(npy + TEXT_LENGTH),
        "text ragged": member_bytes(npy + 2 * plan.tokens * TEXT_WIDTH),
        "features (DINOv2)": member_bytes(npy + 2 * cells**2 * VISION_WIDTH),
    }


def plan_compute(plan: Plan) -> dict[str, float]:
    """Device hours."""
    area = (plan.resolution / 512) ** 2
    hours = 1 / plan.tflops / 3600
    return {
        "encode latents, once": plan.images * DC_AE_ENCODE * area * hours,
        "encode text, once": plan.images * LLAMA_TRUNK * hours,
        "encode features, once": plan.images * DINOV2_FORWARD * area * hours,
        "text online, whole training": plan.samples_trained * LLAMA_TRUNK * hours,
        "features online, whole training": plan.samples_trained * DINOV2_FORWARD * area * hours,
        "E-MMDiT training itself": plan.samples_trained * TRAIN_STEP * area * hours,
    }


def plan_lines(plan: Plan) -> list[str]:
    """The two tables, and what they say about text."""
    lines = [
        f"{plan.images:,} images at {plan.resolution} px",
        "",
        f"{'storage':34}{'B/sample':>10}{'total':>12}{'at training speed':>20}",
    ]
    for name, size in plan_storage(plan).items():
        rate = size * plan.samples_per_second / 1e6
        lines.append(f"  {name:32}{size:10,.0f}{_bytes(size * plan.images):>12}{rate:15,.0f} MB/s")
    lines += ["", f"{'compute':34}{'device hours':>14}   at {plan.tflops:g} TFLOP/s each"]
    lines += [f"  {name:32}{hours:14,.1f}" for name, hours in plan_compute(plan).items()]
    compute, storage = plan_compute(plan), plan_storage(plan)
    saved = compute["text online, whole training"] - compute["encode text, once"]
    cost = _bytes(storage["text padded"] * plan.images), _bytes(storage["text ragged"] * plan.images)
    lines += [
        "",
        f"storing text saves {saved:,.0f} device hours and costs {cost[0]} padded, {cost[1]} ragged",
    ]
    return lines


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
