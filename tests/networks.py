"""Small networks of every make, each with its own data and optimizer: the ground on which a watch may do no harm.

`NETWORKS` maps a name to a builder. A builder seeds everything, so two calls give two equal trainings; the data comes from a
generator of its own, so the global random state belongs to the network (dropout, VAE noise, GAN noise). All classes stand at module
level: a model must pickle.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

UPDATES = 12


@dataclass
class Training:
    """A model, its optimizers, and one update of its training loop.

    Attributes:
        model: what a user would hand to the watch: a module, or a mapping of names to modules.
        optimizers: all that step in an update.
        update: one turn of the loop, given its number.
        records: parameter updates in one turn (a GAN's turn has two).
    """

    model: nn.Module | dict[str, nn.Module]
    optimizers: tuple[torch.optim.Optimizer, ...]
    update: Callable[[int], object]
    records: int = 1

    def modules(self) -> dict[str, nn.Module]:
        return self.model if isinstance(self.model, dict) else {"": self.model}

    def run(self, updates: int = UPDATES, start: int = 0) -> None:
        for i in range(start, start + updates):
            self.update(i)


NETWORKS: dict[str, Callable[[], Training]] = {}


def network(build: Callable[[], Training]) -> Callable[[], Training]:
    def seeded() -> Training:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return build()

    NETWORKS[build.__name__] = seeded
    return seeded


def supervised(
    model: nn.Module,
    data: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> Training:
    """The plain loop over batches drawn from `data`."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    batches = [data(generator) for _ in range(4)]

    def update(i: int) -> None:
        x, y = batches[i % len(batches)]
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()

    return Training(model, (optimizer,), update)


def vectors(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 12, generator=generator)
    return x, (x[:, 0] + x[:, 1] > 0).long()


def images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 3, 8, 8, generator=generator)
    return x, (x.mean((1, 2, 3)) > 0).long()


def tokens(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A sequence and its successor: a walk around 23 tokens, with noise."""
    start = torch.randint(0, 23, (8, 1), generator=generator)
    walk = (start + 3 * torch.arange(11)) % 23
    noise = torch.randint(0, 23, walk.shape, generator=generator)
    walk = torch.where(torch.rand(walk.shape, generator=generator) < 0.1, noise, walk)
    return walk[:, :-1], walk[:, 1:]


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def predict(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@network
def mlp() -> Training:
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 2))
    return supervised(model, vectors, classify)


class Block(nn.Module):
    """A residual block that adds in place behind an in-place ReLU: what a full backward hook breaks."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.conv2(self.relu(self.conv1(x)))
        x += shortcut
        return self.relu(x)


@network
def cnn_in_place() -> Training:
    model = nn.Sequential(Block(3, 6), Block(6, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    return supervised(model, images, classify, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))


@network
def batch_norm() -> Training:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(216, 12),
        nn.BatchNorm1d(12),
        nn.Linear(12, 2),
    )
    return supervised(model, images, classify)


@network
def dropout() -> Training:
    model = nn.Sequential(
        nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 2)
    )
    return supervised(model, vectors, classify)


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 12)
        self.body = cell(12, 16, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(16, 23)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.body(self.embedding(x))
        out: Tensor = self.head(hidden)
        return out


@network
def lstm() -> Training:
    return supervised(Recurrent(nn.LSTM), tokens, predict)


@network
def gru() -> Training:
    return supervised(Recurrent(nn.GRU), tokens, predict)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 23)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        out: Tensor = self.head(self.body(self.embedding(x), mask=mask))
        return out


@network
def transformer_encoder() -> Training:
    return supervised(Encoder(), tokens, predict)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 16)
        self.body = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True), 2)
        self.head = nn.Linear(16, 23)

    def forward(self, x: Tensor) -> Tensor:
        memory = self.embedding(x.flip(1))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        out: Tensor = self.head(self.body(self.embedding(x), memory, tgt_mask=mask))
        return out


@network
def transformer_decoder() -> Training:
    return supervised(Decoder(), tokens, predict)


class Bag(nn.Module):
    """Next token from the current one."""

    def __init__(self, *, sparse: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 16, sparse=sparse)
        self.head = nn.Linear(16, 23, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(x))
        return out


@network
def embedding_dense() -> Training:
    return supervised(Bag(), tokens, predict)


