"""The counts of `nitro_e.model.describe` against torch's own counter on the real forward, and the published numbers."""

import contextlib
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from einops import rearrange
from tiny import OPTIMIZER
from torch.utils.flop_counter import FlopCounterMode

import nitro_e.cli.describe
from nitro_e.config import ConfigError, from_dict
from nitro_e.interfaces import TextEmbedding
from nitro_e.model import EMMDiT, ModelConfig, describe

ROOT = Path(__file__).parents[1]
MICRO = from_dict(ModelConfig, {"preset": "micro-8", "latent_channels": 3, "text_width": 10})


@pytest.fixture
def tool():
    return nitro_e.cli.describe.main


def counted(config: ModelConfig, grid: tuple[int, int], text_length: int) -> tuple[int, dict[str, int]]:
    """Parameters, and FLOPs of every module, by running the model on the meta device."""
    # einops imports torch._dynamo at first use, which the meta device may break
    rearrange(torch.zeros(1), "a -> a")
    with torch.device("meta"):
        model = EMMDiT(config)
        x = torch.empty(1, config.latent_channels, *(side * config.patch_size for side in grid))
        text = TextEmbedding(
            torch.empty(1, text_length, config.text_width), torch.ones(1, text_length, dtype=torch.bool)
        )
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x, torch.empty(1), text)
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    return sum(parameter.numel() for parameter in model.parameters()), flops


@pytest.mark.parametrize(
    "config, grid, text_length",
    [
        (ModelConfig(), (16, 16), 128),
        (from_dict(ModelConfig, {"preset": "nitro-e-1024"}), (32, 48), 60),
        *((config, (8, 16), 20) for _, config in describe.ablations(MICRO, (8, 16), 20)),
        (dataclasses.replace(MICRO, patch_size=2, base_grid=16, mlp_ratio=1.7, groups=(0, 3, 1)), (16, 8), 4),
        (dataclasses.replace(MICRO, compression=(4, 2), groups=(2, 0, 2), text_mask="real"), (8, 8), 4),
        (
            dataclasses.replace(
                MICRO,
                text_compression=5,
                path_drop=0.1,
                value_residual=True,
                norm="rms",
                mlp="swiglu",
                attention=("full",),
                groups=(1, 2, 2),
            ),
            (8, 8),
            10,
        ),
    ],
    ids=str,
)
def test_counts_are_those_of_the_forward_pass(config, grid, text_length):
    parameters, flops = counted(config, grid, text_length)
    total = describe.total(config, grid, text_length)
    assert (total.parameters, total.flops) == (parameters, flops["Global"])
    parts = {part.name: part for part in describe.parts(config, grid, text_length)}
    for counts in (parts.values(), describe.operations(config, grid, text_length)):
        assert sum(count.parameters for count in counts) == parameters
        assert sum(count.flops for count in counts) == flops["Global"]
    first, inside, last = config.groups
    edges = {
        "blocks before": range(first),
        "blocks inside": range(first, first + inside),
        "blocks after": range(first + inside, first + inside + last),
    }
    for name, indices in edges.items():
        assert sum(flops[f"EMMDiT.blocks.{index}"] for index in indices) == (
            parts[name].flops if name in parts else 0
        )
    for name, modules in {
        "compression": ("compress", "compress_text"),
        "reconstruction": ("reconstruct", "restore_text"),
        "output": ("out",),
        "text embedding": ("text",),
    }.items():
        expected = sum(flops.get(f"EMMDiT.{module}", 0) for module in modules)
        assert (parts[name].flops if name in parts else 0) == expected


def test_published_size_cost_and_reduction():
    total = describe.total(ModelConfig())
    assert total.parameters == 302_449_952 and round(total.flops / 1e9, 1) == 80.4
    inside = next(part for part in describe.parts(ModelConfig()) if part.name == "blocks inside")
    assert (inside.image_tokens, inside.text_tokens) == (80, 128) and 1 - inside.image_tokens / 256 == 0.6875


def test_affine_modulation_saves_a_projection_per_block():
    """47 modulated streams (24 image, 23 text): 6 D^2 + 6 D each, against 12 D each and one shared 6 D^2 + 6 D."""
    d = 768
    affine, full = (
        describe.total(ModelConfig()).parameters,
        describe.total(ModelConfig(modulation="full")).parameters,
    )
    assert full - affine == 47 * (6 * d * d + 6 * d - 12 * d) - (6 * d * d + 6 * d)


def test_tool_prints_what_the_documentation_shows(tool, capsys):
    """docs/model.md holds this output; run the tool again after a change."""
    assert tool(["nitro-e-512"]) == 0
    printed = capsys.readouterr().out
    assert "302,449,952 parameters, 80.4 GFLOP" in printed and "80 instead of 256, 68.75% fewer" in printed
    assert printed in (ROOT / "docs" / "model.md").read_text()


def test_similar_grids_are_those_that_the_model_takes():
    """By trying every grid, as a sampler would."""
    config = from_dict(ModelConfig, {"preset": "small-8"})
    taken = set()
    for grid in itertools.product(range(1, 97), repeat=2):
        with contextlib.suppress(ConfigError):
            config.check_grid(*grid)
            if 0.7 * 12 * 8 <= grid[0] * grid[1] <= 1.35 * 12 * 8:
                taken.add(grid)
    found = config.similar_grids(12, 8)
    assert set(found) == taken and len(found) == len(taken) > 3
    assert max(found[0]) / min(found[0]) == min(max(grid) / min(grid) for grid in taken)


def test_tool_reads_recipes_and_overrides(tool, capsys):
    assert tool([str(ROOT / "configs/shapes/2_finetune.yaml"), "model.groups=[1,1,1]", *OPTIMIZER]) == 0
    assert "for 8x8 image and 16 text tokens" in capsys.readouterr().out
    assert tool(["nitro-e-512", "attention=[full]", "--grid", "24x20", "--text-length", "77"]) == 0
    assert "for 24x20 image and 77 text tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nitro-e-521"], "did you mean 'nitro-e-512'?"),
        (["nitro-e-512", "widht=3"], "did you mean 'model.width'?"),
        (["nitro-e-512", "--grid", "8by8"], "such as 32x48"),
        (["nitro-e-512", "--grid", "8x8"], "the nearest that work: grid 16x16"),
        (["nitro-e-512", "--text-length", "100"], "96 or 112"),
        (["nowhere.yaml"], "does not exist"),
    ],
)
def test_tool_reports_wrong_input_in_one_line(tool, capsys, arguments, message):
    assert tool(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
