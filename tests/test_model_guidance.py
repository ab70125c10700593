"""Model guidance in training, against its fixed point."""

import pytest
import torch
from test_ablations import build, perturb
from test_repa import batch_at, loss_of, stage_of

from nitro_e.interfaces import Architecture, Batch, Model, TextEmbedding
from nitro_e.randomness import SampleRandom


class Table(Model):
    """One velocity for captions and one for the null prompt, whose tokens are zero."""

    def __init__(self) -> None:
        super().__init__(Architecture(kind="table", latent_channels=2))
        self.velocities = torch.nn.Parameter(torch.randn(2, 2, 3, 3))

    def forward_intermediates(self, x, t, text, taps=()):
        return self.velocities[text.tokens.ne(0).any(2).any(1).long()], []


def test_the_fixed_point_is_guidance():
    rows, scale = 12, 3.0
    stage = stage_of(model=(model := Table()), guidance={"scale": scale, "start": 0}, caption_dropout=0.5)
    mask = torch.ones(rows, 1, dtype=torch.bool)
    stage.null_text = TextEmbedding(torch.zeros(1, 1, 4), mask[:1])
    batch = Batch(torch.randn(rows, 2, 3, 3), TextEmbedding(torch.ones(rows, 1, 4), mask), [], [])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4 * batch.latents.numel() / rows)
    for _ in range(300):
        optimizer.zero_grad()
        stage.loss(stage.projected, batch, SampleRandom("fixed", first=0, count=rows))[0].backward()
        optimizer.step()
    rng = SampleRandom("fixed", first=0, count=rows)
    noise, _, captioned = rng.normal(2, 3, 3), rng.normal(), rng.uniform() >= 0.5
    assert 2 < captioned.sum() < rows - 2
    true = noise - batch.latents
    without, with_text = true[~captioned].mean(0), true[captioned].mean(0)
    torch.testing.assert_close(model.velocities[0].detach(), without, rtol=0, atol=1e-4)
    guided = without + scale * (with_text - without)
    torch.testing.assert_close(model.velocities[1].detach(), guided, rtol=0, atol=1e-4)


def test_it_begins_at_its_step_and_scale_one_is_none():
    model = perturb(build())
    plain, _ = loss_of(stage_of(10, model), 5)
    for options, step, same in (
        ({"scale": 1.0, "start": 0.0}, 5, True),
        ({"scale": 3.0, "start": 0.6}, 5, True),
        ({"scale": 3.0, "start": 0.5}, 5, False),
    ):
        loss, _ = loss_of(stage_of(10, model, guidance=options), step)
        assert torch.equal(loss, plain) == same
    # rows without a caption keep their target
    alone = {"caption_dropout": 1.0}
    loss, _ = loss_of(stage_of(10, model, guidance={"start": 0.0}, **alone))
    assert torch.equal(loss, loss_of(stage_of(10, model, **alone))[0])


def test_no_gradient_goes_through_the_target():
    model = perturb(build())
    stage = stage_of(model=model, guidance={"start": 0.0}, caption_dropout=0.0)
    loss_of(stage)[0].backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    rng, batch = SampleRandom("test", first=0, count=2), batch_at(0, stage)
    noise, t = rng.normal(*batch.latents.shape[1:]), torch.sigmoid(rng.normal())
    x = (1 - t[:, None, None, None]) * batch.latents + t[:, None, None, None] * noise
    with torch.no_grad():
        away = model(x, t, batch.text) - model(x, t, stage.null_text.expand(2))
    target = noise - batch.latents + (2 / 3) * away
    (model(x, t, batch.text) - target).square().mean().backward()
    for p, expected in zip(ours, model.parameters()):
        torch.testing.assert_close(p, expected.grad, rtol=1e-4, atol=1e-5)


def test_weights_with_guidance_in_them_are_sampled_without(tmp_path):
    from test_train import RECIPE

    from nitro_e.config import load
    from nitro_e.stages import recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    for overrides, scale in (([], 2.0), (["stage.guidance={scale: 2.5}"], 1.0)):
        config = load(recipe.RunConfig, path, overrides)
        assert config.published_sampling.guidance_scale == scale
    assert config.stage_kind.summary(config, None, 1, 1e9)[1].split()[1] == f"{3 * 1.3e9 * 4 * 6:.2e}"
    assert pytest.approx(0.6) == config.stage.guidance.weight
