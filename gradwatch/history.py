"""What happened, as far back as memory allows: a bounded ring of records, the static facts of the model, and shared baselines.

Rules see nothing else, so they run without a model and without torch, live or over the record of a dead run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.baselines import Baselines
from gradwatch.facts import FROZEN_AFTER, LayerFact, Meta, ParameterFact, Pending
from gradwatch.records import SCHEMA, STATISTICS, StepRecord

__all__ = ["MAX_BYTES", "History", "LayerFact", "Meta", "ParameterFact", "Pending", "RingBuffer"]

MAX_BYTES = 64 * 2**20
"""Upper bound of the ring buffer. 64 MB is below 1 % of the memory of any machine that trains 10,000 layers."""


class RingBuffer:
    """The last `capacity` rows of one structured dtype, in one fixed allocation.

    Args:
        dtype: structured numpy dtype of a row.
        capacity: rows wanted, at least 1; fewer are kept where they would take more than `max_bytes` (at least one always is).
        max_bytes: bound of the allocation, bytes.
        total: rows that went before and are not kept, so that the next one has this number.
    """

    def __init__(self, dtype: np.dtype[Any], capacity: int, max_bytes: int = MAX_BYTES, total: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"RingBuffer(capacity={capacity}): needs at least 1 row")
        self.capacity = self.room(dtype, capacity, max_bytes)
        self.total = total
        self._kept = 0
        self._rows = np.zeros(self.capacity, dtype)
        # Assigning a structured row goes field by field (20 us); its bytes go at once.
        self._bytes = self._rows.view(np.uint8).reshape(self.capacity, dtype.itemsize)

    @staticmethod
    def room(dtype: np.dtype[Any], capacity: int, max_bytes: int = MAX_BYTES) -> int:
        """Rows that are kept where `capacity` are wanted."""
        return max(1, min(int(capacity), max_bytes // max(1, dtype.itemsize)))

    def __len__(self) -> int:
        return self._kept

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self._rows.dtype
        return dtype

    @property
    def nbytes(self) -> int:
        return int(self._rows.nbytes)

    def append(self, row: NDArray[Any]) -> None:
        """Take a 0-d structured array of the ring's dtype."""
        self._bytes[self.total % self.capacity] = np.frombuffer(row.tobytes(), np.uint8)
        self.commit()

    def next(self, content: NDArray[np.uint8]) -> NDArray[Any]:
        """The next row, to be written in place and committed; the oldest row gives way where the ring is full.

        Args:
            content: uint8 `[dtype.itemsize]`, what it holds for a start.
        """
        at = self.total % self.capacity
        if self._kept == self.capacity:
            self._kept -= 1
        self._bytes[at] = content
        row: NDArray[Any] = self._rows[at : at + 1].reshape(())
        return row

    def commit(self) -> None:
        """The next row is written."""
        self.total += 1
        self._kept = min(self._kept + 1, self.capacity)

    def uncommit(self) -> None:
        """It is not: its row will be written again."""
        self.total -= 1
        self._kept -= 1

    def column(self, name: str, last: int | None = None, but: int = 0) -> NDArray[Any]:
        """The last rows of one field, oldest first, as a copy, without the very last `but` of them."""
        n = len(self) if last is None else max(0, min(last, len(self)))
        n, stop = max(0, n - but), self.total - but
        start = stop - n
        first, end = start % self.capacity, stop % self.capacity
        field_ = self._rows[name]
        if n == 0:
            return field_[:0].copy()
        if first < end:
            return field_[first:end].copy()
        return np.concatenate((field_[first:], field_[:end]))


