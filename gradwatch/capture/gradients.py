"""What `p.grad` holds between the events of an update: who was reached, what was read, what was cleared, left over or scaled.

A gradient is *new* where its object is new or its version moved since the last look. Nothing is kept from update to update but
numbers: references to gradients are held only while a backward runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.capture.norms import TINY, NormReader, exact, quick_norm
from gradwatch.capture.parameters import dense

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
        stale: bool `[S]`: the gradient still holds one that its owner used at its previous step.
        lagging: slots whose norm is still on a device.
    """

    def __init__(self, params: Sequence[Tensor], reader: NormReader) -> None:
        self._params = params
        self._reader = reader
        size = len(params)
        self.norm = np.full(size, np.nan)
        self.nonfinite = np.zeros(size)
        self.stale: NDArray[np.bool_] = np.zeros(size, bool)
        self.lagging: list[int] = []
        self._just_stepped: NDArray[np.bool_] = np.zeros(size, bool)
        self._used: dict[int, _Mark] = {}
        self._held: dict[int, list[Tensor]] = {}
        self._leftover: dict[int, _Mark] = {}
        self._armed = 3
        self._zeros: NDArray[np.int64] = np.zeros(size, np.int64)
        self._before: list[Tensor | None] = []
        self._versions: list[int] = []

    # -- around a backward ---------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A backward starts: remember what is there."""
        self._before = before = [p.grad for p in self._params]
        if not any(g is not None for g in before):
            self._versions = []
            if self._just_stepped.any():
                self._just_stepped[:] = False
            if self.stale.any():
                self.stale[:] = False
                self._held.clear()
            return
        self._versions = [0 if g is None else g._version for g in before]
        self._look_for_leftovers(before)

    def end(self) -> list[int]:
        """The backward has returned: the slots it reached."""
        before, self._before = self._before, []
        after = [p.grad for p in self._params]
        if not self._versions:
            self._leftover.clear()
            return [slot for slot, g in enumerate(after) if g is not None]
        reached: list[int] = []
        self._leftover.clear()
        for slot, (g, old, version) in enumerate(zip(after, before, self._versions, strict=True)):
            if g is None:
                continue
            if g is not old or g._version != version:
                reached.append(slot)
            else:
                self._leftover[slot] = (id(g), version)
        return reached

    def fail(self) -> None:
        """The backward raised: what it left is looked at by nobody until the next one."""
        self._before = []
        self._leftover.clear()

    def read(self, slots: Sequence[int]) -> None:
        """Read the norms of `slots`; a norm that is not finite, or so small that squares were lost, is read again exactly."""
        chosen: list[int] = []
        tensors: list[Tensor] = []
        for slot in slots:
            g = self._params[slot].grad
            if g is not None:
                chosen.append(slot)
                tensors.append(g)
        with torch.no_grad():
            self.lagging = self._reader.read(chosen, tensors, self.norm)
            if not self.lagging:
                self._confirm(chosen, tensors)

    def _confirm(self, slots: list[int], tensors: list[Tensor]) -> None:
        norms = self.norm[slots]
        self.nonfinite[slots] = 0
        with np.errstate(invalid="ignore"):
            doubtful = ~(norms >= TINY) | ~np.isfinite(norms)
        if not doubtful.any():
            if self._zeros.any():
                self._zeros[slots] = 0
            return
        self._zeros[np.asarray(slots)[~doubtful]] = 0
        for i in np.flatnonzero(doubtful).tolist():
            slot, tensor = slots[i], tensors[i]
            if norms[i] == 0:
                self._zeros[slot] += 1
                if tensor.numel() == 0 or (self._zeros[slot] > 8 and self._zeros[slot] % _RECHECK):
                    continue
            true, bad = exact(tensor)
            if true > 0 or bad:
                self._zeros[slot] = 0
            self.nonfinite[slot] = bad
            if not bad:
                self.norm[slot] = true

    def arrive(self, slots: Sequence[int], norms: NDArray[np.float64]) -> None:
        """The norms of lagging slots have come from their device; a suspicious one is read again if its gradient is still there."""
        self.norm[slots] = norms
        self.lagging = [slot for slot in self.lagging if slot not in set(slots)]
        here = [(slot, g) for slot in slots if (g := self._params[slot].grad) is not None]
        with torch.no_grad():
            self._confirm([slot for slot, _ in here], [g for _, g in here])

    def resize(self, params: Sequence[Tensor], reader: NormReader) -> None:
        """The table was scanned again: slots have come, none has changed its number."""
        more = len(params) - len(self.norm)
        self._params, self._reader = params, reader
        self.norm = np.append(self.norm, np.full(more, np.nan))
        self.nonfinite = np.append(self.nonfinite, np.zeros(more))
        self.stale = np.append(self.stale, np.zeros(more, bool))
        self._just_stepped = np.append(self._just_stepped, np.zeros(more, bool))
        self._zeros = np.append(self._zeros, np.zeros(more, np.int64))

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
            if g is not None and self._leftover.get(slot) != (id(g), g._version) and not _is_zero(g):
                found.add(slot)
        return found

    def gone(self, slots: Iterable[int]) -> list[int]:
        """Those of `slots` whose gradient is None now."""
        return [slot for slot in slots if self._params[slot].grad is None]

    def probes(self, slots: Sequence[int]) -> list[int]:
        """Up to three of `slots` with a finite, non-zero norm: small ones, spread over the network."""
        usable = [slot for slot in slots if np.isfinite(self.norm[slot]) and self.norm[slot] > TINY]
        small = [slot for slot in usable if self._params[slot].numel() <= 4096] or sorted(usable, key=self._numel)[:PROBES]
        if len(small) <= PROBES:
            return small
        return [small[0], small[len(small) // 2], small[-1]]

    def _numel(self, slot: int) -> int:
        return self._params[slot].numel()

    def scaled_since(self, probes: Sequence[int]) -> NDArray[np.float64]:
        """The norm of each probe now over its norm when read; NaN where its gradient is None or on a device."""
        now = [np.nan if (g := self._params[slot].grad) is None else quick_norm(g) for slot in probes]
        with np.errstate(all="ignore"):
            ratio: NDArray[np.float64] = np.asarray(now) / self.norm[list(probes)]
        ratio[np.abs(ratio - 1) < UNCHANGED] = 1.0
        return ratio

    # -- around a step -------------------------------------------------------------------------------------------------------------

    def used(self, slots: Sequence[int]) -> None:
        """The owner of `slots` has stepped."""
        self._just_stepped[slots] = True
        self.stale[slots] = False
        for slot in slots:
            self._used.pop(slot, None)
        if self._armed > 0:
            self._armed -= 1
            for slot in slots:
                g = self._params[slot].grad
                if g is not None:
                    self._used[slot] = (id(g), g._version)

    def uses_stale(self, slots: Iterable[int]) -> list[int]:
        """Those of `slots` whose gradient still holds one that its owner used at its previous step: asked right before a step."""
        if not self.stale.any():
            return []
        found = []
        for slot in slots:
            if not self.stale[slot]:
                continue
            g = self._params[slot].grad
            # What is still on a device has been asked for long ago; only here is it waited for.
            if g is None or not all(bool(held) for held in self._held.pop(slot, ())) or _is_zero(g):
                self.stale[slot] = False
            else:
                found.append(slot)
        return found

    def _look_for_leftovers(self, before: list[Tensor | None]) -> None:
        """At the first backward after a step: gradients that are still there, unchanged, are stale until somebody clears them."""
        for slot in np.flatnonzero(self.stale).tolist():
            g = before[slot]
            if g is None or not self._holds_something(slot, g):
                self.stale[slot] = False
                self._held.pop(slot, None)
        if not self._just_stepped.any():
            return
        for slot in np.flatnonzero(self._just_stepped).tolist():
            g = before[slot]
            if g is None:
                continue
            self._armed = 3
            used = self._used.get(slot)
            if used is not None and used == (id(g), g._version) and self._holds_something(slot, g):
                self.stale[slot] = True
        self._just_stepped[:] = False
        self._used.clear()

    def _holds_something(self, slot: int, gradient: Tensor) -> bool:
        """Whether a gradient is not all zero. On a device that is asked for now and answered later: for the time being, yes."""
        if gradient.device.type == "cpu":
            return not _is_zero(gradient)
        with torch.no_grad():
            self._held.setdefault(slot, []).append(dense(gradient).any())
        return True


def _size(tensor: Tensor) -> int:
    return tensor.numel()


def _is_zero(gradient: Tensor) -> bool:
    with torch.no_grad():
        tensor = dense(gradient.detach())
        tensor = getattr(tensor, "_local_tensor", tensor)
        if tensor.device.type == "cpu" and tensor.dtype is not torch.bfloat16:
            values = tensor.numpy()
            return not values.flat[:64].any() and not values.any()
        return not bool(tensor.any())
