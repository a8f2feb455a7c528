"""One step whose gradient is far outside everything before it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gradwatch.baselines import KEPT, WINDOW, ZERO
from gradwatch.diagnose.naming import layers_of
from gradwatch.diagnose.rules.rule import persistent
from gradwatch.history import History
from gradwatch.records import Finding, GradState, Severity, SkipReason

RATIO = 10.0
"""Over the largest of the nine records before it, and over what is usual. Healthy runs reach 6 (a batch of hard examples; heavy-tailed
noise: 7), planted spikes 20 and more (zoo)."""

EARLIER = 8.0
"""Over the largest excess of any kept record before it: a run that does this now and then has heavy tails."""

SCORE = 6.0
"""Robust z of its logarithm. 2.5 alarms on a third of healthy runs (design)."""

SPREAD = 0.15
"""Least standard deviation of the logarithm, so that a run without noise does not make everything far outside (zoo: 0.06 to 0.5)."""

FIRST = 2.0
"""Over the norm of the first records, for once a run has converged, one hard batch stands out and does no harm; and over the largest
of the kept ones, for what has happened before is no news."""

START = 5
"""Records at the start of a run whose norms are no habit: transients of the initialisation."""

HABITUAL = 6
"""Of the nine records before, those with a gradient other than exactly 0 that make a habit: a hinge whose margin is met and a reward that
seldom comes give 0, over which anything is any number of times as much."""

FROM_ZERO = 1e4
"""Excess of an earlier record that is set aside where gradients of exactly 0 are kept: the mean logarithm of ten records with one zero
among them is 10 lower."""

ALONE, USUAL = 300.0, 1.5
"""Ratio that is needed where the loss of the record is no larger than `USUAL` times the largest of the nine before it (or above them by less
than half of their range): recurrent nets that begin to latch and flows that stretch jump by 40 to 180 in health, and nothing comes of it
(measured)."""

MATTERS = 0.1
"""Part of what the run began with that a loss has to reach to be anything but usual: once a run has converged, one hard batch stands out."""

BEYOND = 10.0
"""Times the norm of the first records that such a batch has to reach, too: a wrong answer of a run that is sure of itself has a gradient as
large as those it began with, or a few times that, and thousands of times what is left of them (measured)."""

RESTART = 2.0
"""Factor by which the learning rate rose in one of the last records: what follows is its doing."""


@persistent(1)
def gradient_spike(history: History) -> Iterator[Finding]:
    """The norm of one record lies far outside the robust history of the logarithms of norms.

    With `n` the 2-norm over the parameters that the record observed and `h` that over the same parameters' last nine observations
    before, those of exactly 0 aside: `n / median(h) >= RATIO`, `n / max(h) >= RATIO`, `log(n / median(h)) / s >= SCORE` with `s` the
    largest of `SPREAD` and the scaled MADs of `log h` and of the kept residuals; and `n` is `FIRST` times the norm of those
    parameters' first records. Names the modules that rose by `RATIO`, and by a tenth of the largest rise.

    Where the loss of the record is usual, or below `MATTERS` of what the run began with, `n / median(h) >= ALONE`; in the second case `n`
    is `BEYOND` times the norm of the first records, too.

    Ignored: parameters seen fewer than 11 times, or whose gradient was other than exactly 0 in fewer than `HABITUAL` of the nine
    observations before; a rise after the learning rate's; a skipped record.

    Example:
        >>> with GradWatch(model):
        ...     for i, (x, y) in enumerate(loader):
        ...         step(x, 1000 * y if i == 50 else y)
    """
    b = history.baselines
    if len(history) <= WINDOW or len(b.residuals) < 1:
        return
    excess = float(b.residuals[-1])
    if not excess >= np.log(RATIO) or bool(history.recent("skipped", 1)[0]):
        return
    norms = history.recent("grad_norm", 1)[0]
    columns = np.flatnonzero(np.isfinite(norms) & (b.seen > WINDOW))
    if not columns.size or _restarted(history, columns):
        return
    logs = _before(history, columns)
    nonzero = logs > ZERO
    usual = nonzero.sum(axis=0) >= HABITUAL
    columns, logs = columns[usual], logs[:, usual]
    some = nonzero[:, usual].any(axis=1)
    if np.count_nonzero(some) < HABITUAL:
        return
    logs = logs[some]
    now = norms[columns].astype(float)
    total = float(np.sqrt(np.square(now).sum()))
    if not total > 0.0:
        return
    before = 0.5 * np.log(np.maximum(np.exp(2.0 * logs).sum(axis=1), 1e-300))
    median = float(np.median(before))
    earlier = b.residuals[:-1][np.isfinite(b.residuals[:-1])]
    if _was_zero(history):
        excess, earlier = float(np.log(total)) - median, earlier[earlier < np.log(FROM_ZERO)]
    spread = max(SPREAD, _mad(before), _mad(earlier))
    rise = float(np.log(total)) - median
    first = 0.5 * float(np.log(np.maximum(np.exp(2.0 * b.early[columns].astype(float)).sum(), 1e-300)))
    far = (
        rise >= np.log(RATIO)
        and rise / spread >= SCORE
        and np.log(total) - float(before.max()) >= np.log(RATIO)
        and (not earlier.size or excess - float(earlier.max()) >= np.log(EARLIER))
        and np.log(total) - first >= np.log(FIRST)
        and total >= FIRST * _largest(history, columns)
    )
    if not far:
        return
    rises = np.log(np.maximum(now, 1e-45)) - np.median(logs, axis=0)
    risen = rises >= max(np.log(RATIO), float(rises.max()) - np.log(RATIO))
    share = np.flatnonzero(risen)[np.argsort(-now[risen], kind="stable")]
    names = tuple(history.parameters[i] for i in columns[share])
    low = _loss_is_low(history)
    if (rise < np.log(ALONE) and (low or _loss_is_usual(history))) or (low and np.log(total) - first < np.log(BEYOND)):
        return
    yield Finding(
        "gradient_spike",
        Severity.WARNING,
        history.recorded - 1,
        layers=layers_of(history.meta, names),
        message=f"the gradient norm is {total:.3g}, {np.exp(rise):.3g} times the usual {np.exp(median):.2g}",
        evidence={
            "grad_norm": total,
            "usual_norm": float(np.exp(median)),
            "ratio": float(np.exp(min(rise, 700.0))),
            "z": rise / spread,
        },
    )


def _loss_is_usual(history: History) -> bool:
    losses = history.recent("loss", WINDOW).astype(float)
    if len(losses) < WINDOW or not np.isfinite(losses).all():
        return False
    largest, least = float(losses[:-1].max()), float(losses[:-1].min())
    return bool(losses[-1] <= max(USUAL * largest, largest + (USUAL - 1.0) * (largest - least)))


def _loss_is_low(history: History) -> bool:
    losses, first = history.recent("loss", WINDOW).astype(float), history.baselines.first_losses
    if len(losses) < WINDOW or not np.isfinite(losses).all():
        return False
    return bool(first.size > 0 and 0 < losses[-1] <= MATTERS * float(np.median(first)))


def _before(history: History, columns: NDArray[np.int64]) -> NDArray[np.float64]:
    """`[WINDOW - 1, C]`: logarithms of the columns' observations before the last, oldest first."""
    b = history.baselines
    seen = b.seen[columns]
    ages = np.arange(WINDOW - 1, 0, -1)[:, None]
    logs: NDArray[np.float64] = b.last[(seen[None, :] - 1 - ages) % WINDOW, columns[None, :]].astype(np.float64)
    return logs


