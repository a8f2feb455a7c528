"""The one batched read: the 2-norm of many tensors with as few calls as possible.

On CPU, small dense tensors are packed into one buffer and reduced by numpy (0.5 us a tensor against 3 us for a call of its own:
measured on torch 2.13); a larger contiguous float32 tensor is read by one `torch.dot` into its cell (82 us a million floats against
112 for `vector_norm`). On a device, one multi-tensor norm writes into the device's table, which is copied to the host once an update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.capture import private
from gradwatch.capture.parameters import as_real, dense, materialised, on_host
from gradwatch.capture.slab import GRADIENTS, Slab

SMALL = 512
"""Elements up to which a tensor is packed: above it, copying costs more than a call (0.5 us against 1.5: measured)."""

MEDIUM = 8192
"""Elements up to which numpy's dot reads a float32 tensor: 1.6 us against 3.2 for `torch.dot` (measured), and still on one thread."""

_PART = 2**19
"""Elements of one `torch.dot`: of more, its float32 sum loses digits (2e-4 of the norm of 16 million equal ones: measured)."""

PACK = 2**18
"""Elements of the packing buffer: 1 MB, which stays in the second-level cache."""

TINY = 1e-15
"""A float32 norm below this may have lost squares below 1e-38 to underflow: it is read again in float64."""

_PLAIN = (Tensor, torch.nn.Parameter)
_PACKED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(slots=True)
class _Batch:
    """Slots whose tensors share the packing buffer at one time."""

    slots: list[int] = field(default_factory=list)
    index: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    starts: list[int] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)
    size: int = 0


