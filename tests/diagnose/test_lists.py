"""Modules that stand in a list with others like them."""

from __future__ import annotations

import numpy as np

from gradwatch.diagnose.lists import lists_of
from gradwatch.history import LayerFact, Meta, ParameterFact

SHAPES = {
    "stem": (3, 3),
    "blocks.0.fc": (8, 8),
    "blocks.0.experts.0": (4, 4),
    "blocks.0.experts.1": (4, 4),
    "blocks.1.fc": (8, 8),
    "blocks.1.experts.0": (4, 4),
    "blocks.1.experts.1": (4, 4),
    "blocks.2.fc": (5, 5),
}
TYPES = {"blocks": "ModuleList", "blocks.0.experts": "ModuleList", "blocks.1.experts": "ModuleDict", "stem": "MoEStem"}
META = Meta(
    tuple(ParameterFact(f"{layer}.weight", layer, shape) for layer, shape in SHAPES.items()),
    tuple(LayerFact(name, TYPES.get(name, "Module")) for name in ("", *TYPES, *SHAPES)),
)


def found(mask: np.ndarray) -> list[str]:
    return [layer for layer, holds in zip(SHAPES, mask, strict=True) if holds]


def others(*reached: str) -> list[str]:
    return found(lists_of(META).others(np.array([layer in reached for layer in SHAPES])))


def test_equals_stand_in_the_same_list_and_have_the_same_shapes() -> None:
    assert found(lists_of(META).equals) == [layer for layer in SHAPES if layer not in ("stem", "blocks.2.fc")]


def test_an_expert_is_called_one_or_is_of_a_class_that_is() -> None:
    assert found(lists_of(META).expert) == ["stem", *(layer for layer in SHAPES if "experts" in layer)]


def test_a_member_is_told_of_the_others_of_its_innermost_list_and_not_of_itself() -> None:
    assert others("blocks.0.experts.0") == ["blocks.0.experts.1", "blocks.1.fc"]
    assert others("blocks.0.fc", "blocks.1.fc") == ["blocks.0.fc", "blocks.1.fc"]
    assert others("stem", "blocks.2.fc") == others() == []


def test_a_model_without_lists_has_no_equals() -> None:
    lists = lists_of(Meta((ParameterFact("a.weight", "a"),), (LayerFact("a"),)))
    assert lists.equals.tolist() == lists.others(np.array([True])).tolist() == [False]
