"""What the autograd graph proves: what is reached, in which order, how far, what lies outside, and what it cannot show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradwatch.capture.graph import GraphFacts, find_unregistered, switched_on, walk
from gradwatch.capture.parameters import ParameterTable


def walked(model: nn.Module, *roots: Any, **options: Any) -> tuple[GraphFacts, dict[str, int]]:
    """The facts, and the slot of each parameter by name."""
    table = ParameterTable({"": model})
    return walk(roots, table.slot_of, **options), {table.names[slot]: slot for slot in table.column_slots}


def by_order(facts: GraphFacts, slots: dict[str, int]) -> list[str]:
    """Names of the parameters that were met, by ascending order."""
    names = {slot: name for name, slot in slots.items()}
    return [names[slot] for slot in sorted(facts.order, key=lambda slot: facts.order[slot])]


def deep(layers: int = 5) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(layers)))


class Backwards(nn.Module):
    """Runs its layers against the order in which they are registered."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = (nn.Linear(3, 3, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """From `first` to `last`."""
        return self.last(self.middle(self.first(x)).relu())  # type: ignore[no-any-return]


# -- order and distance ------------------------------------------------------------------------------------------------------------


def test_the_order_is_that_of_execution_not_of_registration() -> None:
    model = Backwards()
    facts, slots = walked(model, model(torch.ones(2, 3)).sum())
    assert by_order(facts, slots) == ["first.weight", "middle.weight", "last.weight"]
    assert not facts.opaque
    assert facts.outside == []


def test_a_parameter_used_several_times_stands_where_it_was_used_first() -> None:
    model = deep(2)
    x = model[1](torch.ones(1, 3))
    facts, slots = walked(model, model[1](model[0](x)).sum())
    assert by_order(facts, slots) == ["1.weight", "0.weight"]
    assert facts.distance[slots["1.weight"]] < facts.distance[slots["0.weight"]], "its nearest use is the last one"


def test_weight_and_bias_of_a_layer_stand_together() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    facts, slots = walked(model, model(torch.ones(2, 3)).sum())
    assert set(by_order(facts, slots)[:2]) == {"0.weight", "0.bias"}


def test_distance_is_the_least_number_of_edges_and_grows_towards_the_input() -> None:
    model = deep(5)
    facts, slots = walked(model, model(torch.ones(2, 3)).sum())
    distances = [facts.distance[slots[f"{i}.weight"]] for i in range(5)]
    assert distances == sorted(distances, reverse=True)
    assert len(set(distances)) == 5
    # SumBackward0, MmBackward0, TBackward0, AccumulateGrad.
    assert distances[-1] == 3


def test_a_shortcut_shortens_the_distance() -> None:
    model = deep(3)
    x = model[0](torch.ones(1, 3))
    long, slots = walked(model, model[2](model[1](x)).sum())
    short, _ = walked(model, (model[2](model[1](x)) + x).sum())
    assert short.distance[slots["0.weight"]] < long.distance[slots["0.weight"]]


def test_a_root_that_is_a_parameter_or_a_constant_has_no_graph() -> None:
    model = deep(1)
    facts, _ = walked(model, model[0].weight, torch.ones(1))
    assert (facts.order, facts.distance, facts.outside, facts.opaque) == ({}, {}, [], False)
    assert walked(model)[0].order == {}


def test_several_roots_are_walked_together() -> None:
    model = deep(3)
    x = torch.ones(1, 3)
    facts, slots = walked(model, model[0](x).sum(), model[2](x).sum())
    assert by_order(facts, slots) == ["0.weight", "2.weight"]


@pytest.mark.parametrize("part", [0, 1])
def test_a_root_may_be_an_edge_of_the_graph(part: int) -> None:
    model = deep(2)
    edge = torch.autograd.graph.get_gradient_edge(model[: part + 1](torch.ones(1, 3)).sum())
    facts, slots = walked(model, edge)
    assert by_order(facts, slots) == ["0.weight", "1.weight"][: part + 1]


@pytest.mark.parametrize(
    ("bound", "clamped"),
    [
        pytest.param(lambda x: x.clamp(-1, 1), {"1.weight", "1.bias"}, id="clamp"),
        pytest.param(lambda x: x.clamp_min(0.0), {"1.weight", "1.bias"}, id="from below"),
        pytest.param(lambda x: torch.clamp(x, max=torch.ones(())), {"1.weight", "1.bias"}, id="a limit that is a tensor"),
        pytest.param(F.hardtanh, {"1.weight", "1.bias"}, id="hardtanh"),
        pytest.param(lambda x: x.clamp(-1, 1) + x, set(), id="and beside it"),
        pytest.param(torch.sigmoid, set(), id="sigmoid"),
    ],
)
def test_what_only_a_clamp_leads_to_is_told(bound: Callable[[Tensor], Tensor], clamped: set[str]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    h = model[0](torch.randn(3, 2))
    facts, slots = walked(model, (model[2](h) + bound(model[1](h))).sum())
    assert {name for name, slot in slots.items() if slot in facts.clamped} == clamped
    behind, slots = walked(model, bound(model(torch.randn(3, 2))).sum())
    assert {name for name, slot in slots.items() if slot in behind.clamped} == (set(slots) if clamped else set())


@pytest.mark.parametrize(
    ("make", "on"),
    [
        pytest.param(lambda y, h: y.sum(), True, id="as it is"),
        pytest.param(lambda y, h: 0.0 * y.sum(), False, id="times zero"),
        pytest.param(lambda y, h: y.sum() * torch.zeros(()), False, id="times a zero"),
        pytest.param(lambda y, h: (torch.zeros(3, 2) * y).sum(), False, id="times a mask of zeros"),
        pytest.param(lambda y, h: (torch.tensor([0.0, 1.0]) * y).sum(), True, id="times a mask with a one"),
        pytest.param(lambda y, h: (0.0 * h * y).sum(), True, id="times what depends on a parameter, whatever it is now"),
        pytest.param(lambda y, h: y[:0].sum(), False, id="of no elements"),
        pytest.param(lambda y, h: 0.0 * y.sum() + y.mean(), True, id="another way"),
        pytest.param(lambda y, h: torch.round(y).sum(), True, id="rounded"),
        pytest.param(lambda y, h: (h * y.softmax(1)).sum(), True, id="attention over two"),
        pytest.param(lambda y, h: (h * y[:, :1].softmax(-1)).sum(), False, id="over one"),
        pytest.param(lambda y, h: (h * y.topk(1).values.softmax(-1)).sum(), True, id="over the one that was chosen"),
    ],
)
def test_what_is_switched_off_by_zeros_is_told(make: Callable[[Tensor, Tensor], Tensor], on: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    table = ParameterTable({"": model})
    h = model[0](torch.randn(3, 2))
    slots = switched_on([h.sum() + make(model[1](h), h)], table.slot_of)
    assert {table.names[slot] for slot in slots} == {"0.weight", "0.bias"} | ({"1.weight", "1.bias"} if on else set())


def test_what_no_path_reaches_is_not_met() -> None:
    model = deep(4)
    x = model[0](torch.ones(1, 3)).detach()
    with torch.no_grad():
        x = model[1](x)
    facts, slots = walked(model, model[3](x).sum())
    assert by_order(facts, slots) == ["3.weight"]


def test_a_frozen_parameter_is_not_met() -> None:
    model = deep(3)
    model[1].requires_grad_(False)
    facts, slots = walked(model, model(torch.ones(1, 3)).sum())
    assert by_order(facts, slots) == ["0.weight", "2.weight"]


# -- leaves that are not watched ---------------------------------------------------------------------------------------------------


def test_parameters_outside_are_told_once_each() -> None:
    model, outside = deep(2), nn.Linear(3, 3)
    facts, _ = walked(model, outside(outside(model(torch.ones(1, 3)))).sum())
    assert {id(leaf) for leaf in facts.outside} == {id(p) for p in outside.parameters()}
    assert len(facts.outside) == 2


def test_tensors_that_are_no_parameters_are_nobodys_loss() -> None:
    """An input that requires a gradient (a penalty, an adversarial example, a latent) is no forgotten layer."""
    model = deep(1)
    x = torch.ones(1, 3, requires_grad=True)
    assert walked(model, model(x).sum())[0].outside == []


def test_parameters_behind_a_detach_are_not_outside() -> None:
    model, outside = deep(1), nn.Linear(3, 3)
    assert walked(model, model(outside(torch.ones(1, 3)).detach()).sum())[0].outside == []


# -- what a graph hides ------------------------------------------------------------------------------------------------------------


class Twice(torch.autograd.Function):
    """A user's own function. What it computes inside, and for what, is hidden."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Double."""
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        """Twice."""
        return grad * 2


