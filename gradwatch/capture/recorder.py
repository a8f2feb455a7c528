"""From the events of a training loop to rows of the history: the clock's wiring to parameters, gradients, weights and owners."""

from __future__ import annotations

import math
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.capture import private
from gradwatch.capture.acting import BY_HAND, INSIDE_BACKWARD, Act, Acting, Deliberate
from gradwatch.capture.call import PLAIN, Ask, Call, Case
from gradwatch.capture.description import InitialFacts, describe
from gradwatch.capture.draft import Closed, Draft, Probes
from gradwatch.capture.gradients import UNCHANGED, Gradients
from gradwatch.capture.graph import walk
from gradwatch.capture.held import Held
from gradwatch.capture.inside import Inside
from gradwatch.capture.norms import TINY, NormReader, exact
from gradwatch.capture.optimizers import Owners
from gradwatch.capture.parameters import ParameterTable, dense, on_host, unwrap
from gradwatch.capture.scale import LossScale
from gradwatch.capture.slab import CLIP_COEF, GRADIENTS, LOSS, PROBES, SCALARS, WEIGHTS
from gradwatch.capture.walks import Walks
from gradwatch.capture.weights import WeightSample
from gradwatch.clock import Clock, Open, Outcome, Pre
from gradwatch.facts import EMPTY, FROZEN_AFTER, Meta, Pending
from gradwatch.records import Alert, GradState, Inquiry, Sampling

_TURN = 64
"""Records after which an optimizer that has not stepped takes no turns with the others any more. Critics mostly step five times for one
step of their generator."""


