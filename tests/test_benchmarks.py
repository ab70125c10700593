"""Benchmarks with prompts of their own: the files as their authors publish them, DPG's score, whole runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import tiny_rewards
import torch
from PIL import Image
from test_evaluation import tiny_model

from nitro_e.cli import evaluate as tool
from nitro_e.config import ConfigError
from nitro_e.evaluation.benchmarks import HPSV2_STYLES, read_dpg, read_hpsv2, read_parti, read_prompts
from nitro_e.rewards import RewardConfig, build_rewards

# columns of the released dpg_bench.csv
DPG = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
QUESTIONS = [
    ("0", "a red cat beside a dog", 1, "0", "entity", "Is there a cat?"),
    ("0", "a red cat beside a dog", 2, "1", "attribute", "Is the cat red?"),
    ("0", "a red cat beside a dog", 3, "0", "entity", "Is there a dog?"),
    ("0", "a red cat beside a dog", 4, "1,3", "relation", "Is the cat beside the dog?"),
    ("x-7", "one blue box, alone", 1, "0", "entity", "Is there a box?"),
]


def write_dpg(path: Path) -> Path:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(DPG.split(","))
        for item, text, number, parents, kind, question in QUESTIONS:
            table.writerow([item, text, "", number, parents, kind, kind, "", question])
    return path


def write_hpsv2(folder: Path, num: int = 2) -> Path:
    folder.mkdir()
    for style in HPSV2_STYLES:
        (folder / f"{style}.json").write_text(json.dumps([f"{style} red cat {i}" for i in range(num)]))
    return folder


def write_parti(path: Path) -> Path:
    lines = ["Prompt\tCategory\tChallenge\tNote", "bond\tAbstract\tBasic\tx", "a red cat\tAnimals\tBasic\ty"]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_files_of_prompts_are_read_as_they_are_published(tmp_path):
    prompts = read_hpsv2(write_hpsv2(tmp_path / "hpsv2"))
    assert [p.info["tag"] for p in prompts] == 2 * list(HPSV2_STYLES) and prompts[4].text == "anime red cat 1"
    assert [(p.text, p.info["tag"]) for p in read_parti(write_parti(tmp_path / "parti.tsv"))] == [
        ("bond", "Abstract"),
        ("a red cat", "Animals"),
    ]
    first, second = read_dpg(write_dpg(tmp_path / "dpg.csv"))
    assert first.info["id"] == "0" and second.text == "one blue box, alone"
    assert [question["parents"] for question in first.info["questions"]] == [[], [1], [], [1, 3]]
    file = tmp_path / "image_reward.json"
    file.write_text(json.dumps([{"id": "a", "prompt": "a cat"}, {"id": "b", "prompt": "a dog"}]))
    assert [p.text for p in read_prompts(file)] == ["a cat", "a dog"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", '{"prompt": "no list"}', "no list of texts"),
        ("a.json", '["a", 3]', "no list of texts"),
        ("a.csv", "item_id,text\n1,2\n", "no columns"),
        ("a.csv", f"{DPG}\n0,t,,one,0,,,,q\n", ":2 has no whole numbers"),
        ("a.tsv", "Prompt\tNote\na\tb\n", "no column 'Category'"),
    ],
)
def test_bad_files_of_prompts(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    read = {"json": read_prompts, "csv": read_dpg, "tsv": read_parti}[name.split(".")[1]]
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / name)
    with pytest.raises(ConfigError, match="has no anime.json"):
        read_hpsv2(tmp_path)


@pytest.fixture
def answering(tmp_path) -> Path:
    return tiny_rewards.save_vqa(tmp_path / "vqa")


def test_dpg_counts_a_question_only_where_its_parents_are_right(tmp_path, answering, monkeypatch):
    """Written out by hand for every set of answers."""
    scorer = build_rewards([RewardConfig(name="dpg", path=str(answering))])
    scorer.load()
    dpg = scorer._columns[0].reward
    prompt = read_dpg(write_dpg(tmp_path / "dpg.csv"))[0]
    cases = {
        "yes yes yes yes": 4,
        "no yes yes yes": 1,
        "yes no yes yes": 3,
        "yes yes no yes": 2,
        "no no no no": 0,
    }
    for answers, right in cases.items():
        given = answers.split()
        monkeypatch.setattr(dpg, "answer", lambda *_, given=given: given)
        values = scorer(torch.zeros(1, 3, 32, 32), [prompt.text], [prompt.info]).values
        assert values.item() == right / 4 and scorer.said[0].count("no: ") == 4 - right
    with pytest.raises(ConfigError, match="dpg_bench.csv"):
        scorer(torch.zeros(1, 3, 32, 32), ["a cat"], [{}])


def test_answers_are_those_of_transformers_own_use(answering):
    """One question at a time, from the saved image, by the documented calls."""
    from transformers import BlipForQuestionAnswering, BlipProcessor

    model = BlipForQuestionAnswering.from_pretrained(answering).eval()
    processor = BlipProcessor.from_pretrained(answering)
    dpg = build_rewards([RewardConfig(name="dpg", path=str(answering), options={"batch_questions": 2})])
    dpg.load()
    torch.manual_seed(0)
    pixels = (torch.rand(3, 40, 40) * 255).round() / 127.5 - 1
    image = Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    questions = ["is there a cat", "is the dog red", "a red cat"]
    expected = []
    for question in questions:
        inputs = processor(images=image, text=question, return_tensors="pt")
        expected.append(
            processor.decode(model.generate(**inputs, max_new_tokens=10)[0], skip_special_tokens=True)
            .strip()
            .lower()
        )
    assert dpg._columns[0].reward.answer(pixels, questions) == expected


def test_benchmarks_run_and_continue(tmp_path, answering, capsys):
    tiny_rewards.save_clip(tmp_path / "clip")
    clip, out, model = str(tmp_path / "clip"), tmp_path / "out", str(tiny_model(tmp_path / "model"))
    parti, dpg = write_parti(tmp_path / "parti.tsv"), write_dpg(tmp_path / "dpg.csv")
    runs = {
        "hpsv2": [
            str(write_hpsv2(tmp_path / "hpsv2")),
            "--reward-path",
            clip,
            "--reward-option",
            f"base={clip}",
        ],
        "clipscore": [str(parti), "--reward-path", clip],
        "parti": [str(parti), "--reward", "clipscore", "--reward-path", clip],
        "dpg": [str(dpg), "--reward-path", str(answering)],
    }
    images = {"hpsv2": 8, "clipscore": 2, "parti": 2, "dpg": 8}
    tasks = {
        "hpsv2": set(HPSV2_STYLES),
        "clipscore": {"all"},
        "parti": {"Abstract", "Animals"},
        "dpg": {"all"},
    }
    for name, arguments in runs.items():
        command = [name, model, "--out", str(out / name), "--prompts", *arguments]
        assert tool.main([*command, "--draw-only"]) == 0
        files = {path: path.stat().st_mtime_ns for path in (out / name).rglob("*.png")}
        assert tool.main(command) == 0
        assert len(files) == images[name]
        assert {path: path.stat().st_mtime_ns for path in (out / name).rglob("*.png")} == files
        (result,) = json.loads((out / name / "results.json").read_text())["results"]
        (score,) = result["scores"].values()
        assert set(score["tasks"]) == tasks[name] and score["unscored"] == 0
    capsys.readouterr()
    assert tool.main(["dpg", model]) == 2 and "needs --prompts, dpg_bench.csv" in capsys.readouterr().err
    assert (
        tool.main(["parti", model, "--prompts", str(parti)]) == 2
        and "--reward NAME" in capsys.readouterr().err
    )
