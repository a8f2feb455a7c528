"""The buffers of the watched models as they were before the update at hand: running means, counters of batches.

A forward pass on a bad batch writes NaN into the running statistics of a BatchNorm, which no later batch takes out again. So a watch
that is to leave updates out copies them when an update is over, and copies them back when one is left out. It copies all each time:
`batch_norm` changes its running statistics without moving their version (measured).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gradwatch.capture import private

FREE = 2**18
"""Elements of a buffer that is kept without being asked for: 1 MB. What is larger is a mask or a table; the running statistics of all
BatchNorms of a ResNet-50 have 53,000, and copying these and their counters takes 0.26 ms an update (measured, one thread of a CPU)."""


class Buffers:
    """Keeps and restores.

    Args:
        models: the watched models; the dictionaries of their modules' buffers are held, not the modules.
        wanted: True keeps buffers whatever their size, None those of at most `FREE` elements, False none.
    """

    def __init__(self, models: Iterable[nn.Module], wanted: bool | None) -> None:
        places = [private.own_buffers(module) for model in models for module in model.modules()] if wanted is not False else []
        self._places = list({id(place): place for place in places if place}.values())
        self._most = FREE if wanted is None else None
        self._where: list[tuple[dict[str, Tensor | None], str]] = []
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self.keep()

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(copy.nbytes for copy in self._copies)

    def keep(self) -> None:
        """An update is over: what is there now is what the next one starts from."""
        if not self._places:
            return
        where = [(place, name) for place in self._places for name, tensor in place.items() if self._is_kept(tensor)]
        tensors = [tensor for place, name in where if (tensor := place[name]) is not None]
        with torch.no_grad():
            if not all(map(_alike, self._copies, tensors)) or len(self._copies) != len(tensors):
                with torch.inference_mode(False):
                    self._copies = [torch.empty_like(tensor, requires_grad=False) for tensor in tensors]
            if tensors:
                private.foreach_copy(self._copies, [tensor.detach() for tensor in tensors])
        self._where, self._tensors = where, tensors

    def _is_kept(self, tensor: Tensor | None) -> bool:
        if tensor is None or tensor.device.type == "meta" or tensor.layout is not torch.strided or tensor.is_inference():
            return False
        if 0 in tensor.stride() and tensor.numel() > 1:  # expanded: nothing can be written to it, neither by us nor in training
            return False
        return self._most is None or tensor.numel() <= self._most

    def restore(self) -> None:
        """Take back what the update at hand has done to them; a buffer that was replaced by another tensor comes back itself.

        Their versions do not move: a graph from before may still be waiting for its backward, as a generator's while its critic's step is
        left out, and `batch_norm` moves none either.
        """
        with torch.no_grad():
            for (place, name), tensor, copy in zip(self._where, self._tensors, self._copies, strict=True):
                tensor.data.copy_(copy)
                place[name] = tensor


def _alike(copy: Tensor, tensor: Tensor) -> bool:
    return copy.shape == tensor.shape and copy.dtype is tensor.dtype and copy.device == tensor.device
