"""Fast answers about arrays against numpy's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.diagnose.arrays import distinct, median, median_of_rows, members, runs

numbers = st.lists(st.integers(0, 9), max_size=30).map(lambda values: np.array(values, np.int64))


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=20))
def test_the_median(values: list[float]) -> None:
    assert median(np.array(values)) == np.median(values)


@pytest.mark.parametrize(
    "values", [pytest.param([np.nan], id="alone"), pytest.param([1.0, np.nan, 3.0, -np.inf], id="among others")]
)
def test_the_median_of_a_nan_is_one(values: list[float]) -> None:
    assert np.isnan(median(np.array(values)))


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_the_median_of_rows(rows: int) -> None:
    values = np.random.default_rng(rows).normal(size=(rows, 7))
    np.testing.assert_array_equal(median_of_rows(values), np.median(values, axis=0))


@given(numbers)
def test_members(given: np.ndarray) -> None:
    np.testing.assert_array_equal(members(given, 10), np.isin(np.arange(10), given))


@given(numbers)
def test_distinct_keeps_the_order_in_which_numbers_first_occur(given: np.ndarray) -> None:
    assert distinct(given, 10).tolist() == list(dict.fromkeys(given.tolist()))


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=8))
def test_runs_are_ranges_one_after_the_other(ranges: list[tuple[int, int]]) -> None:
    starts, lengths = np.array(ranges, np.int64).reshape(-1, 2).T
    assert runs(starts, lengths).tolist() == [n for start, length in ranges for n in range(start, start + length)]
