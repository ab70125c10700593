"""The training loop: every stage is a stream of batches and an ordered tuple of phases; nothing else varies.

A phase is "these parameters, this loss, this optimiser". Stages know nothing of accelerate, EMA, files or trackers;
this file knows nothing of losses. To resume, run the same command again: learning rate, data position and all
randomness are functions of the step, so the state is the weights, the optimisers and the step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from ema_pytorch import EMA
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from nitro_e import checkpoint
from nitro_e.config import ConfigError, TrainingError
from nitro_e.interfaces import Phase, Stage
from nitro_e.metrics import Metrics, WandbMode
from nitro_e.model.pretrained import load_state, save_pretrained
from nitro_e.optim import build_optimizers, set_learning_rate
from nitro_e.randomness import SlotRandom

log = logging.getLogger(__name__)

@dataclass
class Hook:
    """Pictures made every so many steps on the main process, of the published model (the average if there is one)."""

    every: int
    run: Callable[[nn.Module], dict[str, Image.Image]]


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    beta: float = 0.9999  # per step
    warmup_power: float | None = None  # early on, beta is 1 - step^-power (0.67 forgets a random start); None: off

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ConfigError(f"beta must be between 0 and 1, got {self.beta}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    steps: int  # optimiser steps
    accumulate: int = 1  # micro-batches per process and step
    precision: Literal["float32", "bf16", "fp16"] = "bf16"  # of the forward pass; weights stay float32
    save_every: int = 1000
    keep_last: int = 2
    log_every: int = 20
    sample_every: int = 1000  # steps between sample grids; 0: none
    max_skips: int = 5  # non-finite steps in a row before giving up
    ema: EMAConfig | None = None
    compile: bool = False
    wandb: WandbMode = "auto"  # auto: online with a key, else offline

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "save_every", "keep_last", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def make_accelerator(config: EngineConfig) -> Accelerator:
    """The process group and device. Refuses to run as copies of one process under a launcher."""
    precision = {"float32": "no"}.get(config.precision, config.precision)
    use_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    accelerator = Accelerator(mixed_precision=precision, cpu=use_cpu, step_scheduler_with_optimizer=False)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world:
        raise ConfigError(f"the launcher started {world} processes but accelerate sees {accelerator.num_processes}")
    return accelerator


class Engine:
    """Trains a stage in a run directory."""

    def __init__(
        self, config: EngineConfig, stage: Stage, accelerator: Accelerator, *, run: Path, seed: int,
        use: dict[str, Any], record: dict[str, Any], hooks: tuple[Hook, ...] = (),
    ) -> None:  # fmt: skip
        """use: stored with exported weights for sampling; record: the resolved config, for trackers."""
        self.config, self.stage, self.accelerator = config, stage, accelerator
        self.run_folder, self.seed, self.use, self.record, self.hooks = run, seed, use, record, hooks
        self.step = self.skipped = self.skipped_in_row = 0
        self.stop_requested = False
        set_seed(seed)  # for anything that draws from global state, dropout for one
        self.ema = self._make_ema()
        self.nets, self.optimizers = [], []
        for phase in stage.phases:
            optimizers = build_optimizers(phase.module, phase.optim)
            if config.compile:
                phase.module.compile()
            net, *optimizers = accelerator.prepare(phase.module, *optimizers)
            self.nets.append(net)
            self.optimizers.append(optimizers)
        self.resume()

    # ---- the loop

    def run(self) -> bool:
        """Train to the last step. False if a signal stopped it earlier (a checkpoint is written either way)."""
        if self.step >= self.config.steps:
            return True
        rank, world, main = self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.is_main_process
        self.metrics = Metrics(
            self.run_folder, start_step=self.step, wandb=self.config.wandb, config=self.record, enabled=main
        )
        stream = self.stage.batches(self.step, rank, world, self.config.accumulate)
        bar = tqdm(total=self.config.steps, initial=self.step, desc=self.stage.name, disable=not main, mininterval=1 if sys.stderr.isatty() else 30)
        self._since, self._seconds_waiting = (time.perf_counter(), self.step), 0.0
        with self._signals():
            while self.step < self.config.steps and not self._must_stop():
                waiting = time.perf_counter()
                batches = list(islice(stream, self.config.accumulate))
                self._seconds_waiting += time.perf_counter() - waiting

                logs: dict[str, Tensor] = {}
                for index in range(len(self.stage.phases)):
                    logs |= self.update(index, batches)
                if self.ema is not None and not self.skipped_in_row:
                    self.ema.update()
                self.step += 1
                bar.update()

                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    self._report(logs, bar)
                for hook in self.hooks:
                    if main and hook.every and (self.step % hook.every == 0 or self.step == self.config.steps):
                        for name, image in hook.run(self.published_model()).items():
                            self.metrics.write_image(self.step, name, image)
                if self.step % self.config.save_every == 0:
                    self.save()
        if checkpoint.latest(self.run_folder) != self._folder(self.step):
            self.save()
        bar.close()
        self.metrics.close()
        return self.step >= self.config.steps

    def update(self, index: int, batches: list[Any]) -> dict[str, Tensor]:
        """One optimiser step of one phase over the micro-batches of this process."""
        phase, net, optimizers = self.stage.phases[index], self.nets[index], self.optimizers[index]
        factor = phase.optim.factor(self.step, self.config.steps)
        set_learning_rate(optimizers, factor)
        phase.module.train()
        totals: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            last = micro == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(net):
                loss, logs = phase.loss(net, batch, self._random(phase, micro))
                self.accelerator.backward(loss / len(batches))
            for name, value in {"loss": loss, **logs}.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / len(batches)
        norm = self.accelerator.clip_grad_norm_(phase.module.parameters(), phase.optim.clip)
        # Gradients are averaged over processes, so every process sees the same norm and decides alike.
        if self.config.precision == "fp16" or math.isfinite(norm):  # fp16: the loss scaler skips overflows itself
            for optimizer in optimizers:
                optimizer.step()
            self.skipped_in_row = 0
        else:
            self._count_skip(phase, batches)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        prefix = "" if len(self.stage.phases) == 1 else f"{phase.name}/"
        totals |= {"grad_norm": norm, "lr": torch.tensor(phase.optim.lr * factor)}
        return {prefix + name: value for name, value in totals.items()}

    def _random(self, phase: Phase, micro: int) -> SlotRandom:
        """The numbers of this process's slots: the global batch is ranks in order, each rank its micro-batches."""
        count = self.stage.batch_size
        first = (self.accelerator.process_index * self.config.accumulate + micro) * count
        purpose = (self.seed, self.stage.name, phase.name, self.step)
        return SlotRandom(*purpose, first=first, count=count, device=self.accelerator.device)

    def _count_skip(self, phase: Phase, batches: list[Any]) -> None:
        self.skipped += 1
        self.skipped_in_row += 1
        log.warning("step %d skipped: the gradient of phase '%s' is not finite", self.step, phase.name)
        if self.skipped_in_row > self.config.max_skips:
            keys = [key for batch in batches for key in getattr(batch, "keys", [])]
            raise TrainingError(
                f"{self.skipped_in_row} steps in a row had a non-finite gradient (phase '{phase.name}', step {self.step}); "
                f"lower the learning rate or look at these samples: {', '.join(keys[:8])}. "
                f"The last checkpoint is {checkpoint.latest(self.run_folder)}"
            )

    def _report(self, logs: dict[str, Tensor], bar: tqdm) -> None:
        """Average over processes and write; the only place where metrics leave the device."""
        names = sorted(logs)
        stacked = torch.stack([torch.as_tensor(logs[name], dtype=torch.float32).to(self.accelerator.device) for name in names])
        values = dict(zip(names, self.accelerator.reduce(stacked, "mean").tolist()))
        now, (since, since_step) = time.perf_counter(), self._since
        samples = (self.step - since_step) * self.stage.batch_size * self.config.accumulate * self.accelerator.num_processes
        values |= {
            "samples_per_second": samples / (now - since),
            "data_wait": self._seconds_waiting / (now - since),
            "skipped": self.skipped,
        }
        self._since, self._seconds_waiting = (now, self.step), 0.0
        self.metrics.write(self.step, {name: float(f"{value:.6g}") for name, value in values.items()})
        bar.set_postfix({"loss": f"{values.get('loss', math.nan):.4f}", "samples/s": f"{values['samples_per_second']:.0f}"})

    # ---- stopping

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGUSR1 ask for a checkpoint and a clean end; a second Ctrl-C ends at once."""

        def request(number: int, _frame: object) -> None:
            if self.stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_requested = True

        try:
            previous = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        except ValueError:  # not in the main thread, where signals cannot be caught
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _must_stop(self) -> bool:
        """All processes stop at the same step, whichever of them was asked."""
        if self.accelerator.num_processes == 1:
            return self.stop_requested
        flag = torch.tensor(float(self.stop_requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    # ---- weights and files

    def published_model(self) -> nn.Module:
        return self.stage.export(self.stage.model if self.ema is None else self.ema.ema_model)

    def _make_ema(self) -> EMA | None:
        config = self.config.ema
        if config is None:
            return None
        power = config.warmup_power
        ema = EMA(
            self.stage.model, beta=config.beta, update_every=1, update_after_step=0, include_online_model=False,
            min_value=config.beta if power is None else 0.0, power=power or 1.0, inv_gamma=1.0,
        )  # fmt: skip
        ema.ema_model.eval().requires_grad_(False)
        return ema

    def _folder(self, step: int) -> Path:
        return self.run_folder / "checkpoints" / f"step-{step:07d}"

    def save(self) -> None:
        if self.accelerator.is_main_process:
            meta = {**self._identity(), "skipped": self.skipped}
            checkpoint.save(self.run_folder, self.step, self._write, meta, self.config.keep_last)
        self.accelerator.wait_for_everyone()

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resume to continue the same run."""
        data = {f"data {key}": value for key, value in self.stage.fingerprint.items()}
        batch = self.stage.batch_size * self.config.accumulate * self.accelerator.num_processes
        return {"stage": self.stage.name, "seed": self.seed, "global batch": batch, **data}

    def _write(self, folder: Path) -> None:
        save_pretrained(self.stage.export(self.stage.model), folder / "model", self.use)
        if self.ema is not None:
            save_pretrained(self.stage.export(self.ema.ema_model), folder / "ema", self.use)
        (folder / "trainer").mkdir()
        for phase, optimizers in zip(self.stage.phases, self.optimizers):
            state = {
                "module": phase.module.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            }
            torch.save(state, folder / "trainer" / f"{phase.name}.pt")
        if self.ema is not None:
            torch.save(self.ema.state_dict(), folder / "trainer" / "ema.pt")

    def resume(self) -> None:
        """Continue from the newest complete checkpoint of the run directory, if there is one."""
        folder = checkpoint.latest(self.run_folder)
        if folder is None:
            return
        meta = checkpoint.read_meta(folder)
        now = self._identity()
        before = {key: meta.get(key) for key in now}
        if now != before:
            changed = "; ".join(f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if now[key] != before[key])
            raise ConfigError(f"{folder} is of another experiment ({changed}); give this one its own run directory: run=...")
        for phase, optimizers in zip(self.stage.phases, self.optimizers):
            state = torch.load(folder / "trainer" / f"{phase.name}.pt", map_location="cpu", weights_only=True)
            load_state(phase.module, state["module"], folder)
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                current = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
                optimizer.load_state_dict(saved)
                for group, values in zip(optimizer.param_groups, current):
                    group.update(values)  # rates and decay come from the config of today
        if self.ema is not None:
            path = folder / "trainer" / "ema.pt"
            if not path.exists():
                raise ConfigError(f"engine.ema is set but {folder} has no average; start a new run with init_from={folder}")
            self.ema.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.step, self.skipped = meta["step"], meta["skipped"]
        if self.accelerator.is_main_process:
            print(f"resuming {self.run_folder} at step {self.step}")
