"""What the scores of `nitro-e evaluate emoji` are to be held against, and the grid of concepts by styles.

    python tools/emoji.py baselines --judge FOLDER --codec FOLDER --shards TRAIN.tar ... --test-shards HELDOUT.tar
    python tools/emoji.py grid WEIGHTS --shards TRAIN.tar ... --test-shards HELDOUT.tar --out docs/img/emoji.png

`baselines` scores pictures that need no generative model, against the same held-out captions:
* the real held-out pictures, and what the codec makes of them: the ceiling;
* a training picture of the same concept in another style (of an unseen concept: the one with most words in common);
* the training picture of the same style whose concept has most words in common;
* the training picture nearest to the true one, by the judge: the best that copying could do.

`grid` draws the first concepts with a held-out style, in all styles from the same noise. Cells that training never showed
have a red frame.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from emoji_components import Pictures
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nitro_e.cli import common as cli
from nitro_e.data.catalog import expand_shards
from nitro_e.encoders.codec import AutoencoderDCCodec, load_autoencoder_dc
from nitro_e.rewards.retrieval import Retrieval
from nitro_e.sampling.pipeline import TextToImage

STYLES = ("glossy", "flat", "noto", "twemoji", "outlined")
CELL, ROWS, FRAME = 128, 8, "#d62728"


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    baselines = commands.add_parser("baselines")
    baselines.add_argument("--judge", required=True, metavar="FOLDER")
    baselines.add_argument("--codec", required=True, metavar="FOLDER")
    grid = commands.add_parser("grid")
    grid.add_argument("weights", help="as for nitro-e sample")
    grid.add_argument("--steps", type=int, default=20)
    grid.add_argument("--guidance", type=float, default=3.0)
    grid.add_argument("--rows", type=int, default=ROWS)
    for command in (baselines, grid):
        command.add_argument("--shards", nargs="+", required=True)
        command.add_argument("--test-shards", nargs="+", required=True)
        command.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    return cli.run(lambda: {"baselines": write_baselines, "grid": write_grid}[options.command](options))


def write_baselines(options: argparse.Namespace) -> None:
    """Print and write the share of held-out pictures that each baseline gets right, by split."""
    train = Pictures(expand_shards(options.shards, "--shards"))
    test = Pictures(expand_shards(options.test_shards, "--test-shards"))
    judge = Retrieval(options.judge)
    codec = AutoencoderDCCodec(load_autoencoder_dc(options.codec, torch.float32))
    real = test.pixels(slice(None))
    with torch.no_grad():
        decoded = torch.cat(
            [codec.decode(codec.normalize(codec.encode_pixels(part))) for part in real.split(50)]
        )
        rows = {
            "the real pictures": real,
            "the real pictures through the codec": decoded,
            "same concept, another style": train.pixels(nearest_words(train, test, same_style=False)),
            "same style, nearest concept": train.pixels(nearest_words(train, test, same_style=True)),
            "training picture nearest to the true one": train.pixels(nearest_pictures(judge, train, real)),
        }
        results = {name: score(judge, pixels, test) for name, pixels in rows.items()}
    text = json.dumps(results, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def nearest_words(train: Pictures, test: Pictures, same_style: bool) -> Tensor:
    """For each held-out picture the training picture whose concept has the largest share of words in common."""
    words = [set(concept.split()) for concept in train.concepts]
    found = []
    for concept, style in zip(test.concepts, test.styles):
        wanted = set(concept.split())
        allowed = [row for row, other in enumerate(train.styles) if (other == style) == same_style]
        found.append(max(allowed, key=lambda row: len(wanted & words[row]) / len(wanted | words[row])))
    return torch.tensor(found)


def nearest_pictures(judge: Retrieval, train: Pictures, real: Tensor) -> Tensor:
    shown = torch.cat([judge.embed(train.pixels(rows))[0] for rows in torch.arange(len(train)).split(100)])
    true = torch.cat([judge.embed(part)[0] for part in real.split(100)])
    return (true @ shown.T).argmax(1)


def score(judge: Retrieval, pixels: Tensor, test: Pictures) -> dict:
    """Return shares by split: style right, true picture first, among the first ten, both; and the mean distance."""
    info = [dict(concept=concept, style=style) for concept, style in zip(test.concepts, test.styles)]
    verdicts = [
        verdict
        for rows in torch.arange(len(pixels)).split(100)
        for verdict in judge.judge(pixels[rows], [info[row] for row in rows])
    ]
    results = {}
    for split in sorted(set(test.splits)):
        pairs = [(verdict, record) for verdict, record, of in zip(verdicts, info, test.splits) if of == split]
        right = [verdict.style == record["style"] for verdict, record in pairs]
        first = [verdict.rank <= 10 for verdict, _ in pairs]
        columns = {
            "style": right,
            "first": [verdict.rank == 1 for verdict, _ in pairs],
            "first 10": first,
            "style and first 10": [a and b for a, b in zip(right, first)],
            "novelty": [verdict.distance for verdict, _ in pairs],
        }
        results[split] = {"pictures": len(pairs)} | {
            name: round(sum(values) / len(pairs), 3) for name, values in columns.items()
        }
    return results


def write_grid(options: argparse.Namespace) -> None:
    """Draw concepts by styles; red frames stand for what training never showed."""
    train = Pictures(expand_shards(options.shards, "--shards"))
    test = Pictures(expand_shards(options.test_shards, "--test-shards"))
    shown = set(zip(train.concepts, train.styles))
    concepts = list(
        dict.fromkeys(c for c, split in zip(test.concepts, test.splits) if split == "unseen pair")
    )
    concepts = concepts[: options.rows]
    pipeline = TextToImage.from_pretrained(options.weights)
    label = 150
    sheet = Image.new("RGB", (label + len(STYLES) * (CELL + 8), 24 + len(concepts) * (CELL + 8)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, style in enumerate(STYLES):
        draw.text((label + column * (CELL + 8) + 4, 4), style, "black", font)
    for row, concept in enumerate(concepts):
        prompts = [f"an emoji of {concept}, {style} style" for style in STYLES]
        images = pipeline(
            prompts,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=[torch.Generator().manual_seed(row) for _ in prompts],
        ).images
        top = 24 + row * (CELL + 8)
        draw.text((4, top + CELL // 2 - 8), concept.replace(" with ", "\nwith "), "black", font)
        for column, (style, image) in enumerate(zip(STYLES, images)):
            left = label + column * (CELL + 8)
            sheet.paste(image, (left + 4, top + 4))
            if (concept, style) not in shown:
                draw.rectangle((left + 1, top + 1, left + CELL + 6, top + CELL + 6), outline=FRAME, width=3)
    out = options.out or Path("outputs/emoji.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, optimize=True)
    print(out)


if __name__ == "__main__":
    sys.exit(main())