def plain(model: nn.Sequential, x: Tensor) -> Tensor:
    return model(x)  # type: ignore[no-any-return]


def not_reentrant(model: nn.Sequential, x: Tensor) -> Tensor:
    return model[2](checkpoint(model[1], model[0](x), use_reentrant=False))  # type: ignore[no-any-return]


def reentrant(model: nn.Sequential, x: Tensor) -> Tensor:
    return model[2](checkpoint(model[1], model[0](x), use_reentrant=True))  # type: ignore[no-any-return]


def compiled(model: nn.Sequential, x: Tensor) -> Tensor:
    return model[2](torch.compile(model[1], backend="aot_eager")(model[0](x)))  # type: ignore[no-any-return]


def custom(model: nn.Sequential, x: Tensor) -> Tensor:
    return model[2](Twice.apply(model[1](model[0](x))))  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize(
    ("run", "opaque"),
    [
        pytest.param(plain, False, id="plain"),
        pytest.param(not_reentrant, False, id="checkpoint-not-reentrant"),
        pytest.param(reentrant, True, id="checkpoint-reentrant"),
        pytest.param(compiled, True, id="compiled-region", marks=pytest.mark.filterwarnings("ignore:The .grad attribute")),
        pytest.param(custom, True, id="custom-function"),
    ],
)
def test_what_hides_something_is_told(run: Callable[[nn.Sequential, Tensor], Tensor], opaque: bool) -> None:
    model = deep(3)
    facts, slots = walked(model, run(model, torch.ones(2, 3)).sum())
    assert facts.opaque is opaque
    assert {slots["0.weight"], slots["2.weight"]} <= facts.order.keys(), "what stands before and behind it is seen all the same"


