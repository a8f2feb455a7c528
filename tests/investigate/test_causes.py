"""What cut a gradient's way, and the line of a softmax that is one too many."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradwatch import GradWatch
from gradwatch.records import Alert


class Net(nn.Module):
    """`middle` runs between two layers."""

    def __init__(self, middle: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.middle = nn.Linear(4, 4), nn.Linear(4, 2), middle

    def forward(self, x: Tensor) -> Any:
        return self.b(self.middle(self.a(x)))


def alert_of(model: nn.Module, rule: str = "missing_gradient", loss: Callable[[Any], Tensor] | None = None) -> Alert:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = torch.arange(8) % 2
    with GradWatch(model, console=False) as watch:
        for _ in range(14):
            optimizer.zero_grad()
            out = model(torch.randn(8, 4))
            (F.cross_entropy(out, target) if loss is None else loss(out)).backward()
            optimizer.step()
    assert watch.notices == ()
    (alert,) = [alert for alert in watch.alerts if alert.severity >= 30]
    assert alert.rule == rule
    return alert


def guilty(function: Callable[..., Any]) -> str:
    lines, first = inspect.getsourcelines(function)
    return f"test_causes.py:{next(first + i for i, line in enumerate(lines) if '# guilty' in line)}"


def detached(h: Tensor) -> Tensor:
    return h.detach().tanh()  # guilty


def data(h: Tensor) -> Tensor:
    return h.data * 2  # guilty


def no_grad(h: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.relu(h)  # guilty


@torch.no_grad()
def decorated(h: Tensor) -> Tensor:
    return torch.relu(h)  # guilty


def argmax(h: Tensor) -> Tensor:
    return F.one_hot(h.argmax(-1), 4).float()  # guilty


def comparison(h: Tensor) -> Tensor:
    return (h > 0).float()  # guilty


def rounded(h: Tensor) -> Tensor:
    return h.long().float()  # guilty


def through_numpy(h: Tensor) -> Tensor:
    return torch.from_numpy(h.detach().numpy())  # guilty


def item(h: Tensor) -> Tensor:
    return torch.ones(8, 4) * h.mean().item()  # guilty


@pytest.mark.parametrize(
    ("middle", "says"),
    [
        (detached, "detach()"),
        (data, ".data"),
        (no_grad, "no_grad()"),
        (decorated, "no_grad()"),
        (argmax, "argmax"),
        (comparison, "gt"),
        (rounded, "long"),
        (through_numpy, "numpy()"),
        (item, "item()"),
    ],
)
def test_what_cut_the_way_is_named_with_its_line(middle: Callable[[Tensor], Tensor], says: str) -> None:
    alert = alert_of(Net(middle))
    assert alert.layers == ("a",)
    assert f"{says} at {guilty(middle)}" in alert.cause
    assert alert.remedy.splitlines()[1:]


def test_a_detach_is_shown_as_a_line_to_be_taken_out() -> None:
    diff = alert_of(Net(detached)).remedy.splitlines()[1:]
    assert diff == ["- return h.detach().tanh()  # guilty", "+ return h.tanh()  # guilty"]


def test_a_comparison_beside_the_way_cuts_nothing() -> None:
    """What is cut is the way of the loss: an output that is not used, and what depends on them beside it, is told as such."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.a(x)
            return {"logits": self.b(x), "aux": h * (h > 0)}

    alert = alert_of(Two(), loss=lambda out: F.cross_entropy(out["logits"], torch.arange(8) % 2))
    assert (
        alert.cause
        == "The output `output['aux']` depends on them and the loss does not, or it is detached on the way, outside the model."
    )


def test_the_output_that_is_used_decides() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.a(x)
            return self.b(h.detach()), h  # guilty

    alert = alert_of(Two(), loss=lambda out: F.cross_entropy(out[0], torch.arange(8) % 2))
    assert "detach() at test_causes.py" in alert.cause


def test_what_leads_nowhere_is_told() -> None:
    alert = alert_of(Net(lambda h: torch.ones(8, 4)))
    assert alert.cause == "They are used in the forward pass, but what the model puts out is the same with other weights."


def test_a_module_that_is_never_called_has_no_way_that_could_be_cut() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x)

    torch.manual_seed(0)
    model = Unused()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradWatch(model, console=False) as watch:
        for _ in range(32):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 2).backward()
            optimizer.step()
    (alert,) = watch.alerts
    assert alert.cause == "Nothing in the forward pass calls their modules."


