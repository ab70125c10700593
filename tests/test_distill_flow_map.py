"""Flow maps: the objective against exact maps between Gaussians, the model's second time, the sampler that jumps."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from distill_tools import SMALLER, Loop, distill_config, random_batch, random_text, tiny_model, tiny_stage
from test_distill_score import Gaussian, shared, words
from test_distill_stage import pairs as pairs
from test_distill_stage import recipe
from torch import nn

from nitro_e.cli import sample as sample_command
from nitro_e.cli import train
from nitro_e.config import ConfigError
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import EMMDiT
from nitro_e.model.pretrained import load_pretrained
from nitro_e.randomness import SampleRandom
from nitro_e.record import run_folder
from nitro_e.sampling.flow import TimestepConfig
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.samplers import SamplingConfig, euler, sample, time_grid
from nitro_e.stages.distill.flow_map import FlowMap, FlowMapConfig
from nitro_e.stages.distill.inputs import DistillBatch, InputConfig, Prediction, Predictor
from nitro_e.stages.first_weights import check_adopted

INTERVAL = replace(SMALLER, interval=True, time_input="t")
TEXT = TextEmbedding(words(0.4, -0.3).tokens.double(), words(0.0, 0.0).mask)


class ExactMap(nn.Module):
    """The average velocity from t down to r for data N(mean, s^2), plus a constant error."""

    def __init__(self, s, error=0.0):
        super().__init__()
        self.s, self.error = s, error

    def jump(self, x, t, r, mean):
        deviation = lambda t: ((1 - t) ** 2 * self.s**2 + t**2).sqrt()  # noqa: E731
        return (1 - r) * mean + deviation(r) / deviation(t) * (x - (1 - t) * mean)

    def forward(self, x, t, text):
        t, r = t.unbind(1) if t.ndim == 2 else (t, torch.zeros_like(t))
        t, r, mean = (part[:, None, None, None] for part in (t, r, text.tokens.mean((1, 2))))
        return (x - self.jump(x, t, r, mean)) / (t - r) + self.error


def objective(student, **options):
    lent = shared(Gaussian(0.5).double())
    lent.bare = student
    return FlowMap(FlowMapConfig(guidance_scale=1, **options), lent)


def evaluate(student, t, end=None, **options):
    """The values and the velocities' slope, at random x."""
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 4, 4).double(), torch.tensor(t).double()
    end = None if end is None else torch.tensor(end).double()
    prediction = Prediction(x, t, True, x, end=end)
    Predictor.run(student, prediction, TEXT)
    prediction.data = prediction.data.detach().requires_grad_()
    batch = DistillBatch(0, None, None, TEXT, ["a", "b"], ["a", "b"], latent_shape=(3, 4, 4))
    values, logs = objective(student, **options).loss(prediction, batch, SampleRandom("t", first=0, count=2))
    return values, torch.autograd.grad(values.sum(), prediction.data)[0], logs, prediction


@pytest.mark.parametrize("end", [None, [0.2, 0.85]])
def test_the_exact_map_has_no_error_and_another_one_has(end):
    """MeanFlow's identity, and with the end at 0 that of continuous consistency."""
    values, slope, logs, _ = evaluate(ExactMap(0.5), [0.6, 0.9], end, normalize="none")
    assert values.max() < 1e-12 and slope.abs().max() < 1e-7 and logs["derivative"] > 1e-4
    # a constant error of the velocity is the error of the identity: its derivative is 0
    values, slope, _, prediction = evaluate(ExactMap(0.5, 0.3), [0.6, 0.9], end, normalize="none")
    torch.testing.assert_close(values, torch.full((2,), 0.09).double(), rtol=1e-6, atol=1e-9)
    # velocity = (x - data) / t
    expected = -2 * 0.3 / prediction.t[:, None, None, None] / slope[0].numel()
    torch.testing.assert_close(slope, expected.expand_as(slope), rtol=1e-6, atol=1e-9)


