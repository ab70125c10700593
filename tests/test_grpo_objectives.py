"""What objectives share besides the clipped one: AWM, chosen clip ranges, the KL's reference and gate, branching, solvers."""

import functools
import math

import grpo_toy as toy
import pytest
import torch
from test_grpo_stage import gradient, guided, loss_of, merged, micro_batches, move, trained

from nitro_e.config import ConfigError
from nitro_e.record import metrics, run_folder
from nitro_e.sampling import samplers
from nitro_e.stages.grpo.clipped import ClippedConfig
from nitro_e.stages.grpo.kl import doubtful
from nitro_e.stages.grpo.sde import Window

AWM = {"kind": "awm", "times": 3}
REWARDS = [
    {"name": "grpo_toy:signs", "label": "signs"},
    {"name": "grpo_toy:brightness", "label": "brightness", "weight": 0},
]


# ---- AWM


@pytest.mark.parametrize("weighting", ["uniform", "t", "t2", "huber"])
def test_awm_is_its_formula(weighting):
    """Of a second update, from the definitions: l = -w(t) mean |v - (noise - x0)|^2, the same noise for old and new."""
    algorithm = {**AWM, "weighting": weighting, "clip_low": 0.5, "clip_high": 0.5, "average_weight": 0.3}
    stage = toy.make_stage(algorithm=algorithm)
    first, rows = micro_batches(stage, 2)
    assert loss_of(stage, first)[1]["ratio_error"] == 0 and rows.old is not None
    start = {name: value.clone() for name, value in stage.model.state_dict().items()}
    move(stage, -0.5 * gradient(stage, [first]))

    t, noise = stage.schedule.ode.t[rows.step], rows.noise()
    x = (1 - t)[:, None, None, None] * rows.latents + t[:, None, None, None] * noise
    assert torch.equal(noise, rows.noise())

    def likelihood(net):
        velocity = samplers.guided_velocity(net, x, t, rows.text, stage.null_text, 2.0).velocity
        error = (velocity - (noise - rows.latents)).square().flatten(1).mean(1)
        scale = {"uniform": 1.0, "t": t, "t2": t * t}
        if weighting == "huber":
            return -(t / 0.25) * ((error + 1e-5) ** 0.25 - 1e-5**0.25), velocity
        return -scale[weighting] * error, velocity

    before = toy.make_net()
    before.load_state_dict(start)
    new, velocity = likelihood(stage.model)
    old, old_velocity = likelihood(before)
    ratio, advantage = (new - old.detach()).exp(), rows.advantage
    objective = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.5, 1.5))
    apart = (velocity - old_velocity.detach()).square().mean()  # the average is still the first policy
    expected = objective.mean() + 0.3 * apart
    value, logs = loss_of(stage, rows)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6) and logs["ratio_error"] > 0
    theirs = torch.cat([part.flatten() for part in torch.autograd.grad(expected, trained(stage))])
    assert (gradient(stage, [rows]) - theirs).norm() < 1e-3 * theirs.norm()


def test_the_noise_of_rows_does_not_depend_on_processes():
    stage = toy.make_stage(algorithm=AWM, updates=1)
    experience = stage.collect(3, 0)[0]
    whole = experience.noise()
    parts = [stage.noise_of_rows(3, images) for images in (range(20), range(20, 32))]
    assert torch.equal(torch.cat(parts), whole) and whole.shape == (32, 3, toy.DIM, 1, 1)
    assert not torch.equal(whole, stage.collect(4, 0)[0].noise())
    rows = list(stage.rows(experience, 0))[0]
    assert torch.equal(rows.noise()[:4], torch.stack([whole[0, 0], whole[0, 1], whole[0, 2], whole[1, 0]]))


def test_the_average_of_awm_follows_and_both_guards_are_there():
    stage = toy.make_stage(algorithm={**AWM, "average": 0.75}, updates=1)
    stream, expected = stage.batches(0, 0, 1, 1), stage.model.out.weight.detach().clone()
    for rollout in range(3):
        next(stream)
        if rollout:
            expected = 0.75 * expected + 0.25 * stage.model.out.weight.detach()
        assert torch.allclose(stage.policy.old.out.weight, expected, atol=1e-6)
        with torch.no_grad():
            stage.model.out.weight += 0.1
    config = stage.config.algorithm
    assert (config.clip_low, config.clip_high, config.average_weight) == (1e-5, 1e-5, 0.1)
    with pytest.raises(ConfigError, match="kl.kind: awm has no transitions"):
        toy.make_config(algorithm={**AWM, "kl": {"kind": "gaussian"}})


# ---- clip ranges


