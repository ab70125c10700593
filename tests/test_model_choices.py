"""What the choices of `ModelConfig` that the paper does not have compute, by formulas and by slower code."""

import dataclasses

import pytest
import torch
from test_ablations import build, inputs, perturb
from torch import Tensor

from nitro_e.config import ConfigError
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import EMMDiT, ModelConfig, describe, layers, released
from nitro_e.model.cpu.packing import pack_for_cpu
from nitro_e.model.prediction import PredictData, PredictVelocity
from nitro_e.sampling import flow
from nitro_e.sampling.caching import ReusedBlocks
from nitro_e.sampling.flow import time_grid
from nitro_e.sampling.samplers import euler, guide, scale_time
from nitro_e.sharing import programs

# one after the other, and what the released format says to it
CHOICES: list[dict] = [
    dict(text_compression=2),
    dict(path_drop=0.1),
    dict(prediction="data"),
    dict(value_residual=True, groups=[2, 2, 2]),
    dict(norm="rms"),
    dict(mlp="swiglu"),
]


def name(choices: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in choices.items())


def gradients(model: EMMDiT) -> dict[str, Tensor]:
    model.zero_grad()
    model(*inputs(model.config)).square().sum().backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("choices", CHOICES, ids=name)
def test_checkpointing_gives_the_same_gradients(choices):
    model = perturb(build(**choices))
    expected = gradients(model)
    model.gradient_checkpointing = True
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[key], msg=key)


@pytest.mark.parametrize("choices", CHOICES, ids=name)
def test_packing_for_a_cpu_keeps_the_velocity(choices):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no AVX-512")
    model = perturb(build(**choices)).eval()
    with torch.no_grad():
        expected = model(*inputs(model.config))
        error = pack_for_cpu(model.bfloat16())(*inputs(model.config)).float() - expected
    assert error.norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("choices", CHOICES, ids=name)
def test_the_released_format_refuses_it_by_name(choices):
    for key, value in choices.items():
        if key == "groups":
            continue
        with pytest.raises(ConfigError, match=f"the released format has {key} .* only; this model has"):
            released.check_representable(dataclasses.replace(ModelConfig(), **{key: value}))


# ---- text_compression


def test_means_of_runs_are_a_case_of_pooling():
    compressor = layers.TextCompressor(6, 4, hide_padding=False)
    with torch.no_grad():
        compressor.pool.weight.copy_(torch.eye(6).repeat(1, 4) / 4)
        compressor.pool.bias.zero_()
        text = torch.randn(2, 8, 6)
        pooled = compressor(text, torch.ones(2, 8, dtype=torch.bool))
    torch.testing.assert_close(pooled, text.view(2, 2, 4, 6).mean(2))


def test_text_leaves_the_compressed_part_as_it_came_at_first():
    model = build(text_compression=2)
    saved, pooled, text = torch.randn(2, 8, 16), torch.randn(2, 4, 16), torch.randn(2, 4, 16)
    assert torch.equal(model.restore_text(text, pooled, saved), saved)
    torch.nn.init.eye_(
        model.restore_text.spread.weight
    )  # the first of two rows takes the change, the other nothing
    restored = model.restore_text(text, pooled, saved).detach()
    torch.testing.assert_close(restored[:, 0::2], saved[:, 0::2] + text - pooled)
    assert torch.equal(restored[:, 1::2], saved[:, 1::2])


def test_the_gradient_reaches_every_row_of_pooled_text():
    model = perturb(build(text_compression=4, attention=["full"]))
    x, t, text = inputs(model.config)
    tokens = text.tokens.requires_grad_()
    model(x, t, text).square().sum().backward()
    assert tokens.grad.abs().amax(2).min() > 0


def test_padding_that_is_hidden_is_not_pooled_either():
    model = perturb(build(text_compression=4, attention=["full"], text_mask="real"))
    x, t, text = inputs(model.config)  # 8 and 3 real rows of 8
    other = torch.where(text.mask[..., None], text.tokens, text.tokens + 1)
    with torch.no_grad():
        velocity = model(x, t, text)
        torch.testing.assert_close(model(x, t, TextEmbedding(other, text.mask)), velocity)
        # a pooled row that holds a real one is seen: the third row counts, the second half does not
        cut = TextEmbedding(text.tokens, text.mask & (torch.arange(8) < 2))
        assert (model(x, t, cut) - velocity).abs().max() > 1e-4


