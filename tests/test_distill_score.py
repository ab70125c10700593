"""Distillation without images: chains of the student's sampler, the fake score, imitation; against closed forms and plain code."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from distill_tools import SMALLER, Loop, distill_config, random_batch, random_text, tiny_model, tiny_stage
from test_distill_stage import ROOT, recipe, states
from test_distill_stage import pairs as pairs
from torch import nn

from nitro_e.cli import train
from nitro_e.config import ConfigError
from nitro_e.data.prompts import Prompt
from nitro_e.interfaces import Phase, TextEmbedding
from nitro_e.model import EMMDiT
from nitro_e.randomness import SampleRandom
from nitro_e.record import metrics, run_folder
from nitro_e.sampling import flow
from nitro_e.sampling.samplers import euler, multistep
from nitro_e.stages.distill.imitate import Imitate, ImitateConfig
from nitro_e.stages.distill.inputs import DistillBatch, InputConfig, Prediction, Predictor, Scored
from nitro_e.stages.distill.objective import Shared
from nitro_e.stages.distill.score import Score, ScoreConfig, ScoreTimesConfig
from nitro_e.stages.distill.sources import Prompts
from nitro_e.training.optim import OptimConfig

SIGMAS = (1.0, 0.75, 0.5, 0.25)
ENGINE = {
    "steps": 4,
    "save_every": 2,
    "sample_every": 0,
    "log_every": 1,
    "tracker": "none",
    "ema": {"beta": 0.9},
}


def rng(count=8, *purpose):
    return SampleRandom("test", *purpose, first=0, count=count)


# ---- phases that are not due in every step


@pytest.mark.parametrize(("every", "repeat", "start"), [(1, 1, 0), (5, 1, 0), (1, 3, 2), (3, 2, 4)])
def test_a_phase_counts_its_own_updates(every, repeat, start):
    phase = Phase("p", nn.Linear(1, 1), None, OptimConfig(), every=every, repeat=repeat, start=start)
    done = 0
    for step in range(30):
        assert phase.updates(step) == done
        assert phase.due(step) == (step in range(start, 30, every))
        done += repeat * phase.due(step)


def test_the_student_rests_while_the_fake_score_learns():
    """every 3, start 1 and two updates of the fake score per step: who moves when, at which rate, on how many forwards."""
    config = distill_config(
        "score_imitate",
        every=3,
        start=1,
        score={"fake": {"repeat": 2}},
        optim={"lr": 1e-3, "warmup": 4, "decay": 0},
        heldout=0,  # a chain has one prompt, drawn otherwise by other versions of torch
    )
    stage, calls = tiny_stage(config, model=tiny_model(config=SMALLER)), []
    stage.student.model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    fake, student = stage.phases
    loop = Loop(stage, 8)
    for step in range(8):
        weights = fake.module.out.weight, student.module.model.out.weight
        before = [weight.clone() for weight in weights]
        calls.clear()
        loop.step(random_batch(step, 4, (4, 8, 8)))
        moved = [not torch.equal(a, b) for a, b in zip(before, weights)]
        assert moved == [True, step in (1, 4, 7)]
        assert set(calls) == {step in (1, 4, 7)}
        if moved[1]:
            rate = loop.optimizers[1][0].param_groups[0]["lr"]
            assert rate == pytest.approx(1e-3 * min(1, ((step - 1) // 3 + 1) / 4))


# ---- chains


@pytest.mark.parametrize("sampler", ["euler", "multistep"])
@pytest.mark.parametrize("count", [4, 2, 1])
def test_a_chain_is_the_students_own_sampler(sampler, count):
    config = InputConfig(sigmas=SIGMAS, noise="chain", counts={str(count): 1.0})

    def model(x, t, text):
        return torch.tanh(x) * t[:, None, None, None] + text.tokens.mean((1, 2))[:, None, None, None]

    batch = random_batch(0, 8)
    prompts, text = list(batch.prompts), batch.text
    prediction = Predictor(config, sampler, seed=0)(model, batch, rng(), last=True)
    times = config.times_of(count)
    assert prediction.t.tolist() == list(times) * (8 // count)
    assert prediction.t_next.tolist() == [*times[1:], 0.0] * (8 // count)
    assert batch.prompts == [prompts[row - row % count] for row in range(8)]
    noise = rng().normal(4, 16, 16)
    for first in range(0, 8, count):
        own, seen = text.take([first]), []
        velocity = lambda x, t: seen.append(x) or model(x, t, own)  # noqa: E731, B023
        grid, start = torch.tensor([*times, 0.0]), noise[first : first + 1]
        if sampler == "euler":
            end = euler(velocity, start, grid)
        else:
            end = multistep(velocity, start, grid, lambda step: noise[first + step + 1][None])  # noqa: B023
        torch.testing.assert_close(prediction.x[first : first + count], torch.cat(seen))
        torch.testing.assert_close(prediction.data[first + count - 1], end[0])


def test_chains_draw_their_numbers_of_steps_by_weight():
    config = InputConfig(sigmas=SIGMAS, noise="chain", counts={"4": 0.5, "2": 0.25, "1": 0.25})
    predictor, drawn = Predictor(config, "multistep", seed=0), []
    for step in range(400):
        batch = DistillBatch(step, None, None, random_text(4), ["p"] * 4, ["k"] * 4, latent_shape=(1, 2, 2))
        t = predictor(lambda x, t, text: x, batch, rng(4), last=True).t
        drawn.append(len(t.unique()))
    for count, weight in [(4, 0.5), (2, 0.25), (1, 0.25)]:
        assert drawn.count(count) / 400 == pytest.approx(weight, abs=0.07)


def test_chains_train_alike_with_and_without_a_kept_graph():
    config = distill_config("score_imitate", start=0, optim={"lr": 1e-3, "warmup": 0})
    stages = [tiny_stage(config, model=tiny_model(config=SMALLER)) for _ in range(2)]
    for stage, alone in zip(stages, (True, False)):
        loop = Loop(stage, 10)
        for step in range(3):
            loop.step(random_batch(step, 4, (4, 8, 8), alone=alone))
    for a, b in zip(stages[0].student.parameters(), stages[1].student.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_prompts_are_drawn_uniformly_and_by_sample_index():
    class Text:
        def encode(self, prompts):
            tokens = torch.tensor([[[float(len(prompt))]] for prompt in prompts])
            return TextEmbedding(tokens, torch.ones(len(prompts), 1, dtype=torch.bool))

    names = [Prompt(text, {"first": text}) for text in ("a", "bb", "ccc", "bb")]
    whole = Prompts(names, Text(), [(1, 2, 2)], 8, 0, torch.device("cpu"))
    half = Prompts(names, Text(), [(1, 2, 2)], 4, 0, torch.device("cpu"))
    assert whole.prompts == ["a", "bb", "ccc"] and whole.fingerprint == half.fingerprint
    stream, drawn = whole.batches(3, 0, 1, 1), []
    parts = [half.batches(3, rank, 2, 1) for rank in range(2)]
    for step in range(3, 103):
        batch, others = next(stream), [next(part) for part in parts]
        assert batch.step == step and batch.latents is None and batch.shape == (1, 2, 2)
        assert batch.prompts == others[0].prompts + others[1].prompts
        assert batch.text.tokens.flatten().tolist() == [len(prompt) for prompt in batch.prompts]
        assert [info["first"] for info in batch.info] == batch.prompts
        drawn += batch.prompts
    assert all(drawn.count(name) / 800 == pytest.approx(1 / 3, abs=0.06) for name in whole.prompts)
    # of several sizes each step has one, the same on all processes and after a resume; each comes as often
    shapes = [(1, 2, 2), (1, 1, 4), (1, 4, 1)]
    sized = [Prompts(names, Text(), shapes, 4, 0, torch.device("cpu")) for _ in range(3)]
    assert sized[0].fingerprint != whole.fingerprint
    streams = [sized[rank].batches(0, rank, 2, 2) for rank in range(2)]
    resumed, seen = sized[2].batches(3, 1, 2, 2), []
    for step in range(9):
        batches = [next(stream) for stream in streams for _ in range(2)]
        batches += [next(resumed) for _ in range(2) if step >= 3]
        (shape,) = {batch.shape for batch in batches}
        seen.append(shape)
    assert all(set(seen[first : first + 3]) == set(shapes) for first in (0, 3, 6)) and seen[:3] != seen[3:6]
    # two micro-batches of one process are the two of two processes
    accumulated = half.batches(3, 0, 1, 2)
    assert next(accumulated).prompts + next(accumulated).prompts == drawn[:8]


# ---- the fake score


class Gaussian(nn.Module):
    """The exact velocity for data N(mean, s^2): mean of the rows' text, in each of the latent's dimensions."""

    def __init__(self, s):
        super().__init__()
        self.s, self.weight = s, nn.Parameter(torch.ones(()))

    def forward(self, x, t, text):
        t, mean = t[:, None, None, None], text.tokens.mean((1, 2))[:, None, None, None]
        variance = (1 - t) ** 2 * self.s**2 + t**2
        data = mean + (1 - t) * self.s**2 / variance * (x - (1 - t) * mean)
        return (x - data) / t * self.weight


def words(*means):
    return TextEmbedding(torch.tensor(means)[:, None, None], torch.ones(len(means), 1, dtype=torch.bool))


def shared(teacher, null=0.0):
    predict = lambda batch, rng, last=False: batch.prediction  # noqa: E731
    return Shared(teacher, None, words(null), predict, None, None, 0.0, 0, torch.device("cpu"))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_slope_between_gaussians_is_the_closed_form(scale):
    """Scores of N(m, s^2): x0_fake - x0_teacher = tau^2 (m_fake - m_teacher) / ((1 - tau)^2 s^2 + tau^2), everywhere."""
    s, student, text, null = 0.5, 1.5, (-0.5, 0.25), 0.1
    tau, data = torch.tensor([0.3, 0.8]), torch.randn(2, 4, 8, 8)
    x = flow.interpolate(data, torch.randn(2, 4, 8, 8), tau)
    score = Score(ScoreConfig(guidance_scale=scale), shared(Gaussian(s), null))
    leaf = data.clone().requires_grad_()
    batch = DistillBatch(0, None, None, words(*text), ["a", "b"], ["a", "b"], latent_shape=(4, 8, 8))
    batch.scored = Scored(x, tau, Gaussian(s)(x, tau, words(student, student)).detach())
    values, logs = score.loss(Prediction(x, tau, False, leaf), batch, rng(2))
    (slope,) = torch.autograd.grad(values.sum(), leaf)
    means = null + scale * (torch.tensor(text) - null)
    variance = (1 - tau) ** 2 * s**2 + tau**2
    teacher = x - tau[:, None, None, None] * Gaussian(s)(x, tau, words(*means.tolist()))
    distance = (data - teacher).abs().mean((1, 2, 3))
    expected = tau**2 / variance * (student - means) / distance / data[0].numel()
    torch.testing.assert_close(slope, expected[:, None, None, None].expand_as(slope), rtol=1e-4, atol=1e-7)
    assert logs["distance"].item() == pytest.approx(distance.mean().item(), rel=1e-4)


def test_the_fake_score_is_the_teachers_copy_and_matches_the_flow_of_the_students_data():
    stage = tiny_stage(distill_config("dmd2"))
    fake, _ = stage.phases
    for ours, theirs in zip(fake.module.parameters(), stage.shared.teacher.parameters()):
        assert torch.equal(ours, theirs) and ours.requires_grad and not theirs.requires_grad
    stage.model.out.weight.data.add_(1)
    assert torch.equal(fake.module.out.weight, stage.shared.teacher.out.weight)
    batch = random_batch(0)
    loss, _ = fake.loss(fake.net, batch, rng())
    x, tau, velocity = batch.scored
    assert ((tau >= 0.02) & (tau <= 0.98)).all() and not velocity.requires_grad
    data, t = batch.prediction.data.detach(), tau[:, None, None, None]
    target = (x - data) / t  # of x = (1 - t) data + t noise: noise - data
    keep = stage.shared.training(batch)
    expected = ((velocity - target) ** 2).mean((1, 2, 3)) * keep
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-4)


def test_a_fake_score_that_predicts_data_is_trained_on_the_error_of_data():
    """Divided by its floor of .05, below which the velocities of such a model are not `noise - data`."""
    model = tiny_model(config=replace(SMALLER, prediction="data"))
    config = distill_config("dmd2", score={"times": {"least": 0.01, "most": 0.04}}, heldout=0)
    (fake, _), batch = tiny_stage(config, model=model).phases, random_batch(0, 4, (4, 8, 8))
    loss, _ = fake.loss(fake.net, batch, rng(4))
    x, tau, velocity = batch.scored
    predicted = x - 0.05 * velocity
    expected = (predicted - batch.prediction.data).square().mean() / 0.05**2
    assert tau.max() < 0.05 and loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_fake_score_that_is_guided_as_the_teacher_is_asked_what_the_teacher_is_asked():
    """Scale 0 is no guidance, as for every sampler; a scale of its own of 0 asks without the prompt."""
    batch, x, t = random_batch(0, 4, (4, 8, 8)), torch.randn(4, 4, 8, 8), torch.full((4,), 0.6)
    batch.scored, answers = Scored(x, t, x), []
    for own in ("teacher", 0.0):
        config = distill_config("dmd2", score={"fake": {"guidance_scale": own}})
        stage = tiny_stage(config, model=tiny_model(config=SMALLER))
        (score,), teacher, null = stage.objectives, stage.shared.teacher, stage.shared.null_text.expand(4)
        with torch.no_grad():
            answers.append([score.fake_velocity(batch, x.clone(), scale) for scale in (0.0, 1.0, 3.0)])
            plain, without = teacher(x, t, batch.text), teacher(x, t, null)
    for found, expected in zip(answers[0], (plain, plain, without + 3 * (plain - without))):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(found, without) for found in answers[1])
    assert (plain - without).abs().max() > 1e-3


def test_u22_noise_from_the_trajectory_has_the_moments_of_fresh_noise():
    """With e standard normal, x_tau has mean (1 - tau) x0 and variance tau^2; at s = 0 it is the fresh noise itself."""
    config = ScoreConfig(noise="trajectory", times=ScoreTimesConfig(range="step"))
    score = Score(config, shared(Gaussian(1.0)))
    generator = torch.Generator().manual_seed(0)
    data, own, fresh = torch.randn(3, 2, 1, 200, 200, generator=generator)
    t, s = torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.0])
    x = flow.interpolate(data, own, t)
    prediction = Prediction(x, t, False, data, t_next=s)
    tau = score.draw_times(prediction, rng(2), "step")
    assert ((tau >= s.clamp(min=0.02)) & (tau <= t)).all()
    noise, weight = score.noise(prediction, tau, fresh)
    assert noise.var().item() == pytest.approx(1, abs=0.02) and abs((noise * data).mean()) < 0.02
    torch.testing.assert_close(noise[1], fresh[1], rtol=1e-4, atol=1e-5)
    # the sampler's next state, moved on along its own path: x_tau = rho x_s + what is missing of the noise
    rho = (1 - tau[0]) / (1 - s[0])
    following = flow.interpolate(data, own, s)[0]
    expected = rho * following + (tau[0] ** 2 - rho**2 * s[0] ** 2).sqrt() * fresh[0]
    torch.testing.assert_close(flow.interpolate(data, noise, tau)[0], expected, rtol=1e-4, atol=1e-4)
    log_density = lambda values: torch.distributions.Normal(0, 1).log_prob(values).mean((1, 2, 3))  # noqa: E731
    torch.testing.assert_close(weight.log(), log_density(noise) - log_density(fresh), rtol=1e-3, atol=1e-5)


def test_heads_may_stand_beside_the_fake_score_on_pairs():
    """DMD2 with a GAN: real images are those of the chains' prompts, and each of the three networks learns."""
    heads = {"start": 0, "ramp": 0, "weight": 0.1, "heads": {"width": 16}}
    stage = tiny_stage(distill_config("dmd2", every=1, adversarial=heads), model=tiny_model(config=SMALLER))
    assert [phase.name for phase in stage.phases] == ["fake", "discriminator", "student"]
    before = [[p.clone() for p in phase.module.parameters()] for phase in stage.phases]
    batch, loop = random_batch(0, 4, (4, 8, 8)), Loop(stage, 4)
    latents = batch.latents
    logs = loop.step(batch)
    assert torch.equal(batch.latents, latents[[0, 0, 0, 0]])
    assert logs["student/score_slope"] > 0 and logs["student/adversarial_slope"] > 0
    for phase, parameters in zip(stage.phases, before):
        assert any(not torch.equal(a, b) for a, b in zip(parameters, phase.module.parameters()))


