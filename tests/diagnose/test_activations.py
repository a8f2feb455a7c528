"""Dead units and saturated activations, told from healthy ones that look like them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gradwatch.history import Meta
from gradwatch.records import Severity
from tests.diagnose.runs import Run, chain, change, said_in_replay


def layers(meta: Meta, **values: float) -> NDArray[np.float32]:
    """`[L]`: values by the end of a layer's name after "m", the others not observed."""
    row = np.full(len(meta.layers), np.nan, np.float32)
    for name, value in values.items():
        row[[fact.name for fact in meta.layers].index(name.removeprefix("m"))] = value
    return row


def healthy(run: Run, records: int, **columns: Any) -> None:
    """Records in which half of each activation's output is flat, as a ReLU's is, or little of a tanh's."""
    facts = run.history.meta.layers
    flat = np.array([np.nan if f.activation is None else 0.5 if f.activation == "ReLU" else 0.1 for f in facts], np.float32)
    run.records(records, **({"saturated_fraction": flat, "gain": np.where(np.isnan(flat), np.nan, 0.8)} | columns))


# -- dead units --------------------------------------------------------------------------------------------------------------------


def dead(meta: Meta, share: float = 1.0, flat: float = 1.0, name: str = "1act") -> dict[str, Any]:
    return {"dead_fraction": layers(meta, **{f"m{name}": share}), "saturated_fraction": layers(meta, **{f"m{name}": flat})}


def test_a_layer_dead_from_the_start_is_told_at_update_10() -> None:
    run = Run(meta := chain(4, activation="ReLU"))
    run.records(9, saturated_fraction=dead(meta)["saturated_fraction"])
    assert run.alarms() == []
    run.record(**dead(meta))
    alert = run.only("dead_units")
    assert (alert.severity, alert.step, alert.layers) == (Severity.WARNING, 0, ("1act",))
    assert alert.message == "100% of the units of 1act fire for no input"
    assert "since the start" in alert.cause


def test_a_layer_that_dies_later_is_told_within_ten_updates_and_since_when() -> None:
    run = Run(meta := chain(4, activation="ReLU"))
    healthy(run, 20)
    for _ in range(8):
        run.record(**dead(meta, share=0.3))
    alert = run.only("dead_units")
    assert (alert.step, run.sent[0][0]) == (20, 28)
    assert "learning rate" in alert.remedy


@pytest.mark.parametrize(
    ("flat", "gain", "at"),
    [
        pytest.param(1.0, 0.0, 25, id="nothing at all passes"),
        pytest.param(0.9995, 0.0, 28, id="not all is flat"),
        pytest.param(1.0, 1e-9, 28, id="a little passes"),
        pytest.param(1.0, np.nan, 28, id="it is not known what passes"),
    ],
)
def test_a_layer_that_passes_nothing_at_all_is_told_sooner(flat: float, gain: float, at: int) -> None:
    run = Run(meta := chain(4, activation="ReLU"))
    healthy(run, 20)
    run.records(8, **dead(meta, 0.3, flat), gain=layers(meta, m1act=gain))
    assert (run.only("dead_units").step, run.sent[0][0]) == (20, at)


@pytest.mark.parametrize(
    ("norms", "loss", "told"),
    [
        pytest.param(0.0, 1.0, True, id="nothing gets a gradient"),
        pytest.param(1.0, 1.0, False, id="something does"),
        pytest.param(0.0, 0.0, False, id="a hinge that is satisfied"),
    ],
)
def test_an_output_that_is_silent(norms: float, loss: float, told: bool) -> None:
    run = Run(meta := chain(4, activation="ReLU"))
    run.records(14, norms, loss=loss, **dead(meta, name="3"))
    assert ("dead_units" in run.rules()) is told


@pytest.mark.parametrize(
    ("rms", "gain", "delta", "told"),
    [
        pytest.param(0.0, 0.0, 1.0, True, id="gives and passes nothing"),
        pytest.param(1e-30, 0.0, 1.0, False, id="gives something"),
        pytest.param(0.0, 1.0, 1.0, False, id="zeros that will change: behind a layer that began at zero"),
        pytest.param(0.0, 0.0, 0.0, False, id="gets no gradient either"),
    ],
)
def test_a_module_of_any_kind_that_is_silent(rms: float, gain: float, delta: float, told: bool) -> None:
    meta = chain(4, activation="ReLU")
    meta = replace(meta, layers=tuple(replace(f, type="JumpReLU", activation=None) if f.name == "1act" else f for f in meta.layers))
    run = Run(meta)
    run.records(12, activation_rms=layers(meta, m1act=1.0), gain=layers(meta, m1act=0.5), delta_norm=layers(meta, m1act=1.0))
    columns = {"activation_rms": layers(meta, m1act=rms), "gain": layers(meta, m1act=gain), "delta_norm": layers(meta, m1act=delta)}
    run.records(7, **columns)
    assert run.alarms() == []
    run.record(**columns)
    assert run.rules() == (["dead_units"] if told else [])
    if told:
        assert (run.only("dead_units").step, run.only("dead_units").layers) == (12, ("1act",))


