"""Which data a stage reads."""

from dataclasses import dataclass, field
from typing import Any

from trl.scripts.utils import DatasetConfig

SINGLE_DATASET_KEYS = ("dataset_config", "column_mapping", "dataset_arguments")


@dataclass
class DatasetSource(DatasetConfig):
    """One entry of `datasets` or `eval_datasets`: TRL's `DatasetConfig` and what this project adds to it.

    Parameters:
        path: a Hub name, a local `.json`, `.jsonl`, `.csv` or `.parquet` file (also `.gz`), a directory of such files, a
            dataset saved with `save_to_disk`, or the dotted path of a Python function that returns a dataset.
        column_mapping: column of the file -> the name that it should have (`{"question": "prompt"}`).
        arguments: keyword arguments for the function, where `path` names one.
    """

    column_mapping: dict[str, str] | None = None
    arguments: dict[str, Any] | None = None


@dataclass
class DataArguments:
    """Which data a stage reads. Names that TRL has keep TRL's meaning."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A Hub name, a local file or directory, or the dotted path of a function that returns a dataset. "
            "Excludes `datasets`."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    datasets: list[DatasetSource] = field(
        default_factory=list, metadata={"help": "A mixture to train on, each entry with `path` and its options."}
    )
    eval_datasets: list[DatasetSource] = field(
        default_factory=list, metadata={"help": "A mixture to evaluate on, with the same options as `datasets`."}
    )
    test_split_size: float | None = field(
        default=None,
        metadata={
            "help": "Share (or number) of the training rows to set aside for evaluation, with the run's seed; of pairs and "
            "rankings, of the prompts."
        },
    )
    column_mapping: dict[str, str] | None = field(
        default=None, metadata={"help": "Column of `dataset_name` -> the name that it should have."}
    )
    dataset_arguments: dict[str, Any] | None = field(
        default=None, metadata={"help": "Keyword arguments for the function that `dataset_name` names."}
    )
    bad_rows: str = field(
        default="error",
        metadata={
            "help": "What to do with rows that cannot be used (empty answers, chosen equal to rejected, ...): stop, or "
            "drop and count them.",
            "choices": ["error", "drop"],
        },
    )
    long_rows: str = field(
        default="truncate",
        metadata={
            "help": "What to do with rows longer than `max_length`: cut off their end, drop them, or stop. Each is counted.",
            "choices": ["truncate", "drop", "error"],
        },
    )

    def __post_init__(self):
        if self.dataset_name and self.datasets:
            raise ValueError("Set either `dataset_name` or `datasets`: both are set.")
        if self.eval_datasets and self.test_split_size is not None:
            raise ValueError("`eval_datasets` and `test_split_size` both say what to evaluate on: remove one of them.")
        for key in SINGLE_DATASET_KEYS if self.datasets else ():
            if getattr(self, key):
                raise ValueError(f"`{key}` belongs to `dataset_name`. With `datasets`, set it in each entry that needs it.")
