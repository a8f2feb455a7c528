"""One fault, one incident: what is sent, when, and under which name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gradwatch.diagnose.advice import _WORDS
from gradwatch.diagnose.incidents import Incidents
from gradwatch.diagnose.rules import Rule, default_rules, persistent
from gradwatch.diagnose.rules.rule import TURNS, is_turn
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
    run.record(40.0)
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
