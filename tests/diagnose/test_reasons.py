"""What stands behind a finding: the one step, the scale of weights and biases, the step size, the circumstances of a gain."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradwatch import GradWatch
from gradwatch.records import Alert


def network(activation: Callable[[], nn.Module], width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, 3))


def alerts_of(
    model: nn.Module,
    loss: Callable[[Tensor, int], Tensor] | None = None,
    *,
    lr: float = 0.1,
    updates: int = 40,
    before: Callable[[nn.Module, torch.optim.Optimizer, int], None] = lambda model, optimizer, i: None,
    inputs: Callable[[torch.Generator], Tensor] = lambda g: torch.randn(32, 16, generator=g),
) -> dict[str, Alert]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(32) % 3
    with GradWatch(model, console=False) as watch:
        for i in range(updates):
            before(model, optimizer, i)
            optimizer.zero_grad()
            out = model(inputs(generator))
            (F.cross_entropy(out, target) if loss is None else loss(out, i)).backward()
            optimizer.step()
    assert watch.notices == ()
    return {alert.rule: alert for alert in watch.alerts}


def test_a_bias_that_kills_from_the_start() -> None:
    model = network(nn.ReLU)
    model[2].bias.data.fill_(-20.0)  # type: ignore[union-attr, operator]
    alert = alerts_of(model)["dead_units"]
    assert alert.cause == "The bias of 2 (rms 20) makes up most of what it puts out (rms 20), below zero for every input."
    assert alert.remedy == "Initialise the bias of 2 with zeros."


def test_weights_that_saturate_from_the_start() -> None:
    model = network(nn.Tanh)
    model[2].weight.data.mul_(60.0)  # type: ignore[union-attr, operator]
    alert = alerts_of(model)["saturated_activation"]
    found = re.match(r"The weights of 2 enlarge what they are given (\S+) times", alert.cause)
    assert found is not None
    assert float(found[1]) == pytest.approx(60 / 3**0.5, rel=0.05)  # PyTorch's default gives 0.58


def test_inputs_that_saturate_are_told_by_their_own_name() -> None:
    found = alerts_of(network(nn.Tanh), inputs=lambda g: 100 * torch.randn(32, 16, generator=g))
    assert list(found) == ["unnormalized_input"]


def test_the_one_update_after_which_units_died() -> None:
    """One step with a thousand times the gradient leaves all biases far below zero."""

    def before(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
        if i == 21:  # what the huge step of update 20 did, made certain
            model[2].bias.data.fill_(-50.0)  # type: ignore[index, union-attr, operator]

    found = alerts_of(
        network(nn.ReLU),
        lambda out, i: F.cross_entropy(out, torch.arange(32) % 3) * (300 if i == 20 else 1),
        before=before,
        lr=1e-3,
    )
    alert = found["dead_units"]
    told = re.match(
        r"They died after update 20, whose gradient norm was (\S+) where (\S+) is usual at a learning rate of 0\.001\.", alert.cause
    )
    assert told is not None, alert.cause
    assert float(told[1]) / float(told[2]) == pytest.approx(300, rel=0.5)


def test_the_first_update_at_another_learning_rate() -> None:
    def before(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
        optimizer.param_groups[0]["lr"] = 1e-3 if i < 20 else 1e-2
        if i == 21:
            model[2].bias.data.fill_(-50.0)  # type: ignore[index, union-attr, operator]

    alert = alerts_of(network(nn.ReLU), before=before)["dead_units"]
    assert alert.cause == "They died after update 20, the first at a learning rate of 0.01, after 0.001."


def test_what_dies_slowly_has_no_one_update() -> None:
    def before(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
        if i >= 20:
            model[2].bias.data.sub_(0.5)  # type: ignore[index, union-attr, operator]

    alert = alerts_of(network(nn.ReLU), before=before, lr=1e-3, updates=60)["dead_units"]
    assert "after update" not in alert.cause


def test_circumstances_stand_beside_the_gain() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(9) for layer in (nn.Linear(16, 16), nn.Sigmoid())]
    alert = alerts_of(nn.Sequential(*layers, nn.Linear(16, 3)))["vanishing_gradient"]
    e = alert.evidence
    assert e["normalizations"] == 0
    assert e["depth"] == 9  # from the second layer on, whose weight is the lowest, to the head
    assert e["saturated_fraction"] == 0
    assert e["weight_gain"] == pytest.approx(3**-0.5, rel=0.1)
    gains = e["Sigmoid_gain"] ** e["Sigmoid_count"] * e["Linear_gain"] ** e["Linear_count"]
    assert gains == pytest.approx(e["grad_norm"] / e["reference_norm"], rel=30)  # within what `EXPLAINED` allows of eleven decades
    assert alert.cause.startswith("9 Sigmoids pass on ×0.2")


def test_normalisations_on_the_way_are_counted() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.LayerNorm(16), nn.Sigmoid())]
    found = alerts_of(nn.Sequential(*layers, nn.Linear(16, 3)), lr=1e-3).get("vanishing_gradient")
    assert found is not None
    assert found.evidence["normalizations"] >= 8


PLATEAU = 100


def test_a_plateau_of_tiny_steps_is_told_as_that() -> None:
    found = alerts_of(network(nn.ReLU), lr=1e-9, updates=PLATEAU)
    alert = found.get("loss_plateau") or found["update_ratio_too_small"]
    assert "too small" in alert.cause or "too little" in alert.cause
    assert "Raise the learning rate" in alert.remedy


def random_labels(out: Tensor, i: int) -> Tensor:
    return F.cross_entropy(out, torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(i)))


def test_constant_inputs_are_told() -> None:
    alert = alerts_of(network(nn.ReLU), random_labels, inputs=lambda g: torch.ones(32, 16), updates=PLATEAU, lr=0.01)[
        "loss_plateau"
    ]
    assert alert.cause == "The inputs are constant: nothing in them tells one sample from another."


def test_labels_that_have_nothing_to_do_with_the_inputs() -> None:
    found = alerts_of(network(nn.ReLU), random_labels, updates=PLATEAU, lr=0.01)
    assert found["loss_plateau"].cause.startswith("The outputs tell nothing of the targets")
