"""Pack, encode, verify and look at data: what `nitro-e data` does, from a checkout. See nitro_e/cli/data.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("data")
