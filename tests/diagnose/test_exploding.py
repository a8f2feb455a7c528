"""Gradients that explode, across depth and in time, and everything that is only large."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradwatch.diagnose.rules import exploding_gradient
from gradwatch.diagnose.rules.deltas import deltas_of
from gradwatch.history import LayerFact, Meta, ParameterFact
from gradwatch.records import Severity
from tests.diagnose.runs import Run, chain, change

KEEPS = 64**0.5
"""Norm of a 64 × 64 matrix that keeps the scale of its input."""


def growth(layers: int, decades: float) -> Any:
    """Norms that grow evenly by so many decades from the last layer to the first."""
    return np.repeat(10.0 ** np.linspace(decades, 0.0, layers), 2)


@pytest.mark.parametrize(
    ("decades", "gain", "told"),
    [
        pytest.param(3.0, 2.0, True, id="explained by the weights"),
        pytest.param(3.0, 1.0, False, id="of a healthy size and not explained"),
        pytest.param(4.5, 1.0, True, id="of a size that needs no explanation"),
        pytest.param(1.5, 2.0, False, id="small"),
    ],
)
def test_growth_towards_the_input(decades: float, gain: float, told: bool) -> None:
    run = Run(chain(16))
    run.records(13, growth(16, decades), weight_norm=gain * KEEPS)
    if not told:
        assert run.alarms() == []
        return
    alert = run.only("exploding_gradient")
    assert (alert.severity, alert.step, alert.layers[0], run.sent[0][0]) == (Severity.ERROR, 0, "0", 10)
    assert "15" not in alert.layers
    assert ("weights are large" in alert.cause) is (gain > 1)


def uneven(layers: int, decades: float) -> Any:
    """The same, all of it at one module in five."""
    steps = np.where(np.arange(layers) % 5 == 4, 1.0, 0.0)[::-1].cumsum()[::-1]
    return np.repeat(10.0 ** (decades * (steps - steps[-1]) / (steps[0] - steps[-1])), 2)


@pytest.mark.parametrize(
    ("norms", "loss", "told"),
    [
        pytest.param(growth(16, 3.0), 1.0, True, id="evenly, and nothing is learnt"),
        pytest.param(growth(16, 3.0), 0.8, False, id="the loss improves"),
        pytest.param(growth(16, 2.1), 1.0, False, id="less"),
        pytest.param(growth(11, 3.0), 1.0, False, id="few modules"),
        pytest.param(uneven(16, 3.0), 1.0, False, id="in steps, as where widths change"),
    ],
)
def test_growth_that_the_depth_makes(norms: Any, loss: float, told: bool) -> None:
    run = Run(chain(len(norms) // 2))
    for i in range(15):
        run.record(norms, weight_norm=KEEPS, loss=loss if i > 4 else 1.0)
    assert run.rules() == (["exploding_gradient"] if told else [])
    if told:
        assert (run.only("exploding_gradient").layers[0], run.sent[0][0]) == ("0", 14)


def test_growth_that_begins_at_update_20_is_told_within_10() -> None:
    run = Run(chain(16))
    run.records(20)
    run.records(10, growth(16, 5.0))
    # The first of them is a spike as well, and was told as one before it could be known to last.
    assert run.rules() == ["gradient_spike", "exploding_gradient"]
    assert run.alarms()[1].step == 20


def test_a_jump_between_neighbours_is_the_work_of_a_custom_backward() -> None:
    run = Run(chain(8))
    run.records(15, np.repeat([300.0] * 4 + [1.0] * 4, 2), weight_norm=KEEPS)
    alert = run.only("exploding_gradient")
    assert set(alert.layers) == {"0", "1", "2", "3"}
    assert "custom backward" in alert.remedy


def test_a_small_head_below_large_layers_is_none() -> None:
    run = Run(chain(4))
    run.records(40, np.repeat([300.0, 300.0, 300.0, 1.0], 2), weight_norm=KEEPS)
    assert run.alarms() == []


def test_a_layer_scale_network_is_none() -> None:
    run = Run(chain(10))
    run.records(40, np.repeat([1.0] + [1e-6] * 8 + [1.0], 2))
    assert run.alarms() == []


def test_a_module_that_normalises_enlarges_the_gradient_of_a_small_embedding() -> None:
    meta = chain(8)
    layers = (meta.layers[0], *(LayerFact(f"{i}", "Embedding" if i < 2 else "Linear", "other") for i in range(8)))
    norm = LayerFact("norm", "LayerNorm", "normalization")
    facts = [replace(f, order=None if f.order is None else f.order + (2 if int(f.layer) >= 2 else 0)) for f in meta.parameters]
    facts = [f for f in facts if f.name not in ("0.bias", "1.bias")]
    facts += [
        ParameterFact(f"norm.{k}", "norm", (64,), owner="SGD#0", order=4 + j, distance=15) for j, k in enumerate(("weight", "bias"))
    ]
    run = Run(Meta(tuple(facts), (*layers, norm)))
    norms = np.array([500.0 if f.layer in ("0", "1") else 1.0 for f in facts])
    run.records(40, norms)
    assert run.alarms() == []


def test_a_head_of_small_weight_behind_another_is_none() -> None:
    """Two heads on one trunk: the one executed last weighs little in the loss."""
    meta = chain(5)
    facts = [replace(f, distance=f.distance if int(f.layer) < 4 else 4) for f in meta.parameters]
    layers = tuple(replace(f, role="head") if f.name in ("3", "4") else f for f in meta.layers)
    run = Run(Meta(tuple(facts), layers))
    run.records(40, np.repeat([1.0] * 4 + [1e-5], 2))
    assert run.alarms() == []


def test_when_activations_explode_too_the_biases_tell() -> None:
    norms = np.full(32, 1e6)
    norms[1::2] = 10.0 ** np.linspace(6, 0, 16)
    run = Run(chain(16, activation="ReLU"))
    run.records(12, norms, weight_norm=3 * KEEPS)
    alert = run.only("exploding_gradient")
    assert alert.layers[0] == "0"
    assert run.sent[0][0] == 3


@pytest.mark.parametrize(
    ("first", "then", "size", "decades"),
    [
        pytest.param(1e-6, 1e-3, 1.0, 1.0, id="nothing but rounding"),
        pytest.param(0.0, 1e-3, 1.0, 1.0, id="nothing at all"),
        pytest.param(1e-5, 1e-3, 1.0, -3.0, id="more than that"),
        pytest.param(1.0, 1e-6, 1.0, -6.0, id="not from the start"),
        pytest.param(1e-6, 1e-3, 1e3, -3.0, id="activations explode"),
        pytest.param(1e-6, 1e-3, np.nan, -3.0, id="activations are not known"),
    ],
)
def test_a_bias_that_got_nothing_from_the_start_is_no_reference(first: float, then: float, size: float, decades: float) -> None:
    """A softmax over the places to which a bias is added takes it out again."""
    run, norms = Run(meta := chain(4), []), np.full(8, 10.0)
    for bias in [first] * 10 + [then] * 10:
        norms[7] = bias
        run.record(norms, noise=0.0, activation_rms=np.full(len(meta.layers), size))
    deltas = deltas_of(run.history, np.ones(8, bool), 4.0)
    assert deltas is not None
    assert deltas.bias[-1] == pytest.approx([1.0, 1.0, 1.0, decades], abs=0.01)


def test_without_biases_the_weights_and_the_size_of_the_gradient_tell() -> None:
    run = Run(chain(16, activation="ReLU", bias=False))
    run.records(12, 1e5, weight_norm=3 * KEEPS)
    alert = run.only("exploding_gradient")
    assert alert.layers[0] == "0"
    run = Run(chain(16, activation="ReLU", bias=False))
    run.records(40, 1.0, weight_norm=3 * KEEPS)
    assert run.alarms() == []


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        pytest.param([0.61, 0.61, 0.61, 0.0], True, id="three steep ones"),
        pytest.param([0.61, 0.59, 0.61, 0.0], False, id="one is less"),
        pytest.param([0.61, 0.61, 0.0, 0.61], False, id="not in a row"),
        pytest.param([0.9, 0.9, 0.9, -1.3], False, id="the last one gets much, too"),
    ],
)
def test_three_steps_of_a_stair_are_enough_if_they_are_steep(steps: list[float], told: bool) -> None:
    level = np.append(np.cumsum(steps[::-1])[::-1], 0.0)
    meta = chain(len(level))
    run = Run(meta, [exploding_gradient])
    run.records(12, np.array([10.0 ** level[int(f.layer)] for f in meta.parameters]), noise=0.0, weight_norm=KEEPS)
    assert run.rules() == (["exploding_gradient"] if told else [])


@pytest.mark.parametrize(
    ("each", "norms", "told"),
    [
        pytest.param(0.5, True, True, id="four layers with a normalisation between each two"),
        pytest.param(0.5, False, False, id="what lies between are layers too"),
        pytest.param(0.38, True, False, id="less each time"),
    ],
)
def test_a_stair_leaves_normalisations_aside(each: float, norms: bool, told: bool) -> None:
    """Each layer enlarges the gradient, and what lies before it gets a little less than the layer."""
    meta = chain(11)
    kind = "normalization" if norms else "linear"
    layers = tuple(replace(f, kind=kind) if f.name in ("1", "3", "5", "7", "9") else f for f in meta.layers)
    level = [each * (10 - i) / 2 - (0.3 if i % 2 else 0.0) for i in range(11)]
    run = Run(replace(meta, layers=layers), [exploding_gradient])
    run.records(12, np.array([10.0 ** level[int(f.layer)] for f in meta.parameters]), noise=0.0, weight_norm=KEEPS)
    assert run.rules() == (["exploding_gradient"] if told else [])


def test_large_gradients_beside_small_weights_are_no_evidence() -> None:
    run = Run(chain(16))
    run.records(40, 1e5, weight_norm=KEEPS)
    assert run.alarms() == []


def test_norm_and_loss_that_grow_without_a_pause_are_told() -> None:
    run = Run(chain(4))
    for i in range(15):
        run.record(2.0**i, loss=1.5 * 4.0**i)
    assert set(run.rules()) == {"exploding_gradient", "loss_diverging"}, "a loss that is gone is told, too"
    alert = next(alert for alert in run.alarms() if alert.rule == "exploding_gradient")
    assert (alert.step, alert.layers) == (0, ("",))
    assert "learning rate is too high" in alert.cause


def test_growth_from_update_20_is_told_within_10() -> None:
    run = Run(chain(4))
    run.records(20)
    for i in range(10):
        run.record(3.0**i, loss=9.0**i)
    assert set(run.rules()) == {"exploding_gradient", "loss_diverging"}
    assert all(19 <= alert.step <= 22 for alert in run.alarms())


def test_a_norm_that_grows_while_the_loss_does_not_is_none() -> None:
    run = Run(chain(4))
    for i in range(40):
        run.record(1.3**i, loss=1.0)
    assert run.alarms() == []


def test_growth_that_stops_is_none() -> None:
    run = Run(chain(4), [exploding_gradient])
    for i in range(60):
        run.record(30.0 if i > 20 else 1.2**i, loss=30.0 if i > 20 else 1.2**i)
    assert run.alarms() == []


@pytest.mark.parametrize(
    ("last", "told"),
    [
        pytest.param([400.0], False, id="one batch is unlike the others"),
        pytest.param([400.0, 1.6], False, id="and the next is not"),
        pytest.param([20.0, 400.0], True, id="two steps"),
        pytest.param([400.0, 500.0], True, id="it goes on"),
    ],
)
def test_a_single_jump_is_no_growth_until_the_next_record(last: list[float], told: bool) -> None:
    run = Run(chain(4), [exploding_gradient])
    for value in [1.0 + 0.05 * i for i in range(12)] + last:
        run.record(20 * value, noise=0.0, loss=value)
    assert run.rules() == (["exploding_gradient"] if told else [])


@pytest.mark.parametrize(("part", "told"), [(1.01, True), (0.99, False)])
def test_a_gradient_that_grows_has_to_come_to_three_times_the_weights(part: float, told: bool) -> None:
    run = Run(chain(4), [exploding_gradient])
    for i in range(15):
        run.record(part * 15.0 * 2.0 ** (i - 14), noise=0.0, loss=1.5 * 4.0**i)  # of weights of 5
    assert run.rules() == (["exploding_gradient"] if told else [])


LOST = {"loss": np.inf, "grad_nonfinite": 4.0, "grad_state": 9, "total_norm": np.nan}


@pytest.mark.parametrize(
    ("decades", "told"),
    [
        pytest.param([(4.1, 4.1)], True, id="one step"),
        pytest.param([(3.9, 4.1)], False, id="one step, the norm by less"),
        pytest.param([(4.1, 3.9)], False, id="one step, the loss by less"),
        pytest.param([(1.6, 1.6), (3.1, 3.1)], True, id="two steps"),
        pytest.param([(1.6, 1.6), (2.9, 3.1)], False, id="two steps, the norm by less"),
        pytest.param([(1.1, 1.1), (3.1, 2.1)], True, id="two steps, the loss by two decades"),
        pytest.param([(1.1, 1.1), (3.1, 1.9)], False, id="two steps, the loss by less"),
    ],
)
def test_how_far_a_run_that_dies_has_to_have_grown(decades: list[tuple[float, float]], told: bool) -> None:
    run = Run(chain(4), [exploding_gradient])
    for norm, loss in ((0.0, 0.0), *decades):
        run.record(10.0 * 10.0**norm, noise=0.0, loss=10.0**loss)
    run.record(np.nan, **LOST)
    assert run.rules() == (["exploding_gradient"] if told else [])
    assert run.notices == []


def test_a_run_that_dies_in_three_updates_is_told_as_growing_too() -> None:
    run = Run(chain(4))
    for i in range(4):
        run.record(1e3**i, loss=1e5**i)
    run.record(np.nan, loss=np.inf, grad_nonfinite=4.0, grad_state=9, total_norm=np.nan)
    assert set(run.rules()) == {"non_finite_loss", "exploding_gradient"}


def test_decay_is_vanishing_and_growth_exploding_never_both() -> None:
    for norms in (growth(12, 6.0), growth(12, 6.0)[::-1]):
        run = Run(chain(12))
        run.records(20, norms)
        assert len(run.rules()) == 1


def test_a_large_network_takes_turns_and_is_told_at_update_11_all_the_same() -> None:
    run = Run(chain(2100, width=4))
    run.records(16, growth(2100, 6.0), weight_norm=1.0)
    assert run.sent[0][0] == 11
    assert run.only("exploding_gradient").count == 3  # 11, 12 and 15


@pytest.mark.parametrize(
    "norms",
    [
        pytest.param(np.append(1e38, np.full(7, 1e30)), id="beside the largest of all numbers"),
        pytest.param(np.append(np.full(6, 1e-30), [2e38, 2e38]), id="below them"),
    ],
)
def test_numbers_at_the_end_of_the_range_switch_no_rule_off(norms: np.ndarray) -> None:
    run = Run(chain(4))
    run.records(15, norms, noise=0.0, weight_norm=1e30)
    assert run.notices == []


def test_a_total_that_overflows_while_all_grows_switches_no_rule_off() -> None:
    run = Run(chain(4))
    for i in range(15):
        run.record(4.0**i, loss=4.0**i, **({"total_norm": np.inf} if i in (9, 10) else {}))
    assert run.notices == []


def test_a_thousand_layers_may_enlarge_a_signal_beyond_the_range_of_numbers() -> None:
    run = Run(chain(1000))
    run.records(12, 1e4, weight_norm=3 * KEEPS)
    assert run.rules() == ["exploding_gradient"]
    assert run.notices == []


def test_distances_that_nobody_knows_switch_no_rule_off() -> None:
    run = Run(change(chain(8), lambda f: f.layer in ("3", "4"), distance=None))
    run.records(15, growth(8, 6.0))
    assert run.rules() == ["exploding_gradient"]
    assert run.notices == []


def test_the_weights_of_one_optimizer_alone_are_not_those_of_all() -> None:
    run = Run(chain(4), [exploding_gradient])
    turns = np.array([1.0, np.nan] * 4), np.array([np.nan, 1e4] * 4)
    for i in range(20):
        run.record(1.5**i, loss=1.5**i, weight_norm=turns[i % 2], noise=0.0)
    assert run.alarms() == []


def test_growth_most_of_which_is_at_one_module_is_not_even() -> None:
    levels = np.linspace(1.0, 0.0, 16)
    levels[:8] += 1.6
    run = Run(chain(16), [exploding_gradient])
    run.records(15, np.repeat(10.0**levels, 2), weight_norm=KEEPS)
    assert run.alarms() == []


def test_even_growth_that_the_last_module_shares_is_none() -> None:
    levels = np.linspace(2.6, 0.0, 16)
    levels[-1] = 1.5
    run = Run(chain(16), [exploding_gradient])
    run.records(15, np.repeat(10.0**levels, 2), weight_norm=KEEPS)
    assert run.alarms() == []


@pytest.mark.parametrize(
    ("scale", "told"), [pytest.param(1.0, True, id="as at the start"), pytest.param(1e-9, False, id="starved")]
)
def test_what_is_left_of_a_gradient_has_no_shape(scale: float, told: bool) -> None:
    run = Run(chain(16), [exploding_gradient])
    run.records(10, 1.0)
    run.records(12, scale * growth(16, 5.0), weight_norm=KEEPS)
    assert run.rules() == (["exploding_gradient"] if told else [])


@pytest.mark.parametrize(
    ("pace", "told"), [pytest.param(1.3, True, id="1.3 decades in twelve records"), pytest.param(1.27, False, id="slower")]
)
def test_growth_without_a_pause_is_told_before_two_decades(pace: float, told: bool) -> None:
    run = Run(chain(4), [exploding_gradient])
    for i in range(15):
        run.record(30.0 * pace**i, loss=pace**i, weight_norm=1.0, noise=0.0)
    assert run.rules() == (["exploding_gradient"] if told else [])
