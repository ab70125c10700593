"""The weights that a run begins with: where they come from, and whether they fit its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nitro_e.config import ConfigError, is_overridden, to_dict
from nitro_e.interfaces import Architecture, Model
from nitro_e.model.pretrained import load_pretrained, read_config
from nitro_e.randomness import seeded
from nitro_e.record import run_folder
from nitro_e.stages.assembly import Run


def check_first_weights(config: Run[Any], given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Lines for the summary and warnings; ConfigError for weights that are not there or do not fit.

    Recipes name the run of the stage before theirs: while that is not trained it is only warned of, unless it is
    `given` on the command line.
    """
    teacher = getattr(config.stage, "teacher", None)
    sources = {} if teacher is None else {"stage.teacher": teacher}
    if config.init_from is not None and run_folder.latest(config.folder) is None:
        sources["init_from"] = config.init_from
    lines, warnings = [], []
    for key, source in sources.items():
        run = Path(run_folder.split_source(source)[0])
        try:
            folder = run_folder.model_folder(source)
        except ConfigError as error:
            trained = run.parts[:1] != ("runs",) or run_folder.latest(run) is not None
            if trained or is_overridden(key, given):
                raise ConfigError(f"{key}: {error}") from None
            warnings.append(f"{key}: {error}")
            continue
        if key == "init_from" or config.init_from is None:
            check_adopted(source, read_config(folder)["model"], config.model)
        lines.append(f"{key:<20} {folder}")
    return lines, warnings


def build_model(config: Run[Any]) -> Model:
    """Fresh weights from the seed, or those of `init_from` or the teacher, whose architecture must be the same.

    A run that has a checkpoint no longer needs `init_from`: its weights are overwritten by the resume, but for those under
    an adapter, which lie in RUN/base.
    """
    first = config.init_from or getattr(config.stage, "teacher", None)
    resumed, base = run_folder.latest(config.folder) is not None, config.folder / "base"
    if resumed and base.is_dir():
        first = str(base)
    elif first is None or resumed:
        with seeded(config.seed, "initial weights"):
            return config.model.build()
    source = load_pretrained(run_folder.model_folder(first)).float()
    check_adopted(first, source.config, config.model)
    with seeded(config.seed, "initial weights"):
        model = config.model.build()
    model.adopt(source)
    return model


def check_resumed_architecture(config: Run[Any]) -> None:
    """Before a resume: ConfigError that names the keys of the model which differ from those of its checkpoint."""
    last = run_folder.latest(config.folder)
    if last is None or not (last / "model" / "config.json").is_file():
        return  # nothing to resume, or damaged: the resume says so
    remedy = "set it back, or give this experiment its own run directory: run=..."
    check_architecture(str(last), read_config(last / "model")["model"], config.model, remedy)


def check_adopted(source: str, theirs: Architecture, ours: Architecture) -> None:
    """ConfigError if a model of `ours` cannot adopt the weights of `source`; see `Model.adopt`."""
    adopted = {
        key: getattr(ours, key) for key, was in ours.ADOPTED.items() if getattr(theirs, key, None) == was
    }
    check_architecture(source, replace(theirs, **adopted), ours)


def check_architecture(
    source: str,
    theirs: Architecture,
    ours: Architecture,
    remedy: str = "give the same keys here, or other weights to start from",
) -> None:
    """ConfigError if a model of `ours` cannot have the weights of `source`, a model of `theirs`: which keys differ."""
    was, now = architecture(theirs), architecture(ours)
    changed = [
        f"model.{key} was {was.get(key)!r}, is {now[key]!r}" for key in now if now[key] != was.get(key)
    ]
    if changed:
        raise ConfigError(f"'{source}' is of another architecture ({'; '.join(changed)}); {remedy}")


def architecture(config: Architecture) -> dict[str, Any]:
    """Return the fields that decide what the weights are."""
    return {key: value for key, value in to_dict(config).items() if key not in config.FREE}
