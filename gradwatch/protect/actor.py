"""What is done to gradients right before a step, if it was asked for: clip, leave the step out, raise."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from gradwatch.capture.acting import Due
from gradwatch.clip import Clipper, GlobalNorm, Gradients, NormClipper, norms_of
from gradwatch.protect.skip import LeftOut
from gradwatch.records import Acted, Finding, Inquiry, NonFiniteGradientError, RuleError, SkipReason

Reaction = float | Clipper | Literal["skip", "raise"]
"""What to do when a rule finds something: clip (to a `max_norm`, or by a clipper), leave the step out, raise."""

MAX_SKIPS = 10
"""Steps in a row that are left out before it raises. A bad batch or two in a row is what skipping is for; ten mean that the weights, or
all of the data, are bad, and no later batch will mend that. A GradScaler that searches its scale halves it as often from 2^16 to 2^6."""


class Judge(Protocol):
    """Knows what the rules say."""

    def foresee(self, rules: Collection[str]) -> Sequence[Finding]:
        """What these rules find in the provisional record, those first that come first among causes."""
        ...

    def is_open(self, rule: str, layers: Collection[str]) -> bool:
        """Whether an incident of the rule is open that concerns some of these layers."""
        ...

    def patience(self, rule: str) -> int:
        """Records for which a rule may be silent before what it found is over."""
        ...

    def inquiry(self, since: int) -> Inquiry | None:
        """What was found out, in this update or later, about where a value was born that is not finite; None for nothing."""
        ...

    def story(self) -> str:
        """What was found so far, in a sentence or two; "" for nothing."""
        ...

    def tell(self, text: str) -> None:
        """Say what is done from now on, or no more."""
        ...


CAUSES = ("non_finite_input", "non_finite_weight", "non_finite_activation", "non_finite_loss", "non_finite_gradient")
"""Rules that say why a gradient is not finite."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What an actor is asked to do.

    Attributes:
        clip: a clipper, or the `max_norm` of the global 2-norm over the parameters that an optimizer is about to step, or None.
        on_nonfinite: "raise" raises before the weights change, "skip" leaves the step out, "warn" leaves both to the rules.
        on_rule: rule -> what to do when it finds something.
        max_skips: steps of one optimizer in a row that are left out before it raises.
        restore_buffers: whether a step that is left out takes back what its forward pass did to buffers; None: where that is cheap.
    """

    clip: float | Clipper | None = None
    on_nonfinite: Literal["warn", "raise", "skip"] = "warn"
    on_rule: Mapping[str, Reaction] = field(default_factory=dict)
    max_skips: int = MAX_SKIPS
    restore_buffers: bool | None = None

    @property
    def asked(self) -> str:
        """As the keywords that asked for it; "" for nothing."""
        asked = [f"clip={self.clip!r}"] if self.clip is not None else []
        asked += [f"on_nonfinite={self.on_nonfinite!r}"] if self.on_nonfinite != "warn" else []
        asked += [f"on_rule={dict(self.on_rule)!r}"] if self.on_rule else []
        return " and ".join(asked)


@dataclass(slots=True)
class _Clipping:
    """A clipper that a rule has switched on.

    Attributes:
        since: the first step for which it was on.
        last: the last in which the rule found something.
    """

    since: int
    last: int


@dataclass(slots=True)
class _Of:
    """What an actor keeps for one optimizer.

    Attributes:
        name: of the first parameter that it stepped, by which it is known in a checkpoint.
        clippers: by the rule that they are bound to, "" for the one that always clips; those that learn have a history of their own.
        clipping: those that a rule has switched on.
        skips: steps in a row that were left out.
        since: the first of them.
    """

    name: str
    clippers: dict[str, Clipper]
    clipping: dict[str, _Clipping] = field(default_factory=dict)
    skips: int = 0
    since: int = 0


class Actor:
    """Acts right before an optimizer steps.

    Args:
        policy: what it is asked to do.
        judge: knows what the rules say.

    Attributes:
        policy: as given.
    """

    def __init__(self, policy: Policy, judge: Judge) -> None:
        self.policy, self._judge = policy, judge
        self._findings: list[Finding] = []
        self._left_out = LeftOut()
        self._of: weakref.WeakKeyDictionary[Optimizer, _Of] = weakref.WeakKeyDictionary()
        self._clips: dict[str, float | Clipper] = {"": policy.clip} if policy.clip is not None else {}
        self._clips |= {rule: reaction for rule, reaction in policy.on_rule.items() if not isinstance(reaction, str)}
        self._stops = {rule: reaction for rule, reaction in policy.on_rule.items() if isinstance(reaction, str)}
        # What learns from norms has to learn those of one optimizer. The user keeps the first, and may look at it.
        self._fresh = {rule: copy.deepcopy(clip) for rule, clip in self._clips.items() if isinstance(clip, NormClipper)}
        self._loaded: dict[str, dict[str, Any]] = {}

    @property
    def asked(self) -> str:
        """What it was asked to do, as the keywords that asked for it."""
        return self.policy.asked

    @property
    def needs_norms(self) -> bool:
        """It decides by numbers on the host."""
        clip = self.policy.clip
        own = clip is None or isinstance(clip, (int, float, NormClipper))
        return self.policy.on_nonfinite != "warn" or bool(self.policy.on_rule) or not own

    @property
    def skips(self) -> bool:
        """It may leave a step out, or raise before it."""
        return self.policy.on_nonfinite != "warn" or bool(self._stops)

    @property
    def restores_buffers(self) -> bool | None:
        """Whether a step that is left out takes back what was done to buffers."""
        return self.policy.restore_buffers

    def refuse(self, optimizer: Optimizer) -> None:
        """Raise where nothing can act before the weights change.

        Raises:
            RuntimeError: the optimizer evaluates a closure several times within one step.
        """
        if isinstance(optimizer, LBFGS):
            raise RuntimeError(self.evaluates_again(optimizer))

    def evaluates_again(self, optimizer: Optimizer) -> str:
        """Why it cannot act on this optimizer, in words."""
        return (
            f"gradwatch was asked to act before the step ({self.asked}), but {type(optimizer).__name__} evaluates its closure several "
            "times within one step and changes the weights in between. Clip inside the closure, or watch without "
            "clip= and on_rule=, and with on_nonfinite='warn'."
        )

    # -- before a step -------------------------------------------------------------------------------------------------------------

    def __call__(self, due: Due) -> Acted:
        """Act.

        Raises:
            NonFiniteGradientError: a gradient is not finite, and to raise was asked for, or to skip and it has been too often.
            RuleError: a rule found something and to raise was asked for, or to skip and it has been too often.
        """
        mine = self._for(due)
        finite = bool(np.isfinite(due.norms).all())
        if not finite and not due.found_inf:
            if self.policy.on_nonfinite == "raise":
                raise self._non_finite(due)
            if self.policy.on_nonfinite == "skip":
                if mine.skips >= self.policy.max_skips:
                    raise self._non_finite(due, mine)
                return self._leave_out(due, mine, SkipReason.NON_FINITE)
        found = self._foresee(due) if finite and self.policy.on_rule else {}
        for rule, reaction in self._stops.items():
            if rule in found:
                if reaction == "raise" or mine.skips >= self.policy.max_skips:
                    raise RuleError(self._stopped(due, mine, found[rule]), step=due.step, rule=rule, layers=found[rule].layers)
                finding = found[rule]
                self._findings.append(replace(finding, message=f"{finding.message}; the update was left out"))
                return self._leave_out(due, mine, SkipReason.RULE)
        mine.skips = 0
        spike = "gradient_spike" in found and "gradient_spike" in mine.clippers
        return Acted(self._clip(due, mine, finite, found), aside=spike)

    def on_device(self, due: Due) -> Tensor | None:
        """Clip gradients on their device, waiting for nothing."""
        clipper = self._for(due).clippers.get("")
        if not isinstance(clipper, NormClipper):
            return None
        if due.factor != 1.0:
            _unscale(due.optimizer, due.params, due.factor)
        with torch.no_grad():
            return clipper.clip(Gradients(due.params, norms_of(due.params), due.names, due.layers, due.heads))

    def take_findings(self) -> list[Finding]:
        """What rules found before steps that were left out for it, since the last call: no record that they look at later has it."""
        findings, self._findings = self._findings, []
        return findings

    def stepped(self, optimizer: Optimizer) -> None:
        """The step that was left out has returned."""
        self._left_out.end(optimizer)

    def _for(self, due: Due) -> _Of:
        mine = self._of.get(due.optimizer)
        if mine is None:
            clippers = {rule: self._new(rule, clip) for rule, clip in self._clips.items()}
            mine = self._of[due.optimizer] = _Of(due.names[0] if due.names else "", clippers)
            if mine.name in self._loaded:
                _load(mine, self._loaded[mine.name])
        return mine

    def _new(self, rule: str, clip: float | Clipper) -> Clipper:
        if isinstance(clip, (int, float)):
            return GlobalNorm(float(clip))
        return copy.deepcopy(self._fresh[rule]) if self._of and rule in self._fresh else clip

    def _leave_out(self, due: Due, mine: _Of, reason: SkipReason) -> Acted:
        mine.since = due.step if mine.skips == 0 else mine.since
        mine.skips += 1
        self._left_out.begin(due.optimizer)
        return Acted(1.0, reason)

    def _foresee(self, due: Due) -> dict[str, Finding]:
        due.write_provisional()
        found: dict[str, Finding] = {}
        for finding in self._judge.foresee(self.policy.on_rule.keys()):
            if touches(finding.layers, due.layers):  # what is wrong with another model is none of this optimizer's business
                found.setdefault(finding.rule, finding)
        return found

    # -- clipping ------------------------------------------------------------------------------------------------------------------

    def _clip(self, due: Due, mine: _Of, finite: bool, found: Mapping[str, Finding]) -> float | None:
        """Clip; returns the smallest factor applied, None where it is not known."""
        on = [clipper for rule, clipper in mine.clippers.items() if not rule or self._is_on(rule, due, mine, found.get(rule))]
        product: float | None = 1.0
        norms = due.norms / due.factor if due.factor != 1.0 else due.norms
        for i, clipper in enumerate(on):
            if i and product != 1.0:  # those after another one go by what that has left
                scale = due.factor if getattr(due.optimizer, "grad_scale", None) is not None else 1.0
                norms = norms_of(due.params).double().numpy() / scale
            coef = self._clip_by(clipper, due, norms, finite)
            product = None if product is None or coef is None else product * coef
        return product

    def _clip_by(self, clipper: Clipper, due: Due, norms: NDArray[np.float64], finite: bool) -> float | None:
        if due.factor != 1.0 and not (isinstance(clipper, NormClipper) and clipper.by_norms_alone):
            _unscale(due.optimizer, due.params, due.factor)
        if isinstance(clipper, NormClipper):
            coef = float(clipper.clip(Gradients(due.params, torch.from_numpy(norms), due.names, due.layers, due.heads)))
            return None if coef != coef else coef
        if finite:  # a NaN or an Inf never multiplies anything
            clipper(due.params)
            return None
        return 1.0

    def _is_on(self, rule: str, due: Due, mine: _Of, found: Finding | None) -> bool:
        """Whether a rule has its clipper on: from the update in which it finds something until that is over."""
        clipping = mine.clipping.get(rule)
        opened = self._judge.is_open(rule, due.layers)
        if found is not None and not opened:
            self._findings.append(found)  # rules are asked by turns after an update, and each time before its step
        if found is not None or opened:
            if clipping is None:
                clipping = mine.clipping[rule] = _Clipping(due.step, due.step)
                self._judge.tell(f"clips from step {due.step} on, for {_words(rule)}: {_shown(self._clips[rule])}")
            clipping.last = due.step if found is not None else clipping.last
        elif clipping is not None and due.step - clipping.last > self._judge.patience(rule):
            del mine.clipping[rule]
            count = due.step - clipping.since
            updates = "1 update" if count == 1 else f"{count} updates"
            self._judge.tell(f"clips no more from step {due.step} on, after {updates}: {_words(rule)} is over")
            return False
        return clipping is not None

    # -- errors --------------------------------------------------------------------------------------------------------------------

    def _non_finite(self, due: Due, mine: _Of | None = None) -> NonFiniteGradientError:
        bad = [name for name, norm in zip(due.names, due.norms, strict=True) if not np.isfinite(norm)]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        due.write_provisional()
        first = next(iter(self._judge.foresee(CAUSES)), None)
        why = f" First of all, {first.message}." if first is not None and first.rule != "non_finite_gradient" else ""
        inquiry = self._judge.inquiry(due.step if mine is None else mine.since)
        if inquiry is not None and inquiry.cause:
            why = f"{why} {inquiry.cause}"
        text = (
            f"step {due.step}: the gradient is not finite in {', '.join(bad[:3])}{more} ({len(bad)} of {len(due.names)} parameters of "
            f"{type(due.optimizer).__name__}).{why} "
        )
        if mine is None:
            text += "The weights have not been changed; call zero_grad() and go on with the next batch to leave this update out."
        else:
            text += (
                f"So were those of the {mine.skips} updates before it, from step {mine.since} on, which were left out, and "
                f"max_skips={self.policy.max_skips} allows no more: no batch mends this"
                f"{'' if inquiry is not None and inquiry.origin is not None else ', so look for NaN in weights and buffers'}. "
                f"{self._judge.story()}The weights are those of before step {mine.since}."
            )
        return NonFiniteGradientError(
            text.rstrip(),
            step=due.step,
            parameters=tuple(bad),
            rule=first.rule if first is not None else "non_finite_gradient",
            layers=first.layers if first is not None else (),
            origin=inquiry.origin if inquiry is not None else None,
        )

    def _stopped(self, due: Due, mine: _Of, finding: Finding) -> str:
        text = f"step {due.step}: {_words(finding.rule)}: {finding.message}. "
        if mine.skips:
            text += (
                f"So it was in the {mine.skips} updates before it, from step {mine.since} on, which were left out, and "
                f"max_skips={self.policy.max_skips} allows no more. {self._judge.story()}"
            )
        return text + "The weights have not been changed."

    # -- a run that goes on later --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What it has learnt and counted, of each optimizer by the name of a parameter that it steps."""
        return self._loaded | {
            mine.name: {
                "clippers": {rule: one.state_dict() for rule, one in mine.clippers.items() if hasattr(one, "state_dict")},
                "clipping": {rule: (each.since, each.last) for rule, each in mine.clipping.items()},
                "skips": (mine.skips, mine.since),
            }
            for mine in self._of.values()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._loaded = dict(state)
        for mine in self._of.values():
            if mine.name in self._loaded:
                _load(mine, self._loaded[mine.name])


def touches(some: Collection[str], layers: Collection[str]) -> bool:
    """Whether a finding about some layers, or about none in particular, is about some of these."""
    if not some or "" in some:
        return True
    return any(layer == one or layer.startswith(f"{one}.") for one in some for layer in set(layers))


def _load(mine: _Of, state: Mapping[str, Any]) -> None:
    mine.skips, mine.since = state["skips"]
    mine.clipping = {rule: _Clipping(*numbers) for rule, numbers in state["clipping"].items()}
    for rule, of_clipper in state["clippers"].items():
        clipper: Any = mine.clippers.get(rule)
        if hasattr(clipper, "load_state_dict"):
            clipper.load_state_dict(of_clipper)


def _unscale(optimizer: Optimizer, params: Sequence[Tensor], factor: float) -> None:
    """Divide out the loss scale that a fused optimizer would have divided out itself, as `GradScaler.unscale_` does it."""
    if getattr(optimizer, "grad_scale", None) is None:
        return  # that is done already
    with torch.no_grad():
        for p in params:
            if p.grad is not None:
                p.grad.mul_(1.0 / factor)
    optimizer.grad_scale = None  # type: ignore[attr-defined]


def _words(rule: str) -> str:
    return rule.replace("_", " ")


def _shown(clip: Any) -> str:
    return f"max_norm={clip:g}" if isinstance(clip, (int, float)) else repr(clip)
