"""The scout of `gradwatch run`: hears a script's backward passes and steps, and puts a watch on what it trains."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import threading
import traceback
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.capture import private
from gradwatch.capture.tape import TAPE
from gradwatch.outermost import name_of, outermost
from gradwatch.present import words
from gradwatch.present.console import ConsoleSink
from gradwatch.records import Severity
from gradwatch.watch import GradWatch, introduce, leave, verdict_of, watched_parameters

_TOLD = 4
"""Healthy models whose verdict is spelled out; a sweep trains hundreds."""


@dataclass(slots=True)
class _Watched:
    """A watch, and what it is on.

    Attributes:
        watch: None once its models are gone; what there was to say is in `last_words` then.
        name: what the user calls the model.
        models: the models, weakly: a script that drops a model wants its memory back.
        optimizers: ids of the living optimizers that step them.
        last_words: the verdict, once it is final.
        sick: something was found.
        stopped_by: what ended the script while these models were alive; "" for nothing.
    """

    watch: GradWatch | None
    name: str
    models: list[weakref.ref[nn.Module]]
    optimizers: set[int] = field(default_factory=set)
    last_words: list[str] = field(default_factory=list)
    sick: bool = False
    stopped_by: str = ""

    def holds(self) -> set[int]:
        """Ids of the parameters that it watches now."""
        return {id(p) for ref in self.models if (model := ref()) is not None for p in model.parameters()}


class Scout:
    """Watches whatever a script trains.

    At the first step of an optimizer, the outermost module that owns its parameters is attached, and that update is record 0: its
    gradients are read right before the step (after the script's own clipping, for this one record), its loss is the one that the tape
    saw. Every model that comes later gets a watch of its own, with a key in front of its layers' names: its updates are counted from
    its own first one, no rule mistakes the time before for missing gradients, and what was recorded of the others stays as it is. They
    share one console.

    Args:
        sink: the console.
        clip: as `GradWatch(clip=...)`.
        on_nonfinite: as `GradWatch(on_nonfinite=...)`.
        quiet: no alerts, only the verdict.
        summary: the whole story in place of the verdict.
    """

    def __init__(
        self,
        sink: ConsoleSink,
        *,
        clip: float | None = None,
        on_nonfinite: Literal["warn", "raise"] = "warn",
        quiet: bool = False,
        summary: bool = False,
    ) -> None:
        self._sink, self._clip, self._on_nonfinite, self._quiet, self._summary = sink, clip, on_nonfinite, quiet, summary
        self._stopped_by = ""
        self._process = os.getpid()
        self._watched: list[_Watched] = []
        self._groups: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._strays: list[str] = []
        self._failures: list[str] = []
        self._left_to_the_script = False
        self._backward_calls = self._steps = 0
        self._here = threading.local()
        self._midway: list[GradWatch] = []
        TAPE.add(self)
        # After the script's own exit handlers, and before the one of gradwatch.watch, which would detach without a name.
        atexit.register(self.finish)

    @property
    def watches(self) -> tuple[GradWatch, ...]:
        """The watches whose models still exist, in the order in which they came."""
        return tuple(entry.watch for entry in self._watched if entry.watch is not None)

    # -- what the script does (called by the tape) ---------------------------------------------------------------------------------

    def concerns(self, roots: Sequence[Any]) -> bool:
        return True

    def lives_here(self) -> bool:
        return True

    def on_backward_begin(self, roots: Sequence[Any]) -> None:
        self._loss.begin()

    def on_backward_end(self, roots: Sequence[Any], scalar: bool) -> None:
        self._backward_calls += 1
        self._loss.end(roots, scalar)
        for watch in self._midway:
            watch.on_backward_end(roots, scalar)
        self._midway.clear()

    def on_backward_failed(self) -> None:
        for watch in self._midway:
            watch.on_backward_failed()
        self._midway.clear()

    def on_scale(self, scaler: Any) -> None:
        self._loss.scaler = scaler

    def on_pre_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._groups.get(optimizer) == len(optimizer.param_groups):
            return None
        try:
            self._groups[optimizer] = len(optimizer.param_groups)
            watch = self._attach(optimizer)
        except Exception:
            self._failures += f"gradwatch failed to attach a watch; please report this:\n{traceback.format_exc()}".splitlines()
            return None
        if watch is None:
            return None
        # The tape went round its listeners before this one came: it would miss the step that it was attached for.
        if private.in_backward():
            watch.on_backward_begin(())
            self._midway.append(watch)
        elif not any(callable(one) for one in (*args[1:], *kwargs.values())):
            self._loss.tell(watch)  # of a closure's backward it hears itself
        if getattr(optimizer, "grad_scale", None) is not None and self._loss.scaler is not None:
            watch.on_scale(self._loss.scaler)  # a fused optimizer unscales inside its step
        return watch.on_pre_step(optimizer, args, kwargs)

    def on_post_step(self, optimizer: Optimizer) -> None:
        self._steps += 1
        self._loss.stepped()

    def on_fork(self) -> None:
        self._watched.clear()

    @property
    def _loss(self) -> _LossSeen:
        """That of this thread: others may train other models."""
        if not hasattr(self._here, "loss"):
            self._here.loss = _LossSeen()
        loss: _LossSeen = self._here.loss
        return loss

    # -- attaching -----------------------------------------------------------------------------------------------------------------

    def _attach(self, optimizer: Optimizer) -> GradWatch | None:
        """Put a watch on what this optimizer steps; None where all of it is watched or nothing can be."""
        params = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        own = {id(entry.watch) for entry in self._watched}
        others = {
            p
            for listener in TAPE.listeners()
            if isinstance(listener, GradWatch) and id(listener) not in own
            for p in watched_parameters(listener)
        }
        self._left_to_the_script |= bool(params.keys() & others)
        watched = set(others)
        for entry in self._watched:
            if entry.watch is not None and entry.optimizers:
                mine = entry.holds()
                watched |= mine
                if mine & params.keys():
                    self._heed(entry, optimizer)
        wanted = [p for key, p in params.items() if key not in watched]
        if not wanted:
            return None
        models, optimizers = outermost(wanted, owned=params.keys(), watched=watched, in_backward=private.in_backward())
        if not models:
            self._strays.append(type(optimizer).__name__)
            return None
        try:
            entry = self._entry(models, optimizers)
        except (TypeError, ValueError, RuntimeError) as refused:
            self._failures.append(f"{words.WARNING} gradwatch: this model is not watched. {refused}")
            return None
        self._heed(entry, optimizer)
        if entry.watch is not None:
            # Those of other parts of the model may step right after this one, in the same update.
            for other in optimizers:
                if other is not optimizer:
                    introduce(entry.watch, other)
        return entry.watch

    def _entry(self, models: list[nn.Module], optimizers: list[Optimizer]) -> _Watched:
        """The watch on these models, attached: one that was on them before goes on where it stopped.

        A model that is the only one that any of the optimizers holds is called nothing, as in `GradWatch(model)`; else it has a key.

        Raises:
            TypeError, ValueError, RuntimeError: a model that `GradWatch` does not take.
        """
        for entry in self._watched:
            if entry.watch is not None and not entry.optimizers and [ref() for ref in entry.models] == models:
                entry.watch.attach()
                return entry
            if entry.watch is not None and all(ref() is None for ref in entry.models):
                self._close(entry)
        held = {id(p) for model in models for p in model.parameters()}
        alone = not self._watched and all(
            id(p) in held for one in optimizers for group in one.param_groups for p in group["params"]
        )
        named = dict(zip(_unique([name_of(model) for model in models], self._watched), models, strict=True))
        watch = GradWatch(
            models[0] if alone and len(models) == 1 else named,
            clip=self._clip,
            on_nonfinite=self._on_nonfinite,
            console=False,
            on_alert=() if self._quiet else (self._sink,),
        )
        watch.attach()
        entry = _Watched(watch, " and ".join(named), [weakref.ref(model) for model in models])
        self._watched.append(entry)
        return entry

    def _heed(self, entry: _Watched, optimizer: Optimizer) -> None:
        """A watch lives as long as an optimizer of its model: it must not keep a model that the script has dropped."""
        if id(optimizer) not in entry.optimizers:
            entry.optimizers.add(id(optimizer))
            weakref.finalize(optimizer, _gone, weakref.ref(self), entry, id(optimizer)).atexit = False

    # -- the end -------------------------------------------------------------------------------------------------------------------

    def script_stopped(self, stopped_by: str) -> None:
        """The script has ended before its time, as `words.stopper` says it. What it still held was what it was at work on."""
        self._stopped_by = stopped_by
        for entry in self._watched:
            if any(ref() is not None for ref in entry.models):
                entry.stopped_by = stopped_by

    def finish(self) -> None:
        """Detach everything and say what was seen."""
        if os.getpid() != self._process:
            return  # a forked child: the script that is watched is its parent
        TAPE.remove(self)
        atexit.unregister(self.finish)
        for entry in self._watched:
            self._close(entry)
        self._sink.print_lines(self._failures)
        if not self._watched:
            if not self._failures and not (self._left_to_the_script and not self._strays):
                self._sink.print_lines([self._nothing_watched()])
            return
        sick = [entry for entry in self._watched if entry.sick]
        healthy = [entry for entry in self._watched if not entry.sick]
        several = len(self._watched) > 1
        for entry in sick + healthy[:_TOLD]:
            first, *rest = entry.last_words
            if several:
                first = first.replace("gradwatch:", f"gradwatch, {entry.name}:", 1)
            self._sink.print_lines([first, *rest])
        if len(healthy) > _TOLD:
            self._sink.print_lines([f"{words.GOOD} gradwatch: nothing found in {len(healthy) - _TOLD} more models"])

    def _close(self, entry: _Watched) -> None:
        watch = entry.watch
        if watch is None:
            return
        leave(watch, entry.stopped_by)
        entry.last_words = watch.summary().splitlines() if self._summary else verdict_of(watch)
        if not self._summary:
            entry.last_words += [f"  notice: {line}" for notice in watch.notices for line in notice.splitlines()]
        entry.sick = any(alert.severity >= Severity.WARNING for alert in watch.alerts)
        entry.watch = None

    def _nothing_watched(self) -> str:
        backward = words.plural(self._backward_calls, "backward pass")
        if self._strays:
            names = words.listed(sorted(set(self._strays)))
            return (
                f"{words.WARNING} gradwatch: saw {backward} and {words.plural(self._steps, 'step')} of {names}, whose parameters belong to "
                "no nn.Module, so nothing was judged"
            )
        if self._backward_calls:
            return (
                f"{words.WARNING} gradwatch: saw {backward} and no optimizer step, so nothing was judged; a loop that changes its weights "
                "by hand is watched by `with GradWatch(model):` around it"
            )
        if self._stopped_by:
            return f"{words.WARNING} gradwatch: stopped by {self._stopped_by} before anything was trained, so nothing was judged"
        return (
            f"{words.WARNING} gradwatch: this script trained nothing: no backward pass and no optimizer step was seen "
            "(what other processes do is not)"
        )


def _gone(scout: weakref.ref[Scout], entry: _Watched, optimizer: int) -> None:
    """An optimizer was dropped; with the last one its watch lets go of the model."""
    entry.optimizers.discard(optimizer)
    if scout() is not None and entry.watch is not None and not entry.optimizers:
        leave(entry.watch, entry.stopped_by)


def _unique(names: list[str], watched: Sequence[_Watched]) -> list[str]:
    taken = {entry.name for entry in watched}
    unique: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in taken:
            number += 1
            candidate = f"{name}_{number}"
        taken.add(candidate)
        unique.append(candidate)
    return unique


# -- the loss ----------------------------------------------------------------------------------------------------------------------


class _LossSeen:
    """The loss of the update at hand, as the roots of its backward passes tell it; for a watch that comes after them.

    Where the roots do not add up (they lie on two devices), it is not known.
    """

    def __init__(self) -> None:
        self.scaler: Any = None
        self._sum: Tensor | None = None
        self._terms = 0
        self._over = False
        self._ever_stepped = False
        self._leaf: weakref.ref[Tensor] | None = None

    def begin(self) -> None:
        """A backward starts: does it belong to the same update as the last one?"""
        with contextlib.suppress(Exception):
            if self._over or self._cleared():
                self._sum, self._terms, self._over, self._leaf = None, 0, False, None

    def end(self, roots: Sequence[Any], scalar: bool) -> None:
        """A backward has returned."""
        try:
            self._add(roots if scalar else ())
        except Exception:
            self._sum, self._terms = None, 0

    def _add(self, roots: Sequence[Any]) -> None:
        if not self._ever_stepped and self._leaf is None and roots:
            leaf = _a_leaf(roots[0])
            self._leaf = None if leaf is None else weakref.ref(leaf)
        scale = None if self.scaler is None else private.scale_of(self.scaler)
        for root in roots:
            value = root.detach() if scale is None else root.detach() / scale
            self._sum = value if self._sum is None else self._sum + value
            self._terms += 1

    def stepped(self) -> None:
        """An optimizer has stepped; others may follow on the same gradients."""
        self._over = self._ever_stepped = True

    def tell(self, watch: GradWatch) -> None:
        """Tell it to a watch: once for each of its terms, for a record keeps their number too, and of what it is told the mean."""
        with contextlib.suppress(Exception):
            value = float(self._sum) if self._sum is not None else math.nan
            for _ in range(self._terms):
                watch.loss(value)

    def _cleared(self) -> bool:
        """The gradients were cleared and nobody stepped, as a GradScaler does when it searches its scale.

        Asked before the first step of the process only, where an update can end without one and nobody is there to see it.
        """
        leaf = None if self._leaf is None or self._ever_stepped else self._leaf()
        return leaf is not None and (leaf.grad is None or not bool(leaf.grad.any()))


def _a_leaf(root: Any) -> Tensor | None:
    """Some leaf of the graph under a root, by the first way down that ends in one; at most 10,000 nodes are tried."""
    todo = [root.grad_fn] if isinstance(root, Tensor) else []
    seen: set[Any] = set()
    while todo and len(seen) < 10_000:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, torch.Tensor):
            return variable
        todo.extend(after for after, _ in node.next_functions)
    return None
