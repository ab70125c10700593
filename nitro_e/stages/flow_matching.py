"""Stages 1 and 2: rectified-flow training, with REPA (pretraining) or without (fine-tuning). One class for both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Fraction, Ge
from nitro_e.data import Data, Records
from nitro_e.encoders.components import build_vision_encoder, compile_encoders, vision_width
from nitro_e.interfaces import Batch, LatentCodec, Model, Phase, Stage, TextEncoder, VisionEncoder
from nitro_e.randomness import SampleRandom, seeded
from nitro_e.sampling import flow
from nitro_e.sampling.flow import TimestepConfig, WeightConfig
from nitro_e.sampling.samplers import SamplingConfig
from nitro_e.stages.assembly import (
    Parts,
    Run,
    StageKind,
    data_summary,
    first_records,
    open_run_data,
    split_of_data,
)
from nitro_e.stages.batches import batches_ahead, encode, null_prompt
from nitro_e.stages.repa import ProjectedModel, RepaConfig, alignment_loss
from nitro_e.training.meters import mean_by
from nitro_e.training.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class ModelGuidanceConfig(Config):
    """Training of a model that needs no guidance when sampling (arXiv 2502.12154)."""

    scale: Annotated[float, Ge(1)] = 3.0  # of the guidance that it learns
    start: Fraction = 0.1  # share of all steps before the first one with it

    @property
    def weight(self) -> float:
        """Return the weight of the difference that is added to the target; its fixed point is v_0 + scale (v - v_0)."""
        return 1 - 1 / self.scale


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig(Config):
    kind: Literal["flow_matching"] = "flow_matching"  # stages 1 and 2
    caption_dropout: Fraction = 0.1  # share of captions replaced by "", for classifier-free guidance
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    weighting: WeightConfig = field(default_factory=WeightConfig)
    repa: RepaConfig | None = None
    guidance: ModelGuidanceConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)


def by_time(values: Tensor, t: Tensor, bins: int = 4) -> dict[str, Tensor]:
    """Average per-sample values (B,) in equal bins of t: `loss_t0` is nearest to data."""
    return mean_by("loss_t", values, (t * bins).long().clamp(max=bins - 1), bins)


class FlowMatching:
    """Trains the model on batches of captioned latents, in one phase."""

    def __init__(
        self,
        config: FlowMatchingConfig,
        model: Model,
        data: Data,
        codec: LatentCodec,
        text: TextEncoder,
        vision: VisionEncoder | None,
        seed: int,
        device: torch.device,
        forward_flops: float,
        steps: int = 1,
    ) -> None:
        """steps: of the whole run, of which some settings are shares."""
        self.steps = steps
        self.config, self.model, self.data = config, model, data
        self.codec, self.text, self.vision, self.device = codec, text, vision, device
        self.name = "pretrain" if config.repa else "flow_matching"
        self.batch_size = data.config.batch_size
        self.forward_flops = forward_flops
        self.fingerprint = data.fingerprint()
        self.null_text = null_prompt(data, text, device)
        with seeded(seed, "projector"):
            self.projected = ProjectedModel(model, config.repa, vision.width if vision else 0).to(device)
        self.phases = (Phase("model", self.projected, self.loss, config.optim),)
        self.aligned_steps = config.repa.stop * steps if config.repa else 0

    @property
    def bad_samples(self) -> int:
        return len(self.data.bad)

    def export(self, model: nn.Module) -> nn.Module:
        return model

    def batches(self, step: int, rank: int, world: int, accumulate: int) -> Iterator[Batch]:
        """Yield endless micro-batches from optimiser step `step` on."""
        grid = self.model.config.latent_grid

        def make(records: Records, step: int) -> Batch:
            vision = self.vision if step < self.aligned_steps else None
            batch = encode(records, self.codec, self.text, self.device, vision, grid)
            batch.step = step
            return batch

        return batches_ahead(
            self.data, make, self.device, step=step, rank=rank, world=world, accumulate=accumulate
        )

    def loss(self, net: nn.Module, batch: Batch, rng: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean (weighted) squared velocity error, plus the REPA term."""
        noise = rng.normal(*batch.latents.shape[1:])  # (B, C, h, w)
        t = flow.training_times(self.config.timesteps, rng.normal())  # (B,)
        captioned = rng.uniform() >= self.config.caption_dropout
        text = batch.text.where(captioned, self.null_text)
        repa = self.config.repa if batch.step < self.aligned_steps else None
        if repa is None:
            self.projected.retire_projectors()
        # models without path_drop know no rows to drop
        path_drop = getattr(self.model.config, "path_drop", 0)
        rows = {"drop": rng.uniform() < path_drop} if path_drop else {}
        x = flow.interpolate(batch.latents, noise, t)
        velocity, projected = net(x, t, text, repa is not None, **rows)
        target = self.model.velocity_target(flow.velocity_target(batch.latents, noise), t)
        guidance = self.config.guidance
        if guidance is not None and batch.step >= guidance.start * self.steps:
            guided = captioned & ~rows["drop"] if rows else captioned
            target = target + guidance.weight * self.led_away(net, x, t, velocity, guided)
        error = velocity.float() - target  # (B, C, h, w)
        squared = error.square().flatten(1).mean(dim=1)  # (B,)
        logs = by_time(squared, t)
        weighted = squared.mean()
        if self.config.weighting.kind != "uniform":
            weighted = (flow.loss_weight(self.config.weighting, t) * squared).mean()
            logs["velocity_loss"] = squared.mean()
        if repa is None:
            return weighted, logs
        assert batch.features is not None
        alignment = alignment_loss(projected, batch.features, repa)
        logs |= {"velocity_loss": squared.mean(), "repa_loss": alignment}
        return weighted + repa.weight * alignment, logs

    @torch.no_grad()
    def led_away(self, net: nn.Module, x: Tensor, t: Tensor, velocity: Tensor, rows: Tensor) -> Tensor:
        """Return how far the prediction is from that of the null prompt (B, C, h, w), a constant; zero in other rows."""
        # after the pass with gradients, whose cast weights autocast keeps
        unconditional = net(x, t, self.null_text.expand(len(x)), False)[0]
        return torch.where(flow.expand(rows, x), velocity.float() - unconditional.float(), 0.0)


