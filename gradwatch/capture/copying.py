"""A watched model saved, pickled or deep-copied is the model as if it had never been watched.

Hooks live in dictionaries of the module, and so in its pickle and its copies. While a watch is attached, what a module says of itself
(`__reduce_ex__`) leaves ours out, and the bytes are those of an unwatched model: any protocol, users' hooks kept, no further safe global.

`copyreg.pickle(cls, reducer)` would be less, but a reducer in its table is not told the protocol: with `__reduce_ex__(2)` the bytes of
protocols 0 and 1 differ (measured), and a class that a module takes on later (parametrizations, FSDP2) is not in the table. So
`nn.Module` gets a `__reduce_ex__`, and what comes before it is wrapped: a class's own `__reduce_ex__`, an entry in `copyreg`'s table.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import operator
import os
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from copy import deepcopy
from types import FrameType, FunctionType, MethodType
from typing import Any, NamedTuple, TypeVar

from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from gradwatch.capture.private import HOOK_DICTIONARIES

T = TypeVar("T")


class Ours:
    """Base of the objects whose bound methods are our hooks.

    The second line: where a hook is copied or pickled all the same (`deepcopy(vars(module))`), the copy has None in each of its slots,
    refers to nothing, and its hooks must return at once. A subclass names its slots in a tuple.
    """

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (type(self),)


def enter(owner: object, classes: Iterable[type]) -> None:
    """Leave our hooks out of modules of these classes until `leave(owner)`; called again, of these instead of those before."""
    with _lock:
        _entered[id(owner)] = frozenset(classes)
        _settle()


def leave(owner: object) -> None:
    """Take back what `enter(owner, ...)` did; with the last one everything is as it was, but for what others changed since."""
    with _lock:
        _entered.pop(id(owner), None)
        _settle()


# -- what is left out --------------------------------------------------------------------------------------------------------------


def _is_ours(hook: object) -> bool:
    # By type: `isinstance` asks a user's proxy for its `__class__`, and a dead one raises.
    return type(hook) is MethodType and issubclass(type(hook.__self__), Ours)


def _ours(hooks: Any) -> set[Any]:
    """The keys of our hooks in a dictionary of hooks."""
    # Of a copy: another thread may put hooks in and out meanwhile.
    return {key for key, hook in hooks.copy().items() if _is_ours(hook)} if type(hooks) in _PLAIN else set()


def _without(hooks: Any, keys: set[Any]) -> Any:
    """A dictionary of hooks without these keys: itself if it has none of them, else a copy.

    As long as that copy is in use, it is *the* copy: a `RemovableHandle` refers to the dictionary of its module, and so must its pickle.
    """
    if type(hooks) not in _PLAIN or keys.isdisjoint(hooks):
        return hooks
    rest = hooks.copy()
    for key in keys:
        rest.pop(key, None)
    if type(rest) is dict:  # no handle refers to it: it has no weak references
        return rest
    last = _copies.get(id(hooks))
    if last is not None and list(map(_identities, last.items())) == list(map(_identities, rest.items())):
        return last
    _copies[id(hooks)] = rest
    return rest


def _identities(pair: tuple[Any, Any]) -> tuple[int, int]:
    return id(pair[0]), id(pair[1])


_PLAIN = (dict, OrderedDict)
"""Dictionaries whose copy runs no code of the user's; others are left alone."""

_copies: weakref.WeakValueDictionary[int, OrderedDict[Any, Any]] = weakref.WeakValueDictionary()
"""By the id of the original. A pickler's or `deepcopy`'s memo keeps them alive as long as it runs."""


def _replaced(state: dict[Any, Any]) -> dict[str, Any]:
    """Those dictionaries of hooks in a module's `__dict__` that hold ours, without them."""
    new: dict[str, Any] = {}
    for name, companions in HOOK_DICTIONARIES.items():
        keys = _ours(state.get(name))
        if keys:
            new |= {each: _without(state[each], keys) for each in (name, *companions) if each in state}
    return new


def _of_module(reduced: Any, depth: int = 3) -> Any:
    """What a module's `__reduce_ex__` gave, without our hooks in a state (in whatever tuple) or in an argument; else untouched."""
    if type(reduced) in _PLAIN:
        new = _replaced(reduced)
        if not new:
            return reduced
        state = reduced.copy()
        state.update(new)
        return state
    if type(reduced) is tuple and depth:
        parts = tuple(_of_module(part, depth - 1) for part in reduced)
        return reduced if all(map(operator.is_, parts, reduced)) else parts
    return reduced


def _of_handle(reduced: Any) -> Any:
    """What a `RemovableHandle`'s `__reduce_ex__` gave, with the dictionaries that `_of_module` gives."""
    match reduced:
        case (make, args, (hooks, number, *more), *rest):
            keys = _ours(hooks)
            extras = [tuple(_without(extra, keys) for extra in part) if type(part) is tuple else part for part in more]
            return (make, args, (_without(hooks, keys), number, *extras), *rest) if keys else reduced
    return reduced


