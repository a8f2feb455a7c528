"""Runs on sequences, sets and graphs: language models, recommenders, graph nets, forecasters, adapters, distillation, preferences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import Case, Event, Proof, Setup, Text, classify, fit, healthy, sick
from tests.zoo.plain import Plain
from tests.zoo.proofs import (
    converges,
    dead_fraction,
    every,
    first_non_finite,
    gradient_ratio,
    gradient_spikes,
    loss_grows,
    loss_stays,
    no_gradient,
    unchanged,
    update_ratio,
    zero_gradient,
)

CASES: list[Case] = []


# Shared pieces


class Attention(nn.Module):
    """Multi-head self-attention written out; `keep` is True where a position may look, `[batch, 1 or heads, queries, keys]`."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if keep is not None:
            scores = scores.masked_fill(~keep, -math.inf)
        mixed = scores.softmax(-1) @ v
        return cast(Tensor, self.out(mixed.transpose(1, 2).reshape(b, n, d)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), keep)
        return cast(Tensor, x + self.down(self.act(self.up(self.norm2(x)))))


class Decoder(nn.Module):
    """A small GPT: tokens and positions, blocks under a causal mask of -inf, a norm and a head."""

    def __init__(self, vocabulary: int, width: int = 32, depth: int = 2, length: int = 16, tied: bool = False, std: float = 0.02):
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=std)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        keep = torch.ones(n, n, dtype=torch.bool).tril()
        x = self.embed(tokens) + self.position.weight[:n]
        for block in self.blocks:
            x = block(x, keep)
        return cast(Tensor, self.head(self.norm(x)))


class Recurrent(nn.Module):
    """An embedding, a GRU or LSTM over it and a head at every position."""

    def __init__(self, vocabulary: int, width: int = 32, cell: type[nn.RNNBase] = nn.GRU) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.rnn = cell(width, width, batch_first=True)  # type: ignore[call-arg, arg-type]
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.rnn(self.embed(tokens))[0]))


class Bags:
    """Documents as `[batch, length]` tokens, with a class: each class prefers a third of the vocabulary."""

    def __init__(self, seed: int, vocabulary: int = 60, classes: int = 3, batch: int = 32, length: int = 12) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.vocabulary, self.classes, self.batch, self.length = vocabulary, classes, batch, length

    def __call__(self) -> tuple[Tensor, Tensor]:
        g, each = self.generator, self.vocabulary // self.classes
        y = torch.randint(self.classes, (self.batch,), generator=g)
        topical = torch.randint(each, (self.batch, self.length), generator=g) + each * y[:, None]
        noise = torch.randint(self.vocabulary, (self.batch, self.length), generator=g)
        return torch.where(torch.rand(self.batch, self.length, generator=g) < 0.4, topical, noise), y


class Ratings:
    """(user, item, rating): some users are kinder and some items better; standardised, deviation about 1."""

    def __init__(self, seed: int, users: int = 60, items: int = 40, batch: int = 64) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.u = torch.randn(users, generator=self.generator)
        self.v = torch.randn(items, generator=self.generator)
        self.batch = batch

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        u = torch.randint(len(self.u), (self.batch,), generator=self.generator)
        i = torch.randint(len(self.v), (self.batch,), generator=self.generator)
        noise = 0.1 * torch.randn(self.batch, generator=self.generator)
        return u, i, 0.7 * (self.u[u] + self.v[i]) + noise


class Series:
    """Windows of noisy waves of several periods, `[batch, length, 1]`, and the next value `[batch, 1]`."""

    def __init__(self, seed: int, batch: int = 32, length: int = 16, noise: float = 0.05) -> None:
        self.generator = torch.Generator().manual_seed(6000 + seed)
        self.batch, self.length, self.noise = batch, length, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        g = self.generator
        speed = 0.3 + 0.5 * torch.rand(self.batch, 1, generator=g)
        phase = 6.3 * torch.rand(self.batch, 1, generator=g)
        wave = 1.4 * torch.sin(phase + speed * torch.arange(self.length + 1))
        wave = wave + self.noise * torch.randn(wave.shape, generator=g)
        return wave[:, :-1, None], wave[:, -1:]


class Forecaster(nn.Module):
    """An LSTM or GRU over a window and a linear head on its last state."""

    def __init__(self, features: int = 1, width: int = 24, cell: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = cell(features, width, batch_first=True)  # type: ignore[call-arg, arg-type]
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.rnn(x)[0][:, -1]))


class Low(nn.Module):
    """A frozen Linear with a low-rank adapter: W x + B A x."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.base(x) + 2 * self.lora_b(self.lora_a(x)))


class Graphs:
    """Graphs of nodes in three communities: `(features, mean over the neighbours and itself, community)`; the features are weak."""

    def __init__(self, seed: int, batch: int = 4, nodes: int = 24, mean: bool = True) -> None:
        self.generator = torch.Generator().manual_seed(9000 + seed)
        self.centres = torch.randn(3, 8, generator=self.generator)
        self.batch, self.nodes, self.mean = batch, nodes, mean

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        g, b, n = self.generator, self.batch, self.nodes
        y = torch.randint(3, (b, n), generator=g)
        x = 0.7 * self.centres[y] + torch.randn(b, n, 8, generator=g)
        odds = torch.where(y[:, :, None] == y[:, None, :], 0.5, 0.1)
        linked = (torch.rand(b, n, n, generator=g) < odds).float().triu(1)
        adjacent = linked + linked.transpose(1, 2) + torch.eye(n)
        return x, adjacent / adjacent.sum(-1, keepdim=True) if self.mean else adjacent, y


class Headed(nn.Module):
    """A frozen encoder with two adapters and a new head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(60, 32).requires_grad_(False)
        self.layers = nn.Sequential(Low(nn.Linear(32, 32)), nn.Tanh(), Low(nn.Linear(32, 32)), nn.Tanh())
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.layers(self.embed(x))))


