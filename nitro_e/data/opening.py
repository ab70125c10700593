"""Open the data set of a run: expand its shards, index them, settle what is read, choose the reader."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nitro_e.config import ConfigError
from nitro_e.data.buckets import NO_SIZE, assign
from nitro_e.data.catalog import Catalog, open_catalog
from nitro_e.data.data_config import DataConfig
from nitro_e.data.order import AnyOrder, BucketOrder, OnceOrder, Order
from nitro_e.data.reader import Data
from nitro_e.data.remote import ShardCache
from nitro_e.data.spec import ReadSpec, read_spec, spec_of_bucket
from nitro_e.data.where import apply
from nitro_e.sizes import parse_sizes


def open_data(
    config: DataConfig,
    *,
    need_pixels: bool,
    seed: int,
    stage: str,
    use_latents: bool = True,
    use_text: bool = False,
    use_features: bool = False,
    extra: tuple[str, ...] = (),
    latent_shape: tuple[int, int, int] | None = None,
    text_length: int = 128,
    once: int | None = None,
) -> Data:
    """Index the shards, check that every sample has what is needed, and fix the order.

    Stored latents (`npy`) are used if the shards have them, unless `use_latents` is False, and so are text
    embeddings and vision features where `use_text`, `use_features` ask for them. Images are decoded when
    there are no latents, or when `need_pixels` (for a vision encoder) and there are no stored features.
    `latent_shape` (C, h, w) is what stored latents must have, if given; `text_length` is L of stored text.
    `extra` names more `.npy` members that every sample must have, all of one shape (`noise.npy` of synthetic
    pairs); they arrive in `Records.extra`. With aspect buckets, `once` reads so many samples (0: all), each once, in
    place of an order without end. Raises ConfigError for missing or damaged shards, captions,
    images, or arrays of another shape.
    """
    streamed, sources = config.reader == "stream", config.expand()
    # the first shard of each source speaks for a stream
    scanned = [shards[:1] for shards in sources] if streamed else sources
    cache = ShardCache(config.cache, config.cache_gb * 1e9)
    catalog = open_catalog(scanned, config.tolerate_shards, True, cache)
    filtered = apply(catalog, config.conditions, list(config.sources or ("data",)))
    rows = _buckets_of_rows(catalog, config, filtered) if config.buckets else None
    spec = read_spec(
        catalog,
        config,
        need_pixels=need_pixels,
        use_latents=use_latents and config.use_latents,
        use_text=use_text,
        use_features=use_features,
        extra=extra,
        latent_shape=None if config.buckets else latent_shape,
        text_length=text_length,
    )
    if streamed:
        from nitro_e.data.stream import StreamData  # the only module that needs webdataset

        return StreamData(config, catalog, spec, sources, seed=seed, stage=stage)
    if rows is None:
        data = Data(config, catalog, spec, Order(catalog.sizes, config.weights, seed=seed, stage=stage))
    else:
        used, groups = np.unique(rows[catalog.rows_of(np.arange(len(catalog)))], return_inverse=True)
        data = _bucketed(config, catalog, spec, used, groups, latent_shape, seed, stage, once)
        filtered.append("buckets: " + counts_of(data.specs, groups))
    data.filtered = filtered
    return data


def counts_of(specs: Sequence[ReadSpec], groups: np.ndarray) -> str:
    """Count the samples of each bucket, in words."""
    names = ["{}x{}".format(*spec.size) for spec in specs]
    return ", ".join(f"{name} {count:,}" for name, count in zip(names, np.bincount(groups).tolist()))


def _buckets_of_rows(catalog: Catalog, config: DataConfig, lines: list[str]) -> np.ndarray:
    """Find the bucket of every row of the catalog; samples without a size are left out, and counted in `lines`."""
    found = assign(catalog, parse_sizes(config.buckets))
    rows = np.full(len(catalog) + len(catalog.left_out), NO_SIZE, np.uint8)
    rows[catalog.rows_of(np.arange(len(catalog)))] = found
    if without := int((found == NO_SIZE).sum()):
        lines.append(f"buckets: {without:,} of {len(found):,} samples have no width and height in their json")
        if without == len(found):
            raise ConfigError(f"{lines[-1]}; `nitro-e data pack` writes them")
        catalog.keep(found != NO_SIZE)
    return rows


def _bucketed(
    config: DataConfig,
    catalog: Catalog,
    spec: ReadSpec,
    used: np.ndarray,
    groups: np.ndarray,
    latent_shape: tuple[int, int, int] | None,
    seed: int,
    stage: str,
    once: int | None,
) -> Data:
    """Make the order of buckets; used: those with samples, groups: (N,) which of them each sample is in."""
    sizes = parse_sizes(config.buckets)
    specs = []
    for number, bucket in enumerate(used.tolist()):
        shape, (height, width) = None, sizes[bucket]
        if latent_shape is not None:
            stride = config.resolution // latent_shape[1]
            shape = (latent_shape[0], height // stride, width // stride)
        specs.append(spec_of_bucket(spec, catalog, groups == number, (height, width), shape))
    batch = config.global_batch or config.batch_size
    order: AnyOrder
    try:
        if once is None:
            order = BucketOrder(catalog.sizes, config.weights, groups, batch, seed=seed, stage=stage)
        else:
            order = OnceOrder(catalog.sizes, groups, batch, once, seed=seed, stage=stage)
    except ConfigError as error:
        raise ConfigError(f"data.buckets: {error}; take small ones off: {counts_of(specs, groups)}") from None
    return Data(config, catalog, specs[0], order, specs)
