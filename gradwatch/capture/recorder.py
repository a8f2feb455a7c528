"""From the events of a training loop to rows of the history: the clock's wiring to parameters, gradients, weights and owners."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.capture import private
from gradwatch.capture.description import InitialFacts, describe
from gradwatch.capture.gradients import UNCHANGED, Gradients
from gradwatch.capture.graph import find_unregistered, walk
from gradwatch.capture.norms import TINY, NormReader, exact
from gradwatch.capture.optimizers import Owners
from gradwatch.capture.parameters import ParameterTable, dense, on_host
from gradwatch.capture.roles import Roles, roles
from gradwatch.capture.slab import GRADIENTS, LOSS, PROBES, SCALARS, WEIGHTS
from gradwatch.capture.weights import WeightSample
from gradwatch.clock import Clock, Open, Outcome, Pre
from gradwatch.facts import Meta, Pending
from gradwatch.records import GradState, NonFiniteGradientError, Sampling, SkipReason

_HAND_SCALE_AFTER = 3
"""Updates running with the same exact power of two on all probes after which it is taken for a loss scale by hand."""

_FROZEN_AFTER = 5
"""Records running with the same parameters frozen after which the static facts follow: before a missing gradient is told (9 steps)."""

_OUTSIDE_AFTER = 5
"""Records after which leaves outside the model are looked for in the process's optimizers."""


@dataclass(slots=True)
class _Probes:
    """Gradients that are looked at again right before a step.

    Attributes:
        slots: the few that are looked at.
        of: all that their optimizer is about to step.
        by_scaler: a GradScaler has divided its scale out of them by now.
        expected: their norms over those read, if nobody else touched them.
        touched: somebody did.
    """

    slots: Sequence[int]
    of: Sequence[int]
    by_scaler: bool
    expected: float = 1.0
    touched: bool = False


@dataclass(slots=True)
class Draft:
    """What is known of the open record, by slot."""

    full: bool
    cadence: frozenset[int]
    norm: NDArray[np.float64]
    nonfinite: NDArray[np.float64]
    weight_norm: NDArray[np.float64]
    ratio: NDArray[np.float64]
    lr: NDArray[np.float64]
    state: NDArray[np.uint8]
    loss: float = 0.0
    terms: int = 0
    told: list[float] = field(default_factory=list)
    scale: float = 1.0
    by_scaler: bool = False
    raised: bool = False
    clip_coef: float = 1.0
    in_pre: set[int] = field(default_factory=set)
    noted: set[int] = field(default_factory=set)
    probes: list[_Probes] = field(default_factory=list)
    remote: list[int] = field(default_factory=list)
    norm_on_device: bool = False
    remote_loss: bool = False

    @classmethod
    def blank(cls, size: int, full: bool, cadence: frozenset[int]) -> Draft:
        nan = np.full((4, size), np.nan)
        return cls(full, cadence, nan[0], np.zeros(size), nan[1], nan[2], nan[3], np.zeros(size, np.uint8))

    def flag(self, slots: Any, state: GradState) -> None:
        """Set a flag on some slots (indices or a mask)."""
        self.state[slots] |= np.uint8(state)

    def resize(self, size: int) -> None:
        more = size - len(self.norm)
        for name in ("norm", "weight_norm", "ratio", "lr"):
            setattr(self, name, np.append(getattr(self, name), np.full(more, np.nan)))
        self.nonfinite = np.append(self.nonfinite, np.zeros(more))
        self.state = np.append(self.state, np.zeros(more, np.uint8))


@dataclass(slots=True)
class _Closed:
    """A closed record on its way to the history."""

    outcome: Outcome
    record: Open
    draft: Draft
    owners: NDArray[np.int64]
    time: float


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


