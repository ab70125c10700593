"""Prompts to draw, for post-training and for evaluation: a name or a file -> a list of `Prompt`.

    shapes-train, shapes-heldout   the offline domain (nitro_e.shapes), tasks in equal parts
    geneval-train                  GenEval's templates, none of its test prompts (nitro_e.geneval.prompts)
    geneval                        its 553 test prompts
    FILE.txt                       a prompt per line; empty lines are skipped
    FILE.jsonl                     a record per line with "prompt"; the whole record becomes `info`

Left out: weighting of prompts. List one twice, or concatenate `load_prompts` of several sources.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from nitro_e.config import ConfigError, did_you_mean
from nitro_e.geneval import prompts as geneval
from nitro_e.geneval.prompts import Objects
from nitro_e.shapes import scenes


class Prompt(NamedTuple):
    text: str
    info: dict  # the prompt's GenEval metadata, or {}


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Where prompts come from. A bare string in YAML is the source."""

    SHORTHAND: ClassVar[str] = "source"

    source: str  # a name of GENERATORS, or a path to a .txt or .jsonl file
    num: int | None = None  # to make (None = as in GENERATORS); of `geneval` and of files the first ones
    seed: int = 0  # of the prompts that are made
    objects: Objects = "all"  # geneval-train only: "seen" leaves 20 of the 80 classes to "unseen"

    def __post_init__(self) -> None:
        if self.objects != "all" and self.source != "geneval-train":
            raise ConfigError(f"objects: '{self.source}' has no such option; leave it out")
        if self.num is not None and self.num < 1:
            raise ConfigError(f"num must be at least 1, got {self.num}")
        if self.source not in GENERATORS and Path(self.source).suffix not in (".txt", ".jsonl"):
            raise ConfigError(
                f"source: '{self.source}' is neither a .txt or .jsonl file nor a known name"
                + did_you_mean(self.source, list(GENERATORS))
            )


def load_prompts(config: PromptsConfig) -> list[Prompt]:
    """All prompts of a source, in its order; a function of the config alone. ConfigError for a bad file."""
    if config.source in GENERATORS:
        generate, num = GENERATORS[config.source]
        records = generate(config, config.num or num)
    else:
        records = _read(Path(config.source).expanduser())[: config.num]
    return [Prompt(record["prompt"], record if len(record) > 1 else {}) for record in records]


def _shapes_train(config: PromptsConfig, num: int) -> list[dict]:
    return [scenes.metadata(scenes.scene(config.seed, "train", index).request) for index in range(num)]


GENERATORS: dict[
    str, tuple[Callable[[PromptsConfig, int], list[dict]], int]
] = {  # name -> records, default num
    "shapes-train": (_shapes_train, 6000),
    "shapes-heldout": (lambda config, num: scenes.heldout_prompts(num, config.seed), 600),
    "geneval-train": (lambda config, num: geneval.train_prompts(num, config.seed, config.objects), 50_000),
    "geneval": (lambda config, num: geneval.test_prompts()[:num], 553),
}


def _read(path: Path) -> list[dict]:
    if not path.is_file():
        raise ConfigError(f"prompts: file '{path}' does not exist")
    lines = [(number, line.strip()) for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise ConfigError(f"prompts: file '{path}' is empty; give a prompt per line")
    if path.suffix == ".txt":
        return [{"prompt": line} for _, line in lines]
    return [_record(line, f"{path}:{number}") for number, line in lines]


def _record(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"prompts: {where} is not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ConfigError(f'prompts: {where} has no "prompt"; write {{"prompt": "a photo of ..."}}')
    return record
