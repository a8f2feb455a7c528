"""Statistics of modules inside compiled code: written by the compiled graph itself, in place.

There a hook's Python runs once, while dynamo traces it; what it does to tensors becomes part of the graph, which stays one: no break, no
recompilation. Only the forward pass is seen: a backward that writes into a tensor of ours would make the user's own raise (measured).

Nothing of the graph decides by the size of a tensor: where that is only a symbol, each decision would be one more graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradwatch.capture import private, saturation
from gradwatch.capture.parameters import as_real
from gradwatch.capture.parts import tensors_in
from gradwatch.capture.samples import CHUNK, CHUNKS, WHOLE, step_of

# A module whose flat part is not known counts less than none as flat.
CALLS, ELEMENTS, SQUARES, NONFINITE, FLAT, LARGEST = range(6)


_HALF = (torch.bfloat16, torch.float16)
"""What is computed in these is not read, only counted. Inductor keeps what one kernel hands to the next line in float32 and rounds it
where it is stored; who reads it decides where that is, and so the bits of the training (weights differed by 0.17 after 20 updates of
a transformer under autocast: measured)."""


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
        if not torch.is_grad_enabled() or not private.graph_may_write():
            return
        totals, seen = self.totals, False
        rounds = torch.is_autocast_enabled(totals.device.type) or any(one.dtype in _HALF for one in tensors_in(args))
        for i, tensor in enumerate(() if rounds else tensors_in(output)):
            readable = tensor.device == totals.device and tensor.dtype not in _HALF
            sample = _sample(tensor.detach()) if readable else None
            if sample is None:
                continue
            bad = sample.how_many(~torch.isfinite(sample.values))
            flat = self._flat(module, args, tensor, sample) if i == 0 else None
            sums = [torch.full_like(bad, float(not seen)), sample.elements, sample.values.square().sum(), bad]
            totals[:LARGEST].add_(torch.stack([*sums, torch.full_like(bad, -1.0) if flat is None else flat]))
            totals[LARGEST].copy_(torch.maximum(totals[LARGEST], sample.values.abs().amax()))
            seen = True
        if not seen:
            totals[CALLS].add_(1.0)

    def _flat(self, module: nn.Module, args: tuple[Any, ...], output: Tensor, sample: Sample) -> Tensor | None:
        """How many elements of the output's sample are flat."""
        if not self.judged:
            return None
        x = sample.values
        if self._needs_input:
            given = tensors_in(args[0])[:1] if args else []
            # One that works in place has overwritten its input.
            before = _sample(given[0].detach()) if given and given[0] is not output and given[0].shape == output.shape else None
            if before is None:
                return None
            x = before.values
        slope = self._derivative(module, x, sample.values)
        return None if slope is None else sample.how_many(slope < saturation.FLAT)


class Sample(NamedTuple):
    """A sample of a tensor, as a graph can take it.

    Attributes:
        values: float32 `[n]`, 0 beyond its elements.
        elements: how many it has, a scalar.
        inside: where they are; None: all of them.
    """

    values: Tensor
    elements: Tensor
    inside: Tensor | None

    def how_many(self, mask: Tensor) -> Tensor:
        """In how many elements `mask` is True, a float32 scalar."""
        return (mask if self.inside is None else mask & self.inside).sum().float()


def _sample(tensor: Tensor) -> Sample | None:
    """The elements of `samples.sample`; None of an empty tensor, and of one that may be empty for all that is known."""
    if tensor.layout is not torch.strided:
        return None
    line = _in_storage_order(as_real(tensor))
    n, known = line.numel(), private.statically_known
    if not known(n > 0):
        return None
    if known(n <= WHOLE):
        return Sample(line.float(), torch.full((), float(n), device=line.device), None)
    starts = torch.arange(CHUNKS, device=line.device) * step_of(n)
    index = (starts[:, None] + torch.arange(CHUNK, device=line.device)).reshape(-1)
    if known(n > WHOLE):
        return Sample(line[index].float(), torch.full((), float(WHOLE), device=line.device), None)
    inside = index < n  # for fewer elements than 1,024 the chunks lie side by side
    values = torch.where(inside, line[index.clamp(max=n - 1)].float(), 0.0)
    return Sample(values, inside.sum().float(), inside)


