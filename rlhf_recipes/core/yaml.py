"""YAML files, read strictly."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, did_you_mean, first_line, one_line

import yaml

_DEEPEST, _LARGEST = 50, 10_000_000  # lists and mappings in one another, and characters, of a file


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        RecipeError: if there is no such file, or it is not YAML, not a mapping, or names a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [str(other) for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise RecipeError(f"{path}: no such file{did_you_mean(str(path), siblings)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from error
    try:
        values = yaml.load(text, Loader=_StrictLoader)
        _check_values(values)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {one_line(error)}") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: not valid YAML: lists or mappings stand in one another too deeply to be read") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: must hold one `key: value` on each line, and holds a {type(values).__name__}")
    for key in values:
        if not isinstance(key, str):
            raise RecipeError(f"{path}: the key {key!r} is no text ({type(key).__name__}): write it in quotes")
    return values


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently keep the last, and says where it cannot read on."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, TypeError) as error:  # PyYAML's, for 2001-13-45, 0x_ or !!bool maybe
            found = f" {node.value!r}" if isinstance(node, yaml.ScalarNode) else ""
            kind = node.tag.rpartition(":")[2]
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}:{found} cannot be read as {kind} ({first_line(error)})"
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`
                continue
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: a {type(key).__name__} cannot be a key")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _check_values(values: Any) -> None:
    """Refuses what would be read, and fail where it is used: endless or enormous by its anchors, too deep, or no real text."""
    sizes: dict[int, int] = {}  # of lists and mappings, by their identity: anchors make a few lines stand for any number

    def size(value: Any, above: tuple[int, ...]) -> int:
        if isinstance(value, str):
            check_text(value)
            return len(value)
        if not isinstance(value, dict | list):
            return 1
        if id(value) in above:
            raise yaml.YAMLError("an anchor stands for something that it is a part of")
        if len(above) == _DEEPEST:
            raise yaml.YAMLError(f"more than {_DEEPEST} lists or mappings stand in one another")
        if id(value) not in sizes:
            items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(size(item, (*above, id(value))) for item in items)
        return sizes[id(value)]

    if size(values, ()) > _LARGEST:
        raise yaml.YAMLError(f"with its anchors written out it has more than {_LARGEST} characters")


def check_text(text: str) -> None:
    """Refuses letters that no file name can have, and no file hold."""
    for letter in text if not text.isprintable() else "":
        if letter == "\0" or "\ud800" <= letter <= "\udfff":
            raise yaml.YAMLError(f"{text[:40]!r} has the letter {letter!r}, which no text can hold")
