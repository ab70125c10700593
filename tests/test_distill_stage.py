"""Distillation as a run: pairs -> train.py -> sample.py, exact resume, presets, refusals."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from distill_tools import SMALLER, Loop, distill_config, random_batch, tiny_model, tiny_stage
from safetensors.torch import load_file
from tiny import optimizers_of

from nitro_e.cli import sample, synthesize, train
from nitro_e.config import ConfigError, from_dict, load, to_dict
from nitro_e.encoders.components import ComponentConfig, text_shape
from nitro_e.model import EMMDiT, ModelConfig
from nitro_e.model.pretrained import save_pretrained
from nitro_e.randomness import SampleRandom
from nitro_e.record import metrics, run_folder
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.samplers import SamplingConfig, with_overrides
from nitro_e.sampling.sources import Use
from nitro_e.stages.distill import DistillConfig
from nitro_e.stages.distill.presets import PRESETS
from nitro_e.stages.recipe import RunConfig

ROOT = Path(__file__).parent.parent

TEXT = ComponentConfig(name="hash")
HEADS = {"start": 2, "ramp": 2, "heads": {"width": 16}, "r1": {"sigma": 0.05, "weight": 200}}
GAN = {"start": 2, "heads": {"width": 16}}
SMALL = {
    "ladd4": {
        "inputs": {"probabilities": [[0, [1, 1, 1, 1]]], "rollout": {"share": 0.5, "start": 0, "end": 0}},
        "adversarial": HEADS,
    },
    "ladd_guided": {"adversarial": HEADS},
    "nitro1": {"adversarial": HEADS},
    "nitrofusion": {
        "adversarial": {
            "start": 2,
            "ramp": 2,
            "r1": HEADS["r1"],
            "pool": {"copies": 4, "use": 2, "width": 8, "refresh": 0.05},
        }
    },
    "sana_adv": {"adversarial": HEADS},
    "reflow": {},
    "instaflow": {},
    "dmdr": {
        "every": 1,
        "inputs": {"sigmas": [1.0, 0.5], "group": 2},
        "reward": {"rewards": ["shapes"], "start": 2},
    },
    "pi_flow": {},
    "dmd2": {},
    "tdm": {},
    "dmd2_gan": {"every": 1, "adversarial": GAN},
    "f_distill": {"every": 1, "adversarial": GAN},
    "consistency": {},
    "scm": {},
    "mean_flow": {},
    "sana_sprint": {"adversarial": HEADS},
    "rcm": {"every": 1},
    "decoupled_dmd": {},
    "phased_dmd": {},
    "swiftbrush": {"score": {"fake": {"adapter": {"rank": 4}}}},
    "pg_sb": {"score": {"fake": {"adapter": {"rank": 4}}}},
    "sid": {},
    "sid_few": {},
    "sim": {},
    "score_imitate": {"start": 2},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A teacher of random weights and pairs of it."""
    folder = tmp_path_factory.mktemp("distill")
    torch.manual_seed(0)
    config = ModelConfig(
        **{**ModelConfig.PRESETS["micro-8"], "latent_channels": 24, "text_width": text_shape(TEXT)[0]}
    )
    teacher = EMMDiT(config)
    torch.nn.init.normal_(teacher.out.weight, std=0.1)
    use = Use(
        codec=ComponentConfig(name="dct-f8c24"), text=TEXT, sampling=SamplingConfig(resolution=64, steps=4)
    )
    save_pretrained(teacher, folder / "teacher", to_dict(use))
    (folder / "prompts.txt").write_text("\n".join(f"a red circle number {number}" for number in range(12)))
    command = [folder / "teacher", "--prompts", folder / "prompts.txt", "--per-prompt", 2, "--grid", "linear"]
    command += ["--guidance", 2, "--out", folder / "pairs"]
    assert synthesize.main([str(part) for part in command]) == 0
    return folder


def recipe(pairs, folder, preset="ladd4", **overrides):
    data = {
        "name": "toy",
        "run": str(folder / "run"),
        "model": {"preset": "micro-8", "latent_channels": 24, "text_width": text_shape(TEXT)[0]},
        "stage": {
            "kind": "distill",
            "preset": preset,
            "teacher": str(pairs / "teacher"),
            "guards": None,
            "optim": {"lr": 1e-3, "betas": [0, 0.99], "warmup": 2},
            **SMALL[preset],
        },
        "data": {"shards": [str(pairs / "pairs/*.tar")], "resolution": 64, "workers": 0},
        "batch": 4,
        "components": {"codec": "dct-f8c24", "text": "hash"},
        "engine": {
            "steps": 6,
            "save_every": 3,
            "sample_every": 0,
            "log_every": 1,
            "precision": "float32",
            "tracker": "none",
            "ema": {"beta": 0.9},
        },
        "sampling": {
            "resolution": 64,
            "steps": 1,
            "guidance_scale": 1,
            "sampler": PRESETS[preset]["sampler"],
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**data, **overrides}))
    return path


