"""What the rules say of an update before its step, for those who act on it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Sequence

import numpy as np

from gradwatch.diagnose.causes import RANK
from gradwatch.diagnose.incidents import Incidents
from gradwatch.diagnose.rules import Rule, name_of, persistence_of
from gradwatch.history import History
from gradwatch.present import words
from gradwatch.protect.actor import touches
from gradwatch.records import Finding, Inquiry, Severity


class Foresight:
    """Asks rules about the record that is about to close.

    Args:
        rules: of the watch.
        incidents: what they have found so far.
        history: gives the record of the run.
        is_full: whether the open record has full statistics.
        tell: takes what is to be told of what is done.
        notice: takes what there is to say of the watch itself.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        incidents: Incidents,
        *,
        history: Callable[[], History],
        last_inquiry: Callable[[], Inquiry | None],
        is_full: Callable[[], bool],
        tell: Callable[[str], None],
        notice: Callable[[str], None],
    ) -> None:
        self._rules, self._incidents = rules, incidents
        self._history, self._is_full, self._last_inquiry = history, is_full, last_inquiry
        self._tell, self._notice = tell, notice
        self._off: set[str] = set()

    def foresee(self, rules: Collection[str]) -> Sequence[Finding]:
        """What these rules find in the provisional record, causes first."""
        history, found = self._history(), []
        with np.errstate(all="ignore"), history.provisional(self._is_full()):
            for rule in self._rules:
                name = name_of(rule)
                if name not in rules or name in self._off:
                    continue
                try:
                    scoped = [self._incidents.in_scope(finding, history) for finding in rule(history) or ()]
                    found += [finding for finding in scoped if finding is not None]
                except Exception:
                    self._off.add(name)
                    self._notice(f"the rule {name} raised before a step and is not asked there any more:\n{traceback.format_exc()}")
                    self._tell(f"nothing is done for {name} any more: the rule raised, see watch.notices")
        return sorted((one for one in found if one.severity >= Severity.WARNING), key=lambda one: RANK.get(one.rule, len(RANK)))

    def is_open(self, rule: str, layers: Collection[str]) -> bool:
        """Whether an incident of the rule is open that concerns some of these layers."""
        return any(a.rule == rule and a.state == "open" and touches(a.layers, layers) for a in self._incidents.alerts)

    def inquiry(self, since: int) -> Inquiry | None:
        """What was found out last about where a value was born that is not finite, if that was in this update or later."""
        last = self._last_inquiry()
        return last if last is not None and last.step >= since else None

    def patience(self, rule: str) -> int:
        """Records for which a rule may be silent before what it found is over: as for its incidents."""
        return 2 * max((persistence_of(one) for one in self._rules if name_of(one) == rule), default=1)

    def story(self, still: bool = False) -> str:
        """What was found so far, in a sentence; "" for nothing.

        Args:
            still: only what is not over.
        """
        told = [
            f"{words.rule_words(alert.rule)} {words.began(alert)} ({alert.message})"
            for alert in self._incidents.alerts
            if alert.severity >= Severity.WARNING and (alert.state == "open" or not still)
        ]
        more = f" and {len(told) - 3} more in watch.alerts" if len(told) > 3 else ""
        return f"Found so far: {'; '.join(told[:3])}{more}. " if told else ""

    def tell(self, text: str) -> None:
        """Say what is done from now on, or no more."""
        self._tell(text)
