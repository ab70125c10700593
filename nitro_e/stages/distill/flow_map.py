"""Flow maps: the student learns to jump along the teacher's path, x_r = x_t - (t - r) u(x_t, t, r).

u is the average of the teacher's guided velocity v over the path from t down to r. By its definition

    u = v - (t - r) (du/dt along the path) = v - (t - r) (J_x u . v + du/dt),

whose right side is the target (MeanFlow, arXiv 2505.13447; with r = 0 the continuous consistency models of sCM, arXiv
2410.11081). The total derivative is one forward-mode pass. `discrete` needs none: the data predicted from x_t is that
predicted after one short step of the teacher (consistency distillation, arXiv 2303.01469).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.forward_ad import make_dual, unpack_dual

from nitro_e.config import Config, ConfigError, Ge, Gt, Le
from nitro_e.interfaces import Phase, TextEmbedding
from nitro_e.model.transforms import OneProductPerTangent
from nitro_e.randomness import SampleRandom
from nitro_e.sampling import flow
from nitro_e.sampling.flow import TimestepConfig, expand, training_times
from nitro_e.stages.distill.inputs import DistillBatch, Prediction
from nitro_e.stages.distill.objective import Balance, Shared, per_sample


@dataclass(frozen=True, kw_only=True)
class FlowMapConfig(Config):
    weight: Annotated[float, Gt(0), "to switch the objective off: flow_map: null"] = 1.0  # of this objective
    kind: Literal["continuous", "discrete"] = (
        "continuous"  # with the derivative along the path, or a short step
    )
    guidance_scale: Annotated[float, Ge(0)] = 4.5  # of the teacher
    step: Annotated[float, Gt(0), Le(1)] = 1 / 48  # of discrete, in t
    # at stored images, noised to times of this law, by a pass of the student of its own; null: at the student's inputs
    times: TimestepConfig | None = None
    # of continuous; tangent: the error e becomes e / (rms e + constant) (sCM); adaptive: the squared error is divided by
    # (itself + constant), without a gradient (MeanFlow)
    normalize: Literal["tangent", "adaptive", "none"] = "tangent"
    constant: Annotated[float, Gt(0)] = 0.1  # of normalize: smaller ones make small errors count more
    warmup: Annotated[int, Ge(0)] = 0  # steps over which the derivative's part rises from 0 to 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "discrete" and self.warmup:
            raise ConfigError("warmup: only for kind 'continuous', which has a derivative; leave it out")


class FlowMap:
    """Regression of the student's average velocity to what follows from the teacher and the student itself."""

    name = "flow_map"
    phases: tuple[Phase, ...] = ()
    balance: Balance | None = None

    def __init__(self, config: FlowMapConfig, shared: Shared) -> None:
        self.config, self.shared = config, shared
        self.direct = config.times is not None

    def weight(self, step: int) -> float:
        return self.config.weight

    def loss(
        self, prediction: Prediction, batch: DistillBatch, rng: SampleRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        if config.times is not None:
            prediction = self.at_images(config.times, batch, rng)
        x, t = prediction.x, prediction.t
        teacher = self.shared.guided(x, t, batch.text, config.guidance_scale)
        if config.kind == "discrete":
            return per_sample((prediction.data - self.after_a_step(x, t, teacher, batch.text)).square()), {}
        velocity = (x - prediction.data) / expand(t, x)
        elapsed = t if prediction.end is None else t - prediction.end
        derivative = self.derivative(prediction, teacher, batch.text)
        share = min(1.0, (batch.step + 1) / config.warmup) if config.warmup else 1.0
        error = velocity.detach() - (teacher - share * expand(elapsed, x) * derivative)
        size = per_sample(error.square())
        logs = {"error": size.mean(), "derivative": per_sample(derivative.square()).mean()}
        if config.normalize == "tangent":
            error = error / expand(size.sqrt() + config.constant, x)
        values = per_sample((velocity - (velocity.detach() - error)).square())
        if config.normalize == "adaptive":
            values = values / (size + config.constant)
        return values, logs

    def at_images(self, times: TimestepConfig, batch: DistillBatch, rng: SampleRandom) -> Prediction:
        """Run the student at stored images mixed with new noise."""
        data = batch.stored_latents
        t = training_times(times, rng.normal()).to(data.device).clamp(min=1e-3)  # (B,)
        x = flow.interpolate(data, rng.normal(*data.shape[1:]), t)
        return Prediction(x, t, True, flow.to_data(x, t, self.shared.student(x, t, batch.text)))

    @torch.no_grad()
    def after_a_step(self, x: Tensor, t: Tensor, teacher: Tensor, text: TextEmbedding) -> Tensor:
        """Return the student's own data after one Euler step of the teacher, (B, C, h, w)."""
        later = (t - self.config.step).clamp(min=0)
        x = x - expand(t - later, x) * teacher
        data = flow.to_data(x, later, self.shared.bare(x, later, text))
        torch.clear_autocast_cache()  # it holds weights cast without a graph
        return data

    @torch.no_grad()
    def derivative(self, prediction: Prediction, teacher: Tensor, text: TextEmbedding) -> Tensor:
        """Differentiate the student's velocity in t along the teacher's path, in float32, (B, C, h, w)."""
        times = prediction.times
        direction = torch.ones_like(times)
        if prediction.end is not None:
            direction[:, 1] = 0
        exact = torch.autocast(times.device.type, enabled=False)
        with exact, forward_ad.dual_level(), OneProductPerTangent():
            x, times = make_dual(prediction.x, teacher), make_dual(times, direction)
            return unpack_dual(self.shared.bare(x, times, text)).tangent
