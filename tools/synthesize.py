"""Draw a teacher's images as training data: what `nitro-e synthesize` does, from a checkout. See nitro_e/cli/synthesize.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("synthesize")
