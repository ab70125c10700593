"""Stochastic samplers of rectified flow as one table: x' ~ N(x_coef x + v_coef v, std^2), v the velocity at (x, t).

Everything that must agree (rollout, log-probability, KL, tests) reads its numbers from `transitions`. t is the noise
level of a step, t' the next one, h = t - t'; the reverse SDE with the marginals of the ODE is, for any g(t),

    dx = [v + g^2 / (2 t) * noise] dt + g dW,    noise = x + (1 - t) v.

    ode        the Euler step of the probability-flow ODE, std 0
    flow       g = a sqrt(t / (1 - t)), Euler-Maruyama (Flow-GRPO, arXiv 2505.05470, eq. 9)
    dance      g = eta (DanceGRPO, arXiv 2505.07818)
    ancestral  keeps the predicted data, redraws a part of the predicted noise (DDIM's eta, arXiv 2010.02502); for h -> 0
               the same SDE as `flow` with a = sqrt(2) eta, without its singularity at t = 1 and noise left over at the end
    cps        the same idea with noise t' sin(pi eta / 2), which does not vanish with h: it keeps coefficients, not
               marginals (Flow-CPS, arXiv 2509.05952)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from nitro_e.config import Config, ConfigError, Ge, Gt, Le
from nitro_e.randomness import seed_of
from nitro_e.training.meters import mean_by

Kind = Literal["flow", "ancestral", "dance", "cps"]
DEFAULT_NOISE = {"flow": 0.7, "ancestral": 0.8, "dance": 0.3, "cps": 0.8}
# steps with less noise than this are neither random nor trained: their likelihood is all rounding
MIN_STD = 0.005


@dataclass(frozen=True, kw_only=True)
class SDEConfig(Config):
    kind: Kind = "flow"  # flow: Flow-GRPO; ancestral; dance: DanceGRPO; cps: coefficients-preserving sampling
    # a of flow, eta of the others; None: 0.7, 0.3 for dance, 0.8 for ancestral and cps
    noise: Annotated[float, Gt(0), Le(10)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise is not None and self.noise > 1 and self.kind in ("ancestral", "cps"):
            raise ConfigError(f"noise {self.noise} is not a level of '{self.kind}'; an ODE needs no SDE")

    @property
    def level(self) -> float:
        return DEFAULT_NOISE[self.kind] if self.noise is None else self.noise


@dataclass(frozen=True, kw_only=True)
class WindowConfig(Config):
    """The window of steps that are random and trained; the others are steps of the ODE (MixGRPO, arXiv 2507.21802)."""

    kind: Literal["fixed", "random", "slide"] = "fixed"  # random: a new place per rollout; slide: moves on
    size: Annotated[int, Ge(1)] = 6  # steps
    start: Annotated[int, Ge(0)] = 0  # first step that may be in the window ...
    stop: Annotated[int, Ge(1)] | None = None  # ... and one past the last; None: every step with enough noise
    every: Annotated[int, Ge(1)] = 25  # slide: rollouts until it moves by one step; at the end it starts over

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop is not None and self.stop - self.start < self.size:
            raise ConfigError(
                f"size {self.size} does not fit between start {self.start} and stop {self.stop}"
            )


class Transitions(NamedTuple):
    """The table: (N,) numbers for steps i, float32, computed in float64."""

    t: Tensor
    h: Tensor
    x_coef: Tensor
    v_coef: Tensor
    std: Tensor

    def at(self, index: Tensor) -> Transitions:
        """Pick rows `index` (B,), shaped (B, 1, 1, 1) to multiply latents; t stays (B,)."""
        picked = [values[index] for values in self]
        return Transitions(picked[0], *(values[:, None, None, None] for values in picked[1:]))

    def to(self, device: torch.device) -> Transitions:
        return Transitions(*(values.to(device) for values in self))

    def mean(self, x: Tensor, velocity: Tensor) -> Tensor:
        """Compute the mean of x', float32; self must be `at` the rows of x."""
        return self.x_coef * x.float() + self.v_coef * velocity.float()

    @property
    def gaussian_kl(self) -> Tensor:
        """KL of two models' transitions per unit of mean squared velocity difference: v_coef^2 / (2 std^2)."""
        return self.v_coef.square() / (2 * self.std.square())


