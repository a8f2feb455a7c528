"""Cause and remedy in words, with what was measured: short, plain, one sentence each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from gradwatch.diagnose.gains import FUNCTION, kinds_in
from gradwatch.diagnose.reasons import JUMP, LARGE, OWN, feeding, step_before, usual_rate, usual_ratio
from gradwatch.history import History
from gradwatch.records import Finding, Severity


def explain(finding: Finding, history: History) -> tuple[str, str]:
    """Why, and what to try.

    Args:
        finding: with its layers named.
        history: as it was when the finding was made.

    Returns:
        Two sentences, (cause, remedy); ("", "") for a rule that is not known here.
    """
    words = _WORDS.get(finding.rule)
    return words(finding, history) if words else ("", "")


def _not_zeroed(finding: Finding, history: History) -> tuple[str, str]:
    return (
        "Gradients add up over updates because nothing clears them between optimizer.step() and the next backward().",
        "Call optimizer.zero_grad() once per update, before backward().",
    )


def _never_stepped(finding: Finding, history: History) -> tuple[str, str]:
    if finding.evidence.get("foreign_steps", 0) > 0:
        return (
            "The optimizer that steps was given other parameters, for example those of a model made before this one.",
            "Create the optimizer from model.parameters() after the model is in its final form.",
        )
    return (
        "backward() computes gradients, but no optimizer.step() follows it and the weights never move.",
        "Call optimizer.step() after backward(), on the optimizer that owns these parameters.",
    )


def _missing(finding: Finding, history: History) -> tuple[str, str]:
    e = finding.evidence
    uncalled, before = e.get("uncalled", 0.0), e.get("reached_before", 0.0) > 0
    if uncalled == e.get("parameters", 0.0) > 0:
        if before:
            return ("Nothing in the forward pass calls their modules any more.", f"Call them in forward(). {_PHASES}")
        return (
            "Nothing in the forward pass calls their modules.",
            "Call them in forward(), or leave them out of the model (frozen by requires_grad_(False) they are no fault).",
        )
    graph = set(finding.parameters) & set(history.meta.unreached)
    why = "No path of the graph leads from the loss to them" if graph else "No backward pass reaches them"
    use = "Use the module's output in the loss without detaching it"
    remedy = f"{use}. {_PHASES}" if before else f"{use}, or freeze it (requires_grad_(False))."
    if e.get("called", 0.0) > 0 and not uncalled:
        return (
            f"{why}, though their modules run: the output is unused or detached (detach(), no_grad(), .data, .item(), numpy).",
            remedy,
        )
    return (f"{why}: their output is unused, detached (detach(), no_grad(), .data, .item(), numpy), or never computed.", remedy)


_PHASES = "If the training goes in phases all is well: freeze what waits (requires_grad_(False)) or leave it out by Sampling(exclude=...)."


def _not_in_optimizer(finding: Finding, history: History) -> tuple[str, str]:
    if not finding.parameters:
        return (
            "Layers kept in a plain list, dict or closure are not registered, so model.parameters() leaves them out.",
            "Keep them in nn.ModuleList or nn.ModuleDict (tensors: nn.Parameter), then create the optimizer.",
        )
    return (
        "They were not among the parameters given to the optimizer, or were added or replaced after it was created.",
        "Create the optimizer from all of model.parameters(), or freeze them with requires_grad_(False).",
    )


def _scale(finding: Finding, history: History) -> tuple[str, str]:
    return (
        "The scaler halves its scale whenever a gradient is Inf or NaN; so many in a row mean NaN at any scale, not overflow.",
        "Look for a NaN with the scaler switched off; if there is none, use bfloat16 or keep the unstable part in float32.",
    )


def _input(finding: Finding, history: History) -> tuple[str, str]:
    if finding.severity < Severity.WARNING:
        return (
            "The model is given NaN or Inf, but neither the loss nor a gradient holds any: missing values or a mask, it seems.",
            "Nothing, if that is meant.",
        )
    return (
        "The batch held NaN or Inf before the model saw it: a missing value, a division by a zero spread, an overflow in half precision.",
        "Look at the batch of this update (torch.isfinite(x).all()) and mend the data or its normalisation.",
    )


def _activation(finding: Finding, history: History) -> tuple[str, str]:
    name = finding.layers[0] or "the model" if finding.layers else "the module"
    if finding.severity < Severity.WARNING:
        return ("Neither the loss nor a gradient holds NaN or Inf: a mask of -inf, it seems.", "Nothing, if that is meant.")
    return _diverged(history) or (
        f"In {name}, or right before it, a log, sqrt, division or exp left its domain or a product overflowed.",
        "Guard the operation (eps inside log and sqrt, a clamp before exp), or keep that part in float32.",
    )


def _dead(finding: Finding, history: History) -> tuple[str, str]:
    told = _one_step(finding, history, "They died") or _scale_of(finding, history, "below zero for every input")
    if told is not None:
        return told
    if finding.step > 0:
        return (
            "What they are given went below zero for every input, and no gradient comes back through them to change that.",
            "Lower the learning rate or warm it up, clip the gradient norm (clip=1.0), or use LeakyReLU or GELU.",
        )
    return (
        "What they are given is below zero for every input since the start: a large negative bias, or weights that make it so.",
        "Initialise the layer before them with zero biases and kaiming_normal_, normalise its input, or use LeakyReLU or GELU.",
    )


def _saturated(finding: Finding, history: History) -> tuple[str, str]:
    e = finding.evidence
    told = _one_step(finding, history, "It saturated")
    if told is None and not e.get("input_std", 1.0) >= LARGE_INPUT:
        told = _scale_of(finding, history, "far beyond the range in which it responds")
    if told is not None:
        return told
    if finding.step > 0:
        return (
            "What it is given has grown far beyond the range in which it responds: large steps, or weights or biases set too large.",
            "Lower the learning rate, add normalisation before it or weight decay, or use an activation without flat ends.",
        )
    if e.get("input_std", 1.0) >= LARGE_INPUT:
        return (
            f"Inputs with a standard deviation of {e['input_std']:.2g} drive it far beyond the range in which it responds.",
            "Normalise the inputs to mean 0 and standard deviation 1.",
        )
    return (
        "The weights or biases before it are so large that what it is given lies far beyond the range in which it responds.",
        "Initialise the layer before it with xavier_normal_ and zero biases, or put normalisation between the two.",
    )


def _one_step(finding: Finding, history: History, what: str) -> tuple[str, str] | None:
    """The one update that did it: its number, its norm, its learning rate."""
    step = step_before(finding, history) if finding.step > 0 else None
    if step is None:
        return None
    rate = f" at a learning rate of {step.lr:.2g}" if np.isfinite(step.lr) else ""
    if step.norm > JUMP * step.usual:
        return (
            f"{what} after update {step.number}, whose gradient norm was {step.norm:.2g} where {step.usual:.2g} is usual{rate}.",
            "Clip the gradient norm (clip=1.0) and look at the batch of that update; lower the learning rate or warm it up.",
        )
    return (
        f"{what} after update {step.number}, the first at a learning rate of {step.lr:.2g}, after {step.lr_before:.2g}.",
        "Raise the learning rate more slowly (warm it up), lower its peak, or clip the gradient norm (clip=1.0).",
    )


def _scale_of(finding: Finding, history: History, where: str) -> tuple[str, str] | None:
    """From the start: the bias, the weights or the inputs."""
    if finding.step > 0 or not finding.layers:
        return None
    scale = feeding(finding.layers[0], history)
    if scale is None:
        return None
    name = scale.layer or "the model"
    if scale.bias > OWN * scale.output:
        return (
            f"The bias of {name} (rms {scale.bias:.2g}) makes up most of what it puts out (rms {scale.output:.2g}), {where}.",
            f"Initialise the bias of {name} with zeros.",
        )
    if scale.weights > LARGE:
        return (
            f"The weights of {name} enlarge what they are given {scale.weights:.2g} times (rms {scale.output:.2g}), {where}.",
            f"Initialise {name} with kaiming_normal_ (ReLU) or xavier_normal_ (tanh, sigmoid), or normalise behind it.",
        )
    return None


LARGE_INPUT = 5.0
"""Standard deviation of the inputs that saturates half of a tanh behind PyTorch's default weights (measured)."""


