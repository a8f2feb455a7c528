"""What could not be found out is said so, and why."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradwatch import GradWatch, NonFiniteGradientError
from gradwatch.records import Alert


class Net(nn.Module):
    """`middle` runs between two layers."""

    def __init__(self, middle: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.middle = middle
        self.now = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self, self.a(x)))


def alert_of(model: nn.Module, at: int = 3, prepare: Callable[[int], None] = lambda i: None, **options: Any) -> Alert:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False, **options) as watch:
        for i in range(6):
            prepare(i)
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    assert watch.notices == ()
    (alert,) = watch.alerts
    assert alert.step == at
    return alert


def test_a_value_that_does_not_come_back() -> None:
    runs: list[int] = []

    def middle(model: nn.Module, h: Tensor) -> Tensor:
        runs.append(1)
        return h * torch.nan if len(runs) == 4 else h  # a bit that flipped, once

    alert = alert_of(Net(middle))
    assert alert.origin is None
    assert alert.cause == "Not reproduced when the update was run again: suspect nondeterminism or hardware."


def test_hidden_state_is_named() -> None:
    def middle(model: Any, h: Tensor) -> Tensor:
        model.now += 1
        return h * torch.nan if model.now == 4 else h

    alert = alert_of(Net(middle))
    assert alert.origin is None
    assert alert.cause == "Not reproduced when the update was run again: the model keeps state between forward passes (now)."


def test_a_generator_outside_torch_is_named() -> None:
    def middle(model: nn.Module, h: Tensor) -> Tensor:
        return h * torch.nan if random.random() + np.random.rand() < 1e-9 else h

    first = iter([0.5] * 6 + [0.0, 0.0] + [0.5] * 100)
    real_random, real_rand = random.random, np.random.rand

    def fake() -> float:
        real_random()
        real_rand()
        return next(first)

    random.random = np.random.rand = fake  # type: ignore[assignment]
    try:
        alert = alert_of(Net(middle))
    finally:
        random.random, np.random.rand = real_random, real_rand
    assert alert.origin is None
    assert alert.cause == (
        "Not reproduced when the update was run again: the forward pass draws from random and numpy.random, whose state is not kept."
    )


def test_an_input_that_was_changed_in_place_is_named() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.bad = False

        def forward(self, x: Tensor) -> Tensor:
            # The loss takes the root of a number below 0 only where the sign is still there.
            out = self.layer(torch.log(x) if self.bad else x * 1.0)
            x.abs_()
            return out

    model = InPlace()
    alert = alert_of(model, prepare=lambda i: setattr(model, "bad", i == 3))
    assert alert.origin is None
    assert "the input `x` was changed in place after the model was given it" in alert.cause


def test_a_hook_on_a_parameter_is_not_run_again_and_is_named() -> None:
    model = Net(lambda model, h: h)
    state = {"bad": False}
    model.a.weight.register_hook(lambda grad: grad / 0.0 if state["bad"] else grad)
    alert = alert_of(model, prepare=lambda i: state.update(bad=i == 3))
    assert alert.origin is None
    assert "hooks on a.weight, which are not run again" in alert.cause


def test_an_error_that_was_asked_for_knows_the_origin() -> None:
    model = Net(lambda model, h: torch.log(torch.relu(h)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False, on_nonfinite="raise"):
        model(torch.randn(8, 4)).square().mean().backward()
        with pytest.raises(NonFiniteGradientError, match=r"aten::log .*test_honest\.py:\d+") as caught:
            optimizer.step()
    origin = caught.value.origin
    assert origin is not None
    assert (origin.module, origin.op, origin.phase) == ("", "aten::log", "forward")


def test_of_a_training_that_diverges_the_learning_rate_is_the_cause() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    with GradWatch(model, console=False) as watch:
        for _ in range(40):
            optimizer.zero_grad()
            (model(torch.randn(8, 4)) - 3).square().mean().backward()
            optimizer.step()
    alert = next(alert for alert in watch.alerts if alert.rule.startswith("non_finite"))
    assert alert.cause.startswith("The training diverged")
    assert "learning rate" in alert.remedy


@pytest.mark.parametrize("origin", [False, None])
def test_it_can_be_switched_off(origin: bool | None) -> None:
    alert = alert_of(Net(lambda model, h: torch.log(torch.relu(h))), at=0, origin=origin)
    assert (alert.origin is None) is (origin is False)


def test_a_bad_argument_is_told() -> None:
    with pytest.raises(TypeError, match=r"origin='yes'.*needs True, False, or None"):
        GradWatch(nn.Linear(2, 2), origin="yes")  # type: ignore[arg-type]


def test_it_is_asked_once_an_incident(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradwatch.investigate import inquest

    asked = []
    real = inquest.investigate
    monkeypatch.setattr(inquest, "investigate", lambda *args: (asked.append(1), real(*args))[1])
    alert_of(Net(lambda model, h: torch.log(torch.relu(h))), at=0)
    assert len(asked) == 1


def test_without_rules_it_is_asked_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradwatch.investigate import inquest

    asked = []
    real = inquest.investigate
    monkeypatch.setattr(inquest, "investigate", lambda *args: (asked.append(1), real(*args))[1])
    torch.manual_seed(0)
    model = Net(lambda model, h: torch.log(torch.relu(h)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False, rules=()) as watch:
        for _ in range(25):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    assert watch.notices == ()
    assert len(asked) == 3


def test_a_scaler_that_collapses_is_traced_to_its_nan() -> None:
    torch.manual_seed(0)
    model = Net(lambda model, h: torch.log(torch.relu(h)) * 1e-9)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    with GradWatch(model, console=False) as watch:
        for _ in range(30):
            optimizer.zero_grad()
            # The loss is finite: what is bad is left out of it, but not of its derivative.
            scaler.scale(model(torch.randn(8, 4)).nan_to_num(0.0, 0.0, 0.0).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    alert = next(alert for alert in watch.alerts if alert.rule == "loss_scale_collapse")
    assert alert.origin is not None
    assert alert.origin.op == "aten::log"


def test_in_a_compiled_model_the_module_is_told() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(torch.relu(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Log(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False) as watch:
        compiled = torch.compile(model, backend="aot_eager")
        optimizer.zero_grad()
        compiled(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    alert = watch.alerts[0]
    assert alert.rule == "non_finite_activation"
    assert alert.layers == ("1",)
    assert watch.notices == ()


def test_a_model_of_which_only_parts_are_called() -> None:
    """As a Lightning module's `training_step` does."""

    class Log(nn.Module):
        def forward(self, x: Tensor, bad: bool) -> Tensor:
            return torch.log(torch.relu(x)) if bad else x

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])
            self.between = nn.ModuleDict({"log": Log()})

    torch.manual_seed(0)
    model = Parts()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False) as watch:
        for i in range(6):
            optimizer.zero_grad()
            h = model.between["log"](model.layers[0](torch.randn(8, 4)), bad=i == 3)
            model.layers[1](h).square().mean().backward()
            optimizer.step()
    assert watch.notices == ()
    origin = watch.alerts[0].origin
    assert origin is not None
    assert (origin.module, origin.op, origin.phase) == ("between.log", "aten::log", "forward")


