"""Leave out the samples that fail the conditions of a recipe (`data.where`).

Every json member is read once. What came out is kept in the user's cache, so that a run opens as fast as before. One
process of a machine does it. A sample without the key of a condition is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from nitro_e.config import ConfigError, environment_number
from nitro_e.data.catalog import Catalog, one_process
from nitro_e.data.conditions import Condition
from nitro_e.data.dataset import MappedFiles
from nitro_e.data.decode import BadSample, decode_info
from nitro_e.data.manifests import digest
from nitro_e.data.remote import cache_folder
from nitro_e.files import atomic_file
from nitro_e.record.progress import bar

CHUNK = 10_000  # samples whose json is read between two steps of the progress bar


def apply(catalog: Catalog, conditions: Sequence[tuple[Condition, ...]], names: Sequence[str]) -> list[str]:
    """Leave out the samples that fail the conditions of their source; returns a line for each source that has any.

    conditions, names: one per source. Raises ConfigError if a source keeps no sample.
    """
    if not any(conditions):
        return []
    totals = [int(sizes.sum()) for sizes in catalog.sizes]  # they tell whose samples are whose
    kind = digest(catalog.digest, totals, [[str(c) for c in part] for part in conditions])[:32]
    wanted = [bool(part) for part in conditions]
    verdicts = remembered(
        f"where-{kind}",
        lambda: scan(catalog, wanted, lambda source, info: _verdict(info, conditions[source]), "where"),
    )
    lines, start = [], 0
    for name, total, part in zip(names, totals, conditions):
        end = start + total
        if part and end > start:
            lines.append(_report(name, verdicts[start:end], part))
        start = end
    catalog.keep(verdicts == 0)
    if environment_number("RANK", 0) == 0:
        for line in lines:
            print(f"where: {line}", file=sys.stderr)
    return lines


def remembered(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the array of this name from the user's cache, or make it and keep it there; one process does it."""
    path = cache_folder() / "values" / f"{name}.npy"
    with one_process(name):
        if path.is_file():
            return np.load(path, allow_pickle=False)
        values = make()
        _keep(path, values)
        return values


def scan(
    catalog: Catalog, wanted: Sequence[bool], value: Callable[[int, dict], int], desc: str
) -> np.ndarray:
    """Compute `value(source, json)` of every sample of the wanted sources: (N,) uint8; of others it is 0."""
    values, files = np.zeros(len(catalog), np.uint8), MappedFiles(catalog.cache)
    edges = np.cumsum([0, *(int(sizes.sum()) for sizes in catalog.sizes)]).tolist()
    ranges = [
        (source, at, min(at + CHUNK, end))
        for source, (start, end) in enumerate(zip(edges[:-1], edges[1:]))
        for at in range(start if wanted[source] else end, end, CHUNK)
    ]
    for source, start, end in bar(ranges, desc=desc, unit="x 10,000 samples", brief=True):
        samples = np.arange(start, end)
        paths, entries = catalog.members("json", samples, catalog.shard_of(samples))
        for sample, path, (offset, size, _) in zip(samples.tolist(), paths, entries.tolist()):
            try:
                info = decode_info(files[path][offset : offset + size]) if offset else {}
            except BadSample:  # reported when it is read
                info = {}
            values[sample] = value(source, info)
    return values


def _verdict(info: dict, conditions: Sequence[Condition]) -> int:
    """Return 0 for a sample that is kept, 2k + 1 if it fails condition k, 2k + 2 if it lacks the key of it."""
    for number, condition in enumerate(conditions):
        holds = condition.holds(info)
        if not holds:
            return 2 * number + (2 if holds is None else 1)
    return 0


def _report(name: str, verdicts: np.ndarray, conditions: Sequence[Condition]) -> str:
    counts = np.bincount(verdicts, minlength=2 * len(conditions) + 1).tolist()
    reasons = []
    for number, condition in enumerate(conditions):
        failed, lacking = counts[2 * number + 1 : 2 * number + 3]
        reasons += [f"{failed:,} fail {condition}"] if failed else []
        reasons += [f"{lacking:,} have no '{condition.key}'"] if lacking else []
    line = f"{name}: {counts[0]:,} of {len(verdicts):,} samples kept" + "".join(f"; {x}" for x in reasons)
    if not counts[0]:
        raise ConfigError(f"where: {line}; relax the conditions, or add the values with `data pack --keep`")
    return line


def _keep(path: Path, verdicts: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            np.save(file, verdicts, allow_pickle=False)
    except OSError as error:
        print(
            f"what was read from json is not kept ({error}); set NITRO_E_CACHE to a writable folder",
            file=sys.stderr,
        )
