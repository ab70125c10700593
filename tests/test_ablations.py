"""Every choice of `ModelConfig`: it builds, trains every parameter, saves, loads and samples; what is off is not there.

The full product of the choices that change the graph (168 models), then each remaining choice on its own.
"""

import ast
import dataclasses
import inspect
import itertools

import pytest
import torch

from nitro_e.config import ConfigError, from_dict, to_dict
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import EMMDiT, ModelConfig, emmdit, layers
from nitro_e.model.pretrained import load_pretrained, save_pretrained
from nitro_e.sampling.samplers import SamplingConfig, euler, guide

MICRO = dict(
    latent_channels=3, text_width=5, width=16, heads=2, groups=[1, 1, 1], base_grid=8, position_table=16
)
CYCLE = ["full", "4x1", "2x2"]

COMPRESSION = [([], False), *itertools.product([[2], [4], [2, 4]], [True, False])]
PRODUCT = [
    dict(
        compression=compression,
        position_reinforcement=reinforce,
        modulation=modulation,
        attention=attention,
        qk_norm=qk_norm,
        text_mask=text_mask,
    )
    for (compression, reinforce), modulation, attention, qk_norm, text_mask in itertools.product(
        COMPRESSION, ["affine", "single", "full"], [CYCLE, ["full"]], [True, False], ["none", "real"]
    )
]
ALONE = [
    *(
        dict(gate_init=gate, modulation=kind)
        for gate in ("random", "zero", "one")
        for kind in ("affine", "single", "full")
    ),
    dict(compression=[2, 8], base_grid=16, width=64),
    dict(compression=[4, 8], base_grid=16, width=64),
    dict(compression=[2, 4, 8], base_grid=16, width=64),
    dict(compression=[4, 2]),
    dict(compression=[3], base_grid=6, width=36),
    dict(attention=["2x2"]),
    dict(attention=["4x1", "2x1", "1x4"]),
    dict(attention=["1x1", "2x2"]),
    dict(groups=[0, 2, 1]),
    dict(groups=[0, 0, 1]),
    dict(groups=[3, 0, 2]),
    dict(groups=[1, 1, 3]),
    dict(heads=1),
    dict(heads=16),
    dict(width=20, compression=[2]),
    dict(mlp_ratio=0.5),
    dict(mlp_ratio=2.7),
    dict(patch_size=2, base_grid=4, attention=["full"]),
    dict(position_table=8),
    dict(norm="rms"),
    dict(mlp="swiglu"),
    dict(init="released"),
    dict(value_residual=True, groups=[2, 2, 2]),
    dict(path_drop=0.1),
    dict(prediction="data"),
    dict(prediction="data", prediction_floor=0.5, patch_size=2, base_grid=4, attention=["full"]),
    dict(text_compression=2),
    dict(text_compression=4, attention=["full"], text_mask="real"),
    dict(text_compression=8, attention=["full"], compression=[], position_reinforcement=False),
    dict(time_input="t"),
    dict(interval=True),
]


def name(choices: dict) -> str:
    return "-".join(f"{key}={value}".replace(" ", "") for key, value in choices.items())


def build(**choices) -> EMMDiT:
    torch.manual_seed(0)
    return EMMDiT(from_dict(ModelConfig, {**MICRO, "attention": CYCLE, **choices}))


def inputs(config: ModelConfig, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, TextEmbedding]:
    generator = torch.Generator().manual_seed(1)
    side = config.base_grid * config.patch_size
    mask = torch.arange(8) < torch.tensor([[8], [3]])[:batch]
    text = TextEmbedding(torch.randn(batch, 8, config.text_width, generator=generator), mask)
    x = torch.randn(batch, config.latent_channels, side, side, generator=generator)
    return x, torch.rand(batch, generator=generator), text


