"""The validation loss: a plain loop gives the same, on any number of processes; training does not notice it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_train import RECIPE, ROOT, code_of, run_train, samples

from nitro_e.cli import train
from nitro_e.config import load
from nitro_e.data.making import write_shard
from nitro_e.encoders.components import build_codec, build_text_encoder
from nitro_e.files import sha256_of
from nitro_e.interfaces import DistContext
from nitro_e.model.pretrained import load_pretrained
from nitro_e.randomness import SampleRandom
from nitro_e.record import metrics, run_folder
from nitro_e.record.pages import read_record, write_report
from nitro_e.stages import validation
from nitro_e.stages.assembly import Parts
from nitro_e.stages.recipe import RunConfig
from nitro_e.training.batch import Split

TIMES = [0.25, 0.5, 1.0]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with a recipe, its training shard and a held-out one of 10 images."""
    folder = tmp_path_factory.mktemp("toy")
    write_shard(folder / "toy-000000.tar", samples())
    write_shard(folder / "held-000000.tar", samples(10))
    (folder / "recipe.yaml").write_text(RECIPE.replace("SHARDS", f"{folder}/toy-*.tar"))
    return folder


def held_out(toy, **more) -> str:
    values = {
        "shards": [f"{toy}/held-*.tar"],
        "times": TIMES,
        "samples": 7,
        "batch_size": 4,
        "every": 2,
        **more,
    }
    return f"validation={values}".replace("None", "null")


def rows_of(run) -> dict[int, dict]:
    """The validation of every step."""
    return {
        row["step"]: {name: row[name] for name in row if name.startswith("validation/")}
        for row in metrics.read(run)
        if "validation/loss" in row
    }


def opened(toy, run, rank=0, world=1, **more):
    config = load(RunConfig, toy / "recipe.yaml", [f"run={run}", held_out(toy, **more)])
    device = torch.device("cpu")
    parts = Parts(
        device=device,
        rank=rank,
        world=world,
        split=Split(4, 1),
        autocast=torch.no_grad,  # anything that changes no number
        codec=build_codec(config.components.codec),
        text=build_text_encoder(config.components.text),
        model=None,
        flops=0.0,
        latent_shape=(24, 8, 8),
    )
    return validation.open_validator(config, config.validation, parts, DistContext(rank, world))


def test_logged_resumed_and_without_a_trace_in_the_training(toy, tmp_path):
    plain, checked, resumed = (tmp_path / name for name in ("plain", "checked", "resumed"))
    assert run_train(toy / "recipe.yaml", plain) == 0
    assert run_train(toy / "recipe.yaml", checked, held_out(toy)) == 0
    assert run_train(toy / "recipe.yaml", resumed, held_out(toy), "engine.steps=3") == 0
    assert run_train(toy / "recipe.yaml", resumed, held_out(toy)) == 0
    for name in ("model/model.safetensors", "ema/model.safetensors"):
        one, other = (run_folder.latest(run) / name for run in (plain, checked))
        assert sha256_of(one) == sha256_of(other)
    losses = [
        {row["step"]: row["loss"] for row in metrics.read(run) if "loss" in row} for run in (plain, checked)
    ]
    assert losses[0] == losses[1]
    rows = rows_of(checked)
    assert list(rows) == [2, 4, 6] and {step: rows_of(resumed)[step] for step in rows} == rows
    assert list(rows[6]) == ["validation/loss", *(f"validation/loss_t{time}" for time in TIMES)]
    found = validation.read(checked)
    assert found.times == TIMES and found.values.shape == (7, 3)
    assert len(set(found.keys)) == 7 and all(key.startswith("held-000000.tar:") for key in found.keys)
    assert found.values.mean() == pytest.approx(rows[6]["validation/loss"], rel=1e-9)
    assert read_record(checked).final("validation/loss") == rows[6]["validation/loss"]
    page = write_report(checked).read_text()
    titles = ["Validation loss", "Validation loss by timestep", "Loss"]
    places = [page.index(f'aria-label="{title}"') for title in titles]
    assert places == sorted(places)


