"""What Muon's options do to one step, against torch's own Muon and against the singular values of the step."""

import pytest
import torch
from torch import Tensor, nn

from nitro_e.config import ConfigError
from nitro_e.model.layers import FusedLinear
from nitro_e.training import optim
from nitro_e.training.optim import OptimConfig, build_optimizers

pytestmark = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9"
)


def gradient(rows: int, columns: int) -> Tensor:
    """A matrix with singular values between 0.2 and 1, as far as one number tells all of it."""
    generator = torch.Generator().manual_seed(rows + columns)
    rank = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in (rows, columns))
    return left @ torch.diag(torch.linspace(0.2, 1, rank)) @ right.T


def step(layer: nn.Linear, steps: int = 1, **options) -> Tensor:
    """The change of the weight over some steps of one gradient, divided by the rate."""
    module = nn.ModuleDict({"blocks": nn.ModuleList([layer])})
    before = layer.weight.detach().clone()
    config = OptimConfig(kind="muon", weight_decay=0.0, muon_lr=0.01, **options)
    muon, _ = build_optimizers(module, config)
    for number in range(steps):
        grad = gradient(*layer.weight.shape)
        layer.weight.grad = grad if number % 2 == 0 else grad.flip(0)
        muon.step()
    return (layer.weight.detach() - before) / -0.01


def linear(rows: int, columns: int) -> nn.Linear:
    layer = nn.Linear(columns, rows)
    nn.init.zeros_(layer.weight)
    return layer


def test_a_split_matrix_moves_as_three():
    """Over several steps, so that the momenta are apart too."""
    fused = FusedLinear(24, 24, parts=3)
    nn.init.zeros_(fused.weight)
    split, whole = step(fused, 3, muon_split=True), step(linear(72, 24), 3)
    for part, gradients in enumerate(
        zip(*(g.chunk(3) for g in (gradient(72, 24), gradient(72, 24).flip(0))))
    ):
        weight = nn.Parameter(torch.zeros(24, 24))
        muon = torch.optim.Muon([weight], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        for number in range(3):
            weight.grad = gradients[number % 2].clone()
            muon.step()
        torch.testing.assert_close(split.chunk(3)[part], weight.detach() / -0.01, rtol=1e-6, atol=1e-6)
    assert (split - whole).abs().max() > 0.01
    assert torch.equal(step(linear(72, 24), muon_split=True), step(linear(72, 24)))  # nothing to cut


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 192)], ids=str)
def test_spectral_scale_is_the_norm_that_keeps_outputs_of_their_size(shape):
    values = torch.linalg.svdvals(step(linear(*shape), muon_scale="spectral"))
    norm = max(1, shape[0] / shape[1]) ** 0.5
    assert 0.65 * norm < values.min() and values.max() < 1.2 * norm


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 192)], ids=str)
def test_match_rms_gives_every_entry_the_size_of_an_update_of_adamw(shape):
    assert step(linear(*shape)).square().mean().sqrt() == pytest.approx(0.2, rel=0.15)


def test_a_rate_is_the_same_at_every_width_with_spectral_scale_alone():
    """By the largest singular value of the step, 2.45 times as large at six times the width with match_rms."""
    for scale, ratio in {"spectral": 1.0, "match_rms": 6**0.5}.items():
        narrow, wide = (torch.linalg.svdvals(step(linear(d, d), muon_scale=scale))[0] for d in (64, 384))
        assert wide / narrow == pytest.approx(ratio, rel=0.1)


def test_sharded_weights_are_not_cut(monkeypatch):
    monkeypatch.setattr(optim, "local_tensor", torch.clone)
    with pytest.raises(ConfigError, match="muon_split: sharded weights cannot be cut"):
        step(linear(24, 24), muon_split=True)
