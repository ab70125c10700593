"""Draw in a browser:  nitro-e serve [SOURCE ...]

SOURCE is what `nitro-e sample` takes: shipped weights, a run, a checkpoint, a model folder, a hub id. Without one the page offers
the shipped weights and every run under runs/ that has a complete checkpoint; one model is in memory at a time. The page
is for this machine alone unless --host says otherwise, takes no files and loads nothing from the network. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import signal
import socket
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nitro_e.cli import common as cli
from nitro_e.config import ConfigError


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return cli.run(lambda: serve(options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", metavar="SOURCE")
    parser.add_argument("--port", type=cli.whole(1, 65535), default=7860, metavar="N", help="default 7860")
    parser.add_argument(
        "--host",
        type=address,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="of this machine; default 127.0.0.1, which only this machine reaches; 0.0.0.0: all of its addresses",
    )
    parser.add_argument(
        "--api", action="store_true", help="offer the page's functions to programs, with docs"
    )
    parser.add_argument("--device", type=cli.device, help="default: cuda, mps or cpu, the first there is")
    cli.component_flags(
        parser, codec="the codec's files, a local folder or hub id", text="the text encoder's files, likewise"
    )
    cli.download_flag(parser)
    cli.dtype_flag(parser, "of all parts; default: float32 for the model, the others as in training")
    return parser.parse_args(arguments)


def address(name: str) -> str:
    """An IPv4 address, or localhost."""
    if name == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.IPv4Address(name))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an address such as 127.0.0.1, got '{name}'") from None


def serve(options: argparse.Namespace) -> None:
    """Check what can be checked at once, load the first weights, and serve the page until Ctrl-C."""
    check_gradio()
    check_address(options.host, options.port)
    if not ipaddress.IPv4Address(options.host).is_loopback:
        cli.say(
            f"warning: whoever reaches {options.host}:{options.port} can draw with this machine; there is no password"
        )

    import torch

    from nitro_e.record.environment import default_device
    from nitro_e.sampling.pipeline import TextToImage
    from nitro_e.sampling.sources import find
    from nitro_e.serving.drawing import Shelf, found_weights

    for source in options.sources:
        find(source)

    def load(source: str) -> TextToImage:
        return TextToImage.from_pretrained(
            source,
            options.device or default_device(),
            None if options.dtype is None else getattr(torch, options.dtype),
            codec=options.codec,
            text=options.text,
            allow_download=options.allow_download,
        )

    shelf = Shelf(options.sources or found_weights(Path("runs")), load)
    from nitro_e.serving.page import running

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # it clears up as after Ctrl-C
    with running(shelf, options.host, options.port, options.api) as url:
        print(f"{', '.join(shelf.sources)}: {url} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()


def check_gradio() -> None:
    """Raise ConfigError if the library of the page is not there, or too old."""
    try:
        found = version("gradio")
    except PackageNotFoundError:
        found = "none"
    if not re.match(r"([6-9]|\d\d)\.", found):
        raise ConfigError(f"the page needs gradio 6, found {found}: pip install 'gradio>=6.0.1'")


def check_address(host: str, port: int) -> None:
    """Raise ConfigError where nothing can listen at this address, before anything is loaded."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise ConfigError(
            f"--host {host} --port {port}: {os.strerror(error.errno or 0)}; "
            f"choose another, as --port {port % 65535 + 1}"
        ) from None
