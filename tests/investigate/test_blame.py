"""What lies beside the fault is not blamed for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwatch import GradWatch
from gradwatch.investigate import inquest, tracer
from gradwatch.records import Alert


class Net(nn.Module):
    """`middle` runs between two layers, and is told whether this update is to go wrong."""

    def __init__(self, middle: Callable[[Tensor, bool], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.middle = middle
        self.bad = False

    def forward(self, x: Tensor) -> Any:
        return self.b(self.middle(self.a(x), self.bad))


def mean_of_squares(out: Tensor) -> Tensor:
    return out.square().mean()


def train(model: Any, loss: Callable[[Any], Tensor] = mean_of_squares, at: int = 3, **options: Any) -> tuple[GradWatch, Alert]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False, **options) as watch:
        for i in range(6):
            model.bad = i == at
            optimizer.zero_grad()
            loss(model(torch.randn(8, 4))).backward()
            optimizer.step()
    assert watch.notices == ()
    alert = watch.alerts[0]
    assert alert.step == at
    return watch, alert


def told(alert: Alert) -> tuple[str, str, str]:
    assert alert.origin is not None, alert.cause
    assert alert.origin.source.startswith("test_blame.py:")
    return alert.origin.module, alert.origin.op, alert.origin.phase


def test_an_output_that_no_loss_uses() -> None:
    class TwoHeads(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.a(x)
            return self.b(h + torch.sqrt(h * 0) if self.bad else h), torch.log(torch.relu(h)) if self.bad else h

    _, alert = train(TwoHeads(lambda h, bad: h), loss=lambda both: both[0].square().mean())
    assert told(alert) == ("", "aten::sqrt", "backward")


def test_running_statistics_that_the_same_forward_pass_has_spoilt() -> None:
    """They hold NaN by the time it is run again, and what came in held no more than Inf."""

    class Normed(Net):
        def __init__(self) -> None:
            super().__init__(lambda h, bad: self.norm(torch.log(torch.relu(h)) if bad else h))
            self.norm = nn.BatchNorm1d(4)

    _, alert = train(Normed())
    assert told(alert) == ("", "aten::log", "forward")


def test_running_statistics_that_a_bad_batch_left_behind() -> None:
    """In training they are not read: what goes wrong two updates later is another fault."""

    class Normed(Net):
        def __init__(self) -> None:
            super().__init__(lambda h, bad: self.norm(h + torch.sqrt(h * 0) if bad else h))
            self.norm = nn.BatchNorm1d(4)

    model = Normed()
    model.norm.running_mean.fill_(torch.nan)  # type: ignore[operator, union-attr]
    _, alert = train(model)
    assert told(alert) == ("", "aten::sqrt", "backward")


def test_an_average_of_the_users_own_that_the_same_forward_pass_has_spoilt() -> None:
    class Centred(Net):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__(lambda h, bad: h)
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x) - self.mean
            h = torch.log(torch.relu(h)) if self.bad else h
            self.mean.mul_(0.9).add_(h.detach().mean(), alpha=0.1)
            return self.b(h)

    _, alert = train(Centred())
    assert told(alert) == ("", "aten::log", "forward")


def test_what_the_loss_has_taken_out_again() -> None:
    """exp takes the -Inf of the log out; the division is what makes the loss Inf."""
    state = {"bad": False}

    def loss(out: Tensor) -> Tensor:
        kept = torch.log(torch.relu(out)).exp().mean()
        return kept + (out / torch.full((), 0.0 if state["bad"] else 1.0)).square().mean()

    class Plain(Net):
        def forward(self, x: Tensor) -> Any:
            state["bad"] = self.bad
            return super().forward(x)

    _, alert = train(Plain(lambda h, bad: h), loss=loss)
    assert alert.origin is not None, alert.cause
    assert (alert.origin.module, alert.origin.op, alert.origin.phase) == ("", "aten::div", "forward")


class PoleAtOne(torch.autograd.Function):
    """Its derivative divides by what is left of 1 when the gradient is taken away."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad / (1.0 - grad)


