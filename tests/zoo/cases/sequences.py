"""Sequences: recurrent networks, transformers, language models, adapters, mixtures of experts, state spaces, CTC, recommenders.

A build of a sick run takes `broken`: with False it is the same run mended, which trains well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import Case, Event, Proof, Setup, Text, classify, fit, healthy, initialise, sick
from tests.zoo.plain import Plain
from tests.zoo.proofs import (
    converges,
    dead_fraction,
    every,
    first_non_finite,
    gradient_grows,
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


# Data


class Topics:
    """Documents of `[batch, length]` tokens, each of one of `classes` topics; 0 is padding, a part of the words is of the topic."""

    def __init__(
        self, seed: int, classes: int = 4, words: int = 40, batch: int = 32, length: int = 12, own: float = 0.4, least: int = 0
    ) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.classes, self.words, self.batch, self.length, self.own, self.least = classes, words, batch, length, own, least

    def __call__(self) -> tuple[Tensor, Tensor]:
        g, shape = self.generator, (self.batch, self.length)
        y = torch.randint(self.classes, (self.batch,), generator=g)
        per = self.words // self.classes
        common = torch.randint(1, self.words + 1, shape, generator=g)
        own = 1 + y[:, None] * per + torch.randint(per, shape, generator=g)
        x = torch.where(torch.rand(shape, generator=g) < self.own, own, common)
        if self.least:
            lengths = torch.randint(self.least, self.length + 1, (self.batch,), generator=g)
            x = x.masked_fill(torch.arange(self.length) >= lengths[:, None], 0)
        return x, y


class Waves:
    """Sines of random phase and period in a little noise, as (`[batch, length, 1]`, the next value)."""

    def __init__(self, seed: int, batch: int = 32, length: int = 16, noise: float = 0.05) -> None:
        self.generator = torch.Generator().manual_seed(8000 + seed)
        self.batch, self.length, self.noise = batch, length, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        g = self.generator
        phase = 2 * math.pi * torch.rand(self.batch, 1, generator=g)
        speed = 0.3 + 0.5 * torch.rand(self.batch, 1, generator=g)
        t = torch.arange(self.length + 1)
        x = torch.sin(phase + speed * t) + self.noise * torch.randn(self.batch, self.length + 1, generator=g)
        return x[:, :-1, None], x[:, -1:]


class Translation:
    """Pairs of sentences: the second is the first, backwards, in other words. 0 begins a sentence."""

    def __init__(self, seed: int, words: int = 12, batch: int = 32, length: int = 4) -> None:
        self.generator = torch.Generator().manual_seed(9000 + seed)
        self.words, self.batch, self.length = words, batch, length
        self.table = 1 + torch.randperm(words, generator=self.generator)

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randint(1, self.words + 1, (self.batch, self.length), generator=self.generator)
        return x, self.table[x - 1].flip(1)


class Speech:
    """Frames `[time, batch, features]` in which each symbol of a transcript lasts a while; the transcripts; their lengths."""

    def __init__(self, seed: int, symbols: int = 5, batch: int = 16, frames: int = 20, spoken: int = 5) -> None:
        self.generator = torch.Generator().manual_seed(10000 + seed)
        self.batch, self.frames, self.spoken = batch, frames, spoken
        self.sounds = torch.randn(symbols + 1, 8, generator=self.generator)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        g = self.generator
        targets = torch.randint(1, len(self.sounds), (self.batch, self.spoken), generator=g)
        aligned = targets.repeat_interleave(self.frames // self.spoken, 1)
        x = self.sounds[aligned] + 0.3 * torch.randn(self.batch, self.frames, 8, generator=g)
        return x.transpose(0, 1), targets, torch.full((self.batch,), self.spoken)


# Models


class Attention(nn.Module):
    """Self-attention of two heads, written out; `mask` is True where nobody may look."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, w = x.shape
        q, k, v = (m(x).view(b, t, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(w // self.heads)
        if mask is not None:
            scores = scores.masked_fill(mask, -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, w))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        return x + self.ff(self.norm2(x))  # type: ignore[no-any-return]


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


class Reader(nn.Module):
    """A transformer encoder over documents (0 is padding), its mean over the words, and a head."""

    def __init__(self, words: int = 41, width: int = 32, blocks: int = 2, classes: int = 4, length: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        pad = tokens == 0
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x, pad[:, None, None])
        x = self.norm(x).masked_fill(pad[..., None], 0.0)
        return self.head(x.sum(1) / (~pad).sum(1, keepdim=True).clamp(min=1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Embedding, a recurrent layer, and a head on every state or only on the last."""

    def __init__(self, rnn: nn.RNNBase, words: int, classes: int, every_step: bool, padding: int | None = None) -> None:
        super().__init__()
        self.every_step = every_step
        self.embedding = nn.Embedding(words, rnn.input_size, padding_idx=padding)
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size * (2 if rnn.bidirectional else 1), classes)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.rnn(self.embedding(tokens))[0]
        return self.head(states if self.every_step else states[:, -1])  # type: ignore[no-any-return]


class LoRA(nn.Module):
    """A frozen Linear layer and a trainable product of two thin matrices beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * (x @ self.A.T @ self.B.T)  # type: ignore[no-any-return]


def adapt(module: nn.Module, *names: str) -> None:
    """Put LoRA beside some Linear layers of a module."""
    for name in names:
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        module.set_submodule(name, LoRA(linear))


class Translator(nn.Module):
    """A GRU that reads and a GRU that writes."""

    def __init__(self, words: int = 12, width: int = 48, cut: bool = False) -> None:
        super().__init__()
        self.cut = cut
        self.source, self.target = nn.Embedding(words + 1, width), nn.Embedding(words + 1, width)
        self.encoder, self.decoder = nn.GRU(width, width, batch_first=True), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, words + 1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder(self.source(source))
        if self.cut:
            state = state.data
        shifted = F.pad(target[:, :-1], (1, 0))
        return self.head(self.decoder(self.target(shifted), state)[0])  # type: ignore[no-any-return]


class Causal(nn.Module):
    """A causal convolution: the past is padded."""

    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.conv = nn.Conv1d(width, width, 3, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (self.pad, 0)))  # type: ignore[no-any-return]


# Sick runs


class SigmoidTCN(nn.Module):
    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 32)
        self.convs = nn.ModuleList(Causal(32) for _ in range(8))
        self.acts = nn.ModuleList(act() for _ in range(8))
        self.head = nn.Linear(32, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).transpose(1, 2)
        for conv, act in zip(self.convs, self.acts, strict=True):
            x = act(conv(x))
        return self.head(x.transpose(1, 2))  # type: ignore[no-any-return]


@sick(
    CASES,
    "hb_sigmoid_tcn",
    ("vanishing_gradient",),
    ("embedding", *(f"convs.{i}" for i in range(6))),
    source="https://proceedings.mlr.press/v9/glorot10a.html sigmoid units in a deep stack without residuals",
    proof=every(
        gradient_ratio("convs.0.conv.weight", "convs.7.conv.weight", 1e-4, last=15),
        gradient_ratio("convs.0.conv.bias", "convs.7.conv.bias", 1e-4, last=15),
        loss_stays(0.1, last=40),
    ),
    also=("poor_init", "loss_plateau"),
)
def _(seed: int, broken: bool = True) -> Setup:
    model = SigmoidTCN(nn.Sigmoid if broken else nn.ReLU)
    if not broken:
        initialise(model, nn.init.kaiming_normal_, (nn.Conv1d,))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    return fit(model, classify(model, Text(seed, batch=32)), optimizer, updates=90)


@sick(
    CASES,
    "hb_chaotic_elman",
    ("exploding_gradient",),
    ("rnn", "embedding"),
    source="https://arxiv.org/abs/1211.5063 recurrent weights of a spectral radius well above 1, long sequences",
    proof=every(
        gradient_ratio("head.weight", "rnn.weight_hh_l0", 1e-3, last=15),
        gradient_ratio("head.weight", "embedding.weight", 1e-2, last=15),
    ),
    also=("poor_init", "saturated_activation", "loss_plateau"),
)
def _(seed: int, broken: bool = True) -> Setup:
    model = Recurrent(nn.RNN(16, 64, batch_first=True), 41, 4, every_step=False)
    if broken:
        nn.init.normal_(model.rnn.get_parameter("weight_hh_l0"), std=2.5 / 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def clip(_: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, classify(model, Topics(seed, length=60, own=0.8)), optimizer, updates=50, between=clip)


class TwoTowers(nn.Module):
    def __init__(self, users: int, items: int, width: int = 16, sparse: bool = False) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, width, sparse=sparse), nn.Embedding(items, width, sparse=sparse)
        self.user_tower, self.item_tower = (nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, width)) for _ in range(2))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.user_tower(self.users(user)) * self.item_tower(self.items(item))).sum(-1)  # type: ignore[no-any-return]