def states(run, step):
    """Every tensor that a resume reads."""
    folder = run_folder.folder_of(run, step)
    found = {
        f"{name} {key}": t
        for name in ("model", "ema")
        for key, t in load_file(folder / name / "model.safetensors").items()
    }
    for path in sorted((folder / "trainer").glob("*.pt")):
        pending = [(path.stem, torch.load(path, weights_only=True))]
        while pending:
            name, value = pending.pop()
            if isinstance(value, torch.Tensor):
                found[name] = value
            elif isinstance(value, dict | list):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                pending += [(f"{name}.{key}", part) for key, part in items]
    return found


@pytest.mark.parametrize("preset", ["ladd4", "nitrofusion"])
def test_u16_a_resume_is_exact_to_the_bit(pairs, tmp_path, preset):
    """Weights, averages, both optimisers, the measured weight, ages of heads, draws and the place in the data."""
    path = recipe(pairs, tmp_path, preset)
    assert train.main([str(path), f"run={tmp_path / 'whole'}"]) == 0
    assert train.main([str(path), f"run={tmp_path / 'halves'}", "engine.steps=3"]) == 0
    assert train.main([str(path), f"run={tmp_path / 'halves'}"]) == 0
    whole, halves = (states(tmp_path / name, 6) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() and len(whole) > 50
    assert [
        name for name in whole if not torch.equal(whole[name].nan_to_num(), halves[name].nan_to_num())
    ] == []
    kind = "ratios" if preset == "ladd4" else "age"
    assert any(kind in name and (value.nan_to_num() > 0).any() for name, value in whole.items())
    rows = [
        {row["step"]: (row["loss"], row["discriminator/loss"]) for row in metrics.read(tmp_path / name)}
        for name in ("whole", "halves")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 6


def test_two_processes_train_as_one(pairs, tmp_path):
    """Shared forward under DDP, the same pool and the same measured weight on both: the losses of one process."""
    path = recipe(pairs, tmp_path)
    pool = "stage.adversarial={start: 2, ramp: 2, misaligned: null, pool: {copies: 4, use: 2, width: 8, refresh: .1}}"
    assert train.main([str(path), pool, "batch=8"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "train.py"), str(path), pool, "batch=8", f"run={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = metrics.read(tmp_path / "run"), metrics.read(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "discriminator/loss", "adversarial_weight", "discriminator/gap"):
            assert b.get(name) == pytest.approx(a.get(name), rel=1e-3, abs=1e-5), name
    assert one[-1]["adversarial_weight"] > 0


# families besides the adversarial ones: what their recipe needs beyond SMALL
FAMILIES = {
    "f_distill": ["sampling.steps=4"],
    "sid_few": ["sampling.steps=4"],
    "mean_flow": ["model.interval=true"],
    "rcm": [],
    "dmdr": ["sampling.steps=2", "data=null", "stage.prompts={source: shapes-train, num: 24}"],
    "pi_flow": ["sampling.steps=4", "model.policy=3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", FAMILIES)
def test_a_resume_of_every_family_is_exact_to_the_bit(pairs, tmp_path, preset):
    """Weights, averages, the fake score, the heads and all optimisers."""
    line = [str(recipe(pairs, tmp_path, preset)), *FAMILIES[preset]]
    assert train.main([*line, f"run={tmp_path / 'whole'}"]) == 0
    assert train.main([*line, f"run={tmp_path / 'halves'}", "engine.steps=3"]) == 0
    assert train.main([*line, f"run={tmp_path / 'halves'}"]) == 0
    whole, halves = (states(tmp_path / name, 6) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys() and len(whole) > 50
    assert [
        name for name in whole if not torch.equal(whole[name].nan_to_num(), halves[name].nan_to_num())
    ] == []


@pytest.mark.slow
@pytest.mark.parametrize("preset", FAMILIES)
def test_two_processes_train_every_family_as_one(pairs, tmp_path, preset):
    line = [str(recipe(pairs, tmp_path, preset)), *FAMILIES[preset], "batch=8"]
    assert train.main(line) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "train.py"), *line, f"run={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = metrics.read(tmp_path / "run"), metrics.read(tmp_path / "two")
    compared = {
        "loss",
        "score",
        "fake/loss",
        "discriminator/loss",
        "flow_map",
        "imitate",
        "reward",
        "reward_score",
    }
    assert len(one[-1].keys() & compared) > 1 and len(one) == 6
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & compared:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("preset", PRESETS)
def test_the_settings_of_the_sampler_go_with_the_weights(preset):
    """Through the JSON that is stored: sampler, time scale, and the times of every number of steps."""
    config = distill_config(preset, **({"reward": {"rewards": ["shapes"]}} if preset == "dmdr" else {}))
    steps = len(config.schedules[-1]) if config.schedules else 4
    stored = config.sampling(SamplingConfig(steps=steps, guidance_scale=1, sampler=config.sampler))
    read = from_dict(SamplingConfig, json.loads(json.dumps(to_dict(stored))), "sampling")
    assert read == stored and read.guidance_scale == 1
    assert (read.sampler, read.time_scale) == (config.sampler, config.time_scale)
    assert [len(times) for times in read.sigmas] == [len(times) for times in config.schedules]
    for times in config.schedules:
        chosen = with_overrides(read, {"steps": len(times)}).times()
        torch.testing.assert_close(chosen, torch.tensor([*times, 0.0]))
    if config.schedules:
        with pytest.raises(ConfigError, match="these weights were distilled for"):
            with_overrides(read, {"steps": 7})


def test_from_pairs_to_images(pairs, tmp_path, capsys):
    path, run = recipe(pairs, tmp_path), tmp_path / "run"
    assert train.main([str(path)]) == 0
    published = json.loads((run_folder.latest(run) / "ema/config.json").read_text())["use"]["sampling"]
    assert published["sigmas"] == [[1.0], [1.0, 0.5], [1.0, 0.75, 0.5, 0.25]]
    pipeline = TextToImage.from_pretrained(run)
    assert pipeline.settings(steps=4).times().tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    calls = []
    pipeline.model.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[1][0].item()))
    pipeline(["a red circle"], steps=4)
    assert calls == [1.0, 0.75, 0.5, 0.25]  # no guidance: one forward per sigma
    arguments = [str(run), "--prompt", "a red circle", "--out", str(tmp_path / "out")]
    assert sample.main(arguments) == 0 and sample.main([*arguments, "--steps", "2"]) == 0
    capsys.readouterr()
    assert sample.main([*arguments, "--steps", "3"]) == 2
    assert "distilled for 1 or 2 or 4 steps, not 3" in capsys.readouterr().err
    assert sample.main([*arguments, "--sampler", "multistep"]) == 2
    assert "distilled for sampler 'euler'" in capsys.readouterr().err
    assert sample.main([*arguments, "--steps", "3", "--sampler", "heun", "--force"]) == 0


def test_the_student_starts_as_the_teacher_and_another_teacher_is_refused(pairs, tmp_path, capsys):
    path, run = recipe(pairs, tmp_path), tmp_path / "run"
    assert train.main([str(path), "stage.optim.lr=0", "engine.steps=1"]) == 0
    ours = load_file(run_folder.latest(run) / "model/model.safetensors")
    theirs = load_file(pairs / "teacher/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    model = EMMDiT.from_pretrained(pairs / "teacher")
    model.out.weight.data += 1
    save_pretrained(model, tmp_path / "other", json.loads((pairs / "teacher/config.json").read_text())["use"])
    assert train.main([str(path), f"stage.teacher={tmp_path / 'other'}"]) == 2
    assert "data teacher was" in capsys.readouterr().err


def test_guards_stop_a_run_that_passes_a_limit(pairs, tmp_path, capsys):
    """A limit that every student passes: looked at every 50 steps, after `patience` of them."""
    path = recipe(pairs, tmp_path, "reflow")
    overrides = ["batch=2", "engine.steps=60", "engine.save_every=60", "engine.ema=null"]
    guards = "stage.guards={start: 0, patience: 5, mean_drift: 1e-9, std_ratio: 100}"
    assert train.main([str(path), guards, *overrides]) not in (0, 2)
    assert "mean_drift has been above 1e-09 for 50 steps" in capsys.readouterr().err
    assert metrics.read(tmp_path / "run")[-1]["step"] <= 50


def test_bf16_rollouts_leave_gradients():
    """Autocast keeps weights it has cast without a graph; they must not be met again with one."""
    rollout = {"probabilities": [[0, [0, 0, 1, 1]]], "rollout": {"share": 1.0, "start": 0, "end": 0}}
    stage = tiny_stage(distill_config("ladd4", inputs=rollout, adversarial=HEADS))
    batch = random_batch(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        critic, student = stage.phases
        critic.loss(critic.net, batch, SampleRandom("d", first=0, count=2))
        assert not batch.prediction.on_path
        loss, _ = student.loss(student.net, batch, SampleRandom("g", first=0, count=2))
    loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in stage.model.blocks[0].image.mlp.parameters()
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.steps=3"], "trained for 1 or 2 or 4"),
        (["sampling.guidance_scale=4.5"], "carries its guidance"),
        (["sampling.sampler=heun"], "set them alike"),
        (["engine.precision=float16"], "use bfloat16"),
        (["engine.sharding=fsdp"], "ddp only"),
        (["stage.teacher=nowhere"], "'nowhere' does not exist"),
        (["data.reader=stream"], "indexed"),
        (["model.groups=[1,3,1]"], "another architecture"),
        (["stage.adversarial.taps=[9]"], "block counts must be in 1 to 4"),
    ],
)
def test_what_cannot_work_is_one_line(pairs, tmp_path, capsys, overrides, message):
    assert train.main([str(recipe(pairs, tmp_path)), *overrides]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_shards_without_noise_are_refused_where_it_is_needed(pairs, tmp_path, capsys):
    import numpy as np

    from nitro_e.data.making import write_shard

    samples = [
        {"__key__": f"{n:03d}", "npy": np.zeros((24, 8, 8), np.float16), "txt": f"a thing {n}"}
        for n in range(8)
    ]
    write_shard(tmp_path / "plain-000000.tar", iter(samples))
    path = recipe(pairs, tmp_path)
    shards = f"data.shards=[{tmp_path}/plain-*.tar]"
    assert train.main([str(path), shards]) == 2
    assert "noise.npy" in capsys.readouterr().err
    plain = [
        "stage.inputs.noise=fresh",
        "stage.inputs.rollout=null",
        "stage.sampler=multistep",
        "sampling.sampler=multistep",
    ]
    teach = "stage.diffusion={target: teacher, guidance_scale: 2, kind: mse, space: velocity}"
    assert train.main([str(path), shards, *plain, teach, "engine.steps=1"]) == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(preset):
    """On random pairs: finite, the heads at work on both sides, the adversarial weight above 0, the student moves."""
    heads = "adversarial" in SMALL[preset]
    overrides = {**SMALL[preset], "optim": {"lr": 1e-3, "betas": [0, 0.99], "warmup": 2, "weight_decay": 0}}
    if heads:
        fast = {"lr": 3e-3, "betas": [0, 0.99], "eps": 1e-8, "weight_decay": 0, "warmup": 0}
        overrides["adversarial"] = {**overrides["adversarial"], "optim": fast}
    model = tiny_model(config=replace(SMALLER, interval=preset == "mean_flow"))
    places = 3 if preset == "pi_flow" else 1
    stage = tiny_stage(distill_config(preset, **overrides), model=model, policy=places)
    stage.shared.judge = lambda latents, prompts, info: latents.mean((1, 2, 3))
    before = [p.detach().clone() for p in stage.student.parameters()]
    steps = 20 if heads else 6
    loop, verdicts, weights = Loop(stage, steps), {"real": [], "fake": []}, []
    for step in range(steps):
        batch = random_batch(step, 4, shape=(4, 8, 8))
        # unlike what the student makes
        batch.latents += 2 * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None]
        logs = loop.step(batch)
        assert all(value.isfinite().all() for value in logs.values())
        if heads:
            for side, shares in verdicts.items():
                total, count = logs[f"discriminator/right_{side}"]
                shares += [float(total / count)] if count else []
            weights.append(float(logs.get("student/adversarial_weight", 0.0)))
    assert any(not torch.equal(a, b) for a, b in zip(before, stage.student.parameters()))
    if heads:
        right = {side: sum(shares) / len(shares) for side, shares in verdicts.items()}
        assert all(0.2 < share < 1.0 for share in right.values()), right  # no constant verdict
        assert sum(right.values()) / 2 > 0.5
        assert weights[0] == 0 and weights[-1] > 0


def test_reflow_is_sampled_on_equal_steps():
    config = from_dict(DistillConfig, {"preset": "reflow", "teacher": "x"})
    sampling = config.sampling(SamplingConfig(steps=4, guidance_scale=1, grid="released"))
    assert sampling.times().tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_recipes_name_presets_and_are_complete():
    for path in sorted(ROOT.glob("configs/*/4_*.yaml")):
        config = load(RunConfig, path, optimizers_of(path))
        counts = [len(times) for times in config.stage.schedules]
        assert config.published_sampling.steps in counts or not counts  # reflow: any
        assert from_dict(RunConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match="unknown preset 'lad4', did you mean 'ladd4'"):
        distill_config("lad4")


def test_older_names_in_recipes_and_weights():
    config = distill_config("ladd4", sampler="renoise", inputs={"noise": "fresh"})
    assert config.sampler == "multistep"
    assert with_overrides(SamplingConfig(), {"sampler": "renoise"}).sampler == "multistep"
    for options, message in [
        ({"inputs": {"odds": [[0, [1, 1, 1, 1]]]}}, "write inputs.probabilities instead"),
        ({"inputs": {"anywhere": {"share": 1.0}}}, "write inputs.continuous_times instead"),
        ({"adversarial": {"judge": {"least": 0.1}}}, "write adversarial.discriminator instead"),
    ]:
        with pytest.raises(ConfigError, match=message):
            distill_config("ladd4", **options)
