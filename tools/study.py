"""Train and score variants of a recipe: what `nitro-e study` does, from a checkout. See nitro_e/cli/study.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("study")