@sick(
    CASES,
    "hb_unclipped_propensity",
    ("gradient_spike", "loss_spike"),
    source="https://arxiv.org/abs/1602.05352 inverse propensity weights, here without a floor",
    onset=40,
    proof=gradient_spikes(40, 100),
    also=("update_ratio_too_large",),
)
def _(seed: int, broken: bool = True) -> Setup:
    g = torch.Generator().manual_seed(seed)
    tastes, kinds = torch.randn(24, 3, generator=g), torch.randn(30, 3, generator=g)
    model = TwoTowers(24, 30)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def loss(i: int) -> Tensor:
        user, item = torch.randint(24, (64,), generator=g), torch.randint(30, (64,), generator=g)
        clicked = ((tastes[user] * kinds[item]).sum(-1) > 0).float()
        propensity = 0.3 + 0.7 * torch.rand(64, generator=g)
        if broken and i == 40:
            propensity[0] = 1e-5
        return (F.binary_cross_entropy_with_logits(model(user, item), clicked, reduction="none") / propensity).mean()

    def clip(_: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, optimizer, updates=70, between=clip)


class Forecaster(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(1, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])  # type: ignore[no-any-return]


def loss_jumps(update: int, factor: float) -> Proof:
    """The loss of one update is more than `factor` times the median before it, and below twice that median five later."""

    def proof(plain: Plain) -> str:
        before = median(plain.losses[update - 20 : update])
        ratio, after = plain.losses[update] / before, plain.losses[update + 5] / before
        assert ratio > factor, f"the loss is {ratio:.3g} times the median before"
        assert after < 2, f"five updates later the loss is still {after:.3g} times the median before"
        return f"the loss of update {update} is {ratio:.3g} times the median before, five updates later {after:.3g}"

    return proof


@sick(
    CASES,
    "hb_sensor_reads_65535",
    ("loss_spike",),
    source="https://github.com/stanford-crfm/mistral/issues/115 a spike of the loss from a bad batch; here a broken sensor",
    onset=45,
    proof=loss_jumps(45, 1000),
    also=("gradient_spike",),
)
def _(seed: int, broken: bool = True) -> Setup:
    # SmoothL1 bounds what the wrong target does to the gradient: the loss is where it shows.
    model, data = Forecaster(), Waves(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        if broken and i == 45:
            y[3] = 65535.0
        return F.smooth_l1_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=70)


@sick(
    CASES,
    "hb_empty_document",
    ("non_finite_activation",),
    ("blocks.0.attn",),
    source="https://github.com/pytorch/pytorch/issues/41508 a row of nothing but padding makes the attention NaN",
    onset=25,
    proof=every(first_non_finite(25, "blocks.0.attn"), first_non_finite(25)),
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int, broken: bool = True) -> Setup:
    model, data = Reader(), Topics(seed, least=4)

    def loss(i: int) -> Tensor:
        x, y = data()
        if broken and i == 25:
            x[5] = 0
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3), updates=45)


class Listener(nn.Module):
    def __init__(self, symbols: int = 5) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 24, bidirectional=True)
        self.head = nn.Linear(48, symbols + 1)

    def forward(self, frames: Tensor) -> Tensor:
        return self.head(self.lstm(frames)[0]).log_softmax(-1)  # type: ignore[no-any-return]


