"""A forward pass run once more, and its backward from the gradient that came back then, with every operator watched."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradwatch.capture import private
from gradwatch.capture.call import Call, tensors_of
from gradwatch.investigate.again import Again, again, named_tensors
from gradwatch.investigate.graph import nodes_below
from gradwatch.investigate.tracer import Event, Tracer, address, look


@dataclass(slots=True)
class Outcome:
    """What a replay showed.

    Attributes:
        tracer: every bad value in it.
        paths: names of the inputs, by the address of the copies that it ran on.
        buffers: names of buffers within the model, by the address of their copies.
        outputs: numbers of the outputs that are bad, and their events.
        gradients: events of parameters' gradients that are bad.
        bad_gradients: there are some, known or not.
        bad_deltas: the gradient that came back was bad already.
        backward: the backward was run, with every delta that came back.
        changed: attributes and buffers of modules that the forward pass changes: its hidden state.
        written: addresses of buffers that the forward pass writes.
        draws: generators outside torch that it draws from.
    """

    tracer: Tracer
    paths: Mapping[int, str]
    buffers: Mapping[int, str]
    outputs: list[tuple[int, Event]] = field(default_factory=list)
    gradients: list[Event] = field(default_factory=list)
    bad_gradients: bool = False
    bad_deltas: bool = False
    backward: bool = False
    changed: list[str] = field(default_factory=list)
    written: set[int] = field(default_factory=set)
    draws: list[str] = field(default_factory=list)


def replay(call: Call, modules: Container[int] = (), clean: bool = False, backward: bool = True) -> Outcome:
    """Run a call again.

    Args:
        call: it.
        modules: ids of the modules that have a name.
        clean: NaN and Inf in buffers become 0.
        backward: run the backward, too, where the forward pass went well.

    Raises:
        NotReplayable: it cannot be, and why.
        Exception: whatever it raises this time.
    """
    with again(call, clean) as this:
        given: list[tuple[str, Tensor]] = [("input", tensor) for tensor in this.inputs]
        given += [("parameter", alias) for alias in this.stand_ins.aliases.values()]
        given += [("buffer", buffer) for buffer in this.stand_ins.buffers]
        tracer = Tracer(modules, given, stop=Again.run.__code__)
        paths = {address(tensor): path for path, tensor in named_tensors(call.model, this.args, this.kwargs)}
        outcome = Outcome(tracer, paths, this.stand_ins.names())
        with tracer:
            output = this.run()
        outcome.changed, outcome.draws = this.stand_ins.changes(), this.drawn()
        outcome.written = {address(buffer) for buffer in this.stand_ins.buffers if private.version_or_zero(buffer)}
        outputs = list(tensors_of(output))
        events = ((number, tracer.event_of(tensor)) for number, tensor in enumerate(outputs) if look(tensor))
        outcome.outputs = [(number, event) for number, event in events if event is not None]
        lost = any(not event.root.is_deliberate for number, event in outcome.outputs if number in call.used or not call.used)
        if lost or not backward:
            return outcome
        with this.outside_autocast():
            _backward(call, outputs, [*this.stand_ins.aliases.values()], this.inputs, outcome)
    return outcome


def _backward(call: Call, outputs: list[Tensor], aliases: list[Tensor], inputs: list[Tensor], outcome: Outcome) -> None:
    """Run the backward that came back then, into the stand-ins."""
    driven = [(outputs[i], delta) for i, delta in call.deltas.items() if i < len(outputs) and outputs[i].requires_grad]
    if not driven or call.dropped or any(tensor.shape != delta.shape for tensor, delta in driven):
        return
    tracer = outcome.tracer
    for _, delta in driven:
        tracer.give("delta", delta)
        outcome.bad_deltas |= bool(look(delta))
    leaves = [tensor for tensor in (*aliases, *inputs) if tensor.requires_grad]
    nodes = list(nodes_below(tensor.grad_fn for tensor, _ in driven))
    known = {id(leaf) for leaf in leaves}
    foreign = any(id(node.variable) not in known for node in nodes if hasattr(node, "variable"))
    reentrant = any(type(node).__name__.startswith("CheckpointFunction") for node in nodes)
    tracer.in_backward = True
    with tracer:
        if reentrant and not foreign:
            # It refuses to be told what gradients are wanted; the stand-ins have their own.
            torch.autograd.backward([tensor for tensor, _ in driven], [delta for _, delta in driven])
            gradients = [leaf.grad for leaf in leaves]
        elif reentrant:
            return
        else:
            gradients = list(
                torch.autograd.grad(
                    [tensor for tensor, _ in driven],
                    leaves,
                    [delta for _, delta in driven],
                    allow_unused=True,
                    materialize_grads=False,
                )
            )
    outcome.backward = True
    for gradient in gradients:
        if gradient is not None and look(gradient):
            outcome.bad_gradients = True
            event = tracer.event_of(gradient)
            if event is not None:
                outcome.gradients.append(event)
    if outcome.bad_gradients and not outcome.gradients:  # a sparse one is known by no memory: what went bad first it must be
        outcome.gradients = [event for event in tracer.events if event.backward and event.root.backward][:1]
