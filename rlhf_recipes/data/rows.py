"""The rows of a part, converted to what a stage trains on."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.data.conversion import CONVERTERS, Kind
from rlhf_recipes.data.shapes import SHAPES, BadRowError, Shape
from rlhf_recipes.data.sources import BATCH, Part

import pyarrow
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher

logger = logging.getLogger(__name__)

_PROBLEM, _ROW = "__problem__", "__row__"  # columns during the conversion
_TEXT = Value("string")
_MESSAGES = List({"role": _TEXT, "content": _TEXT})
# TRL's caches go by the fingerprint of a dataset, and `datasets` does not see that this code has changed
_CODE = [Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in ("rows", "shapes", "conversion")]


@dataclass(frozen=True)
class Converted:
    """The usable rows of a part in the columns of a kind."""

    label: str
    dataset: Dataset
    read: int  # rows of the part
    bad: list[tuple[int, str]]  # row number and reason
    unused: list[str]  # columns
    conversational: bool


def convert(part: Part, kind: Kind) -> Converted:
    """Convert every row of a part to `kind`, and list rows that cannot be used."""
    shape, columns = find_shape(part, kind), part.dataset.column_names
    if kind == "ranking" and "margin" in columns:
        raise RecipeError(
            f"{part.label}: margin: rankings have no margins. Fix: set `train_on: pairs`, or leave it out with `columns`."
        )
    used = [column for column in columns if column in shape.columns + shape.optional]
    conversational = _is_conversational(part.dataset, shape)
    unused = [column for column in columns if column not in used]
    passed_on = [column for column in unused if column != "prompt"] if kind == "prompt" else []  # to the reward functions
    features = _features(kind, shape, conversational, used) | {column: part.dataset.features[column] for column in passed_on}

    def convert_batch(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = []
        for place, index in enumerate(indices):
            kept = {column: batch[column][place] for column in passed_on} | {_ROW: index + 1}
            try:
                row = shape.read({column: batch[column][place] for column in used}, conversational)
                rows += [converted | kept for converted in CONVERTERS[kind][shape.form](row)]
            except BadRowError as problem:
                rows.append({_PROBLEM: str(problem)} | kept)
        return {column: [row.get(column) for row in rows] for column in features}

    _warn_of_ignored_keys(part, used)
    try:
        dataset = part.dataset.map(
            convert_batch,
            batched=True,
            batch_size=BATCH,
            with_indices=True,
            remove_columns=columns,
            features=Features(features),
            new_fingerprint=Hasher.hash((part.dataset._fingerprint, kind, shape.columns, conversational, _CODE)),
            load_from_cache_file=False,
            desc=f"Reading {part.label}",
        )
    except pyarrow.ArrowException as error:  # columns that Arrow reads and cannot write
        raise RecipeError(f"{part.label}: {first_line(error)}. Fix: list the columns that you need in `columns`.") from error
    problems = list(dataset[_PROBLEM])
    bad = [(row, reason) for row, reason in zip(dataset[_ROW], problems, strict=True) if reason]
    if bad:
        dataset = dataset.select([index for index, reason in enumerate(problems) if not reason])
    return Converted(
        label=part.label,
        dataset=dataset.remove_columns([_ROW, _PROBLEM]),
        read=len(part.dataset),
        bad=bad,
        unused=[column for column in unused if column not in passed_on],
        conversational=conversational,
    )


def find_shape(part: Part, kind: Kind) -> Shape:
    """Return the first shape for `kind` that has all its columns in the part.

    Raises:
        RecipeError: if there is none, or there are no rows.
    """
    if not len(part.dataset):
        raise RecipeError(f"{part.label}: the data have no rows.")
    columns = part.dataset.column_names
    shapes = [shape for form in CONVERTERS[kind] for shape in SHAPES if shape.form == form]
    for shape in shapes:
        if {*shape.columns} <= {*columns}:
            return shape
    wanted = "; ".join(" + ".join(shape.columns) for shape in shapes)
    hint = " To prompt with the texts, set `column_mapping: {text: prompt}`." if kind == "prompt" and "text" in columns else ""
    raise RecipeError(
        f"{part.label}: the columns are {', '.join(columns)}, but a stage on {kind} data needs one of: {wanted}. "
        f"Fix: rename columns with `column_mapping`.{hint}"
    )


def _is_conversational(dataset: Dataset, shape: Shape) -> bool:
    if isinstance(shape.conversational, bool):
        return shape.conversational
    return any(shape.conversational(next(filter(None, dataset[column]), None)) for column in shape.columns)


def _features(kind: Kind, shape: Shape, conversational: bool, used: list[str]) -> dict[str, Any]:
    turns = _MESSAGES if conversational else _TEXT
    features: dict[str, Any] = {_ROW: Value("int64"), _PROBLEM: _TEXT}
    if kind == "ranking":
        return features | {"prompt": turns, "completions": List(turns), "ranks": List(Value("float64"))}
    if kind == "preference":
        margin = {"margin": Value("float64")} if "margin" in used else {}
        return features | {"prompt": turns, "chosen": turns, "rejected": turns} | margin
    if kind == "prompt":
        reference = {"reference": _TEXT} if shape.form in ("completion", "messages") else {}
        return features | {"prompt": turns} | reference
    return features | ({shape.form: turns} if shape.form in ("messages", "text") else {"prompt": turns, "completion": turns})


def _warn_of_ignored_keys(part: Part, used: list[str]) -> None:
    """Warn of keys of messages that are not read, such as a model's reasoning."""
    first = part.dataset.select(range(min(BATCH, len(part.dataset))))
    lists = [value for column in used for value in first[column] if isinstance(value, list)]
    messages = [message for value in lists for message in value if isinstance(message, dict)]
    keys = {key for message in messages if message.keys() & {"role", "from"} for key, value in message.items() if value}
    ignored = keys - {"role", "content", "from", "value", "tool_calls"}
    if ignored:
        logger.warning("%s: these keys of the messages are ignored: %s.", part.label, ", ".join(sorted(ignored)))
