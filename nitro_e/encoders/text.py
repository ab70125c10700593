"""Text encoders: prompts -> TextEmbedding.

* `LlamaText`, name `llama-3.2-1b`: the trunk of a causal language model, run by transformers. The only file
  that knows transformers' text models.
* `HashText`, name `hash`: nothing to train or download. Words as hashed character n-grams (fastText,
  Bojanowski et al. 2017, arXiv 1607.04606) plus sinusoidal positions, for training small models offline.

Left out: training of encoders, and caching of embeddings (precompute them into shards instead).
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nitro_e.config import ConfigError
from nitro_e.interfaces import TextEmbedding, as_prompts

LLAMA_REPOSITORY = "meta-llama/Llama-3.2-1B"
LLAMA_LENGTH = 128

TextLayers = Literal["last", "normed_mean"]

logger = logging.getLogger(__name__)


class LlamaText:
    """A frozen causal language model: its last hidden state after the final norm, always float32.

    With `layers` "normed_mean" instead the mean over layers of their normalised hidden states (`normed_mean`).
    Prompts are padded right to `length` with the end token and cut there; the model gets the attention mask.
    Rows at padded positions are returned as the model computes them: the released weights attend to them.
    `truncated` counts the prompts that were cut.
    """

    # an instance has its own only if it differs, so that what was encoded before keeps its digest
    layers: TextLayers = "last"

    def __init__(
        self,
        model: Any,  # transformers' AutoModel, without the language head
        tokenizer: Any,
        device: torch.device | str = "cpu",
        length: int = LLAMA_LENGTH,
        clean_caption: bool = False,  # pass prompts through `clean_pixart_caption` first
        layers: TextLayers = "last",
    ) -> None:
        if tokenizer.eos_token is None or not tokenizer("")["input_ids"]:
            raise ConfigError(
                "the tokenizer must have an end token, and start every prompt with a begin token"
            )
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        tokenizer.pad_token = tokenizer.eos_token
        if clean_caption:
            check_caption_cleaner()
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = tokenizer
        self.length = length
        self.width: int = model.config.hidden_size
        self.clean_caption = clean_caption
        if layers != "last":
            self.layers = layers
        self.truncated = 0

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        self.model.to(device=device, dtype=dtype)

    def compile(self) -> None:
        self.model.compile()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        texts = as_prompts(prompts)
        if self.clean_caption:
            texts = [clean_pixart_caption(prompt) for prompt in texts]
        batch = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        self.truncated += _warn_truncated(
            [text for text, row in zip(texts, batch.encodings, strict=True) if row.overflowing],
            self.length,
            self.truncated,
        )
        device = self.model.device
        parts = [batch[name] for name in ("input_ids", "attention_mask")]
        if device.type == "cuda":  # from pinned memory the copy is not waited for
            parts = [part.pin_memory() for part in parts]
        ids, mask = (part.to(device, non_blocking=True) for part in parts)  # (B, L)
        if self.layers == "last":
            output = self.model(input_ids=ids, attention_mask=mask, use_cache=False)
            tokens = output.last_hidden_state.float()  # (B, L, D)
        else:
            output = self.model(
                input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True
            )
            tokens = normed_mean(output.hidden_states[1:])  # the first are the embeddings of the tokens
        return TextEmbedding(tokens, mask.bool())


def normed_mean(states: Sequence[Tensor]) -> Tensor:
    """Average hidden states (B, L, D) after dividing each row by its root mean square (arXiv 2506.08210); float32.

    Later layers have larger states: without the division the mean would be nearly the last one.
    """
    return torch.stack([F.rms_norm(state.float(), state.shape[-1:]) for state in states]).mean(0)


def load_llama(folder: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load (model, tokenizer) on the CPU from a folder; safetensors only, nothing may be missing."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model, report = AutoModel.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    if report["missing_keys"]:
        raise ConfigError(
            f"it is no {type(model).__name__}: {len(report['missing_keys'])} weights are missing"
        )
    return model.to(dtype), tokenizer


def check_caption_cleaner() -> None:
    missing = [name for name in ("ftfy", "bs4") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"clean_caption needs {' and '.join(missing)}: pip install ftfy beautifulsoup4")


def clean_pixart_caption(prompt: str) -> str:
    """Apply the lower-casing caption cleaner of PixArt in diffusers, twice as its pipelines do.

    The released weights were evaluated with it, although not trained with it; our own recipes leave it out.
    """
    check_caption_cleaner()
    from bs4.builder import ParserRejectedMarkup
    from diffusers import PixArtAlphaPipeline

    cleaned = prompt
    try:
        for _ in range(2):  # the method needs only a class attribute of `self`
            cleaned = PixArtAlphaPipeline._clean_caption(PixArtAlphaPipeline, cleaned)
    except ParserRejectedMarkup:
        raise ConfigError(
            f"the caption cleaner cannot read the markup in {prompt!r}; leave that out"
        ) from None
    return cleaned


class HashText:
    """An encoder without training: one row per word and one end row, then zero rows; float32.

    A row is `hash_width` entries of the word (`word_features`), then `position_width` entries of its position
    (`position_features`), all of about unit variance. The model gives text no positions, so word order has to
    be in the features. Case, punctuation and symbols are dropped; "" is the end row alone.
    `truncated` counts the prompts that were cut to `length` - 1 words.
    """

    END = "</s>"  # cannot be an n-gram of a word

    def __init__(
        self,
        device: torch.device | str = "cpu",
        length: int = 16,
        hash_width: int = 96,
        position_width: int = 32,
    ) -> None:
        self.device = torch.device(device)
        self.length = length
        self.width = hash_width + position_width
        self.hash_width = hash_width
        self.positions = position_features(length, position_width)  # (L, position_width)
        self.end = torch.from_numpy(gram_signs(self.END, hash_width)).float()
        self.truncated = 0

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        self.device = self.device if device is None else torch.device(device)

    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        prompts = as_prompts(prompts)
        sentences = [split_words(prompt) for prompt in prompts]
        self.truncated += _warn_truncated(
            [prompt for prompt, words in zip(prompts, sentences, strict=True) if len(words) >= self.length],
            self.length,
            self.truncated,
        )
        tokens = torch.zeros(len(sentences), self.length, self.width)  # (B, L, D)
        mask = torch.zeros(len(sentences), self.length, dtype=torch.bool)  # (B, L)
        for row, words in enumerate(sentences):
            features = [word_features(word, self.hash_width) for word in words[: self.length - 1]]
            features.append(self.end)
            count = len(features)
            tokens[row, :count, : self.hash_width] = torch.stack(features)
            tokens[row, :count, self.hash_width :] = self.positions[:count]
            mask[row, :count] = True
        return TextEmbedding(tokens.to(self.device), mask.to(self.device))


def split_words(prompt: str) -> list[str]:
    """Split into lower-cased runs of letters and digits, apostrophes inside a word included."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", unicodedata.normalize("NFKC", prompt).lower())


