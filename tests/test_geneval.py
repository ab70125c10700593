"""GenEval: its rules against 1,106 recorded verdicts of the official evaluator, its prompts, our training
prompts."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from nitro_e.config import ConfigError, from_dict
from nitro_e.data.prompts import Prompt, PromptsConfig, load_prompts
from nitro_e.evaluation.images import ScoredImage
from nitro_e.evaluation.results import summarize
from nitro_e.rewards.geneval import generator as prompts
from nitro_e.rewards.geneval import tasks as requests
from nitro_e.rewards.geneval.rules import (
    Detection,
    confident,
    flow_grpo,
    fraction,
    is_correct,
    reasons,
    relations,
)
from nitro_e.rewards.geneval.tasks import Request, Thing, caption, meaning, read

CASES = Path(__file__).parent / "data" / "geneval_cases.jsonl.xz"  # two per test prompt, random detections


@pytest.fixture(scope="module")
def cases() -> list[dict]:
    return [json.loads(line) for line in lzma.open(CASES, "rt")]


def detections(case: dict) -> list[Detection]:
    return [Detection(d["class"], d["color"], tuple(d["box"]), d["score"]) for d in case["detections"]]


# --- rules ---


def test_verdicts_are_the_official_ones(cases):
    summary, *cases = cases
    assert len(cases) == 1106
    verdicts = []
    for case in cases:
        found = confident(detections(case), case["metadata"])
        verdicts.append(is_correct(found, case["metadata"]))
        assert verdicts[-1] == case["correct"], case
        part = fraction(found, case["metadata"])
        assert 0 <= part <= 1 and (part == 1) == case["correct"], case
    scores = summarized([case["metadata"]["tag"] for case in cases], verdicts)
    expected = summary["summary"]["per_task"] | {"overall": summary["summary"]["overall"]}
    assert scores == pytest.approx(expected, abs=1e-12)


def summarized(tags: list[str], verdicts: list[bool]) -> dict[str, float]:
    """Each task's and the overall score, as the evaluation counts them."""
    rows = [
        ScoredImage(i, 0, "", {"official": float(verdict)}, "", 0.0) for i, verdict in enumerate(verdicts)
    ]
    score = summarize([Prompt("", {"tag": tag}) for tag in tags], rows, "official")
    return {task: estimate.value for task, estimate in score.tasks.items()} | {"overall": score.overall.value}


def test_every_rule_decides_some_recorded_case(cases):
    """Without thresholds, without exclusion or with the wrong ones, recorded verdicts would differ."""
    cases = cases[1:]

    def differ(change) -> int:
        return sum(
            is_correct(*change(detections(case), case["metadata"])) != case["correct"] for case in cases
        )

    assert differ(lambda found, record: (found, record)) > 0
    assert differ(lambda found, record: (confident(found, record | {"tag": "colors"}), record)) > 0
    assert differ(lambda found, record: (confident(found, record), record | {"exclude": []})) > 0
    uncolored = [thing for thing in cases if "color" in thing["metadata"]["include"][0]]
    assert any(not case["correct"] for case in uncolored)


def test_only_the_best_sixteen_above_the_threshold_count():
    record = {"tag": "counting", "include": [{"class": "cup", "count": 2}]}
    crowd = [Detection("cup", None, (0, 0, 1, 1), 0.9 + i / 1000) for i in range(20)]
    kept = confident(crowd, record)
    assert [thing.score for thing in kept] == [0.9 + i / 1000 for i in range(19, 3, -1)]
    assert confident([Detection("cup", None, (0, 0, 1, 1), 0.9)], record) == []  # above, not at
    assert len(confident([Detection("cup", None, (0, 0, 1, 1), 0.31)], record | {"tag": "colors"})) == 1


CUPS = {
    "tag": "counting",
    "include": [{"class": "cup", "count": 2}],
    "exclude": [{"class": "cup", "count": 3}],
}
RED = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]}
LEFT = {
    "tag": "position",
    "include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
}


