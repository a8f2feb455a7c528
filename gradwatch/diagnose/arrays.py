"""Questions that a look at a few hundred columns asks so often that numpy's own answers, made for all cases, cost more than the work."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DECADE = float(np.log(10.0))
"""A power of ten in natural logarithms, which the baselines keep."""


def median(values: NDArray[np.float64]) -> float:
    """`np.median` of one dimension, NaN if a value is: 2 us for ten numbers instead of 11 (measured)."""
    ordered = np.sort(values)  # NaN come last
    middle = float(ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
    return middle if ordered[-1] == ordered[-1] else float("nan")


def median_of_rows(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[N]`: `np.median` along the first of two axes, of values none of which is NaN: 0.4 ms for `[8, 10000]` instead of 1.2 (measured)."""
    ordered = np.sort(values, axis=0)
    middle: NDArray[np.float64] = (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2
    return middle


def members(numbers: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """`[count]`: whether each number below `count` is among `numbers`. In place of `np.isin` and `np.unique`, which sort or hash."""
    mask = np.zeros(count, bool)
    mask[numbers] = True
    return mask


def distinct(numbers: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Each of some numbers below `count` once, in the order in which they first occur."""
    first, at = np.empty(count, np.int64), np.arange(len(numbers))
    # Of several values for one place the last is kept.
    first[numbers[::-1]] = at[::-1]
    once: NDArray[np.int64] = numbers[first[numbers] == at]
    return once


def runs(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers of some ranges one after the other: `starts[0]`, `starts[0] + 1`, ... as many as `lengths[0]`, then the next range."""
    before = np.cumsum(lengths) - lengths
    numbers: NDArray[np.int64] = np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
    return numbers
