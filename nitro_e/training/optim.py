"""Optimisers and the learning rate, which is a pure function of the step."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from nitro_e.config import Config, ConfigError, Fraction, Ge, Gt, Le, Lt
from nitro_e.model.layers import FusedLinear
from nitro_e.training.parallel import local_tensor


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Config):
    """Configures AdamW on everything, or Muon on the hidden matrices and AdamW on the rest."""

    # adamw for all weights, or muon for hidden matrices and adamw for the rest
    kind: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[float, Ge(0), Le(1000)] = 3e-4  # of AdamW
    muon_lr: Annotated[float, Ge(0), Le(1000)] = 6e-3  # of Muon, whose updates muon_scale scales
    # orthogonalise the updates of queries, keys and values apart, not those of their stack
    muon_split: bool = False
    # match_rms: updates of AdamW's size, 0.2 per entry; spectral: of a norm that suits all widths alike
    muon_scale: Literal["match_rms", "spectral"] = "match_rms"
    # decay of AdamW's first and second moments
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.999)
    eps: Annotated[float, Ge(0)] = 1e-10  # added to AdamW's denominator
    weight_decay: Annotated[float, Ge(0)] = 0.03  # decoupled, of all weights
    warmup: Annotated[int, Ge(0)] = 500  # steps of linear warm-up
    decay: Fraction = 0.0  # share of all steps, at the end, over which the rate falls linearly to zero
    clip: Annotated[float, Gt(0), "a large value switches clipping off"] = 1.0  # largest gradient norm

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "muon" and not hasattr(torch.optim, "Muon"):
            raise ConfigError(f"kind 'muon' needs torch >= 2.9, this is {torch.__version__}; use kind: adamw")

    def factor(self, step: int, steps: int) -> float:
        """Return the learning rate of step 0, 1, ... relative to its peak: linear warm-up, constant, linear decay."""
        rising = (step + 1) / self.warmup if self.warmup else 1.0
        falling = (steps - step) / (self.decay * steps) if self.decay else 1.0
        return max(0.0, min(1.0, rising, falling))


def build_optimizers(module: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Make the optimiser of a module, or two for Muon. Every group keeps its peak rate under `peak_lr`."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError("nothing to train: no parameter requires a gradient")
    optimizers = []
    if config.kind == "muon":
        layers = _hidden_layers(module)
        ids = {id(layer.weight) for layer in layers}
        parameters = [parameter for parameter in parameters if id(parameter) not in ids]
        optimizers.append(_build_muon(layers, config))
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in parameters)
    optimizers.append(
        torch.optim.AdamW(
            parameters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def _hidden_layers(module: nn.Module) -> list[nn.Linear]:
    """List the linear layers inside the blocks; embeddings, modulation tables and outputs are AdamW's."""
    return [
        layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and "blocks." in name and layer.weight.requires_grad
    ]


def _build_muon(layers: list[nn.Linear], config: OptimConfig) -> torch.optim.Optimizer:
    """Make Muon (arXiv 2502.16982) for the weights of these layers."""
    options: dict[str, Any] = {
        "lr": config.muon_lr,
        "weight_decay": config.weight_decay,
        "adjust_lr_fn": {"match_rms": "match_rms_adamw", "spectral": "original"}[config.muon_scale],
    }
    if not config.muon_split:
        return torch.optim.Muon([layer.weight for layer in layers], **options)
    if any(local_tensor(layer.weight) is not layer.weight for layer in layers):
        raise ConfigError(
            "muon_split: sharded weights cannot be cut; set engine.sharding: ddp, or muon_split: false"
        )
    groups: dict[int, list[nn.Parameter]] = {}
    for layer in layers:
        groups.setdefault(layer.parts if isinstance(layer, FusedLinear) else 1, []).append(layer.weight)
    return SplitMuon([{"params": weights, "parts": parts} for parts, weights in groups.items()], **options)


if hasattr(torch.optim, "Muon"):

    class SplitMuon(torch.optim.Muon):
        """Muon for weights that are `parts` matrices, one below the other; each group has its number of parts."""

        def _init_group(
            self, group: MutableMapping, params: list[Tensor], grads: list[Tensor], momenta: list[Tensor]
        ) -> bool:
            has_complex = super()._init_group(group, params, grads, momenta)
            for tensors in (params, grads, momenta):
                # views, so that the step changes the whole tensors
                tensors[:] = [part for tensor in tensors for part in tensor.chunk(group["parts"])]
            return has_complex
