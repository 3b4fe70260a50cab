"""The strict parser that fills dataclasses from a YAML file and the command line."""

import argparse
import dataclasses
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from rlhf_recipes.config.current import CURRENT_RUN, CurrentRun
from rlhf_recipes.config.data import SINGLE_DATASET_KEYS, DatasetSource
from rlhf_recipes.config.launcher import check_launcher_support, current_launcher
from rlhf_recipes.config.trackers import settle_trackers
from rlhf_recipes.core.errors import RecipeError, did_you_mean, one_line
from rlhf_recipes.core.yaml import read_yaml

import torch
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments
from trl import TrlParser

COMMAND_LINE = "the command line"


_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# Pairs of options of which one makes the other meaningless: (one, other, what to do about it).
EXCLUSIVE = (
    ("load_in_4bit", "load_in_8bit", "weights are stored in 4 bits or in 8"),
    ("bf16", "fp16", "compute in one of the two; bf16 wherever the GPU has it"),
    ("reward_funcs", "reward_weights", "weights stand in the entries of `reward_funcs`: `- path: ...`, `weight: 0.5`"),
)
# Annotated more narrowly than what people write and the libraries read: `true` is the newest checkpoint of output_dir, and
# "all-linear" is PEFT's word for every linear layer.
# A reward is a path, or a mapping with its weight, which no command line could write.
_WIDER_TYPES = {
    "resume_from_checkpoint": bool | str | None,
    "lora_target_modules": list[str] | str | None,
    "reward_funcs": list[str | dict[str, Any]],
    "rewards": list[str | dict[str, Any]],
    "judge": str | dict[str, Any] | None,
}


def parse_dataclasses(
    recipe: str | Path, *dataclass_types: type, argv: Sequence[str] | None = None, here: bool = True
) -> tuple[Any, ...]:
    """The dataclasses of a recipe, filled from its YAML file and, over it, from the command line.

    Args:
        recipe: the recipe's `__file__`; without `--config`, `configs/tiny/<its name>.yaml` beside `recipes/` is read.
        dataclass_types: what to fill. A key may belong to any of them.
        argv: the command line without the program's name; `sys.argv` by default.
        here: whether the recipe is to run on this machine, and is refused what the machine lacks.

    Returns:
        One instance for each of `dataclass_types`.

    Raises:
        RecipeError: a missing or malformed file, an unknown key, a value of the wrong type, or options that exclude each other.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # dotted paths, like all others, are looked for where the recipe is launched
    recipe = Path(recipe).resolve()
    parser = _RecipeParser(dataclass_types, allow_abbrev=False, usage=f"{recipe.name} [--config FILE] [--key value ...]")
    parser.add_argument("--config", help=f"YAML file with the arguments (default: configs/tiny/{recipe.stem}.yaml)")
    given = parser.parse_given(sys.argv[1:] if argv is None else argv)
    config = Path(given.pop("config", None) or recipe.parent.parent / "configs" / "tiny" / f"{recipe.stem}.yaml")

    types = {name: hint for cls in dataclass_types for name, hint in get_type_hints(cls).items()}
    fields = {item.name: item for cls in dataclass_types for item in dataclasses.fields(cls) if item.init}
    types = {name: _WIDER_TYPES.get(name, types[name]) for name in fields}
    if types.get("loss_type") == list[str]:  # of DPO, where one loss need not be written as a list
        types["loss_type"] = list[str] | str
    from_file = read_yaml(config)
    for where, values in ((str(config), from_file), (COMMAND_LINE, given)):
        for key, value in values.items():
            if key not in fields:
                raise RecipeError(f"{where}: unknown key '{key}'{did_you_mean(key, fields)}")
            value = _unpacked(value) if where == COMMAND_LINE else value
            values[key] = _checked(key, value, types[key], fields[key].metadata.get("choices"), where)
    merged = merge_overrides(from_file, given)
    where = f"{config} and {COMMAND_LINE}" if given else str(config)
    _refuse_exclusive(merged, where, trains="learning_rate" in fields)
    _refuse_unusable(merged, where)
    if "bf16" in fields:
        _suit_the_machine(merged, where)
        if here:
            _refuse_bf16_without_support(merged, where)
            settle_trackers(merged, where)
    try:
        with warnings.catch_warnings():
            # TRL sets it itself, under the name that TRL and everybody's YAML files have
            warnings.filterwarnings("ignore", message="`gradient_checkpointing` is deprecated", category=FutureWarning)
            groups = parser.parse_dict(merged)
    except (ValueError, TypeError, ImportError) as error:  # the dataclasses' own checks
        raise RecipeError(f"{where}: {one_line(error)}") from error
    values = {key: value for group in groups for key, value in vars(group).items()}
    if here:
        _refuse_each_alone(groups, where)
        try:
            if "learning_rate" in values:  # it trains
                check_launcher_support(recipe.stem, values, current_launcher())
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error
    CURRENT_RUN.set(CurrentRun(recipe, config, where, values))
    return groups


def merge_overrides(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` over `under`, as the command line goes over a file: the data that it names replace those of the file.

    What only the old dataset reads goes with it; a `column_mapping` stays, since another one may well have the same columns.
    """
    another = over.get("dataset_name") not in (None, under.get("dataset_name"))
    gone = {"dataset_arguments", "dataset_config"} if another else set()
    for one, others in (
        ("datasets", ("dataset_name", *SINGLE_DATASET_KEYS)),
        ("dataset_name", ("datasets",)),
        ("eval_datasets", ("test_split_size",)),
        ("test_split_size", ("eval_datasets",)),
    ):
        gone.update(others if over.get(one) else ())
    return {key: value for key, value in under.items() if key not in gone} | dict(over)


