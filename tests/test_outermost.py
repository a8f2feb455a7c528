"""Which of the modules in a process an optimizer trains, and what they are called."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

import pytest
import torch
from torch import Tensor, nn

from gradwatch.outermost import name_of, outermost


class Holder(nn.Module):
    """Holds what it is given under the names it is given."""

    def __init__(self, **held: nn.Module) -> None:
        super().__init__()
        for name, module in held.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


def reach(*modules: nn.Module) -> None:
    """Give every parameter a gradient."""
    for module in modules:
        for p in module.parameters():
            p.grad = torch.ones_like(p)


def find(params: Sequence[Tensor], watched: Collection[nn.Module] = (), in_backward: bool = False) -> list[nn.Module]:
    """What is found for an optimizer of these parameters."""
    mine = {id(p) for module in watched for p in module.parameters()}
    wanted = [p for p in params if id(p) not in mine]
    return outermost(wanted, owned={id(p) for p in params}, watched=mine, in_backward=in_backward)[0]


def net() -> nn.Module:
    return Holder(first=nn.Linear(3, 3), second=nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)))


def test_the_model_goes_before_its_layers() -> None:
    model = net()
    assert find(list(model.parameters())) == [model]
    assert find(list(model.second.parameters())) == [model.second], "the rest of the model has no gradient: it is not trained"


def test_the_model_goes_before_a_part_of_it_if_all_of_it_got_gradients() -> None:
    model = net()
    reach(model)
    assert find(list(model.second.parameters())) == [model]


def test_a_model_is_one_piece_though_some_of_it_is_not_used() -> None:
    model = Holder(used=net(), unused=nn.Linear(3, 3), other=nn.Linear(3, 3))
    reach(model.used, model.other)
    assert find([*model.used.parameters(), *model.other.parameters()]) == [model]


def test_a_wrapper_goes_before_the_model() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    assert find(list(model.parameters())) == [compiled]


def test_data_parallel_is_passed_over() -> None:
    model = net()
    wrapped = nn.DataParallel(model)
    assert find(list(wrapped.parameters())) == [model]


def test_a_loss_that_holds_the_model_does_not_stand_for_it() -> None:
    class PenaltyLoss(Holder):
        pass

    class Penalised(nn.MSELoss):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    model = net()
    losses = [PenaltyLoss(model=model), Penalised(model)]
    assert find(list(model.parameters())) == [model]
    assert len(losses) == 2


def test_a_loss_with_parameters_of_its_own_comes_beside_the_model() -> None:
    class MarginLoss(Holder):
        pass

    model, loss = net(), MarginLoss(centres=nn.Linear(2, 5))
    reach(model, loss)
    found = find([*model.parameters(), *loss.parameters()])
    assert found == [model, loss.centres] or found == [model, loss]


def test_a_list_of_models_does_not_stand_for_the_one_that_is_trained() -> None:
    ensemble = nn.ModuleList([net(), net(), net()])
    reach(ensemble[1])
    assert find(list(ensemble[1].parameters())) == [ensemble[1]]


def test_a_container_does_not_stand_for_the_half_that_joins_later() -> None:
    gan = Holder(generator=net(), discriminator=net())
    reach(gan)
    joined = find(list(gan.generator.parameters()), watched=[gan.discriminator])
    assert joined == [gan.generator]


def test_both_halves_of_an_autoencoder_are_one_model() -> None:
    model = Holder(encoder=net(), decoder=net())
    reach(model)
    assert find(list(model.encoder.parameters())) == [model]


def test_while_gradients_come_in_their_absence_tells_nothing() -> None:
    model = net()
    last = list(model.parameters())[-1]
    last.grad = torch.ones_like(last)
    assert find([last], in_backward=True) == [model]


def test_several_models_of_one_optimizer_are_all_found() -> None:
    one, other = net(), nn.Linear(3, 3)
    assert find([*one.parameters(), *other.parameters()]) == [one, other]


def test_bare_tensors_belong_to_nobody() -> None:
    assert find([torch.ones(3, requires_grad=True)]) == []


def test_objects_that_lie_about_their_class_are_left_alone() -> None:
    class Proxy:
        @property
        def __class__(self) -> type:  # type: ignore[override]
            raise AssertionError("asked a proxy for its class")

    class Unborn(nn.Module):
        def __init__(self) -> None:
            self.__dict__["model"] = None

    around = [Proxy(), Unborn()]
    model = net()
    assert find(list(model.parameters())) == [model]
    assert len(around) == 2


def test_the_other_optimizers_of_the_process_are_told() -> None:
    model, other = net(), nn.Linear(3, 3)
    optimizers = [torch.optim.SGD(model.parameters()), torch.optim.SGD(other.parameters())]
    params = list(model.parameters())
    found, living = outermost(params, owned={id(p) for p in params}, watched=(), in_backward=False)
    assert found == [model]
    assert {id(optimizer) for optimizer in optimizers} <= {id(optimizer) for optimizer in living}


def test_a_model_is_called_what_the_script_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    assert name_of(model) == "Holder"
    monkeypatch.setattr(sys.modules["__main__"], "critic", model, raising=False)
    assert name_of(model) == "critic"
