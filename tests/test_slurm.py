"""The job script with stand-ins for SLURM's commands: what is launched, and when the job goes back in the queue."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$STUB/srun.txt"
if [[ -n $NEW_STATUS ]]; then mkdir -p run; echo "$NEW_STATUS" > run/STATUS.json; fi
exit $SRUN_CODE
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo node7; echo node8; else echo "$@" >> "$STUB/requeued.txt"; fi
"""
SQUEUE = """#!/bin/bash
echo "$JOB_STATE"
"""


@pytest.fixture
def submit(tmp_path):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    # torch.distributed.run --help takes seconds; anything else is the real Python
    torchrun = bin_folder / "python"
    torchrun.write_text(
        f'#!/bin/bash\nif [[ $* == *--help* ]]; then echo "$TORCHRUN_HELP"; else exec {sys.executable} "$@"; fi\n'
    )
    torchrun.chmod(0o755)

    def run(
        state=None,
        *,
        before=None,
        code=0,
        job="RUNNING",
        restarts="0",
        options="--signals-to-handle --shutdown-timeout",
    ):
        if before is not None:
            (tmp_path / "run").mkdir(exist_ok=True)
            (tmp_path / "run" / "STATUS.json").write_text(before + "\n")
        new = "" if state is None else json.dumps({"state": state, "step": 70, "time": 2.0})
        environment = {
            **os.environ,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHON": str(torchrun),
            "STUB": str(tmp_path),
            "NEW_STATUS": new,
            "SRUN_CODE": str(code),
            "JOB_STATE": job,
            "TORCHRUN_HELP": options,
            "SLURM_JOB_ID": "4321",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_RESTART_COUNT": restarts,
        }
        command = [
            "bash",
            str(ROOT / "tools" / "slurm.sh"),
            "my config.yaml",
            "run",
            "engine.steps=9",
            "data.shards=[a b.tar]",
        ]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return result, (tmp_path / "requeued.txt").exists()

    return run


def test_the_script_is_valid():
    assert subprocess.run(["bash", "-n", str(ROOT / "tools" / "slurm.sh")]).returncode == 0


def test_what_is_launched(submit, tmp_path):
    submit("done")
    arguments = (tmp_path / "srun.txt").read_text().splitlines()
    assert arguments[-5:] == [
        "train.py",
        "my config.yaml",
        "run=run",
        "engine.steps=9",
        "data.shards=[a b.tar]",
    ]
    options = dict(zip(arguments, arguments[1:]))
    assert options["--nnodes"] == "2" and options["--nproc-per-node"] == "4"
    assert options["--rdzv-endpoint"] == "node7:24321" and options["--max-restarts"] == "0"
    assert "SIGUSR1" in options["--signals-to-handle"] and int(options["--shutdown-timeout"]) < 300


def test_an_older_torchrun_is_launched_without_the_options_it_lacks(submit, tmp_path):
    result, _ = submit("done", options="nothing of the kind")
    arguments = (tmp_path / "srun.txt").read_text()
    assert "--signals-to-handle" not in arguments and "--shutdown-timeout" not in arguments
    assert result.returncode == 0 and result.stderr.count("warning") == 2


@pytest.mark.parametrize(
    ("state", "code", "job", "restarts", "expected_code", "requeued"),
    [
        ("done", 0, "RUNNING", "0", 0, False),
        # torchrun returns 1 although its workers saved and returned 0
        ("preempted", 1, "RUNNING", "50", 0, True),
        ("preempted", 0, "COMPLETING", "0", 0, False),  # scancel
        ("failed", 3, "RUNNING", "0", 3, False),
        ("running", 137, "RUNNING", "3", 0, True),  # killed without notice
        ("running", 137, "RUNNING", "20", 1, False),
        ("crashed", 1, "RUNNING", "3", 0, True),  # a process was lost
        ("crashed", 1, "RUNNING", "20", 1, False),
    ],
)
def test_the_status_decides(submit, state, code, job, restarts, expected_code, requeued):
    result, was_requeued = submit(
        state, before='{"state": "preempted"}', code=code, job=job, restarts=restarts
    )
    assert (result.returncode, was_requeued) == (expected_code, requeued), result.stderr
    assert f"run: {state} at step 70" in result.stdout


@pytest.mark.parametrize("before", [None, '{"state": "preempted", "step": 3, "time": 1.0}'])
def test_training_that_does_not_start_is_not_requeued(submit, before):
    """A mistake in the config would otherwise go round for ever."""
    result, requeued = submit(None, before=before, code=2)
    assert result.returncode == 2 and not requeued and "did not start" in result.stderr


def test_arguments_are_asked_for():
    result = subprocess.run(
        ["bash", str(ROOT / "tools" / "slurm.sh"), "config.yaml"], capture_output=True, text=True
    )
    assert result.returncode != 0 and "usage: sbatch" in result.stderr


@pytest.mark.parametrize(
    "ending, requeued", [("exit 0", False), ("exit 3", False), ("kill -USR1 $PPID; sleep 9", True)]
)
def test_a_task_of_a_study_goes_back_in_the_queue_when_it_was_warned(tmp_path, ending, requeued):
    """The command, here a stand-in, gets SLURM's warning from the script and ends with 130 once it has saved."""
    stub = tmp_path / "python"
    stub.write_text(
        f"#!/bin/bash\nprintf '%s\\n' \"$@\" > {tmp_path}/arguments.txt\ntrap 'sleep 0.2; exit 130' USR1\n"
        f"for i in 1 2 3; do sleep 0.1; done\n{ending} & wait $!\n"
    )
    (tmp_path / "squeue").write_text("#!/bin/bash\necho RUNNING\n")
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/requeued.txt\n')
    for name in ("python", "squeue", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(stub)}
    environment |= {"SLURM_ARRAY_TASK_ID": "7", "SLURM_JOB_ID": "4321"}
    script = str(ROOT / "tools" / "study_array.sh")
    result = subprocess.run(["bash", script, "my study.yaml", "seeds=[0]"], env=environment)
    arguments = (tmp_path / "arguments.txt").read_text().splitlines()
    assert arguments == ["-m", "nitro_e.cli", "study", "my study.yaml", "seeds=[0]", "--run", "7"]
    assert (tmp_path / "requeued.txt").exists() == requeued
    assert result.returncode == (130 if requeued else int(ending[-1]))
