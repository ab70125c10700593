"""See every stage do its work: what `nitro-e demo` does, from a checkout. See nitro_e/cli/demo.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("demo")
