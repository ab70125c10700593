"""Manifests, which tell how shards were made, and the hash of plain data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from nitro_e.config import ConfigError, parse_json, read_text


def read_manifests(folders: set[Path]) -> dict[Path, dict]:
    """Read {shard path: its manifest line} from every manifest-*.jsonl in these folders."""
    entries = {}
    for folder in sorted(folders):
        for manifest in sorted(folder.glob("manifest-*.jsonl")):
            for number, line in enumerate(read_text(manifest).splitlines(), 1):
                entry = parse_record(line, f"{manifest}:{number}", MANIFEST)
                entries[(folder / entry["shard"]).resolve()] = {**entry, "manifest": manifest.name}
    return entries


def parse_record(text: str, where: str, types: dict[str, type]) -> dict:
    """Parse a line of a manifest or an entry of the journal; ConfigError if a disk or an editor has damaged it."""
    record = parse_json(text, where)
    if not isinstance(record, dict) or not all(type(record.get(key)) is kind for key, kind in types.items()):
        raise ConfigError(
            f"{where} is damaged: it has no {', '.join(types)}; copy it again, or delete it and make the shards again"
        )
    return record


MANIFEST = {"shard": str, "bytes": int, "samples": int, "sha256": str}


def digest(*parts: Any) -> str:
    """Hash plain data: the SHA-256 of its JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
