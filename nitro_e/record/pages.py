"""Pages on runs: `report.html` of one run, and a comparison of several.

    nitro-e report runs/mine               write the report anew
    nitro-e report runs/a runs/b           and compare several, curves overlaid

They are made from the files of the run directories alone and say what is missing there. Here stands what they show;
how it looks stands in `templates/`.
"""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from nitro_e.config import ConfigError, flatten, parse_yaml
from nitro_e.record import metrics, run_folder
from nitro_e.record.charts import Chart, Series, line_chart
from nitro_e.record.templating import data_url, duration, write_page

MAX_GRIDS = 12  # sample grids shown, evenly spaced over the run
MAX_EVENTS = 50
SILENCE = 300  # seconds after which a run that should be training is not believed to be alive

TITLES = {  # in the order of the page; names not here follow under their own name
    "validation/loss": "Validation loss",
    "validation/loss_t": "Validation loss by timestep",
    "loss": "Loss",
    "velocity_loss": "Velocity loss",
    "repa_loss": "REPA loss",
    "loss_t": "Loss by timestep",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "samples_per_second": "Samples per second",
    "data_wait": "Waiting for data, share of time",
    "tflops": "TFLOP per second",
    "mfu": "Model FLOP utilisation",
    "memory_gb": "Peak memory, GB",
}
# of a training on rewards: what the user wants to know, before the losses
REWARDS = {
    "kl": "KL to the reference, of velocities",
    "diversity": "Diversity of a prompt's images",
    "zero_std_ratio": "Prompts whose images all score alike, share",
}
INTERVAL = ("low", "high")  # of a score
EXPECTED = ("loss", "lr", "grad_norm", "samples_per_second", "data_wait")
# shown in the header, or of no use after the run
COUNTERS = ("skipped", "failed_saves", "bad_samples", "eta_seconds")
NOT_NOISY = ("lr", "memory_gb")
NOT_METRICS = ("attempt", "time", "step")
# of a status; others are "fair"
COLOURS = {"done": "good", "running": "good", "failed": "bad", "crashed": "bad"}