def test_the_clip_range_is_chosen_for_the_kind_of_ratio():
    assert ClippedConfig().clip(8192) == (3e-4, 3e-4)
    assert ClippedConfig(ratio_norm=True).clip(65_536) == (2e-6, 2e-6)
    assert ClippedConfig(ratio_norm=True, clip_high=1e-5).clip(8192) == (
        pytest.approx(5.66e-6, rel=1e-3),
        1e-5,
    )
    stage = toy.make_stage(algorithm={"kind": "clipped", "ratio_norm": True})
    assert stage.algorithm.config.clip(toy.DIM)[0] == pytest.approx(2e-6 * math.sqrt(65_536 / toy.DIM))


# ---- the KL's reference and gate


@pytest.mark.parametrize("adapter", [{}, toy.LORA])
def test_the_reference_is_refreshed_and_a_resume_knows_it(adapter, tmp_path):
    algorithm = {"kind": "clipped", "kl": {"beta": 1e-2, "refresh_every": 2}}
    options = {"algorithm": algorithm, "updates": 1, **adapter}
    toy.train(tmp_path / "clean", options, steps=4, save_every=2)
    kl = {row["step"]: row["kl"] for row in metrics.read(tmp_path / "clean")}
    assert kl[2] > 0 and kl[4] > 0 and kl[3] < 1e-6 * kl[4]  # the third step begins with a new one
    toy.train(tmp_path / "run", options, steps=4, save_every=2, stop=2)
    toy.train(tmp_path / "run", options, steps=4, save_every=2)
    states = [
        torch.load(run_folder.folder_of(tmp_path / name, 4) / "trainer" / "policy.pt", weights_only=True)[
            "module"
        ]
        for name in ("clean", "run")
    ]
    assert any(name.startswith("reference.") for name in states[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_doubt_is_the_lead_of_the_trained_rewards_over_the_monitored_ones():
    trained = torch.tensor([[1.0, 0.6, 0.3, 0.1], [1.0, 0.5, 0.5, 0.0]])[..., None]
    monitored = torch.stack([torch.tensor([[0.9, 0.0, 0.3, 0.8], [0.0, 0.5, 0.5, 1.0]])] * 2, dim=-1)
    monitored[0, 1, 1] = torch.nan  # one of two scores is enough
    assert doubtful(trained, monitored, 0.25).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    with pytest.raises(ConfigError, match="gate compares with monitored rewards"):
        toy.make_config(algorithm={"kind": "clipped", "kl": {"gate": 0.5}})


def test_the_gate_is_open_in_rollouts_in_which_no_monitored_reward_is_scored():
    rewards = [REWARDS[0], {**REWARDS[1], "every": 2}]
    stage = toy.make_stage(algorithm={"kind": "clipped", "kl": {"gate": 0.25}}, rewards=rewards, updates=1)
    assert [stage.collect(rollout, 0)[0].gate.sum() for rollout in range(4)] == [8, 32, 8, 32]


def test_the_penalty_acts_where_the_gate_is_open():
    algorithm = {"kind": "clipped", "kl": {"beta": 10.0, "gate": 0.25}}
    stage = toy.make_stage(algorithm=algorithm, rewards=REWARDS, updates=1)
    (rows,) = micro_batches(stage, 1)
    assert rows.gate.sum() == 0.25 * len(rows.gate) and set(rows.gate.tolist()) == {0.0, 1.0}
    with torch.no_grad():
        stage.model.out.weight += 0.05
    apart = (
        (guided(stage, stage.model, rows) - guided(stage, stage.policy.reference, rows))
        .square()
        .flatten(1)
        .mean(1)
    )
    value, logs = loss_of(stage, rows)
    assert (value - logs["objective"]).item() == pytest.approx(
        10 * (apart * rows.gate).mean().item(), rel=1e-4
    )


# ---- drawing


@pytest.mark.parametrize("images, groups", [(range(12), 3), (range(6, 12), 2)])
def test_branching_draws_what_shared_noise_draws_with_fewer_passes(images, groups):
    """Without random steps before the window the images of a group are one until there; half a group is one too."""
    window = {"rollout": {"window": {"size": 2, "start": 4}}}
    drawn, calls = [], []
    for key in ("shared_noise", "branch"):
        stage = toy.make_stage(groups=3, group_size=4, updates=1, **merged(window, {"rollout": {key: True}}))
        count = []
        stage.model.register_forward_pre_hook(
            lambda module, inputs, count=count: count.append(len(inputs[0]))
        )
        text = stage.text.encode([f"prompt {image // 4}" for image in images])
        drawn.append(stage.draw(0, images, text, Window(4, 6)))
        calls.append(sum(count))
    for ours, theirs in zip(*drawn):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert calls == [2 * 10 * len(images), 2 * (4 * groups + 6 * len(images))]
    assert stage.config.rollout.passes(4, stage.schedule) == 4 / 4 + 6


def test_where_branching_shared_noise_and_solvers_do_not_fit():
    for options, message in [
        ({"rollout": {"branch": True}}, "nothing to share"),
        ({"rollout": {"branch": True}, "algorithm": AWM}, "branch: images part in the window"),
        ({"rollout": {"shared_noise": True}, "algorithm": AWM}, "shared_noise: images of one noise"),
        ({"rollout": {"solver": "heun"}}, "solver 'heun'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            toy.make_config(**options)


def test_final_latents_are_those_of_the_chosen_solver():
    stage = toy.make_stage(
        algorithm={"kind": "nft", "times": 3}, updates=1, rollout={"solver": "heun", "steps": 6}
    )
    trajectory = stage.collect(0, 0)[0].trajectory
    again = stage.draw(
        0,
        range(32),
        stage.text.encode([key.split("'")[1] for key in stage.collect(0, 0)[0].keys]),
        Window(0, 0),
    )
    assert torch.allclose(trajectory.latents, again.latents, atol=1e-6) and not len(trajectory.states)
    calls = []
    stage.model.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    stage.policy.old.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    stage.collect(1, 0)
    assert len(calls) == 11 == stage.config.rollout.passes(8, stage.schedule)  # Heun's last step is Euler's
    other = toy.make_stage(algorithm={"kind": "nft", "times": 3}, updates=1, rollout={"steps": 6})
    assert (other.collect(0, 0)[0].trajectory.latents - trajectory.latents).abs().max() > 1e-3


def test_new_keys_of_rollouts_leave_older_checkpoints_alone():
    default = toy.make_stage().fingerprint["rollout"]
    assert "branch" not in default and "solver" not in default and "batch_size" in default
    branched = toy.make_stage(rollout={"branch": True, "window": {"size": 2, "start": 3}}).fingerprint[
        "rollout"
    ]
    assert branched["branch"] is True


# ---- through the reward


BRIGHT = {"rewards": [{"name": "grpo_toy:brightness", "label": "bright", "weight": 2.0}], "updates": 1}
THROUGH = {"kind": "reward_gradient", "kl": {"beta": 0.5}}


def test_the_gradient_of_the_reward_is_that_of_the_predicted_image():
    stage = toy.make_stage(algorithm=THROUGH, rollout={"window": {"size": 2, "start": 5}}, **BRIGHT)
    (rows,) = micro_batches(stage, 1)
    with torch.no_grad():
        stage.model.out.weight += 0.02
    t = stage.schedule.sde.t[rows.step]
    velocity = guided(stage, stage.model, rows)
    pixels = ((rows.x - t[:, None, None, None] * velocity) / 4).clamp(-1, 1)
    apart = (velocity - guided(stage, stage.policy.reference, rows)).square().mean()
    expected = -2 * pixels.mean() + 0.5 * apart
    assert loss_of(stage, rows)[0].item() == pytest.approx(expected.item(), rel=1e-4)
    theirs = torch.cat([part.flatten() for part in torch.autograd.grad(expected, trained(stage))])
    assert (gradient(stage, [rows]) - theirs).norm() < 1e-3 * theirs.norm() and theirs.norm() > 0


class Halving(toy.Identity):
    """Notes the precision that it decodes in."""

    def __init__(self):
        self.seen = []

    def decode(self, latents):
        half = torch.eye(toy.DIM) / 2
        self.seen.append((latents.flatten(1) @ half).dtype)
        return super().decode(latents)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_decodes_as_the_rollout_does(dtype):
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    options = {"algorithm": THROUGH, "autocast": autocast, "rollout": {"decode_dtype": dtype}, **BRIGHT}
    stage = toy.make_stage(**options)
    stage.codec = Halving()
    (rows,) = micro_batches(stage, 1)
    with autocast():
        loss_of(stage, rows)
    assert stage.codec.seen == [getattr(torch, dtype)] * 2


def test_reward_gradients_raise_the_reward_and_need_one(tmp_path):
    options = {
        **BRIGHT,
        "algorithm": THROUGH,
        "optim": {"lr": 5e-3},
        "rollout": {"window": {"size": 1, "kind": "random", "start": 4}},
    }
    toy.train(tmp_path / "run", options, steps=6, save_every=6)
    rewards = [row["reward/bright"] for row in metrics.read(tmp_path / "run")]
    assert rewards[-1] > rewards[0] + 0.03
    stage = toy.make_stage(algorithm=THROUGH, updates=1)  # signs are counted
    with pytest.raises(ConfigError, match="reward 'signs' has no gradient"):
        loss_of(stage, micro_batches(stage, 1)[0])
