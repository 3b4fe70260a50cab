"""From sources to the training and the evaluation rows of a stage."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.config.data import DataArguments, DatasetSource
from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.data.lengths import check_lengths, drop_overlong_mode
from rlhf_recipes.data.rows import Converted, convert, shape_of
from rlhf_recipes.data.shapes import SHOWN, Kind
from rlhf_recipes.data.sources import Part, UnknownSplitError, has_splits, is_file, open_source, require_file

from datasets import Dataset, Features, concatenate_datasets
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """The data of a stage, in the columns that `Kind` gives.

    Parameters:
        train: the rows to train on.
        eval: the rows to evaluate on, or None where none were asked for.
        report: per split the number of rows, what was read, what was dropped and why; JSON-serialisable, for `recipe.json`.
    """

    train: Dataset
    eval: Dataset | None
    report: dict[str, Any]

    def filter_by_length(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, long_rows: str) -> "Data":
        """The same data after `check_lengths` of both splits, whose counts join the report."""
        report = {split: dict(counts) for split, counts in self.report.items()}
        fitted: dict[str, Dataset | None] = {"train": self.train, "eval": self.eval}
        for split, dataset in fitted.items():
            if dataset is not None:
                fitted[split], counts = check_lengths(dataset, tokenizer, max_length, long_rows, split)
                report[split] |= {"rows": counts.pop("rows"), "longer_than_max_length": counts}
        return Data(**fitted, report=report)


def load_data(arguments: DataArguments, kind: Kind, *, evaluate: bool, seed: int) -> Data:
    """Load, check and convert what a YAML file names.

    Rows that cannot be used stop the run, or are dropped, counted and logged (`bad_rows: drop`). Evaluation data are, in this
    order: `eval_datasets`; the rows that `test_split_size` sets aside (whole prompts, in pairs and rankings, so that none is on
    both sides); the split `dataset_test_split` of `dataset_name`.

    Args:
        arguments: the data section of the YAML file.
        kind: what the stage trains on.
        evaluate: whether the stage needs evaluation data.
        seed: draws the rows that `test_split_size` sets aside.

    Raises:
        RecipeError: nothing to load, a file that cannot be read, columns that do not fit the stage, bad rows, no rows left, or
            no evaluation data where they are needed.
    """
    train, report = _load_split(_train_sources(arguments), kind, arguments.bad_rows, "train")
    reports = {"train": report | {"conversational": is_conversational(train[0])}}
    held_out = None
    if arguments.test_split_size is not None:
        train, held_out = _hold_out(train, kind, arguments.test_split_size, seed)
        reports["train"]["rows"] = len(train)
        reports["eval"] = {"rows": len(held_out), "test_split_size": arguments.test_split_size, "seed": seed}
    elif evaluate:
        held_out, reports["eval"] = _load_eval(arguments, kind)
    return Data(train=train, eval=held_out, report=reports)


def load_demonstrations(
    arguments: DataArguments,
    sources: list[DatasetSource],
    seed: int,
    held_out: Dataset | None = None,
    rows: int = 1000,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
) -> tuple[Dataset, dict[str, Any]]:
    """Demonstrations to scale rewards by: at most `rows`, drawn with `seed`, as `prompt` and `completion`; and their counts.

    Args:
        arguments: the data section of a stage on comparisons; of it come, without `sources`, the best answers.
        sources: demonstrations, in any shape that SFT reads except `text`.
        seed: draws the rows.
        held_out: rows to measure on, whose prompts are left out.
        rows: how many at the most; of those that are drawn, some may be too long.
        tokenizer: of the run; without it no lengths are looked at.
        max_length: in tokens; longer ones are left out, as the stage does not train on such either.

    Raises:
        RecipeError: as `load_data`; for plain text, in which no answer begins; for long ones under `long_rows: error`; and for
            less than two demonstrations.
    """
    long_rows = drop_overlong_mode(arguments.long_rows)
    if sources:
        arguments = DataArguments(datasets=sources, bad_rows=arguments.bad_rows)
    dataset, _ = _load_split(_train_sources(arguments), "sft", arguments.bad_rows, "demonstration")
    if "text" in dataset.column_names:
        raise RecipeError("`demonstrations`: plain text has no answers to score: name data with `prompt` and `completion`")
    if "messages" in dataset.column_names:
        dataset = dataset.map(
            lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns=["messages"]
        )
    kept_apart = {repr(prompt) for prompt in held_out["prompt"]} if held_out is not None else set()
    usable = [row for row, prompt in enumerate(dataset["prompt"]) if repr(prompt) not in kept_apart]
    dataset = dataset.select(usable).shuffle(seed=seed)
    dataset, report = dataset.select(range(min(rows, len(dataset)))), {}
    if tokenizer is not None and len(dataset):
        dataset, report = check_lengths(dataset, tokenizer, max_length, long_rows, "demonstrations")
        del report["rows"]
    if len(dataset) < 2:
        raise RecipeError(
            f"`demonstrations`: {len(dataset)} of them have no standard deviation: name more (those to held-out prompts and "
            "those longer than `max_length` are left out)"
        )
    return dataset, {"rows": len(dataset), "longer_than_max_length": report}


def load_texts(sources: list[DatasetSource], bad_rows: str) -> Dataset:
    """Pretraining text, in the column `text`.

    Raises:
        RecipeError: as `load_data`; without a source, or for data in another shape.
    """
    if not sources:
        raise RecipeError("`ptx_coef`: name the pretraining text, with a column `text`, in `ptx_dataset`")
    dataset, _ = _load_split(sources, "sft", bad_rows, "pretraining text")
    if "text" not in dataset.column_names:
        raise RecipeError("`ptx_dataset`: these are conversations or answers, and pretraining text is in a column `text`")
    return dataset


def _train_sources(arguments: DataArguments) -> list[DatasetSource]:
    if not arguments.dataset_name and not arguments.datasets:
        raise RecipeError("Set either `dataset_name` or `datasets`: neither is set.")
    if arguments.datasets:
        return arguments.datasets
    return [_named_source(arguments, arguments.dataset_train_split)]


def check_source(source: DatasetSource, kind: Kind | None) -> None:
    """Reads a local file, so that what is wrong with it is found before anything is trained; what is none is left alone.

    Args:
        source: of the data.
        kind: what a stage makes of it; None: only look whether it is there.

    Raises:
        RecipeError: if it is missing or cannot be read, has no rows, or none of the columns that are needed.
    """
    require_file(source.path)
    if kind and is_file(source.path):
        for part in open_source(source):
            shape_of(part, kind)


def _named_source(arguments: DataArguments, split: str) -> DatasetSource:
    return DatasetSource(
        path=arguments.dataset_name,
        name=arguments.dataset_config,
        split=split,
        column_mapping=arguments.column_mapping,
        arguments=arguments.dataset_arguments,
    )


def _load_eval(arguments: DataArguments, kind: Kind) -> tuple[Dataset, dict[str, Any]]:
    """Load what there is to evaluate on; an error with the remedies where there is nothing."""
    if arguments.eval_datasets:
        return _load_split(arguments.eval_datasets, kind, arguments.bad_rows, "eval")
    reason = "`datasets` names training data only"
    if arguments.dataset_name:
        reason = f"{arguments.dataset_name} has no splits"
        if has_splits(arguments.dataset_name):
            try:
                source = _named_source(arguments, arguments.dataset_test_split)
                return _load_split([source], kind, arguments.bad_rows, "eval")
            except UnknownSplitError as error:
                reason = str(error).removesuffix(".")
    raise RecipeError(
        f"There is nothing to evaluate on: {reason}. Set `dataset_test_split` to a split that exists, list `eval_datasets`, "
        'set `test_split_size` (0.1 sets a tenth of the training rows aside), or set `eval_strategy: "no"`.'
    )


def _hold_out(dataset: Dataset, kind: Kind, size: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off `size` rows (a share below 1, else a number); of pairs and rankings whole prompts, against leaks."""
    if size >= 1 and size != int(size):
        raise RecipeError(f"`test_split_size: {size}`: set a share below 1, or a whole number of rows")
    size = int(size) if size >= 1 else size
    rows: dict[Any, list[int]] = {}
    prompts = map(repr, dataset["prompt"]) if kind in ("preference", "ranking") else range(len(dataset))
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    try:
        groups = Dataset.from_dict({"rows": list(rows.values())}).train_test_split(test_size=size, seed=seed)
    except ValueError as error:
        unit = "different prompts" if kind in ("preference", "ranking") else "rows"
        raise RecipeError(f"`test_split_size: {size}` does not fit {len(rows)} {unit} of training data: {error}") from error
    train, test = (dataset.select(list(itertools.chain(*groups[part]["rows"]))) for part in ("train", "test"))
    return train, test


