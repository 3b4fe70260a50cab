"""Opening what a YAML file names: as *parts*, one a file, so that a row number means a row of that file."""

import csv
import glob
import gzip
import inspect
import json
import logging
import math
import pkgutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.core.errors import RecipeError, did_you_mean, first_line
from rlhf_recipes.core.hub import explain_load_error
from rlhf_recipes.data.shapes import SHOWN

import pyarrow.parquet
from datasets import (
    Dataset,
    DatasetDict,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)

logger = logging.getLogger(__name__)

_TEXT_COLUMNS = ("text", "prompt", "completion", "chosen", "rejected", "instruction", "input", "output")
_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


class UnknownSplitError(RecipeError):
    """A source without the split that was asked for."""


class _BadFileError(Exception):
    """Why a file cannot be read, in a sentence."""


@dataclass(frozen=True)
class Part:
    """Rows of one file, or of another thing that counts its rows from 1."""

    label: str
    dataset: Dataset


def open_source(source: DatasetSource) -> list[Part]:
    """Open a source as its parts, with `columns` and `column_mapping` applied."""
    return [Part(part.label, _name_columns(part, source).with_format(None)) for part in _read_parts(source)]


def _read_parts(source: DatasetSource) -> list[Part]:
    path = Path(source.path)
    if _format(source.path):
        _refuse_unused(source, "a file", "name", "data_dir", "data_files", "arguments")
        return [_read_file(source.path, source)]
    if path.is_file():
        raise RecipeError(f"{source.path}: a file must end in {', '.join(_FORMATS)}, or one of them and .gz")
    if _is_saved(path):
        _refuse_unused(source, "a saved dataset", "name", "data_dir", "data_files", "arguments")
        return [_read_saved(source)]
    if not path.exists() and "." in source.path and all(name.isidentifier() for name in source.path.split(".")):
        _refuse_unused(source, "a function", "name", "data_dir", "data_files")
        return [_call_function(source)]
    _refuse_unused(source, "a folder or Hub dataset", "arguments")
    return _read_builder(source)


def _refuse_unused(source: DatasetSource, what: str, *names: str) -> None:
    """Refuses options that a source of this sort would not read."""
    for name in names:
        if getattr(source, name):
            keys = {"name": "name` or `dataset_config", "arguments": "arguments` or `dataset_arguments"}
            raise RecipeError(
                f"{source.path} is {what}, which has no use for `{keys.get(name, name)}`: remove it (or set null)"
            )


def _format(path: str) -> str | None:
    """The builder of `datasets` that reads a file of this ending, or None."""
    return _FORMATS.get(Path(path.lower().removesuffix(".gz")).suffix)


def _split_name(split: str) -> str:
    """`train` of `train[:100]`."""
    return split.partition("[")[0]


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote this directory."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def has_splits(path: str) -> bool:
    """Whether a source can have more than one split; a single file cannot."""
    return not _format(path) and not (Path(path) / "state.json").is_file()


def is_file(path: str) -> bool:
    """Whether a source is a single file, by its name."""
    return _format(path) is not None


def require_file(path: str) -> None:
    """Refuses a source whose name is that of a file, where there is none."""
    if _format(path) and not Path(path).is_file():
        raise RecipeError(f"{path}: there is no such file (looked in {Path(path).absolute().parent}).")


def _read_file(path: str, source: DatasetSource) -> Part:
    """Read one local file. Its one split is `train`, and `train[:100]` cuts it as `datasets` does."""
    require_file(path)
    if _split_name(source.split) != "train":
        raise UnknownSplitError(f"{path} has no split `{source.split}`: a file is one split, `train`, or a slice of it")
    if not Path(path).stat().st_size:
        raise RecipeError(f"{path}: the file is empty.")
    try:
        dataset = _parse_file(path, source.split, source.column_mapping or {})
    except Exception as error:  # readers of three formats, each with errors of its own
        raise RecipeError(f"{path}: {_why_unreadable(error)}") from error
    return Part(path, dataset)


