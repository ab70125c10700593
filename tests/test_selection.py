"""The best checkpoint by a score, and the guard: as a rule, and on a toy that is trained to be hacked."""

import json
from pathlib import Path

import grpo_toy as toy
import pytest
import torch

from nitro_e.cli import train
from nitro_e.config import ConfigError, TrainingError, from_dict, to_dict
from nitro_e.evaluation.evaluator import EvaluationConfig
from nitro_e.record import metrics, run_folder
from nitro_e.rewards import reward
from nitro_e.stages.grpo.rollout import sample_trajectory
from nitro_e.stages.grpo.sde import Window
from nitro_e.training.engine import Hook
from nitro_e.training.selection import MAX_ROLLBACKS, Selection

ROOT = Path(__file__).parent.parent
GIVEN = {"prompts": "shapes-heldout", "rewards": ["shapes", {"name": "shapes", "label": "strict"}]}


def test_best_and_guard_are_functions_of_the_scores_so_far():
    """a decides, b may fall by 0.1: values by step."""
    a, b = {0: 0.5, 2: 0.7, 4: 0.9, 6: 0.8, 8: 0.8}, {0: 0.6, 2: 0.65, 4: 0.5, 6: 0.55, 8: 0.56}
    selection, best, fallen = Selection("a", {"b": 0.1}), [], []
    for step in a:
        scores = {"a": a[step], "b": b[step]}
        best += [step] if selection.is_best(step, scores) and not selection.fallen(step, scores) else []
        fallen += [step] if selection.fallen(step, scores) else []
        selection.history[step] = scores
    assert best == [0, 2, 6] and fallen == [4]  # 6 is above all that were allowed; 8 only equals it
    assert "b fell from 0.65 (step 2) to 0.5, by more than 0.1" == selection.fallen(4, {"b": 0.5})
    again = Selection("a", {"b": 0.1})
    again.read(
        [{"step": step, "a": a[step], "b": b[step], "loss": 1.0} for step in a] + [{"step": 9, "loss": 1.0}]
    )
    assert again.history == selection.history
    assert not Selection(None, {}).is_best(0, {"a": 1.0}) and not Selection("c").is_best(0, {"a": 1.0})


def test_the_keys_of_a_guard():
    config = from_dict(
        EvaluationConfig, {**GIVEN, "best": "strict", "guard": {"shapes": 0.02, "action": "rollback"}}
    )
    assert config.guard.bounds == {"shapes": 0.02} and config.guard.action == "rollback"
    assert from_dict(EvaluationConfig, to_dict(config)) == config
    for extra, message in [
        ({"guard": {"shapes": 0.02, "action": "rollback"}}, "set best"),
        ({"guard": {"shape": 0.02}}, "guard: no reward here is called 'shape', did you mean 'shapes'"),
        ({"guard": {"shapes": -1}}, "at least 0"),
        ({"guard": {"action": "stop"}}, "guard names no reward"),
        ({"best": "stric"}, "did you mean 'strict'"),
        ({"guard": {"shapes": 1, "action": "halt"}}, "action"),
    ]:
        with pytest.raises(ConfigError, match=message):
            from_dict(EvaluationConfig, {**GIVEN, **extra})


# ---- a reward that is built to be hacked: brightness, which costs the signs that the base has learned

HACKED = {
    "rewards": [{"name": "grpo_toy:brightness", "label": "brightness"}],
    "updates": 1,
    "algorithm": {"kind": "clipped", "kl": {"beta": 0.0}},
    "optim": {"lr": 1e-3, "warmup": 0},
}


@pytest.fixture(scope="module")
def base():
    return toy.pretrain(0, steps=200, centres=toy.patterns()).state_dict()


def scores(stage):
    """Held-out scores of the policy without an average: fixed noise, no random steps."""

    def run(published):
        text = stage.text.encode([prompt.text for prompt in toy.POOL for _ in range(16)])
        noise = torch.randn(64, toy.DIM, 1, 1, generator=torch.Generator().manual_seed(5))
        velocity = lambda x, t: stage.model(x, t, text)  # noqa: E731
        latents = sample_trajectory(velocity, noise, stage.schedule, Window(0, 0), torch.randn).latents
        info = [prompt.info for prompt in toy.POOL for _ in range(16)]
        pixels = stage.codec.decode(latents)
        return {
            "eval/signs": toy.signs(pixels, None, info).mean().item(),
            "eval/brightness": toy.brightness(pixels, None, info).mean().item(),
        }

    return (Hook(2, run, first=True, everywhere=True),)


def hack(folder, base, action, **options):
    net = toy.make_net()
    net.load_state_dict(base)
    options = {"steps": 16, "save_every": 4, "keep_last": 2, "ema": None, "hooks": scores, **options}
    selection = Selection("eval/brightness", {"eval/signs": 0.05}, action)
    return toy.train(folder, HACKED, net, selection=selection, **options)


