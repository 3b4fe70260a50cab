"""Which data a stage reads."""

from dataclasses import dataclass
from typing import Any

from rlhf_recipes.config import option
from rlhf_recipes.config.overrides import SINGLE_DATASET_KEYS

from trl.scripts.utils import DatasetConfig


@dataclass
class DatasetSource(DatasetConfig):
    """An entry of `datasets` or `eval_datasets`: TRL's `DatasetConfig` and two keys.

    Parameters:
        path: a Hub name, a local `.json`, `.jsonl`, `.csv` (also `.gz`) or `.parquet` file, a directory of such files, a
            dataset saved with `save_to_disk`, or the dotted path of a Python function that returns a dataset.
        column_mapping: column in the file -> name that it should have (`{"question": "prompt"}`).
        arguments: keyword arguments for the function, if `path` names one.
    """

    column_mapping: dict[str, str] | None = None
    arguments: dict[str, Any] | None = None


@dataclass
class DataArguments:
    """Which data a stage reads. Keys that TRL has keep TRL's meaning."""

    dataset_name: str | None = option(
        None, "Hub name, local file or directory, or dotted path of a function that returns a dataset. Excludes `datasets`."
    )
    dataset_config: str | None = option(None, "Configuration of the Hub dataset.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split to evaluate on.")
    datasets: list[DatasetSource] = option([], "Mixture to train on; each entry has a `path` and its options.")
    eval_datasets: list[DatasetSource] = option([], "Mixture to evaluate on, with the options of `datasets`.")
    test_split_size: float | None = option(
        None,
        "Share or number of the training rows to hold out for evaluation, by the run's seed. Of pairs and rankings it counts "
        "prompts.",
    )
    column_mapping: dict[str, str] | None = option(None, "Column of `dataset_name` -> name that it should have.")
    dataset_arguments: dict[str, Any] | None = option(None, "Keyword arguments of the function that `dataset_name` names.")
    bad_rows: str = option(
        "error", "Unusable rows, such as empty answers: stop the run, or drop and count them.", ["error", "drop"]
    )
    long_rows: str = option(
        "truncate",
        "Rows beyond `max_length`: truncate their end, drop them, or stop the run. They are counted.",
        ["truncate", "drop", "error"],
    )

    def __post_init__(self):
        if self.dataset_name and self.datasets:
            raise ValueError("`dataset_name` and `datasets` exclude each other. Fix: set one of the two")
        if self.eval_datasets and self.test_split_size is not None:
            raise ValueError("`eval_datasets` and `test_split_size` exclude each other. Fix: set one of the two")
        for key in SINGLE_DATASET_KEYS if self.datasets else ():
            if getattr(self, key):
                raise ValueError(f"{key}: belongs to `dataset_name`. Fix: set it in the entries of `datasets`")
