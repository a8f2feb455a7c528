"""In the loss, outside the model: the operator where the graph is certain of it, and else none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradwatch import GradWatch
from gradwatch.records import Alert

MASK = torch.tensor([True, False, False, False])
TARGET = torch.arange(8) % 4


def values(bad: float) -> Tensor:
    y = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    y[3, 1] = bad
    return y


def entropy(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum()


ZEROS = torch.zeros(8)
NAN, INF = torch.nan, torch.inf

LOST: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, str] | None]] = {
    "a mean with weights of 0": (lambda o: (o.square().mean(-1) * ZEROS).sum() / ZEROS.sum(), ("aten::div", "forward")),
    "a masked token loss of no token": (
        lambda o: (F.cross_entropy(o, TARGET, reduction="none") * ZEROS).sum() / ZEROS.sum(),
        ("aten::div", "forward"),
    ),
    "0 times Inf": (lambda o: (o * 0 * INF).mean(), None),
    "an entropy of masked logits": (lambda o: entropy(o.masked_fill(MASK, -INF)), ("aten::mul", "forward")),
    "a masked class": (lambda o: F.cross_entropy(o.masked_fill(MASK, -INF), TARGET), None),
    "an Inf in the target": (lambda o: F.mse_loss(o, values(INF)), ("aten::mse_loss", "input")),
    "a NaN in the target": (lambda o: F.smooth_l1_loss(o, values(NAN)), ("aten::smooth_l1_loss", "input")),
    "an Inf in the target, by hand": (lambda o: (o - values(INF)).pow(2).mean(), ("aten::sub", "input")),
    "a NaN in the target, by hand": (lambda o: (o - values(NAN)).pow(2).mean(), ("aten::sub", "input")),
    "log of 0": (lambda o: torch.log((o - o).sum()), ("aten::log", "forward")),
    "log of less than 0": (lambda o: torch.log(-o.abs() - 1).mean(), ("aten::log", "forward")),
    "all targets ignored, and a penalty": (
        lambda o: F.cross_entropy(o, torch.full((8,), -100)) + 0.1 * o.square().sum(),
        ("aten::nll_loss", "forward"),
    ),
    "exp": (lambda o: (o.abs() + 100).exp().mean(), None),
    "what is masked is not it": (
        lambda o: torch.where(o > 9, torch.log(o * 0), torch.zeros(())).sum() + torch.log((o - o).sum()),
        ("aten::log", "forward"),
    ),
    "a divergence to a NaN": (lambda o: F.kl_div(o.log_softmax(-1), values(NAN), reduction="batchmean"), ("aten::mul", "input")),
    "an overflow of products": (lambda o: (o * 1e30 * 1e30).mean(), None),
    "a mean of nothing": (lambda o: o[o > 100].mean() + 1, ("aten::mean", "forward")),
}


def alert_of(loss: Callable[[Tensor], Tensor]) -> Alert | None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False) as watch:
        for i in range(5):
            optimizer.zero_grad()
            out = model(torch.randn(8, 4))
            (loss(out) if i == 3 else out.square().mean()).backward()
            optimizer.step()
    assert watch.notices == ()
    return next((alert for alert in watch.alerts if alert.rule.startswith("non_finite")), None)


@pytest.mark.parametrize("name", LOST)
def test_a_loss_that_is_lost_outside_the_model(name: str) -> None:
    loss, expected = LOST[name]
    alert = alert_of(loss)
    assert alert is not None
    assert "hardware" not in alert.cause
    if expected is None:
        assert alert.origin is None
        assert "outside the model" in alert.cause
        return
    assert alert.origin is not None, alert.cause
    assert (alert.origin.module, alert.origin.op, alert.origin.phase, alert.origin.source) == ("", *expected, "")


SPOILT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a root": (lambda o: (o - o.detach()).square().sum(-1).sqrt().mean(), "aten::sqrt"),
    "a power": (lambda o: ((o - o.detach()).abs() ** 0.5).mean(), "aten::pow"),
    "an arc": (lambda o: torch.acos(o - o.detach() + 1).mean(), "aten::acos"),
    "a root behind a where": (lambda o: torch.where(o > 0, (-o.abs()).sqrt(), o).nan_to_num().mean(), "aten::sqrt"),
    "beside harmless powers": (lambda o: o.pow(2).mean() + (o - o.detach()).square().sum().sqrt(), "aten::sqrt"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_derivative_that_is_spoilt_outside_the_model(name: str) -> None:
    loss, op = SPOILT[name]
    alert = alert_of(loss)
    assert alert is not None
    assert alert.rule == "non_finite_gradient"
    assert alert.origin is not None, alert.cause
    assert (alert.origin.module, alert.origin.op, alert.origin.phase) == ("", op, "backward")


def test_of_two_that_can_none_is_named() -> None:
    alert = alert_of(lambda o: (o - o.detach()).square().sum(-1).sqrt().mean() + torch.acos(torch.tanh(o)).mean())
    assert alert is not None
    assert alert.origin is None
    assert "one of aten::sqrt, aten::acos" in alert.cause or "one of aten::acos, aten::sqrt" in alert.cause


def test_norms_at_0_have_a_derivative() -> None:
    """They are no suspects (`SINGULAR`): torch makes it 0 there."""
    assert alert_of(lambda o: (o - o.detach()).norm(dim=-1).mean() + (o - o.detach()).std() + torch.cdist(o, o).mean()) is None
