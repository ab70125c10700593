"""Make shards of synthetic pairs: a latent, the noise it was sampled from, its prompt (nitro-e synthesize).

A generator turns a batch of jobs into images: `OwnGenerator` runs any checkpoint of this project,
`DiffusersGenerator` any diffusers pipeline. `synthesize` writes them shard by shard and can be resumed, like
all work of `jobs.py`.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nitro_e.config import ConfigError, check_characters, read_text
from nitro_e.data.making.captions import captions_in, rows, value_at
from nitro_e.data.making.encode import LARGEST, weights_digest
from nitro_e.data.making.jobs import JobConfig, Result, each, publish_entry, run_job
from nitro_e.data.making.writer import check_written, write_shard
from nitro_e.data.manifests import digest
from nitro_e.data.problems import Problem
from nitro_e.data.prompts import GENERATORS, PromptsConfig, load_prompts
from nitro_e.interfaces import LatentCodec, TextEmbedding
from nitro_e.randomness import seed_of
from nitro_e.record import progress
from nitro_e.rewards import RewardConfig, build_rewards
from nitro_e.sampling.pipeline import TextToImage, to_image
from nitro_e.sampling.samplers import SAMPLERS, SamplingConfig, fresh_noise, initial_noise, sample
from nitro_e.sampling.sheets import image_grid


@dataclass
class Job:
    """An image to make."""

    prompt: str
    k: int  # number of this image among those of its prompt
    seed: int
    info: dict  # what the prompts file says besides the prompt


@dataclass
class Generated:
    """A batch of images as it is stored; None stands for a member that is not."""

    size: tuple[int, int]  # in pixels: height, width
    latents: Tensor | None = None  # (B, C, h, w) raw
    noise: Tensor | None = None  # (B, C, h, w)
    text: TextEmbedding | None = None
    images: list[Image.Image] | None = None
    trajectory: Tensor | None = None  # (B, T, C, h, w)


class Generator(Protocol):
    """Makes images from prompts and seeds."""

    identity: dict  # plain data: everything that the result depends on besides prompt and seed
    codec: LatentCodec | None  # of the latents

    def make(self, jobs: Sequence[Job]) -> Generated: ...


@dataclass(frozen=True)
class Extras:
    """Options of OwnGenerator: members that are stored besides latent, noise and prompt."""

    text_embeddings: bool = False
    images: bool = False
    trajectory: tuple[float, ...] = ()  # times, falling


class OwnGenerator:
    """Samples from any checkpoint of this project."""

    def __init__(
        self, pipeline: TextToImage, settings: SamplingConfig, negative: str = "", extras: Extras = Extras()
    ) -> None:
        self.pipeline, self.settings, self.negative, self.extras = pipeline, settings, negative, extras
        self.codec = pipeline.codec
        self.stops = trajectory_stops(settings, extras.trajectory)
        parts = {"model": pipeline, "text": pipeline.text, "codec": pipeline.codec}
        weights = {name: weights_digest(part)[:16] for name, part in parts.items()}
        self.identity = {
            "weights": weights,
            **asdict(settings),
            "negative_prompt": negative,
            **asdict(extras),
        }

    @torch.no_grad()
    def make(self, jobs: Sequence[Job]) -> Generated:
        pipeline, settings = self.pipeline, self.settings
        device = next(pipeline.model.parameters()).device
        shape = pipeline.latent_shape(*settings.size)
        seeds = [job.seed for job in jobs]
        noise = initial_noise(seeds, shape).half()  # what is stored is what is used
        text = pipeline.text.encode([job.prompt for job in jobs])
        negative = pipeline.text.encode([self.negative])
        start, trajectory = noise.float().to(device), None
        if self.stops:
            latents, trajectory = self.follow(start, text, negative)
        else:
            latents = sample(pipeline.model, text, negative, settings, start, fresh_noise(seeds, start))
        images = [to_image(x) for x in pipeline.codec.decode(latents)] if self.extras.images else None
        text = text if self.extras.text_embeddings else None
        raw = denormalize(pipeline.codec, latents).cpu()
        return Generated(settings.size, raw, noise, text, images, trajectory)

    def follow(self, x: Tensor, text: TextEmbedding, negative: TextEmbedding) -> tuple[Tensor, Tensor]:
        """Sample with the same steps, taken in pieces; returns the result and the states at the stops."""
        settings = self.settings
        times, states = settings.times(), []
        for first, last in zip((0, *self.stops), (*self.stops, len(times) - 1)):
            part = times[first : last + 1]
            x = sample(self.pipeline.model, text, negative, settings, x, fresh_noise((), x), part)
            states.append(x)
        return x, torch.stack(states[:-1], dim=1).half().cpu()


def trajectory_stops(settings: SamplingConfig, wanted: Sequence[float]) -> tuple[int, ...]:
    """Find the places of these times on the sampler's grid."""
    times = settings.times().tolist()
    if wanted and settings.sampler not in SAMPLERS:
        raise ConfigError(f"--trajectory is for {', '.join(SAMPLERS)}, not '{settings.sampler}'")
    missing = [time for time in wanted if min(abs(time - t) for t in times[1:-1] or [9]) > 1e-6]
    if missing:
        raise ConfigError(
            f"--trajectory {missing[0]:g} is no time of the sampler ({', '.join(f'{t:.4g}' for t in times)}); "
            "choose other times, --steps or --grid"
        )
    return tuple(sorted(min(range(len(times)), key=lambda i: abs(times[i] - time)) for time in wanted))


