"""The recipe of a run: the whole configuration tree, the rules across its parts, and how it becomes an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from nitro_e.config import (
    Config,
    ConfigError,
    Seed,
    check_file_name,
    dump,
    environment_number,
    flatten,
    from_dict,
    is_overridden,
    to_dict,
)
from nitro_e.data import DataConfig, MissingShards
from nitro_e.data.prompts import load_prompts
from nitro_e.encoders.components import (
    ComponentsConfig,
    build_codec,
    build_text_encoder,
    codec_shape,
    compile_encoders,
    text_shape,
    vision_width,
    weights_source,
)
from nitro_e.evaluation.evaluator import EvaluationConfig, Evaluator
from nitro_e.interfaces import Architecture, LatentCodec, Model, Stage, TextEncoder
from nitro_e.model import describe
from nitro_e.record import run_folder
from nitro_e.record.metrics import caption
from nitro_e.record.run_config import write_config
from nitro_e.sampling.pipeline import TextToImage, latent_size
from nitro_e.sampling.samplers import SamplingConfig
from nitro_e.sampling.sheets import image_grid
from nitro_e.sampling.sources import Use
from nitro_e.sizes import parse_sizes
from nitro_e.stages import flow_matching, validation
from nitro_e.stages.assembly import Parts, StageKind
from nitro_e.stages.distill import DistillConfig
from nitro_e.stages.distill import assembly as distill
from nitro_e.stages.first_weights import build_model, check_first_weights, check_resumed_architecture
from nitro_e.stages.flow_matching import FlowMatchingConfig
from nitro_e.stages.grpo import GRPOConfig
from nitro_e.stages.grpo import assembly as grpo
from nitro_e.stages.validation import ValidationConfig
from nitro_e.training.batch import BatchConfig
from nitro_e.training.engine import Engine, EngineConfig, Hook, make_accelerator
from nitro_e.training.parallel import dist_context
from nitro_e.training.saving import ResumeConfig
from nitro_e.training.selection import Selection

BUCKET_SHEETS = 4  # aspect buckets of which the first prompts are drawn too
# told apart by `kind`; KINDS has an entry for each
StageConfig = FlowMatchingConfig | GRPOConfig | DistillConfig
KINDS: dict[str, StageKind[Any]] = {
    "flow_matching": flow_matching.KIND,
    "grpo": grpo.KIND,
    "distill": distill.KIND,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """A recipe: everything that decides a run. Nothing in it depends on the number of processes."""

    name: str  # what the run is called; its directory is runs/NAME unless `run` says otherwise
    run: str | None = None  # run directory; None: runs/NAME
    seed: Seed = 0  # of initial weights, data order and all noise
    init_from: str | None = None  # first weights: a run, checkpoint or model folder, with @model or @ema
    # E-MMDiT, or the kind that `model.kind` names; latent_channels and text_width follow from the components
    model: Architecture
    stage: StageConfig  # what is trained, and how; `kind` chooses among the stages
    data: DataConfig | None = None  # only for stages that read images
    batch: BatchConfig = field(default_factory=BatchConfig)
    components: ComponentsConfig
    engine: EngineConfig  # the training loop: steps, precision, averages, checkpoints
    # how the weights will be sampled; the resolution follows from data.resolution
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompts: tuple[str, ...] = ()  # of the sample grids; empty: the first captions of the data
    evaluation: EvaluationConfig | None = None  # scores during training
    resume: ResumeConfig = field(default_factory=ResumeConfig)  # what may change when the run is continued
    validation: ValidationConfig | None = None  # loss on held-out images during training

    @classmethod
    def derive(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Fill in what a recipe need not say twice: one resolution of the other, widths from the components."""
        refuse_old_keys(data)
        given = {key: dict(value) for key, value in data.items() if isinstance(value, Mapping)}
        if "sampling" not in data:
            given["sampling"] = {}
        places = [given[name] for name in ("data", "sampling") if name in given]
        resolution = next((place["resolution"] for place in places if "resolution" in place), None)
        evaluation = given.get("evaluation", {})
        if isinstance(evaluation.get("sampling"), Mapping):
            evaluation["sampling"] = dict(evaluation["sampling"])
            places.append(evaluation["sampling"])
        if resolution is not None:
            for place in places:
                place.setdefault("resolution", resolution)
        if "model" in given and "components" in given:
            components = from_dict(ComponentsConfig, given["components"], "components")
            # a folder in place of the default weights is expected to hold such; loading it will tell
            shape = codec_shape(replace(components.codec, path=None))
            text_width, _ = text_shape(replace(components.text, path=None))
            if shape is not None:
                given["model"].setdefault("latent_channels", shape[0])
            if text_width is not None:
                given["model"].setdefault("text_width", text_width)
            for place in (given.get("data", {}), given.get("stage", {})):
                if place.get("buckets") == "auto" and shape is not None:
                    model = from_dict(Architecture, given["model"], "model")
                    side = from_dict(SamplingConfig, {"resolution": resolution or 512}, "sampling").resolution
                    place["buckets"] = list(usual_buckets(model, shape[1], side))
        return {**data, **given}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_file_name(self.name, "name")
        kind = self.stage_kind
        if kind.reads_data(self):
            if self.data is None:
                raise ConfigError(f"missing key 'data': stage.kind '{self.stage.kind}' reads images")
            if self.batch.global_ is None:
                raise ConfigError(
                    "missing key 'batch': the samples of an optimiser step, over all processes; for example batch: 64, or "
                    "batch: {global: 2048, per_device: 32}"
                )
            if self.sampling.resolution != self.data.resolution:
                raise ConfigError(
                    f"sampling.resolution {self.sampling.resolution} differs from data.resolution {self.data.resolution}; "
                    "give one of them, the pixels the model is trained at"
                )
        elif self.data is not None:
            raise ConfigError(f"data: stage.kind '{self.stage.kind}' reads no images; leave data out")
        if self.validation is not None and self.data is None:
            raise ConfigError(
                f"validation: stage.kind '{self.stage.kind}' reads no images; leave validation out"
            )
        kind.check(self)
        self._check_policy()
        self._check_selection(kind.period(self))
        self._check_shapes()

    @property
    def stage_kind(self) -> StageKind[Any]:
        return KINDS[self.stage.kind]

    @property
    def published_sampling(self) -> SamplingConfig:
        """The settings stored with the weights and used for images; a distilled student's times are part of them."""
        return self.stage_kind.sampling(self)

    @property
    def resolution(self) -> int:
        """Pixels per side that the model is trained at."""
        return self.sampling.resolution

    @property
    def bucket_sizes(self) -> dict[str, tuple[int, int]]:
        """Return the aspect buckets, as written and in pixels (height, width)."""
        key, texts = self._buckets
        return dict(zip(texts, parse_sizes(texts, key)))

    @property
    def _buckets(self) -> tuple[str, tuple[str, ...]]:
        """Return the key that names the aspect buckets, and what stands there: of the data, or of a stage without."""
        if self.data is not None:
            return "data.buckets", self.data.buckets
        return "stage.buckets", getattr(self.stage, "buckets", ())

    @property
    def folder(self) -> Path:
        return Path(self.run or f"runs/{self.name}")

    @cached_property
    def counted(self) -> describe.Count:
        """Count the model's parameters, and the FLOPs of a forward pass of one sample."""
        shape, (_, text_length) = codec_shape(self.components.codec), text_shape(self.components.text)
        return describe.total(self.model, None if shape is None else self.token_grid(shape[1]), text_length)

    @cached_property
    def flops_per_step(self) -> float | None:
        """FLOPs of an optimiser step: of what is trained, without frozen encoders; None where they are not counted."""
        count, shape = self.stage_kind.training_flops, codec_shape(self.components.codec)
        if count is None or shape is None or self.batch.global_ is None:
            return None
        rows, columns = self.token_grid(shape[1])
        return self.batch.global_ * count(self, self.counted.flops, rows * columns)

    def _check_selection(self, period: int) -> None:
        """ConfigError if the best checkpoint would be asked for where the stage cannot be saved."""
        scores = self.evaluation
        if scores is not None and (scores.best or scores.guard) and scores.every % period:
            raise ConfigError(
                f"evaluation.every {scores.every} must be a multiple of {period}, the steps of stage.kind "
                f"'{self.stage.kind}' that belong together: only between them a checkpoint can be kept or gone back to"
            )

    def _check_policy(self) -> None:
        """Sampler 'policy' and weights of several velocities belong together."""
        places, sampler = getattr(self.model, "policy", 1), self.published_sampling.sampler
        if (places > 1) != (sampler == "policy"):
            raise ConfigError(
                f"model.policy {places} with sampler '{sampler}': only sampler 'policy' follows several velocities per step, and "
                "only students of stage.preset pi_flow learn them; set all three (model.policy: 10, sampling.sampler: "
                "policy), or none"
            )

    def _check_shapes(self) -> None:
        """Check what can be known of the components before they are loaded."""
        shape = codec_shape(self.components.codec)
        text_width, text_length = text_shape(self.components.text)
        if shape is not None:
            self.check_codec(*shape, text_length)
        if text_width is not None:
            self.check_text(text_width)

    def check_text(self, width: int) -> None:
        """ConfigError if the model does not fit the text encoder."""
        if width != self.model.text_width:
            raise ConfigError(
                f"model.text_width is {self.model.text_width}, but '{self.components.text.name}' gives {width}; set it "
                f"to {width}"
            )

    def check_codec(self, channels: int, stride: int, text_length: int) -> None:
        """ConfigError if the model does not fit the codec, or an image of the run could not be drawn."""
        if channels != self.model.latent_channels:
            raise ConfigError(
                f"model.latent_channels is {self.model.latent_channels}, but '{self.components.codec.name}' has "
                f"{channels}; set it to {channels}"
            )
        sizes = {"sampling.resolution": (self.resolution, self.resolution)}
        sizes["sampling"] = self.published_sampling.size
        if self.evaluation is not None and self.evaluation.sampling is not None:
            sizes["evaluation.sampling"] = self.evaluation.sampling.size
        sizes |= {f"{self._buckets[0]}: {text}": size for text, size in self.bucket_sizes.items()}
        for key, size in sizes.items():  # a size that cannot be drawn would end the run at its first image
            try:
                latent_size(self.model, stride, text_length, *size)
            except ConfigError as error:
                raise ConfigError(f"{key}: {error}") from None

    def token_grid(self, stride: int) -> tuple[int, int]:
        """Return the (rows, columns) of tokens of a training image."""
        side = self.resolution // stride
        return self.model.latent_grid(side, side)


