"""What "flat" means for each activation: the part where it passes next to no gradient.

A type of one's own is three lines:

```python
@saturation.derivative.register(MyTanh)
def _(module, x, y):
    return 1 - y * y
```
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

FLAT = 0.02
"""An element is flat where its activation is less steep than one fiftieth of the steepest it gets.

For tanh that is |y| > 0.99, the line the field draws by custom (Karpathy, makemore part 3); for the sigmoid y outside 0.005 to 0.995.
Two such layers in a row pass less than 1/2,500. It is also 5 times the coarsest step of a bfloat16 output near 1 (2^-8), so that
rounding does not decide.
"""

Shape = Literal["two-sided", "one-sided", "probability", ""]

WITHOUT_FLAT_PART: Mapping[type[nn.Module], str] = MappingProxyType(
    {
        nn.PReLU: "it leaks, and its slope is a parameter: reading it would wait for the device",
        nn.GLU: "its output is smaller than its input, and a closed gate is what a gate is for",
        nn.LogSoftmax: "it belongs to the loss: flat only where the network is right and sure of it",
        nn.MultiheadAttention: "its softmax runs inside one fused operator, and its output is linear",
    }
)
"""The activations of torch that are not judged, and why."""


@functools.singledispatch
def derivative(module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    """|local derivative| of an activation, as a fraction of the largest |derivative| it has anywhere.

    Taken from the output where the output tells, so that the training's dtype decides by itself: in bfloat16 the output of a tanh is
    exactly 1 from |x| = 3.47 on, and the result exactly 0 (measured).

    Args:
        module: the activation; its parameters (`alpha`, `beta`, `min_val`, ...) count.
        x: float32 `[n]`, upcast from the training's dtype, no graph: a sample of the input. Anything, `y` for example, where
            `needs_input(module)` is False.
        y: float32 `[n]`: the output at the same places.

    Returns:
        `[n]` of the dtype of `y`, from 0 (nothing passes) to 1; NaN or 1 where `y` is NaN. None: no flat part is known. A class
        that is not registered is known by its name if that says GELU or Swish.
    """
    known = _by_name(module)
    return None if known is None else derivative(known, x, y)


def flat(module: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
    """Where an activation is flat: bool `[n]`, for arguments as for `derivative`; False where `y` is NaN. None: no flat part is known."""
    relative = derivative(module, x, y)
    return None if relative is None else relative < FLAT


def needs_input(module: nn.Module) -> bool:
    """Whether `derivative` reads `x`: True for types that users register, False where no flat part is known.

    An in-place module has overwritten its input when a forward hook runs: where True, take it from `of_node(output.grad_fn)`.
    """
    rule = derivative.dispatch(type(module))
    if rule is _UNKNOWN:
        return _by_name(module) is not None
    return rule not in _FROM_OUTPUT.values()


@functools.singledispatch
def shape(module: nn.Module) -> Shape:
    """On which side an activation is flat, for those who judge how many elements may be.

    Returns:
        "two-sided": at both ends, and what lies there is stuck. "one-sided": a rectifier; in health half of the elements and more lie
        in its flat part. "probability": outputs near 0 or 1; each of `n` outputs is flat on average when `n` > 200. "": no flat part
        is known, and `derivative` gives None. A type that users register is what its base class is, else two-sided, unless
        `shape.register` says otherwise.
    """
    if derivative.dispatch(type(module)) is not _UNKNOWN:
        return "two-sided"
    known = _by_name(module)
    return "" if known is None else shape(known)


@functools.singledispatch
def fires(module: nn.Module) -> float | None:
    """The |output| above which a unit has fired: one that never exceeds it, at any position of any batch, passes no gradient.

    A smooth rectifier (GELU, SiLU, Mish) has small outputs in two places: in its tail, where it is negative and flat, and around 0,
    where it is steep. So a unit has fired, exactly, where its output lies outside `[-fires, 0]`; by |output| alone a healthy unit
    whose inputs are all within some 0.06 of 0 counts as silent.

    Returns:
        In units of the output. 0.0 where the flat part gives exactly 0; for a smooth rectifier |output| at the edge of its tail, where
        its |derivative| falls below `FLAT` of the largest. None where no unit can be dead (a leak, two flat ends, a probability), and
        where silence looks like firing: the plateau of ELU, SELU and CELU lies at -alpha, the tail of Softplus above 0. `flat` tells
        those.
    """
    known = _by_name(module)
    return None if known is None else fires(known)


def of_node(node: Any) -> tuple[nn.Module, str] | None:
    """The activation that a node of the autograd graph computes the derivative of: `F.relu(x)` is known as `x.relu()` is.

    Args:
        node: a `grad_fn`, before its backward has freed what it saved.

    Returns:
        A module that does the same, with the same parameters, and the attribute of the node to read. "_saved_result" is the output,
        and all that is needed. "_saved_self" is the input, also of an in-place call, with `y = module(x)` in its own dtype. None: no
        activation with a flat part.
    """
    entry = FUNCTIONAL.get(type(node).__name__)
    if entry is None:
        return None
    make, saved = entry
    try:
        module = make(node)
    except (AttributeError, AssertionError, TypeError, ZeroDivisionError):
        # Another torch may name what it saves otherwise; modules refuse parameters that functions take (equal bounds).
        return None
    return (module, saved) if shape(module) else None


# -- derivatives: from the output --------------------------------------------------------------------------------------------------

_UNKNOWN = derivative.dispatch(object)


def _exponential(plateau: float, scale: float, y: Tensor) -> Tensor:
    """`scale` above 0; below it `plateau * exp(x)`, which is `y + plateau`."""
    return torch.where(y > 0, scale, (y + plateau).abs()) / max(scale, plateau)


def _passes(blocked: Tensor, y: Tensor) -> Tensor:
    """0 where blocked, else 1: also for NaN, of which no comparison is true."""
    return (~blocked).to(y.dtype)


@functools.lru_cache(maxsize=256)
def _as_stored(bound: float) -> frozenset[float]:
    """What `bound` becomes in the dtypes of activations: 0.7 is 0.69922 in a bfloat16 output."""
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return frozenset(torch.tensor(bound, dtype=dtype, device="cpu").item() for dtype in dtypes)


def _at(bound: float, y: Tensor) -> Tensor:
    return functools.reduce(operator.or_, [y == value for value in _as_stored(bound)])


_SELU_SCALE, _SELU_PLATEAU = 1.0507009873554805, 1.0507009873554805 * 1.6732632423543772
"""The slope of SELU's positive side, and the steepest of the other: the constants of torch."""

