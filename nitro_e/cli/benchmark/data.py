"""Measure how fast samples are found and read, beside plain webdataset on the same shards.

    nitro-e benchmark data [--shards 8] [--json FILE]

Samples per CPU-second of the reading process, best of several passes, files in the page cache; "through one
worker" is wall time. The shards (latents 32x16x16 float16 and captions) are made in a temporary folder.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from nitro_e.cli import common as cli
from nitro_e.cli.benchmark.report import finish
from nitro_e.cli.benchmark.report import flags as report_flags
from nitro_e.data import DataConfig, open_data
from nitro_e.data.decode import decode_image
from nitro_e.data.index import scan_tar, shard_index
from nitro_e.data.making import write_shard
from nitro_e.data.order import Order

SAMPLES, BATCH = 1000, 256
TARGETS = {
    "index scan, headers only": 80_000,
    "indexed, in process": 200_000,
    "indexed, through one worker (wall)": 30_000,
}


def measure(shards: int = 8, repeats: int = 5) -> dict[str, float]:
    """Measure all figures, by name: samples per second, and the order's milliseconds."""
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as folder:
        paths = [Path(folder) / f"latents-{i:06d}.tar" for i in range(shards)]
        rng = np.random.default_rng(0)
        for i, path in enumerate(paths):
            write_shard(path, _samples(rng, i))
        total = shards * SAMPLES
        found = {
            "index scan, headers only": _rate(
                lambda: [scan_tar(path, crc=False) for path in paths], total, repeats
            ),
            "index scan, with CRC of the content": _rate(
                lambda: [scan_tar(path) for path in paths], total, repeats
            ),
        }
        found |= (
            _indexed(paths, total, repeats)
            | _stream(paths, total, repeats)
            | _webdataset(paths, total, repeats)
        )
    plain = found["webdataset .decode()"]
    found |= {
        f"{name} / webdataset .decode()": found[name] / plain for name in ("indexed, in process", "stream")
    }
    return found | order_cost() | _images(repeats)


def order_cost(batch: int = 2048) -> dict[str, float]:
    """Time the order at 25M samples in 25,000 shards: ms of CPU per global batch, and of a jump to a far one."""
    sizes, found = [[1000] * 11_100, [1000] * 4_400, [1000] * 9_500], {}
    for name, weights in (("union", None), ("mixture", [11.1, 4.4, 9.5])):
        order = Order(sizes, weights, seed=0, stage="benchmark")
        start = time.process_time()
        for i in range(200):
            order.ids(range(i * batch, (i + 1) * batch))
        spent = time.process_time() - start
        found[f"order of 25M samples, {name}: ms per {batch} samples"] = spent / 200 * 1e3
        start = time.process_time()
        order.ids(range(10**10, 10**10 + batch))
        spent = time.process_time() - start
        found[f"order of 25M samples, {name}: ms to reach position 1e10"] = spent * 1e3
    return found


def _samples(rng: np.random.Generator, shard: int) -> Iterator[dict]:
    for i in range(SAMPLES):
        latent = rng.standard_normal((32, 16, 16), np.float32).astype(np.float16)
        caption = f"a photograph of number {i} on a table, with a blue bowl of fruit behind it"
        yield {"__key__": f"sample_{shard:05d}{i:06d}", "npy": latent, "txt": caption}


def _rate(
    work: Callable[[], object], count: int, repeats: int, clock: Callable[[], float] = time.process_time
) -> float:
    """Measure the best rate of `work`, which handles `count` samples."""
    best = 0.0
    for _ in range(repeats):
        start = clock()
        work()
        best = max(best, count / (clock() - start))
    return best


def _read(batches: Iterator, count: int) -> None:
    for _ in islice(batches, count):
        pass


def _indexed(paths: list[Path], total: int, repeats: int) -> dict[str, float]:
    for path in paths:
        shard_index(path)
    found, steps = {}, total // BATCH

    def opened(workers: int) -> Iterator:
        config = DataConfig(shards=tuple(map(str, paths)), batch_size=BATCH, workers=workers)
        return open_data(config, need_pixels=False, seed=0, stage="benchmark").records()

    best = 0.0
    for _ in range(repeats):
        batches = opened(0)
        next(batches)
        best = max(best, _rate(lambda batches=batches: _read(batches, steps - 1), (steps - 1) * BATCH, 1))
    found["indexed, in process, first reading (CRC and NaN checked)"] = best
    _read(batches, 2 * steps)
    found["indexed, in process"] = _rate(lambda: _read(batches, steps), steps * BATCH, repeats)
    batches = opened(1)
    _read(batches, 2 * steps)
    rate = _rate(lambda: _read(batches, steps), steps * BATCH, repeats, time.perf_counter)
    found["indexed, through one worker (wall)"] = rate
    batches.close()
    return found


def _stream(paths: list[Path], total: int, repeats: int) -> dict[str, float]:
    config = DataConfig(shards=tuple(map(str, paths)), batch_size=BATCH, workers=0, reader="stream")
    batches = open_data(config, need_pixels=False, seed=0, stage="benchmark").records()
    _read(batches, 2 * total // BATCH)
    steps = total // BATCH
    return {"stream": _rate(lambda: _read(batches, steps), steps * BATCH, repeats)}


def _webdataset(paths: list[Path], total: int, repeats: int) -> dict[str, float]:
    import webdataset

    def read(decode: bool) -> None:
        data = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
        for _ in data.decode() if decode else data:
            pass

    return {
        "webdataset, nothing decoded": _rate(lambda: read(False), total, repeats),
        "webdataset .decode()": _rate(lambda: read(True), total, repeats),
    }


def _images(repeats: int, count: int = 20) -> dict[str, float]:
    """Measure decoding of a JPEG of 512 px."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).resize((512, 512), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
    return {
        f"JPEG 512 px -> {side} px": _rate(
            lambda side=side: [decode_image(buffer.getvalue(), side) for _ in range(count)], count, repeats
        )
        for side in (512, 224)
    }


def report(found: dict[str, float]) -> str:
    lines = []
    for name, value in found.items():
        target = TARGETS.get(name)
        if name.startswith("order") and "per" in name:
            note = f"target <= 0.5  {'met' if value <= 0.5 else 'MISSED'}"
        else:
            note = f"target >= {target:,}  {'met' if value >= target else 'MISSED'}" if target else ""
        lines.append(
            f"{name:58} {value:12,.0f}  {note}" if value >= 100 else f"{name:58} {value:12.2f}  {note}"
        )
    return "\n".join(line.rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shards", type=cli.whole(1, 10_000), default=8, metavar="N", help="of 1,000 samples each"
    )
    parser.add_argument("--repeats", type=cli.whole(1), default=5, metavar="N")
    report_flags(parser)
    args = parser.parse_args(argv)

    def command() -> None:
        found = measure(args.shards, args.repeats)
        print(report(found))
        finish(found, args)

    return cli.run(command)
