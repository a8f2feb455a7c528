"""The loop as you have it, watched: a character model learns to write like the Python standard library.

Run: `python examples/plain_loop.py` (seconds). The watch says nothing while it trains, and one verdict at the end.
"""

from __future__ import annotations

import inspect
import json.decoder
import random
import textwrap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch import GradWatch

CONTEXT = 16


def text() -> tuple[Tensor, int]:
    """Source code that is on every machine with Python, as numbers of characters."""
    source = "".join(inspect.getsource(module) for module in (random, textwrap, json.decoder))
    alphabet = sorted(set(source))
    return torch.tensor([alphabet.index(c) for c in source]), len(alphabet)


def main(updates: int = 300) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data, characters = text()
    model = nn.Sequential(
        nn.Embedding(characters, 24),
        nn.Flatten(),
        nn.Linear(24 * CONTEXT, 128),
        nn.GELU(),
        nn.Linear(128, 128),
        nn.GELU(),
        nn.Linear(128, characters),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    with GradWatch(model) as watch:
        for _ in range(updates):
            at = torch.randint(0, len(data) - CONTEXT, (64,))
            x, y = data[at[:, None] + torch.arange(CONTEXT)], data[at + CONTEXT]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()

    losses = watch.history.stat("loss")
    print(f"loss: {losses[0]:.2f} at the start, {losses[-10:].mean():.2f} at the end")
    print(f"alerts: {len([alert for alert in watch.alerts if alert.severity >= 30])}")


if __name__ == "__main__":
    main()
