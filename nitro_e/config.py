"""Strict configuration: YAML and `key=value` overrides to frozen dataclasses, and back.

Every config class is a frozen, keyword-only dataclass that lives beside the code it configures; this module
only knows how to fill one from plain data and how to complain. There are no interpolations, no includes, no
defaults outside the dataclasses, and no import paths in YAML, but for rewards of your own (nitro_e.rewards.registry).
Nothing here imports torch.

A dataclass may declare two class variables that `from_dict` understands:
    PRESETS    name -> plain dict; `preset: NAME` in the data starts from that dict, other keys override it.
    SHORTHAND  a field name; a bare string in the data stands for `{SHORTHAND: string}`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """Something the user wrote is wrong; the message names the key, the value and the remedy."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to look at."""


def did_you_mean(word: str, options: Sequence[str]) -> str:
    """`", did you mean 'x'?"` for the nearest option, else the list of options."""
    options = [str(option) for option in options]
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f", did you mean '{near[0]}'?" if near else f" (known: {', '.join(options) or 'none'})"


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file into `cls`, after applying `a.b=value` overrides (values are YAML too)."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file '{path}' does not exist; the recipes are under configs/")
    try:
        data = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(data).__name__}")
    for override in overrides:
        apply_override(data, override)
    return from_dict(cls, data)


def apply_override(data: dict, override: str) -> None:
    """Set one `a.b.c=value` in nested plain data, in place. Strings on the way become their shorthand later."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}': expected key=value, for example engine.steps=1000")
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents):
        child = data.setdefault(parent, {})
        if not isinstance(child, dict):
            here = ".".join(parents[: depth + 1])
            if child is not None:
                raise ConfigError(
                    f"override '{override}': '{here}' is {child!r}, not a mapping; override '{here}' itself"
                )
            child = data[parent] = {}
        data = child
    try:
        data[leaf] = yaml.safe_load(value) if value else None
    except yaml.YAMLError:
        raise ConfigError(f"override '{override}': '{value}' is not a YAML value; quote it") from None


def from_dict(cls: type[T], data: Any, path: str = "") -> T:
    """Build dataclass `cls` from plain data; unknown keys, wrong types and missing fields raise ConfigError."""
    shorthand = getattr(cls, "SHORTHAND", None)
    if shorthand is not None and isinstance(data, str):
        data = {shorthand: data}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path or 'config'}: expected a mapping, got {data!r}")
    data = _expand_preset(cls, dict(data), path)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for key, value in data.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            parent = f"{path}." if path else ""
            raise ConfigError(
                f"unknown key '{where}'" + did_you_mean(where, [parent + name for name in fields])
            )
        values[key] = _coerce(hints[key], _complete(fields[key], value), where)
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"missing key '{path + '.' if path else ''}{name}' ({_type_name(hints[name])})")
    try:
        return cls(**values)
    except ConfigError as error:  # raised by __post_init__, which does not know where it stands
        message = str(error)
        raise ConfigError(
            f"{path}: {message}" if path and not message.startswith(path) else message
        ) from None


def to_dict(config: Any) -> Any:
    """The plain data (dict, list, scalars) that `from_dict` turns back into an equal object."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    return config


def dump(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=110)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: `a.b.c` -> value; lists are values."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, child in tree.items()
        for key, value in flatten(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _expand_preset(cls: type, data: dict, path: str) -> dict:
    presets = getattr(cls, "PRESETS", None)
    if presets is None or "preset" not in data:
        return data
    name = data.pop("preset")
    if name not in presets:
        raise ConfigError(f"{path}.preset: unknown preset '{name}'" + did_you_mean(str(name), list(presets)))
    return _merge(presets[name], data)


def _complete(field: dataclasses.Field, value: Any) -> Any:
    """Some fields have defaults of their own instead of their class's: what `value` leaves out comes from there."""
    make = field.default_factory
    if make is dataclasses.MISSING or isinstance(make, type) or not isinstance(value, Mapping):
        return value
    default = make()
    if not dataclasses.is_dataclass(default) or "preset" in value:
        return value
    default = to_dict(default)
    return value if value.get("kind", default.get("kind")) != default.get("kind") else _merge(default, value)


def _merge(base: Mapping, data: Mapping) -> dict:
    """`data` over `base`; mappings inside both are merged in the same way."""
    both = {key for key in data if isinstance(data[key], Mapping) and isinstance(base.get(key), Mapping)}
    return {**base, **data, **{key: _merge(base[key], data[key]) for key in both}}


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Convert one plain value to the annotated type, or say what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _coerce_union(args, value, where)
    if origin is Literal:
        if not any(type(value) is type(arg) and value == arg for arg in args):
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_coerce(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(value) != len(args):
            raise ConfigError(f"{where}: expected {len(args)} values, got {len(value)}: {value!r}")
        return tuple(_coerce(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        return {str(key): _coerce(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    return _coerce_scalar(hint, value, where)


def _coerce_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and not isinstance(value, bool):
        if isinstance(value, (int, float)):
            return float(value)
        try:
            return float(value)  # PyYAML reads 1e-4 as a string
        except (TypeError, ValueError):
            pass
    elif hint is int and not isinstance(value, bool):
        if isinstance(value, int):
            return value
        try:
            if float(value) == int(float(value)):
                return int(float(value))  # 1e5
        except (TypeError, ValueError, OverflowError):
            pass
    elif hint is bool and isinstance(value, bool):
        return value
    elif hint is str and isinstance(value, str):
        return value
    raise ConfigError(f"{where}: expected {_type_name(hint)}, got {value!r}")


def _coerce_union(args: tuple, value: Any, where: str) -> Any:
    if value is None:
        if type(None) in args:
            return None
        raise ConfigError(f"{where}: must not be empty")
    options = [arg for arg in args if arg is not type(None)]
    if len(options) == 1:
        return _coerce(options[0], value, where)
    if all(dataclasses.is_dataclass(option) for option in options):  # a union tagged by `kind`
        if any(isinstance(value, option) for option in options):
            return value
        tags = {typing.get_args(typing.get_type_hints(option)["kind"])[0]: option for option in options}
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if kind not in tags:
            raise ConfigError(f"{where}.kind: unknown kind {kind!r}" + did_you_mean(str(kind), list(tags)))
        return from_dict(tags[kind], value, where)
    for option in options:
        try:
            return _coerce(option, value, where)
        except ConfigError:
            continue
    raise ConfigError(
        f"{where}: expected {' or '.join(_type_name(option) for option in options)}, got {value!r}"
    )


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
