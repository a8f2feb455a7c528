"""The autograd graph of one backward, walked once: what it reaches, in which order it was executed, and what it cannot show."""

from __future__ import annotations

import contextlib
import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gradwatch.capture import private
from gradwatch.capture.parameters import on_host

MAX_NODES = 100_000
"""Nodes looked at in one walk: 1.8 us each (measured), so 0.2 s at most, once."""

_WIDE = 1000
"""Items of one container that are looked at."""

_FOREIGN = frozenset({"builtins", "collections", "logging", "numpy", "threading", "torch", "weakref"})
"""Packages whose objects hold no layers of the user's."""

_CLAMPS = ("Clamp", "Hardtanh")
"""What begins the names of nodes whose derivative is exactly 0 outside of limits."""

_CONSTANT = 2**20
"""Elements of a constant factor (a mask) up to which it is looked at, in each of the first graphs: 0.6 ms (measured)."""

_CHOOSES = ("Topk", "Gather", "Sort", "Max", "Index")
"""What begins the names of nodes that take the best of several."""

_OPAQUE = ("CompiledFunctionBackward",)


@dataclass(slots=True)
class GraphFacts:
    """What a walk found.

    Attributes:
        order: slot -> smallest sequence number among the consumers of its AccumulateGrad node; ascending from the input.
        distance: slot -> least number of edges between a root and it.
        outside: trainable `nn.Parameter` leaves that are not watched.
        clamped: slots that every path from a root to goes through a clamp.
        opaque: a node that hides what is below it was met, or the walk was cut short.
    """

    order: dict[int, int] = field(default_factory=dict)
    distance: dict[int, int] = field(default_factory=dict)
    outside: list[Tensor] = field(default_factory=list)
    clamped: set[int] = field(default_factory=set)
    opaque: bool = False


def walk(roots: Iterable[Any], slot_of: Mapping[int, int], limit: int = MAX_NODES) -> GraphFacts:
    """Walk the graph below `roots`, breadth first.

    Args:
        roots: tensors (or gradient edges) of which the derivative is taken.
        slot_of: `id(parameter)` -> slot.
        limit: nodes after which the walk is cut short.
    """
    facts = GraphFacts()
    starts = dict.fromkeys(starts_of(roots))
    seen: set[Any] = set(starts)
    queue: deque[tuple[Any, int]] = deque((node, 0) for node in starts)
    clamps = False
    while queue:
        node, depth = queue.popleft()
        if len(seen) > limit:
            facts.opaque = True
            break
        name = type(node).__name__
        # A custom function, reentrant checkpoint among them, carries `_forward_cls`: what it does inside is its own affair.
        if name in _OPAQUE or hasattr(node, "_forward_cls"):
            facts.opaque = True
        clamps = clamps or _is_clamp(node)
        number = -1
        for below, _ in node.next_functions:
            if below is None:
                continue
            leaf = getattr(below, "variable", None)
            if leaf is not None:
                if number < 0:
                    number = private.sequence_number(node)
                _leaf(facts, leaf, number, depth + 1, slot_of, below not in seen)
                seen.add(below)
            elif below not in seen:
                seen.add(below)
                queue.append((below, depth + 1))
    if clamps and not facts.opaque:
        facts.clamped = set(facts.distance) - _reached(starts, slot_of, _is_clamp, limit + 1)
    return facts


def switched_on(roots: Iterable[Any], slot_of: Mapping[int, int], limit: int = MAX_NODES) -> set[int]:
    """Slots that some path leads to on which nothing is multiplied by constants that are all zero, nothing has no elements, and no
    softmax is over a single one.

    Before the backward, which frees what is read here. Nothing that is on a device is read.
    """
    return _reached(starts_of(roots), slot_of, _is_off, limit)


def starts_of(roots: Iterable[Any]) -> list[Any]:
    """The nodes of tensors, or of edges of the graph; those that have none are left out."""
    nodes = (root.grad_fn if isinstance(root, Tensor) else getattr(root, "node", None) for root in roots)
    return [node for node in nodes if node is not None]


