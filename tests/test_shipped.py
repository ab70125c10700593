"""The weights that the package brings along: every stage by its name, with where it comes from."""

import re
from pathlib import Path

import pytest
import torch

from nitro_e.config import parse_json, read_text
from nitro_e.files import EMOJI, SHIPPED
from nitro_e.model.lora import merge_lora
from nitro_e.model.pretrained import load_pretrained
from nitro_e.record.run_folder import model_folder
from nitro_e.sampling.pipeline import TextToImage

PACKAGE = Path(__file__).parent.parent / "nitro_e"


@pytest.mark.parametrize(
    "name, steps, guidance", [("shapes", 20, 3.0), ("shapes-grpo", 20, 1.0), ("shapes-4step", 4, 1.0)]
)
def test_every_stage_is_sampled_by_its_name_as_it_was_made_for(name, steps, guidance):
    pipeline = TextToImage.from_pretrained(name)
    assert (pipeline.defaults.steps, pipeline.defaults.guidance_scale) == (steps, guidance)
    image = pipeline("a photo of a red circle", num_inference_steps=4).images[0]
    assert image.size == (64, 64)


@pytest.mark.parametrize("name", ["shapes-grpo", "shapes-4step"])
def test_weights_say_how_they_were_made_and_from_what(name):
    path = model_folder(name) / "config.json"
    provenance = parse_json(read_text(path), str(path))["provenance"]
    assert provenance["first_weights"]["name"] == "shapes"
    assert re.fullmatch("[0-9a-f]{64}", provenance["first_weights"]["sha256"])
    assert all(command.startswith("python ") for command in provenance["commands"])
    assert provenance["config"]["run"] is None


def adapted(name: str) -> dict[str, torch.Tensor]:
    """The weights that an adapter may change, by their names in adapter files."""
    model = load_pretrained(model_folder(name)).float()
    return {
        f"{part}.weight": weight
        for layer in model.adapter_layers()
        for part, weight in zip(
            layer.names, model.get_parameter(f"{layer.path}.weight").detach().chunk(len(layer.names))
        )
    }


def test_the_adapter_makes_the_merged_weights_of_the_first_ones():
    first, shipped = adapted("shapes"), adapted("shapes-grpo")
    merged = merge_lora(first, SHIPPED / "grpo" / "adapter")
    # all three are float16: a single weight is off by no more than the rounding of the largest of its matrix
    for name, weight in merged.items():
        assert (weight - shipped[name]).abs().max() <= 2**-11 * shipped[name].abs().max(), name
    error = sum((merged[name] - shipped[name]).square().sum() for name in merged).sqrt()
    learned = sum((first[name] - shipped[name]).square().sum() for name in merged).sqrt()
    assert error < 0.02 * learned


def size(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return sum(path.stat().st_size for path in files)


def test_the_package_stays_small():
    """The weights of real pictures have a bound of their own; all else has the one it always had."""
    assert size(PACKAGE) - size(EMOJI) < 30e6
    assert size(EMOJI) < 38e6


def test_the_weights_of_real_pictures_say_how_they_were_made():
    provenance = parse_json(read_text(EMOJI / "model/config.json"), "config.json")["provenance"]
    assert "configs/emoji/1_pretrain.yaml" in provenance["environment"]["command"]
    assert provenance["step"] == provenance["config"]["engine"]["steps"] == 4000
    for name in ("codec", "vision"):
        metrics = parse_json(read_text(EMOJI / name / "metrics.json"), "metrics.json")
        assert metrics["command"].startswith(f"python tools/emoji.py {name} ")
