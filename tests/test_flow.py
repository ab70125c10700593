"""Rectified flow against closed forms."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from nitro_e.config import ConfigError
from nitro_e.sampling import flow
from nitro_e.sampling.flow import TimestepConfig, time_grid, training_times


def test_path_and_its_derivative():
    data, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.2, 0.9], dtype=torch.float64)
    x, target = flow.interpolate(data, noise, t), flow.velocity_target(data, noise)
    assert torch.equal(flow.interpolate(data, noise, torch.zeros(2)), data)
    assert torch.equal(flow.interpolate(data, noise, torch.ones(2)), noise)
    slope = (flow.interpolate(data, noise, t + 1e-6) - x) / 1e-6
    torch.testing.assert_close(slope, target, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_released_grid_is_that_of_diffusers(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    scheduler.set_timesteps(steps)
    if steps == 1:  # linspace(1000, 1, 1) is just the start
        assert time_grid(1).tolist() == [1.0, 0.0]
    torch.testing.assert_close(time_grid(steps), scheduler.sigmas, rtol=1e-6, atol=1e-7)


def test_linear_grid_and_shift():
    assert time_grid(4, "linear").tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    shifted = time_grid(4, "linear", shift=3.0)
    torch.testing.assert_close(shifted, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    with pytest.raises(ConfigError):
        time_grid(0)


def test_training_times_have_the_stated_distribution():
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    t = training_times(TimestepConfig(mean=0.5, std=2.0), normal)
    logit = torch.log(t.double() / (1 - t.double()))
    assert abs(logit.median().item() - 0.5) < 0.03
    uniform = training_times(TimestepConfig(kind="uniform"), normal)
    assert abs(uniform.mean().item() - 0.5) < 3e-3 and abs(uniform.var().item() - 1 / 12) < 1e-3
    quantized = training_times(TimestepConfig(quantize=True), normal) * 1000
    torch.testing.assert_close(quantized, quantized.round(), atol=1e-3, rtol=0)
    assert quantized.min() >= 1 and quantized.max() <= 1000
    below = (training_times(TimestepConfig(), normal) < 0.25).double().mean().item()
    assert abs(below - 0.5 * (1 + math.erf(math.log(1 / 3) / math.sqrt(2)))) < 4e-3


def test_velocity_data_and_noise_give_each_other():
    """U1 of the distillation plan: the round trip at every time, t = 1 (pure noise) and t = 0 included."""
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64, generator=generator)
    t = torch.tensor([0.0, 0.01, 0.3, 0.75, 0.999, 1.0], dtype=torch.float64)
    x, velocity = flow.interpolate(data, noise, t), flow.velocity_target(data, noise)
    torch.testing.assert_close(flow.to_data(x, t, velocity), data, rtol=0, atol=1e-12)
    torch.testing.assert_close(flow.to_noise(x, t, velocity), noise, rtol=0, atol=1e-12)
    # Any velocity, not only a true one: the two ends lie on a straight line through x, velocity apart.
    velocity = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=generator)
    start, end = flow.to_data(x, t, velocity), flow.to_noise(x, t, velocity)
    torch.testing.assert_close(flow.interpolate(start, end, t), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(end - start, velocity, rtol=0, atol=1e-12)
