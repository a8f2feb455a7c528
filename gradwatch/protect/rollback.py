"""The last good states of a training: copied to host memory now and then, and put back bit for bit."""

from __future__ import annotations

import copy
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradwatch.capture import private

STATES = 2
"""States that are held. The newest may have been taken while a fault was already there and not yet seen; the one before it was not."""


@dataclass(frozen=True)
class Kept:
    """A state that has been put back.

    Attributes:
        step: the number that it was kept under.
        watch: a copy of what was kept as the watch's own state, tensors on the devices they were on.
    """

    step: int
    watch: Mapping[str, Any]


class GoodStates:
    """The last good states of a training, in host memory: at most two.

    Keep and restore between updates: after the scheduler and `GradScaler.update()` of the one before, and before the forward pass of the
    next, which draws random numbers. Kept inside `optimizer.step()`, a state would have the weights of an update and not yet its lr and
    loss scale. After a restore the loop goes on with a new forward pass. Where several processes train together, each keeps its own part
    and all restore at once.

    What a state holds, and how it goes back:

    * Parameters and buffers, non-persistent ones too, and what an optimizer owns outside the models: written into the very tensors that
      stood there, so that optimizers, tied weights, views, flattened RNN weights and compiled code need not know. `requires_grad`,
      `.train()` and other attributes of modules stay as they are. `_version` counts on: a graph from before the restore raises in its
      backward, as it must. A buffer that was assigned anew since goes back to the tensor that it was, or where that is gone to a new one;
      what stands there now may be somebody's batch and is not written to.
    * `get_extra_state()` of modules that define it.
    * Optimizers: the tensors in `.state` and `.param_groups`, in place as well, and all else in them deep-copied. Not by
      `load_state_dict`, which casts moments to their parameter's dtype, makes new tensors, and spoils strings. State and keys that came
      later are taken out: kept before the first step, there are no moments afterwards. An optimizer whose class has a `state_dict` or
      `load_state_dict` of its own keeps its state where it likes and goes back by these two, as exactly as they do it; one with hooks on
      torch's goes back both ways.
    * GradScalers, by their `state_dict`, which waits for the device. What one had noted of an unfinished update is dropped: after an
      exception within `scaler.step` it would take the next gradients for unscaled already, and step by them as they are.
    * Random numbers: Python's, numpy's and torch's global generators, CUDA's where CUDA is in use. Other generators are the user's.
    * What was handed in as `also`, by its `state_dict`.

    `p.grad` becomes None: gradients of weights that have been given up mean nothing, and those of a half-accumulated update would be
    added to. (An optimizer steps no parameter without a gradient: in a loop with `zero_grad(set_to_none=False)`, one that no longer takes
    part is left out from then on, where before it decayed.)

    Keeping changes nothing in the training: no random number is drawn, no graph is made or held. Of CPU tensors it is one pass of memory,
    and so is restoring: 7 ms for the 120 MB of 10 M float32 parameters under AdamW in 60 tensors, where a bare copy takes 6; 26 ms the
    first two times, when the memory is got; and 7 us a tensor, which is what counts in a model of many small ones (torch 2.13, two idle
    cores of an AMD EPYC; 22 ms with neighbours that keep the memory busy). CUDA tensors are copied to pinned memory on the current stream,
    which a later update in place cannot overtake; only what is about to read or overwrite that memory waits. (torch's pinned allocator
    may round a tensor's memory up to a power of two.) Memory is got once and written over as long as the layout stays. Sparse tensors are
    copied anew each time; tensors inside objects that are no plain container are deep-copied where they are.

    Args:
        models: the models under "" or their keys; referred to weakly.
        also: further objects with `state_dict()` and `load_state_dict()` that go back too: schedulers, an EMA, a data sampler. Referred to
            strongly, for they may be made for the purpose.
    """

    def __init__(self, models: Mapping[str, nn.Module], also: Iterable[Any] = ()) -> None:
        self._models = {key: weakref.ref(model) for key, model in models.items()}
        self._also = tuple(also)
        self._states: list[_State] = []
        self._free: list[_Host] = []

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of the states that are kept, oldest first."""
        return tuple(state.step for state in self._states)

    @property
    def nbytes(self) -> int:
        """Host memory of the copies of tensors, in bytes, with that which waits to be written over."""
        return sum(host.nbytes for host in (*self._free, *(state.host for state in self._states)))

    def keep(self, step: int, optimizers: Sequence[Optimizer], scalers: Sequence[Any], watch: Mapping[str, Any]) -> None:
        """Keep the present state; where two are kept already, over the older of them.

        States of this step and later ones are forgotten: they are of a training that was given up. Where something raises before the
        copying begins, which is to say in what the user handed in, all that was kept is still there.

        Args:
            step: number of the state, by which `restore` chooses.
            optimizers: referred to weakly.
            scalers: GradScalers.
            watch: the watch's own state, as containers of tensors and numbers.

        Raises:
            RuntimeError: a model is gone, or a parameter or buffer has no values yet.
            Exception: what a `state_dict()` raises, or `copy.deepcopy` of what it returned.
        """
        with torch.inference_mode(False), torch.no_grad():
            state, tensors = _describe(step, _Layers(self._living()), optimizers, scalers, self._also, watch)
            self._forget(lambda one: one.step >= step)
            if self._free:
                state.host = self._free.pop()
            elif len(self._states) == STATES:
                state.host = self._states.pop(0).host
            try:
                state.host.write(tensors, state.layouts + state.told_layouts)
            except BaseException:  # Ctrl-C halfway: this memory holds no state
                self._free.append(state.host)
                raise
            self._states.append(state)

    def restore(self, before: int | None = None) -> Kept:
        """Put a state back. Those kept after it are forgotten; it stays, to be put back again.

        Everything is checked before anything is written, and what belongs to others is loaded first: where a `load_state_dict()` raises,
        models and torch's optimizers are as they were.

        Args:
            before: the newest state with a step below this is chosen, or the oldest where there is none; None: the newest.

        Raises:
            RuntimeError: nothing was kept; or since the state was kept a model or optimizer is gone, a parameter, buffer or parameter
                group was added or removed, or a parameter was replaced or has another shape, dtype or device.
            Exception: what a `load_state_dict()` raises.
        """
        if not self._states:
            raise RuntimeError(
                "there is no good state to go back to: none has been kept yet. Let a few updates pass before rolling back, keep states "
                "more often, or load a checkpoint."
            )
        earlier = [state for state in self._states if before is None or state.step < before]
        state = earlier[-1] if earlier else self._states[0]
        layers = _Layers(self._living())
        changes = _changes(state, layers)
        if changes:
            more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise RuntimeError(
                f"cannot go back to the state of step {state.step}, and nothing has been changed: since then {'; '.join(changes[:3])}{more}. "
                "Put back what was changed by hand, or go back to a checkpoint; the next state is kept of the model as it is."
            )
        with torch.inference_mode(False), torch.no_grad():
            watch = _put_back(state, layers, self._also)
        self._forget(lambda one: one.step > state.step)
        return Kept(state.step, watch)

    def _living(self) -> dict[str, nn.Module]:
        models = {key: model for key, ref in self._models.items() if (model := ref()) is not None}
        for key in self._models.keys() - models.keys():
            raise RuntimeError(
                f"the model{f' {key!r}' if key else ''} whose states were to be kept no longer exists; hold on to it while it is trained, "
                "or make a new GoodStates for the new model"
            )
        return models

    def _forget(self, which: Callable[[_State], bool]) -> None:
        self._free += [state.host for state in self._states if which(state)]
        self._states = [state for state in self._states if not which(state)]


# -- what a state is ---------------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    kind: torch.layout

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        return cls(tensor.shape, tensor.dtype, tensor.device, tensor.layout)

    def __str__(self) -> str:
        kind = "" if self.kind is torch.strided else f" {self.kind}"
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}{kind} on {self.device}"


class _Place:
    """Stands for a tensor in a copy of the structure around it. Its number is that of the tensor's copy."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Places:
    """Tensors that are to be copied, each once, and what stands for them.

    Args:
        start: number of the first.
    """

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self.tensors: list[Tensor] = []
        self.all: dict[int, _Place] = {}  # by the id of the tensor, as deepcopy's memo has it

    def add(self, tensor: Tensor) -> int:
        place = self.all.get(id(tensor))
        if place is None:
            place = self.all[id(tensor)] = _Place(self._start + len(self.tensors))
            self.tensors.append(tensor)
        return place.number

    def freeze(self, value: Any) -> Any:
        """A deep copy of `value`, with places instead of tensors."""
        for tensor in _tensors(value):
            self.add(tensor)
        return copy.deepcopy(value, dict[int, Any](self.all))


