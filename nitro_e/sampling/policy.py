"""The policy of a widened student: where it goes within one step of the sampler, without the network (pi-Flow).

The network predicts the data at n equal distances from t down to the sampler's next time, and between them the
prediction x0(s) is linear: the DX policy of pi-Flow (arXiv 2510.14974). The policy's velocity at a state x
and time s is (x - x0(s)) / s. Its path needs no solver: d(x / s) / ds = -x0(s) / s^2, so

    x_s = (s / t) x_t + s * integral of x0(u) / u^2 du from s to t,

and where x0(u) = a + b u, the integral from s to h is a (1 / s - 1 / h) + b log(h / s).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nitro_e.sampling.flow import expand, to_data

TINY = 1e-6  # least time that is divided by


class Policy(NamedTuple):
    """One step of the sampler, from x at t to t_next."""

    x: Tensor  # (B, C, h, w)
    t: Tensor  # (B,)
    t_next: Tensor  # (B,)
    data: Tensor  # (B, n, C, h, w) predicted at n equal distances, the first at t, the last at t_next

    def time_of(self, number: int) -> Tensor:
        """Return the time of one of the n predictions, (B,)."""
        return self.t + number / max(self.data.shape[1] - 1, 1) * (self.t_next - self.t)

    def data_at(self, s: Tensor) -> Tensor:
        """Return x0(s), (B, C, h, w). s: (B,) between t and t_next."""
        last = self.data.shape[1] - 1
        if last == 0:
            return self.data[:, 0]
        place = (self.t - s) / (self.t - self.t_next) * last  # (B,)
        before = place.long().clamp(0, last - 1)
        rows = torch.arange(len(s), device=s.device)
        return torch.lerp(
            self.data[rows, before], self.data[rows, before + 1], expand(place - before, self.x)
        )

    def state(self, s: Tensor) -> Tensor:
        """Return the path's x at s, (B, C, h, w). s: (B,) between t and t_next; at 0 it is the last prediction."""
        end = s.clamp(min=TINY)
        total = torch.zeros_like(self.x)
        for number in range(max(self.data.shape[1] - 1, 1)):
            high, low = self.time_of(number).clamp(min=TINY), self.time_of(number + 1).clamp(min=TINY)
            first, second = self.data[:, number], self.data[:, min(number + 1, self.data.shape[1] - 1)]
            slope = (first - second) / expand(high - low, first)
            reached = torch.maximum(end, low).minimum(high)  # the path has come to here in this part
            constant = first - expand(high, first) * slope
            total = total + expand(1 / reached - 1 / high, first) * constant
            total = total + expand((high / reached).log(), first) * slope
        x = expand(s / self.t, self.x) * self.x + expand(end, self.x) * total
        return torch.where(expand(s <= TINY, x), self.data[:, -1], x)

    def velocity(self, x: Tensor, s: Tensor) -> Tensor:
        """Return the velocity at a state x (B, C, h, w) and time s (B,) > 0."""
        return (x - self.data_at(s)) / expand(s, x)


def all_data(x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
    """Predict the data from a network's answer at (x, t): one (B, C, h, w), or n of a widened one (B, n, C, h, w)."""
    return to_data(x if velocity.ndim == x.ndim else x.unsqueeze(1), t, velocity)
