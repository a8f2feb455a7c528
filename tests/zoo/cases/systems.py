"""Runs of systems: small language models and sequence tasks, and the machinery of training loops around them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import Case, Event, Proof, Setup, fit, healthy, sick
from tests.zoo.plain import Plain
from tests.zoo.proofs import (
    converges,
    dead_fraction,
    every,
    first_non_finite,
    gradient_ratio,
    gradient_spikes,
    loss_stays,
    no_gradient,
    unchanged,
    update_ratio,
    zero_gradient,
)

CASES: list[Case] = []
"""Runs that nobody has developed on, each with its source and a proof in plain torch: they are only run to report."""

# Data ---------------------------------------------------------------------------------------------------------------------------------


class Walk:
    """Sequences in which a permutation gives the next token, nine times of ten: (input, next token), each `[batch, length]`."""

    def __init__(self, seed: int, vocabulary: int = 20, batch: int = 8, length: int = 12, noise: float = 0.1) -> None:
        self.generator = torch.Generator().manual_seed(7100 + seed)
        self.next = torch.randperm(vocabulary, generator=self.generator)
        self.vocabulary, self.batch, self.length, self.noise = vocabulary, batch, length, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        t = torch.randint(self.vocabulary, (self.batch,), generator=self.generator)
        out = [t]
        for _ in range(self.length):
            other = torch.randint(self.vocabulary, (self.batch,), generator=self.generator)
            slip = torch.rand(self.batch, generator=self.generator) < self.noise
            t = torch.where(slip, other, self.next[t])
            out.append(t)
        x = torch.stack(out, 1)
        return x[:, :-1], x[:, 1:]


class Topics:
    """Sentences `[batch, length]` whose class is the topic that most of their words belong to; word 0 is padding."""

    def __init__(self, seed: int, topics: int = 4, words: int = 6, batch: int = 16, length: int = 10, shortest: int = 10) -> None:
        self.generator = torch.Generator().manual_seed(7200 + seed)
        self.topics, self.words, self.batch, self.length, self.shortest = topics, words, batch, length, shortest
        self.vocabulary = 1 + topics * words

    def __call__(self) -> tuple[Tensor, Tensor]:
        g, shape = self.generator, (self.batch, self.length)
        y = torch.randint(self.topics, (self.batch,), generator=g)
        own = 1 + y[:, None] * self.words + torch.randint(self.words, shape, generator=g)
        other = torch.randint(1, self.vocabulary, shape, generator=g)
        x = torch.where(torch.rand(shape, generator=g) < 0.6, own, other)
        sizes = torch.randint(self.shortest, self.length + 1, (self.batch, 1), generator=g)
        return x.masked_fill(torch.arange(self.length) >= sizes, 0), y


class Waves:
    """Noisy sines `[batch, length, 1]` and the two values that follow: a forecast."""

    def __init__(self, seed: int, batch: int = 16, length: int = 16) -> None:
        self.generator = torch.Generator().manual_seed(7300 + seed)
        self.batch, self.length = batch, length

    def __call__(self) -> tuple[Tensor, Tensor]:
        g = self.generator
        rate = 0.3 + 0.5 * torch.rand(self.batch, 1, generator=g)
        phase = 6.3 * torch.rand(self.batch, 1, generator=g)
        clean = 1.4 * torch.sin(rate * torch.arange(self.length + 2) + phase)
        x = clean + 0.05 * torch.randn(clean.shape, generator=g)
        return x[:, : self.length, None], x[:, self.length :]


class Speech:
    """Frames `[batch, frames, features]` in which each label lasts three frames; labels are 1, 2, ... and never twice in a row."""

    def __init__(self, seed: int, labels: int = 5, batch: int = 8, targets: int = 4, features: int = 8) -> None:
        self.generator = torch.Generator().manual_seed(7400 + seed)
        self.shapes = torch.randn(labels + 1, features, generator=self.generator)
        self.labels, self.batch, self.targets = labels, batch, targets

    def __call__(self) -> tuple[Tensor, Tensor]:
        g = self.generator
        steps = torch.randint(1, self.labels, (self.batch, self.targets), generator=g)
        y = (torch.randint(self.labels, (self.batch, 1), generator=g) + steps.cumsum(1)) % self.labels + 1
        x = self.shapes[y.repeat_interleave(3, 1)]
        return x + 0.3 * torch.randn(x.shape, generator=g), y


# Models -------------------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention of two heads; `mask` is added to the scores."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(d / self.heads)
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        y: Tensor = self.out((weights @ v).transpose(1, 2).reshape(b, t, d))
        return y


def feed(width: int, act: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """The feed-forward half of a block."""
    return nn.Sequential(nn.Linear(width, 2 * width), act(), nn.Linear(2 * width, width))


class Block(nn.Module):
    """A block with the normalisation in front of its halves."""

    def __init__(self, width: int, ffn: nn.Module | None = None, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.attn = norm(width), Attention(width)
        self.norm2 = norm(width)
        self.ffn: Any = ffn if ffn is not None else feed(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask)
        y: Tensor = x + self.ffn(self.norm2(x))
        return y


def causal(length: int) -> Tensor:
    """-inf above the diagonal."""
    return torch.full((length, length), -math.inf).triu(1)


class GPT(nn.Module):
    """A decoder of some blocks."""

    def __init__(self, vocabulary: int, width: int = 24, blocks: int = 2, length: int = 16, **options: Any) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks: Any = nn.ModuleList(Block(width, **options) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.3)

    def embed(self, x: Tensor) -> Tensor:
        h: Tensor = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        return h

    def forward(self, x: Tensor) -> Tensor:
        h, mask = self.embed(x), causal(x.shape[1])
        for block in self.blocks:
            h = block(h, mask)
        y: Tensor = self.head(self.norm(h))
        return y


class Recurrent(nn.Module):
    """Embedding, a GRU or LSTM, a head for every position."""

    def __init__(self, vocabulary: int, width: int = 32, kind: type[nn.GRU] | type[nn.LSTM] = nn.GRU, layers: int = 1) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.rnn = kind(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(self.tokens(x))[0])
        return y


def xent(logits: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Cross-entropy over all positions."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), **options)


def language(model: nn.Module, data: Callable[[], tuple[Tensor, Tensor]], **options: Any) -> Callable[[int], Tensor]:
    """Cross-entropy of a fresh batch."""

    def loss(i: int) -> Tensor:
        x, y = data()
        return xent(model(x), y, **options)

    return loss


# Proofs -------------------------------------------------------------------------------------------------------------------------------


def note(model: nn.Module) -> list[float]:
    """A list that the run writes what it measures of itself in, for its proof."""
    values: list[float] = []
    model.__dict__["measured"] = values
    return values


def noted(what: str, above: float = -math.inf, below: float = math.inf, first: int = 0, last: int | None = None) -> Proof:
    """All that the run noted lies between two bounds."""

    def proof(plain: Plain) -> str:
        values = plain.setup.model.__dict__["measured"][first:last]
        assert values, "nothing noted"
        assert all(above < v < below for v in values), f"{what}: {min(values):.3g} to {max(values):.3g}"
        return f"{what}: {min(values):.3g} to {max(values):.3g}"

    return proof


def moves(*parameters: str, first: int = 0, last: int | None = None) -> Proof:
    """These parameters are changed by every step."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert all(s > 0 for s in plain.steps[name][first:last]), f"{name} stays"
        return f"{', '.join(parameters)} move"

    return proof


