"""Score images for trainings elsewhere: what `nitro-e reward-server` does, from a checkout. See nitro_e/cli/reward_server.py."""

from nitro_e.cli import run_front

if __name__ == "__main__":
    run_front("reward-server")
