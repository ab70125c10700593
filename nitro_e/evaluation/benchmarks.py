"""Benchmarks by name: the prompts, the number of images of each, and what scores the images.

shapes       the held-out requests of the offline domain; its exact judge, strictly and by GenEval's rules
geneval      the 553 test prompts of GenEval; its verdict on detected objects
hpsv2        HPSv2's four styles of 800 prompts; HPSv2.1
imagereward  ImageReward's 100 prompts, 10 images each; ImageReward
pickscore    a file of prompts; PickScore
clipscore    a file of prompts; CLIPScore
dpg          DPG-Bench's 1,065 long prompts, 4 images each; a visual question answering model on its questions, also by
             category of question
parti        PartiPrompts by category and by challenge; the rewards that are named
emoji        the captions of pictures of concepts in styles; style, and rank of the true picture (rewards.retrieval)
fid, fd-dinov2, cmmd    the captions of real images; the distance to those images (evaluation.distances)

Prompts that the package does not hold are files that the reader names; `Benchmark.needs` says which.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from nitro_e.config import ConfigError, did_you_mean, parse_json, parse_yaml, read_text, to_dict
from nitro_e.data.prompts import Prompt, PromptsConfig, load_prompts, read_records
from nitro_e.evaluation.distances import DISTANCES
from nitro_e.evaluation.reference import Reference
from nitro_e.rewards import RewardConfig
from nitro_e.rewards.geneval.rules import Detection
from nitro_e.shapes.judge import find_objects

HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    name: str
    prompts: PromptsConfig | None = None
    per_prompt: int = 1  # images of each prompt
    rewards: tuple[RewardConfig, ...] = ()  # the scores, the most important one first
    # pixels (B, 3, H, W) -> the objects in each image, shown on the page
    see: Callable[[Tensor], list[list[Detection]]] | None = None
    # where the prompts are a file of the benchmark's own: what it is, and how it is read
    needs: str = ""
    read: Callable[[Path], list[Prompt]] | None = None
    whole: int | None = None  # prompts of the published benchmark
    group_by: tuple[str, ...] = ()  # keys of the prompts' records, for tables besides the one by task
    file: Path | None = None
    num: int | None = None  # of the file's prompts, the first ones
    reference: str | None = None  # real images, for a distance
    weights: str | None = None  # of the network behind a distance

    @property
    def lower_is_better(self) -> bool:
        return self.name in DISTANCES

    def load_prompts(self) -> list[Prompt]:
        """Load the prompts; ConfigError for a missing or bad file."""
        if self.prompts is not None:
            return load_prompts(self.prompts)
        if self.file is not None:
            if not self.file.exists():
                raise ConfigError(f"--prompts: '{self.file}' does not exist; give {self.needs}")
            found = (self.read or read_prompts)(self.file)
        else:
            assert self.reference is not None
            found = [Prompt(text, {}) for text in Reference(self.reference).prompts()]
        if self.lower_is_better:  # a distance has no tasks: it belongs to the whole set
            found = [Prompt(prompt.text, {}) for prompt in found]
        return found[: self.num]

    def shortfall(self, prompts: int) -> str:
        """Say what is missing to the published benchmark; empty if nothing is."""
        if self.whole is None:
            return ""
        images = BENCHMARKS[self.name].per_prompt
        parts = [f"{prompts:,} of its {self.whole:,} prompts"] if prompts != self.whole else []
        parts += [f"{self.per_prompt} of its {images} images each"] if self.per_prompt != images else []
        return f"not the whole benchmark: {', '.join(parts)}" if parts else ""

    def record(self) -> dict:
        """Make the entry of results.json."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {name: to_dict(value) for name, value in fields.items() if name in ("prompts", "rewards")}
        kept = {name: fields[name] for name in ("name", "per_prompt", "num", "reference", "weights")}
        return {**kept, **plain, "file": None if self.file is None else str(self.file)}


