"""Prepare and look at training data. Every command can be killed and run again.

    nitro-e data pack folder photos/ --captions photos/captions.csv --out data/photos --name photos
    nitro-e data pack sa1b 'sa1b/sa_*.tar' --captions captions.parquet --out data/sa1b --name sa1b --processes 32
    nitro-e data encode 'data/photos/images-*.tar' --out data/photos --codec dc-ae-f32c32
    torchrun --nproc_per_node 8 -m nitro_e.cli data encode 'data/sa1b/images-*.tar' --out data/sa1b --codec dc-ae-f32c32
    nitro-e data verify 'data/photos/*.tar' --deep
    nitro-e data plan configs/nitro_e_512/1_pretrain.yaml --images 25e6

Then train with data.shards='["data/photos/latents-*.tar"]'.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from functools import partial
from pathlib import Path
from typing import TypeVar

from nitro_e import config
from nitro_e.cli import common as cli
from nitro_e.config import ConfigError
from nitro_e.data.catalog import expand_shards
from nitro_e.data.index import shard_index
from nitro_e.data.making import encode, jobs, pack, plan, stats, verify
from nitro_e.encoders.components import (
    build_codec,
    build_text_encoder,
    build_vision_encoder,
    chosen_component,
    codec_shape,
    pinned,
    text_shape,
    vision_width,
)
from nitro_e.encoders.random_weights import encode_flops
from nitro_e.record.progress import bar

T = TypeVar("T", bound=config.Config)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, (add_arguments, run, text) in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        add_arguments(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    codes: list[int | None] = [0]  # that of a command whose reader has read enough
    return cli.run(lambda: codes.append(args.run(args))) or codes[-1] or 0


def pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("layout", choices=pack.LAYOUTS, help="how the input is laid out")
    parser.add_argument("input", nargs="+", help="folder, table, or archives (globs and brace ranges)")
    parser.add_argument(
        "--captions", type=Path, help="table (csv, tsv, jsonl, parquet) or folder of .txt files"
    )
    parser.add_argument("--captions-from-names", action="store_true", help="folder: file names are captions")
    parser.add_argument(
        "--id-column", default="id", help="of --captions for archives; file names are reduced to their stem"
    )
    parser.add_argument("--image-column", default="image", help="of tables and parquet")
    parser.add_argument(
        "--caption-column", help="dots reach into objects (default: caption; journeydb: prompt)"
    )
    parser.add_argument("--caption-key", default="caption", help="of json members, where there is no txt")
    parser.add_argument("--name", default="sample", help="start of every key; give each source its own")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument(
        "--resize", type=int, help="make larger images smaller, to this shorter side in pixels"
    )
    parser.add_argument("--min-side", type=int, default=64, help="leave out smaller images, pixels")
    parser.add_argument(
        "--max-aspect",
        type=cli.real(1),
        default=4.0,
        metavar="RATIO",
        help="leave out images whose longer side is more than so many shorter ones",
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="of tables, parquet and --captions: goes into json, for data.captions and data.where",
    )
    parser.add_argument(
        "--shuffle", type=int, default=0, metavar="SEED", help="of folders and tables; -1 keeps their order"
    )
    job_arguments(parser)


def run_pack(args: argparse.Namespace) -> None:
    args.caption_column = args.caption_column or pack.CAPTION_COLUMN.get(args.layout, "caption")
    args.shuffle = None if args.shuffle < 0 else args.shuffle
    args.keep = tuple(args.keep)
    options = from_flags(pack.PackConfig, args)
    captions = pack.CaptionSource(
        args.captions, args.id_column, args.captions_from_names, args.out / ".journal"
    )
    job = from_flags(jobs.JobConfig, args)
    pack.pack(pack.make_units(args.layout, args.input, options, captions), job)


def encode_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="packed shards")
    cli.component_flags(
        parser,
        codec="a name, NAME=FOLDER for local files: writes latents-*.tar",
        text="likewise the text encoder: writes text-*.tar",
        vision="likewise the vision encoder: writes features-*.tar",
    )
    stored_text_flags(parser)
    parser.add_argument(
        "--caption", metavar="KEY", help="encode the text under this key of the json: writes text_KEY-*.tar"
    )
    parser.add_argument("--text-length", type=int, help="tokens per caption (default: the encoder's)")
    parser.add_argument(
        "--text-layers", choices=("last", "normed_mean"), default="last", help="of Llama; see docs/model.md"
    )
    parser.add_argument(
        "--grid",
        type=cli.whole(1, 1024),
        nargs=2,
        metavar=("H", "W"),
        help="of the vision features, without --codec",
    )
    cli.dtype_flag(parser, "of the encoders (default: bfloat16 on a GPU, float32 elsewhere)")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument(
        "--buckets",
        nargs="+",
        default=[],
        metavar="HxW",
        help="aspect buckets: each image at the size nearest to its shape, in place of a square",
    )
    parser.add_argument("--caption-key", default="caption", help="of json members, where there is no txt")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--workers", type=int, help="processes that decode images; by default the cores of this rank but one"
    )
    parser.add_argument("--device", type=cli.device, help="default: this rank's GPU, else the CPU")
    job_arguments(parser, processes=False)


def stored_text_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-format", choices=("padded", "ragged"), default="padded", help="ragged keeps real tokens only"
    )
    parser.add_argument(
        "--text-dtype",
        choices=("float16", "int8"),
        default="float16",
        help="int8, with a scale per token, takes half of the space",
    )


def run_encode(args: argparse.Namespace) -> None:
    device = args.device or rank_device()
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    builders = {"codec": build_codec, "text": build_text_encoder, "vision": build_vision_encoder}
    built, names = {}, {}
    for kind, builder in builders.items():
        if value := getattr(args, kind):
            component = chosen_component(kind, value, dtype=dtype)
            if kind == "text":
                component = dataclasses.replace(component, length=args.text_length, layers=args.text_layers)
            built[kind] = builder(component, device)
            column = {"codec": "latents", "vision": "features"}.get(kind, kind)
            names[column] = config.to_dict(pinned(component))
    grid = tuple(args.grid) if args.grid else None
    encoders = encode.Encoders(**built, grid=grid, names=names, device=device, caption=args.caption)
    args.buckets = tuple(args.buckets)
    args.workers = encode.usual_workers() if args.workers is None else args.workers
    options, job = from_flags(encode.EncodeConfig, args), from_flags(jobs.JobConfig, args)
    encode.encode(expand_shards(args.shards, "shards"), encoders, options, job)


def job_arguments(parser: argparse.ArgumentParser, processes: bool = True) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    if processes:
        parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--rank", type=cli.whole(), default=os.environ.get("RANK", "0"), help="of this process or array job"
    )
    parser.add_argument(
        "--world", type=cli.whole(1), default=os.environ.get("WORLD_SIZE", "1"), help="number of ranks"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="redo what was made from other input or options"
    )
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.001, help="stop when more samples are unusable"
    )


def from_flags(cls: type[T], args: argparse.Namespace) -> T:
    """Build a config from the flags of the same names; its other fields keep their defaults."""
    names = [field.name for field in dataclasses.fields(cls) if hasattr(args, field.name)]
    return cls(**{name: getattr(args, name) for name in names})


def rank_device() -> str:
    """Name this rank's GPU, or else the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--deep", action="store_true", help="decode every image too")
    parser.add_argument("--processes", type=cli.whole(1, 512), default=1, metavar="N")
    parser.add_argument("--caption-key", default="caption")
    parser.add_argument("--report", type=Path, help="write all problems as JSON lines")


