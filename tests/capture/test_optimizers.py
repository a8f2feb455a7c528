"""Which optimizer owns which parameter: adding, sharing, losing and finding them, and their learning rates."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from gradwatch.capture.optimizers import Owners
from gradwatch.capture.parameters import ParameterTable


def three() -> tuple[nn.Sequential, ParameterTable, Owners]:
    """Three linear layers without bias: slots 0, 1 and 2."""
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    table = ParameterTable({"": model})
    return model, table, Owners(table)


def assert_sound(owners: Owners, expected: dict[int, int]) -> None:
    """`owner_of`, the array and each optimizer's own view agree."""
    assert owners.owner_of == expected
    assert owners.owners.dtype == np.int64
    assert {slot: key for slot, key in enumerate(owners.owners.tolist()) if key >= 0} == expected


def test_an_optimizer_owns_what_it_holds() -> None:
    model, _, owners = three()
    optimizer = SGD([model[0].weight, model[2].weight], lr=0.1)
    assert owners.adopt(optimizer) == (0, True)
    assert_sound(owners, {0: 0, 2: 0})
    assert owners.slots(0) == [0, 2]
    assert owners.slot_set(0) == {0, 2}
    assert owners.index(0).tolist() == [0, 2]
    assert owners.optimizer(0) is optimizer
    assert owners.name(0) == "SGD#0"


def test_taking_it_in_again_changes_nothing() -> None:
    model, _, owners = three()
    optimizer = SGD(model.parameters(), lr=0.1)
    owners.adopt(optimizer)
    array = owners.owners
    for _ in range(3):
        assert owners.adopt(optimizer) == (0, False)
    assert owners.owners is array


def test_the_array_is_a_new_one_whenever_it_changes() -> None:
    """A closed record keeps the one it was closed with."""
    model, _, owners = three()
    owners.adopt(SGD([model[0].weight], lr=0.1))
    before, kept = owners.owners, owners.owners.copy()
    other = SGD([model[1].weight], lr=0.1)
    owners.adopt(other)
    assert owners.owners is not before
    np.testing.assert_array_equal(before, kept)


def test_keys_and_names_are_given_in_the_order_of_appearance() -> None:
    model, _, owners = three()
    optimizers: list[Optimizer] = [AdamW([model[1].weight]), SGD([model[0].weight], lr=0.1), AdamW([model[2].weight])]
    assert [owners.adopt(optimizer)[0] for optimizer in optimizers] == [0, 1, 2]
    assert [owners.name(key) for key in range(3)] == ["AdamW#0", "SGD#1", "AdamW#2"]
    assert_sound(owners, {1: 0, 0: 1, 2: 2})


def test_one_that_owns_nothing_watched_is_not_taken_in() -> None:
    model, _, owners = three()
    stranger = SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    assert owners.adopt(stranger) == (None, False)
    mine = SGD(model.parameters(), lr=0.1)
    assert owners.adopt(mine) == (0, True)
    assert owners.adopt(stranger) == (None, False)
    assert_sound(owners, {0: 0, 1: 0, 2: 0})


def test_strangers_beside_watched_parameters_are_ignored() -> None:
    model, _, owners = three()
    other = nn.Linear(1, 1)
    optimizer = SGD([*other.parameters(), model[1].weight], lr=0.1)
    assert owners.adopt(optimizer) == (0, True)
    assert owners.slots(0) == [1]


def test_a_group_that_is_added_is_seen() -> None:
    model, _, owners = three()
    optimizer = SGD([model[0].weight], lr=0.1)
    owners.adopt(optimizer)
    optimizer.add_param_group({"params": [model[2].weight], "lr": 0.5})
    assert owners.adopt(optimizer) == (0, True)
    assert_sound(owners, {0: 0, 2: 0})
    assert owners.slots(0) == [0, 2]


def test_a_stranger_that_gets_a_watched_group_is_taken_in() -> None:
    model, _, owners = three()
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    assert owners.adopt(optimizer) == (None, False)
    optimizer.add_param_group({"params": [model[0].weight]})
    assert owners.adopt(optimizer) == (0, True)


def test_parameters_taken_out_of_an_optimizer_are_not_owned_any_more() -> None:
    model, _, owners = three()
    optimizer = SGD([{"params": [model[0].weight]}, {"params": [model[1].weight, model[2].weight]}], lr=0.1)
    owners.adopt(optimizer)
    del optimizer.param_groups[1]["params"][0]
    assert owners.adopt(optimizer) == (0, True)
    assert_sound(owners, {0: 0, 2: 0})
    del optimizer.param_groups[1]
    assert owners.adopt(optimizer) == (0, True)
    assert_sound(owners, {0: 0})
    del optimizer.param_groups[0]
    assert owners.adopt(optimizer) == (None, True)
    assert_sound(owners, {})


def test_of_two_that_hold_a_parameter_the_one_that_stepped_last_owns_it() -> None:
    model, _, owners = three()
    first, second = SGD([model[0].weight, model[1].weight], lr=0.1), SGD([model[1].weight, model[2].weight], lr=0.2)
    assert owners.adopt(first) == (0, True)
    assert owners.adopt(second) == (1, True)
    assert_sound(owners, {0: 0, 1: 1, 2: 1})
    assert owners.adopt(first) == (0, True), "it takes its parameters back when it steps"
    assert_sound(owners, {0: 0, 1: 0, 2: 1})
    assert owners.adopt(first) == (0, False)
    assert owners.adopt(second) == (1, True)
    assert_sound(owners, {0: 0, 1: 1, 2: 1})