def transitions(kind: Kind | Literal["ode"], times: Tensor, noise: float = 0.0) -> Transitions:
    """Compute the table for falling times (N + 1,). `noise`: a of flow, eta of the others, unused by ode."""
    times = times.double()
    t, t_next = times[:-1], times[1:]
    h = t - t_next
    if kind == "ode":
        x_coef, v_coef, std = torch.ones_like(h), -h, torch.zeros_like(h)
    elif kind in ("flow", "dance"):
        g2 = torch.full_like(t, noise**2)
        if kind == "flow":
            # g is infinite at t = 1; Flow-GRPO's rule is the second time there, inside 1 - t only
            g2 = g2 * t / (1 - torch.where(t == 1, times[1], t))
        x_coef = 1 - g2 * h / (2 * t)
        v_coef = -h * (1 + g2 * (1 - t) / (2 * t))
        std = (g2 * h).sqrt()
    else:
        if kind == "ancestral":
            std = noise * t_next * (1 - (t_next * (1 - t) / (t * (1 - t_next))).square()).clamp(min=0).sqrt()
        elif kind == "cps":
            std = t_next * math.sin(math.pi * noise / 2)
        else:
            raise ConfigError(f"unknown sampler '{kind}' (known: ode, {', '.join(DEFAULT_NOISE)})")
        kept = (t_next.square() - std.square()).clamp(min=0).sqrt()  # of the predicted noise
        # (1 - t') data + kept noise with data = x - t v, noise = x + (1 - t) v
        x_coef = (1 - t_next) + kept
        v_coef = kept * (1 - t) - t * (1 - t_next)
    return Transitions(*(values.float() for values in (t, h, x_coef, v_coef, std)))


def per_sample(values: Tensor) -> Tensor:
    """Take the mean over everything but the rows, (B, ...) -> (B,)."""
    return values.flatten(1).mean(dim=1)


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Compute the normal log-density (B,), averaged over D, in float32. std: (B, 1, 1, 1)."""
    squared = ((x_next.float() - mean) / std).square()
    return per_sample(-squared / 2) - std.log().flatten() - math.log(2 * math.pi) / 2


class Window(NamedTuple):
    """The random steps of one rollout."""

    first: int
    stop: int  # one past the last


class Schedule:
    """The steps of a rollout: the ODE's, and inside the window the SDE's."""

    def __init__(self, times: Tensor, sde: SDEConfig, window: WindowConfig | None) -> None:
        """times: (N + 1,); window None: the ODE alone. ConfigError if the steps that carry noise are too few for it."""
        self.sde, self.ode = transitions(sde.kind, times, sde.level), transitions("ode", times)
        self.window = window
        if window is None:
            return
        noisy = (self.sde.std >= MIN_STD) & (times[1:] > 0)
        self.stop = min(window.stop or len(noisy), int(noisy.nonzero().max()) + 1 if noisy.any() else 0)
        if self.stop - window.start < window.size:
            raise ConfigError(
                f"window.size {window.size} does not fit: of {len(noisy)} steps '{sde.kind}' can train "
                f"{max(self.stop - window.start, 0)} from step {window.start} on; use a smaller window or more steps"
            )

    @property
    def num(self) -> int:
        return len(self.ode.t)

    def trained(self) -> range:
        """Return all steps that some rollout trains."""
        assert self.window is not None, "without a window there are no transitions to train"
        stop = self.window.start + self.window.size if self.window.kind == "fixed" else self.stop
        return range(self.window.start, stop)

    def window_of(self, seed: int, rollout: int) -> Window:
        """Return the window of rollout 0, 1, ..., a pure function of seed and rollout."""
        if self.window is None:
            return Window(0, 0)
        places = self.stop - self.window.start - self.window.size + 1
        if self.window.kind == "fixed":
            offset = 0
        elif self.window.kind == "random":
            offset = seed_of(seed, "window", rollout) % places
        else:
            offset = rollout // self.window.every % places
        first = self.window.start + offset
        return Window(first, first + self.window.size)

    def by_step(self, name: str, values: Tensor, step: Tensor) -> dict[str, Tensor]:
        """Sum and count values (R,) of rows for every step of the sampler, to be logged as their mean."""
        return mean_by(f"{name}/step", values, step, self.num)
