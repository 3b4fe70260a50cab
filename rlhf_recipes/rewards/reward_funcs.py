"""Read `reward_funcs` of a YAML file: dotted paths and folders, with weights and arguments."""

import contextlib
import importlib
import importlib.util
import inspect
import math
import pkgutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rlhf_recipes.core.errors import RecipeError, did_you_mean
from rlhf_recipes.rewards.functions import FINITE_FLOATS, TRL_KEYWORDS, Reward, explain_argument_error
from rlhf_recipes.rewards.protocol import checked_reward

from pydantic import ValidationError
from pydantic.dataclasses import dataclass
from trl.trainer.utils import get_callable_name


@dataclass(config=FINITE_FLOATS)
class SavedReward:
    """A reward model in a folder, for `PPOTrainer` to put on its base.

    Parameters:
        folder: what `recipes/reward.py` saved.
        combine: how an ensemble becomes one score, if not as it was trained to.
        uncertainty_coef: likewise.
    """

    folder: str
    combine: Literal["mean", "min", "uncertainty"] | None = None
    uncertainty_coef: float | None = None


def load_rewards(specs: Any) -> tuple[list[Reward | SavedReward], list[float]]:
    """The rewards that the YAML key `reward_funcs` lists, and their weights (TRL's `reward_weights`).

        reward_funcs:
          - runs/tiny/reward
          - rlhf_recipes.rewards.normalised_match
          - path: rlhf_recipes.rewards.LengthPenalty
            weight: 0.5
            arguments: {slope: 0.01, longest: 64}

    A `path` is a folder that `recipes/reward.py` saved, with the `arguments` of `SavedReward` for an ensemble; or the dotted
    path of a function with TRL's signature, to which `arguments` are bound; of a class, which is
    instantiated with `arguments`; or, with `arguments` (they may be `{}`), of a function that makes a reward. A weight is 1 if
    it is not given; 0 logs a reward without training on it. Every reward is checked, and a name that comes twice is numbered,
    since TRL would log the two as one.

    Raises:
        RecipeError: with the entry, the key, and what would be right.
    """
    if not isinstance(specs, list) or not specs:
        raise RecipeError(f"reward_funcs: expected a list of rewards, found {specs!r}")
    rewards, names, weights = [], [], []
    for number, spec in enumerate(specs, start=1):
        where = f"reward_funcs, entry {number}"
        path, weight, arguments = _read_spec(spec, where)
        weights.append(weight)
        if "/" in path or Path(path).is_dir():
            rewards.append(_saved_reward(path, arguments or {}, f"{where}: {path}"))
            continue
        reward = _build(path, arguments, f"{where}: {path}")
        name = get_callable_name(reward)
        names.append(name)
        rewards.append(checked_reward(reward, name if names.count(name) == 1 else f"{name}_{names.count(name)}"))
    return rewards, weights


def reward_paths(specs: Sequence[str | dict[str, Any]]) -> list[str | None]:
    """What the entries of `reward_funcs` name, before anything is loaded."""
    return [spec.get("path") if isinstance(spec, dict) else spec for spec in specs]


def _saved_reward(path: str, arguments: dict[str, Any], where: str) -> SavedReward:
    if not Path(path).is_dir():
        raise RecipeError(f"{where}: no such folder: train the reward model first (recipes/reward.py), or name it in `needs`")
    try:
        return SavedReward(folder=path, **arguments)
    except (TypeError, ValidationError) as error:
        raise RecipeError(
            f"{where}: arguments: {explain_argument_error(error)}: there are `combine` and `uncertainty_coef`"
        ) from error


def _read_spec(spec: Any, where: str) -> tuple[str, float, dict[str, Any] | None]:
    """Path, weight and arguments of one entry."""
    spec = {"path": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, dict) or not isinstance(spec.get("path"), str):
        raise RecipeError(f"{where}: must be a dotted path, or a mapping with `path`, found {spec!r}")
    keys = ("path", "weight", "arguments")
    for key in spec:
        if key not in keys:
            raise RecipeError(f"{where}: unknown key '{key}'{did_you_mean(str(key), keys)}")
    arguments = spec.get("arguments")
    if not isinstance(arguments, dict | None) or not all(isinstance(name, str) for name in arguments or ()):
        raise RecipeError(f"{where}: arguments: expected a mapping of names to values, found {arguments!r}")
    return spec["path"], _weight(spec.get("weight", 1.0), where), arguments


