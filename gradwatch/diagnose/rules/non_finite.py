"""NaN and Inf, under their true names: in a weight, in the loss, in a gradient. What goes bad on the way forward: `forward.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gradwatch.diagnose.naming import named
from gradwatch.diagnose.rules.rule import harm, persistent, sampled
from gradwatch.history import History
from gradwatch.records import Finding, GradState, Severity, SkipReason


@sampled
@persistent(5)
def non_finite_weight(history: History) -> Iterator[Finding]:
    """A weight holds a NaN or an Inf before the step.

    `weight_norm` is Inf, or it is NaN for a parameter that the record reached while it is a number for another one: NaN alone says
    that nothing was observed. All of them at once: where the record before had a number for each of those, and no gradient that was
    not finite, and this one has an activation that is not. Judged on full-statistics updates.

    Ignored: weights that were not looked at in the record.

    Example:
        >>> model[0].weight.data[0, 0] = float("nan")
        >>> with GradWatch(model):
        ...     train(model, optimizer)
    """
    weights = _last(history, "weight_norm")
    if weights is None:
        return
    fine = np.isfinite(weights)
    if fine.all() or not (fine.any() or np.isinf(weights).any() or _were_replaced(history)):
        return
    reached = (history.recent("grad_state", 1)[0] & np.uint8(GradState.REACHED)) != 0
    bad = np.isinf(weights) | (np.isnan(weights) & reached)
    if not bad.any():
        return
    count = int(bad.sum())
    yield Finding(
        "non_finite_weight",
        Severity.ERROR,
        history.recorded - 1,
        parameters=_by_order(history, bad),
        message=f"{count} of {int(reached.sum())} weights hold NaN or Inf before the step",
        evidence={"parameters": count, "reached": int(reached.sum())},
    )


def _were_replaced(history: History) -> bool:
    """All weights have gone bad since the last record, and not by its step: its gradients were finite."""
    if history.recorded < 2 or not history.full:
        return False
    before = history.recent("weight_norm", 2)[0]
    state = history.recent("grad_state", 2)
    reached = ((state[0] & state[1]) & np.uint8(GradState.REACHED)) != 0
    last_bad = history.recent("grad_nonfinite", 2)[0][reached]
    forward = history.recent("activation_nonfinite", 1)[0]
    return bool(reached.any() and np.isfinite(before[reached]).all() and not (last_bad > 0).any() and (forward > 0).any())


@persistent(5)
def non_finite_loss(history: History) -> Iterator[Finding]:
    """The loss is NaN or Inf in a record in which it was seen.

    At once, under a GradScaler too: a loss that only its scale makes overflow is recorded as one that was not seen.

    Ignored: a loss that was not seen, or that only its scale makes overflow.

    Example:
        >>> with GradWatch(model):
        ...     loss = F.mse_loss(model(x), y) + torch.tensor(0.0).log()
        ...     loss.backward()
    """
    losses = history.recent("loss", 1).astype(np.float64)
    if not losses.size or np.isfinite(losses[-1]) or not history.recent("loss_terms", 1)[0] > 0:
        return
    b = history.baselines
    value = "Inf" if np.isinf(losses[-1]) else "NaN"
    severity, left_out = harm(history)
    before = [x for x in b.losses if np.isfinite(x)]
    yield Finding(
        "non_finite_loss",
        severity,
        history.recorded - 1,
        message=f"the loss is {value}" + (f", after {before[-1]:.4g}" if before else " from the first update") + left_out,
        evidence={"last_finite_loss": before[-1]} if before else {},
    )


@persistent(5)
def non_finite_gradient(history: History) -> Iterator[Finding]:
    """A gradient holds a NaN or an Inf in a record that no GradScaler skipped.

    Parameters are named from the loss towards the input, the way a bad value travels. A finite gradient whose norm overflows is no
    case of it (`grad_nonfinite` is 0), and a scaler that searches its scale skips such records.

    Ignored: records that a GradScaler skips; a norm that overflows while all elements are finite.

    Example:
        >>> with GradWatch(model):
        ...     (model(x) - y).square().sum(1).sqrt().mean().backward()  # a row is met exactly: 0 * Inf
        ...     optimizer.step()
    """
    # The norm of all is finite only if all are.
    if not history.recorded or math.isfinite(history.recent("total_norm", 1)[0]):
        return
    if history.recent("skip_reason", 1)[0] == SkipReason.SCALER:
        return
    bad = _bad_gradients(history)
    if not bad.any():
        return
    counts = history.recent("grad_nonfinite", 1)[0]
    elements, count = float(np.nansum(counts[bad])), int(bad.sum())
    severity, left_out = harm(history)
    yield Finding(
        "non_finite_gradient",
        severity,
        history.recorded - 1,
        parameters=_by_order(history, bad),
        message=f"{elements:.0f} gradient elements are NaN or Inf, in {count} of {int(np.isfinite(counts).sum())} parameters"
        + left_out,
        evidence={"elements": elements, "parameters": count},
    )


def _last(history: History, name: str) -> NDArray[np.float32] | None:
    values: NDArray[np.float32] = history.recent(name, 1)
    return values[0] if len(values) else None


def _bad_gradients(history: History) -> NDArray[np.bool_]:
    with np.errstate(invalid="ignore"):
        bad: NDArray[np.bool_] = history.recent("grad_nonfinite", 1)[0] > 0
    return bad


def _by_order(history: History, mask: NDArray[np.bool_]) -> tuple[str, ...]:
    """Names, those executed last first."""
    columns = np.flatnonzero(mask)
    order = np.nan_to_num(history.meta.order[columns], nan=-1.0)
    return named(history.meta, columns[np.argsort(-order, kind="stable")])
