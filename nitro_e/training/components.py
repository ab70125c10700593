"""Train a small frozen component (codec, text or vision encoder, a judge) on a CPU: one loop, stopped and resumed.

This is no stage of the diffusion model: the components are trained once, measured and shipped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from nitro_e.config import ConfigError
from nitro_e.files import atomic_path, save_object
from nitro_e.record import progress

SAVE_EVERY = 30  # seconds


class Task(Protocol):
    """A component to train."""

    module: nn.Module  # everything that is trained
    shipped: nn.Module  # the part of it that is published
    lr: float

    def loss(self, step: int) -> Tensor:
        """Compute the loss of the batch of a step, a function of the weights and of the step alone."""

    def export(self, folder: Path) -> None:
        """Write `shipped` as the library class of the real component loads it."""

    def measure(self, folder: Path) -> dict:
        """Measure what was exported, loaded as users load it, on data of no training step."""


def train_component(make: Callable[[], Task], out: Path, steps: int, command: str) -> dict:
    """Train, export and measure; the same command goes on after a stop. Returns the content of metrics.json."""
    if steps < 1:
        raise ConfigError(f"--steps {steps}: must be at least 1")
    task = make()
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=task.lr, betas=(0.9, 0.99), weight_decay=0.01)
    state = out.parent / f"{out.name}.training.pt"
    done, seconds = _resume(state, task, optimizer, command)
    started = saved_at = time.monotonic()
    with progress.bar(total=steps, initial=done, desc=out.name, mininterval=1) as bar:
        while done < steps:
            for group in optimizer.param_groups:
                group["lr"] = task.lr * min(1, (done + 1) / 100, 2 * (1 - done / steps))
            loss = task.loss(done)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.module.parameters(), 1.0)
            optimizer.step()
            done += 1
            bar.update()
            if done % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
            if time.monotonic() - saved_at > SAVE_EVERY or done == steps:
                saved_at = time.monotonic()
                out.parent.mkdir(parents=True, exist_ok=True)
                reached = {
                    "module": task.module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": done,
                    "command": command,
                    "seconds": seconds + saved_at - started,
                }
                with atomic_path(state) as temporary:
                    save_object(reached, temporary)
    out.mkdir(parents=True, exist_ok=True)
    task.export(out)
    metrics = {
        "command": command,
        "seconds": round(seconds + saved_at - started),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": sum(parameter.numel() for parameter in task.shipped.parameters()),
        **task.measure(out),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    state.unlink()
    print(json.dumps(metrics, indent=1))
    return metrics


def _resume(state: Path, task: Task, optimizer: torch.optim.Optimizer, command: str) -> tuple[int, float]:
    """Load what an earlier run of the same command reached: the step and the seconds."""
    if not state.exists():
        return 0, 0.0
    saved = torch.load(state, weights_only=True)
    if saved.get("command") != command:
        raise ConfigError(
            f"{state} was begun with '{saved.get('command')}', not '{command}'; give the same, or delete it to start anew"
        )
    task.module.load_state_dict(saved["module"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["seconds"]
