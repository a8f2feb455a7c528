"""The score of a group of runs, and its table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tests.zoo.outcome import Outcome

IN_TIME, LOCALISED, TRUE = 0.95, 0.90, 0.95
"""The reach: shares of the sick runs named in time, of those with a place localised, and of the alerts in sick runs that hold."""


@dataclass
class Score:
    """Counts over runs.

    Attributes:
        sick: runs with a fault.
        named: of these, those whose fault was named at all.
        in_time: of these, those in which it was named in time.
        placed: sick runs whose fault has a place.
        localised: of these, those in which the first layer named lies in it.
        alerts: alerts at WARNING or above in sick runs.
        untrue: of these, those that do not hold.
        healthy: runs without a fault.
        alarmed: of these, those with an alert at WARNING or above.
        broken: runs of either kind that raised.
        delays: for each named run, updates from the onset to the alert.
    """

    sick: int = 0
    named: int = 0
    in_time: int = 0
    placed: int = 0
    localised: int = 0
    alerts: int = 0
    untrue: int = 0
    healthy: int = 0
    alarmed: int = 0
    broken: int = 0
    delays: list[int] = field(default_factory=list)

    @property
    def silent(self) -> bool:
        """No healthy run was alarmed, and none raised."""
        return not self.broken and not self.alarmed

    @property
    def reached(self) -> bool:
        """The reach is met. What a group has none of, it cannot miss."""
        return (
            self.silent
            and self.in_time >= IN_TIME * self.sick
            and self.localised >= LOCALISED * self.placed
            and self.alerts - self.untrue >= TRUE * self.alerts
        )


def score(outcomes: Iterable[Outcome]) -> Score:
    """Count."""
    total = Score()
    for o in outcomes:
        total.broken += bool(o.heard.error)
        if not o.sick:
            total.healthy += 1
            total.alarmed += bool(o.heard.alarms)
            continue
        total.sick += 1
        total.named += o.named
        total.in_time += o.in_time
        total.placed += bool(o.case.region)
        total.localised += bool(o.case.region) and o.localised
        total.alerts += len(o.heard.alarms)
        total.untrue += len(o.untrue)
        if o.delay is not None:
            total.delays.append(o.delay)
    return total


def wrong(outcome: Outcome) -> list[str]:
    """What was not as it should be, in a few words each."""
    raised = ["raised"] * bool(outcome.heard.error)
    if not outcome.sick:
        return raised + ["ALARMED"] * bool(outcome.heard.alarms)
    missed = ["not named"] if not outcome.named else ["late"] * (not outcome.in_time) + ["not localised"] * (not outcome.localised)
    return raised + missed + [f"{len(outcome.untrue)} untrue"] * bool(outcome.untrue)


def table(scores: Mapping[str, Score]) -> str:
    """A line per measure and a column per tool, aligned."""
    rows: list[tuple[str, list[str]]] = [
        ("sick runs", [str(s.sick) for s in scores.values()]),
        ("  named", [_of(s.named, s.sick) for s in scores.values()]),
        ("  named in time", [_of(s.in_time, s.sick) for s in scores.values()]),
        ("  localised, of those with a place", [_of(s.localised, s.placed) for s in scores.values()]),
        ("  alerts", [str(s.alerts) for s in scores.values()]),
        ("  alerts that hold", [_of(s.alerts - s.untrue, s.alerts) for s in scores.values()]),
        ("  updates to the verdict, median", [_quantile(s.delays, 0.5) for s in scores.values()]),
        ("  updates to the verdict, 90 %", [_quantile(s.delays, 0.9) for s in scores.values()]),
        ("healthy runs", [str(s.healthy) for s in scores.values()]),
        ("  alarmed", [_of(s.alarmed, s.healthy) for s in scores.values()]),
        ("runs that raised", [str(s.broken) for s in scores.values()]),
    ]
    lines = [("", list(scores))] + rows
    first = max(len(label) for label, _ in lines)
    widths = [max(len(cells[i]) for _, cells in lines) for i in range(len(scores))]
    return "\n".join(
        "  ".join([label.ljust(first)] + [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]).rstrip()
        for label, cells in lines
    )


def _of(part: int, whole: int) -> str:
    return f"{part} = {100 * part / whole:.1f} %" if whole else f"{part} of none"


def _quantile(values: list[int], q: float) -> str:
    """The least value that the share `q` of them does not exceed."""
    return str(sorted(values)[math.ceil(q * len(values)) - 1]) if values else "-"
