"""Read samples in the order of `order.py`.

    data = open_data(DataConfig(shards=("data/train-*.tar",)), need_pixels=False, seed=0, stage="pretrain")
    for records in data.records(step=1000, micro_batches_per_step=2, rank=0, world=8): ...

Global batch t holds the positions [t * B, (t + 1) * B), B = batch_size * micro_batches_per_step * world; a
rank takes its contiguous slice, a micro-batch a slice of that. The loader is a plain torch DataLoader and
must not be given to accelerate, which would split it a second time. Left out: epochs (a stage counts steps).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Sampler

from nitro_e.config import ConfigError
from nitro_e.data.catalog import Catalog, Column
from nitro_e.data.data_config import DataConfig
from nitro_e.data.dataset import Records, TarDataset
from nitro_e.data.loader import load
from nitro_e.data.manifests import digest, read_manifests
from nitro_e.data.order import AnyOrder
from nitro_e.data.prefetch import Prefetcher
from nitro_e.data.problems import BadSamples
from nitro_e.data.spec import ReadSpec
from nitro_e.interfaces import TextEmbedding


class StepSampler(Sampler):
    """Yields ranges of positions without end: one rank's micro-batches from optimizer step `step` on."""

    def __init__(self, batch_size: int, *, step: int, micro_batches_per_step: int, rank: int, world: int):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not in a world of {world}")
        self.batch_size, self.step = batch_size, step
        self.micro_batches, self.rank, self.world = micro_batches_per_step, rank, world

    def __iter__(self) -> Iterator[range]:
        micro = (self.step * self.world + self.rank) * self.micro_batches
        while True:
            for i in range(micro, micro + self.micro_batches):
                yield range(i * self.batch_size, (i + 1) * self.batch_size)
            micro += self.world * self.micro_batches


class Data:
    """An opened data set; what `Records` will hold is settled.

    has_latents, has_pixels, has_text, has_features; latent_shape (C, h, w), text_format "padded" or "ragged",
    or None.
    """

    def __init__(
        self,
        config: DataConfig,
        catalog: Catalog,
        spec: ReadSpec,
        order: AnyOrder | None,
        specs: Sequence[ReadSpec] = (),
    ):
        """specs: what is read of each group of an order that has groups; `spec` is then that of the first."""
        self.config, self.catalog, self.spec, self.order, self.specs = config, catalog, spec, order, specs
        self.filtered: list[str] = []  # what `where` left out, a line for each source that has conditions
        self.has_latents, self.has_pixels = spec.latents is not None, bool(spec.images)
        self.has_text, self.has_features = spec.text is not None, spec.features is not None
        self.latent_shape = spec.latents.shape if spec.latents else None
        self.text_format = None if spec.text is None else "padded" if spec.mask else "ragged"
        total = len(self) + len(catalog.problems)
        self.bad = BadSamples(total, config.max_bad_fraction, catalog.problems)

    def __len__(self) -> int:
        return len(self.catalog)

    def null_text(self) -> TextEmbedding | None:
        """Read the null prompt's embedding, (1, L, D) and (1, L), if `encode` left one beside the stored text."""
        columns, _ = self.catalog.holders("text.npy") if self.has_text else ([], None)
        folders = dict.fromkeys(Path(path).parent for column in columns for path in column.paths if path)
        path = next((file for folder in folders if (file := folder / "null-text.npz").is_file()), None)
        if path is None:
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                return TextEmbedding(*(torch.from_numpy(file[name])[None] for name in ("tokens", "mask")))
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigError(
                f"{path} is damaged ({error}); encode the text again"
                " (nitro-e data encode --text ... --overwrite)"
            ) from None

    def encoders(self) -> dict[str, dict[str, dict]]:
        """Read what made each column from the manifests beside its shards: {"latents": {"x-000.tar": {"name": ...}}}.

        Of shards that were made alike the first stands for all.
        """
        made: dict[str, dict[str, dict]] = {}
        folders = {Path(path).parent for column in self.catalog.columns for path in column.paths if path}
        manifests = {
            folder: {entry["shard"]: entry for entry in read_manifests({folder}).values()}
            for folder in folders
        }
        for column in self.catalog.columns:
            seen = set()
            for path in map(Path, filter(None, column.paths)):
                encoder = manifests[path.parent].get(path.name, {}).get("encoder")
                if encoder is not None and (identity := digest(encoder)) not in seen:
                    seen.add(identity)
                    made.setdefault(column.name, {})[path.name] = encoder
        return made

    def fingerprint(self) -> dict:
        """Describe content and order as plain data; a run resumes exactly only when they are equal."""
        where = [[str(condition) for condition in part] for part in self.config.conditions]
        chosen = {"captions": self.config.captions, "where": where if any(where) else None}
        chosen = {name: value for name, value in chosen.items() if value}
        return {"samples": len(self), "content": self.catalog.digest, **self.order.fingerprint(), **chosen}

    def keys(self, positions: range | np.ndarray) -> list[str]:
        """Name the samples at these positions (`shard.tar:key`) without reading any, so before replacement."""
        return [self.catalog.name_of(sample) for sample in self.order.ids(positions)]

    def records(
        self,
        step: int = 0,
        *,
        micro_batches_per_step: int = 1,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
    ) -> Generator[Records, None, None]:
        """Yield the micro-batches of one rank from optimizer step `step` on, without end.

        Closing the iterator ends the workers. Raises BadDataError when too many samples are bad, ConfigError
        when a shard can no longer be read, TrainingError when a worker was killed.
        """
        sampler = StepSampler(
            self.config.batch_size,
            step=step,
            micro_batches_per_step=micro_batches_per_step,
            rank=rank,
            world=world,
        )
        dataset = TarDataset(self.catalog, self.order, self.spec, self.specs)
        batches = load(dataset, self.config.workers, batch_sampler=sampler, pin_memory=pin_memory)
        # positions that all ranks use up with one micro-batch each
        stride = self.config.batch_size * world
        position = step * micro_batches_per_step * stride
        prefetcher = Prefetcher(self.catalog, self.order, self._columns())
        try:
            prefetcher.advance(position)
            for records in self._counted(batches):
                position += stride
                prefetcher.advance(position)
                yield records
        finally:
            prefetcher.close()

    def _counted(self, batches: Iterator[Records]) -> Iterator[Records]:
        """Pass batches on; raises ConfigError for a worker's failure, BadDataError for too many bad samples."""
        for records in batches:
            if records.failure is not None:
                raise ConfigError(records.failure)
            self.bad.add(records.bad, read=len(records))
            yield records

    def _columns(self) -> list[Column]:
        """List the columns whose tars are read."""
        spec = self.spec
        wanted = {
            "txt": True,
            "json": spec.info,
            "npy": spec.latents,
            "features.npy": spec.features,
            "text.npy": spec.text,
            **{f"text_{name}.npy": spec.text for name, _ in spec.captions},
            **dict.fromkeys(spec.images, True),
            **dict(spec.extra),
        }
        found = [
            column for member, read in wanted.items() if read for column in self.catalog.holders(member)[0]
        ]
        return [column for column in self.catalog.columns if column in found]
