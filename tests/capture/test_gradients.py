"""What `p.grad` holds: who was reached, what was read, cleared, left over or scaled, by any way a user may have of doing it."""

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

from gradwatch.capture.gradients import PROBES, UNCHANGED, Gradients
from gradwatch.capture.norms import NormReader
from tests.capture.tensors import DTYPES, made, nonfinite, norm


def watched(*params: Tensor) -> Gradients:
    return Gradients(params, NormReader(params))


def several(count: int = 4, size: int = 3) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(size)) for _ in range(count)]


def backward(gradients: Gradients, run: Callable[[], object]) -> list[int]:
    """A backward, told: the slots it reached."""
    gradients.begin()
    run()
    return gradients.end()


def total(*params: Tensor) -> Tensor:
    """A loss whose gradient is 2 for each element."""
    return sum(((p * 2).sum() for p in params), torch.zeros(()))


# -- reached -----------------------------------------------------------------------------------------------------------------------


def test_who_got_a_gradient_is_reached_new_or_accumulated() -> None:
    a, b, c, d = several()
    gradients = watched(a, b, c, d)
    assert backward(gradients, total(a, c).backward) == [0, 2]
    assert backward(gradients, total(c, d).backward) == [2, 3]
    assert backward(gradients, total(a, b, c, d).backward) == [0, 1, 2, 3]
    assert backward(gradients, total(b).backward) == [1]
    assert backward(gradients, lambda: None) == []


def test_all_of_them_are_the_same_list_each_time() -> None:
    params = several()
    gradients = watched(*params)
    for _ in range(2):
        assert backward(gradients, total(*params).backward) is gradients.everything
        for p in params:
            p.grad = None


def keep(p: Tensor) -> None:
    """Leave the gradient."""


def to_none(p: Tensor) -> None:
    """`set_to_none=True`."""
    p.grad = None


def zero(p: Tensor) -> None:
    """`set_to_none=False`."""
    assert p.grad is not None
    p.grad.zero_()


def zero_data(p: Tensor) -> None:
    """The older form, which moves no version."""
    assert p.grad is not None
    p.grad.data.zero_()


def replace(p: Tensor) -> None:
    """Another tensor."""
    p.grad = torch.ones_like(p)


CLEARING = pytest.mark.parametrize("clear", [keep, to_none, zero, zero_data, replace], ids=lambda clear: clear.__name__)


@CLEARING
def test_reached_does_not_depend_on_how_gradients_were_cleared(clear: Callable[[Tensor], None]) -> None:
    a, b = several(2)
    gradients = watched(a, b)
    backward(gradients, total(a, b).backward)
    for p in (a, b):
        clear(p)
    assert backward(gradients, total(b).backward) == [1]


def test_a_gradient_of_zeros_reaches() -> None:
    a, b = several(2)
    gradients = watched(a, b)
    for _ in range(2):
        assert backward(gradients, (a * 0).sum().backward) == [0]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_gradient_with_a_graph_reaches() -> None:
    (a,) = several(1)
    gradients = watched(a)
    for _ in range(2):
        assert backward(gradients, lambda: (a**3).sum().backward(create_graph=True)) == [0]
    gradients.read([0])
    assert gradients.norm[0] == pytest.approx(norm(a.grad))  # type: ignore[arg-type]
    a.grad = None


def test_a_sparse_gradient_reaches() -> None:
    table = nn.Embedding(10, 3, sparse=True)
    gradients = watched(table.weight)
    for _ in range(2):
        assert backward(gradients, table(torch.tensor([1, 1, 2])).sum().backward) == [0]
    gradients.read([0])
    assert gradients.norm[0] == pytest.approx(norm(table.weight.grad))  # type: ignore[arg-type]


def test_a_gradient_that_a_hook_consumed_is_gone() -> None:
    a, b = several(2)
    gradients = watched(a, b)
    handle = a.register_post_accumulate_grad_hook(to_none)
    assert backward(gradients, total(a, b).backward) == [1]
    handle.remove()


