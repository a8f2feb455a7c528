"""A forward pass run once more, and nothing of it left behind.

What it runs on are stand-ins: parameters that share memory with the true ones and gather their gradients elsewhere, copies of buffers
and inputs. Random generators, attributes of modules, autocast and the generators of Python and numpy are put back. Neither `p.grad`, nor
hooks on parameters, nor an optimizer, nor another process hears of it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import random
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.capture import private
from gradwatch.capture.call import Call, tensors_of
from gradwatch.investigate.kept import GENERATORS, Array, Container, Dictionary, Generator, Kept, Memory, join

KEPT = 2**26
"""Bytes of tensors in attributes of modules that are copied, so that they can be put back: 64 MB, as of deltas."""

DEPTH = 4
"""Containers and objects within one another, from the attributes of a module on, that are put back."""

MANY = 100_000
"""Things that are looked through: what holds more is put back only from the outside."""

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
        if private.saved_tensors_are_hooked():  # theirs would be called for what is not theirs
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))
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


def _differ(one: Any, other: Any) -> bool:
    """Two states of numpy's global generator."""
    return any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def _copied(call: Call) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    """Arguments that nothing of the user's is reached by any more: containers and objects are deep copies, tensors without their graph.

    Raises:
        NotReplayable: something cannot be copied, as an iterator that would be used up.
    """
    memo: dict[int, Any] = {}
    for thing in (*_within(call.args), *_within(call.kwargs)):
        if isinstance(thing, nn.Module):
            memo[id(thing)] = thing
        elif type(thing) in _PLAIN:
            copy_ = thing.detach() if isinstance(thing, nn.Parameter) else thing.detach().clone()
            memo[id(thing)] = copy_.requires_grad_(thing.requires_grad)
        elif isinstance(thing, torch.Generator):
            memo[id(thing)] = thing.clone_state() if hasattr(thing, "clone_state") else _cloned(thing)
        elif isinstance(thing, Iterator):
            raise NotReplayable(f"it is given an iterator ({type(thing).__name__}), which would be used up")
    try:
        args, kwargs = copy.deepcopy((call.args, call.kwargs), memo)
    except Exception as error:
        raise NotReplayable(f"what it is given cannot be copied ({type(error).__name__})") from error
    return args, kwargs, list(tensors_of((args, kwargs)))


def _cloned(generator: torch.Generator) -> torch.Generator:
    clone = torch.Generator(generator.device)
    clone.set_state(generator.get_state())
    return clone


