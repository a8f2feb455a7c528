"""The course of the loss itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gradwatch.baselines import KEPT, WINDOW
from gradwatch.diagnose.arrays import median
from gradwatch.diagnose.rules.loss import Progress, guess_of, progress
from gradwatch.diagnose.rules.rule import patient, persistent
from gradwatch.facts import BINARY
from gradwatch.history import History
from gradwatch.records import Finding, Severity

START = 3
"""First losses whose median is what the run began with: a run that diverges has left it by the fifth."""

DIVERGED_CLASSES = 2.0
"""Times that, and times the loss of equal logits, from which a cross-entropy that stays there has diverged: a classifier that stays twice as
bad as a guess, and as it began, is on no way to anything."""

DIVERGED = 10.0
"""Times the first losses of any other loss: a generator's rises sixfold when its critic wins (measured)."""

OVERSHOOTS = 0.03
"""Update ratio that goes with it. Targets that move (a bootstrapped value, a curriculum, a market) raise a loss by four decades in health,
by steps of 1e-2 and less (measured); a learning rate that is too high changes several per cent at a time."""

RUNAWAY = 10.0
"""Times the last `RECENT` losses grow, each above the one before, from which no such step is needed: ascent. What grows like a power of the
number of updates, as a curriculum may, does so in its first ten at most, when there is nothing to compare with."""

RISEN = 4
"""How many of the last have to be so large then: targets that are mostly zero put three far off in a row (measured)."""

STEADY, EACH, FAR = 6, 1.2, 3.0
"""Rises in a row, the least of each, and times the first losses the last has to be (and a guess), from which a growth of `RUNAWAY` is ascent
and needs no `RISEN`: a curriculum grows slower, noise does not rise six times, and Adam's first steps that are too large rise twice. No single
rise may be half of it."""

TREND, TOGETHER, TREBLES, BENDS = 12, 0.93, 3.0, 0.8
"""So many losses, the correlation of their logarithms with the number of the update, the times that the straight line through them grows, and
the part of its slope over their first half that it has over the second at least: an objective that is ascended, or a value that feeds
itself, grows by a factor from update to update, slowly at first. In 417 healthy runs of the zoo no such line grows more than 1.6
times, and what grows like a power of the number of updates bends down: at 13 to 24 to 0.72 (computed)."""

EARLY = 2 * TREND
"""Records up to which that is told of losses other than cross-entropies: later their targets may have begun to move (a value that is learnt
from itself rises by a factor of 25 while the policy gets better; measured)."""

RECENT, LASTING = 8, 7
"""Of so many losses, how many have to be so large: a verdict within 10 updates."""

RAMP, FROM_NOTHING, EVENLY = 8, 0.2, 0.4
"""Losses, part of the second that the first is, and part by which each may differ from the usual rise per update, for a coefficient that is
warmed up from 0: what it multiplies changes by a few per cent an update, and what diverges begins with what the loss costs."""

SPIKE = 10.0
"""Times the median and the largest of the losses before it, as for the gradient's spike. Growth, however fast, comes in smaller steps."""

LATELY, JUMPS = 40, 3.0
"""Losses before it, and times the largest jump above the usual among them, in logarithms: insurance claims, rare classes and batches of one
jump by themselves, and now and then a little further (measured)."""

SPIKE_SCORE = 6.0
"""Robust z of its logarithm, as for the gradient's spike: 2.5 alarms on a third of healthy runs (design)."""

SPREAD = 0.15
"""Least standard deviation of the logarithm, as for the gradient's spike."""

BEFORE = 20
"""Losses before a spike that make a habit."""

LEARNT = 0.6
"""Part of the loss of a guess below which a classifier has learnt something: then one batch on which it is worse than a guess is another
kind of batch, from `TWICE` the largest of the losses before it on."""

TWICE = 2.0

WORSE = 1.25
"""Times the loss of a guess that such a batch has to reach: a head that is made anew for the next task begins at that of a guess."""

