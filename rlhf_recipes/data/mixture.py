"""The training and evaluation rows of a stage, from its YAML keys."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rlhf_recipes.config.data import DataArguments, DatasetSource
from rlhf_recipes.core.errors import RecipeError, first_line
from rlhf_recipes.data.conversion import Kind
from rlhf_recipes.data.rendering import check_positions, check_rendered, drop_overlong_mode, strip_bos
from rlhf_recipes.data.rows import Converted, convert, find_shape, reject_bad_rows
from rlhf_recipes.data.sources import Part, UnknownSplitError, has_splits, open_source
from rlhf_recipes.inputs import is_data_file, require_data

from datasets import Dataset, Features, concatenate_datasets
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """The data of a stage, in the columns of its `Kind`.

    Parameters:
        train: the rows to train on.
        eval: the rows to evaluate on, or None.
        report: per split the number of rows, how many were read, and how many were dropped and why; for `recipe.json`.
        kind: what the stage trains on.
        bad_rows: what becomes of rows that cannot be used, "error" or "drop".
    """

    train: Dataset
    eval: Dataset | None
    report: dict[str, Any]
    kind: Kind
    bad_rows: str

    def check_rendered(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, long_rows: str, assistant_only_loss: bool = False
    ) -> "Data":
        """Return the data after `check_rendered`, with its counts in the report."""
        options = {"bad_rows": self.bad_rows, "assistant_only_loss": assistant_only_loss}
        report = {split: dict(counts) for split, counts in self.report.items()}
        splits: dict[str, Dataset | None] = {"train": self.train, "eval": self.eval}
        for split, dataset in splits.items():
            if dataset is not None:
                splits[split], counts = check_rendered(dataset, self.kind, tokenizer, max_length, long_rows, split, **options)
                dropped = Counter(report[split].get("dropped", {})) + Counter(counts["dropped"])
                report[split] |= counts | {"dropped": dict(dropped)}
        return replace(self, **splits, report=report)

    def check_positions(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int | None, positions: int | None, new_tokens: int = 0
    ) -> None:
        """Refuse rows for which the model has too few positions, as `check_positions`."""
        for split, dataset in (("train", self.train), ("eval", self.eval)):
            if dataset is not None:
                check_positions(dataset, self.kind, tokenizer, max_length, split, positions, new_tokens)


def load_data(arguments: DataArguments, kind: Kind, *, evaluate: bool, seed: int) -> Data:
    """Load, check and convert the data that a YAML file names.

    Rows that cannot be used stop the run, or are dropped, counted and logged (`bad_rows: drop`). With `evaluate`, the
    evaluation data are `eval_datasets`; or the rows that `test_split_size` sets aside, by `seed` (of pairs and rankings whole
    prompts, so that no prompt is in both splits); or the split `dataset_test_split` of `dataset_name`.

    Raises:
        RecipeError: for missing or unreadable data, columns that do not fit the stage, bad rows, or no rows left.
    """
    train, report = _load_split(_train_sources(arguments), kind, arguments.bad_rows, "train")
    reports = {"train": report}
    held_out = None
    if arguments.test_split_size is not None:
        train, held_out = _hold_out(train, kind, arguments.test_split_size, seed)
        reports["train"]["rows"] = len(train)
        reports["eval"] = {"rows": len(held_out), "test_split_size": arguments.test_split_size, "seed": seed}
    elif evaluate or arguments.eval_datasets:
        held_out, reports["eval"] = _load_eval(arguments, kind)
    return Data(train, held_out, reports, kind, arguments.bad_rows)


def load_demonstrations(
    arguments: DataArguments,
    sources: list[DatasetSource],
    seed: int,
    held_out: Dataset | None = None,
    rows: int = 1000,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    positions: int | None = None,
) -> tuple[Dataset, dict[str, Any]]:
    """Load demonstrations to scale rewards by, and their counts.

    Args:
        arguments: the data section of a stage on comparisons; without `sources` their best answers are used.
        sources: demonstrations, in any shape that SFT reads except `text`.
        seed: draws at most `rows` of them, before those that are too long are left out.
        held_out: rows whose prompts are left out.
        rows: the number drawn at most.
        tokenizer: of the run; without it lengths are not checked.
        max_length: in tokens.
        positions: as in `check_positions`.

    Raises:
        RecipeError: as `load_data`; for plain text; for long rows under `long_rows: error`; for fewer than two rows.
    """
    long_rows = drop_overlong_mode(arguments.long_rows)
    if sources:
        arguments = DataArguments(datasets=sources, bad_rows=arguments.bad_rows)
    dataset, _ = _load_split(_train_sources(arguments), "sft", arguments.bad_rows, "demonstration")
    if "text" in dataset.column_names:
        raise RecipeError("demonstrations: plain text has no answers to score. Fix: name data with `prompt` and `completion`.")
    if "messages" in dataset.column_names:
        dataset = dataset.map(
            lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}, remove_columns=["messages"]
        )
    if tokenizer is not None and len(dataset):
        dataset = strip_bos(dataset, "prompt", tokenizer)  # as of `held_out`
    excluded = set(map(repr, held_out["prompt"])) if held_out is not None else set()
    dataset = dataset.select([row for row, prompt in enumerate(dataset["prompt"]) if repr(prompt) not in excluded])
    dataset, report = dataset.shuffle(seed=seed).take(rows), {}
    if tokenizer is not None and len(dataset):
        options = {"bad_rows": arguments.bad_rows}
        dataset, report = check_rendered(dataset, "sft", tokenizer, max_length, long_rows, "demonstrations", **options)
        check_positions(dataset, "sft", tokenizer, max_length, "demonstrations", positions)
    if len(dataset) < 2:
        raise RecipeError(
            f"demonstrations: {len(dataset)} rows have no standard deviation. Fix: name more. Rows with held-out prompts and "
            "rows longer than `max_length` are left out."
        )
    return dataset, {"rows": len(dataset)} | report


def load_texts(sources: list[DatasetSource], bad_rows: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Load pretraining text, in the column `text`, without BOS where one is added.

    Raises:
        RecipeError: as `load_data`; without a source, or for data in another shape.
    """
    if not sources:
        raise RecipeError("ptx_dataset: missing, and `ptx_coef` needs it. Fix: name pretraining text with a column `text`.")
    dataset, _ = _load_split(sources, "sft", bad_rows, "pretraining text")
    if "text" not in dataset.column_names:
        raise RecipeError("ptx_dataset: the data are conversations or answers. Fix: name plain text, in a column `text`.")
    return strip_bos(dataset, "text", tokenizer)


