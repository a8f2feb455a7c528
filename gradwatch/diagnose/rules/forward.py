"""NaN and Inf on the way forward: in what a model is given, and in what its modules put out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gradwatch.diagnose.execution import Execution, execution_of, roots_of
from gradwatch.diagnose.rules.rule import harm, persistent, sampled
from gradwatch.history import History
from gradwatch.records import Finding, Severity, SkipReason

HABIT = 16
"""Records in which a module is looked up that puts out NaN or Inf though loss and gradients are finite: a mask of -inf is a habit, and
what goes bad later has gone bad elsewhere."""


@sampled
@persistent(5)
def non_finite_input(history: History) -> Iterator[Finding]:
    """What a model is given holds a NaN or an Inf, in an update that is looked at (`Sampling`).

    An error where the loss or a gradient is not finite either, a warning where the update was left out for it; otherwise the model knows
    what to do about it (missing values, a mask) and it is INFO. Names the model.

    Ignored: integers; updates that are not looked at.

    Example:
        >>> x[0] = float("nan")
        >>> with GradWatch(model):
        ...     step(x, y)
    """
    if not len(history):
        return
    count = float(history.recent("input_nonfinite", 1)[0])
    if not count > 0:
        return
    spoilt = _is_spoilt(history)
    if not spoilt and history.recent("skip_reason", 1)[0] == SkipReason.SCALER:
        return
    severity, left_out = harm(history)
    yield Finding(
        "non_finite_input",
        severity if spoilt else Severity.INFO,
        history.recorded - 1,
        layers=tuple(history.layers[i] for i in _given_it(history)),
        message=f"the input holds NaN or Inf ({count:.0f} elements of what was looked at){left_out}",
        evidence={"elements": count},
    )


@sampled
@persistent(5)
def non_finite_activation(history: History) -> Iterator[Finding]:
    """The output of a module holds a NaN or an Inf while those of all modules that ran before it are finite.

    Names the first such module in the order of execution (`Execution`), the innermost one: a container is named if nothing in it went
    bad. An error where the loss or a gradient is not finite either, a warning where the update was left out for it; otherwise the values
    lead nowhere (a mask of -inf before a softmax) and it is INFO.

    Ignored: modules that had such outputs in one of the last `HABIT` records whose loss and gradients were finite; an activation that is
    called in many places, where another module can be named; and an overflow in an update that a GradScaler skipped, unless the loss
    is not finite.

    Example:
        >>> class Log(nn.Module):
        ...     def forward(self, x):
        ...         return torch.log(F.relu(x))
    """
    if not len(history):
        return
    counts = history.recent("activation_nonfinite", 1)[0]
    bad = counts > 0
    if not bad.any():
        return
    spoilt = _is_spoilt(history)
    if not spoilt and history.recent("skip_reason", 1)[0] == SkipReason.SCALER:
        return
    if spoilt:
        bad &= ~_habitual(history)
    execution = execution_of(history.meta)
    places = execution.sorted(np.flatnonzero(execution.innermost(bad)))
    if not places.size:
        return
    fixed = places[~_wanders(history, places)]
    first = int(fixed[0] if fixed.size else places[0])
    before = _before(history, execution, first, counts)
    name = history.layers[first] or "(model)"
    severity, left_out = harm(history)
    yield Finding(
        "non_finite_activation",
        severity if spoilt else Severity.INFO,
        history.recorded - 1,
        layers=(history.layers[first],),
        message=f"the output of {name} holds NaN or Inf" + (f", that of {before} before it is finite" if before else "") + left_out,
        evidence={"elements": float(counts[first]), "modules": int(bad.sum())},
    )


def _is_spoilt(history: History) -> bool:
    """The loss or a gradient of the last record is not finite."""
    loss = history.recent("loss", 1)[0]
    if history.recent("loss_terms", 1)[0] > 0 and not np.isfinite(loss):
        return True
    if history.recent("skip_reason", 1)[0] == SkipReason.SCALER:
        return False
    return bool((history.recent("grad_nonfinite", 1)[0] > 0).any())


def _given_it(history: History) -> NDArray[np.int64]:
    """Columns of the models that may have been given it: those that put out something bad, else those called, else all."""
    roots = roots_of(history.meta)
    for name in ("activation_nonfinite", "calls"):
        chosen: NDArray[np.int64] = roots[history.recent(name, 1)[0][roots] > 0]
        if chosen.size:
            return chosen
    return roots


def _habitual(history: History) -> NDArray[np.bool_]:
    """`[L]`: put out NaN or Inf in a record that came to no harm."""
    counts = history.recent("activation_nonfinite", HABIT)[:-1]
    loss, gradients = history.recent("loss", HABIT)[:-1], history.recent("grad_nonfinite", HABIT)[:-1]
    fine = np.isfinite(loss) & ~(gradients > 0).any(axis=1)
    habitual: NDArray[np.bool_] = (counts[fine] > 0).any(axis=0)
    return habitual


def _wanders(history: History, layers: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Of some layers, which are activations or dropouts called in many places: where they are registered says nothing of when they ran."""
    calls, facts = history.recent("calls", 1)[0], history.meta.layers
    return np.array([facts[i].kind in ("activation", "dropout") and calls[i] > 1 for i in layers], bool)


def _before(history: History, execution: Execution, layer: int, counts: NDArray[np.float32]) -> str:
    """The module that ran last before a layer, with a finite output; "" where there is none."""
    ran = execution.inner & (counts == 0) & (execution.rank < execution.rank[layer])
    columns = np.flatnonzero(ran)
    return history.layers[int(columns[execution.rank[columns].argmax()])] if columns.size else ""
