"""Open local files, folders, Hub datasets and Python functions.

A source becomes *parts*, one for each file, so that a row number means a row of that file.
"""

import glob
import gzip
import json
import logging
import pkgutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_recipes.config.data import DatasetSource
from rlhf_recipes.core.errors import RecipeError, did_you_mean, first_line
from rlhf_recipes.core.hub import explain_load_error
from rlhf_recipes.inputs import DATA_ENDINGS, builder_of, is_data_file, is_function, no_data_function, require_data

import pandas
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

SHOWN = 3  # rows or files named in a message
BATCH = 1000  # rows converted or tokenised at once

_TEXT_COLUMNS = ("text", "prompt", "completion", "chosen", "rejected", "instruction", "input", "output", "system", "reference")


class UnknownSplitError(RecipeError):
    """A source without the requested split."""


@dataclass(frozen=True)
class Part:
    """The rows of one file, or of anything else that counts its rows from 1."""

    label: str
    dataset: Dataset


def open_source(source: DatasetSource) -> list[Part]:
    """Open a source as its parts, with `columns` and `column_mapping` applied."""
    return [Part(part.label, _select_columns(part, source).with_format(None)) for part in _open_parts(source)]


def has_splits(path: str) -> bool:
    """Return whether a source can have more than one split; a single file cannot."""
    return not is_data_file(path) and not (Path(path) / "state.json").is_file()


def _open_parts(source: DatasetSource) -> list[Part]:
    path = Path(source.path)
    require_data(source.path)
    if is_data_file(source.path):
        _reject_options(source, "a file", "name", "data_dir", "data_files", "arguments")
        return [_read_file(source.path, source)]
    if path.is_file():
        raise RecipeError(f"{source.path}: unknown file type. Fix: name a file that ends in {DATA_ENDINGS}.")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # of `save_to_disk`
        _reject_options(source, "a saved dataset", "name", "data_dir", "data_files", "arguments")
        return [_read_saved(source)]
    if is_function(source.path):
        _reject_options(source, "a function", "name", "data_dir", "data_files")
        return [_call_function(source)]
    _reject_options(source, "a folder or Hub dataset", "arguments")
    return _read_builder(source)


def _reject_options(source: DatasetSource, what: str, *names: str) -> None:
    """Reject options that a source of this sort would ignore."""
    keys = {"name": "dataset_config (or name)", "arguments": "dataset_arguments (or arguments)"}
    for name in names:
        if getattr(source, name):
            raise RecipeError(f"{source.path}: {keys.get(name, name)}: {what} does not read this key. Fix: remove the key.")


def _read_file(path: str, source: DatasetSource) -> Part:
    """Read one local file; its one split is `train`."""
    if source.split.partition("[")[0] != "train":
        raise UnknownSplitError(f"{path}: split: {source.split}: a file has one split. Fix: set `train`, or a slice of it.")
    try:
        return Part(path, _parse_file(path, source))
    except Exception as error:  # readers of three formats, each with errors of its own
        raise RecipeError(f"{path}: {_explain_read_error(error)}") from error


def _parse_file(path: str, source: DatasetSource) -> Dataset:
    builder, options = builder_of(path), {}
    if builder == "parquet" and path.lower().endswith(".gz"):
        raise ValueError("compressed Parquet cannot be read. Fix: decompress it with `gunzip`.")
    if builder == "csv":  # only an empty cell is empty: "NA" and "007" are texts
        _check_csv(path)
        renamed = (old for old, new in (source.column_mapping or {}).items() if new in _TEXT_COLUMNS)
        options = {"keep_default_na": False, "na_values": [""], "converters": dict.fromkeys([*_TEXT_COLUMNS, *renamed], str)}
    if builder == "json":  # pyarrow names no line, and crashes at a row that is `null`
        for _ in _json_rows(path):
            pass
    dataset = load_dataset(builder, data_files=glob.escape(path), split=source.split, **options)
    if builder == "json" and ": timestamp[" in str(dataset.features.arrow_schema):  # made of texts that look like dates
        dataset = Dataset.from_list(list(_json_rows(path)))
        slices = ReadInstruction.from_spec(source.split).to_absolute({"train": len(dataset)})
        return concatenate_datasets([dataset.select(range(one.from_, one.to)) for one in slices])
    return dataset


