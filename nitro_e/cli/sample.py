"""Draw images:  nitro-e sample RUN_OR_FOLDER --prompt "a photo of a red circle" --num-images 4

RUN_OR_FOLDER is a run directory, a checkpoint or a model folder; `@ema` or `@model` at its end chooses the weights.
Every PNG carries its prompt and settings as text entries; `grid.png` shows all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path

from nitro_e.cli import common as cli
from nitro_e.config import ConfigError, read_text


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return cli.run(lambda: draw(options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="RUN_OR_FOLDER")
    parser.add_argument(
        "--prompt", action="append", default=[], type=cli.text, help="may be given several times"
    )
    parser.add_argument("--prompts-file", type=Path, help="one prompt per line")
    parser.add_argument("--negative-prompt", default="", type=cli.text)
    parser.add_argument(
        "--num-images",
        type=cli.whole(1, 10_000),
        default=1,
        metavar="N",
        help="images per prompt (default 1)",
    )
    parser.add_argument(
        "--seed", type=cli.seed, default=0, metavar="N", help="of the first image; the next ones count up"
    )
    parser.add_argument("--steps", type=int, help="default: what the weights came with, as for the next ones")
    parser.add_argument(
        "--guidance", type=float, dest="guidance_scale", metavar="SCALE", help="0: no guidance"
    )
    parser.add_argument("--sampler", help="euler, heun or multistep")
    parser.add_argument(
        "--force", action="store_true", help="let distilled weights sample in ways they were not trained for"
    )
    parser.add_argument("--height", type=int, metavar="PIXELS")
    parser.add_argument("--width", type=int, metavar="PIXELS")
    parser.add_argument("--batch-size", type=cli.whole(1, 65536), default=16, metavar="N")
    parser.add_argument("--device", type=cli.device, help="default: cuda, mps or cpu, the first there is")
    cli.component_flags(
        parser, codec="the codec's files, a local folder or hub id", text="the text encoder's files, likewise"
    )
    cli.download_flag(parser)
    cli.dtype_flag(parser, "of all parts; default: float32 for the model, the others as in training")
    parser.add_argument("--compile", action="store_true", help="slower start, faster steps: for many images")
    parser.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR")
    return parser.parse_args(arguments)


def draw(options: argparse.Namespace) -> None:
    """Sample, save and say where."""
    prompts = read_prompts(options)

    import torch

    from nitro_e.files import save_png
    from nitro_e.sampling.pipeline import TextToImage, image_grid

    device = options.device or default_device(torch)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    pipeline = TextToImage.from_pretrained(
        options.source,
        device,
        dtype,
        codec=options.codec,
        text=options.text,
        allow_download=options.allow_download,
    )
    if options.compile:
        pipeline.compile()
    repeated = [prompt for prompt in prompts for _ in range(options.num_images)]
    seeds = list(range(options.seed, options.seed + len(repeated)))
    overrides = {
        name: getattr(options, name) for name in ("steps", "guidance_scale", "sampler", "height", "width")
    }
    overrides["force"] = options.force or None
    images = pipeline(
        repeated,
        negative_prompt=options.negative_prompt,
        seeds=seeds,
        batch_size=options.batch_size,
        progress=True,
        **overrides,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(pipeline.settings(**overrides))
    for index, (image, prompt, seed) in enumerate(zip(images, repeated, seeds)):
        details = {
            **settings,
            "negative_prompt": options.negative_prompt,
            "seed": seed,
            "model": options.source,
        }
        path = options.out / f"{index:04d}-{slug(prompt)}-{seed}.png"
        save_png(image, path, png_text(prompt, details))
    columns = options.num_images if options.num_images > 1 else min(8, len(images))
    save_png(image_grid(images, columns), options.out / "grid.png", png_text("\n".join(prompts), settings))
    print(f"{len(images)} images and grid.png are in {options.out}/")


def read_prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    if options.prompts_file is not None:
        if not options.prompts_file.is_file():
            raise ConfigError(f"--prompts-file '{options.prompts_file}' does not exist or is no file")
        prompts += [line.strip() for line in read_text(options.prompts_file).splitlines() if line.strip()]
    if not prompts:
        raise ConfigError('nothing to draw: give --prompt "..." or --prompts-file FILE')
    return prompts


def default_device(torch) -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def png_text(prompt: str, details: dict):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("prompt", prompt)
    info.add_itxt("settings", json.dumps(details))
    return info


def slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"