@lru_cache(maxsize=1 << 16)
def word_features(word: str, width: int) -> Tensor:
    """Sum the signs of a word and of its 3- to 5-grams: (width,) float32 of unit mean square.

    `<` and `>` mark the ends of the word (arXiv 1607.04606, section 3.2). The result is shared: read only.
    """
    marked = f"<{word}>"
    grams = {marked} | {marked[i : i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1)}
    # exact, so the set's order is harmless
    total = sum(gram_signs(gram, width).astype(np.int64) for gram in grams)
    norm = np.sqrt(np.mean(np.square(total), dtype=np.float64))
    return torch.from_numpy(total / max(norm, 1e-12)).float()


def gram_signs(gram: str, width: int) -> np.ndarray:
    """Compute (width,) int8 of +-1, the leading bits of SHAKE-256 of the string: the same on every machine."""
    digest = hashlib.shake_256(gram.encode("utf-8", "surrogatepass")).digest((width + 7) // 8)
    return np.unpackbits(np.frombuffer(digest, dtype=np.uint8))[:width].astype(np.int8) * 2 - 1


def position_features(length: int, width: int) -> Tensor:
    """Compute (length, width) sines, then cosines, times sqrt(2); wavelengths 2 pi to nearly 200 pi words.

    Vaswani et al. 2017 (arXiv 1706.03762, section 3.5) with base 100, because prompts are short.
    """
    frequencies = 100.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return (torch.cat([angles.sin(), angles.cos()], dim=1) * 2**0.5).float()


def _warn_truncated(cut: list[str], length: int, before: int) -> int:
    """Return the number of cut prompts; the first time, also log a warning that shows one."""
    if cut and not before:
        logger.warning(
            "prompt is longer than %d tokens and is cut (further ones are only counted): %.80s",
            length,
            cut[0],
        )
    return len(cut)
