"""Read the YAML key `reward_funcs`."""

import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rlhf_recipes.core.errors import RecipeError, did_you_mean, error_context, one_line
from rlhf_recipes.inputs import is_reward_folder, is_within, require_reward, require_reward_folder
from rlhf_recipes.rewards.functions import CONVERT_REFERENCES, FINITE_FLOATS, NAME_A_REFERENCE
from rlhf_recipes.rewards.matching import accepted_answers
from rlhf_recipes.rewards.protocol import TRL_KEYWORDS, Reward, checked_reward

from datasets import Dataset
from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass
from trl.trainer.utils import get_callable_name


@dataclass(config=FINITE_FLOATS)
class SavedReward:
    """A reward model in a folder, to be put on the policy's base.

    Parameters:
        folder: result of `recipes/reward.py`.
        combine: for an ensemble, in place of how it was trained.
        uncertainty_coef: likewise.
    """

    folder: str
    combine: Literal["mean", "min", "uncertainty"] | None = None
    uncertainty_coef: float | None = Field(default=None, ge=0)


def load_rewards(entries: Any, *data: Dataset | None) -> tuple[list[Reward | SavedReward], list[float]]:
    """Return the rewards that `reward_funcs` lists, and their weights.

        reward_funcs:
          - runs/tiny/reward
          - rlhf_recipes.rewards.normalised_match
          - path: rlhf_recipes.rewards.LengthPenalty
            weight: 0.5
            arguments: {slope: 0.01, longest: 64}

    A `path` is one of these:

    - a folder that `recipes/reward.py` saved; `arguments` are those of `SavedReward`
    - a function with TRL's signature; `arguments` are bound to it
    - a class, which is instantiated with `arguments`
    - a function that makes a reward of `arguments` (write `{}` if there are none)

    The default weight is 1; 0 logs a reward without training on it. Rewards are wrapped by `checked_reward`. A name that occurs
    twice is numbered, or TRL would log the two as one. Where `data` are given, those that compare with a `reference` must find
    one in them.

    Raises:
        RecipeError: with the entry, the key and the fix.
    """
    if not isinstance(entries, list) or not entries:
        raise RecipeError(f"reward_funcs: expected a list of rewards, found {entries!r}")
    rewards, names, weights = [], [], []
    for number, entry in enumerate(entries, start=1):
        with error_context(f"reward_funcs, entry {number}"):
            path, weight, arguments = _read_entry(entry)
        weights.append(weight)
        with error_context(f"reward_funcs, entry {number}: {path}"):
            if is_reward_folder(path):
                rewards.append(_saved_reward(path, arguments or {}))
                continue
            reward = _build(path, arguments)
            if getattr(getattr(reward, "func", reward), "compares_references", False):
                check_references(*data)
        name = get_callable_name(reward)
        names.append(name)
        rewards.append(checked_reward(reward, name if names.count(name) == 1 else f"{name}_{names.count(name)}"))
    return rewards, weights


def check_reward_funcs(key: str, entries: Sequence[Any], written: Sequence[Path]) -> list[str | None]:
    """Import the functions of a list of rewards, and check their arguments' names.

    Nothing is made of the arguments, and no model is loaded.

    Args:
        key: of the list.
        entries: as of `load_rewards`, or `load_named_rewards`.
        written: folders of stages, which will be there.

    Returns:
        The name under which each reports its scores; None if only the reward itself could tell.

    Raises:
        RecipeError: as `load_rewards`.
    """
    names = []
    for number, entry in enumerate(entries, start=1):
        place = f"{key}, entry {number}"
        name = entry.get("name") if isinstance(entry, dict) else None
        if isinstance(entry, dict):
            entry = {option: value for option, value in entry.items() if option not in ("name", "trained", "optional")}
        with error_context(place):
            path, _, arguments = _read_entry(entry)
        if is_reward_folder(path) or is_within(path, written):
            names.append(name or Path(path).name)
            continue
        with error_context(f"{place}: {path}"):
            target = _import(path)
            makes_one = _check_target(target, arguments)
        names.append(name or (None if makes_one and not inspect.isclass(target) else get_callable_name(target)))
    return names


def check_references(*data: Dataset | None) -> None:
    """Refuse prompts with which answers cannot be compared, before any are sampled.

    Raises:
        RecipeError: if there is no column `reference`, it is empty, or holds neither texts nor lists of texts.
    """
    for rows in filter(None, data):
        if "reference" not in rows.column_names:
            raise RecipeError(f"the data have no column `reference`. {NAME_A_REFERENCE}")
        found = False
        for row, reference in enumerate(rows["reference"]):
            with error_context(f"reference: row {row}", ValueError, fix=CONVERT_REFERENCES):
                found = bool(accepted_answers(reference)) or found
        if not found:
            raise RecipeError(f"reference: empty in all rows. {NAME_A_REFERENCE}")