def _weight(finding: Finding, history: History) -> tuple[str, str]:
    return _diverged(history) or (
        "A step or an assignment wrote NaN or Inf into the weights; every output computed from them is lost.",
        "Go back to a checkpoint from before that update; check the step size and what else writes to the weights.",
    )


def _loss(finding: Finding, history: History) -> tuple[str, str]:
    return _diverged(history) or (
        "A log, sqrt, division or exp in the model or the loss left its domain, or the batch held a NaN.",
        "Check the batch, then guard the operation (eps inside log and sqrt, a clamp before exp); lower the learning rate.",
    )


DIVERGED = "The training diverged"
"""How the cause begins of what is not finite because the loss had grown beyond all bounds."""


def _diverged(history: History) -> tuple[str, str] | None:
    """The loss had grown a hundredfold before it was lost."""
    b = history.baselines
    losses = b.losses[np.isfinite(b.losses)]
    if len(losses) < 2 or not b.first_losses.size:
        return None
    # The very first one: the second may be that of a run that is diverging already.
    first, last = float(b.first_losses[0]), float(losses[-1])
    if not last > 100 * abs(first):
        return None
    return (
        f"{DIVERGED}: the loss grew from {first:.3g} to {last:.3g} before it overflowed.",
        "Lower the learning rate by 3 to 10 times, warm it up, and clip the gradient norm (clip=1.0).",
    )


