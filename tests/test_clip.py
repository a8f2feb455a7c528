"""Clippers against slow references, torch's own functions, timm and properties that hold for any gradient."""

from __future__ import annotations

import copy
import gc
import importlib.util
import io
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch import clip as clippers
from gradwatch.capture import parameters
from gradwatch.clip import (
    AGC,
    AutoClip,
    Clipper,
    GlobalNorm,
    Gradients,
    MedianScaled,
    NormClipper,
    PerLayer,
    PerParameter,
    Value,
    ZClip,
)

NAN, INF = float("nan"), float("inf")
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


# -- gradients to clip, and what they are afterwards -------------------------------------------------------------------------------


def with_gradients(*gradients: Tensor, scale: float = 1.0) -> list[nn.Parameter]:
    """Parameters of normal numbers times `scale` that have these gradients."""
    params = [nn.Parameter(torch.randn(g.shape, dtype=torch.float64).mul(scale).to(g.dtype)) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    return params


def grads(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad.detach().clone() for p in params if p.grad is not None]


def wide(tensor: Tensor) -> NDArray[Any]:
    """In double precision."""
    tensor = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    array: NDArray[Any] = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).numpy()
    return array


def norm(*tensors: Tensor) -> float:
    """2-norm over all of them, in Python's own floats, which neither overflow nor underflow here."""
    return math.hypot(*(abs(x) for tensor in tensors for x in wide(tensor).ravel().tolist()))


def seen(
    params: Sequence[Tensor],
    layers: Sequence[str] | None = None,
    heads: frozenset[int] = frozenset(),
    dtype: torch.dtype = torch.float64,
) -> Gradients:
    """What a watch hands over."""
    norms = torch.tensor([norm(p.grad) for p in params], dtype=dtype)  # type: ignore[arg-type]
    names = [f"p{i}" for i in range(len(params))]
    return Gradients(params, norms, names, layers or [f"layer{i // 2}" for i in range(len(params))], heads)


def of_norm(total: float) -> nn.Parameter:
    """One parameter whose gradient has this norm."""
    return with_gradients(torch.tensor([total], dtype=torch.float64))[0]


def norms_after(clipper: NormClipper, totals: Sequence[float]) -> list[float]:
    """The norm that each update has after clipping."""
    after = []
    for total in totals:
        p = of_norm(total)
        clipper([p])
        after.append(norm(p.grad))  # type: ignore[arg-type]
    return after


def totals(updates: int, seed: int = 0) -> list[float]:
    """Norms of a training: they scatter, fall, and spike now and then."""
    rng = np.random.default_rng(seed)
    usual = np.exp(0.3 * rng.standard_normal(updates)) * (1 + 3 * np.exp(-np.arange(updates) / 20))
    found: list[float] = np.where(rng.random(updates) < 0.05, 30 * usual, usual).tolist()
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and np.asarray(wide(one)).tobytes() == np.asarray(wide(other)).tobytes()


# -- as torch does it --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1e-3, 0.1, 1.0, 7.5])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in HALF], ids=str)
def test_the_global_norm_is_bit_equal_to_torchs(dtype: torch.dtype, max_norm: float) -> None:
    values = [torch.randn(shape, dtype=dtype) for shape in [(30, 41), (100,), (), (0,), (3, 4, 5)]]
    mine, theirs = with_gradients(*values), with_gradients(*values)
    total = clip_grad_norm_(theirs, max_norm)
    assert total > max_norm
    factor = GlobalNorm(max_norm)(iter(mine))
    assert all(torch.equal(one, other) for one, other in zip(grads(mine), grads(theirs), strict=True))
    assert factor.shape == ()
    assert float(factor) == pytest.approx(max_norm / float(total), rel=1e-2 if max_norm < 1e-2 else 1e-5)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
def test_the_global_norm_of_norms_handed_over_is_bit_equal_to_torchs(dtype: torch.dtype) -> None:
    values = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in [(30, 41), (100,), ()]]
    mine, theirs = with_gradients(*values), with_gradients(*values)
    precision = torch.float64 if dtype is torch.float64 else torch.float32
    for max_norm in (5.0, 3.3, 2.1, 0.7, 0.123, 0.07, 0.011):
        handed = seen(mine)
        clip_grads_with_norm_(theirs, max_norm, torch.linalg.vector_norm(handed.norms).to(precision))
        GlobalNorm(max_norm).clip(handed)
        assert all(torch.equal(one, other) for one, other in zip(grads(mine), grads(theirs), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_values_are_bit_equal_to_torchs(dtype: torch.dtype) -> None:
    values = [torch.randn(shape).to(dtype) for shape in [(30, 41), (100,), ()]]
    mine, theirs = with_gradients(*values), with_gradients(*values)
    clip_grad_value_(theirs, 0.3)
    assert math.isnan(Value(0.3)(mine)), "which factor that was for a norm is not known"
    assert all(torch.equal(one, other) for one, other in zip(grads(mine), grads(theirs), strict=True))


def test_each_parameter_is_clipped_as_torch_clips_it_alone() -> None:
    values = [torch.randn(30, 41), torch.randn(100) * 1e-3, torch.randn(()) * 50]
    mine, theirs = with_gradients(*values), with_gradients(*values)
    factor = PerParameter(1.0)(mine)
    for p in theirs:
        clip_grad_norm_([p], 1.0)
    for one, other in zip(grads(mine), grads(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=3e-7, atol=0)
    assert float(factor) == pytest.approx(1 / max(map(norm, values)), rel=1e-5)
    assert torch.equal(mine[1].grad, values[1])  # type: ignore[arg-type]


# -- as the references do it -------------------------------------------------------------------------------------------------------


def test_a_layer_is_clipped_as_a_whole() -> None:
    values = [torch.randn(3, 4) * 5, torch.randn(3) * 0.01, torch.randn(4), torch.randn(2, 2) * 1e-3, torch.randn(2) * 1e-3]
    layers = ["a", "a", "b", "c", "b"]
    params = with_gradients(*values)
    clipper = PerLayer(0.5)
    factor = clipper.clip(seen(params, layers))
    factors = []
    for value, after, layer in zip(values, grads(params), layers, strict=True):
        whole = math.sqrt(sum(float((wide(v) ** 2).sum()) for v, other in zip(values, layers, strict=True) if other == layer))
        factors.append(min(1.0, 0.5 / whole))
        np.testing.assert_allclose(wide(after), wide(value) * factors[-1], rtol=2e-6)
    assert float(factor) == pytest.approx(min(factors), rel=2e-6)
    # Another order and other layers afterwards: the plan that is kept belongs to the layers that were there.
    again = with_gradients(*values)
    clipper.clip(seen(again, ["a", "b", "b", "b", "b"]))
    assert norm(*grads(again)[1:]) == pytest.approx(0.5, rel=1e-5)
    assert norm(grads(again)[0]) == pytest.approx(0.5, rel=1e-5)


def test_without_a_watch_layers_are_those_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 2)))
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 9
    PerLayer(0.5, model=model)(model.parameters())
    for layer in (model[0], model[1][0]):  # type: ignore[index]
        assert norm(*grads(list(layer.parameters()))) == pytest.approx(0.5, rel=1e-5)