def thing(name: str, x: float = 0, color: str | None = None) -> Detection:
    return Detection(name, color, (x, 0, x + 10, 10))


@pytest.mark.parametrize(
    "record, found, said",
    [
        (CUPS, [thing("cup")], ["expected cup>=2, found 1"]),
        (CUPS, [thing("cup")] * 3, ["expected cup<3, found 3"]),
        (RED, [thing("cup", 0, "blue")], ["expected red cup>=1, found 0 red; and 1 blue"]),
        (LEFT, [thing("cup"), thing("dog", 50)], ["expected dog left of target, found right of"]),
        (LEFT, [thing("dog")], ["expected cup>=1, found 0", "no target for dog to be left of"]),
        (LEFT, [thing("cup", 50), thing("dog")], []),
    ],
)
def test_reasons_are_those_of_the_official_tool(record, found, said):
    assert reasons(found, record) == said


@pytest.mark.parametrize(
    "record, found, score",
    [
        (CUPS, [thing("cup")] * 2, 1),
        (CUPS, [thing("cup")] * 5, -1 / 2),  # no lower bound
        (RED, [thing("cup", 0, "blue")], 1 / 2),
        (RED, [thing("cup", 0, "red")] * 2, 0),  # one too many: (0 + 0) / 2
        (LEFT, [thing("cup", 50), thing("dog")], 1),
        (LEFT, [thing("cup"), thing("dog", 50)], 3 / 4),  # 1, 1, 0 and 1
        (LEFT, [thing("dog")], (0 + 1 + 0) / 3),
        (LEFT, [thing("cup", 50), thing("dog"), thing("dog", 90)], (1 + 0 + 0) / 3),
        (
            {"include": [{"class": "cup", "count": 2, "color": "red"}]},
            [thing("cup", 0, "red"), thing("cup")],
            3 / 4,
        ),
    ],
)
def test_the_reward_of_flow_grpo_by_hand(record, found, score):
    assert flow_grpo(found, record) == pytest.approx(score)


def reward_server(objects: dict[str, list[Detection]], record: dict) -> float:
    """The arithmetic of `evaluate_reward` in Flow-GRPO's reward server, written here from its source."""
    values: list[float] = []
    matches: list[list[Detection] | None] = []
    for wanted in record.get("include", []):
        there, matched = objects.get(wanted["class"], []), True
        values.append(1 - abs(wanted["count"] - len(there)) / wanted["count"])
        if len(there) != wanted["count"]:
            matched = False
            if "color" in wanted or "position" in wanted:
                values.append(0.0)
        else:
            if "color" in wanted:
                colors = [thing.color for thing in there]
                values.append(1 - abs(wanted["count"] - colors.count(wanted["color"])) / wanted["count"])
                matched = colors.count(wanted["color"]) == wanted["count"]
            if "position" in wanted and matched:
                relation, target = wanted["position"]
                if matches[target] is None:
                    matched = False
                    values.append(0.0)
                else:
                    for one in there:
                        for other in matches[target]:
                            if relation not in relations(one.box, other.box):
                                matched = False
                                values.append(0.0)
                                break
                        if not matched:
                            break
                    values.append(1.0)
        matches.append(there if matched else None)
    return sum(values) / len(values) if values else 0.0


def test_flow_grpos_reward_on_all_recorded_cases(cases, record_property):
    """Equal in every case; the default reward, which forgives a surplus, is another in many."""
    same, different = 0, 0
    for case in cases[1:]:
        record = case["metadata"]
        found = confident(detections(case), record)
        objects: dict[str, list[Detection]] = {}
        for one in found:
            objects.setdefault(one.name, []).append(one)
        ours = flow_grpo(found, record)
        same += ours == pytest.approx(reward_server(objects, record), abs=1e-12)
        different += ours != pytest.approx(fraction(found, record), abs=1e-12)
    record_property(
        "GenEval cases in which `mode: flow_grpo` is Flow-GRPO's reward", f"{same:,} of {len(cases) - 1:,}"
    )
    record_property(
        "GenEval cases in which `mode: graded` is another reward", f"{different:,} of {len(cases) - 1:,}"
    )
    assert same == len(cases) - 1 and different > 100


