"""Samplers: functions of a velocity field, a start and a falling time grid. Guidance is a wrapper around the model.

`sample` puts them together: settings, embedded prompts and noise to latents.

A velocity field here is `velocity(x, t) -> Tensor` with x (B, C, h, w) and t (B,); `guide` makes one of a Denoiser.
States are float32 whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from nitro_e.config import Config, ConfigError, Ge, Gt, Le, from_dict, to_dict
from nitro_e.interfaces import Denoiser, TextEmbedding
from nitro_e.randomness import seed_of
from nitro_e.sampling import flow
from nitro_e.sampling.flow import TimeGrid, time_grid
from nitro_e.sampling.policy import Policy, all_data

Velocity = Callable[[Tensor, Tensor], Tensor]
Time = Annotated[float, Ge(0), Le(1)]  # 0 is data, 1 is noise
GuidanceKind = Literal["text", "path", "both"]
Rescale = Literal["none", "zero_star"]
# called after every step with its number, the state x and x's time; returns x or what to go on with
AfterStep = Callable[[int, Tensor, Tensor], Tensor]
# older recipes and weights name multistep consistency sampling so
SAMPLER_ALIASES = {"sampler": {"renoise": "multistep"}}


def keep(step: int, x: Tensor, t: Tensor) -> Tensor:
    """Go on with the state as it is: the `AfterStep` that does nothing."""
    return x


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """Holds the settings of a sampler; they are stored with the weights, and every value can be overridden when sampling."""

    ALIASES: ClassVar[Mapping[str, Mapping[str, str]]] = SAMPLER_ALIASES

    resolution: Annotated[int, Ge(1), Le(65536)] = 512  # pixels per side
    height: Annotated[int, Ge(1), Le(65536)] | None = None  # pixels; None: resolution
    width: Annotated[int, Ge(1), Le(65536)] | None = None  # pixels; null: resolution
    steps: Annotated[int, Ge(1), Le(10_000)] = 20  # of the sampler
    guidance_scale: Annotated[float, Ge(0)] = 4.5  # 0 or 1: no guidance
    # guide only while low <= t <= high, 1 = noise (arXiv 2404.07724); null: always
    guidance_interval: tuple[Time, Time] | None = None
    # what guidance leads away from. text: the negative prompt; path: the prompt without the compressed blocks, for
    # weights trained with model.path_drop; both: the negative prompt without them
    guidance: GuidanceKind = "text"
    # zero_star: the other velocity scaled to fit, and none at t = 1 (CFG-Zero*, arXiv 2503.18886)
    guidance_rescale: Rescale = "none"
    # for distilled weights: multistep, consistency sampling; flow_map: average velocities between the times (MeanFlow);
    # policy: the path that a widened student predicts for each step (pi-Flow)
    sampler: Literal["euler", "heun", "multistep", "flow_map", "policy"] = "euler"
    grid: TimeGrid = "released"  # times of the steps: the released sampler's, or equal distances
    shift: Annotated[float, Gt(0)] = 1.0  # > 1 spends more steps at high noise
    # distilled weights: one tuple of falling times per trained step count, without the final 0; they replace grid and shift
    sigmas: tuple[tuple[float, ...], ...] = ()
    time_scale: Annotated[float, Gt(0)] = 1.0  # the model's input is time_scale * t
    force: bool = False  # sample distilled weights in step counts they were not trained for

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_interval is not None and self.guidance_interval[0] > self.guidance_interval[1]:
            raise ConfigError(
                f"guidance_interval: the first time is above the second: {list(self.guidance_interval)}"
            )
        if self.guidance_rescale == "zero_star" and self.guidance_scale not in (0, 1):
            self._check_zero_star()
        for times in self.sigmas:
            check_sigmas(times)
        counts = [len(times) for times in self.sigmas]
        if len(set(counts)) != len(counts):
            raise ConfigError(f"sigmas: two lists have the same number of steps ({counts})")
        if self.sigmas and self.steps not in counts and not self.force:
            raise ConfigError(
                f"these weights were distilled for {' or '.join(map(str, sorted(counts)))} steps, not {self.steps}; "
                "choose one of those, or insist with --force (force: true)"
            )

    def _check_zero_star(self) -> None:
        """Refuse to stand still at t = 1 where a step cannot, or where there is no other step."""
        if self.sampler in ("multistep", "policy"):
            raise ConfigError(
                f"guidance_rescale 'zero_star' stands still at t = 1, and steps of sampler '{self.sampler}' cannot; leave "
                "it out"
            )
        if self.steps == 1 and (self.guidance_interval is None or self.guidance_interval[1] == 1):
            raise ConfigError(
                "guidance_rescale 'zero_star' stands still at t = 1, and 1 step would return the noise; raise steps, or "
                "leave it out"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Return the image's (height, width) in pixels."""
        return self.height or self.resolution, self.width or self.resolution

    def in_words(self) -> str:
        """Say the settings in one line: "20 steps of euler, guidance 4.5, 512x512 px"."""
        steps = f"{self.steps} step" + "s" * (self.steps != 1)
        guided = self.guidance_scale not in (0, 1)
        guidance = f"guidance {self.guidance_scale:g}{self.guidance_in_words()}" if guided else "no guidance"
        return f"{steps} of {self.sampler}, {guidance}, {self.size[0]}x{self.size[1]} px"

    def guidance_in_words(self) -> str:
        """Say what is unusual about the guidance: " by path drop", or nothing."""
        words = {"text": "", "path": " by path drop", "both": " by text and path drop"}[self.guidance]
        if self.guidance_rescale == "zero_star":
            words += " (CFG-Zero*)"
        if self.guidance_interval is not None:
            words += " from t = {:g} to {:g}".format(*self.guidance_interval)
        return words

    def times(self) -> Tensor:
        """Return the (steps + 1,) falling times, the last one 0."""
        for times in self.sigmas:
            if len(times) == self.steps:
                return torch.tensor([*times, 0.0])
        return time_grid(self.steps, "linear" if self.sigmas else self.grid, self.shift)


