"""The fixed sample of each parameter: which elements it holds, what a step did to them, and where nothing is known."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradwatch.capture import weights
from gradwatch.capture.weights import WeightSample
from tests.capture.tensors import DTYPES, made

SIZES = (1, 2, 1023, 1024, 1025, 1100, 2048, 5000, 16_385)


def positions(n: int) -> set[int]:
    """The sample's elements, spelled out: all up to 1024, else 16 chunks of 64, the largest odd number apart that fits."""
    if n <= 1024:
        return set(range(n))
    apart = max(64, max(step for step in range(1, n, 2) if 15 * step + 64 <= n))
    return {i * apart + k for i in range(16) for k in range(64)}


def sampled(tensor: Tensor) -> Tensor:
    """The sample in float64, complex values as pairs."""
    chosen = tensor.detach().reshape(-1)[sorted(positions(tensor.numel()))]
    return torch.view_as_real(chosen).double() if chosen.is_complex() else chosen.double()


def expected_ratio(before: Tensor, after: Tensor) -> float:
    below = float(sampled(before).square().sum())
    above = float((sampled(after) - sampled(before)).square().sum())
    return math.sqrt(above / below) if below > 0 else math.nan


def step(sample: WeightSample, params: list[Tensor], change: Callable[[Tensor], object]) -> tuple[np.ndarray, np.ndarray]:
    """Ratios and changes of all parameters over one step."""
    slots = list(range(len(params)))
    sample.take_before(slots)
    with torch.no_grad():
        for p in params:
            change(p)
    sample.take_after(slots)
    return sample.ratios(slots)


