"""Gradients that arrive and are exactly zero, and zeros that are healthy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradwatch.diagnose.rules import zero_gradient
from gradwatch.history import LayerFact, Meta, ParameterFact
from gradwatch.records import GradState, Severity, SkipReason
from tests.diagnose.runs import STEPPED, Run, chain, change, skipped


def norms(meta: Meta, *zero: str, others: float = 1.0) -> Any:
    """Zero for the parameters of some layers, and for parameters that are named themselves."""
    return np.array([0.0 if f.layer in zero or f.name in zero else others for f in meta.parameters])


def zeros(run: Run, n: int, *zero: str, others: float = 1.0, **columns: Any) -> None:
    run.records(n, norms(run.history.meta, *zero, others=others), noise=0.0, **columns)


def test_layers_before_a_cut_are_told_at_update_10_the_next_to_it_first() -> None:
    run = Run(chain(4))
    zeros(run, 12, "0", "1", others=0.25)
    alert = run.only("zero_gradient")
    assert (alert.severity, alert.step, run.sent[0][0]) == (Severity.WARNING, 0, 10)
    assert (alert.layers, alert.parameters) == (("1", "0"), ("1.bias", "1.weight", "0.bias", "0.weight"))
    assert alert.message == "the gradient is exactly zero in 2 of 4 layers, 0.25 at 2"
    assert alert.evidence == {"layers": 2.0, "layers_in_all": 4.0, "grad_norm": 0.0, "reference_norm": 0.25, "clamped": 0.0}
    assert alert.cause.startswith("Behind 1 stands something whose derivative is exactly 0: round, sign")
    assert alert.remedy.startswith("Use a smooth stand-in or a straight-through estimator")


def test_a_loss_that_does_not_depend_on_the_output_is_told_as_that() -> None:
    run = Run(chain(4))
    zeros(run, 12, "0", "1", "2", "3")
    alert = run.only("zero_gradient")
    assert alert.layers == ("",)
    assert alert.message == "the gradient is exactly zero in 4 of 4 layers"
    assert alert.evidence["reference_norm"] == 0.0
    assert alert.cause.startswith("As far as a derivative can tell the loss does not depend on any weight")
    assert alert.remedy.startswith("Look in the loss and behind the last layer")


def test_a_cut_that_comes_at_update_20_is_told_within_10() -> None:
    run = Run(chain(4))
    run.records(20, 0.25)
    zeros(run, 9, "0")
    assert run.alarms() == []
    zeros(run, 1, "0")
    assert run.only("zero_gradient").step == 20


def test_the_beginning_is_that_of_the_layers_that_are_zero_now() -> None:
    run = Run(chain(4), [zero_gradient])
    zeros(run, 15, "2")
    zeros(run, 15, "0", "1")
    first, second = run.alarms()
    assert (first.layers, first.step, first.last_step) == (("2",), 0, 14)
    assert (second.layers, second.step) == (("1", "0"), 15)


def clamped(*names: str) -> Meta:
    return change(chain(4), lambda f: f.name in names, clamped=True)


def connected(*names: str) -> Meta:
    return change(chain(4), lambda f: f.name in names, connected=True)


def improving(run: Run, n: int, *zero: str) -> None:
    for i in range(n):
        run.record(norms(run.history.meta, *zero), noise=0.0, loss=0.9**i)


@pytest.mark.parametrize(
    ("meta", "zero", "severity"),
    [
        pytest.param(chain(4), ("3",), Severity.INFO, id="a head that may weigh 0 for now"),
        pytest.param(clamped("3.weight", "3.bias"), ("3",), Severity.WARNING, id="a clamped one"),
        pytest.param(clamped("2.bias"), ("2.bias",), Severity.WARNING, id="a vector"),
        pytest.param(connected("3.weight", "3.bias"), ("3",), Severity.WARNING, id="nothing switches it off"),
        pytest.param(connected("2.weight"), ("3",), Severity.INFO, id="another is connected"),
    ],
)
def test_what_has_been_behind_a_clamp_from_the_start_is_told_though_the_rest_learns(
    meta: Meta, zero: tuple[str, ...], severity: Severity
) -> None:
    run = Run(meta, [zero_gradient])
    improving(run, 12, *zero)
    (alert,) = run.incidents.alerts
    assert (alert.rule, alert.severity, alert.layers) == ("zero_gradient", severity, (zero[0][0],))
    if meta.clamped.any():
        assert alert.cause.startswith(f"What {zero[0][0]} gives goes through a clamp, whose derivative is exactly 0")
    if zero == ("2.bias",):
        assert alert.message == "the gradient is exactly zero in 2.bias, 1 at 3"


def test_a_vector_that_is_zero_for_another_reason_is_none() -> None:
    run = Run(chain(4), [zero_gradient])
    improving(run, 12, "2.bias")
    assert run.alarms() == []


def test_a_clamp_that_closes_later_may_be_meant() -> None:
    run = Run(clamped("3.weight", "3.bias"), [zero_gradient])
    improving(run, 10)
    for i in range(12):
        run.record(norms(run.history.meta, "3"), noise=0.0, loss=0.3 * 0.95**i)
    (alert,) = run.incidents.alerts
    assert alert.severity == Severity.INFO


@pytest.mark.parametrize(("records", "told"), [(9, False), (10, True)])
def test_a_block_that_ends_early_is_judged_from_10_updates_on(records: int, told: bool) -> None:
    run = Run(chain(4))
    zeros(run, records, "0", "1")
    run.history.ended = True
    run.judge()
    assert run.rules() == (["zero_gradient"] if told else [])


def test_the_smallest_gradient_there_is_is_not_zero() -> None:
    run = Run(meta := chain(4), [zero_gradient])
    for i in range(40):
        run.record(norms(meta, "0") if i % 10 else np.where(norms(meta, "0") == 0.0, 1e-44, 1.0), noise=0.0)
    assert run.alarms() == []


def test_records_that_do_not_reach_the_layer_do_not_count() -> None:
    run = Run(meta := chain(4), [zero_gradient])
    for i in range(19):
        run.record(norms(meta, "0") if i % 2 == 0 else np.where(norms(meta, "0") == 0.0, np.nan, 1.0), noise=0.0)
    assert (run.sent[0][0], run.only("zero_gradient").step) == (19, 0)


# -- while there is nothing to learn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        pytest.param([0.0] * 12, False, id="exactly zero"),
        pytest.param([0.0] * 2 + [1.0] + [0.0] * 9, True, id="zero, but for one of ten"),
        pytest.param([np.nan] * 12, True, id="not known"),
        pytest.param([-1.0] * 12, True, id="negative"),
    ],
)
def test_a_loss_of_zero_leaves_nothing_to_learn(losses: list[float], told: bool) -> None:
    run = Run(meta := chain(4), [zero_gradient])
    for loss in losses:
        run.record(norms(meta, "0", "1", "2", "3"), noise=0.0, loss=loss)
    assert run.rules() == (["zero_gradient"] if told else [])


@pytest.mark.parametrize(("loss", "told"), [pytest.param(0.049, False, id="low"), pytest.param(0.051, True, id="not low")])
def test_once_the_loss_is_low_zeros_are_healthy(loss: float, told: bool) -> None:
    run = Run(chain(4), [zero_gradient])
    run.records(10)
    zeros(run, 20, "0", loss=loss)
    assert run.rules() == (["zero_gradient"] if told else [])


@pytest.mark.parametrize(
    ("zero", "loss", "severity"),
    [
        pytest.param("3", lambda i: 0.97**i, Severity.INFO, id="something before it learns"),
        pytest.param("3", lambda i: 1.0, Severity.WARNING, id="nothing is learnt"),
        pytest.param("0", lambda i: 0.97**i, Severity.WARNING, id="nothing lies before it"),
    ],
)
def test_what_is_cut_off_at_its_own_end_while_the_rest_learns_may_be_meant_so(zero: str, loss: Any, severity: Severity) -> None:
    run = Run(meta := chain(4), [zero_gradient])
    for i in range(30):
        run.record(norms(meta, zero), noise=0.0, loss=loss(i))
    run.incidents = Run(meta, [zero_gradient]).incidents
    run.record(norms(meta, zero), noise=0.0, loss=loss(30))
    (alert,) = run.incidents.alerts
    assert alert.severity == severity


# -- what waits to be filled -------------------------------------------------------------------------------------------------------


def filled(meta: Meta, name: str, norm: float) -> Any:
    return np.array([norm if f.name == name else 5.0 for f in meta.parameters])


def test_what_lies_before_a_matrix_of_zeros_waits_until_that_is_filled() -> None:
    run = Run(meta := change(chain(4), lambda f: f.name == "2.weight", init_rms=0.0))
    zeros(run, 30, "0", "1", weight_norm=filled(meta, "2.weight", 0.0))
    assert run.alarms() == []
    zeros(run, 1, "0", "1", weight_norm=filled(meta, "2.weight", 1e-6))
    assert run.only("zero_gradient").layers == ("1", "0")


@pytest.mark.parametrize(
    ("blank", "zero", "layers"),
    [
        pytest.param("0.weight", ("1",), ("1",), id="it lies before"),
        pytest.param("1.weight", ("0", "1"), ("1", "0"), id="it gets no gradient itself"),
    ],
)
def test_a_matrix_of_zeros_that_explains_nothing(blank: str, zero: tuple[str, ...], layers: tuple[str, ...]) -> None:
    run = Run(meta := change(chain(4), lambda f: f.name == blank, init_rms=0.0), [zero_gradient])
    zeros(run, 12, *zero, weight_norm=filled(meta, blank, 0.0))
    assert run.only("zero_gradient").layers == layers


def test_a_matrix_that_came_to_be_zero_is_not_filled_again() -> None:
    run = Run(meta := chain(4), [zero_gradient])
    zeros(run, 12, "0", weight_norm=filled(meta, "2.weight", 0.0))
    assert run.rules() == ["zero_gradient"]


# -- one of equals, and attention to one -------------------------------------------------------------------------------------------


def listed(name: str, equals: int = 3) -> Meta:
    """Equals in a list, then a head."""
    members = tuple(f"{name}.{i}" for i in range(equals))
    layers = (LayerFact(""), LayerFact(name, "ModuleList", "list"), *(LayerFact(n, "Linear", "linear") for n in (*members, "head")))
    return Meta(
        tuple(
            ParameterFact(f"{n}.weight", n, (8, 8), owner="SGD#0", init_rms=0.1, order=i) for i, n in enumerate((*members, "head"))
        ),
        layers,
    )


@pytest.mark.parametrize(
    ("name", "zero", "told"),
    [
        pytest.param("branches", (0,), False, id="a branch beside others"),
        pytest.param("branches", (0, 1), False, id="all branches but one"),
        pytest.param("branches", (0, 1, 2), True, id="all branches"),
        pytest.param("experts", (0, 1, 2), False, id="all experts"),
    ],
)
def test_one_of_a_list_of_equals_may_idle(name: str, zero: tuple[int, ...], told: bool) -> None:
    run = Run(listed(name), [zero_gradient])
    zeros(run, 30, *(f"{name}.{i}" for i in zero), others=0.25)
    assert run.rules() == (["zero_gradient"] if told else [])


def test_an_expert_that_is_alone_is_one_of_no_equals() -> None:
    run = Run(listed("experts", 1), [zero_gradient])
    zeros(run, 12, "experts.0")
    assert run.only("zero_gradient").layers == ("experts.0",)


def attention(kind: str = "MultiheadAttention") -> Meta:
    names = ("stem", "a.q", "a.k", "a.v", "head")
    layers = (LayerFact(""), LayerFact("a", kind), *(LayerFact(n, "Linear", "linear") for n in names))
    return Meta(
        tuple(ParameterFact(f"{n}.weight", n, (8, 8), owner="SGD#0", init_rms=0.1, order=i) for i, n in enumerate(names)), layers
    )


@pytest.mark.parametrize(
    ("kind", "zero", "told"),
    [
        pytest.param("MultiheadAttention", ("a.q", "a.k"), False, id="a softmax over one key"),
        pytest.param("GPT2Attn", ("a.q", "a.k"), False, id="by another name"),
        pytest.param("MultiheadAttention", ("a.q", "a.k", "a.v"), True, id="no value gets one either"),
        pytest.param("Block", ("a.q", "a.k"), True, id="no attention"),
        pytest.param("MultiheadAttention", ("head",), True, id="outside of it"),
    ],
)
def test_queries_and_keys_of_an_attention_to_one_are_healthy(kind: str, zero: tuple[str, ...], told: bool) -> None:
    run = Run(attention(kind), [zero_gradient])
    zeros(run, 30, *zero, others=0.25)
    assert run.rules() == (["zero_gradient"] if told else [])


# -- whole layers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", ["1.bias", "1.weight"])
def test_a_part_of_a_layer_whose_other_part_gets_a_gradient_is_none(zero: str) -> None:
    run = Run(chain(4), [zero_gradient])
    zeros(run, 30, zero)
    assert run.alarms() == []


def test_a_module_of_vectors_only_is_none() -> None:
    run = Run(change(chain(4), lambda f: f.layer == "1", shape=(64,)), [zero_gradient])
    zeros(run, 30, "1")
    assert run.alarms() == []


def test_modules_of_vectors_are_named_beside_a_matrix_and_not_counted() -> None:
    run = Run(change(chain(4), lambda f: f.layer == "1", shape=(64,)), [zero_gradient])
    zeros(run, 30, "0", "1")
    alert = run.only("zero_gradient")
    assert alert.layers == ("0",)
    assert alert.message.startswith("the gradient is exactly zero in 1 of 3 layers")


@pytest.mark.parametrize(
    ("meta", "bias"),
    [
        pytest.param(change(chain(4), lambda f: f.name == "1.bias", trainable=False), np.nan, id="frozen"),
        pytest.param(chain(4), np.nan, id="not reached"),
    ],
)
def test_a_layer_is_judged_by_the_parameters_that_are_reached(meta: Meta, bias: float) -> None:
    run = Run(meta, [zero_gradient])
    values = norms(meta, "1.weight")
    values[3] = bias
    run.records(12, values, noise=0.0)
    assert run.only("zero_gradient").parameters == ("1.weight",)


def test_of_a_layer_whose_matrix_is_not_reached_nothing_is_said() -> None:
    run = Run(meta := chain(4), [zero_gradient])
    values = norms(meta, "1", "2.bias")
    values[4] = np.nan
    run.records(12, values, noise=0.0)
    assert run.only("zero_gradient").parameters == ("1.bias", "1.weight")


def test_only_what_the_last_record_reached_is_named() -> None:
    run = Run(chain(4), [zero_gradient])
    for i in range(20):
        values = np.array([0.0, 0.0, np.nan, np.nan, 1.0, 1.0, 1.0, 1.0])
        run.record(values if i % 2 == 0 else values[[2, 2, 0, 0, 4, 4, 4, 4]], noise=0.0)
    assert [(alert.layers, alert.count) for alert in run.alarms()] == [(("0",), 1), (("1",), 1)]


# -- the end of a fall -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "told"), [pytest.param(0.98e-30, False, id="underflow"), pytest.param(1.02e-30, True, id="a cut")]
)
def test_the_end_of_a_fall_by_underflow_is_none(norm: float, told: bool) -> None:
    run = Run(meta := chain(4), [zero_gradient])
    values = norms(meta, "0", "1")
    values[4:6] = norm, norm / 10
    run.records(12, values, noise=0.0)
    assert run.rules() == (["zero_gradient"] if told else [])


def test_the_end_of_a_fall_is_told_as_vanishing() -> None:
    run = Run(chain(10))
    run.records(15, np.repeat(np.where(np.arange(10) < 2, 0.0, 10.0 ** (5.0 * np.arange(-9, 1))), 2), noise=0.0)
    assert run.rules() == ["vanishing_gradient"]


def test_the_reference_is_the_largest_gradient_of_the_next_layer_that_gets_one() -> None:
    run = Run(meta := chain(4), [zero_gradient])
    values = norms(meta, "0")
    values[2:] = 0.1, 0.3, 5.0, 5.0, 5.0, 5.0
    run.records(12, values, noise=0.0)
    alert = run.only("zero_gradient")
    assert alert.message.endswith(", 0.3 at 1")
    assert alert.evidence["reference_norm"] == pytest.approx(0.3)


def test_the_reference_lies_behind_the_cut_and_gets_a_gradient() -> None:
    run = Run(meta := chain(4), [zero_gradient])
    values = norms(meta, "1")
    values[:2], values[4:6], values[6:] = 7.0, np.nan, 0.25
    run.records(12, values, noise=0.0)
    assert run.only("zero_gradient").message.endswith(", 0.25 at 3")


def test_a_parameter_of_the_root_is_called_the_model() -> None:
    meta = Meta((*chain(2).parameters, ParameterFact("out", "", (8, 8), owner="SGD#0", order=9)), chain(2).layers)
    run = Run(meta, [zero_gradient])
    zeros(run, 12, "0", "1")
    assert run.only("zero_gradient").message.endswith("in 2 of 3 layers, 1 at (model)")


# -- records that say nothing, and incidents ---------------------------------------------------------------------------------------


def test_skipped_records_are_no_evidence() -> None:
    run = Run(chain(4), [zero_gradient])
    zeros(run, 30, "0", **skipped(SkipReason.SCALER))
    zeros(run, 9, "0")
    zeros(run, 5, "0", **skipped(SkipReason.SCALER))
    assert run.alarms() == []
    zeros(run, 1, "0")
    assert run.rules() == ["zero_gradient"]
    zeros(run, 5, "0", **skipped(SkipReason.SCALER))
    assert run.only("zero_gradient").count == 1


@pytest.mark.parametrize(
    "facts", [pytest.param({"order": None}, id="unknown to the graph"), pytest.param({"trainable": False}, id="frozen")]
)
def test_parameters_without_a_place_are_ignored(facts: dict[str, Any]) -> None:
    run = Run(change(chain(4), lambda f: f.layer == "1", **facts), [zero_gradient])
    zeros(run, 30, "1")
    assert run.alarms() == []


def test_it_is_one_incident_that_grows_and_ends() -> None:
    run = Run(chain(5))
    zeros(run, 20, "1")
    zeros(run, 20, "1", "2")
    alert = run.only("zero_gradient")
    assert (alert.layers, alert.step, alert.count) == (("2", "1"), 0, 31)
    run.records(20)
    alert = run.only("zero_gradient")
    assert (alert.state, alert.last_step) == ("ended", 39)
    assert [a.state for _, a in run.sent] == ["open", "ended"]


def test_late_in_a_run_it_is_told_within_13_records() -> None:
    run = Run(chain(4))
    run.records(200)
    zeros(run, 13, "0")
    assert run.only("zero_gradient").step == 200


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_numbers_elsewhere_do_not_upset_it(bad: float) -> None:
    run = Run(meta := chain(4), [zero_gradient])
    values = norms(meta, "0")
    values[4:] = bad
    run.records(12, values, noise=0.0, weight_norm=bad, loss=bad, total_norm=1.0)
    assert run.notices == []
    assert run.only("zero_gradient").layers == ("0",)


def test_one_parameter_without_role_or_layers_is_told() -> None:
    run = Run(Meta((ParameterFact("weight", "", (8, 8), owner="SGD#0", order=0),), ()), [zero_gradient])
    run.judge()
    run.records(12, 0.0, noise=0.0)
    assert run.notices == []
    assert run.only("zero_gradient").message == "the gradient is exactly zero in 1 of 1 layers"


def test_where_others_step_it_needs_no_step_of_its_own() -> None:
    run = Run(meta := chain(4), [zero_gradient])
    state = np.where(norms(meta, "0") == 0.0, np.uint8(GradState.REACHED), np.uint8(STEPPED)).astype(np.uint8)
    zeros(run, 12, "0", grad_state=state)
    assert run.rules() == ["zero_gradient"]


def test_where_the_beginning_is_not_looked_back_to_it_is_the_first_record_that_is() -> None:
    run = Run(chain(2), [])
    zeros(run, 100, "0")
    assert next(iter(zero_gradient(run.history))).step == 100 - 64
    run = Run(chain(2), [])
    zeros(run, 65, "0")
    assert next(iter(zero_gradient(run.history))).step == 1


def test_no_parameters_at_all_are_none() -> None:
    run = Run(replace(chain(2), parameters=()), [zero_gradient])
    run.records(12)
    assert run.notices == []


@pytest.mark.parametrize("loss", [1.0, 0.5], ids=["stuck", "improving"])
def test_matrices_that_lose_their_gradient_while_their_biases_keep_it_are_cut_off(loss: float) -> None:
    run = Run(chain(4), [zero_gradient])
    run.records(12)
    zeros(run, 9, "0.weight", "1.weight", loss=loss)
    assert run.alarms() == []
    zeros(run, 1, "0.weight", "1.weight", loss=loss)
    alert = run.only("zero_gradient")
    assert (alert.severity, alert.step, alert.parameters) == (Severity.WARNING, 12, ("1.weight", "0.weight"))


def test_a_matrix_that_never_had_a_gradient_beside_a_bias_that_has_is_given_zeros() -> None:
    run = Run(chain(4), [zero_gradient])
    zeros(run, 20, "0.weight")
    assert run.alarms() == []
