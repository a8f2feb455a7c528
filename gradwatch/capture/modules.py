"""Forward hooks on modules and tensor hooks on their outputs: what goes through a network on the updates that are looked at.

A hook decides nothing and computes next to nothing: it copies a sample of the output into a row and asks the tensor to do the same
with its gradient (the *delta*). What the samples say is worked out when the record has closed (`layers.py`). Never a full backward
hook: those raise on in-place operations, miss nested outputs and change the bits of some networks.
"""

from __future__ import annotations

import contextlib
import traceback
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from time import perf_counter
from types import MethodType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradwatch.capture import copying, private, saturation
from gradwatch.capture.copying import Ours
from gradwatch.capture.functional import find_functions
from gradwatch.capture.parameters import as_real
from gradwatch.capture.parts import Activation, Delta, Part, Row, tensors_in
from gradwatch.capture.samples import WHOLE, Samples
from gradwatch.capture.traced import Totals, Traced
from gradwatch.capture.units import Units, units_of

CALLS = 8
"""Calls of one module that are sampled in one record, the first ones, and of an activation in each of its places; all are counted. It
bounds what an update of many micro-batches holds: 8 KB a call."""

PLACES = 256
"""Places that are told apart of one activation; blocks that run in ever another order have more."""

SAMPLED = 1024
"""Calls of one activation that are sampled in one record, in all its places: 8 MB."""

LOOKS = 4
"""Graphs in a row without an activation that is a function, after which no more are walked: GANs and their like have two or three."""

FUNCTION, BEHIND = -2, -3
"""In place of a module's column: an activation that is no module; and `BEHIND - column` where it is not known what an activation was
given, for the module with parameters that returned last before it."""

_HIDING = (nn.Linear, nn.Bilinear, nn.LSTM, nn.GRU, nn.RNN)

_CHANNELS_LAST = ("linear", "embedding", "attention", "recurrent")