@pytest.mark.parametrize(
    "record, found, part",
    [
        (CUPS, [], 0),
        (CUPS, [thing("cup")], 1 / 2),
        (CUPS, [thing("cup")] * 2, 1),
        (CUPS, [thing("cup")] * 3, 1 / 2),
        (CUPS, [thing("cup")] * 16, 0),  # never below 0
        (CUPS, [thing("cup")] * 2 + [thing("dog")], 1),  # other objects are allowed
        (RED, [thing("cup", 0, "red")], 1),
        (RED, [thing("cup", 0, "blue")], 1 / 2),
        (RED, [], 0),
        (LEFT, [thing("cup", 50), thing("dog")], 1),
        (LEFT, [thing("cup"), thing("dog", 50)], 2 / 3),
        (LEFT, [thing("dog")], 1 / 3),
        (LEFT, [thing("cup", 50), thing("dog"), thing("dog", 90)], 1),  # a surplus is allowed
    ],
)
def test_fractions_by_hand(record, found, part):
    assert fraction(found, record) == pytest.approx(part)
    assert is_correct(found, record) == (part == 1)


def test_overall_is_the_mean_of_tasks_not_of_images():
    scores = summarized(["colors", "colors", "colors", "counting"], [1, 1, 0, 0])
    assert scores == pytest.approx({"colors": 2 / 3, "counting": 0, "overall": 1 / 3})


# --- prompts ---


def test_test_prompts_are_the_benchmark(cases):
    expected = [case["metadata"] for case in cases[1::2]]
    assert prompts.test_prompts() == expected and len(expected) == 553
    assert [prompt.info for prompt in load_prompts(PromptsConfig(source="geneval"))] == expected


def equivalents(prompt: str) -> set[str]:
    """All wordings of the same image: objects swapped, relations mirrored. Words only."""
    mirrored = {
        "left of": "right of",
        "right of": "left of",
        "above": "below",
        "below": "above",
        "and": "and",
    }
    found = {prompt}
    for joint, other in mirrored.items():
        first, found_joint, second = prompt.removeprefix("a photo of ").partition(f" {joint} ")
        if found_joint:
            found.add(f"a photo of {second} {other} {first}")
    return found


@pytest.mark.parametrize("objects", ["all", "seen", "unseen"])
def test_training_prompts_ask_for_no_tested_image(cases, objects):
    tested = {text for case in cases[1::2] for text in equivalents(case["metadata"]["prompt"])}
    drawn = prompts.train_prompts(6000 if objects == "all" else 1500, 1, objects)
    texts = {record["prompt"] for record in drawn}
    assert not texts & tested
    assert len(texts) > len(drawn) / 4
    for record in drawn:
        names = {wanted["class"] for wanted in record["include"]}
        assert names <= set(prompts.classes(objects))
        assert len(names) == len(record["include"])
        colors = [wanted["color"] for wanted in record["include"] if "color" in wanted]
        assert len(set(colors)) == len(colors) and not (colors and "person" in names)


def test_some_drawn_requests_are_tested_ones(monkeypatch):
    """The exclusion above is not empty: without it the same draws do hit the benchmark."""
    tested = {record["prompt"] for record in prompts.test_prompts()}
    monkeypatch.setattr(prompts, "_tested", lambda: frozenset())
    hits = [record for record in prompts.train_prompts(3000, 1) if record["prompt"] in tested]
    assert {record["tag"] for record in hits} >= {"counting", "colors"}


def test_training_prompts_have_their_shares_and_depend_on_seed_and_index_alone():
    drawn = prompts.train_prompts(8500)
    for tag, share in {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1}.items():
        number = sum(record["tag"] == tag for record in drawn)
        assert abs(number - 500 * share) < 4 * (500 * share) ** 0.5
    assert prompts.train_prompts(10) == drawn[:10]
    assert prompts.train_prompts(10, seed=1) != drawn[:10]


