"""Build docs/results.md, the page of all measured figures, from the records in docs/results/*.json.

    python tools/results.py                                                  docs/results.md (`make results`)
    python tools/results.py --add stages outputs/evaluate/*/results.json     take scores of `nitro-e evaluate`
    python tools/results.py --add parity parity.xml                          take figures of tests (pytest --junitxml)

A record is one table: title, about, head, rows; where it was measured (`measured`), when and at which revision it was
written down (`date`, `commit`), in which files of docs/ it is explained (`source`), and by which `commands`. `--add` fills in
rows, commands, measured, date and commit. A record of a study has no rows: `table` names the marks between which `nitro-e
study --into` writes its table in `source`, and the columns that are shown. Other records (benchmarks) are written by hand
in the same form, from the files that their commands write. The first section is counted anew each time. Figures in README.md and in
docs/img/figures.json must stand in a record, and those of a record in its source: tests/test_results.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from nitro_e.config import ConfigError, from_dict
from nitro_e.model import ModelConfig
from nitro_e.model.describe import parts, total, usual_grid
from nitro_e.record.environment import git_commit

DOCS = Path(__file__).parent.parent / "docs"
RECORDS, PAGE = DOCS / "results", DOCS / "results.md"
# in the order of the page; other records follow by name
ORDER = (
    "stages",
    "few_steps",
    "distill",
    "distill_costs",
    "distill_pairs",
    "grpo",
    "emoji",
    "learning",
    "demo",
    "speedrun",
    "ablations",
    "gpu",
    "sampling",
    "sampling_float32",
    "approximations",
    "model_speed",
    "attention_speed",
    "rehearsal",
    "training",
    "data",
    "stored_text",
    "encoders",
    "export",
    "first_use",
)
LAST = ("reliability", "parity", "precision", "unverified")
PRESETS = ("nitro-e-512", "nitro-e-1024", "tiny-8")
TEXT_LENGTH = 128

Record = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--add", nargs="+", metavar=("NAME", "FILE"), help="a record's name, then files to take its rows from"
    )
    options = parser.parse_args()
    if options.add:
        name, *files = options.add
        record = load(RECORDS / f"{name}.json") | take([Path(file) for file in files])
        (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page())
    print(PAGE)


def load(path: Path) -> Record:
    """Read a record; a new one has its name as the title."""
    record = json.loads(path.read_text()) if path.exists() else {"title": path.stem, "about": ""}
    if "table" in record:
        record["rows"] = marked_rows(DOCS / record["source"][0], **record["table"])
    return record


def records() -> dict[str, Record]:
    """Load all records in the order of the page."""
    names = sorted(path.stem for path in RECORDS.glob("*.json"))
    between = [name for name in names if name not in (*ORDER, *LAST)]
    return {name: load(RECORDS / f"{name}.json") for name in (*ORDER, *between, *LAST) if name in names}


# ---- rows from what commands write


def marked_rows(page: Path, mark: str, columns: Sequence[str]) -> list[list[str]]:
    """Read these columns of the first table between `<!-- begin MARK -->` and `<!-- end MARK -->`."""
    text = page.read_text()
    begin, end = f"<!-- begin {mark} -->\n", f"<!-- end {mark} -->"
    if begin not in text or end not in text:
        raise ConfigError(f"{page} has no marks {begin.strip()} and {end}; put them where the table belongs")
    lines = text.partition(begin)[2].partition(end)[0].strip().splitlines()
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), lines))
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    missing = [name for name in columns if name not in head]
    if missing:
        raise ConfigError(f"{page}: the table {mark} has no column {missing}; it has {head}")
    return [[row[head.index(name)] for name in columns] for row in rows]


def take(files: Sequence[Path]) -> Record:
    """Make rows of evaluations (.json) or of recorded test figures (.xml)."""
    if not files:
        raise SystemExit("--add: name the files to take rows from")
    date = time.strftime("%Y-%m-%d", time.gmtime(max(file.stat().st_mtime for file in files)))
    if files[0].suffix == ".xml":
        rows = [row for file in files for row in test_figures(file)]
        return {"head": ["figure", "measured"], "rows": rows, "date": date, "commit": git_commit()}
    found = [json.loads(file.read_text()) for file in files]
    settings = [each["environment"] for each in found]
    rows = {tuple(row): list(row) for each in found for row in evaluation_rows(each)}
    score = next(iter(found[0]["results"][0]["scores"]))
    return {
        "head": ["weights", "setting", score, "seen", "unseen"],
        "rows": list(rows.values()),
        "commands": [
            re.sub(r"'(nitro-e \w+)' \w+|( --out \S+)", r"\1", each["command"]) for each in settings
        ],
        "measured": measured(settings[0]),
        "date": date,
        "commit": settings[0]["git"],
    }


def measured(environment: dict[str, Any]) -> str:
    packages = environment["packages"]
    return f"{environment['device']}; torch {packages['torch']}, Python {environment['python']}"


def evaluation_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a row per result of `nitro-e evaluate`, then a row per paired difference."""
    names = {}
    for result in record["results"]:
        title, score = next(iter(result["scores"].items()))
        sampling = result["sampling"]
        steps = "1 step" if sampling["steps"] == 1 else f"{sampling['steps']} steps"
        guidance = (
            "no guidance"
            if sampling["guidance_scale"] in (0, 1)
            else f"guidance {sampling['guidance_scale']:g}"
        )
        setting = f"{guidance}, {steps}, {sampling['sampler']}"
        names[result["folder"]] = Path(result["checkpoint"]["source"]).name, setting
        cells = [interval(score[part]) for part in ("overall", "seen", "unseen")]
        yield [*names[result["folder"]], cells[0], cells[1].split(" ")[0], cells[2].split(" ")[0]]
    for each in record["differences"]:
        (ours, setting), (theirs, _) = names[each["ours"]], names[each["theirs"]]
        title, found = next(iter(each["scores"].items()))
        yield [f"{ours} minus {theirs}", f"{setting}, paired", interval(found["overall"], "+"), "", ""]


