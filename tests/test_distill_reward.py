"""Rewards beside distillation: the policy gradient against autograd of log-probabilities, advantages, and a run."""

import pytest
import torch
from distill_tools import SMALLER, Loop, distill_config, random_batch, random_text, tiny_model, tiny_stage
from test_distill_score import prompts_recipe, rng, shared
from test_distill_stage import pairs as pairs
from torch.distributions import Normal

from nitro_e.cli import train
from nitro_e.config import ConfigError
from nitro_e.record import metrics
from nitro_e.stages.distill.inputs import InputConfig, Predictor
from nitro_e.stages.distill.reward import Reward, advantages


def config():
    return distill_config("dmdr", reward={"rewards": ["shapes"]}).reward


def test_advantages_compare_images_of_one_prompt():
    scores = torch.tensor([1.0, 3.0, 5.0, 5.0, float("nan"), 2.0])
    found = advantages(scores, ["a", "a", "b", "b", "b", "c"])
    torch.testing.assert_close(found, torch.tensor([-(0.5**0.5), 0.5**0.5, 0, 0, 0, 0]), rtol=1e-3, atol=1e-4)


def test_the_slope_is_that_of_the_log_probabilities_of_the_drawn_states():
    inputs = InputConfig(sigmas=(1.0, 0.6, 0.3), noise="chain", group=2)
    batch = random_batch(0, 12, (1, 4, 4))
    model = lambda x, t, text: torch.tanh(x)  # noqa: E731
    prediction = Predictor(inputs, "multistep", seed=0)(model, batch, rng(12), last=True)
    assert batch.prompts == [batch.prompts[6 * (row // 6)] for row in range(12)]
    x, data, times = prediction.x, prediction.data.detach(), (0.6, 0.3)
    lent, seen = shared(None), []
    scores = torch.tensor([1.0, 2.0, 0.5, 0.0])
    lent.judge = lambda latents, prompts, info: seen.append(latents) or scores
    prediction.data = data.clone().requires_grad_()
    values, logs = Reward(config(), lent).loss(prediction, batch, rng(12))
    (slope,) = torch.autograd.grad(values.sum(), prediction.data)
    assert torch.equal(seen[0], data[2::3]) and logs["score"] == scores.mean()
    advantage = advantages(scores, batch.prompts[2::3])
    leaf = data.clone().requires_grad_()
    total = 0.0
    for chain in range(4):
        for step, s in enumerate(times):
            row = 3 * chain + step
            log_prob = Normal((1 - s) * leaf[row], s).log_prob(x[row + 1]).mean()
            total = total - advantage[chain] * log_prob
    (expected,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)
    assert slope[2::3].abs().max() == 0 and slope[0].abs().max() > 0


def test_the_policy_gradient_raises_the_reward():
    """Of a student of two steps whose reward is the mean of its latents, with the fake score's part switched off."""
    settings = distill_config(
        "dmdr",
        every=1,
        score=None,
        adapter=None,
        inputs={"sigmas": [1.0, 0.5], "group": 8},
        reward={"rewards": ["shapes"], "start": 0, "weight": 1.0},
        optim={"lr": 3e-3, "betas": [0.9, 0.99], "warmup": 0},
    )
    stage, scores = tiny_stage(settings, model=tiny_model(config=SMALLER)), []
    stage.shared.judge = lambda latents, prompts, info: latents.mean((1, 2, 3))
    loop = Loop(stage, 30)
    for step in range(30):
        batch = random_batch(step, 16, (4, 8, 8), prompts=["a"] * 16)
        batch.text = random_text(1).take([0] * 16)
        scores.append(loop.step(batch)["student/reward_score"].item())
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.1


def test_a_run_with_the_judge_of_the_offline_domain(pairs, tmp_path, capsys):
    path, _ = prompts_recipe(pairs, tmp_path, "dmdr")
    own = ["stage.prompts={source: shapes-train, num: 64}", "stage.reward={rewards: [shapes], start: 1}"]
    own += ["stage.adapter.rank=2", "stage.every=1", "stage.inputs.sigmas=[1.0, 0.5]", "sampling.steps=2"]
    assert train.main([str(path), *own, "engine.steps=2", "engine.save_every=2"]) == 0
    rows = metrics.read(tmp_path / "run")
    assert "reward_score" not in rows[0] and 0 <= rows[1]["reward_score"] <= 1
    assert train.main([str(path), *own, f"stage.prompts={pairs / 'prompts.txt'}"]) == 2
    assert "needs GenEval metadata" in capsys.readouterr().err
    assert train.main([str(path), *own, "batch=6"]) == 2
    assert "set batch.per_device to a multiple of 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sampler": "euler"}, "that the sampler's noise tells apart"),
        ({"inputs": {"group": 1}}, "that the sampler's noise tells apart"),
        ({"reward": {"rewards": [{"name": "shapes", "weight": 0}]}}, "none has a weight"),
        ({"reward": {"rewards": ["shapes", {"name": "clipscore", "weight": 0}]}}, "'clipscore' has weight 0"),
        ({"reward": {"rewards": [{"name": "shapes", "transform": "rank"}]}}, "'shapes' has transform 'rank'"),
    ],
)
def test_rewards_that_cannot_be_learned_from_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        distill_config("dmdr", **{"reward": {"rewards": ["shapes"]}, **overrides})