@network
def embedding_sparse() -> Training:
    """Two optimizers on one model: one for the sparse gradient, one for the rest."""
    model = Bag(sparse=True)
    sparse = torch.optim.SparseAdam(model.embedding.parameters(), lr=1e-2)
    dense = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    batches = [tokens(torch.Generator().manual_seed(i)) for i in range(4)]

    def update(i: int) -> None:
        x, y = batches[i % len(batches)]
        sparse.zero_grad()
        dense.zero_grad()
        predict(model, x, y).backward()
        sparse.step()
        dense.step()

    return Training(model, (sparse, dense), update)


@network
def embedding_tied() -> Training:
    return supervised(Bag(tied=True), tokens, predict)


@network
def gan() -> Training:
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    discriminator = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    step_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    step_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))

    def update(_: int) -> None:
        real = torch.randn(16, 2) * 0.3 + 1.0
        fake = generator(torch.randn(16, 4))
        step_d.zero_grad()
        (F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake.detach())).mean()).backward()
        step_d.step()
        step_g.zero_grad()
        F.softplus(-discriminator(fake)).mean().backward()
        step_g.step()

    return Training({"generator": generator, "discriminator": discriminator}, (step_g, step_d), update, records=2)


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 12))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(z), (mean, log_variance)


def elbo(model: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    out, (mean, log_variance) = model(x)
    return F.mse_loss(out, x) + 0.1 * (mean**2 + log_variance.exp() - log_variance - 1).mean()


@network
def vae() -> Training:
    return supervised(Vae(), vectors, elbo)


class Reuse(nn.Module):
    """One layer called three times in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.shared = nn.Linear(16, 16)
        self.last = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(3):
            x = x + torch.tanh(self.shared(x))
        out: Tensor = self.last(x)
        return out


@network
def module_reuse() -> Training:
    return supervised(Reuse(), vectors, classify)


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]


class Structured(nn.Module):
    """A body that returns a dict, under a model that returns a dataclass."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"layer[0]": nn.Linear(12, 16), "[bold]": nn.Linear(16, 16)})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            states = {}
            for name, layer in self.layers.items():
                states[name] = x = torch.relu(layer(x))
            return states

    def __init__(self) -> None:
        super().__init__()
        self.body = Structured.Body()
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Output:
        states = tuple(self.body(x).values())
        return Output(self.head(states[-1]), states)


def structured_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return F.cross_entropy(out.logits, y) + 1e-3 * sum(h.square().mean() for h in out.hidden)


@network
def dict_and_dataclass_outputs() -> Training:
    return supervised(Structured(), vectors, structured_loss)


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(12, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.1)) for _ in range(3))
        self.last = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        out: Tensor = self.last(x)
        return out


@network
def checkpointing() -> Training:
    return supervised(Checkpointed(reentrant=False), vectors, classify)


@network
def checkpointing_reentrant() -> Training:
    return supervised(Checkpointed(reentrant=True), vectors, classify)


def autocast_classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    return F.cross_entropy(out.float(), y)


@network
def bf16_autocast() -> Training:
    model = nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    return supervised(model, vectors, autocast_classify)


def fingerprint(training: Training) -> dict[str, object]:
    """Everything that training leaves behind, as bits: weights, buffers, gradients, optimizer state, random states."""
    bits: dict[str, object] = {}

    def put(name: str, value: object) -> None:
        if isinstance(value, Tensor):
            if value.is_sparse:
                value = value.coalesce()
                put(f"{name}.indices", value.indices())
                value = value.values()
            bits[name] = (value.dtype, tuple(value.shape), value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                put(f"{name}.{key}", item)
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                put(f"{name}.{i}", item)
        else:
            bits[name] = value

    for key, module in training.modules().items():
        put(f"model.{key}", module.state_dict())
        put(f"grad.{key}", {name: p.grad for name, p in module.named_parameters()})
    for i, optimizer in enumerate(training.optimizers):
        put(f"optimizer.{i}", optimizer.state_dict())
    return bits | random_states()


def random_states() -> dict[str, object]:
    """The global generators of torch, numpy and Python."""
    algorithm, keys, *rest = np.random.get_state()
    return {
        "random.torch": torch.get_rng_state().numpy().tobytes(),
        "random.numpy": (algorithm, keys.tobytes(), *rest),
        "random.python": random.getstate(),
    }
