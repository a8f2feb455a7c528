"""Where each activation is flat: against autograd, in the training's dtype, in place, as a function, and for types of the user's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradwatch.capture.saturation import FLAT, FUNCTIONAL, WITHOUT_FLAT_PART, derivative, fires, flat, needs_input, of_node, shape

Call = Callable[[Tensor], Tensor]

GRID = torch.linspace(-12, 12, 1000, dtype=torch.float64)

FINE = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
"""For the largest slope: steps of 1e-4, in which no slope here changes by more than 5e-5 of its largest."""

ACTIVATIONS: list[nn.Module] = [
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Softsign(),
    nn.LogSigmoid(),
    nn.Hardtanh(),
    nn.Hardtanh(-0.7, 1.3),
    nn.Hardtanh(0.0, 2.5),
    nn.Hardtanh(1.5, 3.0),
    nn.ReLU6(),
    nn.Hardsigmoid(),
    nn.Hardswish(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Mish(),
    nn.ELU(),
    nn.ELU(0.3),
    nn.ELU(2.5),
    nn.ELU(0.0),
    nn.SELU(),
    nn.CELU(),
    nn.CELU(0.3),
    nn.CELU(2.5),
    nn.Softplus(),
    nn.Softplus(3.0),
    nn.Softplus(0.5, 2.0),
    nn.Softmax(1),
    nn.Softmin(1),
    nn.Softmax2d(),
    nn.ReLU(),
    nn.Threshold(0.5, 0.0),
    nn.Threshold(0.1, 20.5),
    nn.Threshold(-0.7, -0.7),
    nn.Hardshrink(),
    nn.Hardshrink(1.3),
    nn.Softshrink(),
    nn.Softshrink(1.3),
    nn.Tanhshrink(),
    nn.LeakyReLU(0.0),
    nn.RReLU(0.0, 0.0).eval(),
]

IN_PLACE: list[tuple[nn.Module, Call]] = [
    (nn.ReLU(inplace=True), F.relu_),
    (nn.ReLU6(inplace=True), functools.partial(F.relu6, inplace=True)),
    (nn.Hardtanh(-0.7, 1.3, inplace=True), functools.partial(F.hardtanh_, min_val=-0.7, max_val=1.3)),
    (nn.Hardsigmoid(inplace=True), functools.partial(F.hardsigmoid, inplace=True)),
    (nn.Hardswish(inplace=True), functools.partial(F.hardswish, inplace=True)),
    (nn.SiLU(inplace=True), functools.partial(F.silu, inplace=True)),
    (nn.Mish(inplace=True), functools.partial(F.mish, inplace=True)),
    (nn.ELU(0.3, inplace=True), functools.partial(F.elu_, alpha=0.3)),
    (nn.SELU(inplace=True), F.selu_),
    (nn.CELU(2.5, inplace=True), functools.partial(F.celu_, alpha=2.5)),
    (nn.Threshold(0.5, 0.0, inplace=True), functools.partial(F.threshold, threshold=0.5, value=0.0, inplace=True)),
    (nn.LeakyReLU(0.0, inplace=True), functools.partial(F.leaky_relu_, negative_slope=0.0)),
]

CALLS: dict[str, Call] = {
    "relu": F.relu,
    "method": Tensor.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu6": F.relu6,
    "hardtanh": functools.partial(F.hardtanh, min_val=-0.7, max_val=1.3),
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardshrink": functools.partial(F.hardshrink, lambd=1.3),
    "softshrink": functools.partial(F.softshrink, lambd=1.3),
    "threshold": functools.partial(F.threshold, threshold=0.5, value=20.5),
    "threshold-below-zero": functools.partial(F.threshold, threshold=-0.7, value=0.3),
    "gelu": F.gelu,
    "gelu-tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": functools.partial(F.softplus, beta=0.5, threshold=2.0),
    "logsigmoid": F.logsigmoid,
    "elu": functools.partial(F.elu, alpha=2.5),
    "selu": F.selu,
    "celu": functools.partial(F.celu, alpha=0.3),
    "leaky_relu": functools.partial(F.leaky_relu, negative_slope=0.0),
    **{f"in-place-{module}": call for module, call in IN_PLACE},
}


def slopes(call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and local derivative, by autograd. A softmax gets a second input that stays at 0, and is seen at the first."""
    x = x.detach().clone().requires_grad_()
    if isinstance(call, nn.Softmax | nn.Softmin | nn.Softmax2d):
        pair = torch.stack([x, torch.zeros_like(x)], 1)
        y = call(pair[..., None, None] if isinstance(call, nn.Softmax2d) else pair)[:, 0].reshape(-1)
    else:
        y = call(x * 1)  # in-place calls take no leaf
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def steepest(call: Call) -> float:
    return float(slopes(call, FINE)[1].abs().max())


