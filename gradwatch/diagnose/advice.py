"""Cause and remedy in words, with what was measured: short, plain, one sentence each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from gradwatch.history import History
from gradwatch.records import Finding


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
    graph = set(finding.parameters) & set(history.meta.unreached)
    why = "No path of the graph leads from the loss to them" if graph else "No backward pass reaches them"
    return (
        f"{why}: their output is unused, detached (detach(), no_grad(), .data, .item(), numpy), or never computed.",
        "Use the module's output in the loss without detaching it, or freeze it (requires_grad_(False)).",
    )


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


def _weight(finding: Finding, history: History) -> tuple[str, str]:
    return (
        "A step or an assignment wrote NaN or Inf into the weights; every output computed from them is lost.",
        "Go back to a checkpoint from before that update; check the step size and what else writes to the weights.",
    )


def _loss(finding: Finding, history: History) -> tuple[str, str]:
    return (
        "A log, sqrt, division or exp in the model or the loss left its domain, or the batch held a NaN.",
        "Check the batch, then guard the operation (eps inside log and sqrt, a clamp before exp); lower the learning rate.",
    )


def _gradient(finding: Finding, history: History) -> tuple[str, str]:
    return (
        "The loss is finite but a derivative is not: sqrt, norm or pow at 0, a masked division, or an overflow.",
        "Add an eps inside the root or the norm, and select safe inputs before the operation, not its output after it.",
    )


def _types(history: History, kind: str) -> Counter[str]:
    return Counter(fact.activation or fact.type for fact in history.meta.layers if fact.kind == kind)


_WORDS: dict[str, Callable[[Finding, History], tuple[str, str]]] = {
    "gradients_not_zeroed": _not_zeroed,
    "never_stepped": _never_stepped,
    "missing_gradient": _missing,
    "not_in_optimizer": _not_in_optimizer,
    "loss_scale_collapse": _scale,
    "non_finite_weight": _weight,
    "non_finite_loss": _loss,
    "non_finite_gradient": _gradient,
}
