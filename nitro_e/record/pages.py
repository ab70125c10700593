"""`report.html` of a run: status, curves, sample grids over time, config and environment in one file.

    nitro-e report runs/mine               rebuild one
    nitro-e report runs/a runs/b           and compare several, curves overlaid

Everything is inline, no script, nothing is loaded from elsewhere: the file can be mailed or archived as it is. It is
made from the files of the run directory alone; what is missing there is said in the report.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import io
import json
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from nitro_e.config import ConfigError, flatten, parse_yaml
from nitro_e.files import write_text
from nitro_e.record import metrics, run_folder
from nitro_e.record.charts import Series, line_chart, number

MAX_GRIDS = 12  # sample grids shown, evenly spaced over the run
MAX_WARNINGS = 50
EMBED_AS_IS = 300_000  # bytes of a sheet as PNG; larger ones are embedded as JPEG
SILENCE = 300  # seconds after which a run that should be training is not believed to be alive

TITLES = {  # in the order of the page; names not here follow under their own name
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
EXPECTED = ("loss", "lr", "grad_norm", "samples_per_second", "data_wait")
# told in the header or of no use afterwards
COUNTERS = ("skipped", "failed_saves", "bad_samples", "eta_seconds")
NOT_NOISY = ("lr", "memory_gb")
NOT_METRICS = ("attempt", "time", "step")


@dataclass
class Record:
    """What the files of a run directory say."""

    folder: Path
    rows: list[dict[str, Any]]  # of metrics.jsonl, superseded ones dropped
    lines: list[dict[str, Any]]  # all of them
    config: dict[str, Any] | None
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
        """That of STATUS.json, unless a run that should be training gives no sign of life; or what the last step says."""
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
        grouped: dict[int, list[dict[str, Any]]] = {}
        for line in self.lines:
            if "time" in line:
                grouped.setdefault(line.get("attempt", 0), []).append(line)
        return list(grouped.values())

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if _is_number(row.get(name))]

    def final(self, name: str) -> float | None:
        """The mean over the last twentieth of the reports."""
        values = self.values(name)
        return statistics.fmean(values[-max(len(values) // 20, 1) :]) if values else None

    def scores(self) -> dict[str, float]:
        """The last `eval/NAME` of every score."""
        names = dict.fromkeys(name for row in self.rows for name in row if re.fullmatch(r"eval/[^/]+", name))
        return {name.removeprefix("eval/"): values[-1] for name in names if (values := self.values(name))}

    def images(self) -> dict[str, list[tuple[int, Path]]]:
        """Name -> (step, file) by step."""
        found: dict[str, list[tuple[int, Path]]] = {}
        for path in sorted((self.folder / "samples").glob("step-*.png")):
            if match := re.fullmatch(r"step-(\d+)-(.+)", path.stem):
                found.setdefault(match[2], []).append((int(match[1]), path))
        return found


def read_record(folder: Path) -> Record:
    """Raises ConfigError if this is no run directory; parts of one may be missing."""
    if not (folder / "config.yaml").exists() and not (folder / "metrics.jsonl").exists():
        raise ConfigError(f"'{folder}' is not a run directory: it has neither config.yaml nor metrics.jsonl")
    config, text = None, ""
    if (folder / "config.yaml").exists():
        text = (folder / "config.yaml").read_text(errors="replace")
        with contextlib.suppress(ConfigError):
            config = parse_yaml(text, "config.yaml")
    return Record(
        folder=folder, rows=metrics.read(folder), lines=metrics.read_lines(folder),
        config=config if isinstance(config, dict) else None, config_text=text,
        status=run_folder.read_status(folder),
    )  # fmt: skip


def write_report(run: Path) -> Path:
    """Make `RUN/report.html` anew from the files of the run."""
    record = read_record(Path(run))
    sections = [
        header(record),
        section("Curves", curves([record]) + not_recorded(record)),
        section("Samples", samples(record)),
        section("What happened", history(record)),
        section("Environment", environment(record)),
        section("Config", config(record)),
    ]
    return _write(record.folder / "report.html", page(record.name, "".join(sections)))


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """One page for several runs: results, differences of the configs, overlaid curves, last grids."""
    records = [read_record(Path(run)) for run in runs]
    title = f"{len(records)} runs compared"
    sections = [
        f"<header><h1>{title}</h1><p>{escape(', '.join(_labels(records)))}</p></header>",
        section("Results", results(records)),
        section("Differences of the configs", differences(records)),
        section("Curves", curves(records)),
        section("Last samples", last_samples(records)),
    ]
    return _write(Path(out), page(title, "".join(sections)))


# ---- sections of the page


def header(record: Record) -> str:
    state = record.state()
    colour = {"done": "good", "running": "good", "failed": "bad", "crashed": "bad"}.get(state, "fair")
    reason = (
        f"<p class='missing'>{escape(str(record.status['reason']))}</p>"
        if record.status.get("reason")
        else ""
    )
    tiles = [
        (
            "steps",
            f"{record.last_step:,}" + (f" of {record.steps:,}" if isinstance(record.steps, int) else ""),
        ),
        ("wall-clock", duration(record.seconds())),
        ("final loss", _shown(record.final("loss"))),
        *((f"score: {name}", _shown(value)) for name, value in record.scores().items()),
        ("samples/s", _shown(statistics.median(record.values("samples_per_second") or [float("nan")]))),
        ("waiting for data", _percent(record.final("data_wait"))),
        ("skipped steps", _counter(record, "skipped")),
        ("failed saves", _counter(record, "failed_saves")),
        ("bad samples", _counter(record, "bad_samples")),
        ("attempts", str(len(record.attempts()) or "–")),
    ]
    boxes = "".join(
        f"<div class='tile'><b>{escape(value)}</b><span>{name}</span></div>" for name, value in tiles
    )
    return (
        f"<header><h1>{escape(record.name)} <em class='{colour}'>{escape(state)}</em></h1>"
        f"<p>{escape(record.stage)} · {escape(str(record.folder))} · report of {_time(None)}</p>{reason}"
        f"<div class='tiles'>{boxes}</div></header>"
    )


def curves(records: Sequence[Record]) -> str:
    """A chart for every metric; those of the timestep bins of one run share one."""
    charts = []
    labels = _labels(records)
    for group, names in metric_groups(records).items():
        series = [
            Series(
                label if len(names) == 1 else line_name(name) if len(records) == 1 else f"{label} {name}",
                points,
            )
            for record, label in zip(records, labels)
            for name in names
            if (points := [(row["step"], row[name]) for row in record.rows if _is_number(row.get(name))])
        ]
        name = group.rpartition("/")[2]
        log = not group.startswith("eval/") and ("loss" in name or name == "grad_norm")
        charts.append(line_chart(title_of(group, names), series, smooth=name not in NOT_NOISY, log=log))
    note = "<p class='note'>Thin: every report. Thick: running mean. Hover for values.</p>"
    return (
        f"{note}<div class='charts'>{''.join(charts)}</div>"
        if charts
        else _missing("No metrics were recorded.")
    )


def metric_groups(records: Sequence[Record]) -> dict[str, list[str]]:
    """Chart -> metric names, known charts first, the phases of a stage (`critic/loss`) one after another."""
    groups: dict[str, list[str]] = {}
    for record in records:
        for row in record.rows:
            for name, value in row.items():
                if name in (*NOT_METRICS, *COUNTERS) or not _is_number(value):
                    continue
                part = re.fullmatch(
                    r"(.*loss_t)\d+|(eval/[^/]+/)(?:un)?seen|(eval/[^/]+)/(?!unscored).+", name
                )
                group = next(filter(None, part.groups())) if part and len(records) == 1 else name
                names = groups.setdefault(group, [])
                if name not in names:
                    names.append(name)
    known = list(TITLES)

    def order(group: str) -> tuple:
        if group.startswith(
            "eval/"
        ):  # scores first, as they were logged; their parts, where they are alone, last
            return (len(known) + 1 if group.count("/") > 1 and not group.endswith("/") else -1, "", "")
        phase, _, name = group.rpartition("/")
        base = re.sub(r"(loss_t)\d+$", r"\1", name)
        return (known.index(base) if base in known else len(known), phase, name)

    return {
        group: groups[group] if group.startswith("eval/") else sorted(groups[group])
        for group in sorted(groups, key=order)
    }


def title_of(group: str, names: list[str]) -> str:
    phase, _, name = group.rpartition("/")
    if group.startswith("eval/"):
        parts = (
            ", seen and unseen combinations" if group.endswith("/") else ", by task" if len(names) > 1 else ""
        )
        return "Score: " + group.removeprefix("eval/").strip("/").replace("/", ", ") + parts
    title = TITLES.get(name) or name.replace("_", " ")
    if name == "loss_t":
        title += f", t in {len(names)} bins (t0: least noise)"
    return f"{phase}: {title}" if phase else title


def line_name(name: str) -> str:
    """In the legend of a chart of one run: of a score `eval/NAME` the overall line, of its parts `eval/NAME/PART` the part."""
    if not name.startswith("eval/"):
        return name
    return name.split("/", 2)[2] if name.count("/") > 1 else "overall"


def not_recorded(record: Record) -> str:
    present = {name.rpartition("/")[2] for row in record.rows for name in row}
    absent = [TITLES[name].lower() for name in EXPECTED if name not in present]
    return _missing(f"Not recorded in this run: {', '.join(absent)}.") if absent and record.rows else ""


def samples(record: Record) -> str:
    images = record.images()
    if not images:
        return _missing("No sample grids: none were made (engine.sample_every), or samples/ is missing.")
    parts = []
    for name, files in images.items():
        shown = spread(files, MAX_GRIDS)
        if len(shown) < len(files):
            parts.append(
                f"<p class='note'>{len(shown)} of {len(files)} '{escape(name)}' grids; all are in samples/.</p>"
            )
        parts += [image(path, f"{name}, step {step:,}") for step, path in shown]
    return "".join(parts)


def image(path: Path, caption: str) -> str:
    """A sheet of images, each with its prompt if the file says what was asked for."""
    try:
        with Image.open(path) as image:
            image.load()
            captioned = metrics.cells(image)
    except (OSError, SyntaxError, ValueError, LookupError, TypeError) as error:
        return _missing(f"{path.name} cannot be read: {error}")  # PIL raises SyntaxError for broken PNGs
    if captioned:
        limit = EMBED_AS_IS // len(captioned)
        body = "".join(
            f"<figure>{_embedded(cell, prompt, limit)}<figcaption>{escape(prompt)}</figcaption></figure>"
            for cell, prompt in captioned
        )
        small = captioned[0][0].width < 128
        body = f"<div class='cells{' small' if small else ''}'>{body}</div>"
    else:
        body = _embedded(image, caption, EMBED_AS_IS)
    return f"<figure><figcaption>{escape(caption)}</figcaption>{body}</figure>"


def _embedded(image: Image.Image, description: str, limit: int) -> str:
    """As PNG, or as JPEG if that is more than `limit` bytes."""
    buffer, kind = io.BytesIO(), "png"
    image.save(buffer, "PNG")
    if buffer.tell() > limit:
        buffer, kind = io.BytesIO(), "jpeg"
        image.thumbnail((2048, 2048))
        image.convert("RGB").save(buffer, "JPEG", quality=88)
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f"<img alt='{escape(description)}' src='{source}'>"


def history(record: Record) -> str:
    """The attempts, and warnings of all of them."""
    rows = []
    for lines in record.attempts():
        found = lines[0].get("environment") or {}
        steps = f"{lines[0]['step']:,} to {max(line['step'] for line in lines):,}"
        took = duration(lines[-1]["time"] - lines[0]["time"])
        rows.append(
            [str(lines[0].get("attempt", "–")), _time(lines[0]["time"]), steps, took, str(found.get("processes", "–")),
             str(found.get("device", "–")), str(found.get("git") or "–")]
        )  # fmt: skip
    parts = (
        [table(["attempt", "started", "steps", "took", "processes", "device", "commit"], rows)]
        if rows
        else []
    )
    events = [line for line in record.lines if line.get("event") not in (None, "start")]
    if len(events) > MAX_WARNINGS:
        parts.append(f"<p class='note'>The last {MAX_WARNINGS} of {len(events)} events.</p>")
    items = "".join(
        f"<li>step {line['step']:,}: {escape(_event(line))}</li>" for line in events[-MAX_WARNINGS:]
    )
    parts.append(f"<ul>{items}</ul>" if items else "<p class='note'>No warnings.</p>")
    return "".join(parts)


def environment(record: Record) -> str:
    starts = [line["environment"] for line in record.lines if isinstance(line.get("environment"), dict)]
    if not starts:
        return _missing("Not recorded.")
    newest = dict(starts[-1])
    packages = newest.pop("packages", None) or {}
    newest["packages"] = ", ".join(
        f"{name} {version or 'not installed'}" for name, version in packages.items()
    )
    note = (
        "<p class='note'>Of the newest attempt; they differ.</p>"
        if any(s != starts[-1] for s in starts)
        else ""
    )
    return note + table(
        [], [[name, str(value if value is not None else "unknown")] for name, value in newest.items()]
    )


def config(record: Record) -> str:
    if not record.config_text:
        return _missing("config.yaml is missing.")
    note = _missing("config.yaml is not valid YAML.") if record.config is None else ""
    return f"{note}<pre>{escape(record.config_text)}</pre>"


def results(records: Sequence[Record]) -> str:
    rows = []
    for label, record in zip(_labels(records), records):
        speed = record.values("samples_per_second")
        rows.append(
            [label, record.state(), f"{record.last_step:,}", _shown(record.final("loss")),
             ", ".join(f"{name} {number(value)}" for name, value in record.scores().items()) or "–",
             _shown(statistics.median(speed)) if speed else "–", duration(record.seconds()), _counter(record, "skipped")]
        )  # fmt: skip
    return table(
        ["run", "status", "steps", "final loss", "scores", "samples/s", "wall-clock", "skipped"], rows
    )


def differences(records: Sequence[Record]) -> str:
    flat = [flatten(record.config or {}) for record in records]
    keys = [
        key for key in dict.fromkeys(key for values in flat for key in values) if key not in ("name", "run")
    ]
    rows = [
        [key, *(json.dumps(values[key]) if key in values else "–" for values in flat)]
        for key in keys
        if any(values.get(key) != flat[0].get(key) or key not in values for values in flat)
    ]
    missing = [label for label, record in zip(_labels(records), records) if record.config is None]
    note = _missing(f"No readable config.yaml: {', '.join(missing)}.") if missing else ""
    return note + (table(["key", *_labels(records)], rows) if rows else "<p class='note'>None.</p>")


def last_samples(records: Sequence[Record]) -> str:
    parts = []
    for label, record in zip(_labels(records), records):
        for name, files in record.images().items():
            step, path = files[-1]
            parts.append(image(path, f"{label}: {name}, step {step:,}"))
        if not record.images():
            parts.append(_missing(f"{label}: no sample grids."))
    return "".join(parts)


# ---- small parts


def page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    top = (
        "<thead><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr></thead>" if head else ""
    )
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table>{top}<tbody>{body}</tbody></table></div>"


def spread(items: list, count: int) -> list:
    """At most `count` items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {seconds:02d} s"
        if minutes
        else f"{seconds} s"
    )