def named(module: nn.Module) -> str:
    return str(module)


# -- the derivative ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("module", ACTIVATIONS, ids=named)
def test_the_derivative_is_that_of_autograd(module: nn.Module, dtype: torch.dtype) -> None:
    x = GRID.to(dtype)
    y, slope = slopes(module, x)
    relative = derivative(module, x, y)
    assert relative is not None
    assert relative.dtype == dtype
    assert relative.shape == x.shape
    torch.testing.assert_close(relative, slope.abs() / steepest(module), atol=5e-5, rtol=0)
    assert ((relative >= 0) & (relative <= 1)).all()
    assert shape(module) != ""


@pytest.mark.parametrize("module", ACTIVATIONS, ids=named)
def test_the_input_counts_only_where_it_is_asked_for(module: nn.Module) -> None:
    y, _ = slopes(module, GRID)
    with_input, without = derivative(module, GRID, y), derivative(module, torch.full_like(y, torch.nan), y)
    assert torch.equal(with_input, without) is not needs_input(module)  # type: ignore[arg-type]


@pytest.mark.parametrize("module", ACTIVATIONS, ids=named)
def test_what_is_not_finite_is_flat_only_where_its_limit_is(module: nn.Module) -> None:
    nan = torch.tensor([torch.nan])
    assert not flat(module, nan, nan), "a NaN is another rule's affair"
    if isinstance(module, nn.Softmax | nn.Softmin | nn.Softmax2d):
        return
    far = torch.tensor([-1e30, -1e3, 1e3, 1e30, torch.inf])
    y = module(far)
    where = flat(module, far, y)
    assert where is not None
    left, near_left, near_right, right, infinite = where.tolist()
    assert (left, right) == (near_left, near_right)
    # Softsign makes a NaN of an Inf.
    assert infinite is (near_right and not bool(y[-1].isnan()))


@pytest.mark.parametrize("module", ACTIVATIONS, ids=named)
@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=50))
def test_flat_is_monotone_in_the_derivative(module: nn.Module, values: list[float]) -> None:
    x = torch.tensor(values)
    y, slope = slopes(module, x)
    where = flat(module, x, y)
    assert where is not None
    assert where.dtype == torch.bool
    # Of all that is flat nothing is steeper than what is not, by the derivative that autograd has, up to its own rounding.
    largest = float(slope.abs()[where].max()) if where.any() else 0.0
    least = float(slope.abs()[~where].min()) if (~where).any() else torch.inf
    assert largest <= least + 1e-5


def test_the_line_is_where_the_field_draws_it() -> None:
    y = torch.tensor([-0.9901, -0.9899, 0.0, 0.9899, 0.9901])
    assert flat(nn.Tanh(), y, y).tolist() == [True, False, False, False, True]  # type: ignore[union-attr]
    p = torch.tensor([0.005, 0.0051, 0.5, 0.9949, 0.995])
    assert flat(nn.Sigmoid(), p, p).tolist() == [True, False, False, False, True]  # type: ignore[union-attr]
    assert FLAT == 0.02