def test_what_a_failed_backward_left_belongs_to_no_later_one() -> None:
    a, b = several(2)
    gradients = watched(a, b)
    gradients.begin()
    total(a).backward()
    gradients.fail()
    assert backward(gradients, total(b).backward) == [1]


# -- read --------------------------------------------------------------------------------------------------------------------------

values = st.one_of(
    st.floats(-1e3, 1e3, width=32),
    st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e30, 1e-20, 1e-30, 1e-44, 0.0]),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=8), st.sampled_from([3, 600, 9000]))
def test_norms_and_counts_are_true_whatever_was_read_before(history: list[list[float]], size: int) -> None:
    """A finite overflow has its true norm and count 0, an underflow is no zero, and a bad gradient leaves no trace in the next."""
    a, b = nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(2))
    gradients = watched(a, b)
    b.grad = torch.tensor([3.0, 4.0])
    for content in history:
        a.grad = torch.zeros(size)
        a.grad[:3] = torch.tensor(content)
        gradients.read([0, 1])
        bad = nonfinite(a.grad)
        assert gradients.nonfinite.tolist() == [bad, 0]
        if bad:
            assert not math.isfinite(gradients.norm[0])
        else:
            assert gradients.norm[0] == pytest.approx(math.hypot(*a.grad[:3].tolist()), rel=1e-5, abs=0)
        assert gradients.norm[1] == 5.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(0, 3), min_size=1), st.integers(0, 3)), max_size=10))
def test_reading_some_leaves_what_was_read_of_the_others(reads: list[tuple[set[int], int]]) -> None:
    params = several(4)
    gradients = watched(*params)
    expected_norm, expected_bad = np.full(4, np.nan), np.zeros(4)
    for turn, (slots, bad) in enumerate(reads):
        for slot in slots:
            params[slot].grad = torch.full((3,), float(turn + 1))
            params[slot].grad[:bad] = math.inf if slot % 2 else 1.0  # type: ignore[index]
            expected_bad[slot] = bad if slot % 2 else 0
            expected_norm[slot] = norm(params[slot].grad)  # type: ignore[arg-type]
        gradients.read(sorted(slots))
        np.testing.assert_array_equal(gradients.nonfinite, expected_bad)
        fine = np.isfinite(expected_norm)
        np.testing.assert_allclose(gradients.norm[fine], expected_norm[fine], rtol=1e-6)
        assert not np.isfinite(gradients.norm[~fine]).any()


