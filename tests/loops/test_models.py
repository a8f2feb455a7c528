"""Models of every make: embeddings, shared modules, checkpointing, lazy modules, odd parameters, second derivatives."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from gradwatch import GradWatch
from tests.loops.harness import HEALTHY_AND_FAULTY, NAN, agree, backward, batches, healthy, mlp, mse, said, step
from tests.reference import Reference


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        out: Tensor = self.head(h + torch.tanh(self.body(h)))
        return out


@HEALTHY_AND_FAULTY
def test_tied_embeddings_have_one_column(fault: bool) -> None:
    model = TiedLanguageModel()
    with torch.no_grad():
        model.embed.weight.mul_(0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    reference = Reference(model, optimizer)
    generator = torch.Generator().manual_seed(2)
    with GradWatch(model, console=False) as watch:
        for i in range(40):
            tokens = torch.randint(0, 40, (8, 16), generator=generator)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(tokens).flatten(0, 1), (tokens * 7 % 40).flatten())
            backward(reference, loss * 1e4 if fault and i == 30 else loss)
            step(reference, optimizer)
    agree(watch, reference, records=40)
    assert watch.history.parameters == ("embed.weight", "body.weight", "body.bias")
    if fault:
        said(watch, "gradient_spike", step=30)
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_sparse_embeddings(fault: bool) -> None:
    model = nn.Sequential(nn.EmbeddingBag(60, 24, sparse=True), nn.Linear(24, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if fault else 0.5)
    reference = Reference(model, optimizer)
    generator = torch.Generator().manual_seed(2)
    with GradWatch(model, console=False) as watch:
        for _ in range(40):
            tokens = torch.randint(0, 60, (64, 5), generator=generator)
            if not fault:
                optimizer.zero_grad()
            backward(reference, mse(model(tokens), (tokens.float().mean(1, keepdim=True) - 30) / 15) * (0.02 if fault else 1))
            step(reference, optimizer)
    agree(watch, reference, records=40)
    if fault:
        said(watch, "gradients_not_zeroed", step=range(2))
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_double_backward_through_a_gradient_penalty(fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(30):
            optimizer.zero_grad()
            x = (x * 0 if fault and i == 18 else x).requires_grad_()
            out = model(x)
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            # At i == 18 the inputs are all zero, and a norm written by hand has no derivative there.
            penalty = (slope.pow(2).sum(1).sqrt() - 1).pow(2).mean() * 0.01 + x.pow(2).sum(1).sqrt().mean() * 0
            if fault and i == 18:
                penalty = penalty + (slope * 0).pow(2).sum().sqrt()
            backward(reference, mse(out, y) + penalty)
            step(reference, optimizer)
    agree(watch, reference, records=30)
    assert (watch.history.stat("backward_calls") == 1).all()
    if fault:
        said(watch, "non_finite_gradient", step=18)
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_functional_call_with_the_models_own_parameters(fault: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(30):
            optimizer.zero_grad()
            values: dict[str, Tensor] = dict(model.named_parameters())
            if fault:
                values |= {name: values[name].detach() for name in ("2.weight", "2.bias")}
            loss = mse(functional_call(model, values, (x,)), y)
            backward(reference, loss, reached=("[04].*",) if fault else None)
            step(reference, optimizer)
    agree(watch, reference, records=30)
    if fault:
        said(watch, "missing_gradient", step=0, layers=("2",))
    else:
        healthy(watch, reference)


class Unrolled(nn.Module):
    """One module used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.cell, self.outlet = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inlet(x)
        for _ in range(3):
            h = torch.tanh(self.cell(h))
        out: Tensor = self.outlet(h)
        return out


@HEALTHY_AND_FAULTY
def test_a_module_used_three_times(fault: bool) -> None:
    model = Unrolled()
    optimizer = torch.optim.Adam([*model.inlet.parameters(), *model.outlet.parameters()], lr=1e-2)
    if not fault:
        optimizer.add_param_group({"params": model.cell.parameters()})
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(40):
            model.zero_grad()
            backward(reference, mse(model(x), y))
            step(reference, optimizer)
    agree(watch, reference, records=40)
    if fault:
        said(watch, "not_in_optimizer", step=0, layers=("cell",))
    else:
        healthy(watch, reference)


