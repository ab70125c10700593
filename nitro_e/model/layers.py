"""The parts of an E-MMDiT block, and the embeddings around the blocks.

Shapes: B batch, N image tokens, L text tokens, D width, H heads, K head width. Image tokens run row by row.
Section numbers refer to the E-MMDiT paper (arXiv 2510.27135) unless another paper is named.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nitro_e.model.cpu.attention import attend
from nitro_e.model.transforms import transformed

Grid = tuple[int, int]  # rows, columns of tokens

# ------------------------------------------------------------------------------------------------ embeddings


def timestep_sinusoids(t: Tensor, width: int = 256) -> Tensor:
    """(B,) in 0..1 -> (B, width): cosines then sines of 1000 t at geometric frequencies 1 .. 1/10000, float32."""
    half = width // 2
    frequencies = torch.exp(
        -math.log(10_000) / half * torch.arange(half, dtype=torch.float32, device=t.device)
    )
    angles = 1000.0 * t.float()[:, None] * frequencies  # (B, width / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """t (B,) in 0..1 -> (B, D), after the SiLU that every modulation projection starts with."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(256, width)
        self.linear_out = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        x = timestep_sinusoids(t).to(self.linear_in.weight.dtype)
        return F.silu(self.linear_out(F.silu(self.linear_in(x))))


class SharedModulation(nn.Module):
    """One modulation vector for all blocks (AdaLN-single, PixArt-alpha arXiv 2310.00426, Section 2.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, time: Tensor) -> Tensor:
        return rearrange(self.linear(time), "b (six d) -> b six d", six=6)


def sincos_table(size: int, width: int, base_grid: int, interpolation: int) -> Tensor:
    """(size, size, width) fixed 2-D position table: sines and cosines of the column, then of the row.

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

    def __init__(self, size: int, width: int, base_grid: int, interpolation: int) -> None:
        super().__init__()
        self.register_buffer("table", sincos_table(size, width, base_grid, interpolation), persistent=False)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        size = self.table.shape[0]
        top, left = (size - grid[0]) // 2, (size - grid[1]) // 2
        crop = self.table[top : top + grid[0], left : left + grid[1]].flatten(0, 1)  # (N, D)
        return x + crop.to(x.dtype)


