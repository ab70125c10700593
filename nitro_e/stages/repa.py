"""Representation alignment (REPA, arXiv 2410.06940): image tokens inside the model resemble frozen features of the image.

Beside the paper's projector there is that of iREPA (arXiv 2512.10794), one convolution, and its normalisation of the
features; and an end before that of the run, as in HASTE (arXiv 2505.16792, without its attention loss).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Fraction, Ge, Gt, Le
from nitro_e.interfaces import Grid, Model, TextEmbedding


@dataclass(frozen=True, kw_only=True)
class RepaConfig(Config):
    """Says which tokens resemble which features of the image, how much, and until when."""

    weight: Annotated[float, Gt(0), "to switch REPA off: stage.repa: null"] = 0.5  # of the alignment loss
    # image tokens after so many blocks; each tap has a projector, and their losses are averaged
    taps: tuple[Annotated[int, Ge(1)], ...] = (4,)
    # mlp: three linear layers; conv: one convolution of 3 x 3 tokens
    projector: Literal["mlp", "conv"] = "mlp"
    width: Annotated[int, Ge(1), Le(65536)] = 2048  # hidden width of an mlp
    # share of their mean over the image that features lose before they are divided by their deviation; null: neither
    spatial_norm: Fraction | None = None
    # share of all steps after which it ends
    stop: Annotated[float, Gt(0), Le(1), "to switch REPA off: stage.repa: null"] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.taps:
            raise ConfigError("taps: name at least one block count; to switch REPA off: stage.repa: null")

    @classmethod
    def derive(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Read `tap: 4` of older recipes as `taps: [4]`."""
        if "tap" not in data:
            return data
        if "taps" in data:
            raise ConfigError(
                f"stage.repa: taps {data['taps']} and tap {data['tap']} are both given; give taps alone"
            )
        return {("taps" if key == "tap" else key): [v] if key == "tap" else v for key, v in data.items()}


class MLPProjector(nn.Sequential):
    """Applies three linear layers to each token by itself: (B, N, D) -> (B, N, F)."""

    def __init__(self, width: int, hidden: int, features: int) -> None:
        super().__init__(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, features),
        )

    def forward(self, input: Tensor, grid: Grid | None = None) -> Tensor:
        return super().forward(input)


class ConvProjector(nn.Module):
    """Applies a convolution over 3 x 3 tokens of the grid: (B, N, D) -> (B, N, F)."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, features, kernel_size=3, padding=1)

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        image = rearrange(tokens, "b (h w) d -> b d h w", h=grid[0], w=grid[1])
        return rearrange(self.conv(image), "b f h w -> b (h w) f")


class ProjectedModel(nn.Module):
    """Holds the model and, for REPA, the projectors that are trained with it and thrown away."""

    def __init__(self, model: Model, repa: RepaConfig | None, feature_width: int) -> None:
        """feature_width: of the vision encoder; without REPA it is not used."""
        super().__init__()
        self.model = model
        self.taps = () if repa is None else repa.taps
        # the first has the name that it had when it was the only one
        self.names = [f"projector{number}" if number else "projector" for number in range(len(self.taps))]
        # DDP must expect that the projectors leave the loss
        self.sometimes_unused = repa is not None and repa.stop < 1
        for name in self.names:
            assert repa is not None
            width = model.config.width
            projector: nn.Module = (
                MLPProjector(width, repa.width, feature_width)
                if repa.projector == "mlp"
                else ConvProjector(width, feature_width)
            )
            self.add_module(name, projector)

    def forward(
        self, x: Tensor, t: Tensor, text: TextEmbedding, align: bool = True, **rows: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the velocity, and the projected tokens (B, N, F) of every tap, or none if not `align`.

        rows: more that some models take, a value per row.
        """
        velocity, tokens = self.model.forward_intermediates(x, t, text, self.taps if align else (), **rows)
        grid = self.model.config.latent_grid(*x.shape[-2:])
        projectors = [self.get_submodule(name) for name in self.names]
        return velocity, [project(part, grid) for project, part in zip(projectors, tokens)]

    def retire_projectors(self) -> None:
        """Train the projectors no longer; they stay in checkpoints."""
        for name in self.names:
            self.get_submodule(name).requires_grad_(False)


def repa_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Return minus the mean cosine of projected tokens and frozen features, both (B, N, F) (arXiv 2410.06940, eq. 8)."""
    return -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean()


def alignment_loss(projected: list[Tensor], features: Tensor, config: RepaConfig) -> Tensor:
    """Return the mean of `repa_loss` over taps, with the features normalised if the config says so."""
    if config.spatial_norm is not None:
        features = normalise_over_tokens(features, config.spatial_norm)
    return torch.stack([repa_loss(tokens, features) for tokens in projected]).mean()


def normalise_over_tokens(features: Tensor, share: float) -> Tensor:
    """Take a share of each channel's mean over the image off, then divide by its deviation (iREPA, arXiv 2512.10794).

    features: (B, N, F). What all tokens have in common, such as the class of the image, counts less then.
    """
    features = features.float()
    mean = features.mean(1, keepdim=True)
    deviation = (features - mean).square().mean(1, keepdim=True).sqrt()
    return (features - share * mean) / (deviation + 1e-6)
