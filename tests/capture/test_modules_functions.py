"""Functional activations become a static fact of the module that they follow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradwatch import GradWatch


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(8, 8) for _ in range(4))
        self.softmax = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.one(x))
        x = nn.functional.gelu(self.two(x))
        return self.softmax(self.four(self.three(x).relu()))


def test_how_a_function_is_flat_is_known_of_the_layer_before_it() -> None:
    model = Functions()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradWatch(model, console=False) as watch:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
    flat = {fact.name: fact.flat for fact in watch.history.meta.layers}
    assert flat == {"": "", "one": "two-sided", "two": "one-sided", "three": "one-sided", "four": "", "softmax": "probability"}