# -- the dtype of the training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "first"), [pytest.param(nn.Tanh(), 3.47, id="tanh"), pytest.param(nn.Sigmoid(), 6.24, id="sigmoid")]
)
def test_a_bfloat16_output_saturates_where_it_becomes_1(module: nn.Module, first: float) -> None:
    # Every bfloat16 between 2 and 8: 7 bits behind the first one.
    x = torch.cat([torch.arange(2, 4, 2**-6), torch.arange(4, 8, 2**-5)]).bfloat16()
    relative = derivative(module, x.float(), module(x).float())
    assert relative is not None
    assert torch.equal(relative == 0, x >= torch.tensor(first).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("module", ACTIVATIONS, ids=named)
def test_a_half_precision_output_is_flat_where_that_of_float64_is(module: nn.Module, dtype: torch.dtype) -> None:
    x = GRID.to(dtype)
    y, _ = slopes(module, x)
    where = flat(module, x.float(), y.float())
    expected = slopes(module, x.double())[1].abs() / steepest(module)
    # Wrong only near the line, or where the bound of a kinked function is rounded.
    assert where is not None
    wrong = where != (expected < FLAT)
    kinked = wrong & ((expected < FLAT / 2) | (expected > 2 * FLAT))
    assert int(kinked.sum()) <= 1


# -- in place ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "call"), IN_PLACE, ids=lambda value: str(value) if isinstance(value, nn.Module) else "")
def test_an_in_place_activation_is_judged_by_what_is_left(module: nn.Module, call: Call) -> None:
    leaf = GRID.clone().requires_grad_()
    x = leaf * 1
    y = module(x)
    assert x is y
    if needs_input(module):
        node = of_node(y.grad_fn)
        assert node is not None
        x = getattr(y.grad_fn, node[1])
        assert torch.equal(x, GRID)
    (slope,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
    relative = derivative(module, x.detach(), y.detach())
    torch.testing.assert_close(relative, slope.abs() / steepest(call), atol=5e-5, rtol=0)


# -- shapes and firing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ACTIVATIONS, ids=named)
def test_the_shape_says_where_it_is_flat(module: nn.Module) -> None:
    far = torch.tensor([-1e3, 1e3], dtype=torch.float64)
    y, slope = slopes(module, far)
    ends = int(((slope.abs() / steepest(module)) < FLAT).sum())
    lid = isinstance(module, nn.Hardtanh) and module.min_val == 0
    shrink = isinstance(module, nn.Hardshrink | nn.Softshrink | nn.Tanhshrink)
    probability = isinstance(module, nn.Softmax | nn.Softmin | nn.Softmax2d)
    expected = {"two-sided": 2, "one-sided": 2 if lid else 0 if shrink else 1, "probability": 2}[shape(module)]
    assert ends == expected
    assert (shape(module) == "probability") is probability
    assert (shape(module) == "one-sided") or ends == 2
    assert len(y) == 2


@pytest.mark.parametrize("module", [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Mish()], ids=named)
def test_a_smooth_rectifier_fires_from_the_edge_of_its_tail(module: nn.Module) -> None:
    y, slope = slopes(module, FINE)
    tail = (slope.abs() / steepest(module) < FLAT) & (FINE < -2.5)
    edge = int(tail.nonzero().max())
    level = fires(module)
    assert level == pytest.approx(abs(float(y[edge])), abs=1e-5)
    assert level is not None
    silent = (y <= 0) & (y >= -level)
    assert silent[tail].float().mean() > 0.999
    assert not silent[FINE > 0].any()
    assert not silent[(FINE > -2.5) & (FINE < -0.06)].any()


@pytest.mark.parametrize(
    ("module", "level"),
    [
        (nn.ReLU(), 0.0),
        (nn.ReLU6(), 0.0),
        (nn.Hardtanh(0.0, 2.0), 0.0),
        (nn.Threshold(0.5, 0.0), 0.0),
        (nn.Hardswish(), 0.0),
        (nn.Hardshrink(), 0.0),
        (nn.Softshrink(), 0.0),
        (nn.LeakyReLU(0.0), 0.0),
        (nn.Threshold(0.1, 20.0), None),
        (nn.LeakyReLU(), None),
        (nn.PReLU(), None),
        (nn.RReLU(), None),
        (nn.Sigmoid(), None),
        (nn.Tanh(), None),
        (nn.Hardtanh(), None),
        (nn.Softmax(1), None),
        (nn.ELU(), None),
        (nn.SELU(), None),
        (nn.CELU(), None),
        (nn.Softplus(), None),
        (nn.LogSigmoid(), None),
        (nn.Tanhshrink(), None),
        (nn.Linear(1, 1), None),
    ],
    ids=str,
)
def test_a_unit_fires_where_its_flat_part_gives_nothing(module: nn.Module, level: float | None) -> None:
    assert fires(module) == level
    if level is not None:
        y, slope = slopes(module, GRID)
        silent = y.abs() <= level
        assert silent.any()
        assert (slope[silent] == 0).all()


# -- what is judged and what is not ------------------------------------------------------------------------------------------------


def test_every_activation_of_torch_is_decided_on() -> None:
    for name in torch.nn.modules.activation.__all__:
        kind = getattr(nn, name)
        registered = derivative.dispatch(kind) is not derivative.dispatch(object)
        assert registered is not (kind in WITHOUT_FLAT_PART), f"{name} is neither registered nor listed as without a flat part"
    assert {type(module) for module in ACTIVATIONS} >= {
        kind for kind in derivative.registry if kind.__module__.startswith("torch.")
    }


@pytest.mark.parametrize(
    "module",
    [
        nn.LeakyReLU(),
        nn.LeakyReLU(-0.1),
        nn.RReLU(),
        nn.PReLU(),
        nn.ELU(-1.0),
        nn.CELU(-1.0),
        nn.GLU(),
        nn.LogSoftmax(1),
        nn.MultiheadAttention(2, 1),
        nn.Linear(2, 2),
        nn.Identity(),
        nn.Sequential(nn.ReLU()),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_has_no_flat_part_is_not_judged(module: nn.Module) -> None:
    x = torch.ones(3)
    assert derivative(module, x, x) is None
    assert flat(module, x, x) is None
    assert shape(module) == ""
    assert fires(module) is None
    assert not needs_input(module)


# -- types of others ---------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """LeCun's tanh: a type of the user's own."""

    def forward(self, x: Tensor) -> Tensor:
        """Between -1.7159 and 1.7159."""
        return 1.7159 * torch.tanh(x * 2 / 3)


@pytest.fixture
def registered() -> Iterator[None]:
    """The type is registered, and unknown again afterwards: functools cannot unregister, but the default can stand in its place."""

    @derivative.register
    def _(module: Scaled, x: Tensor, y: Tensor) -> Tensor:
        return 1 - (y / 1.7159).square()

    yield
    derivative.register(Scaled, derivative.registry[object])
    shape.register(Scaled, shape.registry[object])


def test_a_type_of_the_users_own_is_three_lines(registered: None) -> None:
    module = Scaled()
    y, slope = slopes(module, GRID)
    torch.testing.assert_close(derivative(module, GRID, y), slope.abs() / steepest(module), atol=5e-5, rtol=0)
    assert needs_input(module), "it is handed both: nobody has to say which it reads"
    assert shape(module) == "two-sided"
    assert fires(module) is None
    shape.register(Scaled, lambda module: "one-sided")
    assert shape(module) == "one-sided"


def test_a_type_of_the_users_own_is_unknown_before() -> None:
    y = torch.ones(2)
    assert derivative(Scaled(), y, y) is None
    assert shape(Scaled()) == ""


def test_a_subclass_is_what_its_base_class_is() -> None:
    class Mine(nn.ReLU):
        pass

    x = torch.tensor([0.0, 1.0])
    assert flat(Mine(), x, x).tolist() == [True, False]  # type: ignore[union-attr]
    assert (shape(Mine()), fires(Mine()), needs_input(Mine())) == ("one-sided", 0.0, False)


def made(name: str, **contents: Any) -> nn.Module:
    """A module of a class of that name, which torch does not know."""
    module: nn.Module = type(name, (nn.Module,), {"forward": lambda self, x: F.gelu(x)})()
    for key, value in contents.items():
        setattr(module, key, value)
    return module


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("GELUActivation", nn.GELU()),
        ("NewGELUActivation", nn.GELU()),
        ("PytorchGELUTanh", nn.GELU()),
        ("FastGELUActivation", nn.GELU()),
        ("QuickGELUActivation", nn.GELU()),
        ("QuickGELU", nn.GELU()),
        ("ClippedGELUActivation", nn.GELU()),
        ("SiLUActivation", nn.SiLU()),
        ("Swish", nn.SiLU()),
        ("MemoryEfficientSwish", nn.SiLU()),
    ],
)
def test_activations_of_other_packages_are_known_by_their_name(name: str, known: nn.Module) -> None:
    module, y = made(name), known(GRID)
    assert torch.equal(flat(module, GRID, y), flat(known, GRID, y))  # type: ignore[arg-type]
    assert (shape(module), fires(module), needs_input(module)) == ("one-sided", fires(known), True)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(made("GELUBlock", inner=nn.GELU()), id="a block, whose own activation is judged"),
        pytest.param(made("GELULayer", weight=nn.Parameter(torch.ones(1))), id="a layer"),
        pytest.param(made("Swish", beta=nn.Parameter(torch.ones(1))), id="a swish that learns its beta"),
        pytest.param(made("SwiGLU"), id="a gated unit"),
        pytest.param(made("HardSwish"), id="another swish"),
    ],
)
def test_a_name_alone_is_not_enough(module: nn.Module) -> None:
    assert derivative(module, GRID, GRID) is None
    assert (shape(module), fires(module), needs_input(module)) == ("", None, False)


