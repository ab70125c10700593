"""Conditions on what the json members say: `where: {aesthetic: ">= 5.0", language: "== en"}` in a recipe.

A condition is a comparison and a value; nothing is evaluated. Numbers compare as numbers, also those that json holds as
text; anything else knows == and != only. Dots reach into objects. Left out: several keys in one condition, and "or".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nitro_e.config import ConfigError

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
}


@dataclass(frozen=True)
class Condition:
    """Compares one value of a sample's json."""

    key: str
    comparison: str
    value: float | str

    def __str__(self) -> str:
        return f"{self.key} {self.comparison} {self.value}"

    def holds(self, info: dict) -> bool | None:
        """Tell whether a sample meets the condition; None if it has no such value."""
        found = look_up(info, self.key)
        if isinstance(self.value, str):
            found = str(found).lower() if isinstance(found, bool) else found
            return None if found is None else COMPARISONS[self.comparison](str(found), self.value)
        number = as_number(found)
        return None if number is None else COMPARISONS[self.comparison](number, self.value)


def parse(where: Mapping[str, str], name: str = "where") -> tuple[Condition, ...]:
    """Read conditions; raises ConfigError, which names the key, for what is none."""
    conditions = []
    for key, text in where.items():
        match = re.fullmatch(r"\s*(>=|<=|==|!=|>|<)\s*(\S.*?)\s*", text)
        if match is None:
            raise ConfigError(
                f'{name}.{key}: {text!r} is no comparison; write for example ">= 5.0" or "== photo"'
            )
        comparison, value = match.groups()
        number = as_number(value)
        if number is None and comparison not in ("==", "!="):
            raise ConfigError(f"{name}.{key}: {comparison} compares numbers, got {value!r}; use == or !=")
        conditions.append(Condition(key, comparison, value if number is None else number))
    return tuple(conditions)


def as_number(value: Any) -> float | None:
    """Return a number, also one that is written as text; None for anything else, NaN included."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if number == number else None


def look_up(info: dict, key: str) -> Any:
    """Look up `key`, or info["a"]["b"] for "a.b"; None where there is none."""
    if key in info:
        return info[key]
    value: Any = info
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
