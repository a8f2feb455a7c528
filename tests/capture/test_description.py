"""The static facts of a model: kinds, scope, initialisation, owners, order and roles."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from gradwatch.capture.criterion import Criterion
from gradwatch.capture.description import InitialFacts, describe, in_scope, kind_of
from gradwatch.capture.parameters import ParameterTable
from gradwatch.facts import SYMMETRY_AFTER, Meta, ParameterFact


class MyRMSNorm(nn.Module):
    """A normalisation that is none of torch's."""


class GELUActivation(nn.Module):
    """An activation as transformers writes them."""


class Attend(nn.Module):
    """Something else."""


KINDS: list[tuple[nn.Module, str]] = [
    (nn.Linear(1, 1), "linear"),
    (nn.LazyLinear(1), "linear"),
    (nn.Bilinear(1, 1, 1), "linear"),
    (nn.Conv1d(1, 1, 1), "convolution"),
    (nn.ConvTranspose2d(1, 1, 1), "convolution"),
    (nn.LazyConv2d(1, 1), "convolution"),
    (nn.BatchNorm2d(1), "normalization"),
    (nn.SyncBatchNorm(1), "normalization"),
    (nn.LayerNorm(1), "normalization"),
    (nn.GroupNorm(1, 1), "normalization"),
    (nn.InstanceNorm1d(1), "normalization"),
    (nn.RMSNorm(1), "normalization"),
    (MyRMSNorm(), "normalization"),
    (nn.LSTM(1, 1), "recurrent"),
    (nn.GRUCell(1, 1), "recurrent"),
    (nn.Embedding(1, 1), "embedding"),
    (nn.EmbeddingBag(1, 1), "embedding"),
    (nn.MultiheadAttention(1, 1), "attention"),
    (nn.Dropout(), "dropout"),
    (nn.AlphaDropout(), "dropout"),
    (nn.ReLU(), "activation"),
    (nn.Sigmoid(), "activation"),
    (nn.PReLU(), "activation"),
    (nn.GELU(), "activation"),
    (nn.LogSoftmax(-1), "activation"),
    (GELUActivation(), "activation"),
    (nn.ModuleList([nn.ReLU()]), "list"),
    (type("Experts", (nn.ModuleDict,), {})(), "list"),
    (nn.Sequential(nn.ReLU()), "container"),
    (nn.TransformerEncoderLayer(2, 1), "container"),
    (nn.Flatten(), "other"),
    (Attend(), "other"),
]


@pytest.mark.parametrize(("module", "kind"), KINDS, ids=[type(module).__name__ for module, _ in KINDS])
def test_a_module_is_of_its_kind(module: nn.Module, kind: str) -> None:
    assert kind_of(module) == kind


@pytest.mark.parametrize(
    ("name", "include", "exclude", "inside"),
    [
        pytest.param("a", (), (), True, id="no-pattern"),
        pytest.param("", (), (), True, id="root"),
        pytest.param("encoder.0", ("encoder.*",), (), True, id="included"),
        pytest.param("decoder.0", ("encoder.*",), (), False, id="not-included"),
        pytest.param("encoder", ("encoder.*",), (), False, id="the-parent-is-not-below-itself"),
        pytest.param("encoder.0.fc", ("encoder.*",), (), True, id="a-star-crosses-dots"),
        pytest.param("a", (), ("a",), False, id="excluded"),
        pytest.param("a", ("a",), ("a",), False, id="exclude-weighs-more"),
        pytest.param("b", ("a", "b"), (), True, id="any-of-several"),
        pytest.param("A", ("a",), (), False, id="case-matters"),
        pytest.param("h.1", ("h.[0-2]",), (), True, id="a-set"),
    ],
)
def test_patterns_decide_the_scope(name: str, include: tuple[str, ...], exclude: tuple[str, ...], inside: bool) -> None:
    assert in_scope(name, include, exclude) is inside


# -- initialisation ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "rms", "equal"),
    [
        pytest.param(torch.tensor([[3.0, 4.0], [3.0, 4.0]]), math.sqrt(12.5), True, id="equal-rows"),
        pytest.param(torch.tensor([[3.0, 4.0], [4.0, 3.0]]), math.sqrt(12.5), False, id="rows-differ"),
        pytest.param(torch.zeros(3, 3), 0.0, True, id="zeros"),
        pytest.param(torch.ones(3), 1.0, False, id="a-vector-has-no-rows"),
        pytest.param(torch.ones(1, 3), 1.0, False, id="one-row-equals-nothing"),
        pytest.param(torch.tensor(2.0), 2.0, False, id="scalar"),
        pytest.param(torch.zeros(0, 3), math.nan, False, id="empty"),
        pytest.param(torch.full((2, 2), 1e30), 1e30, True, id="squares-overflow"),
        pytest.param(torch.full((2, 2), 1e-30), 1e-30, True, id="squares-underflow"),
        pytest.param(torch.full((2, 2), 0.5, dtype=torch.bfloat16), 0.5, True, id="bf16"),
        pytest.param(torch.full((2, 2), 3 + 4j, dtype=torch.complex64), 5 / math.sqrt(2), True, id="complex-as-pairs"),
        pytest.param(nn.UninitializedParameter(), math.nan, False, id="lazy"),
        pytest.param(torch.zeros(2, 2, device="meta"), math.nan, False, id="meta"),
        pytest.param(torch.eye(2).to_sparse(), math.nan, False, id="sparse"),
        pytest.param(torch.full((2, 2), math.nan), math.nan, False, id="nan"),
    ],
)
def test_how_a_parameter_was_initialised(value: torch.Tensor, rms: float, equal: bool) -> None:
    got, rows = InitialFacts().of(0, value)
    assert got == pytest.approx(rms, rel=1e-6, nan_ok=True)
    assert rows is equal


