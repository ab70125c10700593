"""Rewards on CLIP: how well an image fits its prompt, and how much people like it.

clipscore   cosine of image and prompt, about .2 to .35              CLIP ViT-L/14
pickscore   cosine times the trained scale, about 18 to 24           PickScore v1, Kirstain et al., arXiv:2305.01569
hpsv2.1     cosine, .2 to .33, comparable for one prompt only        HPSv2.1, Wu et al., arXiv:2306.09341
aesthetic   1 to 10, ignores the prompt                              LAION's predictor on CLIP ViT-L/14
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nitro_e import files
from nitro_e.encoders.clip import (
    CLIP,
    CLIP_H,
    CLIP_L,
    fit_long_side,
    fit_short_side,
    from_open_clip,
    load_clip,
    load_tokenizer,
)
from nitro_e.rewards.reuse import reuse

PICKSCORE = "yuvalkirstain/PickScore_v1"
HPSV2, HPSV2_FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
HPSV2_FILES = (f"{HPSV2_FILE}|model*.safetensors", "model.safetensors.index.json?", "config.json?")
# open_clip's tokenizer straightens quotation marks, and takes apart ligatures and characters of full width (ftfy)
STRAIGHT = {ord(mark): "'" for mark in "ʼ‘’‚‛"} | {ord(mark): '"' for mark in "“”„‟"}
FOLDED = {
    code: unicodedata.normalize("NFKC", chr(code))
    for code in (0x3000, *range(0xFB00, 0xFB07), *range(0xFF01, 0xFFF0))
}
FOLDED |= {ord(pair): unicodedata.normalize("NFKC", pair) for pair in "ŉĲĳǄǅǆǇǈǉǊǋǌǱǲǳ"} | {0xFB05: "ſt"}
AESTHETIC = "trl-lib/ddpo-aesthetic-predictor"
AESTHETIC_FILES = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth")


class CLIPScore(nn.Module):
    """Cosine of image and prompt. `path`: a CLIP in transformers' format with its tokenizer."""

    def __init__(
        self, path: str | None = None, revision: str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.clip = shared_clip("reward 'clipscore'", "path", path or CLIP_L, dtype, revision)

    def forward(self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict]) -> Tensor:
        return cosines(self.clip, fit_short_side(pixels, self.clip.size), prompts)


class PickScore(nn.Module):
    """PickScore. `path`: a CLIP in transformers' format; `tokenizer`: hub id or folder of CLIP ViT-H's."""

    def __init__(
        self,
        path: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        tokenizer: str = CLIP_H,
    ) -> None:
        super().__init__()
        what = "reward 'pickscore'"
        words = files.load(what, "options.tokenizer", tokenizer, load_tokenizer, files.TOKENIZER)
        self.clip = reuse(
            (path or PICKSCORE, revision, dtype, tokenizer),
            lambda: files.load(
                what,
                "path",
                path or PICKSCORE,
                lambda folder: load_clip(folder, dtype, words),
                files.TRANSFORMER,
                revision,
            ),
        )

    def forward(self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict]) -> Tensor:
        return self.clip.scale * cosines(self.clip, fit_short_side(pixels, self.clip.size), prompts)


class HPSv2(nn.Module):
    """HPSv2.1. `path`: hub id or folder with HPS_v2.1_compressed.pt, or with a CLIP in transformers' format.

    `base`: hub id or folder of CLIP ViT-H's config and tokenizer. `antialias`: HPSv2 resizes tensors, which old
    torchvision did without antialiasing. The scores differ, so the option pins it."""

    def __init__(
        self,
        path: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        base: str = CLIP_H,
        antialias: bool = True,
    ) -> None:
        super().__init__()
        what = "reward 'hpsv2.1'"

        def load(folder: str, base: str) -> CLIP:
            file = Path(folder) / HPSV2_FILE
            if not file.is_file():
                return load_clip(folder, dtype, load_tokenizer(base))
            state = torch.load(file, map_location="cpu", weights_only=True)
            return from_open_clip(state["state_dict"], base, dtype)

        base = files.load(what, "options.base", base, str, files.TOKENIZER)
        self.clip = reuse(
            (path or HPSV2, revision, dtype, base),
            lambda: files.load(
                what, "path", path or HPSV2, lambda folder: load(folder, base), HPSV2_FILES, revision
            ),
        )
        self.antialias = antialias

    def forward(self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict]) -> Tensor:
        images = fit_long_side(pixels, self.clip.size, self.antialias)
        return cosines(self.clip, images, [clean(prompt) for prompt in prompts])


class Aesthetic(nn.Module):
    """LAION's aesthetic predictor. `path`: hub id or folder with its .pth; `clip`: likewise of CLIP ViT-L/14."""

    def __init__(
        self,
        path: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        clip: str = CLIP_L,
    ) -> None:
        super().__init__()

        def load(folder: str) -> nn.Module:
            found = (Path(folder) / name for name in AESTHETIC_FILES)
            file = next((file for file in found if file.is_file()), None)
            if file is None:
                raise FileNotFoundError(f"there is neither {' nor '.join(AESTHETIC_FILES)}")
            state = torch.load(file, map_location="cpu", weights_only=True)
            head = linear_head(state["layers.0.weight"].shape[1])
            head.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
            return head

        what, wanted = "reward 'aesthetic'", ("|".join(AESTHETIC_FILES),)
        self.head = files.load(what, "path", path or AESTHETIC, load, wanted, revision).eval()
        self.head.requires_grad_(False)
        self.clip = shared_clip(what, "options.clip", clip, dtype)

    def forward(self, pixels: Tensor, prompts: Sequence[str], info: Sequence[dict]) -> Tensor:
        features = self.clip.image_features(fit_short_side(pixels, self.clip.size))  # (B, E)
        return self.head(features)[:, 0]


def clean(prompt: str) -> str:
    """Fold a prompt as open_clip does before its tokens: ftfy's folding, twice HTML entities, single spaces.

    Text of a wrongly decoded file, which ftfy repairs too, stays as it is.
    """
    prompt = unicodedata.normalize("NFC", prompt.translate(FOLDED).translate(STRAIGHT))
    return " ".join(html.unescape(html.unescape(prompt)).split())


def shared_clip(what: str, key: str, source: str, dtype: torch.dtype, revision: str | None = None) -> CLIP:
    """Load a CLIP with its tokenizer, as `files.load` does, or take the one that another reward of this place has."""
    wanted = (*files.TRANSFORMER, *files.TOKENIZER)
    return reuse(
        (source, revision, dtype),
        lambda: files.load(what, key, source, lambda folder: load_clip(folder, dtype), wanted, revision),
    )


def cosines(clip: CLIP, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Compute the cosine of each image with its own prompt, (B,); every distinct prompt is embedded once."""
    distinct = list(dict.fromkeys(prompts))
    texts = clip.text_features(distinct)  # (D, E)
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=texts.device)
    return (clip.image_features(images) * texts[rows]).sum(-1)


def linear_head(width: int) -> nn.Sequential:
    """Make the head of the aesthetic predictor and of ImageReward: five linear layers without activations.

    The gaps in the numbering of its weights are dropout layers, which do nothing here."""
    sizes = (width, 1024, 128, 64, 16, 1)
    head = nn.Sequential(*(nn.Identity() for _ in range(8)))
    for place, (inside, outside) in zip((0, 2, 4, 6, 7), zip(sizes, sizes[1:])):
        head[place] = nn.Linear(inside, outside)
    return head
