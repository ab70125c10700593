"""Put stage 4 together from a recipe."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nitro_e.config import ConfigError
from nitro_e.data import Data
from nitro_e.data.prompts import MissingPrompts, load_prompts
from nitro_e.files import sha256_of
from nitro_e.interfaces import Stage
from nitro_e.model.pretrained import load_pretrained, read_config, weights_file
from nitro_e.record import run_folder
from nitro_e.rewards import build_rewards
from nitro_e.sampling.samplers import SamplingConfig
from nitro_e.stages.assembly import (
    Parts,
    Run,
    StageKind,
    data_summary,
    first_records,
    latent_shapes,
    open_run_data,
    split_of_data,
)
from nitro_e.stages.distill.reward import Judge
from nitro_e.stages.distill.sources import Pairs, Prompts, Source
from nitro_e.stages.distill.stage import DistillConfig, DistillRun
from nitro_e.training.batch import Split


def check(config: Run[DistillConfig]) -> None:
    engine, data = config.engine, config.data
    if config.components.vision is not None:
        raise ConfigError(
            "components.vision: stage.kind 'distill' reads no vision encoder; set components.vision: null"
        )
    if engine.sharding != "ddp":
        raise ConfigError(f"engine.sharding '{engine.sharding}': stage.kind 'distill' runs with ddp only")
    if engine.precision == "float16":
        raise ConfigError(
            "engine.precision 'float16': stage.kind 'distill' takes gradients inside its loss; use bfloat16"
        )
    stage = config.stage
    if (stage.inputs.intervals is not None or stage.sampler == "flow_map") and not getattr(
        config.model, "interval", False
    ):
        raise ConfigError(
            "stage.inputs.intervals and sampler 'flow_map' tell the model two times: set model.interval: true"
        )
    if data is None:
        if config.batch.global_ is None:
            raise ConfigError(
                "missing key 'batch': the samples of an optimiser step, over all processes; for example batch: 64"
            )
    elif not data.use_latents or data.reader != "indexed":
        raise ConfigError(
            "stage.kind 'distill' reads stored latents; set data.use_latents: true, data.reader: indexed"
        )
    sampling(config)


def sampling(config: Run[DistillConfig]) -> SamplingConfig:
    """The settings that are stored with the student: its times are part of them."""
    return config.stage.sampling(config.sampling)


def reads_data(config: Run[DistillConfig]) -> bool:
    return config.stage.prompts is None


def open_pairs(config: Run[DistillConfig], parts: Parts | None = None) -> Data:
    """Images of the teacher, as latents, with the noise they were drawn from where the inputs need it."""
    extra = ("noise.npy",) if config.stage.inputs.needs_noise else ()
    data = open_run_data(config, parts, extra)
    if not data.has_latents:
        raise ConfigError(
            "data.shards hold no latents; make pairs with nitro-e synthesize, or encode with nitro-e data"
        )
    return data


def build(config: Run[DistillConfig], parts: Parts) -> tuple[Stage, Sequence[str]]:
    folder = run_folder.model_folder(config.stage.teacher)
    described = read_config(folder)
    use = described["use"]
    if getattr(described["model"], "policy", 1) > 1:
        raise ConfigError(
            f"stage.teacher '{config.stage.teacher}' predicts several velocities per step (model.policy); a teacher needs one, so "
            "name the weights that it was distilled from"
        )
    for name in ("codec", "text"):
        ours, theirs = getattr(config.components, name).name, use.get(name, {}).get("name")
        if theirs not in (None, ours):
            raise ConfigError(f"components.{name} is '{ours}', but stage.teacher was trained with '{theirs}'")
    source, shown = open_source(config, parts)
    scorer = None
    if config.stage.reward is not None:
        scorer = build_rewards(config.stage.reward.rewards, parts.device)
        if config.stage.prompts is not None:
            scorer.check([prompt.info for prompt in load_prompts(config.stage.prompts)])
        scorer.load()
    teacher = load_pretrained(folder).to(parts.device, getattr(torch, config.engine.precision))
    teacher.gradient_checkpointing = config.engine.gradient_checkpointing
    if config.engine.compile:
        teacher.compile_blocks()
    stage = DistillRun(
        config.stage,
        parts.model,
        teacher,
        source,
        config.seed,
        parts.device,
        parts.flops,
        identity=sha256_of(weights_file(folder))[:16],
        judge=None if scorer is None else Judge(parts.codec, scorer),
    )
    return stage, config.prompts or shown


def split(config: Run[DistillConfig], world: int) -> Split:
    """Split the global batch over `world` processes; ConfigError if their samples at a time cannot be whole chains."""
    shares, inputs = split_of_data(config, world), config.stage.inputs
    for count in inputs.chain_counts:
        needed = count * inputs.group
        if shares.micro_batch % needed:
            times = f", {inputs.group} of each prompt" if inputs.group > 1 else ""
            raise ConfigError(
                f"batch: {shares.micro_batch} samples of a process at a time cannot be chains of {count} steps{times}; "
                f"set batch.per_device to a multiple of {needed}"
            )
    return shares


def open_source(config: Run[DistillConfig], parts: Parts) -> tuple[Source, Sequence[str]]:
    """Open the batches, and choose prompts to show."""
    stage, size = config.stage, parts.split.micro_batch
    if stage.prompts is None:
        data = open_pairs(config, parts)
        pairs = Pairs(data, parts.codec, parts.text, stage.inputs.needs_noise, parts.device)
        return pairs, first_records(data).prompts[:8]
    pool = load_prompts(stage.prompts)
    shapes = latent_shapes(parts, stage.buckets)
    prompts = Prompts(pool, parts.text, shapes, size, config.seed, parts.device)
    return prompts, prompts.prompts[:8]


def summary(config: Run[DistillConfig], data: Data | None, world: int, flops: float) -> list[str]:
    split(config, world)  # refuses what training would refuse
    lines = data_summary(config, data, world, flops)
    if config.stage.prompts is not None:
        try:
            distinct = {prompt.text for prompt in load_prompts(config.stage.prompts)}
            lines.append(f"prompts              {len(distinct):,} distinct ones, no images")
        except MissingPrompts as error:  # as shards may be missing in a dry run
            lines.append(f"warning              {error}")
    if config.stage.buckets:
        lines.append(f"sizes                {', '.join(config.stage.buckets)}; a step has one")
    offered = ", ".join(str(len(times)) for times in config.stage.schedules) or "any number of"
    return [*lines, f"student              {offered} steps of {config.stage.sampler}"]


def further_copies(config: Run[DistillConfig]) -> int:
    """Count the fake score with its two moments; those of a LoRA are small."""
    score = config.stage.score
    return 0 if score is None else 3 if score.fake.adapter is None else 1


KIND = StageKind(check, split, build, summary, open_pairs, sampling, further_copies, reads_data=reads_data)
