"""The GRPO stage: exact ratios, who draws what, accumulation, resume, averages, failing rewards, two processes."""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import grpo_toy as toy
import pytest
import torch
from grpo_toy import merged

from nitro_e.config import Config, ConfigError, TrainingError
from nitro_e.data.prompts import Prompt
from nitro_e.randomness import SampleRandom
from nitro_e.record import metrics, run_folder
from nitro_e.rewards import win_rates
from nitro_e.sampling import flow
from nitro_e.stages.grpo.advantage import AdvantageConfig, advantages, isolation
from nitro_e.stages.grpo.clipped import ClippedConfig, clipped_objective, log_ratio, step_weights
from nitro_e.stages.grpo.groups import Layout, group_prompts
from nitro_e.stages.grpo.kl import KLConfig, convert_beta, kl_coefficients
from nitro_e.stages.grpo.policy import without_adapter
from nitro_e.stages.grpo.sde import per_sample
from nitro_e.stages.grpo.stage import Clock

ROOT = Path(__file__).parent.parent
NFT = {"kind": "nft", "times": 4}
BRANCHES = [{}, {"rollout": {"guidance_scale": 1.0}}, {"cfg_grad": "cond"}, {"algorithm": NFT}, toy.LORA]
LATER = {"rollout": {"window": {"start": 2}}}
RANDOM = {"rollout": {"window": {"kind": "random"}}}
MOODY = {"rewards": [{"name": "grpo_toy:moody", "label": "moody"}]}


def micro_batches(stage, count, step=0, rank=0, world=1, accumulate=1):
    stream = stage.batches(step, rank, world, accumulate)
    return [next(stream) for _ in range(count)]


def rng_for(stage, micro=0):
    return SampleRandom("test", first=micro * stage.batch_size, count=stage.batch_size)


def loss_of(stage, rows, micro=0):
    return stage.phases[0].loss(stage.policy, rows, rng_for(stage, micro))


def gradient(stage, batches):
    """Of the update over these micro-batches, as the engine adds it up."""
    stage.policy.zero_grad()
    for micro, rows in enumerate(batches):
        (loss_of(stage, rows, micro)[0] / len(batches)).backward()
    return torch.cat([p.grad.flatten() for p in trained(stage)])


def trained(stage):
    return [p for p in stage.policy.parameters() if p.requires_grad]


def steps_of(stage, rows):
    """Steps of the rows of the first rollout, worked out here: every image has all steps of the window."""
    first, stop = stage.schedule.window_of(stage.seed, 0)
    return torch.arange(first, stop).repeat(len(rows.x) // (stop - first))


def guided(stage, net, rows, detach=False):
    """Velocities at the rows, guided by 2; detach: those of the null prompt."""
    t, null = stage.schedule.sde.t[steps_of(stage, rows)], toy.OneHot().encode([""] * len(rows.x))
    without = net(rows.x, t, null)
    return 2 * net(rows.x, t, rows.text) - (without.detach() if detach else without)


@torch.no_grad()
def move(stage, by):
    """Trained weights, by a vector of all of them."""
    for parameter, part in zip(trained(stage), by.split([p.numel() for p in trained(stage)])):
        parameter += part.view_as(parameter)


def slope(stage, rows, direction, step=1e-2):
    """Of the loss along a direction, by finite differences; the weights stay."""
    direction, values = direction / direction.norm(), []
    for shift in (step, -2 * step):
        move(stage, shift * direction)
        values.append(loss_of(stage, rows)[0].item())
    move(stage, step * direction)
    return (values[0] - values[1]) / (2 * step)


# ---- ratios


@pytest.mark.parametrize(
    "options",
    [{}, {"cfg_grad": "cond"}, {"rollout": {"sde": {"kind": "ancestral"}}}, LATER, RANDOM, toy.LORA],
)
def test_ratio_is_one_before_the_first_update_and_in_every_update_without_one(options):
    stage = toy.make_stage(updates=4, accumulate=2, **options)
    for number, rows in enumerate(micro_batches(stage, 8, accumulate=2)):
        assert (rows.old is None) == (number < 2)  # the first update needs nothing to compare with
        logs = loss_of(stage, rows, number)[1]
        assert logs["ratio"] == 1 and logs["ratio_error"] == 0 and logs["delta"] == 0
        assert logs["clip_low"] == logs["clip_high"] == logs["kl_old"] == 0
        assert logs["rollout_gap"] <= 1e-6  # drawn in another batch shape


@pytest.mark.parametrize("options", BRANCHES)
def test_bf16_has_exact_ratios_and_all_gradients(options):
    """Autocast keeps cast weights; a pass without gradients before one with them must not take those away."""

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    options = {"updates": 2, **options}
    stage, exact = toy.make_stage(autocast=autocast, **options), toy.make_stage(**options)
    for rows in micro_batches(stage, 2):
        gradients = []
        for net, context in ((stage, autocast), (exact, contextlib.nullcontext)):
            net.policy.zero_grad()
            with context():
                loss, logs = loss_of(net, rows)
            loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in trained(net)]))
            if net is stage and "ratio_error" in logs:
                assert logs["ratio_error"] == 0 and logs["rollout_gap"] < 1e-3
        if rows.old is None:  # later rows remember bf16 velocities
            assert torch.cosine_similarity(*gradients, dim=0) > 0.98
        assert (gradients[0] != 0).float().mean() > 0.9


