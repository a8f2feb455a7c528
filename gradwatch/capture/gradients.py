"""What `p.grad` holds between the events of an update: who was reached, what was read, what was cleared, left over or scaled.

A gradient is *new* where its object is new or its version moved since the last look. Nothing is kept from update to update but
numbers: references to gradients are held only while a backward runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import is_, is_not
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.capture.norms import TINY, NormReader, exact, quick_norm
from gradwatch.capture.parameters import dense, on_host
from gradwatch.capture.private import version

PROBES = 3
"""Gradients looked at again right before the step, to see whether somebody scaled them: three agree by chance in no case."""

UNCHANGED = 1e-5
"""Relative change of a probe's norm below which it counts as untouched: 100 roundings of float32."""

_RECHECK = 16
"""A gradient confirmed to be exactly zero eight times running is confirmed again only every 16th time."""

_Mark = tuple[int, int]


class Gradients:
    """The gradients of the parameters of a table.

    Args:
        params: one parameter a slot.
        reader: reads their norms.

    Attributes:
        norm: float64 `[S]`: last norm read, as `p.grad` held it (loss scale and all).
        nonfinite: float64 `[S]`: NaN and Inf elements then.
        everything: all slots.
        lagging: slots whose norm is still on a device.
    """

    def __init__(self, params: Sequence[Tensor], reader: NormReader) -> None:
        self._params = params
        self._reader = reader
        size = len(params)
        self.norm = np.full(size, np.nan)
        self.nonfinite = np.zeros(size)
        self.everything = list(range(size))
        self._stale_slots: set[int] = set()
        self.lagging: list[int] = []
        self._just_stepped: set[int] = set()
        self._used: dict[int, _Mark] = {}
        self._marks: dict[int, _Mark] = {}
        self._held: dict[int, list[Tensor]] = {}
        self._probes_of: tuple[Sequence[int], list[int]] = ((), [])
        self._leftover: dict[int, _Mark] = {}
        self._armed = 3
        self._marked = True
        self._any_bad = False
        self._zeros: dict[int, int] = {}
        self._before: list[Tensor | None] = []
        self._versions: list[int] = []

    # -- around a backward ---------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A backward starts: remember what is there."""
        self._before = before = [p.grad for p in self._params]
        if not any(map(is_not, before, repeat(None))):
            self._versions = []
            self._just_stepped.clear()
            if self._stale_slots:
                self._clear_stale(list(self._stale_slots))
            return
        self._versions = [0 if g is None else version(g) for g in before]
        self._look_for_leftovers(before)

    def end(self) -> list[int]:
        """The backward has returned: the slots it reached."""
        before, self._before = self._before, []
        after = [p.grad for p in self._params]
        if self._leftover:
            self._leftover.clear()
        if not self._versions:
            if not any(map(is_, after, repeat(None))):
                return self.everything
            return [slot for slot, g in enumerate(after) if g is not None]
        reached: list[int] = []
        for slot, (g, old, before_version) in enumerate(zip(after, before, self._versions, strict=True)):
            if g is None:
                continue
            if g is not old or version(g) != before_version:
                reached.append(slot)
            else:
                self._leftover[slot] = (id(g), before_version)
        return reached

    def fail(self) -> None:
        """The backward raised: what it left is looked at by nobody until the next one."""
        self._before = []
        self._leftover.clear()

    def abandon(self) -> None:
        """Gradients are gone, and so is all that was to be expected of them."""
        self.fail()
        self._stale_slots.clear()
        self._just_stepped.clear()
        self._used.clear()
        self._marks.clear()
        self._held.clear()
        self.lagging = []

    def read(self, slots: Sequence[int]) -> None:
        """Read the norms of `slots`; a norm that is not finite, or so small that squares were lost, is read again exactly."""
        tensors = [self._params[slot].grad for slot in slots]
        chosen: Sequence[int] = slots
        if any(map(is_, tensors, repeat(None))):
            chosen = [slot for slot, g in zip(slots, tensors, strict=True) if g is not None]
        there = [g for g in tensors if g is not None]
        with torch.no_grad():
            self.lagging = self._reader.read(chosen, there, self.norm)
            if not self.lagging:
                self._confirm(chosen, there)
            else:
                self._marks.update((slot, (id(g), version(g))) for slot, g in zip(chosen, there, strict=True))

    def _confirm(self, slots: Sequence[int], tensors: Sequence[Tensor]) -> None:
        if not slots:
            return
        index: Any = slice(None) if slots is self.everything else slots
        norms = self.norm[index]
        if norms.min() >= TINY and norms.max() < np.inf:  # a NaN fails both
            if self._zeros:
                self._zeros.clear()
            if self._any_bad:
                self.nonfinite[index] = 0
                self._any_bad = bool(self.nonfinite.any())
            return
        self.nonfinite[index] = 0
        with np.errstate(invalid="ignore"):
            doubtful = ~(norms >= TINY) | ~np.isfinite(norms)
        zeros, self._zeros = self._zeros, {}
        for i in np.flatnonzero(doubtful).tolist():
            slot, tensor = slots[i], tensors[i]
            if norms[i] == 0:
                self._zeros[slot] = seen = zeros.get(slot, 0) + 1
                if tensor.numel() == 0 or (seen > 8 and seen % _RECHECK):
                    continue
            true, bad = exact(tensor)
            if true > 0 or bad:
                self._zeros.pop(slot, None)
            self.nonfinite[slot] = bad
            self._any_bad |= bad > 0
            if not bad:
                self.norm[slot] = true

    def arrive(self, slots: Sequence[int], norms: NDArray[np.float64]) -> None:
        """The norms of lagging slots have come from their device; a suspicious one is read again if nobody touched it since."""
        self.norm[slots] = norms
        self.nonfinite[slots] = ~np.isfinite(norms)
        here = [(slot, g) for slot in slots if (g := self._params[slot].grad) is not None]
        here = [(slot, g) for slot, g in here if self._marks.get(slot) == (id(g), version(g))]
        self._marks.clear()
        with torch.no_grad():
            self._confirm([slot for slot, _ in here], [g for _, g in here])

    def resize(self, params: Sequence[Tensor], reader: NormReader) -> None:
        """The table was scanned again: slots have come, none has changed its number."""
        more = len(params) - len(self.norm)
        self._params, self._reader = params, reader
        self.norm = np.append(self.norm, np.full(more, np.nan))
        self.nonfinite = np.append(self.nonfinite, np.zeros(more))
        self.everything = list(range(len(params)))

    # -- between backward and step -------------------------------------------------------------------------------------------------

    def cleared(self, slots: Iterable[int]) -> bool:
        """Whether every gradient of `slots` is None, or exactly zero though it was not when read."""
        left = [g for slot in slots if (g := self._params[slot].grad) is not None]
        left.sort(key=_size)
        return all(_is_zero(g) for g in left)

    def held(self, slots: Iterable[int]) -> set[int]:
        """Those of `slots` that hold a gradient which no backward and no earlier look has seen, and which is not all zero."""
        found = set()
        for slot in slots:
            g = self._params[slot].grad
            if g is not None and self._leftover.get(slot) != (id(g), version(g)) and not _is_zero(g):
                found.add(slot)
        return found

    def gone(self, slots: Iterable[int]) -> list[int]:
        """Those of `slots` whose gradient is None now."""
        return [slot for slot in slots if self._params[slot].grad is None]

    def probes(self, slots: Sequence[int]) -> list[int]:
        """Up to three of `slots` with a finite, non-zero norm: small ones, spread over the network."""
        if self._probes_of[0] is slots:  # the same parameters as last time, in the same list
            probes = self._probes_of[1]
            if self.lagging or all(TINY < self.norm[slot] < np.inf for slot in probes):
                return probes
        probes = self._choose_probes(slots)
        self._probes_of = (slots, probes)
        return probes

    def _choose_probes(self, slots: Sequence[int]) -> list[int]:
        # What is still on a device has no norm yet: any will do, and one that turns out to be zero tells nothing.
        usable = [slot for slot in slots if TINY < self.norm[slot] < np.inf] if not self.lagging else list(slots)
        small = [slot for slot in usable if self._params[slot].numel() <= 4096] or sorted(usable, key=self._numel)[:PROBES]
        if len(small) <= PROBES:
            return small
        return [small[0], small[len(small) // 2], small[-1]]

    def _numel(self, slot: int) -> int:
        return self._params[slot].numel()

    def scaled_since(self, probes: Sequence[int]) -> NDArray[np.float64]:
        """The norm of each probe now over its norm when read; NaN where its gradient is None or on a device."""
        ratios = np.full(len(probes), np.nan)
        with np.errstate(all="ignore"):
            for i, slot in enumerate(probes):
                g = self._params[slot].grad
                if g is not None:
                    ratio = quick_norm(g) / float(self.norm[slot])
                    ratios[i] = 1.0 if abs(ratio - 1.0) < UNCHANGED else ratio
        return ratios

    # -- around a step -------------------------------------------------------------------------------------------------------------

    def used(self, slots: Sequence[int]) -> None:
        """The owner of `slots` has stepped."""
        self._just_stepped.update(slots)
        if self._stale_slots:
            self._clear_stale(slots)
        if self._used:
            for slot in slots:
                self._used.pop(slot, None)
        self._marked = self._armed > 0
        if self._marked:
            self._armed -= 1
            for slot in slots:
                g = self._params[slot].grad
                if g is not None:
                    self._used[slot] = (id(g), version(g))

    def _clear_stale(self, slots: Iterable[int]) -> None:
        self._stale_slots.difference_update(slots)
        for slot in slots:
            self._held.pop(slot, None)

    def uses_stale(self, slots: Iterable[int]) -> list[int]:
        """Those of `slots` whose gradient still holds one that its owner used at its previous step: asked right before a step."""
        found: list[int] = []
        for slot in self._stale_slots.intersection(slots):
            g = self._params[slot].grad
            # What is still on a device has been asked for long ago; only here is it waited for.
            if g is None or not all(bool(held) for held in self._held.pop(slot, ())) or _is_zero(g):
                self._stale_slots.discard(slot)
            else:
                found.append(slot)
        return found

    def _look_for_leftovers(self, before: list[Tensor | None]) -> None:
        """At the first backward after a step: gradients that are still there, unchanged, are stale until somebody clears them."""
        for slot in sorted(self._stale_slots):
            g = before[slot]
            if g is None or not self._holds_something(slot, g):
                self._clear_stale([slot])
        for slot in self._just_stepped:
            g = before[slot]
            if g is None:
                continue
            self._armed = 3
            # Where no mark was made, the first one that is left over counts: nobody has had a reason to keep and change it before.
            if self._used.get(slot, None if self._marked else (id(g), version(g))) == (id(g), version(g)) and self._holds_something(
                slot, g
            ):
                self._stale_slots.add(slot)
        self._just_stepped.clear()
        self._used.clear()

    def _holds_something(self, slot: int, gradient: Tensor) -> bool:
        """Whether a gradient is not all zero. On a device that is asked for now and answered later: for the time being, yes."""
        if on_host(gradient):
            return not _is_zero(gradient)
        with torch.no_grad():
            self._held.setdefault(slot, []).append(dense(gradient).any())
        return True


def _size(tensor: Tensor) -> int:
    return tensor.numel()


def _is_zero(gradient: Tensor) -> bool:
    with torch.no_grad():
        tensor = dense(gradient.detach())
        if on_host(tensor) and tensor.dtype is not torch.bfloat16:
            values = tensor.numpy()
            return not values.flat[:64].any() and not values.any()
        return not bool(tensor.any())
