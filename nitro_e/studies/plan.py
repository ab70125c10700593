"""The plan of a study: its file, the trainings that it asks for, and what is refused before the first of them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from nitro_e.config import (
    Config,
    ConfigError,
    Ge,
    Seed,
    check_file_name,
    flatten,
    from_dict,
    load,
    parse_yaml,
    to_dict,
)
from nitro_e.encoders.components import codec_shape, text_shape
from nitro_e.evaluation.benchmarks import Benchmark, benchmark
from nitro_e.evaluation.evaluate import prepare
from nitro_e.model.pretrained import read_config
from nitro_e.record import run_folder
from nitro_e.record.run_config import config_at
from nitro_e.sampling.pipeline import Use, latent_size
from nitro_e.sampling.samplers import with_overrides
from nitro_e.stages import validation
from nitro_e.stages.first_weights import check_first_weights
from nitro_e.stages.recipe import RunConfig
from nitro_e.stages.validation import ValidationConfig

Setting = dict[str, bool | int | float | str]  # fields of SamplingConfig
# steps: those of the recipe. flops, seconds: as many as cost what the steps of the reference cost, counted or measured.
Equal = Literal["steps", "flops", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Variant(Config):
    """One variant: a recipe with overrides, or nothing for the base itself, untrained, as an anchor."""

    recipe: str | None = None  # None: that of the study
    set: tuple[str, ...] = ()  # overrides, as on train.py's command line, after those of the study
    settings: tuple[Setting, ...] = ()  # empty: those of the study
    seeds: tuple[Seed, ...] = ()  # empty: those of the study
    equal: tuple[Equal, ...] = ()  # empty: those of the study
    # another variant, which is trained before this one; it begins with the averaged weights of its same seed
    after: str | None = None
    needs: tuple[str, ...] = ()  # of `prepare`, what this one reads


@dataclass(frozen=True, kw_only=True)
class DiversityConfig(Config):
    """Images of one prompt from several noises, for their spread (`evaluation.diversity`)."""

    num: Annotated[int, Ge(1)] = 48  # prompts, the benchmark's first ones
    per_prompt: Annotated[int, Ge(2)] = 8  # images of each


@dataclass(frozen=True, kw_only=True)
class Study(Config):
    """A study. With a base, variants start from its weights and are compared with it; without, all start fresh."""

    name: str
    base: str | None = None  # checkpoint; null: train from scratch, and compare with the variant `compare_to`
    compare_to: str | None = None  # without a base: the reference; None: the first variant
    recipe: str | None = None  # of variants that name none
    set: tuple[str, ...] = ()  # overrides of all variants
    # further ones, after those of the variants: for the command line, where `set` would replace the file's
    add: tuple[str, ...] = ()
    steps: Annotated[int, Ge(1)] | None = None  # of all variants, unless their overrides say otherwise
    variants: dict[str, Variant] = field(default_factory=dict)
    # more variants: every combination of values of these keys; a text is read as YAML, such as "[full]"
    grid: dict[str, tuple[bool | int | float | str, ...]] = field(default_factory=dict)
    seeds: tuple[Seed, ...] = (0,)
    equal: tuple[Equal, ...] = ("steps",)  # what is equal between a variant and the reference
    validation: ValidationConfig | None = None  # of all runs: the paired loss
    settings: tuple[Setting, ...] = ()  # samples are drawn and scored so; empty: the validation loss alone
    benchmark: str = "shapes"
    num: Annotated[int, Ge(1)] = 600  # prompts
    # with a base: measured at every setting, as a ratio to the reference's
    diversity: DiversityConfig | None = None
    # commands without `nitro-e`, such as "synthesize ...", that make what variants need; each runs once
    prepare: dict[str, str] = field(default_factory=dict)
    # with a base: its setting for all differences; empty: the variant's own
    reference: Setting = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "variants", {**self._merged(), **self._combinations()})
        for name in (self.name, *self.variants):
            check_file_name(name, "name" if name == self.name else "variants")
        for name in ("variants", "seeds", "equal"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty; a study needs at least one")
        for where, seeds in (
            ("seeds", self.seeds),
            *((f"variants.{name}.seeds", variant.seeds) for name, variant in self.variants.items()),
        ):
            if len(set(seeds)) < len(seeds):
                raise ConfigError(
                    f"{where}: {list(seeds)} has a seed twice, which is one training; leave it out"
                )
        if not self.settings and self.validation is None:
            raise ConfigError("settings is empty; give some to draw and score with, or `validation`")
        for name, command in self.prepare.items():
            check_file_name(name, "prepare")
            try:
                shlex.split(command)
            except ValueError as error:
                raise ConfigError(f"prepare.{name}: '{command}' cannot be read: {error}") from None
        for name, variant in self.variants.items():
            self._check_order(name, variant)
            if variant.recipe is None and variant.set:
                raise ConfigError(f"variants.{name}.set: overrides need a recipe")
            if variant.recipe is None and self.base is None:
                raise ConfigError(f"variants.{name}: without a base it needs a recipe")
        if self.base is not None:
            if self.compare_to is not None:
                raise ConfigError(
                    "compare_to: with a base, variants are compared with the base; leave it out"
                )
            if self.equal != ("steps",) or any(
                v.equal not in ((), ("steps",)) for v in self.variants.values()
            ):
                raise ConfigError(
                    "equal: trainings from a base have their own steps; set base: null, or leave it out"
                )
        elif self.reference:
            raise ConfigError("reference is a setting of the base; without one, use compare_to")
        elif self.compare_to not in (None, *self.variants):
            raise ConfigError(f"compare_to: '{self.compare_to}' is no variant ({', '.join(self.variants)})")

    def _check_order(self, name: str, variant: Variant) -> None:
        """ConfigError for what a variant waits for in vain."""
        for need in variant.needs:
            if need not in self.prepare:
                raise ConfigError(
                    f"variants.{name}.needs: '{need}' is not among `prepare` ({', '.join(self.prepare)})"
                )
        before, seen = variant.after, [name]
        while before is not None:
            if before in seen or before not in self.variants or self.variants[before].recipe is None:
                raise ConfigError(
                    f"variants.{name}.after: '{before}' is no other variant that is trained before it"
                )
            if missing := set(self.seeds_of(name)) - set(self.seeds_of(before)):
                raise ConfigError(
                    f"variants.{name}.after: '{before}' has no training of seed {min(missing)}; give it the same seeds"
                )
            seen.append(before)
            before = self.variants[before].after

    def _merged(self) -> dict[str, Variant]:
        """Give the variants the recipe and overrides of the study; the base itself, an anchor, takes none."""
        merged = {}
        for name, variant in self.variants.items():
            recipe = variant.recipe or self.recipe
            overrides = variant.set if recipe is None else (*self.set, *variant.set, *self.add)
            merged[name] = replace(variant, recipe=recipe, set=overrides)
        return merged

    def _combinations(self) -> dict[str, Variant]:
        """List the variants of the grid, named after the last part of each key and its value."""
        found: dict[str, Variant] = {}
        for values in itertools.product(*self.grid.values()) if self.grid else ():
            words = [f"{key.rpartition('.')[2]}={value}" for key, value in zip(self.grid, values)]
            name = re.sub(r"[^\w.=+-]+", "-", " ".join(words)).strip("-")
            if name in found or name in self.variants:
                raise ConfigError(f"grid: two variants would be called '{name}'; list them under variants")
            texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
            overrides = [f"{key}={text}" for key, text in zip(self.grid, texts)]
            found[name] = Variant(recipe=self.recipe, set=(*self.set, *overrides, *self.add))
        return found

    @property
    def reference_variant(self) -> str:
        """The variant that the others are compared with, in a study without a base."""
        return self.compare_to or next(iter(self.variants))

    def seeds_of(self, name: str) -> tuple[int, ...]:
        return self.variants[name].seeds or self.seeds

    def equal_of(self, name: str) -> tuple[Equal, ...]:
        return self.variants[name].equal or self.equal

    def settings_of(self, name: str) -> tuple[Setting, ...]:
        return self.variants[name].settings or self.settings

    def with_origins(self, names: Sequence[str]) -> list[str]:
        """List the variants, each behind the one that it begins with."""
        found: list[str] = []
        for name in names:
            before = self.variants[name].after
            found += [*(self.with_origins([before]) if before is not None else ()), name]
        return list(dict.fromkeys(found))

    def is_trained(self, name: str) -> bool:
        """Tell whether a variant is a training; the base itself is none."""
        return self.variants[name].recipe is not None


class Trial(NamedTuple):
    """One training of a study."""

    variant: str
    seed: int
    folder: Path
    config: RunConfig
    overrides: tuple[str, ...]  # of the variant's recipe, which make it into `config`


def trial(plan: Study, name: str, seed: int, equal: Equal = "steps", steps: int | None = None) -> Trial:
    """Make the training of a variant with a seed. steps: in place of the recipe's, for an equal compute."""
    variant = plan.variants[name]
    assert variant.recipe is not None
    folder = run_of(plan, name if steps is None else f"{name}.{equal}", seed)
    # the name decides the order of the data: from scratch all variants of a seed see the same samples in the same order
    title = plan.name if plan.base is None else f"{plan.name}-{name}"
    overrides = [f"run={_as_yaml(str(folder))}", f"name={_as_yaml(title)}", f"seed={seed}"]
    if variant.after is not None:
        overrides.append(f"init_from={_as_yaml(f'{run_of(plan, variant.after, seed)}@ema')}")
    elif plan.base is not None:
        overrides.append(f"init_from={plan.base}")
    if plan.validation is not None:
        overrides.append(f"validation={json.dumps(to_dict(plan.validation))}")
    if plan.steps is not None:
        overrides.append(f"engine.steps={plan.steps}")
    overrides += variant.set
    if steps is not None:
        overrides.append(f"engine.steps={steps}")
    return Trial(name, seed, folder, _config(variant.recipe, tuple(overrides)), tuple(overrides))


