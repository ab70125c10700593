"""nitro-e demo: the page says in words what the numbers say, and the command goes on after it was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from test_report import Page, assert_self_contained
from tiny import optimizers_of

from nitro_e.cli import demo as tool
from nitro_e.config import apply_override, load
from nitro_e.data.prompts import PromptsConfig, load_prompts
from nitro_e.evaluation import results
from nitro_e.evaluation.evaluate import Result
from nitro_e.evaluation.images import ScoredImage
from nitro_e.evaluation.story import Story
from nitro_e.record.run_folder import read_status
from nitro_e.sampling.samplers import SamplingConfig
from nitro_e.stages.recipe import RunConfig

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "configs/shapes/quick"
NUM = 24


@pytest.fixture(scope="module")
def prompts():
    return load_prompts(PromptsConfig(source="shapes-heldout", num=NUM))


@pytest.fixture
def runs(tmp_path):
    """Run directories with a few recorded numbers."""
    curves = {
        "1_pretrain": [{"eval/strict": 0.0, "eval/color": 0.1}, {"eval/strict": 0.0, "eval/color": 0.4}],
        "2_finetune": [{"loss": 0.5}, {"loss": 0.4}],
        "3_grpo": [{"reward/mixed": 0.6, "kl": 0.0}, {"reward/mixed": 0.7, "kl": 0.01}],
        "4_distill": [{"imitate": 0.2}, {"imitate": 0.1}],
    }
    for stage, rows in curves.items():
        (tmp_path / stage).mkdir()
        lines = [
            json.dumps({"attempt": 1, "time": 1.0, "step": step, **row}) for step, row in enumerate(rows)
        ]
        (tmp_path / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return {stage: tmp_path / stage for stage in curves}


def drawn(prompts, folder: Path, source: str, guidance: float, steps: int, right: int) -> Result:
    """A result whose first `right` images are right."""
    folder = folder / f"{Path(source).name}-{guidance}-{steps}"
    folder.mkdir()
    rows = []
    for index, prompt in enumerate(prompts):
        strict = float(index < right)
        rows.append(
            ScoredImage(
                index, 0, prompt.text, {"strict": strict, "partial": strict}, "red circle", 0.01 * steps
            )
        )
        Image.fromarray(np.full((64, 64, 3), 40 + index, np.uint8)).save(folder / rows[-1].file)
    scores = {title: results.summarize(prompts, rows, title) for title in ("strict", "partial")}
    sampling = SamplingConfig(resolution=64, steps=steps, guidance_scale=guidance)
    return Result({"source": source}, sampling, folder, rows, scores)


def story(prompts, folder: Path, runs: dict[str, Path], *, tuned: int, rewarded: int, student: int) -> Story:
    """A story of models with so many right images; the shipped one has 12, 10 without guidance, 12 of these in four steps."""
    settings = [
        ("shapes", 3, 20, 12), ("shapes", 1, 20, 10), ("shapes", 1, 6, 10), ("shapes", 1, 4, 12), ("shapes", 1, 2, 0), ("shapes", 1, 1, 0),
        (str(runs["1_pretrain"]), 3, 20, 0), (str(runs["2_finetune"]), 3, 20, tuned), (str(runs["3_grpo"]), 1, 6, rewarded),
        (str(runs["4_distill"]), 1, 4, student), (str(runs["4_distill"]), 1, 2, 2), (str(runs["4_distill"]), 1, 1, 1),
    ]  # fmt: skip
    times = {"settings": {}, "wall": 70.0, "3_grpo": {"seconds": 61.2, "cpu_seconds": 118.9, "done": True}}
    return Story(prompts, [drawn(prompts, folder, *setting) for setting in settings], runs, times)


def test_the_page_says_what_improved_and_what_did_not(prompts, runs, tmp_path):
    told = story(prompts, tmp_path, runs, tuned=12, rewarded=22, student=0)
    verdicts = {stage.key: told.verdict(stage) for stage in told.stages}
    assert verdicts["1_pretrain"][1] == "good" and "color from 0.100 to 0.400" in verdicts["1_pretrain"][0]
    assert verdicts["2_finetune"] == (
        f"No improvement that {NUM} prompts can show: +0.000 {verdicts['2_finetune'][0].split('+0.000 ')[1]}",
        "fair",
    )
    assert verdicts["3_grpo"][1] == "good" and "improved the score by +0.500" in verdicts["3_grpo"][0]
    assert "better on 12 of 24 prompts, worse on 0" in verdicts["3_grpo"][0]
    assert verdicts["4_distill"][1] == "bad" and "did not improve" in verdicts["4_distill"][0]
    text = told.as_text()
    assert all(words in text for words, _ in verdicts.values()) and "61 s, 119 CPU-s" in text

    written = told.write(tmp_path / "report.html").read_text()
    page = Page(written)
    assert_self_contained(written)
    assert "made in 1 min 10 s (1 min 59 s of CPU time)" in written
    assert all(words in written for words, _ in verdicts.values())
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    # of every model for a prompt of each task; before and after of what a stage changed, at most 2 either way
    assert len(images) == 6 * len(told.models) + 2 * 2 + 2 * 2


def test_few_steps_are_told_with_their_cost(prompts, runs, tmp_path):
    rows = story(prompts, tmp_path, runs, tuned=12, rewarded=10, student=9).few_steps().rows
    assert [(row[0], row[1]) for row in rows[:3]] == [
        ("shipped, guidance 3, 20 steps", "40"),
        ("shipped, no guidance, 20 steps", "20"),
        ("shipped, no guidance, 6 steps", "6"),
    ]
    assert rows[0][3] == "200 ms" and rows[-1][3] == "10 ms"


def test_a_training_that_did_not_climb_is_said_to(prompts, runs, tmp_path):
    line = {"attempt": 1, "time": 1.0, "step": 0, "eval/strict": 0.0, "eval/color": 0.2}
    (runs["1_pretrain"] / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    told = story(prompts, tmp_path, runs, tuned=12, rewarded=10, student=9)
    assert told.verdict(told.stages[0])[0].startswith("The score did not climb")


def test_other_settings_in_the_same_folder_are_refused(tmp_path, capsys):
    (tmp_path / "times.json").write_text(json.dumps({"settings": {"scenes": 64, "num": 12}}))
    assert tool.main(["--recipes", str(RECIPES), "--out", str(tmp_path), "--num", "24"]) == 2
    assert "use that, or another --out" in capsys.readouterr().err


def test_another_number_of_processes_leaves_no_data_out(tmp_path):
    """What two processes encoded is no share of one process's."""

    def encoding(processes: int) -> set[str]:
        options = SimpleNamespace(out=tmp_path, num=NUM, scenes=64, recipes=RECIPES, processes=processes)
        return {job.name for job in list(tool.Demo(options)._plan())[1][1]}

    assert not encoding(1) & encoding(2)


