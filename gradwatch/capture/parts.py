"""What one call of a module leaves behind: where the samples of its output and of the gradients around it lie."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import islice
from time import perf_counter
from typing import Any, NamedTuple

from torch import Tensor, nn

from gradwatch.capture import private
from gradwatch.capture.samples import Samples

TENSORS = 4
"""Tensors of one nested output that are described, the first ones: what comes after hidden states and caches is their copies."""

ITEMS = 256
"""Things in one container that are looked at for them: a list of a hundred thousand numbers costs 50 ms (measured)."""

_PLAIN = (Tensor, nn.Parameter)


class Row(NamedTuple):
    """Where the sample of a tensor lies: which rows, the number of the row, elements in it, and elements of the tensor.

    `summed`: the sum of the whole tensor stands behind it.
    """

    samples: Samples
    number: int
    elements: int
    numel: int
    summed: bool = False


def _nothing(_: object) -> None:
    """Of what is over."""


class Delta:
    """The gradient with respect to one tensor, sampled as it passes in `backward()`.

    Args:
        take: copies the sample of a tensor into a row, where gradients are to be looked at now.
        fail: told of an error of ours, which must not reach the engine.

    Attributes:
        rows: one for each time that it passed.
        live: its record has not closed yet.
        spent: seconds.
    """

    __slots__ = ("_fail", "_handles", "_passed", "_take", "live", "rows", "spent")

    def __init__(self, take: Callable[[Tensor], Row | None], fail: Callable[[str], None]) -> None:
        self._take, self._fail = take, fail
        self._passed = False
        self._handles: list[Any] = []
        self.rows: list[Row] = []
        self.live = True
        self.spent = 0.0

    def ask(self, tensor: Tensor, hides: bool = False) -> None:
        """Have the gradient of a tensor that is no leaf sampled.

        A view that is later changed in place loses its hook silently, and with it what came of it from then on: then what it is a view
        of still has its own.

        Args:
            tensor: the tensor.
            hides: nobody else uses what it is a view of, whose gradient is then that of all uses, before a change and after it.
        """
        base = private.base(tensor)
        if base is None or base.grad_fn is None or base.numel() != tensor.numel():
            hooks: tuple[tuple[Tensor, Callable[[Tensor], None]], ...] = ((tensor, self._look),)
        elif hides:
            hooks = ((base, self._look),)
        else:
            hooks = ((tensor, self._passes), (base, self._passes_base))
        self._handles = [each.register_hook(hook) for each, hook in hooks]  # type: ignore[no-untyped-call]

    def ask_node(self, node: Any, number: int) -> None:
        """Have the gradient sampled with respect to an output of an autograd node, of which no tensor is left.

        Args:
            node: it.
            number: of the output.
        """

        def look(grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[number]
            if grad is not None:
                self._look(grad)

        self._handles = [node.register_prehook(look)]

    def withdraw(self) -> None:
        """Ask no more."""
        for handle in self._handles:
            handle.remove()

    def end(self) -> None:
        """Its record has closed: it holds nothing, though the user may hold the graph, and so it."""
        self._take = self._fail = _nothing
        self.live, self.rows = False, []

    def _passes(self, grad: Tensor) -> None:
        self._passed = True
        self._look(grad)

    def _passes_base(self, grad: Tensor) -> None:
        # It comes after the view's, where that has not lost its hook.
        if self._passed:
            self._passed = False
        else:
            self._look(grad)

    def _look(self, grad: Tensor) -> None:
        if not self.live or type(grad) not in _PLAIN:
            return
        start = perf_counter()
        try:
            row = self._take(grad.detach() if grad.requires_grad else grad)
            if row is not None:
                self.rows.append(row)
        except Exception:
            self._fail(traceback.format_exc())
        self.spent += perf_counter() - start


@dataclass(slots=True)
class Activation:
    """What an activation, a module or a function, did to one tensor.

    Attributes:
        module: it, or a module that stands for the function.
        given: sample of its input; None where its output tells all, or the input is gone.
        out: sample of its output; None where it is not to be had.
        peaks: rows that tell by how much each unit fired; 0 and less where it did not.
    """

    module: nn.Module
    given: Row | None = None
    out: Row | None = None
    peaks: list[Row] = field(default_factory=list)


@dataclass(slots=True)
class Part:
    """One tensor that a call of a module put out.

    Attributes:
        column: of the module.
        out: sample of the tensor.
        above: the gradient with respect to it.
        below: the gradient with respect to the module's first input.
        own: the rows of `out` and `above`, and of `below`, are its own and not another part's.
        axis: of its units: 1 where channels come first, else the last, -1.
        node: sequence number of the autograd node that made the tensor; -1: none.
        leaf: its module is no container.
        readable: what the graph saved behind it may be read: nobody's hooks pack it.
        by: column of the module whose work it is: that with parameters, or the activation, that put it out or the input of what did (a
            dropout, a pooling); -1: not known.
        place: of an activation, where it stands (`Cell.places`).
        changed: the part that the tensor was before the module changed it in place; None: it did not, or nobody knows.
        activations: the module, if it is one, or the functions that follow it.
    """

    column: int
    out: Row
    above: Delta | None = None
    below: Delta | None = None
    own: tuple[bool, bool] = (True, False)
    axis: int = -1
    node: int = -1
    leaf: bool = True
    readable: bool = True
    by: int = -1
    place: int = -1
    changed: Part | None = None
    activations: list[Activation] = field(default_factory=list)

    def deltas(self) -> list[Delta]:
        """Those that are its own."""
        found = [self.above] if self.above is not None and self.own[0] else []
        return [*found, self.below] if self.below is not None and self.own[1] else found

    def rows(self) -> list[Row]:
        """All rows that are its own."""
        found = [self.out] if self.own[0] else []
        for delta in self.deltas():
            found += delta.rows
        for activation in self.activations:
            found += activation.peaks
            if activation.given is not None:
                found.append(activation.given)
            if activation.out is not None and activation.out is not self.out:
                found.append(activation.out)
        return found


def tensors_in(thing: Any) -> list[Tensor]:
    """The first plain floating tensors in nested tuples, lists, mappings and dataclasses; scalars (a loss) only where there is nothing else."""
    if type(thing) in _PLAIN and thing.dim():
        return [thing] if thing.is_floating_point() or thing.is_complex() else []
    found: list[Tensor] = []
    scalars: list[Tensor] = []
    _collect((thing,), found, scalars, 4)
    return found or scalars


def _collect(things: Iterable[Any], found: list[Tensor], scalars: list[Tensor], depth: int) -> None:
    for thing in islice(things, ITEMS):
        if len(found) >= TENSORS:
            return
        if type(thing) in _PLAIN:
            if thing.is_floating_point() or thing.is_complex():
                (found if thing.dim() else scalars).append(thing)
        elif depth:
            if isinstance(thing, (tuple, list)):
                _collect(thing, found, scalars, depth - 1)
            elif isinstance(thing, Mapping):
                _collect(thing.values(), found, scalars, depth - 1)
            elif is_dataclass(thing) and not isinstance(thing, type):
                _collect((getattr(thing, each.name, None) for each in fields(thing)), found, scalars, depth - 1)
