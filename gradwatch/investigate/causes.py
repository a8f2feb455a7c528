"""Causes that only a look into the forward pass tells: what cut a gradient's way, and the line of a softmax that is one too many."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from gradwatch.capture.call import Call, Case
from gradwatch.investigate import mend
from gradwatch.investigate.again import NotReplayable
from gradwatch.investigate.cuts import Cut, Way, follow
from gradwatch.investigate.frames import USER, kind_of
from gradwatch.records import Alert, Inquiry

EXPLAINED = frozenset({"missing_gradient", "double_softmax"})
"""Rules whose cause is looked for in the forward pass."""


def explain(alert: Alert, case: Case) -> Inquiry | None:
    """What the forward pass tells of an alert; None: nothing that was not known.

    Raises:
        Exception: whatever the forward pass raises this time.
    """
    if alert.rule == "missing_gradient":
        return _missing(alert, case)
    return _squashed(alert, case) if alert.rule == "double_softmax" else None


def _missing(alert: Alert, case: Case) -> Inquiry | None:
    """Layer by layer, for each may have been cut by something else; the first ones, where they are many."""
    if alert.evidence.get("uncalled", 0.0) == alert.evidence.get("parameters", -1.0):
        return None  # there is no way that could be cut
    whole = _missing_of(case, {key for key, (name, _) in case.parameters.items() if name in alert.parameters})
    if whole is None or len(alert.layers) < 2:
        return whole
    found: dict[str, tuple[list[str], Inquiry]] = {}
    for layer in alert.layers[:LAYERS]:
        prefix = f"{layer}." if layer else ""
        ids = {key for key, (name, _) in case.parameters.items() if name in alert.parameters and name.startswith(prefix)}
        one = _missing_of(case, ids) if ids else None
        if one is not None:
            found.setdefault(one.cause, ([], one))[0].append(layer)
    if len(found) < 2:
        return whole
    causes = " ".join(f"{', '.join(layers)}: {one.cause}" for layers, one in found.values())
    heads = dict.fromkeys(one.remedy.partition("\n")[0] for _, one in found.values())
    shown = "".join(f"\n{one.remedy.partition(chr(10))[2]}" for _, one in found.values() if "\n" in one.remedy)
    return Inquiry(case.step, None, causes, " ".join(heads) + shown)


LAYERS = 4
"""Layers of one alert for which the forward pass is run again."""


def _missing_of(case: Case, ids: set[int]) -> Inquiry | None:
    ways = _ways(case, ids)
    if not ways:
        return None
    way = next((way for way in ways if way.cut is not None), None) or ways[0]
    if way.cut is not None:
        cause, remedy = _of_cut(way.cut)
        return _answer(case, cause, remedy, way.cut)
    if any(way.outputs for way in ways):
        outputs = next(way.outputs for way in ways if way.outputs)
        named = [f"`output{name}`" for name in outputs if name][:3]
        if named:
            what = f"The outputs {', '.join(named)} depend" if len(named) > 1 else f"The output {named[0]} depends"
            cause = f"{what} on them and the loss does not, or it is detached on the way, outside the model."
            return Inquiry(case.step, None, cause, f"Use {' and '.join(named)} in the loss, or freeze what only serves it.")
        cause = "What the model puts out depends on them and passes a gradient back; the way to the loss is cut outside the model."
        return Inquiry(
            case.step, None, cause, "Look in the loop for detach(), .data, item() or no_grad() between the model and the loss."
        )
    if way.depends:
        cause = "What the model puts out depends on them, but no gradient comes back: what cuts the way was not found."
        look = "a new leaf (nn.Parameter(z), torch.tensor(z)), a value that leaves torch (item(), numpy()), or a choice by one (if)"
        return Inquiry(case.step, None, cause, f"Look between them and the output for {look}.")
    if way.used:
        cause = "They are used in the forward pass, but what the model puts out is the same with other weights."
        return Inquiry(case.step, None, cause, "Use the result in what forward() returns, or freeze them (requires_grad_(False)).")
    return None


def _of_cut(cut: Cut) -> tuple[str, str]:
    at = f" at {cut.source}" if cut.source else ""
    freeze = "or freeze what lies behind it (requires_grad_(False)) if that is meant"
    if cut.kind in ("detach", ".data"):
        return f"{cut.name}{at} cuts the way from the loss to them.", f"Take {cut.name} out, {freeze}."
    if cut.kind == "no_grad":
        return f"They are used under {cut.name}{at}, which keeps no way back.", f"Run it outside of torch.{cut.name}, {freeze}."
    if cut.kind == "custom":
        return (
            f"The way to them leads through the custom function {cut.name}, whose backward gives nothing back for it.",
            f"Return a gradient for each tensor from {cut.name}.backward.",
        )
    if cut.kind == "python":
        return (
            f"{cut.name}{at} takes the value out of torch, and with it the way back.",
            "Stay with tensors: no item(), numpy() or tolist().",
        )
    if cut.kind == "sample":
        return (
            f"sample(){at} draws without a way back.",
            f"Use rsample() where the distribution has it, or a loss of log_prob (REINFORCE), {freeze}.",
        )
    if cut.kind == "write":
        return (
            f"{cut.name}{at} writes to memory past the graph (.data, detach()), so that no way leads back from there.",
            f"Compute a new tensor in its place (torch.where, torch.cat, an addition), {freeze}.",
        )
    if cut.kind == "indices":
        return (
            f"The integers that {cut.name} gives{at} have no derivative; its other values have.",
            "Use the values as well: weight what is chosen by them, or use a straight-through estimator.",
        )
    if cut.kind == "integer":
        return (
            f"{cut.name}{at} has no derivative: what it gives is no floating number.",
            "Use something with a derivative in its place: softmax for argmax, sigmoid for a comparison, or a straight-through estimator.",
        )
    if cut.name == "grad":
        return f"torch.autograd.grad{at} keeps no graph of what it gives.", "Give it create_graph=True."
    return f"{cut.name}{at} passes no gradient back.", "Use an operator with a derivative in its place."


def _squashed(alert: Alert, case: Case) -> Inquiry | None:
    name = next((name for name in ("softmax", "sigmoid") if f"to the {name}" in alert.message), "")
    for way in _ways(case, ()):
        cut = way.squashed.get(name)
        if cut is not None and cut.source and (not alert.layers or case.modules.get(cut.place.module, "") == alert.layers[0]):
            return _answer(case, f"{alert.cause.rstrip('.')}; the {name} is applied at {cut.source}.", alert.remedy, cut, (name,))
    return None


def _answer(case: Case, cause: str, remedy: str, cut: Cut, names: tuple[str, ...] = ()) -> Inquiry:
    """With the line of the user's, and what is to be taken out of it: calls of these names, or what cuts."""
    if not cut.place.file or kind_of(cut.place.file) != USER:
        return Inquiry(case.step, None, cause, remedy)
    line = mend.line_of(cut.place.file, cut.place.line, cut.place.code)
    names = {"detach": ("detach", "detach_"), ".data": ("data",)}.get(cut.kind, names)
    diff = mend.removal(cut.place.file, cut.place.line, names, cut.place.code) if names else None
    shown = diff or f"  {line}"
    return Inquiry(case.step, None, cause, f"{remedy}\n{shown}" if shown.strip() else remedy)


def _ways(case: Case, parameters: Collection[int]) -> list[Way]:
    """The ways from parameters through the calls that are held, the last of each model."""
    last: Mapping[int, Call] = {id(call.model): call for call in case.calls}
    ways = []
    for call in last.values():
        own = {id(parameter) for parameter in call.model.parameters()}
        if parameters and not own & set(parameters):
            continue
        try:
            ways.append(follow(call, parameters, case.modules))
        except NotReplayable:
            continue
    return ways