@dataclass
class _KeptOptimizer:
    """An optimizer as it was kept.

    Attributes:
        optimizer: itself.
        name: its class.
        groups: numbers of the parameters of each group.
        held: its `.state` and `.param_groups`, frozen; None where it goes back by its own methods alone.
        told: its `state_dict()`, frozen; None where torch's is not asked.
    """

    optimizer: weakref.ref[Optimizer]
    name: str
    groups: list[list[int]]
    held: Any
    told: Any


@dataclass
class _State:
    """A kept state.

    Tensors have numbers: first the parameters, then the other tensors that go back in place, then those that a `state_dict` told of.

    Attributes:
        step: its number.
        names: what each parameter is called in messages.
        parameters: the number of each, by its name in the models.
        buffers: likewise, with None for those that were None.
        held: each tensor that goes back in place.
        layouts: what each of them was like.
        optimizers: as they were.
        scalers: the scalers.
        told: `state_dict()` of others, frozen, by what they are.
        held_places: what stands for tensors that go back in place.
        told_places: what stands for the others.
        told_layouts: what each of these was like.
        randomness: of the global generators.
        host: the copies.
    """

    step: int
    names: list[str]
    parameters: dict[str, int]
    buffers: dict[str, int | None]
    held: list[weakref.ref[Tensor]]
    layouts: list[_Layout]
    optimizers: list[_KeptOptimizer]
    scalers: tuple[Any, ...]
    told: dict[str, Any]
    held_places: list[_Place]
    told_places: list[_Place]
    told_layouts: list[_Layout]
    randomness: _Randomness
    host: _Host


