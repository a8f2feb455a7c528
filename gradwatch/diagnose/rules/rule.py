"""What a rule is: a function of the history, told apart from other functions by nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from gradwatch.history import History
from gradwatch.records import Finding, Severity, SkipReason

PERSISTENCE = 10
"""Records a finding has to last, where a rule does not say otherwise: people's first runs have 20 to 50 updates."""


ALWAYS, TURNS = 64, 3
"""Records after each of which every rule is asked, as many as have full statistics by default; later one in three for patient rules."""

BETWEEN = 11
"""One record in so many is looked at besides: in a loop that repeats itself every three or six records (two or five updates of a
critic, one of a generator), turns of three alone would see the same part of it for ever."""


class Rule(Protocol):
    """Reads the history after each record and yields what it finds wrong; a finding is yielded as long as it holds.

    A rule keeps nothing between calls, so that a replay says what was said live. It may carry an attribute `persistence: int`, in
    records (see `persistent`): an incident ends when its rule has been silent for twice as long.

    Example:
        >>> def loss_above_ten(history):
        ...     loss = history.recent("loss", 1)
        ...     if loss.size and loss[0] > 10:
        ...         yield Finding("loss_above_ten", Severity.WARNING, int(history.steps[-1]), message=f"the loss is {loss[0]:.3g}")
    """

    def __call__(self, history: History, /) -> Iterable[Finding]: ...


R = TypeVar("R", bound=Callable[[History], Iterable[Finding]])


def persistent(records: int) -> Callable[[R], R]:
    """Set the `persistence` of a rule.

    Args:
        records: records that a finding lasts before it is told, at least 1.
    """

    def mark(rule: R) -> R:
        rule.persistence = records  # type: ignore[attr-defined]
        return rule

    return mark


def patient(rule: R) -> R:
    """Mark a rule whose evidence lasts: once `ALWAYS` records have been judged and nothing is wrong, it is asked by turns only.

    A verdict that needs eight records in a row then still comes within ten.
    """
    rule.patient = True  # type: ignore[attr-defined]
    return rule


def sampled(rule: R) -> R:
    """Mark a rule whose evidence stands in full-statistics records only (`Sampling`): it is asked after those."""
    rule.sampled = True  # type: ignore[attr-defined]
    return rule


def harm(history: History) -> tuple[Severity, str]:
    """How bad something that is not finite in the last record is, and what to add to the message: nothing came of it if it was left out."""
    if len(history) and history.recent("skip_reason", 1)[0] == SkipReason.NON_FINITE:
        return Severity.WARNING, "; the update was left out"
    return Severity.ERROR, ""


def is_turn(recorded: int) -> bool:
    """Whether what takes turns has its turn after `recorded` records: never more than `TURNS` apart."""
    return recorded % TURNS == 0 or recorded % BETWEEN == 0


def is_due(rule: Rule, history: History, calm: bool) -> bool:
    """Whether a rule is to be asked after the last record; `calm`: no incident is open, and the run has not ended."""
    if not history.full and getattr(rule, "sampled", False):
        return False
    return not (calm and history.recorded > ALWAYS and getattr(rule, "patient", False)) or is_turn(history.recorded)


def persistence_of(rule: Rule) -> int:
    """The `persistence` of a rule, `PERSISTENCE` where it has none."""
    return int(getattr(rule, "persistence", PERSISTENCE))


def name_of(rule: Rule) -> str:
    """What to call a rule when speaking of itself."""
    return str(getattr(rule, "__name__", None) or type(rule).__name__)


def looked_back(columns: int) -> int:
    """Records to look for the beginning in: enough for a verdict at update 15 of the largest networks, more where it is cheap."""
    return max(16, min(64, 200_000 // columns))
