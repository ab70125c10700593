"""Draw in a browser: what `nitro-e serve` does, from a checkout. See nitro_e/cli/serve.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("serve")
