"""Train a stage of a recipe: what `nitro-e train` does, from a checkout. See nitro_e/cli/train.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("train")
