"""Score a model on a benchmark: draw its prompts, score the images, with confidence intervals.

    nitro-e evaluate shapes runs/mine                          600 held-out prompts of the offline domain
    nitro-e evaluate shapes runs/mine --guidance 1 2 3 --steps 4 20      a row per combination
    nitro-e evaluate shapes runs/mine --against runs/other     paired: the same prompts and noise
    nitro-e evaluate geneval nitro-e-512                       GenEval, with the detector from its hub
    nitro-e evaluate mine.txt runs/mine --reward hpsv2.1       your prompts, any rewards
    nitro-e evaluate dpg runs/mine --prompts dpg_bench.csv     other benchmarks: hpsv2, imagereward, parti, ...
    nitro-e evaluate fid runs/mine --reference 'coco-*.tar'    distance to real images; also fd-dinov2, cmmd

Prints a table and writes OUT/results.json and OUT/report.html, with images and what was detected in them. Images and
scores are kept under OUT: the same command goes on after an interruption, and draws nothing twice. On a CPU several
processes share the images (--processes). On several GPUs start it with torchrun, and once more without for the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nitro_e.cli import common as cli
from nitro_e.cli import processes
from nitro_e.config import ConfigError, environment_number

if TYPE_CHECKING:
    from nitro_e.evaluation.benchmarks import Benchmark


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    work = functools.cache(lambda: workload(options))
    started = processes.start("evaluate", options.processes, arguments, lambda count: work().fits(count))
    # when the processes have drawn and scored everything, this one finds it and makes the table
    return started or cli.run(lambda: command(options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "benchmark",
        help="shapes, geneval, hpsv2, imagereward, pickscore, clipscore, dpg, parti, emoji, fid, fd-dinov2, cmmd, or a "
        "file of prompts (.txt, .jsonl)",
    )
    parser.add_argument("checkpoint", help="a run directory, a checkpoint or a model folder; @ema or @model")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="CHECKPOINT", help="others to compare with, pair by pair"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="the benchmark's own prompts, where they are not shipped"
    )
    parser.add_argument(
        "--reference",
        metavar="PATH",
        help="fid, fd-dinov2, cmmd: real images, a folder or shards ('a-*.tar')",
    )
    parser.add_argument("--num", type=int, help="prompts (default: the benchmark's)")
    parser.add_argument("--per-prompt", type=int, metavar="N", help="images of each (default: likewise)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    parser.add_argument("--steps", type=int, nargs="+", help="default: what the weights came with, as next")
    parser.add_argument("--guidance", type=float, dest="guidance_scale", nargs="+", metavar="SCALE")
    cli.guidance_flags(parser, nargs="+")
    parser.add_argument("--sampler", nargs="+", metavar="NAME", help=cli.SAMPLERS)
    cli.noise_search_flags(parser)
    parser.add_argument("--batch-size", type=int, default=64)
    cli.dtype_flag(parser, "of the model's arithmetic; default: bfloat16, on a CPU without AVX-512 float32")
    parser.add_argument("--device", type=cli.device, help="default: cuda, mps or cpu, the first there is")
    cli.component_flags(
        parser, codec="the codec's files, a local folder or hub id", text="the text encoder's files, likewise"
    )
    cli.download_flag(parser)
    parser.add_argument("--reward", action="append", default=[], help="for a file of prompts; several times")
    parser.add_argument(
        "--reward-path", metavar="FOLDER", help="the reward's weights, a local folder or hub id"
    )
    parser.add_argument("--reward-option", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--draw-only",
        action="store_true",
        help="draw and keep the images; the same command without it scores them",
    )
    parser.add_argument("--rejudge", action="store_true", help="score again what was scored before")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: outputs/evaluate/BENCHMARK-CHECKPOINT"
    )
    processes.flag(parser)
    return parser.parse_args(arguments)


def workload(options: argparse.Namespace) -> processes.Workload:
    """Count what is to be drawn, as processes share it; nothing is shared if networks score, or score again."""
    from nitro_e.sampling.sources import bytes_on_disk

    chosen = benchmark_of(options)
    networks = any(reward.name != "shapes" for reward in chosen.rewards)
    networks |= options.optimize_noise not in (None, "shapes")
    if options.rejudge or (networks and not options.draw_only):
        return processes.Workload(0, 0, None)
    images = len(chosen.load_prompts()) * chosen.per_prompt
    sources = [options.checkpoint, *options.against]
    sizes = [bytes_on_disk(source, codec=options.codec, text=options.text) for source in sources]
    known = [size for size in sizes if size is not None]
    return processes.Workload(
        images=images * len(sources) * math.prod(map(len, grid_of(options).values())),
        batches=-(-images // max(options.batch_size, 1)),
        weights=max(known) if len(known) == len(sizes) else None,
    )


def benchmark_of(options: argparse.Namespace) -> Benchmark:
    from nitro_e.evaluation.benchmarks import benchmark

    prompts = (options.benchmark, options.num, options.per_prompt)
    rewards = (options.reward, options.reward_path, options.reward_option)
    return benchmark(*prompts, *rewards, prompts=options.prompts, reference=options.reference)


def grid_of(options: argparse.Namespace) -> dict[str, list]:
    """Return the values of every sampling setting that was given."""
    names = ("guidance_scale", "steps", "sampler", "guidance", "guidance_rescale")
    return {name: getattr(options, name) for name in names if getattr(options, name)}


def command(options: argparse.Namespace) -> None:
    from nitro_e.evaluation.evaluate import Options, as_text, default_dtype, draw, evaluate
    from nitro_e.interfaces import DistContext
    from nitro_e.record.environment import default_device

    chosen, grid = benchmark_of(options), grid_of(options)
    sources = [options.checkpoint, *options.against]
    out = options.out or Path("outputs/evaluate") / f"{chosen.name}-{Path(options.checkpoint).name}"
    options.noise_search = cli.noise_search_config(options)
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options)}
    device = options.device or default_device()
    given |= {"device": device, "dtype": options.dtype or default_dtype(device)}
    given |= {"allow_download": tuple(options.allow_download)}
    share = DistContext(environment_number("RANK", 0), environment_number("WORLD_SIZE", 1))
    if options.rejudge and share.world_size > 1:
        raise ConfigError(
            "--rejudge: one process scores again; give --processes 1, or leave the launcher out"
        )
    if options.draw_only or share.world_size > 1:
        folders = draw(chosen, sources, grid, Options(**given), out, score=not options.draw_only, share=share)
        if processes.PARENT not in os.environ:
            for folder in folders:
                print(f"drawn{'' if share.world_size == 1 else ', a part'}: {folder}")
        return
    evaluation = evaluate(chosen, sources, grid, Options(**given), out)
    print(as_text(evaluation))
    print(f"images with what was detected: {out / 'report.html'}; numbers: {out / 'results.json'}")
