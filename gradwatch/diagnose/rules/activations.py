"""Activations that pass next to nothing: units that never fire, and outputs that lie where their activation is flat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import comb
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from gradwatch.baselines import WINDOW
from gradwatch.diagnose.execution import Execution, execution_of
from gradwatch.diagnose.rules.loss import Progress, progress
from gradwatch.diagnose.rules.rule import looked_back, persistent, sampled
from gradwatch.facts import Meta
from gradwatch.history import History
from gradwatch.records import Finding, Severity

DEAD = 0.95
"""Share of dead units from which it is a fault. Healthy networks (MLPs of 4 to 512 units, CNNs; SGD and Adam from 1e-3 to 0.1) reach
0.61; one that Adam trains at 0.1, with a loss of 0.65 where 0.01 gives 0.1, reaches 0.89 (measured). Planted faults have 1.0."""

DEAD_FROM_START = 0.75
"""The same of units that have never fired since the first look, while as much of the output has been flat in every look. Healthy networks
have up to 0.55 by update 16 (plain MLPs of 10 to 12 layers; measured), units that were initialised dead 0.83 and more."""

BY_CHANCE = 0.005
"""Probability, of as many units each of which is dead with probability 1/2, below which that is none: channels whose inputs hardly vary
(squeeze and excitation) fire for all of them or for none, and of 8 such 6 are dead in every seventh network. 24 of 32, 14 of 16."""

FLAT_TOO = 0.9
"""Share of the output that lies in the flat part of a layer whose units are dead. A smooth rectifier (GELU) whose inputs are tiny is
silent and steep: then it is nearly 0."""

SILENT = 0.999
"""Share of a rectifier's output in its flat part from which the whole layer is dead, look after look: the sample has up to 1,024
elements. Healthy layers keep to 0.97 over eight looks; that of the network that Adam trains at 0.1 to 0.989 (measured)."""

LASTING = 8
"""Looks in a row that must show it, up to the last one; where one update in ten is looked at, three."""

NO_WAY_OUT = 5
"""The same where nothing at all passes: a layer that gets a gradient of exactly 0 can only be moved by what the optimizer still holds of
earlier ones."""

APART = 20
"""Updates that three looks have to span at least, to be as good as `LASTING` of them."""

BACK = 96
"""Records to look for the beginning in: more than the dense ones at the start, or after a suspicion."""

FROM_START = 0.7
"""Share of a two-sided activation's output in its flat parts, at the first look and ever since, from which it began saturated. With
PyTorch's default weights, He's and Xavier's healthy networks begin below 0.1, inputs of a standard deviation of 5 give 0.49, a gain of
5 gives 0.57; weights of deviation 1 in layers of 96 give 0.72 to 0.8, weights a hundred times too large 0.79 (a pooler of BERT) to 0.98
(measured)."""

JUMP = 0.5
"""Rise of that share within `AT_ONCE` records, to `FROM_START` or more, that no training makes once its first `WINDOW` records are
over; within them Adam at 0.1 makes 0.84 (measured)."""

AT_ONCE = 3

STUCK = 0.95
"""Share from which it explains why the loss does not improve, however it came to be. Where the loss has improved Adam at 0.1 holds
tanh layers at 0.97 in health; where it has hardly, tanh layers with targets out of their reach lie at 0.88 (measured)."""

TOTAL, NOTHING = 0.995, 0.01
"""Share and gain with which an activation passes nothing at all, whatever the loss does: whoever learns then lies behind it."""

PASSES = 1 / 3
"""Part of its steepest slope that an activation typically passes on, below which little gets through. With weights a hundred times too
large tanh has 0.07 to 0.18, sigmoid 0.1 to 0.19; healthy hidden activations 0.5 and more at the start (measured)."""

UNSEEN = 0.85
"""In place of `FROM_START` for a function, whose own gain is not measured: 0.88 (sigmoid) and 0.93 (tanh) with such weights."""

BYPASS = 10.0
"""Times the gain of its weights that the input of the layer before a gate gets back, from which most of it comes by another way: a gate
of a highway that begins closed has 100 and more, a layer in a chain 1 (measured)."""

STEEPEST: Mapping[str, float] = MappingProxyType(
    {"Tanh": 1.0, "Softsign": 1.0, "Hardtanh": 1.0, "Sigmoid": 0.25, "Hardsigmoid": 1 / 6}
)
"""Activations that are flat at both ends, by their class in torch, and their steepest slope."""

_GATES = frozenset({"Sigmoid", "Hardsigmoid"})
_SHRINKS = frozenset({"Hardshrink", "Softshrink", "Tanhshrink"})  # flat around 0, where a small signal is in health
_RECTIFIERS = frozenset({"ReLU", "ReLU6", "GELU", "SiLU", "Mish", "Hardswish", "ELU", "SELU", "CELU", "Softplus", "Threshold"})


@sampled
@persistent(WINDOW)
def dead_units(history: History) -> Iterator[Finding]:
    """Nearly all units of an activation have fired for no input over a window of looks, or all are silent in look after look.

    A layer is sick when its `dead_fraction` (units that fired in none of the last 32 looks, or since the first, at least 10) is at
    least `DEAD` and `FLAT_TOO` of its output is flat; or when it is at least `DEAD_FROM_START`, more than chance explains, and as much of
    its output has been flat in every look since the first; or when at least `SILENT` of a rectifier's output is flat in `LASTING` looks
    in a row (all of it, and nothing passes: `NO_WAY_OUT`), which needs no 32 of them. Names the activation, or the module that a
    function follows, the first to run first. Of one activation that stands in several places each is judged by itself: it is named with
    the module before it where it is sick.

    Ignored: the share of zeros, 50 to 90 % of which is what a healthy ReLU does; some dead units; layers that were not called; what has
    no parameter of the same optimizer behind it (a hinge, a penalty, an output), but for an output that is silent while the loss is
    high and no parameter at all gets a gradient. Of what is no activation that is known, only that is told: it gives nothing but zeros
    and gets, but passes on no gradient, look after look, and the loss does not improve.

    Example:
        >>> nn.init.constant_(model[0].bias, -10.0)  # before a ReLU
        >>> with GradWatch(model):
        ...     train(model, optimizer)
    """
    if history.recorded < WINDOW:
        return
    finding = _silent(history) or _dead(history)
    if finding is not None:
        yield finding


def _dead(history: History) -> Finding | None:
    flat = history.recent("saturated_fraction", 1)[0]
    # Comparisons with what was not observed are False.
    if not (flat >= DEAD_FROM_START).any():
        return None
    dead = history.recent("dead_fraction", 1)[0]
    silent = (flat >= SILENT) & (_kinds(history.meta).rectifier | (dead == dead))
    sick = (dead >= DEAD) & (flat >= FLAT_TOO)
    maybe = (dead >= DEAD_FROM_START) & (flat >= DEAD_FROM_START)
    if not (maybe.any() or silent.any()):
        return None
    looks = _Looks.of(history, np.flatnonzero(maybe | silent))
    ever = looks.run(DEAD_FROM_START)
    long_since = np.flatnonzero(maybe[looks.layers] & ever.whole & ever.lasts & ~sick[looks.layers])
    if long_since.size:
        feeders = _Feeders(history)
        sick[[i for i in looks.layers[long_since].tolist() if _is_no_chance(float(dead[i]), feeders.units(i))]] = True
    lasts = sick[looks.layers] | looks.run(SILENT).lasts
    at_once = looks.pass_nothing()
    if not (lasts | at_once).any():
        return None
    feeders, nothing = _Feeders(history), _nothing_arrives(history)
    hidden = np.array([feeders.is_hidden(int(i)) for i in looks.layers], bool)
    open_ = np.array([nothing or not feeders.is_last(int(i)) for i in looks.layers], bool)
    looks = looks.pick((lasts & (hidden | open_)) | (at_once & hidden))
    if not looks.layers.size:
        return None
    looks = looks.pick(_in_their_places(history, looks.layers)).sorted(execution_of(history.meta))
    if not looks.layers.size:
        return None
    layers = looks.layers
    share = np.where(silent[layers], 1.0, dead[layers])
    names, called = _named(history, layers)
    return Finding(
        "dead_units",
        Severity.WARNING,
        looks.run(np.where(sick[layers], np.where(flat[layers] >= FLAT_TOO, FLAT_TOO, DEAD_FROM_START), SILENT)).since(looks),
        layers=names,
        message=f"{float(share.min()):.0%} of the units of {called} fire for no input",
        evidence={"dead_fraction": float(share.min()), "saturated_fraction": float(flat[layers].min()), "layers": len(layers)},
    )


def _silent(history: History) -> Finding | None:
    """Modules of any kind without parameters that give nothing but zeros and let not the least gradient pass."""
    # A gate that weighs 0 for now gives zeros, too, while the rest learns.
    if (history.recent("activation_rms", 1)[0] != 0.0).all() or progress(history) is not Progress.STUCK:
        return None
    back = BACK if len(history.layers) < 1000 else APART + 1
    rms, gain = history.recent("activation_rms", back), history.recent("gain", back)
    looked = np.isfinite(rms).any(axis=1)
    steps = history.steps[-len(rms) :][looked]
    rms, gain = rms[looked], gain[looked]
    unknown = ~np.isfinite(history.recent("saturated_fraction", 1)[0]) & (history.recent("delta_norm", 1)[0] > 0.0)
    unknown[history.meta.layer_index[history.meta.layer_index >= 0]] = False
    sick = unknown & (rms[-LASTING:] == 0.0).all(axis=0) & (gain[-LASTING:] == 0.0).all(axis=0)
    inner = execution_of(history.meta).inner
    layers = np.flatnonzero(sick & inner) if len(rms) >= LASTING else np.empty(0, np.int64)
    if not layers.size:
        return None
    feeders = _Feeders(history)
    layers = layers[[feeders.is_hidden(int(i)) for i in layers]]
    if not layers.size:
        return None
    layers = layers[np.argsort(execution_of(history.meta).rank[layers], kind="stable")]
    alive = np.flatnonzero((rms[:, layers] != 0.0).any(axis=1))
    since = 0 if not alive.size and steps[0] < WINDOW else int(steps[min(int(alive[-1]) + 1 if alive.size else 0, len(steps) - 1)])
    names, called = _named(history, layers)
    return Finding(
        "dead_units",
        Severity.WARNING,
        since,
        layers=names,
        message=f"100% of the units of {called} fire for no input",
        evidence={"dead_fraction": 1.0, "layers": len(layers)},
    )


@sampled
@persistent(WINDOW)
def saturated_activation(history: History) -> Iterator[Finding]:
    """Nearly all outputs of a hidden two-sided activation lie in its flat parts, and little gradient passes, for `LASTING` looks.

    With `s` the `saturated_fraction` and `p` the `gain` over the activation's steepest slope: `s >= FROM_START` at the first look
    and ever since, or since a `JUMP`, and `p <= PASSES`; or `s >= STUCK`, `p <= PASSES` and a loss that does not improve; or
    `s >= TOTAL` and `p <= NOTHING`. Names the activation, or the module that a function follows, the first to run first.

    Ignored: rectifiers and softmaxes; the last activation of an optimizer's parameters, which may be an output meant to be 0 or 1;
    sigmoids beside another way for the gradient (`BYPASS`: gates, which are meant to be 0 or 1), and a jump of theirs; functions of
    which it is not known what they are; everything while the loss is low (below 1/20 of its first values).

    Example:
        >>> nn.init.normal_(model[0].weight, std=5.0)  # before a Tanh
        >>> with GradWatch(model):
        ...     train(model, optimizer)
    """
    if history.recorded < WINDOW:
        return
    flat = history.recent("saturated_fraction", 1)[0]
    some = flat >= FROM_START
    if not some.any():
        return
    rectifies = history.recent("dead_fraction", 1)[0] >= 0
    some &= _kinds(history.meta).two_sided & ~rectifies
    if not some.any():
        return
    looks = _Looks.of(history, np.flatnonzero(some))
    looks = looks.pick(looks.run(FROM_START).lasts)
    if not looks.layers.size:
        return
    state = progress(history)
    if state is Progress.LOW:
        return
    looks = looks.pick(_passes_little(history, looks, looks.run(FROM_START), state is Progress.STUCK))
    if not looks.layers.size:
        return
    feeders = _Feeders(history)
    looks = looks.pick(np.array([feeders.is_hidden(int(i)) and not feeders.is_gate(int(i)) for i in looks.layers], bool))
    looks = looks.pick(_in_their_places(history, looks.layers)).sorted(execution_of(history.meta))
    if not looks.layers.size:
        return
    share, gain = float(looks.usual(looks.share)[0]), float(looks.usual(looks.gain)[0])
    function = history.meta.layers[looks.layers[0]].activation is None
    names, called = _named(history, looks.layers)
    yield Finding(
        "saturated_activation",
        Severity.WARNING,
        looks.run(FROM_START).since(looks),
        layers=names,
        message=f"{share:.0%} of the outputs of {called} lie where it is flat"
        + ("" if function else f", and {gain:.2g} of the gradient passes"),
        evidence={
            "saturated_fraction": share,
            "gain": np.nan if function else gain,
            "layers": len(looks.layers),
            "input_std": _input_std(history),
        },
    )


@dataclass(frozen=True)
class _Kinds:
    """What the activations are, `[L]` each, as far as the facts tell: the module's own, or that of the function that follows it."""

    rectifier: NDArray[np.bool_]
    two_sided: NDArray[np.bool_]