class Averaged(nn.Module):
    """The mean of the word vectors, tanh layers on it, and a head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(60, width)
        self.body = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(width, width), nn.Tanh())))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.body(self.embed(x))))


def regress(model: nn.Module, data: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[int], Tensor]:
    """Mean squared error of the model on a fresh batch an update."""

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return loss


def finite_before(update: int) -> Proof:
    """Losses and gradients are finite until then, and the loss has not grown."""

    def proof(plain: Plain) -> str:
        assert all(math.isfinite(x) for x in plain.losses[:update])
        assert not any(sum(n[:update]) for n in plain.nonfinite.values())
        assert plain.losses[update - 1] < 1.5 * plain.losses[0]
        return f"finite before {update}"

    return proof


def reads(what: Callable[[Plain], float], low: float, high: float, say: str) -> Proof:
    """A number taken from the run lies between two others."""

    def proof(plain: Plain) -> str:
        value = what(plain)
        assert low < value < high, f"{say}: {value:.4g}, not in {low:g} .. {high:g}"
        return f"{say}: {value:.4g}"

    return proof


# Sick runs


class Tagger(nn.Module):
    def __init__(self, vocabulary: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        real = tokens != 0
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, real[:, None, None, :])
        return cast(Tensor, self.head((x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)))


@sick(
    CASES,
    "wd_padded_document",
    ("non_finite_activation",),
    ("blocks.0.attn",),
    source="https://github.com/pytorch/pytorch/issues/24816 a row that is all padding makes NaN of the attention",
    onset=12,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    proof=every(
        first_non_finite(12, "blocks.0.attn"),
        finite_before(12),
        reads(lambda p: sum(o.nonfinite for o in p.outputs["blocks.0.norm1"][:13] if o), -1, 1, "bad values that enter it"),
    ),
)
def _(seed: int) -> Setup:
    data = Bags(seed)
    model = Tagger(61, 3)

    def loss(i: int) -> Tensor:
        x, y = data()
        x = x + 1
        for row in range(len(x)):  # documents of different lengths
            x[row, 4 + row % 8 :] = 0
        if i == 12:
            x[5] = 0  # an empty document
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 3e-3), 30)


class Speech(nn.Module):
    def __init__(self, symbols: int = 8, width: int = 32) -> None:
        super().__init__()
        self.rnn = nn.GRU(symbols, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, symbols + 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.head(self.rnn(x)[0]), -1)


class Spoken:
    """Sequences of symbols, each heard for two frames with noise; `[batch, frames, symbols]` and labels from 1."""

    def __init__(self, seed: int, symbols: int = 8, batch: int = 16, length: int = 5) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.symbols, self.batch, self.length = symbols, batch, length

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(self.symbols, (self.batch, self.length), generator=self.generator)
        x = 2 * F.one_hot(y.repeat_interleave(2, 1), self.symbols).float()
        return x + 0.5 * torch.randn(x.shape, generator=self.generator), y + 1


@sick(
    CASES,
    "wd_ctc_label_longer_than_sound",
    ("non_finite_loss",),
    source="https://github.com/meijieru/crnn.pytorch/issues/235 CTC is inf where the label does not fit into the frames",
    onset=14,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
    proof=every(
        finite_before(14),
        first_non_finite(14),
        reads(lambda p: sum(o.nonfinite for o in p.outputs["head"][:15] if o), -1, 1, "bad values that reach the loss"),
        reads(lambda p: float(math.isfinite(p.losses[14])), -1, 0.5, "loss 14 is finite"),
    ),
)
def _(seed: int) -> Setup:
    data, model = Spoken(seed), Speech()

    def loss(i: int) -> Tensor:
        x, y = data()
        frames = torch.full((len(x),), x.shape[1])
        if i == 14:
            frames[3] = 4  # a clip that was cut: 4 frames for 5 symbols
        sizes = torch.full((len(y),), y.shape[1])
        return F.ctc_loss(model(x).transpose(0, 1), y, frames, sizes)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 32)


class Normalised(Recurrent):
    """It ends in a softmax."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(vocabulary)
        self.softmax = nn.Softmax(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.softmax(super().forward(tokens)))


@sick(
    CASES,
    "wd_gru_softmax_twice",
    ("double_softmax",),
    ("softmax",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html CrossEntropyLoss takes logits",
    also=("loss_plateau",),
    proof=every(
        reads(lambda p: max(o.high for o in p.outputs["softmax"][:15] if o), 0, 1.000001, "largest score"),
        reads(lambda p: min(o.low for o in p.outputs["softmax"][:15] if o), -1e-9, 1, "least score"),
        reads(lambda p: p.losses[-1], 1.9, 9, "loss, that logits bring to 1.3"),
    ),
)
def _(seed: int) -> Setup:
    data = Text(seed, 20)
    model = Normalised(20)
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 1e-2), 60)


class Adapted(Decoder):
    """A frozen decoder with adapters at the feed-forward layers, whose blocks run under reentrant checkpoints."""

    reentrant = True

    def __init__(self, vocabulary: int, seed: int) -> None:
        super().__init__(vocabulary)
        data = Text(seed + 500, vocabulary)  # another language
        optimizer = torch.optim.Adam(self.parameters(), 5e-3)
        for _ in range(50):
            x, y = data()
            optimizer.zero_grad()
            F.cross_entropy(super().forward(x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()
        self.zero_grad()
        self.requires_grad_(False)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.up, block.down = Low(block.up), Low(block.down)  # type: ignore[assignment]
        self.head.requires_grad_(True)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        keep = torch.ones(n, n, dtype=torch.bool).tril()
        x = self.embed(tokens) + self.position.weight[:n]
        for block in self.blocks:
            x = cast(Tensor, checkpoint(block, x, keep, use_reentrant=self.reentrant))
        return cast(Tensor, self.head(self.norm(x)))


ADAPTERS = tuple(f"blocks.{b}.{f}.lora_{m}" for b in (0, 1) for f in ("up", "down") for m in "ab")


@sick(
    CASES,
    "wd_lora_reentrant_checkpoint",
    ("missing_gradient",),
    (*ADAPTERS, "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"),
    source="https://github.com/huggingface/transformers/issues/26221 reentrant checkpoints below frozen embeddings: no gradient",
    proof=every(
        no_gradient(*(f"{a}.weight" for a in ADAPTERS)),
        reads(lambda p: min(p.grads["head.weight"]), 1e-4, 1e4, "gradient of the head"),
    ),
)
def _(seed: int) -> Setup:
    data, model = Text(seed), Adapted(24, seed)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return fit(model, classify(model, data), torch.optim.AdamW(wanted, 5e-3), 40)


class Seq2Seq(nn.Module):
    """Reads tokens with a GRU, writes them in reverse order with another one, from the last state of the first."""

    cut = False

    def __init__(self, vocabulary: int = 12, width: int = 48) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"embed": nn.Embedding(vocabulary, width), "rnn": nn.GRU(width, width, batch_first=True)})
        self.decoder = nn.ModuleDict({"embed": nn.Embedding(vocabulary + 1, width), "rnn": nn.GRU(width, width, batch_first=True)})
        self.head = nn.Linear(width, vocabulary)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder["rnn"](self.encoder["embed"](source))
        if self.cut:
            state = state.detach()
        begun = torch.cat([torch.full_like(target[:, :1], self.head.out_features), target[:, :-1]], 1)
        return cast(Tensor, self.head(self.decoder["rnn"](self.decoder["embed"](begun), state)[0]))


