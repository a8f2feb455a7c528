"""The data that travels through gradwatch: frozen, with units, and without torch.

A `StepRecord` is what one parameter update looked like. A rule reads the history of them and yields a `Finding`; findings become
incidents; an incident is told to the user as an `Alert`. `STATISTICS` is the one table of everything that is measured: the history,
the trackers and the reports take names, dtypes and units from it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

SCHEMA = 2
"""Number of the history's layout. It grows whenever a column is added, renamed or changes its meaning."""


class Severity(enum.IntEnum):
    """How bad a finding is. Values equal the levels of `logging`; `WARNING` and above are alarms, `INFO` is never printed."""

    INFO = 20
    WARNING = 30
    ERROR = 40


class GradState(enum.IntFlag):
    """What happened to one parameter's gradient in one record (the column `grad_state`, uint8; 0 = nothing was seen)."""

    REACHED = 1
    """A backward pass of this record accumulated into it (or it was set by hand before the step)."""
    STALE = 2
    """When its owner stepped, the gradient still contained one that the owner had used at its previous step."""
    CLEARED = 4
    """Its gradient was cleared after it was read and before its owner stepped."""
    STEPPED = 8
    """Its owner stepped in this record."""
    CHANGED = 16
    """Its value moved in this record (set only where it was looked at: on full-statistics updates and in loops without optimizer)."""
    CLIPPED = 32
    """Its gradient was scaled down between the read and the step, by the watch or by the user."""
    ASIDE = 64
    """The record's gradient was a spike that was clipped for it (`on_rule`): nothing is learnt from it."""
    SAME = 128
    """Its owner stepped and every element was compared with what it was before: not a bit has changed. Looked at whole only where a
    sample of it did not change in the updates before."""


class SkipReason(enum.IntEnum):
    """Why a record left the weights unchanged (the column `skip_reason`)."""

    NONE = 0
    NO_STEP = 1
    """The gradients were cleared, no owner stepped, and the weights did not move."""
    SCALER = 2
    """A GradScaler found an Inf or a NaN in the gradients and left the step out."""
    RAISED = 3
    """`on_nonfinite="raise"`, `on_rule={...: "raise"}` or a limit on skips stopped the step."""
    NON_FINITE = 4
    """`on_nonfinite="skip"` left the step out: a gradient was not finite."""
    RULE = 5
    """`on_rule={...: "skip"}` left the step out: the rule found something."""


@dataclass(frozen=True, slots=True)
class Statistic:
    """One measured quantity.

    Attributes:
        axis: "parameter" (`[T, P]`), "layer" (`[T, L]`) or "update" (`[T]`).
        dtype: numpy dtype of the column.
        unit: unit of the value, "" for a pure number.
        meaning: what it is, in one sentence.
    """

    axis: Literal["parameter", "layer", "update"]
    dtype: str
    unit: str
    meaning: str


