"""What the last layer of a model predicts, and how it becomes the velocity that everything else asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class PredictVelocity:
    """The last layer gives the velocity itself."""

    def velocity(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Turn what the last layer gives at (x, t) into a velocity; all (B, C, h, w), t (B,)."""
        return out

    def target(self, velocity: Tensor, t: Tensor) -> Tensor:
        """Return what `velocity` is trained towards where `velocity` is the true one, `noise - data`."""
        return velocity


@dataclass(frozen=True)
class PredictData:
    """The last layer gives the data, and the loss stays one of velocities (JiT, arXiv 2511.13720).

    v = (x - data) / max(t, floor), for the prediction and for the target: the squared error of velocities is that of
    data times 1 / max(t, floor)^2. At t >= floor both are true velocities.
    """

    floor: float

    def velocity(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        wide = torch.promote_types(out.dtype, torch.float32)
        return (x.to(wide) - out.to(wide)) / t.to(wide).clamp(min=self.floor)[:, None, None, None]

    def target(self, velocity: Tensor, t: Tensor) -> Tensor:
        return velocity * (t / self.floor).clamp(max=1)[:, None, None, None]


@dataclass(frozen=True)
class PredictPolicy(PredictVelocity):
    """The last layer gives velocities for several places of a step, one after the other (sampling/policy.py)."""

    places: int

    def velocity(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return out.unflatten(1, (self.places, -1))  # (B, places, C, h, w)


Prediction = PredictVelocity | PredictData
