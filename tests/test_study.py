"""tools/study.py: trains what is missing, scores everything on the same prompts, says which variant failed."""

import json
from pathlib import Path

import pytest
import yaml
from tiny import OPTIMIZER, optimizers_of

from nitro_e.cli import study as tool
from nitro_e.config import load
from nitro_e.model import EMMDiT
from nitro_e.model.pretrained import save_pretrained
from nitro_e.stages.recipe import RunConfig

ROOT = Path(__file__).parent.parent
RECIPE = "configs/shapes/3_grpo.yaml"
SMALL = [
    "model.preset=micro-8",
    "engine.steps=1",
    "batch.per_device=null",
    "engine.tracker=none",
    "engine.sample_every=0",
    "stage.groups=2",
    "stage.group_size=2",
    "stage.rollout.steps=6",
    "stage.rollout.per_device=4",
    "sampling.steps=2",
]


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A study of one variant of an untrained model, in an empty directory."""
    config = load(RunConfig, ROOT / RECIPE, [*SMALL, "init_from=null"])
    use = {
        "codec": {"name": "shapes-dc-ae"},
        "text": {"name": "shapes-llama"},
        "sampling": {"resolution": 64, "steps": 2, "grid": "linear"},
    }
    save_pretrained(EMMDiT(config.model), tmp_path / "base", use)
    plan = {
        "name": "tried",
        "base": str(tmp_path / "base"),
        "num": 12,
        "seeds": [3, 4],
        "settings": [{"guidance_scale": 1.0, "steps": 2}],
        "variants": {"base": {}, "grpo": {"recipe": str(ROOT / RECIPE), "set": SMALL}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.chdir(tmp_path)
    return plan


def test_a_study_trains_once_and_compares(plan, capsys, monkeypatch):
    assert tool.main(["study.yaml"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(Path("outputs/tried/results.json").read_text())
    assert [(row["variant"], len(row["scores"])) for row in rows] == [("base", 1), ("grpo", 2)]
    assert all(row["scores"][0]["strict"] == 0 for row in rows)  # nothing is drawn right by chance
    assert rows[0]["differences"][0]["strict"][0] == 0
    assert all(seconds > 1 for seconds in rows[1]["cpu_seconds"])
    assert "| grpo | guidance_scale 1, steps 2 | 0.000 | 0.000 0.000 |" in printed
    for seed in (3, 4):
        config = yaml.safe_load(Path(f"runs/tried/grpo-{seed}/config.yaml").read_text())
        assert config["seed"] == seed and config["init_from"] == plan["base"]
    monkeypatch.setattr(tool.os, "wait4", None)  # nothing is trained again
    assert tool.main(["study.yaml", "--only", "grpo"]) == 0
    assert "base" not in capsys.readouterr().out.splitlines()[2]


def test_a_failing_variant_is_named(plan, capsys):
    plan["variants"]["grpo"]["set"] = [*SMALL, "engine.precision=float16"]  # which a CPU cannot
    Path("study.yaml").write_text(yaml.safe_dump(plan | {"seeds": [3]}))
    assert tool.main(["study.yaml"]) != 0
    error = capsys.readouterr().err
    assert "grpo, seed 3" in error and "float16" in error


@pytest.mark.parametrize(
    "change, message",
    [
        ({"variants": {"a": {"set": ["x=1"]}}}, "recipe"),
        (
            {"variants": {"a": {"recipe": str(ROOT / RECIPE), "set": ["stage.groups=0"]}}},
            "variants.a: stage.groups",
        ),
        ({"variants": {"a": {"recipe": "nowhere.yaml"}}}, "variants.a: config file 'nowhere.yaml'"),
        ({"settings": []}, "settings is empty"),
        ({"benchmark": "shape"}, "benchmark: unknown benchmark 'shape', did you mean 'shapes'?"),
        ({"benchmark": "prompts.txt"}, "benchmark: 'prompts.txt' is a file of prompts"),
        (
            {"settings": [{"step": 2}]},
            "variants.base: unknown key 'sampling.step', did you mean 'sampling.steps'?",
        ),
        (
            {"settings": [{"steps": 2, "height": 7}]},
            "variants.base: 7x64 px: both sides must be multiples of 8",
        ),
        (
            {"variants": {"a": {"recipe": str(ROOT / RECIPE), "set": SMALL, "settings": [{"steps": 0}]}}},
            "variants.a: sampling.steps must be at least 1",
        ),
        (
            {"variants": {"a": {"recipe": str(ROOT / RECIPE), "set": [*SMALL, "model.width=96"]}}},
            "variants.a: 'BASE' is of another architecture (model.width was 48, is 96)",
        ),
        (
            {"variants": {"a": {"recipe": str(ROOT / RECIPE), "set": [*SMALL, "init_from=runs/gone"]}}},
            "variants.a: init_from: 'runs/gone' does not exist",
        ),
        (
            {
                "variants": {
                    "a": {
                        "recipe": str(ROOT / "configs/shapes/2_finetune.yaml"),
                        "set": ["model.preset=micro-8", *OPTIMIZER],
                    }
                }
            },
            "variants.a: data.shards: missing shards: data/shapes",
        ),
        ({"reference": {"sampler": "euller"}}, "base: sampling.sampler: 'euller'"),
        ({"seed": [1]}, "seeds"),
        ({"base": "nowhere"}, "'nowhere' does not exist"),
    ],
)
def test_a_wrong_study_is_refused_at_once(plan, capsys, change, message):
    Path("study.yaml").write_text(yaml.safe_dump(plan | change))
    assert tool.main(["study.yaml"]) == 2
    assert message.replace("BASE", plan["base"]) in capsys.readouterr().err
    assert not Path("runs").exists()


def test_studies_load():
    for path in Path("tools/studies").glob("*.yaml"):
        plan = load(tool.Study, path)
        for variant in plan.variants.values():
            if variant.recipe:
                load(RunConfig, variant.recipe, [*variant.set, *optimizers_of(variant.recipe)])