def test_where_one_update_in_ten_is_looked_at_three_looks_are_enough() -> None:
    run = Run(meta := chain(4, activation="ReLU"))
    healthy(run, 64)
    for look in range(4):
        run.record(**dead(meta, share=0.3))
        assert run.rules() == (["dead_units"] if look >= 2 else [])
        run.records(9)
    assert run.only("dead_units").step == 64


def test_a_function_is_named_after_the_module_that_it_follows() -> None:
    run = Run(meta := chain(4))
    run.records(12, **dead(meta, name="1"))
    assert run.only("dead_units").layers == ("1",)


def test_several_dead_layers_are_one_alert_the_first_to_run_first() -> None:
    run = Run(meta := chain(5, activation="ReLU"))
    both = {name: np.fmax(column, dead(meta, name="3act")[name]) for name, column in dead(meta).items()}
    run.records(12, **both)
    alert = run.only("dead_units")
    assert alert.layers == ("1act", "3act")
    assert "1act and 1 more" in alert.message


@pytest.mark.parametrize(
    ("share", "flat"),
    [
        pytest.param(0.6, 0.9, id="some dead units"),
        pytest.param(0.89, 0.99, id="what Adam at 0.1 makes"),
        pytest.param(0.0, 0.97, id="sparse but alive"),
        pytest.param(1.0, 0.0, id="a smooth rectifier around 0"),
    ],
)
def test_units_that_look_dead_and_are_not(share: float, flat: float) -> None:
    run = Run(meta := chain(4, activation="ReLU"))
    healthy(run, 1)
    run.records(60, **dead(meta, share, flat))
    assert run.alarms() == []


@pytest.mark.parametrize(
    ("width", "share", "told"),
    [
        pytest.param(32, 0.76, True, id="three in four of many"),
        pytest.param(32, 0.74, False, id="some of many"),
        pytest.param(2000, 0.76, True, id="three in four of very many"),
        pytest.param(16, 14 / 16, True, id="14 of 16"),
        pytest.param(16, 13 / 16, False, id="13 of 16, which chance makes"),
        pytest.param(4, 0.94, False, id="all but a part of few"),
    ],
)
def test_units_that_have_been_dead_from_the_first_look_on(width: int, share: float, told: bool) -> None:
    run = Run(meta := chain(4, width=width, activation="ReLU"))
    run.records(12, **dead(meta, share, 0.9))
    assert run.rules() == (["dead_units"] if told else [])


def test_a_layer_that_is_not_called_is_none() -> None:
    run = Run(meta := chain(4, activation="ReLU"))
    healthy(run, 20)
    run.records(40, calls=layers(meta, m1act=0.0))
    assert run.alarms() == []


def test_a_softmax_over_many_is_flat_in_health() -> None:
    meta = chain(4, activation="Softmax")
    run = Run(meta)
    run.records(60, saturated_fraction=layers(meta, m1act=1.0), gain=layers(meta, m1act=1e-4))
    run.records(60, saturated_fraction=layers(meta, m1=1.0))
    assert run.alarms() == []


def test_what_starves_of_a_dead_layer_is_one_alert_with_it() -> None:
    run = Run(meta := chain(6, activation="ReLU"))
    norms = np.where(np.arange(12) < 6, 0.0, 1.0)
    run.records(14, norms, **dead(meta, name="2act"))
    assert run.only("dead_units").layers == ("2act",)
    assert run.sent[0][0] == 10


def test_a_layer_that_dies_of_what_starves_it_is_one_alert_with_that() -> None:
    run = Run(meta := chain(6, activation="ReLU"))
    norms = np.where(np.arange(12) < 8, 1e-8, 1.0)
    run.records(14, norms, **dead(meta, 0.1, 0.5, name="3act"))
    run.records(14, norms, **dead(meta, name="3act"))
    run.only("vanishing_gradient")


def test_a_layer_that_died_between_two_looks_takes_the_place_of_what_it_starves() -> None:
    run = Run(meta := chain(6, activation="ReLU"))
    healthy(run, 64)
    run.records(9)
    run.record(**dead(meta, 0.1, 0.5, name="3act"))
    starved = np.where(np.arange(12) < 8, 0.0, 1.0)
    run.records(4)
    run.records(6, starved)  # dies at 78, is looked at again at 84
    run.records(14, starved, **dead(meta, 0.1, name="3act"))
    alert = run.only("dead_units")
    assert (alert.step, alert.layers) == (78, ("3act",))
    assert [a.rule for _, a in run.sent] == ["zero_gradient", "dead_units"]


