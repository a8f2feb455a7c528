"""Gradients that arrive and are exactly zero."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gradwatch.baselines import WINDOW, ZERO
from gradwatch.diagnose.arrays import members
from gradwatch.diagnose.lists import lists_of
from gradwatch.diagnose.naming import named
from gradwatch.diagnose.rules.layout import Layout, layout_of
from gradwatch.diagnose.rules.loss import Progress, progress
from gradwatch.diagnose.rules.rule import looked_back, patient, persistent
from gradwatch.diagnose.tree import ancestors
from gradwatch.history import History
from gradwatch.records import Finding, Severity

UNDERFLOW = 1e-30
"""Largest gradient right behind a layer whose own is exactly zero at which that is the end of a long fall, and not a cut: float32's
smallest normal number is 1.2e-38, and a layer takes away a few decades at most."""


@patient
@persistent(WINDOW)
def zero_gradient(history: History) -> Iterator[Finding]:
    """A backward pass gives every element of every parameter that it reaches in a layer exactly zero, update after update.

    With `g` the norm of a parameter's gradient: `g = 0` for all such parameters of a module, a matrix among them, in the last `WINDOW`
    records that reached it; or for a matrix alone that had one when the run began, while its bias still has; or for any parameter that
    the gradient reaches through a `clamp` only and that has never had one. Zero is an exact number here and no threshold: `round`,
    `sign` and comparisons have the derivative 0, `clamp` has it outside its limits, and so has a product with 0. Names the layers next
    to the cut first. INFO where something that runs before them gets a gradient and the loss improves (a term that weighs 0 for now, a
    batch without edges, parameters that are added as `0 * p.sum()`), unless they have never had one though nothing on their way is
    multiplied by zeros, and no softmax is over one element, in the graphs of the first three backward passes.

    Ignored: everything while the loss is exactly zero or low (nothing is left to learn); matrices whose gradient is zero because one
    behind them began at zero and waits to be filled (LoRA, residual branches); one of a list of equals others of which get gradients
    (an expert, a branch); queries and keys of an attention whose values get gradients, for a softmax over one key is constant; vectors
    alone (the bias of a critic whose losses cancel, keys' biases); the end of a fall by underflow, which is `vanishing_gradient`.

    Example:
        >>> with GradWatch(model):
        ...     for x, y in loader:
        ...         step(head(torch.round(body(x))), y)
    """
    b = history.baselines
    if not len(history) or bool(history.recent("skipped", 1)[0]):
        return
    layout = layout_of(history.meta)
    now = layout.take(history.recent("grad_norm", 1)[0])
    if not (now == 0.0).any():
        return
    # Of no elements the norm is 0.
    full = layout.take(history.meta.numel) > 0
    zero = full & (now == 0.0) & (layout.take(b.seen) >= WINDOW) & (layout.take(b.last) <= ZERO).all(axis=0)
    whole = _whole_layers(layout, zero, now)
    cut = _cut_from_weights(history, layout, zero, now) & ~whole
    never = zero & (layout.take(b.first) <= ZERO).all(axis=0)
    clamped = never & layout.take(history.meta.clamped)
    sick = whole | cut | clamped
    if not sick.any():
        return
    sick &= ~_waits(history, layout, sick) & ~_has_others(history, layout, now) & ~_attends_to_one(history, layout, now)
    clamped &= sick
    if not (sick & (layout.matrix | clamped)).any() or _nothing_to_learn(history):
        return
    places = np.flatnonzero(sick)
    largest, behind = _behind(layout, now, places)
    if 0.0 < largest < UNDERFLOW:
        return
    # What is cut off at its own end, while what runs before it learns, may be meant so.
    connected = layout.take(history.meta.connected)
    meant = not (cut | clamped | (never & connected))[places].any()
    aside = meant and bool((now[: places[-1]] > 0.0).any()) and progress(history) is Progress.IMPROVING
    columns = layout.columns[places[::-1]]
    layers = int(members(layout.layer[places], layout.layers).sum())
    total = int(members(layout.layer[layout.matrix], layout.layers).sum())
    where = "" if behind is None else f", {largest:.2g} at {history.meta.parameters[layout.columns[behind]].layer or '(model)'}"
    solid = places[layout.matrix[places]]
    what = f"in {layers} of {total} layers" if len(solid) else f"in {history.meta.parameters[columns[0]].name}"
    yield Finding(
        "zero_gradient",
        Severity.INFO if aside else Severity.WARNING,
        _since(history, layout.columns[solid if len(solid) else places]),
        parameters=named(history.meta, columns),
        message=f"the gradient is exactly zero {what}{where}",
        evidence={
            "layers": layers,
            "layers_in_all": total,
            "grad_norm": 0.0,
            "reference_norm": largest,
            "clamped": float(layout.take(history.meta.clamped)[places].all()),
        },
    )


def _whole_layers(layout: Layout, zero: NDArray[np.bool_], now: NDArray[np.float32]) -> NDArray[np.bool_]:
    """`[N]`: the parameters of modules all of whose observed parameters are zero and that hold a matrix."""
    alive = members(layout.layer[np.isfinite(now) & ~zero], layout.layers)
    solid = members(layout.layer[layout.matrix & zero], layout.layers)
    whole: NDArray[np.bool_] = zero & (solid & ~alive)[layout.layer]
    return whole


def _cut_from_weights(history: History, layout: Layout, zero: NDArray[np.bool_], now: NDArray[np.float32]) -> NDArray[np.bool_]:
    """`[N]`: matrices that get nothing though their own vector does, and had a gradient in each of their first records: what the layer
    gives matters, and what makes it of the matrix has lost its derivative."""
    vectors = members(layout.layer[~layout.matrix & (now > 0.0)], layout.layers)
    had = (layout.take(history.baselines.first) > ZERO).all(axis=0)
    cut: NDArray[np.bool_] = zero & layout.matrix & vectors[layout.layer] & had
    return cut


def _waits(history: History, layout: Layout, sick: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`[N]`: something behind it began at zero and is all zero still, though it gets a gradient: it will be filled."""
    weights = layout.take(history.baselines.weight_norm)
    empty = layout.blank & (weights == 0.0) & ~sick
    waits: NDArray[np.bool_] = np.logical_or.accumulate(empty[::-1])[::-1]
    return waits


def _has_others(history: History, layout: Layout, now: NDArray[np.float32]) -> NDArray[np.bool_]:
    """`[N]`: lies in one of a list of equals, another of which gets a gradient."""
    lists = lists_of(history.meta)
    alive = np.zeros(len(history.meta.parameters), bool)
    alive[layout.columns[now > 0.0]] = True
    return layout.take(lists.others(alive) | (lists.expert & lists.equals))


def _attends_to_one(history: History, layout: Layout, now: NDArray[np.float32]) -> NDArray[np.bool_]:
    """`[N]`: lies in an attention of which some other parameter gets a gradient."""
    attentions = {fact.name for fact in history.meta.layers if "attention" in fact.type.lower() or "attn" in fact.type.lower()}
    if not attentions:
        return np.zeros(len(now), bool)
    layers = [history.meta.parameters[i].layer for i in layout.columns]
    around = [next((name for name in ancestors(layer) if name in attentions), None) for layer in layers]
    alive = {name for name, norm in zip(around, now.tolist(), strict=True) if name is not None and norm > 0.0}
    return np.array([name in alive for name in around], bool)


def _nothing_to_learn(history: History) -> bool:
    losses = history.baselines.losses[-WINDOW:]
    losses = losses[np.isfinite(losses)]
    return bool(losses.size and (losses == 0.0).all()) or progress(history) is Progress.LOW


def _behind(layout: Layout, now: NDArray[np.float32], places: NDArray[np.int64]) -> tuple[float, int | None]:
    """The largest gradient of what runs right behind the sick, and its place; 0 and None where all that runs there is sick too."""
    later = np.flatnonzero((now > 0.0) & (np.arange(len(now)) > places[-1]))
    if not later.size:
        return 0.0, None
    near = later[layout.layer[later] == layout.layer[later[0]]]
    best = int(near[np.argmax(now[near])])
    return float(now[best]), best


def _since(history: History, columns: NDArray[np.int64]) -> int:
    """The first kept record since when all of them have been zero in each record that observed them."""
    norms = history.recent("grad_norm", looked_back(len(columns)))[:, columns]
    alive = np.flatnonzero((norms > 0.0).any(axis=1))
    steps = history.steps[-len(norms) :]
    if not alive.size:
        return int(steps[0]) if steps[0] > 0 else 0
    return int(steps[min(alive[-1] + 1, len(steps) - 1)])
