"""Letting somebody act on gradients right before an optimizer steps: with what they hold then, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from gradwatch.records import Acted, NonFiniteGradientError, RuleError, SkipReason

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

    Attributes:
        needs_norms: it decides by numbers on the host; else a clipper that reads gradients on their device is all that is asked.
        restores_buffers: whether an update that is left out takes back what it did to buffers (`Buffers`): True, False, or None where
            that is cheap.
        skips: it may leave a step out.
        foresees: it asks rules about the update before the step.
    """

    @property
    def needs_norms(self) -> bool: ...
    @property
    def restores_buffers(self) -> bool | None: ...
    @property
    def skips(self) -> bool: ...
    @property
    def foresees(self) -> bool: ...

    def __call__(self, due: Due) -> Acted:
        """Act. What it raises leaves the user's `step`."""
        ...

    def on_device(self, due: Due) -> Tensor | None:
        """The same without a number on the host: the factor, a 0-d tensor on the gradients' device; None: not known."""
        ...

    def stepped(self, optimizer: Optimizer) -> None:
        """The step that it left out has returned."""
        ...


@dataclass(frozen=True, slots=True)
class Due:
    """A step that is about to be made.

    Attributes:
        optimizer: the one that steps.
        step: number of the record.
        params: what it owns and a backward has reached, with a gradient.
        names: their names.
        layers: the modules that hold them.
        heads: indices of those in a last layer.
        norms: float64 `[N]`, 2-norms of their gradients as `p.grad` holds them now; NaN where they are still on a device.
        factor: what `p.grad` holds, divided by the true gradient (a loss scale that is still on it; 1 = none).
        found_inf: a GradScaler decides about this step on the device.
        write_provisional: write what is known of the record into the history's next row, as it will be if the step is made.
    """

    optimizer: Optimizer
    step: int
    params: Sequence[Tensor]
    names: Sequence[str]
    layers: Sequence[str]
    heads: frozenset[int]
    norms: NDArray[np.float64]
    factor: float
    found_inf: bool
    write_provisional: Callable[[], None]


def let_act(
    act: Act,
    due: Due,
    *,
    there: Sequence[int],
    probes: Probes,
    draft: Draft,
    gradients: Gradients,
) -> SkipReason:
    """Call `act`, and write into the draft what it did.

    Args:
        act: the actor.
        due: the step.
        there: slots of what it is about to step.
        probes: those of them that were looked at again.
        draft: of the record.
        gradients: what was read of their gradients.

    Returns:
        Why the step is left out; `NONE`: it is not.

    Raises:
        Deliberate: carries what the actor raised.
    """
    before = gradients.scaled_since(probes.slots)
    try:
        acted = act(due)
    except Exception as error:
        draft.raised = isinstance(error, (NonFiniteGradientError, RuleError))
        raise Deliberate(error) from error
    if acted.skip is not SkipReason.NONE:
        return acted.skip
    coef = acted.coef
    if coef is None:
        after = gradients.scaled_since(probes.slots)
        with np.errstate(all="ignore"):
            seen = (after / before)[np.isfinite(after) & (before > 0)]
        coef = float(seen.min()) if seen.size else float("nan") if draft.norm_on_device else 1.0
    if coef != coef or abs(coef - 1.0) > UNCHANGED:
        draft.clipped(there, coef * (draft.clip_coef if probes.touched else 1.0))
    return SkipReason.NONE


def act_on_device(act: Act, due: Due) -> Tensor | None:
    """Call `act` for gradients on a device, without waiting for it.

    Raises:
        Deliberate: carries what the actor raised.
    """
    try:
        return act.on_device(due)
    except Exception as error:
        raise Deliberate(error) from error


def read_again(slots: Sequence[int], table: ParameterTable, reader: NormReader) -> NDArray[np.float64]:
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
