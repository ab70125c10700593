"""Train a stage:  python train.py configs/shapes/pretrain.yaml [key=value ...]

Several processes:  torchrun --nproc_per_node 8 train.py CONFIG
To resume, run the same command again. Checkpoints, metrics and sample grids are in the run directory.
"""

from __future__ import annotations

import argparse
import logging
import sys

from nitro_e.config import ConfigError, load


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML recipe, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example engine.steps=1000 data.batch_size=64")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        from nitro_e.run import RunConfig, build  # after the arguments: --help needs no torch

        engine = build(load(RunConfig, options.config, options.overrides))
        finished = engine.run()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        from nitro_e.engine import TrainingError

        if not isinstance(error, TrainingError):
            raise
        print(f"training stopped: {error}", file=sys.stderr)
        return 3
    if engine.accelerator.is_main_process:
        if finished:
            print(f"done: {engine.step} steps. Sample with: python sample.py {engine.run_folder} --prompt '...'")
        else:
            print(f"stopped at step {engine.step}, checkpoint saved. Run the same command to continue.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
