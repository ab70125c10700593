"""Samplers on velocity fields whose solution is known."""

import pytest
import torch

from nitro_e.config import ConfigError
from nitro_e.interfaces import TextEmbedding
from nitro_e.sampling.flow import time_grid
from nitro_e.sampling.samplers import SAMPLERS, SamplingConfig, fitted, guide, initial_noise, sample


def text(value: float) -> TextEmbedding:
    return TextEmbedding(torch.full((2, 4, 3), value), torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("grid", ["released", "linear"])
def test_one_point_of_data_is_reached_exactly(name, grid):
    """The true velocity towards one data point is (x - data) / t: straight lines, any number of steps."""
    data = torch.randn(2, 3, 4, 4)

    def velocity(x, t):
        one = (x - data) / t.reshape(2, -1)[:, 0].reshape(2, 1, 1, 1)
        return torch.stack([one] * 3, dim=1) if name == "policy" else one

    for steps in (1, 2, 5):
        end = SAMPLERS[name](velocity, torch.randn(2, 3, 4, 4), time_grid(steps, grid))
        torch.testing.assert_close(end, data, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(name, order):
    """dx/dt = x * cos(3 t) has the solution x(0) = x(1) * exp(-sin(3) / 3). The grid stops short of Heun's last Euler step."""
    velocity = lambda x, t: x * torch.cos(3 * t.reshape(-1, 1, 1, 1))  # noqa: E731
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = []
    for steps in (20, 40):
        times = torch.linspace(1, 0.2, steps + 1, dtype=torch.float64)
        exact = torch.exp(
            torch.sin(torch.tensor(0.6).double()) / 3 - torch.sin(torch.tensor(3.0).double()) / 3
        )
        errors.append((SAMPLERS[name](velocity, start, times) - exact).abs().item())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_guidance_extrapolates_and_costs_one_batched_call():
    calls = []

    def model(x, t, prompt):
        calls.append(len(x))
        return x * prompt.tokens.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)

    x, t = torch.randn(2, 3, 4, 4), torch.full((2,), 0.5)
    torch.testing.assert_close(guide(model, text(2.0), text(0.5), 3.0)(x, t), x * (0.5 + 3 * 1.5))
    for off in (0, 1):
        torch.testing.assert_close(guide(model, text(2.0), text(0.5), off)(x, t), x * 2.0)
    assert calls == [4, 2, 2]


def test_noise_of_an_image_depends_on_its_seed_alone():
    assert torch.equal(initial_noise([3, 7], (2, 4, 4))[1], initial_noise([7], (2, 4, 4))[0])
    assert not torch.equal(initial_noise([3], (2, 4, 4)), initial_noise([4], (2, 4, 4)))


def test_bad_settings_are_refused():
    for message, settings in (
        ("steps must be at least 1", {"steps": 0}),
        ("steps of sampler 'policy' cannot", {"guidance_rescale": "zero_star", "sampler": "policy"}),
        ("steps of sampler 'multistep' cannot", {"guidance_rescale": "zero_star", "sampler": "multistep"}),
        ("1 step would return the noise", {"guidance_rescale": "zero_star", "steps": 1}),
    ):
        with pytest.raises(ConfigError, match=message):
            SamplingConfig(**settings)
    SamplingConfig(guidance_rescale="zero_star", steps=1, guidance_interval=(0.2, 0.9))
    SamplingConfig(guidance_rescale="zero_star", steps=1, guidance_scale=1)


def test_zero_star_scales_the_other_velocity_to_fit():
    """Parallel velocities guide nowhere; at right angles the other one vanishes; at t = 1 nothing is computed."""

    def model(x, t, prompt):
        return x * prompt.tokens.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)

    x, t = torch.randn(2, 3, 4, 4), torch.full((2,), 0.5)
    for scale in (1.5, 4.0):
        guided = guide(model, text(2.0), text(0.5), scale, rescale="zero_star")
        torch.testing.assert_close(guided(x, t), x * 2.0)
    assert not guided(x, torch.ones(2)).any()
    assert guide(model, text(2.0), text(0.5), 1.0, rescale="zero_star")(x, torch.ones(2)).any()
    velocity, other = torch.randn(2, 2, 3, 4, 4)
    best = fitted(other, velocity)
    torch.testing.assert_close(
        ((velocity - best) * other).flatten(1).sum(1), torch.zeros(2), rtol=0, atol=1e-5
    )
    assert torch.equal(fitted(torch.zeros_like(other), velocity), torch.zeros_like(other))


def test_jumps_of_flow_maps_are_guided_by_the_time_that_they_begin_at():
    seen = []

    def model(x, t, prompt):
        seen.append((len(x), t[0].tolist()))
        return x * prompt.tokens.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)

    x, options = torch.randn(2, 3, 4, 4), {"sampler": "flow_map", "steps": 2, "grid": "linear"}
    settings = SamplingConfig(guidance_scale=3, guidance_interval=(0.2, 0.9), **options)
    found = sample(model, text(1.0), text(0.5), settings, x, lambda step: x)
    assert seen == [(2, [1.0, 0.5]), (4, [0.5, 0.0])]
    torch.testing.assert_close(found, x * (1 - 0.5 * 1.0) * (1 - 0.5 * (0.5 + 3 * 0.5)))
    seen.clear()
    settings = SamplingConfig(guidance_scale=3, guidance_rescale="zero_star", **options)
    found = sample(model, text(1.0), text(0.5), settings, x, lambda step: x)
    assert seen == [(4, [0.5, 0.0])]
    torch.testing.assert_close(found, x * 0.5)


def test_guidance_by_the_path_needs_a_weak_pass():
    with pytest.raises(ConfigError, match="has no weak pass; use guidance: text"):
        guide(lambda x, t, prompt: x, text(1.0), text(0.0), 2.0, kind="path")(
            torch.zeros(2, 3, 4, 4), torch.ones(2)
        )
    assert (
        "guidance 3 by path drop (CFG-Zero*), "
        in SamplingConfig(guidance_scale=3, guidance="path", guidance_rescale="zero_star").in_words()
    )