@sick(
    CASES,
    "hb_transcript_too_long",
    ("non_finite_loss",),
    source="https://github.com/k2-fsa/icefall/issues/135 CTC with more symbols than the frames of a short clip can hold",
    onset=20,
    proof=first_non_finite(20),
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
)
def _(seed: int, broken: bool = True) -> Setup:
    model, data = Listener(), Speech(seed)

    def loss(i: int) -> Tensor:
        x, targets, lengths = data()
        frames = torch.full((16,), 20)
        if broken and i == 20:
            frames[2] = 3  # the clip was cut, its transcript was not
        return F.ctc_loss(model(x), targets, frames, lengths)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=40)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(41, 24)
        self.gru = nn.GRU(24, 32, batch_first=True)
        self.project = nn.Linear(32, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(self.gru(self.embedding(tokens))[0].mean(1))  # type: ignore[no-any-return]


def gradient_alone_non_finite(update: int) -> Proof:
    """The first NaN or Inf is in the gradients of `update`, whose loss is finite."""

    def proof(plain: Plain) -> str:
        told = first_non_finite(update)(plain)
        assert math.isfinite(plain.losses[update]), "the loss is not finite"
        return f"{told}; the loss is {plain.losses[update]:.3g}"

    return proof


@sick(
    CASES,
    "hb_a_pair_of_duplicates",
    ("non_finite_gradient",),
    source="https://github.com/tensorflow/tensorflow/issues/30199 a distance by sqrt has no gradient where two texts are the same",
    onset=30,
    proof=gradient_alone_non_finite(30),
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
)
def _(seed: int, broken: bool = True) -> Setup:
    model, data = Siamese(), Topics(seed, batch=48, own=0.6)

    def loss(i: int) -> Tensor:
        (x, y), (x2, y2) = data(), data()
        if broken and i == 30:
            x2[7], y2[7] = x[7], y[7]
        squared = (model(x) - model(x2)).square().sum(1)
        distance = squared.sqrt()
        return torch.where(y == y2, distance.square(), F.relu(2 - distance).square()).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), updates=50)


def weight_turns_nan(parameter: str, update: int) -> Proof:
    """The parameter holds the run's first NaN, in `update`, before any gradient or loss was bad."""

    def proof(plain: Plain) -> str:
        norms = plain.weights
        assert not math.isfinite(norms[parameter][update]), f"{parameter} is finite"
        assert all(math.isfinite(n[i]) for n in norms.values() for i in range(update)), "a weight was bad before"
        assert all(math.isfinite(n[update]) for name, n in norms.items() if name != parameter), "another weight is bad too"
        assert all(math.isfinite(x) for x in plain.losses[:update]), "a loss was bad before"
        assert not any(c[i] for c in plain.nonfinite.values() for i in range(update)), "a gradient was bad before"
        return f"{parameter} has a NaN in update {update}; losses, gradients and all other weights were good until then"

    return proof


class KimCNN(nn.Module):
    """Convolutions of three widths over a text, the maximum over time, and a head."""

    def __init__(self, outputs: int, words: int = 41) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 24, padding_idx=0)
        self.banks = nn.ModuleList(nn.Sequential(nn.Conv1d(24, 16, k), nn.ReLU()) for k in (2, 3, 4))
        self.head = nn.Linear(48, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).transpose(1, 2)
        return self.head(torch.cat([bank(x).amax(-1) for bank in self.banks], 1))  # type: ignore[no-any-return]


@sick(
    CASES,
    "hb_padding_row_renormalised",
    ("non_finite_weight",),
    ("embedding",),
    source="https://arxiv.org/abs/1408.5882 rows rescaled to a norm every so often; that of the padding is zero, and 0 / 0 is NaN",
    onset=20,
    proof=weight_turns_nan("embedding.weight", 20),
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient"),
)
def _(seed: int, broken: bool = True) -> Setup:
    model = KimCNN(4)
    loss, optimizer = classify(model, Topics(seed, least=5)), torch.optim.Adam(model.parameters(), lr=2e-3)

    def train() -> Iterator[Event]:
        for i in range(40):
            optimizer.zero_grad()
            value = loss(i)
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]
            if i % 20 == 19:
                with torch.no_grad():
                    norms = model.embedding.weight.norm(dim=1, keepdim=True)
                    model.embedding.weight.mul_(3.0 / (norms if broken else norms.clamp(min=1e-6)))

    return Setup(model, train)


@sick(
    CASES,
    "hb_prior_bias_in_every_layer",
    ("dead_units",),
    ("banks",),
    source="https://arxiv.org/abs/1708.02002 the bias for a rare positive, -log((1 - p) / p), set in the convolutions too",
    proof=every(*(dead_fraction(f"banks.{i}.1", 0.9, last=15) for i in range(3))),
    also=("zero_gradient", "vanishing_gradient", "poor_init", "loss_plateau"),
)
def _(seed: int, broken: bool = True) -> Setup:
    model, data = KimCNN(5, words=161), Topics(seed, batch=64, classes=5, words=160, own=0.0, length=8)
    for m in model.modules():
        if isinstance(m, (nn.Conv1d, nn.Linear)) and (broken or m is model.head):
            nn.init.constant_(m.get_parameter("bias"), -math.log(0.95 / 0.05))
    tags = torch.tensor([1, 9, 17, 25, 33])

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.binary_cross_entropy_with_logits(model(x), (x[..., None] == tags).any(1).float())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=80)


