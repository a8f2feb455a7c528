"""Gradients that vanish: on their way to the input, or in one place, so that it does not learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradwatch.baselines import WINDOW, ZERO
from gradwatch.diagnose.arrays import DECADE, median, members
from gradwatch.diagnose.execution import execution_of
from gradwatch.diagnose.gains import circumstances, gains_between
from gradwatch.diagnose.naming import named
from gradwatch.diagnose.rules.layout import Layout, layout_of
from gradwatch.diagnose.rules.loss import Progress, guess_of, has_learnt, progress
from gradwatch.diagnose.rules.rule import looked_back, patient, persistent
from gradwatch.diagnose.rules.window import Window, window_of
from gradwatch.diagnose.rules.zero import UNDERFLOW
from gradwatch.history import History
from gradwatch.records import Finding, GradState, Severity

FALL = 4.3
"""Decades that the gradient falls, while the loss does not improve. Measured on the zoo (tests/zoo): healthy networks stay at or below
2.6 (a three-layer LSTM), plain ReLU networks of 12 layers with PyTorch's default weights, which hardly learn under SGD, at 3.2 to 3.9;
sigmoid and tanh stacks that do not learn start at 5."""

FALL_IMPROVING = 4.6
"""The same while the loss improves or is not known: a part may learn without the sick one."""

TINY = 0.2
"""Factor that the sick weights typically leave of a signal's scale, below which they explain a fall, and `SICK` decades suffice while
the loss does not improve, or is not below that of a guess. PyTorch's default leaves 0.58, weights of a hundredth in a layer of 64 leave
0.08."""

FLAT_GAIN = 0.3
"""What a hidden activation passes on, in the median over those before a cut, from which it is the activations that lose the gradient, and
`SICK` decades suffice while the loss does not improve: a sigmoid passes 0.25 at most, tanh and rectifiers 0.5 to 1."""

CLEAR = 5.5
"""Decades from which a fall is told at update 10, as it is when `SICK` of it are lost in one place; otherwise it has to be there at
update 14, and not be closing. Deep GELU, SiLU and ReLU stacks under Adam begin at 4 to 5, half a decade a layer, and free themselves
within 40 updates (measured)."""

PATIENCE = 14

SICK = 3.0
"""Decades below the gradient after it from which a parameter is named, once the whole fall is a finding."""

LASTING = 8
"""Of the last 10 observations, how many in a row must show the fall, up to the last one: a fault that begins later has 10 updates."""

RECOVERY, RECOVERY_UNCLEAR = 15, 25
"""Updates within which a fall that is closing at its present pace must be over (below `SICK`), to be left alone. Stacks that free
themselves do so at 0.1 to 0.4 decades an update (measured)."""

LONE = 5.0
"""Decades for a single layer at the input: an embedding that hardly matters is healthy. Not where its weights and those behind it are
`TINY`."""

LAYERS_IN_BRANCH = 4
"""Layers of a branch other than the first from which it counts at all: side inputs that hardly matter are healthy, and DeBERTa's relative
positions are three layers that get 1e-5 of the rest (measured)."""

STUCK = 5.0
"""Decades below its peers' largest, or its own early median, from which a layer that does not move is sick by itself. Healthy
transformers hold a projection at 3 to 4 (measured)."""

ONE_PLACE = 0.6
"""Share of the decades lost between two neighbours, from which that place is named first: in even stacks it is one in their number."""

OUTSTANDING = 2.5
"""Decades lost between two neighbours from which that place is named first in any case: a sigmoid with PyTorch's default weights in
front of it loses 0.85, weights of a tenth of the usual scale 1.4."""

NEGLIGIBLE = 1e-7
"""Update ratio that changes nothing: half of float32's resolution, 1.2e-7, is what rounds away."""


NOTHING = float(ZERO) / DECADE + 0.1
"""Decades up to which a norm is exactly zero in all observations: the smallest of float32 is at -44.85."""

LEAST = 1e-37
"""Ratio below which one of the two gradients is nearly or exactly zero: what it is then says nothing."""

HIGHEST = 64
"""Parameters after the cut among which the largest gradient of each earlier record is looked for."""


