"""The report of a run: valid, self-contained, complete, and calm about what is missing."""

import base64
import io
import json
import math
import os
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from nitro_e.cli import report as tool
from nitro_e.config import ConfigError
from nitro_e.record import charts
from nitro_e.record.charts import Scale, Series, line_chart, nice_ticks, running_mean, thin_out
from nitro_e.record.metrics import Metrics, caption
from nitro_e.record.pages import read_record, spread, write_comparison, write_report
from nitro_e.record.templating import TEMPLATES, duration
from nitro_e.training.attendance import Attendance

VOID = {"meta", "img", "br", "link", "input", "hr"}
LOGGED = (
    "loss",
    "velocity_loss",
    "repa_loss",
    "lr",
    "grad_norm",
    "samples_per_second",
    "data_wait",
    "critic/loss",
    "reward",
)


class Page(HTMLParser):
    """Checks that every element is closed in order; keeps text by element and all attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.attributes, self.tags = [], {}, [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data):
        for tag in set(self.open):
            self.text[tag] = self.text.get(tag, "") + data

    def charts(self) -> list[str]:
        return [value for tag, name, value in self.attributes if tag == "svg" and name == "aria-label"]

    def images(self) -> list[Image.Image]:
        sources = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        return [
            Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) for source in sources
        ]


def make_run(
    folder: Path, *, steps: int = 300, grids: int = 3, lr: float = 1e-3, name: str | None = None
) -> Path:
    folder.mkdir(parents=True)
    writer = Metrics(folder, start_step=0, config={}, enabled=True, tracker="none")
    for step in range(1, steps + 1):
        values = {metric: math.exp(-step / 100) + 0.1 * math.sin(step) + 0.2 for metric in LOGGED}
        writer.write(step, values | {f"loss_t{i}": 1.0 + i for i in range(4)} | {"skipped": 2.0})
    for grid in range(1, grids + 1):
        writer.write_image(grid * 100, "samples", Image.new("RGB", (32, 16), (10 * grid, 0, 0)))
    writer.event(250, "warning", message="the disk <is> nearly full")
    writer.close()
    config = {
        "name": name or folder.name,
        "stage": {"kind": "flow_matching", "optim": {"lr": lr}},
        "engine": {"steps": steps},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "STATUS.json").write_text(json.dumps({"state": "done", "step": steps}))
    return folder


def assert_self_contained(text: str) -> None:
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "action", "background", "xlink:href"):
            assert value.startswith("data:image/"), (tag, name, value[:60])
        assert not name.startswith("on"), (tag, name)
    assert not re.search(r"url\(|@import|https?://", text)


def test_the_report_is_valid_self_contained_and_complete(tmp_path):
    path = write_report(make_run(tmp_path / "mine"))
    assert path == tmp_path / "mine" / "report.html"
    text = path.read_text()
    assert_self_contained(text)
    page = Page(text)
    assert page.charts() == [
        "Loss",
        "critic: Loss",
        "Velocity loss",
        "REPA loss",
        "Loss by timestep, t in 4 bins (t0: least noise)",
        "Learning rate",
        "Gradient norm",
        "Samples per second",
        "Waiting for data, share of time",
        "reward",
    ]
    assert [image.getpixel((0, 0)) for image in page.images()] == [(10, 0, 0), (20, 0, 0), (30, 0, 0)]
    assert "300 of 300" in page.text["header"] and "done" in page.text["h1"] and "mine" in page.text["h1"]
    assert "the disk <is> nearly full" in page.text["li"]
    assert "kind: flow_matching" in page.text["pre"]
    assert re.search(r"torch \d", page.text["td"]) and sys.argv[0].split("/")[-1] in page.text["td"]


def test_every_image_of_a_grid_has_its_prompt(tmp_path):
    """As drawn, whatever the recipe lists: prompts of the data were nowhere to be seen."""
    folder, prompts = make_run(tmp_path / "mine"), ["a red <b>circle</b> & more", "' onload='x", "blue"]
    sheet = Image.new("RGB", (34, 34))
    for index, place in enumerate([(0, 0), (18, 0), (0, 18)]):
        sheet.paste((index + 1, 0, 0), (*place, place[0] + 16, place[1] + 16))
    writer = Metrics(folder, start_step=300, config={}, enabled=True, tracker="none")
    writer.write_image(400, "samples", caption(sheet, prompts, 2, (16, 16)))
    writer.close()
    text = write_report(folder).read_text()
    assert_self_contained(text)
    page = Page(text)
    assert [image.getcolors() for image in page.images()[3:]] == [[(256, (i, 0, 0))] for i in (1, 2, 3)]
    captions = page.text["figcaption"]
    assert captions.endswith("samples, step 400" + "".join(prompts))
    assert [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")][3:] == prompts


def test_every_metric_is_drawn(tmp_path):
    """Whatever a stage logs gets a curve, known or not."""
    folder = make_run(tmp_path / "mine")
    text = write_report(folder).read_text()
    for chart in Page(text).charts():
        figure = text[text.index(f'aria-label="{chart}"') :].partition("</svg>")[0]
        assert figure.count("<polyline") == {"Loss by timestep": 8, "Learning rate": 1}.get(
            chart.partition(",")[0], 2
        ), chart


@pytest.mark.parametrize("absent", ["config.yaml", "metrics.jsonl", "STATUS.json", "samples"])
def test_missing_pieces_are_said(tmp_path, absent):
    folder = make_run(tmp_path / "mine")
    path = folder / absent
    path.rename(tmp_path / "away")
    page = Page(write_report(folder).read_text())
    said = {
        "config.yaml": "config.yaml is missing",
        "metrics.jsonl": "No metrics were recorded",
        "samples": "No sample grids",
    }
    assert said.get(absent, "done") in page.text["p"] + page.text["h1"]
    assert bool(page.charts()) == (absent != "metrics.jsonl")


def test_metrics_that_a_run_should_have_are_named_when_absent(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"attempt": 1, "time": 1.0, "step": 5, "loss": 1.0}\n')
    page = Page(write_report(tmp_path).read_text())
    assert "learning rate, gradient norm, samples per second, waiting for data" in page.text["p"]
    assert "Not recorded." in page.text["p"] and page.charts() == ["Loss"]


def test_damaged_files_do_not_stop_the_report(tmp_path):
    folder = make_run(tmp_path / "mine")
    (folder / "config.yaml").write_text("name: [")
    (folder / "STATUS.json").write_text('{"state"')
    image = folder / "samples" / "step-0000200-samples.png"
    image.write_bytes(image.read_bytes()[:50])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"attempt": 1, "step": 301, "time": 1.0, "loss": NaN, "lr": "high"}\n{"attempt": 1, "ste')
    page = Page(write_report(folder).read_text())
    assert "step-0000200-samples.png cannot be read" in page.text["p"] and len(page.images()) == 2
    assert "not valid YAML" in page.text["p"] and "1 values not finite" in page.text["figcaption"]


def test_a_run_that_was_killed_is_not_called_running(tmp_path):
    """The newest of its status, its metrics and its processes' files counts: here their ages in seconds."""
    run = make_run(tmp_path / "run")

    def state(status: float, metrics: float, process: float) -> str:
        now = time.time()
        row = {"state": "running", "step": 3, "time": now - status}
        (run / "STATUS.json").write_text(json.dumps(row))
        line = {"attempt": 1, "time": now - metrics, "step": 3, "loss": 1.0}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        Attendance(run, 0, 1).sign(3)
        os.utime(run / "processes" / "rank-0.json", (now - process, now - process))
        return read_record(run).state()

    for ages in ((10, 7200, 7200), (7200, 10, 7200), (7200, 7200, 10)):
        assert state(*ages) == "running"
    assert state(7200, 7200, 3601) == "no sign of life for 1 h 00 min"
    assert '<em class="fair">no sign of life' in write_report(run).read_text()


