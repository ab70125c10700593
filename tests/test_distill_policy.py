"""pi-Flow's policy: its path against a fine solver, the widened model, its sampler, imitation along it, a run."""

from dataclasses import replace

import pytest
import torch
from distill_tools import SMALLER, distill_config, random_text, tiny_model
from einops import rearrange
from test_distill_score import Gaussian, shared, words
from test_distill_stage import pairs as pairs
from test_distill_stage import recipe, states

from nitro_e.cli import sample as sample_command
from nitro_e.cli import train
from nitro_e.config import ConfigError
from nitro_e.model import EMMDiT
from nitro_e.model.released import to_released
from nitro_e.randomness import SampleRandom
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.policy import Policy
from nitro_e.sampling.samplers import SamplingConfig, sample
from nitro_e.stages.distill.imitate import Imitate, ImitateConfig
from nitro_e.stages.distill.inputs import DistillBatch, Prediction
from nitro_e.stages.first_weights import check_adopted

WIDE = replace(SMALLER, policy=3)


def random_policy(places, t, t_next, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, 3, 2, 2, generator=generator, dtype=torch.float64)  # noqa: E731
    t, t_next = torch.tensor(t).double(), torch.tensor(t_next).double()
    return Policy(draw(len(t)), t, t_next, draw(len(t), places))


def solved(policy, s, steps=4000):
    """x at s by the midpoint rule on dx/du = (x - x0(u)) / u, with x0 from its definition, sample by sample."""
    ends = []
    for row, (t, t_next, end) in enumerate(zip(policy.t, policy.t_next, s)):
        grid = torch.linspace(float(t), float(t_next), policy.data.shape[1], dtype=torch.float64)

        def data(u, row=row, grid=grid):
            for i in range(len(grid) - 1):
                if grid[i] >= u >= grid[i + 1] - 1e-12:
                    share = (grid[i] - u) / (grid[i] - grid[i + 1])
                    return (1 - share) * policy.data[row, i] + share * policy.data[row, i + 1]
            return policy.data[row, 0]

        x, h = policy.x[row], (end - t) / steps
        for number in range(steps):
            u = t + number * h
            half = x + h / 2 * (x - data(u)) / u
            x = x + h * (half - data(u + h / 2)) / (u + h / 2)
        ends.append(x)
    return torch.stack(ends)


@pytest.mark.parametrize("places", [1, 2, 5])
def test_the_path_is_that_of_a_fine_solver(places):
    policy = random_policy(places, t=[1.0, 0.5, 0.75], t_next=[0.75, 0.0, 0.5])
    s = torch.tensor([0.8, 0.1, 0.5]).double()
    torch.testing.assert_close(policy.state(s), solved(policy, s), rtol=1e-4, atol=1e-4)


def test_the_velocity_is_the_paths_derivative():
    policy = random_policy(4, t=[1.0, 0.5], t_next=[0.75, 0.0])
    s, h = torch.tensor([0.87, 0.21]).double(), 1e-5
    slope = (policy.state(s + h) - policy.state(s - h)) / (2 * h)
    torch.testing.assert_close(policy.velocity(policy.state(s), s), slope, rtol=1e-6, atol=1e-6)


def test_a_policy_begins_at_its_state_and_ends_at_its_last_prediction():
    for places in (1, 2, 10):
        policy = random_policy(places, t=[1.0, 0.25], t_next=[0.0, 0.0])
        assert torch.equal(policy.state(policy.t), policy.x)
        assert torch.equal(policy.state(torch.zeros(2).double()), policy.data[:, -1])
    single = random_policy(1, t=[1.0, 0.5], t_next=[0.5, 0.25])
    velocity = (single.x - single.data[:, 0]) / single.t[:, None, None, None]
    straight = single.x + (single.t_next - single.t)[:, None, None, None] * velocity
    torch.testing.assert_close(single.state(single.t_next), straight, rtol=1e-12, atol=1e-12)


# ---- the model and its sampler


def test_a_widened_model_begins_with_the_same_velocity_everywhere_and_its_steps_are_eulers():
    plain, model = tiny_model(config=SMALLER), EMMDiT(WIDE)
    model.adopt(plain)
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.8]), random_text(2)
    with torch.no_grad():
        found = model(x, t, text)
        assert found.shape == (2, 3, 4, 16, 16)
        for place in range(3):
            torch.testing.assert_close(found[:, place], plain(x, t, text), rtol=0, atol=1e-6)
        settings = SamplingConfig(sampler="policy", steps=3, guidance_scale=2.0, grid="linear")
        ours = sample(model, text, random_text(2, seed=5), settings, x, torch.zeros_like)
        theirs = sample(
            plain, text, random_text(2, seed=5), replace(settings, sampler="euler"), x, torch.zeros_like
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_every_place_has_its_own_part_of_the_last_layer():
    model = EMMDiT(WIDE)
    torch.nn.init.normal_(model.out.weight)
    weight = rearrange(
        model.out.weight.detach().clone(), "(pq n c) d -> n pq c d", n=3, c=WIDE.latent_channels
    )
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.8]), random_text(2)
    with torch.no_grad():
        before = model(x, t, text)
        weight[1] *= 2
        model.out.weight.copy_(rearrange(weight, "n pq c d -> (pq n c) d"))
        moved = (model(x, t, text) - before).abs().amax((0, 2, 3, 4))
    assert moved[1] > 0.01 and moved[[0, 2]].max() < 1e-5


