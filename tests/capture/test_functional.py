"""Activations that are functions are seen as their modules are: two networks that differ in nothing else give the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradwatch import GradWatch

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]] = {
    "relu": (F.relu, nn.ReLU()),
    "tanh": (torch.tanh, nn.Tanh()),
    "sigmoid": (torch.sigmoid, nn.Sigmoid()),
    "gelu": (F.gelu, nn.GELU()),
    "tanh gelu": (lambda x: F.gelu(x, approximate="tanh"), nn.GELU(approximate="tanh")),
    "silu": (F.silu, nn.SiLU()),
    "relu in place": (lambda x: x.relu_(), nn.ReLU()),
    "tanh in place": (lambda x: x.tanh_(), nn.Tanh()),
    "relu6": (F.relu6, nn.ReLU6()),
    "elu": (F.elu, nn.ELU()),
    "softmax": (lambda x: x.softmax(-1), nn.Softmax(-1)),
    "method": (lambda x: x.relu(), nn.ReLU()),
}

MAKERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 12), (20, 6)),
    "3-d linear": (lambda: nn.Linear(6, 12), (20, 5, 6)),
    "convolution": (lambda: nn.Conv2d(6, 12, 3), (4, 6, 9, 9)),
    "batch norm": (lambda: nn.BatchNorm2d(6), (4, 6, 9, 9)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(6), (30, 6)),
    "layer norm": (lambda: nn.LayerNorm(6), (20, 5, 6)),
}


class Functional(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.maker, self.function = make(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.maker(x))


class Modular(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], activation: nn.Module) -> None:
        super().__init__()
        self.maker, self.activation = make(), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.maker(x))


def watched(build: Callable[[], nn.Module], shape: tuple[int, ...], updates: int = 13) -> tuple[GradWatch, nn.Module]:
    """Train with activations pushed into their flat parts, and one unit in five of the maker dead."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torch.no_grad():
        maker: nn.Module = model.maker  # type: ignore[assignment]
        maker.weight.mul_(4)  # type: ignore[operator]
        maker.bias[::5] -= 60  # type: ignore[index, operator]
    with GradWatch(model, console=False) as watch:
        for _ in range(updates):
            optimizer.zero_grad()
            model(torch.randn(shape)).square().mean().backward()
            optimizer.step()
    return watch, model


HIDDEN = {("relu in place", "3-d linear"), ("tanh in place", "3-d linear")}
"""The output is a view, and a change of it in place is one node (`CopySlices`) that does not say what is in it."""


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_is_seen_as_its_module_is(function: str, maker: str) -> None:
    call, module = FUNCTIONS[function]
    make, shape = MAKERS[maker]
    functional, _ = watched(lambda: Functional(make, call), shape)
    modular, _ = watched(lambda: Modular(make, module), shape)
    assert functional.history.layers == ("", "maker")
    assert modular.history.layers == ("", "maker", "activation")
    if (function, maker) in HIDDEN:
        assert np.isnan(functional.history.stat("saturated_fraction")).all()
        return
    for name in ("saturated_fraction", "dead_fraction"):
        expected = modular.history.stat(name)[:, 2]
        np.testing.assert_allclose(functional.history.stat(name)[:, 1], expected, rtol=1e-5, err_msg=name)
        assert np.isnan(modular.history.stat(name)[:, 1]).all(), "the module is the activation, not what it follows"
    assert np.isfinite(functional.history.stat("saturated_fraction")[:, 1]).all()
    assert functional.notices == ()


@pytest.mark.parametrize(
    "shaped",
    [
        pytest.param(lambda h: h.view(-1), id="view"),
        pytest.param(lambda h: h.transpose(0, 1), id="transpose"),
        pytest.param(lambda h: h.reshape(4, 5, 12).permute(2, 0, 1), id="reshape and permute"),
        pytest.param(lambda h: h.unsqueeze(0), id="unsqueeze"),
        pytest.param(lambda h: h.float(), id="to"),
    ],
)
def test_a_function_behind_a_change_of_shape_still_follows_the_module(shaped: Callable[[Tensor], Tensor]) -> None:
    watch, _ = watched(lambda: Functional(lambda: nn.Linear(6, 12), lambda h: F.relu(shaped(h))), (20, 6))
    plain, _ = watched(lambda: Functional(lambda: nn.Linear(6, 12), F.relu), (20, 6))
    np.testing.assert_allclose(
        watch.history.stat("saturated_fraction")[:, 1], plain.history.stat("saturated_fraction")[:, 1], rtol=1e-5
    )


def test_what_stands_between_a_module_and_a_function_keeps_them_apart() -> None:
    watch, _ = watched(lambda: Functional(lambda: nn.Linear(6, 12), lambda h: F.relu(h * 2 + 1)), (20, 6))
    assert np.isnan(watch.history.stat("saturated_fraction")[:, 1]).all()


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(6, 12)
        self.forwards = 0

    def block(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return F.gelu(F.relu(self.maker(x)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def test_a_function_inside_a_checkpoint_is_not_read_for_that_would_recompute_it() -> None:
    watch, model = watched(Recomputed, (20, 6), updates=5)
    assert model.forwards == 10
    assert np.isnan(watch.history.stat("saturated_fraction")).all()
    assert (watch.history.stat("calls")[:, 1] == 1).all()


def test_a_function_after_a_checkpoint_costs_no_recomputation_either() -> None:
    class After(Recomputed):
        def block(self, x: Tensor) -> Tensor:
            self.forwards += 1
            return self.maker(x)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x))

    _, model = watched(After, (20, 6), updates=5)
    assert model.forwards == 10


def test_one_function_after_several_calls_counts_each() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maker = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.maker(torch.relu(self.maker(x)) - 200))

    torch.manual_seed(0)
    model = Twice()
    with torch.no_grad():
        model.maker.weight.copy_(torch.eye(6))
        model.maker.bias.fill_(50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradWatch(model, console=False) as watch:
        for _ in range(3):
            model(torch.randn(20, 6)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    # The first call is all above 0, the second all at it.
    np.testing.assert_allclose(watch.history.stat("saturated_fraction")[:, 1], 0.5, atol=0.01)


def test_a_module_of_ones_own_that_is_a_function_is_named_itself() -> None:
    class Mine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    watch, _ = watched(lambda: Modular(lambda: nn.Linear(6, 12), Mine()), (20, 6))
    plain, _ = watched(lambda: Modular(lambda: nn.Linear(6, 12), nn.ReLU()), (20, 6))
    for name in ("saturated_fraction", "dead_fraction"):
        np.testing.assert_array_equal(watch.history.stat(name), plain.history.stat(name), err_msg=name)


def test_a_module_without_a_function_says_nothing() -> None:
    watch, _ = watched(lambda: Functional(lambda: nn.Linear(6, 12), lambda h: h), (20, 6))
    assert np.isnan(watch.history.stat("saturated_fraction")).all()
