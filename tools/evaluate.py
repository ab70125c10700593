"""Score a model on a benchmark: what `nitro-e evaluate` does, from a checkout. See nitro_e/cli/evaluate.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("evaluate")
