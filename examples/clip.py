"""Clipping by the watch: a recurrent network whose gradient explodes learns once its norm is capped.

Run: `python examples/clip.py` (seconds). The same training twice: without, then with `clip=1.0`. The norm that the watch has read
anyway is the one it clips with, so watching and clipping together cost what clipping costs; the history keeps the norm from before.
"""

from __future__ import annotations

import inspect
import textwrap

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradwatch import GradWatch

LENGTH = 48


class CharacterModel(nn.Module):
    """Reads a line of characters with a plain recurrent layer and names the next one at each place."""

    def __init__(self, characters: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.recurrent = nn.RNN(width, width, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(width, characters)
        # Every step through time passes on a little more than it got: over 48 steps, a lot.
        nn.init.orthogonal_(self.recurrent.weight_hh_l0, gain=1.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.recurrent(self.embedding(x))
        out: Tensor = self.head(hidden)
        return out


def train(clip: float | None, updates: int = 150) -> None:
    torch.manual_seed(0)
    source = inspect.getsource(textwrap)
    alphabet = sorted(set(source))
    data = torch.tensor([alphabet.index(c) for c in source])
    model = CharacterModel(len(alphabet))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

    with GradWatch(model, clip=clip) as watch:
        for _ in range(updates):
            at = torch.randint(0, len(data) - LENGTH - 1, (16, 1)) + torch.arange(LENGTH + 1)
            optimizer.zero_grad()
            logits = model(data[at[:, :-1]])
            F.cross_entropy(logits.flatten(0, 1), data[at[:, 1:]].flatten()).backward()
            optimizer.step()

    losses, norms, factors = (watch.history.stat(name) for name in ("loss", "total_norm", "clip_coef"))
    print(f"clip={clip}: loss {losses[0]:.2f} -> {losses[-10:].mean():.2f}, largest gradient norm {norms.max():.3g}, ", end="")
    print(f"{(factors < 1).sum()} of {len(factors)} updates clipped")


def main() -> None:
    torch.set_num_threads(1)
    train(clip=None)
    train(clip=1.0)


if __name__ == "__main__":
    main()
