"""The student's inputs: times, noised latents, and the one x0 prediction per step that all phases share.

Builders of the input at time t from a pair of data x0 and the noise e that the teacher drew it from:

    pair      (1 - t) x0 + t e                the stored noise
    fresh     (1 - t) x0 + t e'               new noise
    rollout   the student's own sampler from e down to t, without gradients

Inputs and sampler must match. The first Euler step from e gives exactly (1 - t) x0_hat + t e, the pair's input; the
multistep sampler gives the fresh one. So `euler` is trained on pairs or rollouts, `multistep` on fresh noise or
rollouts; trained on the other's inputs, a student meets states at sampling time that it has never seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from nitro_e.config import Config, ConfigError, Ge, Gt, Le
from nitro_e.interfaces import Denoiser, TextEmbedding
from nitro_e.randomness import SampleRandom, seed_of
from nitro_e.sampling import flow
from nitro_e.sampling.flow import TimestepConfig, training_times
from nitro_e.sampling.samplers import check_sigmas, euler, multistep

Sampler = Literal["euler", "multistep"]


@dataclass(frozen=True, kw_only=True)
class StudentRolloutConfig(Config):
    """Some steps train on states of the student's own sampler, all samples of a step at one sigma."""

    share: Annotated[float, Gt(0), Le(1)] = 0.5  # of the steps, from step `end` on
    start: Annotated[int, Ge(0)] = 1000  # the share rises from here
    end: Annotated[int, Ge(0)] = 3000  # step from which the full share is used

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start > self.end:
            raise ConfigError(f"start {self.start} is after end {self.end}")

    def share_at(self, step: int) -> float:
        if step < self.start:
            return 0.0
        return self.share * min(1.0, (step - self.start) / max(self.end - self.start, 1))


@dataclass(frozen=True, kw_only=True)
class ContinuousTimesConfig(Config):
    """A fraction of the samples is trained at continuous t instead of the discrete sigmas."""

    share: Annotated[float, Gt(0), Le(1)] = 1.0  # fraction of the samples at continuous times
    times: TimestepConfig = field(default_factory=TimestepConfig)


@dataclass(frozen=True, kw_only=True)
class InputConfig(Config):
    RENAMED: ClassVar[Mapping[str, str]] = {"odds": "probabilities", "anywhere": "continuous_times"}

    sigmas: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)  # the student's times, falling
    # of the sigmas: [from step, one weight per sigma] ..., which are normalised to sum 1; empty: equal ones
    probabilities: tuple[tuple[int, tuple[float, ...]], ...] = ()
    continuous_times: ContinuousTimesConfig | None = None
    noise: Literal["pair", "fresh"] = "pair"  # pair: the noise the image was drawn from; fresh: new noise
    rollout: StudentRolloutConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sigmas(self.sigmas)
        for start, weights in self.probabilities:
            if len(weights) != len(self.sigmas) or min(weights) < 0 or sum(weights) <= 0:
                raise ConfigError(
                    f"probabilities from step {start}: {list(weights)} are not {len(self.sigmas)} shares, one per sigma"
                )
        starts = [start for start, _ in self.probabilities]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ConfigError(f"probabilities: the steps must begin with 0 and rise, got {starts}")

    @property
    def needs_noise(self) -> bool:
        """Tell whether the data must hold the noise of every pair."""
        return self.noise == "pair" or self.rollout is not None

    def probabilities_at(self, step: int) -> Tensor:
        """Return the probability of each sigma, (S,)."""
        weights: tuple[float, ...] = (1.0,) * len(self.sigmas)
        for start, later in self.probabilities:
            weights = later if step >= start else weights
        values = torch.tensor(weights)
        return values / values.sum()

    def check_sampler(self, sampler: Sampler) -> None:
        """Refuse inputs that the sampler never produces; at t = 1 alone, where all inputs are pure noise, none are."""
        expected = {"euler": "pair", "multistep": "fresh"}[sampler]
        if self.noise != expected and (self.sigmas != (1.0,) or self.continuous_times is not None):
            raise ConfigError(
                f"sampler '{sampler}' meets states made with inputs.noise '{expected}', but the student would be "
                f"trained on '{self.noise}'; set inputs.noise: {expected}, or the other sampler"
            )