def check_source(source: DatasetSource, kind: Kind | None) -> None:
    """Check that a local file is there, has rows, and the columns that `kind` needs.

    With None, it must only be there. Hub datasets and functions are not opened.
    """
    require_data(source.path)
    if kind and is_data_file(source.path):
        for part in open_source(source):
            find_shape(part, kind)


def _train_sources(arguments: DataArguments) -> list[DatasetSource]:
    if arguments.datasets:
        return arguments.datasets
    if not arguments.dataset_name:
        raise RecipeError("dataset_name: missing. Fix: set `dataset_name` or `datasets`.")
    return [_named_source(arguments, arguments.dataset_train_split)]


def _named_source(arguments: DataArguments, split: str) -> DatasetSource:
    options = {"column_mapping": arguments.column_mapping, "arguments": arguments.dataset_arguments}
    return DatasetSource(arguments.dataset_name, arguments.dataset_config, split=split, **options)


def _load_eval(arguments: DataArguments, kind: Kind) -> tuple[Dataset, dict[str, Any]]:
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
                reason = str(error).partition(" Fix:")[0].removesuffix(".")
    raise RecipeError(
        f"eval_datasets: there is nothing to evaluate on: {reason}. Fix: set `dataset_test_split` to a split that exists, list "
        '`eval_datasets`, set `test_split_size` (0.1 sets a tenth of the training rows aside), or set `eval_strategy: "no"`.'
    )


