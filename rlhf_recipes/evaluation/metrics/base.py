"""One way to make an `evaluate.Metric` of a function."""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate

NUMBER, TEXT = datasets.Value("float64"), datasets.Value("string")
NUMBERS = datasets.List(NUMBER)


def metric(name: str, compute: Callable[..., dict[str, Any]], documentation: str, **columns: Any) -> type[evaluate.Metric]:
    """Return a class of `evaluate.Metric` that calls a function.

    `columns` are `predictions` and, where there are any, `references`, each with the feature of its rows. `compute` takes them
    in this order, then the options of `Metric.compute` by name.
    """

    def info(self: evaluate.Metric) -> evaluate.MetricInfo:
        features = datasets.Features(columns)
        return evaluate.MetricInfo(description=documentation, citation="", inputs_description="", features=features)

    def call(self: evaluate.Metric, **inputs: Any) -> dict[str, Any]:
        return compute(*[inputs.pop(column) for column in columns], **inputs)

    members = {"__doc__": documentation, "__module__": compute.__module__, "_info": info, "_compute": call}
    return type(name, (evaluate.Metric,), members)