class DiffusersGenerator:
    """Runs any diffusers text-to-image pipeline; our codec encodes its images, so latents fit our models."""

    def __init__(
        self, name: str, device: str, dtype: str, settings: dict[str, Any], codec: LatentCodec | None
    ):
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging

        if not progress.interactive():
            logging.disable_progress_bar()
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
    def make(self, jobs: Sequence[Job]) -> Generated:
        seeds = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
        images = self.pipeline([job.prompt for job in jobs], generator=seeds, **self.settings).images
        size = images[0].size[::-1]
        if self.codec is None:
            return Generated(size, images=images)
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        return Generated(size, self.codec.encode_pixels(pixels).float().cpu(), images=images)


@dataclass(frozen=True)
class Limits:
    """Bounds of the normalized latents that are kept; None sets no bound."""

    max_abs: float | None = None
    std: tuple[float, float] | None = None  # least, largest

    def problem(self, latent: Tensor) -> str | None:
        """Say why a latent (C, h, w) is left out; None keeps it."""
        largest, std = latent.abs().max().item(), latent.std().item()
        if self.max_abs is not None and largest > self.max_abs:
            return f"largest value {largest:.3g}, above --max-abs {self.max_abs:g}"
        if self.std is not None and not self.std[0] <= std <= self.std[1]:
            return f"standard deviation {std:.3g}, outside --std {self.std[0]:g},{self.std[1]:g}"
        return None


class RewardFilter:
    """Scores images, and leaves out those below the bound of any reward."""

    def __init__(self, least: Mapping[str, float], device: str) -> None:
        """least: the bound of each reward, by its name in the registry."""
        self.least = dict(least)
        self.scorer = build_rewards([RewardConfig(name=name) for name in least], device)

    @property
    def identity(self) -> dict:
        return {"min_reward": self.least, "rewards": self.scorer.sources()}

    def scores(self, codec: LatentCodec, latents: Tensor, jobs: Sequence[Job]) -> list[dict[str, float]]:
        """Score raw latents (B, C, h, w) as images: a value per reward and image, NaN where there is none."""
        with torch.no_grad():
            pixels = codec.decode(codec.normalize(latents.half().float()))
        values = self.scorer(pixels, [job.prompt for job in jobs], [job.info for job in jobs]).values
        return [dict(zip(self.least, row)) for row in values.tolist()]

    def problem(self, scores: Mapping[str, float]) -> str | None:
        """Say which reward leaves an image out; None keeps it."""
        for name, least in self.least.items():
            if not scores[name] >= least:
                return f"{name} {scores[name]:.3g}, not at least --min-reward {name}={least:g}"
        return None


def denormalize(codec: LatentCodec, latents: Tensor) -> Tensor:
    """Turn latents into raw latents: the inverse of `normalize`, which is affine in every cell."""
    offset = codec.normalize(torch.zeros_like(latents))
    return (latents - offset) / (codec.normalize(torch.ones_like(latents)) - offset)


# --- shards ---------------------------------------------------------------------------------------


@dataclass
class SynthUnit:
    """The images of exactly one shard."""

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
    limits: Limits = Limits(),
    rewards: RewardFilter | None = None,
) -> list[dict]:
    """Make every image, in shards; see jobs.run_job."""
    if rewards is not None:
        rewards.scorer.check([job.info for job in jobs])
    if samples_per_shard < 1 or batch_size < 1:
        raise ConfigError("--samples-per-shard and --batch-size must be at least 1")
    identity = {**generator.identity, **asdict(limits), **(rewards.identity if rewards else {})}
    units = []
    for start in range(0, len(jobs), samples_per_shard):
        part = list(jobs[start : start + samples_per_shard])
        units.append(SynthUnit(f"{start // samples_per_shard:06d}", start, part, identity))
    work = partial(
        make_shard,
        generator=generator,
        out=job.out,
        batch_size=batch_size,
        keep_images=keep_images,
        limits=limits,
        rewards=rewards,
    )
    return run_job("synth", units, each(work), job)


