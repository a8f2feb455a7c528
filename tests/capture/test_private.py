"""Each private name of torch has a fallback: without it the numbers are the same, and a notice says what is missing."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv
from torch.optim import SGD

import gradwatch
from gradwatch import GradWatch
from gradwatch.capture import private
from gradwatch.records import STATISTICS

PRIVATE: dict[str, tuple[Any, str]] = {
    "_current_graph_task_id": (torch._C, "_current_graph_task_id"),
    "_foreach_norm": (torch, "_foreach_norm"),
    "_foreach_copy_": (torch, "_foreach_copy_"),
    "unpack_hook": (torch._C._autograd.SavedTensor, "unpack_hook"),
}
"""Names that a test can take away; the graph's nodes are types of C, so `_sequence_nr` is taken away by standing in for a node."""


def test_this_torch_has_all_of_them() -> None:
    assert private.self_test() == []


# -- one by one --------------------------------------------------------------------------------------------------------------------


def seen_inside_a_backward() -> list[bool]:
    seen: list[bool] = []
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(private.in_backward()))
    y.sum().backward()
    return seen


def test_a_backward_that_is_running_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not private.in_backward()
    assert seen_inside_a_backward() == [True]
    assert not private.in_backward()
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    assert seen_inside_a_backward() == [False]


def test_nodes_are_numbered_in_the_order_of_the_forward_pass() -> None:
    x = torch.ones(3, requires_grad=True)
    first = x * 2
    second = first + 1
    third = (second * first).sum()
    numbers = [private.sequence_number(t.grad_fn) for t in (first, second, third)]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == 3
    assert numbers[0] >= 0


def test_a_node_without_a_number_has_minus_one() -> None:
    x = torch.ones(3, requires_grad=True)
    (accumulate, _), *_ = (x * 2).grad_fn.next_functions  # type: ignore[union-attr]
    assert private.sequence_number(accumulate) == -1
    assert private.sequence_number(object()) == -1


def test_the_scale_of_a_scaler_is_known_after_its_first_use() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert private.scale_of(scaler) is None
    scaler.scale(torch.ones(()))
    scale = private.scale_of(scaler)
    assert scale is not None
    assert float(scale) == 1024.0
    assert private.scale_of(object()) is None
    assert private.scale_of(torch.amp.GradScaler("cpu", enabled=False)) is None


