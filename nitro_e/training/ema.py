"""Averages of the weights: one exponential moving average, or post-hoc EMA, whose length is chosen after training.

The second is EDM2's (arXiv 2312.02696, Section 3 and Appendix C): two averages with power-function profiles are kept
while training and written out now and then; any other profile is a linear combination of those snapshots, found by
least squares. The length of a profile is sigma_rel, its standard deviation in time as a share of the training so far:
0.05 averages over about the last tenth.

    nitro-e ema synthesize RUN --sigma-rel 0.08 --out FOLDER

Both are told on the device whether a step was skipped (its gradient was not finite), so the host need not wait to know.
ema-pytorch's classes read their counters on the host at every step; its PostHocEMA is also off by 4e-5 to 7e-4 on a
random walk of 200 to 2,000 steps, because its beta is that of one step later (ours: 3e-7), and pickles its snapshots.

Left out: averaging again in a second training run, and grids over sigma_rel (call the tool in a loop).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Ge, Gt, Lt
from nitro_e.files import atomic_path, save_tensors
from nitro_e.training.parallel import local_tensor, sharded_like, whole_tensor

log = logging.getLogger(__name__)

FOLDER = "posthoc_ema"  # of snapshots, in the run directory
MAX_ERROR = 0.05  # of a synthesised profile, in L2 relative to the profile asked for


@dataclass(frozen=True, kw_only=True)
class EMAConfig(Config):
    beta: Annotated[float, Gt(0), Lt(1)] = 0.9999  # per step
    # early on, beta is 1 - step^-power (0.67 forgets a random start); None: off
    warmup_power: Annotated[float, Gt(0)] | None = None


class EMA:
    """Averages the parameters and float buffers of a module; the first update copies them."""

    def __init__(self, module: nn.Module, config: EMAConfig) -> None:
        self.module, self.config = module, config
        self.ema_model = copy.deepcopy(module).eval().requires_grad_(False)
        device = next(module.parameters()).device
        self.step = torch.zeros((), dtype=torch.int64, device=device)  # updates so far

    @torch.no_grad()
    def update(self, wanted: Tensor | bool = True) -> None:
        """Average the weights in, unless `wanted`, a bool or a () bool tensor on the device, is false."""
        beta, power, before = self.config.beta, self.config.warmup_power, self.step.float()
        decay = torch.full_like(before, beta)
        if power is not None:
            decay = (1 - (1 + before) ** -power).clamp(max=beta)
        weight = torch.where(before > 0, 1 - decay, 1.0) * wanted
        _average(_averaged(self.ema_model), _averaged(self.module), weight)
        self.step += wanted


@torch.no_grad()
def relative_distance(one: nn.Module, other: nn.Module) -> Tensor:
    """Measure the distance between the parameters of two modules relative to the length of the second's, as a () tensor."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    apart = sum((a - b).double().square().sum() for a, b in pairs)
    length = sum(b.double().square().sum() for _, b in pairs)
    return whole_tensor(apart / length.clamp(min=1e-30)).sqrt()