def _within(thing: Any, depth: int = 6, seen: set[int] | None = None) -> Iterator[Any]:
    """Everything in nested containers and objects, each once."""
    seen = set() if seen is None else seen
    if id(thing) in seen or len(seen) > MANY or isinstance(thing, (str, bytes, int, float, type, type(None))):
        return
    seen.add(id(thing))
    yield thing
    if not depth or isinstance(thing, (Tensor, np.ndarray, nn.Module, torch.Generator)):
        return
    if isinstance(thing, Mapping):
        inside: list[Any] = list(thing.values())
    elif isinstance(thing, (list, tuple, set, frozenset, deque)):
        inside = list(thing)
    else:
        inside = list(getattr(thing, "__dict__", {}).values()) if not callable(thing) else []
    for item in inside:
        yield from _within(item, depth - 1, seen)


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
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(call.generators)):
            torch.set_rng_state(call.generator)
            for device, state in call.generators.items():
                torch.cuda.set_rng_state(state, device)

            def drawn() -> list[str]:
                names = ["random"] if random.getstate() != python else []
                return names + (["numpy.random"] if _differ(np.random.get_state(), numpy) else [])

            yield drawn
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class StandIns:
    """While it is entered, a model's parameters are aliases that share their memory, and its buffers are copies; what the forward pass
    changes in attributes of modules, in what these hold, and in what their hooks hold is put back.

    Args:
        model: it.
        clean: NaN and Inf in buffers become 0.

    Attributes:
        aliases: by the id of the parameter.
        buffers: copies of the buffers.
    """

    def __init__(self, model: nn.Module, clean: bool = False) -> None:
        self._clean = clean
        self._modules = list(model.named_modules())
        self.aliases: dict[int, Tensor] = {}
        self.buffers: list[Tensor] = []
        self._copies: dict[int, Tensor] = {}
        self._names: dict[int, str] = {}
        self._seen: set[int] = {id(module) for _, module in self._modules}
        self._kept: list[Kept] = []
        self._bytes = 0

    def __enter__(self) -> StandIns:
        try:
            for name, module in self._modules:  # grows by those that are found in plain containers
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

    def changes(self) -> list[str]:
        """Names of what the forward pass has changed, those aside that a normalisation counts."""
        found = [kept.name for kept in self._kept if (kept.name or isinstance(kept, Dictionary)) and kept.is_changed()]
        for name, module in self._modules:
            for key, buffer in private.own_buffers(module).items():
                if buffer is not None and private.version_or_zero(buffer) and key not in _COUNTED:
                    found.append(join(name, key))
        return [name for name in dict.fromkeys(found) if name]

    def __exit__(self, *error: Any) -> None:
        failed: Exception | None = None
        for kept in reversed(self._kept):
            try:
                kept.put_back()
            except Exception as one:  # the others are put back all the same
                failed = failed or one
        if failed is not None:
            raise failed

    # -- a module ------------------------------------------------------------------------------------------------------------------

    def _enter(self, name: str, module: nn.Module) -> None:
        attributes = vars(module)
        self._keep_dictionary(name, attributes, skip=_TORCHS, each=True)
        for key, value in list(attributes.items()):
            if key not in _TORCHS:
                self._keep(join(name, key), value, DEPTH)
            elif key in _HOOKS and isinstance(value, Mapping):
                for hook in list(value.values()):
                    self._keep_function(hook)
        self._keep_function(getattr(type(module), "forward", None))
        parameters, buffers = private.own_parameters(module), private.own_buffers(module)
        self._keep_dictionary("", parameters)
        self._keep_dictionary("", buffers)
        for key, parameter in list(parameters.items()):
            if parameter is not None:
                parameters[key] = self._alias(parameter)
        for key, buffer in list(buffers.items()):
            if buffer is not None:
                buffers[key] = self._copy(join(name, key), buffer)
        if callable(getattr(module, "log", None)) and hasattr(
            module, "training_step"
        ):  # Lightning would count what is logged twice
            attributes["log"] = attributes["log_dict"] = _nothing

    def _alias(self, parameter: nn.Parameter) -> nn.Parameter:
        alias = self.aliases.get(id(parameter))
        if alias is None:
            alias = self.aliases[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        return alias  # type: ignore[return-value]

    def _copy(self, name: str, buffer: Tensor) -> Tensor:
        found = self._copies.get(id(buffer))
        if found is None:
            found = buffer.detach().clone()
            if self._clean and found.is_floating_point():
                found = torch.nan_to_num(found, 0.0, 0.0, 0.0)
            self._copies[id(buffer)] = found
            self._names[id(found)] = name
            self.buffers.append(found)
        return found

    # -- what is put back ----------------------------------------------------------------------------------------------------------

    def _keep(self, name: str, value: Any, depth: int) -> None:
        """Remember what a value holds, if the forward pass may change that in place."""
        if id(value) in self._seen or value is None or isinstance(value, (str, bytes, int, float, type, torch.dtype, torch.device)):
            return
        self._seen.add(id(value))
        if len(self._seen) > MANY:
            return
        if isinstance(value, nn.Module):  # in a plain list: it is no part of the model, and runs with it
            self._modules += [(name, module) for module in value.modules() if id(module) not in self._seen or module is value]
            self._seen.update(map(id, value.modules()))
        elif isinstance(value, Tensor):
            self._keep_tensor(name, value)
        elif isinstance(value, np.ndarray):
            self._bytes += value.nbytes
            if self._bytes <= KEPT:
                self._kept.append(Array(name, value, value.copy()))
        elif isinstance(value, dict):
            self._keep_dictionary(name, value)
            self._keep_all(name, list(dict.values(value)), depth)
        elif isinstance(value, (list, set, deque)):
            self._kept.append(Container(name, value, list(value)))
            self._keep_all(name, list(value), depth)
        elif isinstance(value, tuple):
            self._keep_all(name, list(value), depth)
        elif type(value) in GENERATORS:
            get, put = GENERATORS[type(value)]
            self._kept.append(Generator(name, value, get(value), put))
        elif isinstance(value, (MethodType, FunctionType, functools.partial)):
            self._keep_function(value)
        elif depth and isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, ModuleType):
            self._keep_dictionary(name, vars(value))
            self._keep_all(name, list(vars(value).values()), depth)

    def _keep_all(self, name: str, items: list[Any], depth: int) -> None:
        for item in items[:MANY] if depth else ():
            self._keep(name, item, depth - 1)

    def _keep_dictionary(self, name: str, dictionary: dict[Any, Any], skip: Collection[str] = (), each: bool = False) -> None:
        items = {key: value for key, value in dict.items(dictionary) if key not in skip}  # a subclass may say something else
        self._kept.append(Dictionary(name, dictionary, items, skip, each))

    def _keep_tensor(self, name: str, tensor: Tensor) -> None:
        if type(tensor) is not Tensor or tensor.is_meta:
            return
        self._bytes += tensor.numel() * tensor.element_size()
        copy_ = tensor.detach().clone() if self._bytes <= KEPT else None
        self._kept.append(Memory(name, tensor, private.version_or_zero(tensor), copy_))

    def _keep_function(self, function: Any) -> None:
        """What a function of the user's writes to: what it is bound to, its closure, and containers that are global."""
        if isinstance(function, functools.partial):
            self._keep("", [*function.args, *function.keywords.values()], DEPTH)
            return self._keep_function(function.func)
        if isinstance(function, MethodType):
            self._keep("", function.__self__, DEPTH)
            return self._keep_function(function.__func__)
        if not isinstance(function, FunctionType) or (function.__module__ or "").partition(".")[0] == "torch":
            return None
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # nothing has been put into it yet
                self._keep("", cell.cell_contents, DEPTH)
        for name in function.__code__.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, (dict, list, set, deque, np.ndarray)):
                self._keep("", value, DEPTH)
        return None


_HOOKS = frozenset({"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"})
_TORCHS = frozenset(
    {
        *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook"),
        *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks"),
        *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", *_HOOKS),
    }
)
"""Names in the `__dict__` of a module that are torch's."""

_COUNTED = frozenset({"running_mean", "running_var", "num_batches_tracked"})
"""Buffers that a normalisation counts in training and does not read."""


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of what would be counted twice."""