# ---- from a recipe


def check(config: Run[FlowMatchingConfig]) -> None:
    repa, model = config.stage.repa, config.model
    if repa is None and config.components.vision is not None:
        raise ConfigError(
            "components.vision and stage.repa belong together: nothing reads the vision encoder; set "
            "components.vision: null"
        )
    if repa is not None and config.components.vision is None:
        raise ConfigError(
            "components.vision and stage.repa belong together: REPA needs a vision encoder; set components.vision or "
            "stage.repa: null"
        )
    full = [tap for tap in range(1, model.depth + 1) if model.feature_maps(tap) == (1,)]
    other = [] if repa is None else [tap for tap in repa.taps if tap not in full]
    if other:
        raise ConfigError(
            f"stage.repa.taps: {other[0]} is not a block count whose tokens are the full grid; "
            f"choose from {', '.join(map(str, full))}"
        )


def training_flops(config: Run[FlowMatchingConfig], forward: float, tokens: int) -> float:
    """Count the FLOPs of forward and backward, twice a forward, of the model and of REPA's projector, for one sample."""
    if config.stage.repa is not None and config.components.vision is not None:
        vision = config.components.vision
        width = vision_width(vision) or build_vision_encoder(vision).width
        with torch.device("meta"):
            trained = ProjectedModel(config.model.build_empty(), config.stage.repa, width)
        # 2 per multiply-add of every weight at every token, while there is REPA
        forward += config.stage.repa.stop * sum(
            2 * tokens * module.weight.numel()
            for name, module in trained.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith("model.")
        )
    return 3 * forward * passes(config.stage)


def build(config: Run[FlowMatchingConfig], parts: Parts) -> tuple[Stage, Sequence[str]]:
    data, vision = open_run_data(config, parts), None
    if config.components.vision is not None:
        vision = build_vision_encoder(config.components.vision, parts.device)
        if config.engine.compile_encoders:
            compile_encoders(vision)
    stage = FlowMatching(
        config.stage,
        parts.model,
        data,
        parts.codec,
        parts.text,
        vision,
        config.seed,
        parts.device,
        parts.flops * passes(config.stage),
        config.engine.steps,
    )
    return stage, config.prompts or first_records(data).prompts[:8]


def passes(stage: FlowMatchingConfig) -> float:
    """Count a step's arithmetic in steps without model guidance, which adds a forward pass to one and its backward."""
    return 1 if stage.guidance is None else 1 + (1 - stage.guidance.start) / 3


def summary(config: Run[FlowMatchingConfig], data: Data | None, world: int, flops: float) -> list[str]:
    return data_summary(config, data, world, flops * passes(config.stage))


def sampling(config: Run[FlowMatchingConfig]) -> SamplingConfig:
    """Return the recipe's settings, without guidance where the model has learned it."""
    return config.sampling if config.stage.guidance is None else replace(config.sampling, guidance_scale=1.0)


KIND = StageKind(check, split_of_data, build, summary, open_run_data, sampling, training_flops=training_flops)
