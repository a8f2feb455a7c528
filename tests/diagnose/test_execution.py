"""The order in which modules run, from what is known of their parameters and of their registration."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gradwatch.diagnose.execution import execution_of, lies_before, roots_of, starts_before
from gradwatch.history import LayerFact, Meta, ParameterFact


def meta(layers: Mapping[str, int | None], kinds: Mapping[str, str] | None = None) -> Meta:
    """Layers by name, with the rank of their first parameter; those that have one hold one parameter."""
    facts = tuple(LayerFact(name, kind=(kinds or {}).get(name, "other"), order=order) for name, order in layers.items())
    parameters = tuple(ParameterFact(f"{name}.w", name, order=order) for name, order in layers.items() if order is not None)
    return Meta(parameters, facts)


def in_order(facts: Meta) -> list[str]:
    execution = execution_of(facts)
    return [facts.layers[i].name for i in execution.sorted(np.arange(len(facts.layers)))]


def test_what_has_no_parameter_runs_behind_what_was_registered_before_it_and_containers_last() -> None:
    facts = meta({"": None, "a": None, "a.fc": 0, "a.act": None, "b": None, "b.fc": 2, "b.act": None})
    assert in_order(facts) == ["a.fc", "a.act", "a", "b.fc", "b.act", "b", ""]


def test_the_graph_knows_better_than_the_registration() -> None:
    facts = meta({"": None, "late": 4, "late_act": None, "early": 0, "early_act": None})
    assert in_order(facts) == ["early", "early_act", "late", "late_act", ""]


def test_each_of_several_models_has_an_order_of_its_own() -> None:
    facts = meta({"g": None, "g.fc": 4, "g.act": None, "d": None, "d.flatten": None, "d.fc": 0})
    assert in_order(facts) == ["d.flatten", "d.fc", "d", "g.fc", "g.act", "g"]
    assert roots_of(facts).tolist() == [0, 3]


def test_the_innermost_of_what_holds_for_modules_and_those_around_them() -> None:
    facts = meta({"": None, "a": None, "a.b": None, "a.b.fc": 0, "c": 2})
    mask = np.array([True, True, True, False, True])
    assert execution_of(facts).innermost(mask).tolist() == [False, False, True, False, True]
    assert not execution_of(facts).innermost(np.zeros(5, bool)).any()


def test_the_calls_of_an_output_projection_are_those_of_the_attention_around_it() -> None:
    facts = meta({"": None, "attention": 0, "attention.out": 1, "fc": 2}, {"attention": "attention"})
    assert execution_of(facts).caller.tolist() == [0, 1, 1, 3]


def test_before_and_behind() -> None:
    facts = meta({"": None, "0": 0, "1": None, "2": 2, "3": None, "4": 4})
    assert lies_before(facts, ("0.w", "2.w"), ("3",))
    assert not lies_before(facts, ("0.w", "4.w"), ("3",))
    assert starts_before(facts, ("0.w", "4.w"), ("3",))
    assert not starts_before(facts, ("4.w",), ("3",))
    assert not lies_before(facts, (), ("3",))
    assert not starts_before(facts, ("0.w",), ("unknown",))


def test_a_model_without_modules_has_none() -> None:
    assert in_order(Meta()) == []
