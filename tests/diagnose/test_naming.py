"""From sick parameters to the modules named for them."""

from __future__ import annotations

import pytest

from gradwatch.diagnose.naming import layers_of, overlap
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
