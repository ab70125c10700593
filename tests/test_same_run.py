"""The same command and seed is the same run: in another interpreter bit for bit, on two processes up to rounding.

The real `train.py` on the real recipes of the offline domain, REPA included, on tiny data made by the project's own
tools. Every run is an interpreter of its own: a fork shares torch's global random state, and hides what depends on it.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from repa_run import make_data
from test_train import ROOT
from tiny import OPTIMIZER

from nitro_e.cli import synthesize
from nitro_e.config import load
from nitro_e.interfaces import Phase
from nitro_e.record import metrics, run_folder
from nitro_e.stages.recipe import RunConfig, build

ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "random",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder of 16 encoded images."""
    folder = tmp_path_factory.mktemp("encoded")
    make_data(folder, num=16)
    return folder / "data" / "shapes"


def options(shards: Path, run: Path, *more: str, columns: str = "latents text features") -> list[str]:
    """Overrides that make a recipe tiny."""
    named = ", ".join(f"{shards}/{column}-*.tar" for column in columns.split())
    data = [f"data.shards=[{named}]", "batch=4", "data.workers=0"] if columns else []
    return [
        f"run={run}",
        *data,
        "engine.precision=float32",
        "engine.steps=2",
        "engine.save_every=2",
        "engine.log_every=1",
        "engine.sample_every=0",
        "engine.tracker=none",
        *OPTIMIZER,
        *more,
    ]


def start(recipe: str, arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs" / recipe), *arguments]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes)


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]


def numbers(run: Path) -> list[dict]:
    """The metrics but for clocks and memory."""
    clocks = ("time", "samples_per_second", "tflops", "mfu", "data_wait", "eta_seconds", "memory_gb")
    rows = metrics.read(run)
    return [{k: v for k, v in row.items() if k not in clocks and "seconds" not in k} for row in rows]


def assert_same_bits(run: Path, other: Path) -> None:
    """Losses and every tensor of weights and trainer state."""
    assert numbers(run) == numbers(other)
    ours, theirs = run_folder.latest(run), run_folder.latest(other)
    compared = 0
    for path in sorted((ours / "trainer").iterdir()):
        a, b = (torch.load(folder / "trainer" / path.name, weights_only=True) for folder in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        compared += 1
    for path in sorted(ours.glob("*/model.safetensors")):
        assert path.read_bytes() == (theirs / path.relative_to(ours)).read_bytes()
    assert compared


def test_repa_in_two_interpreters_and_on_two_processes(shards, tmp_path):
    """The projector of REPA was drawn from torch's global state: another run every time. REPA ends before the run."""
    recipe, more = "shapes/1_pretrain.yaml", ["evaluation=null", "engine.steps=3", "engine.save_every=3"]
    more += ["stage.repa.taps=[1, 2]", "stage.repa.stop=0.6"]
    one, again, two = (tmp_path / name for name in ("one", "again", "two"))
    finish(
        start(recipe, options(shards, one, *more)),
        start(recipe, options(shards, again, *more)),
        # without a launcher
        start(recipe, [*options(shards, two, *more), "--processes", "2"]),
    )
    assert_same_bits(one, again)
    rows = zip(metrics.read(one), metrics.read(two), strict=True)
    for a, b in rows:
        aligned = a["step"] < 3
        assert ("repa_loss" in a) == ("velocity_loss" in a) == aligned
        assert not aligned or (abs(a["repa_loss"]) <= 1 and a["loss"] != a["velocity_loss"])
        for name in ("loss", "grad_norm", *(("velocity_loss", "repa_loss") if aligned else ())):
            assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-6), name


def test_first_weights_follow_from_the_seed_alone(shards, tmp_path):
    """Whatever was drawn from global states before; another seed gives another model and another projector."""

    def phase(seed: int, disturb: int) -> Phase:
        for library in (random.seed, np.random.seed, torch.manual_seed):
            library(disturb)
        arguments = options(shards, tmp_path / f"{seed}-{disturb}", "evaluation=null", f"seed={seed}")
        (phase,) = build(load(RunConfig, ROOT / "configs/shapes/1_pretrain.yaml", arguments)).stage.phases
        return phase

    ours, same, other = (phase(*pair).module.state_dict() for pair in ((3, 1), (3, 2), (4, 1)))
    assert ours.keys() == same.keys() == other.keys()
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    for name in ("projector.0.weight", "projector.4.bias", "model.patch.weight"):
        assert not torch.allclose(ours[name], other[name])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A folder of 16 images of the shipped model, for distillation."""
    folder = tmp_path_factory.mktemp("pairs")
    arguments = ["shapes", "--prompts", "shapes-train", "--limit", "16", "--steps", "2", "--text-embeddings"]
    assert synthesize.main([*arguments, "--out", str(folder)]) == 0
    return folder


OTHER_STAGES = {
    "2_finetune": ["evaluation=null"],
    "3_grpo": [
        "stage.groups=2",
        "stage.group_size=4",
        "batch.per_device=null",
        "stage.prompts.num=20",
        "stage.adapter={rank: 2}",
    ],
    "3_grpo_clipped": [
        "stage.groups=2",
        "stage.group_size=4",
        "batch.per_device=null",
        "stage.prompts.num=20",
        "stage.adapter={rank: 2}",
    ],
    "4_ladd": ["stage.adversarial.start=0", "stage.adversarial.heads={width: 8, spectral_norm: true}"],
    "4_nitrofusion": [
        "stage.adversarial.start=0",
        "stage.adversarial.pool={copies: 4, use: 2, width: 8, refresh: 0.5}",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", OTHER_STAGES)
def test_the_other_stages_in_two_interpreters(stage, shards, pairs, tmp_path):
    """Weights from the teacher, LoRA, heads, a pool of heads."""
    folder, columns = {"2": (shards, "latents text"), "3": (shards, ""), "4": (pairs, "*")}[stage[0]]
    runs = [tmp_path / name for name in ("one", "again")]
    more = OTHER_STAGES[stage]
    finish(*(start(f"shapes/{stage}.yaml", options(folder, run, *more, columns=columns)) for run in runs))
    assert_same_bits(*runs)
