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


def test_the_order_of_calls_is_known_of_each_of_several_models() -> None:
    generator = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    discriminator = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (generator, discriminator)]
    with GradWatch({"g": generator, "d": discriminator}, console=False) as watch:
        for _ in range(2):
            optimizers[1].zero_grad()
            discriminator(torch.randn(8, 4)).mean().backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            discriminator(generator(torch.randn(8, 4))).mean().backward()
            optimizers[0].step()
    run = {fact.name: fact.run for fact in watch.history.meta.layers}
    assert list(run) == ["g", "g.0", "g.1", "g.2", "d", "d.0", "d.1", "d.2"]
    assert sorted(run, key=lambda name: run[name] or 0) == ["d.0", "d.1", "d.2", "d", "g.0", "g.1", "g.2", "g"]
