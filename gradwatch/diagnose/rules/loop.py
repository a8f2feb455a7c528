"""Faults of the training loop: gradients kept, steps never made, parameters that the loop forgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from gradwatch.diagnose.execution import execution_of
from gradwatch.diagnose.lists import Lists, lists_of
from gradwatch.diagnose.naming import layers_of, named, overlap
from gradwatch.diagnose.rules.rule import patient, persistent
from gradwatch.diagnose.tree import tree_of
from gradwatch.history import History, Meta
from gradwatch.records import Finding, GradState, Severity

STALE_STEPS = 5
"""Steps out of the last 10 with an old gradient in them. By the definition of the flag one is a fault already; five leave room for
a loop that skips a `zero_grad` now and then, and still speak at update 6."""

ENDLESS = 64
"""Backward passes in an open record after which the loop will not step: four times a long accumulation in common recipes (16)."""

NO_STEPS = 10
"""Records in a row that nothing stepped, or backward passes that nobody used: the earliest update at which persistence speaks."""

MISSED_STEPS = 12
"""Steps of its owner that never had a gradient for it, before a parameter is missing: 3 before the time to a verdict is over."""

MISSED_LATER = 9
"""The same for a parameter that every earlier record reached: a verdict has to come within 10 updates."""

MISSED_UNCALLED = 30
"""The same for a module known never to have been called, or one of a list of equals: an expert of 8 that the router picks for a
batch with probability 1/4 is idle for 30 updates once in 5,000 runs."""

ORPHANED = 10
"""Records in a row in which others stepped but not this one's owner. It has none, but it may be about to get one."""

IN_TURNS, BY = 5, 10
"""So many of so many records are enough, where not all reached it: of two optimizers that take turns (and both own the same network) half
of the records reach the other."""


@persistent(STALE_STEPS)
def gradients_not_zeroed(history: History) -> Iterator[Finding]:
    """When an owner steps, the gradient it uses still contains one it used at its previous step.

    A parameter is sick when the flag `GradState.STALE` stood in at least `STALE_STEPS` of its owner's last 10 steps. Accumulation,
    several backward passes in a record and another model's loss adding to it do not raise the flag.

    Ignored: whatever does not raise that flag: accumulation, several backward passes in a record, another model's loss.

    Example:
        >>> with GradWatch(model):
        ...     for x, y in loader:
        ...         criterion(model(x), y).backward(), optimizer.step()
    """
    b = history.baselines
    recent = b.stale & np.uint16(1023)
    if not recent.any():
        return
    count = _ONES[recent]
    sick = (count >= STALE_STEPS) & history.meta.trainable
    if not sick.any():
        return
    worst = int(count[sick].max())
    steps = b.stepped[sick]
    # The first step cannot contain an older gradient, so a loop that never clears has one stale step less than steps.
    from_start = bool((count[sick] >= np.minimum(steps, 11) - 1).any()) and int(steps.min()) <= 16
    step = _second_step(history, sick) if from_start else max(0, history.recorded - 10 + _first_one(int(recent[sick].max())))
    of = min(10, int(steps.max()))
    yield Finding(
        "gradients_not_zeroed",
        Severity.ERROR,
        step,
        parameters=named(history.meta, np.flatnonzero(sick)),
        message=f"{worst} of the last {of} steps used gradients that still held an earlier step's",
        evidence={"stale_steps": worst, "steps": of, "parameters": int(sick.sum())},
    )