def _as_yaml(text: str) -> str:
    """Write a text for an override, in quotes if YAML would read anything else."""
    try:
        return text if parse_yaml(text, "") == text else json.dumps(text)
    except ConfigError:
        return json.dumps(text)


def run_of(plan: Study, name: str, seed: int) -> Path:
    return Path("runs") / plan.name / f"{name}-{seed}"


@functools.cache
def _config(recipe: str, overrides: tuple[str, ...]) -> RunConfig:
    """Load a recipe once: a study asks for it many times, and its FLOPs are counted on a model."""
    return load(RunConfig, recipe, overrides)


def trials(plan: Study, chosen: Sequence[str]) -> list[Trial]:
    """List the trainings of the chosen variants at the recipes' steps and at equal FLOPs; those of equal time follow.

    The first seed of all variants comes first, so that a study that is cut short has a row for each. Where equal FLOPs
    come to the same steps, one training stands for both.
    """
    found = []
    for name in filter(plan.is_trained, chosen):
        with said_of(f"variants.{name}"):
            for place, seed in enumerate(plan.seeds_of(name)):
                for equal in plan.equal_of(name):
                    # equal time needs the speed at the recipe's steps first
                    make = at_equal_flops if equal == "flops" else trial
                    found.append((place, make(plan, name, seed)))
    found.sort(key=lambda pair: pair[0])
    return list({each.folder: each for _, each in found}.values())


