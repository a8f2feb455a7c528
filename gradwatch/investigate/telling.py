"""What was found out, in words: short, plain, with the numbers that matter."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradwatch.capture import private
from gradwatch.capture.call import Call, tensors_of
from gradwatch.investigate.again import named_tensors
from gradwatch.investigate.tracer import Event, is_softmax
from gradwatch.records import Origin

_ROWS = 5
"""Rows that are named, the first ones."""


def operator(op: str) -> str:
    """The forward operator as "aten::name": "_softmax" and "_to_copy" are what users know as softmax and to."""
    if not op or "::" in op:
        return op
    plain = {"_to_copy": "to", "_unsafe_view": "view"}.get(op, op.lstrip("_") if op.startswith("_") else op)
    return f"aten::{plain.removesuffix('_forward')}"


def cause(event: Event, origin: Origin) -> str:
    """Why, in a sentence.

    Args:
        event: what was bad in the end.
        origin: where it began.
    """
    root, made = event.root, event.made_nan
    at = f" at {origin.source}" if origin.source else ""
    in_module = f" in {_layer(origin.module)}" if origin.module else ""
    what = "NaN" if root.bad.nan else "-Inf" if root.negative else "Inf"
    if root.backward and root.own:
        text = f"{origin.op}{in_module}{at} makes {what} of finite numbers in a backward pass of your own"
    elif root.backward:
        text = f"The derivative of {origin.op}{in_module}{at} is {what} while the loss is finite"
        saved = root.saved
        if saved is not None and saved.place.source and saved.place.source != origin.source:
            held = "NaN" if saved.bad.nan else "Inf"
            comes = "that comes from" if not saved.given else "that was there before"
            text += f", for it is given {held} {comes} {operator(saved.op)} at {saved.place.source}"
    else:
        text = f"{_value(root, origin.op)} gives {what}{in_module}{at}"
    if root.elements:
        first = f", the first at {list(root.where)}" if root.where else ""
        text += f" ({root.elements} element{'s' if root.elements > 1 else ''}{first})"
    if made is not None and made is not root and not root.bad.nan and made.place.source:
        text += f"; {operator(made.op)} at {made.place.source} makes NaN of it"
    return text + "."


def _value(root: Event, op: str) -> str:
    """What an operator did to finite numbers."""
    facts = root.facts
    name = root.op.strip("_")
    low, high = (facts[0][0], facts[0][1]) if facts else (float("nan"), float("nan"))
    if name in ("log", "log2", "log10", "sqrt", "rsqrt", "log1p", "lgamma", "digamma") and facts:
        return f"{op} of {_short(low)}"
    if name == "xlogy" and facts:
        return f"{op} with the logarithm of {_short(facts[-1][0])}"
    if name == "pow" and root.bad.nan and facts and low < 0:
        return f"{op} of {_short(low)} with an exponent that is no whole number"
    if name in ("acos", "asin", "acosh", "atanh", "erfinv", "logit") and facts:
        return f"{op} of numbers from {_beyond_one(low)} to {_beyond_one(high)}"
    if name in _EXPONENTIALS and facts:
        return f"{op} of {_short(max(low, high, key=abs) if name in ('sinh', 'cosh') else high)}"
    if name in ("div", "reciprocal", "true_divide"):
        if math.isnan(root.least):
            return op
        largest = max(abs(low), abs(high)) if facts else 0.0
        of = f" of numbers up to {_short(largest)}" if root.least and largest >= 1e4 and name != "reciprocal" else ""
        return f"{op}{of} by {_short(root.least)}"
    if name == "to_copy" and facts:
        return f"{op}, of {_short(max(abs(low), abs(high)))}, which its dtype does not hold,"
    if name in ("var", "std", "var_mean", "std_mean"):
        return f"{op} over {'one number' if facts else 'nothing'}"
    if name == "empty":
        return "Memory that nobody has written (torch.empty)"
    if root.scalar:
        return f"{op} by {root.scalar}" if name in ("mul", "div") else f"{op} of {root.scalar}"
    if root.mask is not None:
        mask = root.mask
        if is_softmax(name):
            return f"{op} over a row that {'is -Inf throughout' if mask.masks else 'holds Inf'}"
        by = f" that {operator(mask.op)}{f' at {mask.place.source}' if mask.place.source else ''} had put there" if mask.op else ""
        return f"{op} of {'-Inf' if mask.masks else 'Inf'}{by}"
    if name == "mean" and not facts:
        return f"{op} of nothing"
    if facts:
        largest = max(max(abs(fact[0]), abs(fact[1])) for fact in facts)
        if largest >= 1e4:
            return f"{op} of numbers up to {_short(largest)}"
    return f"{op} of finite numbers"


NOT_SEEN = (
    "No forward pass of the watched model was seen to begin, so that none could be run again: watch the parts that are called, "
    'GradWatch({"encoder": encoder, ...}).'
)
BORN_OUTSIDE = "It was born outside the model, in the loss: what the model puts out is as it should be."
AGAIN = 'Its line is told if it happens again while the weights are good (on_nonfinite="skip" keeps them so).'


def outside(op: str, loss_is_bad: bool) -> str:
    """Of an operator in the loss."""
    if loss_is_bad:
        return f"{op} in the loss, outside the model, makes it not finite."
    return f"The derivative of {op} in the loss, outside the model, is not finite; the loss itself is."


TRAP = (
    "`where` discards the values of its other branch, but their derivative is 0 times NaN: choose its input by the same condition."
)


def overflowed(root: Event) -> bool:
    """It gave Inf for numbers that are too large, and not because it left its domain: what a training that diverges ends in."""
    if not root.bad.inf or root.given or not root.facts:
        return False
    name, largest = root.op.strip("_"), max(max(abs(low), abs(high)) for low, high, _ in root.facts)
    return name in _EXPONENTIALS or (largest >= 1e4 and not (name in _DIVISIONS and root.least == 0) and name not in _DOMAINS)


def may_overflow(op: str) -> bool:
    """Of an operator of whose input nothing is known."""
    return op.strip("_") not in (*_DIVISIONS, *_DOMAINS)


_EXPONENTIALS = ("exp", "exp2", "expm1", "sinh", "cosh")
_DIVISIONS = ("div", "reciprocal", "true_divide", "rsqrt")
_DOMAINS = ("log", "log2", "log10", "log1p", "xlogy", "sqrt", "atanh", "erfinv", "logit", "lgamma", "digamma")


def remedy(root: Event, backward: bool) -> str:
    """What to try."""
    too_large = root.op.strip("_") in _EXPONENTIALS and root.facts and max(map(abs, root.facts[0][:2])) > 88.7  # for float32, too
    half = root.dtype in (torch.float16, torch.bfloat16) and not too_large
    if half and not root.op.strip("_").startswith("to_copy") and root.mask is None:
        small = "1e-8 is 0 there and 65504 the largest number" if root.dtype == torch.float16 else "it has three digits"
        return f"Compute this in float32 (it is in {str(root.dtype).removeprefix('torch.')}: {small})."
    if root.scalar or root.meant:
        return "Look at where that number is made."
    if root.mask is not None and is_softmax(root.op) and not root.mask.masks:
        return "Mask with -Inf or a large negative number: softmax gives all to Inf."
    if overflowed(root) and root.op.strip("_") not in _EXPONENTIALS:
        return "Make what it is given smaller: a lower learning rate, clipped gradients (clip=1.0), or a normalisation before it."
    return remedy_of(root.op, backward)


def remedy_of(op: str, backward: bool) -> str:
    """What to try about an operator."""
    name = op.strip("_").removesuffix("_forward")
    if name == "pow" and not backward:
        return "Bound its base (clamp_min where it must not be negative)."
    if name in _REMEDIES:
        return _REMEDIES[name]
    if is_softmax(name):
        return "Let every row attend to something: unmask one place of a row that is masked throughout, or set its output to 0."
    if backward:
        return "Select safe inputs before the operator, not its output behind it, and add an eps inside roots and norms."
    return "Guard the operator (an eps, a clamp before it), or make what it is given smaller."


_DOMAIN = "Keep its input inside the open interval (-1, 1): clamp it by 1e-6 on both sides."
_LOG = "Keep its input above 0: clamp_min(1e-8), or use log_softmax, logsumexp, logsigmoid or log1p where they fit."
_ROOT = "Add a small eps inside the root (1e-8): its derivative at 0 is infinite."
_EXP = "Bound its input (clamp(max=20): exp(20) is 5e8), or subtract the maximum first (logsumexp)."
_REMEDIES = {
    **dict.fromkeys(("log", "log2", "log10", "xlogy"), _LOG),
    **dict.fromkeys(("acos", "asin", "atanh", "acosh", "erfinv"), _DOMAIN),
    "sqrt": _ROOT,
    "pow": "Keep its base away from 0 (an eps, a clamp), and above it where the exponent is no whole number: there the derivative is infinite.",
    "rsqrt": "Add a small eps inside the root (1e-8).",
    **dict.fromkeys(("exp", "exp2", "expm1", "sinh", "cosh"), _EXP),
    **dict.fromkeys(
        ("div", "reciprocal"), "Keep the divisor away from 0: add an eps, or clamp_min(1e-8) where it cannot be negative."
    ),
    **dict.fromkeys(
        ("var", "std", "var_mean", "std_mean"),
        "Give it more than one number, or use correction=0 (a little smaller for every batch), and add an eps to it.",
    ),
    "empty": "Write to it before it is read: torch.zeros, or an initialisation (torch.nn.init).",
    "to_copy": "Use bfloat16, or keep that part in float32.",
    "mean": "Leave the term out where there is nothing to take a mean of.",
    **dict.fromkeys(
        ("nll_loss", "nll_loss2d"),
        "Leave a batch out all of whose targets are ignored (ignore_index) or have weight 0: its mean is 0 divided by 0.",
    ),
    "ctc_loss": "Use zero_infinity=True, and check that no target is longer than its input: equal labels in a row need a blank between them.",
}


def rows(tensor: Tensor) -> tuple[str, int]:
    """What is bad in a tensor: "NaN in 2 of 64 rows (3, 17)", and how many elements."""
    with torch.no_grad():
        values = tensor.detach()
        if values.layout is not torch.strided:
            values = private.sparse_values(values)
        wrong = ~torch.isfinite(values)
        count = int(wrong.sum())
        what = " and ".join(name for name, mask in (("NaN", torch.isnan(values)), ("Inf", torch.isinf(values))) if bool(mask.any()))
        if wrong.dim() < 2 or not count:
            where = wrong.nonzero().flatten().tolist() if wrong.dim() else []
            of = f"{count} of {wrong.numel()} elements" if wrong.dim() else "it"
        elif len(wrong) == 1:  # no batch: a hidden state of one layer
            where, of = [], f"{count} of {wrong.numel()} elements"
        else:
            where = wrong.flatten(1).any(dim=1).nonzero().flatten().tolist()
            of = f"{len(where)} of {len(wrong)} rows"
        named = ", ".join(map(str, where[:_ROWS])) + (", ..." if len(where) > _ROWS else "")
        return f"{what} in {of}" + (f" ({named})" if where else ""), count


def changed_inputs(call: Call) -> list[str]:
    """Names of the inputs that were changed in place since the model was given them."""
    now = list(tensors_of((call.args, call.kwargs)))
    changed = zip(now, call.versions, strict=False)
    return _names_of(call, [tensor for tensor, version in changed if private.version_or_zero(tensor) != version])


def computed_inputs(call: Call) -> list[str]:
    """Names of the inputs that came out of somebody's computing, with a graph."""
    return _names_of(
        call, [tensor for number, tensor in enumerate(tensors_of((call.args, call.kwargs))) if number in call.computed]
    )


def _names_of(call: Call, inputs: list[Tensor]) -> list[str]:
    names = {id(tensor): name for name, tensor in named_tensors(call.model, call.args, call.kwargs)}
    return [names.get(id(tensor), "") for tensor in inputs]


def _layer(name: str) -> str:
    return name if any(char.isalpha() for char in name) else f"layer {name}"


def _short(number: float) -> str:
    return f"{number:.3g}"


def _beyond_one(number: float) -> str:
    """With all digits where three would hide that it is beyond 1."""
    return f"{number:.9g}" if abs(number) > 1 and abs(float(_short(number))) == 1 else _short(number)
