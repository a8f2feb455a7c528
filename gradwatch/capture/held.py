"""What the update in flight was computed from, held until it closes, so that it can be run again if it goes wrong.

One forward pre-hook and one forward hook on each watched model: references to what it was given, the state of the random generators and
the versions of the inputs; and of its outputs, the gradient that came back (the *delta*), for the backward that replays it. Nothing
is copied but the generators' state (5 KB), nothing is computed, and no graph is kept alive.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from types import FrameType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.capture import private
from gradwatch.capture.call import PLAIN, Call, tensors_of
from gradwatch.capture.copying import Ours

LIMIT = 2**26
"""Bytes of deltas of a call that are held, of its outputs, and of inputs beyond those of the last call: 64 MB, by design."""

CALLS = 64
"""Calls that are held while no backward reaches them: what an update of many forward passes has; after an evaluation that nobody put
under `no_grad` they are dropped, oldest first."""

OLD = 8
"""Backward passes after which a call that none has reached is let go: a generator's waits for those of five steps of its critic."""

PARTS = 16
"""Parts of a model that are hooked in its place where it never runs as a whole: what costs 7 us each, and 16 between cold caches (measured)."""

OUTPUTS = 64
"""Tensors of one output that are asked for their delta."""

_TORCH = torch.__file__.removesuffix("__init__.py")
_OURS = __file__.removesuffix("capture/held.py").removesuffix("capture\\held.py")

# In eval mode their fused path is given up for a hook, and its bits with it.
_FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)