class DeepAverage(nn.Module):
    """A deep averaging network, whose average may be a sum by mistake."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean
        self.embedding = nn.Embedding(41, 32)
        self.norm = nn.LayerNorm(32)
        self.pooler = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
        self.head = nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        return self.head(self.pooler(x.mean(1) if self.mean else x.sum(1)))  # type: ignore[no-any-return]


def saturates(module: str, linear: str, above: float) -> Proof:
    """The root mean square of a tanh's output over the first 15 updates is near 1, and so is little of its derivative left."""

    def proof(plain: Plain) -> str:
        rms = [o.rms for o in plain.outputs[module][:15] if o is not None]
        into = [o.rms for o in plain.outputs[linear][:15] if o is not None]
        assert min(rms) > above, f"the rms of {module} is {min(rms):.3g}, not above {above}"
        return (
            f"the rms of {module} is {min(rms):.3g} or more (mean derivative {1 - min(rms) ** 2:.2g}), of its input {min(into):.3g}"
        )

    return proof


@sick(
    CASES,
    "hb_pooler_of_a_sum",
    ("saturated_activation",),
    ("pooler",),
    source="https://aclanthology.org/P15-1162/ a deep averaging network; the words of long documents are summed, not averaged",
    proof=saturates("pooler.1", "pooler.0", 0.97),
    also=("vanishing_gradient", "poor_init", "loss_plateau"),
)
def _(seed: int, broken: bool = True) -> Setup:
    model, data = DeepAverage(mean=not broken), Topics(seed, length=400, batch=32, own=0.09)
    return fit(model, classify(model, data), torch.optim.AdamW(model.parameters(), lr=5e-3), updates=60)


@sick(
    CASES,
    "hb_encoder_state_as_data",
    ("missing_gradient",),
    ("encoder", "source"),
    source="https://pytorch.org/blog/pytorch-0_4_0-migration-guide/ what .data does: the state leaves the graph",
    proof=every(
        no_gradient("source.weight", "encoder.weight_ih_l0", "encoder.weight_hh_l0", "encoder.bias_ih_l0", "encoder.bias_hh_l0"),
        gradient_ratio("head.bias", "decoder.weight_hh_l0", 1e3),
    ),
)
def _(seed: int, broken: bool = True) -> Setup:
    model, data = Translator(cut=broken), Translation(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x, y).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=60)


class Checkpointed(nn.Module):
    """A frozen reader with LoRA in its attention and a new head; the blocks are recomputed in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.base = Reader()
        self.base.requires_grad_(False)
        for block in self.base.blocks:
            adapt(block, "attn.q", "attn.v")
        self.head = nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.base.embedding(tokens) + self.base.position
        for block in self.base.blocks:
            x = checkpoint(block, x, None, use_reentrant=self.reentrant)
        return self.head(self.base.norm(x).mean(1))  # type: ignore[no-any-return]


LORAS = tuple(f"base.blocks.{i}.attn.{m}" for i in range(2) for m in "qv")


@sick(
    CASES,
    "hb_lora_under_reentrant_checkpoint",
    ("missing_gradient",),
    ("base.blocks.0", "base.blocks.1"),
    source="https://github.com/microsoft/LoRA/issues/120 no input of the checkpoint requires a gradient",
    proof=every(no_gradient(*(f"{m}.{p}" for m in LORAS for p in "AB")), converges(0.99)),
)
def _(seed: int, broken: bool = True) -> Setup:
    model = Checkpointed(reentrant=broken)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    return fit(model, classify(model, Topics(seed, own=0.6)), optimizer, updates=50)


class Adapted(nn.Module):
    """A frozen bag of words and two frozen layers with LoRA; the head is new."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(41, 32).requires_grad_(False)
        self.tower = nn.Sequential(LoRA(nn.Linear(32, 48)), nn.GELU(), LoRA(nn.Linear(48, 32)), nn.GELU())
        self.head = nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.tower(self.bag(tokens)))  # type: ignore[no-any-return]


@sick(
    CASES,
    "hb_lora_both_zero",
    ("zero_gradient",),
    ("tower.0", "tower.2"),
    source="https://github.com/Guitaricet/relora/issues/18 A and B both start at zero, and neither gets a gradient",
    proof=every(zero_gradient("tower.0.A", "tower.0.B", "tower.2.A", "tower.2.B"), converges(0.99)),
)
def _(seed: int, broken: bool = True) -> Setup:
    model = Adapted()
    for m in model.modules():
        if isinstance(m, LoRA) and broken:
            nn.init.zeros_(m.A)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    return fit(model, classify(model, Topics(seed, own=0.6)), optimizer, updates=50)


@sick(
    CASES,
    "hb_second_phase_never_clears",
    ("gradients_not_zeroed",),
    source="https://pytorch.org/tutorials/recipes/recipes/zeroing_out_gradients.html the loop of the second phase lacks zero_grad",
    onset=25,
    proof=gradient_grows("head.weight", 2.5, 34, since=25),
    also=("exploding_gradient", "loss_diverging", "update_ratio_too_large"),
)
def _(seed: int, broken: bool = True) -> Setup:
    model = Recurrent(nn.LSTM(24, 48, batch_first=True), 24, 24, every_step=True)
    loss = classify(model, Text(seed, batch=16))

    def train() -> Iterator[Event]:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for i in range(25):
            optimizer.zero_grad()
            value = loss(i)
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        for i in range(25, 50):
            if not broken:
                optimizer.zero_grad()
            value = loss(i)
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


class Tuned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"embedding": nn.Embedding(41, 24), "gru": nn.GRU(24, 32, batch_first=True)})
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder["gru"](self.encoder["embedding"](tokens))[0].mean(1))  # type: ignore[no-any-return]


@sick(
    CASES,
    "hb_unfrozen_after_the_optimizer",
    ("not_in_optimizer",),
    ("encoder",),
    source="https://arxiv.org/abs/1801.06146 gradual unfreezing; the optimizer was made of what was trainable before it",
    onset=20,
    proof=every(
        no_gradient("encoder.gru.weight_hh_l0", "encoder.embedding.weight", last=20),
        unchanged("encoder.gru.weight_ih_l0", "encoder.gru.weight_hh_l0", "encoder.embedding.weight", first=20),
        converges(0.95),
    ),
)
def _(seed: int, broken: bool = True) -> Setup:
    model = Tuned()
    model.encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    def unfreeze(i: int) -> None:
        if i == 20:
            model.encoder.requires_grad_(True)
            if not broken:
                optimizer.add_param_group({"params": list(model.encoder.parameters()), "lr": 1e-3})

    return fit(model, classify(model, Topics(seed)), optimizer, updates=50, before=unfreeze)


