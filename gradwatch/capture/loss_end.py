"""The end of the graph next to the loss: which criterion it is, and whether what it normalises was normalised before."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradwatch.capture import private

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

_PAIRS = {"LogSoftmaxBackward0": "SoftmaxBackward0", "BinaryCrossEntropyWithLogitsBackward0": "SigmoidBackward0"}
_WORDS = {"SoftmaxBackward0": "softmax", "SigmoidBackward0": "sigmoid"}


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
        broadcast: the prediction was expanded to the shape of the target.
    """

    name: str
    guess: float
    broadcast: bool


@dataclass(frozen=True, slots=True)
class Squashed:
    """Probabilities that the criterion takes for logits.

    Attributes:
        function: "softmax" or "sigmoid".
        numbers: sequence numbers of its node and of those between it and the criterion.
    """

    function: str
    numbers: frozenset[int]


def squashed(roots: Iterable[Any], limit: int = MAX_NODES) -> Squashed | None:
    """A softmax whose output, its values unchanged, goes into a log-softmax; or a sigmoid before a loss that takes logits.

    A log-softmax of logarithms of probabilities changes nothing, and is none.
    """
    seen: set[Any] = set(_starts(roots))
    todo = list(seen)
    while todo and len(seen) < limit:
        node = todo.pop()
        inner = _PAIRS.get(type(node).__name__)
        if inner is not None:
            path = _down_to(node, inner)
            if path is not None:
                return Squashed(_WORDS[inner], frozenset(private.sequence_number(each) for each in path))
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
        loss_scale: what a GradScaler multiplied the loss by.
    """
    starts = _starts(roots)
    if len(starts) != 1:
        return None
    node, factor = _without_factors(starts[0])
    if _name(node) == "Mean":
        return _by_hand(node, factor / loss_scale)
    name = _NAMES.get(_name(node))
    if name is None or not factor > 0 or private.saved_number(node, "reduction") != _MEAN or not node.next_functions:
        return None
    given = node.next_functions[0][0]
    if given is None or (name == "cross_entropy" and _name(_through(given, _SAME_VALUES)) != "LogSoftmax"):
        return None
    weighted = private.saved_tensor(node, "weight") is not None or private.saved_tensor(node, "pos_weight") is not None
    guess = math.nan if weighted else _guess(name, node)
    return Criterion(name, guess * factor / loss_scale, _name(given) == "Expand")


def _by_hand(node: Any, factor: float) -> Criterion | None:
    """The mean of squares or of absolute values of a difference, `((model(x) - y) ** 2).mean()`: of it the difference is left, no target."""
    power = node.next_functions[0][0]
    square = power is not None and _name(power) == "Pow" and private.saved_number(power, "exponent") == 2
    if not factor > 0 or not (square or (power is not None and _name(power) == "Abs")):
        return None
    difference, minus = private.saved_tensor(power, "self"), power.next_functions[0][0]
    if difference is None or minus is None or _name(minus) != "Sub":
        return None
    sides = [side for side, _ in minus.next_functions if side is not None]
    if len(sides) != 1 or difference.dim() == 0 or len(difference) < 2 or difference.numel() > _TARGETS:
        return None
    given = private.output_shape(sides[0])
    broadcast = given is not None and math.prod(given) != difference.numel()
    name = "mse_loss" if square else "l1_loss"
    if difference.device.type != "cpu":
        return Criterion(name, math.nan, broadcast)
    values = difference.detach().double()
    # What varies is the target and, at first a little, the prediction.
    guess = values.var(0, correction=0).mean() if square else (values - values.median(0).values).abs().mean()
    return Criterion(name, float(guess) * factor, broadcast)


def _guess(name: str, node: Any) -> float:
    """Loss of the best constant output on this batch, one constant for each place behind the first dimension; NaN: not known."""
    if name == "cross_entropy":
        scores = private.saved_tensor(node, "self")
        return math.log(scores.shape[1] if scores.dim() > 1 else len(scores)) if scores is not None and scores.numel() else math.nan
    target = private.saved_tensor(node, "target")
    if target is None or target.dim() == 0 or len(target) < 2 or not target.is_floating_point() or target.numel() > _TARGETS:
        return math.nan
    if target.device.type != "cpu":  # to ask a device for the value would be to wait for it
        return math.nan
    values = target.detach().double()
    with torch.no_grad():
        if name.startswith("binary"):
            share = values.mean(0).clamp(1e-12, 1.0 - 1e-12)
            return float(-(share * share.log() + (1.0 - share) * (1.0 - share).log()).mean())
        best = (values.mean(0) if name == "mse_loss" else values.median(0).values).expand_as(values)
        if name == "smooth_l1_loss":
            return float(F.smooth_l1_loss(best, values, beta=float(node._saved_beta)))
        if name == "huber_loss":
            return float(F.huber_loss(best, values, delta=float(node._saved_delta)))
        return float(F.mse_loss(best, values) if name == "mse_loss" else F.l1_loss(best, values))


def _without_factors(node: Any) -> tuple[Any, float]:
    """The node below multiplications and divisions by numbers, and what they amount to; NaN where that is on a device."""
    factor = 1.0
    for _ in range(8):
        node = _through(node, ("View", "Squeeze", "Reshape", "Alias", "ToCopy", "Clone"))
        below = [child for child, _ in node.next_functions if child is not None]
        if _name(node) not in ("Mul", "Div") or len(below) != 1:
            break
        other = private.saved_tensor(node, "other")
        if other is None:
            other = private.saved_tensor(node, "self")
        if other is None or other.numel() != 1 or other.device.type != "cpu" or not float(other):
            return node, math.nan
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


def _down_to(node: Any, wanted: str) -> list[Any] | None:
    """The nodes between one and those of a kind, if all ways down lead to such without a change of value."""
    below = [child for child, _ in node.next_functions if child is not None]
    path: list[Any] = []
    # One step of a recurrent network after another is stacked: 10,000 are more than anybody unrolls.
    while below and len(path) < 10_000:
        child = below.pop()
        path.append(child)
        if type(child).__name__ == wanted:
            continue
        if _name(child) not in _SAME_VALUES:
            return None
        more = [each for each, _ in child.next_functions if each is not None]
        if not more:
            return None
        below += more
    return path or None


def _name(node: Any) -> str:
    return str(type(node).__name__).rstrip("0123456789").removesuffix("Backward")
