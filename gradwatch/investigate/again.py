"""A forward pass run once more, and nothing of it left behind.

What it runs on are stand-ins: parameters that share memory with the true ones and gather their gradients elsewhere, copies of buffers
and inputs. Random generators, attributes of modules, autocast and the generators of Python and numpy are put back. Neither `p.grad`, nor
hooks on parameters, nor an optimizer, nor another process hears of it.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.capture import private
from gradwatch.capture.held import Call, tensors_of

KEPT = 2**26
"""Bytes of tensors in attributes of modules that are copied, so that they can be put back: 64 MB, as of deltas."""

DEPTH = 3
"""Containers within containers among the attributes of a module that are put back."""

_PLAIN = (Tensor, nn.Parameter)


class NotReplayable(Exception):
    """Why a forward pass cannot be run again."""


@dataclass(frozen=True, slots=True)
class Again:
    """A forward pass that can be run again now.

    Attributes:
        call: the first time.
        args, kwargs: copies of what it was given.
        inputs: the floating tensors among these.
        stand_ins: for parameters and buffers.
        drawn: gives the names of generators outside torch that have been drawn from since: how they stood then is not known.
    """

    call: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    stand_ins: StandIns
    drawn: Callable[[], list[str]]

    def run(self) -> Any:
        """Run it."""
        return self.call.model(*self.args, **self.kwargs)

    @contextlib.contextmanager
    def outside_autocast(self) -> Iterator[None]:
        """As it is where the backward runs."""
        with contextlib.ExitStack() as stack:
            for kind, _ in self.call.autocast:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield


@contextlib.contextmanager
def again(call: Call, clean: bool = False) -> Iterator[Again]:
    """While it is entered, a call can be run again as it was then.

    Args:
        call: it.
        clean: NaN and Inf in buffers become 0.

    Raises:
        NotReplayable: it cannot be, and why.
    """
    _refuse(call.model)
    args, kwargs, inputs = _copied(call)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        drawn = stack.enter_context(_generators(call))
        stand_ins = stack.enter_context(StandIns(call.model, clean))
        for kind, dtype in call.autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        stack.enter_context(torch.enable_grad())
        yield Again(call, args, kwargs, inputs, stand_ins, drawn)


def _refuse(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise NotReplayable("it is TorchScript, in which no line of Python runs")
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) not in (*_PLAIN, nn.Buffer) or tensor.is_meta:
            raise NotReplayable(f"it holds a {type(tensor).__name__}, which other processes may have to do with")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm):
                raise NotReplayable("a SyncBatchNorm in it waits for other processes")


def _copied(call: Call) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    """Arguments with copies of all tensors that the forward pass might change, and the floating ones of these."""
    copies: dict[int, Tensor] = {}

    def copied(thing: Any) -> Any:
        if type(thing) in _PLAIN:
            if id(thing) not in copies:
                copy = thing.detach().clone() if not isinstance(thing, nn.Parameter) else thing.detach()
                copies[id(thing)] = copy.requires_grad_(thing.requires_grad)
            return copies[id(thing)]
        if type(thing) in (tuple, list):
            return type(thing)(copied(item) for item in thing)
        if isinstance(thing, tuple) and hasattr(thing, "_fields"):
            return type(thing)(*(copied(item) for item in thing))
        if isinstance(thing, dict):
            new = dict.copy(thing)
            for key, item in thing.items():
                dict.__setitem__(new, key, copied(item))
            return new if type(thing) is dict else thing
        return thing

    args, kwargs = copied(call.args), copied(call.kwargs)
    return args, kwargs, list(tensors_of((args, kwargs)))


def named_tensors(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The floating tensors among the arguments of a model, each with its name: "x", "batch['image']", "states[0]"."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        bound = {f"args[{i}]": value for i, value in enumerate(args)} | dict(kwargs)
    for name, value in bound.items():
        yield from named(name, value, 6)


def named(name: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif depth and isinstance(value, Mapping):
        for key, item in value.items():
            yield from named(f"{name}[{key!r}]", item, depth - 1)
    elif depth and isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from named(f"{name}[{i}]", item, depth - 1)


@contextlib.contextmanager
def _generators(call: Call) -> Iterator[Any]:
    """Random generators as they were when the call began; afterwards as they are now.

    Yields:
        A function that gives the names of those outside torch that have been drawn from: how they stood then is not known.
    """
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    try:
        with torch.random.fork_rng(devices=list(call.generators)):
            torch.set_rng_state(call.generator)
            for device, state in call.generators.items():
                torch.cuda.set_rng_state(state, device)

            def drawn() -> list[str]:
                names = ["random"] if random.getstate() != python else []
                return names + (["numpy.random"] if str(np.random.get_state(legacy=False)) != str(numpy) else [])

            yield drawn
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class StandIns:
    """While it is entered, a model's parameters are aliases that share their memory, and its buffers are copies; what the forward pass
    changes in attributes of modules is put back.

    Args:
        model: it.
        clean: NaN and Inf in buffers become 0.

    Attributes:
        aliases: by the id of the parameter.
        buffers: copies of the buffers.
    """

    def __init__(self, model: nn.Module, clean: bool = False) -> None:
        self._clean = clean
        self._modules = [(name, module) for name, module in model.named_modules()]
        self.aliases: dict[int, Tensor] = {}
        self.buffers: list[Tensor] = []
        self._copies: dict[int, Tensor] = {}
        self._dictionaries: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._attributes: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[str, Any, Any]] = []
        self._tensors: list[tuple[str, Tensor, int, Tensor | None]] = []
        self._names: dict[int, str] = {}
        self._kept = 0

    def __enter__(self) -> StandIns:
        try:
            for name, module in self._modules:
                self._enter(name, module)
        except BaseException:
            self.__exit__()
            raise
        return self

    def names(self) -> dict[int, str]:
        """Names of the buffers, by the address of their copies."""
        return {
            buffer.untyped_storage().data_ptr(): self._names[id(buffer)]
            for buffer in self.buffers
            if buffer.layout is torch.strided
        }

    def _enter(self, name: str, module: nn.Module) -> None:
        attributes = vars(module)
        own: dict[str, Any] = {}
        for key, value in attributes.items():
            if key in _TORCHS or key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                continue
            own[key] = value
            self._keep(f"{name}.{key}" if name else key, value, DEPTH)
        self._attributes.append((name, attributes, own))
        parameters, buffers = private.own_parameters(module), private.own_buffers(module)
        self._dictionaries += [(parameters, dict(parameters)), (buffers, dict(buffers))]
        for key, parameter in list(parameters.items()):
            if parameter is not None:
                parameters[key] = self._alias(parameter)
        for key, buffer in list(buffers.items()):
            if buffer is not None:
                buffers[key] = self._copy(f"{name}.{key}" if name else key, buffer)

    def _alias(self, parameter: nn.Parameter) -> nn.Parameter:
        alias = self.aliases.get(id(parameter))
        if alias is None:
            alias = self.aliases[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        return alias  # type: ignore[return-value]

    def _copy(self, name: str, buffer: Tensor) -> Tensor:
        copy = self._copies.get(id(buffer))
        if copy is None:
            copy = buffer.detach().clone()
            if self._clean and copy.is_floating_point():
                copy = torch.nan_to_num(copy, 0.0, 0.0, 0.0)
            self._copies[id(buffer)] = copy
            self._names[id(copy)] = name
            self.buffers.append(copy)
        return copy

    def _keep(self, name: str, value: Any, depth: int) -> None:
        """Remember a container's items, and the values of a tensor."""
        if isinstance(value, Tensor):
            if type(value) is Tensor and not isinstance(value, nn.Parameter):
                size = value.numel() * value.element_size()
                copy = value.detach().clone() if self._kept + size <= KEPT else None
                self._kept += size if copy is not None else 0
                self._tensors.append((name, value, private.version_or_zero(value), copy))
        elif type(value) in (list, dict, set, deque) or isinstance(value, dict):
            if len(value) > 10_000:
                return
            self._containers.append((name, value, list(value.items()) if isinstance(value, dict) else list(value)))
            if depth:
                for item in list(value.values()) if isinstance(value, dict) else list(value):
                    self._keep(name, item, depth - 1)

    def changes(self) -> list[str]:
        """Names of what the forward pass has changed, those aside that a normalisation counts."""
        found = [name for name, attributes, own in self._attributes for name in _differ(name, attributes, own)]
        found += [name for name, value, items in self._containers if not _same(value, items)]
        found += [name for name, tensor, version, _ in self._tensors if private.version_or_zero(tensor) != version]
        for name, module in self._modules:
            for key, buffer in private.own_buffers(module).items():
                if buffer is not None and private.version_or_zero(buffer) and key not in _COUNTED:
                    found.append(f"{name}.{key}" if name else key)
        return list(dict.fromkeys(found))

    def __exit__(self, *error: Any) -> None:
        for dictionary, before in reversed(self._dictionaries):
            dictionary.clear()
            dictionary.update(before)
        for _, attributes, own in self._attributes:
            for key in [key for key in attributes if key not in own and key not in _TORCHS and not _is_hooks(key)]:
                del attributes[key]
            for key, value in own.items():
                if attributes.get(key, self) is not value:
                    attributes[key] = value
        for _, value, items in self._containers:
            if not _same(value, items):
                value.clear()
                value.update(items) if isinstance(value, (dict, set)) else value.extend(items)
        with torch.no_grad():
            for _, tensor, version, copy in self._tensors:
                if copy is not None and private.version_or_zero(tensor) != version:
                    tensor.detach().copy_(copy)


_TORCHS = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
_COUNTED = frozenset({"running_mean", "running_var", "num_batches_tracked"})
"""Buffers that a normalisation counts in training and does not read."""


def _is_hooks(key: str) -> bool:
    return key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))


def _differ(name: str, attributes: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    for key, value in attributes.items():
        if key not in _TORCHS and not _is_hooks(key) and own.get(key, own) is not value and not key.startswith("_flat_weight"):
            yield f"{name}.{key}" if name else key


def _same(container: Any, items: list[Any]) -> bool:
    now = list(container.items()) if isinstance(container, dict) else list(container)
    if len(now) != len(items):
        return False
    if isinstance(container, dict):
        return all(a[0] is b[0] and a[1] is b[1] for a, b in zip(now, items, strict=True))
    return all(a is b for a, b in zip(now, items, strict=True))
