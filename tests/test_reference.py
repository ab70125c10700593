"""Our E-MMDiT against numbers from the released implementation (float32, CPU)."""

import torch
import torch.nn.functional as F
from conftest import as_text
from torch import nn

from nitro_e.model import released
from nitro_e.sampling.samplers import SamplingConfig, euler, guide
from nitro_e.stages.repa import repa_loss


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_velocity_and_parameter_count(reference, reference_model, record_property):
    with torch.no_grad():
        velocity = reference_model(
            reference["in.latents"], reference["in.timesteps"] / 1000, as_text(reference["in.text"])
        )
    apart = (velocity - reference["out.velocity"]).abs().max().item()
    record_property("velocity, largest difference", f"{apart:.1e}")
    assert apart < 3e-6  # 1e-5 would not see a wrong eps
    projector = sum(tensor.numel() for name, tensor in reference.items() if name.startswith("w.projectors"))
    assert sum(parameter.numel() for parameter in reference_model.parameters()) + projector == 573_248


def test_output_does_not_depend_on_train_or_eval_mode(reference, reference_model):
    inputs = reference["in.latents"], reference["in.timesteps"] / 1000, as_text(reference["in.text"])
    with torch.no_grad():
        assert torch.equal(reference_model.train()(*inputs), reference_model.eval()(*inputs))


def test_loss_and_gradients(reference, reference_model, record_property):
    """MSE + 0.5 * REPA after the first group; every recorded gradient, and the norm over all of them."""
    projector = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 24))
    projector.load_state_dict(
        {k[len("w.projectors.0.") :]: v for k, v in reference.items() if k.startswith("w.projectors.0")}
    )
    velocity, (tokens,) = reference_model.forward_intermediates(
        reference["in.latents"], reference["in.timesteps"] / 1000, as_text(reference["in.text"]), taps=[4]
    )
    projected = projector(tokens)
    alignment = repa_loss(projected, reference["in.repa_target"])
    loss = F.mse_loss(velocity, reference["in.target"]) + 0.5 * alignment
    loss.backward()

    assert relative(projected, reference["out.repa"]) < 1e-4
    assert relative(alignment[None], reference["out.repa_loss"]) < 1e-4
    assert relative(loss[None], reference["out.loss"]) < 1e-4
    record_property("loss with REPA, relative", f"{relative(loss[None], reference['out.loss']):.1e}")
    parameters = [*reference_model.parameters(), *projector.parameters()]
    norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
    assert relative(norm[None], reference["grad_norm"]) < 1e-4

    for parameter in reference_model.parameters():
        parameter.data = parameter.grad  # so that the converter gives the gradients their released names
    gradients = released.to_released(reference_model)
    names = [name[5:] for name in reference if name.startswith("grad.")]
    assert len(names) == 11
    apart = {name: relative(gradients[name], reference[f"grad.{name}"]) for name in names}
    record_property(
        f"gradients of {len(names)} tensors, largest relative difference", f"{max(apart.values()):.1e}"
    )
    assert max(apart.values()) < 1e-4, apart


def sampled(reference, model, steps: int, guidance_scale: float) -> torch.Tensor:
    times = SamplingConfig(steps=steps).times()
    torch.testing.assert_close(times, reference[f"sampler{steps}.sigmas"], rtol=1e-6, atol=1e-7)
    text, negative = as_text(reference["in.text"]), as_text(reference["in.negative_text"])
    with torch.no_grad():
        return euler(guide(model, text, negative, guidance_scale), reference["in.latents"], times)


def test_twenty_guided_steps(reference, reference_model, record_property):
    assert reference["sampler20.cfg"].item() == 4.5
    apart = relative(sampled(reference, reference_model, 20, 4.5), reference["sampler20.latents"])
    record_property("latents of 20 guided steps, relative", f"{apart:.1e}")
    assert apart < 1e-4


def test_four_steps_without_guidance(reference, reference_model, record_property):
    apart = relative(sampled(reference, reference_model, 4, 0.0), reference["sampler4.latents"])
    record_property("latents of 4 steps, relative", f"{apart:.1e}")
    assert apart < 1e-4
