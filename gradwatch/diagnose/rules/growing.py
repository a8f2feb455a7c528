"""Gradients that grow from update to update without bound."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradwatch.baselines import WINDOW
from gradwatch.diagnose.execution import execution_of
from gradwatch.history import History
from gradwatch.records import Finding, GradState, Severity

IN_TIME = 2.0
"""Decades that the total norm and the loss both grow above their first values, without a pause. A healthy generator's norm grew by 2.3
decades in 60 updates, its loss by less than 1 (measured)."""

STEADY, EACH = 1.3, 12
"""The same within the last `EACH` records, in each of which norm and loss both rose: noise makes a record fall now and then, and what
grows on its way to a bound does so more slowly (a WGAN's critic 1.2 decades in 24)."""

ONE_STEP = 4.0
"""The same where the very next record overflows: a first step that multiplies both by so much is not one of a run that learns."""

ALONE = 0.7
"""Part of the growth that may be the work of the last update, where it can still be one batch that is unlike the others: the next tells."""

BESIDE_WEIGHTS = 3.0
"""Times the norm of the weights, now or when they were first looked at, that the gradient's has to be, too: where rewards are rare, or an
output begins saturated, it grows from nearly nothing to its usual size, in health by 8 decades (measured)."""

UNKNOWN_LOSS = 4.0
"""Decades of the norm alone where the loss is not known."""


def grows_in_time(history: History) -> Finding | None:
    """Norm and loss grow together, far beyond their first values."""
    b = history.baselines
    newest = float(history.recent("total_norm", 1)[0])
    if not b.first_totals.size or newest < 10.0**STEADY * float(b.first_totals.min()):  # NaN goes on
        return None
    total = history.recent("total_norm", 64).astype(float)
    loss = history.recent("loss", 64).astype(float)
    applied = ~history.recent("skipped", 64) & _of_the_same_owners(history)
    total, loss, steps = total[applied], loss[applied], history.steps[-len(applied) :][applied]
    end = len(total)
    while end and not np.isfinite(total[end - 1]):
        end -= 1
    died = end < len(total)
    total, loss, steps = total[:end], loss[:end], steps[:end]
    if end < (2 if died else WINDOW) or history.recorded > end + 512:
        return None
    last = 3 if died else 9
    at_once = ONE_STEP if end < 3 else 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        norms, losses = np.log10(total), np.log10(np.abs(loss))
    with np.errstate(invalid="ignore"):
        steady = end > EACH and all(
            bool((np.diff(logs[-EACH - 1 :]) > 0).all()) and float(logs[-1] - logs[-EACH - 1]) >= STEADY for logs in (norms, losses)
        )
    lowest = max(1, min(3 if steady else 5, end // 2))
    base = float(np.nanmedian(norms[:lowest]))
    grown = float(norms[-1]) - base
    usual = STEADY if steady else IN_TIME
    need = usual if np.isfinite(losses[-min(end, WINDOW) :]).all() else UNKNOWN_LOSS
    if not grown >= max(need + (1.0 if died else 0.0), at_once):
        return None
    if float(total[-1]) < BESIDE_WEIGHTS * _least_weights(history):
        return None
    with np.errstate(invalid="ignore"):
        rising = np.diff(norms[-last:]) > 0
    if rising.sum() < len(rising) - 1 or float(norms[-1]) < float(np.nanmax(norms)) - 0.5:
        return None
    if need == usual:
        more = float(losses[-1]) - float(np.nanmedian(losses[:lowest]))
        if more < max(usual, at_once) or float(losses[-1]) < float(np.nanmax(losses)) - 0.5:
            return None
    if not died and float(norms[-1] - norms[-2]) > ALONE * grown:
        return None
    start = _bend(norms)
    return Finding(
        "exploding_gradient",
        Severity.ERROR,
        int(steps[start]) if start > WINDOW // 2 else int(steps[0]),
        layers=_everything(history),
        message=f"the gradient norm has grown from {10.0**base:.2g} to {total[-1]:.2g} and the loss with it",
        evidence={"first_norm": 10.0**base, "grad_norm": float(total[-1]), "ratio": 10.0 ** min(grown, 300.0), "growing": 1.0},
    )


def _least_weights(history: History) -> float:
    """The norm of all weights, as last looked at or as first, of the records that are kept: where weights explode, too, the gradient
    need not be large beside them."""
    looks = np.vstack((history.recent("weight_norm", 64), history.baselines.weight_norm)).astype(float)
    seen = np.isfinite(looks).sum(axis=1)
    looks = looks[(seen > 0) & (seen == seen.max())]  # of optimizers that take turns, one is looked at at a time
    with np.errstate(over="ignore"):
        norms = np.sqrt(np.nansum(np.square(looks), axis=1))
    return float(norms.min()) if norms.size else 0.0


def _bend(norms: NDArray[np.float64]) -> int:
    """The record with which the growth begins: where two straight lines fit the logarithms best. 0 where the first line rises, too,
    at a quarter of the pace of the second."""
    known = np.flatnonzero(np.isfinite(norms))
    values = norms[known]
    n = len(values)
    if n < 6:
        return 0
    slopes, wrong = _lines(values)
    back, wrong_back = (each[::-1] for each in _lines(values[::-1]))
    # The first line holds the first k values, the second those from the last of these on.
    k = np.arange(2, n - 1)
    at = int(k[np.argmin(wrong[k - 1] + wrong_back[k - 1])])
    if slopes[at - 1] >= 0.25 * -back[at - 1]:
        return 0
    before = float(values[:at].max())
    above = np.flatnonzero(values[at:] > before)
    return int(known[at + above[0]]) if above.size else int(known[at])


def _lines(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`[N]` each: slope and sum of squared errors of the straight line through the first 1, 2, ..., N values."""
    x = np.arange(len(values), dtype=float)
    count = x + 1.0
    mean_x, mean_y = np.cumsum(x) / count, np.cumsum(values) / count
    xx = np.cumsum(x * x) - count * mean_x**2
    xy = np.cumsum(x * values) - count * mean_x * mean_y
    yy = np.cumsum(values * values) - count * mean_y**2
    slope = np.divide(xy, xx, out=np.zeros_like(xy), where=xx > 0)
    return slope, np.maximum(yy - slope * xy, 0.0)


def _of_the_same_owners(history: History) -> NDArray[np.bool_]:
    """`[T]`: the same optimizers stepped as in the last record, of the last 64: two that take turns have norms and losses of their own."""
    owners = history.meta.owners
    state = history.recent("grad_state", 64)
    if len(owners) < 2:
        return np.ones(len(state), bool)
    of = {fact.owner: i for i, fact in enumerate(history.meta.parameters) if fact.owner is not None}
    stepped = (state[:, list(of.values())] & np.uint8(GradState.STEPPED)) != 0
    same: NDArray[np.bool_] = (stepped == stepped[-1]).all(axis=1)
    return same


def _everything(history: History) -> tuple[str, ...]:
    """The watched models whose parameters an optimizer has stepped in the last record."""
    meta = history.meta
    stepped = (history.recent("grad_state", 1)[0] & np.uint8(GradState.STEPPED)) != 0
    layers = meta.layer_index[stepped & (meta.layer_index >= 0)]
    return tuple(history.layers[i] for i in np.unique(execution_of(meta).root[layers]).tolist())
