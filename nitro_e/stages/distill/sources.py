"""Where the batches of distillation come from: stored pairs, or prompts alone for objectives that need no images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from nitro_e.data import Data, Records
from nitro_e.data.buckets import size_of_step
from nitro_e.data.prompts import Prompt
from nitro_e.interfaces import LatentCodec, TextEmbedding, TextEncoder
from nitro_e.randomness import seed_of
from nitro_e.stages.batches import ahead, batches_ahead, encode, null_prompt, to_device
from nitro_e.stages.distill.inputs import DistillBatch

CHUNK = 64  # prompts that are embedded at a time
CACHE_BYTES = 2**31  # pools whose embeddings fit in are embedded once


class Source(Protocol):
    batch_size: int  # samples of one micro-batch
    fingerprint: dict[str, Any]  # of the order; a resume with another one is refused
    null_text: TextEmbedding  # (1, L, D)

    @property
    def bad_samples(self) -> int:
        """Samples that were replaced so far because they could not be used."""

    def batches(self, step: int, rank: int, world: int, accumulate: int) -> Iterator[DistillBatch]:
        """Endless micro-batches of one process, from optimiser step `step` on."""


class Pairs:
    """Stored images of the teacher as latents, with their prompts and, where inputs need it, their noise."""

    def __init__(
        self, data: Data, codec: LatentCodec, text: TextEncoder, needs_noise: bool, device: torch.device
    ) -> None:
        self.data, self.codec, self.text = data, codec, text
        self.needs_noise, self.device = needs_noise, device
        self.batch_size, self.fingerprint = data.config.batch_size, data.fingerprint()
        self.null_text = null_prompt(data, text, device)

    @property
    def bad_samples(self) -> int:
        return len(self.data.bad)

    def batches(self, step: int, rank: int, world: int, accumulate: int) -> Iterator[DistillBatch]:
        return batches_ahead(
            self.data,
            lambda records, step: self.encode(records, step, accumulate == 1),
            self.device,
            step=step,
            rank=rank,
            world=world,
            accumulate=accumulate,
        )

    def encode(self, record: Records, step: int, alone: bool) -> DistillBatch:
        """Encode records on the device. The noise in half precision is exactly what the teacher began with."""
        batch = encode(record, self.codec, self.text, self.device)
        noise = to_device(record.extra["noise.npy"], self.device) if self.needs_noise else None
        return DistillBatch(
            step, batch.latents, noise, batch.text, batch.prompts, batch.keys, alone, info=batch.info
        )


class Prompts:
    """Distinct prompts, each sample's drawn uniformly by seed, step and sample index.

    Their embeddings are made once and kept in memory (in the encoder's precision) where they take little of it.
    """

    bad_samples = 0

    def __init__(
        self,
        prompts: Sequence[Prompt],
        text: TextEncoder,
        latent_shapes: Sequence[tuple[int, int, int]],
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """latent_shapes: (C, h, w) of each size of image, of which a step has one."""
        info = {prompt.text: prompt.info for prompt in reversed(prompts)}  # of the first of its text
        self.prompts = list(dict.fromkeys(prompt.text for prompt in prompts))
        self.info = [info[prompt] for prompt in self.prompts]
        self.text, self.device = text, device
        self.latent_shapes, self.batch_size, self.seed = latent_shapes, batch_size, seed
        digest = hashlib.blake2b("\n".join(self.prompts).encode(), digest_size=8).hexdigest()
        self.fingerprint: dict[str, Any] = {"prompts": f"{len(self.prompts)} {digest}"}
        if len(latent_shapes) > 1:
            self.fingerprint["latents"] = [list(shape) for shape in latent_shapes]
        self.null_text = text.encode([""]).to(device, torch.float32)
        self.kept: TextEmbedding | None = None
        if self.null_text.tokens.nbytes * len(self.prompts) <= CACHE_BYTES:
            chunks = [self.prompts[first : first + CHUNK] for first in range(0, len(self.prompts), CHUNK)]
            first, *others = [text.encode(chunk) for chunk in chunks]
            self.kept = first.cat(*others)

    def batches(self, step: int, rank: int, world: int, accumulate: int) -> Iterator[DistillBatch]:
        return ahead(self._batches(step, rank, world, accumulate), accumulate, self.device)

    def _batches(self, step: int, rank: int, world: int, accumulate: int) -> Iterator[DistillBatch]:
        while True:
            for number in range(accumulate):
                first = (rank * accumulate + number) * self.batch_size
                yield self.batch(step, range(first, first + self.batch_size), alone=accumulate == 1)
            step += 1

    def batch(self, step: int, samples: range, alone: bool) -> DistillBatch:
        """Make the micro-batch of these sample indices."""
        rows = [seed_of(self.seed, "prompts", step, index) % len(self.prompts) for index in samples]
        prompts = [self.prompts[row] for row in rows]
        text = self.text.encode(prompts) if self.kept is None else self.kept.take(rows)
        text = text.to(self.device, torch.float32)
        keys = [f"prompt '{prompt}'" for prompt in prompts]
        info = [self.info[row] for row in rows]
        shape = size_of_step(self.latent_shapes, step, self.seed, "prompts")
        return DistillBatch(step, None, None, text, prompts, keys, alone, latent_shape=shape, info=info)
