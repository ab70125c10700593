"""The parts of distillation against closed forms and plain code; U1, U2, ... are the numbers of the test plan."""

import itertools
import math
from dataclasses import replace
from operator import attrgetter

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from distill_tools import (
    SHAPE,
    SMALLER,
    TINY,
    Loop,
    distill_config,
    random_batch,
    random_text,
    tiny_model,
    tiny_stage,
)
from torch import nn

from nitro_e.config import ConfigError, TrainingError, from_dict
from nitro_e.model import ModelConfig
from nitro_e.model.layers import Compressor, Reconstructor, fold
from nitro_e.randomness import SampleRandom
from nitro_e.sampling import flow
from nitro_e.sampling.flow import TimestepConfig
from nitro_e.sampling.samplers import SamplingConfig, euler, fresh_noise, multistep, sample
from nitro_e.stages.distill import gan_losses as losses
from nitro_e.stages.distill.adversarial import Adversarial, AdversarialConfig
from nitro_e.stages.distill.guards import GuardConfig, check, describe_prediction
from nitro_e.stages.distill.heads import (
    Backbone,
    Features,
    FixedHeads,
    Head,
    HeadConfig,
    feature_maps,
    token_maps,
)
from nitro_e.stages.distill.inputs import InputConfig, Prediction, Predictor
from nitro_e.stages.distill.objective import Shared, frozen
from nitro_e.stages.distill.pool import HeadPool, PoolConfig
from nitro_e.stages.distill.presets import PRESETS
from nitro_e.stages.distill.regression import DecayConfig, Diffusion, DiffusionConfig, Reflow, ReflowConfig
from nitro_e.stages.distill.score import ScoreTimesConfig
from nitro_e.stages.distill.stage import Term
from nitro_e.training.optim import OptimConfig, build_optimizers

SIGMAS = (1.0, 0.75, 0.5, 0.25)


def rng(count=8, *purpose):
    return SampleRandom("test", *purpose, first=0, count=count)


# ---- samplers


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.5), SIGMAS])
def test_u2_one_point_of_data_is_reached_exactly(times):
    data, start = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    velocity = lambda x, t: (x - data) / t.reshape(-1, 1, 1, 1)  # noqa: E731
    times = torch.tensor([*times, 0.0], dtype=torch.float64)
    fresh = lambda step: torch.randn_like(start)  # noqa: E731
    for end in (euler(velocity, start, times), multistep(velocity, start, times, fresh)):
        torch.testing.assert_close(end, data, rtol=0, atol=1e-12)


def test_u3_euler_on_stored_sigmas_is_that_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    scheduler.set_timesteps(sigmas=list(SIGMAS))
    x = ours = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    velocity = lambda x, t: torch.sin(3 * x) + t.reshape(-1, 1, 1, 1)  # noqa: E731
    for t, sigma in zip(scheduler.timesteps, SIGMAS):
        x = scheduler.step(velocity(x, torch.full((2,), sigma)), t, x).prev_sample
    config = SamplingConfig(sigmas=((1.0,), SIGMAS), steps=4)
    torch.testing.assert_close(euler(velocity, ours, config.times()), x, rtol=0, atol=1e-6)


def test_renoising_draws_each_images_noise_from_its_own_seed():
    """Two images in one batch or one by one; the formula step by step."""
    model = lambda x, t, text: torch.tanh(x) * t.reshape(-1, 1, 1, 1)  # noqa: E731
    config = SamplingConfig(sigmas=((1.0, 0.5),), steps=2, sampler="multistep", guidance_scale=1)
    noise = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    text = random_text(2)
    both = sample(model, text, text, config, noise, fresh_noise([5, 9], noise))

    def draw(seed, model=model):
        return sample(model, text, text, config, noise[1:], fresh_noise([seed], noise[1:]))

    alone = draw(9)
    torch.testing.assert_close(both[1:], alone)
    assert not torch.allclose(both[1:], draw(10))
    first = noise[1:] - torch.tanh(noise[1:])  # x - t v at t = 1
    seen = []
    draw(9, lambda x, t, text: seen.append(x) or model(x, t, text))
    fresh = 2 * (seen[1] - 0.5 * first)
    assert 0.4 < fresh.std() < 2 and torch.equal(seen[0], noise[1:])


def test_u18_the_model_is_told_scaled_time_and_nothing_else_is():
    told = []
    model = lambda x, t, text: told.append(t) or torch.ones_like(x)  # noqa: E731
    config = SamplingConfig(sigmas=((1.0, 0.5),), steps=2, guidance_scale=1, time_scale=0.25)
    x = torch.zeros(1, 4, 2, 2)
    end = sample(model, random_text(1), random_text(1), config, x, fresh_noise([0], x))
    assert [t.item() for t in told] == [0.25, 0.125]
    torch.testing.assert_close(end, x - 1)  # all of the way from 1 to 0
    told.clear()
    stage = tiny_stage(distill_config("nitrofusion", time_scale=0.25, inputs={"sigmas": [1.0]}))
    batch = random_batch()
    stage.student.model.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1]))
    prediction = stage.predict(batch, rng())
    assert torch.equal(told[0], torch.full((8,), 0.25)) and torch.equal(prediction.t, torch.ones(8))
    velocity = stage.student.model(batch.noise, torch.full((8,), 0.25), batch.text)
    torch.testing.assert_close(prediction.data, batch.noise - velocity)


def test_step_counts_that_were_not_trained_are_refused():
    stored = {"sigmas": ((1.0,), SIGMAS), "steps": 4}
    assert SamplingConfig(**stored).times().tolist() == [*SIGMAS, 0.0]
    assert SamplingConfig(**stored | {"steps": 1}).times().tolist() == [1.0, 0.0]
    with pytest.raises(ConfigError, match="1 or 4 steps, not 3"):
        SamplingConfig(**stored | {"steps": 3})
    forced = SamplingConfig(**stored | {"steps": 3}, force=True).times()
    torch.testing.assert_close(forced, torch.tensor([1, 2 / 3, 1 / 3, 0]))
    for wrong in ((0.5, 0.75), (1.0, 0.0), (1.2,), ()):
        with pytest.raises(ConfigError, match="falling times"):
            SamplingConfig(sigmas=(wrong,), steps=1)
    with pytest.raises(ConfigError, match="same number"):
        SamplingConfig(sigmas=((1.0,), (0.9,)), steps=1)


# ---- inputs


