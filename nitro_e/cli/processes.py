"""Several processes of one command on this machine, without a launcher: on a CPU one per core is fastest.

Each process finds the others by the environment that torchrun would give it. Signals go to all of them, each once; the
first process shows what all have to say, and what the others say is shown only if they fail and it does not.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, NamedTuple

from nitro_e.cli import common as cli

MOST = 8  # processes that are chosen without being asked for
IMAGES = 64  # that each process must have to draw, for its start to be worth it
PATIENCE = 60.0  # seconds that the others get to end, and to say why, when one has failed
PARENT = "NITRO_E_WORKER"  # set in processes that this file has started
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def flag(parser: argparse.ArgumentParser) -> None:
    """--processes, for commands that divide their work."""
    parser.add_argument(
        "--processes",
        type=count,
        default="auto",
        metavar="N",
        help="on this machine; auto, the default: on a CPU one per core, unless OMP_NUM_THREADS is set",
    )


def count(text: str) -> int | str:
    """Parse the argument of --processes."""
    return text if text == "auto" else cli.whole(1, 1024)(text)


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_holds(size: float) -> bool:
    """Tell whether so many bytes are at most half of this machine's memory."""
    return size <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


class Workload(NamedTuple):
    """The images that a command is to draw, which processes share by whole batches, or shards."""

    images: int
    batches: int
    weights: int | None  # bytes of their files; None: they are not all on this machine yet

    def fits(self, processes: int) -> bool:
        """Tell whether so many processes are worth their start, and their memory holds the weights and as much again."""
        if processes > self.batches or self.images < IMAGES * processes or self.weights is None:
            return False
        return memory_holds(2 * self.weights * processes)


def chosen(given: int | str, fits: Callable[[int], bool] = lambda processes: True) -> int:
    """Return the number of processes to start; 1: this one alone, as a launcher's process is.

    auto: one per core where there is no GPU, at most MOST, as many as `fits` says can share the work.
    """
    if {"WORLD_SIZE", PARENT} & os.environ.keys():
        return 1
    if given != "auto":
        return int(given)
    if "OMP_NUM_THREADS" in os.environ or cores() == 1:
        return 1
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return 1
    return next(
        processes for processes in range(min(cores(), MOST), 0, -1) if processes == 1 or fits(processes)
    )


def start(
    command: str, given: int | str, arguments: Sequence[str] | None, fits: Callable[[int], bool]
) -> int | None:
    """Start the processes of a command and return their exit code; None: the work is this process's."""
    number = 1

    def choose() -> None:
        nonlocal number
        number = chosen(given, fits)
        if number > 1:
            fits(number)  # a mistake in the arguments is said here, once

    if code := cli.run(choose):
        return code
    if number > 1:
        return launch(
            ["-m", "nitro_e.cli", command, *(sys.argv[1:] if arguments is None else arguments)], number
        )
    end_with_parent()
    return None


def launch(command: Sequence[str], processes: int) -> int:
    """Run `python COMMAND` in so many processes; returns the exit code of the first that failed, or 0."""
    with tempfile.TemporaryDirectory(prefix="nitro-e-") as folder:
        outputs = [None, *(open(os.path.join(folder, str(rank)), "w+b") for rank in range(1, processes))]  # noqa: SIM115
        environment = {
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // processes))),
            PARENT: str(os.getpid()),
        }
        workers: list[subprocess.Popen] = []
        passed_on: set[int] = set()

        def forward(number: int, _frame: object) -> None:
            passed_on.add(number)
            for worker in workers:
                if worker.poll() is None:
                    worker.send_signal(number)

        before = {
            number: signal.signal(number, forward)
            for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            for rank, output in enumerate(outputs):
                workers.append(_start(command, environment | _rank(rank), output))
            failed = _wait(workers)
        finally:
            for worker in workers:
                worker.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        codes = [worker.returncode for worker in workers]
        if failed is not None:
            output = outputs[failed]
            # a mistake, or an interruption, that the first process has told of too
            told = codes[failed] == codes[0] and codes[0] in (2, 130)
            if output is not None and not told:
                output.seek(0)
                sys.stderr.write(output.read().decode(errors="replace"))
            if codes[failed] < 0 and -codes[failed] not in passed_on:
                name = signal.Signals(-codes[failed]).name
                cli.say(
                    f"error: {name} ended process {failed} of {processes}; run the same command again to continue"
                )
        for output in filter(None, outputs):
            output.close()
        code = 0 if failed is None else codes[failed]
        return code if code >= 0 else 128 - code


def end_with_parent() -> None:
    """In a process that `launch` has started: ask for the end when the one that started it is gone."""
    if PARENT not in os.environ:
        return

    def watch() -> None:
        os.read(0, 1)  # a pipe that nobody writes to: it ends when the other side does
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _start(command: Sequence[str], environment: dict[str, str], output: IO[bytes] | None) -> subprocess.Popen:
    # a session of its own: Ctrl-C reaches this process alone, which passes it on
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output and subprocess.STDOUT,
        start_new_session=True,
    )


def _rank(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _wait(workers: Sequence[subprocess.Popen]) -> int | None:
    """Wait for all; returns the rank of the first that failed. The others get some time to notice, and are ended."""
    failed, deadline = None, float("inf")
    while True:
        running = [worker for worker in workers if worker.poll() is None]
        if failed is None:
            failed = next((rank for rank, worker in enumerate(workers) if worker.returncode), None)
            if failed is not None:
                # a mistake that one has found before the processes met: nobody else will notice
                patience = 2.0 if workers[failed].returncode == 2 else PATIENCE
                deadline = time.monotonic() + patience
        if not running:
            return failed
        if time.monotonic() > deadline:
            for worker in running:
                worker.kill()
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
