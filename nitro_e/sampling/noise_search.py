"""Search for a start noise whose image has a high reward: for models of few steps, of which one image costs little.

    gradient     ascent on the reward through decoder and sampler: Nesterov's method with a clipped gradient, and a term that
                 keeps the noise as long as a normal one is (ReNO, arXiv 2406.04312). The best noise on the way counts
    candidates   the best of so many noises, the image's own among them; the reward needs no gradient

An image's result depends on its own noise alone, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from nitro_e.config import Config, ConfigError, Ge, Gt
from nitro_e.randomness import seed_of
from nitro_e.sampling.samplers import initial_noise

Draw = Callable[[Tensor], Tensor]  # noise (B, C, h, w) -> pixels (B, 3, H, W) in -1..1
# pixels (B, 3, H, W), prompts -> (B,); with gradients where the search follows them
Reward = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True, kw_only=True)
class NoiseSearchConfig(Config):
    """Says how the noise is searched; the rate, momentum, clip and weight are ReNO's."""

    steps: Annotated[int, Ge(0)] = 50  # of gradient ascent; 0: candidates alone
    candidates: Annotated[int, Ge(1)] = 1  # noises that are tried; the ascent begins at the best of them
    rate: Annotated[float, Gt(0)] = 5.0
    momentum: Annotated[float, Ge(0)] = 0.9
    clip: Annotated[float, Gt(0)] = 0.1  # largest norm of an image's gradient
    length_weight: Annotated[float, Ge(0)] = 0.01  # of `length_penalty` beside the reward

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps == 0 and self.candidates == 1:
            raise ConfigError("steps 0 and candidates 1 search nothing; raise one of them")
        if self.momentum >= 1:
            raise ConfigError(f"momentum must be below 1, got {self.momentum}")

    def in_words(self) -> str:
        """Say what is searched: "best of 4, then 50 steps of ascent"."""
        parts = [f"best of {self.candidates}"] * (self.candidates > 1)
        parts += [f"{self.steps} steps of ascent"] * (self.steps > 0)
        return ", then ".join(parts)


@dataclass(frozen=True)
class NoiseSearch:
    """A reward and how to search for it; `TextToImage` takes one."""

    reward: Reward
    config: NoiseSearchConfig

    def __call__(self, noise: Tensor, seeds: Sequence[int], draw: Draw, prompts: Sequence[str]) -> Tensor:
        """Return a better start than `noise` (B, C, h, w) for every image; seeds: of the further candidates."""
        best, highest = noise, torch.full((len(noise),), -torch.inf, device=noise.device)
        for number in range(self.config.candidates if self.config.candidates > 1 else 0):
            tried = noise if number == 0 else candidate(noise, seeds, number)
            with torch.no_grad():
                scores = self.scored(draw(tried), prompts)  # (B,)
            best = torch.where(rows(scores > highest), tried, best)
            highest = torch.maximum(scores, highest)
        return self.ascend(best, draw, prompts) if self.config.steps else best

    def ascend(self, noise: Tensor, draw: Draw, prompts: Sequence[str]) -> Tensor:
        """Follow the reward's gradient; returns the noise (B, C, h, w) of every image's highest reward."""
        config, x, speed = self.config, noise.detach(), torch.zeros_like(noise)
        best, highest = noise, torch.full((len(noise),), -torch.inf, device=noise.device)
        for step in range(config.steps + 1):
            last = step == config.steps
            x = x.detach().requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                scores = self.scored(draw(x), prompts)  # (B,)
                # a sum over images, each of which has its own gradient
                loss = (config.length_weight * length_penalty(x) - scores).sum()
            best = torch.where(rows(scores.detach() > highest), x.detach(), best)
            highest = torch.maximum(scores.detach(), highest)
            if last:
                break
            if not scores.requires_grad:
                raise ConfigError(
                    "the reward has no gradient to follow; search among candidates alone (steps 0, candidates 2 or more)"
                )
            (slope,) = torch.autograd.grad(loss, x)
            norm = slope.flatten(1).norm(dim=1)  # (B,)
            slope = slope * rows(config.clip / norm.clamp(min=config.clip))
            speed = config.momentum * speed + slope
            x = x - config.rate * (slope + config.momentum * speed)
        return best

    def scored(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return (B,); an image without a score counts below all others."""
        scores = self.reward(pixels, prompts)
        return torch.where(scores.isfinite(), scores, torch.full_like(scores, -torch.inf))


def rows(values: Tensor) -> Tensor:
    """Give values (B,) the dimensions of latents: (B, 1, 1, 1)."""
    return values[:, None, None, None]


def candidate(noise: Tensor, seeds: Sequence[int], number: int) -> Tensor:
    """Draw another start noise for every image, of its seed and the candidate's number alone."""
    drawn = initial_noise([seed_of(seed, "candidate", number) for seed in seeds], tuple(noise.shape[1:]))
    return drawn.to(noise)


def length_penalty(x: Tensor) -> Tensor:
    """Return (B,) r^2 / 2 - (d - 1) log r for the length r of each row: minus the log density of a normal noise's length."""
    flat = x.flatten(1)
    length = flat.norm(dim=1)
    return length.square() / 2 - (flat.shape[1] - 1) * length.log()
