"""How a module is spread over processes: replicated (DDP) or sharded (FSDP2). Same numbers, same checkpoints.

Both give and take whole tensors under the raw module's names, so a checkpoint does not show what wrote it. The 304M
model needs no sharding (4.9 GB for weights, Adam and average); it is there for larger ones.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from nitro_e.config import ConfigError


class Replicated:
    """Every process holds everything; gradients are averaged (DDP when there are several processes)."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def place(self, module: nn.Module) -> None:
        """Before optimisers are made."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """What losses call instead of the module."""
        return self.accelerator.prepare_model(module)

    def synchronize(self, net: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Gradients travel only with the last micro-batch of a step."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(net)

    def whole(self, model: nn.Module) -> nn.Module:
        """The model with whole tensors, for pictures and files. Every process must call it."""
        return model


class Sharded(Replicated):
    """Every process holds a slice of each parameter (FSDP2: `fully_shard` per block)."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        if accelerator.num_processes == 1:
            raise ConfigError(
                "engine.sharding 'fsdp' needs several processes: torchrun --nproc_per_node N train.py ..."
            )
        if accelerator.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise ConfigError(
                f"engine.sharding 'fsdp' on CPUs needs a newer torch than {torch.__version__}; use engine.sharding=ddp"
            )
        self.mesh = torch.distributed.device_mesh.init_device_mesh(
            accelerator.device.type, (accelerator.num_processes,)
        )
        self._whole: dict[int, nn.Module] = {}

    def keep_whole(self, model: nn.Module) -> None:
        """Make the unsharded copy that `whole` fills; call before `place`."""
        self._whole[id(model)] = copy.deepcopy(model)

    def place(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        for name, part in module.named_modules():
            if name.rpartition(".")[0].endswith("blocks"):
                fully_shard(part, mesh=self.mesh)
        fully_shard(module, mesh=self.mesh)

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    @contextlib.contextmanager
    def synchronize(self, net: nn.Module, last: bool):
        net.set_requires_gradient_sync(last)
        yield

    def whole(self, model: nn.Module) -> nn.Module:
        copied = self._whole[id(model)]
        copied.load_state_dict(module_state(model))
        return copied


SHARDING = {"ddp": Replicated, "fsdp": Sharded}


# ---- states with whole tensors under the module's names; every process must call these


def module_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: gather(tensor) for name, tensor in module.state_dict().items()}


def load_module_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    own = module.state_dict()
    module.load_state_dict({name: scatter(tensor, own[name]) for name, tensor in state.items()})


def optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """{parameter name: {moment: tensor}}; rates and decay belong to the config."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        names[parameter]: {key: gather(value) for key, value in values.items()}
        for parameter, values in optimizer.state.items()
    }


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    parameters = dict(module.named_parameters())
    for name, values in state.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            key: scatter(value, parameter) if value.shape == parameter.shape else value
            for key, value in values.items()
        }


def gather(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def scatter(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor laid out as `like` is."""
    tensor = tensor.to(like.device)
    return (
        distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor
    )
