"""E-MMDiT: the diffusion transformer of Nitro-E (arXiv 2510.27135), every idea of it behind one validated config.

    latents -> patch embedding + positions -> blocks on the full grid
            -> multi-path token compression -> blocks on few tokens -> reconstruction + positions again
            -> blocks on the full grid -> velocity

A choice in `ModelConfig` decides which module is built; what is off has no parameters and no branch in `forward`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nitro_e.config import Config, ConfigError, Ge, Gt, Le
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import layers
from nitro_e.model.layers import Grid, Region
from nitro_e.model.transforms import transformed


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """The architecture. Defaults are the released 512 px model (302,449,952 parameters)."""

    PRESETS: ClassVar[dict[str, dict]] = {
        "nitro-e-512": {},
        "nitro-e-1024": {"base_grid": 32, "attention": ("full",)},
        "base-8": dict(width=384, heads=12, groups=(3, 8, 3), base_grid=8, attention=("full", "4x1", "2x2")),
        "small-8": dict(width=192, heads=6, groups=(2, 6, 2), base_grid=8, attention=("full", "4x1", "2x2")),
        "tiny-8": dict(width=128, heads=4, groups=(2, 4, 2), base_grid=8, attention=("full", "4x1", "2x2")),
        "micro-8": dict(width=48, heads=2, groups=(1, 2, 1), base_grid=8, attention=("full", "4x1", "2x2")),
    }

    latent_channels: Annotated[int, Ge(1), Le(65536)] = 32
    text_width: Annotated[int, Ge(1), Le(65536)] = 2048
    patch_size: Annotated[int, Ge(1), Le(256)] = 1
    width: Annotated[int, Ge(1), Le(65536)] = 768
    heads: Annotated[int, Ge(1), Le(65536)] = 24
    mlp_ratio: Annotated[float, Gt(0), Le(100)] = 3.0
    # blocks before, inside and after the compressed part
    groups: tuple[
        Annotated[int, Ge(0), Le(1000)], Annotated[int, Ge(0), Le(1000)], Annotated[int, Ge(1), Le(1000)]
    ] = (4, 16, 4)
    # ratio of each path; () off, (2,) single path
    compression: tuple[Annotated[int, Ge(2), Le(256)], ...] = (2, 4)
    position_reinforcement: bool = True
    modulation: Literal["affine", "single", "full"] = "affine"
    attention: tuple[str, ...] = ("full", "4x1", "4x4")  # ASA, tiled over all blocks; ("full",) off
    qk_norm: bool = True
    text_mask: Literal["none", "real"] = "none"  # released weights attend to padded positions too
    gate_init: Literal["random", "zero", "one"] = "random"  # mean of the gates at the start; released: random
    base_grid: Annotated[int, Ge(1), Le(1024)] = 16  # tokens per side of the training resolution
    position_table: Annotated[int, Ge(1), Le(1024)] = 96  # tokens per side of the largest grid

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 4:
            raise ConfigError(
                f"width {self.width} is not a multiple of 4, which the 2-D position table needs"
            )
        if self.mlp_hidden < 1:
            raise ConfigError(f"mlp_ratio {self.mlp_ratio} leaves nothing of the MLP; choose a larger one")
        for ratio in self.compression:
            if self.width % ratio**2:
                raise ConfigError(
                    f"compression ratio {ratio} needs a width that is a multiple of {ratio**2}, not {self.width}"
                )
        if len(set(self.compression)) != len(self.compression):
            raise ConfigError(f"compression {list(self.compression)}: the ratios must differ")
        if self.position_reinforcement and not self.compression:
            raise ConfigError(
                "position_reinforcement needs compression: there is no reconstruction to reinforce"
            )
        if not self.attention:
            raise ConfigError("attention must name at least one pattern, for example [full]")
        for name in self.attention:
            try:
                Region.parse(name)
            except ValueError:
                raise ConfigError(f"attention '{name}': expected 'full' or 'RxN' such as '4x1'") from None
        self.check_grid(self.base_grid, self.base_grid)

    # ---- what follows from the choices

    @property
    def depth(self) -> int:
        return sum(self.groups)

    @property
    def mlp_hidden(self) -> int:
        return round(self.width * self.mlp_ratio)

    @functools.cached_property
    def regions(self) -> tuple[Region, ...]:
        """The attention region of every block."""
        cycle = [Region.parse(name) for name in self.attention]
        return tuple(cycle[index % len(cycle)] for index in range(self.depth))

    @functools.cached_property
    def multiples(self) -> tuple[int, int, int]:
        """What the number of tokens in each of the three groups must be a multiple of."""
        first, inside, _ = self.groups
        parts = self.regions[:first], self.regions[first : first + inside], self.regions[first + inside :]
        return tuple(math.lcm(*(region.multiple for region in part)) for part in parts)

    @property
    def interpolation(self) -> int:
        """Positions are spread as for a 512 px image, whatever the training grid."""
        return max(self.base_grid * self.patch_size // 16, 1)

    def image_tokens(self, height: int, width: int) -> tuple[int, int, int]:
        """Image tokens in each of the three groups, for a token grid."""
        full = height * width
        inside = sum(full // ratio**2 for ratio in self.compression) if self.compression else full
        return full, inside, full

    def on_full_grid(self, tap: int) -> bool:
        """Whether the image tokens after the first `tap` blocks are the full grid."""
        return not self.compression or tap <= self.groups[0] or tap > self.groups[0] + self.groups[1]

    def check_grid(
        self, height: int, width: int, text_length: int | None = None, pixels: int | None = None
    ) -> None:
        """Refuse a token grid (rows, columns) or text length that the architecture does not divide.

        pixels: per token side, when the message should speak of pixels.
        """
        problem = self._grid_problem(height, width)
        if problem is not None:
            sizes = [_size(*grid, pixels) for grid in self.nearest_grids(height, width)]
            nearest = (
                f"the nearest that work: {', '.join(sizes)}" if sizes else "no grid works with this config"
            )
            raise ConfigError(f"{_size(height, width, pixels)}: {problem}; {nearest}")
        if text_length is not None:
            self._check_text_length(text_length)

    def nearest_grids(self, height: int, width: int, count: int = 3) -> list[Grid]:
        """The token grids that work and are nearest in rows plus columns."""
        sides = range(step := math.lcm(*self.compression), self.position_table + 1, step)
        grids = sorted(
            itertools.product(sides, sides),
            key=lambda grid: (abs(grid[0] - height) + abs(grid[1] - width), grid),
        )
        return list(itertools.islice((grid for grid in grids if self._grid_problem(*grid) is None), count))

    def _grid_problem(self, height: int, width: int) -> str | None:
        """Why a token grid does not fit, or None."""
        if height < 1 or width < 1:
            return "there must be at least one token"
        if max(height, width) > self.position_table:
            return f"more than the {self.position_table} tokens per side of position_table"
        for ratio in self.compression:
            if height % ratio or width % ratio:
                return f"{height}x{width} tokens are not a multiple of compression ratio {ratio}"
        for group, (tokens, multiple) in enumerate(
            zip(self.image_tokens(height, width), self.multiples), start=1
        ):
            if tokens % multiple:
                return f"attention {list(self.attention)} needs multiples of {multiple} tokens, but group {group} has {tokens}"
        return None

    def _check_text_length(self, length: int) -> None:
        multiple = math.lcm(*self.multiples)
        if length < 1 or length % multiple:
            lengths = [
                n for n in (length // multiple * multiple, -(-length // multiple) * multiple) if n > 0
            ] or [multiple]
            raise ConfigError(
                f"attention {list(self.attention)} needs multiples of {multiple} tokens, but the text has {length}; "
                f"the nearest text length that works: {' or '.join(map(str, lengths))}"
            )

    def latent_grid(self, height: int, width: int) -> Grid:
        """Token grid of a latent of this size."""
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(f"latent {height}x{width} is not a multiple of patch_size {self.patch_size}")
        return height // self.patch_size, width // self.patch_size


def _size(height: int, width: int, pixels: int | None) -> str:
    return f"grid {height}x{width}" if pixels is None else f"{height * pixels}x{width * pixels} px"


GATE_ROWS = [2, 5]  # of the six modulation rows


class EMMDiT(nn.Module):
    """Velocity of latents at time t given text. See `ModelConfig` for what can be switched."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        c, width = config, config.width
        self.patch = nn.Linear(c.latent_channels * c.patch_size**2, width)
        self.text = nn.Linear(c.text_width, width)
        self.time = layers.TimeEmbedding(width)
        self.shared_modulation = layers.Keep() if c.modulation == "full" else layers.SharedModulation(width)
        self.key_mask = real_key_mask if c.text_mask == "real" else no_key_mask

        self.position = layers.AddPosition(c.position_table, width, c.base_grid, c.interpolation)
        self.reinforce = self.position if c.position_reinforcement else layers.Keep()
        self.compress = layers.Compressor(width, c.compression) if c.compression else layers.Keep()
        self.reconstruct = layers.Reconstructor(width, c.compression) if c.compression else layers.Keep()

        last = c.depth - 1
        self.blocks = nn.ModuleList(
            (layers.LastBlock if index == last else layers.Block)(
                width, c.heads, c.mlp_hidden, c.modulation, c.qk_norm, region
            )
            for index, region in enumerate(c.regions)
        )
        self.norm_out = layers.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.out = nn.Linear(width, c.latent_channels * c.patch_size**2)
        self.gradient_checkpointing = self.compiled = False
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """All initial values, one rule per line; nothing else in the model sets any."""
        for module in self.modules():
            if isinstance(module, nn.Linear):  # Xavier-uniform weights, zero biases, as in DiT
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, layers.HeadNorm):
                nn.init.ones_(module.weight)
        for linear in (self.time.linear_in, self.time.linear_out):  # small time embedding, as in DiT
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.out.weight)  # the first prediction is zero
        for module in self.modules():
            if isinstance(
                module, (layers.AffineModulation, layers.SingleModulation)
            ):  # N(0, 1 / D), as released
                for table in module.parameters():
                    nn.init.normal_(table, std=self.config.width**-0.5)
        if self.config.gate_init != "random":
            self._initialize_gates()

    def _initialize_gates(self) -> None:
        """zero: every residual branch starts closed (AdaLN-zero, arXiv 2212.09748); one: open, plus the random part."""
        start = {"zero": 0.0, "one": 1.0}[self.config.gate_init]
        for module in self.modules():
            if isinstance(module, (layers.AffineModulation, layers.SingleModulation)):
                module.bias[GATE_ROWS] = start
            elif isinstance(module, layers.FullModulation):
                module.linear.bias.view(6, -1)[GATE_ROWS] = start
            if start == 0 and isinstance(module, (layers.SharedModulation, layers.FullModulation)):
                module.linear.weight.view(6, self.config.width, -1)[GATE_ROWS] = 0.0

    # ---- forward

    def forward(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """Velocity `noise - data`.

        x: (B, C, h, w) latents at time t; t: (B,) in 0..1, 1 = noise; text: tokens (B, L, text_width), mask (B, L).
        Returns (B, C, h, w). A grid or text length the config does not divide raises ConfigError.
        """
        return self.forward_intermediates(x, t, text)[0]

    def forward_intermediates(
        self, x: Tensor, t: Tensor, text: TextEmbedding, taps: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """`forward`, and the image tokens (B, N_tap, D) after the first `tap` blocks for each tap in 1..depth."""
        for tap in taps:
            if not 1 <= tap <= self.config.depth:
                raise ConfigError(f"taps {list(taps)}: block counts must be in 1 to {self.config.depth}")
        tapped: dict[int, Tensor | None] = {tap: None for tap in taps}
        grid = self.config.latent_grid(*x.shape[-2:])
        self.config.check_grid(*grid, text.tokens.shape[1])

        image = self.position(self.patch(self.patchify(x)), grid)  # (B, N, D)
        words = self.text(text.tokens.to(self.text.weight.dtype))  # (B, L, D)
        time = self.shared_modulation(self.time(t))  # (B, 6, D), or (B, D) for full modulation

        first, inside, _ = self.config.groups
        image, words = self.run_blocks(range(first), image, words, time, text.mask, tapped)
        saved = image
        image = self.compress(image, grid)
        image, words = self.run_blocks(range(first, first + inside), image, words, time, text.mask, tapped)
        image = self.reinforce(self.reconstruct(image, saved, grid), grid)
        image, _ = self.run_blocks(
            range(first + inside, len(self.blocks)), image, words, time, text.mask, tapped
        )

        velocity = self.unpatchify(self.out(self.norm_out(image)), grid)
        return velocity, [tapped[tap] for tap in taps]

    def run_blocks(
        self,
        indices: range,
        image: Tensor,
        words: Tensor,
        time: Tensor,
        mask: Tensor,
        tapped: dict[int, Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        visible = self.key_mask(image, mask)  # (B, N + L) or None
        plain = transformed()  # then as they are: neither compiled nor computed twice
        eager = (
            torch.compiler.set_stance("force_eager") if plain and self.compiled else contextlib.nullcontext()
        )
        with eager:
            for index in indices:
                block = self.blocks[index]
                if self.gradient_checkpointing and torch.is_grad_enabled() and not plain:
                    image, words = checkpoint(block, image, words, time, visible, use_reentrant=False)
                else:
                    image, words = block(image, words, time, visible)
                if index + 1 in tapped:
                    tapped[index + 1] = image
        return image, words

    def patchify(self, x: Tensor) -> Tensor:
        p = self.config.patch_size
        x = x.to(self.patch.weight.dtype)
        return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)  # (B, N, C p^2)

    def unpatchify(self, x: Tensor, grid: Grid) -> Tensor:
        p = self.config.patch_size
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=p, q=p)

    # ---- speed

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile every block in place: a few graphs shared by all blocks, one per region and token count.

        Whole graphs or an error; names in the state dict stay as they are. options: of torch.compile, such as
        `mode="reduce-overhead"` for sampling on CUDA. The rest of the model (1 % of the arithmetic) stays as it is.
        """
        dynamo = torch._dynamo.config  # graphs of one Block.forward; the name that torch 2.6 knows too
        dynamo.cache_size_limit = max(dynamo.cache_size_limit, 64)
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False, **options)
        self.compiled = True

    # ---- files

    @classmethod
    def from_pretrained(cls, source: Any, **options: Any) -> EMMDiT:
        """Load weights; see `nitro_e.model.pretrained.load_pretrained` for what `source` may be."""
        from nitro_e.model.pretrained import load_pretrained

        return load_pretrained(source, **options)


def no_key_mask(image: Tensor, text_mask: Tensor) -> None:
    """Every position is attended to, padding included, as the released weights expect."""
    return None


def real_key_mask(image: Tensor, text_mask: Tensor) -> Tensor:
    """(B, N + L): all image tokens and the real text tokens are visible."""
    return torch.cat([text_mask.new_ones(image.shape[:2]), text_mask], dim=1)
