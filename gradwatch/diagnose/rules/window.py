"""The last observations of the parameters that the last record reached."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch.baselines import WINDOW
from gradwatch.diagnose.arrays import DECADE
from gradwatch.diagnose.rules.layout import Layout
from gradwatch.history import History


@dataclass(frozen=True)
class Window:
    """The columns of a layout that the last record observed and that were observed often enough, N of them.

    Attributes:
        layout: these columns only.
        logs: `[WINDOW, N]`, decades, oldest first as far as the columns were observed together.
        level: `[N]`, mean of `logs`.
        late: `[N]`, mean of the last few of them.
        weights: `[N]`, norms of the parameters, as last observed.
        seen: observations of the column that has most.
    """

    layout: Layout
    logs: NDArray[np.float64]
    level: NDArray[np.float64]
    late: NDArray[np.float64]
    weights: NDArray[np.float32]
    seen: int


def window_of(history: History, layout: Layout, now: NDArray[np.float32], late: int) -> Window | None:
    """The window of the last record, None where no column was observed often enough.

    Args:
        history: a record or more.
        layout: the model's.
        now: `[N]`, the layout's columns of the last record's gradient norms.
        late: how many of the `WINDOW` observations `Window.late` is the mean of.
    """
    b = history.baselines
    known = (layout.take(b.seen) >= WINDOW) & np.isfinite(now)
    if not known.any():
        return None
    layout = layout.narrow(known)
    seen = int(layout.take(b.seen).max())
    rows = np.arange(seen, seen + WINDOW) % WINDOW
    logs = np.divide(layout.take(b.last)[rows], DECADE, dtype=np.float64)
    return Window(layout, logs, logs.sum(axis=0) / WINDOW, logs[-late:].sum(axis=0) / late, layout.take(b.weight_norm), seen)
