"""A run of the zoo without a watch, measured by plain torch: what the proofs of the cases look at."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.case import Case, Setup


@dataclass
class Output:
    """What a module gave in its last call of an update (the first tensor in it).

    Attributes:
        rms: root mean square of its elements, float64.
        nonfinite: elements that are NaN or Inf.
        zeros: share of its elements that are exactly zero.
        low, high: least and largest element.
        fired: `[units]`, some element of the unit was above zero; units are channels of a picture, else the last dimension.
    """

    rms: float
    nonfinite: int
    zeros: float
    low: float
    high: float
    fired: Tensor


@dataclass
class Plain:
    """A run as plain torch sees it, one entry an update in every list (an update: what lies between two ("read", ...) events).

    Attributes:
        case: the run.
        setup: its model, trained.
        losses: sum of the roots of its backward passes.
        grads: parameter -> 2-norms of its gradient when it was read; NaN where it had none.
        nonfinite: parameter -> NaN and Inf elements of that gradient.
        weights: parameter -> 2-norms of the weights before the step.
        steps: parameter -> 2-norms of what the step changed; exactly 0 where every element stayed bit for bit. NaN: nothing stepped.
        outputs: module -> what it gave; None where it was not called in the update.
    """

    case: Case
    setup: Setup
    losses: list[float] = field(default_factory=list)
    grads: dict[str, list[float]] = field(default_factory=dict)
    nonfinite: dict[str, list[int]] = field(default_factory=dict)
    weights: dict[str, list[float]] = field(default_factory=dict)
    steps: dict[str, list[float]] = field(default_factory=dict)
    outputs: dict[str, list[Output | None]] = field(default_factory=dict)

    def update_ratio(self, update: int) -> float:
        """2-norm of what the update changed over that of the weights, all matrices (two dimensions or more) together."""
        names = [name for name, p in named_parameters(self.setup.model).items() if p.ndim >= 2]
        above = sum(self.steps[n][update] ** 2 for n in names if not math.isnan(self.steps[n][update]))
        below = sum(self.weights[n][update] ** 2 for n in names)
        return math.sqrt(above / below) if below else math.nan


def named_parameters(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters, those of a mapping of models behind its keys."""
    return {name: p for key, module in _models(model) for name, p in module.named_parameters(key)}


def named_modules(model: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules, those of a mapping of models behind its keys."""
    return {name: m for key, module in _models(model) for name, m in module.named_modules(prefix=key)}


def measure(case: Case, seed: int) -> Plain:
    """Train the run of a seed without a watch."""
    torch.manual_seed(seed)
    setup = case.build(seed)
    plain = Plain(case, setup)
    parameters, modules = named_parameters(setup.model), named_modules(setup.model)
    now: dict[str, Output] = {}
    handles = [m.register_forward_hook(_Look(name, now)) for name, m in modules.items()]
    before: dict[str, Tensor] = {}

    def close(stepped: bool) -> None:
        for name, p in parameters.items():
            if not stepped:
                plain.steps[name].append(math.nan)
            elif torch.equal(p.detach(), before[name]):
                plain.steps[name].append(0.0)
            else:
                plain.steps[name].append(float((p.detach().double() - before[name].double()).norm()))
        before.clear()

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for kind, what in setup.train():
                if kind == "read":
                    if before:
                        close(stepped=False)
                    plain.losses.append(sum(float(loss.detach()) for loss in what))
                    for name, p in parameters.items():
                        grad = p.grad.coalesce().values() if p.grad is not None and p.grad.is_sparse else p.grad
                        norm = math.nan if grad is None else float(grad.detach().double().norm())
                        plain.grads.setdefault(name, []).append(norm)
                        bad = 0 if grad is None else int((~torch.isfinite(grad)).sum())
                        plain.nonfinite.setdefault(name, []).append(bad)
                        plain.weights.setdefault(name, []).append(float(p.detach().double().norm()))
                        plain.steps.setdefault(name, [])
                        before[name] = p.detach().clone()
                    for name in modules:
                        plain.outputs.setdefault(name, []).append(now.get(name))
                    now.clear()
                elif kind == "step" and before:
                    close(stepped=bool(what))
        if before:
            close(stepped=False)
    finally:
        for handle in handles:
            handle.remove()
    return plain


class _Look:
    def __init__(self, name: str, now: dict[str, Output]) -> None:
        self._name, self._now = name, now

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        tensor = _first_tensor(output)
        if tensor is None or not tensor.is_floating_point() or not tensor.numel() or not module.training:
            return
        t = tensor.detach().double()
        units = t.transpose(1, -1) if t.ndim == 4 else t
        fired = (units > 0).reshape(-1, units.shape[-1]).any(0) if units.ndim else units > 0
        finite = torch.isfinite(t)
        self._now[self._name] = Output(
            float(t.square().mean().sqrt()),
            int((~finite).sum()),
            float((t == 0).double().mean()),
            float(t.min()),
            float(t.max()),
            fired,
        )


def _models(model: nn.Module | Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    return [("", model)] if isinstance(model, nn.Module) else list(model.items())


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((t for item in items if (t := _first_tensor(item)) is not None), None)
