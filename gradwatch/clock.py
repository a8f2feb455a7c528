"""When an update begins, acts and closes: a state machine over what a training loop does, without torch.

A record is one parameter update: the backward passes since the last update, then the step of every optimizer that owns a parameter
they reached. Parameters are numbered by slots; an optimizer is any hashable key; `owner_of` maps a slot to the key of its owner.

    backward_begin ─▶ backward_end(reached) ─▶ pre(owner) ─▶ post(owner) ─▶ closed, if every owner of a reached slot has stepped
          │                                                                else at the next backward_begin, by what happened since
          └─ failed
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field


class Outcome(enum.Enum):
    """How a record closed."""

    STEPPED = "at least one owner stepped"
    FOUND_INF = "every owner that stepped was told by a GradScaler to leave the weights alone"
    BY_HAND = "no owner stepped and the weights moved"
    SKIPPED = "the gradients were cleared, no owner stepped, the weights did not move"
    DROPPED = "no record: the gradients served another model's optimizer"
    UNFINISHED = "no record: the block was left before anything stepped or moved"

    @property
    def is_record(self) -> bool:
        return self not in (Outcome.DROPPED, Outcome.UNFINISHED)


class Pre(enum.Enum):
    """What a pre-hook has to do."""

    IGNORE = "a nested step: only the outermost counts"
    WAIT = "a closure will compute the gradients inside the step"
    READ = "the gradients were not seen by any backward: read them now, then act"
    ACT = "the gradients were read when backward returned: act"


@dataclass(slots=True)
class Open:
    """The record that is open.

    Attributes:
        reached: slots that a backward reached, or whose gradient was read in a pre-hook.
        stepped: owners whose step has returned.
        found_inf: those of them that a GradScaler told to leave the weights alone.
        backward_calls: backward passes that reached a watched slot.
        owners: keys of the optimizers that own a reached slot.
        in_step: it was opened inside a step that is still running (a closure).
        evaluations: evaluations of the closure that reached a watched slot, 1 outside a closure.
        stepped_in_backward: an owner stepped while a backward was running.
        other_backward: since its last backward, one that reached nothing watched has returned.
        foreign_step: since its last backward, and before any other, an optimizer stepped that owns nothing watched.
    """

    reached: set[int] = field(default_factory=set)
    owners: set[Hashable] = field(default_factory=set)
    stepped: set[Hashable] = field(default_factory=set)
    found_inf: set[Hashable] = field(default_factory=set)
    backward_calls: int = 0
    in_step: bool = False
    evaluations: int = 1
    stepped_in_backward: bool = False
    other_backward: bool = False
    foreign_step: bool = False


class Clock:
    """The state machine. Every event may close the open record; it then returns how, and `closed` is that record.

    Args:
        owner_of: slot -> key of the optimizer that owns it; slots that nobody owns are absent. Read live.
    """

    def __init__(self, owner_of: Mapping[int, Hashable]) -> None:
        self.owner_of = owner_of
        self.open: Open | None = None
        self.closed: Open | None = None
        self.in_backward = False
        self._steps: list[Hashable] = []

    # -- backward ------------------------------------------------------------------------------------------------------------------

    def backward_begin(self, cleared: Callable[[], bool], moved: Callable[[], bool]) -> Outcome | None:
        """The outermost backward starts.

        Args:
            cleared: whether every gradient the open record has read is None or zero by now; called only where it decides.
            moved: whether a weight the open record reached has moved since it was read; called only where it decides.
        """
        outcome = self._begin(cleared, moved)
        self.in_backward = True
        return outcome

    def _begin(self, cleared: Callable[[], bool], moved: Callable[[], bool]) -> Outcome | None:
        record = self.open
        if record is None:
            return None
        if record.in_step:
            if record.backward_calls and cleared():
                record.evaluations += 1
            return None
        if record.stepped:
            return self._close()
        if record.foreign_step:
            return self._close(self._of_others(record, moved))
        if cleared():
            return self._close(Outcome.BY_HAND if moved() else Outcome.SKIPPED)
        if not record.owners and moved():
            return self._close(Outcome.BY_HAND)
        return None

    def backward_end(self, reached: Iterable[int]) -> Outcome | None:
        """The outermost backward has returned; `reached`: the slots it left a new gradient in."""
        self.in_backward = False
        reached = set(reached)
        record = self.open
        if not reached and (record is None or not record.stepped_in_backward):
            if record is not None:
                record.other_backward = True
            return None
        record = self._reach(reached)
        record.backward_calls += 1
        record.other_backward = record.foreign_step = False
        if record.stepped and not self._steps and record.owners <= record.stepped:
            return self._close()
        return None

    def backward_failed(self) -> None:
        """The outermost backward raised: what it accumulated is not known."""
        self.in_backward = False

    # -- step ----------------------------------------------------------------------------------------------------------------------

    def steps_running(self) -> int:
        """Steps that have begun and not returned."""
        return len(self._steps)

    def forget_steps(self, keep: int = 0) -> None:
        """Steps beyond the first `keep` ended by an exception, so that their post-hook never came."""
        del self._steps[keep:]
        if not self._steps and self.open is not None:
            self.open.in_step = False

    def pre(self, owner: Hashable, closure: bool, held: Callable[[], set[int]]) -> tuple[Pre, Outcome | None]:
        """An optimizer that owns something watched is about to step.

        Args:
            owner: its key; `owner_of` is up to date.
            closure: a closure was passed to the step.
            held: slots that hold a gradient which no backward and no earlier look has seen (inside a backward: of this owner only);
                called only where it decides.
        """
        self._steps.append(owner)
        if len(self._steps) > 1:
            return Pre.IGNORE, None
        record, outcome = self.open, None
        if closure:
            return Pre.WAIT, None  # it may only return the loss; if it calls backward, that closes what is over
        if record is not None and not self.in_backward:
            if owner in record.owners and (record.backward_calls or owner not in record.stepped):
                return Pre.ACT, None
            if record.stepped and not record.backward_calls:
                outcome = self._close()
        slots = held()
        if not slots:
            return Pre.ACT, outcome
        self._reach(slots).in_step = False
        return Pre.READ, outcome

    def post(self, owner: Hashable, found_inf: bool = False) -> Outcome | None:
        """The step has returned; `found_inf`: a GradScaler told it to leave the weights alone."""
        if self._steps:
            owner = self._steps.pop()
            if self._steps:
                return None
        record = self.open
        if record is None:
            return None
        record.in_step = False
        if owner not in record.owners:
            self.foreign_post()  # for this record it is as good as an optimizer that owns nothing watched
            return None
        record.stepped.add(owner)
        if found_inf:
            record.found_inf.add(owner)
        if self.in_backward:
            record.stepped_in_backward = True
            return None
        return self._close() if record.owners <= record.stepped else None

    def foreign_post(self) -> None:
        """An optimizer that owns nothing watched has stepped."""
        if self.open is not None and not self.open.other_backward:
            self.open.foreign_step = True

    # -- the user, and the end -----------------------------------------------------------------------------------------------------

    def by_hand(self, reached: Iterable[int] = ()) -> Outcome | None:
        """The user says that the update is over; `reached`: slots that hold a gradient, where no record is open."""
        if self.open is None:
            reached = set(reached)
            if not reached:
                return None
            self._reach(reached)
        assert self.open is not None
        return self._close(None if self.open.stepped else Outcome.BY_HAND)

    def exit(self, moved: Callable[[], bool], left_out: Callable[[], bool] = bool) -> Outcome | None:
        """The block is left.

        Args:
            moved: whether a weight the open record reached has moved since it was read.
            left_out: whether it is known that no step will follow, because a GradScaler left it out.
        """
        self._steps.clear()
        self.in_backward = False
        record = self.open
        if record is None:
            return None
        if record.stepped:
            return self._close()
        if record.foreign_step:
            return self._close(self._of_others(record, moved))
        if moved():
            return self._close(Outcome.BY_HAND)
        return self._close(Outcome.SKIPPED if left_out() else Outcome.UNFINISHED)

    def abandon(self) -> None:
        """The update at hand is given up: it is in no record."""
        self.open = None
        self.in_backward = False
        self._steps.clear()

    # -- inside --------------------------------------------------------------------------------------------------------------------

    @staticmethod
    def _of_others(record: Open, moved: Callable[[], bool]) -> Outcome:
        """What a step of tensors that are not watched was: another model's, or one of master copies that were copied back."""
        return Outcome.BY_HAND if not record.owners and moved() else Outcome.DROPPED

    def owners_changed(self) -> None:
        """`owner_of` has changed for slots that the open record may have reached."""
        if self.open is not None:
            self.open.owners = self._owners(self.open.reached)

    def _reach(self, slots: set[int]) -> Open:
        if self.open is None:
            self.open = Open(in_step=bool(self._steps))
        self.open.reached |= slots
        self.open.owners |= self._owners(slots)
        return self.open

    def _owners(self, slots: set[int]) -> set[Hashable]:
        owner_of = self.owner_of
        return {owner_of[slot] for slot in slots if slot in owner_of}

    def _close(self, outcome: Outcome | None = None) -> Outcome:
        record = self.open
        assert record is not None
        if outcome is None:
            outcome = Outcome.FOUND_INF if record.found_inf and record.found_inf == record.stepped else Outcome.STEPPED
        self.closed, self.open = record, None
        return outcome
