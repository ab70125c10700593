"""Shared fixtures. Nothing in the tests reaches the network or the machine's wandb login."""

import contextlib
import os
import resource
from pathlib import Path

# The tests are small: more threads only wait for each other. Other processes inherit it, so that losses can be compared
# bit for bit (another number of threads adds in another order).
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from safetensors.torch import load_file
from tiny_hub import TinyHub

from nitro_e.interfaces import TextEmbedding
from nitro_e.model import EMMDiT, released

DATA = Path(__file__).parent / "data"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture
def disk_of():
    """`with disk_of(n):` no file can grow past n bytes: a real error of the system at the write, as on a full disk."""

    @contextlib.contextmanager
    def limited(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub on this machine, and an empty cache."""
    from huggingface_hub import constants, file_download, utils

    # Connections opened while the hub was forbidden would stay so.
    forget_connections = getattr(utils, "close_session", None) or utils.reset_sessions
    forget_connections()
    hub = TinyHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    address = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # older releases hold a copy
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", address, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    yield hub
    forget_connections()
    hub.close()


@pytest.fixture(scope="session")
def reference() -> dict[str, torch.Tensor]:
    """What the released implementation returned for a tiny model (weights under `w.`)."""
    return load_file(DATA / "emmdit_tiny_512.safetensors")


@pytest.fixture(scope="session")
def released_state(reference) -> dict[str, torch.Tensor]:
    return {name[2:]: tensor for name, tensor in reference.items() if name.startswith("w.")}


@pytest.fixture
def reference_model(released_state) -> EMMDiT:
    config = released.infer_config(released_state, base_grid=16, attention=("full", "4x1", "4x4"))
    model = EMMDiT(config)
    model.load_state_dict(released.from_released(released_state, config))
    return model


def as_text(tokens: torch.Tensor) -> TextEmbedding:
    return TextEmbedding(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))


@pytest.fixture
def fresh_state():
    """For tests that train in this process: accelerate remembers the precision of its first Accelerator."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
