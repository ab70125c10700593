"""SIGKILL at random moments, again and again, until the run ends: the run is that which nobody disturbed, to the bit.

Every attempt is a fresh interpreter with the real `train.py`, the REPA recipe and a data worker, started the moment the
one before was killed. It saves at every second step; every other kill waits for a save to begin, the rest come at any
time, imports and resume included.

    python -m pytest -s -m slow tests/test_chaos.py          prints what was killed when
"""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from repa_run import make_data, start

from nitro_e.model.pretrained import load_pretrained
from nitro_e.record import metrics, run_folder
from nitro_e.training import checkpoint


def saving(run: Path, since: float) -> bool:
    """Whether a save that began after `since` is not finished."""
    try:
        return any(folder.stat().st_ctime > since for folder in (run / "checkpoints").glob("step-*.tmp"))
    except FileNotFoundError:  # finished in between
        return False


def kill(process: subprocess.Popen, run: Path, chance: random.Random, in_a_save: bool) -> bool:
    """In the middle of a save some steps later, or within the time that a start takes. Returns whether a save was cut."""
    began = time.time()
    if in_a_save:
        later = newest_step(run) + 2 * chance.randrange(3)
        while process.poll() is None and not (newest_step(run) >= later and saving(run, began)):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.02))
    else:
        time.sleep(chance.uniform(0, 12))
    process.kill()
    process.wait()
    return saving(run, began)


def newest_step(run: Path) -> int:
    newest = run_folder.latest(run)
    return 0 if newest is None else run_folder.step_of(newest)


def assert_all_load(run: Path) -> None:
    """Every checkpoint that looks complete has the right hashes and loads."""
    for folder in run_folder.complete(run):
        assert checkpoint.damage(folder) is None
        assert load_pretrained(folder / "model") and load_pretrained(folder / "ema")
        assert torch.load(folder / "trainer" / "model.pt", weights_only=True)["module"]


def chaos(folder: Path, kills: int, steps: int, seed: int) -> None:
    make_data(folder)
    clean, run = folder / "clean", folder / "run"
    undisturbed = start(folder, "clean", f"engine.steps={steps}")
    chance, reached, cut, began = random.Random(seed), [], 0, time.time()
    for number in range(kills):
        process = start(folder, "run", f"engine.steps={steps}", log=folder / "log")
        cut += kill(process, run, chance, in_a_save=number % 2 == 0)
        assert process.returncode in (-9, 0), (folder / "log").read_text()[-2000:]
        assert_all_load(run)
        reached.append(newest_step(run))
    last = start(folder, "run", f"engine.steps={steps}", log=folder / "log")
    assert (last.wait(300), undisturbed.wait(300)) == (0, 0), (folder / "log").read_text()[-2000:]

    rows = {name: metrics.read(folder / name) for name in ("clean", "run")}
    names = ("loss", "velocity_loss", "repa_loss", "grad_norm")
    curves = {name: {row["step"]: [row[key] for key in names] for row in of} for name, of in rows.items()}
    print(
        f"\n{kills} kills, {cut} of them in a save, checkpoints found at steps {reached} of {steps}, "
        f"{time.time() - began:.1f} s, curves equal: {curves['run'] == curves['clean']}",
        file=sys.stderr,
    )
    assert [row["step"] for row in rows["run"]] == list(range(1, steps + 1))
    assert curves["run"] == curves["clean"]
    assert cut >= kills // 5 and reached == sorted(reached) and 0 < reached[-1]
    for which in ("model", "ema"):
        ours, theirs = (
            torch.load(run_folder.latest(r) / "trainer" / f"{which}.pt", weights_only=True)["module"]
            for r in (run, clean)
        )
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert_all_load(run)


def test_two_kills(tmp_path):
    chaos(tmp_path, kills=2, steps=12, seed=0)


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    chaos(tmp_path, kills=20, steps=120, seed=1)


@pytest.mark.slow
def test_twelve_full_disks(tmp_path):
    """A small file system that fills up after a few saves, or at the first: one line, STATUS.json, and a whole checkpoint.

    Needs the right to mount (root); a limit on the size of files stands in for it in test_engine.py.
    """
    make_data(tmp_path)
    probe = start(tmp_path, "probe", "engine.steps=2")
    assert probe.wait(120) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "probe").rglob("*") if path.is_file())
    ends = []
    for number in range(12):
        mount, log = tmp_path / f"disk{number}", tmp_path / f"log{number}"
        mount.mkdir()
        room = int(size * (0.2 + 0.3 * number))  # from less than one checkpoint to about three and a half
        command = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(mount)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this user may not mount a small file system")
        try:
            process = start(tmp_path, f"{mount}/run", "engine.steps=12", log=log)
            code, run, text = process.wait(300), mount / "run", log.read_text()
            status, newest = run_folder.read_status(run), checkpoint.latest_valid(run)
            ends.append((room, code, status.get("state"), newest and run_folder.step_of(newest)))
            assert "Traceback" not in text, text[-3000:]
            assert (code, status.get("state")) in [(0, "done"), (3, "failed")], (
                room,
                code,
                status,
                text[-2000:],
            )
            assert not list(run.glob("checkpoints/*.tmp"))
            if code:
                assert "could not be saved" in text and "No space left on device" in text
        finally:
            subprocess.run(["umount", str(mount)], check=True)
    print("\nbytes, exit code, status, newest whole checkpoint:", *ends, sep="\n", file=sys.stderr)
    assert {code for _, code, _, _ in ends} == {0, 3}
