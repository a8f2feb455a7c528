"""The modules of a model as numbers: a persistent fault is thousands of parameters at every look, and names of them are slow to fold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch.facts import Meta


@dataclass(frozen=True)
class Tree:
    """The modules that hold parameters and those around them, M of them, each a number.

    Attributes:
        modules: `[M]`, names.
        own: `[P]`, the module of each parameter.
        path: `[depth, P]`, the modules around each parameter, the root first, its own last; M where the path is shorter.
        trainable: `[M + 1]`, trainable parameters in a module and below.
        listed: `[M + 1]`, the facts list the module.
    """

    modules: NDArray[np.object_]
    own: NDArray[np.int64]
    path: NDArray[np.int64]
    trainable: NDArray[np.int64]
    listed: NDArray[np.bool_]

    def held(self, path: NDArray[np.int64]) -> NDArray[np.int64]:
        """`[M + 1]`: how many parameters lie in each module and below, of those with the columns `path` of `self.path`."""
        return np.bincount(path.ravel(), minlength=len(self.trainable))


def tree_of(meta: Meta) -> Tree:
    """The tree of a model, computed once for each `Meta`."""
    kept = meta.derived.get(Tree)
    if kept is None:
        kept = meta.derived[Tree] = _grow(meta)
    tree: Tree = kept
    return tree


def _grow(meta: Meta) -> Tree:
    number: dict[str, int] = {}
    of: dict[str, list[int]] = {}
    for layer in dict.fromkeys(fact.layer for fact in meta.parameters):
        of[layer] = [number.setdefault(name, len(number)) for name in reversed(list(ancestors(layer)))]
    depth = max(map(len, of.values()), default=0)
    padded = {layer: path + [len(number)] * (depth - len(path)) for layer, path in of.items()}
    path = np.array([padded[fact.layer] for fact in meta.parameters], np.int64).reshape(len(meta.parameters), depth).T
    known = {fact.name for fact in meta.layers}
    return Tree(
        modules=objects(list(number)),
        own=np.array([of[fact.layer][-1] for fact in meta.parameters], np.int64),
        path=np.ascontiguousarray(path),
        trainable=np.bincount(path[:, meta.trainable].ravel(), minlength=len(number) + 1),
        listed=np.array([*(name in known for name in number), False], bool),
    )


def objects(names: Sequence[str]) -> NDArray[np.object_]:
    """An array that shares the strings."""
    array = np.empty(len(names), object)
    array[:] = names
    return array


def ancestors(layer: str) -> Iterator[str]:
    """A module's name and those of the modules around it, the root "" last.

    Example:
        >>> list(ancestors("a.b"))
        ['a.b', 'a', '']
    """
    while layer:
        yield layer
        layer = layer.rpartition(".")[0]
    yield ""