def _table() -> dict[str, Statistic]:
    p, la, u = "parameter", "layer", "update"
    rows: list[tuple[str, Any, str, str, str]] = [
        ("grad_norm", p, "f4", "loss/weight", "2-norm of the accumulated gradient, before clipping, loss scale divided out"),
        ("grad_nonfinite", p, "f4", "elements", "NaN and Inf elements of the gradient; 0 where its norm is finite"),
        ("weight_norm", p, "f4", "weight", "2-norm of the parameter before the step, on full-statistics updates"),
        ("update_ratio", p, "f4", "", "RMS of the step over RMS of the parameter before it, over a fixed sample of elements"),
        ("grad_state", p, "u1", "GradState", "flags of what happened to the gradient; 0 = nothing was seen"),
        ("lr", p, "f4", "", "learning rate of the parameter's group when its owner stepped"),
        ("calls", la, "f4", "calls", "forward calls of the module"),
        ("activation_rms", la, "f4", "", "root mean square of the output's sample"),
        ("activation_absmax", la, "f4", "", "absolute maximum of the output's sample"),
        (
            "activation_nonfinite",
            la,
            "f4",
            "elements",
            "NaN and Inf elements in the output's sample; 1 at least where any element of it is",
        ),
        ("saturated_fraction", la, "f4", "", "fraction of the output in the flat part of its activation"),
        ("dead_fraction", la, "f4", "", "fraction of units that never fired over the window"),
        ("delta_norm", la, "f4", "loss", "2-norm of the gradient with respect to the module's output, estimated from its sample"),
        ("delta_nonfinite", la, "f4", "elements", "NaN and Inf elements in that gradient's sample"),
        ("gain", la, "f4", "", "norm of the delta below the module over the norm of the delta above it"),
        ("loss", u, "f4", "loss", "sum of the roots of the record's backward passes over the loss scale"),
        ("loss_terms", u, "f4", "", "scalar roots of backward passes (or told values) that `loss` is made of; 0 = it was not seen"),
        ("total_norm", u, "f4", "loss/weight", "2-norm over all parameters whose owner stepped, before clipping"),
        ("clip_coef", u, "f4", "", "smallest factor applied to a gradient between the read and the step; 1 = none"),
        ("skipped", u, "?", "", "no weight was changed by this record"),
        ("skip_reason", u, "u1", "SkipReason", "why"),
        ("loss_scale", u, "f4", "", "factor on the loss, of a GradScaler or found by hand; 1 = none"),
        ("backward_calls", u, "f4", "calls", "backward passes in the record"),
        ("input_mean", u, "f4", "", "mean of the model's inputs"),
        ("input_std", u, "f4", "", "standard deviation of the model's inputs"),
        ("input_nonfinite", u, "f4", "elements", "NaN and Inf elements in the model's inputs"),
        ("time", u, "f8", "s", "seconds from attaching to the close of the record"),
    ]
    return {name: Statistic(axis, dtype, unit, meaning) for name, axis, dtype, unit, meaning in rows}


STATISTICS: Mapping[str, Statistic] = MappingProxyType(_table())
"""Every statistic by name. NaN in a float column means "not observed", never 0."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a non-finite value was born.

    Attributes:
        module: qualified name of the innermost module running; "" outside the model (in the loss).
        op: the forward operator as "aten::name", in both phases.
        phase: "forward", "backward", "input" or "weight".
        source: the user's "file.py:line", or "" where it is not known.
    """

    module: str
    op: str
    phase: Literal["forward", "backward", "input", "weight"]
    source: str = ""

    @property
    def is_complete(self) -> bool:
        """There is no line to be found out any more: it is known, or it came from outside."""
        return bool(self.source) or self.phase in ("input", "weight")


TRACED = frozenset(
    {
        "non_finite_input",
        "non_finite_weight",
        "non_finite_activation",
        "non_finite_loss",
        "non_finite_gradient",
        "loss_scale_collapse",
    }
)
"""Rules whose incidents have an origin."""


