"""What the parts of the project promise each other: structural protocols, no base classes to inherit.

Ranges and shapes used everywhere:
    pixels    (B, 3, H, W) float, -1..1
    raw       (B, C, h, w) latents as the codec produces them; this is what shards store
    latents   (B, C, h, w) latents scaled to about unit variance; this is what the model sees
    t         (B,) float in 0..1; t = 0 is data, t = 1 is noise
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nitro_e.config import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from nitro_e.randomness import SlotRandom
    from nitro_e.training.optim import OptimConfig


class TextEmbedding(NamedTuple):
    """The tokens of B prompts. A NamedTuple, so that DDP, torch.compile and pytrees see through it."""

    tokens: Tensor  # (B, L, D) float
    mask: Tensor  # (B, L) bool, True = a real token

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> TextEmbedding:
        """Move both parts to the device, then cast the tokens to `dtype` there; None keeps their own."""
        tokens, mask = (part.to(device, non_blocking=non_blocking) for part in self)
        return TextEmbedding(tokens.to(dtype or tokens.dtype), mask)

    def expand(self, rows: int) -> TextEmbedding:
        """Repeat one prompt `rows` times without a copy; `rows` prompts stay as they are."""
        return TextEmbedding(*(part.expand(rows, *part.shape[1:]) for part in self))

    def cat(self, *others: TextEmbedding) -> TextEmbedding:
        """Put the rows of the others below these."""
        return TextEmbedding(*(torch.cat(parts) for parts in zip(self, *others)))

    def take(self, rows: Tensor | Sequence[int] | slice) -> TextEmbedding:
        """Pick rows, as indexing does."""
        return TextEmbedding(self.tokens[rows], self.mask[rows])

    def where(self, keep: Tensor, other: TextEmbedding) -> TextEmbedding:
        """Keep the rows where `keep` (B,) is true and take the others from `other`, of B rows or of one."""
        return TextEmbedding(
            torch.where(keep[:, None, None], self.tokens, other.tokens.to(self.tokens)),
            torch.where(keep[:, None], self.mask, other.mask),
        )


def as_prompts(prompts: Iterable[str], name: str = "prompts") -> list[str]:
    """A list of strings. ConfigError for anything else: of a bare string every character would become a prompt."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise ConfigError(
            f"{name}: expected a list of strings, got {prompts!r}; write [...] around a single one"
        )
    prompts = list(prompts)
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ConfigError(f"{name}[{index}]: expected a string, got {prompt!r}")
    return prompts


class TextEncoder(Protocol):
    width: int  # D
    length: int  # L, the same for every prompt

    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        """Embed a list of prompts; "" is the null prompt of classifier-free guidance."""


class LatentCodec(Protocol):
    channels: int
    stride: int  # pixels per latent cell, per side

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """pixels -> raw latents."""

    def normalize(self, raw: Tensor) -> Tensor:
        """raw latents -> latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """latents -> pixels (the inverse of both steps, clipped to -1..1)."""


class VisionEncoder(Protocol):
    width: int

    def features(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """pixels -> (B, h*w, width) patch features on the grid (h, w), row by row."""


class Denoiser(Protocol):
    """What samplers take: an EMMDiT, a guided one, a test lambda."""

    def __call__(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """Velocity `noise - data` at (x, t): (B, C, h, w)."""


@dataclass
class Batch:
    """One micro-batch on the training device."""

    latents: Tensor  # (B, C, h, w)
    text: TextEmbedding
    prompts: list[str]
    keys: list[str]  # "shard.tar:key" of every sample, for reports
    features: Tensor | None = None  # (B, h*w, F), only when REPA asks for it
    info: list[dict] = field(default_factory=list)  # the sample's json member, if any


LossFn = Callable[[nn.Module, Any, "SlotRandom"], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Phase:
    """These parameters, this loss, this optimiser.

    `loss(net, batch, rng)` returns the scalar to minimise and what to log: scalars, or (2,) sums with their counts,
    of which the mean over processes and steps is reported. `net` is the engine's view (DDP,
    compiled, autocast) of `module`; whatever else the loss calls is bare and frozen, or the `net` of another phase of
    the stage, for phases that share a forward pass.
    """

    name: str
    module: nn.Module
    loss: LossFn
    optim: OptimConfig
    # with the phase's optimisers, once they have stepped
    after_step: Callable[[list[Optimizer]], None] | None = None
    net: nn.Module | None = None  # set by the engine


class Stage(Protocol):
    """A stream of batches and an ordered tuple of phases: all that differs between the stages of training.

    Three members are optional: `period: int`, steps that belong together (a run stops and saves only between them),
    `write_extras(model, folder)`, which writes more files beside the published weights of `model`, and `notes() -> dict`,
    what to write into the record once at the start.
    """

    name: str
    model: nn.Module  # averaged by the EMA, shown by hooks
    phases: tuple[Phase, ...]  # run in this order at every step
    batch_size: int  # samples of one micro-batch
    forward_flops: float  # of the trained model, per sample
    bad_samples: int  # replaced so far in this process because they could not be used
    fingerprint: dict[str, Any]  # of the data order; a resume with another one is refused

    def batches(self, step: int, rank: int, world: int, accumulate: int) -> Iterator[Any]:
        """Endless micro-batches of one process, from optimiser step `step` on."""

    def export(self, model: nn.Module) -> nn.Module:
        """The bare model to publish."""