def test_no_run_directory(tmp_path, capsys):
    with pytest.raises(ConfigError, match="neither config.yaml nor metrics.jsonl"):
        write_report(tmp_path)
    assert tool.main([str(tmp_path)]) == 2 and "not a run directory" in capsys.readouterr().err


def test_many_and_large_grids_are_thinned_and_compressed(tmp_path):
    folder = make_run(tmp_path / "mine", grids=30)
    noise = Image.effect_noise((3000, 300), 90).convert("RGB")
    noise.save(folder / "samples" / "step-0009000-samples.png")
    images = Page(write_report(folder).read_text()).images()
    assert len(images) == 12 and images[0].getpixel((0, 0)) == (10, 0, 0)
    assert images[-1].format == "JPEG" and images[-1].size == (2048, 205)


def test_wall_clock_counts_every_attempt_and_no_pause(tmp_path):
    lines = [
        (1, 100, 0, "start"),
        (1, 160, 5, None),
        (1, 170, 6, None),
        (2, 5000, 5, "start"),
        (2, 5030, 10, None),
    ]
    text = "".join(
        json.dumps({"attempt": a, "time": t, "step": s, **({"event": e} if e else {"loss": 1.0})}) + "\n"
        for a, t, s, e in lines
    )
    (tmp_path / "metrics.jsonl").write_text(text)
    record = read_record(tmp_path)
    assert record.seconds() == 70 + 30 and [row["step"] for row in record.rows] == [5, 10]
    assert (
        record.state() == "not finished" and duration(100) == "1 min 40 s" and duration(93_784) == "1 d 2 h"
    )