def _shallow(frame: FrameType) -> bool:
    """Whether `copy.copy` asks: its copy shares the dictionaries of hooks with the original, and so it shall."""
    return frame.f_code is getattr(copy.copy, "__code__", None)


def _blank(cls: type[T]) -> T:
    """An object of one of our classes with None in each slot."""
    new = cls.__new__(cls)
    for base in cls.__mro__:
        for slot in vars(base).get("__slots__", ()):
            if slot not in ("__dict__", "__weakref__"):
                setattr(new, slot, None)
    return new


# -- where it is left out ----------------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A function that stands between a module and its pickle or copy: a class's attribute, or its entry in `copyreg`'s table."""

    owner: type
    name: str

    def function(self) -> Any:
        """The one that is there now, or None."""
        return copyreg.dispatch_table.get(self.owner) if self.name == _TABLE else vars(self.owner).get(self.name)

    def put(self, function: Any) -> None:
        """Let it be this one; None: none."""
        if self.name == _TABLE:
            copyreg.dispatch_table[self.owner] = function  # never None: only an entry that is there is wrapped
        elif function is None:
            type.__delattr__(self.owner, self.name)
        else:
            type.__setattr__(self.owner, self.name, function)  # a metaclass's own may refuse, or do more


class _Wrapped:
    """A place that we have taken."""

    def __init__(self, original: Any, wrapper: Any) -> None:
        self.original, self.wrapper = original, wrapper


_REDUCE, _DEEPCOPY, _TABLE = "__reduce_ex__", "__deepcopy__", "dispatch_table"

_lock = threading.RLock()
_entered: dict[int, frozenset[type]] = {}
_taken: dict[_Place, _Wrapped] = {}


def _places(cls: type) -> list[_Place]:
    """Where modules of this class can be seen on their way out."""
    places = [_Place(Module, _REDUCE), _Place(RemovableHandle, _REDUCE)]
    for name in (_REDUCE, _DEEPCOPY):
        # The first that defines it is the one that is called. Those of C are `object`'s, behind `Module`.
        owner = next((base for base in cls.__mro__ if base is Module or type(vars(base).get(name)) is FunctionType), Module)
        if owner is not Module:
            places.append(_Place(owner, name))
    if cls in copyreg.dispatch_table:
        places.append(_Place(cls, _TABLE))
    return places


def _settle() -> None:
    """Take what is needed and is not taken, and give back the rest: so nothing is lost where Ctrl-C breaks it off halfway."""
    needed = {place for classes in _entered.values() for cls in classes for place in _places(cls)}
    for place in [place for place in _taken if place not in needed]:
        _give_back(place)
    for place in needed - _taken.keys():
        _take(place)


def _take(place: _Place) -> None:
    original = place.function()
    wrap: dict[str, Callable[..., Any]] = {_REDUCE: _reduce_ex, _DEEPCOPY: _deep_copy, _TABLE: _reducer}
    _taken[place] = _Wrapped(original, wrap[place.name](place.owner, original))
    try:
        place.put(_taken[place].wrapper)
    except (TypeError, AttributeError):
        pass  # a class that cannot be changed: the second line is left


def _give_back(place: _Place) -> None:
    wrapped = _taken[place]
    # Somebody may have wrapped or replaced it since: then it stays in their chain, and finds nothing to leave out.
    if place.function() is wrapped.wrapper:
        place.put(wrapped.original)
    del _taken[place]


def _reduce_ex(owner: Any, original: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Any]:
    without_ours = _of_handle if owner is RemovableHandle else _of_module

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced = super(owner, self).__reduce_ex__(protocol) if original is None else original(self, protocol)
        return reduced if _shallow(sys._getframe(1)) else without_ours(reduced)

    return __reduce_ex__ if original is None else functools.wraps(original)(__reduce_ex__)


def _reducer(_owner: type, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def reduce(module: Any) -> Any:
        reduced = original(module)
        return reduced if _shallow(sys._getframe(1)) else _of_module(reduced)

    return reduce


def _deep_copy(_owner: type, original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    @functools.wraps(original)
    def __deepcopy__(self: Any, memo: Any) -> Any:
        new = _replaced(vars(self)) if isinstance(self, Module) and isinstance(memo, dict) else {}
        # It copies `vars(self)` by itself. It is to find the dictionaries of hooks copied already, first empty: a hook may lead back here.
        copies: dict[str, dict[Any, Any]] = {}
        for name, rest in new.items():
            hooks = vars(self)[name]
            if id(hooks) not in memo:
                memo[id(hooks)] = memo[id(rest)] = copies[name] = type(rest)()
                memo.setdefault(id(memo), []).append(rest)  # as `deepcopy` keeps alive what it has copied
        result = original(self, memo)
        found = getattr(result, "__dict__", {})
        for name, copied in copies.items():
            if found.get(name) is copied:
                copied.update((deepcopy(key, memo), deepcopy(hook, memo)) for key, hook in new[name].items())
        return result

    return __deepcopy__


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
