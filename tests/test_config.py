"""Strict configuration: what is accepted, what is refused, and in which words."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from tiny import optimizers_of

from nitro_e import config
from nitro_e.config import Config, ConfigError, Ge, Gt, Le, Lt, apply_override, from_dict, to_dict


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
    from nitro_e.stages.recipe import RunConfig

    recipes = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        recipe = config.load(RunConfig, path, optimizers_of(path))
        copy = tmp_path / "copy.yaml"
        copy.write_text(config.dump(recipe))
        assert config.load(RunConfig, copy) == recipe, path


def test_every_field_of_every_config_is_read_somewhere():
    """No dead keys: each field name occurs as an attribute outside its own declaration."""
    import dataclasses
    import re
    import typing

    from nitro_e.stages.recipe import RunConfig

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


# ---- bounds


@dataclass(frozen=True, kw_only=True)
class Bounded(Config):
    steps: Annotated[int, Ge(1)] = 1
    clip: Annotated[float, Gt(0), "a large value switches clipping off"] = 1.0
    betas: tuple[Annotated[float, Ge(0), Lt(1)], ...] = ()
    length: Annotated[int, Ge(2), Le(8)] | None = None
    weight: Annotated[Literal["auto"] | float, Gt(0)] = "auto"
    options: dict[str, bool | float | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Around:
    inner: Bounded = field(default_factory=Bounded)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 2**63}, "steps must fit into 64 bits, got a number of 64 bits"),
        ({"clip": 0.0}, "clip must be above 0, got 0.0; a large value switches clipping off"),
        ({"clip": float("nan")}, "clip must be a finite number, got nan"),
        ({"clip": float("inf")}, "clip must be a finite number, got inf"),
        ({"betas": (0.5, 1.0)}, "betas[1] must be below 1, got 1.0"),
        ({"length": 9}, "length must be at most 8, got 9"),
        ({"weight": -1.0}, "weight must be above 0, got -1.0"),
        ({"options": {"scale": float("nan")}}, "options.scale must be a finite number, got nan"),
    ],
)
def test_bounds_hold_from_a_file_and_in_python(values, words):
    with pytest.raises(ConfigError) as error:
        Bounded(**values)
    assert str(error.value) == words
    with pytest.raises(ConfigError) as error:
        from_dict(Around, {"inner": values})
    assert str(error.value) == f"inner.{words}"


def test_what_is_within_bounds_is_taken():
    Bounded(steps=1, clip=1e-9, betas=(0.0, 0.999), length=None, weight=2.0, options={"a": True, "b": "x"})
    assert from_dict(Bounded, {"length": 8, "weight": "auto"}).length == 8


def config_classes() -> set[type]:
    """Every dataclass of a recipe, and of a study."""
    import dataclasses
    import typing

    from nitro_e.stages.recipe import RunConfig

    seen, pending = set(), [RunConfig]
    while pending:
        hint = pending.pop()
        pending += typing.get_args(hint)
        if dataclasses.is_dataclass(hint) and hint not in seen:
            seen.add(hint)
            pending += typing.get_type_hints(hint).values()
    return seen


def test_every_number_of_a_recipe_is_finite_and_has_bounds():
    """Exceptions are what may be negative, and lists that a formula checks as a whole."""
    import dataclasses
    import typing

    free = {"TimestepConfig.mean", "RewardConfig.weight", "RewardConfig.options", "InputConfig.probabilities"}
    free |= {"SamplingConfig.sigmas", "InputConfig.sigmas", "PostHocEMAConfig.sigma_rels"}
    free |= {"FakeScoreConfig.guidance_scale", "ScoreConfig.guidance_scale"}
    classes = config_classes()
    assert len(classes) > 30 and all(issubclass(cls, Config) for cls in classes)
    for cls in classes:
        hints = typing.get_type_hints(cls, include_extras=True)
        for item in dataclasses.fields(cls):
            written = str(hints[item.name])
            number = re.search(r"\b(int|float)\b", written)
            name = f"{cls.__name__}.{item.name}"
            if not number or name in free:
                continue
            assert re.search(r"\b(Ge|Gt)\(", written), f"{name} has no lower bound"


RECIPE = """
name: toy
model: {preset: micro-8}
stage: {kind: flow_matching, optim: {warmup: 2}}
data: {shards: [a.tar], resolution: 64}
batch: {global: 4}
components: {codec: dct-f8c24, text: hash}
engine: {steps: 6, ema: {beta: 0.9}}
sampling: {steps: 2}
"""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stage.optim.lr=.inf", "stage.optim.lr must be a finite number, got inf"),
        ("stage.optim.lr=1e6", "stage.optim.lr must be at most 1000, got 1000000.0"),
        ("stage.optim.lr=-1", "stage.optim.lr must be at least 0, got -1.0"),
        ("stage.optim.muon_lr=.nan", "stage.optim.muon_lr must be a finite number"),
        ("stage.optim.clip=.nan", "stage.optim.clip must be a finite number"),
        (
            "stage.optim.clip=0",
            "stage.optim.clip must be above 0, got 0.0; a large value switches clipping off",
        ),
        ("stage.optim.eps=.nan", "stage.optim.eps must be a finite number"),
        ("stage.optim.weight_decay=.nan", "stage.optim.weight_decay must be a finite number"),
        ("stage.optim.betas=[.nan, 0.9]", "stage.optim.betas[0] must be a finite number"),
        ("stage.optim.warmup=1e99", "stage.optim.warmup must fit into 64 bits"),
        ("stage.timesteps.mean=.nan", "stage.timesteps.mean must be a finite number"),
        ("stage.timesteps.std=.nan", "stage.timesteps.std must be a finite number"),
        ("engine.keep_every=-1", "engine.keep_every must be at least 0, got -1"),
        ("engine.sample_every=-1", "engine.sample_every must be at least 0, got -1"),
        ("engine.max_skips=-1", "engine.max_skips must be at least 0, got -1"),
        (
            "engine.keep_last=1",
            "engine.keep_last must be at least 2, got 1; the newest one may turn out damaged",
        ),
        ("engine.ema.warmup_power=.nan", "engine.ema.warmup_power must be a finite number"),
        ("engine.ema.warmup_power=-1", "engine.ema.warmup_power must be above 0"),
        ("sampling.guidance_scale=.nan", "sampling.guidance_scale must be a finite number"),
        ("sampling.guidance_scale=-5", "sampling.guidance_scale must be at least 0"),
        ("sampling.steps=1e12", "sampling.steps must be at most 10000"),
        ("sampling.shift=.nan", "sampling.shift must be a finite number"),
        ("data.cache_gb=-1", "data.cache_gb must be above 0"),
        ("data.max_bad_fraction=.nan", "data.max_bad_fraction must be a finite number"),
        ("data.workers=100000", "data.workers must be at most 512"),
        ("batch=1e12", "batch.global must be at most 10000000"),
        ("batch.per_device=1e12", "batch.per_device must be at most 65536"),
        ("batch={global: 4, per_device: 0}", "batch.per_device must be at least 1, got 0"),
        ("components.text={name: hash, length: 1e9}", "components.text.length must be at most 8192"),
        ("model.mlp_ratio=1e30", "model.mlp_ratio must be at most 100"),
        ("model.position_table=1e9", "model.position_table must be at most 1024"),
        ("model.groups=[1000000, 1, 1]", "model.groups[0] must be at most 1000"),
        ("seed=-1", "seed must be at least 0, got -1"),
        ("seed=1e30", "seed must fit into 64 bits"),
        ("engine.steps=010", "override 'engine.steps=010': 010 would be read as 8 (octal); write 8"),
        ("engine.steps=1:30", "1:30 would be read as 90 (to the base of 60); write 90, or quote the text"),
        ("engine.steps=2024-13-45", "is not valid YAML: month must be in 1..12"),
        ("engine.steps=" + "9" * 5000, "engine.steps="),
        ("engine.steps=1" + "0" * 400, "engine.steps must fit into 64 bits"),
        ("stage.optim.lr=1" + "0" * 400, "stage.optim.lr: expected float"),
        ("engine={steps: 3, steps: 4}", "key 'steps' is given twice, on lines 1 and 1; keep one"),
        ("prompts=" + "[" * 3000, "is not valid YAML"),
        ("stage.kind=[1]", "stage.kind: unknown kind [1]"),
        ("model.preset=[1]", "model.preset: unknown preset '[1]'"),
        ('prompts=["\\ud800"]', "prompts[0]: '\\ud800' at character 0 is no character"),
        ("name=../../evil", "name '../../evil' cannot be a folder's name"),
        ("name=..", "name '..' cannot be a folder's name"),
        ("name=.hidden", "name '.hidden' cannot be a folder's name"),
        ("name=a/b", "name 'a/b' cannot be a folder's name"),
        ("name=''", "name '' cannot be a folder's name"),
        ('name="x\\ny"', "name 'x\\ny' cannot be a folder's name"),
        ("name=" + "a" * 201, "cannot be a folder's name: use up to 200 letters"),
    ],
    ids=lambda text: text[:40],
)
def test_what_a_recipe_must_not_say(tmp_path, override, words):
    from nitro_e.stages.recipe import RunConfig

    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    config.load(RunConfig, path)
    with pytest.raises(ConfigError) as error:
        config.load(RunConfig, path, [override])
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- what follows from other keys


def loaded(*overrides: str, recipe: str = RECIPE):
    import yaml

    from nitro_e.stages.recipe import RunConfig

    data = yaml.safe_load(recipe)
    for override in overrides:
        apply_override(data, override)
    return from_dict(RunConfig, data)


@pytest.mark.parametrize("total", [1, 12, 96])
def test_a_global_batch_is_split_over_any_number_of_processes_that_divides_it(total):
    from nitro_e.training.batch import BatchConfig

    for world in range(1, total + 2):
        for per_device in (None, 1, 2, 5, 8, 1000):
            batch = BatchConfig(global_=total, per_device=per_device)
            fits = total % world == 0 and (
                per_device is None or (total // world) % min(per_device, total // world) == 0
            )
            if not fits:
                with pytest.raises(ConfigError, match="is not a multiple of"):
                    batch.split(world)
                continue
            micro_batch, accumulate = batch.split(world)
            assert micro_batch * accumulate * world == total and micro_batch <= (per_device or total)


@pytest.mark.parametrize(
    ("values", "world", "words"),
    [
        (
            {"global": 2048, "per_device": 32},
            3,
            "batch.global 2,048 is not a multiple of 32 x 3 processes; the nearest that are: 2,016 or 2,112",
        ),
        (
            {"global": 2048, "per_device": 24},
            8,
            "24 x 8 processes; the nearest that are: 1,920 or 2,112; or set batch.per_device to 16 or 32",
        ),
        (
            {"global": 10},
            4,
            "batch.global 10 is not a multiple of 4 processes; the nearest that are: 8 or 12",
        ),
        ({"global": 2}, 4, "is not a multiple of 4 processes; the nearest that are: 4"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_values(values, world, words):
    from nitro_e.training.batch import BatchConfig

    with pytest.raises(ConfigError) as error:
        from_dict(BatchConfig, values).split(world)
    assert words in str(error.value)


def test_a_bare_number_is_the_global_batch():
    assert loaded("batch=64").batch == loaded("batch={global: 64}").batch == loaded("batch.global=64").batch
    assert to_dict(loaded("batch.per_device=2"))["batch"] == {"global": 4, "per_device": 2}
    for wrong, words in (
        ("batch=null", "batch: expected a mapping, got None"),
        ("batch=true", "batch: expected a mapping, got True"),
        ("batch={per_device: 4}", "missing key 'batch'"),
        ("batch=many", "batch.global: expected int, got 'many'"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            loaded(wrong)


def test_keys_that_knew_the_number_of_processes_are_refused_with_what_to_write(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for overrides, words in (
        (
            ["data.batch_size=4", "engine.accumulate=3"],
            "write batch: {global: 24, per_device: 4} for 4 x 3 on 2 processes",
        ),
        (["data.batch_size=4"], "batch: {global: 8, per_device: 4}"),
        (
            ["engine.accumulate=3"],
            "engine.accumulate 3: recipes no longer fix the number of processes; write batch: {per",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            loaded(*overrides)
        assert words in str(error.value)


def test_resolution_and_widths_are_said_once():
    config = loaded()
    assert (config.model.latent_channels, config.model.text_width) == (24, 128)  # of dct-f8c24 and hash
    assert config.data.resolution == config.sampling.resolution == 64
    said_by_sampling = loaded("sampling.resolution=128", recipe=RECIPE.replace(", resolution: 64", ""))
    assert said_by_sampling.data.resolution == 128
    for overrides, words in (
        (
            ["sampling.resolution=32"],
            "sampling.resolution 32 differs from data.resolution 64; give one of them",
        ),
        (["model.text_width=64"], "model.text_width is 64, but 'hash' gives 128; set it to 128"),
        (["model.latent_channels=5"], "model.latent_channels is 5, but 'dct-f8c24' has 24; set it to 24"),
    ):
        with pytest.raises(ConfigError) as error:
            loaded(*overrides)
        assert words in str(error.value)
    scored = loaded("evaluation={prompts: shapes-heldout, rewards: [{name: shapes}], sampling: {steps: 3}}")
    assert scored.evaluation.sampling.resolution == 64
    folder = loaded("components.text={name: shapes-llama, path: elsewhere}")  # loading will tell
    assert folder.model.text_width == 128


def test_an_override_leaves_what_an_alias_shared_with_its_place():
    data = config.parse_yaml("a: &s {steps: 2, optim: {lr: 1}}\nb: *s\nc: {<<: *s}\n", "here")
    apply_override(data, "a.steps=50")
    apply_override(data, "a.optim.lr=3")
    assert data["b"] == data["c"] == {"steps": 2, "optim": {"lr": 1}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: a\nsizes: [1]\nname: b\n", "key 'name' is given twice, on lines 1 and 3; keep one"),
        (b"name: a\noptim:\n  lr: 1\n  steps: 2\n  lr: 3\n", "key 'lr' is given twice, on lines 3 and 5"),
        (b'name: a\noptim: {lr: 1, "lr": 2}\n', "key 'lr' is given twice"),
        (b"name: a\noptim: {steps: 010}\n", "010 would be read as 8 (octal)"),
        (b"name: a\noptim: {lr: 1:30.5}\n", "1:30.5 would be read as 90.5 (to the base of 60)"),
        (b"name: \xff\n", "is not a UTF-8 text file (byte 6 is 0xff); save it as UTF-8"),
        (b"name: a\x00\n", "is not valid YAML"),
        (b"name: " + b"[" * 3000, "is not valid YAML: nested too deeply"),
        (b"name: !!python/object/apply:os.system [true]\n", "is not valid YAML"),
        (b"- name\n", "expected a mapping at the top, got list"),
    ],
)
def test_what_a_file_must_not_hold(tmp_path, content, words):
    path = tmp_path / "tree.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        config.load(Tree, path)
    assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_numbers_that_look_like_what_they_are(tmp_path):
    path = tmp_path / "tree.yaml"
    path.write_text("\ufeffname: '010'\nsizes: [0, 0x10, 1_000, -3]\noptim: {lr: 1e-4}\n", "utf-8")
    tree = config.load(Tree, path)
    assert (tree.name, tree.sizes, tree.optim.lr) == ("010", (0, 16, 1000, -3), 1e-4)
    path.write_text(config.dump(tree))
    assert config.load(Tree, path) == tree
    path.write_text("base: &base {lr: 1, steps: 3}\nname: a\noptim: {<<: *base, lr: 2}\n")
    with pytest.raises(ConfigError, match="unknown key 'base'"):  # merged keys are no duplicates
        config.load(Tree, path)


def test_keys_and_values_of_older_recipes():
    """A renamed key is refused with its new name; an older name of a value is taken for today's."""

    @dataclass(frozen=True, kw_only=True)
    class Renamed(Config):
        RENAMED = {"odds": "probabilities"}
        ALIASES = {"sampler": {"renoise": "multistep"}}
        probabilities: float = 1.0
        sampler: str = "euler"

    assert from_dict(Renamed, {"sampler": "renoise"}).sampler == "multistep"
    with pytest.raises(
        ConfigError, match=r"^key 'stage.odds' is of an older version; write stage.probabilities"
    ):
        from_dict(Renamed, {"odds": 1}, "stage")
