"""The per-parameter statistics gathered by layer, as every report shows them: modules with parameters of their own, in scope."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gradwatch.history import History
from gradwatch.records import Alert, GradState, Severity, SkipReason

RECENT: Final = 64
"""Records whose median stands for "now": as many as are always sampled densely, so that every layer was observed among them."""

_ABOUT_THE_INPUT: Final = frozenset({"unnormalized_input", "non_finite_input"})
"""Rules that name the root because the fault came in through it, not because everything below is sick."""


@dataclass(frozen=True, slots=True)
class Layers:
    """The modules of one history that hold parameters themselves, and which parameters those are.

    Attributes:
        names: qualified names, in registration order, length N.
        index: `[N]`, their columns among `history.layers`.
        columns: parameter columns of each, length N.
        left_out: such modules that `Sampling.include` and `exclude` leave out.
    """

    names: tuple[str, ...]
    index: tuple[int, ...]
    columns: tuple[NDArray[np.int64], ...]
    left_out: int

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, history: History) -> Layers:
        """Those of this history."""
        facts = history.meta.layers
        held: dict[int, list[int]] = {}
        for column, layer in enumerate(history.meta.layer_index.tolist()):
            if layer >= 0:
                held.setdefault(layer, []).append(column)
        shown = [i for i in sorted(held) if facts[i].in_scope]
        columns = tuple(np.array(held[i], np.int64) for i in shown)
        return cls(tuple(facts[i].name for i in shown), tuple(shown), columns, len(held) - len(shown))

    def only(self, chosen: Sequence[int]) -> Layers:
        """A selection of them, in the order given."""
        return Layers(
            tuple(self.names[i] for i in chosen),
            tuple(self.index[i] for i in chosen),
            tuple(self.columns[i] for i in chosen),
            self.left_out,
        )

    def grad_norms(self, history: History, last: int | None = RECENT) -> NDArray[np.float64]:
        """2-norm of each layer's own gradients in the last records: float64 `[T, N]`, Inf where one held a NaN or an Inf, NaN where
        nothing was observed."""
        norms = history.recent("grad_norm", last).astype(float)
        norms[history.recent("grad_nonfinite", last) > 0] = np.inf
        return self._norm(norms)

    def weight_norms(self, history: History) -> NDArray[np.float64]:
        """2-norm of each layer's own parameters when last observed, float64 `[N]`."""
        return latest(self._norm(history.recent("weight_norm", RECENT).astype(float)))

    def update_ratios(self, history: History) -> NDArray[np.float64]:
        """RMS of the step over RMS of the weight for each layer's largest parameter, when last observed, float64 `[N]`."""
        numel = history.meta.numel
        largest = [int(columns[np.argmax(numel[columns])]) for columns in self.columns]
        return latest(history.recent("update_ratio", RECENT).astype(float)[:, largest])

    def poisoned(self, history: History) -> NDArray[np.bool_]:
        """Whether each layer's last gradient held a NaN or an Inf, bool `[N]`; what a GradScaler skipped was its scale's overflow."""
        norms = self.grad_norms(history)
        norms[history.recent("skip_reason", RECENT) == SkipReason.SCALER] = np.nan
        return np.isinf(latest(norms))

    def _norm(self, norms: NDArray[np.float64]) -> NDArray[np.float64]:
        result = np.full((len(norms), len(self)), np.nan)
        for i, columns in enumerate(self.columns):
            own = norms[:, columns]
            seen = ~np.isnan(own)
            total = np.sqrt(np.sum(np.square(own, where=seen, out=np.zeros_like(own)), axis=1))
            result[:, i] = np.where(seen.any(axis=1), total, np.nan)
        return result

    def states(self, history: History, alerts: Sequence[Alert]) -> list[str]:
        """One for each: the worst rule that holds it sick ("+1": and another), else "frozen", "no gradient", "NaN/Inf" or "ok";
        "not seen" while there is no record.

        "NaN/Inf" is a consequence: the last gradient was not finite, and the alert names the layer where that began.
        """
        sick: list[list[Alert]] = [[] for _ in self.names]
        at = {name: i for i, name in enumerate(self.names)}
        owner = {history.parameters[c]: i for i, columns in enumerate(self.columns) for c in columns.tolist()}
        for alert in sorted(alerts, key=lambda alert: (-alert.severity, alert.step)):
            if alert.severity < Severity.WARNING or alert.state != "open":
                continue
            for i in self._places(alert, at, owner):
                sick[i].append(alert)
        trainable = history.meta.trainable
        reached = np.bitwise_or.reduce(history.recent("grad_state", None), axis=0, initial=0) & int(GradState.REACHED) > 0
        poisoned = self.poisoned(history)
        states = []
        for i, columns in enumerate(self.columns):
            if sick[i]:
                rules = list(dict.fromkeys(alert.rule for alert in sick[i]))
                states.append(rules[0] if len(rules) == 1 else f"{rules[0]} +{len(rules) - 1}")
            elif not trainable[columns].any():
                states.append("frozen")
            elif not len(history):
                states.append("not seen")
            elif not reached[columns].any():
                states.append("no gradient")
            else:
                states.append("NaN/Inf" if poisoned[i] else "ok")
        return states

    def _places(self, alert: Alert, at: dict[str, int], owner: dict[str, int]) -> set[int]:
        if alert.parameters:
            return {owner[name] for name in alert.parameters if name in owner}
        places = {at[name] for name in alert.layers if name in at}
        for name in alert.layers:
            if name and name not in at:
                places |= {i for i, below in enumerate(self.names) if below.startswith(f"{name}.")}
            elif not name and alert.rule not in _ABOUT_THE_INPUT:
                places |= set(range(len(self.names)))
        return places


def latest(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The last value of each column that was observed: `[T, N]` to `[N]`, NaN where none was."""
    if len(values) == 0:
        return np.full(values.shape[1], np.nan)
    seen = ~np.isnan(values)
    row = len(values) - 1 - np.argmax(seen[::-1], axis=0)
    return np.asarray(values[row, np.arange(values.shape[1])])


def median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median of each column over what was observed: `[T, N]` to `[N]`, NaN where nothing was."""
    if len(values) == 0:
        return np.full(values.shape[1], np.nan)
    ordered = np.sort(values, axis=0)  # NaN last
    count = (~np.isnan(values)).sum(axis=0)
    across = np.arange(values.shape[1])
    low, high = ordered[np.maximum(count - 1, 0) // 2, across], ordered[count // 2, across]
    return np.asarray((low + high) / 2)


@dataclass(frozen=True, slots=True)
class Spread:
    """How far the gradient norms of the layers lie apart, by their medians over the last records.

    Attributes:
        ratio: largest over smallest, of those that are finite and above zero; 1 for a single layer.
        layers: number of those.
        zero: layers whose median is exactly zero.
        non_finite: layers whose median or last gradient is not finite: how they stood before is no picture of the run.
    """

    ratio: float
    layers: int
    zero: int
    non_finite: int


def spread(history: History) -> Spread | None:
    """The spread over the layers of a history, or None where no gradient was observed."""
    layers = Layers.of(history)
    norms = median(layers.grad_norms(history))
    norms[layers.poisoned(history)] = np.inf
    norms = norms[~np.isnan(norms)]
    if not len(norms):
        return None
    usable = norms[np.isfinite(norms) & (norms > 0)]
    ratio = float(usable.max() / usable.min()) if len(usable) else float("nan")
    return Spread(ratio, len(usable), int((norms == 0).sum()), int(np.isinf(norms).sum()))