# -- functional calls --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in CALLS.items()])
def test_a_functional_call_is_known_by_its_node(call: Call) -> None:
    leaf = GRID.clone().requires_grad_()
    node = call(leaf * 1).grad_fn
    found = of_node(node)
    assert found is not None
    module, attribute = found
    saved = getattr(node, attribute).detach()
    assert attribute in ("_saved_self", "_saved_result")
    if attribute == "_saved_self":
        assert torch.equal(saved, GRID), "the input, also of what works in place"
        x, y = saved, module(saved)
    else:
        assert not needs_input(module), "the output is all there is"
        x = y = saved
    _, slope = slopes(call, GRID)
    torch.testing.assert_close(derivative(module, x, y), slope.abs() / steepest(call), atol=5e-5, rtol=0)


@pytest.mark.parametrize("call", [F.softmax, F.softmin], ids=["softmax", "softmin"])
def test_a_functional_softmax_is_known_by_its_node(call: Callable[..., Tensor]) -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    node = call(x, dim=0).grad_fn
    module, attribute = of_node(node)  # type: ignore[misc]
    y = getattr(node, attribute).detach()
    slope = torch.autograd.functional.jacobian(lambda x: call(x, dim=0), x.detach()).diagonal()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(derivative(module, y, y), 4 * slope.abs())
    assert shape(module) == "probability"


