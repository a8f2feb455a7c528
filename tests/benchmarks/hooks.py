"""What looking inside costs: `python tests/benchmarks/hooks.py [--profile] [mlp tiny gpt]`.

One thread, CPU time, every update looked at (`Sampling(dense=10**9)`) against none, on the same model in turns. Printed for each
network: microseconds per update and per leaf module, and torch calls per update that the looking adds (operators, by the profiler).
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from gradwatch import GradWatch, Sampling


def mlp(width: int, depth: int) -> nn.Module:
    """Linear and ReLU in turn."""
    return nn.Sequential(*[part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())])


class Block(nn.Module):
    """A transformer's block with a 3-D Linear in every place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm2, self.up, self.act, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(self.act(self.up(self.norm2(x))))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "tiny": lambda: (mlp(8, 10), torch.randn(8, 8)),
    "mlp": lambda: (mlp(256, 10), torch.randn(64, 256)),
    "gpt": lambda: (nn.Sequential(*[Block(64) for _ in range(4)]), torch.randn(4, 32, 64)),
}


class Training:
    """One training, with a watch that looks at every update or at none."""

    def __init__(self, name: str, looks: bool) -> None:
        torch.manual_seed(0)
        self.model, self.x = NETWORKS[name]()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.watch = GradWatch(self.model, console=False, rules=[], sampling=Sampling(dense=10**9 if looks else 0, every=10**9))
        self.seconds: list[float] = []

    def update(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        self.optimizer.step()

    def turn(self, updates: int) -> None:
        begin = time.process_time()
        for _ in range(updates):
            self.update()
        self.seconds.append((time.process_time() - begin) / updates)


def operators(training: Training) -> int:
    """How many operators one update calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        training.update()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))


def measure(name: str, rounds: int) -> str:
    """The line of one network."""
    bare, looking = Training(name, looks=False), Training(name, looks=True)
    with bare.watch, looking.watch:
        for training in (bare, looking):
            training.turn(20)
            training.seconds.clear()
        calls = operators(looking) - operators(bare)
        for _ in range(rounds):
            bare.turn(5)
            looking.turn(5)
    leaves = sum(not list(module.children()) for module in bare.model.modules())
    spent = [b - a for a, b in zip(bare.seconds, looking.seconds, strict=True)]
    middle, extra = (1e6 * sorted(times)[len(times) // 2] for times in (bare.seconds, spent))
    return (
        f"{name:6} {middle:7.0f} us, {extra:6.0f} more to look: {extra / leaves:5.1f} us and {calls / leaves:4.1f} operators a leaf"
    )


def main() -> None:
    """Measure, or profile, the networks that are named."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.networks:
        if not arguments.profile:
            print(measure(name, 200))
            continue
        training = Training(name, looks=True)
        with training.watch:
            training.turn(20)
            profile = cProfile.Profile()
            profile.enable()
            training.turn(100)
            profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
