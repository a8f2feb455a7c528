"""The end of the graph next to the loss: whether what the criterion normalises was normalised before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gradwatch.capture import private
from gradwatch.capture.graph import starts_of

MAX_NODES = 100_000
"""Nodes looked at; 1.5 us each, once for each graph. What lies behind more is not found."""

SAME_VALUES = (
    "View",
    "UnsafeView",
    "Reshape",
    "ReshapeAlias",
    "Transpose",
    "T",
    "Permute",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Select",
    "Index",
    "IndexSelect",
    "MaskedSelect",
    "Narrow",
    "Split",
    "SplitWithSizes",
    "Unbind",
    "Chunk",
    "Alias",
    "Clone",
    "ToCopy",
    "Contiguous",
    "Cat",
    "Stack",
    "Clamp",
    "ClampMin",
    "ClampMax",
)
"""Names of nodes (without "Backward0") that leave probabilities what they are: put elsewhere, cut out, joined, kept off 0 and 1."""

_OUTER = {
    "LogSoftmaxBackward0": "softmax",
    "LogsumexpBackward0": "softmax",
    "BinaryCrossEntropyWithLogitsBackward0": "sigmoid",
}
"""What normalises: `logits - logits.logsumexp(-1)`, as `torch.distributions.Categorical` does it, is a log-softmax too."""
_INNER = {"SoftmaxBackward0": "softmax", "SigmoidBackward0": "sigmoid"}


@dataclass(frozen=True, slots=True)
class Squashed:
    """Probabilities that the criterion takes for logits.

    Attributes:
        function: "softmax" or "sigmoid": what both do; or "softmax of sigmoid", "sigmoid of softmax".
        numbers: sequence numbers of its node and of those between it and the criterion.
    """

    function: str
    numbers: frozenset[int]


def squashed(roots: Iterable[Any], limit: int = MAX_NODES) -> Squashed | None:
    """A softmax or sigmoid whose output, its values unchanged, goes into a log-softmax or a loss that takes logits.

    A log-softmax of logarithms of probabilities changes nothing, and is none.
    """
    todo = deque(starts_of(roots))
    seen: set[Any] = set(todo)
    while todo and len(seen) < limit:
        node = todo.popleft()  # what is next to the loss comes first, whatever else is added to it
        outer = _OUTER.get(type(node).__name__)
        found = _down_to(node) if outer is not None else None
        if found is not None:
            inner, path = found
            function = inner if inner == outer else f"{outer} of {inner}"
            return Squashed(function, frozenset(private.sequence_number(each) for each in path) - {-1})
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                todo.append(below)
    return None


def through(node: Any, names: tuple[str, ...]) -> Any:
    while name_of(node) in names and node.next_functions and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    return node


def _down_to(node: Any) -> tuple[str, list[Any]] | None:
    """What one of `_INNER` all ways down from a node lead to without a change of value, and the nodes on them; None where they do not."""
    below = [child for child, _ in node.next_functions[:1] if child is not None]  # what comes behind are targets and weights
    path = dict.fromkeys(below)
    inner: set[str] = set()
    # One step of a recurrent network after another is stacked: 10,000 are more than anybody unrolls.
    while below and len(path) < 10_000:
        child = below.pop()
        if type(child).__name__ in _INNER:
            inner.add(_INNER[type(child).__name__])
            continue
        if name_of(child) not in SAME_VALUES:
            return None
        new = dict.fromkeys(each for each, _ in child.next_functions if each is not None and each not in path)
        path.update(new)
        below += new
    return (inner.pop(), list(path)) if len(inner) == 1 and not below else None


def name_of(node: Any) -> str:
    return str(type(node).__name__).rstrip("0123456789").removesuffix("Backward")
