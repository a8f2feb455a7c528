"""The order in which modules run, from what is known of their parameters and of their registration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from gradwatch.diagnose.execution import execution_of, lies_before, roots_of, starts_before
from gradwatch.history import LayerFact, Meta, ParameterFact


def meta(layers: Mapping[str, int | None], kinds: Mapping[str, str] | None = None) -> Meta:
    """Layers by name, with the rank of their first parameter; those that have one hold one parameter."""
    facts = tuple(LayerFact(name, kind=(kinds or {}).get(name, "other"), order=order) for name, order in layers.items())
    parameters = tuple(ParameterFact(f"{name}.w", name, order=order) for name, order in layers.items() if order is not None)
    return Meta(parameters, facts)


def seen_to_run(facts: Meta, *names: str) -> Meta:
    """The same with the modules that were seen to run, in the order in which they returned first."""
    return replace(facts, layers=tuple(replace(f, run=names.index(f.name) if f.name in names else None) for f in facts.layers))


def in_order(facts: Meta) -> list[str]:
    execution = execution_of(facts)
    return [facts.layers[i].name for i in execution.sorted(np.arange(len(facts.layers)))]


def test_what_has_no_parameter_runs_behind_what_was_registered_before_it_and_containers_last() -> None:
    facts = meta({"": None, "a": None, "a.fc": 0, "a.act": None, "b": None, "b.fc": 2, "b.act": None})
    assert in_order(facts) == ["a.fc", "a.act", "a", "b.fc", "b.act", "b", ""]


def test_the_graph_knows_better_than_the_registration() -> None:
    facts = meta({"": None, "late": 4, "late_act": None, "early": 0, "early_act": None})
    assert in_order(facts) == ["early", "early_act", "late", "late_act", ""]


def test_modules_that_were_seen_to_run_have_the_order_of_their_calls() -> None:
    facts = meta({"": None, "mlp": None, "mlp.c_fc": 0, "mlp.c_proj": 2, "mlp.act": None, "drop": None})
    assert in_order(facts) == ["mlp.c_fc", "mlp.c_proj", "mlp.act", "mlp", "drop", ""]
    called = seen_to_run(facts, "drop", "mlp.c_fc", "mlp.act", "mlp.c_proj", "mlp", "")
    assert in_order(called) == ["drop", "mlp.c_fc", "mlp.act", "mlp.c_proj", "mlp", ""]
    assert starts_before(called, ("mlp.c_fc.w",), ("mlp.act",))
    assert not starts_before(called, ("mlp.c_proj.w",), ("mlp.act",))


def test_what_was_not_seen_to_run_stands_behind_what_the_graph_or_the_registration_has_before_it() -> None:
    facts = meta({"": None, "fc2": 6, "act2": None, "a": 2, "a.out": 3, "fc1": 0, "list": None, "list.0": 4, "list.1": None})
    called = seen_to_run(facts, "fc1", "a", "list.0", "fc2", "")
    assert in_order(called) == ["fc1", "a.out", "a", "list.0", "list.1", "list", "fc2", "act2", ""]


def test_what_was_not_seen_to_run_in_a_container_does_not_wait_for_its_end() -> None:
    facts = meta({"": None, "fc": 0, "block": None, "block.drop": None, "block.fc": 2})
    assert in_order(seen_to_run(facts, "fc", "block.fc", "block", "")) == ["fc", "block.drop", "block.fc", "block", ""]


def test_of_several_models_one_that_was_not_seen_to_run_keeps_the_order_of_the_graph() -> None:
    facts = meta({"g": None, "g.act": None, "g.fc": 4, "d": None, "d.two": 2, "d.one": 0})
    called = seen_to_run(facts, "g.fc", "g.act", "g")
    assert [name for name in in_order(called) if name[0] == "g"] == ["g.fc", "g.act", "g"]
    assert [name for name in in_order(called) if name[0] == "d"] == ["d.one", "d.two", "d"]


def test_a_container_that_returned_before_something_in_it_ran_comes_last_all_the_same() -> None:
    facts = meta({"": None, "block": None, "block.fc": 0, "block.late": None})
    assert in_order(seen_to_run(facts, "block.fc", "block", "", "block.late")) == ["block.fc", "block.late", "block", ""]


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