_FROM_OUTPUT: Mapping[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor | None]] = {
    # Of a softmax: that of each output by its own input.
    **dict.fromkeys((nn.Sigmoid, nn.Softmax, nn.Softmin, nn.Softmax2d), lambda m, x, y: 4 * y * (1 - y)),
    nn.Tanh: lambda m, x, y: 1 - y * y,
    nn.Softsign: lambda m, x, y: (1 - y.abs()).square(),
    # sigmoid(-x). Written so, the smallest outputs of the flat side keep their digits.
    nn.LogSigmoid: lambda m, x, y: -torch.expm1(y),
    # A negative alpha has no plateau to be stuck on (CELU: it grows without bound), and y no longer tells the side.
    nn.ELU: lambda m, x, y: _exponential(m.alpha, 1.0, y) if m.alpha >= 0 else None,
    nn.CELU: lambda m, x, y: _exponential(1.0, 1.0, y / m.alpha) if m.alpha > 0 else None,
    nn.SELU: lambda m, x, y: _exponential(_SELU_PLATEAU, _SELU_SCALE, y),
    # ReLU6 is a Hardtanh. As in autograd nothing passes at a bound.
    nn.Hardtanh: lambda m, x, y: _passes((y <= m.min_val) | (y >= m.max_val) | _at(m.min_val, y) | _at(m.max_val, y), y),
    nn.Hardsigmoid: lambda m, x, y: _passes((y <= 0) | (y >= 1), y),
    nn.ReLU: lambda m, x, y: _passes(y <= 0, y),
    # A leak of 0.01 is below FLAT, but it is there in order to keep units alive, and it does.
    nn.LeakyReLU: lambda m, x, y: None if m.negative_slope else _passes(y <= 0, y),
    nn.RReLU: lambda m, x, y: None if m.lower or m.upper else _passes(y <= 0, y),
    nn.Threshold: lambda m, x, y: _passes((y <= m.threshold) | _at(m.value, y), y),
    nn.Hardshrink: lambda m, x, y: _passes(y == 0, y),
    nn.Softshrink: lambda m, x, y: _passes(y == 0, y),
}
for _kind, _rule in _FROM_OUTPUT.items():
    derivative.register(_kind, _rule)