def holds(what: str, test: Callable[[Plain], bool]) -> Proof:
    """A plain yes or no."""

    def proof(plain: Plain) -> str:
        assert test(plain), f"not so: {what}"
        return what

    return proof


def begins_at(above: float, update: int = 0) -> Proof:
    """The loss of an update is above a number."""

    def proof(plain: Plain) -> str:
        assert plain.losses[update] > above, f"the loss is {plain.losses[update]:.3g}, not above {above:.3g}"
        return f"the loss of update {update} is {plain.losses[update]:.3g}"

    return proof


# Sick runs: no gradient ---------------------------------------------------------------------------------------------------------------


class Checkpointed(GPT):
    """Recomputes its blocks in the backward pass, by the reentrant variant."""

    def forward(self, x: Tensor) -> Tensor:
        h, mask = self.embed(x), causal(x.shape[1])
        for block in self.blocks:
            h = checkpoint(block, h, mask, use_reentrant=True)
        y: Tensor = self.head(self.norm(h))
        return y


@sick(
    CASES,
    "sy_reentrant_checkpoint_over_frozen_embeddings",
    ("missing_gradient",),
    ("blocks",),
    source="https://github.com/huggingface/transformers/issues/21381 frozen embeddings and reentrant checkpointing: blocks get no gradient",
    proof=every(
        no_gradient("blocks.0.attn.qkv.weight", "blocks.0.ffn.0.weight", "blocks.1.attn.out.weight", "blocks.1.ffn.2.weight"),
        moves("head.weight"),
    ),
)
def _(seed: int) -> Setup:
    data = Walk(seed)
    model = Checkpointed(data.vocabulary)
    model.tokens.requires_grad_(False)
    model.places.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return fit(model, language(model, data), torch.optim.AdamW(trained, lr=3e-3), 40)


class Experts(nn.Module):
    """A mixture of feed-forward experts of which each token sees the best; `weigh`: its output is multiplied by its gate."""

    def __init__(self, width: int, experts: int = 4, weigh: bool = True) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(feed(width) for _ in range(experts))
        self.weigh = weigh
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.softmax(self.router(x), -1)
        best, chosen = gates.max(-1)
        share = F.one_hot(chosen, len(self.experts)).double().mean((0, 1)).float()
        self.balance = len(self.experts) * (share * gates.mean((0, 1))).sum()
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            here = chosen == k
            if here.any():
                out[here] = expert(x[here]) * (best[here][:, None] if self.weigh else 1.0)
        return out


@sick(
    CASES,
    "sy_router_by_argmax_alone",
    ("missing_gradient",),
    ("block.ffn.router",),
    source="https://arxiv.org/abs/2101.03961 Switch Transformers: the output is multiplied by the gate, else the router learns nothing",
    proof=every(
        no_gradient("block.ffn.router.weight"),
        holds(
            "every expert is chosen and has a gradient",
            lambda plain: all(any(g > 0 for g in plain.grads[f"block.ffn.experts.{k}.0.weight"][:10]) for k in range(4)),
        ),
        moves("block.attn.qkv.weight", "head.weight"),
        converges(0.8),
    ),
)
def _(seed: int) -> Setup:
    data = Walk(seed, batch=16)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(data.vocabulary, 24)
            self.block = Block(24, Experts(24, weigh=False))
            self.head = nn.Linear(24, data.vocabulary)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.block(self.tokens(x), causal(x.shape[1])))
            return y

    model = Model()
    return fit(model, language(model, data), torch.optim.Adam(model.parameters(), lr=3e-3), 50)


class LoRA(nn.Module):
    """A frozen layer and an update of low rank."""

    def __init__(self, base: nn.Linear, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.scale * self.b(self.a(x))
        return y


def pretrained(seed: int, updates: int = 60, **options: Any) -> tuple[GPT, Walk]:
    """A decoder that knows one permutation, and data of another one."""
    old = Walk(seed + 50)
    model = GPT(old.vocabulary, **options)
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=5e-3), language(model, old)
    for i in range(updates):
        optimizer.zero_grad()
        loss(i).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, Walk(seed)


@sick(
    CASES,
    "sy_lora_with_both_factors_zero",
    ("zero_gradient",),
    ("blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.0.ffn.0", "blocks.1.ffn.0"),
    also=("frozen_weights", "poor_init"),
    source="https://arxiv.org/abs/2106.09685 LoRA: B is zero at the start and A is not; with both zero neither gets a gradient",
    proof=every(
        zero_gradient(*(f"blocks.{k}.{m}.{f}.weight" for k in (0, 1) for m in ("attn.qkv", "ffn.0") for f in "ab")),
        moves("head.weight"),
    ),
)
def _(seed: int) -> Setup:
    model, data = pretrained(seed)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for block in model.blocks:
        block.attn.qkv, block.ffn[0] = LoRA(block.attn.qkv), LoRA(block.ffn[0])
        for factor in (block.attn.qkv.a, block.ffn[0].a):
            nn.init.zeros_(factor.weight)
    trained = [p for p in model.parameters() if p.requires_grad]
    return fit(model, language(model, data), torch.optim.Adam(trained, lr=3e-3), 40)


class Codes(nn.Module):
    """A sentence squeezed into a few discrete levels, and a reader of them; `through`: the rounding passes gradients."""

    def __init__(self, vocabulary: int, classes: int, through: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, 24, padding_idx=0)
        self.encoder = nn.GRU(24, 24, batch_first=True)
        self.squeeze = nn.Linear(24, 16)
        self.reader = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, classes))
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        z = 2 * torch.tanh(self.squeeze(self.encoder(self.tokens(x))[1][0]) * 3)
        code = torch.round(z)
        y: Tensor = self.reader(z + (code - z).detach() if self.through else code)
        return y


@sick(
    CASES,
    "sy_rounded_code_without_straight_through",
    ("zero_gradient",),
    ("tokens", "encoder", "squeeze"),
    also=("vanishing_gradient",),
    source="https://arxiv.org/abs/1308.3432 Bengio et al.: a hard rounding has gradient zero, the straight-through estimator passes it on",
    proof=every(
        zero_gradient("tokens.weight", "encoder.weight_ih_l0", "encoder.weight_hh_l0", "squeeze.weight", "squeeze.bias"),
        moves("reader.0.weight", "reader.2.weight"),
    ),
)
def _(seed: int) -> Setup:
    data = Topics(seed)
    model = Codes(data.vocabulary, data.topics, through=False)
    return fit(model, language(model, data), torch.optim.Adam(model.parameters(), lr=5e-3), 50)


# Sick runs: who clears, who steps -----------------------------------------------------------------------------------------------------


class Translator(nn.Module):
    """A GRU encoder and a GRU decoder that starts from its last state; `attend`: dot-product attention as well."""

    def __init__(self, vocabulary: int, width: int = 32, attend: bool = False) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary + 1, width)
        self.encoder, self.decoder = nn.GRU(width, width, batch_first=True), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(2 * width if attend else width, vocabulary)
        self.attend = attend

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        memory, state = self.encoder(self.source(x))
        start = torch.full_like(y[:, :1], self.target.num_embeddings - 1)
        h = self.decoder(self.target(torch.cat([start, y[:, :-1]], 1)), state)[0]
        if self.attend:
            h = torch.cat([h, torch.softmax(h @ memory.transpose(1, 2) / math.sqrt(h.shape[-1]), -1) @ memory], -1)
        out: Tensor = self.head(h)
        return out


