"""YAML 1.2 files: `1e-4` is a number, `yes` is text, and keys are unique."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, did_you_mean, error_context, one_line
from rlhf_recipes.core.paths import expand_paths

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, SequenceNode


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, its paths expanded; an empty file is {}.

    Raises:
        RecipeError: if there is no such file, or it is not YAML, or holds no mapping; as `expand_paths`.
    """
    if not path.is_file():
        siblings = map(str, path.parent.glob("*.yaml"))
        raise RecipeError(f"{path}: no such file{did_you_mean(str(path), siblings)}")
    with error_context(str(path), OSError, UnicodeDecodeError):
        values = parse_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict | None):
        raise RecipeError(f"{path}: expected a mapping, found {type(values).__name__}. Fix: write one `key: value` a line")
    with error_context(str(path)):
        return expand_paths(values or {})


def parse_yaml(text: str) -> Any:
    """Return what YAML text says.

    Raises:
        RecipeError: if it is not YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)  # only the pure loader reads YAML 1.2
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise RecipeError(f"not valid YAML: {line}{error.problem or error.context}") from error
    except Exception as error:  # of the loader's constructors, such as for the date 2001-13-45
        raise RecipeError(f"not valid YAML: {one_line(error)}") from error


def line_of(path: Path, steps: Sequence[str | int]) -> int | None:
    """Return the line of a key in a YAML file, or of the part of it that is there.

    `steps` are keys of mappings, and positions in lists from 0.
    """
    line, node = None, None
    with contextlib.suppress(OSError, ValueError, YAMLError):  # it may have been edited since it was read
        node = YAML(typ="safe", pure=True).compose(path.read_text(encoding="utf-8"))
    for step in steps:
        if isinstance(node, MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(step)), None)
        else:
            items = node.value if isinstance(node, SequenceNode) else []
            found = (items[step],) * 2 if isinstance(step, int) and step < len(items) else None
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def to_yaml(values: dict[str, Any]) -> str:
    """Return a mapping as YAML text, which `read_yaml` reads as the same values."""
    writer, text = YAML(typ="safe", pure=True), io.StringIO()
    writer.default_flow_style, writer.sort_base_mapping_type_on_output = False, False
    writer.dump(values, text)
    return text.getvalue()