def parse_mapping(recipe: str | Path, *types: type, values: Mapping[str, Any], here: bool = True) -> tuple[Any, ...]:
    """As `parse_dataclasses` with a YAML file of these values; messages name no file, neither now nor later.

    Args:
        recipe: the recipe's file.
        types: its dataclasses.
        values: what its YAML file would hold.
        here: as in `parse_dataclasses`.

    Raises:
        RecipeError: what the recipe would say.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "stage.yaml"
        written.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
        try:
            # In a context of its own: what goes wrong later does not come from this file
            return copy_context().run(parse_dataclasses, recipe, *types, argv=["--config", str(written)], here=here)
        except RecipeError as error:
            raise RecipeError(str(error).removeprefix(f"{written}: ")) from error


class _RecipeParser(TrlParser):
    """TRL's parser, which says in one line what is wrong instead of printing three hundred options."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{COMMAND_LINE}: {message.removeprefix('argument ')}")

    def parse_given(self, argv: Sequence[str]) -> dict[str, Any]:
        """The options that are on the command line, and no defaults."""
        hints = {name: hint for cls in self.dataclass_types for name, hint in get_type_hints(cls).items()}
        mappings = {name for name, hint in hints.items() if _is_mapping(hint)}
        optional_texts = {name for name, hint in hints.items() if set(get_args(hint)) == {str, type(None)}}
        for action in self._actions:
            action.default = argparse.SUPPRESS
            action.choices = None  # `_checked` looks, in the words that it has for the file
            if action.dest in mappings:
                action.type = _json_mapping
            elif action.dest in optional_texts:  # "none" unsets, as it does for numbers
                action.type = lambda text: None if text.lower() in ("none", "null") else text
        namespace, unknown = self.parse_known_args(list(argv))
        if unknown:
            word = unknown[0]
            if not word.startswith("--"):
                raise RecipeError(f"{COMMAND_LINE}: '{word}' belongs to no option; write `--key value`")
            key = word.removeprefix("--").split("=")[0].replace("-", "_")
            known = [action.dest for action in self._actions]
            raise RecipeError(f"{COMMAND_LINE}: unknown option '{word}'{did_you_mean(key, known)}")
        return vars(namespace)


def _unpacked(value: Any) -> Any:
    """A list of the command line with what is written as JSON in it, alone or as a list, in place of the text."""
    if not isinstance(value, list):
        return value
    entries = []
    for entry in value:
        text = entry.path if isinstance(entry, DatasetSource) else entry
        try:
            found = json.loads(text) if isinstance(text, str) and text.startswith(("{", "[")) else entry
        except (ValueError, RecursionError):
            found = entry
        entries += found if isinstance(found, list) else [found]
    return entries


def _checked(key: str, value: Any, hint: Any, choices: Sequence[Any] | None, where: str) -> Any:
    """`value` in the type that `hint` asks for, or a `RecipeError` that names `key` and `where`."""
    if isinstance(value, list) and DatasetSource in get_args(hint):
        return [_dataset_source(key, number, entry, where) for number, entry in enumerate(value, start=1)]
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    enums = [member for member in members if isinstance(member, type) and issubclass(member, Enum)]
    if enums:
        choices = [member.value for member in enums[0]]
    if choices and value is not None and value not in choices:
        quoted = " (YAML reads a bare yes or no as true or false: write it in quotes)" if isinstance(value, bool) else ""
        known = ", ".join(str(choice) for choice in choices)
        raise RecipeError(f"{where}: {key}: {value!r} is none of {known}{did_you_mean(str(value), map(str, choices))}{quoted}")
    # PyYAML reads 1e-4 as text, since it has no dot
    number = float(value) if isinstance(value, str) and str not in members and _NUMBER.fullmatch(value) else value
    try:
        return TypeAdapter(hint, config=_STRICT).validate_python(number)
    except ValidationError:
        expected = " or ".join(_type_name(member) for member in members)
        raise RecipeError(f"{where}: {key}: expected {expected}, found {value!r} ({type(value).__name__})") from None


