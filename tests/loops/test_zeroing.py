"""The plain loop, and the places where people clear the gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradwatch import GradWatch
from gradwatch.records import GradState, Sampling
from tests.loops.harness import HEALTHY_AND_FAULTY, NAN, agree, backward, batches, healthy, mlp, mse, said, step
from tests.reference import CHANGED, CLEARED, NO_STEP, REACHED, STALE, STEPPED, Reference


@HEALTHY_AND_FAULTY
def test_plain_loop_and_a_nan_loss_in_it(fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(30):
            optimizer.zero_grad()
            loss = mse(model(x), y)
            if fault and i == 12:
                loss = loss * NAN
            backward(reference, loss)
            step(reference, optimizer)
    agree(watch, reference, records=30)
    if fault:
        said(watch, "non_finite_loss", step=12, layers=())
    else:
        healthy(watch, reference)


def test_full_statistics_keep_their_cadence() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reference = Reference(model, optimizer, dense=4, every=5)
    with GradWatch(model, console=False, sampling=Sampling(dense=4, every=5)) as watch:
        for _, x, y in batches(30):
            optimizer.zero_grad()
            backward(reference, mse(model(x), y))
            step(reference, optimizer)
    agree(watch, reference, records=30)
    healthy(watch, reference)


def test_a_learning_rate_schedule_is_recorded_for_each_group() -> None:
    model = mlp()
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2:].parameters()}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(30):
            optimizer.zero_grad()
            backward(reference, mse(model(x), y))
            step(reference, optimizer)
            scheduler.step()
    agree(watch, reference, records=30)
    healthy(watch, reference)
    assert watch.history.stat("lr")[0].tolist() == pytest.approx([0.002] * 2 + [0.01] * 4)


@HEALTHY_AND_FAULTY
@pytest.mark.parametrize("place", ["before the backward", "after the step", "set_to_none=False", "by the model"])
def test_gradients_cleared_in_any_place_and_never(place: str, fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02 if fault else 0.2)
    reference = Reference(model, optimizer)

    def clear(here: str) -> None:
        if here != place or fault:
            return
        if place == "by the model":
            model.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=place != "set_to_none=False")

    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(30):
            clear("set_to_none=False")
            clear("by the model")
            loss = mse(model(x), y)
            clear("before the backward")
            backward(reference, loss)
            step(reference, optimizer)
            clear("after the step")
    agree(watch, reference, records=30)
    assert ((watch.history.stat("grad_state") & STALE) != 0)[1:].all() == fault
    if fault:
        said(watch, "gradients_not_zeroed", step=range(2), layers=("",))
    else:
        healthy(watch, reference)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_cleared_and_never_stepped(set_to_none: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(30):
            optimizer.zero_grad(set_to_none=set_to_none)
            backward(reference, mse(model(x), y))
            reference.close(skip=NO_STEP)
    reference.rows.pop()  # The last one has been neither cleared nor stepped: it is unfinished.
    agree(watch, reference, records=29, but=("grad_state",))
    state = watch.history.stat("grad_state")
    assert ((state | CLEARED) == REACHED | CLEARED).all()
    said(watch, "never_stepped", step=0, layers=())


def test_gradients_piled_up_and_never_stepped() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradWatch(model, optimizer=optimizer, console=False) as watch:
        for _, x, y in batches(80):
            mse(model(x), y).backward()
    assert len(watch.history) == 0
    said(watch, "never_stepped", step=0, layers=())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_cleared_and_then_stepped_is_one_flagged_record(set_to_none: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False, rules=()) as watch:
        for i, x, y in batches(12):
            optimizer.zero_grad()
            backward(reference, mse(model(x), y))
            if i % 3 == 1:
                optimizer.zero_grad(set_to_none=set_to_none)
            step(reference, optimizer)
    agree(watch, reference, records=12)
    state = watch.history.stat("grad_state") & ~np.uint8(GradState.SAME)
    assert (state[1::3] == REACHED | STEPPED | CLEARED).all()
    assert (state[2::3] == REACHED | STEPPED | CHANGED).all()


def test_an_update_left_out_by_the_user_is_a_skipped_record() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    left_out = (3, 4, 11)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(30):
            optimizer.zero_grad()
            backward(reference, mse(model(x), y))
            if i in left_out:
                reference.close(skip=NO_STEP)
                continue
            step(reference, optimizer)
    agree(watch, reference, records=30, but=("grad_state",))
    state = watch.history.stat("grad_state")
    assert ((state[list(left_out)] | CLEARED) == REACHED | CLEARED).all()
    assert watch.history.stat("skipped").nonzero()[0].tolist() == list(left_out)
    healthy(watch, reference)


def test_a_deep_sigmoid_network_vanishes() -> None:
    layers: list[nn.Module] = [nn.Linear(8, 16), nn.Sigmoid()]
    for _ in range(8):
        layers += [nn.Linear(16, 16), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(30):
            optimizer.zero_grad()
            backward(reference, mse(model(x), y))
            step(reference, optimizer)
    agree(watch, reference, records=30)
    said(watch, "vanishing_gradient", step=0)


class Amplify(torch.autograd.Function):
    """The identity, with a backward that somebody got wrong."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 8


class Block(nn.Module):
    def __init__(self, amplify: bool) -> None:
        super().__init__()
        self.linear, self.amplify = nn.Linear(16, 16), amplify

    def forward(self, x: Tensor) -> Tensor:
        y = x + torch.tanh(self.linear(x)) / 2
        return Amplify.apply(y) if self.amplify else y  # type: ignore[no-any-return,no-untyped-call]


@HEALTHY_AND_FAULTY
def test_a_residual_network_and_a_custom_backward_that_amplifies(fault: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 16), *(Block(fault) for _ in range(8)), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(40):
            optimizer.zero_grad()
            backward(reference, mse(model(x), y))
            step(reference, optimizer)
    agree(watch, reference, records=40)
    if fault:
        said(watch, "exploding_gradient", step=0)
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_a_learning_rate_and_one_that_diverges(fault: bool) -> None:
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.5 if fault else 0.1)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(40):
            optimizer.zero_grad()
            backward(reference, mse(model(x), y))
            step(reference, optimizer)
    agree(watch, reference, records=40)
    if fault:
        said(watch, "exploding_gradient", step=range(16), also=("loss_diverging",))
    else:
        healthy(watch, reference)


def test_a_weight_poisoned_between_two_updates() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(20):
            if i == 7:
                with torch.no_grad():
                    model[2].weight[0, 0] = NAN
            optimizer.zero_grad()
            backward(reference, mse(model(x), y))
            step(reference, optimizer)
    agree(watch, reference, records=20)
    said(watch, "non_finite_weight", step=7)


@pytest.mark.parametrize("together", [True, False])
def test_an_optimizer_of_the_other_model_steps_none_of_these_weights(together: bool) -> None:
    online, target = mlp(), mlp()
    target.requires_grad_(False)
    optimizer = torch.optim.Adam(target.parameters())
    with GradWatch({"online": online, "target": target} if together else online, console=False) as watch:
        for _, x, y in batches(12):
            mse(online(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            online.zero_grad()
    said(watch, "never_stepped", step=0, layers=())
