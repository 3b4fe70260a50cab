"""The strict parser that fills dataclasses from a YAML file and the command line."""

import argparse
import dataclasses
import json
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

from rlhf_recipes.config.checks import (
    check_machine,
    check_process_group,
    check_values,
    prepare_trackers,
    set_machine_defaults,
)
from rlhf_recipes.config.current import CURRENT_RUN, CurrentRun
from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.config.keys import check_keys, unknown_option
from rlhf_recipes.config.launcher import check_launcher_support, current_launcher
from rlhf_recipes.config.origins import COMMAND_LINE, config_of, origin_of
from rlhf_recipes.config.overrides import merge_overrides
from rlhf_recipes.core.errors import RecipeError, did_you_mean, error_context, one_line
from rlhf_recipes.core.paths import add_current_folder, expand_paths
from rlhf_recipes.core.yaml import read_yaml

from pydantic import ConfigDict, TypeAdapter, ValidationError
from trl import TrlParser

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_REWARDS = list[str | dict[str, Any]]  # a mapping has a weight or arguments, which no command line could write
# Keys that the libraries annotate more narrowly than they read them
_WIDER_TYPES = {
    "resume_from_checkpoint": bool | str | None,
    "lora_target_modules": list[str] | str | None,
    "reward_funcs": _REWARDS,
    "rewards": _REWARDS,
    "judge": str | dict[str, Any] | None,
}


class _Field(NamedTuple):
    """Type and allowed values of a key."""

    hint: Any
    choices: Sequence[Any] | None