@patient
@persistent(WINDOW)
def vanishing_gradient(history: History) -> Iterator[Finding]:
    """The gradient is orders of magnitude smaller before some point of the network than after it, and stays so.

    With `g_i` the logarithm (base 10) of the norm of a parameter's gradient, in the order of execution, parameters up to `k` are sick
    *by depth* if `max(g_j, j > k) - max(g_i, i <= k) >= FALL`, biases of the last layers included among the `j`, in `LASTING` of the
    last 10 observations, the last ones. The sick are a prefix of the order of execution or of one branch; if a parameter that was
    executed earlier in it is well, nothing after it is sick, so that no single projection, LayerScale or LoRA matrix is. A whole
    layer is sick as *not learning* if its `g` lies `STUCK` below its peers' largest or its own early median and its update ratio is
    at most `NEGLIGIBLE`.

    Ignored: everything while the loss is low (design: below 1/20 of its first values); a fall that closes fast enough (`RECOVERY`);
    the share of the fall that a matrix explains which began at exactly zero and has not grown yet (zero-initialised heads); a branch
    with a head of its own, for its loss may just weigh less; a gradient that is exactly zero all at once (`zero_gradient`); the absolute
    size of anything.

    Example:
        >>> mlp = nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(64, 64), nn.Sigmoid())], nn.Linear(64, 1))
        >>> with GradWatch(mlp):
        ...     train(mlp, optimizer)
    """
    if not len(history) or bool(history.recent("skipped", 1)[0]):
        return
    layout = layout_of(history.meta)
    now = layout.take(history.recent("grad_norm", 1)[0])
    deep, still = _may_fall(layout, now), _may_be_stuck(history, layout)
    if not (deep or still):
        return
    window = window_of(history, layout, now, LASTING)
    if window is None:
        return
    state = progress(history)
    if state is Progress.LOW:
        return
    falls = [fall for fall in _falls(history, window, state is Progress.STUCK) if not _is_cut(window, fall)] if deep else []
    if falls:
        yield _by_depth(history, window, falls)
        return
    stuck = _stuck(history, window) if still and state is not Progress.IMPROVING else None
    if stuck is not None:
        yield stuck


@dataclass(frozen=True)
class _Fall:
    start: int
    stop: int
    reference: int
    """Place of the parameter after the cut with the largest gradient."""
    whole: NDArray[np.int64]
    """Places of the sick, without modules that lie on both sides of the cut."""
    drop: float
    """The largest drop between neighbours on the way to the reference, in decades."""
    last: int
    """The place before which it is lost."""
    decades: float


def _may_fall(layout: Layout, now: NDArray[np.float32]) -> bool:
    """A cheap look at the last record alone: whether some part lies far enough below everything after it."""
    if now.size < 2:
        return False
    if layout.branches > 1 or not layout.measure or np.isnan(now).any():
        with np.errstate(divide="ignore", invalid="ignore"):
            level = np.nan_to_num(np.log10(np.maximum(now, 1e-45)), nan=-np.inf).astype(float)
        seen = np.isfinite(level)
        if not seen.any():
            return False
        after = _largest_after(np.where(layout.reference, level, -np.inf))
        before = _largest_so_far(np.where(seen, level, -1e3), layout.branch)
        return bool(((after - before >= SICK - 0.5) & seen).any())
    # No part is below its first parameter, which is that of all.
    if float(now.max()) < 10.0 ** (SICK - 0.5) * float(now[0]):
        return False
    after = np.maximum.accumulate(now[::-1])[-2::-1]
    with np.errstate(over="ignore"):
        return bool((after >= np.float32(10.0 ** (SICK - 0.5)) * np.maximum.accumulate(now)[:-1]).any())


def _may_be_stuck(history: History, layout: Layout) -> bool:
    return bool((layout.take(history.baselines.update_ratio) <= NEGLIGIBLE).any())


def _falls(history: History, window: Window, stuck: bool) -> Iterator[_Fall]:
    layout, level = window.layout, window.level
    after = _largest_after(np.where(layout.reference, level, -np.inf))
    fall = after - _largest_so_far(level, layout.branch)
    if not fall.size or float(fall.max()) < SICK:
        return
    ends = np.flatnonzero(np.append(layout.branch[1:] != layout.branch[:-1], True)) + 1
    start = 0
    for stop in ends:
        found = _fall_in(history, window, fall, start, int(stop), stuck)
        if found is not None:
            yield found
        start = int(stop)


