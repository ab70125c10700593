"""Measure how fast the parts are on this machine, each beside a plain way of doing the same.

    nitro-e benchmark model     the model's forward pass and training step
    nitro-e benchmark sample    from prompts to images: text, denoise loop, decode
    nitro-e benchmark data      finding and reading samples
    nitro-e benchmark engine    what the training loop adds to a step

Each has its own options: `nitro-e benchmark model --help`.
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
    parser.add_argument("part", choices=("model", "sample", "data", "engine"))
    part = parser.parse_args(arguments[:1]).part
    return importlib.import_module(f"nitro_e.cli.benchmark.{part}").main(arguments[1:])