class Half(nn.Module):
    """A block of a language model with RMSNorm, whose gains start at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 32)
        self.norm1, self.norm2, self.norm = nn.RMSNorm(32), nn.RMSNorm(32), nn.RMSNorm(32)
        self.attn = Attention(32)
        self.ff = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 24, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attn(self.norm1(x), causal(tokens.shape[1]))
        x = x + self.ff(self.norm2(x))
        return self.head(self.norm(x)).float()  # type: ignore[no-any-return]


@sick(
    CASES,
    "hb_gains_rounded_away",
    ("frozen_weights",),
    ("norm1", "norm2", "norm"),
    source="https://github.com/vllm-project/speculators/pull/765 all in bfloat16: the gains of the norms stay 1.0 for ever",
    proof=every(unchanged("norm1.weight", "norm2.weight", "norm.weight"), converges(0.9)),
)
def _(seed: int, broken: bool = True) -> Setup:
    model: nn.Module = Half().to(torch.bfloat16 if broken else torch.float32)
    return fit(model, classify(model, Text(seed, batch=16)), torch.optim.AdamW(model.parameters(), lr=1e-3), updates=60)


@sick(
    CASES,
    "hb_adam_with_one",
    ("update_ratio_too_large",),
    source="https://cs231n.github.io/neural-networks-3/ the ratio of updates to weights; Adam with the rate of a plain SGD",
    proof=every(update_ratio(above=5.0, last=1), update_ratio(above=0.2, last=10)),
    also=("loss_diverging", "loss_spike", "loss_plateau", "gradient_spike", "saturated_activation", "vanishing_gradient"),
)
def _(seed: int, broken: bool = True) -> Setup:
    model = Recurrent(nn.LSTM(24, 32, batch_first=True), 41, 4, every_step=False)
    nn.init.normal_(model.embedding.weight, std=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0 if broken else 1e-2)
    return fit(model, classify(model, Topics(seed, own=0.7)), optimizer, updates=40)


@sick(
    CASES,
    "hb_fine_tuning_lr_from_scratch",
    ("update_ratio_too_small",),
    source="https://arxiv.org/abs/1810.04805 the 2e-5 that fine-tunes BERT with Adam, given to SGD on a new model",
    proof=every(update_ratio(below=1e-5, last=15), loss_stays(0.02)),
    also=("loss_plateau",),
)
def _(seed: int, broken: bool = True) -> Setup:
    model = Reader(blocks=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-5 if broken else 0.05, momentum=0.9)
    return fit(model, classify(model, Topics(seed, own=0.6)), optimizer, updates=60)


@sick(
    CASES,
    "hb_maximize_left_on",
    ("loss_diverging",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html maximize=True, kept from a policy gradient",
    proof=loss_grows(2.5, last=15),
    also=("exploding_gradient",),
)
def _(seed: int, broken: bool = True) -> Setup:
    model = Recurrent(nn.GRU(24, 48, batch_first=True), 24, 24, every_step=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, maximize=broken)
    return fit(model, classify(model, Text(seed, batch=16)), optimizer, updates=50)


@sick(
    CASES,
    "hb_labels_shuffled_apart",
    ("loss_plateau",),
    source="https://arxiv.org/abs/1611.03530 labels that have nothing to do with the inputs, here by two shuffles",
    within=100,
    proof=every(loss_stays(0.02, last=100), loss_stays(0.02)),
)
def _(seed: int, broken: bool = True) -> Setup:
    model, data = KimCNN(4), Topics(seed, batch=64, own=0.5)

    def loss(i: int) -> Tensor:
        x, y = data()
        if broken:
            y = y[torch.randperm(len(y), generator=data.generator)]
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), updates=160)


class TiedGPT(nn.Module):
    def __init__(self, std: float, width: int = 64, words: int = 24, length: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        nn.init.normal_(self.embedding.weight, std=std)
        nn.init.normal_(self.position.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight
        for block in self.blocks:
            x = block(x, causal(tokens.shape[1]))
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def first_loss(above: float) -> Proof:
    """The first loss is far above that of a uniform guess."""

    def proof(plain: Plain) -> str:
        assert plain.losses[0] > above, f"the first loss is {plain.losses[0]:.3g}, not above {above:.3g}"
        return f"the first loss is {plain.losses[0]:.3g}"

    return proof


@sick(
    CASES,
    "hb_tied_unit_normal",
    ("poor_init",),
    ("embedding", "head"),
    source="https://github.com/huggingface/transformers/pull/26441 a head of variance 1, here by the default of a tied embedding",
    proof=first_loss(5 * math.log(24)),
)
def _(seed: int, broken: bool = True) -> Setup:
    model = TiedGPT(1.0 if broken else 0.02)
    return fit(model, classify(model, Text(seed, length=12)), torch.optim.AdamW(model.parameters(), lr=1e-3), updates=60)


class Tagger(nn.Module):
    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(41, 24)
        self.lstm = nn.LSTM(24, 24, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, 8)
        self.softmax = nn.Softmax(-1) if softmax else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.softmax(self.head(self.lstm(self.embedding(tokens))[0]))  # type: ignore[no-any-return]


def loss_of_probabilities(module: str, classes: int) -> Proof:
    """What the module gives is of the range of probabilities, and no loss is below what cross-entropy can reach on such."""

    def proof(plain: Plain) -> str:
        seen = [o for o in plain.outputs[module] if o is not None]
        floor = math.log(math.e + classes - 1) - 1
        assert all(o.low >= 0 and o.high <= 1 for o in seen), "not probabilities"
        assert min(plain.losses) >= floor - 1e-4, f"a loss of {min(plain.losses):.3g} is below {floor:.3g}"
        span = f"{seen[-1].low:.2g} to {seen[-1].high:.2g}"
        return f"{module} gives {span}; the least loss {min(plain.losses):.3g}, the floor {floor:.3g}"

    return proof


@sick(
    CASES,
    "hb_tagger_with_softmax",
    ("double_softmax",),
    ("softmax",),
    source="https://discuss.pytorch.org/t/cross-entropy-loss-is-not-decreasing/43814/16 softmax before CrossEntropyLoss",
    proof=loss_of_probabilities("softmax", 8),
    also=("loss_plateau",),
)
def _(seed: int, broken: bool = True) -> Setup:
    model, data = Tagger(softmax=broken), Topics(seed, own=0.0)

    def loss(i: int) -> Tensor:
        x, _ = data()
        tags = (x - 1) // 5  # eight kinds of five words
        return F.cross_entropy(model(x).flatten(0, 1), tags.flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=60)


# Healthy runs


def at_times_none(*parameters: str) -> Proof:
    """The trap: each of these has no gradient in some updates, and one in others."""

    def proof(plain: Plain) -> str:
        told = []
        for name in parameters:
            none = sum(math.isnan(n) for n in plain.grads[name])
            assert 0 < none < len(plain.grads[name]), f"{name} has no gradient in {none} updates"
            told.append(f"{name} in {none}")
        return f"no gradient: {', '.join(told)} of {len(plain.losses)} updates"

    return proof


class LowRankGPT(nn.Module):
    """A language model, trained before on other text and frozen, with LoRA in its attention and feed-forward layers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.base = TiedGPT(0.02, width=32)
        loss = classify(self.base, Text(seed, length=12))
        optimizer = torch.optim.AdamW(self.base.parameters(), lr=5e-3)
        for i in range(50):
            optimizer.zero_grad(set_to_none=True)
            loss(i).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.base.requires_grad_(False)
        for block in self.base.blocks:
            adapt(block, "attn.q", "attn.v", "ff.0", "ff.2")

    def forward(self, tokens: Tensor) -> Tensor:
        return self.base(tokens)  # type: ignore[no-any-return]


