"""What a forward pass may change in place, remembered and put back."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gradwatch.capture import private


class Kept(Protocol):
    """Something that is put back: `name` is what to call it, "" where that is no state of the model."""

    name: str

    def is_changed(self) -> bool: ...
    def put_back(self) -> None: ...


@dataclass(slots=True)
class Dictionary:
    name: str
    dictionary: dict[Any, Any]
    items: dict[Any, Any]
    skip: Collection[str] = ()
    each: bool = False
    """Its entries are what is named: attributes of a module."""

    def is_changed(self) -> bool:
        changed = [
            key
            for key, value in dict.items(self.dictionary)
            if key not in self.skip and self.items.get(key, self) is not value and not str(key).startswith("_flat_weight")
        ]
        if self.each and changed:
            self.name = join(self.name, str(changed[0]))
        return bool(changed) or (not self.each and len(self.dictionary) != len(self.items))

    def put_back(self) -> None:
        now = [key for key in dict.keys(self.dictionary) if key not in self.skip]
        # By the class that keeps the order: `Counter.update` adds, and `defaultdict` has a say of its own.
        base = OrderedDict if isinstance(self.dictionary, OrderedDict) else dict
        kept = [key for key in now if key in self.items]
        again = (
            [] if kept == list(self.items) else kept
        )  # some were taken out: their places are those of before only if all come anew
        for key in [*again, *(key for key in now if key not in self.items)]:
            base.__delitem__(self.dictionary, key)
        for key, value in self.items.items():
            if dict.get(self.dictionary, key, self) is not value:
                base.__setitem__(self.dictionary, key, value)


@dataclass(slots=True)
class Container:
    name: str
    container: Any
    items: list[Any]

    def is_changed(self) -> bool:
        now = list(self.container)
        return len(now) != len(self.items) or any(a is not b for a, b in zip(now, self.items, strict=True))

    def put_back(self) -> None:
        if self.is_changed():
            self.container.clear()
            (self.container.update if isinstance(self.container, set) else self.container.extend)(self.items)


@dataclass(slots=True)
class Memory:
    name: str
    tensor: Tensor
    version: int
    copy: Tensor | None

    def is_changed(self) -> bool:
        return private.version_or_zero(self.tensor) != self.version

    def put_back(self) -> None:
        if self.copy is not None and self.is_changed():
            with torch.no_grad():
                self.tensor.detach().copy_(self.copy)


@dataclass(slots=True)
class Array:
    name: str
    array: Any
    copy: Any

    def is_changed(self) -> bool:
        return bool(self.array.tobytes() != self.copy.tobytes())

    def put_back(self) -> None:
        if self.array.flags.writeable and self.is_changed():
            self.array[...] = self.copy


@dataclass(slots=True)
class Generator:
    name: str
    generator: Any
    state: Any
    put: Callable[[Any, Any], None]

    def is_changed(self) -> bool:
        return False  # it is put back, and how it stood when the pass began is not known

    def put_back(self) -> None:
        self.put(self.generator, self.state)


def _set_numpy(generator: Any, state: Any) -> None:
    generator.bit_generator.state = state


GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    torch.Generator: (lambda g: g.get_state(), lambda g, state: g.set_state(state)),
    random.Random: (lambda g: g.getstate(), lambda g, state: g.setstate(state)),
    np.random.Generator: (lambda g: copy.deepcopy(g.bit_generator.state), _set_numpy),
    np.random.RandomState: (lambda g: g.get_state(), lambda g, state: g.set_state(state)),
}


def join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