def _was_zero(history: History) -> bool:
    """Whether a gradient of exactly 0 lies in the kept records."""
    return bool((history.recent("grad_norm", KEPT + WINDOW)[:-1] == 0.0).any())


def _largest(history: History, columns: NDArray[np.int64]) -> float:
    """The largest norm over these parameters in a kept record that reached most of them, and was not dealt with as a spike."""
    back = history.recent("grad_norm", KEPT)[:-1, columns].astype(float)
    start = max(0, START - int(history.steps[-1] - len(back)))
    back = back[start:]
    seen = np.isfinite(back)
    dealt_with = history.recent("skip_reason", KEPT)[:-1][start:] == SkipReason.RULE
    dealt_with |= ((history.recent("grad_state", KEPT)[:-1][start:] & np.uint8(GradState.ASIDE)) > 0).any(axis=1)
    enough = (seen.mean(axis=1) > 0.5) & ~dealt_with
    norms = np.sqrt(np.square(np.where(seen, back, 0.0)).sum(axis=1))[enough]
    return float(norms.max(initial=0.0))


def _restarted(history: History, columns: NDArray[np.int64]) -> bool:
    lr = history.recent("lr", 4)[:, columns].astype(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        rise = lr[1:] / lr[:-1]
    return bool((rise >= RESTART).any())


def _mad(values: NDArray[np.float64]) -> float:
    return float(1.4826 * np.median(np.abs(values - np.median(values)))) if values.size else 0.0
