"""The batch of one optimiser step, and how it is spread over processes and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, NamedTuple

from nitro_e.config import Config, ConfigError, Ge, Le


class Split(NamedTuple):
    """A global batch is processes x accumulate x micro-batch, in this order of its samples."""

    micro_batch: int  # samples that a process takes at a time
    accumulate: int  # micro-batches per process and optimiser step


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Config):
    """The number of samples of an optimiser step. The number of processes is no part of a recipe: the rest follows.

    A bare number in YAML is the global batch.
    """

    SHORTHAND: ClassVar[str] = "global"

    # samples of one optimiser step, over all processes; null where the stage makes its own (stage 3: its rows)
    global_: Annotated[int, Ge(1), Le(10_000_000)] | None = field(default=None, metadata={"key": "global"})
    # samples that a process takes at a time, as many as its memory holds; null: its whole share of the batch
    per_device: Annotated[int, Ge(1), Le(65536)] | None = None

    def split(self, world: int, rows: int | None = None) -> Split:
        """The split over `world` processes of the global batch, or of as many `rows` as the stage makes.

        ConfigError, with the nearest values that do divide, if it does not come out even.
        """
        total = self.global_ if rows is None else rows
        if total is None:
            raise ConfigError(
                "missing key 'batch.global' (samples of one optimiser step, over all processes)"
            )
        share, rest = divmod(total, world)
        micro = min(self.per_device or share, share)
        if rest == 0 and share % micro == 0:
            return Split(micro, share // micro)
        raise ConfigError(self._refusal(total, world, own=rows is None))

    def _refusal(self, total: int, world: int, own: bool) -> str:
        """The message that a batch does not divide. own: it is `global`, which the recipe may change."""
        micro, share = self.per_device or 1, total // world
        what = f"batch.global {total:,} is" if own else f"the batch of {total:,} rows is"
        each = f"{micro} x {world} processes" if micro > 1 else f"{world} processes"
        remedies = []
        if own:
            unit = micro * world
            remedies.append(
                f"the nearest that are: {_either(total // unit * unit, total // unit * unit + unit)}"
            )
        if total % world == 0:
            fits = [size for size in range(1, share + 1) if share % size == 0]
            below, above = [size for size in fits if size < micro], [size for size in fits if size > micro]
            remedies.append(f"set batch.per_device to {_either(below[-1], above[0])}")
        return (
            f"{what} not a multiple of {each}; {'; or '.join(remedies) or 'use another number of processes'}"
        )


def _either(*numbers: int) -> str:
    return " or ".join(f"{number:,}" for number in numbers if number)
