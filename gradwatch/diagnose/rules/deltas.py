"""What stands for the gradient of each module's output: that of its bias where it has one, that of its weight otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gradwatch.baselines import WINDOW
from gradwatch.diagnose.arrays import DECADE, runs
from gradwatch.diagnose.rules.layout import Layout, layout_of
from gradwatch.history import History

ROUNDING, USUAL = 6.3, 1e3
"""Decades that a bias's gradient lies below its weight's in all of the first observations, from which it is 0 by mathematics, where no module's
output has a root mean square of `USUAL`: a softmax over the places that it is added to takes it out again (7.3 to 8; float32 resolves 6.9).
Where activations explode a bias is so far below, too."""


@dataclass(frozen=True)
class Modules:
    """Modules that hold a matrix or normalise, M of them, in the order of execution.

    Attributes:
        columns: `[K]`, columns of all their parameters, those of a module one after the other.
        matrix: `[K]`, has two dimensions or more.
        owner: `[K]`, which of the M each belongs to.
        start: `[M]`, the first of each module among the K.
        length: `[M]`, how many they are.
        distance: `[M]`, least number of graph nodes between the loss and it.
        head: `[M]`, between one of its parameters and the loss there is no other.
        norm: `[M]`, is a normalisation.
    """

    columns: NDArray[np.int64]
    matrix: NDArray[np.bool_]
    owner: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    distance: NDArray[np.float64]
    head: NDArray[np.bool_]
    norm: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.start)

    def columns_of(self, modules: NDArray[np.int64]) -> NDArray[np.int64]:
        """Columns of the parameters of some of them, module by module."""
        return self.columns[runs(self.start[modules], self.length[modules])]

    def pick(self, keep: NDArray[np.bool_]) -> Modules:
        """Some of them only, `keep` being `[M]`."""
        inside, length = keep[self.owner], self.length[keep]
        return Modules(
            self.columns[inside],
            self.matrix[inside],
            (np.cumsum(keep) - 1)[self.owner[inside]],
            np.cumsum(length) - length,
            length,
            self.distance[keep],
            self.head[keep],
            self.norm[keep],
        )

    @cached_property
    def normalised_behind(self) -> NDArray[np.bool_]:
        """`[M]`: one of the next two modules is a normalisation, which takes the scale of the weights out again."""
        behind: NDArray[np.bool_] = np.append(self.norm[1:], False) | np.append(self.norm[2:], (False, False))[: len(self)]
        return behind

    @cached_property
    def chained(self) -> NDArray[np.bool_]:
        """`[M]`: something behind it is nearer to the loss than it and all before it, none of which has a head of its own; otherwise
        what lies behind is another branch."""
        nearest = np.append(np.minimum.accumulate(self.distance[::-1])[-2::-1], np.inf)
        chained: NDArray[np.bool_] = (nearest < np.minimum.accumulate(self.distance)) & ~np.logical_or.accumulate(self.head)
        return chained

    @cached_property
    def jumpable(self) -> NDArray[np.bool_]:
        """`[M]`: right behind it there is no normalisation, and two modules or more that are none lie on the loss's side."""
        solid = np.cumsum(~self.norm)
        jumpable: NDArray[np.bool_] = (solid[-1] - solid >= 2) & ~np.append(self.norm[1:], True)
        return jumpable

    @cached_property
    def nearer(self) -> NDArray[np.float64]:
        """`[M]`: nodes that it is nearer to the loss than the one executed before it; NaN where neither distance is known."""
        with np.errstate(invalid="ignore"):
            return np.append(0.0, self.distance[:-1] - self.distance[1:])


@dataclass(frozen=True)
class Deltas:
    """The last T observations of the modules that were observed in all of them, M of them.

    Attributes:
        modules: which they are.
        delta: `[T, M]`, decades: the gradient of its bias if that is not mere rounding, else that of its weight.
        bias: `[T, M]`, decades: the same, but its bias's gradient wherever that is not zero, nor mere `ROUNDING` from the start.
        own: `[M]`: `delta` is its bias's gradient.
        gain: `[M]`, factor by which its weights enlarge what passes, 1 keeps the scale; NaN for a normalisation.
    """

    modules: Modules
    delta: NDArray[np.float64]
    bias: NDArray[np.float64]
    own: NDArray[np.bool_]
    gain: NDArray[np.float64]