def test_ratio_moves_after_an_update_and_the_clip_bites():
    stage = toy.make_stage(updates=2, algorithm={"kind": "clipped", "clip_low": 1e-4, "clip_high": 2e-4})
    first, second = micro_batches(stage, 2)
    move(stage, -3.0 * gradient(stage, [first]))
    loss, logs = loss_of(stage, second)
    assert logs["ratio_error"] > 1e-5 and logs["delta"] > 0
    table = stage.schedule.sde.at(steps_of(stage, second))
    means = [table.mean(second.x, v) for v in (guided(stage, stage.model, second), second.old)]
    ratio = log_ratio(second.x_next, *means, table.std, False).exp()
    silent = (clipped_objective(ratio, second.advantage, 1e-4, 2e-4) != -second.advantage * ratio).float()
    assert 0 < logs["clip_low"] and 0 < logs["clip_high"]
    assert (logs["clip_low"] + logs["clip_high"]).item() == pytest.approx(silent.mean().item(), abs=0.05)
    assert logs["kl_old"].item() == pytest.approx(
        sum(float(pair[0]) for name, pair in logs.items() if name.startswith("kl_old/")) / stage.batch_size
    )


@pytest.mark.parametrize("options", [{}, LATER, RANDOM, {"cfg_grad": "cond"}, toy.LORA])
def test_first_update_is_reinforce_on_the_drawn_images(options):
    """The stage's own loss, differentiated, against scores written out with torch.distributions."""
    stage = toy.make_stage(**{"updates": 1, "algorithm": {"kind": "clipped", "kl": {"beta": 0.0}}, **options})
    (rows,) = micro_batches(stage, 1)
    ours = gradient(stage, [rows])
    table, step, shape = stage.schedule.sde, steps_of(stage, rows), (-1, 1, 1, 1)
    velocity = guided(stage, stage.model, rows, detach="cfg_grad" in options)
    mean = table.x_coef[step].view(shape) * rows.x + table.v_coef[step].view(shape) * velocity
    density = torch.distributions.Normal(mean, table.std[step].view(shape)).log_prob(rows.x_next)
    expected = -(rows.advantage * density.flatten(1).sum(dim=1)).mean() / toy.DIM
    stage.policy.zero_grad()
    expected.backward()
    reference = torch.cat([p.grad.flatten() for p in trained(stage)])
    assert torch.allclose(ours, reference, rtol=1e-4, atol=1e-7)


# Options of the objective. The grid is bent, so that 1/h is not the same for all steps.
OBJECTIVES = [
    {},
    {"ratio_norm": True},
    {"step_weight": "noise"},
    {"step_weight": "1/h"},
    {"kl": {"kind": "gaussian_dt", "beta": 10.0, "units": "velocity"}},
    {"kl": {"kind": "velocity", "beta": 1.0, "units": "gaussian_dt"}},
]