def test_it_is_looked_at_once_when_it_is_first_seen() -> None:
    facts, p = InitialFacts(), nn.Parameter(torch.ones(2, 2))
    assert facts.of(0, p) == (1.0, True)
    p.data[0, 0] = 5.0
    assert facts.of(0, p) == (1.0, True)
    assert facts.of(1, p) != (1.0, True)


def test_a_lazy_parameter_is_looked_at_once_it_has_values() -> None:
    facts, layer = InitialFacts(), nn.LazyLinear(2)
    assert math.isnan(facts.of(0, layer.weight)[0])
    layer(torch.ones(1, 3))
    assert facts.of(0, layer.weight)[0] > 0


def looked(facts: InitialFacts, parameters: list[torch.Tensor], records: int = SYMMETRY_AFTER) -> list[bool]:
    return [facts.look_again(parameters) for _ in range(records)]


def test_equal_rows_are_looked_at_again_once() -> None:
    facts = InitialFacts()
    parameters: list[torch.Tensor] = [nn.Parameter(value) for value in (torch.ones(3, 2), torch.zeros(3, 2), torch.randn(3, 2))]
    parameters.append(nn.Parameter(torch.ones(3, 2)))
    for slot, p in enumerate(parameters):
        facts.of(slot, p)
    assert looked(facts, parameters, SYMMETRY_AFTER - 1) == [False] * (SYMMETRY_AFTER - 1)
    assert facts.still_equal == set()
    parameters[3].data[2, 1] = 5.0
    assert looked(facts, parameters, 1) == [True]
    assert facts.still_equal == {0, 1}
    parameters[0].data[1] = 7.0
    assert looked(facts, parameters, 3 * SYMMETRY_AFTER) == [False] * 3 * SYMMETRY_AFTER
    assert facts.still_equal == {0, 1}
    assert facts.of(0, parameters[0]) == (1.0, True), "how it was made stays"


@pytest.mark.parametrize("before", [True, False], ids=["frozen-all-along", "frozen-now"])
def test_frozen_rows_are_not_looked_at_again(before: bool) -> None:
    facts, p = InitialFacts(), nn.Parameter(torch.ones(3, 2), requires_grad=not before)
    facts.of(0, p)
    p.requires_grad_(False)
    assert not any(looked(facts, [p]))
    assert facts.still_equal == set()


def test_where_no_rows_are_equal_there_is_no_news() -> None:
    facts, p = InitialFacts(), nn.Parameter(torch.ones(3, 2))
    facts.of(0, p)
    p.data[0] = 2.0
    assert not any(looked(facts, [p]))
    assert not any(looked(InitialFacts(), []))


def test_a_lazy_parameter_that_has_no_values_yet_is_not_looked_at() -> None:
    facts, layer = InitialFacts(), nn.LazyLinear(2)
    facts.of(0, layer.weight)
    assert not any(looked(facts, [layer.weight], 3))
    layer(torch.ones(1, 3))
    nn.init.ones_(layer.weight)
    facts.of(0, layer.weight)
    assert looked(facts, [layer.weight], SYMMETRY_AFTER - 3)[-1]
    assert facts.still_equal == {0}


@pytest.mark.parametrize("where", [0, 1500, 2999], ids=["first-row", "middle-row", "last-row"])
def test_a_large_matrix_whose_rows_differ_somewhere_has_no_equal_rows(where: int) -> None:
    value = torch.zeros(3000, 400)
    value[where] = 1.0
    assert InitialFacts().of(0, value)[1] is False


# -- all of it ---------------------------------------------------------------------------------------------------------------------


def described(model: nn.Module, **given: object) -> Meta:
    known = {"owners": {}, "order": {}, "distance": {}} | given
    return describe(ParameterTable({"": model}), InitialFacts(), **known)  # type: ignore[arg-type]


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 3, bias=False), nn.Linear(3, 1))


