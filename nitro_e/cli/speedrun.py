"""Train a recipe from scratch, score it, and add a row to the speedrun table: what a score costs.

    nitro-e speedrun NAME configs/shapes/1_pretrain.yaml [key=value ...] --note "falling rate from the start"
    nitro-e speedrun NAME --rebuild                     write docs/speedrun.md anew from its records, training nothing

The run is runs/speedrun/NAME; the same command continues it. A row has the revision of the code, the recipe with its
overrides, samples, counted FLOPs, CPU seconds and the score of 600 held-out prompts. Records lie beside the table, a
JSON line each (docs/speedrun.jsonl); a name stands there once.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from nitro_e.cli import common as cli
from nitro_e.config import ConfigError, apply_override, check_file_name, load, parse_json, read_text
from nitro_e.files import write_text

TABLE = Path("docs/speedrun.md")
MARK = "speedrun"  # of the rows' place in the page


def main(arguments: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("name", type=cli.text, help="what the row is called")
    parser.add_argument("recipe", nargs="?", help="a YAML recipe, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--note", type=cli.text, default="", help="a few words on what is new in it")
    parser.add_argument("--benchmark", default="shapes", help="default: %(default)s")
    parser.add_argument("--num", type=cli.whole(1, 100_000), help="prompts; default: the benchmark's")
    parser.add_argument(
        "--setting",
        nargs="+",
        default=["guidance_scale=3", "steps=20"],
        metavar="key=value",
        help="how samples are drawn; default: guidance_scale=3 steps=20",
    )
    parser.add_argument("--table", type=Path, default=TABLE, help="default: %(default)s")
    parser.add_argument("--rebuild", action="store_true", help="write the table from its records, then exit")
    options = parser.parse_intermixed_args(arguments)
    if options.recipe is None and not options.rebuild:
        parser.error("the following arguments are required: recipe")
    return cli.run(lambda: print(speedrun(options)))


def speedrun(options: argparse.Namespace) -> str:
    from nitro_e.studies.results import check_page

    check_file_name(options.name, "name")
    records = options.table.with_suffix(".jsonl")
    if not options.rebuild:
        if options.table.is_file():
            check_page(options.table, MARK)
        found = {row["name"]: row for row in read(records)}
        if options.name in found:
            raise ConfigError(
                f"name '{options.name}' has a row in {records} already; choose another, or delete that line"
            )
        row = made(options)
        with records.open("a") as file:
            file.write(json.dumps(row) + "\n")
    rebuild(options.table, read(records))
    return f"{options.table}, {records}"


def made(options: argparse.Namespace) -> dict[str, Any]:
    """Train, score and describe one row."""
    from nitro_e.evaluation.benchmarks import benchmark
    from nitro_e.evaluation.evaluate import Options, evaluate, prepare
    from nitro_e.record.environment import device_name, git_commit
    from nitro_e.record.run_folder import read_status
    from nitro_e.stages.recipe import RunConfig
    from nitro_e.studies.plan import Trial, check_settings, check_trial
    from nitro_e.studies.training import Trainer, cost_of, failed

    folder = Path("runs/speedrun") / options.name
    overrides = (f"run={folder}", f"name=speedrun-{options.name}", "init_from=null", *options.overrides)
    config = load(RunConfig, options.recipe, overrides)
    if config.init_from is not None:
        raise ConfigError("init_from: a speedrun begins from nothing; leave it out")
    chosen = benchmark(options.benchmark, options.num)
    prepare(chosen, "cpu")
    setting: dict[str, Any] = {}
    for override in options.setting:
        apply_override(setting, override)
    check_settings([setting], config.published_sampling, config.model, config.components)
    trial = Trial(options.name, config.seed, folder, config, overrides)
    check_trial(trial)
    failed(Trainer(1, "speedrun").run([trial], [options.recipe]))
    if read_status(folder).get("state") != "done":
        raise ConfigError(f"{folder} was stopped; run the same command again")
    out = Path("outputs/speedrun") / options.name
    out.mkdir(parents=True, exist_ok=True)
    grid = {key: [value] for key, value in setting.items()}
    found = evaluate(chosen, [str(folder)], grid, Options.of_this_machine(), out)
    title, score = next(iter(found.results[0].scores.items()))
    cost = cost_of(folder, config)
    return {
        "name": options.name,
        "revision": git_commit(),
        "recipe": shlex.join([options.recipe, *options.overrides]),
        "device": device_name(),
        "samples": cost.samples,
        "flops": cost.flops,
        "cpu_seconds": cost.cpu_seconds,
        "parameters": cost.parameters,
        "score": title,
        "value": list(score.overall[:3]),
        "prompts": len(found.prompts),
        "setting": " ".join(options.setting),
        "note": options.note,
    }


def read(records: Path) -> list[dict[str, Any]]:
    """Read the rows of a table; none if there is no file yet."""
    if not records.is_file():
        return []
    lines = read_text(records).splitlines()
    return [parse_json(line, f"{records}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def rebuild(table: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows into the table's page, the best score first; a page that is not there is made."""
    from nitro_e.evaluation.results import Table
    from nitro_e.studies import results

    if not table.is_file():
        write_text(table, "\n".join(["# Speedrun", "", *results.marks(MARK), ""]))
    head = ["name", "score", "samples", "TFLOP", "CPU s", "parameters", "recipe", "revision", "note"]
    ordered = sorted(rows, key=lambda row: -row["value"][0])
    results.insert(table, MARK, results.markdown(Table("", head, [cells(row) for row in ordered])))


def cells(row: dict[str, Any]) -> list[str]:
    value, low, high = row["value"]
    return [
        row["name"],
        f"{row['score']} {value:.3f} [{low:.3f}, {high:.3f}]",
        "–" if row["samples"] is None else f"{row['samples']:,}",
        "–" if row["flops"] is None else f"{row['flops'] / 1e12:,.1f}",
        f"{row['cpu_seconds']:,.0f}",
        f"{row['parameters']:,}",
        f"`{row['recipe']}`",
        str(row["revision"] or "–"),
        row["note"].replace("|", "/"),
    ]