def test_u5_the_pairs_input_is_the_first_euler_step_of_a_perfect_student():
    data, noise = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), 0.75, dtype=torch.float64)
    stepped = euler(lambda x, t: noise - data, noise, torch.tensor([1, 0.75], dtype=torch.float64))
    torch.testing.assert_close(flow.interpolate(data, noise, t), stepped, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", ["euler", "multistep"])
def test_u14_a_rollout_is_the_beginning_of_the_sampler(sampler):
    config = InputConfig(sigmas=SIGMAS, noise={"euler": "pair", "multistep": "fresh"}[sampler])
    predictor, noise = Predictor(config, sampler, seed=0), random_batch().noise
    velocity = lambda x, t: torch.sin(x) + t.reshape(-1, 1, 1, 1)  # noqa: E731
    states = []
    recorded = lambda x, t: states.append(x) or velocity(x, t)  # noqa: E731
    times, random = torch.tensor([*SIGMAS, 0.0]), rng()
    if sampler == "euler":
        euler(recorded, noise, times)
    else:
        multistep(recorded, noise, times, lambda step: random.normal(*SHAPE))
    for place in range(4):
        assert torch.equal(predictor.rollout(velocity, noise, place, rng()), states[place])
    assert torch.equal(states[0], noise)


def test_rollouts_come_with_the_scheduled_share_and_without_a_graph():
    stage = tiny_stage(distill_config("ladd4", inputs={"rollout": {"share": 0.5, "start": 10, "end": 30}}))
    predictor, student = stage.predictor, stage.student
    rolled = {
        start: sum(
            not predictor.input(student, random_batch(step, 2), rng(2))[2]
            for step in range(start, start + 60)
        )
        for start in (-60, 100)
    }
    assert rolled[-60] == 0 and 17 <= rolled[100] <= 43  # 30 expected
    for step in itertools.count(100):
        batch = random_batch(step, 2)
        x, t, on_path = predictor.input(student, batch, rng(2))
        if not on_path and t[0] < 1:
            break
    assert not x.requires_grad and (t == t[0]).all()
    times = torch.tensor([s for s in SIGMAS if s >= t[0]])
    with torch.no_grad():
        expected = euler(lambda x, t: student(x, t, batch.text), batch.noise, times)
    torch.testing.assert_close(x, expected)


def test_times_follow_the_probabilities_of_their_step():
    config = InputConfig(sigmas=SIGMAS, probabilities=((0, (0, 0, 0.5, 0.5)), (5, (0.4, 0.2, 0.2, 0.2))))
    predictor = Predictor(config, "euler", 0)
    for step, probabilities in ((4, [0, 0, 0.5, 0.5]), (5, [0.4, 0.2, 0.2, 0.2])):
        t = predictor.draw_times(step, rng(4000))
        shares = torch.stack([(t == sigma).float().mean() for sigma in SIGMAS])
        torch.testing.assert_close(shares, torch.tensor(probabilities), rtol=0, atol=0.03)
        assert ((t[:, None] == torch.tensor(SIGMAS)).sum(1) == 1).all()


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_share_of_the_times_is_continuous(share):
    continuous_times = {"share": share, "times": {"kind": "uniform"}}
    config = from_dict(InputConfig, {"sigmas": [1.0, 0.5], "continuous_times": continuous_times})
    t = Predictor(config, "euler", 0).draw_times(0, rng(4000))
    placed = (t == 1.0) | (t == 0.5)
    assert 1 - placed.float().mean().item() == pytest.approx(share, abs=0.03)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(t[~placed].quantile(levels), levels, rtol=0, atol=0.05)
    assert share == 1 or (t[placed] == 1).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_u15_samplers_and_inputs_must_belong_together():
    for sampler, noise in (("euler", "fresh"), ("multistep", "pair")):
        with pytest.raises(ConfigError, match=f"sampler '{sampler}'.*inputs.noise"):
            distill_config("ladd4", sampler=sampler, inputs={"noise": noise})
    distill_config("ladd4", sampler="multistep", inputs={"noise": "fresh"})
    distill_config("nitrofusion")  # t = 1 only: pure noise either way


def test_a_config_that_cannot_work_is_refused():
    cases = [
        ({"inputs": {"probabilities": [[0, [1, 1]]]}}, "4 shares"),
        ({"inputs": {"probabilities": [[5, [1, 1, 1, 1]]]}}, "begin with 0"),
        ({"inputs": {"sigmas": [0.5, 0.75]}}, "falling"),
        ({"sample_steps": [3]}, "not evenly spaced"),
        ({"diffusion": None}, "weight 'auto'"),
        ({"diffusion": None, "adversarial": None}, "nothing to learn from"),
        ({"diffusion": {"space": "velocity"}}, "on_rollout"),
        ({"adversarial": {"pool": {"use": 3}}}, "use must be even"),
        ({"adversarial": {"pool": {}, "heads": {"width": 8}}}, "heads would have no effect"),
        (
            {"adversarial": {"pool": {}, "discriminator": {"least": 0.1}}},
            "discriminator would have no effect",
        ),
        ({"adversarial": {"null_text": 0.5}}, "null_text takes prompts away"),
        ({"reflow": {}}, "no rollout"),
    ]
    for overrides, message in cases:
        with pytest.raises(ConfigError, match=message):
            distill_config("ladd4", **overrides)


# ---- the discriminator's features


def test_u6_backbone_gives_maps_passes_gradients_and_never_changes():
    teacher = tiny_model()
    backbone = Backbone(teacher, (1, 2, 4))
    x = torch.randn(2, *SHAPE, requires_grad=True)
    features = backbone(x, torch.tensor([0.3, 0.6]), random_text(2))
    assert [tuple(m.shape) for m in features.maps] == [
        (2, 64, 16, 16),
        (2, 64, 8, 8),
        (2, 64, 4, 4),
        (2, 64, 16, 16),
    ]
    tokens = teacher.forward_intermediates(x, torch.tensor([0.3, 0.6]), random_text(2), [1, 2, 4])[1]
    assert [t.shape[1] for t in tokens] == [256, 80, 256]
    sum(m.square().mean() for m in features.maps).backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())

    stage = tiny_stage(
        distill_config("nitro1", optim={"lr": 1e-2}, adversarial={"start": 0, "ramp": 0}), model=teacher
    )
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    loop = Loop(stage, 10)
    for step in range(10):
        loop.step(random_batch(step, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not torch.equal(stage.model.out.weight, before["out.weight"])


@pytest.mark.parametrize("ratio", [2, 4])
def test_u7_cells_of_the_maps_are_the_patches_of_the_compressor(ratio):
    torch.manual_seed(0)
    compressor, grid = Compressor(64, (2, 4)), (16, 16)
    x = torch.randn(1, 256, 64)
    maps = token_maps(compressor(x, grid), grid, (2, 4))
    row, column = 2, 1
    patch = x.clone().reshape(1, 16, 16, 64)
    patch[:, row * ratio : (row + 1) * ratio, column * ratio : (column + 1) * ratio] += 1
    changed = token_maps(compressor(patch.reshape(1, 256, 64), grid), grid, (2, 4))
    which = {2: 0, 4: 1}[ratio]
    differs = (maps[which] != changed[which]).any(dim=1)[0]
    assert differs.nonzero().tolist() == [[row, column]]


def test_u7_maps_are_split_as_the_reconstructor_splits():
    torch.manual_seed(0)
    tokens, grid = torch.randn(1, 80, 64), (16, 16)
    seen = []
    reconstructor = Reconstructor(64, (2, 4))
    for path, ratio in zip(reconstructor.paths, reconstructor.ratios):
        path.register_forward_pre_hook(
            lambda _, inputs, ratio=ratio: seen.append(fold(inputs[0], grid, ratio))
        )
    reconstructor(tokens, torch.randn(1, 256, 64), grid)
    for given, expected in zip(token_maps(tokens, grid, (2, 4)), seen):
        assert torch.equal(given.flatten(2).transpose(1, 2), expected)


def test_u8_the_released_models_heads_give_752_logits_and_count_alike():
    config = ModelConfig()
    taps = config.default_taps
    assert taps == (4, 10, 16, 19, 24)
    maps = feature_maps(config, taps)
    assert [place.ratio for place in maps] == [1, 2, 4, 2, 4, 2, 4, 1]
    sizes = [16 // place.ratio for place in maps]
    assert sum(size**2 for size in sizes) == 752
    heads = FixedHeads(len(maps), 768, HeadConfig())
    assert sum(p.numel() for p in heads.heads[0].parameters()) == 1_214_593
    small = FixedHeads(len(maps), 64, HeadConfig(width=32))
    time, text = torch.randn(2, 2, 64)

    logits = small(Features([torch.randn(2, 64, size, size) for size in sizes], time, text), 0)
    assert sum(entry.shape[2] for entry in logits) == 752
    by_head = torch.stack([entry.mean(dim=(1, 2)) for entry in logits], dim=1)
    torch.testing.assert_close(losses.score(logits), by_head.mean(dim=1))
    assert TINY.default_taps == (1, 2, 3, 4)


def test_heads_use_what_their_condition_names_and_only_real_text():
    torch.manual_seed(0)
    x, other = torch.randn(2, 2, 64, 4, 4)
    time, text = torch.randn(2, 2, 64)
    uses = {}
    for condition in ("none", "time", "time+text"):
        head = Head(64, HeadConfig(width=32, condition=condition))
        base = head(x, time, text)
        uses[condition] = [
            not torch.equal(base, head(x, -time, text)),
            not torch.equal(base, head(x, time, -text)),
        ]
        assert not torch.equal(base, head(other, time, text))
        torch.testing.assert_close(base[:1], head(x[:1], time[:1], text[:1]))  # no statistics over the batch
    assert uses == {"none": [False, False], "time": [True, False], "time+text": [True, True]}
    backbone, words = Backbone(tiny_model(), (1,)), random_text(2)
    padding = words.tokens.clone()
    padding[~words.mask] += 1
    x = torch.randn(2, *SHAPE)
    a, b = (
        backbone(x, torch.full((2,), 0.5), words._replace(tokens=t)).text for t in (words.tokens, padding)
    )
    assert torch.equal(a, b)


# ---- losses


def entries(*values):
    return [torch.full((1, 1, 3), float(value)) for value in values]


def test_u9_reference_values():
    d, g = losses.discriminator_loss, losses.generator_loss
    assert d("hinge", entries(2), entries(-2)).item() == 0 and d("hinge", entries(0), entries(0)).item() == 1
    assert d("non_saturating", entries(0), entries(0)).item() == pytest.approx(1.386294, abs=1e-6)
    assert d("relativistic", entries(0), entries(0)).item() == pytest.approx(0.693147, abs=1e-6)
    assert g("hinge", entries(2)).item() == -2
    assert g("non_saturating", entries(0)).item() == pytest.approx(math.log(2))
    assert g("relativistic", entries(1), entries(3)).item() == pytest.approx(math.log(1 + math.exp(2)))
    weights = [torch.tensor([0.0]), torch.tensor([1.0])]
    assert g("hinge", entries(5, 2), weights=weights).item() == -2  # the first head is left out
    sizes = [torch.full((1, 1, 256), 1.0), torch.full((1, 1, 16), 3.0)]
    assert losses.score(sizes).item() == 2  # heads count alike


def test_u10_approximate_r1_of_a_linear_discriminator():
    generator = torch.Generator().manual_seed(0)
    weight, sigma = torch.randn(64, generator=generator), 0.05
    x = torch.randn(20_000, 64, generator=generator)
    noise = sigma * torch.randn(20_000, 64, generator=generator)
    logits = [[(y @ weight)[:, None, None]] for y in (x, x + noise)]
    assert losses.approximate_r1(*logits).mean().item() == pytest.approx(
        sigma**2 * weight.square().sum().item(), rel=0.05
    )


def test_u10_the_noised_input_is_perturbed_at_its_own_time():
    stage = tiny_stage(distill_config("ladd4", adversarial={"r1": {"sigma": 0.5}}))
    (adversarial,) = [o for o in stage.objectives if isinstance(o, Adversarial)]
    batch = random_batch(0)
    parts = {
        name: rest
        for name, *rest in adversarial.discriminator_inputs(batch, stage.predict(batch, rng()), rng(8, 1))
    }
    (real, tau, text), (perturbed, tau_too, text_too) = parts["real"], parts["perturbed"]
    assert torch.equal(tau, tau_too) and text is text_too
    assert (perturbed - real).std().item() == pytest.approx(0.5, rel=0.05)


def test_u11_each_phase_moves_its_own_weights_only():
    config = distill_config(
        "ladd4", inputs={"rollout": None}, adversarial={"start": 0, "ramp": 0, "heads": {"width": 32}}
    )
    stage = tiny_stage(config)
    critic, student = stage.phases
    batch = random_batch(3)
    loss, _ = critic.loss(critic.net, batch, rng(8, "d"))
    loss.backward()
    assert all(p.grad is None for p in student.module.parameters())
    assert all(p.grad is not None and p.requires_grad for p in critic.module.parameters())
    critic.module.zero_grad(set_to_none=True)
    loss, logs = student.loss(student.net, batch, rng(8, "g"))
    loss.backward()
    assert all(p.grad is None for p in critic.module.parameters())
    assert all(p.requires_grad for p in critic.module.parameters())
    assert all(p.grad is not None for p in student.module.parameters())
    assert all(p.grad is None for p in stage.shared.teacher.parameters())


def test_gradients_taken_at_the_data_are_those_of_the_plain_sum():
    """The student's gradient equals that of one backward pass through everything."""
    config = distill_config(
        "ladd4",
        inputs={"rollout": None},
        heldout=0.0,
        adversarial={"start": 0, "ramp": 0, "weight": 0.7, "heads": {"width": 32}},
    )
    stage = tiny_stage(config)
    student, batch = stage.generator, random_batch(3)
    loss, logs = student.loss(student.net, batch, rng(8, "g"))
    loss.backward()
    ours = [p.grad.clone() for p in student.module.parameters()]
    student.module.zero_grad(set_to_none=True)

    again, random = random_batch(3), rng(8, "g")
    prediction = stage.predict(again, random, last=True)
    total = 0
    for objective in stage.objectives:
        values, _ = objective.loss(prediction, again, random)
        total = total + objective.weight(3) * values.mean()
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for mine, p in zip(ours, student.module.parameters()):
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-6)


def test_one_forward_of_the_student_serves_both_phases():
    config = distill_config(
        "ladd4", inputs={"rollout": None}, adversarial={"start": 0, "ramp": 0, "heads": {"width": 32}}
    )
    stage, calls = tiny_stage(config), []
    stage.student.model.register_forward_pre_hook(
        lambda module, inputs: calls.append(torch.is_grad_enabled())
    )
    Loop(stage, 10).step(random_batch(3))
    assert calls == [True]
    calls.clear()
    # with accumulation no graph waits: memory of one micro-batch
    Loop(stage, 10).step(random_batch(4, alone=False))
    assert calls == [False, True]


def test_shared_and_separate_forwards_train_alike():
    config = distill_config(
        "ladd4", adversarial={"start": 0, "ramp": 0, "heads": {"width": 32}}, optim={"lr": 1e-3}
    )
    stages = [tiny_stage(config) for _ in range(2)]
    for stage, alone in zip(stages, (True, False)):
        loop = Loop(stage, 10)
        for step in range(3):
            loop.step(random_batch(step, alone=alone))
    for a, b in zip(stages[0].student.parameters(), stages[1].student.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_u12_misaligned_pairs():
    others, differ = losses.misaligned(["a", "b", "b", "c"])
    assert sorted(others) == [0, 1, 2, 3] and all(other != place for place, other in enumerate(others))
    assert differ == [True, False, True, True]
    stage = tiny_stage(distill_config("ladd4", adversarial={"misaligned": {"start": 0}}))
    (adversarial,) = [o for o in stage.objectives if isinstance(o, Adversarial)]
    batch = random_batch(0, 4, prompts=["a", "b", "b", "c"])
    parts = {
        name: rest
        for name, *rest in adversarial.discriminator_inputs(batch, stage.predict(batch, rng(4)), rng(4, 1))
    }
    assert all(len(x) == 4 for x, *_ in parts.values())
    assert torch.equal(parts["misaligned"][0], parts["real"][0])
    assert torch.equal(parts["misaligned"][2].tokens, batch.text.tokens[others])
    sides = {"real": entries(0), "fake": entries(-1), "misaligned": entries(3)}
    sides = {name: [logits[0].expand(4, 1, 3)] for name, logits in sides.items()}
    values, _ = adversarial.compare(sides, batch)
    # hinge: real 1, fake 0, misaligned 4, halved; the pair of equal prompts does not count
    torch.testing.assert_close(values, torch.tensor([0.5 * 0.5 + 0.5 * 2.5, 0.5, 1.5, 1.5]))


def test_u13_the_automatic_weight_balances_the_slopes():
    config = distill_config(
        "ladd4",
        inputs={"rollout": None},
        adversarial={"start": 20, "ramp": 0, "ratio": 1.0, "heads": {"width": 32}},
    )
    stage, ratios, weights = tiny_stage(config), [], []
    for step in range(24):
        batch = random_batch(step, 4)
        loss, logs = stage.loss(stage.student, batch, rng(4, step))
        if step < 20:
            assert logs.get("adversarial_weight", torch.zeros(())) == 0
        if 4 <= step < 20:
            ratios.append(logs["diffusion_weight"] * logs["diffusion_slope"] / logs["adversarial_slope"])
        assert ("adversarial_slope" in logs) == (step >= 4)
        if step >= 20:
            weights.append(logs["adversarial_weight"].item())
    median = torch.stack(ratios).median().item()
    assert weights == [pytest.approx(median, rel=1e-5)] * 4
    # The same batch at every measurement: the ratio of the weighted slopes is 1.
    slopes = {"diffusion": torch.randn(4, 3, 2, 2), "adversarial": 7 * torch.randn(4, 3, 2, 2)}
    objectives = {o.name: o for o in stage.objectives}
    stage.student.ratios.fill_(float("nan"))
    for step in range(4, 21):
        weighted = stage.balance(
            {
                n: Term(o, 1.0 if n == "diffusion" else o.weight(step), torch.zeros(()), slopes[n])
                for n, o in objectives.items()
            },
            step,
        )
        norms = {name: (weight * term.slope).norm().item() for name, weight, term in weighted}
    assert norms["adversarial"] == pytest.approx(norms["diffusion"], rel=0.01)


@pytest.mark.parametrize(
    ("every", "start", "measured"), [(5, 0, range(20, 100, 5)), (2, 101, range(101, 133, 2))]
)
def test_the_automatic_weight_is_measured_in_steps_of_the_student(every, start, measured):
    """The last 16 before the term begins at step 100; its first 16, if it begins to learn later."""
    stage = tiny_stage(distill_config("ladd4", every=every, start=start, adversarial={"start": 100}))
    objectives = {o.name: o for o in stage.objectives}
    ratios = []
    for step in filter(stage.generator.due, range(200)):
        slopes = {"diffusion": torch.full((2,), step + 1.0), "adversarial": torch.ones(2)}
        terms = {name: Term(objectives[name], 1.0, torch.zeros(()), slope) for name, slope in slopes.items()}
        weights = {name: float(weight) for name, weight, _ in stage.balance(terms, step)}
        ratios += [step + 1.0] if step in measured else []
        expected = torch.tensor(ratios).median() if ratios else 0.5
        assert weights["adversarial"] == pytest.approx(float(expected))
    assert stage.student.ratios.tolist() == pytest.approx(ratios)


def test_the_automatic_weight_falls_back_until_it_is_measured():
    stage = tiny_stage(distill_config("ladd4", adversarial={"start": 0, "ramp": 0, "fallback": 0.25}))
    (adversarial,) = [o for o in stage.objectives if o.balance]
    terms = {"adversarial": Term(adversarial, 1.0, torch.zeros(()), torch.ones(2))}
    assert [float(weight) for _, weight, *_ in stage.balance(terms, 100)] == [0.25]


def test_heldout_prompts_are_monitored_and_not_trained_on():
    config = distill_config(
        "nitro1", heldout=0.5, adversarial={"start": 0, "ramp": 0, "heads": {"width": 32}}
    )
    stage = tiny_stage(config)
    prompts = [f"prompt {number}" for number in range(8)]
    keep = stage.shared.training(random_batch(0, prompts=prompts))
    assert 0 < keep.sum() < 8
    assert torch.equal(keep, stage.shared.training(random_batch(7, prompts=prompts)))
    results = []
    for changed in (False, True):
        batch = random_batch(0, prompts=prompts)
        if changed:
            batch.latents[keep == 0] *= 3
        loss, logs = stage.loss(stage.student, batch, rng())
        results.append(loss.item())
        critic = stage.phases[0]
        value, logs = critic.loss(critic.net, batch, rng())
        assert logs["gap_heldout"][1] == (keep == 0).sum() and logs["gap"][1] == keep.sum()
    assert results[0] == pytest.approx(results[1], rel=1e-6)


# ---- regression against formulas


def plain_shared(teacher=None, backbone=None):
    """What a stage lends, without a stage."""
    prediction = lambda batch, rng, last=False: batch.prediction  # noqa: E731
    return Shared(
        teacher,
        lambda taps: backbone,
        random_text(1, 99),
        prediction,
        None,
        None,
        0.0,
        0,
        torch.device("cpu"),
    )


def word(text):
    return text.tokens.mean(dim=(1, 2))[:, None, None, None]


def plain_teacher(x, t, text):
    return torch.tanh(x) + t[:, None, None, None] * word(text)


def predicted(t, on_path=True):
    """A batch and a student's answer to its pairs that is wrong by about as much as the data vary."""
    t = torch.tensor(t)
    batch, at = random_batch(0, len(t), shape=(4, 3, 3)), t[:, None, None, None]
    x = (1 - at) * batch.latents + at * batch.noise
    generator = torch.Generator().manual_seed(7)
    return Prediction(x, t, on_path, batch.latents + torch.randn(x.shape, generator=generator)), batch


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
@pytest.mark.parametrize("space", ["data", "velocity"])
@pytest.mark.parametrize("target", ["pair", "teacher"])
def test_the_diffusion_loss_is_its_formula(target, space, kind):
    config = DiffusionConfig(target=target, space=space, kind=kind, guidance_scale=3.0, beta=0.5)
    prediction, batch = predicted([1.0, 0.7, 0.4, 0.1])
    values, _ = Diffusion(config, plain_shared(plain_teacher)).loss(prediction, batch, rng(4))
    x, t, null = prediction.x, prediction.t[:, None, None, None], word(random_text(1, 99))
    guided = torch.tanh(x) + t * (null + 3 * (word(batch.text) - null))
    wrong = prediction.data - {"pair": batch.latents, "teacher": x - t * guided}[target]
    wrong = wrong / t if space == "velocity" else wrong
    smooth = torch.where(wrong.abs() < 0.5, wrong**2, wrong.abs() - 0.25)  # w^2 / (2 beta) and |w| - beta / 2
    torch.testing.assert_close(values, {"mse": wrong**2, "smooth_l1": smooth}[kind].mean(dim=(1, 2, 3)))


def test_the_diffusion_loss_leaves_out_late_times_and_rollouts():
    prediction, batch = predicted([1.0, 0.75, 0.5, 0.25])

    def loss(prediction, **options):
        return Diffusion(DiffusionConfig(**options), None).loss(prediction, batch, rng(4))[0]

    everywhere, rolled = loss(prediction), replace(prediction, on_path=False)
    assert (everywhere > 0).all() and torch.equal(loss(rolled), everywhere)
    torch.testing.assert_close(loss(prediction, largest_time=0.5), everywhere * torch.tensor([0.0, 0, 1, 1]))
    assert torch.equal(loss(prediction, on_rollout=False), everywhere)
    assert torch.equal(loss(rolled, on_rollout=False), torch.zeros(4))


def test_reflow_is_the_error_of_the_velocity_on_the_pairs_path():
    prediction, batch = predicted([1.0, 0.7, 0.4, 0.1])
    velocity = (prediction.x - prediction.data) / prediction.t[:, None, None, None]
    expected = (velocity - (batch.noise - batch.latents)).square().mean(dim=(1, 2, 3))
    values, _ = Reflow(ReflowConfig(), None).loss(prediction, batch, rng(4))
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)


def test_a_weight_decays_as_a_cosine_to_its_floor():
    objective = Diffusion(DiffusionConfig(weight=2.0, decay=DecayConfig(start=100, end=300, floor=0.2)), None)
    half = math.sqrt(0.5)  # cos(pi / 4)
    shares = {0: 1, 100: 1, 150: (1 + half) / 2, 200: 0.5, 250: (1 - half) / 2, 300: 0, 999: 0}
    weights = {step: objective.weight(step) for step in shares}
    assert weights == {step: pytest.approx(2 * (0.2 + 0.8 * share)) for step, share in shares.items()}
    assert {Diffusion(DiffusionConfig(weight=2.0), None).weight(step) for step in shares} == {2.0}


# ---- the adversarial objective against formulas


class PlainBackbone:
    """The noised latents are the features; `seen` is what was asked."""

    maps, width = ((1, 1),), 4

    def __init__(self):
        self.seen = []

    def __call__(self, x, t, text):
        self.seen.append((x, t, text))
        return Features([x], t[:, None].expand(-1, 4), text.tokens.mean(1)[:, :4])


def adversarial_of(**options):
    heads = {} if "pool" in options else {"heads": {"width": 8, "condition": "none"}}
    config = {**heads, "misaligned": None, **options}
    return Adversarial(from_dict(AdversarialConfig, config), plain_shared(backbone=PlainBackbone()))


@pytest.mark.parametrize(("weight", "full"), [(0.6, 0.6), ("auto", 3.0)])  # auto: a share of the ratio
def test_the_adversarial_weight_begins_at_start_and_ramps(weight, full):
    objective = adversarial_of(weight=weight, ratio=3.0, start=10, ramp=4)
    shares = {0: 0, 9: 0, 10: 0.25, 11: 0.5, 12: 0.75, 13: 1, 14: 1, 99: 1}
    assert {step: objective.weight(step) for step in shares} == pytest.approx(
        {step: full * share for step, share in shares.items()}
    )
    at_once = adversarial_of(weight=weight, ratio=3.0, start=10, ramp=0)
    assert [at_once.weight(step) for step in (9, 10)] == [0, full]


def test_the_heads_loss_is_hinge_and_the_r1_of_a_linear_head():
    """(w . sigma n)^2 of each sample, times the weight and the steps from one R1 to the next."""
    generator = torch.Generator().manual_seed(0)
    (x, y, noise), w = torch.randn(3, 5, 16, generator=generator), torch.randn(16, generator=generator)
    linear = lambda x: [(x @ w)[:, None, None]]  # noqa: E731
    objective = adversarial_of(r1={"sigma": 0.05, "weight": 30, "every": 2})
    sides = {"real": linear(x), "fake": linear(y), "perturbed": linear(x + 0.05 * noise)}
    values, logs = objective.compare(sides, random_batch(0, 5))
    hinge = ((1 - x @ w).clamp(min=0) + (1 + y @ w).clamp(min=0)) / 2
    r1 = (0.05 * noise @ w) ** 2
    torch.testing.assert_close(values, hinge + 30 * 2 * r1, rtol=1e-3, atol=1e-4)
    assert logs["r1"].item() == pytest.approx(r1.mean().item(), rel=1e-3)
    prediction, batch = predicted([1.0, 0.5])
    for step in (4, 5, 6):
        batch.step = step
        names = [name for name, *_ in objective.discriminator_inputs(batch, prediction, rng(2))]
        assert names == (["real", "fake"] if step == 5 else ["real", "fake", "perturbed"])


def test_times_of_the_discriminator_follow_their_distribution():
    draw = lambda **options: adversarial_of(**options).discriminator_times(3, rng(4000))  # noqa: E731
    tau = draw(discriminator={"times": {"kind": "uniform"}, "least": 0.1, "most": 0.6})
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(tau.quantile(levels), 0.1 + 0.5 * levels, rtol=0, atol=0.02)
    assert 0.1 <= tau.min() and tau.max() <= 0.6
    tau = draw(discriminator={"times": {"mean": -0.5, "std": 0.8}})
    assert tau.logit().mean().item() == pytest.approx(-0.5, abs=0.05)
    assert tau.logit().std().item() == pytest.approx(0.8, abs=0.05)
    tau = draw(discriminator={"times": {"std": 3.0}, "least": 0.2, "most": 0.9})
    assert tau.min().item() == pytest.approx(0.2) and tau.max().item() == pytest.approx(0.9)
    pool = {"levels": [0.3], "spread": 0.1, "copies": 2, "use": 2, "width": 8}
    tau = draw(pool=pool, optim={"betas": [0, 0.99], "weight_decay": 0})
    torch.testing.assert_close(tau.quantile(levels), 0.2 + 0.2 * levels, rtol=0, atol=0.01)
    assert 0.2 <= tau.min() and tau.max() <= 0.4


def test_the_discriminator_sees_a_share_of_the_samples_without_their_prompt():
    objective, text, null = adversarial_of(null_text=0.3), random_text(2000), random_text(1, 99)
    seen = objective.discriminator_text(text, rng(2000))
    dropped = (seen.tokens == null.tokens).all(dim=2).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert torch.equal(seen.mask[dropped], null.mask.expand(int(dropped.sum()), -1))
    for ours, theirs in zip(seen, text):
        assert torch.equal(ours[~dropped], theirs[~dropped])
    # The heads' phase and the student's both ask with it.
    for share, words in ((0.0, lambda text: text.tokens), (1.0, lambda text: null.tokens)):
        objective, (prediction, batch) = adversarial_of(null_text=share, r1=None), predicted([0.5])
        batch.prediction = prediction
        objective.discriminator_loss(objective.heads, batch, rng(1))
        objective.loss(prediction, batch, rng(1))
        for _, _, asked in objective.backbone.seen:
            assert torch.equal(asked.tokens, words(batch.text).expand_as(asked.tokens))


def test_what_is_logged_of_the_verdicts():
    """Scores, gaps and shares of right verdicts in numpy; two heads and one, with other numbers of positions."""
    generator = torch.Generator().manual_seed(0)
    sides = {
        name: [torch.randn(6, heads, n, generator=generator) for heads, n in ((2, 5), (1, 9))]
        for name in ("real", "fake", "misaligned", "perturbed")
    }
    taus = {"real": [0.05, 0.25, 0.39, 0.55, 0.95, 1.0], "fake": [0.0, 0.19, 0.5, 0.65, 0.7, 0.3]}
    bins = np.array([0, 1, 1, 2, 4, 4, 0, 0, 2, 3, 3, 1])  # fifths of 0 to 1; real and fake
    keep, batch = torch.tensor([1.0, 0, 1, 1, 0, 1]), random_batch(0, 6)
    taus = {name: torch.tensor(times) for name, times in taus.items()}
    logs = adversarial_of().monitor(sides, taus, keep, batch)

    score = {
        name: np.mean([a[:, 0].mean(1), a[:, 1].mean(1), b[:, 0].mean(1)], axis=0)
        for name, (a, b) in ((name, [entry.numpy() for entry in logits]) for name, logits in sides.items())
    }
    right = {"real": score["real"] > 0, "fake": score["fake"] <= 0, "misaligned": score["misaligned"] <= 0}
    trained, gap = keep.numpy() == 1, score["real"] - score["fake"]
    both = np.concatenate([right["real"], right["fake"]])
    assert all(0 < verdicts.sum() < 6 for verdicts in right.values())
    expected = {"gap": (gap, trained), "gap_heldout": (gap, ~trained)}
    for name, verdicts in right.items():
        expected |= {f"right_{name}": (verdicts, trained), f"right_{name}_heldout": (verdicts, ~trained)}
    expected |= {f"right_t{number}": (both, bins == number) for number in range(5)}
    expected = {name: [(values * which).sum(), which.sum()] for name, (values, which) in expected.items()}
    expected |= {
        f"gap_head{i}": (r - f).mean().item() for i, (r, f) in enumerate(zip(sides["real"], sides["fake"]))
    }
    assert logs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(logs[name].numpy(), value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert torch.equal(batch.heldout_gap, logs["gap_heldout"])


def test_heads_learn_to_tell_real_from_fake():
    """Data that can be told apart: in the end both sides get the right verdict, and the student is told which is better."""
    discriminator = {"times": {"kind": "uniform"}, "least": 0.02, "most": 0.3}
    objective = adversarial_of(discriminator=discriminator, optim={"lr": 1e-2, "warmup": 0})
    optimizers, sign = (
        build_optimizers(objective.heads, objective.config.optim),
        torch.tensor([1.0, -1, 1, -1]),
    )
    for step in range(20):
        batch = random_batch(step, 16, shape=(4, 4, 4))
        batch.latents += 1.5 * sign[:, None, None]
        fake = batch.noise - 1.5 * sign[:, None, None]
        batch.prediction = Prediction(batch.noise, torch.ones(16), True, fake)
        loss, logs = objective.discriminator_loss(objective.heads, batch, rng(16, step))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    shares = {side: float(logs[f"right_{side}"][0] / logs[f"right_{side}"][1]) for side in ("real", "fake")}
    assert min(shares.values()) > 0.8 and logs["gap"][0] > 0
    values = [
        objective.loss(Prediction(batch.noise, torch.ones(16), True, data), batch, rng(16))[0].mean().item()
        for data in (batch.latents, fake)
    ]
    assert values[0] < values[1] - 0.5


@pytest.mark.parametrize("bounded", [True, False])
def test_spectral_norm_bounds_the_largest_singular_value(bounded):
    torch.manual_seed(0)
    head = Head(16, HeadConfig(width=8, condition="none", spectral_norm=bounded))
    layers = (head.enter, head.inside, head.logit)
    for layer in layers:
        weights = layer.parametrizations.weight.original if bounded else layer.weight
        weights.data.mul_(20 / torch.linalg.svdvals(weights.data.flatten(1))[0])
    for _ in range(30):  # one step of the power iteration each
        head(torch.randn(2, 16, 4, 4), torch.zeros(2, 16), torch.zeros(2, 16))
    largest = [torch.linalg.svdvals(layer.weight.detach().flatten(1))[0].item() for layer in layers]
    assert largest == pytest.approx([1.0 if bounded else 20.0] * 3, rel=0.02)


# ---- the pool


def pool(seed=0, **options):
    return HeadPool(2, 32, PoolConfig(**{"copies": 6, "use": 2, "width": 8, **options}), seed)


def pool_features(batch=2):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(batch, 32, size, size, generator=generator) for size in (4, 2)]
    return Features(maps, torch.zeros(batch, 32), torch.zeros(batch, 32))


def test_u17_the_pool_of_the_paper_has_480_heads_and_renews_one_percent():
    config = PoolConfig()
    heads = HeadPool(8, 16, PoolConfig(width=4), seed=0)
    assert sum(len(bank.age) for bank in heads.banks) == 480 == len(config.levels) * 8 * config.copies
    renewed = [heads.after_step(step, []) for step in range(1000)]
    assert sum(renewed) / 1000 == pytest.approx(4.8, abs=0.2)


def test_heads_replaced_by_their_use_live_for_so_many_updates():
    """A tenth of what an iteration used; heads it did not use keep their age."""
    heads, ages = pool(refresh=0.1, refresh_unit="use"), []
    for step in range(400):
        before = [bank.age.clone() for bank in heads.banks]
        used = [chosen for _, chosen in heads.chosen(step)]
        heads.after_step(step, [])
        for bank, chosen, was in zip(heads.banks, used, before):
            rest = torch.ones_like(was, dtype=torch.bool)
            rest[chosen] = False
            assert torch.equal(bank.age[rest], was[rest])
            ages += bank.age[chosen].tolist()
    # an age of 0 is that of a new head
    assert sum(age == 0 for age in ages) / len(ages) == pytest.approx(0.1, abs=0.03)


def test_u17_renewed_heads_forget_and_others_are_left_alone():
    heads = pool(refresh=0.0)
    optimizers = build_optimizers(heads, OptimConfig(lr=1e-2, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.0))
    for step in range(5):
        before = {name: p.detach().clone() for name, p in heads.named_parameters()}
        sum(entry.square().mean() for entry in heads(pool_features(), step)).backward()
        assert all(p.grad is not None for p in heads.parameters())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        heads.after_step(step, optimizers)
        for (bank, chosen), number in zip(heads.chosen(step), itertools.count()):
            idle = torch.ones(len(bank.age), dtype=torch.bool)
            idle[chosen] = False
            for name, p in bank.named_parameters():
                old = before[f"banks.{number}.{name}"]
                assert torch.equal(p[idle], old[idle])
            assert not torch.equal(bank.enter_weight[chosen], before[f"banks.{number}.enter_weight"][chosen])
    assert sum(int(bank.age.sum()) for bank in heads.banks) == 5 * 4
    bank, (optimizer,) = heads.banks[0], optimizers
    weight, which = bank.enter_weight, torch.zeros(len(bank.age), dtype=torch.bool)
    which[bank.age.argmax()] = True
    before, moments = weight.detach().clone(), optimizer.state[weight]["exp_avg_sq"].clone()
    assert moments[which].abs().sum() > 0
    heads._renew(bank, which, torch.Generator().manual_seed(1), optimizers)
    assert not torch.equal(weight[which], before[which]) and torch.equal(weight[~which], before[~which])
    after = optimizer.state[weight]["exp_avg_sq"]
    assert after[which].abs().sum() == 0 and torch.equal(after[~which], moments[~which])
    assert bank.age[which].item() == 0
    bound = 1 / math.sqrt(32)  # fan in
    assert weight[which].abs().max() <= bound
    assert weight[which].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)


def test_u17_choices_depend_on_seed_and_step_alone():
    a, b = pool(), pool()
    for step in range(20):
        for (_, first), (_, second) in zip(a.chosen(step), b.chosen(step)):
            assert torch.equal(first, second)
    a.after_step(3, [])
    b.after_step(3, [])
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert any(not torch.equal(x, y) for x, y in zip(pool(seed=1).parameters(), b.parameters()))
    levels = torch.bincount(torch.tensor([a.level(step) for step in range(400)]), minlength=4)
    assert levels.min() > 60


def test_pooled_heads_are_convolutions_and_attention():
    """Every chosen head against plain layers with its weights."""
    heads = pool(use=4)
    features = pool_features()
    logits = heads(features, 7)
    for entry, x, (bank, chosen) in zip(
        logits, [m for m in features.maps for _ in range(2)], heads.chosen(7)
    ):
        for slot, number in enumerate(chosen.tolist()):
            w = {name: p[number] for name, p in bank.named_parameters()}
            y = nn.functional.layer_norm(x.movedim(1, -1), (32,)).movedim(-1, 1)
            y = nn.functional.conv2d(y, w["enter_weight"][:, :, None, None], w["enter_bias"])
            y = nn.functional.leaky_relu(
                nn.functional.group_norm(y, 1, w["norm_scale"], w["norm_shift"]), 0.2
            )
            y = nn.functional.conv2d(y, w["inside_weight"], w["inside_bias"], padding=1)
            y = nn.functional.group_norm(y, 1, w["norm_inside_scale"], w["norm_inside_shift"])
            y = nn.functional.leaky_relu(y, 0.2).flatten(2)  # (B, C, n)
            if bank.whole:
                attention = torch.softmax(w["query"] @ y / math.sqrt(8), dim=-1)
                y = (y * attention[:, None]).sum(2) @ w["mlp_weight"].T + w["mlp_bias"]
                y = nn.functional.leaky_relu(y, 0.2)[..., None]
            expected = torch.einsum("bcn,c->bn", y, w["logit_weight"]) + w["logit_bias"]
            torch.testing.assert_close(entry[:, slot], expected, rtol=1e-4, atol=1e-5)


def test_heads_compute_in_float32_under_autocast():
    features = pool_features()
    for heads in (pool(), FixedHeads(2, 32, HeadConfig(width=16))):
        plain = heads(features, 3)
        with torch.autocast("cpu", torch.bfloat16):
            cast = heads(features, 3)
        assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(cast, plain))