class Cell(Ours):
    """The hooks of one module.

    Attributes:
        module: the module.
        column: its column in the history; -1 where it is not in scope.
        changing: columns of what it holds that works in place.
        root: number of the watched model that it belongs to.
        kind: what it is (`description.kind_of`).
        changes: it works in place.
        hides: where its output is a view, then of a tensor that nobody else sees.
        holds: it has parameters of its own, and is no container.
        calls: since the last record that took them.
        claimed: how many of those belong to the open record.
        late: it came during the update at hand, which knows only some of its calls.
        looks: records in which its units were looked at.
        places: units in each of the places where the activation stands that it is, by the column of the module whose output it is given
            (`Part.by`), or by `BEHIND - column`; -1: not known; `FUNCTION`: those of a function that follows it.
        tells: an activation and its place, which stands behind the module and is told of under it.
        sampled: the places of the calls of an activation that were sampled since the last record that took them.
        claimed_samples: how many of those belong to the open record.
        traced: what compiled code writes into; None where none could.
    """

    __slots__ = (
        "_hooks",
        "calls",
        "changes",
        "changing",
        "claimed",
        "claimed_samples",
        "column",
        "fires",
        "flat",
        "hides",
        "holds",
        "kind",
        "late",
        "looks",
        "module",
        "needs_input",
        "places",
        "root",
        "sampled",
        "tells",
        "traced",
    )

    def __init__(self, hooks: ModuleHooks, module: nn.Module, column: int, root: int, kind: str) -> None:
        self._hooks: ModuleHooks | None = hooks
        self.module, self.column, self.root, self.kind = module, column, root, kind
        self.changing: frozenset[int] = frozenset()
        self.flat = saturation.shape(module) != ""
        self.needs_input = self.flat and saturation.needs_input(module)
        self.fires = saturation.fires(module)
        self.changes = bool(getattr(module, "inplace", False))
        self.hides = type(module) in _HIDING
        self.holds = kind != "container" and next(module.parameters(), None) is not None
        self.calls = self.claimed = self.looks = 0
        self.late = False
        self.traced: Traced | None = None
        self.places: dict[int, Units] = {}
        self.tells: tuple[Cell, int] | None = None
        self.sampled: list[int] = []
        self.claimed_samples = 0

    def is_sampled(self, place: int) -> bool:
        """Whether its call that has just been counted, of an activation in that place, is sampled."""
        if not self.flat:
            return self.calls <= CALLS
        if self.sampled.count(place) >= CALLS or len(self.sampled) >= SAMPLED:
            return False
        self.sampled.append(place)
        return True

    def is_shared(self) -> bool:
        """Whether it is an activation that stands in several places of the model."""
        return len(self.places) > 1 + (FUNCTION in self.places)

    @private.never_a_frame
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a watched model: until it returns its modules are looked at, if gradients are recorded now."""
        if torch.compiler.is_dynamo_compiling():
            return
        hooks = self._hooks
        if hooks is not None and hooks.once and hooks.here() and not private.in_backward():
            hooks.guarded(hooks.do_once)
        if hooks is None or not hooks.listening or not hooks.here():
            return
        # Inside a call that never returned, for it was broken off by an exception, nothing runs any more.
        if hooks.inside is None or not hooks.is_running(self):
            hooks.guarded(hooks.entering, self, (*args, *kwargs.values()))

    @private.never_a_frame
    def forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook.

        One output tensor without a gradient: 4 torch calls, 7 us on one thread of a CPU; with one 12 us, and 4 us in the backward; a
        rectifier 3 calls and 6 us more, a tensor of more than 1,024 elements one and 4 us (`tests/benchmarks/hooks.py`).
        """
        if torch.compiler.is_dynamo_compiling():
            if self.traced is not None:
                self.traced.add(module, args, output)
            return
        hooks = self._hooks
        if hooks is None or not hooks.listening:  # None: a copy, as made by `deepcopy(vars(module))`
            return
        seen = hooks.inside
        if seen is None:
            seen = hooks.here() and hooks.ready()
        elif get_ident() != hooks.thread:
            return
        if seen and self.column >= 0:
            if private.is_ordinary():
                hooks.guarded(hooks.called, self, args, output)
            elif private.is_observed():
                self.calls += 1
        if hooks.entered is self:
            hooks.leave()


@dataclass(slots=True)
class Taken:
    """What hooks left behind of one record.

    Attributes:
        parts: of all calls, in order.
        inputs: samples of what the watched models were given.
        calls: column -> calls.
        compiled: column -> float64 `[6]`, the totals that compiled code wrote (`traced.py`).
    """

    parts: list[Part] = field(default_factory=list)
    inputs: list[Row] = field(default_factory=list)
    calls: dict[int, int] = field(default_factory=dict)
    compiled: dict[int, NDArray[np.float64]] = field(default_factory=dict)


