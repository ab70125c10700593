"""What long work shows: bars on a terminal, plain lines in a log file, no chatter; in fresh interpreters."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

from nitro_e.training.meters import Progress

ROOT = Path(__file__).parent.parent
BARS = """
import sys, time
from nitro_e.record import progress
progress.SECONDS = 0.2
for number in progress.bar(range(20), desc="long", unit="img"):
    time.sleep(0.05)
for number in progress.bar(range(20), desc="inner", brief=True, leave=False):
    pass
with progress.bar(total=3, desc="by hand", unit="step") as bar:
    for number in range(3):
        bar.set_postfix(bad=number)
        bar.update()
with progress.bar(total=3, desc="off", disable=True) as bar:
    bar.update()
try:
    for number in progress.bar(range(9), desc="broken"):
        assert number < 2
except AssertionError:
    pass
"""


def run(command: list[str], folder: Path) -> str:
    """Everything that a command writes when its output goes to a file."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("wb") as log:
        subprocess.run(
            [sys.executable, *command], cwd=folder, env=variables, stdout=log, stderr=log, check=True
        )
    return (folder / "log").read_bytes().decode()


def test_a_log_file_has_plain_lines(tmp_path):
    lines = run(["-c", BARS], tmp_path).splitlines(keepends=True)
    assert all(line.endswith("\n") and "\r" not in line and "\x1b" not in line for line in lines)
    names = [line.partition(":")[0] for line in lines]
    assert (
        3 <= names.count("long") <= 8 and names[-2:] == ["by hand", "broken"] and set(names[:-2]) == {"long"}
    )
    assert "long: 20 of 20 img" in lines[-3] and "by hand: 3 of 3 step" in lines[-2] and "bad=2" in lines[-2]


def test_the_log_of_a_command_has_no_bars(tmp_path):
    """Those of transformers ("Loading weights") and of the sampler were in it."""
    command = [str(ROOT / "sample.py"), "shapes", "--prompt", "a red circle", "--steps", "2", "--out", "out"]
    text = run(command, tmp_path)
    settings, bar, end = text.splitlines()
    assert settings == "shapes: 2 steps of euler, guidance 3, 64x64 px, float32 on cpu"
    assert bar.startswith("sample: 1 of 1 img") and "\r" not in text
    assert end == "1 images drawn; they are in out/, listed in manifest.jsonl"


def test_a_terminal_shows_a_bar(tmp_path):
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-c", BARS]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=variables, stderr=inner, stdout=inner)
    os.close(inner)
    shown = b""
    while True:
        try:
            part = os.read(outer, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(outer)
    assert process.wait() == 0 and shown.count(b"\r") > 10 and b"inner" in shown and b"100%|" in shown


def test_losses_of_other_phases_stand_in_until_the_model_learns(capsys):
    """Stage 4 with a student that begins later: no "loss nan"."""
    shown = Progress("distill", 0, 30, True, ("loss", "reward/total"))
    rate = {"samples_per_second": 1.0}
    shown.report(10, {"heads/loss": 0.5, "heads/grad_norm": 2.0, **rate})
    shown.report(20, {"heads/loss": 0.25, "loss": 1.0, "reward/total": 0.123456, **rate})
    shown.report(30, {"heads/loss": 0.125, **rate})
    shown.close()
    lines = capsys.readouterr().err.splitlines()
    numbers = ["heads/loss 0.5000", "loss 1.0000  total 0.1235", "loss 1.0000  total 0.1235"]
    assert lines == [f"distill {10 * n}/30  {text}  1.0 samples/s" for n, text in enumerate(numbers, 1)]
