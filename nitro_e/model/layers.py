"""The parts of an E-MMDiT block, and the embeddings around the blocks.

Shapes: B batch, N image tokens, L text tokens, D width, H heads, K head width. Image tokens run row by row.
Section numbers refer to the E-MMDiT paper (arXiv 2510.27135) unless another paper is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nitro_e.config import ConfigError
from nitro_e.interfaces import Grid
from nitro_e.model.cpu.attention import attend_in_chunks
from nitro_e.model.transforms import exporting, transformed

# ------------------------------------------------------------------------------------------------ embeddings


def timestep_sinusoids(t: Tensor, width: int = 256) -> Tensor:
    """Embed t (B,) in 0..1 as (B, width) float32: cosines, then sines, of 1000 t at frequencies 1 .. 1/10000."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=t.device)
    )
    angles = 1000.0 * t.float()[:, None] * frequencies  # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Map t (B,) in 0..1 to (B, D), including the SiLU that every modulation projection starts with.

    speed: of the sinusoids; 1 as released, 1/1000 for an embedding whose derivative in t is small.
    """

    def __init__(self, width: int, speed: float = 1.0) -> None:
        super().__init__()
        self.speed = speed
        self.linear_in = nn.Linear(256, width)
        self.linear_out = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        if t.ndim != 1:
            raise ConfigError("sampler 'flow_map' steps between two times, which needs model.interval: true")
        return F.silu(self.project(t))

    def project(self, t: Tensor) -> Tensor:
        """Return what the last SiLU is applied to, (B, D)."""
        x = timestep_sinusoids(t * self.speed).to(self.linear_in.weight.dtype)
        return self.linear_out(F.silu(self.linear_in(x)))

    @torch.no_grad()
    def imitate(self, other: TimeEmbedding) -> None:
        """Fit the embedding to that of another speed, by least squares over t in 0..1.

        The hidden units begin to rise one after the other. Their slope and the ridge keep activations and weights small, so
        that training moves the result little at a step; what the other does within a tenth of t or less is smoothed.
        """
        units, t = len(self.linear_in.weight), torch.linspace(0, 1, 2049, dtype=torch.float64)
        starts = torch.linspace(-0.1, 1, units, dtype=torch.float64)
        self.linear_in.weight.zero_()
        # entry 128 is the sine of t itself where speed is 1 / 1000
        rising = 8.0
        self.linear_in.weight[:, 128] = rising
        self.linear_in.bias.copy_(-rising * torch.sin(starts))
        device = self.linear_in.weight.device
        hidden = F.silu(self.linear_in(timestep_sinusoids((t * self.speed).to(device)))).double()
        basis = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)
        weak = 0.3 * torch.eye(units + 1, dtype=torch.float64, device=device)
        target = torch.cat(
            [other.project(t.to(device)).double(), torch.zeros_like(basis[: units + 1, :units])]
        )
        solved = torch.linalg.lstsq(torch.cat([basis, weak]), target).solution
        self.linear_out.weight.copy_(solved[:-1].T)
        self.linear_out.bias.copy_(solved[-1])


class IntervalEmbedding(TimeEmbedding):
    """Embeds t, and how far it is to an earlier time r, for average velocities from t to r.

    t: (B, 2) columns t and r; or (B,), with r = 0. The second part is zero at first.
    """

    def __init__(self, width: int, speed: float = 1.0) -> None:
        super().__init__(width, speed)
        self.elapsed = TimeEmbedding(width, speed)

    def forward(self, t: Tensor) -> Tensor:
        t, r = t.unbind(1) if t.ndim == 2 else (t, torch.zeros_like(t))
        return super().forward(t) + self.elapsed(t - r)


class SharedModulation(nn.Module):
    """One modulation vector for all blocks (AdaLN-single, PixArt-alpha arXiv 2310.00426, Section 2.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, time: Tensor) -> Tensor:
        return rearrange(self.linear(time), "b (six d) -> b six d", six=6)