def _largest_after(level: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[N]`: the largest of those behind each; -inf for the last."""
    largest = np.maximum.accumulate(level[::-1])[::-1]
    return np.append(largest[1:], -np.inf)


def _largest_so_far(level: NDArray[np.float64], branch: NDArray[np.int64]) -> NDArray[np.float64]:
    """`[N]`: the largest of its branch up to each."""
    # Lifting every branch above the one before makes one running maximum of many.
    lift = 1e4 * branch
    largest: NDArray[np.float64] = np.maximum.accumulate(level + lift) - lift
    return largest


def _is_cut(window: Window, fall: _Fall) -> bool:
    """Nothing at all arrives in any of its matrices, and right behind them it is not nearly nothing: that is `zero_gradient`."""
    matrices = fall.whole[window.layout.matrix[fall.whole]]
    return bool((window.late[matrices] <= NOTHING).all() and window.late[fall.stop :].max() > np.log10(UNDERFLOW))


def _fall_in(history: History, window: Window, fall: NDArray[np.float64], start: int, stop: int, stuck: bool) -> _Fall | None:
    layout, logs = window.layout, window.logs
    inside = fall[start:stop]
    cuts = np.flatnonzero(inside >= SICK)
    if not cuts.size:
        return None
    cut = start + int(cuts[-1]) + 1
    deepest = start + int(inside.argmax()) + 1
    after = layout.reference[cut:]
    whole = _whole(layout, start, cut)
    matrices = whole[layout.matrix[whole]]
    if not matrices.size or _has_own_head(window, start, cut):
        return None
    layers = int(members(layout.layer[matrices], layout.layers).sum())
    if start > 0 and layers < LAYERS_IN_BRANCH:
        return None
    behind = np.flatnonzero(layout.matrix[cut:]) + cut
    tiny, all_tiny = (
        bool(places.size and median(window.weights[places] * layout.gain[places]) < TINY) for places in (matrices, behind)
    )
    untrained = stuck or (guess_of(history) > 0 and not has_learnt(history))
    need = FALL if stuck else FALL_IMPROVING
    if untrained and (tiny or _flat(history, window, start, cut)):
        need = SICK
    if layers == 1 and not (untrained and tiny and all_tiny):
        need = max(need, LONE)
    excused = _unfinished(window, deepest)
    # Record by record: the whole fall, from the best reference of that record to the best of the deepest sick part.
    top = (logs[:, cut:] if after.all() else np.where(after, logs[:, cut:], -np.inf)).max(axis=1)
    each = top - logs[:, start:deepest].max(axis=1) - excused
    decades = median(each[-LASTING:])
    if each[-LASTING:].min() < need - 0.5 or decades < need:
        return None
    reference = cut + int(np.where(after, window.level[cut:], -np.inf).argmax())
    drop, last = _sharpest(window.late, start, reference)
    clear = decades >= CLEAR or drop >= SICK
    if not clear and window.seen < PATIENCE:
        return None
    pace = float(each[WINDOW // 2 :].mean() - each[: WINDOW // 2].mean()) / (WINDOW / 2)
    soon = RECOVERY if clear else RECOVERY_UNCLEAR
    if pace < 0 and median(each[-3:]) + soon * pace < min(SICK, need - 0.5):
        return None
    return _Fall(start, cut, reference, whole, drop, last, decades + excused)


def _flat(history: History, window: Window, start: int, cut: int) -> bool:
    """The activations that run among the layers of a part pass on little of what they get."""
    meta = history.meta
    ranks = execution_of(meta).rank
    among = ranks[meta.layer_index[window.layout.columns[[start, cut - 1]]]]
    own = (
        np.array([fact.activation is not None for fact in meta.layers], bool) & (ranks >= among.min()) & (ranks <= among.max() + 1)
    )
    gains = history.recent("gain", WINDOW)[:, own]
    gains = gains[np.isfinite(gains)]
    return bool(gains.size and float(np.median(gains)) <= FLAT_GAIN)


def _has_own_head(window: Window, start: int, cut: int) -> bool:
    """The part holds a whole module next to the loss: what is after the cut is another branch."""
    layout = window.layout
    heads = layout.head[start:cut]
    if (layout.layer[start:cut] != layout.layer[start]).any():
        # In the graph of a derivative (a physics-informed net) what reads the data is next to the loss, too.
        heads = heads & (layout.layer[start:cut] != layout.layer[start])
    if heads.any():
        inside = layout.layer[start:cut][heads]
        return not bool(members(layout.layer[cut:], layout.layers)[inside].all())
    if layout.roles or cut >= len(layout.columns):
        return False
    # Without roles: a chain comes closer to the loss; what begins as far from it as the part did is another branch.
    distance = layout.distance
    return bool(distance[cut] > distance[cut - 1] and distance[cut] + 2 >= np.nanmax(distance[start:cut]))


def _unfinished(window: Window, cut: int) -> float:
    """Decades of the fall due to matrices after the cut that began at zero and have not grown to a usual size."""
    blank = np.flatnonzero(window.layout.blank[cut:]) + cut
    if not blank.size:
        return 0.0
    scale = window.weights[blank] * window.layout.gain[blank]
    with np.errstate(divide="ignore", invalid="ignore"):
        missing = -np.log10(np.maximum(scale.astype(float), 1e-30))
    return float(np.nansum(np.maximum(missing, 0.0)))


def _by_depth(history: History, window: Window, falls: list[_Fall]) -> Finding:
    meta, layout, level = history.meta, window.layout, window.late
    falls = sorted(falls, key=lambda fall: -fall.decades)
    worst = falls[0]
    places = np.concatenate([_by_blame(window, fall) for fall in falls])
    reference = meta.parameters[window.layout.columns[worst.reference]]
    lowest = worst.start + int(level[worst.start : worst.stop].argmin())
    ratio = 10.0**-worst.decades
    matrices = places[layout.matrix[places]]
    nothing = int(members(layout.layer[matrices[level[matrices] <= NOTHING]], layout.layers).sum()) if ratio < LEAST else 0
    above = min(worst.last + 1, len(level) - 1)
    gain = window.weights[above] * layout.gain[above]
    nodes = float(layout.distance[worst.last] - layout.distance[above])
    layers = int(members(layout.layer[matrices], layout.layers).sum())
    total = int(members(layout.layer[layout.matrix], layout.layers).sum())
    ends = meta.layer_index[[layout.columns[lowest], layout.columns[worst.reference]]]
    fall = float(level[lowest] - level[worst.reference])
    where = reference.layer or "(model)"
    if nothing:
        message = f"the gradient is exactly zero in {nothing} of {total} layers, {10.0 ** level[worst.reference]:.2g} at {where}"
    else:
        message = f"the gradient is {_power(ratio)} of that at {where}, in {layers} of {total} layers"
    return Finding(
        "vanishing_gradient",
        Severity.WARNING,
        _onset(history, window, worst),
        parameters=named(meta, window.layout.columns[places]),
        message=message,
        evidence={
            "ratio": 0.0 if nothing else ratio,
            "grad_norm": _norm(level[lowest]),
            "reference_norm": 10.0 ** float(level[worst.reference]),
            "layers": layers,
            "layers_in_all": total,
            "sharpest_drop": 0.0 if level[worst.start : worst.last + 1].max() <= NOTHING else 10.0**-worst.drop,
            "share_of_drop": worst.drop / worst.decades,
            "gain_there": float(gain) if np.isfinite(gain) else 1.0,
            "nodes": nodes if np.isfinite(nodes) else 0.0,
        }
        | circumstances(history, int(ends[0]), int(ends[1]))
        | gains_between(history, int(ends[0]), int(ends[1]), fall),
    )


def _sharpest(level: NDArray[np.float64], start: int, reference: int) -> tuple[float, int]:
    """The largest drop between neighbours on the way to the reference, in decades, and the place before which it is lost."""
    so_far = np.maximum.accumulate(level[start : reference + 1])
    drops = so_far[1:] - so_far[:-1]
    last = int(drops.argmax())
    return float(drops[last]), start + last


def _whole(layout: Layout, start: int, cut: int) -> NDArray[np.int64]:
    """Places of the sick, without modules that lie on both sides of the cut: their bias gets what their weight lacks an input for."""
    whole = np.flatnonzero(~members(layout.layer[cut:], layout.layers)[layout.layer[start:cut]]) + start
    return whole if layout.matrix[whole].any() else np.arange(start, cut)


def _by_blame(window: Window, fall: _Fall) -> NDArray[np.int64]:
    """The sick, most responsible first: from the one place where the gradient is lost towards the input, or the most starved first."""
    places = fall.whole
    if fall.drop >= ONE_PLACE * fall.decades or fall.drop >= OUTSTANDING:
        return np.concatenate((places[places <= fall.last][::-1], places[places > fall.last]))
    # Modules in the order of what their strongest parameter gets: a bias that a normalisation zeroes says nothing.
    layer = window.layout.layer[places]
    strongest = np.full(window.layout.layers, -np.inf)
    np.maximum.at(strongest, layer, window.late[places])
    return places[np.argsort(strongest[layer], kind="stable")]


def _onset(history: History, window: Window, fall: _Fall) -> int:
    """The first of the kept records since when the fall has been there without a break, at half its size."""
    back = history.recent("grad_norm", looked_back(len(window.layout.columns)))
    # The module executed first is sick for as long as anything after it has been.
    places, layout = fall.whole, window.layout
    layers = layout.layer[places]
    some = window.layout.columns[places[layers == layers[0]]]
    after = np.flatnonzero(layout.reference[fall.stop :]) + fall.stop
    if len(after) > HIGHEST:
        after = after[np.argpartition(window.level[after], -HIGHEST)[-HIGHEST:]]
    with np.errstate(divide="ignore", invalid="ignore"):
        sick = np.log10(np.maximum(back.take(some, axis=1).max(axis=1), 1e-45))
        top = np.log10(np.maximum(np.fmax.reduce(back.take(window.layout.columns[after], axis=1), axis=1), 1e-45))
    steps = history.steps[-len(back) :]
    seen = np.isfinite(sick)
    # A record that did not reach them says neither yes nor no.
    well = np.flatnonzero(seen & (top - sick < min(SICK - 1.0, 0.5 * fall.decades)))
    if not well.size:
        return int(steps[np.flatnonzero(seen)[0]]) if steps[0] > 0 else 0
    later = np.flatnonzero(seen & (np.arange(len(seen)) > well[-1]))
    return int(steps[later[0]]) if later.size else int(steps[-1])


def _stuck(history: History, window: Window) -> Finding | None:
    """A whole layer that gets next to nothing and whose weights do not move, though others do."""
    b, layout = history.baselines, window.layout
    ratio = layout.take(b.update_ratio).astype(float)
    stepped = (layout.take(history.recent("grad_state", 1)[0]) & np.uint8(GradState.STEPPED)) != 0
    matrix = layout.matrix & stepped
    still = matrix & (ratio <= NEGLIGIBLE)
    if not still.any() or not (matrix & ~still).any():
        return None
    moving = float(np.nanmedian(ratio[matrix & ~still]))
    high = window.logs[-LASTING:].max(axis=0)
    peers = median(window.logs[-LASTING:, matrix].max(axis=1))
    early = layout.take(b.early).astype(float) / DECADE
    # Exactly zero is another rule's business (or nobody's: attention over a single token).
    low = (high <= np.maximum(peers, early) - STUCK) & (early > -40) & (high > NOTHING)
    rising = window.logs[WINDOW // 2 :].mean(axis=0) - window.logs[: WINDOW // 2].mean(axis=0) > 0.2
    sick = still & low & ~rising & (moving >= 1e3 * np.maximum(ratio, 1e-12))
    # The layer as a whole: all its matrices, and all of what it stands among if that is a module of its own: under SGD the queries and
    # keys of a small transformer stand still for tens of updates beside values that learn (measured on five architectures).
    sick &= ~members(layout.layer[matrix & ~sick], layout.layers)[layout.layer]
    if sick.any():
        sick &= _alone_in_its_module(layout, sick, stepped)
    if not sick.any():
        return None
    places = np.flatnonzero(members(layout.layer[sick], layout.layers)[layout.layer])
    places = places[np.argsort(window.late[places], kind="stable")]
    worst = float(window.late[sick].min())
    part = 10.0 ** (worst - peers)
    return Finding(
        "vanishing_gradient",
        Severity.WARNING,
        _stuck_since(history, window, sick, peers),
        parameters=named(history.meta, window.layout.columns[places]),
        message=f"the gradient is {_power(part)} of the largest and the weights do not move",
        evidence={
            "ratio": part,
            "grad_norm": _norm(worst),
            "reference_norm": 10.0**peers,
            "update_ratio": float(np.nanmax(ratio[sick])),
        },
    )


def _alone_in_its_module(layout: Layout, sick: NDArray[np.bool_], stepped: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`[N]`: no layer of the module that holds it (the model itself aside) is well. A vector in a sick layer is part of it.
    Embeddings may hardly matter in health."""
    ill = members(layout.layer[sick], layout.layers)[layout.layer]
    # The model itself, number -1 and so the last place, holds sick and well layers in any network.
    well = members(layout.around[stepped & ~ill], layout.arounds + 1)
    well[-1] = False
    alone: NDArray[np.bool_] = ~(layout.embedding | well[layout.around])
    return alone


def _stuck_since(history: History, window: Window, sick: NDArray[np.bool_], peers: float) -> int:
    back = history.recent("grad_norm", looked_back(len(window.layout.columns)))[:, window.layout.columns[sick]]
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = np.log10(np.maximum(back, 1e-45))
    well = np.flatnonzero((levels > peers - STUCK + 1.5).any(axis=1))
    steps = history.steps[-len(back) :]
    if not well.size:
        return int(steps[0])
    return int(steps[min(well[-1] + 1, len(steps) - 1)])


def _norm(level: float) -> float:
    return 0.0 if level <= NOTHING else float(10.0**level)


def _power(ratio: float) -> str:
    return f"{ratio:.0e}" if ratio > LEAST else f"less than {LEAST:.0e}"
