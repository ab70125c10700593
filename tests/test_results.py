"""The page of results is what its records say, and no figure of the README stands outside them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIGURE = re.compile(r"(?<![\d.])[+-]?0\.\d{3}(?!\d)")
# with a unit, so that it says something measured or counted: "1 min", "3.2M", "8 minutes", "34.6 dB", "4e-07", "2,400"
QUANTITY = re.compile(
    r"(?<![\w.])(?:\d[\d.,]* ?(?:s|min|minutes|hours|dB|GB|MB|%|times|M)|0\.\d\d|\d[\d.]*e-\d+|\d+,\d{3})(?!\w)"
)
NUMBER = re.compile(r"(?<![\w.,])\d+(?:[.,]\d+)*(?:e-?\d+)?")
WORDS = dict(zip("one two three four five six seven eight nine ten".split(), range(1, 11)))


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("results_tool", ROOT / "tools" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_rebuilt_by_one_command(tool):
    assert tool.PAGE.read_text() == tool.page(), "run `make results`"


def figures_of(records: dict) -> set[str]:
    return {
        figure.lstrip("+") for record in records.values() for figure in FIGURE.findall(json.dumps(record))
    }


def test_figures_of_the_readme_stand_in_a_record(tool):
    known = figures_of(tool.records())
    readme = (ROOT / "README.md").read_text()
    missing = [figure for figure in FIGURE.findall(readme) if figure.lstrip("+") not in known]
    assert len(FIGURE.findall(readme)) > 10 and not missing


def test_other_quantities_of_the_readme_stand_on_the_page(tool):
    """Times, sizes, counts, published scores: each with its unit as a record has it, numbers in words too."""
    readme = re.sub(r"\(https?:[^)]*\)", "", (ROOT / "README.md").read_text())
    spelled = re.sub(rf"\b({'|'.join(WORDS)}) (?=s |min|hours)", lambda m: f"{WORDS[m[1]]} ", readme)
    page = tool.page()
    found = [quantity.group().replace("−", "-") for quantity in QUANTITY.finditer(spelled)]
    missing = [each for each in found if not re.search(rf"(?<![\d.,]){re.escape(each)}(?!\w)", page)]
    assert len(found) > 8 and not missing, missing


def test_records_say_where_and_how_they_were_measured(tool):
    for name, record in tool.records().items():
        assert name == "unverified" or record.get("measured"), f"{name}: on what?"
        assert name == "unverified" or record.get("commands") or record.get("source"), f"{name}: how?"
        assert ("date" in record) == ("commit" in record), name


def test_figures_of_a_record_stand_in_the_file_that_explains_them(tool):
    """One truth: who measures anew changes both."""
    checked = 0
    for name, record in tool.records().items():
        if "source" not in record:
            continue
        text = "\n".join((ROOT / "docs" / file).read_text() for file in record["source"])
        known = set(NUMBER.findall(text.replace("e-0", "e-"))) | set(re.findall(r"\d+", text))
        cells = [
            number
            for row in record["rows"]
            for cell in row
            for number in NUMBER.findall(cell.replace("e-0", "e-"))
        ]
        missing = [number for number in cells if number not in known]
        assert not missing, f"{name}: {missing} are not in {record['source']}"
        checked += len(cells)
    assert checked > 300


def test_figures_of_the_pictures_stand_in_a_record(tool):
    known = figures_of(tool.records())
    numbers = json.loads((ROOT / "docs" / "img" / "figures.json").read_text())
    scores = [score for points in numbers["few_steps"].values() for _, score in points]
    drawn = [f"{score:.3f}" for score in scores] + FIGURE.findall(json.dumps(numbers["stages"]))
    assert len(drawn) > 10 and not [figure for figure in drawn if figure not in known]


def test_rows_of_an_evaluation(tool):
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75, "num": 4}
    results = [
        {"checkpoint": {"source": f"runs/{name}"}, "folder": name,
         "sampling": {"guidance_scale": 3.0, "steps": 20, "sampler": "euler"},
         "scores": {"strict": {"overall": estimate, "seen": None, "unseen": estimate}}}
        for name in "ab"
    ]  # fmt: skip
    difference = {"value": -0.25, "low": -0.5, "high": 0.125, "num": 4}
    differences = [{"ours": "a", "theirs": "b", "scores": {"strict": {"overall": difference}}}]
    rows = list(tool.evaluation_rows({"results": results, "differences": differences}))
    assert rows[0] == ["a", "guidance 3, 20 steps, euler", "0.500 [0.250, 0.750]", "–", "0.500"]
    assert rows[2] == ["a minus b", "guidance 3, 20 steps, euler, paired", "-0.250 [-0.500, +0.125]", "", ""]


def test_recorded_figures_of_tests(tool, tmp_path, record_property):
    file = tmp_path / "found.xml"
    file.write_text(
        '<testsuites><testsuite><testcase name="a"><properties><property name="velocity" value="4e-7"/></properties>'
        "</testcase></testsuite></testsuites>"
    )
    assert list(tool.test_figures(file)) == [["velocity", "4e-7"]]


def test_a_study_gives_its_rows_from_the_page_that_holds_its_table(tool, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "| a | b |\n|---|---|\n| 7 | 8 |\n\n<!-- begin mine -->\n| variant | score | s |\n| --- | --- | --- |\n"
        "| x | 0.5 (0.4 0.6) | 3 |\n| y | – | 4 |\n\nA note.\n\n| s |\n| --- |\n| 9 |\n<!-- end mine -->\n"
    )
    assert tool.marked_rows(page, "mine", ["variant", "s", "score"]) == [
        ["x", "3", "0.5 (0.4 0.6)"],
        ["y", "4", "–"],
    ]
    with pytest.raises(tool.ConfigError, match=r"no column \['steps'\]; it has"):
        tool.marked_rows(page, "mine", ["steps"])
    with pytest.raises(tool.ConfigError, match="no marks <!-- begin yours -->"):
        tool.marked_rows(page, "yours", [])