def sincos_table(size: int, width: int, base_grid: int, interpolation: int) -> Tensor:
    """Compute a fixed 2-D position table (size, size, width): sines and cosines of column, then row.

    Neighbours are `base_grid / size / interpolation` apart, as in diffusers' PatchEmbed.
    """
    positions = torch.arange(size, dtype=torch.float32) / (size / base_grid) / interpolation
    quarter = width // 4
    omega = 1.0 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = positions.double()[:, None] * omega  # (size, D / 4)
    one = torch.cat([angles.sin(), angles.cos()], dim=-1).float()  # (size, D / 2)
    columns, rows = one[None].expand(size, size, -1), one[:, None].expand(size, size, -1)
    return torch.cat([columns, rows], dim=-1)


class AddPosition(nn.Module):
    """Add the centre crop of a fixed sin-cos table to the tokens of a grid."""

    table: Tensor

    def __init__(self, size: int, width: int, base_grid: int, interpolation: int) -> None:
        super().__init__()
        self.register_buffer("table", sincos_table(size, width, base_grid, interpolation), persistent=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        size = self.table.shape[0]
        top, left = (size - grid[0]) // 2, (size - grid[1]) // 2
        crop = self.table[top : top + grid[0], left : left + grid[1]].flatten(0, 1)  # (N, D)
        return x + crop.to(x.dtype)


class Skip(nn.Module):
    """Takes the place of a part that is switched off, and returns its first input."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


# ------------------------------------------------------------------------------------------------ modulation


class Modulation(NamedTuple):
    """Shift, scale and gate of the attention and of the MLP, each (B, 1, D)."""

    shift_attention: Tensor
    scale_attention: Tensor
    gate_attention: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


class AffineModulation(nn.Module):
    """AdaLN-affine (Section 3.4): each block maps the one shared vector e to bias + e * (1 + scale)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(6, width))
        self.scale = nn.Parameter(torch.empty(6, width))

    def forward(self, shared: Tensor) -> Modulation:
        rows = torch.addcmul(self.bias, shared, 1 + self.scale)  # (B, 6, D)
        return Modulation(*rows[:, :, None].unbind(1))


class SingleModulation(nn.Module):
    """AdaLN-single (arXiv 2310.00426, Section 2.3): each block only shifts the shared vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(6, width))

    def forward(self, shared: Tensor) -> Modulation:
        return Modulation(*(self.bias + shared)[:, :, None].unbind(1))


class FullModulation(nn.Module):
    """AdaLN (DiT, arXiv 2212.09748, Section 3.2): each block projects the time embedding itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, time: Tensor) -> Modulation:
        return Modulation(*rearrange(self.linear(time), "b (six d) -> six b 1 d", six=6))


MODULATIONS = {"affine": AffineModulation, "single": SingleModulation, "full": FullModulation}


# ------------------------------------------------------------------------------------------------- attention


class Region(NamedTuple):
    """Describes a pattern of subregion attention (ASA, Section 3.5): s groups of tokens, each attending alone.

    A region sees tokens as one list, in which the image's run row by row; it knows no rows and columns. The
    list is viewed as (l s n), and group i has the entries (:, i, :): of `4x1` (s = 4, n = 1) every 4th token,
    of `4x4` runs of 4 out of every 16; `1x1`, also called `full`, is full attention. The numbers of image and
    of text tokens are both multiples of s * n, so splitting the joint list splits each stream in the same
    way.
    """

    groups: int  # s
    run: int  # n

    @classmethod
    def parse(cls, name: str) -> Region:
        """Read `full` or `RxN`, s and n; raise ValueError for anything else."""
        if name == "full":
            return cls(1, 1)
        groups, _, run = name.partition("x")
        region = cls(int(groups), int(run))
        if region.groups < 1 or region.run < 1:
            raise ValueError(name)
        return region

    @property
    def multiple(self) -> int:
        """Return the number that token counts must be a multiple of."""
        return self.groups * self.run

    def split(self, x: Tensor) -> Tensor:
        """View tokens (B, N, ...) as groups (B, s, N / (s n), n, ...), each in order."""
        return rearrange(x.unflatten(1, (-1, self.groups, self.run)), "b l s n ... -> b s l n ...")

    def merge(self, x: Tensor) -> Tensor:
        """Put the attended tokens of all groups (B s, H, N / s, K) back in order: (B, N, H K)."""
        return rearrange(x, "(b s) h (l n) k -> b (l s n) (h k)", s=self.groups, n=self.run)


