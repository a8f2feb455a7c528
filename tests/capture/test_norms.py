"""The one read of all norms against `torch.linalg.vector_norm` in float64, for every kind of tensor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradwatch.capture.norms import NormReader, exact, quick_norm
from tests.capture.tensors import DTYPES, LAYOUTS, SHAPES, made, nonfinite, norm, tensors

RTOL = 1e-4
"""Of sums of squares in float32. Where all values are equal the roundings of a long sum go one way: 6e-5 at 10,000 elements."""


def read(params: list[Tensor], values: list[Tensor], slots: list[int] | None = None) -> np.ndarray:
    """The norms that a reader planned for `params` reads of `values`; NaN where it wrote nothing."""
    slots = list(range(len(params))) if slots is None else slots
    out = np.full(len(params), np.nan)
    with torch.no_grad():
        assert NormReader(params).read(slots, values, out) == []
    return out


def assert_norms(got: np.ndarray, values: list[Tensor]) -> None:
    np.testing.assert_allclose(got, [norm(value) for value in values], rtol=RTOL, atol=1e-30)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_shapes_of_one_layout_in_one_read(dtype: torch.dtype, layout: str) -> None:
    values = [made(shape, dtype, layout, seed=i) for i, shape in enumerate(SHAPES)]
    params = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
    assert_norms(read(params, values), values)


@settings(max_examples=80, deadline=None)
@given(st.lists(tensors, min_size=1, max_size=6), st.data())
def test_any_mixture_and_any_part_of_it(values: list[Tensor], data: st.DataObject) -> None:
    params = [torch.zeros(value.shape, dtype=value.dtype) for value in values]
    assert_norms(read(params, values), values)
    part = sorted(data.draw(st.sets(st.sampled_from(range(len(values))), min_size=1)))
    got = read(params, [values[slot] for slot in part], part)
    assert_norms(got[part], [values[slot] for slot in part])
    assert np.isnan(np.delete(got, part)).all(), "what was not asked for was not touched"


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(8)))
def test_slots_may_come_in_any_order(order: list[int]) -> None:
    params = [torch.zeros(4, 3), torch.zeros(600), torch.zeros(9000), torch.zeros(5, dtype=torch.float64)] * 2
    values = [made(tuple(params[slot].shape), params[slot].dtype, "contiguous", seed=slot) for slot in order]
    got = read(params, values, list(order))
    assert_norms(got[list(order)], values)


def test_a_reader_is_used_again_and_again() -> None:
    """Its buffers hold what the last read left there."""
    shapes = [(4, 3), (20,), (600,), (9000,), (2, 2)]
    params = [torch.zeros(shape) for shape in shapes]
    reader, out = NormReader(params), np.full(len(shapes), np.nan)
    for seed, part in enumerate([[0, 1, 2, 3, 4], [1, 3], [0, 4], [2], [0, 1, 2, 3, 4], []]):
        values = [made(shapes[slot], torch.float32, "contiguous", seed, scale=10.0**seed) for slot in part]
        before = out.copy()
        with torch.no_grad():
            reader.read(part, values, out)
        assert_norms(out[part], values)
        np.testing.assert_array_equal(np.delete(out, part), np.delete(before, part))


@pytest.mark.parametrize("size", [3, 600, 9000], ids=["packed", "medium", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_value_that_is_not_finite_makes_its_own_norm_so_and_no_other(bad: float, dtype: torch.dtype, size: int) -> None:
    values = [torch.ones(size, dtype=dtype) for _ in range(3)]
    values[1][size // 2] = bad
    got = read([torch.zeros(size, dtype=dtype)] * 3, values)
    assert not np.isfinite(got[1])
    np.testing.assert_allclose(got[[0, 2]], math.sqrt(size), rtol=RTOL)


def test_the_norm_of_a_large_embedding_is_as_good_as_that_of_a_small_one() -> None:
    """One sum of 16 million squares in float32 loses what a sum of block sums keeps."""
    value = torch.randn(4096, 4096)
    np.testing.assert_allclose(read([value], [value]), [norm(value)], rtol=RTOL)


@pytest.mark.parametrize("hybrid", [False, True], ids=["scalars", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("rows", [40, 20_000], ids=["small", "large"])
def test_duplicates_of_a_sparse_gradient_are_summed(rows: int, dtype: torch.dtype, hybrid: bool) -> None:
    index = torch.tensor([[3, 7, 3, 0, 7, 3]])
    shape = (rows, 5) if hybrid else (rows,)
    sparse = torch.sparse_coo_tensor(index, made((6, *shape[1:]), dtype, "contiguous"), shape, check_invariants=True)
    dense = torch.ones(4)
    assert not sparse.is_coalesced()
    got = read([torch.zeros(shape, dtype=dtype), torch.zeros(4)], [sparse, dense])
    # bf16 sums of duplicates are rounded once more.
    np.testing.assert_allclose(got, [norm(sparse), 2.0], rtol=1e-2 if dtype is torch.bfloat16 else RTOL)
    assert exact(sparse)[0] == pytest.approx(norm(sparse), rel=1e-2 if dtype is torch.bfloat16 else 1e-6)
    assert quick_norm(sparse) == pytest.approx(norm(sparse), rel=1e-2 if dtype is torch.bfloat16 else RTOL)


def test_a_sparse_gradient_of_nothing_has_norm_zero() -> None:
    empty = torch.sparse_coo_tensor(torch.zeros((1, 0), dtype=torch.long), torch.zeros(0, 5), (40, 5), check_invariants=True)
    assert read([torch.zeros(40, 5)], [empty]).tolist() == [0.0]
    assert exact(empty) == (0.0, 0)


def test_compressed_rows_are_read() -> None:
    dense = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
    with pytest.warns(UserWarning, match="beta"):
        csr = dense.to_sparse_csr()
    assert read([torch.zeros(2, 2)], [csr]).tolist() == [5.0]
    assert exact(csr) == (5.0, 0)


def test_a_gradient_of_another_dtype_than_its_parameter_is_read() -> None:
    sizes = (3, 600, 9000)
    params = [torch.zeros(size) for size in sizes]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        values = [made((size,), dtype, "contiguous", seed=size) for size in sizes]
        assert_norms(read(params, values), values)


def test_what_has_no_memory_yet_is_no_obstacle() -> None:
    params = [torch.nn.UninitializedParameter(), torch.zeros(3, device="meta"), torch.zeros(3), torch.zeros(9000)]
    values = [torch.ones(3), torch.ones(9000)]
    got = read(params, values, [2, 3])
    assert_norms(got[2:], values)
    assert np.isnan(got[:2]).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(tensors, min_size=1, max_size=4))
def test_reading_changes_nothing_that_is_read(values: list[Tensor]) -> None:
    before = [(value.detach().clone(), value._version, value.stride()) for value in values]
    read([torch.zeros(value.shape, dtype=value.dtype) for value in values], values)
    for value in values:
        exact(value)
    for value, (content, version, stride) in zip(values, before, strict=True):
        assert torch.equal(value.detach(), content)
        assert value._version == version
        assert value.stride() == stride


def test_the_packing_buffer_stays_within_a_megabyte() -> None:
    params = [torch.zeros(500) for _ in range(3000)]
    values = [torch.full((500,), float(i % 7)) for i in range(3000)]
    with torch.no_grad():
        reader = NormReader(params)
        out = np.full(3000, np.nan)
        reader.read(list(range(3000)), values, out)
    assert_norms(out, values)
    assert reader.nbytes <= 2 * 2**20 + 4 * 3000


def test_a_reader_made_in_inference_mode_reads_outside_of_it() -> None:
    params = [torch.zeros(3), torch.zeros(600), torch.zeros(9000)]
    with torch.inference_mode():
        reader = NormReader(params)
    values = [torch.ones_like(p) for p in params]
    out = np.full(3, np.nan)
    with torch.no_grad():
        reader.read([0, 1, 2], values, out)
    assert_norms(out, values)


# -- suspicious tensors ------------------------------------------------------------------------------------------------------------

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
oddities = st.sampled_from([math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, 1e-38, 1e-23, 0.0, -0.0])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(numbers, oddities), max_size=30), st.sampled_from(["float32", "float64"]))
def test_the_exact_norm_survives_what_squares_in_float32_do_not(content: list[float], kind: str) -> None:
    tensor = torch.tensor(content, dtype=getattr(torch, kind))
    true, bad = exact(tensor)
    assert bad == nonfinite(tensor)
    if bad:
        assert not math.isfinite(true)
    else:
        assert true == pytest.approx(math.hypot(*tensor.tolist()), rel=1e-12, abs=0)


@settings(max_examples=60, deadline=None)
@given(tensors)
def test_exact_and_quick_norm_agree_with_torch(tensor: Tensor) -> None:
    true, bad = exact(tensor)
    assert bad == 0
    assert true == pytest.approx(norm(tensor), rel=1e-6)
    assert quick_norm(tensor) == pytest.approx(norm(tensor), rel=RTOL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elements_that_are_not_finite_are_counted_once_each(dtype: torch.dtype) -> None:
    tensor = torch.ones(4, 5, dtype=dtype)
    tensor[0, :3] = math.nan
    tensor[2, 1] = math.inf
    tensor[3] = -math.inf
    if dtype.is_complex:
        tensor[1, 1] = complex(math.nan, math.inf)
        tensor[1, 2] = complex(1.0, math.nan)
    assert exact(tensor)[1] == nonfinite(tensor) == (11 if dtype.is_complex else 9)


def test_the_exact_norm_counts_a_sparse_infinity_that_two_halves_make() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1, 0]]), torch.tensor([3e38, 3e38, 1.0]), (4,), check_invariants=True)
    assert exact(sparse) == (math.inf, 1)


@pytest.mark.parametrize("size", [3, 600, 9000], ids=["packed", "medium", "large"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_does_not_overflow_where_float32_holds_it(dtype: torch.dtype, size: int) -> None:
    value = torch.full((size,), 6e4, dtype=dtype)
    assert_norms(read([torch.zeros(size, dtype=dtype)], [value]), [value])
