"""Convert weights between the released format and our model folders; merge a LoRA adapter on the way.

    nitro-e convert amd/Nitro-E models/nitro-e-512 --file Nitro-E-512px.safetensors
    nitro-e convert amd/Nitro-E models/nitro-e-grpo --file Nitro-E-512px.safetensors --lora ckpt_grpo_512px
    nitro-e convert runs/mine@ema mine-512px.safetensors --to-released
    nitro-e convert runs/mine@ema models/mine --dtype float16
    nitro-e convert mydistilled.safetensors models/fast --resolution 512 --steps 4 --guidance 0

SOURCE is a released .safetensors file, a hub id with --file, a model folder, a run directory or a checkpoint.
A model folder can be sampled at once (nitro-e sample models/nitro-e-512 ...): what sampling needs is written
beside the weights, and so are step, resolved config and environment of a run (`provenance`). The released
format holds the weights of an E-MMDiT alone, bit for bit, for other programs. The REPA projector that some
released files carry is left out and reported, because only training uses it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nitro_e.cli import common as cli
from nitro_e.config import ConfigError, from_dict, parse_json, parse_yaml, read_text, to_dict
from nitro_e.files import atomic_path, commit_of, is_hub_id, save_tensors
from nitro_e.interfaces import Model
from nitro_e.model import EMMDiT, released
from nitro_e.model.pretrained import load_pretrained, locate_lora, read_config, save_pretrained
from nitro_e.record import metrics, run_folder
from nitro_e.sampling.samplers import SamplingConfig, with_overrides
from nitro_e.sampling.sources import find, released_use


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="a new folder, or a new .safetensors file with --to-released"
    )
    parser.add_argument("--file", help="name of the weights in a hub repository or folder")
    parser.add_argument(
        "--revision", help="of the hub repository, for example a commit (default: see docs/model.md)"
    )
    parser.add_argument(
        "--lora", metavar="DIR", help="PEFT adapter to merge: a folder here or in the hub repository"
    )
    parser.add_argument(
        "--resolution", type=int, choices=[512, 1024], help="when the file's name does not say it"
    )
    parser.add_argument(
        "--to-released", action="store_true", help="write the released format instead of a model folder"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="how the weights are to be sampled, as the next two; default: as SOURCE says",
    )
    parser.add_argument(
        "--guidance", type=float, dest="guidance_scale", metavar="SCALE", help="0: no guidance"
    )
    parser.add_argument("--sampler", help=cli.SAMPLERS)
    cli.dtype_flag(parser, "of the result; default: as they are")
    options = parser.parse_args(arguments)
    return cli.run(lambda: print(convert(options)))


def convert(options: argparse.Namespace) -> str:
    """Read, convert and write; return the lines to print."""
    out: Path = options.out
    if out.exists():
        raise ConfigError(f"OUT '{out}' exists; remove it or give another name")
    if options.to_released and out.suffix != ".safetensors":
        raise ConfigError(f"OUT '{out}': --to-released writes a file; its name must end in .safetensors")
    if not options.to_released and out.suffix == ".safetensors":
        raise ConfigError(
            f"OUT '{out}': a model folder is written; for a released-format file add --to-released"
        )
    path = find(options.source, options.file, options.revision)
    lora = None
    if options.lora is not None:
        lora = locate_lora(options.lora, options.source, options.revision)
    model = load_pretrained(path, lora=lora, resolution=options.resolution)
    if options.dtype is not None:
        model.to(getattr(torch, options.dtype))
    out.parent.mkdir(parents=True, exist_ok=True)
    if options.to_released:
        if not isinstance(model, EMMDiT):
            raise ConfigError(
                f"'{path}' is of kind '{model.config.kind}'; the released format is E-MMDiT's alone"
            )
        told = tell_reader(path, model)
        write_file(model, out)
        lines = [f"{out}: the released format; its reader must be told: {told}"]
    else:
        use = read_config(path)["use"] if path.is_dir() else to_dict(released_use(path.name, model))
        sampling = sampling_of(use, options)
        use = {**use, "sampling": to_dict(sampling)}
        write_folder(model, out, use, provenance(path) or from_hub(options))
        lines = [
            f'{out}: model folder; try it: nitro-e sample {out} --prompt "..."',
            f"sampled in {sampling.in_words()}, unless told otherwise",
        ]
        if not path.is_dir() and "-dist" not in path.name and options.steps is None:
            lines.append(
                "(distilled weights have -dist in the file's name; of others say so: --steps 4 --guidance 0)"
            )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines.append(
        f"{parameters:,} parameters in {next(model.parameters()).dtype}"
        + (f", {lora} merged" if lora else "")
    )
    return "\n".join([*lines, *left_out(path)])


def sampling_of(use: dict[str, Any], options: argparse.Namespace) -> SamplingConfig:
    """Return the sampling settings of the result: those of SOURCE, but for what the command line sets."""
    given = {name: getattr(options, name) for name in ("steps", "guidance_scale", "sampler")}
    return with_overrides(from_dict(SamplingConfig, use.get("sampling", {}), "sampling"), given)


def tell_reader(path: Path, model: EMMDiT) -> str:
    """Say what the released format has no place for. Raise ConfigError if its samplers could not follow it."""
    told = [f"attention {', '.join(model.config.attention)}"]
    sampling = read_config(path)["use"].get("sampling", {}) if path.is_dir() else {}
    if sampling.get("time_scale", 1) != 1:
        raise ConfigError(
            f"'{path}' was distilled with time_scale {sampling['time_scale']:g}: the released format cannot say so; without "
            "--to-released you get a model folder, which can"
        )
    if sampling.get("sigmas"):
        times = " or ".join("(" + ", ".join(f"{t:g}" for t in times) + ")" for times in sampling["sigmas"])
        told.append(f"distilled: times {times}, sampler {sampling['sampler']}, guidance 1")
    return "; ".join(told)


def write_file(model: EMMDiT, out: Path) -> None:
    with atomic_path(out) as temporary:
        save_tensors(released.to_released(model), temporary)


def write_folder(model: Model, out: Path, use: dict[str, Any], origin: dict[str, Any] | None) -> None:
    with atomic_path(out) as temporary:
        save_pretrained(model, temporary, use, origin)


def provenance(path: Path) -> dict[str, Any] | None:
    """Tell where weights come from: step, config and environment of a run, or what a model folder says."""
    run = path.parents[2] if (path.parent / "meta.json").is_file() else None
    if run is None or not (run / "config.yaml").is_file():
        if not path.is_dir():
            return None
        about = parse_json(read_text(path / "config.json"), str(path / "config.json"))
        return about.get("provenance") if isinstance(about, dict) else None
    return {
        "weights": path.name,
        "step": run_folder.step_of(path.parent),
        "config": parse_yaml(read_text(run / "config.yaml"), str(run / "config.yaml")),
        "environment": metrics.read_events(run)[0]["environment"],
    }


def from_hub(options: argparse.Namespace) -> dict[str, Any] | None:
    """Tell which files of which commit of a hub repository were read; None for local sources."""
    if Path(options.source).exists() or not is_hub_id(options.source):
        return None
    commit = commit_of(options.source, options.revision)
    return {"repository": options.source, "commit": commit, "file": options.file, "lora": options.lora}


def left_out(path: Path) -> list[str]:
    """Say which tensors of a released file are not in the model."""
    if path.is_dir():
        return []
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(released.PROJECTOR)]
    if not names:
        return []
    return [
        f"left out: {len(names)} tensors of the REPA projector ({names[0]}, ...); it serves training only"
    ]