def reverse(model: Seq2Seq, seed: int, batch: int = 32, length: int = 5) -> Callable[[int], Tensor]:
    generator = torch.Generator().manual_seed(8000 + seed)

    def loss(i: int) -> Tensor:
        x = torch.randint(model.head.out_features, (batch, length), generator=generator)
        y = x.flip(1)
        return F.cross_entropy(model(x, y).flatten(0, 1), y.flatten())

    return loss


@sick(
    CASES,
    "wd_encoder_state_detached",
    ("missing_gradient",),
    ("encoder",),
    source="https://www.codegenes.net/blog/detach_hidden-pytorch a state is cut from its graph, here at the wrong place",
    proof=every(
        no_gradient("encoder.embed.weight", "encoder.rnn.weight_ih_l0", "encoder.rnn.weight_hh_l0", "encoder.rnn.bias_hh_l0"),
        reads(lambda p: min(p.grads["decoder.rnn.weight_hh_l0"]), 1e-4, 1e4, "gradient of the decoder"),
    ),
)
def _(seed: int) -> Setup:
    model = Seq2Seq()
    model.cut = True
    return fit(model, reverse(model, seed), torch.optim.Adam(model.parameters(), 1e-2), 50)


@sick(
    CASES,
    "wd_thawed_encoder_not_in_optimizer",
    ("not_in_optimizer",),
    ("embed", "mix"),
    source="https://theneuralbase.com/pytorch/learn/intermediate/freezing-base-model-weights/ thawed after the optimizer was made",
    onset=20,
    proof=every(
        no_gradient("embed.weight", "mix.weight", last=20),
        unchanged("embed.weight", "mix.weight", "mix.bias", first=20),
        reads(lambda p: p.steps["head.weight"][30], 1e-6, 10, "step of the head"),
    ),
)
def _(seed: int) -> Setup:
    data = Bags(seed)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.EmbeddingBag(60, 32), nn.Linear(32, 32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.head(torch.tanh(self.mix(self.embed(x)))))

    model = Classifier()
    body = [*model.embed.parameters(), *model.mix.parameters()]
    for p in body:
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), 1e-2)

    def before(i: int) -> None:
        if i == 20:  # thaw; the optimizer is not told
            for p in body:
                p.requires_grad_(True)

    return fit(model, classify(model, data), optimizer, 50, before)