# ---- files of prompts


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of prompts: .txt, .jsonl, .tsv, or a .json list of texts or of objects with "prompt"."""
    records = _json_list(path) if path.suffix == ".json" else read_records(path, "--prompts")
    return [Prompt(record["prompt"], record if len(record) > 1 else {}) for record in records]


def _json_list(path: Path) -> list[dict]:
    entries = parse_json(read_text(path), f"--prompts: {path}")
    listed = entries if isinstance(entries, list) else []
    records = [{"prompt": entry} if isinstance(entry, str) else entry for entry in listed]
    if not records or not all(isinstance(r, dict) and isinstance(r.get("prompt"), str) for r in records):
        raise ConfigError(f'--prompts: {path} is no list of texts or of objects with "prompt"; write one')
    return records


def read_hpsv2(folder: Path) -> list[Prompt]:
    """Read HPSv2's styles, one of each in turn, so that the first prompts of a part are of all styles."""
    styles = []
    for style in HPSV2_STYLES:
        file = folder / f"{style}.json"
        if not file.is_file():
            raise ConfigError(f"--prompts: folder '{folder}' has no {file.name}; give {_HPSV2_FOLDER}")
        styles.append([Prompt(record["prompt"], {"tag": style}) for record in _json_list(file)])
    return [prompt for row in itertools.zip_longest(*styles) for prompt in row if prompt is not None]


def read_parti(path: Path) -> list[Prompt]:
    """Read PartiPrompts.tsv; the task of a prompt is its category."""
    records = read_records(path, "--prompts")
    if "category" not in records[0]:
        raise ConfigError(f"--prompts: {path} has no column 'Category'; give {_PARTI_FILE}")
    return [Prompt(record["prompt"], {**record, "tag": record["category"]}) for record in records]


def read_dpg(path: Path) -> list[Prompt]:
    """Read dpg_bench.csv, a row per question: prompts with their "questions", each with id, text and parents."""
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        wanted = {"item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language"}
        if not wanted <= set(table.fieldnames or ()):
            raise ConfigError(
                f"--prompts: {path} has no columns {', '.join(sorted(wanted))}; give {_DPG_FILE}"
            )
        items: dict[str, Prompt] = {}
        for line, row in enumerate(table, 2):
            try:
                parents = [int(parent) for parent in row["dependency"].split(",") if int(parent)]
                question = {
                    "id": int(row["proposition_id"]),
                    "text": row["question_natural_language"].strip(),
                    "parents": parents,
                    # "attribute - color (cat, red)"
                    "category": row["tuple"].split("(")[0].strip(),
                }
            except (ValueError, AttributeError, TypeError):
                raise ConfigError(
                    f"--prompts: {path}:{line} has no whole numbers as proposition_id and dependency; mend it"
                ) from None
            new = Prompt(row["text"].strip(), {"id": row["item_id"], "questions": []})
            items.setdefault(row["item_id"], new).info["questions"].append(question)
    return list(items.values())


_HPSV2_FOLDER = "the folder of anime.json, concept-art.json, paintings.json, photo.json (hub: zhwang/HPDv2)"
_PARTI_FILE = "PartiPrompts.tsv (github.com/google-research/parti)"
_DPG_FILE = "dpg_bench.csv (github.com/TencentQQGYLab/ELLA, folder dpg_bench)"
_ANY_FILE = "a .txt, .json, .jsonl or .tsv file of prompts"
_REFERENCE = "real images: a folder (then with --prompts), or captioned shards"


def _shapes_score(score: str, title: str) -> RewardConfig:
    return RewardConfig(name="shapes", label=title, options={"score": score}, batch_size=256)


BENCHMARKS = {
    found.name: found
    for found in (
        Benchmark(
            name="shapes",
            prompts=PromptsConfig(source="shapes-heldout", num=600),
            rewards=(_shapes_score("strict", "strict"), _shapes_score("geneval", "GenEval")),
            see=find_objects,
        ),
        Benchmark(
            name="geneval",
            prompts=PromptsConfig(source="geneval"),
            per_prompt=4,
            whole=553,
            rewards=(RewardConfig(name="geneval", label="GenEval", options={"mode": "official"}),),
        ),
        Benchmark(
            name="hpsv2",
            needs=_HPSV2_FOLDER,
            read=read_hpsv2,
            whole=3200,
            rewards=(RewardConfig(name="hpsv2.1"),),
        ),
        Benchmark(
            name="imagereward",
            needs="ImageReward's benchmark-prompts.json",
            per_prompt=10,
            whole=100,
            rewards=(RewardConfig(name="imagereward"),),
        ),
        Benchmark(name="pickscore", needs=_ANY_FILE, rewards=(RewardConfig(name="pickscore"),)),
        Benchmark(name="clipscore", needs=_ANY_FILE, rewards=(RewardConfig(name="clipscore"),)),
        Benchmark(
            name="dpg",
            needs=_DPG_FILE,
            read=read_dpg,
            per_prompt=4,
            whole=1065,
            rewards=(RewardConfig(name="dpg"),),
        ),
        Benchmark(
            name="emoji",
            prompts=PromptsConfig(source="emoji-heldout"),
            rewards=tuple(
                RewardConfig(name="retrieval", label=label, options={"score": score}, batch_size=64)
                for label, score in (
                    ("style and first 10", "both"),
                    ("style", "style"),
                    ("first 10", "top10"),
                    ("1/rank", "reciprocal_rank"),
                    ("novelty", "novelty"),
                )
            ),
        ),
        Benchmark(name="parti", needs=_PARTI_FILE, read=read_parti, whole=1632, group_by=("challenge",)),
        *(Benchmark(name=name, needs=_ANY_FILE) for name in DISTANCES),
    )
}


