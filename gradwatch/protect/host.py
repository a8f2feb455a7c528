"""Host memory that tensors of any layout are copied to and back from, got once and written over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """What a tensor is like but for its values; `str` of it is for messages."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    kind: torch.layout

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tensor.shape, tensor.dtype, tensor.device, tensor.layout)

    def __str__(self) -> str:
        kind = "" if self.kind is torch.strided else f" {self.kind}"
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}{kind} on {self.device}"


class Host:
    """Host memory for a list of tensors, written over where the layout is as it was."""

    def __init__(self) -> None:
        self._layouts: list[tuple[Any, ...]] = []
        self._copies: list[Tensor] = []
        self._events: list[torch.cuda.Event] = []

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(one) for one in self._copies)

    def write(self, tensors: Sequence[Tensor], layouts: Sequence[Layout]) -> None:
        """Copy the tensors, whose layouts are known."""
        self.wait()
        del self._layouts[len(tensors) :], self._copies[len(tensors) :]
        for number, (tensor, known) in enumerate(zip(tensors, layouts, strict=True)):
            memory = _memory(tensor)
            dense = memory.layout is torch.strided and not memory.is_quantized
            layout = (known, type(memory), memory.stride()) if dense else ()
            if number < len(self._copies):
                if dense and self._layouts[number] == layout:
                    self._copies[number].copy_(memory, non_blocking=memory.is_cuda and self._copies[number].is_pinned())
                    continue
                self._layouts[number], self._copies[number] = (), _NOTHING  # not both the old memory and the new
            else:
                self._layouts.append(())
                self._copies.append(_NOTHING)
            if dense and type(memory) is Tensor:
                host = torch.empty_like(memory, device="cpu", pin_memory=memory.is_cuda)
                host.copy_(memory, non_blocking=memory.is_cuda)
            else:
                host = memory.to("cpu", copy=True)
            self._layouts[number], self._copies[number] = layout, host
        self._mark(tensors)

    def read(self, number: int, layout: Layout) -> Tensor:
        """A new tensor of what was copied, after `wait`."""
        new = self._copies[number].to(layout.device, copy=True)
        return new if new.shape == layout.shape else new.expand(layout.shape)

    def read_into(self, tensors: Mapping[int, Tensor]) -> None:
        """Write what was copied into tensors, each under its number."""
        for number, tensor in tensors.items():
            # A tensor made under inference mode may be written to under it alone.
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                # A detached sparse tensor would get the indices and values for itself.
                target = _memory(tensor) if tensor.layout is torch.strided else tensor
                target.copy_(self._copies[number], non_blocking=tensor.is_cuda and self._copies[number].is_pinned())
        self._mark(tensors.values())

    def wait(self) -> None:
        """Until devices are done with this memory."""
        for event in self._events:
            event.synchronize()
        self._events = []

    def _mark(self, tensors: Iterable[Tensor]) -> None:
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)


_NOTHING = torch.empty(0, device="cpu")


def _memory(tensor: Tensor) -> Tensor:
    """A tensor without its graph, and without the axes along which it was expanded: torch refuses to write to these."""
    memory = tensor.detach()
    if memory.layout is torch.strided and 0 in memory.stride():
        for axis, (size, stride) in enumerate(zip(memory.shape, memory.stride(), strict=True)):
            if stride == 0 and size > 1:
                memory = memory.narrow(axis, 0, 1)
    return memory


def _nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor, of a sparse one with its indices."""
    if tensor.layout not in _PARTS:
        return tensor.nbytes
    return sum(getattr(tensor, part)().nbytes for part in _PARTS[tensor.layout])


_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