class Ragged(NamedTuple):
    """Describes texts of unequal lengths, one behind the other in a single row: (1, sum of rows x length, ...)."""

    # (rows, length) of each group of rows, in the order of the image's
    groups: tuple[tuple[int, int], ...]
    # of each group: what `attend` calls visible, (rows, N + length), or None
    visible: tuple[Tensor | None, ...]


# which keys are attended to: what `attend` calls visible, (B, N + L), or None for all; Ragged if text is
KeyMask = Tensor | Ragged | None


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax attention. q, k, v: (B, H, N, K); visible: of the keys, or None.

    visible: (B, N) bool, True = attended to, or numbers in q's dtype that are added to the scores of a key.
    On a CPU the same is computed by two matrix products, which are twice as fast for such narrow heads.
    """
    mask = None if visible is None else visible[:, None, None]
    if transformed():
        with sdpa_kernel(SDPBackend.MATH):  # the one kernel that knows tangents and second derivatives
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if q.device.type == "cpu" and not exporting():
        return attend_in_chunks(q, k, v, visible, torch.is_grad_enabled())[0]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, of operators that have derivatives of every kind and order."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """torch's layer norm, replaced under forward-mode AD and torch.func: there torch's rule takes mean and
    deviation for constants when it is derived again (pytorch issue 196700).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not transformed():
            return super().forward(x)
        x = rms_norm(x - x.mean(-1, keepdim=True), self.eps)
        return x if self.weight is None else torch.addcmul(self.bias, x, self.weight)


class RMSNorm(nn.RMSNorm):
    """torch's RMS norm, replaced by plain operators under forward-mode AD and torch.func, as `LayerNorm` is."""

    def forward(self, x: Tensor) -> Tensor:
        if not transformed():
            return super().forward(x)
        assert self.eps is not None
        x = rms_norm(x, self.eps)
        return x if self.weight is None else x * self.weight


NORMS: dict[str, Callable[..., nn.Module]] = {"layer": LayerNorm, "rms": RMSNorm}


class HeadNorm(nn.Module):
    """Holds the weight of an RMSNorm over each head's K channels, which `normalise_qk` applies."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_width))


def normalise_qk(qk: Tensor, q_norm: HeadNorm, k_norm: HeadNorm) -> Tensor:
    """RMSNorm over each head's channels, of queries and keys in one pass: (B, N, 2, H, K) -> the same shape."""
    weight = torch.stack([q_norm.weight, k_norm.weight]).to(qk.dtype)[:, None]  # (2, 1, K)
    weight = weight.expand(qk.shape[2:]).flatten()  # (2 H K,): its gradient is a sum over rows, quick to take
    normed = rms_norm(qk, 1e-6) if transformed() else F.rms_norm(qk, qk.shape[-1:], eps=1e-6)
    return (normed.flatten(2) * weight).view(qk.shape)


def keep_qk(qk: Tensor, *norms: nn.Module) -> Tensor:
    """Leave queries and keys as they are: `qk_norm` is off."""
    return qk


class FusedLinear(nn.Linear):
    """Several linear layers of one input and of equal widths, computed as one; Muon can take them apart."""

    def __init__(self, features: int, width: int, parts: int) -> None:
        super().__init__(features, parts * width)
        self.parts = parts


class Design(NamedTuple):
    """Holds what all blocks of a model have alike: sizes, and the kinds of their parts."""

    width: int
    heads: int
    hidden: int  # of the MLPs
    modulation: str  # a key of MODULATIONS
    qk_norm: bool
    norm: str  # a key of NORMS
    mlp: str  # a key of MLPS


