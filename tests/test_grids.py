"""Grids, aspect ratios and text lengths: what works runs, what does not is refused with the nearest that does."""

import itertools

import pytest
import torch
from conftest import as_text

from nitro_e.config import ConfigError, from_dict
from nitro_e.encoders.codec import DCTCodec
from nitro_e.encoders.text import HashText
from nitro_e.model import EMMDiT, ModelConfig, released
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.samplers import SamplingConfig

SMALL = dict(latent_channels=2, text_width=8, width=16, heads=2, groups=[1, 2, 1])


def build(**choices) -> EMMDiT:
    torch.manual_seed(0)
    model = EMMDiT(from_dict(ModelConfig, {**SMALL, **choices})).eval()
    torch.nn.init.normal_(model.out.weight)
    return model


def fits(config: ModelConfig, height: int, width: int) -> bool:
    """Slow: ask every block."""
    groups = [group for group, count in enumerate(config.groups) for _ in range(count)]
    return all(height % r == 0 == width % r for r in config.compression) and all(
        config.image_tokens(height, width)[group] % region.multiple == 0
        for region, group in zip(config.regions, groups)
    )


@pytest.mark.parametrize(
    "height, width", [(256, 256), (2048, 2048), (256, 2048), (1024, 640), (896, 1152), (512, 768)]
)
def test_full_attention_takes_any_multiple_of_128_pixels(height, width):
    """The 1024 px preset on 256 to 2048 px; batches of one."""
    model = build(preset="nitro-e-1024", **SMALL)
    x = torch.randn(1, 2, height // 32, width // 32)
    with torch.no_grad():
        velocity = model(x, torch.tensor([0.5]), as_text(torch.randn(1, 5, 8)))
    assert velocity.shape == x.shape and velocity.isfinite().all()


@pytest.mark.parametrize("height, width", [(8, 32), (16, 16), (16, 32), (48, 16), (64, 64)])
def test_subregion_attention_takes_what_it_divides(height, width):
    model = build(attention=["full", "4x1", "4x4"])
    x = torch.randn(1, 2, height, width)
    with torch.no_grad():
        velocity = model(x, torch.tensor([0.5]), as_text(torch.randn(1, 16, 8)))
    assert velocity.shape == x.shape and velocity.isfinite().all()


def test_batch_of_one_is_the_row_of_a_larger_batch():
    model = build()
    x, t, text = torch.randn(3, 2, 8, 32), torch.rand(3), torch.randn(3, 16, 8)
    with torch.no_grad():
        together = model(x, t, as_text(text))
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1], as_text(text[i : i + 1])) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_positions_of_a_grid_are_the_centre_of_the_table():
    position = build().position
    size = position.table.shape[0]
    for height, width in ((8, 32), (3, 96), (96, 7), (1, 1)):
        added = position(torch.zeros(1, height * width, 16), (height, width)).reshape(height, width, 16)
        top, left = (size - height) // 2, (size - width) // 2
        for row, column in ((0, 0), (height - 1, width - 1), (height // 2, width // 3)):
            assert torch.equal(added[row, column], position.table[top + row, left + column])


def test_the_reference_model_runs_on_other_grids(released_state):
    """Released weights, wide and tall; subregion attention on and off."""
    for attention in (("full", "4x1", "4x4"), ("full",)):
        config = released.infer_config(released_state, base_grid=16, attention=attention)
        model = EMMDiT(config)
        model.load_state_dict(released.from_released(released_state, config))
        for grid in ((8, 16), (24, 12)) if attention == ("full",) else ((16, 16),):
            with torch.no_grad():
                velocity = model(
                    torch.randn(1, 8, *grid), torch.tensor([1.0]), as_text(torch.randn(1, 16, 24))
                )
            assert velocity.shape[2:] == grid and velocity.isfinite().all()


CONFIGS = [
    {},
    dict(attention=["full"]),
    dict(compression=[], position_reinforcement=False),
    dict(compression=[2, 8], attention=["full", "2x2"], width=64),
    dict(attention=["3x1"], base_grid=12),
    dict(groups=[2, 1, 3], attention=["8x1", "full", "2x4"], position_table=20),
]


@pytest.mark.parametrize("choices", CONFIGS)
def test_check_grid_agrees_with_asking_every_block(choices):
    config = from_dict(ModelConfig, {**SMALL, "position_table": 40, **choices})
    for height, width in itertools.product(range(1, 42), repeat=2):
        works = max(height, width) <= config.position_table and fits(config, height, width)
        try:
            config.check_grid(height, width)
            assert works, (height, width)
        except ConfigError:
            assert not works, (height, width)


@pytest.mark.parametrize("choices", CONFIGS)
@pytest.mark.parametrize("height, width", [(8, 8), (23, 17), (500, 3), (0, 0)])
def test_nearest_grids_are_the_nearest(choices, height, width):
    config = from_dict(ModelConfig, {**SMALL, "position_table": 40, **choices})
    sides = range(1, config.position_table + 1)
    distances = sorted(
        abs(h - height) + abs(w - width) for h, w in itertools.product(sides, sides) if fits(config, h, w)
    )
    nearest = config.nearest_grids(height, width)
    assert [abs(h - height) + abs(w - width) for h, w in nearest] == distances[:3]
    assert all(fits(config, *grid) for grid in nearest)


@pytest.mark.parametrize(
    "grid, text_length, message",
    [
        (
            (8, 8),
            16,
            r"grid 8x8: attention \['full', '4x1', '4x4'\] needs multiples of 16 tokens, but group 2 has 20; "
            "the nearest that work: grid 16x16",
        ),
        (
            (18, 16),
            16,
            "18x16 tokens are not a multiple of compression ratio 4; the nearest that work: grid 16x16",
        ),
        (
            (100, 16),
            16,
            "more than the 96 tokens per side of position_table; the nearest that work: grid 96x16",
        ),
        ((16, 16), 120, "the text has 120; the nearest text length that works: 112 or 128"),
        ((16, 16), 7, "the text has 7; the nearest text length that works: 16"),
    ],
)
def test_forward_refuses_with_the_nearest_sizes_that_work(grid, text_length, message):
    model = build(groups=[1, 2, 1], attention=["full", "4x1", "4x4"])
    with pytest.raises(ConfigError, match=message):
        model(torch.randn(1, 2, *grid), torch.tensor([0.5]), as_text(torch.randn(1, text_length, 8)))


def test_taps_are_checked():
    model = build()
    inputs = torch.randn(1, 2, 16, 16), torch.rand(1), as_text(torch.randn(1, 16, 8))
    _, tapped = model.forward_intermediates(*inputs, taps=[4, 2, 1])
    assert [tokens.shape[1] for tokens in tapped] == [256, 80, 256]
    for wrong in (0, 5):
        with pytest.raises(ConfigError, match="block counts must be in 1 to 4"):
            model.forward_intermediates(*inputs, taps=[1, wrong])


# ---- images of any size


@pytest.fixture
def pipeline() -> TextToImage:
    model = build(latent_channels=24, text_width=128, base_grid=8, attention=["full", "4x1", "2x2"])
    return TextToImage(
        model, DCTCodec(8, 16, 4), HashText(), SamplingConfig(resolution=64, steps=1, guidance_scale=0)
    )


def test_images_have_the_size_asked_for(pipeline):
    assert pipeline(["a"]).images[0].size == (64, 64)
    assert pipeline(["a"], height=128).images[0].size == (64, 128)
    assert pipeline(["a"], height=64, width=128).images[0].size == (128, 64)
    assert pipeline(["a"], resolution=128).images[0].size == (128, 128)


def test_wrong_sizes_name_the_nearest_in_pixels(pipeline):
    with pytest.raises(
        ConfigError,
        match="100x64 px: both sides must be multiples of 8; the nearest that work: 64x64, 128x64",
    ):
        pipeline(["a"], height=100)
    with pytest.raises(
        ConfigError,
        match="72x64 px: 9x8 tokens are not .* ratio 2; the nearest that work: 64x64 px, 128x64 px",
    ):
        pipeline(["a"], height=72)
    with pytest.raises(ConfigError, match="height must be at least 1"):
        pipeline(["a"], height=0)
