"""The page of results is what its records say, and no figure of the README stands outside them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIGURE = re.compile(r"(?<![\d.])[+-]?0\.\d{3}(?!\d)")


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