def _gradient(finding: Finding, history: History) -> tuple[str, str]:
    return _diverged(history) or (
        "The loss is finite but a derivative is not: sqrt, norm or pow at 0, a masked division, or an overflow.",
        "Add an eps inside the root or the norm, and select safe inputs before the operation, not its output after it.",
    )


def _vanishing(finding: Finding, history: History) -> tuple[str, str]:
    e = finding.evidence
    if "update_ratio" in e:
        return (
            f"What reaches it changes its weights by {e['update_ratio']:.0e} of their size a step, less than float32 resolves.",
            "Look at what stands between it and the loss: a saturated activation, a tiny factor, or a closed gate.",
        )
    names = _activations(history)
    weak = sum(names[name] for name in ("Sigmoid", "Hardsigmoid", "LogSigmoid"))
    flat = sum(names[name] for name in ("Tanh", "Softsign", "Hardtanh"))
    gain = _typical_gain(finding, history)
    whole = e.get("ratio", 0.0)
    if e.get("share_of_drop", 0.0) >= 0.6 or (e.get("sharpest_drop", 1.0) <= 10**-2.5 and not (gain is not None and gain < 0.1)):
        first = finding.layers[0] or "(model)" if finding.layers else "one place"
        if e.get("nodes", 0.0) >= 12:
            return (
                f"It is lost behind {first}, on the way back through many passes of the same layer, each of which shrinks it.",
                "Use an LSTM, a GRU or residual steps, an orthogonal recurrent weight, or fewer steps.",
            )
        if e.get("gain_there", 1.0) < 0.1:
            return (
                f"The weights of the layer after {first} are tiny: they keep {_times(e.get('gain_there', 0.0))} of the scale of what passes.",
                "Initialise that layer with kaiming_normal_ or xavier_normal_.",
            )
        return (
            f"Most of it is lost in one place, behind {first}: the gradient {_dropped(e.get('sharpest_drop', 0.0))}.",
            "Look there for a saturated activation, a tiny factor or weight, or a closed gate; normalise before it.",
        )
    measured = _by_gains(finding, "pass on", "passes on")
    if measured:
        return measured, _REMEDIES.get(kinds_in(e)[0].name, _OTHER_REMEDY)
    # Gates, one to a block, are sigmoids too, and are not what the gradient passes on its way.
    if weak >= 3 and weak >= 0.5 * e.get("layers_in_all", weak):
        which = "sigmoid" if names["Sigmoid"] >= weak else "sigmoid-like activation"
        return (
            f"{weak} {which}s in a row: each passes on at most a quarter of the gradient.",
            "Use ReLU or GELU instead, or put normalisation between the layers, or residual connections around them.",
        )
    if gain is not None and gain < 0.75:
        return (
            f"The weights are small: a typical layer keeps {_times(gain)} of the scale of what passes it.",
            "Initialise with kaiming_normal_ (ReLU) or xavier_normal_ (tanh), or add normalisation or residual connections.",
        )
    if flat >= 3:
        which = "tanh" if names["Tanh"] >= flat else "saturating activations"
        return (
            f"{flat} {which} in a row: each passes on less than it gets, and next to nothing where it saturates.",
            "Use ReLU or GELU with kaiming_normal_ initialisation, normalisation, or residual connections.",
        )
    return (
        f"Each layer passes on less than it gets: {_times(whole) if whole else 'nothing'} is left over {e.get('layers_in_all', 0):.0f} layers.",
        _OTHER_REMEDY,
    )