def _hold_out(dataset: Dataset, kind: Kind, size: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off `size` rows: a share below 1, else a number.

    Pairs and rankings are split by prompt, against leaks.
    """
    if size >= 1 and size != int(size):
        raise RecipeError(f"test_split_size: {size}: not a whole number. Fix: set a share below 1, or a number of rows.")
    size = int(size) if size >= 1 else size
    compared = kind in ("preference", "ranking")
    rows: dict[Any, list[int]] = {}
    for row, prompt in enumerate(map(repr, dataset["prompt"]) if compared else range(len(dataset))):
        rows.setdefault(prompt, []).append(row)
    try:
        groups = Dataset.from_dict({"rows": list(rows.values())}).train_test_split(test_size=size, seed=seed)
    except ValueError as error:
        unit = "different prompts" if compared else "rows"
        raise RecipeError(f"test_split_size: {size}: there are {len(rows)} {unit} of training data: {error}") from error
    train, test = (dataset.select(list(itertools.chain(*groups[part]["rows"]))) for part in ("train", "test"))
    return train, test


def _load_split(sources: list[DatasetSource], kind: Kind, bad_rows: str, split: str) -> tuple[Dataset, dict[str, Any]]:
    parts = [convert(part, kind) for part in _mix(sources)]
    bad = [(f"{part.label}, row {row}", reason) for part in parts for row, reason in part.bad]
    reject_bad_rows(bad, sum(part.read for part in parts), bad_rows, split)
    dataset = _join(parts, kind, split)
    return dataset, {
        "rows": len(dataset),
        "read": sum(part.read for part in parts),
        "dropped": dict(Counter(reason for part in parts for _, reason in part.bad)),
        "sources": [
            {
                "source": part.label,
                "read": part.read,
                "dropped": dict(Counter(reason for _, reason in part.bad)),
                "rows": len(part.dataset),
                "unused_columns": part.unused,
            }
            for part in parts
        ],
        "conversational": parts[0].conversational,
    }


def _mix(sources: list[DatasetSource]) -> list[Part]:
    """Open all sources, and take the first rows of each by its `fraction`."""
    opened = [open_source(source) for source in sources]
    fractions = [source.fraction for source in sources]
    if all(fraction is None for fraction in fractions):
        return [part for parts in opened for part in parts]
    if any(fraction is None or fraction < 0 for fraction in fractions) or not sum(fractions):
        raise RecipeError(f"fraction: {fractions}: Fix: set a positive number for every source of a mixture, or for none.")
    weights = [fraction / sum(fractions) for fraction in fractions]
    sizes = [sum(len(part.dataset) for part in parts) for parts in opened]
    total = min(size / weight for size, weight in zip(sizes, weights, strict=True) if weight)
    return [part for parts, weight in zip(opened, weights, strict=True) for part in _first_rows(parts, round(weight * total))]


def _first_rows(parts: list[Part], count: int) -> Iterator[Part]:
    for part in parts:
        if count > 0:
            yield Part(part.label, part.dataset.take(count))
        count -= len(part.dataset)


def _join(parts: list[Converted], kind: Kind, split: str) -> Dataset:
    parts = [part for part in parts if len(part.dataset)]
    forms = {part.conversational: part.label for part in parts}
    if len(forms) == 2:
        raise RecipeError(
            f"The {split} data mix conversations ({forms[True]}) and plain text ({forms[False]}). Fix: give both lists of "
            "messages, or both text."
        )
    tables = [part.dataset for part in parts]
    if len({tuple(table.column_names) for table in tables}) > 1 and kind != "prompt":
        tables = _same_columns(tables, kind, split)
    try:
        return concatenate_datasets(tables)
    except ValueError as error:
        raise RecipeError(
            f"The {split} data cannot be joined ({', '.join(part.label for part in parts)}): {first_line(error)} Fix: give the "
            "column one type in all of them, or rename one with `column_mapping`."
        ) from error


def _same_columns(tables: list[Dataset], kind: Kind, split: str) -> list[Dataset]:
    """Bring the parts of a mixture to common columns, and log what is dropped."""
    if kind == "preference":
        logger.warning("The margins of the %s data are ignored: not all sources have them.", split)
        return [table.select_columns(["prompt", "chosen", "rejected"]) for table in tables]
    target = next(name for name in ("messages", "text") for table in tables if name in table.column_names)
    logger.warning(
        "The %s data mix `%s` with `prompt` and `completion`. They are joined as `%s`, and the loss counts the prompts too, "
        "unless `assistant_only_loss` is set.",
        split,
        target,
        target,
    )
    return [table if target in table.column_names else _concat_prompt_completion(table, target) for table in tables]


def _concat_prompt_completion(dataset: Dataset, target: str) -> Dataset:
    return dataset.map(
        lambda row: {target: row["prompt"] + row["completion"]},
        remove_columns=dataset.column_names,
        features=Features({target: dataset.features["prompt"]}),
        load_from_cache_file=False,
    )
