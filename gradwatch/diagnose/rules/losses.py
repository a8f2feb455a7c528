"""The course of the loss itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gradwatch.baselines import KEPT, WINDOW
from gradwatch.diagnose.arrays import median
from gradwatch.diagnose.rules.rule import patient, persistent
from gradwatch.history import History
from gradwatch.records import Finding, Severity

START = 3
"""First losses whose median is what the run began with: a run that diverges has left it by the fifth."""

DIVERGED = 4.0
"""Times that, and times the loss of the best constant output, from which a loss that stays there has diverged."""

DIVERGED_UNKNOWN = 10.0
"""Times the first losses where that loss is not known: a generator's rises sixfold when its critic wins (measured), curricula, annealed
penalties and growing queues of negatives raise a loss by a factor of 2 or so."""

RECENT, LASTING = 8, 7
"""Of so many losses, how many have to be so large: a verdict within 10 updates."""

SPIKE = 10.0
"""Times the median and the largest of the losses before it, as for the gradient's spike. Growth, however fast, comes in smaller steps."""

SPIKE_OVER_ALL = 3.0
"""Times the largest of the kept losses: a run that does this now and then has heavy tails."""

SPIKE_SCORE = 6.0
"""Robust z of its logarithm, as for the gradient's spike: 2.5 alarms on a third of healthy runs (design)."""

SPREAD = 0.15
"""Least standard deviation of the logarithm, as for the gradient's spike."""

BEFORE = 20
"""Losses before a spike that make a habit."""

OF_START = 0.5
"""Part of what the run began with below which no single loss matters: once a run has converged, one hard batch stands out."""

FLAT_UPDATES = 80
"""Updates without any progress: the design gives a plateau 100 until its verdict; transformers on small tasks wait for 50 (measured)."""

AS_A_GUESS = 0.97
"""Part of the loss of the best constant output at which a classifier has learnt nothing. Sampling moves the median of 40 losses of small
batches by 2 %."""

WORSE_THAN_A_GUESS = 1.5
"""The same for squared and absolute errors: of noisy targets (returns, heavy tails) the best model explains a few per cent, and it is as
bad as a guess in health."""

_CLASSIFIES = frozenset({"cross_entropy", "binary_cross_entropy", "binary_cross_entropy_with_logits"})

PROGRESS = 3.0
"""Standard errors of a median that two halves of the losses have to differ by, to be progress."""


@persistent(WINDOW)
def loss_diverging(history: History) -> Iterator[Finding]:
    """The loss has risen far above what it began with and stays there.

    With `L0` the median of the first `START` losses, or the loss of the best constant output where that is known and larger: `LASTING`
    of the last `RECENT` losses, the last among them, exceed `DIVERGED * L0`, or `DIVERGED_UNKNOWN * L0` where it is not known.

    Ignored: runs of several optimizers, of a changing number of losses an update, and losses that are not positive throughout: what a
    sum of such losses does means nothing; a rise from a low loss to less than that (a restart, a curriculum, forgetting).

    Example:
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
        >>> with GradWatch(model):
        ...     train(model, optimizer)
    """
    b = history.baselines
    if len(b.losses) < WINDOW or len(b.first_losses) < START:
        return
    start = median(b.first_losses[:START])
    recent, guess = b.losses[-RECENT:], _guess(history)
    high = DIVERGED * max(start, guess) if guess > 0 else DIVERGED_UNKNOWN * start
    # Comparisons with what was not observed are False.
    above = recent > high
    if not start > 0 or int(above.sum()) < LASTING or not above[-1] or not _is_comparable(history):
        return
    now = float(np.nanmedian(recent))
    yield Finding(
        "loss_diverging",
        Severity.ERROR,
        _since(history, high),
        message=f"the loss rose from {start:.3g} to {now:.3g} and stays there",
        evidence={"loss": now, "first_loss": start, "ratio": now / start},
    )


@persistent(1)
def loss_spike(history: History) -> Iterator[Finding]:
    """The loss of one update lies far outside the history of losses.

    With `L` the loss, `m` the median of the `BEFORE` losses before it and `s` the largest of `SPREAD` and the scaled MAD of their
    logarithms: `L` is `SPIKE` times the largest of those `BEFORE` and more than `OF_START` of what the run began with; and
    `log(L / m) / s >= SPIKE_SCORE` and `L` is `SPIKE_OVER_ALL` times the largest kept loss, the `START` oldest aside; or `L` is `SPIKE`
    times that.

    Ignored: runs whose losses cannot be compared (see `loss_diverging`); a skipped record; the first `BEFORE` updates.

    Example:
        >>> with GradWatch(model):
        ...     for i, (x, y) in enumerate(loader):
        ...         step(x, 1000 * y if i == 50 else y)
    """
    b = history.baselines
    if len(b.losses) < BEFORE + 1 or len(b.first_losses) < START:
        return
    loss, start = float(b.losses[-1]), median(b.first_losses[:START])
    before = b.losses[-BEFORE - 1 : -1]
    before = before[np.isfinite(before)]
    # A first look that most records end at.
    if not loss > OF_START * start or len(before) < BEFORE // 2 or not loss >= SPIKE * float(before.min()):
        return
    usual = median(before)
    if not usual > 0 or loss < SPIKE * float(before.max()) or not _is_comparable(history):
        return
    logs = np.log(before)
    spread = max(SPREAD, 1.4826 * median(np.abs(logs - median(logs))))
    score = float(np.log(loss / usual)) / spread
    earlier = b.losses[:-1][np.isfinite(b.losses[:-1])]
    over_all = loss / float(earlier[START:].max(initial=usual))
    if over_all < (SPIKE_OVER_ALL if score >= SPIKE_SCORE else SPIKE):
        return
    yield Finding(
        "loss_spike",
        Severity.WARNING,
        history.recorded - 1,
        message=f"the loss is {loss:.3g}, {loss / usual:.3g} times the usual {usual:.2g}",
        evidence={"loss": loss, "usual_loss": usual, "ratio": loss / usual, "z": score},
    )


