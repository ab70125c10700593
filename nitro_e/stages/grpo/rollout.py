"""Drawing of images for training, with the sampler's states inside the window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from nitro_e.config import Config, ConfigError, Ge, Gt, Le
from nitro_e.data.prompts import Prompt
from nitro_e.interfaces import TextEmbedding
from nitro_e.sampling.flow import TimeGrid, time_grid
from nitro_e.sampling.samplers import SAMPLERS, Velocity
from nitro_e.stages.grpo.sde import Schedule, SDEConfig, Window, WindowConfig, log_prob


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Config):
    RENAMED: ClassVar[dict[str, str]] = {"batch_size": "per_device"}

    steps: Annotated[int, Ge(1), Le(10_000)] = 10  # of the sampler; fewer than for images that people see
    grid: TimeGrid = "released"  # time grid of the sampler
    shift: Annotated[float, Gt(0)] = 1.0  # above 1: more steps at high noise
    guidance_scale: Annotated[float, Ge(0)] = 4.5  # in the rollout and in the update; 0 or 1: none
    sde: SDEConfig = field(default_factory=SDEConfig)  # the stochastic sampler of trained steps
    window: WindowConfig = field(default_factory=WindowConfig)
    # of rollouts without a window (nft, awm): heun takes two passes per step
    solver: Literal["euler", "heun"] = "euler"
    shared_noise: bool = False  # one first noise per group; the SDE alone makes its images differ
    # one trajectory per group up to the window, where its images part (TempFlow-GRPO, arXiv 2508.04324): less to draw, but
    # images that are more alike
    branch: bool = False
    per_device: Annotated[int, Ge(1), Le(65536)] = 64  # images that a process draws, and decodes, at a time
    decode_dtype: Literal["float32", "bfloat16"] = (
        "float32"  # the codec's arithmetic for images that are scored
    )

    def schedule(self, window: WindowConfig | None) -> Schedule:
        """Build the schedule of these steps, random inside the window; None: the ODE alone."""
        if window is None and self.branch:
            raise ConfigError(
                "rollout.branch: images part in the window, which this algorithm has not; set it to false"
            )
        if window is None and self.shared_noise:
            raise ConfigError(
                "rollout.shared_noise: images of one noise differ by the window's alone, which this algorithm has not; set "
                "it to false"
            )
        if window is not None and self.branch and window.kind == "fixed" and window.start == 0:
            raise ConfigError(
                "rollout.branch: the window begins with the first step, so there is nothing to share; set window.start, "
                "or window.kind to random"
            )
        if window is not None and self.solver != "euler":
            raise ConfigError(
                f"rollout.solver '{self.solver}': steps around a window are Euler steps; use euler"
            )
        return Schedule(time_grid(self.steps, self.grid, self.shift), self.sde, window)

    def passes(self, group_size: int, schedule: Schedule) -> float:
        """Count the passes of the model that drawing an image takes, on average; of guided ones, each is a pair."""
        if self.solver == "heun":
            return 2 * self.steps - 1
        if not self.branch or schedule.window is None:
            return self.steps
        # the mean first step of the window
        steps = schedule.trained()
        shared = (steps.start + steps.stop - self.window.size) / 2
        return shared / group_size + self.steps - shared


class Trajectory(NamedTuple):
    """The latents of B drawn images, and their states and log-probabilities inside a window of n steps."""

    states: Tensor  # (n + 1, B, C, h, w) float32: x before the window's first step ... after its last
    log_probs: Tensor  # (n, B) of its transitions, as drawn
    latents: Tensor  # (B, C, h, w) float32, final

    def clear(self) -> Tensor:
        """Set images that are not finite to 0, in place; (B,) 1 for the others, 0 for them."""
        finite = self.latents.isfinite().flatten(1).all(dim=1)
        self.states[:, ~finite], self.log_probs[:, ~finite], self.latents[~finite] = 0, 0, 0
        return finite.float()


@torch.no_grad()
def sample_trajectory(
    velocity: Velocity,
    x: Tensor,
    schedule: Schedule,
    window: Window,
    normal: Callable[..., Tensor],
    first: int = 0,
) -> Trajectory:
    """Follow the schedule from x (B, C, h, w), noise or the state before step `first`: SDE steps in the window, else ODE.

    velocity(x, t (B,)) -> (B, C, h, w); normal(C, h, w) -> (B, C, h, w), fresh at every call.
    """
    sde, ode = schedule.sde.to(x.device), schedule.ode.to(x.device)
    states, log_probs = [], []
    for step in range(first, schedule.num):
        index = torch.full((len(x),), step, device=x.device)
        random = window.first <= step < window.stop
        table = (sde if random else ode).at(index)
        mean = table.mean(x, velocity(x, table.t))
        if random:
            states.append(x)
            x = mean + table.std * normal(*x.shape[1:])
            log_probs.append(log_prob(x, mean, table.std))
            if step + 1 == window.stop:
                states.append(x)
        else:
            x = mean
    empty = x.new_empty(0, len(x))
    return Trajectory(
        torch.stack(states) if states else x.new_empty(0, *x.shape),
        torch.stack(log_probs) if log_probs else empty,
        x,
    )


@torch.no_grad()
def shared_prefix(velocity: Velocity, x: Tensor, schedule: Schedule, window: Window) -> Tensor:
    """Follow the ODE from noise x (g, C, h, w), one of each group, to the states before the window's first step."""
    ode = schedule.ode.to(x.device)
    for step in range(window.first):
        table = ode.at(torch.full((len(x),), step, device=x.device))
        x = table.mean(x, velocity(x, table.t))
    return x


