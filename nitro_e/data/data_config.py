"""The `data` section of a recipe says where the samples are and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from nitro_e.config import Config, ConfigError, Fraction, Ge, Gt, Le
from nitro_e.data.catalog import MissingShards, expand_shards
from nitro_e.data.conditions import Condition, parse


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Config):
    """One part of a mixture."""

    shards: tuple[str, ...]  # paths, globs, braces, URLs, or @file with a list of them
    # its share of every 512 samples, relative to the others; 0 drops the source
    weight: Annotated[float, Ge(0)] | None = None
    # conditions on values of the json member, such as {aesthetic: ">= 5.0"}, besides those of data.where
    where: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Says where the samples are and how they are read; the seed of their order belongs to the run."""

    # webdataset tars: paths, globs, brace ranges, URLs, @list.txt
    shards: tuple[str, ...] = ()
    # or several sets; without weights, their union
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    # stream: no scan of all shards at the start, but an order that depends on processes and workers
    reader: Literal["indexed", "stream"] = "indexed"
    # samples per process and micro-batch: no key of recipes, it follows from their `batch`
    batch_size: Annotated[int, Ge(1), Le(65536)] = field(default=32, metadata={"key": None})
    # samples of an optimiser step: no key of recipes either; None: batch_size. Only the order of buckets asks
    global_batch: Annotated[int, Ge(1)] | None = field(default=None, metadata={"key": None})
    # aspect buckets, HEIGHTxWIDTH in pixels: a batch has images of one size, the one nearest to their shape
    buckets: tuple[str, ...] = ()
    # pixels per side
    resolution: Annotated[int, Ge(1), Le(65536)] = 512
    # loader processes per training process; 0 reads in the training process
    workers: Annotated[int, Ge(0), Le(512)] = 2
    # key of the caption in the json member, where there is no txt
    caption_key: str = "caption"
    # weights of several captions per image: txt, or keys of the json member that hold text or a list of texts
    captions: dict[str, Annotated[float, Ge(0)]] = field(default_factory=dict)
    # conditions on values of the json member, such as {aesthetic: ">= 5.0", width: ">= 512"}
    where: dict[str, str] = field(default_factory=dict)
    # read stored latents if the shards have them; false decodes images instead
    use_latents: bool = True
    # training stops when more of the data set than this is unusable
    max_bad_fraction: Fraction = 0.001
    # damaged tars that are left out, and reported, instead of being an error
    tolerate_shards: Annotated[int, Ge(0)] = 0
    # folder for shards behind URLs; null: $NITRO_E_CACHE or ~/.cache/nitro_e
    cache: str | None = None
    # size at which that folder drops the shards used longest ago, in GB
    cache_gb: Annotated[float, Gt(0)] = 200.0

    def __post_init__(self):
        super().__post_init__()
        if self.shards and self.sources:
            raise ConfigError(
                "data.shards and data.sources are both given; put the shards into a source of their own"
            )
        without = [name for name, source in self.sources.items() if source.weight is None]
        if without and len(without) < len(self.sources):
            raise ConfigError(
                f"data.sources.{without[0]}.weight: missing; give every source a weight, or none of them"
            )

        if self.captions and not any(self.captions.values()):
            raise ConfigError("data.captions: all weights are 0; give one a weight, or leave captions out")
        conditions = self.conditions  # a wrong one is refused here
        if self.reader == "stream" and (self.captions or self.buckets or any(conditions)):
            raise ConfigError(
                "data.reader=stream knows neither captions nor buckets nor where; use data.reader=indexed"
            )

    @property
    def conditions(self) -> list[tuple[Condition, ...]]:
        """List what every source is filtered by; raises ConfigError for what is no condition."""
        shared = parse(self.where, "where")
        parts = [
            shared + parse(source.where, f"sources.{name}.where") for name, source in self.sources.items()
        ]
        return parts or [shared]

    @property
    def weights(self) -> list[float] | None:
        """List the weights of the sources; None stands for the union of all samples."""
        weights = [source.weight for source in self.sources.values()]
        return None if not weights or None in weights else weights

    def expand(self) -> list[list[str]]:
        """List the files of each source; a source of weight 0 has none.

        Raises MissingShards, which names the missing files of all sources.
        """
        if not self.sources:
            return [expand_shards(self.shards)]
        found, missing = [], []
        for name, source in self.sources.items():
            try:
                dropped = source.weight == 0
                found.append([] if dropped else expand_shards(source.shards, f"data.sources.{name}.shards"))
            except MissingShards as error:
                missing.append(str(error))
        if missing:
            raise MissingShards("; ".join(missing))
        return found
