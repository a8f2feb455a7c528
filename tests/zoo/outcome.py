"""What a tool said of one run of the zoo, held against what is true of the run."""

from __future__ import annotations

from dataclasses import dataclass

from tests.zoo.case import Case

IN_TIME, LATER, NEVER_CALLED, PLATEAU = 15, 10, 30, 100
"""Updates to a verdict that the design allows: a fault present from the start, one that starts later, a module that is never called, a loss
that does not move."""


@dataclass(frozen=True)
class Alarm:
    """One alert at WARNING or above, of this tool or another.

    Attributes:
        name: what the tool calls it.
        rules: gradwatch's rules that the name covers; () for a name that speaks of none of them.
        layers: modules it names, the most responsible first; () where it names none.
        step: the update, from 0, at which the trouble began, by the tool's word.
        sent: number of updates that had been seen when it was first said.
        message: what it says.
        advice: the cause and the remedy it gives.
    """

    name: str
    rules: tuple[str, ...]
    layers: tuple[str, ...]
    step: int
    sent: int
    message: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Heard:
    """Everything that was said of one run. It holds no case, for a case does not travel between processes.

    Attributes:
        alarms: in the order in which they were sent.
        owners: modules that own parameters, by name.
        notices: what the tool said of itself.
        error: the traceback, where the run or the tool raised; "" else.
    """

    alarms: tuple[Alarm, ...] = ()
    owners: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Outcome:
    """One run and what was said of it.

    Attributes:
        case: the run.
        seed: its seed.
        heard: what was said.
    """

    case: Case
    seed: int
    heard: Heard

    @property
    def sick(self) -> bool:
        return bool(self.case.rules)

    @property
    def hits(self) -> tuple[Alarm, ...]:
        """The alarms that name the fault, at whatever place: what was said before the fault was there does not."""
        return tuple(a for a in self.heard.alarms if set(a.rules) & set(self.case.rules) and not self._early(a))

    @property
    def named(self) -> bool:
        return bool(self.hits)

    @property
    def delay(self) -> int | None:
        """Updates from the onset to the first alarm that names the fault; None where none does."""
        return min(a.sent for a in self.hits) - self.case.onset if self.hits else None

    @property
    def in_time(self) -> bool:
        return self.delay is not None and self.delay <= allowed(self.case)

    @property
    def localised(self) -> bool:
        """The first layer that an alarm names lies in the region of the fault; without a region, naming the fault is enough."""
        if not self.case.region:
            return self.named
        return any(a.layers and self._inside(a.layers[0]) for a in self.hits)

    @property
    def untrue(self) -> tuple[Alarm, ...]:
        """The alarms that do not hold: in a healthy run all of them."""
        return tuple(a for a in self.heard.alarms if not self._holds(a))

    def _holds(self, alarm: Alarm) -> bool:
        if not self.sick or self._early(alarm):
            return False
        if set(alarm.rules) & set(self.case.also):
            return True
        placed = not self.case.region or not alarm.layers or self._inside(alarm.layers[0])
        return bool(set(alarm.rules) & set(self.case.rules)) and placed

    def _early(self, alarm: Alarm) -> bool:
        """Before the fault was there. One update is forgiven: what changes after a step shows in the next update."""
        return alarm.step < self.case.onset - 1

    def _inside(self, layer: str) -> bool:
        """It is a module of the region, lies in one, or holds nothing with parameters but such."""
        if self._in_region(layer):
            return True
        below = [m for m in self.heard.owners if m == layer or not layer or m.startswith(layer + ".")]
        return bool(below) and all(self._in_region(m) for m in below)

    def _in_region(self, module: str) -> bool:
        return any(not r or module == r or module.startswith(r + ".") for r in self.case.region)


def allowed(case: Case) -> int:
    """Updates from the onset to the alarm that the case allows, both ends counted.

    The onset is an index from 0 and `sent` a number of updates: an alarm in the very update of a later onset has a delay of 1.
    """
    later = case.onset > 0
    if case.within is not None:
        return case.within + later
    if "never_called" in case.name:
        return NEVER_CALLED
    if case.rules == ("loss_plateau",):
        return PLATEAU + later
    return LATER + 1 if later else IN_TIME
