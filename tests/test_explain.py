"""`nitro-e train --explain` against the config classes themselves, found in another way."""

import dataclasses
import re

import pytest
from tiny import OPTIMIZER

from nitro_e.cli import train
from nitro_e.cli.explain import keys_of
from nitro_e.config import flatten, load, to_dict
from nitro_e.stages.recipe import RunConfig

RECIPES = ["shapes/1_pretrain", "nitro_e_512/3_grpo", "nitro_e_512/4_ladd", "own_images/pretrain"]


def test_every_key_is_told_with_its_meaning():
    keys = list(keys_of(RunConfig))
    assert len(keys) > 250
    assert [key.name for key in keys if not key.meaning] == []
    assert all("None" not in key.meaning for key in keys)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_of_a_recipe_is_known(recipe):
    """The keys of resolved recipes, lists and names of mappings taken for what they hold."""
    known = {key.name for key in keys_of(RunConfig)}
    optimizer = OPTIMIZER if recipe in ("shapes/1_pretrain", "own_images/pretrain") else ()  # those with Muon
    config = load(RunConfig, f"configs/{recipe}.yaml", optimizer)
    for name, value in flatten(to_dict(config)).items():
        name = re.sub(r"^data\.sources\.\w+", "data.sources.NAME", name)
        name = re.sub(r"\.guard\.bounds\.\w+$", ".guard.bounds", name)
        parts = name.split(".")
        assert any(".".join(parts[:depth]) in known for depth in range(len(parts), 1, -1)) or name in known, (
            name
        )
        if value is not None and not isinstance(value, (list, dict)):
            assert name in known or ".options" in name, name


def test_the_command_prints_one_part_and_refuses_what_there_is_not(capsys):
    assert train.main(["--explain", "engine.ema"]) == 0
    out = capsys.readouterr().out
    assert "engine.ema.beta = 0.9999  (float, above 0 and below 1)\n    " in out and "engine.steps" not in out
    assert train.main(["--explain", "engine.stepz"]) == 2
    assert "unknown key 'engine.stepz', did you mean 'engine.steps'?" in capsys.readouterr().err


def test_defaults_are_those_of_the_classes():
    """Every scalar default, read from the dataclass that has it."""
    told = {
        key.name: key.default for key in keys_of(RunConfig) if key.name.startswith("engine.") and not key.kind
    }
    engine = {field.name: field.type for field in dataclasses.fields(RunConfig)}["engine"]
    assert engine == "EngineConfig"
    from nitro_e.training.engine import EngineConfig

    for field in dataclasses.fields(EngineConfig):
        if isinstance(field.default, (int, float, str)) and not isinstance(field.default, bool):
            assert told[f"engine.{field.name}"] == str(field.default)