@dataclass(frozen=True, slots=True)
class Inquiry:
    """What was found out about one update whose loss or gradients are not finite, before its step.

    Attributes:
        step: number of the update.
        origin: where the value was born; None where that is not known, or not yet.
        cause: why, in a sentence; "" where there is nothing to say.
        remedy: what to try, in a sentence, and behind a line break the smallest mend as a diff, where the line is known.
        outputs: modules whose output is known to have held it -> how many elements did.
        inputs: bad elements in what the model was given; NaN where that was not looked at.
        overflowed: the operator is one that was given too large numbers, and did not leave its domain.
    """

    step: int
    origin: Origin | None = None
    cause: str = ""
    remedy: str = ""
    outputs: Mapping[str, float] = field(default_factory=dict)
    inputs: float = float("nan")
    overflowed: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule sees in the history at one update. A rule yields it again at every update at which it still holds.

    Attributes:
        rule: name of the rule.
        severity: how bad.
        step: the update where it began, not the one at which it was noticed.
        layers: qualified module names, most responsible first.
        parameters: qualified parameter names, where the symptom is one of parameters.
        message: one sentence: what, where, and the two numbers that matter.
        evidence: names to finite numbers.
    """

    rule: str
    severity: Severity
    step: int
    layers: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    message: str = ""
    evidence: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Alert:
    """One incident, as told to the user. A later state of the same incident is a new `Alert` that replaces the earlier one.

    Attributes:
        rule: name of the rule whose symptom is the cause.
        severity: highest seen.
        step: the update where it began (0-based; 0 for a fault present from the start).
        layers: qualified module names, most responsible first; "" is the model itself.
        parameters: qualified parameter names, where the symptom is one of parameters.
        message: what is wrong, in one sentence.
        evidence: names to numbers.
        cause: why, in one sentence; "" where it is not known.
        remedy: what to try, in one sentence.
        origin: where a non-finite value was born, or None.
        last_step: the last update with evidence.
        count: number of updates with evidence.
        state: "open", or "ended" once the evidence was absent for twice the rule's persistence.
    """

    rule: str
    severity: Severity
    step: int
    layers: tuple[str, ...]
    parameters: tuple[str, ...]
    message: str
    evidence: Mapping[str, float]
    cause: str
    remedy: str
    origin: Origin | None
    last_step: int
    count: int
    state: Literal["open", "ended"]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One closed update.

    Attributes:
        step: number of the record, from 0, without gaps.
        parameters: names of the columns of per-parameter statistics, length P.
        layers: names of the columns of per-layer statistics, length L.
        stats: by the names of `STATISTICS`: an array `[P]` or `[L]`, or a scalar.
    """

    step: int
    parameters: tuple[str, ...]
    layers: tuple[str, ...]
    stats: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How much is looked at, and how often. Gradients are read whole at every update; this is for the rest.

    Attributes:
        window: records kept in the ring buffer, at least 1. Fewer are kept where they would take more than 64 MB. 512 covers any
            rule's window eight times.
        dense: full-statistics updates at the start and after any suspicion. 64 covers every rule's time to a verdict (at most 30).
        every: afterwards one update in `every` is a full-statistics one. 10 keeps the cost of sampling below a tenth of its price.
        include: fnmatch patterns of module names that the console, the module hooks and the rules speak of; empty: all.
        exclude: patterns of module names to leave out of those.
    """

    window: int = 512
    dense: int = 64
    every: int = 10
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("dense", 0), ("every", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"Sampling({name}={value!r}): needs a whole number of updates, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"Sampling({name}={value}): needs at least {least}")
        for name in ("include", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            try:
                value = tuple(value)
            except TypeError:
                value = (value,)
            if not all(isinstance(pattern, str) for pattern in value):
                raise TypeError(f"Sampling({name}={getattr(self, name)!r}): needs fnmatch patterns (strings) of module names")
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True)
class Acted:
    """What was done to the gradients of one optimizer right before it stepped.

    Attributes:
        coef: the factor applied to them, the smallest where they got several; None: not known.
        skip: why the step is left out; `NONE`: it is not.
        aside: they were an outlier, of which nothing is to be learnt.
    """

    coef: float | None = 1.0
    skip: SkipReason = SkipReason.NONE
    aside: bool = False


class NonFiniteGradientError(RuntimeError):
    """A gradient holds a NaN or an Inf, and `on_nonfinite="raise"` was asked for, or "skip" and too many updates in a row were bad.

    The weights have not been changed by it.

    Attributes:
        step: number of the update.
        parameters: names of the parameters whose gradient is not finite.
        rule: name of the rule that says what went bad first, as far as that update was looked at: "non_finite_input",
            "non_finite_activation", "non_finite_loss", "non_finite_gradient" or "non_finite_weight".
        layers: the modules that the rule names, most responsible first.
        origin: where the value was born, if known.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int,
        parameters: tuple[str, ...],
        origin: Origin | None = None,
        rule: str = "non_finite_gradient",
        layers: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.step = step
        self.parameters = parameters
        self.origin = origin
        self.rule = rule
        self.layers = layers

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are made again from `args` alone, and this one has more; it travels between processes.
        names = ("step", "parameters", "origin", "rule", "layers")
        return _again, (type(self), str(self), {name: getattr(self, name) for name in names})


class RuleError(RuntimeError):
    """A rule found something before a step, and `on_rule={rule: "raise"}` was asked for, or "skip" and it was too often in a row.

    The weights have not been changed by it.

    Attributes:
        step: number of the update.
        rule: name of the rule.
        layers: the modules that it names, most responsible first.
    """

    def __init__(self, message: str, *, step: int, rule: str, layers: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.rule = rule
        self.layers = layers

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), str(self), {name: getattr(self, name) for name in ("step", "rule", "layers")})


def _again(cls: Callable[..., Exception], message: str, known: dict[str, Any]) -> Exception:
    return cls(message, **known)
