"""What a run of the zoo is, and the few pieces that many of them share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from tests.zoo.plain import Plain

Event = tuple[str, Any]
"""("read", [losses]) after the backward passes of an update, ("step", [optimizers]) after its steps ([]: the update was skipped)."""


@dataclass
class Setup:
    """A run about to start.

    Attributes:
        model: what is watched.
        train: the loop: a generator that yields an `Event` where something can be recorded.
    """

    model: nn.Module | Mapping[str, nn.Module]
    train: Callable[[], Iterator[Event]]


Proof = Callable[["Plain"], str]
"""Of a run without a watch: says what was measured, for example "the gradient of 0.weight is 3e-08 of that of 14.weight".

Raises AssertionError, with the measured number, where the fault (or, of a healthy run, the success) is not there.
"""


@dataclass(frozen=True)
class Case:
    """One run of the zoo and what is true of it.

    Attributes:
        name: no other case has it.
        build: seed -> a run.
        rules: any of these names the fault; () for a healthy run.
        region: modules that are sick, by name; a module below one of them counts. () for a fault without a place.
        onset: the update at which the fault begins.
        also: rules that are true of it as well, and no false alarm beside one of `rules`.
        within: updates from the onset to the verdict; None: those of the design, 15 for a fault present from the start, 10 for a later one,
            100 for a plateau.
        source: where such a run was reported, or the text that it follows: an address and a few words.
        proof: shows by plain torch that the fault is there; of a healthy run that it converges.
    """

    name: str
    build: Callable[[int], Setup]
    rules: tuple[str, ...] = ()
    region: tuple[str, ...] = ()
    onset: int = 0
    also: tuple[str, ...] = ()
    within: int | None = None
    source: str = ""
    proof: Proof | None = None


Build = Callable[[int], Setup]


def sick(
    cases: list[Case],
    name: str,
    rules: tuple[str, ...],
    region: tuple[str, ...] = (),
    *,
    source: str,
    proof: Proof,
    onset: int = 0,
    also: tuple[str, ...] = (),
    within: int | None = None,
) -> Callable[[Build], Build]:
    """Add the decorated function, which builds the run of a seed, as a sick case."""

    def add(build: Build) -> Build:
        cases.append(Case(name, build, rules, region, onset, also, within, source, proof))
        return build

    return add


def healthy(cases: list[Case], name: str, *, source: str, proof: Proof) -> Callable[[Build], Build]:
    """Add the decorated function, which builds the run of a seed, as a healthy case."""

    def add(build: Build) -> Build:
        cases.append(Case(name, build, source=source, proof=proof))
        return build

    return add


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    updates: int = 50,
    before: Callable[[int], None] | None = None,
    between: Callable[[int], None] | None = None,
) -> Setup:
    """The plain loop. `before(i)` runs before the forward of update i, `between(i)` between its backward and the step."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> Iterator[Event]:
        for i in range(updates):
            if before:
                before(i)
            optimizer.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]
            if between:
                between(i)
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


class Blobs:
    """Classes that are Gaussian clouds, with some overlap; batches are drawn from a generator of their own."""

    def __init__(self, seed: int, features: int = 16, classes: int = 4, batch: int = 32, spread: float = 1.0) -> None:
        self.generator = torch.Generator().manual_seed(1000 + seed)
        self.centres = torch.randn(classes, features, generator=self.generator)
        self.batch, self.spread = batch, spread

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(len(self.centres), (self.batch,), generator=self.generator)
        noise = torch.randn(self.batch, self.centres.shape[1], generator=self.generator)
        return self.centres[y] + self.spread * noise, y


class Pictures:
    """8 x 8 pictures of one channel: a bar at a place that depends on the class, in noise."""

    def __init__(self, seed: int, classes: int = 8, batch: int = 16, size: int = 8, channels: int = 1) -> None:
        self.generator = torch.Generator().manual_seed(2000 + seed)
        self.classes, self.batch, self.size, self.channels = classes, batch, size, channels

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(self.classes, (self.batch,), generator=self.generator)
        x = 0.5 * torch.randn(self.batch, self.channels, self.size, self.size, generator=self.generator)
        for k, c in enumerate(y.tolist()):
            x[k, :, :, c % self.size] += 1.5 if c < self.size else -1.5
        return x, y


class Text:
    """Tokens of a Markov chain, as (input, next token), each `[batch, length]`."""

    def __init__(self, seed: int, vocabulary: int = 24, batch: int = 8, length: int = 16) -> None:
        self.generator = torch.Generator().manual_seed(3000 + seed)
        self.table = torch.softmax(3 * torch.randn(vocabulary, vocabulary, generator=self.generator), -1)
        self.batch, self.length = batch, length

    def __call__(self) -> tuple[Tensor, Tensor]:
        t = torch.randint(len(self.table), (self.batch,), generator=self.generator)
        out = [t]
        for _ in range(self.length):
            t = torch.multinomial(self.table[t], 1, generator=self.generator)[:, 0]
            out.append(t)
        x = torch.stack(out, 1)
        return x[:, :-1], x[:, 1:]


def mlp(
    act: Callable[[], nn.Module], depth: int, width: int = 32, inputs: int = 16, outputs: int = 4, bias: bool = True
) -> nn.Sequential:
    """`depth` hidden layers, each followed by `act()`, and a head: Linear layers are at 0, 2, ..., 2 * depth."""
    sizes = [inputs] + [width] * depth
    hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b, bias=bias), act())]
    return nn.Sequential(*hidden, nn.Linear(width, outputs, bias=bias))


def classify(
    model: nn.Module, data: Callable[[], tuple[Tensor, Tensor]], scale: float = 1.0, **options: Any
) -> Callable[[int], Tensor]:
    """Cross-entropy of the model on a fresh batch an update."""

    def loss(i: int) -> Tensor:
        x, y = data()
        out = model(x)
        return scale * F.cross_entropy(out.flatten(0, -2), y.flatten(), **options)

    return loss


def initialise(
    model: nn.Module, rule: Callable[[nn.Parameter], object], kinds: tuple[type, ...] = (nn.Linear, nn.Conv2d)
) -> nn.Module:
    """Apply `rule` to the weights of some modules and zero their biases."""
    for m in model.modules():
        if isinstance(m, kinds):
            rule(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return model


def evens(first: int, last: int) -> tuple[str, ...]:
    """Names of the Linear layers from `first` to `last`, inclusive, of a network made by `mlp`."""
    return tuple(str(i) for i in range(first, last + 1, 2))