def units(weight: NDArray[Any], transposed: int = 0) -> Iterator[tuple[Any, ...]]:
    """Indices of the units of a weight, one by one."""
    if sum(size > 1 for size in weight.shape) <= 1:
        yield (...,)
    elif not transposed:
        yield from ((i,) for i in range(weight.shape[0]))
    else:
        each = weight.shape[0] // transposed
        yield from ((slice(g * each, (g + 1) * each), j) for g in range(transposed) for j in range(weight.shape[1]))


def adaptively_clipped(weight: Tensor, gradient: Tensor, clip_factor: float, eps: float, transposed: int = 0) -> NDArray[Any]:
    """AGC, by loops."""
    w, g = wide(weight).copy(), wide(gradient).copy()
    for unit in units(w, transposed):
        bound = clip_factor * max(math.sqrt((np.abs(w[unit]) ** 2).sum()), eps)
        size = math.sqrt((np.abs(g[unit]) ** 2).sum())
        if math.isfinite(size) and size > bound:
            g[unit] *= bound / size
    return g


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_unit_is_clipped_to_a_fraction_of_its_weights(dtype: torch.dtype, strided: bool) -> None:
    shapes = [(5, 4), (6, 3, 3, 3), (4, 2, 5), (7,), (), (8, 1, 3, 3), (1, 6), (6, 1), (1, 3, 1, 1), (0, 4), (2, 3, 2, 2, 2)]
    values = [(torch.randn(shape, dtype=torch.float64) * 0.1 * 4 ** (i % 3)).to(dtype) for i, shape in enumerate(shapes)]
    params = with_gradients(*values)
    with torch.no_grad():
        params[0][:2] = 0  # these move by eps
    for p in params if strided else ():
        p.grad = torch.stack((p.grad, p.grad), -1)[..., 0]  # type: ignore[arg-type]
    factor = AGC(0.05, eps=0.01).clip(seen(params))
    smallest = 1.0
    for p, before in zip(params, values, strict=True):
        expected = adaptively_clipped(p, before, 0.05, 0.01)
        tolerance = max(4 * torch.finfo(dtype).eps, 2e-6)
        np.testing.assert_allclose(wide(p.grad), expected, rtol=tolerance, atol=1e-7)  # type: ignore[arg-type]
        for unit in units(wide(before)) if before.numel() else ():
            smallest = min(smallest, np.abs(expected[unit]).sum() / np.abs(wide(before)[unit]).sum())
    assert float(factor) == pytest.approx(smallest, rel=1e-5)
    assert smallest < 0.9


