"""`--set`: keys of a pipeline's file, of all its stages, or of one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_recipes.config.overrides import merge_overrides
from rlhf_recipes.core.errors import RecipeError, did_you_mean, error_context
from rlhf_recipes.core.paths import expand_paths
from rlhf_recipes.core.yaml import parse_yaml
from rlhf_recipes.pipeline.schema import PipelineConfig

SET = "--set"
Settings = Sequence[tuple[str, str, Any]]
"""Scope ("" for the file itself, `arguments`, or the name of a stage), key and value."""


def read_settings(texts: Iterable[str]) -> Settings:
    """Return the settings of a command line, such as `ppo.kl_coef=0.1`.

    `arguments.seed=3` is for all stages, `jobs=2` for the file. Values are YAML, and so may be JSON.

    Raises:
        RecipeError: for another form.
    """
    settings = []
    for text in texts:
        name, equals, value = text.partition("=")
        scope, _, key = name.rpartition(".")
        if not equals or not key:
            raise RecipeError(f"{SET}: {text!r}. Fix: write STAGE.KEY=VALUE, arguments.KEY=VALUE or KEY=VALUE")
        with error_context(f"{SET}: {name}"):
            settings.append((scope, key, expand_paths({key: _read_value(value)})[key]))
    return settings


def _read_value(text: str) -> Any:
    """Return a value as YAML; `{sft}`, a mapping in YAML, stands for a stage.

    Raises:
        RecipeError: for a text that YAML takes for a comment.
    """
    value = parse_yaml(text)
    if value is None and text.strip().lower() not in ("", "null", "~"):
        raise RecipeError(f"{text!r} is a comment in YAML. Fix: put it in quotes")
    return _with_placeholders(value)


def _with_placeholders(value: Any) -> Any:
    if isinstance(value, dict):
        names = [name for name, content in value.items() if content is None]
        if len(value) == len(names) == 1:
            return f"{{{names[0]}}}"
        return {name: _with_placeholders(content) for name, content in value.items()}
    return [_with_placeholders(one) for one in value] if isinstance(value, list) else value


def apply_settings(values: Mapping[str, Any], settings: Settings) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return a pipeline's file with settings over it, and scope -> keys set.

    Raises:
        RecipeError: for a stage or a key of the file that does not exist.
    """
    scopes: dict[str, dict[str, Any]] = {}
    for scope, key, value in settings:
        scopes.setdefault(scope, {})[key] = value
    keys = {scope: [*arguments] for scope, arguments in scopes.items()}
    for key in keys.get("", ()):
        if key not in PipelineConfig.model_fields:
            raise RecipeError(f"{SET}: unknown key '{key}'{did_you_mean(key, PipelineConfig.model_fields)}")
    values = {**values, **scopes.pop("", {})}
    if "arguments" in scopes:
        values |= _with_arguments(values, scopes.pop("arguments"))
    entries = values.get("stages")
    names = [entry.get("name") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    for scope in scopes:
        if scope not in names:
            raise RecipeError(f"{SET}: {scope}: is none of arguments, {', '.join(names)}{did_you_mean(scope, names)}")
    if scopes:
        values["stages"] = [
            _with_arguments(entry, scopes[entry["name"]]) if isinstance(entry, dict) and entry.get("name") in scopes else entry
            for entry in entries
        ]
    return values, keys


def _with_arguments(holder: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    arguments = holder.get("arguments") or {}
    return {**holder, "arguments": merge_overrides(arguments, settings)} if isinstance(arguments, dict) else {**holder}
