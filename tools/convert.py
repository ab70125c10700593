"""Convert released weights to ours and back: what `nitro-e convert` does, from a checkout. See nitro_e/cli/convert.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("convert")
