"""Proofs that a fault is there, or that a run converges: numbers of plain torch, said in a sentence."""

from __future__ import annotations

import math
from statistics import median

import torch

from tests.zoo.case import Proof
from tests.zoo.plain import Plain


def gradient_ratio(small: str, large: str, below: float, first: int = 0, last: int | None = None) -> Proof:
    """The gradient of one parameter is, in the median of updates `first` to `last`, less than `below` of that of another.

    Growth towards the input is the same with the two exchanged.
    """

    def proof(plain: Plain) -> str:
        pairs = zip(plain.grads[small][first:last], plain.grads[large][first:last], strict=True)
        ratio = median(a / b for a, b in pairs if b > 0)
        assert ratio < below, f"{small} has {ratio:.2g} of the gradient of {large}, not less than {below:g}"
        return f"the gradient of {small} is {ratio:.2g} of that of {large}"

    return proof


def gradient_grows(parameter: str, by: float, to: int, since: int = 0) -> Proof:
    """The gradient of a parameter grows to more than `by` times what it was at `since`, within update `to`."""

    def proof(plain: Plain) -> str:
        norms = plain.grads[parameter]
        growth = max((n if math.isfinite(n) else math.inf) for n in norms[since : to + 1]) / norms[since]
        assert growth > by, f"the gradient of {parameter} grows by {growth:.3g}, not by {by:g}"
        return f"the gradient of {parameter} grows to {growth:.3g} times what it was"

    return proof


def gradient_spikes(update: int, factor: float) -> Proof:
    """The norm of all gradients at one update is more than `factor` times their median before it."""

    def proof(plain: Plain) -> str:
        totals = [math.sqrt(sum(g[i] ** 2 for g in plain.grads.values() if not math.isnan(g[i]))) for i in range(update + 1)]
        ratio = totals[update] / median(totals[:update])
        assert ratio > factor, f"at update {update} the gradient is {ratio:.3g} times the median, not {factor:g}"
        return f"at update {update} the gradient is {ratio:.3g} times the median before it"

    return proof


def first_non_finite(update: int, output: str | None = None) -> Proof:
    """The first NaN or Inf is that of `update`: in the output of a module, or in a gradient or the loss."""

    def proof(plain: Plain) -> str:
        if output is not None:
            bad = [seen is not None and seen.nonfinite > 0 for seen in plain.outputs[output]]
        else:
            bad = [
                not math.isfinite(loss) or any(counts[i] > 0 for counts in plain.nonfinite.values())
                for i, loss in enumerate(plain.losses)
            ]
        found = bad.index(True) if True in bad else None
        assert found == update, f"the first NaN or Inf of {output or 'gradients and loss'} is at update {found}, not {update}"
        return f"{output or 'gradients or loss'}: NaN or Inf at update {update}, and not before"

    return proof


def dead_fraction(module: str, above: float, first: int = 0, last: int | None = None) -> Proof:
    """More than `above` of a module's units give nothing above zero in any of the updates."""

    def proof(plain: Plain) -> str:
        seen = [o.fired for o in plain.outputs[module][first:last] if o is not None]
        dead = float((~torch.stack(seen).any(0)).double().mean())
        assert dead > above, f"{dead:.3g} of the units of {module} are dead, not more than {above:g}"
        return f"{dead:.3g} of the units of {module} never fire"

    return proof


def no_gradient(*parameters: str, first: int = 0, last: int | None = None) -> Proof:
    """These parameters have no gradient (None, not zeros) at all."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert all(math.isnan(n) for n in plain.grads[name][first:last]), f"{name} has a gradient"
        return f"{', '.join(parameters)}: grad is None"

    return proof


def zero_gradient(*parameters: str, first: int = 0, last: int | None = None) -> Proof:
    """These parameters have gradients that are exactly zero in every update."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert all(n == 0.0 for n in plain.grads[name][first:last]), (
                f"{name} has the gradient {max(plain.grads[name][first:last])}"
            )
        return f"{', '.join(parameters)}: the gradient is exactly zero"

    return proof


def unchanged(*parameters: str, first: int = 0, last: int | None = None) -> Proof:
    """No step of these updates changes a bit of these parameters, though they have gradients other than zero."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert all(s == 0.0 for s in plain.steps[name][first:last]), f"{name} moves by {max(plain.steps[name][first:last])}"
            assert all(n > 0 for n in plain.grads[name][first:last]), f"{name} has no gradient"
        return f"{', '.join(parameters)}: bit for bit the same after every step"

    return proof


def update_ratio(above: float | None = None, below: float | None = None, first: int = 0, last: int | None = None) -> Proof:
    """What an update changes over what it changes it in, all matrices together, in the median of the updates."""

    def proof(plain: Plain) -> str:
        ratios = [plain.update_ratio(i) for i in range(len(plain.losses))[first:last]]
        ratio = median(r for r in ratios if math.isfinite(r))
        assert above is None or ratio > above, f"the update ratio is {ratio:.3g}, not above {above}"
        assert below is None or ratio < below, f"the update ratio is {ratio:.3g}, not below {below}"
        return f"an update changes {ratio:.3g} of the weights"

    return proof


def loss_stays(within: float, first: int = 0, last: int | None = None) -> Proof:
    """The median loss of the last third of the updates is at most `within` (relative) below that of the first third."""

    def proof(plain: Plain) -> str:
        losses = plain.losses[first:last]
        third = max(1, len(losses) // 3)
        a, b = median(losses[:third]), median(losses[-third:])
        assert b > a * (1 - within), f"the loss falls from {a:.4g} to {b:.4g}"
        return f"the loss stays: {a:.4g} in the first third, {b:.4g} in the last"

    return proof


def loss_grows(by: float, first: int = 0, last: int | None = None) -> Proof:
    """The loss ends above `by` times what it was at the beginning (a NaN or Inf counts)."""

    def proof(plain: Plain) -> str:
        losses = plain.losses[first:last]
        growth = max((x if math.isfinite(x) else math.inf) for x in losses) / losses[0]
        assert growth > by, f"the loss grows to {growth:.3g} times its first value, not {by:g}"
        return f"the loss grows to {growth:.3g} times its first value"

    return proof


def converges(to: float) -> Proof:
    """The median of the last tenth of the losses is below `to` times that of the first tenth; every loss and gradient is finite."""

    def proof(plain: Plain) -> str:
        tenth = max(1, len(plain.losses) // 10)
        a, b = median(plain.losses[:tenth]), median(plain.losses[-tenth:])
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        assert b < to * a, f"the loss goes from {a:.4g} to {b:.4g}, not below {to:g} of it"
        return f"the loss falls from {a:.4g} to {b:.4g}"

    return proof


def every(*proofs: Proof) -> Proof:
    """All of them."""
    return lambda plain: "; ".join(proof(plain) for proof in proofs)
