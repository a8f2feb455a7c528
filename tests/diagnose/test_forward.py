"""NaN and Inf on the way forward: the first module that put it out, or the batch, and masks that do no harm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradwatch.history import LayerFact, Meta, ParameterFact
from gradwatch.records import Severity, SkipReason
from tests.diagnose.runs import Run, chain, skipped


def bad(meta: Meta, *names: str) -> dict[str, Any]:
    """A record in which some modules put out NaN, the others numbers."""
    at = [fact.name for fact in meta.layers]
    counts = np.zeros(len(at))
    counts[[at.index(name) for name in names]] = 3
    return {"activation_nonfinite": counts, "calls": np.ones(len(at))}


SPOILT: dict[str, Any] = {"norms": np.nan, "grad_nonfinite": 5.0, "grad_state": 9, "weight_norm": 5.0, "loss": np.nan}


def good(run: Run, records: int) -> None:
    run.records(records, **bad(run.history.meta))


def test_the_first_module_that_went_bad_is_named_and_all_else_is_one_alert_with_it() -> None:
    run = Run(meta := chain(6, activation="ReLU"))
    good(run, 7)
    run.record(**bad(meta, "", "2", "2act", "3", "3act", "4", "4act", "5"), **SPOILT)
    run.record(**bad(meta, *(fact.name for fact in meta.layers)), **SPOILT)
    alert = run.only("non_finite_activation")
    assert (alert.severity, alert.step, alert.layers, alert.count) == (Severity.ERROR, 7, ("2",), 2)
    assert alert.message == "the output of 2 holds NaN or Inf, that of 1act before it is finite"
    assert "In 2, or right before it" in alert.cause


def blocks(ranks: tuple[int, ...] = (0, 2, 4)) -> Meta:
    """Blocks "a", "b", "c" of one Linear and an activation each, executed in the order of `ranks`."""
    meta = chain(3)
    rank = dict(zip("abc", ranks, strict=True))
    parameters = tuple(
        replace(f, name=f"{'abc'[i // 2]}.fc.{f.name[2:]}", layer=f"{'abc'[i // 2]}.fc", order=rank["abc"[i // 2]] + i % 2)
        for i, f in enumerate(meta.parameters)
    )
    facts = [LayerFact("", "Net", "container")]
    for name in "abc":
        facts.append(LayerFact(name, "Block", "container"))
        facts.append(LayerFact(f"{name}.fc", "Linear", "linear", rank[name]))
        facts.append(LayerFact(f"{name}.act", "ReLU", "activation", activation="ReLU"))
    return Meta(parameters, tuple(facts))


@pytest.mark.parametrize(
    ("names", "first"),
    [
        pytest.param(("", "b", "b.fc", "b.act", "c", "c.fc", "c.act"), "b.fc", id="inside a block"),
        pytest.param(("", "b", "c", "c.fc", "c.act"), "b", id="in a block's own code, at its end"),
        pytest.param(("",), "", id="in the model's own code, at its end"),
    ],
)
def test_the_innermost_is_named_and_a_container_if_nothing_in_it_went_bad(names: tuple[str, ...], first: str) -> None:
    run = Run(meta := blocks())
    good(run, 3)
    run.record(**bad(meta, *names), **SPOILT)
    assert run.only("non_finite_activation").layers == (first,)


def test_the_order_is_that_of_execution_and_not_of_registration() -> None:
    run = Run(meta := blocks((4, 2, 0)))  # c, b, a
    good(run, 3)
    run.record(**bad(meta, "", "b", "b.act", "a", "a.fc", "a.act"), **SPOILT)
    alert = run.only("non_finite_activation")
    assert alert.layers == ("b.act",)
    assert "that of b.fc before it" in alert.message


def test_an_activation_registered_first_and_called_later_is_not_named_for_what_it_was_given() -> None:
    order = ["fc", "act", "out", ""]
    layers = (
        LayerFact("", "Net", "container", run=3),
        LayerFact("act", "GELU", "activation", activation="GELU", run=order.index("act")),
        LayerFact("fc", "Linear", "linear", 0, run=order.index("fc")),
        LayerFact("out", "Linear", "linear", 2, run=order.index("out")),
    )
    parameters = tuple(ParameterFact(f"{name}.w", name, (8, 8), owner="SGD#0", order=o) for name, o in (("fc", 0), ("out", 2)))
    run = Run(meta := Meta(parameters, layers))
    good(run, 3)
    run.record(**bad(meta, *order), **SPOILT)
    assert run.only("non_finite_activation").layers == ("fc",)


def test_in_an_mlp_that_registers_its_activation_last_the_activation_is_named_before_the_projection() -> None:
    order = ["c_fc", "act", "c_proj", ""]
    layers = tuple(
        LayerFact(name, kind=kind, order=rank, run=order.index(name))
        for name, kind, rank in (
            ("", "container", None),
            ("c_fc", "linear", 0),
            ("c_proj", "linear", 2),
            ("act", "activation", None),
        )
    )
    parameters = tuple(ParameterFact(f"{name}.w", name, (8, 8), owner="SGD#0", order=o) for name, o in (("c_fc", 0), ("c_proj", 2)))
    run = Run(meta := Meta(parameters, layers))
    good(run, 3)
    run.record(**bad(meta, "act", "c_proj", ""), **SPOILT)
    alert = run.only("non_finite_activation")
    assert alert.layers == ("act",)
    assert "that of c_fc before it" in alert.message


def test_an_activation_called_in_many_places_is_named_only_if_nothing_else_can_be() -> None:
    meta = chain(3)
    meta = replace(meta, layers=(meta.layers[0], LayerFact("act", "ReLU", "activation", activation="ReLU"), *meta.layers[1:]))
    columns = bad(meta, "", "act", "1", "2")
    columns["calls"][1] = 2
    run = Run(meta)
    good(run, 3)
    run.record(**columns, **SPOILT)
    assert run.only("non_finite_activation").layers == ("1",)


def test_a_mask_of_inf_that_harms_nothing_is_no_alarm_and_not_the_cause_of_what_comes_later() -> None:
    run = Run(meta := chain(4))
    run.records(20, **bad(meta, "1"))
    (note,) = run.incidents.alerts
    assert (note.rule, note.severity, note.layers) == ("non_finite_activation", Severity.INFO, ("1",))
    run.record(**bad(meta, "", "1", "2", "3"), **SPOILT)
    alert = run.only("non_finite_activation")
    assert (alert.layers, alert.step) == (("2",), 20)
    assert [a.severity for a in run.incidents.alerts] == [Severity.INFO, Severity.ERROR]


def test_behind_a_mask_that_harms_nothing_a_bad_gradient_is_told_under_its_own_name() -> None:
    run = Run(meta := chain(4))
    run.records(20, **bad(meta, "1"))
    run.record(**bad(meta, "1"), norms=np.nan, grad_nonfinite=5.0, grad_state=9, weight_norm=5.0)
    assert run.rules() == ["non_finite_gradient"]


def test_an_overflow_that_a_scaler_skips_is_none_unless_the_loss_is_bad() -> None:
    run = Run(meta := chain(4))
    scaled = {"norms": np.inf, "noise": 0.0, "grad_nonfinite": 3.0} | skipped(SkipReason.SCALER)
    run.records(5, **bad(meta, "2", "3", ""), **scaled)
    assert run.incidents.alerts == ()
    run.record(**bad(meta, "2", "3", ""), **scaled, loss=np.inf)
    assert run.only("non_finite_activation").layers == ("2",)


def test_updates_that_were_not_looked_at_are_none() -> None:
    run = Run(chain(4))
    run.records(30)
    assert run.incidents.alerts == ()


def test_where_it_was_not_looked_at_when_it_happened_the_gradient_is_the_first_to_tell() -> None:
    run = Run(meta := chain(4))
    run.records(5)
    run.record(norms=np.nan, grad_nonfinite=5.0, grad_state=9, weight_norm=np.nan)
    run.record(**bad(meta, *(fact.name for fact in meta.layers)), **(SPOILT | {"weight_norm": np.nan}))
    assert run.only("non_finite_gradient").step == 5


# -- first seen in a look that comes after it ---------------------------------------------------------------------------------------

UNSTEPPED = SPOILT | skipped(SkipReason.NO_STEP)
"""A record whose loss is NaN and that leaves the weights as they are."""


@pytest.mark.parametrize(
    ("spoilt", "first"),
    [
        pytest.param(UNSTEPPED, "non_finite_loss", id="loss"),
        pytest.param(UNSTEPPED | {"loss": 1.0}, "non_finite_gradient", id="gradient"),
    ],
)
def test_a_look_that_comes_later_says_where_it_was_born_as_long_as_the_weights_are_finite(
    spoilt: dict[str, Any], first: str
) -> None:
    run = Run(meta := chain(6, activation="ReLU"))
    good(run, 64)
    run.records(3)
    run.record(**spoilt)
    assert run.rules() == [first]
    run.record(**bad(meta, "2act", "3", "3act", "4", "4act", "5", ""), **spoilt)
    run.record(**bad(meta, "2act", "3", "3act", "4", "4act", "5", ""), **spoilt)
    alert = run.only("non_finite_activation")
    assert (alert.layers, alert.parameters, alert.step, alert.count) == (("2act",), (), 67, 3)
    assert alert.message == "the output of 2act holds NaN or Inf, that of 2 before it is finite"
    assert "In 2act" in alert.cause
    assert [(n, a.rule, a.state) for n, a in run.sent] == [(68, first, "open"), (69, "non_finite_activation", "open")]


def test_a_bad_batch_that_a_later_look_finds_is_the_cause_whatever_has_become_of_the_weights() -> None:
    run = Run(meta := chain(4))
    good(run, 64)
    run.records(3)
    run.record(**SPOILT)
    everywhere = bad(meta, *(fact.name for fact in meta.layers))
    run.record(**everywhere, **(SPOILT | {"weight_norm": np.nan}), input_nonfinite=2.0)
    alert = run.only("non_finite_input")
    assert (alert.layers, alert.step, alert.count) == (("",), 67, 2)


def test_a_look_that_found_all_modules_finite_before_a_bad_loss_leaves_it_to_the_loss() -> None:
    run = Run(meta := chain(4))
    good(run, 64)
    run.records(3)
    run.record(**UNSTEPPED)
    run.record(**bad(meta), **UNSTEPPED)
    run.record(**bad(meta, "2", "3", ""), **UNSTEPPED)
    assert run.only("non_finite_loss").step == 67


def test_missing_values_that_were_there_before_are_not_where_a_loss_went_bad() -> None:
    run = Run(meta := chain(4))
    run.records(64, **bad(meta), input_nonfinite=4.0)
    run.records(3)
    run.record(**UNSTEPPED)
    run.record(**bad(meta), **UNSTEPPED, input_nonfinite=4.0)
    assert "non_finite_loss" in run.rules()


# -- the input ---------------------------------------------------------------------------------------------------------------------


def test_a_bad_batch_is_the_cause_of_everything_it_spoils() -> None:
    run = Run(meta := chain(4))
    good(run, 5)
    run.record(**bad(meta, *(fact.name for fact in meta.layers)), **SPOILT, input_nonfinite=2.0)
    alert = run.only("non_finite_input")
    assert (alert.severity, alert.step, alert.layers) == (Severity.ERROR, 5, ("",))
    assert "batch" in alert.cause


def test_of_several_models_the_one_that_was_given_it_is_named() -> None:
    one, other = chain(2, prefix="g."), chain(2, prefix="d.")
    roots = (LayerFact("g", "Sequential", "container"), LayerFact("d", "Sequential", "container"))
    meta = Meta(one.parameters + other.parameters, (roots[0], *one.layers[1:], roots[1], *other.layers[1:]))
    run = Run(meta)
    good(run, 5)
    run.record(**bad(meta, "d", "d.0", "d.1"), **SPOILT, input_nonfinite=2.0)
    assert run.only("non_finite_input").layers == ("d",)


def test_missing_values_that_the_model_knows_of_are_no_alarm() -> None:
    run = Run(meta := chain(4))
    run.records(30, **bad(meta), input_nonfinite=4.0)
    assert run.alarms() == []
    assert [a.severity for a in run.incidents.alerts] == [Severity.INFO]
