"""Processes that a command starts by itself: how many, their signals, their exit codes, what is shown."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_distributed import SCRIPT, assert_same_losses
from tiny import OPTIMIZER

from nitro_e.cli import evaluate, processes, sample, synthesize, train
from nitro_e.files import SHIPPED
from nitro_e.record import run_folder
from nitro_e.sampling.sources import bytes_on_disk

START = (
    "import sys, json; from nitro_e.cli.processes import launch; sys.exit(launch(json.loads(sys.argv[1]), 2))"
)


def start(run: Path, **options) -> subprocess.Popen:
    command = json.dumps([str(SCRIPT), str(run), json.dumps({"batch_size": 8, **options})])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", START, command], **pipes)


def test_two_processes_without_a_launcher_train_as_one(tmp_path):
    """Stopped by SIGTERM to the starter, continued as one process: the losses of one. Everything is said once."""
    one = tmp_path / "one"
    subprocess.run(
        [sys.executable, str(SCRIPT), str(one), '{"batch_size": 16}'], check=True, capture_output=True
    )
    run = tmp_path / "run"
    process = start(run, pause=0.3)
    deadline = time.monotonic() + 120
    while len(list(run.glob("processes/rank-*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert run_folder.read_status(run)["state"] == "preempted"
    assert out.count("rank 0 ended") == 1 and "rank 1" not in out
    assert errors.count("toy 1/12") == 1
    done = start(run)
    done.communicate(timeout=120)
    assert done.returncode == 0
    assert_same_losses(run, one)


@pytest.mark.slow
def test_the_exit_code_is_that_of_the_first_that_failed(tmp_path):
    run = tmp_path / "run"
    process = start(run, fault="dies")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL
    assert sum("process 1 (pid" in line for line in errors.splitlines()) == 1
    assert run_folder.read_status(run)["state"] == "crashed"


def test_what_only_another_process_says_is_shown(tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('rank 1 cannot')\ntime.sleep(60)"
    )
    processes.PATIENCE, before = 0.1, processes.PATIENCE
    try:
        assert processes.launch([str(script)], 2) == 1
    finally:
        processes.PATIENCE = before
    assert capfd.readouterr().err == "rank 1 cannot\n"


def test_a_killed_process_is_named_and_what_all_say_is_shown_once(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.1)
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)"
    )
    assert processes.launch([str(script)], 2) == 128 + signal.SIGKILL
    line = "error: SIGKILL ended process 1 of 2; run the same command again to continue\n"
    assert capfd.readouterr().err == line
    for code, said in ((130, 1), (2, 1), (1, 2)):  # the first process ends last
        wait = f"import os, sys, time\ntime.sleep(1 - int(os.environ['RANK']))\nprint('said', file=sys.stderr)\nsys.exit({code})"
        script.write_text(wait)
        monkeypatch.setattr(processes, "PATIENCE", 60)
        assert processes.launch([str(script)], 2) == code
        assert capfd.readouterr().err.count("said") == said


def test_workers_end_with_the_one_that_started_them(tmp_path):
    """Even if that was killed, they save and end."""
    run = tmp_path / "run"
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, signal, time, nitro_e.cli.processes as p\np.end_with_parent()\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(run)!r}).touch(), exit()))\n"
        f"pathlib.Path({str(run) + '-began'!r}).touch()\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", START, json.dumps([str(script)])])
    wait_until(Path(f"{run}-began").exists)
    process.kill()
    wait_until(run.exists)


def wait_until(true, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        ("auto", {}, 3),
        ("auto", {"OMP_NUM_THREADS": "2"}, 1),
        ("auto", {"WORLD_SIZE": "4"}, 1),
        (2, {}, 2),
        (5, {"OMP_NUM_THREADS": "1"}, 5),
        (5, {"WORLD_SIZE": "4"}, 1),
        (1, {}, 1),
    ],
)
def test_the_number_of_processes(monkeypatch, given, environment, expected):
    """One per core that can share the work; a launcher, or a number of threads, has chosen already."""
    monkeypatch.setattr(processes, "cores", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.chosen(given, lambda count: 12 % count == 0 and count < 4) == expected


def test_training_starts_its_processes(monkeypatch):
    """As many as divide the batch; a mistake in the recipe is said here, once."""
    launched = []
    monkeypatch.setattr(processes, "launch", lambda command, count: launched.append((command, count)) or 0)
    monkeypatch.setattr(processes, "cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS")
    recipe = str(Path(__file__).parent.parent / "configs" / "shapes" / "1_pretrain.yaml")
    command = [recipe, "batch=32", *OPTIMIZER]
    assert train.main(command) == 0
    assert launched == [(["-m", "nitro_e.cli", "train", *command], 4)]
    assert train.main([*command, "model.widht=3"]) == 2
    assert train.main([recipe, "data.reader=stream", *OPTIMIZER, "--dry-run"]) == 0
    assert len(launched) == 1 and "NITRO_E_WORKER" not in os.environ


def test_training_starts_no_more_processes_than_chains_allow(monkeypatch):
    """Stage 4 on prompts alone: the samples of a process are whole chains of the sampler's steps."""
    launched = launches(monkeypatch, 4)
    recipe = str(Path(__file__).parent.parent / "configs" / "shapes" / "few_step" / "prompts.yaml")
    for batch in ("batch=48", "batch=40", "batch=36"):
        assert train.main([recipe, batch, "stage.inputs.sigmas=[1.0, 0.75, 0.5, 0.25]", *OPTIMIZER]) == 1
    assert launched == [4, 2, 3]


