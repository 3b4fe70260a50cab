"""Intervals by resampling, and the checks of columns that all metrics share."""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

RESAMPLES = 2000
_Z = 1.959963984540054  # 95% of a normal distribution lies within


def wilson_interval(share: float, n: float) -> list[float]:
    """Return the 95% interval of a share of `n` observations (Wilson, 1927).

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n). Sound near 0 and 1; a little wide where observations lie between them
    (ties).
    """
    square = _Z**2 / n
    centre, half = share + square / 2, _Z * math.sqrt(share * (1 - share) / n + square / (4 * n))
    return [max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))]


def share_interval(values: Floats, codes: Integers, seed: int = 0) -> list[float]:
    """Return the 95% interval of the mean of (N,) values in [0, 1], by group.

    Wilson's where every value is a group by itself; else a bootstrap of whole groups (Davison and Hinkley 1997, 3.8), which
    is too narrow below some 20 groups. Where all groups have one mean, resampling gives no interval, so it is Wilson's with
    groups as the observations.
    """
    sums, counts = group_sums(values, codes)
    if len(sums) == len(values) or np.ptp(sums / counts) == 0:
        return wilson_interval(float(values.mean()), len(sums))
    return bootstrap(sums, counts, seed)


def mean_interval(values: Floats, codes: Integers, seed: int = 0) -> list[float] | None:
    """Return the 95% bootstrap interval of the mean of (N,) values, by group.

    None where all groups have one mean, since resampling then gives no interval.
    """
    sums, counts = group_sums(values, codes)
    return bootstrap(sums, counts, seed) if np.ptp(sums / counts) else None


def bootstrap(sums: Floats, counts: Integers, seed: int) -> list[float]:
    """Return the 95% bootstrap interval of sum / count over groups."""
    generator = np.random.default_rng(seed)
    draws = (generator.integers(len(sums), size=len(sums)) for _ in range(RESAMPLES))
    return np.quantile([sums[rows].sum() / counts[rows].sum() for rows in draws], (0.025, 0.975)).tolist()


def codes_of(groups: Sequence[Hashable] | None, n: int, name: str = "groups") -> Integers:
    """Return group numbers from 0, (n,); without groups each entry is its own."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise ValueError(f"`{name}` has {len(groups)} entries for {n}.")
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.array([numbers[group] for group in groups])


def group_sums(values: Floats, codes: Integers) -> tuple[Floats, Integers]:
    """Return sum and count of each non-empty group, (groups,) each."""
    counts = np.bincount(codes)
    return np.bincount(codes, weights=values)[counts > 0], counts[counts > 0]


def columns_of(**columns: ArrayLike) -> list[Floats]:
    """Return the columns as float arrays of one shape (N,), N > 0, of finite numbers."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    lengths = {name: array.shape for name, array in arrays.items()}
    if any(len(shape) != 1 for shape in lengths.values()) or len(set(lengths.values())) > 1:
        raise ValueError(f"Lists of one length are needed, but the shapes are {lengths}.")
    for name, array in arrays.items():
        if not len(array):
            raise ValueError(f"`{name}` is empty.")
        bad = np.flatnonzero(~np.isfinite(array))
        if len(bad):
            raise ValueError(f"`{name}` has {len(bad)} numbers that are not finite, the first ({array[bad[0]]}) at {bad[0]}.")
    return list(arrays.values())