def test_a_gradient_that_is_gone_is_not_read() -> None:
    a, b, c = several(3)
    gradients = watched(a, b, c)
    a.grad, c.grad = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([0.0, 0.0, 2.0])
    gradients.read([0, 1, 2])
    np.testing.assert_equal(gradients.norm, [5.0, np.nan, 2.0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_precision_is_read_and_looked_at_again(dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (0, 3, 600, 9000)]
    gradients = watched(*params)
    for p in params:
        p.grad = made(tuple(p.shape), dtype, "contiguous", p.numel())
    gradients.read([0, 1, 2, 3])
    np.testing.assert_allclose(gradients.norm, [norm(p.grad) for p in params], rtol=1e-4)  # type: ignore[arg-type]
    probes = gradients.probes([0, 1, 2, 3])
    assert set(probes) <= {1, 2, 3}
    assert gradients.scaled_since(probes).tolist() == [1.0] * len(probes), "nobody has touched them"
    assert not gradients.cleared([1, 2, 3])
    assert gradients.held(range(4)) <= {1, 2, 3}
    for p in params:
        p.grad.mul_(0.5)  # type: ignore[union-attr]
    np.testing.assert_allclose(gradients.scaled_since(probes), 0.5, rtol=1e-2 if dtype is torch.bfloat16 else 1e-3)


LAZY: dict[str, Callable[[int], Tensor]] = {
    "conjugated": lambda size: made((size,), torch.complex64, "contiguous").conj(),
    "imaginary-part-of-conjugated": lambda size: made((size,), torch.complex64, "contiguous").conj().imag,
}


@pytest.mark.parametrize("make", LAZY.values(), ids=LAZY)
@pytest.mark.parametrize("size", [3, 600, 9000], ids=["packed", "medium", "large"])
def test_a_gradient_that_is_a_lazy_view_is_read(size: int, make: Callable[[int], Tensor]) -> None:
    """As `torch.autograd.grad` gives them where complex numbers are in between: conjugated or negated in name only."""
    value = make(size)
    assert value.is_conj() or value.is_neg()
    p = nn.Parameter(torch.zeros(size, dtype=value.dtype))
    gradients = watched(p)
    p.grad = value
    assert gradients.held([0]) == {0}
    assert not gradients.cleared([0])
    gradients.read([0])
    assert gradients.norm[0] == pytest.approx(norm(value), rel=1e-4)
    assert gradients.scaled_since([0]).tolist() == [1.0]


def test_no_gradient_is_kept_alive() -> None:
    a, b = several(2)
    gradients = watched(a, b)
    for _ in range(3):
        backward(gradients, total(a, b).backward)
        gradients.read([0, 1])
        gradients.held([0, 1])
        gradients.scaled_since(gradients.probes([0, 1]))
        gradients.used([0, 1])
        backward(gradients, total(b).backward)
        refs = [weakref.ref(p.grad) for p in (a, b) if p.grad is not None]
        a.grad = b.grad = None
        gc.collect()
        assert [ref() for ref in refs] == [None, None]


def test_room_is_made_for_parameters_that_come() -> None:
    params = several(2)
    gradients = watched(*params)
    backward(gradients, total(*params).backward)
    gradients.read([0, 1])
    params += several(1)
    gradients.resize(params, NormReader(params))
    np.testing.assert_equal(np.isnan(gradients.norm), [False, False, True])
    assert gradients.everything == [0, 1, 2]
    assert backward(gradients, total(params[2]).backward) == [2]
    gradients.read([2])
    assert gradients.norm[2] == pytest.approx(norm(params[2].grad))  # type: ignore[arg-type]


# -- cleared, held, gone -----------------------------------------------------------------------------------------------------------

BLANK: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "zeros": lambda: torch.zeros(100),
    "negative-zeros": lambda: -torch.zeros(100),
    "bf16": lambda: torch.zeros(100, dtype=torch.bfloat16),
    "fp16": lambda: torch.zeros(100, dtype=torch.float16),
    "complex": lambda: torch.zeros(100, dtype=torch.complex64),
    "empty": lambda: torch.zeros(0),
    "sparse-nothing": lambda: torch.zeros(100).to_sparse(),
    "sparse-that-cancels": lambda: torch.sparse_coo_tensor(
        torch.tensor([[1, 1]]), torch.tensor([1.0, -1.0]), (100,), check_invariants=True
    ),
}

FILLED: dict[str, Callable[[], Tensor]] = {
    "ones": lambda: torch.ones(100),
    "last-of-many": lambda: torch.cat((torch.zeros(9999), torch.ones(1))),
    "smallest": lambda: torch.full((100,), 1e-45),
    "nan": lambda: torch.full((100,), math.nan),
    "bf16": lambda: torch.ones(100, dtype=torch.bfloat16),
    "imaginary": lambda: torch.full((100,), 1j, dtype=torch.complex64),
    "transposed": lambda: torch.ones(5, 20).t(),
    "sparse": lambda: torch.ones(100).to_sparse(),
    "with-a-graph": lambda: torch.ones(100, requires_grad=True) * 2,
}


def holding(gradient: Tensor | None) -> Tensor:
    """A parameter with that gradient."""
    p = nn.Parameter(torch.zeros(100) if gradient is None else torch.zeros(gradient.shape, dtype=gradient.dtype))
    p.grad = gradient
    return p


@pytest.mark.parametrize("make", BLANK.values(), ids=BLANK)
def test_none_and_zeros_are_cleared(make: Callable[[], Tensor | None]) -> None:
    gradients = watched(holding(make()), holding(torch.ones(3)))
    assert gradients.cleared([0])
    assert not gradients.cleared([0, 1])
    assert gradients.held([0]) == set()
    assert gradients.held([0, 1]) == {1}


@pytest.mark.parametrize("make", FILLED.values(), ids=FILLED)
def test_anything_else_is_not(make: Callable[[], Tensor]) -> None:
    gradients = watched(holding(None), holding(make()))
    assert not gradients.cleared([0, 1])
    assert gradients.cleared([0])
    assert gradients.cleared([])
    assert gradients.held([0, 1]) == {1}


def test_a_gradient_left_by_an_earlier_backward_is_not_new_in_a_later_one() -> None:
    """A frozen part keeps the gradient of its last backward: an optimizer's step does not make it a new record each time."""
    a, b = several(2)
    gradients = watched(a, b)
    backward(gradients, total(a, b).backward)
    a.grad = None
    backward(gradients, total(a).backward)
    assert 1 not in gradients.held([0, 1])
    b.grad = torch.ones(3)
    assert 1 in gradients.held([0, 1]), "this one nobody has seen"


def test_gone_are_those_without_a_gradient() -> None:
    a, b, c = several(3)
    gradients = watched(a, b, c)
    total(a, b).backward()
    zero(b)
    assert gradients.gone([0, 1, 2]) == [2]
    assert gradients.gone([0]) == []


# -- probes ------------------------------------------------------------------------------------------------------------------------


def test_probes_are_few_and_have_something_to_show() -> None:
    params = several(40)
    gradients = watched(*params)
    backward(gradients, total(*params).backward)
    params[0].grad = torch.full((3,), math.nan)
    params[39].grad = torch.zeros(3)
    gradients.read(gradients.everything)
    probes = gradients.probes(gradients.everything)
    assert len(probes) == PROBES == len(set(probes))
    assert 0 not in probes
    assert 39 not in probes
    assert max(probes) - min(probes) > 30, "spread over the network"
    assert gradients.probes([0, 39]) == []
    assert gradients.probes([]) == []


def test_probes_of_the_same_list_are_chosen_anew_when_their_gradient_became_useless() -> None:
    params = several(8)
    gradients = watched(*params)
    backward(gradients, total(*params).backward)
    gradients.read(gradients.everything)
    first = gradients.probes(gradients.everything)
    for slot in first:
        params[slot].grad = torch.zeros(3)
    gradients.read(gradients.everything)
    second = gradients.probes(gradients.everything)
    assert len(second) == PROBES
    assert not set(first) & set(second)


@pytest.mark.parametrize("factor", [2.0**-16, 0.1, 0.5, 0.999, 1.5, 1024.0, 0.0], ids=str)
def test_a_factor_between_read_and_step_is_found(factor: float) -> None:
    params = [nn.Parameter(torch.ones(size)) for size in (3, 700, 10)]
    gradients = watched(*params)
    backward(gradients, lambda: sum((p**2 * 3).sum() for p in params).backward())  # type: ignore[union-attr]
    gradients.read([0, 1, 2])
    probes = gradients.probes([0, 1, 2])
    for p in params:
        p.grad.mul_(factor)  # type: ignore[union-attr]
    np.testing.assert_allclose(gradients.scaled_since(probes), factor, rtol=1e-5)


def test_what_is_within_rounding_is_exactly_one_and_what_is_gone_is_unknown() -> None:
    a, b, c = several(3)
    gradients = watched(a, b, c)
    backward(gradients, total(a, b, c).backward)
    gradients.read([0, 1, 2])
    a.grad *= 1 + UNCHANGED / 10  # type: ignore[operator, misc]
    b.grad = None
    c.grad.fill_(math.nan)  # type: ignore[union-attr]
    ratios = gradients.scaled_since([0, 1, 2])
    assert ratios[0] == 1.0
    assert np.isnan(ratios[1:]).all()


# -- left over from the step before ------------------------------------------------------------------------------------------------

STALE = {
    # B: backward, S: the owner steps, N: set to None, 0: zero_(), D: data.zero_(), R: replaced; * after S: it used an old gradient
    "cleared-to-none": "BSN BSN BSN",
    "cleared-by-zero": "BS0 BS0 BS0",
    "cleared-by-data": "BSD BSD BSD",
    "cleared-before-backward": "NBS NBS NBS",
    "never-cleared": "BS BS* BS* BS*",
    "forgotten-once": "BSN BS BS*N BSN BS",
    "cleared-between-backward-and-step": "BS B N BS",
    "zeroed-between-backward-and-step": "BS B 0 BS",
    "zeroed-by-data-between-backward-and-step": "BS B D BS",
    "accumulation": "BBS N BBS N BBS",
    "accumulation-never-cleared": "BBS BBS* BBS*",
    "accumulation-cleared-after-the-first": "BS B N B S",
    "stepped-twice": "BS S N BS",
    "stepped-twice-and-never-cleared": "BS S BS*",
    "replaced-before-the-next-backward": "BS R BS",
    "cleared-late": "BS BS* BS* N BS BS*",
}


def act(p: Tensor, what: str) -> None:
    {"N": to_none, "0": zero, "D": zero_data, "R": replace}[what](p)


@pytest.mark.parametrize("script", STALE.values(), ids=STALE)
def test_a_gradient_used_before_and_still_there_is_stale(script: str) -> None:
    p, other = several(2)
    gradients = watched(p, other)
    events = script.replace(" ", "")
    for at, what in enumerate(events):
        if what == "B":
            backward(gradients, total(p).backward)
        elif what == "S":
            expected = [0] if events[at + 1 : at + 2] == "*" else []
            assert gradients.uses_stale([0, 1]) == expected, f"{events[: at + 1]} of {script}"
            gradients.used([0])
        elif what != "*":
            act(p, what)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from("BBSSN0D"), max_size=25))