def test_normalised_errors():
    t = [0.6, 0.9]
    _, plain, _, _ = evaluate(ExactMap(0.5, 0.3), t, normalize="none")
    values, tangent, _, _ = evaluate(ExactMap(0.5, 0.3), t, normalize="tangent", constant=0.1)
    torch.testing.assert_close(tangent, plain / (0.3 + 0.1), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(values, torch.full((2,), (0.3 / 0.4) ** 2).double(), rtol=1e-5, atol=1e-9)
    values, adaptive, _, _ = evaluate(ExactMap(0.5, 0.3), t, normalize="adaptive", constant=0.01)
    torch.testing.assert_close(adaptive, plain / (0.09 + 0.01), rtol=1e-5, atol=1e-9)


def test_u23_with_the_end_at_its_own_time_it_is_the_distance_to_the_teacher():
    class Zero(nn.Module):
        def forward(self, x, t, text):
            return 0 * x + (t.sum(1) if t.ndim == 2 else t)[:, None, None, None]

    values, *_, prediction = evaluate(Zero(), [0.6, 0.9], [0.6, 0.9], normalize="none")
    own = 2 * prediction.t[:, None, None, None]
    teacher = Gaussian(0.5).double()(prediction.x, prediction.t, TEXT)
    torch.testing.assert_close(values, (own - teacher).square().mean((1, 2, 3)), rtol=1e-6, atol=1e-8)


def test_at_images_of_its_own_the_map_is_trained_by_a_pass_of_its_own():
    """At images of N(mean, s^2) mixed with new noise at times of the law, whatever the student's inputs are (rCM)."""
    torch.manual_seed(0)
    calls = []

    class Listening(ExactMap):
        def forward(self, x, t, text):
            if t.ndim == 1:
                calls.append((x, t))
            return super().forward(x, t, text) + self.shift

    student = Listening(0.5)
    student.shift = nn.Parameter(torch.zeros(()).double())
    found = objective(student, normalize="none", times=TimestepConfig(mean=0.89, std=1.6))
    assert found.direct and not objective(student).direct
    found.shared.student = student
    count = 4000
    tokens = TEXT.tokens[:1].expand(count, -1, -1)
    text = TextEmbedding(tokens, TEXT.mask[:1].expand(count, -1))
    mean = tokens.mean((1, 2))[:, None, None, None]
    latents = mean + 0.5 * torch.randn(count, 1, 2, 2).double()
    batch = DistillBatch(0, latents, None, text, ["p"] * count, ["k"] * count)
    elsewhere = Prediction(latents, torch.full((count,), 2.0), False, latents)  # of the other objectives
    values, _ = found.loss(elsewhere, batch, SampleRandom("f", first=0, count=count))
    assert values.max() < 1e-10
    x, t = calls[0]
    law = torch.sigmoid(0.89 + 1.6 * torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(
        t.float().quantile(torch.tensor([0.1587, 0.5, 0.8413])), law, rtol=0.05, atol=0.02
    )
    spread = ((1 - t) ** 2 * 0.25 + t**2).sqrt()[:, None, None, None]
    assert (((x - (1 - t)[:, None, None, None] * mean) / spread).std() - 1).abs() < 0.02
    student.shift.data += 0.3
    wrong, _ = found.loss(elsewhere, batch, SampleRandom("f", first=0, count=count))
    (slope,) = torch.autograd.grad(wrong.mean(), student.shift)
    assert slope.item() == pytest.approx(2 * 0.3, rel=1e-3)


def test_the_derivatives_part_is_warmed_up():
    half, whole = (
        evaluate(ExactMap(0.5), [0.6, 0.9], normalize="none", warmup=warmup)[0] for warmup in (2, 1)
    )
    *_, logs, prediction = evaluate(ExactMap(0.5), [0.6, 0.9], normalize="none")
    assert whole.max() < 1e-12
    torch.testing.assert_close(
        (half / (prediction.t / 2) ** 2).mean(), logs["derivative"], rtol=1e-6, atol=1e-9
    )


def test_a_short_step_leads_to_the_same_data():
    """Euler's error is of second order in the step."""
    errors = [
        evaluate(ExactMap(0.5), [0.6, 0.9], kind="discrete", step=step)[0].sqrt() for step in (0.02, 0.01)
    ]
    ratio = errors[0] / errors[1]
    assert ((ratio > 3.5) & (ratio < 4.5)).all()
    wrong = evaluate(ExactMap(0.5, 0.3), [0.6, 0.9], kind="discrete", step=0.01)[0]
    # data from t is off by t * error, data after the step by (t - step) * error
    assert wrong.sqrt().max().item() == pytest.approx(0.003, rel=0.3)


def test_u23_the_derivative_of_the_model_is_the_difference_along_the_path():
    model, text = tiny_model(config=INTERVAL), random_text(2)
    torch.nn.init.normal_(model.time.elapsed.linear_out.weight, std=0.05)
    lent = shared(model)
    lent.bare = model
    x, v, t, end = (
        torch.randn(2, 4, 8, 8),
        torch.randn(2, 4, 8, 8),
        torch.tensor([0.5, 0.8]),
        torch.tensor([0.1, 0.4]),
    )
    found = FlowMap(FlowMapConfig(), lent).derivative(Prediction(x, t, True, x, end=end), v, text)
    h = 1e-2
    with torch.no_grad():
        ahead, behind = (
            model(x + sign * h * v, torch.stack([t + sign * h, end], dim=1), text) for sign in (1, -1)
        )
    difference = (ahead - behind) / (2 * h)
    assert (found - difference).norm() < 0.02 * difference.norm()


def test_the_derivative_is_in_float32_where_the_engine_trains_in_bfloat16(fresh_state):
    """accelerate's wrapper of `forward` switches autocast on again inside what switches it off."""
    stage, text = tiny_stage(distill_config("scm"), model=tiny_model(config=INTERVAL)), random_text(2)
    x, v, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.8])
    mapping = next(objective for objective in stage.objectives if isinstance(objective, FlowMap))
    exact = mapping.derivative(Prediction(x, t, True, x), v, text)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    assert accelerator.prepare_model(stage.student)(x, t, text).shape == x.shape
    with accelerator.autocast():
        assert torch.equal(mapping.derivative(Prediction(x, t, True, x), v, text), exact)