@sick(
    CASES,
    "wd_graph_layers_in_a_list",
    ("not_in_optimizer",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.ModuleList.html layers in a plain list belong to no one",
    proof=every(
        reads(lambda p: float(len(list(p.setup.model.parameters()))), 3.9, 4.1, "parameters"),  # type: ignore[union-attr]
        reads(lambda p: min(cast(Any, p.setup.model).seen[1:15]), 1e-4, 1e3, "gradient of what is in the list"),
        reads(lambda p: cast(Any, p.setup.model).moved(), -1, 1e-30, "movement of what is in the list"),
    ),
)
def _(seed: int) -> Setup:
    data = Graphs(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(8, 32)
            self.layers = [nn.Linear(32, 32) for _ in range(3)]  # should be a ModuleList
            self.head = nn.Linear(32, 3)
            self.seen: list[float] = []
            self.first = [layer.weight.detach().clone() for layer in self.layers]

        def moved(self) -> float:
            return max(float((a.weight.detach() - b).abs().max()) for a, b in zip(self.layers, self.first, strict=True))

        def forward(self, x: Tensor, adjacent: Tensor) -> Tensor:
            x = torch.relu(self.enter(x))
            for layer in self.layers:
                x = torch.relu(adjacent @ layer(x))
            return cast(Tensor, self.head(x))

    model = Net()

    def loss(i: int) -> Tensor:
        grad = model.layers[0].weight.grad
        model.seen.append(0.0 if grad is None else float(grad.norm()))
        x, adjacent, y = data()
        return F.cross_entropy(model(x, adjacent).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 40)


class Towers(nn.Module):
    """A recommender: embeddings with sparse gradients and a small network on top."""

    def __init__(self, users: int, items: int, width: int = 16, sparse: bool = True) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width, sparse=sparse)
        self.items = nn.Embedding(items, width, sparse=sparse)
        self.score = nn.Sequential(nn.Linear(2 * width, 32), nn.ReLU(), nn.Linear(32, 1))
        self.kept: list[float] = []

    def forward(self, u: Tensor, i: Tensor) -> Tensor:
        return cast(Tensor, self.score(torch.cat([self.users(u), self.items(i)], -1))[:, 0])


@sick(
    CASES,
    "wd_sparse_optimizer_not_zeroed",
    ("gradients_not_zeroed",),
    ("users", "items"),
    source="https://raberrytv.wordpress.com/ one optimizer for sparse and one for dense gradients: both have to be zeroed",
    proof=every(
        reads(lambda p: min(cast(Any, p.setup.model).kept[1:15]), 1e-4, 1e3, "gradient that is there before the backward pass"),
        reads(lambda p: median(p.grads["users.weight"][12:15]) / p.grads["users.weight"][0], 1.5, 100, "growth of it"),
    ),
)
def _(seed: int) -> Setup:
    data, model = Ratings(seed), Towers(60, 40)
    sparse = torch.optim.SparseAdam([model.users.weight, model.items.weight], 1e-2)
    dense = torch.optim.Adam(model.score.parameters(), 5e-3)

    def train() -> Iterator[Event]:
        for _ in range(40):
            dense.zero_grad()  # and sparse.zero_grad()?
            old = model.users.weight.grad
            model.kept.append(0.0 if old is None else float(old.coalesce().values().norm()))
            u, i, y = data()
            value = F.mse_loss(model(u, i), y)
            value.backward()
            yield "read", [value]
            sparse.step()
            dense.step()
            yield "step", [sparse, dense]

    return Setup(model, train)


@sick(
    CASES,
    "wd_accumulates_longer_than_an_epoch",
    ("never_stepped",),
    source="https://discuss.pytorch.org/t/pytorch-gradient-accumulation/55955 the last batches of an epoch never make a step",
    also=("loss_plateau",),
    proof=every(
        reads(lambda p: float(sum(not math.isnan(s) for s in p.steps["head.weight"])), -1, 0.5, "steps"),
        reads(lambda p: max(p.weights["head.weight"]) - min(p.weights["head.weight"]), -1, 1e-30, "change of the weights"),
        loss_stays(0.1),
    ),
)
def _(seed: int) -> Setup:
    data, model = Text(seed), Recurrent(24, cell=nn.LSTM)
    loss, optimizer = classify(model, data), torch.optim.Adam(model.parameters(), 1e-2)
    accumulate, batches = 8, 5  # a small file: five batches make an epoch

    def train() -> Iterator[Event]:
        for epoch in range(10):
            optimizer.zero_grad()
            for i in range(batches):
                value = loss(epoch) / accumulate
                value.backward()
                yield "read", [value]
                if (i + 1) % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "wd_layerwise_rate_divided_to_zero",
    ("frozen_weights",),
    ("embed", "position", "blocks.0", "blocks.1", "blocks.2"),
    source="https://arxiv.org/abs/1801.06146 a rate for each layer; with // all but the last are 0",
    proof=every(
        unchanged("embed.weight", "blocks.0.up.weight", "blocks.1.attn.qkv.weight", "blocks.2.down.weight", "blocks.2.norm1.bias"),
        reads(lambda p: min(p.steps["blocks.3.up.weight"]), 1e-5, 10, "step of the last block"),
    ),
)
def _(seed: int) -> Setup:
    data, model = Text(seed), Decoder(24, depth=4)
    rate, depth = 3e-3, len(model.blocks)
    groups: list[dict[str, Any]] = [
        {"params": [*model.embed.parameters(), *model.position.parameters()], "lr": rate * (1 // depth)}
    ]
    groups += [{"params": list(b.parameters()), "lr": rate * ((k + 1) // depth)} for k, b in enumerate(model.blocks)]
    groups += [{"params": [*model.norm.parameters(), *model.head.parameters()], "lr": rate}]
    return fit(model, classify(model, data), torch.optim.Adam(groups), 40)


@sick(
    CASES,
    "wd_rate_of_adam_given_to_sgd",
    ("update_ratio_too_small",),
    source="https://arxiv.org/abs/1810.04805 2e-5 is a rate to tune with Adam, not to train with plain SGD",
    also=("loss_plateau",),
    proof=every(update_ratio(below=5e-6, last=15), loss_stays(0.03)),
)
def _(seed: int) -> Setup:
    data, model = Series(seed), Forecaster(cell=nn.GRU)
    return fit(model, regress(model, data), torch.optim.SGD(model.parameters(), lr=2e-5), 60)


@sick(
    CASES,
    "wd_rate_typed_without_its_zeros",
    ("update_ratio_too_large",),
    source="https://karpathy.github.io/2019/04/25/recipe/ the rate, 3e-1 for 3e-4: every update is larger than what it changes",
    also=("loss_diverging", "loss_spike", "gradient_spike"),
    proof=every(
        reads(lambda p: p.update_ratio(0), 2, 1e3, "ratio of the first update"),
        update_ratio(above=0.4, last=3),
        reads(lambda p: max(p.losses[:15]) / p.losses[0], 1.1, 1e3, "growth of the loss"),
        reads(lambda p: median(p.losses[-10:]), 2.7, 1e3, "last losses, that 3e-3 brings to 2"),
    ),
)
def _(seed: int) -> Setup:
    data, model = Text(seed), Decoder(24)
    return fit(model, classify(model, data), torch.optim.AdamW(model.parameters(), 0.3), 40)


@sick(
    CASES,
    "wd_rating_in_the_wrong_unit",
    ("gradient_spike", "loss_spike"),
    source="https://arxiv.org/abs/1211.5063 a single batch far from the others makes the gradient leap",
    onset=30,
    proof=every(
        gradient_spikes(30, 20),
        reads(lambda p: p.losses[30] / median(p.losses[:30]), 100, 1e9, "the loss of it to the median"),
        reads(lambda p: max(p.losses[:30]) / median(p.losses[:30]), 0, 4, "the largest loss before to the median"),
    ),
)
def _(seed: int) -> Setup:
    data = Ratings(seed)
    model = Towers(60, 40, sparse=False)

    def loss(i: int) -> Tensor:
        u, v, y = data()
        if i == 30:
            y[7:10] = 100.0  # percent in a table of stars
        return F.mse_loss(model(u, v), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 60)


class Siamese(nn.Module):
    def __init__(self, vocabulary: int = 60, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(vocabulary, width)
        self.tower = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 16, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.tower(self.embed(x)))


@sick(
    CASES,
    "wd_distance_of_a_pair_to_itself",
    ("non_finite_gradient",),
    ("embed", "tower"),
    source="https://discuss.pytorch.org/t/nan-gradient-for-torch-cos-torch-acos/9617 an infinite derivative at the edge, as sqrt's at 0",
    onset=18,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
    proof=every(
        first_non_finite(18),
        reads(lambda p: p.losses[18], 0, 10, "the loss of that update"),
        reads(lambda p: float(min(n[18] for n in p.nonfinite.values())), 0.5, 1e9, "least number of bad elements in a gradient"),
        finite_before(18),
    ),
)
def _(seed: int) -> Setup:
    data, model = Bags(seed, batch=48), Siamese()

    def loss(i: int) -> Tensor:
        x, y = data()
        a, b, same = x[:24], x[24:].clone(), (y[:24] == y[24:]).float()
        if i == 18:
            b[3], same[3] = a[3], 1.0  # a duplicate in the data
        distance = (model(a) - model(b)).square().sum(-1).sqrt()
        return cast(Tensor, (same * distance.square() + (1 - same) * (1 - distance).clamp(min=0).square()).mean())

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 34)


@sick(
    CASES,
    "wd_lora_both_factors_zero",
    ("zero_gradient",),
    tuple(f"layers.{k}.lora_{m}" for k in (0, 2) for m in "ab") + ("layers.0", "layers.2"),
    source="https://arxiv.org/abs/2106.09685 one of the two factors starts at zero, not both",
    also=("poor_init",),
    proof=every(
        zero_gradient("layers.0.lora_a.weight", "layers.0.lora_b.weight", "layers.2.lora_a.weight", "layers.2.lora_b.weight"),
        reads(lambda p: min(p.grads["head.weight"]), 1e-5, 1e4, "gradient of the head"),
    ),
)
def _(seed: int) -> Setup:
    data, model = Bags(seed), Headed()
    for k in (0, 2):
        nn.init.zeros_(cast(Low, model.layers[k]).lora_a.weight)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return fit(model, classify(model, data), torch.optim.AdamW(wanted, 5e-3), 50)


@sick(
    CASES,
    "wd_ascends_the_likelihood_it_should_descend",
    ("loss_diverging",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html maximize=True, left from a reward, with a loss",
    proof=every(
        loss_grows(2.5, last=15),
        reads(lambda p: sum(b > a for a, b in zip(p.losses[:14], p.losses[1:15], strict=True)) / 14, 0.8, 2, "share of rises"),
    ),
)
def _(seed: int) -> Setup:
    data, model = Text(seed), Recurrent(24)
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 2e-2, maximize=True), 40)


@sick(
    CASES,
    "wd_tied_embedding_of_deviation_one",
    ("poor_init",),
    ("embed", "head"),
    source="https://arxiv.org/abs/1608.05859 tied weights: nn.Embedding's N(0, 1) is 50 times too large for the head",
    proof=reads(lambda p: p.losses[0] / math.log(24), 5, 100, "first loss to that of a uniform guess"),
)
def _(seed: int) -> Setup:
    data = Text(seed)
    model = Decoder(24, width=64, tied=True, std=1.0)
    return fit(model, classify(model, data), torch.optim.AdamW(model.parameters(), 3e-3), 60)


class Bare(Decoder):
    """It has positions, and nobody calls them."""

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        keep = torch.ones(n, n, dtype=torch.bool).tril()
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, keep)
        return cast(Tensor, self.head(self.norm(x)))


@sick(
    CASES,
    "wd_positions_never_called",
    ("missing_gradient",),
    ("position",),
    source="https://arxiv.org/abs/1706.03762 positions have to be added to the tokens; here they are made and forgotten",
    proof=every(
        no_gradient("position.weight"),
        reads(lambda p: float(sum(o is not None for o in p.outputs["position"])), -1, 0.5, "calls"),
        reads(lambda p: min(p.grads["embed.weight"]), 1e-4, 1e4, "gradient of the tokens"),
    ),
)
def _(seed: int) -> Setup:
    data, model = Text(seed), Bare(24)
    return fit(model, classify(model, data), torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01), 60)


class Convolved(nn.Module):
    """A graph net of tanh layers: each sends what it makes of a node to the neighbours."""

    def __init__(self, depth: int = 3, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8 if k == 0 else width, width) for k in range(depth))
        self.acts = nn.ModuleList(nn.Tanh() for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, adjacent: Tensor) -> Tensor:
        for layer, act in zip(self.layers, self.acts, strict=True):
            x = act(adjacent @ layer(x))
        return cast(Tensor, self.head(x))