def run_verify(args: argparse.Namespace) -> int:
    found = verify.verify(expand_shards(args.shards, "shards"), args.deep, args.processes, args.caption_key)
    refuse_empty(found.samples or len(found.problems), args.shards)
    for problem in found.problems[:50]:
        print(problem)
    if len(found.problems) > 50:
        print(f"... and {len(found.problems) - 50} more")
    if args.report is not None:
        args.report.write_text(
            "".join(json.dumps(dataclasses.asdict(problem)) + "\n" for problem in found.problems)
        )
    print(
        f"{found.shards} shards, {found.samples} samples, {found.nbytes / 1e9:.3f} GB: {len(found.problems)}"
        " problems"
    )
    if found.repeated:
        print(f"note: {found.repeated} keys occur in several shards; samples are told apart by shard and key")
    return 1 if found.problems else 0


def refuse_empty(found: int, shards: list[str]) -> None:
    if not found:
        raise ConfigError(f"there are no samples in {', '.join(shards)}; pack or copy the shards again")


def index_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--force", action="store_true", help="scan again what has an index")
    parser.add_argument("--processes", type=cli.whole(1, 512), default=1, metavar="N")


def run_index(args: argparse.Namespace) -> None:
    shards, samples = expand_shards(args.shards, "shards"), 0
    work = jobs.each(partial(shard_index, force=args.force), args.processes)
    for _, index in bar(work(shards), total=len(shards), desc="index", unit="shard"):
        samples += len(index.rows)
    refuse_empty(samples, args.shards)
    print(f"{samples} samples in {len(shards)} shards")


def stats_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+")
    parser.add_argument(
        "--probe", type=cli.whole(), default=16, metavar="N", help="samples per shard that are decoded"
    )