@dataclass
class History:
    """The record of a run: `stat(name)` gives a statistic over the kept records, oldest first.

    Attributes:
        meta: static facts of the model.
        baselines: running baselines, shared by rules.
        pending: what happened since the last closed record.
        ended: the watched block is being left: rules judge what they have.
        full: the last record has full statistics (`Sampling`).
    """

    meta: Meta
    window: int = 512
    baselines: Baselines = field(default_factory=lambda: Baselines(0))
    pending: Pending = field(default_factory=Pending)
    ended: bool = False
    full: bool = False
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        self.baselines = Baselines(len(self.meta.parameters), len(self.meta.layers))
        self._ring = RingBuffer(_row_dtype(len(self.meta.parameters), len(self.meta.layers)), self.window, self.max_bytes)
        self._blank: NDArray[Any] | None = None
        self._next = self._ring.next(self._blank_bytes())
        self._set_names()

    def _set_names(self) -> None:
        self._parameters = tuple(f.name for f in self.meta.parameters)
        self._layers = tuple(f.name for f in self.meta.layers)

    def __len__(self) -> int:
        return len(self._ring)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters, frozen ones too: the columns of `[T, P]` statistics."""
        return self._parameters

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all modules, root and containers included, in registration order: the columns of `[T, L]` statistics."""
        return self._layers

    @property
    def capacity(self) -> int:
        """Records that are kept: `Sampling.window`, or fewer where that would take more than 64 MB."""
        return self._ring.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the ring buffer."""
        return self._ring.nbytes

    @property
    def recorded(self) -> int:
        """Records closed since the start, kept or not: the number of the next record."""
        return self._ring.total

    @property
    def steps(self) -> NDArray[np.int64]:
        """int64 `[T]`: numbers of the kept records, oldest first."""
        return np.arange(self._ring.total - len(self._ring), self._ring.total, dtype=np.int64)

    def stat(self, name: str) -> NDArray[Any]:
        """A statistic over the kept records, oldest first, as a copy.

        Args:
            name: one of `gradwatch.records.STATISTICS`.

        Returns:
            float32 `[T, P]`, `[T, L]` or `[T]`, but uint8 for `grad_state` and `skip_reason`, bool for `skipped`, float64 for `time`.
            NaN where nothing was observed.

        Raises:
            KeyError: no such statistic; the message lists the names.
        """
        return self.recent(name, None)

    def recent(self, name: str, last: int | None) -> NDArray[Any]:
        """Like `stat`, of the last `last` records only (fewer at the start): what a rule should ask for."""
        if name not in STATISTICS:
            raise KeyError(f"no statistic {name!r}; there are: {', '.join(STATISTICS)}")
        return self._ring.column(name, last)

    def between(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Like `stat`, of the records `start` to `stop - 1` by their number, as far as they are kept."""
        if name not in STATISTICS:
            raise KeyError(f"no statistic {name!r}; there are: {', '.join(STATISTICS)}")
        return self._ring.column(name, self.recorded - start, max(0, self.recorded - stop))

    def record(self, last: int = 1) -> StepRecord:
        """The `last`-th record from the end."""
        if not 1 <= last <= len(self):
            raise IndexError(f"record({last}): {len(self)} records are kept")
        stats: dict[str, Any] = {}
        for name, statistic in STATISTICS.items():
            value = self._ring.column(name, last)[0]
            stats[name] = value.item() if statistic.axis == "update" else value
        return StepRecord(self.recorded - last, self.parameters, self.layers, stats)

    # -- written by the watch ------------------------------------------------------------------------------------------------------

    def blank_row(self) -> NDArray[Any]:
        """A row in which nothing is observed: a 0-d structured array, NaN in every float field."""
        return np.frombuffer(bytearray(self._blank_bytes().tobytes()), self._ring.dtype).reshape(())

    def _blank_bytes(self) -> NDArray[np.uint8]:
        if self._blank is None or self._blank.dtype is not self._ring.dtype:
            self._blank = np.zeros(1, self._ring.dtype)
            for name, statistic in STATISTICS.items():
                if statistic.dtype.startswith("f"):
                    self._blank[name] = np.nan
        return self._blank.view(np.uint8)

    def append(self, row: NDArray[Any]) -> None:
        """Take a closed record; its number is `recorded` before the call."""
        self._ring.append(row)
        self._take(row, any(bool((row[name] == row[name]).any()) for name in _FULL))

    def next_row(self) -> NDArray[Any]:
        """The row of the next record, blank, to be written in place (no copy: 10 us less) and then committed."""
        self._next = self._ring.next(self._blank_bytes())
        return self._next

    def commit(self, full: bool) -> None:
        """The record in the row that `next_row` gave has closed; its number is `recorded` before the call.

        Args:
            full: it has full statistics.
        """
        self._ring.commit()
        self._take(self._next, full)

    @contextmanager
    def provisional(self, full: bool) -> Iterator[None]:
        """In here the row that `next_row` gave counts as a record that has closed, for rules that judge an update before its step.

        Args:
            full: it has full statistics.
        """
        baselines, was_full = self.baselines, self.full
        self.baselines = baselines.copy()
        try:
            self.commit(full)
            try:
                yield
            finally:
                self._ring.uncommit()
        finally:
            self.baselines, self.full = baselines, was_full

    def _take(self, row: NDArray[Any], full: bool) -> None:
        self.full = full
        self.baselines.update(row, self.recorded - 1, full, self.meta.trainable)

    def set_meta(self, meta: Meta) -> None:
        """Replace the static facts. Columns are matched by name: new ones are NaN in the past, lost ones go."""
        old_p, old_l, was = self._parameters, self._layers, self.meta.trainable
        self.meta = meta
        self._set_names()
        if (old_p, old_l) == (self._parameters, self._layers):
            self.baselines.thaw(meta.trainable & ~was, FROZEN_AFTER - 1)
            return
        old = self._ring
        dtype = _row_dtype(len(self._parameters), len(self._layers))
        keep = min(len(old), RingBuffer.room(dtype, self.window, self.max_bytes))
        ring = RingBuffer(dtype, self.window, self.max_bytes, total=old.total - keep)
        p_from, p_to = _match(old_p, self._parameters)
        l_from, l_to = _match(old_l, self._layers)
        columns = {name: old.column(name, keep) for name in STATISTICS}
        self._ring = ring
        for t in range(keep):
            row = self.blank_row()
            for name, statistic in STATISTICS.items():
                if statistic.axis == "update":
                    row[name] = columns[name][t]
                elif statistic.axis == "parameter":
                    row[name][p_to] = columns[name][t][p_from]
                else:
                    row[name][l_to] = columns[name][t][l_from]
            ring.append(row)
        self.baselines.relayout(len(self._parameters), p_from, p_to, (l_from, l_to, len(self._layers)))

    # -- a run that goes on later, or is judged again ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain Python and numpy objects."""
        return {
            "schema": SCHEMA,
            "meta": self.meta,
            "window": self.window,
            "total": self.recorded,
            "columns": {name: self.stat(name) for name in STATISTICS},
            "baselines": self.baselines.state_dict(),
            "pending": self.pending,
            "full": self.full,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> History:
        """The history that `state_dict` described.

        Raises:
            ValueError: the state was written with another layout.
        """
        if state.get("schema") != SCHEMA:
            raise ValueError(f"history of schema {state.get('schema')!r}: this gradwatch reads schema {SCHEMA}")
        history = cls(state["meta"], state["window"])
        history._fill(state["columns"], state["total"])
        history.baselines.load_state_dict(state["baselines"])
        history.pending, history.full = state["pending"], state["full"]
        return history

    def _fill(self, columns: Mapping[str, NDArray[Any]], total: int) -> None:
        kept = len(columns["time"])
        self._ring = RingBuffer(self._ring.dtype, self.window, self.max_bytes, total=total - kept)
        for t in range(kept):
            row = self.blank_row()
            for name in STATISTICS:
                row[name] = columns[name][t]
            self._ring.append(row)

    def replay(self) -> Iterator[History]:
        """A second history that grows record by record as this one did: yields itself after each, `ended` set after the last.

        Rules run over it say what they said live, as far as the kept records and the final `meta` allow.
        """
        again = replace(self)
        again._ring = RingBuffer(self._ring.dtype, self.window, self.max_bytes, total=self.recorded - len(self))
        again.pending, again.ended = replace(self.pending, backward_calls=0, unowned=0), False
        columns = {name: self.stat(name) for name in STATISTICS}
        for t in range(len(self)):
            row = again.blank_row()
            for name in STATISTICS:
                row[name] = columns[name][t]
            again.append(row)
            yield again
        again.pending, again.ended = self.pending, True
        yield again


_FULL = ("weight_norm", "update_ratio", "saturated_fraction", "activation_nonfinite", "input_nonfinite")
"""What rules read that stands in full-statistics records only."""


def _row_dtype(parameters: int, layers: int) -> np.dtype[Any]:
    shape: dict[str, tuple[int, ...]] = {"parameter": (parameters,), "layer": (layers,), "update": ()}
    return np.dtype([(name, statistic.dtype, shape[statistic.axis]) for name, statistic in STATISTICS.items()])


def _match(old: tuple[str, ...], new: tuple[str, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    at = {name: i for i, name in enumerate(old)}
    pairs = [(at[name], i) for i, name in enumerate(new) if name in at]
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]