def test_equals_a_plain_loop_over_images_and_times(toy, tmp_path):
    """The published weights, one image and one time after the other, with x_t and the target written out."""
    run = tmp_path / "run"
    assert run_train(toy / "recipe.yaml", run, held_out(toy)) == 0
    validator, model = opened(toy, run), load_pretrained(run_folder.model_folder(run)).float().eval()
    (first, second) = (next(validator.data.records(step=step)) for step in (0, 1))
    expected = np.zeros((7, 3))
    for index in range(7):
        records, row = (first, index) if index < 4 else (second, index - 4)
        pixels = records.pixels[row : row + 1] / 127.5 - 1
        codec, text = validator.parts.codec, validator.parts.text
        x0 = codec.normalize(codec.encode_pixels(pixels))
        rng = SampleRandom(0, "validation", first=index, count=1)
        for column, time in enumerate(TIMES):
            noise = rng.normal(24, 8, 8)
            with torch.no_grad():
                velocity = model(
                    (1 - time) * x0 + time * noise, torch.tensor([time]), text.encode([records.prompts[row]])
                )
            expected[index, column] = (velocity - (noise - x0)).square().mean()
    np.testing.assert_allclose(validation.read(run).values, expected, rtol=2e-5)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_same_bits_on_any_number_of_processes(toy, tmp_path, world):
    torch.manual_seed(0)
    config = load(RunConfig, toy / "recipe.yaml")
    model = config.model.build()
    torch.nn.init.normal_(model.out.weight, std=0.1)  # at the start every prediction is zero
    alone = opened(toy, tmp_path).losses(model)
    shares = [opened(toy, tmp_path, rank, world).losses(model) for rank in range(world)]
    assert torch.equal(sum(shares), alone) and (alone > 0).all()
    assert model.training
    every = opened(toy, tmp_path, samples=None).losses(model)
    assert every.shape == (10, 3) and torch.equal(every[:7], alone)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"shards": ["TOY/toy-*.tar"]}, "toy-000000.tar' is among the training data too"),
        ({"samples": 11}, "validation.samples: 11 images were asked for, the shards have 10"),
        ({"times": []}, "validation.times is empty"),
        ({"times": [0.5, 0.5]}, "they must differ"),
        ({"times": [0.0]}, "validation.times[0] must be above 0"),
        ({"shards": ["TOY/none-*.tar"]}, "validation.shards: missing shards"),
    ],
)
def test_refused(toy, tmp_path, capsys, more, message):
    more = {key: [str(v).replace("TOY", str(toy)) if key == "shards" else v for v in value] if isinstance(value, list) else value for key, value in more.items()}  # fmt: skip
    assert run_train(toy / "recipe.yaml", tmp_path / "run", held_out(toy, **more)) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_names_it_and_a_stage_without_images_refuses_it(toy, tmp_path, capsys):
    assert code_of(train.main, [str(toy / "recipe.yaml"), "--dry-run", held_out(toy)]) == 0
    assert "7 images at 3 times, every 2 steps" in capsys.readouterr().out
    grpo = "configs/shapes/3_grpo_clipped.yaml"
    assert code_of(train.main, [grpo, "--dry-run", "validation={shards: [a.tar]}"]) == 2
    assert "validation: stage.kind 'grpo' reads no images" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_log_what_one_does(toy, tmp_path):
    """Through the real launcher: the weights differ by rounding after 6 steps, and so does their loss."""
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    assert run_train(toy / "recipe.yaml", alone, held_out(toy)) == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    command = [sys.executable, *launcher, str(toy / "recipe.yaml"), f"run={pair}", held_out(toy)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environment).returncode == 0
    one, two = rows_of(alone), rows_of(pair)
    assert list(one) == list(two)
    for step, values in one.items():
        assert two[step] == pytest.approx(values, rel=1e-5)
    assert validation.read(pair).keys == validation.read(alone).keys