def at_equal_flops(plan: Study, name: str, seed: int) -> Trial:
    """Make the training whose FLOPs are those of the reference, as nearly as whole steps allow."""
    same = trial(plan, name, seed)
    reference = trial(plan, plan.reference_variant, seed).config
    costs = reference.flops_per_step, same.config.flops_per_step
    if costs[0] is None or costs[1] is None:
        raise ConfigError("equal: flops: they are counted for stages 1 and 2 with a codec of known size only")
    steps = round(reference.engine.steps * costs[0] / costs[1])
    return same if steps == same.config.engine.steps else trial(plan, name, seed, "flops", max(steps, 1))


def check(plan: Study, chosen: Sequence[str], planned: Sequence[Trial]) -> None:
    """Refuse what can be known to be wrong before anything is trained: benchmark, weights, data, keys, settings."""
    if any(plan.settings_of(name) for name in chosen):
        prepare(judged(plan), "cpu")
    if plan.diversity is not None and (plan.base is None or judged(plan).name != "shapes"):
        raise ConfigError("diversity: it is measured by the judge of 'shapes', against a base; leave it out")
    base: dict[str, Any] = {} if plan.base is None else read_config(run_folder.model_folder(plan.base))
    use = None if plan.base is None else from_dict(Use, base["use"], "use")
    for name in chosen:
        with said_of(f"variants.{name}"):
            for each in [each for each in planned if each.variant == name]:
                check_trial(each, plan.variants[name])
            if plan.is_trained(name):
                config = trial(plan, name, plan.seeds_of(name)[0]).config
                origin = plan.variants[name].after
                if origin and trial(plan, origin, plan.seeds_of(name)[0]).config.engine.ema is None:
                    raise ConfigError(
                        f"after: '{origin}' keeps no average to begin with; give it engine.ema, for example {{beta: 0.999}}"
                    )
                check_settings(
                    plan.settings_of(name), config.published_sampling, config.model, config.components
                )
            elif use is not None:
                check_settings(plan.settings_of(name), use.sampling, base["model"], use)
    if use is not None:
        with said_of("base"):  # scored at the same settings
            every = [setting for name in chosen for setting in plan.settings_of(name)]
            check_settings([plan.reference] if plan.reference else every, use.sampling, base["model"], use)


def check_trial(each: Trial, variant: Variant = Variant()) -> None:
    """Refuse a training that cannot begin, or whose folder holds one of other keys.

    Weights and data that the study itself makes first need not be there.
    """
    config, folder = each.config, each.folder
    if run_folder.read_status(folder).get("state") != "done":
        if variant.after is None:
            check_first_weights(config, each.overrides)
        if config.data is not None and not variant.needs:
            config.data.expand()
        if config.validation is not None:
            validation.check_apart(config, config.validation)
    if (folder / "config.yaml").is_file():
        before, now = config_at(RunConfig, folder / "config.yaml"), flatten(to_dict(config))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            raise ConfigError(
                f"{folder} is of other keys: {changed[0]} was {before.get(changed[0])!r}, is {now.get(changed[0])!r}; "
                "move it away, or rename the study or the variant"
            )


def check_settings(settings: Sequence[Setting], defaults: Any, model: Any, components: Any) -> None:
    """ConfigError for settings that these weights cannot be sampled with."""
    shape, (_, text_length) = codec_shape(components.codec), text_shape(components.text)
    for setting in settings:
        sampling = with_overrides(defaults, setting)
        if shape is not None:
            latent_size(model, shape[1], text_length, *sampling.size)


def judged(plan: Study) -> Benchmark:
    """Return the benchmark that the study scores on."""
    with said_of("benchmark"):
        return benchmark(plan.benchmark, plan.num, None)


@contextlib.contextmanager
def said_of(part: str) -> Iterator[None]:
    """Name the part of the study that an error is about."""
    try:
        yield
    except ConfigError as error:
        raise type(error)(f"{part}: {error}") from None
