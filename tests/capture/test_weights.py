"""The fixed sample of each parameter: which elements it holds, what a step did to them, and where nothing is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

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