@patient
@persistent(NO_STEPS)
def never_stepped(history: History) -> Iterator[Finding]:
    """Backward passes are cleared or piled up, no optimizer has ever stepped, and the weights stay as they are.

    Yields when no watched weight has ever moved and `NO_STEPS` records in a row were cleared without a step, or `ENDLESS` backward
    passes (`NO_STEPS` when the run ends) lie in the open record, or `NO_STEPS` were dropped because only optimizers that own
    nothing of this model stepped. Of a loop that has stepped before, only `ENDLESS` such dropped passes are its business, and only where
    an optimizer owns some of the weights (else `not_in_optimizer` tells): passes that are cleared may be meant so (saliency, Fisher
    information, an attack on the inputs, gradients of a validation).

    Ignored: loops that have stepped before and then only measure; other models' optimizers, as long as one of this model steps.

    Example:
        >>> with GradWatch(model):
        ...     for x, y in loader:
        ...         optimizer.zero_grad(), criterion(model(x), y).backward()
    """
    b, pending = history.baselines, history.pending
    if pending.ever_stepped or bool((b.stepped > 0).any()):
        if pending.unowned >= ENDLESS and not _disowned(history.meta).any():
            yield Finding(
                "never_stepped",
                Severity.WARNING,
                history.recorded,
                message=f"{pending.unowned} backward passes since the last step of an optimizer that owns these weights",
                evidence={"backward_calls": pending.unowned, "foreign_steps": pending.foreign_steps},
            )
        return
    piled = pending.backward_calls
    if b.idle >= NO_STEPS and b.idle == history.recorded:
        calls, what = b.idle, "backward passes were cleared and no optimizer stepped"
    elif pending.unowned >= NO_STEPS and pending.foreign_steps > 0:
        calls, what = pending.unowned, "backward passes, but the optimizers that step own none of these weights"
    elif history.recorded == b.idle and (piled >= ENDLESS or (history.ended and piled + b.idle >= NO_STEPS)):
        calls, what = piled + b.idle, "backward passes and not one optimizer step"
    else:
        return
    yield Finding(
        "never_stepped",
        Severity.WARNING,
        0,
        message=f"{calls} {what}",
        evidence={"backward_calls": calls, "foreign_steps": pending.foreign_steps, "steps": 0},
    )


@patient
@persistent(MISSED_LATER)
def missing_gradient(history: History) -> Iterator[Finding]:
    """Every trainable parameter of a module is reached by no backward pass over a window of its owner's steps.

    The window is `MISSED_STEPS` where none ever was; `MISSED_UNCALLED` for a module known never to have been called and for one of a list
    of equals that is not known to have been; `MISSED_LATER`, and at least five times the longest earlier gap, where one was, or where it
    was frozen before. Whether the modules were called in the window, if that was looked at, is told: it separates what forgets them from
    what detaches their output, and modules of the two kinds are told apart unless they make up one module. A parameter whose module (or the
    modules below it) has others that are reached is INFO: mask tokens and the like. `MISSED_STEPS` steps of optimizers that own watched
    parameters, before any of these has had a gradient or moved, are an ERROR: all of the model is cut off from the loss. Parameters without
    an owner that steps are ignored (a teacher), and so are experts (one of a list some of which are idle now and then, or called so).

    Example:
        >>> with GradWatch(model):
        ...     for x, y in loader:
        ...         step(model.head(model.body(x).detach()), y)
    """
    b, meta = history.baselines, history.meta
    steps = history.pending.empty_steps
    if not history.recorded and steps >= MISSED_STEPS:
        mine = np.flatnonzero(meta.trainable)
        yield Finding(
            "missing_gradient",
            Severity.ERROR,
            0,
            parameters=named(meta, mine),
            message=f"no gradient at all in {steps} steps for any of {_count(len(mine), 'parameter')}",
            evidence={"missed_steps": steps, "parameters": len(mine), "uncalled": 0, "called": 0, "reached_before": 0},
        )
        return
    window = np.where((b.reached == 0) & (b.frozen < 0), MISSED_STEPS, np.maximum(MISSED_LATER, 5 * b.gap))
    idle = (b.missed >= window) & meta.trainable & meta.owned
    if not idle.any():
        return
    whole = idle & _idle_modules(meta, idle)
    lists, never = lists_of(meta), b.reached == 0
    # Of experts some are reached; a list none of which ever was is no list of experts.
    waits = lists.equals & never & lists.others(~never)
    expert = whole & _experts(history, lists)
    due = (b.missed >= MISSED_UNCALLED) | (never & history.ended)
    calls = _calls(history, idle, window)
    open_ = whole & ~expert & ~due & ~(waits & ~(calls > 0.0))
    alarms = (whole & ~expert & due) | (open_ & ~(never & (calls == 0.0)))
    notes = (idle & ~whole) | expert
    for masks, severity in ((alarms, Severity.WARNING), (notes, Severity.INFO)):
        for mask in _by_fault(meta, masks, calls == 0.0):
            missed, count = int(b.missed[mask].min()), int(mask.sum())
            before, uncalled = int((mask & ~never).sum()), int((calls[mask] == 0.0).sum())
            called = int((calls[mask] > 0.0).sum())
            ever = "" if 0 < before < count else " any more" if before else " at all"
            yield Finding(
                "missing_gradient",
                severity,
                int(np.maximum(b.last_reached, b.frozen)[mask].min()) + 1,
                parameters=named(meta, np.flatnonzero(mask)),
                message=f"no gradient{ever} in {missed} steps for {_count(count, 'parameter')}{_why(count, before, uncalled, called)}",
                evidence={
                    "missed_steps": missed,
                    "parameters": count,
                    "uncalled": uncalled,
                    "called": called,
                    "reached_before": before,
                },
            )


