"""The training loop: every stage is a stream of batches and an ordered tuple of phases; nothing else varies.

A phase is "these parameters, this loss, this optimiser". Stages know nothing of accelerate, EMA, files or trackers;
this file knows nothing of losses. To resume, run the same command again: learning rate, data position and all
randomness are functions of the step, so the state (training.state) is the weights, the optimisers and the step.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge, TrainingError, environment_number
from nitro_e.interfaces import Phase, Stage
from nitro_e.randomness import SampleRandom
from nitro_e.record import run_folder
from nitro_e.record.metrics import Metrics, Tracker, WandBConfig
from nitro_e.training.attendance import Attendance
from nitro_e.training.ema import FOLDER as SNAPSHOTS
from nitro_e.training.ema import EMAConfig, PostHocEMAConfig, relative_distance
from nitro_e.training.meters import MetricAverages, Progress, sum_and_count
from nitro_e.training.optim import set_learning_rate
from nitro_e.training.parallel import any_process, sum_over_processes, whole_tensor
from nitro_e.training.saving import ResumeConfig, Saver
from nitro_e.training.signals import StopRequest
from nitro_e.training.state import TrainingState

log = logging.getLogger(__name__)


@dataclass
class Hook:
    """Gives images or numbers, by name, for the published model (the average if there is one)."""

    every: int  # steps, and after the last one; 0: never
    run: Callable[[Any], Mapping[str, Image.Image | float]]
    first: bool = False  # also before the first step
    everywhere: bool = False  # in every process, not the main one alone


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Config):
    steps: Annotated[int, Ge(1)]  # optimiser steps
    # of the forward pass; weights stay float32
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    # ddp: whole weights in every process; fsdp: sharded ones (FSDP2)
    sharding: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False  # the blocks of the model
    gradient_checkpointing: bool = False  # less memory for a third more arithmetic
    ema: EMAConfig | None = None  # average of the weights during training; null: none
    # snapshots from which nitro-e ema makes any average afterwards
    posthoc_ema: PostHocEMAConfig | None = None
    save_every: Annotated[int, Ge(1)] = 1000  # steps between checkpoints
    keep_last: Annotated[int, Ge(2), "the newest one may turn out damaged"] = 2  # newest checkpoints
    keep_every: Annotated[int, Ge(0)] = 0  # and those at multiples of this many steps; 0: none
    max_failed_saves: Annotated[int, Ge(1)] = 3  # in a row before giving up
    max_skips: Annotated[int, Ge(0)] = 5  # non-finite steps in a row before giving up
    log_every: Annotated[int, Ge(1)] = 20  # steps between lines of metrics
    sample_every: Annotated[int, Ge(0)] = 1000  # steps between sample grids; 0: none
    # a mirror of metrics.jsonl: wandb where there is a login, else tensorboard if installed
    tracker: Tracker = "auto"
    wandb: WandBConfig = field(default_factory=WandBConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharding == "fsdp" and self.precision == "float16":
            raise ConfigError("sharding 'fsdp' has no loss scaler: use precision bfloat16 or float32")


def make_accelerator(config: EngineConfig) -> Accelerator:
    """Set up the process group and device. ConfigError if several processes were asked for and do not find each other."""
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[config.precision]
    use_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    # `accelerate launch --num_processes N` without GPUs names an address for N processes, then starts a single one.
    promised = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    patience = InitProcessGroupKwargs(
        timeout=timedelta(minutes=environment_number("NITRO_E_TIMEOUT_MINUTES", 10))
    )
    accelerator = Accelerator(mixed_precision=precision, cpu=use_cpu, kwargs_handlers=[patience])
    if promised and accelerator.num_processes == 1:
        raise ConfigError(
            "accelerate launch was told of several processes but starts a single one without GPUs; use "
            "`torchrun --nproc_per_node N -m nitro_e.cli train CONFIG` (for one process: no launcher, or unset MASTER_ADDR)"
        )
    world = environment_number("WORLD_SIZE", 1)
    if accelerator.num_processes != world:
        raise ConfigError(
            f"the launcher started {world} processes but accelerate sees {accelerator.num_processes}; "
            "start them with torchrun, and use the CPU or GPUs on all of them"
        )
    if config.precision == "float16" and accelerator.scaler is None:
        raise ConfigError(
            "engine.precision 'float16' needs a GPU for its loss scaler; use bfloat16 or float32"
        )
    return accelerator


class Engine:
    """Trains a stage in a run directory, from where an earlier attempt ended."""

    def __init__(
        self,
        config: EngineConfig,
        stage: Stage,
        accelerator: Accelerator,
        *,
        run: Path,
        seed: int,
        use: dict[str, Any],
        record: dict[str, Any],
        accumulate: int = 1,
        hooks: tuple[Hook, ...] = (),
        resume: ResumeConfig | None = None,
    ) -> None:
        """use: stored with exported weights for sampling; record: the resolved config, for trackers.

        accumulate: micro-batches per process and step, see BatchConfig.split.
        """
        self.config, self.stage, self.accelerator = config, stage, accelerator
        self.run_folder, self.seed, self.record, self.hooks = run, seed, record, hooks
        self.accumulate = accumulate
        self.main = accelerator.is_main_process
        self.skipped_in_row = 0
        self.changed: dict[str, Any] = {}  # keys of the config since the last attempt: [before, now]
        self.stop = StopRequest()
        self.attendance = Attendance(run, accelerator.process_index, accelerator.num_processes)
        set_seed(seed)  # for anything that draws from global state, dropout for one
        self.state = TrainingState(
            stage,
            accelerator,
            sharding=config.sharding,
            ema=config.ema,
            posthoc_ema=config.posthoc_ema,
            snapshots=run / SNAPSHOTS if self.main else None,
        )
        self.saver = Saver(
            config,
            run,
            self.state,
            accelerator,
            identity=self._identity(),
            use=use,
            resume=resume or ResumeConfig(),
        )
        self.hooks_due = self.saver.resume() and self._hooks_were_cut_off()
        if self.saver.saved_step is not None and self.main:
            print(f"resuming {run} at step {self.step}")
            for key, (before, now) in self.saver.changed.items():
                print(f"continued on purpose: {key} was {before!r}, is {now!r}")

    @property
    def step(self) -> int:
        """Return the number of optimiser steps that were done."""
        return self.state.step

    @property
    def global_batch(self) -> int:
        """Return the number of samples of an optimiser step, over all processes."""
        return self.stage.batch_size * self.accumulate * self.accelerator.num_processes

    # ---- the run

    def run(self) -> bool:
        """Train to the last step. False if a signal stopped it earlier (a checkpoint is written either way)."""
        if self.step >= self.config.steps and not self.hooks_due:
            return True
        with self.stop:
            self.metrics = Metrics(
                self.run_folder,
                start_step=self.step,
                tracker=self.config.tracker,
                wandb=self.config.wandb,
                config=self.record,
                enabled=self.main,
            )
            if self.main and (notes := getattr(self.stage, "notes", dict)()):
                self.metrics.event(self.step, "notes", **notes)
            if self.main and self.changed:
                self.metrics.event(self.step, "config", changed=self.changed)
            if self.main and self.saver.changed:
                self.metrics.event(self.step, "resume", changed=self.saver.changed)
            try:
                with self._outcome():
                    self._loop()
            finally:
                self.metrics.close()
                self.attendance.leave()
            return self.step >= self.config.steps

    @contextlib.contextmanager
    def _outcome(self) -> Iterator[None]:
        """Keep `STATUS.json` true, whatever ends the training."""
        self.presence = run_folder.Presence(self.run_folder)
        self._write_status("running")
        try:
            yield
        except (ConfigError, TrainingError) as error:  # what comes again if the same is tried again
            self._write_status("failed", everywhere=True, reason=str(error))
            raise
        except KeyboardInterrupt:
            self._write_status("preempted")
            raise
        except Exception as error:
            lost = self.attendance.missing(error)
            self._write_status("crashed", everywhere=True, reason=lost or f"{type(error).__name__}: {error}")
            if lost is None:
                raise
            last = run_folder.latest(self.run_folder)
            raise TrainingError(
                f"{lost}. Run the same command again: it continues from {last or 'the start'}"
            ) from error
        finally:
            self.presence.close()
        self._write_status("done" if self.step >= self.config.steps else "preempted")

    def _loop(self) -> None:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        batches = self.stage.batches(self.step, rank, world, self.accumulate)
        progress = Progress(self.stage.name, self.step, self.config.steps, shown=self.main)
        self._checked: set[str] = set()  # phases whose parameters are all known to be used
        self._averages = MetricAverages(self.step)
        # Closing the batches ends the data workers.
        with contextlib.closing(batches), contextlib.closing(progress):
            # Images and scores before the first step, or those that the last attempt did not come to.
            if self.hooks_due or self.step == 0:
                self._run_hooks(self._hooks_now())

            while self.step < self.config.steps and not self._should_stop():
                # One optimiser step.
                self._train_step(batches)
                self.attendance.sign(self.step)
                progress.advance()

                # Report.
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    progress.report(self.step, self._report())

                # Save, then draw: what goes wrong in a hook costs no step.
                with self._averages.excluded():
                    hooks = self._hooks_now()
                    self.hooks_due = bool(hooks)
                    if self.saver.due() and self._can_save():
                        self._save()
                    self._run_hooks(hooks)

            # The last step, or the one a signal stopped at, is saved until it is there or has failed too often.
            while self.saver.saved_step != self.step:
                self._refuse_skipped_end()
                self._save()
            self.state.finish_averages()

    def _train_step(self, stream: Iterator[Any]) -> None:
        """Run every phase that is due; the averages follow, unless a gradient was not finite."""
        with self._averages.waiting():
            batches = list(islice(stream, self.accumulate))
        finite = [
            self.update(phase, optimizers, batches, number)
            for phase, optimizers in zip(self.stage.phases, self.state.optimizers)
            if phase.due(self.step)
            for number in range(phase.repeat)
        ]
        if not all(finite):
            self._count_skip(batches)
        trained = self.stage.phases[-1].due(self.step)
        self.state.step += 1
        if all(finite):
            self.skipped_in_row = 0
            self.state.update_averages(trained)

    def update(self, phase: Phase, optimizers: list[Any], batches: list[Any], repetition: int = 0) -> bool:
        """Take one optimiser step of a phase on this process's micro-batches; False if it had to be skipped.

        repetition: 0 to `phase.repeat` - 1.
        """
        # Learning rate, a function of the step.
        updates = phase.updates(self.step) + repetition
        lr_factor = phase.optim.factor(updates, phase.updates(self.config.steps))
        set_learning_rate(optimizers, lr_factor)

        # Forward and backward over the micro-batches; processes exchange gradients with the last one.
        if not phase.module.training:
            phase.module.train()
        logs: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            with self.state.parallel.synchronize(phase.net, last=number == len(batches) - 1):
                with self.accelerator.autocast():
                    loss, parts = phase.loss(phase.net, batch, self._random(phase, number, repetition))
                self.accelerator.backward(loss / len(batches))
            for name, value in {"loss": loss, **parts}.items():
                logs[name] = logs.get(name, 0) + sum_and_count(value)
        self._check_all_used(phase)

        # Clip. Gradients are averaged over processes, so that all see the same norm and decide alike.
        for optimizer in optimizers:
            self.accelerator.unscale_gradients(optimizer)
        norm = whole_tensor(nn.utils.clip_grad_norm_(phase.module.parameters(), phase.optim.clip))
        finite = math.isfinite(norm)

        # Optimiser step, unless a gradient is not finite; the loss scaler of float16 sees to that itself.
        scaler = self.accelerator.scaler
        for optimizer in optimizers:
            if scaler is not None:
                scaler.step(optimizer.optimizer)
            elif finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()  # once for all optimisers; accelerate's wrapper would do it for each
        if finite and phase.after_step is not None:
            phase.after_step([optimizer.optimizer for optimizer in optimizers])

        # Metrics. Those of the last phase, which trains the published model, go without the phase's name.
        if finite:
            logs["grad_norm"] = sum_and_count(norm)
            logs["lr"] = sum_and_count(torch.tensor(phase.optim.lr * lr_factor))
            self._averages.add("" if phase is self.stage.phases[-1] else f"{phase.name}/", logs)

        # float16: the scaler skips overflowing steps while it searches for a scale; a scale below 1 counts as failure.
        return finite or (scaler is not None and scaler.get_scale() >= 1)

    def _random(self, phase: Phase, number: int, repetition: int) -> SampleRandom:
        """Draw for the samples of a micro-batch; the global batch is ranks in order, of each its micro-batches."""
        count = self.stage.batch_size
        first = (self.accelerator.process_index * self.accumulate + number) * count
        purpose = (self.seed, self.stage.name, phase.name, self.step, *([repetition] if repetition else []))
        return SampleRandom(*purpose, first=first, count=count, device=self.accelerator.device)

    # ---- what training is refused for

    def _check_all_used(self, phase: Phase) -> None:
        """Refuse a parameter that no loss reaches: it would hang DDP, or drift by weight decay alone."""
        if phase.name in self._checked:
            return
        self._checked.add(phase.name)
        unused = [name for name, p in phase.module.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise TrainingError(
                f"{len(unused)} parameters of phase '{phase.name}' get no gradient, such as {unused[0]}"
            )

    def _count_skip(self, batches: list[Any]) -> None:
        """Count a step that was skipped; TrainingError for too many in a row."""
        self.state.skipped += 1
        self.skipped_in_row += 1
        log.warning("step %d skipped: a gradient is not finite", self.step)
        self.metrics.event(self.step, "warning", message="step skipped: a gradient is not finite")
        if self.skipped_in_row > self.config.max_skips:
            keys = [key for batch in batches for key in batch.keys]
            raise TrainingError(
                f"{self.skipped_in_row} steps in a row had a non-finite gradient, the last is step {self.step}; lower the "
                f"learning rate or look at these samples: {', '.join(keys[:8])}. "
                f"The last checkpoint is {run_folder.latest(self.run_folder)}; if it fails at once from there, delete that "
                "one to continue from the one before"
            )

    def _refuse_skipped_end(self) -> None:
        """Refuse to end with skipped steps: nobody knows whether the weights are any good."""
        if self.skipped_in_row:
            raise TrainingError(
                f"the last {self.skipped_in_row} of {self.config.steps} steps had a non-finite gradient and were skipped; "
                f"the last checkpoint is {run_folder.latest(self.run_folder)}. Look at the loss before it, lower the learning "
                "rate, or set engine.steps so that it ends elsewhere"
            )

    # ---- stopping and saving

    def _should_stop(self) -> bool:
        """Tell whether a signal reached any process, at a step that can be saved. All processes agree."""
        return self._can_save() and any_process(self.stop.requested, self.accelerator.device)

    def _can_save(self) -> bool:
        """Tell whether this step ends a period of the stage, and no streak of skipped steps is going on."""
        return self.step % getattr(self.stage, "period", 1) == 0 and self.skipped_in_row == 0

    def _save(self) -> None:
        """Write a checkpoint. Training goes on without it, until too many in a row have failed."""
        if self.main:
            self.presence.check()
        failure = self.saver.save()
        if failure is None:
            self._write_status("running")
            return
        self.metrics.event(self.step, "warning", message=f"checkpoint could not be saved: {failure}")
        if self.saver.failures >= self.config.max_failed_saves:
            raise TrainingError(
                f"{self.saver.failures} checkpoints in a row could not be saved ({failure}); free space and "
                f"run the same command again: it continues from {run_folder.latest(self.run_folder)}"
            )

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same for a resume to continue the same run."""
        data = {f"data {key}": value for key, value in self.stage.fingerprint.items()}
        return {"stage": self.stage.name, "seed": self.seed, "global batch": self.global_batch, **data}

    # ---- metrics, hooks and status

    def _report(self) -> dict[str, float]:
        """Record the means since the last report; nowhere else do metrics leave the device."""
        if self.main:
            self.presence.check()
        device, processes = self.accelerator.device, self.accelerator.num_processes
        values = self._averages.means(device)
        values |= self._averages.throughput(
            self.step, self.config.steps, self.global_batch, self.stage.forward_flops, device, processes
        )
        bad_samples = sum_over_processes(torch.tensor(self.stage.bad_samples, device=device))
        values |= {
            "skipped": self.state.skipped,
            "failed_saves": self.saver.failures,
            "bad_samples": int(bad_samples),
        }
        if self.state.ema is not None:
            values["ema_gap"] = relative_distance(self.state.ema.ema_model, self.stage.model)
        self.metrics.write(self.step, {name: float(f"{value:.9g}") for name, value in values.items()})
        self._averages = MetricAverages(self.step)
        return values

    def _hooks_now(self) -> list[Hook]:
        """List the hooks of this step; before the first step those that ask for it."""
        used = [hook for hook in self.hooks if hook.every]
        if self.step == 0:
            return [hook for hook in used if hook.first]
        return [hook for hook in used if self.step % hook.every == 0 or self.step == self.config.steps]

    def _run_hooks(self, hooks: Sequence[Hook]) -> None:
        for hook in hooks:
            published = self.state.published()
            if self.main or hook.everywhere:
                made = hook.run(published.get("ema", published["model"]))
                images = {name: value for name, value in made.items() if isinstance(value, Image.Image)}
                self.metrics.write(self.step, {k: v for k, v in made.items() if k not in images})
                for name, image in images.items():
                    self.metrics.write_image(self.step, name, image)
        if hooks:
            self.hooks_due = False
            self._write_status("running")

    def _hooks_were_cut_off(self) -> bool:
        """Tell whether the last attempt ended between the save of this step and its hooks."""
        status = run_folder.read_status(self.run_folder)
        due = self.main and status.get("hooks_due") is True and status.get("step") == self.step
        return any_process(due, self.accelerator.device)

    def _write_status(self, state: str, everywhere: bool = False, **details: Any) -> None:
        """Write `STATUS.json`; everywhere: from whichever process is the first to know, as the main one may be gone."""
        if everywhere:
            if run_folder.read_status(self.run_folder).get("state") != "running":
                return
        elif not self.main:
            return
        if self.hooks_due:
            details["hooks_due"] = True  # they come first when the run continues
        try:
            run_folder.write_status(self.run_folder, state, self.step, **details)
        except OSError as error:
            log.error("STATUS.json could not be written (%s); it should say: %s", error, state)
