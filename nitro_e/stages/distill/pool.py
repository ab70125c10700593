"""NitroFusion's pool of discriminator heads (arXiv 2412.02030): specialised by noise level, of which each
iteration uses a random few, and 1 % are replaced by new ones: of all after each iteration, or of those it used.

There are levels x feature maps x copies heads. Half of the copies give a logit per position, half one per
map. All copies for a feature map lie in one tensor per weight, so that choosing is indexing and every
parameter has a gradient. What is drawn depends on seed and step alone: all processes choose and replace the
same heads, and a resume goes on exactly. With beta1 = 0 and no weight decay, Adam leaves heads that were not
chosen as they are, bit for bit. The counts, the replacement and the dual objective are the paper's. Sizes,
levels and the draw are ours, since its training code was not released.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Fraction, Ge, Gt, Le, Lt
from nitro_e.randomness import seed_of
from nitro_e.stages.distill.gan_losses import Logits
from nitro_e.stages.distill.heads import Features, full_precision, norm_groups


@dataclass(frozen=True, kw_only=True)
class PoolConfig(Config):
    # times at which the discriminator sees images
    levels: tuple[Annotated[float, Gt(0), Lt(1)], ...] = (0.09, 0.41, 0.62, 0.80)
    spread: Fraction = 0.03  # half width of the interval around a level that times are drawn from
    copies: Annotated[int, Ge(2), Le(10_000)] = 15  # heads per level and feature map
    use: Annotated[int, Ge(2)] = 4  # heads per feature map that an iteration uses
    refresh: Fraction = 0.01  # probability of each head to be replaced after an iteration
    # step: every head after each; use: only those that the iteration used, so that they live for 1 / refresh updates
    refresh_unit: Literal["step", "use"] = "step"
    width: Annotated[int, Ge(1), Le(65536)] = 128  # hidden channels

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.levels:
            raise ConfigError("levels is empty; name at least one time between 0 and 1")
        if self.use % 2 or self.use // 2 > self.copies // 2:
            raise ConfigError(
                f"use must be even and at most {self.copies // 2 * 2} with {self.copies} copies, half of which give "
                f"a logit per position and half one per map; got {self.use}"
            )


class HeadBank(nn.Module):
    """`count` heads of one kind for one feature map, their weights stacked; whole: one logit per map."""

    age: Tensor  # (count,) updates since each head was made

    def __init__(self, count: int, features: int, width: int, whole: bool) -> None:
        super().__init__()
        self.whole, self.width, self.groups = whole, width, norm_groups(width)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(count, *shape))

        self.enter_weight, self.enter_bias = weights(width, features), weights(width)
        self.norm_scale, self.norm_shift = weights(width), weights(width)
        self.inside_weight, self.inside_bias = weights(width, width, 3, 3), weights(width)
        self.norm_inside_scale, self.norm_inside_shift = weights(width), weights(width)
        self.logit_weight, self.logit_bias = weights(width), weights(1)
        if whole:
            self.query = weights(width)
            self.mlp_weight, self.mlp_bias = weights(width, width), weights(width)
        self.register_buffer("age", torch.zeros(count, dtype=torch.int64))

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw weights of `count` heads: uniform within 1 / sqrt(fan in), as torch does; norms at 1 and 0."""
        fresh = {}
        for name, parameter in self.named_parameters():
            shape = (count, *parameter.shape[1:])
            if name.endswith(("scale", "shift")):
                fresh[name] = torch.full(shape, float(name.endswith("scale")))
                continue
            # a bias has the fan in of its weight
            weight = getattr(self, f"{name.rpartition('_')[0]}_weight", parameter)[0]
            fan_in = weight[0].numel() if weight.ndim > 1 else weight.numel()
            fresh[name] = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)
        return fresh

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x (B, D, h, w), chosen (m,) indices of heads -> logits (B, m, h * w), or (B, m, 1) of whole maps."""
        m, width = len(chosen), self.width
        x = F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)
        weight = self.enter_weight[chosen].flatten(0, 1)[:, :, None, None]  # (m width, D, 1, 1)
        x = F.conv2d(x, weight, self.enter_bias[chosen].flatten())
        x = self._activate(x, self.norm_scale[chosen], self.norm_shift[chosen])
        y = F.conv2d(
            x,
            self.inside_weight[chosen].flatten(0, 1),
            self.inside_bias[chosen].flatten(),
            padding=1,
            groups=m,
        )
        y = self._activate(y, self.norm_inside_scale[chosen], self.norm_inside_shift[chosen])
        y = y.unflatten(1, (m, width)).flatten(3)  # (B, m, width, h w)
        if self.whole:
            attention = torch.einsum("bmcn,mc->bmn", y, self.query[chosen]).div(math.sqrt(width)).softmax(-1)
            pooled = torch.einsum("bmcn,bmn->bmc", y, attention)
            pooled = torch.einsum("bmc,mdc->bmd", pooled, self.mlp_weight[chosen]) + self.mlp_bias[chosen]
            y = F.leaky_relu(pooled, 0.2)[..., None]  # (B, m, width, 1)
        return torch.einsum("bmcn,mc->bmn", y, self.logit_weight[chosen]) + self.logit_bias[chosen]

    def _activate(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Apply the group norm of every head to its own channels, then leaky ReLU."""
        x = F.group_norm(x, len(scale) * self.groups, scale.flatten(), shift.flatten())
        return F.leaky_relu(x, 0.2)