@healthy(
    CASES,
    "hb_lora_on_a_language_model",
    source="https://arxiv.org/abs/2106.09685 LoRA: B starts at zero, so A's first gradient is zero; the base is frozen",
    proof=every(zero_gradient("base.blocks.0.attn.q.A", "base.blocks.1.ff.2.A", last=1), converges(0.8)),
)
def _(seed: int) -> Setup:
    model = LowRankGPT(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    return fit(model, classify(model, Text(seed + 50, batch=16, length=12)), optimizer, updates=120)


class Embeddings(nn.Module):
    """Those of a masked model: in fine-tuning nothing is masked, and `mask` is not reached."""

    def __init__(self, words: int, width: int, length: int) -> None:
        super().__init__()
        self.word = nn.Embedding(words, width, padding_idx=0)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.mask = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, tokens: Tensor, masked: Tensor | None = None) -> Tensor:
        x = self.word(tokens)
        if masked is not None:
            x = torch.where(masked[..., None], self.mask, x)
        return x + self.position  # type: ignore[no-any-return]


class FineTuned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings(41, 32, 12)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        pad = tokens == 0
        x = self.encoder(self.embeddings(tokens), src_key_padding_mask=pad)
        return self.head(x[:, 0])  # type: ignore[no-any-return]


@healthy(
    CASES,
    "hb_mask_token_unused",
    source="https://arxiv.org/abs/1810.04805 fine-tuning: the vector of the mask is not reached; padding rows",
    proof=every(no_gradient("embeddings.mask"), converges(0.5)),
)
def _(seed: int) -> Setup:
    model = FineTuned()
    loss = classify(model, Topics(seed, own=0.7, least=5))
    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3), updates=150)


