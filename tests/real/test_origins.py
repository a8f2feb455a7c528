"""In every architecture of `transformers`: a NaN born in the middle of it is traced to the module, the operator and the line."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradwatch import GradWatch
from tests.real.architectures import ARCHITECTURES

AT = 2
"""The update from which it is born, unless the layer is dropped in it."""


SWALLOWED = dict.fromkeys(("bart", "patchtst"), "aten::scaled_dot_product_flash_attention_for_cpu")
"""Where it is born in the keys of an attention whose kernel makes finite values of NaN (torch 2.13, measured)."""


class Switch:
    """Is on in one update."""

    on = False


def forward_bug(y: Tensor) -> Tensor:
    return y + torch.log(y * 0 - 1) if Switch.on else y  # guilty


def backward_bug(y: Tensor) -> Tensor:
    return y + torch.sqrt(y * 0) if Switch.on else y  # guilty


def line_of(bug: Callable[[Tensor], Tensor]) -> str:
    lines, first = inspect.getsourcelines(bug)
    return f"test_origins.py:{next(first + i for i, line in enumerate(lines) if '# guilty' in line)}"


def middle_of(name: str) -> str:
    """The linear layer in the middle of those that are called and whose weights get a gradient."""
    training = ARCHITECTURES[name].training()
    model, called = training.modules()[""], set()
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda *args, name=name: called.add(name))
    training.update(0)
    weights = {name: model.get_submodule(name).weight for name in called}
    names = [name for name, _ in model.named_modules() if name in called and bool(weights[name].grad.any())]  # type: ignore[union-attr, operator]
    return names[len(names) // 2]


@pytest.mark.parametrize(("bug", "op", "phase"), [(forward_bug, "aten::log", "forward"), (backward_bug, "aten::sqrt", "backward")])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_nan_in_the_middle_is_traced(name: str, bug: Callable[[Tensor], Tensor], op: str, phase: str) -> None:
    middle = middle_of(name)

    def plant(model: nn.Module) -> None:
        layer = model.get_submodule(middle)
        inner = layer.forward
        layer.forward = lambda *args: bug(inner(*args))  # type: ignore[method-assign]

    def before(model: nn.Module, i: int) -> None:
        Switch.on = i >= AT

    training = ARCHITECTURES[name].training(plant=plant, before=before)
    try:
        with GradWatch(training.model, console=False, on_nonfinite="skip") as watch:
            for i in range(AT + 5):
                training.update(i)
    finally:
        Switch.on = False
    assert watch.notices == ()
    alerts = [alert for alert in watch.alerts if alert.rule.startswith("non_finite")]
    assert len(alerts) == 1, [(alert.rule, alert.cause) for alert in watch.alerts]
    origin = alerts[0].origin
    assert origin is not None, alerts[0]
    assert alerts[0].step >= AT
    if name in SWALLOWED and phase == "forward":  # by the design, what reaches no output is told as the derivative that it spoils
        assert (origin.op, origin.phase) == (SWALLOWED[name], "backward")
        assert f"for it is given NaN that comes from {op} at {line_of(bug)}" in alerts[0].cause
        return
    assert (origin.module, origin.op, origin.phase, origin.source) == (middle, op, phase, line_of(bug)), alerts[0].cause
