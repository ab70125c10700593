"""Distribution matching: the student's data is moved to where the teacher finds it likelier than the student does.

A second network, the fake score, is a copy of the teacher that keeps learning to denoise the student's data. Noised to
a time tau, that data x_g gets two x0 predictions, the fake score's x0_F and the teacher's guided x0_T. `form` says what
becomes of them:

    dmd   slope (x0_F - x0_T) / mean |x_g - x0_T| at the data (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867)
    vsd   slope tau^2 (eps_T - eps_F) at the data, in noise predictions (variational score distillation, arXiv 2305.16213;
          Diff-Instruct, arXiv 2305.18455; SwiftBrush, arXiv 2312.05239)
    sid   (x0_T - x0_F) . [x0_F - x_g + (1 - alpha) (x0_T - x0_F)] / mean |x_g - x0_T|, differentiated through both
          networks (score identity distillation, arXiv 2404.04057)
    sim   (x0_T - x0_F) . (x0_F - x_g) / sqrt(|x0_T - x0_F|^2 + c^2), likewise (score implicit matching, arXiv 2410.16794)

The first two are gradients of KL(student || teacher), the others of distances between scores. No images are needed.
Data may be noised from the next state of the Euler sampler instead, to times of that step alone (TDM, arXiv 2503.06674)
or above its end (Phased DMD, arXiv 2510.27684), and guidance may have a time of its own (Decoupled DMD, arXiv 2511.22677).
With `adversarial: {share_score: true}` the teacher's pass also gives the features of a GAN on images (DMD2 as published),
and its logits weight the slope for other divergences than the reverse KL (f-distill, arXiv 2502.15681).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Fraction, Ge, Gt
from nitro_e.interfaces import Model, Phase
from nitro_e.randomness import SampleRandom
from nitro_e.sampling import flow
from nitro_e.sampling.flow import expand
from nitro_e.sampling.samplers import guided_velocity
from nitro_e.stages.adapter import AdapterConfig, add_adapter
from nitro_e.stages.distill.inputs import DistillBatch, Prediction, Scored
from nitro_e.stages.distill.objective import Balance, Shared, frozen, per_sample
from nitro_e.training.optim import OptimConfig
from nitro_e.training.parallel import sum_over_processes

Range = Literal["full", "step", "above"]
Divergence = Literal["reverse_kl", "kl", "js", "hellinger", "jeffreys"]
# f-distill (arXiv 2502.15681, Table 1): weights of the slope, of the density ratio r of real to fake
DIVERGENCES: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "hellinger": torch.sqrt,
    "jeffreys": lambda r: 1 + r,
}


@dataclass(frozen=True, kw_only=True)
class ScoreTimesConfig(Config):
    """The times tau at which student and teacher are compared, uniform."""

    # full: least to most; of these, step: the ones between the sample's own time and the next of its sampler; above:
    # those after the next time of its sampler
    range: Range = "full"
    least: Fraction = 0.02  # smallest time; below it the slope's normaliser is too small
    most: Fraction = 0.98  # largest time

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.least < self.most:
            raise ConfigError(f"least {self.least} must be below most {self.most}")


@dataclass(frozen=True, kw_only=True)
class FakeScoreConfig(Config):
    """Says how the copy of the teacher learns the scores of the student's data."""

    repeat: Annotated[int, Ge(1)] = 1  # updates per step, all on the same data of the student
    # of the error at tau: of velocities as in flow matching; snr: of data, times min(SNR, 5) (TDM); transition: of the
    # noise that was added to the sampler's next state (Phased DMD)
    weighting: Literal["velocity", "snr", "transition"] = "velocity"
    # in the student's slope; 1: none, 0: without prompt, below: away from it (SiD's Anti-CFG); teacher: as the teacher
    guidance_scale: float | Literal["teacher"] = 1.0
    # share of samples that it learns without their prompt, for a guidance of its own
    drop_text: Fraction = 0.0
    adapter: AdapterConfig | None = None  # LoRA over the teacher's weights; null: a whole copy
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-5, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.0, warmup=0, clip=1.0
        )
    )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Config):
    weight: Annotated[float, Gt(0), "to switch the objective off: score: null"] = 1.0  # of this objective
    form: Literal["dmd", "vsd", "sid", "sim"] = "dmd"  # what is minimised; see the head of score.py
    # of the teacher; [a, b]: drawn between them for every sample (SNOOPI's PG-SB, arXiv 2412.02687)
    guidance_scale: float | tuple[float, float] = 4.5
    # dmd: compare without guidance, and guide at a time of its own, above the sampler's next one (Decoupled DMD)
    decoupled: bool = False
    alpha: Annotated[float, Ge(0)] = 1.0  # of sid
    # dmd: between student and teacher; those besides reverse_kl weight the slope by the discriminator's density ratio
    divergence: Divergence = "reverse_kl"
    huber: Annotated[float, Gt(0)] = 1e-3  # c of sim
    times: ScoreTimesConfig = field(default_factory=ScoreTimesConfig)
    # fresh: data is noised with new noise; trajectory: from the next state of the Euler sampler (TDM)
    noise: Literal["fresh", "trajectory"] = "fresh"
    fake: FakeScoreConfig = field(default_factory=FakeScoreConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise == "trajectory" and self.times.range == "full":
            raise ConfigError(
                "noise 'trajectory' begins at the sampler's next state: it needs times: {range: step} or above"
            )
        if self.fake.weighting == "transition" and self.noise != "trajectory":
            raise ConfigError(
                "fake.weighting 'transition' is of noise added to the sampler's next state: it needs noise: trajectory"
            )
        scale = self.guidance_scale
        if not 0 <= self.guidance_range[0] <= self.guidance_range[1]:
            raise ConfigError(f"guidance_scale: expected a scale or two that rise, from 0 on, got {scale}")
        if self.divergence != "reverse_kl" and self.form != "dmd":
            raise ConfigError(
                f"divergence '{self.divergence}' weights the slope of form 'dmd', not '{self.form}'"
            )
        if self.decoupled and (self.form != "dmd" or isinstance(scale, tuple) or scale <= 1):
            raise ConfigError(
                f"decoupled: only for form 'dmd' and one guidance_scale above 1, not '{self.form}' and {scale}"
            )

    @property
    def guidance_range(self) -> tuple[float, float]:
        scale = self.guidance_scale
        return scale if isinstance(scale, tuple) else (scale, scale)

    @property
    def needs_chains(self) -> list[str]:
        """List the keys that read the steps of the student's sampler."""
        reads = {"score.times.range": self.times.range != "full", "score.decoupled": self.decoupled}
        return [name for name, needed in reads.items() if needed]


class Score:
    """The fake score, trained in a phase of its own, and the student's loss from it and the teacher."""

    name = "score"
    balance: Balance | None = None
    direct = False

    def __init__(self, config: ScoreConfig, shared: Shared) -> None:
        self.config, self.shared = config, shared
        self.fake = fake_score(shared, config.fake.adapter)
        fake = config.fake
        self.phases: tuple[Phase, ...] = (
            Phase("fake", self.fake, self.fake_loss, fake.optim, repeat=fake.repeat),
        )

    def weight(self, step: int) -> float:
        return self.config.weight

    # ---- the fake score

    def fake_loss(
        self, net: nn.Module, batch: DistillBatch, rng: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Match the flow of the student's data. The last answer is left for the student's phase."""
        config = self.config.fake
        prediction = self.shared.predict(batch, rng)
        data = prediction.data.detach()
        tau = self.draw_times(prediction, rng, self.config.times.range)
        fresh = rng.normal(*batch.shape)
        noise, importance = self.noise(prediction, tau, fresh)
        x = flow.interpolate(data, noise, tau)
        text = batch.text
        if config.drop_text:
            text = text.where(rng.uniform() >= config.drop_text, self.shared.null_text)
        velocity = net(x, tau, text).float()
        batch.scored = Scored(x, tau, velocity.detach())
        if config.weighting == "transition":
            added = transition(prediction, tau) / tau
            errors = per_sample((expand(added, x) * flow.to_noise(x, tau, velocity) - fresh).square())
            return (errors * self.shared.training(batch)).mean(), {}
        target = flow.velocity_target(data, noise)
        if isinstance(self.fake, Model):
            target = self.fake.velocity_target(target, tau)
        errors = per_sample((velocity - target).square())
        if config.weighting == "snr":  # an error of data is tau times that of the velocity
            errors = errors * tau**2 * ((1 - tau) / tau).square().clamp(max=5)
        return (errors * importance * self.shared.training(batch)).mean(), {}

    def draw_times(self, prediction: Prediction, rng: SampleRandom, within: Range) -> Tensor:
        """Draw tau, (B,)."""
        times = self.config.times
        least, most = torch.full_like(prediction.t, times.least), torch.full_like(prediction.t, times.most)
        if within != "full":
            assert prediction.t_next is not None, "DistillConfig refuses it without chains"
            least = prediction.t_next.clamp(times.least)
        if within == "step":
            most = prediction.t.clamp(max=times.most)
        return torch.lerp(least, most, rng.uniform())

    def noise(self, prediction: Prediction, tau: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise (B, C, h, w) that data is mixed with at tau, and importance weights (B,).

        From the sampler's next state x_s = (1 - s) data + s e on, with rho = (1 - tau) / (1 - s),

            x_tau = rho x_s + sqrt(tau^2 - rho^2 s^2) fresh = (1 - tau) data + tau noise.

        The weight is the density of that noise over the fresh one's, per dimension, as in TDM's code.
        """
        if self.config.noise == "fresh":
            return fresh, torch.ones_like(tau)
        assert prediction.t_next is not None, "DistillConfig refuses it without chains"
        x, t, s = prediction.x, expand(prediction.t, fresh), expand(prediction.t_next, fresh)
        own = (x - (1 - t) * prediction.data.detach()) / t  # e, the noise that the prediction says is in x
        added, tau = expand(transition(prediction, tau), fresh), expand(tau, fresh)
        noise = ((1 - tau) / (1 - s) * s * own + added * fresh) / tau
        log_weight = per_sample(fresh.square() - noise.square()) / 2
        return noise, log_weight.exp()

    def fake_velocity(self, batch: DistillBatch, x: Tensor, scale: float | Tensor) -> Tensor:
        """Ask the fake score, guided as the config says, at x, the noised data of the student."""
        assert batch.scored is not None, "the fake score's phase comes first"
        config, text = self.config.fake, batch.text
        if config.guidance_scale != "teacher":
            scale = config.guidance_scale
        if not isinstance(scale, Tensor) and scale == 1 and not config.drop_text and x is batch.scored.x:
            return batch.scored.velocity  # its answer before it learned from it
        if config.guidance_scale == 0:
            text, scale = self.shared.null_text.expand(len(x)), 1.0
        return guided_velocity(self.fake, x, batch.scored.tau, text, self.shared.null_text, scale).velocity

    # ---- the student

    def loss(
        self, prediction: Prediction, batch: DistillBatch, rng: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute (B,) values. Those of dmd and vsd are the mean square of the slope: they measure no progress."""
        assert batch.scored is not None, "the fake score's phase comes first"
        least, most = self.config.guidance_range
        scale = least if least == most else least + (most - least) * rng.uniform()
        if self.config.form in ("sid", "sim"):
            with frozen(self.fake):
                return self.identity(prediction, batch, scale)
        data = prediction.data.detach()
        with torch.no_grad():
            slope, logs = self.slope(prediction, batch, rng, scale)
        return per_sample((prediction.data - (data - slope)).square()) / 2, logs

    def slope(
        self, prediction: Prediction, batch: DistillBatch, rng: SampleRandom, scale: float | Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the slope of dmd or vsd at the student's data, (B, C, h, w)."""
        assert batch.scored is not None, "the fake score's phase comes first"
        (x, tau, _), data = batch.scored, prediction.data.detach()
        velocity = self.teacher_velocity(prediction, batch, 1.0 if self.config.decoupled else scale)
        fake = self.fake_velocity(batch, x, scale)
        if self.config.form == "vsd":
            return expand(tau**2 * (1 - tau), x) * (velocity - fake), {}
        teacher = flow.to_data(x, tau, velocity)
        distance = per_sample((data - teacher).abs())
        slope, logs = flow.to_data(x, tau, fake) - teacher, {"distance": distance.mean()}
        if self.config.decoupled:
            guidance = self.guidance(prediction, batch, rng, scale)
            logs |= {"matching": slope.norm(), "guidance": guidance.norm()}
            slope = slope + guidance
        if self.config.divergence != "reverse_kl":
            slope = slope * expand(self.density_weights(prediction, batch), data)
        return slope / expand(distance + 1e-6, data), logs

    def teacher_velocity(self, prediction: Prediction, batch: DistillBatch, scale: float | Tensor) -> Tensor:
        """Ask the teacher, guided, at the noised data; in the pass of the discriminator's features if that is shared."""
        assert batch.scored is not None, "the fake score's phase comes first"
        (x, tau, _), shared = batch.scored, self.shared
        if shared.discriminator is None:
            return shared.guided(x, tau, batch.text, scale)
        with_text = shared.discriminator.at_scored(prediction, batch)[0].detach()
        if not isinstance(scale, Tensor) and scale in (0, 1):
            return with_text
        without = shared.teacher(x, tau, shared.null_text.expand(len(x))).float()
        return torch.lerp(without, with_text, expand(scale, x) if isinstance(scale, Tensor) else scale)

    def density_weights(self, prediction: Prediction, batch: DistillBatch) -> Tensor:
        """Weight the samples (B,) by the divergence's function of the density ratio, with mean 1 over all processes."""
        ratio = self.shared.discriminator.log_ratio(prediction, batch).exp().clamp(0.1, 20)
        weights = DIVERGENCES[self.config.divergence](ratio)
        total, count = sum_over_processes(torch.stack([weights.sum(), torch.ones_like(weights).sum()]))
        return weights * count / total

    def guidance(
        self, prediction: Prediction, batch: DistillBatch, rng: SampleRandom, scale: float | Tensor
    ) -> Tensor:
        """Compute (scale - 1) (x0 without prompt - x0 with it) at a time after the sampler's next, (B, C, h, w)."""
        tau = self.draw_times(prediction, rng, "above")
        x = flow.interpolate(prediction.data.detach(), rng.normal(*batch.shape), tau)
        shared = self.shared
        guided, without = guided_velocity(shared.teacher, x, tau, batch.text, shared.null_text, scale)
        assert without is not None, "ScoreConfig wants a scale above 1"
        return expand(tau, x) * (1 - 1 / scale) * (guided - without)

    def identity(
        self, prediction: Prediction, batch: DistillBatch, scale: float | Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the values (B,) of sid or sim, with a graph through both networks to the student's data."""
        assert batch.scored is not None, "the fake score's phase comes first"
        config, shared, tau, data = self.config, self.shared, batch.scored.tau, prediction.data
        x = batch.scored.following(data)
        fake = flow.to_data(x, tau, self.fake_velocity(batch, x, scale))
        velocity = guided_velocity(shared.teacher, x, tau, batch.text, shared.null_text, scale).velocity
        teacher = flow.to_data(x, tau, velocity)
        gap = teacher - fake
        distance = per_sample((data - teacher).detach().abs())
        logs = {"distance": distance.mean(), "gap": gap.detach().square().mean()}
        if config.form == "sim":
            return per_sample(gap * (fake - data)) / (per_sample(gap.square()) + config.huber**2).sqrt(), logs
        return per_sample(gap * (fake - data + (1 - config.alpha) * gap)) / (distance + 1e-6), logs


def transition(prediction: Prediction, tau: Tensor) -> Tensor:
    """Compute the deviation (B,) of the noise that is added between the sampler's next state and tau."""
    assert prediction.t_next is not None, "DistillConfig refuses it without chains"
    s = prediction.t_next
    kept = (1 - tau) / (1 - s) * s
    return (tau.square() - kept.square()).clamp(min=0).sqrt()


def fake_score(shared: Shared, adapter: AdapterConfig | None) -> nn.Module:
    """Copy the teacher: whole, or as a LoRA whose frozen weights are the teacher's own."""
    teacher = shared.teacher
    if adapter is None:
        fake = copy.deepcopy(teacher).float().requires_grad_(True)
    else:
        assert isinstance(teacher, Model), "LoRA needs a model that names its layers"
        fake = copy.deepcopy(teacher, {id(weight): weight for weight in teacher.parameters()})
        add_adapter(fake, adapter, shared.seed)
    if isinstance(fake, Model) and getattr(fake, "compiled", False):
        fake.compile_blocks()  # copies are plain
    return fake