def test_every_parameter_and_module_has_its_fact_in_order() -> None:
    model = small()
    model[2].requires_grad_(False)
    model[3].double()
    meta = described(model, owners={0: "SGD#0", 4: "AdamW#1"})
    assert [(f.name, f.layer, f.shape, f.dtype, f.trainable, f.owner) for f in meta.parameters] == [
        ("0.weight", "0", (3, 2), "float32", True, "SGD#0"),
        ("0.bias", "0", (3,), "float32", True, None),
        ("2.weight", "2", (3, 3), "float32", False, None),
        ("3.weight", "3", (1, 3), "float64", True, None),
        ("3.bias", "3", (1,), "float64", True, "AdamW#1"),
    ]
    assert [(f.name, f.type, f.kind, f.activation) for f in meta.layers] == [
        ("", "Sequential", "container", None),
        ("0", "Linear", "linear", None),
        ("1", "Sigmoid", "activation", "Sigmoid"),
        ("2", "Linear", "linear", None),
        ("3", "Linear", "linear", None),
    ]


def test_sequence_numbers_become_ranks_and_roles() -> None:
    meta = described(small(), order={0: 700, 1: 700, 2: 44, 3: 9000, 4: 9000}, distance={0: 6, 2: 4})
    ranks = [f.order for f in meta.parameters]
    assert sorted(rank for rank in ranks if rank is not None) == [0, 1, 2, 3, 4]
    assert ranks[2] == 0
    assert {ranks[0], ranks[1]} == {1, 2}
    assert [f.distance for f in meta.parameters] == [6, None, 4, None, None]
    assert {f.name: f.role for f in meta.layers} == {"": "", "0": "hidden", "1": "", "2": "input", "3": "head"}
    assert [f.order for f in meta.layers][1:] == [1, None, 0, 3]


def test_of_an_order_that_is_not_known_nothing_is_said() -> None:
    meta = described(small())
    assert all(f.order is None and f.distance is None for f in meta.parameters)
    assert all(f.order is None and f.role == "" for f in meta.layers)


def test_scope_is_that_of_the_module_for_its_parameters_too() -> None:
    meta = described(small(), include=("0", "3"), exclude=("3",))
    assert [f.name for f in meta.layers if f.in_scope] == ["0"]
    assert [f.name for f in meta.parameters if f.in_scope] == ["0.weight", "0.bias"]


def test_parameters_of_the_root_are_in_its_scope() -> None:
    model = nn.Linear(1, 1)
    assert [f.layer for f in described(model).parameters] == ["", ""]
    assert all(f.in_scope for f in described(model).parameters)


def test_what_the_graph_did_not_reach_is_named() -> None:
    meta = described(small(), unreached=[1, 4], opaque=True, outside=((2, 2),), outside_in_model=("blocks[0].weight",))
    assert meta.unreached == ("0.bias", "3.bias")
    assert meta.opaque
    assert meta.outside == ((2, 2),)
    assert meta.outside_in_model == ("blocks[0].weight",)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ("", 0.0, False)),
        (Criterion("mse_loss", 0.5, False), ("mse_loss", 0.5, False)),
        (Criterion("mse_loss", math.nan, True), ("mse_loss", 0.0, True)),
        (Criterion("mse_loss", -0.0, False), ("mse_loss", 0.0, False)),
        (Criterion("l1_loss", -3.0, False), ("l1_loss", 0.0, False)),
    ],
    ids=str,
)
def test_what_the_loss_is(given: Criterion | None, expected: tuple[str, float, bool]) -> None:
    meta = described(small(), criterion=given, squashed=("sigmoid", "1", 24))
    assert (meta.criterion, meta.guess, meta.broadcast) == expected
    assert (meta.squashed, meta.squashed_by, meta.squashed_since) == ("sigmoid", "1", 24)
    assert meta == replace(meta)


def test_which_rows_are_equal_still_is_told_by_parameter() -> None:
    model = small()
    nn.init.ones_(model[2].weight)
    facts, table = InitialFacts(), ParameterTable({"": model})
    assert not any(f.still_equal for f in describe(table, facts, owners={}, order={}, distance={}).parameters)
    looked(facts, table.params)
    meta = describe(table, facts, owners={}, order={}, distance={})
    assert [f.name for f in meta.parameters if f.still_equal] == ["2.weight"]
    assert meta.still_equal.tolist() == [False, False, True, False, False]


def test_shapes_that_are_not_known_yet_are_empty() -> None:
    meta = described(nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 3, device="meta")))
    assert [f.shape for f in meta.parameters] == [(), (), (3, 2), (3,)]


def test_arrays_of_facts_stand_in_the_order_of_columns() -> None:
    meta = Meta(
        (ParameterFact("a", "x", (2, 3), trainable=False, order=1), ParameterFact("b", "y", (), owner="SGD#0", distance=4)),
        described(small()).layers[:0],
    )
    assert meta.trainable.tolist() == [False, True]
    assert meta.owned.tolist() == [False, True]
    assert meta.ndim.tolist() == [2, 0]
    assert meta.numel.tolist() == [6, 1]
    assert meta.order[0] == 1.0
    assert math.isnan(meta.order[1])
    assert meta.distance[1] == 4.0
    assert meta.layer_index.tolist() == [-1, -1]