def test_stale_is_what_the_definition_says(events: list[str]) -> None:
    (p,) = several(1)
    gradients = watched(p)
    used = contains = False  # the gradient is the one that was used; it contains one that was
    for what in events:
        if what == "B":
            contains, used = contains or used, False
            backward(gradients, total(p).backward)
        elif what == "S":
            assert gradients.uses_stale([0]) == ([0] if contains else []), events
            used, contains = p.grad is not None and bool(p.grad.any()), False
            gradients._armed = 3  # for a while it does not look: the next test is about that
            gradients.used([0])
        elif p.grad is not None or what == "N":
            act(p, what)
            used = contains = False


@pytest.mark.parametrize("clean", [1, 2, 3, 4, 10, 50])
def test_a_loop_that_begins_to_forget_is_noticed_at_once(clean: int) -> None:
    (p,) = several(1)
    gradients = watched(p)
    for _ in range(clean):
        backward(gradients, total(p).backward)
        assert gradients.uses_stale([0]) == []
        gradients.used([0])
        p.grad = None
    found = []
    for _ in range(4):
        backward(gradients, total(p).backward)
        found.append(gradients.uses_stale([0]))
        gradients.used([0])
    assert found == [[], [0], [0], [0]]


def test_only_what_its_own_optimizer_used_is_stale() -> None:
    """G's backward leaves gradients in D, which D clears before it uses any: healthy."""
    g, d = several(2)
    gradients = watched(g, d)
    for _ in range(4):
        d.grad = None
        backward(gradients, total(d).backward)
        assert gradients.uses_stale([1]) == []
        gradients.used([1])
        g.grad = None
        backward(gradients, total(g, d).backward)
        assert gradients.uses_stale([0]) == []
        gradients.used([0])
