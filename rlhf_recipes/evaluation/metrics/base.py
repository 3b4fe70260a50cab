"""One way to make an `evaluate.Metric` of a function."""

import itertools
from collections.abc import Callable
from typing import Any

import datasets
import evaluate

NUMBER, TEXT = datasets.Value("float64"), datasets.Value("string")
NUMBERS, TEXTS = datasets.List(NUMBER), datasets.List(TEXT)


def metric(name: str, compute: Callable[..., dict[str, Any]], documentation: str, **columns: Any) -> type[evaluate.Metric]:
    """Return a class of `evaluate.Metric` that calls a function.

    `columns` are `predictions` and, where there are any, `references`, each with the feature of its rows, or a list of possible
    ones. `compute` takes the columns in this order, then the options of `Metric.compute` by name.
    """

    def info(self: evaluate.Metric) -> evaluate.MetricInfo:
        choices = itertools.product(*(kind if isinstance(kind, list) else [kind] for kind in columns.values()))
        features = [datasets.Features(zip(columns, choice, strict=True)) for choice in choices]
        features = features if len(features) > 1 else features[0]
        return evaluate.MetricInfo(description=documentation, citation="", inputs_description="", features=features)

    def call(self: evaluate.Metric, **inputs: Any) -> dict[str, Any]:
        return compute(*[inputs.pop(column) for column in columns], **inputs)

    members = {"__doc__": documentation, "__module__": compute.__module__, "_info": info, "_compute": call}
    return type(name, (evaluate.Metric,), members)
