"""Random numbers as a pure function of (seed, purpose, step, sample index).

The sample index is a sample's place in the global batch. Draws are made in blocks of 32 indices, each block with its own
generator, so that a sample gets the same numbers on any number of processes and with any micro-batch size.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 32  # sample indices per generator


def seed_of(*parts: object) -> int:
    """Make a 63-bit seed of any printable parts."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextlib.contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Seed what is built inside the block, on the CPU, with `seed_of(*parts)`; torch's global state is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed_of(*parts) % 2**32)
        yield


class SampleRandom:
    """Draws for the `count` sample indices from `first` on; successive calls give fresh numbers."""

    def __init__(self, *purpose: object, first: int, count: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._blocks = []
        for block in range(first // BLOCK, (first + count - 1) // BLOCK + 1):
            generator = torch.Generator(device=self.device).manual_seed(seed_of(*purpose, block))
            start = block * BLOCK
            self._blocks.append((generator, max(first - start, 0), min(first + count - start, BLOCK)))

    def normal(self, *shape: int) -> Tensor:
        """Draw (count, *shape) standard normal numbers, float32."""
        return self._draw(torch.randn, shape)

    def uniform(self, *shape: int) -> Tensor:
        """Draw (count, *shape) numbers uniform in [0, 1), float32."""
        return self._draw(torch.rand, shape)

    def _draw(self, draw, shape: tuple[int, ...]) -> Tensor:
        parts = [
            draw(BLOCK, *shape, generator=generator, device=self.device)[low:high]
            for generator, low, high in self._blocks
        ]
        return torch.cat(parts)