def benchmark(
    name: str,
    num: int | None = None,
    per_prompt: int | None = None,
    rewards: Sequence[str] = (),
    path: str | None = None,
    options: Sequence[str] = (),
    prompts: str | None = None,
    reference: str | None = None,
) -> Benchmark:
    """One of BENCHMARKS, or a file of prompts with rewards by name.

    num, per_prompt: numbers of prompts, and of images of each, in place of the benchmark's; path: of the rewards'
    weights; options: "key=value", given to every reward; prompts: the benchmark's own file; reference: the real
    images of a distance.
    """
    if per_prompt is not None and not 1 <= per_prompt <= 10_000:
        raise ConfigError(f"--per-prompt must be at least 1 and at most 10000, got {per_prompt}")
    if num is not None and num < 1:
        raise ConfigError(f"--num must be at least 1, got {num}")
    if name in BENCHMARKS:
        found = _with_files(BENCHMARKS[name], prompts, reference)
        if rewards and (found.rewards or found.lower_is_better):
            raise ConfigError(f"--reward: '{name}' has its own rewards; name some only for files of prompts")
    elif Path(name).suffix in (".txt", ".jsonl"):
        found = Benchmark(name=Path(name).stem, prompts=PromptsConfig(source=name))
    else:
        raise ConfigError(f"unknown benchmark '{name}'" + did_you_mean(name, [*BENCHMARKS, "FILE.jsonl"]))
    scores = found.rewards or tuple(RewardConfig(name=reward) for reward in rewards)
    if not scores and not found.lower_is_better:
        raise ConfigError(f"'{name}' says not what scores the images: name rewards, --reward NAME")
    if options and found.lower_is_better:
        raise ConfigError(f"--reward-option: '{name}' has no options; leave it out")
    given = dict(map(_option, options))
    return dataclasses.replace(
        found,
        prompts=found.prompts and dataclasses.replace(found.prompts, num=num or found.prompts.num),
        num=num,
        per_prompt=per_prompt or found.per_prompt,
        weights=path if found.lower_is_better else None,
        rewards=tuple(
            dataclasses.replace(reward, path=path or reward.path, options={**reward.options, **given})
            for reward in scores
        ),
    )


def _with_files(found: Benchmark, prompts: str | None, reference: str | None) -> Benchmark:
    """Fill in the files that a benchmark needs; ConfigError for one that is missing or not wanted."""
    if prompts is not None and not found.needs:
        raise ConfigError(f"--prompts: '{found.name}' has its own prompts; leave it out")
    if reference is not None and not found.lower_is_better:
        raise ConfigError(f"--reference: '{found.name}' compares with no images; leave it out")
    if found.lower_is_better and reference is None:
        raise ConfigError(f"'{found.name}' needs --reference, {_REFERENCE}")
    if found.needs and prompts is None and reference is None:
        raise ConfigError(f"'{found.name}' needs --prompts, {found.needs}")
    file = None if prompts is None else Path(prompts).expanduser()
    return dataclasses.replace(found, file=file, reference=reference)


def _option(text: str) -> tuple[str, bool | int | float | str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--reward-option '{text}': expected KEY=VALUE")
    option = parse_yaml(value, f"--reward-option '{text}'")
    if not isinstance(option, (bool, int, float, str)):
        raise ConfigError(f"--reward-option '{text}': expected a number, true, false or text as the value")
    return key, option


def describe(objects: Sequence[Detection]) -> str:
    """Put detected objects into words: "red circle, blue ?"."""
    return ", ".join(f"{thing.color or '?'} {thing.name or '?'}" for thing in objects) or "nothing"