def test_many_parts_are_too_many_to_be_hooked() -> None:
    model = nn.ModuleList([nn.Linear(4, 4) for _ in range(40)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False) as watch:
        for i in range(4):
            optimizer.zero_grad()
            x = torch.randn(8, 4)
            for layer in model:
                x = layer(x)
            (x * (torch.nan if i == 2 else 1.0)).sum().backward()
            optimizer.step()
        assert watch._recorder is not None
        assert not watch._recorder.held.calls
    assert watch.notices == ()
    assert watch.alerts[0].origin is None


def test_gradients_that_were_bad_before_are_not_taken_for_born() -> None:
    """Of two micro-batches the first is bad, once; the second, which is traced as it runs, adds to it."""
    runs: list[int] = []

    def middle(model: nn.Module, h: Tensor) -> Tensor:
        runs.append(1)
        return h * torch.nan if len(runs) == 5 else h

    torch.manual_seed(0)
    model = Net(middle)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False) as watch:
        for _ in range(5):
            optimizer.zero_grad()
            for _ in range(2):
                model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    assert watch.notices == ()
    assert watch.alerts[0].origin is None
    assert "Not reproduced" in watch.alerts[0].cause


def test_logits_that_are_masked_on_purpose_are_no_bad_output() -> None:
    """The target is a class that the model has masked: the loss is Inf, and the model has done nothing wrong."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).masked_fill(torch.tensor([False, False, True]), -torch.inf)

    torch.manual_seed(0)
    model = Masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False) as watch:
        for i in range(6):
            optimizer.zero_grad()
            target = torch.arange(8) % (3 if i == 3 else 2)
            nn.functional.cross_entropy(model(torch.randn(8, 4)), target).backward()
            optimizer.step()
    assert watch.notices == ()
    harmless, alert = watch.alerts
    assert (harmless.severity, harmless.origin) == (20, None)
    assert alert.step == 3
    assert alert.origin is None or alert.origin.module == ""
    assert "outside the model" in alert.cause or "in the loss" in alert.cause


def test_a_buffer_is_named() -> None:
    class Scaled(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.register_buffer("scale", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.scale

    inner = Scaled()
    model = nn.Sequential(inner)
    alert = alert_of(model, prepare=lambda i: inner.scale[1].fill_(torch.nan if i == 3 else 1.0))
    assert alert.origin is not None
    assert (alert.origin.module, alert.origin.phase) == ("0", "weight")
    assert alert.cause.startswith("The buffer 0.scale held NaN in 1 of 2 elements (1)")


def test_a_tensor_from_nowhere_is_told_with_the_line_that_is_given_it() -> None:
    kept = torch.ones(4)

    def middle(model: nn.Module, h: Tensor) -> Tensor:
        return h * kept

    alert = alert_of(Net(middle), prepare=lambda i: kept[2].fill_(torch.nan if i == 3 else 1.0))
    assert alert.origin is not None
    assert (alert.origin.op, alert.origin.phase) == ("aten::mul", "input")
    assert alert.origin.source.startswith("test_honest.py:")
    assert alert.cause.startswith("A tensor [4] that aten::mul at test_honest.py:")
    assert "return h * kept" in alert.remedy


def test_sparse_gradients() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 4, sparse=True)
            self.bad = False

        def forward(self, x: Tensor) -> Tensor:
            h = self.words((x[:, 0] > 0).long())
            return torch.sqrt(h * 0) if self.bad else h

    model = Words()
    alert = alert_of(model, prepare=lambda i: setattr(model, "bad", i == 3))
    assert alert.origin is not None
    assert (alert.origin.op, alert.origin.phase) == ("aten::sqrt", "backward")


def test_a_mask_is_mended_where_it_is_filled_in() -> None:
    def middle(model: Any, h: Tensor) -> Tensor:
        scores = h @ h.T
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[2] = model.bad
        scores = scores.masked_fill(mask, float("-inf"))
        return scores.softmax(-1) @ h

    model = Net(middle)
    model.bad = False  # type: ignore[assignment]
    alert = alert_of(model, prepare=lambda i: setattr(model, "bad", i == 3))
    assert alert.origin is not None
    assert alert.origin.op == "aten::softmax"
    assert alert.remedy.splitlines()[1:] == [
        '- scores = scores.masked_fill(mask, float("-inf"))',
        "+ scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)",
    ]


def library(tmp_path: Path) -> Any:
    """A module that lies where packages are installed."""
    path = tmp_path / "site-packages" / "somebodys.py"
    path.parent.mkdir()
    path.write_text(
        "import torch\n\ndef log(x):\n    return torch.log(x)\n\n\nclass Log(torch.nn.Module):\n    def forward(self, x):\n"
        "        return torch.log(x)\n",
        encoding="utf-8",
    )
    names: dict[str, Any] = {"__name__": "somebodys"}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    return names


def test_the_line_that_calls_a_library_says_more_than_the_one_inside_it(tmp_path: Path) -> None:
    log = library(tmp_path)["log"]
    alert = alert_of(Net(lambda model, h: log(torch.relu(h))), at=0)
    assert alert.origin is not None
    assert alert.origin.source.startswith("test_honest.py:")
    assert "log(torch.relu(h))" in alert.remedy


def test_in_a_module_of_a_library_the_line_is_the_librarys_and_is_not_mended(tmp_path: Path) -> None:
    names = library(tmp_path)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), names["Log"](), nn.Linear(4, 1))
    alert = alert_of(model, at=0)
    assert alert.origin is not None
    assert (alert.origin.module, alert.origin.source) == ("2", "somebodys.py:9")
    assert "\n" not in alert.remedy


def test_in_a_model_of_torchs_own_modules_the_line_is_the_call() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LogSigmoid(), nn.Linear(4, 1))
    model[0].weight.data.fill_(3e38)  # type: ignore[union-attr, operator]
    alert = alert_of(model, at=0)
    assert alert.origin is not None
    assert alert.origin.module == "0"
    assert alert.origin.source.startswith("test_honest.py:")


def test_an_origin_goes_into_a_checkpoint_and_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net(lambda model, h: torch.log(torch.relu(h)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False, on_nonfinite="skip") as watch:
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    torch.save(watch.state_dict(), tmp_path / "watch.pt")
    again = GradWatch(model, console=False)
    again.load_state_dict(torch.load(tmp_path / "watch.pt", weights_only=True))
    assert again.alerts == watch.alerts
    assert again.alerts[0].origin is not None


def test_a_delta_that_is_too_large_to_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradwatch.capture import held

    monkeypatch.setattr(held, "LIMIT", 32)
    model = Net(lambda model, h: h + torch.sqrt(h * 0))
    alert = alert_of(model, at=0, on_nonfinite="skip")
    assert alert.origin is not None, "found when the next update was traced as it ran"
    assert alert.origin.op == "aten::sqrt"


def test_what_is_too_large_to_be_held_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradwatch.capture import held

    monkeypatch.setattr(held, "LIMIT", 32)
    state = {"bad": False}
    model = Net(lambda model, h: h + torch.sqrt(h * 0) if state["bad"] else h)
    alert = alert_of(model, prepare=lambda i: state.update(bad=i == 3))
    assert alert.origin is None
    assert "larger than 64 MB" in alert.cause


def test_of_two_models_each_is_seen_when_its_turn_comes() -> None:
    torch.manual_seed(0)
    one, other = nn.Sequential(nn.Linear(4, 4)), Net(lambda model, h: torch.log(torch.relu(h)) if model.now else h)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (one, other)]
    with GradWatch({"one": one, "other": other}, console=False) as watch:
        for i in range(6):
            for model, optimizer in zip((one, other), optimizers, strict=True):
                other.now = int(i == 4)
                optimizer.zero_grad()
                model(torch.randn(8, 4)).square().mean().backward()
                optimizer.step()
    origin = watch.alerts[0].origin
    assert origin is not None
    assert (origin.module, origin.op) == ("other", "aten::log")


def test_the_first_update_of_a_model_that_is_never_called_as_a_whole() -> None:
    torch.manual_seed(0)
    parts = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 2)})

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = parts

        def training_step(self, x: Tensor) -> Tensor:
            return self.parts["b"](self.parts["a"](x) / 0.0).square().mean()

    model = Step()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False) as watch:
        model.training_step(torch.randn(8, 4)).backward()
        optimizer.step()
    assert watch.notices == ()
    # What runs between the parts is nobody's: it is followed to the part that was given it.
    alert = watch.alerts[0]
    assert alert.origin is not None
    assert (alert.origin.module, alert.origin.phase) == ("parts.b", "input")
    assert alert.cause == (
        "The input `input` of parts.b, which is computed before it is called, holds Inf in 8 of 8 rows (0, 1, 2, 3, 4, ...) at step 0."
    )


def test_a_derivative_that_is_spoilt_by_what_was_born_before_names_both() -> None:
    def middle(model: nn.Module, h: Tensor) -> Tensor:
        grown = torch.exp(h * 1e4)
        return torch.where(h > 0, h, torch.sin(grown))

    alert = alert_of(Net(middle), at=0)
    assert alert.origin is not None
    assert (alert.origin.op, alert.origin.phase) == ("aten::sin", "backward")
    assert ", for it is given Inf that comes from aten::exp at test_honest.py:" in alert.cause


def test_an_overflow_in_attention_is_no_masked_row() -> None:
    def middle(model: nn.Module, h: Tensor) -> Tensor:
        q = (h * 1e30)[None]
        return nn.functional.scaled_dot_product_attention(q, q * 1e5, q)[0]

    alert = alert_of(Net(middle), at=0)
    assert "-Inf throughout" not in alert.cause


def test_a_model_that_normalises_its_input_in_place_does_not_blame_the_batch() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.now = nn.Linear(4, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            x -= x.mean(1, keepdim=True)
            x /= x.std(1, keepdim=True)
            return self.layer(x)

    model, loss = Normalised(), nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with GradWatch(model, console=False, on_nonfinite="skip") as watch:
        for i in range(4):
            x = torch.randn(8, 4)
            if i > 1:
                x[5] = 1.0
            optimizer.zero_grad()
            loss(model(x), torch.ones(8, 2)).backward()
            optimizer.step()
            if i == 2:
                assert watch.alerts[0].origin is None
                assert "was changed in place" in watch.alerts[0].cause
                assert "batch" not in watch.alerts[0].remedy
    assert watch.notices == ()
    origin = watch.alerts[0].origin
    assert origin is not None, "the next update is traced as it runs"
    assert (origin.op, origin.phase) == ("aten::div_", "forward")
    assert origin.source.startswith("test_honest.py:")


def test_a_target_that_is_nan_is_told_where_it_is_met_and_no_operator_is_blamed() -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    y = torch.randn(8, 1)
    y[[2, 7]] = torch.nan
    with GradWatch(model, console=False, on_nonfinite="skip") as watch:
        for _ in range(3):
            optimizer.zero_grad()
            out = model(torch.randn(8, 4))
            mask = ~torch.isnan(y)
            loss = (out - y) ** 2
            loss[mask].mean().backward()
            optimizer.step()
    alert = watch.alerts[0]
    assert alert.origin is not None
    assert alert.origin.phase == "input"
    assert "holds NaN in 2 of 8 rows (2, 7)" in alert.cause
    assert alert.remedy.startswith("Look at where that tensor is made.")


@pytest.mark.parametrize("growing", [False, True])
def test_a_division_by_0_is_no_overflow_of_what_grew(growing: bool) -> None:
    """A loss that has grown, or fallen below 0, before its divisor is 0."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradWatch(model, console=False) as watch:
        for i in range(16):
            optimizer.zero_grad()
            loss = model(torch.ones(8, 4)).square().mean() + 0.01
            loss = loss * 3.0**i if growing else 0.01 * loss / loss.detach() - i
            count = torch.tensor(0.0 if i == 15 else 1.0)
            (loss * count / count).backward()
            optimizer.step()
    alert = next(alert for alert in watch.alerts if alert.rule == "non_finite_loss")
    assert alert.cause == "aten::div in the loss, outside the model, makes it not finite."
    assert "diverged" not in alert.cause


def test_a_loss_that_has_fallen_below_0_has_not_grown() -> None:
    """Nobody looks for the origin here, so that only the course of the loss tells."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradWatch(model, console=False, origin=False) as watch:
        for i in range(16):
            optimizer.zero_grad()
            loss = model(torch.ones(8, 4)).square().mean() + 0.01
            (0.01 * loss / loss.detach() - i + (torch.nan if i == 15 else 0.0)).backward()
            optimizer.step()
    alert = next(alert for alert in watch.alerts if alert.rule == "non_finite_loss")
    assert alert.cause.startswith("A log, sqrt, division or exp in the model or the loss left its domain")
