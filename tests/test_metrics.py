"""Metrics: the files are complete whatever the tracker does. No test reaches the network."""

import errno
import importlib.machinery
import json
import sys
import types

import pytest
from PIL import Image

from nitro_e.record import metrics
from nitro_e.record.metrics import Metrics
from nitro_e.training.engine import EngineConfig


@pytest.fixture(autouse=True)
def _no_login(monkeypatch, tmp_path):
    """No key, no netrc, and a proxy that nobody listens on."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


class FakeWandB(types.ModuleType):
    """Counts calls; raises in the methods named by `broken` (for init: in the modes named by `broken_modes`)."""

    def __init__(self, broken=(), broken_modes=()):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.broken, self.broken_modes, self.modes, self.calls = broken, broken_modes, [], []
        self.id = "abc"

    def __getattr__(self, name):
        if name not in ("define_metric", "log", "finish", "Settings", "Image"):
            raise AttributeError(name)

        def call(*args, **options):
            self.calls.append((name, args, options))
            if name in self.broken:
                raise OSError(errno.ENOSPC, f"{name} is broken")

        return call

    def init(self, *, mode, **options):
        self.modes.append(mode)
        self.calls.append(("init", (), options))
        if mode in self.broken_modes:
            raise RuntimeError("no server")
        return self


@pytest.fixture
def fake(monkeypatch):
    def install(**options) -> FakeWandB:
        module = FakeWandB(**options)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return install


def make(run, tracker="none", start_step=0, **options) -> Metrics:
    return Metrics(
        run,
        start_step=start_step,
        tracker=tracker,
        config={"name": "toy", "a": {"b": [1]}},
        enabled=True,
        **options,
    )


def train(run, tracker="none", start=0, stop=6) -> Metrics:
    writer = make(run, tracker, start)
    for step in range(start + 1, stop + 1):
        writer.write(step, {"loss": 1 / step, "lr": 0.1})
    writer.write_image(stop, "samples", Image.new("RGB", (8, 4), (200, 10, 10)))
    writer.close()
    return writer


def rows(run, *without) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key not in ("time", *without)}
        for row in metrics.read(run)
    ]


def test_lines_and_environment_of_a_run(tmp_path):
    train(tmp_path)
    assert rows(tmp_path)[3] == {"attempt": 1, "step": 4, "loss": 0.25, "lr": 0.1}
    (start,) = metrics.read_events(tmp_path)
    assert start["environment"]["packages"]["torch"] and start["environment"]["processes"] == 1
    assert Image.open(tmp_path / "samples" / "step-0000006-samples.png").getpixel((0, 0)) == (200, 10, 10)


def test_a_disabled_writer_leaves_no_trace(tmp_path):
    writer = Metrics(tmp_path, start_step=0, config={}, enabled=False, tracker="tensorboard")
    writer.write(1, {"loss": 1.0})
    writer.event(1, "warning")
    writer.write_image(1, "samples", Image.new("RGB", (4, 4)))
    writer.close()
    assert not list(tmp_path.iterdir())


def test_superseded_lines_and_a_truncated_last_line(tmp_path):
    """Killed in the middle of the line of step 6, resumed from a checkpoint at 4: every step once, the newest."""
    train(tmp_path, stop=6)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    train(tmp_path, start=4, stop=8)
    assert [(row["step"], row["attempt"]) for row in metrics.read(tmp_path)] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 1),
        (5, 2),
        (6, 2),
        (7, 2),
        (8, 2),
    ]
    assert [row["event"] for row in metrics.read_events(tmp_path)] == ["start", "start"]
    lines = path.read_text().splitlines()
    # appended, never rewritten
    assert len(lines) == 7 + 5 and sum(line.startswith('{"attempt"') for line in lines) == 12


def test_damaged_lines_are_left_out_with_a_warning_each(tmp_path, caplog):
    train(tmp_path)
    path = tmp_path / "metrics.jsonl"
    damaged = ['{"step": "3"}', '{"step": 3, "attempt": "x"}', "[3]", "[" * 100_000, "\x00"]
    path.write_text(path.read_text() + "".join(line + "\n" for line in damaged))
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert caplog.text.count("one unreadable line skipped") == len(damaged)


@pytest.mark.parametrize("tracker", ["auto", "none", "wandb", "wandb:offline", "tensorboard"])
def test_the_record_is_the_same_whatever_the_tracker(tmp_path, fake, tracker):
    fake()
    train(tmp_path, tracker)
    assert rows(tmp_path) == [
        {"attempt": 1, "step": step, "loss": 1 / step, "lr": 0.1} for step in range(1, 7)
    ]


def sheet(prompts, columns=3, size=(6, 4), gap=2) -> Image.Image:
    """Images of one colour each, with their prompts."""
    rows = -(-len(prompts) // columns)
    image = Image.new("RGB", (columns * (size[0] + gap) - gap, rows * (size[1] + gap) - gap), "white")
    for index in range(len(prompts)):
        place = (index % columns * (size[0] + gap), index // columns * (size[1] + gap))
        image.paste(Image.new("RGB", size, (index, 0, 0)), place)
    return metrics.caption(image, prompts, columns, size)


def test_a_sheet_keeps_the_prompt_of_every_image(tmp_path, fake):
    """In the PNG itself; wandb gets each image with its caption."""
    wandb = fake()
    prompts = ["a red circle", "<b> & 'ümlaut'", "", "line\nbreak", "last"]
    writer = make(tmp_path, "wandb:offline")
    path = writer.write_image(3, "samples", sheet(prompts))
    writer.close()
    found = metrics.cells(Image.open(path))
    assert [prompt for _, prompt in found] == prompts == json.loads(Image.open(path).text["prompts"])
    assert [cell.getcolors() for cell, _ in found] == [[(24, (index, 0, 0))] for index in range(5)]
    images = [(args, options) for name, args, options in wandb.calls if name == "Image"]
    assert [options["caption"] for _, options in images] == prompts
    assert [args[0].size for args, _ in images] == [(6, 4)] * 5
    assert metrics.cells(sheet(["one"], columns=1))[0][0].size == (6, 4)
    assert metrics.cells(Image.new("RGB", (6, 4))) == []


def test_where_wandb_shows_a_run(tmp_path, fake, monkeypatch):
    """As configured; what the recipe leaves open is up to the environment."""
    wandb, names = fake(), ("project", "entity", "group", "tags")
    for name in ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_GROUP", "WANDB_TAGS"):
        monkeypatch.delenv(name, raising=False)
    chosen = metrics.WandBConfig(project="mine", entity="lab", group="seeds", tags=("a", "b"))
    make(tmp_path, "wandb:offline").close()
    make(tmp_path, "wandb:offline", wandb=chosen).close()
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    make(tmp_path, "wandb:offline").close()
    make(tmp_path, "wandb:offline", wandb=chosen).close()
    given = [[options[name] for name in names] for call, _, options in wandb.calls if call == "init"]
    mine = ["mine", "lab", "seeds", ["a", "b"]]
    assert given == [["nitro-e", None, None, None], mine, ["theirs", None, None, None], mine]


def test_auto_prefers_wandb_with_a_key_then_tensorboard(tmp_path, fake, monkeypatch):
    pytest.importorskip("tensorboard")
    wandb = fake()
    monkeypatch.setattr(metrics, "find_spec", lambda name: name)
    assert isinstance(make(tmp_path, "auto").mirror, metrics.TensorBoard) and not wandb.modes
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert isinstance(make(tmp_path, "auto").mirror, metrics.WandB) and wandb.modes == ["online"]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert isinstance(make(tmp_path, "auto").mirror, metrics.TensorBoard)
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    assert make(tmp_path, "auto").mirror is None


def test_wandb_without_a_key_goes_offline_and_says_so(tmp_path, fake):
    wandb = fake()
    train(tmp_path, "wandb")
    assert wandb.modes == ["offline"]
    (warning,) = [row for row in metrics.read_events(tmp_path) if row["event"] == "warning"]
    assert "no key" in warning["message"]


def test_wandb_that_cannot_be_reached_goes_offline(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    wandb = fake(broken_modes=("online",))
    train(tmp_path, "wandb")
    assert wandb.modes == ["online", "offline"]
    assert sum(name == "log" for name, _, _ in wandb.calls) == 7
    assert len(rows(tmp_path)) == 6


def test_a_resumed_run_continues_its_wandb_page_on_our_axis(tmp_path, fake):
    wandb = fake()
    train(tmp_path, "wandb:offline", stop=3)
    train(tmp_path, "wandb:offline", start=3)
    first, second = [options for name, _, options in wandb.calls if name == "init"]
    assert first["id"] is None and second["id"] == "abc" and second["resume"] == "allow"
    assert ("define_metric", ("*",), {"step_metric": "step"}) in wandb.calls
    logged = [args[0] for name, args, options in wandb.calls if name == "log"]
    assert [values["step"] for values in logged] == [1, 2, 3, 3, 4, 5, 6, 6]  # an image after each part


def test_a_tracker_that_fails_is_dropped_after_three_times(tmp_path, fake):
    wandb = fake(broken=("log",))
    writer = train(tmp_path, "wandb:offline")
    assert sum(name == "log" for name, _, _ in wandb.calls) == 3 and writer.mirror is None
    messages = [row["message"] for row in metrics.read_events(tmp_path) if row["event"] == "warning"]
    assert len(messages) == 4 and "log is broken" in messages[0] and "dropped" in messages[3]
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "samples" / "step-0000006-samples.png").is_file()


def test_a_tracker_that_fails_at_the_start_or_the_end(tmp_path, fake):
    fake(broken_modes=("offline",))
    train(tmp_path, "wandb:offline", stop=3)
    fake(broken=("finish",))
    train(tmp_path, "wandb:offline", start=3)
    messages = [row["message"] for row in metrics.read_events(tmp_path) if row["event"] == "warning"]
    assert ["no server" in messages[0], "finish is broken" in messages[1], len(messages)] == [True, True, 2]
    assert len(rows(tmp_path)) == 6


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(tmp_path, "tensorboard")
    assert len(rows(tmp_path)) == 6 and len(metrics.read_events(tmp_path)) == 2


def test_wandb_offline_for_real(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_RUN_GROUP", "seeds")
    writer = make(tmp_path, "wandb", wandb=metrics.WandBConfig(entity="lab", tags=("x",)))
    page = writer.mirror.page
    assert page.settings._offline and (page.project, page.group) == ("theirs", "seeds")
    assert (page.entity, page.tags) == ("lab", ("x",))
    writer.write(1, {"loss": 0.5})
    writer.write_image(1, "captioned", sheet(["one", "two"]))
    writer.write_image(1, "samples", Image.new("RGB", (8, 4)))
    writer.close()
    assert writer.failures == 0 and list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_tensorboard_holds_scalars_and_images_and_forgets_superseded_steps(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "tensorboard", stop=6)
    train(tmp_path, "tensorboard", start=4, stop=8)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert events.Scalars("loss")[3].value == 0.25
    assert events.Images("samples")[-1].width == 8


class FullDisk:
    """A file that takes `room` bytes, then says ENOSPC."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def close(self):
        self.file.close()


