"""`config.yaml` of a run directory: the resolved recipe, and what later attempts change in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nitro_e.config import ConfigError, dump, flatten, load, parse_yaml, read_text, to_dict


def write_config(config: Any, folder: Path, resumed: bool) -> dict[str, list]:
    """Write `config.yaml`. Returns what a resume changes in it, {key: [before, now]}, after printing it.

    The config of the attempts before stays as `config.1.yaml`, `config.2.yaml`, ...
    """
    path = folder / "config.yaml"
    changed = {}
    if path.exists() and resumed:
        before, now = config_at(type(config), path), flatten(to_dict(config))
        changed = {
            key: [before.get(key), now.get(key)]
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        }
    if changed:
        number = 1
        while (kept := path.with_name(f"config.{number}.yaml")).exists():
            number += 1
        path.rename(kept)
        print(f"the config has changed since the last attempt (that one is kept as {kept.name}):")
        for key, (old, new) in changed.items():
            print(f"  {key} was {old!r}, is {new!r}")
    path.write_text(dump(config))
    return changed


def config_at(cls: type, path: Path) -> dict[str, Any]:
    """The keys of a written config of class `cls`, `a.b` -> value, with today's defaults for those it does not have."""
    try:
        return flatten(to_dict(load(cls, path)))
    except ConfigError:  # of a version with other keys
        return flatten(parse_yaml(read_text(path), str(path)))
