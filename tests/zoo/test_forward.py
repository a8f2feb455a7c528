"""Faults on the way forward, planted in networks that train: named at their place, in time, and alone; what looks like them is silent."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch import Alert, GradWatch
from gradwatch.records import Severity
from tests.zoo.case import Blobs, Event, Pictures, Setup, Text, classify, fit, mlp
from tests.zoo.earlier.models import PlainCNN, Residual

ONSET = 20


@dataclass
class Said:
    """What was said of a run: the alarms, and the number of updates when each rule was first heard."""

    alarms: list[Alert]
    sent: dict[str, int]

    def only(self, rule: str, *layers: str) -> Alert:
        assert [(alarm.rule, alarm.layers) for alarm in self.alarms] == [(rule, layers)]
        return self.alarms[0]


def train(setup: Setup, origin: bool | None = None) -> Said:
    """Run it under a watch."""
    sent: dict[str, int] = {}

    def told(alert: Alert) -> None:
        if alert.severity >= Severity.WARNING:
            sent.setdefault(alert.rule, watch.history.recorded)

    watch = GradWatch(setup.model, console=False, on_alert=told, origin=origin)
    with watch:
        for _ in setup.train():
            pass
    assert list(watch.notices) == []
    return Said([alert for alert in watch.alerts if alert.severity >= Severity.WARNING], sent)


def optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = getattr(torch.optim, name)(model.parameters(), lr)
    return made


class Functional(nn.Module):
    """An MLP whose activations are functions."""

    def __init__(self, function: Callable[[Tensor], Tensor], depth: int = 3, width: int = 64) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(nn.Linear(width if i else 16, width) for i in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.function(layer(x))
        out: Tensor = self.head(x)
        return out


class Log(nn.Module):
    """A logarithm, which is none from its call number `since` on, for one element."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.calls, self.since = itertools.count(), since

    def forward(self, x: Tensor) -> Tensor:
        y = x.square() + 1.0
        if next(self.calls) >= self.since:
            y = y - torch.zeros_like(y).index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(2.0) + y[0, 0].detach())
        return torch.log(y)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- dead units --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_a_relu_behind_a_bias_of_minus_50_is_named_by_update_15(layer: int, name: str) -> None:
    model = mlp(nn.ReLU, 3, 64)
    nn.init.constant_(model.get_parameter(f"{layer}.bias"), -50.0)
    said = train(fit(model, classify(model, Blobs(0)), optimizer(name, model, 0.01), 30))
    assert said.only("dead_units", str(layer + 1)).step == 0
    assert said.sent["dead_units"] <= 15


@pytest.mark.parametrize("layer", [0, 4])
def test_a_relu_that_dies_later_is_named_within_ten_updates(layer: int) -> None:
    model = mlp(nn.ReLU, 3, 64)

    def before(i: int) -> None:
        if i == ONSET:
            nn.init.constant_(model.get_parameter(f"{layer}.bias"), -50.0)

    said = train(fit(model, classify(model, Blobs(0)), optimizer("SGD", model, 0.1), 40, before))
    assert said.only("dead_units", str(layer + 1)).step == ONSET
    assert said.sent["dead_units"] <= ONSET + 10


def test_a_relu_that_dies_between_two_looks_is_named_and_not_what_it_starves() -> None:
    model, late = mlp(nn.ReLU, 3, 64), 75

    def before(i: int) -> None:
        if i == late:
            nn.init.constant_(model.get_parameter("2.bias"), -50.0)

    said = train(fit(model, classify(model, Blobs(0)), optimizer("Adam", model, 0.001), 120, before))
    assert said.only("dead_units", "3").step == late


def test_a_dead_relu_between_normalisations_is_named_and_not_the_layer_right_behind_it() -> None:
    blocks = [module for width in (16, 64) for module in (nn.Linear(width, 64), nn.BatchNorm1d(64), nn.ReLU())]
    model = nn.Sequential(*blocks, nn.Linear(64, 4))
    nn.init.constant_(model.get_parameter("1.bias"), -50.0)
    train(fit(model, classify(model, Blobs(0)), optimizer("Adam", model, 0.001), 60)).only("dead_units", "2")


def test_a_functional_relu_is_named_after_the_module_before_it() -> None:
    model = Functional(F.relu)
    nn.init.constant_(model.get_parameter("layers.1.bias"), -50.0)
    train(fit(model, classify(model, Blobs(0)), updates=30)).only("dead_units", "layers.1")


