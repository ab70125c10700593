"""The student's inputs: times, noised latents, and the one x0 prediction per step that all phases share.

Builders of the input at time t from a pair of data x0 and the noise e that the teacher drew it from:

    pair      (1 - t) x0 + t e                the stored noise
    fresh     (1 - t) x0 + t e'               new noise
    rollout   the student's own sampler from e down to t, without gradients
    chain     every state of the student's own sampler from new noise down to 0, with gradients; needs no data

Inputs and sampler must match. The first Euler step from e gives exactly (1 - t) x0_hat + t e, the pair's input; the
multistep sampler gives the fresh one. So `euler` is trained on pairs or rollouts, `multistep` on fresh noise or
rollouts; trained on the other's inputs, a student meets states at sampling time that it has never seen. Rollouts and
chains follow the sampler itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from nitro_e.config import Config, ConfigError, Fraction, Ge, Gt, Le
from nitro_e.interfaces import Denoiser, TextEmbedding
from nitro_e.randomness import SampleRandom, seed_of
from nitro_e.sampling import flow
from nitro_e.sampling.flow import TimestepConfig, training_times
from nitro_e.sampling.policy import Policy, all_data
from nitro_e.sampling.samplers import check_sigmas, euler, multistep

Sampler = Literal["euler", "multistep", "flow_map", "policy"]


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
    # pair: the noise the image was drawn from; fresh: new noise; chain: the student's own states, of no image
    noise: Literal["pair", "fresh", "chain"] = "pair"
    rollout: StudentRolloutConfig | None = None
    # of flow maps: share of samples of which the average velocity down to an earlier time is trained, uniform in 0..t; of the
    # others the velocity at t. null: always the average down to 0
    intervals: Fraction | None = None
    # of chains: the times after the first are drawn anew in each step, uniform, the same for all samples
    scatter: bool = False
    # of chains: {number of sampler steps: its weight}, drawn once per step; empty: as many steps as sigmas
    counts: dict[str, Annotated[float, Ge(0)]] = field(default_factory=dict)
    group: Annotated[int, Ge(1)] = 1  # of chains: so many of each prompt, for rewards that compare them

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sigmas(self.sigmas)
        self._check_counts()
        for start, weights in self.probabilities:
            if len(weights) != len(self.sigmas) or min(weights) < 0 or sum(weights) <= 0:
                raise ConfigError(
                    f"probabilities from step {start}: {list(weights)} are not {len(self.sigmas)} shares, one per sigma"
                )
        starts = [start for start, _ in self.probabilities]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ConfigError(f"probabilities: the steps must begin with 0 and rise, got {starts}")

    def _check_counts(self) -> None:
        if self.noise != "chain":
            given = {"counts": self.counts != {}, "scatter": self.scatter, "group": self.group != 1}
            for name, wrong in given.items():
                if wrong:
                    raise ConfigError(f"{name}: only for noise 'chain', not '{self.noise}'; leave it out")
            return
        for name in ("probabilities", "continuous_times", "rollout", "intervals"):
            if getattr(self, name) not in (None, ()):
                raise ConfigError(f"{name}: noise 'chain' takes all times of the sampler; leave it out")
        for name in self.counts:
            if not name.isdecimal() or int(name) < 1 or len(self.sigmas) % int(name):
                raise ConfigError(
                    f"counts: {name} steps are not evenly spaced among the {len(self.sigmas)} sigmas; name a divisor of it"
                )
        if self.counts and sum(self.counts.values()) == 0:
            raise ConfigError("counts: all weights are 0; give one a weight")

    @property
    def chain_counts(self) -> dict[int, float]:
        """The numbers of steps that chains are drawn with, and their weights; none without chains."""
        if self.noise != "chain":
            return {}
        counts = {int(name): weight for name, weight in self.counts.items() if weight}
        return counts or {len(self.sigmas): 1.0}

    def times_of(self, count: int) -> tuple[float, ...]:
        """Return the falling times of a sampler of `count` steps, a divisor of the number of sigmas."""
        return self.sigmas[:: len(self.sigmas) // count]

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
        if sampler == "flow_map":
            if self.noise == "chain" or self.rollout:
                raise ConfigError("sampler 'flow_map' has no chains or rollouts; set inputs.noise: fresh")
            if not self.intervals:
                raise ConfigError(
                    "sampler 'flow_map' takes averages between two times, which are trained on a share of inputs.intervals; "
                    "set it, for example to 0.5, or sampler: multistep"
                )
            return
        if sampler == "policy":
            if self.noise != "chain":
                raise ConfigError("sampler 'policy' is trained on its own states; set inputs.noise: chain")
            return
        expected = {"euler": "pair", "multistep": "fresh"}[sampler]
        if self.noise not in (expected, "chain") and (
            self.sigmas != (1.0,) or self.continuous_times is not None
        ):
            raise ConfigError(
                f"sampler '{sampler}' meets states made with inputs.noise '{expected}', but the student would be "
                f"trained on '{self.noise}'; set inputs.noise: {expected}, or the other sampler"
            )


@dataclass
class Prediction:
    """The student's x0 prediction for one micro-batch."""

    x: Tensor  # (B, C, h, w) noised input
    t: Tensor  # (B,)
    on_path: bool  # x is a mix of the pair's own data and noise, not a state of the student's sampler
    data: Tensor  # (B, C, h, w) predicted x0; of a policy (B, n, C, h, w), see sampling/policy.py
    t_next: Tensor | None = None  # (B,) time that the sampler goes to from here; of chains only
    # (B,) time down to which the velocity is an average; data is then x - t times that. None: 0
    end: Tensor | None = None

    @property
    def last_data(self) -> Tensor:
        """The x0 prediction (B, C, h, w), of a policy the one for the end of the step."""
        return self.data if self.data.ndim == self.x.ndim else self.data[:, -1]

    @property
    def policy(self) -> Policy:
        """The path from here to the sampler's next time; a single prediction makes it a straight line."""
        assert self.t_next is not None, "DistillConfig refuses it without chains"
        data = self.data if self.data.ndim > self.x.ndim else self.data.unsqueeze(1)
        return Policy(self.x, self.t, self.t_next, data)

    @property
    def times(self) -> Tensor:
        """The times that the student is told: (B,), or (B, 2) with the end."""
        return self.t if self.end is None else torch.stack([self.t, self.end], dim=1)