class AttentionInput(nn.Module):
    """Project the tokens of one stream to queries, keys and values."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        width, heads = design.width, design.heads
        self.heads = heads
        self.norm = NORMS[design.norm](width, eps=1e-5)
        self.qkv = FusedLinear(width, width, parts=3)
        self.q_norm = HeadNorm(width // heads) if design.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // heads) if design.qk_norm else nn.Identity()
        self.normalise: Callable[..., Tensor] = normalise_qk if design.qk_norm else keep_qk

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: normalised and modulated tokens (B, N, D). Returns q, k and v, each (B, N, H, K)."""
        qkv = rearrange(self.qkv(x), "b n (three h k) -> b n three h k", three=3, h=self.heads)
        qk, v = qkv.split([2, 1], dim=2)  # not two slices, each of which has a gradient of the full size
        q, k = self.normalise(qk, self.q_norm, self.k_norm).unbind(2)
        return q, k, v.squeeze(2)


class MLP(nn.Sequential):
    """Two linear layers with a GELU between them."""

    def __init__(self, features: int, hidden: int, out: int) -> None:
        super().__init__(nn.Linear(features, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, out))


class Gate(nn.Module):
    """Multiply the second half of the channels by the SiLU of the first: (..., 2 H) -> (..., H)."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class SwiGLU(nn.Sequential):
    """Two linear layers with a gate between them (arXiv 2002.05202); the first gives gate and values."""

    def __init__(self, features: int, hidden: int, out: int) -> None:
        super().__init__(FusedLinear(features, hidden, parts=2), Gate(), nn.Linear(hidden, out))


MLPS: dict[str, Callable[[int, int, int], nn.Module]] = {"gelu": MLP, "swiglu": SwiGLU}


# ----------------------------------------------------------------------------------------------------- block


QKV = tuple[Tensor, Tensor, Tensor]
Values = tuple[Tensor, Tensor]  # of image and text: (B, N, H, K) and (B, L, H, K)


class OwnValues(nn.Module):
    """Let a block attend to its own values alone."""

    def forward(self, image: QKV, text: QKV, first: Values | None) -> tuple[QKV, QKV, Values | None]:
        return image, text, first


class FirstValues(nn.Module):
    """Pass the values of the first block of a group on to the others."""

    def forward(self, image: QKV, text: QKV, first: Values | None) -> tuple[QKV, QKV, Values | None]:
        return image, text, (image[2], text[2])


class ValueResidual(nn.Module):
    """Mix the values of the group's first block into a block's own (arXiv 2410.17897); a share for each stream is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.empty(2))

    def forward(self, image: QKV, text: QKV, first: Values) -> tuple[QKV, QKV, Values]:
        mixed = [
            (q, k, torch.lerp(v, v_first, share.to(v.dtype)))
            for (q, k, v), v_first, share in zip((image, text), first, self.share)
        ]
        return mixed[0], mixed[1], first


VALUES = {"own": OwnValues, "first": FirstValues, "mixed": ValueResidual}


class Stream(nn.Module):
    """One stream (image or text) of a block: modulation, the layers around joint attention, and MLP."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        width = design.width
        self.modulation = MODULATIONS[design.modulation](width)
        self.attention = AttentionInput(design)
        self.attention_out = nn.Linear(width, width)
        self.norm_mlp = NORMS[design.norm](width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLPS[design.mlp](width, design.hidden, width)

    def project_qkv(self, x: Tensor, m: Modulation) -> QKV:
        """x (B, N, D) -> q, k and v, each (B, N, H, K)."""
        return self.attention(modulate(self.attention.norm(x), m.shift_attention, m.scale_attention))

    def update(self, x: Tensor, attended: Tensor, m: Modulation) -> Tensor:
        """Add what was attended to and the MLP's output to x (B, N, D), both gated."""
        x = torch.addcmul(x, m.gate_attention, self.attention_out(attended))
        return torch.addcmul(x, m.gate_mlp, self.mlp(modulate(self.norm_mlp(x), m.shift_mlp, m.scale_mlp)))


