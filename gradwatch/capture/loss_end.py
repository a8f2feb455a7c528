"""The end of the graph next to the loss: which criterion it is, and whether what it normalises was normalised before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch.capture import private
from gradwatch.capture.parameters import on_host

MAX_NODES = 100_000
"""Nodes looked at; 1.5 us each, once for each graph. What lies behind more is not found."""

_SAME_VALUES = (
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

_OUTER = {"LogSoftmaxBackward0": "softmax", "BinaryCrossEntropyWithLogitsBackward0": "sigmoid"}
_INNER = {"SoftmaxBackward0": "softmax", "SigmoidBackward0": "sigmoid"}


_NAMES = {
    "NllLoss": "cross_entropy",
    "NllLoss2D": "cross_entropy",
    "MseLoss": "mse_loss",
    "L1Loss": "l1_loss",
    "SmoothL1Loss": "smooth_l1_loss",
    "HuberLoss": "huber_loss",
    "BinaryCrossEntropy": "binary_cross_entropy",
    "BinaryCrossEntropyWithLogits": "binary_cross_entropy_with_logits",
}
_SYMMETRIC = frozenset({"mse_loss", "smooth_l1_loss", "huber_loss"})
"""Those that may be given the target first."""

_MEAN = 1
"""Number of `reduction="mean"` in torch."""

_TARGETS = 2**20
"""Elements of a target up to which it is looked at."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """What a loss is.

    Attributes:
        name: of the function in `torch.nn.functional`; its reduction is the mean.
        guess: loss of the best constant output; NaN where it is not known.
        broadcast: N predictions were expanded to N x N by the shape of the target.
    """

    name: str
    guess: float
    broadcast: bool


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
    todo = deque(_starts(roots))
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


def criterion(roots: Iterable[Any], loss_scale: float = 1.0) -> Criterion | None:
    """The criterion that a loss is, right before its backward; None where the loss is another one, or several.

    Saved tensors are read here: not while somebody's hooks pack them, and not after the backward.

    Args:
        roots: of the backward.
        loss_scale: what a GradScaler multiplied the loss by; NaN: a number that is on a device.
    """
    roots = list(roots)
    starts = _starts(roots)
    if len(roots) != 1 or not starts or not isinstance(roots[0], Tensor) or roots[0].numel() != 1:
        return None
    node, factor = _without_factors(starts[0], loss_scale)
    if _name(node) == "Mean":
        return _by_hand(node, factor)
    name = _NAMES.get(_name(node))
    if name is None or not factor > 0 or private.saved_number(node, "reduction") != _MEAN:
        return None
    sides = {of: side for of, side in zip(("self", "target"), node.next_functions, strict=False) if side[0] is not None}
    if len(sides) != 1 or ("self" not in sides and name not in _SYMMETRIC):
        return None  # a target that is computed is no target that a constant could meet
    ((of, given),) = sides.items()
    if name == "cross_entropy" and _name(_through(given[0], _SAME_VALUES)) != "LogSoftmax":
        return None
    weighted = private.saved_tensor(node, "weight") is not None or private.saved_tensor(node, "pos_weight") is not None
    guess = math.nan if weighted else _guess(name, node, "target" if of == "self" else "self")
    return Criterion(name, guess * factor, _is_crossed(given, private.output_shape(*given)))


def _by_hand(node: Any, factor: float) -> Criterion | None:
    """The mean of squares or of absolute values of a difference, `((model(x) - y) ** 2).mean()`: of it the difference is left, no target.

    `l1_loss` is one too.
    """
    power = node.next_functions[0][0]
    square = power is not None and _name(power) == "Pow" and private.saved_number(power, "exponent") == 2
    if not factor > 0 or not (square or (power is not None and _name(power) == "Abs")):
        return None
    difference, minus = private.saved_tensor(power, "self"), power.next_functions[0][0]
    if difference is None or minus is None or _name(minus) != "Sub":
        return None
    sides = [side for side in minus.next_functions if side[0] is not None]
    if len(sides) != 1 or difference.dim() == 0 or len(difference) < 2 or difference.numel() > _TARGETS:
        return None
    broadcast = _is_crossed(sides[0], tuple(difference.shape))
    name = "mse_loss" if square else "l1_loss"
    if not _readable(difference) or not difference.is_floating_point():
        return Criterion(name, math.nan, broadcast)
    values = difference.detach().double()
    # What varies is the target and, at first a little, the prediction.
    guess = values.var(0, correction=0).mean() if square else (values - values.median(0).values).abs().mean()
    return Criterion(name, float(guess) * factor, broadcast)


def _is_crossed(given: tuple[Any, int], shape: tuple[int, ...] | None) -> bool:
    """N values that a node of the graph made were repeated to N x N, by an `expand` that it may be itself; False where shapes are not known.

    Every prediction is compared with every target then. One row for all, `(1, 10)`, may be meant.
    """
    if _name(given[0]) == "Expand":
        given = given[0].next_functions[0]
    before = private.output_shape(*given)
    return before is not None and shape is not None and math.prod(before) > 1 and math.prod(before) ** 2 == math.prod(shape)


def _guess(name: str, node: Any, of: str) -> float:
    """Loss of the best constant output on this batch, one constant for each place behind the first dimension; NaN: not known.

    Of a cross-entropy that of equal logits, whatever the classes of this batch are; of the losses between the squared and the absolute
    error that of the better of mean and median.
    """
    if name == "cross_entropy":
        scores = private.saved_tensor(node, "self")
        return math.log(scores.shape[1] if scores.dim() > 1 else len(scores)) if scores is not None and scores.numel() else math.nan
    target = private.saved_tensor(node, of)
    if target is None or target.dim() == 0 or len(target) < 2 or not target.is_floating_point() or target.numel() > _TARGETS:
        return math.nan
    if not _readable(target):
        return math.nan
    values = target.detach().double()
    with torch.no_grad():
        if name.startswith("binary"):
            share = values.mean(0)
            # Exactly 0, which is not known, where all targets are the same: a first batch without a positive one says nothing.
            return float((torch.special.entr(share) + torch.special.entr(1.0 - share)).mean())
        mean = values.mean(0).expand_as(values)
        if name == "mse_loss":
            return float(F.mse_loss(mean, values))
        both = mean, values.median(0).values.expand_as(values)
        if name == "smooth_l1_loss":
            beta = private.saved_number(node, "beta")
            return math.nan if beta is None else min(float(F.smooth_l1_loss(best, values, beta=beta)) for best in both)
        delta = private.saved_number(node, "delta")
        return math.nan if delta is None else min(float(F.huber_loss(best, values, delta=delta)) for best in both)


def _readable(tensor: Tensor) -> bool:
    """Its values can be asked for: they are on no device that would have to be waited for, and it is what it seems."""
    return type(tensor) in (Tensor, nn.Parameter) and on_host(tensor)


def _without_factors(node: Any, loss_scale: float) -> tuple[Any, float]:
    """The node below multiplications and divisions by numbers, and what they amount to over the loss scale; NaN where that is on a device.

    A loss scale on a device is the first factor there, and comes to 1.
    """
    factor = 1.0 / loss_scale
    for _ in range(8):
        node = _through(node, ("View", "Squeeze", "Reshape", "Alias", "ToCopy", "Clone"))
        below = [child for child, _ in node.next_functions if child is not None]
        if _name(node) not in ("Mul", "Div") or len(below) != 1:
            break
        other = private.saved_tensor(node, "other")
        if other is None:
            other = private.saved_tensor(node, "self")
        if other is None or other.is_complex():
            return node, math.nan
        if math.isnan(loss_scale) and not on_host(other) and _name(node) == "Mul":
            loss_scale = factor = 1.0 if math.isnan(factor) else factor
        elif not _readable(other) or not float(other):
            return node, math.nan
        else:
            factor = factor * float(other) if _name(node) == "Mul" else factor / float(other)
        node = below[0]
    return node, factor


def _starts(roots: Iterable[Any]) -> list[Any]:
    nodes = (root.grad_fn if isinstance(root, Tensor) else getattr(root, "node", None) for root in roots)
    return [node for node in nodes if node is not None]


def _through(node: Any, names: tuple[str, ...]) -> Any:
    while _name(node) in names and node.next_functions and node.next_functions[0][0] is not None:
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
        if _name(child) not in _SAME_VALUES:
            return None
        new = dict.fromkeys(each for each, _ in child.next_functions if each is not None and each not in path)
        path.update(new)
        below += new
    return (inner.pop(), list(path)) if len(inner) == 1 and not below else None


def _name(node: Any) -> str:
    return str(type(node).__name__).rstrip("0123456789").removesuffix("Backward")
