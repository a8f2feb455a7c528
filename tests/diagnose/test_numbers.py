"""No number in any column upsets a rule: what one cannot judge it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.history import Meta
from gradwatch.records import STATISTICS
from tests.diagnose.runs import Run, chain, change

SIZES = (0.0, 1e-44, 1e-30, 1e-6, 0.5, 1.0, 30.0, 1e30, 3e38, np.inf, np.nan)
SIGNED = (*SIZES, -1.0, -3e38, -np.inf)
FRACTIONS = (0.0, 0.5, 0.76, 1.0, np.nan)

METAS: tuple[Meta, ...] = (
    Meta(),
    chain(1),
    change(chain(2), lambda f: True, order=None, distance=None, owner=None),
    replace(
        change(chain(4, activation="Tanh"), lambda f: f.name == "1.weight", equal_rows=True, still_equal=True),
        criterion="cross_entropy",
        guess=2.0,
        squashed="softmax",
    ),
    replace(change(chain(3), lambda f: f.name == "2.weight", init_rms=0.0), criterion="mse_loss", broadcast=True),
)

VALUES = {
    name: SIGNED if name in ("loss", "input_mean") else FRACTIONS if name.endswith("fraction") else SIZES
    for name, statistic in STATISTICS.items()
    if statistic.dtype == "f4"
}
columns = st.sampled_from(sorted(VALUES)).flatmap(
    lambda name: st.tuples(st.just(name), st.lists(st.sampled_from(VALUES[name]), min_size=1, max_size=3))
)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(METAS),
    st.sampled_from([0, 1, 12, 80]),
    st.lists(st.tuples(st.integers(1, 12), st.lists(columns, max_size=6)), min_size=1, max_size=3),
    st.integers(0, 255),
)
def test_no_number_upsets_the_rules(
    meta: Meta, healthy: int, spells: list[tuple[int, list[tuple[str, list[float]]]]], state: int
) -> None:
    run = Run(meta)
    sizes = {"parameter": len(meta.parameters), "layer": len(meta.layers)}
    with np.errstate(all="ignore"):  # as the watch does
        run.records(healthy)
        for records, values in spells:
            row: dict[str, Any] = {"total_norm": 1.0}
            for name, some in values:
                axis = STATISTICS[name].axis
                row[name] = some[0] if axis == "update" else np.resize(some, sizes[axis])
            run.records(records, grad_state=np.uint8(state), **row)
        run.history.ended = True
        run.judge()
    assert run.notices == []
    told = [alert for alert in run.incidents.alerts if not alert.rule.startswith("non_finite")]
    assert "nan" not in " ".join(alert.message + alert.cause + alert.remedy for alert in told)
