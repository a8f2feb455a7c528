"""The units of an activation: which part of the batch is looked at, and which of them have fired over a window of looks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MAX_UNITS = 4096
"""Units of one layer that are followed, the first ones."""

DEAD_FROM, DEAD_WINDOW = 10, 32
"""A unit is dead that fired in none of the last 32 looks, or since the first where there were fewer, at least 10: 10 are what the
earliest verdict can have seen, and a unit that fires for one input in a hundred (32 are looked at each time) is then silent by chance
once in 25 cases, after 32 looks once in 30,000."""


class Units:
    """The units of an activation in one place of a network."""

    __slots__ = ("_fired", "_looks")

    def __init__(self) -> None:
        self._looks = 0
        self._fired: NDArray[np.int64] = np.zeros(0, np.int64)

    def see(self, peaks: NDArray[np.float32]) -> None:
        """One more look.

        Args:
            peaks: `[U]`, by how much each unit fired; 0 and less where it did not.
        """
        if len(self._fired) != len(peaks):
            self._fired, self._looks = np.zeros(len(peaks), np.int64), 0
        self._looks += 1
        self._fired[~(peaks <= 0)] = self._looks  # what is not a number is not dead

    def state_dict(self) -> dict[str, Any]:
        """Looks, and the last of them in which each unit fired."""
        return {"looks": self._looks, "fired": self._fired.copy()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Units:
        """Those that go on from `state_dict`."""
        units = cls()
        units._looks, units._fired = int(state["looks"]), np.asarray(state["fired"], np.int64).copy()
        return units

    def dead(self) -> NDArray[np.bool_] | None:
        """`[U]`: whether each is dead; None while there were too few looks."""
        if self._looks < DEAD_FROM:
            return None
        dead: NDArray[np.bool_] = self._looks - self._fired >= min(self._looks, DEAD_WINDOW)
        return dead


def units_of(y: Tensor, axis: int, turn: int) -> Tensor:
    """`[N, U]`: what each unit put out for a bounded part of the batch, another part at each turn.

    Args:
        y: an activation's output, detached, real, of at least two dimensions.
        axis: of its units: 1, else the last.
        turn: number of the look.
    """
    if axis == 1 and y.dim() > 2:
        y = _some(y, 0, 8, turn)[:, :MAX_UNITS]
        y = _some(y.flatten(2), 2, 64, turn).transpose(1, 2)
        return y.reshape(-1, y.shape[2])
    if y.dim() > 2:
        y = y.reshape(-1, y.shape[-1])
    y = _some(y, 0, 32, turn)
    return y[:, :MAX_UNITS] if y.shape[1] > MAX_UNITS else y


def _some(y: Tensor, dim: int, wanted: int, turn: int) -> Tensor:
    """About `wanted` places of a dimension, evenly spread; others at each turn."""
    size = y.shape[dim]
    if size <= wanted:
        return y
    step = -(-size // wanted)
    index = [slice(None)] * dim + [slice(turn % step, None, step)]
    return y[tuple(index)]
