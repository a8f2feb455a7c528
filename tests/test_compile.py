"""Compiled models, steps and train steps: watched like eager ones, with as many graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch import GradWatch
from tests.loops.harness import alarms

pytestmark = pytest.mark.filterwarnings("ignore")  # dynamo warns of its own


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(25):
        x = torch.randn(32, 16, generator=generator)
        yield x, (x[:, 0] > 0).long()


def run(kind: str, watched: bool) -> tuple[nn.Module, GradWatch | None, int]:
    """Train with a part compiled; the model, its watch, and the number of graphs that were compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    forward: Callable[[Tensor], Tensor] = torch.compile(model, backend="aot_eager") if kind == "model" else model
    if kind == "blocks":
        model[0].compile(backend="aot_eager")
    step = torch.compile(optimizer.step, backend="aot_eager") if kind == "step" else optimizer.step

    def update(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        step()

    update_: Callable[..., Any] = torch.compile(update, backend="aot_eager") if kind == "train step" else update
    watch = GradWatch(model if kind != "model" else forward, console=False) if watched else None  # type: ignore[arg-type]
    if watch is not None:
        watch.attach()
    for x, y in batches():
        update_(x, y)
    if watch is not None:
        watch.detach()
    return model, watch, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kind", ["model", "blocks", "step", "train step"])
def test_what_is_compiled_is_watched_and_stays_as_it_is(kind: str) -> None:
    bare, _, bare_graphs = run(kind, watched=False)
    model, watch, graphs = run(kind, watched=True)
    _, eager, _ = run("nothing", watched=True)
    assert watch is not None
    assert eager is not None
    assert graphs == bare_graphs > 0
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True))
    assert watch.history.recorded == 25
    assert watch.history.parameters == ("0.linear.weight", "0.linear.bias", "1.weight", "1.bias")
    for name in ("loss", "grad_norm", "total_norm", "update_ratio"):
        np.testing.assert_allclose(watch.history.stat(name), eager.history.stat(name), rtol=1e-3, err_msg=name)
    assert not watch.notices
    assert not alarms(watch)
