"""The held-out prompts of an evaluation, and their groups."""

from collections.abc import Hashable
from dataclasses import replace

from rlhf_recipes.config.data import DataArguments
from rlhf_recipes.config.evaluate import EvaluateArguments
from rlhf_recipes.core.errors import RecipeError, error_context
from rlhf_recipes.data import load_data
from rlhf_recipes.data.sources import has_splits
from rlhf_recipes.rewards.functions import CONVERT_REFERENCES
from rlhf_recipes.rewards.matching import accepted_answers

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray


def held_out_prompts(data: DataArguments, arguments: EvaluateArguments) -> Dataset:
    """Load the prompts of the YAML file.

    They are `eval_datasets`, else the split `dataset_test_split` of `dataset_name`, or all of a file without splits. A
    prompt that recurs with the same reference, as in several preference pairs, is kept once. Repeated, it would count as
    independent prompts, and intervals would be too narrow.

    Raises:
        RecipeError: As `load_data`. Also if the column `group_by` is missing or holds lists or mappings, `group_names` names
            no group, or a `reference` is neither a text nor a list of texts.
    """
    if data.eval_datasets:
        for key in ("column_mapping", "dataset_arguments"):
            if getattr(data, key) and not data.dataset_name:
                raise RecipeError(
                    f"{key}: belongs to `dataset_name`. Fix: set it in each entry of `eval_datasets` that needs it."
                )
        data = DataArguments(datasets=data.eval_datasets, bad_rows=data.bad_rows)
    elif data.dataset_name and has_splits(data.dataset_name):
        data = replace(data, dataset_train_split=data.dataset_test_split)
    rows = load_data(data, "prompt", evaluate=False, seed=arguments.seed).train
    if column := arguments.group_by:
        if column not in rows.column_names:
            known = ", ".join(rows.column_names)
            raise RecipeError(f"group_by: the data have no column '{column}'. Fix: name one of {known}.")
        for row, value in enumerate(rows[column]):
            if not isinstance(value, Hashable):
                fix = "name a column of texts, numbers or truth values"
                raise RecipeError(f"group_by: the column '{column}' holds {value!r:.80} in row {row}. Fix: {fix}.")
    groups = groups_of(rows, arguments.group_by)
    for name in arguments.group_names if arguments.group_by else ():
        if name not in groups:
            raise RecipeError(f"group_names: {name!r} is no group. Fix: name one of {', '.join(groups)}.")
    if "reference" in rows.column_names:
        for row, value in enumerate(rows["reference"]):
            with error_context(f"reference: row {row}", ValueError, fix=CONVERT_REFERENCES):
                accepted_answers(value)
    references = rows["reference"] if "reference" in rows.column_names else [None] * len(rows)
    first: dict[Hashable, int] = {}
    for row, key in enumerate(zip(map(repr, rows["prompt"]), map(repr, references), strict=True)):
        first.setdefault(key, row)
    if len(first) < len(rows):
        print(f"Left out {len(rows) - len(first)} of {len(rows)} rows, which repeat a prompt and its reference.")
    return rows.select(first.values())


def groups_of(rows: Dataset, column: str | None) -> dict[str, NDArray[np.bool_]]:
    """Return the rows of each group as masks (P,).

    The groups are `all` and one for each value of the column: `topic: a` for texts and numbers; `known` and `not known` for
    true and false.
    """
    groups = {"all": np.ones(len(rows), dtype=bool)}
    if column:
        values = rows[column]
        truths = all(isinstance(value, bool) for value in values)
        for value in sorted(set(values), key=lambda value: (not value, str(value)) if truths else (False, str(value))):
            name = (column if value else f"not {column}") if truths else f"{column}: {value}"
            groups[name] = np.array([other == value for other in values])
    return groups
