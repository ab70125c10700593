"""The fast ways of computing: attention in chunks, packed linear layers, compiled blocks; all against the plain way.

Nothing here is timed; `tools/benchmark.py model` is for that.
"""

import copy
import json
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import as_text
from torch import nn

from nitro_e.cli.benchmark import sample as benchmark_sample
from nitro_e.cli.benchmark.plain_emmdit import PlainEMMDiT
from nitro_e.config import ConfigError
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import EMMDiT, ModelConfig, layers, released
from nitro_e.model.cpu import attention
from nitro_e.model.cpu.int8 import Int8Linear
from nitro_e.model.cpu.packing import PackedLinear, fastest_weights, pack_for_cpu
from nitro_e.sampling.caching import ReusedBlocks
from nitro_e.sampling.samplers import SamplingConfig


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
@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
@torch.no_grad()
def test_packed_model_gives_the_same_velocity(choices, weights):
    model = bfloat16(**choices)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = pack_for_cpu(model, weights)
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
    # in float32 nothing is rounded but the result
    exact = F.gelu(F.linear(x.float(), linear.weight.float(), linear.bias.float()), approximate="tanh")
    in_float32 = PackedLinear(linear, gelu=True, dtype=torch.float32)(x)
    torch.testing.assert_close(in_float32, exact.bfloat16(), rtol=2**-8, atol=1e-4)


@needs_bf16
def test_the_fastest_products_are_found_without_touching_the_random_state(monkeypatch):
    state = torch.get_rng_state()
    for slower in ("bfloat16", "float32"):
        fastest_weights.cache_clear()
        name = {"bfloat16": torch.bfloat16, "float32": torch.float32}[slower]
        plain = PackedLinear.product

        def product(layer, x, plain=plain, name=name):
            if layer.dtype == name:
                sum(range(2_000_000))  # a tenth of a second
            return plain(layer, x)

        with monkeypatch.context() as patch:
            patch.setattr(PackedLinear, "product", product)
            assert fastest_weights() != slower
    fastest_weights.cache_clear()
    assert torch.equal(torch.get_rng_state(), state)


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


# ---- 8-bit weights


needs_int8 = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="this processor has no 8-bit products"
)


