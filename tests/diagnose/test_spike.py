"""One step far outside everything before it."""

from __future__ import annotations

import numpy as np
import pytest

from gradwatch.diagnose.rules import gradient_spike
from gradwatch.history import Meta
from gradwatch.records import Severity
from tests.diagnose.runs import Run, chain


@pytest.mark.parametrize("factor", [20.0, 1e3, 1e20])
def test_a_spike_is_told_at_once_and_ends_soon(factor: float) -> None:
    run = Run(chain(4))
    run.records(20)
    run.record(factor, loss=factor)
    alert = run.only("gradient_spike")
    assert (alert.severity, alert.step, alert.layers, alert.parameters, alert.count) == (Severity.WARNING, 20, ("",), (), 1)
    assert alert.evidence["ratio"] == pytest.approx(factor, rel=0.3)
    run.records(5)
    assert run.only("gradient_spike").state == "ended"


def test_a_spike_in_one_layer_names_it() -> None:
    run = Run(chain(4))
    run.records(20)
    norms = np.ones(8)
    norms[4] = 500.0
    run.record(norms, loss=2.0)
    assert run.only("gradient_spike").layers == ("2",)


@pytest.mark.parametrize(
    ("usual", "loss", "factor", "told"),
    [
        pytest.param(1.0, 1.49, 250.0, False, id="nothing comes of it"),
        pytest.param(1.0, 1.51, 250.0, True, id="the loss rises with it"),
        pytest.param(1.0, 1.0, 500.0, True, id="so large that it is one all the same"),
        pytest.param(-1.0, -1.0, 250.0, False, id="a negative loss as before"),
        pytest.param(-1.0, -0.5, 250.0, True, id="a negative loss that rises"),
    ],
)
def test_a_gradient_that_jumps_alone(usual: float, loss: float, factor: float, told: bool) -> None:
    run = Run(chain(4))
    run.records(20, loss=usual)
    run.record(factor, loss=loss)
    assert run.rules() == (["gradient_spike"] if told else [])


def test_a_gradient_that_jumps_where_no_loss_is_known() -> None:
    run = Run(chain(4))
    run.records(20, loss=np.nan, loss_terms=0)
    run.record(250.0, loss=np.nan, loss_terms=0)
    assert run.rules() == ["gradient_spike"]


def test_ten_records_are_needed_and_eleven_are_enough() -> None:
    run = Run(chain(4))
    run.records(9)
    run.record(100.0, loss=100.0)
    assert run.alarms() == []
    run = Run(chain(4))
    run.records(10)
    run.record(100.0, loss=100.0)
    assert run.rules() == ["gradient_spike"]


def test_a_factor_below_ten_is_none() -> None:
    run = Run(chain(4))
    run.records(20)
    run.record(8.0)
    assert run.alarms() == []


def test_heavy_tails_are_none() -> None:
    run, random = Run(chain(4)), np.random.default_rng(1)
    for _ in range(200):
        run.record(np.exp(1.0 * random.standard_normal()))
    assert run.alarms() == []


def test_what_happened_before_is_no_spike_when_it_happens_again() -> None:
    run = Run(chain(4))
    for i in range(60):
        run.record(15.0 if i % 20 == 5 else 1.0)
    assert run.alarms() == []


def test_a_hard_batch_after_convergence_is_none() -> None:
    run = Run(chain(4))
    for i in range(60):
        run.record(1e-3 * 30 if i == 55 else max(1e-3, 0.8**i))
    assert run.alarms() == []


def test_a_restart_of_the_learning_rate_is_none() -> None:
    run = Run(chain(4))
    run.records(20)
    run.record(lr=1.0)
    run.record(40.0, lr=1.0)
    assert run.alarms() == []


def test_growth_from_record_to_record_is_no_spike() -> None:
    run = Run(chain(4))
    for i in range(40):
        run.record(1.6**i)
    assert "gradient_spike" not in run.rules()


def test_alternating_models_of_different_size_are_none_and_a_spike_in_one_is_told() -> None:
    g, d = chain(3, prefix="g."), chain(3, prefix="d.")
    run = Run(Meta(g.parameters + d.parameters, g.layers[1:] + d.layers[1:]))
    nan = np.full(6, np.nan)
    for _ in range(20):
        run.record(np.concatenate((np.full(6, 1e-3), nan)))
        run.record(np.concatenate((nan, np.full(6, 1e3))))
    assert run.alarms() == []
    run.record(np.concatenate((np.full(6, 1e-1), nan)), loss=2.0)
    assert run.only("gradient_spike").layers == ("g.0", "g.1", "g.2") or run.only("gradient_spike").layers[0].startswith("g.")


def test_the_cause_tells_whether_the_loss_rose_with_it() -> None:
    for loss, word in ((50.0, "outlier"), (1.0, "loss is as usual")):
        run = Run(chain(4))
        run.records(20)
        run.record(500.0, loss=loss)
        assert word in run.only("gradient_spike").cause


@pytest.mark.parametrize(
    ("before", "now"),
    [
        pytest.param([0.0] * 30, 5.0, id="the first reward comes late"),
        pytest.param([1.0] * 10 + [0.0] * 20, 1.5, id="a margin that was met for long"),
        pytest.param([1.0] * 12 + [0.0, 0.0, 0.0, 0.02, 0.0] * 4, 5.0, id="a reward that seldom comes"),
    ],
)
def test_what_follows_gradients_of_exactly_zero_is_none(before: list[float], now: float) -> None:
    run = Run(chain(4))
    for norm in before:
        run.record(norm, loss=float(norm > 0.0))
    run.record(now)
    run.records(3, now)
    assert run.alarms() == []


def test_a_layer_whose_gradient_was_exactly_zero_is_no_spike_when_it_wakes() -> None:
    run = Run(chain(4))
    norms = np.ones(8)
    norms[2:4] = 0.0
    run.records(20, norms)
    norms[2:4] = 100.0
    run.record(norms)
    assert run.rules() == ["zero_gradient"]


def test_zeros_between_do_not_hide_a_spike_and_do_not_count_as_usual() -> None:
    run = Run(chain(4))
    run.records(12, 0.0, loss=0.0)
    for i in range(40):
        run.record(float(i % 5 > 0), loss=float(i % 5 > 0))
    run.record(50.0, loss=50.0)
    alert = run.only("gradient_spike")
    assert (alert.step, alert.layers) == (52, ("",))
    assert alert.evidence["ratio"] == pytest.approx(50.0, rel=0.3)


@pytest.mark.parametrize(("loss", "told"), [pytest.param(0.09, False, id="a tenth"), pytest.param(0.11, True, id="more")])
def test_once_a_run_has_converged_one_hard_batch_stands_out_in_its_gradient(loss: float, told: bool) -> None:
    run = Run(chain(4))
    run.records(12)
    run.records(20, loss=0.01)
    run.record(250.0, loss=loss)
    assert ("gradient_spike" in run.rules()) is told


@pytest.mark.parametrize(
    ("first", "loss", "told"),
    [
        pytest.param(10.0, 0.09, False, id="400 times the usual, 4 times the first"),
        pytest.param(0.5, 0.09, True, id="80 times the first"),
        pytest.param(10.0, 0.11, True, id="the loss is not low"),
    ],
)
def test_a_hard_batch_of_a_converged_run_has_to_exceed_what_the_run_began_with(first: float, loss: float, told: bool) -> None:
    run = Run(chain(4), [gradient_spike])
    run.records(12, first)
    run.records(70, 0.1, loss=0.01)
    run.record(40.0, loss=loss)
    assert run.rules() == (["gradient_spike"] if told else [])
