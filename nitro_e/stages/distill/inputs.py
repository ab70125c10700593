"""What the student answers to: times, noised inputs, and one forward of the student per step that all phases share.

Builders of the input at time t from a pair of data x0 and the noise e that the teacher drew it from:

    pair      (1 - t) x0 + t e                the stored noise
    fresh     (1 - t) x0 + t e'               new noise
    rollout   the student's own sampler from e down to t, without gradients

One rule binds them to the sampler. The first Euler step from e gives exactly (1 - t) x0_hat + t e, the pair's input;
the renoise sampler gives the fresh one. So `euler` is trained on pairs or rollouts, `renoise` on fresh noise or
rollouts; trained on the other's inputs a student meets states at sampling time that it has never seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge, Gt, Le
from nitro_e.interfaces import TextEmbedding
from nitro_e.randomness import SlotRandom, seed_of
from nitro_e.sampling import flow
from nitro_e.sampling.flow import TimestepConfig, training_times
from nitro_e.sampling.samplers import check_sigmas, euler, renoise

Sampler = Literal["euler", "renoise"]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Config):
    """A share of the iterations, all samples of which are at one sigma, starts from the student's own states."""

    share: Annotated[float, Gt(0), Le(1)] = 0.5  # from step `end` on
    start: Annotated[int, Ge(0)] = 1000  # the share rises from here
    end: Annotated[int, Ge(0)] = 3000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start > self.end:
            raise ConfigError(f"start {self.start} is after end {self.end}")

    def share_at(self, step: int) -> float:
        if step < self.start:
            return 0.0
        return self.share * min(1.0, (step - self.start) / max(self.end - self.start, 1))


@dataclass(frozen=True, kw_only=True)
class AnywhereConfig(Config):
    """A share of the samples is at times that are no sigmas."""

    share: Annotated[float, Gt(0), Le(1)] = 1.0
    times: TimestepConfig = field(default_factory=TimestepConfig)


@dataclass(frozen=True, kw_only=True)
class InputConfig(Config):
    sigmas: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)  # the student's times, falling
    odds: tuple[tuple[int, tuple[float, ...]], ...] = ()  # [from step, odds of each sigma] ...; empty: equal
    anywhere: AnywhereConfig | None = None
    noise: Literal["pair", "fresh"] = "pair"
    rollout: RolloutConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sigmas(self.sigmas)
        for start, odds in self.odds:
            if len(odds) != len(self.sigmas) or min(odds) < 0 or sum(odds) <= 0:
                raise ConfigError(
                    f"odds from step {start}: {list(odds)} are not {len(self.sigmas)} shares, one per sigma"
                )
        starts = [start for start, _ in self.odds]
        if starts and (starts[0] != 0 or starts != sorted(set(starts))):
            raise ConfigError(f"odds: the steps must begin with 0 and rise, got {starts}")

    @property
    def needs_noise(self) -> bool:
        """Whether the data must hold the noise of every pair."""
        return self.noise == "pair" or self.rollout is not None

    def odds_at(self, step: int) -> Tensor:
        """(sigmas,) probabilities."""
        odds = [1.0] * len(self.sigmas)
        for start, later in self.odds:
            odds = later if step >= start else odds
        odds = torch.tensor(odds)
        return odds / odds.sum()

    def check_sampler(self, sampler: Sampler) -> None:
        """The rule of the module docstring; at t = 1, where all inputs are pure noise, there is nothing to check."""
        expected = {"euler": "pair", "renoise": "fresh"}[sampler]
        if self.noise != expected and (self.sigmas != (1.0,) or self.anywhere is not None):
            raise ConfigError(
                f"sampler '{sampler}' meets states made with inputs.noise '{expected}', but the student would be "
                f"trained on '{self.noise}'; set inputs.noise: {expected}, or the other sampler"
            )


@dataclass
class Draft:
    """The student's answer to one micro-batch."""

    x: Tensor  # (B, C, h, w) noised input
    t: Tensor  # (B,)
    on_path: bool  # x is made of the pair itself: no rollout
    data: Tensor  # (B, C, h, w) what the student takes for the data at x


@dataclass
class DistillBatch:
    """One micro-batch of teacher's images on the device."""

    step: int
    latents: Tensor  # (B, C, h, w)
    noise: Tensor | None  # (B, C, h, w) what the teacher drew them from
    text: TextEmbedding
    prompts: list[str]
    keys: list[str]
    # the only micro-batch of its step, so that the graph of the forward may wait for its phase
    alone: bool = True
    draft: Draft | None = None  # made by the first phase that asks
    heldout_gap: Tensor | None = None  # (2,) sum and count, left by the discriminator for the guards


class Drafts:
    """Makes the draft of a batch, once."""

    def __init__(self, config: InputConfig, sampler: Sampler, seed: int) -> None:
        self.config, self.sampler, self.seed = config, sampler, seed
        self.times = torch.tensor([*config.sigmas, 0.0])

    def __call__(self, student: nn.Module, batch: DistillBatch, rng: SlotRandom, last: bool) -> Draft:
        """The draft, with a graph if this is the phase that needs one (`last`), or if it can be kept for it."""
        if batch.draft is None:
            x, t, on_path = self.input(student, batch, rng)
            with torch.set_grad_enabled(last or batch.alone):
                batch.draft = Draft(x, t, on_path, flow.to_data(x, t, student(x, t, batch.text)))
        elif last and not batch.draft.data.requires_grad:
            x, t = batch.draft.x, batch.draft.t
            batch.draft.data = flow.to_data(x, t, student(x, t, batch.text))
        return batch.draft

    @torch.no_grad()
    def input(self, student: nn.Module, batch: DistillBatch, rng: SlotRandom) -> tuple[Tensor, Tensor, bool]:
        """x (B, C, h, w), t (B,), and whether x is made of the pair itself."""
        config, data = self.config, batch.latents
        # the same on all ranks
        steps = torch.Generator().manual_seed(seed_of(self.seed, "distill", batch.step))
        if config.rollout and torch.rand((), generator=steps) < config.rollout.share_at(batch.step):
            place = int(torch.multinomial(config.odds_at(batch.step), 1, generator=steps))
            x = self.rollout(lambda x, t: student(x, t, batch.text), batch.noise, place, rng)
            torch.clear_autocast_cache()  # it holds weights cast without a graph
            return x, self.times[place].to(data.device).expand(len(data)), False
        t = self.draw_times(batch.step, rng).to(data.device)
        noise = batch.noise if config.noise == "pair" else rng.normal(*data.shape[1:])
        return flow.interpolate(data, noise, t), t, True

    def draw_times(self, step: int, rng: SlotRandom) -> Tensor:
        """(B,) sigmas, or times anywhere."""
        uniform = rng.uniform()
        levels = self.config.odds_at(step).cumsum(0).to(uniform.device)
        place = torch.searchsorted(levels, uniform, right=True).clamp(max=len(levels) - 1)
        t = self.times.to(uniform.device)[place]
        if self.config.anywhere is None:
            return t
        anywhere = training_times(self.config.anywhere.times, rng.normal()).clamp(min=1e-3)
        return torch.where(rng.uniform() < self.config.anywhere.share, anywhere, t)

    def rollout(
        self, velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, place: int, rng: SlotRandom
    ) -> Tensor:
        """The state of the student's sampler at sigma number `place` (0: the noise itself)."""
        times = self.times[: place + 1].to(noise.device)
        if self.sampler == "euler":
            return euler(velocity, noise, times)
        return renoise(velocity, noise, times, lambda step: rng.normal(*noise.shape[1:]))
