"""Add a row to the speedrun table: what `nitro-e speedrun` does, from a checkout. See nitro_e/cli/speedrun.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("speedrun")
