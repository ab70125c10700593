"""How every benchmark begins and ends: the machine, memory, a JSON file, and a comparison with an earlier one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nitro_e.config import ConfigError, parse_json, read_text
from nitro_e.record.environment import device_name, environment
from nitro_e.training.meters import memory_gb

NOT_FIGURES = ("machine", "settings", "difference", "batch")


def flags(parser: argparse.ArgumentParser) -> None:
    """--json and --against."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument(
        "--against", type=earlier_figures, metavar="FILE", help="compare with figures that --json wrote"
    )


def earlier_figures(name: str) -> dict[str, Any]:
    """Read what --json wrote, before anything is measured."""
    try:
        found = parse_json(read_text(Path(name)), name)
    except (ConfigError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not isinstance(found, dict) or not isinstance(found.get("machine"), dict):
        raise argparse.ArgumentTypeError(f"{name} was not written by --json of this command; write it anew")
    return found


def machine(device: str) -> dict[str, str | int]:
    """Describe the machine that is measured, and the code that measures."""
    here = environment()
    versions = {name: version for name, version in here["packages"].items() if version is not None}
    return {
        "device": device,
        "name": device_name(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "platform": here["platform"],
        "python": here["python"],
        "code": here["git"] or "installed",
        **versions,
    }


def finish(found: Mapping[str, Any], options: argparse.Namespace, device: str = "cpu") -> None:
    """Print the machine and the largest use of memory; write and compare as the flags say."""
    given = {key: value for key, value in vars(options).items() if key not in ("json", "against")}
    figures = {"machine": machine(device), **found, "memory_gb": round(memory_gb(torch.device(device)), 3)}
    figures["settings"] = given | found.get("settings", {})
    print("\n" + ", ".join(f"{key} {value}" for key, value in figures["machine"].items()))
    print(f"memory {figures['memory_gb']:.2f} GB at most")
    if options.against is not None:
        print("\n" + comparison(figures, options.against))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def comparison(now: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """Write every figure that both have, before and now, and what is different of machine, versions and settings."""
    # as JSON has them: a file knows lists and no tuples
    now = parse_json(json.dumps(now), "these figures")
    ours, theirs = ({**each["machine"], **each.get("settings", {})} for each in (now, before))
    changed = [f"{key} was {theirs.get(key)}, is {ours[key]}" for key in ours if ours[key] != theirs.get(key)]
    here, there = dict(numbers(now)), dict(numbers(before))
    lines = (
        [f"not the same: {'; '.join(changed)}"] if changed else ["the same machine, versions and settings"]
    )
    lines += ["| figure | before | now | now / before |", "|---|---|---|---|"]
    for name, value in here.items():
        if there.get(name):
            lines.append(f"| {name} | {there[name]:.4g} | {value:.4g} | {value / there[name]:.2f} |")
    alone = [len(set(one) - set(other)) for one, other in ((there, here), (here, there))]
    if any(alone):
        lines.append(
            f"not compared: {alone[0]} figures that only the earlier file has, {alone[1]} that are new"
        )
    return "\n".join(lines)


def numbers(found: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield every figure with a name made of the keys above it, or of the words in its row."""
    if isinstance(found, bool):
        return
    if isinstance(found, int | float):
        yield name, float(found)
    elif isinstance(found, Mapping):
        words = [str(value) for key, value in found.items() if isinstance(value, str) or key == "batch"]
        for key, value in found.items():
            if key not in NOT_FIGURES:
                yield from numbers(value, ", ".join(filter(None, [name, *words, key])))
    elif isinstance(found, list):
        rows = all(isinstance(item, Mapping) for item in found)
        for number, item in enumerate(found):
            yield from numbers(item, name if rows else f"{name} {number}")
