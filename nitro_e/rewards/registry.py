"""Names of rewards -> the functions and classes behind them, imported when they are used.

A recipe names a built-in reward, or one of yours as "module:name". Yours must carry the decorator `reward`, so that a
recipe can call nothing else. A function is the reward itself, and its keyword-only arguments are options of the recipe;
a class is built with them and its objects are the reward. docs/rewards.md has a complete example.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from nitro_e.config import ConfigError, did_you_mean

BUILT_IN = {
    "shapes": "nitro_e.shapes.judge:ShapesReward",
    "geneval": "nitro_e.rewards.geneval.reward:GenEvalReward",
    "hpsv2.1": "nitro_e.rewards.clip_scores:HPSv2",
    "pickscore": "nitro_e.rewards.clip_scores:PickScore",
    "clipscore": "nitro_e.rewards.clip_scores:CLIPScore",
    "aesthetic": "nitro_e.rewards.clip_scores:Aesthetic",
    "imagereward": "nitro_e.rewards.image_reward:ImageReward",
    "dpg": "nitro_e.rewards.dpg:DPG",
    "retrieval": "nitro_e.rewards.retrieval:Retrieval",
    "remote": "nitro_e.rewards.remote:RemoteReward",
}
# keys of RewardConfig; given to the classes that take them
RESERVED = ("path", "revision", "dtype", "device")


def reward(target: Any = None, *, needs_info: bool = False) -> Any:
    """Decorator: recipes may name this function or class as "module:name".

    With `needs_info` it only gets prompts that have GenEval metadata, `info["include"]`.
    """

    def mark(target: Any) -> Any:
        target.is_reward, target.needs_info = True, needs_info
        return target

    return mark if target is None else mark(target)


def find(name: str) -> Callable[..., Any]:
    """Import the function or class behind a name; ConfigError if there is none."""
    if ":" not in name and name not in BUILT_IN:
        raise ConfigError(
            f"name: unknown reward '{name}'" + did_you_mean(name, list(BUILT_IN)) + "; yours: 'module:name'"
        )
    module, _, attribute = BUILT_IN.get(name, name).partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for yours, whichever script is running
    try:
        target = getattr(import_module(module), attribute, None)
    except ImportError as error:
        raise ConfigError(
            f"name: reward '{name}': cannot import '{module}' ({error}); put {module}.py "
            "into the directory you start from, or install it"
        ) from error
    if target is None:
        raise ConfigError(f"name: reward '{name}': module '{module}' has no '{attribute}'")
    if name not in BUILT_IN and not getattr(target, "is_reward", False):
        raise ConfigError(
            f"name: '{name}' is not marked as a reward; write @reward (nitro_e.rewards) above it"
        )
    return target


def check_options(name: str, options: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """ConfigError for options that the reward does not have, or lacks; `given`: reserved ones that are set."""
    known = _keywords(find(name))
    for key in given:
        if key not in known:
            raise ConfigError(f"{key}: reward '{name}' has no {key}; leave it out")
    for key in options:
        if key in RESERVED or key not in known:
            allowed = [other for other in known if other not in RESERVED]
            raise ConfigError(
                f"options.{key}: reward '{name}' has no such option" + did_you_mean(key, allowed)
            )
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in RESERVED and key not in options:
            raise ConfigError(f"options.{key}: reward '{name}' needs it")


def build(name: str, options: Mapping[str, Any], reserved: Mapping[str, Any]) -> Callable[..., Any]:
    """Make the reward, ready to call: a class gets the reserved arguments it takes, a function its options."""
    target = find(name)
    known = _keywords(target)
    options = {key: _typed(known[key], value) for key, value in options.items()}
    if not inspect.isclass(target):
        return partial(target, **options)
    return target(**options, **{key: value for key, value in reserved.items() if key in known})


def _typed(parameter: inspect.Parameter, value: Any) -> Any:
    """Turn an int into the float that the parameter wants: configs hold 3.0 as 3."""
    is_float = parameter.annotation in (float, "float") or isinstance(parameter.default, float)
    return float(value) if is_float and type(value) is int else value


def _keywords(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(target).parameters
    if inspect.isclass(target):
        return dict(parameters)
    return {key: value for key, value in parameters.items() if value.kind is inspect.Parameter.KEYWORD_ONLY}