class NormReader:
    """Reads 2-norms of tensors shaped like the parameters of a table.

    Args:
        params: one parameter a slot; their shapes, dtypes and devices make the plan.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._plan(params)

    def _plan(self, params: Sequence[Tensor]) -> None:
        self._where: list[_Batch | None] = [None] * len(params)
        self._position = [0] * len(params)
        self._everything = list(range(len(params)))
        self._batches: list[_Batch] = []
        room = 0
        for slot, p in enumerate(params):
            if not materialised(p) or not on_host(p) or p.dtype not in _PACKED or not 0 < p.numel() <= SMALL:
                continue
            if not self._batches or self._batches[-1].size + p.numel() > PACK:
                self._batches.append(_Batch())
            batch = self._batches[-1]
            self._where[slot], self._position[slot] = batch, len(batch.slots)
            batch.slots.append(slot)
            batch.starts.append(batch.size)
            batch.size += p.numel()
            room = max(room, batch.size)
        self._buffer = torch.zeros(room, dtype=torch.float32, device="cpu")
        self._array: NDArray[np.float32] = self._buffer.numpy()
        self._squares: NDArray[np.float32] = np.zeros(room, np.float32)
        self._medium = [
            slot
            for slot, p in enumerate(params)
            if self._where[slot] is None and materialised(p) and on_host(p) and p.dtype is torch.float32 and 0 < p.numel() <= MEDIUM
        ]
        self._others = [slot for slot in range(len(params)) if self._where[slot] is None and slot not in set(self._medium)]
        for batch in self._batches:
            batch.index = np.array(batch.slots, np.int64)
            batch.views = [
                self._buffer[start : start + params[slot].numel()].view(params[slot].shape)
                for slot, start in zip(batch.slots, batch.starts, strict=True)
            ]
        self._parts: Sequence[Tensor] = ()
        self._parts_array: NDArray[np.float32] = np.zeros(0, np.float32)
        self._cells = torch.zeros(len(params), dtype=torch.float32, device="cpu")
        self._cell_array: NDArray[np.float32] = self._cells.numpy()
        self._cell = self._cells.unbind()
        devices = {p.device for p in params if materialised(p) and not on_host(p)}
        self.slabs = {device: Slab(device, len(params)) for device in devices}

    @property
    def nbytes(self) -> int:
        """Bytes of the fixed buffers."""
        return 4 * (self._buffer.numel() + self._squares.size + self._cells.numel())

    def read(self, slots: Sequence[int], tensors: Sequence[Tensor], out: NDArray[np.float64], row: int = GRADIENTS) -> list[int]:
        """Write the 2-norm of `tensors[i]` into `out[slots[i]]`.

        Call it under `no_grad`. Norms of tensors on a device go into `row` of the device's slab instead; their slots are returned.

        Args:
            slots: distinct slots.
            tensors: one tensor a slot, of the slot's shape; dense, sparse or complex.
            out: float64 `[S]`.
            row: row of the slabs.
        """
        if len(slots) == len(self._where) and list(slots) == self._everything:
            try:
                with np.errstate(all="ignore"):
                    return self._read_all(tensors, out, row)
            except (TypeError, RuntimeError):
                pass  # one of them is sparse, or carries a graph: look at each
        with np.errstate(all="ignore"):
            return self._read_each(slots, tensors, out, row)

    def _read_all(self, tensors: Sequence[Tensor], out: NDArray[np.float64], row: int) -> list[int]:
        """All slots, in order: what to do with each was decided when the plan was made."""
        for batch in self._batches:
            private.foreach_copy(batch.views, [tensors[slot] for slot in batch.slots])
            out[batch.index] = self._packed_norms(batch)
        for slot in self._medium:
            if tensors[slot].dtype is not torch.float32:
                raise TypeError("a gradient of another precision than its parameter")
            array = tensors[slot].numpy().ravel()
            out[slot] = math.sqrt(array.dot(array))
        return self._read_each(self._others, [tensors[slot] for slot in self._others], out, row) if self._others else []

    def _read_each(self, slots: Sequence[int], tensors: Sequence[Tensor], out: NDArray[np.float64], row: int) -> list[int]:
        packed: dict[int, tuple[_Batch, list[int], list[Tensor]]] = {}
        dotted: list[int] = []
        normed: list[int] = []
        remote: dict[tuple[torch.device, torch.dtype], tuple[list[int], list[Tensor]]] = {}
        cells = self._cell
        for slot, tensor in zip(slots, tensors, strict=True):
            batch = self._where[slot]
            if batch is not None and tensor.layout is torch.strided and type(tensor) in _PLAIN:
                entry = packed.setdefault(id(batch), (batch, [], []))
                entry[1].append(slot)
                entry[2].append(tensor)
                continue
            tensor = as_real(dense(tensor))
            if tensor.numel() == 0:
                out[slot] = 0.0
            elif not on_host(tensor):
                chosen = remote.setdefault((tensor.device, tensor.dtype), ([], []))
                chosen[0].append(slot)
                chosen[1].append(tensor)
            elif tensor.dtype is torch.float64 or (tensor.dtype is torch.float32 and tensor.numel() <= MEDIUM):
                array = tensor.detach().numpy().ravel()
                out[slot] = math.sqrt(array.dot(array)) if array.dtype == np.float32 else np.linalg.norm(array)
            elif tensor.dtype is torch.float32 and (line := _line(tensor)) is not None:
                if line.numel() <= _PART:
                    torch.dot(line, line, out=cells[slot])
                    dotted.append(slot)
                else:
                    out[slot] = self._norm_in_parts(line)
            else:
                torch.linalg.vector_norm(tensor, dtype=torch.float32, out=cells[slot])
                normed.append(slot)
        for batch, slots_, values in packed.values():
            position = [self._position[slot] for slot in slots_]
            private.foreach_copy([batch.views[i] for i in position], values)
            out[slots_] = self._packed_norms(batch)[position]
        if dotted:
            out[dotted] = np.sqrt(self._cell_array[dotted].astype(np.float64))
        if normed:
            out[normed] = self._cell_array[normed]
        lagging: list[int] = []
        for (device, _), (slots_, values) in remote.items():
            cells = self.slabs[device].cells[row]
            private.foreach_copy([cells[slot] for slot in slots_], private.foreach_norm(values))
            lagging += slots_
        return lagging

    def _norm_in_parts(self, line: Tensor) -> float:
        parts = line.split(_PART)  # type: ignore[no-untyped-call]
        for part, cell in zip(parts, self._part_cells(len(parts)), strict=True):
            torch.dot(part, part, out=cell)
        return math.sqrt(float(self._parts_array[: len(parts)].sum(dtype=np.float64)))

    def _part_cells(self, count: int) -> Sequence[Tensor]:
        if count > len(self._parts):
            with torch.inference_mode(False):
                cells = torch.zeros(count, dtype=torch.float32, device="cpu")
            self._parts, self._parts_array = cells.unbind(), cells.numpy()
        return self._parts[:count]

    def _packed_norms(self, batch: _Batch) -> NDArray[np.float32]:
        """Norms of what lies in the buffer; where nothing was copied to, those of what lay there before."""
        squares = self._squares[: batch.size]
        np.multiply(self._array[: batch.size], self._array[: batch.size], out=squares)
        norms: NDArray[np.float32] = np.sqrt(np.add.reduceat(squares, batch.starts))
        return norms


def _line(tensor: Tensor) -> Tensor | None:
    """A dense tensor as a contiguous vector in storage order, without a copy; None where it has gaps or overlaps."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).reshape(-1)
    if tensor.dim() == 2 and tensor.t().is_contiguous():
        return tensor.t().reshape(-1)
    return None


def exact(tensor: Tensor) -> tuple[float, int]:
    """The 2-norm in float64 and the number of NaN and Inf elements: two passes and a synchronisation, for suspicious tensors only."""
    tensor = dense(tensor.detach())
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    tensor = as_real(tensor)
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)), bad


def quick_norm(tensor: Tensor) -> float:
    """The 2-norm of one small tensor on CPU, for a probe; NaN on a device, where it would wait."""
    if (
        tensor.dtype is torch.float32
        and tensor.layout is torch.strided
        and on_host(tensor)
        and type(tensor) in _PLAIN
        and not tensor.is_neg()
    ):
        array = tensor.detach().numpy().ravel()
        return math.sqrt(array.dot(array))
    if not on_host(tensor):
        return float("nan")
    tensor = dense(tensor)
    tensor = as_real(tensor.detach())
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    values = tensor.numpy().ravel()
    with np.errstate(all="ignore"):
        return float(np.sqrt(values.dot(values)))
