"""The environment of a run: code version, packages, machine. It stands in the first line of every attempt of a run."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nitro_e.config import environment_number

PACKAGES = (
    "torch",
    "accelerate",
    "webdataset",
    "diffusers",
    "transformers",
    "timm",
    "peft",
    "safetensors",
    "numpy",
)


def environment() -> dict[str, Any]:
    """Describe the environment as plain data; what cannot be found out is None."""
    return {
        "command": shlex.join(sys.argv),
        "git": git_commit(),
        "host": platform.node(),
        "platform": platform.platform(),
        "device": device_name(),
        "processes": environment_number("WORLD_SIZE", 1),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def git_commit() -> str | None:
    """Find the commit this package is checked out at, with `-dirty` if files differ; None outside a checkout."""
    here = Path(__file__)
    try:  # an installed copy may lie in somebody else's repository, which does not track it
        _git("ls-files", "--error-unmatch", here.name)
        return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def default_device() -> str:
    """Name this process's GPU, Apple's, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return f"cuda:{environment_number('LOCAL_RANK', 0)}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_name() -> str:
    """Name the GPUs of this machine, or its CPU."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return "Apple GPU (mps)"
    return f"CPU, {os.cpu_count()} cores, {_cpu_model()}"


def out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out; torch says so in an OutOfMemoryError on a GPU, in a plain RuntimeError on the CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
