"""Make scenes of the offline domain: what `nitro-e make-shapes` does, from a checkout. See nitro_e/cli/make_shapes.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("make-shapes")
