"""Objectives and advantages against closed forms, REINFORCE, finite differences and hand-worked examples."""

import dataclasses

import grpo_toy as toy
import numpy as np
import pytest
import torch
from test_grpo_sde import gaussian_velocity

from nitro_e.config import ConfigError
from nitro_e.sampling.flow import time_grid
from nitro_e.sampling.samplers import guided_velocity
from nitro_e.stages.grpo.advantage import AdvantageConfig, advantages, score_statistics
from nitro_e.stages.grpo.clipped import clipped_objective, log_ratio, step_weights
from nitro_e.stages.grpo.kl import convert_beta, kl_coefficients
from nitro_e.stages.grpo.nft import nft_loss
from nitro_e.stages.grpo.rollout import sample_trajectory
from nitro_e.stages.grpo.sde import Schedule, SDEConfig, Window, WindowConfig, per_sample, transitions

NAN = float("nan")


# ---- the policy gradient


def chain_gradient(schedule: Schedule, window: Window) -> float:
    """dE[x_final] / dtheta of v = v*(x) + theta, moving the means of the window's steps only.

    All steps are linear: a push c_i of step i is multiplied by the slopes m_j of the later ones.
    """
    rows = [schedule.sde if window[0] <= i < window[1] else schedule.ode for i in range(schedule.num)]
    gains = [gaussian_velocity(t) for t in schedule.ode.t.double()]
    slopes = [row.x_coef[i] + row.v_coef[i] * gains[i] for i, row in enumerate(rows)]
    total = 0.0
    for i in range(window[0], window[1]):
        push = rows[i].v_coef[i].double()
        for slope in slopes[i + 1 :]:
            push = push * slope
        total += float(push)
    return total


CHAINS = {
    "flow, all nine": (SDEConfig(), WindowConfig(size=9), -1.2242),
    "flow, window": (SDEConfig(), WindowConfig(size=5), -0.6464),
    "ancestral": (SDEConfig(kind="ancestral", noise=0.495), WindowConfig(size=7), -0.9394),
}


@pytest.mark.parametrize("name", CHAINS)
def test_policy_gradient_of_a_linear_chain(name):
    """The loss's gradient, times -D and the number of steps, is the derivative of the expected reward."""
    sde, window_config, expected = CHAINS[name]
    schedule = Schedule(time_grid(10), sde, window_config)
    window = schedule.window_of(0, 0)
    assert chain_gradient(schedule, window) == pytest.approx(expected, abs=1e-4)

    count, generator = 100_000, torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, 1, 1, generator=generator)
    theta = torch.zeros((), requires_grad=True)
    with torch.no_grad():
        drawn = sample_trajectory(
            lambda x, t: gaussian_velocity(t[0]) * x,
            x,
            schedule,
            window,
            lambda *shape: torch.randn(count, *shape, generator=generator),
        )
    rewards = drawn.latents.flatten()
    advantage = rewards - rewards.mean()
    per_image = torch.zeros(count)
    for i in range(window.first, window.stop):
        row = schedule.sde.at(torch.tensor([i]))
        start, end = drawn.states[i - window.first], drawn.states[i - window.first + 1]
        mean = row.mean(start, gaussian_velocity(row.t[0]) * start + theta)
        ratio = log_ratio(end, mean, mean.detach(), row.std, False).exp()
        loss = clipped_objective(ratio, advantage, 1e-4, 1e-4).mean()
        (gradient,) = torch.autograd.grad(loss, theta)
        # REINFORCE on the same samples: A * d log N(end; mean, std) / d theta
        score = advantage * ((end - mean.detach()) / row.std**2 * row.v_coef).flatten()
        assert -gradient.item() == pytest.approx(score.mean().item(), rel=1e-4, abs=1e-5)
        per_image += score
    error = per_image.std().item() / count**0.5
    assert per_image.mean().item() == pytest.approx(expected, abs=4 * error)


