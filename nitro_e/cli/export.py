"""Write a model for other programs.

    nitro-e export MODEL OUT --diffusers      a folder that diffusers loads, codec and text encoder included
    nitro-e export MODEL OUT --onnx           transformer.onnx and decoder.onnx
    nitro-e export MODEL OUT --torch          the same two as programs of torch.export (.pt2)

MODEL is what `nitro-e sample` takes: a run directory, a checkpoint, a model folder, a released .safetensors file, a hub id
or `shapes`; `@ema` or `@model` at its end chooses the weights. OUT is a new folder. Programs take any number of images at once and are compared with the model
after writing; prompts.npz beside them holds the embeddings of "" and of every --prompt. docs/export.md shows how to use
what is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nitro_e.cli import common as cli
from nitro_e.config import ConfigError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="MODEL")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    kind = parser.add_mutually_exclusive_group(required=True)
    for name in ("diffusers", "onnx", "torch"):
        kind.add_argument(f"--{name}", dest="kind", action="store_const", const=name)
    parser.add_argument(
        "--prompt", action="append", default=[], type=cli.text, help="to embed for programs; several times"
    )
    cli.weights_flags(parser)
    cli.dtype_flag(
        parser,
        "of all parts of a diffusers folder; default: float32 for the model, the others as in training",
    )
    cli.component_flags(
        parser, codec="the codec's files, a local folder or hub id", text="the text encoder's files, likewise"
    )
    cli.download_flag(parser)
    options = parser.parse_args(arguments)
    return cli.run(lambda: export(options))


def export(options: argparse.Namespace) -> None:
    """Load, write and say what was written."""
    out: Path = options.out
    if out.exists():
        raise ConfigError(f"OUT '{out}' exists; remove it or give another name")
    if options.kind == "diffusers" and options.prompt:
        raise ConfigError(
            "--prompt is for --onnx and --torch; a diffusers folder has the text encoder itself"
        )
    if options.kind != "diffusers" and options.dtype not in (None, "float32"):
        raise ConfigError(f"--dtype {options.dtype}: programs are written in float32; leave it out")

    import torch

    from nitro_e.files import atomic_path
    from nitro_e.sampling.pipeline import TextToImage

    dtype = options.dtype if options.kind == "diffusers" else "float32"
    pipeline = TextToImage.from_pretrained(
        options.source, dtype=None if dtype is None else getattr(torch, dtype), **cli.chosen_weights(options)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as folder:
        if options.kind == "diffusers":
            from nitro_e.sharing.diffusers_pipeline import EmmditPipeline

            EmmditPipeline.of(pipeline).save_pretrained(folder)
        else:
            from nitro_e.sharing import programs

            write = programs.write_onnx if options.kind == "onnx" else programs.write_torch
            differences = write(pipeline, folder, options.prompt)
    if options.kind == "diffusers":
        print(f"{out}: a diffusers folder; {pipeline.defaults.in_words()} unless told otherwise")
        return
    for name, difference in differences.items():
        print(f"{name}: largest difference to the model {difference:.2g} (float32, CPU, batches of 1 and 3)")
    which = (
        f"ONNX opset {programs.OPSET}"
        if options.kind == "onnx"
        else f"torch.export of torch {torch.__version__}"
    )
    print(f"{out}: {which}; {pipeline.defaults.in_words()} (export.json)")
