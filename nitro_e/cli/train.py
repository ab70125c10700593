"""Train a stage:  nitro-e train configs/shapes/1_pretrain.yaml [key=value ...]

Several processes:  torchrun --nproc_per_node 8 -m nitro_e.cli train CONFIG
To resume, run the same command again. Checkpoints, metrics and sample grids are in the run directory.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os

from nitro_e.cli import common as cli
from nitro_e.config import load


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML recipe, see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example engine.steps=1000 batch=64"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained, then exit")
    options = parser.parse_intermixed_args(arguments)  # overrides may follow --dry-run
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return cli.run(lambda: train(options))


def train(options: argparse.Namespace) -> None:
    from nitro_e.stages.recipe import RunConfig, build, summary
    from nitro_e.training import checkpoint  # after the arguments: --help needs no torch

    config = load(RunConfig, options.config, options.overrides)
    if options.dry_run:
        print(summary(config, options.overrides))
        return
    first = os.environ.get("RANK", "0") == "0"
    with checkpoint.lock(config.folder) if first else contextlib.nullcontext():
        engine = build(config)
        finished = engine.run()
    if engine.accelerator.is_main_process:
        if finished:
            print(
                f"done: {engine.step} steps. Sample with: nitro-e sample {engine.run_folder} --prompt '...'"
            )
        else:
            print(f"stopped at step {engine.step}, checkpoint saved. Run the same command to continue.")
