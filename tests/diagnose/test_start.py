"""What is wrong from the first update: a loss that normalises twice, initialisations, inputs; and what only looks like it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradwatch.diagnose.rules import double_softmax, poor_init, unnormalized_input
from gradwatch.history import LayerFact, Meta, ParameterFact
from gradwatch.records import GradState, Severity
from tests.diagnose.runs import STEPPED, Run, chain, change

# -- double_softmax ----------------------------------------------------------------------------------------------------------------


def squashed(function: str = "softmax", by: str = "3", classes: int = 10) -> Meta:
    meta = change(chain(4), lambda f: f.name == "3.weight", shape=(classes, 64))
    return replace(meta, squashed=function, squashed_by=by)


def test_a_softmax_before_the_losss_own_is_told_after_one_update() -> None:
    run = Run(squashed())
    run.record()
    alert = run.only("double_softmax")
    assert (alert.severity, alert.step, alert.layers, alert.parameters) == (Severity.WARNING, 0, ("3",), ())
    assert alert.message == "the loss applies a softmax to the softmax of 3: no class can get more than 23%"
    assert alert.evidence == {"classes": 10.0, "highest_probability": pytest.approx(np.e / (np.e + 9))}
    assert alert.cause.startswith("cross_entropy takes logits and applies the softmax itself")
    assert alert.remedy.startswith("Leave out the softmax")


def test_a_sigmoid_before_a_loss_with_logits_is_told_without_a_ceiling() -> None:
    run = Run(squashed("sigmoid", classes=2))
    run.record()
    alert = run.only("double_softmax")
    assert alert.message == "the loss applies a sigmoid to the sigmoid of 3"
    assert alert.evidence == {}
    assert alert.cause.startswith("binary_cross_entropy_with_logits takes logits and applies the sigmoid itself")
    assert alert.remedy.startswith("Leave out the sigmoid")


def test_a_softmax_in_the_losss_own_code_names_the_root() -> None:
    run = Run(squashed(by=""))
    run.record()
    alert = run.only("double_softmax")
    assert alert.layers == ("",)
    assert "the softmax of the model's output" in alert.message


@pytest.mark.parametrize(
    "meta",
    [
        pytest.param(squashed(classes=1), id="one class"),
        pytest.param(replace(squashed(), layers=tuple(replace(f, role="") for f in squashed().layers)), id="no head is known"),
        pytest.param(
            replace(squashed(), layers=tuple(replace(f, role="head") if f.name == "0" else f for f in squashed().layers)),
            id="heads of different widths",
        ),
    ],
)
def test_where_the_classes_are_not_known_nothing_is_said_of_them(meta: Meta) -> None:
    run = Run(meta)
    run.record()
    alert = run.only("double_softmax")
    assert alert.message == "the loss applies a softmax to the softmax of 3"
    assert alert.evidence == {}


def test_two_classes_have_a_ceiling_too() -> None:
    run = Run(squashed(classes=2))
    run.record()
    assert run.only("double_softmax").message.endswith("no class can get more than 73%")


def test_what_the_graph_does_not_show_is_none() -> None:
    """Attention, gates, log-softmaxes of logarithms and compiled code leave `squashed` empty; what does is tested with the capture."""
    run = Run(squashed(function=""))
    run.records(20)
    assert run.alarms() == []


def test_before_the_first_record_has_closed_nothing_is_said() -> None:
    run = Run(squashed())
    run.history.ended = True
    run.judge()
    assert run.incidents.alerts == ()


@pytest.mark.parametrize(("since", "step"), [(0, 0), (8, 0), (16, 7)])
def test_a_softmax_that_comes_later_began_at_most_ten_records_before_it_was_seen(since: int, step: int) -> None:
    run = Run(replace(squashed(), squashed_since=since))
    run.records(20)
    assert run.only("double_softmax").step == step


def test_it_is_one_incident_that_ends_when_the_model_is_mended() -> None:
    run = Run(squashed())
    run.records(30)
    assert run.only("double_softmax").count == 30
    run.history.set_meta(squashed(function=""))
    run.records(20)
    alert = run.only("double_softmax")
    assert (alert.state, alert.last_step, alert.count) == ("ended", 29, 30)
    assert len(run.sent) == 2


# -- poor_init: symmetry -----------------------------------------------------------------------------------------------------------


def equal(*names: str, layers: int = 4, zero: bool = False) -> Meta:
    """A chain some matrices of which began with equal rows and have them still."""
    rms = 0.0 if zero else 0.1
    return change(chain(layers), lambda f: f.name in names, equal_rows=True, still_equal=True, init_rms=rms)


def test_rows_that_stay_equal_are_told_at_update_10() -> None:
    run = Run(equal("1.weight"))
    run.records(12)
    alert = run.only("poor_init")
    assert (alert.severity, alert.step, run.sent[0][0]) == (Severity.WARNING, 0, 10)
    assert (alert.layers, alert.parameters) == (("1",), ("1.weight",))
    assert alert.message == "all 64 rows of 1.weight began equal and are equal still: they act as one unit"
    assert alert.evidence == {"matrices": 1.0, "rows": 64.0, "zero": 0.0}
    assert alert.cause.startswith("Units with the same weights compute the same")
    assert alert.remedy.startswith("Initialise with kaiming_normal_ or xavier_normal_; constants are for biases")


def test_several_such_matrices_are_named_in_the_order_of_execution() -> None:
    meta = equal("0.weight", "1.weight", "2.weight")
    meta = change(meta, lambda f: f.layer == "0", order=None)
    meta = change(meta, lambda f: f.name == "1.weight", order=5, shape=(16, 64))
    meta = change(meta, lambda f: f.name == "2.weight", order=2)
    run = Run(meta, [poor_init])
    run.records(10)
    alert = run.only("poor_init")
    assert (alert.layers, alert.parameters) == (("2", "1", "0"), ("2.weight", "1.weight", "0.weight"))
    assert alert.message == "the rows of 3 matrices began equal and are equal still: each acts as one unit"
    assert alert.evidence == {"matrices": 3.0, "rows": 64.0, "zero": 0.0}


@pytest.mark.parametrize(("records", "told"), [(9, False), (10, True)])
def test_a_block_that_ends_early_is_judged_from_10_updates_on(records: int, told: bool) -> None:
    run = Run(equal("1.weight"))
    run.records(records)
    run.history.ended = True
    run.judge()
    assert run.rules() == (["poor_init"] if told else [])


def column(meta: Meta, name: str, value: float, others: float = 1.0) -> Any:
    return np.array([value if f.name == name else others for f in meta.parameters])


def test_equal_rows_that_began_at_zero_and_get_a_gradient_are_told_as_such() -> None:
    run = Run(equal("1.weight", zero=True))
    run.records(10)
    alert = run.only("poor_init")
    assert alert.message == "all 64 rows of 1.weight began at zero and are equal still: they act as one unit"
    assert alert.evidence["zero"] == 1.0


def test_several_matrices_that_began_at_zero_are_told_as_such() -> None:
    run = Run(equal("1.weight", "2.weight", zero=True), [poor_init])
    run.records(10)
    assert run.only("poor_init").message.startswith("the rows of 2 matrices began at zero")


def test_equal_rows_of_which_some_began_at_zero_did_not_begin_at_zero() -> None:
    run = Run(change(equal("1.weight", "2.weight"), lambda f: f.name == "1.weight", init_rms=0.0), [poor_init])
    run.records(10)
    assert run.only("poor_init").message.startswith("the rows of 2 matrices began equal")


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        pytest.param(lambda i: 1.0, True, id="the loss is stuck"),
        pytest.param(lambda i: 0.95**i, False, id="the loss improves"),
        pytest.param(lambda i: 0.7**i, False, id="the loss is low"),
        pytest.param(lambda i: np.nan, False, id="the loss is not known"),
    ],
)
def test_zeros_that_get_no_gradient_at_all_are_a_fault_while_the_loss_does_not_improve(loss: Any, told: bool) -> None:
    run = Run(meta := equal("1.weight", zero=True), [poor_init])
    for i in range(20):
        run.record(column(meta, "1.weight", 0.0), loss=loss(i))
    assert run.rules() == (["poor_init"] if told else [])


def test_zeros_that_get_no_gradient_wait_for_what_the_loss_does() -> None:
    run = Run(meta := equal("1.weight", zero=True), [poor_init])
    run.records(20, column(meta, "1.weight", 0.0))
    assert run.sent[0][0] == 14


def test_zeros_that_get_no_gradient_are_one_incident_that_ends_when_the_loss_improves() -> None:
    run = Run(meta := equal("1.weight", zero=True), [poor_init])
    run.records(20, column(meta, "1.weight", 0.0))
    run.records(40, column(meta, "1.weight", 0.0), loss=0.5)
    alert = run.only("poor_init")
    assert (alert.state, alert.step) == ("ended", 0)
    assert [a.state for _, a in run.sent] == ["open", "ended"]


def test_equal_rows_that_get_a_gradient_of_exactly_zero_may_be_meant() -> None:
    run = Run(meta := equal("1.weight"), [poor_init])
    run.records(30, column(meta, "1.weight", 0.0))
    assert run.alarms() == []


@pytest.mark.parametrize("nonzero", [pytest.param(2, id="at the start"), pytest.param(29, id="in the end")])
def test_a_gradient_that_was_other_than_zero_at_the_start_or_in_the_end_is_one(nonzero: int) -> None:
    run = Run(meta := equal("1.weight"), [poor_init])
    for i in range(30):
        run.record(column(meta, "1.weight", float(i == nonzero)))
    assert run.only("poor_init").count == 30 - max(9, nonzero)


@pytest.mark.parametrize(
    ("reached", "stepped", "norm", "told"),
    [
        pytest.param(5, 5, 1.0, True, id="five times"),
        pytest.param(4, 5, 1.0, False, id="reached four times"),
        pytest.param(5, 4, 1.0, False, id="stepped four times"),
        pytest.param(6, 6, 0.0, False, id="a gradient of exactly zero, seen less than ten times"),
    ],
)
def test_a_matrix_that_is_used_now_and_then_needs_a_few_steps(reached: int, stepped: int, norm: float, told: bool) -> None:
    run = Run(meta := equal("1.weight"), [poor_init])
    for i in range(10):
        state = column(meta, "1.weight", (i < reached) + 8 * (i < stepped), STEPPED).astype(np.uint8)
        run.record(column(meta, "1.weight", norm if i < reached else np.nan), grad_state=state)
    assert run.rules() == (["poor_init"] if told else [])


def test_matrices_that_no_optimizer_steps_are_none() -> None:
    run = Run(meta := change(equal("1.weight"), lambda f: f.name == "1.weight", owner=None), [poor_init])
    run.records(30, grad_state=column(meta, "1.weight", GradState.REACHED, STEPPED).astype(np.uint8))
    assert run.alarms() == []


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param({"equal_rows": True, "still_equal": False, "init_rms": 0.0}, id="zeros that training fills"),
        pytest.param({"shape": (1, 64), "equal_rows": False, "still_equal": False}, id="one row"),
        pytest.param({"equal_rows": True, "still_equal": True, "trainable": False}, id="frozen"),
        pytest.param({"init_rms": 100.0}, id="a size that only makes gradients explode"),
        pytest.param({"init_rms": 1e-6}, id="a size that only makes gradients vanish"),
    ],
)
def test_matrices_that_only_look_like_it(facts: dict[str, Any]) -> None:
    run = Run(change(chain(4), lambda f: f.name == "1.weight", **facts), [poor_init])
    run.records(30)
    assert run.alarms() == []


# -- poor_init: output -------------------------------------------------------------------------------------------------------------


def guessing(gain: float = 16.0, matrices: tuple[str, ...] = ("3.weight",), guess: float = 2.0, **facts: Any) -> Meta:
    """A classifier some matrices of which enlarge what passes them so much; the others 0.8 times."""
    meta = change(chain(4), lambda f: f.name in matrices, init_rms=gain / 8)
    return replace(meta, **({"criterion": "cross_entropy", "guess": guess} | facts))


def test_a_first_loss_far_from_a_guess_is_told_at_update_10() -> None:
    run = Run(guessing())
    run.records(12, loss=40.0)
    alert = run.only("poor_init")
    assert (alert.severity, alert.step, run.sent[0][0]) == (Severity.WARNING, 0, 10)
    assert (alert.layers, alert.parameters) == (("3",), ("3.weight",))
    assert alert.message == "the first loss was 40, 20 times that of a guess (2)"
    assert alert.evidence == {"first_loss": 40.0, "guess": 2.0}
    assert alert.cause == "The weights of 3 are so large that the network begins certain and wrong."
    assert "std 0.02" in alert.remedy


@pytest.mark.parametrize(
    ("meta", "first", "later", "told"),
    [
        pytest.param(guessing(), 12.1, 12.1, True, id="six times"),
        pytest.param(guessing(), 11.9, 11.9, False, id="not quite"),
        pytest.param(guessing(), 40.0, 6.0, True, id="three times at the end"),
        pytest.param(guessing(), 40.0, 5.9, False, id="training has put it right"),
        pytest.param(guessing(1.5), 20.0, 20.0, True, id="a gain of 1.5"),
        pytest.param(guessing(1.49), 20.0, 20.0, False, id="a usual gain"),
        pytest.param(guessing(2.0), 120.0, 120.0, True, id="a gain that explains it"),
        pytest.param(guessing(2.0), 121.0, 121.0, False, id="a gain that does not"),
        pytest.param(guessing(2.0, ("2.weight", "3.weight")), 240.0, 240.0, True, id="two gains that explain it"),
        pytest.param(guessing(8.0, ("0.weight", "1.weight", "2.weight")), 40.0, 40.0, True, id="three matrices"),
        pytest.param(guessing(8.0, tuple(f"{i}.weight" for i in range(4))), 40.0, 40.0, True, id="all four matrices"),
        pytest.param(guessing(16.0, ("3.bias",)), 40.0, 40.0, False, id="a vector"),
        pytest.param(guessing(criterion="nll_loss"), 40.0, 40.0, False, id="another loss"),
        pytest.param(guessing(criterion=""), 40.0, 40.0, False, id="an unknown loss"),
        pytest.param(guessing(guess=0.0), 40.0, 40.0, False, id="no guess"),
        pytest.param(guessing(np.nan), 40.0, 40.0, False, id="sizes not known"),
        pytest.param(guessing(), np.nan, np.nan, False, id="losses not known"),
        pytest.param(guessing(), 40.0, np.nan, True, id="lost after the first"),
        pytest.param(change(guessing(), lambda f: f.layer == "3", trainable=False), 40.0, 40.0, False, id="frozen"),
    ],
)
def test_how_far_from_a_guess_is_too_far_and_what_explains_it(meta: Meta, first: float, later: float, told: bool) -> None:
    run = Run(meta, [poor_init])
    run.record(loss=first)
    run.records(15, loss=later)
    assert run.rules() == (["poor_init"] if told else [])
    assert run.notices == []


def test_of_the_last_losses_the_median_counts() -> None:
    run = Run(guessing(), [poor_init])
    for i in range(10):
        run.record(loss=40.0 if i in (0, 3, 5, 7) else 4.0)
    assert run.alarms() == []
    assert run.notices == []


def test_the_first_loss_is_that_of_the_first_record() -> None:
    run = Run(guessing(), [poor_init])
    run.records(2, loss=2.0)
    run.records(20, loss=40.0)
    assert run.alarms() == []


def test_the_largest_matrix_is_named_first() -> None:
    meta = change(guessing(2.0, ("0.weight", "3.weight")), lambda f: f.name == "3.weight", init_rms=1.0)
    run = Run(meta, [poor_init])
    run.records(10, loss=40.0)
    alert = run.only("poor_init")
    assert (alert.layers, alert.parameters) == (("3", "0"), ("3.weight", "0.weight"))
    assert alert.cause.startswith("The weights of 3 are")


@pytest.mark.parametrize(
    ("first", "gain", "told"),
    [
        pytest.param(2000.0, 4.0, True, id="most matrices"),
        pytest.param(23.0, 4.0, False, id="not surely far"),
        pytest.param(2000.0, 1.4, False, id="of a usual size"),
    ],
)
def test_where_most_matrices_began_too_large_all_are_named(first: float, gain: float, told: bool) -> None:
    meta = guessing(gain, ("0.weight", "1.weight", "2.weight", "3.weight"))
    run = Run(meta, [poor_init])
    run.records(13, loss=first)
    assert run.rules() == []
    run.records(2, loss=first)
    assert run.rules() == (["poor_init"] if told else [])


@pytest.mark.parametrize(("exploded", "rule"), [(True, "exploding_gradient"), (False, "poor_init")])
def test_where_the_gradient_has_exploded_by_it_that_is_told_alone(exploded: bool, rule: str) -> None:
    meta = guessing(4.0, ("0.weight", "1.weight", "2.weight", "3.weight"))
    run = Run(meta)
    run.records(12, [1e5, 1e5, 1e4, 1e4, 1e2, 1e2, 1.0, 1.0] if exploded else 1.0, loss=2000.0, weight_norm=32.0)
    run.records(40, loss=2000.0)
    assert run.rules() == [rule]


@pytest.mark.parametrize(("terms", "told"), [(1.0, True), (2.0, True), (4.0, False), (np.nan, True), (0.0, True)])
def test_several_losses_an_update_begin_as_many_times_as_high(terms: float, told: bool) -> None:
    run = Run(guessing(), [poor_init])
    run.records(15, loss=40.0, loss_terms=terms)
    assert run.rules() == (["poor_init"] if told else [])


@pytest.mark.parametrize(("first", "at"), [pytest.param(24.1, 10, id="surely far"), pytest.param(23.9, 14, id="it may recover")])
def test_what_is_not_surely_far_is_waited_for(first: float, at: int) -> None:
    run = Run(guessing(), [poor_init])
    run.records(20, loss=first)
    assert run.sent[0][0] == at


@pytest.mark.parametrize(("first", "told"), [pytest.param(60.0, True, id="surely far"), pytest.param(23.0, False, id="not surely")])
def test_a_loss_that_will_soon_be_that_of_a_guess_recovers(first: float, told: bool) -> None:
    run = Run(guessing(), [poor_init])
    for i in range(20):
        run.record(loss=first * 0.9**i)
    assert run.rules() == (["poor_init"] if told else [])


def test_it_ends_once_training_has_put_it_right() -> None:
    run = Run(guessing(), [poor_init])
    run.records(12, loss=40.0)
    run.records(30, loss=2.0)
    alert = run.only("poor_init")
    assert (alert.state, alert.step) == ("ended", 0)
    assert len(run.sent) == 2


# -- unnormalized_input ------------------------------------------------------------------------------------------------------------


def inputs(meta: Meta, mean: float = 0.0, std: float = 100.0, part: float = 1.0, layer: str = "0") -> dict[str, Any]:
    """A look at inputs of which that part arrives at a layer: with the norms of `Run` a matrix of 64 rows passes 0.625 of it on."""
    rms = np.full(len(meta.layers), 1.0)
    rms[[f.name for f in meta.layers].index(layer)] = part * 0.625 * np.hypot(mean, std)
    return {"input_mean": mean, "input_std": std, "activation_rms": rms}


def test_large_inputs_of_a_run_that_does_not_learn_are_told_by_update_15() -> None:
    run = Run(meta := chain(4))
    run.records(20, **inputs(meta, 30.0, 120.0))
    alert = run.only("unnormalized_input")
    assert (alert.severity, alert.step, alert.layers, alert.parameters) == (Severity.WARNING, 0, ("",), ())
    assert run.sent[0][0] == 14
    assert alert.message == "the inputs have a mean of 30 and a standard deviation of 120, and the loss is 1, 1 at the start"
    assert alert.evidence == pytest.approx({"input_mean": 30.0, "input_std": 120.0, "input_rms": np.hypot(30.0, 120.0)})
    assert alert.cause.startswith("Inputs of this size drive the first layers far out of the range")
    assert alert.remedy.startswith("Subtract the mean and divide by the standard deviation")


@pytest.mark.parametrize(("records", "told"), [(9, False), (10, True)])
def test_a_block_that_ends_early_has_10_updates_of_inputs_judged(records: int, told: bool) -> None:
    run = Run(meta := chain(4))
    run.records(records, **inputs(meta))
    assert run.alarms() == []
    run.history.ended = True
    run.judge()
    assert run.rules() == (["unnormalized_input"] if told else [])


@pytest.mark.parametrize(
    ("mean", "std", "part", "told"),
    [
        pytest.param(0.0, 20.0, 1.0, True, id="spread of 20"),
        pytest.param(0.0, 19.9, 1.0, False, id="spread below"),
        pytest.param(-20.0, 0.0, 1.0, True, id="mean of -20"),
        pytest.param(12.1, 16.0, 1.0, True, id="both together"),
        pytest.param(0.0, 100.0, 0.101, True, id="a tenth arrives"),
        pytest.param(0.0, 100.0, 0.099, False, id="the model divides by their scale"),
        pytest.param(np.nan, np.nan, 1.0, False, id="integers, or not looked at"),
        pytest.param(np.inf, 100.0, 1.0, False, id="not finite"),
        pytest.param(0.0, 100.0, np.nan, False, id="it is not known what arrives"),
    ],
)
def test_how_large_inputs_have_to_be_and_to_arrive(mean: float, std: float, part: float, told: bool) -> None:
    run = Run(meta := chain(4), [unnormalized_input])
    run.records(20, **inputs(meta, mean, std, part))
    assert run.rules() == (["unnormalized_input"] if told else [])
    assert run.notices == []


@pytest.mark.parametrize(
    ("loss", "guess", "told"),
    [
        pytest.param(0.89, 0.0, False, id="below what it began with"),
        pytest.param(0.91, 0.0, True, id="hardly below"),
        pytest.param(0.8, 0.5, True, id="below the start, not below a guess"),
        pytest.param(0.38, 0.5, True, id="hardly below both, and began at twice a guess"),
        pytest.param(0.37, 0.5, False, id="below both"),
        pytest.param(0.59, 0.67, False, id="hardly below both, and began near a guess"),
        pytest.param(np.nan, 0.0, True, id="lost"),
    ],
)
def test_a_run_that_learns_all_the_same_is_left_alone(loss: float, guess: float, told: bool) -> None:
    run = Run(meta := replace(chain(4), guess=guess), [unnormalized_input])
    run.record(**inputs(meta), loss=1.0)
    run.records(20, **inputs(meta), loss=loss)
    assert run.rules() == (["unnormalized_input"] if told else [])


@pytest.mark.parametrize(
    ("pace", "guess", "told"),
    [
        pytest.param(0.98, 1.0, False, id="falls, near a guess"),
        pytest.param(0.98, 0.22, True, id="falls, far above a guess"),
        pytest.param(0.87, 0.22, True, id="falls, and will soon be below a guess"),
        pytest.param(0.8, 0.22, False, id="has fallen well below a guess"),
        pytest.param(0.85, 0.001, True, id="falls fast, and will not"),
    ],
)
def test_a_loss_that_still_falls_is_waited_for_unless_it_is_far_above_a_guess(pace: float, guess: float, told: bool) -> None:
    run = Run(meta := replace(chain(4), guess=guess), [unnormalized_input])
    for i in range(16):
        run.record(**inputs(meta), loss=1.3 * pace**i)
    assert run.rules() == (["unnormalized_input"] if told else [])
    if told:
        assert f"where a constant output would give {guess:.2g}" in run.only("unnormalized_input").message


@pytest.mark.parametrize(
    ("first", "then", "criterion", "guess", "told"),
    [
        pytest.param(6.1, 3.1, "mse_loss", 1.0, True, id="six times a guess, and three times still"),
        pytest.param(5.9, 3.1, "mse_loss", 1.0, False, id="not six times"),
        pytest.param(6.1, 2.9, "mse_loss", 1.0, False, id="not three times any more"),
        pytest.param(6.1, 3.1, "mse_loss", 0.0, False, id="a guess is not known"),
        pytest.param(0.7, 0.4, "binary_cross_entropy", 0.1, False, id="rare classes begin at equal odds"),
        pytest.param(4.2, 0.4, "binary_cross_entropy", 0.1, True, id="six times equal odds"),
        pytest.param(np.nan, 3.1, "mse_loss", 1.0, False, id="lost at first"),
    ],
)
def test_a_first_loss_far_from_a_guess_is_not_waited_for(
    first: float, then: float, criterion: str, guess: float, told: bool
) -> None:
    run = Run(meta := replace(chain(4), guess=guess, criterion=criterion), [unnormalized_input])
    run.record(**inputs(meta), loss=first)
    for i in range(10):
        run.record(**inputs(meta), loss=then * (1.02 - 0.002 * i))
    assert run.rules() == (["unnormalized_input"] if told else [])


def test_a_loss_that_has_been_lost_is_told_as_that() -> None:
    run = Run(meta := chain(4), [unnormalized_input])
    run.record(**inputs(meta))
    run.records(15, **inputs(meta), loss=np.nan)
    assert run.only("unnormalized_input").message.endswith(", and the loss is lost")


@pytest.mark.parametrize(
    ("shut", "std", "told"),
    [
        pytest.param([9e-6] * 10, 120.0, True, id="next to nothing"),
        pytest.param([1.1e-5] * 10, 120.0, False, id="more than that"),
        pytest.param([9e-6] * 9 + [1.0], 120.0, False, id="not in all updates"),
        pytest.param([9e-6] * 10, 1.0, False, id="of usual inputs"),
        pytest.param([0.0] * 10, 120.0, True, id="nothing"),
    ],
)
def test_inputs_that_shut_the_layer_that_reads_them_are_told_though_the_loss_falls(
    shut: list[float], std: float, told: bool
) -> None:
    run = Run(meta := chain(4), [unnormalized_input])
    first = np.array([f.layer == "0" for f in meta.parameters])
    for i, each in enumerate(shut):
        run.record(np.where(first, each, 1.0), noise=0.0, loss=1.0 - 0.08 * i, **inputs(meta, 0.0, std))
    assert run.rules() == (["unnormalized_input"] if told else [])


def test_a_recurrent_layer_bounds_what_it_puts_out_whatever_it_is_given() -> None:
    meta = chain(4)
    meta = replace(meta, layers=tuple(replace(f, kind="recurrent") if f.name == "0" else f for f in meta.layers))
    run = Run(meta, [unnormalized_input])
    run.records(16, **inputs(meta, part=0.001))
    assert run.rules() == ["unnormalized_input"]


@pytest.mark.parametrize("terms", [0.0, np.nan])
def test_a_run_whose_loss_is_not_known_is_left_alone(terms: float) -> None:
    run = Run(meta := chain(4), [unnormalized_input])
    run.records(20, **inputs(meta), loss=np.nan, loss_terms=terms)
    assert run.alarms() == []


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param({"kind": "normalization"}, id="a normalisation takes them"),
        pytest.param({"kind": "embedding"}, id="an embedding takes them"),
        pytest.param({"role": ""}, id="it has no role"),
    ],
)
def test_what_takes_such_inputs_may_be_made_for_them(facts: dict[str, str]) -> None:
    meta = chain(4)
    meta = replace(meta, layers=tuple(replace(f, **facts) if f.name == "0" else f for f in meta.layers))  # type: ignore[arg-type]
    run = Run(meta, [unnormalized_input])
    run.records(20, **inputs(meta))
    assert run.alarms() == []


def test_a_normalisation_may_be_the_last_that_runs() -> None:
    (root, first, _), norm = chain(2).layers, LayerFact("norm", "BatchNorm1d", "normalization")
    run = Run(meta := Meta(chain(2).parameters[:2], (root, first, norm)), [unnormalized_input])
    run.records(20, **inputs(meta))
    assert run.alarms() == []


def test_a_reader_that_holds_other_modules_is_one() -> None:
    meta = chain(4)
    meta = replace(meta, layers=(*meta.layers, LayerFact("0.dropout", "Dropout", "dropout")))
    run = Run(meta, [unnormalized_input])
    run.records(20, **inputs(meta))
    assert run.rules() == ["unnormalized_input"]
    assert run.notices == []


@pytest.mark.parametrize(("before", "told"), [("0", False), ("1", True)])
def test_a_normalisation_right_behind_the_first_layer_puts_it_right(before: str, told: bool) -> None:
    meta = chain(4)
    at = [f.name for f in meta.layers].index(before) + 1
    norm = LayerFact("norm", "BatchNorm1d", "normalization")
    meta = replace(meta, layers=(*meta.layers[:at], norm, *meta.layers[at:]))
    run = Run(meta, [unnormalized_input])
    run.records(20, **inputs(meta))
    assert run.rules() == (["unnormalized_input"] if told else [])


@pytest.mark.parametrize(("later", "told"), [(0.51, True), (0.49, False)])
def test_what_goes_past_a_normalisation_is_not_put_right_by_it(later: float, told: bool) -> None:
    meta = chain(4)
    norm = LayerFact("norm", "LayerNorm", "normalization")
    stream = LayerFact("stream", "Dropout", "dropout")
    meta = replace(meta, layers=(*meta.layers[:2], norm, *meta.layers[2:], stream))
    columns = inputs(meta)
    rms = columns["activation_rms"]
    names = [f.name for f in meta.layers]
    rms[names.index("stream")] = later * rms[names.index("0")]
    rms[names.index("")] = rms[names.index("0")]  # the root holds it
    run = Run(meta, [unnormalized_input])
    run.records(20, **columns)
    assert run.rules() == (["unnormalized_input"] if told else [])


@pytest.mark.parametrize(
    "meta",
    [
        pytest.param(change(chain(4), lambda f: f.layer == "0", shape=(64,)), id="vectors only"),
        pytest.param(Meta(chain(4).parameters[2:], chain(4).layers), id="no parameters"),
        pytest.param(Meta((), chain(4).layers), id="a model without parameters"),
    ],
)
def test_a_first_layer_without_a_matrix_says_nothing_of_its_inputs(meta: Meta) -> None:
    run = Run(meta, [unnormalized_input])
    run.records(20, **inputs(meta))
    assert run.alarms() == []


def test_one_matrix_is_a_model_too() -> None:
    meta = Meta((ParameterFact("weight", "", (8, 8), owner="SGD#0"),), (LayerFact("", "Linear", "linear", 0, "input"),))
    run = Run(meta, [unnormalized_input])
    run.records(20, input_mean=0.0, input_std=100.0, activation_rms=100.0 * 5 / 8**0.5)
    assert run.only("unnormalized_input").layers == ("",)


def test_of_several_readers_the_one_that_gets_them_as_they_are_is_at_fault() -> None:
    one, other = chain(2, prefix="a."), chain(2, prefix="b.")
    roots = (LayerFact("a", "Sequential", "container"), LayerFact("b", "Sequential", "container"))
    meta = Meta(one.parameters + other.parameters, (roots[0], *one.layers[1:], roots[1], *other.layers[1:]))
    run = Run(meta, [unnormalized_input])
    run.records(20, **inputs(meta, layer="b.0"))
    assert run.only("unnormalized_input").layers == ("b",)


def test_inputs_that_come_to_be_large_are_told_within_10_though_the_run_has_learnt() -> None:
    run = Run(meta := chain(4))
    for i in range(20):
        run.record(**inputs(meta, 0.0, 1.0), loss=0.97**i)
    run.records(10, **inputs(meta, 0.0, 100.0), loss=0.5)
    alert = run.only("unnormalized_input")
    assert (alert.step, alert.count) == (20, 9)
    assert run.sent[0][0] <= 30
    assert alert.message == "the inputs have a mean of 0 and a standard deviation of 100, 1e+02 times the size they had before"
    assert alert.evidence["input_rms_before"] == pytest.approx(1.0)


@pytest.mark.parametrize(("before", "told"), [(1.99, True), (2.01, False)])
def test_they_have_to_become_20_times_as_large(before: float, told: bool) -> None:
    run = Run(meta := chain(4), [unnormalized_input])
    run.record(loss=1.0)
    run.records(20, **inputs(meta, 0.0, before), loss=0.5)
    run.records(20, **inputs(meta, 0.0, 40.0), loss=0.5)
    assert run.rules() == (["unnormalized_input"] if told else [])


def test_one_large_batch_is_none() -> None:
    run = Run(meta := chain(4), [unnormalized_input])
    for i in range(40):
        run.record(**inputs(meta, 0.0, 100.0 if i % 4 == 3 else 1.0))
    assert run.alarms() == []


def test_the_median_of_three_looks_counts() -> None:
    run = Run(meta := chain(4), [unnormalized_input])
    for std in (*[1.0] * 11, 25.0, 25.0, 14.0):
        run.record(**inputs(meta, 0.0, std))
    assert run.only("unnormalized_input").evidence["input_std"] == 25.0


def test_a_last_batch_that_is_small_upsets_nothing() -> None:
    run = Run(meta := chain(4), [unnormalized_input])
    run.records(13, **inputs(meta))
    run.record(**(inputs(meta) | {"input_std": 1.0}))
    assert run.only("unnormalized_input").step == 0
    assert run.notices == []


def test_a_last_batch_that_is_small_again_does_not_hide_since_when_the_others_have_been_large() -> None:
    run = Run(meta := chain(4), [unnormalized_input])
    for std in (*[1.0] * 11, 100.0, 100.0, 1.0):
        run.record(**(inputs(meta) | {"input_std": std}))
    alert = run.only("unnormalized_input")
    assert alert.step == 11
    assert alert.evidence["input_rms_before"] == 1.0


def test_inputs_that_were_exactly_zero_before_have_become_no_number_of_times_as_large() -> None:
    run = Run(meta := chain(4), [unnormalized_input])
    run.records(20, **inputs(meta, 0.0, 0.0))
    run.records(20, **inputs(meta))
    alert = run.only("unnormalized_input")
    assert alert.step == 20
    assert alert.message.endswith("and the loss is 1, 1 at the start")
    assert run.notices == []


@pytest.mark.parametrize("half", ["input_mean", "input_std"])
def test_a_look_of_which_half_is_known_is_none(half: str) -> None:
    run = Run(meta := chain(4), [unnormalized_input])
    run.records(13, **inputs(meta))
    run.record(**(inputs(meta) | {half: np.nan}))
    assert run.rules() == ["unnormalized_input"]


def test_a_small_batch_among_large_ones_is_not_where_they_began() -> None:
    run = Run(meta := chain(4), [unnormalized_input])
    for i in range(30):
        run.record(**inputs(meta, 0.0, 0.1 if i == 11 else 100.0))
    alert = run.only("unnormalized_input")
    assert alert.step == 0
    assert alert.message.endswith("and the loss is 1, 1 at the start")
    assert "input_rms_before" not in alert.evidence


def test_where_one_update_in_ten_is_looked_at_the_second_look_tells() -> None:
    run = Run(meta := chain(4), [unnormalized_input])
    run.records(64, **inputs(meta, 0.0, 1.0))
    run.record(**inputs(meta))
    run.records(9)
    assert run.alarms() == []
    run.record(**inputs(meta))
    assert run.only("unnormalized_input").step == 64


def test_it_ends_when_the_inputs_are_normalised() -> None:
    run = Run(meta := chain(4), [unnormalized_input])
    run.records(20, **inputs(meta))
    run.records(30, **inputs(meta, 0.0, 1.0))
    alert = run.only("unnormalized_input")
    assert (alert.state, alert.step) == ("ended", 0)
    assert [a.state for _, a in run.sent] == ["open", "ended"]


# -- histories in which next to nothing is known -----------------------------------------------------------------------------------


def test_a_run_without_records_parameters_or_facts_upsets_none_of_them() -> None:
    rules = [double_softmax, poor_init, unnormalized_input]
    for meta in (Meta(), Meta((), (LayerFact(""),), squashed="softmax"), change(chain(1), lambda f: True, order=None, owner=None)):
        run = Run(meta, rules)
        run.judge()
        run.records(16, loss=np.nan, loss_terms=0, input_mean=1e38, input_std=1e38)
        run.history.ended = True
        run.judge()
        assert run.notices == []


@pytest.mark.parametrize("criterion", ["binary_cross_entropy", "binary_cross_entropy_with_logits"])
@pytest.mark.parametrize(
    ("guess", "first", "told"),
    [
        pytest.param(0.69, 14.0, True, id="far"),
        pytest.param(0.69, 4.1, False, id="not quite"),
        pytest.param(0.06, 0.7, False, id="rare classes begin at equal odds"),
        pytest.param(0.06, 14.0, True, id="rare classes, and far"),
    ],
)
def test_two_classes_begin_at_equal_odds(criterion: str, guess: float, first: float, told: bool) -> None:
    run = Run(replace(guessing(), criterion=criterion, guess=guess), [poor_init])
    run.records(15, loss=first)
    assert run.rules() == (["poor_init"] if told else [])


def test_adapters_of_a_frozen_base_that_begin_at_zero_are_told_by_what_they_get() -> None:
    meta = change(equal("1.weight", "2.weight", zero=True), lambda f: f.name == "0.weight", trainable=False)
    run = Run(meta, [poor_init])
    run.records(20, np.array([0.0 if f.name in ("1.weight", "2.weight") else 1.0 for f in meta.parameters]))
    assert run.alarms() == []
