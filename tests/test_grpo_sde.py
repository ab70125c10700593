"""The samplers' coefficient table against closed forms, diffusers, and the marginals they promise."""

import pytest
import torch
from torch.distributions import Normal

from nitro_e.config import ConfigError
from nitro_e.sampling.flow import time_grid
from nitro_e.sampling.samplers import euler
from nitro_e.stages.grpo.rollout import sample_trajectory
from nitro_e.stages.grpo.sde import Schedule, SDEConfig, Window, WindowConfig, log_prob, transitions

KINDS = {"flow": 0.7, "dance": 0.3, "cps": 0.8, "ancestral": 0.8}


def gaussian_velocity(t, sigma=1.0):
    """v = gain * x is exact for data N(0, sigma^2): E[noise - data | x] (t in float64)."""
    return (t - (1 - t) * sigma**2) / ((1 - t) ** 2 * sigma**2 + t**2)


def final_variance(kind, steps, noise=0.0, sigma=1.0, grid="released"):
    """Of the final sample over that of the data: every step is linear in x. The last step is the ODE's."""
    times = time_grid(steps, grid)
    table, ode = (transitions(k, times, noise) for k in (kind, "ode"))
    variance = 1.0
    for i in range(steps):
        row = ode if i == steps - 1 and kind != "ode" else table
        t, x, v, std = (float(values[i]) for values in (row.t, row.x_coef, row.v_coef, row.std))
        variance = (x + v * gaussian_velocity(t, sigma)) ** 2 * variance + std**2
    return variance / sigma**2


def test_released_grid_is_that_of_diffusers_with_a_last_step_that_is_never_random():
    from diffusers import FlowMatchEulerDiscreteScheduler

    for steps, trainable in ((10, 9), (20, 19)):
        scheduler = FlowMatchEulerDiscreteScheduler(1000)
        scheduler.set_timesteps(steps)
        assert torch.allclose(time_grid(steps), scheduler.sigmas, rtol=0, atol=1e-7)
        schedule = Schedule(time_grid(steps), SDEConfig(), WindowConfig(kind="random", size=1))
        assert schedule.stop == trainable
        ancestral = Schedule(time_grid(steps), SDEConfig(kind="ancestral"), WindowConfig(size=1))
        assert ancestral.stop == trainable - 1  # its last real step has a std of 5e-4


def test_ode_rollout_is_diffusers_euler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    weight = torch.randn(3, 3)

    def velocity(x, t):
        return torch.einsum("ij,bjhw->bihw", weight, x) * t[:, None, None, None].cos()

    x = torch.randn(2, 3, 4, 4)
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    scheduler.set_timesteps(10)
    other = x
    for t in scheduler.timesteps:
        other = scheduler.step(velocity(other, (t / 1000).expand(2)), t, other).prev_sample
    schedule = Schedule(time_grid(10), SDEConfig(), WindowConfig())
    ours = sample_trajectory(velocity, x, schedule, Window(0, 0), torch.randn).latents
    assert torch.allclose(ours, other, rtol=0, atol=1e-5 * other.abs().max())
    assert torch.allclose(ours, euler(velocity, x, time_grid(10)), rtol=1e-6, atol=1e-6)


def test_flow_tends_to_the_ode_as_its_noise_goes_to_zero():
    ode, almost = transitions("ode", time_grid(10)), transitions("flow", time_grid(10), 1e-4)
    for a, b in zip(ode, almost):
        assert torch.allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "kind, noise, steps, expected",
    [
        ("ode", 0.0, 10, 0.751),
        ("flow", 0.7, 10, 0.921),
        ("flow", 0.4, 10, 0.818),
        ("dance", 0.3, 10, 0.767),
        ("cps", 0.8, 10, 0.512),
        ("ancestral", 0.495, 10, 0.729),
        ("ode", 0.0, 20, 0.874),
        ("flow", 0.7, 20, 0.976),
        ("cps", 0.8, 20, 0.576),
        ("ancestral", 0.495, 20, 0.857),
        ("flow", 0.7, 200, 1.009),
        ("cps", 0.8, 200, 0.642),
        ("ancestral", 0.495, 200, 0.985),
    ],
)
def test_variance_of_gaussian_data(kind, noise, steps, expected):
    """Values of an independent numpy computation."""
    assert final_variance(kind, steps, noise) == pytest.approx(expected, abs=1.5e-3)


def test_marginals_are_kept_in_the_limit_by_all_but_cps():
    for sigma in (1.0, 0.5):
        for kind, noise in (("flow", 0.7), ("dance", 0.3), ("ancestral", 0.495)):
            assert final_variance(kind, 1000, noise, sigma) == pytest.approx(1, abs=0.012), (kind, sigma)
    assert final_variance("cps", 1000, 0.8) < 0.8  # it keeps coefficients, not marginals