class ModuleHooks:
    """The hooks of a watch.

    Args:
        here: whether this is the thread whose training is watched.
        notice: told if the hooks failed and were taken out.

    Attributes:
        here: as given.
        cells: one for each module in scope.
        listening: this update is looked at.
        partial: some modules are not in scope.
        compiled: there is compiled code in the process: the hooks stay in place, for it would not take them back.
        inside: a watched model is running and its modules are looked at; False: they are not (no gradient is recorded, or a
            checkpoint is recomputed); None: no watched model is running as a whole.
        entered: the cell of the model that is running.
        thread: in which it runs.
        spent: seconds spent in hooks.
        once: what is done before the next forward pass of a watched model.
        was_entered: a watched model has run as a whole.
    """

    def __init__(self, here: Callable[[], bool], notice: Callable[[str], None]) -> None:
        self.here, self._notice = here, notice
        self.cells: list[Cell] = []
        self.listening = False
        self.partial = False
        self.compiled = False
        self.inside: bool | None = None
        self.entered: Cell | None = None
        self.thread = 0
        self.spent = 0.0
        self.once: dict[str, Callable[[], None]] = {}
        self.was_entered = False
        self._enters: list[tuple[dict[int, Any], int, Any]] = []
        self._places: list[tuple[dict[int, Any], int, Any]] = []
        self._samples: dict[torch.device, Samples] = {}
        self._totals = Totals()
        self._made: dict[int, tuple[weakref.ref[Tensor], int, Part]] = {}
        self._parts: list[list[Part]] = []
        self._claimed: list[int] = []
        self._last = -1
        self._inputs: list[list[Row]] = []
        self._claimed_inputs: list[int] = []
        self._touched: list[nn.Module] = []
        self._functions, self._looks = LOOKS, 0
        self._in_backward = False
        self._failed = False

    # -- in and out ----------------------------------------------------------------------------------------------------------------

    def scan(self, modules: Iterable[tuple[nn.Module, int, int, str]], roots: Sequence[nn.Module], compiled: bool = False) -> None:
        """Put hooks on modules, anew where some were there before; what those saw is kept.

        Args:
            modules: (module, its column, number of its watched model, its kind) of each that is in scope.
            roots: the watched models.
            compiled: one of them is known to be compiled, by what wraps it.
        """
        devices = [next((p.device for p in model.parameters()), torch.device("cpu")) for model in roots]
        before, known = {cell.column: cell for cell in self.cells}, {id(cell.module): cell for cell in self.cells}
        self._take_out()
        if len(self._parts) != len(roots):
            self._parts, self._inputs = [[] for _ in roots], [[] for _ in roots]
            self._claimed, self._claimed_inputs = [0] * len(roots), [0] * len(roots)
        by_module: dict[int, Cell] = {}
        for module, column, root, kind in modules:
            cell = known.get(id(module)) or Cell(self, module, column, root, kind)
            cell.column, cell.root = column, root
            cell.late = cell.late or (bool(known) and id(module) not in known and self.listening)
            by_module[id(module)] = cell
        changing = {id(cell.module): cell.column for cell in by_module.values() if cell.changes}
        for cell in by_module.values() if changing else ():
            held = (changing.get(id(module), -1) for module in cell.module.modules())
            cell.changing = frozenset(held) - {-1, cell.column}
        self.cells = list(by_module.values())
        self.partial = any(id(module) not in by_module for model in roots for module in model.modules())
        self._renumber({column: cell.column for column, cell in before.items() if id(cell.module) in by_module})
        for i, model in enumerate(roots):
            if id(model) not in by_module:
                by_module[id(model)] = Cell(self, model, -1, i, "container")
        # Noted before it is done: whatever breaks off in between, `remove` knows where to look.
        self._touched = [cell.module for cell in by_module.values()]
        copying.enter(self, (type(module) for module in self._touched))
        private.leave_alone({type(module) for module in self._touched}, on=True)
        private.guard_hooks(self, on=True)
        places: list[tuple[dict[int, Any], int, Any]] = []
        for cell in by_module.values():
            handle = cell.module.register_forward_hook(cell.forward)
            places.append((private.forward_hooks(cell.module), handle.id, cell.forward))
        for model in roots:
            enter = by_module[id(model)].enter
            handle = model.register_forward_pre_hook(enter, with_kwargs=True)
            places.append((private.forward_pre_hooks(model), handle.id, enter))
        self._places, self._enters = places, places[-len(roots) :]
        for cell in self.cells:
            device = next((p.device for p in cell.module.parameters(recurse=False)), devices[cell.root])
            if (cell.traced is None or cell.traced.totals.device != device) and device.type != "meta":
                cell.traced = Traced(cell.module, device)
        self._totals = Totals([(cell.column, cell.root, cell.traced) for cell in self.cells if cell.traced is not None])
        self.compiled = self.compiled or compiled or private.has_compiled() or any(map(private.is_compiled, self._touched))
        self._in_place(self.listening or self.compiled)

    def _renumber(self, now: Mapping[int, int]) -> None:
        """Columns have changed; those that are not in `now` are gone."""

        def of(place: int) -> int | None:
            if place > BEHIND:
                return now.get(place) if place >= 0 else place
            column = now.get(BEHIND - place)
            return None if column is None else BEHIND - column

        for part in (part for parts in self._parts for part in parts):
            place = of(part.place)
            part.column, part.by, part.place = now.get(part.column, -1), now.get(part.by, -1), -1 if place is None else place
        for cell in self.cells:
            cell.places = {new: units for place, units in cell.places.items() if (new := of(place)) is not None}
            cell.sampled = [-1 if (new := of(place)) is None else new for place in cell.sampled]
            cell.tells = None

    def listen(self, on: bool) -> None:
        """Whether the next update is looked at: hooks are in place only where it is (a dictionary's insertion: 0.1 us a module)."""
        if on is not self.listening and not self._failed:
            self.listening = on
            # Compiled code keeps the hooks that it was compiled with, and ignores those that are put in again (measured).
            if not self._is_compiled() or on:
                self._in_place(on)
            if on:  # what ran since the last look, in compiled code or behind its backward, belongs to no record
                self._forget(range(len(self._parts)))

    def _in_place(self, on: bool) -> None:
        for place, number, hook in self._places:
            if on:
                place[number] = hook
            else:
                place.pop(number, None)
        if self.once:
            self._await_forward()

    def _await_forward(self) -> None:
        for place, number, hook in self._enters:
            place[number] = hook

    def before_next_forward(self, what: str, do: Callable[[], None]) -> bool:
        """Have something done, once, right before the next forward pass of a watched model; whether that can be seen to begin.

        Not where the models do not run as a whole, or only in compiled code.
        """
        if self._failed or not self._enters or not self.was_entered:
            return False
        self.once[what] = do
        if not self._is_compiled():  # else they are in place, and compiled code may guard on them
            self._await_forward()
        return True

    def do_once(self) -> None:
        """Do it, and have it done no more."""
        once, self.once = self.once, {}
        if not self.listening and not self.compiled:
            self._in_place(False)
        for do in once.values():
            do()

    def remove(self) -> None:
        """Take all hooks out, and forget what they saw."""
        self._take_out()
        self.end_backward()
        self.claim(range(len(self._parts)))
        self.drop(range(len(self._parts)))
        self.cells = []

    def _take_out(self) -> None:
        self._in_place(True)  # what is noted of a hook elsewhere is found by it
        for module in self._touched:
            private.take_out_hooks(module, self._is_mine)
        copying.leave(self)
        private.leave_alone({type(module) for module in self._touched}, on=False)
        private.guard_hooks(self, on=False)
        self._touched, self._places, self._enters = [], [], []
        self.once = {}
        self.leave()

    def _is_mine(self, hook: Any) -> bool:
        cell = getattr(hook, "__self__", None) if type(hook) is MethodType else None
        return type(cell) is Cell and cell._hooks is self

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """While it is entered, what runs is ours and is not looked at."""
        before = self.listening, self.once
        self.listening, self.once = False, {}
        try:
            yield
        finally:
            self.listening, self.once = before

    def guarded(self, do: Callable[..., None], *args: Any) -> None:
        """Do it inside the user's forward pass: what fails there ends the hooks and nothing else."""
        start = perf_counter()
        try:
            do(*args)
        except Exception:
            self._fail(traceback.format_exc())
        self.spent += perf_counter() - start

    def _fail(self, error: str) -> None:
        self.listen(False)
        self._failed = True
        self._notice(f"the hooks on modules failed and are out; gradients are watched all the same. Please report this:\n{error}")

    # -- what the hooks say --------------------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether what runs now is the forward pass of a training: no evaluation, no recomputation of a checkpoint."""
        return torch.is_grad_enabled() and not private.in_backward()

    def is_running(self, entering: Cell) -> bool:
        """Whether the watched model that was entered is still running, when another one, or the same again, is entered in it."""
        return self.entered is not None and private.running_calls(self.entered.module) > (self.entered is entering)

    def entering(self, cell: Cell, given: tuple[Any, ...]) -> None:
        """A watched model is called with `given`."""
        if self.entered is not None:
            self._forget((self.entered.root,))
        self.inside, self.entered, self.thread, self._last = self.ready(), cell, get_ident(), -1
        self.was_entered = True
        if self.inside and len(self._inputs[cell.root]) < CALLS and private.is_ordinary():
            for tensor in tensors_in(given)[:1]:
                row = self._sample(tensor.detach(), whole=True)
                if row is not None:
                    self._inputs[cell.root].append(row)

    def leave(self) -> None:
        """The watched model has returned, or it will not any more."""
        self.inside = self.entered = None
        self._made.clear()
        self._last = -1

    def called(self, cell: Cell, args: tuple[Any, ...], output: Any) -> None:
        """A module has returned `output`."""
        outputs = tensors_in(output)
        if outputs and outputs[0].is_meta:
            return
        cell.calls += 1
        given = tensors_in(args[0]) if args else None
        source = given[0] if given else None
        by = cell.column if cell.holds or cell.flat else self._by(source)
        place = self._place(cell, source) if cell.flat else -1
        if cell.holds:
            self._last = cell.column
        if not cell.is_sampled(place):
            return
        in_place = source is not None and id(source) in map(id, outputs)
        # An activation in place has changed its input once.
        before = None if source is None else self._maker(source, changes=int(in_place and cell.changes))
        for i, tensor in enumerate(outputs):
            part = self._part(cell, tensor, source, before)
            if part is None:
                continue
            part.place = place
            if part.by < 0:
                part.by = by
            part.changed = before if in_place else None
            if i == 0 and source is not None and part.above is not None:
                if before is not None and before.column in cell.changing:
                    # What the container was given has been changed in place by what it holds.
                    part.below = _first_change(before, cell).below
                elif before is not None and before.above is not None:
                    part.below = before.above
                elif source.grad_fn is not None:
                    self._ask_below(part, cell, source, in_place)
            self._parts[cell.root].append(part)
            self._made[id(tensor)] = (weakref.ref(tensor), private.version_or_zero(tensor), part)

    def _by(self, tensor: Tensor | None) -> int:
        """`Part.by` of a tensor, also of one that was changed in place since."""
        made = None if tensor is None else self._made.get(id(tensor))
        return made[2].by if made is not None and made[0]() is tensor else -1

    def _place(self, cell: Cell, given: Tensor | None) -> int:
        """Where an activation stands that was given this."""
        by = self._by(given)
        if by >= 0 or self._last < 0 or self.partial:  # what is not in scope may have run in between
            return by
        # Of a call too many to be sampled the output is not known again.
        return self._last if self._last in cell.sampled or self._last in cell.places else BEHIND - self._last

    def _ask_below(self, part: Part, cell: Cell, source: Tensor, in_place: bool) -> None:
        delta = Delta(self._sample_delta, self._fail)
        if not in_place:
            delta.ask(source)
        elif cell.changes and cell.kind == "activation" and private.base(source) is None:
            # What it was given is not there any more; what made it is.
            delta.ask_node(*source.grad_fn.next_functions[0])  # type: ignore[union-attr]
        else:
            return
        part.below, part.own = delta, (part.own[0], True)

    def _part(self, cell: Cell, tensor: Tensor, source: Tensor | None, before: Part | None) -> Part | None:
        child = None if tensor is source else self._maker(tensor)
        if child is not None:  # what a container puts out is what its last module did
            return Part(cell.column, child.out, child.above, own=(False, False), axis=child.axis, node=child.node, by=child.by)
        values = tensor.detach()
        row = self._sample(values, whole=True)
        if row is None:
            return None
        axis = -1 if cell.kind in _CHANNELS_LAST else before.axis if before is not None else 1 if tensor.dim() > 3 else -1
        part = Part(cell.column, row, axis=1 if cell.kind == "convolution" else axis, leaf=cell.kind != "container")
        if tensor.grad_fn is not None:
            part.above = self._delta(tensor, cell.hides)
            part.node = private.sequence_number(tensor.grad_fn)
            part.readable = not private.saved_tensors_are_hooked()
        if cell.flat:
            activation = Activation(cell.module, out=row)
            if cell.needs_input:
                alike = source is not None and source.shape == tensor.shape and source.data_ptr() != tensor.data_ptr()
                activation.given = self._sample(source.detach()) if source is not None and alike else None
            if cell.fires is not None:
                activation.peaks = self.peaks(values, part.axis, cell.looks, cell.fires)
            part.activations.append(activation)
        return part

    def _maker(self, tensor: Tensor, changes: int = 0) -> Part | None:
        """The part that this very tensor is, or was before it was changed in place so many times."""
        made = self._made.get(id(tensor))
        if made is None or made[0]() is not tensor or private.version_or_zero(tensor) - made[1] != changes:
            return None
        return made[2]

    def _delta(self, tensor: Tensor, hides: bool = False) -> Delta:
        delta = Delta(self._sample_delta, self._fail)
        delta.ask(tensor, hides)
        return delta

    def _sample_delta(self, grad: Tensor) -> Row | None:
        return self._sample(grad) if self._in_backward and private.is_ordinary() else None

    def _sample(self, tensor: Tensor, whole: bool = False) -> Row | None:
        """Copy the sample of a detached tensor into a row; None where it has none.

        Args:
            tensor: what is sampled.
            whole: it is to be known whether all of it is finite. Of gradients the parameters' tell that.
        """
        numel = tensor.numel()
        if numel == 0 or tensor.layout is not torch.strided or tensor.is_meta:
            return None
        if tensor.is_complex():
            tensor = as_real(tensor)
            numel *= 2
        samples = self._samples.get(tensor.device) or self._samples_of(tensor)
        whole = whole and numel > WHOLE
        number, elements = samples.take(tensor, whole)
        return Row(samples, number, elements, numel, whole)

    def _samples_of(self, tensor: Tensor) -> Samples:
        device = tensor.device
        samples = self._samples.get(device)
        if samples is None:
            samples = self._samples[device] = Samples(device)
        return samples

    def peaks(self, y: Tensor, axis: int, turn: int, fires: float, function: nn.Module | None = None) -> list[Row]:
        """Rows that tell by how much each unit of an activation's output fired; 0 and less where it did not.

        Args:
            y: the output, or with `function` its input.
            axis: of its units.
            turn: number of the look.
            fires: see `saturation.fires`.
            function: the activation, where only its input is known.
        """
        if y.dim() < 2 or y.is_complex() or y.numel() == 0:
            return []
        units = units_of(y, axis, turn)
        if function is not None:
            units = function(units)
        samples = self._samples_of(y)
        count = units.shape[1]
        if count <= WHOLE:
            return [Row(samples, *samples.peaks(units, fires), count)]
        return [Row(samples, *samples.peaks(units[:, i : i + WHOLE], fires), min(WHOLE, count - i)) for i in range(0, count, WHOLE)]

    # -- the update ----------------------------------------------------------------------------------------------------------------

    def begin_backward(self, roots: Sequence[Any]) -> None:
        """The outermost backward of the watched training starts, of `roots`."""
        self.leave()
        if self.once:  # there was a forward pass, and nobody saw it begin
            self.once.clear()
            self.was_entered = False
        self._in_backward = self.listening
        if self.listening and self._is_compiled():
            self._totals.begin()
        if self.listening and private.compiles_autograd():  # hooks would break its graph, and make it another one at each look
            for part in (part for parts in self._parts for part in parts):
                for delta in part.deltas():
                    delta.withdraw()
        if self.listening and self._functions:
            self.guarded(self._find_functions, roots)

    def _find_functions(self, roots: Sequence[Any]) -> None:
        parts = [part for parts, claimed in zip(self._parts, self._claimed, strict=True) for part in parts[claimed:]]
        if parts:
            self._looks += 1
            found = find_functions(roots, parts, self._sample, self.peaks, self._looks)
            self._functions = self._functions - 1 if not found else LOOKS

    def maker(self, nodes: frozenset[int]) -> int:
        """Column of the first module to return what one of these autograd nodes made, in the record at hand; -1: none that is looked at."""
        return next((part.column for parts in self._parts for part in parts if part.node in nodes), -1)

    def end_backward(self) -> None:
        """It has returned, or failed."""
        self._in_backward = False
        self.inside = self.entered = None  # a recomputation that was broken off
        self._totals.end()

    def claim(self, roots: Iterable[int]) -> None:
        """What these models did belongs to the open record: a backward has reached them, or does, if an optimizer steps in it."""
        roots = set(roots)
        for root in roots:
            self._claimed[root] = len(self._parts[root])
            self._claimed_inputs[root] = len(self._inputs[root])
        for cell in self.cells:
            if cell.root in roots:
                cell.claimed, cell.claimed_samples = cell.calls, len(cell.sampled)
        if self._is_compiled():
            self._totals.claim(roots)

    def forget(self) -> None:
        """The backward that has returned, or failed, counts for nothing, and so do the forward passes before it."""
        self.end_backward()
        self._forget(range(len(self._parts)))

    def _forget(self, roots: Collection[int]) -> None:
        for root in roots:
            claimed, inputs = self._claimed[root], self._claimed_inputs[root]
            self.release(Taken(self._parts[root][claimed:], self._inputs[root][inputs:]))
            del self._parts[root][claimed:], self._inputs[root][inputs:]
        for cell in self.cells:
            if cell.root in roots:
                cell.calls = cell.claimed
                del cell.sampled[cell.claimed_samples :]
        if self.compiled:
            self._totals.clear(roots)

    def take(self, roots: Iterable[int], observe: bool = True) -> Taken:
        """What belongs to the record that closes, of these models; give it back by `release`.

        Args:
            roots: numbers of the models.
            observe: it is looked at; else it is only cleared.
        """
        roots = set(roots)
        taken = Taken()
        for root in roots:
            claimed = self._claimed[root]
            taken.parts += self._parts[root][:claimed]
            del self._parts[root][:claimed]
            self._claimed[root] = 0
            inputs, self._claimed_inputs[root] = self._claimed_inputs[root], 0
            taken.inputs += self._inputs[root][:inputs]
            del self._inputs[root][:inputs]
        for cell in self.cells:
            if cell.root in roots:
                if not cell.late:
                    taken.calls[cell.column] = cell.claimed
                cell.calls, cell.claimed, cell.late = cell.calls - cell.claimed, 0, False
                del cell.sampled[: cell.claimed_samples]
                cell.claimed_samples = 0
        if self._is_compiled():
            taken.compiled = self._totals.take(roots, observe)
        return taken

    def _is_compiled(self) -> bool:
        self.compiled = self.compiled or private.has_compiled()
        return self.compiled

    def send(self) -> None:
        """Start the copy of what lies on devices."""
        for samples in self._samples.values():
            samples.send()

    def arrived(self) -> bool:
        """Whether the last copies can be read without waiting."""
        return all(samples.arrived() for samples in self._samples.values())

    def release(self, taken: Taken) -> None:
        """Its rows are free again."""
        for part in taken.parts:
            for row in part.rows():
                row.samples.give_back((row.number,))
            for delta in part.deltas():
                self.spent += delta.spent
                delta.end()
        for row in taken.inputs:
            row.samples.give_back((row.number,))

    def drop(self, roots: Iterable[int]) -> None:
        """Forget what these models did in the record that closes."""
        self.release(self.take(roots, observe=False))


def _first_change(part: Part, container: Cell) -> Part:
    """The part of the first module in a container that changed the container's input in place."""
    while part.changed is not None and part.changed.column in container.changing:
        part = part.changed
    return part