@pytest.mark.parametrize("window", [{}, LATER, RANDOM])
@pytest.mark.parametrize("options", OBJECTIVES)
def test_the_loss_is_put_together_from_its_parts(options, window):
    """Of a second update, from the unit functions, and so its gradient, which every option changes."""
    defaults = {"kind": "clipped", "clip_low": 1e-3, "clip_high": 1e-3, "kl": {"beta": 1e-3}}
    stage = toy.make_stage(algorithm={**defaults, **options}, **merged(window, {"rollout": {"shift": 3.0}}))
    first, rows = micro_batches(stage, 2)
    move(stage, -3.0 * gradient(stage, [first]))
    table, step, steps = stage.schedule.sde, steps_of(stage, rows), stage.schedule.trained()
    here, velocity = table.at(step), guided(stage, stage.model, rows)
    change = per_sample((velocity - guided(stage, stage.policy.reference, rows)).square())

    def parts(clip_low, clip_high, kl, ratio_norm=False, step_weight="none", **_):
        """Loss and gradient."""
        means = [here.mean(rows.x, v) for v in (velocity, rows.old)]
        ratio = log_ratio(rows.x_next, *means, here.std, ratio_norm).exp()
        objective = clipped_objective(ratio, rows.advantage, clip_low, clip_high)
        kind, beta = kl.get("kind", "velocity"), kl["beta"]
        if "units" in kl:
            beta = convert_beta(beta, kl["units"], kind, table, steps)
        penalty = beta * kl_coefficients(kind, table)[step] * change
        loss = (objective * step_weights(step_weight, table, steps)[step] + penalty).mean()
        return loss.item(), flat(torch.autograd.grad(loss, trained(stage), retain_graph=True))

    def flat(tensors):
        return torch.cat([tensor.flatten() for tensor in tensors])

    value, expected = parts(**{**defaults, **options})
    assert loss_of(stage, rows)[0].item() == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert (gradient(stage, [rows]) - expected).norm() < 1e-3 * expected.norm()
    if "kl" in options:  # taken for what it is not
        defaults["kl"] = {name: options["kl"][name] for name in ("kind", "beta")}
    if options:
        assert (parts(**defaults)[1] - expected).norm() > 1e-2 * expected.norm()


def test_beta_is_converted_to_the_kind_that_is_trained_on():
    kl = {"kind": "velocity", "units": "gaussian_dt", "beta": 0.04}
    stage = toy.make_stage(algorithm={"kind": "clipped", "kl": kl}, rollout={"window": {"size": 6}})
    weight = stage.config.algorithm.kl.weight(stage.schedule)
    assert weight == pytest.approx(3.9e-4, rel=0.02)
    assert stage.algorithm.shared.kl.weights.tolist() == pytest.approx([weight] * 10)


def test_gradient_of_lora_factors_is_that_of_finite_differences():
    """Objective and KL together, in a second update, along the gradient itself."""
    algorithm = {"kind": "clipped", "clip_low": 0.5, "clip_high": 0.5, "kl": {"beta": 0.1}}
    stage = toy.make_stage(algorithm=algorithm, **toy.LORA)
    rows = micro_batches(stage, 2)[1]
    analytic = gradient(stage, [rows])
    assert analytic.norm().item() == pytest.approx(slope(stage, rows, analytic), rel=5e-3)
    with without_adapter(stage.model) as reference, torch.no_grad():
        before = guided(stage, reference, rows)
    change = (guided(stage, stage.model, rows) - before).square().mean()
    assert change > 0.1 and loss_of(stage, rows)[1]["kl"].item() == pytest.approx(change.item(), rel=1e-4)


@pytest.mark.parametrize("options", [LATER, RANDOM])
def test_kl_is_zero_at_the_start_and_its_gradient_pulls_back(options):
    options = {
        "updates": 1,
        "algorithm": {"kind": "clipped", "kl": {"kind": "gaussian", "beta": 100.0}},
        **options,
    }
    stage = toy.make_stage(**options)
    (rows,) = micro_batches(stage, 1)
    assert loss_of(stage, rows)[1]["kl"] == 0 and loss_of(stage, rows)[1]["null_drift"] == 0
    with torch.no_grad():
        stage.model.out.weight += 0.01
    rows.advantage.zero_()  # the objective is silent: the KL alone
    loss, logs = loss_of(stage, rows)
    velocities = [guided(stage, net, rows).detach() for net in (stage.model, stage.policy.reference)]
    kl = (velocities[0] - velocities[1]).square().flatten(1).mean(dim=1)
    expected = 100 * (stage.schedule.sde.gaussian_kl[steps_of(stage, rows)] * kl).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and logs["null_drift"] > 0
    analytic = gradient(stage, [rows])
    assert analytic.norm().item() == pytest.approx(slope(stage, rows, analytic), rel=5e-3)


