"""Every operator that runs, watched for the first NaN and the first Inf, and each of them followed to where it leads.

A tensor that holds a bad value is known by its memory: views and in-place operators keep it, and what autograd saves comes back as
another object. An operator whose output is bad while its inputs are fine gave *birth*; one whose inputs are bad hands on.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.capture import private
from gradwatch.investigate.frames import NOWHERE, Place, here, in_engine

_CONSTANTS = frozenset(
    {
        "full",
        "full_like",
        "new_full",
        "fill",
        "fill_",
        "masked_fill",
        "masked_fill_",
        "scalar_tensor",
        "lift_fresh",
        "lift_fresh_copy",
    }
)
"""Operators that write a number somebody has chosen: an Inf among it is meant (a mask)."""

_SOFTMAXES = ("softmax", "attention", "logsumexp")
"""Parts of the names of operators in front of which -inf is a mask."""

_PARALLEL = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


class Bad(NamedTuple):
    """What a tensor holds that is not finite."""

    nan: bool
    inf: bool

    def __bool__(self) -> bool:
        return self.nan or self.inf


FINE = Bad(False, False)


@dataclass(eq=False, slots=True)
class Event:
    """A bad value that was born or handed on.

    Attributes:
        number: in order.
        op: name of the operator without "aten::"; of what came from outside, the first that was given it.
        bad: what its output holds.
        place: the line that called it; where it was born in a backward pass, in the forward pass that made the node.
        backward: it happened in a backward pass.
        given: where it came from outside: "input", "parameter", "buffer", "delta" or "constant".
        tensor: what it is; only of what came from outside.
        meant: an Inf that somebody has chosen.
        masks: -inf that was given from outside: meant in front of a softmax.
        nan_root, inf_root: the events in which its NaN and its Inf began.
        made_nan: the event in which the NaN that it holds came to be, be it from an Inf.
        facts: (smallest, largest, elements) of each input, of a birth; NaN and Inf left aside.
        where: index of the first bad element of its output, of a birth.
        elements: how many are bad.
        node: name of the autograd node.
        own: it happened in code of the user's that the engine runs: a custom function's backward, or a hook.
        mask: of a NaN that was born of an Inf that somebody has chosen, that.
        saved: of a birth in a backward pass, the event by which a value that the forward pass had saved was bad.
    """

    number: int
    op: str
    bad: Bad
    place: Place = NOWHERE
    backward: bool = False
    given: str = ""
    tensor: Tensor | None = None
    meant: bool = False
    masks: bool = False
    nan_root: Event | None = None
    inf_root: Event | None = None
    made_nan: Event | None = None
    facts: tuple[tuple[float, float, int], ...] = ()
    where: tuple[int, ...] = ()
    elements: int = 0
    node: str = ""
    own: bool = False
    saved: Event | None = None
    mask: Event | None = None

    @property
    def root(self) -> Event:
        """Where it all began."""
        return (self.nan_root if self.bad.nan else self.inf_root) or self


@dataclass(slots=True)
class _Op:
    """What is known of an operator.

    Attributes:
        name: without "aten::" and overload.
        writes: positions of arguments that it changes.
        constant: it writes a number that somebody has chosen.
        empty: it gives memory that nobody has written.
    """

    name: str
    writes: frozenset[int] = frozenset()
    constant: bool = False
    empty: bool = False


@dataclass(slots=True)
class Made:
    """Which operator made an autograd node."""

    op: str
    place: Place


@dataclass(slots=True)
class _Empty:
    """The status of memory that nobody has written."""

    place: Place


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches operators.

    Args:
        modules: ids of those that have a name.
        given: tensors that come from outside, and what they are.
        stop: code of the function from which everything is run.

    Attributes:
        events: all of them, in order.
        made: sequence number of an autograd node -> which operator made it.
    """

    def __init__(
        self, modules: Container[int] = (), given: Iterable[tuple[str, Tensor]] = (), stop: CodeType | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.made: dict[int, Made] = {}
        self.in_backward = False
        self._modules, self._stop = modules, stop
        self._status: dict[int, Any] = {}
        self._given = {address(tensor): kind for kind, tensor in given}
        self._ops: dict[Any, _Op] = {}

    # -- what is asked -------------------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Watch what runs from here on, in whatever function; not within somebody else's mode."""
        if not private.watched_operators():
            self.__enter__()  # type: ignore[no-untyped-call]
            private.own_mode(on=True)

    def pause(self) -> None:
        """Watch no more, for now."""
        private.take_out_mode(self)
        private.own_mode(on=False)

    def event_of(self, tensor: Tensor) -> Event | None:
        """The event by which what is in a tensor's memory went bad; None: it did not, as far as is known."""
        status = self._status.get(address(tensor))
        return status if isinstance(status, Event) else None

    def give(self, kind: str, tensor: Tensor) -> None:
        """Another tensor comes from outside."""
        self._given[address(tensor)] = kind

    # -- one operator --------------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(not issubclass(kind, Tensor) or kind not in _PLAIN for kind in types):
            return func(*args, **kwargs)
        op = self._ops.get(func) or self._learn(func)
        backward = self.in_backward and not torch.is_grad_enabled()
        place: Place | None = None
        if not backward:
            # A custom function's own operators, which run without a graph, come after its node.
            number = private.next_sequence_number() - 1
            if number >= 0 and number not in self.made:
                place = self._here(skip=3)
                self.made[number] = Made(op.name, place)
        inputs = list(_tensors(args)) + list(_tensors(kwargs.values()))
        writes = {id(args[i]) for i in op.writes if i < len(args)} if op.writes else ()
        causes = [found for tensor in inputs if (found := self._input(op.name, tensor, id(tensor) in writes)) is not None]
        saved: Event | None = None
        if backward:
            forward = [event for event, _ in causes if not event.backward and event.given != "delta"]
            saved = next((event.root for event in forward if not event.root.meant), None)
            causes = [(event, bad) for event, bad in causes if event not in forward]
        before = _facts(inputs) if writes and not op.constant else None  # afterwards they are what it has made of them
        out = func(*args, **kwargs)
        outputs = list(_tensors((out,)))
        if op.empty:
            for tensor in outputs:
                self._status[address(tensor)] = _Empty(place or self._here(skip=3))
            return out
        mine = {address(tensor) for tensor in inputs}
        if op.writes and not outputs:  # `_foreach_add_` and the like: what they have written is looked at when it is read
            for position in op.writes:
                for tensor in _tensors(args[position : position + 1]):
                    self._status.pop(address(tensor), None)
        for tensor in outputs:
            where = address(tensor)
            if where in mine and not op.writes:
                continue  # a view: what its memory holds is known
            bad = look(tensor)
            if not bad:
                if where not in mine or covers(tensor):
                    self._status[where] = None
                continue
            event = self._status[where] = self._bad(op, bad, causes, backward, place, inputs, tensor, before)
            event.saved = saved
        return out

    def _input(self, op: str, tensor: Tensor, written: bool) -> tuple[Event, Bad] | None:
        """The event by which an input is bad, and what it holds; None: it is fine."""
        where = address(tensor)
        status = self._status.get(where, self)
        if status is None:
            return None
        if status is self:
            bad = look(tensor)
            if bad:
                event = self._begin(tensor, self._given.get(where, "constant"), bad)
                event.op, event.place = op, self._here(skip=5)
                return event, bad
            if covers(tensor):
                self._status[where] = None
            return None
        if isinstance(status, _Empty):
            bad = FINE if written else look(tensor)
            if not bad:
                return None
            event = self._begin(tensor, "", bad)
            event.op, event.place = "empty", status.place
            return event, bad
        bad = look(tensor)
        return (status, bad) if bad else None

    def _begin(self, tensor: Tensor, given: str, bad: Bad) -> Event:
        """A bad value that no operator made."""
        event = self._status[address(tensor)] = self._new("", bad)
        event.given, event.tensor = given, tensor
        event.meant = given == "constant" and not bad.nan
        event.masks = not bad.nan and not bool((tensor == torch.inf).any())
        event.nan_root, event.inf_root = (event if bad.nan else None), (event if bad.inf else None)
        event.made_nan = event.nan_root
        return event

    def _bad(
        self,
        op: _Op,
        bad: Bad,
        causes: list[tuple[Event, Bad]],
        backward: bool,
        place: Place | None,
        inputs: list[Tensor],
        output: Tensor,
        facts: Any,
    ) -> Event:
        event = self._new(op.name, bad)
        event.backward = backward
        with_nan = [cause for cause, held in causes if held.nan]
        with_inf = [cause for cause, held in causes if held.inf]
        event.meant = op.constant and not causes
        if bad.inf:
            roots = [cause.inf_root or cause for cause in with_inf] or [cause.root for cause in with_nan]
            event.inf_root = next((root for root in roots if not root.meant), roots[0]) if roots else event
        if bad.nan:
            if with_nan:
                first = min(with_nan, key=lambda cause: (cause.nan_root or cause).number)
                event.nan_root, event.made_nan = first.nan_root or first, first.made_nan or first
            else:
                softmax = any(part in op.name for part in _SOFTMAXES)
                roots = [cause.inf_root or cause for cause in with_inf]
                guilty = [root for root in roots if not root.meant and not (root.masks and softmax)]
                event.nan_root = guilty[0] if guilty else event
                event.mask = roots[0] if roots and not guilty else None
                event.made_nan = event
        if event.root is event or event.made_nan is event:
            event.place = place or self._place(event)
            event.facts = facts if facts is not None else _facts(inputs)
            wrong = ~torch.isfinite(output.detach())
            event.elements = int(wrong.sum())
            event.where = tuple(wrong.nonzero()[0].tolist()) if output.dim() else ()
        return event

    def _place(self, event: Event) -> Place:
        """The line that called it; of what the engine runs by itself, that of the forward pass which made the node."""
        if not event.backward:
            return self._here(skip=5)
        own = in_engine(skip=4)
        node = private.current_node()
        event.node = type(node).__name__ if node is not None else ""
        made = self.made.get(private.sequence_number(node)) if node is not None else None
        event.own = own is not None
        if own is not None:
            return Place(own.code, own.line, made.place.module if made is not None else 0)
        if made is None:
            event.op = of_node(event.node)
            return NOWHERE
        event.op = made.op
        return made.place

    def _here(self, skip: int) -> Place:
        place = here(self._modules, self._stop, skip)
        if place.module or not self.in_backward:
            return place
        # A checkpoint runs again what it holds, outside of any module's call: that it was made in is still known.
        made = self.made.get(private.sequence_number(private.current_node()))
        return Place(place.code, place.line, made.place.module) if made is not None else place

    def _new(self, op: str, bad: Bad) -> Event:
        event = Event(len(self.events), op, bad)
        self.events.append(event)
        return event

    def _learn(self, func: Any) -> _Op:
        schema = func._schema
        space, _, name = schema.name.partition("::")
        name = name if space == "aten" else schema.name
        writes = frozenset(
            i for i, argument in enumerate(schema.arguments) if argument.alias_info is not None and argument.alias_info.is_write
        )
        empty = name.startswith(("empty", "new_empty")) or name == "resize_"
        op = self._ops[func] = _Op(name, writes, name in _CONSTANTS, empty)
        return op


_PLAIN = (Tensor, torch.nn.Parameter)


def address(tensor: Tensor) -> int:
    """Of a tensor's memory; of one without any, of itself."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def covers(tensor: Tensor) -> bool:
    """Whether a tensor is all that is in its memory."""
    if tensor.layout is not torch.strided:
        return True
    return tensor.numel() * tensor.element_size() >= tensor.untyped_storage().nbytes()


def look(tensor: Tensor) -> Bad:
    """Whether a tensor holds NaN, and Inf; waits for a device."""
    if tensor.numel() == 0 or tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return FINE
    with torch.no_grad():
        tensor = tensor.detach()
        if tensor.layout is not torch.strided:
            if tensor.layout not in _PARALLEL:
                return FINE
            tensor = private.sparse_values(tensor)
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        if tensor.element_size() < 4:
            total = tensor.sum(dtype=torch.float32) if tensor.element_size() == 2 else tensor.float().sum()
        else:
            total = tensor.sum()
        if bool(torch.isfinite(total)):
            return FINE
        nan = bool(torch.isnan(tensor).any())
        return Bad(nan, bool(torch.isinf(tensor).any()))


def _facts(inputs: Iterable[Tensor]) -> tuple[tuple[float, float, int], ...]:
    facts = []
    for tensor in inputs:
        if not tensor.is_floating_point() or tensor.layout is not torch.strided or not tensor.numel():
            continue
        finite = tensor.detach()[torch.isfinite(tensor.detach())]
        if finite.numel():
            facts.append((float(finite.min()), float(finite.max()), tensor.numel()))
    return tuple(facts)


def _tensors(things: Iterable[Any]) -> Iterator[Tensor]:
    for thing in things:
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, (list, tuple)):
            yield from _tensors(thing)


@functools.cache
def of_node(name: str) -> str:
    """The operator of an autograd node by its name: "SqrtBackward0" -> "sqrt"; of a custom function its name."""
    if "Backward" not in name:
        return name
    stem = name.partition("Backward")[0]
    known = private.operator_names()
    return known.get(stem.lower(), stem)
