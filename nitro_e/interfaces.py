"""Promises that the parts of the project make each other: structural protocols, and the two base classes of models.

Ranges and shapes used everywhere:
    pixels    (B, 3, H, W) float, -1..1
    raw       (B, C, h, w) latents as the codec produces them; this is what shards store
    latents   (B, C, h, w) latents scaled to about unit variance; this is what the model sees
    t         (B,) float in 0..1; t = 0 is data, t = 1 is noise
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge, Le

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from nitro_e.randomness import SampleRandom
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
        if not isinstance(rows, Tensor | slice):  # indexing by a list would wait for the device
            rows = torch.tensor(rows, dtype=torch.long).to(self.tokens.device, non_blocking=True)
        return TextEmbedding(self.tokens[rows], self.mask[rows])

    def where(self, keep: Tensor, other: TextEmbedding) -> TextEmbedding:
        """Keep the rows where `keep` (B,) is true and take the others from `other`, of B rows or of one."""
        return TextEmbedding(
            torch.where(keep[:, None, None], self.tokens, other.tokens.to(self.tokens)),
            torch.where(keep[:, None], self.mask, other.mask),
        )


def as_prompts(prompts: Iterable[str], name: str = "prompts") -> list[str]:
    """Return a list of strings. A bare string is refused: each character would become a prompt."""
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

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Move the weights to a device and cast them; what has no weights of a dtype keeps its own."""


class LatentCodec(Protocol):
    channels: int
    stride: int  # pixels per latent cell, per side

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """pixels -> raw latents."""

    def normalize(self, raw: Tensor) -> Tensor:
        """raw latents -> latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """latents -> pixels (the inverse of both steps, clipped to -1..1)."""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Move the weights to a device and cast them; what has no weights of a dtype keeps its own."""


