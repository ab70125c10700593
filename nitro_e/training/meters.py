"""Measurements of the training loop: means of metrics between two reports, throughput, and the line a person sees."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from nitro_e.record import progress


def sum_and_count(value: Tensor) -> Tensor:
    """Return a metric as its (2,) sum and count, of which means are made: a scalar counts once, a (2,) tensor is one."""
    value = value.detach()
    return value if value.ndim else torch.stack([value.double(), torch.ones_like(value, dtype=torch.float64)])


def read_together(**tensors: Tensor) -> dict[str, Any]:
    """Copy tensors to the host in one transfer, for which the host waits once: {name: (nested list of) numbers}."""
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.reshape(tensor.shape).tolist() for (name, tensor), part in zip(tensors.items(), parts)}


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the (2,) sum and count of `values` where `mask` is 1; both have any one shape."""
    return torch.stack([(values * mask).sum(), mask.sum()]).double()


def mean_by(name: str, values: Tensor, index: Tensor, num: int) -> dict[str, Tensor]:
    """Return the (2,) sums and counts of `values` (B,) by `index` (B,) in 0..num-1, as {NAME0: ..., NAME1: ...}."""
    ones = torch.ones_like(values, dtype=torch.float64)
    pairs = torch.stack([values.detach().double(), ones], dim=1)  # (B, 2)
    sums = pairs.new_zeros(num, 2).index_add_(0, index, pairs)
    return {f"{name}{number}": sums[number] for number in range(num)}


class MetricAverages:
    """Sums of metrics over the steps since the last report, kept on the device, and where the time went."""

    def __init__(self, first_step: int) -> None:
        self.first_step, self.seconds_waiting, self._seconds_excluded = first_step, 0.0, 0.0
        self._started = time.perf_counter()
        self.sums: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting for batches: reading, and encoding what is not stored."""
        start = time.perf_counter()
        yield
        self.seconds_waiting += time.perf_counter() - start

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave the block out of the throughput: sampling and checkpointing."""
        start = time.perf_counter()
        yield
        self._seconds_excluded += time.perf_counter() - start

    def add(self, prefix: str, logs: dict[str, Tensor], finite: Tensor) -> None:
        """Add the (2,) sums and counts of one step, unless `finite`, a () bool tensor on the device, is false."""
        for name, pair in logs.items():
            pair = torch.where(finite, pair.to(finite.device, torch.float64, non_blocking=True), 0.0)
            self.sums[prefix + name] = self.sums.get(prefix + name, 0) + pair

    def pairs(self, device: torch.device) -> Tensor:
        """Return the (N, 2) sums and counts of this process, in the order of the sorted names."""
        pairs = [self.sums[name] for name in sorted(self.sums)]
        return torch.stack(pairs) if pairs else torch.zeros(0, 2, dtype=torch.float64, device=device)

    def means(self, pairs: Sequence[Sequence[float]]) -> dict[str, float]:
        """Name the means of what `pairs` returned, added up over processes; what nothing was counted for is left out."""
        return {name: value / count for name, (value, count) in zip(sorted(self.sums), pairs) if count}

    def throughput(
        self,
        step: int,
        last_step: int,
        batch: int,
        forward_flops: float,
        device: torch.device,
        processes: int,
    ) -> dict[str, float]:
        """Return speed, waiting, time left and memory at `step`; batch: the global one, forward_flops: per sample."""
        seconds, steps = time.perf_counter() - self._started - self._seconds_excluded, step - self.first_step
        per_second = batch * steps / seconds
        teraflops = per_second * 3 * forward_flops / 1e12  # backward costs two forwards
        values = {
            "samples_per_second": per_second,
            "tflops": teraflops,
            "data_wait": self.seconds_waiting / seconds,
            "eta_seconds": (last_step - step) * seconds / steps,
            "memory_gb": memory_gb(device),
        }
        peak = peak_teraflops(device)
        return values if peak is None else {**values, "mfu": teraflops / (peak * processes)}


class Progress:
    """Shows the training: a bar on a terminal, one plain line per report in a log file.

    headline: the metrics that stand first, with the last value that is known of each; while none is known, as long as only
    the phases beside the model's learn, their losses stand there.
    """

    def __init__(
        self, name: str, step: int, steps: int, shown: bool, headline: Sequence[str] = ("loss",)
    ) -> None:
        self.name, self.steps, self.headline = name, steps, headline
        self.known: dict[str, float] = {}
        self.plain = shown and not progress.interactive()
        self.bar = progress.bar(brief=True, total=steps, initial=step, desc=name, disable=not shown)

    def advance(self) -> None:
        self.bar.update()

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers of a report; those that are not recorded are left out."""
        self.known |= {name: values[name] for name in self.headline if name in values}
        known = {name: self.known[name] for name in self.headline if name in self.known}
        others = {name: value for name, value in values.items() if name.endswith("/loss")}
        first = {
            name.removeprefix("reward/"): f"{value:{'.4f' if name.endswith('loss') else '.4g'}}"
            for name, value in (known or others).items()
        }
        if self.plain:
            parts = [f"{name} {value}" for name, value in first.items()] + [summary(values)]
            print(f"{self.name} {step}/{self.steps}  {'  '.join(parts)}", file=sys.stderr, flush=True)
        self.bar.set_postfix({**first, "samples/s": f"{values['samples_per_second']:.0f}"})

    def close(self) -> None:
        self.bar.close()


def summary(values: Mapping[str, float]) -> str:
    """Write the rest of a report as one line: `grad_norm 0.51  lr 1.0e-03  108 samples/s  0.9 GB  MFU 43%  ETA 0:12:34`"""
    shown = {
        "grad_norm": lambda x: f"grad_norm {x:.3g}",
        "lr": lambda x: f"lr {x:.2e}",
        "samples_per_second": lambda x: f"{x:.1f} samples/s",
        "memory_gb": lambda x: f"{x:.1f} GB",
        "mfu": lambda x: f"MFU {x:.0%}",
        "eta_seconds": lambda x: f"ETA {timedelta(seconds=round(x))}",
        "skipped": lambda x: f"{x:.0f} skipped" if x else "",
        "bad_samples": lambda x: f"{x:.0f} bad samples" if x else "",
    }
    parts = [form(values[name]) for name, form in shown.items() if name in values]
    return "  ".join(part for part in parts if part)


def memory_gb(device: torch.device) -> float:
    """Return the largest use of memory so far: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# Dense bf16 peaks from the makers' data sheets.
PEAK_TERAFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "MI300X": 1307,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165,
}


def peak_teraflops(device: torch.device) -> float | None:
    """Look up the GPU's peak; None where it is not known, the CPU included."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TERAFLOPS.items() if key in name), None)
