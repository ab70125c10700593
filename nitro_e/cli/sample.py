"""Draw images:  nitro-e sample RUN_OR_FOLDER --prompt "a photo of a red circle" --num-images 4

RUN_OR_FOLDER is a shipped name (shapes), a run directory, a checkpoint or a model folder (`@ema` or `@model` at its end
chooses the weights), a .safetensors file in the released format, or a hub repository (--file names the weights in it).
Every PNG carries its prompt and settings as text entries; `grid.png` shows up to 64 of them with their prompts.

    nitro-e sample RUN --prompts-file prompts.txt --out DIR      a prompt per line; also .jsonl, .tsv (PartiPrompts), - for stdin
    nitro-e sample RUN --prompts-file geneval_metadata.jsonl --num-images 4 --layout geneval --out DIR
    torchrun --nproc_per_node 8 -m nitro_e.cli sample RUN --prompts-file ... --out DIR
    nitro-e sample RUN --prompt "..." --steps 1 --optimize-noise hpsv2.1      a start noise that the reward likes

`DIR/manifest.jsonl` names every file with its prompt and seeds. The same command goes on where it was stopped and draws
nothing twice. Lines of a .jsonl file have "prompt", and may have "negative_prompt", "seed" and "id".
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitro_e.cli import common as cli
from nitro_e.cli import processes
from nitro_e.config import ConfigError, environment_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from nitro_e.sampling.layouts import Drawing
    from nitro_e.sampling.noise_search import NoiseSearch
    from nitro_e.sampling.pipeline import TextToImage
    from nitro_e.sampling.samplers import SamplingConfig

MAX_ON_SHEET = 64  # images on grid.png; of more there is none


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    work = functools.cache(lambda: workload(options))
    started = processes.start("sample", options.processes, arguments, lambda count: work().fits(count))
    if started is None:
        return cli.run(lambda: draw(options))
    return started or cli.run(lambda: finish(options))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number = cli.whole(1, 10_000)
    parser.add_argument("source", metavar="RUN_OR_FOLDER")
    parser.add_argument(
        "--prompt", action="append", default=[], type=cli.text, help="several times for several"
    )
    parser.add_argument(
        "--prompts-file",
        metavar="FILE",
        help=".txt (a prompt per line), .jsonl or .tsv; - for standard input",
    )
    parser.add_argument("--negative-prompt", default="", type=cli.text)
    parser.add_argument(
        "--num-images", type=number, default=1, metavar="N", help="images per prompt (default 1)"
    )
    parser.add_argument(
        "--seed", type=cli.seed, default=0, metavar="N", help="of the first image; the next ones count up"
    )
    parser.add_argument("--steps", type=int, help="default: what the weights came with, as for the next ones")
    parser.add_argument(
        "--guidance", type=float, dest="guidance_scale", metavar="SCALE", help="0: no guidance"
    )
    parser.add_argument(
        "--guidance-interval",
        type=cli.real(0, 1),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only while LOW <= t <= HIGH; t falls from 1 (noise) to 0",
    )
    cli.guidance_flags(parser)
    parser.add_argument("--sampler", help=cli.SAMPLERS)
    parser.add_argument(
        "--force", action="store_true", help="let distilled weights sample in ways they were not trained for"
    )
    cli.noise_search_flags(parser)
    parser.add_argument("--height", type=int, metavar="PIXELS")
    parser.add_argument("--width", type=int, metavar="PIXELS")
    parser.add_argument(
        "--aspect",
        type=aspect,
        metavar="W:H",
        help="the size nearest to this shape that the weights were trained at, such as 3:2",
    )
    parser.add_argument(
        "--batch-size", type=cli.whole(1, 65536), default=16, metavar="N", help="images at a time"
    )
    parser.add_argument("--device", type=cli.device, help="default: cuda, mps or cpu, the first there is")
    cli.weights_flags(parser)
    cli.component_flags(
        parser, codec="the codec's files, a local folder or hub id", text="the text encoder's files, likewise"
    )
    cli.download_flag(parser)
    cli.dtype_flag(parser, "of all parts; default: float32 for the model, the others as in training")
    parser.add_argument("--compile", action="store_true", help="slower start, faster steps: for many images")
    parser.add_argument(
        "--int8", action="store_true", help="--compile with 8-bit products, for a CPU and --dtype bfloat16"
    )
    parser.add_argument(
        "--reuse-blocks",
        type=cli.whole(1, 1000),
        default=1,
        metavar="N",
        help="compute the compressed blocks at every N-th step only, an approximation",
    )
    parser.add_argument(
        "--layout",
        choices=("flat", "geneval", "dpg", "parti"),
        default="flat",
        help="of the files: as the scripts of these benchmarks expect them (docs/evaluation.md)",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs"), metavar="DIR")
    processes.flag(parser)
    return parser.parse_args(arguments)


def workload(options: argparse.Namespace) -> processes.Workload:
    """Count what is to be drawn, as processes share it."""
    from nitro_e.sampling.folder import batched
    from nitro_e.sampling.sources import bytes_on_disk

    # one process can read standard input, and nobody knows the size of a reward that searches noise
    if options.prompts_file == "-" or options.optimize_noise not in (None, "shapes"):
        return processes.Workload(0, 0, None)
    drawings = drawings_of(options)
    return processes.Workload(
        images=sum(len(item.seeds) for item in drawings),
        batches=len(list(batched(drawings, options.batch_size))),
        weights=bytes_on_disk(options.source, options.file, options.codec, options.text),
    )


def drawings_of(options: argparse.Namespace) -> list[Drawing]:
    """List the files to be, of all processes; ConfigError if there is nothing to draw."""
    from nitro_e.data.prompts import read_records
    from nitro_e.sampling.layouts import LAYOUTS

    records: list[dict[str, Any]] = [{"prompt": prompt} for prompt in options.prompt]
    world = environment_number("WORLD_SIZE", 1)
    if options.prompts_file == "-" and world > 1:
        raise ConfigError(
            f"--prompts-file -: standard input reaches one of {world} processes only; give a file instead"
        )
    if options.prompts_file is not None:
        records += read_records(options.prompts_file, "--prompts-file")
    if not records:
        raise ConfigError('nothing to draw: give --prompt "..." or --prompts-file FILE')
    return LAYOUTS[options.layout](records, options.num_images, options.seed, options.negative_prompt)


def finish(options: argparse.Namespace) -> None:
    """Do what is left when the processes that this one has started have drawn everything."""
    from nitro_e.config import parse_json, read_text
    from nitro_e.sampling.folder import read_manifest

    drawings = drawings_of(options)
    key = read_manifest(options.out)[drawings[0].file]["key"]
    path = options.out / f"settings-{key}.json"
    write_sheet(drawings, options, parse_json(read_text(path), str(path))["sampling"])
    total = sum(len(item.seeds) for item in drawings)
    print(f"{total} images are in {options.out}/, listed in manifest.jsonl")


def draw(options: argparse.Namespace) -> None:
    """Draw what is not there yet, and say with which settings and where."""
    drawings = drawings_of(options)

    import torch  # after the arguments are known to be right

    from nitro_e.record.environment import default_device
    from nitro_e.sampling.folder import draw_folder
    from nitro_e.sampling.layouts import write_metadata
    from nitro_e.sampling.pipeline import TextToImage
    from nitro_e.sizes import nearest_size

    rank, world = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1)
    pipeline = TextToImage.from_pretrained(
        options.source,
        options.device or default_device(),
        None if options.dtype is None else getattr(torch, options.dtype),
        **cli.chosen_weights(options),
    )
    names = ("steps", "guidance_scale", "guidance_interval", "guidance", "guidance_rescale", "sampler")
    names += ("height", "width")
    overrides = {name: getattr(options, name) for name in names} | {"force": options.force or None}
    if options.aspect is not None:
        if options.height or options.width:
            raise ConfigError("--aspect: --height and --width say the size already; give one or the other")
        sizes = pipeline.sizes()
        overrides |= zip(("height", "width"), sizes[nearest_size(sizes, options.aspect)])
    settings = pipeline.settings(**overrides)
    if settings.guidance_scale in (0, 1) and any(item.negative_prompt for item in drawings):
        raise ConfigError(
            "negative_prompt: without guidance nothing is led away from; give --guidance 1.5 or more, at twice the passes"
        )
    if settings.guidance == "path" and any(item.negative_prompt for item in drawings):
        raise ConfigError(
            "negative_prompt: guidance by the weak pass alone never looks at it; give --guidance-by text or both, or leave "
            "it out"
        )
    search = noise_search(options, drawings, pipeline.device)
    about = settings_of(pipeline, options, settings)
    if search is not None:
        about["noise_search"] = {"reward": options.optimize_noise, **dataclasses.asdict(search.config)}
    if rank == 0:
        print(f"{options.source}: {settings.in_words()}, {about['dtype']} on {about['device']}")
    if options.compile or options.int8:
        pipeline.compile("int8" if options.int8 else None)
    if options.layout == "geneval":
        write_metadata(drawings, options.out)
    drawn = draw_folder(
        pipeline,
        drawings,
        options.out,
        about,
        overrides={**overrides, "reuse_blocks": options.reuse_blocks, "noise_search": search},
        batch_size=options.batch_size,
        rank=rank,
        world=world,
    )
    if processes.PARENT in os.environ:
        return  # the process that started this one tells the end
    if world == 1:
        write_sheet(drawings, options, about["sampling"])
    total = sum(len(item.seeds) for item in drawings)
    kept = f", {total - drawn} were there" if world == 1 and drawn < total else ""
    print(f"{drawn} images drawn{kept}; they are in {options.out}/, listed in manifest.jsonl")


def aspect(given: str) -> float:
    """Read W:H, width over height."""
    width, _, height = given.partition(":")
    return cli.real(1e-3, 1e3)(width) / cli.real(1e-3, 1e3)(height)


def noise_search(
    options: argparse.Namespace, drawings: Sequence[Drawing], device: torch.device
) -> NoiseSearch | None:
    """Build what `--optimize-noise` asks for, if it does; ConfigError for a reward that cannot score the prompts."""
    from nitro_e.rewards import RewardConfig, reward_of_prompts
    from nitro_e.sampling.noise_search import NoiseSearch

    config = cli.noise_search_config(options)
    if config is None:
        return None
    known = {item.prompt: item.record for item in drawings}
    return NoiseSearch(reward_of_prompts(RewardConfig(name=options.optimize_noise), known, device), config)


def settings_of(
    pipeline: TextToImage, options: argparse.Namespace, settings: SamplingConfig
) -> dict[str, Any]:
    """Everything the images depend on besides prompts and seeds."""
    from nitro_e.model.pretrained import locate_lora

    assert pipeline.path is not None
    adapter = {} if options.lora is None else {"lora": stamps(locate_lora(options.lora, options.source))}
    parameter = next(pipeline.model.parameters())
    return {
        "model": options.source,
        "weights": stamps(pipeline.path),
        **adapter,
        "codec": options.codec,
        "text": options.text,
        "sampling": dataclasses.asdict(settings),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "compile": options.compile,
        "int8": options.int8,
        "reuse_blocks": options.reuse_blocks,
    }


def stamps(weights: Path) -> list[Any]:
    """Where weights lie, and name, size and time of every file."""
    files = sorted(weights.iterdir()) if weights.is_dir() else [weights]
    found = [(path, path.stat()) for path in files]
    return [str(weights.resolve()), *([path.name, stat.st_size, stat.st_mtime_ns] for path, stat in found)]


def write_sheet(drawings: list[Drawing], options: argparse.Namespace, sampling: dict[str, Any]) -> None:
    """Write `grid.png` of not too many images: those of a prompt in a row, at least 256 px wide each, with the prompt."""
    if len(drawings) > MAX_ON_SHEET or options.layout != "flat":
        return

    from PIL import Image

    from nitro_e.files import save_png
    from nitro_e.sampling.folder import png_text
    from nitro_e.sampling.sheets import sheet

    images = [Image.open(options.out / item.file).convert("RGB") for item in drawings]
    columns = min(8, options.num_images if options.num_images > 1 else len(images))
    prompts = [item.prompt for item in drawings]
    whole = sheet(images, prompts, columns)
    save_png(whole, options.out / "grid.png", png_text("\n".join(dict.fromkeys(prompts)), sampling))
