"""Measure what the engine costs per step over a bare training loop, on one batch that is already there.

    nitro-e benchmark engine [--presets micro-8 tiny-8] [--batch 32] [--json FILE]
    nitro-e benchmark engine --recipe configs/nitro_e_512/1_pretrain.yaml --device cuda --compile --recipe-batch 64 256

The bare loop is forward, backward, clip, step. The same model, batch and fused AdamW then train in the engine: once with
the bare loop's own loss (what the engine itself costs), once with the flow-matching stage (its noise per sample, caption
drop and loss by timestep too). Measured are windows of `log_every` steps, each with one report; the variants take turns,
and the best window of each counts. The target is about CPU time, in which other jobs on the machine hardly show. Data,
trackers, averages and saving are left out.

--recipe measures whole steps of a real recipe instead, on random images and weights (nitro-e rehearse): as they are, and
split into waiting, encoding, forward, backward and the rest, by what the shards hold and what the step computes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitro_e.cli import common as cli
from nitro_e.cli.benchmark.report import finish
from nitro_e.cli.benchmark.report import flags as report_flags
from nitro_e.config import ConfigError, from_dict
from nitro_e.interfaces import Batch, TextEmbedding
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.randomness import SampleRandom
from nitro_e.record.progress import bar
from nitro_e.sampling import flow
from nitro_e.stages.flow_matching import FlowMatching, FlowMatchingConfig
from nitro_e.training.engine import Engine, EngineConfig, make_accelerator
from nitro_e.training.optim import OptimConfig

TARGET = 1.10  # of the bare loop's CPU time
LOG_EVERY = 20
OPTIM = OptimConfig(warmup=0)
Clock = list[tuple[float, float]]  # wall and CPU seconds at the start of every step


def make_batch(config: ModelConfig, size: int) -> Batch:
    """Latents of the preset's grid with 16 text tokens."""
    side = config.base_grid * config.patch_size
    text = TextEmbedding(torch.randn(size, 16, config.text_width), torch.ones(size, 16, dtype=torch.bool))
    latents = torch.randn(size, config.latent_channels, side, side)
    return Batch(latents=latents, text=text, prompts=[""] * size, keys=[""] * size)


def bare_loss(model: nn.Module, batch: Batch) -> Tensor:
    noise = torch.randn_like(batch.latents)
    t = torch.sigmoid(torch.randn(len(noise)))
    velocity = model(flow.interpolate(batch.latents, noise, t), t, batch.text)
    return F.mse_loss(velocity, flow.velocity_target(batch.latents, noise))


def bare_loop(model: EMMDiT, batch: Batch, steps: int) -> Clock:
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIM.lr,
        betas=OPTIM.betas,
        eps=OPTIM.eps,
        weight_decay=OPTIM.weight_decay,
        fused=True,
    )
    clock: Clock = []
    for _ in range(steps):
        clock.append((time.perf_counter(), time.process_time()))
        bare_loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return clock


class Premade(FlowMatching):
    """The flow-matching stage on one batch; notes when each is asked for."""

    def __init__(self, model: EMMDiT, batch: Batch) -> None:
        size, null = len(batch.latents), batch.text.take(slice(1))
        data = SimpleNamespace(
            config=SimpleNamespace(batch_size=size), fingerprint=dict, bad=(), null_text=lambda: null
        )
        config = FlowMatchingConfig(optim=OPTIM)
        super().__init__(
            config,
            model,
            data,
            codec=None,
            text=None,
            vision=None,
            seed=0,
            device=torch.device("cpu"),
            forward_flops=1.0,
        )
        self.batch, self.clock = batch, []

    def batches(self, step: int, rank: int, world: int, accumulate: int) -> Iterator[Batch]:
        while True:
            self.clock.append((time.perf_counter(), time.process_time()))
            yield self.batch


