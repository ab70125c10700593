"""How a module is spread over processes: replicated (DDP) or sharded (FSDP2). Same numbers, same checkpoints. And who
of the processes is missing when one of them has died.

Both give and take whole tensors under the raw module's names, so a checkpoint does not show what wrote it. The 304M
model needs no sharding (4.9 GB for weights, Adam and average); it is there for larger ones.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import time
from pathlib import Path
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
        """The model with whole tensors, for images and files. Every process must call it."""
        return model


class Sharded(Replicated):
    """Every process holds a slice of each parameter (FSDP2: `fully_shard` per block)."""

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


# ---- who is there


class Attendance:
    """A file per process, `RUN/processes/rank-N.json`, with host, process id, step and time.

    When a collective fails, the processes that are left read there which one is missing: the backends do not say.
    """

    EVERY = 5.0  # seconds between signatures
    LATE = 20.0  # seconds between the last signatures of this process and of one that fell behind

    def __init__(self, run: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = run / "processes", rank, world
        self._signed = 0.0

    def sign(self, step: int) -> None:
        """Say that this process has reached `step`; at most every few seconds, so it may be called at every step."""
        if 0 <= time.time() - self._signed < self.EVERY:
            return
        self._signed = round(time.time(), 1)
        row = {"host": platform.node(), "pid": os.getpid(), "step": step, "time": self._signed}
        with contextlib.suppress(OSError):  # a full disk: saving reports it
            self.folder.mkdir(exist_ok=True)
            self._file(self.rank).write_text(json.dumps(row) + "\n")

    def leave(self) -> None:
        """Take the file away, at the end."""
        with contextlib.suppress(OSError):
            self._file(self.rank).unlink(missing_ok=True)
            self.folder.rmdir()  # by the last one

    def missing(self, error: Exception) -> str | None:
        """Which processes are missing, if `error` is of a collective that one of them did not answer; else None."""
        if self.world == 1 or not _is_of_collective(error):
            return None
        for _ in range(
            30
        ):  # a connection closes some moments before the process that held it is seen to be dead
            found = [self._look(rank) for rank in range(self.world) if rank != self.rank]
            if any(found):
                break
            time.sleep(0.1)
        named = "; ".join(line for line in found if line)
        return named or (
            f"a process does not answer ({_first_line(error)}), none of this host: look at the messages of the other hosts"
        )

    def _look(self, rank: int) -> str | None:
        """What is wrong with a process, as far as this one can see; those that wait like this one look well."""
        try:
            row = json.loads(self._file(rank).read_text())
            who = f"process {rank} (pid {row['pid']} on {row['host']}, last seen at step {row['step']})"
            behind = self._signed - row["time"]
            state = _state_of(row["pid"]) if row["host"] == platform.node() else None
        except FileNotFoundError:
            return f"process {rank} has left, or has not begun to train"
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if state in ("Z", "X", "gone"):
            return f"{who} has died: killed, or out of memory"
        if state == "T":
            return f"{who} is stopped: continue it (kill -CONT) or end it"
        if behind > self.LATE:
            return f"{who} fell {behind:.0f} s behind: it hangs, or its host is lost"
        return None

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"


def _is_of_collective(error: Exception) -> bool:
    """NCCL's errors have a class; gloo's are plain RuntimeErrors that name its source files."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def _state_of(pid: int) -> str | None:
    """R, S, T (stopped), Z, ... of a process on this host, or "gone"; None where there is no /proc."""
    if not Path("/proc/self/stat").exists():
        return None
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
