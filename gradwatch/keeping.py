"""When the state of a training is kept as a good one, and which of them it goes back to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from gradwatch.capture.recorder import Recorder
from gradwatch.history import History
from gradwatch.protect.rollback import GoodStates, Kept
from gradwatch.records import Alert, Severity


class Keeping:
    """Keeps good states every so many updates.

    Args:
        every: updates between two states.
        models: the watched models.
        also: further objects whose states go back too.
        state: gives the watch's own.
        safely: calls what may raise, and says whether it returned.
    """

    def __init__(
        self,
        every: int,
        models: Mapping[str, nn.Module],
        also: Sequence[Any],
        *,
        state: Callable[[], Mapping[str, Any]],
        safely: Callable[[Callable[[], Any], str], bool],
    ) -> None:
        self._every, self._state, self._safely = every, state, safely
        self._good = GoodStates(models, also)
        self._due = self._failed = False

    @property
    def steps(self) -> tuple[int, ...]:
        """The updates before which the states were kept, oldest first."""
        return self._good.steps

    def record_closed(self, history: History, alerts: Sequence[Alert], recorder: Recorder | None) -> None:
        """See whether the state between the record that has closed and the next update is to be kept.

        It is after the first record, for then the optimizer is known, and after every n-th. Not while an ERROR is open, and not after an
        update that was left out or whose loss is not finite. Where several optimizers step in turns it waits for the last of them.
        """
        if recorder is None or self._failed:
            return
        self._due |= history.recorded == 1 or history.recorded % self._every == 0
        if self._due and not recorder.owners.living():  # weights that are moved by hand
            self.stepped(history, alerts, recorder, -1)

    def stepped(self, history: History, alerts: Sequence[Alert], recorder: Recorder, key: int) -> None:
        """The step of an optimizer has returned."""
        if not self._due or self._failed or not len(history) or not recorder.steps_last(key):
            return
        self._due = False
        loss = history.recent("loss", 1)[0]
        lost = history.recent("loss_terms", 1)[0] > 0 and not np.isfinite(loss)
        if lost or history.recent("skipped", 1)[0] or _errors(alerts):
            return

        ref = weakref.ref(recorder)  # which holds the hooks that hold what follows

        def keep() -> None:
            recorder = ref()
            if recorder is not None and not self._safely(lambda: self._keep(recorder), "keeping a good state"):
                self._failed = True

        # Schedulers and scalers move on after the step, and random numbers are drawn in the forward pass.
        if not recorder.inside.hooks.before_next_forward("good state", keep):
            keep()

    def _keep(self, recorder: Recorder) -> None:
        state = self._state()  # which closes a record that was waiting for an optimizer that does not step
        self._good.keep(recorder.recorded(), recorder.owners.living(), recorder.scale.heard, state)

    def go_back(self, alerts: Sequence[Alert]) -> Kept:
        """Put back the newest state from before the first open ERROR.

        Raises:
            RuntimeError: there is none, or the model has changed since.
        """
        return self._good.restore(min((alert.step for alert in _errors(alerts)), default=None))


def _errors(alerts: Sequence[Alert]) -> list[Alert]:
    return [alert for alert in alerts if alert.state == "open" and alert.severity >= Severity.ERROR]
