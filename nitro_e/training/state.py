"""The state of a training run: what its checkpoints hold, and what a resume puts back.

    model/, ema/             published weights, for sampling and for stages that begin from them
    trainer/PHASE.pt         module and optimisers of every phase
    trainer/ema.pt           the average with its counters
    trainer/posthoc_ema.pt   averages of post-hoc EMA
    trainer/loss_scaler.pt   under float16

All tensors are whole and under the raw modules' names: a run may continue on other numbers of processes.

A stage that trains an adapter has frozen tensors. They lie in `RUN/base`, once, and in no checkpoint: model/ and ema/
hold the adapter alone, except of the last step, whose weights are published merged too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nitro_e.config import ConfigError, TrainingError
from nitro_e.files import save_object
from nitro_e.interfaces import Stage
from nitro_e.model.pretrained import check_fits, save_config, save_pretrained
from nitro_e.training.ema import EMA, EMAConfig, PostHocEMA, PostHocEMAConfig
from nitro_e.training.optim import build_optimizers
from nitro_e.training.parallel import (
    SHARDING,
    load_module_state,
    load_optimizer_state,
    module_state,
    optimizer_state,
)


class TrainingState:
    """Modules, optimisers and averages of a stage, and the step that they have reached."""

    def __init__(
        self,
        stage: Stage,
        accelerator: Accelerator,
        *,
        sharding: str,
        ema: EMAConfig | None,
        posthoc_ema: PostHocEMAConfig | None,
        snapshots: Path | None,
    ) -> None:
        """snapshots: the folder of post-hoc EMA in the process that writes it, None in the others."""
        self.stage, self.scaler = stage, accelerator.scaler
        self.step = self.skipped = 0  # optimiser steps that were done; of them, left out as not finite
        self.parallel = SHARDING[sharding](accelerator)
        self.ema = None if ema is None else EMA(stage.model, ema)
        # Sharded before optimisers are made of the parameters.
        for model in self._models().values():
            self.parallel.keep_whole(model)
        for phase in stage.phases:
            self.parallel.place(phase.module)
        if self.ema is not None:
            self.parallel.place(self.ema.ema_model)
        self.posthoc = None
        if posthoc_ema is not None:
            self.posthoc = PostHocEMA(stage.model, posthoc_ema.sigma_rels, snapshots, posthoc_ema.every)
        # whether it is an adapter that is trained
        self.adapted = any(map(self._is_frozen, stage.model.state_dict()))
        self.optimizers = []
        for phase in stage.phases:
            optimizers = build_optimizers(phase.module, phase.optim)
            self.optimizers.append([accelerator.prepare_optimizer(optimizer) for optimizer in optimizers])
            phase.net = self.parallel.wrap(phase.module)

    def update_averages(self, finite: Tensor, trained: bool = True) -> None:
        """Average in the weights after optimiser step `self.step`.

        finite: a () bool tensor on the device, false where the step was skipped. trained: whether it was to change them.
        """
        if self.ema is not None and trained:
            self.ema.update(finite)
        if self.posthoc is not None:
            self.posthoc.update(self.step, finite)

    def finish_averages(self) -> None:
        """Write the last snapshot of post-hoc EMA, unless it fell due by itself."""
        if self.posthoc is not None and self.posthoc.step % self.posthoc.every:
            self.posthoc.snapshot()

    def published(self) -> dict[str, nn.Module]:
        """Return the models to publish, by folder name. Every process must call it."""
        return {name: self.stage.export(self.parallel.whole(model)) for name, model in self._models().items()}

    def gather(self) -> dict[str, Any]:
        """Collect everything that a resume needs, {file: content}. Every process must call it."""
        gathered: dict[str, Any] = {
            phase.name: {
                "module": self._trained(phase.module),
                "optimizers": [
                    optimizer_state(phase.module, optimizer.optimizer) for optimizer in optimizers
                ],
            }
            for phase, optimizers in zip(self.stage.phases, self.optimizers)
        }
        if self.ema is not None:
            gathered["ema"] = {"module": self._trained(self.ema.ema_model), "step": self.ema.step.cpu()}
        if self.posthoc is not None:
            gathered["posthoc_ema"] = self.posthoc.state_dict()
        if self.scaler is not None:
            gathered["loss_scaler"] = self.scaler.state_dict()
        return gathered

    def check_finite(self, gathered: dict[str, Any], last_checkpoint: Path | None) -> None:
        """Raise TrainingError if a parameter is NaN or infinite; buffers may hold NaN for what is not known yet."""
        modules = {phase.name: phase.module for phase in self.stage.phases}
        if self.ema is not None:
            modules["ema"] = self.ema.ema_model
        broken = [
            name
            for part, module in modules.items()
            for name, _ in module.named_parameters()
            if name in gathered[part]["module"] and not gathered[part]["module"][name].isfinite().all()
        ]
        if broken:
            raise TrainingError(
                f"{len(broken)} parameters are not finite after step {self.step}, such as {broken[0]}; nothing was "
                f"saved. The last checkpoint is {last_checkpoint}; lower the learning rate and continue from it"
            )

    def write(
        self, folder: Path, published: dict[str, nn.Module], gathered: dict[str, Any], use: dict[str, Any]
    ) -> None:
        """Fill the folder of a checkpoint.

        published: empty for a checkpoint with adapters alone. use: stored with the weights, for sampling.
        """
        for name in self._models():
            self.write_published(folder / name, name, published.get(name), use)
        (folder / "trainer").mkdir()
        for name, content in gathered.items():
            save_object(content, folder / "trainer" / f"{name}.pt")

    def write_published(
        self,
        folder: Path,
        name: str,
        model: nn.Module | None,
        use: dict[str, Any],
        about: dict[str, Any] | None = None,
    ) -> None:
        """Write one of the models, of folder name `name`, and what the stage adds to it; about: for people.

        model: the one to publish; None: only what the stage adds, an adapter.
        """
        own = self._models()[name]
        if model is None:
            save_config(own.config, folder, use, about)
        else:
            save_pretrained(model, folder, use, about)
        write_extras = getattr(self.stage, "write_extras", None)
        if write_extras is not None:
            write_extras(own, folder)

    def load(self, checkpoint: Path) -> None:
        """Continue from the folder of a checkpoint. ConfigError if it is of another architecture or kind of training."""
        for phase, optimizers in zip(self.stage.phases, self.optimizers):
            content = _read(checkpoint, phase.name)
            state = self._with_frozen(phase.module, content["module"])
            check_fits(phase.module, state, checkpoint)
            load_module_state(phase.module, state)
            if len(content["optimizers"]) != len(optimizers):
                raise ConfigError(
                    f"{checkpoint} was trained with another kind of optimiser; set optim.kind back, or use init_from"
                )
            for optimizer, saved in zip(optimizers, content["optimizers"]):
                load_optimizer_state(phase.module, optimizer.optimizer, saved)
        if self.ema is not None:
            content = _read(checkpoint, "ema")
            load_module_state(self.ema.ema_model, self._with_frozen(self.ema.ema_model, content["module"]))
            self.ema.step.copy_(content["step"])
        if self.posthoc is not None:
            self.posthoc.load_state_dict(_read(checkpoint, "posthoc_ema"))
        if self.scaler is not None:
            self.scaler.load_state_dict(_read(checkpoint, "loss_scaler"))

    def _is_frozen(self, name: str) -> bool:
        return getattr(self.stage, "is_frozen", lambda name: False)(name)

    def _trained(self, module: nn.Module) -> dict[str, Any]:
        """Return the state of a module without the frozen tensors."""
        return {name: value for name, value in module_state(module).items() if not self._is_frozen(name)}

    def _with_frozen(self, module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
        """Add the module's own frozen tensors to a state; checkpoints of earlier versions have all of them."""
        frozen = {name: value for name, value in module_state(module).items() if self._is_frozen(name)}
        return {**frozen, **state}

    def _models(self) -> dict[str, nn.Module]:
        models = {"model": self.stage.model}
        return models if self.ema is None else {**models, "ema": self.ema.ema_model}


def _read(checkpoint: Path, name: str) -> dict[str, Any]:
    path = checkpoint / "trainer" / f"{name}.pt"
    if not path.exists():
        raise ConfigError(
            f"{checkpoint} has no '{name}' to resume: the config asks for something that was off before; put it back, or "
            f"start a new run with init_from={checkpoint}"
        )
    return torch.load(path, map_location="cpu", weights_only=True)
