"""Draw the figures of the documentation as SVG, from configs and from recorded numbers.

    python tools/figures.py                             docs/img/*.svg, from the numbers in docs/img/figures.json
    python tools/figures.py --record outputs/demo       first take the curves of this demo into that file
    python tools/figures.py --draw                      also docs/img/stages.png, drawn with the shipped weights

architecture.svg  tokens and parameters of each part of E-MMDiT (`nitro_e/model/describe.py`)
stages.svg        the four stages as a flow, with the scores on the offline domain
few_steps.svg     the score against the number of steps, before and after distillation
curves.svg        the curves of the demo's four trainings
stages.png        the first held-out prompts of the offline domain by the weights of each stage, with the same noise; wrong
                  images, by the exact judge, have a red frame
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from nitro_e.config import from_dict
from nitro_e.data.prompts import PromptsConfig, load_prompts
from nitro_e.model import ModelConfig
from nitro_e.model.describe import parts, total, usual_grid
from nitro_e.record.charts import AREA, COLOURS, Chart, Series, line_chart
from nitro_e.record.pages import read_record
from nitro_e.record.templating import TEMPLATES
from nitro_e.rewards import RewardConfig, build_rewards
from nitro_e.sampling.pipeline import TextToImage, to_image
from nitro_e.sampling.sheets import wrap

STAGES = [  # title of a row, weights, steps, guidance
    ("pretrained, no guidance, 20 steps", "shapes", 20, 1),
    ("pretrained, guidance 3, 20 steps: twice the work", "shapes", 20, 3),
    ("after GRPO, no guidance, 20 steps", "shapes-grpo", 20, 1),
    ("pretrained, no guidance, 4 steps", "shapes", 4, 1),
    ("distilled, no guidance, 4 steps", "shapes-4step", 4, 1),
]
COLUMNS, CELL = 8, 128  # prompts, pixels

IMAGES = Path(__file__).parent.parent / "docs" / "img"
NUMBERS = "figures.json"
MODEL = "nitro-e-512"
TEXT_LENGTH = 128
INK, GREY, PAPER = "#1b2430", "#5b6675", "#ffffff"
FONT = "system-ui, 'Segoe UI', Roboto, sans-serif"
CURVES = {  # run of the demo -> what is drawn of it
    "1_pretrain": {
        "eval/color": "1. Pretraining: color score",
        "velocity_loss": "1. Pretraining: velocity loss",
    },
    "3_grpo": {"reward/mixed": "3. GRPO: reward of the rollouts"},
    "4_distill": {"imitate": "4. Distillation: error of imitation"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, metavar="DEMO", help="folder of a finished demo")
    parser.add_argument("--draw", action="store_true", help="draw images too, a minute on two cores")
    parser.add_argument("--out", type=Path, default=IMAGES, help="default: docs/img")
    options = parser.parse_args()
    if options.record:
        numbers = read_numbers() | {"curves": record(options.record)}
        (IMAGES / NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n")
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in figures(read_numbers()).items():
        (options.out / name).write_text(text)
        print(options.out / name)
    if options.draw:
        stage_images().save(options.out / "stages.png", optimize=True)
        print(options.out / "stages.png")


def read_numbers() -> dict[str, Any]:
    return json.loads((IMAGES / NUMBERS).read_text())


def record(demo: Path) -> dict[str, Any]:
    """Read the curves of a demo's runs: run -> metric -> [[step, value], ...]."""
    found = {}
    for run, names in CURVES.items():
        log = read_record(demo / "runs" / run)
        found[run] = {name: [[step, round(value, 4)] for step, value in log.points(name)] for name in names}
    return found


def figures(numbers: dict[str, Any]) -> dict[str, str]:
    """Draw all figures: file name -> SVG."""
    return {
        "architecture.svg": architecture(from_dict(ModelConfig, {"preset": MODEL}, "model")),
        "stages.svg": stages(numbers["stages"]),
        "few_steps.svg": few_steps(numbers["few_steps"]),
        "curves.svg": curves(numbers["curves"]),
    }


# ---- shapes


def svg(width: float, height: float, body: Sequence[str]) -> str:
    """Make a file of the shapes, on white, so that it can be read on a dark page too."""
    style = f"text{{font:13px {FONT};fill:{INK}}} .grid{{stroke:#e9ecf0}} .axis{{stroke:#b9c1cb}} .hover{{fill:transparent}}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}">'
    return "\n".join([head, f"<style>{style}</style>", box(0, 0, width, height, PAPER, 0), *body, "</svg>\n"])