def _in_storage_order(tensor: Tensor) -> Tensor:
    """`[n]`: the elements in the order in which `samples.sample` sees them."""
    known, stride = private.statically_known, tensor.stride()
    order: list[int] = []
    for d in range(tensor.dim()):
        place = len(order)
        while place and known(stride[order[place - 1]] < stride[d]):
            place -= 1
        order.insert(place, d)
    span = 1
    dense = True
    for d in reversed(order):
        if not known(tensor.shape[d] == 1):
            dense = dense and known(stride[d] == span)
            span = span * tensor.shape[d]
    if dense:
        return tensor.permute(order).reshape(-1)
    while tensor.dim() > 1 and known(tensor.numel() > 4 * WHOLE):
        tensor = tensor.select(0, tensor.shape[0] // 2)
    return tensor.reshape(-1)


class Totals:
    """The totals of all modules, and what of them belongs to the open record.

    Compiled code cannot ask whether it runs inside a backward, so a checkpoint's recomputation adds to them as its first run did: what
    they were when the backward began is what counts. Where that is nothing (a reentrant checkpoint's first run records no gradient,
    and so is not seen) the recomputation counts.

    Args:
        of: (column, number of its watched model, its totals) of each module.
    """

    def __init__(self, of: Sequence[tuple[int, int, Traced]] = ()) -> None:
        by_device: dict[torch.device, list[tuple[int, int, Traced]]] = {}
        for one in of:
            by_device.setdefault(one[2].totals.device, []).append(one)
        self._groups = [_Group(group) for group in by_device.values()]

    def begin(self) -> None:
        """A backward begins."""
        for group in self._groups:
            group.begin()

    def end(self) -> None:
        """It has returned, or failed."""
        for group in self._groups:
            group.end()

    def claim(self, roots: Collection[int]) -> None:
        """What these models did belongs to the open record."""
        for group in self._groups:
            group.claim(roots)

    def clear(self, roots: Collection[int]) -> None:
        """Forget what these models did that belongs to no record yet."""
        for group in self._groups:
            group.clear(roots)

    def take(self, roots: Collection[int], observe: bool) -> dict[int, NDArray[np.float64]]:
        """Column -> float64 `[6]` of what belongs to the record that closes, of these models; waits for a device. Or cleared only."""
        taken: dict[int, NDArray[np.float64]] = {}
        for group in self._groups:
            taken |= group.take(roots, observe)
        return taken


class _Group:
    """Those on one device."""

    def __init__(self, of: Sequence[tuple[int, int, Traced]]) -> None:
        self._columns = [column for column, _, _ in of]
        self._roots = np.array([root for _, root, _ in of])
        self._totals = [traced.totals for _, _, traced in of]
        self._before: Tensor | None = None
        self._claimed: Tensor | None = None
        self._claimed_inside = False

    @torch.no_grad()
    def begin(self) -> None:
        self._before = torch.stack(self._totals)

    @torch.no_grad()
    def end(self) -> None:
        if self._before is not None:
            self._write(self._settled())
        self._before, self._claimed_inside = None, False

    def _settled(self) -> Tensor:
        """`[N, 6]`: without what was recomputed since the backward began."""
        now = torch.stack(self._totals)
        before = self._before
        return now if before is None else before if self._claimed_inside else torch.where(before[:, CALLS, None] > 0, before, now)

    @torch.no_grad()
    def claim(self, roots: Collection[int]) -> None:
        mine, new = self._of(roots), self._settled()
        rest = torch.where(mine, 0.0, new)
        new = torch.where(mine, new, 0.0)
        old = self._claimed
        if old is not None:
            new = torch.cat([old[:, :LARGEST] + new[:, :LARGEST], torch.maximum(old[:, LARGEST:], new[:, LARGEST:])], 1)
        self._claimed = new
        if self._before is None:
            self._write(rest)
        else:  # an optimizer steps inside the backward, which goes on
            self._before, self._claimed_inside = rest, True

    @torch.no_grad()
    def clear(self, roots: Collection[int]) -> None:
        self._write(torch.where(self._of(roots), 0.0, torch.stack(self._totals)))

    @torch.no_grad()
    def take(self, roots: Collection[int], observe: bool) -> dict[int, NDArray[np.float64]]:
        mine, claimed = np.isin(self._roots, list(roots)), self._claimed
        table = np.zeros((len(mine), LARGEST + 1))
        if claimed is not None:
            if observe:
                table = claimed.cpu().numpy().astype(np.float64)
            self._claimed = None if mine.all() else torch.where(self._of(roots), 0.0, claimed)
        return {column: table[i] for i, column in enumerate(self._columns) if mine[i]} if observe else {}

    def _of(self, roots: Collection[int]) -> Tensor:
        """Bool `[N, 1]`: which modules are of these models."""
        return torch.from_numpy(np.isin(self._roots, list(roots)))[:, None].to(self._totals[0].device)

    def _write(self, table: Tensor) -> None:
        private.foreach_copy(self._totals, list(table.unbind()))
