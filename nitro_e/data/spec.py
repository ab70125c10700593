"""Settle which members of a data set are read, and check the layout of their arrays, before the first batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from nitro_e.config import ConfigError
from nitro_e.data.catalog import IMAGES, Catalog
from nitro_e.data.data_config import DataConfig
from nitro_e.data.decode import BadSample, decode_info, npy_layout
from nitro_e.data.remote import is_url

ARRAYS = {"latents": "npy", "features": "features.npy", "text": "text.npy"}  # column -> its member


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
    size: tuple[int, int]  # pixels of decoded images: height, width
    caption_key: str
    captions: tuple[
        tuple[str, float], ...
    ] = ()  # weights by name, to draw one of several; () = txt or caption_key
    latents: ArrayLayout | None = None
    features: ArrayLayout | None = None
    extra: tuple[tuple[str, ArrayLayout], ...] = ()
    # ("latents", "npy"), ...: what the samples of some sources have and those of others have not
    partial: tuple[tuple[str, str], ...] = ()
    images_for: tuple[str, ...] = ()  # images are decoded where one of these is absent; () = always
    text: ArrayLayout | None = None  # (L, D); ragged: (rows of the first one, D)
    mask: ArrayLayout | None = None  # of padded text; None with text = ragged
    scale: ArrayLayout | None = None  # (L,) of text of 8 bits
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
    latents = _share(catalog, "npy", "latents") if use_latents else 0.0
    text = _text_share(catalog, config.captions) if use_text else 0.0
    features = _share(catalog, "features.npy", "vision features") if use_features else 0.0
    shares = {"latents": latents, "features": features, "text": text}
    partial = tuple((name, ARRAYS[name]) for name, share in shares.items() if 0 < share < 1)
    pixels = latents < 1 or need_pixels and features < 1
    always = not latents or need_pixels and not features
    images_for = tuple(name for name, _ in partial if name == "latents" or name == "features" and need_pixels)
    _check_members(catalog, ("txt", "json"), "caption (txt or json)", "captions")
    if pixels:
        enough = () if always else tuple(ARRAYS[name] for name in images_for)
        _check_members(catalog, IMAGES, f"image ({', '.join(IMAGES)})", "images", enough)
    for member in extra:
        if _share(catalog, member, f"'{member}'") < 1:
            sample = int(np.argmin(catalog.has(member)))
            raise ConfigError(
                f"data.shards: no sample has '{member}': {catalog.describe(sample)}; list shards that have it"
            )
    masks = _share(catalog, "mask.npy", "text masks") if text else 0.0
    if masks not in (0, text):
        raise ConfigError(
            "data.sources: the stored text of one source is padded, that of another ragged; encode them alike"
        )
    images = image_extensions(catalog) if pixels else ()
    spec = ReadSpec(
        images=images,
        info=bool({*config.captions} - {"txt"}) or _needs_info(catalog, images, latents > 0),
        size=(config.resolution, config.resolution),
        caption_key=config.caption_key,
        captions=tuple(config.captions.items()),
        latents=_latent_layout(catalog, latent_shape) if latents else None,
        features=_layout(catalog, "features.npy", 2) if features else None,
        extra=tuple((member, _layout(catalog, member)) for member in extra),
        partial=partial,
        images_for=() if always else images_for,
        text=_text_layout(catalog, text_length) if text else None,
        mask=_layout(catalog, "mask.npy", 1) if masks else None,
        scale=_layout(catalog, "scale.npy", 1) if text and catalog.has("scale.npy").any() else None,
        text_length=text_length,
    )
    if not config.captions:
        _check_caption_key(catalog, config.caption_key)
    return spec


def spec_of_bucket(
    spec: ReadSpec, catalog: Catalog, samples: np.ndarray, size: tuple[int, int], shape: tuple | None
) -> ReadSpec:
    """Return what is read of the samples (N,) bool of one aspect bucket; shape: that their latents must have."""
    latents, features = spec.latents, spec.features
    if latents is not None and (samples & catalog.has("npy")).any():
        latents = _latent_layout(catalog, shape, samples)
    if features is not None and (samples & catalog.has("features.npy")).any():
        features = _layout(catalog, "features.npy", 2, samples)
    extra = tuple((member, _layout(catalog, member, among=samples)) for member, _ in spec.extra)
    return replace(spec, size=size, latents=latents, features=features, extra=extra)


def image_extensions(catalog: Catalog) -> tuple[str, ...]:
    """List the image extensions that occur, in the order in which they are preferred."""
    return tuple(name for name in IMAGES if catalog.holders(name)[0])


def _share(catalog: Catalog, member: str, what: str) -> float:
    """Return the share of samples with this member; some with and some without in one source is an error."""
    has = catalog.has(member)
    edges = np.cumsum([int(sizes.sum()) for sizes in catalog.sizes])
    for start, end in zip([0, *edges.tolist()], edges.tolist()):
        part = has[start:end]
        if part.any() and not part.all():
            with_, without = start + int(np.argmax(part)), start + int(np.argmin(part))
            raise ConfigError(
                f"data.shards: {int(part.sum())} of {len(part)} samples have {what}:"
                f" {catalog.describe(with_)}, but {catalog.describe(without)}; encode all shards, or list only"
                " one kind"
            )
    return float(has.mean())


def _text_share(catalog: Catalog, captions: Mapping[str, float]) -> float:
    """Return the share of samples with stored text; of several captions all must be stored, or none."""
    share = _share(catalog, "text.npy", "text embeddings")
    others = [name for name, weight in captions.items() if weight and name != "txt"]
    lacking = [name for name in others if not catalog.has(f"text_{name}.npy").all()]
    if share and lacking:
        raise ConfigError(
            f"data.captions: text is stored, but not that of '{lacking[0]}'; encode it with --caption"
            f" {lacking[0]}, or take the text- shards off the list"
        )
    for name in others if share else ():
        ours, theirs = (_layout(catalog, member, 2) for member in ("text.npy", f"text_{name}.npy"))
        if (ours.shape[1:], ours.dtype) != (theirs.shape[1:], theirs.dtype):
            raise ConfigError(
                f"the stored text of '{name}' differs in shape from that of txt; encode them alike"
            )
    return share


def _check_members(
    catalog: Catalog, extensions: tuple[str, ...], what: str, remedy: str, enough: tuple[str, ...] = ()
) -> None:
    """Leave out samples with none of `extensions`; a shard in which no sample has any is an error.

    enough: members of which a sample needs all, if there are any, to do without.
    """
    has = catalog.has(*extensions)
    if enough:
        has |= np.all([catalog.has(member) for member in enough], axis=0)
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
    columns, captions = catalog.holders("json")[0], catalog.holders("txt")[0]
    if not columns or not captions or not catalog.has("txt").all():
        return bool(columns)
    read = [column for name in ("txt", *images, *["npy"] * latents) for column in catalog.holders(name)[0]]
    return all(column in read for column in columns)


def _first(catalog: Catalog, member: str, among: np.ndarray | None = None) -> tuple[int, bytes]:
    """Find the first sample (of those `among`, (N,) bool) with this member, and read it."""
    has = catalog.has(member) if among is None else catalog.has(member) & among
    sample = np.array([int(np.argmax(has))])
    (path,), entries = catalog.members(member, sample, catalog.shard_of(sample))
    offset, size, _ = entries[0].tolist()
    with open(catalog.cache.fetch(path) if is_url(path) else path, "rb") as file:
        file.seek(offset)
        return int(sample[0]), file.read(size)


def _layout(
    catalog: Catalog, member: str, dimensions: int | None = None, among: np.ndarray | None = None
) -> ArrayLayout:
    """Read the layout of the first array of this member."""
    sample, content = _first(catalog, member, among)
    try:
        shape, dtype, start = npy_layout(content)
        if dimensions is not None and len(shape) != dimensions:
            raise BadSample(f"{len(shape)} dimensions, expected {dimensions}")
    except BadSample as error:
        raise ConfigError(
            f"{catalog.name_of(sample)}: the first {member} cannot be used: {error}; encode it again"
        ) from None
    return ArrayLayout(content[:start], shape, dtype.str, len(content))


def _latent_layout(
    catalog: Catalog, expected: tuple[int, int, int] | None, among: np.ndarray | None = None
) -> ArrayLayout:
    layout = _layout(catalog, "npy", 3, among)
    if np.dtype(layout.dtype).kind != "f" or expected is not None and layout.shape != tuple(expected):
        raise ConfigError(
            f"{catalog.name_of(0)}: latents are {np.dtype(layout.dtype)} {layout.shape}, the model needs"
            f" floats of shape {tuple(expected) if expected else '(C, h, w)'}; encode for this codec and"
            " resolution, or set data.use_latents=false"
        )
    return layout


def _text_layout(catalog: Catalog, length: int) -> ArrayLayout:
    layout, padded = _layout(catalog, "text.npy", 2), bool(catalog.holders("mask.npy")[0])
    if padded and layout.shape[0] != length:
        raise ConfigError(
            f"{catalog.name_of(0)}: stored text has {layout.shape[0]} tokens, the text encoder {length};"
            " encode it with the same --text-length"
        )
    return layout


def _check_caption_key(catalog: Catalog, key: str) -> None:
    """Raise ConfigError if captions come from json and the first sample has none under the configured key."""
    if catalog.holders("txt")[0]:
        return
    sample, content = _first(catalog, "json")
    try:
        info = decode_info(content)
    except BadSample:  # replaced and counted when it is read
        return
    if not isinstance(info.get(key), str):
        raise ConfigError(
            f"{catalog.name_of(0)}: no txt, and json has no caption under '{key}' (keys:"
            f" {', '.join(info) or 'none'}); set data.caption_key to the right one"
        )
