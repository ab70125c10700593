"""Prompts -> shards of synthetic pairs, for distillation and for synthetic parts of a mixture.

    python tools/synthesize.py runs/pretrain-512@ema --prompts prompts.txt --per-prompt 4 --out data/synthetic
    torchrun --nproc_per_node 8 tools/synthesize.py runs/pretrain-512 --prompts captions.jsonl --out
    data/synthetic python tools/synthesize.py diffusers:black-forest-labs/FLUX.1-dev --prompts p.txt --out
    data/flux --codec dc-ae-f32c32

Members of a sample in `synth-*.tar`:
    npy         (C, h, w) float16 final latent, raw like all latents in shards
    noise.npy   (C, h, w) float16 noise it was drawn from (ours only); exactly what the sampler started with
    txt, json   the prompt; its seed, the settings, and what the prompts file says about it
    text.npy, mask.npy   with --text-embeddings (ours only)
    jpg         with --images, and always for diffusers pipelines; their latents are those of --codec
The seed of picture k of a prompt is a hash of (prompt, k, --seed), so that neither batches nor ranks matter.
The same command continues; OUT/preview.png shows the first pictures. Left out: scoring and filtering by
reward.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nitro_e import cli
from nitro_e.components import ComponentConfig, build_codec
from nitro_e.config import ConfigError
from nitro_e.data.captions import rows, value_at
from nitro_e.data.decode import decode_array
from nitro_e.data.encode import LARGEST, weights_digest
from nitro_e.data.index import Problem, scan_tar
from nitro_e.data.jobs import JobConfig, Result, digest, each, publish_entry, run_job
from nitro_e.data.writer import write_shard
from nitro_e.interfaces import LatentCodec, TextEmbedding
from nitro_e.pipeline import TextToImage, image_grid, to_image
from nitro_e.randomness import seed_of
from nitro_e.sampling import SAMPLERS, SamplingConfig, guide, initial_noise


@dataclass
class Job:
    """One picture to make."""

    prompt: str
    k: int  # which picture of this prompt
    seed: int
    info: dict  # what the prompts file says besides the prompt


@dataclass
class Made:
    """One batch of pictures; None is not stored."""

    latents: Tensor | None = None  # (B, C, h, w) raw
    noise: Tensor | None = None  # (B, C, h, w)
    text: TextEmbedding | None = None
    images: list[Image.Image] | None = None


class Generator(Protocol):
    """What makes pictures."""

    identity: dict  # plain data: all that the result depends on besides prompt and seed

    def make(self, jobs: Sequence[Job]) -> Made: ...


class OwnGenerator:
    """Any checkpoint of this project."""

    def __init__(
        self, pipeline: TextToImage, settings: SamplingConfig, negative: str, text: bool, images: bool
    ):
        self.pipeline, self.settings, self.negative, self.text, self.images = (
            pipeline,
            settings,
            negative,
            text,
            images,
        )
        parts = {"model": pipeline, "text": pipeline.text, "codec": pipeline.codec}
        weights = {name: weights_digest(part)[:16] for name, part in parts.items()}
        self.identity = {
            "weights": weights,
            **asdict(settings),
            "negative_prompt": negative,
            "text_embeddings": text,
            "images": images,
        }

    @torch.no_grad()
    def make(self, jobs: Sequence[Job]) -> Made:
        pipeline, settings = self.pipeline, self.settings
        device = next(pipeline.model.parameters()).device
        shape = pipeline.latent_shape(*settings.size)
        noise = initial_noise([job.seed for job in jobs], shape).half()  # what is stored is what is used
        text = pipeline.text.encode([job.prompt for job in jobs])
        negative = TextEmbedding(
            *(x.expand(len(jobs), *x.shape[1:]) for x in pipeline.text.encode([self.negative]))
        )
        velocity = guide(pipeline.model, text, negative, settings.guidance_scale)
        latents = SAMPLERS[settings.sampler](velocity, noise.float().to(device), settings.times().to(device))
        images = [to_image(x) for x in pipeline.codec.decode(latents)] if self.images else None
        return Made(denormalize(pipeline.codec, latents).cpu(), noise, text if self.text else None, images)


class DiffusersGenerator:
    """Any diffusers text-to-image pipeline; latents come from our codec, so that they fit our models."""

    def __init__(
        self, name: str, device: str, dtype: str, settings: dict[str, Any], codec: LatentCodec | None
    ):
        from diffusers import DiffusionPipeline

        try:
            pipeline = DiffusionPipeline.from_pretrained(
                name, torch_dtype=getattr(torch, dtype), use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"'{name}' is no diffusers pipeline: {' '.join(str(error).split())[:200]}"
            ) from None
        self.pipeline, self.settings, self.codec = pipeline.to(device), settings, codec
        self.pipeline.set_progress_bar_config(disable=True)
        weights = {"pipeline": weights_digest(self.pipeline)[:16]}
        if codec is not None:
            weights["codec"] = weights_digest(codec)[:16]
        self.identity = {"pipeline": Path(name).name, "weights": weights, "dtype": dtype, **settings}

    @torch.no_grad()
    def make(self, jobs: Sequence[Job]) -> Made:
        seeds = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
        images = self.pipeline([job.prompt for job in jobs], generator=seeds, **self.settings).images
        if self.codec is None:
            return Made(images=images)
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(
            0, 3, 1, 2
        )
        return Made(self.codec.encode_pixels(pixels.float() / 127.5 - 1).float().cpu(), images=images)


def denormalize(codec: LatentCodec, latents: Tensor) -> Tensor:
    """Latents -> raw latents: the inverse of `normalize`, which is affine in every cell."""
    offset = codec.normalize(torch.zeros_like(latents))
    return (latents - offset) / (codec.normalize(torch.ones_like(latents)) - offset)


# --- shards ---------------------------------------------------------------------------------------


@dataclass
class SynthUnit:
    """The pictures of exactly one shard."""

    name: str
    first: int
    jobs: list[Job]
    identity: dict = field(repr=False)

    def fingerprint(self) -> str:
        return digest(self.first, [asdict(job) for job in self.jobs], self.identity)


def synthesize(
    generator: Generator,
    jobs: Sequence[Job],
    job: JobConfig,
    samples_per_shard: int,
    batch_size: int,
    keep_images: bool,
) -> list[dict]:
    """Make every picture, in shards; see jobs.run_job."""
    if samples_per_shard < 1 or batch_size < 1:
        raise ConfigError("--samples-per-shard and --batch-size must be at least 1")
    units = [
        SynthUnit(
            f"{start // samples_per_shard:06d}",
            start,
            list(jobs[start : start + samples_per_shard]),
            generator.identity,
        )
        for start in range(0, len(jobs), samples_per_shard)
    ]
    work = partial(
        make_shard, generator=generator, out=job.out, batch_size=batch_size, keep_images=keep_images
    )
    return run_job("synth", units, each(work), job)


def make_shard(
    unit: SynthUnit, generator: Generator, out: Path, batch_size: int, keep_images: bool
) -> Result:
    result, path, keys = Result(), out / f"synth-{unit.name}.tar", []

    def samples() -> Iterator[dict[str, Any]]:
        for start in range(0, len(unit.jobs), batch_size):
            jobs = unit.jobs[start : start + batch_size]
            made = generator.make(jobs)
            if start == 0 and unit.first == 0 and made.images:
                image_grid(made.images[:16], 4).save(out / "preview.png")
            for slot, job in enumerate(jobs):
                key = f"synth_{unit.first + start + slot:09d}"
                latent = made.latents[slot] if made.latents is not None else None
                if latent is not None and not bool((latent.abs() < LARGEST).all()):
                    result.bad.append(Problem(path.name, key, f"latent is not finite or beyond {LARGEST:g}"))
                    continue
                keys.append(key)
                yield {"__key__": key, **_members(made, slot, job, generator.identity, keep_images)}

    out.mkdir(parents=True, exist_ok=True)
    result.samples = write_shard(path, samples(), partial(_check, keys))
    result.shards.append(publish_entry(path, scan_tar(path), generator=generator.identity))
    return result


def _members(made: Made, slot: int, job: Job, identity: dict, keep_images: bool) -> dict[str, Any]:
    members: dict[str, Any] = {}
    if made.latents is not None:
        members["npy"] = made.latents[slot].half().numpy()
    if made.noise is not None:
        members["noise.npy"] = made.noise[slot].numpy()
    if made.text is not None:
        members["text.npy"] = made.text.tokens[slot].half().cpu().numpy()
        members["mask.npy"] = made.text.mask[slot].to(torch.uint8).cpu().numpy()
    if keep_images and made.images is not None:
        buffer = io.BytesIO()
        made.images[slot].convert("RGB").save(buffer, "JPEG", quality=95)
        members["jpg"] = buffer.getvalue()
    members["txt"] = job.prompt
    members["json"] = {**job.info, "prompt": job.prompt, "k": job.k, "seed": job.seed, "generator": identity}
    return members


def _check(keys: list[str], path: Path) -> None:
    """A finished shard has every key and only finite latents."""
    rows_ = scan_tar(path).rows
    if [key.decode() for key in rows_["__key__"]] != keys:
        raise ConfigError(
            f"{path}: was not written as it should be (keys differ); check the disk and run again"
        )
    with open(path, "rb") as file:
        for name in (name for name in rows_.dtype.names if name.endswith("npy")):
            for offset, size, _ in rows_[name].tolist():
                file.seek(offset)
                decode_array(file.read(size))


def read_jobs(path: Path, column: str, per_prompt: int, seed: int, limit: int | None = None) -> list[Job]:
    """Jobs of a prompts file: lines of text, or a table (csv, tsv, jsonl, parquet) with a prompt column."""
    if path.suffix == ".txt":
        if not path.is_file():
            raise ConfigError(f"--prompts '{path}' does not exist")
        prompts = [(line.strip(), {}) for line in path.read_text().splitlines() if line.strip()]
    else:
        table = rows(path, (column,))
        prompts = [
            (str(value_at(row, column)).strip(), {k: v for k, v in row.items() if k != column})
            for row in table
        ]
    empty = sum(not prompt for prompt, _ in prompts)
    if empty:
        print(f"{path}: {empty} of {len(prompts)} prompts are empty and left out", file=sys.stderr)
    if empty == len(prompts):
        raise ConfigError(f"--prompts '{path}' holds no prompts")
    prompts = islice(((prompt, info) for prompt, info in prompts if prompt), limit)
    return [
        Job(prompt, k, seed_of(prompt, k, seed), info) for prompt, info in prompts for k in range(per_prompt)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", help="run, checkpoint or model folder (@ema, @model), or diffusers:NAME_OR_FOLDER"
    )
    parser.add_argument("--prompts", type=Path, required=True, help="text file with one per line, or a table")
    parser.add_argument("--prompt-column", default="prompt", help="of a table")
    parser.add_argument("--limit", type=int, help="only so many prompts")
    parser.add_argument("--per-prompt", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other pictures")
    parser.add_argument("--negative-prompt", default="", help="ours only")
    parser.add_argument("--steps", type=int, help="default: what the weights came with")
    parser.add_argument("--guidance", type=float, help="default: what the weights came with")
    parser.add_argument("--sampler", choices=sorted(SAMPLERS), help="ours only")
    parser.add_argument("--resolution", type=int, help="pixels per side")
    parser.add_argument(
        "--codec", help="diffusers only: name or name=folder; stores the latents of the pictures"
    )
    parser.add_argument("--images", action="store_true", help="store the pictures too (diffusers: always)")
    parser.add_argument(
        "--text-embeddings", action="store_true", help="store the prompts' embeddings (ours only)"
    )
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", help="default: this rank's GPU, else the CPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=int(os.environ.get("RANK", 0)))
    parser.add_argument("--world", type=int, default=int(os.environ.get("WORLD_SIZE", 1)))
    parser.add_argument("--overwrite", action="store_true", help="redo what was made with other settings")
    parser.add_argument("--max-bad-fraction", type=float, default=0.001)
    args = parser.parse_args(argv)

    def command() -> None:
        try:
            run(args)
        except OSError as error:  # no space left, no permission, ...
            raise ConfigError(f"{error}; mend that and run the same command again") from None

    return cli.run(command)


def run(args: argparse.Namespace) -> None:
    job = JobConfig(out=args.out, rank=args.rank, world=args.world, overwrite=args.overwrite,
                    max_bad_fraction=args.max_bad_fraction)  # fmt: skip
    if args.per_prompt < 1:
        raise ConfigError(f"--per-prompt {args.per_prompt} must be at least 1")
    jobs = read_jobs(args.prompts, args.prompt_column, args.per_prompt, args.seed, args.limit)
    generator = build_generator(args)
    keep_images = args.images or isinstance(generator, DiffusersGenerator)
    synthesize(generator, jobs, job, args.samples_per_shard, args.batch_size, keep_images)


def build_generator(args: argparse.Namespace) -> Generator:
    device = args.device or (
        f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    )
    if args.source.startswith("diffusers:"):
        if args.text_embeddings or args.sampler or args.negative_prompt:
            raise ConfigError(
                "--text-embeddings, --sampler and --negative-prompt are for our own models only"
            )
        settings = {"num_inference_steps": args.steps, "guidance_scale": args.guidance,
                    "height": args.resolution, "width": args.resolution}  # fmt: skip
        name, _, path = (args.codec or "").partition("=")
        codec = build_codec(ComponentConfig(name=name, path=path or None), device) if args.codec else None
        settings = {key: value for key, value in settings.items() if value is not None}
        return DiffusersGenerator(args.source.removeprefix("diffusers:"), device, args.dtype, settings, codec)
    if args.codec:
        raise ConfigError("--codec is for diffusers pipelines; our checkpoints know theirs")
    pipeline = TextToImage.from_pretrained(args.source, device, getattr(torch, args.dtype))
    settings = pipeline.settings(
        steps=args.steps, guidance_scale=args.guidance, sampler=args.sampler, resolution=args.resolution
    )
    return OwnGenerator(pipeline, settings, args.negative_prompt, args.text_embeddings, args.images)


if __name__ == "__main__":
    sys.exit(main())
