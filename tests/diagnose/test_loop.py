"""Faults of the loop: gradients kept, steps never made, parameters forgotten; and what only looks like them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradwatch.diagnose.rules import gradients_not_zeroed, missing_gradient, never_stepped, not_in_optimizer
from gradwatch.history import LayerFact, Meta, ParameterFact, Pending
from gradwatch.records import GradState, Severity, SkipReason
from tests.diagnose.runs import STEPPED, Run, chain, change, skipped

STALE = np.uint8(STEPPED | GradState.STALE)


# -- gradients_not_zeroed ----------------------------------------------------------------------------------------------------------


def test_gradients_that_are_never_cleared_are_an_error_from_update_0() -> None:
    run = Run(chain(3))
    run.record()
    run.records(12, grad_state=STALE)
    alert = run.only("gradients_not_zeroed")
    assert (alert.severity, alert.step, alert.layers) == (Severity.ERROR, 0, ("",))
    assert run.sent[0][0] <= 7


def test_gradients_kept_from_update_20_on_are_told_within_10() -> None:
    run = Run(chain(3))
    run.records(20)
    run.records(10, grad_state=STALE)
    assert run.sent[0][0] <= 30
    assert run.only("gradients_not_zeroed").step == 20


def test_a_loop_that_clears_every_second_update_is_told() -> None:
    run = Run(chain(3))
    for i in range(14):
        run.record(grad_state=STALE if i % 2 else np.uint8(STEPPED))
    assert run.rules() == ["gradients_not_zeroed"]


def test_a_forgotten_clear_now_and_then_is_none() -> None:
    run = Run(chain(3))
    for i in range(60):
        run.record(grad_state=STALE if i % 5 == 4 else np.uint8(STEPPED))
    assert run.alarms() == []


def test_only_the_module_that_keeps_its_gradients_is_named() -> None:
    run = Run(chain(3))
    state = np.full(6, STEPPED, np.uint8)
    state[2:4] = STALE
    run.record()
    run.records(10, grad_state=state)
    assert run.only("gradients_not_zeroed").layers == ("1",)


# -- never_stepped -----------------------------------------------------------------------------------------------------------------


def test_gradients_cleared_without_a_step_are_told_at_update_10() -> None:
    run = Run(chain(3))
    run.records(12, **skipped(SkipReason.NO_STEP))
    alert = run.only("never_stepped")
    assert (alert.step, alert.layers, alert.parameters, run.sent[0][0]) == (0, (), (), 10)


def test_a_loop_that_paused_after_stepping_is_none() -> None:
    run = Run(chain(3))
    run.records(5)
    run.history.pending = Pending(ever_stepped=True)
    run.records(30, **skipped(SkipReason.NO_STEP))
    assert run.alarms() == []


@pytest.mark.parametrize(
    ("calls", "ended", "told"),
    [
        pytest.param(64, False, True, id="endless"),
        pytest.param(63, False, False, id="a long accumulation"),
        pytest.param(10, True, True, id="the run ends"),
        pytest.param(9, True, False, id="the run ends too early to say"),
    ],
)
def test_an_open_record_without_a_step(calls: int, ended: bool, told: bool) -> None:
    run = Run(chain(3))
    run.history.pending, run.history.ended = Pending(backward_calls=calls), ended
    run.judge()
    assert bool(run.alarms()) is told


def test_an_optimizer_of_another_model_is_named_as_the_cause() -> None:
    run = Run(chain(3))
    run.history.pending = Pending(unowned=10, foreign_steps=10)
    run.judge()
    assert "other parameters" in run.only("never_stepped").cause


def test_a_skipping_scaler_is_no_forgotten_step() -> None:
    run = Run(chain(3))
    run.records(11, **skipped(SkipReason.SCALER), loss_scale=1024.0)
    assert run.alarms() == []


# -- missing_gradient --------------------------------------------------------------------------------------------------------------


def missing(run: Run, n: int, unreached: list[int]) -> None:
    """Records in which the owner steps and some columns are not reached."""
    norms, state = np.ones(len(run.history.parameters)), np.full(len(run.history.parameters), STEPPED, np.uint8)
    norms[unreached], state[unreached] = np.nan, np.uint8(GradState.STEPPED)
    run.records(n, norms, grad_state=state)


def test_a_module_that_no_backward_reaches_is_told_by_update_15() -> None:
    run = Run(chain(4))
    missing(run, 15, [0, 1, 2, 3])
    alert = run.only("missing_gradient")
    assert (alert.severity, alert.step, alert.layers, len(alert.parameters)) == (Severity.WARNING, 0, ("0", "1"), 4)


def test_a_module_cut_off_at_update_20_is_told_within_10() -> None:
    run = Run(chain(4))
    run.records(20)
    missing(run, 10, [0, 1])
    alert = run.only("missing_gradient")
    assert (alert.step, alert.layers) == (20, ("0",))


def test_one_parameter_of_a_module_that_is_reached_is_an_information() -> None:
    run = Run(chain(4))
    missing(run, 40, [1])
    assert run.alarms() == []
    assert [a.severity for a in run.incidents.alerts] == [Severity.INFO]


def test_a_mask_token_beside_modules_that_are_reached_is_an_information() -> None:
    meta = chain(3)
    token = ParameterFact("mask_token", "", (32,), owner="SGD#0")
    run = Run(replace(meta, parameters=(token, *meta.parameters)))
    missing(run, 40, [0])
    assert run.alarms() == []


def test_a_module_that_misses_steps_now_and_then_is_healthy() -> None:
    run = Run(chain(4))
    for i in range(60):
        missing(run, 1, [] if i % 7 == 0 else [2, 3])
    assert run.alarms() == []


def test_a_teacher_that_no_optimizer_owns_is_healthy() -> None:
    run = Run(change(chain(4), lambda f: f.layer in ("0", "1"), owner=None))
    state = np.full(8, STEPPED, np.uint8)
    state[:4] = 0
    run.records(40, np.array([np.nan] * 4 + [1.0] * 4), grad_state=state)
    assert run.alarms() == []


def test_a_frozen_module_is_healthy() -> None:
    run = Run(change(chain(4), lambda f: f.layer == "0", trainable=False))
    missing(run, 40, [0, 1])
    assert run.alarms() == []


def experts(name: str = "experts") -> Meta:
    parameters = [ParameterFact(f"{name}.{i}.weight", f"{name}.{i}", (8, 8), owner="SGD#0") for i in range(4)]
    layers = [
        LayerFact(""),
        LayerFact(name, "ModuleList", "container"),
        *(LayerFact(f"{name}.{i}", "Linear", "linear") for i in range(4)),
    ]
    return Meta(tuple(parameters), tuple(layers))


@pytest.mark.parametrize(
    ("meta", "alarm"),
    [
        pytest.param(experts(), False, id="called an expert"),
        pytest.param(experts("blocks"), True, id="one of blocks that are all used"),
    ],
)
def test_an_idle_one_of_equals(meta: Meta, alarm: bool) -> None:
    run = Run(meta)
    missing(run, 29, [3])
    assert run.alarms() == []
    missing(run, 2, [3])
    assert bool(run.alarms()) is alarm


@pytest.mark.parametrize(("called", "at"), [(2.0, 12), (0.0, 30), (np.nan, 30)])
def test_one_of_equals_that_is_called_and_cut_off_needs_no_longer_than_others(called: float, at: int) -> None:
    run = Run(experts("towers"), [missing_gradient])
    norms, state = np.array([np.nan, 1.0, 1.0, 1.0]), np.array([8, 9, 9, 9], np.uint8)
    calls = np.array([1.0, np.nan, called, 1.0, 1.0, 1.0])
    run.records(31, norms, grad_state=state, calls=calls)
    assert run.only("missing_gradient").layers == ("towers.0",)
    assert run.sent[0][0] == at


def test_an_idle_expert_among_others_that_miss_steps_is_healthy() -> None:
    run = Run(experts("branches"))
    for i in range(50):
        missing(run, 1, [3, i % 3])
    assert run.alarms() == []


def test_a_module_that_is_known_never_to_be_called_is_told_at_update_30_or_at_the_end() -> None:
    run = Run(chain(3))
    calls = np.array([1.0, 0.0, 1.0, 1.0])
    norms, state = np.array([np.nan] * 2 + [1.0] * 4), np.array([8, 8, 9, 9, 9, 9], np.uint8)
    run.records(20, norms, grad_state=state, calls=calls)
    assert run.alarms() == []
    run.history.ended = True
    run.judge()
    alert = run.only("missing_gradient")
    assert alert.layers == ("0",)
    assert alert.message.endswith("for 2 parameters: the modules are never called")
    assert alert.cause == "Nothing in the forward pass calls their modules."


@pytest.mark.parametrize(
    ("calls", "told"),
    [
        pytest.param([1.0, 1.0, 1.0, 1.0], "though the modules are called", id="detached"),
        pytest.param([0.0, 0.0, 1.0, 1.0], "for 2 parameters", id="parts called by hand, where no_grad hides them"),
        pytest.param([np.nan, np.nan, np.nan, np.nan], "for 2 parameters", id="nothing is known"),
    ],
)
def test_a_module_that_may_have_been_called_is_told_by_update_15(calls: list[float], told: str) -> None:
    run = Run(chain(3))
    norms, state = np.array([np.nan] * 2 + [1.0] * 4), np.array([8, 8, 9, 9, 9, 9], np.uint8)
    run.records(15, norms, grad_state=state, calls=np.array(calls))
    alert = run.only("missing_gradient")
    assert alert.message.endswith(told)
    assert "detached" in alert.cause


def forgotten(run: Run, n: int, layers: dict[int, float], **columns: Any) -> None:
    """Records in which some layers of a chain get no gradient, and are called so often."""
    parameters = len(run.history.parameters)
    norms, state = np.ones(parameters), np.full(parameters, STEPPED, np.uint8)
    calls = np.ones(len(run.history.layers))
    for layer, times in layers.items():
        norms[2 * layer : 2 * layer + 2], state[2 * layer : 2 * layer + 2] = np.nan, np.uint8(GradState.STEPPED)
        calls[1 + layer] = times
    run.records(n, norms, **({"grad_state": state, "calls": calls} | columns))


@pytest.mark.parametrize("healthy", [20, 100])
def test_a_module_that_is_not_called_any_more_is_not_told_to_be_detached(healthy: int) -> None:
    run = Run(chain(4))
    forgotten(run, healthy, {})
    forgotten(run, 10, {0: 0.0})
    alert = run.only("missing_gradient")
    assert (alert.step, alert.layers) == (healthy, ("0",))
    assert alert.message == "no gradient any more in 10 steps for 2 parameters: the modules are no longer called"
    assert alert.cause == "Nothing in the forward pass calls their modules any more."
    assert "phases" in alert.remedy
    assert "exclude" in alert.remedy
    assert "leave them out of the model" not in alert.remedy


def test_message_and_cause_stay_those_of_the_onset() -> None:
    run = Run(chain(4))
    forgotten(run, 20, {})
    forgotten(run, 10, {0: 1.0})
    forgotten(run, 60, {0: 0.0})
    alert = run.only("missing_gradient")
    assert alert.message == "no gradient any more in 70 steps for 2 parameters, though the modules are called"
    assert "though their modules run" in alert.cause


def test_of_records_in_which_calls_were_not_looked_at_neither_is_told() -> None:
    run = Run(chain(4))
    forgotten(run, 20, {})
    forgotten(run, 40, {0: 0.0}, calls=np.nan)
    alert = run.only("missing_gradient")
    assert alert.message == "no gradient any more in 40 steps for 2 parameters"
    assert "or never computed" in alert.cause


def test_a_module_that_is_detached_and_another_that_is_not_called_are_two_faults() -> None:
    run = Run(chain(5))
    forgotten(run, 20, {})
    forgotten(run, 40, {0: 1.0, 3: 0.0})
    detached, uncalled = run.alarms()
    assert (detached.layers, uncalled.layers) == (("0",), ("3",))
    assert "though the modules are called" in detached.message
    assert "though their modules run" in detached.cause
    assert "no longer called" in uncalled.message
    assert "Nothing in the forward pass calls" in uncalled.cause


def test_a_module_of_which_parts_are_detached_and_parts_not_called_is_one_fault() -> None:
    parts = chain(2, prefix="encoder.")
    meta = chain(3)
    run = Run(
        Meta(parts.parameters + meta.parameters, (parts.layers[0], LayerFact("encoder"), *parts.layers[1:], *meta.layers[1:]))
    )
    norms, state = np.ones(10), np.full(10, STEPPED, np.uint8)
    run.records(20, norms, grad_state=state, calls=np.ones(7))
    norms[:4], state[:4] = np.nan, np.uint8(GradState.STEPPED)
    run.records(12, norms, grad_state=state, calls=np.array([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]))
    alert = run.only("missing_gradient")
    assert alert.layers == ("encoder",)
    assert alert.message == "no gradient any more in 12 steps for 4 parameters, 2 of them in modules that are not called"
    assert "unused, detached (detach(), no_grad(), .data, .item(), numpy), or never computed" in alert.cause


def test_of_parameters_some_of_which_had_gradients_nothing_is_told_that_holds_for_the_others_only() -> None:
    run = Run(chain(5))
    forgotten(run, 20, {0: 1.0})
    forgotten(run, 20, {0: 1.0, 1: 1.0})
    assert run.only("missing_gradient").message == "no gradient in 20 steps for 4 parameters, though the modules are called"


def test_an_output_projection_that_attention_uses_without_calling_it_counts_as_called_with_it() -> None:
    facts = (LayerFact(""), LayerFact("a", "MultiheadAttention", "attention", 0), LayerFact("a.out", "Linear", "linear", 1))
    parameters = [ParameterFact(f"{layer}.w", layer, (8, 8), owner="SGD#0", order=i) for i, layer in enumerate(("a", "a.out"))]
    run = Run(Meta((*parameters, ParameterFact("w", "", (8, 8), owner="SGD#0", order=2)), facts))
    state = np.array([8, 8, 9], np.uint8)
    run.records(15, np.array([np.nan, np.nan, 1.0]), grad_state=state, calls=np.array([1.0, 1.0, 0.0]))
    assert run.only("missing_gradient").message.endswith("though the modules are called")


# -- not_in_optimizer --------------------------------------------------------------------------------------------------------------


def test_a_module_with_gradients_that_no_optimizer_owns_is_an_error() -> None:
    run = Run(change(chain(4), lambda f: f.layer == "3", owner=None))
    state = np.full(8, STEPPED, np.uint8)
    state[6:] = np.uint8(GradState.REACHED)
    run.records(9, grad_state=state)
    assert run.alarms() == []
    run.record(grad_state=state)
    alert = run.only("not_in_optimizer")
    assert (alert.severity, alert.step, alert.layers, len(alert.parameters)) == (Severity.ERROR, 0, ("3",), 2)


def test_a_loop_without_an_optimizer_is_healthy() -> None:
    run = Run(change(chain(4), lambda f: True, owner=None))
    run.records(40, grad_state=np.uint8(GradState.REACHED | GradState.CHANGED))
    assert run.alarms() == []


def test_a_parameter_whose_optimizer_steps_in_other_records_is_healthy() -> None:
    run = Run(chain(4))
    state = np.full(8, STEPPED, np.uint8)
    state[6:] = np.uint8(GradState.REACHED)
    run.records(40, grad_state=state)
    assert run.alarms() == []


@pytest.mark.parametrize(
    ("reached", "told"),
    [
        pytest.param([i % 2 for i in range(10)], True, id="every other record"),
        pytest.param([1 - i % 2 for i in range(9)], False, id="not yet ten"),
        pytest.param([0] * 5 + [1] * 5, False, id="thawed in the midst"),
        pytest.param([0] * 10 + [i % 2 for i in range(10)], True, id="every other one, later"),
        pytest.param([1] * 9, False, id="all of them, and not yet ten"),
        pytest.param([1] * 10, True, id="ten in a row"),
        pytest.param([int(i % 5 in (0, 2)) for i in range(14)], False, id="four of ten"),
    ],
)
def test_records_that_take_turns_need_not_be_ten(reached: list[int], told: bool) -> None:
    meta = change(chain(3), lambda f: f.layer == "1", owner=None)
    run = Run(meta, [not_in_optimizer])
    others = np.array([f.layer != "1" for f in meta.parameters])
    for each in reached:
        run.record(grad_state=np.where(others, 9, each))
    assert run.rules() == (["not_in_optimizer"] if told else [])


def test_layers_in_a_plain_list_are_an_error_with_shapes_and_without_names() -> None:
    meta = replace(chain(3), outside=((32, 32), (32,)), outside_in_model=("hidden[0].weight", "hidden[0].bias"))
    run = Run(meta)
    run.records(15)
    alert = run.only("not_in_optimizer")
    assert (alert.severity, alert.layers, alert.parameters, alert.evidence["leaves"]) == (Severity.ERROR, (), (), 2)
    assert "32×32" in alert.message
    assert "ModuleList" in alert.remedy


def test_leaves_outside_of_everything_are_an_information() -> None:
    run = Run(replace(chain(3), outside=((64, 3, 3, 3),)))
    run.records(15)
    assert run.alarms() == []
    assert [a.severity for a in run.incidents.alerts] == [Severity.INFO]


@pytest.mark.parametrize(
    ("passes", "foreign", "owned", "told"),
    [(10, 10, False, True), (9, 9, False, False), (10, 0, False, False), (10, 10, True, False)],
)
def test_tensors_that_were_replaced_under_the_optimizer(passes: int, foreign: int, owned: bool, told: bool) -> None:
    run = Run(meta := chain(3), [not_in_optimizer])
    run.records(20)
    if not owned:
        run.history.meta = change(meta, lambda f: True, owner=None)
    run.history.pending = Pending(unowned=passes, foreign_steps=foreign, ever_stepped=True)
    run.judge()
    assert run.rules() == (["not_in_optimizer"] if told else [])
    if told:
        alert = run.only("not_in_optimizer")
        assert (alert.severity, alert.step, len(alert.parameters)) == (Severity.ERROR, 20, 6)
        assert alert.message.startswith("6 parameters got gradients in 10 backward passes")


def test_gradients_that_an_optimizer_never_clears_are_kept_from_its_second_step_on() -> None:
    run = Run(chain(3), [gradients_not_zeroed])
    run.records(25, grad_state=np.array([0, 0, STEPPED, STEPPED, STEPPED, STEPPED], np.uint8))
    run.record()
    run.records(8, grad_state=np.array([STALE, STALE, STEPPED, STEPPED, STEPPED, STEPPED], np.uint8))
    assert run.only("gradients_not_zeroed").step == 26


@pytest.mark.parametrize(("passes", "owned", "told"), [(64, True, True), (63, True, False), (64, False, False)])
def test_a_loop_that_goes_on_with_another_optimizer(passes: int, owned: bool, told: bool) -> None:
    run = Run(meta := chain(3), [never_stepped])
    run.records(20)
    if not owned:
        run.history.meta = change(meta, lambda f: True, owner=None)  # `not_in_optimizer` tells
    run.history.pending = Pending(unowned=passes, foreign_steps=passes, ever_stepped=True)
    run.judge()
    assert run.rules() == (["never_stepped"] if told else [])