def timms() -> Callable[..., None]:
    """timm's function, from its file: timm itself cannot be imported without torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed")
    inner = importlib.util.spec_from_file_location("timm_agc", Path(spec.origin).parent / "utils" / "agc.py")
    assert inner is not None
    assert inner.loader is not None
    module = importlib.util.module_from_spec(inner)
    inner.loader.exec_module(module)
    function: Callable[..., None] = module.adaptive_clip_grad
    return function


def test_units_are_clipped_as_timm_clips_them() -> None:
    adaptive_clip_grad = timms()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 4 * 4, 5))
    other = copy.deepcopy(model)
    for scale in (1e-4, 1.0, 100.0):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn_like(p) * scale
            q.grad = p.grad.clone()
        AGC()(model.parameters())
        adaptive_clip_grad(other.parameters())
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d], ids=lambda kind: kind.__name__)
def test_the_units_of_a_transposed_convolution_are_its_outputs(kind: Callable[..., nn.Module], groups: int) -> None:
    layer = kind(4, 8, 2, groups=groups)
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    assert weight.shape[:2] == (4, 8 // groups)
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    before = weight.grad.clone()  # type: ignore[union-attr]
    AGC(model=layer)(layer.parameters())
    np.testing.assert_allclose(wide(weight.grad), adaptively_clipped(weight, before, 0.01, 1e-3, groups), rtol=2e-6)  # type: ignore[arg-type]
    assert len(list(units(wide(before), groups))) == 8


def test_the_last_layer_and_what_is_excluded_are_left_alone() -> None:
    values = [torch.randn(3, 4), torch.randn(3), torch.randn(5, 3), torch.randn(5)]
    params = with_gradients(*values)
    AGC(exclude=("p[01]",)).clip(seen(params, heads=frozenset({2})))
    assert [torch.equal(p.grad, v) for p, v in zip(params, values, strict=True)] == [True, True, True, False]  # type: ignore[arg-type]


def test_patterns_go_by_the_names_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = grads(list(model.parameters()))
    AGC(exclude=["1.*"], model=model)(model.parameters())
    after = grads(list(model.parameters()))
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [False, False, True, True]


def test_a_model_is_held_weakly_and_may_change() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    clipper = AGC(model=model)
    added = nn.ConvTranspose1d(2, 6, 3)
    model.append(added)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    expected = adaptively_clipped(added.weight, added.weight.grad, 0.01, 1e-3, transposed=1)  # type: ignore[arg-type]
    clipper(model.parameters())
    np.testing.assert_allclose(wide(added.weight.grad), expected, rtol=2e-6)  # type: ignore[arg-type]
    held: list[weakref.ref[Any]] = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    del model, added, p
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)
    stranger = with_gradients(torch.randn(3, 4))
    assert float(clipper(stranger)) < 1, "a parameter that no model is known for is clipped by rows"


def test_the_rows_of_a_sparse_gradient_are_its_units() -> None:
    table, plain = nn.Embedding(9, 4, sparse=True), nn.Embedding(9, 4)
    plain.load_state_dict(table.state_dict())
    for layer in (table, plain):
        (layer(torch.tensor([1, 3, 1, 8, 3, 3])) * torch.arange(24.0).view(6, 4)).sum().backward()
    kept = table.weight.grad
    factors = [AGC()(layer.parameters()) for layer in (table, plain)]
    assert table.weight.grad is kept
    assert kept is not None
    assert kept.is_sparse
    torch.testing.assert_close(kept.to_dense(), plain.weight.grad, rtol=1e-6, atol=0)
    assert float(factors[0]) == pytest.approx(float(factors[1]), rel=1e-6)


# -- learnt bounds -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [0.0, 10.0, 33.3, 90.0, 100.0])
@pytest.mark.parametrize(("window", "warmup"), [(1000, 0), (17, 5), (8, 7), (1, 0)])
def test_the_bound_is_the_percentile_of_the_norms_in_the_window(percentile: float, window: int, warmup: int) -> None:
    before = totals(60)
    after = norms_after(AutoClip(percentile, window=window, warmup=warmup), before)
    for i, (one, other) in enumerate(zip(before, after, strict=True)):
        bound = np.percentile(before[max(0, i + 1 - window) : i + 1], percentile) if i >= warmup else INF
        assert other == pytest.approx(min(one, bound), rel=3e-6), i


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("window", [11, 100])
def test_the_bound_is_a_multiple_of_the_median(scale: float, window: int) -> None:
    before = totals(60)
    after = norms_after(MedianScaled(scale, window=window), before)
    for i, (one, other) in enumerate(zip(before, after, strict=True)):
        bound = scale * np.median(before[max(0, i + 1 - window) : i + 1]) if i >= 10 else INF
        assert other == pytest.approx(min(one, bound), rel=3e-6), i


def test_the_window_forgets() -> None:
    clipper = MedianScaled(2.0, window=20, warmup=0)
    assert norms_after(clipper, [1.0] * 50 + [10.0] * 25)[50:] == pytest.approx([2.0] * 9 + [10.0] * 16, rel=1e-5)
    assert norms_after(clipper, [1.0] * 20 + [3.0]) == pytest.approx([1.0] * 20 + [2.0], rel=1e-5)


@pytest.mark.parametrize(
    ("clipper", "first"), [(AutoClip(0.0), 10), (MedianScaled(1.0), 10), (ZClip(), 25)], ids=lambda one: type(one).__name__
)
def test_nothing_is_clipped_in_the_warm_up(clipper: NormClipper, first: int) -> None:
    rising = [2.0**i for i in range(30)]
    after = norms_after(clipper, rising)
    assert after[:first] == rising[:first]
    assert after[first] < rising[first]


def test_z_scores_by_hand() -> None:
    clipper = ZClip(alpha=0.5, z_thresh=2.0, warmup=2, min_std=0.0)
    # 1 and 3: mean 2, deviation 1. 10 has z = 8 and is clipped to 2 + 4/8 * 1 = 2.5; of that the mean becomes 2.25 and the variance
    # 1/2 + 1/2 * 0.25² = 0.53125. 3 has z = 1.03: let through; mean 2.625, variance 0.53125/2 + 0.375²/2 = 0.3359375. 5 has
    # z = 2.375 / 0.5796 = 4.0976: clipped to 2.625 + 4 / 4.0976 * 0.5796 = 3.1908.
    assert norms_after(clipper, [1, 3, 10, 3, 5]) == pytest.approx([1, 3, 2.5, 3, 2.625 + 4 * 0.3359375 / 2.375], rel=1e-6)


@pytest.mark.parametrize("max_norm", [None, 1.2])
@pytest.mark.parametrize("min_std", [0.0, 0.01, 0.5])
@pytest.mark.parametrize(("alpha", "z_thresh", "warmup"), [(0.97, 2.5, 25), (0.8, 1.5, 2)])
def test_outliers_are_clipped_by_their_z_score(
    alpha: float, z_thresh: float, warmup: int, min_std: float, max_norm: float | None
) -> None:
    before = totals(120)
    clipper = ZClip(alpha, z_thresh, warmup, max_norm, min_std)
    after = norms_after(clipper, before)
    mean, var = float(np.mean(before[:warmup])), float(np.var(before[:warmup]))
    for i, (one, other) in enumerate(zip(before, after, strict=True)):
        fed = one
        if i >= warmup:
            std = max(math.sqrt(var), min_std * mean)
            z = (one - mean) / std
            if z > z_thresh:
                fed = mean + z_thresh**2 / z * std
            mean = alpha * mean + (1 - alpha) * fed
            var = alpha * var + (1 - alpha) * (fed - mean) ** 2
        assert other == pytest.approx(min(fed, max_norm or INF), rel=3e-6), i
    assert clipper.state_dict()["moments"].tolist() == pytest.approx([mean, math.sqrt(var), len(before)], rel=1e-9)


def test_norms_that_hardly_scatter_are_not_clipped_for_rounding() -> None:
    steady = [1 + 1e-9 * (i % 2) for i in range(40)] + [1.02]
    assert norms_after(ZClip(), steady) == steady
    assert norms_after(ZClip(min_std=0.0), steady)[-1] < 1.0001


LEARNERS: dict[str, Callable[[], NormClipper]] = {
    "AutoClip": lambda: AutoClip(30.0, window=20, warmup=3),
    "MedianScaled": lambda: MedianScaled(0.9, window=20, warmup=3),
    "ZClip": lambda: ZClip(z_thresh=0.5, warmup=4),
}


@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS)
@pytest.mark.parametrize("bad", [NAN, INF, 0.0], ids=str)
def test_what_is_not_finite_or_zero_is_not_learnt(learner: Callable[[], NormClipper], bad: float) -> None:
    usual = totals(40)
    with_bad = usual[:2] + [bad] + usual[2:9] + [bad] * 15 + usual[9:]
    places = [2, *range(10, 25)]
    plain, disturbed = learner(), learner()
    before, after = norms_after(plain, usual), norms_after(disturbed, with_bad)
    np.testing.assert_equal([after[i] for i in places], [bad] * len(places))
    if not isinstance(plain, ZClip):  # in a window the places go by updates: what was there stays longer
        usual, before = usual[:9], before[:9]
        del after[len(usual) + len(places) :]
    assert [one for i, one in enumerate(after) if i not in places] == before


@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS)
def test_a_burst_that_is_not_finite_leaves_the_window_as_it_was(learner: Callable[[], NormClipper]) -> None:
    clipper = learner()
    norms_after(clipper, [1.0, 1.1, 0.9] * 10 + [NAN] * 50)
    assert norms_after(clipper, [100.0])[0] < 1.2


@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS)
@pytest.mark.parametrize("at", [0, 2, 15, 47])
def test_a_state_in_the_middle_of_a_training_continues_it(learner: Callable[[], NormClipper], at: int) -> None:
    before = totals(60)
    one = learner()
    norms_after(one, before[:at])
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    state = one.state_dict()
    expected = norms_after(one, before[at:])
    file.seek(0)
    arrays = {
        key: value.numpy().copy() if isinstance(value, Tensor) else value for key, value in state.items()
    }  # as a watch keeps it
    for saved in (torch.load(file, weights_only=True), state, state, arrays):
        other = learner()
        other.load_state_dict(saved)
        assert norms_after(other, before[at:]) == expected
        for key, value in one.state_dict().items():
            mine = other.state_dict()[key]
            assert torch.equal(mine, value) if isinstance(value, Tensor) else mine == value


@pytest.mark.parametrize("clipper", [GlobalNorm(1.0), Value(1.0), PerParameter(1.0), PerLayer(1.0), AGC()], ids=repr)
def test_what_learns_nothing_has_an_empty_state(clipper: NormClipper) -> None:
    assert clipper.state_dict() == {}
    clipper.load_state_dict({})
    with pytest.raises(ValueError, match=r"load_state_dict: got the state of ZClip; .* learns nothing and needs \{\}"):
        clipper.load_state_dict(ZClip().state_dict())


# -- any gradient ------------------------------------------------------------------------------------------------------------------

Make = Callable[[float], NormClipper]


def learnt(clipper: NormClipper, bound: float) -> NormClipper:
    """A clipper whose bound for the next update is this, or below."""
    for _ in range(12):
        p = of_norm(bound)
        clipper([p])
    return clipper


GLOBAL: dict[str, Make] = {
    "GlobalNorm": GlobalNorm,
    "AutoClip": lambda bound: learnt(AutoClip(0.0), bound),
    "MedianScaled": lambda bound: learnt(MedianScaled(1.0), bound),
    "ZClip": lambda bound: learnt(ZClip(warmup=2, max_norm=bound), bound),
}
EACH: dict[str, Make] = {
    "PerParameter": PerParameter,
    "PerLayer": PerLayer,
    "AGC": lambda bound: AGC(clip_factor=bound, eps=1.0),
}


@st.composite
def gradients(draw: st.DrawFn, smallest: int = -30, largest: int = 30) -> list[Tensor]:
    """A few tensors of any shape, dtype and size that torch can square or not."""
    shapes = st.sampled_from([(), (1,), (0,), (5,), (3, 4), (2, 0), (2, 3, 2, 2), (1, 7), (40,)])
    found = []
    for _ in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(DTYPES))
        low, high = (-6, 3) if dtype is torch.float16 else (smallest, largest)
        scale = 10.0 ** draw(st.integers(low, high))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        kind = torch.complex128 if dtype.is_complex else torch.float64
        found.append((torch.randn(draw(shapes), generator=generator, dtype=kind) * scale).to(dtype))
    return found


def roundings(tensor: Tensor) -> tuple[float, float]:
    """Relative and absolute error of one rounding to a tensor's dtype: the spacing of its smallest numbers."""
    info = torch.finfo(tensor.dtype)
    return info.eps, info.tiny * info.eps