_OTHER_ACTIVATION = "Use ReLU or GELU instead, or put normalisation between the layers, or residual connections around them."
_OTHER_INIT = "Initialise with kaiming_normal_ (ReLU) or xavier_normal_ (tanh), or add normalisation or residual connections."
_OTHER_REMEDY = "Add normalisation or residual connections, or initialise so that a layer keeps the scale of what passes it."
_REMEDIES = dict.fromkeys(
    ("Sigmoid", "Hardsigmoid", "LogSigmoid", "Tanh", "Softsign", "Hardtanh", FUNCTION), _OTHER_ACTIVATION
) | dict.fromkeys(("Linear", "Conv1d", "Conv2d", "Conv3d"), _OTHER_INIT)


def _by_gains(finding: Finding, verb: str, verbs: str) -> str:
    """The fall or the growth as the product of what modules do to the gradient: "9 Sigmoids pass on ×0.21 each, 9 Linears ×0.9: ..."."""
    kinds = kinds_in(finding.evidence)
    if not kinds:
        return ""
    # The first does most of it; others are told where they count.
    told = [kind for i, kind in enumerate(kinds) if i == 0 or abs(kind.decades) >= 0.3][:3]
    words = []
    for i, kind in enumerate(told):
        name = "activation" if kind.name == FUNCTION else kind.name
        if i:
            words.append(f"{_number_of(kind.count, name)} ×{_times(kind.gain)}")
        elif kind.count > 1:
            words.append(f"{_number_of(kind.count, name)} {verb} ×{_times(kind.gain)} each")
        else:
            words.append(f"one {name} {verbs} ×{_times(kind.gain)}")
    start, end = finding.evidence.get("reference_norm", np.nan), finding.evidence.get("grad_norm", np.nan)
    text = ", ".join(words) + f": {_power(start)} → {_power(end)}."
    return text[0].upper() + text[1:]


def _number_of(count: int, name: str) -> str:
    plural = name + ("es" if name.endswith(("s", "x", "h")) and not name.endswith("Tanh") else "s")
    return f"{count} {plural if count > 1 else name}"


_SMALLER_INIT = "Initialise with kaiming_normal_ or xavier_normal_ (recurrent: orthogonal_), add normalisation, or clip (clip=1.0)."


