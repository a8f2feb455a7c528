"""When to ask why an update went wrong, and what is remembered of the answer."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable

from gradwatch.capture import private
from gradwatch.capture.call import Call, Case, tensors_of
from gradwatch.capture.tape import TAPE
from gradwatch.investigate.causes import EXPLAINED, explain
from gradwatch.investigate.graph import Suspect
from gradwatch.investigate.origin import investigate, loss_of, seen, weights
from gradwatch.investigate.tracer import Tracer
from gradwatch.records import TRACED, Alert, Inquiry, Severity

APART = 10
"""Updates between two inquiries where no incident is open in between, for nobody's rules look for it: as long as such an incident lasts."""

logger = logging.getLogger("gradwatch")

ARMED = 10
"""Updates that are traced as they run, after one whose origin could not be told: a fault that comes with every third batch is met, and
one that does not come back has cost ten slow updates."""


class Inquest:
    """Asks once an incident; and where the answer is not complete, watches the next updates as they run.

    Args:
        alerts: the incidents so far.
        notice: told if it failed and asks no more.

    Attributes:
        last: the last answer.
        armed: updates that are still to be traced.
    """

    def __init__(self, alerts: Callable[[], Iterable[Alert]], notice: Callable[[str], None]) -> None:
        self._alerts, self._notice = alerts, notice
        self._off = False
        self._loss_by: tuple[int, Suspect | None] = (-1, None)
        self._tracer: Tracer | None = None
        self.last: Inquiry | None = None
        self.armed = 0

    def wants(self, step: int, by_scaler: bool, loss_is_bad: bool) -> bool:
        """Whether there is something to be found out; while a GradScaler searches its scale, gradients that overflow are no news."""
        if self._off or (self.last is not None and self.last.step == step and self._tracer is None):
            return False  # once an update: later backward passes add to what is there
        open_ones = [
            alert
            for alert in self._alerts()
            if alert.state == "open" and alert.rule in TRACED and alert.severity >= Severity.WARNING
        ]
        if by_scaler and not loss_is_bad:
            return any(alert.origin is None and alert.rule == "loss_scale_collapse" for alert in open_ones)
        if any(alert.origin is not None and alert.origin.is_complete for alert in open_ones):
            return False
        first = min((alert.step for alert in open_ones), default=0)
        if self._tracer is not None or self.last is None:
            return True
        return self.last.step < first if open_ones else self.last.step <= step - APART

    def before(self, case: Case) -> None:
        """Look at the graph of a loss that is not finite, while it holds values."""
        try:
            self._loss_by = case.step, loss_of(case)
        except Exception:
            self._fail()

    def after(self, case: Case) -> Inquiry | None:
        """Run the update again, and look at its graph; one that was traced as it ran is known already."""
        step, loss_by = self._loss_by
        self._loss_by = -1, None
        try:
            if self._tracer is not None and self._tracer.broken:
                logger.debug("an update could not be traced: %s", self._tracer.broken)
                self.armed = 0
                self.stop()
                return None
            if self._tracer is not None:
                answer = seen(case, self._tracer)
                self.stop()
                if answer is not None or weights(case) is not None:  # spoilt weights spoil everything, and tell nothing any more
                    self.armed = 0
                self.last = answer or self.last
                return answer
            with TAPE.deaf():
                self.last = investigate(case, loss_by if step == case.step else None)
            self.armed = 0 if self.last.origin is not None and self.last.origin.source else ARMED
        except Exception:
            self._fail()
            return None
        return self.last

    def explain(self, alert: Alert, case: Case) -> Inquiry | None:
        """What there is to be found out about an incident that opens, after the step; None for nothing."""
        if self._off or alert.state != "open":
            return None
        try:
            if alert.rule == "non_finite_weight" and alert.origin is None:
                return weights(case)
            if alert.rule in EXPLAINED and alert.severity >= Severity.WARNING:
                with TAPE.deaf():
                    return explain(alert, case)
        except Exception as error:
            # The model may refuse to run again, and that is no fault of ours.
            logger.debug("the cause of %s could not be looked for: %r", alert.rule, error)
        return None

    # -- the next updates ----------------------------------------------------------------------------------------------------------

    def begin(self, call: Call, case: Case) -> None:
        """A forward pass begins: trace what runs from here on, if that is wanted; not within somebody else's dispatch mode.

        Args:
            call: of the forward pass.
            case: names of modules and parameters.
        """
        if self._off or not self.armed:
            return
        try:
            if self._tracer is None:
                if private.watched_operators():
                    return
                given = [("parameter", parameter) for _, parameter in case.parameters.values()]
                given += [("delta", p.grad) for _, p in case.parameters.values() if p.grad is not None]
                self._tracer = Tracer(case.modules, given)
                self._tracer.watch()
            for tensor in tensors_of((call.args, call.kwargs)):
                self._tracer.give("input", tensor)
            for buffer in call.model.buffers():
                self._tracer.give("buffer", buffer)
        except Exception:
            self._fail()

    def pause(self) -> None:
        """What runs from here on is ours: under a dispatch mode the numbers that a graph keeps are no tensors any more (measured)."""
        if self._tracer is not None:
            self._tracer.pause()

    def backward_begins(self) -> None:
        """The outermost backward begins now: what runs is the user's again."""
        if self._tracer is not None:
            self._tracer.in_backward = True
            self._tracer.watch()

    def was_fine(self) -> None:
        """The update that was traced went well."""
        if self._tracer is not None:
            self.stop()
            self.armed -= 1

    def stop(self) -> None:
        """Trace no more, and let go of the graph of a loss whose backward never returned."""
        self._loss_by = -1, None
        tracer, self._tracer = self._tracer, None
        if tracer is not None:
            tracer.pause()

    def _fail(self) -> None:
        self._off = True
        self.armed = 0
        text = traceback.format_exc()
        try:
            self.stop()
        finally:
            self._notice(f"to look for where a NaN or an Inf was born failed, and is not tried again; please report this:\n{text}")
