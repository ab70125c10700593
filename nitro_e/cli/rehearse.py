"""Rehearse a recipe at full size before there are images, weights or GPUs to spend.

    nitro-e rehearse configs/nitro_e_512/1_pretrain.yaml                    the model and encoders at their real size
    nitro-e rehearse configs/nitro_e_512/4_ladd.yaml --batch 1 --steps 2 --small-encoders      in little memory
    nitro-e rehearse configs/nitro_e_512/1_pretrain.yaml --computed latents text features         nothing is stored

The last steps of the recipe's own training run, checkpoint included, on random images and with random weights of the
released shapes: all schedules are over, so that everything it ever computes is. Only batch and steps are other ones; the
rewards of stage 3 are replaced by the images' brightness, and with a smaller batch it draws as few images as will do.
Prints the seconds of a step and of its parts, memory, the checkpoint's size, the bytes per second that the data must
come with, and what the whole stage takes on --gpus such devices. Parts are measured one after the other, in steps of
their own: on a GPU the step is shorter than their sum, because copies and encoders run beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import io
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nitro_e.cli import common as cli
from nitro_e.cli.benchmark.report import finish
from nitro_e.cli.benchmark.report import flags as report_flags
from nitro_e.config import ConfigError, load, to_dict
from nitro_e.data import DataConfig
from nitro_e.data.making.writer import write_shard
from nitro_e.data.prompts import FILES, PromptsConfig
from nitro_e.encoders.components import ComponentConfig, codec_shape, text_shape, vision_width
from nitro_e.model import describe
from nitro_e.model.pretrained import save_pretrained
from nitro_e.randomness import seeded
from nitro_e.record.environment import device_name
from nitro_e.rewards import RewardConfig, reward
from nitro_e.sampling.sources import Use
from nitro_e.stages import recipe
from nitro_e.stages.grpo import GRPOConfig
from nitro_e.stages.recipe import RunConfig
from nitro_e.training.batch import BatchConfig
from nitro_e.training.engine import Engine
from nitro_e.training.meters import peak_teraflops

COLUMNS = ("latents", "text", "features")  # what shards may hold instead of the images


@reward
def brightness(pixels: torch.Tensor, prompts: Sequence[str], info: Sequence[dict]) -> torch.Tensor:
    """Score images by their mean, (B,): a reward without weights."""
    return pixels.flatten(1).mean(dim=1)


@dataclasses.dataclass
class Rehearsal:
    """What a rehearsal measured; sizes in bytes, times in seconds."""

    stage: str
    device: str
    parameters: int
    samples: int  # (stage 3: rows) of an optimiser step
    batch: int  # of them at a time
    computed: list[str]  # columns that are not stored
    step: float  # median, as it is; where steps differ (stages 3 and 4), the mean over those that belong together
    parts: dict[str, float]  # medians, measured one after the other
    teraflops: float  # of the model, forward and backward
    mfu: float | None  # share of the data sheet's rate, where that is known
    waits: float | None  # times that the host waited for the device in a step; None: there is no GPU
    checkpoint: int
    sample_bytes: int  # stored, of a sample
    steps: int  # of the whole stage
    global_batch: int

    def hours(self, gpus: int) -> float:
        """Project the whole stage on so many devices like this one, without what they lose by talking."""
        return self.steps * self.global_batch / gpus * self.step / self.samples / 3600


class Clock:
    """Adds up the seconds of named parts while it is on; a part does not count what a part inside it took.

    cpu_time: count the seconds that this process computes, not those that pass.
    """

    def __init__(self, device: torch.device, cpu_time: bool = False) -> None:
        self.device, self.cpu_time, self.on = device, cpu_time, False
        self.seconds: dict[str, float] = {}
        self._inside = [0.0]

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.cpu_time else time.perf_counter()

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function whose calls belong to a part."""

        def timed(*arguments: Any, **options: Any) -> Any:
            if not self.on:
                return function(*arguments, **options)
            self._inside.append(0.0)
            start = self.now()
            result = function(*arguments, **options)
            whole, inside = self.now() - start, self._inside.pop()
            self._inside[-1] += whole
            self.seconds[name] = self.seconds.get(name, 0.0) + whole - inside
            return result

        return timed


