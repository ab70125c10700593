"""A judge for pictures of concepts in several styles that needs no language model: style, and rank of the true picture.

An embedding network was trained on real pictures to tell the concept, and a small one to tell the style (tools/emoji.py
style, judge). A generated picture is embedded; its style is the small one's verdict, and the rank of its true picture is
counted among all real pictures of the wanted style, by cosine. Rank 1 of 1,500 says: no other picture is nearer.

The real pictures are in the judge's folder as embeddings only (gallery.safetensors), so scoring needs no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from nitro_e import files
from nitro_e.config import ConfigError, did_you_mean, parse_json, read_text
from nitro_e.encoders.vision import load_timm

SCORES = ("both", "style", "top10", "reciprocal_rank", "mixed", "novelty")
JUDGE, GALLERY, STYLE = "judge.json", "gallery.safetensors", "style.safetensors"
WANTED = ("config.json", "model.safetensors", JUDGE, GALLERY, STYLE)


class StyleNetwork(nn.Module):
    """Tell the style from lines, shading and colours: (B, 3, H, W) in -1..1 -> (B, styles) logits.

    A cell of its last map sees 47 pixels; mean and maximum over the cells go through a hidden layer. It hardly sees which
    concept it is, so it cannot learn by heart in which styles a concept was shown.
    """

    def __init__(self, styles: int, width: int = 128) -> None:
        super().__init__()
        sizes = ((3, width // 4, 2), (width // 4, width // 2, 2), (width // 2, width, 2))
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
                )
                for channels, out, stride in (*sizes, (width, width, 1), (width, width, 1))
            )
        )
        self.hidden = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, styles)

    def forward(self, pixels: Tensor) -> Tensor:
        cells = self.convolutions(pixels)  # (B, width, H / 8, W / 8)
        seen = torch.cat([cells.mean(dim=(2, 3)), cells.amax(dim=(2, 3))], dim=1)
        return self.head(F.relu(self.hidden(seen)))


class Verdict(NamedTuple):
    style: str  # of the picture, as the network sees it
    probability: float  # of the wanted style
    rank: int  # of the true picture among the real ones of the wanted style, from 1
    nearest: str  # training picture: "concept, style"
    distance: float  # to it, 1 - cosine


class Retrieval(nn.Module):
    """Scores pictures whose record names "concept" and "style"; both must be in the gallery.

    score: "style" is 1 where the network sees the wanted style; "top10" is 1 where the true picture is among the first
    ten of its style; "both" asks for the two; "reciprocal_rank" is 1 / rank; "mixed", for training, is the mean of the
    style's probability and 1 / rank; "novelty" is the distance to the nearest training picture of any style, 1 - cosine.
    """

    def __init__(
        self, path: str | None = None, score: str = "both", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise ConfigError(
                f"options.score: reward 'retrieval' has no score '{score}'" + did_you_mean(score, SCORES)
            )
        if path is None:
            raise ConfigError("path: reward 'retrieval' needs the folder of a judge (tools/emoji.py judge)")
        self.score = score
        self.said: list[str] = []  # of each image of the last call
        self.network, self.styles, self.names, gallery = files.load(
            "reward 'retrieval'", "path", path, lambda folder: _load(folder, dtype), WANTED
        )
        for name, values in gallery.items():
            self.register_buffer(name, values, persistent=False)

    def embed(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, 3, H, W) in -1..1 -> unit embeddings (B, D), log-probabilities of the styles (B, S)."""
        embedding, _ = embed(self.network, pixels, self.names["size"], self.names["width"])
        styles = self.styles(pixels.to(self.styles.head.weight.dtype))
        return embedding, styles.float().log_softmax(-1)

    def forward(self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict]) -> Tensor:
        verdicts = self.judge(pixels, info)
        self.said = [
            f"{verdict.style}, rank {verdict.rank}; nearest training picture: {verdict.nearest} ({verdict.distance:.2f})"
            for verdict in verdicts
        ]
        return torch.tensor([self._score(*each) for each in zip(verdicts, info)], device=pixels.device)

    def judge(self, pixels: Tensor, info: Sequence[dict]) -> list[Verdict]:
        """Judge each picture by its record; ConfigError for a concept or style that the gallery lacks."""
        embedding, styles = self.embed(pixels)
        cosine = embedding @ self.embeddings.T  # (B, N)
        known = cosine.masked_fill(~self.is_train, -2)
        verdicts = []
        for row, record in enumerate(info):
            concept, style = self._find(record, "concept"), self._find(record, "style")
            of_style = self.style == style
            true = of_style & (self.concept == concept)
            if not true.any():
                raise ConfigError(
                    f"reward 'retrieval': its gallery has no '{record['concept']}' in style '{record['style']}'"
                )
            rank = 1 + int((cosine[row, of_style] > cosine[row, true].max()).sum())
            near = int(known[row].argmax())
            verdicts.append(
                Verdict(
                    self.names["style"][int(styles[row].argmax())],
                    styles[row, style].exp().item(),
                    rank,
                    f"{self.names['concept'][int(self.concept[near])]}, {self.names['style'][int(self.style[near])]}",
                    max(1 - known[row, near].item(), 0.0),  # rounding
                )
            )
        return verdicts

    def _find(self, record: dict, key: str) -> int:
        names = self.names[key]
        if key not in record:
            raise ConfigError(
                f'reward \'retrieval\': a prompt has no "{key}"; give prompts with "concept" and "style"'
            )
        if record[key] not in names:
            raise ConfigError(
                f"reward 'retrieval': its judge knows no {key} '{record[key]}'"
                + did_you_mean(record[key], names)
            )
        return names.index(record[key])

    def _score(self, verdict: Verdict, record: dict) -> float:
        style, top10 = verdict.style == record["style"], verdict.rank <= 10
        return {
            "both": float(style and top10),
            "style": float(style),
            "top10": float(top10),
            "reciprocal_rank": 1 / verdict.rank,
            "mixed": (verdict.probability + 1 / verdict.rank) / 2,
            "novelty": verdict.distance,
        }[self.score]


def embed(network: nn.Module, pixels: Tensor, size: int, width: int) -> tuple[Tensor, Tensor]:
    """Return unit embeddings (B, width) with gradients, and what else the network gives: logits of the styles, which
    only its training uses."""
    small = F.interpolate(pixels.float(), (size, size), mode="bilinear", antialias=True, align_corners=False)
    out = network(small.to(next(network.parameters()).dtype)).float()
    return F.normalize(out[:, :width], dim=-1), out[:, width:]


def _load(folder: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, dict, dict[str, Tensor]]:
    """Read a judge's folder: its two networks, the names and sizes, and the gallery of real pictures."""
    names = parse_json(read_text(Path(folder) / JUDGE), f"{folder}/{JUDGE}")
    gallery = load_file(Path(folder) / GALLERY)
    gallery["embeddings"] = F.normalize(gallery["embeddings"].float(), dim=-1)
    network = load_timm(folder, dtype, num_classes=names["width"] + len(names["style"]))
    weights = load_file(Path(folder) / STYLE)
    styles = StyleNetwork(len(names["style"]), weights["head.weight"].shape[1]).to(dtype)
    styles.load_state_dict(weights)
    for module in (network, styles):
        module.eval().requires_grad_(False)
    return network, styles, names, gallery