def test_young_heads_do_not_teach_the_student():
    heads = pool()
    assert all(weights.sum() == 0 for weights in heads.experienced(2))
    heads.config = PoolConfig(copies=6, use=2, width=8, refresh=0.0)
    heads.after_step(2, [])
    assert all(weights.sum() == len(weights) for weights in heads.experienced(2))


# ---- guards and the rest


def test_guards_stop_a_student_that_drifts_for_long():
    config = GuardConfig(start=0, patience=40)
    batch = random_batch(0)
    prediction = lambda data: Prediction(batch.noise, torch.ones(8), True, data)  # noqa: E731
    alarms = torch.zeros(3, dtype=torch.int64)
    for step in range(100):
        batch.step, batch.heldout_gap = step, torch.tensor([2.0, 2.0])
        check(config, alarms, prediction(batch.latents), batch)
    assert alarms.tolist() == [0, 0, 0]
    for name, data, gap in (
        ("std_ratio", 1.2 * batch.latents, 1.0),
        ("mean_drift", batch.latents + 0.2, 1.0),
        ("gap", batch.latents, 9.0),
    ):
        alarms.zero_()
        with pytest.raises(TrainingError, match=f"{name} has been above"):
            for step in range(100):
                batch.step, batch.heldout_gap = step, torch.tensor([gap, 1.0])
                check(config, alarms, prediction(data), batch)
        assert step == 49
    alarms.zero_()
    for step in range(30):  # a break in between starts the count again
        batch.step = step
        check(config, alarms, prediction(batch.latents * (1.2 if step != 20 else 1.0)), batch)
    assert alarms.tolist()[1] == 9
    batch.heldout_gap = torch.zeros(2)  # no held-out prompt in the batch: neither good nor bad
    alarms[0] = 5
    check(config, alarms, prediction(batch.latents), batch)
    assert alarms[0] == 5