def test_reading_a_prompt_gives_back_what_was_asked():
    for record in prompts.train_prompts(500, 3) + prompts.test_prompts():
        request = read(record["prompt"])
        assert caption(request) == record["prompt"] and requests.metadata(request) == record
    for text in ("a photo of a unicorn", "a cup", "a photo of five cups", "a photo of an cup", ""):
        with pytest.raises(ConfigError, match="no prompt of GenEval"):
            read(text)


def test_equal_meaning_is_symmetric():
    cup, dog = Thing("cup", "red"), Thing("dog", "blue")
    assert meaning(Request("", (cup, dog))) == meaning(Request("", (dog, cup)))
    assert meaning(Request("", (cup, dog), "above")) == meaning(Request("", (dog, cup), "below"))
    assert meaning(Request("", (cup, dog), "left of")) == meaning(Request("", (dog, cup), "right of"))
    assert meaning(Request("", (cup, dog), "above")) != meaning(Request("", (dog, cup), "above"))
    assert meaning(Request("", (cup, dog))) != meaning(
        Request("", (Thing("cup", "blue"), Thing("dog", "red")))
    )


# --- prompt sources ---


def test_sources_by_name():
    for source in ("shapes-train", "shapes-heldout", "geneval-train"):
        drawn = load_prompts(PromptsConfig(source=source, num=24, seed=5))
        assert len(drawn) == 24 and all(prompt.text == prompt.info["prompt"] for prompt in drawn)
        assert {prompt.info["tag"] for prompt in drawn} <= set(requests.TASKS)
        assert drawn == load_prompts(PromptsConfig(source=source, num=24, seed=5))
        assert drawn != load_prompts(PromptsConfig(source=source, num=24, seed=6))
    seen = {prompt.info["seen"] for prompt in load_prompts(PromptsConfig(source="shapes-train", num=60))}
    assert seen == {True}


def test_sources_from_files(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n  ein Vögelchen \n")
    assert load_prompts(PromptsConfig(source=str(tmp_path / "p.txt"))) == [
        ("a cat", {}),
        ("ein Vögelchen", {}),
    ]
    record = {"tag": "colors", "include": [], "prompt": "a red cup"}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + '\n{"prompt": "plain"}\n')
    assert load_prompts(PromptsConfig(source=str(tmp_path / "p.jsonl"))) == [
        ("a red cup", record),
        ("plain", {}),
    ]
    assert len(load_prompts(PromptsConfig(source=str(tmp_path / "p.jsonl"), num=1))) == 1


def test_several_sources_follow_each_other(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    mixed = from_dict(
        PromptsConfig, {"source": ["geneval-train", str(tmp_path / "p.txt")], "num": 1, "seed": 4}
    )
    first = load_prompts(PromptsConfig(source="geneval-train", num=1, seed=4))
    assert load_prompts(mixed) == [*first, ("a cat", {})]


@pytest.mark.parametrize(
    "data, message",
    [
        ({"source": []}, "source is empty"),
        ({"source": ["geneval", "shape"]}, "source: 'shape' is neither"),
        ("shapes-tran", "source: 'shapes-tran' is neither .* did you mean 'shapes-train'"),
        ({"source": "geneval", "num": 0}, "num must be at least 1"),
        ({"source": "shapes-train", "objects": "seen"}, "objects: 'shapes-train' has no such option"),
        ("nowhere.txt", "file 'nowhere.txt' does not exist"),
        ("empty.txt", "is empty"),
        ("bad.jsonl", r"bad.jsonl:2 is not valid JSON"),
        ("lacking.jsonl", r'lacking.jsonl:1 has no "prompt"'),
    ],
)
def test_bad_sources_are_one_line(tmp_path, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    Path("lacking.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match=message) as error:
        load_prompts(from_dict(PromptsConfig, data, "prompts"))
    assert "\n" not in str(error.value)
