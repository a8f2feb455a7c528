"""One fault, one incident: findings are folded under their cause, extend what is open, and become alerts that are sent three times.

An alert is sent when its incident opens, when its severity rises and when it ends, and once more where a look that comes later finds its
origin. In between the incident goes on silently.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from gradwatch.diagnose.advice import DIVERGED, explain
from gradwatch.diagnose.causes import (
    CAUSES,
    FROM_START,
    POISON,
    RANK,
    SYMPTOM,
    dies_of_it,
    earliest,
    explodes_in_depth,
    is_origin,
    touches,
)
from gradwatch.diagnose.naming import layers_of, merged, overlap
from gradwatch.diagnose.rules.rule import PERSISTENCE, Rule, is_due, name_of, persistence_of
from gradwatch.history import History
from gradwatch.records import TRACED, Alert, Finding, Inquiry, Severity

# A spike is one record; what it does to the weights may be told as well, but not instead.
_EVENTS = frozenset({"gradient_spike", "loss_spike"})


@dataclass(slots=True)
class _Incident:
    alert: Alert
    persistence: int
    record: int
    """Number of records closed when there was evidence last."""
    earliest: int
    """The first step at which it may have begun: `alert.step`, or before it where nobody looked."""


class Incidents:
    """Runs the rules after each record and keeps what they found.

    Args:
        rules: functions of the history.
        notice: told, once each, of rules that raised.
    """

    def __init__(self, rules: Iterable[Rule], *, notice: Callable[[str], None]) -> None:
        self._rules = tuple(rules)
        self._notice = notice
        self._off: set[int] = set()
        self._incidents: list[_Incident] = []

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """Every incident in its present state, in the order in which they opened."""
        return tuple(incident.alert for incident in self._incidents)

    def judge(self, history: History, also: Iterable[Finding] = (), inquiry: Inquiry | None = None) -> tuple[Alert, ...]:
        """Run the rules over the history as it is now.

        Args:
            history: with a record more than at the last call, or with its `pending` or `ended` changed.
            also: what rules found in the last record before its step, and would not find now, for something was done about it.
            inquiry: what was found out last about where a value that is not finite was born.

        Returns:
            The alerts to send: incidents that opened, were traced to their origin, whose severity rose, or that ended.
        """
        send: list[Alert] = []
        found = self._run(history)
        told = {finding.rule for finding, _ in found}
        lasts = {name_of(rule): persistence_of(rule) for rule in self._rules}
        found += [(finding, lasts.get(finding.rule, 1)) for finding in also if finding.rule not in told]
        exploded = any(explodes_in_depth(finding) for finding, _ in found)
        # A cause opens its incident before its consequences look for one.
        for finding, persistence in sorted(found, key=lambda pair: RANK.get(pair[0].rule, len(RANK))):
            if _is_what_most_began_with(finding) and (exploded or self._has_exploded()):
                continue
            incident = self._cause_of(finding, history) or self._same(finding)
            if incident is None:
                incident = self._open(finding, persistence, history)
                self._take_over(incident, history)
                send.append(incident.alert)
            elif self._extend(incident, finding, history):
                send.append(incident.alert)
        if inquiry is not None:
            send = self._trace(send, inquiry)
        send.extend(self._end(history))
        return tuple(send)

    def trace(self, alert: Alert, inquiry: Inquiry | None) -> Alert:
        """Add what an inquiry found out to an alert of an open incident that is about to be sent."""
        for incident in self._incidents:
            if inquiry is not None and incident.alert == alert:
                incident.alert = _traced(alert, inquiry)
                return incident.alert
        return alert

    def _trace(self, send: list[Alert], inquiry: Inquiry) -> list[Alert]:
        """Add to incidents that an inquiry is about what it found out; the alerts to send then."""
        for incident in self._incidents:
            alert = incident.alert
            known = alert.origin is not None and (
                inquiry.origin is None or alert.origin.is_complete or not inquiry.origin.is_complete
            )
            told = known or (inquiry.origin is None and alert.cause == inquiry.cause)
            if alert.state != "open" or alert.rule not in TRACED or told or not alert.step <= inquiry.step <= alert.last_step:
                continue
            if alert.severity < Severity.WARNING:  # what does no harm is not what was asked about
                continue
            if inquiry.origin is None and not inquiry.cause:
                continue
            incident.alert = _traced(alert, inquiry)
            if alert in send:
                send[send.index(alert)] = incident.alert
            elif inquiry.origin is not None:
                send.append(incident.alert)
        return send

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain Python objects and alerts."""
        return {
            "incidents": [(each.alert, each.persistence, each.record, each.earliest) for each in self._incidents],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. A rule that was switched off gets another chance: it may be another one now."""
        self._incidents = [_Incident(*incident) for incident in state["incidents"]]

    # -- findings ------------------------------------------------------------------------------------------------------------------

    def _run(self, history: History) -> list[tuple[Finding, int]]:
        found: list[tuple[Finding, int]] = []
        calm = not history.ended and not any(incident.alert.state == "open" for incident in self._incidents)
        for i, rule in enumerate(self._rules):
            if i in self._off or not is_due(rule, history, calm):
                continue
            try:
                # Whatever a user's rule yields is looked at inside the `try`, for it is theirs.
                scoped = [self.in_scope(finding, history) for finding in rule(history) or ()]
            except Exception:
                self._off.add(i)
                self._notice(f"the rule {name_of(rule)} raised and is switched off:\n{traceback.format_exc()}")
                continue
            found += [(finding, persistence_of(rule)) for finding in scoped if finding is not None]
        return found

    def in_scope(self, finding: Finding, history: History) -> Finding | None:
        """The finding with its modules named and what is out of scope removed; None if nothing of it is left."""
        if not isinstance(finding, Finding):
            raise TypeError(f"a rule yields Finding, got {type(finding).__name__}: {finding!r}")
        evidence = {name: float(value) for name, value in finding.evidence.items() if isfinite(value)}
        parameters, layers = _names(finding.parameters), _names(finding.layers)
        if parameters or layers:
            meta = history.meta
            if meta.hidden:
                parameters = tuple(name for name in parameters if name not in meta.hidden)
                layers = tuple(name for name in layers if name not in meta.hidden)
                if not parameters and not layers:
                    return None
            if not layers:
                layers = layers_of(meta, parameters)
        return replace(finding, step=int(finding.step), parameters=parameters, layers=layers, evidence=evidence)

    def _has_exploded(self) -> bool:
        return any(explodes_in_depth(each.alert) for each in self._incidents)

    # -- incidents -----------------------------------------------------------------------------------------------------------------

    def _cause_of(self, finding: Finding, history: History) -> _Incident | None:
        """The open incident of which the finding is a consequence."""
        rank = RANK.get(finding.rule)
        if rank is None:
            return None
        if finding.rule == SYMPTOM:
            others = (i for i in self._incidents if i.alert.rule != SYMPTOM and i.alert.severity >= Severity.WARNING)
            explained = next((i for i in others if i.alert.state == "open"), None)
            if explained is not None:
                return explained
        for incident in self._incidents:
            alert = incident.alert
            if alert.state != "open" or alert.rule not in RANK:
                continue
            if alert.severity == Severity.INFO < finding.severity:  # what does no harm causes none
                continue
            if alert.rule in POISON and alert.severity < Severity.ERROR and finding.rule not in POISON:  # it was left out
                continue
            # A bad value travels from a gradient into the weights and on into the loss: whichever was bad first is the cause.
            poisoned = alert.rule in POISON and finding.rule in POISON
            if poisoned and alert.step <= finding.step:
                return incident
            if alert.rule == finding.rule or _is_news(alert, finding):
                continue
            if RANK[alert.rule] < rank and _began(incident, finding.rule) <= finding.step and touches(alert, finding, history):
                return incident
            if dies_of_it(alert, finding, history):
                return incident
        return None

    def _same(self, finding: Finding) -> _Incident | None:
        for incident in self._incidents:
            alert = incident.alert
            alike = alert.rule == finding.rule and bool(alert.layers) == bool(finding.layers)
            # Of two models that train each other, the one that explodes tears the other along.
            together = "growing" in alert.evidence and "growing" in finding.evidence
            if alert.state == "open" and alike and (together or overlap(alert.layers, finding.layers)):
                return incident
        return None

    def _open(self, finding: Finding, persistence: int, history: History) -> _Incident:
        cause, remedy = explain(finding, history)
        now = max(0, history.recorded - 1)
        alert = Alert(
            rule=finding.rule,
            severity=finding.severity,
            step=finding.step,
            layers=finding.layers,
            parameters=finding.parameters,
            message=finding.message,
            evidence=finding.evidence,
            cause=cause,
            remedy=remedy,
            origin=None,
            last_step=max(now, finding.step),
            count=1,
            state="open",
        )
        return _Incident(alert, max(1, persistence), history.recorded, earliest(finding, history))

    def _take_over(self, incident: _Incident, history: History) -> None:
        """Add an incident that opens; where consequences that began with it were told before, it takes the place of the first of them."""
        cause = incident.alert
        rank = RANK.get(cause.rule, len(RANK))
        dies = [dies_of_it(cause, other.alert, history) for other in self._incidents]
        taken = [
            i
            for i, other in enumerate(self._incidents)
            if (rank < RANK.get(other.alert.rule, -1) or dies[i])
            and other.alert.rule not in _EVENTS
            and incident.earliest - (not _follows_steps(cause.rule, other.alert.rule)) <= other.alert.step
            and (other.alert.step <= cause.step + 1 or dies[i] or cause.rule in FROM_START)
            and history.recorded - other.record <= 2 * incident.persistence
            and cause.rule not in POISON
            and (bool(other.alert.layers) == bool(cause.layers) or cause.rule in FROM_START)
            and (dies[i] or touches(cause, other.alert, history))
        ]
        if not taken:
            self._incidents.append(incident)
            return
        first = self._incidents[taken[0]].alert
        incident.alert = replace(cause, step=min(cause.step, first.step))
        incident.earliest = min(incident.earliest, first.step)
        self._incidents[taken[0]] = incident
        for i in reversed(taken[1:]):
            del self._incidents[i]

    def _extend(self, incident: _Incident, finding: Finding, history: History) -> bool:
        """Take further evidence; True if the alert is to be sent again."""
        alert = incident.alert
        count = alert.count + (1 if history.recorded > incident.record else 0)
        incident.record = history.recorded
        last = max(alert.last_step, history.recorded - 1)
        if self._is_origin(finding, alert, history):
            changes: dict[str, Any] = {"rule": finding.rule, "layers": finding.layers, "parameters": finding.parameters}
            changes |= {"message": finding.message, "evidence": finding.evidence}
            if alert.origin is None:
                changes["cause"], changes["remedy"] = explain(finding, history)
            incident.alert = replace(alert, count=count, last_step=last, severity=finding.severity, **changes)
            return True
        if finding.rule != alert.rule:
            incident.alert = replace(alert, count=count, last_step=last)
            return False
        rises = finding.severity > alert.severity
        changes = {"count": count, "last_step": last, "severity": max(alert.severity, finding.severity)}
        # Once a bad value is in the weights it is everywhere: where it was first is what there is to say.
        if finding.rule in POISON:
            if rises and alert.severity < Severity.WARNING:  # what was none of the training's business has become it
                changes |= {"step": finding.step, "message": finding.message, "evidence": finding.evidence}
                changes |= {"parameters": finding.parameters, "layers": finding.layers}
        else:
            changes |= {"step": min(alert.step, finding.step), "message": finding.message, "evidence": finding.evidence}
            incident.earliest = min(incident.earliest, finding.step)
            if finding.parameters != alert.parameters or finding.layers != alert.layers:
                changes |= self._union(alert, finding, history)
        if rises and alert.origin is None:
            changes["cause"], changes["remedy"] = explain(finding, history)
        incident.alert = replace(alert, **changes)
        return rises

    def _is_origin(self, finding: Finding, alert: Alert, history: History) -> bool:
        # What was told to do no harm was there before.
        return is_origin(finding, alert, history) and self._same(finding) is None

    def _union(self, alert: Alert, finding: Finding, history: History) -> dict[str, Any]:
        # A finding that names parameters is the more exact of two.
        if bool(finding.parameters) != bool(alert.parameters):
            return {"parameters": finding.parameters, "layers": finding.layers} if finding.parameters else {}
        parameters = merged(history.meta, finding.parameters, alert.parameters)
        if parameters == alert.parameters and set(finding.layers) <= set(alert.layers):
            return {}
        both = alert.layers + finding.layers if "growing" in alert.evidence else finding.layers + alert.layers  # who grew first
        layers = layers_of(history.meta, parameters) if parameters else tuple(dict.fromkeys(both))
        return {"parameters": parameters, "layers": layers}

    def _end(self, history: History) -> list[Alert]:
        ended = []
        for incident in self._incidents:
            if incident.alert.state == "open" and history.recorded - incident.record >= 2 * incident.persistence:
                incident.alert = replace(incident.alert, state="ended")
                ended.append(incident.alert)
        return ended


def _traced(alert: Alert, inquiry: Inquiry) -> Alert:
    """With what was found out. Of a training that has diverged the operator that overflowed in the end is not the cause."""
    if alert.cause.startswith(DIVERGED) and inquiry.origin is not None and inquiry.overflowed:
        return replace(alert, origin=inquiry.origin)
    return replace(
        alert, origin=inquiry.origin or alert.origin, cause=inquiry.cause or alert.cause, remedy=inquiry.remedy or alert.remedy
    )


def _began(incident: _Incident, consequence: str) -> int:
    """The first step at which a consequence of it may begin: a step shows in the next record."""
    return incident.earliest - (consequence.startswith("update_ratio") and not _follows_steps(incident.alert.rule, consequence))


def _follows_steps(cause: str, consequence: str) -> bool:
    """A gradient that explodes does so after the steps that made it: those before are no consequence of it."""
    return cause == "exploding_gradient" and consequence.startswith("update_ratio")


def _is_what_most_began_with(finding: Finding) -> bool:
    """Most weights began too large: where the gradient explodes across depth by that, that is the better name for it."""
    return finding.rule == "poor_init" and finding.evidence.get("most", 0.0) > 0


def _is_news(cause: Alert, consequence: Alert | Finding) -> bool:
    """A loss that is gone for good is told, whatever steps or gradients are told besides: it is what the user goes by."""
    return consequence.rule == "loss_diverging" and (cause.rule == "update_ratio_too_large" or "growing" in cause.evidence)


def _names(given: str | Iterable[str]) -> tuple[str, ...]:
    """Names as a tuple; one name alone is what a user's rule is likely to give."""
    return (given,) if isinstance(given, str) else tuple(given)


__all__ = ["CAUSES", "PERSISTENCE", "Incidents"]
