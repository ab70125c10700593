"""Reuse of the compressed blocks between neighbouring steps of a sampler, an approximation that saves time.

The compressed blocks are half of E-MMDiT's arithmetic, and what they add to the tokens changes slowly along a path. So
every n-th evaluation computes it, and the others add what the last one added: FORA (arXiv 2407.01425) and Delta-DiT
(arXiv 2406.01125) do so in other transformers. docs/speed.md has the time and the cost in score.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from nitro_e.config import ConfigError
from nitro_e.interfaces import Model, TextEmbedding
from nitro_e.model import EMMDiT


class ReusedBlocks:
    """A Denoiser that computes the compressed blocks at every `every`-th call only; 1 computes them always.

    A time above the last one or equal to the first, or another number of rows, starts anew. The model is not changed: a shallow copy of it
    shares its weights.
    """

    def __init__(self, model: Model, every: int) -> None:
        if not isinstance(model, EMMDiT) or not model.config.groups[1]:
            raise ConfigError("only an E-MMDiT with compressed blocks can reuse them between steps")
        if every < 1:
            raise ConfigError(f"blocks are reused at every n-th step, n at least 1, not {every}")
        self.every = every
        self.model = copy.copy(model)
        self.model.run_blocks = self._run_blocks  # type: ignore[method-assign, assignment]
        self._run_all_blocks = model.run_blocks
        first, inside, _ = model.config.groups
        self._inside = range(first, first + inside)
        self._first = self._time = -1.0
        self._calls = 0
        self._added: tuple[Tensor, Tensor] | None = None  # to image (B, N, D) and text tokens (B, L, D)

    def __call__(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        time = t.max().item()
        self._calls += 1
        if time > self._time or time == self._first:  # another drawing
            self._first, self._calls = time, 0
        self._time = time
        return self.model(x, t, text)

    def weak(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """Compute the weak pass, which has no blocks to reuse."""
        return self.model.weak(x, t, text)

    def _run_blocks(
        self, indices: range, image: Tensor, words: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor]:
        if indices != self._inside or torch.is_grad_enabled():
            return self._run_all_blocks(indices, image, words, *arguments)
        if self._calls % self.every and self._added is not None and self._added[0].shape == image.shape:
            return image + self._added[0], words + self._added[1]
        new_image, new_words = self._run_all_blocks(indices, image, words, *arguments)
        self._added = new_image - image, new_words - words
        return new_image, new_words
