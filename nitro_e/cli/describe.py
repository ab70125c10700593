"""Print where a model's parameters and FLOPs are, and what each idea of the paper saves.

    nitro-e describe nitro-e-512
    nitro-e describe nitro-e-512 'attention=[full]' --grid 32x32
    nitro-e describe configs/shapes/1_pretrain.yaml model.width=256

CONFIG is a preset of E-MMDiT (key=value then sets its fields) or a recipe (key=value as for nitro-e train;
grid and text length are the recipe's). FLOPs are 2 per multiply-add, of one latent's forward pass. Tables are
Markdown. Of a model of your own, named by a recipe, only parameters and FLOPs of its modules are counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from nitro_e.cli import common as cli
from nitro_e.config import ConfigError, apply_override, from_dict, load
from nitro_e.interfaces import Architecture, Grid
from nitro_e.model import ModelConfig
from nitro_e.model.describe import Count, ablations, operations, parts, total, usual_grid, weak_pass


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


def read(name: str, overrides: Sequence[str]) -> tuple[Architecture, Grid, int]:
    """Read the model config, its token grid and its text length."""
    if not name.endswith((".yaml", ".yml")):
        data: dict[str, Any] = {"preset": name}
        for override in overrides:
            apply_override(data, override)
        config = from_dict(ModelConfig, data, "model")
        return config, (config.base_grid, config.base_grid), 128
    from nitro_e.encoders.components import codec_shape, text_shape
    from nitro_e.stages.recipe import RunConfig

    recipe = load(RunConfig, name, overrides)
    shape, text_length = codec_shape(recipe.components.codec), text_shape(recipe.components.text)[1]
    if shape is None:
        return recipe.model, usual_grid(recipe.model), text_length
    side = recipe.resolution // shape[1]
    return recipe.model, recipe.model.latent_grid(side, side), text_length


def parse_grid(text: str) -> Grid:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ConfigError(f"--grid '{text}': expected rows x columns of tokens, such as 32x48")
    return int(match[1]), int(match[2])


def report(config: Architecture, grid: Grid, text_length: int) -> list[str]:
    """Make all tables, as lines of Markdown."""
    by_part, whole = parts(config, grid, text_length), total(config, grid, text_length)
    first = (
        f"{whole.parameters:,} parameters, {gflop(whole.flops)} GFLOP for {grid[0]}x{grid[1]} image and "
        f"{text_length} text tokens."
    )
    others = config.similar_grids(*grid)
    sizes = f"{len(others)} token grids with 0.7 to 1.35 times as many tokens work"
    shown = ", ".join(f"{rows}x{columns}" for rows, columns in others[:12])
    sizes += f", such as {shown}." if len(others) > 12 else f": {shown}."
    header = ["part", "parameters", "share", "image + text tokens", "GFLOP", "share"]
    rows = [[c.name, *shares(c, whole)[:2], tokens(c), *shares(c, whole)[2:]] for c in by_part]
    part_table = ["", *table(header, rows)]
    if not isinstance(config, ModelConfig):
        return [first, sizes, *part_table]
    header = ["operation", "parameters", "share", "GFLOP", "share"]
    rows = [[c.name, *shares(c, whole)] for c in operations(config, grid, text_length)]
    operation_table = ["", *table(header, rows)]
    savings = [
        *compression_line(config, grid),
        *attention_line(config, grid, text_length),
        *guidance_line(config, grid, text_length),
    ]
    return [
        first,
        *savings,
        sizes,
        *part_table,
        *operation_table,
        "",
        *ablation_table(config, grid, text_length),
    ]


def shares(count: Count, whole: Count) -> list[str]:
    """Make the cells for parameters and FLOPs, each with its share of the whole."""
    return [
        f"{count.parameters:,}",
        share(count.parameters, whole.parameters),
        gflop(count.flops),
        share(count.flops, whole.flops),
    ]


def compression_line(config: ModelConfig, grid: Grid) -> list[str]:
    full, inside, _ = config.image_tokens(*grid)
    if not config.compression:
        return []
    fewer = f"{1 - inside / full:.2%} fewer"
    return [f"Image tokens in the compressed blocks: {inside} instead of {full}, {fewer}."]


def attention_line(config: ModelConfig, grid: Grid, text_length: int) -> list[str]:
    everywhere = dataclasses.replace(config, attention=("full",))
    now, otherwise = (attention(choice, grid, text_length) for choice in (config, everywhere))
    if now == otherwise:
        return []
    return [
        f"Products of queries, keys and values: {gflop(now)} GFLOP instead of {gflop(otherwise)} with full attention, "
        f"{1 - now / otherwise:.1%} fewer."
    ]


def guidance_line(config: ModelConfig, grid: Grid, text_length: int) -> list[str]:
    if not config.path_drop:
        return []
    share = weak_pass(config, grid, text_length)
    return [f"A step that is guided by path drop: {1 + share:.2f} forward passes instead of 2."]


def ablation_table(config: ModelConfig, grid: Grid, text_length: int) -> list[str]:
    whole = total(config, grid, text_length)
    rows = [["as configured", f"{whole.parameters:,}", "", gflop(whole.flops), ""]]
    for name, other in ablations(config, grid, text_length):
        c = total(other, grid, text_length)
        parameters, flops = change(c.parameters, whole.parameters), change(c.flops, whole.flops)
        rows.append([name, f"{c.parameters:,}", parameters, gflop(c.flops), flops])
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
    """Make a Markdown table whose columns are aligned: the first to the left, others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        aligned = [cells[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells[1:], widths[1:]))]
        return "| " + " | ".join(aligned) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return [line(header), rule, *map(line, rows)]
