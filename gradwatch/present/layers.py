"""The statistics gathered by layer, as every report shows them: modules with parameters of their own, in scope, and what stands between."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gradwatch.history import History, LayerFact
from gradwatch.records import Alert, GradState, Severity, SkipReason

RECENT: Final = 64
"""Records whose median stands for "now": as many as are always sampled densely, so that every layer was observed among them."""

_ABOUT_THE_INPUT: Final = frozenset({"unnormalized_input", "non_finite_input"})
"""Rules that name the root because the fault came in through it, not because everything below is sick."""

_MUCH: Final = 0.5
"""A dead or saturated share from which a module is shown before others: most of it. Not a verdict, those come from rules."""

_TWO_SIDED: Final = frozenset({"Sigmoid", "Tanh", "Hardsigmoid", "Hardtanh", "Softsign"})
"""Torch's activations that are stuck where they are flat, for a history whose facts do not say it."""

_TELLING: Final = 10
"""Looks after which the capture counts dead units: what has none by then is no rectifier. Before, a function is not told from one."""


@dataclass(frozen=True, slots=True)
class Layers:
    """The modules of one history that hold parameters themselves, and which parameters those are; others if they are asked for.

    Attributes:
        names: qualified names, in registration order, length N.
        index: `[N]`, their columns among `history.layers`.
        columns: parameter columns of each, length N; empty for a module without parameters of its own.
        left_out: such modules that `Sampling.include` and `exclude` leave out.
    """

    names: tuple[str, ...]
    index: tuple[int, ...]
    columns: tuple[NDArray[np.int64], ...]
    left_out: int

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, history: History, besides: Iterable[int] = ()) -> Layers:
        """Those of this history, and besides them some modules without parameters, by their columns among `history.layers`."""
        facts = history.meta.layers
        held: dict[int, list[int]] = {layer: [] for layer in besides}
        for column, layer in enumerate(history.meta.layer_index.tolist()):
            if layer >= 0:
                held.setdefault(layer, []).append(column)
        shown = [i for i in sorted(held) if facts[i].in_scope]
        columns = tuple(np.array(held[i], np.int64) for i in shown)
        left_out = sum(bool(held[i]) for i in held) - sum(bool(held[i]) for i in shown)
        return cls(tuple(facts[i].name for i in shown), tuple(shown), columns, left_out)

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
        ratios = history.recent("update_ratio", RECENT).astype(float)
        largest = np.full((len(ratios), len(self)), np.nan)
        for i, columns in enumerate(self.columns):
            if len(columns):
                largest[:, i] = ratios[:, columns[np.argmax(numel[columns])]]
        return latest(largest)

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
        "not seen" while there is no record. A module without parameters has a rule or "": nothing else is known of it.

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
            elif not len(columns):
                states.append("")
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