# ---- the model


def test_a_second_time_changes_nothing_at_first_and_something_later():
    plain, model = tiny_model(), EMMDiT(replace(tiny_model().config, interval=True))
    model.adopt(plain)
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.8]), random_text(2)
    with torch.no_grad():
        for times in (t, torch.stack([t, t / 2], dim=1)):
            assert torch.equal(model(x, times, text), plain(x, t, text))
        torch.nn.init.normal_(model.time.elapsed.linear_out.weight, std=0.1)
        both = [model(x, torch.stack([t, end], dim=1), text) for end in (t / 2, torch.zeros(2))]
        assert not torch.allclose(both[0], both[1]) and torch.equal(both[1], model(x, t, text))
    with pytest.raises(ConfigError, match="needs model.interval: true"):
        plain(x, torch.stack([t, t], dim=1), text)


def test_a_slow_time_embedding_takes_the_place_of_the_fast_one():
    """On the shipped model: nearly the same velocities, a smaller derivative in t."""
    teacher = load_pretrained(run_folder.model_folder("shapes")).float()
    student = EMMDiT(replace(teacher.config, time_input="t"))
    student.adopt(teacher)
    torch.manual_seed(0)
    side, text = teacher.config.base_grid, random_text(4, width=teacher.config.text_width)
    x = torch.randn(4, teacher.config.latent_channels, side, side)
    t = torch.tensor([0.95, 0.7, 0.4, 0.1])
    slope = lambda model: torch.func.jvp(lambda t: model(x, t, text), (t,), (torch.ones(4),))[1]  # noqa: E731
    with torch.no_grad():
        ours, theirs = student(x, t, text), teacher(x, t, text)
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
        assert slope(student).norm() < 0.5 * slope(teacher).norm()


def test_weights_are_adopted_in_one_direction():
    changed = replace(SMALLER, interval=True, time_input="t")
    check_adopted("x", SMALLER, changed)
    with pytest.raises(ConfigError, match="model.interval was True, is False"):
        check_adopted("x", changed, SMALLER)
    with pytest.raises(ConfigError, match="model.width was 32"):
        check_adopted("x", SMALLER, replace(changed, width=64))


