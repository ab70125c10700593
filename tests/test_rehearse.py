"""Rehearsals of recipes, and how benchmarks report: figures of the right things, no timing is judged."""

import importlib
import json
from importlib.metadata import version
from pathlib import Path

import pytest

from nitro_e.cli import rehearse
from nitro_e.cli.benchmark import engine as benchmark
from nitro_e.cli.benchmark.report import comparison, numbers

MODEL = "model: {preset: nitro-e-512, width: 64, heads: 2, groups: [1, 1, 1]}\n"
COMPONENTS = "codec: dc-ae-f32c32, text: {name: llama-3.2-1b, dtype: bfloat16}"
STAGES = {
    "pretrain": f"""
stage: {{kind: flow_matching, repa: {{tap: 1, width: 32}}}}
data: {{shards: [data/none/*.tar], resolution: 512}}
batch: {{global: 2048, per_device: 256}}
components: {{{COMPONENTS}, vision: dinov2-b14}}
engine: {{steps: 1000}}""",
    "distill": f"""
stage: {{kind: distill, preset: ladd_guided, teacher: runs/none@ema}}
data: {{shards: [data/none/*.tar], resolution: 512}}
batch: {{global: 1024, per_device: 128}}
components: {{{COMPONENTS}}}
engine: {{steps: 500, ema: {{beta: 0.9}}}}
sampling: {{steps: 4, guidance_scale: 1, sampler: multistep}}""",
    "prompts": f"""
stage: {{kind: distill, preset: pi_flow, teacher: runs/none@ema, prompts: {{source: none.jsonl}}}}
batch: {{global: 1024, per_device: 128}}
components: {{{COMPONENTS}}}
engine: {{steps: 500, ema: {{beta: 0.9}}}}
sampling: {{steps: 4, guidance_scale: 1, sampler: policy, resolution: 512}}""",
    "grpo": f"""
stage:
  kind: grpo
  prompts: {{source: geneval-train, num: 8}}
  rewards: [{{name: geneval, weight: 1.0}}]
  groups: 1
  group_size: 2
  updates: 1
  rollout: {{steps: 2, guidance_scale: 1, window: {{size: 1}}, per_device: 1}}
batch: {{per_device: 1}}
components: {{{COMPONENTS}}}
engine: {{steps: 100, precision: float32}}
sampling: {{resolution: 512}}""",
}


def recipe(folder: Path, stage: str) -> str:
    path = folder / f"{stage}.yaml"
    model = MODEL.replace("]}", "], policy: 3}") if stage == "prompts" else MODEL
    path.write_text(f"name: {stage}\n{model}{STAGES[stage]}\n")
    return str(path)


@pytest.mark.parametrize(
    ("stage", "computed", "encoded"),
    [
        ("pretrain", [], set()),
        pytest.param(
            "pretrain", ["latents", "text", "features"], {"codec", "text", "vision"}, marks=pytest.mark.slow
        ),
        pytest.param("distill", None, {"text"}, marks=pytest.mark.slow),
        pytest.param("prompts", None, set(), marks=pytest.mark.slow),  # embedded once, before
        pytest.param("grpo", None, {"text"}, marks=pytest.mark.slow),
    ],
)
def test_a_recipe_is_rehearsed_without_data_weights_or_the_stages_before(
    fresh_state, tmp_path, capsys, stage, computed, encoded
):
    path, figures = recipe(tmp_path, stage), tmp_path / "figures.json"
    arguments = [
        path,
        "--steps",
        "1",
        "--small-encoders",
        "--cpu-time",
        "--gpus",
        "4",
        "--price",
        "2",
        "--json",
        str(figures),
    ]
    arguments += [] if computed is None else ["--computed", *computed]
    arguments += ["--batch", "4"] if stage == "prompts" else []  # a chain of four steps
    assert rehearse.main(arguments) == 0
    found = json.loads(figures.read_text())
    assert {name.removeprefix("encode: ") for name in found["parts"] if "encode" in name} == encoded
    assert {"forward", "backward"} < set(found["parts"]) and all(
        value >= 0 for value in found["parts"].values()
    )
    sizes = {"pretrain": 1000 * 2048, "distill": 500 * 1024, "prompts": 500 * 1024, "grpo": 100 * 2}
    assert found["steps"] * found["global_batch"] == sizes[stage]
    assert found["checkpoint"] > 4 * found["parameters"]  # more than one copy of the weights in float32
    if stage in (
        "pretrain",
        "distill",
    ):  # (32, 16, 16) latents in half precision, and for pretraining text and features
        least = 2 * 32 * 16 * 16 + (
            2 * 128 * 2048 + 2 * 256 * 768 if stage == "pretrain" and not computed else 0
        )
        assert found["sample_bytes"] >= (least if not computed else 2000)
    out = capsys.readouterr().out
    hours = found["steps"] * found["global_batch"] * found["step"] / found["samples"] / 3600
    assert f"{hours / 4:,.1f} hours on 4 such devices" in out and f"{2 * hours:,.0f} in money" in out
    assert "memory" in out and "torch" in out