@patient
@persistent(ORPHANED)
def not_in_optimizer(history: History) -> Iterator[Finding]:
    """Receives gradients, but no optimizer that steps owns it.

    A parameter is sick when `ORPHANED` records in a row reached it while an optimizer stepped (or `IN_TURNS` of the last `BY`, where the
    records take turns), and no optimizer is known to own it; all
    are when `ORPHANED` backward passes were dropped since the last record, for what steps owns none of them any more (other tensors
    took their places: `load_state_dict(assign=True)`).
    Trainable leaves of the graph that are no registered parameter are judged after as many records: those found in the attributes
    of a watched module (a layer in a plain list) are an ERROR; others are INFO, for a perceptual network or a teacher of the loss
    has such leaves in health. Loops without any optimizer are ignored, and frozen parameters.

    Example:
        >>> optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
        >>> with GradWatch(model):
        ...     train(model, optimizer)
    """
    b, meta = history.baselines, history.meta
    orphans = (b.orphan >= IN_TURNS) & ~meta.owned & meta.trainable
    if orphans.any():
        orphans &= (b.orphan >= ORPHANED) | _by_turns(history)
    if orphans.any():
        since = (b.last_reached - b.orphan + 1)[orphans]
        since[since <= 1] = 0  # in the first record nobody may have been known to step yet
        records = int(b.orphan[orphans].max())
        yield Finding(
            "not_in_optimizer",
            Severity.ERROR,
            max(0, int(since.min())),
            parameters=named(meta, np.flatnonzero(orphans)),
            message=f"{_count(int(orphans.sum()), 'parameter')} got gradients in {records} updates and no optimizer steps them",
            evidence={"updates": records, "parameters": int(orphans.sum())},
        )
    pending, lost = history.pending, _disowned(meta)
    if b.records and pending.unowned >= ORPHANED and pending.foreign_steps > 0 and lost.any():
        yield Finding(
            "not_in_optimizer",
            Severity.ERROR,
            history.recorded,
            parameters=named(meta, np.flatnonzero(lost)),
            message=f"{_count(int(lost.sum()), 'parameter')} got gradients in {pending.unowned} backward passes and no optimizer steps "
            "them any more",
            evidence={"updates": pending.unowned, "parameters": int(lost.sum())},
        )
    if (meta.outside or meta.outside_in_model) and b.records >= ORPHANED and bool((b.stepped >= ORPHANED).any()):
        inside = len(meta.outside_in_model)
        shapes = _shapes(meta.outside)
        if inside:
            paths = ", ".join(meta.outside_in_model[:2]) + (", …" if inside > 2 else "")
            yield Finding(
                "not_in_optimizer",
                Severity.ERROR,
                0,
                message=f"{_count(inside, 'trained tensor')} {shapes} not registered in the model ({paths})",
                evidence={"leaves": inside},
            )
        else:
            yield Finding(
                "not_in_optimizer",
                Severity.INFO,
                0,
                message=f"{_count(len(meta.outside), 'trainable tensor')} {shapes} outside the model in no optimizer",
                evidence={"leaves": len(meta.outside)},
            )


_ONES: NDArray[np.int64] = np.array([bin(i).count("1") for i in range(1024)])


def _first_one(bits: int) -> int:
    return 10 - bits.bit_length()