def _load_split(sources: list[DatasetSource], kind: Kind, bad_rows: str, split: str) -> tuple[Dataset, dict[str, Any]]:
    parts = [convert(part, kind) for part in _mix(sources)]
    _report_bad_rows(parts, bad_rows, split)
    dataset = _join(parts, kind, split)
    dropped = Counter(reason for part in parts for _, reason in part.bad)
    return dataset, {
        "rows": len(dataset),
        "read": sum(part.read for part in parts),
        "dropped": dict(dropped),
        "sources": [part.report() for part in parts],
    }


def _mix(sources: list[DatasetSource]) -> list[Part]:
    """Open all sources, and of each take its `fraction` of the mixture: its first rows, as `trl.get_dataset` does."""
    opened = [open_source(source) for source in sources]
    fractions = [source.fraction for source in sources]
    if all(fraction is None for fraction in fractions):
        return [part for parts in opened for part in parts]
    if any(fraction is None or fraction < 0 for fraction in fractions) or not sum(fractions):
        raise RecipeError(f"Set a positive `fraction` for every source of a mixture, or for none: got {fractions}.")
    weights = [fraction / sum(fractions) for fraction in fractions]
    sizes = [sum(len(part.dataset) for part in parts) for parts in opened]
    total = min(size / weight for size, weight in zip(sizes, weights, strict=True) if weight)
    return [part for parts, weight in zip(opened, weights, strict=True) for part in _first_rows(parts, round(weight * total))]


