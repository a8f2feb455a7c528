"""The modules of a model in the order in which they run, as far as the facts tell it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch.diagnose.tree import ancestors
from gradwatch.facts import Meta


@dataclass(frozen=True)
class Execution:
    """The layers of the history, L of them.

    Modules that were seen to run have the order of their first calls. Of a model none of whose inner modules was, the graph knows the
    order of those with trainable parameters. Others are taken to run right behind the one that the graph (or else the registration)
    has before them in the same model, as those who write `self.fc1, self.act1, self.fc2` mean it; a container when all in it have run.

    Attributes:
        place: `[L]`, when it runs, in ranks of first calls, or of parameters in a model that was not seen to run; -1 before all of
            which an order is known.
        rank: `[L]`, the same as a number without ties: of two in one place the one registered first runs first.
        parent: `[L]`, the module that holds it; -1 for a root.
        root: `[L]`, the watched model that it belongs to.
        inner: `[L]`, holds no other module.
        caller: `[L]`, the module whose calls are its: itself, but attention uses its output projection without calling it.
    """

    place: NDArray[np.float64]
    rank: NDArray[np.int64]
    parent: NDArray[np.int64]
    root: NDArray[np.int64]
    inner: NDArray[np.bool_]
    caller: NDArray[np.int64]

    def sorted(self, layers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Some layers, those that run first first."""
        return layers[np.argsort(self.rank[layers], kind="stable")]

    def innermost(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """`[L]`: it holds for the layer and for none that it holds."""
        around = np.zeros(len(mask) + 1, bool)
        found = np.flatnonzero(mask)
        while found.size:
            found = np.unique(self.parent[found])
            found = found[(found >= 0) & ~around[found]]
            around[found] = True
        innermost: NDArray[np.bool_] = mask & ~around[:-1]
        return innermost


def execution_of(meta: Meta) -> Execution:
    """The order of a model, computed once for each `Meta`."""
    kept = meta.derived.get(Execution)
    if kept is None:
        kept = meta.derived[Execution] = _order(meta)
    execution: Execution = kept
    return execution


def roots_of(meta: Meta) -> NDArray[np.int64]:
    """Columns of the watched models: that of "" or, of a mapping of models, those of its keys."""
    return np.flatnonzero(execution_of(meta).parent < 0)


def starts_before(meta: Meta, parameters: tuple[str, ...], layers: tuple[str, ...]) -> bool:
    """Whether the first module of some parameters runs before the last of some layers."""
    ranks = _ranks(meta, parameters, layers)
    return ranks is not None and ranks[0] < ranks[2]


def lies_before(meta: Meta, parameters: tuple[str, ...], layers: tuple[str, ...]) -> bool:
    """Whether all modules of some parameters run before the last of some layers, or are it."""
    ranks = _ranks(meta, parameters, layers)
    return ranks is not None and ranks[1] <= ranks[2]


def _ranks(meta: Meta, parameters: tuple[str, ...], layers: tuple[str, ...]) -> tuple[int, int, int] | None:
    """Of the first and of the last module of the parameters, and of the last layer."""
    rank, index = execution_of(meta).rank, meta.layer_index
    some, others = set(parameters), set(layers)
    mine = [int(rank[index[i]]) for i, fact in enumerate(meta.parameters) if fact.name in some and index[i] >= 0]
    theirs = [int(rank[i]) for i, fact in enumerate(meta.layers) if fact.name in others]
    return (min(mine), max(mine), max(theirs)) if mine and theirs else None


def _order(meta: Meta) -> Execution:
    count = len(meta.layers)
    at = {fact.name: i for i, fact in enumerate(meta.layers)}
    parent = np.full(count, -1, np.int64)
    root = np.zeros(count, np.int64)
    for i, fact in enumerate(meta.layers):
        around = [at[name] for name in ancestors(fact.name) if name != fact.name and name in at]
        parent[i] = around[0] if around else -1
        root[i] = around[-1] if around else i
    inner = np.ones(count, bool)
    inner[parent[parent >= 0]] = False
    place = np.full(count, -1.0)
    for model in np.unique(root):
        of = np.flatnonzero(root == model)
        seen = any(inner[i] and meta.layers[i].run is not None for i in of)
        place[of] = _places_seen(meta, of, inner) if seen else _places_guessed(meta, of, inner)
    # What a container puts out by itself comes after all that it holds, those registered last first.
    inside = np.arange(count, dtype=np.int64)
    for i in range(count - 1, -1, -1):
        up = int(parent[i])
        if up >= 0:
            place[up] = max(place[up], place[i])
            inside[up] = max(inside[up], inside[i])
    order = np.lexsort((-np.arange(count), inside, place))
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    attention = np.append([fact.kind == "attention" for fact in meta.layers], False)
    return Execution(place, rank, parent, root, inner, np.where(attention[parent], parent, np.arange(count)))


def _places_guessed(meta: Meta, layers: NDArray[np.int64], inner: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of the layers of one model, in ranks of parameters."""
    places, last = np.full(len(layers), -1.0), -1.0
    for j, i in enumerate(layers):
        order = meta.layers[i].order
        if order is not None:
            last = places[j] = float(order)
        elif inner[i]:
            places[j] = last
    return places


def _places_seen(meta: Meta, layers: NDArray[np.int64], inner: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of the layers of one model, in ranks of first calls."""
    facts = [meta.layers[i] for i in layers]
    both = sorted((fact.order, fact.run) for fact in facts if fact.order is not None and fact.run is not None)
    places, last = np.full(len(layers), -1.0), -1.0
    for j, fact in enumerate(facts):
        if fact.run is not None:
            places[j] = fact.run
        elif fact.order is not None:
            # Used without being called, as attention does with its output projection, or called where no hook sees it.
            behind = bisect_right(both, fact.order, key=lambda pair: pair[0])
            places[j] = both[behind - 1][1] if behind else -1.0
        elif inner[layers[j]]:
            places[j] = last
        if inner[layers[j]]:  # a container stands before what it holds and returns after it
            last = places[j]
    return places
