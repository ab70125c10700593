"""Make shards of synthetic pairs from prompts, for distillation and for synthetic parts of a mixture.

    nitro-e synthesize runs/pretrain-512@ema --prompts prompts.txt --per-prompt 4 --out data/synthetic
    torchrun --nproc_per_node 8 -m nitro_e.cli synthesize runs/pretrain-512 --prompts captions.jsonl --out data/synthetic
    nitro-e synthesize --pipeline black-forest-labs/FLUX.1-schnell --prompts p.txt --steps 4 --resolution 512 --out data/flux

Members of a sample in `synth-*.tar`:
    npy         (C, h, w) float16 final latent, raw like all latents in shards
    noise.npy   (C, h, w) float16 noise that the sampler started with (ours only)
    trajectory.npy   with --trajectory T1,T2,... (ours only): (len, C, h, w) float16 states at these times, scaled
                like the noise; each must be on the sampler's grid (--grid linear --steps 20 has .75, .5 and .25)
    txt, json   the prompt; its seed, width, height, the settings, and what the prompts file says about it
    text.npy, mask.npy   with --text-embeddings (ours only)
    jpg         with --images, and always for diffusers pipelines; their latents are those of --codec
The seed of image k of a prompt is a hash of (prompt, k, --seed), so that neither batches nor ranks matter.
The same command continues; OUT/preview.png shows the first images. An image whose latent is not finite, or
outside --max-abs or --std (of the scaled latent; 12 and .6,1.6 suit DC-AE) is left out and counted. So is one that a
reward scores below its bound: --min-reward shapes=1 keeps images that are right; scores are stored with the rest. For
distillation give --grid linear: the released grid spends its last step on almost nothing.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch

from nitro_e.cli import common as cli
from nitro_e.cli import processes
from nitro_e.cli.data import from_flags, job_arguments, rank_device
from nitro_e.config import ConfigError
from nitro_e.data.making.jobs import JobConfig
from nitro_e.data.making.synthesis import (
    DiffusersGenerator,
    Extras,
    Generator,
    Limits,
    OwnGenerator,
    RewardFilter,
    read_jobs,
    synthesize,
)
from nitro_e.data.prompts import GENERATORS
from nitro_e.encoders.components import build_codec, chosen_component
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.sources import bytes_on_disk


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", help="run, checkpoint or model folder (@ema, @model)")
    parser.add_argument(
        "--pipeline",
        metavar="NAME|FOLDER",
        help="draw with a diffusers text-to-image pipeline in place of our own models",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        help=f"text file with one per line, a table, or {', '.join(GENERATORS)}",
    )
    parser.add_argument("--prompt-column", default="prompt", help="of a table")
    parser.add_argument("--limit", type=cli.whole(1), metavar="N", help="only so many prompts")
    parser.add_argument(
        "--per-prompt", type=cli.whole(1, 10_000), default=1, metavar="N", help="images of each prompt"
    )
    parser.add_argument(
        "--seed", type=cli.seed, default=0, metavar="N", help="another one gives other images"
    )
    parser.add_argument("--negative-prompt", default="", type=cli.text, help="ours only")
    parser.add_argument("--steps", type=int, help="default: what the weights came with")
    parser.add_argument(
        "--guidance", type=cli.real(0), metavar="SCALE", help="default: what the weights came with"
    )
    parser.add_argument("--sampler", help=f"ours only: {cli.SAMPLERS}")
    parser.add_argument("--grid", choices=("released", "linear"), help="ours only: the sampler's times")
    parser.add_argument("--resolution", type=int, help="pixels per side")
    parser.add_argument(
        "--height", type=cli.whole(1, 65536), metavar="PIXELS", help="for aspect buckets: a folder per size"
    )
    parser.add_argument("--width", type=cli.whole(1, 65536), metavar="PIXELS")
    cli.component_flags(
        parser,
        codec="the codec's files; --pipeline: a name or NAME=FOLDER, which stores the latents of the images",
        text="the text encoder's files (ours only)",
    )
    cli.download_flag(parser)
    parser.add_argument("--images", action="store_true", help="store the images too (--pipeline: always)")
    parser.add_argument(
        "--text-embeddings", action="store_true", help="store the prompts' embeddings (ours only)"
    )
    parser.add_argument(
        "--trajectory", type=numbers, default=(), help="store the states at these times (ours only)"
    )
    parser.add_argument(
        "--max-abs", type=cli.real(0), metavar="X", help="leave out latents with larger values"
    )
    parser.add_argument("--std", type=numbers, metavar="LEAST,MOST", help="leave out latents outside")
    parser.add_argument(
        "--min-reward",
        type=bound,
        action="append",
        default=[],
        metavar="REWARD=X",
        help="leave out images that it scores below; several times",
    )
    parser.add_argument("--samples-per-shard", type=cli.whole(1), default=1000, metavar="N")
    parser.add_argument("--batch-size", type=cli.whole(1, 65536), default=16, metavar="N")
    cli.dtype_flag(
        parser,
        "of all parts; default: float32, of our codec and text encoder as in training; --pipeline on a GPU: bfloat16",
    )
    parser.add_argument("--device", type=cli.device, help="default: this rank's GPU, else the CPU")
    job_arguments(parser, processes=False)
    processes.flag(parser)
    args = parser.parse_args(argv)
    if args.world > 1:  # divided already
        processes.end_with_parent()
        return cli.run(lambda: run(args))
    work = functools.cache(lambda: workload(args))
    started = processes.start("synthesize", args.processes, argv, lambda count: work().fits(count))
    return cli.run(lambda: run(args)) if started is None else started


def workload(args: argparse.Namespace) -> processes.Workload:
    """Count what is to be drawn, as processes share it: shard by shard; pipelines of diffusers are too large to share."""
    images = len(read_jobs(args.prompts, args.prompt_column, args.per_prompt, args.seed, args.limit))
    size = None if args.source is None else bytes_on_disk(args.source, codec=args.codec, text=args.text)
    return processes.Workload(images, -(-images // args.samples_per_shard), size)


def run(args: argparse.Namespace) -> None:
    args.processes = 1  # of this rank
    job = from_flags(JobConfig, args)
    if args.std is not None and (len(args.std) != 2 or args.std[0] >= args.std[1]):
        raise ConfigError(f"--std {args.std}: expected two numbers, for example .6,1.6")
    jobs = read_jobs(args.prompts, args.prompt_column, args.per_prompt, args.seed, args.limit)
    generator = build_generator(args)
    keep_images = args.images or isinstance(generator, DiffusersGenerator)
    limits = Limits(args.max_abs, args.std)
    if limits != Limits() and generator.codec is None:
        raise ConfigError(
            "--max-abs and --std look at latents, which diffusers pipelines give with --codec only"
        )
    rewards = RewardFilter(dict(args.min_reward), args.device or rank_device()) if args.min_reward else None
    if rewards is not None and generator.codec is None:
        raise ConfigError(
            "--min-reward looks at decoded latents, which diffusers pipelines give with --codec only"
        )
    synthesize(generator, jobs, job, args.samples_per_shard, args.batch_size, keep_images, limits, rewards)


def numbers(text: str) -> tuple[float, ...]:
    return tuple(cli.real(-1e30)(part) for part in text.split(","))


def bound(text: str) -> tuple[str, float]:
    """Read NAME=X."""
    name, separator, value = text.rpartition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"expected REWARD=X, for example shapes=1, got '{text}'")
    return name, cli.real(-1e30)(value)


def build_generator(args: argparse.Namespace) -> Generator:
    device = args.device or rank_device()
    if (args.source is None) == (args.pipeline is None):
        raise ConfigError("give the weights of a model of ours, or --pipeline NAME, and not both")
    if args.pipeline is not None:
        ours = ("text_embeddings", "sampler", "negative_prompt", "grid", "trajectory", "text")
        if given := [f"--{name.replace('_', '-')}" for name in ours if getattr(args, name)]:
            raise ConfigError(f"{', '.join(given)}: for our own models only")
        settings = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
        settings |= {"height": args.height or args.resolution, "width": args.width or args.resolution}
        codec = build_codec(chosen_component("codec", args.codec), device) if args.codec else None
        settings = {key: value for key, value in settings.items() if value is not None}
        dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
        return DiffusersGenerator(args.pipeline, device, dtype, settings, codec)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    pipeline = TextToImage.from_pretrained(
        args.source, device, dtype, codec=args.codec, text=args.text, allow_download=args.allow_download
    )
    settings = pipeline.settings(
        steps=args.steps,
        guidance_scale=args.guidance,
        sampler=args.sampler,
        resolution=args.resolution,
        height=args.height,
        width=args.width,
        grid=args.grid,
    )
    if args.grid and settings.sigmas:
        raise ConfigError(
            f"--grid {args.grid}: '{args.source}' is distilled and has times of its own; leave it out"
        )
    extras = Extras(args.text_embeddings, args.images, tuple(sorted(args.trajectory, reverse=True)))
    return OwnGenerator(pipeline, settings, args.negative_prompt, extras)
