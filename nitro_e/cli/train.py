"""Train a stage:  nitro-e train configs/shapes/1_pretrain.yaml [key=value ...]

On a CPU it starts one process per core by itself. GPUs:  torchrun --nproc_per_node 8 -m nitro_e.cli train CONFIG
To resume, run the same command again. Checkpoints, metrics and sample grids are in the run directory.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from pathlib import Path

from nitro_e.cli import common as cli
from nitro_e.cli import processes
from nitro_e.config import environment_number, load

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="a YAML recipe, see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example engine.steps=1000 batch=64"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained, then exit")
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="tell the keys of a recipe, all or those below KEY; exit",
    )
    processes.flag(parser)
    options = parser.parse_intermixed_args(arguments)  # overrides may follow --dry-run
    if options.config is None and options.explain is None:
        parser.error("the following arguments are required: config")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if options.explain is not None:
        return cli.run(lambda: tell(options.explain))
    if options.dry_run:
        return cli.run(lambda: preview(options))
    started = processes.start("train", options.processes, arguments, lambda world: can_share(options, world))
    return cli.run(lambda: train(options)) if started is None else started


def tell(key: str) -> None:
    """Print the keys of a recipe, all of them or those below `key`."""
    from nitro_e.cli.explain import explain
    from nitro_e.stages.recipe import RunConfig

    print(explain(RunConfig, key))


def make_page(folder: Path) -> None:
    """Write the run's report.html, however the training ended; without one a finished run is finished all the same."""
    from nitro_e.record.pages import write_report

    try:
        write_report(folder)
    except Exception as error:  # a page for people must not turn a finished run into a failed one
        log.warning("no report.html: %s", error)


def preview(options: argparse.Namespace) -> None:
    """Print what would be trained."""
    from nitro_e.stages.recipe import RunConfig, summary

    print(summary(load(RunConfig, options.config, options.overrides), options.overrides))


def can_share(options: argparse.Namespace, world: int) -> bool:
    """Tell whether so many processes of this machine can share the recipe's batch, with the same results as one."""
    from nitro_e.config import ConfigError
    from nitro_e.model import describe
    from nitro_e.stages.recipe import RunConfig

    config = load(RunConfig, options.config, options.overrides)
    if config.data is not None and config.data.reader == "stream":
        return False
    try:
        config.stage_kind.split(config, world)
    except ConfigError:
        return False
    # weights, gradients and two moments
    return processes.memory_holds(world * 16 * describe.total(config.model).parameters)


def train(options: argparse.Namespace) -> None:
    from nitro_e.record import run_folder  # after the arguments: --help needs no torch
    from nitro_e.stages.recipe import RunConfig, build

    config = load(RunConfig, options.config, options.overrides)
    first = environment_number("RANK", 0) == 0
    with run_folder.lock(config.folder) if first else contextlib.nullcontext():
        engine = build(config)
        try:
            finished = engine.run()
        finally:
            if engine.accelerator.is_main_process:
                make_page(engine.run_folder)
    if engine.accelerator.is_main_process:
        if finished:
            print(
                f"done: {engine.step} steps. Sample with: nitro-e sample {engine.run_folder} --prompt '...'"
            )
        else:
            print(f"stopped at step {engine.step}, checkpoint saved. Run the same command to continue.")
