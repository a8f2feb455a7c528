"""From the samples that hooks took to the per-layer statistics of a record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradwatch.capture import saturation
from gradwatch.capture.modules import BEHIND, FUNCTION, PLACES, Cell, Taken
from gradwatch.capture.parts import Activation, Part, Row
from gradwatch.capture.units import Units
from gradwatch.records import STATISTICS

PER_LAYER = tuple(name for name, statistic in STATISTICS.items() if statistic.axis == "layer")
"""Names of the statistics, `[L]` each."""


_TINY = 1e-25
"""A sum of squares below this may have lost some to underflow: those of float32 numbers below 1e-19 are 0."""

_AT_ONCE = 256
"""Rows that are worked on at a time: 1 MB, which stays in the second-level cache."""


class _Table:
    """All rows of a record, read once.

    Attributes:
        values: float32 `[N, W]`, as wide as the longest row; 0 beyond the elements of one.
        count: `[N]`, elements.
        numel: `[N]`, elements of the tensor that was sampled.
        squares, largest, nonfinite: `[N]`, of a row's elements; `nonfinite` is 1 at least where the whole tensor is not finite.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        size = len(rows)
        owners, numbers, elements, numel, summed = zip(*rows, strict=True)
        self.count = np.array(elements, np.int64)
        self.numel = np.array(numel, np.float64)
        number = np.array(numbers, np.int64)
        width = int(self.count.max())
        if owners.count(owners[0]) == size:
            self.values, whole = owners[0].values(number, width)
        else:
            self.values, whole = np.zeros((size, width), np.float32), np.ones(size, bool)
            for samples in dict.fromkeys(owners):
                at = np.array([i for i, owner in enumerate(owners) if owner is samples], np.int64)
                self.values[at], whole[at] = samples.values(number[at], width)
        if self.count.min() < width:
            np.copyto(self.values, 0.0, where=np.arange(width) >= self.count[:, None])
        self.squares, self.largest, self.nonfinite = (np.zeros(size) for _ in range(3))
        for start in range(0, size, _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            values = self.values[part]
            self.squares[part] = np.matmul(values[:, None, :], values[:, :, None]).reshape(-1)
            self.largest[part] = np.maximum(values.max(axis=1), -values.min(axis=1))
        # Where float32 has lost squares to overflow or underflow they are summed again; NaN and Inf stay.
        for i in np.flatnonzero(~np.isfinite(self.squares) | ((self.squares < _TINY) & (self.largest > 0))):
            self.squares[i] = np.square(self.values[i], dtype=np.float64).sum()
            self.nonfinite[i] = np.count_nonzero(~np.isfinite(self.values[i]))
        # One that lies between the chunks shows in the sum of the whole.
        self.nonfinite += np.array(summed) & ~whole & (self.nonfinite == 0)


def statistics(taken: Taken, cells: Iterable[Cell], layers: int, scale: float) -> dict[str, NDArray[np.float64] | float]:
    """The per-layer statistics of a record, and those of its inputs.

    Args:
        taken: what hooks left behind.
        cells: of the modules whose units are followed.
        layers: L.
        scale: factor on the loss, which is divided out of gradients.

    Returns:
        By name: float64 `[L]`, NaN where nothing was observed, or a scalar for the inputs.
    """
    parts = [part for part in taken.parts if part.column >= 0]
    found: dict[str, NDArray[np.float64] | float] = {name: np.full(layers, np.nan) for name in PER_LAYER}
    count = np.full(layers, np.nan)
    count[list(taken.calls)] = list(taken.calls.values())
    found["calls"] = count
    with np.errstate(all="ignore"):
        if parts or taken.inputs:
            rows = {id(row): row for part in parts for row in (part.out, *part.rows())}
            rows |= {id(row): row for row in taken.inputs}
            table, place = _Table(list(rows.values())), {key: i for i, key in enumerate(rows)}
            column = np.array([part.column for part in parts], np.int64)
            _take_outputs(found, table, column, [place[id(part.out)] for part in parts], layers)
            _take_deltas(found, table, place, parts, column, layers, scale)
            seen = _activations(parts, {cell.column: cell for cell in cells})
            _take_activations(found, table, place, seen, layers)
            _take_units(found, table, place, seen, layers)
            _take_inputs(found, table, [place[id(row)] for row in taken.inputs])
        _take_compiled(found, taken.compiled)
    return found


_Found = dict[str, NDArray[np.float64] | float]


def _where(seen: NDArray[np.bool_], values: NDArray[Any]) -> NDArray[np.float64]:
    chosen: NDArray[np.float64] = np.where(seen, values, np.nan)
    return chosen


def _take_outputs(found: _Found, table: _Table, column: NDArray[np.int64], at: list[int], layers: int) -> None:
    seen = np.bincount(column, minlength=layers) > 0
    found["activation_rms"] = _where(
        seen, np.sqrt(np.bincount(column, table.squares[at], layers) / np.bincount(column, table.count[at], layers))
    )
    largest = np.zeros(layers)
    np.maximum.at(largest, column, table.largest[at])
    found["activation_absmax"] = _where(seen, largest)
    found["activation_nonfinite"] = _where(seen, np.bincount(column, table.nonfinite[at], layers))


def _take_deltas(
    found: _Found,
    table: _Table,
    place: Mapping[int, int],
    parts: Sequence[Part],
    column: NDArray[np.int64],
    layers: int,
    scale: float,
) -> None:
    deltas = {id(delta): delta for part in parts for delta in (part.above, part.below) if delta is not None and delta.rows}
    if not deltas:
        return
    # A delta that belongs to another record's part is not among the rows.
    of = [(i, place[id(row)]) for i, delta in enumerate(deltas.values()) for row in delta.rows if id(row) in place]
    which, at = np.array(of, np.int64).reshape(-1, 2).T
    squares = np.bincount(which, table.squares[at] * table.numel[at] / table.count[at], len(deltas))
    nonfinite = np.bincount(which, table.nonfinite[at], len(deltas))
    number = {key: i for i, key in enumerate(deltas)}
    above = np.array([number.get(id(part.above), -1) for part in parts], np.int64)
    below = np.array([number.get(id(part.below), -1) for part in parts], np.int64)
    known = above >= 0
    seen = np.bincount(column[known], minlength=layers) > 0
    found["delta_norm"] = _where(seen, np.sqrt(np.bincount(column[known], squares[above[known]], layers)) / scale)
    found["delta_nonfinite"] = _where(seen, np.bincount(column[known], nonfinite[above[known]], layers))
    both = known & (below >= 0)
    ratio = np.bincount(column[both], squares[below[both]], layers) / np.bincount(column[both], squares[above[both]], layers)
    found["gain"] = _where(np.isfinite(ratio), np.sqrt(ratio))


@dataclass(frozen=True, slots=True)
class _Seen:
    """What an activation did to one tensor, and where.

    Attributes:
        activation: what it did.
        cell: of the activation, or of the module that a function follows.
        place: where it stands (`Cell.places`).
        also: column of another module under which it is told, too, as if it were a function: of an activation that stands in several
            places, that before it in this one. -1: none.
    """

    activation: Activation
    cell: Cell
    place: int
    also: int


def _activations(parts: Sequence[Part], cells: Mapping[int, Cell]) -> list[_Seen]:
    found: list[tuple[Activation, Cell, int]] = []
    for part in parts:
        cell = cells.get(part.column)
        if cell is None:
            continue
        for activation in part.activations:
            place = part.place if activation.out is part.out else FUNCTION
            if place not in cell.places:
                place = place if len(cell.places) < PLACES else -1
                cell.places.setdefault(place, Units())
            found.append((activation, cell, place))
    several = [(cell, place) for cell, place in dict.fromkeys((cell, place) for _, cell, place in found) if cell.is_shared()]
    # What is known to be given a module's output goes before what only runs after it: of two such, the row tells one.
    for cell, place in sorted(several, key=lambda one: one[1] <= BEHIND):
        before = cells.get(place if place >= 0 else BEHIND - place)
        if before is None or before.flat or FUNCTION in before.places:
            continue
        if before.tells is None or (place >= 0 and before.tells[1] <= BEHIND):
            before.tells = cell, place
    told = {before.tells: before.column for before in cells.values() if before.tells is not None}
    return [_Seen(activation, cell, place, told.get((cell, place), -1)) for activation, cell, place in found]


def _take_activations(found: _Found, table: _Table, place: Mapping[int, int], seen: Sequence[_Seen], layers: int) -> None:
    flat, count = np.zeros(layers), np.zeros(layers)
    groups: dict[object, list[_Seen]] = {}
    for one in seen:
        groups.setdefault(_alike(one.activation), []).append(one)
    for group in groups.values():
        first = group[0].activation
        if first.given is None and (first.out is None or saturation.needs_input(first.module)):
            continue
        at = [place[id(one.activation.out or one.activation.given)] for one in group]
        y = torch.from_numpy(table.values[at])
        x = y if first.given is None else torch.from_numpy(table.values[[place[id(one.activation.given)] for one in group]])
        if first.out is None:
            y = first.module(x)  # a function saved its input only
        mask = saturation.flat(first.module, x.reshape(-1), y.reshape(-1))
        if mask is None:
            continue
        width = table.values.shape[1]
        inside = np.arange(width) < table.count[at][:, None]
        flats = (mask.numpy().reshape(len(at), width) & inside).sum(axis=1)
        for column in ([one.cell.column for one in group], [one.also for one in group]):
            told = np.array(column, np.int64)
            known = told >= 0
            flat += np.bincount(told[known], flats[known], layers)
            count += np.bincount(told[known], table.count[at][known], layers)
    found["saturated_fraction"] = _where(count > 0, flat / count)


def _alike(activation: Activation) -> object:
    """The same for activations that may be worked out together."""
    module = activation.module
    kind = type(module)
    same = kind.extra_repr(module) if kind.__module__.startswith("torch.nn.modules.") else id(module)
    return kind, same, activation.given is None, activation.out is None


def _take_inputs(found: _Found, table: _Table, at: list[int]) -> None:
    if at:
        # Not from sums of squares: an input far from 0 would lose its deviation in them.
        values = np.concatenate([table.values[i, : table.count[i]] for i in at]).astype(np.float64)
        found["input_mean"], found["input_std"] = float(values.mean()), float(values.std())
        found["input_nonfinite"] = float(table.nonfinite[at].sum())


def _take_compiled(found: _Found, compiled: Mapping[int, NDArray[np.float64]]) -> None:
    """Add what compiled code wrote: a module runs in it or outside."""
    arrays = {name: values for name, values in found.items() if isinstance(values, np.ndarray)}
    for column, totals in compiled.items():
        calls, elements, squares, nonfinite, flat, largest = totals
        if arrays["calls"][column] > 0:
            continue
        # Never called, or compiled before the hooks were there: who can tell.
        arrays["calls"][column] = calls if calls > 0 else np.nan
        if elements > 0:
            arrays["activation_rms"][column] = np.sqrt(squares / elements)
            arrays["activation_absmax"][column] = largest
            arrays["activation_nonfinite"][column] = nonfinite
            if flat >= 0:
                arrays["saturated_fraction"][column] = flat / elements


def _take_units(found: _Found, table: _Table, place: Mapping[int, int], seen: Sequence[_Seen], layers: int) -> None:
    peaks: dict[tuple[int, int], NDArray[np.float32]] = {}
    for one in seen:
        if not one.activation.peaks:
            continue
        at = [place[id(row)] for row in one.activation.peaks]
        units = table.values[at[0], : table.count[at[0]]]
        if len(at) > 1:
            units = np.concatenate([table.values[i, : table.count[i]] for i in at])
        known = peaks.get((one.cell.column, one.place))
        if known is not None and len(known) == len(units):
            units = np.maximum(known, units)
        peaks[one.cell.column, one.place] = units
    dead, count = np.zeros(layers), np.zeros(layers)
    for cell, where, also in dict.fromkeys((one.cell, one.place, one.also) for one in seen):
        if (cell.column, where) not in peaks:
            continue
        units_there = cell.places[where]
        units_there.see(peaks[cell.column, where])
        silent = units_there.dead()
        if silent is not None:
            for column in (cell.column, also) if also >= 0 else (cell.column,):
                dead[column] += np.count_nonzero(silent)
                count[column] += len(silent)
    for cell in {one.cell for one in seen}:
        cell.looks += 1
    found["dead_fraction"] = _where(count > 0, dead / count)
