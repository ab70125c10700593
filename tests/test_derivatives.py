"""Derivatives of the model other than backward(): tangents, torch.func, second derivatives. Right, or refused.

The references are central differences, and the identity u . (J v) = (J^T u) . v with the gradient of backward(). The
time embedding is float32 also in a float64 model; for the differences it is computed in float64.
"""

import math

import pytest
import torch
from test_speed_paths import bfloat16, inputs, needs_bf16, relative, tiny
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nitro_e.config import ConfigError
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import layers
from nitro_e.model.cpu.packing import pack_for_cpu
from nitro_e.model.transforms import OneProductPerTangent


class Case:
    """A model with inputs, and a direction of each."""

    def __init__(self, text_mask: str, dtype: torch.dtype) -> None:
        self.model = tiny(text_mask=text_mask, groups=(1, 1, 1)).to(dtype)
        x, t, text = inputs()
        mask = text.mask.clone()
        mask[:, 5:] = False
        self.x, self.t, self.text = x.to(dtype), t.to(dtype), TextEmbedding(text.tokens.to(dtype), mask)
        self.dx, self.dt = torch.randn_like(self.x), torch.randn_like(self.t)
        self.upstream = torch.randn_like(self.x)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t, self.text)

    def tangent(self, dx: Tensor, dt: Tensor) -> Tensor:
        return jvp(self.velocity, (self.x, self.t), (dx, dt))[1]

    def difference(self, dx: Tensor, dt: Tensor, h: float = 1e-6) -> Tensor:
        with torch.no_grad():
            ahead, behind = (self.velocity(self.x + s * h * dx, self.t + s * h * dt) for s in (1, -1))
        return (ahead - behind) / (2 * h)

    def gradient(self, x: Tensor) -> Tensor:
        """Of upstream . velocity in x, by backward()."""
        x = x.detach().clone().requires_grad_()
        return torch.autograd.grad((self.velocity(x, self.t) * self.upstream).sum(), x)[0]

    def projected(self, x: Tensor) -> Tensor:
        return (self.velocity(x, self.t) * self.upstream).sum()


@pytest.fixture
def exact_time(monkeypatch):
    def sinusoids(t: Tensor, width: int = 256) -> Tensor:
        frequencies = torch.exp(
            -math.log(10_000) * torch.arange(width // 2, dtype=torch.float64) / (width // 2)
        )
        angles = 1000 * t.double()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    monkeypatch.setattr(layers, "timestep_sinusoids", sinusoids)


masks = pytest.mark.parametrize("text_mask", ["none", "real"])


@masks
@pytest.mark.parametrize("direction", ["x", "t", "both"])
def test_jvp_is_the_difference_and_the_transpose_of_the_gradient(text_mask, direction, exact_time):
    """In float64, and in float32 against it; the operator dropped the tangent: half of the derivative was missing."""
    case = Case(text_mask, torch.float64)
    dx, dt = case.dx * (direction != "t"), case.dt * (direction != "x")
    tangent = case.tangent(dx, dt)
    assert relative(tangent, case.difference(dx, dt)) < 1e-5
    x, t = case.x.clone().requires_grad_(), case.t.clone().requires_grad_()
    g_x, g_t = torch.autograd.grad(case.velocity(x, t), (x, t), case.upstream)
    forward, reverse = (tangent * case.upstream).sum(), (g_x * dx).sum() + (g_t * dt).sum()
    torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-10)

    single = Case(text_mask, torch.float32)
    assert relative(single.tangent(dx.float(), dt.float()), tangent) < 1e-4


@masks
@pytest.mark.parametrize("training", [True, False])
def test_dual_tensors(text_mask, training, exact_time):
    """The other way to ask for a tangent, with and without a graph; values are the ordinary ones."""
    case = Case(text_mask, torch.float64)
    with torch.set_grad_enabled(training), forward_ad.dual_level():
        dual = [forward_ad.make_dual(*pair) for pair in ((case.x, case.dx), (case.t, case.dt))]
        value, tangent = forward_ad.unpack_dual(case.velocity(*dual))
    torch.testing.assert_close(value, case.velocity(case.x, case.t))
    assert relative(tangent, case.difference(case.dx, case.dt)) < 1e-5


