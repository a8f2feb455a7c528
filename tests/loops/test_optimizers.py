"""Optimizers of every make: fused, foreach, with a closure, inside backward, two at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwatch import GradWatch
from tests.loops.harness import HEALTHY_AND_FAULTY, NAN, agree, backward, batches, healthy, mlp, mse, said, step
from tests.reference import Reference


@HEALTHY_AND_FAULTY
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad], ids=lambda make: make.__name__)
@pytest.mark.parametrize("how", ["fused", "foreach", "loop"])
def test_every_implementation_of_an_optimizer(make: Any, how: str, fault: bool) -> None:
    model = mlp()
    lr = 1e-3 if fault else {"SGD": 0.2, "AdamW": 1e-2, "Adagrad": 0.05}[make.__name__]
    optimizer = make(model.parameters(), lr=lr, fused=how == "fused", foreach=how == "foreach")
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(30):
            if not fault:
                optimizer.zero_grad()
            backward(reference, mse(model(x), y))
            step(reference, optimizer)
    agree(watch, reference, records=30)
    if fault:
        said(watch, "gradients_not_zeroed", step=range(2))
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_is_one_record_a_step(line_search: str | None, fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.2, max_iter=6, line_search_fn=line_search)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(20):
            evaluations = 0

            def closure(i: int = i, x: Tensor = x, y: Tensor = y) -> Tensor:
                nonlocal evaluations
                evaluations += 1
                optimizer.zero_grad()
                loss = mse(model(x), y)
                if fault and i == 12:
                    loss = loss * NAN
                if evaluations > 1:
                    loss.backward()
                    reference.count_backward()
                else:
                    backward(reference, loss)
                    reference.before_step(optimizer)
                return loss

            optimizer.step(closure)
            reference.after_step(optimizer)
            reference.close()
    agree(watch, reference, records=20)
    assert (watch.history.stat("backward_calls")[:12] > 1).all()
    if fault:
        said(watch, "non_finite_loss", step=12, layers=())
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_a_closure_passed_to_a_first_order_optimizer(fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02 if fault else 0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(30):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                if not fault:
                    optimizer.zero_grad()
                loss = mse(model(x), y)
                backward(reference, loss)
                reference.before_step(optimizer)
                return loss

            optimizer.step(closure)
            reference.after_step(optimizer)
            reference.close()
    agree(watch, reference, records=30)
    if fault:
        said(watch, "gradients_not_zeroed", step=range(2))
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_optimizers_that_step_inside_the_backward(fault: bool) -> None:
    model = mlp()
    names = {p: name for name, p in model.named_parameters()}
    optimizers = {p: torch.optim.SGD([p], lr=0.2) for p in model.parameters()}
    reference = Reference(model, *optimizers.values())

    def update(p: Tensor) -> None:
        optimizer = optimizers[p]  # type: ignore[index]
        reference.read((names[p],))  # type: ignore[index]
        reference.before_step(optimizer)
        optimizer.step()
        reference.after_step(optimizer)
        optimizer.zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(30):
            loss = mse(model(x), y)
            if fault and i == 14:
                loss = loss * NAN
            reference.before_backward()
            loss.backward()
            reference.after_backward(loss, reached=())
            reference.close()
    agree(watch, reference, records=30)
    if fault:
        said(watch, "non_finite_loss", step=14, layers=())
    else:
        healthy(watch, reference)


class Bag(nn.Module):
    """The mean of sparse embeddings, and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 30, sparse=True)
        self.hidden = nn.Linear(30, 16)
        self.head = nn.Linear(16, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.hidden(self.words(tokens).mean(1))))
        return out


@HEALTHY_AND_FAULTY
def test_a_dense_and_a_sparse_optimizer_on_one_model(fault: bool) -> None:
    model = Bag()
    dense = torch.optim.Adam([*model.hidden.parameters(), *([] if fault else model.head.parameters())], lr=1e-2)
    sparse = torch.optim.SparseAdam(model.words.parameters(), lr=5e-2)
    reference = Reference(model, dense, sparse)
    generator = torch.Generator().manual_seed(2)
    with GradWatch(model, console=False) as watch:
        for _ in range(40):
            tokens = torch.randint(0, 50, (64, 6), generator=generator)
            target = (tokens.float().mean(1, keepdim=True) - 25) / 10
            dense.zero_grad()
            sparse.zero_grad()
            if fault:
                model.head.zero_grad()
            backward(reference, mse(model(tokens), target))
            step(reference, dense, sparse)
    agree(watch, reference, records=40)
    if fault:
        said(watch, "not_in_optimizer", step=0, layers=("head",))
    else:
        healthy(watch, reference)


def test_an_optimizer_left_out_makes_its_parameters_foreign() -> None:
    model = Bag()
    dense = torch.optim.Adam([*model.hidden.parameters(), *model.head.parameters()], lr=1e-2)
    sparse = torch.optim.SparseAdam(model.words.parameters(), lr=5e-2)
    reference = Reference(model, dense, sparse)
    generator = torch.Generator().manual_seed(2)
    with GradWatch(model, optimizer=(dense, sparse), console=False, rules=()) as watch:
        for i in range(20):
            tokens = torch.randint(0, 50, (64, 6), generator=generator)
            model.zero_grad()
            backward(reference, mse(model(tokens), (tokens.float().mean(1, keepdim=True) - 25) / 10))
            step(reference, *((dense, sparse) if i % 2 else (dense,)))
    agree(watch, reference, records=20)


@pytest.mark.parametrize("last", [True, False], ids=["stepped last", "stepped first"])
def test_an_optimizer_whose_part_gets_nothing_makes_no_record_of_its_own(last: bool) -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.encoder(x).tanh().detach())
            return out

    model = Cut()
    encoder, head = torch.optim.SGD(model.encoder.parameters(), lr=0.1), torch.optim.SGD(model.head.parameters(), lr=0.1)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(30):
            model.zero_grad()
            mse(model(x), y).backward()
            for optimizer in (head, encoder) if last else (encoder, head):
                optimizer.step()
    assert watch.history.recorded == 30
    said(watch, "missing_gradient", step=0, layers=("encoder",))