@pytest.mark.parametrize(
    "advantage, reward",
    [({"std": "group"}, {}), ({"std": "batch"}, {}), ({"clip": 0.3}, {}), ({}, {"transform": "rank"})],
)
def test_advantages_are_those_of_the_settings(advantage, reward):
    """From the unit functions; what is logged is the scores, not their ranks."""
    rewards = [{"name": "grpo_toy:brightness", "label": "b", **reward}]
    stage = toy.make_stage(updates=1, rewards=rewards, advantage=advantage)
    (rows,) = micro_batches(stage, 1)
    prompts = [prompt.text for prompt in toy.POOL] * 8
    pixels = toy.Identity().decode(rows.latents[::3])
    scores = stage.scorer(pixels, prompts, [{}] * 32).values  # (32, 1)
    ranks = win_rates(scores[:, 0], torch.ones(32, dtype=torch.bool), torch.arange(32) // 8)[:, None]

    def expected(values, **settings):
        return advantages(values.view(4, 8, 1), torch.ones(1), AdvantageConfig(**settings)).flatten().float()

    ours = rows.advantage[::3]
    assert torch.allclose(ours, expected(ranks if reward else scores, **advantage), atol=1e-5)
    assert not torch.allclose(ours, expected(scores), atol=1e-2)  # of the defaults
    spread = scores.view(4, 8).std(dim=1, unbiased=False).mean()
    for name, value in {"": scores.mean(), "/std": scores.std(unbiased=False), "/within_std": spread}.items():
        assert rows.stats[f"reward/b{name}"].item() == pytest.approx(value.item(), rel=1e-4)


class Vision:
    """Features that are a random map of the pixels, for one patch."""

    width = 5

    def __init__(self):
        self.matrix = torch.randn(toy.DIM, 5, generator=torch.Generator().manual_seed(3))

    def features(self, pixels, grid):
        assert grid == (1, 1)
        return (pixels.flatten(1) @ self.matrix)[:, None]


def test_advantages_are_scaled_by_the_features_of_the_images():
    """As the unit function says, image by image; without the option the encoder changes nothing."""
    rewards = [{"name": "grpo_toy:brightness", "label": "b"}]
    options = {"updates": 1, "rewards": rewards}
    (plain,) = micro_batches(toy.make_stage(**options), 1)
    scaled = toy.make_stage(**options, advantage={"diversity": True}, vision=Vision())
    (rows,) = micro_batches(scaled, 1)
    assert torch.equal(rows.latents, plain.latents) and not torch.equal(rows.advantage, plain.advantage)
    pixels = toy.Identity().decode(rows.latents[::3])
    factors = isolation(Vision().features(pixels, (1, 1))[:, 0].view(4, 8, 5)).flatten()
    expected = torch.where(plain.advantage[::3] > 0, plain.advantage[::3] * factors, plain.advantage[::3])
    assert torch.allclose(rows.advantage[::3], expected.clamp(-5, 5).float(), atol=1e-5)
    assert "seconds/vision" in rows.stats and "seconds/vision" not in plain.stats


@pytest.mark.parametrize(
    "options, passes",  # forward passes per row: training, reference, drawing ten steps for three rows, later updates
    [
        ({"rollout": {"guidance_scale": 1.0}}, 3 + 1 + 10 / 3 + 1 / 2),
        ({}, 6 + 2 + 20 / 3 + 1),
        ({"cfg_grad": "cond"}, 3 + 1 + 2 + 20 / 3 + 1),
        ({"algorithm": {"kind": "clipped", "kl": {"beta": 0.0}}}, 6 + 20 / 3 + 1),
        ({"algorithm": NFT}, 6 + 2 + 20 / 4 + 2),
    ],
)
def test_work_per_row(options, passes):
    assert 3 * toy.make_stage(**options).forward_flops == pytest.approx(passes)


def test_seconds_on_a_gpu_are_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock = Clock(torch.device("cuda"))
    with clock.of("draw"):
        assert len(waited) == 1  # for what was going on before
    assert len(waited) == 2 and clock.seconds["draw"] >= 0
    with Clock(torch.device("cpu")).of("draw"):
        pass
    assert len(waited) == 2


def test_no_reference_is_kept_without_a_kl():
    assert toy.make_stage(algorithm={"kind": "clipped", "kl": {"beta": 0.0}}).policy.reference is None


# ---- who draws what


def test_groups_go_through_all_prompts_before_any_comes_again():
    drawn = [number for rollout in range(21) for number in group_prompts(3, rollout, 10, 70)]
    assert all(sorted(drawn[i : i + 70]) == list(range(70)) for i in (0, 70, 140))
    assert drawn[:70] != drawn[70:140]
    assert group_prompts(3, 5, 10, 70) == drawn[50:60]  # needs no history
    assert group_prompts(4, 0, 10, 70) != drawn[:10]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_update_gets_the_same_share_of_every_group(world):
    layout = Layout(groups=4, group_size=6, updates=3, world=world, accumulate=1, steps=2)
    images = [image for rank in range(world) for image in layout.images(rank)]
    assert images == list(range(24))
    for update in range(3):
        pairs = []
        for rank in range(world):
            places, steps = layout.rows(update)
            pairs += [
                (layout.images(rank)[p], s) for p, s in zip(places.tolist(), steps.tolist(), strict=True)
            ]
        assert pairs == [(image, s) for image in range(24) if image % 3 == update for s in (0, 1)]
        assert [sum(image // 6 == group for image, _ in pairs) for group in range(4)] == [4] * 4


class Threads:
    """Processes as threads: `gather` brings together what all of them give."""

    def __init__(self, world):
        self.world, self.barrier, self.rank = world, threading.Barrier(world), threading.local()
        self.given = [None] * world

    def gather(self, tensor):
        self.given[self.rank.value] = tensor
        self.barrier.wait(30)
        everything = torch.cat(self.given)
        self.barrier.wait(30)
        return everything

    def run(self, work):
        """[work(0), work(1), ...]"""

        def one(rank):
            self.rank.value = rank
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(one, range(self.world)))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("options", [*BRANCHES, MOODY])  # moody: processes have unequal numbers of scores
def test_images_advantages_and_gradients_do_not_depend_on_processes(options, world, monkeypatch):
    """With 4 processes the groups are spread, with 2 each has its own."""
    options = {"groups": 2, "group_size": 4, **options}
    one = toy.make_stage(**options)
    whole = micro_batches(one, 2)
    expected = [gradient(one, [rows]) for rows in whole]
    threads = Threads(world)
    monkeypatch.setattr("nitro_e.stages.grpo.stage.gather_over_processes", threads.gather)
    stages = [toy.make_stage(world=world, **options) for _ in range(world)]
    streams = threads.run(lambda rank: micro_batches(stages[rank], 2, rank=rank, world=world))
    for update in range(2):
        rows = [stream[update] for stream in streams]
        for name in ("latents", "advantage"):
            ours = torch.cat([getattr(r, name) for r in rows])
            assert torch.allclose(ours, getattr(whole[update], name), atol=1e-5), name
        gradients = []
        for rank, stage in enumerate(stages):
            stage.policy.zero_grad()
            loss_of(stage, rows[rank], rank)[0].backward()
            gradients.append(torch.cat([p.grad.flatten() for p in trained(stage)]))
        assert torch.allclose(sum(gradients) / world, expected[update], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("more", [{}, {"algorithm": {"kind": "awm", "times": 4}}])
def test_a_rollout_has_one_size_the_same_on_all_processes_and_after_a_resume(more, monkeypatch):
    shapes = [(32, 1, 1), (16, 2, 1), (8, 1, 4)]
    options = {"shapes": shapes, "updates": 1, "groups": 2, "group_size": 4, **more}
    whole = micro_batches(toy.make_stage(**options), 6)
    seen = [tuple(rows.latents.shape[1:]) for rows in whole]
    assert set(seen[:3]) == set(seen[3:]) == set(shapes)
    threads = Threads(2)
    monkeypatch.setattr("nitro_e.stages.grpo.stage.gather_over_processes", threads.gather)
    stages = [toy.make_stage(world=2, **options) for _ in range(2)]
    streams = threads.run(lambda rank: micro_batches(stages[rank], 4, step=2, rank=rank, world=2))
    for step in range(2, 6):
        parts = [stream[step - 2] for stream in streams]
        for name in ("latents", "advantage"):
            ours = torch.cat([getattr(rows, name) for rows in parts])
            assert torch.allclose(ours, getattr(whole[step], name), atol=1e-5), name
        assert loss_of(stages[0], parts[0])[0].isfinite()


def test_the_clip_follows_the_size():
    config, one = ClippedConfig(ratio_norm=True), torch.zeros(1)
    assert config.clip(16_384)[0] == pytest.approx(2 * config.clip(65_536)[0])
    ratio = one + 1 + 3e-6
    clipped = [
        clipped_objective(ratio, one + 1, *config.clip(numbers)).item() for numbers in (16_384, 65_536)
    ]
    assert clipped[0] < clipped[1]


@pytest.mark.parametrize("options", BRANCHES)
def test_gradient_does_not_depend_on_micro_batches_nor_rollout_batches(options):
    stages = [
        toy.make_stage(accumulate=1, **options),
        toy.make_stage(accumulate=4, **merged(options, {"rollout": {"per_device": 5}})),
    ]
    whole, parts = micro_batches(stages[0], 2), micro_batches(stages[1], 8, accumulate=4)
    for update in range(2):
        ours = gradient(stages[1], parts[4 * update : 4 * update + 4])
        assert torch.allclose(ours, gradient(stages[0], [whole[update]]), rtol=1e-4, atol=1e-6)


def test_images_of_a_group_differ_and_rollouts_do_too():
    stage = toy.make_stage(updates=1)
    first, second = micro_batches(stage, 2)
    flat = torch.cat([first.latents[::3], second.latents[::3]]).flatten(1)
    assert len(torch.unique(flat, dim=0)) == 2 * 32
    assert torch.equal(micro_batches(stage, 1, step=1)[0].latents, second.latents)  # needs no history


def test_shared_noise_starts_a_group_from_one_point():
    stage = toy.make_stage(updates=1, rollout={"shared_noise": True, "window": {"size": 3, "start": 0}})
    (rows,) = micro_batches(stage, 1)
    starts = rows.x[::3].flatten(1)  # of step 0
    assert (
        len(torch.unique(starts, dim=0)) == 4 and len(torch.unique(rows.latents[::3].flatten(1), dim=0)) == 32
    )


def test_nft_draws_with_a_policy_that_follows():
    """At rollout n the old policy keeps min(n * lag, max_lag) of itself."""
    stage = toy.make_stage(updates=1, algorithm={"kind": "nft", "lag": 0.2, "max_lag": 0.3})
    stream, expected = stage.batches(0, 0, 1, 1), stage.model.out.weight.detach().clone()
    for keep in (None, 0.2, 0.3, 0.3):
        next(stream)
        if keep is not None:
            expected = keep * expected + (1 - keep) * stage.model.out.weight.detach()
        assert torch.allclose(stage.policy.old.out.weight, expected, atol=1e-6)
        with torch.no_grad():
            stage.model.out.weight += 0.1
    assert not any(parameter.requires_grad for parameter in stage.policy.old.parameters())


# ---- an objective that the package does not have


@dataclass(frozen=True, kw_only=True)
class WeightedConfig(Config):
    """Flow matching on the drawn images, weighed by their advantage."""

    keeps_old: ClassVar[bool] = False
    kl: KLConfig = field(default_factory=lambda: KLConfig(beta=0.0))

    def schedule(self, rollout):
        return rollout.schedule(None)

    def rows_per_image(self, rollout):
        return 2

    def build(self, shared):
        return Weighted(shared)


class Weighted:
    name, frozen_passes = "weighted", 0.0

    def __init__(self, shared):
        self.shared, self.rollout_model, self.calls = shared, shared.policy.model, []

    def before_rollout(self, rollout):
        self.calls.append(("rollout", rollout))

    def before_updates(self, updates):
        self.calls.append(("updates", len(updates)))

    def loss(self, net, rows, rng):
        t, noise = self.shared.schedule.ode.t[rows.step], rng.normal(*rows.latents.shape[1:])
        x = flow.interpolate(rows.latents, noise, t)
        error = self.shared.velocity(net, x, t, rows.text).velocity - flow.velocity_target(
            rows.latents, noise
        )
        return (rows.advantage * per_sample(error.square())).mean(), {}


def test_another_objective_is_a_class_and_its_config(monkeypatch):
    config = replace(toy.make_config(), algorithm=WeightedConfig())
    monkeypatch.setattr(toy, "make_config", lambda: config)
    stage = toy.make_stage()
    batches = micro_batches(stage, 4)
    assert stage.name == "weighted" and [len(rows.latents) for rows in batches] == [32] * 4
    assert stage.algorithm.calls == [("rollout", 0), ("updates", 2), ("rollout", 1), ("updates", 2)]
    assert gradient(stage, batches[:1]).norm() > 0
    assert 3 * stage.forward_flops == pytest.approx(6 + 2 * 10 / 2)  # guided; ten steps for two rows


# ---- on the engine


def numbers(run):
    keep = ("loss", "grad_norm", "kl", "reward/signs", "ratio_error")
    return {row["step"]: {name: row[name] for name in keep if name in row} for row in metrics.read(run)}


@pytest.mark.parametrize("options", [{}, {"algorithm": NFT}])
def test_resume_continues_exactly_and_never_inside_a_rollout(options, tmp_path):
    toy.train(tmp_path / "clean", options)
    stopped = toy.train(tmp_path / "run", options, stop=3)
    assert stopped.step == 4  # asked in the third update, it ended with the rollout
    toy.train(tmp_path / "run", options)
    assert numbers(tmp_path / "run") == numbers(tmp_path / "clean")
    assert len(numbers(tmp_path / "run")) == 8
    states = [
        torch.load(run_folder.folder_of(tmp_path / name, 8) / "trainer" / f"{part}.pt", weights_only=True)
        for name in ("clean", "run")
        for part in ("policy", "ema")
    ]
    for part in (0, 1):
        ours, theirs = (states[part + index]["module"] for index in (2, 0))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    with pytest.raises(ConfigError, match="another experiment"):
        toy.train(tmp_path / "run", {**options, "group_size": 4}, steps=12)
    stage = toy.make_stage(**options)
    with pytest.raises(ConfigError, match="middle of a rollout"):
        next(stage.batches(3, 0, 1, 1))


def test_average_is_updated_once_per_update(tmp_path):
    """The average after n steps, from the weights of every step."""
    weights = []
    original = toy.ToyGRPO.batches

    class Watching(toy.ToyGRPO):
        def batches(self, *arguments):
            for rows in original(self, *arguments):
                weights.append(self.model.out.weight.detach().clone())
                yield rows

    trainer = toy.train(tmp_path / "run", {}, accumulate=2, cls=Watching)
    expected = weights[2].clone()  # the first update copies
    for step in range(2, 8):
        expected = 0.9 * expected + 0.1 * weights[2 * step]
    expected = 0.9 * expected + 0.1 * trainer.stage.model.out.weight.detach()
    assert not torch.equal(weights[0], weights[2])
    assert torch.allclose(trainer.state.ema.ema_model.out.weight, expected, atol=1e-6)
    first = run_folder.folder_of(tmp_path / "run", 8)
    assert (first / "model").is_dir() and (first / "ema").is_dir()


def test_lr_zero_stays_where_it_is(tmp_path):
    trainer = toy.train(tmp_path / "run", {"optim": {"lr": 0.0}, "updates": 4})
    assert all(row["ratio_error"] == 0 and row["kl"] == 0 for row in metrics.read(tmp_path / "run"))
    for name, parameter in toy.make_net().named_parameters():
        assert torch.equal(parameter, trainer.stage.model.get_parameter(name))


def test_metrics(tmp_path):
    """Everything that should be monitored is there."""
    rewards = [
        {"name": "grpo_toy:signs", "label": "signs"},
        {"name": "grpo_toy:brightness", "label": "held out", "weight": 0},
    ]
    toy.train(tmp_path / "run", {"rewards": rewards}, steps=2, save_every=2)
    first, second = metrics.read(tmp_path / "run")
    for reward in ("signs", "held out"):
        for part in ("", "/std", "/within_std", "/invalid"):
            assert math.isfinite(first[f"reward/{reward}{part}"])
    for name in (
        "zero_std_ratio",
        "advantage",
        "diversity",
        "rollout_gap",
        "ratio/step2",
        "ratio_error/step0",
        "delta/step1",
        "kl/step2",
        "kl_old/step0",
        "clip_low",
        "clip_high",
        "null_drift",
        "grad_norm",
        "lr",
        "ema_gap",
        "data_wait",
        "seconds/draw",
        "seconds/decode",
        "seconds/reward",
        "window",
        "rollout",
    ):
        assert math.isfinite(first[name]), name
    assert "reward/signs" not in second and second["ratio_error"] > 0


# ---- rewards that fail


def test_images_without_a_score_teach_nothing_and_are_never_zero():
    stage = toy.make_stage(rewards=[{"name": "grpo_toy:moody", "label": "moody"}], updates=1)
    (rows,) = micro_batches(stage, 1)
    images = toy.Identity().decode(rows.latents[::3]).flatten(1)
    scored = images[:, 0] >= 0
    advantage = rows.advantage[::3]
    assert 0 < scored.sum() < 32 and (advantage[~scored] == 0).all() and (advantage[scored] != 0).any()
    assert rows.stats["reward/moody/invalid"].item() == pytest.approx((~scored).float().mean().item())
    mean = toy.brightness(images, None, None)[scored].mean().item()
    assert rows.stats["reward/moody"].item() == pytest.approx(mean, abs=1e-4)
    logs = loss_of(stage, rows)[1]
    assert logs["kl"] == 0  # all rows count, for the KL


class Overflowing(toy.Identity):
    """The first image of every group is infinitely bright."""

    def decode(self, latents):
        pixels = super().decode(latents)
        pixels[::8] = math.inf
        return pixels


def test_overflowed_images_are_invalid_and_prompts_a_reward_is_not_asked_about_are_not():
    stage = toy.make_stage(updates=1, rewards=[{"name": "grpo_toy:counted", "label": "c"}])
    stage.codec = Overflowing()
    stage.pool[:2] = [Prompt(prompt.text, {**prompt.info, "include": []}) for prompt in stage.pool[:2]]
    (rows,) = micro_batches(stage, 1)
    asked = torch.tensor([number < 2 for number in group_prompts(stage.seed, 0, 4, 4)])
    advantage = rows.advantage[::3].view(4, 8)
    assert torch.equal(advantage != 0, asked[:, None] & (torch.arange(8) > 0))
    assert rows.stats["reward/c/invalid"].item() == pytest.approx(1 / 8)
    assert rows.stats["zero_std_ratio"] == 0.5 and rows.stats["diversity"].isfinite()


@pytest.mark.parametrize("kind", ["clipped", "nft", "awm", "reward_gradient"])
def test_an_image_that_is_not_finite_teaches_nothing(kind, monkeypatch):
    """The gradient is that of all other rows, and every log is finite."""

    def draw(stage, *arguments):
        drawn = toy.GRPO.draw(stage, *arguments)
        drawn.states[1:, 0], drawn.log_probs[:, 0], drawn.latents[0] = math.nan, math.nan, math.nan
        return drawn

    monkeypatch.setattr(toy.ToyGRPO, "draw", draw)
    algorithm = {"kind": kind, "kl": {"beta": 1.0}, **({"times": 3} if kind in ("nft", "awm") else {})}
    rewards = [{"name": "grpo_toy:brightness", "label": "bright"}]
    stage = toy.make_stage(updates=1, algorithm=algorithm, rewards=rewards)
    (rows,) = micro_batches(stage, 1)
    count = len(rows.step)
    with torch.no_grad():
        stage.model.out.weight += 0.02
    value, logs = loss_of(stage, rows)
    assert value.isfinite() and all(log.isfinite().all() for log in logs.values())
    whole, noise = gradient(stage, [rows]), rows.noise()
    rest = {name: part[3:] for name, part in vars(rows).items() if isinstance(part, (torch.Tensor, list))}
    rng = SampleRandom("test", first=3, count=count - 3)
    stage.policy.zero_grad()
    stage.phases[0].loss(stage.policy, replace(rows, **rest, noise=lambda: noise[3:]), rng)[0].backward()
    expected = torch.cat([p.grad.flatten() for p in trained(stage)]) * (count - 3) / count
    assert expected.norm() > 0 and (whole - expected).norm() < 1e-4 * expected.norm()


def test_a_broken_reward_ends_the_run_with_a_reason(tmp_path):
    rewards = [{"name": "grpo_toy:broken", "label": "server", "batch_size": 32}]
    with pytest.raises(TrainingError, match="server.*is down"):
        toy.train(tmp_path / "run", {"rewards": rewards})
    assert json.loads((tmp_path / "run" / "STATUS.json").read_text())["state"] == "failed"
    # scores half: too many are missing, though never all
    rewards = [{"name": "grpo_toy:moody", "label": "moody"}]
    with pytest.raises(TrainingError, match="moody"):
        toy.train(tmp_path / "other", {"rewards": rewards, "updates": 1}, steps=30)


def test_a_reward_that_never_differs_is_warned_of_once(caplog):
    rewards = [
        {"name": "grpo_toy:constant", "label": "flat"},
        {"name": "grpo_toy:signs", "label": "signs", "weight": 0, "every": 2},
    ]
    stage = toy.make_stage(rewards=rewards, updates=1)
    for rollout in range(7):
        stats = stage.collect(rollout, 0)[1]
        assert ("reward/signs" in stats) == ("reward/signs/invalid" in stats) == (rollout % 2 == 0)
        assert stats["seconds/reward/flat"] >= 0 and stats["zero_std_ratio"] == 1
    (record,) = [record for record in caplog.records if "nothing is learned" in record.getMessage()]
    assert "'flat' gave all images of each prompt the same score in 5 rollouts" in record.getMessage()


# ---- two processes


def test_two_processes_give_the_run_of_one(tmp_path):
    """All weights, and an adapter."""
    options = {"all": {"groups": 3, "group_size": 4}, "lora": {"groups": 3, "group_size": 4, **toy.LORA}}
    for name, stage in options.items():
        toy.train(tmp_path / "one" / name, stage, steps=4)
    script, environment = ROOT / "tests" / "grpo_toy.py", {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    runs = {str(tmp_path / "two" / name): {"steps": 4, "stage": stage} for name, stage in options.items()}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(script),
            json.dumps(runs),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in options:
        one, two = (numbers(tmp_path / processes / name) for processes in ("one", "two"))
        assert len(one) == 4
        for step in one:
            assert two[step] == pytest.approx(one[step], rel=1e-4, abs=1e-7), (name, step)
