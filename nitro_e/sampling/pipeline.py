"""Prompts to images: text encoder, model, sampler and codec in one object."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from nitro_e.config import ConfigError, to_dict
from nitro_e.encoders.components import build_codec, build_text_encoder, check_download, chosen_component
from nitro_e.interfaces import Architecture, Denoiser, LatentCodec, Model, TextEmbedding, TextEncoder
from nitro_e.model.cpu.packing import Weights, fastest_weights, is_packed, pack_for_cpu
from nitro_e.model.pretrained import save_pretrained, with_lora
from nitro_e.record.progress import bar
from nitro_e.sampling import editing
from nitro_e.sampling.caching import ReusedBlocks
from nitro_e.sampling.editing import ImageInput
from nitro_e.sampling.inputs import Noise, count, embedded, negative_rows, noise_rows, prompt_rows
from nitro_e.sampling.noise_search import NoiseSearch
from nitro_e.sampling.padding import merge_padding
from nitro_e.sampling.samplers import SamplingConfig, sample, with_overrides
from nitro_e.sampling.sources import Loaded, Use, load
from nitro_e.sizes import parse_sizes

# embeddings that are kept, the last used ones; 1 MB each for Llama
CACHED_PROMPTS = 64

OutputType = Literal["pil", "pt", "np", "latent", "pixels"]
# (pipeline, step, t, {"latents": x}) -> the same mapping, whose latents are gone on with; as in diffusers
StepCallback = Callable[["TextToImage", int, float, dict[str, Tensor]], "dict[str, Tensor] | None"]


class Images(NamedTuple):
    """What a call returns; `images` is a list of PIL images, an array or a tensor."""

    images: Any


class TextToImage:
    """A model with its codec and text encoder: call it with prompts.

    defaults: the weights' own sampling settings. after: a function from the list of PIL images to the list that is
    returned instead, for example a safety filter; every output of type "pil" passes through it.
    """

    def __init__(
        self,
        model: Model,
        codec: LatentCodec,
        text: TextEncoder,
        defaults: SamplingConfig,
        use: Use | None = None,
        path: Path | None = None,
    ) -> None:
        """Put the parts together; use and path say where they come from, which saving needs."""
        self.model, self.codec, self.text, self.defaults = model, codec, text, defaults
        self.use, self.path = use, path
        self.after: Callable[[list[Image.Image]], list[Image.Image]] | None = None
        # compute equal text tokens once, see padding.py; compile() sets it on a CPU
        self.merges_padding = False
        self._offload: torch.device | None = None
        self._embeddings: dict[str, TextEmbedding] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        file: str | None = None,
        revision: str | None = None,
        lora: str | None = None,
        resolution: int | None = None,
        codec: str | None = None,
        text: str | None = None,
        allow_download: Collection[str] = (),
    ) -> TextToImage:
        """Load weights with the codec and the text encoder that they were trained with.

        source: a shipped name such as `shapes`, a run, a checkpoint, a model folder (`@model` or `@ema` chooses the
        weights), a `.safetensors` file in the released format, or a hub id; file, revision: of a hub repository.
        dtype: of the weights of all parts; None: float32 for the model, codec and text encoder as in training.
        lora: a PEFT adapter to merge, a folder here or in the repository. resolution: 512 or 1024, for released files
        whose name does not say it. codec, text: local folders or hub ids of the codec and the text encoder, also as
        NAME=FOLDER. allow_download: hub repositories that the weights may have fetched, besides the project's own.
        """
        loaded = load(source, file=file, revision=revision, lora=lora, resolution=resolution)
        return cls.of(loaded, device, dtype, codec=codec, text=text, allow_download=allow_download)

    @classmethod
    def of(
        cls,
        loaded: Loaded,
        device: str | torch.device,
        dtype: torch.dtype | None,
        *,
        codec: str | None,
        text: str | None,
        allow_download: Collection[str],
    ) -> TextToImage:
        """Build the codec and the text encoder that belong to loaded weights; arguments as for `from_pretrained`."""
        for kind, given in (("codec", codec), ("text", text)):
            if given is None:
                check_download(kind, getattr(loaded.use, kind), allow_download)
        precision = None if dtype is None else str(dtype).removeprefix("torch.")
        use = Use(
            codec=chosen_component("codec", codec, loaded.use.codec, precision),
            text=chosen_component("text", text, loaded.use.text, precision),
            sampling=loaded.use.sampling,
            sizes=loaded.use.sizes,
        )
        parts = build_codec(use.codec, device), build_text_encoder(use.text, device)
        model = loaded.model.to(device, dtype or torch.float32)
        return cls(model, *parts, use.sampling, use, loaded.path)

    # ---- the parts

    @property
    def device(self) -> torch.device:
        """The device that images are drawn on."""
        return self._offload or next(self.model.parameters()).device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> TextToImage:
        """Move all parts to a device and cast their weights; either may be left out. Returns itself."""
        self._check_unpacked("moved or cast")
        self._offload = None
        self._embeddings.clear()
        for part in (self.model, self.codec, self.text):
            part.to(device=device, dtype=dtype)
        return self

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Keep the parts in the CPU's memory, and each on `device` only while it computes: slower, for small GPUs."""
        self.to("cpu")
        self._offload = torch.device(device)

    def load_lora(self, folder: str | Path, scale: float = 1.0) -> None:
        """Merge a PEFT adapter, a folder, into the model: W + scale * alpha / r * B A. A negative scale takes it out."""
        self._check_unpacked("changed")
        self.model.load_state_dict(with_lora(self.model, folder, scale).state_dict())

    def compile(self, weights: Weights | None = None) -> None:
        """Make steps faster after a slower start: torch.compile; on a CPU packed weights and merged padding too.

        weights: of products on a CPU with bfloat16 weights; None: bfloat16 or float32, whichever this processor
        multiplies faster. "int8" computes the blocks' products in 8 bits (docs/speed.md has the cost); ConfigError
        elsewhere.
        """
        on_cpu, dtype = self.device.type == "cpu", next(self.model.parameters()).dtype
        if weights == "int8" and not on_cpu:
            raise ConfigError(
                f"weights 'int8': images are drawn on {self.device}; 8-bit products are for a CPU"
            )
        if on_cpu and (weights == "int8" or dtype == torch.bfloat16):
            self.model = pack_for_cpu(self.model, weights or fastest_weights())
        self.merges_padding = on_cpu  # elsewhere it would wait for the device at every step
        self.model.compile_blocks()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a model folder: weights, and by name the codec, the text encoder and the sampling settings."""
        self._check_unpacked("saved")
        if self.use is None:
            raise ConfigError(
                "this pipeline was made of parts; save its model with model.pretrained.save_pretrained"
            )
        use = {**to_dict(self.use), "sampling": to_dict(self.defaults)}
        save_pretrained(self.model, folder, use, {"saved_from": str(self.path)})

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Publish the model folder with a model card and sample images; see `publish.push` for the options."""
        from nitro_e.sampling.publish import push

        return push(self, repository, **options)

    def _check_unpacked(self, what: str) -> None:
        if is_packed(self.model):
            raise ConfigError(f"weights that are packed for a CPU cannot be {what}; do that before compile()")

    @contextlib.contextmanager
    def _at_work(self, part: Any) -> Iterator[None]:
        """Hold a part on the offload device, if there is one, while it computes."""
        if self._offload is None:
            yield
            return
        part.to(device=self._offload)
        try:
            yield
        finally:
            part.to(device="cpu")

    # ---- drawing

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        height: int | None = None,
        width: int | None = None,
        seeds: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: TextEmbedding | Tensor | None = None,
        negative_prompt_embeds: TextEmbedding | Tensor | None = None,
        image: ImageInput | Sequence[ImageInput] | None = None,
        mask_image: ImageInput | Sequence[ImageInput] | None = None,
        strength: float | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        reuse_blocks: int = 1,
        noise_search: NoiseSearch | None = None,
        batch_size: int = 16,
        progress: bool = False,
        **settings: Any,
    ) -> Images:
        """Draw images: those of the first prompt, then those of the second, and so on.

        prompt, negative_prompt: a string or a list; one negative prompt for all, or one per prompt.
        num_inference_steps, guidance_scale, guidance_interval, height, width: default: the weights' own settings;
        `settings` are the other fields of SamplingConfig (sampler, grid, shift, force), and its steps.
        seeds: of the first image, the next ones count up; or one per image (default 0, 1, ...). Or instead generator:
        torch's, one for all or one per image; or latents: the start noise (N, C, h, w).
        prompt_embeds, negative_prompt_embeds: what `encode_prompt` returns, instead of strings.
        image: to start from, with noise for the last `strength` (0 to 1, default 0.6) of the steps; PIL, or tensors
        (3, H, W) in 0..1. mask_image: draw only what is white there; strength is then 1 by default.
        output_type: "pil", "pt" (N, 3, H, W) or "np" (N, H, W, 3) in 0..1, "pixels" (N, 3, H, W) in -1..1, "latent".
        callback_on_step_end(pipeline, step, t, {"latents": x}) may return other latents; t falls from 1 to 0.
        reuse_blocks: compute the compressed blocks at every n-th step only, an approximation (`caching.ReusedBlocks`).
        noise_search: draw from the start noise that it finds; the images of a batch are drawn many times, with gradients.
        batch_size: images at a time; one image depends on no other. ConfigError for what cannot be drawn.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        if output_type not in ("pil", "pt", "np", "latent", "pixels"):
            raise ConfigError(f"output_type '{output_type}' is unknown; use pil, pt, np, latent or pixels")
        given = {
            "steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
        }
        chosen = self.settings(**{**given, "guidance_interval": guidance_interval, **settings})
        repeat = num_images_per_prompt
        text = prompt_rows(prompt, prompt_embeds, repeat)
        total = count(text)
        negative = negative_rows(negative_prompt, negative_prompt_embeds, total // repeat, repeat)
        noise = noise_rows(seeds, generator, latents, (total, *self.latent_shape(*chosen.size)))
        edit = None
        if image is not None:
            edit = editing.edit_rows(image, mask_image, strength, chosen.size, total, repeat)
        elif mask_image is not None or strength is not None:
            raise ConfigError("mask_image and strength belong to an image; give image=, or leave them out")
        prompts: list[str] = []
        if noise_search is not None:
            if image is not None:
                raise ConfigError(
                    "noise_search: an image to start from leaves no noise to search; give one of them"
                )
            if not isinstance(text, list):
                raise ConfigError(
                    "noise_search: rewards read prompts; give strings in place of prompt_embeds"
                )
            if noise.generators is not None:
                raise ConfigError(
                    "noise_search draws an image many times: give seeds in place of a generator"
                )
            noise, prompts = noise._replace(start=noise.start.clone()), text

        parts = []
        for start in range(0, total, batch_size):
            rows = slice(start, min(start + batch_size, total))
            embeds = embedded(text, rows, self.encode_prompt).to(self.device)
            unguided = chosen.guidance_scale in (0, 1)  # then the negative prompt is not looked at
            other = embeds if unguided else embedded(negative, rows, self.encode_prompt).to(self.device)
            pair = embeds.expand(rows.stop - start), other
            own = None if edit is None else edit.take(rows)
            model = self._denoiser(reuse_blocks)
            if noise_search is not None:
                noise.start[rows] = self._search(
                    noise_search, model, *pair, chosen, noise, rows, prompts[rows]
                )
            x = self._sample(model, *pair, chosen, noise, rows, own, callback_on_step_end, progress)
            parts.append(x.cpu() if output_type == "latent" else self._decode(x, own))
        return Images(self._output(torch.cat(parts), output_type))

    def settings(self, **overrides: Any) -> SamplingConfig:
        """Replace some fields of the defaults (None: leave it); unknown or wrong ones raise ConfigError."""
        return with_overrides(self.defaults, overrides)

    def encode_prompt(self, prompts: Sequence[str]) -> TextEmbedding:
        """Embed prompts, one row each, for `prompt_embeds`. The rows of the last prompts are kept."""
        known = self._embeddings
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            with self._at_work(self.text):
                encoded = self.text.encode(new).to(self.device)
            known = {**known, **{prompt: encoded.take([row]) for row, prompt in enumerate(new)}}
        used = {prompt: known[prompt] for prompt in prompts}
        kept = [(prompt, row) for prompt, row in known.items() if prompt not in used] + list(used.items())
        self._embeddings = dict(kept[-CACHED_PROMPTS:])
        first, *others = (known[prompt] for prompt in prompts)
        return first.cat(*others)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of images of this many pixels; ConfigError if the model does not fit them."""
        size = latent_size(self.model.config, self.codec.stride, self.text.length, height, width)
        return self.codec.channels, *size

    def sizes(self) -> list[tuple[int, int]]:
        """List the sizes (height, width) in pixels that the weights were trained at, the usual one first.

        Of weights that know no aspect buckets: the sizes of 0.7 to 1.35 times as many pixels that the model works on.
        """
        usual, trained = self.defaults.size, () if self.use is None else self.use.sizes
        if trained:
            others = list(parse_sizes(trained, "sizes"))
        else:
            unit = self.codec.stride * self.model.config.patch_size
            grids = self.model.config.similar_grids(usual[0] // unit, usual[1] // unit)
            others = [(rows * unit, columns * unit) for rows, columns in grids]
        return list(dict.fromkeys([usual, *others]))

    def _denoiser(self, reuse_blocks: int) -> Denoiser:
        model = self.model if reuse_blocks == 1 else ReusedBlocks(self.model, reuse_blocks)
        return merge_padding(model, self.model.config) if self.merges_padding else model

    def _sample(
        self,
        model: Denoiser,
        text: TextEmbedding,
        negative: TextEmbedding,
        settings: SamplingConfig,
        noise: Noise,
        rows: slice,
        edit: editing.Edit | None,
        callback: StepCallback | None,
        progress: bool,
    ) -> Tensor:
        """Draw the latents of one batch, on the pipeline's device."""
        x, times = noise.start[rows].to(self.device), settings.times()  # (B, C, h, w)
        known = None
        if edit is not None:
            with self._at_work(self.codec):
                known = editing.known(edit, x, self.codec)
            times = editing.remaining(times, edit.strength)
            x = known.at(times[0].to(x.device))
        options: dict[str, Any] = {
            "total": len(times) - 1,
            "desc": "sampling",
            "leave": False,
            "disable": not progress,
        }
        with bar(brief=True, **options) as shown:

            def after_step(step: int, x: Tensor, t: Tensor) -> Tensor:
                x = x if known is None else known.put_back(x, t)
                if callback is not None:
                    x = (callback(self, step, float(t), {"latents": x}) or {}).get("latents", x)
                shown.update()
                return x

            with self._at_work(self.model):
                fresh = noise.fresh(rows, x)
                return sample(model, text, negative, settings, x, fresh, times, after_step)

    def _search(
        self,
        search: NoiseSearch,
        model: Denoiser,
        text: TextEmbedding,
        negative: TextEmbedding,
        settings: SamplingConfig,
        noise: Noise,
        rows: slice,
        prompts: Sequence[str],
    ) -> Tensor:
        """Search the start noise of one batch; returns it on the CPU, (B, C, h, w)."""
        if self._offload is not None:
            raise ConfigError(
                "noise_search needs model and codec together on the device; draw without CPU offload"
            )
        x = noise.start[rows].to(self.device)
        seeds = noise.seeds[rows]

        def draw(x: Tensor) -> Tensor:
            latents = sample(model, text, negative, settings, x, noise.fresh(rows, x))
            return self.codec.decode(latents).float()

        return search(x, seeds, draw, prompts).cpu()

    def _decode(self, latents: Tensor, edit: editing.Edit | None) -> Tensor:
        with self._at_work(self.codec):
            pixels = self.codec.decode(latents).float().clamp(-1, 1).cpu()  # (B, 3, H, W)
        return pixels if edit is None else editing.composed(edit, pixels)

    def _output(self, drawn: Tensor, kind: OutputType) -> Any:
        if kind == "pil":
            images = [to_image(image) for image in drawn]
            return images if self.after is None else self.after(images)
        if kind in ("latent", "pixels"):
            return drawn
        unit = (drawn + 1) / 2
        return unit if kind == "pt" else unit.permute(0, 2, 3, 1).numpy()


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


def to_image(pixels: Tensor) -> Image.Image:
    """Turn (3, H, W) in -1..1 into an 8-bit RGB image."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)