@dataclass
class DistillBatch:
    """One micro-batch on the device: images of the teacher with their prompts, or prompts alone."""

    step: int
    latents: Tensor | None  # (B, C, h, w); None: prompts alone
    noise: Tensor | None  # (B, C, h, w) that the teacher drew them from
    text: TextEmbedding
    prompts: list[str]
    keys: list[str]
    # the only micro-batch of its step: then the graph of the first phase's forward is kept for the student's phase
    alone: bool = True
    prediction: Prediction | None = None  # made by the first phase that needs it
    heldout_gap: Tensor | None = None  # (2,) sum and count, left by the discriminator for the guards
    scored: Scored | None = None  # left by the fake score for the student's phase
    # the teacher's velocity and the heads' features there, with a graph to the student's data, if objectives share them
    taught: tuple[Tensor, Any] | None = None
    latent_shape: tuple[int, ...] = ()  # (C, h, w), given where there are no latents
    info: list[dict] = field(default_factory=list)  # of the prompts, for rewards

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (C, h, w) of a latent."""
        return self.latent_shape if self.latents is None else tuple(self.latents.shape[1:])

    @property
    def stored_latents(self) -> Tensor:
        assert self.latents is not None, "DistillConfig.needs_pairs says who reads them"
        return self.latents

    @property
    def stored_noise(self) -> Tensor:
        assert self.noise is not None, "InputConfig.needs_noise says which inputs read it"
        return self.noise

    def share_prompts(self, count: int) -> None:
        """Give every `count` samples in a row the prompt and image of the first of them."""
        rows = [row - row % count for row in range(len(self.prompts))]
        self.text = self.text.take(rows)
        self.prompts, self.keys = [self.prompts[row] for row in rows], [self.keys[row] for row in rows]
        self.info = [self.info[row] for row in rows] if self.info else []
        # without a list of rows, which would make the host wait
        if self.latents is not None:
            self.latents = self.latents[::count].repeat_interleave(count, dim=0)[: len(rows)]
        if self.noise is not None:
            self.noise = self.noise[::count].repeat_interleave(count, dim=0)[: len(rows)]


class Scored(NamedTuple):
    """The fake score's answer at noised data of the student."""

    x: Tensor  # (B, C, h, w) the student's x0 predictions, noised to tau
    tau: Tensor  # (B,)
    velocity: Tensor  # (B, C, h, w) the answer, before the fake score learned from it

    def following(self, data: Tensor) -> Tensor:
        """Return x with a graph to the student's data, of which it is made."""
        return self.x + flow.expand(1 - self.tau, data) * (data - data.detach())