@sick(
    CASES,
    "wd_weights_drawn_from_rand",
    ("saturated_activation", "poor_init"),
    ("body",),
    source="https://cs231n.github.io/neural-networks-2/ weights of mean 0; torch.rand gives a mean of 0.5, and tanh sits at its ends",
    also=("vanishing_gradient", "zero_gradient"),
    proof=every(
        reads(lambda p: median(o.rms for o in p.outputs["body.3"][:15] if o), 0.9, 1.1, "rms of the second tanh"),
        reads(lambda p: median(o.rms for o in p.outputs["body.5"][:15] if o), 0.97, 1.1, "rms of the third tanh"),
        gradient_ratio("body.0.weight", "head.weight", 0.1, last=15),
    ),
)
def _(seed: int) -> Setup:
    data, model = Bags(seed), Averaged()
    for layer in model.body:
        if isinstance(layer, nn.Linear):
            layer.weight.data = torch.rand(layer.weight.shape)
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 3e-3), 40)


class Tastes:
    """Rows of a full rating matrix, `[batch, items]`, of mean 0 and deviation about 1: to be reproduced."""

    def __init__(self, seed: int, items: int = 40, batch: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(10000 + seed)
        self.items, self.batch = torch.randn(4, items, generator=self.generator), batch

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, 4, generator=self.generator) @ self.items / 2
        return x + 0.1 * torch.randn(x.shape, generator=self.generator), x


def autoencoder(act: type[nn.Module]) -> nn.Sequential:
    sizes = [40, 32, 32, 16, 16, 32, 32]
    hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), act())]
    return nn.Sequential(*hidden, nn.Linear(32, 40))


@sick(
    CASES,
    "wd_deep_sigmoid_autoencoder",
    ("vanishing_gradient",),
    ("0", "1", "2", "3", "4", "5"),
    source="https://arxiv.org/abs/1708.01715 deep autoencoders for ratings: sigmoid does not train, SELU does",
    also=("loss_plateau",),
    proof=every(
        gradient_ratio("0.weight", "12.weight", 1e-3, last=15),
        gradient_ratio("0.bias", "12.bias", 1e-3, last=15),
        gradient_ratio("2.weight", "6.weight", 0.1, last=15),
        loss_stays(0.1),
    ),
)
def _(seed: int) -> Setup:
    data, model = Tastes(seed), autoencoder(nn.Sigmoid)
    return fit(model, regress(model, data), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 60)