def test_every_node_of_the_table_is_one_that_torch_makes() -> None:
    leaf = GRID.clone().requires_grad_()
    names = {type(call(leaf * 1).grad_fn).__name__ for call in CALLS.values()}
    assert names | {"SoftmaxBackward0"} == FUNCTIONAL.keys()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (F.relu6, "Hardtanh(min_val=0, max_val=6)"),
        (F.elu, "ELU(alpha=1.0)"),
        (F.selu, "SELU()"),
        (functools.partial(F.gelu, approximate="tanh"), "GELU(approximate='tanh')"),
        (functools.partial(F.threshold, threshold=1.0, value=0.0), "Threshold(threshold=1.0, value=0.0)"),
    ],
    ids=["relu6", "elu", "selu", "gelu", "threshold"],
)
def test_the_parameters_of_a_functional_call_are_kept(call: Call, expected: str) -> None:
    module, _ = of_node(call(torch.ones(2, requires_grad=True)).grad_fn)  # type: ignore[misc]
    assert str(module) == expected
    assert shape(module) == "one-sided"


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(F.leaky_relu, id="a leak"),
        pytest.param(functools.partial(F.elu, alpha=-1.0), id="no plateau"),
        pytest.param(functools.partial(F.hardtanh, min_val=1.0, max_val=1.0), id="equal bounds"),
        pytest.param(F.softsign, id="several nodes"),
        pytest.param(functools.partial(F.log_softmax, dim=0), id="belongs to the loss"),
        pytest.param(torch.exp, id="no activation"),
    ],
)
def test_a_node_without_a_flat_part_is_not_judged(call: Call) -> None:
    assert of_node(call(torch.ones(2, requires_grad=True)).grad_fn) is None


def test_a_node_that_lacks_what_it_should_hold_is_not_judged() -> None:
    """As on a torch that names it otherwise."""
    assert of_node(type("GeluBackward0", (), {})()) is None
    assert of_node(None) is None
