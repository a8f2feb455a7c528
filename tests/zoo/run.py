"""One run of the zoo under the watch."""

from __future__ import annotations

import traceback
import warnings

import torch

from gradwatch import Alert, GradWatch
from gradwatch.records import Severity
from tests.zoo.case import Case
from tests.zoo.outcome import Alarm, Heard, Outcome


def run(case: Case, seed: int) -> Outcome:
    """Train the run of a seed under a `GradWatch` with the default rules."""
    return Outcome(case, seed, listen(case, seed))


def listen(case: Case, seed: int) -> Heard:
    """What the watch says of it. A run that raises ends there, and the traceback is kept beside what was said until then."""
    told: list[tuple[int, Alert]] = []

    def tell(alert: Alert) -> None:
        if alert.severity >= Severity.WARNING and alert.state == "open":
            told.append((watch.history.recorded, alert))

    torch.manual_seed(seed)
    watch, error = None, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            setup = case.build(seed)
            watch = GradWatch(setup.model, console=False, on_alert=tell)
            with watch:
                for _ in setup.train():
                    pass
    except Exception:
        error = traceback.format_exc()
    if watch is None:
        return Heard(error=error)
    alarms = [_alarm(alert, told) for alert in watch.alerts if alert.severity >= Severity.WARNING]
    alarms += _taken_back({a.name for a in alarms}, told)
    owners = tuple(dict.fromkeys(p.layer for p in watch.history.meta.parameters if p.trainable))
    return Heard(tuple(sorted(alarms, key=lambda a: a.sent)), owners, tuple(watch.notices), error)


def _taken_back(names: set[str], told: list[tuple[int, Alert]]) -> list[Alarm]:
    """What was said under a name that no alert has in the end, for its cause was found later: whoever listened has heard it."""
    first: dict[str, tuple[int, Alert]] = {}
    for updates, alert in told:
        if alert.rule not in names:
            first.setdefault(alert.rule, (updates, alert))
    return [_alarm(alert, [(updates, alert)]) for updates, alert in first.values()]


def _alarm(alert: Alert, told: list[tuple[int, Alert]]) -> Alarm:
    # An incident may be told of again, and under the name of its cause: the first that bore the name it has now counts.
    of_the_rule = [(updates, a) for updates, a in told if a.rule == alert.rule]
    same = [updates for updates, a in of_the_rule if a.step == alert.step] or [updates for updates, _ in of_the_rule]
    sent = same[0] if same else alert.last_step + 1
    advice = f"{alert.cause} {alert.remedy}".strip()
    return Alarm(alert.rule, (alert.rule,), alert.layers, alert.step, sent, alert.message, advice)