OF_START = 0.5
"""Part of what the run began with below which no single loss matters: once a run has converged, one hard batch stands out."""

FLAT_UPDATES = 90
"""Updates without any progress: the design gives a plateau 100 until its verdict; small transformers and parities wait for 50 to 80
(measured)."""

AS_A_GUESS = 0.995
"""Part of the loss of equal logits at which a classifier has learnt nothing: of random labels the loss lies above that. Of noisy ones
(four in ten wrong; ups and downs of prices) a good model explains a hundredth (measured)."""

BALANCED = 0.5
"""Loss of a guess from which a binary cross-entropy is one of two classes about as frequent as each other. Of rarer ones the first batches do
not tell what a guess costs."""

EVEN = 0.7
"""Loss of a guess up to which it is one mean: ln 2, and something for rounding."""

SETTLED = 1.01
"""Times the loss of a guess from which a first loss is on its way down to that: it is no progress."""

SMOOTH = 5
"""Losses whose median says where the loss was."""

PROGRESS = 2.0
"""Standard errors of a median that two halves of the losses have to differ by, to be progress: chance does that once in forty looks at a
flat loss, and the next look says otherwise."""


FULL, GONE = 0.5, 1e-3
"""Parts of the largest learning rate: above the first it still trains, below the second a schedule has taken it away."""

FELL = -0.7
"""Correlation of the last `WINDOW` losses at a `FULL` rate with the number of the update up to which they were falling: chance gives one in
eighty such (of ten independent values), and a schedule that waits for a plateau, or for the end, lowers the rate where there is none."""

GONE_FOR, AT_LEAST = 1 / 3, 20
"""Part of all updates, and number of them, for which the rate has to be gone. What is meant for the whole run ends there: a cosine has its
last 2 % below `GONE`, steps by a tenth at 30, 60 and 90 % none, an exponential decay to 1e-4 a quarter. What is meant for epochs and is
stepped with every batch begins there."""

ROWS = 16
"""Kept records that are looked at before all of them are."""

STANDS = 0.97
"""Times the loss of the first half of that time that of the second may be: less is no progress, significant or not."""

STILL = 1e-4
"""Update ratio of every matrix below which next to nothing changes; the customary one is 1e-3 (Karpathy, lecture notes of CS231n)."""