# -- derivatives: only the input tells ---------------------------------------------------------------------------------------------
# The largest slopes were found on a grid of steps of 1e-6 in float64; tests find them again.


def _relative(slope: Tensor, largest: float) -> Tensor:
    return (slope.abs() / largest).clamp(max=1.0)


_LIMIT = 30.0
"""|x| from which each of these is at its limit, in float64 too; beyond it, products such as x * sigmoid'(x) become inf * 0."""


@derivative.register
def _(module: nn.GELU, x: Tensor, y: Tensor) -> Tensor:
    x = x.clamp(-_LIMIT, _LIMIT)
    if module.approximate == "tanh":
        k, c = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(k * (x + c * x**3))
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * c * x * x)
        return _relative(slope, 1.12899306865877)
    slope = 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return _relative(slope, 1.12890414518511)


@derivative.register
def _(module: nn.SiLU, x: Tensor, y: Tensor) -> Tensor:
    x = x.clamp(-_LIMIT, _LIMIT)
    s = torch.sigmoid(x)
    return _relative(s * (1 + x * (1 - s)), 1.09983932012886)


@derivative.register
def _(module: nn.Mish, x: Tensor, y: Tensor) -> Tensor:
    x = x.clamp(-_LIMIT, _LIMIT)
    t = torch.tanh(nn.functional.softplus(x))
    return _relative(t + x * torch.sigmoid(x) * (1 - t * t), 1.08849816125172)


@derivative.register
def _(module: nn.Hardswish, x: Tensor, y: Tensor) -> Tensor:
    # (2x + 3) / 6 between -3 and 3, so 3/2 just below 3, and 1 beyond.
    return torch.where(x <= -3, 0.0, torch.where(x < 3, (2 * x + 3) / 6, 1.0)).abs() / 1.5


@derivative.register
def _(module: nn.Softplus, x: Tensor, y: Tensor) -> Tensor:
    # Beyond its threshold torch's Softplus is the identity.
    scaled = module.beta * x
    return torch.where(scaled > module.threshold, 1.0, torch.sigmoid(scaled))


@derivative.register
def _(module: nn.Tanhshrink, x: Tensor, y: Tensor) -> Tensor:
    # Flat in the middle only, for |x| < 0.14; x - y would lose its digits there in half precision.
    return torch.tanh(x).square()


# -- shapes and firing -------------------------------------------------------------------------------------------------------------

_SHAPES: Mapping[type[nn.Module], Callable[[Any], Shape]] = {
    **dict.fromkeys((nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Softsign), lambda m: "two-sided"),
    **dict.fromkeys((nn.Softmax, nn.Softmin, nn.Softmax2d), lambda m: "probability"),
    **dict.fromkeys((nn.ReLU, nn.SELU, nn.Threshold, nn.Softplus, nn.LogSigmoid), lambda m: "one-sided"),
    **dict.fromkeys((nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish), lambda m: "one-sided"),
    # Flat around 0, on no side: as with a rectifier a healthy element may be silent.
    **dict.fromkeys((nn.Hardshrink, nn.Softshrink, nn.Tanhshrink), lambda m: "one-sided"),
    # From 0 it is a rectifier with a lid: ReLU6.
    nn.Hardtanh: lambda m: "one-sided" if m.min_val == 0 else "two-sided",
    nn.ELU: lambda m: "one-sided" if m.alpha >= 0 else "",
    nn.CELU: lambda m: "one-sided" if m.alpha > 0 else "",
    nn.LeakyReLU: lambda m: "" if m.negative_slope else "one-sided",
    nn.RReLU: lambda m: "" if m.lower or m.upper else "one-sided",
}
for _kind, _shape in _SHAPES.items():
    shape.register(_kind, _shape)

_FIRES: Mapping[type[nn.Module], Callable[[Any], float | None]] = {
    **dict.fromkeys((nn.ReLU, nn.Hardswish, nn.Hardshrink, nn.Softshrink), lambda m: 0.0),
    nn.Hardtanh: lambda m: 0.0 if m.min_val == 0 else None,
    nn.Threshold: lambda m: 0.0 if m.value == 0 else None,
    nn.LeakyReLU: lambda m: None if m.negative_slope else 0.0,
    nn.RReLU: lambda m: None if m.lower or m.upper else 0.0,
    # The tail begins at x = -2.74 (GELU, both), -5.25 (SiLU) and -5.27 (Mish).
    nn.GELU: lambda m: 0.00799 if m.approximate == "tanh" else 0.00843,
    nn.SiLU: lambda m: 0.02734,
    nn.Mish: lambda m: 0.02694,
}
for _kind, _level in _FIRES.items():
    fires.register(_kind, _level)


