"""A run: the whole configuration tree, the rules across its parts, and how it becomes an engine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nitro_e.config import (
    Config,
    ConfigError,
    Seed,
    check_file_name,
    dump,
    flatten,
    load,
    parse_yaml,
    read_text,
    to_dict,
)  # fmt: skip
from nitro_e.data import Data, DataConfig, MissingShards, Records, open_data
from nitro_e.data.prompts import load_prompts
from nitro_e.encoders.components import (
    ComponentConfig,
    build_codec,
    build_text_encoder,
    build_vision_encoder,
    codec_shape,
    text_shape,
    weights_source,
)
from nitro_e.evaluation.evaluator import EvaluationConfig, Evaluator, Share
from nitro_e.files import sha256_of
from nitro_e.interfaces import LatentCodec, Stage, TextEncoder
from nitro_e.model import EMMDiT, ModelConfig, describe
from nitro_e.model.pretrained import load_pretrained, read_config
from nitro_e.randomness import seeded
from nitro_e.record.metrics import caption
from nitro_e.rewards import build_rewards
from nitro_e.sampling.pipeline import TextToImage, Use, latent_size
from nitro_e.sampling.samplers import SamplingConfig
from nitro_e.sampling.sheets import image_grid
from nitro_e.stages.distill import DistillConfig, DistillRun
from nitro_e.stages.flow_matching import FlowMatching, FlowMatchingConfig
from nitro_e.stages.grpo import GRPO, GRPOConfig
from nitro_e.training import checkpoint
from nitro_e.training.engine import Engine, EngineConfig, Hook, make_accelerator


@dataclass(frozen=True, kw_only=True)
class ComponentsConfig(Config):
    """The frozen encoders."""

    codec: ComponentConfig
    text: ComponentConfig
    vision: ComponentConfig | None = None  # for REPA


# told apart by `kind`; KINDS has an entry for each
StageConfig = FlowMatchingConfig | GRPOConfig | DistillConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    name: str
    run: str | None = None  # run directory; None: runs/NAME
    seed: Seed = 0
    init_from: str | None = None  # first weights: a run, checkpoint or model folder, with @model or @ema
    model: ModelConfig
    stage: StageConfig
    data: DataConfig | None = None  # only for stages that read images
    components: ComponentsConfig
    engine: EngineConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompts: tuple[str, ...] = ()  # of the sample grids; empty: the first captions of the data
    evaluation: EvaluationConfig | None = None  # scores during training

    def __post_init__(self) -> None:
        super().__post_init__()
        check_file_name(self.name, "name")
        kind = self.stage_kind
        if kind.open_data is not None and self.data is None:
            raise ConfigError(f"missing key 'data': stage.kind '{self.stage.kind}' reads images")
        if kind.open_data is None and self.data is not None:
            raise ConfigError(f"data: stage.kind '{self.stage.kind}' reads no images; leave data out")
        if self.data is not None and self.sampling.resolution != self.data.resolution:
            raise ConfigError(
                f"sampling.resolution {self.sampling.resolution} differs from data.resolution {self.data.resolution}; "
                "set both to the pixels the model is trained at"
            )
        kind.check(self)
        self._check_shapes()

    @property
    def stage_kind(self) -> StageKind:
        return KINDS[self.stage.kind]

    @property
    def published_sampling(self) -> SamplingConfig:
        """What is stored with the weights and used for images; a distilled student's times are part of it."""
        return self.stage_kind.sampling(self)

    @property
    def resolution(self) -> int:
        """Pixels per side that the model is trained at."""
        return self.sampling.resolution

    def _check_shapes(self) -> None:
        """What can be known of the components before they are loaded."""
        shape = codec_shape(self.components.codec)
        text_width, text_length = text_shape(self.components.text)
        if shape is not None:
            self._check_codec(*shape, text_length)
        if text_width not in (None, self.model.text_width):
            raise ConfigError(
                f"model.text_width is {self.model.text_width}, but '{self.components.text.name}' gives {text_width}"
            )

    def _check_codec(self, channels: int, stride: int, text_length: int) -> None:
        if channels != self.model.latent_channels:
            raise ConfigError(
                f"model.latent_channels is {self.model.latent_channels}, but '{self.components.codec.name}' has {channels}"
            )
        sizes = {"sampling.resolution": (self.resolution, self.resolution)}
        sizes["sampling"] = self.published_sampling.size
        if self.evaluation is not None and self.evaluation.sampling is not None:
            sizes["evaluation.sampling"] = self.evaluation.sampling.size
        for key, size in sizes.items():  # a size that cannot be drawn would end the run at its first image
            try:
                latent_size(self.model, stride, text_length, *size)
            except ConfigError as error:
                raise ConfigError(f"{key}: {error}") from None

    @property
    def folder(self) -> Path:
        return Path(self.run or f"runs/{self.name}")