@persistent(WINDOW)
def loss_diverging(history: History) -> Iterator[Finding]:
    """The loss has risen far above what it began with and stays there.

    With `L0` the median of the first `START` losses (of a term that is warmed up from 0, the largest of the first `WINDOW`): `LASTING` of
    the last `RECENT` losses, the last among them, exceed `DIVERGED_CLASSES` times the larger of `L0` and ln C, for a mean cross-entropy
    over C classes. For any other loss they exceed `DIVERGED * L0`, and updates change `OVERSHOOTS` of the weights. Or the last `RISEN` do,
    each (but one) is above the one before, and they grow `RUNAWAY` times (a cross-entropy by any factor). Or `STEADY` losses in a row are
    each `EACH` times the one before and grow `RUNAWAY` times together, to `FAR` times L0 and the loss of a guess. Or the logarithms of the
    last `TREND` lie along a line (`TOGETHER`) that grows `TREBLES` times and bends down by no more than `BENDS`, to `FAR` times L0 and more
    than the loss of a guess, which has to be known; of losses other than cross-entropies within the first `EARLY` records.

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
    start = _began_with(b.first_losses)
    recent, guess = b.losses[-RECENT:], guess_of(history)
    classes = history.meta.criterion == "cross_entropy" and guess > 0
    high = DIVERGED_CLASSES * max(start, guess) if classes else DIVERGED * start
    # Comparisons with what was not observed are False.
    above = recent > high
    climbs, grows = _climbs(recent, FAR * max(start, guess)), _grows(b.losses[-TREND:], FAR * start, guess)
    grows &= classes or history.recorded <= EARLY
    if not start > 0 or not (above[-1] or climbs or grows) or not _is_comparable(history):
        return
    # One batch of them may be an easy one.
    rises = int((recent[1:] > recent[:-1]).sum()) >= len(recent) - 2
    runs_away = rises and bool(above[-RISEN:].all()) and (classes or float(recent[-1]) > RUNAWAY * float(recent[0]))
    if not (int(above.sum()) >= LASTING and (classes or _overshoots(history))) and not (runs_away or climbs or grows):
        return
    now = float(recent[-1]) if climbs or grows else float(np.nanmedian(recent))
    if climbs or grows:
        high = min(high, FAR * (start if grows else max(start, guess)))
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
    logarithms: `L` is `SPIKE` times the largest of those `BEFORE` and at least `OF_START` of what the run began with,
    `log(L / m) / s >= SPIKE_SCORE`, and `log(L / m)` is `JUMPS` times that of the largest of the last `LATELY` losses. Of a
    cross-entropy that has come below `LEARNT` times ln C, and whose MAD is at most `SPREAD`, `L` above `WORSE` times ln C and `TWICE`
    the largest of those `BEFORE` is enough, instead of `SPIKE` times.

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
    if not loss > OF_START * start or len(before) < BEFORE // 2 or not loss >= TWICE * float(before.max()):
        return
    usual, guess = median(before), guess_of(history)
    if not usual > 0 or not _is_comparable(history):
        return
    logs = np.log(before)
    own = 1.4826 * median(np.abs(logs - median(logs)))
    learnt = history.meta.criterion == "cross_entropy" and guess > 0 and usual <= LEARNT * guess and own <= 2 * SPREAD
    if loss < (TWICE if learnt and loss >= WORSE * guess else SPIKE) * float(before.max()):
        return
    score = float(np.log(loss / usual)) / max(SPREAD, own)
    lately = b.losses[-LATELY - 1 : -1]
    lately = lately[np.isfinite(lately)]
    jump, largest = float(np.log(loss / usual)), float(np.log(max(float(lately.max()), usual) / usual))
    if score < SPIKE_SCORE or jump < JUMPS * largest:
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
    """After many updates the loss is what a constant output would give; or it stands where the learning rate was taken away.

    The loss is known to be a mean cross-entropy over C classes: with `G = ln C`, what equal logits give (of a binary one what the shares
    of the classes give, if that is `BALANCED`), the medians of both halves of the last `FLAT_UPDATES` losses are not below `G` by their
    standard error, nor below `AS_A_GUESS * G`, and do not differ by `PROGRESS` standard errors. Or it is a squared or absolute error of N
    predictions that were broadcast to N x N, every one against every target, and the medians do not differ so.

    Or the learning rate has been below `GONE` of its largest for `GONE_FOR` of the run and `AT_LEAST` updates, no matrix changes by
    `STILL`, the loss has not fallen since, is not low, and was falling (`FELL`) where the rate left `FULL` of its largest.

    Ignored: losses of other kinds, for what is high is not known of them (of noisy targets the best model explains a few per cent, a
    policy's loss does not fall when all goes well, and a model that has converged stays where it is); runs whose losses cannot be
    compared (see `loss_diverging`); a warm-up; everything that another open finding explains.

    Example:
        >>> with GradWatch(model):
        ...     for x, _ in loader:
        ...         step(F.cross_entropy(model(x), torch.randint(10, (64,))))
    """
    without = _without_a_rate(history)
    if without is not None:
        yield without
        return
    meta, b = history.meta, history.baselines
    classes = (meta.criterion == "cross_entropy" and meta.guess > 0) or (
        meta.criterion in BINARY and BALANCED <= meta.guess <= EVEN
    )
    if history.recorded < FLAT_UPDATES or not (classes or meta.broadcast):
        return
    losses = history.recent("loss", FLAT_UPDATES).astype(float)
    losses = losses[np.isfinite(losses)]
    if len(losses) < FLAT_UPDATES * 3 // 4 or not b.first_losses.size or not _is_comparable(history):
        return
    guess = guess_of(history)
    half = len(losses) // 2
    later = median(losses[half:])
    high = classes and all(_is_no_better(part, guess) for part in (losses[:half], losses[half:]))
    settled = _settled(losses, guess) if classes else losses
    half = len(settled) // 2
    if not (high or meta.broadcast) or _falls(settled[:half], settled[half:]) or _warms_up(history):
        return
    first = median(b.first_losses)
    since = _has_been_so_since(history, later)
    best = f", and a constant output would give {guess:.3g}" if meta.guess > 0 else ""
    yield Finding(
        "loss_plateau",
        Severity.WARNING,
        since,
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


def _climbs(recent: NDArray[np.float64], far: float) -> bool:
    """The last losses rise without a pause, from one to the next, to ten times what they were."""
    last = recent[-STEADY - 1 :]
    if len(last) <= STEADY or not last[-1] > far or not last[0] > 0 or not np.isfinite(last).all():
        return False
    if not (last[1:] >= EACH * last[:-1]).all() or not last[-1] >= RUNAWAY * last[0]:
        return False
    steps = np.diff(np.log(last))
    return bool(steps.max() <= 0.5 * steps.sum())  # no single jump


def _grows(last: NDArray[np.float64], far: float, guess: float) -> bool:
    """The last losses grow by a factor from one to the next, the same one or a growing one."""
    if (
        not guess > 0
        or len(last) < TREND
        or not median(last[-START:]) > max(far, guess)
        or not last.min() > 0
        or not np.isfinite(last).all()
    ):
        return False
    logs, n = np.log(last), np.arange(TREND) - (TREND - 1) / 2
    slope = float(logs @ n) / float(n @ n)
    if not slope * (TREND - 1) >= np.log(TREBLES) or not _correlation(logs) >= TOGETHER:
        return False
    half = TREND // 2
    first, second = float(logs[:half] @ (n[:half] - n[:half].mean())), float(logs[half:] @ (n[half:] - n[half:].mean()))
    return second >= BENDS * first


def _correlation(values: NDArray[np.float64]) -> float:
    """With their number; 0 of values that are all the same."""
    return float(np.corrcoef(values, np.arange(len(values)))[0, 1]) if values.min() < values.max() else 0.0


def _began_with(first: NDArray[np.float64]) -> float:
    """What the run began with. Where it is the number of the update times something, from next to nothing on, a coefficient is warmed up (the
    KL term of a VAE): then the largest of the first losses, for the very first ones are what the rest of the loss costs."""
    each = first[1:WINDOW] / np.arange(1, len(first[:WINDOW]))
    if (
        len(each) >= RAMP
        and first[0] <= FROM_NOTHING * first[1]
        and np.all(np.abs(each - np.median(each)) <= EVENLY * np.median(each))
    ):
        return float(first.max())
    return median(first[:START])


def _overshoots(history: History) -> bool:
    """Whether matrices have lately been changed by `OVERSHOOTS` of their size an update, in the median over them and the looks."""
    ratios = history.recent("update_ratio", 2 * RECENT)[:, history.meta.ndim >= 2]
    ratios = ratios[np.isfinite(ratios)]
    return bool(ratios.size and float(np.median(ratios)) >= OVERSHOOTS)


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


def _has_been_so_since(history: History, level: float) -> int:
    """The first kept update after the last in which the losses around it lay a tenth lower or higher; 0 where they never did."""
    losses = history.stat("loss").astype(float)
    losses = np.where(np.isfinite(losses), losses, np.inf)
    smooth = np.array([median(losses[i : i + SMOOTH]) for i in range(len(losses) - SMOOTH + 1)])
    other = np.flatnonzero((smooth < 0.9 * level) | (smooth > 1.1 * level))
    if not other.size:
        return int(history.steps[0])
    # The last of them that was another ends where half of it is.
    return int(history.steps[min(int(other[-1]) + SMOOTH // 2 + 1, len(losses) - 1)])


def _is_no_better(losses: NDArray[np.float64], guess: float) -> bool:
    """The median does not lie below that of a guess, by more than its own standard error or a twohundredth."""
    middle = median(losses)
    error = 1.25 * 1.4826 * median(np.abs(losses - middle)) / len(losses) ** 0.5
    return bool(middle >= max(guess - error, AS_A_GUESS * guess))


def _settled(losses: NDArray[np.float64], guess: float) -> NDArray[np.float64]:
    """Without the first ones, of at most a third, in which outputs that began too large come down to what a guess costs."""
    around = np.median(np.lib.stride_tricks.sliding_window_view(losses, SMOOTH), axis=1)
    near = np.flatnonzero(around <= SETTLED * guess)
    return losses[min(int(near[0]) if near.size else 0, len(losses) // 3) :]


def _falls(earlier: NDArray[np.float64], later: NDArray[np.float64]) -> bool:
    """The median has fallen by more than chance explains: its standard error is 1.25 standard deviations over the root of the number."""
    spread = 1.4826 * max(median(np.abs(earlier - median(earlier))), median(np.abs(later - median(later))))
    error = 1.25 * spread * (1 / len(earlier) + 1 / len(later)) ** 0.5
    return bool(median(earlier) - median(later) > PROGRESS * error)


def _without_a_rate(history: History) -> Finding | None:
    """The loss stands still since a schedule took the learning rate away, though it was still falling before."""
    ratios = history.baselines.update_ratio[history.meta.ndim >= 2]
    ratios = ratios[np.isfinite(ratios)]
    if not ratios.size or not ratios.max() < STILL or history.recorded < 2 * AT_LEAST or progress(history) is Progress.LOW:
        return None
    if not _may_be_gone(history):
        return None
    rates = np.fmax.reduce(history.stat("lr").astype(float), axis=1, initial=np.nan)
    known = np.isfinite(rates)
    rates, losses, steps = rates[known], history.stat("loss").astype(float)[known], history.steps[known]
    if not rates.size or not rates[-1] < GONE * rates.max():
        return None
    begin = int(np.flatnonzero(rates >= GONE * rates.max())[-1]) + 1
    trained, since = losses[: int(np.flatnonzero(rates >= FULL * rates.max())[-1]) + 1], losses[begin:]
    trained, since = trained[np.isfinite(trained)][-WINDOW:], since[np.isfinite(since)]
    if len(since) < max(AT_LEAST, GONE_FOR * history.recorded) or len(trained) < WINDOW or not _is_comparable(history):
        return None
    earlier, later = since[: len(since) // 2], since[len(since) // 2 :]
    if not _correlation(trained) <= FELL or (_falls(earlier, later) and median(later) < STANDS * median(earlier)):
        return None
    level = median(since)
    return Finding(
        "loss_plateau",
        Severity.WARNING,
        int(steps[begin]),
        message=f"the loss has been {level:.3g} for {len(since)} updates, since the learning rate fell to {rates[-1] / rates.max():.1g} of "
        "what it was",
        evidence={"loss": level, "updates": len(since), "lr": float(rates[-1]), "largest_lr": float(rates.max())},
    )


def _may_be_gone(history: History) -> bool:
    """A cheap look at a few of the kept records: whether the learning rate has fallen so far since one of them."""
    oldest = history.recorded - len(history)
    rows = np.unique(np.linspace(oldest, history.recorded - 1, ROWS).astype(int)).tolist()
    rates = [float(np.fmax.reduce(history.between("lr", row, row + 1), axis=None, initial=np.nan)) for row in rows]
    return bool(rates[-1] < GONE * np.nanmax(rates)) if np.isfinite(rates[-1]) else False


def _warms_up(history: History) -> bool:
    lr = np.fmax.reduce(history.recent("lr", FLAT_UPDATES).astype(float), axis=1, initial=np.nan)
    lr = lr[np.isfinite(lr)]
    return bool(lr.size > 1 and lr[-1] > 1.05 * lr[len(lr) // 2])
