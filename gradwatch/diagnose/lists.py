"""Modules that stand in a list with others like them: experts, blocks, branches of which a batch need not pass all."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gradwatch.diagnose.tree import ancestors
from gradwatch.facts import Meta


@dataclass(frozen=True)
class Lists:
    """Members of a ModuleList or ModuleDict, E of them, those of the same list and the same shapes in one group.

    Attributes:
        member: `[P]`, the innermost member that each parameter lies in; -1: none.
        equals: `[P]`, that member has others in its group.
        expert: `[P]`, a module around the parameter is called an expert, or is of a class that is.
        inside: `[K]`, parameters of the members, one after the other; a parameter may lie in several.
        owner: `[K]`, the member that each is meant for.
        group: `[E]`, number of the group.
    """

    member: NDArray[np.int64]
    equals: NDArray[np.bool_]
    expert: NDArray[np.bool_]
    inside: NDArray[np.int64]
    owner: NDArray[np.int64]
    group: NDArray[np.int64]

    def others(self, some: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """`[P]`: it holds for some parameter of the other members of the group."""
        members = len(self.group)
        has = np.bincount(self.owner[some[self.inside]], minlength=members) > 0
        others = np.append(np.bincount(self.group[has], minlength=members)[self.group] > has, False)
        some_other: NDArray[np.bool_] = self.equals & others[self.member]
        return some_other


def lists_of(meta: Meta) -> Lists:
    """The lists of a model, computed once for each `Meta`."""
    kept = meta.derived.get(Lists)
    if kept is None:
        kept = meta.derived[Lists] = _collect(meta)
    lists: Lists = kept
    return lists


def _collect(meta: Meta) -> Lists:
    lists = {fact.name for fact in meta.layers if fact.kind == "list" or fact.type in ("ModuleList", "ModuleDict")}
    types = {fact.name: fact.type for fact in meta.layers}
    columns: dict[str, list[int]] = {}
    innermost, expert = [], []
    for i, fact in enumerate(meta.parameters):
        around = list(ancestors(fact.layer))
        inside = [name for name, parent in pairwise(around) if parent in lists]
        innermost.append(inside[0] if inside else "")
        for name in inside:
            columns.setdefault(name, []).append(i)
        words = [word.lower() for name in around[:-1] for word in (name.rpartition(".")[2], types.get(name, ""))]
        expert.append(any("expert" in word or "moe" in word for word in words))
    number = {name: i for i, name in enumerate(columns)}
    groups: dict[object, int] = {}
    group = np.array(
        [
            groups.setdefault((name.rpartition(".")[0], tuple(meta.parameters[i].shape for i in of)), len(groups))
            for name, of in columns.items()
        ],
        np.int64,
    )
    member = np.array([number.get(name, -1) for name in innermost], np.int64)
    return Lists(
        member=member,
        equals=np.append(np.bincount(group)[group] > 1, False)[member],
        expert=np.array(expert, bool),
        inside=np.array([i for of in columns.values() for i in of], np.int64),
        owner=np.repeat(np.arange(len(columns)), [len(of) for of in columns.values()]),
        group=group,
    )
