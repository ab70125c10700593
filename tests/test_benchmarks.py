"""Benchmarks with prompts of their own: the files as their authors publish them, DPG's score, whole runs."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny_rewards
import torch
from PIL import Image
from test_distances import networks, random_inception, write_images
from test_evaluation import tiny_model
from test_report import Page

from nitro_e.cli import evaluate as tool
from nitro_e.config import ConfigError
from nitro_e.data.prompts import Prompt
from nitro_e.evaluation import distances, intervals, results
from nitro_e.evaluation.benchmarks import (
    BENCHMARKS,
    HPSV2_STYLES,
    benchmark,
    read_dpg,
    read_hpsv2,
    read_parti,
    read_prompts,
)
from nitro_e.evaluation.images import ImageGenerator, ScoredImage
from nitro_e.rewards import RewardConfig, Scorer, build_rewards
from nitro_e.rewards.dpg import by_category, counting

TESTS = Path(__file__).parent

# columns of the released dpg_bench.csv
DPG = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
QUESTIONS = [
    ("0", "a red cat beside a dog", 1, "0", "entity - whole", "Is there a cat?"),
    ("0", "a red cat beside a dog", 2, "1", "attribute - color", "Is the cat red?"),
    ("0", "a red cat beside a dog", 3, "0", "entity - whole", "Is there a dog?"),
    ("0", "a red cat beside a dog", 4, "1,3", "relation - spatial", "Is the cat beside the dog?"),
    ("x-7", "one blue box, alone", 1, "0", "entity - whole", "Is there a box?"),
]


def write_dpg(path: Path) -> Path:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(DPG.split(","))
        for item, text, number, parents, kind, question in QUESTIONS:
            table.writerow([item, text, "", number, parents, *kind.split(" - "), f"{kind} (x, y)", question])
    return path


def write_hpsv2(folder: Path, num: int = 2) -> Path:
    folder.mkdir()
    for style in HPSV2_STYLES:
        (folder / f"{style}.json").write_text(json.dumps([f"{style} red cat {i}" for i in range(num)]))
    return folder


def write_parti(path: Path) -> Path:
    lines = [
        "Prompt\tCategory\tChallenge\tNote",
        "bond\tAbstract\tBasic\tx",
        "a red cat\tAnimals\tComplex\ty",
    ]
    lines += ["space\tAbstract\tBasic\tx", "a blue dog\tAnimals\tComplex\ty"]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_files_of_prompts_are_read_as_they_are_published(tmp_path):
    prompts = read_hpsv2(write_hpsv2(tmp_path / "hpsv2"))
    assert [p.info["tag"] for p in prompts] == 2 * list(HPSV2_STYLES) and prompts[4].text == "anime red cat 1"
    assert [(p.text, p.info["tag"]) for p in read_parti(write_parti(tmp_path / "parti.tsv"))] == [
        ("bond", "Abstract"),
        ("a red cat", "Animals"),
        ("space", "Abstract"),
        ("a blue dog", "Animals"),
    ]
    first, second = read_dpg(write_dpg(tmp_path / "dpg.csv"))
    assert first.info["id"] == "0" and second.text == "one blue box, alone"
    assert [question["parents"] for question in first.info["questions"]] == [[], [1], [], [1, 3]]
    kinds = ["entity - whole", "attribute - color", "entity - whole", "relation - spatial"]
    assert [question["category"] for question in first.info["questions"]] == kinds
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


def official_dpg(answers: list[dict[int, float]], parents: dict[int, list[int]]) -> tuple[float, list[dict]]:
    """The arithmetic of compute_dpg_bench.py on one prompt: its score, and the answers before the rule of parents."""
    scores, before = [], []
    for given in answers:
        found = dict(given)
        before.append(dict(given))
        for number, above in parents.items():
            if any(parent != 0 and found[parent] == 0 for parent in above):
                found[number] = 0.0
        scores.append(sum(found.values()) / len(found))
    return sum(scores) / len(scores), before


def test_dpg_is_the_authors_arithmetic(monkeypatch):
    """Random trees of questions: grandparents count, order counts, and categories do not look at parents."""
    monkeypatch.setattr(intervals, "RESAMPLES", 2)
    chance = random.Random(0)
    kinds = ["entity - whole", "entity - part", "attribute - color", "other - count", "global"]
    differ = 0
    for _ in range(300):
        number = chance.randrange(1, 9)
        parents = {
            i: chance.sample(range(1, i), min(i - 1, chance.randrange(3))) or [0]
            for i in range(1, number + 1)
        }
        category = {i: chance.choice(kinds) for i in parents}
        answers = [{i: float(chance.random() < 0.6) for i in parents} for _ in range(4)]
        score, before = official_dpg(answers, parents)
        questions = [
            {"id": i, "text": "", "parents": [p for p in above if p], "category": category[i]}
            for i, above in parents.items()
        ]
        yes = [[answer[i] == 1 for i in parents] for answer in answers]
        found = [np.mean(counting(questions, each)) for each in yes]
        assert np.mean(found) == pytest.approx(score)
        differ += any(counting(questions, each) != each for each in yes)
        pooled, broad = defaultdict(list), defaultdict(list)
        for each in before:
            for i, value in each.items():
                pooled[category[i]].append(value)
                broad[category[i].split("-")[0].strip()].append(value)
        rows = [
            ScoredImage(0, k, "", {"dpg": 0.5}, "", 0.0, {"dpg": by_category(questions, each)})
            for k, each in enumerate(yes)
        ]
        tables = results.summarize([Prompt("", {})], rows, "dpg").breakdowns
        expected = {"category": broad, "detailed category": pooled}
        for kind, groups in expected.items():
            assert {name: each.value for name, each in tables[kind].items()} == pytest.approx(
                {name: np.mean(values) for name, values in groups.items()}
            )
    assert differ > 100


def test_interval_of_a_share_covers_the_truth(monkeypatch):
    """Prompts ask 1 to 9 questions and differ in difficulty: 95 % of the intervals hold the expected share."""
    monkeypatch.setattr(intervals, "RESAMPLES", 300)
    rng, covered = np.random.default_rng(0), []
    for _ in range(300):
        total = rng.integers(1, 10, 100)
        right = rng.binomial(total, rng.beta(2, 1, 100))
        found = intervals.share(right, total)
        covered.append(found.low <= 2 / 3 <= found.high)
        assert found.value == pytest.approx(right.sum() / total.sum()) and found.num == 100
    assert 0.92 <= np.mean(covered) <= 0.98
    all_right = intervals.share([4, 2], [4, 2])
    assert all_right.value == all_right.high == 1 and all_right.low < 1
    assert np.isnan(intervals.share([0], [0]).value)


# ---- every benchmark by the command


class Case(NamedTuple):
    """A benchmark made small: what the command is given besides the model, and what is expected of the page."""

    arguments: list[str]
    images: int
    tasks: set[str]
    said: tuple[str, ...] = ()  # on the page


def case(name: str, folder: Path) -> Case:
    """Write the benchmark's files in their authors' layouts, and random weights of the real classes."""
    clip, prompts = folder / "clip", folder / "prompts.txt"
    folder.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(f"a red cat {i}\n" for i in range(4)))
    if name == "shapes":
        tasks = {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
        return Case(["--num", "6"], 6, tasks, ("GenEval", "saw "))
    if name == "geneval":
        tiny_rewards.save_mask2former(folder / "detector")
        tiny_rewards.save_clip(clip)
        weights = ["--reward-path", str(folder / "detector"), "--reward-option", f"clip={clip}"]
        return Case(
            ["--num", "2", *weights], 8, {"single_object"}, ("&gt;=1, found 0", "2 of its 553 prompts")
        )
    if name in distances.DISTANCES:
        write_images(folder / "real", 5)
        weights = random_inception(folder) if name == "fid" else networks(folder)[name]
        given = [
            "--prompts",
            str(prompts),
            "--reference",
            str(folder / "real"),
            "--reward-path",
            str(weights),
        ]
        return Case(given, 4, {"all"}, ("5 images of",))
    if name == "hpsv2":
        tiny_rewards.save_hps(folder / "hps", clip)
        given = ["--prompts", str(write_hpsv2(folder / "hpsv2")), "--reward-path", str(folder / "hps")]
        said = ("8 of its 3,200 prompts",)
        return Case([*given, "--reward-option", f"base={clip}"], 8, set(HPSV2_STYLES), said)
    if name == "imagereward":
        tiny_rewards.save_image_reward(folder / "weights")
        file = folder / "benchmark-prompts.json"
        file.write_text(json.dumps([{"id": str(i), "prompt": f"a red cat {i}"} for i in range(2)]))
        given = ["--prompts", str(file), "--reward-path", str(folder / "weights")]
        given += ["--reward-option", f"tokenizer={folder / 'weights' / 'tokenizer'}"]
        return Case(given, 20, {"all"}, ("2 of its 100 prompts",))
    if name == "dpg":
        weights = tiny_rewards.save_vqa(folder / "vqa")
        given = ["--prompts", str(write_dpg(folder / "dpg.csv")), "--reward-path", str(weights)]
        said = ("by category", "by detailed category", "attribute - color", "no: Is there a cat?")
        return Case(given, 8, {"all"}, said)
    tiny_rewards.save_clip(clip)
    given = ["--prompts", str(prompts), "--reward-path", str(clip)]
    if name == "pickscore":
        return Case([*given, "--reward-option", f"tokenizer={clip}"], 4, {"all"})
    if name == "clipscore":
        return Case(given, 4, {"all"})
    assert name == "parti"
    given[1] = str(write_parti(folder / "parti.tsv"))
    said = ("by challenge", "Complex", "4 of its 1,632 prompts")
    return Case([*given, "--reward", "clipscore"], 4, {"Abstract", "Animals"}, said)


def assert_complete(made: Case, name: str, out: Path) -> None:
    """results.json has the scores and intervals, and report.html every image with its score."""
    record = json.loads((out / "results.json").read_text())
    (result,) = record["results"]
    title, score = next(iter(result["scores"].items()))
    assert result["images"] == made.images and score["unscored"] == 0 and set(score["tasks"]) == made.tasks
    assert score["overall"]["low"] <= score["overall"]["value"] <= score["overall"]["high"]
    assert record["environment"]["packages"]["torch"] and (name == "shapes" or title in record["judges"])
    text = (out / "report.html").read_text()
    page = Page(text)
    assert sum(tag == "img" for tag in page.tags) == made.images
    shown = [value for tag, key, value in page.attributes if tag == "img" and key == "title"]
    assert all(value.startswith(f"{title} ") for value in shown) and results.shown(
        intervals.Estimate(**score["overall"])
    ) in page.text["body"].replace("&gt;", ">")
    assert all(each in text for each in made.said), [each for each in made.said if each not in text]


# the others in test_evaluation and test_distances; all of them below, killed
@pytest.mark.parametrize("name", ["hpsv2", "imagereward", "pickscore", "clipscore", "dpg", "parti"])
def test_benchmarks_draw_then_score(tmp_path, name):
    made, out = case(name, tmp_path), tmp_path / "out"
    command = [name, str(tiny_model(tmp_path / "model")), *made.arguments, "--steps", "1", "--out", str(out)]
    assert tool.main([*command, "--draw-only"]) == 0 and not (out / "results.json").exists()
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(files) == made.images
    assert tool.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == files
    assert_complete(made, name, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "emoji"])  # test_retrieval has it
def test_every_benchmark_survives_kills(tmp_path, monkeypatch, name):
    """SIGKILL of a fresh interpreter while it draws and while it scores; what was kept is not made again."""
    made, out = case(name, tmp_path), tmp_path / "out"
    command = [name, str(tiny_model(tmp_path / "model")), *made.arguments, "--steps", "1"]
    command += ["--batch-size", "2", "--out", str(out)]
    drawn, scored, featured = [], [], []
    generate, score, extract = ImageGenerator.__call__, Scorer.__call__, distances.Extractor.forward
    monkeypatch.setattr(distances, "CHUNK", 2)
    monkeypatch.setattr(
        ImageGenerator, "__call__", lambda self, *given: drawn.extend(given[1]) or generate(self, *given)
    )
    monkeypatch.setattr(
        Scorer,
        "__call__",
        lambda self, *given: scored.extend(given[1] * bool(self.names)) or score(self, *given),
    )
    monkeypatch.setattr(
        distances.Extractor, "forward", lambda self, batch: featured.extend(batch) or extract(self, batch)
    )

    def killed(point: str, number: int, *arguments: str) -> None:
        script = [
            sys.executable,
            str(TESTS / "killed_evaluation.py"),
            point,
            str(number),
            *command,
            *arguments,
        ]
        paths = {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
        done = subprocess.run(script, env=os.environ | paths, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]

    killed("save_png", 2, "--draw-only")
    assert len(list(out.rglob("*.png"))) == 1
    assert tool.main([*command, "--draw-only"]) == 0 and len(drawn) == made.images - 1
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(stamps) == made.images and not scored and not featured

    distance = name in distances.DISTANCES
    if distance:  # two of five real images are kept
        killed("save_tensors", 2)
        kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
        assert len(kept) == 1
    else:  # of the second batch one line is whole and one is cut short
        killed("append_lines", 2)
    assert tool.main(command) == 0 and len(drawn) == made.images - 1
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == stamps
    if distance:
        assert len(featured) == made.images + 5 - 2
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
    else:
        assert len(scored) == made.images - 3
    assert_complete(made, name, out)
    del scored[:], featured[:]
    assert tool.main(command) == 0 and not scored and not featured and len(drawn) == made.images - 1


def test_what_is_missing_to_the_published_benchmark():
    whole = benchmark("geneval")
    assert whole.shortfall(553) == "" and benchmark("shapes").shortfall(10) == ""
    fewer = benchmark("geneval", num=10, per_prompt=1)
    assert fewer.shortfall(10) == "not the whole benchmark: 10 of its 553 prompts, 1 of its 4 images each"


def test_benchmarks_without_their_files(tmp_path, capsys):
    parti = write_parti(tmp_path / "parti.tsv")
    assert tool.main(["dpg", "shapes"]) == 2 and "needs --prompts, dpg_bench.csv" in capsys.readouterr().err
    assert tool.main(["parti", "shapes", "--prompts", str(parti)]) == 2
    assert "--reward NAME" in capsys.readouterr().err