def test_a_walk_that_is_cut_short_proves_nothing() -> None:
    model = deep(30)
    loss = model(torch.ones(2, 3)).sum()
    facts, _ = walked(model, loss, limit=20)
    assert facts.opaque
    assert 0 < len(facts.order) < 30
    assert not walked(model, loss, limit=10_000)[0].opaque


def test_a_deep_graph_needs_no_deep_stack() -> None:
    model = deep(1)
    x = torch.ones(1, 3)
    for _ in range(3000):
        x = model(x)
    facts, _ = walked(model, x.sum())
    assert len(facts.order) == 1


def test_a_walk_leaves_the_graph_usable() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.LSTM(8, 4))
    loss = F.mse_loss(model(torch.ones(5, 3))[0], torch.zeros(5, 4))
    walked(model, loss)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# -- where an unregistered leaf lives ----------------------------------------------------------------------------------------------


class Forgetful(nn.Module):
    """Keeps layers where no optimizer finds them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [nn.Linear(2, 2), nn.Linear(2, 2)]
        self.heads = {"a": (nn.Linear(2, 2),)}
        self.hidden = [[[nn.Parameter(torch.ones(1))]]]
        self.inner = nn.Sequential(nn.Linear(2, 2))
        self.inner.extra = [nn.Parameter(torch.ones(1))]
        self.me = [self]


def found(model: nn.Module, *leaves: Tensor) -> list[str | None]:
    """Where each leaf was found."""
    paths = find_unregistered(dict(model.named_modules()), leaves)
    return [paths.get(id(leaf)) for leaf in leaves]


def test_leaves_in_lists_and_dicts_are_found_by_path() -> None:
    model = Forgetful()
    assert found(model, model.blocks[1].weight, model.blocks[0].bias) == ["blocks[1].weight", "blocks[0].bias"]
    assert found(model, model.heads["a"][0].weight) == ["heads['a'][0].weight"]
    assert found(model, model.inner.extra[0]) == ["inner.extra[0]"]  # type: ignore[index]
    assert found(model, model.hidden[0][0][0]) == ["hidden[0][0][0]"]


def test_leaves_of_somebody_else_are_not_found() -> None:
    model = Forgetful()
    assert found(model, nn.Parameter(torch.ones(1)), torch.ones(1)) == [None, None]
    assert find_unregistered(dict(model.named_modules()), []) == {}


def test_a_model_that_holds_itself_is_looked_through_once() -> None:
    model = Forgetful()
    model.loop = {"again": model.me, "more": [model.me, model.me]}
    assert found(model, model.blocks[0].weight) == ["blocks[0].weight"]


def test_attributes_that_raise_when_they_are_read_are_not_read() -> None:
    class Lazy(nn.Linear):
        @property
        def trap(self) -> Tensor:
            raise RuntimeError("do not touch")

    model = nn.Sequential(Lazy(2, 2))
    assert found(model, nn.Parameter(torch.ones(1))) == [None]