def test_loss_gradient_is_reinforce_over_dimensions():
    """In D dimensions the gradient is the D-th part: log-probabilities are means."""
    torch.manual_seed(0)
    weight = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    x, end, advantage = torch.randn(5, 6).double(), torch.randn(5, 6).double(), torch.randn(5).double()
    std = torch.full((5, 1), 0.3).double()
    mean = 0.9 * x - 0.1 * x @ weight
    normal = torch.distributions.Normal(mean, std)
    reinforce = torch.autograd.grad((advantage * normal.log_prob(end).sum(dim=1)).mean(), weight)[0]
    mean = 0.9 * x - 0.1 * x @ weight
    change = (per_sample(-((end - mean) / std).square() / 2)) - per_sample(
        -((end - mean.detach()) / std).square() / 2
    )
    loss = clipped_objective(change.exp(), advantage, 1e-4, 1e-4).mean()
    ours = torch.autograd.grad(loss, weight)[0]
    assert torch.allclose(-6 * ours, reinforce, rtol=1e-5)


# ---- clipping, ratios, KL


@pytest.mark.parametrize(
    "advantage, ratio, value, moves",
    [
        (1.0, 1.0, -1.0, True),
        (1.0, 1.05, -1.05, True),
        (1.0, 1.3, -1.2, False),
        (1.0, 0.5, -0.5, True),
        (-1.0, 1.0, 1.0, True),
        (-1.0, 1.3, 1.3, True),
        (-1.0, 0.95, 0.95, True),
        (-1.0, 0.5, 0.9, False),
        (0.0, 2.0, 0.0, False),
    ],
)
def test_clipping(advantage, ratio, value, moves):
    """Clipped at 0.9 and 1.2; outside, the gradient stops exactly where going on would pay."""
    r = torch.tensor([ratio], requires_grad=True)
    objective = clipped_objective(r, torch.tensor([advantage]), 0.1, 0.2)
    assert objective.item() == pytest.approx(value)
    (gradient,) = torch.autograd.grad(objective.sum(), r)
    assert gradient.item() == pytest.approx(-advantage if moves else 0.0)


def test_ratio_norm_is_the_log_ratio_without_its_bias_times_std():
    torch.manual_seed(0)
    old, change = torch.randn(3, 2, 4, 4), 0.01 * torch.randn(3, 2, 4, 4)
    std = torch.tensor([0.7, 0.3, 0.1]).view(3, 1, 1, 1)
    end, mean = old + std * torch.randn_like(old), old + change
    plain = log_ratio(end, mean, old, std, False)
    normed = log_ratio(end, mean, old, std, True)
    bias = per_sample(change.square()) / (2 * std.flatten().square())
    assert torch.allclose(normed, (plain + bias) * std.flatten(), atol=1e-6)
    assert torch.equal(log_ratio(end, old, old, std, True), torch.zeros(3))
    assert torch.equal(log_ratio(end, old, old, std, False), torch.zeros(3))


@pytest.mark.parametrize("kind", ["flow", "ancestral", "dance", "cps"])
def test_kl_coefficients_are_those_of_the_transition_kernels(kind):
    torch.manual_seed(0)
    table = transitions(kind, time_grid(10), 0.5)
    x, a, b = (torch.randn(1, 2, 4, 4) for _ in range(3))
    for i in range(7):
        row = table.at(torch.tensor([i]))
        one, other = (torch.distributions.Normal(row.mean(x, v), row.std.expand_as(x)) for v in (a, b))
        exact = torch.distributions.kl_divergence(one, other).mean()
        difference = (a - b).square().mean()
        gaussian = kl_coefficients("gaussian", table)[i]
        assert torch.allclose(gaussian * difference, exact, rtol=1e-4)
        assert kl_coefficients("gaussian_dt", table)[i] == pytest.approx((gaussian * table.h[i]).item())