def parse_dataclasses(recipe: str | Path, *types: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Fill a recipe's dataclasses, from its YAML file overridden by the command line.

    Args:
        recipe: the recipe's `__file__`; without `--config`, `configs/tiny/<its name>.yaml` beside its folder is read.
        types: dataclasses to fill. A key may belong to any of them.
        argv: the command line without the program's name; `sys.argv` by default.

    Raises:
        RecipeError: a missing or malformed file, an unknown key, a value of the wrong type, options that exclude each other,
            or what this machine or launcher cannot do.
    """
    add_current_folder()
    recipe = Path(recipe).resolve()
    parser = _CommandLineParser(types, allow_abbrev=False, usage=f"{recipe.name} [--config FILE] [--key value ...]")
    parser.add_argument("--config", help=f"YAML file with the arguments (default: configs/tiny/{recipe.stem}.yaml)")
    overrides = parser.read(sys.argv[1:] if argv is None else argv)
    config = config_of(recipe, overrides.pop("config", None))

    values, fields = read_yaml(config), _fields(types)
    with origin_of(config, values).context():
        values = _check_types(values, fields)
    with error_context(COMMAND_LINE):
        overrides = {key: _parse_json_entries(value) for key, value in overrides.items()}
        overrides = _check_types(expand_paths(overrides), fields)
    origin = origin_of(config, values, overrides)
    with origin.context():
        groups = _fill(recipe.stem, types, merge_overrides(values, overrides), here=True)
    CURRENT_RUN.set(CurrentRun(recipe, config, origin, values_of(groups)))
    return groups


def parse_mapping(recipe: str, *types: type, values: Mapping[str, Any], here: bool = True) -> tuple[Any, ...]:
    """Fill a recipe's dataclasses from its YAML file's content; errors name no file.

    `here` tells whether the recipe will run on this machine, which then must have what it needs.
    """
    return _fill(recipe, types, _check_types(values, _fields(types)), here)


def _fields(types: Sequence[type]) -> dict[str, _Field]:
    hints = {cls: get_type_hints(cls) for cls in types}
    return {
        item.name: _Field(_hint(item.name, hints[cls][item.name]), item.metadata.get("choices"))
        for cls in types
        for item in dataclasses.fields(cls)
        if item.init
    }


def _hint(name: str, hint: Any) -> Any:
    if name.endswith("_kwargs"):
        return dict[str, Any] | None  # Transformers also takes text, and reads it as JSON
    if name == "loss_type" and hint == list[str]:
        return list[str] | str  # DPO's: a single loss need not be a list
    return _WIDER_TYPES.get(name, hint)


def _fill(recipe: str, types: Sequence[type], values: dict[str, Any], here: bool) -> tuple[Any, ...]:
    trains = any("learning_rate" in cls.__dataclass_fields__ for cls in types)
    check_values(values, trains)
    if trains:
        set_machine_defaults(values)
        if here:
            check_machine(values)
            prepare_trackers(values)
    groups = []
    # TRL itself sets the option, under the name that everybody's YAML files have
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
        for cls in types:
            names = {item.name for item in dataclasses.fields(cls) if item.init}
            try:
                groups.append(cls(**{key: value for key, value in values.items() if key in names}))
            except (ValueError, TypeError, ImportError) as error:  # the dataclasses' own checks
                raise RecipeError(one_line(error)) from error
    if trains and here:
        check_process_group(groups)
        check_launcher_support(recipe, values_of(groups), current_launcher())
    return tuple(groups)


def values_of(groups: Sequence[Any]) -> dict[str, Any]:
    """Return the fields of filled dataclasses in one mapping."""
    return {key: value for group in groups for key, value in vars(group).items()}


# --- The command line --------------------------------------------------------------------------------------


class _CommandLineParser(TrlParser):
    """TRL's parser, with one line for an error instead of three hundred options."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{COMMAND_LINE}: {message.removeprefix('argument ')}")

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the options on the command line, without defaults."""
        hints = {name: hint for cls in self.dataclass_types for name, hint in get_type_hints(cls).items()}
        for action in self._actions:
            hint = hints.get(action.dest)
            action.default = argparse.SUPPRESS
            action.choices = None  # `_check_types` checks them, for the file too
            if any(dict in (member, get_origin(member)) for member in (hint, *get_args(hint))):
                action.type = _json_mapping
            elif set(get_args(hint)) == {str, type(None)}:  # "none" unsets, as for numbers
                action.type = lambda text: None if text.lower() in ("none", "null") else text
        options, unknown = self.parse_known_args(list(argv))
        for word in unknown[:1]:
            if not word.startswith("--"):
                raise RecipeError(f"{COMMAND_LINE}: '{word}' belongs to no option. Fix: write `--key value`")
            raise unknown_option(word, [action.dest for action in self._actions])
        return vars(options)


def _json_mapping(text: str) -> Any:
    """Return a mapping written as JSON; argparse would call `dict(text)`."""
    if text.lower() in ("none", "null"):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON mapping such as '{{\"key\": 1}}', found {text!r}")
    return value


def _parse_json_entries(value: Any) -> Any:
    """Parse the JSON mappings and lists among the entries of a command-line list."""
    if not isinstance(value, list):
        return value
    entries = []
    for entry in value:
        text, entry = (entry.path, {"path": entry.path}) if isinstance(entry, DatasetSource) else (entry, entry)
        try:
            parsed = json.loads(text) if isinstance(text, str) and text.startswith(("{", "[")) else entry
        except ValueError:
            parsed = entry
        entries += parsed if isinstance(parsed, list) else [parsed]
    return entries


# --- Types -------------------------------------------------------------------------------------------------


def _check_types(values: Mapping[str, Any], fields: Mapping[str, _Field]) -> dict[str, Any]:
    """Return the values in the types of their fields."""
    check_keys(values, fields)
    return {key: _check_type(key, value, fields[key]) for key, value in values.items()}


def _check_type(key: str, value: Any, field: _Field) -> Any:
    members = get_args(field.hint) if get_origin(field.hint) in (Union, UnionType) else (field.hint,)
    if isinstance(value, list) and DatasetSource in get_args(field.hint):
        return [_dataset_source(f"{key}, entry {number}", entry) for number, entry in enumerate(value, start=1)]
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    choices = [member.value for member in enums[0]] if enums else field.choices
    if choices and value is not None and value not in choices:
        close = did_you_mean(str(value), map(str, choices))
        raise RecipeError(f"{key}: {value!r} is none of {', '.join(map(str, choices))}{close}")
    try:
        return TypeAdapter(field.hint, config=_STRICT).validate_python(value)
    except ValidationError:
        expected = " or ".join(map(_type_name, members))
        fix = ". Fix: write `true` or `false`" if bool in members and value in ("yes", "no", "on", "off") else ""
        raise RecipeError(f"{key}: expected {expected}, found {value!r} ({type(value).__name__}){fix}") from None


def _dataset_source(place: str, entry: Any) -> DatasetSource:
    if not isinstance(entry, dict) or "path" not in entry:
        raise RecipeError(f"{place}: expected a mapping with `path`, found {entry!r}")
    with error_context(place):
        return DatasetSource(**_check_types(entry, _fields([DatasetSource])))


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else re.sub(r"\w+\.", "", str(hint))