class _Layers:
    """Parameters, buffers and extra states of models, by their qualified names.

    A parameter stands under each of its names, so that untying is seen; `_buffers` is asked because it knows those that are None.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, tuple[nn.Module, str, Tensor | None]] = {}
        self.extra: dict[str, nn.Module] = {}
        for key, model in models.items():
            for name, parameter in model.named_parameters(remove_duplicate=False):
                self.parameters[_join(key, name)] = parameter
            for name, module in model.named_modules():
                for leaf, buffer in private.own_buffers(module).items():
                    self.buffers[_join(key, name, leaf)] = module, leaf, buffer
                if type(module).get_extra_state is not nn.Module.get_extra_state:
                    self.extra[_join(key, name)] = module


@dataclass(frozen=True)
class _Randomness:
    """States of the global random number generators."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> _Randomness:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        return cls(random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda)

    def put_back(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


class _Host:
    """Host memory for a list of tensors, written over where the layout is as it was."""

    def __init__(self) -> None:
        self._layouts: list[tuple[Any, ...]] = []
        self._copies: list[Tensor] = []
        self._events: list[torch.cuda.Event] = []

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(one) for one in self._copies)

    def write(self, tensors: Sequence[Tensor], layouts: Sequence[_Layout]) -> None:
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

    def read(self, number: int, layout: _Layout) -> Tensor:
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


# -- keeping -----------------------------------------------------------------------------------------------------------------------