def test_what_pooled_text_saves_and_costs():
    plain, pooled = ModelConfig(), ModelConfig(text_compression=4)
    d = plain.width
    maps = 2 * 32 * (4 * d * d) * 2
    assert (describe.total(pooled).flops - maps) / describe.total(plain).flops == pytest.approx(
        0.769, abs=0.01
    )
    assert describe.total(pooled).parameters - describe.total(plain).parameters == 8 * d * d + 5 * d
    inside = next(part for part in describe.parts(pooled) if part.name == "blocks inside")
    assert (inside.image_tokens, inside.text_tokens) == (80, 32)


def test_text_lengths_that_cannot_be_pooled_are_refused_with_the_nearest():
    config = ModelConfig(text_compression=4)  # 4 x 4 x 4: the pooled rows are dealt out by the pattern 4x4
    config.check_text_length(128)
    with pytest.raises(ConfigError, match=r"text_compression 4 needs multiples of 64 tokens.* 64 or 128"):
        config.check_text_length(96)
    with pytest.raises(ConfigError, match="text_compression needs blocks inside"):
        ModelConfig(text_compression=2, groups=(4, 0, 4))


# ---- prediction: data


def path(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    data, noise = torch.randn(2, len(t), 3, 4, 4, dtype=torch.float64)
    return data, noise, flow.interpolate(data, noise, t)


def test_the_data_gives_the_true_velocity_and_no_loss():
    t = torch.tensor([0.05, 0.3, 1.0], dtype=torch.float64)
    data, noise, x = path(t)
    predict = PredictData(0.05)
    velocity = predict.velocity(data, x, t)
    torch.testing.assert_close(velocity, noise - data, rtol=0, atol=1e-6)
    torch.testing.assert_close(predict.target(noise - data, t), velocity, rtol=0, atol=1e-12)


def test_the_loss_is_the_error_of_data_over_t_squared():
    t = torch.tensor([0.0, 0.01, 0.3, 1.0], dtype=torch.float64)
    data, noise, x = path(t)
    predict, out = PredictData(0.05), torch.randn_like(x)
    loss = (predict.velocity(out, x, t) - predict.target(noise - data, t)).square().flatten(1).mean(1)
    expected = (out - data).square().flatten(1).mean(1) / t.clamp(min=0.05) ** 2
    torch.testing.assert_close(loss, expected)


def test_both_predictions_have_the_same_optimum():
    """Of Gaussian data, where the best prediction is affine in x: the conditional mean of the velocity."""
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 200_000, 1, 1, 1, dtype=torch.float64, generator=generator)
    data = 0.5 * data + 2
    for value in (0.1, 0.4, 0.9):
        t = torch.full((len(data),), value, dtype=torch.float64)
        x = flow.interpolate(data, noise, t)
        inputs = torch.cat([x.flatten(1), torch.ones(len(x), 1)], dim=1)
        fits = []
        for predict in (PredictVelocity(), PredictData(0.05)):
            # velocities are affine in what the layer gives: two evaluations tell how
            start = predict.velocity(torch.zeros_like(x), x, t).flatten(1)
            slope = predict.velocity(torch.ones_like(x), x, t).flatten(1) - start
            target = predict.target(noise - data, t).flatten(1)
            out = inputs @ torch.linalg.lstsq(inputs, (target - start) / slope).solution
            fits.append(start + slope * out)
        torch.testing.assert_close(fits[0], fits[1])
        mean = (1 - value) * 2
        variance = (1 - value) ** 2 * 0.25 + value**2
        exact = -2 + (value - (1 - value) * 0.25) / variance * (x.flatten(1) - mean)
        torch.testing.assert_close(fits[1], exact, rtol=0, atol=0.03)


def test_euler_ends_at_predicted_data():
    data, predict = torch.randn(2, 3, 4, 4), PredictData(0.05)
    velocity = lambda x, t: predict.velocity(data, x, t)  # noqa: E731
    end = euler(velocity, torch.randn(2, 3, 4, 4), time_grid(20, "linear"))
    torch.testing.assert_close(end, data, rtol=0, atol=1e-6)


