"""What the autograd graphs of a run have shown so far, each walked once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from gradwatch.capture import private
from gradwatch.capture.criterion import Criterion, criterion
from gradwatch.capture.graph import find_unregistered, switched_on, walk
from gradwatch.capture.loss_end import Squashed, squashed
from gradwatch.capture.optimizers import Owners
from gradwatch.capture.parameters import ParameterTable
from gradwatch.capture.roles import Roles, roles

OUTSIDE_AFTER = 5
"""Records after which leaves outside the model are looked for in the process's optimizers."""


AGAIN, OFTEN, END = 8, 64, 256
"""One record in so many, of those with full statistics as long as all have them by default, whose graph is looked at again next to the loss;
later all of them. And the nodes of it that are: 0.4 ms."""

CRITERIA = 8
"""Backward passes whose criterion and targets are looked at: before the earliest verdict, at update 10."""

SWITCHES = 3
"""Backward passes whose graphs are looked through for what is multiplied by zeros: each may be another loss."""

LOOKS = 64
"""The same, with those that reach nothing that is watched: of other models, whose losses are none of ours."""


class Walks:
    """The walks of a run.

    Args:
        table: the watched parameters.

    Attributes:
        order: slot -> rank in the order of execution.
        distance: slot -> least number of edges to a root.
        roles: where branches begin and end.
        clamped: slots that a clamp stood before in every graph that reached them.
        connected: slots that one of the first graphs reached on a path that nothing switches off.
        opaque: a graph hid something.
        done: each slot has been reached by a backward whose graph was walked.
        outside: shapes of trainable leaves that belong to no registered parameter and no optimizer.
        outside_in_model: paths of those of them that live in a watched module's attributes.
        squashed: what is applied to the output before the criterion does it again ("softmax"), the layer in which, and since which
            record that is known; "", "" and 0.
        criterion: what the loss of the first backward passes was, if it was the same in all and is known.
    """

    def __init__(self, table: ParameterTable) -> None:
        self._table = table
        self.order: dict[int, int] = {}
        self.distance: dict[int, int] = {}
        self.roles = Roles()
        self.clamped: set[int] = set()
        self.connected: set[int] = set()
        self._more = False
        self.opaque = False
        self.done = False
        self.outside: tuple[tuple[int, ...], ...] = ()
        self.outside_in_model: tuple[str, ...] = ()
        self.squashed = ("", "", 0)
        self.criterion: Criterion | None = None
        self._criteria: list[Criterion | None] = []
        self._looks = LOOKS
        self._ahead: Criterion | None = None
        self._walked: set[int] = set()
        self._unreached: set[int] | None = None
        self._leaves: list[weakref.ref[Tensor]] = []
        self._due = OUTSIDE_AFTER

    def take(self, reached: Sequence[int], roots: Iterable[Any], maker: Callable[[frozenset[int]], str]) -> bool:
        """Walk the graph of `roots` if it reached a slot for which no walk was made; whether it was walked.

        Args:
            reached: slots.
            roots: of the backward that reached them.
            maker: gives the layer that made a tensor, by the numbers of the nodes that it may be the output of.
        """
        if self._walked.issuperset(reached):
            return False
        self._walked.update(reached)
        self.done = len(self._walked) == len(self._table)
        roots = list(roots)
        facts, place = walk(roots, self._table.slot_of), roles(roots, self._table.slot_of)
        self.roles.inputs |= place.inputs
        self.roles.heads |= place.heads
        new = {slot for slot in facts.clamped if slot in self.clamped or slot not in self.distance}
        self.clamped = (self.clamped - facts.distance.keys()) | new
        self.order.update({slot: number for slot, number in facts.order.items() if slot not in self.order})
        self.distance.update({slot: depth for slot, depth in facts.distance.items() if slot not in self.distance})
        self.opaque |= facts.opaque
        unreached = set(self._table.column_slots) - facts.distance.keys()
        self._unreached = unreached if self._unreached is None else self._unreached & unreached
        known = {id(ref()) for ref in self._leaves}
        self._look_at_end(squashed(roots), maker, 0)
        self._leaves += [weakref.ref(leaf) for leaf in facts.outside if id(leaf) not in known]
        return True

    def look_again(self, roots: Iterable[Any], maker: Callable[[frozenset[int]], str], step: int) -> bool:
        """Now and then, look at the end of a graph next to its loss: whether a softmax has come there since the first walk."""
        if self.squashed[0] or not step or (step < OFTEN and step % AGAIN):
            return False
        return self._look_at_end(squashed(roots, END), maker, step)

    def _look_at_end(self, inner: Squashed | None, maker: Callable[[frozenset[int]], str], step: int) -> bool:
        if inner is None or self.squashed[0]:
            return False
        self.squashed = (inner.function, maker(inner.numbers), step)
        return True

    @property
    def looks_at_loss(self) -> bool:
        """The criterion is not settled yet."""
        return len(self._criteria) < CRITERIA and self._looks > 0

    def see_loss(self, roots: Iterable[Any], loss_scale: float) -> None:
        """Look at the criterion of a backward that is about to run, and will free what it is known by.

        Args:
            roots: of the backward.
            loss_scale: what a GradScaler multiplied the loss by; NaN: a number that is on a device.
        """
        self._looks -= 1
        self._ahead = None
        if private.saved_tensors_are_hooked():
            return
        roots = list(roots)
        self._ahead = criterion(roots, loss_scale)
        if len(self._criteria) < SWITCHES:
            more = switched_on(roots, self._table.slot_of) - self.connected
            self._more = self._more or bool(more)
            self.connected |= more

    def count_loss(self) -> bool:
        """That backward has reached what is watched, so its criterion counts; whether anything is known by that which was not."""
        self._criteria.append(self._ahead)
        more, self._more = self._more, False
        if len(self._criteria) < CRITERIA or None in self._criteria:
            return more
        seen = [each for each in self._criteria if each is not None]
        if len({(each.name, each.broadcast) for each in seen}) > 1:
            return more
        self.criterion = replace(seen[0], guess=sum(each.guess for each in seen) / len(seen))
        return True

    def unreached(self) -> list[int]:
        """Slots of trainable parameters that no walk has met, where nothing was hidden from it."""
        if self._unreached is None or self.opaque:
            return []
        return sorted(slot for slot in self._unreached if self._table.params[slot].requires_grad)

    def look_outside(self, owners: Owners) -> bool:
        """Called after each record: after a few, find out which leaves outside the model belong to no optimizer, and where they live.

        Once; whether it was now.
        """
        if self._due <= 0 or not self._leaves:
            return False
        self._due -= 1
        if self._due:
            return False
        leaves = [leaf for ref in self._leaves if (leaf := ref()) is not None]
        orphans = owners.unowned(leaves)
        paths = find_unregistered(self._table.modules, orphans)
        self.outside = tuple(tuple(leaf.shape) for leaf in orphans)
        self.outside_in_model = tuple(paths[id(leaf)] for leaf in orphans if id(leaf) in paths)
        return True
