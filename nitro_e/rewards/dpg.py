"""DPG-Bench's score (Hu et al. 2024, arXiv:2403.05135): a model answers yes/no questions about the image.

A question counts when its answer is yes and its parents count ("is there a cat?" before "is the cat black?"). The score
of an image is the share of its questions that count. By category of question, such as "attribute" and "attribute -
color", every yes counts, whatever the parents, as in the authors' table. The published numbers come from mPLUG-large,
which transformers does not have; this is BLIP, so compare with figures of the same answering model only.

Different from the authors' script: it leaves out the first question of the file, and its table by category takes the
last image of a prompt alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nitro_e import files
from nitro_e.config import ConfigError

REPOSITORY = "Salesforce/blip-vqa-capfilt-large"
WANTED = (*files.TRANSFORMER, *files.TOKENIZER, "preprocessor_config.json")
ANSWER_TOKENS = 10


class DPG(nn.Module):
    """Share of a prompt's questions that are answered with yes. `path`: a BlipForQuestionAnswering with its processor."""

    def __init__(
        self,
        path: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_questions: int = 32,
    ) -> None:
        super().__init__()
        self.batch_questions = batch_questions
        # of each image of the last call: the questions that do not count, and (yes, questions) by kind of category
        self.said: list[str] = []
        self.counts: list[dict[str, dict[str, tuple[int, int]]]] = []
        self.model, self.processor = files.load(
            "reward 'dpg'", "path", path or REPOSITORY, lambda folder: _load(folder, dtype), WANTED, revision
        )

    def forward(self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict]) -> Tensor:
        self.said, self.counts, scores = [], [], []
        for image, record in zip(pixels, info):
            questions = record.get("questions")
            if not questions:
                raise ConfigError(
                    "reward 'dpg': a prompt has no \"questions\"; give dpg_bench.csv with `nitro-e evaluate dpg --prompts`"
                )
            yes = [
                answer == "yes" for answer in self.answer(image, [question["text"] for question in questions])
            ]
            right = counting(questions, yes)
            self.said.append("; ".join(f"no: {q['text']}" for q, good in zip(questions, right) if not good))
            self.counts.append(by_category(questions, yes))
            scores.append(sum(right) / len(right))
        return torch.tensor(scores)  # (B,)

    def answer(self, pixels: Tensor, questions: Sequence[str]) -> list[str]:
        """Answer questions on one image (3, H, W) in -1..1, in lower case."""
        image = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        device, answers = self.model.device, []
        for start in range(0, len(questions), self.batch_questions):
            some = list(questions[start : start + self.batch_questions])
            batch = self.processor(
                images=[image] * len(some), text=some, return_tensors="pt", padding=True
            ).to(device)
            batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
            tokens = self.model.generate(**batch, max_new_tokens=ANSWER_TOKENS)
            answers += self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [answer.strip().lower() for answer in answers]


def counting(questions: Sequence[dict], yes: Sequence[bool]) -> list[bool]:
    """Tell for each question whether it counts; in their order, and a parent that is not there forbids nothing."""
    counts = {question["id"]: answer for question, answer in zip(questions, yes)}
    for question in questions:
        counts[question["id"]] &= all(counts.get(parent, True) for parent in question["parents"])
    return [counts[question["id"]] for question in questions]


def by_category(questions: Sequence[dict], yes: Sequence[bool]) -> dict[str, dict[str, tuple[int, int]]]:
    """Count the answers yes, and the questions, by category ("attribute") and detailed one ("attribute - color")."""
    found: dict[str, dict[str, tuple[int, int]]] = {"category": {}, "detailed category": {}}
    for question, answer in zip(questions, yes):
        detailed = question["category"]
        for kind, name in (("category", detailed.split("-")[0].strip()), ("detailed category", detailed)):
            number, total = found[kind].get(name, (0, 0))
            found[kind][name] = (number + answer, total + 1)
    return found


def _load(folder: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import BlipForQuestionAnswering, BlipProcessor

    model, report = BlipForQuestionAnswering.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ValueError(f"it answers no questions: {len(report['missing_keys'])} weights are missing")
    processor = BlipProcessor.from_pretrained(folder, local_files_only=True)
    return model.to(dtype).eval().requires_grad_(False), processor
