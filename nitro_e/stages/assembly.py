"""Parts that every stage is put together from, and what differs between the stages; each has its own part beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch

from nitro_e.config import ConfigError
from nitro_e.data import Data, DataConfig, Records, open_data
from nitro_e.encoders.components import ComponentsConfig, text_shape
from nitro_e.interfaces import Architecture, LatentCodec, Model, Stage, TextEncoder
from nitro_e.sampling.samplers import SamplingConfig
from nitro_e.sizes import parse_sizes
from nitro_e.training.batch import BatchConfig, Split
from nitro_e.training.engine import EngineConfig

Settings = TypeVar("Settings", covariant=True)  # the stage's own config


class Run(Protocol[Settings]):
    """The recipe as a stage sees it. `recipe.RunConfig` is one."""

    @property
    def name(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def folder(self) -> Path: ...
    @property
    def init_from(self) -> str | None: ...
    @property
    def model(self) -> Architecture: ...
    @property
    def stage(self) -> Settings: ...
    @property
    def data(self) -> DataConfig | None: ...
    @property
    def batch(self) -> BatchConfig: ...
    @property
    def components(self) -> ComponentsConfig: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def sampling(self) -> SamplingConfig: ...
    @property
    def prompts(self) -> tuple[str, ...]: ...


class Parts(NamedTuple):
    """Everything a stage is made of besides its own config."""

    device: torch.device
    rank: int
    world: int
    split: Split  # of the global batch
    autocast: Callable[[], contextlib.AbstractContextManager]  # of the engine's precision
    codec: LatentCodec
    text: TextEncoder
    model: Model  # on the device
    flops: float  # of one forward pass of one sample
    latent_shape: tuple[int, int, int]  # (C, h, w) at the resolution that the model is trained at


def no_copies(config: Run) -> int:
    return 0


def always(config: Run) -> bool:
    return True


def every_step(config: Run) -> int:
    return 1


def given_sampling(config: Run) -> SamplingConfig:
    return config.sampling


@dataclass(frozen=True)
class StageKind(Generic[Settings]):
    """Everything that differs between the stages when a run is put together."""

    check: Callable[[Run[Settings]], None]  # refuses what is wrong across the whole recipe
    split: Callable[[Run[Settings], int], Split]  # of the global batch over so many processes
    build: Callable[[Run[Settings], Parts], tuple[Stage, Sequence[str]]]  # and prompts to show by default
    # lines of the summary: of the data, the number of processes, and the FLOPs of one forward pass of one sample
    summary: Callable[[Run[Settings], Data | None, int, float], list[str]]
    open_data: Callable[[Run[Settings]], Data] | None = None  # None: the stage reads none
    sampling: Callable[[Run[Settings]], SamplingConfig] = given_sampling  # what is stored with the weights
    further_copies: Callable[[Run[Settings]], float] = no_copies  # of the model's size, in a checkpoint
    reads_data: Callable[[Run[Settings]], bool] = always  # whether this recipe reads images
    # FLOPs of training on one sample, from those of a forward pass of the model and its image tokens; None: not counted
    training_flops: Callable[[Run[Settings], float, int], float] | None = None
    period: Callable[[Run[Settings]], int] = every_step  # steps between which a run can be saved


def latent_shapes(parts: Parts, buckets: Sequence[str]) -> tuple[tuple[int, int, int], ...]:
    """Return (C, h, w) of the latents that a stage without images draws: of each bucket, or of the square."""
    stride = parts.codec.stride
    shapes = [
        (parts.latent_shape[0], height // stride, width // stride) for height, width in parse_sizes(buckets)
    ]
    return tuple(shapes) or (parts.latent_shape,)


# ---- stages that read data


def split_of_data(config: Run, world: int) -> Split:
    return config.batch.split(world)


def open_run_data(config: Run, parts: Parts | None = None, extra: tuple[str, ...] = ()) -> Data:
    """Open the data as this run reads it; stored columns must come from the components it names.

    parts: of the run that is put together; None: only to look at the data.
    """
    assert config.data is not None  # RunConfig refuses a recipe without
    vision = config.components.vision is not None
    data = replace(config.data, global_batch=config.batch.global_)
    if parts is None:
        if data.buckets and data.global_batch is not None:  # more samples would be of several sizes
            data = replace(data, batch_size=min(data.batch_size, data.global_batch))
        return open_fitting(config, data, config.seed, config.name, None, vision, extra)
    data = replace(data, batch_size=parts.split.micro_batch)
    opened = open_fitting(config, data, config.seed, config.name, parts.latent_shape, vision, extra)
    opened.bad.report_to(config.folder / f"bad_samples.rank{parts.rank}.jsonl", parts.rank)
    return opened


def open_fitting(
    config: Run,
    data: DataConfig,
    seed: int,
    order: str,
    latent_shape: tuple[int, int, int] | None,
    vision: bool = False,
    extra: tuple[str, ...] = (),
    once: int | None = None,
) -> Data:
    """Open any data with the components of a run; ConfigError for stored columns that others have made.

    order: names the order, together with the seed; vision: whether its features, or images for them, are read too;
    once: see `open_data`.
    """
    opened = open_data(
        data,
        need_pixels=vision,
        use_text=True,
        use_features=vision,
        seed=seed,
        stage=order,
        latent_shape=latent_shape,
        text_length=text_shape(config.components.text)[1],
        extra=extra,
        once=once,
    )
    components, made = config.components, opened.encoders()
    for column, key, ours in (
        ("latents", "codec", components.codec),
        ("text", "text", components.text),
        ("features", "vision", components.vision),
        *((name, "text", components.text) for name in made if name.startswith("text_")),
    ):
        for shard, encoder in made.get(column, {}).items():
            theirs = encoder["name"]
            if ours is None or theirs is None:
                continue
            if theirs["name"] != ours.name:
                raise ConfigError(
                    f"components.{key} is '{ours.name}', but the stored {column} were made with '{theirs['name']}' "
                    f"({shard})"
                )
            # embeddings that were stored before there was a choice have none
            layers = theirs.get("layers", "last")
            if key == "text" and layers != components.text.layers:
                raise ConfigError(
                    f"components.text.layers is '{components.text.layers}', but the stored text was made with '{layers}' "
                    f"({shard}); set components.text.layers={layers}, or encode the text again"
                )
    if opened.text_format == "ragged" and config.model.attends_padding:
        raise ConfigError(
            "the model attends to padded positions of the text, but the stored text has none (ragged); "
            "encode it padded, or train with model.text_mask=real"
        )
    return opened


def data_summary(config: Run, data: Data | None, world: int, flops: float) -> list[str]:
    """Lines about the global batch and, if it is there, the data."""
    micro_batch, accumulate = config.batch.split(world)
    batch = micro_batch * accumulate * world
    samples = batch * config.engine.steps
    lines = [
        f"global batch         {batch} = {micro_batch} x {accumulate} (accumulate) x {world} (processes)",
        f"compute              {3 * flops * samples:.2e} FLOP for the model (forward and backward)",
    ]
    if data is not None:
        lines += [
            f"samples              {len(data):,} in the data, {samples / len(data):.2f} epochs",
            *(f"data                 {line}" for line in data.filtered),
            f"first sample         {first_sample(data)}",
        ]
    return lines


def first_records(data: Data) -> Records:
    """The first micro-batch of the run."""
    records = data.records()
    with contextlib.closing(records):
        return next(records)


def first_sample(data: Data) -> str:
    """The key, caption and stored arrays of the first sample of the run."""
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