def make_shard(
    unit: SynthUnit,
    generator: Generator,
    out: Path,
    batch_size: int,
    keep_images: bool,
    limits: Limits,
    rewards: RewardFilter | None,
) -> Result:
    result, path, keys, stats = Result(), out / f"synth-{unit.name}.tar", [], []

    def samples() -> Iterator[dict[str, Any]]:
        for start in range(0, len(unit.jobs), batch_size):
            jobs = unit.jobs[start : start + batch_size]
            made = generator.make(jobs)
            if start == 0 and unit.first == 0 and made.images:
                image_grid(made.images[:16], 4).save(out / "preview.png")
            scores: list[dict[str, float]] = []
            if rewards is not None and generator.codec is not None and made.latents is not None:
                scores = rewards.scores(generator.codec, made.latents, jobs)
            for row, job in enumerate(jobs):
                key = f"synth_{unit.first + start + row:09d}"
                problem = latent_problem(made, row, generator, limits)
                if problem is None and rewards is not None:
                    problem = rewards.problem(scores[row])
                if problem is not None:
                    result.bad.append(Problem(path.name, key, problem))
                    continue
                keys.append(key)
                if made.latents is not None:
                    latent = made.latents[row].float()
                    stats.append((latent.mean().item(), latent.std().item(), latent.abs().max().item()))
                members = _members(made, row, job, generator.identity, keep_images)
                if scores:
                    members["json"]["rewards"] = scores[row]
                yield {"__key__": key, **members}

    out.mkdir(parents=True, exist_ok=True)
    result.samples = write_shard(path, samples(), partial(check_written, keys, path))
    entry = publish_entry(path, generator=generator.identity)
    if stats:  # of the raw latents
        mean, std, largest = np.array(stats).T
        entry["latents"] = {
            "mean": float(mean.mean()),
            "std": float(std.mean()),
            "max_abs": float(largest.max()),
        }
    result.shards.append(entry)
    return result


def latent_problem(made: Generated, row: int, generator: Generator, limits: Limits) -> str | None:
    """Say why an image cannot be stored; None if it can."""
    if made.latents is None:
        return None
    latent = made.latents[row]
    if not bool((latent.abs() < LARGEST).all()):
        return f"latent is not finite or beyond {LARGEST:g}"
    if limits == Limits():
        return None
    return limits.problem(generator.codec.normalize(latent[None].float())[0].cpu())


def _members(made: Generated, row: int, job: Job, identity: dict, keep_images: bool) -> dict[str, Any]:
    members: dict[str, Any] = {}
    if made.latents is not None:
        members["npy"] = made.latents[row].half().numpy()
    if made.noise is not None:
        members["noise.npy"] = made.noise[row].numpy()
    if made.trajectory is not None:
        members["trajectory.npy"] = made.trajectory[row].numpy()
    if made.text is not None:
        members["text.npy"] = made.text.tokens[row].half().cpu().numpy()
        members["mask.npy"] = made.text.mask[row].to(torch.uint8).cpu().numpy()
    if keep_images and made.images is not None:
        buffer = io.BytesIO()
        made.images[row].convert("RGB").save(buffer, "JPEG", quality=95)
        members["jpg"] = buffer.getvalue()
    members["txt"] = job.prompt
    height, width = made.size
    about = {"prompt": job.prompt, "k": job.k, "seed": job.seed, "width": width, "height": height}
    members["json"] = {**job.info, **about, "generator": identity}
    return members


def read_jobs(path: Path, column: str, per_prompt: int, seed: int, limit: int | None = None) -> list[Job]:
    """List the jobs of a prompts file: lines of text, or a table (csv, tsv, jsonl, parquet) with a prompt column.

    The name of a generator of nitro_e.data.prompts stands for its prompts.
    """
    if str(path) in GENERATORS:
        made = load_prompts(PromptsConfig(source=str(path), num=limit))
        prompts = [(prompt.text, {k: v for k, v in prompt.info.items() if k != "prompt"}) for prompt in made]
    elif path.suffix == ".txt":
        if not path.is_file():
            raise ConfigError(f"--prompts '{path}' does not exist or is no file")
        prompts = [(line.strip(), {}) for line in read_text(path).splitlines() if line.strip()]
    else:
        prompts = []
        for row in rows(path, (column,)):
            info = {name: value for name, value in row.items() if name != column}
            prompts.append((next(iter(captions_in(value_at(row, column), column)), "").strip(), info))
    for number, (prompt, _) in enumerate(prompts, 1):
        check_characters(prompt, f"--prompts {path}: prompt {number}")
    empty = sum(not prompt for prompt, _ in prompts)
    if empty:
        print(f"{path}: {empty} of {len(prompts)} prompts are empty and left out", file=sys.stderr)
    if empty == len(prompts):
        raise ConfigError(f"--prompts '{path}' holds no prompts")
    count: Counter[str] = Counter()  # a prompt that comes again goes on counting: other noise, another image
    jobs = []
    for prompt, info in islice(((prompt, info) for prompt, info in prompts if prompt), limit):
        for k in range(count[prompt], count[prompt] + per_prompt):
            jobs.append(Job(prompt, k, seed_of(prompt, k, seed), info))
        count[prompt] += per_prompt
    return jobs
