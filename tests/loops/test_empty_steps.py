"""An optimizer that steps and never finds a gradient: all of the model is cut off from the loss, and nothing is ever recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradwatch import GradWatch
from gradwatch.records import Severity


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def as_a_number(out: Tensor, y: Tensor) -> Tensor:
    return torch.tensor(F.cross_entropy(out, y).item(), requires_grad=True)


def detached(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.detach().requires_grad_(), y)


def accuracy(out: Tensor, y: Tensor) -> Tensor:
    return (out.argmax(1) == y).float().mean().requires_grad_()


@pytest.mark.parametrize("loss", [as_a_number, detached, accuracy])
def test_a_model_that_is_cut_off_as_a_whole_is_told_while_it_trains(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x, y = network(), torch.randn(16, 6), torch.arange(16) % 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[int] = []
    with GradWatch(model, console=False) as watch:
        for step in range(40):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            seen += [step] * (len(watch.alerts) > len(seen))
    (alert,) = watch.alerts
    assert (alert.rule, alert.severity, alert.step) == ("missing_gradient", Severity.ERROR, 0)
    assert set(alert.parameters) == {name for name, _ in model.named_parameters()}
    assert seen == [11], "at the twelfth step"
    assert (
        alert.cause
        == "What the model puts out depends on them and passes a gradient back; the way to the loss is cut outside the model."
    )
    assert watch.notices == ()


class TriesOut(torch.optim.Optimizer):
    """Moves weights without a gradient, as zeroth-order optimizers do."""

    def __init__(self, parameters: Any, move: Callable[[Tensor], None]) -> None:
        super().__init__(parameters, {})
        self.move = move

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.move(p)


def in_place(p: Tensor) -> None:
    p.add_(0.01)


def past_the_version(p: Tensor) -> None:
    p.data.add_(0.01)


def another_tensor(p: Tensor) -> None:
    p.data = p.data + 0.01


@pytest.mark.parametrize("move", [in_place, past_the_version, another_tensor])
def test_an_optimizer_that_needs_no_gradient_is_no_fault(move: Callable[[Tensor], None]) -> None:
    model = network()
    optimizer = TriesOut(model.parameters(), move)
    with GradWatch(model, console=False) as watch:
        for _ in range(40):
            with torch.no_grad():
                model(torch.randn(16, 6))
            optimizer.step()
    assert watch.alerts == ()
    assert watch.notices == ()


def test_a_frozen_model_whose_optimizer_steps_is_no_fault() -> None:
    model = network()
    head = nn.Linear(3, 3)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    with GradWatch(model, console=False) as watch:
        model.requires_grad_(False)
        for _ in range(40):
            optimizer.zero_grad()
            head(model(torch.randn(16, 6))).square().mean().backward()
            optimizer.step()
    assert not [alert for alert in watch.alerts if alert.severity >= Severity.WARNING]


@pytest.mark.parametrize("lr", [0.1, 0.0])
def test_gradients_that_somebody_sets_by_hand_are_there(lr: float) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with GradWatch(model, console=False) as watch:
        for _ in range(40):
            for p in model.parameters():
                p.grad = torch.randn_like(p) * 1e-3
            optimizer.step()
            optimizer.zero_grad()
    assert "missing_gradient" not in [alert.rule for alert in watch.alerts]


def test_it_ends_when_a_gradient_comes() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with GradWatch(model, console=False) as watch:
        for step in range(80):
            optimizer.zero_grad()
            out, y = model(torch.randn(16, 6)), torch.arange(16) % 3
            (as_a_number(out, y) if step < 20 else F.cross_entropy(out, y)).backward()
            optimizer.step()
    (alert,) = [alert for alert in watch.alerts if alert.rule == "missing_gradient"]
    assert alert.state == "ended"


def test_gradients_of_before_the_block_are_there() -> None:
    """Nothing is recorded of them, and with a rate of 0 nothing moves; yet the steps are not empty."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(torch.randn(16, 6)).square().mean().backward()
    with GradWatch(model, console=False) as watch:
        for _ in range(40):
            optimizer.step()
    assert "missing_gradient" not in [alert.rule for alert in watch.alerts]
