"""Letting somebody act on gradients right before an optimizer steps: with what they hold then, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.capture import private
from gradwatch.capture.buffers import Buffers
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
    "gradwatch was asked to act on gradients before the step, but the weights were changed without a step of a torch optimizer (by hand, or "
    "by one like SAM that moves them first), so that there is no moment before it. Act in your own loop, or watch without clip= and on_rule=, "
    "and with on_nonfinite='warn'."
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
        skips: it may leave a step out, or raise before it.
    """

    @property
    def needs_norms(self) -> bool: ...
    @property
    def restores_buffers(self) -> bool | None: ...
    @property
    def skips(self) -> bool: ...

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


class Acting:
    """Lets an actor act on what is about to be stepped, and writes down what it did.

    Args:
        act: the actor.
        models: the watched models.
        table: their parameters.
        gradients: what is read of their gradients.
        later: has something done right before the next forward pass, and says whether that can be seen to begin.
    """

    def __init__(
        self,
        act: Act,
        models: Mapping[str, nn.Module],
        table: ParameterTable,
        gradients: Gradients,
        later: Callable[[str, Callable[[], None]], bool],
    ) -> None:
        self._act, self._models, self._table, self._gradients = act, models, table, gradients
        self._later = later
        self._read: dict[int, tuple[int, int]] = {}
        self._buffers: Buffers | None = None
        self._named: tuple[Any, Sequence[int], _Names] = (None, (), _NOBODY)

    @property
    def needs_norms(self) -> bool:
        """It decides by numbers on the host."""
        return self._act.needs_norms

    def scan(self) -> None:
        """The watch begins, or the models have changed."""
        self._named = (None, (), _NOBODY)
        if self._act.skips:
            self._buffers = Buffers(self._models.values(), self._act.restores_buffers)

    def after_backward(self, draft: Draft) -> None:
        """The gradients of the record at hand have been read."""
        if self._act.needs_norms and not draft.remote:
            params = self._table.params
            self._read = {
                slot: (id(g), private.version(g))
                for slot in np.flatnonzero(draft.state).tolist()
                if (g := params[slot].grad) is not None
            }
        if self._buffers is not None and draft.by_scaler and draft.nonfinite.any():
            self._buffers.restore()  # the scaler will leave the step out, and nobody hears of it before the next backward

    def before_step(
        self,
        draft: Draft,
        key: int,
        optimizer: Optimizer,
        there: Sequence[int],
        probes: Probes,
        *,
        step: int,
        reader: NormReader,
        heads: set[int],
        write_provisional: Callable[[], None],
    ) -> None:
        """Let the actor act.

        Args:
            draft: of the record.
            key: of the optimizer.
            optimizer: the one that is about to step.
            there: slots of what it is about to step.
            probes: those of them that were looked at again.
            step: number of the record.
            reader: reads norms again where somebody has changed them.
            heads: slots in a last layer.
            write_provisional: see `Due`.

        Raises:
            Deliberate: carries what the actor raised.
        """
        names = self._names(there, heads)
        again = not draft.remote and (probes.touched or self._is_changed(there))
        due = Due(
            optimizer=optimizer,
            step=step,
            params=names.tensors,
            names=names.parameters,
            layers=names.layers,
            heads=names.heads,
            norms=_read_again(there, self._table, reader) if again else self._gradients.norm[names.slots] * probes.expected,
            # The loss scale is still on the gradients of a fused optimizer; for all others it is divided out by now.
            factor=draft.scale * probes.expected,
            found_inf=getattr(optimizer, "found_inf", None) is not None,
            write_provisional=write_provisional,
        )
        if draft.remote:
            self._act_on_device(due, draft, there, reader)
            return
        left_out = True
        try:
            reason = self._act_on_host(due, draft, there, probes)
            left_out = reason is not SkipReason.NONE
            if left_out:
                draft.left_out[key] = reason
        finally:  # what is raised leaves the step out, too
            if left_out and self._buffers is not None:
                self._buffers.restore()

    def after_step(self, draft: Draft, key: int, optimizer: Optimizer, found_inf: bool) -> bool:
        """The step has returned; whether it changed nothing, as one does that a GradScaler had told to."""
        if key in draft.left_out:
            self._act.stepped(optimizer)
            return True
        buffers = self._buffers
        # Right before the next forward pass, for between the two they may be loaded, reset or moved on.
        if buffers is not None and not found_inf and not draft.nonfinite.any() and not self._later("buffers", buffers.keep):
            buffers.keep()
        return found_inf

    def _is_changed(self, slots: Sequence[int]) -> bool:
        """Whether a gradient is another one than was read, or was changed in place: a hint, for unscaling does not move the version."""
        params, read = self._table.params, self._read
        return any((g := params[slot].grad) is not None and read.get(slot, (0, 0)) != (id(g), private.version(g)) for slot in slots)

    def _act_on_host(self, due: Due, draft: Draft, there: Sequence[int], probes: Probes) -> SkipReason:
        try:
            acted = self._act(due)
        except Exception as error:
            draft.raised = isinstance(error, (NonFiniteGradientError, RuleError))
            raise Deliberate(error) from error
        coef = acted.coef
        if coef is None:
            before, after = probes.ratios, self._gradients.scaled_since(probes.slots)
            with np.errstate(all="ignore"):
                seen = (after / before)[np.isfinite(after) & (before > 0)] if before is not None else after[:0]
            coef = float(seen.min()) if seen.size else float("nan") if draft.norm_on_device else 1.0
        if coef != coef or abs(coef - 1.0) > UNCHANGED:
            draft.clipped(there, coef * (draft.clip_coef if probes.touched else 1.0))
        draft.aside |= acted.aside
        return acted.skip

    def _act_on_device(self, due: Due, draft: Draft, there: Sequence[int], reader: NormReader) -> None:
        try:
            coef = self._act.on_device(due)
        except Exception as error:
            raise Deliberate(error) from error
        slab = reader.slabs.get(coef.device) if coef is not None else None
        if coef is not None and slab is not None:
            slab.add_clip_coef(coef)
            draft.clipped_on_device += there

    def _names(self, slots: Sequence[int], heads: set[int]) -> _Names:
        """Names of slots, worked out anew where something has changed."""
        key = (id(slots), len(slots), len(heads))
        if self._named[0] != key:
            ends = {self._table.layers[slot] for slot in heads}
            layers = [self._table.layers[slot] for slot in slots]
            last = frozenset(i for i, layer in enumerate(layers) if layer in ends)
            params = [self._table.params[slot] for slot in slots]
            self._named = (
                key,
                slots,
                _Names([self._table.names[slot] for slot in slots], layers, last, params, np.array(slots, np.int64)),
            )
        return self._named[2]


class _Names(NamedTuple):
    """Names of parameters and of the modules that hold them, which lie in a last layer, the parameters, and their slots: int64 `[N]`."""

    parameters: Sequence[str]
    layers: Sequence[str]
    heads: frozenset[int]
    tensors: Sequence[Tensor]
    slots: NDArray[np.int64]


_NOBODY = _Names((), (), frozenset(), (), np.zeros(0, np.int64))


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