def test_beta_is_converted_between_kinds():
    """Flow-GRPO's 0.04 over 9 steps of 10, and over the first six; over 19 of 20."""

    def convert(source, target, steps, num=10):
        table = transitions("flow", time_grid(num), 0.7)
        return convert_beta(0.04, source, target, table, range(steps))

    assert convert("gaussian_dt", "gaussian", 9) == pytest.approx(0.0044, rel=0.02)
    assert convert("gaussian_dt", "velocity", 9) == pytest.approx(1.4e-3, rel=0.02)
    assert convert("gaussian_dt", "velocity", 6) == pytest.approx(3.9e-4, rel=0.02)
    assert convert("gaussian_dt", "velocity", 19, num=20) == pytest.approx(4.4e-4, rel=0.02)
    config = toy.make_config(
        algorithm={"kind": "clipped", "kl": {"kind": "velocity", "units": "gaussian_dt", "beta": 0.04}},
        rollout={"window": {"size": 6}},
    )
    assert config.algorithm.kl.weight(config.schedule()) == pytest.approx(3.9e-4, rel=0.02)


def test_step_weights_have_mean_one_over_the_trained_steps_or_are_guards():
    table = transitions("flow", time_grid(10), 0.7)
    assert torch.equal(step_weights("1/h", table, range(2, 8)), 1 / table.h)  # as it is: 9 on ten steps
    for kind, like in (("none", torch.ones(10)), ("noise", table.std)):
        weights = step_weights(kind, table, range(2, 8))
        assert weights[2:8].mean().item() == pytest.approx(1)
        assert torch.allclose(weights / weights[2], like / like[2])


def test_nft_loss_pulls_towards_good_images_and_away_from_bad_ones():
    """At v = old the gradient is (1 - 2 r) times the flow-matching gradient's direction; r = 1/2 has none."""
    torch.manual_seed(0)
    data, noise, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.full((4,), 0.6)
    x = 0.4 * data + 0.6 * noise
    old = torch.randn(4, 3, 2, 2)
    for beta in (1.0, 0.1):
        velocity = old.clone().requires_grad_()
        optimality = torch.tensor([1.0, 0.75, 0.5, 0.0])
        nft_loss(data, x, t, velocity, old, optimality, beta).sum().backward()
        gradient, towards = velocity.grad.flatten(1), (noise - data - old).flatten(1)
        cosine = torch.cosine_similarity(-gradient, towards)
        assert torch.allclose(cosine[[0, 1, 3]], torch.tensor([1.0, 1.0, -1.0]), atol=1e-4)
        assert gradient[2].abs().max() < 1e-6
        assert gradient[1].norm() / gradient[0].norm() < 0.8
    # the loss of a perfect positive velocity, at optimality 1, is zero
    assert nft_loss(data, x, t, noise - data, old, torch.ones(4), 1.0).abs().max() < 1e-5


# ---- guidance


def linear_model(weight):
    return lambda x, t, text: x * weight + text.tokens.mean(dim=(1, 2))[:, None, None, None] * weight.square()


def test_guided_velocity_and_its_gradient():
    torch.manual_seed(0)
    x, t = torch.randn(3, 2, 4, 4), torch.rand(3)
    text, null = toy.OneHot().encode(["prompt 0", "prompt 1", "prompt 3"]), toy.OneHot().encode([""])

    def value(weight, gradient, scale=3.0):
        model = linear_model(weight)
        return guided_velocity(model, x, t, text, null, scale, gradient, bare=model)

    weight = torch.tensor(0.7, requires_grad=True)
    assert torch.equal(value(weight, "both", 1.0).velocity, linear_model(weight)(x, t, text))
    both, cond = value(weight, "both"), value(weight, "cond")
    assert torch.allclose(both.velocity, cond.velocity, atol=1e-6)
    assert torch.allclose(both.unconditional, cond.unconditional) and not cond.unconditional.requires_grad
    exact = torch.autograd.grad(both.velocity.sum(), weight)[0].item()
    step = 1e-2
    finite = [value(torch.tensor(0.7 + s), "both").velocity.double().sum() for s in (step, -step)]
    assert exact == pytest.approx(((finite[0] - finite[1]) / (2 * step)).item(), rel=1e-3)
    detached = torch.autograd.grad(cond.velocity.sum(), weight)[0].item()
    alone = torch.autograd.grad(linear_model(weight)(x, t, text).sum(), weight)[0].item()
    assert detached == pytest.approx(3.0 * alone, rel=1e-5) and abs(detached - exact) > 1e-2