def usual_buckets(model: Architecture, stride: int, resolution: int) -> tuple[str, ...]:
    """List the sizes of about the area of a square that the model works on, up to an aspect of 4 to 1."""
    unit = stride * model.patch_size
    side = max(resolution // unit, 1)
    grids = [grid for grid in model.similar_grids(side, side, 0.85, 1.15) if max(grid) <= 4 * min(grid)]
    return tuple(f"{rows * unit}x{columns * unit}" for rows, columns in grids)


def refuse_old_keys(data: Mapping[str, Any]) -> None:
    """ConfigError, with what to write instead, for a recipe that fixes the number of processes."""
    plain = flatten(data)
    old = {key: plain[key] for key in ("data.batch_size", "engine.accumulate") if key in plain}
    if not old:
        return
    micro_batch, accumulate = old.get("data.batch_size"), old.get("engine.accumulate", 1)
    instead = "batch: {per_device: N}, the samples (in stage 3: rows) that a process takes at a time"
    if isinstance(micro_batch, int) and isinstance(accumulate, int):
        world = environment_number("WORLD_SIZE", 1)
        instead = (
            f"batch: {{global: {micro_batch * accumulate * world}, per_device: {micro_batch}}} for {micro_batch} x "
            f"{accumulate} on {world} processes"
        )
    said = " and ".join(f"{key} {value}" for key, value in old.items())
    raise ConfigError(f"{said}: recipes no longer fix the number of processes; write {instead}")


def summary(config: RunConfig, given: Sequence[str] = ()) -> str:
    """The resolved config and what follows from it, without loading weights of components.

    given: the overrides of the command line. What they name must be there; shards of the recipe, or runs of the
    stages before it, may still be missing and are warned of, without the lines that depend on them.
    """
    sources, warnings = check_first_weights(config, given)
    data = None
    if config.stage_kind.open_data is not None and config.data is not None:
        try:
            data = config.stage_kind.open_data(config)
        except MissingShards as error:
            if is_overridden("data.shards", given) or is_overridden("data.sources", given):
                raise
            warnings.append(f"{error}; the lines that depend on the data are left out")
    if config.validation is not None:
        try:
            validation.check_apart(config, config.validation)
        except MissingShards as error:
            if is_overridden("validation.shards", given):
                raise
            warnings.append(str(error))
    world = environment_number("WORLD_SIZE", 1)
    shape, (_, text_length) = codec_shape(config.components.codec), text_shape(config.components.text)
    grid = None if shape is None else config.token_grid(shape[1])
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
        *config.stage_kind.summary(config, data, world, total.flops),
        *sources,
        *components_summary(config.components),
        *validation.summary(config.validation),
        *evaluation_summary(config.evaluation),
        *memory_summary(config, total.parameters),
        *storage_summary(config),
        f"checkpoints          {kept} kept, about {gigabytes:.2f} GB each",
        f"run directory        {config.folder}",
        *(f"warning              {warning}" for warning in warnings),
    ]
    return "\n".join(lines)