@pytest.mark.slow
def test_two_peaks_keep_their_shape():
    """Wasserstein-1 distance to a mixture of N(+-1, .3^2) after 500 steps."""
    generator = torch.Generator().manual_seed(0)
    count, std = 200_000, 0.3
    signs = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
    data = signs + std * torch.randn(count, generator=generator)

    def velocity(x, t):
        t = t[0].double()
        variance = (1 - t) ** 2 * std**2 + t**2
        gains = [torch.exp(-((x.double() - (1 - t) * m) ** 2) / (2 * variance)) for m in (1, -1)]
        weight = gains[0] / (gains[0] + gains[1])
        mean = 2 * weight - 1  # of the peak, given x
        noise = t * (x - (1 - t) * mean) / variance
        data = mean + (1 - t) * std**2 * (x - (1 - t) * mean) / variance
        return (noise - data).float()

    distances = {}
    for kind, noise in (("flow", 0.7), ("dance", 0.3), ("ancestral", 0.495), ("cps", 0.8)):
        schedule = Schedule(time_grid(500), SDEConfig(kind=kind, noise=noise), WindowConfig(size=1))
        x = torch.randn(count, 1, 1, 1, generator=generator)
        end = sample_trajectory(
            velocity,
            x,
            schedule,
            Window(0, schedule.stop),
            lambda *shape: torch.randn(count, *shape, generator=generator),
        ).latents.flatten()
        distances[kind] = (end.sort().values - data.sort().values).abs().mean().item()
    assert max(distances[kind] for kind in ("flow", "dance", "ancestral")) <= 0.02, distances
    assert distances["cps"] > 0.03, distances


def test_ancestral_and_flow_are_the_same_sde():
    """rho^2 / h -> 2 eta^2 t / (1 - t) = g^2 for eta = a / sqrt(2)."""
    a, h = 0.7, 1e-4
    for t in (0.9, 0.5, 0.1):
        times = torch.tensor([t, t - h], dtype=torch.float64)
        flow, ancestral = transitions("flow", times, a), transitions("ancestral", times, a / 2**0.5)
        assert (ancestral.std / flow.std).square().item() == pytest.approx(1, abs=3e-3)
        assert (ancestral.v_coef - flow.v_coef).abs().item() < 1e-4 * h**0.5
        assert (ancestral.x_coef - flow.x_coef).abs().item() < 1e-4 * h**0.5


def test_numbers_of_flow_grpo():
    """Flow, a = .7, 10 steps: std and kappa of steps 0, 1, 3, 5, 7, 8; the rule for t = 1."""
    table = transitions("flow", time_grid(10), 0.7)
    index = torch.tensor([0, 1, 3, 5, 7, 8])
    assert torch.allclose(
        table.std[index], torch.tensor([0.700, 0.660, 0.330, 0.209, 0.125, 0.083]), atol=6e-4
    )
    assert torch.allclose(
        -table.v_coef[index], torch.tensor([0.111, 0.138, 0.138, 0.138, 0.138, 0.138]), atol=6e-4
    )
    assert table.x_coef[0] == pytest.approx(1 - 0.49 / 2)
    exact = torch.tensor([0.013, 0.022, 0.088, 0.219, 0.612, 1.39])
    assert torch.allclose(table.gaussian_kl[index], exact, rtol=0.05)
    ancestral = transitions("ancestral", time_grid(10), 0.495)
    assert torch.allclose(
        ancestral.std[torch.tensor([0, 1, 3, 5, 7])],
        torch.tensor([0.440, 0.346, 0.215, 0.129, 0.050]),
        atol=6e-4,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps, shift", [(10, 1.0), (20, 1.0), (10, 3.0)])
def test_trained_steps_have_finite_positive_noise(kind, steps, shift):
    schedule = Schedule(
        time_grid(steps, shift=shift), SDEConfig(kind=kind), WindowConfig(kind="random", size=3)
    )
    for values in schedule.sde:
        assert values[: schedule.stop].isfinite().all()
    assert (schedule.sde.std[: schedule.stop] > 1e-3).all()
    assert (schedule.sde.v_coef[: schedule.stop] < 0).all()  # every step moves against the velocity


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawn_step_has_the_mean_std_and_density_of_the_table(kind):
    schedule = Schedule(time_grid(10), SDEConfig(kind=kind), WindowConfig(kind="fixed", size=1, start=2))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 4, 8, 8, generator=generator)
    velocity = torch.randn(64, 4, 8, 8, generator=generator)
    drawn = sample_trajectory(
        lambda x, t: velocity,
        x,
        schedule,
        Window(2, 3),
        lambda *shape: torch.randn(64, *shape, generator=generator),
    )
    start, end = drawn.states
    row = schedule.sde.at(torch.full((64,), 2))
    mean, std = row.mean(start, velocity), row.std.flatten()[0]
    assert (end - mean).std().item() == pytest.approx(std.item(), rel=0.02)
    density = Normal(mean, std.expand_as(mean)).log_prob(end).flatten(1).mean(dim=1)
    assert torch.allclose(log_prob(end, mean, row.std), density, rtol=0, atol=1e-6)
    assert torch.equal(drawn.log_probs[0], log_prob(end, mean, row.std))
    assert len(drawn.states) == 2


def test_windows():
    def windows(**options):
        schedule = Schedule(time_grid(10), SDEConfig(), WindowConfig(**options))
        return [schedule.window_of(3, rollout)[0] for rollout in range(40)]

    assert set(windows(kind="fixed", size=4, start=2)) == {2}
    assert set(windows(kind="random", size=3, stop=5)) == {0, 1, 2}
    assert windows(kind="slide", size=4, every=5)[:32] == [i // 5 % 6 for i in range(32)]
    with pytest.raises(ConfigError, match="does not fit"):
        windows(size=10)
    with pytest.raises(ConfigError, match="does not fit"):
        WindowConfig(size=6, stop=5)
    with pytest.raises(ConfigError, match="noise"):
        SDEConfig(noise=0.0)