def by_hand(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Round weights per output channel and x per token to 255 levels, and compute the layer in float64."""

    def rounded(values: torch.Tensor) -> torch.Tensor:
        scale = values.abs().amax(-1, keepdim=True) / 127
        return (values / scale).round() * scale

    weight, bias = linear.weight.double(), linear.bias.double()
    return F.linear(rounded(x.double()), rounded(weight), bias)


@needs_bf16
@needs_int8
@torch.no_grad()
@pytest.mark.parametrize("shape", [(7, 40), (3, 7, 40), (1, 40)], ids=str)
def test_int8_layer_is_the_rounded_one(shape):
    torch.manual_seed(0)
    linear = nn.Linear(40, 72).bfloat16()
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[-2])[:, None]  # each token has a size of its own
    x[..., -1, :] = 0  # a token of zeros is none that divides by zero
    x = x.bfloat16()
    ours, exact = Int8Linear(linear)(x), linear.double()(x.double())
    assert ours.dtype == torch.bfloat16 and ours.shape == (*shape[:-1], 72)
    expected = by_hand(linear, x).where(x.any(-1, keepdim=True), linear.bias)
    for ours_row, expected_row in zip(ours.flatten(0, -2), expected.flatten(0, -2)):
        assert relative(ours_row, expected_row) < 1e-2  # bfloat16 rounding
    assert relative(ours, exact) < 2e-2


@needs_bf16
@needs_int8
@torch.no_grad()
def test_int8_model_is_near_the_exact_one():
    """Only the linear layers of the blocks are in 8 bits, and the error is a few times that of bfloat16."""
    model = bfloat16()
    packed = pack_for_cpu(model, weights="int8")
    in_int8 = {name for name, module in packed.named_modules() if isinstance(module, Int8Linear)}
    assert in_int8 == {layer.path for layer in model.adapter_layers()}
    assert not any(isinstance(module, nn.Linear) for module in packed.modules())
    exact = copy.deepcopy(model).float()
    for batch in (1, 3):
        x, t, text = inputs(batch)
        expected = exact(x, t, text)
        in_bfloat16 = relative(model(x, t, text), expected)
        assert in_bfloat16 < relative(packed(x, t, text), expected) < max(4 * in_bfloat16, 4e-2)


@needs_bf16
@needs_int8
def test_int8_refuses_what_it_cannot_do(monkeypatch):
    packed = pack_for_cpu(bfloat16(), weights="int8")
    with pytest.raises(ConfigError, match="already packed"):
        pack_for_cpu(packed, weights="int8")
    with pytest.raises(ConfigError, match="cannot be saved"):
        packed.state_dict()
    x, t, text = inputs()
    with pytest.raises(ConfigError, match="no derivatives"):
        packed(x.requires_grad_(), t, text)
    with pytest.raises(ConfigError, match="unknown 'int4'"):
        pack_for_cpu(bfloat16(), weights="int4")
    with pytest.raises(ConfigError, match="only bfloat16 is packed"):
        pack_for_cpu(tiny(), weights="int8")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ConfigError, match="no AVX-512 VNNI"):
        pack_for_cpu(bfloat16(), weights="int8")


@pytest.mark.slow
@needs_bf16
@needs_int8
@torch.no_grad()
def test_int8_blocks_share_graphs():
    torch._dynamo.reset()
    graphs = []
    packed = pack_for_cpu(bfloat16(groups=(2, 1, 2), attention=("full",)), weights="int8")
    expected = packed(*inputs())
    packed.compile_blocks(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert torch.equal(packed(*inputs()), expected) and len(graphs) == 3


# ---- blocks that are reused between steps


@torch.no_grad()
def test_reused_blocks():
    """1 is no reuse; with 2 the compressed blocks are computed at every second call, and again where a path begins."""
    model = tiny()
    x, _, text = inputs()
    times = [torch.full((2,), t) for t in (1.0, 0.7, 0.5, 0.2, 1.0, 0.8)]
    always, second = ReusedBlocks(model, 1), ReusedBlocks(model, 2)
    exact = [model(x, t, text) for t in times]
    assert all(torch.equal(always(x, t, text), expected) for t, expected in zip(times, exact))
    same = [torch.equal(second(x, t, text), expected) for t, expected in zip(times, exact)]
    assert same == [True, False, True, False, True, False]
    # drawings of one step, as a search of noise has them: each begins anew
    assert all(torch.equal(second(x, times[0], text), exact[0]) for _ in range(3))
    assert not torch.equal(second(x, times[5], text), exact[5])
    # a constant input at equal times: what is reused is what would have been computed
    torch.testing.assert_close(second(x, times[-1], text), exact[-1])
    torch.testing.assert_close(second(x, times[-1], text), exact[-1], rtol=1e-4, atol=1e-5)
    # other rows, as where guidance ends: nothing to reuse
    half = x[:1], times[1][:1], text.take([0])
    torch.testing.assert_close(second(*half), model(*half), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="only an E-MMDiT with compressed blocks"):
        ReusedBlocks(tiny(groups=(2, 0, 2)), 2)
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        ReusedBlocks(model, 0)


# ---- the benchmark of sampling


@torch.no_grad()
def test_plain_loop_samples_the_same():
    """In float32 the benchmark's plain loop and ours end in the same latents."""
    parts = benchmark_sample.Parts(tiny(), None, None, SamplingConfig(resolution=16, guidance_scale=3.0))
    options = benchmark_sample.parse(["--steps", "3", "--device", "cpu"])
    bench = benchmark_sample.Bench(parts, options)
    bench.model, bench.denoisers, bench.fastest, bench.in_int8 = tiny().eval(), {}, "ours", None
    bench.denoisers["ours"] = bench.model
    x, _, text = inputs()
    calls = bench._loops(text.cat(text.take([0])), x)
    for way in ("ours", "ours, padding merged"):
        torch.testing.assert_close(calls[way](), calls["plain"](), rtol=1e-4, atol=1e-4)


def test_ways_that_a_processor_does_not_have_are_not_measured(monkeypatch, capsys):
    monkeypatch.setattr("nitro_e.model.cpu.packing.has_bfloat16_products", lambda: False)
    fastest_weights.cache_clear()
    parts = benchmark_sample.Parts(tiny(), None, None, SamplingConfig(resolution=16))
    bench = benchmark_sample.Bench(parts, benchmark_sample.parse(["--device", "cpu"]))
    assert (bench.fastest, bench.in_int8) == ("ours", None)
    assert (
        "ours, packed: not measured: pack_for_cpu: this processor has no AVX-512" in capsys.readouterr().err
    )


@needs_bf16
def test_benchmark_of_sampling(tmp_path):
    arguments = ["--shapes", "--steps", "2", "--rounds", "1", "--seconds", "0", "--device", "cpu"]
    assert benchmark_sample.main([*arguments, "--json", str(tmp_path / "speed.json")]) == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    assert {row["part"] for row in found["rows"]} == {"text", "denoise", "decode", "all"}
    assert all(row["seconds"] > 0 and row["times_as_fast_as_plain"] > 0 for row in found["rows"])
    whole = next(row for row in found["rows"] if (row["part"], row["way"]) == ("all", "plain"))
    parts = [row["seconds"] for row in found["rows"] if row["way"] == "plain" and row is not whole]
    assert whole["seconds"] == pytest.approx(sum(parts)) and len(parts) == 3
    assert benchmark_sample.main([*arguments, "--part", "text", "--json", str(tmp_path / "text.json")]) == 0
    found = json.loads((tmp_path / "text.json").read_text())
    assert {row["part"] for row in found["rows"]} == {"text"}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the switches are those of x86")
def test_a_processor_without_avx512_draws_in_float32():
    """oneDNN and torch are told to see no AVX-512, in a process of its own."""
    code = "from nitro_e.evaluation.evaluate import default_dtype as of; print(of('cpu'), of('cuda'))"
    switches = {"DNNL_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | switches, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["float32", "bfloat16"]
