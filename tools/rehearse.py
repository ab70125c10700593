"""Rehearse a recipe at full size: what `nitro-e rehearse` does, from a checkout. See nitro_e/cli/rehearse.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("rehearse")