class TextContext(AttentionInput):
    """The text stream of the last block: it gives keys and values and is not updated."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward(self.norm(x))


class Block(nn.Module):
    """Joint image-text attention within the groups of a region, then an MLP per stream; residuals are gated."""

    def __init__(self, design: Design, region: Region, values: str) -> None:
        super().__init__()
        self.region = region
        self.image = Stream(design)
        self.text = Stream(design)
        self.values = VALUES[values]()

    def forward(
        self, image: Tensor, text: Tensor, time: Tensor, mask: KeyMask, first: Values | None = None
    ) -> tuple[Tensor, Tensor, Values | None]:
        """image (B, N, D), text (B, L, D), time: shared modulation or embedding, mask: see `KeyMask`.

        first: values of the group's first block, where blocks mix them into their own.
        """
        m_image, m_text = self.image.modulation(time), self.text.modulation(time)

        # attention: both streams see both, within each group of the region
        image_qkv = self.image.project_qkv(image, m_image)
        text_qkv = self.text.project_qkv(text, m_text)
        image_qkv, text_qkv, first = self.values(image_qkv, text_qkv, first)
        attended_image, attended_text = joint_attention(image_qkv, text_qkv, self.region, mask)

        # gated residuals and MLP: each stream by itself
        image = self.image.update(image, attended_image, m_image)
        text = self.text.update(text, attended_text, m_text)
        return image, text, first


class LastBlock(nn.Module):
    """A block whose text is read but not updated, because nothing would read the update."""

    def __init__(self, design: Design, region: Region, values: str) -> None:
        super().__init__()
        self.region = region
        self.image = Stream(design)
        self.text = TextContext(design)
        self.values = VALUES[values]()

    def forward(
        self, image: Tensor, text: Tensor, time: Tensor, mask: KeyMask, first: Values | None = None
    ) -> tuple[Tensor, Tensor, Values | None]:
        m_image = self.image.modulation(time)
        image_qkv = self.image.project_qkv(image, m_image)
        image_qkv, text_qkv, first = self.values(image_qkv, self.text(text), first)
        attended, _ = joint_attention(image_qkv, text_qkv, self.region, mask)
        return self.image.update(image, attended, m_image), text, first


def joint_attention(image: QKV, text: QKV, region: Region, mask: KeyMask) -> tuple[Tensor, Tensor]:
    """Let image tokens (q, k, v each (B, N, H, K)) and text tokens (B, L, H, K) attend to each other.

    Returns (B, N, D) and (B, L, D).
    """
    if isinstance(mask, Ragged):
        return ragged_attention(image, text, region, mask)
    q, k, v = (join(region.split(i), region.split(t)) for i, t in zip(image, text))
    visible = None if mask is None else region.split(mask).flatten(2).flatten(0, 1)  # (B s, (N + L) / s)
    out = attend(q, k, v, visible)
    tokens = image[0].shape[1] // region.groups
    return region.merge(out[:, :, :tokens]), region.merge(out[:, :, tokens:])


def ragged_attention(image: QKV, text: QKV, region: Region, mask: Ragged) -> tuple[Tensor, Tensor]:
    """Attend group by group, where each has texts of one length; text and what is returned of it: (1, sum, ...)."""
    images = zip(*(part.split([rows for rows, _ in mask.groups]) for part in image))
    texts = zip(*(part[0].split([rows * length for rows, length in mask.groups]) for part in text))
    attended = [
        joint_attention(i, tuple(part.unflatten(0, group) for part in t), region, visible)
        for i, t, group, visible in zip(images, texts, mask.groups, mask.visible)
    ]
    return torch.cat([i for i, _ in attended]), torch.cat([t.flatten(0, 1) for _, t in attended])[None]


def join(image: Tensor, text: Tensor) -> Tensor:
    """Join the split tokens of both streams, heads before tokens, in one copy: (B s, H, (N + L) / s, K)."""
    joint = torch.cat([rearrange(x, "b s l n h k -> b s h l n k") for x in (image, text)], dim=3)
    return rearrange(joint, "b s h l n k -> (b s) h (l n) k")


# ----------------------------------------------------------------------------------------------- compression


def fold(x: Tensor, grid: Grid, r: int) -> Tensor:
    """Put each r x r neighbourhood of tokens into one: (B, N, D) -> (B, N / r^2, D r^2)."""
    return rearrange(x, "b (h i w j) d -> b (h w) (d i j)", h=grid[0] // r, w=grid[1] // r, i=r, j=r)


def unfold(x: Tensor, grid: Grid, r: int) -> Tensor:
    """Take each token apart into r x r: (B, N / r^2, D) -> (B, N, D / r^2)."""
    return rearrange(x, "b (h w) (d i j) -> b (h i w j) d", h=grid[0] // r, w=grid[1] // r, i=r, j=r)


class Compressor(nn.Module):
    """Multi-path token compression (Section 3.3): the folded tokens of every path, one path after the other."""

    def __init__(self, width: int, ratios: tuple[int, ...]) -> None:
        super().__init__()
        self.ratios = ratios
        self.paths = nn.ModuleList(MLP(width * ratio**2, width, width) for ratio in ratios)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return torch.cat([path(fold(x, grid, ratio)) for path, ratio in zip(self.paths, self.ratios)], dim=1)


class Reconstructor(nn.Module):
    """Restore the full grid from all paths and the tokens saved before compression (Section 3.3)."""

    def __init__(self, width: int, ratios: tuple[int, ...]) -> None:
        super().__init__()
        self.ratios = ratios
        self.paths = nn.ModuleList(MLP(width // ratio**2, width, width) for ratio in ratios)
        self.merge = MLP((len(ratios) + 1) * width, width, width)

    def forward(self, x: Tensor, saved: Tensor, grid: Grid) -> Tensor:
        parts = x.split([saved.shape[1] // ratio**2 for ratio in self.ratios], dim=1)
        full = [path(unfold(part, grid, ratio)) for path, part, ratio in zip(self.paths, parts, self.ratios)]
        return self.merge(torch.cat([*full, saved], dim=-1))


class TextCompressor(nn.Module):
    """Pool each run of r text tokens into one, for the compressed part: (B, L, D) -> (B, L / r, D)."""

    def __init__(self, width: int, ratio: int, hide_padding: bool) -> None:
        super().__init__()
        self.ratio = ratio
        self.pool = nn.Linear(ratio * width, width)
        self.visible: Callable[[Tensor, Tensor], Tensor] = zero_padding if hide_padding else keep_padding

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        return self.pool(rearrange(self.visible(text, mask), "b (l r) d -> b l (r d)", r=self.ratio))


def zero_padding(text: Tensor, mask: Tensor) -> Tensor:
    """Zero the padded positions, so that pooling does not mix them into real ones."""
    return text.masked_fill(~mask[:, :, None], 0.0)


def keep_padding(text: Tensor, mask: Tensor) -> Tensor:
    """Pool all positions alike: padding takes part in attention too."""
    return text


class TextReconstructor(nn.Module):
    """Give what the compressed part has changed in each pooled text token back to its r saved ones."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.spread = nn.Linear(width, ratio * width)

    def forward(self, text: Tensor, pooled: Tensor, saved: Tensor) -> Tensor:
        """text, pooled: (B, L / r, D) after and before the compressed blocks; saved: (B, L, D). Returns (B, L, D)."""
        return saved + rearrange(self.spread(text - pooled), "b l (r d) -> b (l r) d", r=self.ratio)


# ------------------------------------------------------------------------------------------------- path drop


class DropTokens(nn.Module):
    """Put a learned vector in the place of what the compressed blocks gave, in dropped rows (SPRINT, arXiv 2510.21986)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.absent = nn.Parameter(torch.empty(width))

    def forward(self, image: Tensor, drop: Tensor) -> Tensor:
        """image: (B, N, D); drop: (B,) bool."""
        return torch.where(drop[:, None, None], self.absent.to(image.dtype), image)


class DropUpdate(nn.Module):
    """Leave the text as it was before the compressed blocks, in dropped rows."""

    def forward(self, text: Tensor, saved: Tensor, drop: Tensor) -> Tensor:
        """text, saved: (B, L, D) after and before the blocks; drop: (B,) bool."""
        return torch.where(drop[:, None, None], saved, text)
