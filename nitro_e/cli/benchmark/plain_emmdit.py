"""E-MMDiT written plainly, from a released state dict by its own names: what ours is compared with, in values and speed.

One function per idea, separate q, k and v, torch's scaled_dot_product_attention, no fusing, no reuse of our code.
Only the released choices: two compression paths, position reinforcement, AdaLN-affine, qk norm, no text mask.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange


class PlainEMMDiT:
    """`state`: name -> tensor. `groups`: blocks per group. `cycle`: (ratio, run) of subregion attention, per block in turn."""

    def __init__(self, state, heads, groups=(4, 16, 4), cycle=((1, 1), (4, 1), (4, 4))):
        self.state, self.heads, self.groups, self.cycle = state, heads, groups, cycle

    def __call__(self, x, t, text):
        """x (B, C, h, w), t (B,) in 0..1, text (B, L, 2048) -> velocity (B, C, h, w)."""
        p = self.state["pos_embed.proj.weight"].shape[-1]
        grid = (x.shape[-2] // p, x.shape[-1] // p)
        position = self.positions(grid)
        x = F.conv2d(x, self.state["pos_embed.proj.weight"], self.state["pos_embed.proj.bias"], stride=p)
        image = rearrange(x, "b d h w -> b (h w) d") + position
        text = self.linear(text, "context_embedder")
        shared = rearrange(self.time(t), "b (six d) -> b six d", six=6)

        image, text = self.group(0, image, text, shared)
        saved = image
        image, text = self.group(1, self.compress(image, grid), text, shared)
        image = self.reconstruct(image, saved, grid) + position
        image, text = self.group(2, image, text, shared)

        image = self.linear(F.layer_norm(image, image.shape[-1:], eps=1e-6), "proj_out")
        return rearrange(image, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=p, q=p)

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def positions(self, grid):
        table = self.state["pos_embed.pos_embed"]
        size = math.isqrt(table.shape[1])
        top, left = (size - grid[0]) // 2, (size - grid[1]) // 2
        table = rearrange(table, "one (h w) d -> one h w d", h=size)
        return rearrange(table[:, top : top + grid[0], left : left + grid[1]], "one h w d -> one (h w) d")

    def time(self, t):
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
        angles = 1000 * t.float()[:, None] * frequencies
        x = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.state["proj_out.weight"].dtype)
        name = "adaln_single.emb.timestep_embedder"
        x = self.linear(F.silu(self.linear(x, f"{name}.linear_1")), f"{name}.linear_2")
        return self.linear(F.silu(x), "adaln_single.linear")

    # ---- compression

    def path(self, x, name):
        """Two 1x1 convolutions."""
        x = F.conv2d(x, self.state[f"{name}.1.weight"], self.state[f"{name}.1.bias"])
        return F.conv2d(
            F.gelu(x, approximate="tanh"), self.state[f"{name}.3.weight"], self.state[f"{name}.3.bias"]
        )

    def compress(self, image, grid):
        image = rearrange(image, "b (h w) d -> b d h w", h=grid[0])
        paths = [self.path(F.pixel_unshuffle(image, r), f"tokencompressor.0.0.body{r}x") for r in (2, 4)]
        return torch.cat([rearrange(x, "b d h w -> b (h w) d") for x in paths], dim=1)

    def reconstruct(self, image, saved, grid):
        parts, start = [], 0
        for r in (2, 4):
            count = grid[0] * grid[1] // r**2
            x = rearrange(image[:, start : start + count], "b (h w) d -> b d h w", h=grid[0] // r)
            x = self.path(F.pixel_shuffle(x, r), f"tokenreconstructor.0.0.body{r}x")
            parts.append(rearrange(x, "b d h w -> b (h w) d"))
            start += count
        x = self.linear(torch.cat([*parts, saved], dim=-1), "tokenreconstructor.0.0.mergers.0")
        return self.linear(F.gelu(x, approximate="tanh"), "tokenreconstructor.0.0.mergers.2")

    # ---- blocks

    def group(self, group, image, text, shared):
        first = sum(self.groups[:group])
        for i in range(self.groups[group]):
            last = first + i == sum(self.groups) - 1
            cycle = self.cycle[(first + i) % len(self.cycle)]
            image, text = self.block(f"block_groups.{group}.{i}", image, text, shared, cycle, last)
        return image, text

    def block(self, name, image, text, shared, cycle, last):
        shift, scale, gate, *image_mlp = self.modulation(name, "", shared)
        attended_image = self.norm1(image, f"{name}.norm1") * (1 + scale) + shift
        attended_text = self.norm1(text, f"{name}.norm1_context")
        if not last:
            shift_c, scale_c, gate_c, *text_mlp = self.modulation(name, "_c", shared)
            attended_text = attended_text * (1 + scale_c) + shift_c

        attended_image, attended_text = self.attention(f"{name}.attn", attended_image, attended_text, *cycle)
        image = image + gate * self.linear(attended_image, f"{name}.attn.to_out.0")
        image = self.feed_forward(image, f"{name}.ff", *image_mlp)
        if not last:
            text = text + gate_c * self.linear(attended_text, f"{name}.attn.to_add_out")
            text = self.feed_forward(text, f"{name}.ff_context", *text_mlp)
        return image, text

    def modulation(self, name, suffix, shared):
        bias, scale = (self.state[f"{name}.scale_shift_{kind}{suffix}"] for kind in ("bias", "scale"))
        return (bias + shared * (1 + scale)).chunk(6, dim=1)

    def norm1(self, x, name):
        return F.layer_norm(
            x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-5
        )

    def feed_forward(self, x, name, shift, scale, gate):
        hidden = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        hidden = F.gelu(self.linear(hidden, f"{name}.net.0.proj"), approximate="tanh")
        return x + gate * self.linear(hidden, f"{name}.net.2")

    def attention(self, name, image, text, ratio, run):
        streams = {}
        for x, names, norms in (
            (image, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")),
            (text, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")),
        ):
            q, k, v = (
                rearrange(
                    self.linear(x, f"{name}.{part}"),
                    "b (l s n) (h k) -> (b s) h (l n) k",
                    s=ratio,
                    n=run,
                    h=self.heads,
                )
                for part in names
            )
            q, k = (
                F.rms_norm(x, x.shape[-1:], self.state[f"{name}.{n}.weight"], eps=1e-6)
                for x, n in zip((q, k), norms)
            )
            streams[names] = q, k, v
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*streams.values()))
        out = F.scaled_dot_product_attention(q, k, v)
        return tuple(
            rearrange(x, "(b s) h (l n) k -> b (l s n) (h k)", s=ratio, n=run)
            for x in out.split([image.shape[1] // ratio, text.shape[1] // ratio], dim=2)
        )