def rehearse(
    config: RunConfig,
    batch: int,
    steps: int,
    computed: Sequence[str],
    folder: Path,
    *,
    small: bool,
    cpu_time: bool,
) -> Rehearsal:
    """Train `config` for 1 + 2 `steps` steps in `folder`, of which the first warms up and the last are taken apart.

    Where steps differ and several belong together, so many times as many.
    """
    cycle = math.lcm(config.stage_kind.period(config), getattr(config.stage, "every", 1))
    first = config.engine.steps // cycle * cycle
    tried = on_random_numbers(config, batch, first + cycle * (1 + 2 * steps), computed, small, folder)
    if getattr(config.stage, "teacher", None) is not None:
        use = Use(codec=tried.components.codec, text=tried.components.text, sampling=tried.sampling)
        with seeded(tried.seed, "teacher"):
            # what a student alone has, the teacher has not
            teacher = dataclasses.replace(tried.model, **tried.model.ADOPTED).build()
            for parameter in teacher.parameters():  # a last layer of zeros would teach nothing
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.02)
            save_pretrained(teacher, folder / "teacher", to_dict(use))
            del teacher
    engine = recipe.build(tried)
    engine.state.step = first
    clock = Clock(engine.accelerator.device, cpu_time)
    if cpu_time and clock.device.type != "cpu":
        raise ConfigError(f"--cpu-time: what {clock.device} computes is not counted; leave it out")
    whole, parts, waits = measure(engine, clock, cycle, steps)
    if not engine.run():
        raise KeyboardInterrupt  # a signal has ended it early
    size = engine.global_batch
    seconds = statistics.median(whole)
    teraflops = 3 * engine.stage.forward_flops * size / seconds / 1e12
    peak = peak_teraflops(clock.device)
    last = folder / "run" / "checkpoints"
    shard = next(iter(folder.glob("*.tar")), None)
    global_batch = config.batch.global_
    if global_batch is None:  # stage 3: all rows of an update
        split = config.stage_kind.split(config, 1)
        global_batch = split.micro_batch * split.accumulate
    return Rehearsal(
        stage=config.name,
        device=device_name(),
        parameters=describe.total(config.model).parameters,
        samples=size,
        batch=engine.stage.batch_size,
        computed=list(computed),
        step=seconds,
        parts={name: statistics.median(part[name] for part in parts) for name in parts[0]},
        teraflops=teraflops,
        mfu=None if peak is None else teraflops / peak,
        waits=statistics.median(waits) if waits else None,
        checkpoint=sum(path.stat().st_size for path in last.rglob("*") if path.is_file()),
        sample_bytes=0 if shard is None else shard.stat().st_size // samples_for(batch),
        steps=config.engine.steps,
        global_batch=global_batch,
    )


def measure(
    engine: Engine, clock: Clock, cycle: int, steps: int
) -> tuple[list[float], list[dict[str, float]], list[float]]:
    """Put clocks on the parts of an engine; returns lists that its run will fill.

    They are the seconds of whole steps, of the parts of others, and how often the host waited for a GPU in a whole step.
    cycle: the number of steps that belong together, whose mean is one entry.
    """
    whole: list[float] = []
    parts: list[dict[str, float]] = []
    waits: list[float] = []
    stage: Any = engine.stage
    first, total = engine.step, 0.0
    for holder in (stage, getattr(stage, "source", None)):
        for name, method in (("codec", "encode_pixels"), ("text", "encode"), ("vision", "features")):
            encoder = getattr(holder, name, None)
            if hasattr(encoder, method):
                setattr(encoder, method, clock.of(f"encode: {name}", getattr(encoder, method)))
    for phase in stage.phases:
        phase.loss = clock.of("forward", phase.loss)
    accelerator: Any = engine.accelerator
    accelerator.backward = clock.of("backward", accelerator.backward)
    batches, train = stage.batches, engine._train_step

    def timed_batches(*arguments: Any) -> Iterator[Any]:
        stream = batches(*arguments)
        following = clock.of("rollout" if hasattr(stage, "layout") else "wait", lambda: next(stream))
        while True:
            yield following()

    def timed_step(stream: Iterator[Any]) -> None:
        nonlocal total
        done = engine.step - first
        clock.on = done >= cycle * (1 + steps)
        if done % cycle == 0:
            total, clock.seconds = 0.0, {}
        start = clock.now()
        with host_waits(clock.device) as waited:
            train(stream)
        total += clock.now() - start
        if clock.device.type == "cuda" and cycle <= done and not clock.on:
            waits.append(sum("synchroniz" in str(warning.message) for warning in waited))
        if (done + 1) % cycle or done < cycle:  # the first compiled and allocated
            return
        if clock.on:
            rest = total - sum(clock.seconds.values())
            each = {**clock.seconds, "clip, optimiser, averages": rest}
            parts.append({name: seconds / cycle for name, seconds in each.items()})
        else:
            whole.append(total / cycle)

    stage.batches = timed_batches
    engine._train_step = timed_step  # type: ignore[method-assign]
    return whole, parts, waits


