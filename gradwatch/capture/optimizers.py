"""Which optimizer steps which parameter, and at what learning rate."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.capture.parameters import ParameterTable, on_host

_Signature = tuple[tuple[int, int, int, int], ...]


class _Known:
    """One optimizer and what it owns of the watched parameters."""

    def __init__(self, optimizer: Optimizer, name: str) -> None:
        self.ref = weakref.ref(optimizer)
        self.name = name
        self.signature: _Signature | None = None
        self.slots: list[int] = []
        self.slot_set: frozenset[int] = frozenset()
        self.index = np.zeros(0, np.int64)
        self.groups: list[np.ndarray[Any, np.dtype[np.int64]]] = []


class Owners:
    """The optimizers that own a watched parameter, by a small number that serves as their key.

    Attributes:
        owner_of: slot -> key of its owner. Where two optimizers hold a parameter, the one that stepped last.
        owners: int64 `[S]`: the same as an array, -1 for none; a new array whenever it changes.
    """

    def __init__(self, table: ParameterTable) -> None:
        self._table = table
        self._known: list[_Known] = []
        self._key_of: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self.owner_of: dict[int, int] = {}
        self.owners = np.full(len(table), -1, np.int64)

    def adopt(self, optimizer: Optimizer, steps: bool = True) -> tuple[int | None, bool]:
        """Take an optimizer in.

        Args:
            optimizer: it.
            steps: it is about to step, and so takes over what another one owned; else it gets only what nobody owns.

        Returns:
            Its key, or None where it owns nothing watched; and whether ownership has changed.
        """
        signature = _signature(optimizer)
        key = self._key_of.get(optimizer)
        if key is not None:
            known = self._known[key]
            if known.signature == signature:
                return (key if known.slots else None), False
        slot_of = self._table.slot_of
        groups = [[slot for p in group["params"] if (slot := slot_of.get(id(p))) is not None] for group in optimizer.param_groups]
        slots = [slot for group in groups for slot in group]
        if key is None:
            if not slots:
                return None, False
            key = self._successor_of(slots)
            self._key_of[optimizer] = key
            known = _Known(optimizer, f"{type(optimizer).__name__}#{key}")
            self._known[key : key + 1] = [known]
        known = self._known[key]
        for slot in known.slots:
            if self.owner_of.get(slot) == key:
                del self.owner_of[slot]
        if not steps:
            slots = [slot for slot in slots if slot not in self.owner_of]
            signature = ()  # it takes the rest when it steps
        for other in {self.owner_of[slot] for slot in slots if slot in self.owner_of}:
            self._known[other].signature = None  # it takes its parameters back when it steps
        known.signature, known.slots, known.slot_set = signature, slots, frozenset(slots)
        known.index = np.array(slots, np.int64)
        known.groups = [np.array([slot for slot in group if slot in known.slot_set], np.int64) for group in groups]
        self.owner_of.update(dict.fromkeys(slots, key))
        self.owners = np.full(len(self._table), -1, np.int64)
        self.owners[list(self.owner_of)] = list(self.owner_of.values())
        return (key if slots else None), True

    def _successor_of(self, slots: list[int]) -> int:
        """The key of an optimizer that is gone and owned the same, for loops that make a new one now and then; else a new key."""
        wanted = frozenset(slots)
        for key, known in enumerate(self._known):
            if known.slot_set == wanted and known.ref() is None:
                return key
        return len(self._known)

    def refresh(self) -> None:
        """The table was scanned again: slots may have come."""
        for known in self._known:
            known.signature = None
            optimizer = known.ref()
            if optimizer is not None:
                self.adopt(optimizer)

    def find(self, slots: Iterable[int]) -> bool:
        """Search the process for optimizers that own `slots` and have not stepped yet. Some 50 ms: for the first unowned ones only.

        Returns:
            Whether one was found.
        """
        wanted = {id(self._table.params[slot]) for slot in slots}
        found = False
        for thing in gc.get_objects():
            # `type(thing)`, not `isinstance`: lazy proxies run their owner's code when asked for `__class__`.
            if not issubclass(type(thing), Optimizer) or thing in self._key_of or "param_groups" not in vars(thing):
                continue
            if any(id(p) in wanted for group in thing.param_groups for p in group["params"]):
                self.adopt(thing, steps=False)
                found = True
        return found

    def living(self) -> list[Optimizer]:
        """The optimizers that own something watched."""
        found = (known.ref() for known in self._known if known.slots)
        return [optimizer for optimizer in found if optimizer is not None]

    def slots(self, key: int) -> list[int]:
        """What the optimizer owns."""
        return self._known[key].slots

    def slot_set(self, key: int) -> frozenset[int]:
        """The same as a set."""
        return self._known[key].slot_set

    def index(self, key: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The same as an array."""
        return self._known[key].index

    def optimizer(self, key: int) -> Optimizer | None:
        """The optimizer itself, while it lives."""
        return self._known[key].ref()

    def name(self, key: int) -> str:
        """Its name in the record, for example "AdamW#0"."""
        return self._known[key].name

    def write_lr(self, key: int, lr: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        """Write each parameter group's learning rate into `lr[slot]`; NaN where it is a tensor on a device."""
        known = self._known[key]
        optimizer = known.ref()
        if optimizer is None:
            return
        for group, slots in zip(optimizer.param_groups, known.groups, strict=False):
            value = group.get("lr", np.nan)
            if isinstance(value, Tensor):
                value = float(value.detach()) if on_host(value) else np.nan
            elif not isinstance(value, (int, float)):
                value = np.nan  # what that is, the optimizer will say
            lr[slots] = value

    def unowned(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Those of `leaves` that no optimizer in the process holds. Searches the process once: on suspicion only."""
        left = {id(leaf): leaf for leaf in leaves}
        for thing in gc.get_objects():
            if issubclass(type(thing), Optimizer) and "param_groups" in vars(thing):
                for group in thing.param_groups:
                    for p in group["params"]:
                        left.pop(id(p), None)
        return list(left.values())


def _signature(optimizer: Optimizer) -> _Signature:
    marks = []
    for group in optimizer.param_groups:
        params = group["params"]
        marks.append((id(params), len(params), id(params[0]) if params else 0, id(params[-1]) if params else 0))
    return tuple(marks)
