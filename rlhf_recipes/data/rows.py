"""The rows of a part, converted to what a stage trains on."""

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.data.conversion import CONVERTERS, Kind
from rlhf_recipes.data.shapes import SHAPES, BadRowError, Row, Shape, add_system, is_list_as_text, is_transcript, parse_lists
from rlhf_recipes.data.sources import BATCH, SHOWN, Part

import pyarrow
from datasets import Dataset, Features, Json, List, Value
from datasets.fingerprint import Hasher

logger = logging.getLogger(__name__)

# Among prompts, TRL overwrites these columns, leaves them out, or takes them for pictures
_TRL_COLUMNS = ("prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_TRL_COLUMNS += ("image", "images")
_CONTEXT_COLUMNS = ("system", "history", "tools")  # for the model; reward functions alone would get them

_PROBLEM, _ROW = "__problem__", "__row__"  # columns during the conversion
_ORIGIN = ("id", "sources", "labeller")  # where a row is from, as recipes/rank.py writes it
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
    if shape.form == "text" and _is_list_as_text(part.dataset, "text"):
        raise RecipeError(
            f"{part.label}: text: lists of messages written as text. Fix: set `column_mapping: {{text: messages}}`."
        )
    read = [column for column in columns if column in shape.columns + shape.optional]
    texts = {column for column in read if _is_list_as_text(part.dataset, column)}
    conversational = _is_conversational(part.dataset, shape, texts)
    reads_system = conversational and "system" in columns and "system" not in read
    used = [*read, "system"] if reads_system else read
    unused = [column for column in columns if column not in used]
    passed_on = [column for column in unused if column != "prompt"] if kind == "prompt" else []  # to the reward functions
    if reserved := [column for column in passed_on if column in _TRL_COLUMNS]:
        raise RecipeError(
            f"{part.label}: {reserved[0]}: TRL reads this column of prompts in a way of its own. Fix: rename it with "
            "`column_mapping`, or list the columns that you need in `columns`."
        )
    _warn_of_unread_columns(part, [column for column in unused if column not in passed_on or column in _CONTEXT_COLUMNS])
    _warn_of_ignored_keys(part, used, texts)
    if not conversational:
        _warn_of_conversations(part, [column for column in read if column not in texts])
    features = _features(kind, shape, conversational, used) | {column: part.dataset.features[column] for column in passed_on}

    def read_row(values: Row) -> list[Row]:
        values |= {name: parse_lists(values[name], name, name) for name in texts}
        system = values.pop("system") if reads_system else None
        return CONVERTERS[kind][shape.form](add_system(shape.read(values, conversational), system))

    def convert_batch(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        rows = []
        for place, index in enumerate(indices):
            kept = {column: batch[column][place] for column in passed_on} | {_ROW: index + 1}
            try:
                rows += [converted | kept for converted in read_row({name: batch[name][place] for name in used})]
            except BadRowError as problem:
                rows.append({_PROBLEM: str(problem), _ROW: index + 1})
        return {column: [row.get(column) for row in rows] for column in features}

    try:
        dataset = part.dataset.map(
            convert_batch,
            batched=True,
            batch_size=BATCH,
            with_indices=True,
            remove_columns=columns,
            features=Features(features),
            new_fingerprint=Hasher.hash((part.dataset._fingerprint, kind, shape.columns, conversational, sorted(texts), _CODE)),
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
    """Return the first shape for `kind` whose columns half of the rows have.

    Raises:
        RecipeError: if there is none, or there are no rows.
    """
    if not len(part.dataset):
        raise RecipeError(f"{part.label}: the data have no rows.")
    columns = part.dataset.column_names
    shapes = [shape for form in CONVERTERS[kind] for shape in SHAPES if shape.form == form]
    fitting = [shape for shape in shapes if {*shape.columns} <= {*columns}]
    filled = (shape for shape in fitting if len(fitting) == 1 or _is_filled(part.dataset, shape.columns))
    if fitting:
        return next(filled, fitting[0])
    wanted = "; ".join(" + ".join(shape.columns) for shape in shapes)
    hint = " To prompt with the texts, set `column_mapping: {text: prompt}`." if kind == "prompt" and "text" in columns else ""
    raise RecipeError(
        f"{part.label}: the columns are {', '.join(columns)}, but a stage on {kind} data needs one of: {wanted}. "
        f"Fix: rename columns with `column_mapping`.{hint}"
    )


def reject_bad_rows(bad: list[tuple[str, str]], read: int, bad_rows: str, split: str) -> None:
    """Stop with, or log, the bad ones of `read` rows; stop where no row is left.

    Each of `bad` has a name of the row, and why it cannot be used.
    """
    first = "; ".join(f"{row}: {reason}" for row, reason in bad[:SHOWN])
    counts = ", ".join(f"{count} {reason}" for reason, count in Counter(reason for _, reason in bad).most_common())
    summary = f"{len(bad)} of {read} rows of the {split} data ({counts})"
    if len(bad) == read:
        raise RecipeError(f"No rows are left: {summary} cannot be used. {first}" if bad else f"The {split} data have no rows.")
    if bad and bad_rows == "error":
        raise RecipeError(
            f"{summary} cannot be used. {first}. Fix: correct them, or set `bad_rows: drop` to drop and count them."
        )
    if bad:
        logger.warning("Dropped %s: %s%s", summary, first, "; ..." if len(bad) > SHOWN else "")


def _is_filled(dataset: Dataset, columns: Sequence[str]) -> bool:
    """Return whether half of the rows have all of the columns."""
    return _mostly(map(all, zip(*(dataset[column] for column in columns), strict=True)))


def _mostly(tests: Iterable[bool]) -> bool:
    """Return whether half of the tests succeed; the first rows alone may be odd ones."""
    tests = list(tests)
    return bool(tests) and sum(tests) * 2 >= len(tests)


def _values(dataset: Dataset, column: str) -> Iterator[Any]:
    """Yield the values of a column that are not empty; of a column of lists the first."""
    values = filter(None, dataset[column])
    return values if isinstance(dataset.features[column], Value | Json) else itertools.islice(values, 1)


def _is_list_as_text(dataset: Dataset, column: str) -> bool:
    return _mostly(is_list_as_text(value, column) for value in _values(dataset, column))


def _parsed(values: Iterable[Any], column: str, texts: set[str]) -> Iterator[Any]:
    """Yield the values of a column, parsed if in `texts`, and if they can be."""
    for value in values:
        with contextlib.suppress(BadRowError):
            yield parse_lists(value, column, column) if column in texts else value


def _is_conversational(dataset: Dataset, shape: Shape, texts: set[str]) -> bool:
    if isinstance(shape.conversational, bool):
        return shape.conversational
    values = (_parsed(_values(dataset, column), column, texts) for column in shape.columns)
    return any(_mostly(map(shape.conversational, column)) for column in values)


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


def _warn_of_unread_columns(part: Part, columns: list[str]) -> None:
    first = part.dataset.take(BATCH)
    columns = [column for column in columns if column not in _ORIGIN]
    filled = [column for column in columns if any(value not in (None, "", [], {}) for value in first[column])]
    if filled:
        logger.warning("%s: these columns are not read: %s.", part.label, ", ".join(filled))


def _warn_of_conversations(part: Part, columns: list[str]) -> None:
    """Warn of rows in another form than most."""
    for column in columns:
        values = list(_values(part.dataset, column))
        odd = sum(is_transcript(value) or is_list_as_text(value, column) for value in values)
        if odd:
            logger.warning(
                "%s: %d of %d values of `%s` look like conversations, and are read as plain text.",
                part.label,
                odd,
                len(values),
                column,
            )


def _warn_of_ignored_keys(part: Part, used: list[str], texts: set[str]) -> None:
    """Warn of keys of messages that are not read, such as a model's reasoning."""
    first = part.dataset.take(BATCH)
    lists = [value for column in used for value in _parsed(first[column], column, texts) if isinstance(value, list)]
    messages = [message for value in lists for message in value if isinstance(message, dict)]
    keys = {key for message in messages if message.keys() & {"role", "from"} for key, value in message.items() if value}
    ignored = keys - {"role", "content", "from", "value", "tool_calls"}
    if ignored:
        logger.warning("%s: these keys of the messages are ignored: %s.", part.label, ", ".join(sorted(ignored)))
