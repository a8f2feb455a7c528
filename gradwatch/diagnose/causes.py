"""Which findings are consequences of which, and whether one that comes later says where an open incident began."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gradwatch.diagnose.execution import execution_of, lies_before, starts_before
from gradwatch.diagnose.naming import overlap
from gradwatch.history import History
from gradwatch.records import Alert, Finding, GradState, SkipReason

CAUSES: tuple[tuple[str, ...], ...] = (
    ("non_finite_input",),
    ("non_finite_weight",),
    ("non_finite_activation",),
    ("non_finite_loss",),
    ("non_finite_gradient",),
    ("gradients_not_zeroed",),
    ("double_softmax", "unnormalized_input"),
    ("poor_init",),
    ("dead_units", "saturated_activation"),
    ("exploding_gradient",),
    ("gradient_spike",),
    ("vanishing_gradient",),
    ("zero_gradient",),
    ("frozen_weights", "update_ratio_too_large", "update_ratio_too_small"),
    ("loss_diverging", "loss_spike", "loss_plateau"),
)
"""Rules, causes before their consequences."""

RANK = {rule: rank for rank, rules in enumerate(CAUSES) for rule in rules}

POISON = frozenset(name for names in CAUSES[:5] for name in names)
"""NaN and Inf: a bad value travels from one into the next."""

FROM_START = frozenset({"unnormalized_input", "poor_init"})
"""What is wrong from the first update and proved by many: what came of it in between may have been told before."""

# An activation that passes nothing starves what runs before it, under other names; and what is starved may die of it.
_BLOCKS = frozenset({"dead_units", "saturated_activation"})
_STARVED = frozenset({"vanishing_gradient", "zero_gradient"})
SYMPTOM = "loss_plateau"
"""What every other fault looks like from outside."""

# What is looked at in some updates only, and what is told of every update.
_SEEN_IN_LOOKS = frozenset({"non_finite_input", "non_finite_activation"})
_SEEN_AT_ONCE = frozenset({"non_finite_loss", "non_finite_gradient"})

BACK = 64
"""Records after its beginning in which an incident may still be told where it began, and to look for an earlier look in."""

Place = Callable[[Alert | Finding, Alert | Finding, History], bool]


@dataclass(frozen=True)
class _Fold:
    """Findings that are consequences of others though they name other modules."""

    causes: frozenset[str]
    consequences: frozenset[str]
    place: Place
    """Of a cause, a consequence and the history: whether they lie so that the one explains the other."""


def touches(cause: Alert | Finding, consequence: Alert | Finding, history: History) -> bool:
    """Whether they speak of the same place, or the one of what brings about the other's."""
    return overlap(cause.layers, consequence.layers) or any(
        cause.rule in fold.causes and consequence.rule in fold.consequences and fold.place(cause, consequence, history)
        for fold in _FOLDS
    )


def dies_of_it(cause: Alert, consequence: Alert | Finding, history: History) -> bool:
    """Whether an activation passes nothing because what feeds it was starved before; or layers are starved, or enlarge what passes them,
    because steps that replace the weights made them so; or activations block because weights grew without bound."""
    if cause.rule == "update_ratio_too_large" and (consequence.rule in _STARVED or explodes_in_depth(consequence)):
        return cause.step <= consequence.step and overlap(cause.layers, consequence.layers)
    if cause.rule == "exploding_gradient" and "growing" in cause.evidence and consequence.rule in _BLOCKS:
        return cause.step < consequence.step  # weights that have grown without bound
    starved = cause.rule in _STARVED and consequence.rule in _BLOCKS and cause.step < earliest(consequence, history)
    return starved and starts_before(history.meta, cause.parameters, consequence.layers)


def explodes_in_depth(finding: Alert | Finding) -> bool:
    """Whether it tells of growth towards the input, and not in time."""
    return finding.rule == "exploding_gradient" and "growing" not in finding.evidence