class Experts(nn.Module):
    """Each token goes to the expert that the router likes best; one that nobody is sent to is not called."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.flatten(0, 1)
        p = self.router(flat).softmax(-1)
        gate, chosen = p.max(-1)
        out = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            mine = (chosen == k).nonzero()[:, 0]
            if len(mine):
                out = out.index_add(0, mine, gate[mine, None] * expert(flat[mine]))
        share = F.one_hot(chosen, len(self.experts)).float().mean(0)
        return out.view_as(x), len(self.experts) * (share * p.mean(0)).sum()


class Switch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 32)
        self.attn, self.norm1, self.norm2 = Attention(32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.moe = Experts(32, 6)
        self.head = nn.Linear(32, 24)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        x = x + self.attn(self.norm1(x), causal(tokens.shape[1]))
        y, balance = self.moe(self.norm2(x))
        return self.head(x + y), balance


def idle_experts(plain: Plain) -> str:
    grads = [plain.grads[f"moe.experts.{k}.0.weight"] for k in range(6)]
    idle = [sum(math.isnan(n) for n in g) for g in grads]
    assert sum(idle) > 0, "no expert was ever idle"
    assert max(idle) < 0.8 * len(plain.losses), f"an expert is hardly ever chosen: idle in {idle} updates"
    return f"experts idle in {idle} of {len(plain.losses)} updates"


@healthy(
    CASES,
    "hb_idle_experts",
    source="https://arxiv.org/abs/2101.03961 Switch routing with a balancing loss; small batches leave an expert idle at times",
    proof=every(idle_experts, converges(0.75)),
)
def _(seed: int) -> Setup:
    model, data = Switch(), Text(seed, batch=3, length=8)

    def loss(i: int) -> Tensor:
        x, y = data()
        out, balance = model(x)
        return F.cross_entropy(out.flatten(0, 1), y.flatten()) + 0.05 * balance  # type: ignore[no-any-return]

    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def train() -> Iterator[Event]:
        for i in range(200):
            optimizer.zero_grad(set_to_none=True)
            value = loss(i)
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


def key_bias_is_nothing(plain: Plain) -> str:
    ratio = median(a / b for a, b in zip(plain.grads["blocks.0.attn.k.bias"], plain.grads["blocks.0.attn.v.bias"], strict=True))
    assert ratio < 1e-5, f"the gradient of the key bias is {ratio:.2g} of that of the value bias"
    return f"the gradient of the key bias is {ratio:.2g} of that of the value bias"


@healthy(
    CASES,
    "hb_tied_gpt_with_warm_up",
    source="https://github.com/karpathy/nanoGPT tied embeddings, a mask of -inf, warm-up from 0, cosine, clipping at 1",
    proof=every(unchanged("embedding.weight", "blocks.0.attn.q.weight", last=1), key_bias_is_nothing, converges(0.7)),
)
def _(seed: int) -> Setup:
    model = TiedGPT(0.02, width=32)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: i / 20 if i < 20 else 0.1 + 0.45 * (1 + math.cos(math.pi * (i - 20) / 140))
    )
    loss = classify(model, Text(seed, batch=16, length=12))

    def train() -> Iterator[Event]:
        for i in range(160):
            value = loss(i)
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]
            optimizer.zero_grad(set_to_none=True)

    return Setup(model, train)


class Bag(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(words, 24, mode="mean", sparse=True)
        self.hidden = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(32, 4)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        return self.head(self.hidden(self.bag(tokens, offsets)))  # type: ignore[no-any-return]


@healthy(
    CASES,
    "hb_sparse_bag_of_rare_words",
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.SparseAdam.html sparse rows; most words are rare",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    model, g = Bag(2000), torch.Generator().manual_seed(seed)
    sparse = torch.optim.SparseAdam(model.bag.parameters(), lr=1e-2)
    dense = torch.optim.Adam([*model.hidden.parameters(), *model.head.parameters()], lr=5e-3)
    frequency = 1 / torch.arange(1.0, 2001.0)
    weights = frequency * (1 + 8 * (torch.randint(4, (2000,), generator=g) == torch.arange(4)[:, None]))
    shares = (weights / weights.sum(1, keepdim=True)).cumsum(1)

    def train() -> Iterator[Event]:
        for _ in range(200):
            y = torch.randint(4, (32,), generator=g)
            lengths = torch.randint(5, 25, (32,), generator=g)
            owner = y.repeat_interleave(lengths)
            tokens = torch.searchsorted(shares[owner], torch.rand(len(owner), 1, generator=g))[:, 0].clamp(max=1999)
            sparse.zero_grad()
            dense.zero_grad()
            value = F.cross_entropy(model(tokens, lengths.cumsum(0) - lengths), y)
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            sparse.step()  # type: ignore[no-untyped-call]
            dense.step()
            yield "step", [sparse, dense]

    return Setup(model, train)


class Factors(nn.Module):
    def __init__(self, users: int, items: int, width: int = 8) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, width, sparse=True), nn.Embedding(items, width, sparse=True)
        self.popular = nn.Embedding(items, 1, sparse=True)
        nn.init.normal_(self.user.weight, std=0.3)
        nn.init.normal_(self.item.weight, std=0.3)
        nn.init.zeros_(self.popular.weight)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.user(user) * self.item(item)).sum(-1) + self.popular(item)[:, 0]  # type: ignore[no-any-return]


@healthy(
    CASES,
    "hb_bpr_with_a_long_tail",
    source="https://arxiv.org/abs/1205.2618 BPR by plain SGD: sparse rows, most items are seldom met, item biases start at zero",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    model, g = Factors(60, 300), torch.Generator().manual_seed(seed)
    tastes, kinds = torch.randn(60, 3, generator=g), torch.randn(300, 3, generator=g)
    frequency = 1 / torch.arange(1.0, 301.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)  # the mean over a batch of 256 leaves a row 1/256 of its gradient

    def loss(_: int) -> Tensor:
        user = torch.randint(60, (256,), generator=g)
        pair = torch.multinomial(frequency, 512, replacement=True, generator=g).view(256, 2)
        liked = ((tastes[user, None] * kinds[pair]).sum(-1)).argmax(1, keepdim=True)
        better, worse = pair.gather(1, liked)[:, 0], pair.gather(1, 1 - liked)[:, 0]
        keep = better != worse
        return -F.logsigmoid(model(user, better) - model(user, worse))[keep].mean()

    return fit(model, loss, optimizer, updates=250)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(41, 16, padding_idx=0)
        self.gru = nn.GRU(16, 24, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens != 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.gru(packed)[1].transpose(0, 1).flatten(1))  # type: ignore[no-any-return]


@healthy(
    CASES,
    "hb_packed_batches_of_four",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.rnn.pack_padded_sequence.html a noisy batch of 4",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    model = Packed()
    loss = classify(model, Topics(seed, batch=4, own=0.7, least=4))
    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=200)


class Latch(nn.Module):
    """An LSTM that is to say at the end what the first symbol was; its forget gates start open (chrono initialisation)."""

    def __init__(self, symbols: int, length: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(symbols, 24, batch_first=True)
        self.head = nn.Linear(24, 4)
        with torch.no_grad():
            bias = self.lstm.get_parameter("bias_ih_l0").zero_()
            self.lstm.get_parameter("bias_hh_l0").zero_()
            chrono = torch.log(torch.empty(24).uniform_(1, length - 1))
            bias[:24] = -chrono
            bias[24:48] = chrono

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]


def gates_end_open(plain: Plain) -> str:
    model = plain.setup.model
    assert isinstance(model, Latch)
    bias = (model.lstm.get_parameter("bias_ih_l0") + model.lstm.get_parameter("bias_hh_l0"))[24:48].sigmoid()
    share = float((bias > 0.9).float().mean())
    assert share > 0.3, f"only {share:.2g} of the forget gates rest above 0.9"
    return f"{share:.2g} of the forget gates rest above 0.9"


@healthy(
    CASES,
    "hb_latch_with_open_gates",
    source="https://arxiv.org/abs/1804.11188 chrono initialisation: forget gates near 1 and input gates near 0 by design",
    proof=every(gates_end_open, converges(0.2)),
)
def _(seed: int) -> Setup:
    model, g = Latch(8, 25), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)

    def loss(_: int) -> Tensor:
        y = torch.randint(4, (32,), generator=g)
        rest = torch.randint(4, 8, (32, 24), generator=g)
        return F.cross_entropy(model(F.one_hot(torch.cat([y[:, None], rest], 1), 8).float()), y)

    def clip(_: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, optimizer, updates=300, between=clip)


def floor_of_smoothing(plain: Plain) -> str:
    classes, smoothing = 8, 0.2
    wrong = smoothing / classes
    right = 1 - smoothing + wrong
    floor = -right * math.log(right) - (classes - 1) * wrong * math.log(wrong)
    last = median(plain.losses[-40:])
    assert floor < last < 1.2 * floor, f"the loss ends at {last:.3g}, the floor is {floor:.3g}"
    return f"the loss ends at {last:.3g}, the floor of label smoothing is {floor:.3g}"


@healthy(
    CASES,
    "hb_at_the_floor_of_label_smoothing",
    source="https://arxiv.org/abs/1512.00567 label smoothing: the loss comes to rest far above zero",
    proof=every(floor_of_smoothing, converges(0.7)),
)
def _(seed: int) -> Setup:
    model = Reader(blocks=1, classes=8)
    loss = classify(model, Topics(seed, classes=8, own=0.9, least=8), label_smoothing=0.2)
    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), updates=250)


@healthy(
    CASES,
    "hb_accumulated_and_clipped_small",
    source="https://huggingface.co/docs/transformers/en/perf_train_gpu_one four batches accumulated, clipped to 0.1",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    model, data = Translator(), Translation(seed, batch=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def train() -> Iterator[Event]:
        for _ in range(110):
            optimizer.zero_grad()
            losses = []
            for _ in range(4):
                x, y = data()
                value = F.cross_entropy(model(x, y).flatten(0, 1), y.flatten()) / 4
                value.backward()  # type: ignore[no-untyped-call]
                losses.append(value)
            yield "read", losses
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


class Residual(nn.Module):
    """A dilated causal branch whose last convolution starts at zero: at first the block does nothing."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.first, self.second = Causal(width, dilation), Causal(width, dilation)
        nn.init.zeros_(self.second.conv.weight)
        nn.init.zeros_(self.second.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))  # type: ignore[no-any-return]