def _weight(value: Any, where: str) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            weight = float(value)  # a text too: PyYAML reads 1e-4 as one, since it has no dot
            if math.isfinite(weight):
                return weight
    raise RecipeError(f"{where}: weight: expected a finite number, found {value!r}")


def _build(path: str, arguments: dict[str, Any] | None, where: str) -> Reward:
    target = _resolve(path, where)
    if not callable(target):
        raise RecipeError(f"{where}: is a {type(target).__name__}, and must be a function or a class")
    try:
        inspect.signature(target)
    except ValueError as error:
        raise RecipeError(f"{where}: its parameters are unknown ({error}): wrap it in a function of yours") from error
    if inspect.isclass(target) or (arguments is not None and not _takes_completions(target)):
        reward = _make(target, arguments or {}, where)
    else:
        reward = _bind(target, arguments, where) if arguments else target
    missing = _refused_keywords(reward)
    if missing:
        raise RecipeError(
            f"{where}: TRL calls a reward with the keywords {', '.join(TRL_KEYWORDS)} and the columns of the data, and "
            f"{_signature(reward)} does not take {missing[0]}: end its parameters with `**columns`, or, if it makes a reward, "
            "give it `arguments` (they may be {})"
        )
    return reward


def _resolve(path: str, where: str) -> Any:
    """What a dotted path names."""
    module_name, _, name = path.rpartition(".")
    if not module_name or not all(part.isidentifier() for part in path.split(".")):
        raise RecipeError(f"{where}: must be a dotted path such as rlhf_recipes.rewards.exact_match")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RecipeError(
            f"{where}: cannot import {module_name} (its folder must be on PYTHONPATH): {error}{_nearest_module(module_name)}"
        ) from error
    if not hasattr(module, name):
        raise RecipeError(f"{where}: {module_name} has no '{name}'{did_you_mean(name, dir(module))}")
    return getattr(module, name)


def _nearest_module(name: str) -> str:
    """A hint at a module with a similar name in the same package."""
    package, _, child = name.rpartition(".")
    try:
        spec = importlib.util.find_spec(package) if package else None
    except ImportError:
        return ""
    if spec is None or child in (siblings := [item.name for item in pkgutil.iter_modules(spec.submodule_search_locations)]):
        return ""
    return did_you_mean(child, siblings)


def _make(maker: Callable[..., Reward], arguments: dict[str, Any], where: str) -> Reward:
    """The reward that a class or factory makes of `arguments`."""
    _check_names(maker, arguments, where)
    try:
        inspect.signature(maker).bind(**arguments)
    except TypeError as error:
        raise RecipeError(f"{where}: arguments: {error} of {_signature(maker)}") from error
    try:
        reward = maker(**arguments)
    except (ValueError, RecipeError) as error:
        raise RecipeError(f"{where}: arguments: {explain_argument_error(error)}") from error
    if not callable(reward):
        raise RecipeError(f"{where}: makes a {type(reward).__name__}, which is no function")
    return reward


def _bind(function: Reward, arguments: dict[str, Any], where: str) -> Reward:
    """A reward function with `arguments` bound to it."""
    _check_names(function, arguments, where)
    for name in arguments:
        if name in TRL_KEYWORDS:
            raise RecipeError(f"{where}: arguments: '{name}' comes from TRL and cannot be set")
    return partial(function, **arguments)


def _check_names(function: Callable[..., Any], arguments: dict[str, Any], where: str) -> None:
    """Refuses an argument without a parameter of that name, which a reward's `**columns` would swallow."""
    parameters = inspect.signature(function).parameters.values()
    names = [item.name for item in parameters if item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)]
    if inspect.isclass(function) and any(item.kind is item.VAR_KEYWORD for item in parameters):
        return
    for name in arguments:
        if name not in names:
            raise RecipeError(
                f"{where}: arguments: unknown argument '{name}' of {_signature(function)}{did_you_mean(name, names)}"
            )


def _takes_completions(function: Callable[..., Any]) -> bool:
    """Whether it is a reward, rather than what makes one."""
    parameters = inspect.signature(function).parameters
    return "completions" in parameters or any(item.kind is item.VAR_KEYWORD for item in parameters.values())


def _refused_keywords(reward: Reward) -> list[str]:
    """Which of TRL's keywords it does not take."""
    parameters = inspect.signature(reward).parameters
    if any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
        return []
    return [name for name in TRL_KEYWORDS if name not in parameters]


def _signature(function: Callable[..., Any]) -> str:
    """The name and, without types, the parameters."""
    signature = inspect.signature(function)
    parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return f"{get_callable_name(function)}{inspect.Signature(parameters)}"
