"""Where branches of a network begin and end: which parameters are the first to meet the data, and which are the last before the loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from gradwatch.capture import private
from gradwatch.capture.graph import starts_of

MAX_NODES = 100_000
"""Nodes looked at; 3 us each (measured), once for each graph. A larger graph has no roles."""

_VIEWS = (
    "TBackward",
    "Transpose",
    "Permute",
    "View",
    "Expand",
    "Unsqueeze",
    "Squeeze",
    "ToCopy",
    "UnsafeView",
    "Reshape",
    "Slice",
    "Select",
)


_ELEMENTWISE = ("DivBackward", "MulBackward", "SubBackward", "AddBackward")

MANY, NONE = -2, -1
"""In place of a parameter's slot: several, none."""


@dataclass(slots=True)
class Roles:
    """Slots of parameters by their place in the graph.

    Attributes:
        inputs: the operator that uses it reads data and nothing that depends on a parameter: a branch begins here.
        heads: some path from the loss meets it before any other parameter: a branch ends here.
    """

    inputs: set[int] = field(default_factory=set)
    heads: set[int] = field(default_factory=set)


def roles(roots: Iterable[Any], slot_of: Mapping[int, int], limit: int = MAX_NODES) -> Roles:
    """Find both in the graph below `roots`.

    An operator *uses* the parameters that it takes directly or through views (a transposed weight). An operator of parameters alone
    (a weight norm, a penalty) uses none in this sense: data has to flow through it. What a parameter becomes by arithmetic with
    something that depends on it alone (its spectral norm) counts as that parameter.

    Args:
        roots: tensors (or gradient edges) of which the derivative is taken.
        slot_of: `id(parameter)` -> slot.
        limit: nodes after which there is no answer.
    """
    starts = starts_of(roots)
    found = Roles()
    used: dict[Any, tuple[int, ...]] = {}
    begins: dict[Any, tuple[int, ...]] = {}
    depends: dict[Any, bool] = {}
    alone: dict[Any, int] = {}
    made: dict[Any, int] = {}
    stack = [(node, False) for node in starts]
    while stack:
        node, below_is_done = stack.pop()
        children = [child for child, _ in node.next_functions]
        if below_is_done:
            # Views of one parameter are not operators of their own: what takes them is.
            slots = [None if child is None else _parameter(child, slot_of, made) for child in children]
            own = tuple(slot for slot in slots if slot is not None)
            rest = [child for child, slot in zip(children, slots, strict=True) if child is not None and slot is None]
            flows = any(depends.get(child, False) for child in rest)
            depends[node] = bool(own) or flows
            below = {*own, *(alone.get(child, NONE) for child in rest)} - {NONE}
            alone[node] = below.pop() if len(below) == 1 else MANY if below else NONE
            if len(own) == 1 and alone[node] == own[0] and type(node).__name__.startswith(_ELEMENTWISE):
                # By a number, what has become of a parameter stays that; a parameter itself may scale data.
                itself = next(child for child, slot in zip(children, slots, strict=True) if slot is not None)
                if flows or (itself in made and private.output_shape(node) == private.output_shape(itself)):
                    made[node] = own[0]
            if node in made:
                _forget(rest, used, begins)
            elif own and (len(children) > len(own) or type(node).__name__.startswith("Embedding")):
                used[node] = own
                if not flows:
                    begins[node] = own
        elif node not in depends:
            if len(depends) > limit:
                return Roles()
            depends[node] = False
            stack.append((node, True))
            stack.extend(
                (child, False) for child in children if child is not None and child not in depends and _is_operator(child, slot_of)
            )
    found.inputs.update(*begins.values())
    seen: set[Any] = set()
    heads = list(starts)
    while heads:
        node = heads.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in used:
            found.heads.update(used[node])
        else:
            heads.extend(child for child, _ in node.next_functions if child is not None)
    return found


def _forget(nodes: list[Any], *uses: dict[Any, tuple[int, ...]]) -> None:
    """Take out what operators below some nodes use."""
    todo, seen = list(nodes), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for use in uses:
            use.pop(node, None)
        todo.extend(child for child, _ in node.next_functions)


def _is_operator(node: Any, slot_of: Mapping[int, int]) -> bool:
    return getattr(node, "variable", None) is None and _parameter(node, slot_of) is None


def _parameter(node: Any, slot_of: Mapping[int, int], made: Mapping[Any, int] = MappingProxyType({})) -> int | None:
    """The slot of the parameter that a node is, is a view of, or was made of alone."""
    for _ in range(8):
        if node in made:
            return made[node]
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            return slot_of.get(id(leaf))
        below = [child for child, _ in node.next_functions]
        if len(below) != 1 or below[0] is None or not type(node).__name__.startswith(_VIEWS):
            return None
        node = below[0]
    return None
