"""Stage 3: post-training on rewards. A rollout is a stream of batches for the one training loop.

At every `updates`-th step the stream draws images with the weights as they are, has them scored, and hands out rows
(an image and a step of the sampler) until the updates are done. The text is encoded as for sampling, once per group.
What is minimised over the rows is an algorithm's (algorithm.py); to add one, add its config to `Algorithms` below.

Left out: training on the best and worst of a group only.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nitro_e.config import Config, ConfigError, Ge, Le, TrainingError, to_dict
from nitro_e.data.buckets import size_of_step
from nitro_e.data.prompts import Prompt, PromptsConfig
from nitro_e.interfaces import LatentCodec, Model, Phase, TextEmbedding, TextEncoder, VisionEncoder
from nitro_e.randomness import SampleRandom
from nitro_e.rewards import RewardConfig, Scorer, Scores, win_rates
from nitro_e.sampling.samplers import guide
from nitro_e.stages.adapter import AdapterConfig, add_adapter, dense, has_adapter, is_frozen, save_adapter
from nitro_e.stages.grpo.advantage import AdvantageConfig, advantages, score_statistics
from nitro_e.stages.grpo.algorithm import Algorithm, Shared
from nitro_e.stages.grpo.awm import AWMConfig
from nitro_e.stages.grpo.clipped import ClippedConfig
from nitro_e.stages.grpo.groups import Layout, group_prompts
from nitro_e.stages.grpo.kl import KLPenalty, doubtful
from nitro_e.stages.grpo.nft import NFTConfig
from nitro_e.stages.grpo.policy import Policy
from nitro_e.stages.grpo.reward_gradient import RewardGradientConfig
from nitro_e.stages.grpo.rollout import (
    Experience,
    RolloutConfig,
    Rows,
    Trajectory,
    sample_trajectory,
    shared_prefix,
    solve_ode,
)
from nitro_e.stages.grpo.sde import Schedule, Window
from nitro_e.stages.grpo.shown import Shown
from nitro_e.training.optim import OptimConfig
from nitro_e.training.parallel import gather_over_processes

# the objectives there are; `kind` says which one a recipe means (see algorithm.AlgorithmConfig)
Algorithms = ClippedConfig | NFTConfig | AWMConfig | RewardGradientConfig
# over this many rollouts a reward may leave this share of its images unscored
MONITORED_ROLLOUTS, MAX_UNSCORED = 10, 0.05
CONSTANT_ROLLOUTS = 5  # in a row, until a reward that never differs is warned of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(Config):
    kind: Literal["grpo"] = "grpo"  # stage 3
    prompts: PromptsConfig
    rewards: tuple[RewardConfig, ...]  # those of weight 0 are monitored: scored and logged, never trained on
    groups: Annotated[int, Ge(1), Le(65536)] = 48  # prompts per rollout
    group_size: Annotated[int, Ge(2), Le(65536)] = 24  # images per prompt
    updates: Annotated[int, Ge(1)] = 2  # optimiser steps per rollout
    rollout: RolloutConfig = field(default_factory=RolloutConfig)  # how training images are drawn
    # gradients of guided velocities flow through both passes or through the text's alone
    cfg_grad: Literal["both", "cond"] = "both"
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)  # how rewards become advantages
    # sizes of the images, HEIGHTxWIDTH in pixels, of which a rollout has one; empty: the square of the recipe
    buckets: tuple[str, ...] = ()
    algorithm: Algorithms = field(default_factory=ClippedConfig)  # the objective; `kind` chooses
    adapter: AdapterConfig | None = field(default_factory=AdapterConfig)  # null: all weights are trained
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=3e-4, eps=1e-10, weight_decay=1e-4, warmup=20)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if all(reward.monitored for reward in self.rewards):
            raise ConfigError("rewards: none has a weight, so there is nothing to train on")
        if self.algorithm.kl.gate is not None and not any(reward.monitored for reward in self.rewards):
            raise ConfigError(
                "algorithm.kl.gate compares with monitored rewards: give one the weight 0, or leave it out"
            )
        self.schedule()

    def schedule(self) -> Schedule:
        """Build the schedule of the rollouts; ConfigError if it does not fit the algorithm."""
        return self.algorithm.schedule(self.rollout)

    def layout(self, world: int, accumulate: int) -> Layout:
        """Spread a rollout over processes, updates and micro-batches; ConfigError if it does not come out even."""
        steps = self.algorithm.rows_per_image(self.rollout)
        return Layout(self.groups, self.group_size, self.updates, world, accumulate, steps)

    @property
    def guided(self) -> bool:
        return self.rollout.guidance_scale not in (0, 1)


class GRPO:
    """Rollouts, and one phase that learns from them."""

    bad_samples = 0

    def __init__(
        self,
        config: GRPOConfig,
        model: Model,
        pool: Sequence[Prompt],
        scorer: Scorer,
        codec: LatentCodec,
        text: TextEncoder,
        *,
        latent_shapes: Sequence[tuple[int, int, int]],
        seed: int,
        layout: Layout,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
        forward_flops: float = 0.0,
        vision: VisionEncoder | None = None,
    ) -> None:
        """model: on the device, with the weights to start from; an adapter is put into it here.

        pool: the prompts; latent_shapes: (C, h, w) of each size of image; autocast: of the engine's precision;
        forward_flops: of one pass of one image; vision: what `advantage.diversity` compares images by.
        """
        self.vision = vision
        self.config, self.pool, self.scorer, self.codec, self.text = config, list(pool), scorer, codec, text
        self.latent_shapes, self.seed, self.layout = latent_shapes, seed, layout
        self.device, self.autocast = device, autocast
        if config.adapter is not None:
            add_adapter(model, config.adapter, seed)
        self.model = model
        self.schedule, kl = config.schedule(), config.algorithm.kl
        self.policy = Policy(
            model,
            reference=kl.beta > 0,
            old=config.algorithm.keeps_old,
            refreshed=kl.refresh_every is not None,
        ).to(device)
        self.null_text = text.encode([""])
        shared = Shared(
            policy=self.policy,
            null_text=self.null_text,
            schedule=self.schedule,
            kl=KLPenalty(kl, self.schedule, device) if kl.beta else None,
            guidance_scale=config.rollout.guidance_scale,
            cfg_grad=config.cfg_grad,
            updates=config.updates,
            max_advantage=config.advantage.clip,
            decode=self.decode,
            scorer=scorer,
            autocast=autocast,
            device=device,
        )
        self.algorithm: Algorithm = config.algorithm.build(shared)
        self.name = self.algorithm.name
        self.phases = (Phase("policy", self.policy, self.algorithm.loss, config.optim),)
        self.batch_size, self.period = layout.micro_batch, config.updates
        self.forward_flops = forward_flops * self._passes_per_row()
        self.fingerprint = self._fingerprint()
        trained = [reward.title for reward in config.rewards if not reward.monitored]
        self.headline = (*(f"reward/{title}" for title in trained), *(["kl"] if kl.beta else []))
        self.shown = Shown()  # images of the last rollout
        self.constant: dict[str, int] = {}  # rollouts in a row in which a reward told no image from another
        # (R, 2) counts so far, after each of the last rollouts: images without a score, images with one
        self.unscored: deque[Tensor] = deque(maxlen=MONITORED_ROLLOUTS + 1)

    def _passes_per_row(self) -> float:
        """Work per training row in units of one forward and backward pass (of 3 forward passes), for the FLOPs."""
        c = self.config
        # without gradients: the reference, the drawing of the image, and what the algorithm needs besides
        drawing = c.rollout.passes(c.group_size, self.schedule)
        frozen = (c.algorithm.kl.beta > 0) + drawing / self.layout.steps + self.algorithm.frozen_passes
        if not c.guided:
            return (3 + frozen) / 3
        return ((6 if c.cfg_grad == "both" else 3 + 1) + 2 * frozen) / 3

    def _fingerprint(self) -> dict[str, Any]:
        """Describe where each image comes from, which a resume must find unchanged."""
        digest = hashlib.blake2b("\n".join(prompt.text for prompt in self.pool).encode(), digest_size=8)
        c = self.config
        adapter = None if c.adapter is None else {**to_dict(c.adapter), "init_from": None}
        # `per_device` does not change what is drawn; its older name stays, as in the checkpoints of before
        rollout = {**to_dict(c.rollout), "batch_size": None}
        del rollout["per_device"]
        # nor do checkpoints of before have these, where they are off
        for key, off in (("solver", "euler"), ("branch", False), ("decode_dtype", "float32")):
            if rollout[key] == off:
                del rollout[key]
        buckets = {"buckets": list(c.buckets)} if c.buckets else {}
        return {
            **buckets,
            "prompts": f"{len(self.pool)} {digest.hexdigest()}",
            "groups": c.groups,
            "group_size": c.group_size,
            "updates": c.updates,
            "rollout": rollout,
            "adapter": adapter,
        }

    def notes(self) -> dict[str, Any]:
        """Name the weights of the rewards, for the run's record."""
        sources = self.scorer.sources()
        return {"judges": sources} if sources else {}

    def images(self) -> dict[str, Image.Image]:
        """Return the images of this process's last rollout that scored best and worst, each with its scores."""
        return self.shown.sheets()

    # ---- files

    def export(self, model: Any) -> Model:
        return dense(model) if has_adapter(model) else model

    def base(self) -> Model:
        """Return the model that the adapter is trained on."""
        return dense(self.model, merged=False)

    def is_frozen(self, name: str) -> bool:
        """Tell whether a tensor of the phase's module, or of an average of the model, is one of the base's."""
        return self.config.adapter is not None and is_frozen(name)

    def write_extras(self, model: Model, folder: Path) -> None:
        """Write the adapter, beside merged weights or alone, as a PEFT folder under the released names."""
        if has_adapter(model):
            save_adapter(model, folder / "adapter")

    # ---- rollouts

    def batches(self, step: int, rank: int, world: int, accumulate: int) -> Iterator[Rows]:
        """Yield rows from step `step` on, which must be the first of a rollout."""
        if step % self.config.updates:
            raise ConfigError(
                f"step {step} is in the middle of a rollout of {self.config.updates} updates; go on from another checkpoint"
            )
        rollout = step // self.config.updates
        while True:
            every = self.config.algorithm.kl.refresh_every
            if every is not None and rollout and rollout % every == 0 and self.policy.reference is not None:
                self.policy.refresh()
            self.algorithm.before_rollout(rollout)
            experience, stats = self.collect(rollout, rank)
            updates = [list(self.rows(experience, update)) for update in range(self.config.updates)]
            updates[0][0].stats = stats
            self.algorithm.before_updates(updates)
            for micro_batches in updates:
                yield from micro_batches
            rollout += 1

    @torch.no_grad()
    def collect(self, rollout: int, rank: int) -> tuple[Experience, dict[str, Tensor]]:
        """Draw and score this process's images of a rollout; the advantages take all processes' scores."""
        clock, images = Clock(self.device), self.layout.images(rank)
        numbers = group_prompts(self.seed, rollout, self.config.groups, len(self.pool))
        prompts = [self.pool[number] for number in numbers]  # of every group
        size, window = self.config.group_size, self.schedule.window_of(self.seed, rollout)
        first, stop = images.start // size, -(-images.stop // size)  # groups of images that are drawn here
        with clock.of("text"):
            text = self.text.encode([prompt.text for prompt in prompts[first:stop]])  # (g, L, D)
        parts, drawn, features = [], [], []
        for start in range(images.start, images.stop, self.config.rollout.per_device):
            chunk = range(start, min(start + self.config.rollout.per_device, images.stop))
            group = torch.tensor([image // size - first for image in chunk], device=self.device)
            with clock.of("draw"):
                parts.append(self.draw(rollout, chunk, text.take(group), window))
            with clock.of("decode"):
                drawn.append(self.decode(parts[-1].latents))  # (B, 3, H, W)
            if self.vision is not None:
                height, width = parts[-1].latents.shape[-2:]
                with clock.of("vision"):  # the mean of the patches: (B, D)
                    features.append(self.vision.features(drawn[-1], (height, width)).mean(1))
        pixels, mine = torch.cat(drawn), [prompts[image // size] for image in images]
        del drawn
        spent = self.scorer.seconds
        with clock.of("reward"):
            texts, info = [prompt.text for prompt in mine], [prompt.info for prompt in mine]
            scores = self.scorer(pixels, texts, info, rollout).values  # (S, R)
        views = F.adaptive_avg_pool2d(pixels.clamp(-1, 1).nan_to_num(), 8).flatten(1)  # (S, 3 * 64)
        trajectory = Trajectory(
            torch.cat([part.states for part in parts], dim=1),
            torch.cat([part.log_probs for part in parts], dim=1),
            torch.cat([part.latents for part in parts]),
        )
        finite = trajectory.clear()  # (S,)
        self.check_rewards()
        everything = gather_over_processes(scores.to(self.device)).cpu()  # (G K, R)
        rewards, weights = self.transformed(everything), self.scorer.weights
        if rank == 0:
            found = everything[images.start : images.stop]
            self.shown = Shown.of(pixels, texts, found, self.scorer.names, weights)
        del pixels
        near = gather_over_processes(torch.cat(features)).cpu().unflatten(0, (-1, size)) if features else None
        advantage = advantages(rewards, weights, self.config.advantage, near)  # (G, K)
        applies = self.scorer.applies([prompt.info for prompt in prompts], rollout)  # (G, R)
        stats = score_statistics(
            everything.unflatten(0, (-1, size)), self.scorer.names, self.scorer.weights, applies
        )
        stats |= {
            "advantage": advantage.abs().mean(),
            "diversity": diversity(gather_over_processes(views).unflatten(0, (-1, size))),
            "window": torch.tensor(float(window.first)),
            "rollout": torch.tensor(float(rollout)),
        }
        took = {f"reward/{name}": seconds - spent[name] for name, seconds in self.scorer.seconds.items()}
        stats |= {f"seconds/{name}": torch.tensor(value) for name, value in {**clock.seconds, **took}.items()}
        self.warn_of_constant_rewards(stats)
        experience = Experience(
            trajectory=trajectory,
            window=window,
            text=text,
            group=torch.tensor([image // size - first for image in images], device=self.device),
            advantages=advantage.flatten()[images.start : images.stop].float().to(self.device),
            gate=self.gate(everything).flatten()[images.start : images.stop].to(self.device) * finite,
            finite=finite,
            asked=mine,
            noise=functools.cache(lambda: self.noise_of_rows(rollout, images)),
            keys=[f"rollout {rollout} '{prompts[image // size].text}' #{image % size}" for image in images],
        )
        return experience, {name: value.double().cpu() for name, value in stats.items()}

    def latent_shape(self, rollout: int) -> tuple[int, int, int]:
        """Return (C, h, w) of all images of a rollout."""
        return size_of_step(self.latent_shapes, rollout, self.seed, "rollout")

    @torch.no_grad()
    def draw(self, rollout: int, images: range, text: TextEmbedding, window: Window) -> Trajectory:
        """Draw images of consecutive indices. Each has its own noise, whatever process or chunk it is drawn in."""
        purpose = (self.seed, "rollout", rollout)
        rng = SampleRandom(*purpose, first=images.start, count=len(images), device=self.device)
        config, size = self.config.rollout, self.config.group_size
        model, negative = self.algorithm.rollout_model, self.null_text
        shape = self.latent_shape(rollout)
        x = rng.normal(*shape)
        if config.shared_noise or config.branch:
            groups = range(images.start // size, -(-images.stop // size))
            shared = SampleRandom(
                *purpose, "group", first=groups.start, count=len(groups), device=self.device
            ).normal(*shape)
            if config.branch:
                of_groups = text.take([max(group * size - images.start, 0) for group in groups])
                with self.autocast():
                    velocity = guide(model, of_groups, negative, config.guidance_scale)
                    shared = shared_prefix(velocity, shared, self.schedule, window)
            x = shared[[image // size - groups.start for image in images]]
        velocity = guide(model, text, negative, config.guidance_scale)
        with self.autocast():
            if config.solver != "euler":
                return solve_ode(velocity, x, self.schedule, config.solver)
            first = window.first if config.branch else 0
            return sample_trajectory(velocity, x, self.schedule, window, rng.normal, first)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to pixels (B, 3, H, W) float32, in the arithmetic of the recipe whatever the engine's is."""
        lower = self.config.rollout.decode_dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=lower):
            return self.codec.decode(latents).float()

    def warn_of_constant_rewards(self, stats: dict[str, Tensor]) -> None:
        """Warn once of a trained reward that has told no image from another in several rollouts in a row."""
        for name, weight in zip(self.scorer.names, self.scorer.weights.tolist()):
            within = stats.get(f"reward/{name}/within_std")
            if not weight or within is None:
                continue
            self.constant[name] = self.constant.get(name, 0) + 1 if within < 1e-8 else 0
            if self.constant[name] == CONSTANT_ROLLOUTS:
                log.warning(
                    "reward '%s' gave all images of each prompt the same score in %d rollouts in a row: nothing is "
                    "learned from it. Look at samples/ (rollout-best, rollout-worst), the prompts and the reward",
                    name,
                    CONSTANT_ROLLOUTS,
                )

    def noise_of_rows(self, rollout: int, images: range) -> Tensor:
        """Draw (S, T, C, h, w), the noise of every row of these images, for objectives that need the same one twice."""
        rng = SampleRandom(
            self.seed, "matching", rollout, first=images.start, count=len(images), device=self.device
        )
        return rng.normal(self.layout.steps, *self.latent_shape(rollout))

    def gate(self, scores: Tensor) -> Tensor:
        """Tell from the scores (G K, R) of a rollout on which of its images (G, K) the KL penalty acts: 1, else 0."""
        share, size = self.config.algorithm.kl.gate, self.config.group_size
        if share is None:
            return torch.ones(len(scores) // size, size)
        groups = torch.arange(len(scores)) // size
        rates = [win_rates(column, column.isfinite(), groups) for column in scores.unbind(1)]
        ranks, monitored = torch.stack(rates, dim=1).unflatten(0, (-1, size)), self.scorer.weights == 0
        return doubtful(ranks[..., ~monitored], ranks[..., monitored], share)

    def check_rewards(self) -> None:
        """Raise TrainingError if too many images of the last rollouts got no score; every process must call it."""
        counts = [[tally.unscored, tally.scored] for tally in self.scorer.tally.values()]
        total = gather_over_processes(torch.tensor([counts], device=self.device)).sum(dim=0).cpu()  # (R, 2)
        self.unscored.append(total)
        if len(self.unscored) <= MONITORED_ROLLOUTS:
            return
        recent = total - self.unscored[0]
        for name, (missing, scored) in zip(self.scorer.names, recent.tolist()):
            if missing > MAX_UNSCORED * (missing + scored):
                raise TrainingError(
                    f"reward '{name}' gave no score for {missing:.0f} of {missing + scored:.0f} images of the last "
                    f"{MONITORED_ROLLOUTS} rollouts; mend it, then run the same command again"
                )

    def transformed(self, values: Tensor) -> Tensor:
        """Apply the transforms of the rewards to the scores of all images, (G K, R) -> (G, K, R)."""
        size = self.config.group_size
        groups = torch.arange(len(values), device=values.device) // size
        scores = self.scorer.transform(Scores(values, values.isfinite()), groups)
        return scores.values.unflatten(0, (-1, size))

    # ---- updates

    def rows(self, experience: Experience, update: int) -> Iterator[Rows]:
        """Cut the rows of one update into micro-batches."""
        states, log_probs, latents = experience.trajectory
        window = len(log_probs) > 0
        images, steps = self.layout.rows(update)
        for image, step in zip(images.split(self.batch_size), steps.split(self.batch_size)):
            image, step = image.to(self.device), step.to(self.device)
            yield Rows(
                step=step + experience.window.first,
                advantage=experience.advantages[image],
                prompts=experience.text,
                group=experience.group[image],
                keys=[experience.keys[index] for index in image.tolist()],
                latents=latents[image],
                gate=experience.gate[image],
                finite=experience.finite[image],
                asked=[experience.asked[index] for index in image.tolist()],
                noise=functools.partial(_rows_of, experience.noise, image, step),
                x=states[step, image] if window else states,
                x_next=states[step + 1, image] if window else states,
                log_prob=log_probs[step, image] if window else log_probs,
            )


def _rows_of(noise: Callable[[], Tensor], image: Tensor, step: Tensor) -> Tensor:
    """Pick the noise of rows from that of all images and steps."""
    return noise()[image, step]


def diversity(views: Tensor) -> Tensor:
    """Measure how different a group's images look: spread of 8x8 thumbnails (G, K, D) in units of -1..1 pixels."""
    return views.double().var(dim=1).mean(dim=1).sqrt().mean()


class Clock:
    """Wall time per section; synchronises CUDA, so that queued kernels count for the section that launched them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self.wait()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