# ---- advantages


def one(scores, std, clip=5.0):
    return advantages(torch.tensor(scores)[..., None], torch.ones(1), AdvantageConfig(std=std, clip=clip))


def test_advantages_by_hand():
    scores = [[0.0, 1.0], [0.0, 4.0]]  # differences -.5 .5 -2 2
    group = [[-0.5 / 0.5001, 0.5 / 0.5001], [-2 / 2.0001, 2 / 2.0001]]
    assert torch.allclose(one(scores, "group"), torch.tensor(group).double())
    rms = ((0.25 * 2 + 4 * 2) / 4) ** 0.5
    within = [[-0.5 / (rms + 1e-4), 0.5 / (rms + 1e-4)], [-2 / (rms + 1e-4), 2 / (rms + 1e-4)]]
    assert torch.allclose(one(scores, "within"), torch.tensor(within).double())
    spread = torch.tensor([0.0, 1.0, 0.0, 4.0]).std(unbiased=False).item() + 1e-4
    batch = [[-0.5 / spread, 0.5 / spread], [-2 / spread, 2 / spread]]
    assert torch.allclose(one(scores, "batch"), torch.tensor(batch).double())
    assert one([[0.0, 0.0, 0.0, 9.0]], "within", clip=1.5).max() == 1.5


@pytest.mark.parametrize("std", ["within", "batch", "group"])
def test_advantages_of_missing_and_equal_scores(std):
    scores = [[1.0, 2.0, NAN, 3.0], [NAN, 5.0, NAN, NAN], [2.0, 2.0, 2.0, 2.0]]
    result = one(scores, std)
    assert result.isfinite().all()
    assert result[0, 2] == 0 and (result[1] == 0).all()  # not scored; alone in its group
    assert (result[2] == 0).all()  # all equal
    assert result[0, 0] == -result[0, 3] and result[0, 1] == 0
    with_others = one([[1.0, 2.0, 3.0]], std)
    if std == "group":  # a missing score changes nothing for the others
        assert torch.allclose(result[0, [0, 1, 3]], with_others[0])
    mixed = torch.tensor(scores)[:, torch.tensor([2, 0, 3, 1])]
    assert torch.allclose(one(mixed.tolist(), std), result[:, torch.tensor([2, 0, 3, 1])])


def gardo(rewards: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The shaping of GARDO's code (stat_tracking.py), written out: rewards (K,) and features (K, D) of one prompt."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    apart = 1 - np.dot(unit, unit.T).clip(-1, 1)
    nearest = np.array([min(apart[i][j] for j in range(len(apart)) if j != i) for i in range(len(apart))])
    above = rewards - rewards.mean()
    return above * np.where(above < 0, 1.0, nearest / nearest.mean())


def test_diversity_scales_advantages_as_gardos_code_does():
    """The authors leave the deviation out, so that ours is theirs times one number; the clip comes last."""
    rng = np.random.default_rng(0)
    rewards, features = rng.normal(size=(5, 8)), rng.normal(size=(5, 8, 6))
    scores, config = torch.from_numpy(rewards)[..., None], AdvantageConfig(diversity=True, clip=100)
    ours = advantages(scores, torch.ones(1), config, torch.from_numpy(features)).numpy()
    theirs = np.stack([gardo(*each) for each in zip(rewards, features)])
    deviation = np.sqrt(((rewards - rewards.mean(1, keepdims=True)) ** 2).mean()) + 1e-4
    np.testing.assert_allclose(ours * deviation, theirs, atol=1e-9)
    clipped = advantages(
        scores, torch.ones(1), dataclasses.replace(config, clip=0.5), torch.from_numpy(features)
    )
    np.testing.assert_allclose(clipped, ours.clip(-0.5, 0.5))
    # off: as without features; equal images: nothing to choose by
    plain = advantages(scores, torch.ones(1), AdvantageConfig(clip=100))
    assert torch.equal(
        advantages(scores, torch.ones(1), AdvantageConfig(clip=100), torch.from_numpy(features)), plain
    )
    assert torch.equal(advantages(scores, torch.ones(1), config, torch.ones(5, 8, 6)), plain)
    # an image without features, which has no score either, changes nothing for the others of its group
    features[0, 0], rewards[0, 0] = np.nan, np.nan
    rest = advantages(scores[:1, 1:], torch.ones(1), config, torch.from_numpy(features[:1, 1:]))
    ours = advantages(scores[:1], torch.ones(1), config, torch.from_numpy(features[:1]))
    assert ours[0, 0] == 0 and torch.allclose(ours[:, 1:], rest)


def test_several_rewards_weigh_alike_whatever_their_scale():
    torch.manual_seed(0)
    big, small = torch.randn(6, 8) * 100, torch.randn(6, 8) * 0.01
    scores = torch.stack([big, small, torch.full_like(big, NAN)], dim=-1)
    result = advantages(scores, torch.tensor([1.0, 1.0, 0.0]), AdvantageConfig())
    parts = [one(part.tolist(), "within") for part in (big, small)]
    assert result.square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)
    correlations = [torch.corrcoef(torch.stack([result.flatten(), part.flatten()]))[0, 1] for part in parts]
    assert abs(correlations[0] - correlations[1]) < 0.02
    half = advantages(scores, torch.tensor([1.0, 0.0, 0.0]), AdvantageConfig())
    assert torch.allclose(half, parts[0])  # weight 0: monitored only


