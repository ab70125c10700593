"""Publish a pipeline on the hub: its model folder, a model card, and a grid of sample images."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nitro_e.config import ConfigError, parse_json, read_text
from nitro_e.files import save_png, upload, write_text
from nitro_e.record.templating import TEMPLATES
from nitro_e.sampling.sheets import sheet

if TYPE_CHECKING:
    from nitro_e.sampling.pipeline import TextToImage

LICENCES = {
    "llama-3.2-1b": "the text encoder Llama-3.2-1B is under the Llama 3.2 Community License and its repository is gated",
    "dc-ae-f32c32": "the codec DC-AE is under the licence of its repository",
}


def push(
    pipeline: TextToImage,
    repository: str,
    *,
    prompts: Sequence[str] = (),
    scores: str | Path | None = None,
    licence: str = "other",
    private: bool = False,
    message: str = "Add model",
) -> str:
    """Upload to a hub repository (USER/NAME), which is made if it is not there; return its address.

    prompts: of the sample images. scores: the results.json of an evaluation. licence: of these weights, an identifier of
    the hub. Needs `hf auth login` or the variable HF_TOKEN. The codec and the text encoder are named, not uploaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_folder(pipeline, Path(folder), repository, prompts=prompts, scores=scores, licence=licence)
        return upload(Path(folder), repository, private=private, message=message)


def write_folder(
    pipeline: TextToImage,
    folder: Path,
    name: str,
    *,
    prompts: Sequence[str] = (),
    scores: str | Path | None = None,
    licence: str = "other",
) -> None:
    """Write what `push` uploads: config.json, model.safetensors, README.md and, of prompts, samples.png."""
    rows = [] if scores is None else score_rows(Path(scores))  # a wrong file shows before images are drawn
    pipeline.save_pretrained(folder)
    if prompts:
        images = pipeline(list(prompts)).images
        save_png(sheet(images, list(prompts), columns=min(4, len(images))), folder / "samples.png")
    assert pipeline.use is not None
    parameters = sum(parameter.numel() for parameter in pipeline.model.parameters())
    card = TEMPLATES.get_template("model_card.md").render(
        name=name,
        parameters=f"{parameters:,}",
        kind=pipeline.model.config.kind,
        use=pipeline.use,
        sampling=pipeline.defaults.in_words(),
        scores=rows,
        samples=bool(prompts),
        licence=licence,
        notes=[
            LICENCES[part] for part in (pipeline.use.text.name, pipeline.use.codec.name) if part in LICENCES
        ],
    )
    write_text(folder / "README.md", card)


def score_rows(path: Path) -> list[tuple[str, str, str, str]]:
    """Read an evaluation's results.json: (benchmark, setting, score, value with its interval) of every score."""
    data = parse_json(read_text(path), str(path))
    try:
        benchmark = f"{data['benchmark']['name']}, {data['prompts']} prompts"
        return [
            (benchmark, _setting(result["sampling"]), title, _estimate(score["overall"]))
            for result in data["results"]
            for title, score in result["scores"].items()
        ]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"scores: {path} is not the results.json of an evaluation ({error} is missing)"
        ) from None


def _setting(sampling: Mapping[str, Any]) -> str:
    return f"{sampling['steps']} steps of {sampling['sampler']}, guidance {sampling['guidance_scale']:g}"


def _estimate(estimate: Mapping[str, float | None]) -> str:
    value, low, high = (
        "–" if number is None else f"{number:.3f}" for number in map(estimate.get, ("value", "low", "high"))
    )
    return f"{value} [{low}, {high}]"