def limit(bound: float, tensors: Sequence[Tensor]) -> float:
    """A bound as the dtypes can meet it."""
    eps = max((roundings(t)[0] for t in tensors), default=0.0)
    return bound * (1 + eps + 2e-6) + sum(math.sqrt(t.numel()) * roundings(t)[1] for t in tensors)


@settings(max_examples=60, deadline=None)
@given(values=gradients(), exponent=st.floats(-30, 30), name=st.sampled_from(list(GLOBAL)), handed=st.booleans())
def test_one_factor_meets_the_bound_and_keeps_the_direction(values: list[Tensor], exponent: float, name: str, handed: bool) -> None:
    bound = 10.0**exponent
    params = with_gradients(*values)
    clipper = GLOBAL[name](bound)
    versions = [p.grad._version for p in params]  # type: ignore[union-attr]
    factor = float(clipper.clip(seen(params)) if handed else clipper(params))
    before, after = norm(*values), grads(params)
    assume(before < 1e35 * bound)  # beyond, the factor itself is one of float32's subnormal numbers
    assert all(torch.isfinite(torch.view_as_real(g) if g.is_complex() else g).all() for g in after)
    assert norm(*after) <= limit(bound, values)
    if before <= bound * (1 - 1e-5):
        assert factor == 1
        assert [p.grad._version for p in params] == versions, "no pass over the gradients"  # type: ignore[union-attr]
        assert all(same_bits(one, other) for one, other in zip(after, values, strict=True))
    elif before >= bound * (1 + 1e-5):
        assert factor == pytest.approx(bound / before, rel=2e-5 + 1e-6 / before)  # the 1e-6 that torch adds to the norm
    for one, other in zip(after, values, strict=True):
        eps, spacing = roundings(other)
        np.testing.assert_allclose(wide(one), wide(other) * factor, rtol=2 * eps + 1e-6, atol=2 * spacing)