def evaluation_summary(evaluation: EvaluationConfig | None) -> list[str]:
    if evaluation is None:
        return []
    prompts, every = load_prompts(evaluation.prompts), evaluation.every
    return [f"evaluation           {len(prompts):,} prompts, every {every:,} steps"]


def memory_summary(config: RunConfig, parameters: int) -> list[str]:
    """Say what weights, gradients, moments and averages take in a process; activations and encoders come on top."""
    copies = 4 + max(config.stage_kind.further_copies(config), 0)
    copies += (config.engine.ema is not None) + 2 * (config.engine.posthoc_ema is not None)
    return [f"memory               {4e-9 * parameters * copies:.2f} GB, activations and encoders come on top"]


def storage_summary(config: RunConfig) -> list[str]:
    """Say what a sample takes on disk, by column, in half precision."""
    components, columns = config.components, []
    shape, (text_width, length) = codec_shape(components.codec), text_shape(components.text)
    if config.data is None or shape is None or text_width is None:
        return []
    side = config.data.resolution // shape[1]
    columns.append(("latents", shape[0] * side**2))
    columns.append(("text", length * text_width))
    width = None if components.vision is None else vision_width(components.vision)
    if width is not None:
        rows, cells = config.model.latent_grid(side, side)
        columns.append(("features", rows * cells * width))
    sizes = ", ".join(f"{name} {2 * numbers / 1e3:,.0f}" for name, numbers in columns)
    return [f"storage              KB a sample where stored: {sizes}"]


