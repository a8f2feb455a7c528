"""How the loss is doing, as far as the rules on gradients need to know."""

from __future__ import annotations

import enum

import numpy as np

from gradwatch.baselines import KEPT, WINDOW
from gradwatch.diagnose.arrays import median
from gradwatch.history import History

LOW = 1 / 20
"""Of its first values: a loss below is low, and gradients that fall with it are its success (design, section 4)."""

IMPROVED = 0.9
"""Of its first values: a loss below improves. Batch noise on the zoo moves the median of ten by 5 % (measured)."""


def guess_of(history: History) -> float:
    """The loss of the best constant output in an update of as many losses as the last one that showed any; 0 where it is not known."""
    terms = history.recent("loss_terms", KEPT)
    terms = terms[np.isfinite(history.recent("loss", KEPT))]
    return history.meta.guess * float(terms[-1]) if terms.size and terms[-1] > 0 else 0.0


def has_learnt(history: History) -> bool:
    """Whether the last losses lie below what the run began with, before its first step, and below that of the best constant output.

    A loss that has been lost has learnt nothing; where none is known, or none any more, this is True.
    """
    b = history.baselines
    recent = b.losses[-WINDOW // 2 :]
    recent = recent[np.isfinite(recent)]
    if not b.first_losses.size or not recent.size:
        return not b.losses.size or not history.recent("loss_terms", 1)[0] > 0
    guess = guess_of(history)
    limits = [float(b.first_losses[0]), *([guess] if guess > 0 else [])]
    if min(limits) <= 0:
        return True
    return median(recent) < IMPROVED * min(limits)


def recovers_soon(history: History, within: int) -> bool:
    """Whether the last `WINDOW` losses fall so fast that they will be below that of a guess (or what the run began with) soon.

    Args:
        history: any.
        within: updates from now, at the pace of these losses.
    """
    b = history.baselines
    recent = b.losses[-WINDOW:]
    recent = recent[np.isfinite(recent)]
    if len(recent) < WINDOW or not b.first_losses.size:
        return False
    guess = guess_of(history)
    aim = IMPROVED * (min(guess, float(b.first_losses[0])) if guess > 0 else float(b.first_losses[0]))
    earlier, later = median(recent[: WINDOW // 2]), median(recent[WINDOW // 2 :])
    if not 0 < later < earlier or not aim > 0:
        return False
    pace = float(np.log(earlier / later)) / (WINDOW / 2)
    return float(np.log(later / aim)) <= within * pace


class Progress(enum.Enum):
    """What the last ten losses are, compared with the first ten."""

    UNKNOWN = "unknown"
    STUCK = "stuck"
    IMPROVING = "improving"
    LOW = "low"


def progress(history: History) -> Progress:
    """Compare the median of the last `WINDOW` losses with that of the first; unknown unless both are positive and the losses overlap
    in at most half of them."""
    b = history.baselines
    recent = b.losses[-WINDOW:]
    recent = recent[np.isfinite(recent)]
    if len(b.first_losses) < WINDOW or len(recent) < WINDOW // 2:
        return Progress.UNKNOWN
    first, last = median(b.first_losses), median(recent)
    if first <= 0 or last < 0:
        return Progress.UNKNOWN
    if last < LOW * first:
        return Progress.LOW
    early = median(b.first_losses[: WINDOW // 2])
    late = median(recent[-(WINDOW // 2) :])
    return Progress.IMPROVING if late < IMPROVED * early else Progress.STUCK