def test_a_tangent_costs_two_products_per_linear_layer(exact_time):
    """One for the value and one for the tangent, with the same bits; torch 2.15 alone takes three."""
    case = Case("none", torch.float32)

    def velocity() -> tuple[Tensor, Tensor]:
        with torch.no_grad(), forward_ad.dual_level():
            dual = [forward_ad.make_dual(*pair) for pair in ((case.x, case.dx), (case.t, case.dt))]
            return tuple(forward_ad.unpack_dual(case.velocity(*dual)))

    def products(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        counts = counter.get_flop_counts()["Global"]
        return sum(counts.get(kind, 0) for kind in (torch.ops.aten.mm, torch.ops.aten.addmm))

    with torch.no_grad():
        once = products(lambda: case.velocity(case.x, case.t))
    expected = velocity()
    with OneProductPerTangent():
        assert products(velocity) == pytest.approx(2 * once, rel=0.02)
        assert all(map(torch.equal, velocity(), expected))
        plain = case.velocity(case.x, case.t)
    assert torch.equal(plain, case.velocity(case.x, case.t))
    weight, x = torch.randn(3, 4), torch.randn(2, 4)
    directions = torch.randn(3, 4), torch.randn(2, 4)
    with forward_ad.dual_level(), OneProductPerTangent():  # weights with a tangent
        dual = [forward_ad.make_dual(*pair) for pair in zip((weight, x), directions)]
        for inputs, expected in (
            ((x, dual[0]), x @ directions[0].T),
            (dual[::-1], x @ directions[0].T + directions[1] @ weight.T),
        ):
            tangent = forward_ad.unpack_dual(torch.nn.functional.linear(*inputs)).tangent
            torch.testing.assert_close(tangent, expected)


def test_jvp_under_autocast():
    case = Case("none", torch.float32)
    expected = jvp(case.velocity, (case.x, case.t), (case.dx, case.dt))
    with torch.autocast("cpu", torch.bfloat16):
        found = jvp(case.velocity, (case.x, case.t), (case.dx, case.dt))
        assert relative(found[0], case.velocity(case.x, case.t)) < 1e-2
    assert all(relative(ours, theirs) < 3e-2 for ours, theirs in zip(found, expected))


@masks
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_through_a_jvp(text_mask, checkpointing):
    """In the parameters, of a loss of the value and the tangent, as losses with a time derivative need."""
    case = Case(text_mask, torch.float64)
    case.model.gradient_checkpointing = checkpointing

    def loss() -> Tensor:
        value, tangent = jvp(case.velocity, (case.x, case.t), (case.dx, case.dt))
        return (value * tangent).mean() + tangent.square().mean()

    loss().backward()
    parameters = [parameter for parameter in case.model.parameters() if parameter.grad is not None]
    directions = [torch.randn_like(parameter) for parameter in parameters]
    expected = sum((p.grad * d).sum() for p, d in zip(parameters, directions))

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions):
                parameter.add_(direction, alpha=step)
            result = loss()
            for parameter, direction in zip(parameters, directions):
                parameter.sub_(direction, alpha=step)
        return result

    h = 1e-6
    torch.testing.assert_close((moved(h) - moved(-h)) / (2 * h), expected, rtol=1e-5, atol=1e-8)