def test_a_layer_found_dead_is_the_cause_of_a_fall_that_began_after_the_last_look_at_it() -> None:
    run = Run(meta := chain(6, activation="ReLU"))
    healthy(run, 70)
    starved = np.where(np.arange(12) < 8, 1e-8, 1.0)
    run.records(9, loss=0.01)
    run.records(1, starved, loss=0.01)
    run.records(9, starved, **dead(meta, 0.1, name="3act"), loss=0.01)
    assert run.rules() == ["dead_units"]
    run.records(10, starved, **dead(meta, 0.1, name="3act"))
    run.only("dead_units")


@pytest.mark.parametrize(
    ("weight", "rules"),
    [
        pytest.param(0.0, ["dead_units"], id="given zeros"),
        pytest.param(1e-8, ["dead_units", "vanishing_gradient"], id="starved by something else"),
    ],
)
def test_the_layer_right_behind_a_dead_one_has_nothing_to_learn_from(weight: float, rules: list[str]) -> None:
    # A normalisation behind it leaves its bias without a gradient too.
    run = Run(meta := chain(6, activation="ReLU"))
    norms = np.where(np.arange(12) < 6, 0.0, 1.0)
    norms[6:8] = weight, 1e-8
    run.records(14, norms, **dead(meta, name="2act"))
    assert sorted(run.rules()) == rules


def test_a_fall_that_reaches_beyond_a_dead_layer_stands_by_itself() -> None:
    run = Run(meta := chain(8, activation="ReLU"))
    run.records(14, np.where(np.arange(16) < 12, 1e-8, 1.0), **dead(meta, name="1act"))
    assert sorted(run.rules()) == ["dead_units", "vanishing_gradient"]


# -- saturated activations ---------------------------------------------------------------------------------------------------------


def saturated(meta: Meta, share: float = 0.94, gain: float = 0.12, name: str = "1act") -> dict[str, Any]:
    return {"saturated_fraction": layers(meta, **{f"m{name}": share}), "gain": layers(meta, **{f"m{name}": gain})}


def test_one_that_begins_saturated_is_told_at_update_10_whatever_the_loss_does() -> None:
    run = Run(meta := chain(4, activation="Tanh"))
    for i in range(10):
        run.record(loss=1.0 - 0.05 * i, **saturated(meta))
    alert = run.only("saturated_activation")
    assert (alert.severity, alert.step, alert.layers, run.sent[0][0]) == (Severity.WARNING, 0, ("1act",), 10)
    assert alert.message == "94% of the outputs of 1act lie where it is flat, and 0.12 of the gradient passes"
    assert "weights" in alert.cause


def test_large_inputs_are_the_cause_where_there_are_some() -> None:
    run = Run(meta := chain(4, activation="Tanh"))
    run.records(10, input_std=20.0, **saturated(meta, name="0act"))
    assert "standard deviation of 20" in run.only("saturated_activation").cause


def test_one_that_saturates_at_once_is_told_within_ten_updates() -> None:
    run = Run(meta := chain(4, activation="Tanh"))
    healthy(run, 20, loss=1.0)
    for i in range(8):
        run.record(loss=0.5 - 0.01 * i, **saturated(meta))
    assert (run.only("saturated_activation").step, run.sent[0][0]) == (20, 28)


def test_one_that_passes_nothing_is_told_however_it_came_to() -> None:
    run = Run(meta := chain(4, activation="Tanh"))
    for i in range(60):
        share = min(1.0, i / 40)
        run.record(loss=1.0 / (1 + 0.1 * i), **saturated(meta, share, 1.0 - share))
    assert run.only("saturated_activation").step > 0


def test_one_that_explains_why_nothing_is_learned_is_told() -> None:
    run = Run(meta := chain(4, activation="Tanh"))
    for i in range(60):
        run.record(**saturated(meta, min(0.97, i / 40), 0.1))
    assert run.rules() == ["saturated_activation"]


@pytest.mark.parametrize("final", [0.0, 0.3])
def test_one_that_saturates_while_the_network_learns_is_none(final: float) -> None:
    """Adam at 0.1 drives tanh layers to 97 % within two updates, and the loss to a third."""
    run = Run(meta := chain(4, activation="Tanh"))
    for i in range(60):
        share = 0.0 if i == 0 else 0.97
        run.record(loss=final + (1 - final) * 0.9**i, **saturated(meta, share, 0.1))
    assert run.alarms() == []


@pytest.mark.parametrize(
    ("share", "gain"),
    [pytest.param(0.69, 0.2, id="not so many"), pytest.param(0.9, 0.5, id="the gradient passes")],
)
def test_activations_that_are_half_saturated_are_none(share: float, gain: float) -> None:
    run = Run(meta := chain(4, activation="Tanh"))
    run.records(60, **saturated(meta, share, gain))
    assert run.alarms() == []


