"""Shared parts of the commands: how they take arguments, the flags that must read alike everywhere, and how
they end: 0, or one line on stderr and a code that scripts can tell apart."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from nitro_e.config import ConfigError, TrainingError, check_characters
from nitro_e.record.environment import out_of_memory
from nitro_e.record.progress import quiet_libraries

if TYPE_CHECKING:
    from nitro_e.sampling.noise_search import NoiseSearchConfig

Number = TypeVar("Number", int, float)

# help of --sampler; written out, so that --help need not load torch
SAMPLERS = "euler, heun, multistep, flow_map or policy"


def weights_flags(parser: argparse.ArgumentParser) -> None:
    """--file, --lora and --resolution: what TextToImage.from_pretrained takes besides the weights' name."""
    parser.add_argument("--file", help="name of the weights in a hub repository or folder")
    parser.add_argument(
        "--lora", metavar="DIR", help="PEFT adapter to merge: a folder here or in the repository"
    )
    parser.add_argument(
        "--resolution", type=int, choices=[512, 1024], help="of a released file whose name does not say it"
    )


def component_flags(parser: argparse.ArgumentParser, **what: str) -> None:
    """--codec, --text and --vision, as far as they are named here, each with its help.

    What is given is for components.chosen_component.
    """
    for kind, text in what.items():
        parser.add_argument(f"--{kind}", metavar="NAME|FOLDER|NAME=FOLDER", help=text)


def download_flag(parser: argparse.ArgumentParser) -> None:
    """--allow-download, for weights of other people: see components.check_download."""
    text = "a hub repository that the weights name and that may be fetched; several times"
    parser.add_argument("--allow-download", action="append", default=[], metavar="REPO", help=text)


def dtype_flag(parser: argparse.ArgumentParser, text: str, default: str | None = None) -> None:
    """--dtype, by torch's names."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=default, help=text)


def guidance_flags(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """--guidance-by and --guidance-rescale, the fields `guidance` and `guidance_rescale` of SamplingConfig."""
    parser.add_argument(
        "--guidance-by",
        dest="guidance",
        nargs=nargs,
        choices=("text", "path", "both"),
        help="path: away from the same prompt without the compressed blocks (weights trained with model.path_drop)",
    )
    parser.add_argument(
        "--guidance-rescale", nargs=nargs, choices=("none", "zero_star"), help="zero_star: CFG-Zero*"
    )


def noise_search_flags(parser: argparse.ArgumentParser) -> None:
    """--optimize-noise, --noise-steps and --noise-candidates, read by `noise_search_config`."""
    parser.add_argument(
        "--optimize-noise",
        metavar="REWARD",
        help="search a start noise of high reward (docs/rewards.md names them): for models of few steps",
    )
    parser.add_argument(
        "--noise-steps",
        type=whole(0, 10_000),
        metavar="N",
        help="of that search along the reward's gradient (default 50; 0 with --noise-candidates)",
    )
    parser.add_argument(
        "--noise-candidates",
        type=whole(2, 10_000),
        metavar="N",
        help="try so many noises, for rewards without a gradient too",
    )


def noise_search_config(options: argparse.Namespace) -> NoiseSearchConfig | None:
    """Return what `noise_search_flags` gave; None if no noise is searched."""
    from nitro_e.rewards import RewardConfig
    from nitro_e.sampling.noise_search import NoiseSearchConfig

    candidates, steps = options.noise_candidates, options.noise_steps
    if options.optimize_noise is None:
        for name in ("noise_steps", "noise_candidates"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} belongs to --optimize-noise REWARD; give both")
        return None
    try:
        RewardConfig(name=options.optimize_noise)
    except ConfigError as error:
        raise ConfigError(f"--optimize-noise {options.optimize_noise}: {error}") from None
    if steps is None:
        steps = 50 if candidates is None else 0
    return NoiseSearchConfig(steps=steps, candidates=candidates or 1)


def chosen_weights(options: argparse.Namespace) -> dict[str, Any]:
    """Return what `weights_flags`, `component_flags` and `download_flag` gave, for TextToImage.from_pretrained."""
    names = ("file", "lora", "resolution", "codec", "text", "allow_download")
    return {name: getattr(options, name) for name in names}


def run(command: Callable[[], None]) -> int:
    """Call `command` and return its exit code: 2 for what the user can mend, 3 for training that failed, 130 for Ctrl-C.

    Whatever else comes out of it is a bug, and shows its traceback.
    """
    quiet_libraries()
    # a prompt or a name of a file may have letters that the terminal lacks
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command()
    except ConfigError as error:
        say(f"error: {error}")
        return 2
    except TrainingError as error:
        say(f"training stopped: {error}")
        return 3
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # no space, no permission, ...; writing to an open file does not say which one
        named = (
            f"{error.filename}: {error.strerror}"
            if error.filename is not None
            else " ".join(str(error).split())
        )
        say(f"error: {named}; mend that and run the same command again")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        say(
            f"error: out of memory ({str(error).splitlines()[0] if str(error) else 'MemoryError'}); "
            "ask for less at a time (batch size, resolution, length) or use a larger machine"
        )
        return 2
    except KeyboardInterrupt:
        say("interrupted; run the same command again to continue")
        return 130
    return 0


def say(line: str) -> None:
    """Write one line to stderr in one piece: print() makes two where Python is unbuffered, and lines of processes mix."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def leave(code: int) -> NoReturn:
    """End the process with this exit code.

    One of several processes ends without the interpreter's teardown: there gloo's threads now and then abort a job that
    is already finished ("terminate called without an active exception", 1 of 25 two-process runs with torch 2.15).
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


# ---- types of arguments, for argparse


def whole(least: int = 0, most: int = 2**63 - 1) -> Callable[[str], int]:
    """A whole number within bounds; 1e6 is one."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            value = _float(text)
            if not value.is_integer():  # not of infinity either
                raise argparse.ArgumentTypeError(f"expected a whole number, got '{text}'") from None
            number = int(value)
        return _within(number, least, most, text)

    return parse


def real(least: float, most: float = sys.float_info.max) -> Callable[[str], float]:
    """A finite number within bounds."""
    return lambda text: _within(_float(text), least, most, text)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got '{text}'") from None


def _within(number: Number, least: Number, most: Number, text: str) -> Number:
    if not number >= least:  # so NaN too
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
    if number > most:
        raise argparse.ArgumentTypeError(f"must be at most {most:g}, got {text}")
    return number


seed = whole(0, 2**62)  # images count up from it


def text(given: str) -> str:
    """Words that can be encoded; a terminal or a script may pass bytes that are no UTF-8."""
    try:
        return check_characters(given, "text")
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def device(name: str) -> str:
    """The name of a device that is there. Only this argument needs torch."""
    import torch

    match = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", name)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{name}' is no device; use cpu, cuda, cuda:1 or mps")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if int(match[2] or 0) >= counts[match[1]]:
        there = ", ".join(f"{kind} ({count})" for kind, count in counts.items() if count)
        raise argparse.ArgumentTypeError(f"'{name}' is not there; this machine has {there}")
    return name
