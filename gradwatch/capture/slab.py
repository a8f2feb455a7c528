"""The one table of a device: what is computed there is written into its cells, and copied to the host once an update.

Parameters on CPU need no slab: their norms are written into host memory directly.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GRADIENTS, WEIGHTS, PROBES, SCALARS = 0, 1, 2, 3
"""Rows: norms of gradients when read, of weights, of the gradients that are looked at again before the step; and per update."""

LOSS, CLIP_COEF = 0, 1
"""Columns of the row `SCALARS`."""


class Slab:
    """A float32 table `[4, max(2, S)]` on one device.

    Args:
        device: where it lives.
        slots: S, the number of parameter slots.

    Attributes:
        table: the tensor.
        cells: for each row its cells, views made once.
    """

    def __init__(self, device: torch.device, slots: int) -> None:
        with torch.inference_mode(False):
            self.table = torch.full((4, max(2, slots)), float("nan"), dtype=torch.float32, device=device)
            self.clear()
        self.cells = [row.unbind() for row in self.table.unbind()]
        self._pinned = device.type == "cuda"
        self._host = torch.zeros(self.table.shape, dtype=torch.float32, device="cpu", pin_memory=self._pinned)
        self._event: torch.cuda.Event | None = None

    def send(self) -> None:
        """Start the copy to the host, without waiting where the device allows it."""
        with torch.no_grad():
            self._host.copy_(self.table, non_blocking=self._pinned)
            if self._pinned:
                self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._event.record(torch.cuda.current_stream(self.table.device))
        self.clear()

    def clear(self) -> None:
        """Forget what was summed up for this update."""
        with torch.no_grad():
            self.table[SCALARS].zero_()
            self.table[SCALARS, CLIP_COEF].fill_(1.0)

    def arrived(self) -> bool:
        """Whether the last copy can be read without waiting."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def values(self) -> NDArray[np.float64]:
        """The last copy, float64 `[4, max(2, S)]`; waits for it where it must."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        array: NDArray[np.float64] = self._host.numpy().astype(np.float64)
        return array

    def add_loss(self, root: Tensor) -> None:
        """Add a root of a backward to this update's loss."""
        with torch.no_grad():
            self.cells[SCALARS][LOSS].add_(root.detach().reshape(()))

    def add_clip_coef(self, coef: Tensor) -> None:
        """Gradients of this update were multiplied by `coef`: the smallest counts."""
        with torch.no_grad():
            cell = self.cells[SCALARS][CLIP_COEF]
            torch.minimum(cell, coef.detach().reshape(()).to(torch.float32), out=cell)