@patient
@persistent(WINDOW)
def loss_plateau(history: History) -> Iterator[Finding]:
    """After many updates the loss is what a constant output would give.

    The loss is known to be a mean cross-entropy, binary cross-entropy, squared or absolute error, and so is `G`, the loss of the best
    constant output by the targets of the first batches (ln C for cross-entropy). Of the last `FLAT_UPDATES` losses the median of the
    second half is not `PROGRESS` standard errors below that of the first, and both are at least `AS_A_GUESS * G`, for errors of a
    regression `WORSE_THAN_A_GUESS * G`; or the prediction was broadcast to the shape of the target, whatever `G` is.

    Ignored: losses of other kinds, for what is high is not known of them (a policy's loss does not fall when all goes well, and a model
    that has converged stays where it is); runs whose losses cannot be compared (see `loss_diverging`); a warm-up.

    Example:
        >>> with GradWatch(model):
        ...     for x, _ in loader:
        ...         step(F.cross_entropy(model(x), torch.randint(10, (64,))))
    """
    meta, b = history.meta, history.baselines
    if not meta.criterion or history.recorded < FLAT_UPDATES or not (meta.guess > 0 or meta.broadcast):
        return
    losses = history.recent("loss", FLAT_UPDATES).astype(float)
    losses = losses[np.isfinite(losses)]
    if len(losses) < FLAT_UPDATES * 3 // 4 or not b.first_losses.size or not _is_comparable(history):
        return
    guess = _guess(history)
    half = len(losses) // 2
    earlier, later = median(losses[:half]), median(losses[half:])
    least = AS_A_GUESS if meta.criterion in _CLASSIFIES else WORSE_THAN_A_GUESS
    high = meta.guess > 0 and min(earlier, later) >= least * guess
    if not (high or meta.broadcast) or _falls(losses[:half], losses[half:]) or _warms_up(history):
        return
    first = median(b.first_losses)
    best = f", and a constant output would give {guess:.3g}" if meta.guess > 0 else ""
    yield Finding(
        "loss_plateau",
        Severity.WARNING,
        0 if later >= 0.8 * first else max(0, history.recorded - FLAT_UPDATES),
        message=f"the loss has been {later:.3g} for {len(losses)} updates{best}",
        evidence={"loss": later, "guess": guess, "first_loss": first, "updates": len(losses), "broadcast": float(meta.broadcast)},
    )


def _is_comparable(history: History) -> bool:
    """One optimizer, the same number of losses in each update, and all of them positive."""
    meta, b = history.meta, history.baselines
    terms = history.recent("loss_terms", KEPT)
    terms = terms[np.isfinite(history.recent("loss", KEPT))]
    finite = b.losses[np.isfinite(b.losses)]
    return bool(
        len(meta.owners) == 1
        and terms.size
        and (terms == terms[0]).all()
        and terms[0] > 0
        and (finite > 0).all()
        and (b.first_losses > 0).all()
    )


def _guess(history: History) -> float:
    """The loss of the best constant output in an update of as many losses as the last one that showed any; 0 where it is not known."""
    terms = history.recent("loss_terms", KEPT)
    terms = terms[np.isfinite(history.recent("loss", KEPT))]
    return history.meta.guess * float(terms[-1]) if terms.size and terms[-1] > 0 else 0.0


def _since(history: History, high: float) -> int:
    """The first kept record since when the loss has been above half of that, but for single ones."""
    losses = history.baselines.losses
    low = ~(losses > 0.5 * high)
    start = history.recorded - len(losses)
    if low[0]:
        low = np.append(True, low)  # what was low when the kept ones begin was low before
        start -= 1
    pairs = np.flatnonzero(low[1:] & low[:-1])
    return start + int(pairs[-1]) + 2 if pairs.size else start


def _falls(earlier: NDArray[np.float64], later: NDArray[np.float64]) -> bool:
    """The median has fallen by more than chance explains: its standard error is 1.25 standard deviations over the root of the number."""
    spread = 1.4826 * max(median(np.abs(earlier - median(earlier))), median(np.abs(later - median(later))))
    error = 1.25 * spread * (1 / len(earlier) + 1 / len(later)) ** 0.5
    return bool(median(earlier) - median(later) > PROGRESS * error)


def _warms_up(history: History) -> bool:
    lr = np.fmax.reduce(history.recent("lr", FLAT_UPDATES).astype(float), axis=1, initial=np.nan)
    lr = lr[np.isfinite(lr)]
    return bool(lr.size > 1 and lr[-1] > 1.05 * lr[len(lr) // 2])
