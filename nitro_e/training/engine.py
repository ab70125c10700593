"""The training loop: every stage is a stream of batches and an ordered tuple of phases; nothing else varies.

A phase is "these parameters, this loss, this optimiser". Stages know nothing of accelerate, EMA, files or trackers;
this file knows nothing of losses. To resume, run the same command again: learning rate, data position and all
randomness are functions of the step, so the state (training.state) is the weights, the optimisers and the step.

On a GPU the host only queues work: within a step it never waits for a result. Whether gradients were finite is a tensor
there, which optimiser, averages and metrics obey; it is read, with the metrics, once per report.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge, TrainingError, environment_number
from nitro_e.interfaces import Phase, Stage
from nitro_e.model.cpu.packing import bfloat16_slowdown
from nitro_e.randomness import SampleRandom
from nitro_e.record import run_folder
from nitro_e.record.metrics import Metrics, Tracker, WandBConfig, read, read_events
from nitro_e.training.attendance import Attendance
from nitro_e.training.ema import FOLDER as SNAPSHOTS
from nitro_e.training.ema import EMAConfig, PostHocEMAConfig, relative_distance
from nitro_e.training.meters import MetricAverages, Progress, read_together, sum_and_count
from nitro_e.training.optim import set_learning_rate
from nitro_e.training.parallel import any_process, patience, sum_over_processes, whole_tensor
from nitro_e.training.saving import ResumeConfig, Saver
from nitro_e.training.selection import MAX_ROLLBACKS, Selection
from nitro_e.training.signals import StopRequest
from nitro_e.training.state import TrainingState

log = logging.getLogger(__name__)

STOP_EVERY = 10  # steps on a GPU between two times that the processes tell each other of signals
SLOW_BFLOAT16 = 1.5  # products that take so many times as long as in float32 make the whole training slower


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
    compile_encoders: bool = False  # those of codec, text and vision that have weights
    tf32: bool = True  # products of float32 numbers on a GPU in TF32, which has 10 bits of precision
    gradient_checkpointing: bool = False  # less memory for a third more arithmetic
    ema: EMAConfig | None = None  # average of the weights during training; null: none
    # snapshots from which nitro-e ema makes any average afterwards
    posthoc_ema: PostHocEMAConfig | None = None
    save_every: Annotated[int, Ge(1)] = 1000  # steps between checkpoints
    keep_last: Annotated[int, Ge(2), "the newest one may turn out damaged"] = 2  # newest checkpoints
    keep_every: Annotated[int, Ge(0)] = 0  # and those at multiples of this many steps; 0: none
    max_failed_saves: Annotated[int, Ge(1)] = 3  # in a row before giving up
    max_skips: Annotated[int, Ge(0)] = 5  # non-finite steps in a row before giving up
    log_every: Annotated[int, Ge(1)] = (
        20  # steps between lines of metrics, and between looks for skipped steps
    )
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
    use_cpu = not torch.cuda.is_available()  # Apple's GPUs lack float64, in which metrics are summed
    # `accelerate launch --num_processes N` without GPUs names an address for N processes, then starts a single one.
    promised = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    if not use_cpu:  # on a CPU it would change results
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.tf32  # of convolutions
    handlers = [InitProcessGroupKwargs(timeout=patience())]
    accelerator = Accelerator(mixed_precision=precision, cpu=use_cpu, kwargs_handlers=handlers)
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
    if use_cpu and config.precision == "bfloat16" and accelerator.is_main_process:
        if (slowdown := bfloat16_slowdown()) > SLOW_BFLOAT16:
            log.warning(
                "engine.precision bfloat16: on this processor products take %.1f times as long as in float32; "
                "engine.precision=float32 trains faster",
                slowdown,
            )
    return accelerator


class Unread(NamedTuple):
    """A step of which the host does not know yet whether it was skipped."""

    step: int
    keys: list[str]  # of its samples
    finite: Tensor  # () bool, on the device


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
        selection: Selection | None = None,
    ) -> None:
        """use: stored with exported weights for sampling; record: the resolved config, for trackers.

        accumulate: micro-batches per process and step, see BatchConfig.split. selection: of the best checkpoint, by
        numbers of the hooks that run everywhere.
        """
        self.config, self.stage, self.accelerator = config, stage, accelerator
        self.run_folder, self.seed, self.record, self.hooks = run, seed, record, hooks
        self.accumulate, self.selection = accumulate, selection
        self.main = accelerator.is_main_process
        self.skipped_in_row = 0  # as far as it was read
        self._unread: list[Unread] = []
        self._stop_exchanged = -1  # step at which the processes last told each other of signals
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
            if self.selection is not None:
                self.selection.read([row for row in read(self.run_folder) if row["step"] <= self.step])
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
        headline = getattr(self.stage, "headline", ("loss",))
        progress = Progress(self.stage.name, self.step, self.config.steps, self.main, headline)
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
        updates = [
            self.update(phase, optimizers, batches, number)
            for phase, optimizers in zip(self.stage.phases, self.state.optimizers)
            if phase.due(self.step)
            for number in range(phase.repeat)
        ]
        finite = (
            torch.stack(updates).all() if updates else torch.full((), True, device=self.accelerator.device)
        )
        self._unread.append(Unread(self.step, [key for batch in batches for key in batch.keys], finite))
        trained = self.stage.phases[-1].due(self.step)
        self.state.step += 1
        self.state.update_averages(finite, trained)

    def update(self, phase: Phase, optimizers: list[Any], batches: list[Any], repetition: int = 0) -> Tensor:
        """Take one optimiser step of a phase on this process's micro-batches.

        repetition: 0 to `phase.repeat` - 1. Returns a () bool tensor on the device: false if the step had to be skipped.
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
        finite = norm.isfinite()

        # Optimiser step, unless a gradient is not finite: clipping has brought that into those of all optimisers, and the
        # loss scaler of float16 looks at each for itself.
        scaler = self.accelerator.scaler
        for optimizer in optimizers:
            if scaler is None:
                self.state.parallel.step_if(finite, optimizer.optimizer)
            elif finite:
                scaler.step(optimizer.optimizer)
            optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()  # once for all optimisers; accelerate's wrapper would do it for each
        if phase.after_step is not None and finite:  # such a phase waits for the device
            phase.after_step([optimizer.optimizer for optimizer in optimizers])

        # Metrics. Those of the last phase, which trains the published model, go without the phase's name.
        logs["grad_norm"] = sum_and_count(norm)
        logs["lr"] = sum_and_count(torch.full((), phase.optim.lr * lr_factor, device=norm.device))
        self._averages.add("" if phase is self.stage.phases[-1] else f"{phase.name}/", logs, finite)

        # float16: the scaler skips overflowing steps while it searches for a scale; a scale below 1 counts as failure.
        return finite if scaler is None else finite | (scaler.get_scale() >= 1)

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

    def _flags(self) -> Tensor:
        """Return whether the steps that nobody has looked at were finite, as numbers on the device."""
        flags = [step.finite for step in self._unread]
        return torch.stack(flags).double() if flags else torch.zeros(0, device=self.accelerator.device)

    def _count_skips(self, finite: Sequence[float]) -> None:
        """Count the steps that turned out to have been skipped; TrainingError for too many in a row."""
        for (step, keys, _), fine in zip(self._unread, finite, strict=True):
            self.skipped_in_row = 0 if fine else self.skipped_in_row + 1
            if fine:
                continue
            self.state.skipped += 1
            log.warning("step %d skipped: a gradient is not finite", step)
            self.metrics.event(step, "warning", message="step skipped: a gradient is not finite")
            if self.skipped_in_row > self.config.max_skips:
                raise TrainingError(
                    f"{self.skipped_in_row} steps in a row had a non-finite gradient, the last is step {step}; lower "
                    f"the learning rate or look at these samples: {', '.join(keys[:8])}. "
                    f"The last checkpoint is {run_folder.latest(self.run_folder)}; if it fails at once from there, "
                    "delete that one to continue from the one before"
                )
        self._unread.clear()

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
        every = STOP_EVERY if self.accelerator.device.type == "cuda" else 1
        if self.step % getattr(self.stage, "period", 1) or self.step - self._stop_exchanged < every:
            return False
        self._stop_exchanged = self.step
        return any_process(self.stop.requested) and self._can_save()

    def _can_save(self) -> bool:
        """Tell whether this step ends a period of the stage, and no streak of skipped steps is going on."""
        if self._unread:
            self._count_skips(self._flags().tolist())
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
        """Record the means since the last report; nowhere else do metrics leave the device, all in one transfer."""
        if self.main:
            self.presence.check()
        device, processes = self.accelerator.device, self.accelerator.num_processes
        pairs = self._averages.pairs(device)
        bad_samples = torch.full((1,), self.stage.bad_samples, dtype=pairs.dtype, device=device)
        sums = sum_over_processes(torch.cat([pairs.flatten(), bad_samples]))
        on_device = {
            "pairs": sums[:-1].reshape(pairs.shape),
            "bad_samples": sums[-1],
            "finite": self._flags(),
        }
        if self.state.ema is not None:
            on_device["ema_gap"] = relative_distance(self.state.ema.ema_model, self.stage.model)
        read = read_together(**on_device)
        self._count_skips(read["finite"])
        values = self._averages.means(read["pairs"])
        values |= self._averages.throughput(
            self.step, self.config.steps, self.global_batch, self.stage.forward_flops, device, processes
        )
        values |= {
            "skipped": self.state.skipped,
            "failed_saves": self.saver.failures,
            "bad_samples": int(read["bad_samples"]),
        }
        values |= {name: read[name] for name in ("ema_gap",) if name in read}
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
        scores: dict[str, float] = {}
        for hook in hooks:
            published = self.state.published()
            if self.main or hook.everywhere:
                made = hook.run(published.get("ema", published["model"]))
                images = {name: value for name, value in made.items() if isinstance(value, Image.Image)}
                numbers: dict[str, Any] = {name: value for name, value in made.items() if name not in images}
                self.metrics.write(self.step, numbers)
                for name, image in images.items():
                    self.metrics.write_image(self.step, name, image)
                if hook.everywhere:
                    scores |= numbers
        if scores and self.selection is not None and self._can_save():
            self._select(self.selection, scores)
        if hooks:
            self.hooks_due = False
            self._write_status("running")

    def _select(self, selection: Selection, scores: dict[str, float]) -> None:
        """Keep this step if it is the best one; act if a guarded score has fallen. All processes decide alike."""
        fallen, best = selection.fallen(self.step, scores), selection.is_best(self.step, scores)
        selection.history[self.step] = scores
        if best and not fallen:
            self._keep_best(str(selection.best), scores)
        if not fallen:
            return
        log.warning("guard: %s", fallen)
        self.metrics.event(self.step, "guard", message=f"guard: {fallen} ({selection.action})")
        if selection.action == "warn":
            return
        if self.saver.saved_step != self.step:
            self._save()
        done = {row["step"] for row in read_events(self.run_folder) if row["event"] == "rollback"} - {
            self.step
        }
        if selection.action == "stop" or len(done) >= MAX_ROLLBACKS:
            kept = run_folder.best(self.run_folder)
            after = f" after {len(done)} rollbacks" if done else ""
            raise TrainingError(
                f"guard: {fallen}; stopped at step {self.step}{after}. The best weights are "
                f"{kept or 'not kept: set evaluation.best'}; to go on, widen evaluation.guard or set its action to warn"
            )
        step = self.saver.roll_back()
        message = f"went back to the weights, moments and averages of step {step}"
        self.metrics.event(self.step, "rollback", message=message)
        self.saver.saved_step = None
        self._save()

    def _keep_best(self, name: str, scores: dict[str, float]) -> None:
        """Keep the checkpoint of this step and publish its weights in RUN/best."""
        if self.saver.saved_step != self.step:
            self._save()
        if self.saver.saved_step != self.step:
            return  # a full disk: said, and tried again with the next best
        try:
            self.saver.publish_best({"step": self.step, "score": name, "value": scores[name]})
        except OSError as error:
            log.error("the best weights, of step %d, could not be written: %s", self.step, error)
            self.metrics.event(self.step, "warning", message=f"RUN/best could not be written: {error}")
            return
        self.metrics.event(self.step, "best", message=f"the best so far: {name} {scores[name]:.4g}")

    def _hooks_were_cut_off(self) -> bool:
        """Tell whether the last attempt ended between the save of this step and its hooks."""
        status = run_folder.read_status(self.run_folder)
        due = self.main and status.get("hooks_due") is True and status.get("step") == self.step
        return any_process(due)

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