# ---- imitation


@pytest.mark.parametrize("reach", [0.0, 1.0])
def test_imitation_is_the_distance_to_the_teachers_velocity_on_the_students_line(reach):
    teacher = Gaussian(0.5)
    data, t = torch.randn(3, 4, 8, 8).requires_grad_(), torch.tensor([1.0, 0.75, 0.25])
    x, following, text = torch.randn(3, 4, 8, 8), torch.tensor([0.75, 0.5, 0.0]), words(0.2, -0.3, 1.0)
    imitate = Imitate(ImitateConfig(guidance_scale=2, reach=reach), shared(teacher))
    batch = DistillBatch(0, None, None, text, ["a"] * 3, ["k"] * 3, latent_shape=(4, 8, 8))
    values, _ = imitate.loss(Prediction(x, t, False, data, t_next=following), batch, rng(3))
    at = t - reach * rng(3).uniform() * (t - following)
    expected = []
    for row in range(3):
        own = (x[row] - data[row]) / t[row]
        place = (x[row] + (at[row] - t[row]) * own).detach()[None]
        with_text = teacher(place, at[row : row + 1], text.take([row]))
        without = teacher(place, at[row : row + 1], words(0.0))
        assert at[row] > 0.02  # the same velocity, of the state that the line has reached
        own = (place[0] - data[row]) / at[row]
        expected.append((own - (2 * with_text - without)[0].detach()).square().mean())
    expected = torch.stack(expected) * torch.tensor([0.0, 1.0, 1.0])  # 1 is beyond largest_time
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)
    (slope,) = torch.autograd.grad(values.sum(), data)
    (wanted,) = torch.autograd.grad(expected.sum(), data)
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-6)