def _exploding(finding: Finding, history: History) -> tuple[str, str]:
    e = finding.evidence
    if e.get("growing", 0) > 0:
        return (
            "Each step overshoots, so the next gradient is larger still: the learning rate is too high for this loss.",
            "Lower the learning rate by 3 to 10 times, warm it up, and clip the gradient norm (clip=1.0).",
        )
    measured = _by_gains(finding, "multiply it by", "multiplies it by")
    if measured and e.get("explained", 0) > 0:
        return (measured, _SMALLER_INIT)
    if e.get("explained", 0) > 0:
        return (
            f"The weights are large: a typical layer enlarges what passes it {e.get('gain', 1.0):.2g} times, and this multiplies.",
            _SMALLER_INIT,
        )
    return (
        f"The weights do not explain it: one step alone enlarges the gradient {e.get('sharpest_rise', 1.0):.2g} times.",
        "Check custom backward functions, gradient hooks and factors between these layers; clip=1.0 limits the damage.",
    )


def _spike(finding: Finding, history: History) -> tuple[str, str]:
    now, before = history.recent("loss", 1), history.baselines.losses[:-1][-10:]
    before = before[np.isfinite(before)]
    with_loss = now.size and before.size and np.median(before) > 0 and now[0] > 5 * np.median(before)
    if with_loss:
        why = f"The loss of this batch is {now[0] / np.median(before):.0f} times the usual: an outlier or a bad label."
    else:
        why = "The loss is as usual, so the gradient itself jumped: a division by a small number, a sharp spot, or a hook."
    return (why, "Clip the gradient norm (clip=1.0) and look at the batch of this update.")


def _zero(finding: Finding, history: History) -> tuple[str, str]:
    first = finding.layers[0] or "(model)" if finding.layers else "them"
    if finding.evidence.get("clamped", 0.0) > 0:
        return (
            f"What {first} gives goes through a clamp, whose derivative is exactly 0 outside its limits.",
            "Begin inside the limits (the bias of the last layer), or bound it smoothly: softplus, or low + (high - low) * sigmoid(x). If it "
            "lies inside, look for round, sign or a comparison beside the clamp.",
        )
    if finding.evidence.get("layers", 0.0) == finding.evidence.get("layers_in_all", -1.0):
        return (
            "As far as a derivative can tell the loss does not depend on any weight: something is multiplied by 0, rounded or clamped.",
            "Look in the loss and behind the last layer for round, sign, a comparison, a clamp whose limits are passed, or a mask of zeros.",
        )
    return (
        f"Behind {first} stands something whose derivative is exactly 0: round, sign, a comparison, a clamp whose limits are passed, "
        "a softmax over one element, or a product with 0.",
        "Use a smooth stand-in or a straight-through estimator (x + (f(x) - x).detach()), or keep the values inside the clamp.",
    )


def _frozen(finding: Finding, history: History) -> tuple[str, str]:
    e = finding.evidence
    if e.get("cleared", 0.0) > 0:
        return (
            "zero_grad() runs between backward() and step(), so the optimizer has nothing to step by.",
            "Call zero_grad() before backward(), or after step().",
        )
    if e.get("lr", 1.0) == 0.0:
        return (
            "Their learning rate is 0: a parameter group made so, or a scheduler that multiplies by 0.",
            "Look at optimizer.param_groups and the scheduler's factor; to freeze them, use requires_grad_(False).",
        )
    if e.get("half_precision", 0.0) > 0:
        return (
            "The weights are kept in half precision, and a step smaller than half their last digit rounds away.",
            "Keep the weights in float32 and use autocast, or raise the learning rate, or use stochastic rounding.",
        )
    at = f" at a learning rate of {e['lr']:.2g}" if "lr" in e else ""
    return (
        f"A step{at} is smaller than half the last digit of the weights and rounds away.",
        "Raise the learning rate; look at what else scales the step (a scheduler, clipping, the loss).",
    )


