"""Every operator that runs, watched for the first NaN and the first Inf, and each of them followed to where it leads.

A tensor that holds a bad value is known by its memory: views and in-place operators keep it, and what autograd saves comes back as
another object. An operator whose output is bad while its inputs are fine gave *birth*; one whose inputs are bad hands on.
"""

from __future__ import annotations

import functools
import math
import traceback
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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

_STATISTICS: dict[str, int | None] = {
    "native_batch_norm": 5,
    "_native_batch_norm_legit": 5,
    "cudnn_batch_norm": 5,
    "miopen_batch_norm": 5,
    "native_batch_norm_backward": 7,
    "cudnn_batch_norm_backward": None,
    "miopen_batch_norm_backward": None,
}
"""Operators whose arguments 3 and 4 are running statistics, and the position of the argument that says that it trains (None: it always
does). Then it writes them at most, and most of these do not declare it: what they hold has no part in what it puts out."""

NESTED = 8
"""Checkpoints within one another, or custom functions, that begin with no operator in between."""

_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


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
        masks: of a constant or what came from outside: it holds -Inf, and neither Inf nor NaN.
        nan_root, inf_root: the events in which its NaN and its Inf began.
        made_nan: the event in which the NaN that it holds came to be, be it from an Inf.
        facts: (smallest, largest, elements) of each input, of a birth; NaN and Inf left aside.
        where: index of the first bad element of its output, of a birth.
        elements: how many are bad.
        tensors: how many tensors it was given, of a birth; `dtype`: that of the first floating one.
        least: smallest magnitude in the last thing that it was given, a tensor or a number, of a birth; NaN: not known.
        counts: that was a tensor of integers.
        scalar: "NaN" or "Inf" among the numbers it was given.
        negative: of a birth, all that is bad is -Inf.
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
    tensors: int = 0
    dtype: torch.dtype = torch.float32
    least: float = math.nan
    counts: bool = False
    scalar: str = ""
    negative: bool = False
    own: bool = False
    saved: Event | None = None
    mask: Event | None = None

    @property
    def is_deliberate(self) -> bool:
        """A mask: -Inf that somebody has chosen."""
        return self.meant and self.masks

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
        outs: names of keyword arguments that it writes.
        constant: it writes a number that somebody has chosen.
        empty: it gives memory that nobody has written.
    """

    name: str
    writes: frozenset[int] = frozenset()
    outs: frozenset[str] = frozenset()
    constant: bool = False
    empty: bool = False


@dataclass(slots=True)
class _Step:
    """An operator that is about to run: what it is given, and by which events that is bad."""

    op: _Op
    backward: bool
    place: Place | None = None
    inputs: list[Tensor] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)
    causes: list[tuple[Event, Bad]] = field(default_factory=list)
    saved: Event | None = None
    facts: tuple[tuple[float, float, int], ...] | None = None
    last: Any = None
    scalar: str = ""


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
        broken: the error that it failed by, and watches no more.
    """

    def __init__(
        self, modules: Container[int] = (), given: Iterable[tuple[str, Tensor]] = (), stop: CodeType | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.made: dict[int, Made] = {}
        self.in_backward = False
        self.broken = ""
        self._checkpointed = 0
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
        if self.broken or any(kind not in _PLAIN for kind in types):
            return func(*args, **kwargs)
        # What fails here is ours: the operator runs all the same, and nothing is watched any more.
        step: _Step | None = None
        try:
            step = self._before(func, args, kwargs)
        except Exception:
            self.broken = traceback.format_exc()
        out = func(*args, **kwargs)
        if step is not None:
            try:
                self._after(step, out)
            except Exception:
                self.broken = traceback.format_exc()
        return out

    def _before(self, func: Any, args: Any, kwargs: Any) -> _Step:
        op = self._ops.get(func) or self._learn(func)
        step = _Step(op, self.in_backward and not torch.is_grad_enabled())
        if not step.backward:
            # A custom function's own operators, which run without a graph, come after its node.
            number = private.next_sequence_number() - 1
            made = self.made.get(number)
            # An operator in place may save a copy of what it changes before it does.
            if number >= 0 and (made is None or (made.op == "clone" and op.writes)):
                step.place = self._here()
                if made is not None and number - 1 not in self.made:  # the copy got a node of its own, behind that of the operator
                    self.made[number - 1] = Made(op.name, step.place)
                self.made[number] = Made(op.name, step.place)
        unread = set(map(id, _statistics(op.name, args)))
        step.inputs = [tensor for tensor in (*_tensors(args), *_tensors(kwargs.values())) if id(tensor) not in unread]
        step.scalar = _scalar((*args, *kwargs.values()))
        step.last = args[1] if len(args) > 1 and isinstance(args[1], (Tensor, int, float)) else args[0] if args else None
        step.written = [
            *(tensor for i in op.writes if i < len(args) for tensor in _tensors(args[i : i + 1])),
            *(tensor for name in op.outs if name in kwargs for tensor in _tensors((kwargs[name],))),
        ]
        written = set(map(id, step.written))
        causes = [found for tensor in step.inputs if (found := self._input(step, tensor, id(tensor) in written)) is not None]
        if step.backward:
            forward = [event for event, _ in causes if not event.backward and event.given != "delta"]
            step.saved = next((event.root for event in forward if not event.root.is_deliberate), None)
            causes = [(event, bad) for event, bad in causes if event not in forward]
        step.causes = causes
        if step.written and not op.constant:  # afterwards they are what it has made of them
            step.facts, step.last = _facts(step.inputs), _least(step.last)
        return step

    def _after(self, step: _Step, out: Any) -> None:
        op, outputs = step.op, list(_tensors((out,)))
        if op.empty:
            for tensor in outputs:
                self._status[address(tensor)] = _Empty(step.place or self._here())
            return
        mine = {address(tensor) for tensor in step.inputs}
        if not outputs:  # `_foreach_add_` and the like: what they have written is looked at when it is read
            for tensor in step.written:
                self._status.pop(address(tensor), None)
        for tensor in outputs:
            where = address(tensor)
            if where in mine and not step.written:
                continue  # a view: what its memory holds is known
            bad = look(tensor)
            if bad:
                self._status[where] = self._bad(step, bad, tensor)
            elif where not in mine or covers(tensor):
                self._status[where] = None

    def _input(self, step: _Step, tensor: Tensor, written: bool) -> tuple[Event, Bad] | None:
        """The event by which an input is bad, and what it holds; None: it is fine."""
        where = address(tensor)
        status = self._status.get(where, self)
        if status is None:
            return None
        if status is self:
            bad = look(tensor)
            if bad:
                event = self._begin(tensor, self._given.get(where, "constant"), bad)
                event.op, event.place = step.op.name, self._here()
                # What was saved of the forward pass has been seen there: this came out of code that torch does not run.
                event.backward = step.backward and event.given == "constant" and tensor.dim() > 0
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
        event.masks = is_mask(tensor, bad)
        event.nan_root, event.inf_root = (event if bad.nan else None), (event if bad.inf else None)
        event.made_nan = event.nan_root
        return event

    def _bad(self, step: _Step, bad: Bad, output: Tensor) -> Event:
        op = step.op
        event = self._new(op.name, bad)
        event.backward, event.saved, event.scalar = step.backward, step.saved, step.scalar
        with_nan = [cause for cause, held in step.causes if held.nan]
        with_inf = [cause for cause, held in step.causes if held.inf]
        if op.constant and not step.causes and not bad.nan:
            event.meant, event.masks = True, is_mask(output, bad)
        if bad.inf:
            roots = [cause.inf_root or cause for cause in with_inf] or [cause.root for cause in with_nan]
            event.inf_root = next((root for root in roots if not root.is_deliberate), roots[0]) if roots else event
        if bad.nan:
            if with_nan:
                first = min(with_nan, key=lambda cause: (cause.nan_root or cause).number)
                event.nan_root, event.made_nan = first.nan_root or first, first.made_nan or first
            else:
                softmax = is_softmax(op.name)
                roots = [cause.inf_root or cause for cause in with_inf]
                guilty = [
                    root for root in roots if not (root.masks and softmax) and not (root.meant and (root.masks or not root.given))
                ]
                event.nan_root = guilty[0] if guilty else event
                event.mask = roots[0] if roots and not guilty else None
                event.made_nan = event
        if event.root is event or event.made_nan is event:
            event.place = step.place or self._place(event)
            event.facts = step.facts if step.facts is not None else _facts(step.inputs)
            event.tensors = len(step.inputs)
            event.least, event.counts = step.last if isinstance(step.last, tuple) else _least(step.last)
            event.dtype = next((tensor.dtype for tensor in step.inputs if tensor.is_floating_point()), output.dtype)
            event.negative = is_mask(output, bad)
            wrong = ~torch.isfinite(_values(output.detach()))
            event.elements = int(wrong.sum())
            event.where = tuple(wrong.nonzero()[0].tolist()) if wrong.dim() else ()
        return event

    def _place(self, event: Event) -> Place:
        """The line that called it; of what the engine runs by itself, that of the forward pass which made the node."""
        if not event.backward:
            return self._here()
        own = in_engine()
        node = private.current_node()
        name = type(node).__name__ if node is not None else ""
        number = private.sequence_number(node) if node is not None else -1
        # A view that is changed in place gets a node of its own, right behind the operator's.
        made = self.made.get(number - 1 if name == "CopySlices" else number)
        event.own = own is not None
        if own is not None:
            return replace(own, module=made.place.module if made is not None else 0)
        if made is None:
            event.op = of_node(name)
            return NOWHERE
        event.op = made.op
        return made.place

    def _here(self) -> Place:
        place = here(self._modules, self._stop)
        if place.module or not self.in_backward:
            return place
        # A checkpoint runs again what it holds, outside of any module's call: that it was made in is still known.
        number = private.sequence_number(private.current_node())
        # One that holds nothing but another has no operator of its own: then the next node's is the first.
        made = next((found for i in range(NESTED) if (found := self.made.get(number + i)) is not None), None)
        if made is not None:
            self._checkpointed = made.place.module
        # Of a checkpoint within a checkpoint the outer one is known.
        return replace(place, module=self._checkpointed)

    def _new(self, op: str, bad: Bad) -> Event:
        event = Event(len(self.events), op, bad)
        self.events.append(event)
        return event

    def _learn(self, func: Any) -> _Op:
        schema = func._schema
        space, _, name = schema.name.partition("::")
        name = name if space == "aten" else schema.name
        changed = [
            (i, argument) for i, argument in enumerate(schema.arguments) if argument.alias_info and argument.alias_info.is_write
        ]
        writes = frozenset(i for i, argument in changed if not argument.kwarg_only)
        outs = frozenset(argument.name for _, argument in changed if argument.kwarg_only)
        empty = name.startswith(("empty", "new_empty")) or name == "resize_"
        op = self._ops[func] = _Op(name, writes, outs, name in _CONSTANTS, empty)
        return op


_PLAIN = (Tensor, torch.nn.Parameter)


def _statistics(op: str, args: Sequence[Any]) -> Sequence[Any]:
    """Running statistics that an operator is given, and does not read."""
    if op not in _STATISTICS:
        return ()
    trains = _STATISTICS[op]
    return args[3:5] if trains is None or (trains < len(args) and args[trains]) else ()


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
    if (
        type(tensor) not in _PLAIN
        or tensor.numel() == 0
        or tensor.is_meta
        or not (tensor.is_floating_point() or tensor.is_complex())
    ):
        return FINE
    if tensor.is_nested or tensor.is_quantized:
        return FINE
    with torch.no_grad():
        values = _values(tensor.detach())
        if values.element_size() < 4:
            total = values.sum(dtype=torch.float32) if values.element_size() == 2 else values.float().sum()
        else:
            total = values.sum()
        if bool(torch.isfinite(total)):
            return FINE
        return Bad(bool(torch.isnan(values).any()), bool(torch.isinf(values).any()))


def _values(tensor: Tensor) -> Tensor:
    """Its numbers, as a dense real tensor."""
    if tensor.layout in _SPARSE:
        tensor = private.sparse_values(tensor)
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def is_mask(tensor: Tensor, bad: Bad) -> bool:
    """Of its bad values all are -Inf."""
    return not bad.nan and not bool((_values(tensor.detach()) == torch.inf).any())


def _scalar(things: Iterable[Any]) -> str:
    """ "NaN" or "Inf" among Python's numbers; "" for none."""
    for thing in things:
        if isinstance(thing, float) and not math.isfinite(thing):
            return "NaN" if math.isnan(thing) else "Inf"
    return ""


def _facts(inputs: Iterable[Tensor]) -> tuple[tuple[float, float, int], ...]:
    facts = []
    for tensor in inputs:
        if not tensor.is_floating_point() or tensor.layout is not torch.strided or not tensor.numel():
            continue
        finite = tensor.detach()[torch.isfinite(tensor.detach())]
        if finite.numel():
            facts.append((float(finite.min()), float(finite.max()), tensor.numel()))
    return tuple(facts)


def _least(thing: Any) -> tuple[float, bool]:
    """The smallest magnitude in a tensor, or of a number, and whether it is a tensor of integers; NaN: not known."""
    if isinstance(thing, (int, float)):
        return abs(float(thing)), False
    if not isinstance(thing, Tensor) or thing.layout is not torch.strided or thing.is_nested or thing.is_meta or not thing.numel():
        return math.nan, False
    values = thing.detach()
    if values.dtype == torch.bool:
        return float(values.all()), True
    return float(values.abs().min()), not (values.is_floating_point() or values.is_complex())


def _tensors(things: Iterable[Any]) -> Iterator[Tensor]:
    for thing in things:
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, (list, tuple)):
            yield from _tensors(thing)


def is_softmax(op: str) -> bool:
    """Whether an operator takes -Inf for a mask."""
    return any(part in op for part in _SOFTMAXES)


@functools.cache
def of_node(name: str) -> str:
    """The operator of an autograd node by its name: "SqrtBackward0" -> "sqrt"; of a custom function its name."""
    if "Backward" not in name:
        return name
    stem = name.partition("Backward")[0]
    known = private.operator_names()
    return known.get(stem.lower(), stem)
