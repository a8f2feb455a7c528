"""The loss scale of mixed precision, when it searches in vain."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gradwatch.diagnose.rules.rule import patient, persistent
from gradwatch.history import History
from gradwatch.records import Finding, Severity, SkipReason

SKIPS = 10
"""Skipped updates in a row. A GradScaler starts at 65536 and halves: a healthy search in float16 ends after 8 (at 256) or fewer."""

LOW = 16.0
"""Scale that goes with them. From 65536 it is reached after 12 skips; gradients that overflow there exceed 4000 in true units."""

ENDLESS_SKIPS = 25
"""Skips in a row that are no search at any scale: from 2**24, the largest start in common recipes, the scale is below 1."""


@patient
@persistent(SKIPS)
def loss_scale_collapse(history: History) -> Iterator[Finding]:
    """A GradScaler skips update after update, or its scale has fallen below 1.

    Yields when `SKIPS` updates in a row were skipped and the scale is at most `LOW`; when `ENDLESS_SKIPS` were; or when the scale
    is below 1, below a quarter of the first, and an update in the kept window was skipped. A scale set by hand is ignored, and a
    search that ends.

    Example:
        >>> scaler = torch.amp.GradScaler("cpu")
        >>> with GradWatch(model):
        ...     train(model, optimizer, scaler, loss=lambda x, y: F.mse_loss(model(x), y) * float("nan"))
    """
    b = history.baselines
    scale = history.recent("loss_scale", 1)
    if not scale.size:
        return
    now = float(scale[0])
    low = np.isfinite(now) and now <= LOW
    many = (b.skips >= SKIPS and low) or b.skips >= ENDLESS_SKIPS
    sunk = False
    if not many and np.isfinite(now) and now < 1.0 and now < 0.25 * b.first_scale:
        sunk = bool((history.recent("skip_reason", 512) == SkipReason.SCALER).any())
    if not (many or sunk):
        return
    step = history.recorded - b.skips if b.skips else history.recorded - 1
    yield Finding(
        "loss_scale_collapse",
        Severity.WARNING,
        max(0, step),
        message=f"{b.skips} updates in a row were skipped, the loss scale is {now:.3g}"
        if many
        else f"the loss scale fell from {b.first_scale:.3g} to {now:.3g}",
        evidence={"skips": b.skips, "loss_scale": now, "first_loss_scale": b.first_scale},
    )
