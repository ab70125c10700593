"""Write a model for other programs: what `nitro-e export` does, from a checkout. See nitro_e/cli/export.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("export")
