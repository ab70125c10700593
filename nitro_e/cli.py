"""What the commands of the project share: how they end (0, or one line on stderr and a code that scripts can tell
apart), and the flags that must read alike everywhere."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from nitro_e.config import ConfigError, TrainingError
from nitro_e.progress import quiet_libraries


def component_flags(parser: argparse.ArgumentParser, **what: str) -> None:
    """--codec, --text and --vision, as far as they are named here, each with its help.

    What is given is for components.chosen_component.
    """
    for kind, text in what.items():
        parser.add_argument(f"--{kind}", metavar="NAME|FOLDER|NAME=FOLDER", help=text)


def dtype_flag(parser: argparse.ArgumentParser, text: str, default: str | None = None) -> None:
    """--dtype, by torch's names."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=default, help=text)


def run(command: Callable[[], None]) -> int:
    """Call `command` and return its exit code: 2 for what the user can mend, 3 for training that failed, 130 for Ctrl-C."""
    quiet_libraries()
    try:
        command()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"training stopped: {error}", file=sys.stderr)
        return 3
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)  # no space, no permission, ...
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


def leave(code: int) -> NoReturn:
    """End the process with this exit code.

    One of several processes ends without the interpreter's teardown: there gloo's threads now and then abort a job that
    is already finished ("terminate called without an active exception", 1 of 25 two-process runs with torch 2.15).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
