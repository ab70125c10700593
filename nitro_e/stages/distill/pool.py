"""NitroFusion's pool of discriminator heads (arXiv 2412.02030): specialised by noise level, a random few at work in every
iteration, 1 % of all made anew after each.

levels x slots x copies heads; half of the copies judge every position, half the whole map. All copies of a slot lie in
one tensor per weight, so that choosing is indexing and every parameter has a gradient. What is drawn depends on seed and
step alone: all processes choose and renew the same heads, and a resume goes on exactly. With beta1 = 0 and no weight
decay Adam leaves heads that were not chosen as they are, bit for bit. The counts, the renewal and the dual objective are
the paper's; sizes, levels and the draw are ours, since its training code was not released.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Fraction, Ge, Gt, Le, Lt
from nitro_e.randomness import seed_of
from nitro_e.stages.distill.gan_losses import Logits
from nitro_e.stages.distill.heads import Features, full_precision, norm_groups


@dataclass(frozen=True, kw_only=True)
class PoolConfig(Config):
    # times at which the heads judge
    levels: tuple[Annotated[float, Gt(0), Lt(1)], ...] = (0.09, 0.41, 0.62, 0.80)
    spread: Fraction = 0.03  # around a level
    copies: Annotated[int, Ge(2), Le(10_000)] = 15  # heads per level and slot
    use: Annotated[int, Ge(2)] = 4  # of them at work in an iteration
    refresh: Fraction = 0.01  # chance of every head to be made anew after an iteration
    width: Annotated[int, Ge(1), Le(65536)] = 128  # hidden channels

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.levels:
            raise ConfigError("levels is empty; name at least one time between 0 and 1")
        if self.use % 2 or self.use // 2 > self.copies // 2:
            raise ConfigError(
                f"use must be even and at most {self.copies // 2 * 2} with {self.copies} copies, half of which judge "
                f"positions and half whole maps; got {self.use}"
            )


class HeadBank(nn.Module):
    """`count` heads of one kind for one slot, their weights stacked."""

    def __init__(self, count: int, features: int, width: int, whole: bool) -> None:
        super().__init__()
        self.whole, self.width, self.groups = whole, width, norm_groups(width)
        shapes = {
            "enter_weight": (width, features), "enter_bias": (width,), "norm_scale": (width,), "norm_shift": (width,),
            "inside_weight": (width, width, 3, 3), "inside_bias": (width,),
            "norm_inside_scale": (width,), "norm_inside_shift": (width,),
            "logit_weight": (width,), "logit_bias": (1,),
        }  # fmt: skip
        if whole:
            shapes |= {"query": (width,), "mlp_weight": (width, width), "mlp_bias": (width,)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(count, *shape)))
        self.register_buffer("age", torch.zeros(count, dtype=torch.int64))  # updates since it was made

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """New weights of `count` heads: uniform within 1 / sqrt(fan in), as torch's layers; norms start as they do there."""
        fresh = {}
        for name, parameter in self.named_parameters():
            shape = (count, *parameter.shape[1:])
            if name.endswith(("scale", "shift")):
                fresh[name] = torch.full(shape, float(name.endswith("scale")))
                continue
            # a bias goes with its weight
            weight = getattr(self, f"{name.rpartition('_')[0]}_weight", parameter)[0]
            fan_in = weight[0].numel() if weight.ndim > 1 else weight.numel()
            fresh[name] = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)
        return fresh

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x (B, D, h, w), chosen (m,) heads -> logits (B, m, h * w), or (B, m, 1) of whole maps."""
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
        """Group norm of every head by itself, then leaky ReLU."""
        x = F.group_norm(x, len(scale) * self.groups, scale.flatten(), shift.flatten())
        return F.leaky_relu(x, 0.2)


class HeadPool(nn.Module):
    """All heads. `forward` has the form of heads.FixedHeads."""

    def __init__(self, slots: int, features: int, config: PoolConfig, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        whole = config.copies // 2
        self.counts = (config.copies - whole, whole)  # per level: heads of positions, of whole maps
        self.banks = nn.ModuleList(
            HeadBank(len(config.levels) * count, features, config.width, bool(kind))
            for _ in range(slots)
            for kind, count in enumerate(self.counts)
        )
        for number, bank in enumerate(self.banks):
            for name, values in bank.draw(len(bank.age), self._generator("first", number)).items():
                bank.get_parameter(name).data.copy_(values)

    def _generator(self, *purpose: object) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, "pool", *purpose))

    def level(self, step: int) -> int:
        """The noise level of an iteration."""
        return int(torch.randint(len(self.config.levels), (), generator=self._generator("level", step)))

    def chosen(self, step: int) -> Iterator[tuple[HeadBank, Tensor]]:
        """Every bank with the (use / 2,) heads at work in an iteration."""
        level = self.level(step)
        for number, bank in enumerate(self.banks):
            count = self.counts[number % 2]
            order = torch.randperm(count, generator=self._generator("use", step, number))
            yield bank, (level * count + order[: self.config.use // 2]).to(bank.age.device)

    def forward(self, features: Features, step: int) -> Logits:
        """Two entries per slot: (B, use / 2, h * w) of positions and (B, use / 2, 1) of whole maps."""
        with full_precision(features) as (maps, _, _):
            maps = [x for x in maps for _ in range(2)]
            return [bank(x, chosen) for x, (bank, chosen) in zip(maps, self.chosen(step))]

    def experienced(self, step: int) -> list[Tensor]:
        """Weights (use / 2,) of the heads at work: 0 for one that has not been updated since it was made."""
        return [(bank.age[chosen] > 0).float() for bank, chosen in self.chosen(step)]

    @torch.no_grad()
    def after_step(self, step: int, optimizers: list[torch.optim.Optimizer]) -> int:
        """Count the update of the heads at work, then renew some of all; returns how many."""
        for bank, chosen in self.chosen(step):
            bank.age[chosen] += 1
        renewed = 0
        for number, bank in enumerate(self.banks):
            generator = self._generator("refresh", step, number)
            which = (torch.rand(len(bank.age), generator=generator) < self.config.refresh).to(bank.age.device)
            if which.any():
                self._renew(bank, which, generator, optimizers)
                renewed += int(which.sum())
        return renewed

    @torch.no_grad()
    def _renew(
        self,
        bank: HeadBank,
        which: Tensor,
        generator: torch.Generator,
        optimizers: list[torch.optim.Optimizer],
    ) -> None:
        """New weights, no memory in the optimiser, age 0."""
        for name, fresh in bank.draw(int(which.sum()), generator).items():
            parameter = bank.get_parameter(name)
            parameter[which] = fresh.to(parameter.device)
            for optimizer in optimizers:
                for value in optimizer.state.get(parameter, {}).values():
                    if value.shape == parameter.shape:
                        value[which] = 0
        bank.age[which] = 0
