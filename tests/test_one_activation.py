"""One activation that stands in several places of a network: each place is told apart, under the module whose output it is given."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch import GradWatch, Severity


class Deep(nn.Module):
    """Linear layers with one activation behind each, and what else stands between the two."""

    def __init__(self, act: nn.Module, depth: int = 4, width: int = 32, between: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(20 if i == 0 else width, width) for i in range(depth))
        self.between = nn.ModuleList(between() for _ in range(depth))
        self.act, self.head = act, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for fc, between in zip(self.fcs, self.between, strict=True):
            x = self.act(between(fc(x)))
        return self.head(x)


def watched(
    model: nn.Module, updates: int = 30, at: int = 0, event: Callable[[], object] = lambda: None, lr: float = 0.1
) -> GradWatch:
    """Train on three classes that can be learnt; `event` happens before the update `at`."""
    source = torch.Generator().manual_seed(1)
    x = torch.randn(256, 20, generator=source)
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with GradWatch(model, console=False) as watch:
        for i in range(updates):
            if i == at:
                event()
            chosen = torch.randint(0, 256, (64,), generator=source)
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return watch


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


@torch.no_grad()
def kill(layer: nn.Linear) -> None:
    layer.bias.fill_(-100.0)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("at", [0, 20])
def test_units_that_die_in_one_place_are_told_with_it_and_alone(place: int, at: int) -> None:
    model = made(lambda: Deep(nn.ReLU()))
    (alert,) = watched(model, 40, at, lambda: kill(model.fcs[place])).alerts  # type: ignore[arg-type]
    assert (alert.rule, alert.layers, alert.step) == ("dead_units", ("act", f"fcs.{place}"), at)
    assert f"act behind fcs.{place}" in alert.message
    assert alert.evidence["layers"] == 1


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU])
def test_a_healthy_network_with_one_activation_is_silent(act: type[nn.Module]) -> None:
    assert [a for a in watched(made(lambda: Deep(act(), depth=2)), 60).alerts if a.severity >= Severity.WARNING] == []


@pytest.mark.parametrize("at", [0, 20])
def test_one_place_that_is_saturated(at: int) -> None:
    model = made(lambda: Deep(nn.Tanh()))

    @torch.no_grad()
    def saturate() -> None:
        model.fcs[2].weight.mul_(100)  # type: ignore[index, union-attr, operator]

    watch = watched(model, 40, at, saturate)
    assert [(a.rule, a.layers, a.step) for a in watch.alerts] == [("saturated_activation", ("act", "fcs.2"), at)]


def test_several_places_are_named_after_the_activation() -> None:
    model = made(lambda: Deep(nn.ReLU()))
    for i in (1, 3):
        kill(model.fcs[i])  # type: ignore[arg-type, index]
    (alert,) = watched(model).alerts
    assert alert.layers == ("act", "fcs.1", "fcs.3")
    assert "act behind fcs.1 and 1 more" in alert.message


class Gated(nn.Module):
    """The activation is called when another layer has run already."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.act, self.head = nn.Linear(20, 32), nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3)
        self.last = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gate(x), self.up(x)
        return self.head(self.act(self.last(self.act(a) * b + b)))


def test_the_place_is_what_gave_the_activation_its_input_not_what_ran_before_it() -> None:
    model = made(Gated)
    kill(model.gate)  # type: ignore[arg-type]
    assert [a.layers for a in watched(model).alerts] == [("act", "gate")]


