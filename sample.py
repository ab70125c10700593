"""Draw images: what `nitro-e sample` does, from a checkout. See nitro_e/cli/sample.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("sample")
