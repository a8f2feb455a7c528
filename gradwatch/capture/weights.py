"""Weights before and after a step, over a fixed sample of elements, and whole where the sample does not change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradwatch.capture import private
from gradwatch.capture.parameters import as_real, materialised
from gradwatch.capture.samples import CHUNK, CHUNKS, WHOLE, step_of

SUSPICIOUS = 2
"""Times in a row that a sample has not changed in a step after which the whole parameter is compared. A step that rounds away in all of
1,024 elements twice running may still change one of a million others; a sparse one does so in health."""

AT_ONCE = 2**24
"""Elements that are copied for this in one update, at most: 64 MB in float32. Where more are suspicious they take turns."""


class _Group:
    """Parameters of one device and precision: one buffer before and one after."""

    def __init__(self, slots: list[int], views: list[Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self.slots = slots
        self.views = views
        self.position = {slot: i for i, slot in enumerate(slots)}
        sizes = [view.numel() for view in views]
        self.starts = np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.int64)
        self.sizes = np.array(sizes, np.int64)
        self.before = torch.zeros(sum(sizes), dtype=dtype, device=device)
        self.after = torch.zeros(sum(sizes), dtype=dtype, device=device)
        self.before_views = [part.view(view.shape) for part, view in zip(torch.split(self.before, sizes), views, strict=True)]
        self.after_views = [part.view(view.shape) for part, view in zip(torch.split(self.after, sizes), views, strict=True)]

    def take(self, slots: Sequence[int], after: bool) -> None:
        targets = self.after_views if after else self.before_views
        chosen = [self.position[slot] for slot in slots if slot in self.position]
        if len(chosen) == len(self.slots):
            private.foreach_copy(targets, self.views)
        elif chosen:
            private.foreach_copy([targets[i] for i in chosen], [self.views[i] for i in chosen])


class WeightSample:
    """The sample of every parameter's elements, taken before and after a step.

    Args:
        params: one parameter a slot.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._pointers: list[int] = []
        self._groups: list[_Group] = []
        self.taken: NDArray[np.bool_] = np.zeros(len(params), bool)
        self._still: NDArray[np.int64] = np.zeros(len(params), np.int64)
        self._compared: NDArray[np.int64] = np.zeros(len(params), np.int64)
        self._whole: NDArray[np.bool_] = np.zeros(len(params), bool)
        self._copies: dict[int, Tensor] = {}

    def take_before(self, slots: Sequence[int]) -> None:
        """Sample the weights of `slots` as they are before a step."""
        with torch.no_grad():
            self._refresh()
            for group in self._groups:
                group.take(slots, after=False)
            self._copy([slot for slot in slots if self._still[slot] >= SUSPICIOUS and not self._whole[slot]])
        self.taken[list(slots)] = True

    def take_after(self, slots: Sequence[int]) -> None:
        """Sample the weights of `slots` as they are after it."""
        with torch.no_grad():
            self._refresh()
            for group in self._groups:
                group.take(slots, after=True)

    def ratios(self, slots: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """RMS of the change over RMS of the weights before it, and whether any sampled element changed, for each of `slots`.

        NaN (and False) where no sample was taken before, NaN where the weights were zero. On a device this waits for the samples.
        """
        size = len(self._params)
        ratio, changed = np.full(size, np.nan), np.zeros(size, bool)
        with np.errstate(all="ignore"):
            for group in self._groups:
                before, after = _host(group.before), _host(group.after)
                step = after - before
                differs = (before != after) & ~(np.isnan(before) & np.isnan(after))
                moved = np.add.reduceat(differs, group.starts, dtype=np.int64) if before.size else np.zeros(0)
                above = np.add.reduceat(step * step, group.starts) if before.size else np.zeros(0)
                below = np.add.reduceat(before * before, group.starts) if before.size else np.zeros(0)
                ratio[group.slots] = np.where(below > 0, np.sqrt(above / below), np.nan)
                changed[group.slots] = moved > 0
        ratio[~self.taken], changed[~self.taken] = np.nan, False
        return ratio[list(slots)], changed[list(slots)]

    def same(self, slots: Sequence[int], changed: NDArray[np.bool_]) -> tuple[list[int], list[int]]:
        """Of some slots that an optimizer has just stepped, those that are bit for bit what they were, and those found to have changed.

        Args:
            slots: sampled before and after the step.
            changed: `[len(slots)]`, what `ratios` said of their samples.
        """
        index = np.asarray(slots, np.int64)
        self._still[index] = np.where(changed | ~self.taken[index], 0, self._still[index] + 1)
        still = index[self._still[index] > 0]
        if not still.size:
            return [], []
        same, differs = still[self._whole[still]].tolist(), []
        for slot in still[~self._whole[still]].tolist():
            copy = self._copies.get(slot)  # it is kept: there may be another step in this update
            if copy is None:
                continue
            now = private.shard(self._params[slot].detach())
            if copy.dtype != now.dtype or copy.device != now.device:
                self._still[slot] = 0
            elif torch.equal(copy, now):
                same.append(slot)
            else:
                self._still[slot] = 0
                if not bool(torch.isnan(copy).any()):  # what is not a number cannot be compared
                    differs.append(slot)
        return same, differs

    def _copy(self, slots: list[int]) -> None:
        """Keep some parameters whole until the step is over, those first that were compared least often.

        Those without a gradient are in nobody's way: they are frozen, or nothing reaches them, and that is told otherwise.
        """
        room = AT_ONCE - sum(copy.numel() for copy in self._copies.values())
        for slot in sorted(slots, key=lambda slot: int(self._compared[slot])):
            if self._params[slot].grad is None:
                continue
            tensor = private.shard(self._params[slot].detach())
            if slot not in self._copies and tensor.layout is torch.strided and tensor.numel() <= room:
                room -= tensor.numel()
                self._compared[slot] += 1
                self._copies[slot] = tensor.clone()

    def moved(self, slots: Sequence[int]) -> bool:
        """Whether a sampled element of `slots` differs from what it was before; False where no sample was taken.

        A NaN may have been written over a NaN, so that weights that are not numbers count as moved.
        """
        slots = [slot for slot in slots if self.taken[slot]]
        if not slots:
            return False
        self.take_after(slots)
        ratio, changed = self.ratios(slots)
        return bool(changed.any()) or bool(np.isnan(ratio).any() and self._any_nan(slots))

    def _any_nan(self, slots: Sequence[int]) -> bool:
        return any(bool(torch.isnan(self._params[slot]).any()) for slot in slots)

    def forget(self) -> None:
        """The update is over."""
        self.taken[:] = False
        self._copies.clear()

    def _refresh(self) -> None:
        """Make the views anew where a parameter's memory was moved (`.to`, `p.data = ...`) or materialised."""
        pointers = _pointers(self._params)
        if pointers == self._pointers:
            return
        self._pointers = pointers
        found: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[Tensor]]] = {}
        with torch.inference_mode(False):
            for slot, p in enumerate(self._params):
                view = _sample(p)
                self._whole[slot] = view is not None and view.numel() == as_real(p.detach()).numel()
                if view is not None:
                    dtype = torch.float64 if view.dtype is torch.float64 else torch.float32
                    slots, views = found.setdefault((view.device, dtype), ([], []))
                    slots.append(slot)
                    views.append(view)
            old = {tuple(group.slots): group for group in self._groups}
            self._groups = [_Group(slots, views, dtype, device) for (device, dtype), (slots, views) in found.items()]
            for group in self._groups:
                known = old.get(tuple(group.slots))
                if known is not None and known.before.shape == group.before.shape and known.before.dtype == group.before.dtype:
                    group.before.copy_(known.before)
                else:
                    self.taken[group.slots] = False


def _sample(parameter: Tensor) -> Tensor | None:
    """The fixed sample of a parameter as a strided view of its memory; None where it has none."""
    if not materialised(parameter):
        return None
    tensor = private.shard(parameter.detach())
    if tensor.layout is not torch.strided or not (tensor.dtype.is_floating_point or tensor.is_complex()):
        return None
    n = tensor.numel()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if n else 0
    if n == 0 or span != n:
        return None
    offset = tensor.storage_offset()
    if n <= WHOLE:
        return as_real(tensor.as_strided((n,), (1,), offset))
    return as_real(tensor.as_strided((CHUNKS, CHUNK), (step_of(n), 1), offset))


def _pointers(parameters: Sequence[Tensor]) -> list[int]:
    try:
        return [p.data_ptr() if type(p) is nn.Parameter else _pointer(p) for p in parameters]
    except RuntimeError:  # one of them is sparse
        return [_pointer(p) for p in parameters]


def _pointer(parameter: Tensor) -> int:
    """Where its memory is; 0 where it has none of its own."""
    if not materialised(parameter) or parameter.layout is not torch.strided:
        return 0
    return private.shard(parameter).data_ptr()


def _host(tensor: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = tensor.cpu().numpy().astype(np.float64)
    return array