def with_overrides(defaults: SamplingConfig, overrides: Mapping[str, Any]) -> SamplingConfig:
    """Replace those fields of the weights' own settings that are given (not None); ConfigError for wrong ones."""
    given = {name: value for name, value in overrides.items() if value is not None}
    settings = from_dict(SamplingConfig, {**to_dict(defaults), **given}, "sampling")
    if defaults.sigmas and settings.sampler != defaults.sampler and not settings.force:
        raise ConfigError(
            f"these weights were distilled for sampler '{defaults.sampler}', not '{settings.sampler}'; leave it out, "
            "or insist with --force (force: true)"
        )
    return settings


def check_sigmas(times: Sequence[float]) -> None:
    """Refuse times that are not falling within (0, 1]."""
    if not times or not 1 >= times[0] or not times[-1] > 0 or any(a <= b for a, b in zip(times, times[1:])):
        raise ConfigError(f"sigmas must be falling times between 1 and 0 (without the 0), got {list(times)}")


def sample(
    model: Denoiser,
    text: TextEmbedding,
    negative: TextEmbedding,
    settings: SamplingConfig,
    x: Tensor,
    fresh: Callable[[int], Tensor],
    times: Tensor | None = None,
    after_step: AfterStep = keep,
) -> Tensor:
    """Sample latents from x (B, C, h, w), which is noise unless `times` begins later, on x's device.

    text: B rows; negative: B rows or one; fresh(step): more noise like x, for samplers that draw it; times: falling,
    those of the settings by default; after_step: see `AfterStep`.
    """
    field = guide(
        scale_time(model, settings.time_scale),
        text,
        negative,
        settings.guidance_scale,
        settings.guidance_interval,
        settings.guidance,
        settings.guidance_rescale,
    )

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        found = field(x, t)
        if (found.ndim > x.ndim) != (settings.sampler == "policy"):
            raise ConfigError(
                f"sampler '{settings.sampler}': these weights predict {'several velocities' if found.ndim > x.ndim else 'one velocity'} "
                "per step; weights with model.policy above 1 need sampler: policy, and others do not have it"
            )
        return found

    times = (settings.times() if times is None else times).to(x.device)
    if settings.sampler == "multistep":
        return multistep(velocity, x, times, fresh, after_step)
    return SAMPLERS[settings.sampler](velocity, x, times, after_step)