def mapped(seed: int, vocabulary: int = 12, batch: int = 16, length: int = 4) -> Callable[[], tuple[Tensor, Tensor]]:
    """Words and their translation, one by one."""
    g = torch.Generator().manual_seed(7500 + seed)
    lexicon = torch.randperm(vocabulary, generator=g)

    def data() -> tuple[Tensor, Tensor]:
        x = torch.randint(vocabulary, (batch, length), generator=g)
        return x, lexicon[x]

    return data


@sick(
    CASES,
    "sy_seq2seq_clears_the_encoder_only",
    ("gradients_not_zeroed",),
    ("target", "decoder", "head"),
    source="https://docs.pytorch.org/tutorials/intermediate/seq2seq_translation_tutorial.html two optimizers, two zero_grad(); one is lost",
    proof=every(noted("share of the last gradient in that which the decoder steps with", above=0.9), moves("decoder.weight_hh_l0")),
)
def _(seed: int) -> Setup:
    data, model = mapped(seed, vocabulary=8, batch=32, length=3), Translator(8, attend=True)
    measured = note(model)
    encoding = torch.optim.Adam([*model.source.parameters(), *model.encoder.parameters()], lr=1e-2)
    decoding = torch.optim.Adam([*model.target.parameters(), *model.decoder.parameters(), *model.head.parameters()], lr=1e-2)

    def train() -> Iterator[Event]:
        stepped: Tensor | None = None
        for _ in range(60):
            encoding.zero_grad()
            x, y = data()
            loss = xent(model(x, y), y)
            if stepped is not None:  # what lies in .grad before the backward pass, against what was there at the last step
                measured.append(float(torch.equal(model.head.weight.grad, stepped)))  # type: ignore[arg-type]
            loss.backward()
            yield "read", [loss]
            encoding.step()
            decoding.step()
            stepped = model.head.weight.grad.clone()  # type: ignore[union-attr]
            yield "step", [encoding, decoding]

    return Setup(model, train)


@sick(
    CASES,
    "sy_thawed_embeddings_never_cleared",
    ("gradients_not_zeroed",),
    ("tokens", "places"),
    onset=21,
    source="https://arxiv.org/abs/1801.06146 ULMFiT: gradual unfreezing; here the thawed part has an optimizer that nobody clears",
    proof=every(
        noted("share of the last gradient in that which the embeddings step with", above=0.9),
        no_gradient("tokens.weight", last=20),
        moves("tokens.weight", first=20),
    ),
)
def _(seed: int) -> Setup:
    model, data = pretrained(seed)
    measured = note(model)
    model.tokens.requires_grad_(False)
    model.places.requires_grad_(False)
    upper = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    loss_of = language(model, data)

    def train() -> Iterator[Event]:
        optimizers: list[torch.optim.Optimizer] = [upper]
        stepped: Tensor | None = None
        for i in range(50):
            if i == 20:
                model.requires_grad_(True)
                lower = [*model.tokens.parameters(), *model.places.parameters()]
                optimizers.append(torch.optim.AdamW(lower, lr=1e-3))
            upper.zero_grad()
            loss = loss_of(i)
            if stepped is not None:
                measured.append(float(torch.equal(model.tokens.weight.grad, stepped)))  # type: ignore[arg-type]
            loss.backward()
            yield "read", [loss]
            for optimizer in optimizers:
                optimizer.step()
            stepped = None if model.tokens.weight.grad is None else model.tokens.weight.grad.clone()
            yield "step", list(optimizers)

    return Setup(model, train)


