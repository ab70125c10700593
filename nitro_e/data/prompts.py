"""Prompts to sample, for post-training and for evaluation: a name or a file gives a list of `Prompt`.

    shapes-train, shapes-heldout   the offline domain (nitro_e.shapes), tasks in equal parts
    geneval-train                  GenEval's templates, none of its test prompts (nitro_e.rewards.geneval.generator)
    geneval                        its 553 test prompts
    emoji-train, emoji-heldout     captions of configs/emoji: 6,894 of training, 463 of cells it never shows
    FILE.txt                       a prompt per line; empty lines are skipped
    FILE.jsonl                     a record per line with "prompt"; the whole record becomes `info`
    FILE.tsv                       a table with a column "Prompt", such as PartiPrompts
    FILE.tar                       a webdataset shard: the captions (txt), with the json member as `info`

Left out: weighting of prompts; `num` of each of several sources is the way to mix them.
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

from nitro_e.config import (
    Config,
    ConfigError,
    Ge,
    Le,
    Seed,
    check_characters,
    did_you_mean,
    parse_json,
    read_text,
)
from nitro_e.files import EMOJI
from nitro_e.rewards.geneval import generator as geneval
from nitro_e.rewards.geneval.generator import Objects
from nitro_e.shapes import scenes

FILES = (".txt", ".jsonl", ".tsv", ".tar")


class MissingPrompts(ConfigError):
    """A file of prompts that is named is not there (yet)."""


class Prompt(NamedTuple):
    text: str
    info: dict  # the prompt's GenEval metadata, or {}


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(Config):
    """Says where prompts come from. A bare string in YAML is the source."""

    SHORTHAND: ClassVar[str] = "source"

    # names of GENERATORS, paths to .txt, .jsonl, .tsv or .tar files; several are concatenated
    source: str | tuple[str, ...]
    # how many of each source: to make, or the first of `geneval` and files; null: all, or as in GENERATORS
    num: Annotated[int, Ge(1), Le(10_000_000)] | None = None
    seed: Seed = 0  # of the prompts that are made
    objects: Objects = "all"  # geneval-train only: "seen" leaves 20 of the 80 classes to "unseen"

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objects != "all" and "geneval-train" not in self.sources:
            raise ConfigError(f"objects: '{self.source}' has no such option; leave it out")
        if not self.sources:
            raise ConfigError("source is empty; name one")
        for source in self.sources:
            if source not in GENERATORS and Path(source).suffix not in FILES:
                raise ConfigError(
                    f"source: '{source}' is neither a .txt, .jsonl, .tsv or .tar file nor a known name"
                    + did_you_mean(source, list(GENERATORS))
                )


def load_prompts(config: PromptsConfig) -> list[Prompt]:
    """Load the prompts of all sources, in order: a function of the config alone. ConfigError for a bad file."""
    records = [record for source in config.sources for record in _records(source, config)]
    return [Prompt(record["prompt"], record if len(record) > 1 else {}) for record in records]


def _records(source: str, config: PromptsConfig) -> list[dict]:
    if source in GENERATORS:
        generate, num = GENERATORS[source]
        return generate(config, config.num or num)
    return read_records(source)[: config.num]


def _shapes_train(config: PromptsConfig, num: int) -> list[dict]:
    return [scenes.metadata(scenes.scene(config.seed, "train", index).request) for index in range(num)]


def _emoji(config: PromptsConfig, num: int, shown: bool) -> list[dict]:
    """Read the captions of cells that training shows, or of those it does not, in their order; the task is the split."""
    records = read_records(EMOJI / "prompts.tsv")
    chosen = [record for record in records if (record["split"] == "train") == shown]
    return [{**record, "tag": record["split"]} for record in chosen[:num]]


Generator = tuple[Callable[[PromptsConfig, int], list[dict]], int]  # records, default number
GENERATORS: dict[str, Generator] = {
    "shapes-train": (_shapes_train, 6000),
    "shapes-heldout": (lambda config, num: scenes.heldout_prompts(num, config.seed), 600),
    "geneval-train": (lambda config, num: geneval.train_prompts(num, config.seed, config.objects), 50_000),
    "geneval": (lambda config, num: geneval.test_prompts()[:num], 553),
    "emoji-train": (partial(_emoji, shown=True), 6894),
    "emoji-heldout": (partial(_emoji, shown=False), 463),
}


def read_records(path: str | Path, key: str = "prompts") -> list[dict]:
    """The records of a prompts file, each with "prompt"; "-" is standard input. ConfigError for a bad file.

    .jsonl has a JSON object per line, .tsv a header that names the columns (PartiPrompts), anything else a prompt per
    line. Lines on standard input that begin with "{" are JSON.
    """
    if str(path) == "-":
        text, name, suffix = sys.stdin.read(), "standard input", ""
        suffix = ".jsonl" if text.lstrip().startswith("{") else ".txt"
    else:
        path = Path(path).expanduser()
        if not path.is_file():
            raise MissingPrompts(f"{key}: file '{path}' does not exist or is no file")
        if path.suffix == ".tar":
            return _captions(path, key)
        text, name, suffix = read_text(path), str(path), path.suffix
    lines = [(number, line.strip("\r\n")) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"{key}: {name} is empty; give a prompt per line")
    if suffix == ".jsonl":
        return [_record(line, f"{name}:{number}", key) for number, line in lines]
    if suffix == ".tsv":
        return _columns(lines, name, key)
    return [{"prompt": check_characters(line.strip(), f"{key}: {name}:{number}")} for number, line in lines]


def _captions(path: Path, key: str) -> list[dict]:
    """Records of a shard, in its order: each sample's txt as "prompt", and what its json holds."""
    found: dict[str, dict] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name, _, kind = member.name.rpartition(".")
                content = tar.extractfile(member) if kind in ("txt", "json") else None
                if content is None:
                    continue
                text = content.read().decode("utf-8")
                record = (
                    {"prompt": text.strip()} if kind == "txt" else parse_json(text, f"{key}: {path}: {name}")
                )
                found.setdefault(name, {}).update(record)
    except (tarfile.TarError, UnicodeDecodeError, OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {path} is no whole webdataset shard ({error}); give another") from error
    records = [
        _checked(record, f"{key}: {path}: {name}") for name, record in found.items() if record.get("prompt")
    ]
    if not records or len(records) < len(found):
        raise ConfigError(
            f"{key}: {path}: {len(found) - len(records)} of {len(found)} samples have no caption; "
            "give each a KEY.txt"
        )
    return records


def _columns(lines: list[tuple[int, str]], name: str, key: str) -> list[dict]:
    """Records of a table whose first line names its columns."""
    names = [column.strip().lower() for column in lines[0][1].split("\t")]
    if "prompt" not in names:
        raise ConfigError(f"{key}: {name} has no column 'Prompt' (it has {', '.join(names)}); name one so")
    records = []
    for number, line in lines[1:]:
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != len(names):
            raise ConfigError(
                f"{key}: {name}:{number} has {len(cells)} columns, the header has {len(names)}; mend it"
            )
        records.append(_checked(dict(zip(names, cells)), f"{key}: {name}:{number}"))
    return records


def _record(line: str, where: str, key: str) -> dict:
    record = parse_json(line, f"{key}: {where}")
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ConfigError(f'{key}: {where} has no "prompt"; write {{"prompt": "a photo of ..."}}')
    return _checked(record, f"{key}: {where}")


def _checked(record: dict, where: str) -> dict:
    check_characters(record["prompt"], where)
    if not isinstance(record.get("negative_prompt", ""), str):
        raise ConfigError(f"{where}: negative_prompt is {record['negative_prompt']!r}; write text")
    seed = record.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= 2**62:
        raise ConfigError(f"{where}: seed is {seed!r}; write a whole number from 0 to 2^62")
    return record