@pytest.mark.parametrize("activation", ["ReLU", "Softmax", "GELU", "Softplus"])
def test_other_activations_are_none(activation: str) -> None:
    run = Run(meta := chain(4, activation=activation))
    run.records(60, **saturated(meta))
    assert run.alarms() == []


def test_what_rectifies_is_not_judged_as_one_that_is_flat_at_both_ends() -> None:
    run = Run(meta := chain(4, activation="Tanh"))
    run.records(20, dead_fraction=layers(meta, m1act=0.0), **saturated(meta))
    assert run.alarms() == []
    assert run.notices == []


def test_the_last_activation_is_an_output() -> None:
    meta = chain(4, activation="Tanh")
    facts = (*meta.layers, replace(meta.layers[2], name="out"))
    run = Run(meta := replace(meta, layers=facts))
    run.records(60, **saturated(meta, name="out"))
    assert run.alarms() == []


def test_what_ends_a_generator_is_an_output_though_a_critic_follows() -> None:
    meta = change(chain(4, activation="Tanh"), lambda f: f.layer in ("2", "3"), owner="Adam#1")
    run = Run(meta)
    run.records(60, **saturated(meta))
    assert run.alarms() == []


@pytest.mark.parametrize(("gain", "alarms"), [(0.6, ["saturated_activation"]), (100.0, [])], ids=["in a chain", "a closed gate"])
def test_a_sigmoid_beside_another_way_for_the_gradient_is_a_gate(gain: float, alarms: list[str]) -> None:
    run = Run(meta := chain(4, activation="Sigmoid"))
    columns = saturated(meta, 0.9, 0.01)
    columns["gain"] = np.fmax(columns["gain"], layers(meta, m1=gain))
    run.records(12, **columns)
    assert run.rules() == alarms


def test_a_gate_that_reads_the_data_beside_another_branch_is_one() -> None:
    meta = chain(4, activation="Sigmoid")
    facts = tuple(replace(f, role="input") if f.name in ("0", "1") else f for f in meta.layers)
    run = Run(meta := replace(meta, layers=facts))
    run.records(20, **saturated(meta, 0.9, 0.01, name="0act"))
    assert run.alarms() == []


def test_a_function_is_judged_if_it_is_known_what_it_is() -> None:
    meta = chain(4)
    run = Run(meta)
    run.records(20, **saturated(meta, gain=0.6, name="1"))
    assert run.alarms() == []
    known = replace(meta, layers=tuple(replace(f, flat="two-sided") if f.name == "1" else f for f in meta.layers))
    run = Run(known)
    run.records(20, **saturated(known, gain=0.6, name="1"))
    alert = run.only("saturated_activation")
    assert alert.layers == ("1",)
    assert "of the gradient" not in alert.message


def test_a_low_loss_has_nothing_to_learn() -> None:
    run = Run(meta := chain(4, activation="Tanh"))
    healthy(run, 12)
    run.records(60, loss=0.01, **saturated(meta, 1.0, 0.0))
    assert run.alarms() == []


def test_what_starves_of_a_saturated_layer_is_one_alert_with_it() -> None:
    run = Run(meta := chain(6, activation="Tanh"))
    run.records(14, np.where(np.arange(12) < 6, 1e-9, 1.0), **saturated(meta, 1.0, 0.0, name="2act"))
    assert run.only("saturated_activation").layers == ("2act",)


def test_a_large_network_all_of_which_is_sick_is_one_alert() -> None:
    run = Run(meta := chain(1500, width=4, activation="Tanh"))
    flat = np.array([np.nan if fact.activation is None else 0.95 for fact in meta.layers], np.float32)
    run.records(12, saturated_fraction=flat, gain=np.where(np.isnan(flat), np.nan, 0.1))
    alert = run.only("saturated_activation")
    assert (alert.layers[0], len(alert.layers), alert.step) == ("0act", 1499, 0)


def test_a_replay_says_the_same() -> None:
    run = Run(meta := chain(6, activation="Tanh"))
    healthy(run, 20)
    run.records(20, **saturated(meta, 1.0, 0.0, name="2act"))
    assert said_in_replay(run.history) == run.incidents.alerts


def test_a_gate_that_weighs_nothing_for_now_is_not_dead_while_the_rest_learns() -> None:
    meta = chain(4, activation="ReLU")
    meta = replace(meta, layers=tuple(replace(f, type="Gate", activation=None) if f.name == "1act" else f for f in meta.layers))
    run = Run(meta)
    columns = {"activation_rms": layers(meta, m1act=0.0), "gain": layers(meta, m1act=0.0), "delta_norm": layers(meta, m1act=1.0)}
    for i in range(24):
        run.record(loss=0.95**i, **columns)
    assert run.alarms() == []
