"""What metrics share: intervals by resampling, groups numbered, and lists checked."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

RESAMPLES = 2000
_Z = 1.959963984540054  # 95% of a normal distribution lies within


def wilson_interval(share: float, n: float) -> list[float]:
    """The 95% interval of a share of `n` independent observations (Wilson 1927), which stays sound near 0 and 1.

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n). It is a little wide where observations lie between 0 and 1 (ties).
    """
    square = _Z**2 / n
    centre, half = share + square / 2, _Z * math.sqrt(share * (1 - share) / n + square / (4 * n))
    return [max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))]


def share_interval(values: Floats, codes: Integers, seed: int = 0) -> list[float]:
    """The 95% interval of the mean of `values` in [0, 1], by the groups that they belong to.

    Wilson's where every value is a group of its own; else a bootstrap of whole groups (Davison and Hinkley 1997, 3.8), which is
    too narrow below some 20 groups. Where groups have all the same mean, resampling says nothing; Wilson's interval then counts
    groups as the observations.

    Args:
        values: (N,).
        codes: (N,) the number of the group of each.
        seed: of the resampling.
    """
    sums, counts = group_sums(values, codes)
    if len(sums) == len(values) or np.ptp(sums / counts) == 0:
        return wilson_interval(float(values.mean()), len(sums))
    return bootstrap(sums, counts, seed)


def mean_interval(values: Floats, codes: Integers, seed: int = 0) -> list[float] | None:
    """The 95% bootstrap interval of the mean of values of any range, by the groups that they belong to.

    Args:
        values: (N,).
        codes: (N,) the number of the group of each.
        seed: of the resampling.

    Returns:
        The interval; None where every group has the same mean, so that resampling says nothing.
    """
    sums, counts = group_sums(values, codes)
    return bootstrap(sums, counts, seed) if np.ptp(sums / counts) else None


def bootstrap(sums: Floats, counts: Integers, seed: int) -> list[float]:
    """The 95% percentile interval of sum / count when groups are drawn with replacement."""
    generator = np.random.default_rng(seed)
    draws = (generator.integers(len(sums), size=len(sums)) for _ in range(RESAMPLES))
    return np.quantile([sums[rows].sum() / counts[rows].sum() for rows in draws], (0.025, 0.975)).tolist()


def codes_of(groups: Sequence[Hashable] | None, n: int, name: str = "groups") -> Integers:
    """(n,) the groups numbered from 0; without groups, every one is its own."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise ValueError(f"`{name}` has {len(groups)} entries for {n}.")
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.array([numbers[group] for group in groups])


def group_sums(values: Floats, codes: Integers) -> tuple[Floats, Integers]:
    """Of each group that is there, the sum and the number of its values: (groups,) each."""
    counts = np.bincount(codes)
    return np.bincount(codes, weights=values)[counts > 0], counts[counts > 0]


def columns_of(**columns: ArrayLike) -> list[Floats]:
    """The columns as float arrays of one shape (N,), N > 0, of finite numbers."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    lengths = {name: array.shape for name, array in arrays.items()}
    if any(len(shape) != 1 for shape in lengths.values()) or len(set(lengths.values())) > 1:
        raise ValueError(f"Lists of one length are needed, and the shapes are {lengths}.")
    for name, array in arrays.items():
        if not len(array):
            raise ValueError(f"`{name}` is empty.")
        check_finite(name, array)
    return list(arrays.values())


def check_finite(name: str, array: Floats) -> None:
    """Refuses numbers that are not finite.

    Raises:
        ValueError: with how many there are, and where the first is.
    """
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"`{name}` has {len(bad)} numbers that are not finite, the first ({array[bad[0]]}) at {bad[0]}.")


def metric_info(metric: evaluate.Metric, feature: Any) -> evaluate.MetricInfo:
    """The information of a metric whose predictions and references are of one feature; its docstring describes it."""
    features = datasets.Features({"predictions": feature, "references": feature})
    return evaluate.MetricInfo(description=type(metric).__doc__, citation="", inputs_description="", features=features)
