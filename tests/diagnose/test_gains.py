"""The product of the gains, told where it accounts for what the gradient does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradwatch.diagnose.gains import gains_between, kinds_in
from gradwatch.history import Meta
from tests.diagnose.runs import Run, chain


def gains(meta: Meta, linear: float, activation: float) -> dict[str, Any]:
    values = np.array(
        [np.nan if f.kind == "container" else activation if f.activation else linear for f in meta.layers], np.float32
    )
    return {"gain": values}


def fall(layers: int, decades: float) -> np.ndarray[Any, Any]:
    """Gradient norms that fall evenly towards the input."""
    return 10.0 ** np.repeat(np.linspace(-decades, 0, layers), 2)


def test_the_cause_names_what_accounts_for_the_fall() -> None:
    run = Run(meta := chain(10, activation="Sigmoid"))
    run.records(12, fall(10, 8.0), noise=0.0, **gains(meta, 0.6, 0.21))
    alert = run.only("vanishing_gradient")
    assert alert.cause == "9 Sigmoids pass on ×0.21 each, 9 Linears ×0.6: 1.0 → 1.0e-8."
    assert "ReLU" in alert.remedy
    assert alert.evidence["Sigmoid_gain"] == pytest.approx(0.21)
    assert alert.evidence["Linear_count"] == 9


def test_a_product_that_is_far_from_it_is_not_told() -> None:
    run = Run(meta := chain(10, activation="Sigmoid"))
    run.records(12, fall(10, 8.0), noise=0.0, **gains(meta, 1.0, 0.5))
    alert = run.only("vanishing_gradient")
    assert "at most a quarter" in alert.cause
    assert not [name for name in alert.evidence if name.endswith("_count")]


def test_small_weights_are_the_reason_where_they_do_most_of_it() -> None:
    run = Run(meta := chain(10, activation="Tanh"))
    run.records(12, fall(10, 8.0), noise=0.0, **gains(meta, 0.13, 0.97))
    alert = run.only("vanishing_gradient")
    assert alert.cause == "9 Linears pass on ×0.13 each: 1.0 → 1.0e-8."
    assert "kaiming_normal_" in alert.remedy


def test_functions_have_a_gain_too() -> None:
    meta = chain(10)
    run = Run(meta)
    outer, inner = 0.6, 0.21
    delta = np.append(np.nan, (outer * inner) ** np.arange(9, -1, -1.0))
    columns = gains(meta, outer, np.nan) | {"delta_norm": delta, "saturated_fraction": np.append(np.nan, [0.0] * 9 + [np.nan])}
    run.records(12, fall(10, 8.0), noise=0.0, **columns)
    assert run.only("vanishing_gradient").cause.startswith("9 activations pass on ×0.21 each, 9 Linears ×0.6")


def test_growth_is_told_likewise() -> None:
    run = Run(meta := chain(10, activation="Tanh"))
    run.records(12, fall(10, -6.0), noise=0.0, weight_norm=40.0, **gains(meta, 5.0, 0.93))
    assert run.only("exploding_gradient").cause == "9 Linears multiply it by ×5 each: 1.0 → 1.0e6."


def test_without_looks_there_is_nothing_to_tell() -> None:
    run = Run(chain(4))
    run.records(3)
    assert gains_between(run.history, 1, 4, -3.0) == {}
    assert kinds_in({"gain": 2.0, "ratio": 1e-3}) == []