class Deliberate(Exception):
    """Carries an error that was asked for out of the hooks: the user's loop shall see its cause."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


_INSIDE_BACKWARD = (
    "gradwatch was asked to act on gradients before the step, but this optimizer steps inside backward(), where they are not complete "
    "yet and other steps have already been taken. Clip inside your own hook, or watch without clip= and with on_nonfinite='warn'."
)


_BY_HAND = (
    "gradwatch was asked to act on gradients before the step, but the weights were changed without a torch optimizer, so that there is no "
    "moment before it. Clip in your own loop, or watch without clip= and with on_nonfinite='warn'."
)


class Recorder:
    """Turns the events of a loop into rows.

    Args:
        models: the watched models, under "" or their keys.
        sampling: how much is looked at.
        blank_row: gives an empty row of the history's present layout.
        recorded: gives the number of the next record.
        on_row: takes a finished row.
        on_meta: takes the static facts when they change.
        act: acts right before a step. None: nobody does.
        scaler: the only GradScaler that is heard; None: any.
        started: `time.perf_counter()` of second 0; None: now.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        sampling: Sampling,
        *,
        blank_row: Callable[[], NDArray[Any]],
        recorded: Callable[[], int],
        on_row: Callable[[NDArray[Any]], None],
        on_meta: Callable[[Meta], None],
        act: Act | None = None,
        scaler: Any = None,
        started: float | None = None,
    ) -> None:
        self._sampling = sampling
        self._blank_row, self._on_row, self._on_meta = blank_row, on_row, on_meta
        self._recorded = recorded
        self._act = act
        self._scaler = scaler
        self.table = ParameterTable(models)
        self.owners = Owners(self.table)
        self.clock = Clock(self.owners.owner_of)
        self._reader = NormReader(self.table.params)
        self.gradients = Gradients(self.table.params, self._reader)
        self.weights = WeightSample(self.table.params)
        self._initial = InitialFacts()
        self._order: dict[int, int] = {}
        self._roles = Roles()
        self._distance: dict[int, int] = {}
        self._walked: set[int] = set()
        self._walked_all = False
        self._unreached: set[int] | None = None
        self._opaque = False
        self._outside: list[weakref.ref[Tensor]] = []
        self._outside_due = _OUTSIDE_AFTER
        self._outside_facts: tuple[tuple[tuple[int, ...], ...], tuple[str, ...]] = ((), ())
        self._searched: set[int] = set()
        self._counts: dict[frozenset[int], int] = {}
        self._draft: Draft | None = None
        self._queue: list[_Closed] = []
        self._told: list[Any] = []
        self._pending_scale: float | Tensor | None = None
        self._hand_scale = 1.0
        self._hand_seen: list[float] = []
        self._foreign_steps = self._unowned = 0
        self._ever_stepped = False
        self._dirty = False
        self._frozen_seen: list[list[bool]] = []
        self._steps_without: set[int] = set()
        self._versions: list[tuple[int, int]] = []
        self._started = time.perf_counter() if started is None else started
        self.unfinished = 0
        self._describe()

    # -- what the loop does --------------------------------------------------------------------------------------------------------

    def reaches(self, roots: Sequence[Any], here: bool) -> bool:
        """Whether the graph of `roots` holds a watched parameter; where it hides something, as `here` (its own thread) lets expect."""
        if self.table.changed():
            self._rescan()
        facts = walk(roots, self.table.slot_of)
        return bool(facts.distance) or (facts.opaque and here)

    def backward_begin(self) -> None:
        """The outermost backward starts."""
        self._drain(force=False)
        if self.table.changed():
            self._rescan()
        if self.clock.steps_running():
            self._forget_broken_steps(0)
        outcome = self.clock.backward_begin(self._cleared, self._moved)
        if outcome is not None:
            self._finish(outcome)
        self.gradients.begin()

    def backward_end(self, roots: Sequence[Any], scalar: bool) -> None:
        """The outermost backward has returned."""
        reached = self.gradients.end()
        if not reached and (self.clock.open is None or not self.clock.open.stepped_in_backward):
            self.forget_scale()
        record = self.clock.open
        fresh = [slot for slot in reached if slot not in self._draft.in_pre] if self._draft and self._draft.in_pre else reached
        read_here = record is None or record.evaluations == 1
        if reached and read_here and fresh:
            self._read(fresh)
        draft = self._draft
        if draft is not None and (reached or (record is not None and record.stepped_in_backward)) and read_here:
            self._take_scale(draft)
            if scalar:
                self._add_loss(draft, roots)
            self._take_told(draft)
            if reached is not self.gradients.everything or not self._walked_all:
                self._walk_if_new(reached, roots)
        outcome = self.clock.backward_end(reached)
        if outcome is not None:
            self._finish(outcome)

    def backward_failed(self) -> None:
        """The outermost backward raised."""
        self.clock.backward_failed()
        self.gradients.fail()
        self._dirty = self._draft is not None

    def scale(self, scaler: Any) -> None:
        """A GradScaler has scaled a loss."""
        if self._scaler is not None and scaler is not self._scaler:
            return
        scale = private.scale_of(scaler)
        if scale is not None:
            self._pending_scale = float(scale) if on_host(scale) else scale

    def forget_scale(self) -> None:
        """What was scaled was another model's loss."""
        self._pending_scale = None

    def pre_step(self, optimizer: Optimizer, closure: bool) -> tuple[int | None, bool]:
        """An optimizer is about to step.

        Returns:
            Its key if it owns something watched, and whether an actor has to act at the end of its closure.
        """
        key, changed = self.owners.adopt(optimizer)
        if changed:
            self.clock.owners_changed()
            self._describe()
        if key is None:
            return None, False
        if self.clock.steps_running():
            self._forget_broken_steps(1)
        self._find_owners()
        act, outcome = self.clock.pre(key, closure, lambda: self._held(key))
        if outcome is not None:
            self._finish(outcome)
        if act is Pre.WAIT:
            return key, self._act is not None
        record = self.clock.open
        if record is None or act is Pre.IGNORE:
            return key, False
        if act is Pre.READ:
            read = [slot for slot in record.reached if self._draft is None or slot not in self._draft.in_pre]
            self._read(read)
            self._find_owners()
            if self._draft is not None:
                self._draft.in_pre.update(read)
                self._take_scale(self._draft)
        elif self._dirty:
            self._read([slot for slot in self.owners.slots(key) if slot in record.reached])
        self._dirty = False
        self.before_step(key)
        return key, False

    def before_step(self, key: int) -> None:
        """The gradients that the owner is about to use are there: note what happened to them, then act."""
        record, draft = self.clock.open, self._draft
        optimizer = self.owners.optimizer(key)
        if record is None or draft is None or optimizer is None:
            return
        mine = self.owners.slots(key)
        # The same list as last time where it is all of them: that is what the choice of probes is remembered by.
        reached = mine if record.reached >= self.owners.slot_set(key) else [slot for slot in mine if slot in record.reached]
        self._note_use(draft, key)
        gone = self.gradients.gone(reached)
        if gone:
            draft.flag(gone, GradState.CLEARED)
        if draft.full and not all(self.weights.taken[mine]):
            self.weights.take_before([slot for slot in mine if not self.weights.taken[slot]])
        there = [slot for slot in reached if not draft.state[slot] & GradState.CLEARED] if gone else reached
        scaled_on_device = getattr(optimizer, "grad_scale", None) is not None
        probes = _Probes(self.gradients.probes(there), there, by_scaler=draft.by_scaler and not scaled_on_device)
        if draft.remote:
            draft.probes.append(probes)
            self._send_probes(probes)
            if self._act is None:
                return
            self._await()
        else:
            self._look_at_probes(draft, probes, self.gradients.scaled_since(probes.slots))
        if self._act is not None and there and not draft.state[there[0]] & GradState.CLEARED:
            self._let_act(draft, optimizer, there, probes)

    def _look_at_probes(self, draft: Draft, probes: _Probes, ratios: NDArray[np.float64]) -> None:
        """What happened to the gradients between the read and the step: cleared, a loss scale divided out, or clipped."""
        if ratios.size and not any(ratios.tolist()) and self.gradients.cleared(probes.of):
            draft.flag(list(probes.of), GradState.CLEARED)
            return
        probes.expected = 1.0 / draft.scale if probes.by_scaler else 1.0
        self._see_hand_scale(draft, ratios)
        if not draft.by_scaler and draft.scale != 1.0:
            probes.expected = 1.0 / draft.scale
        coefs = [ratio / probes.expected for ratio in ratios.tolist() if math.isfinite(ratio)]
        probes.touched = any(abs(coef - 1.0) > UNCHANGED for coef in coefs)
        if probes.touched:
            self._clipped(draft, probes.of, min(coefs))

    def _send_probes(self, probes: _Probes) -> None:
        """Ask a device for the norms that `scaled_since` reads at once on the host."""
        with torch.no_grad():
            for slot in probes.slots:
                g = self.table.params[slot].grad
                slab = None if g is None else self._reader.slabs.get(g.device)
                if g is not None and slab is not None:
                    slab.cells[PROBES][slot].copy_(private.foreach_norm([dense(g)])[0])

    def _let_act(self, draft: Draft, optimizer: Optimizer, there: Sequence[int], probes: _Probes) -> None:
        if self.clock.in_backward:
            raise Deliberate(RuntimeError(_INSIDE_BACKWARD))
        # The loss scale is still on the gradients of a fused optimizer; for all others it is divided out by now.
        factor = draft.scale * probes.expected
        before = self.gradients.scaled_since(probes.slots)
        try:
            coef = self._act(  # type: ignore[misc]
                optimizer=optimizer,
                step=self._recorded() + len(self._queue),
                params=[self.table.params[slot] for slot in there],
                names=[self.table.names[slot] for slot in there],
                norms=self._read_again(there) if probes.touched else self.gradients.norm[list(there)] * probes.expected,
                factor=factor,
                found_inf=getattr(optimizer, "found_inf", None) is not None,
            )
        except Exception as error:
            draft.raised = isinstance(error, NonFiniteGradientError)
            raise Deliberate(error) from error
        if coef is None:
            after = self.gradients.scaled_since(probes.slots)
            with np.errstate(all="ignore"):
                seen = (after / before)[np.isfinite(after) & (before > 0)]
            coef = float(seen.min()) if seen.size else float("nan") if draft.norm_on_device else 1.0
        if coef != coef or abs(coef - 1.0) > UNCHANGED:
            self._clipped(draft, there, coef * (draft.clip_coef if probes.touched else 1.0))

    def _read_again(self, slots: Sequence[int]) -> NDArray[np.float64]:
        """Norms of gradients that somebody has changed since they were read; waits for a device."""
        gradients = [(slot, g) for slot in slots if (g := self.table.params[slot].grad) is not None]
        norms = np.full(len(self.table), np.nan)
        with torch.no_grad():
            lagging = self._reader.read([slot for slot, _ in gradients], [g for _, g in gradients], norms, PROBES)
            for slab in self._reader.slabs.values() if lagging else ():
                slab.send()
                mine = [slot for slot in lagging if self.table.params[slot].device == slab.table.device]
                norms[mine] = slab.values()[PROBES, mine]
            for slot, g in gradients:
                if not np.isfinite(norms[slot]):
                    norms[slot], bad = exact(g)
                    norms[slot] = np.nan if bad else norms[slot]
        return norms[list(slots)]

    def _note_use(self, draft: Draft, key: int) -> None:
        """The learning rate of the step, and the gradients in it that are left from an earlier one."""
        draft.noted.add(key)
        self.owners.write_lr(key, draft.lr)
        stale = self.gradients.uses_stale(self.owners.slots(key))
        if stale:
            draft.flag(stale, GradState.STALE)

    def post_step(self, optimizer: Optimizer) -> None:
        """A step has returned."""
        key, _ = self.owners.adopt(optimizer)
        if key is None:
            self.clock.foreign_post()
            self._foreign_steps += 1
            self._update_pending()
            return
        record, draft = self.clock.open, self._draft
        found = getattr(optimizer, "found_inf", None)
        found_inf = isinstance(found, Tensor) and bool(found.item())
        outermost = self.clock.steps_running() <= 1
        mine = self.owners.slots(key)
        if outermost:
            if draft is not None and key not in draft.noted:
                self._note_use(draft, key)  # its gradients came from a closure inside the step
            self.gradients.used(mine)
        if outermost and not found_inf and (record is None or draft is None):
            self._steps_without.add(key)  # nothing has reached what it owns since it stepped last
        elif draft is not None and outermost and not found_inf and (record is None or key not in record.owners):
            self._steps_without.add(key)
        elif draft is not None and outermost and not found_inf:
            draft.flag(self.owners.index(key), GradState.STEPPED)
            self._ever_stepped = True
            if draft.full:
                self._measure_change(draft, mine)
        if found_inf and draft is not None:
            draft.lr[self.owners.index(key)] = np.nan
        outcome = self.clock.post(key, found_inf)
        if outcome is not None:
            self._finish(outcome)

    def by_hand(self) -> None:
        """The user says that the update is over."""
        closed = self.clock.closed
        if self.clock.open is None:
            if closed is not None and closed.backward_calls:
                return  # backward passes are seen here, and the last one's update is over already
            slots = {slot for slot, p in enumerate(self.table.params) if p.grad is not None}
            if slots:
                self._read(sorted(slots))
                if self._draft is not None:
                    self._take_scale(self._draft)
            outcome = self.clock.by_hand(slots)
        else:
            outcome = self.clock.by_hand()
        if outcome is not None:
            self._finish(outcome)

    def exit(self) -> None:
        """The block is left."""
        outcome = self.clock.exit(self._moved, self._left_out)
        if outcome is not None:
            self._finish(outcome)
        self.drain()
        self.gradients.fail()

    def drain(self) -> None:
        """Give on all finished records, waiting for those whose numbers are on their way from a device."""
        self._drain(force=True)

    def told(self, value: Any) -> None:
        """The user says what the loss is."""
        if isinstance(value, Tensor):
            value = float(value.detach()) if on_host(value) else value.detach().clone()
        self._told.append(value)

    def know(self, optimizer: Optimizer) -> int | None:
        """Learn of an optimizer before it steps; returns its key, None where it owns nothing watched."""
        key, changed = self.owners.adopt(optimizer)
        if changed:
            self._describe()
        return key

    def suspect(self) -> None:
        """Something is wrong: full statistics at every update, as at the start."""
        self._counts.clear()

    # -- reading -------------------------------------------------------------------------------------------------------------------

    def _read(self, slots: list[int]) -> None:
        draft = self._draft
        if draft is None:
            cadence = self._cadence(slots)
            count = self._counts.get(cadence, 0)
            dense, every = self._sampling.dense, self._sampling.every
            full = count < dense or count % every == 0
            draft = self._draft = Draft.blank(len(self.table), full, cadence)
        self.gradients.read(slots)
        index: Any = slice(None) if slots is self.gradients.everything else slots
        draft.norm[index] = self.gradients.norm[index]
        draft.nonfinite[index] = self.gradients.nonfinite[index]
        draft.flag(index, GradState.REACHED)
        if self.gradients.lagging:
            draft.remote = sorted({*draft.remote, *self.gradients.lagging})
            draft.norm_on_device = True
        if draft.full or not draft.cadence:
            self._sample(draft, slots)
        elif not self._versions:
            self._versions = [(slot, private.version(self.table.params[slot])) for slot in slots[:3]]

    def _cadence(self, slots: Iterable[int]) -> frozenset[int]:
        owner_of = self.owners.owner_of
        return frozenset(owner_of[slot] for slot in slots if slot in owner_of)

    def _sample(self, draft: Draft, slots: list[int]) -> None:
        """The weights before the step: the sample of all that the owners of `slots` hold, the norms of `slots`."""
        owned = {slot for key in {self.owners.owner_of.get(slot) for slot in slots} - {None} for slot in self.owners.slots(key)}  # type: ignore[arg-type]
        new = sorted(slot for slot in owned.union(slots) if not self.weights.taken[slot])
        if new:
            self.weights.take_before(new)
        new = [slot for slot in slots if draft.weight_norm[slot] != draft.weight_norm[slot]]
        if draft.full and new:
            with torch.no_grad():
                params = [self.table.params[slot].detach() for slot in new]
                self._reader.read(new, params, draft.weight_norm, WEIGHTS)
                self._correct_weight_norms(draft, new, params)

    def _correct_weight_norms(self, draft: Draft, slots: list[int], params: list[Tensor]) -> None:
        """A norm that overflowed float32, or lost its squares, is read again; a weight that is not finite keeps its NaN or Inf."""
        norms = draft.weight_norm[slots]
        with np.errstate(invalid="ignore"):
            doubtful = np.flatnonzero(np.isinf(norms) | ((norms > 0) & (norms < TINY)))
        for i in doubtful.tolist():
            draft.weight_norm[slots[i]] = exact(params[i])[0]

    def _await(self) -> None:
        """Wait for the norms of this record that are still on a device: once an update, and only where somebody acts."""
        draft = self._draft
        if draft is None or not (draft.remote or draft.remote_loss):
            return
        self._drain(force=True)
        for slab in self._reader.slabs.values():
            slab.send()
        self._land(draft, still_there=True)

    def _land(self, draft: Draft, still_there: bool) -> None:
        """The copies that were sent for this record are on the host.

        Args:
            draft: the record.
            still_there: its gradients have not been stepped yet, so that a suspicious one can be read again.
        """
        arrived = {device: slab.values() for device, slab in self._reader.slabs.items()}
        remote, draft.remote = draft.remote, []
        for device, values in arrived.items():
            slots = [slot for slot in remote if self.table.params[slot].device == device]
            draft.norm[slots] = values[GRADIENTS, slots]
            draft.nonfinite[slots] = ~np.isfinite(draft.norm[slots])
            if draft.full:
                draft.weight_norm[slots] = values[WEIGHTS, slots]
            if draft.remote_loss:
                draft.loss += float(values[SCALARS, LOSS])
        draft.remote_loss = False
        if still_there:
            self.gradients.arrive(remote, draft.norm[remote])
            draft.norm[remote] = self.gradients.norm[remote]
            draft.nonfinite[remote] = self.gradients.nonfinite[remote]
        for probes in draft.probes:
            ratios = np.full(len(probes.slots), np.nan)
            for i, slot in enumerate(probes.slots):
                values_ = arrived.get(self.table.params[slot].device)
                if values_ is not None and draft.norm[slot] > 0:
                    ratio = values_[PROBES, slot] / draft.norm[slot]
                    ratios[i] = 1.0 if abs(ratio - 1.0) < UNCHANGED else ratio
            self._look_at_probes(draft, probes, ratios)
        draft.probes.clear()

    def _add_loss(self, draft: Draft, roots: Sequence[Any]) -> None:
        for root in roots:
            draft.terms += 1
            slab = self._reader.slabs.get(root.device)
            if slab is not None:
                slab.add_loss(root)
                draft.remote_loss = True
            else:
                value = root.detach()
                value = float(value.real if value.is_complex() else value)
                draft.loss = value if draft.terms == 1 else draft.loss + value

    def _take_scale(self, draft: Draft) -> None:
        if self._pending_scale is not None:
            draft.scale, draft.by_scaler = float(self._pending_scale), True
            self._pending_scale = None
        elif not draft.by_scaler:
            draft.scale = self._hand_scale

    def _take_told(self, draft: Draft) -> None:
        draft.told += [float(value) for value in self._told]
        self._told.clear()

    def _see_hand_scale(self, draft: Draft, ratios: NDArray[np.float64]) -> None:
        """The same exact power of two on all probes, three updates running, is a loss scale by hand."""
        if draft.by_scaler:
            return
        seen = ratios.tolist()
        if all(ratio == 1.0 for ratio in seen):
            self._hand_seen.clear()
            if seen and self._hand_scale != 1.0:
                self._hand_scale = draft.scale = 1.0  # nobody divides any more
            return
        one = seen[0] if all(math.isfinite(ratio) and abs(ratio - seen[0]) <= UNCHANGED * seen[0] for ratio in seen) else 1.0
        power = 2.0 ** round(math.log2(one)) if one > 0 else 1.0
        if power == 1.0 or abs(one / power - 1) > UNCHANGED:
            self._hand_seen.clear()
            return
        self._hand_seen = [*self._hand_seen, power] if set(self._hand_seen) <= {power} else [power]
        if len(self._hand_seen) >= _HAND_SCALE_AFTER:
            self._hand_seen = self._hand_seen[-_HAND_SCALE_AFTER:]
            self._hand_scale = draft.scale = 1.0 / power

    def _clipped(self, draft: Draft, slots: Sequence[int], coef: float) -> None:
        draft.clip_coef = min(draft.clip_coef, coef) if draft.clip_coef != 1.0 else coef
        if coef < 1.0:
            draft.flag(list(slots), GradState.CLIPPED)

    def _measure_change(self, draft: Draft, slots: list[int]) -> None:
        self.weights.take_after(slots)
        ratio, changed = self.weights.ratios(slots)
        draft.ratio[slots] = ratio
        draft.flag(np.asarray(slots)[changed], GradState.CHANGED)

    # -- what the clock asks -------------------------------------------------------------------------------------------------------

    def _cleared(self) -> bool:
        record = self.clock.open
        return record is not None and self.gradients.cleared(record.reached)

    def _moved(self) -> bool:
        record = self.clock.open
        if record is None:
            return False
        if self._versions:  # no sample was taken: a hint, for it does not move under `p.data.sub_`
            return any(private.version(self.table.params[slot]) != version for slot, version in self._versions)
        return self.weights.moved(sorted(record.reached))

    def _left_out(self) -> bool:
        """Gradients that are not finite are never stepped by a GradScaler, nor after an error: the update is over, though nothing followed."""
        draft = self._draft
        if draft is None or not draft.by_scaler:
            return draft is not None and draft.raised
        self._await()
        return not np.isfinite(draft.norm[draft.state > 0]).all()

    def _held(self, key: int) -> set[int]:
        closed = self.clock.closed
        # Where backward passes are seen, what another optimizer has just stepped by still lies there and is none of this one's.
        own = self.clock.in_backward or (closed is not None and closed.backward_calls > 0)
        return self.gradients.held(self.owners.slots(key) if own else range(len(self.table)))

    def _forget_broken_steps(self, own: int) -> None:
        """Steps that ended by an exception never came back; those still running stand on the stack."""
        running = private.running_steps() - own
        if running < self.clock.steps_running():
            self.clock.forget_steps(max(0, running))

    def _find_owners(self) -> None:
        """A reached parameter without a known owner: its optimizer may exist and not have stepped yet."""
        record = self.clock.open
        if record is None:
            return
        unowned = {slot for slot in record.reached if slot not in self.owners.owner_of} - self._searched
        if unowned:
            self._searched |= unowned
            if self.owners.find(unowned):
                self.clock.owners_changed()
            self._describe()

    # -- closing -------------------------------------------------------------------------------------------------------------------

    def _finish(self, outcome: Outcome) -> None:
        record, draft = self.clock.closed, self._draft
        self._draft = None
        self._dirty = False
        if record is None or draft is None:
            return
        if not outcome.is_record and draft.remote_loss:
            for slab in self._reader.slabs.values():
                slab.clear()
        if outcome is Outcome.UNFINISHED:
            self.unfinished += 1
            self._update_pending(record)
        elif outcome is Outcome.DROPPED:
            self._unowned += 1
            self._update_pending()
        else:
            if outcome is Outcome.BY_HAND:
                self._by_hand(draft, record)
            if outcome is Outcome.STEPPED:
                for key in self._steps_without - record.stepped:
                    draft.flag(self.owners.index(key), GradState.STEPPED)
                    self.owners.write_lr(key, draft.lr)
                self._steps_without.clear()
            if not self.clock.in_backward:  # else what was told last is of the update that begins
                self._take_told(draft)
            cadence = self._cadence(record.reached)
            self._counts[cadence] = self._counts.get(cadence, 0) + 1
            self._see_frozen()
            self._foreign_steps = self._unowned = 0
            closed = _Closed(outcome, record, draft, self.owners.owners, time.perf_counter() - self._started)
            self._queue.append(closed)
            if draft.remote or draft.remote_loss:
                self._drain(force=True, before=closed)
                for slab in self._reader.slabs.values():
                    slab.send()
            else:
                self._drain(force=True)
        self.weights.forget()
        self._versions.clear()
        if outcome is Outcome.BY_HAND and self._act is not None and not record.owners:
            raise Deliberate(RuntimeError(_BY_HAND))

    def _see_frozen(self) -> None:
        """Frozen or thawed for a few records running: then it is meant so. A GAN freezes its other half for one step only."""
        if not self.table.thawed():
            self._frozen_seen.clear()
            return
        pattern = [p.requires_grad for p in self.table.params]
        self._frozen_seen = [*self._frozen_seen, pattern] if self._frozen_seen[:1] in ([], [pattern]) else [pattern]
        if len(self._frozen_seen) >= _FROZEN_AFTER:
            self._frozen_seen.clear()
            self._rescan()

    def _by_hand(self, draft: Draft, record: Open) -> None:
        slots = sorted(slot for slot in record.reached if self.weights.taken[slot])
        if slots:
            self._measure_change(draft, slots)
            if not draft.full:
                draft.ratio[slots] = np.nan
        self.gradients.used(sorted(record.reached))
        self._ever_stepped = True

    def _drain(self, force: bool, before: _Closed | None = None) -> None:
        """Give finished records on, in order; one whose numbers are still on their way from a device may wait."""
        while self._queue and self._queue[0] is not before:
            closed = self._queue[0]
            draft = closed.draft
            if draft.remote or draft.remote_loss:
                if not force and not all(slab.arrived() for slab in self._reader.slabs.values()):
                    return
                self._land(draft, still_there=False)
            self._queue.pop(0)
            self._look_outside()
            self._update_pending(self.clock.open)
            self._on_row(self._row(closed))

    def _row(self, closed: _Closed) -> NDArray[Any]:
        draft, record, outcome = closed.draft, closed.record, closed.outcome
        row = self._blank_row()
        scale = draft.scale
        columns: Any = slice(None) if self.table.in_order and len(draft.norm) == len(self.table) else self.table.columns
        with np.errstate(all="ignore"):
            norm = draft.norm if scale == 1.0 else draft.norm / scale
            counted = norm
            if record.stepped:
                counted = self._without_strangers(closed, norm)
            if counted is norm:
                counted = norm[~np.isnan(norm) | (draft.nonfinite > 0)] if np.isnan(norm).any() else norm
            total = math.sqrt(float(counted.dot(counted)))
            if isinstance(columns, slice):
                self._write(row, draft, norm, slice(None), slice(None))
            else:
                shown = np.flatnonzero(columns[: len(norm)] >= 0)
                self._write(row, draft, norm, columns[shown], shown)
            if draft.told:
                row["loss"], row["loss_terms"] = np.mean(draft.told), len(draft.told)
            else:
                row["loss"], row["loss_terms"] = draft.loss / scale if draft.terms else np.nan, draft.terms
            if draft.by_scaler and math.isinf(row["loss"]):
                row["loss"], row["loss_terms"] = np.nan, 0  # the scaled loss overflowed: what it was is not known
            row["total_norm"] = total
        skipped = outcome in (Outcome.SKIPPED, Outcome.FOUND_INF)
        reason = SkipReason.NONE
        if skipped:
            by_scaler = outcome is Outcome.FOUND_INF or (draft.by_scaler and not np.isfinite(total))
            reason = SkipReason.RAISED if draft.raised else SkipReason.SCALER if by_scaler else SkipReason.NO_STEP
        row["clip_coef"] = draft.clip_coef
        row["skipped"], row["skip_reason"] = skipped, reason
        row["loss_scale"] = scale
        row["backward_calls"] = record.backward_calls
        row["time"] = closed.time
        return row

    def _without_strangers(self, closed: _Closed, norm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Leave the parameters of owners that did not step out of the record; the norms of those whose owner did."""
        draft, record = closed.draft, closed.record
        owners = closed.owners[: len(norm)]
        reached = draft.state & np.uint8(GradState.REACHED) > 0
        if record.owners == record.stepped and not (reached & (owners < 0)).any():
            return norm
        steps = np.isin(owners, np.array([key for key in record.stepped if isinstance(key, int)], np.int64))
        foreign = reached & (owners >= 0) & ~steps
        if foreign.any():
            draft.state[foreign] = 0
            draft.nonfinite[foreign] = 0
            for values in (norm, draft.weight_norm, draft.ratio, draft.lr):
                values[foreign] = np.nan
        return norm[reached & steps]

    def _write(self, row: NDArray[Any], draft: Draft, norm: NDArray[np.float64], to: Any, of: Any) -> None:
        row["grad_norm"][to] = norm[of]
        row["grad_state"][to] = draft.state[of]
        row["lr"][to] = draft.lr[of]
        if draft.full:
            row["weight_norm"][to] = draft.weight_norm[of]
            row["update_ratio"][to] = draft.ratio[of]
        nonfinite = draft.nonfinite[of]
        row["grad_nonfinite"][to] = np.where(np.isnan(norm[of]) & (nonfinite == 0), np.nan, nonfinite)

    # -- facts ---------------------------------------------------------------------------------------------------------------------

    pending: Pending = Pending()

    def _update_pending(self, record: Open | None = None) -> None:
        self.pending = Pending(
            backward_calls=record.backward_calls if record is not None else 0,
            unowned=self._unowned,
            foreign_steps=self._foreign_steps,
            ever_stepped=self._ever_stepped,
        )

    def _walk_if_new(self, reached: list[int], roots: Sequence[Any]) -> None:
        """Walk each graph that reaches a parameter which no walk was made for."""
        if self._walked.issuperset(reached):
            return
        self._walked.update(reached)
        self._walked_all = len(self._walked) == len(self.table)
        self._walk(roots)

    def _walk(self, roots: Iterable[Any]) -> None:
        roots = list(roots)
        facts, place = walk(roots, self.table.slot_of), roles(roots, self.table.slot_of)
        self._roles.inputs |= place.inputs
        self._roles.heads |= place.heads
        self._order.update({slot: number for slot, number in facts.order.items() if slot not in self._order})
        self._distance.update({slot: depth for slot, depth in facts.distance.items() if slot not in self._distance})
        self._opaque |= facts.opaque
        unreached = set(self.table.column_slots) - facts.distance.keys()
        self._unreached = unreached if self._unreached is None else self._unreached & unreached
        known = {id(ref()) for ref in self._outside}
        self._outside += [weakref.ref(leaf) for leaf in facts.outside if id(leaf) not in known]
        self._describe()

    def _look_outside(self) -> None:
        """After a few records: which leaves outside the model belong to no optimizer, and where they live. Once."""
        if self._outside_due <= 0 or not self._outside:
            return
        self._outside_due -= 1
        if self._outside_due:
            return
        leaves = [leaf for ref in self._outside if (leaf := ref()) is not None]
        orphans = self.owners.unowned(leaves)
        paths = find_unregistered(self.table.modules, orphans)
        self._outside_facts = (tuple(tuple(leaf.shape) for leaf in orphans), tuple(paths[id(x)] for x in orphans if id(x) in paths))
        self._describe()

    def _rescan(self) -> None:
        self.table.rescan()
        self._reader = NormReader(self.table.params)
        self.gradients.resize(self.table.params, self._reader)
        self.weights = WeightSample(self.table.params)
        if self._draft is not None:
            self._draft.resize(len(self.table))
        self.owners.refresh()
        self.clock.owners_changed()
        self._describe()

    def _describe(self) -> None:
        names = {slot: self.owners.name(key) for slot, key in self.owners.owner_of.items()}
        unreached = set() if self._unreached is None or self._opaque else self._unreached
        self._on_meta(
            describe(
                self.table,
                self._initial,
                owners=names,
                order=self._order,
                distance=self._distance,
                inputs=self._roles.inputs,
                heads=self._roles.heads,
                include=self._sampling.include,
                exclude=self._sampling.exclude,
                outside=self._outside_facts[0],
                outside_in_model=self._outside_facts[1],
                opaque=self._opaque,
                unreached=sorted(slot for slot in unreached if self.table.params[slot].requires_grad),
            )
        )