def scale_time(model: Denoiser, scale: float) -> Denoiser:
    """Wrap a model so that its input is `scale * t`: with scale < 1 NitroFusion's timestep shift (arXiv 2412.02030)."""
    return model if scale == 1 else ScaledTime(model, scale)


class ScaledTime(NamedTuple):
    """Calls a model with `scale * t`."""

    model: Denoiser
    scale: float

    def __call__(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        return self.model(x, self.scale * t, text)

    def weak(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """Compute the model's weak pass."""
        return weak_pass(self.model)(x, self.scale * t, text)


def weak_pass(model: Denoiser) -> Denoiser:
    """Return the pass of a model that guidance 'path' and 'both' lead away from; ConfigError if it has none."""
    if not hasattr(model, "weak"):
        raise ConfigError(
            f"guidance 'path' and 'both': {type(model).__name__} has no weak pass; use guidance: text"
        )
    return model.weak


class Guided(NamedTuple):
    velocity: Tensor  # (B, C, h, w) float32
    unconditional: Tensor | None  # the same, of the negative prompt; None without guidance


def guided_velocity(
    model: Denoiser,
    x: Tensor,
    t: Tensor,
    text: TextEmbedding,
    negative: TextEmbedding,
    scale: float | Tensor,
    gradient: Literal["both", "cond"] = "both",
    bare: Denoiser | None = None,
    kind: GuidanceKind = "text",
    rescale: Rescale = "none",
) -> Guided:
    """Classifier-free guidance (arXiv 2207.12598): negative + scale * (text - negative).

    text: B rows, negative: B rows or one. Scales 0 and 1 mean no guidance: the text alone, one pass. A tensor (B,) gives
    every row a scale of its own, which is taken literally.
    gradient: through both passes, or through the one with text alone, which halves the memory; `bare`, the model
    without DDP around it, then computes the other.
    kind: `path` takes the weak pass of the text for the other velocity, `both` that of the negative prompt (path-drop
    guidance, arXiv 2510.21986). rescale: see `fitted`.
    """
    if isinstance(scale, Tensor):
        scale = flow.expand(scale, x)
    elif scale in (0, 1):
        return Guided(model(x, t, text).float(), None)
    negative = negative.expand(len(x))
    if kind != "text":
        with_text = model(x, t, text).float()
        without = weak_pass(bare or model)(x, t, text if kind == "path" else negative).float()
    elif gradient == "both":
        both = negative.cat(text)
        without, with_text = model(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
    else:
        # Text pass first: autocast caches the cast weights of the first pass, which must be the one with gradients.
        with_text = model(x, t, text).float()
        with torch.no_grad():
            without = (bare or model)(x, t, negative).float()
    if rescale == "zero_star":
        without = fitted(without, with_text)
    return Guided(torch.lerp(without, with_text, scale), without)


def fitted(other: Tensor, velocity: Tensor) -> Tensor:
    """Scale `other` so that it comes nearest to `velocity`, row by row (CFG-Zero*, arXiv 2503.18886, eq. 9)."""
    products = (velocity * other).flatten(1).sum(1), other.square().flatten(1).sum(1)
    return flow.expand(products[0] / products[1].clamp(min=torch.finfo(other.dtype).tiny), other) * other


def guide(
    model: Denoiser,
    text: TextEmbedding,
    negative: TextEmbedding,
    scale: float,
    interval: tuple[float, float] | None = None,
    kind: GuidanceKind = "text",
    rescale: Rescale = "none",
) -> Velocity:
    """Make the guided velocity field of B prompts; see `guided_velocity`.

    interval: (low, high) of the times that are guided; at others the text alone is taken, one pass instead of two
    (arXiv 2404.07724). All rows of t must then be equal. None: all times.
    rescale: `zero_star` also stands still at t = 1, without a pass, where guidance is worst (CFG-Zero*).
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        time = t.flatten()[0]  # of flow maps t is (B, 2): the time, and where the jump ends
        guided = scale not in (0, 1) and (interval is None or interval[0] <= time <= interval[1])
        if guided and rescale == "zero_star" and time == 1:
            return torch.zeros_like(x)
        now = scale if guided else 1.0
        return guided_velocity(model, x, t, text, negative, now, kind=kind, rescale=rescale).velocity

    return velocity


def euler(velocity: Velocity, x: Tensor, times: Tensor, after_step: AfterStep = keep) -> Tensor:
    """Take first-order steps along `times` (falling, from 1 to 0)."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        x = x + (t_next - t) * velocity(x, t.expand(len(x)))
        x = after_step(step, x, t_next)
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor, after_step: AfterStep = keep) -> Tensor:
    """Take second-order steps (trapezoidal rule); the last, to t = 0 where no model was trained, is an Euler step."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        slope = velocity(x, t.expand(len(x)))
        guess = x + (t_next - t) * slope
        if t_next > 0:
            slope = (slope + velocity(guess, t_next.expand(len(x)))) / 2
        x = after_step(step, x + (t_next - t) * slope, t_next)
    return x


def multistep(
    velocity: Velocity, x: Tensor, times: Tensor, fresh: Callable[[int], Tensor], after_step: AfterStep = keep
) -> Tensor:
    """Predict the data, add fresh noise up to the next time, and repeat: multistep consistency sampling.

    arXiv 2303.01469, algorithm 1. fresh(step) -> noise like x.
    """
    for step, (t, t_next) in enumerate(pairwise(times)):
        t = t.expand(len(x))
        x = flow.to_data(x, t, velocity(x, t))
        if t_next > 0:
            x = flow.interpolate(x, fresh(step), t_next.expand(len(x)))
        x = after_step(step, x, t_next)
    return x


def flow_map(velocity: Velocity, x: Tensor, times: Tensor, after_step: AfterStep = keep) -> Tensor:
    """Jump from time to time with the average velocity between them; velocity(x, t) gets both times, t (B, 2)."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        both = torch.stack([t, t_next]).expand(len(x), 2)
        x = after_step(step, x + (t_next - t) * velocity(x, both), t_next)
    return x


def policy(velocity: Velocity, x: Tensor, times: Tensor, after_step: AfterStep = keep) -> Tensor:
    """Follow the path that a widened student predicts from each time to the next (pi-Flow, arXiv 2510.14974)."""
    for step, (t, t_next) in enumerate(pairwise(times)):
        t, after = t.expand(len(x)), t_next.expand(len(x))
        x = after_step(step, Policy(x, t, after, all_data(x, t, velocity(x, t))).state(after), t_next)
    return x


SAMPLERS = {
    "euler": euler,
    "heun": heun,
    "flow_map": flow_map,
    "policy": policy,
}  # the deterministic ones, of one signature


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal noise (len(seeds), *shape) on the CPU: each image depends on its own seed alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def fresh_noise(seeds: Sequence[int], like: Tensor) -> Callable[[int], Tensor]:
    """Make the source of noise for later steps, which depends on each image's own seed alone, too."""

    def fresh(step: int) -> Tensor:
        # the purpose keeps its first name: it decides the noise
        return initial_noise([seed_of(seed, "renoise", step) for seed in seeds], like.shape[1:]).to(like)

    return fresh
