"""What an architecture of `transformers` is here, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.networks import Training
from tests.real.data import Batch

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[real]'")

UPDATES = 40

Draw = Callable[[torch.Generator], Batch]


@dataclass(frozen=True)
class Architecture:
    """A model of `transformers` and what it is trained on.

    Attributes:
        build: a new model.
        draw: one batch of the model's keyword arguments.
        lr: learning rate of AdamW.
        batches: how many fixed batches the training goes through in turn.
    """

    build: Callable[[], nn.Module]
    draw: Draw
    lr: float
    batches: int

    def training(
        self,
        plant: Callable[[nn.Module], object] = lambda model: None,
        stepped: Callable[[nn.Module], Iterator[nn.Parameter]] = nn.Module.parameters,
        before: Callable[[nn.Module, int], object] = lambda model, i: None,
        zeroed: bool = True,
    ) -> Training:
        """A plain training loop; `update(i)` returns the loss as a number.

        Args:
            plant: changes the new model.
            stepped: the parameters that the optimizer gets.
            before: called with the model before each update.
            zeroed: clear the gradients in each update.
        """
        torch.manual_seed(0)
        np.random.seed(0)  # SpecAugment draws its masks from it
        model = self.build()
        model.train()  # built from a config, some start in evaluation mode
        plant(model)
        optimizer = torch.optim.AdamW(stepped(model), lr=self.lr)
        generator = torch.Generator().manual_seed(1)
        batches = [self.draw(generator) for _ in range(self.batches)]

        def update(i: int) -> float:
            before(model, i)
            if zeroed:
                optimizer.zero_grad()
            loss: Tensor = model(**batches[i % len(batches)]).loss
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return Training(model, (optimizer,), update)


ARCHITECTURES: dict[str, Architecture] = {}
FLAWED: dict[str, Architecture] = {}
"""Architectures that come with a fault of their own."""


def architecture(
    draw: Draw, lr: float = 3e-3, batches: int = 1, flawed: bool = False
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        (FLAWED if flawed else ARCHITECTURES)[build.__name__] = Architecture(build, draw, lr, batches)
        return build

    return add
