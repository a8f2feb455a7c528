"""Loops that are interrupted and go on, and watches that are left and entered again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradwatch import GradWatch
from tests.loops.harness import HEALTHY_AND_FAULTY, NAN, agree, backward, batches, healthy, mlp, mse, said, step
from tests.reference import Reference


class Interrupted(Exception):
    pass


class Net(nn.Module):
    """`mlp`, in which something may happen in the middle of the backward."""

    def __init__(self) -> None:
        super().__init__()
        net = mlp()
        self.front, self.back = net[:2], net[2:]

    def forward(self, x: Tensor, error: type[BaseException] | None = None) -> Tensor:
        h = self.front(x)
        if error is not None:

            def interrupt(_: Tensor) -> None:
                raise error("in the middle of the backward")

            h.register_hook(interrupt)
        out: Tensor = self.back(h)
        return out


@HEALTHY_AND_FAULTY
@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_a_backward_that_is_interrupted_and_a_loop_that_goes_on(error: type[BaseException], fault: bool) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(32):
            optimizer.zero_grad()
            if i in (7, 20):
                # The user catches it: what the broken backward left behind is cleared, and gives no record.
                with pytest.raises(error, match="in the middle"):
                    mse(model(x, error), y).backward()
                continue
            loss = mse(model(x), y)
            backward(reference, loss * NAN if fault and i == 25 else loss)
            step(reference, optimizer)
    agree(watch, reference, records=30)
    if fault:
        said(watch, "non_finite_loss", step=23, layers=())
    else:
        healthy(watch, reference)


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_a_backward_that_is_interrupted_and_tried_again(error: type[BaseException]) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(30):
            optimizer.zero_grad()
            if i % 10 == 3:
                with pytest.raises(error, match="in the middle"):
                    mse(model(x, error), y).backward()
                optimizer.zero_grad()
            backward(reference, mse(model(x), y))
            step(reference, optimizer)
    agree(watch, reference, records=30)
    healthy(watch, reference)


def test_an_exception_inside_a_closure_leaves_no_step_open() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)

    def broken() -> Tensor:
        raise Interrupted("in the closure")

    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(30):
            if i % 10 == 5:
                with pytest.raises(Interrupted):
                    optimizer.step(broken)  # type: ignore[arg-type]
            optimizer.zero_grad()
            backward(reference, mse(model(x), y))
            step(reference, optimizer)
    agree(watch, reference, records=30)
    healthy(watch, reference)


def test_a_block_left_by_an_exception_keeps_its_records() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    watch = GradWatch(model, console=False)

    def train() -> None:
        with watch:
            for i, x, y in batches(30):
                optimizer.zero_grad()
                if i == 12:
                    mse(model(x, Interrupted), y).backward()
                backward(reference, mse(model(x), y))
                step(reference, optimizer)

    with pytest.raises(Interrupted):
        train()
    agree(watch, reference, records=12)
    before = len(watch.history)
    for _, x, y in batches(3):
        optimizer.zero_grad()
        mse(model(x), y).backward()
        optimizer.step()
    assert len(watch.history) == before


@HEALTHY_AND_FAULTY
def test_leaving_and_entering_again_continues(fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    reference = Reference(model, optimizer)
    watch = GradWatch(model, console=False)
    for i, x, y in batches(45):
        optimizer.zero_grad()
        loss = mse(model(x), y)
        if fault and i == 35:
            loss = loss * NAN
        if 15 <= i < 30:
            loss.backward()
            optimizer.step()
            continue
        if i in (0, 30):
            watch.attach()
        backward(reference, loss)
        step(reference, optimizer)
        if i in (14, 44):
            watch.detach()
    agree(watch, reference, records=30)
    if fault:
        said(watch, "non_finite_loss", step=20, layers=())
    else:
        healthy(watch, reference)


def test_two_watches_on_one_model_see_equal_numbers() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as first, GradWatch(model, console=False) as second:
        for _, x, y in batches(30):
            optimizer.zero_grad()
            backward(reference, mse(model(x), y))
            step(reference, optimizer)
    agree(first, reference, records=30)
    agree(second, reference, records=30)
    healthy(first, reference)
    healthy(second, reference)


def test_only_one_of_two_watches_may_act() -> None:
    model = mlp()
    with (
        GradWatch(model, clip=1.0, console=False),
        pytest.raises(RuntimeError, match="clip"),
        GradWatch(model, clip=1.0, console=False),
    ):
        pass