def _dataset_source(key: str, number: int, entry: Any, where: str) -> DatasetSource:
    place = f"{where}: {key}, entry {number}"
    if isinstance(entry, DatasetSource):  # from the command line
        return entry
    if not isinstance(entry, dict) or "path" not in entry:
        raise RecipeError(f"{place}: must be a mapping with `path`, found {entry!r}")
    types = get_type_hints(DatasetSource)
    for name, value in entry.items():
        if name not in types:
            raise RecipeError(f"{place}: unknown key '{name}'{did_you_mean(str(name), types)}")
        entry[name] = _checked(name, value, types[name], None, place)
    return DatasetSource(**entry)


def _refuse_exclusive(values: dict[str, Any], where: str, trains: bool) -> None:
    for one, other, remedy in EXCLUSIVE:
        if values.get(one) and values.get(other):
            raise RecipeError(f"{where}: `{one}` and `{other}` exclude each other: {remedy}")
    if trains and (values.get("load_in_4bit") or values.get("load_in_8bit")) and not values.get("use_peft"):
        raise RecipeError(
            f"{where}: quantised weights cannot be trained: set `use_peft: true`, or `load_in_4bit` and `load_in_8bit` to false"
        )


def _refuse_unusable(values: dict[str, Any], where: str) -> None:
    """Values of the right type that TRL would choke on later, or that would break a promise of ours."""
    for key in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if values.get(key, 1) < 1:
            raise RecipeError(f"{where}: {key}: {values[key]}: must be 1 or more")
    for key in ("learning_rate", "num_train_epochs", "weight_decay"):
        if values.get(key, 0) < 0:
            raise RecipeError(f"{where}: {key}: {values[key]}: must not be negative")
    for key in [key for key, value in values.items() if key.endswith("_kwargs") and isinstance(value, str)]:
        try:  # as Transformers reads it, which leaves a text that is no JSON for others to trip over
            values[key] = _json_mapping(values[key])
        except argparse.ArgumentTypeError as error:
            raise RecipeError(f"{where}: {key}: {error}") from error
    if values.get("eval_on_start") and values.get("eval_strategy", "no") == "no":
        raise RecipeError(f"{where}: eval_on_start: there is nothing to evaluate on under `eval_strategy: no`: set `steps`")
    if values.get("hub_strategy") in ("checkpoint", "all_checkpoints"):
        raise RecipeError(f"{where}: hub_strategy: a result is uploaded when it is whole, and no checkpoint is: leave it out")
    if values.get("truncation_mode") == "keep_end":
        raise RecipeError(
            f"{where}: truncation_mode: keep_end cuts off where prompts begin: raise `max_length`, or drop long rows"
        )
    if values.get("dataset_text_field", "text") != "text":
        remedy = f"column_mapping: {{{values['dataset_text_field']}: text}}"
        raise RecipeError(f"{where}: dataset_text_field: the text is always in `text`: set `{remedy}`")


def _suit_the_machine(values: dict[str, Any], where: str) -> None:
    """Where no GPU is used, the defaults that need one are off; where there is none, asking for bf16 or fp16 is refused."""
    if torch.accelerator.is_available() and not values.get("use_cpu"):
        return
    for key in ("bf16", "fp16"):
        if values.get(key) and not values.get("use_cpu"):
            raise RecipeError(f"{where}: {key}: this machine has no GPU: set `{key}: false`")
    values.setdefault("bf16", False)
    values.setdefault("dataloader_pin_memory", False)


def _refuse_each_alone(groups: Sequence[Any], where: str) -> None:
    """Refuses several processes of which each would train by itself on everything, and write over the others."""
    launched = os.environ.get("WORLD_SIZE", "") if "LOCAL_RANK" in os.environ else ""  # by torchrun, which accelerate calls
    alone = any(group.world_size == 1 for group in groups if isinstance(group, TrainingArguments))
    if alone and launched.isdecimal() and int(launched) > 1:
        lacking = "this one knows of no other" if torch.cuda.is_available() else "there is no GPU that they could share out"
        raise RecipeError(
            f"{where}: {launched} processes were launched, and {lacking}: set `use_cpu: true` to share out CPUs, or launch one"
        )


def _refuse_bf16_without_support(values: dict[str, Any], where: str) -> None:
    """A GPU without it would emulate it, slowly, and Transformers does not say so. Where nobody asks for it, it is off."""
    if values.get("use_cpu") or not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False):
        return
    for key in ("bf16", "dtype"):
        if values.get(key) in (True, "bfloat16"):
            raise RecipeError(
                f"{where}: {key}: {str(values[key]).lower()}: this GPU ({torch.cuda.get_device_name()}) has no bf16: set "
                "`bf16: false`, and with LoRA `dtype: float16` and `fp16: true`; without LoRA, and for PPO, `dtype: float32`"
            )
    values.setdefault("bf16", False)


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else re.sub(r"\w+\.", "", str(hint))


def _is_mapping(hint: Any) -> bool:
    return any(member is dict or get_origin(member) is dict for member in (hint, *get_args(hint)))


def _json_mapping(text: str) -> Any:
    """The type of a mapping on the command line, where argparse would know no better than `dict(text)`."""
    if text.lower() in ("none", "null"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON mapping such as '{{\"key\": 1}}', found {text!r}")
    return value
