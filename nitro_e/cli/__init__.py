"""The installed command: `nitro-e train CONFIG`, `nitro-e sample RUN`, and so on; `nitro-e --help` lists them.

Each command is the module of its name with `main(arguments) -> exit code`. `train.py`, `sample.py` and `tools/*.py` of a
checkout are fronts of the same functions.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import NoReturn

from nitro_e import __version__

COMMANDS = {
    "demo": "See every stage do its work, in nine minutes",
    "train": "Train a stage of a recipe",
    "sample": "Draw images",
    "serve": "Draw in a browser",
    "data": "Pack, encode, verify and look at data",
    "evaluate": "Score a model on a benchmark",
    "reward-server": "Score images for trainings elsewhere",
    "synthesize": "Draw a teacher's images as training data",
    "convert": "Convert released weights to ours and back",
    "export": "Write a model for diffusers, ONNX or torch.export",
    "describe": "Count parameters, tokens and FLOPs",
    "report": "Write the pages of runs",
    "ema": "Make averages of weights after a training",
    "benchmark": "Measure speed on this machine",
    "rehearse": "Try a recipe at full size, on random numbers",
    "study": "Train variants of a recipe and compare them",
    "speedrun": "Train from scratch and add a row to the table of what a score costs",
    "make-shapes": "Make scenes of the offline domain",
}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command that the first argument names, and exit with its code."""
    from nitro_e.cli.common import leave

    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "--help"
    if name in ("--version", "-V"):
        print(f"nitro-e {__version__}")
        leave(0)
    if name in ("--help", "-h"):
        width = max(map(len, COMMANDS))
        print("usage: nitro-e COMMAND ...\n")
        print("\n".join(f"  {command:<{width}}  {text}" for command, text in COMMANDS.items()))
        print("\nnitro-e COMMAND --help tells the rest")
        leave(0)
    if name not in COMMANDS:
        from nitro_e.config import did_you_mean

        print(
            f"error: nitro-e has no command '{name}'{did_you_mean(name, COMMANDS)}; it has {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        leave(2)
    run_front(name, arguments[1:], program=f"nitro-e {name}")


def run_front(name: str, arguments: list[str] | None = None, program: str | None = None) -> NoReturn:
    """Run one command and exit with its code; `program` is what its messages call it."""
    from nitro_e.cli.common import leave

    # before torch is imported: threads that wait leave their core to others
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if program is not None:
        sys.argv[0] = program  # argparse names it in messages
    module = importlib.import_module(f"nitro_e.cli.{name.replace('-', '_')}")
    leave(module.main(sys.argv[1:] if arguments is None else arguments))
