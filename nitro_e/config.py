"""Strict configuration: YAML and `key=value` overrides to frozen dataclasses, and back.

Every config class is a frozen, keyword-only dataclass that lives beside the code it configures; this module
only knows how to fill one from plain data and how to complain. There are no interpolations, no includes, no
defaults outside the dataclasses, and no import paths in YAML, but for rewards and models of your own.
Nothing here imports torch. The text files that people write (YAML, JSON, prompts) are read here too.

Bounds stand on the key's own line, and hold however the object is made (its class inherits from `Config`):
    steps: Annotated[int, Ge(1)]
    clip: Annotated[float, Gt(0), "a large value switches clipping off"]      # a string is the remedy
Numbers are finite everywhere, and whole ones fit into 64 bits.

A dataclass may declare what `from_dict` understands:
    PRESETS    name -> plain dict; `preset: NAME` in the data starts from that dict, other keys override it.
    SHORTHAND  a key; a bare string or number in the data stands for `{SHORTHAND: value}`.
    KINDS      name -> "module:class"; the subclass that `kind` names is made, by default the first. See `class_of_kind`.
    derive     a class method that fills in keys which follow from others.
A field is read and written under its own name, or under the `key` of its metadata: `metadata={"key": "global"}` for
a word that Python keeps to itself, `metadata={"key": None}` for what is set in Python only and is no key of recipes.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import json
import math
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """Something the user wrote is wrong; the message names the key, the value and the remedy."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to look at."""


def did_you_mean(word: str, options: Sequence[str]) -> str:
    """Return `", did you mean 'x'?"` for the nearest option, else the list of options."""
    options = [str(option) for option in options]
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f", did you mean '{near[0]}'?" if near else f" (known: {', '.join(options) or 'none'})"


# ---- bounds


@dataclasses.dataclass(frozen=True)
class Bound:
    """A limit of a number, declared in its annotation."""

    limit: float
    words: ClassVar[str]
    holds: ClassVar[Callable[[Any, Any], bool]]


class Ge(Bound):
    words, holds = "at least", operator.ge


class Gt(Bound):
    words, holds = "above", operator.gt


class Le(Bound):
    words, holds = "at most", operator.le


class Lt(Bound):
    words, holds = "below", operator.lt


Fraction = Annotated[float, Ge(0), Le(1)]
Seed = Annotated[int, Ge(0)]


class Config:
    """Base of the config dataclasses: every object, however it is made, keeps the bounds in its annotations.

    A class with rules across its fields has a `__post_init__` of its own, which calls this one first.
    """

    OPTIONS: ClassVar[bool] = False  # the fields are options of a command: messages call them --so
    RENAMED: ClassVar[Mapping[str, str]] = {}  # a key of older recipes -> what to write instead
    ALIASES: ClassVar[Mapping[str, Mapping[str, str]]] = {}  # key -> older names of its values -> today's

    def __post_init__(self) -> None:
        cls: Any = type(self)  # a dataclass, as every subclass is
        hints = _annotations(cls)
        for field in dataclasses.fields(cls):
            where = f"--{field.name.replace('_', '-')}" if self.OPTIONS else key_of(field) or field.name
            check_bounds(hints[field.name], getattr(self, field.name), where)

    @classmethod
    def derive(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Plain data -> the same with the keys that follow from others. `data` itself is not changed."""
        return data


@functools.cache
def _annotations(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def key_of(field: dataclasses.Field) -> str | None:
    """The name of a field in recipes; None if it is no key of recipes."""
    return field.metadata.get("key", field.name)


def check_bounds(hint: Any, value: Any, where: str, bounds: tuple = ()) -> None:
    """ConfigError if a number in `value` is not finite, or outside the bounds that `hint` declares for it."""
    while typing.get_origin(hint) is Annotated:
        bounds, hint = (*hint.__metadata__, *bounds), hint.__origin__
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return
    if origin in (Union, types.UnionType):
        options = [arg for arg in args if arg is not type(None)]
        check_bounds(options[0] if len(options) == 1 else Any, value, where, bounds)
    elif isinstance(value, (tuple, list)):
        hints = [Any] * len(value)
        if origin is tuple:
            hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        for index, (part, item) in enumerate(zip(hints, value)):
            check_bounds(part, item, f"{where}[{index}]")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_bounds(args[1] if origin is dict else Any, item, f"{where}.{key}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        _check_number(bounds, value, where)


def _check_number(bounds: tuple, value: int | float, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number, got {value}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where} must fit into 64 bits, got a number of {value.bit_length()} bits")
    remedy = "".join(f"; {hint}" for hint in bounds if isinstance(hint, str))
    for bound in bounds:
        if isinstance(bound, Bound) and not type(bound).holds(value, bound.limit):
            raise ConfigError(f"{where} must be {bound.words} {bound.limit}, got {value}{remedy}")


def check_file_name(name: str, where: str) -> None:
    """ConfigError if `name` cannot be that of a folder of its own, inside the one it is put into."""
    if (
        not name.isprintable()
        or name != name.strip()
        or name.startswith(".")
        or not 0 < len(name.encode(errors="replace")) <= 200
        or set(name) & set("/\\")
    ):
        raise ConfigError(
            f"{where} {name!r} cannot be a folder's name: use up to 200 letters, digits, '-', '_' and the like, "
            "no '/' and no '.' in front"
        )


def check_characters(text: str, where: str) -> str:
    """Return `text`; ConfigError if it has halves of characters, which neither files nor tokenizers take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: {text[error.start]!r} at character {error.start} is no character; write it as UTF-8"
        ) from None
    return text