def _too_large(finding: Finding, history: History) -> tuple[str, str]:
    rate = finding.evidence.get("lr", 0.0)
    lower = f" ({rate:.2g} now)" if rate else ""
    return (
        "Each step overwrites what was learnt before: the learning rate is too high for the size of these weights.",
        f"Lower the learning rate{lower} until an update changes about 1e-3 of the weights, and warm it up.",
    )


def _too_small(finding: Finding, history: History) -> tuple[str, str]:
    e = finding.evidence
    ratio = e.get("update_ratio", 0.0)
    if e.get("gradient_ratio", 1.0) < FAINT:
        return (
            f"The gradient is {e['gradient_ratio']:.0e} of the weights: next to nothing of the loss gets here, at any usual learning rate.",
            "Look at what stands between these weights and the loss: a saturated output or critic, a tiny factor, a closed gate.",
        )
    factor = f" about {_round(1e-3 / ratio)} times" if ratio > 0 else ""
    rate = f"At a learning rate of {e['lr']:.2g} the" if "lr" in e else "The"
    return (
        f"{rate} steps are too small to change anything.",
        f"Raise the learning rate{factor}, to where an update changes about 1e-3 of the weights.",
    )


FAINT = 1e-6
"""Norm of a gradient over that of the weights below which a learning rate would have to be above 100 to change 1e-4 of them."""


def _round(factor: float) -> str:
    return f"1e{round(np.log10(factor))}" if factor >= 1e4 else f"{10 ** round(np.log10(factor))}"


def _loss_diverges(finding: Finding, history: History) -> tuple[str, str]:
    return (
        "Each step makes it worse: the learning rate is too high, or the sign of a term is wrong.",
        "Lower the learning rate by 3 to 10 times and warm it up; check that the loss is what is to be made small.",
    )


def _loss_spikes(finding: Finding, history: History) -> tuple[str, str]:
    return (
        "One batch is far from all others: an outlier, wrong labels, another scale, or something the model had not met before.",
        "Look at the batch of this update; clip the gradient norm (clip=1.0) or use a robust loss (smooth_l1_loss).",
    )


def _loss_stays(finding: Finding, history: History) -> tuple[str, str]:
    if finding.evidence.get("broadcast", 0.0) > 0:
        return (
            "The prediction and the target have different shapes and were broadcast: every output is compared with every target.",
            "Give both the same shape: pred.squeeze(-1), or target.unsqueeze(-1).",
        )
    if "largest_lr" in finding.evidence:
        return (
            f"The schedule took the learning rate from {finding.evidence['largest_lr']:.2g} to {finding.evidence['lr']:.2g} while the loss "
            "was still falling: one meant for epochs that is stepped with every batch does that.",
            "Call scheduler.step() once an epoch, or count the schedule's milestones, steps and decay in batches.",
        )
    told = _no_progress(history)
    if told is not None:
        return told
    return (
        "The outputs tell nothing of the targets: labels that do not belong to the inputs, a wrong learning rate, or information lost "
        "on the way.",
        "Check that inputs and labels match after shuffling, try to overfit one batch, and try learning rates 10 times higher and lower.",
    )


def _no_progress(history: History) -> tuple[str, str] | None:
    """What is seen of inputs and steps where nothing is learnt."""
    spread = history.stat("input_std")
    seen = spread[np.isfinite(spread)]
    if seen.size and float(np.median(seen)) == 0.0:
        return ("The inputs are constant: nothing in them tells one sample from another.", "Check how the batch is made.")
    ratio, rate = usual_ratio(history), usual_rate(history)
    at = f" at a learning rate of {rate:.2g}" if np.isfinite(rate) else ""
    if ratio < TINY_STEPS:
        return (
            f"An update{at} changes a typical weight by {ratio:.0e} of itself: too little to learn anything in this time.",
            f"Raise the learning rate about {_round(1e-3 / ratio) if ratio > 0 else 1000} times, to where it changes about 1e-3 of it.",
        )
    if ratio > HUGE_STEPS:
        return (
            f"An update{at} changes a typical weight by {ratio:.2g} of itself: what was learnt is overwritten.",
            "Lower the learning rate until an update changes about 1e-3 of the weights, and warm it up.",
        )
    return None