class ResidualTCN(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.entry = nn.Conv1d(1, width, 1)
        self.blocks = nn.Sequential(*(Residual(width, 2**i) for i in range(4)))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.entry(x.transpose(1, 2)))[:, :, -1])  # type: ignore[no-any-return]


@healthy(
    CASES,
    "hb_branches_from_zero",
    source="https://arxiv.org/abs/1901.09321 Fixup: the last layer of every residual branch starts at zero",
    proof=every(zero_gradient("blocks.0.first.conv.weight", "blocks.3.first.conv.weight", last=1), converges(0.4)),
)
def _(seed: int) -> Setup:
    model, data = ResidualTCN(), Waves(seed, batch=24)

    def loss(_: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=200)


class TwoTasks(nn.Module):
    """A shared reader with a head for the topic of the text and one for the kind of each word."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(41, 24)
        self.shared = nn.GRU(24, 32, batch_first=True)
        self.topic, self.tags = nn.Linear(32, 4), nn.Linear(32, 8)

    def forward(self, tokens: Tensor, task: str) -> Tensor:
        x = self.shared(self.embedding(tokens))[0]
        return self.topic(x.mean(1)) if task == "topic" else self.tags(x)  # type: ignore[no-any-return]


@healthy(
    CASES,
    "hb_two_tasks_in_turn",
    source="https://arxiv.org/abs/1901.11504 batches of one task at a time: each head rests every other update",
    proof=every(at_times_none("topic.weight", "tags.weight"), converges(0.35)),
)
def _(seed: int) -> Setup:
    model, data = TwoTasks(), Topics(seed, own=0.6)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i % 2:
            return F.cross_entropy(model(x, "tags").flatten(0, 1), ((x - 1) // 5).flatten())
        return F.cross_entropy(model(x, "topic"), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=200)


@healthy(
    CASES,
    "hb_ctc_skips_what_cannot_be",
    source="https://github.com/wenet-e2e/wenet/pull/2299 zero_infinity: a clip too short for its transcript counts for nothing",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    model, data = Listener(), Speech(seed)

    def loss(i: int) -> Tensor:
        x, targets, lengths = data()
        frames = torch.full((16,), 20)
        if i % 7 == 3:
            frames[i % 16] = 3
        return F.ctc_loss(model(x), targets, frames, lengths, zero_infinity=True)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), updates=150)


class StateSpace(nn.Module):
    """A diagonal linear recurrence, h = a * h + b * x, with decays of many lengths, and a gated way out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.linspace(math.log(0.02), math.log(1.0), width))
        self.b, self.skip = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        rate = self.log_rate.exp()
        a, b = (-rate).exp(), self.b * rate.sqrt()
        h, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = a * h + b * x[:, t]
            states.append(h)
        return x + F.glu(self.out(torch.stack(states, 1) + self.skip * x))


class Counter(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.layers = nn.ModuleList(StateSpace(width) for _ in range(2))
        self.head = nn.Linear(width, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = layer(norm(x))
        return self.head(x[:, -1])[:, 0]  # type: ignore[no-any-return]


@healthy(
    CASES,
    "hb_state_space_counts",
    source="https://arxiv.org/abs/2206.11893 a diagonal state space; its rates learn slower, without decay; the skip starts at 0",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    model, g = Counter(), torch.Generator().manual_seed(seed)
    slow = [p for name, p in model.named_parameters() if name.endswith("log_rate")]
    fast = [p for name, p in model.named_parameters() if not name.endswith("log_rate")]
    groups = [{"params": fast, "weight_decay": 0.01}, {"params": slow, "lr": 1e-3, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=5e-3)

    def loss(_: int) -> Tensor:
        x = torch.randint(10, (32, 20), generator=g)
        count = (x == 3).sum(1) - (x == 7).sum(1)
        return F.mse_loss(model(x), count / 2.0)

    return fit(model, loss, optimizer, updates=150)