# -- functional calls --------------------------------------------------------------------------------------------------------------


def _elu(node: Any) -> nn.Module:
    # One operator for both; only SELU scales.
    return nn.ELU(node._saved_alpha) if node._saved_scale == 1 else nn.SELU()


def _threshold(node: Any) -> nn.Module:
    # The value is not saved. With 0 in its place the module is silent exactly where the function is flat.
    return nn.Threshold(node._saved_threshold, 0.0)


_INPUT, _OUTPUT = "_saved_self", "_saved_result"

# `_saved_*` are torch's documented names (notes/autograd, "Saved tensors"). A node ending in 1 is that of the in-place call; where
# there is none, the same node serves both, and in place it has saved a copy of the input. All executed on torch 2.13.
FUNCTIONAL: Mapping[str, tuple[Callable[[Any], nn.Module], str]] = MappingProxyType(
    {
        "ReluBackward0": (lambda node: nn.ReLU(), _OUTPUT),
        "SigmoidBackward0": (lambda node: nn.Sigmoid(), _OUTPUT),
        "TanhBackward0": (lambda node: nn.Tanh(), _OUTPUT),
        "SoftmaxBackward0": (lambda node: nn.Softmax(dim=-1), _OUTPUT),  # elementwise here: the dimension does not matter
        "HardtanhBackward0": (lambda node: nn.Hardtanh(node._saved_min_val, node._saved_max_val), _INPUT),
        "HardsigmoidBackward0": (lambda node: nn.Hardsigmoid(), _INPUT),
        "HardswishBackward0": (lambda node: nn.Hardswish(), _INPUT),
        "HardshrinkBackward0": (lambda node: nn.Hardshrink(node._saved_lambd), _INPUT),
        "SoftshrinkBackward0": (lambda node: nn.Softshrink(node._saved_lambd), _INPUT),
        "ThresholdBackward0": (_threshold, _INPUT),
        "ThresholdBackward1": (_threshold, _INPUT),
        "GeluBackward0": (lambda node: nn.GELU(node._saved_approximate), _INPUT),
        "SiluBackward0": (lambda node: nn.SiLU(), _INPUT),
        "MishBackward0": (lambda node: nn.Mish(), _INPUT),
        "SoftplusBackward0": (lambda node: nn.Softplus(node._saved_beta, node._saved_threshold), _INPUT),
        "LogSigmoidBackward0": (lambda node: nn.LogSigmoid(), _INPUT),
        "EluBackward0": (_elu, _INPUT),
        "EluBackward1": (_elu, _OUTPUT),
        "CeluBackward0": (lambda node: nn.CELU(node._saved_alpha), _INPUT),
        "CeluBackward1": (lambda node: nn.CELU(node._saved_alpha), _OUTPUT),
        "LeakyReluBackward0": (lambda node: nn.LeakyReLU(node._saved_negative_slope), _INPUT),
        "LeakyReluBackward1": (lambda node: nn.LeakyReLU(node._saved_negative_slope), _OUTPUT),
    }
)
"""Name of a node -> what makes the module that stands for it, and the attribute of the node that holds what is needed."""


# -- known by name -----------------------------------------------------------------------------------------------------------------

_SWISH = frozenset({"swish", "silu", "siluactivation", "memoryefficientswish"})


def _by_name(module: nn.Module) -> nn.Module | None:
    """A module that stands for one of another package whose class says what it is: `NewGELUActivation`, `QuickGELU`, `Swish`.

    Only for modules without children and parameters: a `GeluMLP` is no activation, and a Swish that learns its beta another one.
    Variants of GELU differ little: the tail of the quick one begins at -3.1 instead of -2.7.
    """
    name = type(module).__name__.lower()
    if "gelu" not in name and name not in _SWISH:
        return None
    if next(module.children(), None) is not None or next(module.parameters(), None) is not None:
        return None
    return nn.GELU() if "gelu" in name else nn.SiLU()