def test_a_hacked_reward_stops_the_run_and_the_best_weights_before_are_kept(base, tmp_path):
    with pytest.raises(TrainingError, match="guard: eval/signs fell from .* stopped at step"):
        hack(tmp_path / "run", base, "stop")
    rows = {row["step"]: row for row in metrics.read(tmp_path / "run") if "eval/signs" in row}
    last, values = max(rows), {step: row["eval/signs"] for step, row in rows.items()}
    assert 2 < last < 16 and values[last] < max(values.values()) - 0.05
    assert all(value >= max(values.values()) - 0.05 for step, value in values.items() if step < last)
    allowed = {step: row["eval/brightness"] for step, row in rows.items() if step < last}
    best = max(allowed, key=allowed.get)
    assert (
        rows[last]["eval/brightness"] > allowed[best] > allowed[0]
    )  # what it was trained for goes on rising
    found = run_folder.model_folder(f"{tmp_path / 'run'}@best")
    assert found.name == f"step-{best:07d}" and (found / "model.safetensors").is_file()
    assert json.loads((found / "config.json").read_text())["provenance"]["value"] == allowed[best]
    assert run_folder.folder_of(tmp_path / "run", best) in run_folder.complete(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "STATUS.json").read_text())["state"] == "failed"
    with pytest.raises(
        TrainingError, match=f"stopped at step {last}"
    ):  # the same command says the same again
        hack(tmp_path / "run", base, "stop")


def test_rollback_goes_on_from_the_best_step_and_ends_after_some(base, tmp_path):
    with pytest.raises(TrainingError, match=f"after {MAX_ROLLBACKS} rollbacks"):
        hack(tmp_path / "run", base, "rollback", steps=100)
    events = metrics.read_events(tmp_path / "run")
    steps = [row["step"] for row in events if row["event"] == "rollback"]
    assert len(steps) == MAX_ROLLBACKS and steps == sorted(set(steps))
    # what was saved after a rollback is the best step's state, under the new number of steps
    before = [row["step"] for row in events if row["event"] == "best" and row["step"] < steps[0]][-1]
    clean = hack(tmp_path / "clean", base, "warn", steps=before)
    with pytest.raises(TrainingError, match="guard"):
        hack(tmp_path / "short", base, "rollback", steps=100, keep_every=1)
    again = torch.load(
        run_folder.folder_of(tmp_path / "short", steps[0]) / "trainer" / "policy.pt", weights_only=True
    )
    for name, tensor in clean.stage.policy.state_dict().items():
        assert torch.equal(again["module"][name], tensor), name
    assert again["optimizers"][0].keys() == dict(clean.stage.policy.named_parameters()).keys()


def test_a_warning_goes_on_and_never_keeps_what_has_fallen(base, tmp_path):
    trainer = hack(tmp_path / "run", base, "warn")
    fallen = [row["step"] for row in metrics.read_events(tmp_path / "run") if row["event"] == "guard"]
    assert trainer.step == 16 and fallen and fallen[-1] == 16
    assert run_folder.step_of(run_folder.best(tmp_path / "run")) < fallen[0]


# ---- the same on the offline domain, with its own recipe


@reward
def colourful(pixels, prompts, info):
    """Mean saturation of the images: more and larger objects than were asked for are worth more."""
    return (pixels.amax(1) - pixels.amin(1)).mean((1, 2))


@pytest.mark.slow
def test_a_hacked_reward_on_shapes_stops_the_run_by_itself(tmp_path, capsys):
    """The recipe of stage 3 on a reward that wants colour; the exact judge's score of held-out prompts is guarded."""
    judge = "{name: shapes, label: strict, options: {score: strict}}"
    hacked = f"{{name: '{__name__}:colourful', label: colourful}}"
    overrides = [
        f"stage.rewards=[{hacked}]",
        "stage.groups=4",
        "stage.group_size=12",
        "stage.adapter={rank: 32}",
        "stage.optim.lr=2e-3",
        "stage.optim.warmup=0",
        "stage.algorithm.kl.beta=0",
        "engine.steps=40",
        "engine.save_every=2",
        "engine.sample_every=0",
        "engine.ema=null",
        f"evaluation={{prompts: {{source: shapes-heldout, num: 48}}, every: 2, rewards: [{judge}, {hacked}], "
        "best: colourful, guard: {strict: 0.2}}",
    ]
    run = tmp_path / "run"
    assert train.main([str(ROOT / "configs/shapes/3_grpo_clipped.yaml"), f"run={run}", *overrides]) == 3
    assert "guard: eval/strict fell from" in capsys.readouterr().err
    rows = {row["step"]: row for row in metrics.read(run) if "eval/strict" in row}
    steps = sorted(rows)
    first, last = rows[steps[0]], rows[steps[-1]]
    assert steps[0] == 0 and steps[-1] < 40, "it was not stopped"
    # what it is trained on rises, and what it is for falls by more than the bound, at the last step alone
    assert last["eval/colourful"] > first["eval/colourful"]
    highest = [max(rows[step]["eval/strict"] for step in steps[: place + 1]) for place in range(len(steps))]
    falls = [high - rows[step]["eval/strict"] for high, step in zip(highest, steps)]
    assert falls[-1] > 0.2 and max(falls[:-1]) <= 0.2
    # the weights that are kept are from before
    assert run_folder.step_of(run_folder.best(run)) in steps[:-1]
    assert json.loads((run / "STATUS.json").read_text())["state"] == "failed"
