"""E-MMDiT as a pipeline of diffusers. `nitro-e export MODEL FOLDER --diffusers` writes folders that it loads.

    from nitro_e.sharing.diffusers_pipeline import EmmditPipeline
    image = EmmditPipeline.from_pretrained("FOLDER")("a photo of a red circle").images[0]

Codec and scheduler are diffusers' own classes, text encoder and tokenizer those of transformers. Latents equal those of
TextToImage: text, guidance and times are computed by the same functions, and the scheduler takes the same steps.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    ConfigMixin,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nitro_e.config import ConfigError, class_of_kind, from_dict, to_dict
from nitro_e.encoders.text import LlamaText
from nitro_e.files import fetch
from nitro_e.interfaces import Architecture, Model, TextEmbedding
from nitro_e.sampling.inputs import negative_rows, prompt_rows
from nitro_e.sampling.pipeline import TextToImage, latent_size
from nitro_e.sampling.samplers import SamplingConfig, guide, scale_time, with_overrides

# whether FlowMatchEulerDiscreteScheduler draws from the generator that it is given
HEEDS_GENERATOR = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 39)
# of a hub repository, as files.fetch takes them; no code is among them
FILES = ("model_index.json", "*/*.json", "*/*.safetensors", "tokenizer/*")
# `pipeline.py` of a folder, for DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
LOADER = '''"""The pipeline of this folder; it needs the package: pip install nitro-e."""

from nitro_e.sharing.diffusers_pipeline import EmmditPipeline

__all__ = ["EmmditPipeline"]
'''


class EmmditTransformer(ModelMixin, ConfigMixin):
    """An E-MMDiT as a model of diffusers; `config.architecture` is its ModelConfig as plain data."""

    _no_split_modules = ["Block", "LastBlock"]

    @register_to_config
    def __init__(self, architecture: dict[str, Any], buffer_dtype: str = "float32") -> None:
        """Build the model; buffer_dtype is what its position table is rounded to, as that of weights in a half precision."""
        super().__init__()
        config = class_of_kind(Architecture, architecture.get("kind"), "architecture.kind", imports=False)
        self.model = from_dict(config, architecture, "architecture").build()
        for buffer in self.model.buffers():
            buffer.copy_(buffer.to(getattr(torch, buffer_dtype)))

    @classmethod
    def of(cls, model: Model) -> "EmmditTransformer":
        """Wrap a model without a copy of its weights."""
        held = [
            name
            for name in ("float16", "bfloat16", "float32")
            if all(torch.equal(x, x.to(getattr(torch, name)).to(x.dtype)) for x in model.buffers())
        ]
        with torch.device("meta"):
            transformer = cls(to_dict(model.config), held[0])
        transformer.model = model
        return transformer.eval()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity `noise - data` (B, C, h, w).

        hidden_states: latents (B, C, h, w); timestep: (B,) in 0..1, 1 = noise; encoder_hidden_states: text tokens
        (B, L, D) with their mask (B, L), True = a real token.
        """
        text = TextEmbedding(encoder_hidden_states, encoder_attention_mask.bool())
        velocity = self.model(hidden_states, timestep, text)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)