def box(x: float, y: float, width: float, height: float, fill: str, radius: float = 6) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}"/>'


def text(
    x: float,
    y: float,
    words: str,
    size: float = 13,
    fill: str = INK,
    bold: bool = False,
    anchor: str = "middle",
) -> str:
    weight = ";font-weight:650" if bold else ""
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" style="font-size:{size:g}px;fill:{fill}{weight}">{escaped}</text>'


def arrow(x: float, y: float, length: float) -> str:
    end = x + length
    return (
        f'<path d="M{x:g} {y:g}H{end - 6:g}m0 -5l6 5l-6 5" fill="none" stroke="{GREY}" stroke-width="1.6"/>'
    )


# ---- figures


def architecture(config: ModelConfig) -> str:
    """Draw the parts in the order of the forward pass; the height of a bar is its number of image tokens."""
    grid = usual_grid(config)
    counts = {count.name: count for count in parts(config, grid, TEXT_LENGTH)}
    full, inside, _ = config.image_tokens(*grid)
    before, middle, after = config.groups
    paths = " + ".join(f"{full // factor**2}" for factor in config.compression)
    columns = [  # part, title, lines below, width
        ("patch embedding", "patch embedding", [f"{grid[0]} x {grid[1]} latent cells"], 124),
        ("blocks before", f"{before} blocks", ["image and text", "attend together"], 112),
        (
            "compression",
            "compression",
            [f"{' and '.join(f'{f}x' for f in config.compression)} per side:", f"{paths} tokens"],
            124,
        ),
        ("blocks inside", f"{middle} blocks", ["most of the work,", "on few tokens"], 260),
        ("reconstruction", "reconstruction", ["and the positions", "once more"], 124),
        ("blocks after", f"{after} blocks", ["image and text", "attend together"], 112),
        ("output", "output", ["velocity"], 124),
    ]
    tallest, floor, left, gap = 150.0, 268.0, 24.0, 16.0
    whole, shapes, x = total(config, grid, TEXT_LENGTH), [], left
    width = left + sum(column[3] + gap for column in columns) + left - gap
    title = f"E-MMDiT: {whole.parameters / 1e6:.0f}M parameters, {whole.flops / 1e9:.0f} GFLOP for an image of 512 px"
    shapes.append(text(left, 32, title, 17, bold=True, anchor="start"))
    note = f"Height: image tokens. {middle} of {before + middle + after} blocks see {inside} instead of {full}, {1 - inside / full:.0%} fewer."
    shapes.append(text(left, 54, note, 13, GREY, anchor="start"))
    for number_of, (part, name, lines, wide) in enumerate(columns):
        count = counts[part]
        after_part = inside if part in ("compression", "blocks inside") else full
        height = tallest * after_part / full
        blocks = count.text_tokens > 0
        shapes.append(box(x, floor - height, wide, height, COLOURS[0] if blocks else "#9db8ee"))
        shapes.append(text(x + wide / 2, floor - height - 8, f"{after_part} tokens", 13, bold=True))
        if blocks:
            text_height = tallest * count.text_tokens / full
            shapes.append(box(x, floor + 6, wide, text_height * 0.4, COLOURS[1]))
            shapes.append(
                text(
                    x + wide / 2,
                    floor + 6 + text_height * 0.2 + 5,
                    f"+ {count.text_tokens} of text",
                    12,
                    PAPER,
                )
            )
        for row, line in enumerate(
            [name, *lines, f"{millions(count.parameters)}, {count.flops / 1e9:.2g} GFLOP"]
        ):
            shapes.append(
                text(
                    x + wide / 2,
                    floor + 62 + 17 * row,
                    line,
                    14 if row == 0 else 12,
                    INK if row == 0 else GREY,
                    row == 0,
                )
            )
        if number_of:
            shapes.append(arrow(x - gap + 1, floor - 12, gap - 2))
        x += wide + gap
    return svg(width, floor + 132, shapes)


def millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f}M" if parameters >= 1e5 else f"{parameters / 1e3:.0f}k"


