"""The fast ways of computing: attention in chunks, packed linear layers, compiled blocks; all against the plain way.

Nothing here is timed; `tools/benchmark.py model` is for that.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import as_text
from torch import nn

from nitro_e.cli.benchmark.plain_emmdit import PlainEMMDiT
from nitro_e.config import ConfigError
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import EMMDiT, ModelConfig, layers, released
from nitro_e.model.cpu import attention
from nitro_e.model.cpu.packing import PackedLinear, pack_for_cpu


def tiny(**choices) -> EMMDiT:
    """Away from the zero-initialised output layer."""
    torch.manual_seed(0)
    sizes = dict(latent_channels=3, text_width=24, width=48, heads=4, groups=(2, 3, 2), base_grid=16)
    model = EMMDiT(ModelConfig(**{**sizes, **choices}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def inputs(
    batch: int = 2, grid: tuple[int, int] = (16, 16)
) -> tuple[torch.Tensor, torch.Tensor, TextEmbedding]:
    torch.manual_seed(1)
    return torch.randn(batch, 3, *grid), torch.rand(batch), as_text(torch.randn(batch, 16, 24))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


# ---- against the plain implementation


@pytest.mark.parametrize("grid", [(16, 16), (16, 32)], ids=str)
def test_velocity_and_gradients_are_the_plain_ones(grid):
    """Every gradient, under its released name."""
    model = tiny()
    x, t, text = inputs(grid=grid)
    state = {name: tensor.requires_grad_() for name, tensor in released.to_released(model).items()}
    plain = PlainEMMDiT(state, heads=4, groups=(2, 3, 2))(x, t, text.tokens)
    ours = model(x, t, text)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)

    upstream = torch.randn_like(plain)
    plain.backward(upstream)
    ours.backward(upstream)
    for parameter in model.parameters():
        parameter.data = parameter.grad  # so that the converter gives the gradients their released names
    for name, gradient in released.to_released(model).items():
        if name == released.POSITION_TABLE:
            continue
        if gradient.any():
            assert relative(gradient, state[name].grad) < 1e-5, name
        else:  # the queries of the last block's text, which nothing reads
            assert not state[name].grad.any() and ("add_q_proj" in name or "norm_added_q" in name)


def test_the_plain_one_is_the_released_one(reference, released_state):
    plain = PlainEMMDiT(released_state, heads=_heads(released_state), groups=_groups(released_state))
    velocity = plain(reference["in.latents"], reference["in.timesteps"] / 1000, reference["in.text"])
    assert (velocity - reference["out.velocity"]).abs().max() < 1e-5


def _heads(state) -> int:
    return len(state["pos_embed.proj.bias"]) // len(state["block_groups.0.0.attn.norm_q.weight"])


def _groups(state) -> tuple[int, ...]:
    names = {tuple(name.split(".")[1:3]) for name in state if name.startswith("block_groups.")}
    return tuple(sum(group == str(g) for group, _ in names) for g in range(3))


# ---- attention


@pytest.mark.parametrize("chunk", ["everything", "one row and more", "part of a row", "a single query"])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "computed again"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
def test_attention_in_chunks(monkeypatch, chunk, keep, masked):
    """Values and gradients are those of scaled_dot_product_attention, however the scores are cut."""
    batch, heads, tokens = 2, 3, 21
    row = tokens**2 * 8  # bytes of float64 scores
    budget = {
        "everything": 1 << 20,
        "one row and more": 2 * row,
        "part of a row": row // 4,
        "a single query": 1,
    }[chunk]
    monkeypatch.setattr(attention, "CHUNK_BYTES", budget)
    monkeypatch.setattr(attention, "KEEP_BYTES", 1 << 20 if keep else 0)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, heads, tokens, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    visible = torch.rand(batch, tokens) > 0.4 if masked else None
    visible_keys = None if visible is None else visible[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_keys)
    upstream = torch.randn_like(expected)

    out = layers.attend(q, k, v, visible)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(result, (q, k, v), upstream) for result in (out, expected))
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        assert torch.equal(layers.attend(q, k, v, visible), out)


def test_attention_keeps_few_weights_only(monkeypatch):
    """What backward keeps besides q, k, v: nothing above KEEP_BYTES, nothing without gradients."""
    q = torch.randn(1, 2, 8, 4, requires_grad=True)
    for keep, training, kept in ((512, True, 512), (511, True, 0), (512, False, 0)):
        monkeypatch.setattr(attention, "KEEP_BYTES", keep)
        with torch.set_grad_enabled(training):
            weights = attention.attend_in_chunks(q, q, q, None, torch.is_grad_enabled())[1]
        assert weights.numel() * 4 == kept


def test_attention_operator_is_well_formed():
    """Fake shapes, autograd registration and aliasing, by torch's own checks."""
    arguments = tuple(torch.randn(2, 2, 6, 4, requires_grad=True) for _ in range(3))
    visible = torch.rand(2, 6) > 0.3
    visible[:, 0] = True
    for mask in (None, visible):
        torch.library.opcheck(attention.attend_in_chunks, (*arguments, mask, True))


