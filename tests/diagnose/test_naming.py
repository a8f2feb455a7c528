"""From sick parameters to the modules named for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.diagnose.naming import layers_of, merged, named, overlap
from gradwatch.diagnose.tree import ancestors
from gradwatch.history import LayerFact, Meta, ParameterFact


def meta(*parameters: str, frozen: tuple[str, ...] = (), roots: tuple[str, ...] = ("",)) -> Meta:
    facts = tuple(ParameterFact(p, p.rpartition(".")[0], trainable=p not in frozen) for p in parameters)
    modules = dict.fromkeys(a for f in facts for a in ancestors(f.layer) if a or "" in roots)
    return Meta(facts, tuple(LayerFact(name) for name in modules))


NET = ("encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias", "head.weight", "head.bias")


@pytest.mark.parametrize(
    ("sick", "named"),
    [
        pytest.param(NET[:1], ("encoder.0",), id="one parameter names its module"),
        pytest.param(NET[:3], ("encoder.0", "encoder.1"), id="a parent with a well parameter is not named"),
        pytest.param(NET[:4], ("encoder",), id="a parent whose parameters are all sick is"),
        pytest.param(NET, ("",), id="the root too"),
        pytest.param((NET[4], *NET[:4]), ("head", "encoder"), id="in the order of the parameters"),
        pytest.param((), (), id="nothing"),
        pytest.param(("unknown.weight",), (), id="unknown names are ignored"),
    ],
)
def test_parents_replace_children_when_all_of_them_are_sick(sick: tuple[str, ...], named: tuple[str, ...]) -> None:
    assert layers_of(meta(*NET), sick) == named


def slowly(m: Meta, parameters: tuple[str, ...]) -> tuple[str, ...]:
    """The same, name by name."""
    layer = {f.name: f.layer for f in m.parameters}
    sick = [name for name in parameters if name in layer]
    modules = {f.name for f in m.layers}
    said = []
    for name in sick:
        whole = []
        for a in ancestors(layer[name]):
            below = [f.name for f in m.parameters if a in ancestors(f.layer)]
            found, trainable = set(below) & set(sick), [f for f in m.parameters if f.trainable and f.name in below]
            if a in modules and 2 <= len(found) == len(trainable):
                whole.append(a)
        said.append(whole[-1] if whole else layer[name])
    return tuple(dict.fromkeys(said))


@given(
    st.sets(st.sampled_from(("", "a", "a.b", "a.b.c", "a.d", "e", "e.f", "g"))),
    st.permutations([f"{layer}.{kind}" for layer in ("a", "a.b.c", "a.d", "e", "e.f", "g") for kind in ("weight", "bias")]),
    st.integers(0, 12),
    st.sets(st.integers(0, 11)),
)
def test_names_are_what_a_slow_computation_says(unlisted: set[str], order: list[str], sick: int, frozen: set[int]) -> None:
    m = meta(*sorted(order), frozen=tuple(order[i] for i in frozen))
    m = replace(m, layers=tuple(f for f in m.layers if f.name not in unlisted))
    parameters = tuple(order[:sick])
    assert layers_of(m, parameters) == slowly(m, parameters)
    columns = np.array([[f.name for f in m.parameters].index(name) for name in parameters], np.int64)
    assert named(m, columns) == parameters
    assert layers_of(m, named(m, columns)) == layers_of(m, parameters)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(NET[2:4], NET[:3], id="known"),
        pytest.param(("unknown", NET[1]), (NET[1], "unknown", "other"), id="unknown"),
        pytest.param((), (), id="none"),
    ],
)
def test_merged_names_are_those_of_the_one_and_what_the_other_has_besides(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert merged(meta(*NET), one, other) == tuple(dict.fromkeys(one + other))


def test_names_follow_the_facts_when_they_change() -> None:
    before = meta(*NET)
    after = replace(before, parameters=before.parameters[::-1])
    assert named(before, np.array([0])) == NET[:1]
    assert named(after, np.array([0])) == NET[-1:]


def test_frozen_parameters_do_not_keep_a_parent_from_being_named() -> None:
    assert layers_of(meta(*NET, frozen=NET[2:4]), NET[:2]) == ("encoder",)


def test_a_parent_with_a_single_parameter_does_not_replace_its_child() -> None:
    assert layers_of(meta("a.b.weight", "c.weight"), ("a.b.weight",)) == ("a.b",)


def test_a_mapping_of_models_names_a_key_and_never_the_empty_root() -> None:
    m = meta("g.0.weight", "g.0.bias", "d.0.weight", "d.0.bias", roots=())
    assert layers_of(m, ("g.0.weight", "g.0.bias")) == ("g",)
    assert layers_of(m, tuple(f.name for f in m.parameters)) == ("g", "d")


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        pytest.param(("a.b",), ("a",), True, id="child and parent"),
        pytest.param(("a",), ("a.b.c",), True, id="parent and grandchild"),
        pytest.param(("a.b",), ("a.c",), False, id="siblings"),
        pytest.param(("a.b",), ("a.bc",), False, id="a prefix of a name is no parent"),
        pytest.param(("",), ("x.y",), True, id="the root holds everything"),
        pytest.param((), ("x",), True, id="no module overlaps with everything"),
    ],
)
def test_overlap(one: tuple[str, ...], other: tuple[str, ...], expected: bool) -> None:
    assert overlap(one, other) is expected
