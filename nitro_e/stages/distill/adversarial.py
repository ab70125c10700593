"""The adversarial objective: latent adversarial diffusion distillation (LADD, arXiv 2403.12015) and its relatives.

The student's data and the teacher's are noised to the same time tau; heads over the frozen teacher's features tell
them apart. Besides: pairs of a real image and another one's prompt count as fake (misaligned), the logits may not
change much under a small perturbation of the real input (approximate R1), and with a pool the heads change with the
noise level (NitroFusion).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nitro_e.config import Config, ConfigError, Fraction, Ge, Gt, Lt
from nitro_e.interfaces import Phase, TextEmbedding
from nitro_e.randomness import SlotRandom, seeded
from nitro_e.sampling import flow
from nitro_e.sampling.flow import TimestepConfig, training_times
from nitro_e.stages.distill import gan_losses as losses
from nitro_e.stages.distill.gan_losses import Kind, Logits
from nitro_e.stages.distill.heads import Backbone, FixedHeads, HeadConfig
from nitro_e.stages.distill.inputs import DistillBatch, Draft
from nitro_e.stages.distill.objective import Shared, masked_mean
from nitro_e.stages.distill.pool import HeadPool, PoolConfig
from nitro_e.training.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class JudgeTimesConfig(Config):
    """The times at which real and fake are compared: logit-normal ones are clipped to the range, uniform ones fill it."""

    times: TimestepConfig = field(default_factory=lambda: TimestepConfig(std=1.2))
    least: Fraction = 0.02
    most: Fraction = 0.98

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.least < self.most:
            raise ConfigError(f"least {self.least} must be below most {self.most}")


@dataclass(frozen=True, kw_only=True)
class MisalignedConfig(Config):
    share: Annotated[float, Gt(0), Lt(1)] = 0.5  # of the fake side of the loss
    start: Annotated[int, Ge(0)] = 1000


@dataclass(frozen=True, kw_only=True)
class R1Config(Config):
    sigma: Annotated[float, Gt(0)] = 0.05
    weight: Annotated[float, Gt(0)] = 200.0  # weight * sigma^2 is the gamma of exact R1
    every: Annotated[int, Ge(1)] = 1  # steps; the weight is multiplied by it


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig(Config):
    loss: Kind = "hinge"
    # auto: measured, then frozen, so that its gradient at the student's data is `ratio` times that of the other objectives
    weight: Annotated[Literal["auto"] | float, Gt(0), "to switch off: adversarial: null"] = "auto"
    ratio: Annotated[float, Gt(0)] = 1.0
    fallback: Annotated[float, Gt(0)] = 0.5  # of auto, until something has been measured
    start: Annotated[int, Ge(0)] = 250  # the heads learn alone before
    ramp: Annotated[int, Ge(0)] = 250  # steps over which the weight then rises
    taps: tuple[Annotated[int, Ge(0)], ...] | None = None  # blocks of the backbone; None: the model's default
    heads: HeadConfig = field(default_factory=HeadConfig)
    pool: PoolConfig | None = None  # in place of one head per slot
    judge: JudgeTimesConfig = field(default_factory=JudgeTimesConfig)
    share_time: bool = True  # real and fake at the same tau
    share_noise: bool = False
    misaligned: MisalignedConfig | None = field(default_factory=MisalignedConfig)
    r1: R1Config | None = field(default_factory=R1Config)
    null_text: Fraction = 0.0  # share of samples that are judged without their prompt
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-4, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.0, warmup=0, clip=1.0
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "relativistic" and not self.share_time:
            raise ConfigError(
                "loss 'relativistic' compares real and fake of one sample: it needs share_time: true"
            )
        if self.misaligned and self.null_text:
            raise ConfigError(
                "misaligned asks whether a prompt belongs to its image, null_text takes prompts away: set misaligned: null "
                "or null_text: 0"
            )
        if self.pool is not None:
            for name, default in (("heads", HeadConfig()), ("judge", JudgeTimesConfig())):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"pool has its own heads and times: {name} would have no effect, leave it out"
                    )
            if self.optim.kind != "adamw" or self.optim.betas[0] != 0 or self.optim.weight_decay != 0:
                raise ConfigError(
                    "pool: heads that are not at work stay as they are only with optim {kind: adamw, betas: [0, ...], "
                    "weight_decay: 0}"
                )
            if not self.share_time:
                raise ConfigError("pool: its heads judge one noise level at a time; set share_time: true")


class Adversarial:
    """Heads as a phase of their own, and what the student gets from them."""

    name = "adversarial"
    direct = False

    def __init__(self, config: AdversarialConfig, shared: Shared) -> None:
        self.config, self.shared = config, shared
        self.backbone: Backbone = shared.backbone(config.taps)
        maps, width = len(self.backbone.maps), self.backbone.width
        with seeded(shared.seed, "distill", "heads"):
            self.heads: nn.Module = (
                FixedHeads(maps, width, config.heads)
                if config.pool is None
                else HeadPool(maps, width, config.pool, shared.seed)
            ).to(shared.device)
        self.balanced, self.start, self.fallback = config.weight == "auto", config.start, config.fallback
        self.step = 0
        after = None if config.pool is None else self.after_step
        self.phases = (
            Phase("discriminator", self.heads, self.discriminator_loss, config.optim, after_step=after),
        )

    def weight(self, step: int) -> float:
        """Of the student's loss; for `auto`, of the ratio. 0: the heads are not asked."""
        rising = (step - self.config.start + 1) / self.config.ramp if self.config.ramp else 1.0
        if step < self.config.start:
            return 0.0
        return min(1.0, rising) * (self.config.ratio if self.balanced else self.config.weight)

    # ---- what both phases do

    def judge_times(self, step: int, rng: SlotRandom) -> Tensor:
        """tau (B,)."""
        if self.config.pool is not None:
            pool = self.config.pool
            center = pool.levels[self.heads.level(step)]
            return (center + pool.spread * (2 * rng.uniform() - 1)).clamp(1e-3, 1 - 1e-3)
        judge = self.config.judge
        times = training_times(judge.times, rng.normal())
        if judge.times.kind == "uniform":
            return judge.least + (judge.most - judge.least) * times
        return times.clamp(judge.least, judge.most)

    def judged_text(self, text: TextEmbedding, rng: SlotRandom) -> TextEmbedding:
        """The prompts, a share of them replaced by the null prompt."""
        if self.config.null_text == 0:
            return text
        drop, null = rng.uniform() < self.config.null_text, self.shared.null_text
        return TextEmbedding(
            torch.where(drop[:, None, None], null.tokens.to(text.tokens), text.tokens),
            torch.where(drop[:, None], null.mask, text.mask),
        )

    # ---- the heads

    def discriminator_loss(
        self, net: nn.Module, batch: DistillBatch, rng: SlotRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.step = batch.step
        draft = self.shared.draft(batch, rng, last=False)
        keep = self.shared.training(batch)
        with torch.no_grad():
            names, xs, taus, texts = zip(*self.judged_parts(batch, draft, rng))
            joint = TextEmbedding(*(torch.cat(column) for column in zip(*texts)))
            features = self.backbone(torch.cat(xs), torch.cat(taus), joint)
        logits = net(features, batch.step)
        sides = dict(zip(names, map(list, zip(*(entry.chunk(len(names)) for entry in logits)))))
        values, logs = self.compare(sides, batch)
        logs |= self.watch(sides, dict(zip(names, taus)), keep, batch)
        return (values * keep).mean(), logs

    def judged_parts(
        self, batch: DistillBatch, draft: Draft, rng: SlotRandom
    ) -> list[tuple[str, Tensor, Tensor, TextEmbedding]]:
        """(name, x, tau, text) of everything the heads see in one pass, the real side first."""
        config, data = self.config, batch.latents
        shape = data.shape[1:]
        tau = self.judge_times(batch.step, rng)
        text = self.judged_text(batch.text, rng)
        noise = rng.normal(*shape)
        real = flow.interpolate(data, noise, tau)
        fake_tau = tau if config.share_time else self.judge_times(batch.step, rng)
        fake_noise = noise if config.share_noise else rng.normal(*shape)
        fake = flow.interpolate(draft.data.detach(), fake_noise, fake_tau)
        parts = [("real", real, tau, text), ("fake", fake, fake_tau, text)]
        if config.misaligned is not None and batch.step >= config.misaligned.start:
            others, _ = losses.misaligned(batch.prompts)
            parts.append(("misaligned", real, tau, TextEmbedding(*(part[others] for part in text))))
        if config.r1 is not None and batch.step % config.r1.every == 0:
            parts.append(("perturbed", real + config.r1.sigma * rng.normal(*shape), tau, text))
        return parts

    def compare(self, sides: dict[str, Logits], batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The heads' loss per sample, (B,)."""
        config = self.config
        values = losses.discriminator_loss(config.loss, sides["real"], sides["fake"])
        if "misaligned" in sides:
            against = losses.discriminator_loss(config.loss, sides["real"], sides["misaligned"])
            _, other = losses.misaligned(batch.prompts)
            share = config.misaligned.share * torch.tensor(other, device=values.device)
            values = (1 - share) * values + share * against
        logs = {}
        if "perturbed" in sides:
            r1 = losses.approximate_r1(sides["real"], sides["perturbed"])
            values = values + config.r1.weight * config.r1.every * r1
            logs["r1"] = r1.mean()
        return values, logs

    @torch.no_grad()
    def watch(
        self, sides: dict[str, Logits], taus: dict[str, Tensor], keep: Tensor, batch: DistillBatch
    ) -> dict[str, Tensor]:
        """Shares of right verdicts and the gap between real and fake, on training and on held-out prompts.

        Right is a logit on its side of 0; of relativistic heads, which know differences only, real above fake.
        """
        scores = {name: losses.score(logits) for name, logits in sides.items() if name != "perturbed"}
        gap = scores["real"] - scores["fake"]
        right = {name: ((value > 0) == (name == "real")).float() for name, value in scores.items()}
        if self.config.loss == "relativistic":
            above = {name: scores["real"] > value for name, value in scores.items()}
            right = {name: above["fake" if name == "real" else name].float() for name in above}
        batch.heldout_gap = masked_mean(gap, 1 - keep)
        logs = {"gap": masked_mean(gap, keep), "gap_heldout": batch.heldout_gap}
        for name, value in right.items():
            logs |= {
                f"right_{name}": masked_mean(value, keep),
                f"right_{name}_heldout": masked_mean(value, 1 - keep),
            }
        both = torch.cat([right["real"], right["fake"]])
        bins = (torch.cat([taus["real"], taus["fake"]]) * 5).long().clamp(max=4)
        logs |= {f"right_t{number}": masked_mean(both, (bins == number).float()) for number in range(5)}
        for number, (r, f) in enumerate(zip(sides["real"], sides["fake"])):
            logs[f"gap_head{number}"] = (r - f).mean()
        return logs

    def after_step(self, optimizers: list[Optimizer]) -> None:
        self.heads.after_step(self.step, optimizers)

    # ---- the student

    def loss(self, draft: Draft, batch: DistillBatch, rng: SlotRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """(B,) how little the heads take the student's data for the teacher's; tau and noise are drawn anew."""
        config, shape = self.config, batch.latents.shape[1:]
        tau = self.judge_times(batch.step, rng)
        text = self.judged_text(batch.text, rng)
        with frozen(self.heads):
            fake = self.heads(
                self.backbone(flow.interpolate(draft.data, rng.normal(*shape), tau), tau, text), batch.step
            )
        real = weights = None
        if config.loss == "relativistic":
            with torch.no_grad():
                x = flow.interpolate(batch.latents, rng.normal(*shape), tau)
                real = self.heads(self.backbone(x, tau, text), batch.step)
        if config.pool is not None:
            weights = self.heads.experienced(batch.step)
        return losses.generator_loss(config.loss, fake, real, weights), {}


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for its weights, those through it to its input remain."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
