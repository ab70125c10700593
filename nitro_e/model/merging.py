"""Equal text tokens as one: the null prompt of guidance is a begin token and padding, most of it the same row.

A causal encoder lets the padded positions of the null prompt see the begin token alone, so their rows are equal. Text
tokens have no positions here, so equal ones stay equal through all blocks, unless subregion attention puts them into
different groups. So of equal runs of `text_multiple` tokens one is kept, and attention counts it as often as it stood
there: 128 tokens become 32 for the released 512 px weights, and 2 with full attention. Padding behind words is not
equal: it sees the words.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nitro_e.interfaces import TextEmbedding
from nitro_e.model.layers import Ragged


class Group(NamedTuple):
    """Rows whose texts end in equally many equal runs, one of which was kept."""

    rows: int
    length: int  # text tokens that were kept of each row
    run: int  # the last of them, of which there were
    copies: int


class MergedText(NamedTuple):
    """The text tokens of B rows without repeats, one row behind the other: (1, sum of rows x length, ...)."""

    tokens: Tensor  # (1, sum, D)
    mask: Tensor  # (1, sum) bool
    groups: tuple[Group, ...]

    def keys(self, image: Tensor, words: Tensor) -> Ragged:
        """Describe the keys of attention between image tokens (B, N, D) and words (1, sum / R, D), R pooled into one."""
        pooled = self.tokens.shape[1] // words.shape[1]
        groups = tuple((group.rows, group.length // pooled) for group in self.groups)
        visible: list[Tensor | None] = []
        for group, shape in zip(self.groups, groups):
            added = None
            if group.copies > 1:  # log n, added to a score, counts a key n times
                added = image.new_zeros(group.rows, image.shape[1] + shape[1])
                added[:, -(group.run // pooled) :] = math.log(group.copies)
            visible.append(added)
        return Ragged(groups, tuple(visible))


def merge_text(text: TextEmbedding, run: int) -> tuple[MergedText, Tensor] | None:
    """Leave equal runs of `run` tokens at the end of each row out but one; None if no row has any.

    Returns the order of the rows too, (B,): rows with equally many runs have become neighbours.
    """
    copies = equal_runs(text, run)  # (B,)
    if copies.max() == 1:
        return None
    counts, sizes = copies.unique(return_counts=True)
    order = copies.argsort(stable=True)
    tokens, mask = [], []
    groups = []
    for rows, count in zip(order.split(sizes.tolist()), counts.tolist()):
        length = text.tokens.shape[1] - (count - 1) * run
        groups.append(Group(len(rows), length, run, count))
        tokens.append(text.tokens[rows, :length].flatten(0, 1))
        mask.append(text.mask[rows, :length].flatten())
    return MergedText(torch.cat(tokens)[None], torch.cat(mask)[None], tuple(groups)), order


def equal_runs(text: TextEmbedding, run: int) -> Tensor:
    """Count the runs of `run` tokens at the end of each text that are equal to its last one: (B,), at least 1."""
    tokens, mask = (part.unflatten(1, (-1, run)) for part in text)  # (B, R, run, D) and (B, R, run)
    equal = (tokens == tokens[:, -1:]).flatten(2).all(2) & (mask == mask[:, -1:]).all(2)  # (B, R)
    return equal.flip(1).long().cumprod(1).sum(1)