def _by_turns(history: History) -> NDArray[np.bool_]:
    """`[P]`: reached by `IN_TURNS` of the last `BY` records, and since the first two of them."""
    reached = (history.recent("grad_state", BY) & np.uint8(GradState.REACHED)) != 0
    turns: NDArray[np.bool_] = (len(reached) == BY) & (reached.sum(axis=0) >= IN_TURNS) & reached[:2].any(axis=0)
    return turns


def _disowned(meta: Meta) -> NDArray[np.bool_]:
    """`[P]`: the trainable parameters, where no optimizer owns any of them; none else."""
    return meta.trainable & ~(meta.trainable & meta.owned).any()


def _second_step(history: History, sick: NDArray[np.bool_]) -> int:
    """The first step that could use an old gradient of some parameters, for their owner had stepped once before; 0 from the beginning."""
    state = history.recent("grad_state", None)[:, sick]
    stepped = ((state & np.uint8(GradState.STEPPED)) != 0).any(axis=1)
    first = int(history.steps[np.argmax(stepped)])
    return first + 1 if first > 1 else 0


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    shown = sorted(set(shapes), key=prod, reverse=True)[:3]
    text = ", ".join("×".join(map(str, shape)) or "scalar" for shape in shown)
    return f"({text}{', …' if len(set(shapes)) > 3 else ''})"


def _idle_modules(meta: Meta, idle: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`[P]`: every trainable parameter of its module, and of the modules below that, is idle."""
    tree = tree_of(meta)
    busy = tree.held(tree.path[:, meta.trainable & ~idle]) > 0
    return ~busy[tree.own]


def _calls(history: History, mask: NDArray[np.bool_], window: NDArray[np.int64]) -> NDArray[np.float64]:
    """`[P]`: of some parameters, the most calls of their module in one record of their window; NaN where not known, and elsewhere.

    The window starts where a backward last reached them and does not move on, so that nothing else is told later. Not called in a
    model that is not called as a whole says nothing: parts that somebody calls by hand under `no_grad` are not seen.
    """
    b, meta = history.baselines, history.meta
    most = np.full(len(mask), np.nan)
    columns = np.flatnonzero(mask & (meta.layer_index >= 0))
    if not columns.size:
        return most
    execution, layer, oldest = execution_of(meta), meta.layer_index[columns], history.recorded - len(history)
    onset = b.last_reached[columns] + 1
    end = onset + np.where(b.reached[columns] == 0, MISSED_UNCALLED, window[columns])
    for first, last in np.unique(np.stack((onset, end)), axis=1).T.tolist():
        rows = history.between("calls", first, last) if first >= oldest else ()
        if not len(rows):
            continue
        calls, of = np.fmax.reduce(rows, axis=0), (onset == first) & (end == last)
        mine = calls[execution.caller[layer[of]]]
        most[columns[of]] = np.where((mine > 0) | (calls[execution.root[layer[of]]] > 0), mine, np.nan)
    return most


def _by_fault(meta: Meta, mask: NDArray[np.bool_], uncalled: NDArray[np.bool_]) -> Iterator[NDArray[np.bool_]]:
    """Some parameters, those of modules that are not called apart from the others, unless there is a module to name for both."""
    forgotten, others = mask & uncalled, mask & ~uncalled
    if forgotten.any() and others.any():
        both, one, other = (set(layers_of(meta, named(meta, np.flatnonzero(some)))) for some in (mask, forgotten, others))
        if both == one | other and not overlap(one, other):
            yield others
            yield forgotten
            return
    if mask.any():
        yield mask


def _why(count: int, before: int, uncalled: int, called: int) -> str:
    """What is known of the calls of the modules of so many parameters, of which some were reached before."""
    modules = "module is" if count == 1 else "modules are"
    if uncalled == count:
        return f": the {modules} {'no longer' if before == count else 'not' if before else 'never'} called"
    if called == count:
        return f", though the {modules} called"
    return f", {uncalled} of them in modules that are not called" if uncalled else ""


def _experts(history: History, lists: Lists) -> NDArray[np.bool_]:
    """`[P]`: lies in one of a list of equals some of which miss a step now and then, or whose name says so."""
    b = history.baselines
    reached = b.reached > 0
    return lists.others(reached) & (lists.expert | lists.others(reached & (b.reached < b.records - b.skips)))