def earliest(finding: Alert | Finding, history: History) -> int:
    """The first step at which it may have begun: an activation may be blocked from the record after the last look at it."""
    if finding.rule not in _BLOCKS or not finding.step:
        return finding.step
    named = set(finding.layers)
    shared = {fact.name for fact in history.meta.layers if set(fact.places) & named}  # what it looked at may have been other places
    columns = [i for i, name in enumerate(history.layers) if name in named - shared]
    looked = np.isfinite(history.recent("saturated_fraction", BACK)[:, columns]).any(axis=1)
    looks = history.steps[-len(looked) :][looked]
    before = looks[looks < finding.step]
    return int(before[-1]) + 1 if before.size else finding.step


def is_origin(finding: Finding, alert: Alert, history: History) -> bool:
    """Whether an input or a module that is found bad in a look is where the loss or the gradient of an earlier record went bad.

    It is unless a look since then found everything finite on the way to a bad loss or gradient; and a module is only while the weights
    are finite, for those that went bad spoil every module.
    """
    if finding.rule not in _SEEN_IN_LOOKS or alert.rule not in _SEEN_AT_ONCE or finding.severity < alert.severity:
        return False
    age = history.recorded - 1 - alert.step
    if age > min(BACK, len(history) - 1) or not (finding.rule == "non_finite_input" or _weights_are_finite(history)):
        return False
    rows = age + 1
    spoilt = (history.recent("loss_terms", rows) > 0) & ~np.isfinite(history.recent("loss", rows))
    unscaled = history.recent("skip_reason", rows) != SkipReason.SCALER
    spoilt |= unscaled & (history.recent("grad_nonfinite", rows) > 0).any(axis=1)
    counts = history.recent("activation_nonfinite", rows)
    passed = np.isfinite(counts).any(axis=1) & ~(counts > 0).any(axis=1) & ~(history.recent("input_nonfinite", rows) > 0)
    return not bool((spoilt & passed).any())


def _weights_are_finite(history: History) -> bool:
    weights = history.recent("weight_norm", 1)[0]
    reached = (history.recent("grad_state", 1)[0] & np.uint8(GradState.REACHED)) != 0
    return bool(reached.any() and np.isfinite(weights[reached]).all() and not np.isinf(weights).any())


def _before(cause: Alert | Finding, consequence: Alert | Finding, history: History) -> bool:
    return lies_before(history.meta, consequence.parameters, cause.layers)


def _up_to_the_next(cause: Alert | Finding, consequence: Alert | Finding, history: History) -> bool:
    """The layer right behind dead units is given zeros, so that its matrices get a gradient of exactly zero."""
    meta = history.meta
    rank, dead = execution_of(meta).rank, set(cause.layers)
    ends = [int(rank[i]) for i, fact in enumerate(meta.layers) if fact.name in dead]
    later = [int(i) for i in meta.layer_index if i >= 0 and ends and rank[i] > max(ends)]
    if not later:
        return False
    behind = min(later, key=lambda i: int(rank[i]))
    theirs = np.flatnonzero(meta.layer_index == behind)
    matrices = [i for i in theirs if len(meta.parameters[i].shape) >= 2]
    if not matrices or not len(history) or history.recent("grad_norm", 1)[0][matrices].any():
        return False
    layers = (*cause.layers, meta.layers[behind].name)
    return lies_before(meta, consequence.parameters, layers)


def _anywhere(cause: Alert | Finding, consequence: Alert | Finding, history: History) -> bool:
    """What began wrong spoils the whole model; and where one end of it explodes, the other end is small beside that."""
    return True


_FOLDS = (
    _Fold(FROM_START, frozenset(name for names in CAUSES[8:] for name in names), _anywhere),
    _Fold(frozenset({"exploding_gradient"}), frozenset({"vanishing_gradient", "frozen_weights"}), _anywhere),
    _Fold(_BLOCKS, _STARVED, _before),
    _Fold(frozenset({"dead_units"}), _STARVED, _up_to_the_next),
)