def _labels(records: Sequence[Record]) -> list[str]:
    names = [record.name for record in records]
    return names if len(set(names)) == len(names) else [str(record.folder) for record in records]


def _event(line: dict[str, Any]) -> str:
    if line["event"] == "config":
        return "the config changed: " + "; ".join(
            f"{key} was {was!r}, is {now!r}" for key, (was, now) in line["changed"].items()
        )
    details = {key: value for key, value in line.items() if key not in (*NOT_METRICS, "event")}
    return str(details.get("message") or f"{line['event']} {json.dumps(details) if details else ''}")


def _get(config: dict[str, Any] | None, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: float | None) -> str:
    return "–" if value is None or value != value else number(value)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _counter(record: Record, name: str) -> str:
    values = record.values(name)
    return f"{values[-1]:.0f}" if values else "–"


def _missing(message: str) -> str:
    return f"<p class='missing'>{escape(message)}</p>"


def _time(seconds: float | None) -> str:
    zone = datetime.timezone.utc
    moment = (
        datetime.datetime.now(zone) if seconds is None else datetime.datetime.fromtimestamp(seconds, zone)
    )
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _write(path: Path, text: str) -> Path:
    write_text(path, text)
    return path


STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f5f6f8; color: #1b2430; font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
header p { color: #5b6675; margin: 2px 0 16px; overflow-wrap: anywhere; }
h1 { font-size: 27px; margin: 0; letter-spacing: -0.01em; }
h1 em { font: 600 13px/1 system-ui, sans-serif; padding: 5px 10px; border-radius: 99px; vertical-align: 5px; margin-left: 6px; }
h2 { font-size: 17px; margin: 0 0 12px; }
.good { background: #dcf5e6; color: #0b6b36; } .fair { background: #fdf0d5; color: #8a5a00; }
.bad { background: #fde2e2; color: #a11212; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(230px, 45%), 1fr)); gap: 10px; }
.tile, section { background: #fff; border: 1px solid #e3e7ec; border-radius: 10px; }
.tile { padding: 11px 14px; } .tile b { display: block; font-size: 19px; font-weight: 650; white-space: nowrap; }
.tile span { color: #5b6675; font-size: 13px; }
section { margin-top: 18px; padding: 18px 20px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 18px 26px; }
figure { margin: 0 0 14px; } figcaption { font-weight: 600; font-size: 14px; margin-bottom: 3px; }
small, .note { color: #5b6675; font-weight: 400; font-size: 13px; } .note { margin: 0 0 10px; }
.chart svg { width: 100%; height: auto; display: block; } .chart text { font: 11px system-ui, sans-serif; fill: #5b6675; }
.grid { stroke: #e9ecf0; } .axis { stroke: #b9c1cb; } .hover { fill: transparent; } .hover:hover { fill: rgba(27, 36, 48, 0.07); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: #3b4653; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; margin-right: 5px; vertical-align: 3px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, max-content)); gap: 14px; }
.card { max-width: 300px; border-top: 4px solid; padding-top: 6px; } .card div { display: flex; gap: 6px; }
.card img { width: 132px; image-rendering: pixelated; } .card.right { border-color: #1f9d55; } .card.wrong { border-color: #d64545; }
.cells { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 10px; margin: 6px 0 18px; }
.cells figure { margin: 0; } .cells img { width: 100%; } .small img { image-rendering: pixelated; }
.cells figcaption { font-weight: 400; font-size: 13px; margin-top: 4px; overflow-wrap: anywhere; }
.card figcaption { font-weight: 500; font-size: 13px; margin-top: 4px; } .card em { font-style: normal; padding: 1px 5px; border-radius: 4px; }
img { max-width: 100%; height: auto; display: block; border-radius: 6px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13.5px; }
th { text-align: left; color: #5b6675; font-weight: 600; } th, td { padding: 5px 18px 5px 0; vertical-align: top; }
tr + tr td, thead + tbody td { border-top: 1px solid #eef1f4; }
pre { margin: 0; padding: 14px; background: #f7f8fa; border-radius: 8px; overflow-x: auto; font-size: 12.5px; line-height: 1.45; }
.missing { color: #8a5a00; background: #fdf6e6; border-radius: 6px; padding: 7px 12px; margin: 8px 0; }
details summary { cursor: pointer; color: #3b4653; } ul, ol { margin: 8px 0; padding-left: 24px; font-size: 13.5px; }
@media print { body { background: #fff; } section, .tile, figure { break-inside: avoid; } }
"""