class Multiply(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class Stack(nn.Module):
    """A classifier of bags with layers that scale the gradient of what they are given."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.embed = nn.EmbeddingBag(60, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(5))
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = torch.relu(layer(norm(cast(Tensor, Multiply.apply(h, self.factor)))))  # type: ignore[no-untyped-call]
        return cast(Tensor, self.head(h))


@sick(
    CASES,
    "wd_gradient_multiplied_by_each_layer",
    ("exploding_gradient",),
    ("embed", "layers.0", "layers.1", "norms.0", "norms.1"),
    source="https://github.com/facebookresearch/fairseq/blob/main/fairseq/modules/grad_multiply.py with 10 where 0.1 was meant",
    proof=every(
        gradient_ratio("head.weight", "layers.0.weight", 1e-3, last=15),
        gradient_ratio("head.bias", "layers.0.bias", 1e-3, last=15),
        gradient_ratio("layers.3.weight", "layers.1.weight", 0.1, last=15),
    ),
)
def _(seed: int) -> Setup:
    data, model = Bags(seed), Stack(10.0)
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 3e-3), 40)


class Clicks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(60, 32)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(self.embed(x))[:, 0])


def clicks(model: nn.Module, seed: int) -> Callable[[int], Tensor]:
    data = Bags(seed, classes=20, batch=256)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.binary_cross_entropy_with_logits(model(x), (y == 0).float())

    return loss


@sick(
    CASES,
    "wd_prior_of_a_click_in_every_bias",
    ("dead_units",),
    ("net.0", "net.1", "net.2", "net.3"),
    source="https://arxiv.org/abs/1708.02002 the last bias starts at the log odds of the prior, and only the last",
    also=("zero_gradient", "vanishing_gradient", "poor_init", "update_ratio_too_small", "loss_plateau"),
    proof=every(dead_fraction("net.1", 0.95, last=15), dead_fraction("net.3", 0.95, last=15)),
)
def _(seed: int) -> Setup:
    model = Clicks()
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.constant_(m.bias, math.log(0.05 / 0.95))
    return fit(model, clicks(model, seed), torch.optim.Adam(model.parameters(), 3e-3), 50)


@sick(
    CASES,
    "wd_forecast_from_raw_prices",
    ("unnormalized_input",),
    ("",),
    source="https://discuss.pytorch.org/t/loss-not-decreasing-in-lstm-network/159152 an LSTM given a series as it comes",
    also=("saturated_activation", "vanishing_gradient", "zero_gradient", "frozen_weights", "loss_plateau"),
    proof=every(
        loss_stays(0.15),
        gradient_ratio("rnn.weight_hh_l0", "head.weight", 1e-2, last=15),
    ),
)
def _(seed: int) -> Setup:
    data, model = Series(seed), Forecaster(width=24)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(60000 + 4000 * x), y)  # the target is standardised, the window is not

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 60)


@sick(
    CASES,
    "wd_sensor_that_went_silent",
    ("non_finite_input",),
    ("",),
    source="https://arxiv.org/abs/1606.01865 missing values of a series have to be filled in; here NaN comes in with one batch",
    onset=16,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    proof=every(first_non_finite(16), first_non_finite(16, "rnn"), finite_before(16)),
)
def _(seed: int) -> Setup:
    data, model = Series(seed), Forecaster(cell=nn.GRU)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 16:
            x[4, 9:11] = math.nan
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 5e-3), 34)


@sick(
    CASES,
    "wd_labels_shuffled_apart_from_texts",
    ("loss_plateau",),
    source="https://karpathy.github.io/2019/04/25/recipe/ inputs and labels that no longer belong together: the loss of a guess",
    # A plateau is a matter of a hundred updates, as the table says.
    within=100,
    proof=every(
        loss_stays(0.03, last=100),
        reads(lambda p: median(p.losses[20:100]), 1.05, 1.16, "loss, that of a guess being 1.10"),
    ),
)
def _(seed: int) -> Setup:
    data = Bags(seed)
    model = nn.Sequential(nn.EmbeddingBag(60, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    order = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y[torch.randperm(len(y), generator=order)])

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01), 160)


class Matcher(nn.Module):
    """Unit vectors of tokens, averaged: the token 0 is padding and has the vector 0, which has no direction."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, width, padding_idx=0)
        self.turn = nn.Linear(width, width, bias=False)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
        self.scale = 0.0

    def forward(self, tokens: Tensor) -> Tensor:
        x, real = self.turn(self.embed(tokens)).float(), (tokens != 0)[..., None]
        unit = torch.where(real, x / x.square().sum(-1, keepdim=True).sqrt(), 0.0)
        return cast(Tensor, self.head(4 * unit.sum(1) / real.sum(1)))


@sick(
    CASES,
    "wd_scaler_that_never_finds_a_scale",
    ("loss_scale_collapse", "non_finite_gradient"),
    source="https://github.com/pytorch/pytorch/issues/68425 where() does not hide the NaN in the gradient of what it leaves out",
    also=("never_stepped",),
    proof=every(
        reads(lambda p: float(sum(not math.isnan(s) for s in p.steps["embed.weight"])), -1, 0.5, "steps taken"),
        reads(lambda p: float(min(p.nonfinite["turn.weight"][:15])), 0.5, 1e9, "least number of bad elements in a gradient"),
        reads(lambda p: max(p.losses), 0, 3, "largest loss"),
        reads(lambda p: cast(Any, p.setup.model).scale, 0, 1, "the scale at the end"),
    ),
)
def _(seed: int) -> Setup:
    data, model = Bags(seed), Matcher()
    optimizer, scaler = torch.optim.Adam(model.parameters(), 3e-3), torch.amp.GradScaler("cpu")

    def train() -> Iterator[Event]:
        for _ in range(26):
            x, y = data()
            x = x + 1
            for row in range(len(x)):
                x[row, 6 + row % 7 :] = 0
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                value = F.cross_entropy(model(x).float(), y)
            scaler.scale(value).backward()
            yield "read", [value]
            old = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            model.scale = scaler.get_scale()
            yield "step", [] if scaler.get_scale() < old else [optimizer]

    return Setup(model, train)


# Healthy runs


def scheduled(setup: Setup, scheduler: torch.optim.lr_scheduler.LRScheduler) -> Setup:
    """The same loop with a step of the scheduler after each step."""

    def train() -> Iterator[Event]:
        for event in setup.train():
            yield event
            if event[0] == "step":
                scheduler.step()

    return Setup(setup.model, train)


@healthy(
    CASES,
    "wd_gpt_warms_up_from_zero_and_anneals_to_zero",
    source="https://arxiv.org/abs/2005.14165 warm-up from 0, a cosine to 0, clipping at 1, a causal mask, tied embeddings",
    proof=converges(0.65),
)
def _(seed: int) -> Setup:
    data, model, total = Text(seed), Decoder(24, tied=True), 160
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], 6e-3)

    def rate(i: int) -> float:
        return i / 20 if i < 20 else 0.5 * (1 + math.cos(math.pi * min(1.0, (i - 20) / (total - 20))))

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return scheduled(
        fit(model, classify(model, data), optimizer, total, between=clip), torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    )


@healthy(
    CASES,
    "wd_lstm_truncated_backprop",
    source="https://github.com/pytorch/examples/tree/main/word_language_model the state is carried on and cut from its graph",
    proof=converges(0.65),
)
def _(seed: int) -> Setup:
    stream = Text(seed, batch=12, length=12 * 120)
    model = Recurrent(24, 40, nn.LSTM)
    with torch.no_grad():  # forget gates that begin open
        model.rnn.get_parameter("bias_ih_l0")[40:80] = 2.0
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    x, y = stream()

    def train() -> Iterator[Event]:
        state = None
        for i in range(120):
            part = slice(12 * i, 12 * i + 12)
            out, state = model.rnn(model.embed(x[:, part]), state)
            state = tuple(h.detach() for h in state)
            value = F.cross_entropy(model.head(out).flatten(0, 1), y[:, part].flatten())
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


