"""Prompts to images: text encoder, model, sampler and codec in one object."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from nitro_e.config import ConfigError, from_dict
from nitro_e.encoders.components import (
    ComponentConfig,
    build_codec,
    build_text_encoder,
    check_download,
    chosen_component,
    pinned,
)
from nitro_e.interfaces import Architecture, LatentCodec, Model, TextEncoder, as_prompts
from nitro_e.model.cpu.packing import pack_for_cpu
from nitro_e.model.pretrained import load_pretrained, read_config
from nitro_e.record.run_folder import model_folder
from nitro_e.sampling.samplers import SamplingConfig, initial_noise, sample, with_overrides


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """The codec, text encoder and settings that sampling needs besides the weights; the `use` entry of a model folder's config.json.

    Hub repositories are named with their commit, so that later images come from the same files.
    """

    codec: ComponentConfig
    text: ComponentConfig
    sampling: SamplingConfig

    def __post_init__(self) -> None:
        for part in ("codec", "text"):
            object.__setattr__(self, part, pinned(getattr(self, part)))


class TextToImage:
    """A model with its codec and text encoder: call it with prompts. `defaults`: the weights' own sampling settings."""

    def __init__(self, model: Model, codec: LatentCodec, text: TextEncoder, defaults: SamplingConfig) -> None:
        self.model, self.codec, self.text, self.defaults = model, codec, text, defaults

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        codec: str | None = None,
        text: str | None = None,
        allow_download: Collection[str] = (),
    ) -> TextToImage:
        """source: a run directory, a checkpoint or a model folder, `@model` or `@ema` choosing the weights.

        dtype: of the weights of all parts; None: float32 for the model, codec and text encoder as in training.
        codec, text: local folders or hub ids of the codec and the text encoder, also as NAME=FOLDER, instead of those
        that the weights were trained with. allow_download: hub repositories that the weights may have fetched, besides
        the project's default ones.
        """
        if Path(source).is_file():
            raise ConfigError(
                f"'{source}' is a file, not a folder; make a model folder of it: nitro-e convert {source} FOLDER"
            )
        folder = model_folder(source)
        use = from_dict(Use, read_config(folder)["use"], "use")
        for kind, given in (("codec", codec), ("text", text)):
            if given is None:
                check_download(kind, getattr(use, kind), allow_download)
        precision = None if dtype is None else str(dtype).removeprefix("torch.")
        parts = (
            build_codec(chosen_component("codec", codec, use.codec, precision), device),
            build_text_encoder(chosen_component("text", text, use.text, precision), device),
        )
        model = load_pretrained(folder).to(device, dtype or torch.float32)
        return cls(model, *parts, use.sampling)

    def compile(self) -> None:
        """Make steps faster after a slower start: torch.compile, and packed weights where a CPU gains by them."""
        weight = next(self.model.parameters())
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
            self.model = pack_for_cpu(self.model)
        self.model.compile_blocks()

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = "",
        seeds: int | Sequence[int] | None = None,
        batch_size: int = 16,
        progress: bool = False,
        **overrides: Any,
    ) -> list[Image.Image]:
        """Draw one image per prompt; a bare string is one prompt.

        negative_prompt: one for all, or one per prompt. seeds: one per prompt (default 0, 1, ...). overrides: fields of
        SamplingConfig.
        """
        options: dict[str, Any] = {
            "seeds": seeds,
            "batch_size": batch_size,
            "progress": progress,
            **overrides,
        }
        return [to_image(image) for image in self.pixels(prompts, negative_prompt=negative_prompt, **options)]

    @torch.no_grad()
    def pixels(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = "",
        seeds: int | Sequence[int] | None = None,
        batch_size: int = 16,
        progress: bool = False,
        **overrides: Any,
    ) -> Tensor:
        """Draw images (number of prompts, 3, H, W) in -1..1, on the CPU; arguments as for `__call__`."""
        prompts = [prompts] if isinstance(prompts, str) else as_prompts(prompts)
        if not prompts:
            raise ConfigError("prompts: the list is empty; give at least one")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        negatives = negative_prompts(negative_prompt, len(prompts))
        seeds = image_seeds(seeds, len(prompts))
        settings = self.settings(**overrides)
        parts = []
        for start in range(0, len(prompts), batch_size):
            chosen = slice(start, start + batch_size)
            parts.append(
                self._batch(prompts[chosen], negatives[chosen], seeds[chosen], settings, progress).cpu()
            )
        return torch.cat(parts)

    def settings(self, **overrides: Any) -> SamplingConfig:
        """Replace some fields of the defaults; unknown or wrong ones raise ConfigError."""
        return with_overrides(self.defaults, overrides)

    def _batch(
        self,
        prompts: list[str],
        negatives: list[str],
        seeds: list[int],
        settings: SamplingConfig,
        progress: bool,
    ) -> Tensor:
        device = next(self.model.parameters()).device
        x = initial_noise(seeds, self.latent_shape(*settings.size)).to(device)  # (B, C, h, w)
        text = self.text.encode(prompts)
        negative = self.text.encode(negatives if len(set(negatives)) > 1 else negatives[:1])
        latents = sample(self.model, text, negative, settings, x, seeds, progress)
        return self.codec.decode(latents).float().clamp(-1, 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of images of this many pixels; ConfigError if the model does not fit them."""
        size = latent_size(self.model.config, self.codec.stride, self.text.length, height, width)
        return self.codec.channels, *size


def latent_size(
    model: Architecture, stride: int, text_length: int, height: int, width: int
) -> tuple[int, int]:
    """Return (h, w) of the latents of images of this many pixels; ConfigError if the model does not fit them."""
    unit = stride * model.patch_size  # pixels per token side
    if height % unit or width % unit:
        nearest = model.nearest_grids(round(height / unit), round(width / unit))
        sizes = ", ".join(f"{rows * unit}x{columns * unit}" for rows, columns in nearest)
        raise ConfigError(
            f"{height}x{width} px: both sides must be multiples of {unit}; the nearest that work: {sizes} px"
        )
    model.check_grid(height // unit, width // unit, text_length, pixels=unit)
    return height // stride, width // stride


def negative_prompts(given: str | Sequence[str] | None, count: int) -> list[str]:
    """Return one negative prompt for each of `count` prompts."""
    if given is None or isinstance(given, str):
        return [given or ""] * count
    negatives = as_prompts(given, "negative_prompt")
    if len(negatives) != count:
        raise ConfigError(
            f"{count} prompts but {len(negatives)} negative prompts; give one string for all, or one per prompt"
        )
    return negatives


def image_seeds(given: int | Sequence[int] | None, count: int) -> list[int]:
    """Return one seed for each of `count` prompts; 0, 1, ... if none is given."""
    if given is None:
        return list(range(count))
    seeds = [given] if isinstance(given, (int, numbers.Integral)) else list(given)
    if len(seeds) != count:
        raise ConfigError(f"{count} prompts but {len(seeds)} seeds; give one seed per prompt")
    for seed in seeds:
        if not isinstance(seed, (int, numbers.Integral)) or not -(2**63) <= seed < 2**64:
            raise ConfigError(f"seeds: {seed!r} is no seed; give whole numbers of at most 64 bits")
    return [int(seed) for seed in seeds]


def to_image(pixels: Tensor) -> Image.Image:
    """Turn (3, H, W) in -1..1 into an 8-bit RGB image."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)
