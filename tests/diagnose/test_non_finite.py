"""NaN and Inf under their true names, and a loss scale that searches in vain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradwatch.diagnose.rules import non_finite_weight
from gradwatch.records import GradState, Severity, SkipReason
from tests.diagnose.runs import Run, chain, skipped

REACHED = np.uint8(GradState.REACHED | GradState.STEPPED)


def bad(columns: slice, value: float = np.nan) -> dict[str, Any]:
    """A record of four layers in which the gradients of some columns hold bad values."""
    norms, counts = np.ones(8), np.zeros(8)
    norms[columns], counts[columns] = value, 3
    return {"norms": norms, "grad_nonfinite": counts, "grad_state": REACHED, "weight_norm": 5.0}


def test_a_bad_gradient_is_told_at_once_from_the_loss_towards_the_input() -> None:
    run = Run(chain(4))
    run.records(7)
    run.record(**bad(slice(0, 4)))
    alert = run.only("non_finite_gradient")
    assert (alert.severity, alert.step, alert.layers) == (Severity.ERROR, 7, ("1", "0"))
    assert alert.parameters == ("1.bias", "1.weight", "0.bias", "0.weight")
    assert alert.evidence["elements"] == 12


def test_a_finite_gradient_whose_norm_overflows_is_none() -> None:
    run = Run(chain(4))
    run.records(3)
    run.record(np.inf, noise=0.0, grad_nonfinite=0.0, total_norm=np.inf)
    assert run.rules() == []


def test_bad_gradients_that_a_scaler_skips_are_healthy() -> None:
    run = Run(chain(4))
    for i in range(8):
        run.record(**(bad(slice(None)) | skipped(SkipReason.SCALER)), loss_scale=2.0 ** (16 - i))
    run.records(20, loss_scale=256.0)
    assert run.incidents.alerts == ()


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "Inf")])
def test_a_bad_loss_is_the_cause_of_the_gradients_it_spoils(value: float, word: str) -> None:
    run = Run(chain(4))
    run.records(5)
    run.record(**bad(slice(None)), loss=value)
    alert = run.only("non_finite_loss")
    assert (alert.step, alert.layers) == (5, ())
    assert word in alert.message


def test_a_bad_loss_in_the_first_update_is_told() -> None:
    run = Run(chain(4))
    run.record(loss=np.nan)
    assert run.only("non_finite_loss").step == 0


def test_a_loss_that_was_not_seen_is_none() -> None:
    run = Run(chain(4))
    run.records(20, loss=np.nan, loss_terms=0)
    assert run.alarms() == []


def test_a_loss_that_its_scale_made_overflow_is_none_and_a_nan_is_one_though_a_scaler_skips_it() -> None:
    """The scale does not act on the forward pass: a NaN in the loss was there before it. What overflows is recorded as not seen."""
    run = Run(chain(4))
    scaled = skipped(SkipReason.SCALER) | {"loss": np.nan, "loss_scale": 512.0}
    run.records(5)
    run.records(2, **(scaled | {"loss_terms": 0}))
    run.records(5)
    assert run.alarms() == []
    run.records(1, **scaled)
    assert run.rules() == ["non_finite_loss"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_weight_is_the_cause_of_everything_it_spoils(value: float) -> None:
    run = Run(chain(4))
    run.records(5)
    weights = np.full(8, 5.0)
    weights[4] = value
    run.record(**(bad(slice(None)) | {"weight_norm": weights}), loss=np.nan)
    alert = run.only("non_finite_weight")
    assert (alert.step, alert.parameters) == (5, ("2.weight",))


@pytest.mark.parametrize(
    ("before", "gradient", "forward", "told"),
    [
        pytest.param(5.0, 0.0, 3.0, True, id="put in after the step"),
        pytest.param(np.nan, 0.0, 3.0, False, id="not looked at before"),
        pytest.param(5.0, 2.0, 3.0, False, id="the step before spoilt them"),
        pytest.param(5.0, 0.0, 0.0, False, id="not looked at now: what they give is fine"),
    ],
)
def test_weights_that_go_bad_all_at_once_between_two_records(before: float, gradient: float, forward: float, told: bool) -> None:
    run = Run(meta := chain(4), [non_finite_weight])
    run.records(5)
    run.record(weight_norm=before, grad_nonfinite=gradient)
    run.record(**(bad(slice(None)) | {"weight_norm": np.nan}), activation_nonfinite=np.full(len(meta.layers), forward))
    assert run.rules() == (["non_finite_weight"] if told else [])
    if told:
        alert = run.only("non_finite_weight")
        assert (alert.step, alert.layers) == (6, ("",))


def test_weights_that_were_not_looked_at_are_none() -> None:
    run = Run(chain(4))
    run.records(30, weight_norm=np.nan, update_ratio=np.nan)
    assert run.alarms() == []


def test_a_diverged_loss_is_told_as_one() -> None:
    run = Run(chain(4))
    for i in range(6):
        run.record(10.0**i, loss=10.0 ** (2 * i))
    run.record(**bad(slice(None), np.inf), loss=np.inf)
    alert = next(a for a in run.alarms() if a.rule == "non_finite_loss")
    assert "diverged" in alert.cause
    assert "learning rate" in alert.remedy


# -- loss_scale_collapse -----------------------------------------------------------------------------------------------------------


def search(run: Run, skips: int, start: float = 65536.0) -> None:
    for i in range(skips):
        run.record(**(bad(slice(None)) | skipped(SkipReason.SCALER)), loss_scale=start / 2**i)


def test_a_scaler_that_only_skips_is_told_by_update_15() -> None:
    run = Run(chain(4))
    search(run, 15)
    alert = run.only("loss_scale_collapse")
    assert (alert.severity, alert.step, alert.layers) == (Severity.WARNING, 0, ())


@pytest.mark.parametrize(
    ("skips", "start"),
    [pytest.param(8, 65536.0, id="the usual one"), pytest.param(14, 2.0**24, id="from a large scale")],
)
def test_a_search_that_ends_is_healthy(skips: int, start: float) -> None:
    run = Run(chain(4))
    search(run, skips, start)
    run.records(30, loss_scale=start / 2**skips)
    assert run.incidents.alerts == ()


def test_a_scale_below_one_is_told_and_a_constant_factor_is_not() -> None:
    run = Run(chain(4))
    run.records(40, loss_scale=0.25)
    assert run.alarms() == []
    run = Run(chain(4))
    for i in range(40):
        run.record(loss_scale=64.0 / 2 ** (i // 4), **(skipped(SkipReason.SCALER) if i % 4 == 3 else {}))
    assert run.rules() == ["loss_scale_collapse"]
