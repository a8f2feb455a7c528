"""Where branches of a network begin and end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch.capture.roles import roles


def found(model: nn.Module, loss: Tensor) -> tuple[set[str], set[str]]:
    """Names of the modules that begin and that end a branch."""
    names = [name.rpartition(".")[0] for name, _ in model.named_parameters()]
    slots = {id(p): i for i, p in enumerate(model.parameters())}
    answer = roles([loss], slots)
    return {names[i] for i in answer.inputs}, {names[i] for i in answer.heads}


def test_a_chain_begins_with_its_first_and_ends_with_its_last() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2))
    assert found(model, model(torch.randn(3, 4)).square().mean()) == ({"0"}, {"4"})


def test_two_networks_under_one_loss_have_a_beginning_and_an_end_each() -> None:
    model = nn.ModuleDict({n: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)) for n in ("actor", "critic")})
    x = torch.randn(3, 4)
    loss = 1e-3 * F.log_softmax(model["actor"](x), 0).mean() + F.mse_loss(model["critic"](x), torch.zeros(3, 1))
    assert found(model, loss) == ({"actor.0", "critic.0"}, {"actor.2", "critic.2"})


def test_towers_that_are_merged_end_where_they_are_merged() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(8, 2)})
    x = torch.randn(3, 4)
    out = model["head"](torch.cat((model["a"](x), model["b"](x)), -1))
    assert found(model, out.sum()) == ({"a", "b"}, {"head"})


class Residual(nn.Module):
    """A stem, two residual blocks with a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 2)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.relu(h + norm(conv(h)))
        return self.head(h.mean((2, 3)))


class Text(nn.Module):
    """Embeddings, an LSTM, attention and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(9, 8), nn.Embedding(9, 8)
        self.attend, self.norm, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8), nn.Linear(8, 9)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.place(torch.arange(x.shape[1]))
        return self.head(self.norm(h + self.attend(h, h, h)[0]))


@pytest.mark.parametrize(
    ("make", "data", "begins", "ends"),
    [
        pytest.param(Residual, lambda: torch.randn(2, 1, 5, 5), {"stem"}, {"head"}, id="residual"),
        pytest.param(Text, lambda: torch.randint(9, (2, 5)), {"token", "place"}, {"head"}, id="embeddings and attention"),
    ],
)
def test_shortcuts_neither_begin_nor_end_a_branch(
    make: Callable[[], nn.Module], data: Callable[[], Tensor], begins: set[str], ends: set[str]
) -> None:
    model = make()
    assert found(model, model(data()).square().sum()) == (begins, ends)


def test_a_weight_used_through_a_norm_or_in_a_penalty_does_not_end_the_branch() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 2)))
    loss = model(torch.randn(3, 4)).square().mean() + 1e-3 * sum(p.square().sum() for p in model.parameters())
    begins, ends = found(model, loss)
    assert begins == {"0"}
    assert ends == {"2"}


def test_a_weight_over_its_own_spectral_norm_begins_no_branch() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)),
        nn.Tanh(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
        nn.Tanh(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 2)),
    )
    begin, end = found(model, model(torch.randn(3, 4)).square().mean())
    assert begin == {"0", "0.parametrizations.weight"}
    assert end == {"4", "4.parametrizations.weight"}


def test_a_weight_over_its_own_length_by_hand_is_that_weight() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight / self.weight.norm() * 2, self.bias)

    model = nn.Sequential(Scaled(4, 8), nn.Tanh(), Scaled(8, 2))
    assert found(model, model(torch.randn(3, 4)).square().mean()) == ({"0"}, {"2"})


def test_a_weight_that_is_used_for_what_it_made_of_data_is_used_twice() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.bottleneck = nn.Linear(6, 4, bias=False), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bottleneck(torch.tanh(self.encoder(x))) @ self.encoder.weight

    model = Tied()
    assert found(model, model(torch.randn(3, 6)).square().mean()) == ({"encoder"}, {"encoder"})
    alone = nn.Linear(6, 4, bias=False)
    assert found(nn.Sequential(alone), (torch.tanh(alone(torch.randn(3, 6))) @ alone.weight).square().mean()) == ({"0"}, {"0"})


def test_a_graph_beyond_the_limit_has_no_roles() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    answer = roles([model(torch.randn(3, 4)).sum()], {id(p): i for i, p in enumerate(model.parameters())}, limit=2)
    assert (answer.inputs, answer.heads) == (set(), set())
