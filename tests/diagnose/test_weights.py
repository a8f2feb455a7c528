"""Steps that change nothing, too little or too much of the weights, and steps that only look like it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradwatch.diagnose.rules import frozen_weights, update_ratio_too_large, update_ratio_too_small
from gradwatch.history import Meta, ParameterFact
from gradwatch.records import GradState, Severity
from tests.diagnose.runs import STEPPED, Run, chain, change

SAME, CHANGED = STEPPED | GradState.SAME, STEPPED | GradState.CHANGED


def of(meta: Meta, *names: str, value: Any, others: Any) -> Any:
    """`[P]`: a value for the parameters of some layers, or some parameters; all of them where none is named."""
    return np.array([value if not names or f.layer in names or f.name in names else others for f in meta.parameters])


# -- frozen_weights ----------------------------------------------------------------------------------------------------------------


def frozen(run: Run, n: int, *names: str, also: int = 0, norms: Any = 1.0, ratio: float = 1e-3, **columns: Any) -> None:
    """Records whose steps leave some parameters as they were, bit for bit."""
    state = of(run.history.meta, *names, value=np.uint8(SAME | also), others=np.uint8(CHANGED))
    run.records(n, norms, grad_state=state, update_ratio=np.where(state & GradState.SAME, 0.0, ratio), **columns)


def test_a_layer_that_no_step_changes_is_told_at_update_10() -> None:
    run = Run(chain(4))
    frozen(run, 12, "1", lr=1e-9)
    alert = run.only("frozen_weights")
    assert (alert.severity, alert.step, run.sent[0][0]) == (Severity.WARNING, 0, 10)
    assert (alert.layers, alert.parameters) == (("1",), ("1.weight", "1.bias"))
    assert alert.message == "no step changes a bit of 2 parameters, though gradients reach them: the learning rate is 1e-09"
    assert alert.evidence == pytest.approx({"parameters": 2, "matrices": 1, "lr": 1e-9, "cleared": 0, "half_precision": 0})
    assert alert.cause == "A step at a learning rate of 1e-09 is smaller than half the last digit of the weights and rounds away."
    assert alert.remedy.startswith("Raise the learning rate")


def test_one_parameter_is_called_by_its_name() -> None:
    run = Run(chain(4))
    frozen(run, 12, "1.weight")
    alert = run.only("frozen_weights")
    assert alert.message.startswith("no step changes a bit of 1.weight, though gradients reach it: ")


def test_a_layer_that_freezes_at_update_20_is_told_within_10() -> None:
    run = Run(chain(4))
    frozen(run, 20, "none")
    frozen(run, 10, "1")
    assert run.only("frozen_weights").step == 20


def test_a_layer_that_was_thawed_at_a_rate_of_0_is_frozen_since_then() -> None:
    run = Run(chain(4), [frozen_weights])
    state = of(run.history.meta, "1", value=np.uint8(SAME & ~GradState.REACHED), others=np.uint8(CHANGED))
    run.records(15, of(run.history.meta, "1", value=np.nan, others=1.0), grad_state=state, update_ratio=1e-3)
    frozen(run, 12, "1", lr=0.0)
    assert run.only("frozen_weights").step == 15


@pytest.mark.parametrize(("looks", "told"), [(8, False), (9, True)])
def test_nine_looks_have_to_find_it_unchanged(looks: int, told: bool) -> None:
    run = Run(chain(4))
    frozen(run, 20 - looks, "none")
    frozen(run, looks, "1")
    run.history.ended = True
    run.judge()
    assert run.rules() == (["frozen_weights"] if told else [])


@pytest.mark.parametrize(("records", "told"), [(9, False), (10, True)])
def test_a_block_that_ends_early_is_judged_from_10_updates_on(records: int, told: bool) -> None:
    run = Run(chain(4))
    frozen(run, records, "1")
    run.history.ended = True
    run.judge()
    assert run.rules() == (["frozen_weights"] if told else [])


def test_one_change_in_between_makes_the_count_begin_again() -> None:
    run = Run(chain(4), [frozen_weights])
    for _ in range(4):
        frozen(run, 8, "1")
        frozen(run, 1, "none")
    assert run.alarms() == []


def test_records_in_which_nobody_looked_neither_count_nor_break_it() -> None:
    run = Run(chain(4), [frozen_weights])
    frozen(run, 1, "none")
    for _ in range(9):
        assert run.alarms() == []
        run.records(3)
        frozen(run, 1, "1")
    assert run.only("frozen_weights").step == 1


@pytest.mark.parametrize(
    ("names", "severity"),
    [
        pytest.param(("0.bias", "1.bias"), Severity.INFO, id="vectors"),
        pytest.param(("0.bias", "1.weight"), Severity.WARNING, id="a matrix among them"),
    ],
)
def test_vectors_alone_are_an_information(names: tuple[str, ...], severity: Severity) -> None:
    run = Run(chain(4))
    frozen(run, 12, *names)
    (alert,) = run.incidents.alerts
    assert (alert.rule, alert.severity) == ("frozen_weights", severity)


@pytest.mark.parametrize(
    ("half", "ratio", "severity"),
    [
        pytest.param(("0.bias", "1.bias"), 1e-4, Severity.WARNING, id="beside matrices that move"),
        pytest.param(("0.bias", "1.bias"), 0.9e-4, Severity.INFO, id="nothing moves"),
        pytest.param(("0.bias",), 1e-4, Severity.INFO, id="one in full precision"),
    ],
)
def test_vectors_that_half_precision_rounds_away_are_a_fault(half: tuple[str, ...], ratio: float, severity: Severity) -> None:
    run = Run(change(chain(4), lambda f: f.name in half, dtype="bfloat16"), [frozen_weights])
    frozen(run, 12, "0.bias", "1.bias", ratio=ratio)
    (alert,) = run.incidents.alerts
    assert (alert.rule, alert.severity) == ("frozen_weights", severity)


@pytest.mark.parametrize(
    ("columns", "meta", "cause", "remedy"),
    [
        pytest.param({"lr": 0.0}, chain(2), "Their learning rate is 0", "param_groups", id="a learning rate of 0"),
        pytest.param(
            {"lr": 1e-6}, change(chain(2), lambda f: True, dtype="bfloat16"), "half precision", "float32", id="half precision"
        ),
        pytest.param({"also": GradState.CLEARED}, chain(2), "zero_grad() runs between", "before backward()", id="cleared"),
        pytest.param(
            {"lr": np.nan}, chain(2), "A step is smaller than half", "Raise the learning rate", id="unknown learning rate"
        ),
    ],
)
def test_cause_and_remedy(columns: dict[str, Any], meta: Meta, cause: str, remedy: str) -> None:
    run = Run(meta, [frozen_weights])
    frozen(run, 12, **columns)
    alert = run.only("frozen_weights")
    assert cause in alert.cause
    assert remedy in alert.remedy
    assert "nan" not in alert.message + alert.cause


@pytest.mark.parametrize(
    ("lr", "ending"),
    [
        pytest.param([np.nan, 0.1], ": the learning rate is 0.1", id="of some"),
        pytest.param([np.nan, np.nan], ", though gradients reach them", id="of none"),
    ],
)
def test_where_a_learning_rate_is_not_known_that_of_others_is_told_or_none(lr: list[float], ending: str) -> None:
    run = Run(chain(1), [frozen_weights])
    frozen(run, 12, lr=np.array(lr))
    alert = run.only("frozen_weights")
    assert alert.message.endswith(ending)
    assert ("lr" in alert.evidence) is (not np.isnan(lr).all())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_how_many_are_in_half_precision_is_counted(dtype: str) -> None:
    run = Run(change(chain(2), lambda f: f.name == "0.weight", dtype=dtype), [frozen_weights])
    frozen(run, 12)
    assert run.only("frozen_weights").evidence["half_precision"] == 1


def test_gradients_that_were_cleared_need_not_have_been_seen() -> None:
    run = Run(chain(2), [frozen_weights])
    frozen(run, 12, also=GradState.CLEARED, norms=0.0)
    alert = run.only("frozen_weights")
    assert (
        alert.message == "no step changes a bit of 4 parameters, though gradients reach them: the gradients were cleared before it"
    )
    assert alert.evidence["cleared"] == 4


def test_whether_gradients_were_cleared_is_asked_of_the_last_record() -> None:
    run = Run(chain(2), [frozen_weights])
    frozen(run, 12, norms=0.0)
    assert run.alarms() == []
    frozen(run, 1, also=GradState.CLEARED, norms=0.0)
    assert run.only("frozen_weights").count == 1
    frozen(run, 1, norms=0.0)
    assert run.only("frozen_weights").count == 1


def test_of_what_was_cleared_in_part_the_message_does_not_say_that_all_was() -> None:
    run = Run(meta := chain(2), [frozen_weights])
    state = of(meta, "0", value=np.uint8(SAME | GradState.CLEARED), others=np.uint8(SAME))
    run.records(12, grad_state=state)
    alert = run.only("frozen_weights")
    assert alert.message.endswith(": the learning rate is 0.1")
    assert alert.evidence["cleared"] == 2


# What is healthy.


def test_parameters_that_do_not_require_a_gradient_are_ignored() -> None:
    run = Run(change(chain(4), lambda f: f.layer == "1", trainable=False))
    frozen(run, 30, "1")
    assert run.alarms() == []


def test_parameters_that_no_backward_reaches_are_ignored() -> None:
    run = Run(meta := chain(4), [frozen_weights])
    run.records(30, grad_state=of(meta, "1", value=np.uint8(SAME & ~GradState.REACHED), others=np.uint8(CHANGED)))
    assert run.alarms() == []


def test_a_gradient_that_is_exactly_zero_from_the_start_is_none() -> None:
    run = Run(meta := chain(4), [frozen_weights])
    frozen(run, 30, "1", norms=of(meta, "1", value=0.0, others=1.0))
    assert run.alarms() == []


def test_one_gradient_of_exactly_zero_in_ten_is_enough_to_be_ignored() -> None:
    run = Run(meta := chain(4), [frozen_weights])
    for i in range(40):
        frozen(run, 1, "1", norms=of(meta, "1", value=float(i % 10 > 0), others=1.0))
    assert run.alarms() == []


@pytest.mark.parametrize(
    ("norm", "told"), [pytest.param(0.9e-3, False, id="three decades below"), pytest.param(1.1e-3, True, id="less")]
)
def test_a_gradient_that_has_starved_is_told_elsewhere(norm: float, told: bool) -> None:
    run = Run(meta := chain(4), [frozen_weights])
    frozen(run, 10, "none", noise=0.0)
    frozen(run, 1, "none", norms=(now := of(meta, "1", value=norm, others=1.0)), noise=0.0)
    frozen(run, 20, "1", norms=now, noise=0.0)
    assert run.rules() == (["frozen_weights"] if told else [])


@pytest.mark.parametrize(
    ("norm", "lr", "told"),
    [
        pytest.param(5.1e-4, 0.1, True, id="a ten-thousandth of the weights"),
        pytest.param(4.9e-4, 0.1, False, id="faint beside the weights"),
        pytest.param(4.9e-4, 0.0, True, id="faint, and a learning rate of 0"),
    ],
)
def test_a_faint_gradient_moves_nothing_for_its_own_smallness(norm: float, lr: float, told: bool) -> None:
    run = Run(chain(4), [frozen_weights])
    frozen(run, 20, norms=norm, noise=0.0, lr=lr)
    assert run.rules() == (["frozen_weights"] if told else [])


@pytest.mark.parametrize(
    ("lr", "told"),
    [
        pytest.param(0.99e-3, False, id="the end of a schedule"),
        pytest.param(1.01e-3, True, id="not yet its end"),
        pytest.param(0.0, True, id="zero"),
    ],
)
def test_the_end_of_a_schedule_is_healthy(lr: float, told: bool) -> None:
    run = Run(chain(4), [frozen_weights])
    frozen(run, 10, "none", lr=0.1)
    frozen(run, 20, "1", lr=lr)
    assert run.rules() == (["frozen_weights"] if told else [])


def test_the_end_of_one_groups_schedule_does_not_excuse_another() -> None:
    run = Run(meta := chain(4), [frozen_weights])
    frozen(run, 10, "none", lr=0.1)
    frozen(run, 20, "0", "1", lr=of(meta, "0", value=1e-4, others=0.1))
    assert run.only("frozen_weights").layers == ("1",)


def test_a_warm_up_from_zero_is_healthy() -> None:
    run = Run(chain(4), [frozen_weights])
    frozen(run, 2, lr=0.0)
    for i in range(30):
        frozen(run, 1, "none", lr=0.01 * i)
    assert run.alarms() == []


@pytest.mark.parametrize(("loss", "told"), [pytest.param(0.049, False, id="low"), pytest.param(0.051, True, id="not low")])
def test_once_the_loss_is_low_nothing_has_to_change(loss: float, told: bool) -> None:
    run = Run(chain(4), [frozen_weights])
    frozen(run, 10, "none")
    frozen(run, 20, "1", loss=loss)
    assert run.rules() == (["frozen_weights"] if told else [])


def test_it_is_one_incident_that_grows_and_ends() -> None:
    run = Run(chain(4))
    frozen(run, 15, "1")
    frozen(run, 15, "1", "2")
    alert = run.only("frozen_weights")
    assert (alert.layers, alert.step, alert.count) == (("1", "2"), 0, 21)
    frozen(run, 20, "none")
    alert = run.only("frozen_weights")
    assert (alert.state, alert.last_step) == ("ended", 29)
    assert [a.state for _, a in run.sent] == ["open", "ended"]


def test_where_the_beginning_is_not_kept_it_is_the_first_kept_record() -> None:
    run = Run(chain(2), [])
    frozen(run, 600)
    assert next(iter(frozen_weights(run.history))).step == 600 - 512


# -- update_ratio_too_large --------------------------------------------------------------------------------------------------------


def test_steps_that_replace_the_weights_are_told_by_update_15() -> None:
    run = Run(chain(4))
    run.records(16, update_ratio=1.0)
    alert = run.only("update_ratio_too_large")
    assert (alert.severity, alert.step, run.sent[0][0]) == (Severity.WARNING, 0, 14)
    assert (alert.layers, alert.parameters) == (("",), ())
    assert alert.message == "an update changes the weights by 1 of their size"
    assert alert.evidence == pytest.approx({"update_ratio": 1.0, "usual_update_ratio": 1.0, "lr": 0.1})
    assert alert.cause.startswith("Each step overwrites what was learnt before: the learning rate is too high")
    assert alert.remedy.startswith("Lower the learning rate (0.1 now) until")


def test_where_the_learning_rate_is_not_known_the_remedy_names_none() -> None:
    run = Run(chain(4))
    run.records(16, update_ratio=1.0, lr=np.nan)
    assert run.only("update_ratio_too_large").remedy.startswith("Lower the learning rate until")


@pytest.mark.parametrize(("records", "told"), [(9, False), (10, True)])
def test_a_block_that_ends_early_has_10_updates_of_steps_judged(records: int, told: bool) -> None:
    run = Run(chain(4))
    run.records(records, update_ratio=1.0)
    run.history.ended = True
    run.judge()
    assert run.rules() == (["update_ratio_too_large"] if told else [])


def test_steps_that_become_too_large_at_update_20_are_told_within_10() -> None:
    run = Run(chain(4))
    run.records(20)
    run.records(10, update_ratio=0.5)
    assert run.only("update_ratio_too_large").step == 20
    assert run.sent[0][0] <= 30


@pytest.mark.parametrize(
    ("ratios", "told"),
    [
        pytest.param([0.301] * 16, True, id="sustained"),
        pytest.param([0.299] * 16, False, id="large, as a healthy run's may be"),
        pytest.param([0.1, 0.31] * 12, False, id="less than half of the looks"),
        pytest.param([0.1] * 3 + [2.01] + [0.1] * 10, True, id="at once"),
        pytest.param([0.1] * 3 + [1.99] + [0.1] * 10, False, id="not quite at once"),
        pytest.param([np.nan] * 10 + [1.9] * 9, False, id="nine looks"),
        pytest.param([np.nan] * 10 + [1.9] * 10, True, id="ten looks"),
        pytest.param([np.nan] * 15 + [2.1], True, id="one look at once"),
        pytest.param([np.inf] + [0.1] * 16, False, id="a ratio that is not finite"),
    ],
)
def test_how_large_and_for_how_long(ratios: list[float], told: bool) -> None:
    run = Run(chain(4), [update_ratio_too_large])
    for ratio in ratios:
        run.record(update_ratio=ratio)
    assert run.rules() == (["update_ratio_too_large"] if told else [])


@pytest.mark.parametrize(
    ("ratios", "loss", "guess", "told"),
    [
        pytest.param([0.6] + [0.11] * 20, 1.51, 0.5, True, id="half of them, then a tenth, and worse"),
        pytest.param([0.6] + [0.11] * 20, 1.49, 0.5, False, id="hardly worse"),
        pytest.param([0.6] + [0.11] * 20, 3.01, 0.0, True, id="worse, and a guess is not known"),
        pytest.param([0.6] + [0.11] * 20, 2.99, 0.0, False, id="not so much worse"),
        pytest.param([0.6] + [0.11] * 20, 1.51, 1.1, False, id="not worse than a guess"),
        pytest.param([0.49] + [0.11] * 20, 3.01, 0.5, False, id="less than half"),
        pytest.param([0.6] + [0.09] * 20, 3.01, 0.5, False, id="less than a tenth"),
        pytest.param([0.6] + [0.11] * 20, np.nan, 0.0, False, id="the loss is not known"),
        pytest.param([1.0] + [0.05] * 20, 0.91, 0.5, True, id="all of them, and hardly better"),
        pytest.param([0.99] + [0.05] * 20, 0.91, 0.5, False, id="not all"),
        pytest.param([1.0] + [0.05] * 20, 0.89, 0.5, False, id="all of them, and better"),
        pytest.param([1.0] + [0.05] * 20, 0.91, 0.0, False, id="all of them, and a guess is not known"),
    ],
)
def test_smaller_steps_are_too_large_where_the_loss_got_worse(ratios: list[float], loss: float, guess: float, told: bool) -> None:
    run = Run(replace(chain(4), guess=guess), [update_ratio_too_large])
    for i, ratio in enumerate(ratios):
        run.record(update_ratio=ratio, loss=loss if i else 1.0)
    assert run.rules() == (["update_ratio_too_large"] if told else [])
    if told:
        assert run.only("update_ratio_too_large").step == 0


@pytest.mark.parametrize(("size", "told"), [(0.3 / 8, True), (0.29 / 8, False)])
def test_weights_that_began_tiny_are_no_weights_that_a_step_replaced(size: float, told: bool) -> None:
    run = Run(replace(change(chain(4), lambda f: True, init_rms=size), guess=0.5), [update_ratio_too_large])
    run.record(update_ratio=1.5)
    run.records(20, update_ratio=0.05)
    assert run.rules() == (["update_ratio_too_large"] if told else [])


@pytest.mark.parametrize(
    ("ratio", "loss", "told"),
    [
        pytest.param(0.99, 0.89, False, id="on its way down"),
        pytest.param(1.0, 0.89, True, id="of order one"),
        pytest.param(0.99, 0.91, True, id="hardly below what it began with"),
    ],
)
def test_weights_that_began_tiny_are_replaced_on_their_way(ratio: float, loss: float, told: bool) -> None:
    run = Run(replace(chain(4), guess=0.5), [update_ratio_too_large])
    run.record(update_ratio=ratio)
    run.records(20, update_ratio=ratio, loss=loss)
    assert run.rules() == (["update_ratio_too_large"] if told else [])


def test_one_step_that_replaced_the_weights_is_told_where_it_was() -> None:
    run = Run(chain(4))
    run.records(3)
    run.record(update_ratio=5.0)
    run.records(16)
    alert = run.only("update_ratio_too_large")
    assert (alert.step, run.sent[0][0]) == (3, 14)
    assert alert.message == "an update changes the weights by 5 of their size"
    assert alert.evidence["usual_update_ratio"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("ratios", "step"),
    [
        pytest.param([0.1] * 3 + [0.4] + [0.1] * 20 + [0.4] * 10, 24, id="after a single large one"),
        pytest.param([0.1] * 3 + [0.4] * 30, 3, id="long ago"),
        pytest.param([0.1] * 15 + [0.4, 0.1, 0.4, 0.4, 0.1, 0.4, 0.4, 0.4, 0.4, 0.4], 15, id="with gaps"),
        pytest.param([2.5] + [0.4] * 20, 0, id="at once, and sustained"),
        pytest.param([0.1] * 5 + [2.5] + [0.1] * 5 + [3.0] + [0.1] * 10, 5, id="at once, twice"),
    ],
)
def test_since_when(ratios: list[float], step: int) -> None:
    run = Run(chain(4), [])
    for ratio in ratios:
        run.record(update_ratio=ratio)
    assert next(iter(update_ratio_too_large(run.history))).step == step


def test_a_small_matrix_whose_steps_were_larger_before_does_not_say_since_when() -> None:
    run = Run(meta := chain(4), [update_ratio_too_large])
    weights = of(meta, "1", value=0.01, others=5.0)
    run.records(20, update_ratio=of(meta, "1", value=4.0, others=0.1), weight_norm=weights)
    assert run.alarms() == []
    run.records(10, update_ratio=of(meta, "1", value=4.0, others=0.5), weight_norm=weights)
    assert run.only("update_ratio_too_large").step == 20


@pytest.mark.parametrize(
    ("meta", "columns"),
    [
        pytest.param(chain(4), {"update_ratio": np.array([1e-3, 50.0] * 4)}, id="vectors"),
        pytest.param(
            chain(4),
            {"update_ratio": np.array([50.0] * 2 + [1e-3] * 6), "weight_norm": np.array([0.01] * 2 + [5.0] * 6)},
            id="small",
        ),
        pytest.param(
            change(chain(4), lambda f: f.name == "1.weight", init_rms=0.0),
            {"update_ratio": np.array([1e-3] * 2 + [50.0] + [1e-3] * 5)},
            id="began at zero",
        ),
        pytest.param(change(chain(4), lambda f: True, trainable=False), {"update_ratio": 1.0}, id="frozen"),
        pytest.param(change(chain(4), lambda f: True, owner=None), {"update_ratio": 1.0}, id="owned by no optimizer"),
        pytest.param(chain(4), {"update_ratio": 1.0, "weight_norm": 0.0}, id="weights of zero"),
        pytest.param(chain(4), {"update_ratio": 1.0, "weight_norm": np.nan}, id="weights not known"),
    ],
)
def test_what_is_no_measure_of_the_weights_as_a_whole(meta: Meta, columns: dict[str, Any]) -> None:
    run = Run(meta, [update_ratio_too_large])
    run.records(30, **columns)
    assert run.alarms() == []
    assert run.notices == []


@pytest.mark.parametrize(
    ("loss", "guess", "told"),
    [
        pytest.param(0.89, 0.0, False, id="below what it began with"),
        pytest.param(0.91, 0.0, True, id="hardly below"),
        pytest.param(0.8, 0.5, True, id="not below a guess"),
        pytest.param(0.4, 0.5, False, id="below a guess too"),
    ],
)
def test_runs_that_learn_all_the_same_are_left_alone(loss: float, guess: float, told: bool) -> None:
    run = Run(replace(chain(4), guess=guess), [update_ratio_too_large])
    run.record(update_ratio=1.0)
    run.records(20, update_ratio=1.0, loss=loss)
    assert run.rules() == (["update_ratio_too_large"] if told else [])


@pytest.mark.parametrize(("after", "told"), [pytest.param(0.31, True, id="harm"), pytest.param(0.29, False, id="hardly any")])
def test_a_step_that_did_harm_is_told_though_the_run_has_learnt(after: float, told: bool) -> None:
    run = Run(chain(4), [update_ratio_too_large])
    run.records(10)
    run.records(15, loss=0.1, update_ratio=0.25)  # so large that what comes is no jump
    run.record(loss=after, update_ratio=2.4)
    run.records(8, loss=after)
    assert run.rules() == (["update_ratio_too_large"] if told else [])
    if told:
        assert (run.only("update_ratio_too_large").step, run.sent[0][0]) == (25, 26)


@pytest.mark.parametrize(
    ("before", "told"), [pytest.param([1.0] * 5, True, id="five"), pytest.param([np.nan] * 6 + [1.0] * 4, False, id="four")]
)
def test_of_harm_is_spoken_where_five_losses_went_before(before: list[float], told: bool) -> None:
    run = Run(chain(4), [update_ratio_too_large])
    run.records(10, loss=1e3)
    for loss in [*[np.nan] * 10, *before]:
        run.record(loss=loss, update_ratio=0.25)
    run.records(10, loss=50.0, update_ratio=2.4)
    assert run.rules() == (["update_ratio_too_large"] if told else [])


def test_a_loop_that_never_shows_a_loss_is_left_alone() -> None:
    run = Run(chain(4))
    run.records(30, update_ratio=1.0, loss=np.nan, loss_terms=0)
    assert run.alarms() == []


@pytest.mark.parametrize("ratio", [1.0, 1e-9])
@pytest.mark.parametrize("unknown", ["update_ratio", "weight_norm"])
def test_matrices_of_which_not_all_is_known_are_left_out(unknown: str, ratio: float) -> None:
    run = Run(meta := chain(4), [update_ratio_too_large, update_ratio_too_small])
    columns = {"update_ratio": of(meta, value=ratio, others=ratio), "weight_norm": of(meta, value=5.0, others=5.0)}
    columns[unknown][0] = np.nan
    run.records(16, **columns)
    (alert,) = run.alarms()
    assert alert.evidence["update_ratio"] == pytest.approx(ratio)
    if alert.rule == "update_ratio_too_small":
        assert alert.evidence["gradient_ratio"] == pytest.approx(0.2, rel=0.3)


def test_frozen_parameters_are_not_named() -> None:
    run = Run(change(chain(4), lambda f: f.layer == "1", trainable=False))
    run.records(16, update_ratio=1.0)
    assert run.only("update_ratio_too_large").layers == ("",)


def two_optimizers() -> Meta:
    one, other = chain(2, prefix="a."), change(chain(2, prefix="b."), lambda f: True, owner="Adam#1")
    return Meta(one.parameters + other.parameters, one.layers + other.layers[1:])


def test_of_several_optimizers_the_one_that_steps_too_far_is_told() -> None:
    run = Run(meta := two_optimizers())
    run.records(16, update_ratio=of(meta, "b.0", "b.1", value=1.0, others=1e-3), lr=of(meta, "b.0", "b.1", value=3.0, others=0.1))
    alert = run.only("update_ratio_too_large")
    assert alert.layers == ("b.0", "b.1")
    assert alert.evidence["lr"] == 3.0


def test_of_several_learning_rates_the_largest_is_told() -> None:
    run = Run(meta := chain(4))
    run.records(16, update_ratio=1.0, lr=of(meta, "1", value=3.0, others=np.nan))
    assert run.only("update_ratio_too_large").evidence["lr"] == 3.0


def test_steps_that_stay_too_large_stay_one_incident_where_one_update_in_ten_is_looked_at() -> None:
    run = Run(chain(4))
    for i in range(300):
        look = i < 64 or i % 10 == 0
        run.record(update_ratio=0.5 if look else np.nan, weight_norm=5.0 if look else np.nan)
    alert = run.only("update_ratio_too_large")
    assert (alert.state, alert.step, alert.last_step) == ("open", 0, 290)


def test_it_ends_once_the_loss_falls() -> None:
    run = Run(chain(4))
    run.records(20, update_ratio=0.5)
    run.records(30, loss=0.5)
    alert = run.only("update_ratio_too_large")
    assert (alert.state, alert.step) == ("ended", 0)
    assert [a.state for _, a in run.sent] == ["open", "ended"]


# -- update_ratio_too_small --------------------------------------------------------------------------------------------------------


def test_steps_that_change_next_to_nothing_are_told_at_update_10() -> None:
    run = Run(chain(4))
    run.records(12, update_ratio=2e-9, lr=1e-8, noise=0.0)
    alert = run.only("update_ratio_too_small")
    assert (alert.severity, alert.step, run.sent[0][0]) == (Severity.WARNING, 0, 10)
    assert (alert.layers, alert.parameters) == (("",), ())
    assert alert.message == "an update changes the weights by 2e-09 of their size, and the loss does not improve"
    assert alert.evidence == pytest.approx({"update_ratio": 2e-9, "lr": 1e-8, "gradient_ratio": 0.2})
    assert alert.cause == "At a learning rate of 1e-08 the steps are too small to change anything."
    assert alert.remedy == "Raise the learning rate about 1e6 times, to where an update changes about 1e-3 of the weights."


def test_the_gradient_is_that_of_the_last_record_as_far_as_it_is_known() -> None:
    run = Run(meta := chain(4), [update_ratio_too_small])
    run.records(12, update_ratio=1e-9)
    run.record(of(meta, "1", value=np.nan, others=2.0), noise=0.0, update_ratio=1e-9)
    assert run.only("update_ratio_too_small").evidence["gradient_ratio"] == pytest.approx(2.0 / 5.0)


def test_small_steps_that_are_first_looked_at_a_little_later_were_there_from_the_start() -> None:
    run = Run(chain(4), [update_ratio_too_small])
    run.records(5, update_ratio=np.nan)
    run.records(10, update_ratio=1e-9)
    assert run.only("update_ratio_too_small").step == 0


def test_a_small_factor_is_written_out() -> None:
    run = Run(chain(4))
    run.records(12, update_ratio=0.9e-6)
    assert "about 1000 times" in run.only("update_ratio_too_small").remedy


def test_of_an_unknown_learning_rate_nothing_is_said() -> None:
    run = Run(chain(4))
    run.records(12, update_ratio=1e-8, lr=np.nan)
    alert = run.only("update_ratio_too_small")
    assert alert.cause == "The steps are too small to change anything."
    assert "lr" not in alert.evidence


@pytest.mark.parametrize(("norm", "faint"), [pytest.param(4.9e-6, True, id="faint"), pytest.param(5.1e-6, False, id="not faint")])
def test_a_gradient_that_is_next_to_nothing_is_to_blame_for_small_steps(norm: float, faint: bool) -> None:
    run = Run(chain(4), [update_ratio_too_small])
    run.records(12, norm, update_ratio=1e-9, noise=0.0)
    alert = run.only("update_ratio_too_small")
    assert alert.cause.startswith("The gradient is 1e-06 of the weights" if faint else "At a learning rate of")
    assert ("stands between these weights and the loss" in alert.remedy) is faint


@pytest.mark.parametrize(("records", "told"), [(9, False), (10, True)])
def test_a_block_that_ends_early_has_10_updates_of_small_steps_judged(records: int, told: bool) -> None:
    run = Run(chain(4))
    run.records(records, update_ratio=1e-9)
    run.history.ended = True
    run.judge()
    assert run.rules() == (["update_ratio_too_small"] if told else [])


@pytest.mark.parametrize(
    ("ratios", "told"),
    [
        pytest.param([0.99e-5] * 12, True, id="negligible"),
        pytest.param([1.01e-5] * 12, False, id="small"),
        pytest.param([1e-9] * 5 + [2e-4] + [1e-9] * 20, False, id="one look that is larger"),
        pytest.param([0.9e-4] + [1e-9] * 20, True, id="one look that is a little larger"),
        pytest.param([2e-4] + [1e-9] * 150, False, id="one look, long ago"),
        pytest.param([1e-3] * 100 + [1e-9] * 200, False, id="after a training"),
        pytest.param([np.nan] * 5 + [1e-9] * 9, False, id="nine looks"),
        pytest.param([np.nan] * 5 + [1e-9] * 10, True, id="ten looks"),
        pytest.param([0.0] * 20, False, id="nothing at all"),
        pytest.param([np.nan] * 20, False, id="not looked at"),
    ],
)
def test_how_small_and_for_how_long(ratios: list[float], told: bool) -> None:
    run = Run(replace(chain(4), criterion="cross_entropy", guess=1.0), [update_ratio_too_small])
    for ratio in ratios:
        run.record(update_ratio=ratio)
    assert run.rules() == (["update_ratio_too_small"] if told else [])


@pytest.mark.parametrize(
    ("ratio", "told"), [pytest.param(0.99e-4, True, id="it does not"), pytest.param(1.01e-4, False, id="it does")]
)
@pytest.mark.parametrize("name", ["1.weight", "blank"])
def test_a_single_matrix_that_moves_shows_that_the_optimizer_does(name: str, ratio: float, told: bool) -> None:
    meta = change(chain(4), lambda f: f.name == "2.weight", name="blank", init_rms=0.0)
    run = Run(meta, [update_ratio_too_small])
    weights = of(meta, name, value=1e-3, others=5.0)
    run.records(12, update_ratio=of(meta, name, value=ratio, others=1e-9), weight_norm=weights)
    assert run.rules() == (["update_ratio_too_small"] if told else [])


@pytest.mark.parametrize(("ratio", "told"), [(0.99e-6, True), (1.01e-6, False)])
@pytest.mark.parametrize("guess", [1.2, 0.0], ids=["better than a guess", "who knows"])
def test_what_may_be_better_than_a_guess_is_changed_with_care(guess: float, ratio: float, told: bool) -> None:
    run = Run(replace(chain(4), criterion="cross_entropy", guess=guess), [update_ratio_too_small])
    run.records(12, update_ratio=ratio, loss=1.0)
    assert run.rules() == (["update_ratio_too_small"] if told else [])


@pytest.mark.parametrize(
    ("before", "ratio", "after", "told"),
    [
        pytest.param([0.03] * 10, 0.31, [1.6] * 5, True, id="a jump"),
        pytest.param([0.03] * 10, 0.29, [1.6] * 5, False, id="not so far"),
        pytest.param([0.032] * 10, 0.31, [1.6] * 5, False, id="not so much larger"),
        pytest.param([0.03] * 9, 0.31, [1.6] * 5, False, id="at the beginning"),
        pytest.param([0.03] * 10, 0.31, [1.6] * 4, False, id="not known yet"),
        pytest.param([0.03] * 10, 0.31, [1.4] + [1.6] * 9, False, id="no harm at first"),
        pytest.param([0.03] * 10, 0.31, [1.6] * 5 + [1.4] * 5, True, id="told, though it recovers"),
        pytest.param([0.03] * 10, 0.31, [np.nan] * 5, True, id="a loss that is lost"),
    ],
)
def test_steps_that_become_large_in_mid_training(before: list[float], ratio: float, after: list[float], told: bool) -> None:
    run = Run(chain(4), [update_ratio_too_large])
    for each in before:
        run.record(update_ratio=each, loss=1.0)
    run.record(update_ratio=ratio, loss=1.0)
    for loss in after:
        run.record(update_ratio=0.03, loss=loss)
    assert run.rules() == (["update_ratio_too_large"] if told else [])
    if told:
        alert = run.only("update_ratio_too_large")
        assert (alert.step, run.sent[0][0]) == (len(before), len(before) + 6)
        assert alert.evidence["update_ratio"] == pytest.approx(ratio)


def test_large_steps_that_mend_what_has_changed_are_none() -> None:
    run = Run(chain(4), [update_ratio_too_large])
    run.records(12, update_ratio=0.03, loss=1.0)
    run.record(update_ratio=0.5, loss=2.0)  # another task: the step comes after this loss
    run.records(8, update_ratio=0.03, loss=1.8)
    assert run.rules() == []


def test_vectors_that_move_show_nothing() -> None:
    run = Run(meta := chain(4), [update_ratio_too_small])
    run.records(12, update_ratio=of(meta, *(f"{i}.bias" for i in range(4)), value=1e-2, others=1e-9))
    assert run.rules() == ["update_ratio_too_small"]


@pytest.mark.parametrize(("rise", "told"), [(1.49, True), (1.51, False)])
def test_an_optimizer_that_finds_its_step_by_itself_is_waited_for(rise: float, told: bool) -> None:
    run = Run(chain(4), [update_ratio_too_small])
    run.records(5, update_ratio=1e-8)
    run.records(5, update_ratio=rise * 1e-8)
    assert run.rules() == (["update_ratio_too_small"] if told else [])


def test_what_another_optimizer_moves_does_not_matter() -> None:
    run = Run(meta := two_optimizers())
    run.records(12, update_ratio=of(meta, "a.0", "a.1", value=1e-9, others=1e-3))
    assert run.only("update_ratio_too_small").layers == ("a.0", "a.1")


@pytest.mark.parametrize(
    ("rate", "told"), [pytest.param(lambda i: 1e-9 * 1.02**i, False, id="rises"), pytest.param(lambda i: 1e-9, True, id="does not")]
)
def test_a_warm_up_is_none(rate: Any, told: bool) -> None:
    run = Run(chain(4), [update_ratio_too_small])
    for i in range(30):
        run.record(update_ratio=1e-9, lr=rate(i))
    assert run.rules() == (["update_ratio_too_small"] if told else [])


@pytest.mark.parametrize(("rise", "told"), [(1.009, True), (1.011, False)])
def test_a_learning_rate_has_to_rise_by_a_hundredth(rise: float, told: bool) -> None:
    run = Run(chain(4), [update_ratio_too_small])
    run.record(update_ratio=1e-9, lr=1.0)
    run.records(20, update_ratio=1e-9, lr=rise)
    assert run.rules() == (["update_ratio_too_small"] if told else [])


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        pytest.param(lambda i: 1.0, True, id="stuck"),
        pytest.param(lambda i: 0.97**i, False, id="improves"),
        pytest.param(lambda i: 0.7**i, False, id="low"),
        pytest.param(lambda i: -1.0, False, id="negative"),
        pytest.param(lambda i: np.nan, False, id="not known"),
    ],
)
def test_the_loss_has_to_be_known_and_stuck(loss: Any, told: bool) -> None:
    run = Run(chain(4), [update_ratio_too_small])
    for i in range(20):
        run.record(update_ratio=1e-9, loss=loss(i))
    assert run.rules() == (["update_ratio_too_small"] if told else [])


def test_small_steps_stay_one_incident_where_one_update_in_ten_is_looked_at_and_end_when_they_grow() -> None:
    run = Run(chain(4))
    for i in range(300):
        look = i < 64 or i % 10 == 0
        run.record(update_ratio=1e-9 if look else np.nan, weight_norm=5.0 if look else np.nan)
    alert = run.only("update_ratio_too_small")
    assert (alert.state, alert.step, alert.count) == ("open", 0, 291)
    run.records(20)
    alert = run.only("update_ratio_too_small")
    assert (alert.state, alert.last_step) == ("ended", 299)
    assert [a.state for _, a in run.sent] == ["open", "ended"]


def test_where_the_beginning_is_not_kept_small_steps_began_with_what_is() -> None:
    run = Run(chain(2), [])
    run.records(600, update_ratio=1e-9)
    assert next(iter(update_ratio_too_small(run.history))).step == 600 - 512


# -- histories in which next to nothing is known -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 3e38, -1.0])
def test_no_value_upsets_them(value: float) -> None:
    one = Meta((ParameterFact("w", "", (4, 4), owner="SGD#0"),))
    for meta in (Meta(), one, chain(2)):
        run = Run(meta, [frozen_weights, update_ratio_too_large, update_ratio_too_small])
        run.judge()
        run.records(12, update_ratio=value, weight_norm=value, lr=value, loss=value, grad_state=np.uint8(SAME))
        run.history.ended = True
        run.judge()
        assert run.notices == []