@contextlib.contextmanager
def host_waits(device: torch.device) -> Iterator[list[warnings.WarningMessage]]:
    """List every time that the host waits for a GPU in the block, as torch warns of it; nothing on a CPU."""
    if device.type != "cuda":
        yield []
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")


def on_random_numbers(
    config: RunConfig, batch: int, steps: int, computed: Sequence[str], small: bool, folder: Path
) -> RunConfig:
    """Return the recipe on random shards in `folder`, with random weights, for a few steps."""
    weights = "random-small" if small else "random"
    components = {
        kind: dataclasses.replace(part, path=weights)
        for kind in COLUMNS_OF
        if isinstance(part := getattr(config.components, kind), ComponentConfig)
    }
    stage = config.stage
    if hasattr(stage, "teacher"):
        stage = dataclasses.replace(stage, teacher=str(folder / "teacher"))
    if hasattr(stage, "rewards"):
        stage = dataclasses.replace(stage, rewards=(RewardConfig(name=f"{__name__}:brightness", weight=1.0),))
    if any(source.endswith(FILES) for source in getattr(getattr(stage, "prompts", None), "sources", ())):
        lines = [f"a photo of {number} red circles" for number in range(samples_for(batch))]
        (folder / "prompts.txt").write_text("\n".join(lines) + "\n")
        stage = dataclasses.replace(stage, prompts=PromptsConfig(source=str(folder / "prompts.txt")))
    if isinstance(stage, GRPOConfig) and batch < (config.batch.per_device or batch):
        images = batch // math.gcd(batch, stage.layout(1, 1).steps)  # of an update, for whole micro-batches
        stage = dataclasses.replace(stage, groups=1, group_size=max(images, 2) * stage.updates)
    data = None
    if config.data is not None:
        write_random_shard(folder / "random-000000.tar", config, samples_for(batch), computed)
        data = DataConfig(shards=(str(folder / "*.tar"),), resolution=config.data.resolution, workers=1)
    rows = config.batch.global_ is None
    return dataclasses.replace(
        config,
        run=str(folder / "run"),
        init_from=None,
        data=data,
        batch=BatchConfig(global_=None if rows else batch, per_device=batch),
        components=dataclasses.replace(config.components, **components),
        stage=stage,
        evaluation=None,
        validation=None,
        prompts=("a photo of a red circle",),
        engine=dataclasses.replace(
            config.engine,
            steps=steps,
            save_every=steps,
            keep_every=0,
            log_every=steps,
            sample_every=0,
            tracker="none",
        ),
    )


COLUMNS_OF = {"codec": "latents", "text": "text", "vision": "features"}


def samples_for(batch: int) -> int:
    return max(2 * batch, 8)


def write_random_shard(path: Path, config: RunConfig, count: int, computed: Sequence[str]) -> None:
    """Write `count` samples with what the recipe's shards would hold, but for the `computed` columns."""
    assert config.data is not None
    random, components, side = np.random.default_rng(0), config.components, config.data.resolution
    shape, (width, length) = codec_shape(components.codec), text_shape(components.text)
    features = None if components.vision is None else vision_width(components.vision)
    if shape is None or width is None:
        raise ConfigError("components: a rehearsal takes the default weights' shapes; leave out `path`")
    grid = side // shape[1]
    rows, columns = config.model.latent_grid(grid, grid)
    pair = hasattr(config.stage, "teacher")

    def normal(*size: int) -> np.ndarray:
        return random.standard_normal(size, dtype=np.float32).astype(np.float16)

    def sample(number: int) -> dict[str, Any]:
        made: dict[str, Any] = {
            "__key__": f"{number:06d}",
            "txt": "a photo of a red circle left of a blue square",
        }
        if "latents" not in computed:
            made["npy"] = normal(shape[0], grid, grid)
        if pair:
            made["noise.npy"] = normal(shape[0], grid, grid)
        if "text" not in computed:
            made |= {"text.npy": normal(length, width), "mask.npy": np.ones(length, bool)}
        if features is not None and "features" not in computed:
            made["features.npy"] = normal(rows * columns, features)
        if "latents" in computed or (features is not None and "features" in computed):
            image = Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8))
            image.save(content := io.BytesIO(), "jpeg")
            made["jpg"] = content.getvalue()
        return made

    write_shard(path, map(sample, range(count)))


