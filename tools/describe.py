"""Count parameters, tokens and FLOPs: what `nitro-e describe` does, from a checkout. See nitro_e/cli/describe.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("describe")