def _describe(
    step: int,
    layers: _Layers,
    optimizers: Sequence[Optimizer],
    scalers: Sequence[Any],
    also: Sequence[Any],
    watch: Mapping[str, Any],
) -> tuple[_State, list[Tensor]]:
    """All of a state but the copies, and the tensors that are to be copied."""
    for name, tensor in (*layers.parameters.items(), *((name, buffer) for name, (_, _, buffer) in layers.buffers.items())):
        if tensor is not None and not _has_values(tensor):
            raise RuntimeError(
                f"cannot keep a state: {name} has no values (it is lazy, or on the meta device); keep the first one after a forward pass"
            )
    held = _Places()
    parameters = {name: held.add(parameter) for name, parameter in layers.parameters.items()}
    first_names: dict[int, str] = {}
    for name, number in parameters.items():
        first_names.setdefault(number, name)
    groups = [[[held.add(p) for p in group["params"]] for group in optimizer.param_groups] for optimizer in optimizers]
    names = [first_names.get(number, "a parameter that an optimizer owns and no model") for number in range(len(held.tensors))]
    buffers = {name: None if buffer is None else held.add(buffer) for name, (_, _, buffer) in layers.buffers.items()}
    in_place = [held.freeze(_content(optimizer)) if not _overrides(optimizer) else None for optimizer in optimizers]

    told = _Places(len(held.tensors))
    own = [told.freeze(optimizer.state_dict()) if _overrides(optimizer) or _hooked(optimizer) else None for optimizer in optimizers]
    others = {
        "also": told.freeze([one.state_dict() for one in also]),
        "scalers": told.freeze([scaler.state_dict() for scaler in scalers]),
        "extra": told.freeze({name: module.get_extra_state() for name, module in layers.extra.items()}),
        "watch": told.freeze(dict(watch)),
    }
    state = _State(
        step=step,
        names=names,
        parameters=parameters,
        buffers=buffers,
        held=[weakref.ref(tensor) for tensor in held.tensors],
        layouts=[_Layout.of(tensor) for tensor in held.tensors],
        optimizers=[
            _KeptOptimizer(weakref.ref(optimizer), type(optimizer).__name__, its_groups, its_content, its_own)
            for optimizer, its_groups, its_content, its_own in zip(optimizers, groups, in_place, own, strict=True)
        ],
        scalers=tuple(scalers),
        told=others,
        held_places=list(held.all.values()),
        told_places=list(told.all.values()),
        told_layouts=[_Layout.of(tensor) for tensor in told.tensors],
        randomness=_Randomness.now(),
        host=_Host(),
    )
    return state, held.tensors + told.tensors


def _content(optimizer: Optimizer) -> dict[str, Any]:
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"state": dict(optimizer.state), "groups": groups}


def _overrides(optimizer: Optimizer) -> bool:
    """Whether it says itself what its state is."""
    return any(
        getattr(getattr(optimizer, name), "__func__", None) is not getattr(Optimizer, name)
        for name in ("state_dict", "load_state_dict")
    )


def _hooked(optimizer: Optimizer) -> bool:
    """Whether hooks may add to its state."""
    names = [f"_optimizer_{what}_{when}_hooks" for what in ("state_dict", "load_state_dict") for when in ("pre", "post")]
    return any(getattr(optimizer, name, None) for name in names)


# -- putting back ------------------------------------------------------------------------------------------------------------------


def _changes(state: _State, layers: _Layers) -> list[str]:
    """What keeps a state from going back, in words."""
    changes = []
    for kept, present, what in (
        (state.parameters, layers.parameters, "parameter"),
        (state.buffers, layers.buffers, "buffer"),
        (state.told["extra"], layers.extra, "extra state of"),
    ):
        changes += [f"the {what} {name} was removed" for name in kept if name not in present]
        changes += [f"the {what} {name} was added" for name in present if name not in kept]
    changes += [
        f"{name} was replaced by another parameter"
        for name, number in state.parameters.items()
        if name in layers.parameters and layers.parameters[name] is not state.held[number]()
    ]
    for kind in state.optimizers:
        optimizer = kind.optimizer()
        if optimizer is None:
            changes.append(f"the {kind.name} that was kept is gone")
        elif [[id(p) for p in group["params"]] for group in optimizer.param_groups] != [
            [id(state.held[number]()) for number in group] for group in kind.groups
        ]:
            changes.append(f"the parameter groups of {kind.name} have changed")
    for name, ref, layout in zip(state.names, state.held, state.layouts, strict=False):  # the parameters are the first
        tensor = ref()
        if tensor is not None and _Layout.of(tensor) != layout:
            changes.append(f"{name} was {layout} and has become {_Layout.of(tensor)}")
    return changes


