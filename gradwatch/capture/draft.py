"""What is known of a record while it is open, and how that becomes a row of the history when it has closed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.capture.modules import Taken
from gradwatch.clock import Open, Outcome
from gradwatch.records import GradState, SkipReason


@dataclass(slots=True)
class Probes:
    """Gradients that are looked at again right before a step.

    Attributes:
        slots: the few that are looked at.
        of: all that their optimizer is about to step.
        by_scaler: a GradScaler has divided its scale out of them by now.
        expected: their norms over those read, if nobody else touched them.
        touched: somebody did.
        ratios: their norms now over those read; None where they are on a device.
    """

    slots: Sequence[int]
    of: Sequence[int]
    by_scaler: bool
    expected: float = 1.0
    touched: bool = False
    ratios: NDArray[np.float64] | None = None


@dataclass(slots=True)
class Draft:
    """What is known of the open record, by slot.

    Attributes:
        full: it takes full statistics.
        cadence: keys of the optimizers by whose records the cadence is counted.
        norm, nonfinite, weight_norm, ratio, lr, state: `[S]`, the columns of the history.
        loss, terms: sum of the roots of its backward passes (with the loss scale on it), and how many they were.
        told: what the user said that the loss is.
        scale, by_scaler: the loss scale, and whether a GradScaler made it.
        raised: an actor raised on purpose.
        clip_coef: smallest factor applied to a gradient between the read and the step.
        in_pre: slots that were read right before a step.
        noted: keys of the optimizers whose use of the gradients has been noted.
        probes: those whose numbers are on their way from a device.
        remote: slots whose norm is on its way from a device.
        norm_on_device: norms of this record came from a device.
        remote_loss: its loss is on a device.
        taken: what hooks on modules left behind; None: it was not looked at.
        layers: the statistics made of it; None: not yet.
        clipped_on_device: slots that were given to a clipper on their device.
        aside: its norms are an outlier that was dealt with, which is not learnt.
        inputs_bad: elements of the model's inputs that were found not to be finite; NaN: not looked for.
        left_out: keys of the optimizers whose step the watch leaves out, and why.
    """

    full: bool
    cadence: frozenset[int]
    norm: NDArray[np.float64]
    nonfinite: NDArray[np.float64]
    weight_norm: NDArray[np.float64]
    ratio: NDArray[np.float64]
    lr: NDArray[np.float64]
    state: NDArray[np.uint8]
    loss: float = 0.0
    terms: int = 0
    told: list[float] = field(default_factory=list)
    scale: float = 1.0
    by_scaler: bool = False
    raised: bool = False
    clip_coef: float = 1.0
    in_pre: set[int] = field(default_factory=set)
    noted: set[int] = field(default_factory=set)
    probes: list[Probes] = field(default_factory=list)
    remote: list[int] = field(default_factory=list)
    norm_on_device: bool = False
    remote_loss: bool = False
    taken: Taken | None = None
    layers: Mapping[str, NDArray[np.float64] | float] | None = None
    clipped_on_device: list[int] = field(default_factory=list)
    aside: bool = False
    inputs_bad: float = math.nan
    left_out: dict[int, SkipReason] = field(default_factory=dict)

    @classmethod
    def blank(cls, size: int, full: bool, cadence: frozenset[int]) -> Draft:
        nan = np.full((4, size), np.nan)
        return cls(full, cadence, nan[0], np.zeros(size), nan[1], nan[2], nan[3], np.zeros(size, np.uint8))

    def flag(self, slots: Any, state: GradState) -> None:
        """Set a flag on some slots (indices or a mask)."""
        self.state[slots] |= np.uint8(state)

    def clipped(self, slots: Sequence[int], coef: float) -> None:
        """Somebody multiplied the gradients of `slots`."""
        self.clip_coef = min(self.clip_coef, coef) if self.clip_coef != 1.0 else coef
        if coef < 1.0:
            self.flag(list(slots), GradState.CLIPPED)

    def only(self, slots: Sequence[int]) -> Draft:
        """What it would be had nothing but `slots` been reached."""
        others = np.ones(len(self.norm), bool)
        others[slots] = False
        copies = {name: getattr(self, name).copy() for name in ("norm", "nonfinite", "weight_norm", "ratio", "lr", "state")}
        for name, blank in (
            ("norm", np.nan),
            ("nonfinite", 0.0),
            ("weight_norm", np.nan),
            ("ratio", np.nan),
            ("lr", np.nan),
            ("state", 0),
        ):
            copies[name][others] = blank
        return replace(self, **copies)

    def resize(self, size: int) -> None:
        """Slots have come."""
        more = size - len(self.norm)
        for name in ("norm", "weight_norm", "ratio", "lr"):
            setattr(self, name, np.append(getattr(self, name), np.full(more, np.nan)))
        self.nonfinite = np.append(self.nonfinite, np.zeros(more))
        self.state = np.append(self.state, np.zeros(more, np.uint8))


@dataclass(slots=True)
class Closed:
    """A closed record on its way to the history.

    Attributes:
        outcome: how it closed.
        record: what the clock knows of it.
        draft: what was measured.
        owners: int64 `[S]`, the key of each slot's optimizer then, -1 for none.
        time: seconds since the watch was attached.
    """

    outcome: Outcome
    record: Open
    draft: Draft
    owners: NDArray[np.int64]
    time: float

    def write(
        self, row: NDArray[Any], columns: NDArray[np.int64] | None, layers: Mapping[str, NDArray[np.float64] | float] | None
    ) -> None:
        """Write it into a row in which nothing is observed.

        Args:
            row: a 0-d structured array of the history's layout.
            columns: the column of each slot, -1 for none; None: the slots are the columns.
            layers: statistics of modules and of the model's input, by name; None: not looked at.
        """
        draft, record, outcome = self.draft, self.record, self.outcome
        scale = draft.scale
        with np.errstate(all="ignore"):
            norm = draft.norm if scale == 1.0 else draft.norm / scale
            counted = norm
            if record.stepped:
                counted = self._without_strangers(norm)
            if counted is norm:
                counted = norm[~np.isnan(norm) | (draft.nonfinite > 0)] if np.isnan(norm).any() else norm
            total = math.sqrt(float(counted.dot(counted)))
            if columns is None:
                _write_columns(row, draft, norm, slice(None), slice(None))
            else:
                shown = np.flatnonzero(columns[: len(norm)] >= 0)
                _write_columns(row, draft, norm, columns[shown], shown)
            if draft.told:
                row["loss"], row["loss_terms"] = np.mean(draft.told), len(draft.told)
            else:
                row["loss"], row["loss_terms"] = draft.loss / scale if draft.terms else np.nan, draft.terms
            if draft.by_scaler and math.isinf(row["loss"]):
                row["loss"], row["loss_terms"] = np.nan, 0  # the scaled loss overflowed: what it was is not known
            row["total_norm"] = total
        skipped = outcome in (Outcome.SKIPPED, Outcome.FOUND_INF)
        reason = SkipReason.NONE
        if skipped:
            by_scaler = outcome is Outcome.FOUND_INF or (draft.by_scaler and not np.isfinite(total))
            reason = SkipReason.RAISED if draft.raised else SkipReason.SCALER if by_scaler else SkipReason.NO_STEP
            reason = next(iter(draft.left_out.values()), reason)
        row["clip_coef"] = draft.clip_coef
        row["skipped"], row["skip_reason"] = skipped, reason
        row["loss_scale"] = scale
        row["backward_calls"] = record.backward_calls
        row["time"] = self.time
        if layers is not None:
            for name, values in layers.items():
                row[name] = values

    def _without_strangers(self, norm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Leave the parameters of owners that did not step out of the record; the norms of those whose owner did."""
        draft, record = self.draft, self.record
        owners = self.owners[: len(norm)]
        reached = draft.state & np.uint8(GradState.REACHED) > 0
        if record.owners == record.stepped and not (reached & (owners < 0)).any():
            return norm
        steps = np.isin(owners, np.array([key for key in record.stepped if isinstance(key, int)], np.int64))
        foreign = reached & (owners >= 0) & ~steps
        if foreign.any():
            draft.state[foreign] = 0
            draft.nonfinite[foreign] = 0
            for values in (norm, draft.weight_norm, draft.ratio, draft.lr):
                values[foreign] = np.nan
        return norm[reached & steps]


def _write_columns(row: NDArray[Any], draft: Draft, norm: NDArray[np.float64], to: Any, of: Any) -> None:
    row["grad_norm"][to] = norm[of]
    state = draft.state[of]
    row["grad_state"][to] = state | np.uint8(GradState.ASIDE) * (state > 0) if draft.aside else state
    row["lr"][to] = draft.lr[of]
    if draft.full:
        row["weight_norm"][to] = draft.weight_norm[of]
        row["update_ratio"][to] = draft.ratio[of]
    nonfinite = draft.nonfinite[of]
    row["grad_nonfinite"][to] = np.where(np.isnan(norm[of]) & (nonfinite == 0), np.nan, nonfinite)
