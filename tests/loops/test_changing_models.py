"""Models that are frozen, thawed, extended, copied, saved and evaluated while they are watched."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gradwatch import GradWatch
from tests.loops.harness import HEALTHY_AND_FAULTY, NAN, agree, backward, batches, healthy, mlp, mse, said, step
from tests.reference import Reference


@HEALTHY_AND_FAULTY
@pytest.mark.parametrize("owned", [False, True], ids=["not in the optimizer", "in the optimizer"])
def test_frozen_parts(owned: bool, fault: bool) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if owned or p.requires_grad], lr=0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(40):
            optimizer.zero_grad()
            backward(reference, mse(model(x), y) * (NAN if fault and i == 12 else 1))
            step(reference, optimizer)
    agree(watch, reference, records=40)
    if fault:
        said(watch, "non_finite_loss", step=12, layers=())
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_a_part_thawed_in_the_middle(fault: bool) -> None:
    model = mlp()
    model[2].requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(40):
            if i == 15:
                model[2].requires_grad_(True)
                if not fault:
                    optimizer.add_param_group({"params": model[2].parameters(), "lr": 2e-3})
            model.zero_grad()
            backward(reference, mse(model(x), y))
            step(reference, optimizer)
    agree(watch, reference, records=40)
    if fault:
        said(watch, "not_in_optimizer", step=15, layers=("2",))
    else:
        healthy(watch, reference)


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inlet(x))
        if hasattr(self, "extra"):
            h = h + torch.tanh(self.extra(h))
        out: Tensor = self.outlet(h)
        return out


@HEALTHY_AND_FAULTY
def test_parameters_added_in_the_middle(fault: bool) -> None:
    model = Growing()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(40):
            if i == 12:
                model.add_module("extra", nn.Linear(16, 16))
                if not fault:
                    optimizer.add_param_group({"params": model.extra.parameters()})
            model.zero_grad()
            backward(reference, mse(model(x), y))
            step(reference, optimizer)
    agree(watch, reference, records=40)
    assert watch.history.layers == tuple(name for name, _ in model.named_modules())
    if fault:
        said(watch, "not_in_optimizer", step=12, layers=("extra",))
    else:
        healthy(watch, reference)


@HEALTHY_AND_FAULTY
def test_averages_copies_and_saves_inside_the_block(fault: bool) -> None:
    model = mlp()
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    # The mistake: the optimizer is made for a copy, and the model that is trained never moves.
    target = copy.deepcopy(model) if fault else model
    optimizer = torch.optim.SGD(target.parameters(), lr=0.2)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(30):
            model.zero_grad()
            backward(reference, mse(model(x), y))
            if fault:
                optimizer.step()
                reference.drop()
            else:
                step(reference, optimizer)
            mean.update_parameters(model)
            if i % 10 == 5:
                twin = copy.deepcopy(model)
                file = io.BytesIO()
                torch.save(model, file)
                file.seek(0)
                with torch.serialization.safe_globals([nn.Sequential, nn.Linear, nn.Tanh]):
                    loaded = torch.load(file, weights_only=True)
                for other in (twin, loaded, pickle.loads(pickle.dumps(model)), mean):
                    # Copies train and are read as if there were no watch, and their gradients are none of its business.
                    mse(other(x), y).backward()
                    other.zero_grad()
    agree(watch, reference, records=0 if fault else 30)
    if fault:
        said(watch, "never_stepped", step=0, layers=())
    else:
        healthy(watch, reference)


class Frontend(nn.Module):
    """Features and a head; the features may be computed without a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1))
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            h = self.features(x)
        out: Tensor = self.head(h)
        return out


@HEALTHY_AND_FAULTY
def test_evaluation_inside_the_block(fault: bool) -> None:
    model = Frontend()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = Reference(model, optimizer)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(40):
            if i % 5 == 0:
                model.eval()
                with torch.no_grad():
                    mse(model(x), y)
                with torch.inference_mode():
                    mse(model(x), y)
                torch.autograd.grad(mse(model(x), y), model.head.weight)
                model.train()
            optimizer.zero_grad()
            loss = mse(model(x, frozen=fault), y)
            backward(reference, loss, reached=("head.*",) if fault else None)
            step(reference, optimizer)
    agree(watch, reference, records=40)
    if fault:
        said(watch, "missing_gradient", step=0, layers=("features",))
    else:
        healthy(watch, reference)


def test_a_part_frozen_in_the_middle_is_no_missing_gradient() -> None:
    """Gradual freezing: the part stays in its optimizer and gets no gradient any more, and that is meant so."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradWatch(model, console=False) as watch:
        for i, x, y in batches(50):
            if i == 15:
                model[0].requires_grad_(False)
            optimizer.zero_grad()
            mse(model(x), y).backward()
            optimizer.step()
    assert [alert.rule for alert in watch.alerts if alert.severity >= 30] == []
    assert [fact.trainable for fact in watch.history.meta.parameters][:3] == [False, False, True]
    assert watch.history.recorded == 50