@pytest.mark.parametrize("n", SIZES)
def test_the_sample_holds_exactly_the_elements_of_the_specification(n: int) -> None:
    p = torch.ones(n)
    sample = WeightSample([p])
    inside = positions(n)
    borders = {k + d for k in inside for d in (-1, 1)} | inside | {n - 1, n // 2}
    for k in sorted(borders & set(range(n)))[:: max(1, len(borders) // 300)] + [n - 1, 0]:
        sample.take_before([0])
        p[k] += 1
        sample.take_after([0])
        ratio, changed = sample.ratios([0])
        assert bool(changed[0]) is (k in inside), f"element {k} of {n}"
        assert bool(ratio[0] > 0) is (k in inside)
        p[k] -= 1
        sample.forget()


@pytest.mark.parametrize("n", SIZES)
def test_every_sampled_element_counts(n: int) -> None:
    before = torch.arange(1.0, n + 1)
    p = before.clone()
    (ratio,), (changed,) = step(WeightSample([p]), [p], lambda q: q.mul_(1 + torch.arange(1, n + 1) / n))
    assert ratio == pytest.approx(expected_ratio(before, p), rel=1e-6)
    assert changed


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES[:4]),
    factor=st.sampled_from([1e-4, 0.1, 30.0]),
    seed=st.integers(0, 99),
)
def test_the_ratio_is_that_of_the_sample(shape: tuple[int, ...], dtype: torch.dtype, factor: float, seed: int) -> None:
    p = made(shape, dtype, "contiguous", seed)
    before = p.clone()
    (ratio,), (changed,) = step(WeightSample([p]), [p], lambda q: q.add_(made(shape, dtype, "contiguous", seed + 1) * factor))
    assert ratio == pytest.approx(expected_ratio(before, p), rel=1e-4)
    assert bool(changed) is not torch.equal(sampled(before), sampled(p))


@pytest.mark.parametrize("layout", [(3, 2, 0, 1), (0, 2, 3, 1)], ids=["permuted", "channels-last"])
def test_a_parameter_that_is_not_contiguous_is_sampled_in_the_order_of_its_memory(layout: tuple[int, ...]) -> None:
    memory = torch.ones(tuple((6, 10, 8, 9)[i] for i in layout))
    p = memory.permute([layout.index(i) for i in range(4)])
    assert p.shape == (6, 10, 8, 9)
    assert not p.is_contiguous()
    sample, flat = WeightSample([p]), memory.view(-1)
    for k in (0, 63, 64, 4320 // 16, 4319, 15 * 270 + 63, 15 * 270 + 64):
        sample.take_before([0])
        flat[k] = 2
        sample.take_after([0])
        assert bool(sample.ratios([0])[1][0]) is (k in positions(4320)), k
        flat[k] = 1


@pytest.mark.parametrize("n", [512, 513, 1024, 1025, 2000])
def test_the_elements_of_a_complex_parameter_are_counted_as_such(n: int) -> None:
    p = torch.ones(n, dtype=torch.complex64)
    sample = WeightSample([p])
    for k in sorted({0, 63, 64, 511, n // 16, n // 16 + 63, n - 1} & set(range(n))):
        sample.take_before([0])
        p[k] += 1j
        sample.take_after([0])
        assert bool(sample.ratios([0])[1][0]) is (k in positions(n)), f"element {k} of {n}"
        p[k] -= 1j


def test_several_parameters_of_several_precisions_do_not_mix() -> None:
    params = [made((7, 300), dtype, "contiguous", i) for i, dtype in enumerate(DTYPES)] + [torch.ones(3), torch.ones(2, 2)]
    before = [p.clone() for p in params]
    with torch.no_grad():
        sample = WeightSample(params)
        sample.take_before(range(len(params)))
        for i, p in enumerate(params):
            p.mul_(1 + i / 4)
        sample.take_after(range(len(params)))
        ratio, changed = sample.ratios(range(len(params)))
    np.testing.assert_allclose(ratio, [expected_ratio(b, p) for b, p in zip(before, params, strict=True)], rtol=1e-4)
    assert changed.tolist() == [False, *[True] * (len(params) - 1)]


def test_a_part_of_the_parameters_is_sampled_alone() -> None:
    params = [torch.ones(4), torch.ones(5), torch.ones(6)]
    sample = WeightSample(params)
    sample.take_before([2, 0])
    for p in params:
        p.mul_(2)
    sample.take_after([0, 2])
    ratio, changed = sample.ratios([1, 2, 0])
    assert changed.tolist() == [False, True, True]
    np.testing.assert_allclose(ratio, [math.nan, 1.0, 1.0])


def test_the_first_look_before_a_step_is_not_overwritten_by_a_look_at_others() -> None:
    params = [torch.ones(4), torch.ones(5)]
    sample = WeightSample(params)
    sample.take_before([0])
    params[0].mul_(3)
    sample.take_before([1])
    params[1].mul_(2)
    sample.take_after([0, 1])
    np.testing.assert_allclose(sample.ratios([0, 1])[0], [2.0, 1.0])


@pytest.mark.parametrize(
    ("value", "change", "ratio", "changed"),
    [
        pytest.param([0.0, 0.0], lambda p: p.add_(1), math.nan, True, id="was-zero"),
        pytest.param([0.0, 0.0], lambda p: p.mul_(1), math.nan, False, id="stays-zero"),
        pytest.param([3.0, 4.0], lambda p: p.mul_(1), 0.0, False, id="unchanged"),
        pytest.param([3.0, 4.0], lambda p: p.zero_(), 1.0, True, id="zeroed"),
        pytest.param([1.0, 1.0], lambda p: p.add_(1e-9), 0.0, False, id="rounded-away"),
        pytest.param([1e-30, 1e-30], lambda p: p.mul_(1.5), 0.5, True, id="tiny"),
        pytest.param([1e30, 1e30], lambda p: p.mul_(1.5), 0.5, True, id="huge"),
        pytest.param([1.0, math.nan], lambda p: p.mul_(1), math.nan, False, id="nan-stays"),
        pytest.param([1.0, 2.0], lambda p: p.mul_(math.nan), math.nan, True, id="nan-comes"),
        pytest.param([math.nan, math.nan], lambda p: p.fill_(1.0), math.nan, True, id="nan-goes"),
    ],
)
def test_what_a_step_did(value: list[float], change: Callable[[Tensor], object], ratio: float, changed: bool) -> None:
    p = torch.tensor(value)
    got, moved = step(WeightSample([p]), [p], change)
    np.testing.assert_allclose(got, [ratio], rtol=1e-6)
    assert moved.tolist() == [changed]


def test_nothing_is_known_before_a_look_and_after_forgetting() -> None:
    p = torch.ones(4)
    sample = WeightSample([p])
    for _ in range(2):
        p.mul_(2)
        sample.take_after([0])
        ratio, changed = sample.ratios([0])
        assert math.isnan(ratio[0])
        assert not changed[0]
        assert not sample.moved([0])
        sample.take_before([0])
        assert sample.taken.tolist() == [True]
        sample.forget()
        assert sample.taken.tolist() == [False]


WITHOUT_A_SAMPLE = {
    "empty": lambda: torch.zeros(0, 3),
    "meta": lambda: torch.zeros(3, device="meta"),
    "lazy": nn.UninitializedParameter,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "expanded": lambda: torch.ones(1).expand(8),
    "with-gaps": lambda: torch.ones(8, 2)[:, 0],
    "integer": lambda: torch.ones(3, dtype=torch.long),
}


@pytest.mark.parametrize("make", WITHOUT_A_SAMPLE.values(), ids=WITHOUT_A_SAMPLE)
def test_what_has_no_dense_memory_has_no_sample_and_disturbs_no_other(make: Callable[[], Tensor]) -> None:
    params = [torch.ones(3), make(), torch.ones(5)]
    sample = WeightSample(params)
    sample.take_before([0, 1, 2])
    for p in (params[0], params[2]):
        p.mul_(2)
    sample.take_after([0, 1, 2])
    ratio, changed = sample.ratios([0, 1, 2])
    np.testing.assert_allclose(ratio, [1.0, math.nan, 1.0])
    assert changed.tolist() == [True, False, True]
    assert sample.moved([0, 2])


# -- moved by hand -----------------------------------------------------------------------------------------------------------------


def subtract(p: nn.Parameter) -> None:
    with torch.no_grad():
        p -= 0.1


MOVES: dict[str, Callable[[nn.Parameter], object]] = {
    "in-place": subtract,
    "data-in-place": lambda p: p.data.sub_(0.1),
    "data-replaced": lambda p: setattr(p, "data", p.data - 0.1),
    "through-numpy": lambda p: p.data.numpy().__isub__(0.1),
    "set-to-nan": lambda p: p.data.fill_(math.nan),
}

STAYS: dict[str, Callable[[nn.Parameter], object]] = {
    "nothing": lambda p: None,
    "data-copied": lambda p: setattr(p, "data", p.data.clone()),
    "times-one": lambda p: p.data.mul_(1),
}


@pytest.mark.parametrize("n", [5, 5000], ids=["whole", "chunks"])
@pytest.mark.parametrize(
    ("move", "moves"), [*((m, True) for m in MOVES.values()), *((m, False) for m in STAYS.values())], ids=[*MOVES, *STAYS]
)
def test_whether_a_weight_has_moved(move: Callable[[nn.Parameter], object], moves: bool, n: int) -> None:
    p, other = nn.Parameter(torch.randn(n)), nn.Parameter(torch.randn(3))
    sample = WeightSample([other, p])
    sample.take_before([0, 1])
    move(p)
    assert sample.moved([1]) is moves
    assert sample.moved([0, 1]) is moves
    assert sample.moved([0]) is False
    assert sample.moved([]) is False


def test_memory_that_was_exchanged_between_the_looks_is_compared_all_the_same() -> None:
    """`load_state_dict(assign=True)`, `.to()` and FSDP give a parameter other memory; what was seen before stays seen."""
    p, q = nn.Parameter(torch.ones(2000)), nn.Parameter(torch.ones(5))
    sample = WeightSample([p, q])
    sample.take_before([0, 1])
    p.data = torch.full((2000,), 1.5)
    sample.take_after([0, 1])
    ratio, changed = sample.ratios([0, 1])
    np.testing.assert_allclose(ratio, [0.5, 0.0])
    assert changed.tolist() == [True, False]


def test_a_precision_that_changed_between_the_looks_is_not_compared() -> None:
    p, q = nn.Parameter(torch.ones(20)), nn.Parameter(torch.ones(5))
    sample = WeightSample([p, q])
    sample.take_before([0, 1])
    p.data = torch.full((20,), 1.5, dtype=torch.float64)
    q.data.mul_(2)
    sample.take_after([0, 1])
    ratio, _ = sample.ratios([0, 1])
    assert math.isnan(ratio[0])
    assert not math.isinf(ratio[1])


def test_looking_changes_nothing() -> None:
    params = [nn.Parameter(made((7, 300), dtype, "contiguous")) for dtype in DTYPES]
    before = [(p.detach().clone(), p._version) for p in params]
    sample = WeightSample(params)
    sample.take_before(range(6))
    sample.take_after(range(6))
    sample.moved(range(6))
    for p, (value, version) in zip(params, before, strict=True):
        assert torch.equal(p.detach(), value)
        assert p._version == version
        assert p.grad_fn is None
        assert p.requires_grad


def test_a_look_inside_inference_mode_serves_outside_of_it() -> None:
    p = nn.Parameter(torch.ones(3))
    sample = WeightSample([p])
    with torch.inference_mode():
        sample.take_before([0])
    p.data.mul_(2)
    sample.take_after([0])
    assert sample.ratios([0])[0].tolist() == [1.0]


# -- compared whole ----------------------------------------------------------------------------------------------------------------


def held(params: list[Tensor]) -> WeightSample:
    """A sample of parameters that have gradients: what has none is copied by nobody."""
    for p in params:
        if p.grad is None and p.layout is torch.strided:
            p.grad = torch.zeros_like(p)
    return WeightSample(params)


def compared(
    sample: WeightSample, params: list[Tensor], change: Callable[[], object] = lambda: None
) -> tuple[list[int], list[int]]:
    """What is known to be the same, and to differ, after one step of all."""
    slots = list(range(len(params)))
    sample.take_before(slots)
    with torch.no_grad():
        change()
    sample.take_after(slots)
    _, changed = sample.ratios(slots)
    found = sample.same(slots, changed)
    sample.forget()
    assert not sample._copies
    return found


@pytest.mark.parametrize("n", [1, 2, 1024])
def test_what_is_sampled_whole_is_the_same_at_once(n: int) -> None:
    p = torch.ones(n)
    sample = held([p])
    assert compared(sample, [p]) == ([0], [])
    assert compared(sample, [p], lambda: p[-1:].add_(1)) == ([], [])
    assert compared(sample, [p]) == ([0], [])


@pytest.mark.parametrize("n", [1025, 5000, 3_000_000])
def test_what_is_sampled_in_part_is_compared_once_it_is_suspicious(n: int) -> None:
    p = torch.ones(n)
    sample = held([p])
    assert [compared(sample, [p]) for _ in range(4)] == [([], []), ([], []), ([0], []), ([0], [])]
    p[0] = 2  # in the sample, between two steps: that is no step
    assert compared(sample, [p]) == ([0], [])
    assert compared(sample, [p], lambda: p[0].add_(1)) == ([], [])
    assert [compared(sample, [p]) for _ in range(3)] == [([], []), ([], []), ([0], [])]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 6000), where=st.floats(0, 1, exclude_max=True), every=st.integers(1, 4))
def test_it_is_never_the_same_when_one_element_changed(n: int, where: float, every: int) -> None:
    """Wherever that is: in a chunk, between two, behind the last."""
    p = torch.ones(n)
    sample = held([p])
    for i in range(1, 9):
        same, differ = compared(sample, [p], lambda i=i: p[int(where * n)].add_(i % every == 0))  # type: ignore[misc]
        if i % every == 0:
            assert same == []
        else:
            assert differ == []


@settings(max_examples=40, deadline=None)
@given(row=st.integers(0, 499), kept=st.integers(3, 6))
def test_a_row_of_a_large_table_that_changed_is_found(row: int, kept: int) -> None:
    table = nn.Embedding(500, 8, sparse=True)
    params: list[Tensor] = [table.weight]
    optimizer = torch.optim.SGD(params, lr=0.1)
    table(torch.tensor([0])).sum().backward()
    sample = WeightSample(params)
    for _ in range(kept):
        found = compared(sample, params)
    assert found == ([0], [])
    optimizer.zero_grad()
    table(torch.tensor([row])).sum().backward()
    inside = bool(positions(4000) & set(range(8 * row, 8 * row + 8)))
    assert compared(sample, params, optimizer.step) == ([], [] if inside else [0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [7, 3000])
def test_every_precision_is_compared(dtype: torch.dtype, n: int) -> None:
    p = made((n,), dtype, "contiguous")
    sample = held([p])
    assert [compared(sample, [p]) for _ in range(3)][-1] == ([0], [])
    # 1e-9 is rounded away but in float64.
    same = compared(sample, [p], lambda: p.mul_(1 + 1e-9)) == ([0], [])
    assert same is (dtype not in (torch.float64, torch.complex128))
    last = n - 1
    with torch.no_grad():
        assert compared(sample, [p], lambda: p[last].mul_(2))[0] == []


def test_complex_elements_are_counted_once() -> None:
    small, large = torch.ones(1024, dtype=torch.complex64), torch.ones(2048, dtype=torch.complex64)
    params = [small, large]
    sample = held(params)
    assert [compared(sample, params) for _ in range(3)] == [([0], []), ([0], []), ([0, 1], [])]
    outside = min(set(range(2048)) - positions(2048))
    assert compared(sample, params, lambda: large[outside].add_(1j)) == ([0], [1])


@pytest.mark.parametrize("layout", ["transposed", "with-gaps", "expanded"])
def test_every_layout_is_compared(layout: str) -> None:
    p = {
        "transposed": lambda: torch.ones(50, 60).t(),
        "with-gaps": lambda: torch.ones(3000, 2)[:, 0],
        "expanded": lambda: torch.ones(1).expand(3000),
    }[layout]()
    p.grad = torch.zeros(p.shape)
    sample = WeightSample([p])
    assert [compared(sample, [p]) for _ in range(4)][-1] == ([0], [])
    if layout == "with-gaps":
        assert compared(sample, [p], lambda: p[1777].add_(1)) == ([], [0])
    if layout == "transposed":
        assert compared(sample, [p], lambda: p.view(60, 50).add_(0) if p.is_contiguous() else p[3, 49].add_(1))[0] == []


@pytest.mark.parametrize("make", WITHOUT_A_SAMPLE.values(), ids=WITHOUT_A_SAMPLE)
def test_what_cannot_be_compared_is_neither_and_disturbs_no_other(make: Callable[[], Tensor]) -> None:
    strange, p = make(), torch.ones(3000)
    if strange.layout is torch.sparse_coo:
        strange.grad = strange.clone()  # and so it is suspicious
    held([p])
    sample = WeightSample([strange, p])
    found = [compared(sample, [strange, p]) for _ in range(4)]
    assert all(differ == [] for _, differ in found)
    assert found[-1][0] in ([1], [0, 1])
    assert 0 not in found[-1][0] or strange.layout is torch.strided


@pytest.mark.parametrize("n", [5, 3000])
def test_what_is_not_a_number_is_neither_the_same_nor_changed(n: int) -> None:
    p = torch.full((n,), math.nan)
    sample = held([p])
    for _ in range(5):
        slots = [0]
        sample.take_before(slots)
        sample.take_after(slots)
        _, changed = sample.ratios(slots)
        # The recorder, which knows the norm, says of a sample of such numbers that it cannot be compared.
        assert sample.same(slots, changed | True) == ([], [])
        sample.forget()


def test_a_single_nan_outside_the_sample_is_neither() -> None:
    p = torch.ones(3000)
    p[100] = math.nan
    assert 100 not in positions(3000)
    sample = held([p])
    for _ in range(7):
        assert compared(sample, [p]) == ([], [])


@pytest.mark.parametrize("n", [5, 3000])
def test_zeros_that_stay_are_the_same(n: int) -> None:
    p = torch.zeros(n)
    sample = held([p])
    assert [compared(sample, [p]) for _ in range(3)][-1] == ([0], [])
    assert compared(sample, [p], lambda: p[n // 30].add_(1))[0] == []


def test_without_a_look_before_nothing_is_compared() -> None:
    p, q = torch.ones(3000), torch.ones(4)
    sample = held([p, q])
    for _ in range(4):
        sample.take_before([0])
        sample.take_after([0, 1])
        _, changed = sample.ratios([0, 1])
        same, differ = sample.same([0, 1], changed)
        sample.forget()
    assert (same, differ) == ([0], [])
    # What was not looked at does not count on: it is suspicious only after two more.
    sample.take_after([0])
    assert sample.same([0], np.array([False])) == ([], [])
    assert [compared(sample, [p, q]) for _ in range(3)] == [([1], []), ([1], []), ([1, 0], [])]


def test_frozen_parameters_and_those_that_nothing_reaches_are_not_copied() -> None:
    p, frozen = torch.ones(3000), torch.ones(3000)
    held([p])
    sample = WeightSample([p, frozen])
    assert [compared(sample, [p, frozen]) for _ in range(4)][-1] == ([0], [])
    sample.take_before([0, 1])
    assert sample._copies.keys() == {0}


def test_copies_are_bounded_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "AT_ONCE", 6500)
    params = [torch.ones(3000) for _ in range(5)] + [torch.ones(7000), torch.ones(3)]
    sample = held(params)
    seen: list[list[int]] = []
    for _ in range(14):
        sample.take_before(range(7))
        assert sum(copy.numel() for copy in sample._copies.values()) <= 6500
        sample.take_before([0, 1])  # a second look, before another optimizer's step
        assert sum(copy.numel() for copy in sample._copies.values()) <= 6500
        sample.take_after(range(7))
        same, differ = sample.same(range(7), sample.ratios(range(7))[1])
        assert differ == []
        seen.append(sorted(set(same) - {6}))
        assert 6 in same, "small ones need no copy"
        sample.forget()
    assert seen[:2] == [[], []]
    assert all(len(same) == 2 for same in seen[2:])
    counts = [sum(slot in same for same in seen) for slot in range(6)]
    assert max(counts[:5]) - min(counts[:5]) <= 1
    assert counts[5] == 0, "too large to be copied at all"


def test_the_bound_is_64_megabytes() -> None:
    assert weights.AT_ONCE * 4 == 64 * 2**20


@pytest.mark.parametrize(
    ("exchange", "same"),
    [
        pytest.param(lambda p: p.data.clone(), True, id="moved"),
        pytest.param(lambda p: p.data + 1, False, id="other-values"),
        pytest.param(lambda p: torch.cat((p.data[:-1], torch.tensor([7.0]))), False, id="other-last-value"),
        pytest.param(lambda p: p.data.double(), False, id="other-precision"),
        pytest.param(lambda p: p.data.bfloat16(), False, id="shorter-precision"),
        pytest.param(lambda p: p.data[:2000].clone(), False, id="other-shape"),
    ],
)
def test_a_parameter_that_was_exchanged_in_a_step_is_compared_if_that_can_be(
    exchange: Callable[[Tensor], Tensor], same: bool
) -> None:
    p = nn.Parameter(torch.ones(3000))
    sample = held([p])
    assert [compared(sample, [p]) for _ in range(3)][-1] == ([0], [])
    p.grad = None  # its type is checked against that of the data
    p.data = p.data.clone()
    p.grad = torch.zeros(3000)

    def change() -> None:
        p.grad = None
        p.data = exchange(p)

    assert compared(sample, [p], change)[0] == ([0] if same else [])
    p.grad = torch.zeros_like(p)
    assert [compared(sample, [p]) for _ in range(4)][-1] == ([0], [])


def test_copies_are_gone_with_the_update() -> None:
    p = torch.ones(3000)
    sample = held([p])
    for _ in range(2):
        compared(sample, [p])
    sample.take_before([0])
    copy = weakref.ref(sample._copies[0])
    sample.take_after([0])
    assert sample.same([0], np.array([False])) == ([0], [])
    sample.forget()
    gc.collect()
    assert copy() is None, "compared, and gone"
    sample.take_before([0])
    copy = weakref.ref(sample._copies[0])
    sample.forget()
    gc.collect()
    assert copy() is None, "the update was given up, and it is gone"


def test_a_second_step_in_an_update_is_compared_with_what_was_before_the_first() -> None:
    p = torch.ones(3000)
    sample = held([p])
    for _ in range(2):
        compared(sample, [p])
    sample.take_before([0])
    for expected in (([0], []), ([], [0])):
        sample.take_after([0])
        assert sample.same([0], sample.ratios([0])[1]) == expected
        p[100] = 2
    assert 100 not in positions(3000)
