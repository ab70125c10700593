"""Checks of weights that were read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nitro_e.config import ConfigError


def check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise ConfigError for NaN or infinite values; one pass, without a mask of the weights' size."""
    bad = [name for name, tensor in state.items() if tensor.numel() and not _finite(tensor)]
    if bad:
        raise ConfigError(
            f"{path}: {len(bad)} of {len(state)} tensors are not finite, the first is '{bad[0]}'; the training they "
            "come from went wrong: give an earlier checkpoint (RUN/checkpoints/step-...), or train again with a lower "
            "learning rate"
        )


def _finite(tensor: Tensor) -> bool:
    least, most = tensor.aminmax()  # NaN if there is one
    return bool(least.isfinite() and most.isfinite())