class HeadPool(nn.Module):
    """All heads. Its `forward` takes and gives what that of heads.FixedHeads does."""

    def __init__(self, maps: int, features: int, config: PoolConfig, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        whole = config.copies // 2
        self.counts = (config.copies - whole, whole)  # per level: heads of positions, of whole maps
        self.banks = nn.ModuleList(
            HeadBank(len(config.levels) * count, features, config.width, bool(kind))
            for _ in range(maps)
            for kind, count in enumerate(self.counts)
        )
        for number, bank in enumerate(self._banks()):
            for name, values in bank.draw(len(bank.age), self._generator("first", number)).items():
                bank.get_parameter(name).data.copy_(values)

    def _banks(self) -> list[HeadBank]:
        return [bank for bank in self.banks if isinstance(bank, HeadBank)]

    def _generator(self, *purpose: object) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, "pool", *purpose))

    def level(self, step: int) -> int:
        """Draw the noise level of an iteration, an index of `levels`."""
        return int(torch.randint(len(self.config.levels), (), generator=self._generator("level", step)))

    def chosen(self, step: int) -> Iterator[tuple[HeadBank, Tensor]]:
        """Yield every bank with the indices (use / 2,) of its heads that an iteration uses."""
        level = self.level(step)
        for number, bank in enumerate(self._banks()):
            count = self.counts[number % 2]
            order = torch.randperm(count, generator=self._generator("use", step, number))
            chosen = level * count + order[: self.config.use // 2]
            yield bank, chosen.to(bank.age.device, non_blocking=True)

    def forward(self, features: Features, step: int) -> Logits:
        """Return two logits per feature map: (B, use / 2, h * w) per position, (B, use / 2, 1) per map."""
        with full_precision(features) as (maps, _, _):
            maps = [x for x in maps for _ in range(2)]
            return [bank(x, chosen) for x, (bank, chosen) in zip(maps, self.chosen(step))]

    def experienced(self, step: int) -> list[Tensor]:
        """Return a weight for each chosen head, (use / 2,) per bank: 0 before its first update, else 1."""
        return [(bank.age[chosen] > 0).float() for bank, chosen in self.chosen(step)]

    @torch.no_grad()
    def after_step(self, step: int, optimizers: list[torch.optim.Optimizer]) -> int:
        """Count the update of the chosen heads, then replace some of all; returns how many."""
        for bank, chosen in self.chosen(step):
            bank.age[chosen] += 1
        replaced = 0
        for number, (bank, chosen) in enumerate(self.chosen(step)):
            generator = self._generator("refresh", step, number)
            which = (torch.rand(len(bank.age), generator=generator) < self.config.refresh).to(bank.age.device)
            if self.config.refresh_unit == "use":
                used = torch.zeros_like(which)
                used[chosen] = True
                which &= used
            if which.any():
                self._renew(bank, which, generator, optimizers)
                replaced += int(which.sum())
        return replaced

    @torch.no_grad()
    def _renew(
        self,
        bank: HeadBank,
        which: Tensor,
        generator: torch.Generator,
        optimizers: list[torch.optim.Optimizer],
    ) -> None:
        """Give heads new weights, age 0 and an empty optimiser state."""
        for name, fresh in bank.draw(int(which.sum()), generator).items():
            parameter = bank.get_parameter(name)
            parameter[which] = fresh.to(parameter.device)
            for optimizer in optimizers:
                for value in optimizer.state.get(parameter, {}).values():
                    if value.shape == parameter.shape:
                        value[which] = 0
        bank.age[which] = 0
