"""The thread whose training a watch follows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PAUSE = 1.0
"""Seconds without a sign from its thread after which a watch may move to another that trains its model."""

_PATIENCE, _SELDOM = 8, 32
"""Backward passes of a strange thread that are looked at, and then one in how many: a look walks a graph, 1.8 us a node."""


class Home:
    """One thread at a time: the first whose backward reaches the model; another one if that falls silent or ends.

    Until then it is at home where it was made, but takes nothing for granted.
    """

    def __init__(self) -> None:
        self._ident = threading.get_ident()
        self._settled = False
        self._last = time.perf_counter()
        self._strangers: dict[int, int] = {}

    def here(self) -> bool:
        """Whether this is its thread."""
        return threading.get_ident() == self._ident

    def takes(self, reaches: Callable[[], bool]) -> bool:
        """Whether a backward in this thread is the watch's.

        Args:
            reaches: whether its graph holds a watched parameter; called where that is not known.
        """
        ident = threading.get_ident()
        if self._settled and ident == self._ident:
            self._last = time.perf_counter()
            return True
        if self._settled and time.perf_counter() - self._last < PAUSE:
            return False
        seen = self._strangers[ident] = self._strangers.get(ident, 0) + 1
        if self._settled and seen > _PATIENCE and seen % _SELDOM:
            return False
        if not reaches():
            return False
        self._ident, self._settled, self._last = ident, True, time.perf_counter()
        self._strangers.clear()
        return True