def test_other_samplers_and_other_weights_are_refused():
    plain, wide = tiny_model(config=SMALLER), EMMDiT(WIDE)
    x, text = torch.randn(1, 4, 16, 16), random_text(1)
    for model, name in ((wide, "euler"), (wide, "multistep"), (plain, "policy")):
        settings = SamplingConfig(sampler=name, steps=2, guidance_scale=1)
        with pytest.raises(ConfigError, match=f"sampler '{name}': these weights predict"):
            sample(model, text, text, settings, x, torch.zeros_like)
    check_adopted("x", SMALLER, WIDE)
    with pytest.raises(ConfigError, match="model.policy was 3, is 1"):
        check_adopted("x", WIDE, SMALLER)
    with pytest.raises(ConfigError, match="policy"):
        to_released(wide)
    for overrides, message in (
        ({"score": {}}, "leave out score"),
        ({"adapter": {"rank": 4}}, "leave out adapter"),
        ({"imitate": None, "score": {}}, "leave out score"),
        ({"inputs": {"noise": "fresh"}}, "set inputs.noise: chain"),
    ):
        with pytest.raises(ConfigError, match=message):
            distill_config("pi_flow", **overrides)
    with pytest.raises(ConfigError, match="policy needs prediction: velocity"):
        replace(WIDE, prediction="data")


# ---- imitation


def exact_prediction(places, t, t_next):
    """What an exact student predicts of data N(0.3, 0.5^2): the conditional means of x0 along the exact path."""
    mean, s = 0.3, 0.5
    deviation = lambda t: ((1 - t) ** 2 * s**2 + t**2).sqrt()  # noqa: E731
    t, t_next = torch.tensor(t).double(), torch.tensor(t_next).double()
    x = (1 - t)[:, None, None, None] * mean + deviation(t)[:, None, None, None] * torch.randn(
        len(t), 3, 2, 2
    ).double()
    data = []
    for number in range(places):
        u = t + number / max(places - 1, 1) * (t_next - t)
        ratio = (deviation(u) / deviation(t))[:, None, None, None]
        there = (1 - u)[:, None, None, None] * mean + ratio * (x - (1 - t)[:, None, None, None] * mean)
        gain = ((1 - u) * s**2 / deviation(u) ** 2)[:, None, None, None]
        data.append(mean + gain * (there - (1 - u)[:, None, None, None] * mean))
    data = torch.stack(data, dim=1) if places > 1 else data[0]
    return Prediction(x, t, False, data.requires_grad_(), t_next=t_next)


def test_more_places_follow_the_teacher_better_and_a_gradient_reaches_them_all():
    torch.manual_seed(0)
    text = words(*[0.3] * 2000)
    text = text._replace(tokens=text.tokens.double())
    losses = {}
    for places in (1, 2, 10):
        prediction = exact_prediction(places, [0.75] * 2000, [0.5] * 2000)
        objective = Imitate(
            ImitateConfig(guidance_scale=1, reach=1, largest_time=1, places=4), shared(Gaussian(0.5).double())
        )
        batch = DistillBatch(0, None, None, text, ["p"] * 2000, ["k"] * 2000)
        values, _ = objective.loss(prediction, batch, SampleRandom("s", first=0, count=2000))
        values.sum().backward()
        reached = (
            prediction.data.grad.unflatten(0, (2000, -1)).abs().sum((0, *range(2, prediction.data.ndim)))
        )
        losses[places] = values.mean().item()
        assert prediction.data.grad.isfinite().all() and reached.min() > 0
    assert losses[10] < 0.05 * losses[2] < 0.05 * losses[1]


# ---- a run


def test_a_run_learns_its_places_resumes_to_the_bit_and_is_sampled(pairs, tmp_path, capsys):
    line = [str(recipe(pairs, tmp_path, "pi_flow")), "sampling.steps=4"]
    assert train.main(line) == 2
    assert "model.policy: 10" in capsys.readouterr().err
    line.append("model.policy=3")
    assert train.main([*line, "sampling.sampler=euler"]) == 2
    assert "set them alike" in capsys.readouterr().err
    assert train.main([*line, f"run={tmp_path / 'whole'}"]) == 0
    assert train.main([*line, f"run={tmp_path / 'halves'}", "engine.steps=3"]) == 0
    assert train.main([*line, f"run={tmp_path / 'halves'}"]) == 0
    whole, halves = (states(tmp_path / name, 6) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    for key in whole:  # slopes that were not measured are NaN
        torch.testing.assert_close(whole[key], halves[key], rtol=0, atol=0, equal_nan=True)

    published = TextToImage.from_pretrained(tmp_path / "whole")
    weight = rearrange(published.model.out.weight.detach(), "(pq n c) d -> n pq c d", n=3, c=24)
    assert not torch.allclose(weight[0], weight[2], atol=1e-5)
    assert len(published(["a red circle"], num_inference_steps=4).images) == 1
    arguments = [
        str(tmp_path / "whole"),
        "--prompt",
        "a",
        "--out",
        str(tmp_path / "out"),
        "--sampler",
        "euler",
    ]
    assert sample_command.main([*arguments, "--force"]) == 2
    assert "need sampler: policy" in capsys.readouterr().err

    # neither a teacher nor the start of a student of one velocity
    student = str(tmp_path / "whole")
    assert train.main([*line, f"run={tmp_path / 'next'}", f"stage.teacher={student}"]) == 2
    assert "predicts several velocities per step" in capsys.readouterr().err
    ours = str(recipe(pairs, tmp_path, "tdm"))
    assert train.main([ours, "sampling.steps=4", f"run={tmp_path / 'tdm'}", f"init_from={student}"]) == 2
    assert "model.policy was 3, is 1" in capsys.readouterr().err
