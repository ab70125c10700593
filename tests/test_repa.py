"""REPA's loss over taps, its projectors, the normalisation of features, and its end before that of the run."""

import copy
from types import SimpleNamespace

import pytest
import torch
from test_ablations import build, inputs, perturb
from torch.utils.flop_counter import FlopCounterMode

from nitro_e.config import ConfigError, from_dict
from nitro_e.interfaces import Batch
from nitro_e.randomness import SampleRandom
from nitro_e.sampling import flow
from nitro_e.stages.flow_matching import FlowMatching, FlowMatchingConfig
from nitro_e.stages.repa import ConvProjector, RepaConfig, alignment_loss, normalise_over_tokens, repa_loss

FEATURES = 6


def stage_of(steps: int = 10, model=None, **stage) -> FlowMatching:
    """Flow matching of a micro model of the tests; the data is only asked for its batch size and null prompt."""
    model = model or perturb(build())
    _, _, text = inputs(build().config)
    data = SimpleNamespace(
        config=SimpleNamespace(batch_size=2), fingerprint=dict, null_text=lambda: text.take([0])
    )
    config = from_dict(FlowMatchingConfig, {"kind": "flow_matching", **stage}, "stage")
    vision = SimpleNamespace(width=FEATURES)
    device = torch.device("cpu")
    return FlowMatching(config, model, data, None, None, vision, 0, device, 1.0, steps)


def batch_at(step: int, stage: FlowMatching) -> Batch:
    x, _, text = inputs(stage.model.config)
    features = torch.randn(2, 64, FEATURES, generator=torch.Generator().manual_seed(2))
    return Batch(x, text, ["a", "b"], ["0", "1"], features, step=step)


def loss_of(stage: FlowMatching, step: int = 0) -> tuple[torch.Tensor, dict]:
    rng = SampleRandom("test", first=0, count=2)
    return stage.loss(stage.phases[0].module, batch_at(step, stage), rng)


def test_one_tap_is_minus_the_mean_cosine_of_one_projector():
    stage = stage_of(repa={"taps": [1], "width": 8, "weight": 0.5}, caption_dropout=0)
    loss, logs = loss_of(stage)
    rng, batch = SampleRandom("test", first=0, count=2), batch_at(0, stage)
    noise, t = rng.normal(*batch.latents.shape[1:]), torch.sigmoid(rng.normal())
    x = flow.interpolate(batch.latents, noise, t)
    velocity, (tokens,) = stage.model.forward_intermediates(x, t, batch.text, [1])
    layers = stage.projected.projector
    hidden = torch.nn.functional.silu(layers[2](torch.nn.functional.silu(layers[0](tokens))))
    projected = layers[4](hidden)
    norms = projected.norm(dim=-1) * batch.features.norm(dim=-1)
    cosine = ((projected * batch.features).sum(-1) / norms).mean()
    expected = (velocity - (noise - batch.latents)).square().mean() - 0.5 * cosine
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logs["repa_loss"], -cosine)


def test_equal_taps_with_equal_projectors_give_the_loss_of_one():
    one = stage_of(repa={"taps": [1], "width": 8})
    two = stage_of(model=copy.deepcopy(one.model), repa={"taps": [1, 1], "width": 8})
    assert not torch.equal(two.projected.projector[0].weight, two.projected.projector1[0].weight)
    two.projected.projector1.load_state_dict(two.projected.projector.state_dict())
    torch.testing.assert_close(loss_of(two)[0], loss_of(one)[0])


def test_several_taps_are_averaged():
    projected, features = torch.randn(3, 2, 4, FEATURES), torch.randn(2, 4, FEATURES)
    expected = sum(repa_loss(tokens, features) for tokens in projected) / 3
    torch.testing.assert_close(alignment_loss(list(projected), features, RepaConfig()), expected)


def test_older_recipes_name_one_tap():
    assert from_dict(RepaConfig, {"tap": 3}).taps == (3,)
    with pytest.raises(ConfigError, match="both given"):
        from_dict(RepaConfig, {"tap": 3, "taps": [3]})
    with pytest.raises(ConfigError, match="at least one block count"):
        from_dict(RepaConfig, {"taps": []})


def test_normalised_features_have_no_mean_and_unit_deviation():
    features = 3 * torch.randn(2, 64, FEATURES) + torch.randn(2, 1, FEATURES)
    normal = normalise_over_tokens(features, 1.0)
    assert normal.mean(1).abs().max() < 1e-5 and (normal.std(1, correction=0) - 1).abs().max() < 1e-5
    torch.testing.assert_close(normalise_over_tokens(features + 5, 1.0), normal, rtol=1e-4, atol=1e-4)
    part = normalise_over_tokens(features, 0.6)  # the rest of the mean stays
    rest = 0.4 * features.mean(1) / features.std(1, correction=0)
    torch.testing.assert_close(part.mean(1), rest, rtol=1e-4, atol=1e-5)
    config = RepaConfig(spatial_norm=0.6)
    projected = torch.randn(2, 64, FEATURES)
    torch.testing.assert_close(alignment_loss([projected], features, config), repa_loss(projected, part))


def test_a_convolution_that_reads_the_token_alone_is_a_linear_layer():
    projector, tokens = ConvProjector(5, FEATURES), torch.randn(2, 12, 5)
    linear = torch.nn.Linear(5, FEATURES)
    with torch.no_grad():
        projector.conv.weight.zero_()
        projector.conv.weight[:, :, 1, 1] = linear.weight
        projector.conv.bias.copy_(linear.bias)
        torch.testing.assert_close(projector(tokens, (3, 4)), linear(tokens))
        # a kernel that reads what is above: the grid runs row by row
        projector.conv.weight.zero_()
        projector.conv.weight[:, :, 0, 1] = linear.weight
        below = projector(tokens, (3, 4))
        torch.testing.assert_close(below[:, 4:], linear(tokens)[:, :-4])


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_after_its_end_the_projectors_are_out_of_the_graph(projector):
    stage = stage_of(10, repa={"taps": [1, 3], "width": 8, "projector": projector, "stop": 0.5})
    own = [p for name, p in stage.projected.named_parameters() if name.startswith("projector")]
    flops = []
    for step in (4, 5):
        stage.projected.zero_grad()
        with FlopCounterMode(display=False) as counter:
            loss, logs = loss_of(stage, step)
            loss.backward()
        flops.append(counter.get_total_flops())
        assert all((p.grad is not None) == (step == 4) for p in own) and ("repa_loss" in logs) == (step == 4)
    assert flops[1] < flops[0]
    plain = stage_of(10, model=stage.model)
    torch.testing.assert_close(loss, loss_of(plain, 5)[0])


def test_rows_to_drop_are_drawn_per_sample():
    """The same for a sample alone and in a batch, and after the draws that were there before."""
    stage = stage_of(model=perturb(build(path_drop=0.5)))
    seen = []
    stage.model.drop_tokens.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    batch = batch_at(0, stage)
    stage.loss(stage.projected, batch, SampleRandom("drop", first=0, count=2))
    for row in range(2):
        one = Batch(batch.latents[[row]], batch.text.take([row]), ["a"], ["0"])
        stage.loss(stage.projected, one, SampleRandom("drop", first=row, count=1))
    assert torch.equal(seen[0], torch.cat(seen[1:]))
    rng = SampleRandom("drop", first=0, count=2)
    rng.normal(*batch.latents.shape[1:]), rng.normal(), rng.uniform()
    assert torch.equal(seen[0], rng.uniform() < 0.5)
