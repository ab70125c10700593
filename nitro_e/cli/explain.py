"""`nitro-e train --explain [KEY]`: every key of a recipe with its type, default, bounds and meaning.

All of it is read from the config dataclasses: the meaning of a key is the comment above its line or behind it, or
the first sentence of the class that holds the keys below it.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import tokenize
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, Union

from nitro_e.config import Bound, ConfigError, class_of_kind, did_you_mean, to_dict


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    name: str
    type: str
    default: str  # as YAML would say it; "required" where there is none
    bounds: str
    meaning: str
    kind: str = ""  # of the stage, where only one has this key

    def lines(self) -> str:
        """Two lines for a terminal: what may be written, and what it means."""
        about = ", ".join(
            part for part in (self.type, self.bounds, self.kind and f"kind: {self.kind}") if part
        )
        return f"{self.name} = {self.default}  ({about})\n    {self.meaning}"


def explain(config: type, wanted: str = "") -> str:
    """The keys of `config` that are `wanted` or below it; all of them for "". ConfigError for a key there is not."""
    keys = list(keys_of(config))
    found = [key for key in keys if not wanted or f"{key.name}.".startswith(f"{wanted}.")]
    if not found:
        raise ConfigError(
            f"unknown key '{wanted}'" + did_you_mean(wanted, sorted({key.name for key in keys}))
        )
    return "\n".join(key.lines() for key in found)


def keys_of(config: type, path: str = "", kind: str = "") -> Iterator[Key]:
    """Every key below a config dataclass, in the order of its fields; unions list the keys of each kind."""
    if "KINDS" in vars(config):  # the default kind stands for all; others are somebody's own
        config = class_of_kind(config, None)
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        key = field.metadata.get("key", field.name)
        if key is None:
            continue  # set in Python only
        name = f"{path}.{key}" if path else key
        hint, bounds = unwrap(hints[field.name])
        below = [part for part in members(hint) if dataclasses.is_dataclass(part)]
        about = meanings(config).get(field.name) or (first_sentence(below[0]) if below else "")
        optional = " or null" if type(None) in members(hints[field.name]) else ""
        about = re.sub(r"\bNone\b", "null", about)  # recipes are YAML
        yield Key(name, type_name(hint) + optional, default_of(field), bounds, about, kind)
        for part in below:
            yield from keys_of(part, name, f"{kind} {kind_of(part)}".strip() if len(below) > 1 else kind)
        item = item_of(hint)
        if item is not None:
            yield from keys_of(
                item, f"{name}[]" if typing.get_origin(hint) is not dict else f"{name}.NAME", kind
            )


def unwrap(hint: Any) -> tuple[Any, str]:
    """The bare type of an annotation, without None and bounds, and the bounds in words."""
    bounds: list[str] = []
    while True:
        if typing.get_origin(hint) is Annotated:
            bounds = [*(f"{b.words} {b.limit:,}" for b in hint.__metadata__ if isinstance(b, Bound)), *bounds]
            hint = hint.__origin__
        elif type(None) in members(hint) and len(members(hint)) == 2:
            (hint,) = [part for part in members(hint) if part is not type(None)]
        else:
            return hint, " and ".join(bounds)


def members(hint: Any) -> tuple[Any, ...]:
    """The parts of a union; a single type is one part."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def item_of(hint: Any) -> type | None:
    """The dataclass that a list or mapping holds."""
    for part in typing.get_args(hint) if typing.get_origin(hint) in (tuple, dict) else ():
        if dataclasses.is_dataclass(part):
            return part
    return None


def kind_of(config: type) -> str:
    return typing.get_args(typing.get_type_hints(config)["kind"])[0]


def type_name(hint: Any) -> str:
    """The type in words: float, list of int, one of a, b; the keys below it for a dataclass."""
    hint, _ = unwrap(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin is tuple:
        return "list of " + " or ".join(
            dict.fromkeys(type_name(part) for part in args if part is not Ellipsis)
        )
    if origin is dict:
        return f"mapping of names to {type_name(args[1])}"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_name(part) for part in args if part is not type(None)))
    return "keys" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", str(hint))


def default_of(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = to_dict(field.default)
    elif field.default_factory is not dataclasses.MISSING:
        value = to_dict(field.default_factory())
    else:
        return "required"
    if isinstance(value, dict):
        return "..." if value else "{}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


@cache
def meanings(config: type) -> dict[str, str]:
    """Field name -> its comment in the source, the lines above it and the one behind it joined; inherited ones too."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if dataclasses.is_dataclass(cls):
            found |= _own_meanings(cls)
    return found


def _own_meanings(cls: type) -> dict[str, str]:
    source = inspect.getsource(cls)
    comments = {
        token.start[0]: (token.string.lstrip("# ").strip(), token.line.strip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith("# fmt")
    }
    found = {}
    for node in ast.parse(inspect.cleandoc(source) if source[0] == " " else source).body[0].body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        words, line = [], node.lineno - 1
        while line in comments and comments[line][1]:
            words.insert(0, comments[line][0])
            line -= 1
        words += [comments[n][0] for n in range(node.lineno, node.end_lineno + 1) if n in comments]
        found[node.target.id] = " ".join(words)
    return found


def first_sentence(cls: type) -> str:
    text = " ".join((cls.__doc__ or "").split())
    return "" if text.startswith(f"{cls.__name__}(") else text.partition(". ")[0].rstrip(".")
