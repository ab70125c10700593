"""What the training loop measures of itself between two reports, and the line that a person sees of it."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta

import torch
from torch import Tensor

from nitro_e.record import progress


class Window:
    """Sums of metrics since the last report, kept on the device, and where the time went."""

    def __init__(self, since: int) -> None:
        self.since, self.seconds_waiting, self._seconds_paused = since, 0.0, 0.0
        self._started = time.perf_counter()
        self.sums: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for batches: reading, and encoding what is not stored."""
        start = time.perf_counter()
        yield
        self.seconds_waiting += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training: images and checkpoints."""
        start = time.perf_counter()
        yield
        self._seconds_paused += time.perf_counter() - start

    def add(self, prefix: str, logs: dict[str, Tensor]) -> None:
        for name, pair in logs.items():
            self.sums[prefix + name] = self.sums.get(prefix + name, 0) + pair

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started - self._seconds_paused

    def steps(self, now: int) -> int:
        return now - self.since

    def averages(self, device: torch.device, total: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over all processes, which `total` adds up on the device; names whose count is zero (an empty timestep bin) are left out."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        pairs = torch.stack([self.sums[name].to(device, torch.float64) for name in names])
        pairs = total(pairs).cpu()
        return {name: value / count for name, (value, count) in zip(names, pairs.tolist()) if count}


class Progress:
    """A bar on a terminal; in a log file one plain line per report."""

    def __init__(self, name: str, step: int, steps: int, shown: bool) -> None:
        self.name, self.steps = name, steps
        self.plain = shown and not progress.watched()
        self.bar = progress.bar(brief=True, total=steps, initial=step, desc=name, disable=not shown)

    def advance(self) -> None:
        self.bar.update()

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a report; those that are not recorded are left out."""
        if self.plain:
            print(f"{self.name} {step}/{self.steps}  {summary(values)}", file=sys.stderr, flush=True)
        self.bar.set_postfix(
            {
                "loss": f"{values.get('loss', math.nan):.4f}",
                "samples/s": f"{values['samples_per_second']:.0f}",
            }
        )

    def close(self) -> None:
        self.bar.close()


def summary(values: Mapping[str, float]) -> str:
    """`loss 2.2100  grad_norm 0.51  lr 1.0e-03  108 samples/s  0.9 GB  MFU 43%  ETA 0:12:34`"""
    shown = {
        "loss": lambda x: f"loss {x:.4f}", "grad_norm": lambda x: f"grad_norm {x:.3g}", "lr": lambda x: f"lr {x:.2e}",
        "samples_per_second": lambda x: f"{x:.1f} samples/s", "memory_gb": lambda x: f"{x:.1f} GB",
        "mfu": lambda x: f"MFU {x:.0%}", "eta_seconds": lambda x: f"ETA {timedelta(seconds=round(x))}",
        "skipped": lambda x: f"{x:.0f} skipped" if x else "", "bad_samples": lambda x: f"{x:.0f} bad samples" if x else "",
    }  # fmt: skip
    parts = [form(values[name]) for name, form in shown.items() if name in values]
    return "  ".join(part for part in parts if part)


def memory_gb(device: torch.device) -> float:
    """Largest so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# Dense bf16 peaks from the makers' data sheets.
PEAK_TERAFLOPS = {"H200": 989, "H100": 989, "A100": 312, "MI300X": 1307, "L40S": 362, "RTX 4090": 165}


def peak_teraflops(device: torch.device) -> float | None:
    """Of the GPU; None where it is not known, the CPU included."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TERAFLOPS.items() if key in name), None)
