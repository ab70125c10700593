"""Two processes through torchrun and gloo: the same losses as one, faults on one process only, sharding."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_engine import losses
from tiny import SHARDS_ON_CPU

from nitro_e.record import run_folder
from nitro_e.training.attendance import Attendance

SCRIPT = Path(__file__).parent / "toy_run.py"


def launch(run: Path, processes: int, **options) -> subprocess.CompletedProcess:
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NITRO_E_TIMEOUT_MINUTES": "1"}
    command = [sys.executable, *torchrun, str(SCRIPT), str(run), json.dumps(options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The run of one process, batch 16."""
    run = tmp_path_factory.mktemp("one") / "run"
    done = launch(run, 1, batch_size=16)
    assert done.returncode == 0, done.stderr
    return run


def assert_same_losses(run: Path, other: Path) -> None:
    ours, theirs = losses(run), losses(other)
    assert ours.keys() == theirs.keys() and len(ours) == 12
    for step in ours:
        assert ours[step] == pytest.approx(theirs[step], rel=1e-6), step


def weights(run: Path, which: str = "model") -> dict[str, torch.Tensor]:
    state = torch.load(run_folder.latest(run) / "trainer" / f"{which}.pt", weights_only=True)["module"]
    return state


def accelerate(run: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(SCRIPT), str(run)]
    environment = {**os.environ, "NITRO_E_TIMEOUT_MINUTES": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, json.dumps({"batch_size": 8})],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_accelerates_launcher_that_starts_one_of_two_is_refused(tmp_path):
    done = accelerate(tmp_path / "run", "--cpu", "--num_processes", "2")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and "torchrun --nproc_per_node N" in lines[0], done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_accelerates_launcher_with_several_and_with_one(one, tmp_path):
    done = accelerate(tmp_path / "run", "--multi_gpu", "--num_processes", "2")
    assert done.returncode == 0, done.stderr
    assert_same_losses(tmp_path / "run", one)
    done = accelerate(tmp_path / "single", "--cpu", "--num_processes", "1")
    assert done.returncode == 0, done.stderr


def test_two_processes_stopped_and_resumed_as_one(one, tmp_path):
    """SIGTERM on rank 1 alone: both stop at the same step and save; one process finishes with the losses of one."""
    run = tmp_path / "run"
    done = launch(run, 2, batch_size=8, fault="sigterm")
    assert done.returncode == 0, done.stderr
    ends = {line for line in done.stdout.splitlines() if line.startswith("rank")}
    steps = {line.split("step ")[1] for line in ends}
    assert len(ends) == 2 and len(steps) == 1
    assert done.stdout.count("buffers are sent with every step: False") == 2  # the position table has 28 MB
    status = json.loads((run / "STATUS.json").read_text())
    assert status["state"] == "preempted" and 0 < status["step"] < 12
    done = launch(run, 1, batch_size=8, accumulate=2)
    assert done.returncode == 0, done.stderr
    assert_same_losses(run, one)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(one)[name], rtol=1e-6, atol=1e-7)


needs_sharding = pytest.mark.skipif(not SHARDS_ON_CPU, reason="this torch shards on GPUs only")


@needs_sharding
def test_sharded_training_is_replicated_training(one, tmp_path):
    """FSDP2 until the middle, then one whole process on its checkpoint: same names, losses, weights and average."""
    run = tmp_path / "run"
    done = launch(run, 2, batch_size=8, sharding="fsdp", fault="sigusr1")
    assert done.returncode == 0, done.stderr
    done = launch(run, 1, batch_size=16)
    assert done.returncode == 0, done.stderr
    assert_same_losses(run, one)
    for which in ("model", "ema"):
        assert weights(run, which).keys() == weights(one, which).keys()
        for name, tensor in weights(run, which).items():
            torch.testing.assert_close(tensor, weights(one, which)[name], rtol=1e-6, atol=1e-7)


@needs_sharding
def test_a_replicated_checkpoint_continues_sharded(one, tmp_path):
    run = tmp_path / "run"
    assert launch(run, 1, batch_size=16, fault="sigterm").returncode == 0
    done = launch(run, 2, batch_size=8, sharding="fsdp")
    assert done.returncode == 0, done.stderr
    assert_same_losses(run, one)


def test_nan_on_one_process_skips_the_step_on_both(tmp_path):
    run = tmp_path / "run"
    done = launch(run, 2, fault="nan")
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank")) == [
        "rank 0 ended at step 12, skipped 1",
        "rank 1 ended at step 12, skipped 1",
    ]
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


def test_a_process_that_dies_is_named_and_the_job_may_be_tried_again(tmp_path):
    run = tmp_path / "run"
    done = launch(run, 2, fault="dies")
    assert done.returncode != 0
    assert run_folder.read_meta(run_folder.latest(run))["step"] == 4
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("training stopped")]
    assert "process 1 (pid" in line and "has died" in line and "step-0000004" in line
    status = run_folder.read_status(run)
    assert status["state"] == "crashed" and "process 1" in status["reason"]
    done = launch(run, 2, batch_size=8)
    assert done.returncode == 0 and run_folder.read_status(run)["state"] == "done", done.stderr


@pytest.mark.slow
def test_a_process_that_stops_is_named(tmp_path):
    """It takes the minute after which processes give up on each other."""
    run = tmp_path / "run"
    done = launch(run, 2, fault="stops")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("training stopped")]
    assert "process 1 (pid" in line and "is stopped" in line
    assert run_folder.read_status(run)["state"] == "crashed"


@pytest.mark.skipif(SHARDS_ON_CPU, reason="this torch can")
def test_sharding_on_cpus_is_refused_where_torch_cannot(tmp_path):
    done = launch(tmp_path / "run", 2, sharding="fsdp")
    assert done.returncode != 0 and "'fsdp' on CPUs needs a newer torch" in done.stderr


def test_sharding_needs_several_processes(tmp_path):
    done = launch(tmp_path / "run", 1, sharding="fsdp")
    assert done.returncode == 2 and "needs several processes" in done.stderr


def test_what_one_process_can_tell_of_the_others(tmp_path):
    """By their files: on other hosts only who fell behind; who waits like this one is not accused."""
    ours, closed = (
        Attendance(tmp_path, 0, 4),
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
    )
    ours.sign(7)
    for rank, age in ((1, 0), (2, 60)):
        row = {"host": "elsewhere", "pid": 1, "step": 7 - rank, "time": time.time() - age}
        (tmp_path / "processes" / f"rank-{rank}.json").write_text(json.dumps(row))
    told = ours.missing(closed).split("; ")
    assert len(told) == 2 and told[1] == "process 3 has left, or has not begun to train"
    assert told[0].startswith("process 2 (pid 1 on elsewhere, last seen at step 5) fell 60 s behind")
    assert "none of this host" in Attendance(tmp_path, 0, 2).missing(closed)
    assert ours.missing(RuntimeError("out of memory")) is None
    assert Attendance(tmp_path, 0, 1).missing(closed) is None
