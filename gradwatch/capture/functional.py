"""Functional activations (`F.relu`, `torch.tanh`): found in the autograd graph, and named after the module they follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from gradwatch.capture import private, saturation
from gradwatch.capture.graph import starts_of
from gradwatch.capture.parts import Activation, Part, Row

MAX_NODES = 20_000
"""Nodes looked at in one walk: 2 us each (measured), so 40 ms at most, on an update that is looked at."""

_SHAPES = ("View", "UnsafeView", "Reshape", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Slice", "Alias", "ToCopy")
"""Beginnings of the names of nodes that change no value (or its precision only): an activation behind one still follows the module."""


def find_functions(
    roots: Iterable[Any],
    parts: Sequence[Part],
    sample: Callable[[Tensor], Row | None],
    peaks: Callable[[Tensor, int, int, float, nn.Module | None], list[Row]],
    turn: int,
) -> int:
    """Add the activations that follow a module, and are none themselves, to the parts that they follow.

    Args:
        roots: tensors (or gradient edges) of the backward that is about to run; afterwards nothing saved is left.
        parts: of the forward passes before it.
        sample: copies a tensor's sample into a row.
        peaks: takes by how much each unit fired.
        turn: number of the look.

    Returns:
        How many were found.
    """
    by_node = {part.node: part for part in parts if part.node >= 0 and part.own[0]}
    if not by_node:
        return 0
    todo = starts_of(roots)
    seen: set[Any] = set(todo)
    found = 0
    while todo and len(seen) < MAX_NODES:
        node = todo.pop()
        followers = [below for below, _ in node.next_functions if below is not None]
        function = saturation.of_node(node)
        if function is not None and followers:
            own = by_node.get(private.sequence_number(node))
            # A module that computes nothing else is seen as what it is; a container may end in a function.
            part = own if own is not None and own.leaf else _behind(followers[0], by_node)
            if part is not None and part.readable and not (part is own and own.activations):
                found += _take(part, node, *function, sample, peaks, turn)
        for below in followers:
            if below not in seen:
                seen.add(below)
                todo.append(below)
    return found


def _behind(node: Any, by_node: dict[int, Part]) -> Part | None:
    for _ in range(4):
        part = by_node.get(private.sequence_number(node))
        if part is not None:
            return part
        if not node.name().startswith(_SHAPES) or not node.next_functions or node.next_functions[0][0] is None:
            return None
        node = node.next_functions[0][0]
    return None


def _take(
    part: Part,
    node: Any,
    module: Any,
    attribute: str,
    sample: Callable[[Tensor], Row | None],
    peaks: Callable[[Tensor, int, int, float, nn.Module | None], list[Row]],
    turn: int,
) -> bool:
    try:
        saved = getattr(node, attribute)
    except (AttributeError, RuntimeError):
        return False  # freed by an earlier backward, or not saved
    if not isinstance(saved, Tensor) or type(saved) is not Tensor:
        return False
    saved = saved.detach()
    row = sample(saved)
    if row is None:
        return False
    is_output = attribute == "_saved_result"
    activation = Activation(module, given=None if is_output else row, out=row if is_output else None)
    fires = saturation.fires(module)
    if fires is not None:
        activation.peaks = peaks(saved, part.axis, turn, fires, None if is_output else module)
    part.activations.append(activation)
    return True
