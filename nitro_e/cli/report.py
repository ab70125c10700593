"""Make the report of a run anew, or compare several.

    nitro-e report RUN                       RUN/report.html
    nitro-e report RUN RUN ... [--out FILE]  every RUN/report.html, and FILE with overlaid curves

Training writes the report of its run when it ends; while it runs, this shows how far it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nitro_e.cli import common as cli
from nitro_e.record.pages import write_comparison, write_report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run directories")
    parser.add_argument(
        "--out", type=Path, default=Path("comparison.html"), help="of several runs (default: %(default)s)"
    )
    options = parser.parse_args(arguments)

    def command() -> None:
        for run in options.runs:
            print(write_report(run))
        if len(options.runs) > 1:
            print(write_comparison(options.runs, options.out))

    return cli.run(command)