@dataclass
class Prediction:
    """The student's x0 prediction for one micro-batch."""

    x: Tensor  # (B, C, h, w) noised input
    t: Tensor  # (B,)
    on_path: bool  # x is a mix of the pair's own data and noise, not a rollout
    data: Tensor  # (B, C, h, w) predicted x0


@dataclass
class DistillBatch:
    """One micro-batch of the teacher's images on the device."""

    step: int
    latents: Tensor  # (B, C, h, w)
    noise: Tensor | None  # (B, C, h, w) that the teacher drew them from
    text: TextEmbedding
    prompts: list[str]
    keys: list[str]
    # the only micro-batch of its step: then the graph of the first phase's forward is kept for the student's phase
    alone: bool = True
    prediction: Prediction | None = None  # made by the first phase that needs it
    heldout_gap: Tensor | None = None  # (2,) sum and count, left by the discriminator for the guards

    @property
    def stored_noise(self) -> Tensor:
        assert self.noise is not None, "InputConfig.needs_noise says which inputs read it"
        return self.noise


class Predictor:
    """Runs the student on a batch, once per step for all phases."""

    def __init__(self, config: InputConfig, sampler: Sampler, seed: int) -> None:
        self.config, self.sampler, self.seed = config, sampler, seed
        self.times = torch.tensor([*config.sigmas, 0.0])

    def __call__(self, student: Denoiser, batch: DistillBatch, rng: SampleRandom, last: bool) -> Prediction:
        """Predict x0, with a graph if this is the student's phase (`last`), or if it can be kept for that one."""
        if batch.prediction is None:
            x, t, on_path = self.input(student, batch, rng)
            with torch.set_grad_enabled(last or batch.alone):
                batch.prediction = Prediction(x, t, on_path, flow.to_data(x, t, student(x, t, batch.text)))
        elif last and not batch.prediction.data.requires_grad:
            x, t = batch.prediction.x, batch.prediction.t
            batch.prediction.data = flow.to_data(x, t, student(x, t, batch.text))
        return batch.prediction

    @torch.no_grad()
    def input(self, student: Denoiser, batch: DistillBatch, rng: SampleRandom) -> tuple[Tensor, Tensor, bool]:
        """Draw x (B, C, h, w), t (B,), and whether x is a mix of the pair (`Prediction.on_path`)."""
        config, data = self.config, batch.latents
        # the same on all ranks
        steps = torch.Generator().manual_seed(seed_of(self.seed, "distill", batch.step))
        if config.rollout and torch.rand((), generator=steps) < config.rollout.share_at(batch.step):
            place = int(torch.multinomial(config.probabilities_at(batch.step), 1, generator=steps))
            x = self.rollout(lambda x, t: student(x, t, batch.text), batch.stored_noise, place, rng)
            torch.clear_autocast_cache()  # it holds weights cast without a graph
            return x, self.times[place].to(data.device).expand(len(data)), False
        t = self.draw_times(batch.step, rng).to(data.device)
        noise = batch.stored_noise if config.noise == "pair" else rng.normal(*data.shape[1:])
        return flow.interpolate(data, noise, t), t, True

    def draw_times(self, step: int, rng: SampleRandom) -> Tensor:
        """Draw (B,) sigmas, or continuous times for a fraction of them."""
        uniform = rng.uniform()
        levels = self.config.probabilities_at(step).cumsum(0).to(uniform.device)
        place = torch.searchsorted(levels, uniform, right=True).clamp(max=len(levels) - 1)
        t = self.times.to(uniform.device)[place]
        continuous = self.config.continuous_times
        if continuous is None:
            return t
        times = training_times(continuous.times, rng.normal()).clamp(min=1e-3)
        return torch.where(rng.uniform() < continuous.share, times, t)

    def rollout(
        self, velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, place: int, rng: SampleRandom
    ) -> Tensor:
        """Follow the student's sampler from the noise to sigma number `place` (0: the noise itself)."""
        times = self.times[: place + 1].to(noise.device)
        if self.sampler == "euler":
            return euler(velocity, noise, times)
        return multistep(velocity, noise, times, lambda step: rng.normal(*noise.shape[1:]))