# ---- runs


def prompts_recipe(pairs, folder, preset="score_imitate", **overrides):
    prompts = {
        "data": None,
        "sampling": {"resolution": 64, "steps": 4, "guidance_scale": 1, "sampler": "multistep"},
    }
    path = recipe(pairs, folder, preset, **prompts, batch=8, **overrides)
    return path, f"stage.prompts={pairs / 'prompts.txt'}"


def test_a_run_on_prompts_alone_resumes_to_the_bit(pairs, tmp_path):
    path, prompts = prompts_recipe(pairs, tmp_path)
    assert train.main([str(path), prompts, f"run={tmp_path / 'whole'}"]) == 0
    assert train.main([str(path), prompts, f"run={tmp_path / 'halves'}", "engine.steps=3"]) == 0
    assert train.main([str(path), prompts, f"run={tmp_path / 'halves'}"]) == 0
    whole, halves = (states(tmp_path / name, 6) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() and any(name.startswith("fake") for name in whole)
    assert [
        name for name in whole if not torch.equal(whole[name].nan_to_num(), halves[name].nan_to_num())
    ] == []
    rows = metrics.read(tmp_path / "whole")
    assert ["loss" in row for row in rows if "fake/loss" in row] == [False, False, True, True, True, True]
    assert all(row["score_slope"] > 0 for row in rows if "loss" in row)


def test_two_processes_train_on_prompts_as_one(pairs, tmp_path):
    path, prompts = prompts_recipe(pairs, tmp_path)
    assert train.main([str(path), prompts]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "train.py"), str(path), prompts, f"run={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = metrics.read(tmp_path / "run"), metrics.read(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in {"loss", "fake/loss", "score_distance", "imitate", "std_ratio"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    assert "loss" in one[-1]


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("ladd4", {"prompts": "p.txt"}, "inputs.noise, diffusion, adversarial, guards read images"),
        ("ladd4", {"imitate": {}}, "imitate follows the student's own states"),
        (
            "ladd_guided",
            {"inputs": {"noise": "chain"}, "diffusion": {"target": "pair"}},
            "no image belongs to",
        ),
        ("tdm", {"sampler": "multistep"}, "'trajectory' is Euler's"),
        ("tdm", {"score": {"times": {"range": "full"}}}, "needs times: {range: step}"),
        ("dmd2", {"inputs": {"counts": {3: 1}}}, "3 steps are not evenly spaced among the 4 sigmas"),
        ("dmd2", {"inputs": {"counts": {4: 0}}}, "all weights are 0"),
        ("dmd2", {"inputs": {"rollout": {}}}, "takes all times of the sampler"),
        ("ladd4", {"inputs": {"counts": {4: 1}}}, "only for noise 'chain'"),
        ("dmd2", {"sample_steps": [1, 4]}, "inputs.counts says the steps of chains"),
        ("dmd2", {"score": {"divergence": "kl"}}, "reads density ratios"),
        ("dmd2", {"score": {"form": "sid", "divergence": "kl"}}, "weights the slope of form 'dmd'"),
        ("dmd2", {"score": {"fake": {"weighting": "transition"}}}, "it needs noise: trajectory"),
        ("dmd2", {"score": {"guidance_scale": [5, 2]}}, "expected a scale or two that rise"),
        ("decoupled_dmd", {"score": {"guidance_scale": 1}}, "one guidance_scale above 1"),
        ("dmd2_gan", {"score": {"form": "sid"}}, "no score of form 'dmd' or 'vsd' to share with"),
        ("dmd2_gan", {"adversarial": {"null_text": 0.5}}, "set pool: null, null_text: 0"),
        (
            "ladd4",
            {"inputs": {"noise": "pair"}, "score": {"times": {"range": "above"}}, "guards": None},
            "score.times.range: the steps that are meant",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(preset, overrides, message):
    with pytest.raises(ConfigError, match=message):
        distill_config(preset, **overrides)


def test_recipes_on_prompts_say_what_is_missing_or_too_much(pairs, tmp_path, capsys):
    path, prompts = prompts_recipe(pairs, tmp_path)
    for overrides, message in [
        ([], "missing key 'data'"),
        ([prompts, "data={shards: [a.tar], resolution: 64}"], "leave data out"),
        ([prompts, "batch=6"], "set batch.per_device to a multiple of 4"),
        ([prompts, "batch={}"], "missing key 'batch'"),
    ]:
        assert train.main([str(path), *overrides]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1, error


# ---- forms of the score


def matched(config, x, tau, data, fake, text, teacher=0.5, null=0.1, t_next=None):
    """The values and the slope at the data of an objective between Gaussians, and its logs."""
    score = Score(config, shared(Gaussian(teacher), null))
    score.fake = fake
    leaf = data.clone().requires_grad_()
    batch = DistillBatch(0, None, None, text, ["a", "b"], ["a", "b"], latent_shape=data.shape[1:])
    batch.scored = Scored(x, tau, fake(x, tau, text).detach())
    values, logs = score.loss(Prediction(x, tau, False, leaf, t_next=t_next), batch, rng(2))
    return values, torch.autograd.grad(values.sum(), leaf)[0], logs


class Shifted(Gaussian):
    """The velocity for N(mean + shift, s^2)."""

    def __init__(self, s, shift):
        super().__init__(s)
        self.shift = shift

    def forward(self, x, t, text):
        return super().forward(x, t, TextEmbedding(text.tokens + self.shift, text.mask))


def state(tau, data):
    return flow.interpolate(data, torch.randn_like(data), tau)


def test_vsd_is_the_weighted_difference_of_noise_predictions():
    tau, data, s, shift = torch.tensor([0.3, 0.8]), torch.randn(2, 4, 8, 8), 0.5, 1.5
    config = ScoreConfig(form="vsd", guidance_scale=1.0)
    _, slope, _ = matched(config, state(tau, data), tau, data, Shifted(s, shift), words(-0.5, 0.25))
    # noise predictions of Gaussians differ by tau (1 - tau) shift / variance
    variance = (1 - tau) ** 2 * s**2 + tau**2
    expected = tau**2 * (tau * (1 - tau) * shift / variance) / data[0].numel()
    torch.testing.assert_close(slope, expected[:, None, None, None].expand_as(slope), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("guidance", [1.0, "teacher"])
def test_random_guidance_draws_a_scale_for_every_sample(guidance):
    tau, data, text = torch.tensor([0.3, 0.8]), torch.randn(2, 4, 8, 8), words(-0.5, 0.25)
    config = distill_config(
        "dmd2", score={"form": "vsd", "guidance_scale": [2, 6], "fake": {"guidance_scale": guidance}}
    ).score
    x, fake = state(tau, data), Shifted(0.5, 1.5)
    _, slope, _ = matched(config, x, tau, data, fake, text)
    scales = 2 + 4 * rng(2).uniform()
    assert (scales[0] - scales[1]).abs() > 0.1
    for row in range(2):
        one = distill_config(
            "dmd2",
            score={
                "form": "vsd",
                "guidance_scale": scales[row].item(),
                "fake": {"guidance_scale": guidance if guidance == "teacher" else 1.0},
            },
        ).score
        _, expected, _ = matched(one, x, tau, data, fake, text)
        torch.testing.assert_close(slope[row], expected[row], rtol=1e-4, atol=1e-8)


def identity(x_g, noise, tau, teacher, fake, text, alpha):
    """SiD's loss in velocities, tau^2 (v_F - v_T) (u - v_F + (1 - alpha) (v_F - v_T)), per sample and dimension."""
    t = tau[:, None, None, None]
    x = (1 - t) * x_g + t * noise
    v_t, v_f = teacher(x, tau, text), fake(x, tau, text)
    return (t**2 * (v_f - v_t) * (noise - x_g - v_f + (1 - alpha) * (v_f - v_t))).mean((1, 2, 3)), x, v_t, v_f


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_u20_sid_is_the_form_in_velocities_through_both_networks(alpha):
    """The slope is the central difference of the plain loss; between Gaussians of one width, the closed form."""
    double = lambda module: module.double()  # noqa: E731
    tau, (data, noise) = torch.tensor([0.3, 0.8]).double(), torch.randn(2, 2, 1, 2, 2).double()
    text = TextEmbedding(words(-0.5, 0.25).tokens.double(), words(0.0, 0.0).mask)
    teacher, fake = double(Gaussian(0.5)), double(Shifted(0.8, 0.4))
    plain, x, v_t, _ = identity(data, noise, tau, teacher, fake, text, alpha)
    config = ScoreConfig(form="sid", guidance_scale=1.0, alpha=alpha)
    values, slope, _ = matched(config, x, tau, data, fake, text)
    distance = (data - (x - tau[:, None, None, None] * v_t)).abs().mean((1, 2, 3))
    torch.testing.assert_close(values, plain.detach() / distance.detach(), rtol=1e-4, atol=1e-5)
    for place in range(4):
        move = torch.zeros(4).double()
        move[place] = 1e-4
        ahead, behind = (
            identity(data + sign * move.view(1, 2, 2), noise, tau, teacher, fake, text, alpha)[0]
            for sign in (1, -1)
        )
        expected = (ahead - behind) / 2e-4 / distance
        torch.testing.assert_close(slope.flatten(1)[:, place], expected.detach(), rtol=1e-3, atol=1e-4)


def test_sid_between_gaussians_is_the_closed_form():
    tau, data, s, shift = torch.tensor([0.3, 0.8]), torch.randn(2, 4, 8, 8), 0.5, 1.5
    config = ScoreConfig(form="sid", guidance_scale=1.0)
    x, text = state(tau, data), words(-0.5, 0.25)
    _, slope, logs = matched(config, x, tau, data, Shifted(s, shift), text)
    share = tau**2 / ((1 - tau) ** 2 * s**2 + tau**2)
    teacher = x - tau[:, None, None, None] * Gaussian(s)(x, tau, text)
    expected = share**2 * shift / (data - teacher).abs().mean((1, 2, 3)) / data[0].numel()
    torch.testing.assert_close(
        slope, expected[:, None, None, None].expand_as(slope).detach(), rtol=1e-3, atol=1e-7
    )
    assert logs["gap"].item() == pytest.approx((share * shift).square().mean().item(), rel=1e-3)


def test_u20_sim_of_a_large_constant_is_sid_without_its_normaliser():
    tau, data, text = torch.tensor([0.3, 0.8]), torch.randn(2, 4, 8, 8), words(-0.5, 0.25)
    x, fake = state(tau, data), Shifted(0.8, 0.4)
    sid, slope, _ = matched(ScoreConfig(form="sid", guidance_scale=1.0), x, tau, data, fake, text)
    sim, other, _ = matched(ScoreConfig(form="sim", guidance_scale=1.0, huber=1e3), x, tau, data, fake, text)
    scale = sid / sim
    torch.testing.assert_close(slope, other * scale.detach()[:, None, None, None], rtol=1e-3, atol=1e-9)
    # of a small one: the gap's direction alone
    small = ScoreConfig(form="sim", guidance_scale=1.0, huber=1e-6)
    values, _, _ = matched(small, x, tau, data, fake, text)
    v_t, v_f = Gaussian(0.5)(x, tau, text), fake(x, tau, text)
    t = tau[:, None, None, None]
    gap = t * (v_f - v_t)
    expected = (gap * (x - t * v_f - data)).mean((1, 2, 3)) / gap.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-5)


def test_decoupled_guidance_has_a_time_of_its_own():
    """Between Gaussians both terms are constants: tau^2 / variance times the difference of the means."""
    s, shift, null, scale = 0.5, 1.5, 0.1, 3.0
    tau, following, text = torch.tensor([0.3, 0.8]), torch.tensor([0.5, 0.75]), (-0.5, 0.25)
    data = torch.randn(2, 4, 8, 8)
    x = state(tau, data)
    config = ScoreConfig(decoupled=True, guidance_scale=scale)
    _, slope, logs = matched(config, x, tau, data, Shifted(s, shift), words(*text), s, null, following)
    later = following + (0.98 - following) * rng(2).uniform()
    share = lambda t: t**2 / ((1 - t) ** 2 * s**2 + t**2)  # noqa: E731
    teacher = x - tau[:, None, None, None] * Gaussian(s)(x, tau, words(*text))
    guidance = (scale - 1) * share(later) * (null - torch.tensor(text))
    expected = (share(tau) * shift + guidance) / (data - teacher).abs().mean((1, 2, 3)) / data[0].numel()
    torch.testing.assert_close(
        slope, expected[:, None, None, None].expand_as(slope).detach(), rtol=1e-3, atol=1e-7
    )
    assert logs["guidance"].item() == pytest.approx(16 * guidance.norm().item(), rel=1e-3)


def test_the_fake_score_of_a_transition_learns_the_scores_of_the_noised_states():
    """Phased DMD: at the exact velocity of the states, noised on, its loss is flat; beside it, it is larger."""
    s, mean, t_next = 0.5, 0.3, 0.5
    generator = torch.Generator().manual_seed(0)
    data = mean + s * torch.randn(2, 1, 300, 300, generator=generator)
    own = torch.randn(2, 1, 300, 300, generator=generator)
    t = torch.full((2,), 0.75)
    prediction = Prediction(flow.interpolate(data, own, t), t, False, data, t_next=torch.full((2,), t_next))
    config = distill_config("phased_dmd", score={"guidance_scale": 1}).score
    score = Score(config, shared(Gaussian(s)))
    batch = DistillBatch(0, None, None, words(mean, mean), ["a"] * 2, ["a"] * 2, latent_shape=(1, 300, 300))
    batch.prediction = prediction

    def loss(shift):
        net = lambda x, t, text: Gaussian(s)(x, t, text) + shift  # noqa: E731
        return score.fake_loss(net, batch, rng(2))[0].item()

    exact, ahead, behind = loss(0.0), loss(0.3), loss(-0.3)
    assert ahead > exact and behind > exact
    assert abs(ahead - behind) < 0.1 * (ahead + behind - 2 * exact)


def test_a_fake_score_that_is_a_lora_leaves_the_teacher_as_it_is():
    config = distill_config("swiftbrush", score={"fake": {"adapter": {"rank": 4}}})
    stage = tiny_stage(config, model=tiny_model(config=SMALLER))
    teacher, fake = stage.shared.teacher, stage.phases[0].module
    owned = {id(weight) for weight in teacher.parameters()}
    shared_weights = [weight for weight in fake.parameters() if id(weight) in owned]
    assert len(shared_weights) > 10
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), random_text(2)
    with torch.no_grad():
        torch.testing.assert_close(fake(x, t, text), teacher(x, t, text))
        before, state = teacher(x, t, text), [weight.clone() for weight in teacher.parameters()]
    loop = Loop(stage, 3)
    for step in range(3):
        loop.step(random_batch(step, 4, (4, 8, 8)))
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), state))
    with torch.no_grad():
        assert torch.equal(teacher(x, t, text), before)
        assert not torch.allclose(fake(x, t, text), before)
    trained = [name for name, weight in fake.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_a_fake_score_that_is_a_lora_is_trained_in_float32():
    """Over a teacher in bfloat16 an update of 1e-5 moves every weight, which bfloat16 would round away."""
    config = distill_config("swiftbrush", score={"fake": {"adapter": {"rank": 4}, "optim": {"lr": 1e-5}}})
    stage = tiny_stage(config, model=tiny_model(config=SMALLER).bfloat16())
    fake, loop = stage.phases[0].module, Loop(stage, 10)
    trained = [weight for weight in fake.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.float32}
    assert {weight.dtype for weight in fake.parameters() if not weight.requires_grad} == {torch.bfloat16}
    for step in range(2):  # A has a gradient once B is not zero
        before = [weight.clone() for weight in trained]
        with torch.autocast("cpu", torch.bfloat16):
            loop.step(random_batch(step, 4, (4, 8, 8)))
    still = sum(int((a == b).sum()) for a, b in zip(before, trained))
    assert still < 0.05 * sum(weight.numel() for weight in trained)


def test_a_student_that_is_a_lora_resumes_and_publishes_merged_weights(fresh_state, pairs, tmp_path):
    path, prompts = prompts_recipe(pairs, tmp_path, "swiftbrush", engine=ENGINE)
    options = [prompts, "stage.adapter={rank: 4, targets: blocks}", "sampling.steps=1"]
    assert train.main([str(path), *options, f"run={tmp_path / 'whole'}"]) == 0
    assert train.main([str(path), *options, f"run={tmp_path / 'halves'}", "engine.steps=2"]) == 0
    assert train.main([str(path), *options, f"run={tmp_path / 'halves'}"]) == 0
    whole, halves = (states(tmp_path / name, 4) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() and any("lora_A" in name for name in whole)
    assert [
        name for name in whole if not torch.equal(whole[name].nan_to_num(), halves[name].nan_to_num())
    ] == []
    folder = run_folder.latest(tmp_path / "whole")
    model, teacher = EMMDiT.from_pretrained(folder / "model"), EMMDiT.from_pretrained(pairs / "teacher")
    assert (folder / "model/adapter/adapter_model.safetensors").exists()
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), teacher.parameters()))