class EmmditPipeline(DiffusionPipeline):
    """Text to image by E-MMDiT, with the arguments that diffusers' pipelines have.

    `defaults` are the sampling settings of the weights. The scheduler may be replaced: one of another class than
    FlowMatchEulerDiscreteScheduler takes its own times.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        transformer: EmmditTransformer,
        vae: AutoencoderDC,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_length: int = 128,
        clean_caption: bool = False,
        # diffusers < 0.37 knows no other way of writing the type
        sampling: Optional[dict[str, Any]] = None,  # noqa: UP045
        text_layers: str = "last",
    ) -> None:
        """text_length: tokens per prompt. clean_caption, text_layers: as of LlamaText. sampling: SamplingConfig as plain data."""
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
        if type(tokenizer).__name__ == "TokenizersBackend":
            # its name in transformers 4, which 5 still knows
            self.register_to_config(tokenizer=("transformers", "PreTrainedTokenizerFast"))
        self.register_to_config(text_length=text_length, clean_caption=clean_caption, sampling=sampling)
        self.register_to_config(text_layers=text_layers)
        self.defaults = from_dict(SamplingConfig, sampling or {}, "sampling")
        self.image_processor = VaeImageProcessor(vae_scale_factor=vae.spatial_compression_ratio)
        self._interrupt = False

    @classmethod
    def of(cls, source: TextToImage) -> "EmmditPipeline":
        """Build the pipeline of our parts, without a copy. ConfigError for parts that diffusers has no class for."""
        codec, text, settings = source.codec, source.text, source.defaults
        vae = getattr(codec, "autoencoder", None)
        if not isinstance(vae, AutoencoderDC):
            raise ConfigError(
                f"codec {type(codec).__name__}: a diffusers folder holds an AutoencoderDC; train with dc-ae-f32c32"
            )
        if not isinstance(text, LlamaText):
            raise ConfigError(
                f"text encoder {type(text).__name__}: a diffusers folder holds a model of transformers; train with "
                "llama-3.2-1b"
            )
        if settings.sampler == "heun":
            raise ConfigError(
                "sampler 'heun': diffusers' Heun scheduler has other times; set another one: nitro-e convert MODEL "
                "FOLDER --sampler euler"
            )
        if settings.guidance != "text":
            raise ConfigError(
                f"guidance '{settings.guidance}': a diffusers folder has no weak pass; store the weights with "
                "sampling.guidance: text"
            )
        if settings.sampler in ("flow_map", "policy"):
            raise ConfigError(
                f"sampler '{settings.sampler}': no scheduler of diffusers takes such steps; use our pipeline"
            )
        scheduler = FlowMatchEulerDiscreteScheduler(
            shift=1.0 if settings.sigmas else settings.shift,
            stochastic_sampling=settings.sampler == "multistep",
        )
        return cls(
            EmmditTransformer.of(source.model),
            vae,
            text.model,
            text.tokenizer,
            scheduler,
            text_length=text.length,
            clean_caption=text.clean_caption,
            sampling=to_dict(settings),
            text_layers=text.layers,
        )

    @classmethod
    def from_pretrained(
        cls, source: str | Path, revision: str | None = None, **options: Any
    ) -> "EmmditPipeline":
        """Load a folder, or a hub repository that holds one, by its weights and configs alone: no code of it runs."""
        folder = source if Path(source).is_dir() else fetch(str(source), FILES, revision)
        return super().from_pretrained(folder, **options)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the folder that `from_pretrained` loads; diffusers' own loader finds the class by its pipeline.py."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pipeline.py").write_text(LOADER)
        super().save_pretrained(folder, **options)

    @property
    def interrupt(self) -> bool:
        """True once a callback has set `pipe._interrupt = True`: the remaining steps are left out."""
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_images_per_prompt: int = 1,
        device: torch.device | str | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return tokens (B, L, D) and mask (B, L) of the prompts, then of the negative prompts (None without guidance).

        B counts images: each prompt has num_images_per_prompt rows, one after the other. Embeddings that are given, one
        row per prompt, replace those of the strings; without a mask all their tokens count as real.
        """
        given = _given(prompt_embeds, prompt_attention_mask)
        text = self._embed(prompt_rows(prompt, given, num_images_per_prompt), device)
        if not do_classifier_free_guidance:
            return *text, None, None
        given = _given(negative_prompt_embeds, negative_prompt_attention_mask)
        prompts = len(text.tokens) // num_images_per_prompt
        negative = negative_rows(negative_prompt, given, prompts, num_images_per_prompt)
        return *text, *self._embed(negative, device)

    def _embed(self, rows: list[str] | TextEmbedding, device: torch.device | str | None) -> TextEmbedding:
        """Embed prompts, each distinct one once; what is embedded already is only moved."""
        device = device or self._execution_device
        if isinstance(rows, TextEmbedding):
            return rows.to(device)
        encoder = LlamaText(
            self.text_encoder,
            self.tokenizer,
            self.text_encoder.device,
            length=self.config.text_length,
            clean_caption=self.config.clean_caption,
            layers=self.config.text_layers,
        )
        distinct = list(dict.fromkeys(rows))
        return encoder.encode(distinct).to(device).take([distinct.index(prompt) for prompt in rows])

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images; whatever is not given is as the weights are meant to be sampled.

        guidance_scale: 0 or 1 is none; guidance_interval: (low, high) of the times in 0..1 that are guided. sigmas: the
        falling times of the steps, before the scheduler's shift and without the final 0, instead of
        num_inference_steps. generator: one for all images or a list with one for each, as for TextToImage.
        latents: (B, C, h, w) standard normal noise. A callback may replace what _callback_tensor_inputs lists.
        output_type: "pil", "np", "pt" (0..1) or "latent". Images are a field of the result, as in diffusers.
        """
        settings = self.settings(
            height=height,
            width=width,
            steps=num_inference_steps if sigmas is None else len(sigmas),
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            force=None if sigmas is None else True,
        )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ConfigError(
                f"callback_on_step_end_tensor_inputs: unknown {sorted(unknown)}; known: {self._callback_tensor_inputs}"
            )
        tokens, mask, negative_tokens, negative_mask = self.encode_prompt(
            prompt,
            negative_prompt,
            settings.guidance_scale not in (0, 1),
            num_images_per_prompt,
            None,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        )
        device = self._execution_device
        shape = (len(tokens), *self.latent_shape(*settings.size))
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ConfigError(f"latents: expected {shape}, got {tuple(latents.shape)}")
        # what a callback may replace
        state: dict[str, Any] = {
            "latents": latents.to(device, torch.float32),
            "prompt_embeds": tokens,
            "negative_prompt_embeds": negative_tokens,
        }

        self._set_times(settings, sigmas, device)
        # multistep draws more of it
        noisy = "generator" in inspect.signature(self.scheduler.step).parameters
        noise = {"generator": generator} if noisy else {}
        if generator is not None and self.scheduler.config.get("stochastic_sampling") and not HEEDS_GENERATOR:
            raise ConfigError(
                f"generator: the scheduler of diffusers {diffusers.__version__} draws the noise of its steps from elsewhere; "
                "pip install 'diffusers>=0.39', or leave it out"
            )
        model = scale_time(self._velocity, settings.time_scale)
        self._interrupt = False
        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:
            for step, time in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    continue
                x, tokens, negative_tokens = state.values()
                t = (time / self.scheduler.config.num_train_timesteps).expand(len(x)).to(device)
                text = TextEmbedding(tokens, mask)
                negative = text if negative_mask is None else TextEmbedding(negative_tokens, negative_mask)
                scale, interval = settings.guidance_scale, settings.guidance_interval
                rescale = settings.guidance_rescale
                velocity = guide(model, text, negative, scale, interval, rescale=rescale)(x, t)
                state["latents"] = self.scheduler.step(velocity, time, x, **noise, return_dict=False)[0]
                if callback_on_step_end is not None:
                    given = {name: state[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, step, time, given)
                    state |= {name: changed[name] for name in state if name in changed}
                progress.update()

        images = state["latents"]
        if output_type != "latent":
            raw = (images / self.vae.config.scaling_factor).to(self.vae.dtype)
            pixels = self.vae.decode(raw, return_dict=False)[0].float()
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def settings(self, **overrides: Any) -> SamplingConfig:
        """Replace some fields of the defaults; unknown or wrong ones raise ConfigError."""
        return with_overrides(self.defaults, overrides)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of images of this many pixels; ConfigError if the model does not fit them."""
        architecture, stride = self.transformer.model.config, self.vae.spatial_compression_ratio
        size = latent_size(architecture, stride, self.config.text_length, height, width)
        return self.vae.config.latent_channels, *size

    def _velocity(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        return self.transformer(x, t, *text, return_dict=False)[0]

    def _set_times(
        self, settings: SamplingConfig, sigmas: Sequence[float] | None, device: torch.device
    ) -> None:
        """Give the scheduler the weights' own times, or those that the caller wants."""
        if sigmas is None and isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # unshifted, because the scheduler shifts what it is given
            sigmas = dataclasses.replace(settings, shift=1.0).times()[:-1].tolist()
        if sigmas is None:
            self.scheduler.set_timesteps(settings.steps, device=device)
        else:
            self.scheduler.set_timesteps(sigmas=list(sigmas), device=device)


def _given(tokens: Tensor | None, mask: Tensor | None) -> TextEmbedding | Tensor | None:
    """Join the two arguments that an embedding is given in; without a mask every token counts as real."""
    return tokens if tokens is None or mask is None else TextEmbedding(tokens, mask)
