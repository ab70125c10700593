"""Measure speed on this machine: what `nitro-e benchmark` does, from a checkout. See nitro_e/cli/benchmark/."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("benchmark")
