"""The frozen encoders by name: builds codec, text encoder and vision encoder from their configs.

Libraries (diffusers, transformers, timm) are imported only when a component that needs them is built.
`shapes-*` are the small ones of the offline domain, which the package ships; they and the real ones take a
hub id or a local folder in `path`. `dct-*` and `hash` need neither files nor network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch

from nitro_e import files
from nitro_e.config import Config, ConfigError, Ge, Le, did_you_mean
from nitro_e.encoders import codec, text, vision
from nitro_e.encoders.random_weights import MAKERS
from nitro_e.interfaces import LatentCodec, TextEncoder, VisionEncoder

Kind = Literal["codec", "text", "vision"]
RANDOM = ("random", "random-small")


@dataclass(frozen=True, kw_only=True)
class ComponentConfig(Config):
    """One frozen encoder. A bare string in YAML is its name, or NAME=FOLDER."""

    SHORTHAND: ClassVar[str] = "name"

    name: str  # a name of the table of encoders (docs/data.md)
    # hub id or local folder; None = the default hub id; random, random-small: see random_weights.py
    path: str | None = None
    revision: str | None = None  # of the hub repository
    # of the weights; null: bfloat16 on a GPU, float32 elsewhere. Results are always float32
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    # text only: tokens per prompt; None = 128 (llama-3.2-1b), 16 (others)
    length: Annotated[int, Ge(2), Le(8192)] | None = None
    clean_caption: bool = False  # llama only: the released weights' caption cleaner
    # llama only: the last hidden state, or the mean over layers of their normalised ones
    layers: text.TextLayers = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        name, equals, path = self.name.partition("=")
        if equals:
            if self.path is not None:
                raise ConfigError(
                    f"name '{self.name}' has a folder already, and path is '{self.path}'; give one"
                )
            object.__setattr__(self, "name", name)
            object.__setattr__(self, "path", path)
        if self.path == "":
            raise ConfigError("path is empty; give a folder or a hub id, or leave it out")


@dataclass(frozen=True, kw_only=True)
class ComponentsConfig(Config):
    """The frozen encoders of a run."""

    codec: ComponentConfig
    text: ComponentConfig
    vision: ComponentConfig | None = None  # for REPA


def build_codec(config: ComponentConfig, device: torch.device | str = "cpu") -> LatentCodec:
    """Build the latent codec; raise ConfigError for an unknown name or weights that cannot be loaded."""
    return _builder("codec", config, CODECS)(config, device)


def build_text_encoder(config: ComponentConfig, device: torch.device | str = "cpu") -> TextEncoder:
    """Build the text encoder; raise ConfigError for an unknown name or weights that cannot be loaded."""
    return _builder("text", config, TEXT_ENCODERS)(config, device)


def build_vision_encoder(config: ComponentConfig, device: torch.device | str = "cpu") -> VisionEncoder:
    """Build the vision encoder; raise ConfigError for an unknown name or weights that cannot be loaded."""
    return _builder("vision", config, VISION_ENCODERS)(config, device)


def is_random(config: ComponentConfig) -> bool:
    """Tell whether weights of the released shape are drawn instead of read, for rehearsals."""
    return config.path in RANDOM and config.name in MAKERS


def compile_encoders(*encoders: LatentCodec | TextEncoder | VisionEncoder) -> None:
    """torch.compile, in place, the encoders that have weights."""
    for encoder in encoders:
        if hasattr(encoder, "compile"):
            encoder.compile()


def pinned(config: ComponentConfig) -> ComponentConfig:
    """Return the config with the commit of its hub repository as revision, if known: this is recorded."""
    source = config.path or (WEIGHTS[config.name].source if config.name in WEIGHTS else "")
    if Path(source).is_dir() or not files.is_hub_id(source):
        return config
    return replace(config, revision=files.commit_of(source, config.revision))


def check_download(kind: str, config: ComponentConfig, allowed: Collection[str]) -> None:
    """Raise ConfigError if a hub repository would be fetched that is neither the project's nor allowed.

    The config may come with a stranger's weights. What is in the local cache already is not fetched.
    """
    source = config.path or (WEIGHTS[config.name].source if config.name in WEIGHTS else "")
    allowed = (allowed,) if isinstance(allowed, str) else allowed
    if Path(source).expanduser().is_dir() or not files.is_hub_id(source) or source in allowed:
        return
    ours = source in files.REVISIONS and config.revision in (None, files.REVISIONS[source])
    if not ours and files.cached_folder(source, config.revision) is None:
        revision = f" at revision '{config.revision}'" if config.revision else ""
        raise ConfigError(
            f"use.{kind}: these weights ask for the hub repository '{source}'{revision}, which is none of the project's "
            f"defaults; if you trust it, allow it: --allow-download {source} (in Python: allow_download=['{source}'])"
        )


def codec_shape(config: ComponentConfig) -> tuple[int, int] | None:
    """Return (channels, stride) without loading anything; None when only the files in `path` can tell."""
    _builder("codec", config, CODECS)
    if config.name in codec.DCT_SIZES:
        stride, luma, chroma = codec.DCT_SIZES[config.name]
        return luma + 2 * chroma, stride
    return WEIGHTS[config.name].shape if config.path is None or is_random(config) else None


def text_shape(config: ComponentConfig) -> tuple[int | None, int]:
    """Return (width, length) without loading anything; width is None when only the files in `path` can tell."""
    _builder("text", config, TEXT_ENCODERS)
    if config.name == "hash":
        encoder = _hash(config, "cpu")
        return encoder.width, encoder.length
    width, length = WEIGHTS[config.name].shape
    return (width if config.path is None or is_random(config) else None), config.length or length


def vision_width(config: ComponentConfig) -> int | None:
    """Return the feature width without loading anything; None when only the files in `path` can tell."""
    _builder("vision", config, VISION_ENCODERS)
    return WEIGHTS[config.name].shape[0] if config.path is None or is_random(config) else None


def weights_source(kind: Kind, config: ComponentConfig) -> str | None:
    """Name the folder or the hub id of the weights, for people; None if there are none.

    Nothing is loaded; raises ConfigError for an unknown name or a folder that does not exist.
    """
    _builder(kind, config, TABLES[kind])
    if config.name not in WEIGHTS:
        return None
    default = WEIGHTS[config.name].source
    if config.path is None and Path(default).is_dir():
        return "the package"
    if is_random(config):
        return "random numbers"
    source = files.resolve(
        f"{kind} '{config.name}'", f"components.{kind}.path", config.path or default, config.revision
    )
    return source if Path(source).is_dir() else f"hub repository {source}"


def chosen_component(
    kind: Kind, given: str | None, default: ComponentConfig | None = None, dtype: str | None = None
) -> ComponentConfig:
    """Return the component meant by NAME, FOLDER or NAME=FOLDER, as --codec, --text and --vision take it.

    default: the component that weights were trained with, of which `given` may replace the files only.
    dtype: replaces that of a component that has weights.
    """
    flag = f"--{kind} '{given}'"
    if given is None:
        config = default
    elif "=" in given or given in TABLES[kind]:
        config = ComponentConfig(name=given)
        if default is not None and config.name != default.name:
            raise ConfigError(f"{flag}: the weights were trained with '{default.name}'; give its folder")
        config = replace(default or config, name=config.name, path=config.path, revision=None)
    elif default is not None:
        config = replace(default, path=given, revision=None)
    elif "/" in given or Path(given).exists():
        raise ConfigError(f"{flag}: of which kind? give NAME={given}, one of {', '.join(TABLES[kind])}")
    else:
        raise ConfigError(f"--{kind}: unknown '{given}'" + did_you_mean(given, list(TABLES[kind])))
    return replace(config, dtype=dtype) if dtype is not None and config.name in WEIGHTS else config


class Weights(NamedTuple):
    """The default weights of a component: where they are, their files, and their known shapes."""

    source: str  # hub id or folder
    files: tuple[str, ...]  # of a hub repository, as `files.fetch` takes them
    shape: tuple[int, ...]  # codec: channels, stride; text: width, length; vision: width


LLAMA_FILES = (*files.TRANSFORMER, *files.TOKENIZER)
WEIGHTS = {
    "dc-ae-f32c32": Weights(codec.DC_AE_REPOSITORY, codec.DC_AE_FILES, (32, 32)),
    "llama-3.2-1b": Weights(text.LLAMA_REPOSITORY, LLAMA_FILES, (2048, text.LLAMA_LENGTH)),
    "dc-ae-f64c128": Weights(codec.DC_AE_F64_REPOSITORY, codec.DC_AE_FILES, (128, 64)),
    "sd-f8c4": Weights(codec.SD_REPOSITORY, codec.DC_AE_FILES, (4, 8)),
    "sdxl-f8c4": Weights(codec.SDXL_REPOSITORY, codec.DC_AE_FILES, (4, 8)),
    "flux-f8c16": Weights(codec.FLUX_REPOSITORY, codec.FLUX_FILES, (16, 8)),
    "dinov2-b14": Weights(vision.DINOV2_REPOSITORY, files.TRANSFORMER, (768,)),
    "dinov3-b16": Weights(vision.DINOV3_REPOSITORY, files.TRANSFORMER, (768,)),
    "siglip2-b16": Weights(vision.SIGLIP2_REPOSITORY, files.TRANSFORMER, (768,)),
    "clip-b16": Weights(vision.CLIP_REPOSITORY, files.TRANSFORMER, (768,)),
    "shapes-dc-ae": Weights(str(files.SHIPPED / "codec"), codec.DC_AE_FILES, (8, 8)),
    "shapes-llama": Weights(str(files.SHIPPED / "text"), LLAMA_FILES, (128, 16)),
    "shapes-vit": Weights(str(files.SHIPPED / "vision"), files.TRANSFORMER, (128,)),
    "emoji-dc-ae": Weights(str(files.EMOJI / "codec"), codec.DC_AE_FILES, (32, 16)),
    "emoji-vit": Weights(str(files.EMOJI / "vision"), files.TRANSFORMER, (128,)),
}


def _dc_ae(config: ComponentConfig, device: torch.device | str) -> LatentCodec:
    return codec.AutoencoderDCCodec(_load("codec", config, codec.load_autoencoder_dc, device), device)


def _kl(config: ComponentConfig, device: torch.device | str) -> LatentCodec:
    return codec.AutoencoderKLCodec(_load("codec", config, codec.load_autoencoder_kl, device), device)


def _dct(config: ComponentConfig, device: torch.device | str) -> LatentCodec:
    return codec.DCTCodec(*codec.DCT_SIZES[config.name], device=device)


def _llama(config: ComponentConfig, device: torch.device | str) -> TextEncoder:
    if config.clean_caption:
        text.check_caption_cleaner()
    model, tokenizer = _load("text", config, text.load_llama, device)
    _, length = text_shape(config)
    return text.LlamaText(model, tokenizer, device, length, config.clean_caption, config.layers)


def _hash(config: ComponentConfig, device: torch.device | str) -> TextEncoder:
    return text.HashText(device) if config.length is None else text.HashText(device, length=config.length)


def _vit(config: ComponentConfig, device: torch.device | str) -> VisionEncoder:
    kinds = {"dinov3-b16": vision.DINOv3, "siglip2-b16": vision.SigLIP2, "clip-b16": vision.CLIPVision}
    kind = kinds.get(config.name, vision.DINOv2)
    return kind(_load("vision", config, vision.load_vit, device), device)


Builder = Callable[[ComponentConfig, "torch.device | str"], Any]
CODECS: dict[str, Builder] = {
    "dc-ae-f32c32": _dc_ae,
    "dc-ae-f64c128": _dc_ae,
    "sd-f8c4": _kl,
    "sdxl-f8c4": _kl,
    "flux-f8c16": _kl,
    "shapes-dc-ae": _dc_ae,
    "emoji-dc-ae": _dc_ae,
    "dct-f8c24": _dct,
    "dct-f16c64": _dct,
}
TEXT_ENCODERS: dict[str, Builder] = {"llama-3.2-1b": _llama, "shapes-llama": _llama, "hash": _hash}
VISION_ENCODERS: dict[str, Builder] = dict.fromkeys(
    ("dinov2-b14", "dinov3-b16", "siglip2-b16", "clip-b16", "shapes-vit", "emoji-vit"), _vit
)
TABLES = {"codec": CODECS, "text": TEXT_ENCODERS, "vision": VISION_ENCODERS}


def _builder(kind: str, config: ComponentConfig, table: Mapping[str, Builder]) -> Builder:
    """Return the table's entry, after checking that it has every option that is given."""
    if config.name not in table:
        raise ConfigError(
            f"components.{kind}.name: unknown '{config.name}'" + did_you_mean(config.name, list(table))
        )
    options = {"name", "path", "revision", "dtype"} if config.name in WEIGHTS else {"name"}
    options |= {"length"} if kind == "text" else set()
    options |= {"clean_caption"} if config.name == "llama-3.2-1b" else set()
    options |= {"layers"} if table.get(config.name) is _llama else set()
    for field in fields(config):
        if field.name not in options and getattr(config, field.name) != field.default:
            raise ConfigError(
                f"components.{kind}.{field.name}: '{config.name}' has no such option; leave it out"
            )
    return table[config.name]


def _load(kind: str, config: ComponentConfig, loader: Callable[..., Any], device: torch.device | str) -> Any:
    """Call the loader on the folder or the hub id; an error there becomes one line with the remedy."""
    default, key = WEIGHTS[config.name].source, f"components.{kind}.path"
    dtype = config.dtype or ("bfloat16" if torch.device(device).type == "cuda" else "float32")
    if is_random(config):
        return MAKERS[config.name](getattr(torch, dtype), small=config.path == RANDOM[1])
    return files.load(
        f"{kind} '{config.name}'",
        key,
        config.path or default,
        lambda folder: loader(folder, getattr(torch, dtype)),
        WEIGHTS[config.name].files,
        config.revision,
        repository=None if Path(default).is_dir() else default,
        give=f"give the folder: --{kind} {config.name}=FOLDER, in training components.{kind}={config.name}=FOLDER"
        " (gated repositories need `hf auth login` first)",
    )
