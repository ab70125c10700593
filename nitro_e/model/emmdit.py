"""E-MMDiT: the diffusion transformer of Nitro-E (arXiv 2510.27135), each idea of it a choice of the config.

    latents -> patch embedding + positions -> blocks on the full grid
            -> multi-path token compression -> blocks on few tokens -> reconstruction + positions again
            -> blocks on the full grid -> velocity

A choice in `ModelConfig` decides which module is built; what is off has no parameters and no branch in
`forward`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nitro_e.config import ConfigError, Fraction, Ge, Gt, Le
from nitro_e.interfaces import AdapterLayer, Architecture, Grid, Model, TextEmbedding
from nitro_e.model import layers, names
from nitro_e.model.layers import Ragged, Region
from nitro_e.model.merging import MergedText
from nitro_e.model.prediction import PredictData, Prediction, PredictPolicy, PredictVelocity
from nitro_e.model.transforms import transformed


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Architecture):
    """Describes the architecture of an E-MMDiT. Defaults are the released 512 px model (302,449,952 parameters)."""

    PRESETS: ClassVar[dict[str, dict]] = {
        "nitro-e-512": {},
        "nitro-e-1024": {"base_grid": 32, "attention": ("full",)},
        "base-8": dict(width=384, heads=12, groups=(3, 8, 3), base_grid=8, attention=("full", "4x1", "2x2")),
        "small-8": dict(width=192, heads=6, groups=(2, 6, 2), base_grid=8, attention=("full", "4x1", "2x2")),
        "tiny-8": dict(width=128, heads=4, groups=(2, 4, 2), base_grid=8, attention=("full", "4x1", "2x2")),
        "micro-8": dict(width=48, heads=2, groups=(1, 2, 1), base_grid=8, attention=("full", "4x1", "2x2")),
    }

    FREE: ClassVar[tuple[str, ...]] = ("init", "gate_init", "base_grid", "attention")
    ADOPTED: ClassVar[Mapping[str, Any]] = {"time_input": "1000t", "interval": False, "policy": 1}

    kind: Literal["emmdit"] = "emmdit"  # the class of the model
    heads: Annotated[int, Ge(1), Le(65536)] = 24  # attention heads; they divide the width
    # hidden width of the MLPs as a multiple of the width
    mlp_ratio: Annotated[float, Gt(0), Le(100)] = 3.0
    # blocks before, inside and after the compressed part
    groups: tuple[
        Annotated[int, Ge(0), Le(1000)], Annotated[int, Ge(0), Le(1000)], Annotated[int, Ge(1), Le(1000)]
    ] = (4, 16, 4)
    # ratio of each path; [] is off, [2] a single path
    compression: tuple[Annotated[int, Ge(2), Le(256)], ...] = (2, 4)
    # text tokens pooled into one inside the compressed part; 1: all of them
    text_compression: Annotated[int, Ge(1), Le(256)] = 1
    # share of training samples that go without the compressed blocks, so that a pass without them can guide
    path_drop: Fraction = 0.0
    # add the positions again where tokens are reconstructed
    position_reinforcement: bool = True
    # affine: one shared modulation, with a scale and bias per block; single: shared alone; full: a layer per block
    modulation: Literal["affine", "single", "full"] = "affine"
    # subregion attention: a cycle of patterns, tiled over all blocks; [full] is off
    attention: tuple[str, ...] = ("full", "4x1", "4x4")
    qk_norm: bool = True  # RMS norm of queries and keys
    norm: Literal["layer", "rms"] = "layer"  # of tokens: layer norm, or RMS norm without biases
    # gelu: two linear layers; swiglu: a gated one, with two thirds of the hidden width
    mlp: Literal["gelu", "swiglu"] = "gelu"
    # mix the values of the first block of each of the three groups into those of its other blocks
    value_residual: bool = False
    # real: padded text positions are hidden; the released weights attend to them
    text_mask: Literal["none", "real"] = "none"
    # of the last layer; data: the velocity is (x - data) / t, with t at least prediction_floor
    prediction: Literal["velocity", "data"] = "velocity"
    # least time that a predicted image is divided by
    prediction_floor: Annotated[float, Gt(0), Le(1)] = 0.05
    # first weights: those of DiT, or torch's own, as the released code has them
    init: Literal["dit", "released"] = "dit"
    # mean of the residual gates at the start; released: random
    gate_init: Literal["random", "zero", "one"] = "random"
    # of the time embedding's sinusoids: as released, or slow ones, for objectives that take derivatives in t
    time_input: Literal["1000t", "t"] = "1000t"
    # a second time embedding, of the distance to an earlier time: for average velocities (MeanFlow)
    interval: bool = False
    # velocities that the last layer gives, for the places of a student's policy within one step (sampler policy)
    policy: Annotated[int, Ge(1), Le(64)] = 1
    # tokens per side of the training resolution
    base_grid: Annotated[int, Ge(1), Le(1024)] = 16

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
        if self.text_compression > 1 and not self.groups[1]:
            raise ConfigError("text_compression needs blocks inside the compressed part: groups[1] is 0")
        if self.path_drop and not (self.compression and self.groups[1]):
            raise ConfigError(
                "path_drop needs compression and blocks inside it: there is nothing else to drop"
            )
        if self.interval and self.prediction == "data":
            raise ConfigError(
                "interval needs prediction: velocity; an average velocity is no x minus the data"
            )
        if self.policy > 1 and self.prediction == "data":
            raise ConfigError("policy needs prediction: velocity; its places have their data from it")
        if not self.attention:
            raise ConfigError("attention must name at least one pattern, for example [full]")
        for name in self.attention:
            try:
                Region.parse(name)
            except ValueError:
                raise ConfigError(f"attention '{name}': expected 'full' or 'RxN' such as '4x1'") from None
        self.check_grid(self.base_grid, self.base_grid)

    def build(self) -> EMMDiT:
        return EMMDiT(self)

    def build_empty(self) -> EMMDiT:
        with torch.device("meta"):
            model = EMMDiT(self)
        model.position.table = layers.sincos_table(
            self.position_table, self.width, self.base_grid, self.interpolation
        )
        return model

    # ---- what follows from the choices

    @property
    def depth(self) -> int:
        return sum(self.groups)

    @property
    def attends_padding(self) -> bool:
        return self.text_mask == "none"

    @property
    def mlp_hidden(self) -> int:
        return round(self.width * self.mlp_ratio * {"gelu": 1, "swiglu": 2 / 3}[self.mlp])

    @functools.cached_property
    def regions(self) -> tuple[Region, ...]:
        """Return the attention region of every block."""
        cycle = [Region.parse(name) for name in self.attention]
        return tuple(cycle[index % len(cycle)] for index in range(self.depth))

    @property
    def values(self) -> tuple[str, ...]:
        """Name the values that every block attends to: a key of `layers.VALUES` each."""
        if not self.value_residual:
            return ("own",) * self.depth
        return tuple("mixed" if index else "first" for count in self.groups for index in range(count))

    @functools.cached_property
    def multiples(self) -> tuple[int, int, int]:
        """Return the number that the tokens of each of the three groups must be a multiple of."""
        start, end = self.groups[0], self.groups[0] + self.groups[1]
        before, inside, after = (
            math.lcm(*(region.multiple for region in part))
            for part in (self.regions[:start], self.regions[start:end], self.regions[end:])
        )
        return before, inside, after

    @property
    def interpolation(self) -> int:
        """Return the factor that spreads positions as for a 512 px image, whatever the training grid."""
        return max(self.base_grid * self.patch_size // 16, 1)

    def image_tokens(self, height: int, width: int) -> tuple[int, int, int]:
        """Count the image tokens in each of the three groups, for a token grid."""
        full = height * width
        inside = sum(full // ratio**2 for ratio in self.compression) if self.compression else full
        return full, inside, full

    def text_tokens(self, length: int) -> tuple[int, int, int]:
        """Count the text tokens in each of the three groups, for a text length."""
        return length, length // self.text_compression, length

    def feature_maps(self, tap: int) -> tuple[int, ...]:
        """List (1,) outside the compressed part, and the ratio of each path inside."""
        self.check_taps([tap])
        start, end = self.groups[0], self.groups[0] + self.groups[1]
        return self.compression if self.compression and start < tap <= end else (1,)

    @property
    def default_taps(self) -> tuple[int, ...]:
        """Return the taps at both ends of the compressed part, three in it, and the last block (512 px: 4, 10, 16, 19, 24)."""
        first, inside, _ = self.groups
        middle = [first + round(inside * share) for share in (6 / 16, 12 / 16, 15 / 16)]
        return tuple(sorted({max(first, 1), *middle, self.depth} - {0}))

    def grid_problem(self, height: int, width: int) -> str | None:
        problem = super().grid_problem(height, width)
        if problem is not None:
            return problem
        for ratio in self.compression:
            if height % ratio or width % ratio:
                return f"{height}x{width} tokens are not a multiple of compression ratio {ratio}"
        counts = self.image_tokens(height, width)
        for group, (tokens, multiple) in enumerate(zip(counts, self.multiples), start=1):
            if tokens % multiple:
                return f"attention {list(self.attention)} needs multiples of {multiple} tokens, but group {group} has {tokens}"
        return None

    @property
    def text_multiple(self) -> int:
        """Return the number that the text tokens must be a multiple of."""
        before, inside, after = self.multiples
        return math.lcm(before, self.text_compression * inside, after)

    def check_text_length(self, length: int) -> None:
        multiple = self.text_multiple
        if length < 1 or length % multiple:
            below, above = length // multiple * multiple, -(-length // multiple) * multiple
            lengths = [near for near in (below, above) if near > 0] or [multiple]
            pooled = f" with text_compression {self.text_compression}" if self.text_compression > 1 else ""
            raise ConfigError(
                f"attention {list(self.attention)}{pooled} needs multiples of {multiple} tokens, but the text has {length}; "
                f"the nearest text length that works: {' or '.join(map(str, lengths))}"
            )


GATE_ROWS = [2, 5]  # of the six modulation rows


class EMMDiT(Model):
    """Predicts the velocity of latents at time t given text. See `ModelConfig` for what can be switched."""

    # set in nitro_e/model/__init__.py: files know the models, so models cannot know the files
    from_pretrained: ClassVar[Callable[..., Model]]
    gradient_checkpointing = False
    config: ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        c, width = config, config.width
        self.patch = nn.Linear(c.latent_channels * c.patch_size**2, width)
        self.text = nn.Linear(c.text_width, width)
        embedding = layers.IntervalEmbedding if c.interval else layers.TimeEmbedding
        self.time = embedding(width, speed={"1000t": 1.0, "t": 1e-3}[c.time_input])
        self.shared_modulation = layers.Skip() if c.modulation == "full" else layers.SharedModulation(width)
        self.key_mask = real_key_mask if c.text_mask == "real" else no_key_mask

        self.position = layers.AddPosition(c.position_table, width, c.base_grid, c.interpolation)
        self.reinforce = self.position if c.position_reinforcement else layers.Skip()
        self.compress = layers.Compressor(width, c.compression) if c.compression else layers.Skip()
        self.reconstruct = layers.Reconstructor(width, c.compression) if c.compression else layers.Skip()
        pooled, hidden = c.text_compression > 1, c.text_mask == "real"
        self.compress_text = (
            layers.TextCompressor(width, c.text_compression, hidden) if pooled else layers.Skip()
        )
        self.restore_text = layers.TextReconstructor(width, c.text_compression) if pooled else layers.Skip()

        self.drop_tokens = layers.DropTokens(width) if c.path_drop else layers.Skip()
        self.drop_update = layers.DropUpdate() if c.path_drop else layers.Skip()

        last = c.depth - 1
        design = layers.Design(width, c.heads, c.mlp_hidden, c.modulation, c.qk_norm, c.norm, c.mlp)
        self.blocks = nn.ModuleList(
            (layers.LastBlock if index == last else layers.Block)(design, region, values)
            for index, (region, values) in enumerate(zip(c.regions, c.values))
        )
        self.norm_out = layers.NORMS[c.norm](width, eps=1e-6, elementwise_affine=False)
        self.out = nn.Linear(width, c.policy * c.latent_channels * c.patch_size**2)
        self.prediction: Prediction = (
            PredictData(c.prediction_floor)
            if c.prediction == "data"
            else PredictPolicy(c.policy)
            if c.policy > 1
            else PredictVelocity()
        )
        self.compiled = False
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Set all initial values, one rule per line; nothing else in the model sets any."""
        for module in self.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                # weights of one and no biases
                module.reset_parameters()
            elif isinstance(module, layers.HeadNorm):
                nn.init.ones_(module.weight)
        {"dit": self._initialize_as_dit, "released": self._initialize_as_released}[self.config.init]()
        # the average velocity is the velocity
        if isinstance(self.time, layers.IntervalEmbedding):
            nn.init.zeros_(self.time.elapsed.linear_out.weight)
        # text leaves the compressed part as it came
        for module in self.modules():
            if isinstance(module, layers.TextReconstructor):
                nn.init.zeros_(module.spread.weight)
        # a dropped path is zero, and half of mixed values are the block's own
        for module in self.modules():
            if isinstance(module, layers.DropTokens):
                nn.init.zeros_(module.absent)
            elif isinstance(module, layers.ValueResidual):
                nn.init.constant_(module.share, 0.5)
        # modulation tables N(0, 1 / D), as released
        for module in self.modules():
            if isinstance(module, (layers.AffineModulation, layers.SingleModulation)):
                for table in module.parameters():
                    nn.init.normal_(table, std=self.config.width**-0.5)
        if self.config.gate_init != "random":
            self._initialize_gates()

    def _initialize_as_dit(self) -> None:
        """Set linear layers: Xavier-uniform weights, zero biases, a small time embedding, and a last layer of zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for linear in (self.time.linear_in, self.time.linear_out):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.out.weight)

    def _initialize_as_released(self) -> None:
        """Set linear layers as torch does: weights and biases uniform within 1 / sqrt(inputs), the last layer too."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def _initialize_gates(self) -> None:
        """Close every residual branch (zero: AdaLN-zero, arXiv 2212.09748), or open it (one)."""
        start = {"zero": 0.0, "one": 1.0}[self.config.gate_init]
        for module in self.modules():
            if isinstance(module, (layers.AffineModulation, layers.SingleModulation)):
                module.bias[GATE_ROWS] = start
            elif isinstance(module, layers.FullModulation):
                module.linear.bias.view(6, -1)[GATE_ROWS] = start
            if start == 0 and isinstance(module, (layers.SharedModulation, layers.FullModulation)):
                module.linear.weight.view(6, self.config.width, -1)[GATE_ROWS] = 0.0

    # ---- forward

    def forward_intermediates(
        self,
        x: Tensor,
        t: Tensor,
        text: TextEmbedding | MergedText,
        taps: Sequence[int] = (),
        drop: Tensor | None = None,
        weak: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Model`. With path_drop: drop, (B,) bool, names rows to drop; weak drops all, and skips the blocks.

        A MergedText needs one time for all rows, t (1,), and weights without path_drop.
        """
        self.config.check_taps(taps)
        drop = torch.full(x.shape[:1], weak, device=x.device) if drop is None else drop
        grid = self.config.latent_grid(*x.shape[-2:])
        self.config.check_grid(*grid, text.tokens.shape[1])

        image = self.position(self.patch(self.patchify(x)), grid)  # (B, N, D)
        tapped = dict.fromkeys(taps, image)  # each entry is replaced after its block
        words = self.text(text.tokens.to(self.text.weight.dtype))  # (B, L, D)
        time = self.shared_modulation(self.time(t))  # (B, 6, D), or (B, D) for full modulation

        start, end = self.config.groups[0], self.config.groups[0] + self.config.groups[1]
        image, words = self.run_blocks(range(start), image, words, time, text, tapped)
        saved, saved_words = image, words
        image, pooled = self.compress(image, grid), self.compress_text(words, text.mask)
        inside = range(start, start if weak else end)
        image, words = self.run_blocks(inside, image, pooled, time, text, tapped)
        words = self.restore_text(words, pooled, saved_words)
        image, words = self.drop_tokens(image, drop), self.drop_update(words, saved_words, drop)
        image = self.reinforce(self.reconstruct(image, saved, grid), grid)
        image, _ = self.run_blocks(range(end, len(self.blocks)), image, words, time, text, tapped)

        out = self.unpatchify(self.out(self.norm_out(image)), grid)
        return self.prediction.velocity(out, x, t), [tapped[tap] for tap in taps]

    def run_blocks(
        self,
        indices: range,
        image: Tensor,
        words: Tensor,
        time: Tensor,
        text: TextEmbedding | MergedText,
        tapped: dict[int, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Run a group of blocks, and put the image tokens after those that `tapped` counts into it."""
        visible = self.key_mask(image, words, text)  # (B, N + L), Ragged, or None
        # under torch.func and forward-mode AD blocks run as they are: neither compiled nor checkpointed
        plain = transformed()
        eager = (
            torch.compiler.set_stance("force_eager") if plain and self.compiled else contextlib.nullcontext()
        )
        first = None  # values of the group's first block, if the others read them
        with eager:
            for index in indices:
                block, inputs = self.blocks[index], (image, words, time, visible, first)
                if self.gradient_checkpointing and torch.is_grad_enabled() and not plain:
                    image, words, first = checkpoint(block, *inputs, use_reentrant=False)
                else:
                    image, words, first = block(*inputs)
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

    def weak(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        if not self.config.path_drop:
            raise ConfigError(
                "guidance 'path' and 'both' need weights that were trained with model.path_drop; use guidance: text"
            )
        return self.forward_intermediates(x, t, text, weak=True)[0]

    # ---- what the stages ask for

    def velocity_target(self, velocity: Tensor, t: Tensor) -> Tensor:
        return self.prediction.target(velocity, t)

    def adopt(self, source: Model) -> None:
        weights = dict(source.state_dict())
        # what is new here is off at first
        new = {name: value for name, value in self.state_dict().items() if name not in weights}
        assert isinstance(source, EMMDiT), "the architectures were compared"
        if self.config.policy != source.config.policy:  # a velocity for every place, the same at first
            sizes = {"places": self.config.policy, "c": self.config.latent_channels}
            for name in ("out.weight", "out.bias"):
                weights[name] = repeat(weights[name], "(pq c) ... -> (pq places c) ...", **sizes)
        self.load_state_dict({**new, **weights})
        if self.config.time_input != source.config.time_input:
            self.time.imitate(source.time)

    def condition(self, t: Tensor, text: TextEmbedding) -> tuple[Tensor, Tensor]:
        words = self.text(text.tokens.to(self.text.weight.dtype)).float()  # (B, L, D)
        real = text.mask.float()[:, :, None]
        return self.time(t).float(), (words * real).sum(1) / real.sum(1).clamp(min=1)

    def adapter_layers(self) -> list[AdapterLayer]:
        """List the linear layers inside blocks, except modulation, by their names in the released format."""
        return [
            AdapterLayer(ours, tuple(theirs), attention=".attn." in theirs[0])
            for ours, theirs in names.block_linears(self.config.groups).items()
        ]

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile every block in place: a few graphs for all, one per region and token count.

        A block that cannot be one graph is an error. Names in the state dict stay as they are, and so does
        the rest of the model (1 % of the arithmetic). options: of torch.compile, such as
        `mode="reduce-overhead"` for sampling on CUDA.
        """
        dynamo = torch._dynamo.config  # graphs of one Block.forward; the name that torch 2.6 knows too
        dynamo.cache_size_limit = max(dynamo.cache_size_limit, 64)
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False, **options)
        self.compiled = True


def no_key_mask(image: Tensor, words: Tensor, text: TextEmbedding | MergedText) -> Ragged | None:
    """Attend to every position, padding included, as the released weights expect."""
    return text.keys(image, words) if isinstance(text, MergedText) else None


def real_key_mask(image: Tensor, words: Tensor, text: TextEmbedding | MergedText) -> Tensor:
    """Attend to all image tokens and the text tokens that stand for a real one: (B, N + L) bool.

    text.mask: (B, R L), R rows for each of the L text tokens.
    """
    real = text.mask.unflatten(1, (words.shape[1], -1)).any(2)
    return torch.cat([real.new_ones(image.shape[:2]), real], dim=1)