def test_score_statistics():
    scores = torch.tensor([[[1.0, 5.0], [3.0, NAN]], [[2.0, NAN], [2.0, NAN]]])
    asked, weights = torch.ones(2, 2, dtype=torch.bool), torch.tensor([1.0, 0.0])
    logs = score_statistics(scores, ("a", "b"), weights, asked)
    assert logs["reward/a"] == 2 and logs["reward/a/within_std"] == 0.5 and logs["reward/a/invalid"] == 0
    assert logs["reward/b"] == 5 and logs["reward/b/invalid"] == 0.75
    assert "reward/b/within_std" not in logs  # no group has two scores
    assert logs["zero_std_ratio"] == 0.5  # the second group, by the trained reward alone


def test_score_statistics_of_mixed_prompts():
    """The reward is not asked about the second group: its images are neither invalid nor equal."""
    scores = torch.tensor([[1.0, 3.0, NAN, NAN], [NAN] * 4, [0.0, 4.0, 0.0, 4.0]])[..., None]
    logs = score_statistics(scores, ("a",), torch.ones(1), torch.tensor([[True], [False], [True]]))
    assert logs["reward/a/invalid"] == 0.25 and logs["reward/a/within_std"] == 1.5
    assert logs["zero_std_ratio"].item() == pytest.approx(1 / 3)  # it teaches nothing
    nothing = score_statistics(scores[1:2], ("a",), torch.ones(1), torch.tensor([[False]]))
    assert nothing == {"zero_std_ratio": 1}


def test_bad_configs():
    for options, message in [
        ({"group_size": 1}, "group_size"),
        ({"rewards": [{"name": "grpo_toy:signs", "weight": 0}]}, "none has a weight"),
        ({"algorithm": {"kind": "nft", "times": 20}}, "times"),
        ({"rollout": {"window": {"size": 20}}}, "window"),
        ({"algorithm": {"kind": "nft", "kl": {"kind": "gaussian"}}}, "velocity"),
        ({"algorithm": {"kind": "clipped", "clip_low": 0.0}}, "clip"),
    ]:
        with pytest.raises(ConfigError, match=message):
            toy.make_config(**options)
    with pytest.raises(ConfigError, match="stage.updates"):
        toy.make_config(updates=3).layout(1, 1)
    with pytest.raises(ConfigError, match="processes"):
        toy.make_config(updates=1).layout(5, 1)
    with pytest.raises(ConfigError, match="accumulate"):
        toy.make_config(updates=1).layout(1, 7)
