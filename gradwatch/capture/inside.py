"""What happens inside the watched models: the hooks' wiring to records, and what is learnt of the modules on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gradwatch.capture import saturation
from gradwatch.capture.description import in_scope, kind_of
from gradwatch.capture.draft import Draft
from gradwatch.capture.layers import statistics
from gradwatch.capture.modules import BEHIND, ModuleHooks, Taken
from gradwatch.capture.parameters import ParameterTable, unwrap
from gradwatch.capture.units import Units
from gradwatch.records import GradState, Sampling

_UNSEEN_AFTER = 3
"""Records with full statistics that reached a module which was never seen to run, after which that is said."""


class Inside:
    """The module half of a recorder.

    Args:
        models: the watched models, under "" or their keys.
        table: their parameters.
        sampling: which modules are in scope.
        here: whether this is the thread whose training is watched.
        notice: told what there is to say of the watch itself.

    Attributes:
        hooks: on the modules.
        functions: layer -> how the activation is flat that follows it as a function, or as a module that stands in other places too, and
            its class in torch.
        places: activation that stands in several places -> the layers that it follows there.
        run: layer -> rank of its first call.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        table: ParameterTable,
        sampling: Sampling,
        here: Callable[[], bool],
        notice: Callable[[str], None],
    ) -> None:
        self._models, self._table, self._sampling, self._notice = models, table, sampling, notice
        self.hooks = ModuleHooks(here, notice)
        self.functions: dict[str, tuple[str, str]] = {}
        self.places: dict[str, tuple[str, ...]] = {}
        self.run: dict[str, int] = {}
        self._ran: set[int] = set()
        self._root_of: list[int] = []
        self._unseen = np.zeros(0, np.int64)
        self._unseen_told = False

    # -- which modules -------------------------------------------------------------------------------------------------------------

    def scan(self) -> None:
        """Put hooks on the modules in scope; again when the models have changed."""
        chosen = [
            (module, column, self._root(name), kind_of(module))
            for column, (name, module) in enumerate(self._table.modules.items())
            if in_scope(name, self._sampling.include, self._sampling.exclude)
        ]
        roots = [unwrap(model) for model in self._models.values()]
        wrapped = any(root is not model for root, model in zip(roots, self._models.values(), strict=True))
        self.hooks.scan(chosen, roots, compiled=wrapped)
        self._root_of = [self._root(layer) for layer in self._table.layers]
        self._ran.clear()

    def rescan(self) -> None:
        """The models have changed."""
        if self.hooks.cells:
            self.scan()

    def _root(self, layer: str) -> int:
        """Number of the watched model that holds a module."""
        return next((i for i, key in enumerate(self._models) if not key or layer == key or layer.startswith(key + ".")), 0)

    def _roots(self, slots: Iterable[int]) -> set[int]:
        return {0} if len(self._models) == 1 else {self._root_of[slot] for slot in slots}

    # -- which record --------------------------------------------------------------------------------------------------------------

    def claim(self, reached: Collection[int]) -> None:
        """What the models of these slots did in their forward passes belongs to the open record."""
        if reached and self.hooks.listening:
            self.hooks.claim(self._roots(reached))

    def close(self, draft: Draft | None, reached: Iterable[int], own: Iterable[int]) -> None:
        """A record closes.

        Args:
            draft: takes what is looked at of it; None: nothing is.
            reached: slots that its backward passes reached.
            own: those of them that are not foreign to it.
        """
        if self.hooks.listening or self.hooks.compiled:
            if draft is not None and draft.layers is None:
                draft.taken = self.hooks.take(self._roots(own))
            self.hooks.drop(self._roots(reached))

    def maker(self, nodes: frozenset[int]) -> str:
        """The innermost layer in which one of these autograd nodes, given by their numbers, made the output; "" where none is known."""
        column = self.hooks.maker(nodes)
        return list(self._table.modules)[column] if column >= 0 else ""

    def take(self, draft: Draft, own: Iterable[int]) -> None:
        """A record is looked at before it closes: what hooks have seen by now is all that it will have."""
        if self.hooks.listening:
            draft.taken = self.hooks.take(self._roots(own))
            self.hooks.send()

    # -- what was seen -------------------------------------------------------------------------------------------------------------

    def note(self, taken: Taken) -> bool:
        """Learn in which order modules run and which activation follows which, once `statistics` has; whether there was something new."""
        known = len(self.functions), len(self.run), sum(map(len, self.places.values()))
        names: list[str] | None = None
        ran = {part.column for part in taken.parts}
        if not ran <= self._ran:
            self._ran |= ran
            names = list(self._table.modules)
            for part in taken.parts:
                self.run.setdefault(names[part.column], len(self.run))
        for part in taken.parts:
            for activation in part.activations:
                if activation.out is not part.out:
                    names = names or list(self._table.modules)
                    self.functions.setdefault(names[part.column], _flat(activation.module))
        told: dict[str, list[str]] = {}
        for before in self.hooks.cells:
            if before.tells is not None:
                names = names or list(self._table.modules)
                name = names[before.column]
                told.setdefault(names[before.tells[0].column], []).append(name)
                self.functions[name] = _flat(before.tells[0].module)
        self.places = {activation: tuple(follows) for activation, follows in told.items()}
        return (len(self.functions), len(self.run), sum(map(len, self.places.values()))) != known

    def statistics(self, draft: Draft, taken: Taken) -> Mapping[str, NDArray[np.float64] | float]:
        """The statistics of a record's layers; gives back what was taken."""
        found = statistics(taken, self.hooks.cells, len(self._table.modules), draft.scale)
        self.hooks.release(taken)
        if taken.compiled and not self._unseen_told:
            calls = found["calls"]
            assert isinstance(calls, np.ndarray)
            self._tell_unseen(draft, calls, taken.calls.keys())
        return found

    def _tell_unseen(self, draft: Draft, calls: NDArray[np.float64], hooked: Collection[int]) -> None:
        """Modules whose parameters backward passes reach though nobody ever saw them run: compiled without the hooks."""
        if len(self._unseen) != len(calls):
            self._unseen = np.zeros(len(calls), np.int64)
        names = list(self._table.modules)
        # What attention and recurrent modules hold they use themselves, without calling it.
        alone = {name for name, module in self._table.modules.items() if kind_of(module) in ("attention", "recurrent")}
        reached = {self._table.layers[slot] for slot in np.flatnonzero(draft.state & np.uint8(GradState.REACHED))}
        for column in hooked:
            if calls[column] > 0:
                self._unseen[column] = -(2**31)
            elif names[column] in reached and names[column].rpartition(".")[0] not in alone:
                self._unseen[column] += 1
        unseen = [f"`{names[column]}`" for column in np.flatnonzero(self._unseen >= _UNSEEN_AFTER)]
        if unseen:
            self._unseen_told = True
            self._notice(
                f"{len(unseen)} modules ({', '.join(unseen[:3])}{', ...' if len(unseen) > 3 else ''}) run in compiled code that does not "
                "know the hooks of the watch: their activations are not seen, their gradients are. Code that was compiled before the watch "
                "was attached, or while it looked away, learns of them by torch.compiler.reset(); or attach the watch before the first call. "
                "Inside torch.func transforms and operators such as torch.cond they cannot be seen."
            )

    # -- a run that goes on later --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What has been learnt of the modules, by their names."""
        names = list(self._table.modules)
        cells = {
            names[cell.column]: {
                "looks": cell.looks,
                "places": [(_place_name(place, names), units.state_dict()) for place, units in cell.places.items()],
            }
            for cell in self.hooks.cells
            if cell.column >= 0 and cell.places
        }
        return {"functions": dict(self.functions), "run": dict(self.run), "cells": cells}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; what is said of modules that are not there is left aside."""
        names = list(self._table.modules)
        columns = {name: column for column, name in enumerate(names)}
        self.functions = {name: (str(flat[0]), str(flat[1])) for name, flat in state["functions"].items() if name in columns}
        self.run = {name: int(rank) for name, rank in state["run"].items() if name in columns}
        for cell in self.hooks.cells:
            cell.places, cell.tells, cell.looks = {}, None, 0
            known = state["cells"].get(names[cell.column]) if cell.column >= 0 else None
            if known is not None:
                cell.looks = int(known["looks"])
                places = [(_place_of(place, columns), units) for place, units in known["places"]]
                cell.places = {place: Units.from_state_dict(units) for place, units in places if place is not None}


def _place_name(place: int, names: list[str]) -> tuple[str, int]:
    """A place as a layer's name, and what is said with it (`Cell.places`): 0 its output, `BEHIND` after it, else no layer."""
    if place <= BEHIND:
        return names[BEHIND - place], BEHIND
    return (names[place], 0) if place >= 0 else ("", place)


def _place_of(place: tuple[str, int], columns: Mapping[str, int]) -> int | None:
    name, what = place[0], int(place[1])
    if what not in (0, BEHIND):
        return what
    column = columns.get(name)
    return None if column is None else column if what == 0 else BEHIND - column


def _flat(activation: nn.Module) -> tuple[str, str]:
    """How it is flat, and what it is."""
    return saturation.shape(activation), type(activation).__name__
