"""Which criterion a loss is, and what the best constant output would cost under it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch.capture import private
from gradwatch.capture.graph import starts_of
from gradwatch.capture.loss_end import SAME_VALUES, name_of, through
from gradwatch.capture.parameters import on_host
from gradwatch.facts import BINARY

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

_REDUCTIONS = ("none", "mean", "sum")
"""By their numbers in torch."""

_TARGETS = 2**20
"""Elements of a target up to which it is looked at."""

_SAME_ELEMENTS = frozenset(
    ("Mean", "View", "UnsafeView", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Permute", "Alias", "ToCopy", "Clone")
)
"""Nodes of which the mean is that of what they are given."""

_TERMS = 64
"""Terms of a sum, and nodes between one and the next, up to which it is taken apart."""

_NEGATIVE = -0.1
"""Part of what is known of a sum from which what is not known may lie below 0: an entropy bonus does. Of a policy's gain or a likelihood
that is the larger part, no level means anything."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """What a loss is.

    Attributes:
        name: of the function in `torch.nn.functional`; "cross_entropies" where several of them, or one and something else, are added
            up; "sum" where other losses are, and where elements are added up without being divided by a number.
        guess: loss of the best constant output; NaN where it is not known. Terms that are not known cost what they cost now.
        broadcast: N predictions were expanded to N x N by the shape of the target.
    """

    name: str
    guess: float
    broadcast: bool


@dataclass(frozen=True, slots=True)
class _Place:
    """A node, and what of it the loss holds.

    Attributes:
        node: None for a constant.
        factor: times the mean of what it gives.
        divided: by a number, on the way.
        summed: over how many elements it was summed without being divided by a number after that: the more, the larger the loss.
    """

    node: Any
    factor: float
    divided: bool = False
    summed: float = 1.0


@dataclass(frozen=True, slots=True)
class _Term:
    """A known term of a loss: `factor` times `name`.

    Attributes:
        name: see `Criterion`.
        factor: what the criterion's own value is multiplied by, number of elements included.
        guess: what the best constant output would give, times the factor.
        value: what it is now, not yet times the factor; not computed before it is needed. NaN: not known.
        broadcast: see `Criterion`.
        summed: over elements, without being divided by a number after that.
    """

    name: str
    factor: float
    guess: float
    value: Callable[[], float]
    broadcast: bool
    summed: bool = False


def criterion(roots: Iterable[Any], loss_scale: float = 1.0) -> Criterion | None:
    """The criterion that a loss is, right before its backward; None where the loss is none that is known, nor a sum of such.

    Saved tensors are read here: not while somebody's hooks pack them, and not after the backward.

    Args:
        roots: of the backward.
        loss_scale: what a GradScaler multiplied the loss by; NaN: a number that is on a device.
    """
    roots = list(roots)
    starts = starts_of(roots)
    if len(roots) != 1 or not starts or not isinstance(roots[0], Tensor) or roots[0].numel() != 1:
        return None
    todo = [_below(_Place(starts[0], 1.0 / loss_scale), scaled_on_device=math.isnan(loss_scale))]
    known: list[_Term] = []
    others = constants = 0
    for _ in range(_TERMS):
        if not todo:
            break
        place = todo.pop()
        if place.node is None:
            constants += 1
            continue
        place = _below(place)
        parts = _parts(place)
        if parts is not None:
            todo += parts
            continue
        term = _term(place)
        if term is not None:
            known.append(term)
        else:
            others += 1
    if todo or not known:
        return None
    if len(known) == 1 and not others and not constants:
        return Criterion("sum" if known[0].summed else known[0].name, known[0].guess, known[0].broadcast)
    return _sum_of(known, others, constants, roots[0], loss_scale)


def _sum_of(known: list[_Term], others: int, constants: int, root: Tensor, loss_scale: float) -> Criterion | None:
    """What several terms are together: those of which no guess is known, and constants, cost what is left of the value of the loss."""
    sure = [term for term in known if term.guess > 0]
    if not sure:
        return None
    guess = sum(term.guess for term in sure)
    others += len(known) - len(sure)
    if others or constants:
        if not _readable(root) or math.isnan(loss_scale):
            return None
        rest = float(root.detach()) / loss_scale - sum(term.factor * term.value() for term in sure)
        if not math.isfinite(rest) or (others and rest < _NEGATIVE * guess) or not guess + rest > 0:
            return None
        # What is left by rounding is nothing.
        guess += rest if abs(rest) > 1e-6 * guess else 0.0
    names = {"sum" if term.summed else term.name for term in sure}
    if len(names) == 1 and not others:
        (name,) = names
    else:
        name = "cross_entropies" if names <= {"cross_entropy", *BINARY} else "sum"
    return Criterion(name, guess, any(term.broadcast for term in known))


def _parts(place: _Place) -> list[_Place] | None:
    """The terms that a node adds up; None for a node that does not."""
    node, factor = place.node, place.factor
    name, below = name_of(node), node.next_functions
    shape = private.output_shape(node)
    if shape is None:
        return None
    if name in ("Add", "Sub") and len(below) == 2:
        alpha = private.saved_number(node, "alpha")
        alpha = 1.0 if alpha is None else alpha
        factors = (factor, factor * (alpha if name == "Add" else -alpha))
        # What is expanded counts more than once.
        if all(child is None or _numel(child, number) == math.prod(shape) for child, number in below):
            return [replace(place, node=child, factor=each) for (child, _), each in zip(below, factors, strict=True)]
        return None
    if name == "Rsub" and len(below) == 1:  # a number less that
        return [replace(place, node=below[0][0], factor=-factor), replace(place, node=None)]
    if name in ("Stack", "Cat") and below and all(child is None or _numel(child, number) == 1 for child, number in below):
        whole = math.prod(shape) == len(below)
        return [replace(place, node=child, factor=factor / len(below), summed=1.0) for child, _ in below] if whole else None
    return None


def _term(place: _Place) -> _Term | None:
    """A criterion that stands at a node; None where none does."""
    name = name_of(place.node)
    if name in ("Pow", "Abs"):
        term = _by_hand(place.node, place.factor)
    elif name == "Mul":
        term = _of_shares(place)
    else:
        term = _by_name(place.node, place.factor)
        if term is not None and private.saved_number(place.node, "reduction") == _REDUCTIONS.index("sum"):
            return replace(term, summed=not place.divided)
    return None if term is None else replace(term, summed=term.summed or (place.summed > 1.0 and name != "Mul"))


def _by_name(node: Any, factor: float) -> _Term | None:
    name, reduction = _NAMES.get(name_of(node)), private.saved_number(node, "reduction")
    if name is None or not factor > 0 or reduction not in (0, 1, 2):
        return None
    sides = {of: side for of, side in zip(("self", "target"), node.next_functions, strict=False) if side[0] is not None}
    if len(sides) != 1 or ("self" not in sides and name not in _SYMMETRIC):
        return None  # a target that is computed is no target that a constant could meet
    ((of, given),) = sides.items()
    if name == "cross_entropy" and name_of(through(given[0], SAME_VALUES)) != "LogSoftmax":
        return None
    weighted = private.saved_tensor(node, "weight") is not None or private.saved_tensor(node, "pos_weight") is not None
    guess = math.nan if weighted else _guess(name, node, "target" if of == "self" else "self")
    elements = 1.0
    if _REDUCTIONS[int(reduction)] == "sum":
        target = private.saved_tensor(node, "target")
        elements = math.nan if target is None else float(target.numel())
    broadcast = _is_crossed(given, private.output_shape(*given))
    return _Term(name, factor, guess * factor * elements, lambda: _value(name, node, _REDUCTIONS[int(reduction)]), broadcast)


def _by_hand(node: Any, factor: float) -> _Term | None:
    """Squares or absolute values of a difference, `((model(x) - y) ** 2).mean()`: of it the difference is left, no target.

    `l1_loss` is one too.
    """
    square = name_of(node) == "Pow" and private.saved_number(node, "exponent") == 2
    if not factor > 0 or not (square or name_of(node) == "Abs"):
        return None
    difference, minus = private.saved_tensor(node, "self"), node.next_functions[0][0]
    if minus is not None and name_of(minus) in ("Mul", "Div"):  # by a standard deviation that is a number
        below = [child for child, _ in minus.next_functions if child is not None]
        minus = below[0] if len(below) == 1 and _number_of(minus) is not None else minus
    if difference is None or minus is None or name_of(minus) != "Sub":
        return None
    sides = [side for side in minus.next_functions if side[0] is not None]
    if len(sides) != 1 or difference.dim() == 0 or len(difference) < 2 or difference.numel() > _TARGETS:
        return None
    broadcast = _is_crossed(sides[0], tuple(difference.shape))
    name = "mse_loss" if square else "l1_loss"
    if not _readable(difference) or not difference.is_floating_point():
        return _Term(name, factor, math.nan, lambda: math.nan, broadcast)
    values = difference.detach().double()
    # What varies is the target and, at first a little, the prediction.
    guess = values.var(0, correction=0).mean() if square else (values - values.median(0).values).abs().mean()
    return _Term(
        name, factor, float(guess) * factor, lambda: float((values.square() if square else values.abs()).mean()), broadcast
    )


def _of_shares(place: _Place) -> _Term | None:
    """Shares times a log-softmax: a cross-entropy whose targets are probabilities, or what of a divergence depends on the outputs."""
    node, factor = place.node, place.factor
    sides = [(k, side) for k, side in enumerate(node.next_functions) if side[0] is not None]
    if len(sides) != 1 or not factor < 0:
        return None
    ((side, (given, _)),) = sides
    soft = through(given, SAME_VALUES)
    shares = private.saved_tensor(node, "self" if side else "other")
    logs, axis = private.saved_tensor(soft, "result"), private.saved_integer(soft, "dim")
    if name_of(soft) != "LogSoftmax" or shares is None or logs is None or axis is None or not _readable(shares):
        return None
    if shares.numel() > _TARGETS or not shares.numel() or not shares.dim() or shares.shape != logs.shape:
        return None
    values = shares.detach().double()
    rows = values.sum(axis)
    # Advantages of a policy are no shares; rows of zeros are masked.
    if bool((values < 0.0).any()) or not bool((((rows - 1.0).abs() < 1e-2) | (rows == 0.0)).all()):
        return None
    mass = float(values.mean())
    readable = _readable(logs)

    def value() -> float:
        return float((values * logs.detach().double()).mean()) if readable else math.nan

    classes = logs.shape[axis]
    return _Term("cross_entropy", factor, -factor * mass * math.log(classes), value, False, place.summed > classes + 0.5)


def _is_crossed(given: tuple[Any, int], shape: tuple[int, ...] | None) -> bool:
    """N values that a node of the graph made were repeated to N x N, by an `expand` that it may be itself; False where shapes are not known.

    Every prediction is compared with every target then. One row for all, `(1, 10)`, may be meant.
    """
    if name_of(given[0]) == "Expand":
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
        if name in BINARY:
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
    return type(tensor) in (Tensor, nn.Parameter) and on_host(tensor) and private.has_value(tensor)


def _value(name: str, node: Any, reduction: str) -> float:
    """What a criterion came to, its own factor not counted; NaN where its tensors are not there to be computed with."""
    given, target, weight = (private.saved_tensor(node, each) for each in ("self", "target", "weight"))
    if given is None or target is None or not (_readable(given) and _readable(target)) or weight is not None:
        return math.nan
    if given.numel() > _TARGETS:
        return math.nan
    options: dict[str, Any] = {}
    for option in ("beta", "delta"):
        number = private.saved_number(node, option)
        if number is not None:
            options[option] = number
    function = F.nll_loss if name == "cross_entropy" else getattr(F, name)
    if name == "cross_entropy":
        ignored = private.saved_integer(node, "ignore_index")
        options["ignore_index"] = -100 if ignored is None else ignored
    with torch.no_grad():
        return float(function(given.detach(), target.detach(), reduction=reduction, **options).mean())


def _below(place: _Place, scaled_on_device: bool = False) -> _Place:
    """The node below means, sums, and multiplications and divisions by numbers.

    The factor is NaN where it is on a device. A loss scale on a device is the first factor there, and comes to 1.
    """
    node, factor, divided, summed = place.node, place.factor, place.divided, place.summed
    for _ in range(_TERMS):
        name, below = name_of(node), [child for child in node.next_functions if child[0] is not None]
        if len(below) != 1:
            break
        if name == "Sum":
            before, after = _numel(*below[0]), _numel(node, 0)
            if not before or not after:
                break
            factor *= before / after
            summed *= 1.0 if divided else before / after
        elif name == "Neg":
            factor = -factor
        elif name in ("Mul", "Div"):
            other = _number_of(node)
            if other is None:
                break
            divided = divided or name == "Div"
            if scaled_on_device and not on_host(other) and name == "Mul":
                scaled_on_device, factor = False, 1.0 if math.isnan(factor) else factor
            elif not _readable(other) or not float(other):
                return replace(place, node=node, factor=math.nan)
            else:
                factor = factor * float(other) if name == "Mul" else factor / float(other)
        elif name not in _SAME_ELEMENTS:
            break
        node = below[0][0]
    return _Place(node, factor, divided, summed)


def _number_of(node: Any) -> Tensor | None:
    """The number that a node multiplies or divides by; None where that is no single real one."""
    number = private.saved_number(node, "other")
    other = torch.tensor(number) if number is not None else private.saved_tensor(node, "other")
    if other is None:
        other = private.saved_tensor(node, "self")
    return None if other is None or other.numel() != 1 or other.is_complex() else other


def _numel(node: Any, number: int) -> int | None:
    shape = private.output_shape(node, number)
    return None if shape is None else math.prod(shape)