def reward_paths(entries: Sequence[str | dict[str, Any]]) -> list[str | None]:
    """Return the paths in `reward_funcs`, without loading them."""
    return [entry.get("path") if isinstance(entry, dict) else entry for entry in entries]


def _read_entry(entry: Any) -> tuple[str, float, dict[str, Any] | None]:
    """Return path, weight and arguments of one entry."""
    entry = {"path": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise RecipeError(f"expected a dotted path, or a mapping with `path`, found {entry!r}")
    keys = ("path", "weight", "arguments")
    for key in entry:
        if key not in keys:
            raise RecipeError(f"unknown key '{key}'{did_you_mean(str(key), keys)}")
    arguments, weight = entry.get("arguments"), entry.get("weight", 1.0)
    if not isinstance(arguments, dict | None) or not all(isinstance(name, str) for name in arguments or ()):
        raise RecipeError(f"arguments: expected a mapping of names to values, found {arguments!r}")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not math.isfinite(weight):
        raise RecipeError(f"weight: expected a finite number, found {weight!r}")
    return entry["path"], float(weight), arguments


def _saved_reward(path: str, arguments: dict[str, Any]) -> SavedReward:
    require_reward_folder(path)
    try:
        return SavedReward(folder=path, **arguments)
    except (TypeError, ValidationError) as error:
        reason = explain_argument_error(error)
        raise RecipeError(f"arguments: {reason}. Fix: use `combine` and `uncertainty_coef` only") from error


def _build(path: str, arguments: dict[str, Any] | None) -> Reward:
    target = _import(path)
    if _check_target(target, arguments):
        reward = _make(target, arguments or {})
        _check_keywords(reward)
        return reward
    return partial(target, **arguments) if arguments else target


def _check_target(target: Any, arguments: dict[str, Any] | None) -> bool:
    """Check an entry's arguments; return whether they make a reward, not call one."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError) as error:  # not callable, or a builtin
        raise RecipeError(f"expected a function or a class with known parameters ({error})") from error
    makes_one = arguments is not None and not _takes_any_keyword(target) and "completions" not in parameters
    if inspect.isclass(target) or makes_one:
        if not (inspect.isclass(target) and _takes_any_keyword(target)):
            _check_names(target, arguments or {})
        return True
    _check_names(target, arguments or {})
    for name in arguments or {}:
        if name in TRL_KEYWORDS:
            raise RecipeError(f"arguments: '{name}' comes from TRL and cannot be set")
    _check_keywords(target)
    return False


def _check_keywords(reward: Reward) -> None:
    """Refuse a reward that does not take what TRL passes."""
    missing = [name for name in TRL_KEYWORDS if name not in inspect.signature(reward).parameters]
    if missing and not _takes_any_keyword(reward):
        raise RecipeError(
            f"TRL passes {', '.join(TRL_KEYWORDS)} and the columns of the data, and {_signature(reward)} does not take "
            f"{missing[0]}. Fix: add `**columns` to them, or, if it makes a reward, give it `arguments` (even {{}})"
        )


def _import(path: str) -> Any:
    """Return the object that a dotted path names."""
    require_reward(path)
    module_name, _, name = path.rpartition(".")
    with error_context(f"cannot import {module_name} (it is neither in this folder nor on PYTHONPATH)", ImportError):
        module = importlib.import_module(module_name)
    if not hasattr(module, name):
        raise RecipeError(f"{module_name} has no '{name}'{did_you_mean(name, dir(module))}")
    return getattr(module, name)


def _make(maker: Callable[..., Reward], arguments: dict[str, Any]) -> Reward:
    """Return the reward that a class or a factory makes."""
    try:
        reward = maker(**arguments)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"arguments: {explain_argument_error(error)}") from error
    if not callable(reward):
        raise RecipeError(f"makes a {type(reward).__name__}, not a reward function")
    return reward


def _check_names(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Refuse a misspelt argument, which a reward's `**columns` would swallow."""
    parameters = inspect.signature(function).parameters.values()
    names = [item.name for item in parameters if item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)]
    for name in arguments:
        if name not in names:
            hint = did_you_mean(name, names)
            raise RecipeError(f"arguments: unknown argument '{name}' of {_signature(function)}{hint}")


def _takes_any_keyword(function: Callable[..., Any]) -> bool:
    return any(item.kind is item.VAR_KEYWORD for item in inspect.signature(function).parameters.values())


def _signature(function: Callable[..., Any]) -> str:
    """Return the name and the parameters, without types."""
    signature = inspect.signature(function)
    parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return f"{get_callable_name(function)}{inspect.Signature(parameters)}"


def explain_argument_error(error: Exception) -> str:
    """Return in one line which argument is wrong and why."""
    if not isinstance(error, ValidationError):
        return one_line(error)
    first = error.errors()[0]
    if not first["loc"]:  # from a __post_init__
        return str(first["ctx"]["error"])
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r}"
