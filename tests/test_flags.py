"""Flags that several commands have: one spelling of a component's folder and of a precision, with one meaning."""

import importlib
import re
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from nitro_e.cli import common as cli
from nitro_e.config import ConfigError, from_dict
from nitro_e.encoders.components import ComponentConfig, chosen_component
from nitro_e.sampling.pipeline import TextToImage
from nitro_e.sampling.samplers import SamplingConfig

ROOT = Path(__file__).parent.parent
COMMANDS = [
    ("train", []),
    ("sample", []),
    ("serve", []),
    ("benchmark.model", []),
    ("convert", []),
    ("data", ["encode"]),
    ("describe", []),
    ("ema", ["synthesize"]),
    ("evaluate", []),
    ("make_shapes", []),
    ("report", []),
    ("speedrun", []),
    ("study", []),
    ("synthesize", []),
]


def test_all_commands_spell_components_and_precision_alike(capsys):
    found = {}
    for module, arguments in COMMANDS:
        with pytest.raises(SystemExit):
            importlib.import_module(f"nitro_e.cli.{module}").main([*arguments, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        flags = re.findall(r"\[--(codec|text|vision|dtype|precision) ([^\]]+)\]", text)
        found[module] = set(flags)
    component, dtype = "NAME|FOLDER|NAME=FOLDER", ("dtype", "{float32,bfloat16,float16}")
    both = {("codec", component), ("text", component)}
    expected = {
        "sample": both | {dtype},
        "serve": both | {dtype},
        "evaluate": both | {dtype},
        "synthesize": both | {dtype},
        "data": both | {("vision", component), dtype},
        "convert": {dtype},
        "benchmark.model": {dtype},
    }
    assert found == {module: expected.get(module, set()) for module, _ in COMMANDS}


LLAMA = ComponentConfig(name="llama-3.2-1b", path="old/one", revision="r", dtype="bfloat16", length=20)


@pytest.mark.parametrize(
    "given, default, expected",
    [
        (None, LLAMA, LLAMA),
        ("my/folder", LLAMA, ("my/folder", "bfloat16", 20)),
        ("./hash", LLAMA, ("./hash", "bfloat16", 20)),
        ("llama-3.2-1b=./x=y", LLAMA, ("./x=y", "bfloat16", 20)),
        ("llama-3.2-1b", LLAMA, (None, "bfloat16", 20)),
        ("llama-3.2-1b", None, (None, None, None)),
        ("llama-3.2-1b=org/name", None, ("org/name", None, None)),
        ("hash", LLAMA, "trained with 'llama-3.2-1b'; give its folder"),
        ("hash=/x", LLAMA, "trained with 'llama-3.2-1b'; give its folder"),
        ("my/folder", None, "--text 'my/folder': of which kind? give NAME=my/folder, one of llama-3.2-1b, "),
        ("lama-3.2-1b", None, "--text: unknown 'lama-3.2-1b', did you mean 'llama-3.2-1b'"),
        ("llama-3.2-1b=", None, "path is empty"),
    ],
)
def test_name_folder_or_both(given, default, expected):
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            chosen_component("text", given, default)
        return
    found = chosen_component("text", given, default)
    if default is given is None or expected is LLAMA:
        assert found == LLAMA
    else:
        assert (found.name, found.path, found.dtype, found.length) == ("llama-3.2-1b", *expected)
        assert found.revision is None  # that of the folder it replaces


def test_recipes_take_the_same_spelling():
    assert from_dict(ComponentConfig, "dc-ae-f32c32=a/b") == ComponentConfig(name="dc-ae-f32c32", path="a/b")
    with pytest.raises(ConfigError, match="give one"):
        ComponentConfig(name="dc-ae-f32c32=a/b", path="c/d")


def test_a_precision_is_that_of_all_parts():
    """It reached the denoiser only; the codec and the text encoder stayed in float32."""
    prompts = ["a photo of a red circle", "a photo of two green squares"]
    drawn = {}
    for dtype in (None, torch.float32, torch.bfloat16):
        pipeline = TextToImage.from_pretrained("shapes", dtype=dtype)
        wanted = dtype or torch.float32
        parts = (pipeline.model, pipeline.text.model, pipeline.codec.autoencoder)
        assert [{p.dtype for p in part.parameters()} for part in parts] == [{wanted}] * 3
        drawn[dtype] = pipeline(prompts, steps=8, output_type="pixels").images
        assert drawn[dtype].dtype == torch.float32
    assert torch.equal(drawn[None], drawn[torch.float32])
    difference = (drawn[torch.bfloat16] - drawn[torch.float32]).abs().mean()
    assert 0 < difference < 0.05, difference  # of -1..1
    assert np.isfinite(drawn[torch.bfloat16]).all()


def test_help_names_every_sampler():
    names = get_args(get_type_hints(SamplingConfig)["sampler"])
    assert cli.SAMPLERS.replace(" or ", ", ").split(", ") == list(names)