# ---- sampling and runs


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_jumps_of_the_exact_map_end_where_the_path_ends(steps):
    exact, noise = ExactMap(0.5), torch.randn(2, 3, 4, 4).double()
    settings = SamplingConfig(sampler="flow_map", steps=steps, guidance_scale=1, grid="linear")
    found = sample(exact, TEXT, TEXT, settings, noise, lambda step: noise)
    teacher = Gaussian(0.5).double()
    fine = euler(lambda x, t: teacher(x, t, TEXT), noise, time_grid(2000, "linear").double())
    torch.testing.assert_close(found, fine, rtol=1e-2, atol=1e-2)


def test_ends_lie_between_0_and_t_for_their_share():
    config = InputConfig(sigmas=(1.0,), noise="fresh", intervals=0.25)
    t = torch.linspace(0.01, 1, 2000)
    end = Predictor(config, "flow_map", 0).draw_ends(t, SampleRandom("e", first=0, count=2000))
    assert ((end >= 0) & (end <= t)).all()
    assert (end < t).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert (end / t)[end < t].mean().item() == pytest.approx(0.5, abs=0.05)


def test_scattered_chains_fall_from_1_at_other_times_each_step():
    config = InputConfig(noise="chain", scatter=True, counts={"4": 1.0})
    predictor, drawn = Predictor(config, "multistep", seed=0), []
    for step in range(50):
        batch = DistillBatch(step, None, None, random_text(4), ["p"] * 4, ["k"] * 4, latent_shape=(1, 2, 2))
        prediction = predictor(lambda x, t, text: x, batch, SampleRandom(step, first=0, count=4), last=True)
        t = prediction.t
        assert t[0] == 1 and (t[1:] < t[:-1]).all() and t.min() >= 0.02
        assert torch.equal(prediction.t_next, torch.cat([t[1:], torch.zeros(1)]))
        drawn.append(t[1:])
    assert torch.cat(drawn).mean().item() == pytest.approx(0.5, abs=0.1)


def test_mean_flow_learns_average_velocities():
    config = distill_config("mean_flow", flow_map={"warmup": 0}, optim={"lr": 1e-3, "warmup": 0})
    stage = tiny_stage(config, model=tiny_model(config=INTERVAL))
    loop = Loop(stage, 6)
    for step in range(6):
        logs = loop.step(random_batch(step, 4, (4, 8, 8)))
        assert all(value.isfinite().all() for value in logs.values())
    assert stage.model.time.elapsed.linear_out.weight.abs().max() > 0


def test_a_run_of_mean_flow_from_a_teacher_without_intervals(pairs, tmp_path, capsys):
    path, run = recipe(pairs, tmp_path, "mean_flow"), tmp_path / "run"
    assert train.main([str(path)]) == 2
    assert "set model.interval: true" in capsys.readouterr().err
    own = ["model.interval=true", "model.time_input=t"]
    assert train.main([str(path), *own, "engine.steps=3"]) == 0
    assert train.main([str(path), *own]) == 0
    published = TextToImage.from_pretrained(run)
    times = []
    published.model.register_forward_pre_hook(lambda module, inputs: times.append(inputs[1][0].tolist()))
    published(["a red circle"], steps=2)
    assert times == [[1.0, 0.5], [0.5, 0.0]]
    arguments = [
        str(pairs / "teacher"),
        "--prompt",
        "a",
        "--out",
        str(tmp_path / "out"),
        "--sampler",
        "flow_map",
    ]
    assert sample_command.main(arguments) == 2
    assert "needs model.interval: true" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("mean_flow", {"flow_map": {"kind": "discrete", "warmup": 0}}, "average velocities predict no data"),
        ("mean_flow", {"flow_map": None, "diffusion": {}}, "average velocities predict no data"),
        ("mean_flow", {"inputs": {"noise": "chain"}}, "takes all times of the sampler"),
        ("rcm", {"sampler": "flow_map"}, "has no chains or rollouts"),
        ("scm", {"sampler": "flow_map"}, "averages between two times"),
        ("consistency", {"flow_map": {"warmup": 5}}, "only for kind 'continuous'"),
        ("scm", {"inputs": {"scatter": True}}, "only for noise 'chain'"),
    ],
)
def test_settings_of_flow_maps_that_contradict_each_other_are_refused(preset, overrides, message):
    with pytest.raises(ConfigError, match=message):
        distill_config(preset, **overrides)