@sick(
    CASES,
    "sy_decay_groups_forget_the_gru",
    ("not_in_optimizer",),
    ("rnn",),
    source="https://github.com/karpathy/minGPT/blob/master/mingpt/model.py weight decay by module type: one in neither list is lost",
    proof=every(
        holds("the GRU has gradients", lambda plain: min(plain.grads["rnn.weight_hh_l0"]) > 0),
        unchanged("rnn.weight_ih_l0", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"),
        moves("tokens.weight", "head.weight"),
        noted("parameters of the GRU that an optimizer owns", below=0.5),
    ),
)
def _(seed: int) -> Setup:
    data = Walk(seed)
    model = Recurrent(data.vocabulary)
    measured = note(model)
    decayed = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    plain = [m.weight for m in model.modules() if isinstance(m, (nn.Embedding, nn.LayerNorm))]
    plain += [m.bias for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=5e-3)
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    measured.append(float(sum(id(p) in owned for p in model.rnn.parameters())))
    return fit(model, language(model, data), optimizer, 50)


@sick(
    CASES,
    "sy_residual_layers_in_a_list",
    ("not_in_optimizer",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.ModuleList.html modules in a plain list are not registered",
    proof=every(noted("gradient and change of the hidden layers", above=0), moves("tokens.weight", "head.weight")),
)
def _(seed: int) -> Setup:
    data = Topics(seed)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(data.vocabulary, 24)
            self.norm = nn.LayerNorm(24)
            self.hidden = [nn.Linear(24, 24) for _ in range(2)]
            self.head = nn.Linear(24, data.topics)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.tokens(x).mean(1))
            for layer in self.hidden:
                h = h + F.gelu(layer(h))
            y: Tensor = self.head(h)
            return y

    model = Model()
    measured, first = note(model), [layer.weight.detach().clone() for layer in model.hidden]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def look(i: int) -> None:
        for layer, was in zip(model.hidden, first, strict=True):
            assert torch.equal(layer.weight, was)
            measured.append(float(layer.weight.grad.norm()))  # type: ignore[union-attr]

    return fit(model, language(model, data), optimizer, 50, between=look)


@sick(
    CASES,
    "sy_accumulates_longer_than_an_epoch",
    ("never_stepped",),
    source="https://github.com/huggingface/transformers/issues/2995 fewer batches in an epoch than accumulation steps: step() is never reached",
    also=("loss_plateau",),
    proof=every(
        holds("no step at all", lambda plain: all(math.isnan(s) for v in plain.steps.values() for s in v)),
        holds("all have gradients", lambda plain: all(min(v) > 0 for v in plain.grads.values())),
        loss_stays(0.05),
    ),
)
def _(seed: int) -> Setup:
    data = Walk(seed, batch=4)
    model = Recurrent(data.vocabulary, kind=nn.LSTM)
    batches = [data() for _ in range(6)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for _ in range(8):
            optimizer.zero_grad()
            for k, (x, y) in enumerate(batches):
                loss = xent(model(x), y) / 8
                loss.backward()
                yield "read", [loss]
                if (k + 1) % 8 == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    yield "step", [optimizer]

    return Setup(model, train)


# Sick runs: steps that are none, or far too large or small ----------------------------------------------------------------------------


@sick(
    CASES,
    "sy_rmsnorm_gains_round_away_in_bf16",
    ("frozen_weights",),
    ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"),
    source="https://github.com/vllm-project/speculators/pull/765 pure bf16: gains of 1 never move, for a step is below the spacing there",
    proof=every(
        unchanged(
            "blocks.0.norm1.weight", "blocks.0.norm2.weight", "blocks.1.norm1.weight", "blocks.1.norm2.weight", "norm.weight"
        ),
        moves("tokens.weight", "blocks.0.attn.qkv.weight", "head.weight"),
        converges(0.9),
    ),
)
def _(seed: int) -> Setup:
    data = Walk(seed)
    model = GPT(data.vocabulary, norm=nn.RMSNorm)
    model.norm = nn.RMSNorm(24)  # type: ignore[assignment]
    model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)

    def loss(i: int) -> Tensor:
        x, y = data()
        h, mask = model.embed(x), causal(x.shape[1]).bfloat16()
        for block in model.blocks:
            h = block(h, mask)
        return xent(model.head(model.norm(h)).float(), y)

    return fit(model, loss, optimizer, 60)


@sick(
    CASES,
    "sy_layerwise_rates_rounded_to_nothing",
    ("frozen_weights",),
    ("tokens", "places", "blocks.0", "blocks.1", "blocks.2"),
    source="https://arxiv.org/abs/1801.06146 ULMFiT: discriminative rates by depth; here written down with three decimals",
    proof=every(
        unchanged(
            "tokens.weight", "blocks.0.attn.qkv.weight", "blocks.1.ffn.0.weight", "blocks.2.ffn.2.weight", "blocks.2.norm1.bias"
        ),
        moves("blocks.3.attn.qkv.weight", "head.weight"),
    ),
)
def _(seed: int) -> Setup:
    model, data = pretrained(seed, 40, blocks=4)
    levels: list[list[nn.Module]] = [[model.head, model.norm], *([b] for b in reversed(model.blocks)), [model.tokens, model.places]]
    groups = [
        {"params": [p for m in modules for p in m.parameters()], "lr": round(2e-3 * 0.4**k, 3)} for k, modules in enumerate(levels)
    ]
    return fit(model, language(model, data), torch.optim.AdamW(groups), 40)


class Encoder(nn.Module):
    """A classifier of sentences by torch's own encoder layers; words of index 0 are padding."""

    def __init__(self, vocabulary: int, classes: int, width: int = 32, layers: int = 2, norm_first: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        pad = x == 0
        h = self.layers(self.tokens(x), src_key_padding_mask=pad)
        h = h.masked_fill(pad[..., None], 0).sum(1) / (~pad).sum(1, keepdim=True)
        y: Tensor = self.head(self.norm(h))
        return y


@sick(
    CASES,
    "sy_rate_scaled_by_tokens",
    ("update_ratio_too_large", "loss_diverging"),
    source="https://arxiv.org/abs/1706.02677 Goyal et al.: the rate grows with the batch; here with its tokens, and under Adam",
    also=(
        "loss_spike",
        "gradient_spike",
        "exploding_gradient",
        "saturated_activation",
        "dead_units",
        "zero_gradient",
        "vanishing_gradient",
        "loss_plateau",
    ),
    proof=every(
        update_ratio(above=1.0, last=1),
        update_ratio(above=0.1, last=8),
        holds("the loss stays above", lambda plain: median(plain.losses[5:15]) > 3 * plain.losses[0]),
    ),
)
def _(seed: int) -> Setup:
    data = Topics(seed, batch=64)
    model = Encoder(data.vocabulary, data.topics)
    rate = 1e-3 * data.batch * data.length
    return fit(model, language(model, data), torch.optim.Adam(model.parameters(), lr=rate), 40)


@sick(
    CASES,
    "sy_adadelta_with_the_rate_of_adam",
    ("update_ratio_too_small",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.Adadelta.html its rate is 1.0; 1e-3 is that of Adam",
    also=("loss_plateau",),
    proof=every(update_ratio(below=3e-5, last=15), loss_stays(0.02)),
)
def _(seed: int) -> Setup:
    data = Walk(seed)
    model = Recurrent(data.vocabulary, kind=nn.LSTM)
    return fit(model, language(model, data), torch.optim.Adadelta(model.parameters(), lr=1e-3), 60)


# Sick runs: gradients across depth and in time ----------------------------------------------------------------------------------------


class _Round(torch.autograd.Function):
    """Rounds to multiples of `step`. The backward should hand the gradient on as it is, and divides it by the step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float) -> Tensor:
        ctx.step = step
        return torch.round(x / step) * step

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.step, None


class Quantise(nn.Module):
    """Activations on a grid."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Round.apply(x, 0.2)  # type: ignore[no-untyped-call]
        return y


class Causal(nn.Module):
    """A residual, dilated, causal convolution over `[batch, channels, time]`, its output on a grid."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv, self.act, self.mix = nn.Conv1d(width, width, 2, dilation=dilation), nn.GELU(), nn.Conv1d(width, width, 1)
        self.grid, self.dilation = Quantise(), dilation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.grid(x + self.mix(self.act(self.conv(F.pad(x, (self.dilation, 0))))))
        return y


@sick(
    CASES,
    "sy_quantised_tcn_divides_by_the_step_in_backward",
    ("exploding_gradient",),
    ("stem", "layers"),
    source="https://arxiv.org/abs/1902.08153 LSQ: the rounding is passed through with slope 1; here a custom backward forgets to scale back",
    proof=every(
        gradient_ratio("head.weight", "stem.weight", below=0.01, last=15),
        gradient_ratio("layers.5.conv.weight", "layers.3.conv.weight", below=0.15, last=15),
        gradient_ratio("layers.3.conv.weight", "layers.1.conv.weight", below=0.15, last=15),
    ),
)
def _(seed: int) -> Setup:
    data = Waves(seed)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv1d(1, 16, 1)
            self.layers = nn.Sequential(*(Causal(16, 2 ** (k % 3)) for k in range(6)))
            self.head = nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.layers(self.stem(x.transpose(1, 2)))[:, :, -1])
            return y

    model = Model()

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 60)


class Shrunk(GPT):
    """Lets a tenth of the gradient through, after every block and not only after the embedding."""

    def forward(self, x: Tensor) -> Tensor:
        h, mask = self.embed(x), causal(x.shape[1])
        for block in self.blocks:
            h = block(0.1 * h + 0.9 * h.detach(), mask)
        y: Tensor = self.head(self.norm(h))
        return y


@sick(
    CASES,
    "sy_embedding_shrink_in_every_block",
    ("vanishing_gradient",),
    ("tokens", "places", "blocks.0", "blocks.1", "blocks.2", "blocks.3"),
    source="https://arxiv.org/abs/2210.02414 GLM-130B: alpha 0.1 on the gradient of the embedding; here it stands inside the loop of blocks",
    proof=every(
        gradient_ratio("tokens.weight", "blocks.5.attn.qkv.weight", below=1e-4, last=15),
        gradient_ratio("blocks.0.ffn.0.weight", "blocks.5.ffn.0.weight", below=1e-4, last=15),
        gradient_ratio("blocks.3.ffn.0.weight", "blocks.5.ffn.0.weight", below=0.03, last=15),
        holds("the loss isn't low", lambda plain: median(plain.losses[-5:]) > 0.2 * plain.losses[0]),
    ),
)
def _(seed: int) -> Setup:
    data = Walk(seed)
    model = Shrunk(data.vocabulary, blocks=6)
    return fit(model, language(model, data), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 40)


@sick(
    CASES,
    "sy_sum_divided_by_the_count_of_another_batch",
    ("gradient_spike", "loss_spike"),
    onset=25,
    source="https://github.com/huggingface/transformers/issues/38448 the sum of the loss divided by a token count that isn't the batch's own",
    proof=every(gradient_spikes(25, 30), begins_at(60, update=25), holds("low before", lambda plain: max(plain.losses[:25]) < 4)),
)
def _(seed: int) -> Setup:
    data = Walk(seed, batch=8, length=12)
    model = Recurrent(data.vocabulary)

    def loss(i: int) -> Tensor:
        x, y = data()
        tokens = y.numel() if i != 25 else 2  # the last batch of the file has two tokens
        return xent(model(x), y, reduction="sum") / tokens

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 50)


@sick(
    CASES,
    "sy_one_shard_with_another_vocabulary",
    ("loss_spike", "gradient_spike"),
    onset=90,
    source="https://arxiv.org/abs/2204.02311 PaLM, 5.1: spikes of the loss that single data batches set off",
    proof=every(
        gradient_spikes(90, 10),
        holds(
            "the gradient leaps",
            lambda plain: all(plain.grads["head.weight"][90] > 30 * g for g in plain.grads["head.weight"][80:90]),
        ),
        holds("the loss leaps", lambda plain: plain.losses[90] > 20 * max(plain.losses[70:90])),
        converges(0.2),
    ),
)
def _(seed: int) -> Setup:
    data, other = Walk(seed, noise=0.0, vocabulary=16, batch=16), Walk(seed + 17, noise=0.0, vocabulary=16, batch=16)
    model = GPT(16, width=32)

    def loss(i: int) -> Tensor:
        x, y = other() if i == 90 else data()
        return xent(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 130)


# Sick runs: NaN and Inf ---------------------------------------------------------------------------------------------------------------


def after(first: str) -> tuple[str, ...]:
    """What follows from one NaN under the name of `first`."""
    return tuple(f"non_finite_{what}" for what in ("gradient", "weight", "activation", "loss") if f"non_finite_{what}" != first)


class Pool(nn.Module):
    """A weighted mean over the words that are no padding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, h: Tensor, pad: Tensor) -> Tensor:
        weights = torch.softmax(self.score(h)[..., 0].masked_fill(pad, -math.inf), -1)
        return (weights[..., None] * h).sum(1)


class Reader(nn.Module):
    """A bidirectional GRU, pooled by attention."""

    def __init__(self, vocabulary: int, classes: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, 24, padding_idx=0)
        self.encoder = nn.GRU(24, 16, batch_first=True, bidirectional=True)
        self.pool, self.head = Pool(32), nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.pool(self.encoder(self.tokens(x))[0], x == 0))
        return y


@sick(
    CASES,
    "sy_an_empty_sentence_in_the_batch",
    ("non_finite_activation",),
    ("pool",),
    onset=12,
    also=after("non_finite_activation"),
    source="https://github.com/pytorch/pytorch/issues/41508 softmax over a row that is masked in full",
    proof=every(
        first_non_finite(12, "pool"),
        holds(
            "the encoder and the scores are finite then",
            lambda plain: not any(o.nonfinite for o in plain.outputs["pool.score"][:13] if o),
        ),
    ),
)
def _(seed: int) -> Setup:
    data = Topics(seed, shortest=4)
    model = Reader(data.vocabulary, data.topics)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 12:
            x[3] = 0
        return xent(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 30)


class Recogniser(nn.Module):
    """Log-probabilities of labels, frame by frame."""

    def __init__(self, features: int, labels: int, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Linear(features, width)
        self.rnn = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, labels + 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.head(self.rnn(torch.relu(self.stem(x)))[0]), -1)


@sick(
    CASES,
    "sy_ctc_with_fewer_frames_than_labels",
    ("non_finite_loss",),
    onset=15,
    also=after("non_finite_loss"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CTCLoss.html zero_infinity: infinite where inputs are too short",
    proof=every(
        holds(
            "the loss is infinite at 15 and finite before",
            lambda p: p.losses[15] == math.inf and all(map(math.isfinite, p.losses[:15])),
        ),
        holds("the outputs are finite then", lambda plain: not any(o.nonfinite for o in plain.outputs[""][:16] if o)),
    ),
)
def _(seed: int) -> Setup:
    data = Speech(seed)
    model = Recogniser(8, data.labels)

    def loss(i: int) -> Tensor:
        x, y = data()
        frames = torch.full((len(x),), x.shape[1])
        if i == 15:
            frames[2] = 3  # what is left of it after silence was cut off
        return F.ctc_loss(model(x).transpose(0, 1), y, frames, torch.full((len(y),), y.shape[1]))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 30)


class Spread(nn.Module):
    """Mean and standard deviation over time."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([h.mean(1), h.var(1, unbiased=False).sqrt()], -1)


@sick(
    CASES,
    "sy_standard_deviation_of_one_frame",
    ("non_finite_gradient",),
    ("frames", "pool"),
    onset=18,
    also=after("non_finite_gradient"),
    source="https://github.com/pytorch/pytorch/issues/4320 the gradient of a standard deviation that is zero",
    proof=every(
        first_non_finite(18),
        holds("loss and outputs are finite then", lambda p: math.isfinite(p.losses[18]) and not p.outputs["pool"][18].nonfinite),  # type: ignore[union-attr]
        holds("the head's gradient is finite then", lambda plain: plain.nonfinite["head.weight"][18] == 0),
        holds("that of the frames isn't", lambda plain: plain.nonfinite["frames.0.weight"][18] > 0),
    ),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(7600 + seed)
    voices = torch.randn(6, 8, generator=g)
    model = nn.Sequential()
    model.add_module("frames", nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 24)))
    model.add_module("pool", Spread())
    model.add_module("head", nn.Linear(48, 6))

    def loss(i: int) -> Tensor:
        y = torch.randint(6, (16,), generator=g)
        x = voices[y][:, None] + torch.randn(16, 12, 8, generator=g)
        return F.cross_entropy(model(x[:, :1] if i == 18 else x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 36)


@sick(
    CASES,
    "sy_rows_divided_by_their_norm_in_place",
    ("non_finite_weight",),
    ("tokens",),
    onset=10,
    also=after("non_finite_weight"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.Embedding.html padding_idx: that row is zero, and so is its norm",
    proof=every(
        first_non_finite(10),
        holds(
            "the weights are NaN at 10, not before",
            lambda p: [math.isnan(w) for w in p.weights["tokens.weight"][9:11]] == [False, True],
        ),
        holds(
            "only those of the embedding", lambda p: all(math.isfinite(w[10]) for n, w in p.weights.items() if n != "tokens.weight")
        ),
    ),
)
def _(seed: int) -> Setup:
    data = Topics(seed, shortest=5)
    model = Reader(data.vocabulary, data.topics)

    def project(i: int) -> None:
        if i and i % 10 == 0:
            with torch.no_grad():
                model.tokens.weight.div_(model.tokens.weight.norm(dim=1, keepdim=True))

    return fit(model, language(model, data), torch.optim.Adam(model.parameters(), lr=3e-3), 30, before=project)


@sick(
    CASES,
    "sy_a_gap_in_the_sensor_stream",
    ("non_finite_input",),
    ("",),
    onset=9,
    also=after("non_finite_input"),
    source="https://pandas.pydata.org/docs/user_guide/missing_data.html a gap in a table of readings is NaN; nobody filled it",
    proof=every(
        noted("readings that are NaN, before", below=0.5, last=9),
        noted("readings that are NaN, then", above=0.5, first=9, last=10),
        first_non_finite(9),
    ),
)
def _(seed: int) -> Setup:
    data = Waves(seed)
    model = nn.Sequential()
    model.add_module("stem", nn.Conv1d(1, 16, 3, padding=1))
    model.add_module("body", nn.Sequential(nn.GELU(), nn.Conv1d(16, 16, 3, padding=1), nn.GELU(), nn.Flatten()))
    model.add_module("head", nn.Linear(256, 2))
    gaps = note(model)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 9:
            x[4, 5:8] = math.nan
        gaps.append(float(x.isnan().sum()))
        return F.mse_loss(model(x.transpose(1, 2)), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), 25)


# Sick runs: wrong from the first step -------------------------------------------------------------------------------------------------


@sick(
    CASES,
    "sy_prior_bias_on_every_feed_forward",
    ("dead_units",),
    ("blocks.0.ffn", "blocks.1.ffn"),
    also=("zero_gradient", "poor_init", "vanishing_gradient"),
    source="https://arxiv.org/abs/1708.02002 focal loss: the bias -log(99) belongs to the last layer; here a loop gives it to all of them",
    proof=every(
        dead_fraction("blocks.0.ffn.1", 0.95, last=15),
        dead_fraction("blocks.1.ffn.1", 0.95, last=15),
        moves("blocks.0.attn.qkv.weight"),
    ),
)
def _(seed: int) -> Setup:
    data = Walk(seed)
    model = GPT(data.vocabulary)
    for block in model.blocks:
        block.ffn = feed(24, nn.ReLU)
        for layer in (block.ffn[0], block.ffn[2]):
            nn.init.constant_(layer.bias, -math.log(99))
    return fit(model, language(model, data), torch.optim.AdamW(model.parameters(), lr=3e-3), 50)


@sick(
    CASES,
    "sy_pooler_of_unit_variance_weights",
    ("saturated_activation", "poor_init"),
    ("pooler",),
    source="https://arxiv.org/abs/1810.04805 BERT: a tanh pooler, weights of std 0.02; here normal_() with its default of 1",
    proof=every(
        noted("mean derivative of the pooler's tanh", below=0.15, last=15),
        holds("its outputs are near 1", lambda plain: min(o.rms for o in plain.outputs["pooler.1"][:15] if o) > 0.93),
    ),
)
def _(seed: int) -> Setup:
    data = Topics(seed)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.block, self.norm = nn.Embedding(data.vocabulary, 64), Block(64), nn.LayerNorm(64)
            dense = nn.Linear(64, 64)
            nn.init.normal_(dense.weight)
            self.pooler, self.head = nn.Sequential(dense, nn.Tanh()), nn.Linear(64, data.topics)

        def forward(self, x: Tensor) -> Tensor:
            h = self.pooler(self.norm(self.block(self.tokens(x)).mean(1)))
            measured.append(float((1 - h.detach() ** 2).mean()))
            y: Tensor = self.head(h)
            return y

    model = Model()
    measured = note(model)
    return fit(model, language(model, data), torch.optim.AdamW(model.parameters(), lr=1e-3), 40)


@sick(
    CASES,
    "sy_tied_head_of_unit_variance",
    ("poor_init",),
    ("tokens", "head"),
    source="https://arxiv.org/abs/1608.05859 tying input and output embedding; nn.Embedding begins at std 1, too much for a head",
    proof=every(begins_at(4 * math.log(64)), holds("the loss falls", lambda plain: plain.losses[-1] < 0.7 * plain.losses[0])),
)
def _(seed: int) -> Setup:
    data = Walk(seed, vocabulary=64, batch=24)
    model = GPT(64, width=64)
    nn.init.normal_(model.tokens.weight)
    model.head.weight = model.tokens.weight
    return fit(model, language(model, data), torch.optim.AdamW(model.parameters(), lr=5e-3), 60)


@sick(
    CASES,
    "sy_raw_readings_into_an_lstm",
    ("unnormalized_input",),
    ("",),
    also=("saturated_activation", "poor_init", "zero_gradient", "vanishing_gradient", "loss_plateau"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html gates are sigmoids; readings of 5000 +- 300 go in as they are",
    proof=every(
        noted("standard deviation and mean of the input", above=200, last=30),
        holds("the loss stays high", lambda plain: median(plain.losses[10:15]) > 0.5 * median(plain.losses[:5])),
    ),
)
def _(seed: int) -> Setup:
    data = Waves(seed)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(1, 24, batch_first=True), nn.Linear(24, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.rnn(x)[0][:, -1])
            return y

    model = Model()
    measured = note(model)

    def loss(i: int) -> Tensor:
        x, y = data()
        x = 5000 + 300 * x
        measured.extend([float(x.std()), float(x.mean())])
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 60)


@sick(
    CASES,
    "sy_intent_head_ends_in_softmax",
    ("double_softmax",),
    ("head.1",),
    also=("loss_plateau", "vanishing_gradient"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html wants logits; here it is given probabilities",
    proof=every(
        holds("outputs are probabilities", lambda plain: all(o.low >= 0 and o.high <= 1 for o in plain.outputs["head.1"] if o)),
        noted("sum of a row that cross_entropy is given", above=0.999, below=1.001),
    ),
)
def _(seed: int) -> Setup:
    data = Topics(seed, topics=12, words=4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.rnn = nn.Embedding(data.vocabulary, 24), nn.GRU(24, 32, batch_first=True)
            self.head = nn.Sequential(nn.Linear(32, data.topics), nn.Softmax(-1))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.rnn(self.tokens(x))[1][0])
            return y

    model = Model()
    measured = note(model)

    def loss(i: int) -> Tensor:
        x, y = data()
        out = model(x)
        measured.append(float(out.detach().sum(-1).mean()))
        return F.cross_entropy(out, y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 60)


# Sick runs: the loss and its scale ----------------------------------------------------------------------------------------------------


@sick(
    CASES,
    "sy_optimizer_told_to_maximize",
    ("loss_diverging",),
    also=("exploding_gradient", "saturated_activation", "loss_spike"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html maximize=True, from a script that maximised a return",
    proof=every(
        holds("the loss doubles in 14 updates", lambda plain: plain.losses[14] > 2.3 * plain.losses[0]),
        holds("and grows on", lambda plain: plain.losses[-1] > 2 * plain.losses[14]),
        holds("steps are of a common size", lambda plain: max(plain.update_ratio(i) for i in range(15)) < 0.05),
    ),
)
def _(seed: int) -> Setup:
    data = Walk(seed)
    model = Recurrent(data.vocabulary)
    return fit(model, language(model, data), torch.optim.AdamW(model.parameters(), lr=1.5e-2, maximize=True), 50)


@sick(
    CASES,
    "sy_labels_shuffled_apart_from_sentences",
    ("loss_plateau",),
    within=100,  # a plateau: the design gives it 100
    source="https://arxiv.org/abs/1611.03530 Zhang et al.: random labels; here sentences and labels are shuffled each by itself",
    proof=every(
        loss_stays(0.05, last=100),
        begins_at(0.95 * math.log(4)),
        holds("it has not learned at all", lambda plain: median(plain.losses[80:]) > 0.95 * math.log(4)),
        holds(
            "gradients come and steps are taken",
            lambda plain: min(plain.grads["tokens.weight"]) > 0 and plain.update_ratio(50) > 1e-4,
        ),
    ),
)
def _(seed: int) -> Setup:
    data = Topics(seed, batch=64)
    model = Encoder(data.vocabulary, data.topics, layers=1)
    nn.init.normal_(model.head.weight, std=0.02)

    def loss(i: int) -> Tensor:
        x, y = data()
        return xent(model(x), y[torch.randperm(len(y), generator=data.generator)])

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-4), 140)


@sick(
    CASES,
    "sy_scaler_skips_for_ever",
    ("loss_scale_collapse", "non_finite_gradient"),
    also=("never_stepped", "loss_plateau", "frozen_weights"),
    source="https://github.com/pytorch/pytorch/issues/4320 a root at zero makes every gradient NaN; the scaler halves its scale and skips",
    proof=every(
        holds("nothing ever steps", lambda plain: all(math.isnan(s) for s in plain.steps["tokens.weight"])),
        holds("weights stay finite", lambda plain: all(math.isfinite(w) for v in plain.weights.values() for w in v)),
        holds("the loss is finite", lambda plain: all(map(math.isfinite, plain.losses))),
        noted("log2 of the scale after 18 updates", below=0, first=18),
    ),
)
def _(seed: int) -> Setup:
    data = Topics(seed)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.rnn, self.out = nn.Embedding(data.vocabulary, 24), nn.GRU(24, 24, batch_first=True), nn.Linear(24, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.rnn(self.tokens(x))[1][0])
            return y

    model = Model()
    measured = note(model)
    optimizer, scaler = torch.optim.Adam(model.parameters(), lr=3e-3), torch.amp.GradScaler("cpu")

    def train() -> Iterator[Event]:
        for _ in range(40):
            optimizer.zero_grad()
            x, y = data()
            z = model(x)
            distance = (z[:, None] - z[None]).square().sum(-1).sqrt()  # zero on the diagonal, where a root has no gradient
            same = y[:, None] == y[None]
            loss = distance[same].mean() + F.relu(1 - distance[~same]).mean()
            scaler.scale(loss).backward()
            yield "read", [loss]
            scaler.step(optimizer)
            scaler.update()
            measured.append(math.log2(scaler.get_scale()))
            yield "step", []

    return Setup(model, train)


# Healthy runs -------------------------------------------------------------------------------------------------------------------------


@healthy(
    CASES,
    "sy_ok_scaler_searches_its_scale",
    source="https://docs.pytorch.org/docs/stable/amp.html float16 and a GradScaler: it starts too high, skips, and skips again after it grew",
    proof=every(
        holds("some updates are skipped", lambda plain: 3 <= sum(math.isnan(s) for s in plain.steps["head.weight"]) <= 20),
        holds("the loss falls", lambda plain: median(plain.losses[-10:]) < 0.4 * median(plain.losses[:10])),
    ),
)
def _(seed: int) -> Setup:
    data = Walk(seed)
    model = GPT(data.vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**23, growth_interval=20)

    def train() -> Iterator[Event]:
        for _ in range(120):
            x, y = data()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = xent(model(x), y)
            scaler.scale(loss).backward()
            yield "read", [loss]
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            yield "step", [optimizer] if scaler.get_scale() >= scale else []

    return Setup(model, train)


@healthy(
    CASES,
    "sy_ok_post_norm_warm_up_from_zero",
    source="https://arxiv.org/abs/1706.03762 Attention Is All You Need: post-norm, rate from 0 up and then by the inverse root",
    proof=every(unchanged("head.weight", last=1), converges(0.5)),
)
def _(seed: int) -> Setup:
    data = Topics(seed, batch=24)
    model = Encoder(data.vocabulary, data.topics, norm_first=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.98), eps=1e-9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(s / 25, (25 / max(s, 1)) ** 0.5))
    loss_of = language(model, data)

    def train() -> Iterator[Event]:
        for i in range(120):
            optimizer.zero_grad()
            loss = loss_of(i)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "sy_ok_tied_lstm_with_warm_restarts",
    source="https://arxiv.org/abs/1608.03983 SGDR: the rate falls to nearly nothing and leaps back; tied embeddings, clipped gradients",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data = Walk(seed)
    model = Recurrent(data.vocabulary, kind=nn.LSTM)
    nn.init.normal_(model.tokens.weight, std=0.1)
    model.head.weight = model.tokens.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=30, T_mult=2, eta_min=1e-5)
    loss_of = language(model, data)

    def train() -> Iterator[Event]:
        for i in range(210):
            optimizer.zero_grad()
            loss = loss_of(i)
            loss.backward()
            yield "read", [loss]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


class Padded(GPT):
    """Hides the padding, index 0, from all but the first position."""

    def forward(self, x: Tensor) -> Tensor:
        pad = (x == 0)[:, None, None].expand(-1, 1, x.shape[1], -1)
        h, mask = self.embed(x), causal(x.shape[1]).masked_fill(pad, -math.inf)
        for block in self.blocks:
            h = block(h, mask)
        y: Tensor = self.head(self.norm(h))
        return y


@healthy(
    CASES,
    "sy_ok_padded_batches_and_infinite_masks",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html ignore_index; masks of -inf; ragged batches",
    proof=converges(0.45),
)
def _(seed: int) -> Setup:
    data = Walk(seed, vocabulary=16, length=14)
    model = Padded(17)

    def loss(i: int) -> Tensor:
        x, y = data()
        sizes = torch.randint(2, 15, (len(x), 1), generator=data.generator)
        beyond = torch.arange(14) >= sizes
        return xent(model((x + 1).masked_fill(beyond, 0)), (y + 1).masked_fill(beyond, -100), ignore_index=-100)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=4e-3), 130)


@healthy(
    CASES,
    "sy_ok_experts_that_rest",
    source="https://arxiv.org/abs/2101.03961 Switch Transformers: one expert a token and a balancing loss; small batches leave experts idle",
    proof=every(
        holds(
            "experts are idle at times",
            lambda p: sum(o is None for k in range(8) for o in p.outputs[f"block.ffn.experts.{k}"]) > 40,
        ),
        holds(
            "and none for good",
            lambda p: all(any(o is not None for o in p.outputs[f"block.ffn.experts.{k}"][-40:]) for k in range(8)),
        ),
        converges(0.5),
    ),
)
def _(seed: int) -> Setup:
    data = Walk(seed, batch=4, length=8)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.block = nn.Embedding(data.vocabulary, 24), Block(24, Experts(24, experts=8))
            self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, data.vocabulary)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.norm(self.block(self.tokens(x), causal(x.shape[1]))))
            return y

    model = Model()

    def loss(i: int) -> Tensor:
        x, y = data()
        value = xent(model(x), y)
        balance: Tensor = model.block.ffn.balance
        return value + 0.05 * balance

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=4e-3), 130)


@healthy(
    CASES,
    "sy_ok_lora_whose_b_begins_at_zero",
    source="https://arxiv.org/abs/2106.09685 LoRA: B is zero at the start, so A has no gradient in the first update; the base is frozen",
    proof=every(
        zero_gradient("blocks.0.attn.qkv.a.weight", last=1),
        holds("A learns then", lambda plain: min(plain.grads["blocks.0.attn.qkv.a.weight"][2:]) > 0),
        converges(0.5),
    ),
)
def _(seed: int) -> Setup:
    model, data = pretrained(seed)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for block in model.blocks:
        block.attn.qkv, block.ffn[0], block.ffn[2] = LoRA(block.attn.qkv), LoRA(block.ffn[0]), LoRA(block.ffn[2])
    trained = [p for p in model.parameters() if p.requires_grad]
    return fit(model, language(model, data), torch.optim.AdamW(trained, lr=4e-3), 120)


@healthy(
    CASES,
    "sy_ok_sparse_rows_never_seen",
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.SparseAdam.html sparse embeddings beside a dense optimizer",
    proof=every(
        holds("most rows are never seen", lambda plain: plain.setup.model.__dict__["measured"][0] > 0.7),
        converges(0.3),
    ),
)
def _(seed: int) -> Setup:
    data = Topics(seed, topics=6)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.EmbeddingBag(400, 32, mode="mean", sparse=True)
            self.body = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, data.topics))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(self.words(x))
            return y

    model = Model()
    note(model).append(1 - data.vocabulary / 400)
    rows = torch.optim.SparseAdam(list(model.words.parameters()), lr=1e-2)
    dense = torch.optim.AdamW(model.body.parameters(), lr=4e-3)
    loss_of = language(model, data)

    def train() -> Iterator[Event]:
        for i in range(120):
            rows.zero_grad()
            dense.zero_grad()
            loss = loss_of(i)
            loss.backward()
            yield "read", [loss]
            rows.step()
            dense.step()
            yield "step", [rows, dense]

    return Setup(model, train)


@healthy(
    CASES,
    "sy_ok_z_loss_and_the_floor_of_smoothing",
    source="https://arxiv.org/abs/2204.02311 PaLM: z-loss 1e-4 log^2 Z; https://arxiv.org/abs/1512.00567 label smoothing has a floor above 0",
    proof=every(
        holds("the floor", lambda plain: min(plain.losses) > 0.4),
        holds("it is learned", lambda plain: median(plain.setup.model.__dict__["measured"][-10:]) > 0.85),
    ),
)
def _(seed: int) -> Setup:
    data = Walk(seed, noise=0.05)
    model = GPT(data.vocabulary)
    right = note(model)

    def loss(i: int) -> Tensor:
        x, y = data()
        logits = model(x)
        right.append(float((logits.argmax(-1) == y).double().mean()))
        return xent(logits, y, label_smoothing=0.1) + 1e-3 * torch.logsumexp(logits, -1).square().mean()

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95)), 150)


@healthy(
    CASES,
    "sy_ok_truncated_backpropagation",
    source="https://github.com/pytorch/examples/tree/main/word_language_model a state carried over chunks and detached, zero at each epoch",
    proof=converges(0.35),
)
def _(seed: int) -> Setup:
    stream = Walk(seed, batch=8, length=160)
    model = Recurrent(stream.vocabulary, layers=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    text = stream()

    def train() -> Iterator[Event]:
        for _ in range(10):
            state = torch.zeros(2, 8, 32)
            for k in range(0, 160, 10):
                optimizer.zero_grad()
                h, state = model.rnn(model.tokens(text[0][:, k : k + 10]), state.detach())
                loss = xent(model.head(h), text[1][:, k : k + 10])
                loss.backward()
                yield "read", [loss]
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "sy_ok_thawed_from_the_top",
    source="https://arxiv.org/abs/1801.06146 ULMFiT: the head first, then a block more, then all; smaller rates below",
    proof=every(no_gradient("tokens.weight", last=60), moves("tokens.weight", first=60), converges(0.4)),
)
def _(seed: int) -> Setup:
    model, data = pretrained(seed)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.norm.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)

    def thaw(i: int) -> None:
        more = {25: [model.blocks[1]], 60: [model.blocks[0], model.tokens, model.places]}.get(i, [])
        fresh = [p for m in more for p in m.requires_grad_(True).parameters()]
        if fresh:
            optimizer.add_param_group({"params": fresh, "lr": 3e-3})

    return fit(model, language(model, data), optimizer, 130, before=thaw)


@healthy(
    CASES,
    "sy_ok_three_backwards_and_a_teacher",
    source="https://arxiv.org/abs/1703.01780 Mean Teacher: an average of the weights teaches; each loss has a backward call of its own",
    proof=every(
        no_gradient("teacher.tokens.weight", "teacher.head.weight"),
        moves("student.tokens.weight", "student.head.weight"),
        converges(0.4),
    ),
)
def _(seed: int) -> Setup:
    data = Topics(seed, batch=16)
    student = Encoder(data.vocabulary, data.topics, layers=1)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.05)

    def train() -> Iterator[Event]:
        for i in range(90):
            optimizer.zero_grad()
            losses = []
            for _ in range(2):
                x, y = data()
                loss = xent(student(x), y) / 2
                loss.backward()
                losses.append(loss)
            x, _ = data()
            with torch.no_grad():
                wanted = torch.softmax(teacher(x), -1)
            loss = 0.1 * min(1.0, i / 40) * F.mse_loss(torch.softmax(student(x), -1), wanted)
            loss.backward()
            losses.append(loss)
            yield "read", losses
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                    slow.lerp_(fast, 0.05)
            yield "step", [optimizer]

    return Setup({"student": student, "teacher": teacher}, train)


@healthy(
    CASES,
    "sy_ok_gradient_noise_by_hooks",
    source="https://arxiv.org/abs/1511.06807 Neelakantan et al.: noise of falling variance on every gradient; here tensor hooks add it",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data = mapped(seed)
    model = Translator(12, attend=True)
    noise = torch.Generator().manual_seed(7700 + seed)
    when = {"update": 0}

    def disturb(grad: Tensor) -> Tensor:
        scale = math.sqrt(1e-4 / (1 + when["update"]) ** 0.55)
        return grad + scale * torch.randn(grad.shape, generator=noise)

    for p in model.parameters():
        p.register_hook(disturb)

    def loss(i: int) -> Tensor:
        when["update"] = i
        x, y = data()
        return xent(model(x, y), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=6e-3), 220)


@healthy(
    CASES,
    "sy_ok_ctc_after_its_plateau_of_blanks",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CTCLoss.html at first all frames say blank, and the loss hardly falls",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    data = Speech(seed)
    model = Recogniser(8, data.labels)

    def loss(i: int) -> Tensor:
        x, y = data()
        frames, labels = torch.full((len(x),), x.shape[1]), torch.randint(2, y.shape[1] + 1, (len(y),), generator=data.generator)
        return F.ctc_loss(model(x).transpose(0, 1), y, torch.minimum(frames, 3 * labels), labels, zero_infinity=True)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=6e-3), 120)


class Diagonal(nn.Module):
    """A diagonal state space: each channel decays at its own rate, and a gate lets it out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(-3.0, 0.5, width))
        self.skip = nn.Parameter(torch.ones(width))
        self.into, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.utils.parametrizations.weight_norm(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        decay, u, state, states = torch.exp(-torch.exp(self.rate)), self.into(x), torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = decay * state + (1 - decay) * u[:, t]
            states.append(state)
        y: Tensor = self.out((torch.stack(states, 1) + self.skip * u) * F.silu(self.gate(x)))
        return y


@healthy(
    CASES,
    "sy_ok_state_space_resumed_in_bf16",
    source="https://arxiv.org/abs/2206.11893 S4D: own rates for the state and no decay; stopped, saved and resumed with a new optimizer",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data = Walk(seed, length=10)
    model = nn.Sequential(
        nn.Embedding(data.vocabulary, 24), nn.LayerNorm(24), Diagonal(24), nn.LayerNorm(24), nn.Linear(24, data.vocabulary)
    )

    def optimizer_of() -> torch.optim.Optimizer:
        state = [p for name, p in model.named_parameters() if name.endswith("rate")]
        rest = [p for name, p in model.named_parameters() if not name.endswith("rate")]
        return torch.optim.AdamW(
            [{"params": rest, "weight_decay": 0.05}, {"params": state, "lr": 1e-3, "weight_decay": 0.0}], lr=5e-3
        )

    def train() -> Iterator[Event]:
        optimizer = optimizer_of()
        for i in range(140):
            if i == 70:
                saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
                model.load_state_dict(saved["model"])
                optimizer = optimizer_of()
                optimizer.load_state_dict(saved["optimizer"])
            x, y = data()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = xent(model(x), y)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)