def test_dead_channels_are_named() -> None:
    model = PlainCNN(depth=4, norm=False)
    nn.init.constant_(model.get_parameter("features.4.bias"), -50.0)
    train(fit(model, classify(model, Pictures(0)), optimizer("SGD", model, 0.05), 30)).only("dead_units", "features.5")


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize(("depth", "width"), [(1, 512), (2, 4), (4, 64), (6, 32)])
@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Tanh], ids=lambda act: act.__name__)
def test_healthy_networks_of_any_width_are_silent(act: type[nn.Module], depth: int, width: int, name: str) -> None:
    model = mlp(act, depth, width)
    lr = {"SGD": 0.1, "Adam": 0.01}[name]
    assert train(fit(model, classify(model, Blobs(0)), optimizer(name, model, lr), 80)).alarms == []


# -- saturated activations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("act", [nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Hardtanh], ids=lambda act: act.__name__)
def test_weights_a_hundred_times_too_large_saturate_what_follows_them(act: type[nn.Module], name: str) -> None:
    model = mlp(act, 4, 64)
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(100)
    said = train(fit(model, classify(model, Blobs(0)), optimizer(name, model, 0.001), 30))
    alert = said.only("saturated_activation", "3")
    assert alert.step == 0
    assert said.sent["saturated_activation"] <= 15
    assert "weights" in alert.cause


def test_biases_that_saturate_a_layer_later_are_named_and_not_what_starves_of_them() -> None:
    model = mlp(nn.Tanh, 5, 32)

    def before(i: int) -> None:
        if i == ONSET:
            with torch.no_grad():
                model.get_parameter("4.bias").add_(torch.where(torch.rand(32) < 0.5, 15.0, -15.0))

    said = train(fit(model, classify(model, Blobs(0, spread=3.0)), optimizer("SGD", model, 0.1), 40, before))
    assert said.only("saturated_activation", "5").step == ONSET
    assert said.sent["saturated_activation"] <= ONSET + 10


