"""Leaving a step out: weights, moments and counters stay as they are.

Setting gradients to None is what leaves them: every optimizer of torch passes over a parameter without one. Multiplying gradients by
zero does not: 0 times NaN is NaN, and momentum and weight decay go on with zeros.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

COUNTER = 16
"""Elements of a tensor up to which it is taken for a counter rather than for a moment, which no step without a gradient changes."""


@dataclass(frozen=True, slots=True)
class _Before:
    """What goes back when the step has returned.

    Attributes:
        gradients: parameters and their gradients: the step had none, but the loop may look at them, as after any step.
        restore: puts counters back.
    """

    gradients: list[tuple[Tensor, Tensor]]
    restore: list[Callable[[], None]]


class LeftOut:
    """The steps that are being left out."""

    def __init__(self) -> None:
        self._before: weakref.WeakKeyDictionary[Optimizer, _Before] = weakref.WeakKeyDictionary()

    def begin(self, optimizer: Optimizer) -> None:
        """The step that this optimizer is about to make shall change nothing."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        # What torch counts, it counts for each parameter that has a gradient; others count once a step, here or there.
        places: list[dict[Any, Any]] = [*optimizer.param_groups, optimizer.state, vars(optimizer)]
        places += [state for p in params if isinstance(state := optimizer.state.get(p), dict)]
        gradients = [(p, p.grad) for p in params if p.grad is not None]
        self._before[optimizer] = _Before(gradients, [_states(optimizer), *map(_counters, places)])
        for p in params:
            p.grad = None

    def end(self, optimizer: Optimizer) -> None:
        """It has returned."""
        before = self._before.pop(optimizer, None)
        if before is None:
            return
        for restore in before.restore:
            restore()
        for p, gradient in before.gradients:
            p.grad = gradient


def _states(optimizer: Optimizer) -> Callable[[], None]:
    """Remembers which parameters have a state; what it returns takes out those that have got one."""
    known = set(optimizer.state)

    def restore() -> None:
        for p in [p for p in optimizer.state if p not in known]:
            del optimizer.state[p]

    return restore


def _counters(place: dict[Any, Any]) -> Callable[[], None]:
    """Remembers the numbers of a dictionary; what it returns puts them back, and takes out those that came."""
    numbers = {key: value for key, value in place.items() if _is_counted(key, value) and not isinstance(value, Tensor)}
    tensors = [
        (value, value.detach().clone()) for key, value in place.items() if _is_counted(key, value) and isinstance(value, Tensor)
    ]

    def restore() -> None:
        for key in [key for key, value in place.items() if key not in known and _is_counted(key, value)]:
            del place[key]
        place.update(numbers)
        with torch.no_grad():
            for tensor, copy in tensors:
                tensor.copy_(copy)

    known = set(place)
    return restore


def _is_counted(key: Any, value: Any) -> bool:
    if not isinstance(key, str) or key.startswith("_"):  # torch's own, by which schedulers see that it steps
        return False
    return isinstance(value, (bool, int, float)) or (isinstance(value, Tensor) and value.numel() <= COUNTER)
