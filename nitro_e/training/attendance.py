"""Who of the processes of a run is missing when one of them has died."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from pathlib import Path

from nitro_e.training.parallel import is_collective_error


class Attendance:
    """A file per process, `RUN/processes/rank-N.json`, with host, process id, step and time.

    When a collective fails, the processes that are left read there which one is missing: the backends do not say.
    """

    EVERY = 5.0  # seconds between signatures
    LATE = 20.0  # seconds between the last signatures of this process and of one that fell behind

    def __init__(self, run: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = run / "processes", rank, world
        self._signed = 0.0

    def sign(self, step: int) -> None:
        """Say that this process has reached `step`; at most every few seconds, so it may be called at every step."""
        if 0 <= time.time() - self._signed < self.EVERY:
            return
        self._signed = round(time.time(), 1)
        row = {"host": platform.node(), "pid": os.getpid(), "step": step, "time": self._signed}
        with contextlib.suppress(OSError):  # a full disk: saving reports it
            self.folder.mkdir(exist_ok=True)
            self._file(self.rank).write_text(json.dumps(row) + "\n")

    def leave(self) -> None:
        """Remove this process's file, when training has ended."""
        with contextlib.suppress(OSError):
            self._file(self.rank).unlink(missing_ok=True)
            self.folder.rmdir()  # by the last one

    def missing(self, error: Exception) -> str | None:
        """Name the processes that are missing, if `error` is of a collective that one did not answer; else None."""
        if self.world == 1 or not is_collective_error(error):
            return None
        # A connection closes some moments before the process that held it is seen to be dead.
        for _ in range(30):
            found = [self._look(rank) for rank in range(self.world) if rank != self.rank]
            if any(found):
                break
            time.sleep(0.1)
        named = "; ".join(line for line in found if line)
        return named or (
            f"a process does not answer ({_first_line(error)}), none of this host: look at the messages of the other hosts"
        )

    def _look(self, rank: int) -> str | None:
        """Say what is wrong with a process, or None; one that waits, as this one does, looks well."""
        try:
            row = json.loads(self._file(rank).read_text())
            who = f"process {rank} (pid {row['pid']} on {row['host']}, last seen at step {row['step']})"
            behind = self._signed - row["time"]
            state = _state_of(row["pid"]) if row["host"] == platform.node() else None
        except FileNotFoundError:
            return f"process {rank} has left, or has not begun to train"
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if state in ("Z", "X", "gone"):
            return f"{who} has died: killed, or out of memory"
        if state == "T":
            return f"{who} is stopped: continue it (kill -CONT) or end it"
        if behind > self.LATE:
            return f"{who} fell {behind:.0f} s behind: it hangs, or its host is lost"
        return None

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"


def _state_of(pid: int) -> str | None:
    """Return R, S, T (stopped), Z, ... of a process on this host, or "gone"; None where there is no /proc."""
    if not Path("/proc/self/stat").exists():
        return None
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
