"""Settle which members of a data set are read, and check the layout of their arrays, before the first batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nitro_e.config import ConfigError
from nitro_e.data.catalog import IMAGES, Catalog
from nitro_e.data.data_config import DataConfig
from nitro_e.data.decode import BadSample, decode_info, npy_layout
from nitro_e.data.remote import is_url


@dataclass(frozen=True)
class ArrayLayout:
    """Header, shape and type that all arrays of one member share; the first one of the data set decides."""

    header: bytes
    shape: tuple[int, ...]  # latents: (C, h, w)
    dtype: str
    nbytes: int  # header and data


@dataclass(frozen=True)
class ReadSpec:
    """The members that are read; None stands for one that is not."""

    images: tuple[str, ...]  # extensions to look for, () = no pixels
    info: bool  # the json member
    resolution: int
    caption_key: str
    latents: ArrayLayout | None = None
    features: ArrayLayout | None = None
    extra: tuple[tuple[str, ArrayLayout], ...] = ()
    text: ArrayLayout | None = None  # (L, D); ragged: (rows of the first one, D)
    mask: ArrayLayout | None = None  # of padded text; None with text = ragged
    text_length: int = 0  # L


def read_spec(
    catalog: Catalog,
    config: DataConfig,
    *,
    need_pixels: bool,
    use_latents: bool,
    use_text: bool,
    use_features: bool,
    extra: tuple[str, ...],
    latent_shape: tuple[int, int, int] | None,
    text_length: int,
) -> ReadSpec:
    """Settle what is read, after checking that all samples have it; the arguments are those of `open_data`."""
    if not len(catalog):
        raise ConfigError(
            f"data.shards: no samples in {len(catalog.names)} shards {catalog.names[:3]}; pack some first"
        )
    latents = use_latents and _all_or_none(catalog, "npy", "latents")
    text = use_text and _all_or_none(catalog, "text.npy", "text embeddings")
    features = use_features and _all_or_none(catalog, "features.npy", "vision features")
    pixels = not latents or need_pixels and not features
    _check_members(catalog, ("txt", "json"), "caption (txt or json)", "captions")
    if pixels:
        _check_members(catalog, IMAGES, f"image ({', '.join(IMAGES)})", "images")
    for member in extra:
        if not _all_or_none(catalog, member, f"'{member}'"):
            raise ConfigError(
                f"data.shards: no sample has '{member}': {catalog.describe(0)}; list shards that have it"
            )
    padded = text and _all_or_none(catalog, "mask.npy", "text masks")
    images = image_extensions(catalog) if pixels else ()
    spec = ReadSpec(
        images=images,
        info=_needs_info(catalog, images, latents),
        resolution=config.resolution,
        caption_key=config.caption_key,
        latents=_latent_layout(catalog, latent_shape) if latents else None,
        features=_layout(catalog, "features.npy", 2) if features else None,
        extra=tuple((member, _layout(catalog, member)) for member in extra),
        text=_text_layout(catalog, text_length) if text else None,
        mask=_layout(catalog, "mask.npy", 1) if padded else None,
        text_length=text_length,
    )
    _check_caption_key(catalog, config.caption_key)
    return spec


def image_extensions(catalog: Catalog) -> tuple[str, ...]:
    """List the image extensions that occur, in the order in which they are preferred."""
    return tuple(name for name in IMAGES if catalog.find(name))


def _all_or_none(catalog: Catalog, member: str, what: str) -> bool:
    """Say whether all samples have this member; some with and some without is an error."""
    has = catalog.has(member)
    if has.any() and not has.all():
        with_, without = int(np.argmax(has)), int(np.argmin(has))
        raise ConfigError(
            f"data.shards: {int(has.sum())} of {len(has)} samples have {what}: {catalog.describe(with_)},"
            f" but {catalog.describe(without)}; encode all shards, or list only one kind"
        )
    return bool(has.all())


def _check_members(catalog: Catalog, extensions: tuple[str, ...], what: str, remedy: str) -> None:
    """Leave out samples with none of `extensions`; a shard in which no sample has any is an error."""
    has = catalog.has(*extensions)
    for shard, (first, last) in enumerate(zip(catalog.starts[:-1], catalog.starts[1:])):
        if last > first and not has[first:last].any():
            raise ConfigError(
                f"data.shards: no sample of {catalog.names[shard]} has a {what}, for example"
                f" {catalog.describe(first)}; add {remedy} with `nitro-e data pack`, or drop it"
            )
    if not has.all():
        catalog.keep(has, f"no {what}")


def _needs_info(catalog: Catalog, images: tuple[str, ...], latents: bool) -> bool:
    """Decide whether to read json: where captions need it, or where it lies in tars that are read anyway."""
    column, captions = catalog.find("json"), catalog.find("txt")
    if column is None or captions is None or not catalog.has("txt").all():
        return column is not None
    return column in [catalog.find(name) for name in ("txt", *images, *["npy"] * latents)]


def _first(catalog: Catalog, member: str) -> bytes:
    """Read this member of the first sample."""
    column = catalog.find(member)
    offset, size, _ = column.rows[member][0].tolist()
    path = column.paths[int(catalog.shard_of(0))]
    with open(catalog.cache.fetch(path) if is_url(path) else path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _layout(catalog: Catalog, member: str, dimensions: int | None = None) -> ArrayLayout:
    """Read the layout of the first array of this member."""
    content = _first(catalog, member)
    try:
        shape, dtype, start = npy_layout(content)
        if dimensions is not None and len(shape) != dimensions:
            raise BadSample(f"{len(shape)} dimensions, expected {dimensions}")
    except BadSample as error:
        raise ConfigError(
            f"{catalog.name_of(0)}: the first {member} cannot be used: {error}; encode it again"
        ) from None
    return ArrayLayout(content[:start], shape, dtype.str, len(content))


def _latent_layout(catalog: Catalog, expected: tuple[int, int, int] | None) -> ArrayLayout:
    layout = _layout(catalog, "npy", 3)
    if np.dtype(layout.dtype).kind != "f" or expected is not None and layout.shape != tuple(expected):
        raise ConfigError(
            f"{catalog.name_of(0)}: latents are {np.dtype(layout.dtype)} {layout.shape}, the model needs"
            f" floats of shape {tuple(expected) if expected else '(C, h, w)'}; encode for this codec and"
            " resolution, or set data.use_latents=false"
        )
    return layout


def _text_layout(catalog: Catalog, length: int) -> ArrayLayout:
    layout, padded = _layout(catalog, "text.npy", 2), catalog.find("mask.npy") is not None
    if padded and layout.shape[0] != length:
        raise ConfigError(
            f"{catalog.name_of(0)}: stored text has {layout.shape[0]} tokens, the text encoder {length};"
            " encode it with the same --text-length"
        )
    return layout


def _check_caption_key(catalog: Catalog, key: str) -> None:
    """Raise ConfigError if captions come from json and the first sample has none under the configured key."""
    if catalog.find("txt") is not None:
        return
    try:
        info = decode_info(_first(catalog, "json"))
    except BadSample:  # replaced and counted when it is read
        return
    if not isinstance(info.get(key), str):
        raise ConfigError(
            f"{catalog.name_of(0)}: no txt, and json has no caption under '{key}' (keys:"
            f" {', '.join(info) or 'none'}); set data.caption_key to the right one"
        )