class Experts(nn.Module):
    """Each token goes to the one expert that the router likes best, and some experts have nothing to do in many updates."""

    def __init__(self, experts: int = 6, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, width)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(experts)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 24)
        self.balance = torch.zeros(())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).flatten(0, 1)
        odds = self.router(x).softmax(-1)
        weight, chosen = odds.max(-1)
        share = F.one_hot(chosen, len(self.experts)).float().mean(0)
        self.balance = len(self.experts) * (share * odds.mean(0)).sum()
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, weight[rows, None] * expert(x[rows]))
        return cast(Tensor, self.head(self.norm(x + out))).view(*tokens.shape, -1)


def idle_experts(plain: Plain) -> str:
    """In at least a few updates, some expert has no gradient."""
    idle = sum(math.isnan(plain.grads[f"experts.{k}.0.weight"][i]) for k in range(6) for i in range(len(plain.losses)))
    assert idle >= 3, f"experts were idle {idle} times"
    return f"experts were idle {idle} times"


@healthy(
    CASES,
    "wd_switch_of_experts",
    source="https://arxiv.org/abs/2101.03961 top-1 routing with a loss for the balance",
    proof=every(converges(0.68), idle_experts),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, batch=3, length=8), Experts()

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten()) + 0.01 * model.balance

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 4e-3), 200)


@healthy(
    CASES,
    "wd_frozen_then_thawed_encoder",
    source="https://arxiv.org/abs/1801.06146 the head first, and then everything; the optimizer knows all from the start",
    proof=every(
        converges(0.6),
        no_gradient("embed.weight", "body.2.weight", last=30),
        reads(lambda p: p.steps["embed.weight"][31], 1e-6, 10, "step of the embedding after the thaw"),
    ),
)
def _(seed: int) -> Setup:
    data, model = Bags(seed), Averaged()
    body = [*model.embed.parameters(), *model.body.parameters()]
    for p in body:
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW([{"params": body, "lr": 5e-3}, {"params": model.head.parameters(), "lr": 1e-2}])

    def before(i: int) -> None:
        if i == 30:
            for p in body:
                p.requires_grad_(True)

    return fit(model, classify(model, data), optimizer, 120, before)


@healthy(
    CASES,
    "wd_adapters_on_a_frozen_decoder",
    source="https://arxiv.org/abs/2106.09685 B starts at zero, so that A has no gradient at first",
    proof=every(
        converges(0.55),
        zero_gradient("blocks.0.up.lora_a.weight", last=1),
        reads(lambda p: p.grads["blocks.0.up.lora_a.weight"][5], 1e-6, 10, "gradient of A later"),
    ),
)
def _(seed: int) -> Setup:
    data, model = Text(seed), Adapted(24, seed)
    model.reentrant = False
    wanted = [p for p in model.parameters() if p.requires_grad]
    return fit(model, classify(model, data), torch.optim.AdamW(wanted, 5e-3), 100)


@healthy(
    CASES,
    "wd_huge_sparse_embeddings",
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.SparseAdam.html most rows are never seen",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    data, model = Ratings(seed), Towers(20000, 20000)
    sparse = torch.optim.SparseAdam([model.users.weight, model.items.weight], 2e-2)
    dense = torch.optim.Adam(model.score.parameters(), 5e-3)

    def train() -> Iterator[Event]:
        for _ in range(120):
            sparse.zero_grad()
            dense.zero_grad()
            u, i, y = data()
            value = F.mse_loss(model(300 * u + 7, 400 * i + 11), y)  # hashed identifiers
            value.backward()
            yield "read", [value]
            sparse.step()
            dense.step()
            yield "step", [sparse, dense]

    return Setup(model, train)


@healthy(
    CASES,
    "wd_graph_net_with_mean_and_dropout",
    source="https://arxiv.org/abs/1609.02907 a normalised adjacency with itself, few labelled nodes, weight decay",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    data = Graphs(seed, batch=2, nodes=60)
    x, adjacent, y = data()
    known = torch.arange(60) % 3 == 0

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.drop = nn.Linear(8, 32), nn.Linear(32, 3), nn.Dropout(0.5)

        def forward(self, x: Tensor, adjacent: Tensor) -> Tensor:
            return cast(Tensor, adjacent @ self.second(self.drop(torch.relu(adjacent @ self.first(x)))))

    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=5e-4)
    return fit(model, lambda i: F.cross_entropy(model(x, adjacent)[:, known].flatten(0, 1), y[:, known].flatten()), optimizer, 150)


@healthy(
    CASES,
    "wd_distilled_at_temperature_four",
    source="https://arxiv.org/abs/1503.02531 soft targets of a frozen teacher, times the square of the temperature",
    proof=converges(0.35),
)
def _(seed: int) -> Setup:
    data = Bags(seed)
    teacher, student = Averaged(64), Averaged(16)
    optimizer = torch.optim.Adam(teacher.parameters(), 5e-3)
    for _ in range(120):
        x, y = data()
        optimizer.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        optimizer.step()
    teacher.requires_grad_(False).eval()
    teacher.zero_grad()
    model = nn.ModuleDict({"teacher": teacher, "student": student})

    def loss(i: int) -> Tensor:
        x, y = data()
        soft, out = (teacher(x) / 4).softmax(-1), student(x)
        return 16 * F.kl_div(F.log_softmax(out / 4, -1), soft, reduction="batchmean") + 0.1 * F.cross_entropy(out, y)

    return fit(model, loss, torch.optim.Adam(student.parameters(), 1e-2), 150)


@healthy(
    CASES,
    "wd_ctc_of_padded_sounds",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CTCLoss.html clips and labels of several lengths",
    proof=converges(0.15),
)
def _(seed: int) -> Setup:
    data, model = Spoken(seed), Speech()

    def loss(i: int) -> Tensor:
        x, y = data()
        sizes = 2 + torch.arange(len(y)) % 4
        x = x * (torch.arange(x.shape[1]) < 2 * sizes[:, None])[..., None]
        # A label that repeats a symbol needs one more frame than symbols: two frames a symbol are enough.
        return F.ctc_loss(model(x).transpose(0, 1), y, 2 * sizes, sizes, zero_infinity=True)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 120)


