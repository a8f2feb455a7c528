"""The training that would have died: a language model whose data pipeline now and then delivers a broken batch.

Run: `python examples/training_that_would_have_died.py [updates]` (half a minute). A small transformer learns to write like the Python
standard library, at a high learning rate. A few of its batches are broken as real ones are: sample weights in the wrong unit, garbage
with wrong labels, and a mask that leaves no token, whose mean is 0/0. It trains on the sound batches alone; with the broken ones,
under a watch that only watches; and once more, under one that leaves out updates with a NaN in their gradient and clips the others.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gradwatch import GradWatch
from gradwatch.clip import GlobalNorm

CONTEXT, BATCH, LR = 64, 8, 1e-2
BAD = {"wrong unit": 3, "garbage": 3, "no token": 3}
"""Broken batches in a training, by what is broken in them."""


def corpus(size: int = 400_000) -> tuple[Tensor, Tensor]:
    """Source code that is on every machine with Python, as bytes: to train on, and held out."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    data = torch.tensor(list(b"".join(file.read_bytes() for file in files)[:size]))
    return data[: size * 9 // 10], data[size * 9 // 10 :]


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class LanguageModel(nn.Module):
    """Names the next byte at each place."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.token(tokens) + self.position.weight)))
        return out


def windows(data: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    at = torch.randint(0, len(data) - CONTEXT - 1, (count, 1), generator=generator) + torch.arange(CONTEXT + 1)
    return data[at[:, :-1]], data[at[:, 1:]]


def batches(data: Tensor, updates: int, seed: int, bad: dict[str, int]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, next tokens and the weight of each; from the seed, also which are broken."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [kind for kind, count in bad.items() for _ in range(count)]
    broken = dict(zip(random.Random(seed).sample(range(updates // 5, updates - updates // 10), len(kinds)), kinds, strict=True))
    for update in range(updates):
        x, y = windows(data, BATCH, generator)
        weight = torch.ones(y.shape)
        match broken.get(update):
            case "wrong unit":
                weight *= 1000
            case "garbage":
                x, y = torch.full_like(x, int(x[0, 0])), torch.randint(128, 256, (BATCH, 1), generator=generator).expand(y.shape)
                weight *= 100
            case "no token":
                weight *= 0
        yield x, y, weight


def loss_of(model: nn.Module, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    losses = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
    return (losses * weight.flatten()).sum() / (weight > 0).sum()


def held_out_loss(model: nn.Module, held_out: Tensor) -> float:
    with torch.no_grad():
        x, y = windows(held_out, 256, torch.Generator().manual_seed(0))
        return float(loss_of(model, x, y, torch.ones(y.shape)))


def train(data: tuple[Tensor, Tensor], updates: int, bad: dict[str, int], **protection: Any) -> list[str]:
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    with GradWatch(model, console=False, **protection) as watch:
        for x, y, weight in batches(data[0], updates, seed=0, bad=bad):
            optimizer.zero_grad()
            loss_of(model, x, y, weight).backward()
            optimizer.step()
    norms, left_out = watch.history.stat("total_norm"), watch.history.stat("skipped")
    spikes = (norms[norms < math.inf] > 100).sum()
    return [f"{held_out_loss(model, data[1]):.2f}", f"{left_out.sum():.0f}", f"{spikes}"]


def main(updates: int = 400) -> None:
    torch.set_num_threads(1)
    data = corpus()
    table = Table("training", "held-out loss", "left out", "norms over 100")
    table.add_row("sound batches", *train(data, updates, {}))
    table.add_row("broken ones too", *train(data, updates, BAD))
    table.add_row("the same, protected", *train(data, updates, BAD, on_nonfinite="skip", clip=GlobalNorm(1.0)))
    print(f"{updates} updates, {sum(BAD.values())} of them on broken batches: {', '.join(BAD)}")
    Console().print(table)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