def _check_csv(path: str) -> None:
    """Reject files that pandas would read into the wrong columns.

    These have no commas, a column name twice, or a first row longer than the header (pandas takes its first cell for an
    index). Where a later row is longer, pandas raises an error.
    """
    options = {"header": None, "dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    header = pandas.read_csv(path, nrows=1, **options).iloc[0]
    repeated = header[header.duplicated() & (header != "")]  # spreadsheets add columns without a name
    if len(repeated):
        raise ValueError(f"{repeated.iloc[0]}: two columns have this name. Fix: rename one of them.")
    if len(header) == 1 and (separator := next((sign for sign in (";", "\t") if sign in header[0]), None)):
        raise ValueError(f"cells are separated by {separator!r}. Fix: save the file with commas between cells.")
    pandas.read_csv(path, nrows=2, **options)  # raises an error where a row is longer than the first


def _json_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON file, which is one list of rows, or has one row a line."""
    open_text = gzip.open if path.lower().endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        if first.lstrip().startswith("["):
            rows, unit = _parse_json(file.read()), "row"
            if all(isinstance(row, str) for row in rows):  # `datasets` names their column `text`
                rows = [{"text": row} for row in rows]
            numbered = enumerate(rows, 1)
        else:
            unit = "line"
            numbered = ((number, _parse_json(line.rstrip(), number)) for number, line in enumerate(file, 1) if line.strip())
        for number, row in numbered:
            if not isinstance(row, dict):
                raise ValueError(f"{unit} {number}: {str(row)[:40]}: not a row. Fix: write a mapping of columns to values.")
            yield row


def _parse_json(text: str, line: int = 1) -> Any:
    """Parse text that begins at line `line` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{place}: not valid JSON ({error.msg}). Fix: correct the line.") from None


def _explain_read_error(error: Exception) -> str:
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        return f"not UTF-8 text ({cause}). Fix: save it as UTF-8."
    if isinstance(cause, StopIteration | pandas.errors.EmptyDataError) or "corresponds to no data" in str(cause):
        return "the file has no rows."
    if isinstance(cause, pandas.errors.ParserError):
        return f"{first_line(cause)}. Fix: quote cells that hold a comma, a line break or (doubled) quotation marks."
    return first_line(cause)


def _read_saved(source: DatasetSource) -> Part:
    try:
        saved = load_from_disk(source.path)
    except Exception as error:  # Arrow, JSON and file system errors
        raise RecipeError(f"{source.path}: the saved dataset cannot be read: {first_line(error)}") from error
    if not isinstance(saved, DatasetDict):
        return Part(source.path, saved)
    if source.split not in saved:
        raise UnknownSplitError(f"{source.path}: split: {source.split}: unknown. Fix: set one of {', '.join(saved)}.")
    return Part(f"{source.path} [{source.split}]", saved[source.split])


def _call_function(source: DatasetSource) -> Part:
    try:
        function = pkgutil.resolve_name(source.path)
    except (ImportError, AttributeError) as error:
        raise no_data_function(source.path, error) from error
    arguments = source.arguments or {}
    try:
        dataset = function(split=source.split, **arguments)
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{source.path}: failed for split `{source.split}` and arguments {arguments}: {error}") from error
    if not isinstance(dataset, Dataset):
        raise RecipeError(f"{source.path}: returned a {type(dataset).__name__}. Fix: return a `datasets.Dataset`.")
    return Part(f"{source.path} [{source.split}]", dataset)


def _read_builder(source: DatasetSource) -> list[Part]:
    """Read a folder, `path: json` with `data_files`, or a Hub dataset."""
    options = {"path": source.path, "name": source.name, "data_dir": source.data_dir, "data_files": source.data_files}
    split, bracket, slice_ = source.split.partition("[")
    try:
        data_files = load_dataset_builder(**options).config.data_files or {}
        files = {str(split): list(paths) for split, paths in data_files.items()}
        paths = files.get(split, [])
        # A slice of several files counts the rows of all of them
        if paths and (not bracket or len(paths) == 1) and all(is_data_file(path) and Path(path).is_file() for path in paths):
            if not source.data_files:
                _warn_of_ignored_files(Path(source.path, source.data_dir or ""), files)
            return [_read_file(path, replace(source, split=f"train{bracket}{slice_}")) for path in paths]
        return [Part(f"{source.path} [{source.split}]", load_dataset(**options, split=source.split))]
    except RecipeError:
        raise
    except Exception as error:  # the Hub client and the builders raise a dozen unrelated types
        if "nknown split" in str(error):
            raise UnknownSplitError(f"{source.path}: split: {source.split}: {first_line(error)}") from error
        if Path(source.path).exists() or source.data_files:
            raise RecipeError(f"{source.path}: no data can be read: {first_line(error.__cause__ or error)}") from error
        reason = explain_load_error(source.path, error, "dataset")
        where = f"not a local file or folder in {Path.cwd()}, and not loaded from the Hub"
        raise RecipeError(f"{source.path}: {where}: {reason}") from error


def _warn_of_ignored_files(folder: Path, files: dict[str, list[str]]) -> None:
    """Warn of files that `datasets` ignores: it reads a folder's commonest format."""
    used = {Path(path).resolve() for paths in files.values() for path in paths}
    ignored = [path.name for path in sorted(folder.rglob("*")) if is_data_file(path.name) and path.resolve() not in used]
    if ignored:
        logger.warning(
            "%s: %d files of another format are ignored: %s. To read them, list them in `datasets`.",
            folder,
            len(ignored),
            ", ".join(ignored[:SHOWN]),
        )


def _select_columns(part: Part, source: DatasetSource) -> Dataset:
    dataset, mapping = part.dataset, source.column_mapping or {}
    if source.columns:
        _require_columns(part.label, dataset, source.columns, "columns")
        dataset = dataset.select_columns(source.columns)
    _require_columns(part.label, dataset, list(mapping), "column_mapping")
    names = Counter(mapping.get(column, column) for column in dataset.column_names)
    name, count = names.most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise RecipeError(f"{part.label}: column_mapping: two columns would be `{name}`. Fix: map the other one away.")
    return dataset.rename_columns(mapping)


def _require_columns(label: str, dataset: Dataset, wanted: list[str], key: str) -> None:
    columns = dataset.column_names
    for column in wanted:
        if column not in columns:
            known = f"the columns are {', '.join(columns)}{did_you_mean(column, columns)}"
            raise RecipeError(f"{label}: {key}: {column}: unknown column; {known}")