class Keep(nn.Module):
    """Stands where a part is switched off: returns its first input."""

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
    """AdaLN-affine (Section 3.4): each block's own affine map of the one shared vector e, bias + e * (1 + scale)."""

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
    """Subregion attention (ASA, Section 3.5): tokens viewed as (l s n); each of the s groups attends alone.

    `4x1` (s = 4, n = 1) takes every 4th token, `4x4` runs of 4 out of every 16, `1x1` is full attention. Image and
    text counts are both multiples of s * n, so splitting the joint sequence splits each stream in the same way.
    """

    groups: int  # s
    run: int  # n

    @classmethod
    def parse(cls, name: str) -> Region:
        """`full` or `RxN`; ValueError otherwise."""
        if name == "full":
            return cls(1, 1)
        groups, _, run = name.partition("x")
        region = cls(int(groups), int(run))
        if region.groups < 1 or region.run < 1:
            raise ValueError(name)
        return region

    @property
    def multiple(self) -> int:
        return self.groups * self.run

    def split(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (B, s, N / (s n), n, ...), a view: the tokens of each group, in order."""
        return rearrange(x.unflatten(1, (-1, self.groups, self.run)), "b l s n ... -> b s l n ...")

    def merge(self, x: Tensor) -> Tensor:
        """Attended tokens of every group (B s, H, N, K) -> (B, N, H K)."""
        return rearrange(x, "(b s) h (l n) k -> b (l s n) (h k)", s=self.groups, n=self.run)


def normalise(x: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, without weight, in the operators that every derivative is known of."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """torch's, but where tangents are: derived again, the forward-mode rule of torch's takes mean and deviation for
    constants (pytorch issue 196700)."""

    def forward(self, x: Tensor) -> Tensor:
        if not transformed():
            return super().forward(x)
        x = normalise(x - x.mean(-1, keepdim=True), self.eps)
        return x if self.weight is None else torch.addcmul(self.bias, x, self.weight)


class HeadNorm(nn.Module):
    """The weight of an RMSNorm over each head's K channels; `normalise_heads` applies several at once."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_width))


def normalise_heads(x: Tensor, *norms: HeadNorm) -> Tensor:
    """x: (B, N, norms, H, K)."""
    weight = torch.stack([norm.weight for norm in norms]).to(x.dtype)  # (norms, K)
    x = normalise(x, 1e-6) if transformed() else F.rms_norm(x, x.shape[-1:], eps=1e-6)
    return x * weight[:, None]


def keep_heads(x: Tensor, *norms: nn.Module) -> Tensor:
    return x


class AttentionInput(nn.Module):
    """Queries, keys and values of one stream."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm = LayerNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(width // heads) if qk_norm else nn.Identity()
        self.normalise = normalise_heads if qk_norm else keep_heads

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised and modulated tokens (B, N, D) -> three of (B, N, H, K)."""
        qkv = rearrange(self.qkv(x), "b n (three h k) -> b n three h k", three=3, h=self.heads)
        q, k = self.normalise(qkv[:, :, :2], self.q_norm, self.k_norm).unbind(2)
        return q, k, qkv[:, :, 2]


class MLP(nn.Sequential):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


# ----------------------------------------------------------------------------------------------------- block


class Stream(nn.Module):
    """One stream (image or text) of a block: what happens before the joint attention, and after it."""

    def __init__(self, width: int, heads: int, hidden: int, modulation: str, qk_norm: bool) -> None:
        super().__init__()
        self.modulation = MODULATIONS[modulation](width)
        self.attention = AttentionInput(width, heads, qk_norm)
        self.attention_out = nn.Linear(width, width)
        self.norm_mlp = LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(width, hidden)

    def before(self, x: Tensor, m: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention(modulate(self.attention.norm(x), m.shift_attention, m.scale_attention))

    def after(self, x: Tensor, attended: Tensor, m: Modulation) -> Tensor:
        x = torch.addcmul(x, m.gate_attention, self.attention_out(attended))
        return torch.addcmul(x, m.gate_mlp, self.mlp(modulate(self.norm_mlp(x), m.shift_mlp, m.scale_mlp)))


class TextContext(AttentionInput):
    """The text stream of the last block: it gives keys and values and is not updated."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward(self.norm(x))


class Block(nn.Module):
    """Joint image-text attention within the groups of a region, then an MLP per stream; residuals are gated."""

    def __init__(
        self, width: int, heads: int, hidden: int, modulation: str, qk_norm: bool, region: Region
    ) -> None:
        super().__init__()
        self.region = region
        self.image = Stream(width, heads, hidden, modulation, qk_norm)
        self.text = Stream(width, heads, hidden, modulation, qk_norm)

    def forward(
        self, image: Tensor, text: Tensor, time: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """image (B, N, D), text (B, L, D), time: shared modulation or time embedding, mask (B, N + L) or None."""
        m_image, m_text = self.image.modulation(time), self.text.modulation(time)
        attended_image, attended_text = joint_attention(
            self.image.before(image, m_image), self.text.before(text, m_text), self.region, mask
        )
        return self.image.after(image, attended_image, m_image), self.text.after(text, attended_text, m_text)


class LastBlock(nn.Module):
    """A block whose text is read but not updated: nothing would read the update."""

    def __init__(
        self, width: int, heads: int, hidden: int, modulation: str, qk_norm: bool, region: Region
    ) -> None:
        super().__init__()
        self.region = region
        self.image = Stream(width, heads, hidden, modulation, qk_norm)
        self.text = TextContext(width, heads, qk_norm)

    def forward(
        self, image: Tensor, text: Tensor, time: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        m_image = self.image.modulation(time)
        attended, _ = joint_attention(self.image.before(image, m_image), self.text(text), self.region, mask)
        return self.image.after(image, attended, m_image), text


def joint_attention(image: tuple, text: tuple, region: Region, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(q, k, v) of both streams, each (B, N | L, H, K), attend to each other -> (B, N, D), (B, L, D).

    mask: (B, N + L) bool over keys, True = attended to, or None.
    """
    # each (B s, H, (N + L) / s, K)
    q, k, v = (_heads_first(region.split(i), region.split(t)) for i, t in zip(image, text))
    out = attend(q, k, v, None if mask is None else region.split(mask).flatten(2).flatten(0, 1))
    tokens = image[0].shape[1] // region.groups
    return region.merge(out[:, :, :tokens]), region.merge(out[:, :, tokens:])


def _heads_first(image: Tensor, text: Tensor) -> Tensor:
    """Both streams of every group, heads before tokens, in one copy."""
    joint = torch.cat([rearrange(x, "b s l n h k -> b s h l n k") for x in (image, text)], dim=3)
    return rearrange(joint, "b s h l n k -> (b s) h (l n) k")


# ----------------------------------------------------------------------------------------------- compression


class PathDown(nn.Sequential):
    """One compression path: fold r x r tokens into channels, then two 1x1 maps."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__(
            nn.Linear(width * ratio**2, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.ratio = ratio

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        r = self.ratio
        x = rearrange(x, "b (h i w j) d -> b (h w) (d i j)", h=grid[0] // r, w=grid[1] // r, i=r, j=r)
        return super().forward(x)  # (B, N / r^2, D)


class PathUp(nn.Sequential):
    """One reconstruction path: unfold channels into r x r tokens, then two 1x1 maps."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__(
            nn.Linear(width // ratio**2, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.ratio = ratio

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        r = self.ratio
        x = rearrange(x, "b (h w) (d i j) -> b (h i w j) d", h=grid[0] // r, w=grid[1] // r, i=r, j=r)
        return super().forward(x)  # (B, N, D)


class Compressor(nn.Module):
    """Multi-path token compression (Section 3.3): the tokens of every path, one path after the other."""

    def __init__(self, width: int, ratios: tuple[int, ...]) -> None:
        super().__init__()
        self.paths = nn.ModuleList(PathDown(width, ratio) for ratio in ratios)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return torch.cat([path(x, grid) for path in self.paths], dim=1)


class Reconstructor(nn.Module):
    """Back to the full grid from all paths and the tokens saved before compression (Section 3.3)."""

    def __init__(self, width: int, ratios: tuple[int, ...]) -> None:
        super().__init__()
        self.paths = nn.ModuleList(PathUp(width, ratio) for ratio in ratios)
        self.merge = nn.Sequential(
            nn.Linear((len(ratios) + 1) * width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )

    def forward(self, x: Tensor, saved: Tensor, grid: Grid) -> Tensor:
        counts = [saved.shape[1] // path.ratio**2 for path in self.paths]
        parts = [path(part, grid) for path, part in zip(self.paths, x.split(counts, dim=1))]
        return self.merge(torch.cat([*parts, saved], dim=-1))
