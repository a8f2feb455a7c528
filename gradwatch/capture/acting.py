"""Letting somebody act on gradients right before an optimizer steps: with what they hold then, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.capture.draft import Draft, Probes
from gradwatch.capture.gradients import UNCHANGED, Gradients
from gradwatch.capture.norms import NormReader, exact
from gradwatch.capture.parameters import ParameterTable
from gradwatch.capture.slab import PROBES
from gradwatch.records import NonFiniteGradientError

INSIDE_BACKWARD = (
    "gradwatch was asked to act on gradients before the step, but this optimizer steps inside backward(), where they are not complete "
    "yet and other steps have already been taken. Clip inside your own hook, or watch without clip= and with on_nonfinite='warn'."
)

BY_HAND = (
    "gradwatch was asked to act on gradients before the step, but the weights were changed without a torch optimizer, so that there is no "
    "moment before it. Clip in your own loop, or watch without clip= and with on_nonfinite='warn'."
)


class Deliberate(Exception):
    """Carries an error that was asked for out of the hooks: the user's loop shall see its cause."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Act(Protocol):
    """Acts on gradients right before an optimizer steps.

    Args:
        optimizer: the one that is about to step.
        step: number of the record.
        params: what it owns and a backward has reached, with a gradient.
        names: their names.
        norms: float64, 2-norms of their gradients as `p.grad` holds them now.
        factor: what `p.grad` holds, divided by the true gradient (a loss scale that is still on it; 1 = none).
        found_inf: a GradScaler decides about this step on the device.

    Returns:
        The factor it applied to all gradients (1 = none), or None where it does not know it. What it raises leaves the user's `step`.
    """

    def __call__(
        self,
        *,
        optimizer: Optimizer,
        step: int,
        params: Sequence[Tensor],
        names: Sequence[str],
        norms: NDArray[np.float64],
        factor: float,
        found_inf: bool,
    ) -> float | None: ...


def let_act(
    act: Act,
    *,
    optimizer: Optimizer,
    step: int,
    there: Sequence[int],
    probes: Probes,
    draft: Draft,
    table: ParameterTable,
    gradients: Gradients,
    reader: NormReader,
) -> None:
    """Call `act`, and write into the draft what it did.

    Args:
        act: the actor.
        optimizer: the one that is about to step.
        step: number of the record.
        there: slots of what it is about to step.
        probes: those of them that were looked at again.
        draft: of the record.
        table: the watched parameters.
        gradients: what was read of their gradients.
        reader: reads norms again where somebody has changed them.

    Raises:
        Deliberate: carries what the actor raised.
    """
    before = gradients.scaled_since(probes.slots)
    try:
        coef = act(
            optimizer=optimizer,
            step=step,
            params=[table.params[slot] for slot in there],
            names=[table.names[slot] for slot in there],
            norms=_read_again(there, table, reader) if probes.touched else gradients.norm[list(there)] * probes.expected,
            # The loss scale is still on the gradients of a fused optimizer; for all others it is divided out by now.
            factor=draft.scale * probes.expected,
            found_inf=getattr(optimizer, "found_inf", None) is not None,
        )
    except Exception as error:
        draft.raised = isinstance(error, NonFiniteGradientError)
        raise Deliberate(error) from error
    if coef is None:
        after = gradients.scaled_since(probes.slots)
        with np.errstate(all="ignore"):
            seen = (after / before)[np.isfinite(after) & (before > 0)]
        coef = float(seen.min()) if seen.size else float("nan") if draft.norm_on_device else 1.0
    if coef != coef or abs(coef - 1.0) > UNCHANGED:
        draft.clipped(there, coef * (draft.clip_coef if probes.touched else 1.0))


def _read_again(slots: Sequence[int], table: ParameterTable, reader: NormReader) -> NDArray[np.float64]:
    """Norms of gradients that somebody has changed since they were read; waits for a device."""
    gradients = [(slot, g) for slot in slots if (g := table.params[slot].grad) is not None]
    norms = np.full(len(table), np.nan)
    with torch.no_grad():
        lagging = reader.read([slot for slot, _ in gradients], [g for _, g in gradients], norms, PROBES)
        for slab in reader.slabs.values() if lagging else ():
            slab.send()
            mine = [slot for slot in lagging if table.params[slot].device == slab.table.device]
            norms[mine] = slab.values()[PROBES, mine]
        for slot, g in gradients:
            if not np.isfinite(norms[slot]):
                norms[slot], bad = exact(g)
                norms[slot] = np.nan if bad else norms[slot]
    return norms[list(slots)]
