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

from nitro_e.cli import processes, synthesize, train
from nitro_e.record import run_folder

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
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
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


def wait_until(true) -> None:
    deadline = time.monotonic() + 60
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
    assert train.main([recipe, "batch=32"]) == 0
    assert launched == [(["-m", "nitro_e.cli", "train", recipe, "batch=32"], 4)]
    assert train.main([recipe, "batch=32", "model.widht=3"]) == 2
    assert train.main([recipe, "data.reader=stream", "--dry-run"]) == 0
    assert len(launched) == 1 and "NITRO_E_WORKER" not in os.environ


def test_synthesis_starts_no_more_processes_than_shards(monkeypatch, tmp_path):
    launched = []
    monkeypatch.setattr(processes, "launch", lambda command, count: launched.append(count) or 0)
    monkeypatch.setattr(processes, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    (tmp_path / "prompts.txt").write_text("a red circle\n" * 10)
    arguments = ["shapes", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    assert synthesize.main([*arguments, "--samples-per-shard", "4"]) == 0
    assert launched == [3]
