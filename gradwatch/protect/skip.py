"""Leaving a step out: weights, moments and counters stay as they are.

Setting gradients to None is what leaves them: every optimizer of torch passes over a parameter without one. Multiplying gradients by
zero does not: 0 times NaN is NaN, and momentum and weight decay go on with zeros.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch.optim import Optimizer


class LeftOut:
    """The steps that are being left out."""

    def __init__(self) -> None:
        self._scalars: weakref.WeakKeyDictionary[Optimizer, list[tuple[dict[Any, Any], dict[Any, Any]]]] = (
            weakref.WeakKeyDictionary()
        )

    def begin(self, optimizer: Optimizer) -> None:
        """The step that this optimizer is about to make shall change nothing."""
        # What torch counts, it counts for each parameter that has a gradient; others count once a step.
        places: list[dict[Any, Any]] = [*optimizer.param_groups, optimizer.state]
        self._scalars[optimizer] = [(place, _numbers(place)) for place in places]
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None

    def end(self, optimizer: Optimizer) -> None:
        """It has returned."""
        for place, numbers in self._scalars.pop(optimizer, ()):
            place.update(numbers)


def _numbers(place: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in place.items() if isinstance(key, str) and isinstance(value, (bool, int, float))}
