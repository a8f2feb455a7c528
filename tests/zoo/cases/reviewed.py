"""Healthy runs that rules too sharp have alarmed: passes without a step, gates at zero, small rates, tasks that change."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Blobs, Case, Event, Proof, Setup, Text, classify, fit, healthy, mlp
from tests.zoo.plain import Plain
from tests.zoo.proofs import converges

CASES: list[Case] = []


def falls(first: int, last: int, below: float) -> Proof:
    """Of some updates the median loss of the last five is below `below` times that of the first five."""

    def proof(plain: Plain) -> str:
        losses = plain.losses[first:last]
        a, b = median(losses[:5]), median(losses[-5:])
        assert b < below * a, f"from update {first} to {last} the loss goes from {a:.4g} to {b:.4g}, not below {below:g} of it"
        return f"from update {first} to {last} the loss falls from {a:.4g} to {b:.4g}"

    return proof


@healthy(
    CASES,
    "rv_fisher_information_between_two_tasks",
    source="https://arxiv.org/abs/1612.00796 elastic weight consolidation: gradients of single samples, cleared and squared, and no step",
    proof=falls(0, 40, 0.6),
)
def _(seed: int) -> Setup:
    model, data, single = mlp(nn.ReLU, 2), Blobs(seed), Blobs(seed, batch=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss, sample = classify(model, data), classify(model, single)

    def train() -> Iterator[Event]:
        for i in range(90):
            model.zero_grad()
            value = loss(i) if i < 40 else sample(i)
            value.backward()
            yield "read", [value]
            if i < 40:
                optimizer.step()
            yield "step", [optimizer] if i < 40 else []

    return Setup(model, train)


class Fading(nn.Module):
    """A branch that a gate lets in little by little."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Linear(16, 32), mlp(nn.ReLU, 1, inputs=32, outputs=32)
        self.gate, self.head = Gate(), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        out: Tensor = self.head(h + self.gate(self.branch(h)))
        return out


class Gate(nn.Module):
    """What it lets through is a buffer, 0 at first."""

    alpha: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha


@healthy(
    CASES,
    "rv_branch_that_is_faded_in_late",
    source="https://arxiv.org/abs/1710.10196 Karras et al., progressive growing: new layers are faded in while the others train",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model = Fading()

    def open_gate(i: int) -> None:
        model.gate.alpha.fill_(min(1.0, max(0.0, (i - 40) / 40)))

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return fit(model, classify(model, Blobs(seed)), optimizer, 120, open_gate)


class Lm(nn.Module):
    """A bigram model of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 32)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.body = mlp(nn.GELU, 1, 64, 32, 24)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(self.embedding(x))
        return out


def likelihood(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`[batch]`: logarithm of the probability of each text."""
    return model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0].sum(-1)


def prefers(plain: Plain) -> str:
    a, b = median(plain.losses[:20]), median(plain.losses[-20:])
    assert b < a - 5e-4, f"the preference loss goes from {a:.5f} to {b:.5f}"
    return f"the preference loss falls from {a:.5f} to {b:.5f}"


@healthy(
    CASES,
    "rv_preferences_at_a_small_rate",
    source="https://arxiv.org/abs/2305.18290 Rafailov et al., direct preference optimisation: rates of 5e-7 to 1e-6",
    proof=prefers,
)
def _(seed: int) -> Setup:
    model = Lm()
    chosen, rejected = Text(seed), Text(seed + 500)
    first = torch.optim.Adam(model.parameters(), lr=3e-3)
    for i in range(100):
        first.zero_grad()
        classify(model, chosen if i % 2 else rejected)(i).backward()
        first.step()
    reference = copy.deepcopy(model).requires_grad_(False)

    def loss(i: int) -> Tensor:
        good, bad = chosen(), rejected()
        margin = [likelihood(model, *pair) - likelihood(reference, *pair) for pair in (good, bad)]
        return -F.logsigmoid(0.5 * (margin[0] - margin[1])).mean()

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-6), 150)


@healthy(
    CASES,
    "rv_probe_made_anew_for_every_task",
    source="https://arxiv.org/abs/1312.6211 Goodfellow et al.: tasks one after the other, each with a head of its own",
    proof=falls(60, 120, 0.3),
)
def _(seed: int) -> Setup:
    head = nn.Linear(32, 4)
    g = torch.Generator().manual_seed(8000 + seed)

    def train() -> Iterator[Event]:
        for _ in range(3):
            centres = torch.randn(4, 32, generator=g)
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
            optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
            rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
            for _ in range(60):
                y = torch.randint(4, (64,), generator=g)
                optimizer.zero_grad()
                value = F.cross_entropy(head(0.7 * centres[y] + torch.randn(64, 32, generator=g)), y)
                value.backward()
                yield "read", [value]
                optimizer.step()
                rate.step()
                yield "step", [optimizer]

    return Setup(head, train)


class Corrected(nn.Module):
    """The logits of a base that stays as it is, and a bounded correction."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.correction = base.requires_grad_(False), mlp(nn.ReLU, 1, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.correction(x).sigmoid()
        return out


@healthy(
    CASES,
    "rv_bounded_correction_of_frozen_logits",
    source="https://arxiv.org/abs/1906.02530 recalibration beside a frozen classifier; a sigmoid keeps the correction small",
    proof=converges(0.95),
)
def _(seed: int) -> Setup:
    base, data = mlp(nn.ReLU, 1), Blobs(seed, batch=128, spread=2.5)
    first = torch.optim.Adam(base.parameters(), lr=3e-3)
    for i in range(25):
        first.zero_grad()
        classify(base, data)(i).backward()
        first.step()
    model = Corrected(base)
    return fit(model, classify(model, data), torch.optim.Adam(model.correction.parameters(), lr=3e-3), 150)


@healthy(
    CASES,
    "rv_escape_from_a_saddle",
    source="https://arxiv.org/abs/1602.06664 Sun et al., phase retrieval: from a small start the gradient grows until the signal is found",
    proof=converges(0.01),
)
def _(seed: int) -> Setup:
    model = nn.Linear(20, 1, bias=False)
    nn.init.normal_(model.weight, std=3e-4)
    g = torch.Generator().manual_seed(8100 + seed)
    x, truth = torch.randn(400, 20, generator=g), torch.randn(20, generator=g)
    y = (x @ truth).square()
    optimizer = torch.optim.SGD(model.parameters(), lr=4e-4)
    return fit(model, lambda i: F.mse_loss(model(x)[:, 0].square(), y), optimizer, 300)
