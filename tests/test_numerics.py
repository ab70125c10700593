"""Precision: float32, bfloat16 and float16 give the same velocity and images within the tolerances of docs/model.md."""

import pytest
import torch
from conftest import as_text

from nitro_e.sampling.samplers import SamplingConfig, euler, guide

# Relative error (norm of the difference) of one velocity, of 4 steps without guidance and of 4 steps at guidance 4.5.
TOLERANCES = {
    torch.float64: (1e-6, 1e-6, 2e-6),
    torch.float32: (1e-6, 1e-6, 2e-6),
    torch.bfloat16: (1e-2, 5e-3, 2e-2),
    torch.float16: (1.5e-3, 5e-4, 2e-3),
}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def sampled(reference, model, guidance_scale: float) -> torch.Tensor:
    velocity = guide(
        model, as_text(reference["in.text"]), as_text(reference["in.negative_text"]), guidance_scale
    )
    return euler(velocity, reference["in.latents"], SamplingConfig(steps=4).times())


def errors(reference, model, guided: torch.Tensor) -> list[float]:
    velocity = model(reference["in.latents"], reference["in.timesteps"] / 1000, as_text(reference["in.text"]))
    return [
        relative(velocity, reference["out.velocity"]),
        relative(sampled(reference, model, 0.0), reference["sampler4.latents"]),
        relative(sampled(reference, model, 4.5), guided),
    ]


@pytest.fixture
def guided(reference, reference_model) -> torch.Tensor:
    """What float32 samples at guidance 4.5; the file has only 20 steps of it."""
    with torch.no_grad():
        return sampled(reference, reference_model, 4.5)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@torch.no_grad()
def test_precisions_agree(reference, reference_model, guided, dtype):
    measured = errors(reference, reference_model.to(dtype), guided)
    assert all(error < tolerance for error, tolerance in zip(measured, TOLERANCES[dtype])), measured
    if dtype in (torch.bfloat16, torch.float16):
        assert min(measured) > 1e-5  # it did compute in half precision


@torch.no_grad()
def test_autocast_agrees(reference, reference_model, guided):
    """float32 weights under bf16 autocast, as in training."""
    with torch.autocast("cpu", torch.bfloat16):
        measured = errors(reference, reference_model, guided)
    assert all(error < tolerance for error, tolerance in zip(measured, TOLERANCES[torch.bfloat16])), measured
    assert min(measured) > 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("t", [0.0, 1e-3, 0.5, 1.0])
def test_ends_of_time_and_large_inputs_are_finite(reference, reference_model, dtype, t):
    """Also with inputs a thousand times too large; gradients too."""
    model = reference_model.to(dtype)
    for scale in (0.0, 1.0, 1000.0):
        velocity = model(
            reference["in.latents"] * scale, torch.full((2,), t), as_text(reference["in.text"] * scale)
        )
        assert velocity.isfinite().all() and velocity.abs().max() < 10
    velocity.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_time_is_continuous_near_its_ends(reference, reference_model):
    """t is used in float32 even by a half-precision model: 1000 t would be rounded to steps of 4 in bf16."""
    model, text = reference_model.to(torch.bfloat16), as_text(reference["in.text"])
    with torch.no_grad():
        near, far = (model.time(torch.tensor([t, t + 1e-3])).float() for t in (0.5, 0.999))
        assert not torch.equal(near[0], near[1]) and not torch.equal(far[0], far[1])
        outputs = [
            model(reference["in.latents"], torch.full((2,), t), text) for t in (0.0, 1e-6, 1.0 - 1e-6, 1.0)
        ]
    assert relative(outputs[0], outputs[1]) < 1e-2 and relative(outputs[2], outputs[3]) < 1e-2


def test_a_fully_padded_prompt_is_finite(reference):
    """text_mask real with no real token at all: every query still sees the image."""
    from nitro_e.interfaces import TextEmbedding
    from nitro_e.model import EMMDiT, ModelConfig

    model = EMMDiT(
        ModelConfig(latent_channels=2, text_width=8, width=16, heads=2, groups=(1, 1, 1), text_mask="real")
    )
    torch.nn.init.normal_(model.out.weight)
    text = TextEmbedding(torch.randn(1, 16, 8), torch.zeros(1, 16, dtype=torch.bool))
    velocity = model(torch.randn(1, 2, 16, 16), torch.ones(1), text)
    velocity.sum().backward()
    assert velocity.isfinite().all() and all(
        parameter.grad.isfinite().all() for parameter in model.parameters()
    )