def run_stats(args: argparse.Namespace) -> None:
    found = stats.stats(expand_shards(args.shards, "shards"), args.probe)
    refuse_empty(found["samples"], args.shards)
    print(json.dumps(found, indent=2))


def head_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+")
    parser.add_argument("-n", "--count", type=cli.whole(1), default=5, metavar="N")
    parser.add_argument("--sheet", type=Path, help="write their images side by side to this PNG")


def run_head(args: argparse.Namespace) -> None:
    lines = stats.head(expand_shards(args.shards, "shards"), args.count, args.sheet)
    refuse_empty(len(lines), args.shards)
    for line in lines:
        print(json.dumps(line, ensure_ascii=False))


def which_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="config of a run: configs/*.yaml or RUN/config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--step", type=cli.whole(0, 10**9), required=True, metavar="N")


def run_which(args: argparse.Namespace) -> None:
    from nitro_e.stages.recipe import RunConfig

    run = config.load(RunConfig, args.config, args.overrides)
    if run.data is None:
        raise ConfigError(f"{args.config}: stage.kind '{run.stage.kind}' reads no data")
    data = run.stage_kind.open_data(run)
    batch = run.batch.global_
    for key in data.keys(range(args.step * batch, (args.step + 1) * batch)):
        print(key)


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="recipe of a stage that reads data")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--images", type=cli.real(1), required=True, metavar="N", help="such as 25e6")
    parser.add_argument(
        "--shards", nargs="+", default=[], help="packed images to measure; without, 512 px JPEGs are assumed"
    )
    stored_text_flags(parser)
    parser.add_argument(
        "--tokens", type=cli.whole(1, 8192), metavar="N", help="real tokens of a caption (default: all)"
    )
    parser.add_argument(
        "--teraflops",
        type=cli.real(0.001),
        default=300,
        metavar="X",
        help="that a GPU reaches, such as a third of an H100's peak; nitro-e rehearse measures yours",
    )


def run_plan(args: argparse.Namespace) -> None:
    from nitro_e.stages.recipe import RunConfig

    run = config.load(RunConfig, args.config, args.overrides)
    components, latents = run.components, codec_shape(run.components.codec)
    (width, length), vision = text_shape(components.text), components.vision
    features = None if vision is None else vision_width(vision)
    for kind, component, shape in (
        ("codec", components.codec, latents),
        ("text", components.text, width),
        ("vision", vision, features),
    ):
        if component is not None and shape is None:
            raise ConfigError(
                f"components.{kind}: the shape of '{component.name}' from '{component.path}' is known to its files alone; "
                f"plan with components.{kind}={component.name}"
            )
    if run.data is None or run.flops_per_step is None:
        raise ConfigError(
            f"{args.config}: stage.kind '{run.stage.kind}' reads no data whose training is counted; give a recipe of stage 1 "
            "or 2"
        )
    (channels, stride), side = latents, run.data.resolution // latents[1]
    cells = run.token_grid(stride)
    vectors = None if features is None else (cells[0] * cells[1], features)
    options = encode.EncodeConfig(text_format=args.text_format, text_dtype=args.text_dtype)
    sizes = plan.encoded((channels, side, side), (length, width), vectors, options, args.tokens)
    encoders = {"latents": components.codec, "text": components.text, "features": vision}
    flops = {
        name: encode_flops(encoders[name].name, run.data.resolution, length, cells)
        for name in bar(sizes, desc="counting FLOPs")
    }
    shards = expand_shards(args.shards, "shards") if args.shards else []
    images = ("images", plan.measured(shards)) if shards else ("images, assumed", plan.stored(plan.ASSUMED))
    columns = [plan.Column(*images), *(plan.Column(name, size, flops[name]) for name, size in sizes.items())]
    seen, each = run.batch.global_ * run.engine.steps, run.flops_per_step / run.batch.global_
    print("\n".join(plan.lines(columns, round(args.images), seen, each, args.teraflops)))


COMMANDS = {
    "pack": (pack_arguments, run_pack, "captioned images in the layouts people have -> shards"),
    "encode": (encode_arguments, run_encode, "shards -> latents, text embeddings, vision features"),
    "verify": (
        verify_arguments,
        run_verify,
        "check shards against themselves, their index and their manifest",
    ),
    "index": (index_arguments, run_index, "scan shards in advance"),
    "stats": (stats_arguments, run_stats, "count members, captions, sizes"),
    "head": (head_arguments, run_head, "show the first samples"),
    "which": (which_arguments, run_which, "the keys of a global batch"),
    "plan": (plan_arguments, run_plan, "storage and GPU hours for a number of images"),
}
