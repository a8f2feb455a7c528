"""A forward pass of the update in flight, what is known of an update that went wrong, and who finds out why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradwatch.records import Alert, Inquiry

ITEMS = 2_000
"""Things among the arguments, or the outputs, of a call that are looked at: a batch of many small tensors has hundreds."""

PLAIN = (Tensor, nn.Parameter)
"""What is looked at: a tensor of somebody's own class may do anything."""


@dataclass(slots=True, weakref_slot=True)
class Call:
    """A forward pass of a watched model.

    Attributes:
        root: number of the model.
        model: the model.
        args, kwargs: what it was given; where gradients flow on through that, without their graph.
        versions: version of each tensor in them, in the order of `tensors_of`, when it began.
        computed: numbers of those that had a graph: somebody had computed them.
        generator: state of the CPU's random generator, then.
        generators: the same of other devices.
        autocast: (device type, dtype) of what autocast was on, then.
        site: file and line that called it, outside torch; ("", 0): not known.
        outputs: output -> what it was, without its graph, and its version; those that are not too large.
        nodes: output -> sequence number of the autograd node that made it, by its number among the outputs.
        deltas: output -> the gradient with respect to it.
        used: numbers of the outputs through which a backward has gone.
        reached: a backward has gone through it.
        age: backward passes that have returned since.
        dropped: some deltas were too large to be held.
    """

    root: int
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    generator: Tensor
    computed: set[int] = field(default_factory=set)
    generators: dict[int, Tensor] = field(default_factory=dict)
    autocast: list[tuple[str, torch.dtype]] = field(default_factory=list)
    site: tuple[str, int] = ("", 0)
    outputs: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    nodes: dict[int, int] = field(default_factory=dict)
    deltas: dict[int, Tensor] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    reached: bool = False
    age: int = 0
    dropped: bool = False

    @property
    def nbytes(self) -> int:
        """Of its inputs."""
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of((self.args, self.kwargs)))


@dataclass(frozen=True, slots=True)
class Case:
    """What is known of an update that went wrong.

    Attributes:
        step: its number.
        calls: the forward passes that its backward went through, or may go through.
        roots: of the backward.
        modules: names of modules by their ids.
        parameters: name and tensor of each watched parameter, by its id.
        bad: ids of the parameters whose gradient is not finite.
        loss_is_bad: the loss is not finite.
        by_scaler: a GradScaler scaled it, so that an overflow of its derivative is the scale's doing.
    """

    step: int
    calls: Sequence[Call]
    roots: Sequence[Any]
    modules: Mapping[int, str]
    parameters: Mapping[int, tuple[str, Tensor]]
    bad: frozenset[int] = frozenset()
    loss_is_bad: bool = False
    by_scaler: bool = False


class Ask(Protocol):
    """Finds out why an update went wrong."""

    def wants(self, step: int, by_scaler: bool, loss_is_bad: bool) -> bool:
        """Whether there is something to be found out about an update whose loss or gradients are not finite."""
        ...

    @property
    def armed(self) -> int:
        """Updates that are to be traced as they run."""
        ...

    def begin(self, call: Call, case: Case) -> None:
        """A forward pass begins, and `armed` is not 0."""
        ...

    def pause(self) -> None:
        """What runs from here on is the watch's own."""
        ...

    def backward_begins(self) -> None:
        """The outermost backward begins now."""
        ...

    def was_fine(self) -> None:
        """It has returned, and all is well."""
        ...

    def stop(self) -> None:
        """The watch is left, or a backward has raised."""
        ...

    def explain(self, alert: Alert, case: Case) -> Inquiry | None:
        """What there is to be found out about an incident that opens."""
        ...

    def before(self, case: Case) -> None:
        """A backward is about to run whose loss is not finite; its graph still holds values."""
        ...

    def after(self, case: Case) -> Inquiry | None:
        """A backward has left gradients that are not finite, or its loss was not."""
        ...


def tensors_of(thing: Any) -> Iterator[Tensor]:
    """Every plain floating tensor in nested tuples, lists, mappings, dataclasses and objects (a distribution), in a fixed order, as far as
    `ITEMS` things go."""
    if type(thing) is Tensor or (type(thing) is tuple and len(thing) == 1 and type(thing[0]) is Tensor):  # nearly always
        one = thing if type(thing) is Tensor else thing[0]
        return iter((one,) if one.is_floating_point() or one.is_complex() else ())
    return _tensors_of(thing, 6, [ITEMS])


def _tensors_of(thing: Any, depth: int, left: list[int]) -> Iterator[Tensor]:
    left[0] -= 1
    if left[0] < 0:
        return
    if type(thing) in PLAIN:
        if thing.is_floating_point() or thing.is_complex():
            yield thing
    elif not depth or thing is None or isinstance(thing, (str, bytes, int, float, nn.Module, type)):
        return
    elif isinstance(thing, (tuple, list)):
        for item in islice(thing, max(0, left[0])):
            yield from _tensors_of(item, depth - 1, left)
    elif isinstance(thing, Mapping):
        for item in islice(thing.values(), max(0, left[0])):
            yield from _tensors_of(item, depth - 1, left)
    elif is_dataclass(thing):
        for each in fields(thing):
            yield from _tensors_of(getattr(thing, each.name, None), depth - 1, left)
    elif isinstance(getattr(thing, "__dict__", None), dict) and not callable(thing) and not isinstance(thing, Tensor):
        for item in islice(list(vars(thing).values()), max(0, left[0])):
            yield from _tensors_of(item, depth - 1, left)
