"""From the samples that hooks took to the per-layer statistics of a record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradwatch.capture import saturation
from gradwatch.capture.modules import Cell, Taken
from gradwatch.capture.parts import Activation, Part, Row
from gradwatch.capture.samples import WHOLE, Samples

DEAD_FROM, DEAD_WINDOW = 10, 32
"""A unit is dead that fired in none of the last 32 looks, or since the first where there were fewer, at least 10: 10 are what the
earliest verdict can have seen, and a unit that fires for one input in a hundred (32 are looked at each time) is then silent by chance
once in 25 cases, after 32 looks once in 30,000."""

PER_LAYER = (
    "calls",
    "activation_rms",
    "activation_absmax",
    "activation_nonfinite",
    "saturated_fraction",
    "dead_fraction",
    "delta_norm",
    "delta_nonfinite",
    "gain",
)
"""Names of the statistics, `[L]` each."""

PER_INPUT = ("input_mean", "input_std", "input_nonfinite")


@dataclass(slots=True)
class _Moments:
    """Of N rows, each over its own elements: `[N]` each."""

    count: NDArray[np.float64]
    sum: NDArray[np.float64]
    squares: NDArray[np.float64]
    largest: NDArray[np.float64]
    nonfinite: NDArray[np.float64]


def _moments(rows: Sequence[Row]) -> _Moments:
    size = len(rows)
    result = _Moments(*(np.zeros(size) for _ in range(5)))
    groups: dict[int, tuple[Samples, list[int]]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(id(row.samples), (row.samples, []))[1].append(i)
    for samples, at in groups.values():
        values, whole = samples.values(np.array([rows[i].number for i in at], np.int64))
        count = np.array([rows[i].elements for i in at], np.int64)
        inside = np.arange(WHOLE) < count[:, None]
        values = np.where(inside, values, np.float32(0.0))
        result.count[at] = count
        wide = values.astype(np.float64)
        result.sum[at] = wide.sum(axis=1)
        result.squares[at] = np.einsum("ij,ij->i", wide, wide)
        result.largest[at] = np.abs(values).max(axis=1, initial=0.0)
        bad = (~np.isfinite(values)).sum(axis=1)
        # One that lies between the chunks shows in the sum of the whole.
        beyond = np.array([rows[i].numel > rows[i].elements for i in at]) & ~whole & (bad == 0)
        result.nonfinite[at] = bad + beyond
    return result


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
    parts, inputs = taken.parts, taken.inputs
    found: dict[str, NDArray[np.float64] | float] = {name: np.full(layers, np.nan) for name in PER_LAYER}
    count = np.full(layers, np.nan)
    count[list(taken.calls)] = list(taken.calls.values())
    found["calls"] = count
    if parts:
        column = np.array([part.column for part in parts], np.int64)
        out = _moments([part.out for part in parts])
        seen = np.bincount(column, minlength=layers) > 0
        elements = np.bincount(column, out.count, layers)
        with np.errstate(all="ignore"):
            found["activation_rms"] = _where(seen, np.sqrt(np.bincount(column, out.squares, layers) / elements))
            largest = np.zeros(layers)
            np.maximum.at(largest, column, out.largest)
            found["activation_absmax"] = _where(seen, largest)
            found["activation_nonfinite"] = _where(seen, np.bincount(column, out.nonfinite, layers))
            _take_deltas(found, parts, column, layers, scale)
        _take_activations(found, parts, layers)
    _take_compiled(found, taken.compiled)
    _take_units(found, parts, {cell.column: cell for cell in cells})
    if inputs:
        given = _moments(inputs)
        n, total = given.count.sum(), given.sum.sum()
        with np.errstate(all="ignore"):
            found["input_mean"] = float(total / n)
            found["input_std"] = float(np.sqrt(max(0.0, given.squares.sum() / n - (total / n) ** 2)))
        found["input_nonfinite"] = float(given.nonfinite.sum())
    return found


def _where(seen: NDArray[np.bool_], values: NDArray[Any]) -> NDArray[np.float64]:
    chosen: NDArray[np.float64] = np.where(seen, values, np.nan)
    return chosen


def _take_deltas(
    found: dict[str, NDArray[np.float64] | float], parts: Sequence[Part], column: NDArray[np.int64], layers: int, scale: float
) -> None:
    deltas = {id(delta): delta for part in parts for delta in (part.above, part.below) if delta is not None}
    rows = [row for delta in deltas.values() for row in delta.rows]
    of = np.repeat(np.arange(len(deltas)), [len(delta.rows) for delta in deltas.values()])
    moments = _moments(rows)
    whole = np.array([row.numel / row.elements for row in rows])
    squares = np.bincount(of, moments.squares * whole, len(deltas))
    nonfinite = np.bincount(of, moments.nonfinite, len(deltas))
    passed = np.bincount(of, minlength=len(deltas)) > 0
    place = {key: i for i, key in enumerate(deltas)}
    above = np.array([-1 if part.above is None else place[id(part.above)] for part in parts], np.int64)
    below = np.array([-1 if part.below is None else place[id(part.below)] for part in parts], np.int64)
    known = (above >= 0) & passed[above] if len(deltas) else np.zeros(len(parts), bool)
    seen = np.bincount(column[known], minlength=layers) > 0
    total = np.bincount(column[known], squares[above[known]], layers)
    found["delta_norm"] = _where(seen, np.sqrt(total) / scale)
    found["delta_nonfinite"] = _where(seen, np.bincount(column[known], nonfinite[above[known]], layers))
    both = known & (below >= 0) & passed[below] if len(deltas) else known
    seen = np.bincount(column[both], minlength=layers) > 0
    ratio = np.bincount(column[both], squares[below[both]], layers) / np.bincount(column[both], squares[above[both]], layers)
    ratio = np.sqrt(ratio)
    found["gain"] = _where(seen & np.isfinite(ratio), ratio)


def _values(row: Row) -> torch.Tensor:
    values, _ = row.samples.values(np.array([row.number], np.int64))
    return torch.from_numpy(values[0, : row.elements])


def _take_activations(found: dict[str, NDArray[np.float64] | float], parts: Sequence[Part], layers: int) -> None:
    flat, count = np.zeros(layers), np.zeros(layers)
    for part in parts:
        for activation in part.activations:
            share = _flat(activation)
            if share is not None:
                flat[part.column] += share[0]
                count[part.column] += share[1]
    with np.errstate(all="ignore"):
        found["saturated_fraction"] = np.where(count > 0, flat / count, np.nan)


def _flat(activation: Activation) -> tuple[int, int] | None:
    """How many elements of its sample lie where it is flat, and of how many."""
    out = None if activation.out is None else _values(activation.out)
    given = None if activation.given is None else _values(activation.given)
    if given is None and (out is None or saturation.needs_input(activation.module)):
        return None
    if out is not None:
        x, y = (out if given is None else given), out
    else:
        assert given is not None
        x, y = given, activation.module(given)  # a function saved its input only
    flat = saturation.flat(activation.module, x, y)
    return None if flat is None else (int(np.count_nonzero(flat.numpy())), y.numel())


def _take_compiled(found: dict[str, NDArray[np.float64] | float], compiled: Mapping[int, NDArray[np.float64]]) -> None:
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


def _take_units(found: dict[str, NDArray[np.float64] | float], parts: Sequence[Part], cells: Mapping[int, Cell]) -> None:
    dead = found["dead_fraction"]
    assert isinstance(dead, np.ndarray)
    peaks: dict[int, NDArray[np.float32]] = {}
    least: dict[int, float] = {}
    for part in parts:
        for activation in part.activations:
            threshold = saturation.fires(activation.module)
            if not activation.peaks or threshold is None:
                continue
            units = np.concatenate([_values(row).numpy() for row in activation.peaks])
            known = peaks.get(part.column)
            if known is None or len(known) != len(units):
                peaks[part.column] = units
            else:
                peaks[part.column] = np.maximum(known, units)
            least[part.column] = threshold
    for column, units in peaks.items():
        cell = cells.get(column)
        if cell is None:
            continue
        if len(cell.fired) != len(units):
            cell.fired, cell.looks = np.zeros(len(units), np.int64), 0
        cell.looks += 1
        cell.fired[~(units <= least[column])] = cell.looks  # what is not a number is not dead
        if cell.looks >= DEAD_FROM:
            dead[column] = float((cell.looks - cell.fired >= min(cell.looks, DEAD_WINDOW)).mean())