def test_the_softmax_that_is_one_too_many_is_shown() -> None:
    class Probabilities(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.softmax(self.layer(x), dim=1)  # guilty

    alert = alert_of(Probabilities(), rule="double_softmax")
    assert f"the softmax is applied at {guilty(Probabilities.forward)}" in alert.cause
    assert alert.remedy.splitlines()[1:] == [
        "- return F.softmax(self.layer(x), dim=1)  # guilty",
        "+ return self.layer(x)  # guilty",
    ]


def test_a_softmax_that_is_a_module_of_torch_has_no_line() -> None:
    alert = alert_of(nn.Sequential(nn.Linear(4, 2), nn.Softmax(-1)), rule="double_softmax")
    assert alert.layers == ("1",)
    assert "\n" not in alert.remedy


def test_to_look_changes_nothing() -> None:
    def train(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Net(detached), nn.Dropout(0.5), nn.BatchNorm1d(2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watch = GradWatch(model, console=False)
        if watched:
            watch.attach()
        for _ in range(16):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        if watched:
            watch.detach()
            assert any("detach()" in alert.cause for alert in watch.alerts)
        return [*model.state_dict().values(), torch.rand(2)]

    assert all(torch.equal(a, b) for a, b in zip(train(watched=False), train(watched=True), strict=True))


def test_what_is_only_logged_is_not_cut_by_that() -> None:
    logged: list[float] = []

    def middle(h: Tensor) -> Tensor:
        logged.append(h.mean().item())
        return torch.ones(8, 4)

    assert (
        alert_of(Net(middle)).cause
        == "They are used in the forward pass, but what the model puts out is the same with other weights."
    )


def test_what_goes_by_the_shape_alone_is_no_cut() -> None:
    def one_hot(h: Tensor) -> Tensor:
        p = torch.softmax(h, dim=-1)
        return torch.zeros_like(p).scatter_(1, p.argmax(-1, keepdim=True), 1.0)  # guilty

    alert = alert_of(Net(one_hot))
    assert f"argmax at {guilty(one_hot)} has no derivative" in alert.cause


def test_a_custom_function_that_gives_nothing_back() -> None:
    class Quantize(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return h.mul(4).round().div(4)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    alert = alert_of(Net(Quantize.apply))  # type: ignore[arg-type]
    assert alert.cause == "The way to them leads through the custom function Quantize, whose backward gives nothing back for it."


def test_two_layers_that_are_cut_by_two_things() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).detach()
            g = (self.gate(x) > 0).float()
            return self.b(h * g)

    alert = alert_of(Two())
    assert set(alert.layers) == {"a", "gate"}
    assert "a: detach() at test_causes.py" in alert.cause
    assert "gate: gt at test_causes.py" in alert.cause


def test_a_detach_in_front_of_an_argmax_is_not_taken_out() -> None:
    alert = alert_of(Net(lambda h: F.one_hot(h.detach().argmax(-1), 4).float()))
    assert alert.cause.startswith("argmax at test_causes.py:"), "without the detach the way would end there, too"
    assert not any(line.startswith("+ ") for line in alert.remedy.splitlines())


# -- values that are written, and values that leave torch --------------------------------------------------------------------------


def past_the_graph(h: Tensor) -> Tensor:
    w = torch.zeros(8, 4)
    w.data.copy_(h)  # guilty
    h.detach()  # for a log
    return w * 2


def into_data(h: Tensor) -> Tensor:
    x = torch.ones(8, 4)
    x.detach().add_(h)  # guilty
    return x.tanh()


def under_no_grad(h: Tensor) -> Tensor:
    x = torch.zeros(8, 4)
    with torch.no_grad():
        x[:] = h  # guilty
    return x.tanh()


def by_a_mask(h: Tensor) -> Tensor:
    x = torch.zeros(8, 4)
    x[h > 0] = 0.5  # guilty
    return x


def through_an_array(h: Tensor) -> Tensor:
    x = torch.tensor(np.clip(h.detach().numpy(), -1, 1))  # guilty
    float(h.detach().norm().item())  # for a log
    return x


def as_an_array(h: Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(h.detach()) * 2)  # guilty


def drawn(h: Tensor) -> Tensor:
    return F.one_hot(torch.multinomial(torch.softmax(h, -1).detach(), 1)[:, 0], 4).float()  # guilty


def nearest(h: Tensor) -> Tensor:
    return torch.eye(4)[torch.cdist(h.detach(), torch.eye(4)).min(-1).indices]  # guilty


def top(h: Tensor) -> Tensor:
    v, i = h.softmax(-1).topk(2, -1)  # guilty
    return torch.zeros(8, 4).scatter(1, i, torch.ones_like(v))


def sampled(h: Tensor) -> Tensor:
    return torch.distributions.Normal(h, 1.0).sample()  # guilty


def differentiated(h: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(h.square().sum(), h)  # guilty
    return g


def in_inference(h: Tensor) -> Tensor:
    with torch.inference_mode():
        x = torch.relu(h)  # guilty
    return x.clone()


class Kept(Net):
    """What it gives is kept for the next step."""

    def forward(self, x: Tensor) -> Any:
        self.last = self.a(x).detach() * 0.5  # guilty
        return self.b(self.last)


@pytest.mark.parametrize(
    ("middle", "says"),
    [
        (differentiated, "torch.autograd.grad at {} keeps no graph"),
        (in_inference, "They are used under inference_mode() at {},"),
        (past_the_graph, "copy_() at {} writes to memory past the graph"),
        (into_data, "add_() at {} writes to memory past the graph"),
        (under_no_grad, "They are used under no_grad() at {},"),
        (by_a_mask, "gt at {} has no derivative"),
        (through_an_array, "numpy() at {} takes the value out of torch"),
        (as_an_array, "numpy at {} takes the value out of torch"),
        (drawn, "multinomial at {} has no derivative"),
        (nearest, "The integers that min gives at {} have no derivative"),
        (top, "The integers that topk gives at {} have no derivative"),
        (sampled, "sample() at {} draws without a way back."),
    ],
)
def test_where_the_value_went_is_named_and_nothing_taken_out_that_would_not_mend_it(
    middle: Callable[[Tensor], Tensor], says: str
) -> None:
    alert = alert_of(Net(middle))
    assert alert.layers == ("a",)
    assert alert.cause.startswith(says.format(guilty(middle)))
    assert not any(line.startswith("+ ") for line in alert.remedy.splitlines())


def test_a_tensor_that_is_written_within_the_graph_cuts_nothing() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            h = torch.zeros(8, 4)
            h[0].copy_(self.a(x)[0])  # by a view: the whole is another object
            h[1:] = self.a(x)[1:]
            return self.b(x), h * 2

    alert = alert_of(Two(), loss=lambda out: F.cross_entropy(out[0], torch.arange(8) % 2))
    assert alert.cause.startswith("The output `output[1]` depends on them and the loss does not")


def test_a_choice_by_a_number_is_not_told_as_unused() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 2)
            nn.init.zeros_(self.a.weight)
            nn.init.constant_(self.a.bias, 0.04)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x) * (2.0 if bool(self.a(x).mean() > 0.08) else 1.0)

    alert = alert_of(Chosen())
    assert alert.cause.startswith("What the model puts out depends on them, but no gradient comes back")


def test_of_two_softmaxes_of_a_pass_the_line_is_not_guessed() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            h = self.a(x)
            z = F.softmax(self.b(h), dim=1)
            return z, F.softmax(h, dim=1)

    alert = alert_of(
        Attends(), "double_softmax", lambda out: F.cross_entropy(out[0], torch.arange(8) % 2) + 0.01 * out[1].square().mean()
    )
    assert "test_causes.py" not in alert.cause
    assert not any(line.startswith("+ ") for line in alert.remedy.splitlines())


def test_a_value_that_is_detached_counts_before_the_mask_that_chooses_it() -> None:
    alert = alert_of(Net(lambda h: torch.where(h > 0, h.detach(), torch.zeros(()))))
    assert alert.cause.startswith("detach() at ")


def test_a_detach_of_what_is_kept_for_the_next_step_is_not_taken_out() -> None:
    alert = alert_of(Kept(lambda h: h))
    assert alert.cause.startswith(f"detach() at {guilty(Kept)}")
    assert not any(line.startswith("+ ") for line in alert.remedy.splitlines())


def test_a_function_of_no_module_is_run_again() -> None:
    names: dict[str, Any] = {}
    exec("def f(h):\n    return h.detach() * 2\n", names)
    names["f"].__module__ = None
    alert = alert_of(Net(names["f"]))
    assert alert.cause.startswith("detach()")


def test_a_detach_of_what_was_written_within_the_graph() -> None:
    def middle(h: Tensor) -> Tensor:
        x = torch.zeros(8, 4)
        x[0].copy_(h[0])  # by a view: the whole is another object
        return x.detach() * 2  # guilty

    assert alert_of(Net(middle)).cause.startswith(f"detach() at {guilty(middle)} cuts the way")


def test_the_softmax_that_gives_the_output_is_meant_and_not_that_of_an_attention() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h = h * F.softmax(h, dim=1)
            return F.softmax(self.b(h), dim=1)  # guilty

    alert = alert_of(Attends(), "double_softmax")
    assert alert.cause.endswith(f"the softmax is applied at {guilty(Attends.forward)}.")
    assert alert.remedy.splitlines()[2] == "+ return self.b(h)  # guilty"
