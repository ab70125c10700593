"""Put stage 3 together from a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nitro_e.config import ConfigError
from nitro_e.data import Data
from nitro_e.data.prompts import load_prompts
from nitro_e.encoders.components import build_vision_encoder
from nitro_e.interfaces import Stage
from nitro_e.record import run_folder
from nitro_e.rewards import build_rewards
from nitro_e.stages.adapter import size_of
from nitro_e.stages.assembly import Parts, Run, StageKind, latent_shapes
from nitro_e.stages.grpo.groups import Layout
from nitro_e.stages.grpo.stage import GRPO, GRPOConfig
from nitro_e.training.batch import Split


def check(config: Run[GRPOConfig]) -> None:
    engine, updates = config.engine, config.stage.updates
    if config.batch.global_ is not None:
        raise ConfigError(
            f"batch.global {config.batch.global_}: stage.kind 'grpo' trains on the rows of its rollouts (stage.groups "
            "x group_size images); leave it out"
        )
    if config.components.vision is not None and not config.stage.advantage.diversity:
        raise ConfigError(
            "components.vision: stage.kind 'grpo' reads no vision encoder without stage.advantage.diversity; set "
            "components.vision: null"
        )
    if config.components.vision is None and config.stage.advantage.diversity:
        raise ConfigError(
            "stage.advantage.diversity compares images by features: set components.vision, or diversity: false"
        )
    for name in ("steps", "save_every"):
        if getattr(engine, name) % updates:
            raise ConfigError(
                f"engine.{name} {getattr(engine, name)} must be a multiple of stage.updates {updates}: the updates of "
                "a rollout belong together"
            )
    if engine.sharding != "ddp":
        raise ConfigError(f"engine.sharding '{engine.sharding}': stage.kind 'grpo' runs with ddp only")
    if engine.posthoc_ema is not None and config.stage.adapter is not None:
        raise ConfigError(
            "engine.posthoc_ema: averages of an adapter are left out; set it, or stage.adapter, to null"
        )


def split(config: Run[GRPOConfig], world: int) -> Split:
    """The split of an update's rows, images x trained steps, over `world` processes."""
    whole: Layout = config.stage.layout(world, 1)  # refuses images that the processes cannot share
    return config.batch.split(world, rows=whole.micro_batch * world)


def layout(config: Run[GRPOConfig], world: int) -> Layout:
    return config.stage.layout(world, split(config, world).accumulate)


def build(config: Run[GRPOConfig], parts: Parts) -> tuple[Stage, Sequence[str]]:
    stage, last = config.stage, run_folder.latest(config.folder)
    if last is not None and stage.adapter is not None and stage.adapter.init_from is not None:
        # a resume needs the first adapter no more: the checkpoint's has its rank, alpha and targets
        stage = replace(stage, adapter=replace(stage.adapter, init_from=str(last / "model" / "adapter")))
    pool, scorer = load_prompts(stage.prompts), build_rewards(stage.rewards, parts.device)
    scorer.check([prompt.info for prompt in pool])
    scorer.load()  # what is missing shows before training
    vision = config.components.vision
    grpo = GRPO(
        stage,
        parts.model,
        pool,
        scorer,
        parts.codec,
        parts.text,
        latent_shapes=latent_shapes(parts, stage.buckets),
        seed=config.seed,
        layout=layout(config, parts.world),
        device=parts.device,
        autocast=parts.autocast,
        forward_flops=parts.flops,
        vision=None if vision is None else build_vision_encoder(vision, parts.device),
    )
    return grpo, [prompt.text for prompt in pool[:8]]


def summary(config: Run[GRPOConfig], data: Data | None, world: int, flops: float) -> list[str]:
    stage, adapter = config.stage, config.stage.adapter and config.stage.adapter.init_from
    if adapter and run_folder.latest(config.folder) is None and not Path(adapter).is_dir():
        raise ConfigError(f"stage.adapter.init_from: folder '{adapter}' does not exist")
    shares, pool = layout(config, world), load_prompts(stage.prompts)
    rollouts, images = config.engine.steps // stage.updates, stage.groups * stage.group_size
    rows, passes = shares.micro_batch, shares.accumulate
    kept = (
        []
        if stage.adapter is None
        else ["base                 the weights under the adapter are kept once, in RUN/base"]
    )
    sizes = [f"sizes                {', '.join(stage.buckets)}; a rollout has one"] if stage.buckets else []
    return [
        *kept,
        *sizes,
        f"rollouts             {rollouts:,} of {stage.groups} prompts x {stage.group_size} images, {stage.updates} updates each",
        f"images               {rollouts * images:,}; each of {len(pool):,} prompts {rollouts * stage.groups / len(pool):.1f} times",
        f"global batch         {rows * passes * world} rows (images x {shares.steps} trained steps) = "
        f"{rows} x {passes} (accumulate) x {world} (processes)",
        f"rewards              {', '.join(f'{reward.title} x {reward.weight:g}' for reward in stage.rewards)}",
    ]


def further_copies(config: Run[GRPOConfig]) -> float:
    """Count the frozen copies of all weights; an adapter is kept alone, so that the model's own copies fall away."""
    algorithm, adapter = config.stage.algorithm, config.stage.adapter
    if adapter is None:
        return int(algorithm.kl.beta > 0) + algorithm.keeps_old
    averages = 2 * (config.engine.ema is not None)
    with torch.device("meta"):
        model = config.model.build()
    share = size_of(model, adapter) / sum(parameter.numel() for parameter in model.parameters())
    return (4 + averages + algorithm.keeps_old) * share - (4 + averages)


KIND = StageKind(
    check,
    split,
    build,
    summary,
    further_copies=further_copies,
    reads_data=lambda config: False,
    period=lambda config: config.stage.updates,
)
