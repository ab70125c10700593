"""Equal text tokens computed once while sampling: the same velocities, with less arithmetic for the null prompt."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nitro_e.interfaces import Architecture, Denoiser, TextEmbedding
from nitro_e.model import ModelConfig
from nitro_e.model.merging import merge_text
from nitro_e.sampling.samplers import weak_pass


def merge_padding(denoiser: Denoiser, config: Architecture) -> Denoiser:
    """Make a Denoiser of the same velocities that merges equal text tokens (nitro_e/model/merging.py).

    denoiser: a model of this config, or what calls one with the text it is given. Returned as it is if the model cannot
    merge: another architecture, hidden padding, or path drop.
    """
    if not isinstance(config, ModelConfig) or not config.attends_padding or config.path_drop:
        return denoiser
    return MergedPadding(denoiser, config.text_multiple)


class MergedPadding:
    """Calls a denoiser with merged text where all rows have one time, as in samplers."""

    def __init__(self, denoiser: Callable[..., Tensor], run: int) -> None:
        self.denoiser, self.run = denoiser, run

    def __call__(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        fits = text.tokens.shape[1] % self.run == 0  # otherwise the model says what would
        merged = merge_text(text, self.run) if fits and (t == t[:1]).all() else None
        if merged is None:
            return self.denoiser(x, t, text)
        short, order = merged
        return self.denoiser(x[order], t[:1], short)[order.argsort()]

    def weak(self, x: Tensor, t: Tensor, text: TextEmbedding) -> Tensor:
        """Compute the weak pass, if there is one."""
        return weak_pass(self.denoiser)(x, t, text)