def test_a_new_optimizer_for_the_same_parameters_takes_over() -> None:
    """As after changing from Adam to SGD in the middle of a run; the old one may be dead by then."""
    model, _, owners = three()
    old = Adam(model.parameters())
    owners.adopt(old)
    ref = weakref.ref(old)
    del old
    gc.collect()
    assert ref() is None, "an optimizer is held weakly"
    assert owners.optimizer(0) is None
    new = SGD(model.parameters(), lr=0.1)
    assert owners.adopt(new) == (0, True), "it continues the dead one, so that a new one at every update leaves no trail"
    assert owners.name(0) == "SGD#0"
    assert_sound(owners, {0: 0, 1: 0, 2: 0})


# -- learning rates ----------------------------------------------------------------------------------------------------------------


def rates(owners: Owners, key: int = 0) -> list[float]:
    lr = np.full(3, np.nan)
    owners.write_lr(key, lr)
    return lr.tolist()


def test_each_parameter_has_its_groups_rate_as_it_is_now() -> None:
    model, _, owners = three()
    optimizer = SGD([{"params": [model[2].weight]}, {"params": [model[0].weight], "lr": 0.5}], lr=0.25)
    owners.adopt(optimizer)
    np.testing.assert_equal(rates(owners), [0.5, np.nan, 0.25])
    optimizer.param_groups[0]["lr"] = 0.0
    np.testing.assert_equal(rates(owners), [0.5, np.nan, 0.0])


def test_a_scheduler_is_followed() -> None:
    model, _, owners = three()
    optimizer = SGD(model.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    owners.adopt(optimizer)
    seen = []
    for _ in range(3):
        seen.append(rates(owners)[0])
        optimizer.step()
        scheduler.step()
    assert seen == [0.5, 0.25, 0.125]


@pytest.mark.parametrize(
    "rate", [torch.tensor(0.125), torch.tensor([0.125]), torch.tensor(0.125, requires_grad=True)], ids=["0-d", "1-d", "learned"]
)
def test_a_rate_that_is_a_tensor_is_read(rate: torch.Tensor) -> None:
    model, _, owners = three()
    optimizer = SGD(model.parameters(), lr=0.5)
    for group in optimizer.param_groups:
        group["lr"] = rate
    owners.adopt(optimizer)
    assert rates(owners) == [0.125] * 3


class NoRate(Optimizer):
    """An optimizer whose groups know no learning rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


def test_an_optimizer_without_a_rate_has_none() -> None:
    model, _, owners = three()
    optimizer = NoRate(model.parameters())
    assert owners.adopt(optimizer) == (0, True)
    np.testing.assert_equal(rates(owners), [np.nan] * 3)


def test_a_dead_optimizer_has_no_rate() -> None:
    model, _, owners = three()
    owners.adopt(SGD(model.parameters(), lr=0.1))
    gc.collect()
    np.testing.assert_equal(rates(owners), [np.nan] * 3)


# -- a model that changes ----------------------------------------------------------------------------------------------------------


def test_ownership_follows_a_model_that_grows() -> None:
    model, table, owners = three()
    new = nn.Linear(2, 2, bias=False)
    optimizer = SGD([*model.parameters(), new.weight], lr=0.1)
    owners.adopt(optimizer)
    assert owners.slots(0) == [0, 1, 2]
    model.append(new)
    table.rescan()
    owners.refresh()
    assert owners.slots(0) == [0, 1, 2, 3]
    assert_sound(owners, dict.fromkeys(range(4), 0))


def test_a_parameter_that_the_model_gave_up_is_not_owned() -> None:
    model, table, owners = three()
    optimizer = SGD(model.parameters(), lr=0.1)
    owners.adopt(optimizer)
    model[1] = nn.Identity()
    table.rescan()
    owners.refresh()
    assert owners.slots(0) == [0, 2]
    assert_sound(owners, {0: 0, 2: 0})


# -- looking for those that have not stepped yet -----------------------------------------------------------------------------------


def test_an_optimizer_that_has_not_stepped_is_found() -> None:
    model, _, owners = three()
    known, waiting = SGD([model[0].weight], lr=0.1), SGD([model[1].weight], lr=0.1)
    owners.adopt(known)
    assert owners.find([1, 2])
    assert_sound(owners, {0: 0, 1: 1})
    assert owners.optimizer(1) is waiting
    assert not owners.find([2])
    assert not owners.find([])


def test_finding_takes_nothing_from_an_optimizer_that_steps() -> None:
    """An optimizer of the whole model may still lie about when only its head is trained any more: it steps nothing."""
    model, _, owners = three()
    whole = SGD(model.parameters(), lr=0.1)
    head = SGD([model[2].weight], lr=0.1)
    owners.adopt(head)
    owners.find([0, 1])
    assert owners.owner_of[2] == 0, "the one that stepped last owns it"
    assert owners.optimizer(0) is head
    del whole


class Treacherous:
    """What asks it for its class runs code that raises, as lazy proxies do."""

    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise RuntimeError("do not touch")


def test_looking_touches_nothing_else_in_the_process() -> None:
    model, _, owners = three()
    traps = [Treacherous(), Optimizer.__new__(SGD)]
    optimizer = SGD(model.parameters(), lr=0.1)
    assert owners.find([0])
    assert owners.optimizer(0) is optimizer
    assert not owners.unowned([model[0].weight])
    assert len(owners.unowned([nn.Parameter(torch.ones(1))])) == 1
    del traps


def test_a_parameter_of_a_stranger_is_held_by_somebody() -> None:
    _, _, owners = three()
    other = nn.Linear(1, 1)
    assert owners.unowned([other.weight])
    optimizer = SGD(other.parameters(), lr=0.1)
    assert not owners.unowned([other.weight])
    del optimizer
