"""A run: the whole configuration tree, the rules across its parts, and how it becomes an engine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from nitro_e import checkpoint
from nitro_e.components import (
    ComponentConfig, build_codec, build_text_encoder, build_vision_encoder, codec_shape, text_shape,
)  # fmt: skip
from nitro_e.config import ConfigError, dump, to_dict
from nitro_e.data import Data, DataConfig, open_data
from nitro_e.engine import Engine, EngineConfig, Hook, make_accelerator
from nitro_e.interfaces import LatentCodec, TextEmbedding, TextEncoder
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.model.pretrained import load_pretrained
from nitro_e.pipeline import TextToImage, Use, image_grid
from nitro_e.randomness import seed_of
from nitro_e.sampling import SamplingConfig
from nitro_e.stages.flow_matching import FlowMatching, FlowMatchingConfig


@dataclass(frozen=True, kw_only=True)
class ComponentsConfig:
    """The frozen encoders."""

    codec: ComponentConfig
    text: ComponentConfig
    vision: ComponentConfig | None = None  # for REPA


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str
    run: str | None = None  # run directory; None: runs/NAME
    seed: int = 0
    init_from: str | None = None  # weights to start from: a run, checkpoint or model folder, with @model or @ema
    model: ModelConfig
    stage: FlowMatchingConfig
    data: DataConfig
    components: ComponentsConfig
    engine: EngineConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompts: tuple[str, ...] = ()  # of the sample grids; empty: the first captions of the data

    def __post_init__(self) -> None:
        repa = self.stage.repa
        if (repa is None) != (self.components.vision is None):
            raise ConfigError(
                "components.vision and stage.repa belong together: "
                + ("nothing reads the vision encoder; set components.vision: null" if repa is None else
                   "REPA needs a vision encoder; set components.vision or stage.repa: null")
            )  # fmt: skip
        if repa is not None and not (1 <= repa.tap <= self.model.depth and self.model.on_full_grid(repa.tap)):
            raise ConfigError(f"stage.repa.tap: {repa.tap} is not a block count whose tokens are the full grid; {self._taps()}")
        if self.sampling.resolution != self.data.resolution:
            raise ConfigError(
                f"sampling.resolution {self.sampling.resolution} differs from data.resolution {self.data.resolution}; "
                "set both to the pixels the model is trained at"
            )
        self._check_shapes()

    def _check_shapes(self) -> None:
        """What can be known of the components before they are loaded."""
        shape, (text_width, text_length) = codec_shape(self.components.codec), text_shape(self.components.text)
        if shape is not None:
            self._check_codec(*shape, text_length)
        if text_width not in (None, self.model.text_width):
            raise ConfigError(f"model.text_width is {self.model.text_width}, but '{self.components.text.name}' gives {text_width}")

    def _check_codec(self, channels: int, stride: int, text_length: int) -> None:
        if channels != self.model.latent_channels:
            raise ConfigError(
                f"model.latent_channels is {self.model.latent_channels}, but '{self.components.codec.name}' has {channels}"
            )
        side, rest = divmod(self.data.resolution, stride)
        if rest:
            raise ConfigError(f"data.resolution {self.data.resolution} is not a multiple of the codec's stride {stride}")
        self.model.check_grid(*self.model.latent_grid(side, side), text_length)

    def _taps(self) -> str:
        first, inside, last = self.model.groups
        return f"choose 1 to {first} or {first + inside + 1} to {self.model.depth}"

    @property
    def folder(self) -> Path:
        return Path(self.run or f"runs/{self.name}")


def summary(config: RunConfig) -> str:
    """The resolved config and what follows from it, without loading weights of components."""
    data = open_data(config.data, need_pixels=config.components.vision is not None, seed=config.seed, stage=config.name)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in EMMDiT(config.model).parameters())
    lines = [dump(config), f"parameters           {parameters:,}"]
    shape = codec_shape(config.components.codec)
    if shape is not None:
        side = config.data.resolution // shape[1]
        tokens = config.model.image_tokens(*config.model.latent_grid(side, side))
        lines.append(f"image tokens         {' / '.join(map(str, tokens))} in the three block groups")
    batch = config.data.batch_size * config.engine.accumulate
    lines += [
        f"batch                {batch} per process and step ({config.data.batch_size} x {config.engine.accumulate})",
        f"samples              {len(data):,} in the data, {batch * config.engine.steps / len(data):.2f} epochs per process",
        f"first sample         {next(data.records(0, micro_batches_per_step=1, rank=0, world=1)).keys[0]}",
        f"run directory        {config.folder}",
    ]
    return "\n".join(lines)


def build(config: RunConfig) -> Engine:
    """Load the components, open the data, and put the stage on an engine, resumed if the run directory has a checkpoint."""
    accelerator = make_accelerator(config.engine)
    device = accelerator.device
    vision = config.components.vision
    codec = build_codec(config.components.codec, device)
    side = config.data.resolution // codec.stride
    data = open_data(
        config.data, need_pixels=vision is not None, seed=config.seed, stage=config.name,
        latent_shape=(codec.channels, side, side),
    )  # fmt: skip
    text = build_text_encoder(config.components.text, device)
    if text.width != config.model.text_width:
        raise ConfigError(f"model.text_width is {config.model.text_width}, but the text encoder gives {text.width}")
    config._check_codec(codec.channels, codec.stride, text.length)
    model = build_model(config).to(device)
    model.gradient_checkpointing = config.engine.gradient_checkpointing
    stage = FlowMatching(
        config.stage, model, data, codec, text, build_vision_encoder(vision, device) if vision else None, device,
        forward_flops(config.model, side, text.length),
    )  # fmt: skip
    use = Use(codec=config.components.codec, text=config.components.text, sampling=config.sampling)
    prompts = config.prompts or first_captions(data, 8)
    config.folder.mkdir(parents=True, exist_ok=True)
    data.bad.report = config.folder / f"bad_samples.rank{accelerator.process_index}.jsonl"
    if accelerator.is_main_process:
        (config.folder / "config.yaml").write_text(dump(config))
    return Engine(
        config.engine, stage, accelerator, run=config.folder, seed=config.seed, use=to_dict(use), record=to_dict(config),
        hooks=(sample_grid_hook(config, codec, text, prompts),),
    )  # fmt: skip


def build_model(config: RunConfig) -> EMMDiT:
    """Fresh weights from the seed, or those of `init_from`, whose architecture must be the same."""
    if config.init_from is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(config.seed, "initial weights") % 2**32)
            return EMMDiT(config.model)
    model = load_pretrained(checkpoint.model_folder(config.init_from))
    if architecture(model.config) != architecture(config.model):
        theirs, ours = architecture(model.config), architecture(config.model)
        different = ", ".join(f"{key} {theirs[key]} there, {ours[key]} here" for key in ours if ours[key] != theirs[key])
        raise ConfigError(f"init_from '{config.init_from}' is another architecture: {different}")
    return model.float().train()


def forward_flops(config: ModelConfig, side: int, text_length: int) -> float:
    """Of one sample, 2 x multiply-add, counted by torch on a model without memory."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        tokens = torch.zeros(1, text_length, config.text_width)
        text = TextEmbedding(tokens, torch.ones(1, text_length, dtype=torch.bool))
        EMMDiT(config)(torch.zeros(1, config.latent_channels, side, side), torch.zeros(1), text)
    return float(counter.get_total_flops())


def architecture(config: ModelConfig) -> dict:
    """The fields that decide what the weights mean (initial values do not)."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key != "gate_init"}


def first_captions(data: Data, count: int) -> tuple[str, ...]:
    records = next(data.records(0, micro_batches_per_step=1, rank=0, world=1))
    return tuple(records.prompts[:count])


def sample_grid_hook(config: RunConfig, codec: LatentCodec, text: TextEncoder, prompts: tuple[str, ...]) -> Hook:
    """Fixed prompts and seeds, so that grids of different steps show the same pictures getting better."""

    def run(model: torch.nn.Module) -> dict:
        training = model.training
        pictures = TextToImage(model.eval(), codec, text, config.sampling)(prompts)
        model.train(training)
        return {"samples": image_grid(pictures, columns=min(8, len(pictures)))}

    return Hook(config.engine.sample_every, run)