class Highway(nn.Module):
    """Blocks whose gates begin closed, as their authors advise."""

    def __init__(self, depth: int = 6, width: int = 32, bias: float = -6.0) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(16, width), nn.Linear(width, 4)
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Sigmoid()) for _ in range(depth))
        for gate in self.gates:
            nn.init.constant_(gate.get_parameter("0.bias"), bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for layer, gate in zip(self.body, self.gates, strict=True):
            x = x + gate(x) * (F.relu(layer(x)) - x)
        out: Tensor = self.out(x)
        return out


class Cell(nn.Module):
    """An LSTM written by hand, its activations modules that are called once a step."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.gates, self.head = nn.Embedding(24, width), nn.Linear(2 * width, 4 * width), nn.Linear(width, 24)
        self.sigmoid, self.tanh, self.width = nn.Sigmoid(), nn.Tanh(), width
        with torch.no_grad():
            self.gates.bias[width : 2 * width] = 6.0

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(len(x), self.width)
        out = []
        for t in range(x.shape[1]):
            i, f, o, g = self.gates(torch.cat((self.embed(x[:, t]), h), 1)).chunk(4, 1)
            c = self.sigmoid(f) * c + self.sigmoid(i) * self.tanh(g)
            h = self.sigmoid(o) * self.tanh(c)
            out.append(self.head(h))
        return torch.stack(out, 1)


def test_gates_that_are_meant_to_be_closed_are_silent() -> None:
    model = Highway()
    assert train(fit(model, classify(model, Blobs(0)), optimizer("Adam", model, 0.01), 80)).alarms == []


def test_gates_of_an_lstm_are_silent() -> None:
    model = Cell()
    assert train(fit(model, classify(model, Text(0)), optimizer("Adam", model, 0.02), 40)).alarms == []


def test_outputs_meant_to_be_zero_or_one_are_silent() -> None:
    model = nn.Sequential(*mlp(nn.ReLU, 2, 64, inputs=32, outputs=32), nn.Sigmoid())
    codes = (torch.rand(8, 32) < 0.3).float()

    def loss(i: int) -> Tensor:
        x = codes[torch.arange(32) % 8]
        return F.binary_cross_entropy(model(x), x)

    assert train(fit(model, loss, optimizer("Adam", model, 0.02), 120)).alarms == []


def test_squeeze_and_excitation_is_silent() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.block, self.head = nn.Conv2d(1, 16, 3, padding=1), Residual(16, False, 0.0), nn.Linear(16 * 8, 8)
            self.excite = nn.Sequential(nn.Linear(16, 2), nn.ReLU(), nn.Linear(2, 16), nn.Sigmoid())

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(self.conv(x))
            x = x * self.excite(x.mean((2, 3)))[:, :, None, None]
            out: Tensor = self.head(x.mean(2).flatten(1))
            return out

    model = Net()
    assert train(fit(model, classify(model, Pictures(0)), optimizer("Adam", model, 0.01), 60)).alarms == []


# -- NaN and Inf -------------------------------------------------------------------------------------------------------------------


def test_a_logarithm_in_a_module_is_named_by_its_name() -> None:
    layers = list(mlp(nn.ReLU, 4, 32))
    layers.insert(4, nn.Sequential(nn.Linear(32, 32), Log(ONSET)))
    model = nn.Sequential(*layers)
    said = train(fit(model, classify(model, Blobs(0)), optimizer("SGD", model, 0.05), 30))
    alert = said.only("non_finite_activation", "4.1")
    assert (alert.step, said.sent["non_finite_activation"]) == (ONSET, ONSET + 1)
    assert "that of 4.0 before it is finite" in alert.message


@pytest.mark.parametrize("origin", [None, False])
def test_a_logarithm_that_leaves_its_domain_between_two_looks_is_named_if_the_weights_are_finite(origin: bool | None) -> None:
    """At once where the update is run again; else by the next look."""
    late = 75
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), Log(late), nn.Linear(64, 4))
    loss, adam = classify(model, Blobs(0)), optimizer("Adam", model, 0.001)

    def run() -> Iterator[Event]:
        for i in range(120):
            adam.zero_grad()
            value = loss(i)
            value.backward()
            if value.isfinite():
                adam.step()
            yield "step", [adam]

    said = train(Setup(model, run), origin)
    alert = said.only("non_finite_activation", "3")
    assert alert.step == late
    if origin is False:
        assert list(said.sent) == ["non_finite_loss", "non_finite_activation"]
        assert said.sent["non_finite_activation"] <= late + 5
    else:
        assert said.sent == {"non_finite_activation": late + 1}
        assert alert.origin is not None
        assert (alert.origin.module, alert.origin.op) == ("3", "aten::log")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_batch_is_named_as_one(value: float) -> None:
    model, data = mlp(nn.ReLU, 3, 32), Blobs(0)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == ONSET:
            x[3, 2] = value
        return F.cross_entropy(model(x), y)

    said = train(fit(model, loss, optimizer("SGD", model, 0.05), 30))
    assert said.only("non_finite_input", "").step == ONSET
    assert said.sent["non_finite_input"] == ONSET + 1


def test_a_mask_of_inf_before_a_softmax_is_silent() -> None:
    class Mask(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            return scores.masked_fill(hidden, float("-inf"))

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.qkv, self.mask, self.head = nn.Embedding(24, 32), nn.Linear(32, 96), Mask(), nn.Linear(32, 24)
            self.softmax = nn.Softmax(dim=-1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.embed(x)).chunk(3, -1)
            out: Tensor = self.head(self.softmax(self.mask(q @ k.transpose(1, 2) / 6.0)) @ v)
            return out

    model = Attention()
    assert train(fit(model, classify(model, Text(0)), optimizer("Adam", model, 0.01), 40)).alarms == []


# -- the gains ---------------------------------------------------------------------------------------------------------------------


def test_the_cause_of_a_fall_is_the_product_of_what_the_modules_pass_on() -> None:
    model = mlp(nn.Sigmoid, 10, 32)
    alert = train(fit(model, classify(model, Blobs(0)), updates=20)).alarms[0]
    assert alert.rule == "vanishing_gradient"
    assert alert.cause.startswith("10 Sigmoids pass on ×0.24 each, 10 Linears ×0.")
    product = alert.evidence["Sigmoid_gain"] ** 10 * alert.evidence["Linear_gain"] ** 10
    assert product == pytest.approx(alert.evidence["grad_norm"] / alert.evidence["reference_norm"], rel=3.0)


def test_functions_account_for_a_fall_too() -> None:
    model = Functional(torch.sigmoid, depth=10)
    alert = train(fit(model, classify(model, Blobs(0)), updates=20)).alarms[0]
    assert alert.cause.startswith("10 Sigmoids pass on ×0.2")