class Checkpointed(nn.Module):
    """Two blocks that are recomputed in the backward, behind an inlet or at the very front."""

    def __init__(self, reentrant: bool, front: bool) -> None:
        super().__init__()
        self.inlet = nn.Linear(8, 16)
        self.first = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.outlet = nn.Linear(16, 1)
        self.reentrant, self.front = reentrant, front

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.inlet, x, use_reentrant=self.reentrant) if self.front else self.inlet(x)
        for block in (self.first, self.second):
            h = h + checkpoint(block, h, use_reentrant=self.reentrant)
        out: Tensor = self.outlet(h)
        return out


@HEALTHY_AND_FAULTY
def test_reentrant_checkpointing_that_loses_a_gradient_at_the_front(fault: bool) -> None:
    model = Checkpointed(True, front=fault)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    reference = Reference(model, optimizer)
    with warnings.catch_warnings(), GradWatch(model, console=False) as watch:
        # Torch says it once, by a warning that is easily lost: no input of the checkpoint requires a gradient. What comes out of it
        # does not either, and so on through the blocks behind it.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        for _, x, y in batches(40):
            optimizer.zero_grad()
            loss = mse(model(x), y)
            backward(reference, loss, reached=("outlet.*",) if fault else None)
            step(reference, optimizer)
    agree(watch, reference, records=40)
    assert (watch.history.stat("backward_calls") == 1).all()
    if fault:
        said(watch, "missing_gradient", step=0, layers=("inlet", "first", "second"))
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_checkpointing_that_is_not_reentrant(fault: bool) -> None:
    model = Checkpointed(False, front=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(40):
            optimizer.zero_grad()
            backward(reference, mse(model(x), y) * (NAN if fault and i == 17 else 1))
            step(reference, optimizer)
    agree(watch, reference, records=40)
    if fault:
        said(watch, "non_finite_loss", step=17, layers=())
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_lazy_modules(fault: bool) -> None:
    model = nn.Sequential(nn.LazyLinear(32), nn.Tanh(), nn.LazyLinear(40), nn.Tanh(), nn.Linear(40, 1))
    optimizer = torch.optim.SGD(model[4].parameters() if fault else model.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for _, x, y in batches(40):
            model.zero_grad()
            backward(reference, mse(model(x), y))
            step(reference, optimizer)
    agree(watch, reference, records=40)
    if fault:
        said(watch, "not_in_optimizer", step=0, layers=("0", "2"))
    else:
        healthy(watch, reference)


class Odd(nn.Module):
    """Parameters with no elements, complex ones, of double and of half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(8, 16)
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.phase = nn.Parameter(torch.randn(16, dtype=torch.complex64) * 0.5)
        self.wide = nn.Linear(16, 16, dtype=torch.float64)
        self.narrow = nn.Linear(16, 16, dtype=torch.float16)
        self.outlet = nn.Linear(16, 1)

    def forward(self, x: Tensor, amplify: float = 1.0) -> Tensor:
        h = torch.tanh(self.inlet(x))
        h = h + (h * self.phase).imag
        h = h + torch.tanh(self.wide(h.double())).float()
        low = self.narrow(h.half()).float()
        # Its value is one, its gradient is not.
        h = h + torch.tanh(low) + (low - low.detach()) * (amplify - 1)
        out: Tensor = self.outlet(h) + self.empty.sum()
        return out


@HEALTHY_AND_FAULTY
def test_empty_complex_double_and_half_parameters(fault: bool) -> None:
    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(40):
            optimizer.zero_grad()
            backward(reference, mse(model(x, 1e9 if fault and i == 22 else 1.0), y))
            step(reference, optimizer)
    agree(watch, reference, records=40)
    if fault:
        said(watch, "non_finite_gradient", step=22)
    else:
        healthy(watch, reference)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 4096])
def test_the_sample_of_a_step_at_its_borders(size: int) -> None:
    model = nn.Linear(size, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    reference = Reference(model, optimizer)
    generator = torch.Generator().manual_seed(2)
    with GradWatch(model, console=False, rules=()) as watch:
        for _ in range(5):
            x = torch.randn(8, size, generator=generator)
            optimizer.zero_grad()
            backward(reference, mse(model(x), x[:, :1]))
            step(reference, optimizer)
    agree(watch, reference, records=5)


def test_a_finite_gradient_whose_norm_overflows_is_no_non_finite_one() -> None:
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-36)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False, rules=()) as watch:
        for _ in range(3):
            optimizer.zero_grad()
            backward(reference, model(torch.full((1, 4), 1e30)).sum() * 1e-3)
            step(reference, optimizer)
    agree(watch, reference, records=3)
    assert (watch.history.stat("grad_norm") > 1e27).all()
    assert (watch.history.stat("grad_nonfinite") == 0).all()
