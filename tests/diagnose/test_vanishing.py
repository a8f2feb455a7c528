"""Gradients that vanish, by depth and by not learning, and everything that only looks like it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradwatch.diagnose.rules import vanishing_gradient
from gradwatch.history import LayerFact, Meta, ParameterFact
from gradwatch.records import Severity, SkipReason
from tests.diagnose.runs import Run, chain, change, skipped


def fall(layers: int, decades: float) -> Any:
    """Norms that fall evenly by so many decades from the last layer to the first."""
    return np.repeat(10.0 ** np.linspace(-decades, 0.0, layers), 2)


def cut(layers: int, below: int, factor: float) -> Any:
    """Norms of 1, but `factor` in the first `below` layers."""
    return np.repeat(np.where(np.arange(layers) < below, factor, 1.0), 2)


def test_an_even_fall_names_the_most_starved_first_at_update_10() -> None:
    run = Run(chain(10))
    run.records(15, fall(10, 8.0))
    alert = run.only("vanishing_gradient")
    assert (alert.severity, alert.step, run.sent[0][0]) == (Severity.WARNING, 0, 10)
    assert alert.layers == ("0", "1", "2", "3", "4", "5")
    assert set(alert.parameters) == {f"{i}.{kind}" for i in range(6) for kind in ("weight", "bias")}
    assert alert.evidence["ratio"] == pytest.approx(1e-8, rel=0.5)


def test_a_loss_of_the_gradient_in_one_place_names_that_place_first() -> None:
    run = Run(chain(8))
    run.records(12, cut(8, 3, 1e-6))
    alert = run.only("vanishing_gradient")
    assert alert.layers == ("2", "1", "0")
    assert "one place, behind 2" in alert.cause


def test_a_fall_that_begins_at_update_20_is_told_within_10() -> None:
    run = Run(chain(8))
    run.records(20)
    run.records(10, cut(8, 3, 1e-6))
    assert run.only("vanishing_gradient").step == 20


def test_it_holds_whatever_the_level_and_the_noise() -> None:
    for level in (1e-12, 1e9):
        run = Run(chain(10))
        run.records(15, level * fall(10, 7.0), noise=0.5)
        assert run.rules() == ["vanishing_gradient"]


def test_when_all_matrices_vanish_the_last_bias_is_the_reference() -> None:
    norms = np.full(16, 1e-12)
    norms[1::2] = 10.0 ** np.linspace(-12, 0, 8)
    run = Run(chain(8))
    run.records(12, norms)
    assert set(run.only("vanishing_gradient").layers) == {str(i) for i in range(6)}


def test_exact_zeros_all_at_once_are_told_as_such() -> None:
    run = Run(chain(8))
    run.records(12, cut(8, 3, 0.0))
    assert run.only("zero_gradient").layers == ("2", "1", "0")


@pytest.mark.parametrize("decades", [2.5, 3.0])
def test_the_fall_of_healthy_networks_is_none(decades: float) -> None:
    run = Run(chain(12))
    run.records(60, fall(12, decades))
    assert run.alarms() == []


def test_a_fall_that_closes_is_left_alone() -> None:
    run = Run(chain(12))
    for i in range(40):
        run.record(fall(12, max(0.0, 5.5 - 0.2 * i)))
    assert run.alarms() == []


def test_a_fall_with_a_falling_loss_has_to_be_larger() -> None:
    for decades, told in ((4.0, False), (6.0, True)):
        run = Run(chain(12))
        for i in range(40):
            run.record(fall(12, decades), loss=2.0 * 0.97**i)
        assert bool(run.alarms()) is told


def test_once_the_loss_is_low_everything_may_vanish() -> None:
    run = Run(chain(12))
    for i in range(60):
        run.record(fall(12, 0.0 if i < 30 else 8.0), loss=2.0 * 0.8**i)
    assert run.alarms() == []


def test_a_single_projection_whose_upstream_layers_are_fine_is_none() -> None:
    norms = np.ones(24)
    norms[8:10] = 1e-9
    run = Run(chain(12))
    run.records(60, norms)
    assert run.alarms() == []


def test_a_bias_before_a_normalisation_is_none() -> None:
    norms = np.ones(24)
    norms[1::2] = 1e-8
    norms[-1] = 1.0
    run = Run(chain(12))
    run.records(60, norms)
    assert run.alarms() == []


def test_everything_below_a_zero_initialised_head_waits_for_it_to_grow() -> None:
    meta = change(chain(5), lambda f: f.name == "4.weight", init_rms=0.0)
    run = Run(meta)
    norms, weights = np.ones(10), np.full(10, 5.0)
    for i in range(50):
        norms[:8] = 1e-6 * i
        weights[8] = 8 * 1e-6 * i
        run.record(norms, weight_norm=weights)
    assert run.alarms() == []


def test_a_zero_initialised_head_explains_no_more_than_its_share() -> None:
    meta = change(chain(12), lambda f: f.name == "11.weight", init_rms=0.0)
    run = Run(meta)
    weights = np.full(24, 5.0)
    weights[22] = 8 * 1e-3
    run.records(12, fall(12, 11.0), weight_norm=weights)
    assert run.rules() == ["vanishing_gradient"]


def branches(head_of_the_first: bool) -> Meta:
    """Two chains of four and two layers; the first ends in a head of its own, or both are merged by the last layer."""
    roles = {"a0": "input", "b0": "input", "b1": "head"} | ({"a3": "head"} if head_of_the_first else {})
    parameters, layers, order = [], [LayerFact("", "Net")], 0
    for name in ("a0", "a1", "a2", "a3", "b0", "b1"):
        layers.append(LayerFact(name, "Linear", "linear", order, roles.get(name, "hidden")))
        for kind, shape in (("weight", (16, 16)), ("bias", (16,))):
            parameters.append(
                ParameterFact(f"{name}.{kind}", name, shape, owner="Adam#0", init_rms=0.1, order=order, distance=20 - order)
            )
            order += 1
    return Meta(tuple(parameters), tuple(layers))


def test_a_branch_with_a_head_of_its_own_may_have_a_loss_that_weighs_less() -> None:
    norms = np.array([1e-6] * 8 + [1.0] * 4)
    run = Run(branches(head_of_the_first=True))
    run.records(40, norms)
    assert run.alarms() == []
    run = Run(branches(head_of_the_first=False))
    run.records(12, norms)
    assert run.only("vanishing_gradient").layers == ("a3", "a2", "a1", "a0")


def test_in_the_graph_of_a_derivative_the_first_layer_is_next_to_the_loss_too() -> None:
    meta = chain(8)
    layers = tuple(replace(fact, role="head") if fact.name == "0" else fact for fact in meta.layers)
    run = Run(meta := replace(meta, layers=layers))
    run.records(12, np.array([10.0 ** (int(f.layer) - 7) for f in meta.parameters]))
    alert = run.only("vanishing_gradient")
    assert "0" in alert.layers


@pytest.mark.parametrize(
    ("gain", "loss", "told"),
    [
        pytest.param(0.25, 1.0, True, id="sigmoids"),
        pytest.param(0.35, 1.0, False, id="what passes on more"),
        pytest.param(np.nan, 1.0, False, id="nobody looked"),
        pytest.param(0.25, 0.8, False, id="a loss that improves"),
    ],
)
def test_activations_that_pass_on_little_explain_a_smaller_fall(gain: float, loss: float, told: bool) -> None:
    run = Run(meta := chain(8, activation="Sigmoid"))
    gains = np.array([gain if fact.activation else 1.0 for fact in meta.layers])
    for i in range(20):
        run.record(fall(8, 3.6), gain=gains, loss=1.0 if i < 5 else loss)
    assert run.rules() == (["vanishing_gradient"] if told else [])


def second_branch(layers: int) -> Meta:
    """A healthy chain of three, then one of `layers` that reads the data itself, then a head."""
    names = [f"a{i}" for i in range(3)] + [f"b{i}" for i in range(layers)] + ["head"]
    roles = {"a0": "input", "b0": "input", "head": "head"}
    facts = [LayerFact("", "Net"), *(LayerFact(n, "Linear", "linear", i, roles.get(n, "hidden")) for i, n in enumerate(names))]
    return Meta(
        tuple(
            ParameterFact(f"{n}.weight", n, (16, 16), owner="Adam#0", init_rms=0.1, order=i, distance=30 - i)
            for i, n in enumerate(names)
        ),
        tuple(facts),
    )


def test_a_branch_executed_second_is_judged_by_itself() -> None:
    run = Run(second_branch(4))
    run.records(12, np.array([1.0] * 3 + [1e-6] * 4 + [1.0]))
    assert run.only("vanishing_gradient").layers == ("b3", "b2", "b1", "b0")


def test_a_side_input_that_hardly_matters_is_none() -> None:
    run = Run(second_branch(1))
    run.records(40, np.array([1.0] * 3 + [1e-6] + [1.0]))
    assert run.alarms() == []


def test_a_gan_is_judged_in_the_records_of_each_model() -> None:
    meta = chain(10, prefix="g.")
    other = chain(4, prefix="d.")
    both = Meta(meta.parameters + other.parameters, meta.layers[1:] + other.layers[1:])
    run = Run(both)
    nan_g, nan_d = np.full(20, np.nan), np.full(8, np.nan)
    for _ in range(30):
        run.record(np.concatenate((nan_g, np.full(8, 1e4))))
        run.record(np.concatenate((np.ones(20), nan_d)))
    assert run.alarms() == []
    run = Run(both)
    for _ in range(14):
        run.record(np.concatenate((nan_g, np.ones(8))))
        run.record(np.concatenate((fall(10, 8.0), nan_d)))
    assert run.only("vanishing_gradient").layers[0] == "g.0"


def test_skipped_records_are_no_evidence() -> None:
    run = Run(chain(10))
    run.records(30, fall(10, 8.0), **skipped(SkipReason.SCALER))
    assert "vanishing_gradient" not in run.rules()


def test_a_layer_that_gets_next_to_nothing_and_does_not_move_is_told_wherever_it_is() -> None:
    norms, ratio = np.ones(24), np.full(24, 1e-3)
    norms[8:10], ratio[8:10] = 1e-8, 1e-11
    run = Run(chain(12))
    run.records(15, norms, update_ratio=ratio)
    alert = run.only("vanishing_gradient")
    assert (alert.layers, alert.step) == (("4",), 0)
    assert "float32" in alert.cause


def test_a_layer_that_moves_as_others_do_is_none_however_small_its_gradient() -> None:
    norms = np.ones(24)
    norms[8:10] = 1e-8
    run = Run(chain(12))
    run.records(30, norms, update_ratio=1e-3)
    assert run.alarms() == []


def test_a_tiny_learning_rate_is_another_fault() -> None:
    run = Run(chain(12))
    run.records(30, update_ratio=1e-9)
    assert run.rules() == ["update_ratio_too_small"]


def test_nothing_is_said_before_update_10_and_something_when_the_run_ends_there() -> None:
    run = Run(chain(10))
    run.records(9, fall(10, 8.0))
    run.history.ended = True
    run.judge()
    assert run.alarms() == []
    run.history.ended = False
    run.record(fall(10, 8.0))
    assert run.rules() == ["vanishing_gradient"]


def test_parameters_unknown_to_the_graph_are_ignored() -> None:
    run = Run(change(chain(10), lambda f: True, order=None, distance=None))
    run.records(30, fall(10, 8.0))
    assert run.alarms() == []


@pytest.mark.parametrize(
    ("activation", "weight", "word"),
    [
        pytest.param("Sigmoid", 5.0, "9 sigmoids in a row: each passes on at most a quarter", id="sigmoid"),
        pytest.param("Tanh", 8.0, "9 tanh in a row", id="tanh"),
        pytest.param("ReLU", 0.1, "keeps 0.013 of the scale", id="tiny weights"),
        pytest.param("ReLU", 8.0, "passes on less than it gets", id="neither"),
    ],
)
def test_the_cause_is_the_activation_or_the_weights(activation: str, weight: float, word: str) -> None:
    run = Run(chain(10, activation=activation))
    run.records(10, fall(10, 8.0), weight_norm=weight)
    assert word in run.only("vanishing_gradient").cause


@pytest.mark.parametrize(
    ("below", "behind", "loss", "told"),
    [
        pytest.param(0.1, 0.1, 1.0, True, id="all are tiny"),
        pytest.param(0.1, 5.0, 1.0, False, id="only its own weights are"),
        pytest.param(5.0, 0.1, 1.0, False, id="only those behind it are"),
        pytest.param(0.1, 0.1, 0.5, False, id="the loss improves"),
    ],
)
def test_a_single_layer_at_the_input_is_told_where_tiny_weights_explain_it(
    below: float, behind: float, loss: float, told: bool
) -> None:
    run = Run(chain(4), [vanishing_gradient])
    weights = np.repeat([below, behind, behind, behind], 2)
    for i in range(16):
        run.record(cut(4, 1, 1e-4), loss=1.0 if i < 5 else loss, weight_norm=weights)
    assert run.rules() == (["vanishing_gradient"] if told else [])


@pytest.mark.parametrize(
    ("guess", "loss", "weight", "told"),
    [
        pytest.param(0.7, 0.75, 0.1, True, id="it came down to that of a guess"),
        pytest.param(0.7, 0.6, 0.1, False, id="it came below"),
        pytest.param(0.0, 0.75, 0.1, False, id="nobody knows what a guess costs"),
        pytest.param(0.7, 0.75, 5.0, False, id="nothing explains the fall"),
    ],
)
def test_a_loss_that_only_comes_down_to_a_guess_does_not_improve(guess: float, loss: float, weight: float, told: bool) -> None:
    run = Run(replace(chain(10), criterion="mse_loss", guess=guess), [vanishing_gradient])
    for i in range(16):
        run.record(fall(10, 4.4), noise=0.0, loss=1.0 if i < 5 else loss, weight_norm=weight)
    assert run.rules() == (["vanishing_gradient"] if told else [])


def test_a_large_network_is_told_at_update_10_and_each_record_with_evidence_counts() -> None:
    meta = chain(2100, width=4)
    run = Run(meta)
    run.records(14, np.repeat(np.where(np.arange(2100) < 1000, 1e-7, 1.0), 2))
    assert run.sent[0][0] == 10
    assert run.only("vanishing_gradient").count == 5
    assert run.only("vanishing_gradient").layers[0] == "999"


def test_a_gradient_of_exactly_zero_is_not_told_as_a_measurement() -> None:
    run = Run(chain(10))
    run.records(14, np.where(np.arange(20) < 12, 0.0, 1e-3), noise=0.0)
    alert = run.only("zero_gradient")
    assert alert.message == "the gradient is exactly zero in 6 of 10 layers, 0.001 at 6"
    assert alert.cause.startswith("Behind 5 stands something whose derivative is exactly 0")
    assert (alert.evidence["grad_norm"], alert.evidence["layers"]) == (0.0, 6)


def test_a_layer_that_no_longer_gets_any_gradient_is_told_so() -> None:
    run = Run(chain(6))
    run.records(12)
    still = np.where(np.arange(12) // 2 == 3, 0.0, 1.0)
    run.records(30, still, update_ratio=np.where(still == 0.0, 0.0, 1e-3))
    assert run.only("zero_gradient").layers == ("3",)
