"""Between the loss and the model's outputs, where no module runs: which operator of the autograd graph can have made a bad value.

A graph that has been run backwards keeps its shape and loses its values, and it holds no line of code (measured: `metadata` is empty
without anomaly mode). So what is known there are operators: those that can, and of them those on the way to what is bad.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradwatch.capture import private
from gradwatch.investigate.tracer import FINE, Bad, look, of_node

LIMIT = 20_000
"""Nodes that are looked at: a loss has dozens."""

SINGULAR = frozenset({"sqrt", "pow", "acos", "asin", "acosh", "xlogy", "special_entr", "linalg_svd", "linalg_eigh", "linalg_eig"})
"""Operators whose value may be finite where their derivative is not. Measured on torch 2.13 at 0, 1 and equal eigenvalues; norms, standard
deviations, `cdist`, `atan2` and `normalize` are not among them, for their derivatives are made 0 there."""

LEAVES_DOMAIN = frozenset(
    {
        *("log", "log2", "log10", "log1p", "div", "reciprocal", "rsqrt", "exp", "exp2", "expm1", "tan", "atanh", "logit", "erfinv"),
        *("lgamma", "sinh", "cosh", "softmax", "log_softmax", "logsumexp", "sqrt", "pow", "acos", "asin", "acosh", "var", "std"),
        *("ctc_loss", "linalg_inv", "linalg_solve", "linalg_cholesky", "logdet", "digamma", "cumprod"),
    }
)
"""Operators that make NaN or Inf of finite numbers. With a finite loss they are suspects only where something behind them takes that out
again (`ABSORBS`): the derivative of what was taken out is 0 times Inf."""

ABSORBS = frozenset(
    {
        *(
            "where",
            "masked_fill",
            "masked_scatter",
            "masked_select",
            "index",
            "nan_to_num",
            "clamp",
            "clamp_min",
            "clamp_max",
            "minimum",
        ),
        *(
            "maximum",
            "min",
            "max",
            "gather",
            "select",
            "slice",
            "topk",
            "threshold",
            "relu",
            "sigmoid",
            "tanh",
            "exp",
            "erf",
            "atan",
        ),
        *("reciprocal", "div", "softmax", "log_softmax", "logsumexp", "amin", "amax", "hardtanh", "narrow", "index_select"),
    }
)
"""Operators whose output may be finite where their input is not."""


@dataclass(slots=True)
class Suspect:
    """An operator outside the model that may have made a bad value.

    Attributes:
        op: its name without "aten::".
        node: its autograd node.
        given: "": it made the value; else which of its inputs held it already, by torch's name ("target").
        values: that input.
    """

    op: str
    node: Any
    given: str = ""
    values: Tensor | None = None


@dataclass(slots=True)
class Outside:
    """The part of a graph between its roots and the model's outputs.

    Attributes:
        nodes: in the order of a walk from the roots.
        leads: node -> what it leads to: sequence numbers of the nodes that made the model's outputs, and ids of parameters.
        consumers: node -> those nearer to the roots.
        loss: what the roots hold.
    """

    nodes: list[Any] = field(default_factory=list)
    leads: dict[Any, frozenset[Any]] = field(default_factory=dict)
    consumers: dict[Any, list[Any]] = field(default_factory=dict)
    loss: Bad = FINE


def outside(roots: Iterable[Any], outputs: Collection[int], parameters: Collection[int]) -> Outside:
    """Walk from the roots to the model's outputs.

    Args:
        roots: of the backward.
        outputs: sequence numbers of the nodes that made the outputs.
        parameters: ids of the watched ones.
    """
    found = Outside()
    for root in roots:
        if isinstance(root, Tensor):
            bad = look(root)
            found.loss = Bad(found.loss.nan or bad.nan, found.loss.inf or bad.inf)
    ends: dict[Any, set[Any]] = {}
    starts = [root.grad_fn for root in roots if isinstance(root, Tensor) and root.grad_fn is not None]
    todo, seen = deque(dict.fromkeys(starts)), set(starts)
    while todo and len(seen) < LIMIT:
        node = todo.popleft()
        if private.sequence_number(node) in outputs:
            continue
        found.nodes.append(node)
        ends[node] = set()
        for below, _ in node.next_functions:
            if below is None:
                continue
            found.consumers.setdefault(below, []).append(node)
            leaf = getattr(below, "variable", None)
            if leaf is not None:
                if id(leaf) in parameters:
                    ends[node].add(id(leaf))
            elif private.sequence_number(below) in outputs:
                ends[node].add(private.sequence_number(below))
            if leaf is None and below not in seen:
                seen.add(below)
                todo.append(below)
    for node in sorted(found.nodes, key=private.sequence_number):
        for below, _ in node.next_functions:
            if below in ends:
                ends[node] |= ends[below]
        found.leads[node] = frozenset(ends[node])
    return found


def nodes_below(starts: Iterable[Any], without: Any = None, limit: int = 100_000) -> Iterator[Any]:
    """The nodes of a graph from these on, each once, but for what only one of them leads to."""
    todo = [node for node in dict.fromkeys(starts) if node is not None]
    seen = set(todo)
    while todo and len(seen) < limit:
        node = todo.pop()
        if node is without:
            continue
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                todo.append(below)


def suspects(part: Outside, bad: Collection[Any]) -> list[Suspect]:
    """Operators that can have made the gradient bad of what is `bad`, and is reached from outside the model, while the loss was finite.

    Args:
        part: the graph there.
        bad: sequence numbers of outputs, or ids of parameters.
    """
    found = []
    for node in part.nodes:
        if not part.leads.get(node, frozenset()) & set(bad):
            continue
        op = of_node(type(node).__name__)
        able = op in SINGULAR or (op in LEAVES_DOMAIN and _absorbed(part, node))
        if hasattr(node, "_forward_cls") or (able and not _is_tame(node, op)):
            found.append(Suspect(op, node))
    return found


def born(part: Outside, outputs: Mapping[int, Bad | None]) -> Suspect | None:
    """Before the backward, while the graph still holds values: the operator by which a loss went bad whose model's outputs are finite.

    What a node keeps tells of the outputs of those below it, and some keep their own, or what it takes to compute it again. An operator
    gave birth where its output is known to be bad and all it was given is known not to be: to hold no NaN, where the output holds one.
    And it has to lead to the loss: what is known to be fine on the way has taken the bad value out.

    Args:
        part: the graph outside the model.
        outputs: sequence number of the node that made an output of the model -> what the output holds; None: not known.

    Returns:
        None where it is not known, or it is inside the model.
    """
    held = _values_of(part, outputs)
    leads: set[Any] = set()
    for node in part.nodes:  # from the loss on
        above = part.consumers.get(node, ())
        if not above or any(each in leads for each in above):
            known = held.get(node)
            if known is None or known:
                leads.add(node)
    for node in sorted(leads, key=private.sequence_number):
        op, value = of_node(type(node).__name__), held.get(node)
        given = [_held_by(below, held, outputs) for below, _ in node.next_functions]
        constant = _bad_constant(node)
        if constant is not None:
            return Suspect(op, node, given=constant[0], values=constant[1])
        if not value:
            continue
        if all(each is not None and not (each.nan if value.nan else each) for each in given):
            if op in ("add", "sub", "rsub") and any(below is None for below, _ in node.next_functions):
                return Suspect(op, node, given="what")  # finite numbers do not add up to it: what it is given besides is bad
            return Suspect(op, node)
        if _is_sure(node, op):
            return Suspect(op, node)
    return None


def _values_of(part: Outside, outputs: Mapping[int, Bad | None]) -> dict[Any, Bad]:
    """What the outputs of nodes hold, as far as that is known."""
    held: dict[Any, Bad] = {}
    for node in part.nodes:
        for below, value in _given(node):
            if below is not None and value is not None:
                held[below] = look(value)
        own = _result(node)
        if own is not None:
            held.setdefault(node, look(own))
        if _is_sure(node, of_node(type(node).__name__)):
            held[node] = Bad(nan=True, inf=True)  # one of the two
    for node in part.nodes:
        if node not in part.consumers:
            held[node] = part.loss
    return held


def _held_by(node: Any, held: Mapping[Any, Bad], outputs: Mapping[int, Bad | None], depth: int = 16) -> Bad | None:
    """What comes from below: a constant that is not kept counts as fine, and a parameter is looked at."""
    if node is None:
        return FINE
    leaf = getattr(node, "variable", None)
    if leaf is not None:
        return look(leaf)
    if node in held:
        return held[node]
    number = private.sequence_number(node)
    if number in outputs:
        return outputs[number]
    # Of finite numbers these make finite ones, whatever they are.
    if depth and of_node(type(node).__name__) in _KEEPS:
        given = [_held_by(below, held, outputs, depth - 1) for below, _ in node.next_functions]
        return FINE if all(each is not None and not each for each in given) else None
    return None


_KEEPS = frozenset(
    {
        *(
            "neg",
            "abs",
            "view",
            "reshape",
            "unsafe_view",
            "transpose",
            "permute",
            "t",
            "expand",
            "squeeze",
            "unsqueeze",
            "select",
            "slice",
        ),
        *(
            "index",
            "gather",
            "clone",
            "alias",
            "relu",
            "tanh",
            "sigmoid",
            "clamp",
            "clamp_min",
            "softmax",
            "log_softmax",
            "where",
            "cat",
        ),
        *("stack", "threshold", "split", "unbind", "index_select"),
    }
)
"""Operators that make finite numbers of finite ones."""


def _bad_constant(node: Any) -> tuple[str, Tensor] | None:
    """An input of a node that has no graph, is kept, and is not finite."""
    for key in _CONSTANTS:
        value = _saved(node, key)
        if value is not None and look(value) and _is_constant(node, key):
            return key, value
    return None


def _is_sure(node: Any, op: str) -> bool:
    """Its output is bad whatever else it is given: a division by 0, a mean of nothing."""
    if op == "div":
        other = _saved(node, "other")
        return other is not None and bool((other == 0).any())
    if op == "mean":
        return private.saved_integer(node, "self_sym_numel") == 0
    if op in ("nll_loss", "nll_loss2d"):
        weight = _saved(node, "total_weight")
        return weight is not None and private.saved_integer(node, "reduction") == 1 and bool((weight == 0).all())
    return False


_CONSTANTS = ("target", "weight", "pos_weight", "var", "other", "self")
_POSITIONS = (("self", "input", "x1"), ("other", "mat2", "x2", "exponent"))


def _given(node: Any) -> list[tuple[Any, Tensor | None]]:
    """What is below a node, each with the value that came from there, where it is kept."""
    pairs = []
    for (below, _), keys in zip(node.next_functions, _POSITIONS, strict=False):
        value = next((value for key in keys if (value := _saved(node, key)) is not None), None)
        pairs.append((below, value))
    return pairs


def _saved(node: Any, name: str) -> Tensor | None:
    value = private.saved_tensor(node, name)
    return value if value is not None and private.has_value(value) else None


def _is_constant(node: Any, key: str) -> bool:
    """The input has no graph: what it holds was given."""
    position = {"self": 0, "input": 0, "x1": 0}.get(key, 1)
    return position >= len(node.next_functions) or node.next_functions[position][0] is None


def _result(node: Any) -> Tensor | None:
    """What a node put out, where it keeps that or what it needs to compute it again."""
    for key in ("result", "result0", "output"):
        value = _saved(node, key)
        if value is not None:
            return value
    again = _AGAIN.get(of_node(type(node).__name__))
    given = _saved(node, "self")
    if again is None or given is None:
        return None
    other: Any = _saved(node, "other")
    with torch.no_grad():
        try:
            return again(given.detach(), other if other is not None else private.saved_number(node, "exponent"))
        except (RuntimeError, TypeError):
            return None


def _div(a: Tensor, b: Any) -> Tensor | None:
    return None if b is None else a / b


_AGAIN: Mapping[str, Callable[[Tensor, Any], Tensor | None]] = {
    "log": lambda x, _: x.log(),
    "log2": lambda x, _: x.log2(),
    "log10": lambda x, _: x.log10(),
    "log1p": lambda x, _: x.log1p(),
    "acos": lambda x, _: x.acos(),
    "asin": lambda x, _: x.asin(),
    "acosh": lambda x, _: x.acosh(),
    "atanh": lambda x, _: x.atanh(),
    "lgamma": lambda x, _: x.lgamma(),
    "tan": lambda x, _: x.tan(),
    "div": _div,
    "mul": lambda x, y: None if y is None else x * y,
    "pow": lambda x, y: None if y is None else x.pow(y),
    "xlogy": lambda x, y: None if y is None else torch.xlogy(x, y),
    "var": lambda x, _: x.var() if x.numel() < 2 else None,
}
"""How to compute a value again from what its node keeps."""


def _is_tame(node: Any, op: str) -> bool:
    """Its numbers make it harmless: a power of 1 and more, a division by a constant that is not zero."""
    if op == "pow":
        exponent = private.saved_number(node, "exponent")
        return exponent is not None and (exponent >= 1 or exponent == 0)
    if op == "div":
        below = [child for child, _ in node.next_functions]
        number = private.saved_number(node, "other")
        return (len(below) > 1 and below[1] is None) or (number is not None and number != 0 and math.isfinite(number))
    return False


def _absorbed(part: Outside, node: Any) -> bool:
    """Something between it and the loss may have taken out what it made."""
    todo, seen = list(part.consumers.get(node, ())), set()
    while todo:
        above = todo.pop()
        if above in seen:
            continue
        seen.add(above)
        if of_node(type(above).__name__) in ABSORBS:
            return True
        todo += part.consumers.get(above, ())
    return False
