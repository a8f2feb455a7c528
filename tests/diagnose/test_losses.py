"""The course of the loss: what diverges, jumps or stays where it is, and what only looks like it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradwatch.diagnose.rules import loss_diverging, loss_plateau, loss_spike
from gradwatch.diagnose.rules.loss import Progress, has_learnt, progress
from gradwatch.history import Meta
from gradwatch.records import Severity, SkipReason
from tests.diagnose.runs import Run, chain, change, skipped

LOST = {"loss": np.nan, "loss_terms": 0}
"""A record whose loss was not seen."""


def losses(run: Run, values: Iterable[float], **columns: Any) -> None:
    for value in values:
        run.record(loss=value, **columns)


def classifier(guess: float = 2.0, criterion: str = "cross_entropy", **facts: Any) -> Meta:
    return replace(chain(3), criterion=criterion, guess=guess, **facts)


def noisy(n: int, level: float = 1.0, spread: float = 0.05, seed: int = 0) -> list[float]:
    return (level * np.exp(spread * np.random.default_rng(seed).standard_normal(n))).tolist()


def course(run: Run, values: Iterable[float], **columns: Any) -> None:
    """Losses of a run whose updates change a twentieth of the weights."""
    losses(run, values, **({"update_ratio": 0.05} | columns))


# -- loss_diverging ----------------------------------------------------------------------------------------------------------------


def test_a_loss_that_has_risen_tenfold_and_stays_there_is_an_error() -> None:
    run = Run(chain(3))
    course(run, [1.0] * 3 + [20.0] * 12)
    alert = run.only("loss_diverging")
    assert (alert.severity, alert.step, alert.layers, alert.parameters) == (Severity.ERROR, 3, (), ())
    assert run.sent[0][0] == 10
    assert alert.message == "the loss rose from 1 to 20 and stays there"
    assert alert.evidence == {"loss": 20.0, "first_loss": 1.0, "ratio": 20.0}
    assert alert.cause.startswith("Each step makes it worse: the learning rate is too high")
    assert alert.remedy.startswith("Lower the learning rate by 3 to 10 times")


def test_a_run_that_diverges_at_update_20_is_told_within_10() -> None:
    run = Run(chain(3))
    course(run, [1.0] * 20 + [3.0**i for i in range(1, 11)])
    alert = run.only("loss_diverging")
    assert alert.step == 20
    assert run.sent[0][0] <= 26


@pytest.mark.parametrize(("records", "told"), [(9, False), (10, True)])
def test_a_block_that_ends_early_is_judged_from_10_updates_on(records: int, told: bool) -> None:
    run = Run(chain(3), [loss_diverging])
    course(run, [1.0] * 2 + [20.0] * (records - 2))
    run.history.ended = True
    run.judge()
    assert run.rules() == (["loss_diverging"] if told else [])


@pytest.mark.parametrize(
    ("meta", "values", "told"),
    [
        pytest.param(chain(3), [1.0] * 3 + [10.1] * 8, True, id="more than ten times"),
        pytest.param(chain(3), [1.0] * 3 + [9.9] * 30, False, id="less"),
        pytest.param(classifier(2.0), [1.0] * 3 + [4.1] * 8, True, id="twice a guess"),
        pytest.param(classifier(2.0), [1.0] * 3 + [3.9] * 30, False, id="less than twice a guess"),
        pytest.param(classifier(0.5), [1.0] * 3 + [2.1] * 8, True, id="twice a start above a guess"),
        pytest.param(classifier(0.5), [1.0] * 3 + [1.9] * 30, False, id="less than twice the start"),
        pytest.param(classifier(2.0, "mse_loss"), [1.0] * 3 + [9.9] * 30, False, id="of another loss a guess does not matter"),
        pytest.param(chain(3), [1.0] * 20 + [20.0] * 7, True, id="seven of eight"),
        pytest.param(chain(3), [1.0] * 20 + [20.0, 20.0, 1.0] + [20.0] * 5, True, id="seven of eight, with a gap"),
        pytest.param(chain(3), [1.0] * 20 + [20.0] * 6, False, id="six of eight"),
        pytest.param(chain(3), [1.0] * 20 + ([20.0] * 6 + [1.0] * 2) * 3, False, id="it comes back"),
        pytest.param(chain(3), [1.0] * 20 + [20.0, 20.0, np.nan] + [20.0] * 5, True, id="one not seen"),
        pytest.param(chain(3), [np.nan] * 30, False, id="none seen"),
        pytest.param(chain(3), [0.0] * 10 + [20.0] * 20, False, id="began at zero"),
        pytest.param(chain(3), [1.0, 1.0] + [20.0] * 20, True, id="two of the first three"),
        pytest.param(chain(3), [1.0] + [20.0] * 20, False, id="one of the first three"),
        pytest.param(
            chain(3), [0.001] + [0.02 * min(i, 40) for i in range(1, 60)], False, id="a term that is warmed up from nothing"
        ),
        pytest.param(chain(3), [0.001] + [0.02 * i for i in range(1, 160)], True, id="its coefficient for ever"),
        pytest.param(chain(3), [0.02] + [0.02 * (1 + i) for i in range(1, 60)], True, id="as steadily, from what the loss costs"),
        pytest.param(chain(3), [0.02] + [0.02 * i for i in range(1, 60)], True, id="in proportion, but not from nothing"),
        pytest.param(chain(3), [0.001] + [0.02 * 1.4**i for i in range(1, 30)], True, id="from nothing, by a factor"),
    ],
)
def test_how_far_it_has_to_rise_and_for_how_long(meta: Meta, values: list[float], told: bool) -> None:
    run = Run(meta, [loss_diverging])
    course(run, values)
    assert bool(run.alarms()) is told
    assert run.notices == []


@pytest.mark.parametrize("last", [1.0, 9.9])
def test_the_last_loss_has_to_be_among_those_that_are_so_large(last: float) -> None:
    run = Run(chain(3), [loss_diverging])
    course(run, [1.0] * 20 + [20.0] * 6)
    assert run.alarms() == []
    course(run, [20.0])
    assert run.only("loss_diverging").count == 1
    course(run, [last])
    assert run.only("loss_diverging").count == 1


@pytest.mark.parametrize(
    ("values", "step"),
    [
        pytest.param([1.0] * 20 + [20.0] * 10, 20, id="at once"),
        pytest.param([1.0] * 20 + [4.9, 5.1] + [20.0] * 10, 21, id="from half of it on"),
        pytest.param([1.0] * 20 + [20.0, 20.0, 1.0] + [20.0] * 10, 20, id="but for a single one"),
        pytest.param([1.0] * 20 + [20.0, 20.0, 1.0, 1.0] + [20.0] * 10, 24, id="after two that were low"),
        pytest.param([1.0, 20.0, 1.0] + [20.0] * 10, 1, id="but for a single one near the start"),
        pytest.param([1.0] * 3 + [20.0] * 80, 19, id="the beginning is not kept"),
    ],
)
def test_since_when_it_diverges(values: list[float], step: int) -> None:
    run = Run(chain(3), [])
    course(run, values)
    assert next(iter(loss_diverging(run.history))).step == step


@pytest.mark.parametrize("terms", [2.0, 3.0])
def test_a_guess_of_several_losses_is_as_many_times_as_high(terms: float) -> None:
    run = Run(classifier(2.0), [loss_diverging])
    course(run, [1.0] * 3 + [4.0 * terms - 0.1] * 10, loss_terms=terms)
    assert run.alarms() == []
    course(run, [4.0 * terms + 0.1] * 10, loss_terms=terms)
    assert run.rules() == ["loss_diverging"]


@pytest.mark.parametrize(
    ("meta", "ratio", "told"),
    [
        pytest.param(chain(3), 0.031, True, id="several per cent"),
        pytest.param(chain(3), 0.029, False, id="targets that move"),
        pytest.param(classifier(2.0), 1e-3, True, id="a classifier, whatever its steps"),
        pytest.param(chain(3), np.nan, False, id="not known"),
        pytest.param(chain(3), np.array([1e-3, 1.0] * 3), False, id="vectors"),
        pytest.param(chain(3), np.array([1.0, np.nan, 0.031, np.nan, 1e-3, np.nan]), True, id="in the median"),
    ],
)
def test_steps_that_overshoot_go_with_it(meta: Meta, ratio: Any, told: bool) -> None:
    run = Run(meta, [loss_diverging])
    losses(run, [1.0] * 10 + [20.0] * 10, update_ratio=ratio)
    assert run.rules() == (["loss_diverging"] if told else [])


@pytest.mark.parametrize(
    ("values", "guess", "told"),
    [
        pytest.param([1.5**i for i in range(7)], 1.0, True, id="six rises of a half"),
        pytest.param([1.5**i for i in range(6)], 1.0, False, id="five"),
        pytest.param([1.46**i for i in range(7)], 1.0, False, id="not tenfold"),
        pytest.param([0.25 * 1.5**i for i in range(7)], 1.0, False, id="not three times the start"),
        pytest.param([0.27 * 1.5**i for i in range(7)], 1.0, True, id="just that"),
        pytest.param([1.5**i for i in range(7)], 4.0, False, id="not three times a guess"),
        pytest.param([1.0, 2.0, 4.0, 4.7, 9.4, 18.8, 37.6], 1.0, False, id="a pause"),
        pytest.param([1.0, 1.2, 1.5, 1.9, 2.4, 3.0, 40.0], 1.0, False, id="a jump"),
    ],
)
def test_ascent_is_told_before_it_is_far(values: list[float], guess: float, told: bool) -> None:
    run = Run(classifier(guess, "mse_loss"), [loss_diverging])
    losses(run, [1.0] * 10 + values)
    assert run.rules() == (["loss_diverging"] if told else [])
    if told:
        alert = run.only("loss_diverging")
        assert alert.severity == Severity.ERROR
        assert alert.evidence["loss"] == pytest.approx(values[-1])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        pytest.param([1e3 * 3.0**i for i in range(8)], True, id="rises each time, ten-thousandfold"),
        pytest.param([1.4**i for i in range(20)], True, id="tenfold"),
        pytest.param([400.0, 300.0, 200.0, 100.0, *(40 * 1.38**i for i in range(8))], False, id="not so far"),
        pytest.param([400.0, 300.0, 200.0, 100.0, *(40 * 1.4**i for i in range(8))], True, id="just so far"),
        pytest.param([*(1e3 * 3.0**i for i in range(6)), 1e5, 1e7], True, id="one step back"),
        pytest.param([*(1e3 * 3.0**i for i in range(4)), 1e3, 1e4, 1e3, 1e7], False, id="two steps back"),
        pytest.param([0.1, 0.2, 0.3, 0.4, 0.5, 20.0, 30.0, 40.0], False, id="three that are far off"),
        pytest.param([0.1, 0.2, 0.3, 0.4, 20.0, 30.0, 40.0, 50.0], True, id="four"),
    ],
)
def test_a_runaway_needs_no_large_steps(values: list[float], told: bool) -> None:
    run = Run(chain(3), [loss_diverging])
    losses(run, [1.0] * 10 + values)
    assert run.rules() == (["loss_diverging"] if told else [])


@pytest.mark.parametrize(
    ("values", "guess", "told"),
    [
        pytest.param([1.12**i for i in range(1, 13)], 1.0, True, id="the same factor each time"),
        pytest.param([2.0 * 1.1**i for i in range(12)], 1.0, False, id="not three times in twelve"),
        pytest.param([1.02 * 1.12**i for i in range(12)], 1.0, True, id="to three times the start"),
        pytest.param([0.9 * 1.12**i for i in range(12)], 1.0, False, id="not so far"),
        pytest.param([1.12**i for i in range(1, 13)], 4.0, False, id="a guess costs more"),
        pytest.param([1.12**i * (2.0 if i % 2 else 1.0) for i in range(1, 13)], 1.0, False, id="too noisy"),
        pytest.param([(10.0 + i) ** 2 / 40 for i in range(12)], 1.0, False, id="a power of the number of updates"),
        pytest.param([np.exp(0.1 * i + 0.01 * i * i) for i in range(12)], 1.0, True, id="faster and faster"),
        pytest.param([1.12**i for i in range(1, 13)], 0.0, False, id="nobody knows where such a loss begins"),
    ],
)
def test_slow_ascent_is_told_by_the_line_that_it_follows(values: list[float], guess: float, told: bool) -> None:
    run = Run(classifier(guess, "mse_loss"), [loss_diverging])
    losses(run, [1.0] * 3 + values)
    assert run.rules() == (["loss_diverging"] if told else [])
    if told:
        alert = run.only("loss_diverging")
        assert alert.evidence["loss"] == pytest.approx(values[-1])
        assert 0 < alert.step < run.history.recorded


@pytest.mark.parametrize(
    ("criterion", "before", "told"),
    [("mse_loss", 12, True), ("mse_loss", 13, False), ("cross_entropy", 40, True)],
)
def test_slow_ascent_is_told_later_of_classes_only(criterion: str, before: int, told: bool) -> None:
    run = Run(classifier(1.0, criterion), [loss_diverging])
    losses(run, [*np.full(before - 1, 1.0), 0.3, *(1.03 * 1.12**i for i in range(12))])
    assert run.rules() == (["loss_diverging"] if told else [])


def fades(
    run: Run, flat: int = 30, peak: int = 15, rate: float = 9e-7, ratio: float = 1e-5, falls: bool = True, **columns: Any
) -> None:
    """A rate of 1e-3, with which the loss falls (or not), and then one of `rate`, with which it stands."""
    noise = np.random.default_rng(0)
    for i in range(peak):
        run.record(
            loss=3.0 - (1.4 * i / peak if falls else 0.0) + 0.02 * noise.standard_normal(), lr=1e-3, update_ratio=1e-2, **columns
        )
    for _ in range(flat):
        run.record(loss=1.6 + 0.1 * noise.standard_normal(), lr=rate, update_ratio=ratio, **columns)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param({}, True, id="a rate that went while the loss fell"),
        pytest.param({"rate": 1.1e-6}, False, id="to more than a thousandth"),
        pytest.param({"ratio": 1.1e-4}, False, id="there are steps still"),
        pytest.param({"falls": False}, False, id="it stood before"),
        pytest.param({"flat": 19, "peak": 30}, False, id="not for long"),
        pytest.param({"flat": 30, "peak": 62}, False, id="not for a third of the run"),
        pytest.param({"flat": 33, "peak": 62}, True, id="for a third"),
    ],
)
def test_a_schedule_that_takes_the_rate_away_leaves_the_loss_where_it_is(changes: dict[str, Any], told: bool) -> None:
    run = Run(chain(3), [loss_plateau])
    fades(run, **changes)
    assert run.rules() == (["loss_plateau"] if told else [])
    if told:
        alert = run.only("loss_plateau")
        assert alert.step == changes.get("peak", 15)
        assert alert.evidence["lr"] == pytest.approx(9e-7)
        assert alert.evidence["largest_lr"] == pytest.approx(1e-3)
        assert "scheduler.step() once an epoch" in alert.remedy


def test_a_loss_that_falls_without_a_rate_does_not_stand() -> None:
    run = Run(chain(3), [loss_plateau])
    for i in range(60):
        run.record(loss=3.0 - 0.03 * i, lr=1e-3 if i < 15 else 9e-7, update_ratio=1e-5)
    assert run.alarms() == []


def test_a_low_loss_needs_no_rate() -> None:
    run = Run(chain(3), [loss_plateau])
    for i in range(60):
        run.record(loss=max(0.04, 3.0 - 0.3 * i) + 1e-3 * (i % 3), lr=1e-3 if i < 15 else 9e-7, update_ratio=1e-5)
    assert run.alarms() == []


def two_optimizers() -> Meta:
    return change(chain(3), lambda f: f.layer == "2", owner="Adam#1")


@pytest.mark.parametrize(
    ("meta", "columns"),
    [
        pytest.param(two_optimizers(), {}, id="several optimizers"),
        pytest.param(change(chain(3), lambda f: True, owner=None), {}, id="no optimizer"),
        pytest.param(chain(3), {"loss_terms": 0}, id="no number of losses"),
    ],
)
def test_losses_that_cannot_be_compared_do_not_diverge(meta: Meta, columns: dict[str, Any]) -> None:
    run = Run(meta, [loss_diverging])
    course(run, [1.0] * 10 + [100.0] * 20, **columns)
    assert run.alarms() == []


def test_an_optimizer_of_frozen_parameters_is_none() -> None:
    run = Run(change(two_optimizers(), lambda f: f.layer == "2", trainable=False), [loss_diverging])
    course(run, [1.0] * 10 + [100.0] * 20)
    assert run.rules() == ["loss_diverging"]


def test_a_changing_number_of_losses_an_update_means_nothing() -> None:
    run = Run(chain(3), [loss_diverging])
    course(run, [1.0] * 10)
    course(run, [100.0] * 20, loss_terms=100)
    assert run.alarms() == []


@pytest.mark.parametrize("value", [0.0, -1.0])
@pytest.mark.parametrize("at", [2, 12])
def test_a_loss_that_is_not_positive_means_nothing(value: float, at: int) -> None:
    run = Run(chain(3), [loss_diverging])
    for i in range(40):
        run.record(update_ratio=0.05, loss=value if i == at else 1.0 if i < 20 else 100.0)
    assert run.alarms() == []


def test_a_first_loss_that_was_not_positive_means_nothing_though_it_is_no_longer_kept() -> None:
    run = Run(chain(3), [loss_diverging])
    course(run, [-1.0] + [1.0] * 70 + [100.0] * 30)
    assert run.alarms() == []


def test_a_rise_from_a_low_loss_to_what_it_began_with_is_none() -> None:
    run = Run(chain(3), [loss_diverging])
    course(run, [2.0 * 0.8**i for i in range(30)] + [2.0] * 20)
    assert run.alarms() == []


def test_a_loss_that_is_not_seen_any_more_upsets_nothing() -> None:
    run = Run(classifier(2.0), [loss_diverging, loss_spike, loss_plateau])
    course(run, [1.0] * 10)
    run.records(90, **LOST)
    assert run.incidents.alerts == ()
    assert run.notices == []


def test_it_is_one_incident_that_ends_when_the_loss_comes_back() -> None:
    run = Run(chain(3))
    course(run, [1.0] * 10 + [20.0] * 20 + [1.0] * 20)
    alert = run.only("loss_diverging")
    assert (alert.state, alert.step, alert.count) == ("ended", 10, 14)
    assert [a.state for _, a in run.sent] == ["open", "ended"]


# -- loss_spike --------------------------------------------------------------------------------------------------------------------


def test_a_loss_far_outside_of_the_others_is_told_at_once() -> None:
    run = Run(chain(3))
    losses(run, noisy(30))
    losses(run, [40.0])
    alert = run.only("loss_spike")
    assert (alert.severity, alert.step, alert.layers, alert.parameters) == (Severity.WARNING, 30, (), ())
    assert run.sent[0][0] == 31
    assert alert.message == "the loss is 40, 40.5 times the usual 0.99"
    assert alert.evidence["ratio"] == pytest.approx(40.0, rel=0.1)
    assert alert.evidence["usual_loss"] == pytest.approx(1.0, rel=0.1)
    assert alert.evidence["z"] == pytest.approx(np.log(alert.evidence["ratio"]) / 0.15)
    assert alert.cause.startswith("One batch is far from all others")
    assert "smooth_l1_loss" in alert.remedy
    losses(run, noisy(2))
    assert run.only("loss_spike").state == "ended"


@pytest.mark.parametrize(("before", "told"), [(19, False), (20, True)])
def test_twenty_losses_make_a_habit(before: int, told: bool) -> None:
    run = Run(chain(3), [loss_spike])
    losses(run, [1.0] * before + [100.0])
    assert run.rules() == (["loss_spike"] if told else [])


@pytest.mark.parametrize(
    ("values", "last", "told"),
    [
        pytest.param([1.0] * 29 + [2.0], 20.1, True, id="ten times the largest of the last"),
        pytest.param([1.0] * 29 + [2.0], 19.9, False, id="less"),
        pytest.param([1.0] * 5 + [3.0] + [1.0] * 24, 27.1, True, id="three times the largest jump of the last"),
        pytest.param([1.0] * 5 + [3.0] + [1.0] * 24, 26.9, False, id="less than three times"),
        pytest.param([1.0] * 9 + [50.0] + [1.0] * 40, 30.0, True, id="a jump of 41 updates ago"),
        pytest.param([1.0] * 9 + [50.0] + [1.0] * 39, 30.0, False, id="a jump of 40 updates ago"),
        pytest.param([100.0] * 3 + [1.0] * 40, 50.1, True, id="half of the start"),
        pytest.param([100.0] * 3 + [1.0] * 40, 49.9, False, id="less than half of the start"),
        pytest.param([1.0] * 20 + [np.nan] * 10, 20.0, True, id="half of the last not seen"),
        pytest.param([1.0] * 20 + [np.nan] * 11, 20.0, False, id="more than half of the last not seen"),
        pytest.param([1.0] * 30, np.nan, False, id="not seen"),
        pytest.param([np.nan] * 30, 20.0, False, id="none seen before"),
        pytest.param([0.0] * 30, 20.0, False, id="zeros before"),
        pytest.param([2.0**i for i in range(30)], 2.0**30, False, id="growth"),
        pytest.param([1.0] * 28 + [4.0, 16.0], 64.0, False, id="fast growth"),
    ],
)
def test_how_far_outside_it_has_to_be(values: list[float], last: float, told: bool) -> None:
    run = Run(chain(3), [loss_spike])
    losses(run, values)
    run.incidents = Run(chain(3), [loss_spike]).incidents
    losses(run, [last])
    assert run.rules() == (["loss_spike"] if told else [])
    assert run.notices == []


@pytest.mark.parametrize(("z", "told"), [(6.05, True), (5.95, False)])
def test_it_has_to_stand_out_of_the_spread(z: float, told: bool) -> None:
    last = np.cosh(0.3) * np.exp(z * 1.4826 * 0.3)
    run = Run(chain(3), [loss_spike])
    losses(run, [1.0] * 10 + [np.exp(-0.3), np.exp(0.3)] * 10 + [last])
    assert run.rules() == (["loss_spike"] if told else [])


@pytest.mark.parametrize(
    ("meta", "values", "last", "told"),
    [
        pytest.param(classifier(2.0), [0.5] * 30, 2.51, True, id="worse than a guess"),
        pytest.param(classifier(2.0), [0.5] * 30, 2.49, False, id="as a guess: a head that is made anew"),
        pytest.param(classifier(2.0), [1.19] * 30, 3.0, True, id="it had learnt"),
        pytest.param(classifier(2.0), [1.21] * 30, 3.1, False, id="it had not"),
        pytest.param(classifier(2.0), [1.21] * 30, 12.2, True, id="it had not, ten times"),
        pytest.param(classifier(2.0), [0.9] * 29 + [1.25], 2.51, True, id="twice the largest"),
        pytest.param(classifier(2.0), [0.9] * 29 + [1.26], 2.51, False, id="not twice the largest"),
        pytest.param(classifier(2.0, "mse_loss"), [0.5] * 30, 2.51, False, id="no classifier"),
        pytest.param(classifier(0.0), [0.5] * 30, 2.51, False, id="a guess is not known"),
        pytest.param(classifier(2.0), [0.4 * np.exp(-0.21), 0.4 * np.exp(0.21)] * 15, 4.0, False, id="losses of a larger spread"),
        pytest.param(classifier(2.0), [0.4 * np.exp(-0.19), 0.4 * np.exp(0.19)] * 15, 4.0, True, id="of a smaller one"),
        pytest.param(classifier(2.0), [0.4 * np.exp(-0.21), 0.4 * np.exp(0.21)] * 15, 6.0, True, id="ten times these"),
    ],
)
def test_of_a_classifier_that_has_learnt_a_batch_worse_than_a_guess_is_one(
    meta: Meta, values: list[float], last: float, told: bool
) -> None:
    run = Run(meta, [loss_spike])
    losses(run, [2.0] * 3 + values * 2)
    losses(run, [last])
    assert run.rules() == (["loss_spike"] if told else [])


def test_a_run_with_heavy_tails_is_none() -> None:
    run = Run(chain(3), [loss_spike])
    for i in range(60):
        run.record(loss=25.0 if i % 25 == 10 else 1.0)
    assert run.alarms() == []


def test_a_run_that_has_converged_may_meet_a_hard_batch() -> None:
    run = Run(chain(3))
    losses(run, [2.0 * 0.8**i for i in range(40)] + [0.5])
    assert run.alarms() == []


@pytest.mark.parametrize(
    ("meta", "columns"),
    [
        pytest.param(two_optimizers(), {}, id="several optimizers"),
        pytest.param(chain(3), {"loss_terms": 2}, id="a changing number of losses"),
        pytest.param(chain(3), skipped(SkipReason.NON_FINITE), id="a skipped record"),
    ],
)
def test_a_loss_that_cannot_be_compared_is_no_spike(meta: Meta, columns: dict[str, Any]) -> None:
    run = Run(meta, [loss_spike])
    losses(run, noisy(30))
    losses(run, [40.0], **columns)
    assert run.alarms() == []


def test_a_loss_of_another_sign_before_means_that_none_is_a_spike() -> None:
    run = Run(chain(3), [loss_spike])
    losses(run, [1.0] * 10 + [-1.0] + [1.0] * 30 + [40.0])
    assert run.alarms() == []


def test_two_spikes_far_apart_are_two_incidents() -> None:
    run = Run(chain(3))
    losses(run, [*noisy(30), 40.0, *noisy(45, seed=1), 30.0])
    assert [(a.rule, a.step) for a in run.alarms()] == [("loss_spike", 30), ("loss_spike", 76)]


def test_it_is_told_late_in_a_run_too_for_it_is_never_left_out_of_turn() -> None:
    run = Run(chain(3))
    losses(run, noisy(98))
    losses(run, [40.0])
    assert run.only("loss_spike").step == 98


# -- loss_plateau ------------------------------------------------------------------------------------------------------------------


def test_a_classifier_that_is_a_guess_for_90_updates_is_told() -> None:
    run = Run(classifier(2.0))
    losses(run, noisy(100, 2.05))
    alert = run.only("loss_plateau")
    assert (alert.severity, alert.step, alert.layers, alert.parameters) == (Severity.WARNING, 0, (), ())
    assert run.sent[0][0] == 90
    assert alert.message.startswith("the loss has been 2.0")
    assert alert.message.endswith(" for 90 updates, and a constant output would give 2")
    assert {"guess": 2.0, "updates": 90.0, "broadcast": 0.0}.items() <= alert.evidence.items()
    assert alert.evidence["loss"] == pytest.approx(2.05, rel=0.05)
    assert alert.evidence["first_loss"] == pytest.approx(2.05, rel=0.05)
    assert alert.cause.startswith("The outputs tell nothing of the targets")
    assert "overfit one batch" in alert.remedy


def test_a_prediction_that_was_broadcast_is_told_as_that_whatever_a_guess_is() -> None:
    run = Run(classifier(0.0, "mse_loss", broadcast=True))
    losses(run, noisy(100, 0.1))
    alert = run.only("loss_plateau")
    assert alert.message.endswith("for 90 updates")
    assert alert.evidence["broadcast"] == 1.0
    assert alert.cause.startswith("The prediction and the target have different shapes")
    assert "squeeze" in alert.remedy


@pytest.mark.parametrize(
    ("before", "step"),
    [
        pytest.param([10.0] * 20, 20, id="fell to it"),
        pytest.param([1.0] * 20, 20, id="rose to it"),
        pytest.param([2.19] * 20, 0, id="began near it"),
        pytest.param([2.21] * 20, 20, id="began a tenth above it"),
        pytest.param([1.81] * 20, 0, id="began near below it"),
        pytest.param([1.79] * 20, 20, id="began a tenth below it"),
        pytest.param([2.0] * 10 + [10.0] * 2 + [2.0] * 10, 0, id="but for a few"),
        pytest.param([2.0] * 10 + [10.0] * 3 + [2.0] * 10, 13, id="after some that were higher"),
        pytest.param([np.nan] * 20, 20, id="not seen before"),
    ],
)
def test_since_when_it_has_been_a_plateau(before: list[float], step: int) -> None:
    run = Run(classifier(2.0), [])
    losses(run, [*before, *[2.0] * 90])
    assert next(iter(loss_plateau(run.history))).step == step


@pytest.mark.parametrize(
    ("high", "told"),
    [
        pytest.param(25, True, id="comes down within a third"),
        pytest.param(55, False, id="still comes down"),
    ],
)
def test_a_loss_that_comes_down_to_that_of_a_guess_at_first_makes_no_progress(high: int, told: bool) -> None:
    run = Run(classifier(2.0), [loss_plateau])
    rng = np.random.default_rng(0)
    for i in range(90):
        run.record(loss=float((2.06 if i < high else 2.0) + 0.004 * rng.standard_normal()))
    assert run.rules() == (["loss_plateau"] if told else [])


@pytest.mark.parametrize(
    ("criterion", "part", "told"),
    [
        pytest.param("cross_entropy", 0.999, False, id="a constant better than a guess, without any spread"),
        pytest.param("cross_entropy", 1.0, True, id="a guess"),
        pytest.param("binary_cross_entropy", 1.0, True, id="binary"),
        pytest.param("binary_cross_entropy_with_logits", 1.0, True, id="binary, of logits"),
        pytest.param("nll_loss", 1.0, False, id="of what is not known to be log-probabilities"),
        pytest.param("mse_loss", 2.0, False, id="squared errors, whose targets may be noisy"),
        pytest.param("l1_loss", 2.0, False, id="absolute errors"),
        pytest.param("", 2.0, False, id="another loss"),
    ],
)
def test_how_bad_it_has_to_be(criterion: str, part: float, told: bool) -> None:
    guess = 0.6 if criterion.startswith("binary") else 2.0
    run = Run(classifier(guess, criterion), [loss_plateau])
    losses(run, [guess * part] * 99)
    assert run.rules() == (["loss_plateau"] if told else [])


@pytest.mark.parametrize(
    ("meta", "values", "told"),
    [
        pytest.param(classifier(2.0), [2.0] * 89, False, id="89 updates"),
        pytest.param(classifier(2.0), [2.0] * 90, True, id="90 updates"),
        pytest.param(classifier(0.0), [2.0] * 99, False, id="a guess is not known"),
        pytest.param(classifier(0.51, "binary_cross_entropy"), [0.511] * 99, True, id="two classes, balanced"),
        pytest.param(classifier(0.49, "binary_cross_entropy"), [0.491] * 99, False, id="two classes, one of them rare"),
        pytest.param(classifier(2.0), [1.9] * 45 + [2.0] * 45, False, id="better in the first half"),
        pytest.param(classifier(2.0), [2.0] * 45 + [1.9] * 45, False, id="better in the second half"),
        pytest.param(classifier(2.0), [np.nan] * 23 + [2.0] * 67, True, id="three quarters seen"),
        pytest.param(classifier(2.0), [np.nan] * 24 + [2.0] * 66, False, id="less than that seen"),
        pytest.param(classifier(2.0), [2.0] * 50 + [-2.0] + [2.0] * 60, False, id="not positive"),
        pytest.param(replace(two_optimizers(), criterion="cross_entropy", guess=2.0), [2.0] * 99, False, id="two optimizers"),
    ],
)
def test_how_long_it_has_to_be_so(meta: Meta, values: list[float], told: bool) -> None:
    run = Run(meta, [loss_plateau])
    losses(run, values)
    assert run.rules() == (["loss_plateau"] if told else [])
    assert run.notices == []


def test_a_block_that_ends_after_90_updates_is_judged_and_one_of_10_is_not() -> None:
    for records, told in ((10, False), (89, False), (92, True)):
        run = Run(classifier(2.0), [loss_plateau])
        losses(run, [2.0] * records)
        run.history.ended = True
        run.judge()
        assert bool(run.alarms()) is told


def halves(fall: float, spread: float) -> list[float]:
    """90 losses around 10 whose median falls by so much half way, with as many above as below."""
    shape = np.tile([-spread, spread, -spread / 2, spread / 2, 0.0], 9)
    return [*(10.0 + shape), *(10.0 - fall + shape)]


@pytest.mark.parametrize(("errors", "told"), [(1.9, True), (2.1, False)])
def test_a_fall_beyond_chance_is_progress(errors: float, told: bool) -> None:
    spread = 0.5
    error = 1.25 * (1.4826 * spread / 2) * (2 / 45) ** 0.5
    run = Run(classifier(2.0), [])
    losses(run, halves(errors * error, spread))
    assert bool(list(loss_plateau(run.history))) is told


@pytest.mark.parametrize(
    ("below", "spread", "told"),
    [
        pytest.param(0.0099, 0.5, True, id="less than a twohundredth below, within chance"),
        pytest.param(0.0101, 0.5, False, id="more than a twohundredth below"),
        pytest.param(0.0068, 0.05, True, id="within a standard error"),
        pytest.param(0.0071, 0.05, False, id="more than a standard error below"),
    ],
)
def test_how_much_better_than_a_guess_chance_makes_a_median(below: float, spread: float, told: bool) -> None:
    run = Run(classifier(2.0), [])
    losses(run, np.array(halves(0.0, spread)) - 8.0 - below)
    assert bool(list(loss_plateau(run.history))) is told


def test_a_rise_is_no_progress() -> None:
    run = Run(classifier(2.0), [])
    losses(run, halves(-3.0, 0.5))
    assert list(loss_plateau(run.history))


@pytest.mark.parametrize(("factor", "told"), [pytest.param(1.04, True, id="constant"), pytest.param(1.06, False, id="rising")])
def test_a_warm_up_is_waited_for(factor: float, told: bool) -> None:
    run = Run(classifier(2.0), [loss_plateau])
    losses(run, [2.0] * 60, lr=1.0)
    losses(run, [2.0] * 30, lr=factor)
    assert run.rules() == (["loss_plateau"] if told else [])


def test_a_warm_up_that_was_over_40_updates_ago_is_none() -> None:
    run = Run(classifier(2.0), [loss_plateau])
    losses(run, [2.0] * 45, lr=1.0)
    losses(run, [2.0] * 45, lr=2.0)
    assert run.rules() == ["loss_plateau"]


def test_without_learning_rates_there_is_no_warm_up() -> None:
    run = Run(classifier(2.0), [loss_plateau])
    losses(run, [2.0] * 99, lr=np.nan)
    assert run.rules() == ["loss_plateau"]


def test_a_guess_may_be_small() -> None:
    run = Run(classifier(0.5), [loss_plateau])
    losses(run, [0.5] * 99)
    assert run.only("loss_plateau").message.endswith("a constant output would give 0.5")


def test_several_losses_an_update_have_as_many_guesses() -> None:
    run = Run(classifier(2.0), [loss_plateau])
    losses(run, [8.0] * 99, loss_terms=4)
    assert run.only("loss_plateau").evidence["guess"] == 8.0
    run = Run(classifier(2.0), [loss_plateau])
    losses(run, [7.0] * 90, loss_terms=4)
    assert run.alarms() == []


def test_a_record_without_a_loss_in_the_end_does_not_make_a_converged_run_a_plateau() -> None:
    run = Run(classifier(2.0), [loss_plateau])
    losses(run, [0.01] * 92)
    run.records(1, **LOST)
    assert run.alarms() == []


def test_a_record_without_a_loss_in_the_end_does_not_hide_a_plateau() -> None:
    run = Run(classifier(2.0), [loss_plateau])
    losses(run, [2.0] * 92)
    run.records(1, **LOST)
    assert run.only("loss_plateau").evidence["guess"] == 2.0


def test_where_no_update_was_made_there_is_no_plateau() -> None:
    run = Run(classifier(2.0), [loss_plateau])
    losses(run, [2.0] * 99, **skipped(SkipReason.SCALER))
    assert run.incidents.alerts == ()
    assert run.notices == []


def test_a_model_that_has_converged_stays_where_it_is() -> None:
    run = Run(classifier(2.0))
    losses(run, [*(2.0 * 0.9**i for i in range(30)), *noisy(100, 0.09)])
    assert run.alarms() == []


def test_a_plateau_is_one_incident_that_ends_when_the_loss_falls() -> None:
    run = Run(classifier(2.0))
    losses(run, [2.0] * 100 + [1.0] * 60)
    alert = run.only("loss_plateau")
    assert (alert.state, alert.step) == ("ended", 0)
    assert [a.state for _, a in run.sent] == ["open", "ended"]


# -- has_learnt --------------------------------------------------------------------------------------------------------------------


def learnt(values: Iterable[float], guess: float = 0.0, **columns: Any) -> bool:
    run = Run(replace(chain(2), guess=guess), [])
    losses(run, values, **columns)
    return has_learnt(run.history)


@pytest.mark.parametrize(
    ("values", "guess", "so"),
    [
        pytest.param([1.0] * 5 + [0.89] * 5, 0.0, True, id="below nine tenths of the first"),
        pytest.param([1.0] * 5 + [0.91] * 5, 0.0, False, id="not below"),
        pytest.param([1.0] + [5.0] * 9 + [2.0] * 5, 0.0, False, id="below the second, which comes after a step"),
        pytest.param([1.0] * 5 + [0.46] * 5, 0.5, False, id="not below a guess"),
        pytest.param([1.0] * 5 + [0.44] * 5, 0.5, True, id="below a guess"),
        pytest.param([1.0] * 5 + [0.95] * 5, 2.0, False, id="below a guess, not below the first"),
        pytest.param([1.0] * 10 + [9.0, 0.5, 0.5, 0.5, 9.0], 0.0, True, id="the median of the last five"),
        pytest.param([0.5] * 10 + [0.9, 0.9, 0.9, 0.1, 0.1], 0.0, False, id="the median is not the least"),
        pytest.param([1.0] * 10 + [0.8, 0.8, 0.8, 1.1, 1.1], 0.0, True, id="three of five"),
        pytest.param([1.0] * 10 + [np.nan, np.nan, 0.5, np.nan, np.inf], 0.0, True, id="of those that are finite"),
        pytest.param([1.0] * 10 + [np.nan] * 5, 0.0, False, id="lost"),
        pytest.param([np.nan] * 10, 0.0, False, id="lost from the first"),
        pytest.param([1.0] * 10 + [0.1, np.nan, np.nan, np.nan, np.nan, np.nan], 0.0, False, id="five are looked at"),
        pytest.param([-1.0] * 10, 0.0, True, id="a negative loss says nothing"),
        pytest.param([0.0] * 10, 0.0, True, id="nor does zero"),
        pytest.param([], 0.0, True, id="no record"),
    ],
)
def test_whether_a_run_has_learnt(values: list[float], guess: float, so: bool) -> None:
    assert learnt(values, guess) is so


@pytest.mark.parametrize("terms", [0.0, np.nan])
def test_where_no_loss_is_known_it_is_taken_to_have_learnt(terms: float) -> None:
    assert learnt([np.nan] * 10, loss_terms=terms)
    run = Run(chain(2), [])
    losses(run, [1.0] * 10)
    losses(run, [np.nan] * 5, loss_terms=terms)
    assert has_learnt(run.history)


def test_a_guess_is_that_of_as_many_losses() -> None:
    assert learnt([1.0] * 5 + [0.8] * 5, guess=0.5, loss_terms=2)
    assert not learnt([1.0] * 5 + [0.8] * 5, guess=0.5)


# -- histories in which next to nothing is known -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 3e38, 1e-44, -1.0])
@pytest.mark.parametrize("meta", [Meta(), chain(1), classifier(2.0), classifier(2.0, broadcast=True)])
def test_no_value_upsets_them(meta: Meta, value: float) -> None:
    for before in ([], [1.0] * 85):
        run = Run(meta, [loss_diverging, loss_spike, loss_plateau])
        run.judge()
        losses(run, before)
        losses(run, [value] * 22)
        run.records(5, **LOST)
        run.history.ended = True
        run.judge()
        assert run.notices == []
        assert progress(run.history) in Progress
        assert has_learnt(run.history) in (True, False)