def test_synthesis_starts_no_more_processes_than_shards(monkeypatch, tmp_path):
    launched = launches(monkeypatch, 8)
    (tmp_path / "prompts.txt").write_text("a red circle\n" * 1000)
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    assert synthesize.main(["shapes", *arguments, "--samples-per-shard", "400"]) == 1
    assert launched == [3]
    monkeypatch.setattr(synthesize, "run", lambda args: launched.append(1))
    assert synthesize.main(["shapes", *arguments, "--limit", "100", "--samples-per-shard", "4"]) == 0
    assert synthesize.main(["--pipeline", "somebody/large", *arguments, "--samples-per-shard", "4"]) == 0
    assert launched == [3, 1, 1]


def launches(monkeypatch, cores: int) -> list[int]:
    """Record the numbers of processes that commands would start on so many cores."""
    launched = []
    monkeypatch.setattr(processes, "launch", lambda command, count: launched.append(count) or 1)
    monkeypatch.setattr(processes, "cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS")
    return launched


@pytest.mark.parametrize(
    ("images", "batches", "weights", "expected"),
    [
        (127, 100, 0, 1),  # not worth a start
        (128, 100, 0, 2),
        (10_000, 3, 0, 3),
        (10_000, 100, 0, 8),
        (10_000, 100, 2 * 2**30, 2),  # each needs 4 of 16 GB, of which a half may be used
        (10_000, 100, 5 * 2**30, 1),
        (10_000, 100, None, 1),  # not on this machine yet
    ],
)
def test_processes_that_are_worth_their_start_and_memory(monkeypatch, images, batches, weights, expected):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4 * 2**20}.get)
    monkeypatch.setattr(processes, "cores", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert processes.chosen("auto", processes.Workload(images, batches, weights).fits) == expected


def test_sampling_and_evaluation_start_processes_for_many_images(monkeypatch, tmp_path, capsys):
    launched, out = launches(monkeypatch, 3), ["--out", str(tmp_path / "out")]
    (tmp_path / "prompts.txt").write_text("a red circle\n" * 64)
    many = ["shapes", "--prompts-file", str(tmp_path / "prompts.txt"), "--num-images", "3", *out]
    assert sample.main(many) == 1
    assert sample.main([*many, "--batch-size", "96"]) == 1
    assert evaluate.main(["shapes", "shapes", *out]) == 1
    assert evaluate.main(["shapes", "shapes", "--num", "72", "--steps", "1", "2", *out]) == 1
    assert launched == [3, 2, 3, 2]
    # what one process does for itself
    monkeypatch.setattr(sample, "draw", lambda options: launched.append(1))
    monkeypatch.setattr(evaluate, "command", lambda options: launched.append(1))
    monkeypatch.setattr(sys, "stdin", None)  # it is not read for the choice
    single = [["shapes", "--prompt", "a red circle", *out], ["shapes", "--prompts-file", "-", *out]]
    assert [sample.main(arguments) for arguments in single] == [0, 0]
    others = [["shapes", "shapes", "--num", "100"], ["shapes", "shapes", "--rejudge"], ["geneval", "shapes"]]
    assert [evaluate.main([*arguments, *out]) for arguments in others] == [0, 0, 0]
    assert launched[4:] == [1] * 5
    assert sample.main(["nowhere", *many[1:]]) == 2 and "'nowhere' does not exist" in capsys.readouterr().err


def test_the_size_of_weights_with_their_encoders(tmp_path):
    parts = {
        name: sum(p.stat().st_size for p in (SHIPPED / name).rglob("*.safetensors"))
        for name in ("codec", "text")
    }
    model = bytes_on_disk("shapes") - sum(parts.values())
    assert model == (SHIPPED / "model" / "model.safetensors").stat().st_size
    released = tmp_path / "released.safetensors"
    released.write_bytes(bytes(100))
    given = {"codec": f"dc-ae-f32c32={SHIPPED / 'codec'}", "text": f"llama-3.2-1b={SHIPPED / 'text'}"}
    assert bytes_on_disk(released, **given) == 100 + sum(parts.values())
    assert bytes_on_disk(released, codec=given["codec"]) is None


def test_two_processes_draw_as_one(monkeypatch, tmp_path, capfd):
    """The same bytes in the same folder, the sheet too; the end is told once."""
    arguments = [
        "shapes",
        "--prompt",
        "a photo of a red circle",
        "--prompt",
        "a photo of two stars",
        "--num-images",
        "3",
    ]
    arguments += ["--steps", "1", "--batch-size", "2"]
    assert sample.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    capfd.readouterr()
    assert sample.main([*arguments, "--processes", "2", "--out", str(tmp_path / "two")]) == 0
    out = capfd.readouterr().out
    assert (
        out.count("6 images are in") == 1 and "images drawn" not in out and out.count("1 step of euler") == 1
    )
    one, two = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert "grid.png" in one and one == two


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_interrupted_and_killed_processes_are_gone_on_from(tmp_path, command):
    """Ctrl-C, then a killed child, then the rest: said once each, and the images of one process."""
    (tmp_path / "prompts.txt").write_text("".join(f"a photo of {n} red circles\n" for n in range(240)))
    chosen = ["--prompts-file", str(tmp_path / "prompts.txt")] if command == "sample" else ["--num", "240"]
    start = [
        sys.executable,
        "-m",
        "nitro_e.cli",
        command,
        *(["shapes"] if command == "evaluate" else []),
        "shapes",
    ]
    start += [*chosen, "--steps", "10", "--batch-size", "4", "--processes"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop("RANK", None)

    def begin(count: int, out: Path) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # a shell's background job ignores Ctrl-C, and so would its children
        default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        return subprocess.Popen([*start, str(count), "--out", str(out)], env=environment, **pipes, **default)

    out = tmp_path / "two"
    process = begin(2, out)
    wait_until(lambda: len(list(out.rglob("*.png"))) > 20, 600)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130 and errors.count("interrupted") == 1
    process = begin(2, out)
    there = len(list(out.rglob("*.png")))
    wait_until(lambda: len(list(out.rglob("*.png"))) > there + 8, 600)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGKILL
    assert errors.count("SIGKILL ended process 1 of 2; run the same command again to continue") == 1
    for count, folder in ((2, out), (1, tmp_path / "one")):
        process = begin(count, folder)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    images = [{p.name: p.read_bytes() for p in f.rglob("*.png")} for f in (out, tmp_path / "one")]
    assert images[0] == images[1] and len(images[0]) == 240