def _first_rows(parts: list[Part], count: int) -> Iterator[Part]:
    for part in parts:
        taken = min(count, len(part.dataset))
        count -= taken
        if taken:
            yield Part(part.label, part.dataset.select(range(taken)))


def _report_bad_rows(parts: list[Converted], bad_rows: str, split: str) -> None:
    """Stop with, or log, the rows that cannot be used; stop where no row is left."""
    bad = [(part.label, row, reason) for part in parts for row, reason in part.bad]
    read = sum(part.read for part in parts)
    first = "; ".join(f"{label}, row {row}: {reason}" for label, row, reason in bad[:SHOWN])
    summary = f"{len(bad)} of {read} rows of the {split} data ({_counts(reason for *_, reason in bad)})"
    if not any(len(part.dataset) for part in parts):
        raise RecipeError(f"No rows are left: {summary} cannot be used. {first}" if bad else f"The {split} data have no rows.")
    if bad and bad_rows == "error":
        raise RecipeError(f"{summary} cannot be used. {first}. Correct them, or set `bad_rows: drop` to drop and count them.")
    if bad:
        logger.warning("Dropped %s: %s%s", summary, first, "; ..." if len(bad) > SHOWN else "")


def _counts(reasons: Iterator[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())


def _join(parts: list[Converted], kind: Kind, split: str) -> Dataset:
    parts = [part for part in parts if len(part.dataset)]
    talks = {part.conversational: part.label for part in parts}
    if len(talks) == 2:
        raise RecipeError(
            f"The {split} data mix conversations ({talks[True]}) and plain text ({talks[False]}). Give both the same form: "
            "lists of messages, or strings."
        )
    tables = [part.dataset for part in parts]
    if len({tuple(table.column_names) for table in tables}) > 1 and kind != "prompt":
        tables = _same_columns(tables, kind, split)
    try:
        return concatenate_datasets(tables)
    except ValueError as error:
        raise RecipeError(
            f"The {split} data cannot be joined ({', '.join(part.label for part in parts)}): {first_line(error)} Give the "
            "column one type in all of them, or rename one with `column_mapping`."
        ) from error


def _same_columns(tables: list[Dataset], kind: Kind, split: str) -> list[Dataset]:
    """Bring the parts of a mixture to the columns that all can have; what this costs is logged."""
    if kind == "preference":
        logger.warning("The margins of the %s data are not used: not all sources have them.", split)
        return [table.select_columns(["prompt", "chosen", "rejected"]) for table in tables]
    target = next(name for name in ("messages", "text") for table in tables if name in table.column_names)
    logger.warning(
        "The %s data mix `%s` with `prompt` and `completion`: they are joined as `%s`, without the mark between them, so the "
        "loss also counts the prompts (unless `assistant_only_loss`).",
        split,
        target,
        target,
    )
    return [table if target in table.column_names else _whole(table, target) for table in tables]


def _whole(dataset: Dataset, target: str) -> Dataset:
    """Join `prompt` and `completion` to the one column `target`."""
    return dataset.map(
        lambda row: {target: row["prompt"] + row["completion"]},
        remove_columns=dataset.column_names,
        features=Features({target: dataset.features["prompt"]}),
        load_from_cache_file=False,
    )
