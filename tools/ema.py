"""Make averages of weights after a training: what `nitro-e ema` does, from a checkout. See nitro_e/cli/ema.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("ema")
