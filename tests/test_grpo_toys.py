"""The whole stage on the engine, on a toy where a reward can be learned in seconds: patterns of signs."""

import grpo_toy as toy
import pytest
import torch

from nitro_e.record import metrics
from nitro_e.sampling.flow import time_grid
from nitro_e.sampling.samplers import euler, guide

ROLLOUTS = 60
BASE = {
    "groups": 8,
    "group_size": 16,
    "updates": 2,
    "algorithm": {
        "kind": "clipped",
        "clip_low": 3e-3,
        "clip_high": 3e-3,
        "kl": {"kind": "gaussian_dt", "beta": 0.04},
    },
}
NFT = {"algorithm": {"kind": "nft"}, "rollout": {"guidance_scale": 1.0}, "updates": 1}
_pretrained: dict[int, dict] = {}


def pretrained(seed):
    if seed not in _pretrained:
        _pretrained[seed] = toy.pretrain(seed).state_dict()
    net = toy.make_net()
    net.load_state_dict(_pretrained[seed])
    return net


@torch.no_grad()
def evaluate(net, guidance_scale, count=64):
    """The reward of images of the 20-step ODE from fixed noise."""
    prompts = [prompt for prompt in toy.POOL for _ in range(count)]
    text, null = (toy.OneHot().encode(words) for words in ([p.text for p in prompts], [""] * len(prompts)))
    x = torch.randn(len(prompts), toy.DIM, 1, 1, generator=torch.Generator().manual_seed(99))
    latents = euler(guide(net, text, null, guidance_scale), x, time_grid(20))
    return toy.signs(latents, None, [prompt.info for prompt in prompts]).mean().item()


def gain(folder, seed, options, rollouts=ROLLOUTS):
    """Evaluated reward before, and how much higher it is after training: of the weights, and of their average."""
    net = pretrained(seed)
    options = {**BASE, **options} if options is NFT else toy.merged(BASE, options)
    scale, steps = options.get("rollout", {}).get("guidance_scale", 2.0), rollouts * options["updates"]
    before = evaluate(net, scale)
    trainer = toy.train(
        folder / "run", options, net, seed=seed, steps=steps, save_every=steps, log_every=steps
    )
    return before, *(evaluate(model, scale) - before for model in (net, trainer.state.ema.ema_model))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flow_grpo_learns_the_patterns(seed, tmp_path):
    before, after, average = gain(tmp_path, seed, {"rollout": {"window": {"size": 9}}})
    assert 0.42 < before < 0.58  # chance
    assert after > 0.25 and average > 0.25
    last = metrics.read(tmp_path / "run")[-1]
    assert last["kl"] < 4 and last["reward/signs/within_std"] > 0


def test_without_a_learning_rate_nothing_changes(tmp_path):
    assert gain(tmp_path, 0, {"optim": {"lr": 0.0}}, rollouts=5)[1:] == (0.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"rollout": {"window": {"size": 6}}},
        {"rollout": {"window": {"kind": "random", "size": 4, "stop": 7}}},
        {"rollout": {"window": {"size": 6}, "sde": {"kind": "ancestral"}}},
        {"cfg_grad": "cond"},
        {"algorithm": {"kl": {"kind": "velocity", "beta": 1e-3}}},
        {"advantage": {"std": "batch"}},
        {"algorithm": {"ratio_norm": True, "step_weight": "1/h"}, "rollout": {"window": {"size": 6}}},
        {"rollout": {"shared_noise": True, "window": {"size": 6}}},
        {"algorithm": {"step_weight": "noise"}},
    ],
    ids=str,
)
def test_variants_learn_too(options, seed, tmp_path):
    assert gain(tmp_path, seed, options)[1] > 0.2


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_nft_learns_the_patterns(seed, tmp_path):
    assert gain(tmp_path, seed, NFT)[1] > 0.2


def test_kl_holds_the_policy_back(tmp_path):
    """The same updates with a hundredfold beta end nearer to the reference."""
    ends = []
    for beta in (1e-4, 1e-2):
        options = {
            "algorithm": {"kl": {"kind": "velocity", "beta": beta}},
            "rollout": {"window": {"size": 6}},
        }
        gain(tmp_path / str(beta), 0, options, rollouts=20)
        ends.append(metrics.read(tmp_path / str(beta) / "run")[-1]["kl"])
    assert ends[1] < 0.8 * ends[0]