def test_recipes_that_are_missing_are_named(tmp_path, capsys):
    assert tool.main(["--recipes", str(tmp_path)]) == 2
    assert "1_pretrain.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("stage", tool.STAGES)
def test_the_quick_recipes_are_valid(stage):
    path, first = RECIPES / f"{stage}.yaml", ROOT / "configs/shapes/1_pretrain.yaml"
    config = load(RunConfig, path, optimizers_of(path))
    assert config.model == load(RunConfig, first, optimizers_of(first)).model


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_quick_recipes_fit_every_number_of_processes(processes):
    for stage in tool.STAGES:
        recipe = yaml.safe_load((RECIPES / f"{stage}.yaml").read_text())
        if stage != "3_grpo":
            assert recipe["batch"]["global"] % processes == 0
            continue
        grpo = recipe["stage"]
        rows = grpo["groups"] * grpo["group_size"] * grpo["rollout"]["window"]["size"]
        assert grpo["groups"] % processes == rows % (recipe["batch"]["per_device"] * processes) == 0


def test_the_reason_of_an_end_is_found_below_torchruns_own(tmp_path):
    (tmp_path / "log").write_text("loss 1\nerror: x is wrong\nTraceback ...\n=====\n")
    assert tool.reason(tmp_path / "log") == "error: x is wrong"
    (tmp_path / "log").write_text("loss 1\nKilled\n")
    assert tool.reason(tmp_path / "log") == "Killed"


def tiny_recipes(folder: Path) -> Path:
    """The quick recipes with few steps of few samples."""
    folder.mkdir()
    for stage in tool.STAGES:
        path = RECIPES / f"{stage}.yaml"
        recipe = yaml.safe_load(path.read_text())
        small = ["steps=4", "save_every=2", "log_every=1", "ema.beta=0.9"]
        changes = [f"engine.{change}" for change in small]
        changes += optimizers_of(path) if stage != "3_grpo" else []
        if stage == "3_grpo":
            changes += ["stage.groups=2", "stage.group_size=4", "stage.rollout.per_device=8"]
            changes += ["batch.per_device=8"]
        else:
            changes.append("batch.global=8")
        if "evaluation" in recipe:
            changes += ["evaluation.every=2", "evaluation.prompts.num=6", "evaluation.sampling.steps=2"]
        for change in changes:
            apply_override(recipe, change)
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def wait_until(found, process: subprocess.Popen, seconds: int = 300) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None and time.monotonic() < end, "the demo did not come so far"
        time.sleep(0.05)


@pytest.mark.slow
def test_the_whole_demo_killed_on_the_way(tmp_path):
    """Killed in stage 1, ended by a signal in stage 3; the same command then finishes all of it."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "nitro_e.cli",
        "demo",
        "--recipes",
        str(tiny_recipes(tmp_path / "recipes")),
    ]
    command += ["--out", str(out), "--scenes", "64", "--num", "12", "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    wait_until((out / "runs/1_pretrain/metrics.jsonl").exists, first)
    first.kill()
    first.wait()

    second = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until((out / "runs/3_grpo/metrics.jsonl").exists, second)
    second.send_signal(signal.SIGTERM)
    assert second.wait() == 130 and b"run the same command again" in second.stderr.read()
    assert read_status(out / "runs/3_grpo")["state"] in ("preempted", "done")

    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert "4. Distillation" in printed and "the story with curves and images" in printed
    assert all(read_status(out / "runs" / stage)["state"] == "done" for stage in tool.STAGES)
    assert_self_contained((out / "report.html").read_text())
    again = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert again.count("done before") == 7