def interval(estimate: dict[str, Any] | None, sign: str = "") -> str:
    """0.885 [0.858, 0.907]"""
    if estimate is None or estimate["value"] is None:
        return "–"
    value, low, high = (f"{estimate[key]:{sign}.3f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def test_figures(file: Path) -> Iterator[list[str]]:
    """Yield the properties that tests recorded (pytest's `record_property`)."""
    for case in ElementTree.parse(file).iter("testcase"):
        for each in case.iter("property"):
            yield [each.attrib["name"], each.attrib["value"]]


# ---- the page


def page() -> str:
    """Render the page."""
    sections = [architecture(), *records().values()]
    head = [
        "# Results",
        "",
        "Every figure was measured on the machine that its section names. `make results` writes this page from",
        "`docs/results/*.json`; the commands under a table make its figures again. Scores are strict scores of 600 held-out",
        "prompts of the [offline domain](shapes.md) with 95 % intervals, unless a section says otherwise.",
        "",
    ]
    return "\n".join([*head, *map(section, sections)])


def section(record: Record) -> str:
    """Render a record as Markdown."""
    lines = [f"## {record['title']}", ""]
    if record["about"]:
        lines += [record["about"], ""]
    lines += table(record["head"], record["rows"])
    if record.get("measured"):
        where = [f"Measured on: {record['measured']}."]
        where += (
            [f"Written down on {record['date']} at commit {record['commit']}."] if "date" in record else []
        )
        links = ", ".join(f"[{Path(file).name}]({file})" for file in record.get("source", ()))
        where += [f"Explained in {links}."] if links else []
        lines += ["", " ".join(where)]
    if record.get("commands"):
        lines += ["", "```bash", *record["commands"], "```"]
    return "\n".join([*lines, ""])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    wrong = [row for row in rows if len(row) != len(head)]
    if wrong:
        raise ConfigError(f"docs/results: a row has {len(wrong[0])} cells, its head {len(head)}: {wrong[0]}")
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def architecture() -> Record:
    """Count parameters, FLOPs and tokens of the presets."""
    rows = []
    for preset in PRESETS:
        config = from_dict(ModelConfig, {"preset": preset}, "model")
        grid = usual_grid(config)
        whole, inside = (
            total(config, grid, TEXT_LENGTH),
            {c.name: c for c in parts(config, grid, TEXT_LENGTH)},
        )
        full, fewer, _ = config.image_tokens(*grid)
        share = inside["blocks inside"].flops / whole.flops
        tokens = f"{full} to {fewer}, {1 - fewer / full:.1%} fewer"
        numbers = [f"{whole.parameters:,}", f"{whole.flops / 1e9:.3g}", tokens, f"{share:.0%}"]
        rows.append([preset, f"{grid[0]} x {grid[1]}", *numbers])
    rows.append(["the paper, 512 px", "16 x 16", "304M", "–", "68.5% fewer", "–"])
    return {
        "title": "The architecture",
        "about": f"Counted for one latent and {TEXT_LENGTH} text tokens. The last row is what the paper (arXiv 2510.27135) says "
        "of the 512 px model; the count here leaves out the 2M of REPA's projector.",
        "head": [
            "preset",
            "tokens",
            "parameters",
            "GFLOP",
            "image tokens, compressed to",
            "FLOPs of the compressed blocks",
        ],
        "rows": rows,
        "commands": ["nitro-e describe nitro-e-512"],
    }


if __name__ == "__main__":
    main()