def test_a_full_disk_is_reported_loudly_and_loses_no_line_once_there_is_room(tmp_path, caplog):
    writer = make(tmp_path)
    disk = writer._lines._file = FullDisk(writer._lines._file, room=100)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 4  # the first line fits
    assert "No space left" in caplog.text and "4 lines are held" in caplog.text
    disk.room = 10**6
    writer.write(6, {"loss": 6.0})
    writer.close()
    assert [row["loss"] for row in metrics.read(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_lines_that_could_never_be_written_are_counted_at_the_end(tmp_path, caplog):
    writer = make(tmp_path)
    writer._lines._file = FullDisk(writer._lines._file, room=0)
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 2.0})
    writer.close()
    assert "LOST: the last 2 lines" in caplog.text


def test_a_image_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "samples").write_text("in the way")
    train(tmp_path)
    assert len(rows(tmp_path)) == 6
    assert "could not be written" in metrics.read_events(tmp_path)[-1]["message"]


def test_images_reach_the_disk_before_the_tracker(tmp_path):
    class Mirror:
        def log_image(self, step, name, image):
            assert (tmp_path / "samples" / f"step-{step:07d}-{name}.png").is_file()

        def close(self):
            pass

    writer = make(tmp_path)
    writer.mirror = Mirror()
    writer.write_image(3, "samples", Image.new("RGB", (4, 4)))
    assert writer.failures == 0


def test_a_user_without_an_account_is_not_warned(tmp_path):
    """The default tracker was wandb, which warned at every run."""
    default = EngineConfig(steps=1)
    writer = make(tmp_path, default.tracker, wandb=default.wandb)
    assert not isinstance(writer.mirror, metrics.WandB)
    writer.close()
    assert [row["event"] for row in metrics.read_events(tmp_path)] == ["start"]
