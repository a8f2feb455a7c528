"""Acting on gradients that lie on a device: CPU tensors are sent over the same path, and what would wait for a GPU is counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from gradwatch import GradWatch, NonFiniteGradientError, Sampling, SkipReason
from gradwatch.capture import parameters
from gradwatch.clip import AGC, AutoClip, GlobalNorm, MedianScaled, NormClipper, PerLayer, PerParameter, Value, ZClip
from tests.protect.test_skip import same
from tests.test_counts import Operators

CLIPPERS: dict[str, Callable[[], Any]] = {
    "float": lambda: 0.05,
    "global": lambda: GlobalNorm(0.05),
    "value": lambda: Value(0.01),
    "parameter": lambda: PerParameter(0.02),
    "layer": lambda: PerLayer(0.03),
    "agc": lambda: AGC(0.001),
    "auto": lambda: AutoClip(20.0, window=20, warmup=3),
    "median": lambda: MedianScaled(0.9, window=20, warmup=3),
    "z": lambda: ZClip(warmup=5, z_thresh=0.2),
}


@pytest.fixture(params=["cpu", "device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "device":
        pretend(monkeypatch)
    return str(request.param)


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors lie on a device, as far as the watch and clippers can tell."""
    monkeypatch.setattr(parameters, "HOST", "nowhere")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))


def train(model: nn.Module, optimizer: Any, updates: int, operators: Operators | None = None, bad: int = -1) -> None:
    for i in range(updates):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) * (math.nan if i == bad else 1 + i % 3)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if operators is not None:
            operators.phase = "backward"
        loss.backward()
        if operators is not None:
            operators.phase = "step"
        optimizer.step()
        if operators is not None:
            operators.phase = ""


@pytest.mark.parametrize("name", CLIPPERS)
def test_no_clipper_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    counts = []
    for clip in (None, CLIPPERS[name]()):
        model = network()
        optimizer = SGD(model.parameters(), lr=1e-3)
        with GradWatch(model, console=False, clip=clip, sampling=Sampling(dense=0, every=1000)) as watch:
            train(model, optimizer, 4)
            with Operators() as operators:
                train(model, optimizer, 6, operators)
        counts.append(operators.synchronisations("backward", "step"))
        assert watch.notices == ()
    more = counts[1] - counts[0]
    del more["to_host"]  # what goes "to the device of the norms" goes to the CPU here
    assert not more, more


@pytest.mark.parametrize("name", CLIPPERS)
def test_it_clips_on_the_device_as_it_does_on_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for there in (False, True):
        if there:
            pretend(monkeypatch)
        model = network()
        with GradWatch(model, console=False, clip=CLIPPERS[name](), rules=()) as watch:
            train(model, SGD(model.parameters(), lr=0.05), 30)
        found.append((watch.history, [p.detach().clone() for p in model.parameters()]))
        assert watch.notices == ()
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    ours, theirs = (history.stat("clip_coef") for history, _ in found)
    if name == "value":  # by how much it clamps a norm is not known without reading it again
        assert np.isnan(theirs).all()
    else:
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    assert (ours < 1).any()


@pytest.mark.parametrize("name", [name for name in CLIPPERS if name != "value"])
def test_a_bad_update_on_the_device_clips_nothing_and_is_not_learnt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    made = CLIPPERS[name]()
    model = network()
    with GradWatch(model, console=False, clip=made, rules=()) as watch:
        train(model, SGD(model.parameters(), lr=0.0), 10, bad=8)
    assert watch.history.recorded == 10
    if isinstance(made, NormClipper):
        for value in made.state_dict().values():
            assert not isinstance(value, torch.Tensor) or not value.isnan().any()


def test_steps_are_left_out_on_a_device_too(where: str) -> None:
    model, bare = network(), network()
    optimizer, other = AdamW(model.parameters(), lr=1e-2), AdamW(bare.parameters(), lr=1e-2)
    with GradWatch(model, console=False, on_nonfinite="skip", clip=AutoClip(90.0, window=20, warmup=3)) as watch:
        train(model, optimizer, 20, bad=7)
    assert np.flatnonzero(watch.history.stat("skip_reason") == SkipReason.NON_FINITE).tolist() == [7]
    assert all(int(state["step"]) == 19 for state in optimizer.state.values())
    assert not any(p.isnan().any() for p in model.parameters())
    train(bare, other, 7)
    assert not same(model.state_dict(), bare.state_dict())


def test_raising_on_a_device_says_what_went_bad_first(where: str) -> None:
    model = network()
    with pytest.raises(NonFiniteGradientError) as caught, GradWatch(model, console=False, on_nonfinite="raise"):
        train(model, AdamW(model.parameters()), 20, bad=7)
    assert (caught.value.step, caught.value.rule) == (7, "non_finite_input")


def test_a_spike_is_left_out_on_a_device_too(where: str) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.01)
    with GradWatch(model, console=False, on_rule={"gradient_spike": "skip"}) as watch:
        train(model, optimizer, 30)
        optimizer.zero_grad()
        (model(torch.randn(16, 8)).square().mean() * 1e5).backward()
        optimizer.step()
        train(model, optimizer, 5)
    assert np.flatnonzero(watch.history.stat("skip_reason") == SkipReason.RULE).tolist() == [30]
    assert [alert.rule for alert in watch.alerts] == ["gradient_spike"]