def test_the_gradient_that_came_back_is_the_one_that_is_replayed() -> None:
    class Last(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.b(self.a(x))
            return PoleAtOne.apply(h) if self.bad else h  # type: ignore[no-any-return, no-untyped-call]

    _, alert = train(Last(lambda h, bad: h), loss=torch.sum)  # whose gradient is 1 throughout
    assert told(alert) == ("", "aten::div", "backward")


def test_the_random_numbers_are_those_of_then() -> None:
    drawn: list[float] = []
    torch.manual_seed(0)
    for _ in range(6):
        torch.randn(8, 4)
        drawn.append(float(torch.rand(())))
    _, alert = train(Net(lambda h, bad: h / (torch.rand(()) - drawn[3])))
    assert told(alert) == ("", "aten::div", "forward")


def test_a_micro_batch_that_is_fine_adds_nothing_to_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = inquest.investigate
    monkeypatch.setattr(inquest, "investigate", lambda case, loss_by: (asked.append(case.step), real(case, loss_by))[1])
    torch.manual_seed(0)
    model = Net(lambda h, bad: torch.log(torch.relu(h)) if bad else h)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False) as watch:
        for i in range(5):
            optimizer.zero_grad()
            for micro in range(3):
                model.bad = i == 3 and micro == 0
                model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    assert watch.notices == ()
    assert told(watch.alerts[0]) == ("", "aten::log", "forward")
    assert asked == [3]


def test_a_tracer_that_fails_before_an_operator_runs_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[int] = []

    def fail(*args: Any) -> Any:
        failed.append(1)
        raise ZeroDivisionError

    monkeypatch.setattr(tracer, "_scalar", fail)
    _, alert = train(Net(lambda h, bad: torch.log(torch.relu(h)) if bad else h), on_nonfinite="skip")
    assert alert.origin is None
    assert "ZeroDivisionError" in alert.cause
    assert len(failed) == 3, "once when it was run again, and once in each of the two updates that were traced as they ran"


def test_while_an_update_is_traced_as_it_runs_what_the_watch_runs_itself_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    real = tracer.Tracer._before

    def before(self: tracer.Tracer, func: Any, *args: Any) -> Any:
        if self._stop is None:  # no replay
            ran.append(func._schema.name.removeprefix("aten::"))
        return real(self, func, *args)

    monkeypatch.setattr(tracer.Tracer, "_before", before)
    runs: list[int] = []

    def middle(h: Tensor, bad: bool) -> Tensor:
        runs.append(1)
        return h * torch.nan if len(runs) == 4 else h  # it does not come back, so that the next updates are traced

    train(Net(middle), on_nonfinite="skip")
    assert ran.count("addmm") == 2 * 2, "two layers, in the two updates that follow"
    # To read the loss, and to keep the gradients that an update may be left out for.
    assert not {"_local_scalar_dense", "_foreach_copy_"} & set(ran)


def test_of_an_update_of_two_backwards_under_a_scaler_it_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = inquest.investigate
    monkeypatch.setattr(inquest, "investigate", lambda case, loss_by: (asked.append(case.step), real(case, loss_by))[1])
    monkeypatch.setattr(inquest, "ARMED", 0)
    torch.manual_seed(0)
    model = Net(lambda h, bad: h)
    model.a.weight.register_hook(lambda grad: grad / 0.0)  # which is not run again, so that nothing is found
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    with GradWatch(model, console=False) as watch:
        for _ in range(40):
            optimizer.zero_grad()
            for _ in range(2):
                scaler.scale(model(torch.randn(8, 4)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert watch.notices == ()
    assert any(alert.rule == "loss_scale_collapse" for alert in watch.alerts)
    assert len(asked) == len(set(asked)) > 1