def deltas_of(history: History, known: NDArray[np.bool_], null_bias: float) -> Deltas | None:
    """Look at some columns of the layout.

    Args:
        history: observations of at least one of them.
        known: `[N]`, the columns that are meant.
        null_bias: decades below its weight's from which a bias's gradient is rounding.

    Returns:
        None where fewer than two modules are left.
    """
    b, group = history.baselines, _group_of(history, known)
    modules = group.modules
    seen = int(b.seen[modules.columns].max())
    depth = min(WINDOW, seen)
    rows = np.arange(seen - depth, seen) % WINDOW
    logs = np.divide(b.last.take(modules.columns, axis=1)[rows], DECADE, dtype=np.float64)
    np.copyto(logs, -np.inf, where=np.isnan(logs))
    weight, bias = group.weights.largest(logs), group.biases.largest(logs)
    gain = np.fmax.reduceat(b.weight_norm[modules.columns] * group.gain, modules.start)
    own = bias >= weight - null_bias
    delta = np.where(own, bias, weight)
    real = bias > -44.0
    if not own.all():
        real &= ~(_is_rounding(group, b.first[:, modules.columns]) & _is_of_usual_size(history))
    bias = np.where(real, bias, weight)
    told = np.asarray(own.all(axis=0))
    # Give a module without a bias of its own the delta of the normalisation right behind it, and the one before that: what a weight
    # gets depends on the size of its input, too.
    for i in np.flatnonzero(~modules.norm & ~told & modules.normalised_behind)[::-1]:
        delta[:, i] = delta[:, i + 1]
    keep = np.asarray(np.isfinite(delta).all(axis=0))
    if keep.sum() < 2:
        return None
    if keep.all():
        return Deltas(modules, delta, bias, told, gain)
    return Deltas(modules.pick(keep), delta[:, keep], bias[:, keep], told[keep], gain[keep])


def _is_rounding(group: _Group, first: NDArray[np.float32]) -> NDArray[np.bool_]:
    """`[M]`: its bias gets nothing by mathematics: its first gradients were what rounding leaves of a sum that is 0."""
    logs = np.divide(first, DECADE, dtype=np.float64)
    np.copyto(logs, -np.inf, where=np.isnan(logs))
    with np.errstate(invalid="ignore"):
        below = group.weights.largest(logs) - group.biases.largest(logs)
    known = np.isfinite(below)
    rounding: NDArray[np.bool_] = known.any(axis=0) & (np.where(known, below, np.inf).min(axis=0) >= ROUNDING)
    return rounding


def _is_of_usual_size(history: History) -> bool:
    """All that was seen of the modules' outputs lately is of a usual size, and something was."""
    rms = history.recent("activation_rms", WINDOW)
    rms = rms[np.isfinite(rms)]
    return bool(rms.size and float(rms.max()) < USUAL)


@dataclass(frozen=True)
class _Part:
    """Some of the parameters of M modules, module by module: which they are, where each module begins that has one, and which do."""

    modules: int
    chosen: NDArray[np.int64]
    begins: NDArray[np.int64]
    having: NDArray[np.int64]

    def largest(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """`[T, M]`: of `[T, K]` the largest of each module; -inf where it has none."""
        values = values.take(self.chosen, axis=1)
        if len(self.begins) < len(self.chosen):
            values = np.maximum.reduceat(values, self.begins, axis=1)
        if len(self.having) == self.modules:
            return values
        largest = np.full((len(values), self.modules), -np.inf)
        largest[:, self.having] = values
        return largest


@dataclass(frozen=True)
class _Group:
    """What does not change about the modules that some columns belong to."""

    known: NDArray[np.bool_]
    modules: Modules
    gain: NDArray[np.float64]
    """`[K]`, times the norm of a matrix, the factor by which it and the activation behind it enlarge what passes."""
    weights: _Part
    """Matrices and the scales of normalisations."""
    biases: _Part
    """All others."""


def _group_of(history: History, known: NDArray[np.bool_]) -> _Group:
    # In most runs all columns are known at all looks.
    kept = history.meta.derived.get(_Group)
    if kept is None or not np.array_equal(kept.known, known):
        kept = history.meta.derived[_Group] = _group(layout_of(history.meta), known)
    group: _Group = kept
    return group


def _group(layout: Layout, known: NDArray[np.bool_]) -> _Group:
    places = np.flatnonzero(known)
    places = places[np.argsort(layout.layer[places], kind="stable")]
    _, start, owner, length = np.unique(layout.layer[places], return_index=True, return_inverse=True, return_counts=True)
    matrix, norm = layout.matrix[places], layout.norm[places]
    strong = matrix | (norm & layout.scale[places])
    distance = np.minimum.reduceat(np.nan_to_num(layout.distance[places], nan=np.inf), start)
    head, norms = np.logical_or.reduceat(layout.head[places], start), np.logical_or.reduceat(norm, start)
    modules = Modules(layout.columns[places], matrix, owner, start, length, distance, head, norms)
    # A ReLU leaves one part in sqrt(2) of the scale, other activations nearly all of it.
    gain = layout.gain[places] / (np.sqrt(2.0) if layout.relus else 1.0)
    return _Group(known, modules, gain, _part(owner, len(start), strong), _part(owner, len(start), ~strong))


def _part(owner: NDArray[np.int64], modules: int, where: NDArray[np.bool_]) -> _Part:
    chosen = np.flatnonzero(where)
    owner = owner[chosen]
    begins = np.flatnonzero(np.append(True, owner[1:] != owner[:-1])[: len(owner)])
    return _Part(modules, chosen, begins, owner[begins])