class Gate(Ours):
    """The hooks of one watched model."""

    __slots__ = ("_held", "root")

    def __init__(self, held: Held, root: int) -> None:
        self._held: Held | None = held
        self.root = root

    @private.never_a_frame
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if torch.compiler.is_dynamo_compiling():
            return
        held = self._held
        if held is not None and held.on and torch.is_grad_enabled():
            held.guarded(held.entering, self.root, module, args, kwargs)

    @private.never_a_frame
    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook."""
        if torch.compiler.is_dynamo_compiling():
            return
        held = self._held
        if held is not None and held.running:
            held.guarded(held.leaving, self.root, output)


class Held:
    """Holds the forward passes of the update in flight.

    Args:
        here: whether this is the thread whose training is watched.
        notice: told if it failed and was switched off.
        begins: told of each that begins.

    Attributes:
        on: forward passes are held.
        calls: those held, in order.
        running: those that have not returned.
        spent: seconds spent in its hooks.
    """

    def __init__(
        self, here: Callable[[], bool], notice: Callable[[str], None], begins: Callable[[Call], None] = lambda call: None
    ) -> None:
        self._here, self._notice = here, notice
        # Who is told holds this: without a cycle the model is freed as soon as the user lets go of it.
        self._begins = weakref.WeakMethod(begins) if isinstance(begins, MethodType) else lambda: begins
        self.on = False
        self.calls: list[Call] = []
        self.running: list[Call] = []
        self.spent = 0.0
        self._nbytes = 0
        self._models: list[nn.Module] = []
        self._devices: list[set[torch.device]] = []
        self._roots: list[nn.Module] = []
        self._groups: list[list[nn.Module]] = []
        self._open: set[int] = set()
        self._entered: set[int] = set()

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """While it is entered, what runs is ours."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def scan(self, models: Sequence[nn.Module], compiled: bool = False) -> None:
        """Put hooks on the models, anew where there were some, and on their parts, for a model need not be called as a whole.

        Args:
            models: the watched ones.
            compiled: nothing is to be taken out again that compiled code may know.
        """
        if len(self._roots) != len(models) or any(mine is not model for mine, model in zip(self._roots, models, strict=True)):
            self._roots, self._groups, self._open = (
                list(models),
                [[model, *_parts_of(model)] for model in models],
                set(range(len(models))),
            )
            if compiled or sum(map(len, self._groups)) > PARTS:
                self._groups, self._open = [[model] for model in models], set()
        self._put([model for group in self._groups for model in group])

    def descend(self) -> None:
        """A backward has returned. Of a model and its parts, hooked both at first, the model is kept where it is called as a whole; else its
        parts are, as those of a Lightning module whose `training_step` is called; and where none of them is, the next level down."""
        if not self.on or not self._open:
            return
        before = [list(group) for group in self._groups]
        for i in list(self._open):
            root, group = self._roots[i], self._groups[i]
            if id(root) in self._entered:
                self._groups[i] = [root]
            elif any(id(part) in self._entered for part in group):
                self._groups[i] = [part for part in group if part is not root]
            elif len(self._groups) > 1:
                continue  # its turn may come with another backward
            else:
                below = [part for model in group if model is not root for part in _parts_of(model) or [model]]
                if len(below) <= PARTS and any(all(part is not one for one in group) for part in below):
                    self._groups[i] = below
                    continue
                self._groups[i] = []
            self._open.discard(i)
        if before != self._groups:
            self._put([model for group in self._groups for model in group])

    def _put(self, models: Sequence[nn.Module]) -> None:
        self._take_out()
        self._models = list(models)
        self._devices = [{p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")} for model in models]
        for root, model in enumerate(models):
            if isinstance(model, _FUSED):
                continue
            gate = Gate(self, root)
            model.register_forward_pre_hook(gate.enter, with_kwargs=True)
            model.register_forward_hook(gate.leave)
        self.on = True

    def remove(self) -> None:
        """Take the hooks out, and let go of everything."""
        self._take_out()
        self._roots, self._groups = [], []
        self._open.clear()
        self._entered.clear()
        self.on = False
        self.release()

    def _take_out(self) -> None:
        for model in self._models:
            private.take_out_hooks(model, self._is_mine)
        self._models = []

    def _is_mine(self, hook: Any) -> bool:
        gate = getattr(hook, "__self__", None)
        return type(gate) is Gate and gate._held is self

    def guarded(self, do: Callable[..., None], *args: Any) -> None:
        """Do it inside the user's loop: what fails there ends the holding and nothing else."""
        start = perf_counter()
        try:
            do(*args)
        except Exception:
            self.on = False
            self.release()
            self._notice(
                "what a forward pass is computed from could not be held; where a NaN or an Inf is born will not be told. Please report "
                f"this:\n{traceback.format_exc()}"
            )
        self.spent += perf_counter() - start

    # -- a forward pass ------------------------------------------------------------------------------------------------------------

    def entering(self, root: int, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A model is called."""
        if not self._here() or private.in_backward() or not private.is_ordinary():
            return
        if self.running and private.running_calls(self.running[-1].model) > (self.running[-1].model is model):
            return  # inside another one
        self.running.clear()
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            return  # into a CUDA graph, which runs by itself from then on
        tensors = list(tensors_of(args))
        if kwargs:
            tensors += tensors_of(kwargs)
        versions: list[int] = []
        computed: set[int] = set()
        for tensor in tensors:
            if tensor.is_meta:
                return
            versions.append(private.version_or_zero(tensor))
            if tensor.grad_fn is not None:
                computed.add(len(versions) - 1)
        if computed:
            args, kwargs = _without_graph((args, kwargs))
        call = Call(root, model, args, kwargs, versions, torch.get_rng_state(), computed, site=_site(sys._getframe(1)))
        self.running.append(call)
        if torch.is_autocast_enabled("cpu"):
            call.autocast.append(("cpu", torch.get_autocast_dtype("cpu")))
        for device in self._devices[root]:
            if device.type == "cuda":
                call.generators[device.index or 0] = torch.cuda.get_rng_state(device)
            if torch.is_autocast_enabled(device.type):
                call.autocast.append((device.type, torch.get_autocast_dtype(device.type)))
        self._entered.add(id(model))
        self._make_room()
        self.calls.append(call)
        begins = self._begins()
        if begins is not None:
            begins(call)

    def _make_room(self) -> None:
        """Before another call: those that no backward has reached are let go, oldest first, where they are too many or too large."""
        if not self.calls:
            return
        self._nbytes += self.calls[-1].nbytes
        while self.calls and (len(self.calls) >= CALLS or self._nbytes > LIMIT):
            self._nbytes -= self.calls.pop(0).nbytes

    def leaving(self, root: int, output: Any) -> None:
        """It has returned."""
        call = self.running[-1]
        if call.root != root or not self._here():
            return
        self.running.pop()
        ref, held = weakref.ref(call), 0
        if not private.is_ordinary():
            return
        for number, tensor in enumerate(tensors_of(output)):
            if number >= OUTPUTS:
                break
            node = tensor.grad_fn
            if node is not None:
                call.nodes[number] = private.sequence_number(node)
                held += tensor.numel() * tensor.element_size()
                if held <= LIMIT:
                    call.outputs[number] = tensor.detach(), private.version_or_zero(tensor)
                node.register_prehook(_Catch(ref, number, tensor.output_nr).take)

    # -- a backward pass -----------------------------------------------------------------------------------------------------------

    def reached(self) -> list[Call]:
        """Calls through which a backward has gone since they were held."""
        return [call for call in self.calls if call.reached]

    def release(self, fine: bool = False) -> None:
        """Let go of all calls; `fine`: of those only that a backward has gone through, for all was well."""
        self.calls = [call for call in self.calls if not call.reached] if fine else []
        self._nbytes = sum(call.nbytes for call in self.calls[:-1])
        if not fine:
            self.running.clear()

    def thin_out(self) -> None:
        """A backward went well: the last call that it went through is held on, without its deltas, in case the record is asked about."""
        reached = self.reached()
        for call in self.calls:
            call.age += 1
        self.calls = [call for call in self.calls if call.reached or call.age < OLD]
        for call in reached:
            call.deltas.clear()
            call.outputs.clear()
        if len(reached) > 1:
            self.calls = [call for call in self.calls if not call.reached or call is reached[-1]]
            self._nbytes = sum(call.nbytes for call in self.calls[:-1])


class _Catch:
    """Keeps what passes back through the node that made an output."""

    __slots__ = ("_call", "_number", "_output")

    def __init__(self, call: weakref.ref[Call], number: int, output: int) -> None:
        self._call, self._number, self._output = call, number, output

    def take(self, grads: tuple[Tensor | None, ...]) -> None:
        call = self._call()
        if call is None:
            return
        call.reached = True
        call.used.add(self._number)
        grad = grads[self._output] if self._output < len(grads) else None
        if grad is None or type(grad) not in PLAIN:
            return
        held = sum(delta.numel() * delta.element_size() for delta in call.deltas.values())
        if held + grad.numel() * grad.element_size() > LIMIT:
            call.dropped = True
        else:
            call.deltas[self._number] = grad.detach()


def _parts_of(model: nn.Module) -> list[nn.Module]:
    """Its children, and in place of lists, which are never called, theirs."""
    parts: list[nn.Module] = []
    for child in model.children():
        parts += _parts_of(child) if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
    return parts


def _without_graph(thing: Any) -> Any:
    """The same with tensors that have a graph replaced by leaves on the same memory; containers are made anew, objects are kept."""
    if isinstance(thing, Tensor):
        return thing.detach().requires_grad_(thing.requires_grad) if type(thing) in PLAIN and thing.grad_fn is not None else thing
    if type(thing) in (tuple, list):
        return type(thing)(_without_graph(item) for item in thing)
    if type(thing) is dict:
        return {key: _without_graph(item) for key, item in thing.items()}
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return type(thing)(*(_without_graph(item) for item in thing))
    return thing


def _site(frame: FrameType | None) -> tuple[str, int]:
    """The innermost line outside torch and gradwatch."""
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _OURS)):
            return name, frame.f_lineno
        frame = frame.f_back
    return "", 0
