"""tools/study.py: trains what is missing, compares everything in pairs, says which variant failed."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import yaml
from test_train import RECIPE as TOY
from test_train import samples
from tiny import OPTIMIZER, optimizers_of

from nitro_e.cli import study as tool
from nitro_e.cli import train
from nitro_e.config import load
from nitro_e.data.making import write_shard
from nitro_e.evaluation import intervals
from nitro_e.model import EMMDiT, describe
from nitro_e.model.pretrained import save_pretrained
from nitro_e.record import run_folder
from nitro_e.record.run_config import write_config
from nitro_e.stages import validation
from nitro_e.stages.recipe import RunConfig
from nitro_e.studies import plan as plans
from nitro_e.studies import training
from nitro_e.studies.plan import Study
from nitro_e.studies.record import Record, to_train

ROOT = Path(__file__).parent.parent
RECIPE = "configs/shapes/3_grpo_clipped.yaml"
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
    rows = json.loads(Path("outputs/tried/results.json").read_text())["scores"]
    assert [(row["variant"], row["seeds"]) for row in rows] == [("base", [None]), ("grpo", [3, 4])]
    assert all(row["parts"][0]["scores"]["strict"] == 0 for row in rows)  # nothing is drawn right by chance
    assert rows[0]["differences"][0]["value"] == 0
    assert all(spent["cost"]["cpu_seconds"] > 1 for spent in rows[1]["spent"])
    assert "| grpo | guidance_scale 1, steps 2 | 0.000 | 0.000 0.000 |" in printed
    for seed in (3, 4):
        config = yaml.safe_load(Path(f"runs/tried/grpo-{seed}/config.yaml").read_text())
        assert config["seed"] == seed and config["init_from"] == plan["base"]
    monkeypatch.setattr(training.os, "wait4", None)  # nothing is trained again
    assert tool.main(["study.yaml", "--only", "grpo"]) == 0
    assert "base" not in capsys.readouterr().out.splitlines()[2]
    assert tool.main(["study.yaml", "variants.grpo.set=[stage.optim.lr=1]"]) == 2
    assert "runs/tried/grpo-3 is of other keys" in capsys.readouterr().err


def test_a_record_stands_for_the_runs_of_other_machines(plan, capsys, monkeypatch):
    """Seed 3 is measured on one machine, seed 4 on another; both, and a third without any run, write the same table."""
    assert tool.main(["study.yaml", "--record", "all.jsonl"]) == 0
    capsys.readouterr()
    table = Path("outputs/tried/table.md").read_text()
    assert tool.main(["study.yaml", "seeds=[3]", "--tables", "--record", "part.jsonl"]) == 0
    assert Path("outputs/tried/table.md").read_text() != table
    shutil.move("runs/tried/grpo-3", "elsewhere")
    assert tool.main(["study.yaml", "--tables", "--record", "part.jsonl"]) == 0
    assert Path("outputs/tried/table.md").read_text() == table
    assert "0.000 (0.000 0.000)" in table and "In brackets the seeds" in table
    # the base, and each seed, once
    assert len(Path("part.jsonl").read_text().splitlines()) == 3
    shutil.rmtree("runs")
    shutil.rmtree("outputs")
    before = Path("part.jsonl").read_text()
    assert tool.main(["study.yaml", "--tables", "--record", "part.jsonl"]) == 0
    assert Path("outputs/tried/table.md").read_text() == table
    assert Path("part.jsonl").read_text() == before and not Path("outputs/tried/base").exists()
    with monkeypatch.context() as patch:
        patch.setattr(training.os, "wait4", None)  # nothing is trained
        assert tool.main(["study.yaml", "--record", "part.jsonl"]) == 0
        assert tool.main(["study.yaml", "--record", "part.jsonl", "--run", "1"]) == 0
    capsys.readouterr()
    assert tool.main(["study.yaml", "--record", "part.jsonl", "--list"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["recorded"] * 2
    assert Path("outputs/tried/table.md").read_text() == table
    # how fast the others were trained does not matter; the base takes no overrides
    faster = "add=[engine.precision=float32, engine.compile=true]"
    assert tool.main(["study.yaml", "--tables", "--record", "part.jsonl", faster]) == 0
    assert Path("outputs/tried/table.md").read_text() == table
    # another setting is not known, and there is nothing to measure it on
    assert tool.main(["study.yaml", "--tables", "--record", "part.jsonl", "num=13"]) == 2
    assert (
        "part.jsonl: 'base', seed None was measured with num 12, the study has 13" in capsys.readouterr().err
    )
    assert tool.main(["study.yaml", "--tables", "--record", "part.jsonl", "diversity={num: 9}"]) == 2
    assert "was measured with diversity None, the study has {'num': 9, " in capsys.readouterr().err
    assert tool.main(["study.yaml", "--tables", "--record", "part.jsonl", "variants.grpo.set=[seed=1]"]) == 2
    error = capsys.readouterr().err  # it names what differs, not all that is the same
    assert "'grpo', seed 3 was measured with overrides ['model.preset=micro-8', " in error
    assert "the study has ['seed=1']" in error and "init_from" not in error
    Path("part.jsonl").write_text('{"variant": "grpo"}\n')
    assert tool.main(["study.yaml", "--tables", "--record", "part.jsonl"]) == 2
    assert "part.jsonl:1 is no line of a study's record" in capsys.readouterr().err


def test_differences_of_seeds_are_averaged_with_their_ends():
    found = intervals.over_seeds([intervals.Estimate(0.1, 0.0, 0.3, 9), intervals.Estimate(0.2, 0.1, 0.5, 9)])
    assert found == pytest.approx((0.15, 0.05, 0.4, 9))


def test_what_a_variant_needs_comes_first_once_and_is_counted(plan, capsys, monkeypatch):
    """The order, the first weights and the CPU seconds of a chain of trainings; only the trainings are pretended."""
    plan["variants"] = {
        "last": {"recipe": str(ROOT / RECIPE), "set": SMALL, "after": "middle", "needs": ["table", "more"]},
        "middle": {"recipe": str(ROOT / RECIPE), "set": SMALL, "after": "first", "needs": ["table"]},
        "first": {"recipe": str(ROOT / RECIPE), "set": SMALL},
    }
    plan["prepare"] = {"table": "describe --help", "more": "study --help"}
    plan |= {
        "seeds": [3],
        "settings": [{"guidance_scale": 1.0, "steps": 1}],
        "diversity": {"num": 2, "per_prompt": 2},
    }
    Path("study.yaml").write_text(yaml.safe_dump(plan))
    ran = []

    def run(trainer, trials, recipes):
        for each in trials:
            ran.append(each.folder.name)
            model = each.folder / "checkpoints/step-0000001"
            model.mkdir(parents=True)
            for name in ("model", "ema"):
                (model / name).symlink_to(plan["base"])
            (model / "meta.json").write_text("{}")
            run_folder.write_status(each.folder, "done", 1)
            (each.folder / "cpu_seconds.json").write_text("7.5")
            lines = [
                {"step": 0, "event": "notes", "trained_beside": 1234},
                {"step": 1, "memory_gb": 2.0, "samples_per_second": 1.0},
            ]
            (each.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return []

    monkeypatch.setattr(training.Trainer, "run", run)
    assert tool.main(["study.yaml", "--only", "last", "--record", "last.jsonl"]) == 0
    printed = capsys.readouterr().out
    assert ran == ["first-3", "middle-3", "last-3"]
    study = load(Study, "study.yaml")
    assert plans.trial(study, "last", 3).config.init_from == "runs/tried/middle-3@ema"
    spent = {
        name: json.loads(Path(f"runs/tried/prepare-{name}.json").read_text()) for name in ("table", "more")
    }
    assert all(each["done"] and each["cpu_seconds"] > 0 for each in spent.values())
    whole = sum(each["cpu_seconds"] for each in spent.values()) + 3 * 7.5
    assert training.seconds_before(study, plans.trial(study, "last", 3)) == pytest.approx(whole - 7.5)
    row = next(line for line in printed.splitlines() if line.startswith("| last | 0.000 |"))
    assert row.endswith(f"| 1 | 8 | {whole:.0f} | 2.0 | 1,234 | table, more, middle |")
    # nothing is right, so nothing is known of its spread
    assert "| – |" in next(
        line for line in printed.splitlines() if line.startswith("| last | guidance_scale 1")
    )
    assert "<circle" in Path("outputs/tried/steps.svg").read_text()
    assert f"last: 0.000 at {whole:g}"[:13] in Path("outputs/tried/compute.svg").read_text()
    # a page gets the line per variant, not that per setting
    Path("page.md").write_text("<!-- begin tried -->\n<!-- end tried -->\n")
    assert tool.main(["study.yaml", "--only", "last", "--tables", "--into", "page.md"]) == 0
    assert Path(
        "page.md"
    ).read_text() == f"<!-- begin tried -->\n{printed.partition(row)[0].splitlines()[-2]}\n" + (
        f"{printed.partition(row)[0].splitlines()[-1]}\n{row}\n<!-- end tried -->\n"
    )
    # what a recorded training begins with is trained again only for one that is not recorded
    planned = plans.trials(study, ["first", "middle", "last"])
    known = Record(study, Path("last.jsonl"))
    assert to_train(study, planned[2:], known) == []
    assert to_train(study, planned, known) == planned[:2]
    study = load(Study, "study.yaml", ["seeds=[3,4]"])
    planned = plans.trials(study, ["first", "middle", "last"])
    assert [each.folder.name for each in to_train(study, planned, Record(study, Path("last.jsonl")))] == [
        "first-3", "middle-3", "first-4", "middle-4", "last-4",
    ]  # fmt: skip
    monkeypatch.setattr(training.subprocess, "Popen", None)  # a command that is done is not run again
    assert training.make_ready(study, ["table"]) == ""


def test_jobs_that_need_the_same_make_it_once(plan):
    """Two fresh processes at the same time, as array jobs are: one runs the command, the other waits for it."""
    plan["prepare"] = {"table": "describe --help"}
    Path("study.yaml").write_text(yaml.safe_dump(plan))
    code = (
        "from nitro_e.config import load; from nitro_e.studies import training; from nitro_e.studies.plan import Study; "
        "print(repr(training.make_ready(load(Study, 'study.yaml', []), ['table'])))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    jobs = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [job.communicate(timeout=300)[0] for job in jobs]
    assert [output.splitlines()[-1] for output in outputs] == ["''", "''"]
    assert sorted(output.count("prepare table:") for output in outputs) == [0, 1]


def test_a_failing_command_is_named(plan):
    study = load(Study, "study.yaml", ['prepare={"x": "describe --no-such-flag"}'])
    assert training.make_ready(study, ["x"]) == "prepare.x: nitro-e describe --no-such-flag ended with 2"
    assert not json.loads(Path("runs/tried/prepare-x.json").read_text())["done"]


def test_a_failing_variant_is_named(plan, capsys):
    plan["variants"]["grpo"]["set"] = [*SMALL, "engine.precision=float16"]  # which a CPU cannot
    Path("study.yaml").write_text(yaml.safe_dump(plan | {"seeds": [3]}))
    assert tool.main(["study.yaml"]) != 0
    error = capsys.readouterr().err
    assert "grpo, seed 3" in error and "float16" in error


@pytest.mark.parametrize(
    "change, message",
    [
        ({"variants": {"a": {"set": ["x=1"]}}}, "variants.a.set: overrides need a recipe"),
        ({"base": None, "reference": {}}, "variants.base: without a base it needs a recipe"),
        ({"equal": ["flops"]}, "equal: trainings from a base have their own steps"),
        ({"compare_to": "grpo"}, "compare_to: with a base"),
        ({"grid": {"model.width": [48, 48]}, "recipe": str(ROOT / RECIPE)}, "would be called 'width=48'"),
        (
            {"variants": {"a": {"recipe": str(ROOT / RECIPE), "set": ["stage.groups=0"]}}},
            "variants.a: stage.groups",
        ),
        ({"variants": {"a": {"recipe": "nowhere.yaml"}}}, "variants.a: config file 'nowhere.yaml'"),
        ({"settings": []}, "settings is empty"),
        ({"benchmark": "shape"}, "benchmark: unknown benchmark 'shape', did you mean 'shapes'?"),
        ({"benchmark": "prompts.txt"}, "benchmark: 'prompts.txt' says not what scores"),
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
        (
            {"variants": {"a": {"recipe": str(ROOT / RECIPE), "after": "b"}}},
            "variants.a.after: 'b' is no other",
        ),
        (
            {"variants": {name: {"recipe": str(ROOT / RECIPE), "after": "ba"[name == "b"]} for name in "ab"}},
            "variants.a.after: 'a' is no other",
        ),
        (
            {
                "variants": {
                    "a": {"recipe": str(ROOT / RECIPE), "seeds": [9]},
                    "b": {"recipe": str(ROOT / RECIPE), "after": "a"},
                }
            },
            "variants.b.after: 'a' has no training of seed 3",
        ),
        ({"variants": {"a": {"recipe": str(ROOT / RECIPE), "needs": ["x"]}}}, "variants.a.needs: 'x' is not"),
        ({"prepare": {"x": "describe 'a"}}, "prepare.x: "),
        (
            {"base": None, "reference": {}, "recipe": str(ROOT / RECIPE), "set": SMALL, "diversity": {}},
            "diversity: ",
        ),
        ({"reference": {"sampler": "euller"}}, "base: sampling.sampler: 'euller'"),
        ({"seed": [1]}, "seeds"),
        ({"seeds": [1, 0, 1]}, "seeds: [1, 0, 1] has a seed twice"),
        (
            {
                "seeds": [3],
                "variants": {
                    "a": {"recipe": str(ROOT / RECIPE), "set": [*SMALL, "engine.ema=null"]},
                    "b": {"recipe": str(ROOT / RECIPE), "set": SMALL, "after": "a"},
                },
            },
            "variants.b: after: 'a' keeps no average to begin with",
        ),
        ({"base": "nowhere"}, "'nowhere' does not exist"),
    ],
)
def test_a_wrong_study_is_refused_at_once(plan, capsys, change, message):
    Path("study.yaml").write_text(yaml.safe_dump(plan | change))
    assert tool.main(["study.yaml"]) == 2
    assert message.replace("BASE", plan["base"]) in capsys.readouterr().err
    assert not Path("runs").exists()


def test_names_of_variants_may_look_like_yaml(plan):
    variant = {"recipe": str(ROOT / RECIPE), "set": SMALL}
    plan["variants"] = {"wide #1": variant, "a: b": {**variant, "after": "wide #1"}, "plain-2": variant}
    Path("study.yaml").write_text(yaml.safe_dump(plan))
    study = load(Study, "study.yaml")
    for name in study.variants:
        found = plans.trial(study, name, 3)
        assert found.config.folder == found.folder and found.config.name.endswith(name)
    assert plans.trial(study, "a: b", 3).config.init_from.endswith("/wide #1-3@ema")
    assert plans.trial(study, "plain-2", 3).overrides[0] == f"run=runs/{study.name}/plain-2-3"


def test_studies_load():
    for path in Path("tools/studies").glob("*.yaml"):
        plan = load(Study, path)
        for variant in plan.variants.values():
            if variant.recipe:
                load(
                    RunConfig,
                    variant.recipe,
                    [*variant.set, *optimizers_of(Path(variant.recipe), *variant.set)],
                )


# ---- from scratch


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A study without a base: a deeper variant at equal steps, FLOPs and seconds, and a grid of two rates."""
    write_shard(tmp_path / "toy-000000.tar", samples())
    write_shard(tmp_path / "held-000000.tar", samples(10))
    (tmp_path / "recipe.yaml").write_text(TOY.replace("SHARDS", f"{tmp_path}/toy-*.tar"))
    plan = {
        "name": "fresh",
        "recipe": "recipe.yaml",
        "seeds": [0, 1, 2],
        "set": ["engine.ema=null", "engine.steps=12"],
        "validation": {"shards": ["held-*.tar"], "samples": 10, "times": [0.25, 0.75], "every": 100},
        "variants": {
            "base": {},
            "deep": {"set": ["model.groups=[1, 6, 1]"], "equal": ["steps", "flops", "seconds"]},
        },
        "grid": {"stage.optim.lr": [1e-3, 4e-3]},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.chdir(tmp_path)
    return plan


def pretend(each: plans.Trial, values: np.ndarray, speed: float) -> None:
    """Leave the files of a finished training, with validation losses `values` (images, times)."""
    each.folder.mkdir(parents=True)
    write_config(each.config, each.folder, resumed=False)
    run_folder.write_status(each.folder, "done", each.config.engine.steps)
    (each.folder / "cpu_seconds.json").write_text("7.5")
    lines = [{"attempt": 1, "time": 0.0, "step": step, "samples_per_second": speed} for step in (1, 2, 3)]
    lines[0]["samples_per_second"] = 1.0  # of the warm-up
    (each.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = [f"held:{index}" for index in range(len(values))]
    validation.write(each.folder / validation.FILE, validation.Losses(keys, [0.25, 0.75], values))


def test_equal_steps_flops_and_seconds(fresh, capsys):
    plan = load(Study, "study.yaml")
    assert list(plan.variants) == ["base", "deep", "lr=0.001", "lr=0.004"]
    assert plan.variants["lr=0.004"].set == ("engine.ema=null", "engine.steps=12", "stage.optim.lr=0.004")
    more = load(Study, "study.yaml", ["add=[engine.precision=float32]"]).variants
    assert all(
        more[name].set == (*plan.variants[name].set, "engine.precision=float32") for name in plan.variants
    )
    planned = plans.trials(plan, list(plan.variants))
    # the first seed of everything first, and one training for what is the same
    assert [each.folder.name for each in planned[:5]] == [
        "base-0",
        "deep-0",
        "deep.flops-0",
        "lr=0.001-0",
        "lr=0.004-0",
    ]
    assert len(planned) == 15
    base, deep, fewer = planned[:3]
    assert [each.config.seed for each in planned[::5]] == [0, 1, 2]
    assert {each.config.name for each in planned} == {"fresh"}  # on which the order of the data depends
    flops = [each.config.flops_per_step for each in (base, deep)]
    assert flops == [4 * 3 * describe.total(each.config.model, (8, 8), 16).flops for each in (base, deep)]
    assert fewer.config.engine.steps == round(12 * flops[0] / flops[1]) < 12
    assert tool.main(["study.yaml", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 15 and listed[2].split()[:2] == ["2", "runs/fresh/deep.flops-0"]
    pretend(base, np.zeros((1, 2)), 100.0)
    pretend(deep, np.zeros((1, 2)), 40.0)
    assert training.at_equal_time(plan, "deep", 0).config.engine.steps == round(12 * 40 / 100)


def test_losses_are_compared_in_pairs(fresh, capsys):
    """Tables and JSON of made-up trainings, against formulas written out here."""
    variants = {"base": {}, "deep": {"set": ["model.groups=[1, 6, 1]"], "equal": ["steps", "flops"]}}
    Path("study.yaml").write_text(yaml.safe_dump(fresh | {"grid": {}, "variants": variants}))
    plan = load(Study, "study.yaml")
    rng = np.random.default_rng(0)
    images = rng.uniform(0.5, 1.5, (50, 2))
    shift = {
        "base-0": 0.0,
        "base-1": 0.01,
        "base-2": -0.01,
        "deep-0": -0.1,
        "deep-1": -0.11,
        "deep.flops-0": -0.02,
    }
    noise = {name: rng.normal(0, 0.02, images.shape) for name in shift}
    for each in plans.trials(plan, list(plan.variants)):
        if each.folder.name in shift:
            pretend(each, images + shift[each.folder.name] + noise[each.folder.name], 50.0)
    Path("page.md").write_text("before\n<!-- begin fresh -->\nold\n<!-- end fresh -->\nafter\n")
    assert tool.main(["study.yaml", "--tables", "--into", "page.md"]) == 0  # the others are left open
    table = capsys.readouterr().out
    record = json.loads(Path("outputs/fresh/results.json").read_text())
    base, deep, fewer = record["losses"]
    means = {name: float((images + shift[name] + noise[name]).mean()) for name in shift}
    assert deep["losses"] == pytest.approx([means["deep-0"], means["deep-1"]]) and deep["seeds"] == [0, 1]
    assert base["differences"] == [] and base["difference"]["value"] is None
    # paired by image: the spread of images drops out
    pair = (shift["deep-1"] + noise["deep-1"] - shift["base-1"] - noise["base-1"]).mean(axis=1)
    found = deep["differences"][1]
    assert found["value"] == pytest.approx(pair.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * pair.std() / math.sqrt(50), rel=0.15)
    # over seeds: the pooled spread of five trainings in two groups, one alone
    groups = [[means["base-0"], means["base-1"], means["base-2"]], [means["deep-0"], means["deep-1"]]]
    spread = math.sqrt((2 * np.var(groups[0], ddof=1) + np.var(groups[1], ddof=1)) / 3)
    for row, count in ((deep, 2), (fewer, 1)):
        reach = scipy.stats.t.ppf(0.975, 3) * spread * math.sqrt(1 / count + 1 / 3)
        value = np.mean(row["losses"]) - np.mean(groups[0])
        assert row["difference"]["low"] == pytest.approx(
            value - reach, abs=1e-6
        )  # losses are kept to six digits
        assert row["difference"]["high"] == pytest.approx(value + reach, abs=1e-6)
    assert fewer["equal"] == "flops" and fewer["costs"][0]["flops"] == pytest.approx(
        base["costs"][0]["flops"], rel=0.1
    )
    # from a record the tables are the same, without the runs; only the curves need them
    assert tool.main(["study.yaml", "--tables", "--record", "fresh.jsonl"]) == 0
    text = Path("outputs/fresh/table.md").read_text()
    assert len(Path("fresh.jsonl").read_text().splitlines()) == len(shift)
    shutil.move("runs", "elsewhere")
    assert tool.main(["study.yaml", "--tables", "--record", "fresh.jsonl"]) == 0
    assert Path("outputs/fresh/table.md").read_text() == text
    shutil.move("elsewhere", "runs")
    assert base["costs"][0] | {"flops": 0, "parameters": 0} == {
        "steps": 12,
        "samples": 48,
        "parameters": 0,
        "flops": 0,
        "cpu_seconds": 7.5,
        "samples_per_second": 50.0,
        "memory_gb": None,
        "trained_beside": None,
    }
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == ["variant", "---", "base", "deep", "deep"]
    assert f"{means['deep-0']:.4f} {means['deep-1']:.4f}" in lines[3] and "10 images" not in table
    assert (
        Path("page.md").read_text()
        == f"before\n<!-- begin fresh -->\n{Path('outputs/fresh/table.md').read_text()}<!-- end fresh -->\nafter\n"
    )
    svg = Path("outputs/fresh/differences.svg").read_text()
    assert svg.count("<circle") == 2 and "deep, equal flops" in svg and "<script" not in svg
    assert "validation loss" in Path("outputs/fresh/curves.html").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"compare_to": "bare"}, "compare_to: 'bare' is no variant (base, deep, lr=0.001, lr=0.004)"),
        ({"set": ["engine.stepz=1"]}, "variants.base: unknown key 'engine.stepz'"),
        ({"validation": {"shards": ["toy-*.tar"]}}, "variants.base: validation.shards: '"),
        ({"validation": None}, "settings is empty"),
        ({"settings": [{"steps": 2, "resolution": 63}]}, "variants.base: "),
        ({"equal": ["time"]}, "equal[0]: 'time' is not one of steps, flops, seconds"),
        ({"recipe": str(ROOT / "configs/shapes/3_grpo_clipped.yaml"), "set": [], "validation": None, "settings": [{"steps": 2}], "grid": {}, "variants": {"a": {"equal": ["flops"]}}}, "variants.a: equal: flops: they are counted for"),
    ],
)  # fmt: skip
def test_a_wrong_study_from_scratch_is_refused_at_once(fresh, capsys, change, message):
    Path("study.yaml").write_text(yaml.safe_dump(fresh | change))
    assert tool.main(["study.yaml"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_numbers_of_runs_are_checked(fresh, capsys):
    assert tool.main(["study.yaml", "--run", "15"]) == 2
    assert "--run 15: the study has the trainings 0 to 14" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_study_goes_on(fresh, tmp_path):
    """SIGTERM to the command ends its trainings with a save; the same command continues them, to the same weights."""
    plan = fresh | {
        "grid": {},
        "variants": {"base": {"seeds": [0]}},
        "set": ["engine.ema=null", "engine.steps=30", "engine.save_every=1000"],
    }
    del plan["variants"]["base"]["seeds"]
    Path("study.yaml").write_text(yaml.safe_dump(plan | {"seeds": [0, 1]}))
    command = [sys.executable, "-m", "nitro_e.cli", "study", "study.yaml", "--jobs", "2"]
    process = subprocess.Popen(
        command, env={**training.os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )
    lines = tmp_path / "runs/fresh/base-0/metrics.jsonl"
    while not (lines.is_file() and '"loss"' in lines.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130 and b"run the same command again" in process.stderr.read()
    status = run_folder.read_status(tmp_path / "runs/fresh/base-0")
    assert status["state"] == "preempted" and 0 < status["step"] < 30
    assert tool.main(["study.yaml", "--jobs", "2"]) == 0
    assert train.main(["recipe.yaml", "run=alone", "name=fresh", *plan["set"], "seed=0"]) == 0
    one, other = (
        run_folder.model_folder(run) / "model.safetensors" for run in ("alone", "runs/fresh/base-0")
    )
    assert one.read_bytes() == other.read_bytes()
    assert re.search(r"\| base \| steps \| 30 \|", Path("outputs/fresh/table.md").read_text())