def _parse_file(path: str, split: str, mapping: dict[str, str]) -> Dataset:
    builder = _format(path)
    if builder == "parquet" and path.lower().endswith(".gz"):  # the one format that `datasets` does not unpack
        with gzip.open(path) as file:
            return Dataset(pyarrow.parquet.read_table(file))
    options = {}
    if builder == "csv":  # only an empty cell is empty: "NA" and "007" are texts
        _check_csv(path)
        texts = [*_TEXT_COLUMNS, *(old for old, new in mapping.items() if new in _TEXT_COLUMNS)]
        options = {"keep_default_na": False, "na_values": [""], "converters": dict.fromkeys(texts, str)}
    if builder == "json":  # before the readers behind `datasets`, which crash at `null`, and drop what they cannot decode
        for _ in _json_rows(path):
            pass
    dataset = load_dataset(builder, data_files=glob.escape(path), split=split, **options)
    if builder == "json" and ": timestamp[" in str(dataset.features.arrow_schema):
        # Texts that all look like dates: what would be made of them is not what was written
        dataset = Dataset.from_list(list(_json_rows(path)))
        slices = ReadInstruction.from_spec(split).to_absolute({"train": len(dataset)})
        return concatenate_datasets([dataset.select(range(one.from_, one.to)) for one in slices])
    return dataset


def _why_unreadable(error: Exception) -> str:
    if isinstance(error, _BadFileError):
        return str(error)
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        return f"it is not UTF-8 text: {cause}: save it as UTF-8"
    if isinstance(cause, StopIteration) or "corresponds to no data" in str(cause):
        return "the file has no rows."
    cells = ". Cells are separated by commas; one that holds a comma, a line break or quotation marks (doubled) is quoted"
    return f"it cannot be read: {first_line(cause)}{cells if 'tokenizing' in str(cause) else ''}"


def _opened(path: str, newline: str) -> TextIO:
    """A text file, packed or not."""
    options = {"encoding": "utf-8-sig", "newline": newline}
    return gzip.open(path, "rt", **options) if path.lower().endswith(".gz") else open(path, **options)


def _check_csv(path: str) -> None:
    """Refuses what pandas would read into the wrong columns: no commas, longer rows than the header, a name twice.

    It looks at the first row only: where a later one is longer, pandas says so.
    """
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with _opened(path, "") as file:
            rows = (row for row in csv.reader(file) if row)
            header, first = next(rows, []), next(rows, [])
    finally:
        csv.field_size_limit(limit)
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:  # spreadsheets add empty ones
        raise _BadFileError(f"the header names the column `{twice[0]}` twice: rename one of them.")
    if len(header) == 1 and (other := next((sign for sign in (";", "\t") if sign in header[0]), None)):
        raise _BadFileError(f"the header has no comma, and {other!r} between its names: save it with commas between cells.")
    if len(first) > len(header):
        raise _BadFileError(
            f"row 1 has {len(first)} cells, and the header names {len(header)} columns: quote cells that hold a comma."
        )


