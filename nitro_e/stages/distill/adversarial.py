"""The adversarial objective: latent adversarial diffusion distillation (LADD, arXiv 2403.12015) and its relatives.

The student's data and the teacher's are noised to the same time tau, and heads over the frozen teacher's features
learn to tell them apart. Options: a real image with another one's prompt counts as fake (misaligned), logits may change
little under a small perturbation of the real input (approximate R1), and heads differ by noise level (NitroFusion).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nitro_e.config import Config, ConfigError, Fraction, Ge, Gt, Lt
from nitro_e.interfaces import Phase, TextEmbedding
from nitro_e.randomness import SampleRandom, seeded
from nitro_e.sampling import flow
from nitro_e.sampling.flow import TimestepConfig, training_times
from nitro_e.stages.distill import gan_losses as losses
from nitro_e.stages.distill.gan_losses import Kind, Logits
from nitro_e.stages.distill.heads import Backbone, Features, FixedHeads, HeadConfig
from nitro_e.stages.distill.inputs import DistillBatch, Prediction
from nitro_e.stages.distill.objective import Balance, Shared, frozen
from nitro_e.stages.distill.pool import HeadPool, PoolConfig
from nitro_e.training.meters import masked_mean
from nitro_e.training.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class DiscriminatorTimesConfig(Config):
    """The times tau at which real and fake are compared: logit-normal, clipped to the range, or uniform over it."""

    times: TimestepConfig = field(default_factory=lambda: TimestepConfig(std=1.2))
    least: Fraction = 0.02  # smallest time at which images are compared
    most: Fraction = 0.98  # largest such time

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.least < self.most:
            raise ConfigError(f"least {self.least} must be below most {self.most}")


@dataclass(frozen=True, kw_only=True)
class MisalignedConfig(Config):
    share: Annotated[float, Gt(0), Lt(1)] = 0.5  # of the fake side of the loss
    start: Annotated[int, Ge(0)] = 1000  # step from which they are used


@dataclass(frozen=True, kw_only=True)
class R1Config(Config):
    sigma: Annotated[float, Gt(0)] = 0.05  # deviation of the noise that stands for the gradient
    weight: Annotated[float, Gt(0)] = 200.0  # weight * sigma^2 is the gamma of exact R1
    every: Annotated[int, Ge(1)] = 1  # steps; the weight is multiplied by it


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig(Config):
    RENAMED: ClassVar[Mapping[str, str]] = {"judge": "discriminator"}

    loss: Kind = "hinge"  # of the discriminator and the student
    # auto: balance once, then freeze, so that the gradient at the x0 prediction is `ratio` times the other objectives'
    weight: Annotated[Literal["auto"] | float, Gt(0), "to switch off: adversarial: null"] = "auto"
    # for auto: adversarial gradient norm as a multiple of the other objectives'
    ratio: Annotated[float, Gt(0)] = 1.0
    fallback: Annotated[float, Gt(0)] = 0.5  # of auto: the weight until something has been measured
    start: Annotated[int, Ge(0)] = 250  # first step of the student's term; before it the heads learn alone
    ramp: Annotated[int, Ge(0)] = 250  # steps over which the weight then rises to its full value
    taps: tuple[Annotated[int, Ge(0)], ...] | None = None  # blocks of the backbone; None: the model's default
    heads: HeadConfig = field(default_factory=HeadConfig)  # the discriminator heads
    pool: PoolConfig | None = None  # instead of one head per feature map
    discriminator: DiscriminatorTimesConfig = field(default_factory=DiscriminatorTimesConfig)
    share_time: bool = True  # real and fake at the same tau ...
    share_noise: bool = False  # ... and with the same noise
    # real images with other prompts as further fakes; null: none
    misaligned: MisalignedConfig | None = field(default_factory=MisalignedConfig)
    # approximate gradient penalty on real images; null: off
    r1: R1Config | None = field(default_factory=R1Config)
    null_text: Fraction = 0.0  # share of samples that the heads see without their prompt
    # the student's term looks at the noised data that `score` looks at: one pass of the teacher gives both its velocity
    # and the features
    share_score: bool = False
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
        if self.share_score and (self.pool or self.null_text):
            raise ConfigError(
                "share_score: the teacher's pass is at the times and with the prompts of score; set pool: null, null_text: 0"
            )
        if self.pool is not None:
            for name, default in (("heads", HeadConfig()), ("discriminator", DiscriminatorTimesConfig())):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"pool has its own heads and times: {name} would have no effect, leave it out"
                    )
            if self.optim.kind != "adamw" or self.optim.betas[0] != 0 or self.optim.weight_decay != 0:
                raise ConfigError(
                    "pool: inactive heads keep their weights only with optim {kind: adamw, betas: [0, ...], "
                    "weight_decay: 0}"
                )
            if not self.share_time:
                raise ConfigError("pool: its heads work at one noise level at a time; set share_time: true")


class Adversarial:
    """The heads, trained in a phase of their own, and the student's loss from their logits."""

    name = "adversarial"
    direct = False

    def __init__(self, config: AdversarialConfig, shared: Shared) -> None:
        self.config, self.shared = config, shared
        if config.share_score:
            shared.discriminator = self
        self.backbone: Backbone = shared.backbone(config.taps)
        maps, width = len(self.backbone.maps), self.backbone.width
        with seeded(shared.seed, "distill", "heads"):
            self.heads: nn.Module = (
                FixedHeads(maps, width, config.heads)
                if config.pool is None
                else HeadPool(maps, width, config.pool, shared.seed)
            ).to(shared.device)
        self.balance: Balance | None = None
        if config.weight == "auto":  # full_weight is then relative to the other objectives
            self.balance, self.full_weight = Balance(config.start, config.fallback), config.ratio
        else:
            self.full_weight = config.weight
        self.step = 0
        self.phases: tuple[Phase, ...] = (
            Phase(
                "discriminator",
                self.heads,
                self.discriminator_loss,
                config.optim,
                after_step=None if config.pool is None else self.after_step,
            ),
        )

    def weight(self, step: int) -> float:
        """Return the weight of the student's term: 0 before `start`, then rising to its full value."""
        rising = (step - self.config.start + 1) / self.config.ramp if self.config.ramp else 1.0
        if step < self.config.start:
            return 0.0
        return min(1.0, rising) * self.full_weight

    # ---- what both phases do

    def discriminator_times(self, step: int, rng: SampleRandom) -> Tensor:
        """Draw tau, (B,)."""
        if isinstance(self.heads, HeadPool):
            pool = self.heads.config
            center = pool.levels[self.heads.level(step)]
            return (center + pool.spread * (2 * rng.uniform() - 1)).clamp(1e-3, 1 - 1e-3)
        config = self.config.discriminator
        times = training_times(config.times, rng.normal())
        if config.times.kind == "uniform":
            return config.least + (config.most - config.least) * times
        return times.clamp(config.least, config.most)

    def discriminator_text(self, text: TextEmbedding, rng: SampleRandom) -> TextEmbedding:
        """Replace a share of the prompts by the null prompt."""
        if self.config.null_text == 0:
            return text
        return text.where(rng.uniform() >= self.config.null_text, self.shared.null_text)

    # ---- the heads

    def discriminator_loss(
        self, net: nn.Module, batch: DistillBatch, rng: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.step = batch.step
        prediction = self.shared.predict(batch, rng, last=False)
        keep = self.shared.training(batch)
        with torch.no_grad():
            names, xs, taus, texts = zip(*self.discriminator_inputs(batch, prediction, rng))
            features = self.backbone(torch.cat(xs), torch.cat(taus), texts[0].cat(*texts[1:]))
        logits = net(features, batch.step)
        sides = dict(zip(names, map(list, zip(*(entry.chunk(len(names)) for entry in logits)))))
        values, logs = self.compare(sides, batch)
        logs |= self.monitor(sides, dict(zip(names, taus)), keep, batch)
        return (values * keep).mean(), logs

    def discriminator_inputs(
        self, batch: DistillBatch, prediction: Prediction, rng: SampleRandom
    ) -> list[tuple[str, Tensor, Tensor, TextEmbedding]]:
        """List (name, x, tau, text) of everything that the heads see in one pass, the real side first."""
        config, data = self.config, batch.stored_latents
        shape = data.shape[1:]
        tau = self.discriminator_times(batch.step, rng)
        text = self.discriminator_text(batch.text, rng)
        noise = rng.normal(*shape)
        real = flow.interpolate(data, noise, tau)
        fake_tau = tau if config.share_time else self.discriminator_times(batch.step, rng)
        fake_noise = noise if config.share_noise else rng.normal(*shape)
        fake = flow.interpolate(prediction.data.detach(), fake_noise, fake_tau)
        parts = [("real", real, tau, text), ("fake", fake, fake_tau, text)]
        if config.misaligned is not None and batch.step >= config.misaligned.start:
            others, _ = losses.misaligned(batch.prompts)
            parts.append(("misaligned", real, tau, text.take(others)))
        if config.r1 is not None and batch.step % config.r1.every == 0:
            parts.append(("perturbed", real + config.r1.sigma * rng.normal(*shape), tau, text))
        return parts

    def compare(self, sides: dict[str, Logits], batch: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the heads' loss per sample, (B,)."""
        config = self.config
        values = losses.discriminator_loss(config.loss, sides["real"], sides["fake"])
        if config.misaligned is not None and "misaligned" in sides:
            against = losses.discriminator_loss(config.loss, sides["real"], sides["misaligned"])
            _, other = losses.misaligned(batch.prompts)
            share = config.misaligned.share * torch.tensor(other).to(values.device, non_blocking=True)
            values = (1 - share) * values + share * against
        logs: dict[str, Tensor] = {}
        if config.r1 is not None and "perturbed" in sides:
            r1 = losses.approximate_r1(sides["real"], sides["perturbed"])
            values = values + config.r1.weight * config.r1.every * r1
            logs["r1"] = r1.mean()
        return values, logs

    @torch.no_grad()
    def monitor(
        self, sides: dict[str, Logits], taus: dict[str, Tensor], keep: Tensor, batch: DistillBatch
    ) -> dict[str, Tensor]:
        """Measure the heads' accuracy and the gap between real and fake, on training and on held-out prompts.

        A logit is right on its side of 0; those of relativistic heads, which learn differences, where real is above fake.
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
        if isinstance(self.heads, HeadPool):
            self.heads.after_step(self.step, optimizers)

    # ---- the student

    def at_scored(self, prediction: Prediction, batch: DistillBatch) -> tuple[Tensor, Features]:
        """Ask the teacher for its velocity and the features at the noised data that the fake score saw, once per batch."""
        assert batch.scored is not None, "the fake score's phase comes first"
        if batch.taught is None:
            with torch.enable_grad():
                x = batch.scored.following(prediction.data)
                batch.taught = self.backbone.with_velocity(x, batch.scored.tau, batch.text)
        return batch.taught

    def log_ratio(self, prediction: Prediction, batch: DistillBatch) -> Tensor:
        """Estimate log(density of real / density of fake), (B,), at the noised data that the fake score saw.

        It is the logit of heads that minimise the non-saturating loss.
        """
        _, features = self.at_scored(prediction, batch)
        with torch.no_grad():
            return losses.score(self.heads(features, batch.step))

    def loss(
        self, prediction: Prediction, batch: DistillBatch, rng: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute (B,) how little the heads take the student's data for the teacher's, at fresh tau and noise."""
        config, shape = self.config, batch.shape
        if config.share_score:
            assert batch.scored is not None, "the fake score's phase comes first"
            tau, text = batch.scored.tau, batch.text
            features = self.at_scored(prediction, batch)[1]
        else:
            tau = self.discriminator_times(batch.step, rng)
            text = self.discriminator_text(batch.text, rng)
            features = self.backbone(flow.interpolate(prediction.data, rng.normal(*shape), tau), tau, text)
        with frozen(self.heads):
            fake = self.heads(features, batch.step)
        real = weights = None
        if config.loss == "relativistic":
            with torch.no_grad():
                x = flow.interpolate(batch.stored_latents, rng.normal(*shape), tau)
                real = self.heads(self.backbone(x, tau, text), batch.step)
        if isinstance(self.heads, HeadPool):
            weights = self.heads.experienced(batch.step)
        return losses.generator_loss(config.loss, fake, real, weights), {}
