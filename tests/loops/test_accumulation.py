"""Several backward passes in one update."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradwatch import GradWatch
from tests.loops.harness import HEALTHY_AND_FAULTY, NAN, agree, backward, batches, healthy, mlp, mse, said, step
from tests.reference import Reference


@HEALTHY_AND_FAULTY
def test_accumulation_with_a_short_last_group_and_no_clearing(fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01 if fault else 0.2)
    reference = Reference(model, optimizer)
    group, epoch = 4, 22
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(5 * epoch, size=16):
            backward(reference, mse(model(x), y) / group)
            if i % epoch % group == group - 1 or i % epoch == epoch - 1:
                step(reference, optimizer)
                if not fault:
                    optimizer.zero_grad()
    agree(watch, reference, records=30)
    assert watch.history.stat("backward_calls").tolist() == [4, 4, 4, 4, 4, 2] * 5
    if fault:
        said(watch, "gradients_not_zeroed", step=range(2), layers=("",))
    else:
        assert all(a.severity < 30 for a in watch.alerts)
        loss = reference.stat("loss")
        assert loss[-6:].mean() < 0.5 * loss[:6].mean()


def test_accumulation_that_ends_unfinished_gives_no_record_for_the_rest() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(62, size=16):
            backward(reference, mse(model(x), y) / 3)
            if i % 3 == 2:
                step(reference, optimizer)
                optimizer.zero_grad()
    reference.drop()
    agree(watch, reference, records=20)
    healthy(watch, reference)
    assert "unfinished" in watch.summary()


@HEALTHY_AND_FAULTY
def test_several_backward_calls_on_one_graph(fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(30):
            optimizer.zero_grad()
            out = model(x)
            fit, size = mse(out, y), out.pow(2).mean() * 0.01
            if fault and i == 11:
                size = size * NAN
            backward(reference, fit, retain_graph=True)
            backward(reference, size)
            step(reference, optimizer)
    agree(watch, reference, records=30)
    assert (watch.history.stat("backward_calls") == 2).all()
    if fault:
        said(watch, "non_finite_loss", step=11, layers=())
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_one_loss_backwarded_twice_through_a_retained_graph(fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(30):
            if not fault:
                optimizer.zero_grad()
            loss = mse(model(x), y) * (0.1 if fault else 1)
            backward(reference, loss, retain_graph=True)
            backward(reference, loss)
            step(reference, optimizer)
    agree(watch, reference, records=30)
    if fault:
        said(watch, "gradients_not_zeroed", step=range(2), layers=("",))
    else:
        healthy(watch, reference)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.value = nn.Linear(32, 1)
        self.sign = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.value(h), self.sign(h)


@HEALTHY_AND_FAULTY
def test_several_losses_and_one_that_was_forgotten(fault: bool) -> None:
    model = TwoHeads()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(40):
            optimizer.zero_grad()
            value, sign = model(x)
            backward(reference, mse(value, y), reached=("trunk.*", "value.*"), retain_graph=True)
            if not fault:
                backward(reference, mse(sign, y.sign()), reached=("trunk.*", "sign.*"))
            step(reference, optimizer)
    agree(watch, reference, records=40)
    if fault:
        said(watch, "missing_gradient", step=0, layers=("sign",))
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_losses_that_take_turns(fault: bool) -> None:
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(40):
            optimizer.zero_grad()
            value, sign = model(x)
            if i % 2:
                backward(reference, mse(sign, y), reached=("trunk.*", "sign.*"))
            else:
                backward(reference, mse(value, y) * (NAN if fault and i == 20 else 1), reached=("trunk.*", "value.*"))
            step(reference, optimizer)
    agree(watch, reference, records=40)
    if fault:
        said(watch, "non_finite_loss", step=20, layers=())
    else:
        healthy(watch, reference)