class Recorder:
    """Turns the events of a loop into rows.

    Args:
        models: the watched models, under "" or their keys.
        sampling: how much is looked at.
        next_row: gives the history's next row to write into.
        recorded: gives the number of the next record.
        on_row: told that it is written, and whether it has full statistics.
        on_meta: takes the static facts when they change.
        here: whether this is the thread whose training is watched.
        notice: told what there is to say of the watch itself.
        act: acts right before a step. None: nobody does.
        scaler: the only GradScaler that is heard; None: any.
        ask: finds out why an update went wrong, before its step. None: nobody does, and nothing is held for it.
        waits: wait for a device before each step, so that `ask` can be asked.
        started: `time.perf_counter()` of second 0; None: now.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        sampling: Sampling,
        *,
        next_row: Callable[[], NDArray[Any]],
        recorded: Callable[[], int],
        on_row: Callable[[bool], None],
        on_meta: Callable[[Meta], None],
        here: Callable[[], bool],
        notice: Callable[[str], None],
        act: Act | None = None,
        scaler: Any = None,
        ask: Ask | None = None,
        waits: bool = False,
        started: float | None = None,
    ) -> None:
        self._sampling = sampling
        self._models = models
        self._next_row, self._on_row, self._on_meta = next_row, on_row, on_meta
        self._recorded = recorded
        self.table = ParameterTable(models)
        self.owners = Owners(self.table)
        self.clock = Clock(self.owners.owner_of)
        self._reader = NormReader(self.table.params)
        self.gradients = Gradients(self.table.params, self._reader)
        self.weights = WeightSample(self.table.params)
        self._initial = InitialFacts()
        self.scale = LossScale(scaler)
        self._walks = Walks(self.table)
        self.inside = Inside(models, self.table, sampling, here, notice)
        later = self.inside.hooks.before_next_forward
        self.acting = Acting(act, models, self.table, self.gradients, later) if act is not None else None
        self._ask, self._waits = ask, waits
        self._roots: Sequence[Any] = ()
        self.held = Held(here, notice, self._begins)
        self._late = False
        self._searched: set[int] = set()
        self._counts: dict[frozenset[int], int] = {}
        self._resumed: list[tuple[list[str], int]] = []
        self._draft: Draft | None = None
        self._queue: list[Closed] = []
        self._told: list[Any] = []
        self._foreign_steps = self._unowned = self._empty_steps = 0
        self._unmoved: tuple[weakref.ref[Tensor], Tensor] | None = None
        self._ever_stepped = False
        self._dirty = self._saw_loss = False
        self._frozen_seen: list[list[bool]] = []
        self._steps_without: set[int] = set()
        self._in_turn: dict[int, int] = {}
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

    def start(self) -> None:
        """Put hooks on modules; `stop` takes them out."""
        self.inside.scan()
        self._hold()
        self._listen()
        if self.acting is not None:
            self.acting.scan()

    def stop(self) -> None:
        """Nothing of the watch is left on the model."""
        self.inside.hooks.remove()
        self.held.remove()
        if self._ask is not None:
            self._ask.stop()

    def _begins(self, call: Call) -> None:
        """A forward pass of a watched model begins."""
        if self._ask is not None and self._ask.armed and not self.inside.hooks.compiled:
            self._ask.begin(call, self._case((), ()))

    def _hold(self) -> None:
        if self._ask is not None:
            self.held.scan([unwrap(model) for model in self._models.values()], self.inside.hooks.compiled)

    def backward_begin(self, roots: Sequence[Any]) -> None:
        """The outermost backward starts."""
        if self._ask is not None:
            self._ask.pause()
        self._drain(force=False)
        if self.table.changed():
            self._rescan()
        if self.clock.steps_running():
            self._forget_broken_steps(0)
        outcome = self.clock.backward_begin(self._cleared, self._moved)
        self._late = outcome is not None
        if outcome is not None:
            self._finish(outcome)
        self.inside.hooks.begin_backward(roots)
        self._saw_loss = self._walks.looks_at_loss
        if self._saw_loss:
            self._walks.see_loss(roots, self.scale.ahead(self._draft))
        if self._ask is not None and self.held.calls:
            self._look_at_loss(roots)
        self.gradients.begin()
        if self._ask is not None:
            self._ask.backward_begins()

    def backward_end(self, roots: Sequence[Any], scalar: bool) -> None:
        """The outermost backward has returned."""
        if self._ask is not None:
            self._ask.pause()
        reached = self.gradients.end()
        self.inside.hooks.end_backward()
        if not reached and (self.clock.open is None or not self.clock.open.stepped_in_backward):
            self.scale.forget()
        record = self.clock.open
        fresh = [slot for slot in reached if slot not in self._draft.in_pre] if self._draft and self._draft.in_pre else reached
        read_here = record is None or record.evaluations == 1
        if read_here:
            self.inside.claim(reached)
        elif self.inside.hooks.listening:
            self.inside.hooks.forget()  # gradients and loss are those of a closure's first evaluation, and so is the rest
        if reached and read_here and fresh:
            self._read(fresh)
        draft = self._draft
        ours = bool(reached) or (record is not None and record.stepped_in_backward)
        if ours and self._saw_loss and self._walks.count_loss():
            self._describe()
        if draft is not None and ours and read_here:
            self.scale.give_to(draft)
            if scalar:
                self._add_loss(draft, roots)
            self._take_told(draft)
            if self._ask is not None:
                self._look_for_origin(draft, roots)
            if self.acting is not None:
                self.acting.after_backward(draft)
            if (reached is not self.gradients.everything or not self._walks.done) and self._walks.take(
                reached, roots, self.inside.maker
            ):
                self._describe()
            if draft.full and self._walks.look_again(roots, self.inside.maker, self.recorded()):
                self._describe()
        outcome = self.clock.backward_end(reached)
        if outcome is not None:
            self._finish(outcome)

    def backward_failed(self) -> None:
        """The outermost backward raised."""
        self.clock.backward_failed()
        self.gradients.fail()
        self.inside.hooks.forget()
        self.held.release()
        if self._ask is not None:
            self._ask.stop()
        self._dirty = self._draft is not None

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
            return key, self.acting is not None
        record = self.clock.open
        if record is None or act is Pre.IGNORE:
            return key, False
        if act is Pre.READ:
            read = [slot for slot in record.reached if self._draft is None or slot not in self._draft.in_pre]
            self._read(read)
            self.inside.claim(read)
            self._find_owners()
            if self._draft is not None:
                self._draft.in_pre.update(read)
                self.scale.give_to(self._draft)
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
        probes = Probes(self.gradients.probes(there), there, by_scaler=draft.by_scaler and not scaled_on_device)
        if draft.remote:
            draft.probes.append(probes)
            self._send_probes(probes)
            if self._waits or (self.acting is not None and self.acting.needs_norms):
                self._await()
            if self._roots and not draft.remote and self._ask is not None:
                self._look_for_origin(draft, self._roots)
            if self.acting is None:
                return
        else:
            self._look_at_probes(draft, probes, self.gradients.scaled_since(probes.slots))
        if self.acting is not None and there and not draft.state[there[0]] & GradState.CLEARED:
            if self.clock.in_backward:
                raise Deliberate(RuntimeError(INSIDE_BACKWARD))
            self.acting.before_step(
                draft,
                key,
                optimizer,
                there,
                probes,
                step=self.recorded(),
                reader=self._reader,
                heads=self._walks.roles.heads,
                write_provisional=lambda: self._write_provisional(key),
            )

    def _write_provisional(self, key: int) -> None:
        """Write the open record as it will be if the owner `key` steps now."""
        record, draft = self.clock.open, self._draft
        if record is None or draft is None:
            return
        self._drain(force=True)
        owners = {*record.stepped, key} - draft.left_out.keys()
        slots = sorted(record.reached & {slot for owner in owners if isinstance(owner, int) for slot in self.owners.slots(owner)})
        if draft.full and draft.layers is None:
            self.inside.take(draft, slots)
            draft.layers = self._layers(draft)
        once = replace(record, reached=set(slots), owners=set(owners), stepped=set(owners))
        closed = Closed(Outcome.STEPPED, once, draft.only(slots), self.owners.owners, time.perf_counter() - self._started)
        self._write(closed, draft.layers)

    def _look_at_probes(self, draft: Draft, probes: Probes, ratios: NDArray[np.float64]) -> None:
        """What happened to the gradients between the read and the step: cleared, a loss scale divided out, or clipped."""
        if ratios.size and not any(ratios.tolist()) and self.gradients.cleared(probes.of):
            draft.flag(list(probes.of), GradState.CLEARED)
            return
        probes.ratios = ratios
        probes.expected = 1.0 / draft.scale if probes.by_scaler else 1.0
        self.scale.see(draft, ratios.tolist())
        if not draft.by_scaler and draft.scale != 1.0:
            probes.expected = 1.0 / draft.scale
        coefs = [ratio / probes.expected for ratio in ratios.tolist() if math.isfinite(ratio)]
        probes.touched = any(abs(coef - 1.0) > UNCHANGED for coef in coefs)
        if probes.touched:
            draft.clipped(probes.of, min(coefs))

    def _send_probes(self, probes: Probes) -> None:
        """Ask a device for the norms that `scaled_since` reads at once on the host."""
        with torch.no_grad():
            for slot in probes.slots:
                g = self.table.params[slot].grad
                slab = None if g is None else self._reader.slabs.get(g.device)
                if g is not None and slab is not None:
                    slab.cells[PROBES][slot].copy_(private.foreach_norm([dense(g)])[0])

    def _note_use(self, draft: Draft, key: int) -> None:
        """The learning rate of the step, and the gradients in it that are left from an earlier one."""
        draft.noted.add(key)
        self.owners.write_lr(key, draft.lr)
        stale = self.gradients.uses_stale(self.owners.slots(key))
        if stale:
            draft.flag(stale, GradState.STALE)

    def post_step(self, optimizer: Optimizer) -> int | None:
        """A step has returned; gives the optimizer's key, None where it owns nothing watched or another step is still running."""
        key, _ = self.owners.adopt(optimizer)
        if key is None:
            self.clock.foreign_post()
            self._foreign_steps += 1
            self._update_pending()
            return None
        record, draft = self.clock.open, self._draft
        found = getattr(optimizer, "found_inf", None)
        found_inf = isinstance(found, Tensor) and bool(found.item())
        if self.acting is not None and draft is not None:
            found_inf = self.acting.after_step(draft, key, optimizer, found_inf)
        outermost = self.clock.steps_running() <= 1
        self._in_turn[key] = self.recorded()  # a key that is there stays in its place
        mine = self.owners.slots(key)
        if outermost:
            if draft is not None and key not in draft.noted:
                self._note_use(draft, key)  # its gradients came from a closure inside the step
            self.gradients.used(mine)
        if outermost and not found_inf and (record is None or draft is None):
            self._steps_without.add(key)  # nothing has reached what it owns since it stepped last
            if record is None:
                self._see_empty_step(mine)
        elif draft is not None and outermost and not found_inf and (record is None or key not in record.owners):
            self._steps_without.add(key)
            self._foreign_steps += 1  # of another of the watched models, which this record has not reached
            self._update_pending()
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
        return key if outermost else None

    def _see_empty_step(self, mine: Sequence[int]) -> None:
        """An optimizer stepped before anything was recorded: did it move a weight without a gradient, as those do that try out?"""
        owned = [self.table.params[slot] for slot in mine]
        if self.recorded() or not any(p.requires_grad for p in owned) or any(type(p) not in PLAIN or p.is_meta for p in owned):
            return
        smallest = min(owned, key=Tensor.numel)
        if self._unmoved is None:
            self._unmoved = weakref.ref(smallest), smallest.detach().clone()
        before, was = self._unmoved
        if before() is smallest and not self._empty_steps % EMPTY and not torch.equal(was, smallest):
            self._empty_steps = -sys.maxsize
        self._empty_steps += 1
        self._update_pending()

    def by_hand(self) -> None:
        """The user says that the update is over."""
        closed = self.clock.closed
        if self.clock.open is None:
            if closed is not None and closed.backward_calls:
                return  # backward passes are seen here, and the last one's update is over already
            slots = {slot for slot, p in enumerate(self.table.params) if p.grad is not None}
            if slots:
                self._read(sorted(slots))
                self.inside.claim(slots)
                if self._draft is not None:
                    self.scale.give_to(self._draft)
            outcome = self.clock.by_hand(slots)
        else:
            outcome = self.clock.by_hand()
        if outcome is not None:
            self._finish(outcome)

    @property
    def is_full(self) -> bool:
        """The open record has full statistics."""
        return self._draft is not None and self._draft.full

    def recorded(self) -> int:
        """The number of the next record to close."""
        return self._recorded() + len(self._queue)

    def exit(self) -> None:
        """The block is left."""
        outcome = self.clock.exit(self._moved, self._left_out)
        if outcome is not None:
            self._finish(outcome)
        self.drain()
        self.gradients.fail()

    def settle(self) -> None:
        """Close a record all of whose steps have been made, though one that it reached belongs to an optimizer that did not step."""
        record = self.clock.open
        if record is not None and record.stepped and not self.under_way():
            outcome = self.clock.by_hand()
            if outcome is not None:
                self._finish(outcome)

    def steps_last(self, key: int) -> bool:
        """Whether an optimizer is the last of those that step in turns: the one that was seen to step for the first time last."""
        now = self.recorded()
        stepping = [other for other, last in self._in_turn.items() if now - last <= _TURN]
        return not stepping or key == stepping[-1]

    def under_way(self) -> bool:
        """A backward pass or a step is running."""
        self._forget_broken_steps(0)
        return self.clock.in_backward or self.clock.steps_running() > 0

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
        self._listen()

    # -- a run that goes on later --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What it has counted and learnt beside the history: the cadence, units that have not fired, the order of modules, the loss scale."""
        names = {key: self.table.names[slots[0]] for key in {*self.owners.owner_of.values()} if (slots := self.owners.slots(key))}
        counts = [([names[key] for key in keys if key in names], count) for keys, count in self._counts.items()]
        return {
            # An optimizer by the name of a parameter that it owns: in another process they come in another order.
            "counts": [*counts, *self._resumed],
            "scale": self.scale.state_dict(),
            "inside": self.inside.state_dict(),
            "ever_stepped": self._ever_stepped,
        }

    def load_state_dict(self, state: Mapping[str, Any], cadence: bool = True) -> None:
        """Continue from `state_dict`; with or without the cadence."""
        if cadence:
            self._counts.clear()
            self._resumed = [(list(names), int(count)) for names, count in state["counts"]]
            self._resume()
        self.scale.load_state_dict(state["scale"])
        self.inside.load_state_dict(state["inside"])
        self._ever_stepped = bool(state["ever_stepped"])
        self._listen()
        self._describe()

    def _resume(self) -> None:
        """Take over the counts of the cadences of those optimizers that exist by now."""
        slots = {name: slot for slot, name in enumerate(self.table.names)}
        wanted = {slots[name] for names, _ in self._resumed for name in names if name in slots}
        if not wanted <= self.owners.owner_of.keys() and self.owners.find(wanted):
            self.clock.owners_changed()
            self._describe()
        left = []
        for names, count in self._resumed:
            keys = [self.owners.owner_of.get(slots[name]) for name in names if name in slots]
            if None in keys or not keys:
                left.append((names, count))
            else:
                self._counts[frozenset(key for key in keys if key is not None)] = count
        self._resumed = left

    def abandon(self) -> None:
        """The update at hand is given up, with all that was seen of it."""
        self.clock.abandon()
        self._draft = None
        self._dirty = False
        self.gradients.abandon()
        self.weights.forget()
        self._versions.clear()
        self._told.clear()
        self.scale.forget()
        self.inside.hooks.once.clear()
        self.held.release()
        if self.acting is not None:
            self.acting.scan()
        self.inside.hooks.forget()

    # -- reading -------------------------------------------------------------------------------------------------------------------

    def _read(self, slots: list[int]) -> None:
        draft = self._draft
        if draft is None:
            if self._resumed:
                self._resume()
            cadence = self._cadence(slots)
            draft = self._draft = Draft.blank(len(self.table), self._is_due(self._counts.get(cadence, 0)), cadence)
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

    def _is_due(self, count: int) -> bool:
        """Whether full statistics are taken of a record when `count` of its kind went before."""
        return count < self._sampling.dense or count % self._sampling.every == 0

    def _listen(self) -> None:
        """Whether the forward pass of the next update is looked at. Where a record closes late, it runs before that."""
        counts = self._counts.values()
        due = not counts or any(self._is_due(count) or (self._late and self._is_due(count + 1)) for count in counts)
        self.inside.hooks.listen(due)

    def _own(self, record: Open) -> set[int]:
        """Slots of a record that are not foreign to it."""
        owner_of = self.owners.owner_of
        return {slot for slot in record.reached if slot not in owner_of or owner_of[slot] in record.stepped}

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
            coef = float(values[SCALARS, CLIP_COEF])
            if draft.clipped_on_device and not coef >= 1.0 - UNCHANGED:  # NaN: the clipper does not know it
                draft.clipped(draft.clipped_on_device, coef)
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

    def _take_told(self, draft: Draft) -> None:
        draft.told += [float(value) for value in self._told]
        self._told.clear()

    def _measure_change(self, draft: Draft, slots: list[int]) -> None:
        self.weights.take_after(slots)
        ratio, changed = self.weights.ratios(slots)
        draft.ratio[slots] = ratio
        draft.flag(np.asarray(slots)[changed], GradState.CHANGED)
        # What is not a number cannot be compared.
        same, differ = self.weights.same(slots, changed | (np.isnan(ratio) & ~np.isfinite(draft.weight_norm[slots])))
        draft.flag(differ, GradState.CHANGED)
        draft.state[slots] &= ~np.uint8(GradState.SAME)  # an earlier step of this update may have done nothing
        draft.flag(same, GradState.SAME)

    # -- what went wrong -----------------------------------------------------------------------------------------------------------

    def _look_at_loss(self, roots: Sequence[Any]) -> None:
        """A backward is about to run: where its loss is not finite, what the graph says of it is gone afterwards."""
        values = [root.detach() for root in roots if isinstance(root, Tensor) and root.numel() == 1 and on_host(root)]
        if all(math.isfinite(float(value.real if value.is_complex() else value)) for value in values):
            return
        scaled = self.scale.ahead(self._draft) != 1.0
        if scaled and not any(bool(torch.isnan(value)) for value in values):
            return  # what overflowed may be the scaled loss
        if self._ask is not None and self._ask.wants(self.recorded(), scaled, loss_is_bad=True):
            self._ask.before(self._case(roots, self.held.calls, loss_is_bad=True))

    def _look_for_origin(self, draft: Draft, roots: Sequence[Any]) -> None:
        """A backward has returned and nothing has stepped yet: where it went wrong, find out why, else let go of what is held for that."""
        if draft.remote or draft.remote_loss:
            self._roots = roots  # not known yet: before the step
            return
        self._roots = ()
        loss_is_bad = bool(draft.terms) and (math.isnan(draft.loss) or (math.isinf(draft.loss) and not draft.by_scaler))
        if not draft.nonfinite.any() and not loss_is_bad:
            if not self.inside.hooks.compiled:
                self.held.descend()
            self.held.thin_out()
            if self._ask is not None:
                self._ask.was_fine()
            return
        if self._ask is None:
            return
        if not self._ask.wants(self.recorded(), draft.by_scaler, loss_is_bad):
            self._ask.stop()
            return
        bad = frozenset(id(self.table.params[slot]) for slot in np.flatnonzero(draft.nonfinite).tolist())
        case = replace(self._case(roots, self.held.reached(), bad, loss_is_bad), by_scaler=draft.by_scaler)
        with self.inside.hooks.deaf(), self.held.deaf():
            found = self._ask.after(case)
        self.held.release()
        if found is not None:
            self._note_inquiry(draft, found)

    def _case(
        self, roots: Sequence[Any], calls: Sequence[Call], bad: frozenset[int] = frozenset(), loss_is_bad: bool = False
    ) -> Case:
        return Case(
            step=self.recorded(),
            calls=list(calls),
            roots=roots,
            modules={id(module): name for name, module in self.table.modules.items()},
            parameters={id(p): (name, p) for name, p in zip(self.table.names, self.table.params, strict=True)},
            bad=bad,
            loss_is_bad=loss_is_bad,
        )

    def _note_inquiry(self, draft: Draft, found: Inquiry) -> None:
        """What was found out stands in the record, which for this is as good as one that was looked at from the start."""
        draft.inputs_bad = found.inputs
        weight = found.origin is not None and found.origin.phase == "weight"
        if draft.full or not (found.outputs or found.inputs > 0 or weight):
            return
        draft.full = True
        self._sample(draft, np.flatnonzero(draft.state).tolist())
        counts = np.full(len(self.table.modules), np.nan)
        for column, name in enumerate(self.table.modules):
            counts[column] = found.outputs.get(name, np.nan)
        draft.layers = {"activation_nonfinite": counts, "input_nonfinite": found.inputs}

    def explain(self, alert: Alert) -> Inquiry | None:
        """What there is to be found out about an incident that opens."""
        if self._ask is None:
            return None
        with self.inside.hooks.deaf(), self.held.deaf():
            return self._ask.explain(alert, replace(self._case((), self.held.calls), step=alert.step))

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
        if not outcome.is_record:
            self.inside.close(None, record.reached, ())
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
            self.inside.close(draft if draft.full else None, record.reached, self._own(record))
            self._listen()
            self._see_frozen()
            if self._initial.look_again(self.table.params):
                self._describe()
            self._foreign_steps = self._unowned = 0
            self._roots = ()
            closed = Closed(outcome, record, draft, self.owners.owners, time.perf_counter() - self._started)
            self._queue.append(closed)
            self._drain(force=True, before=closed)  # the copies that these records wait for give way to this one's
            if draft.taken is not None:
                self.inside.hooks.send()
            if self._on_the_way(closed):
                for slab in self._reader.slabs.values():
                    slab.send()
            else:
                self._drain(force=True)
            self.held.release(fine=True)
        self.weights.forget()
        self._versions.clear()
        if outcome is Outcome.BY_HAND and self.acting is not None and not record.owners:
            raise Deliberate(RuntimeError(BY_HAND))

    def _see_frozen(self) -> None:
        """Frozen or thawed for a few records running: then it is meant so. A GAN freezes its other half for one step only."""
        if not self.table.thawed():
            self._frozen_seen.clear()
            return
        pattern = [p.requires_grad for p in self.table.params]
        self._frozen_seen = [*self._frozen_seen, pattern] if self._frozen_seen[:1] in ([], [pattern]) else [pattern]
        if len(self._frozen_seen) >= FROZEN_AFTER:
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

    def _on_the_way(self, closed: Closed) -> bool:
        """Whether some of its numbers are still on a device."""
        return bool(closed.draft.remote) or closed.draft.remote_loss

    def _drain(self, force: bool, before: Closed | None = None) -> None:
        """Give finished records on, in order; one whose numbers are still on their way from a device may wait."""
        while self._queue and self._queue[0] is not before:
            closed = self._queue[0]
            if self._on_the_way(closed):
                arrived = all(slab.arrived() for slab in self._reader.slabs.values()) and self.inside.hooks.arrived()
                if not force and not arrived:
                    return
                self._land(closed.draft, still_there=False)
            self._queue.pop(0)
            if self._walks.look_outside(self.owners):
                self._describe()
            self._update_pending(self.clock.open)
            self._write(closed, closed.draft.layers or self._layers(closed.draft))
            self._on_row(closed.draft.full)

    def _write(self, closed: Closed, layers: Mapping[str, NDArray[np.float64] | float] | None) -> None:
        in_order = self.table.in_order and len(closed.draft.norm) == len(self.table)
        closed.write(self._next_row(), None if in_order else self.table.columns, layers)

    def _layers(self, draft: Draft) -> Mapping[str, NDArray[np.float64] | float] | None:
        taken, draft.taken = draft.taken, None
        if taken is None:
            return None
        found = self.inside.statistics(draft, taken)
        if draft.inputs_bad > 0:
            found = {**found, "input_nonfinite": draft.inputs_bad}
        if self.inside.note(taken):
            self._describe()
        return found

    # -- facts ---------------------------------------------------------------------------------------------------------------------

    pending: Pending = Pending()

    def _update_pending(self, record: Open | None = None) -> None:
        self.pending = Pending(
            backward_calls=record.backward_calls if record is not None else 0,
            unowned=self._unowned,
            foreign_steps=self._foreign_steps,
            empty_steps=max(0, self._empty_steps),
            ever_stepped=self._ever_stepped,
        )

    def _rescan(self) -> None:
        self.table.rescan()
        self.inside.rescan()
        if self.held.on:
            self._hold()
        self._reader = NormReader(self.table.params)
        self.gradients.resize(self.table.params, self._reader)
        if self.acting is not None:
            self.acting.scan()
        self.weights = WeightSample(self.table.params)
        if self._draft is not None:
            self._draft.resize(len(self.table))
        self.owners.refresh()
        self.clock.owners_changed()
        self._describe()

    def _describe(self) -> None:
        names = {slot: self.owners.name(key) for slot, key in self.owners.owner_of.items()}
        self._on_meta(
            describe(
                self.table,
                self._initial,
                owners=names,
                order=self._walks.order,
                distance=self._walks.distance,
                clamped=self._walks.clamped,
                connected=self._walks.connected,
                inputs=self._walks.roles.inputs,
                heads=self._walks.roles.heads,
                include=self._sampling.include,
                exclude=self._sampling.exclude,
                outside=self._walks.outside,
                outside_in_model=self._walks.outside_in_model,
                opaque=self._walks.opaque,
                unreached=self._walks.unreached(),
                functions=self.inside.functions,
                places=self.inside.places,
                run=self.inside.run,
                squashed=self._walks.squashed,
                criterion=self._walks.criterion,
            )
        )
