"""One fault, one incident: what is sent, when, and under which name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradwatch.diagnose.advice import _WORDS
from gradwatch.diagnose.causes import CAUSES, POISON, RANK
from gradwatch.diagnose.incidents import Incidents
from gradwatch.diagnose.rules import Rule, default_rules, persistent
from gradwatch.diagnose.rules.rule import TURNS, is_turn, name_of
from gradwatch.history import History
from gradwatch.records import Alert, Finding, Severity
from tests.diagnose.runs import Run, chain, change, said_in_replay


def at(steps: dict[int, Finding | list[Finding]], persistence: int = 2) -> Rule:
    """A rule that yields what is written down for the number of records closed."""

    @persistent(persistence)
    def rule(history: History) -> Iterator[Finding]:
        found = steps.get(history.recorded, [])
        yield from found if isinstance(found, list) else [found]

    return rule


def finding(rule: str = "symptom", severity: Severity = Severity.WARNING, step: int = 0, **fields: Any) -> Finding:
    return Finding(rule, severity, step, **fields)


def test_a_finding_opens_an_incident_that_is_sent_once_and_extended_silently() -> None:
    run = Run(chain(3), [at({n: finding(layers=("1",)) for n in range(2, 6)})])
    run.records(5)
    assert [(n, a.state, a.count) for n, a in run.sent] == [(2, "open", 1)]
    alert = run.only("symptom")
    assert (alert.count, alert.last_step, alert.step) == (4, 4, 0)


def test_an_incident_ends_after_twice_the_persistence_without_evidence() -> None:
    run = Run(chain(3), [at({3: finding(layers=("1",))}, persistence=2)])
    run.records(6)
    assert run.alarms()[0].state == "open"
    run.record()
    assert [(n, a.state) for n, a in run.sent] == [(3, "open"), (7, "ended")]
    assert run.alarms()[0].last_step == 2


def test_evidence_after_the_end_is_a_new_incident() -> None:
    run = Run(chain(3), [at({1: finding(), 9: finding()}, persistence=1)])
    run.records(9)
    assert [a.state for a in run.alarms()] == ["ended", "open"]


def test_a_rise_in_severity_is_sent_and_a_fall_is_not() -> None:
    steps = {1: finding(), 2: finding(severity=Severity.ERROR), 3: finding(severity=Severity.INFO)}
    run = Run(chain(3), [at(steps)])
    run.records(3)
    assert [(n, a.severity) for n, a in run.sent] == [(1, Severity.WARNING), (2, Severity.ERROR)]
    assert run.alarms()[0].severity == Severity.ERROR


def test_a_sick_set_that_grows_by_a_layer_a_step_is_one_incident() -> None:
    meta = chain(40)
    names = [f.name for f in meta.parameters]
    run = Run(meta, [at({n: finding(parameters=tuple(names[: 2 * n])) for n in range(1, 30)})])
    run.records(29)
    alert = run.only("symptom")
    assert alert.count == 29
    assert alert.layers == tuple(str(i) for i in range(29))


def test_the_same_rule_elsewhere_is_another_incident() -> None:
    run = Run(chain(6), [at({1: [finding(layers=("0",)), finding(layers=("5",))], 2: finding(layers=("5",))})])
    run.records(2)
    assert [(a.layers, a.count) for a in run.alarms()] == [(("0",), 1), (("5",), 2)]


def test_a_consequence_is_folded_under_its_cause_whatever_the_order_of_the_rules() -> None:
    rules = [
        at({1: finding("vanishing_gradient", layers=("2",)), 2: finding("vanishing_gradient", layers=("2",))}),
        at({1: finding("saturated_activation", layers=("2",))}),
    ]
    run = Run(chain(4), rules)
    run.records(2)
    assert run.only("saturated_activation").count == 2


@pytest.mark.parametrize(
    ("layers", "step"),
    [pytest.param(("3",), 1, id="elsewhere"), pytest.param(("2",), 0, id="earlier than the cause")],
)
def test_what_the_cause_cannot_explain_stands_by_itself(layers: tuple[str, ...], step: int) -> None:
    rules = [
        at({2: finding("saturated_activation", step=1, layers=("2",))}),
        at({2: finding("vanishing_gradient", step=step, layers=layers)}),
    ]
    run = Run(chain(4), rules)
    run.records(2)
    assert run.rules() == ["saturated_activation", "vanishing_gradient"]


def test_a_cause_that_is_known_later_takes_the_place_of_a_consequence_that_began_with_it() -> None:
    rules = [
        at({2: finding("vanishing_gradient", step=1, layers=("2",))}, 10),
        at({6: finding("saturated_activation", step=1, layers=("2",))}, 10),
    ]
    run = Run(chain(4), rules)
    run.records(6)
    assert run.only("saturated_activation").state == "open"
    assert [a.rule for _, a in run.sent] == ["vanishing_gradient", "saturated_activation"]


@pytest.mark.parametrize(
    ("rule", "step"),
    [pytest.param("vanishing_gradient", 4, id="began at another time"), pytest.param("gradient_spike", 1, id="was an event")],
)
def test_other_consequences_keep_their_place(rule: str, step: int) -> None:
    rules = [
        at({5: finding(rule, step=step, layers=("2",))}, 10),
        at({6: finding("exploding_gradient", step=1, layers=("2",))}, 10),
    ]
    run = Run(chain(4), rules)
    run.records(6)
    assert run.rules() == [rule, "exploding_gradient"]


# -- what is a consequence of what -------------------------------------------------------------------------------------------------


def both(cause: Finding, consequence: Finding) -> list[str]:
    """The alarms of two findings that are made after the same record, whichever rule is asked first."""
    orders = []
    for findings in ([cause, consequence], [consequence, cause]):
        run = Run(chain(4), [at({9: each, 10: each}, 10) for each in findings])
        run.records(10)
        orders.append(run.rules())
    assert sorted(orders[0]) == sorted(orders[1])
    return orders[0]


def test_every_rule_has_a_rank_but_those_of_the_loop() -> None:
    names = {name_of(rule) for rule in default_rules()}
    assert set(RANK) <= names
    assert names - set(RANK) == {"never_stepped", "missing_gradient", "not_in_optimizer", "loss_scale_collapse"}


@pytest.mark.parametrize(
    ("other", "told"),
    [
        pytest.param(finding("missing_gradient", layers=("1",)), ["missing_gradient"], id="a fault of the loop"),
        pytest.param(finding("a_users_rule", layers=("1",)), ["a_users_rule"], id="a user's rule"),
        pytest.param(finding("zero_gradient", step=5, layers=("1",)), ["zero_gradient"], id="one that began later"),
        pytest.param(finding("loss_scale_collapse"), ["loss_scale_collapse"], id="one without layers"),
        pytest.param(finding("vanishing_gradient", Severity.INFO, layers=("1",)), ["loss_plateau"], id="not an information"),
    ],
)
def test_a_plateau_is_what_every_open_alarm_looks_like(other: Finding, told: list[str]) -> None:
    run = Run(
        chain(4), [at(dict.fromkeys(range(8, 11), other), 10), at({9: finding("loss_plateau"), 10: finding("loss_plateau")}, 10)]
    )
    run.records(10)
    assert run.rules() == told


def test_a_plateau_after_the_end_of_an_alarm_stands_by_itself_and_extends_itself() -> None:
    run = Run(
        chain(4), [at({1: finding("zero_gradient", layers=("1",))}, 1), at({n: finding("loss_plateau") for n in range(5, 9)}, 10)]
    )
    run.records(8)
    assert [(a.rule, a.state, a.count) for a in run.alarms()] == [("zero_gradient", "ended", 1), ("loss_plateau", "open", 4)]


def test_a_plateau_that_was_told_first_stays() -> None:
    run = Run(
        chain(4), [at({3: finding("loss_plateau"), 9: finding("loss_plateau")}, 10), at({6: finding("missing_gradient")}, 10)]
    )
    run.records(9)
    assert [(a.rule, a.count) for a in run.alarms()] == [("loss_plateau", 1), ("missing_gradient", 2)]


@pytest.mark.parametrize(
    ("rule", "step", "folded"),
    [
        pytest.param("update_ratio_too_large", 5, True, id="at the same step"),
        pytest.param("update_ratio_too_small", 4, False, id="a step before, which shows in the next record"),
        pytest.param("zero_gradient", 5, True, id="another rule at the same step"),
        pytest.param("zero_gradient", 4, False, id="another rule a step before"),
    ],
)
def test_what_begins_later_is_a_consequence(rule: str, step: int, folded: bool) -> None:
    told = both(finding("exploding_gradient", step=5, layers=("",)), finding(rule, step=step, layers=("",)))
    assert told == (["exploding_gradient"] if folded else ["exploding_gradient", rule])


@pytest.mark.parametrize(("step", "folded"), [(5, True), (4, True), (3, False)])
def test_a_step_shows_in_the_next_record(step: int, folded: bool) -> None:
    told = both(finding("vanishing_gradient", step=5, layers=("",)), finding("update_ratio_too_small", step=step, layers=("",)))
    assert told == (["vanishing_gradient"] if folded else ["vanishing_gradient", "update_ratio_too_small"])


def test_steps_that_replace_the_weights_make_them_explode() -> None:
    steps = finding("update_ratio_too_large", step=4, layers=("",))
    assert both(finding("exploding_gradient", step=5, layers=("",)), steps) == ["update_ratio_too_large"]
    growing = finding("exploding_gradient", step=5, layers=("",), evidence={"growing": 1.0})
    assert both(growing, steps) == ["exploding_gradient", "update_ratio_too_large"]


@pytest.mark.parametrize(
    ("cause", "consequence", "folded"),
    [
        pytest.param("exploding_gradient", "vanishing_gradient", True, id="one end explodes, the other is small beside it"),
        pytest.param("exploding_gradient", "zero_gradient", False, id="nothing is zero for that"),
        pytest.param("vanishing_gradient", "zero_gradient", False, id="elsewhere"),
        pytest.param("double_softmax", "vanishing_gradient", False, id="a softmax at the end"),
    ],
)
def test_what_explains_something_elsewhere(cause: str, consequence: str, folded: bool) -> None:
    told = both(finding(cause, layers=("0",)), finding(consequence, layers=("3",)))
    assert told == ([cause] if folded else [cause, consequence])


def test_vanishing_before_something_explodes_elsewhere_stands_by_itself() -> None:
    told = both(finding("exploding_gradient", step=5, layers=("0",)), finding("vanishing_gradient", step=4, layers=("3",)))
    assert told == ["exploding_gradient", "vanishing_gradient"]


AFTER_THE_START = [name for names in CAUSES[CAUSES.index(("poor_init",)) + 1 :] for name in names]


@pytest.mark.parametrize("rule", AFTER_THE_START)
@pytest.mark.parametrize("cause", ["poor_init", "unnormalized_input"])
def test_what_is_wrong_from_the_start_explains_what_comes_of_it_anywhere(cause: str, rule: str) -> None:
    layers = () if rule.startswith("loss_") else ("0",)
    assert both(finding(cause, layers=("3",)), finding(rule, step=4, layers=layers)) == [cause]


@pytest.mark.parametrize(
    "rule", ["missing_gradient", "not_in_optimizer", "never_stepped", "loss_scale_collapse", "gradients_not_zeroed"]
)
@pytest.mark.parametrize("cause", ["poor_init", "unnormalized_input", "update_ratio_too_large"])
def test_faults_of_the_loop_are_no_consequences(cause: str, rule: str) -> None:
    assert sorted(both(finding(cause, layers=("3",)), finding(rule, step=4, layers=("0",)))) == sorted([cause, rule])


def test_an_init_is_told_under_the_inputs_where_both_name_the_same() -> None:
    assert both(finding("unnormalized_input", layers=("",)), finding("poor_init", layers=("3",))) == ["unnormalized_input"]


def later(cause: Finding, *before: Finding, told: int = 12, persistence: int = 10) -> Run:
    """Some findings are told after 10 records, what explains them `told` records later."""
    run = Run(chain(4), [at({10: list(before)}, 10), at({10 + told: cause}, persistence)])
    run.records(10 + told)
    return run


@pytest.mark.parametrize("rule", [name for name in AFTER_THE_START if not name.endswith("_spike")])
@pytest.mark.parametrize("cause", ["poor_init", "unnormalized_input"])
def test_what_is_wrong_from_the_start_takes_the_place_of_what_was_told_before(cause: str, rule: str) -> None:
    layers = () if rule.startswith("loss_") else ("0",)
    run = later(finding(cause, layers=("3",)), finding(rule, step=4, layers=layers))
    alert = run.only(cause)
    assert (alert.step, alert.count, alert.state) == (0, 1, "open")
    assert [(n, a.rule) for n, a in run.sent] == [(10, rule), (22, cause)]


MOST = finding("poor_init", layers=("3",), evidence={"most": 1.0})
DEEP = finding("exploding_gradient", layers=("0",))
GROWS = replace(DEEP, evidence={"growing": 1.0})


def test_where_the_gradient_explodes_by_the_weights_most_began_with_that_is_the_name() -> None:
    assert both(MOST, DEEP) == ["exploding_gradient"]
    assert both(finding("poor_init", layers=("3",)), DEEP) == ["poor_init"], "a few matrices explain it"
    assert both(MOST, GROWS) == ["poor_init"], "it grows in time"
    assert later(MOST, DEEP, told=40).rules() == ["exploding_gradient"], "also where that has ended"


@pytest.mark.parametrize("cause", [finding("update_ratio_too_large", layers=("",)), replace(GROWS, layers=("",))])
def test_a_loss_that_is_gone_is_told_beside_what_made_it_so_whichever_is_seen_first(cause: Finding) -> None:
    gone = finding("loss_diverging", step=4)
    assert both(cause, gone) == [cause.rule, "loss_diverging"]
    assert later(cause, gone).rules() == ["loss_diverging", cause.rule]
    assert later(gone, cause).rules() == [cause.rule, "loss_diverging"]


def test_it_takes_the_place_of_the_first_and_the_others_go() -> None:
    spike, vanishing, zero = (finding(f"{name}_gradient", layers=("0",)) for name in ("missing", "vanishing", "zero"))
    before = [replace(vanishing, step=2), replace(zero, step=3, layers=("2",)), finding("loss_diverging", step=1), spike]
    run = later(finding("poor_init", step=3, layers=("3",)), *before)
    assert [(a.rule, a.step) for a in run.alarms()] == [("poor_init", 2), ("loss_diverging", 1), ("missing_gradient", 0)]


@pytest.mark.parametrize(
    ("cause", "other"),
    [
        pytest.param(finding("poor_init", layers=("3",)), finding("gradient_spike", layers=("0",)), id="an event"),
        pytest.param(finding("poor_init", layers=("3",)), finding("loss_spike"), id="an event of the loss"),
        pytest.param(finding("poor_init", layers=("3",)), finding("missing_gradient", layers=("3",)), id="a fault of the loop"),
        pytest.param(finding("poor_init", layers=("3",)), finding("double_softmax", layers=("0",)), id="a cause"),
        pytest.param(
            finding("poor_init", step=6, layers=("3",)), finding("zero_gradient", step=4, layers=("3",)), id="began before"
        ),
        pytest.param(
            finding("exploding_gradient", layers=("3",)), finding("zero_gradient", step=4, layers=("3",)), id="not of the start"
        ),
        pytest.param(
            finding("exploding_gradient", layers=("3",)), finding("loss_diverging"), id="not of the start, without layers"
        ),
        pytest.param(finding("non_finite_loss"), finding("loss_diverging"), id="a value that is not finite"),
    ],
)
def test_what_is_told_later_does_not_take_every_place(cause: Finding, other: Finding) -> None:
    assert later(cause, other).rules() == [other.rule, cause.rule]


@pytest.mark.parametrize(("told", "persistence", "taken"), [(19, 10, True), (10, 5, True), (11, 5, False)])
def test_what_was_last_seen_long_ago_is_another_matter(told: int, persistence: int, taken: bool) -> None:
    run = later(finding("poor_init", layers=("3",)), finding("zero_gradient", layers=("0",)), told=told, persistence=persistence)
    assert run.rules() == (["poor_init"] if taken else ["zero_gradient", "poor_init"])


@pytest.mark.parametrize(
    ("cause", "consequence", "folded"),
    [
        pytest.param("update_ratio_too_large", finding("vanishing_gradient", step=2, layers=("1",)), True, id="vanishing"),
        pytest.param("update_ratio_too_large", finding("zero_gradient", step=4, layers=("1",)), True, id="zero"),
        pytest.param("update_ratio_too_large", finding("vanishing_gradient", step=0, layers=("1",)), False, id="before it"),
        pytest.param("update_ratio_too_large", finding("exploding_gradient", step=4, layers=("1",)), True, id="exploding"),
        pytest.param(
            "update_ratio_too_large",
            finding("exploding_gradient", step=4, layers=("1",), evidence={"growing": 1.0}),
            False,
            id="growing in time",
        ),
        pytest.param("update_ratio_too_large", finding("dead_units", step=4, layers=("1",)), False, id="dead"),
        pytest.param("update_ratio_too_small", finding("vanishing_gradient", step=4, layers=("1",)), False, id="too small"),
        pytest.param("frozen_weights", finding("zero_gradient", step=4, layers=("1",)), False, id="frozen"),
    ],
)
def test_steps_that_replace_the_weights_starve_layers_afterwards(cause: str, consequence: Finding, folded: bool) -> None:
    run = Run(chain(4), [at({n: finding(cause, step=2, layers=("",)) for n in range(3, 7)}, 10), at({6: consequence}, 10)])
    run.records(6)
    assert run.rules() == ([cause] if folded else [cause, consequence.rule])


def test_steps_of_another_optimizer_starve_nothing() -> None:
    cause, starved = finding("update_ratio_too_large", step=2, layers=("0",)), finding("zero_gradient", step=4, layers=("2",))
    run = Run(chain(4), [at(dict.fromkeys(range(3, 7), cause), 10), at({6: starved}, 10)])
    run.records(6)
    assert run.rules() == ["update_ratio_too_large", "zero_gradient"]


def test_bad_values_explain_the_course_of_the_loss() -> None:
    for rule in ("loss_diverging", "loss_spike"):
        for cause in sorted(POISON):
            assert both(finding(cause, Severity.ERROR), finding(rule)) == [cause]


def test_a_consequence_changes_nothing_of_what_is_told_of_its_cause() -> None:
    cause = finding("exploding_gradient", Severity.ERROR, step=3, parameters=("2.weight",), message="it grows", evidence={"a": 1.0})
    other = finding("vanishing_gradient", Severity.ERROR, step=4, parameters=("0.weight",), message="it falls", evidence={"b": 1.0})
    run = Run(chain(4), [at({5: cause}, 10), at({6: other, 7: other}, 10)])
    run.records(5)
    before = run.only("exploding_gradient")
    run.records(2)
    assert run.only("exploding_gradient") == replace(before, count=3, last_step=6)


def test_words_are_found_again_where_the_severity_rises() -> None:
    kept = finding("frozen_weights", Severity.INFO, layers=("1",), evidence={"lr": 0.1})
    run = Run(chain(4), [at({1: kept, 2: replace(kept, severity=Severity.WARNING, evidence={"lr": 0.0})}, 10)])
    run.records(2)
    assert run.only("frozen_weights").cause.startswith("Their learning rate is 0")


@pytest.mark.parametrize(("first", "step"), [(Severity.WARNING, 3), (Severity.INFO, 5)])
def test_a_bad_value_that_rises_is_told_where_it_began_but_for_what_did_no_harm(first: Severity, step: int) -> None:
    bad = finding("non_finite_gradient", first, 3, parameters=("1.weight",))
    run = Run(chain(4), [at({1: bad, 2: replace(bad, severity=Severity.ERROR, step=5)})])
    run.records(2)
    alert = run.only("non_finite_gradient")
    assert (alert.severity, alert.step) == (Severity.ERROR, step)


def test_a_finding_that_names_parameters_is_the_more_exact_one() -> None:
    modules, exact = finding(layers=("1", "2")), finding(parameters=("1.weight",))
    run = Run(chain(4), [at({1: modules, 2: exact, 3: modules}, 10)])
    run.records(3)
    alert = run.only("symptom")
    assert (alert.layers, alert.parameters) == (("1",), ("1.weight",))


# The same with the rules themselves.


def test_a_run_of_raw_inputs_that_diverges_is_one_alarm_about_its_inputs() -> None:
    run = Run(meta := chain(4))
    rms = np.array([1.0, 0.625 * 100.0, 1.0, 1.0, 1.0])
    for i in range(20):
        run.record(loss=1.0 if i < 3 else 100.0, input_mean=0.0, input_std=100.0, activation_rms=rms, update_ratio=0.5)
    assert meta.layers[0].name == ""
    alert = run.only("unnormalized_input")
    assert (alert.step, alert.layers) == (0, ("",))
    assert {a.rule for n, a in run.sent if n < 14} == {"update_ratio_too_large", "loss_diverging"} & {a.rule for _, a in run.sent}


def test_steps_too_large_of_which_layers_die_are_one_alarm() -> None:
    run = Run(chain(4))
    run.records(16, update_ratio=1.0)
    run.records(15, np.repeat([0.0, 0.0, 1.0, 1.0], 2), update_ratio=1.0, noise=0.0)
    alert = run.only("update_ratio_too_large")
    assert (alert.step, alert.count) == (0, 18)


def test_layers_without_a_gradient_explain_why_a_classifier_stays_a_guess() -> None:
    run = Run(replace(chain(4), criterion="cross_entropy", guess=1.0))
    run.records(120, np.repeat([0.0, 0.0, 1.0, 1.0], 2), noise=0.0)
    assert run.only("zero_gradient").count == 111


def test_a_bad_gradient_that_poisons_weights_and_loss_stays_one_incident_with_its_first_place() -> None:
    run = Run(chain(4))
    run.records(12)
    bad = np.zeros(8)
    bad[:2] = 3
    run.record(np.where(bad > 0, np.nan, 1.0), grad_nonfinite=bad, grad_state=9, weight_norm=5.0)
    run.record(np.nan, grad_nonfinite=5.0, grad_state=9, loss=np.nan, weight_norm=np.array([np.nan] * 2 + [1.0] * 6))
    run.record(np.nan, grad_nonfinite=5.0, grad_state=9, loss=np.nan, weight_norm=np.nan)
    alert = run.only("non_finite_gradient")
    assert (alert.step, alert.layers, alert.count, alert.last_step) == (12, ("0",), 3, 14)


def test_a_rule_that_raises_is_reported_once_and_switched_off_while_the_others_go_on() -> None:
    def broken(history: History) -> Iterator[Finding]:
        raise KeyError("no such thing")
        yield

    run = Run(chain(2), [broken, at({2: finding(), 3: finding()})])
    run.records(3)
    assert len(run.notices) == 1
    assert "broken" in run.notices[0]
    assert "no such thing" in run.notices[0]
    assert run.only("symptom").count == 2


def test_an_interrupt_inside_a_rule_belongs_to_the_user() -> None:
    def interrupted(history: History) -> Iterator[Finding]:
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        Run(chain(2), [interrupted]).record()


def test_a_rule_that_yields_anything_else_is_told_what_it_yielded() -> None:
    run = Run(chain(2), [lambda history: ["a string"]])  # type: ignore[list-item]
    run.record()
    assert "a rule yields Finding, got str" in run.notices[0]


def test_evidence_is_made_of_finite_floats() -> None:
    run = Run(chain(2), [at({1: finding(evidence={"a": 1, "b": math.nan, "c": math.inf, "d": np.float32(2)})})])
    run.record()
    evidence = run.alarms()[0].evidence
    assert dict(evidence) == {"a": 1.0, "d": 2.0}
    assert all(type(v) is float for v in evidence.values())


def test_out_of_scope_names_go_and_a_finding_left_with_none_goes_too() -> None:
    meta = change(chain(4), lambda f: f.layer in ("0", "1"), in_scope=False)
    names = [f.name for f in meta.parameters]
    run = Run(
        meta, [at({1: finding("a", parameters=tuple(names[:6])), 2: finding("b", parameters=tuple(names[:4])), 3: finding("c")})]
    )
    run.records(3)
    assert [(a.rule, a.layers) for a in run.alarms()] == [("a", ("2",)), ("c", ())]


def test_a_finding_of_modules_out_of_scope_goes_too() -> None:
    meta = chain(4)
    meta = replace(meta, layers=tuple(replace(f, in_scope=f.name != "1") for f in meta.layers))
    run = Run(meta, [at({1: finding("a", layers=("1",)), 2: finding("b", layers=("1", "2"))})])
    run.records(2)
    assert [(a.rule, a.layers) for a in run.alarms()] == [("b", ("2",))]


def test_judging_again_without_a_new_record_does_not_count_twice() -> None:
    run = Run(chain(2), [at({3: finding()})])
    run.records(3)
    run.history.ended = True
    run.judge()
    assert run.alarms()[0].count == 1


def test_a_run_without_a_single_record_can_be_judged() -> None:
    run = Run(chain(2), [at({0: finding()})])
    run.judge()
    alert = run.only("symptom")
    assert (alert.count, alert.step, alert.last_step) == (1, 0, 0)
    default = Run(chain(2))
    default.history.ended = True
    assert default.judge() == ()


def test_an_information_is_kept_and_is_no_alarm() -> None:
    run = Run(chain(2), [at({1: finding(severity=Severity.INFO)})])
    run.record()
    assert run.alarms() == []
    assert [a.severity for a in run.incidents.alerts] == [Severity.INFO]


def _vanish(run: Run, n: int) -> None:
    run.records(n, np.repeat(10.0 ** np.linspace(-8, 0, 10), 2))


def test_a_resumed_run_goes_on_exactly_as_if_it_had_not_stopped() -> None:
    whole, first = Run(chain(10)), Run(chain(10))
    _vanish(whole, 30)
    _vanish(first, 17)
    second = Run(chain(10))
    second.history = History.from_state_dict(first.history.state_dict())
    second.incidents.load_state_dict(first.incidents.state_dict())
    second._noise = first._noise
    _vanish(second, 13)
    assert second.incidents.alerts == whole.incidents.alerts
    assert second.history.baselines.state_dict().keys() == whole.history.baselines.state_dict().keys()


def test_a_replay_says_what_was_said_live() -> None:
    run = Run(chain(10))
    run.records(12)
    run.record(40.0, loss=40.0)
    run.records(5)
    _vanish(run, 12)
    run.history.ended = True
    run.judge()
    assert [a.rule for a in run.incidents.alerts] == ["gradient_spike", "vanishing_gradient"]
    assert said_in_replay(run.history) == run.incidents.alerts


def test_alerts_are_told_with_cause_and_remedy() -> None:
    run = Run(chain(10, activation="Sigmoid"))
    _vanish(run, 12)
    alert = run.only("vanishing_gradient")
    assert "quarter" in alert.cause
    assert "ReLU" in alert.remedy


@pytest.mark.parametrize("rule", sorted(_WORDS))
def test_a_users_rule_may_take_the_name_of_one_of_ours(rule: str) -> None:
    run = Run(chain(3), [at({1: finding(rule, layers=("1",)), 2: finding(rule)})])
    run.records(2)
    assert run.notices == []
    assert run.incidents.alerts[0].remedy


def test_incidents_keep_the_order_in_which_they_opened() -> None:
    run = Run(chain(6), [at({1: finding("b", layers=("1",)), 2: finding("a", layers=("2",))})])
    run.records(2)
    alerts = run.incidents.alerts
    assert isinstance(alerts, tuple)
    assert [a.rule for a in alerts] == ["b", "a"]
    assert all(isinstance(a, Alert) for a in alerts)


def test_turns_are_never_far_apart_and_see_every_part_of_a_loop_that_repeats_itself() -> None:
    turns = np.flatnonzero([is_turn(n) for n in range(64, 64 + 330)])
    assert np.diff(turns).max() <= TURNS
    assert turns[0] < TURNS
    for period in range(2, 9):
        assert len(set((turns % period).tolist())) == period


def test_no_rules_say_nothing() -> None:
    incidents = Incidents((), notice=lambda text: None)
    assert incidents.judge(History(chain(2))) == ()
    assert len(default_rules()) == 25


def test_a_rule_may_return_nothing_and_name_one_layer_by_its_name() -> None:
    def simple(history: History) -> list[Finding] | None:
        if history.recorded < 3:
            return None
        return [Finding("simple", Severity.WARNING, 2, layers="0", message="so")]  # type: ignore[arg-type]

    run = Run(chain(4), rules=[simple])
    run.records(5)
    assert [alert.layers for alert in run.alarms()] == [("0",)]


def test_weights_that_a_clip_leaves_where_they_are_beside_an_explosion_are_its_doing() -> None:
    assert both(finding("exploding_gradient", layers=("0",)), finding("frozen_weights", layers=("3",))) == ["exploding_gradient"]


@pytest.mark.parametrize(("step", "folded"), [(6, True), (5, False)])
def test_units_that_block_once_the_weights_have_grown_without_bound_are_that(step: int, folded: bool) -> None:
    cause = finding("exploding_gradient", step=5, layers=("",), evidence={"growing": 1.0})
    run = Run(chain(4), [at(dict.fromkeys(range(7, 10), cause), 10), at({9: finding("dead_units", step=step, layers=("1",))}, 10)])
    run.records(9)
    assert run.rules() == (["exploding_gradient"] if folded else ["dead_units"])


def test_of_two_models_that_tear_each_other_along_the_first_to_grow_is_named_first() -> None:
    first = finding("exploding_gradient", layers=("1",), evidence={"growing": 1.0})
    then = finding("exploding_gradient", layers=("2",), evidence={"growing": 1.0})
    run = Run(chain(4), [at({3: first, 4: then}, 10)])
    run.records(5)
    assert run.only("exploding_gradient").layers == ("1", "2")