@torch.no_grad()
def solve_ode(velocity: Velocity, x: Tensor, schedule: Schedule, solver: str) -> Trajectory:
    """Follow the ODE from noise x (B, C, h, w) with a solver of the samplers; nothing on the way is kept."""
    ode = schedule.ode
    times = torch.cat([ode.t, ode.t[-1:] - ode.h[-1:]]).to(x.device)
    empty = x.new_empty(0, len(x))
    return Trajectory(x.new_empty(0, *x.shape), empty, SAMPLERS[solver](velocity, x, times))


@dataclass
class Experience:
    """The S images of g prompts that one process drew in one rollout."""

    trajectory: Trajectory
    window: Window
    text: TextEmbedding  # (g, L, D)
    group: Tensor  # (S,) row of `text`
    advantages: Tensor  # (S,) float32
    gate: Tensor  # (S,) 1 where the KL penalty acts, else 0
    finite: Tensor  # (S,) 1, or 0 for images that are not finite
    asked: list[Prompt]  # (S,)
    noise: Callable[[], Tensor]  # (S, T, C, h, w) of every row, drawn at the first call
    keys: list[str]  # (S,) for reports


@dataclass
class Rows:
    """A micro-batch: R pairs of an image and a step of the sampler."""

    step: Tensor  # (R,) long
    advantage: Tensor  # (R,)
    prompts: TextEmbedding  # (g, L, D) of the process's groups ...
    group: Tensor  # (R,) ... and which of them
    keys: list[str]
    latents: Tensor  # (R, C, h, w), final
    # the transition as it was drawn; without rows if the rollout has no window
    x: Tensor  # (R, C, h, w): where it starts
    x_next: Tensor  # (R, C, h, w): where it ended
    log_prob: Tensor  # (R,)
    gate: Tensor  # (R,) 1 where the KL penalty acts, else 0
    finite: Tensor  # (R,) 1, or 0 for images that are not finite, of which nothing is learned
    asked: list[Prompt]  # (R,)
    noise: Callable[[], Tensor]  # (R, C, h, w): of the row's own, the same at every call
    # (R, C, h, w): velocity before the rollout's first update; None: this is the first
    old: Tensor | None = None
    stats: dict[str, Tensor] = field(default_factory=dict)  # of the rollout, with its first micro-batch

    @property
    def text(self) -> TextEmbedding:
        """The rows' text (R, L, D), gathered only when it is needed: long texts take far more memory than all else."""
        return self.prompts.take(self.group)
