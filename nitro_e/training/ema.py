"""Post-hoc EMA (EDM2, arXiv 2312.02696, Section 3 and Appendix C): choose the length of the average after training.

Two averages with power-function profiles are kept while training and written out now and then; any other profile is a
linear combination of those snapshots, found by least squares. The length of a profile is sigma_rel, its standard
deviation in time as a share of the training so far: 0.05 averages over about the last tenth.

    nitro-e ema synthesize RUN --sigma-rel 0.08 --out FOLDER

Left out: averaging again in a second training run, and grids over sigma_rel (call the tool in a loop).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge
from nitro_e.files import save_tensors

log = logging.getLogger(__name__)

FOLDER = "posthoc_ema"  # of snapshots, in the run directory
MAX_ERROR = 0.05  # of a synthesised profile, in L2 relative to the profile asked for


@dataclass(frozen=True, kw_only=True)
class PostHocEMAConfig(Config):
    sigma_rels: tuple[float, ...] = (0.05, 0.10)  # profiles that are tracked; two are enough
    # steps between snapshots; 25 to 50 snapshots in a run give profiles to about 0.1 %
    every: Annotated[int, Ge(1)] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.sigma_rels)) < 2:
            raise ConfigError(
                f"sigma_rels: synthesis needs two different profiles, got {list(self.sigma_rels)}"
            )
        for sigma_rel in self.sigma_rels:
            gamma_of(sigma_rel)


class PostHocEMA:
    """Power-function averages of a bare module, in float32, updated at every step, with snapshots every so many steps.

    Every process keeps the same averages; only one has a `folder` to write to, the others pass None.
    The averages are not part of the module: `state_dict` belongs into the checkpoint.
    """

    def __init__(
        self,
        module: nn.Module,
        sigma_rels: Sequence[float] = (0.05, 0.10),
        folder: Path | None = None,
        every: int = 1000,
    ) -> None:
        config = PostHocEMAConfig(sigma_rels=tuple(sigma_rels), every=every)
        self.module, self.sigma_rels, self.folder, self.every = (
            module,
            config.sigma_rels,
            folder,
            config.every,
        )
        self.step = self.failed = 0
        self.gammas = [gamma_of(sigma_rel) for sigma_rel in self.sigma_rels]
        state = _floats(module)
        for name, tensor in state.items():
            if name.startswith(("module.", "_orig_mod.")):
                raise ValueError(
                    f"'{name}': give the bare module, not the one wrapped by DDP or torch.compile"
                )
            if tensor.dtype != torch.float32:
                raise ConfigError(
                    f"an average needs float32 weights, '{name}' is {tensor.dtype}; use autocast instead"
                )
        self.averages = [
            {name: tensor.detach().clone() for name, tensor in state.items()} for _ in self.sigma_rels
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step` (1, 2, ...). A step may be left out: the next counts for both.

        The weights stand for the time from the last update to this one, over which the profile is integrated exactly:
        for consecutive steps beta = (1 - 1/t)^(gamma + 1) (Section 3.1).
        """
        if step <= self.step:
            raise ValueError(f"post-hoc EMA: step {step} after step {self.step}")
        values = [_local(tensor) for tensor in _floats(self.module).values()]
        for gamma, average in zip(self.gammas, self.averages):
            beta = (self.step / step) ** (gamma + 1)
            torch._foreach_lerp_([_local(tensor) for tensor in average.values()], values, 1 - beta)
        previous, self.step = self.step, step
        if step // self.every > previous // self.every:
            self.snapshot()

    def snapshot(self) -> None:
        """Write the averages as of now (with sharded weights, all processes must call). A failure is counted, not raised."""
        for sigma_rel, average in zip(self.sigma_rels, self.averages):
            state = {**self.module.state_dict(), **average}
            state = {name: _to_half(_full(tensor)) for name, tensor in state.items()}
            if self.folder is None:
                continue
            path = self.folder / f"step-{self.step:07d}-{sigma_rel:.3f}.safetensors"
            try:
                _write(state, path, {"step": str(self.step), "sigma_rel": repr(sigma_rel)})
            except OSError as error:
                self.failed += 1
                log.error(
                    "snapshot %s could not be written (%s); training goes on, synthesis will be coarser",
                    path,
                    error,
                )

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs, in full precision (with sharded weights, all processes must call)."""
        averages = [{name: _full(tensor) for name, tensor in average.items()} for average in self.averages]
        return {"step": self.step, "sigma_rels": list(self.sigma_rels), "averages": averages}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Snapshots past its step are superseded and removed, they will be written again."""
        if tuple(state["sigma_rels"]) != self.sigma_rels:
            raise ConfigError(
                f"sigma_rels was {state['sigma_rels']}, is {list(self.sigma_rels)}; it cannot change in a run"
            )
        for ours, saved in zip(self.averages, state["averages"], strict=True):
            different = sorted(ours.keys() ^ saved.keys())
            if different:
                raise ConfigError(
                    f"the saved post-hoc averages are of another architecture: {different[0]} differs"
                )
            for name, tensor in ours.items():
                tensor.copy_(_shard_like(saved[name].to(tensor.device), tensor))
        self.step = state["step"]
        for snapshot in list_snapshots(self.folder) if self.folder is not None else []:
            if snapshot.step > self.step:
                snapshot.path.unlink()


