"""Score images for trainings elsewhere:  nitro-e reward-server REWARD [REWARD ...]

REWARD is a name, or what a recipe's `rewards` holds: 'hpsv2.1'  '{name: geneval, path: detector, options: {mode: graded}}'.
In the recipe: {name: remote, options: {url: "http://127.0.0.1:7861", reward: hpsv2.1}}. Other processes of this machine
reach it; other machines do with --host. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import signal
import sys

from nitro_e.cli import common as cli
from nitro_e.cli.serve import address, check_address
from nitro_e.config import from_dict, parse_yaml


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rewards", nargs="+", type=cli.text, metavar="REWARD")
    parser.add_argument("--port", type=cli.whole(1, 65535), default=7861, metavar="N", help="default 7861")
    parser.add_argument(
        "--host",
        type=address,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="of this machine; default 127.0.0.1, which only this machine reaches; 0.0.0.0: all of its addresses",
    )
    parser.add_argument("--device", type=cli.device, help="default: cuda, mps or cpu, the first there is")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return cli.run(lambda: serve(options))


def serve(options: argparse.Namespace) -> None:
    """Load the rewards, then answer until Ctrl-C."""
    from nitro_e.record.environment import default_device
    from nitro_e.rewards import RewardConfig, build_rewards
    from nitro_e.rewards.remote import NEVER, RewardServer

    given = [parse_yaml(text, f"REWARD '{text}'") for text in options.rewards]
    configs = [from_dict(RewardConfig, each, "REWARD") for each in given]
    build_rewards(configs)  # refuses two of one title
    check_address(options.host, options.port)
    if not ipaddress.IPv4Address(options.host).is_loopback:
        cli.say(
            f"warning: whoever reaches {options.host}:{options.port} can use this machine's rewards; there is no password"
        )
    device = options.device or default_device()
    scorers = {config.title: build_rewards([config], device, max_failures=NEVER) for config in configs}
    for scorer in scorers.values():
        scorer.load()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # it clears up as after Ctrl-C
    with RewardServer((options.host, options.port), scorers) as server:
        print(f"{', '.join(scorers)}: http://{options.host}:{options.port} (Ctrl-C ends it)", flush=True)
        server.serve_forever()
