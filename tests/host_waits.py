"""Where the host would wait for a GPU, found on a CPU: tensors are marked as if they lay on one."""

import contextlib
import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nitro_e.stages.batches import tensors_of

aten = torch.ops.aten
# operators whose result the host needs
READS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.unique_consecutive,
}  # fmt: skip
LEAVES = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy}


class HostWaits:
    """Inside its `with` block, what is computed from tensors that were `put` on the device lies there too.

    `found` has a line of code for every value that the host reads from the device, and for every copy of a host tensor
    to the device that it would wait for (one without `non_blocking=True`).
    """

    def __init__(self):
        self.found, self.stack, self.paused = [], contextlib.ExitStack(), False

    def __enter__(self):
        self.stack.enter_context(_Operators(self))
        self.stack.enter_context(_Calls(self))
        return self

    def __exit__(self, *error):
        self.stack.close()

    def put(self, value):
        """Mark all tensors of a batch or module; returns it."""
        tensors = (
            [*value.parameters(), *value.buffers()]
            if isinstance(value, torch.nn.Module)
            else tensors_of(value)
        )
        for tensor in tensors:
            tensor.on_device = True
        return value

    def pausing(self, function):
        """Wrap a function that may wait."""

        def call(*arguments, **options):
            before, self.paused = self.paused, True
            try:
                return function(*arguments, **options)
            finally:
                self.paused = before

        return call

    def note(self, what):
        if not self.paused:
            ours = [frame for frame in traceback.extract_stack() if "/nitro_e/" in frame.filename]
            where = f"{ours[-1].filename}:{ours[-1].lineno} {ours[-1].line}" if ours else "?"
            self.found.append(f"{what} in {where}")


def on_device(tensor):
    return getattr(tensor, "on_device", False)


class _Operators(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = any(map(on_device, tensors))
        if there:
            packet = operator.overloadpacket
            masked = packet in (aten.index, aten.index_put_) and any(
                t.dtype == torch.bool for t in tensors[1:]
            )
            if packet in READS or masked:
                self.waits.note(str(packet))
            for tensor in tensors:
                if getattr(tensor, "of_host", False) and tensor.ndim and not on_device(tensor):
                    self.waits.note(f"copy to the device before {packet}")
                    tensor.of_host = False  # once
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                tensor.on_device = there
                # torch.tensor([...]) and what is computed from it
                tensor.of_host = operator.overloadpacket is aten.lift_fresh or (
                    not there and any(getattr(t, "of_host", False) for t in tensors)
                )
        return out


class _Calls(TorchFunctionMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in LEAVES and on_device(args[0]):
            self.waits.note(function.__name__)
            with torch.utils._python_dispatch._disable_current_modes():
                here = args[0].detach().clone()
            return here if function is torch.Tensor.cpu else function(here, *args[1:], **kwargs)
        out = function(*args, **kwargs)
        if function is torch.Tensor.to and kwargs.get("non_blocking") and isinstance(out, torch.Tensor):
            out.of_host = False
        return out