def _profile_name(sigma_rel: float) -> str:
    return f"{sigma_rel:.3f}"


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
        if len({_profile_name(value) for value in self.sigma_rels}) < len(self.sigma_rels):
            raise ConfigError(
                f"sigma_rels: snapshots are named by three decimals, in which some of {list(self.sigma_rels)} are equal; "
                "choose values further apart"
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
        self.module, self.sigma_rels = module, config.sigma_rels
        self.folder, self.every = folder, config.every
        self.failed = 0
        self._seen = self._snapshots = 0  # the step of the last call, and the snapshots that were due by then
        device = next(module.parameters()).device
        # of the last update; on the device, as whether a step is averaged in is known there alone
        self._step = torch.zeros((), dtype=torch.float64, device=device)
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

    @property
    def step(self) -> int:
        """The step of the last update."""
        return int(self._step)

    @torch.no_grad()
    def update(self, step: int, wanted: Tensor | bool = True) -> None:
        """Average in the weights after optimiser step `step` (1, 2, ...), unless `wanted`, as in EMA.update, is false.

        A step may be left out: the next counts for both. The weights stand for the time from the last update to this
        one, over which the profile is integrated exactly: for consecutive steps beta = (1 - 1/t)^(gamma + 1)
        (Section 3.1).
        """
        if step <= self._seen:
            raise ValueError(f"post-hoc EMA: step {step} after step {self._seen}")
        self._seen = step
        values = list(_floats(self.module).values())
        for gamma, average in zip(self.gammas, self.averages):
            beta = (self._step / step) ** (gamma + 1)
            _average(list(average.values()), values, (1 - beta) * wanted)
        self._step = torch.where(torch.as_tensor(wanted, device=self._step.device), float(step), self._step)
        # after a step that was left out the next one is looked at
        if step // self.every > self._snapshots and self.step == step:
            self._snapshots = step // self.every
            self.snapshot()

    def snapshot(self) -> None:
        """Write the averages as of now (with sharded weights, all processes must call). A failure is counted, not raised."""
        for sigma_rel, average in zip(self.sigma_rels, self.averages):
            state = {**self.module.state_dict(), **average}
            state = {name: _to_half(whole_tensor(tensor)) for name, tensor in state.items()}
            if self.folder is None:
                continue
            path = self.folder / f"step-{self.step:07d}-{_profile_name(sigma_rel)}.safetensors"
            metadata = {"step": str(self.step), "sigma_rel": repr(sigma_rel)}
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as temporary:
                    save_tensors(state, temporary, metadata)
            except OSError as error:
                self.failed += 1
                log.error(
                    "snapshot %s could not be written (%s); training goes on, synthesis will be coarser",
                    path,
                    error,
                )

    def state_dict(self) -> dict[str, Any]:
        """Everything a resume needs, in full precision (with sharded weights, all processes must call)."""
        averages = [
            {name: whole_tensor(tensor) for name, tensor in average.items()} for average in self.averages
        ]
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
                tensor.copy_(sharded_like(saved[name], tensor))
        self._seen, self._snapshots = state["step"], state["step"] // self.every
        self._step.fill_(state["step"])
        for snapshot in list_snapshots(self.folder) if self.folder is not None else []:
            if snapshot.step > self.step:
                snapshot.path.unlink()


class Snapshot(NamedTuple):
    """A file with one average as of one step."""

    step: int
    sigma_rel: float
    path: Path


def list_snapshots(folder: Path) -> list[Snapshot]:
    """List the readable snapshots of a folder, oldest first."""
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
    """Solve sigma_rel^2 = (g+1) / ((g+2)^2 (g+3)) for the exponent g of the profile t^g with relative width sigma_rel."""
    widest = 12**-0.5  # gamma = 0, the plain mean
    if not 0 < sigma_rel <= widest:
        raise ConfigError(
            f"sigma_rel is between 0 and {widest:.3f} (the plain mean of all steps), got {sigma_rel}"
        )
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(float(roots.real.max()), 0.0)


def profile_product(gamma_a: np.ndarray, t_a: np.ndarray, gamma_b: np.ndarray, t_b: np.ndarray) -> np.ndarray:
    """Integrate p_a p_b over time, where p(t) = (gamma+1) t^gamma / T^(gamma+1) on 0..T (Appendix C)."""
    ratio = np.where(t_a < t_b, (t_a / t_b) ** gamma_b, (t_b / t_a) ** gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio / np.maximum(t_a, t_b)


def solve(
    steps: Sequence[int], sigma_rels: Sequence[float], step: int, sigma_rel: float
) -> tuple[np.ndarray, float]:
    """Find the weights of snapshots (steps, sigma_rels) whose sum is nearest to the profile (step, sigma_rel).

    Returns them, and the relative L2 distance of the synthesised profile, 0 to 1.
    Least squares over profiles (Section 3.2); the weights are then scaled to sum to one, since every profile does.
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
) -> tuple[dict[str, Tensor], str]:
    """Average the weights with profile sigma_rel as of `step` (None: the newest snapshot).

    Returns a float32 state dict of the module that was tracked, and a line about the fit. Raises ConfigError where the
    snapshots do not allow it.
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


def _average(averages: list[Tensor], values: list[Tensor], weight: Tensor) -> None:
    """Move averages towards values by `weight`, a () tensor on their device; 0 leaves them as they are, bit for bit."""
    averages, values = list(map(local_tensor, averages)), list(map(local_tensor, values))
    torch._foreach_lerp_(averages, values, [weight.to(average.dtype) for average in averages])


def _averaged(module: nn.Module) -> list[Tensor]:
    tensors = [*module.parameters(), *module.buffers()]
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]


def _floats(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def _to_half(tensor: Tensor) -> Tensor:
    """Convert to float16, as EDM2 stores snapshots; float32 stays where float16 would overflow, and so do integers."""
    tensor = tensor.detach().cpu()
    half = tensor.half() if tensor.is_floating_point() else tensor
    return (half if half.isfinite().all() else tensor).contiguous()
