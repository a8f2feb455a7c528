"""Statistics of modules inside compiled code: written by the compiled graph itself, in place.

There a hook's Python runs once, while dynamo traces it; what it does to tensors becomes part of the graph, which stays one: no break, no
recompilation. Only the forward pass is seen: a backward that writes into a tensor of ours would make the user's own raise (measured).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradwatch.capture import saturation
from gradwatch.capture.samples import CHUNK, CHUNKS, WHOLE, step_of

# A module whose flat part is not known counts less than none as flat.
CALLS, ELEMENTS, SQUARES, NONFINITE, FLAT, LARGEST = range(6)


class Traced:
    """The totals of one module.

    Args:
        module: the module.
        device: where it runs.

    Attributes:
        totals: float32 `[6]`: calls, elements of the samples, their sum of squares, NaN and Inf, flat ones, and the largest magnitude.
        judged: its flat part is known.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        # A tensor for each module: views of one table would be aliases among the inputs of the graph.
        with torch.inference_mode(False):
            self.totals = torch.zeros(6, dtype=torch.float32, device=device)
        # Found now: what `singledispatch` does dynamo would not trace.
        self._derivative: Callable[[nn.Module, Tensor, Tensor], Tensor | None] = saturation.derivative.dispatch(type(module))
        self.judged = saturation.shape(module) != ""
        self._needs_input = self.judged and saturation.needs_input(module)

    def add(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Add a call to the totals; in the graph that is being traced."""
        if not torch.is_grad_enabled():
            return
        if isinstance(output, (tuple, list)):
            output = next((one for one in output if isinstance(one, Tensor)), None)
        elif isinstance(output, dict):
            output = next((one for one in output.values() if isinstance(one, Tensor) and one.dim()), None)
        totals = self.totals
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.device != totals.device:
            totals[CALLS].add_(1.0)
            return
        y = _sample(output.detach())
        flat = torch.full((), -1.0, device=totals.device)
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if self.judged and (not self._needs_input or (source is not None and source is not output)):
            x = _sample(source.detach()) if self._needs_input and source is not None else y
            slope = self._derivative(module, x, y)
            if slope is not None:
                flat = (slope < saturation.FLAT).sum().float()
        count = torch.full((), float(y.numel()), device=totals.device)
        bad = (~torch.isfinite(y)).sum().float()
        totals[:LARGEST].add_(torch.stack([torch.ones_like(count), count, y.square().sum(), bad, flat]))
        totals[LARGEST].copy_(torch.maximum(totals[LARGEST], y.abs().amax() if y.numel() else torch.zeros_like(count)))


def _sample(tensor: Tensor) -> Tensor:
    """The elements of `samples.sample`, of a tensor without gaps, as float32 `[n]`."""
    line = tensor.reshape(-1)
    n = line.numel()
    if n > WHOLE:
        starts = torch.arange(CHUNKS, device=line.device) * step_of(n)
        line = line[(starts[:, None] + torch.arange(CHUNK, device=line.device)).reshape(-1)]
    return line.float()


def read(traced: Sequence[Traced]) -> NDArray[np.float64]:
    """float64 `[N, 6]`: the totals; waits for a device."""
    if not traced:
        return np.zeros((0, 6))
    with torch.no_grad():
        table: NDArray[np.float64] = torch.stack([one.totals for one in traced]).cpu().numpy().astype(np.float64)
    return table


def clear(traced: Sequence[Traced]) -> None:
    """Start anew."""
    with torch.no_grad():
        for one in traced:
            one.totals.zero_()