def stages(found: Sequence[dict[str, str]]) -> str:
    """Draw the four stages as a flow, each with what it does and its score."""
    wide, gap, left, top = 232, 34, 24, 66
    shapes = [
        text(left, 32, "Four stages, one trainer", 17, bold=True, anchor="start"),
        text(
            left,
            52,
            "Scores: share of 600 held-out prompts of the offline domain that are drawn right",
            13,
            GREY,
            anchor="start",
        ),
    ]
    for index, stage in enumerate(found):
        x = left + index * (wide + gap)
        shapes += [box(x, top, wide, 176, "#f5f6f8"), box(x, top, wide, 34, COLOURS[index])]
        shapes.append(text(x + 14, top + 22, stage["title"], 15, PAPER, True, "start"))
        for row, line in enumerate(stage["does"]):
            shapes.append(text(x + 14, top + 58 + 18 * row, line, 13, anchor="start"))
        shapes.append(text(x + 14, top + 138, stage["score"], 17, bold=True, anchor="start"))
        shapes.append(text(x + 14, top + 158, stage["measured"], 12, GREY, anchor="start"))
        if index:
            shapes.append(arrow(x - gap + 4, top + 88, gap - 8))
    return svg(2 * left + 4 * wide + 3 * gap, top + 200, shapes)


def few_steps(found: dict[str, list[list[float]]]) -> str:
    """Draw the score against the number of steps."""
    series = [Series(name, [(steps, score) for steps, score in points]) for name, points in found.items()]
    return chart_file(
        line_chart("Strict score by number of steps", series, smooth=False, log=False, x_label="steps")
    )


def curves(found: dict[str, dict[str, list]]) -> str:
    """Draw the curves of the demo, two charts in a row."""
    charts = [
        line_chart(title, [Series(title, [tuple(point) for point in found[run][name]])], log=False)
        for run, names in CURVES.items()
        for name, title in names.items()
    ]
    rows = -(-len(charts) // 2)
    shapes = [
        f'<g transform="translate({(index % 2) * AREA.width} {(index // 2) * (AREA.height + 44)})">{inner(chart)}</g>'
        for index, chart in enumerate(charts)
    ]
    return svg(2 * AREA.width, rows * (AREA.height + 44), shapes)


def chart_file(chart: Chart) -> str:
    return svg(AREA.width, AREA.height + 44, [inner(chart)])


def inner(chart: Chart) -> str:
    """Return the SVG of a chart with its title and legend above it."""
    page = TEMPLATES.get_template("chart.html").render(chart=chart)
    drawn = re.search(r"<svg[^>]*>\n(.*)</svg>", page, re.DOTALL)[1]
    drawn = re.sub(r'<rect class="hover".*?</rect>\n', "", drawn)
    head, x = [text(16, 22, chart.title, 14, bold=True, anchor="start")], 16.0
    for colour, name in chart.legend:
        head += [box(x, 34, 14, 3, colour, 1), text(x + 19, 39, name, 10.5, anchor="start")]
        x += 30 + 5.6 * len(name)
    return "\n".join([*head, f'<g transform="translate(0 44)">{drawn}</g>'])


def stage_images() -> Image.Image:
    """Draw the prompts by the weights of each stage: a row per stage, a column per prompt, red frames on wrong images."""
    prompts = load_prompts(PromptsConfig(source="shapes-heldout", num=COLUMNS))
    texts, info = [prompt.text for prompt in prompts], [prompt.info for prompt in prompts]
    scorer = build_rewards([RewardConfig(name="shapes", options={"score": "strict"})])
    font, gap, head = ImageFont.load_default(15), 6, 64
    height = CELL + 30
    sheet = Image.new("RGB", (COLUMNS * (CELL + gap) - gap, head + len(STAGES) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, words in enumerate(texts):
        place = column * (CELL + gap), 0
        draw.multiline_text(
            place, wrap(words.removeprefix("a photo of "), font, CELL, 3), fill=INK, font=font
        )
    for row, (title, weights, steps, guidance) in enumerate(STAGES):
        top = head + row * height
        draw.text((0, top + 4), title, fill=GREY, font=font)
        pipeline = TextToImage.from_pretrained(weights)
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pixels"}
        pixels = pipeline(texts, seeds=range(COLUMNS), **settings).images
        right = scorer(pixels, texts, info).values[:, 0].tolist()
        for column, (image, good) in enumerate(zip(map(to_image, pixels), right)):
            left = column * (CELL + gap)
            sheet.paste(image.resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top + 26))
            if not good:
                draw.rectangle((left, top + 26, left + CELL - 1, top + 25 + CELL), outline="#d4351c", width=3)
    return sheet


if __name__ == "__main__":
    main()
