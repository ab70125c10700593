"""Weights averaged over a length chosen after training (post-hoc EMA, nitro_e/training/ema.py).

    nitro-e ema list RUN
    nitro-e ema synthesize RUN --sigma-rel 0.08 --out models/mine-ema08 [--step 50000]
    nitro-e sample models/mine-ema08 --prompt "..."

The run must have been trained with post-hoc snapshots. sigma_rel is the length of the average as a share of the
training so far; good values lie between 0.03 and 0.20. The model folder has what sampling needs, like any other.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nitro_e.cli import common as cli
from nitro_e.config import ConfigError
from nitro_e.files import atomic_path
from nitro_e.model.pretrained import load_state, read_config, save_pretrained
from nitro_e.record import run_folder
from nitro_e.training import ema


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the snapshots of a run")
    listing.add_argument("run", metavar="RUN", type=Path)
    synthesis = commands.add_parser("synthesize", help="write a model folder")
    synthesis.add_argument("run", metavar="RUN", type=Path)
    synthesis.add_argument(
        "--sigma-rel", type=float, required=True, help="length of the average, for example 0.08"
    )
    synthesis.add_argument(
        "--step", type=int, help="the average as of this step; the newest snapshot if not given"
    )
    synthesis.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    options = parser.parse_args(arguments)
    return cli.run(lambda: show(options.run) if options.command == "list" else synthesize(options))


def snapshots_of(run: Path) -> list[ema.Snapshot]:
    snapshots = ema.list_snapshots(run / ema.FOLDER)
    if not snapshots:
        raise ConfigError(
            f"{run} has no snapshots in {ema.FOLDER}/; they are written while training, when asked for"
        )
    return snapshots


def show(run: Path) -> None:
    snapshots = snapshots_of(run)
    for snapshot in snapshots:
        print(f"step {snapshot.step:>8}  sigma_rel {snapshot.sigma_rel:.3f}  {snapshot.path}")
    size = sum(snapshot.path.stat().st_size for snapshot in snapshots)
    print(f"{len(snapshots)} snapshots, {size / 1e9:.2f} GB")


def synthesize(options: argparse.Namespace) -> None:
    out: Path = options.out
    if out.exists():
        raise ConfigError(f"--out '{out}' exists; remove it or give another name")
    newest = run_folder.latest(options.run)
    if newest is None:
        raise ConfigError(f"{options.run} holds no complete checkpoint, whose config.json is needed")
    state, report = ema.synthesize(snapshots_of(options.run), options.sigma_rel, options.step)
    config = read_config(newest / "model")
    model = config["model"].build()
    load_state(model, state, options.run / ema.FOLDER)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary:
        save_pretrained(model, temporary, config["use"])
    print(f'{out}: {report}. Try it: nitro-e sample {out} --prompt "..."')
