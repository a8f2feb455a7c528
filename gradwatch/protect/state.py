"""One state of a training: what belongs to it, how it is described so that only tensors need copying, and how it goes back."""

from __future__ import annotations

import copy
import random
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradwatch.capture import private
from gradwatch.protect.host import Host, Layout


@dataclass
class State:
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
    layouts: list[Layout]
    optimizers: list[_KeptOptimizer]
    scalers: tuple[Any, ...]
    told: dict[str, Any]
    held_places: list[_Place]
    told_places: list[_Place]
    told_layouts: list[Layout]
    randomness: _Randomness
    host: Host


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


class Layers:
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


# -- keeping -----------------------------------------------------------------------------------------------------------------------


def describe(
    step: int,
    layers: Layers,
    optimizers: Sequence[Optimizer],
    scalers: Sequence[Any],
    also: Sequence[Any],
    watch: Mapping[str, Any],
) -> tuple[State, list[Tensor]]:
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
    state = State(
        step=step,
        names=names,
        parameters=parameters,
        buffers=buffers,
        held=[weakref.ref(tensor) for tensor in held.tensors],
        layouts=[Layout.of(tensor) for tensor in held.tensors],
        optimizers=[
            _KeptOptimizer(weakref.ref(optimizer), type(optimizer).__name__, its_groups, its_content, its_own)
            for optimizer, its_groups, its_content, its_own in zip(optimizers, groups, in_place, own, strict=True)
        ],
        scalers=tuple(scalers),
        told=others,
        held_places=list(held.all.values()),
        told_places=list(told.all.values()),
        told_layouts=[Layout.of(tensor) for tensor in told.tensors],
        randomness=_Randomness.now(),
        host=Host(),
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


def changes_since(state: State, layers: Layers) -> list[str]:
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
        if tensor is not None and Layout.of(tensor) != layout:
            changes.append(f"{name} was {layout} and has become {Layout.of(tensor)}")
    return changes


def put_back(state: State, layers: Layers, also: Sequence[Any]) -> Any:
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


def _goes_back(tensor: Tensor, layout: Layout, is_parameter: bool) -> bool:
    """Whether a tensor can be written into. One that has become part of a graph is left to it."""
    return is_parameter or (Layout.of(tensor) == layout and tensor.grad_fn is None and layout.kind is torch.strided)


def _fill(optimizer: Optimizer, content: Mapping[str, Any]) -> None:
    optimizer.state.clear()
    optimizer.state.update(content["state"])
    for group, kept in zip(optimizer.param_groups, content["groups"], strict=True):
        for key in group.keys() - kept.keys() - {"params"}:
            del group[key]
        group.update(kept)


# -- tensors and what stands for them ----------------------------------------------------------------------------------------------


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


def _thaw(value: Any, places: Sequence[_Place], tensors: Sequence[Tensor]) -> Any:
    """A deep copy of what was frozen, with tensors in their places."""
    memo: dict[int, Any] = {id(place): tensor for place, tensor in zip(places, tensors, strict=True)}
    return copy.deepcopy(value, memo)


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


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