class Parts(NamedTuple):
    """What every stage is made of."""

    device: torch.device
    rank: int
    world: int
    autocast: Callable[[], contextlib.AbstractContextManager]  # of the engine's precision
    codec: LatentCodec
    text: TextEncoder
    model: EMMDiT  # on the device
    flops: float  # of one forward pass of one sample


class StageKind(NamedTuple):
    """What differs between the stages when a run is put together."""

    open_data: Callable[[RunConfig], Data] | None  # None: the stage reads none
    check: Callable[[RunConfig], None]  # rules across the whole configuration
    build: Callable[[RunConfig, Parts], tuple[Stage, Sequence[str]]]  # and prompts to show by default
    facts: Callable[[RunConfig, Data | None, int, float], list[str]]  # of (processes, FLOPs) for the summary
    sampling: Callable[[RunConfig], SamplingConfig] = lambda config: config.sampling
    further_copies: Callable[[RunConfig], int] = lambda config: 0  # of the model's size, in a checkpoint


def summary(config: RunConfig, given: Sequence[str] = ()) -> str:
    """The resolved config and what follows from it, without loading weights of components.

    given: the overrides of the command line. What they name must be there; shards of the recipe, or runs of the
    stages before it, may still be missing and are warned of, without the lines that depend on them.
    """
    sources, warnings = first_weights(config, given)
    data = None
    if config.stage_kind.open_data is not None:
        try:
            data = config.stage_kind.open_data(config)
        except MissingShards as error:
            if is_given("data.shards", given) or is_given("data.sources", given):
                raise
            warnings.append(f"{error}; the lines that depend on the data are left out")
    world = int(os.environ.get("WORLD_SIZE", 1))
    shape, (_, text_length) = codec_shape(config.components.codec), text_shape(config.components.text)
    grid = None if shape is None else token_grid(config, shape[1])
    total = describe.total(config.model, grid, text_length)
    table = [
        f"{row.name:<28}{row.parameters:>14,}{row.flops / 1e9:>9.2f}{row.image_tokens:>14}{row.text_tokens:>13}"
        for row in (*describe.parts(config.model, grid, text_length), total)
    ]
    optim, steps = config.stage.optim, config.engine.steps
    copies = 4 + config.stage_kind.further_copies(config)  # 2 of the weights, 2 moments
    copies += 2 * (config.engine.ema is not None) + 2 * (config.engine.posthoc_ema is not None)
    kept = config.engine.keep_last + (steps // config.engine.keep_every if config.engine.keep_every else 0)
    gigabytes = 4e-9 * total.parameters * copies
    lines = [
        dump(config),
        f"{'part':<28}{'parameters':>14}{'GFLOP':>9}{'image tokens':>14}{'text tokens':>13}",
        *table,
        "",
        f"steps                {steps:,}; learning rate {optim.lr:g} after {optim.warmup} steps of warm-up"
        + (f", falling over the last {optim.decay:.0%}" if optim.decay else ""),
        *config.stage_kind.facts(config, data, world, total.flops),
        *sources,
        *component_facts(config.components),
        *evaluation_facts(config),
        f"checkpoints          {kept} kept, about {gigabytes:.2f} GB each",
        f"run directory        {config.folder}",
        *(f"warning              {warning}" for warning in warnings),
    ]
    return "\n".join(lines)


def is_given(key: str, given: Sequence[str]) -> bool:
    """Whether overrides set this key, a part of it or what it is a part of."""
    names = [override.partition("=")[0] for override in given]
    return any(f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.") for name in names)


def evaluation_facts(config: RunConfig) -> list[str]:
    if config.evaluation is None:
        return []
    prompts, every = load_prompts(config.evaluation.prompts), config.evaluation.every
    return [f"evaluation           {len(prompts):,} prompts, every {every:,} steps"]


def component_facts(components: ComponentsConfig) -> list[str]:
    """Where the weights of the encoders come from; ConfigError for a folder that does not exist."""
    lines = []
    for kind in ("codec", "text", "vision"):
        component = getattr(components, kind)
        if component is not None:
            source = weights_source(kind, component)
            lines.append(f"{kind:<20} {component.name}" + (f" from {source}" if source else ""))
    return lines


def first_weights(config: RunConfig, given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Lines about the weights to begin with, and warnings; ConfigError for such that are not there or do not fit.

    Recipes name the run of the stage before theirs: while that is not trained it is only warned of, unless it is
    `given` on the command line.
    """
    teacher = getattr(config.stage, "teacher", None)
    sources = {} if teacher is None else {"stage.teacher": teacher}
    if config.init_from is not None and checkpoint.latest(config.folder) is None:
        sources["init_from"] = config.init_from
    lines, warnings = [], []
    for key, source in sources.items():
        run = Path(source.partition("@")[0])
        try:
            folder = checkpoint.model_folder(source)
        except ConfigError as error:
            trained = run.parts[:1] != ("runs",) or checkpoint.latest(run) is not None
            if trained or is_given(key, given):
                raise ConfigError(f"{key}: {error}") from None
            warnings.append(f"{key}: {error}")
            continue
        if key == "init_from" or config.init_from is None:
            check_architecture(source, read_config(folder)["model"], config.model)
        lines.append(f"{key:<20} {folder}")
    return lines, warnings


def open_run_data(
    config: RunConfig, latent_shape: tuple[int, int, int] | None = None, extra: tuple[str, ...] = ()
) -> Data:
    """The data as this run reads it; stored columns must come from the components it names."""
    vision = config.components.vision is not None
    data = open_data(
        config.data, need_pixels=vision, use_text=True, use_features=vision, seed=config.seed, stage=config.name,
        latent_shape=latent_shape, text_length=text_shape(config.components.text)[1], extra=extra,
    )  # fmt: skip
    for column, made in data.encoders().items():
        component = {"latents": "codec", "text": "text", "features": "vision"}.get(column)
        ours, theirs = component and getattr(config.components, component), made["name"]
        if ours is not None and theirs is not None and theirs["name"] != ours.name:
            raise ConfigError(
                f"components.{component} is '{ours.name}', but the stored {column} were made with '{theirs['name']}'"
            )
    if data.text_format == "ragged" and config.model.text_mask == "none":
        raise ConfigError(
            "model.text_mask is 'none', which attends to padded positions, but the stored text has none (ragged); "
            "encode it padded, or train with model.text_mask=real"
        )
    return data


def token_grid(config: RunConfig, stride: int) -> tuple[int, int]:
    side = config.resolution // stride
    return config.model.latent_grid(side, side)


def build(config: RunConfig) -> Engine:
    """Load the components and put the stage on an engine, resumed if the run directory has a checkpoint."""
    accelerator = make_accelerator(config.engine)
    device = accelerator.device
    refuse_other_architecture(config)
    codec = build_codec(config.components.codec, device)
    text = build_text_encoder(config.components.text, device)
    if text.width != config.model.text_width:
        raise ConfigError(
            f"model.text_width is {config.model.text_width}, but the text encoder gives {text.width}"
        )
    config._check_codec(codec.channels, codec.stride, text.length)
    model = build_model(config).to(device)
    model.gradient_checkpointing = config.engine.gradient_checkpointing
    if config.engine.compile:
        model.compile_blocks()
    flops = describe.total(config.model, token_grid(config, codec.stride), text.length).flops
    rank, world = accelerator.process_index, accelerator.num_processes
    parts = Parts(device, rank, world, accelerator.autocast, codec, text, model, flops)
    stage, prompts = config.stage_kind.build(config, parts)
    use = Use(codec=config.components.codec, text=config.components.text, sampling=config.published_sampling)
    hooks = [sample_grid_hook(config, codec, text, config.prompts or tuple(prompts))]
    if config.evaluation is not None:
        share = Share(
            accelerator.process_index, accelerator.num_processes, partial(accelerator.reduce, reduction="sum")
        )
        evaluator = Evaluator(
            config.evaluation, config.published_sampling, codec, text, device, accelerator.autocast, share
        )
        evaluator.scorer.load()  # what is missing shows before training
        hooks.append(Hook(config.evaluation.every, evaluator, first=True, everywhere=True))
    config.folder.mkdir(parents=True, exist_ok=True)
    engine = Engine(
        config.engine, stage, accelerator, run=config.folder, seed=config.seed, use=to_dict(use), record=to_dict(config),
        hooks=tuple(hooks),
    )  # fmt: skip
    if accelerator.is_main_process and (engine.step < config.engine.steps or engine.step == 0):
        # only now: the engine refuses the run directory of another experiment
        engine.changed = write_config(config)
    return engine


def write_config(config: RunConfig) -> dict[str, list]:
    """Write `config.yaml`. Returns what a resume changes in it, {key: [before, now]}, after printing it.

    The config of the attempts before stays as `config.1.yaml`, `config.2.yaml`, ...
    """
    path = config.folder / "config.yaml"
    changed = {}
    if path.exists() and checkpoint.latest(config.folder) is not None:
        before, now = config_at(path), flatten(to_dict(config))
        changed = {
            key: [before.get(key), now.get(key)]
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        }
    if changed:
        number = 1
        while (kept := path.with_name(f"config.{number}.yaml")).exists():
            number += 1
        path.rename(kept)
        print(f"the config has changed since the last attempt (that one is kept as {kept.name}):")
        for key, (was, now) in changed.items():
            print(f"  {key} was {was!r}, is {now!r}")
    path.write_text(dump(config))
    return changed


def config_at(path: Path) -> dict[str, Any]:
    """The keys of a written config, `a.b` -> value, with today's defaults for those that it does not have."""
    try:
        return flatten(to_dict(load(RunConfig, path)))
    except ConfigError:  # of a version with other keys
        return flatten(parse_yaml(read_text(path), str(path)))


def refuse_other_architecture(config: RunConfig) -> None:
    """Before a resume: which keys of the model differ from those of its checkpoint."""
    last = checkpoint.latest(config.folder)
    if last is None or not (last / "model" / "config.json").is_file():
        return  # nothing to resume, or damaged: the resume says so
    remedy = "set it back, or give this experiment its own run directory: run=..."
    check_architecture(str(last), read_config(last / "model")["model"], config.model, remedy)


def build_model(config: RunConfig) -> EMMDiT:
    """Fresh weights from the seed, or those of `init_from` or the teacher, whose architecture must be the same.

    A run that has a checkpoint no longer needs `init_from`: its weights are overwritten by the resume.
    """
    first = config.init_from or getattr(config.stage, "teacher", None)
    if first is None or checkpoint.latest(config.folder) is not None:
        with seeded(config.seed, "initial weights"):
            return EMMDiT(config.model)
    source = load_pretrained(checkpoint.model_folder(first)).float()
    check_architecture(first, source.config, config.model)
    model = EMMDiT(config.model)
    model.load_state_dict(source.state_dict())
    return model


def check_architecture(
    source: str, theirs: ModelConfig, ours: ModelConfig,
    remedy: str = "give the same keys here, or other weights to start from",
) -> None:  # fmt: skip
    """ConfigError if a model of `ours` cannot have the weights of `source`, a model of `theirs`: which keys differ."""
    was, now = architecture(theirs), architecture(ours)
    changed = [f"model.{key} was {was[key]!r}, is {now[key]!r}" for key in now if now[key] != was[key]]
    if changed:
        raise ConfigError(f"'{source}' is of another architecture ({'; '.join(changed)}); {remedy}")


def architecture(config: ModelConfig) -> dict:
    """The fields that decide what the weights are; initial values do not, and a continuation may change grid and ASA."""
    return {
        key: value
        for key, value in to_dict(config).items()
        if key not in ("gate_init", "base_grid", "attention")
    }


def first_records(data: Data) -> Records:
    """The first micro-batch of the run."""
    records = data.records()
    with contextlib.closing(records):
        return next(records)


def first_sample(data: Data) -> str:
    """Its key, caption and stored arrays."""
    records = first_records(data)
    text = None if records.text is None else records.text.tokens
    arrays = {
        "pixels": records.pixels,
        "latents": records.latents,
        "text": text,
        "features": records.features,
    }
    shapes = [
        f"{name} {'x'.join(map(str, array.shape[1:]))}" for name, array in arrays.items() if array is not None
    ]
    return f"{records.keys[0]}: {', '.join(shapes)}, '{records.prompts[0]}'"


def sample_grid_hook(
    config: RunConfig, codec: LatentCodec, text: TextEncoder, prompts: tuple[str, ...]
) -> Hook:
    """Fixed prompts and seeds, so that grids of different steps show the same images getting better."""

    def run(model: torch.nn.Module) -> dict:
        training = model.training
        images = TextToImage(model.eval(), codec, text, config.published_sampling)(prompts)
        model.train(training)
        columns = min(8, len(images))
        return {"samples": caption(image_grid(images, columns), prompts, columns, images[0].size)}

    return Hook(config.engine.sample_every, run)


# ---- stages 1 and 2: flow matching


def check_flow_matching(config: RunConfig) -> None:
    repa, model = config.stage.repa, config.model
    if (repa is None) != (config.components.vision is None):
        raise ConfigError(
            "components.vision and stage.repa belong together: "
            + ("nothing reads the vision encoder; set components.vision: null" if repa is None else
               "REPA needs a vision encoder; set components.vision or stage.repa: null")
        )  # fmt: skip
    if repa is not None and not (1 <= repa.tap <= model.depth and model.on_full_grid(repa.tap)):
        first, inside, _ = model.groups
        raise ConfigError(
            f"stage.repa.tap: {repa.tap} is not a block count whose tokens are the full grid; "
            f"choose 1 to {first} or {first + inside + 1} to {model.depth}"
        )


def build_flow_matching(config: RunConfig, parts: Parts) -> tuple[Stage, Sequence[str]]:
    side = config.resolution // parts.codec.stride
    data = open_run_data(config, (parts.codec.channels, side, side))
    data.bad.report = config.folder / f"bad_samples.rank{parts.rank}.jsonl"
    vision = config.components.vision and build_vision_encoder(config.components.vision, parts.device)
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


def data_facts(config: RunConfig, data: Data | None, world: int, flops: float) -> list[str]:
    batch = config.data.batch_size * config.engine.accumulate * world
    samples = batch * config.engine.steps
    lines = [
        f"global batch         {batch} = {config.data.batch_size} x {config.engine.accumulate} (accumulate) x {world} (processes)",
        f"compute              {3 * flops * samples:.2e} FLOP for the model (forward and backward)",
    ]
    if data is not None:
        lines += [
            f"samples              {len(data):,} in the data, {samples / len(data):.2f} epochs",
            f"first sample         {first_sample(data)}",
        ]
    return lines


# ---- stage 3: GRPO


def check_grpo(config: RunConfig) -> None:
    engine, updates = config.engine, config.stage.updates
    if config.components.vision is not None:
        raise ConfigError(
            "components.vision: stage.kind 'grpo' reads no vision encoder; set components.vision: null"
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


def build_grpo(config: RunConfig, parts: Parts) -> tuple[Stage, Sequence[str]]:
    stage, side = config.stage, config.resolution // parts.codec.stride
    last = checkpoint.latest(config.folder)
    if last is not None and stage.adapter is not None and stage.adapter.init_from is not None:
        # a resume needs the first adapter no more: the checkpoint's has its rank, alpha and targets
        stage = replace(stage, adapter=replace(stage.adapter, init_from=str(last / "model" / "adapter")))
    pool, scorer = load_prompts(stage.prompts), build_rewards(stage.rewards, parts.device)
    scorer.check([prompt.info for prompt in pool])
    scorer.load()  # what is missing shows before training
    grpo = GRPO(
        stage, parts.model, pool, scorer, parts.codec, parts.text, latent_shape=(parts.codec.channels, side, side),
        seed=config.seed, layout=stage.layout(parts.world, config.engine.accumulate), device=parts.device,
        autocast=parts.autocast, forward_flops=parts.flops,
    )  # fmt: skip
    return grpo, [prompt.text for prompt in pool[:8]]


def grpo_copies(config: RunConfig) -> int:
    """Frozen copies come on top; an adapter has next to no moments, and its reference is the model itself."""
    algorithm, adapter = config.stage.algorithm, config.stage.adapter
    reference = -2 if adapter is not None else int(algorithm.kl.beta > 0)
    return reference + (algorithm.kind == "nft")


def grpo_facts(config: RunConfig, data: None, world: int, flops: float) -> list[str]:
    stage, adapter = config.stage, config.stage.adapter and config.stage.adapter.init_from
    if adapter and checkpoint.latest(config.folder) is None and not Path(adapter).is_dir():
        raise ConfigError(f"stage.adapter.init_from: folder '{adapter}' does not exist")
    layout, pool = stage.layout(world, config.engine.accumulate), load_prompts(stage.prompts)
    rollouts, images = config.engine.steps // stage.updates, stage.groups * stage.group_size
    return [
        f"rollouts             {rollouts:,} of {stage.groups} prompts x {stage.group_size} images, {stage.updates} updates each",
        f"images             {rollouts * images:,}; each of {len(pool):,} prompts {rollouts * stage.groups / len(pool):.1f} times",
        f"micro-batch          {layout.micro_batch} rows: images x {layout.steps} trained steps",
        f"rewards              {', '.join(f'{reward.title} x {reward.weight:g}' for reward in stage.rewards)}",
    ]


# ---- stage 4: distillation


def check_distill(config: RunConfig) -> None:
    engine = config.engine
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
    if not config.data.use_latents or config.data.reader != "indexed":
        raise ConfigError(
            "stage.kind 'distill' reads stored latents; set data.use_latents: true, data.reader: indexed"
        )
    distill_sampling(config)


def distill_sampling(config: RunConfig) -> SamplingConfig:
    return config.stage.sampling(config.sampling)


def open_pairs(config: RunConfig, latent_shape: tuple[int, int, int] | None = None) -> Data:
    """Teacher's images, as latents, with the noise they were drawn from where the inputs need it."""
    data = open_run_data(
        config, latent_shape, extra=("noise.npy",) if config.stage.inputs.needs_noise else ()
    )
    if not data.has_latents:
        raise ConfigError(
            "data.shards hold no latents; make pairs with nitro-e synthesize, or encode with nitro-e data"
        )
    return data


def build_distill(config: RunConfig, parts: Parts) -> tuple[Stage, Sequence[str]]:
    folder, side = checkpoint.model_folder(config.stage.teacher), config.resolution // parts.codec.stride
    use = read_config(folder)["use"]
    for name in ("codec", "text"):
        ours, theirs = getattr(config.components, name).name, use.get(name, {}).get("name")
        if theirs not in (None, ours):
            raise ConfigError(f"components.{name} is '{ours}', but stage.teacher was trained with '{theirs}'")
    data = open_pairs(config, (parts.codec.channels, side, side))
    data.bad.report = config.folder / f"bad_samples.rank{parts.rank}.jsonl"
    teacher = load_pretrained(folder).to(parts.device, getattr(torch, config.engine.precision))
    teacher.gradient_checkpointing = config.engine.gradient_checkpointing
    if config.engine.compile:
        teacher.compile_blocks()
    stage = DistillRun(
        config.stage, parts.model, teacher, data, parts.codec, parts.text, config.seed, parts.device, parts.flops,
        identity=sha256_of(folder / "model.safetensors")[:16],
    )  # fmt: skip
    return stage, config.prompts or first_records(data).prompts[:8]


def distill_facts(config: RunConfig, data: Data | None, world: int, flops: float) -> list[str]:
    offered = ", ".join(str(len(times)) for times in config.stage.schedules) or "any number of"
    return [
        *data_facts(config, data, world, flops),
        f"student              {offered} steps of {config.stage.sampler}",
    ]


KINDS = {
    "flow_matching": StageKind(open_run_data, check_flow_matching, build_flow_matching, data_facts),
    "grpo": StageKind(None, check_grpo, build_grpo, grpo_facts, further_copies=grpo_copies),
    "distill": StageKind(open_pairs, check_distill, build_distill, distill_facts, distill_sampling),
}