def test_guards_count_steps_and_not_micro_batches():
    stage = tiny_stage(distill_config("ladd4", guards={"start": 0, "std_ratio": 1e-9}, adversarial=None))
    for step in range(3):
        for _ in range(4):
            batch = random_batch(step)
            stage.loss(stage.generator.net, batch, rng(8, step))
    assert stage.student.alarms.tolist()[1] == 3


@pytest.mark.parametrize(("every", "start", "stop"), [(5, 0, 45), (7, 0, 98), (60, 7, 547)])
def test_guards_stop_a_student_that_rests(every, start, stop):
    """After its patience of ten steps, in its last step of some 50."""
    guards = {"start": 0, "patience": 10, "std_ratio": 1e-9}
    config = distill_config("ladd4", guards=guards, adversarial=None, every=every, start=start)
    stage = tiny_stage(config, model=tiny_model(config=SMALLER))
    with pytest.raises(TrainingError, match="std_ratio has been above"):
        for step in filter(stage.generator.due, range(1000)):
            stage.loss(stage.generator.net, random_batch(step, 2, (4, 8, 8)), rng(2, step))
    assert step == stop


@pytest.mark.parametrize(("loss", "right"), [("hinge", (1.0, 0.0, 0.5)), ("relativistic", (1.0, 1.0, 1.0))])
def test_right_verdicts(loss, right):
    """Real at 5, fake at 3: heads that know differences only are right about both."""
    stage = tiny_stage(distill_config("ladd4", adversarial={"loss": loss, "misaligned": None}))
    (adversarial,) = [o for o in stage.objectives if isinstance(o, Adversarial)]
    sides = {name: [torch.full((8, 1, 3), value)] for name, value in (("real", 5.0), ("fake", 3.0))}
    taus = {"real": torch.full((8,), 0.1), "fake": torch.full((8,), 0.1)}
    logs = adversarial.monitor(sides, taus, torch.ones(8), random_batch())
    ratio = lambda name: (logs[name][0] / logs[name][1]).item()  # noqa: E731
    assert (ratio("right_real"), ratio("right_fake"), ratio("right_t0")) == right


