"""Signals that ask for the end of a run: it writes a checkpoint and ends without an error."""

from __future__ import annotations

import signal
from typing import Any

# torchrun forwards them all (docs/training.md).
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


class StopRequest:
    """Tells whether a signal has asked for the end. It listens inside its `with` block; a second Ctrl-C ends at once.

    Signals that are ignored when the block begins stay ignored (SIGHUP under nohup).
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        try:
            for number in STOP:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._request)
        except ValueError:  # not in the main thread, where signals cannot be caught
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _request(self, number: int, _frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