def table(found: Rehearsal, gpus: int, price: float | None) -> str:
    """Write a rehearsal as lines for people."""
    rate = found.samples / found.step
    hours = found.hours(gpus)
    lines = [
        f"{found.stage}: {found.parameters:,} parameters, batch {found.samples}, {found.batch} at a time, on {found.device}; "
        f"computed in the step: {', '.join(found.computed) or 'nothing'}",
        f"step                 {found.step:.3f} s, {rate:.3g} samples/s, {found.teraflops:.3g} TFLOP/s"
        + ("" if found.mfu is None else f", MFU {found.mfu:.0%}")
        + ("" if found.waits is None else f"; the host waited {found.waits:g} times in a step"),
    ]
    total = sum(found.parts.values())
    lines += [f"  {name:<27}{seconds:8.3f} s {seconds / total:6.1%}" for name, seconds in found.parts.items()]
    lines.append(f"checkpoint           {found.checkpoint / 1e9:.2f} GB")
    if found.sample_bytes:
        lines.append(
            f"data                 {found.sample_bytes / 1e3:,.0f} KB a sample, {rate * found.sample_bytes / 1e6:,.1f} MB/s "
            f"for one such device, {gpus * rate * found.sample_bytes / 1e6:,.1f} MB/s for {gpus}"
        )
    lines.append(
        f"whole stage          {found.steps:,} steps of {found.global_batch:,}: {hours:,.1f} hours on {gpus} such devices, "
        f"{hours * gpus:,.0f} device hours"
        + ("" if price is None else f", {hours * gpus * price:,.0f} in money")
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML recipe, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--steps",
        type=cli.whole(1, 10_000),
        default=3,
        metavar="N",
        help="that are measured, each in two ways",
    )
    parser.add_argument(
        "--batch",
        type=cli.whole(1, 65536),
        metavar="N",
        help="samples (stage 3: rows) at a time; default: the recipe's on a GPU, 1 on a CPU",
    )
    parser.add_argument(
        "--computed",
        nargs="*",
        choices=COLUMNS,
        default=None,
        help="what the shards do not hold; default: text for stage 4, else nothing",
    )
    parser.add_argument(
        "--small-encoders", action="store_true", help="of the same outputs, with little inside"
    )
    parser.add_argument("--compile", action="store_true", help="what the recipe compiles: minutes on a CPU")
    parser.add_argument(
        "--cpu-time", action="store_true", help="seconds of computing, of one thread: for a busy CPU"
    )
    parser.add_argument(
        "--gpus", type=cli.whole(1, 100_000), default=8, metavar="N", help="of the projection"
    )
    parser.add_argument("--price", type=cli.real(0), metavar="X", help="of an hour of one device")
    report_flags(parser)
    options = parser.parse_intermixed_args(arguments)

    def command() -> None:
        found = run(options)
        print(table(found, options.gpus, options.price))
        finish(dataclasses.asdict(found), options, "cuda" if torch.cuda.is_available() else "cpu")

    return cli.run(command)


def run(options: argparse.Namespace) -> Rehearsal:
    """Rehearse what the arguments say, in a temporary folder."""
    config = load(RunConfig, options.config, options.overrides)
    if options.cpu_time:
        torch.set_num_threads(1)
    if not options.compile:
        config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, compile=False))
    on_gpu = torch.cuda.is_available()
    batch = options.batch or (on_gpu and (config.batch.per_device or config.batch.global_)) or 1
    computed = options.computed
    if computed is None:
        computed = ["text"] if hasattr(config.stage, "teacher") else []
    with tempfile.TemporaryDirectory(prefix="nitro-e-rehearsal-") as folder:
        how = {"small": options.small_encoders, "cpu_time": options.cpu_time}
        found = rehearse(config, batch, options.steps, computed, Path(folder), **how)
    gc.collect()  # the engine is part of a cycle, and the next one may not fit beside it
    return found