def test_what_is_logged_of_the_students_data():
    """Standard deviations and means in numpy, over all and at each sigma."""
    prediction, batch = predicted([1.0, 0.5, 1.0, 0.3])
    prediction.data = 1.3 * batch.latents + torch.tensor([0.1, -0.2, 0.3, 0.4])[:, None, None, None]
    logs = describe_prediction(prediction, batch, torch.tensor([1.0, 0.5, 0.25]))
    drift = (prediction.data - batch.latents).numpy().mean(axis=(1, 2, 3))
    ratio = 1.3  # of every sample
    expected = {"std_ratio": ratio, "mean_drift": drift.mean()}
    for number, at in enumerate(([0, 2], [1], [])):
        expected |= {
            f"std_ratio_s{number}": [ratio * len(at), len(at)],
            f"mean_drift_s{number}": [drift[at].sum(), len(at)],
        }
    assert logs.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(logs[name].numpy(), value, rtol=1e-4, atol=1e-6, err_msg=name)


FOUR_PROBABILITIES = ((0, (0, 0, 0.5, 0.5)), (500, (0.1, 0.3, 0.3, 0.3)), (1500, (0.4, 0.2, 0.2, 0.2)))
PUBLISHED = {  # the table of docs/distill.md, and what it leaves to AdversarialConfig
    "ladd4": {
        "inputs.sigmas": SIGMAS,
        "inputs.probabilities": FOUR_PROBABILITIES,
        "inputs.noise": "pair",
        "inputs.rollout.share": 0.5,
        "inputs.rollout.start": 1000,
        "inputs.rollout.end": 3000,
        "sampler": "euler",
        "time_scale": 1.0,
        "diffusion.target": "pair",
        "diffusion.kind": "smooth_l1",
        "diffusion.weight": 1.0,
        "diffusion.decay": DecayConfig(start=5000, end=20000, floor=0.1),
        "diffusion.space": "data",
        "adversarial.loss": "hinge",
        "adversarial.weight": "auto",
        "adversarial.ratio": 1.0,
        "adversarial.start": 250,
        "adversarial.ramp": 250,
        "adversarial.heads": HeadConfig(),
        "adversarial.heads.condition": "time+text",
        "adversarial.heads.width": 256,
        "adversarial.discriminator.times": TimestepConfig(kind="logit_normal", mean=0.0, std=1.2),
        "adversarial.discriminator.least": 0.02,
        "adversarial.discriminator.most": 0.98,
        "adversarial.null_text": 0.0,
        "adversarial.misaligned.share": 0.5,
        "adversarial.misaligned.start": 1000,
        "adversarial.pool": None,
        "adversarial.r1.sigma": 0.05,
        "adversarial.r1.weight": 200.0,
        "adversarial.r1.every": 1,
        "adversarial.optim.lr": 1e-4,
        "optim.lr": 1e-5,
        "optim.warmup": 500,
        "reflow": None,
    },
    "ladd_guided": {
        "inputs.sigmas": SIGMAS,
        "inputs.noise": "fresh",
        "inputs.rollout": None,
        "sampler": "multistep",
        "diffusion.target": "teacher",
        "diffusion.kind": "mse",
        "diffusion.space": "velocity",
        "adversarial.weight": 0.3,
        "adversarial.discriminator.times": TimestepConfig(mean=-1.0, std=1.2),
        "adversarial.misaligned": None,
        "adversarial.r1.weight": 20.0,
        "adversarial.r1.every": 4,
    },
    "nitro1": {
        "inputs.sigmas": (1.0,),
        "inputs.noise": "pair",
        "inputs.rollout": None,
        "sampler": "euler",
        "time_scale": 0.4,
        "diffusion.target": "pair",
        "diffusion.kind": "smooth_l1",
        "diffusion.weight": 1.0,
        "diffusion.decay": None,
        "adversarial.loss": "non_saturating",
        "adversarial.share_time": False,
        "adversarial.weight": 1.0,
        "adversarial.heads.condition": "none",
        "adversarial.discriminator.times.kind": "uniform",
        "adversarial.discriminator.least": 0.0,
        "adversarial.discriminator.most": 0.8,
        "adversarial.misaligned.share": 0.5,
        "adversarial.misaligned.start": 0,
        "adversarial.null_text": 0.0,
        "adversarial.pool": None,
        "adversarial.optim.lr": 1e-6,
        "optim.lr": 1e-6,
        "reflow": None,
    },
    "nitrofusion": {
        "inputs.sigmas": (1.0,),
        "inputs.noise": "pair",
        "inputs.rollout": None,
        "sampler": "multistep",
        "time_scale": 0.5,
        "diffusion.target": "pair",
        "diffusion.kind": "smooth_l1",
        "diffusion.weight": 0.1,
        "adversarial.loss": "hinge",
        "adversarial.weight": "auto",
        "adversarial.misaligned": None,
        "adversarial.null_text": 0.5,
        "adversarial.pool.refresh_unit": "use",
        "adversarial.pool.levels": (0.09, 0.41, 0.62, 0.80),
        "adversarial.pool.copies": 15,
        "adversarial.pool.use": 4,
        "adversarial.pool.refresh": 0.01,
        "adversarial.pool.spread": 0.03,
        "adversarial.optim.lr": 1e-4,
        "optim.lr": 1e-5,
        "reflow": None,
    },
    "sana_adv": {
        "inputs.sigmas": (1.0,),
        "inputs.noise": "fresh",
        "inputs.rollout": None,
        "inputs.continuous_times.share": 0.5,
        "inputs.continuous_times.times": TimestepConfig(kind="logit_normal", mean=0.89, std=1.6),
        "sampler": "multistep",
        "time_scale": 1.0,
        "diffusion.target": "teacher",
        "diffusion.guidance_scale": 4.5,
        "diffusion.kind": "mse",
        "diffusion.space": "velocity",
        "diffusion.weight": 1.0,
        "adversarial.loss": "hinge",
        "adversarial.weight": 0.5,
        "adversarial.discriminator.times": TimestepConfig(mean=0.093, std=1.0),
        "adversarial.misaligned.share": 0.5,
        "adversarial.misaligned.start": 0,
        "adversarial.null_text": 0.0,
        "adversarial.pool": None,
        "adversarial.optim.lr": 2e-6,
        "optim.lr": 2e-6,
        "reflow": None,
    },
    "reflow": {
        "inputs.continuous_times.share": 1.0,
        "inputs.continuous_times.times.kind": "uniform",
        "inputs.noise": "pair",
        "inputs.rollout": None,
        "sampler": "euler",
        "time_scale": 1.0,
        "diffusion": None,
        "adversarial": None,
        "reflow.weight": 1.0,
        "optim.lr": 1e-5,
    },
    "dmd2": {
        "inputs.sigmas": SIGMAS,
        "inputs.noise": "chain",
        "sampler": "multistep",
        "every": 5,
        "score.times": ScoreTimesConfig(range="full", least=0.02, most=0.98),
        "score.noise": "fresh",
        "score.fake.weighting": "velocity",
        "score.fake.repeat": 1,
        "score.fake.optim.lr": 1e-5,
        "optim.lr": 1e-5,
        "optim.clip": 10.0,
        "adversarial": None,
    },
    "tdm": {
        "inputs.sigmas": SIGMAS,
        "inputs.noise": "chain",
        "sampler": "euler",
        "every": 5,
        "score.times.range": "step",
        "score.noise": "trajectory",
        "score.fake.weighting": "snr",
        "adversarial": None,
    },
    "score_imitate": {
        "inputs.chain_counts": {4: 0.4, 2: 0.3, 1: 0.3},
        "sampler": "multistep",
        "every": 1,
        "start": 20,
        "score.weight": 1.0,
        "score.noise": "fresh",
        "imitate.weight": 0.5,
        "imitate.largest_time": 0.8,
        "imitate.reach": 0.0,
        "needs_pairs": [],
    },
    "dmd2_gan": {
        "every": 5,
        "adversarial.weight": 0.03,
        "adversarial.loss": "non_saturating",
        "adversarial.share_score": True,
        "adversarial.discriminator.times.kind": "uniform",
        "adversarial.r1": None,
        "adversarial.misaligned": None,
        "needs_pairs": ["adversarial"],
    },
    "f_distill": {
        "every": 10,
        "score.divergence": "js",
        "adversarial.weight": 1e-3,
        "adversarial.share_score": True,
    },
    "dmdr": {
        "every": 5,
        "adapter.rank": 32,
        "reward.start": 1000,
        "inputs.group": 4,
        "score.form": "dmd",
        "optim.lr": 2e-5,
        "needs_pairs": [],
    },
    "pi_flow": {
        "imitate.reach": 1.0,
        "imitate.places": 2,
        "imitate.largest_time": 1.0,
        "sampler": "policy",
        "score": None,
        "needs_pairs": [],
    },
    "instaflow": {
        "inputs.sigmas": (1.0,),
        "inputs.noise": "pair",
        "sampler": "euler",
        "diffusion.target": "pair",
        "adversarial": None,
        "time_scale": 1.0,
    },
    "consistency": {"flow_map.kind": "discrete", "flow_map.step": 1 / 48, "sampler": "multistep"},
    "scm": {
        "inputs.continuous_times.times.mean": 0.89,
        "inputs.continuous_times.times.std": 1.6,
        "flow_map.normalize": "tangent",
        "flow_map.constant": 0.1,
        "flow_map.warmup": 4000,
        "sampler": "multistep",
    },
    "mean_flow": {
        "inputs.intervals": 0.5,
        "inputs.continuous_times.times.mean": -0.4,
        "flow_map.normalize": "adaptive",
        "flow_map.constant": 1e-2,
        "flow_map.warmup": 2000,
        "sampler": "flow_map",
    },
    "sana_sprint": {
        "inputs.continuous_times.share": 0.5,
        "flow_map.kind": "continuous",
        "adversarial.weight": 0.5,
        "adversarial.discriminator.times.mean": 0.093,
        "optim.lr": 2e-6,
    },
    "rcm": {
        "every": 5,
        "inputs.scatter": True,
        "flow_map.normalize": "tangent",
        "flow_map.times.mean": 0.89,
        "flow_map.times.std": 1.6,
        "score.form": "dmd",
        "needs_pairs": ["flow_map.times"],
    },
    "decoupled_dmd": {"score.form": "dmd", "score.decoupled": True, "every": 5, "sampler": "multistep"},
    "phased_dmd": {
        "score.times.range": "above",
        "score.noise": "trajectory",
        "score.fake.weighting": "transition",
        "sampler": "euler",
    },
    "swiftbrush": {
        "score.form": "vsd",
        "score.fake.adapter.rank": 64,
        "score.fake.drop_text": 0.1,
        "score.fake.guidance_scale": "teacher",
        "score.fake.optim.lr": 1e-3,
        "every": 1,
        "optim.lr": 1e-6,
        "needs_pairs": [],
    },
    "pg_sb": {"score.form": "vsd", "score.guidance_scale": (2.0, 7.0), "score.fake.adapter.rank": 64},
    "sid": {
        "score.form": "sid",
        "score.alpha": 1.0,
        "score.guidance_scale": 2.0,
        "score.fake.guidance_scale": "teacher",
        "time_scale": 0.625,
        "every": 1,
        "optim.lr": 1e-6,
        "needs_pairs": [],
    },
    "sid_few": {"score.form": "sid", "inputs.sigmas": (1.0, 0.75, 0.5, 0.25), "time_scale": 1.0},
    "sim": {"score.form": "sim", "inputs.sigmas": (1.0,), "optim.lr": 1e-6},
}
STEPS = {
    "ladd4": [1, 2, 4],
    "ladd_guided": [1, 2, 4],
    "nitro1": [1],
    "nitrofusion": [1, 2, 3, 4],
    "sana_adv": [1, 2, 4],
    "reflow": [],
    "dmd2": [4],
    "tdm": [4],
    "score_imitate": [1, 2, 4],
    "dmd2_gan": [4],
    "f_distill": [4],
    "dmdr": [4],
    "pi_flow": [4],
    "instaflow": [1],
    "consistency": [1, 2, 4],
    "scm": [1, 2, 4],
    "mean_flow": [1, 2, 4],
    "sana_sprint": [1, 2, 4],
    "rcm": [1, 2, 4],
    "decoupled_dmd": [4],
    "phased_dmd": [4],
    "swiftbrush": [1],
    "pg_sb": [1],
    "sid": [1],
    "sid_few": [4],
    "sim": [1],
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_their_published_values(preset):
    config = distill_config(preset, **({"reward": {"rewards": ["shapes"]}} if preset == "dmdr" else {}))
    values = {path: attrgetter(path)(config) for path in PUBLISHED[preset]}
    assert values == PUBLISHED[preset]
    assert [len(times) for times in config.schedules] == STEPS[preset]


def test_frozen_gives_back_what_was_trainable():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].requires_grad_(False)
    with frozen(module):
        assert not any(p.requires_grad for p in module.parameters())
    assert [p.requires_grad for p in module.parameters()] == [True, True, False, False]