class PremadeBare(Premade):
    """The same with the loss of the bare loop."""

    def loss(self, net: nn.Module, batch: Batch, rng: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        return bare_loss(lambda *inputs: net(*inputs)[0], batch), {}


def engine_loop(model: EMMDiT, batch: Batch, steps: int, stage_class: type[Premade]) -> Clock:
    never = 10**9
    config = EngineConfig(
        steps=steps,
        precision="float32",
        log_every=LOG_EVERY,
        save_every=never,
        sample_every=0,
        tracker="none",
    )
    stage = stage_class(model, batch)
    with tempfile.TemporaryDirectory(prefix="benchmark-engine-") as folder:
        engine = Engine(config, stage, make_accelerator(config), run=Path(folder), seed=0, use={}, record={})
        engine.run()
    return stage.clock


VARIANTS: dict[str, Callable[[EMMDiT, Batch, int], Clock]] = {
    "bare loop": bare_loop,
    "engine, the same loss": lambda *arguments: engine_loop(*arguments, PremadeBare),
    "engine, flow matching": lambda *arguments: engine_loop(*arguments, Premade),
}


def measure(preset: str, batch_size: int, windows: int, rounds: int) -> dict[str, dict[str, float]]:
    """{variant: {"wall", "cpu": best milliseconds per step}}"""
    config = from_dict(ModelConfig, {"preset": preset, "latent_channels": 24, "text_width": 128})
    best = {name: {"wall": float("inf"), "cpu": float("inf")} for name in VARIANTS}
    for _ in bar(range(rounds), desc=preset, brief=True):
        for name, loop in VARIANTS.items():
            torch.manual_seed(0)
            clock = loop(EMMDiT(config), make_batch(config, batch_size), (windows + 1) * LOG_EVERY + 1)
            for start in range(LOG_EVERY, len(clock) - LOG_EVERY, LOG_EVERY):  # the first window warms up
                for index, kind in enumerate(("wall", "cpu")):
                    seconds = clock[start + LOG_EVERY][index] - clock[start][index]
                    best[name][kind] = min(best[name][kind], 1000 * seconds / LOG_EVERY)
    return best


def report(found: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [f"{'':32} {'wall ms/step':>12} {'ratio':>7} {'CPU ms/step':>12} {'ratio':>7}"]
    for preset, variants in found.items():
        bare = variants["bare loop"]
        for name, times in variants.items():
            wall, cpu = times["wall"] / bare["wall"], times["cpu"] / bare["cpu"]
            verdict = "" if times is bare else f"  target {TARGET:.2f} {'met' if cpu <= TARGET else 'MISSED'}"
            lines.append(
                f"{preset + ', ' + name:32} {times['wall']:12.2f} {wall:7.3f} {times['cpu']:12.2f} {cpu:7.3f}{verdict}"
            )
    return "\n".join(lines)


INPUTS = {"all stored": [], "text computed": ["text"], "text and features computed": ["text", "features"],
          "all computed": ["latents", "text", "features"]}  # fmt: skip


def whole_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Measure whole steps of a recipe by what the shards hold; prints a table of milliseconds."""
    from nitro_e.cli.rehearse import run

    there = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device not in (None, there):
        raise ConfigError(
            f"--device {options.device}: training here runs on {there}; hide GPUs with CUDA_VISIBLE_DEVICES="
        )
    rows = []
    for batch in options.recipe_batch or [None]:
        for name, computed in INPUTS.items():
            given = {"config": options.recipe, "overrides": [], "batch": batch, "computed": computed}
            shared = {
                key: getattr(options, key) for key in ("steps", "compile", "small_encoders", "cpu_time")
            }
            found = run(argparse.Namespace(**given, **shared))
            parts = {part: 1000 * seconds for part, seconds in found.parts.items()}
            rate = {
                "samples_per_s": found.samples / found.step,
                "tflops": found.teraflops,
                "mfu": found.mfu,
                "waits": found.waits,
            }
            row = {"inputs": name, "batch": found.batch, "step_ms": 1000 * found.step, **rate, "ms": parts}
            stored = (
                row if not computed else next(r for r in reversed(rows) if r["inputs"] == next(iter(INPUTS)))
            )
            row["times_all_stored"] = row["step_ms"] / stored["step_ms"]
            rows.append(row)
            shown = ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
            mfu = "" if found.mfu is None else f", MFU {found.mfu:.1%}"
            mfu += "" if found.waits is None else f", the host waited {found.waits:g} times"
            print(
                f"batch {found.batch}, {name}: {row['step_ms']:.1f} ms a step ({row['times_all_stored']:.2f} times all stored), {rate['samples_per_s']:.3g} samples/s, "
                f"{found.teraflops:.3g} TFLOP/s{mfu}\n  one after the other: {shown}",
                flush=True,
            )
    return {"recipe": options.recipe, "rows": rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["micro-8", "tiny-8"], help="of ModelConfig")
    parser.add_argument("--batch", type=cli.whole(1, 65536), default=32, metavar="N")
    parser.add_argument(
        "--windows",
        type=cli.whole(1),
        default=2,
        metavar="N",
        help=f"of {LOG_EVERY} steps, per variant and round",
    )
    parser.add_argument("--rounds", type=cli.whole(1), default=3, metavar="N")
    parser.add_argument("--threads", type=cli.whole(1, 1024), default=1, metavar="N", help="of torch")
    parser.add_argument(
        "--recipe",
        metavar="CONFIG",
        help="instead: whole steps of a recipe at full size, split into parts, with stored and with computed inputs",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="of --recipe; default: cuda if there is one"
    )
    parser.add_argument("--steps", type=cli.whole(1, 10_000), default=10, metavar="N", help="of --recipe")
    parser.add_argument(
        "--recipe-batch",
        type=cli.whole(1, 65536),
        nargs="+",
        metavar="N",
        help="of --recipe; default: the recipe's on a GPU, 1 on a CPU",
    )
    parser.add_argument("--compile", action="store_true", help="of --recipe: what it compiles")
    parser.add_argument("--small-encoders", action="store_true", help="of --recipe: with little inside")
    parser.add_argument(
        "--cpu-time", action="store_true", help="of --recipe: seconds of computing, for a busy CPU"
    )
    report_flags(parser)
    options = parser.parse_args(argv)

    def command() -> None:
        if options.recipe is not None:
            found = whole_steps(options)
            finish(found, options, options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            return
        torch.set_num_threads(options.threads)
        found = {
            preset: measure(preset, options.batch, options.windows, options.rounds)
            for preset in options.presets
        }
        print(report(found))
        finish(found, options)

    return cli.run(command)
