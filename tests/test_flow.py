"""Rectified flow against closed forms."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from nitro_e.config import ConfigError
from nitro_e.sampling import flow
from nitro_e.sampling.flow import TimestepConfig, WeightConfig, time_grid, training_times


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


@pytest.mark.parametrize(
    "config, density",
    [
        # arXiv 2403.03206, eq. 19 and 21: the densities as printed there
        (TimestepConfig(mean=0.4, std=0.8), lambda t: math.exp(-((math.log(t / (1 - t)) - 0.4) ** 2) / 1.28) / (0.8 * math.sqrt(2 * math.pi) * t * (1 - t))),
        (TimestepConfig(kind="cosmap"), lambda t: 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)),
        (TimestepConfig(kind="uniform"), lambda t: 1.0),
        (TimestepConfig(kind="mode", scale=0.0), lambda t: 1.0),
    ],
)  # fmt: skip
def test_training_times_have_the_density_of_the_paper(config, density):
    """Sorted draws of a fine grid of quantiles against the integral of the density."""
    normal = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    t = training_times(config, normal).sort().values
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    integral = torch.tensor([density(x) for x in grid.tolist()], dtype=torch.float64).cumsum(0) / 4000
    below = torch.searchsorted(t, grid + 0.5 / 4000) / 20_000
    assert (below - integral).abs().max() < 2e-3


def test_the_mode_law_prefers_the_middle_or_the_ends():
    """Its density at t = f(u) is |df/du|^-1 (arXiv 2403.03206, eq. 20): 1 / (1 + s - s pi / 2) in the middle."""
    normal = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    for scale in (-1.0, 0.5, 1.0, 1.75):
        t = training_times(TimestepConfig(kind="mode", scale=scale), normal)
        assert (t.diff() < 0).all() and 0 <= t.min() and t.max() <= 1  # falling in u, over all of 0..1
        share = ((t - 0.5).abs() < 0.002).double().mean().item() / 0.004
        middle = 1 / (1 + scale - scale * math.pi / 2)
        assert scale > 1.5 or abs(share / middle - 1) < 0.02  # at 1.75 it is a peak of no width
    with pytest.raises(ConfigError, match="scale"):
        TimestepConfig(kind="mode", scale=1.76)


def test_loss_weights_are_those_of_the_papers_for_other_targets():
    """Min-SNR weighs the x0 error, the sigmoid the noise error; both are rewritten for the velocity error."""
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    snr = ((1 - t) / t).square()
    generator = torch.Generator().manual_seed(0)
    data, noise, velocity = torch.randn(3, 49, 5, dtype=torch.float64, generator=generator)
    x = flow.interpolate(data, noise, t)

    def squared(a, b):
        return (a - b).square().mean(dim=1)

    of_velocity = squared(velocity, flow.velocity_target(data, noise))
    of_data = squared(flow.to_data(x, t, velocity), data)
    of_noise = squared(flow.to_noise(x, t, velocity), noise)
    min_snr = flow.loss_weight(WeightConfig(kind="min_snr", gamma=5.0), t)
    torch.testing.assert_close(min_snr * of_velocity, snr.clamp(max=5) * of_data)
    for bias in (-3.0, 0.0, 2.0):
        sigmoid = flow.loss_weight(WeightConfig(kind="sigmoid", bias=bias), t)
        step = 1e-6
        slope = (2 * torch.log((1 - t - step) / (t + step)) - torch.log(snr)) / step  # of log SNR by t
        expected = -slope * torch.sigmoid(bias - torch.log(snr)) * of_noise
        torch.testing.assert_close(sigmoid * of_velocity, expected, rtol=1e-4, atol=0)
    assert flow.loss_weight(WeightConfig(), t).eq(1).all()