class Snapshot(NamedTuple):
    step: int
    sigma_rel: float
    path: Path


def list_snapshots(folder: Path) -> list[Snapshot]:
    """The readable snapshots of a folder, oldest first."""
    found = []
    for path in sorted(folder.glob("step-*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            found.append(Snapshot(int(metadata["step"]), float(metadata["sigma_rel"]), path))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            log.warning("snapshot %s is not readable and left out: %s", path, error)
    return sorted(found)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile t^gamma with relative width sigma_rel: sigma_rel^2 = (g+1) / ((g+2)^2 (g+3))."""
    widest = 12**-0.5  # gamma = 0, the plain mean
    if not 0 < sigma_rel <= widest:
        raise ConfigError(
            f"sigma_rel is between 0 and {widest:.3f} (the plain mean of all steps), got {sigma_rel}"
        )
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(float(roots.real.max()), 0.0)


def profile_product(gamma_a: np.ndarray, t_a: np.ndarray, gamma_b: np.ndarray, t_b: np.ndarray) -> np.ndarray:
    """The integral of p_a p_b over time, where p(t) = (gamma+1) t^gamma / T^(gamma+1) on 0..T (Appendix C)."""
    ratio = np.where(t_a < t_b, (t_a / t_b) ** gamma_b, (t_b / t_a) ** gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio / np.maximum(t_a, t_b)


def solve(
    steps: Sequence[int], sigma_rels: Sequence[float], step: int, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """Weights of the snapshots (steps, sigma_rels) whose sum is nearest to the profile (step, sigma_rel), and its error.

    Least squares over profiles (Section 3.2); the weights are then scaled to sum to one, since every profile does.
    The error is the relative L2 distance of the synthesised profile, 0 to 1.
    """
    times, target = np.asarray(steps, dtype=np.float64), np.float64(step)
    gammas, gamma = np.array([gamma_of(value) for value in sigma_rels]), np.float64(gamma_of(sigma_rel))
    gram = profile_product(gammas[:, None], times[:, None], gammas[None, :], times[None, :])
    moments = profile_product(gammas, times, gamma, target)
    norm = profile_product(gamma, target, gamma, target)
    weights = np.linalg.lstsq(gram, moments, rcond=1e-12)[0]
    weights = weights / weights.sum()
    squared = weights @ gram @ weights - 2 * weights @ moments + norm
    return weights, float(np.sqrt(max(squared, 0.0) / norm))


def synthesize(
    snapshots: Sequence[Snapshot], sigma_rel: float, step: int | None = None
) -> tuple[dict[str, Tensor], str]:  # fmt: skip
    """The weights averaged with profile sigma_rel as of `step` (None: the newest snapshot), and a line about the fit.

    A float32 state dict of the module that was tracked. Raises ConfigError where the snapshots do not allow it.
    """
    newest = max((snapshot.step for snapshot in snapshots), default=0)
    step = newest if step is None else step
    used = [snapshot for snapshot in snapshots if snapshot.step <= step]
    if not used or step > newest:
        raise ConfigError(
            f"step {step}: the snapshots reach from {min((s.step for s in snapshots), default=0)} to {newest}"
        )
    weights, error = solve([s.step for s in used], [s.sigma_rel for s in used], step, sigma_rel)
    if error > MAX_ERROR:
        raise ConfigError(
            f"sigma_rel {sigma_rel} at step {step} cannot be built from {len(used)} snapshots (the profile is off by "
            f"{100 * error:.0f}%); choose sigma_rel between {min(s.sigma_rel for s in used)} and "
            f"{max(s.sigma_rel for s in used)} and a step that has a snapshot: {_nearest(used, step)}"
        )
    total: dict[str, Tensor] = {}
    for weight, snapshot in zip(weights.tolist(), used):
        with safe_open(snapshot.path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                if tensor.is_floating_point():
                    tensor = total.get(name, 0.0) + weight * tensor.float()
                total[name] = tensor  # integers: as they are in the newest
    return (
        total,
        f"sigma_rel {sigma_rel:g} at step {step} from {len(used)} snapshots, profile error {100 * error:.3f}%",
    )


def _nearest(snapshots: Sequence[Snapshot], step: int) -> str:
    steps = sorted({snapshot.step for snapshot in snapshots}, key=lambda known: abs(known - step))
    return ", ".join(map(str, sorted(steps[:4])))


def _floats(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def _to_half(tensor: Tensor) -> Tensor:
    """float16, as EDM2 stores snapshots; float32 where float16 would overflow; integers as they are."""
    tensor = tensor.detach().cpu()
    half = tensor.half() if tensor.is_floating_point() else tensor
    return (half if half.isfinite().all() else tensor).contiguous()


def _write(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    try:
        save_tensors(state, temporary, metadata)
        handle = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# Weights sharded by FSDP2 are DTensors: averages are taken shard by shard, files hold whole tensors.


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)