def _put_back(state: _State, layers: _Layers, also: Sequence[Any]) -> Any:
    """Write everything; returns the state of the watch."""
    state.host.wait()
    in_place: dict[int, Tensor] = {}
    tensors: list[Tensor] = []
    for number, (ref, layout) in enumerate(zip(state.held, state.layouts, strict=True)):
        tensor = ref()
        if tensor is not None and _goes_back(tensor, layout, number < len(state.names)):
            in_place[number] = tensor
            tensors.append(tensor)
        else:
            tensors.append(state.host.read(number, layout))
    fresh = [state.host.read(place.number, layout) for place, layout in zip(state.told_places, state.told_layouts, strict=True)]
    told = _thaw(state.told, state.told_places, fresh)

    for one, its in zip(also, told["also"], strict=True):
        one.load_state_dict(its)
    for scaler, its in zip(state.scalers, told["scalers"], strict=True):
        if its:  # that of a disabled scaler is empty
            scaler.load_state_dict(its)
        unfinished = getattr(scaler, "_per_optimizer_states", None)
        if unfinished:
            unfinished.clear()
    for name, its in told["extra"].items():
        layers.extra[name].set_extra_state(its)
    for kind in state.optimizers:
        optimizer = kind.optimizer()
        if optimizer is not None and kind.told is not None:
            optimizer.load_state_dict(_thaw(kind.told, state.told_places, fresh))

    state.host.read_into(in_place)
    for name, index in state.buffers.items():
        module, leaf, present = layers.buffers[name]
        buffer = None if index is None else tensors[index]
        if buffer is not present:
            setattr(module, leaf, buffer)
    for kind in state.optimizers:
        optimizer = kind.optimizer()
        if optimizer is not None and kind.held is not None:
            _fill(optimizer, _thaw(kind.held, state.held_places, tensors))
    for parameter in tensors[: len(state.names)]:
        parameter.grad = None
    torch.clear_autocast_cache()  # it may hold casts of the weights that were given up
    state.randomness.put_back()  # last: what was called may have drawn
    return told["watch"]


def _goes_back(tensor: Tensor, layout: _Layout, is_parameter: bool) -> bool:
    """Whether a tensor can be written into. One that has become part of a graph is left to it."""
    return is_parameter or (_Layout.of(tensor) == layout and tensor.grad_fn is None and layout.kind is torch.strided)


def _fill(optimizer: Optimizer, content: Mapping[str, Any]) -> None:
    optimizer.state.clear()
    optimizer.state.update(content["state"])
    for group, kept in zip(optimizer.param_groups, content["groups"], strict=True):
        for key in group.keys() - kept.keys() - {"params"}:
            del group[key]
        group.update(kept)


def _thaw(value: Any, places: Sequence[_Place], tensors: Sequence[Tensor]) -> Any:
    """A deep copy of what was frozen, with tensors in their places."""
    memo: dict[int, Any] = {id(place): tensor for place, tensor in zip(places, tensors, strict=True)}
    return copy.deepcopy(value, memo)


# -- tensors -----------------------------------------------------------------------------------------------------------------------


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers that have values."""
    if isinstance(value, Tensor):
        if _has_values(value):
            yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, Tensor):
                yield key
            yield from _tensors(item)
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        for item in value:
            yield from _tensors(item)


def _has_values(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and tensor.device.type != "meta"


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


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