def test_comparison_of_runs(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", lr=1e-3), make_run(tmp_path / "b", lr=2e-3, grids=0)]
    out = tmp_path / "both.html"
    assert tool.main([*map(str, runs), "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [
        str(runs[0] / "report.html"),
        str(runs[1] / "report.html"),
        str(out),
    ]
    text = out.read_text()
    assert_self_contained(text)
    page = Page(text)
    loss = text[text.index('aria-label="Loss"') :].partition("</svg>")[0]
    assert (
        loss.count("<polyline") == 4
        and "loss_t" not in page.charts()
        and len(page.charts()) == len(LOGGED) + 4
    )
    assert "stage.optim.lr" in page.text["td"] and "engine.steps" not in page.text["td"]
    assert "b: no sample grids" in page.text["p"] and len(page.images()) == 1


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / "a", name="same"), make_run(tmp_path / "b", name="same")]
    page = Page(write_comparison(runs, tmp_path / "out.html").read_text())
    assert str(tmp_path / "a") in page.text["td"] and str(tmp_path / "b") in page.text["td"]


def test_points_lie_where_the_scale_says():
    (line,) = line_chart("t", [Series("a", [(0, 0.0), (50, 5.0), (100, 10.0)])]).lines
    (x0, y0), (x1, y1), (x2, y2) = line.points
    assert (x0, x2) == (charts.AREA.left, charts.AREA.right)
    assert (x1, y1) == pytest.approx(((x0 + x2) / 2, (y0 + y2) / 2), abs=0.1) and y0 > y2


def test_log_scale_and_ticks():
    scale = Scale(0.001, 1000, 100, 0, log=True)
    assert [scale(v) for v in (0.001, 1, 1000)] == pytest.approx([100, 50, 0])
    pixels, values = zip(*scale.ticks())
    assert values == pytest.approx([0.001, 0.01, 0.1, 1, 10, 100, 1000])
    assert pixels == pytest.approx([100, 83.3, 66.7, 50, 33.3, 16.7, 0])
    assert nice_ticks(0.13, 1.02) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(-3, 7) == pytest.approx([-2, 0, 2, 4, 6])


@pytest.mark.parametrize(
    "values", [[1.0], [0.0, 0.0], [float("nan")], [], [-5.0] * 50, [1e-30, 1e30], [float("inf"), 2.0]]
)
def test_charts_of_odd_values(values):
    chart = line_chart("odd <values>", [Series("a & b", list(enumerate(values)))])
    page = Page(TEMPLATES.get_template("chart.html").render(chart=chart))
    assert page.text["figcaption"].startswith("odd <values>")


def test_thinning_keeps_peaks_and_means_keep_straight_lines():
    points = [(i, 0.0) for i in range(10_000)]
    points[7777] = (7777, 99.0)
    thin = thin_out(points)
    assert len(thin) <= charts.MAX_POINTS and (7777, 99.0) in thin and thin == sorted(thin)
    line = [(i, 3.0 * i) for i in range(200)]
    assert [mean for _, mean in running_mean(line)][:150] == pytest.approx([value for _, value in line[:150]])
    assert spread(list(range(100)), 12)[0] == 0 and spread(list(range(100)), 12)[-1] == 99
