"""Distribution matching: the student's data is moved to where the teacher finds it likelier than the student does.

A second network, the fake score, is a copy of the teacher that keeps learning to denoise the student's data. Noised to
a time tau, that data gets two x0 predictions, the fake score's and the teacher's guided one; their difference is the
slope of KL(student || teacher) (variational score distillation, arXiv 2305.16213; Diff-Instruct, arXiv 2305.18455; for
few steps DMD, arXiv 2311.18828, and DMD2, arXiv 2405.14867). No images are needed, and no GAN is here: `adversarial`
may stand beside it, on pairs.

On a trajectory of the Euler sampler the data may instead be noised from the sampler's next state, to times of that step
alone (TDM, arXiv 2503.06674).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Fraction, Ge, Gt
from nitro_e.interfaces import Model, Phase
from nitro_e.randomness import SampleRandom
from nitro_e.sampling import flow
from nitro_e.sampling.flow import expand
from nitro_e.stages.distill.inputs import DistillBatch, Prediction, Scored
from nitro_e.stages.distill.objective import Balance, Shared
from nitro_e.training.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class ScoreTimesConfig(Config):
    """The times tau at which student and teacher are compared, uniform."""

    # full: least to most; step: of these, the ones between the sample's own time and the next of its sampler
    range: Literal["full", "step"] = "full"
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
    # of the error at tau: of velocities as in flow matching; snr: of data, times min(SNR, 5) (TDM)
    weighting: Literal["velocity", "snr"] = "velocity"
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            lr=1e-5, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.0, warmup=0, clip=1.0
        )
    )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(Config):
    weight: Annotated[float, Gt(0), "to switch the objective off: score: null"] = 1.0  # of this objective
    guidance_scale: Annotated[float, Ge(0)] = 4.5  # of the teacher
    times: ScoreTimesConfig = field(default_factory=ScoreTimesConfig)
    # fresh: data is noised with new noise; trajectory: from the next state of the Euler sampler (TDM)
    noise: Literal["fresh", "trajectory"] = "fresh"
    fake: FakeScoreConfig = field(default_factory=FakeScoreConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise == "trajectory" and self.times.range != "step":
            raise ConfigError(
                "noise 'trajectory' begins at the sampler's next state: it needs times: {range: step}"
            )


class Score:
    """The fake score, trained in a phase of its own, and the student's slope from it and the teacher."""

    name = "score"
    balance: Balance | None = None
    direct = False

    def __init__(self, config: ScoreConfig, shared: Shared) -> None:
        self.config, self.shared = config, shared
        self.fake = copy.deepcopy(shared.teacher).float().requires_grad_(True)
        if isinstance(self.fake, Model) and getattr(self.fake, "compiled", False):
            self.fake.compile_blocks()  # copies are plain
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
        prediction = self.shared.predict(batch, rng)
        data = prediction.data.detach()
        tau = self.draw_times(prediction, rng)
        noise, importance = self.noise(prediction, tau, rng.normal(*batch.shape))
        x = flow.interpolate(data, noise, tau)
        velocity = net(x, tau, batch.text).float()
        batch.scored = Scored(x, tau, velocity.detach())
        errors = (velocity - flow.velocity_target(data, noise)).square().flatten(1).mean(dim=1)
        if self.config.fake.weighting == "snr":  # an error of data is tau times that of the velocity
            errors = errors * tau**2 * ((1 - tau) / tau).square().clamp(max=5)
        return (errors * importance * self.shared.training(batch)).mean(), {}

    def draw_times(self, prediction: Prediction, rng: SampleRandom) -> Tensor:
        """Draw tau, (B,)."""
        times = self.config.times
        least, most = torch.full_like(prediction.t, times.least), torch.full_like(prediction.t, times.most)
        if times.range == "step":
            assert prediction.t_next is not None, "DistillConfig refuses it without chains"
            least, most = prediction.t_next.clamp(times.least), prediction.t.clamp(max=times.most)
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
        tau = expand(tau, fresh)
        share = (1 - tau) / (1 - s) * s
        noise = (share * own + (tau.square() - share.square()).clamp(min=0).sqrt() * fresh) / tau
        log_weight = (fresh.square() - noise.square()).flatten(1).mean(dim=1) / 2
        return noise, log_weight.exp()

    # ---- the student

    def loss(
        self, prediction: Prediction, batch: DistillBatch, rng: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute (B,) values whose slope at the data is (x0_fake - x0_teacher) / mean |data - x0_teacher| (DMD).

        The value is the mean square of that slope; it measures no progress.
        """
        assert batch.scored is not None, "the fake score's phase comes first"
        x, tau, velocity = batch.scored
        data = prediction.data.detach()
        teacher = flow.to_data(x, tau, self.shared.guided(x, tau, batch.text, self.config.guidance_scale))
        distance = (data - teacher).abs().flatten(1).mean(dim=1)  # (B,)
        slope = (flow.to_data(x, tau, velocity) - teacher) / expand(distance + 1e-6, data)
        values = (prediction.data - (data - slope)).square().flatten(1).mean(dim=1) / 2
        return values, {"distance": distance.mean()}