@dataclass(frozen=True, slots=True)
class Outputs:
    """What modules put out and what becomes of the gradient on its way through them: float64 `[L]` each, columns `history.layers`.

    NaN where nothing was observed, Inf where a NaN or an Inf was.

    Attributes:
        rms: root mean square of the output.
        saturated: share of it in the flat part of its activation, 0 to 1.
        dead: share of units that never fired.
        delta: norm of the gradient with respect to the output.
        gain: norm of the gradient below over that above.
        calls: forward calls in an update.
        often_flat: bool; much of its activation's output is flat in health, as of a rectifier or a softmax, or which activation it is is
            not known.
    """

    rms: NDArray[np.float64]
    saturated: NDArray[np.float64]
    dead: NDArray[np.float64]
    delta: NDArray[np.float64]
    gain: NDArray[np.float64]
    calls: NDArray[np.float64]
    often_flat: NDArray[np.bool_]

    @classmethod
    def last(cls, history: History) -> Outputs:
        """When each module was last looked at: a statistic that is missing there does not come from an earlier look."""
        every = _looks(history, slice(-RECENT, None))
        looked = np.where(~np.isnan(every).all(axis=0), 0.0, np.nan)
        row = latest(np.where(np.isnan(looked), np.nan, np.arange(len(looked))[:, None]))
        at = np.where(np.isnan(row), 0, row).astype(int)
        now = every[:, at, np.arange(len(at))] if len(looked) else np.full((len(every), len(at)), np.nan)
        return cls._of(history, every, now)

    @classmethod
    def usual(cls, history: History, records: slice) -> Outputs:
        """Medians over some of the kept records."""
        every = _looks(history, records)
        return cls._of(history, every, np.stack([median(values) for values in every]))

    @classmethod
    def _of(cls, history: History, every: NDArray[np.float64], chosen: NDArray[np.float64]) -> Outputs:
        rms, saturated, dead, delta, gain = chosen
        fires = ~np.isnan(every[2]).all(axis=0)  # units that can be dead are those of rectifiers
        unknown = (~np.isnan(every[1])).sum(axis=0) < _TELLING
        often = fires | np.array([_often_flat(fact, new) for fact, new in zip(history.meta.layers, unknown, strict=True)], bool)
        calls = latest(history.recent("calls", RECENT).astype(float))
        return cls(rms, saturated, dead, delta, gain, calls, often)

    def much(self) -> NDArray[np.bool_]:
        """`[L]`: most of it is dead or saturated, or it was not finite. What a rectifier has in its flat part does not count."""
        flat = (self.saturated >= _MUCH) & ~self.often_flat
        chosen: NDArray[np.bool_] = flat | (self.dead >= _MUCH) | np.isinf(self.rms)
        return chosen


def _often_flat(fact: LayerFact, unknown: bool) -> bool:
    if fact.flat:
        return fact.flat != "two-sided"
    return fact.type not in _TWO_SIDED if fact.kind == "activation" else unknown


def _looks(history: History, records: slice) -> NDArray[np.float64]:
    """`[5, T, L]`: rms, saturated, dead, delta and gain."""
    names = ("activation_rms", "saturated_fraction", "dead_fraction", "delta_norm", "gain")
    every = np.stack([history.stat(name)[records].astype(float) for name in names])
    bad = [history.stat(name)[records] > 0 for name in ("activation_nonfinite", "delta_nonfinite")]
    every[0][bad[0]] = np.inf
    every[3][bad[1]] = every[4][bad[1]] = np.inf
    return every


def between(history: History, outputs: Outputs, alerts: Sequence[Alert] = ()) -> tuple[list[int], list[bool]]:
    """The modules without parameters that have something to show, by their columns, and of each whether it should be seen.

    Those are activations, whatever else has a flat part or was named by an open alert. To be seen are those named, and those of which
    much is dead or saturated or that were not finite.
    """
    holding = set(history.meta.layer_index.tolist())
    named = {name for alert in alerts if alert.severity >= Severity.WARNING and alert.state == "open" for name in alert.layers}
    above = {name.rpartition(".")[0] for name in history.layers if name}
    much = outputs.much()
    shown, wanted = [], []
    for i, fact in enumerate(history.meta.layers):
        if i in holding or not fact.in_scope:
            continue
        called = fact.name in named and fact.name not in above
        flat = not (np.isnan(outputs.saturated[i]) and np.isnan(outputs.dead[i]))
        if called or flat or (fact.kind == "activation" and not np.isnan(outputs.rms[i])):
            shown.append(i)
            wanted.append(called or bool(much[i]))
    return shown, wanted


def behind(history: History, outputs: Outputs) -> dict[int, int]:
    """The activation that runs behind a layer, by their columns, as far as the order of registration tells: the next one in the same
    module, unless it runs in several places."""
    holding = set(history.meta.layer_index.tolist())
    last: dict[str, int] = {}
    found: dict[int, int] = {}
    for i, fact in enumerate(history.meta.layers):
        parent = fact.name.rpartition(".")[0]
        if i in holding:
            last[parent] = i
        elif (
            fact.kind == "activation" and (layer := last.pop(parent, None)) is not None and outputs.calls[i] <= outputs.calls[layer]
        ):
            found[layer] = i
    return found


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
