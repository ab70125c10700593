"""What a call of the pipeline is given, checked and counted: one row per image."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nitro_e.config import ConfigError
from nitro_e.interfaces import TextEmbedding, as_prompts
from nitro_e.sampling.samplers import fresh_noise, initial_noise

Embed = Callable[[list[str]], TextEmbedding]
Text = list[str] | TextEmbedding


def prompt_rows(
    given: str | Sequence[str] | None, embeds: TextEmbedding | Tensor | None, repeat: int
) -> Text:
    """Return the prompts or their embeddings, each `repeat` times in a row; exactly one of the two must be given."""
    if repeat < 1:
        raise ConfigError(f"num_images_per_prompt must be at least 1, got {repeat}")
    if embeds is not None:
        if given is not None:
            raise ConfigError("prompt and prompt_embeds are both given; give one")
        return repeated(embedding(embeds, "prompt_embeds"), repeat)
    prompts = [given] if isinstance(given, str) else as_prompts([] if given is None else given, "prompt")
    if not prompts:
        raise ConfigError("prompt: there is none; give a string, a list of strings, or prompt_embeds")
    return repeated(prompts, repeat)


def negative_rows(
    given: str | Sequence[str] | None, embeds: TextEmbedding | Tensor | None, prompts: int, repeat: int
) -> Text:
    """Return one negative prompt or embedding per image; None and one string stand for all."""
    if embeds is not None:
        if given is not None:
            raise ConfigError("negative_prompt and negative_prompt_embeds are both given; give one")
        rows = embedding(embeds, "negative_prompt_embeds")
        if len(rows.tokens) not in (1, prompts):
            raise ConfigError(
                f"{prompts} prompts but {len(rows.tokens)} rows of negative_prompt_embeds; give one, or one per prompt"
            )
        return repeated(rows.expand(prompts), repeat)
    if given is None or isinstance(given, str):
        return [given or ""] * (prompts * repeat)
    negatives = as_prompts(given, "negative_prompt")
    if len(negatives) != prompts:
        raise ConfigError(
            f"{prompts} prompts but {len(negatives)} negative prompts; give one string for all, or one per prompt"
        )
    return repeated(negatives, repeat)


def embedding(given: TextEmbedding | Tensor, name: str) -> TextEmbedding:
    """Return a TextEmbedding; of a bare tensor (B, L, D) every token counts as real."""
    if isinstance(given, Tensor):
        given = TextEmbedding(given, torch.ones(given.shape[:2], dtype=torch.bool, device=given.device))
    if given.tokens.ndim != 3 or given.mask.shape != given.tokens.shape[:2]:
        raise ConfigError(
            f"{name}: expected tokens (B, L, D) and mask (B, L), got {tuple(given.tokens.shape)} and {tuple(given.mask.shape)}"
        )
    return given


def repeated(rows: Text, times: int) -> Text:
    """Repeat every row, the copies next to each other."""
    if isinstance(rows, TextEmbedding):
        return TextEmbedding(*(part.repeat_interleave(times, 0) for part in rows))
    return [row for row in rows for _ in range(times)]


def count(rows: Text) -> int:
    return len(rows.tokens) if isinstance(rows, TextEmbedding) else len(rows)


def embedded(rows: Text, chosen: slice, encode: Embed) -> TextEmbedding:
    """Embed the chosen rows; a single one if all of them are the same string."""
    if isinstance(rows, TextEmbedding):
        return rows.take(chosen)
    prompts = rows[chosen]
    return encode(prompts[:1] if len(set(prompts)) == 1 else prompts)


class Noise(NamedTuple):
    """The start of every image, and where further noise comes from."""

    start: Tensor  # (N, C, h, w) float32 on the CPU
    seeds: list[int]
    generators: Sequence[torch.Generator] | torch.Generator | None

    def fresh(self, chosen: slice, like: Tensor) -> Callable[[int], Tensor]:
        """Make the source of more noise for the chosen images, of the shape of `like`."""
        generators = self.generators
        if generators is None:
            return fresh_noise(self.seeds[chosen], like)
        own = generators if isinstance(generators, torch.Generator) else generators[chosen]
        return lambda step: drawn(own, like.shape).to(like)


def noise_rows(
    seeds: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: Tensor | None,
    shape: tuple[int, int, int, int],
) -> Noise:
    """Draw the start noise (N, C, h, w) from seeds or generators, or take `latents` for it."""
    given = [name for name, value in (("seeds", seeds), ("generator", generator)) if value is not None]
    if len(given) == 2 or (given and latents is not None):
        raise ConfigError(
            f"{' and '.join([*given, 'latents'][:2])} are both given; noise comes from one of them"
        )
    rows = image_seeds(seeds, shape[0])
    if latents is not None:
        if tuple(latents.shape) != shape:
            raise ConfigError(f"latents: expected {shape}, got {tuple(latents.shape)}")
        return Noise(latents.float().cpu(), rows, None)
    if generator is None:
        return Noise(initial_noise(rows, shape[1:]), rows, None)
    if not isinstance(generator, torch.Generator) and len(generator) != shape[0]:
        raise ConfigError(
            f"{shape[0]} images but {len(generator)} generators; give one for all, or one per image"
        )
    return Noise(drawn(generator, shape), rows, generator)


def drawn(generator: torch.Generator | Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """Draw standard normal noise as diffusers does: one generator for the whole batch, or one per image."""
    if isinstance(generator, torch.Generator):
        return torch.randn(tuple(shape), generator=generator, device=generator.device).cpu()
    return torch.cat([drawn(one, (1, *shape[1:])) for one in generator])


def image_seeds(given: int | Sequence[int] | None, total: int) -> list[int]:
    """Return one seed per image: 0, 1, ... if none is given; a single number is the first, the next ones count up."""
    if given is None or isinstance(given, (int, numbers.Integral)):
        first = 0 if given is None else int(given)
        seeds: list[int] = list(range(first, first + total))
    else:
        seeds = list(given)
    if len(seeds) != total:
        raise ConfigError(f"{total} images but {len(seeds)} seeds; give one number, or one seed per image")
    for seed in seeds:
        if not isinstance(seed, (int, numbers.Integral)) or not -(2**63) <= seed < 2**64:
            raise ConfigError(f"seeds: {seed!r} is no seed; give whole numbers of at most 64 bits")
    return [int(seed) for seed in seeds]