@settings(max_examples=60, deadline=None)
@given(values=gradients(), exponent=st.floats(-30, 30), name=st.sampled_from(list(EACH)), handed=st.booleans())
def test_each_part_meets_its_bound(values: list[Tensor], exponent: float, name: str, handed: bool) -> None:
    bound = 10.0**exponent
    params = with_gradients(*values, scale=0.0)  # weights of 0 count as eps = 1 in AGC, so that its bound is this
    versions = [p.grad._version for p in params]  # type: ignore[union-attr]
    clipper = EACH[name](bound)
    handed = handed or name == "PerLayer"
    factor = float(clipper.clip(seen(params)) if handed else clipper(params))
    after = grads(params)
    parts: dict[Any, list[tuple[Tensor, Tensor, int]]] = {}
    for i, (one, other) in enumerate(zip(after, values, strict=True)):
        if name == "AGC":
            parts.update({(i, *map(str, unit)): [(one[unit], other[unit], i)] for unit in units(wide(other))})
        else:
            parts.setdefault(i // 2 if name == "PerLayer" else i, []).append((one, other, i))
    smallest = 1.0
    for members in parts.values():
        whole = norm(*(other for _, other, _ in members))
        assume(whole < 1e35 * bound)
        assert norm(*(one for one, _, _ in members)) <= limit(bound, [other for _, other, _ in members])
        for one, other, i in members:
            coef = min(1.0, bound / whole) if whole else 1.0
            smallest = min(smallest, coef)
            eps, spacing = roundings(other)
            np.testing.assert_allclose(wide(one), wide(other) * coef, rtol=2 * eps + 3e-6, atol=2 * spacing)
            if whole <= bound * (1 - 1e-5):
                assert same_bits(one, other)
                if name != "AGC":
                    assert params[i].grad._version == versions[i], "no pass over it either"  # type: ignore[union-attr]
    assert factor == pytest.approx(smallest, rel=1e-4)


@pytest.mark.parametrize("make", [*GLOBAL.values(), *EACH.values()], ids=[*GLOBAL, *EACH])
def test_the_bound_is_met_in_float32_whatever_is_rounded(make: Make) -> None:
    for i in range(40):
        bound = 0.5 + i / 80
        values = [nn.functional.normalize(torch.randn(30), dim=0) * (bound * (1.0001 + i / 20))]
        params = with_gradients(*values, scale=0.0)
        assert make(bound).clip(seen(params)) < 1
        assert bound * (1 - 3e-6) < norm(*grads(params)) <= bound


def test_the_squares_of_small_units_do_not_vanish_above_their_bound() -> None:
    params = with_gradients(torch.full((2, 4), 1e-23), scale=0.0)
    AGC(clip_factor=1e-23, eps=1.0)(params)
    assert [norm(row) for row in grads(params)[0]] == pytest.approx([1e-23] * 2, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    values=gradients(-15, 15),
    name=st.sampled_from([*GLOBAL, *EACH]),
    bad=st.sampled_from([NAN, INF, -INF]),
    where=st.integers(0, 100),
    host=st.booleans(),
)
def test_what_is_not_finite_multiplies_nothing(values: list[Tensor], name: str, bad: float, where: int, host: bool) -> None:
    values = [*values, torch.randn(3, 4), torch.randn(5)]
    which = where % len(values)
    broken = values[which]
    if broken.numel():
        broken.view(-1)[where % broken.numel()] = bad
    clean = not broken.numel()
    params = with_gradients(*values)
    layers = [f"layer{i}" for i in range(len(values))]
    with mock.patch.object(parameters, "HOST", parameters.HOST if host else "nowhere"):
        factor = float((GLOBAL | EACH)[name](1e-3).clip(seen(params, layers)))
    assert factor <= 1
    assert name in EACH or clean or factor == 1
    for i, (one, other) in enumerate(zip(grads(params), values, strict=True)):
        finite = np.isfinite(wide(other))
        np.testing.assert_array_equal(np.isfinite(wide(one)), finite)
        if (name in GLOBAL and not clean) or (i == which and name != "AGC"):
            np.testing.assert_array_equal(wide(one)[finite], wide(other)[finite])
            if host:  # a device multiplies by 1, which makes a NaN of an infinite complex number
                np.testing.assert_equal(wide(one), wide(other))
    if name in EACH:
        assert factor < 1, "the finite others are clipped"


@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
def test_values_of_a_gradient_that_is_not_finite_are_left_alone(bad: float) -> None:
    params = with_gradients(torch.tensor([5.0, bad]), torch.tensor([5.0]))
    Value(0.5)(params)
    np.testing.assert_equal([g.tolist() for g in grads(params)], [[5.0, bad], [0.5]])


@pytest.mark.parametrize(
    "clipper",
    [GlobalNorm(0.1), PerParameter(0.1), PerLayer(0.1), learnt(AutoClip(), 0.1), learnt(MedianScaled(1.0), 0.1), Value(0.1)],
    ids=lambda one: type(one).__name__,
)
def test_sparse_gradients_are_clipped_as_dense_ones(clipper: NormClipper) -> None:
    table, plain = nn.Embedding(9, 4, sparse=True), nn.Embedding(9, 4)
    for layer in (table, plain):
        (layer(torch.tensor([1, 3, 1, 8])) * torch.arange(16.0).view(4, 4)).sum().backward()
    for layer in (table, plain):
        params = list(layer.parameters())
        copy.deepcopy(clipper).clip(seen(params))
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
    torch.testing.assert_close(table.weight.grad.to_dense(), plain.weight.grad, rtol=1e-6, atol=0)
    assert GlobalNorm(1e-3)(table.parameters()) < 1, "its norm is read, too"


def test_a_norm_beyond_float32_is_clipped_to_the_bound_not_to_zero() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        params = with_gradients(torch.full((100,), 3e38, dtype=dtype))
        GlobalNorm(2.0)(params)
        assert norm(*grads(params)) == pytest.approx(2.0, rel=1e-2 if dtype is torch.bfloat16 else 1e-4)


# -- no synchronisation ------------------------------------------------------------------------------------------------------------

aten = torch.ops.aten


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where a device would have to be waited for: to ask for a value, to copy elsewhere, to make a shape of values."""

    WAITS = (
        aten._local_scalar_dense,
        aten.nonzero,
        aten.masked_select,
        aten.is_nonzero,
        aten.item,
        aten._unique2,
        aten.lift_fresh,  # torch.tensor: numbers of the host, copied to the device
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masks = func.overloadpacket is aten.index and any(one is not None and one.dtype is torch.bool for one in args[1])
        if func.overloadpacket in self.WAITS or masks:
            raise AssertionError(f"{func} waits for the device")
        if func.overloadpacket is aten._to_copy and kwargs.get("device", args[0].device) != args[0].device:
            raise AssertionError("a copy to another device waits")
        return func(*args, **kwargs)


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing lies on the host, so that no tensor may be read there."""

    def waits(*_: object, **__: object) -> Any:
        raise AssertionError("it reads a tensor of a device")

    monkeypatch.setattr(parameters, "HOST", "nowhere")
    for method in ("tolist", "numpy", "item", "cpu"):
        monkeypatch.setattr(torch.Tensor, method, waits)


@pytest.mark.parametrize(
    "wait",
    [
        pytest.param(lambda t: float(t[0]), id="float"),
        pytest.param(lambda t: bool((t > 0).any()), id="bool"),
        pytest.param(lambda t: t.tolist(), id="tolist"),
        pytest.param(lambda t: t[t > 0], id="mask"),
        pytest.param(lambda t: t.to("meta"), id="to"),
        pytest.param(lambda t: torch.tensor([1.0, 2.0]), id="tensor"),
    ],
)
def test_waiting_would_be_found(on_a_device: None, wait: Callable[[Tensor], object]) -> None:
    """The test below can fail."""
    with pytest.raises(AssertionError), NoWaiting():  # type: ignore[no-untyped-call]
        wait(torch.ones(3))


LAYERS = ["a", "a", "b", "c", "d"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32-norms", "float64-norms"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: GlobalNorm(0.5), id="GlobalNorm"),
        pytest.param(lambda: GlobalNorm(1e-7), id="GlobalNorm-tiny"),
        pytest.param(lambda: GlobalNorm(1e9), id="GlobalNorm-above"),
        pytest.param(lambda: Value(0.5), id="Value"),
        pytest.param(lambda: PerParameter(0.5), id="PerParameter"),
        pytest.param(lambda: PerLayer(0.5), id="PerLayer"),
        pytest.param(lambda: AGC(0.2, exclude=("p4",)), id="AGC"),
        pytest.param(lambda: AutoClip(30.0, window=8, warmup=2), id="AutoClip"),
        pytest.param(lambda: MedianScaled(0.9, window=8, warmup=2), id="MedianScaled"),
        pytest.param(lambda: ZClip(z_thresh=0.5, warmup=3, max_norm=9.0), id="ZClip"),
    ],
)
def test_nothing_waits_for_a_device_and_the_gradients_are_those_of_the_host(
    make: Callable[[], NormClipper], dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    shapes = [(6, 5), (6,), (), (4, 3, 3, 3), (7, 6)]
    steps = [[torch.randn(shape) * total for shape in shapes] for total in totals(12)]
    steps[7][2] = torch.tensor(NAN)
    mine, theirs = [with_gradients(*values) for values in steps], [with_gradients(*values) for values in steps]
    with torch.no_grad():
        for one, other in zip(mine, theirs, strict=True):
            for p, q in zip(one, other, strict=True):
                p.copy_(q)
    handed = [seen(params, LAYERS, dtype=dtype) for params in mine]
    host = make()
    expected = [float(host.clip(seen(params, LAYERS))) for params in theirs]
    request.getfixturevalue("on_a_device")
    device = make()
    found = [device.clip(handed[0])]  # the first may make what it keeps
    with NoWaiting():  # type: ignore[no-untyped-call]
        found += [device.clip(one) for one in handed[1:]]
        saved = device.state_dict()
        device.load_state_dict(saved)
    request.getfixturevalue("monkeypatch").undo()
    assert {factor.shape for factor in found} == {torch.Size(())}
    np.testing.assert_allclose([float(factor) for factor in found], expected, rtol=1e-5)
    for one, other in zip(mine, theirs, strict=True):
        for p, q in zip(one, other, strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("make", [*GLOBAL.values(), EACH["PerParameter"], EACH["AGC"]], ids=[*GLOBAL, "PerParameter", "AGC"])
def test_nothing_waits_where_a_loop_calls_it(make: Make, request: pytest.FixtureRequest) -> None:
    values = [torch.randn(6, 5), torch.randn(6), torch.randn(6, 5).to(torch.bfloat16), torch.randn(3, dtype=torch.complex64)]
    params = with_gradients(*values, scale=0.0)
    clipper = make(0.1)
    request.getfixturevalue("on_a_device")
    with NoWaiting():  # type: ignore[no-untyped-call]
        factor = clipper(params)
    request.getfixturevalue("monkeypatch").undo()
    assert 0 < float(factor) < 0.1
    assert all(norm(g) <= 0.1 * math.sqrt(6) * 1.01 for g in grads(params))


@pytest.mark.parametrize("total", [1e-25, 1e25])
def test_squares_that_float32_cannot_hold_are_added_up_on_a_device_too(total: float, on_a_device: None) -> None:
    params = with_gradients(torch.tensor([0.6, 0.8]) * total)
    norms = torch.tensor([total], dtype=torch.float32)
    factor = GlobalNorm(0.5 * total if total < 1 else 1.0).clip(Gradients(params, norms, [""], [""]))
    assert float(factor) == pytest.approx(0.5 if total < 1 else 1 / total, rel=1e-5)


# -- called in a loop --------------------------------------------------------------------------------------------------------------


def test_parameters_without_a_gradient_are_passed_over() -> None:
    params = [*with_gradients(torch.tensor([3.0, 4.0])), nn.Parameter(torch.zeros(3))]
    assert float(GlobalNorm(1.0)(params)) == pytest.approx(0.2, rel=1e-5)
    assert params[1].grad is None
    assert float(AutoClip()([nn.Parameter(torch.zeros(3))])) == 1.0
    for clipper in [*(make(1.0) for make in (GLOBAL | EACH).values()), Value(1.0)]:
        assert not float(clipper.clip(Gradients([], torch.zeros(0), [], []))) < 1


def test_a_single_tensor_will_do() -> None:
    (p,) = with_gradients(torch.tensor([3.0, 4.0]))
    GlobalNorm(1.0)(p)
    assert norm(*grads([p])) == pytest.approx(1.0, rel=1e-5)


def test_a_generator_that_has_been_used_up_is_told() -> None:
    params = nn.Linear(2, 2).parameters()
    list(params)
    with pytest.warns(UserWarning, match="generator of parameters is empty"):
        GlobalNorm(1.0)(params)


@pytest.mark.parametrize("make", (GLOBAL | EACH).values(), ids=GLOBAL | EACH)
def test_gradients_that_carry_a_graph_are_clipped(make: Make) -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    (weight.grad,) = torch.autograd.grad(weight.square().sum(), [weight], create_graph=True)
    graph = weight.grad.grad_fn
    assert graph is not None
    make(1e-2).clip(seen([weight]))
    assert norm(weight.grad) < 0.1
    assert weight.grad.grad_fn is graph, "clipping is no part of it, as in torch"
    weight.grad = None  # breaks the cycle


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_sharded_gradient_is_clipped_as_a_whole_one() -> None:
    distributed = pytest.importorskip("torch.distributed")
    tensors = pytest.importorskip("torch.distributed.tensor")
    if not distributed.is_available() or not distributed.is_gloo_available() or distributed.is_initialized():
        pytest.skip("there is no process group of one's own")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = tensors.init_device_mesh("cpu", (1,))
        for make in (*GLOBAL.values(), EACH["PerParameter"], EACH["AGC"]):
            plain = with_gradients(torch.randn(6, 5), torch.randn(6))
            sharded = []
            for p in plain:
                assert p.grad is not None
                sharded.append(nn.Parameter(tensors.distribute_tensor(p.detach().clone(), mesh, [tensors.Shard(0)])))
                sharded[-1].grad = tensors.distribute_tensor(p.grad.clone(), mesh, [tensors.Shard(0)])
            assert float(make(0.1)(sharded)) == pytest.approx(float(make(0.1)(plain)), rel=1e-5)
            for p, q in zip(plain, sharded, strict=True):
                torch.testing.assert_close(q.grad.full_tensor(), p.grad)  # type: ignore[union-attr]
    finally:
        distributed.destroy_process_group()


def test_torchs_own_functions_are_clippers() -> None:
    def mine(parameters: Any) -> None: ...

    several: list[Clipper] = [GlobalNorm(1.0), AutoClip(), mine, lambda params: clip_grad_norm_(params, 1.0)]
    assert all(callable(one) for one in several)


def test_a_clipper_of_ones_own_is_a_few_lines() -> None:
    class Sign(NormClipper):
        def __init__(self, size: float = 1.0) -> None:
            self.size = size

        def clip(self, gradients: Gradients) -> Tensor:
            for p in gradients.params:
                assert p.grad is not None
                p.grad.sign_().mul_(self.size)
            return gradients.norms.new_ones(())

    params = with_gradients(torch.tensor([-3.0, 4.0]))
    Sign(0.5)(params)
    assert grads(params)[0].tolist() == [-0.5, 0.5]
    assert repr(Sign()) == "Sign(size=1.0)"
    assert Sign().state_dict() == {}


@pytest.mark.parametrize(
    ("clipper", "shown"),
    [
        (GlobalNorm(1), "GlobalNorm(max_norm=1.0)"),
        (Value(0.5), "Value(clip_value=0.5)"),
        (PerParameter(0.5), "PerParameter(max_norm=0.5)"),
        (PerLayer(0.5, model=nn.Linear(2, 2)), "PerLayer(max_norm=0.5, model=Linear)"),
        (AGC(exclude=["a*"]), "AGC(clip_factor=0.01, eps=0.001, exclude=('a*',))"),
        (AutoClip(), "AutoClip(percentile=10.0, window=1000, warmup=10)"),
        (MedianScaled(), "MedianScaled(scale=2.0, window=100, warmup=10)"),
        (ZClip(), "ZClip(alpha=0.97, z_thresh=2.5, warmup=25, max_norm=None, min_std=0.01)"),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, NormClipper) else "",
)
def test_it_shows_its_arguments(clipper: NormClipper, shown: str) -> None:
    assert repr(clipper) == shown


# -- errors ------------------------------------------------------------------------------------------------------------------------


wrong: Any = clippers
"""For arguments that a type checker would find."""


@pytest.mark.parametrize(
    ("make", "kind", "parts"),
    [
        (lambda: wrong.GlobalNorm("1"), TypeError, ["GlobalNorm(max_norm='1')", "got str", "needs a float, finite and above 0"]),
        (lambda: wrong.GlobalNorm(True), TypeError, ["GlobalNorm(max_norm=True)", "got bool"]),
        (lambda: wrong.GlobalNorm(torch.ones(())), TypeError, ["got Tensor", "needs a float"]),
        (lambda: wrong.GlobalNorm(0), ValueError, ["GlobalNorm(max_norm=0)", "finite and above 0", "leave clip out"]),
        (lambda: wrong.Value(-1.0), ValueError, ["Value(clip_value=-1.0)", "above 0"]),
        (lambda: wrong.PerParameter(NAN), ValueError, ["PerParameter(max_norm=nan)", "finite"]),
        (lambda: wrong.PerLayer(INF), ValueError, ["PerLayer(max_norm=inf)", "finite"]),
        (lambda: wrong.PerLayer(1.0, model="m"), TypeError, ["PerLayer(model='m')", "got str", "nn.Module"]),
        (lambda: wrong.PerLayer(1.0)([of_norm(1.0)]), ValueError, ["PerLayer(max_norm=1.0)", "without a watch", "model=model"]),
        (lambda: wrong.AGC(0.0), ValueError, ["AGC(clip_factor=0.0)", "above 0"]),
        (lambda: wrong.AGC(eps=0), ValueError, ["AGC(eps=0)", "above 0"]),
        (lambda: wrong.AGC(exclude="head.*"), TypeError, ["AGC(exclude='head.*')", "got str", "('head.*',)"]),
        (lambda: wrong.AGC(exclude=(1,)), TypeError, ["AGC(exclude=(1,))", "patterns"]),
        (lambda: wrong.AGC(exclude=("a",))([of_norm(1.0)]), ValueError, ["exclude=('a',)", "without a watch", "model=model"]),
        (lambda: wrong.AGC(exclude=("x*",), model=nn.Linear(1, 1)), ValueError, ["'x*' does not match", "'weight', 'bias'"]),
        (lambda: wrong.AutoClip(101), ValueError, ["AutoClip(percentile=101)", "from 0 to 100"]),
        (lambda: wrong.AutoClip("10"), TypeError, ["AutoClip(percentile='10')", "got str", "from 0 to 100"]),
        (lambda: wrong.AutoClip(window=0, warmup=0), ValueError, ["AutoClip(window=0)", "1 or more"]),
        (lambda: wrong.AutoClip(window=10.0), TypeError, ["AutoClip(window=10.0)", "got float", "needs an int"]),
        (
            lambda: wrong.AutoClip(window=10),
            ValueError,
            ["window=10, warmup=10", "nothing would ever be clipped", "window=11 or more"],
        ),
        (lambda: wrong.MedianScaled(0), ValueError, ["MedianScaled(scale=0)", "above 0"]),
        (lambda: wrong.MedianScaled(warmup=-1), ValueError, ["MedianScaled(warmup=-1)", "0 or more"]),
        (lambda: wrong.ZClip(alpha=1.0), ValueError, ["ZClip(alpha=1.0)", "below 1", "0.97"]),
        (lambda: wrong.ZClip(z_thresh=0.0), ValueError, ["ZClip(z_thresh=0.0)", "above 0"]),
        (lambda: wrong.ZClip(warmup=1), ValueError, ["ZClip(warmup=1)", "2 or more", "25"]),
        (lambda: wrong.ZClip(max_norm=-1), ValueError, ["ZClip(max_norm=-1)", "above 0"]),
        (lambda: wrong.ZClip(min_std=-0.1), ValueError, ["ZClip(min_std=-0.1)", "0 or more"]),
        (lambda: wrong.GlobalNorm(1.0)(nn.Linear(1, 1)), TypeError, ["GlobalNorm: got Linear", "model.parameters()"]),
        (lambda: wrong.GlobalNorm(1.0)(nn.Sequential(nn.Linear(1, 1))), TypeError, ["got Sequential", "model.parameters()"]),
        (lambda: wrong.GlobalNorm(1.0)(3), TypeError, ["got int", "model.parameters()"]),
        (lambda: wrong.GlobalNorm(1.0)(nn.Linear(1, 1).named_parameters()), TypeError, ["(tuple)", "needs tensors with .grad"]),
        (
            lambda: wrong.AutoClip().load_state_dict({}),
            ValueError,
            ["AutoClip.load_state_dict", "a dict with []", "state_dict() of a AutoClip"],
        ),
        (lambda: wrong.AutoClip().load_state_dict(7), ValueError, ["got 7 (int)"]),
        (
            lambda: wrong.AutoClip().load_state_dict(wrong.ZClip().state_dict()),
            ValueError,
            ["the state of ZClip", "another clipper"],
        ),
        (
            lambda: wrong.MedianScaled().load_state_dict(wrong.AutoClip().state_dict()),
            ValueError,
            ["the state of AutoClip", "a MedianScaled"],
        ),
        (
            lambda: wrong.AutoClip().load_state_dict(wrong.AutoClip(window=50).state_dict()),
            ValueError,
            ["float64 tensor of shape (50,)", "window=1000", "(1000,)"],
        ),
        (
            lambda: wrong.AutoClip().load_state_dict(AutoClip().state_dict() | {"updates": -1}),
            ValueError,
            ["'updates' is -1", "int of 0"],
        ),
        (lambda: wrong.AutoClip().load_state_dict(AutoClip().state_dict() | {"norms": [1.0]}), ValueError, ["'norms' is [1.0]"]),
        (
            lambda: wrong.ZClip().load_state_dict({"clipper": "ZClip", "moments": torch.ones(2)}),
            ValueError,
            ["shape (2,)", "shape (3,)"],
        ),
        (lambda: wrong.ZClip().load_state_dict({"clipper": "ZClip"}), ValueError, ["ZClip.load_state_dict", "the state of ZClip"]),
        (lambda: wrong.GlobalNorm(1.0).load_state_dict([1]), ValueError, ["GlobalNorm.load_state_dict", "got [1] (list)"]),
    ],
)
def test_an_error_says_what_was_given_and_what_is_needed(
    make: Callable[[], object], kind: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


def test_parameters_that_the_model_does_not_hold_are_layers_by_themselves() -> None:
    model = nn.Linear(2, 2)
    strangers = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for p, g in zip(strangers, (3.0, 4.0), strict=True):
        p.grad = torch.tensor([g])
    PerLayer(1.0, model=model)([*model.parameters(), *strangers])
    assert [float(p.grad) for p in strangers if p.grad is not None] == pytest.approx([1.0, 1.0], rel=1e-5)


def test_a_parameter_that_the_model_has_taken_in_stands_there() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    late = nn.Linear(2, 2)
    for p in late.parameters():
        p.grad = torch.full_like(p, 3.0)
    clipper = PerLayer(1.0, model=model)
    clipper(list(late.parameters()))
    model.append(late)
    for p in late.parameters():
        p.grad = torch.full_like(p, 3.0)
    clipper(list(late.parameters()))
    norm = sum(float(p.grad.square().sum()) for p in late.parameters() if p.grad is not None) ** 0.5
    assert norm == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    "clipper", [ZClip(), AutoClip(window=20), MedianScaled(window=20)], ids=lambda clipper: type(clipper).__name__
)
def test_a_state_that_holds_nan_is_refused(clipper: Any) -> None:
    state = clipper.state_dict()
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            state[key] = torch.full_like(value, float("nan"))
    with pytest.raises(ValueError, match="holds NaN or negative norms"):
        clipper.load_state_dict(state)


def test_a_bound_beyond_all_floats_is_refused() -> None:
    with pytest.raises(ValueError, match="finite and above 0"):
        GlobalNorm(10**400)