def _json_rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a file with a JSON mapping on each line, or a list of them."""
    with _opened(path, "\n") as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        if first.lstrip().startswith("["):
            text = file.read()
            rows, escaped = _parsed(text), "\\u" in text
            texts = all(isinstance(row, str) for row in rows)  # which `datasets` calls `text`
            for number, row in enumerate(rows, 1):
                yield _row({"text": row} if texts else row, escaped, f"row {number}")
        else:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _row(_parsed(line, number), "\\u" in line, f"line {number}")


def _parsed(text: str, line: int | None = None) -> Any:
    """What a text is in JSON; `line` is its number in the file, where it is one line of it."""
    try:
        return json.loads(text, object_pairs_hook=_without_repetition, parse_float=_finite)
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno}"
        raise _BadFileError(f"{place} is not valid JSON: {error.msg} at column {error.colno}.") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, and what is nested as deep
        raise _BadFileError(f"{f'line {line}' if line else 'it'} cannot be read as JSON: {first_line(error)}.") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key '{twice}' stands twice in one mapping")
    return content


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _row(row: Any, escaped: bool, place: str) -> dict[str, Any]:
    """A row, if it is one; `escaped` is whether letters may be written as their numbers, and so as half of one."""
    if not isinstance(row, dict):
        raise _BadFileError(f"{place} is no row: expected a mapping of columns to values, found {json.dumps(row)[:40]}.")
    try:
        if escaped:  # otherwise the file's decoding would have refused it
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        letter = error.object[error.start]
        raise _BadFileError(f"{place} has the letter {letter!r}, half of a pair, which no text can hold.") from error
    return row


def _read_saved(source: DatasetSource) -> Part:
    try:
        saved = load_from_disk(source.path)
    except Exception as error:  # Arrow, JSON and file system errors
        raise RecipeError(f"{source.path}: the saved dataset cannot be read: {first_line(error)}") from error
    if not isinstance(saved, DatasetDict):
        return Part(source.path, saved)
    if source.split not in saved:
        raise UnknownSplitError(f"{source.path} has no split `{source.split}`; it has: {', '.join(saved)}")
    return Part(f"{source.path} [{source.split}]", saved[source.split])


def _call_function(source: DatasetSource) -> Part:
    arguments = source.arguments or {}
    try:
        function = pkgutil.resolve_name(source.path)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"{source.path} is neither a file that ends in {', '.join(_FORMATS)} (.gz), nor a directory, nor a Python "
            f"function: {error}. Correct it, or put the function's folder on PYTHONPATH."
        ) from error
    if not callable(function):
        raise RecipeError(f"{source.path} is not a function.")
    try:
        inspect.signature(function).bind(split=source.split, **arguments)
    except TypeError as error:
        raise RecipeError(
            f"{source.path} cannot be called with `split` and the arguments {sorted(arguments)}: {error}. "
            f"Its signature is {inspect.signature(function)}."
        ) from error
    try:
        dataset = function(split=source.split, **arguments)
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{source.path} failed for split `{source.split}` and {arguments}: {error}") from error
    if not isinstance(dataset, Dataset):
        raise RecipeError(f"{source.path} returned {type(dataset).__name__}, not a `datasets.Dataset`.")
    return Part(f"{source.path} [{source.split}]", dataset)


def _read_builder(source: DatasetSource) -> list[Part]:
    """Read a directory, `path: json` with `data_files`, or a Hub dataset; local files one by one."""
    options = {"path": source.path, "name": source.name, "data_dir": source.data_dir, "data_files": source.data_files}
    try:
        data_files = load_dataset_builder(**options).config.data_files or {}
        files = {str(split): list(paths) for split, paths in data_files.items()}
        paths, whole = files.get(_split_name(source.split), []), "[" not in source.split
        if paths and (whole or len(paths) == 1) and all(_format(path) and Path(path).is_file() for path in paths):
            if not source.data_files:
                _warn_of_ignored_files(Path(source.path, source.data_dir or ""), files)
            within = "train" + source.split.removeprefix(_split_name(source.split))
            return [_read_file(path, replace(source, split=within)) for path in paths]
        return [Part(f"{source.path} [{source.split}]", load_dataset(**options, split=source.split))]
    except RecipeError:
        raise
    except Exception as error:  # the Hub client and the builders raise a dozen unrelated types
        if "nknown split" in str(error):
            raise UnknownSplitError(f"{source.path} has no split `{source.split}`: {first_line(error)}") from error
        raise RecipeError(_why_not_found(source, error)) from error


def _why_not_found(source: DatasetSource, error: Exception) -> str:
    if Path(source.path).exists() or source.data_files:
        return f"{source.path}: no data could be read from it: {first_line(error.__cause__ or error)}"
    return (
        f"{source.path} is not a local file or directory (looked in {Path.cwd()}), and as a Hub dataset it could not be "
        f"loaded: {explain_load_error(source.path, error, 'dataset')}"
    )


def _warn_of_ignored_files(directory: Path, files: dict[str, list[str]]) -> None:
    """`datasets` reads the most frequent file type of a directory and ignores the others."""
    used = {Path(path).resolve() for paths in files.values() for path in paths}
    found = (path for path in sorted(directory.rglob("*")) if _format(path.name))
    ignored = [path.name for path in found if path.resolve() not in used]
    if ignored:
        logger.warning(
            "%s: %d files of another format are not read (one format a folder; or list them in `datasets`): %s",
            directory,
            len(ignored),
            ", ".join(ignored[:SHOWN]),
        )


def _name_columns(part: Part, source: DatasetSource) -> Dataset:
    dataset, mapping = part.dataset, source.column_mapping or {}
    _require_columns(part, source.columns or [], "columns")
    if source.columns:
        dataset = dataset.select_columns(source.columns)
    _require_columns(Part(part.label, dataset), list(mapping), "column_mapping")
    names = Counter(mapping.get(column, column) for column in dataset.column_names)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise RecipeError(f"{part.label}: `column_mapping` would name two columns `{twice[0]}`. Map the other one away.")
    return dataset.rename_columns(mapping)


def _require_columns(part: Part, wanted: list[str], key: str) -> None:
    columns = part.dataset.column_names
    for column in wanted:
        if column not in columns:
            known = f"the columns are: {', '.join(columns)}{did_you_mean(column, columns)}"
            raise RecipeError(f"{part.label}: `{key}` names `{column}`, but {known}")