def _kinds(meta: Meta) -> _Kinds:
    kept = meta.derived.get(_Kinds)
    if kept is None:
        flat = [fact.flat or _flat_of(fact.activation) for fact in meta.layers]
        kept = _Kinds(
            np.array(
                [kind == "one-sided" and fact.type not in _SHRINKS for kind, fact in zip(flat, meta.layers, strict=True)], bool
            ),
            np.array([kind == "two-sided" for kind in flat], bool),
        )
        meta.derived[_Kinds] = kept
    kinds: _Kinds = kept
    return kinds


def _flat_of(activation: str | None) -> str:
    return "one-sided" if activation in _RECTIFIERS else "two-sided" if activation in STEEPEST else ""


@dataclass(frozen=True)
class _Looks:
    """The last T looks at some layers, C of them, all of which the last record observed.

    Attributes:
        layers: `[C]`, columns.
        steps: `[T]`, numbers of the records, oldest first.
        share, gain: `[T, C]`, `saturated_fraction` and `gain`; NaN where not observed.
        first, since: `[C]`, the first share of all, and the record in which it was seen.
    """

    layers: NDArray[np.int64]
    steps: NDArray[np.int64]
    share: NDArray[np.float32]
    gain: NDArray[np.float32]
    first: NDArray[np.float32]
    since: NDArray[np.int32]

    @classmethod
    def of(cls, history: History, layers: NDArray[np.int64]) -> _Looks:
        # Where thousands are sick, the beginning is looked for no further back than the verdict asks for.
        back = BACK if len(layers) < 100 else max(APART + 1, looked_back(2 * len(layers)))
        share = history.recent("saturated_fraction", back)[:, layers]
        looked = np.isfinite(share).any(axis=1)
        gain = history.recent("gain", back)[looked][:, layers]
        first, since = history.baselines.first_flat[layers], history.baselines.first_look[layers]
        return cls(layers, history.steps[-len(share) :][looked], share[looked], gain, first, since)

    def pick(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> _Looks:
        """Some of the layers."""
        return _Looks(self.layers[keep], self.steps, self.share[:, keep], self.gain[:, keep], self.first[keep], self.since[keep])

    def sorted(self, execution: Execution) -> _Looks:
        """Those that run first first."""
        return self.pick(np.argsort(execution.rank[self.layers], kind="stable"))

    def run(self, least: NDArray[np.float64] | float) -> _Run:
        """The looks up to the last in which the share has been so large without a break."""
        seen = np.isfinite(self.share)
        rows = np.arange(len(self.steps))[:, None]
        well = np.where(seen & (self.share < least), rows, -1).max(axis=0)
        inside = seen & (rows > well)
        start = inside.argmax(axis=0)
        count = inside.sum(axis=0)
        span = np.where(count > 0, self.steps[-1] - self.steps[start], -1)
        whole = (count == seen.sum(axis=0)) & (self.first >= least)
        return _Run(start, (count >= LASTING) | ((count >= 3) & (span >= APART)), whole)

    def pass_nothing(self) -> NDArray[np.bool_]:
        """`[C]`: all of the output is flat and not the least gradient passes, in each of the last `NO_WAY_OUT` looks."""
        last = slice(-NO_WAY_OUT, None)
        flat, gain = self.share[last], self.gain[last]
        nothing: NDArray[np.bool_] = (flat == 1.0).all(axis=0) & (gain == 0.0).all(axis=0)
        return nothing & (len(flat) == NO_WAY_OUT)

    def usual(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """`[C]`: median of the last `LASTING` looks; NaN where none observed it."""
        last = values[-LASTING:].astype(np.float64)
        usual = np.full(len(self.layers), np.nan)
        some = np.isfinite(last).any(axis=0)
        usual[some] = np.nanmedian(last[:, some], axis=0)
        return usual

    def jumped(self, run: _Run) -> NDArray[np.bool_]:
        """`[C]`: it came to be so large at once, after the first records."""
        jumped = np.zeros(len(self.layers), bool)
        for i in np.flatnonzero(~run.whole & (run.start > 0)):
            before = np.flatnonzero(np.isfinite(self.share[: run.start[i], i]))[-2:]
            if before.size and self.steps[before[-1]] >= WINDOW:
                rise = float(self.share[run.start[i], i] - self.share[before[0], i])
                jumped[i] = rise >= JUMP and int(self.steps[run.start[i]] - self.steps[before[0]]) <= AT_ONCE
        return jumped


@dataclass(frozen=True)
class _Run:
    """Looks in a row, up to the last, of C layers: `[C]` each.

    Attributes:
        start: the first of them.
        lasts: they are enough.
        whole: no look went before.
    """

    start: NDArray[np.int64]
    lasts: NDArray[np.bool_]
    whole: NDArray[np.bool_]

    def since(self, looks: _Looks) -> int:
        """The step at which the first of them began; of one that was there at its first look, that of this look, or 0 in the beginning."""
        first = np.where(looks.since < WINDOW, 0, looks.since)  # of several models in turns, one is looked at first
        return int(np.where(self.whole, first, looks.steps[self.start]).min())


def _passes_little(history: History, looks: _Looks, run: _Run, stuck: bool) -> NDArray[np.bool_]:
    """`[C]`: of layers whose share has long been `FROM_START`, whether that is a fault."""
    facts = [history.meta.layers[i] for i in looks.layers]
    names = [fact.activation or fact.follower for fact in facts]
    # What a function passes is not in the gain of the module that it follows.
    function = np.array([fact.activation is None for fact in facts], bool)
    gate = np.array([not name or name in _GATES for name in names], bool)
    passed = looks.usual(looks.gain) / np.array([STEEPEST.get(name, 1.0) for name in names])
    share = looks.usual(looks.share)
    little = np.where(function, share >= UNSEEN, passed <= PASSES)
    held = stuck & looks.run(STUCK).lasts
    lone = ((share >= TOTAL) & (passed <= NOTHING)) | looks.jumped(run)
    sick: NDArray[np.bool_] = little & (run.whole | held | (lone & ~gate))
    return sick


def _is_no_chance(share: float, units: int) -> bool:
    """Whether so many of the units are dead less often than `BY_CHANCE` if each is with probability 1/2."""
    least = round(share * units)
    if units > 1000:
        return True
    return units > 0 and sum(comb(units, k) for k in range(least, units + 1)) <= BY_CHANCE * 2**units


class _Feeders:
    """The modules with trainable parameters before activations, and what lies behind them."""

    def __init__(self, history: History) -> None:
        meta = history.meta
        self._history, self._facts = history, meta.layers
        self._rank = execution_of(meta).rank
        ordered = [i for i, fact in enumerate(meta.layers) if fact.order is not None]
        self._ordered = np.array(sorted(ordered, key=lambda i: self._rank[i]), np.int64)
        self._delta, self._gain = history.recent("delta_norm", 1)[0], history.recent("gain", 1)[0]
        self._owners: dict[int, set[str | None]] = {}
        self._last: dict[str | None, int] = {}
        self._scale: dict[int, float] = {}
        for i, fact in enumerate(meta.parameters):
            layer = int(meta.layer_index[i])
            if layer < 0 or not fact.trainable:
                continue
            self._owners.setdefault(layer, set()).add(fact.owner)
            self._last[fact.owner] = max(self._last.get(fact.owner, -1), int(self._rank[layer]))
            if len(fact.shape) >= 2:
                scale = float(history.baselines.weight_norm[i]) / max(1, fact.shape[0]) ** 0.5
                self._scale[layer] = max(self._scale.get(layer, 0.0), scale)

    def of(self, layer: int) -> int:
        """The module whose output the activation takes; -1 where there is none."""
        if self._facts[layer].order is not None or not self._ordered.size:
            return layer if self._ordered.size else -1
        # The gradient below an activation is that above the module before it, to the last bit.
        below = float(self._delta[layer]) * float(self._gain[layer])
        same = self._ordered[np.abs(self._delta[self._ordered] - below) <= 1e-4 * below] if below > 0 else self._ordered[:0]
        if len(same) == 1:
            return int(same[0])
        before = int(np.searchsorted(self._rank[self._ordered], self._rank[layer]))
        return int(self._ordered[before - 1]) if before else -1

    def units(self, layer: int) -> int:
        """Rows of the largest matrix of the module before it; 0 where that is not known."""
        feeder = self.of(layer)
        index = self._history.meta.layer_index
        shapes = [self._history.meta.parameters[i].shape for i in np.flatnonzero(index == feeder)] if feeder >= 0 else []
        return max((shape[0] for shape in shapes if len(shape) >= 2), default=0)

    def is_hidden(self, layer: int) -> bool:
        """Parameters of the same optimizer are used behind it: what ends a generator is an output, though a critic follows."""
        feeder = self.of(layer)
        last = max((self._last[owner] for owner in self._owners.get(feeder, ())), default=-1)
        return feeder < 0 or last > int(self._rank[feeder])

    def is_last(self, layer: int) -> bool:
        """By the graph, nothing with parameters stands between the module before it and the loss; what is called later may come before."""
        feeder = self.of(layer)
        return feeder >= 0 and self._facts[feeder].role == "head"

    def is_gate(self, layer: int) -> bool:
        """A sigmoid, or what may be one, before which the gradient has another way."""
        name = self._facts[layer].activation or self._facts[layer].follower
        if name and name not in _GATES:
            return False
        feeder = self.of(layer)
        if feeder < 0 or feeder not in self._scale:
            return True
        gain = float(self._gain[feeder])
        if np.isnan(gain):  # it reads the data
            return sum(fact.role == "input" for fact in self._facts) > 1
        return not gain <= BYPASS * self._scale[feeder]


def _nothing_arrives(history: History) -> bool:
    """No parameter has had a gradient other than zero for `WINDOW` records, though the loss is above zero and not low."""
    totals, losses = history.recent("total_norm", WINDOW), history.recent("loss", WINDOW)
    high = len(totals) == WINDOW and bool((losses > 0).all()) and progress(history) is not Progress.LOW
    return high and bool((totals == 0.0).all())


def _input_std(history: History) -> float:
    std = history.recent("input_std", LASTING)
    return float(np.nanmedian(std)) if np.isfinite(std).any() else float("nan")


def _in_their_places(history: History, layers: NDArray[np.int64]) -> NDArray[np.bool_]:
    """`[C]`: of sick activations, all but those of which places are sick: the numbers of these say more than those of all places."""
    sick = {history.layers[i] for i in layers}
    return np.array([not sick.intersection(history.meta.layers[i].places) for i in layers], bool)


def _named(history: History, layers: NDArray[np.int64]) -> tuple[tuple[str, ...], str]:
    """The names of sick activations, and what they are called in a message: the first by name, the others by number.

    Of one that stands in several places its own name comes first, then that of the module before it where it is sick, for which the
    statistics of the place are told.
    """
    shared = {feeder: fact.name for fact in history.meta.layers if fact.places for feeder in fact.places}
    names: dict[str, None] = {}
    called: dict[str, None] = {}
    for i in layers.tolist():
        fact = history.meta.layers[i]
        activation = shared.get(fact.name)
        if activation is not None:
            names |= {activation: None, fact.name: None}
            called[f"{activation} behind {fact.name or '(model)'}"] = None
        else:
            names[fact.name] = called[fact.name or "(model)"] = None
    first, *more = called
    return tuple(names), f"{first} and {len(more)} more" if more else first
