"""SIGKILL at random moments, again and again, until the run ends: the loss curve is that of a run nobody disturbed.

The toy run of `toy_run.py` saves at every second step, so a large part of its time is saving; every third kill waits for
a save to begin, every third comes at any time, imports and resume included. Attempts are forked from a server that has torch imported, each is a process of its own.

    python -m pytest -s tests/test_chaos.py          prints what was killed when
"""

import multiprocessing
import os
import random
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import toy_run
from tqdm import tqdm

from nitro_e import checkpoint, metrics
from nitro_e.model.pretrained import load_pretrained

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["toy_run"])


def attempt(run: Path, options: dict) -> None:
    """Runs in the process that is killed."""
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a kill leaves behind
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
    toy_run.main(run, options)


def start(run: Path, options: dict) -> multiprocessing.Process:
    process = SERVER.Process(target=attempt, args=(run, options), daemon=True)
    process.start()
    return process


def saving(run: Path, since: float) -> bool:
    """Whether a save that began after `since` is not finished."""
    try:
        return any(folder.stat().st_ctime > since for folder in (run / "checkpoints").glob("step-*.tmp"))
    except FileNotFoundError:  # finished in between
        return False


def kill(process: multiprocessing.Process, run: Path, chance: random.Random, when: str) -> bool:
    """At any time from the start on, some saves later, or in the middle of a save. Returns whether a save was cut."""
    began, before = time.time(), newest_step(run)
    later = before + 2 * chance.randrange(4)
    while when != "any time" and process.is_alive() and not (
        newest_step(run) > later and (when == "between" or saving(run, began))
    ):  # fmt: skip
        time.sleep(0.0005)
    process.join(chance.uniform(0, {"any time": 1.0, "between": 0.05, "in a save": 0.02}[when]))
    process.kill()
    process.join()
    return saving(run, began)


def newest_step(run: Path) -> int:
    newest = checkpoint.latest(run)
    return 0 if newest is None else int(checkpoint.STEP.fullmatch(newest.name)[1])


def assert_all_load(run: Path) -> None:
    """Every checkpoint that looks complete has the right hashes and loads."""
    for folder in checkpoint.complete(run):
        assert checkpoint.damage(folder) is None
        assert load_pretrained(folder / "model") and load_pretrained(folder / "ema")
        assert torch.load(folder / "trainer" / "model.pt", weights_only=True)["module"]


def chaos(tmp_path: Path, kills: int, steps: int, seed: int) -> None:
    options = {"steps": steps, "save_every": 2, "pause": 0.002}
    clean, run = tmp_path / "clean", tmp_path / "run"
    undisturbed = start(clean, {**options, "pause": 0.0})
    chance, reached, interrupted, began = random.Random(seed), [], 0, time.time()
    for number in range(kills):
        process = start(run, dict(options))
        interrupted += kill(process, run, chance, ("in a save", "any time", "between")[number % 3])
        assert process.exitcode == -9, (
            f"it ended before it could be killed, those before at {reached}: raise steps"
        )
        assert_all_load(run)
        reached.append(newest_step(run))
    last = start(run, dict(options))
    last.join(120)
    undisturbed.join(120)
    assert (last.exitcode, undisturbed.exitcode) == (0, 0)

    rows = {"clean": metrics.read(clean), "killed": metrics.read(run)}
    curves = {name: {row["step"]: (row["loss"], row["grad_norm"]) for row in of} for name, of in rows.items()}
    assert [row["step"] for row in rows["killed"]] == list(range(1, steps + 1))
    difference = max(
        abs(a - b) for step, ours in curves["killed"].items() for a, b in zip(ours, curves["clean"][step])
    )
    print(
        f"\n{kills} kills, {interrupted} of them in a save, checkpoints found at steps {reached} of {steps}, "
        f"{time.time() - began:.1f} s, largest difference of losses and gradient norms {difference}", file=sys.stderr,
    )  # fmt: skip
    assert curves["killed"] == curves["clean"] and difference == 0.0
    assert interrupted >= kills // 10 and reached == sorted(reached) and reached[-1] > 0
    for which in ("model", "ema"):
        ours, theirs = (
            torch.load(checkpoint.latest(r) / "trainer" / f"{which}.pt", weights_only=True)
            for r in (run, clean)
        )
        assert all(torch.equal(ours["module"][name], tensor) for name, tensor in theirs["module"].items())
    assert_all_load(run)


@pytest.fixture(autouse=True)
def _imports(monkeypatch):
    """The fork server starts as a bare Python."""
    root = Path(__file__).parent
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(root), str(root.parent), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_three_kills(tmp_path):
    chaos(tmp_path, kills=3, steps=40, seed=0)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    chaos(tmp_path, kills=20, steps=200, seed=1)
