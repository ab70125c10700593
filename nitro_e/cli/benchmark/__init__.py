"""How fast the parts are on this machine, each beside a plain way of doing the same.

    python tools/benchmark.py model     the model's forward pass and training step
    python tools/benchmark.py data      finding and reading samples
    python tools/benchmark.py engine    what the training loop adds to a step

Each has its own options: `python tools/benchmark.py model --help`.
"""

from __future__ import annotations

import argparse
import importlib
import sys


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("model", "data", "engine"))
    part = parser.parse_args(arguments[:1]).part
    return importlib.import_module(f"nitro_e.cli.benchmark.{part}").main(arguments[1:])