# ---- a GAN in the teacher's pass


def gan(**score):
    heads = {"start": 0, "ramp": 0, "weight": 0.1, "heads": {"width": 16}}
    return distill_config("dmd2_gan", every=1, score={"guidance_scale": 3, **score}, adversarial=heads)


def test_one_pass_of_the_teacher_gives_score_and_discriminator_what_two_would():
    """The slopes of both, against the guided velocity and the features of separate passes; and how many there are."""
    stage = tiny_stage(gan(), model=tiny_model(config=SMALLER))
    score, adversarial = stage.objectives
    batch = random_batch(0, 4, (4, 8, 8))
    stage.phases[0].loss(stage.phases[0].net, batch, rng(4))
    x, tau, fake = batch.scored
    prediction = batch.prediction
    leaf = Prediction(prediction.x, prediction.t, False, prediction.data.detach().requires_grad_())
    calls = []
    hook = stage.shared.teacher.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    slopes = [
        torch.autograd.grad(each.loss(leaf, batch, rng(4))[0].sum(), leaf.data)[0]
        for each in (score, adversarial)
    ]
    hook.remove()
    assert calls == [4]  # without the prompt; the pass with it is of forward_intermediates
    data = leaf.data.detach()
    guided = stage.shared.guided(x, tau, batch.text, 3.0)
    teacher = x - tau[:, None, None, None] * guided
    own = (x - tau[:, None, None, None] * fake - teacher) / (data - teacher).abs().mean(
        (1, 2, 3), keepdim=True
    )
    torch.testing.assert_close(slopes[0], own / data[0].numel(), rtol=1e-3, atol=1e-7)
    alone = data.clone().requires_grad_()
    t = tau[:, None, None, None]
    noise = (x - (1 - t) * data) / t
    logits = adversarial.heads(adversarial.backbone((1 - t) * alone + t * noise, tau, batch.text), 0)
    values = sum(torch.nn.functional.softplus(-each).mean((1, 2)) for each in logits) / len(logits)
    (expected,) = torch.autograd.grad(values.sum(), alone)
    torch.testing.assert_close(slopes[1], expected, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("kl", [0.1, 1, 20]),
        ("js", [1 / 11, 0.5, 20 / 21]),
        ("hellinger", [0.1**0.5, 1, 20**0.5]),
        ("jeffreys", [1.1, 2, 21]),
    ],
)
def test_u21_divergences_weight_by_the_density_ratio(divergence, expected):
    """Ratios e^-9, 1 and e^9 are clipped to .1, 1, 20; the mean weight is 1."""

    class Heads:
        def log_ratio(self, prediction, batch):
            return torch.tensor([-9.0, 0.0, 9.0])

    score = Score(ScoreConfig(divergence=divergence), shared(Gaussian(1.0)))
    score.shared.discriminator = Heads()
    weights, expected = score.density_weights(None, None), torch.tensor(expected)
    torch.testing.assert_close(weights, expected / expected.mean(), rtol=1e-4, atol=1e-6)


def test_f_distill_scales_the_slope_of_dmd():
    stages = [
        tiny_stage(gan(divergence=name), model=tiny_model(config=SMALLER)) for name in ("reverse_kl", "kl")
    ]
    slopes = []
    for stage in stages:
        batch = random_batch(0, 4, (4, 8, 8))
        stage.phases[0].loss(stage.phases[0].net, batch, rng(4))
        leaf = batch.prediction
        leaf.data = leaf.data.detach().requires_grad_()
        values, _ = stage.objectives[0].loss(leaf, batch, rng(4))
        slopes.append(torch.autograd.grad(values.sum(), leaf.data)[0])
    ratio = slopes[1] / slopes[0]
    weights = ratio[:, 0, 0, 0]
    torch.testing.assert_close(ratio, weights[:, None, None, None].expand_as(ratio), rtol=1e-2, atol=1e-3)
    assert weights.mean().item() == pytest.approx(1, abs=1e-3) and weights.std() > 1e-4
    with torch.no_grad():
        ratios = stages[1].objectives[1].log_ratio(leaf, batch).exp()
    torch.testing.assert_close(weights, ratios / ratios.mean(), rtol=1e-2, atol=1e-3)