def test_whole_steps_of_a_recipe_for_every_kind_of_input(tmp_path, capsys, monkeypatch):
    def run(options):
        assert options.steps == 3 and options.config == "recipe.yaml"
        parts = {"wait": 0.1, "forward": 0.2, "backward": 0.4, "clip, optimiser, averages": 0.1}
        return rehearse.Rehearsal(
            "a", "b", 10, 4, 4, options.computed, 0.5, parts, 2.0, None, None, 1, 1, 1, 1
        )

    monkeypatch.setattr(rehearse, "run", run)
    arguments = [
        "--recipe",
        "recipe.yaml",
        "--steps",
        "3",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "a.json"),
    ]
    assert benchmark.main(arguments) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["inputs"] for row in rows] == list(benchmark.INPUTS) and rows[0]["ms"]["backward"] == 400
    assert (
        "batch 4, text computed: 500.0 ms a step (1.00 times all stored), 8 samples/s, 2 TFLOP/s"
        in capsys.readouterr().out
    )


def test_figures_are_compared_by_name():
    rows = [{"part": "text", "batch": 1, "seconds": 2.0}, {"part": "text", "batch": 8, "seconds": 3.0}]
    before = {"machine": {"name": "a", "torch": "2"}, "rows": rows, "memory_gb": 1.0}
    now = {"machine": {"name": "a", "torch": "3"}, "rows": [dict(rows[1], seconds=6.0)], "memory_gb": 1.5}
    assert dict(numbers(before)) == {
        "rows, text, 1, seconds": 2.0,
        "rows, text, 8, seconds": 3.0,
        "memory_gb": 1.0,
    }
    lines = comparison(now, before).splitlines()
    assert lines[0] == "not the same: torch was 2, is 3"
    assert lines[3:] == [
        "| rows, text, 8, seconds | 3 | 6 | 2.00 |",
        "| memory_gb | 1 | 1.5 | 1.50 |",
        "not compared: 1 figures that only the earlier file has, 0 that are new",
    ]


# what each kind measures, made up: the rest of the command is the real one
FIGURES = {
    "model": {
        "preset": "tiny-8",
        "rows": [{"task": "forward", "batch": 1, "milliseconds": 2.0}],
        "matmul": [1.0],
    },
    "sample": {
        "rows": [{"part": "text", "batch": 1, "way": "plain", "seconds": 2.0}],
        "settings": {"steps": 2},
    },
    "data": {"stream": 5.0, "stream / webdataset .decode()": 1.0},
    "engine": {name: {"wall": 1.0, "cpu": 2.0} for name in benchmark.VARIANTS},
}


@pytest.mark.parametrize("kind", list(FIGURES))
def test_every_benchmark_ends_with_machine_versions_memory_and_comparison(
    tmp_path, capsys, monkeypatch, kind
):
    module, file = importlib.import_module(f"nitro_e.cli.benchmark.{kind}"), tmp_path / "a.json"
    monkeypatch.setattr(module, "measure", lambda *_: FIGURES[kind])
    arguments = ["--presets", "micro-8"] if kind == "engine" else []
    assert module.main([*arguments, "--json", str(file)]) == 0
    said, record = capsys.readouterr().out, json.loads(file.read_text())
    assert record["machine"]["name"] in said and f"torch {version('torch')}" in said
    assert record["memory_gb"] > 0 and f"memory {record['memory_gb']:.2f} GB at most" in said
    assert module.main([*arguments, "--against", str(file)]) == 0
    said = capsys.readouterr().out
    assert "the same machine, versions and settings" in said and "memory_gb |" in said
    assert said.count("| 1.00 |\n") >= len(list(numbers(FIGURES[kind]))) and "not compared" not in said


def test_other_settings_are_named(tmp_path, capsys, monkeypatch):
    from nitro_e.cli.benchmark import model

    monkeypatch.setattr(model, "measure", lambda _: FIGURES["model"])
    file = str(tmp_path / "a.json")
    assert model.main(["--json", file]) == 0
    assert model.main(["--text-length", "7", "--batch", "1", "2", "--against", file]) == 0
    assert "not the same: batch was None, is [1, 2]; text_length was 128, is 7" in capsys.readouterr().out


def test_other_files_are_refused(tmp_path, capsys):
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--against", str(tmp_path / "other.json")])
    assert "was not written by --json of this command" in capsys.readouterr().err