def perturb(model: EMMDiT) -> EMMDiT:
    """Away from the zero-initialised output layer and gates, behind which gradients vanish."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def unread(model: EMMDiT) -> dict[str, slice]:
    """Rows that change nothing: the last block's text gives keys and values, its queries are never used; and what
    stands for the compressed blocks, where no row goes without them."""
    last = f"blocks.{len(model.blocks) - 1}.text"
    rows = slice(0, model.config.width)
    return {
        f"{last}.qkv.weight": rows,
        f"{last}.qkv.bias": rows,
        f"{last}.q_norm.weight": slice(None),
        "drop_tokens.absent": slice(None),
    }


@pytest.mark.parametrize("choices", PRODUCT + ALONE, ids=name)
def test_builds_trains_saves_loads_and_samples(choices, tmp_path):
    model = build(**choices)
    x, t, text = inputs(model.config)
    # the last layer gives zero at first
    expected = model.prediction.velocity(torch.zeros_like(x), x, t)
    zero = torch.equal(model(x, t, text), expected) and expected.any() == (model.config.prediction == "data")
    assert zero == (model.config.init == "dit")

    perturb(model)(x, t, text).square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and gradient.isfinite().all(), parameter_name
        rows = unread(model).get(parameter_name)
        if rows is not None:
            assert not gradient[rows].any(), parameter_name
            gradient = gradient[gradient[rows].shape[0] :]
        assert gradient.numel() == 0 or gradient.any(), parameter_name

    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded(x, t, text), model(x, t, text))
        null = TextEmbedding(torch.zeros_like(text.tokens), torch.ones_like(text.mask))
        images = euler(guide(loaded, text, null, 2.0), x, SamplingConfig(steps=2).times())
    assert images.shape == x.shape and images.isfinite().all()


def test_the_product_is_of_all_choices():
    """A new field of ModelConfig must be varied above or be named here."""
    varied = {key for choices in PRODUCT + ALONE for key in choices}
    assert {field.name for field in dataclasses.fields(ModelConfig)} - varied == {
        "kind",
        "latent_channels",
        "text_width",
        "policy",  # tests/test_distill_policy.py
    }


# ---- what is off has no parameters, and no branch


def keys(**choices) -> set[str]:
    return set(build(**choices).state_dict())


def test_what_is_off_has_no_parameters():
    everything = keys()
    assert not any(
        "press" in key or "reconstruct" in key for key in keys(compression=[], position_reinforcement=False)
    )
    assert not any("_norm" in key for key in keys(qk_norm=False)) and any(
        "q_norm" in key for key in everything
    )
    assert not any("shared" in key for key in keys(modulation="full"))
    assert everything - keys(modulation="single") == {
        key for key in everything if key.endswith("modulation.scale")
    }
    assert (
        keys(position_reinforcement=False) == everything == keys(text_mask="real") == keys(attention=["full"])
    )


def test_flags_are_not_branched_on_in_forward():
    """No `if` (or conditional expression) in any forward function names a field of the config."""
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    functions = 0
    for module in (layers, emmdit):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef) and node.name in (
                "forward",
                "forward_intermediates",
                "run_blocks",
                "before",
                "after",
            ):
                functions += 1
                for branch in ast.walk(node):
                    if isinstance(branch, (ast.If, ast.IfExp)):
                        names = {
                            part.attr for part in ast.walk(branch.test) if isinstance(part, ast.Attribute)
                        }
                        assert not names & fields, f"{node.name} branches on {names & fields}"
    assert functions > 15


# ---- what each choice does


@pytest.mark.parametrize("pattern, groups, run", [("4x1", 4, 1), ("2x2", 2, 2), ("4x4", 4, 4), ("1x4", 1, 4)])
def test_subregion_attention_is_masked_full_attention(pattern, groups, run):
    """Tokens i and j of either stream see each other if (i // run) % groups is the same."""
    torch.manual_seed(0)
    region = layers.Region.parse(pattern)
    image, text = ([torch.randn(2, count, 3, 4) for _ in range(3)] for count in (32, 16))
    index = torch.cat([torch.arange(32), torch.arange(16)])
    same = (index[:, None] // run % groups) == (index[None, :] // run % groups)
    q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(image, text))
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~same, -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    attended = torch.cat(layers.joint_attention(image, text, region, None), dim=1)
    torch.testing.assert_close(attended, expected, rtol=1e-5, atol=1e-5)


def test_real_text_mask_hides_padding_and_none_does_not():
    for kind, hidden in (("real", True), ("none", False)):
        model = perturb(build(text_mask=kind))
        x, t, text = inputs(model.config)
        other = torch.where(text.mask[..., None], text.tokens, text.tokens + 1)
        with torch.no_grad():
            same = torch.allclose(model(x, t, text), model(x, t, text._replace(tokens=other)), atol=1e-6)
        assert same == hidden


def test_position_reinforcement_is_the_second_addition_of_the_table():
    """With it off, adding the table after reconstruction by hand gives the model with it on."""
    on, off = build(), build(position_reinforcement=False)
    perturb(on)
    off.load_state_dict(on.state_dict())
    arguments = inputs(on.config)
    with torch.no_grad():
        assert (on(*arguments) - off(*arguments)).abs().max() > 1e-3
        off.reconstruct.register_forward_hook(
            lambda _, given, out: out + on.position.table[4:12, 4:12].reshape(64, -1)
        )
        torch.testing.assert_close(off(*arguments), on(*arguments), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("modulation", ["affine", "single", "full"])
def test_gate_init(modulation):
    """zero: blocks start as the identity; one: gates start around 1; random: around 0, but not at it."""
    gates = {}
    for kind in ("zero", "one", "random"):
        model = build(gate_init=kind, modulation=modulation, width=64)
        time = model.shared_modulation(model.time(torch.rand(64)))
        m = model.blocks[0].image.modulation(time)
        gates[kind] = torch.cat([m.gate_attention, m.gate_mlp]).detach().flatten()
    assert not gates["zero"].any()
    assert (
        abs(gates["one"].mean() - 1) < 0.1
        and abs(gates["random"].mean()) < 0.1
        and gates["random"].std() > 1e-3
    )


def test_zero_gates_make_every_block_the_identity():
    model = build(gate_init="zero", compression=[], position_reinforcement=False, groups=[2, 2, 2])
    _, taps = model.forward_intermediates(*inputs(model.config), taps=range(1, 7))
    assert all(torch.equal(tap, taps[0]) for tap in taps)


@pytest.mark.parametrize(
    "choices", [dict(modulation="affine"), dict(modulation="single"), dict(modulation="full")], ids=name
)
def test_parameter_counts(choices):
    """Closed forms, biases included."""
    d, hidden, k, c, text = 16, 48, 8, 3, 5
    model = build(**choices)
    shared, per_stream = {
        "affine": (d * 6 * d + 6 * d, 12 * d),
        "single": (d * 6 * d + 6 * d, 6 * d),
        "full": (0, 6 * d * d + 6 * d),
    }[choices["modulation"]]
    attention_input = 2 * d + 3 * d * d + 3 * d + 2 * k
    stream = per_stream + attention_input + d * d + d + 2 * d * hidden + hidden + d
    ends = (c * d + d) + (text * d + d) + (256 * d + d + d * d + d) + (d * c + c)
    paths = (
        sum((d * r * r) * d + d + d * d + d + (d // r**2) * d + d + d * d + d for r in (2, 4))
        + 3 * d * d
        + d
        + d * d
        + d
    )
    assert (
        sum(p.numel() for p in model.parameters())
        == ends + shared + paths + 2 * 2 * stream + stream + attention_input
    )


def test_config_survives_its_own_dump():
    for choices in PRODUCT + ALONE:
        config = (
            build(**choices).config
            if choices in ALONE
            else from_dict(ModelConfig, {**MICRO, "attention": CYCLE, **choices})
        )
        assert from_dict(ModelConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    "choices, message",
    [
        (dict(compression=[]), "position_reinforcement needs compression"),
        (dict(compression=[1]), r"compression\[0\] must be at least 2"),
        (dict(compression=[2, 2]), "the ratios must differ"),
        (dict(compression=[8]), "compression ratio 8 needs a width that is a multiple of 64, not 16"),
        (
            dict(compression=[3], width=36),
            r"8x8 tokens are not a multiple of compression ratio 3; the nearest that work: grid 6x6",
        ),
        (dict(attention=["4x4"]), "needs multiples of 16 tokens, but group 2 has 20"),
        (dict(attention=["4by4"]), "attention '4by4': expected 'full' or 'RxN' such as '4x1'"),
        (dict(attention=["0x4"]), "attention '0x4'"),
        (dict(attention=[]), "must name at least one pattern"),
        (dict(modulation="adaln"), "modulation: 'adaln' is not one of affine, single, full"),
        (dict(text_mask="some"), "text_mask: 'some' is not one of none, real"),
        (dict(gate_init="two"), "gate_init: 'two' is not one of"),
        (dict(heads=3), "width 16 is not a multiple of heads 3"),
        (dict(width=18, heads=2), "multiple of 4"),
        (dict(mlp_ratio=0), "mlp_ratio must be above 0"),
        (dict(groups=[1, 1, 0]), r"groups\[2\] must be at least 1"),
        (dict(groups=[1, 1]), "expected 3 values"),
        (dict(position_table=4), "position_table"),
    ],
    ids=str,
)
def test_nonsense_is_refused_with_the_reason(choices, message):
    with pytest.raises(ConfigError, match=message):
        build(**choices)


# ---- torch.compile


def test_forward_is_one_graph():
    """`fullgraph` raises at any graph break; the eager backend only traces."""
    torch._dynamo.reset()
    model = perturb(build())
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(*inputs(model.config)), model(*inputs(model.config)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [
        {},
        dict(
            compression=[], position_reinforcement=False, modulation="full", qk_norm=False, text_mask="real"
        ),
    ],
    ids=name,
)
def test_forward_and_backward_are_one_graph(choices):
    """With and without gradient checkpointing, through autograd's own tracing."""
    torch._dynamo.reset()
    model = perturb(build(**choices))
    arguments = inputs(model.config)
    model(*arguments).sum().backward()
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        compiled(*arguments).sum().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-5, msg=key)
