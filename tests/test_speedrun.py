"""The speedrun table: a row per run from scratch, from records that stay."""

import json
from pathlib import Path

import pytest
from test_train import RECIPE, samples

from nitro_e.cli import speedrun as tool
from nitro_e.data.making import write_shard
from nitro_e.studies.results import marks

ROW = {
    "revision": "abc",
    "recipe": "a.yaml x=1",
    "samples": 1000,
    "flops": 2e12,
    "cpu_seconds": 3.2,
    "parameters": 5,
    "score": "strict",
    "note": "a|b",
}


def test_rows_are_kept_and_sorted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    page = Path("docs/speedrun.md")
    begin, end = marks(tool.MARK)
    page.write_text(f"# Words before\n\n{begin}\nold\n{end}\n\nwords after\n")
    for name, value in (("slow", 0.5), ("fast", 0.8)):
        row = ROW | {"name": name, "value": [value, value - 0.1, value + 0.1]}
        monkeypatch.setattr(tool, "made", lambda options, row=row: row)
        assert tool.main([name, "a.yaml"]) == 0
    text = page.read_text()
    assert text.startswith("# Words before") and text.endswith("words after\n") and "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert (
        rows[0] == "| fast | strict 0.800 [0.700, 0.900] | 1,000 | 2.0 | 3 | 5 | `a.yaml x=1` | abc | a/b |"
    )
    assert rows[1].startswith("| slow |")
    assert [json.loads(line)["name"] for line in Path("docs/speedrun.jsonl").read_text().splitlines()] == [
        "slow",
        "fast",
    ]
    capsys.readouterr()
    assert (
        tool.main(["fast", "a.yaml"]) == 2
        and "has a row in docs/speedrun.jsonl already" in capsys.readouterr().err
    )
    page.write_text(f"{begin}{end}")
    assert tool.main(["x", "--rebuild"]) == 0 and page.read_text() == "\n".join(
        [begin, *text.split("\n")[3:7], end]
    )
    page.write_text("no place")
    assert tool.main(["x", "a.yaml"]) == 2 and "between which tables are put" in capsys.readouterr().err


def test_a_row_is_trained_scored_and_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "toy-000000.tar", samples())
    Path("recipe.yaml").write_text(RECIPE.replace("SHARDS", f"{tmp_path}/toy-*.tar"))
    arguments = [
        "tiny",
        "recipe.yaml",
        "engine.steps=1",
        "--num",
        "12",
        "--setting",
        "steps=2",
        "--table",
        "table.md",
    ]
    assert tool.main(arguments) == 0
    (row,) = tool.read(Path("table.jsonl"))
    assert row["recipe"] == "recipe.yaml engine.steps=1" and row["samples"] == 4 and row["prompts"] == 12
    assert row["score"] == "strict" and row["value"][0] == 0 < row["value"][2] and row["cpu_seconds"] > 1
    assert row["flops"] > 3 * 4 * row["parameters"]
    assert "| tiny | strict 0.000" in Path("table.md").read_text()
    assert tool.main(["other", "recipe.yaml", "init_from=shapes"]) == 2
    assert "a speedrun begins from nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["a/b", "recipe.yaml"], ["x", "nowhere.yaml"], ["x", "recipe.yaml", "--num", "0"]]
)
def test_refused(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    try:
        code = tool.main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2 and not list(tmp_path.iterdir())