# ---- packing


def bfloat16(**choices) -> EMMDiT:
    return tiny(width=64, heads=2, **choices).bfloat16().eval()


needs_bf16 = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN has no bfloat16 on this processor",
)


@needs_bf16
@pytest.mark.parametrize(
    "choices",
    [
        {},
        dict(
            compression=(), position_reinforcement=False, modulation="full", text_mask="real", qk_norm=False
        ),
    ],
    ids=["released", "ablated"],
)
@torch.no_grad()
def test_packed_model_gives_the_same_velocity(choices):
    model = bfloat16(**choices)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = pack_for_cpu(model)
    exact = copy.deepcopy(model).float()
    for batch in (1, 3):
        x, t, text = inputs(batch)
        expected = exact(x, t, text)
        assert relative(packed(x, t, text), expected) < 2 * relative(model(x, t, text), expected) < 4e-2
    assert not any(isinstance(module, (nn.Linear, nn.GELU)) for module in packed.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    another = copy.deepcopy(packed)
    del packed
    assert relative(another(x, t, text), expected) < 4e-2


@needs_bf16
@torch.no_grad()
def test_packed_layer_is_linear_and_gelu():
    torch.manual_seed(0)
    linear = nn.Linear(40, 72).bfloat16()
    x = torch.randn(3, 7, 40).bfloat16()
    torch.testing.assert_close(PackedLinear(linear, gelu=False)(x), linear(x), rtol=2e-2, atol=2e-2)
    expected = F.gelu(linear(x), approximate="tanh")
    torch.testing.assert_close(PackedLinear(linear, gelu=True)(x), expected, rtol=2e-2, atol=2e-2)


@needs_bf16
def test_what_cannot_be_packed_is_refused():
    packed = pack_for_cpu(bfloat16())
    with pytest.raises(ConfigError, match="already packed"):
        pack_for_cpu(packed)
    with pytest.raises(ConfigError, match="cannot be saved"):
        packed.state_dict()
    with pytest.raises(ConfigError, match="only bfloat16 is packed"):
        pack_for_cpu(tiny())
    with torch.device("meta"), pytest.raises(ConfigError, match="is on meta"):
        pack_for_cpu(tiny().bfloat16())


# ---- torch.compile


def test_compiled_blocks_are_whole_graphs_and_keep_their_names(monkeypatch):
    """The eager backend traces only; `fullgraph` raises at any graph break. One graph per kind of block."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny(groups=(2, 1, 2), attention=("full",))
    names, arguments = list(model.state_dict()), inputs()
    expected = model(*arguments)
    expected.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model.compile_blocks(backend=backend)
    for _ in range(2):
        compiled = model(*arguments)
    assert len(graphs) == 3  # three blocks on the full grid share one; the one inside; the last
    compiled.sum().backward()
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        [parameter.grad for parameter in model.parameters()], gradients, rtol=1e-4, atol=1e-4
    )
    assert list(model.state_dict()) == names


@needs_bf16
@torch.no_grad()
def test_packed_blocks_share_graphs():
    torch._dynamo.reset()
    graphs = []
    packed = pack_for_cpu(bfloat16(groups=(2, 1, 2), attention=("full",)))
    expected = packed(*inputs())
    packed.compile_blocks(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert torch.equal(packed(*inputs()), expected) and len(graphs) == 3


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_step(checkpointing):
    """Through inductor: forward, backward, with and without gradient checkpointing."""
    torch._dynamo.reset()
    model = tiny(groups=(1, 1, 1))
    model(*inputs()).square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing = checkpointing
    model.compile_blocks()
    model(*inputs()).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
