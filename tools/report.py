"""Write the pages of runs: what `nitro-e report` does, from a checkout. See nitro_e/cli/report.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("report")
