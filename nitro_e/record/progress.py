"""Progress of long work: a bar on a terminal or in a notebook, a plain line a minute in a log file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm
from tqdm.auto import tqdm as live_tqdm

SECONDS = 60  # between two lines of a log file
LINE = "{desc}: {n_fmt} of {total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}]{postfix}"


def bar(iterable: Iterable | None = None, *, brief: bool = False, **options: Any) -> tqdm:
    """Make a tqdm over `iterable`, or one to be updated by hand, with tqdm's options.

    brief: the work is short, or part of other work, and so not worth lines in a log file.
    """
    if interactive():
        return live_tqdm(iterable, **options)
    if brief:
        return tqdm(iterable, **{**options, "disable": True})
    return Lines(iterable, **options)


def interactive() -> bool:
    """Tell whether a person sees the output: stderr is a terminal, or this is a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def quiet_libraries() -> None:
    """Keep the libraries' advice out of the output, and their bars out of log files.

    Set in the environment, which the libraries read when they are imported; variables that are set already stay.
    """
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if not interactive():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of transformers too


class Lines(tqdm):
    """Prints a plain line every minute and one at the end, in place of a bar that is drawn over and over."""

    def __init__(self, iterable: Iterable | None = None, **options: Any) -> None:
        wanted = {"bar_format": LINE, "mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS}
        super().__init__(iterable, **{**options, **wanted})

    def set_postfix(self, *values: Any, refresh: bool = False, **more: Any) -> None:
        super().set_postfix(*values, refresh=False, **more)  # shown with the next line

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        text = str(self) if msg is None else msg
        if text:
            self.fp.write(f"{text}\n")
            self.fp.flush()
        return False  # there is nothing to clear

    def close(self) -> None:
        if not self.disable:
            self.display()
            self.leave = False  # what a bar leaves behind is this line
        super().close()