def test_the_model_is_the_same_but_for_what_its_last_layer_means():
    velocity, data = perturb(build()), build(prediction="data")
    data.load_state_dict(velocity.state_dict())
    x, t, text = inputs(data.config)
    with torch.no_grad():
        expected = (x - velocity(x, t, text)) / t.clamp(min=0.05)[:, None, None, None]
        assert torch.equal(data(x, t, text), expected)


# ---- path_drop


def test_a_dropped_row_does_not_know_the_compressed_blocks():
    """Neither their weights nor their gradients; the other row is what it is without path_drop."""
    model = perturb(build(path_drop=0.1, text_compression=2))
    arguments = inputs(model.config)
    velocity, _ = model.forward_intermediates(*arguments, drop=torch.tensor([True, False]))
    inside = [p for name, p in model.named_parameters() if name.startswith(("blocks.1.", "compress"))]
    velocity[0].square().sum().backward(retain_graph=True)
    assert not any(p.grad.any() for p in inside) and model.drop_tokens.absent.grad.any()
    model.zero_grad()
    velocity[1].square().sum().backward()
    assert inside[-1].grad.any() and not model.drop_tokens.absent.grad.any()
    plain = build(text_compression=2)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "drop_tokens.absent"})
    with torch.no_grad():
        torch.testing.assert_close(velocity[1], plain(*arguments)[1])


def test_the_weak_pass_is_that_of_dropped_rows_without_the_blocks():
    model = perturb(build(path_drop=0.1, text_compression=2))
    arguments = inputs(model.config)
    calls = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    with torch.no_grad():
        dropped, _ = model.forward_intermediates(*arguments, drop=torch.ones(2, dtype=torch.bool))
        calls.clear()
        torch.testing.assert_close(model.weak(*arguments), dropped)
    assert calls == [0, 2]
    with pytest.raises(ConfigError, match="need weights that were trained with model.path_drop"):
        build().weak(*arguments)


def test_a_step_guided_by_the_path_costs_one_pass_and_the_outer_blocks():
    model = perturb(build(path_drop=0.1))
    x, t, text = inputs(model.config)
    other = text.take([1, 0])
    calls = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        for kind, weak_text in (("path", text), ("both", other)):
            calls.clear()
            guided = guide(model, text, other, 3.0, kind=kind)(x, t)
            assert len(calls) == 3 + 2
            weak = model.weak(x, t, weak_text)
            torch.testing.assert_close(guided, weak + 3 * (model(x, t, text) - weak))
            calls.clear()
            assert torch.equal(guide(model, text, other, 1.0, kind=kind)(x, t), model(x, t, text))
            assert len(calls) == 3 + 3
        for step in (ReusedBlocks(model, 1), scale_time(model, 0.5)):
            now = t if isinstance(step, ReusedBlocks) else t / 0.5
            again = guide(step, text, other, 3.0, kind="both")(x, now)
            torch.testing.assert_close(again, guided)
    share = describe.weak_pass(ModelConfig(path_drop=0.1))
    assert share == pytest.approx(0.5, abs=0.01)


def test_path_drop_needs_a_path():
    for choices in (dict(compression=(), position_reinforcement=False), dict(groups=(4, 0, 4))):
        with pytest.raises(ConfigError, match="path_drop needs compression and blocks inside"):
            ModelConfig(path_drop=0.1, **choices)


# ---- value_residual


def test_shares_of_zero_are_none_and_of_one_take_the_first_blocks_values():
    off = perturb(build(groups=[2, 3, 2]))
    on = build(groups=[2, 3, 2], value_residual=True)
    shares = [name for name, _ in on.named_parameters() if name.endswith("values.share")]
    assert [name.split(".")[1] for name in shares] == ["1", "3", "4", "6"]  # not the first of a group
    assert all((on.get_parameter(name) == 0.5).all() for name in shares)
    on.load_state_dict({**off.state_dict(), **{name: torch.zeros(2) for name in shares}})
    arguments = inputs(on.config)
    with torch.no_grad():
        assert torch.equal(on(*arguments), off(*arguments))
        for name in shares:
            on.get_parameter(name).fill_(1.0)
        seen = {}
        for index, block in enumerate(on.blocks):
            block.values.register_forward_hook(
                lambda _, given, out, index=index: seen.update({index: (out[0][2], out[1][2])})
            )
        on(*arguments)
    for group in ([0, 1], [2, 3, 4], [5, 6]):
        for index in group[1:]:
            assert all(torch.equal(ours, first) for ours, first in zip(seen[index], seen[group[0]]))


