"""Arguments that take precedence over those of a YAML file."""

from collections.abc import Mapping
from typing import Any

SINGLE_DATASET_KEYS = ("dataset_config", "column_mapping", "dataset_arguments")
"""Keys that belong to `dataset_name`."""


def merge_overrides(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with `overrides` taking precedence.

    Overrides that name other data replace those of `values`, with what belongs to them. A `column_mapping` stays: the new
    data may well have the same columns.
    """
    removed = set()
    if overrides.get("dataset_name") not in (None, values.get("dataset_name")):
        removed |= {"dataset_arguments", "dataset_config"}
    for key, replaced in (
        ("datasets", ("dataset_name", *SINGLE_DATASET_KEYS)),
        ("dataset_name", ("datasets",)),
        ("eval_datasets", ("test_split_size",)),
        ("test_split_size", ("eval_datasets",)),
    ):
        removed.update(replaced if overrides.get(key) else ())
    return {key: value for key, value in values.items() if key not in removed} | dict(overrides)