class VisionEncoder(Protocol):
    width: int

    def features(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """pixels -> (B, h*w, width) patch features on the grid (h, w), row by row."""


class Denoiser(Protocol):
    """Samplers take one: a `Model`, a guided one, a test's lambda."""

    def __call__(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """Velocity `noise - data` at (x, t): (B, C, h, w)."""


class DistContext(NamedTuple):
    """Rank, world size and sum over processes, for code that runs alone as well as in one of several processes."""

    rank: int = 0
    world_size: int = 1
    sum: Callable[[Tensor], Tensor] = lambda values: values  # every process must call it


Grid = tuple[int, int]  # rows, columns of tokens


@dataclass(frozen=True, kw_only=True)
class Architecture(Config):
    """Base of the models' configs: what recipes, stages and samplers ask before there are weights.

    `kind` decides the class: a name of KINDS, or "module:name" for one of your own (docs/model.md shows how).
    A subclass adds its fields, `depth` and `build`. The other methods fit a transformer on one token grid.
    """

    # the first is taken where a recipe names none
    KINDS: ClassVar[Mapping[str, str]] = {"emmdit": "nitro_e.model.emmdit:ModelConfig"}
    # fields that say nothing about the weights: a run may go on from weights that had others
    FREE: ClassVar[tuple[str, ...]] = ()
    # fields in which first weights may differ from the model, and the value they then must have: see `Model.adopt`
    ADOPTED: ClassVar[Mapping[str, Any]] = {}

    kind: str  # the class of the model
    latent_channels: Annotated[int, Ge(1), Le(65536)] = 32  # channels of the codec's latents
    text_width: Annotated[int, Ge(1), Le(65536)] = 2048  # width of the text encoder's embeddings
    patch_size: Annotated[int, Ge(1), Le(256)] = 1  # latent cells per token side
    width: Annotated[int, Ge(1), Le(65536)] = 768  # channels of a token
    position_table: Annotated[int, Ge(1), Le(1024)] = 96  # tokens per side of the largest grid

    @property
    def depth(self) -> int:
        """The number of blocks; a tap, 1 to depth, is the place after so many of them."""
        raise NotImplementedError

    def build(self) -> Model:
        """Make the model, with fresh weights from torch's global generator."""
        raise NotImplementedError

    def build_empty(self) -> Model:
        """Make a model whose parameters are all replaced afterwards; big ones take no memory for them."""
        return self.build()

    @property
    def attends_padding(self) -> bool:
        """True if padded text positions influence the result; then data must store them."""
        return False

    def feature_maps(self, tap: int) -> tuple[int, ...]:
        """List the maps that image tokens form after `tap` blocks, by ratio r: (rows / r, columns / r) each."""
        self.check_taps([tap])
        return (1,)

    @property
    def default_taps(self) -> tuple[int, ...]:
        """The taps that a discriminator reads by default: three, the last after the last block."""
        return tuple(sorted({max(round(self.depth * part / 3), 1) for part in (1, 2, 3)}))

    def check_taps(self, taps: Sequence[int]) -> None:
        """Raise ConfigError for a tap outside 1 to depth."""
        for tap in taps:
            if not 1 <= tap <= self.depth:
                raise ConfigError(f"taps {list(taps)}: block counts must be in 1 to {self.depth}")

    def latent_grid(self, height: int, width: int) -> Grid:
        """Return the token grid of a latent of this size."""
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(f"latent {height}x{width} is not a multiple of patch_size {self.patch_size}")
        return height // self.patch_size, width // self.patch_size

    def check_grid(
        self, height: int, width: int, text_length: int | None = None, pixels: int | None = None
    ) -> None:
        """Raise ConfigError for a token grid (rows, columns) or a text length that the model cannot work on.

        pixels: per token side, when the message should speak of pixels.
        """
        problem = self.grid_problem(height, width)
        if problem is not None:
            sizes = [_size(*grid, pixels) for grid in self.nearest_grids(height, width)]
            nearest = (
                f"the nearest that work: {', '.join(sizes)}" if sizes else "no grid works with this config"
            )
            raise ConfigError(f"{_size(height, width, pixels)}: {problem}; {nearest}")
        if text_length is not None:
            self.check_text_length(text_length)

    def nearest_grids(self, height: int, width: int, count: int = 3) -> list[Grid]:
        """Return the token grids that work and are nearest in rows plus columns."""
        sides = range(1, self.position_table + 1)
        grids = sorted(
            itertools.product(sides, sides),
            key=lambda grid: (abs(grid[0] - height) + abs(grid[1] - width), grid),
        )
        return list(itertools.islice((grid for grid in grids if self.grid_problem(*grid) is None), count))

    def similar_grids(self, height: int, width: int, low: float = 0.7, high: float = 1.35) -> list[Grid]:
        """Return the token grids that work and have `low` to `high` times as many tokens, the squarest first."""
        sides, tokens = range(1, self.position_table + 1), height * width
        grids = [
            grid
            for grid in itertools.product(sides, sides)
            if low * tokens <= grid[0] * grid[1] <= high * tokens and self.grid_problem(*grid) is None
        ]
        return sorted(grids, key=lambda grid: (max(grid) / min(grid), -grid[0] * grid[1], grid))

    def grid_problem(self, height: int, width: int) -> str | None:
        """Return why the model cannot work on a token grid, or None."""
        if height < 1 or width < 1:
            return "there must be at least one token"
        if max(height, width) > self.position_table:
            return f"more than the {self.position_table} tokens per side of position_table"
        return None

    def check_text_length(self, length: int) -> None:
        """Raise ConfigError for a number of text tokens that the model cannot work on."""


def _size(height: int, width: int, pixels: int | None) -> str:
    return f"grid {height}x{width}" if pixels is None else f"{height * pixels}x{width * pixels} px"


class AdapterLayer(NamedTuple):
    """A linear layer that LoRA may be put on."""

    path: str  # of the nn.Linear within the model
    # its name in adapter files; with several names it is cut into as many layers of equal output width
    names: tuple[str, ...]
    attention: bool  # part of `targets: attention`; the others are only in `targets: blocks`


class Model(nn.Module):
    """Base of the diffusion transformers that the stages train and the samplers draw from.

    A subclass defines `forward_intermediates`. The rest is optional: `condition` for adversarial
    distillation, `adapter_layers` for LoRA, `compile_blocks` and `gradient_checkpointing` for speed and
    memory. What a model does not define raises ConfigError where it is asked for.
    """

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """Predict the velocity `noise - data`.

        x: (B, C, h, w) latents at time t; t: (B,) in 0..1, 1 = noise; text: tokens (B, L, text_width), mask
        (B, L). Returns (B, C, h, w), or velocities for n places of a policy, (B, n, C, h, w). A grid or text
        length that the config does not allow raises ConfigError.
        """
        return self.forward_intermediates(x, t, text)[0]

    def forward_intermediates(
        self, x: Tensor, t: Tensor, text: TextEmbedding, taps: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Return `forward`, and for each tap in 1..depth the image tokens (B, N, width) after so many blocks.

        The N tokens are those of the maps of `config.feature_maps(tap)`, map after map, each row by row.
        """
        raise NotImplementedError

    def weak(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """Predict a worse velocity by a part of the model alone, which guidance leads away from; see `forward`."""
        raise self._lacks("weak pass; use guidance: text")

    def velocity_target(self, velocity: Tensor, t: Tensor) -> Tensor:
        """Return what `forward` is trained towards at t (B,) where `noise - data` (B, C, h, w) is the true velocity."""
        return velocity

    def adopt(self, source: Model) -> None:
        """Take the weights of a model whose config differs in fields of `config.ADOPTED` at most."""
        self.load_state_dict(source.state_dict())

    def condition(self, t: Tensor, text: TextEmbedding) -> tuple[Tensor, Tensor]:
        """Return float32 features (B, width) of the times and of the real text tokens, for discriminators."""
        raise self._lacks("features of time and text, which adversarial distillation needs")

    def adapter_layers(self) -> list[AdapterLayer]:
        """List the linear layers that LoRA may be put on."""
        raise self._lacks("layers for LoRA; set stage.adapter: null")

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile the blocks in place; options are those of torch.compile."""
        raise self._lacks("compiled blocks; set engine.compile: false, or sample without compiling")

    @property
    def gradient_checkpointing(self) -> bool:
        """True if the backward pass computes activations again instead of keeping them."""
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted: bool) -> None:
        if wanted:
            raise self._lacks("gradient checkpointing; set engine.gradient_checkpointing: false")

    def _lacks(self, what: str) -> ConfigError:
        return ConfigError(f"model.kind '{self.config.kind}' offers no {what}")


@dataclass
class Batch:
    """One micro-batch on the training device."""

    latents: Tensor  # (B, C, h, w)
    text: TextEmbedding
    prompts: list[str]
    keys: list[str]  # "shard.tar:key" of every sample, for reports
    features: Tensor | None = None  # (B, h*w, F), only when REPA asks for it
    info: list[dict] = field(default_factory=list)  # the sample's json member, if any
    step: int = 0  # the optimiser step that it is for


LossFn = Callable[[nn.Module, Any, "SampleRandom"], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Phase:
    """These parameters, this loss, this optimiser.

    `loss(net, batch, rng)` returns the scalar to minimise and what to log: scalars, or (2,) sums with their counts,
    of which the mean over processes and steps is reported. `net` is the engine's view (DDP,
    compiled, autocast) of `module`; whatever else the loss calls is bare and frozen, or the `net` of another phase of
    the stage, for phases that share a forward pass.

    A phase is due in steps start, start + every, start + 2 every, ..., and then makes `repeat` updates on the batches of
    the step, each with random numbers of its own. In other steps nothing of it runs: no loss, no optimiser, no average
    of its weights. Its learning rate follows its own updates.
    """

    name: str
    module: nn.Module
    loss: LossFn
    optim: OptimConfig
    # with the phase's optimisers, once they have stepped
    after_step: Callable[[list[Optimizer]], None] | None = None
    every: int = 1  # steps from one in which the phase is due to the next
    repeat: int = 1  # updates in each of them
    start: int = 0  # the first of them
    net: nn.Module | None = None  # set by the engine

    def due(self, step: int) -> bool:
        """Tell whether the phase runs in this step."""
        return step >= self.start and (step - self.start) % self.every == 0

    def updates(self, step: int) -> int:
        """Count the updates before this step; of the last step + 1, those of the whole run."""
        return max(0, -(-(step - self.start) // self.every)) * self.repeat


class Stage(Protocol):
    """A stream of batches and an ordered tuple of phases: all that differs between the stages of training.

    Some members are optional: `period: int`, steps that belong together (a run stops and saves only between them),
    `write_extras(model, folder)`, which writes more files beside the published weights of `model`, `notes() -> dict`,
    what to write into the record once at the start, `headline: tuple[str, ...]`, the metrics that the progress line shows
    first, `images() -> dict`, images of the last batches by name, shown with the sample grids, and, for stages that train
    an adapter, `base() -> Model`, what it is put on, and `is_frozen(name)`, which names the tensors of the base: they are
    kept once per run and not in every checkpoint.
    """

    name: str
    batch_size: int  # samples of one micro-batch
    forward_flops: float  # of the trained model, per sample
    fingerprint: dict[str, Any]  # of the data order; a resume with another one is refused

    @property
    def model(self) -> nn.Module:
        """The trained model, which the EMA averages and hooks are shown."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases, in their order within a step."""

    @property
    def bad_samples(self) -> int:
        """Samples that this process has replaced so far because they could not be used."""

    def batches(self, step: int, rank: int, world: int, accumulate: int) -> Iterator[Any]:
        """Endless micro-batches of one process, from optimiser step `step` on."""

    def export(self, model: nn.Module) -> nn.Module:
        """The bare model to publish."""
