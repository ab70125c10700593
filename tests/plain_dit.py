"""A plain cross-attention DiT (as PixArt): what somebody writes who brings a model of their own. docs/model.md, "Your own"."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from nitro_e.interfaces import AdapterLayer, Architecture, Model


@dataclass(frozen=True, kw_only=True)
class PlainConfig(Architecture):
    kind: str = "plain_dit:PlainConfig"
    heads: int = 2
    depth: int = 3

    def build(self) -> "PlainDiT":
        return PlainDiT(self)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross_q, self.cross_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.cross_out, self.modulation = nn.Linear(width, width), nn.Linear(width, 4 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def attend(self, q, k, v, mask=None):
        q, k, v = (rearrange(part, "b n (h k) -> b h n k", h=self.heads) for part in (q, k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h n k -> b n (h k)")

    def forward(self, x, words, mask, time):
        shift, scale, shift_mlp, scale_mlp = self.modulation(time)[:, None].chunk(4, dim=-1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        x = x + self.out(self.attend(*self.qkv(h).chunk(3, dim=-1)))
        x = x + self.cross_out(self.attend(self.cross_q(x), *self.cross_kv(words).chunk(2, dim=-1), mask))
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]) * (1 + scale_mlp) + shift_mlp)


class PlainDiT(Model):
    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        side, p, width = config.position_table, config.patch_size, config.width
        self.patch, self.text = (
            nn.Linear(config.latent_channels * p * p, width),
            nn.Linear(config.text_width, width),
        )
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU())
        self.position = nn.Parameter(0.02 * torch.randn(side, side, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.out = nn.Linear(width, config.latent_channels * p * p)
        self.register_buffer("frequencies", 2.0 ** torch.arange(8), persistent=False)

    def condition(self, t, text):
        real, angles = text.mask[:, :, None].float(), t.float()[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1).to(self.out.weight.dtype))
        words = self.text(text.tokens.to(self.out.weight.dtype)).float()
        return time.float(), (words * real).sum(1) / real.sum(1)

    def forward_intermediates(self, x, t, text, taps=()):
        (h, w), p, found = self.config.latent_grid(*x.shape[-2:]), self.config.patch_size, {}
        x = rearrange(x.to(self.out.weight.dtype), "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        x = self.patch(x) + self.position[:h, :w].flatten(0, 1)
        words, time = self.text(text.tokens.to(x.dtype)), self.condition(t, text)[0].to(x.dtype)
        for number, block in enumerate(self.blocks, start=1):
            x = found[number] = block(x, words, text.mask[:, None, None], time)
        x = rearrange(self.out(x), "b (h w) (c p q) -> b c (h p) (w q)", h=h, p=p, q=p)
        return x, [found[tap] for tap in taps]

    def adapter_layers(self):
        layers = [(name, layer) for name, layer in self.named_modules() if name.startswith("blocks.")]
        return [AdapterLayer(n, (n,), ".mlp" not in n) for n, layer in layers if isinstance(layer, nn.Linear)]
