"""Print where a model's parameters and FLOPs are, and what each idea of the paper saves.

    nitro-e describe nitro-e-512
    nitro-e describe nitro-e-512 'attention=[full]' --grid 32x32
    nitro-e describe configs/shapes/1_pretrain.yaml model.width=256

CONFIG is a preset of ModelConfig (key=value then sets its fields) or a recipe (key=value as for train.py; grid and
text length are the recipe's). FLOPs are 2 per multiply-add, of one latent's forward pass. Tables are Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence

from nitro_e.cli import common as cli
from nitro_e.config import ConfigError, apply_override, from_dict, load
from nitro_e.model import ModelConfig
from nitro_e.model.describe import Count, ablations, operations, parts, total
from nitro_e.model.layers import Grid


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--grid", metavar="HxW", help="tokens; default: the training grid")
    parser.add_argument(
        "--text-length", type=cli.whole(1, 8192), metavar="TOKENS", help="default 128, or the recipe's"
    )
    options = parser.parse_args(arguments)
    return cli.run(lambda: show(options))


def show(options: argparse.Namespace) -> None:
    config, grid, text_length = read(options.config, options.overrides)
    if options.grid is not None:
        grid = parse_grid(options.grid)
    print("\n".join(report(config, grid, options.text_length or text_length)))


def read(name: str, overrides: Sequence[str]) -> tuple[ModelConfig, Grid, int]:
    """The model config, its token grid and its text length."""
    if not name.endswith((".yaml", ".yml")):
        data = {"preset": name}
        for override in overrides:
            apply_override(data, override)
        config = from_dict(ModelConfig, data, "model")
        return config, (config.base_grid, config.base_grid), 128
    from nitro_e.encoders.components import codec_shape, text_shape
    from nitro_e.stages.recipe import RunConfig

    recipe = load(RunConfig, name, overrides)
    shape = codec_shape(recipe.components.codec)
    side = (
        recipe.model.base_grid * recipe.model.patch_size if shape is None else recipe.resolution // shape[1]
    )
    return recipe.model, recipe.model.latent_grid(side, side), text_shape(recipe.components.text)[1]


def parse_grid(text: str) -> Grid:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ConfigError(f"--grid '{text}': expected rows x columns of tokens, such as 32x48")
    return int(match[1]), int(match[2])


def report(config: ModelConfig, grid: Grid, text_length: int) -> list[str]:
    """All tables, as lines of Markdown."""
    by_part, whole = parts(config, grid, text_length), total(config, grid, text_length)
    full, inside, _ = config.image_tokens(*grid)
    lines = [
        f"{whole.parameters:,} parameters, {gflop(whole.flops)} GFLOP for {grid[0]}x{grid[1]} image and {text_length} text tokens."
    ]
    if config.compression:
        lines.append(
            f"Image tokens in the compressed blocks: {inside} instead of {full}, {1 - inside / full:.2%} fewer."
        )
    everywhere = dataclasses.replace(config, attention=("full",))
    now, otherwise = (attention(choice, grid, text_length) for choice in (config, everywhere))
    if now != otherwise:
        lines.append(
            f"Products of queries, keys and values: {gflop(now)} GFLOP instead of {gflop(otherwise)} with full attention, "
            f"{1 - now / otherwise:.1%} fewer."
        )
    header = ["part", "parameters", "share", "image + text tokens", "GFLOP", "share"]
    rows = [
        [
            c.name,
            f"{c.parameters:,}",
            share(c.parameters, whole.parameters),
            tokens(c),
            gflop(c.flops),
            share(c.flops, whole.flops),
        ]
        for c in by_part
    ]
    lines += ["", *table(header, rows)]
    header = ["operation", "parameters", "share", "GFLOP", "share"]
    rows = [
        [
            c.name,
            f"{c.parameters:,}",
            share(c.parameters, whole.parameters),
            gflop(c.flops),
            share(c.flops, whole.flops),
        ]
        for c in operations(config, grid, text_length)
    ]
    return [*lines, "", *table(header, rows), "", *ablation_table(config, grid, text_length)]


def ablation_table(config: ModelConfig, grid: Grid, text_length: int) -> list[str]:
    whole = total(config, grid, text_length)
    rows = [["as configured", f"{whole.parameters:,}", "", gflop(whole.flops), ""]]
    for name, other in ablations(config, grid, text_length):
        c = total(other, grid, text_length)
        rows.append([
            name, f"{c.parameters:,}", change(c.parameters, whole.parameters), gflop(c.flops), change(c.flops, whole.flops)
        ])  # fmt: skip
    return table(["ablation", "parameters", "change", "GFLOP", "change"], rows)


def attention(config: ModelConfig, grid: Grid, text_length: int) -> int:
    return next(count.flops for count in operations(config, grid, text_length) if count.name == "attention")


def tokens(count: Count) -> str:
    return " + ".join(str(number) for number in (count.image_tokens, count.text_tokens) if number) or "-"


def gflop(flops: int) -> str:
    return f"{flops / 1e9:.3g}" if flops < 1e10 else f"{flops / 1e9:.1f}"


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}"


def change(new: int, old: int) -> str:
    return f"{new / old - 1:+.1%}" if new != old else "0"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Markdown, aligned for the eye too: first column left, others right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        return (
            "| "
            + " | ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))])
            + " |"
        )

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return [line(header), rule, *map(line, rows)]