def _reached(starts: Iterable[Any], slot_of: Mapping[int, int], ends: Callable[[Any], bool], limit: int) -> set[int]:
    """Slots that some path leads to without a node that `ends` it."""
    todo = list(dict.fromkeys(starts))
    seen, found = set(todo), set()
    while todo and len(seen) < limit:
        node = todo.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(slot_of.get(id(leaf), -1))
        if ends(node):
            continue
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                todo.append(below)
    return found - {-1}


def _is_clamp(node: Any) -> bool:
    return type(node).__name__.startswith(_CLAMPS)


def _is_off(node: Any) -> bool:
    shape = private.output_shape(node)
    if shape is not None and 0 in shape:
        return True
    if shape and type(node).__name__.startswith("SoftmaxBackward"):
        # Attention over one token, a router of one expert: it gives 1, whatever it is given. Over the one that was chosen it is a mistake.
        dim = private.saved_integer(node, "dim")
        chosen = any(type(child).__name__.startswith(_CHOOSES) for child, _ in node.next_functions)
        return dim is not None and shape[dim] == 1 and not chosen
    if not type(node).__name__.startswith("MulBackward"):
        return False
    number = private.saved_number(node, "other")
    if number is not None:
        return number == 0.0
    below = [child is None for child, _ in node.next_functions]
    if below.count(True) != 1:
        return False
    other = private.saved_tensor(node, "self" if below[0] else "other")
    if (
        other is None
        or type(other) is not Tensor
        or not on_host(other)
        or other.numel() > _CONSTANT
        or not private.has_value(other)
    ):
        return False
    return not bool(other.detach().any())


def _leaf(facts: GraphFacts, leaf: Tensor, number: int, depth: int, slot_of: Mapping[int, int], first: bool) -> None:
    slot = slot_of.get(id(leaf))
    if slot is None:
        if first and isinstance(leaf, nn.Parameter):
            facts.outside.append(leaf)
        return
    if first:
        facts.distance[slot] = depth
    if number >= 0:
        facts.order[slot] = min(number, facts.order.get(slot, number))


def find_unregistered(modules: Mapping[str, nn.Module], leaves: Iterable[Tensor], depth: int = 3) -> dict[int, str]:
    """Where in the attributes of watched modules the unregistered `leaves` live: a layer in a plain list, a parameter in a dict.

    Returns:
        `id(leaf)` -> its path, for example "blocks.layers[0].weight"; leaves that are found nowhere are absent.
    """
    wanted = {id(leaf) for leaf in leaves}
    found: dict[int, str] = {}
    for name, module in modules.items():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules") or attribute.endswith(("_hooks", "_hooks_with_kwargs")):
                continue
            _search(value, f"{name}.{attribute}" if name else attribute, depth, wanted, found)
    return found


def _search(value: Any, path: str, depth: int, wanted: set[int], found: dict[int, str]) -> None:
    if isinstance(value, Tensor):
        if id(value) in wanted:
            found.setdefault(id(value), path)
    elif isinstance(value, nn.Module):
        for name, parameter in value.named_parameters():
            if id(parameter) in wanted:
                found.setdefault(id(parameter), f"{path}.{name}")
    elif depth:
        for step, item in _inside(value):
            _search(item, path + step, depth - 1, wanted, found)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container, a function's closure or an object of the user's own holds."""
    if isinstance(value, (list, tuple)):
        yield from ((f"[{i}]", item) for i, item in enumerate(value[:_WIDE]))
    elif isinstance(value, dict):
        yield from ((f"[{key!r}]", item) for key, item in list(value.items())[:_WIDE])
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a cell that nothing was put into yet
                yield f"({name})", cell.cell_contents
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif type(value).__module__.partition(".")[0] not in _FOREIGN and isinstance(getattr(value, "__dict__", None), dict):
        yield from ((f".{name}", item) for name, item in list(vars(value).items())[:_WIDE])
