"""The fixed sample of a tensor's elements, and the rows into which samples are copied while the model runs.

A large tensor is described by 16 chunks of 64 contiguous elements: a chunk is a few cache lines, the cost does not grow with the
batch, and its place is fixed, because the random generator belongs to the training.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradwatch.capture.parameters import on_host

CHUNKS, CHUNK = 16, 64
"""A tensor of more than 1,024 elements is sampled by 16 chunks of 64."""

WHOLE = CHUNKS * CHUNK
"""Elements up to which a tensor is its own sample, and floats in a row."""

_BLOCK = 128
"""Rows that are allocated at a time: 512 KB."""


def step_of(n: int) -> int:
    """Distance of the beginnings of two chunks in a tensor of `n > WHOLE` elements.

    Odd, so that it shares no factor with the powers of two that most dimensions are: else every chunk of an activation `[32, 64, 32,
    32]` would lie in channel 0.
    """
    step = (n - CHUNK) // (CHUNKS - 1)
    return max(CHUNK, step - 1 + step % 2)


def sample(tensor: Tensor) -> Tensor:
    """A view of the fixed sample of a real, strided, detached tensor: `[n]` up to 1,024 elements, else `[16, 64]`.

    In storage order where the tensor lies in memory without gaps. Of one that does not (a slice, an expanded tensor) the middle of
    its leading dimensions is taken, at most 4,096 elements, which may be copied.
    """
    n = tensor.numel()
    if not tensor.is_contiguous() and not _is_dense(tensor, n):
        while tensor.numel() > 4 * WHOLE and tensor.dim() > 1:
            tensor = tensor.select(0, tensor.shape[0] // 2)
        n = tensor.numel()
        if n > 4 * WHOLE:
            tensor, n = tensor.narrow(0, (n - 4 * WHOLE) // 2, 4 * WHOLE), 4 * WHOLE
        tensor = tensor.contiguous()
    if n <= WHOLE:
        return tensor.as_strided((n,), (1,), tensor.storage_offset())
    return tensor.as_strided((CHUNKS, CHUNK), (step_of(n), 1), tensor.storage_offset())


def _is_dense(tensor: Tensor, n: int) -> bool:
    """No gap and no overlap in memory, whatever the order of its dimensions."""
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != span:
            return False
        span *= size
    return span == n


class Samples:
    """Rows of 1,024 floats on one device, handed out and taken back; on a device they are copied to the host at once.

    Behind the elements of a row may stand the sum of the whole tensor, which is finite only if all of it is.

    Args:
        device: where they live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[Tensor] = []
        self._host: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._free: list[int] = []
        self._event: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(block.nbytes for block in self._blocks)

    def take(self, tensor: Tensor, whole: bool) -> tuple[int, int]:
        """Copy the sample of a real detached tensor into a free row, and if `whole` its sum.

        Returns:
            The number of the row, and of the elements in it.
        """
        if not self._free:
            self._grow()
        number = self._free.pop()
        if whole:
            # 3 us, and 50 us a million elements (measured).
            torch.sum(tensor, None, dtype=torch.float32, out=self._sums[number])
        values = sample(tensor)
        if values.dim() == 2:
            self._rows[number].copy_(values)
            return number, WHOLE
        n = values.shape[0]  # what has gaps is cut
        self._rows[number].as_strided((n,), (1,)).copy_(values)
        return number, n

    def peaks(self, units: Tensor, fires: float) -> tuple[int, int]:
        """Write by how much each of at most 1,024 units, `[N, U]`, left `[-fires, 0]`, where it is silent, into a free row."""
        if not self._free:
            self._grow()
        number, n = self._free.pop(), units.shape[-1]
        if units.dtype is not torch.float32:
            units = units.float()
        beyond = units.abs() if fires == 0.0 else (units + fires / 2).abs_().sub_(fires / 2)
        torch.amax(beyond, 0, out=self._rows[number].as_strided((n,), (1,)))
        return number, n

    def give_back(self, numbers: Iterable[int]) -> None:
        """These rows are free again."""
        self._free += numbers

    def _grow(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            block = torch.zeros(_BLOCK, WHOLE + 1, dtype=torch.float32, device=self._device)
            self._blocks.append(block)
            if on_host(block):
                self._host.append(block)
            else:
                pinned = self._device.type == "cuda"
                self._host.append(torch.zeros(block.shape, dtype=torch.float32, device="cpu", pin_memory=pinned))
            first = len(self._rows)
            self._rows += [row[:WHOLE].view(CHUNKS, CHUNK) for row in block.unbind()]
            self._sums += block[:, WHOLE].unbind()
        # The lowest first, so that a run that needs few touches few.
        self._free = [*range(first + _BLOCK - 1, first - 1, -1), *self._free]

    def send(self) -> None:
        """Start the copy to the host, without waiting where the device allows it."""
        for block, host in zip(self._blocks, self._host, strict=True):
            if host is not block:
                host.copy_(block, non_blocking=self._device.type == "cuda")
        if self._device.type == "cuda":
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(self._device))

    def arrived(self) -> bool:
        """Whether the last copy can be read without waiting."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def values(self, numbers: NDArray[np.int64], width: int = WHOLE) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Rows as they were when last sent.

        Args:
            numbers: of the rows.
            width: elements of each that are wanted.

        Returns:
            float32 `[N, width]`; beyond its elements a row holds what lay there before. And bool `[N]`, whether the sum of the whole is
            finite, where it was taken.
        """
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        out, whole = np.empty((len(numbers), width), np.float32), np.empty(len(numbers), bool)
        of, at = np.divmod(numbers, _BLOCK)
        for i, host in enumerate(self._host):
            mine = np.flatnonzero(of == i)
            if mine.size:
                block = host.numpy()
                out[mine] = block[:, :width][at[mine]]
                whole[mine] = np.isfinite(block[at[mine], WHOLE])
        return out, whole
