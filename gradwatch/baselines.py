"""Running baselines that the history keeps and rules share: what is usual for each parameter and for the loss.

A median over a full window costs 0.65 ms at 100 columns and 280 ms at 20,000; everything here is O(columns) an update. Records come
in any mixture (a GAN alternates, an expert idles), so every column counts the records in which it was itself observed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradwatch.records import GradState, SkipReason

WINDOW = 10
"""Observations of a column that a persistent finding rests on: what the earliest verdict, at update 10, can have seen."""

KEPT = 64
"""Scalars (losses, residuals) that are kept: as many as the dense start has records."""

ZERO = np.float32(-104.0)
"""Logarithm that stands for a gradient of exactly zero, below that of the smallest float32 (1.4e-45)."""

_REACHED, _STALE, _STEPPED = np.uint8(GradState.REACHED), np.uint8(GradState.STALE), np.uint8(GradState.STEPPED)
_ASIDE = np.uint8(GradState.ASIDE)
_CHANGED, _SAME = np.uint8(GradState.CHANGED), np.uint8(GradState.SAME)
_SAME_AND_REACHED = np.uint8(GradState.SAME | GradState.REACHED)
_BOTH = int(GradState.REACHED | GradState.STEPPED)

_COLUMNS: dict[str, tuple[str, float]] = {
    # name: (dtype, value of a column of which nothing is known)
    "seen": ("i4", 0),
    "reached": ("i4", 0),
    "last_reached": ("i4", -1),
    "stepped": ("i4", 0),
    "missed": ("i4", 0),
    "frozen": ("i4", -1),
    "gap": ("i4", 0),
    "orphan": ("i4", 0),
    "stale": ("u2", 0),
    "same": ("i4", 0),
    "early": ("f4", np.nan),
    "update_ratio": ("f4", np.nan),
    "weight_norm": ("f4", np.nan),
    "lr": ("f4", np.nan),
}
_WINDOWS: dict[str, tuple[str, float]] = {"first": ("f4", np.nan), "last": ("f4", np.nan)}


class Baselines:
    """Running statistics over the records of a run.

    Args:
        parameters: number P of parameter columns.
        layers: number L of layer columns.

    Attributes:
        records: records taken.
        seen: `[P]`, records in which the column had a finite gradient norm (skipped ones aside).
        reached: `[P]`, records whose backward reached it.
        last_reached: `[P]`, the last step that did; -1: none.
        stepped: `[P]`, records in which its owner stepped.
        missed: `[P]`, its owner's steps since a backward last reached it, without those while it required no gradient.
        frozen: `[P]`, the last step that its owner made while it required no gradient; -1: none.
        gap: `[P]`, the longest such run of steps that a backward ended.
        orphan: `[P]`, records in a row that reached it while an optimizer stepped, but not one of its own.
        stale: `[P]`, a bit for each of its owner's last 16 steps, the newest lowest: the gradient still held an old one.
        same: `[P]`, records in a row, of those in which it was looked at whole after its owner's step, that found not a bit changed.
        first: `[WINDOW, P]`, natural logarithms of its first observed norms, `ZERO` for exactly zero; NaN where there are fewer.
        last: `[WINDOW, P]`, the same of its last observed norms, in no order.
        early: `[P]`, median of `first`; NaN until that is full.
        update_ratio, weight_norm, lr: `[P]`, each as last observed; NaN before.
        first_flat: float32 `[L]`, `saturated_fraction` when it was first observed; NaN before.
        first_look: int32 `[L]`, the step of that; -1 before.
        residuals: float64 of at most `KEPT` records, oldest first: logarithm of the norm over what its columns' last observations
            let expect; 0 is usual. NaN where too little was known.
        losses: float64 of at most `KEPT` records, oldest first; NaN where not observed, or in a skipped record.
        first_losses: float64, the first `WINDOW` finite ones.
        first_totals: float64, the first `WINDOW` total norms that were neither zero nor non-finite.
        first_scale: loss scale of the first record that had one other than 1; NaN before.
        skips: records in a row that a GradScaler skipped.
        idle: records in a row that were skipped because nothing stepped.
        finite_losses: finite losses seen.
    """

    seen: NDArray[np.int32]
    reached: NDArray[np.int32]
    last_reached: NDArray[np.int32]
    stepped: NDArray[np.int32]
    missed: NDArray[np.int32]
    frozen: NDArray[np.int32]
    gap: NDArray[np.int32]
    orphan: NDArray[np.int32]
    stale: NDArray[np.uint16]
    same: NDArray[np.int32]
    early: NDArray[np.float32]
    update_ratio: NDArray[np.float32]
    weight_norm: NDArray[np.float32]
    lr: NDArray[np.float32]
    first: NDArray[np.float32]
    last: NDArray[np.float32]

    def __init__(self, parameters: int, layers: int = 0) -> None:
        self.parameters = parameters
        self.first_flat: NDArray[np.float32] = np.full(layers, np.nan, np.float32)
        self.first_look: NDArray[np.int32] = np.full(layers, -1, np.int32)
        for name, (dtype, value) in _COLUMNS.items():
            setattr(self, name, np.full(parameters, value, dtype))
        for name, (dtype, value) in _WINDOWS.items():
            setattr(self, name, np.full((WINDOW, parameters), value, dtype))
        self.records = 0
        self.residuals: NDArray[np.float64] = np.empty(0)
        self.losses: NDArray[np.float64] = np.empty(0)
        self.first_losses: NDArray[np.float64] = np.empty(0)
        self.first_totals: NDArray[np.float64] = np.empty(0)
        self.first_scale = float("nan")
        self.skips = 0
        self.idle = 0
        self.finite_losses = 0

    def update(self, row: NDArray[Any], step: int, full: bool = True, trainable: NDArray[np.bool_] | None = None) -> None:
        """Take a record.

        Args:
            row: a 0-d structured array with the fields of `records.STATISTICS`.
            step: its number.
            full: it has full statistics: else nothing is in the fields of those.
            trainable: `[P]`, requires a gradient now; None: all do.
        """
        self.records += 1
        reason = int(row["skip_reason"])
        skipped = bool(row["skipped"])
        self._count(row["grad_state"], skipped, step, trainable)
        if full:
            self._count_same(row["grad_state"])
        total = float(row["total_norm"])
        if len(self.first_totals) < WINDOW and not skipped and 0.0 < total < np.inf:
            self.first_totals = np.append(self.first_totals, total)
        self._take_scalars(float(row["loss"]), float(row["loss_scale"]), skipped, reason)
        if not skipped and not (row["grad_state"] & _ASIDE).any():
            self._take_norms(row["grad_norm"])
        for name in ("update_ratio", "weight_norm", "lr") if full else ("lr",):
            new = row[name]
            np.copyto(getattr(self, name), new, where=new == new)  # where it is a number
        if full:
            flat = row["saturated_fraction"]
            new = (self.first_flat != self.first_flat) & (flat == flat)
            if new.any():
                self.first_flat[new], self.first_look[new] = flat[new], step

    def _count(self, state: NDArray[np.uint8], skipped: bool, step: int, trainable: NDArray[np.bool_] | None) -> None:
        if state.size and int(np.bitwise_and.reduce(state)) & _BOTH == _BOTH and not int(np.bitwise_or.reduce(state)) & _STALE:
            self._count_usual(step)
            return
        reached = (state & _REACHED) != 0
        stepped = (state & _STEPPED) != 0
        some_stepped = bool(stepped.any())
        self.reached += reached
        np.copyto(self.last_reached, np.int32(step), where=reached)
        self.stepped += stepped
        if some_stepped:
            ends = reached & (self.missed > 0)
            if ends.any():
                np.maximum(self.gap, self.missed, out=self.gap, where=ends)
            if trainable is None:
                self.missed += stepped
            else:
                self.missed += stepped & trainable
                np.copyto(self.frozen, np.int32(step), where=stepped & ~trainable)
            np.copyto(self.stale, (self.stale << np.uint16(1)) | ((state & _STALE) != 0), where=stepped)
            if not skipped:
                self.orphan += reached & ~stepped
                np.copyto(self.orphan, np.int32(0), where=stepped)
        np.copyto(self.missed, np.int32(0), where=reached)

    def thaw(self, columns: NDArray[np.bool_], records: int) -> None:
        """Some have required a gradient for so many records already, in which they were counted as frozen.

        Args:
            columns: `[P]`, which.
            records: how many.
        """
        late = columns & (self.frozen >= 0)
        if late.any():
            back = np.minimum(np.int32(records), self.frozen + 1)
            self.missed[late] += back[late]
            self.frozen[late] -= back[late]

    def _count_same(self, state: NDArray[np.uint8]) -> None:
        if self.same.any():
            np.copyto(self.same, np.int32(0), where=(state & _CHANGED) != 0)
        if state.size and int(state.max()) >= _SAME:
            # What no backward reached is not stepped by most optimizers.
            self.same += (state & _SAME_AND_REACHED) == _SAME_AND_REACHED

    def _count_usual(self, step: int) -> None:
        """All reached and stepped by their owners, nothing stale: what `_count` comes to in most records."""
        self.reached += 1
        self.last_reached.fill(step)
        self.stepped += 1
        if self.missed.any():
            np.maximum(self.gap, self.missed, out=self.gap)
            self.missed.fill(0)
        self.stale <<= 1
        self.orphan.fill(0)

    def _take_scalars(self, loss: float, scale: float, skipped: bool, reason: int) -> None:
        self.skips = self.skips + 1 if reason == SkipReason.SCALER else 0
        self.idle = self.idle + 1 if reason == SkipReason.NO_STEP else 0
        if scale != 1.0 and math.isnan(self.first_scale) and math.isfinite(scale):
            self.first_scale = scale
        if math.isfinite(loss):
            self.finite_losses += 1
            if not skipped and len(self.first_losses) < WINDOW:
                self.first_losses = np.append(self.first_losses, loss)
        self.losses = _with(self.losses, math.nan if skipped else loss)

    def _take_norms(self, norms: NDArray[np.float32]) -> None:
        fine = np.isfinite(norms)
        whole = bool(fine.all())
        self.residuals = _with(self.residuals, self._residual(norms, fine, whole))
        # In most runs all columns are observed in all records: then a row of the window is written whole.
        columns = slice(None) if whole else np.flatnonzero(fine)
        seen = self.seen[columns]
        if not seen.size:
            return
        with np.errstate(divide="ignore"):
            logs = np.maximum(np.log(norms[columns]), ZERO)
        least, most = int(seen.min()), int(seen.max())
        if whole and least == most:
            self.last[most % WINDOW] = logs
            if most < WINDOW:
                self.first[most] = logs
        else:
            at = np.arange(self.parameters)[columns]
            self.last[seen % WINDOW, at] = logs
            if least < WINDOW:
                new = seen < WINDOW
                self.first[seen[new], at[new]] = logs[new]
        if least < WINDOW:
            full = np.arange(self.parameters)[columns][seen == WINDOW - 1]
            if full.size:
                self.early[full] = np.median(self.first[:, full], axis=0)
        self.seen[columns] += 1

    def _residual(self, norms: NDArray[np.float32], fine: NDArray[np.bool_], whole: bool) -> float:
        known = self.seen >= WINDOW
        if not whole:
            known &= fine
        if not known.any():
            return float("nan")
        if known.all():
            usual, now = np.add.reduce(self.last, axis=0), norms
        else:
            usual, now = np.add.reduce(self.last[:, known], axis=0), norms[known]
        usual = usual * np.float32(2.0 / WINDOW)
        # Taken out before the exponential, the largest keeps it within float32, which is several times as fast.
        top = usual.max()
        expected = float(top) + float(np.log(np.exp(usual - top).sum(dtype=np.float64)))
        actual = float(np.square(now, dtype=np.float64).sum())
        return 0.5 * (np.log(actual) - expected) if actual > 0.0 else float("nan")

    def level(self) -> NDArray[np.float32]:
        """`[P]`: mean logarithm of the last `WINDOW` observed norms; NaN for a column observed less often."""
        level: NDArray[np.float32] = self.last.mean(axis=0)
        return level

    def relayout(
        self,
        parameters: int,
        source: NDArray[np.int64],
        target: NDArray[np.int64],
        layers: tuple[NDArray[np.int64], NDArray[np.int64], int] | None = None,
    ) -> None:
        """The columns changed: the new column `target[i]` continues the old column `source[i]`, the others start afresh.

        Args:
            parameters: columns now.
            source: old columns that go on.
            target: where they go on.
            layers: the same two of the layers, and how many there are now; None: they are the same as before.
        """
        if layers is not None:
            l_source, l_target, count = layers
            flat, look = np.full(count, np.nan, np.float32), np.full(count, -1, np.int32)
            flat[l_target], look[l_target] = self.first_flat[l_source], self.first_look[l_source]
            self.first_flat, self.first_look = flat, look
        fresh = Baselines(parameters)
        for name in (*_COLUMNS, *_WINDOWS):
            array = getattr(fresh, name)
            array[..., target] = getattr(self, name)[..., source]
            setattr(self, name, array)
        self.parameters = parameters

    def copy(self) -> Baselines:
        """Another one that goes on by itself."""
        other = Baselines(self.parameters)
        other.load_state_dict(vars(self))
        return other

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain Python and numpy objects."""
        return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        for name in vars(self):
            value = state[name]
            setattr(self, name, value.copy() if isinstance(value, np.ndarray) else value)


def _with(kept: NDArray[np.float64], value: float) -> NDArray[np.float64]:
    """The last `KEPT` values, this one among them (`np.append` takes four times as long)."""
    kept = kept[-KEPT + 1 :]
    more = np.empty(len(kept) + 1)
    more[:-1] = kept
    more[-1] = value
    return more
