"""The model as the flow rules look at it: trainable parameters in the order of execution, cut into branches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradwatch.history import Meta

RELUS = frozenset({"ReLU", "LeakyReLU", "GELU", "SiLU", "PReLU", "RReLU", "ReLU6", "Mish", "CELU"})

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Layout:
    """Columns of trainable parameters whose place in the graph is known, N of them, those executed first first.

    Attributes:
        columns: `[N]`, columns of the per-parameter statistics.
        matrix: `[N]`, has two dimensions or more.
        reference: `[N]`, belongs to a module that holds a matrix: scales, norms and mask tokens are no measure for others.
        branch: `[N]`, number of the branch: it starts anew at each module that reads the data and nothing trainable.
        head: `[N]`, between it and the loss there is no other parameter.
        distance: `[N]`, least number of graph nodes between the loss and it.
        norm: `[N]`, belongs to a normalisation.
        scale: `[N]`, is called "weight".
        blank: `[N]`, a matrix that was exactly zero when the watch began.
        gain: `[N]`, `sqrt(fan_in)` of a matrix over the square root of its size: times its norm, what it does to the scale of its
            input, 1 where it keeps it; NaN for others.
        layer: `[N]`, number of the module, counted in this order; the columns of a module need not be neighbours.
        around: `[N]`, number of the module that holds its module, counted likewise; -1 for the model itself.
        embedding: `[N]`, belongs to an embedding.
        layers: number of modules.
        arounds: number of modules that hold modules.
        roles: some module has a role.
        branches: number of branches that hold a parameter.
        straight: `columns` are all columns in their own order.
        measure: `reference` holds for all.
        normalised: some module is a normalisation, with parameters or without.
        relus: most activations are ReLUs or their kin.
    """

    columns: NDArray[np.int64]
    matrix: NDArray[np.bool_]
    reference: NDArray[np.bool_]
    branch: NDArray[np.int64]
    head: NDArray[np.bool_]
    distance: NDArray[np.float64]
    norm: NDArray[np.bool_]
    scale: NDArray[np.bool_]
    blank: NDArray[np.bool_]
    gain: NDArray[np.float64]
    layer: NDArray[np.int64]
    around: NDArray[np.int64]
    embedding: NDArray[np.bool_]
    layers: int
    arounds: int
    roles: bool
    branches: int
    straight: bool
    measure: bool
    normalised: bool
    relus: bool

    def take(self, values: NDArray[T]) -> NDArray[T]:
        """Pick the columns, along the last axis."""
        if self.straight:
            return values
        taken: NDArray[T] = values.take(self.columns, axis=-1)
        return taken

    def narrow(self, keep: NDArray[np.bool_]) -> Layout:
        """The same of some of the columns only, `keep` being `[N]`; numbers and what is said of the whole stay."""
        if keep.all():
            return self
        arrays: dict[str, Any] = {name: value[keep] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, straight=False, **arrays)


def layout_of(meta: Meta) -> Layout:
    """The layout of a model, computed once for each `Meta`."""
    kept = meta.derived.get(Layout)
    if kept is None:
        kept = meta.derived[Layout] = _make(meta)
    layout: Layout = kept
    return layout


def _make(meta: Meta) -> Layout:
    order = meta.order
    columns = np.flatnonzero(meta.trainable & np.isfinite(order))
    columns = columns[np.argsort(order[columns], kind="stable")]
    facts = [meta.parameters[i] for i in columns]
    matrix = np.array([len(f.shape) >= 2 for f in facts], bool)
    solid = {f.layer for f in facts if len(f.shape) >= 2}
    role = {f.name: f.role for f in meta.layers}
    norms = {f.name for f in meta.layers if f.kind == "normalization"}
    embeddings = {f.name for f in meta.layers if f.kind == "embedding"}
    activations = [f.activation for f in meta.layers if f.activation]
    number: dict[str, int] = {}
    holder: dict[str, int] = {"": -1}
    layer = np.array([number.setdefault(f.layer, len(number)) for f in facts], np.int64)
    around = np.array([holder.setdefault(f.layer.rpartition(".")[0], len(holder) - 1) for f in facts], np.int64)
    first = np.zeros(len(facts), bool)
    first[np.unique(layer, return_index=True)[1]] = True
    entry = np.array([role.get(f.layer) == "input" for f in facts], bool)
    reference = np.array([f.layer in solid for f in facts], bool)
    branch = np.cumsum(entry & first, dtype=np.int64)
    return Layout(
        columns=columns,
        matrix=matrix,
        reference=reference,
        branch=branch,
        head=np.array([role.get(f.layer) == "head" for f in facts], bool),
        distance=meta.distance[columns],
        norm=np.array([f.layer in norms for f in facts], bool),
        scale=np.array([f.name.endswith("weight") for f in facts], bool),
        blank=np.array([len(f.shape) >= 2 and f.init_rms == 0.0 for f in facts], bool),
        gain=np.array([_gain(f.shape) for f in facts], float),
        layer=layer,
        around=around,
        embedding=np.array([f.layer in embeddings for f in facts], bool),
        layers=len(number),
        arounds=len(holder) - 1,
        roles=any(role.values()),
        branches=len(np.unique(branch)),
        straight=bool(len(columns) == len(meta.parameters) and (columns == np.arange(len(columns))).all()),
        measure=bool(reference.all()),
        normalised=any(f.kind == "normalization" for f in meta.layers),
        relus=2 * sum(name in RELUS for name in activations) > len(activations),
    )


def _gain(shape: tuple[int, ...]) -> float:
    if len(shape) < 2:
        return float("nan")
    return float(np.sqrt(prod(shape[1:]) / max(1, prod(shape))))