def environment_number(name: str, default: int) -> int:
    """Read a whole number from an environment variable, such as RANK and WORLD_SIZE, which launchers set."""
    given = os.environ.get(name, str(default))
    if not given.isdecimal():
        raise ConfigError(f"the environment has {name}={given!r}; set it to a whole number, or unset it")
    return int(given)


# ---- text files that people write


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file. An OSError comes through, as it names the file itself."""
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not a UTF-8 text file (byte {error.start} is 0x{error.object[error.start]:02x}); "
            "save it as UTF-8, or give another file"
        ) from None


def parse_json(text: str, where: str) -> Any:
    """Parse JSON; ConfigError, beginning with `where`, for anything else."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where} is not valid JSON: nested too deeply") from None


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML; ConfigError, beginning with `where`, for anything else and for YAML that is not what it looks like."""
    try:
        return _unshared(yaml.load(text, _StrictLoader))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of dates such as 2024-13-45
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}; quote text") from None
    except RecursionError:
        raise ConfigError(f"{where} is not valid YAML: nested too deeply") from None


def _unshared(value: Any) -> Any:
    """Copy plain data so that what YAML aliases shared is apart: an override of one place leaves the others."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


class _StrictLoader(yaml.SafeLoader):
    """Refuses keys that are given twice, of which YAML would take the last, and numbers that are others in YAML 1.1."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, (key.tag, str(key.value))
            if name in lines:
                raise ConfigError(
                    f"key '{key.value}' is given twice, on lines {lines[name]} and {line}; keep one"
                )
            lines[name] = line
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = node.value
        number = (
            self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)
        )
        if ":" in text or re.fullmatch(r"[-+]?0[0-7_]+", text) and number != 0:
            kind = "to the base of 60" if ":" in text else "octal"
            raise ConfigError(f"{text} would be read as {number} ({kind}); write {number}, or quote the text")
        return number


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_number)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_number)


# ---- plain data and dataclasses


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file into `cls`, after applying `a.b=value` overrides (values are YAML too)."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"config file '{path}' does not exist or is no file; the recipes are under configs/"
        )
    data = parse_yaml(read_text(path), str(path)) or {}
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
    data[leaf] = parse_yaml(value, f"override '{override}'") if value else None


def is_overridden(key: str, overrides: Sequence[str]) -> bool:
    """Tell whether overrides set this key, a part of it, or what it is a part of."""
    names = [override.partition("=")[0] for override in overrides]
    return any(f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.") for name in names)


def from_dict(cls: type[T], data: Any, path: str = "") -> T:
    """Build dataclass `cls` from plain data; unknown keys, wrong types and missing fields raise ConfigError."""
    shorthand = getattr(cls, "SHORTHAND", None)
    if shorthand is not None and isinstance(data, (str, int, float)) and not isinstance(data, bool):
        data = {shorthand: data}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path or 'config'}: expected a mapping, got {data!r}")
    if "KINDS" in vars(cls):
        cls = class_of_kind(cls, data.get("kind"), f"{path}.kind" if path else "kind")
    data = _expand_preset(cls, dict(data), path)
    if issubclass(cls, Config):
        data = cls.derive(data)
    parent = f"{path}." if path else ""
    hints = typing.get_type_hints(cls)
    renamed, aliases = getattr(cls, "RENAMED", {}), getattr(cls, "ALIASES", {})
    fields = _fields(cls)
    values = {}
    for key, value in data.items():
        where = f"{parent}{key}"
        if key in renamed:
            raise ConfigError(f"key '{where}' is of an older version; write {parent}{renamed[key]} instead")
        if key not in fields:
            raise ConfigError(
                f"unknown key '{where}'" + did_you_mean(where, [parent + name for name in fields])
            )
        field = fields[key]
        if isinstance(value, str):
            value = aliases.get(key, {}).get(value, value)
        values[field.name] = _coerce(hints[field.name], _complete(field, value), where)
    for key, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ConfigError(f"missing key '{parent}{key}' ({_type_name(hints[field.name])})")
    try:
        return cls(**values)
    except ConfigError as error:  # raised by __post_init__, which does not know where it stands
        message = str(error)
        if path and not message.startswith(path):
            about_a_key = re.split(r"\W", message, maxsplit=1)[0] in fields
            message = f"{path}.{message}" if about_a_key else f"{path}: {message}"
        raise ConfigError(message) from None


def class_of_kind(base: type[T], kind: Any, where: str = "kind", imports: bool = True) -> type[T]:
    """Return the subclass of `base` that `kind` names: a key of base.KINDS (None: the first), or "module:name" of yours.

    Only subclasses of `base` are taken, so a recipe can name nothing else. `imports=False` is for data that may be a
    stranger's: of modules that are not ours it knows only those that the program has imported.
    """
    known: Mapping[str, str] = vars(base)["KINDS"]
    kind = next(iter(known)) if kind is None else kind
    if not isinstance(kind, str) or not (kind in known or re.fullmatch(r"[\w.]+:\w+", kind)):
        raise ConfigError(
            f"{where}: unknown kind {kind!r}" + did_you_mean(str(kind), [*known, "module:name"])
        )
    module, _, name = known.get(kind, kind).partition(":")
    if not imports and kind not in known and module not in sys.modules:
        raise ConfigError(f"{where}: '{kind}' is code of somebody's own; import {module} before, in Python")
    if kind not in known and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for yours, whichever script is running
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ConfigError(
            f"{where}: '{kind}': cannot import '{module}' ({error}); put {module}.py into the directory you start "
            "from, or install it"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigError(f"{where}: '{kind}' is no subclass of {base.__module__}.{base.__name__}")
    return cls


def to_dict(config: Any) -> Any:
    """Return the plain data (dict, list, scalars) that `from_dict` turns back into an equal object."""
    if dataclasses.is_dataclass(config):
        return {key: to_dict(getattr(config, field.name)) for key, field in _fields(config).items()}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_dict(value) for value in config]
    return config


def dump(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=110)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one: `a.b.c` -> value; lists are values."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, child in tree.items()
        for key, value in flatten(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _fields(cls: Any) -> dict[str, dataclasses.Field]:
    """The fields of a dataclass by their keys in recipes."""
    return {key: field for field in dataclasses.fields(cls) if (key := key_of(field)) is not None}


def _expand_preset(cls: type, data: dict, path: str) -> dict:
    presets = getattr(cls, "PRESETS", None)
    if presets is None or "preset" not in data:
        return data
    name = data.pop("preset")
    if not isinstance(name, str) or name not in presets:
        raise ConfigError(f"{path}.preset: unknown preset '{name}'" + did_you_mean(str(name), list(presets)))
    return _merge(presets[name], data)


def _complete(field: dataclasses.Field, value: Any) -> Any:
    """Fill in what `value` leaves out from the default of the field, where that is not simply its class's."""
    make = field.default_factory
    if make is dataclasses.MISSING or isinstance(make, type) or not isinstance(value, Mapping):
        return value
    default = make()
    if not dataclasses.is_dataclass(default) or "preset" in value:
        return value
    default = to_dict(default)
    return value if value.get("kind", default.get("kind")) != default.get("kind") else _merge(default, value)


def _merge(base: Mapping, data: Mapping) -> dict:
    """Lay `data` over `base`; mappings inside both are merged in the same way."""
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
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    return _coerce_scalar(hint, value, where)


def _coerce_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)  # PyYAML reads 1e-4 as a string
        except (TypeError, ValueError, OverflowError):
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
        return check_characters(value, where)
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
        tags = {
            typing.get_args(hints["kind"])[0]: option
            for option in options
            if "kind" in (hints := typing.get_type_hints(option))
        }
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if not isinstance(kind, str) or kind not in tags:
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
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
