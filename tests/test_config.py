"""Strict configuration: what is accepted, what is refused, and in which words."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from tiny import OPTIMIZER

from nitro_e import config
from nitro_e.config import ConfigError, apply_override, from_dict, to_dict


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    steps: int = 10


@dataclass(frozen=True, kw_only=True)
class Apple:
    kind: Literal["apple"] = "apple"
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Pear:
    kind: Literal["pear"] = "pear"
    long: bool = True


@dataclass(frozen=True, kw_only=True)
class Part:
    SHORTHAND: ClassVar[str] = "name"
    name: str
    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tree:
    PRESETS: ClassVar[dict] = {"two": {"sizes": (2, 2)}, "slow": {"optim": {"lr": 1e-5, "steps": 99}}}
    name: str
    optim: Optim = field(default_factory=Optim)
    fruit: Apple | Pear = field(default_factory=Apple)
    sizes: tuple[int, ...] = ()
    mode: Literal["on", "off"] = "on"
    part: Part | None = None

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ConfigError("name must not be bad")


def test_round_trip_through_yaml():
    tree = from_dict(
        Tree, {"name": "a", "optim": {"lr": "1e-4"}, "fruit": {"kind": "pear"}, "sizes": [1, 2], "part": "x"}
    )
    assert tree.optim.lr == 1e-4 and tree.fruit == Pear() and tree.part == Part(name="x")
    import yaml

    assert from_dict(Tree, yaml.safe_load(config.dump(tree))) == tree


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "a", "optim": {"lrr": 1}}, "unknown key 'optim.lrr', did you mean 'optim.lr'?"),
        ({"name": "a", "optim": {"steps": "many"}}, "optim.steps: expected int, got 'many'"),
        ({"name": "a", "optim": {"steps": 1.5}}, "optim.steps: expected int, got 1.5"),
        ({"name": "a", "optim": {"steps": True}}, "optim.steps: expected int, got True"),
        ({"name": 3}, "name: expected str, got 3"),
        ({}, "missing key 'name'"),
        ({"name": "a", "mode": False}, "mode: False is not one of on, off"),
        ({"name": "a", "fruit": {"kind": "aple"}}, "fruit.kind: unknown kind 'aple', did you mean 'apple'?"),
        ({"name": "a", "sizes": [1, "x"]}, "sizes[1]: expected int, got 'x'"),
        ({"name": "a", "sizes": 4}, "sizes: expected a list, got 4"),
        ({"name": "a", "preset": "tow"}, "unknown preset 'tow', did you mean 'two'?"),
        ({"name": "bad"}, "name must not be bad"),
    ],
)
def test_refusals_name_key_value_and_remedy(data, words):
    with pytest.raises(ConfigError) as error:
        from_dict(Tree, data)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_mappings_inside_a_preset_are_merged():
    assert from_dict(Tree, {"name": "a", "preset": "slow", "optim": {"steps": 5}}).optim == Optim(
        lr=1e-5, steps=5
    )
    assert Tree.PRESETS["slow"]["optim"]["steps"] == 99


def test_preset_is_a_start_that_other_keys_override():
    assert from_dict(Tree, {"name": "a", "preset": "two"}).sizes == (2, 2)
    assert from_dict(Tree, {"name": "a", "preset": "two", "sizes": [1]}).sizes == (1,)


@dataclass(frozen=True, kw_only=True)
class Forest:
    optim: Optim = field(default_factory=lambda: Optim(lr=5.0, steps=7))
    fruit: Apple | Pear = field(default_factory=lambda: Pear(long=False))


def test_a_fields_own_defaults_stay_where_nothing_is_said():
    assert from_dict(Forest, {"optim": {"lr": 1}}).optim == Optim(lr=1.0, steps=7)
    assert from_dict(Forest, {"fruit": {"kind": "pear"}}).fruit == Pear(long=False)
    assert from_dict(Forest, {"fruit": {"kind": "apple"}}).fruit == Apple()


def test_overrides():
    data = {"name": "a"}
    apply_override(data, "optim.lr=2e-4")
    apply_override(data, "sizes=[3, 4]")
    tree = from_dict(Tree, data)
    assert tree.optim.lr == 2e-4 and tree.sizes == (3, 4)
    for wrong in ("optim.lr", "=3", "name.x=1"):
        with pytest.raises(ConfigError):
            apply_override({"name": "a"}, wrong)


def test_every_recipe_loads_and_survives_its_own_dump(tmp_path):
    from nitro_e.run import RunConfig

    recipes = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        recipe = config.load(RunConfig, path, OPTIMIZER)
        copy = tmp_path / "copy.yaml"
        copy.write_text(config.dump(recipe))
        assert config.load(RunConfig, copy) == recipe, path


def test_every_field_of_every_config_is_read_somewhere():
    """No dead keys: each field name occurs as an attribute outside its own declaration."""
    import dataclasses
    import re
    import typing

    from nitro_e.run import RunConfig

    source = "\n".join(path.read_text() for path in (Path(__file__).parent.parent / "nitro_e").rglob("*.py"))
    seen, pending = set(), [RunConfig]
    while pending:
        cls = pending.pop()
        if cls in seen:
            continue
        seen.add(cls)
        for name, hint in typing.get_type_hints(cls).items():
            if (
                typing.get_origin(hint) is ClassVar
                or name == "kind"
                or name not in {f.name for f in dataclasses.fields(cls)}
            ):
                continue
            assert re.search(rf"\.{name}\b", source), f"{cls.__name__}.{name} is never read"
            pending += [arg for arg in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(arg)]
    assert to_dict(Optim()) == {"lr": 1e-3, "steps": 10}
