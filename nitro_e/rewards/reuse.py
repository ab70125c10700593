"""Weights that several rewards read, in memory once: CLIP in `geneval` and `clipscore`, a reward that is trained on and scored."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar
from weakref import WeakValueDictionary

from torch import nn

Module = TypeVar("Module", bound=nn.Module)

_LOADED: WeakValueDictionary[Hashable, nn.Module] = WeakValueDictionary()
_PLACE: ContextVar[Hashable | None] = ContextVar("place", default=None)


@contextmanager
def placed(place: Hashable) -> Iterator[None]:
    """Say where the rewards that are built inside the block keep their weights; only those of one place share them."""
    token = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(token)


def reuse(key: Hashable, load: Callable[[], Module]) -> Module:
    """Return the frozen module that was loaded under this key for the same place, if it is still in use, else load it."""
    place = _PLACE.get()
    if place is None:
        return load()
    module = _LOADED.get((place, key))
    if module is None:
        module = _LOADED[place, key] = load()
    return module  # type: ignore[return-value]  # one key, one kind