@pytest.mark.parametrize("without", [None, "_foreach_norm"], ids=["with", "without"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_norms_of_many_tensors(dtype: torch.dtype, without: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.full((size,), 3.0, dtype=dtype) for size in (1, 4, 10_000)]
    if without:
        monkeypatch.delattr(torch, without)
    norms = private.foreach_norm(tensors)
    assert [norm.shape for norm in norms] == [()] * 3
    assert {norm.dtype for norm in norms} == {torch.float64 if dtype is torch.float64 else torch.float32}
    np.testing.assert_allclose([float(norm) for norm in norms], [3.0, 6.0, 300.0], rtol=1e-4)


@pytest.mark.parametrize("without", [None, "_foreach_copy_"], ids=["with", "without"])
def test_many_tensors_are_copied(without: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if without:
        monkeypatch.delattr(torch, without)
    targets = [torch.zeros(3), torch.zeros(2, 2)]
    private.foreach_copy(targets, [torch.ones(3, dtype=torch.float64), torch.full((2, 2), 2.0, dtype=torch.bfloat16)])
    assert targets[0].tolist() == [1.0] * 3
    assert targets[1].tolist() == [[2.0] * 2] * 2


class Nested(SGD):
    """Counts the steps that are running, from inside, as deep as told."""

    deep = 0
    counted: int | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step, or count."""
        if self.deep:
            self.deep -= 1
            self.step()
        else:
            self.counted = private.running_steps()
        return None


@pytest.mark.parametrize("deep", [0, 1, 3])
def test_steps_that_are_running_are_counted(deep: int) -> None:
    assert private.running_steps() == 0
    optimizer = Nested(nn.Linear(1, 1).parameters(), lr=0.1)
    optimizer.deep = deep
    optimizer.step()
    assert optimizer.counted == deep + 1
    assert private.running_steps() == 0


def nodes() -> dict[str, Any]:
    x, y = torch.ones(4, 2, requires_grad=True) * 2, torch.zeros(4, 2)
    return {
        "mse": F.mse_loss(x, y).grad_fn,
        "smooth": F.smooth_l1_loss(x, y, beta=0.25).grad_fn,
        "power": (x**3).grad_fn,
        "infinite": (x**math.inf).grad_fn,
        "nan": (x**math.nan).grad_fn,
        "tensor-power": (x ** torch.tensor(2.0)).grad_fn,
        "split": x.split([1, 1], -1)[0].grad_fn,
        "uneven": torch.ones(4, 5, requires_grad=True).split([3, 2], -1)[1].grad_fn,
        "none": object(),
    }


@pytest.mark.parametrize(
    ("node", "name", "number"),
    [
        ("mse", "reduction", 1.0),
        ("smooth", "beta", 0.25),
        ("power", "exponent", 3.0),
        ("infinite", "exponent", math.inf),
        ("nan", "exponent", math.nan),
        ("tensor-power", "exponent", None),
        ("mse", "self", None),
        ("mse", "beta", None),
        ("none", "reduction", None),
    ],
)
def test_a_number_that_a_node_keeps(node: str, name: str, number: float | None) -> None:
    got = private.saved_number(nodes()[node], name)
    assert got == number or (got is not None and number is not None and math.isnan(got) and math.isnan(number))


def test_a_tensor_that_a_node_keeps_until_it_is_freed() -> None:
    x, y = torch.ones(4, requires_grad=True) * 2, torch.arange(4.0)
    loss = F.mse_loss(x, y)
    saved = private.saved_tensor(loss.grad_fn, "target")
    assert saved is not None
    assert saved.data_ptr() == y.data_ptr()
    assert private.saved_tensor(loss.grad_fn, "reduction") is None
    assert private.saved_tensor(loss.grad_fn, "weight") is None
    assert private.saved_tensor(object(), "target") is None
    loss.backward()
    assert private.saved_tensor(loss.grad_fn, "target") is None


def test_a_tensor_that_was_changed_in_place_is_not_read() -> None:
    y = torch.zeros(4)
    loss = F.mse_loss(torch.ones(4, requires_grad=True) * 2, y)
    y.add_(1)
    assert private.saved_tensor(loss.grad_fn, "target") is None


def test_a_tensor_that_hooks_have_packed_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.autograd.graph.save_on_cpu():
        packed = nodes()["mse"]
    assert private.saved_tensor(packed, "target") is None
    assert private.saved_number(packed, "reduction") == 1.0
    plain = nodes()["mse"]
    assert private.saved_tensor(plain, "target") is not None
    monkeypatch.delattr(torch._C._autograd.SavedTensor, "unpack_hook")
    assert private.saved_tensor(plain, "target") is None, "nobody can say whether it is packed"
    (lacking,) = private.self_test()
    assert "unpack_hook" in lacking


def test_the_shape_of_what_a_node_made() -> None:
    made = nodes()
    assert private.output_shape(made["mse"]) == ()
    assert private.output_shape(made["power"]) == (4, 2)
    assert [private.output_shape(made["uneven"], number) for number in (0, 1)] == [(4, 3), (4, 2)]
    assert private.output_shape(made["uneven"], 2) is None
    assert private.output_shape(made["none"]) is None
    leaf = torch.ones(3, 2, requires_grad=True)
    (accumulate, number), *_ = (leaf * 2).grad_fn.next_functions  # type: ignore[union-attr]
    assert private.output_shape(accumulate, number) == (3, 2)


# -- a torch that lacks one --------------------------------------------------------------------------------------------------------


def watched() -> tuple[GradWatch, list[np.ndarray]]:
    """A short training with small, large and sparse parameters, watched."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Flatten(), nn.Linear(16, 600), nn.Tanh(), nn.Linear(600, 1))
    optimizer = SGD(model.parameters(), lr=0.1, foreach=False)  # the watch is on trial here, not the optimizer
    with GradWatch(model, console=False, rules=(), clip=0.5) as watch:
        for i in range(5):
            optimizer.zero_grad()
            model(torch.tensor([[i, 3], [4, i]])).square().mean().backward()
            optimizer.step()
    return watch, [p.detach().numpy().copy() for p in model.parameters()]


@pytest.mark.parametrize(("owner", "name"), PRIVATE.values(), ids=PRIVATE)
def test_without_one_the_numbers_are_the_same_and_a_notice_says_so(
    owner: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, weights = watched()
    assert whole.notices == ()
    monkeypatch.delattr(owner, name)
    lacking, again = watched()
    (notice,) = lacking.notices
    assert name in notice
    assert torch.__version__ in notice
    for statistic in STATISTICS:
        if statistic != "time":
            np.testing.assert_allclose(
                lacking.history.stat(statistic).astype(float),
                whole.history.stat(statistic).astype(float),
                rtol=1e-5,
                err_msg=statistic,
            )
    for one, other in zip(weights, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_without_sequence_numbers_the_order_is_unknown_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "sequence_number", lambda node: -1)
    watch, _ = watched()
    (notice,) = watch.notices
    assert "_sequence_nr" in notice
    assert all(fact.order is None for fact in watch.history.meta.parameters)
    assert watch.history.meta.unreached == (), "what has no order is not unreached"
    assert watch.history.recorded == 5


def test_a_scaler_without_the_private_scale_is_heard_without_failing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    monkeypatch.setattr(private, "scale_of", lambda scaler: None)
    with GradWatch(model, console=False) as watch:
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(1, 2)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    assert watch.history.recorded == 2


# -- the rule of the house ---------------------------------------------------------------------------------------------------------


def names_of_torch() -> set[str]:
    """Names with one leading underscore that torch's objects have."""
    things: list[Any] = [
        torch,
        torch._C,
        torch.Tensor,
        nn.Module(),
        SGD([torch.zeros(1)], lr=0.1),
        torch.amp.GradScaler,
        conv,
        batchnorm,
    ]
    return {name for thing in things for name in dir(thing) if name.startswith("_") and not name.startswith("__")}


def private_uses(source: str, of_torch: set[str]) -> list[str]:
    """Attributes that carry a private name of torch, of anything but `self`."""
    return sorted(
        {
            node.attr
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute)
            and node.attr in of_torch
            and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        }
    )


def test_the_check_for_private_names_can_fail() -> None:
    of_torch = names_of_torch()
    assert private_uses("x = torch._foreach_norm(y)", of_torch) == ["_foreach_norm"]
    assert private_uses("x = tensor.grad_fn.name(); self._version = 1; y._mine", of_torch) == []


PACKAGE = Path(gradwatch.__file__).parent


def test_no_private_name_of_torch_stands_anywhere_else() -> None:
    of_torch = names_of_torch()
    found = {
        path.relative_to(PACKAGE).as_posix(): uses
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "private.py" and (uses := private_uses(path.read_text(encoding="utf-8"), of_torch))
    }
    assert found == {}


def test_a_tensor_in_a_fallback_keeps_its_place() -> None:
    """`foreach_copy` writes in place: what holds a view of the buffer must see it."""
    buffer = torch.zeros(4)
    views: list[Tensor] = list(buffer.split(2))
    private.foreach_copy(views, [torch.ones(2), torch.full((2,), 2.0)])
    assert buffer.tolist() == [1, 1, 2, 2]
