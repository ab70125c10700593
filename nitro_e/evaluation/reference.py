"""Real images to compare drawn ones with: a folder of image files, or webdataset shards with captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nitro_e.config import ConfigError
from nitro_e.data.catalog import IMAGES, expand_shards, open_catalog
from nitro_e.data.dataset import TarDataset
from nitro_e.data.decode import BadSample, decode_image
from nitro_e.data.order import Order
from nitro_e.data.spec import ReadSpec, image_extensions

BATCH = 32


class Reference:
    """The real images of a distance: a folder of image files, or webdataset shards with captions."""

    def __init__(self, source: str) -> None:
        folder = Path(source).expanduser()
        self.source = source
        self.files: list[Path] = []
        self.catalog = None
        if folder.is_dir():
            self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower()[1:] in IMAGES)
        else:
            self.catalog = open_catalog([expand_shards([source], "--reference")], progress=True)
        if len(self) < 2:
            raise ConfigError(
                f"--reference: '{source}' holds {len(self)} images; give a folder of images or shards"
            )

    def __len__(self) -> int:
        return len(self.catalog) if self.catalog is not None else len(self.files)

    def prompts(self, caption_key: str = "caption") -> list[str]:
        """Read the captions of shards, in order; ConfigError for a folder, which has none."""
        if self.catalog is None:
            raise ConfigError(
                f"--prompts: folder '{self.source}' has no captions; name a file of prompts, --prompts FILE"
            )
        return [prompt for batch in self._records((), 64, caption_key) for prompt in batch.prompts]

    def identities(self) -> list[list]:
        """Identify every image: another file or other content has another identity."""
        if self.catalog is not None:
            return [[self.catalog.digest, index] for index in range(len(self))]
        stats = [(path, path.stat()) for path in self.files]
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def images(self, resolution: int, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Read images in batches (B, 3, R, R) uint8: the shorter side resized to R, the centre cropped.

        start, stop: numbers of images, all by default.
        """
        if self.catalog is not None:
            for batch in self._records(image_extensions(self.catalog), resolution, "caption", start, stop):
                yield batch.pixels
            return
        yield from read_images(self.files[start:stop], resolution)

    def _records(
        self,
        images: Sequence[str],
        resolution: int,
        caption_key: str,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[Any]:
        info = bool(self.catalog.holders("json")[0])
        spec = ReadSpec(tuple(images), info, (resolution, resolution), caption_key)
        dataset = TarDataset(self.catalog, Order(self.catalog.sizes, seed=0, stage="reference"), spec)
        end = len(self) if stop is None else min(stop, len(self))
        for first in range(start, end, BATCH):
            records, failed = dataset.load(np.arange(first, min(first + BATCH, end)))
            if failed:
                raise ConfigError(
                    f"--reference: {next(iter(failed.values()))}; mend it, a distance needs the same images each time"
                )
            yield records


def read_images(paths: Sequence[Path], resolution: int) -> Iterator[Tensor]:
    """Read image files in batches (B, 3, R, R) uint8."""
    for start in range(0, len(paths), BATCH):
        yield torch.stack([_read(path, resolution) for path in paths[start : start + BATCH]])


def _read(path: Path, resolution: int) -> Tensor:
    try:
        return torch.from_numpy(decode_image(path.read_bytes(), resolution).copy())
    except BadSample as error:
        raise ConfigError(f"{path}: {error}; mend or remove it") from error
