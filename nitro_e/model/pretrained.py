"""Models in files: our folders (`config.json` + `model.safetensors`), released files, hub repositories.

A checkpoint of a run that trains an adapter holds `adapter/` in place of `model.safetensors`; what it is put on lies
once, in the run's folder `base/`, and is merged when the folder is loaded.

The `model` of a config.json has a `kind` (none: written before there were kinds, an E-MMDiT). The released
format is E-MMDiT's alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nitro_e.config import ConfigError, class_of_kind, from_dict, parse_json, read_text, to_dict
from nitro_e.files import fetch, is_hub_id, save_tensors
from nitro_e.interfaces import Architecture, Model
from nitro_e.model import released
from nitro_e.model.emmdit import EMMDiT, ModelConfig
from nitro_e.model.lora import add_lora, merge_lora
from nitro_e.model.weights import check_finite

FORMAT = 1


def save_pretrained(
    model: Model,
    folder: str | Path,
    use: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write `config.json` and `model.safetensors`.

    use: what sampling needs to know (codec, text, resolution, ...). provenance: where the weights come from;
    for people.
    """
    save_config(model.config, folder, use, provenance)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_tensors(state, Path(folder) / "model.safetensors")


def save_config(
    config: Architecture,
    folder: str | Path,
    use: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write `config.json` alone, of a model whose weights are a base and an adapter (`load_adapted`)."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "model": to_dict(config), "use": use or {}}
    if provenance:
        content["provenance"] = provenance
    (Path(folder) / "config.json").write_text(json.dumps(content, indent=1) + "\n")


def load_adapted(folder: Path) -> Model:
    """Load a model folder of a checkpoint whose adapter is not merged: RUN/base, and `adapter/` added to it.

    The sums are those of the trainer, in the same order and precision, so that the weights are equal to the bit.
    """
    base = base_of(folder)
    if not (base / "model.safetensors").is_file():
        raise ConfigError(
            f"{folder} holds an adapter alone, and what it was trained on, {base}, is not there; copy it too, or "
            "convert the checkpoint where it was trained: nitro-e convert"
        )
    model = load_pretrained(base)
    with torch.device("meta"):
        layers = model.config.build().adapter_layers()
    add_lora(dict(model.named_parameters()), layers, folder / "adapter")
    return model


def weights_file(folder: Path) -> Path:
    """Name the file whose hash identifies the weights of a model folder: the model's, or the adapter's alone."""
    whole = folder / "model.safetensors"
    return whole if whole.exists() else folder / "adapter" / "adapter_model.safetensors"


def base_of(folder: Path) -> Path:
    """Name the folder of the weights that an adapter in RUN/checkpoints/step-N/FOLDER is added to."""
    return folder.absolute().parents[2] / "base"


def load_pretrained(
    source: str | Path,
    *,
    file: str | None = None,
    lora: str | Path | None = None,
    resolution: int | None = None,
    config: ModelConfig | None = None,
) -> Model:
    """Load a model in eval mode, on the CPU, in the dtype of the file.

    source: our folder, a released `.safetensors` file, or a hub id (then `file` names the file in the repository,
        for example `amd/Nitro-E` with `Nitro-E-512px.safetensors`; without it our layout is expected there).
        The code of a model of your own must have been imported before.
    lora: a PEFT adapter over the released names, which is merged: a folder here or in the same hub repository.
    resolution: 512 or 1024 for released files whose name does not say it (`512px`); decides grid and attention.
    config: the exact config of a released-format file of any other size.
    Raises ConfigError when the weights do not fit, naming what differs.
    """
    path = locate(source, file)
    if path.is_dir():
        if resolution is not None or config is not None:
            raise ConfigError(
                f"{path} has a config.json; resolution and config are for files in the released format"
            )
        if weights_file(path).is_file() and not (path / "model.safetensors").exists():
            model = load_adapted(path)
        else:
            model = _build(read_config(path)["model"], read_safetensors(path / "model.safetensors"), path)
    else:
        state = read_safetensors(path)
        if not released.is_released(state):
            raise ConfigError(
                f"{path} is not in the released format; our own models are folders with a config.json"
            )
        if config is None:
            config = released.infer_config(state, *_released_choices(path.name, resolution))
        model = _build(config, released.from_released(state, config), path)
    return model if lora is None else with_lora(model, locate_lora(lora, source))


def with_lora(model: Model, folder: str | Path, strength: float = 1.0) -> Model:
    """Return a copy of the model with a PEFT adapter merged, `strength` times; ConfigError if it is not an E-MMDiT's."""
    if not isinstance(model, EMMDiT):
        raise ConfigError(
            f"lora '{folder}': only E-MMDiT's are merged; the model is of kind '{model.config.kind}'"
        )
    merged = merge_lora(released.to_released(model), folder, strength)
    state = released.from_released(merged, model.config)
    return _build(model.config, state, Path(folder))


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read `config.json` of a model folder: {"model": Architecture, "use": dict}."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} is not a model folder: it has no config.json; of a checkpoint, give model/ or ema/"
        )
    data = parse_json(read_text(path), str(path))
    if not isinstance(data, dict) or data.get("format") != FORMAT or "model" not in data:
        found = data.get("format") if isinstance(data, dict) else data
        raise ConfigError(f"{path}: format {found!r} is not {FORMAT}; written by another program or version")
    kind = data["model"].get("kind") if isinstance(data["model"], dict) else None
    config_class = class_of_kind(Architecture, kind, f"{path}: model.kind", imports=False)
    return {"model": from_dict(config_class, data["model"], "model"), "use": data.get("use", {})}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a file of weights, which must be float32, bfloat16, float16 or float64 and finite."""
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} is not a readable safetensors file ({error}); it may be truncated, copy it again"
        ) from None
    for name, tensor in state.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ConfigError(
                f"{path}: tensor '{name}' is {tensor.dtype}; weights must be float32, bfloat16 or float16"
            )
    check_finite(state, path)
    return state


def _build(config: Architecture, state: dict[str, torch.Tensor], source: Path) -> Model:
    model = config.build_empty()
    load_state(model, state, source, assign=True)
    # parameters have the file's dtype now; buffers that are in no file, such as position tables, follow
    dtype = next(iter(state.values())).dtype
    for name, buffer in model.named_buffers():
        if name not in state and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    return model.eval()


def load_state(
    module: torch.nn.Module, state: dict[str, torch.Tensor], source: Any, assign: bool = False
) -> None:
    """Call `load_state_dict`, strictly, after `check_fits`."""
    check_fits(module, state, source)
    module.load_state_dict(state, assign=assign)


def check_fits(module: torch.nn.Module, state: dict[str, torch.Tensor], source: Any) -> None:
    """Raise ConfigError for a state dict of other names or shapes, in one line with the first of them."""
    own = module.state_dict()
    wrong = {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "misshapen": [
            f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    detail = "; ".join(f"{len(names)} {what}, such as {names[0]}" for what, names in wrong.items() if names)
    if detail:
        raise ConfigError(f"the weights of {source} are of another architecture: {detail}")


def locate(source: str | Path, file: str | None = None, revision: str | None = None) -> Path:
    """Return the local folder or file meant by `source`, downloaded if it is a hub id."""
    path = Path(source) / file if file else Path(source)
    if Path(source).exists():
        if not path.exists():
            raise ConfigError(f"{path} does not exist")
        if revision is not None:
            raise ConfigError(
                f"revision '{revision}': '{source}' is on this machine; only hub ids have revisions"
            )
        return path
    if not is_hub_id(source):
        raise ConfigError(f"'{source}' is neither a folder or file here nor a hub id such as amd/Nitro-E")
    if file is not None:
        return _download(str(source), revision, file) / file
    return _download(str(source), revision, "model.safetensors", "config.json")


def locate_lora(lora: str | Path, source: str | Path, revision: str | None = None) -> Path:
    """Return the adapter folder meant by `lora`: here, in the folder `source`, or in the hub repository `source`."""
    for folder in (Path(lora), Path(source) / lora):
        if folder.is_dir():
            return folder
    if Path(source).exists() or not is_hub_id(source):
        raise ConfigError(f"lora '{lora}' is not a folder")
    names = (f"{lora}/adapter_model.safetensors", f"{lora}/adapter_config.json")
    return _download(str(source), revision, *names) / lora


def _download(repository: str, revision: str | None, *names: str) -> Path:
    """Return the folder that holds these files of a hub repository."""
    try:
        return fetch(repository, names, revision)
    except Exception as error:  # the hub raises many kinds: no network, no such repository, no access
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"'{repository}' is not here, and the hub gives no '{names[0]}' of that repository: {reason}"
        ) from None


def _released_choices(name: str, resolution: int | None) -> tuple[int, tuple[str, ...]]:
    """Return base grid and attention cycle of one of the two released resolutions."""
    if resolution is None:
        resolution = next((size for size in (512, 1024) if f"{size}px" in name), None)
    presets = {512: "nitro-e-512", 1024: "nitro-e-1024"}
    if resolution not in presets:
        raise ConfigError(
            f"{name}: give resolution=512 or 1024; the released weights do not show it (got {resolution})"
        )
    config = from_dict(ModelConfig, {"preset": presets[resolution]})
    return config.base_grid, config.attention
