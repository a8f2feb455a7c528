"""Gradients that explode: on their way to the input, or in time (`growing`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from gradwatch.baselines import WINDOW, ZERO
from gradwatch.diagnose.arrays import DECADE, median, median_of_rows, members
from gradwatch.diagnose.gains import circumstances, gains_between
from gradwatch.diagnose.naming import named
from gradwatch.diagnose.rules.deltas import Deltas, Modules, deltas_of
from gradwatch.diagnose.rules.growing import grows_in_time
from gradwatch.diagnose.rules.layout import Layout, layout_of
from gradwatch.diagnose.rules.loss import Progress, progress
from gradwatch.diagnose.rules.rule import is_turn, looked_back, patient, persistent
from gradwatch.history import History
from gradwatch.records import Finding, Severity

GROWTH = 3.5
"""Decades of growth towards the input that need no explanation. Healthy networks of the zoo stay below 2.6 (a WGAN's critic)."""

GROWTH_NORMALISED = 4.5
"""The same in a network with normalisations. Healthy ResNets, RegNets and MobileNets with bottlenecks reach 3.6 (measured)."""

GROWTH_EXPLAINED = 1.9
"""The same where the scale of the weights accounts for half of it; the zoo's healthy networks with such weights stay below 1.3."""

GROWTH_STUCK = 1.6
"""In its place where the loss does not improve, from update `PATIENCE` on: the chaotic phase of deep tanh networks."""

PATIENCE = 14

EVEN, MODULES, RISES, SHARE = 2.0, 12, 0.8, 0.25
"""Decades of growth from the last of at least `MODULES` modules to the first that need no other explanation while the loss does not
improve, where it is the depth that makes them: it grows at `RISES` of the modules, at none by more than `SHARE` of the whole. Batch
normalisation without skips (arXiv:1902.08129) gives 3.4 over 40 layers, chaotic tanh layers 2.4 over 18; where widths change or skips
shorten the way, the steps are uneven (measured)."""

GAIN = 1.25
"""Factor by which a layer's weights enlarge what passes them, from which they explain growth. He, Xavier and orthogonal
initialisation have 1, PyTorch's default 0.58 (ReLU: 0.41)."""

JUMP = 2.2
"""Decades of growth between two neighbours, with two modules or more on the loss's side, that only a custom backward makes."""

STAIR, STEEP, CLIMBED = 0.4, 0.6, 1.2
"""Decades that the gradient grows at each of four modules in a row, or of three, to `CLIMBED` in all, from which it is no accident of single
ones. Healthy networks of the zoo stay at 0.10 at each of three (tanh with a gain of 3, which explodes: 0.17)."""

AGAIN = 12.0
"""Nodes that a module is nearer to the loss than the one executed before it, from which it is passed many times: a layer with its
activation and normalisation takes at most 6."""

STARVED = 3.0
"""Decades below the first gradients from which a network gets next to nothing: that its input gets more of that is no explosion."""

IMMENSE = 5.0
"""Decades of explained growth that need no persistence: such a run is seldom alive at update 10."""

LASTING = 8
"""Of the last 10 observations, how many in a row must show it, up to the last."""

FORWARD = 3.0
"""Decades that the weights of a network without normalisation enlarge a signal, where all gradients are as large: in a plain network
without biases the growth of the delta and the decay of the activation cancel."""

LOOK = 1.6
"""Decades that some single gradient lies above all behind it before a closer look is taken. Planted explosions lie at 2.7 or more in
this coarse measure, which takes no care of biases (zoo); those that do not are seen by `LARGE`."""

LARGE = 100.0
"""Norm of the gradient over that of the weights that confirms it, all matrices together. 1e2 to 1e4 alone is no evidence (design)."""

NULL_BIAS = 4.0
"""Decades below its weight's from which a bias's gradient is what a normalisation behind it leaves of it (6 to 9; a generator's last bias
before a critic that begins Linear, BatchNorm 4.7; measured) and not the delta. Where activations explode a bias is that far below, too:
there it is looked at by itself."""

MANY = 4000
"""Parameters from which growth is looked at closely by turns only: at update 11, 12, 15, ... A look at 20,000 takes 4 ms (measured).
The `count` of an incident is that of the looks, then."""


@patient
@persistent(WINDOW)
def exploding_gradient(history: History) -> Iterator[Finding]:
    """The gradient grows from layer to layer on its way to the input, or from update to update without bound.

    Across depth, with `d_l` the logarithm (base 10) of the norm of the gradient of a module's bias (of its weight where it has none or
    where a normalisation cancels it), in the order of execution: for some `k` at least two modules `l <= k` have `d_l - max(d_m, m > k)
    >= GROWTH`; or `GROWTH_EXPLAINED` if the weights' gains account for half of it or four modules in a row differ by `STAIR` each, or
    three by `STEEP` (normalisations aside); or neighbours differ by `JUMP`; or all grow evenly (`EVEN`) while the loss does not
    improve; in `LASTING` of the last 10 observations. A network without normalisation whose weights enlarge a signal by `FORWARD`
    decades and whose gradients are `LARGE` beside its weights counts too. In time (`growing`): norm and loss (its size, where it is
    negative) both grow by `IN_TIME` decades over their first values, rising in nearly every one of the last nine records, or by
    `STEADY` in each of the last `EACH`, to a norm of `BESIDE_WEIGHTS` times that of the weights; by `ONE_STEP` decades where the record
    after the first is the last that is finite; by `UNKNOWN_LOSS`, the norm alone, where the loss is not known or changes its sign. Of
    optimizers that take turns each has its own.

    Ignored: large but level gradients; a single module at the input (large or unnormalised inputs) and small embeddings before a
    normalisation; parts with a head of their own; norms that grow while the loss does not; growth across
    depth while the loss is low (below 1/20 of its first values).

    Example:
        >>> [nn.init.normal_(p, std=0.5) for p in mlp.parameters() if p.ndim == 2]  # ten layers of 128
        >>> with GradWatch(mlp):
        ...     train(mlp, optimizer)
    """
    if not len(history):
        return
    finding = _across_depth(history) or grows_in_time(history)
    if finding is not None:
        yield finding


@dataclass(frozen=True)
class _Growth:
    decades: float
    cut: int
    """Modules before it get the more, those from it on are the reference."""
    explained: bool
    deep: bool
    """The biases alone tell."""
    level: NDArray[np.float64]


def _across_depth(history: History) -> Finding | None:
    b, layout = history.baselines, layout_of(history.meta)
    if layout.columns.size < 2 or bool(history.recent("skipped", 1)[0]):
        return None
    now = layout.take(history.recent("grad_norm", 1)[0])
    bad = layout.take(history.recent("grad_nonfinite", 1)[0]) > 0
    poisoned = bool(bad.any())
    # A cheap look first: in most updates of most runs there is nothing to see.
    if not poisoned and not _may_grow(history, layout, now):
        return None
    if len(layout.columns) > MANY and not (is_turn(history.recorded) or poisoned or history.ended):
        return None
    if not poisoned and progress(history) is Progress.LOW:
        return None  # a network that has learned its task: what is left of the gradient has no shape that matters
    known = (layout.take(b.seen) >= (1 if poisoned else 3)) & (layout.reference | layout.norm) & (np.isfinite(now) | bad)
    if known.sum() < 2:
        return None
    deltas = deltas_of(history, known, NULL_BIAS)
    if deltas is None:
        return None
    early = len(deltas.delta) < WINDOW
    stuck = history.recorded >= PATIENCE and progress(history) is Progress.STUCK
    growth = _growth(deltas, early, GROWTH_STUCK if stuck else GROWTH_EXPLAINED)
    if growth is None and stuck:
        growth = _even(deltas)
    if growth is not None and not _starved(history, deltas):
        return _told(history, deltas, growth)
    return None if early else _forward(history, deltas)


def _starved(history: History, deltas: Deltas) -> bool:
    """Whether even the largest gradient lies `STARVED` decades below the largest of the first ones: what is left has no shape."""
    b, columns = history.baselines, deltas.modules.columns
    first = np.fmax.reduce(b.first[:, columns], axis=None, initial=ZERO)
    last = np.fmax.reduce(b.last[:, columns], axis=1)
    last = last[np.isfinite(last)]
    return bool(last.size and median(last) < first - STARVED * DECADE)


def _may_grow(history: History, layout: Layout, now: NDArray[np.float32]) -> bool:
    """A cheap look at the last record alone: whether some gradient lies far enough above all behind it, or all are large."""
    if not layout.measure or np.isnan(now).any():
        now = np.where(layout.reference & ~np.isnan(now), now, np.float32(0.0))
    # No gradient behind another is below the last one alone.
    if float(now.max()) >= 10.0**LOOK * float(now[-1]):
        behind = np.maximum.accumulate(now[::-1])[-2::-1]
        with np.errstate(over="ignore"):
            grown = np.maximum.accumulate(now)[:-1] >= np.float32(10.0**LOOK) * behind
        # The last of those behind may be a bias that gets nothing, so zero is no reference.
        if bool((grown & (behind > 0)).any()):
            return True
    if layout.norm.any():
        return False
    weights = layout.take(history.baselines.weight_norm)
    with np.errstate(over="ignore"):
        size = float(np.dot(weights, weights))
    if np.isnan(size):
        size = float(np.nansum(np.square(weights, dtype=np.float64)))
    return float(history.recent("total_norm", 1)[0]) >= 0.3 * LARGE * sqrt(size)


def _growth(deltas: Deltas, early: bool, explained_from: float) -> _Growth | None:
    m, t = deltas.modules, min(LASTING, len(deltas.delta))
    normalised = bool(m.norm.any())
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = np.log10(deltas.gain)
    strong = np.where((gains >= np.log10(GAIN)) & ~m.normalised_behind, gains, 0.0)
    # A recurrent matrix is passed again and again: it is executed early and yet close to the loss.
    again = bool((strong[m.nearer >= AGAIN] > 0).any())
    best: _Growth | None = None
    for values, deep in ((deltas.delta, False), (deltas.bias, True)):
        # Where activations explode too, all weights' gradients are alike and a bias's far below: then it alone is the delta.
        if deep and (normalised or not strong.any()):
            continue
        values = _without_first_norm(values, m.norm)
        level = median_of_rows(values[-t:])
        behind = _largest_behind(level)
        highest = np.maximum.accumulate(level)
        second = np.append(level[0] - 1.5, np.maximum.accumulate(np.minimum(level[1:], highest[:-1])))
        grown = np.where(m.chained & (highest - behind >= 1.0), second - behind, -np.inf)
        explained = (float(strong[:-1].sum()) >= 0.5 * grown) | again
        if early:
            hit = explained & (grown >= IMMENSE)
        elif deep:
            hit = explained & (grown >= explained_from)
        else:
            limit = GROWTH_NORMALISED if normalised else GROWTH
            hit = (grown >= np.where(explained, explained_from, limit)) | _abrupt(m, level, behind, grown)
        # The place with the largest growth that is there in each observation.
        left = np.where(hit, grown, -np.inf)
        for _ in range(min(8, int(hit.sum()))):
            place = int(left.argmax())
            cut = place + 1
            if best is not None and left[place] <= best.decades:
                break
            each = _second(values[-t:, :cut]) - values[-t:, cut:].max(axis=1)
            if float(each.min()) >= 0.6 * float(left[place]):
                best = _Growth(float(left[place]), cut, bool(explained[place]), deep, level)
                break
            left[place] = -np.inf
    return best


def _even(deltas: Deltas) -> _Growth | None:
    """Growth that each of many modules has its part in, normalisations aside."""
    every = median_of_rows(deltas.delta[-LASTING:])
    values = deltas.delta[-LASTING:, ~deltas.modules.norm]
    level = every[~deltas.modules.norm]
    if len(level) < MODULES or len(values) < LASTING:
        return None
    steps = level[:-1] - level[1:]
    whole = median(level[:3]) - median(level[-3:])
    each = np.median(values[:, :3], axis=1) - np.median(values[:, -3:], axis=1)
    if float(every[:-1].max() - every[-1]) < GROWTH_STUCK:  # the last module gets as much as the first ones
        return None
    if whole < EVEN or float(each.min()) < 0.6 * EVEN or (steps > 0).mean() < RISES or float(steps.max()) > SHARE * whole:
        return None
    return _Growth(whole, len(every) - 1, False, False, every)


def _second(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[T]`: the second largest of each row, the largest where there is one only."""
    if values.shape[1] > 1:
        values = values.copy()
        values[np.arange(len(values)), values.argmax(axis=1)] = -np.inf
    second: NDArray[np.float64] = values.max(axis=1)
    return second


def _largest_behind(level: NDArray[np.float64]) -> NDArray[np.float64]:
    largest: NDArray[np.float64] = np.append(np.maximum.accumulate(level[::-1])[-2::-1], -np.inf)
    return largest


def _abrupt(m: Modules, level: NDArray[np.float64], behind: NDArray[np.float64], grown: NDArray[np.float64]) -> NDArray[np.bool_]:
    """`[M]`: right behind the module the gradient is enlarged by something that is no weight: in one place, or at each of a few."""
    steps = np.append(level[:-1] - level[1:], -np.inf)
    hit: NDArray[np.bool_] = m.jumpable & (steps >= JUMP) & (grown >= 1.0)
    for place in np.flatnonzero(hit):
        hit[place] = median(level[: place + 1]) - behind[place] >= 1.0
    layers = np.flatnonzero(~m.norm)
    up = level[layers[:-1]] - level[layers[1:]]
    for count, least, whole in ((4, STAIR, GROWTH_EXPLAINED), (3, STEEP, CLIMBED)):
        if len(up) >= count:
            top = layers[count - 1 : -1]
            row = np.convolve(up >= least, np.ones(count, int), "valid") == count
            hit[top] |= row & (grown[top] >= whole)
    return hit


def _without_first_norm(values: NDArray[np.float64], norm: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Take out the step at the first normalisation: it enlarges the gradient of a small signal, such as an embedding's, in health."""
    if not norm.any():
        return values
    first = int(norm.argmax())
    if first == 0:
        return values
    step = np.maximum(values[:, :first].max(axis=1) - values[:, first] - 0.5, 0.0)
    values = values.copy()
    values[:, :first] -= step[:, None]
    return values


def _told(history: History, deltas: Deltas, growth: _Growth) -> Finding:
    m, level, cut = deltas.modules, growth.level, growth.cut
    reference = float(level[cut:].max())
    sick = np.flatnonzero(level[:cut] >= reference + min(1.5, 0.5 * growth.decades))
    sick = sick[np.argsort(-level[sick], kind="stable")]
    top = float(level[sick[0]])
    ratio = 10.0 ** (top - reference)
    ends = m.columns[m.start[[sick[0], cut + int(level[cut:].argmax())]]]
    after = history.meta.parameters[ends[1]].layer or "(model)"
    lower, upper = history.meta.layer_index[ends].tolist()
    steps = level[:-1] - level[1:]
    strong = deltas.gain[deltas.gain >= GAIN]
    return Finding(
        "exploding_gradient",
        Severity.ERROR,
        _since(history, deltas, sick, growth),
        parameters=named(history.meta, m.columns_of(sick)),
        message=f"the gradient grows {ratio:.0e} times towards the input, from {10.0**reference:.1e} at {after}",
        evidence={
            "ratio": ratio,
            "grad_norm": 10.0**top,
            "reference_norm": 10.0**reference,
            "layers": len(sick),
            "gain": float(np.median(strong)) if strong.size else 1.0,
            "explained": float(growth.explained),
            "sharpest_rise": 10.0 ** float(steps[:cut].max()),
        }
        | circumstances(history, lower, upper)
        | gains_between(history, lower, upper, top - reference),
    )


def _forward(history: History, deltas: Deltas) -> Finding | None:
    """Weights that enlarge the signal in a network without normalisation, and gradients to match."""
    b, m = history.baselines, deltas.modules
    if layout_of(history.meta).normalised:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        gains = np.log10(deltas.gain)
    strong = gains >= np.log10(GAIN)
    if strong.sum() < 4 or float(np.nansum(gains)) < FORWARD:
        return None
    columns = m.columns[m.matrix]
    totals = np.sqrt(np.square(np.exp(b.last[:, columns].astype(float))).sum(axis=1))
    weights = float(np.sqrt(np.nansum(np.square(b.weight_norm[columns].astype(float)))))
    if weights <= 0 or not float(np.median(totals)) >= LARGE * weights:
        return None
    # The head's gradient is as large for what reaches it, not for what it does; the delta is largest at the input.
    sick = np.flatnonzero(strong & ~m.head)
    factor = 10.0 ** min(float(np.nansum(gains)), 300.0)
    size = float(np.median(totals))
    back = history.recent("total_norm", 64)
    with np.errstate(invalid="ignore"):
        small = np.flatnonzero(back < 0.1 * LARGE * weights)
    steps = history.steps[-len(back) :]
    return Finding(
        "exploding_gradient",
        Severity.ERROR,
        int(steps[0] if not small.size else steps[min(small[-1] + 1, len(steps) - 1)]),
        parameters=named(history.meta, m.columns_of(sick)),
        message=f"the weights enlarge a signal {factor:.0e} times and the gradient norm is {size:.1e}",
        evidence={
            "ratio": factor,
            "grad_norm": size,
            "weight_norm": weights,
            "gain": 10.0 ** float(np.nanmedian(gains)),
            "layers": len(sick),
            "explained": 1.0,
        },
    )


def _since(history: History, deltas: Deltas, sick: NDArray[np.int64], growth: _Growth) -> int:
    """The first of the kept records since when a third of the growth, in decades, has been there."""
    m, back = deltas.modules, history.recent("grad_norm", looked_back(len(deltas.modules.columns)))
    # Of each module what stood for its delta: its bias, or its weight where that tells more.
    by_bias = deltas.own | growth.deep
    speaks = by_bias[m.owner] != m.matrix
    of, owner = m.columns[speaks], m.owner[speaks]
    chosen, rest = of[members(sick[:2], len(m))[owner]], of[owner >= growth.cut]
    if not chosen.size or not rest.size:
        return int(history.steps[-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        apart = _largest_log(back.take(chosen, axis=1)) - _largest_log(back.take(rest, axis=1))
    steps = history.steps[-len(back) :]
    well = np.flatnonzero(np.isfinite(apart) & (apart < 0.35 * growth.decades))
    if not well.size:
        return int(steps[0])
    return int(steps[min(well[-1] + 1, len(steps) - 1)])


def _largest_log(norms: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[T]`, decades: of those observed in each row."""
    largest: NDArray[np.float32] = np.log10(np.maximum(np.fmax.reduce(norms, axis=1), 1e-45))
    return largest