TINY_STEPS, HUGE_STEPS = 1e-6, 0.3
"""Update ratios outside of which the step size explains that nothing is learnt: a thousandth of the usual 1e-3, and what no healthy run
keeps up (`update_ratio_too_large`)."""


def _squashed(finding: Finding, history: History) -> tuple[str, str]:
    outer, _, inner = (history.meta.squashed or "softmax").partition(" of ")
    criterion = "cross_entropy" if outer == "softmax" else "binary_cross_entropy_with_logits"
    return (
        f"{criterion} takes logits and applies the {outer} itself; of values between 0 and 1 it makes nearly equal probabilities.",
        f"Leave out the {inner or outer}: give the loss the logits, and apply it where you predict.",
    )


def _poor_init(finding: Finding, history: History) -> tuple[str, str]:
    if "first_loss" in finding.evidence:
        return (
            f"The weights of {finding.layers[0] or 'the model' if finding.layers else 'the last layer'} are so large that the network "
            "begins certain and wrong.",
            "Initialise with PyTorch's default or kaiming_normal_, the last layer and tied embeddings small (std 0.02).",
        )
    return (
        "Units with the same weights compute the same, get the same gradient and stay the same: the layer is as wide as one.",
        "Initialise with kaiming_normal_ or xavier_normal_; constants are for biases and normalisations.",
    )


def _unnormalized(finding: Finding, history: History) -> tuple[str, str]:
    return (
        "Inputs of this size drive the first layers far out of the range that their initialisation is made for.",
        "Subtract the mean and divide by the standard deviation of the training data, or begin the model with a normalisation.",
    )


def _activations(history: History) -> Counter[str]:
    return Counter(fact.activation for fact in history.meta.layers if fact.activation)


def _typical_gain(finding: Finding, history: History) -> float | None:
    """Median over the sick matrices of what their weights do to the scale of their input."""
    weights = history.baselines.weight_norm
    at = {name: i for i, name in enumerate(history.parameters)}
    gains = [
        float(weights[i]) / (fact.shape[0] ** 0.5)
        for i in (at[name] for name in finding.parameters)
        if len((fact := history.meta.parameters[i]).shape) >= 2 and np.isfinite(weights[i])
    ]
    return float(np.median(gains)) if gains else None


def _dropped(ratio: float) -> str:
    return f"drops there to {_times(ratio)}" if ratio else "is exactly zero there"


def _power(value: float) -> str:
    """ "4.1e-9"."""
    if not value:
        return "exactly zero"
    return f"{value:.1e}".replace("e+00", "").replace("e-0", "e-").replace("e+0", "e")


def _times(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio >= 1e-3 else f"{ratio:.0e}"


_WORDS: dict[str, Callable[[Finding, History], tuple[str, str]]] = {
    "double_softmax": _squashed,
    "poor_init": _poor_init,
    "unnormalized_input": _unnormalized,
    "zero_gradient": _zero,
    "frozen_weights": _frozen,
    "update_ratio_too_large": _too_large,
    "update_ratio_too_small": _too_small,
    "loss_diverging": _loss_diverges,
    "loss_spike": _loss_spikes,
    "loss_plateau": _loss_stays,
    "non_finite_input": _input,
    "non_finite_activation": _activation,
    "dead_units": _dead,
    "saturated_activation": _saturated,
    "vanishing_gradient": _vanishing,
    "exploding_gradient": _exploding,
    "gradient_spike": _spike,
    "gradients_not_zeroed": _not_zeroed,
    "never_stepped": _never_stepped,
    "missing_gradient": _missing,
    "not_in_optimizer": _not_in_optimizer,
    "loss_scale_collapse": _scale,
    "non_finite_weight": _weight,
    "non_finite_loss": _loss,
    "non_finite_gradient": _gradient,
}