class Predictor:
    """Runs the student on a batch, once per step for all phases."""

    def __init__(self, config: InputConfig, sampler: Sampler, seed: int) -> None:
        self.config, self.sampler, self.seed = config, sampler, seed
        self.times = torch.tensor([*config.sigmas, 0.0])

    def __call__(
        self, student: Denoiser, batch: DistillBatch, rng: SampleRandom, last: bool, learns: bool = True
    ) -> Prediction:
        """Predict x0, with a graph if this is the student's phase (`last`), or if it can be kept for that one.

        learns: whether the student's phase will come in this step.
        """
        graph = last or (batch.alone and learns)
        if batch.prediction is None and self.config.noise == "chain":
            batch.prediction = self.chain(student, batch, rng, graph)
        elif batch.prediction is None:
            x, t, on_path = self.input(student, batch, rng)
            batch.prediction = Prediction(x, t, on_path, x, end=self.draw_ends(t, rng))
            with torch.set_grad_enabled(graph):
                self.run(student, batch.prediction, batch.text)
        elif last and not batch.prediction.data.requires_grad:
            self.run(student, batch.prediction, batch.text)
        return batch.prediction

    @staticmethod
    def run(student: Denoiser, prediction: Prediction, text: TextEmbedding) -> None:
        """Fill in the student's data."""
        x, t = prediction.x, prediction.t
        prediction.data = flow.to_data(x, t, student(x, prediction.times, text))

    def draw_ends(self, t: Tensor, rng: SampleRandom) -> Tensor | None:
        """Draw (B,) times down to which velocities are averages; t itself for those that are none."""
        if self.config.intervals is None:
            return None
        return torch.where(rng.uniform() < self.config.intervals, t * rng.uniform(), t)

    @torch.no_grad()
    def input(self, student: Denoiser, batch: DistillBatch, rng: SampleRandom) -> tuple[Tensor, Tensor, bool]:
        """Draw x (B, C, h, w), t (B,), and whether x is a mix of the pair (`Prediction.on_path`)."""
        config, data = self.config, batch.stored_latents
        # the same on all ranks
        steps = torch.Generator().manual_seed(seed_of(self.seed, "distill", batch.step))
        if config.rollout and torch.rand((), generator=steps) < config.rollout.share_at(batch.step):
            place = int(torch.multinomial(config.probabilities_at(batch.step), 1, generator=steps))
            x = self.rollout(lambda x, t: student(x, t, batch.text), batch.stored_noise, place, rng)
            torch.clear_autocast_cache()  # it holds weights cast without a graph
            return x, self.times[place].to(data.device, non_blocking=True).expand(len(data)), False
        t = self.draw_times(batch.step, rng).to(data.device)
        noise = batch.stored_noise if config.noise == "pair" else rng.normal(*data.shape[1:])
        return flow.interpolate(data, noise, t), t, True

    def chain(self, student: Denoiser, batch: DistillBatch, rng: SampleRandom, graph: bool) -> Prediction:
        """Follow the student's sampler from noise to data; each of its K steps is a sample of the batch.

        Of every K samples in a row (times `group`) the first gives the prompt, and sample k is the chain's step k. K is
        drawn once per step. States are detached: gradients stay within a step.
        """
        counts = self.config.chain_counts
        steps = torch.Generator().manual_seed(
            seed_of(self.seed, "chain", batch.step)
        )  # the same on all ranks
        count = list(counts)[int(torch.multinomial(torch.tensor(list(counts.values())), 1, generator=steps))]
        batch.share_prompts(count * self.config.group)
        noise = rng.normal(*batch.shape).unflatten(0, (-1, count))  # (B / K, K, C, h, w)
        times = torch.tensor([*self.config.times_of(count), 0.0]).to(noise.device, non_blocking=True)
        if self.config.scatter:
            drawn = torch.rand(count - 1, generator=steps).clamp(min=0.02).sort(descending=True).values
            times[1:-1] = drawn.to(times, non_blocking=True)
        states, predicted, x = [], [], noise[:, 0]
        for step, (t, t_next) in enumerate(pairwise(times.unsqueeze(1).expand(-1, len(noise)))):
            with torch.set_grad_enabled(graph):
                velocity = student(x, t, batch.text.take(slice(step, None, count)))
                data = all_data(x, t, velocity)
            states.append(x)
            predicted.append(data)
            if step + 1 == count:
                break
            if self.sampler == "policy":
                x = Policy(x, t, t_next, data.detach()).state(t_next)
            else:
                again = noise[:, step + 1] if self.sampler == "multistep" else flow.to_noise(x, t, velocity)
                x = flow.interpolate(data, again, t_next).detach()
        if not graph:
            torch.clear_autocast_cache()  # it holds weights cast without a graph
        each = lambda values: values.repeat(len(noise))  # noqa: E731
        return Prediction(
            x=torch.stack(states, dim=1).flatten(0, 1),
            t=each(times[:-1]),
            on_path=False,
            data=torch.stack(predicted, dim=1).flatten(0, 1),
            t_next=each(times[1:]),
        )

    def draw_times(self, step: int, rng: SampleRandom) -> Tensor:
        """Draw (B,) sigmas, or continuous times for a fraction of them."""
        uniform = rng.uniform()
        levels = self.config.probabilities_at(step).cumsum(0).to(uniform.device, non_blocking=True)
        place = torch.searchsorted(levels, uniform, right=True).clamp(max=len(levels) - 1)
        t = self.times.to(uniform.device, non_blocking=True)[place]
        continuous = self.config.continuous_times
        if continuous is None:
            return t
        times = training_times(continuous.times, rng.normal()).clamp(min=1e-3)
        return torch.where(rng.uniform() < continuous.share, times, t)

    def rollout(
        self, velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, place: int, rng: SampleRandom
    ) -> Tensor:
        """Follow the student's sampler from the noise to sigma number `place` (0: the noise itself)."""
        times = self.times[: place + 1].to(noise.device, non_blocking=True)
        if self.sampler == "euler":
            return euler(velocity, noise, times)
        return multistep(velocity, noise, times, lambda step: rng.normal(*noise.shape[1:]))
