"""Stage 3: post-training on rewards. A rollout is a stream of batches for the one training loop.

At every `updates`-th step the stream draws images with the weights as they are, has them scored, and hands out rows
(an image and a step of its trajectory) until the updates are done. The text is encoded as for sampling, once per group.

Left out: branching from shared prefixes, training on the best and worst of a group only, gradients through rewards.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge, Le, TrainingError, to_dict
from nitro_e.data.prompts import Prompt, PromptsConfig
from nitro_e.interfaces import LatentCodec, Phase, TextEmbedding, TextEncoder
from nitro_e.randomness import SlotRandom
from nitro_e.rewards import RewardConfig, Scorer, Scores
from nitro_e.sampling import flow
from nitro_e.stages.grpo import losses
from nitro_e.stages.grpo.adapter import (
    AdapterConfig,
    add_adapter,
    dense,
    has_adapter,
    save_adapter,
)
from nitro_e.stages.grpo.advantage import AdvantageConfig, advantages, score_statistics
from nitro_e.stages.grpo.groups import Layout, gather, group_prompts
from nitro_e.stages.grpo.losses import ClippedConfig, NFTConfig
from nitro_e.stages.grpo.policy import Guided, Policy, guided_velocity
from nitro_e.stages.grpo.rollout import Experience, RolloutConfig, Rows, Trajectory, sample_trajectory, take
from nitro_e.stages.grpo.sde import Schedule, Transitions, Window
from nitro_e.training.optim import OptimConfig

WATCHED_ROLLOUTS, MAX_UNSCORED = 10, 0.05  # a reward may leave this share of its images unscored


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(Config):
    kind: Literal["grpo"] = "grpo"
    prompts: PromptsConfig
    rewards: tuple[RewardConfig, ...]  # those of weight 0 are watched: scored and logged, never trained on
    groups: Annotated[int, Ge(1), Le(65536)] = 48  # prompts per rollout
    group_size: Annotated[int, Ge(2), Le(65536)] = 24  # images per prompt
    updates: Annotated[int, Ge(1)] = 2  # optimiser steps per rollout
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    # of guided velocities: through both passes or the text's alone
    cfg_grad: Literal["both", "cond"] = "both"
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    algorithm: ClippedConfig | NFTConfig = field(default_factory=ClippedConfig)
    adapter: AdapterConfig | None = field(default_factory=AdapterConfig)  # null: all weights are trained
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=3e-4, eps=1e-10, weight_decay=1e-4, warmup=20)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if all(reward.watched for reward in self.rewards):
            raise ConfigError("rewards: none has a weight, so there is nothing to train on")
        if isinstance(self.algorithm, NFTConfig) and self.algorithm.times > self.rollout.steps:
            raise ConfigError(
                f"algorithm.times {self.algorithm.times}: a rollout has {self.rollout.steps} steps"
            )
        self.schedule()

    def schedule(self) -> Schedule:
        nft = isinstance(self.algorithm, NFTConfig)
        times = flow.time_grid(self.rollout.steps, self.rollout.grid, self.rollout.shift)
        return Schedule(times, self.rollout.sde, None if nft else self.rollout.window)

    def layout(self, world: int, accumulate: int) -> Layout:
        steps = self.algorithm.times if isinstance(self.algorithm, NFTConfig) else self.rollout.window.size
        return Layout(self.groups, self.group_size, self.updates, world, accumulate, steps)

    def beta(self) -> float:
        """The weight of `kl.kind`, converted from the units it was given in."""
        kl, schedule = self.algorithm.kl, self.schedule()
        if kl.units in (None, kl.kind):
            return kl.beta
        return losses.convert_beta(kl.beta, kl.units, kl.kind, schedule.sde, schedule.trained())

    @property
    def guided(self) -> bool:
        return self.rollout.guidance_scale not in (0, 1)


class GRPO:
    """Rollouts, and one phase that learns from them."""

    bad_samples = 0

    def __init__(
        self, config: GRPOConfig, model: nn.Module, pool: Sequence[Prompt], scorer: Scorer, codec: LatentCodec,
        text: TextEncoder, *, latent_shape: tuple[int, int, int], seed: int, layout: Layout, device: torch.device,
        autocast: Callable[[], AbstractContextManager], forward_flops: float = 0.0,
    ) -> None:  # fmt: skip
        """model: on the device, with the weights to start from; an adapter is put into it here.

        pool: the prompts; autocast: of the engine's precision; forward_flops: of one pass of one image.
        """
        self.config, self.pool, self.scorer, self.codec, self.text = config, list(pool), scorer, codec, text
        self.latent_shape, self.seed, self.layout = latent_shape, seed, layout
        self.device, self.autocast = device, autocast
        self.name = "nft" if isinstance(config.algorithm, NFTConfig) else "grpo"
        if config.adapter is not None:
            add_adapter(model, config.adapter, seed)
        self.model = model
        nft = isinstance(config.algorithm, NFTConfig)
        self.policy = Policy(model, reference=config.algorithm.kl.beta > 0, old=nft).to(device)
        loss = self.nft_loss if nft else self.clipped_loss
        self.phases = (Phase("policy", self.policy, loss, config.optim),)
        self.batch_size, self.period = layout.micro_batch, config.updates
        self.schedule, self.beta = config.schedule(), config.beta()
        self.sde = self.schedule.sde.to(device)
        self.null = text.encode([""])
        self.forward_flops = forward_flops * self._passes_per_row()
        self.fingerprint = self._fingerprint()
        # (R, 2) counts so far, after each of the last rollouts: images without a score, images with one
        self.unscored: deque[Tensor] = deque(maxlen=WATCHED_ROLLOUTS + 1)
        if not nft:
            steps, kl = self.schedule.trained(), config.algorithm.kl.kind
            weights = losses.step_weights(config.algorithm.step_weight, self.schedule.sde, steps)
            self.weights = weights.to(device)
            self.kl_weights = (self.beta * losses.kl_coefficients(kl, self.schedule.sde)).to(device)

    def _passes_per_row(self) -> float:
        """Forward passes that a row costs, where training on it is three."""
        c, steps = self.config, self.layout.steps
        passes = (c.algorithm.kl.beta > 0) + c.rollout.steps / steps  # without gradients
        passes += 1 if self.name == "nft" else (c.updates - 1) / c.updates
        if not c.guided:
            return (3 + passes) / 3
        return ((6 if c.cfg_grad == "both" else 3 + 1) + 2 * passes) / 3

    def _fingerprint(self) -> dict[str, Any]:
        """What a resume must find unchanged: where each image comes from."""
        digest = hashlib.blake2b("\n".join(prompt.text for prompt in self.pool).encode(), digest_size=8)
        c = self.config
        adapter = None if c.adapter is None else {**to_dict(c.adapter), "init_from": None}
        # `per_device` does not change what is drawn; its older name stays, as in the checkpoints of before
        rollout = {**to_dict(c.rollout), "batch_size": None}
        del rollout["per_device"]
        return {
            "prompts": f"{len(self.pool)} {digest.hexdigest()}",
            "groups": c.groups, "group_size": c.group_size, "updates": c.updates,
            "rollout": rollout, "adapter": adapter,
        }  # fmt: skip

    def notes(self) -> dict[str, Any]:
        """For the run's record."""
        sources = self.scorer.sources()
        return {"judges": sources} if sources else {}

    # ---- files

    def export(self, model: nn.Module) -> nn.Module:
        return dense(model) if has_adapter(model) else model

    def write_extras(self, model: nn.Module, folder: Path) -> None:
        """Beside the merged weights: the adapter, as a PEFT folder under the released names."""
        if has_adapter(model):
            save_adapter(model, folder / "adapter")

    # ---- rollouts

    def batches(self, step: int, rank: int, world: int, accumulate: int) -> Iterator[Rows]:
        """Rows from step `step` on, which must be the first of a rollout."""
        if step % self.config.updates:
            raise ConfigError(
                f"step {step} is in the middle of a rollout of {self.config.updates} updates; go on from another checkpoint"
            )
        rollout = step // self.config.updates
        while True:
            if self.policy.old is not None and rollout > 0:
                algorithm = self.config.algorithm
                self.policy.follow(min(algorithm.lag * rollout, algorithm.max_lag))
            experience, stats = self.collect(rollout, rank)
            stream = [list(self.rows(experience, update)) for update in range(self.config.updates)]
            stream[0][0].stats = stats
            if self.name == "grpo":
                self.remember(stream[1:])
            for update in stream:
                yield from update
            rollout += 1

    @torch.no_grad()
    def collect(self, rollout: int, rank: int) -> tuple[Experience, dict[str, Tensor]]:
        """Draw and score this process's images of a rollout; the advantages take all processes' scores."""
        clock, slots = Clock(self.device), self.layout.slots(rank)
        numbers = group_prompts(self.seed, rollout, self.config.groups, len(self.pool))
        prompts = [self.pool[number] for number in numbers]  # of every group
        size, window = self.config.group_size, self.schedule.window_of(self.seed, rollout)
        first, stop = slots.start // size, -(-slots.stop // size)  # groups of images that are drawn here
        with clock.of("text"):
            text = self.text.encode([prompt.text for prompt in prompts[first:stop]])  # (g, L, D)
        parts, scores, views = [], [], []
        for start in range(slots.start, slots.stop, self.config.rollout.per_device):
            chunk = range(start, min(start + self.config.rollout.per_device, slots.stop))
            group = torch.tensor([slot // size - first for slot in chunk], device=self.device)
            with clock.of("draw"):
                parts.append(self.draw(rollout, chunk, take(text, group), window))
            with clock.of("decode"):
                pixels = self.codec.decode(parts[-1].latents).float()  # (B, 3, H, W)
            with clock.of("reward"):
                mine = [prompts[slot // size] for slot in chunk]
                scores.append(self.scorer(pixels, [p.text for p in mine], [p.info for p in mine]).values)
                views.append(F.adaptive_avg_pool2d(pixels.clamp(-1, 1), 8).flatten(1))  # (B, 3 * 64)
        trajectory = Trajectory(
            torch.cat([part.states for part in parts], dim=1),
            torch.cat([part.log_probs for part in parts], dim=1),
            torch.cat([part.latents for part in parts]),
        )
        self.check_rewards()
        everything = gather(torch.cat(scores).to(self.device)).cpu()  # (G K, R)
        rewards, weights = self.transformed(everything), self.scorer.weights
        advantage = advantages(rewards, weights, self.config.advantage)  # (G, K)
        asked = self.scorer.applies([prompt.info for prompt in prompts])  # (G, R)
        stats = score_statistics(
            everything.unflatten(0, (-1, size)), self.scorer.names, self.scorer.weights, asked
        )
        stats |= {
            "advantage": advantage.abs().mean(),
            "diversity": diversity(gather(torch.cat(views)).unflatten(0, (-1, size))),
            "window": torch.tensor(float(window.first)),
            "rollout": torch.tensor(float(rollout)),
        }
        stats |= {f"seconds/{name}": torch.tensor(seconds) for name, seconds in clock.seconds.items()}
        experience = Experience(
            trajectory=trajectory, window=window, text=text,
            group=torch.tensor([slot // size - first for slot in slots], device=self.device),
            advantages=advantage.flatten()[slots.start : slots.stop].float().to(self.device),
            keys=[f"rollout {rollout} '{prompts[slot // size].text}' #{slot % size}" for slot in slots],
        )  # fmt: skip
        return experience, {name: value.double().cpu() for name, value in stats.items()}

    @torch.no_grad()
    def draw(self, rollout: int, slots: range, text: TextEmbedding, window: Window) -> Trajectory:
        """Images of consecutive slots. Each has its own numbers, whatever process or chunk it is drawn in."""
        purpose = (self.seed, "rollout", rollout)
        rng = SlotRandom(*purpose, first=slots.start, count=len(slots), device=self.device)
        x = rng.normal(*self.latent_shape)
        if self.config.rollout.shared_noise:
            size = self.config.group_size
            groups = range(slots.start // size, -(-slots.stop // size))
            shared = SlotRandom(*purpose, "group", first=groups.start, count=len(groups), device=self.device)
            x = shared.normal(*self.latent_shape)[[slot // size - groups.start for slot in slots]]
        drawing = self.model if self.policy.old is None else self.policy.old
        scale = self.config.rollout.guidance_scale
        with self.autocast():
            return sample_trajectory(
                lambda x, t: guided_velocity(drawing, x, t, text, self.null, scale).velocity,
                x, self.schedule, window, rng.normal,
            )  # fmt: skip

    def check_rewards(self) -> None:
        """TrainingError where too many images of the last rollouts got no score; every process must call it."""
        counts = [[tally.unscored, tally.scored] for tally in self.scorer.tally.values()]
        total = gather(torch.tensor([counts], device=self.device)).sum(dim=0).cpu()  # (R, 2)
        self.unscored.append(total)
        if len(self.unscored) <= WATCHED_ROLLOUTS:
            return
        recent = total - self.unscored[0]
        for name, (missing, scored) in zip(self.scorer.names, recent.tolist()):
            if missing > MAX_UNSCORED * (missing + scored):
                raise TrainingError(
                    f"reward '{name}' gave no score for {missing:.0f} of {missing + scored:.0f} images of the last "
                    f"{WATCHED_ROLLOUTS} rollouts; mend it, then run the same command again"
                )

    def transformed(self, values: Tensor) -> Tensor:
        """Scores of all slots (G K, R) -> (G, K, R), after the transforms of their rewards."""
        size = self.config.group_size
        groups = torch.arange(len(values), device=values.device) // size
        scores = self.scorer.transform(Scores(values, values.isfinite()), groups)
        return scores.values.unflatten(0, (-1, size))

    # ---- updates

    def rows(self, experience: Experience, update: int) -> Iterator[Rows]:
        """The micro-batches of one update."""
        states, log_probs, latents = experience.trajectory
        images, steps = self.layout.rows(update)
        for image, step in zip(images.split(self.batch_size), steps.split(self.batch_size)):
            image, step = image.to(self.device), step.to(self.device)
            rows = Rows(
                step=step + experience.window.first,
                advantage=experience.advantages[image],
                prompts=experience.text,
                group=experience.group[image],
                keys=[experience.keys[index] for index in image.tolist()],
                latents=latents[image],
            )
            if len(states):
                rows.x, rows.x_next = states[step, image], states[step + 1, image]
                rows.log_prob = log_probs[step, image]
            yield rows

    def remember(self, updates: list[list[Rows]]) -> None:
        """The velocities of the rows of later updates before the first one, with the kernels and shapes of training."""
        for update in updates:
            for rows in update:
                with self.autocast(), torch.enable_grad():
                    t = self.sde.t[rows.step]
                    rows.old = self.guided(self.model, rows.x, t, rows.text, self.model).velocity.detach()

    def guided(self, net: nn.Module, x: Tensor, t: Tensor, text: TextEmbedding, bare: nn.Module) -> Guided:
        scale = self.config.rollout.guidance_scale
        return guided_velocity(net, x, t, text, self.null, scale, self.config.cfg_grad, bare)

    def reference_velocity(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Guided | None:
        if self.beta == 0:
            return None
        with self.policy.before_training() as reference:
            return self.guided(reference, x, t, text, reference)

    def clipped_loss(self, net: nn.Module, rows: Rows, rng: SlotRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped objective of the rows' transitions and the KL to the reference."""
        algorithm, table = self.config.algorithm, self.sde.at(rows.step)
        # before the pass that keeps gradients
        reference = self.reference_velocity(rows.x, table.t, rows.text)
        policy = self.guided(net, rows.x, table.t, rows.text, self.model)
        mean = table.mean(rows.x, policy.velocity)  # (R, C, h, w)
        old = mean.detach() if rows.old is None else table.mean(rows.x, rows.old)
        log_ratio = losses.log_ratio(rows.x_next, mean, old, table.std, algorithm.ratio_norm)  # (R,)
        low, high = algorithm.clip_low, algorithm.clip_high
        objective = losses.clipped_objective(log_ratio.exp(), rows.advantage, low, high)
        pull, logs = self.pull(policy, reference, rows, self.kl_weights[rows.step])
        logs |= {"objective": objective.mean(), **rows.stats}
        with torch.no_grad():
            logs |= self.telemetry(rows, table, mean, old, log_ratio)
        return (objective * self.weights[rows.step]).mean() + pull, logs

    def nft_loss(self, net: nn.Module, rows: Rows, rng: SlotRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """DiffusionNFT: the final latents, noised again, pull or push the velocity by their advantage."""
        largest, t = self.config.advantage.clip, self.sde.t[rows.step]
        x = flow.interpolate(rows.latents, rng.normal(*rows.latents.shape[1:]), t)
        reference = self.reference_velocity(x, t, rows.text)
        with torch.no_grad():
            old = self.guided(self.policy.old, x, t, rows.text, self.policy.old).velocity
        policy = self.guided(net, x, t, rows.text, self.model)
        optimality = rows.advantage / largest / 2 + 0.5  # -clip..clip -> 0..1
        beta = self.config.algorithm.beta
        loss = losses.nft_loss(rows.latents, x, t, policy.velocity, old, optimality, beta)  # (R,)
        objective = largest * loss
        pull, logs = self.pull(policy, reference, rows, torch.full_like(t, self.beta))
        change = losses.per_sample((policy.velocity - old).square())
        logs |= {"kl_old": change.mean(), **by_step("kl_old", change, rows.step, self.schedule.num)}
        logs |= {"objective": objective.mean(), **rows.stats}
        return objective.mean() + pull, logs

    def pull(
        self, policy: Guided, reference: Guided | None, rows: Rows, weights: Tensor
    ) -> tuple[Tensor | float, dict[str, Tensor]]:
        """The KL to the reference, weighted per row, and its logs: in velocity units, whatever is trained on."""
        if reference is None:
            return 0.0, {}
        kl = losses.per_sample((policy.velocity - reference.velocity).square())  # (R,)
        logs = {"kl": kl.mean(), **by_step("kl", kl, rows.step, self.schedule.num)}
        if policy.unconditional is not None:
            # the null prompt's velocity: guidance reads it, and no reward holds it in place
            drift = policy.unconditional.detach() - reference.unconditional
            logs["null_drift"] = drift.square().mean()
        return (kl * weights).mean(), logs

    def telemetry(
        self, rows: Rows, table: Transitions, mean: Tensor, old: Tensor, log_ratio: Tensor
    ) -> dict[str, Tensor]:
        """How far the policy is from the one that drew, overall and per step of the sampler."""
        algorithm, ratio = self.config.algorithm, log_ratio.exp()
        std = table.std.flatten()
        delta = losses.per_sample((mean - old).square()).sqrt() / std  # (R,) in standard deviations of a step
        drawn = losses.log_prob(rows.x_next, old, table.std)
        numbers = {
            "ratio": ratio,
            "ratio_error": (ratio - 1).abs(),
            "delta": delta,
            "kl_old": delta.square() / 2,  # KL(old || new) of a transition, per latent number
        }
        logs = {name: values.mean() for name, values in numbers.items()}
        for name, values in numbers.items():
            logs |= by_step(name, values, rows.step, self.schedule.num)
        # where the clip acts: beyond it in the direction that pays
        logs["clip_low"] = ((ratio < 1 - algorithm.clip_low) & (rows.advantage < 0)).float().mean()
        logs["clip_high"] = ((ratio > 1 + algorithm.clip_high) & (rows.advantage > 0)).float().mean()
        logs["rollout_gap"] = (drawn - rows.log_prob).abs().mean()  # other batch shapes than in training
        return logs


def diversity(views: Tensor) -> Tensor:
    """How different the images of a group look: spread of their 8x8 thumbnails (G, K, D), in units of -1..1 pixels."""
    return views.double().var(dim=1).mean(dim=1).sqrt().mean()


def by_step(name: str, values: Tensor, step: Tensor, num: int) -> dict[str, Tensor]:
    """(sum, count) of per-row values (R,) for every step of the sampler."""
    pairs = torch.stack([values.detach().double(), torch.ones_like(values, dtype=torch.float64)], dim=1)
    sums = pairs.new_zeros(num, 2).index_add_(0, step, pairs)
    return {f"{name}/step{index}": sums[index] for index in range(num)}


class Clock:
    """Seconds by purpose; what a GPU still has to do counts for who gave it the work."""

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