def components_summary(components: ComponentsConfig) -> list[str]:
    """Lines about where the weights of the encoders come from; ConfigError for a folder that does not exist."""
    lines = []
    for kind in ("codec", "text", "vision"):
        component = getattr(components, kind)
        if component is not None:
            source = weights_source(kind, component)
            lines.append(f"{kind:<20} {component.name}" + (f" from {source}" if source else ""))
    return lines


def build(config: RunConfig) -> Engine:
    """Load the components and put the stage on an engine, resumed if the run directory has a checkpoint."""
    accelerator = make_accelerator(config.engine)
    device, kind = accelerator.device, config.stage_kind
    rank, world = accelerator.process_index, accelerator.num_processes
    split = kind.split(config, world)
    check_resumed_architecture(config)
    codec = build_codec(config.components.codec, device)
    text = build_text_encoder(config.components.text, device)
    config.check_text(text.width)
    config.check_codec(codec.channels, codec.stride, text.length)
    model = build_model(config).to(device)
    model.gradient_checkpointing = config.engine.gradient_checkpointing
    if config.engine.compile:
        model.compile_blocks()
    if config.engine.compile_encoders:
        compile_encoders(codec, text)
    side = config.resolution // codec.stride
    parts = Parts(
        device=device,
        rank=rank,
        world=world,
        split=split,
        autocast=accelerator.autocast,
        codec=codec,
        text=text,
        model=model,
        flops=describe.total(config.model, config.token_grid(codec.stride), text.length).flops,
        latent_shape=(codec.channels, side, side),
    )
    stage, prompts = kind.build(config, parts)
    use = Use(
        codec=config.components.codec,
        text=config.components.text,
        sampling=config.published_sampling,
        sizes=tuple(config.bucket_sizes),
    )
    hooks = [sample_grid_hook(config, codec, text, config.prompts or tuple(prompts), stage)]
    dist = dist_context(accelerator)
    if config.validation is not None:
        validator = validation.open_validator(config, config.validation, parts, dist)
        hooks.append(Hook(config.validation.every, validator, everywhere=True))
    selection = None
    if config.evaluation is not None:
        best, guard = config.evaluation.best, config.evaluation.guard
        bounds = {} if guard is None else {f"eval/{title}": bound for title, bound in guard.bounds.items()}
        selection = Selection(best and f"eval/{best}", bounds, "stop" if guard is None else guard.action)
        evaluator = Evaluator(
            config.evaluation, config.published_sampling, codec, text, device, accelerator.autocast, dist
        )
        evaluator.scorer.load()  # what is missing shows before training
        hooks.append(Hook(config.evaluation.every, evaluator, first=True, everywhere=True))
    config.folder.mkdir(parents=True, exist_ok=True)
    engine = Engine(
        config.engine,
        stage,
        accelerator,
        run=config.folder,
        seed=config.seed,
        use=to_dict(use),
        record=to_dict(config),
        accumulate=split.accumulate,
        hooks=tuple(hooks),
        resume=config.resume,
        selection=selection,
    )
    if accelerator.is_main_process and (engine.step < config.engine.steps or engine.step == 0):
        # only now: the engine refuses the run directory of another experiment
        resumed = run_folder.latest(config.folder) is not None
        engine.changed = write_config(config, config.folder, resumed)
    return engine


def sample_grid_hook(
    config: RunConfig, codec: LatentCodec, text: TextEncoder, prompts: tuple[str, ...], stage: Stage
) -> Hook:
    """Draw fixed prompts and seeds, so that grids of different steps show the same images getting better.

    The stage may add images of its own.
    """

    def run(model: Model) -> dict[str, Image.Image]:
        training = model.training
        pipeline = TextToImage(model.eval(), codec, text, config.published_sampling)
        images = pipeline(prompts).images
        sheets = {}
        for name, (height, width) in list(config.bucket_sizes.items())[:BUCKET_SHEETS]:
            if (height, width) != images[0].size[::-1]:
                drawn = pipeline(prompts[:4], height=height, width=width).images
                sheet = image_grid(drawn, len(drawn))
                sheets[f"samples-{name}"] = caption(sheet, prompts[:4], len(drawn), drawn[0].size)
        model.train(training)
        columns = min(8, len(images))
        own: dict[str, Image.Image] = getattr(stage, "images", dict)()
        return {
            "samples": caption(image_grid(images, columns), prompts, columns, images[0].size),
            **sheets,
            **own,
        }

    return Hook(config.engine.sample_every, run)
