"""From sick parameters to the modules that are named for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from gradwatch.diagnose.arrays import distinct
from gradwatch.diagnose.tree import ancestors, objects, tree_of
from gradwatch.facts import Meta


def named(meta: Meta, columns: NDArray[np.int64]) -> tuple[str, ...]:
    """Names of the parameters in some columns, in their order: what a rule gives as `Finding.parameters`."""
    names = _names_of(meta)
    key = columns.tobytes()
    for known in names.memory:
        if known.key == key:
            return known.parameters
    return names.remember(tuple(names.all[columns].tolist()), columns).parameters


def layers_of(meta: Meta, parameters: tuple[str, ...]) -> tuple[str, ...]:
    """The modules to name for some parameters, in the order of the parameters.

    A parameter's name is its module's. A parent stands for all modules below it if and only if all trainable parameters under it
    are among `parameters` and there are at least two of them.

    Args:
        meta: static facts of the run; only modules that it lists are named.
        parameters: qualified parameter names, most responsible first; names that are not in `meta` are ignored.
    """
    known = _names_of(meta).look_up(parameters)
    if known.layers is None:
        known.layers = _fold(meta, known.columns)
    return known.layers


def merged(meta: Meta, one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    """The parameters of both, each once: those of the one in their order, then what the other has besides."""
    names = _names_of(meta)
    first, then = names.look_up(one).columns, names.look_up(other).columns
    if min(first.min(initial=0), then.min(initial=0)) < 0:
        return tuple(dict.fromkeys(one + other))
    return named(meta, distinct(np.concatenate((first, then)), len(meta.parameters)))


def overlap(one: Collection[str], other: Collection[str]) -> bool:
    """Some module of the one is, holds or lies in one of the other; what names no module overlaps with everything."""
    b = set(other)
    # Most findings name what their incident names, and the first name tells.
    if not one or not b or not b.isdisjoint(one):
        return True
    a = set(one)
    return any(x in b for name in a for x in ancestors(name)) or any(x in a for name in b for x in ancestors(name))


def _fold(meta: Meta, columns: NDArray[np.int64]) -> tuple[str, ...]:
    tree = tree_of(meta)
    sick = distinct(columns[columns >= 0], len(meta.parameters))
    path = tree.path.take(sick, axis=1)
    held = tree.held(path)
    whole = (held >= 2) & (held == tree.trainable) & tree.listed
    # The outermost wins: from the module itself up to the root.
    modules = tree.own.take(sick)
    for around in path[::-1]:
        np.copyto(modules, around, where=whole.take(around))
    return tuple(tree.modules[distinct(modules, len(tree.modules))].tolist())


@dataclass
class _Named:
    """Some parameters by name, by column and, once somebody has asked, by the modules to name for them."""

    parameters: tuple[str, ...]
    columns: NDArray[np.int64]
    """-1 where the facts know no such name."""
    key: bytes
    """The columns, fit to be compared in no time."""
    layers: tuple[str, ...] | None = None


class _Names:
    """The names of a model's parameters, and the last sets of them that were asked for.

    A finding and its incident need one set each, at every look the same ones or nearly, and few rules find something at a time.
    """

    def __init__(self, meta: Meta) -> None:
        self.all = objects([fact.name for fact in meta.parameters])
        self.memory: deque[_Named] = deque(maxlen=8)
        self._column = {fact.name: i for i, fact in enumerate(meta.parameters)}

    def look_up(self, parameters: tuple[str, ...]) -> _Named:
        for known in self.memory:
            if known.parameters is parameters:
                return known
        return self.remember(parameters, np.fromiter(map(self._column.get, parameters, repeat(-1)), np.int64, len(parameters)))

    def remember(self, parameters: tuple[str, ...], columns: NDArray[np.int64]) -> _Named:
        known = _Named(parameters, columns, columns.tobytes())
        self.memory.appendleft(known)
        return known


def _names_of(meta: Meta) -> _Names:
    kept = meta.derived.get(_Names)
    if kept is None:
        kept = meta.derived[_Names] = _Names(meta)
    names: _Names = kept
    return names
