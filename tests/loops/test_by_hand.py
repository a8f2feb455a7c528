"""Loops without an optimizer, and gradients without a backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from gradwatch import GradWatch
from tests.loops.harness import HEALTHY_AND_FAULTY, NAN, agree, backward, batches, healthy, mlp, mse, said, step
from tests.reference import CHANGED, REACHED, Reference

LR = 0.2


def modern(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p -= LR * p.grad
            p.grad = None


def inplace(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad, alpha=LR)
    model.zero_grad(set_to_none=False)


def old(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.sub_(LR * p.grad.data)
        p.grad.data.zero_()


def rebound(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data - LR * p.grad
        p.grad = None


@HEALTHY_AND_FAULTY
@pytest.mark.parametrize("update", [modern, inplace, old, rebound], ids=lambda f: f.__name__)
def test_weights_moved_by_hand(update: Callable[[nn.Module], None], fault: bool) -> None:
    model = mlp()
    reference = Reference(model)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(30):
            loss = mse(model(x), y)
            if fault and i == 13:
                loss = loss * NAN
            backward(reference, loss)
            update(model)
            reference.after_moving()
            reference.close()
    agree(watch, reference, records=30)
    assert (watch.history.stat("grad_state")[:13] == REACHED | CHANGED).all()
    if fault:
        said(watch, "non_finite_loss", step=13, layers=())
    else:
        healthy(watch, reference)


def test_weights_never_moved_by_hand() -> None:
    model = mlp()
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(30):
            mse(model(x), y).backward()
            for p in model.parameters():
                p = p - LR * p.grad  # The beginner's mistake: a new tensor, the weight stays.
            model.zero_grad()
    assert watch.history.stat("skipped").all()
    said(watch, "never_stepped", step=0, layers=())


def test_an_update_closed_by_the_user() -> None:
    model = mlp()
    reference = Reference(model)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(30):
            backward(reference, mse(model(x), y))
            modern(model)
            watch.step()
            reference.after_moving()
            reference.close()
            assert len(watch.history) == i + 1
    agree(watch, reference, records=30)
    healthy(watch, reference)


@HEALTHY_AND_FAULTY
@pytest.mark.parametrize("told", [False, True], ids=["loss unknown", "watch.loss"])
def test_gradients_set_by_hand(told: bool, fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(30):
            loss = mse(model(x), y)
            if fault and i == 16:
                loss = loss + (model[2].weight * 0).pow(2).sum().sqrt()
            if told:
                assert watch.loss(loss) is loss
            for p, grad in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                p.grad = grad
            reference.read()
            reference.before_step(optimizer)
            optimizer.step()
            reference.after_step(optimizer)
            reference.close(loss=float(loss.detach()) if told else NAN)
    agree(watch, reference, records=30)
    assert (watch.history.stat("backward_calls") == 0).all()
    if fault:
        said(watch, "non_finite_gradient", step=16, layers=("2",))
    else:
        # No backward is seen: the watch may say, once, that it reads such gradients in the step.
        healthy(watch, reference, learns=told, notices=1)


def test_a_loss_told_to_the_watch_replaces_the_seen_one_by_the_mean_of_the_told() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(20):
            optimizer.zero_grad()
            loss = mse(model(x), y)
            backward(reference, loss + 1e-3 * model[0].weight.pow(2).sum())
            told = float(loss.detach())
            watch.loss(told)
            if i % 2:
                watch.loss(torch.tensor(3 * told))
            reference.before_step(optimizer)
            optimizer.step()
            reference.after_step(optimizer)
            reference.close(loss=2 * told if i % 2 else told)
    agree(watch, reference, records=20)


@HEALTHY_AND_FAULTY
def test_a_root_that_is_no_scalar_has_gradients_and_no_loss(fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(30):
            optimizer.zero_grad()
            out = model(x)
            delta = 2 * (out.detach() - y) / y.numel() * (NAN if fault and i == 21 else 1)
            reference.before_backward()
            out.backward(delta)
            reference.after_backward()
            step(reference, optimizer)
    agree(watch, reference, records=30)
    if fault:
        said(watch, "non_finite_gradient", step=21)
    else:
        healthy(watch, reference, learns=False)