@masks
def test_second_derivatives(text_mask):
    """Forward over reverse, reverse over forward, reverse over reverse, forward over forward."""
    case, h = Case(text_mask, torch.float64), 1e-5
    x, dx, u = case.x, case.dx, case.upstream
    expected = (case.gradient(x + h * dx) - case.gradient(x - h * dx)) / (2 * h)

    def along(x: Tensor) -> Tensor:
        return jvp(case.projected, (x,), (dx,))[1]

    def down(x: Tensor) -> Tensor:
        return (grad(case.projected)(x) * dx).sum()

    assert relative(grad(case.projected)(x), case.gradient(x)) < 1e-12
    for found in (jvp(grad(case.projected), (x,), (dx,))[1], grad(along)(x), grad(down)(x)):
        assert relative(found, expected) < 1e-6
    twice = jvp(along, (x,), (u,))[1]
    torch.testing.assert_close(twice, (expected * u).sum(), rtol=1e-6, atol=1e-9)


def test_second_derivatives_that_are_refused():
    case = Case("none", torch.float64)
    x = case.x.clone().requires_grad_()
    velocity = case.velocity(x, case.t)
    (gradient,) = torch.autograd.grad(velocity, x, case.upstream, create_graph=True)
    with pytest.raises(NotImplementedError, match="take it with torch.func"):
        gradient.sum().backward()
    velocity = case.velocity(x, case.t)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="a gradient with a tangent"):
        torch.autograd.grad(velocity, x, forward_ad.make_dual(case.upstream, case.dx))


def test_gradients_per_image():
    """vmap over grad, as for per-sample gradients."""
    case = Case("real", torch.float64)
    parameters = {name: parameter.detach() for name, parameter in case.model.named_parameters()}

    def loss(parameters: dict, *row: Tensor) -> Tensor:
        x, t, tokens, mask = (part[None] for part in row)
        return functional_call(case.model, parameters, (x, t, TextEmbedding(tokens, mask))).square().mean()

    found = vmap(grad(loss), (None, 0, 0, 0, 0))(parameters, case.x, case.t, *case.text)
    for row in range(2):
        case.model.zero_grad()
        case.velocity(case.x, case.t)[row].square().mean().backward()
        for name, parameter in case.model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[name][row], parameter.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_attention_asks_for_the_kernel_that_knows_tangents(monkeypatch):
    """On other devices too, where the fused kernels would be chosen."""
    chosen = []

    def asked(*arguments, attn_mask=None):
        flags = torch.backends.cuda
        chosen.append(
            (flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled(), flags.math_sdp_enabled())
        )
        return arguments[2]

    monkeypatch.setattr(layers.F, "scaled_dot_product_attention", asked)
    q = torch.randn(1, 2, 4, 8)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        layers.attend(*(q.to("meta"),) * 3, None)
        with forward_ad.dual_level():
            layers.attend(*(q.to("meta"),) * 3, None)
            layers.attend(q, q, q, None)
    assert chosen == [(True, True, True), (False, False, True), (False, False, True)]


@pytest.mark.slow
def test_jvp_of_a_compiled_model_runs_uncompiled():
    """Compiled blocks know no tangents: without a graph they dropped them."""
    torch._dynamo.reset()
    case = Case("none", torch.float32)
    expected = case.tangent(case.dx, case.dt)
    case.model.compile_blocks()
    case.velocity(case.x, case.t)
    assert relative(case.tangent(case.dx, case.dt), expected) < 1e-6
    with torch.no_grad(), forward_ad.dual_level():
        dual = [forward_ad.make_dual(*pair) for pair in ((case.x, case.dx), (case.t, case.dt))]
        assert relative(forward_ad.unpack_dual(case.velocity(*dual)).tangent, expected) < 1e-6


@needs_bf16
def test_a_packed_model_refuses_derivatives():
    """Its layers know values only: gradients and tangents ended there."""
    model = bfloat16(groups=(1, 1, 1))
    packed, (x, t, text) = pack_for_cpu(model), inputs()
    with pytest.raises(ConfigError, match="has no derivatives"):
        packed(x.requires_grad_(), t, text)
    with pytest.raises(ConfigError, match="has no derivatives"):
        jvp(lambda t: packed(x.detach(), t, text), (t,), (torch.ones_like(t),))
    with torch.no_grad():
        assert packed(x, t, text).isfinite().all()
