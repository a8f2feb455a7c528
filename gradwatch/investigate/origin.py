"""Where a non-finite value was born: the module, the operator, the pass and the line, from what is held of the update in flight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from torch import Tensor

from gradwatch.capture import private
from gradwatch.capture.call import Call, Case
from gradwatch.investigate import graph, mend, telling
from gradwatch.investigate.again import NotReplayable
from gradwatch.investigate.frames import USER, kind_of
from gradwatch.investigate.replay import Outcome, replay
from gradwatch.investigate.tracer import Bad, Event, Tracer, address, is_mask, look
from gradwatch.records import Inquiry, Origin


def investigate(case: Case, loss_by: graph.Suspect | None = None) -> Inquiry:
    """Find out what there is to be found out.

    Args:
        case: what is known.
        loss_by: what the graph showed of a loss that is not finite, before the backward (`loss_of`).
    """
    outcomes: list[tuple[Call, Outcome]] = []
    refused = failed = ""
    given: Inquiry | None = None
    # What was put out bad comes first; then what was given a good gradient, as backwards go from the last call to the first.
    calls = sorted(case.calls, key=lambda call: (not _put_out_bad(call), any(look(delta) for delta in call.deltas.values())))
    for call in calls:
        try:
            outcome = replay(call, case.modules, backward=not case.loss_is_bad)
            if _blames_what_it_wrote(outcome):
                outcome = replay(call, case.modules, clean=True, backward=not case.loss_is_bad)
        except NotReplayable as why:
            refused = str(why)
            continue
        except Exception as error:
            failed = shorten(f"{type(error).__name__}: {error}".splitlines()[0], 160)
            continue
        if outcome.tracer.broken:
            failed = shorten(outcome.tracer.broken.splitlines()[-1], 160)
            continue
        outcomes.append((call, outcome))
        found = _inside(case, call, outcome)
        if found is not None and found.origin is not None and found.origin.phase == "input" and len(calls) > 1:
            given = given or found  # it may have been put out by another of these calls
        elif found is not None:
            return found
    if given is not None:
        return given
    if not outcomes and (found := weights(case)) is not None:
        return found  # else they would have been met on the way
    found = _outside(case, outcomes, loss_by)
    if found is not None:
        return found
    return _nothing(case, outcomes, refused, failed)


def seen(case: Case, tracer: Tracer) -> Inquiry | None:
    """What is known of an update that was traced as it ran; None: nothing, or no more than that the weights were bad already."""
    events = [tracer.event_of(root) for root in case.roots if isinstance(root, Tensor)] if case.loss_is_bad else []
    found = [event for event in events if event is not None and not event.root.is_deliberate]
    backward = not found
    if backward:
        grads = [
            parameter.grad for key, (_, parameter) in case.parameters.items() if key in case.bad and parameter.grad is not None
        ]
        found = [event for grad in grads if (event := tracer.event_of(grad)) is not None]
    if not found:
        return None
    event = min(found, key=lambda one: one.root.number)
    root = event.root
    if backward and root.saved is not None and root.saved.given:
        root = root.saved
    if root.given == "constant":
        return _constant(case, root)
    if root.given:
        return None
    return _described(case, None, event, backward)


# -- inside the model --------------------------------------------------------------------------------------------------------------


def _inside(case: Case, call: Call, outcome: Outcome) -> Inquiry | None:
    events = [event for number, event in outcome.outputs if not event.root.is_deliberate and (number in call.used or not call.used)]
    backward = not events
    if backward:
        events = [event for event in outcome.gradients if event.root.given != "delta"] if not _came_bad(outcome) else []
    if backward and case.by_scaler:
        events = [event for event in events if event.root.bad.nan]
    if not events:
        return None
    event = min(events, key=lambda one: one.root.number)
    root = event.root
    if backward and root.saved is not None and root.saved.given in ("input", "parameter", "buffer", "constant"):
        root = root.saved  # what the forward pass was given spoils the derivative
    if root.given == "parameter":
        return _weight(case, root)
    if root.given == "buffer":
        return _buffer(case, call, outcome, root)
    if root.given == "input":
        return _input(case, call, outcome, root)
    if root.given:
        return _constant(case, root)
    return _described(case, call, event, backward)


def _put_out_bad(call: Call) -> bool:
    """Some of what it put out was not finite when it happened, as far as that is held."""
    return any(look(held) for held, version in call.outputs.values() if private.version_or_zero(held) == version)


def _blames_what_it_wrote(outcome: Outcome) -> bool:
    """It is traced to a buffer that the forward pass writes, as running statistics are: what went wrong has spoilt it, and not it that."""
    roots = [event.root for event in (*(event for _, event in outcome.outputs), *outcome.gradients)]
    return any(root.given == "buffer" and root.tensor is not None and address(root.tensor) in outcome.written for root in roots)


def _came_bad(outcome: Outcome) -> bool:
    """All that is bad in the gradients came with the delta."""
    return outcome.bad_deltas and all(event.root.given == "delta" for event in outcome.gradients)


def _described(case: Case, call: Call | None, event: Event, backward: bool) -> Inquiry:
    root = event.root
    place = root.place
    file, line = (place.file, place.line) if place.file or call is None else call.site
    source = f"{Path(file).name}:{line}" if file else ""
    module = case.modules.get(place.module, "")
    origin = Origin(module, telling.operator(root.op), "backward" if backward else "forward", source)
    cause = telling.cause(event, origin)
    own = root.saved if root.saved is not None and root.saved.place == place else None  # what it gave forward was bad, too
    facts = own.facts if own is not None and own.facts else root.facts
    last = facts[-1] if facts else (math.nan, math.nan, 0)
    found, shown = mend.NONE, ""
    if file and kind_of(file) == USER:
        half = root.dtype in (torch.float16, torch.bfloat16)
        culprit = mend.Culprit(
            root.op,
            backward,
            math.nan if root.counts else last[0],
            math.nan if root.counts else last[1],
            root.tensors,
            counts=root.counts,
            infinite=root.bad.inf,
            empty=not root.facts,
            half=half,
            code=place.code,
            span=place.span,
        )
        if place.file:  # else the line only calls what torch runs
            found = mend.mend(file, line, culprit)
        masked = root.mask.place if root.mask is not None else None
        if not found.diff and masked is not None and masked.file and kind_of(masked.file) == USER:
            found = mend.mend(
                masked.file, masked.line, replace(culprit, code=masked.code, span=masked.span)
            )  # where the mask is filled in
        shown = found.diff or f"  {mend.line_of(file, line, place.code)}".rstrip()
    remedy = telling.TRAP if found.trap else telling.remedy(root, backward)
    outputs = {}
    if not backward and call is not None:
        outputs = {name: float(max(1, root.elements)) for name in dict.fromkeys((module, _root_name(case, call)))}
    told = f"{remedy}\n{shown}" if shown else remedy
    return Inquiry(case.step, origin, cause, told, outputs, 0.0, overflowed=telling.overflowed(root))


def _root_name(case: Case, call: Call) -> str:
    return case.modules.get(id(call.model), "")


def _input(case: Case, call: Call, outcome: Outcome, root: Event) -> Inquiry:
    assert root.tensor is not None
    name = outcome.paths.get(address(root.tensor), "")
    what, count = telling.rows(root.tensor)
    label = f"The input `{name}`" if name else "The input"
    of = _root_name(case, call) or "the model"
    if name in telling.changed_inputs(call):  # by a normalisation in place, say, which has spoilt it
        cause = f"{label} of {of} was changed in place after it was given, and holds {what} now; what it held then is not known."
        return Inquiry(case.step, None, cause, telling.AGAIN)
    if name in telling.computed_inputs(call):
        cause = f"{label} of {of}, which is computed before it is called, holds {what} at step {case.step}."
        remedy = f"Look at what computes it. {telling.AGAIN}"
    else:
        cause = f"{label} of {of} holds {what} in the batch of step {case.step}."
        remedy = "Look at these rows where the batch is made (torch.isfinite(x).all()), and mend the data or its normalisation."
    return Inquiry(case.step, Origin(_root_name(case, call), "", "input"), cause, remedy, inputs=float(count))


def _constant(case: Case, root: Event) -> Inquiry:
    """A tensor that is no input, parameter or buffer: a constant, or one that a module keeps in an attribute."""
    assert root.tensor is not None
    what, _ = telling.rows(root.tensor)
    op, place = telling.operator(root.op), root.place
    at = f" at {place.source}" if place.source else ""
    module = case.modules.get(place.module, "")
    shown = f"\n  {mend.line_of(place.file, place.line, place.code)}" if place.file and kind_of(place.file) == USER else ""
    if root.tensor.dim() == 0:
        phase: Literal["forward", "backward"] = "backward" if root.backward else "forward"
        remedy = f"Look at where that number is made.{shown}"
        held = what.partition(" ")[0]
        cause = f"torch.tensor{at} makes a tensor of {held}." if root.op == "lift_fresh" else f"{op}{at} is given {held}."
        return Inquiry(case.step, Origin(module, op, phase, place.source), cause, remedy)
    cause = (
        f"A tensor {list(root.tensor.shape)} that {op}{at} is given holds {what}: it is no input, parameter or buffer of the model"
        + (", and came up in the backward pass." if root.backward else ".")
    )
    origin = Origin(module, op, "input", place.source)
    return Inquiry(case.step, origin, cause, f"Look at where that tensor is made.{shown}")


def _buffer(case: Case, call: Call, outcome: Outcome, root: Event) -> Inquiry | None:
    assert root.tensor is not None
    name = outcome.buffers.get(address(root.tensor))
    if name is None:
        return None
    inside, _, key = name.rpartition(".")
    layer = case.modules.get(id(call.model.get_submodule(inside)), inside)
    return _bad_weight(case, f"{layer}.{key}" if layer else key, root.tensor, kind="buffer")


# -- weights -----------------------------------------------------------------------------------------------------------------------


def _weight(case: Case, root: Event) -> Inquiry | None:
    assert root.tensor is not None
    where = address(root.tensor)
    for name, parameter in case.parameters.values():
        if address(parameter) == where:
            return _bad_weight(case, name, parameter)
    return None


def weights(case: Case) -> Inquiry | None:
    """What weights and buffers hold that is not finite; None for nothing."""
    for name, parameter in case.parameters.values():
        if look(parameter):
            return _bad_weight(case, name, parameter)
    for call in case.calls:
        for module in call.model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                held = look(buffer)
                if held.nan:
                    layer = case.modules.get(id(module), "")
                    return _bad_weight(case, f"{layer}.{key}" if layer else key, buffer, kind="buffer")
    return None


def _bad_weight(case: Case, name: str, tensor: Tensor, kind: str = "weight") -> Inquiry:
    what, _ = telling.rows(tensor)
    since = "before the first step: uninitialised memory (torch.empty) or what was loaded" if case.step == 0 else "before this step"
    cause = f"The {kind} {name} held {what} {since}."
    remedy = (
        "Initialise it (torch.nn.init), or check what was loaded into it."
        if case.step == 0
        else "Go back to a checkpoint from before that update; check the step before it, its learning rate and what else writes to it."
    )
    return Inquiry(case.step, Origin(name.rpartition(".")[0], "", "weight"), cause, remedy)


# -- outside the model -------------------------------------------------------------------------------------------------------------


def loss_of(case: Case) -> graph.Suspect | None:
    """Before a backward whose loss is not finite: what the graph shows of it."""
    values: dict[int, Bad | None] = dict.fromkeys(boundary(case.calls))
    for call in case.calls:
        for number, (held, version) in call.outputs.items():
            if private.version_or_zero(held) == version:
                bad = values[call.nodes[number]] = look(held)
                if bad and not is_mask(held, bad):
                    return None  # it came out of the model
    return graph.born(graph.outside(case.roots, values.keys(), frozenset(case.parameters)), values)


def boundary(calls: Sequence[Call]) -> frozenset[int]:
    """Sequence numbers of the autograd nodes that made the outputs of these calls."""
    return frozenset(number for call in calls for number in call.nodes.values() if number >= 0)


def _came_out(case: Case, outcomes: Sequence[tuple[Call, Outcome]]) -> bool:
    """Whether what the models put out is known to have been finite when it happened, but for what is meant so."""
    masked = {
        id(call) for call, outcome in outcomes if outcome.outputs and all(event.root.is_deliberate for _, event in outcome.outputs)
    }
    for call in case.calls:
        for number in call.nodes:
            held = call.outputs.get(number)
            if held is None or private.version_or_zero(held[0]) != held[1]:
                return False
            bad = look(held[0])
            if bad.nan or (bad.inf and id(call) not in masked):
                return False
    return True


def _outside(case: Case, outcomes: Sequence[tuple[Call, Outcome]], loss_by: graph.Suspect | None) -> Inquiry | None:
    if not case.calls:
        return None
    if case.loss_is_bad and loss_by is not None:
        return _suspected(case, [loss_by])
    if case.loss_is_bad:  # not while there is a doubt
        return Inquiry(case.step, None, telling.BORN_OUTSIDE, telling.AGAIN) if _came_out(case, outcomes) else None
    part = graph.outside(case.roots, boundary(case.calls), frozenset(case.parameters))
    bad: set[Any] = {number for call in case.calls for i, number in call.nodes.items() if i in call.deltas and look(call.deltas[i])}
    if not bad:
        bad = {leaf for ends in part.leads.values() for leaf in ends} & case.bad
    return _suspected(case, graph.suspects(part, bad)) if bad else None


def _suspected(case: Case, found: Sequence[graph.Suspect]) -> Inquiry | None:
    ops = list(dict.fromkeys(suspect.op for suspect in found))
    if len(ops) == 1:
        suspect = found[0]
        op = telling.operator(ops[0])
        phase = "input" if suspect.given else "forward" if case.loss_is_bad else "backward"
        if suspect.given and suspect.values is not None:
            what, _ = telling.rows(suspect.values)
            name = f"The {suspect.given} that {op} is given" if suspect.given not in ("self", "other") else f"What {op} is given"
            cause = f"{name} in the loss, outside the model, holds {what} at step {case.step}."
            remedy = "Look at it where it is made: in the batch, or in what the loop computes of it (torch.isfinite(y).all())."
        elif suspect.given:
            cause = f"What {op} in the loss is given besides the model's output is not finite at step {case.step}."
            remedy = "Look at it where it is made: in the batch, or in what the loop computes of it (torch.isfinite(y).all())."
        else:
            cause = telling.outside(op, case.loss_is_bad)
            remedy = f"{telling.remedy_of(ops[0], backward=not case.loss_is_bad)} {telling.AGAIN}"
        overflowed = not suspect.given and telling.may_overflow(ops[0])
        return Inquiry(case.step, Origin("", op, phase), cause, remedy, overflowed=overflowed)  # type: ignore[arg-type]
    if not ops:
        return Inquiry(case.step, None, telling.BORN_OUTSIDE, telling.AGAIN)
    names = ", ".join(telling.operator(op) for op in ops[:4])
    cause = f"It was born outside the model, in the loss: one of {names}."
    return Inquiry(case.step, None, cause, f"Guard these (eps inside, a clamp before). {telling.AGAIN}")


# -- what is left ------------------------------------------------------------------------------------------------------------------


def _nothing(case: Case, outcomes: Sequence[tuple[Call, Outcome]], refused: str, failed: str) -> Inquiry:
    ran = [outcome for _, outcome in outcomes if outcome.backward or case.loss_is_bad]
    if refused:
        return Inquiry(case.step, None, f"The model was not run again: {refused}.")
    if failed:
        return Inquiry(case.step, None, f"The model could not be run again ({failed}).")
    if not case.calls:
        return Inquiry(case.step, None, telling.NOT_SEEN)
    if not case.loss_is_bad and any(call.dropped for call in case.calls):
        large = "The gradient at the model's outputs is larger than 64 MB and was not held, so that only the forward pass was run again."
        return Inquiry(case.step, None, f"{large} It is finite.", telling.AGAIN)
    if not ran or (not case.loss_is_bad and any(outcome.bad_deltas for outcome in ran)):
        return Inquiry(case.step)
    hooked = [name for key, (name, p) in case.parameters.items() if key in case.bad and private.has_hooks(p)]
    changed = [f"the input `{name}`" for call, _ in outcomes for name in telling.changed_inputs(call)]
    hidden = [name for _, outcome in outcomes for name in outcome.changed]
    draws = list(dict.fromkeys(name for _, outcome in outcomes for name in outcome.draws))
    if changed:
        why = f"{', '.join(changed[:3])} was changed in place after the model was given it"
    elif hidden:
        why = f"the model keeps state between forward passes ({', '.join(hidden[:3])})"
    elif draws:
        why = f"the forward pass draws from {' and '.join(draws)}, whose state is not kept"
    elif hooked and not case.loss_is_bad:
        why = f"there are hooks on {', '.join(hooked[:3])}, which are not run again"
    else:
        why = "suspect nondeterminism or hardware"
    return Inquiry(case.step, None, f"Not reproduced when the update was run again: {why}.")