@healthy(
    CASES,
    "wd_direct_preferences",
    source="https://arxiv.org/abs/2305.18290 from log 2 down, with a frozen reference that begins equal; some preferences are wrong",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    data = Text(seed, vocabulary=16, batch=16, length=8)
    policy, reference = Decoder(16, length=9), Decoder(16, length=9)
    reference.load_state_dict(policy.state_dict())
    reference.requires_grad_(False).eval()
    model = nn.ModuleDict({"policy": policy, "reference": reference})
    noise = torch.Generator().manual_seed(seed)

    def likelihood(net: Decoder, x: Tensor, y: Tensor) -> Tensor:
        return -F.cross_entropy(net(x).flatten(0, 1), y.flatten(), reduction="none").view(y.shape).sum(-1)

    def loss(i: int) -> Tensor:
        x, good = data()
        bad = torch.randint(16, good.shape, generator=noise)
        wrong = (torch.rand(len(x), generator=noise) < 0.02)[:, None]
        good, bad = torch.where(wrong, bad, good), torch.where(wrong, good, bad)
        margin = [likelihood(policy, x, y) - likelihood(reference, x, y) for y in (good, bad)]
        return -F.logsigmoid(0.2 * (margin[0] - margin[1])).mean()

    return fit(model, loss, torch.optim.AdamW(policy.parameters(), 1e-3), 100)


@healthy(
    CASES,
    "wd_accumulates_rare_classes",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html weights for rare classes; four batches a step",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    data, model = Bags(seed, classes=3, batch=16), Tagger(61, 3)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    weights = torch.tensor([0.5, 1.0, 8.0])

    def train() -> Iterator[Event]:
        for _ in range(55):
            losses = []
            for part in range(4):
                x, y = data()
                kept = (y != 2) | (torch.arange(len(y)) == part)  # a batch has one document of the rare class, or none
                x = x[kept] + 1
                x[::2, 8:] = 0
                value = F.cross_entropy(model(x), y[kept], weight=weights) / 4
                value.backward()
                losses.append(value)
            yield "read", losses
            optimizer.step()
            optimizer.zero_grad()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "wd_post_norm_encoder_with_padding",
    source="https://arxiv.org/abs/2002.04745 post-norm trains with a warm-up; torch's own layers, dropout, padded keys",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    data = Bags(seed, batch=24)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(61, 32, padding_idx=0)
            layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(32, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.layers(self.embed(tokens), src_key_padding_mask=tokens == 0)
            real = (tokens != 0)[..., None]
            return cast(Tensor, self.head((x * real).sum(1) / real.sum(1)))

    model = Encoder()

    def loss(i: int) -> Tensor:
        x, y = data()
        x = x + 1
        for row in range(len(x)):
            x[row, 8 + row % 5 :] = 0
        return F.cross_entropy(model(x), y, label_smoothing=0.02)

    optimizer = torch.optim.Adam(model.parameters(), 2e-3, betas=(0.9, 0.98))
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 30, (30 / (i + 1)) ** 0.5))
    return scheduled(fit(model, loss, optimizer, 100), warm)


@healthy(
    CASES,
    "wd_residuals_that_begin_at_zero",
    source="https://arxiv.org/abs/2003.04887 every branch times a gain of 0, and a head of zeros: most gradients are 0 at first",
    proof=every(converges(0.6), zero_gradient("layers.0.weight", "layers.5.weight", "gains", last=1)),
)
def _(seed: int) -> Setup:
    data = Text(seed, batch=16, length=8)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(24, 48)
            self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(6))
            self.gains = nn.Parameter(torch.zeros(6))
            self.head = nn.Linear(48, 24)
            nn.init.zeros_(self.head.weight)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            for gain, layer in zip(self.gains, self.layers, strict=True):
                x = x + gain * torch.relu(layer(x))
            return cast(Tensor, self.head(x))

    model = Net()
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 5e-3), 100)


@healthy(
    CASES,
    "wd_forecaster_converges_to_tiny_gradients",
    source="https://arxiv.org/abs/2205.13504 a linear forecaster; a sum of two sines obeys a linear recurrence, so the loss goes to 0",
    proof=every(
        converges(1e-5),
        reads(lambda p: median(p.grads["weight"][-20:]) / p.grads["weight"][0], 0, 1e-2, "last gradients to the first"),
    ),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(12, 4)

    def loss(i: int) -> Tensor:
        phase, size = 6.3 * torch.rand(64, 2, 1, generator=generator), torch.randn(64, 2, 1, generator=generator)
        wave = (size * torch.sin(phase + torch.tensor([0.5, 1.3])[:, None] * torch.arange(16))).sum(1)
        return F.mse_loss(model(wave[:, :12]), wave[:, 12:])

    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return fit(model, loss, optimizer, 300)


def chooses_well(plain: Plain) -> str:
    """The policy gives most of its odds to the best item of a context, and nearly none at first."""
    policy = cast(Any, plain.setup.model)
    first, last = policy.told[0], sum(policy.told[-20:]) / 20
    assert last > 0.7 > 2 * first, f"the odds of the best items go from {first:.3g} to {last:.3g}"
    return f"the odds of the best items go from {first:.3g} to {last:.3g}"


@healthy(
    CASES,
    "wd_recommends_by_noisy_rewards",
    source="https://link.springer.com/article/10.1007/BF00992696 REINFORCE with a baseline and a noisy reward",
    proof=chooses_well,
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(10, 16), nn.Linear(16, 32), nn.Linear(32, 6)
            self.told: list[float] = []

        def forward(self, user: Tensor) -> Tensor:
            return F.log_softmax(self.head(torch.tanh(self.body(self.embed(user)))), -1)

    model = Policy()
    best = torch.randint(6, (10,), generator=g)
    baseline = [0.0]

    def loss(i: int) -> Tensor:
        user = torch.randint(10, (64,), generator=g)
        odds = model(user)
        model.told.append(float(odds.detach().exp().gather(1, best[user, None]).mean()))
        item = torch.multinomial(odds.detach().exp(), 1, generator=g)[:, 0]
        reward = (item == best[user]).float() + 0.5 * torch.randn(64, generator=g)
        advantage = reward - baseline[0]
        baseline[0] += 0.1 * float(reward.mean() - baseline[0])
        entropy = -(odds.exp() * odds).sum(-1)
        return cast(Tensor, -(advantage * odds.gather(1, item[:, None])[:, 0] + 0.25 * entropy).mean())

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 250)
