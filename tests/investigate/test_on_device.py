"""Numbers that come back from a device late: CPU tensors are sent over the same path. And CUDA, where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwatch import GradWatch
from gradwatch.capture import parameters
from gradwatch.records import Origin


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 2)

    def forward(self, x: Tensor, bad: bool) -> Tensor:
        h = self.drop(torch.relu(self.a(x)))
        return self.b(torch.log(h) if bad else h)


def train(device: str, bad: int = 3, **options: Any) -> GradWatch:
    torch.manual_seed(0)
    model = Net().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False, **options) as watch:
        for i in range(6):
            optimizer.zero_grad()
            model(torch.randn(16, 8, device=device), i == bad).square().mean().backward()
            optimizer.step()
    assert watch.notices == ()
    return watch


@pytest.mark.parametrize(
    ("options", "told"),
    [
        pytest.param({}, False, id="nobody waits"),
        pytest.param({"origin": True}, True, id="asked"),
        pytest.param({"on_nonfinite": "skip"}, True, id="skip waits anyway"),
        pytest.param({"clip": 1.0, "origin": True}, True, id="clip on the device"),
        pytest.param({"on_nonfinite": "skip", "origin": False}, False, id="not wanted"),
    ],
)
def test_it_is_found_before_the_step_where_somebody_waits(
    options: dict[str, Any], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameters, "HOST", "nowhere")
    watch = train("cpu", **options)
    alert = next(alert for alert in watch.alerts if alert.rule.startswith("non_finite"))
    assert alert.step == 3
    if told:
        assert alert.origin is not None
        assert (alert.origin.module, alert.origin.op, alert.origin.phase) == ("", "aten::log", "forward")
        assert alert.origin.source.startswith("test_on_device.py:")
    else:
        assert alert.origin is None


def test_nothing_is_held_for_longer_than_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "HOST", "nowhere")
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False) as watch:
        assert watch._recorder is not None
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(16, 8), bad=False).square().mean().backward()
            optimizer.step()
            assert len(watch._recorder.held.calls) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"origin": True}, {"on_nonfinite": "skip"}])
def test_on_a_gpu(options: dict[str, Any]) -> None:
    watch = train("cuda", **options)
    alert = next(alert for alert in watch.alerts if alert.rule.startswith("non_finite"))
    assert isinstance(alert.origin, Origin)
    assert (alert.origin.module, alert.origin.op, alert.origin.phase) == ("", "aten::log", "forward")
    assert alert.step == 3