@pytest.mark.slow
def test_compiled_blocks_mix_values_alike():
    torch._dynamo.reset()
    model = perturb(build(value_residual=True, groups=[2, 2, 2]))
    expected = gradients(model)
    model.compile_blocks(backend="aot_eager")
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-4, msg=key)


# ---- norm: rms, mlp: swiglu


def test_rms_norm_and_swiglu_by_their_formulas():
    design = layers.Design(16, 2, 32, "affine", True, "rms", "swiglu")
    stream = layers.Stream(design)
    x = torch.randn(2, 8, 16)
    weight = torch.nn.init.normal_(stream.attention.norm.weight)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(stream.attention.norm(x), expected)
    torch.testing.assert_close(torch.func.vmap(stream.attention.norm)(x), expected)
    first, second = stream.mlp[0], stream.mlp[2]
    gate, value = torch.nn.functional.linear(x, first.weight, first.bias).split(32, dim=-1)
    expected = torch.nn.functional.linear(gate * gate.sigmoid() * value, second.weight, second.bias)
    torch.testing.assert_close(stream.mlp(x), expected)
    assert first.parts == 2  # Muon can take gate and values apart


def test_swiglu_costs_what_gelu_does_and_rms_norm_has_no_biases():
    plain, gated, rms = (describe.total(ModelConfig(**c)) for c in ({}, {"mlp": "swiglu"}, {"norm": "rms"}))
    assert gated.flops == plain.flops
    assert plain.parameters - rms.parameters == 48 * 768  # of the 48 norms before attention
    streams, hidden = 47, 2304
    assert gated.parameters - plain.parameters == streams * hidden // 3  # biases: 2 x 2/3 instead of 1


def test_adapters_name_the_layers_of_a_swiglu():
    model = build(mlp="swiglu", norm="rms")
    for layer in model.adapter_layers():
        assert isinstance(model.get_submodule(layer.path), torch.nn.Linear)


# ---- init: released


def test_first_weights_as_released_are_torchs_own():
    """Uniform within 1 / sqrt(inputs), biases too; DiT's are 1.2 to 2.1 times as large."""
    released_start, dit = (build(width=96, heads=3, init=init) for init in ("released", "dit"))
    ratios = []
    for name, module in released_start.named_modules():
        if isinstance(module, torch.nn.Linear):
            bound = module.in_features**-0.5
            for part in (module.weight, module.bias):
                assert part.abs().max() <= bound and part.any(), name
            if name.startswith("blocks.0"):
                assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
                ratios.append((dit.get_submodule(name).weight.std() / module.weight.std()).item())
    assert 1.15 < min(ratios) and max(ratios) < 2.2
    table = released_start.blocks[0].image.modulation.scale
    assert table.std().item() == pytest.approx(96**-0.5, rel=0.15)  # as with the other start


# ---- all of them


@pytest.mark.slow
def test_all_of_them_in_one_exported_program():
    """As `nitro-e export --torch` and `--onnx` trace the model."""
    model = perturb(
        build(
            text_compression=2,
            path_drop=0.1,
            prediction="data",
            value_residual=True,
            norm="rms",
            mlp="swiglu",
            groups=[2, 2, 2],
        )
    ).eval()
    x, t, text = inputs(model.config, batch=2)
    part = programs.Part("all", programs.Velocity(model, 1.0), {"x": x, "t": t, **text._asdict()}, "velocity")
    with torch.no_grad():
        program = programs.trace(part).module()
        torch.testing.assert_close(
            program(x[:1], t[:1], *text.take([0])), model(x, t, text)[:1], rtol=1e-4, atol=1e-4
        )
