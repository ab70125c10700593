"""Spread training over processes: modules replicated (DDP) or sharded (FSDP2), and sums over processes.

The only place that knows torch.distributed. Replicated and sharded modules give and take whole tensors under the raw
module's names, so a checkpoint does not show what wrote it. The 304M model needs no sharding (4.9 GB for weights, Adam
and average); it is there for larger ones.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from nitro_e.config import ConfigError, environment_number
from nitro_e.interfaces import DistContext

if TYPE_CHECKING:
    from accelerate import Accelerator


def patience() -> timedelta:
    """Return how long a process waits for the others before it gives up."""
    return timedelta(minutes=environment_number("NITRO_E_TIMEOUT_MINUTES", 10))


# ---- collectives; every process must call them


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Add up a tensor of one shape over all processes. The argument itself stays as it is."""
    if _is_alone():
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def gather_over_processes(tensor: Tensor) -> Tensor:
    """Concatenate the rows of all processes in the order of their ranks; every process has as many."""
    if _is_alone():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def any_process(flag: bool) -> bool:
    """Tell whether any process says yes. No GPU is waited for: the processes talk over the CPU."""
    if _is_alone():
        return flag
    answer = torch.tensor(int(flag))
    dist.all_reduce(answer, group=_cpu_group())
    return bool(answer)


@lru_cache(maxsize=1)
def _cpu_group() -> dist.ProcessGroup | None:
    """Return a group for tensors on the CPU; None, the default one, where that is for the CPU."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=patience())


def dist_context(accelerator: Accelerator) -> DistContext:
    """Describe the processes of this run to code that may also run alone."""
    return DistContext(accelerator.process_index, accelerator.num_processes, sum_over_processes)


def is_collective_error(error: Exception) -> bool:
    """Tell whether a collective failed. NCCL's errors have a class; gloo's are RuntimeErrors that name its source files."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _is_alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


# ---- sharded tensors


def whole_tensor(tensor: Tensor) -> Tensor:
    """Gather the shards of a DTensor, which every process must do; other tensors are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor; other tensors are returned as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Put a whole tensor onto the device of `like`, sharded as `like` is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)


# ---- sharded modules


class Replicated:
    """Every process holds all parameters; gradients are averaged (DDP when there are several processes)."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def keep_whole(self, model: nn.Module) -> None:
        """Prepare what `whole` returns; called before `place`."""

    def place(self, module: nn.Module) -> None:
        """Distribute the parameters; called before optimisers are made of them."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return what losses call instead of the module."""
        from accelerate import DistributedDataParallelKwargs

        self.accelerator.ddp_handler = DistributedDataParallelKwargs(
            # buffers are constants, or follow from what all processes have: nothing to send with every step
            broadcast_buffers=False,
            # DDP then looks for parameters without a gradient at every step
            find_unused_parameters=getattr(module, "sometimes_unused", False),
        )
        return self.accelerator.prepare_model(module)

    def synchronize(self, net: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Exchange gradients only with the last micro-batch of a step."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(net)

    def whole(self, model: nn.Module) -> nn.Module:
        """Return the model with whole tensors, for images and files. Every process must call it."""
        return model

    def step_if(self, finite: Tensor, optimizer: Optimizer) -> None:
        """Take an optimiser step unless `finite`, a () bool tensor on the device, is false.

        Fused optimisers look at it there; for others (Muon) the host waits to know.
        """
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.grad_scale, optimizer.found_inf = None, 1 - finite.float()
            optimizer.step()
        elif finite:
            optimizer.step()


class Sharded(Replicated):
    """Every process holds a shard of each parameter (FSDP2: `fully_shard` per block)."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        if accelerator.num_processes == 1:
            raise ConfigError(
                "engine.sharding 'fsdp' needs several processes: torchrun --nproc_per_node N -m nitro_e.cli train ..."
            )
        if accelerator.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise ConfigError(
                f"engine.sharding 'fsdp' on CPUs needs a newer torch than {torch.__version__}; use engine.sharding=ddp"
            )
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._whole: dict[int, nn.Module] = {}

    def keep_whole(self, model: nn.Module) -> None:
        self._whole[id(model)] = copy.deepcopy(model)

    def place(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        for name, part in module.named_modules():
            if name.rpartition(".")[0].endswith("blocks"):
                fully_shard(part, mesh=self.mesh)
        fully_shard(module, mesh=self.mesh)

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def step_if(self, finite: Tensor, optimizer: Optimizer) -> None:
        if finite:  # fused optimisers take no flag beside sharded parameters
            optimizer.step()

    @contextlib.contextmanager
    def synchronize(self, net: nn.Module, last: bool) -> Iterator[None]:
        net.set_requires_gradient_sync(last)
        yield

    def whole(self, model: nn.Module) -> nn.Module:
        copied = self._whole[id(model)]
        copied.load_state_dict(module_state(model))
        return copied


SHARDING = {"ddp": Replicated, "fsdp": Sharded}


# ---- states with whole tensors under the module's names; every process must call these


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with whole tensors."""
    return {name: whole_tensor(tensor) for name, tensor in module.state_dict().items()}


def load_module_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state dict with whole tensors, on any device, into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict({name: sharded_like(tensor, own[name]) for name, tensor in state.items()})


def optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return {parameter name: {moment: whole tensor}}; rates and decay belong to the config."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        names[parameter]: {key: whole_tensor(value) for key, value in values.items()}
        for parameter, values in optimizer.state.items()
    }


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` returned; moments are sharded as their parameters are."""
    parameters = dict(module.named_parameters())
    fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    optimizer.state.clear()
    for name, values in state.items():
        parameter = parameters[name]
        # a fused kernel reads the count of steps where the parameter is; other kernels keep it on the CPU
        optimizer.state[parameter] = {
            key: sharded_like(value, parameter)
            if value.shape == parameter.shape
            else (value.to(local_tensor(parameter).device) if id(parameter) in fused else value)
            for key, value in values.items()
        }
