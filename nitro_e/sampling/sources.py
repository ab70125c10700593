"""Weights behind a name, and what sampling needs to know of them besides."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from nitro_e.config import ConfigError, from_dict
from nitro_e.encoders.components import WEIGHTS, ComponentConfig, chosen_component, pinned
from nitro_e.files import cached_folder, is_hub_id
from nitro_e.interfaces import Model
from nitro_e.model import EMMDiT
from nitro_e.model.pretrained import load_pretrained, locate, locate_lora, read_config
from nitro_e.record.run_folder import NAMED, model_folder, split_source
from nitro_e.sampling.samplers import SamplingConfig
from nitro_e.sizes import parse_sizes

# the encoders of the released weights
RELEASED = {
    "codec": ComponentConfig(name="dc-ae-f32c32"),
    "text": ComponentConfig(name="llama-3.2-1b", clean_caption=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """The codec, text encoder and settings that sampling needs besides the weights; the `use` entry of a model folder's config.json.

    Hub repositories are named with their commit, so that later images come from the same files.
    """

    codec: ComponentConfig
    text: ComponentConfig
    sampling: SamplingConfig
    sizes: tuple[str, ...] = ()  # aspect buckets that the weights were trained at, HEIGHTxWIDTH in pixels

    def __post_init__(self) -> None:
        for part in ("codec", "text"):
            object.__setattr__(self, part, pinned(getattr(self, part)))
        parse_sizes(self.sizes, "sizes")


class Loaded(NamedTuple):
    model: Model  # on the CPU, in the dtype of the file
    use: Use
    path: Path  # of the model folder or the file


def load(
    source: str | Path,
    *,
    file: str | None = None,
    revision: str | None = None,
    lora: str | None = None,
    resolution: int | None = None,
) -> Loaded:
    """Load the weights that `find` finds, with a LoRA adapter merged if one is named.

    lora: a PEFT folder, here or in the same hub repository. resolution: 512 or 1024, for released files whose name does
    not say it.
    """
    path = find(source, file, revision)
    adapter = None if lora is None else locate_lora(lora, source, revision)
    if path.is_dir():  # before the weights: a wrong config shows at once
        use = from_dict(Use, read_config(path)["use"], "use")
        return Loaded(load_pretrained(path, lora=adapter, resolution=resolution), use, path)
    model = load_pretrained(path, lora=adapter, resolution=resolution)
    return Loaded(model, released_use(path.name, model), path)


def find(source: str | Path, file: str | None = None, revision: str | None = None) -> Path:
    """Find the model folder or the file of weights that `source` means.

    source: a shipped name, a run, a checkpoint, a model folder (`@model` or `@ema` choosing the weights), a
    `.safetensors` file in the released format, or a hub id. file: the name of the weights in a folder or a hub
    repository; revision: of the repository.
    """
    name, here = split_source(source)[0], Path(source)
    hub = is_hub_id(name) and not Path(name).exists() and not here.parent.is_dir()
    if file is not None or revision is not None or here.is_file() or hub:
        return locate(source, file, revision)
    if not Path(name).is_dir() and str(source) not in NAMED:
        raise ConfigError(
            f"'{name}' does not exist; give a run, a checkpoint, a model folder, a .safetensors file in the released "
            f"format, a hub id such as amd/Nitro-E, or the name of shipped weights ({', '.join(NAMED)})"
        )
    return model_folder(source)


def released_use(name: str, model: Model) -> Use:
    """Tell how released weights are sampled: 20 guided steps, or 4 without guidance if the file's name has `-dist`."""
    assert isinstance(model, EMMDiT)
    distilled = "-dist" in name
    sampling = SamplingConfig(
        resolution=32 * model.config.base_grid * model.config.patch_size,  # 32 pixels per latent cell
        steps=4 if distilled else 20,
        guidance_scale=0.0 if distilled else 4.5,
        sampler="euler",
        grid="released",
    )
    return Use(codec=RELEASED["codec"], text=RELEASED["text"], sampling=sampling)


def bytes_on_disk(
    source: str | Path, file: str | None = None, codec: str | None = None, text: str | None = None
) -> int | None:
    """Add up the files of the weights that `source` means, of their codec and of their text encoder.

    codec, text: other files than in training. None if some are not on this machine yet.
    """
    path = find(source, file)
    defaults = from_dict(Use, read_config(path)["use"], "use").__dict__ if path.is_dir() else RELEASED
    total = _size(path)
    codec_config = chosen_component("codec", codec, defaults["codec"])
    for config in (codec_config, chosen_component("text", text, defaults["text"])):
        if config.name not in WEIGHTS:  # it has none
            continue
        weights = Path(config.path or WEIGHTS[config.name].source).expanduser()
        folder = weights if weights.is_dir() else cached_folder(str(weights), config.revision)
        if folder is None:
            return None
        total += _size(folder)
    return total


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*.safetensors") if path.is_dir() else [path]))
