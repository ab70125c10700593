"""Open the data set of a run: expand its shards, index them, settle what is read, choose the reader."""

from __future__ import annotations

from nitro_e.data.catalog import open_catalog
from nitro_e.data.data_config import DataConfig
from nitro_e.data.order import Order
from nitro_e.data.reader import Data
from nitro_e.data.remote import ShardCache
from nitro_e.data.spec import read_spec
from nitro_e.data.where import apply


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
) -> Data:
    """Index the shards, check that every sample has what is needed, and fix the order.

    Stored latents (`npy`) are used if the shards have them, unless `use_latents` is False, and so are text
    embeddings and vision features where `use_text`, `use_features` ask for them. Images are decoded when
    there are no latents, or when `need_pixels` (for a vision encoder) and there are no stored features.
    `latent_shape` (C, h, w) is what stored latents must have, if given; `text_length` is L of stored text.
    `extra` names more `.npy` members that every sample must have, all of one shape (`noise.npy` of synthetic
    pairs); they arrive in `Records.extra`. Raises ConfigError for missing or damaged shards, captions,
    images, or arrays of another shape.
    """
    streamed, sources = config.reader == "stream", config.expand()
    # the first shard of each source speaks for a stream
    scanned = [shards[:1] for shards in sources] if streamed else sources
    cache = ShardCache(config.cache, config.cache_gb * 1e9)
    catalog = open_catalog(scanned, config.tolerate_shards, True, cache)
    filtered = apply(catalog, config.conditions, list(config.sources or ("data",)))
    spec = read_spec(
        catalog,
        config,
        need_pixels=need_pixels,
        use_latents=use_latents and config.use_latents,
        use_text=use_text,
        use_features=use_features,
        extra=extra,
        latent_shape=latent_shape,
        text_length=text_length,
    )
    if streamed:
        from nitro_e.data.stream import StreamData  # the only module that needs webdataset

        return StreamData(config, catalog, spec, sources, seed=seed, stage=stage)
    data = Data(config, catalog, spec, Order(catalog.sizes, config.weights, seed=seed, stage=stage))
    data.filtered = filtered
    return data
