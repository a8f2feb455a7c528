"""Weights before and after a step, over a fixed sample of elements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradwatch.capture import private
from gradwatch.capture.parameters import as_real, materialised
from gradwatch.capture.samples import CHUNK, CHUNKS, WHOLE, step_of


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

    def take_before(self, slots: Sequence[int]) -> None:
        """Sample the weights of `slots` as they are before a step."""
        with torch.no_grad():
            self._refresh()
            for group in self._groups:
                group.take(slots, after=False)
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
