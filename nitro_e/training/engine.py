"""The training loop: every stage is a stream of batches and an ordered tuple of phases; nothing else varies.

A phase is "these parameters, this loss, this optimiser". Stages know nothing of accelerate, EMA, files or trackers;
this file knows nothing of losses. To resume, run the same command again: learning rate, data position and all
randomness are functions of the step, so the state is the weights, the optimisers and the step.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import set_seed
from ema_pytorch import EMA
from PIL import Image
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge, Gt, Lt, TrainingError
from nitro_e.files import save_object
from nitro_e.interfaces import Phase, Stage
from nitro_e.model.pretrained import check_fits, save_pretrained
from nitro_e.randomness import SlotRandom
from nitro_e.record.metrics import Metrics, Tracker, WandBConfig
from nitro_e.record.pages import write_report
from nitro_e.training import checkpoint
from nitro_e.training.ema import FOLDER as SNAPSHOTS
from nitro_e.training.ema import PostHocEMA, PostHocEMAConfig
from nitro_e.training.meters import Progress, Window, memory_gb, peak_teraflops
from nitro_e.training.optim import build_optimizers, set_learning_rate
from nitro_e.training.parallel import (
    SHARDING,
    Attendance,
    load_module_state,
    load_optimizer_state,
    module_state,
    optimizer_state,
)

log = logging.getLogger(__name__)

# They ask for a checkpoint and a clean end; torchrun forwards them all (docs/training.md).
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


@dataclass
class Hook:
    """Images or numbers, by name, of the published model (the average if there is one)."""

    every: int  # steps, and after the last one; 0: never
    run: Callable[[Any], Mapping[str, Image.Image | float]]
    first: bool = False  # also before the first step
    everywhere: bool = False  # in every process, not the main one alone


@dataclass(frozen=True, kw_only=True)
class EMAConfig(Config):
    beta: Annotated[float, Gt(0), Lt(1)] = 0.9999  # per step
    # early on, beta is 1 - step^-power (0.67 forgets a random start); None: off
    warmup_power: Annotated[float, Gt(0)] | None = None


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Config):
    steps: Annotated[int, Ge(1)]  # optimiser steps
    # of the forward pass; weights stay float32
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    sharding: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False  # the blocks of the model
    gradient_checkpointing: bool = False  # less memory for a third more arithmetic
    ema: EMAConfig | None = None
    # snapshots from which nitro-e ema makes any average afterwards
    posthoc_ema: PostHocEMAConfig | None = None
    save_every: Annotated[int, Ge(1)] = 1000
    keep_last: Annotated[int, Ge(2), "the newest one may turn out damaged"] = 2  # newest checkpoints
    keep_every: Annotated[int, Ge(0)] = 0  # and those at multiples of this many steps; 0: none
    max_failed_saves: Annotated[int, Ge(1)] = 3  # in a row before giving up
    max_skips: Annotated[int, Ge(0)] = 5  # non-finite steps in a row before giving up
    log_every: Annotated[int, Ge(1)] = 20
    sample_every: Annotated[int, Ge(0)] = 1000  # steps between sample grids; 0: none
    # a mirror of metrics.jsonl: wandb where there is a login, else tensorboard if installed
    tracker: Tracker = "auto"
    wandb: WandBConfig = field(default_factory=WandBConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharding == "fsdp" and self.precision == "float16":
            raise ConfigError("sharding 'fsdp' has no loss scaler: use precision bfloat16 or float32")


def make_accelerator(config: EngineConfig) -> Accelerator:
    """The process group and device. Refuses to run as one process, or as copies of it, where several were asked for."""
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[config.precision]
    use_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    # `accelerate launch --num_processes N` without GPUs names an address for N processes, then starts a single one.
    promised = {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ
    patience = InitProcessGroupKwargs(
        timeout=timedelta(minutes=int(os.environ.get("NITRO_E_TIMEOUT_MINUTES", 10)))
    )
    accelerator = Accelerator(mixed_precision=precision, cpu=use_cpu, kwargs_handlers=[patience])
    if promised and accelerator.num_processes == 1:
        raise ConfigError(
            "accelerate launch was told of several processes but starts a single one without GPUs; use "
            "`torchrun --nproc_per_node N -m nitro_e.cli train CONFIG` (for one process: no launcher, or unset MASTER_ADDR)"
        )
    world = int(os.environ.get("WORLD_SIZE", 1))
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
    """Trains a stage in a run directory."""

    def __init__(
        self, config: EngineConfig, stage: Stage, accelerator: Accelerator, *, run: Path, seed: int,
        use: dict[str, Any], record: dict[str, Any], accumulate: int = 1, hooks: tuple[Hook, ...] = (),
    ) -> None:  # fmt: skip
        """use: stored with exported weights for sampling; record: the resolved config, for trackers.

        accumulate: micro-batches per process and step, see BatchConfig.split.
        """
        self.config, self.stage, self.accelerator = config, stage, accelerator
        self.run_folder, self.seed, self.use, self.record, self.hooks = run, seed, use, record, hooks
        self.accumulate = accumulate
        self.main = accelerator.is_main_process
        self.step = self.skipped = self.skipped_in_row = self.failed_saves = 0
        self.saved_step: int | None = None
        self.changed: dict[str, Any] = {}  # keys of the config since the last attempt: [before, now]
        self.stop_requested = self.save_due = self.hooks_due = False
        self.attendance = Attendance(run, accelerator.process_index, accelerator.num_processes)
        self.period = getattr(stage, "period", 1)
        set_seed(seed)  # for anything that draws from global state, dropout for one
        self.parallel = SHARDING[config.sharding](accelerator)
        self.ema = self._make_ema()
        self._place()
        self.posthoc = self._make_posthoc()
        self.optimizers = []
        for phase in stage.phases:
            self.optimizers.append(
                [accelerator.prepare_optimizer(o) for o in build_optimizers(phase.module, phase.optim)]
            )
            phase.net = self.parallel.wrap(phase.module)
        self.resume()

    # ---- the loop

    def run(self) -> bool:
        """Train to the last step. False if a signal stopped it earlier (a checkpoint is written either way)."""
        if self.step >= self.config.steps and not self.hooks_due:
            return True
        with self._signals():
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
            try:
                with self._outcome():
                    self._loop()
            finally:
                self.metrics.close()
                self.attendance.leave()
                self._write_report()
            return self.step >= self.config.steps

    @contextlib.contextmanager
    def _outcome(self) -> Iterator[None]:
        """Keep `STATUS.json` true, whatever ends the training."""
        self.presence = checkpoint.Presence(self.run_folder)
        self._status("running")
        try:
            yield
        except (ConfigError, TrainingError) as error:  # what comes again if the same is tried again
            self._status("failed", everywhere=True, reason=str(error))
            raise
        except KeyboardInterrupt:
            self._status("preempted")
            raise
        except Exception as error:
            lost = self.attendance.missing(error)
            self._status("crashed", everywhere=True, reason=lost or f"{type(error).__name__}: {error}")
            if lost is None:
                raise
            last = checkpoint.latest(self.run_folder)
            raise TrainingError(
                f"{lost}. Run the same command again: it continues from {last or 'the start'}"
            ) from error
        finally:
            self.presence.close()
        self._status("done" if self.step >= self.config.steps else "preempted")

    def _loop(self) -> None:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        stream = self.stage.batches(self.step, rank, world, self.accumulate)
        progress = Progress(self.stage.name, self.step, self.config.steps, shown=self.main)
        self._first_step = self.step
        self._window = Window(self.step)
        with contextlib.closing(stream), contextlib.closing(progress):  # the first ends the data workers
            if self.hooks_due or self.step == 0:
                self._show(self._due())
            while self.step < self.config.steps and not self._may_stop():
                self._train_step(stream)
                self.step += 1
                self.attendance.sign(self.step)
                progress.advance()

                last = self.step == self.config.steps
                if self.step % self.config.log_every == 0 or last:
                    progress.report(self.step, self._report())
                with self._window.paused():
                    due = self._due()
                    self.hooks_due = bool(due)
                    if self._must_save():
                        self.save()
                    self._show(due)
            while self.saved_step != self.step:
                self._refuse_streak()
                self.save()  # until it is there, or has failed too often
            if self.posthoc is not None and self.posthoc.step % self.posthoc.every:
                self.posthoc.snapshot()

    def _train_step(self, stream: Iterator[Any]) -> None:
        """One optimiser step of every phase, and of the averages if none was skipped."""
        with self._window.waiting():
            batches = list(islice(stream, self.accumulate))
        done = [self.update(index, batches) for index in range(len(self.stage.phases))]
        if not all(done):
            self._count_skip(batches)
            return
        self.skipped_in_row = 0
        if self.ema is not None:
            self.ema.update()
        if self.posthoc is not None:
            self.posthoc.update(self.step + 1)

    def _may_stop(self) -> bool:
        """Whether somebody asked for the end, at a step that can be saved. All processes agree."""
        return not (self.step % self.period or self.skipped_in_row) and self._any(self.stop_requested)

    def _must_save(self) -> bool:
        """At every `save_every` steps and the last; what falls into a streak of skipped steps waits for its end."""
        every = self.config.save_every if not self.failed_saves else max(self.config.save_every // 2, 1)
        if self.step % every == 0 or self.step == self.config.steps:
            self.save_due = True
        return self.save_due and not self.step % self.period and not self.skipped_in_row

    def update(self, index: int, batches: list[Any]) -> bool:
        """One optimiser step of one phase over the micro-batches of this process; False if it had to be skipped."""
        phase, optimizers = self.stage.phases[index], self.optimizers[index]
        net = phase.net
        factor = phase.optim.factor(self.step, self.config.steps)
        set_learning_rate(optimizers, factor)
        if not phase.module.training:
            phase.module.train()
        logs: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            with self.parallel.synchronize(net, last=micro == len(batches) - 1):
                with self.accelerator.autocast():
                    loss, parts = phase.loss(net, batch, self._random(phase, micro))
                self.accelerator.backward(loss / len(batches))
            for name, value in {"loss": loss, **parts}.items():
                logs[name] = logs.get(name, 0) + _sum_and_count(value)
        self._check_all_used(phase)
        for optimizer in optimizers:
            self.accelerator.unscale_gradients(optimizer)
        norm = _plain(torch.nn.utils.clip_grad_norm_(phase.module.parameters(), phase.optim.clip))
        # Gradients are averaged over processes, so every process sees the same norm and decides alike.
        # Under float16 the loss scaler skips overflowing steps itself: part of finding its scale, until that falls below 1.
        finite, scaler = math.isfinite(norm), self.accelerator.scaler
        for optimizer in optimizers:
            if scaler is not None:
                scaler.step(optimizer.optimizer)
            elif finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()  # once for all, which accelerate's wrapper would do for each
        if finite and phase.after_step is not None:
            phase.after_step([optimizer.optimizer for optimizer in optimizers])
        if finite:
            logs |= {
                "grad_norm": _sum_and_count(norm),
                "lr": _sum_and_count(torch.tensor(phase.optim.lr * factor)),
            }
            last = index == len(self.stage.phases) - 1  # the one of the model: its numbers go without a name
            self._window.add("" if last else f"{phase.name}/", logs)
        return finite or (scaler is not None and scaler.get_scale() >= 1)

    def _random(self, phase: Phase, micro: int) -> SlotRandom:
        """The numbers of this process's slots: the global batch is ranks in order, each rank its micro-batches."""
        count = self.stage.batch_size
        first = (self.accelerator.process_index * self.accumulate + micro) * count
        purpose = (self.seed, self.stage.name, phase.name, self.step)
        return SlotRandom(*purpose, first=first, count=count, device=self.accelerator.device)

    def _check_all_used(self, phase: Phase) -> None:
        """A parameter that no loss reaches would hang DDP or drift by weight decay alone."""
        if self.step > self._first_step:
            return
        unused = [name for name, p in phase.module.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise TrainingError(
                f"{len(unused)} parameters of phase '{phase.name}' get no gradient, such as {unused[0]}"
            )

    def _count_skip(self, batches: list[Any]) -> None:
        self.skipped += 1
        self.skipped_in_row += 1
        log.warning("step %d skipped: a gradient is not finite", self.step)
        self.metrics.event(self.step, "warning", message="step skipped: a gradient is not finite")
        if self.skipped_in_row > self.config.max_skips:
            keys = [key for batch in batches for key in batch.keys]
            raise TrainingError(
                f"{self.skipped_in_row} steps in a row had a non-finite gradient, the last is step {self.step}; lower the "
                f"learning rate or look at these samples: {', '.join(keys[:8])}. "
                f"The last checkpoint is {checkpoint.latest(self.run_folder)}; if it fails at once from there, delete that "
                "one to continue from the one before"
            )

    def _refuse_streak(self) -> None:
        """A run does not end with skipped steps: nobody knows whether its weights are any good."""
        if self.skipped_in_row:
            raise TrainingError(
                f"the last {self.skipped_in_row} of {self.config.steps} steps had a non-finite gradient and were skipped; "
                f"the last checkpoint is {checkpoint.latest(self.run_folder)}. Look at the loss before it, lower the learning "
                "rate, or set engine.steps so that it ends elsewhere"
            )

    # ---- telling

    def _report(self) -> dict[str, float]:
        """Average over processes and steps since the last report; the only place where metrics leave the device."""
        if self.main:
            self.presence.check()
        total = partial(self.accelerator.reduce, reduction="sum")
        values = self._window.averages(self.accelerator.device, total)
        samples = self.stage.batch_size * self.accumulate * self.accelerator.num_processes
        per_second = samples * self._window.steps(self.step) / self._window.seconds
        teraflops = per_second * 3 * self.stage.forward_flops / 1e12  # backward costs two forwards
        values |= {
            "samples_per_second": per_second,
            "tflops": teraflops,
            "data_wait": self._window.seconds_waiting / self._window.seconds,
            "eta_seconds": (self.config.steps - self.step)
            * self._window.seconds
            / self._window.steps(self.step),
            "memory_gb": memory_gb(self.accelerator.device),
            "skipped": self.skipped,
            "failed_saves": self.failed_saves,
            "bad_samples": self._sum(self.stage.bad_samples),
        }
        if self.ema is not None:
            values["ema_gap"] = relative_distance(self.ema.ema_model, self.stage.model)
        peak = peak_teraflops(self.accelerator.device)
        if peak is not None:
            values["mfu"] = teraflops / (peak * self.accelerator.num_processes)
        self.metrics.write(self.step, {name: float(f"{value:.9g}") for name, value in values.items()})
        self._window = Window(self.step)
        return values

    def _due(self) -> list[Hook]:
        """The hooks of this step; before the first step those that ask for it."""
        used = [hook for hook in self.hooks if hook.every]
        if self.step == 0:
            return [hook for hook in used if hook.first]
        return [hook for hook in used if self.step % hook.every == 0 or self.step == self.config.steps]

    def _show(self, due: Sequence[Hook]) -> None:
        for hook in due:
            model = self.published_model()
            if self.main or hook.everywhere:
                made = hook.run(model)  # metrics are written by the main process only
                self.metrics.write(
                    self.step, {k: v for k, v in made.items() if not isinstance(v, Image.Image)}
                )
                for name, image in made.items():
                    if isinstance(image, Image.Image):
                        self.metrics.write_image(self.step, name, image)
        if due:
            self.hooks_due = False
            self._status("running")

    def _status(self, state: str, everywhere: bool = False, **details: Any) -> None:
        """Write `STATUS.json`; everywhere: from whichever process is the first to know, as the main one may be gone."""
        if everywhere:
            if checkpoint.read_status(self.run_folder).get("state") != "running":
                return
        elif not self.main:
            return
        if self.hooks_due:
            details["hooks_due"] = True  # they come first when the run continues
        try:
            checkpoint.write_status(self.run_folder, state, self.step, **details)
        except OSError as error:
            log.error("STATUS.json could not be written (%s); it should say: %s", error, state)

    def _write_report(self) -> None:
        if self.main:
            try:
                write_report(self.run_folder)
            except Exception as error:  # a page for people must not turn a finished run into a failed one
                log.warning("no report.html: %s", error)

    # ---- stopping

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The signals of STOP ask for a checkpoint and a clean end, unless ignored (nohup); a second Ctrl-C ends at once."""

        def request(number: int, _frame: object) -> None:
            if self.stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_requested = True

        try:
            previous = {
                number: signal.signal(number, request)
                for number in STOP
                if signal.getsignal(number) is not signal.SIG_IGN
            }
        except ValueError:  # not in the main thread, where signals cannot be caught
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _any(self, flag: bool) -> bool:
        """Whether any process says yes; every process must call it."""
        return self._sum(int(flag)) > 0

    def _sum(self, count: int) -> int:
        """Over all processes, each of which must call it."""
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device), "sum").item())

    # ---- weights and files

    def _make_ema(self) -> EMA | None:
        config = self.config.ema
        if config is None:
            return None
        power = config.warmup_power
        average = copy.deepcopy(self.stage.model).eval().requires_grad_(False)
        return EMA(
            self.stage.model, ema_model=average, beta=config.beta, update_every=1, update_after_step=0,
            include_online_model=False, min_value=config.beta if power is None else 0.0, power=power or 1.0, inv_gamma=1.0,
        )  # fmt: skip

    def _make_posthoc(self) -> PostHocEMA | None:
        config = self.config.posthoc_ema
        folder = self.run_folder / SNAPSHOTS if self.main else None
        return config and PostHocEMA(self.stage.model, config.sigma_rels, folder, config.every)

    def _place(self) -> None:
        """Shard what is to be sharded, before optimisers are made."""
        if self.config.sharding == "ddp":
            return
        for model in [self.stage.model] if self.ema is None else [self.stage.model, self.ema.ema_model]:
            self.parallel.keep_whole(model)
        for phase in self.stage.phases:
            self.parallel.place(phase.module)
        if self.ema is not None:
            self.parallel.place(self.ema.ema_model)

    def published_model(self) -> nn.Module:
        """What a person should look at: the average if there is one. Every process must call it."""
        models = self._models()
        return models.get("ema", models["model"])

    def save(self) -> None:
        """Write a checkpoint. A failure (a full disk) is counted and retried; training goes on from memory."""
        models, state = self._models(), self._state()  # every process takes part in gathering
        self._refuse_non_finite(state)
        failure, self.save_due = "", False
        if self.main:
            self.presence.check()
            try:
                checkpoint.save(
                    self.run_folder,
                    self.step,
                    lambda folder: self._write(folder, models, state),
                    self._meta(),
                )
                checkpoint.prune(self.run_folder, self.config.keep_last, self.config.keep_every)
            except OSError as error:
                failure = str(error)
                log.error(
                    "step %d could not be saved (%s); the checkpoints before it are untouched",
                    self.step,
                    error,
                )
                self.metrics.event(self.step, "warning", message=f"checkpoint could not be saved: {error}")
        if not self._any(bool(failure)):
            self.failed_saves, self.saved_step = 0, self.step
            self._status("running")
            return
        self.failed_saves += 1
        if self.failed_saves >= self.config.max_failed_saves:
            raise TrainingError(
                f"{self.failed_saves} checkpoints in a row could not be saved ({failure or 'see process 0'}); free space and "
                f"run the same command again: it continues from {checkpoint.latest(self.run_folder)}"
            )

    def _refuse_non_finite(self, state: dict[str, Any]) -> None:
        """Weights with NaN or infinity are never saved, and no older checkpoint is deleted for them."""
        modules = {phase.name: phase.module for phase in self.stage.phases}
        if self.ema is not None:
            modules["ema"] = self.ema.ema_model
        broken = [
            name
            for part, module in modules.items()
            for name, _ in module.named_parameters()  # buffers may hold NaN for what is not known yet
            if not state[part]["module"][name].isfinite().all()
        ]
        if broken:
            raise TrainingError(
                f"{len(broken)} parameters are not finite after step {self.step}, such as {broken[0]}; nothing was saved. The last "
                f"checkpoint is {checkpoint.latest(self.run_folder)}; lower the learning rate and continue from it"
            )

    def _state(self) -> dict[str, Any]:
        """Everything a resume needs, as whole tensors."""
        state = {
            phase.name: {
                "module": module_state(phase.module),
                "optimizers": [
                    optimizer_state(phase.module, optimizer.optimizer) for optimizer in optimizers
                ],
            }
            for phase, optimizers in zip(self.stage.phases, self.optimizers)
        }
        if self.ema is not None:
            state["ema"] = {
                "module": module_state(self.ema.ema_model),
                "step": self.ema.step.clone(),
                "initted": self.ema.initted.clone(),
            }
        if self.posthoc is not None:
            state["posthoc_ema"] = self.posthoc.state_dict()
        if self.accelerator.scaler is not None:
            state["loss_scaler"] = self.accelerator.scaler.state_dict()
        return state

    def _models(self) -> dict[str, nn.Module]:
        """What is published, by folder name."""
        return {
            name: self.stage.export(self.parallel.whole(model)) for name, model in self._trained().items()
        }

    def _trained(self) -> dict[str, nn.Module]:
        return {"model": self.stage.model} | ({} if self.ema is None else {"ema": self.ema.ema_model})

    def _write(self, folder: Path, models: dict[str, nn.Module], state: dict[str, Any]) -> None:
        extras = getattr(self.stage, "write_extras", None)
        for name, model in models.items():
            save_pretrained(model, folder / name, self.use)
            if extras is not None:
                extras(self._trained()[name], folder / name)
        (folder / "trainer").mkdir()
        for name, values in state.items():
            save_object(values, folder / "trainer" / f"{name}.pt")

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resume to continue the same run."""
        data = {f"data {key}": value for key, value in self.stage.fingerprint.items()}
        batch = self.stage.batch_size * self.accumulate * self.accelerator.num_processes
        return {"stage": self.stage.name, "seed": self.seed, "global batch": batch, **data}

    def _meta(self) -> dict[str, Any]:
        world = self.accelerator.num_processes
        return {**self._identity(), "world": world, "skipped": self.skipped, "torch": torch.__version__}

    def resume(self) -> None:
        """Continue from the newest valid checkpoint of the run directory, if there is one."""
        with self.accelerator.main_process_first():  # the first to look renames damaged ones
            folder = checkpoint.latest_valid(self.run_folder)
        if folder is None:
            checkpoint.refuse_damaged(self.run_folder)
            return
        meta = checkpoint.read_meta(folder)
        now = self._identity()
        before = {key: meta.get(key) for key in now}
        if now != before:
            changed = "; ".join(
                f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if now[key] != before[key]
            )
            raise ConfigError(
                f"{folder} is of another experiment ({changed}); give this one its own run directory: run=..."
            )
        for phase, optimizers in zip(self.stage.phases, self.optimizers):
            state = self._saved(folder, phase.name)
            check_fits(phase.module, state["module"], folder)
            load_module_state(phase.module, state["module"])
            if len(state["optimizers"]) != len(optimizers):
                raise ConfigError(
                    f"{folder} was trained with another kind of optimiser; set optim.kind back, or use init_from"
                )
            for optimizer, saved in zip(optimizers, state["optimizers"]):
                load_optimizer_state(phase.module, optimizer.optimizer, saved)
        if self.ema is not None:
            state = self._saved(folder, "ema")
            load_module_state(self.ema.ema_model, state["module"])
            self.ema.step.copy_(state["step"])
            self.ema.initted.copy_(state["initted"])
        if self.posthoc is not None:
            self.posthoc.load_state_dict(self._saved(folder, "posthoc_ema"))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._saved(folder, "loss_scaler"))
        self.step, self.saved_step, self.skipped = meta["step"], meta["step"], meta.get("skipped", 0)
        status = checkpoint.read_status(self.run_folder)
        self.hooks_due = self._any(
            self.main and status.get("hooks_due") is True and status.get("step") == self.step
        )
        if self.main:
            print(f"resuming {self.run_folder} at step {self.step}")

    def _saved(self, folder: Path, name: str) -> dict[str, Any]:
        path = folder / "trainer" / f"{name}.pt"
        if not path.exists():
            raise ConfigError(
                f"{folder} has no '{name}' to resume: the config asks for something that was off before; put it back, or "
                f"start a new run with init_from={folder}"
            )
        return torch.load(path, map_location="cpu", weights_only=True)


@torch.no_grad()
def relative_distance(one: nn.Module, other: nn.Module) -> float:
    """Between the parameters of two modules, as a share of the second's length."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    apart = sum((a - b).double().square().sum() for a, b in pairs)
    length = sum(b.double().square().sum() for _, b in pairs)
    return float(_plain(apart / length.clamp(min=1e-30)).sqrt())


def _sum_and_count(value: Tensor) -> Tensor:
    """Metrics are means of (sum, count) pairs; a scalar counts once."""
    value = value.detach()
    return value if value.ndim else torch.stack([value.double(), torch.ones_like(value, dtype=torch.float64)])


def _plain(norm: Tensor) -> Tensor:
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
