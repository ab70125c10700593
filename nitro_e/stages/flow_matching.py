"""Stages 1 and 2: rectified-flow training, with REPA (pretraining) or without (fine-tuning). One class for both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Fraction, Ge, Gt, Le
from nitro_e.data import Data, Records
from nitro_e.encoders.components import build_vision_encoder, compile_encoders
from nitro_e.interfaces import (
    Batch,
    LatentCodec,
    Model,
    Phase,
    Stage,
    TextEmbedding,
    TextEncoder,
    VisionEncoder,
)
from nitro_e.randomness import SampleRandom, seeded
from nitro_e.sampling import flow
from nitro_e.sampling.flow import TimestepConfig
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
from nitro_e.training.meters import mean_by
from nitro_e.training.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class RepaConfig(Config):
    """Representation alignment (REPA, arXiv 2410.06940)."""

    weight: Annotated[float, Gt(0), "to switch REPA off: stage.repa: null"] = 0.5  # of the alignment loss
    tap: Annotated[int, Ge(1)] = 4  # image tokens after this many blocks
    width: Annotated[int, Ge(1), Le(65536)] = 2048  # hidden width of the projector


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig(Config):
    kind: Literal["flow_matching"] = "flow_matching"  # stages 1 and 2
    caption_dropout: Fraction = 0.1  # share of captions replaced by "", for classifier-free guidance
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    repa: RepaConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)


class ProjectedModel(nn.Module):
    """Holds the model and, for REPA, the projector that is trained with it and thrown away."""

    def __init__(self, model: Model, repa: RepaConfig | None, feature_width: int) -> None:
        """feature_width: of the vision encoder; without REPA it is not used."""
        super().__init__()
        self.model = model
        self.taps = [] if repa is None else [repa.tap]
        self.projector = None
        if repa is not None:
            self.projector = nn.Sequential(
                nn.Linear(model.config.width, repa.width),
                nn.SiLU(),
                nn.Linear(repa.width, repa.width),
                nn.SiLU(),
                nn.Linear(repa.width, feature_width),
            )

    def forward(self, x: Tensor, t: Tensor, text: TextEmbedding) -> tuple[Tensor, Tensor | None]:
        velocity, tokens = self.model.forward_intermediates(x, t, text, self.taps)
        return velocity, None if self.projector is None else self.projector(tokens[0])


def repa_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Return minus the mean cosine of projected tokens and frozen features, both (B, N, F) (arXiv 2410.06940, eq. 8)."""
    return -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean()


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
    ) -> None:
        self.config, self.model, self.data = config, model, data
        self.codec, self.text, self.vision, self.device = codec, text, vision, device
        self.name = "pretrain" if config.repa else "flow_matching"
        self.batch_size = data.config.batch_size
        self.forward_flops = forward_flops
        self.fingerprint = data.fingerprint()
        self.null_text = null_prompt(data, text, device)
        with seeded(seed, "projector"):
            module = ProjectedModel(model, config.repa, vision.width if vision else 0).to(device)
        self.phases = (Phase("model", module, self.loss, config.optim),)

    @property
    def bad_samples(self) -> int:
        return len(self.data.bad)

    def export(self, model: nn.Module) -> nn.Module:
        return model

    def batches(self, step: int, rank: int, world: int, accumulate: int) -> Iterator[Batch]:
        """Endless micro-batches from optimiser step `step` on."""
        vision, grid = self.vision if self.config.repa else None, self.model.config.latent_grid

        def make(records: Records, step: int) -> Batch:
            return encode(records, self.codec, self.text, self.device, vision, grid)

        return batches_ahead(
            self.data, make, self.device, step=step, rank=rank, world=world, accumulate=accumulate
        )

    def loss(self, net: nn.Module, batch: Batch, rng: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared velocity error, plus the weighted REPA term."""
        noise = rng.normal(*batch.latents.shape[1:])  # (B, C, h, w)
        t = flow.training_times(self.config.timesteps, rng.normal())  # (B,)
        text = batch.text.where(rng.uniform() >= self.config.caption_dropout, self.null_text)
        velocity, projected = net(flow.interpolate(batch.latents, noise, t), t, text)
        error = velocity.float() - flow.velocity_target(batch.latents, noise)  # (B, C, h, w)
        squared = error.square().flatten(1).mean(dim=1)  # (B,)
        logs = by_time(squared, t)
        repa = self.config.repa
        if repa is None:
            return squared.mean(), logs
        assert projected is not None and batch.features is not None
        alignment = repa_loss(projected, batch.features)
        logs |= {"velocity_loss": squared.mean(), "repa_loss": alignment}
        return squared.mean() + repa.weight * alignment, logs


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
    if repa is not None and repa.tap not in full:
        raise ConfigError(
            f"stage.repa.tap: {repa.tap} is not a block count whose tokens are the full grid; "
            f"choose one of {', '.join(map(str, full))}"
        )


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
        parts.flops,
    )
    return stage, config.prompts or first_records(data).prompts[:8]


KIND = StageKind(check, split_of_data, build, data_summary, open_run_data)