class Cell(nn.Module):
    """An LSTM by hand, with one sigmoid for three gates; `tanh(c)` is given no module's output."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ModuleDict({gate: nn.Linear(14, 10) for gate in "ifgo"})
        self.sig, self.tanh, self.out = nn.Sigmoid(), nn.Tanh(), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 10)
        for part in x.chunk(5, dim=1):
            z = torch.cat((part, h), 1)
            c = self.sig(self.w["f"](z)) * c + self.sig(self.w["i"](z)) * self.tanh(self.w["g"](z))
            h = self.sig(self.w["o"](z)) * self.tanh(c)
        return self.out(h)


def test_two_activations_behind_one_layer_are_not_mixed() -> None:
    model = made(Cell)
    kill(model.w["o"])  # type: ignore[arg-type, index]
    watch = watched(model)
    flat = dict(zip(watch.history.layers, watch.history.stat("saturated_fraction")[-1], strict=True))
    assert flat["w.o"] == 1.0, "the sigmoid's, which is given its output, and not tanh(c)'s, which only runs after it"
    facts = {fact.name: fact for fact in watch.history.meta.layers}
    assert facts["sig"].places == ("w.i", "w.f", "w.o")
    assert facts["w.o"].follower == "Sigmoid"
    assert facts["w.g"].follower == "Tanh"


@pytest.mark.parametrize("between", [nn.Identity, lambda: nn.Dropout(0.1)], ids=["identity", "dropout"])
@pytest.mark.parametrize("once", [False, True], ids=["each", "one"])
def test_the_gains_of_all_places_account_for_a_gradient_that_vanishes(between: Callable[[], nn.Module], once: bool) -> None:
    one = between()
    watch = watched(made(lambda: Deep(nn.Sigmoid(), depth=12, between=lambda: one if once else between())))
    (alert,) = watch.alerts
    assert alert.rule == "vanishing_gradient"
    assert alert.evidence["Sigmoid_count"] == 12
    assert alert.evidence["Sigmoid_gain"] == pytest.approx(0.24, abs=0.02)
    assert "12 Sigmoids pass on ×0.2" in alert.cause


def test_a_place_that_comes_later_is_told_since_then() -> None:
    class Branch(nn.Module):
        on = False

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.branch, self.head = nn.Linear(20, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 3)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.b(self.act(self.a(x))))
            return self.head(x + self.act(self.branch(x)) if self.on else x)

    model = made(Branch)
    kill(model.branch)  # type: ignore[arg-type]

    def switch_on() -> None:
        model.on = True  # type: ignore[assignment]

    alerts = [a for a in watched(model, 50, 30, switch_on).alerts if a.rule == "dead_units"]
    assert [(a.layers, a.step) for a in alerts] == [(("act", "branch"), 30)]


def test_a_place_beyond_a_hundred() -> None:
    class Residual(Deep):
        def forward(self, x: Tensor) -> Tensor:
            x = self.fcs[0](x)
            for fc in self.fcs[1:]:
                x = x + 0.1 * self.act(fc(x))
            return self.head(x)

    model = made(lambda: Residual(nn.ReLU(), depth=120, width=16))
    kill(model.fcs[100])  # type: ignore[arg-type, index]
    assert [a.layers for a in watched(model, lr=0.01).alerts] == [("act", "fcs.100")]


def test_a_layer_that_is_replaced_leaves_no_place_behind() -> None:
    model = made(lambda: Deep(nn.ReLU()))

    def replace() -> None:
        model.fcs[1] = nn.Linear(32, 32)  # type: ignore[index, operator]

    watch = watched(model, 40, 20, replace)
    (fact,) = (fact for fact in watch.history.meta.layers if fact.name == "act")
    assert sorted(fact.places) == ["fcs.0", "fcs.1", "fcs.2", "fcs.3"]
    dead = dict(zip(watch.history.layers, watch.history.stat("dead_fraction")[-1], strict=True))
    assert all(np.isfinite(dead[name]) for name in ("act", *fact.places))


def test_a_module_out_of_scope_lends_its_activation_to_no_other() -> None:
    from gradwatch import Sampling

    model = made(lambda: Deep(nn.ReLU()))
    kill(model.fcs[2])  # type: ignore[arg-type, index]
    source = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradWatch(model, console=False, sampling=Sampling(exclude=("fcs.2",))) as watch:
        for _ in range(15):
            optimizer.zero_grad()
            model(torch.randn(32, 20, generator=source)).square().mean().backward()
            optimizer.step()
    dead = dict(zip(watch.history.layers, watch.history.stat("dead_fraction")[-1], strict=True))
    assert dead["fcs.1"] < 0.5
    assert np.isnan(dead["fcs.2"])


def test_containers_that_share_an_activation_in_place_have_their_gains() -> None:
    def build(acts: list[nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Linear(20, 16), *[nn.Sequential(act, nn.Linear(16, 16)) for act in acts], nn.Linear(16, 3))

    one = nn.ReLU(inplace=True)
    shared, own = made(lambda: build([one] * 3)), made(lambda: build([nn.ReLU(inplace=True) for _ in range(3)]))
    gains = [
        watch.history.stat("gain")[:, [watch.history.layers.index(str(i)) for i in (1, 2, 3)]]
        for watch in map(watched, (shared, own))
    ]
    np.testing.assert_allclose(gains[0], gains[1], rtol=1e-5)