@dataclass
class Record:
    """The content of a run directory's files."""

    folder: Path
    rows: list[dict[str, Any]]  # of metrics.jsonl, superseded ones dropped
    lines: list[dict[str, Any]]  # all of them
    config: dict[str, Any] | None  # None: missing or not valid YAML
    config_text: str
    status: dict[str, Any]

    @property
    def name(self) -> str:
        return str((self.config or {}).get("name") or self.folder.name)

    @property
    def stage(self) -> str:
        return str(_get(self.config, "stage.kind") or "stage not recorded")

    @property
    def last_step(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    @property
    def steps(self) -> int | None:
        return _get(self.config, "engine.steps")

    def state(self) -> str:
        """The state in STATUS.json, unless a run that should be training gives no sign of life.

        A run without STATUS.json is done if its last step is the recipe's."""
        if self.status.get("state") == "running" and self.silence() >= SILENCE:
            return f"no sign of life for {duration(self.silence())}"
        if self.status.get("state"):
            return str(self.status["state"])
        if not self.rows:
            return "no steps recorded"
        return "done" if self.last_step == self.steps else "not finished"

    def silence(self) -> float:
        """Seconds since the run last wrote its status, a metric, or that one of its processes is there."""
        signs = [self.status.get("time"), *(line.get("time") for line in self.lines[-1:])]
        signs += [path.stat().st_mtime for path in self.folder.glob("processes/rank-*.json")]
        return time.time() - max((sign for sign in signs if _is_number(sign)), default=0.0)

    def seconds(self) -> float:
        """Wall-clock time of all attempts, without the pauses between them."""
        return sum(attempt[-1]["time"] - attempt[0]["time"] for attempt in self.attempts())

    def attempts(self) -> list[list[dict[str, Any]]]:
        """The lines of every attempt."""
        grouped: dict[int, list[dict[str, Any]]] = {}
        for line in self.lines:
            if "time" in line:
                grouped.setdefault(line.get("attempt", 0), []).append(line)
        return list(grouped.values())

    def points(self, name: str) -> list[tuple[int, float]]:
        """List (step, value) wherever a metric is a number."""
        return [(row["step"], row[name]) for row in self.rows if _is_number(row.get(name))]

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.points(name)]

    def final(self, name: str) -> float | None:
        """The mean over the last twentieth of the reports."""
        values = self.values(name)
        return statistics.fmean(values[-max(len(values) // 20, 1) :]) if values else None

    def speed(self) -> float | None:
        """The median of the reported samples per second."""
        values = self.values("samples_per_second")
        return statistics.median(values) if values else None

    def count(self, name: str) -> int | None:
        """The last value of a counter."""
        values = self.values(name)
        return round(values[-1]) if values else None

    def scores(self) -> dict[str, float]:
        """The last `eval/NAME` of every score."""
        names = dict.fromkeys(name for row in self.rows for name in row if re.fullmatch(r"eval/[^/]+", name))
        return {name.removeprefix("eval/"): values[-1] for name in names if (values := self.values(name))}

    def grids(self) -> dict[str, list[tuple[int, Path]]]:
        """Name -> (step, file) of its sample grids, by step."""
        found: dict[str, list[tuple[int, Path]]] = {}
        for path in sorted((self.folder / "samples").glob("step-*.png")):
            if match := re.fullmatch(r"step-(\d+)-(.+)", path.stem):
                found.setdefault(match[2], []).append((int(match[1]), path))
        return found


@dataclass
class Sheet:
    """A sample grid: one image, or each of its images with its prompt; or the reason why it cannot be shown."""

    caption: str
    source: str = ""
    cells: list[tuple[str, str]] = field(default_factory=list)  # (source, prompt)
    small: bool = False  # the images have few pixels, which stay sharp when enlarged
    error: str = ""


def read_record(folder: Path) -> Record:
    """Read a run directory, of which parts may be missing; ConfigError if it is none."""
    if not (folder / "config.yaml").exists() and not (folder / "metrics.jsonl").exists():
        raise ConfigError(f"'{folder}' is not a run directory: it has neither config.yaml nor metrics.jsonl")
    config, text = None, ""
    if (folder / "config.yaml").exists():
        text = (folder / "config.yaml").read_text(errors="replace")
        with contextlib.suppress(ConfigError):
            config = parse_yaml(text, "config.yaml")
    return Record(
        folder=folder,
        rows=metrics.read(folder),
        lines=metrics.read_lines(folder),
        config=config if isinstance(config, dict) else None,
        config_text=text,
        status=run_folder.read_status(folder),
    )


def write_report(run: Path) -> Path:
    """Make `RUN/report.html` anew from the files of the run."""
    record = read_record(Path(run))
    logged = {name.rpartition("/")[2] for row in record.rows for name in row}
    starts = [line["environment"] for line in record.lines if isinstance(line.get("environment"), dict)]
    return write_page(
        record.folder / "report.html",
        "run.html",
        title=record.name,
        record=record,
        state=record.state(),
        colour=COLOURS.get(record.state(), "fair"),
        now=time.time(),
        charts=charts([record]),
        constant=constant(record),
        absent=[TITLES[name].lower() for name in EXPECTED if name not in logged] if record.rows else [],
        samples=samples(record),
        events=events(record),
        MAX_EVENTS=MAX_EVENTS,
        environments=[environment(start) for start in starts],
    )


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """One page for several runs: results, differences of the configs, overlaid curves, last grids."""
    records = [read_record(Path(run)) for run in runs]
    labels = _labels(records)
    return write_page(
        Path(out),
        "comparison.html",
        title=f"{len(records)} runs compared",
        labels=labels,
        records=records,
        differences=differences(records),
        unreadable=[label for label, record in zip(labels, records) if record.config is None],
        charts=charts(records),
        sheets=last_samples(records),
    )


# ---- what the pages show


def charts(records: Sequence[Record]) -> list[Chart]:
    """A chart for every metric; of a single run, metrics that belong together share one."""
    labels, found = _labels(records), []
    hidden = constant(records[0]) if len(records) == 1 else {}
    for group, names in metric_groups(records).items():
        names = [name for name in names if name not in hidden]
        series = []
        for record, label in zip(records, labels):
            for name in names:
                title = label if len(names) == 1 else line_name(name)
                if points := record.points(name):
                    series.append(Series(title, points))
        if not series:
            continue
        name = group.rpartition("/")[2]
        log = not group.startswith("eval/") and ("loss" in name or name == "grad_norm")
        found.append(line_chart(chart_title(group, names), series, smooth=name not in NOT_NOISY, log=log))
    return found


def constant(record: Record) -> dict[str, float]:
    """Find the metrics that never change in a run and have no title of their own: they need no chart. Name -> value."""
    names = dict.fromkeys(name for row in record.rows for name in row)
    shown = (*NOT_METRICS, *COUNTERS, *TITLES)
    found = {}
    for name in names:
        values = record.values(name)
        base = re.sub(r"(loss_t)\d+$", r"\1", name.rpartition("/")[2])
        if (
            len(values) > 1
            and min(values) == max(values)
            and base not in shown
            and not name.startswith("eval/")
        ):
            found[name] = values[0]
    return found


def metric_groups(records: Sequence[Record]) -> dict[str, list[str]]:
    """Chart -> the metrics in it, in the order of the page.

    Of one run, timestep bins share a chart, and so do a score's tasks, and its seen and unseen combinations. Of several
    runs every metric has its own, without the intervals. The validation loss comes first, then scores, then rewards and
    REWARDS, then TITLES, each for all phases of a stage (`critic/loss`).
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for record in records for row in record.rows for name in row):
        if name in (*NOT_METRICS, *COUNTERS) or not any(record.values(name) for record in records):
            continue
        if len(records) > 1 and name.startswith("eval/") and name.endswith(INTERVAL):
            continue
        part = re.fullmatch(r"(.*loss_t)[\d.e-]+|(eval/[^/]+/)(?:un)?seen|(eval/[^/]+)/(?!unscored).+", name)
        group = next(filter(None, part.groups())) if part and len(records) == 1 else name
        groups.setdefault(group, []).append(name)
    known = list(TITLES)

    def order(group: str) -> tuple:
        if group.startswith("eval/"):
            part_alone = group.count("/") > 1 and not group.endswith("/")
            return (len(known) + 1 if part_alone else -3, "", "")
        if re.fullmatch(r"reward/[^/]+", group):
            return (-2, "", "")
        if group in REWARDS:
            return (-1, list(REWARDS).index(group), "")
        phase, _, name = group.rpartition("/")
        if phase == "validation":
            return (-4, "", name)
        base = re.sub(r"(loss_t)\d+$", r"\1", name)
        return (known.index(base) if base in known else len(known), phase, name)

    return {
        group: groups[group] if group.startswith("eval/") else sorted(groups[group])
        for group in sorted(groups, key=order)
    }


def chart_title(group: str, names: list[str]) -> str:
    phase, _, name = group.rpartition("/")
    if group.startswith("eval/"):
        title = "Score: " + group.removeprefix("eval/").strip("/").replace("/", ", ")
        if group.endswith("/"):
            return f"{title}, seen and unseen combinations"
        parts = [line_name(part) for part in names]
        if len(parts) > 1 and set(parts) <= {"overall", *INTERVAL}:
            return f"{title}, with its 95 % interval"
        return f"{title}, by task" if len(parts) > 1 else title
    if phase == "validation":
        return TITLES.get(group, group)
    if phase == "reward":
        return f"Reward: {name}"
    title = REWARDS.get(group) or TITLES.get(name) or name.replace("_", " ")
    if name == "loss_t":
        title += f", t in {len(names)} bins (t0: least noise)"
    return f"{phase}: {title}" if phase else title


def line_name(name: str) -> str:
    """Name a metric that shares its chart: `eval/NAME/PART` by the part, `eval/NAME` "overall"."""
    if not name.startswith("eval/"):
        return name.removeprefix("validation/loss_")
    return name.split("/", 2)[2] if name.count("/") > 1 else "overall"


def samples(record: Record) -> list[dict[str, Any]]:
    """Per name of sample grids: how many there are, and those that are shown."""
    return [
        {
            "name": name,
            "num": len(files),
            "sheets": [sheet(path, f"{name}, step {step:,}") for step, path in spread(files, MAX_GRIDS)],
        }
        for name, files in record.grids().items()
    ]


def last_samples(records: Sequence[Record]) -> list[Sheet]:
    """The newest sample grids of every run."""
    found = []
    for label, record in zip(_labels(records), records):
        newest = {name: files[-1] for name, files in record.grids().items()}
        found += [sheet(path, f"{label}: {name}, step {step:,}") for name, (step, path) in newest.items()]
        found += [] if newest else [Sheet(label, error=f"{label}: no sample grids.")]
    return found


def sheet(path: Path, caption: str) -> Sheet:
    """Read a sample grid; its images stand apart if the file names their prompts."""
    try:
        with Image.open(path) as image:
            image.load()
            cells = metrics.cells(image)
    except (OSError, SyntaxError, ValueError, LookupError, TypeError) as error:  # SyntaxError: a broken PNG
        return Sheet(caption, error=f"{path.name} cannot be read: {error}")
    if not cells:
        return Sheet(caption, source=data_url(image))
    sources = [(data_url(cell), prompt) for cell, prompt in cells]
    return Sheet(caption, cells=sources, small=cells[0][0].width < 128)


def events(record: Record) -> list[tuple[int, str]]:
    """Step and text of everything that happened besides the start of attempts."""
    return [(line["step"], _event(line)) for line in record.lines if line.get("event") not in (None, "start")]


def _event(line: dict[str, Any]) -> str:
    if line["event"] == "config":
        changes = (f"{key} was {was!r}, is {now!r}" for key, (was, now) in line["changed"].items())
        return "the config changed: " + "; ".join(changes)
    details = {key: value for key, value in line.items() if key not in (*NOT_METRICS, "event")}
    return str(details.get("message") or f"{line['event']} {json.dumps(details) if details else ''}")


def environment(found: dict[str, Any]) -> list[list[str]]:
    """Name and value of everything recorded about an attempt's environment."""
    packages = found.get("packages") or {}
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in packages.items())
    rest = {name: value for name, value in found.items() if name != "packages"} | {"packages": versions}
    return [[name, "unknown" if value is None else str(value)] for name, value in rest.items()]


def differences(records: Sequence[Record]) -> list[list[str]]:
    """A table row per config key whose value is not the same in all runs."""
    flat = [flatten(record.config or {}) for record in records]
    rows = []
    for key in dict.fromkeys(key for values in flat for key in values):
        row = [json.dumps(values[key]) if key in values else "–" for values in flat]
        if len(set(row)) > 1 and key not in ("name", "run"):
            rows.append([key, *row])
    return rows


def spread(items: list, count: int) -> list:
    """At most `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _labels(records: Sequence[Record]) -> list[str]:
    names = [record.name for record in records]
    return names if len(set(names)) == len(names) else [str(record.folder) for record in records]


def _get(config: dict[str, Any] | None, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
