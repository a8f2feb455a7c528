"""Runs that read: classifiers, taggers, language models, retrieval, fine-tuning and preferences, with the loops around them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

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
    update_ratio,
    zero_gradient,
)

CASES: list[Case] = []


class Notes:
    """Notes on topics: a third of the words of a note are of its topic, the others are common. Word 0 pads, lengths differ."""

    def __init__(self, seed: int, topics: int = 4, batch: int = 32, length: int = 14, own: int = 6, common: int = 30) -> None:
        self.generator = torch.Generator().manual_seed(7100 + seed)
        self.topics, self.batch, self.length, self.own, self.common = topics, batch, length, own, common
        self.vocabulary = 1 + topics * own + common

    def __call__(self) -> tuple[Tensor, Tensor]:
        g, shape = self.generator, (self.batch, self.length)
        y = torch.randint(self.topics, (self.batch,), generator=g)
        theirs = 1 + y[:, None] * self.own + torch.randint(self.own, shape, generator=g)
        others = 1 + self.topics * self.own + torch.randint(self.common, shape, generator=g)
        x = torch.where(torch.rand(shape, generator=g) < 0.35, theirs, others)
        ends = torch.randint(self.length // 2, self.length + 1, (self.batch, 1), generator=g)
        return x.masked_fill(torch.arange(self.length) >= ends, 0), y


class Mean(nn.Module):
    """The sum of the embeddings of the words that are no padding, over the root of their number: of the size of one word."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.words(x).sum(1) / (x > 0).sum(1, keepdim=True).clamp(min=1).sqrt()
        return out


class Attention(nn.Module):
    """Self-attention written out, with a mask of what may be looked at."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(w // self.heads)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        out: Tensor = self.out((weights @ v).transpose(1, 2).reshape(b, t, w))
        return out


class Block(nn.Module):
    """A transformer block with the norms before."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), seen)
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Decoder(nn.Module):
    """A small GPT."""

    def __init__(self, vocabulary: int = 24, width: int = 32, depth: int = 2, length: int = 16, tied: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.words.weight, std=0.1)
        nn.init.normal_(self.places.weight, std=0.1)
        if tied:
            self.head.weight = self.words.weight

    def hidden(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        h = self.words(x) + self.places.weight[:t]
        seen = torch.ones(t, t, dtype=torch.bool).tril()
        for block in self.blocks:
            h = block(h, seen)
        out: Tensor = self.norm(h)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.hidden(x))
        return out


class Reader(nn.Module):
    """Embedding, GRU, and a label for each word."""

    def __init__(self, vocabulary: int, width: int, labels: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.gru: nn.RNNBase = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, labels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(self.words(x))[0])
        return out


def clipped(model: nn.Module, norm: float) -> Callable[[int], None]:
    """Clips the gradients between backward and step."""

    def between(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), norm)

    return between


def others_move(*names: str, first: int = 0, last: int | None = None) -> Proof:
    """These parameters are changed by every step: the fault is not theirs."""

    def proof(plain: Plain) -> str:
        for name in names:
            assert all(s > 0 for s in plain.steps[name][first:last]), f"{name} stays"
        return f"{', '.join(names)} move"

    return proof


def never_moves(*names: str, first: int = 0, last: int | None = None) -> Proof:
    """These parameters have gradients, steps are made, and they stay bit for bit."""

    def proof(plain: Plain) -> str:
        for name in names:
            assert all(s == 0 for s in plain.steps[name][first:last]), f"{name} moves"
            assert all(n > 0 for n in plain.grads[name][first:last]), f"{name} has no gradient"
        return f"{', '.join(names)}: gradients, and not a bit changes"

    return proof


# ---------------------------------------------------------------------------------------------------------------- sick runs


@sick(
    CASES,
    "rd_topics_softmax_before_cross_entropy",
    ("double_softmax",),
    ("head.probabilities",),
    source="https://runebook.dev/en/docs/pytorch/generated/torch.nn.softmax Softmax and then CrossEntropyLoss",
    proof=every(lambda p: _probabilities(p, "head.probabilities"), loss_stays(0.3, last=15)),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=5)
    head = nn.Sequential()
    head.add_module("scores", nn.Linear(32, 5))
    head.add_module("probabilities", nn.Softmax(-1))
    model = nn.Sequential()
    model.add_module("mean", Mean(data.vocabulary, 32))
    model.add_module("hidden", nn.Linear(32, 32))
    model.add_module("act", nn.GELU())
    model.add_module("head", head)
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 1e-2), 40)


def _probabilities(plain: Plain, module: str) -> str:
    seen = [o for o in plain.outputs[module] if o is not None]
    assert all(o.low >= 0 and o.high <= 1 for o in seen), "what cross-entropy is given are no probabilities"
    floor = math.log(1 + (len(seen[0].fired) - 1) / math.e)
    assert min(plain.losses) > floor - 1e-3, f"the loss falls to {min(plain.losses):.3g}, below {floor:.3g}"
    return f"cross-entropy is given numbers of 0 to 1, its floor is {floor:.3g}, the loss stays above"


@sick(
    CASES,
    "rd_gru_tagger_piles_up_over_windows",
    ("gradients_not_zeroed",),
    source="https://discuss.pytorch.org/t/why-do-we-need-to-set-the-gradients-manually-to-zero-in-pytorch/4903 "
    "accumulation without zero_grad",
    proof=lambda p: _piled(p, "head.weight"),
)
def _(seed: int) -> Setup:
    # Accumulation over four small batches, as it should be, except that nothing clears the gradient after the step.
    data = Text(seed, 12, 8, 10)
    model = Reader(12, 24, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def train() -> Iterator[Event]:
        for _ in range(30):
            losses = []
            for _ in range(4):
                x, y = data()
                loss = F.cross_entropy(model(x).flatten(0, 1), (y % 3).flatten()) / 4
                loss.backward()
                losses.append(loss)
            yield "read", losses
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


def _piled(plain: Plain, name: str) -> str:
    """The gradient at an update is nearer to the one before it plus something as large as the first than a fresh one can be."""
    grads = plain.grads[name]
    growth = max(grads[:12]) / grads[0]
    assert growth > 2.5, f"the gradient of {name} grows by {growth:.3g} only"
    ups = sum(b > a for a, b in itertools.pairwise(grads))
    assert ups >= 6, f"the gradient of {name} grows in {ups} of the first 8 updates"
    return f"the gradient of {name} piles up to {growth:.3g} times the first"


@sick(
    CASES,
    "rd_lora_both_factors_zero",
    ("zero_gradient",),
    ("block.query", "block.value"),
    source="https://arxiv.org/abs/2106.09685 LoRA, where A is Gaussian and B zero; here both are zero",
    proof=every(zero_gradient("block.query.a", "block.query.b", "block.value.a", "block.value.b"), others_move("head.weight")),
    also=("frozen_weights",),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=6)
    model = LoraReader(data.vocabulary, 6)
    for lora in (model.block.query, model.block.value):
        nn.init.zeros_(lora.a)
    return fit(model, classify(model, data), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3), 40)


class Lora(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 4, alpha: float = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.scale * (x @ self.a.T @ self.b.T)
        return out


class LoraBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.value = Lora(nn.Linear(width, width)), Lora(nn.Linear(width, width))
        self.key = nn.Linear(width, width).requires_grad_(False)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / math.sqrt(x.shape[-1])
        out: Tensor = x + scores.masked_fill(pad[:, None], -math.inf).softmax(-1) @ self.value(x)
        return out


class LoraReader(nn.Module):
    """A frozen embedding and attention with LoRA on queries and values, and a fresh head."""

    def __init__(self, vocabulary: int, topics: int, width: int = 32) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width).requires_grad_(False)
        self.block = LoraBlock(width)
        self.head = nn.Linear(width, topics)

    def forward(self, x: Tensor) -> Tensor:
        pad = x == 0
        h = self.block(self.words(x), pad).masked_fill(pad[..., None], 0)
        out: Tensor = self.head(h.sum(1) / (~pad).sum(1, keepdim=True).sqrt())
        return out


@sick(
    CASES,
    "rd_passages_encoded_without_graph",
    ("missing_gradient",),
    ("passage",),
    source="https://arxiv.org/abs/2004.04906 DPR, whose two encoders both learn; here the passages are encoded under no_grad",
    proof=every(
        no_gradient("passage.mean.words.weight", "passage.out.weight", "passage.out.bias"), others_move("question.out.weight")
    ),
)
def _(seed: int) -> Setup:
    return _retrieval(seed, detach=True)


class Encoder(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.mean, self.out = Mean(vocabulary, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.out(torch.tanh(self.mean(x))), dim=-1)


class Dual(nn.Module):
    """A question and a passage encoder."""

    def __init__(self, vocabulary: int, width: int = 32) -> None:
        super().__init__()
        self.question, self.passage = Encoder(vocabulary, width), Encoder(vocabulary, width)


def _pairs(seed: int, batch: int = 24) -> Callable[[], tuple[Tensor, Tensor]]:
    """Passages of six words out of 60, and questions: three of their words, in the words of another language."""
    generator = torch.Generator().manual_seed(7200 + seed)

    def draw() -> tuple[Tensor, Tensor]:
        passages = torch.rand(batch, 60, generator=generator).topk(6).indices + 1
        return 61 - passages[:, :3], passages

    return draw


def _retrieval(seed: int, detach: bool = False, updates: int = 60, lr: float = 3e-3) -> Setup:
    draw, model = _pairs(seed), Dual(61)

    def loss(i: int) -> Tensor:
        questions, passages = draw()
        with torch.set_grad_enabled(not detach):
            p = model.passage(passages)
        return F.cross_entropy(model.question(questions) @ p.T / 0.1, torch.arange(len(p)))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr), updates)


@sick(
    CASES,
    "rd_fine_tuning_head_after_optimizer",
    ("not_in_optimizer",),
    ("head",),
    source="https://docs.pytorch.org/docs/stable/optim.html parameters are collected when the optimizer is made; the "
    "head is replaced later",
    proof=every(
        lambda p: never_moves("head.weight", "head.bias")(p),
        others_move("mean.words.weight", "hidden.weight"),
    ),
    also=("frozen_weights",),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=4)
    model = nn.Sequential()
    model.add_module("mean", Mean(data.vocabulary, 24))
    model.add_module("hidden", nn.Linear(24, 24))
    model.add_module("act", nn.ReLU())
    model.add_module("head", nn.Linear(24, 1000))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    model.head = nn.Linear(24, 4)
    return fit(model, classify(model, data), optimizer, 40)


@sick(
    CASES,
    "rd_decoder_words_in_no_group",
    ("not_in_optimizer",),
    ("words", "places"),
    source="https://docs.pytorch.org/docs/stable/optim.html per-parameter options: the groups of decay and no decay "
    "leave the embeddings out",
    proof=every(never_moves("words.weight", "places.weight"), others_move("head.weight", "blocks.0.up.weight", "norm.weight")),
    also=("frozen_weights",),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, 20, 8, 12), Decoder(20, 32, 2, 12)
    linear = [p for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()]
    norms = [p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
    groups: list[dict[str, Any]] = [{"params": linear, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return fit(model, classify(model, data), torch.optim.AdamW(groups, 3e-3), 40)


@sick(
    CASES,
    "rd_words_have_an_optimizer_that_is_not_cleared",
    ("gradients_not_zeroed",),
    ("words",),
    source="https://discuss.pytorch.org/t/model-zero-grad-or-optimizer-zero-grad/28426 optimizer.zero_grad clears "
    "only what is its own",
    proof=every(lambda p: _piled(p, "words.weight"), lambda p: _not_piled(p, "head.weight", "words.weight")),
)
def _(seed: int) -> Setup:
    data = Text(seed, 16, 8, 10)
    model = Reader(16, 24, 16)
    words = torch.optim.SGD(model.words.parameters(), lr=0.05)
    rest = torch.optim.Adam([*model.gru.parameters(), *model.head.parameters()], 5e-3)

    def train() -> Iterator[Event]:
        for _ in range(40):
            rest.zero_grad()
            x, y = data()
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            yield "read", [loss]
            words.step()
            rest.step()
            yield "step", [words, rest]

    return Setup(model, train)


def _not_piled(plain: Plain, name: str, beside: str) -> str:
    growth, most = (max(plain.grads[n][:12]) / plain.grads[n][0] for n in (name, beside))
    assert growth < most / 2, f"the gradient of {name} grows by {growth:.3g}, that of {beside} by {most:.3g}"
    return f"that of {name} does not ({growth:.3g})"


@sick(
    CASES,
    "rd_accumulates_longer_than_the_epoch",
    ("never_stepped",),
    source="https://github.com/huggingface/transformers/issues/2995 fewer batches in an epoch than are accumulated: no step",
    proof=lambda p: _no_step(p),
    also=("gradients_not_zeroed", "loss_plateau", "update_ratio_too_small"),
)
def _(seed: int) -> Setup:
    # Six batches an epoch, eight are accumulated, and the count begins anew with every epoch, when the gradients are cleared too.
    data = Notes(seed, topics=3, batch=16)
    batches = [data() for _ in range(6)]
    model = nn.Sequential(Mean(data.vocabulary, 24), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def train() -> Iterator[Event]:
        for _ in range(10):
            optimizer.zero_grad()
            for k, (x, y) in enumerate(batches):
                loss = F.cross_entropy(model(x), y) / 8
                loss.backward()
                yield "read", [loss]
                if (k + 1) % 8 == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    yield "step", [optimizer]

    return Setup(model, train)


def _no_step(plain: Plain) -> str:
    assert all(math.isnan(s) for steps in plain.steps.values() for s in steps), "something steps"
    assert all(w[0] == w[-1] for w in plain.weights.values()), "a weight changes"
    assert all(g > 0 for g in plain.grads["1.weight"]), "there is no gradient"
    return f"{len(plain.losses)} backward passes, no step, no weight changes"


NORMS = ("norm", *(f"blocks.{k}.norm{n}" for k in (0, 1) for n in (1, 2)))


@sick(
    CASES,
    "rd_bf16_norms_stay_one",
    ("frozen_weights",),
    NORMS,
    source="https://github.com/vllm-project/speculators/pull/765 trained in bf16 alone, the norms keep the weight 1.0",
    proof=every(never_moves(*(f"{n}.weight" for n in NORMS)), others_move("head.weight", "blocks.0.up.weight", "words.weight")),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, 20, 8, 12), Decoder(20, 32, 2, 12).to(torch.bfloat16)
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 1e-3), 50)


class Convolutions(nn.Module):
    """Words, convolutions with an activation each, a maximum over the places and a head."""

    def __init__(self, vocabulary: int, labels: int, depth: int, act: Callable[[], nn.Module], width: int = 24) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(depth))
        self.acts = nn.ModuleList(act() for _ in range(depth))
        self.head = nn.Linear(width, labels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x).transpose(1, 2)
        for conv, act in zip(self.convs, self.acts, strict=True):
            h = act(conv(h))
        out: Tensor = self.head(h.amax(-1))
        return out


@sick(
    CASES,
    "rd_layer_rates_divided_as_integers",
    ("frozen_weights",),
    ("words", "convs.0", "convs.1"),
    source="https://arxiv.org/abs/1801.06146 ULMFiT, discriminative learning rates; layer // layers is 0 for all but the last",
    proof=every(
        never_moves("words.weight", "convs.0.weight", "convs.1.weight", "convs.1.bias"),
        others_move("convs.2.weight", "head.weight"),
    ),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=4)
    model = Convolutions(data.vocabulary, 4, 3, nn.ReLU)
    layers = [model.words, *model.convs]
    groups: list[dict[str, Any]] = [{"params": m.parameters(), "lr": 5e-3 * (k // 3)} for k, m in enumerate(layers)]
    optimizer = torch.optim.Adam([*groups, {"params": model.head.parameters(), "lr": 5e-3}])
    return fit(model, classify(model, data), optimizer, 40)


class Spans:
    """A text, a word of it that is asked for, and the answer: from that word to the next full stop (word 1). Word 0 pads."""

    def __init__(self, seed: int, batch: int = 24, length: int = 14, vocabulary: int = 30) -> None:
        self.generator = torch.Generator().manual_seed(7300 + seed)
        self.batch, self.length, self.vocabulary = batch, length, vocabulary

    def __call__(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        g, n = self.generator, self.length
        text = torch.rand(self.batch, self.vocabulary - 2, generator=g).argsort(1)[:, :n] + 2
        first = torch.randint(0, n - 5, (self.batch,), generator=g)
        last = first + torch.randint(1, 4, (self.batch,), generator=g)
        rows = torch.arange(self.batch)
        asked = text[rows, first]
        text[rows, last] = 1
        ends = torch.maximum(last + 1, torch.randint(n // 2, n + 1, (self.batch,), generator=g))
        return text.masked_fill(torch.arange(n) >= ends[:, None], 0), asked, first, last


class SpanReader(nn.Module):
    """A bidirectional GRU over the text, each word of it beside its product with the question."""

    def __init__(self, vocabulary: int = 30, width: int = 24) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(2 * width, width, batch_first=True, bidirectional=True)
        self.ends = nn.Linear(2 * width, 2)

    def forward(self, text: Tensor, asked: Tensor) -> Tensor:
        t = self.words(text)
        h = self.gru(torch.cat([t, t * self.words(asked)[:, None]], -1))[0]
        out: Tensor = self.ends(h).masked_fill((text == 0)[..., None], -math.inf)
        return out


def _spans(model: nn.Module, data: Spans, reduction: str = "mean") -> Callable[[int], Tensor]:
    def loss(i: int) -> Tensor:
        text, asked, first, last = data()
        start, end = model(text, asked).unbind(-1)
        return F.cross_entropy(start, first, reduction=reduction) + F.cross_entropy(end, last, reduction=reduction)

    return loss


@sick(
    CASES,
    "rd_spans_cleared_before_the_step",
    ("frozen_weights",),
    ("words", "gru", "ends"),
    source="https://discuss.pytorch.org/t/why-do-we-need-to-set-the-gradients-manually-to-zero-in-pytorch/4903 "
    "zero_grad between backward and step",
    proof=never_moves("words.weight", "gru.weight_ih_l0", "gru.weight_hh_l0_reverse", "ends.weight"),
    also=("never_stepped", "loss_plateau", "update_ratio_too_small"),
)
def _(seed: int) -> Setup:
    model, data = SpanReader(), Spans(seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    return fit(model, _spans(model, data), optimizer, 40, between=lambda i: optimizer.zero_grad())


class Pool(nn.Module):
    """The mean of what is given, weighted by a learned score; padding is masked."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, h: Tensor, pad: Tensor) -> Tensor:
        weights = self.score(h)[..., 0].masked_fill(pad, -math.inf).softmax(-1)
        out: Tensor = (weights[..., None] * h).sum(1)
        return out


class Pooled(nn.Module):
    def __init__(self, vocabulary: int, labels: int, width: int = 24) -> None:
        super().__init__()
        self.words, self.mix, self.pool = nn.Embedding(vocabulary, width), nn.Linear(width, width), Pool(width)
        self.head = nn.Linear(width, labels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.pool(F.gelu(self.mix(self.words(x))), x == 0))
        return out


EVERYTHING_ELSE = ("non_finite_loss", "non_finite_gradient", "non_finite_weight", "non_finite_activation")


@sick(
    CASES,
    "rd_empty_note_masks_every_word",
    ("non_finite_activation",),
    ("pool",),
    source="https://github.com/pytorch/pytorch/issues/24816 a sequence that is nothing but padding makes NaN",
    proof=every(
        first_non_finite(12, "pool"), first_non_finite(12), first_non_finite(13, "mix"), first_non_finite(13, "pool.score")
    ),
    onset=12,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=4, batch=24)
    model = Pooled(data.vocabulary, 4)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 12:
            x[5] = 0
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 30)


@sick(
    CASES,
    "rd_frequencies_of_an_empty_note",
    ("non_finite_input",),
    ("",),
    source="https://github.com/Lab41/pythia/pull/130 counts divided by the length of a document without words",
    proof=every(lambda p: _nan_input(p, 9), first_non_finite(9, "0"), first_non_finite(9)),
    onset=9,
    also=EVERYTHING_ELSE,
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=4)
    model = nn.Sequential(nn.Linear(data.vocabulary - 1, 32), nn.ReLU(), nn.Linear(32, 4))

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 9:
            x[20] = 0
        counts = F.one_hot(x, data.vocabulary).sum(1)[:, 1:].float()
        # Standard deviation of a frequency is near 0.05.
        return F.cross_entropy(model(20 * counts / counts.sum(1, keepdim=True)), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), 25)


def _nan_input(plain: Plain, update: int) -> str:
    """The first layer's weights are good at the update and its output is not: good weights do so with bad input alone."""
    seen = plain.outputs["0"][update]
    assert seen is not None
    assert math.isfinite(plain.weights["0.weight"][update]), "the weights are bad"
    assert seen.nonfinite == 32, f"{seen.nonfinite} outputs are not finite, not those of one row"
    return "good weights, and the outputs of one row of the batch are NaN"


class Sentence(nn.Module):
    """The last state of a GRU."""

    def __init__(self, vocabulary: int, width: int = 24) -> None:
        super().__init__()
        self.words, self.gru = nn.Embedding(vocabulary, width), nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.gru(self.words(x))[1][0]
        return out


@sick(
    CASES,
    "rd_triplet_of_a_duplicate",
    ("non_finite_gradient",),
    ("words", "gru"),
    source="https://github.com/keras-team/keras/issues/9097 the square root of a distance of 0; "
    "https://github.com/adambielski/siamese-triplet/issues/18",
    proof=every(first_non_finite(10), lambda p: _good_loss(p, 10), first_non_finite(11, "gru")),
    onset=10,
    also=("non_finite_loss", "non_finite_weight", "non_finite_activation"),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=4, batch=48)
    model = Sentence(data.vocabulary)

    def loss(i: int) -> Tensor:
        x, y = data()
        order = y.argsort()
        x, y = x[order], y[order]
        anchor, positive = x[:-1][y[1:] == y[:-1]], x[1:][y[1:] == y[:-1]].clone()
        negative = x.roll(24, 0)[: len(anchor)]
        if i == 10:
            positive[0] = anchor[0]
        a, p, n = model(anchor), model(positive), model(negative)
        near, far = (a - p).square().sum(-1).sqrt(), (a - n).square().sum(-1).sqrt()
        return F.relu(near - far + 1).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), 3e-3), 25)


def _good_loss(plain: Plain, update: int) -> str:
    assert math.isfinite(plain.losses[update]), "the loss is not finite"
    return "the loss is finite there"


@sick(
    CASES,
    "rd_root_decay_past_its_budget",
    ("non_finite_weight",),
    source="https://docs.pytorch.org/docs/stable/optim.html a schedule of one's own; sqrt(1 - progress) is NaN once "
    "the budget is spent",
    proof=lambda p: _weights_go(p, 21),
    onset=21,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_activation"),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, 16, 8, 16), Reader(16, 24, 16)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    budget = 2624  # tokens, 20.5 batches

    def before(i: int) -> None:
        optimizer.param_groups[0]["lr"] = float(0.5 * torch.sqrt(torch.tensor(1 - i * 128 / budget)))

    return fit(model, classify(model, data), optimizer, 40, before)


def _weights_go(plain: Plain, update: int) -> str:
    assert all(math.isfinite(x) for x in plain.losses[: update + 1]), "a loss before is not finite"
    assert not any(any(c[: update + 1]) for c in plain.nonfinite.values()), "a gradient before is not finite"
    for name, w in plain.weights.items():
        assert math.isfinite(w[update]), f"{name} is bad before"
        assert math.isnan(w[update + 1]), f"{name} does not become NaN by the step of {update}"
    return f"loss and gradients are good to update {update}, whose step makes every weight NaN"


class Copier(nn.Module):
    """A word of a small vocabulary is generated, or one of the text copied: the probability of a word is that of both ways."""

    def __init__(self, words: int = 40, known: int = 20, width: int = 24) -> None:
        super().__init__()
        self.words, self.gru = nn.Embedding(words, width), nn.GRU(width, width, batch_first=True)
        self.ask, self.generate, self.gate = nn.Linear(width, width), nn.Linear(width, known), nn.Linear(width, 1)
        self.all = words

    def forward(self, x: Tensor) -> Tensor:
        h, last = self.gru(self.words(x))
        last = last[0]
        where = (h @ self.ask(last)[..., None])[..., 0].softmax(-1)
        gate = self.gate(last).sigmoid()
        generated = gate * self.generate(last).softmax(-1)
        return F.pad(generated, (0, self.all - generated.shape[1])).scatter_add(1, x, (1 - gate) * where)


@sick(
    CASES,
    "rd_copier_cannot_say_the_word",
    ("non_finite_loss",),
    source="https://arxiv.org/abs/1704.04368 pointer-generator: a word neither in the vocabulary nor in the text has "
    "the probability 0",
    proof=every(first_non_finite(8), lambda p: _inf_loss(p, 8)),
    onset=8,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation", "loss_spike"),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(7400 + seed)
    model = Copier()

    def loss(i: int) -> Tensor:
        x = torch.randint(2, 40, (32, 8), generator=generator)
        at = torch.randint(0, 7, (32,), generator=generator)
        rows = torch.arange(32)
        x[rows, at] = 1
        target = x[rows, at + 1]
        if i == 8:
            x[3] = torch.tensor([2, 3, 4, 5, 1, 6, 7, 8])
            target[3] = 33
        said: Tensor = model(x).gather(1, target[:, None])
        return -said.log().mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 30)


def _inf_loss(plain: Plain, update: int) -> str:
    assert plain.losses[update] == math.inf, f"the loss is {plain.losses[update]}"
    seen = plain.outputs[""][update]
    assert seen is not None
    assert seen.nonfinite == 0, "the probabilities are not finite"
    return "the loss is Inf, of finite probabilities"


class Attentive(nn.Module):
    """A GRU whose states are summed, weighted by attention; the softmax runs over the last dimension, which has one element."""

    def __init__(self, vocabulary: int, labels: int, dim: int, width: int = 24) -> None:
        super().__init__()
        self.words, self.gru = nn.Embedding(vocabulary, width), nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.project, self.score = nn.Linear(2 * width, width), nn.Linear(width, 1, bias=False)
        self.head, self.dim = nn.Linear(2 * width, labels), dim

    def forward(self, x: Tensor) -> Tensor:
        h = self.gru(self.words(x))[0]
        weights = self.score(torch.tanh(self.project(h))).softmax(self.dim)
        out: Tensor = self.head((weights * h).sum(1))
        return out


@sick(
    CASES,
    "rd_attention_softmax_over_one_score",
    ("zero_gradient",),
    ("project", "score"),
    source="https://arxiv.org/abs/1409.0473 attention over the words; the softmax is taken over the wrong dimension",
    proof=every(zero_gradient("project.weight", "project.bias", "score.weight"), others_move("gru.weight_hh_l0", "head.weight")),
    also=("frozen_weights",),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=4, batch=16)
    model = Attentive(data.vocabulary, 4, dim=-1)
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 3e-3), 40)


@sick(
    CASES,
    "rd_never_called_gate",
    ("missing_gradient",),
    ("gate",),
    source="https://github.com/pytorch/pytorch/issues/57776 unused parameters: a registered layer that forward leaves out",
    proof=every(no_gradient("gate.weight", "gate.bias"), lambda p: _not_called(p, "gate"), others_move("gru.weight_hh_l0")),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, 16, 8, 10), Reader(16, 24, 16)
    model.add_module("gate", nn.Linear(24, 24))
    return fit(model, classify(model, data), torch.optim.AdamW(model.parameters(), 5e-3), 45)


def _not_called(plain: Plain, module: str) -> str:
    assert all(o is None for o in plain.outputs[module]), f"{module} is called"
    return f"{module} is never called"


class Memory(nn.Module):
    """Facts, each of a name and a word; the word that belongs to the name asked for is looked up."""

    def __init__(self, names: int = 20, values: int = 12, width: int = 24, hard: bool = False) -> None:
        super().__init__()
        self.asked, self.keys = nn.Embedding(names, width), nn.Embedding(names, width)
        self.values, self.head, self.hard = nn.Embedding(values, width), nn.Linear(width, values), hard

    def forward(self, names: Tensor, values: Tensor, asked: Tensor) -> Tensor:
        scores = (self.keys(names) @ self.asked(asked)[..., None])[..., 0] / math.sqrt(self.keys.embedding_dim)
        if self.hard:
            found = self.values(values.gather(1, scores.argmax(1, keepdim=True)))[:, 0]
        else:
            found = (scores.softmax(-1)[..., None] * self.values(values)).sum(1)
        out: Tensor = self.head(found)
        return out


def _facts(seed: int, model: Memory, batch: int = 32) -> Callable[[int], Tensor]:
    generator = torch.Generator().manual_seed(7500 + seed)

    def loss(i: int) -> Tensor:
        names = torch.rand(batch, 20, generator=generator).argsort(1)[:, :5]
        values = torch.randint(12, (batch, 5), generator=generator)
        at = torch.randint(5, (batch, 1), generator=generator)
        return F.cross_entropy(model(names, values, names.gather(1, at)[:, 0]), values.gather(1, at)[:, 0])

    return loss


@sick(
    CASES,
    "rd_memory_addressed_by_argmax",
    ("missing_gradient",),
    ("asked", "keys"),
    source="https://arxiv.org/abs/1503.08895 end-to-end memory networks are soft so that the addresses learn; an "
    "argmax passes nothing back",
    proof=every(no_gradient("asked.weight", "keys.weight"), others_move("values.weight", "head.weight")),
)
def _(seed: int) -> Setup:
    model = Memory(hard=True)
    return fit(model, _facts(seed, model), torch.optim.Adam(model.parameters(), 1e-2), 50)


@sick(
    CASES,
    "rd_words_summed_into_tanh",
    ("saturated_activation",),
    ("1", "2"),
    source="https://proceedings.mlr.press/v9/glorot10a.html saturation; the words of a long note are summed where a mean was meant",
    proof=every(lambda p: _flat(p, "2", 0.97), gradient_ratio("1.bias", "3.bias", 0.3, last=15)),
    also=("poor_init", "vanishing_gradient", "unnormalized_input"),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=4, batch=16, length=500)

    class Sum(nn.Embedding):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum(1)

    model = nn.Sequential(Sum(data.vocabulary, 48, padding_idx=0), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 4))
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 1e-3), 30)


def _flat(plain: Plain, module: str, above: float) -> str:
    """The mean square of a tanh is one less its mean derivative."""
    seen = median(o.rms for o in plain.outputs[module][:15] if o is not None)
    assert seen > above, f"the outputs of {module} have an RMS of {seen:.3g}, not above {above}"
    return f"the RMS of {module} is {seen:.3g}, its mean derivative {1 - seen**2:.2g}"


class Kim(nn.Module):
    """Convolutions of several widths side by side."""

    def __init__(self, vocabulary: int, labels: int, width: int = 16, channels: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, channels, k, padding=k // 2) for k in (3, 5))
        self.acts = nn.ModuleList(nn.ReLU() for _ in self.convs)
        self.head = nn.Linear(2 * channels, labels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x).transpose(1, 2)
        # Channels last in the activations.
        out = [act(conv(h).transpose(1, 2)).amax(1) for conv, act in zip(self.convs, self.acts, strict=True)]
        scores: Tensor = self.head(torch.cat(out, -1))
        return scores


@sick(
    CASES,
    "rd_prior_bias_on_every_layer",
    ("dead_units",),
    ("acts", "convs"),
    source="https://arxiv.org/abs/1708.02002 the bias -log((1 - p) / p) is for the last layer alone; "
    "https://arxiv.org/abs/1408.5882 the model",
    proof=every(dead_fraction("acts.0", 0.9, last=15), dead_fraction("acts.1", 0.9, last=15)),
    also=("poor_init", "zero_gradient", "vanishing_gradient", "frozen_weights", "loss_plateau"),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=4)
    model = Kim(data.vocabulary, 4)
    for m in model.modules():
        if isinstance(m, (nn.Conv1d, nn.Linear)):
            assert m.bias is not None
            nn.init.constant_(m.bias, -math.log((1 - 0.01) / 0.01))
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 3e-3), 40)


class Scaled(torch.autograd.Function):
    """Multiplies the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


class Gated(nn.Module):
    """A causal language model of gated convolutions, each with a residual; between them a gradient scale."""

    def __init__(self, vocabulary: int, depth: int, width: int = 24, scale: float = 1.0) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, 2 * width, 3) for _ in range(depth))
        self.head, self.scale = nn.Linear(width, vocabulary), scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x).transpose(1, 2)
        for conv in self.convs:
            h = (h + F.glu(conv(F.pad(h, (2, 0))), 1)) * math.sqrt(0.5)
            h = Scaled.apply(h, self.scale)  # type: ignore[no-untyped-call]
        out: Tensor = self.head(h.transpose(1, 2))
        return out


@sick(
    CASES,
    "rd_gradient_multiplied_at_every_convolution",
    ("exploding_gradient",),
    ("words", "convs"),
    source="https://arxiv.org/abs/1705.03122 gradients are scaled by 1 / (2 * layers); here multiplied, and in every layer",
    proof=every(
        gradient_ratio("head.weight", "convs.0.weight", 1e-3, last=15),
        gradient_ratio("convs.5.weight", "convs.0.weight", 1e-3, last=15),
    ),
)
def _(seed: int) -> Setup:
    data = Text(seed, 16, 8, 12)
    model = Gated(16, 6, scale=12)
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 2e-3), 40)


@sick(
    CASES,
    "rd_recurrent_weights_of_gain_three",
    ("exploding_gradient",),
    ("words", "gru"),
    source="https://arxiv.org/abs/1211.5063 gradients explode through time where the recurrent weights are large",
    proof=gradient_ratio("head.weight", "gru.weight_hh_l0", 1e-2, last=15),
    also=("poor_init", "saturated_activation", "gradient_spike"),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, 12, 8, 60), Reader(12, 64, 12)
    model.gru = nn.RNN(64, 64, batch_first=True)
    assert isinstance(model.gru.weight_hh_l0, Tensor)
    nn.init.normal_(model.gru.weight_hh_l0, std=3 / math.sqrt(64))
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 1e-3), 40)


@sick(
    CASES,
    "rd_averages_through_eight_sigmoids",
    ("vanishing_gradient",),
    ("mean", *(f"deep.{k}" for k in range(16))),
    source="https://aclanthology.org/P15-1162/ deep averaging network, its ReLU exchanged for a sigmoid",
    proof=every(
        gradient_ratio("deep.0.weight", "deep.16.weight", 1e-3, last=15),
        gradient_ratio("mean.words.weight", "deep.16.weight", 1e-3, last=15),
        loss_stays(0.1),
    ),
    also=("poor_init", "loss_plateau"),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=4)
    deep = nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(24, 24), nn.Sigmoid())), nn.Linear(24, 4))
    model = nn.Sequential()
    model.add_module("mean", Mean(data.vocabulary, 24))
    model.add_module("deep", deep)
    return fit(model, classify(model, data), torch.optim.SGD(model.parameters(), 0.03, momentum=0.9), 60)


@sick(
    CASES,
    "rd_ten_convolutions_of_std_two_hundredths",
    ("poor_init", "vanishing_gradient"),
    ("words", "convs"),
    source="https://arxiv.org/abs/1502.01852 a fixed standard deviation of 0.01 stalls deep networks; "
    "https://arxiv.org/abs/1606.01781 the model",
    proof=every(
        lambda p: _fades(p, "acts.0", "acts.9", 1e-4),
        gradient_ratio("convs.0.weight", "head.bias", 1e-3, last=15),
        gradient_ratio("convs.6.weight", "head.bias", 1e-3, last=15),
    ),
    also=("loss_plateau", "update_ratio_too_small"),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=4)
    model = Convolutions(data.vocabulary, 4, 10, nn.Tanh)
    for conv in model.convs:
        assert isinstance(conv, nn.Conv1d)
        assert conv.bias is not None
        nn.init.normal_(conv.weight, std=0.02)
        nn.init.zeros_(conv.bias)
    return fit(model, classify(model, data), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), 60)


def _fades(plain: Plain, first: str, last: str, below: float) -> str:
    a, b = plain.outputs[first][0], plain.outputs[last][0]
    assert a is not None
    assert b is not None
    assert b.rms < below * a.rms, f"{last} has {b.rms / a.rms:.2g} of {first}"
    return f"at the first update the output of {last} is {b.rms / a.rms:.2g} of that of {first}"


@sick(
    CASES,
    "rd_rating_that_is_a_product_number",
    ("gradient_spike", "loss_spike"),
    source="https://arxiv.org/abs/1211.5063 clipping; one label of a batch is a product number where stars were meant",
    proof=every(gradient_spikes(30, 100), lambda p: _loss_jumps(p, 30, 100), lambda p: _loss_back(p, 30)),
    onset=30,
    also=("exploding_gradient",),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=5, batch=16)
    model = nn.Sequential(Mean(data.vocabulary, 24), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))

    def loss(i: int) -> Tensor:
        x, y = data()
        stars = (y - 2).float() / 1.4
        if i == 30:
            stars[7] = 2417.0
        return F.mse_loss(model(x)[:, 0], stars)

    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return fit(model, loss, optimizer, 60, between=clipped(model, 1.0))


def _loss_jumps(plain: Plain, update: int, factor: float) -> str:
    ratio = plain.losses[update] / median(plain.losses[:update])
    assert ratio > factor, f"the loss is {ratio:.3g} times the median"
    return f"the loss is {ratio:.3g} times the median before"


def _loss_back(plain: Plain, update: int) -> str:
    before, after = median(plain.losses[update - 10 : update]), median(plain.losses[update + 2 : update + 12])
    assert after < 3 * before, f"the loss stays at {after:.3g}, it was {before:.3g}"
    return f"it goes back to {after:.3g} ({before:.3g} before)"


@sick(
    CASES,
    "rd_decoder_rate_of_sgd_under_adam",
    ("update_ratio_too_large", "loss_diverging"),
    source="https://arxiv.org/abs/1412.6980 a step of Adam is about the rate itself; 0.5 was the rate of SGD",
    proof=every(update_ratio(above=1, last=1), update_ratio(above=0.1, last=10), loss_grows(3, last=15)),
    also=(
        "exploding_gradient",
        "gradient_spike",
        "loss_spike",
        "saturated_activation",
        "dead_units",
        "zero_gradient",
        "vanishing_gradient",
    ),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, 24, 8, 16), Decoder()
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 0.5), 40)


@sick(
    CASES,
    "rd_tagger_rate_of_fine_tuning",
    ("update_ratio_too_small",),
    source="https://arxiv.org/abs/1810.04805 2e-5 is for Adam on a trained model; here SGD, from scratch",
    proof=every(update_ratio(below=1e-5), loss_stays(0.02)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, 12, 8, 12), Reader(12, 24, 12)
    return fit(model, classify(model, data), torch.optim.SGD(model.parameters(), 2e-5), 40)


@sick(
    CASES,
    "rd_topics_maximised",
    ("loss_diverging",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html maximize=True, left over from a reward",
    proof=every(loss_grows(3, last=13), loss_grows(10)),
    also=("exploding_gradient", "update_ratio_too_large"),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=4)
    model = nn.Sequential(Mean(data.vocabulary, 24), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))
    return fit(model, classify(model, data), torch.optim.SGD(model.parameters(), 0.3, maximize=True), 40)


@sick(
    CASES,
    "rd_notes_sorted_labels_not",
    ("loss_plateau",),
    source="https://arxiv.org/abs/1611.03530 random labels; the notes are sorted by length for packing, the labels "
    "are left as they were",
    proof=every(loss_stays(0.03, last=100), loss_stays(0.03), lambda p: _at_chance(p, 4)),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=4)
    model = nn.Sequential(Mean(data.vocabulary, 24), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))

    def loss(i: int) -> Tensor:
        x, y = data()
        order = (x > 0).sum(1).argsort(descending=True)
        return F.cross_entropy(model(x[order]), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 200)


def _at_chance(plain: Plain, classes: int) -> str:
    low = median(plain.losses[-50:])
    assert low > 0.97 * math.log(classes), f"the loss is {low:.3g}, chance is {math.log(classes):.3g}"
    return f"the loss is that of chance, {low:.3g}"


@sick(
    CASES,
    "rd_distance_to_the_start_under_a_scaler",
    ("loss_scale_collapse", "non_finite_gradient"),
    source="https://arxiv.org/abs/1802.01483 L2-SP by a square root, NaN at the start; "
    "https://github.com/NVIDIA/apex/issues/318 scale to nothing",
    proof=lambda p: _collapses(p),
    also=("never_stepped", "loss_plateau", "update_ratio_too_small"),
)
def _(seed: int) -> Setup:
    # Every gradient is NaN, every step is skipped, so the weights stay where the root has no derivative.
    data = Notes(seed, topics=4)
    model = Pooled(data.vocabulary, 4)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 3e-3), torch.amp.GradScaler("cpu")
    scales = SCALES
    scales[:] = [scaler.get_scale()]

    def train() -> Iterator[Event]:
        for _ in range(30):
            optimizer.zero_grad()
            x, y = data()
            far = torch.stack([(p - q).square().sum() for p, q in zip(model.parameters(), start, strict=True)]).sum().sqrt()
            loss = F.cross_entropy(model(x), y) + 0.01 * far
            scaler.scale(loss).backward()
            yield "read", [loss]
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            yield "step", [optimizer] if scales[-1] >= scales[-2] else []

    return Setup(model, train)


SCALES: list[float] = []
"""Of the last run of this kind, after each update."""


def _collapses(plain: Plain) -> str:
    scales = SCALES
    assert scales[20] < 1, f"the scale is {scales[20]} after 20 updates"
    assert all(math.isnan(s) for s in plain.steps["head.weight"]), "a step is made"
    assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
    return f"every step is skipped, the scale goes from {scales[0]:g} to {scales[20]:g} in 20 updates"


@sick(
    CASES,
    "rd_reranker_raw_counts",
    ("unnormalized_input",),
    ("",),
    source="https://openreview.net/forum?id=Ut1vF_q_vC neural rankers need transformed features: counts, lengths and "
    "years are put in raw",
    proof=lambda p: _raw(p, "0", 100),
    also=(
        "update_ratio_too_large",
        "exploding_gradient",
        "poor_init",
        "dead_units",
        "loss_diverging",
        "gradient_spike",
        "loss_spike",
    ),
)
def _(seed: int) -> Setup:
    return _reranker(seed, raw=True)


def _reranker(seed: int, raw: bool, updates: int = 40) -> Setup:
    generator = torch.Generator().manual_seed(7600 + seed)
    model = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    def features(z: Tensor) -> Tensor:
        if not raw:
            return z
        # The score of BM25, the length in bytes, clicks, the year, the number of links.
        columns = (12 + 4 * z[:, 0], (8 + 0.7 * z[:, 1]).exp(), (6 + z[:, 2]).exp(), 2012 + 5 * z[:, 3], (3 + z[:, 4]).exp())
        return torch.stack(columns, 1)

    def loss(i: int) -> Tensor:
        a, b = torch.randn(2, 32, 5, generator=generator)
        worth = torch.tensor([1.0, -0.4, 0.8, 0.3, 0.5])
        better = torch.where(((a - b) @ worth > 0)[:, None], 1.0, -1.0)
        return F.softplus(-better * (model(features(a)) - model(features(b)))).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), updates)


def _raw(plain: Plain, layer: str, above: float) -> str:
    seen = plain.outputs[layer][0]
    assert seen is not None
    assert seen.rms > above, f"the first layer gives an RMS of {seen.rms:.3g} at once"
    return f"the first layer, of usual weights, gives an RMS of {seen.rms:.3g} at the first update"


class Pointer(nn.Module):
    """Points at one of the numbers it is given."""

    def __init__(self, width: int = 24, probabilities: bool = False) -> None:
        super().__init__()
        self.gru, self.keys = nn.GRU(1, width, batch_first=True, bidirectional=True), nn.Linear(2 * width, width)
        self.query, self.score, self.probabilities = nn.Linear(2 * width, width), nn.Linear(width, 1), probabilities

    def forward(self, x: Tensor) -> Tensor:
        h, last = self.gru(x[..., None])
        query = self.query(torch.cat([last[0], last[1]], -1))
        scores: Tensor = self.score(torch.tanh(self.keys(h) + query[:, None]))[..., 0]
        return scores.softmax(-1) if self.probabilities else scores


def _largest(seed: int, model: Pointer, numbers: int = 8) -> Callable[[int], Tensor]:
    generator = torch.Generator().manual_seed(7700 + seed)

    def loss(i: int) -> Tensor:
        x = 2 * torch.rand(32, numbers, generator=generator) - 1
        return F.cross_entropy(model(x), x.argmax(1))

    return loss


@sick(
    CASES,
    "rd_pointer_gives_probabilities_to_cross_entropy",
    ("double_softmax",),
    source="https://arxiv.org/abs/1506.03134 the softmax over the places is the output; cross_entropy takes it a second time",
    proof=lambda p: _probabilities(p, ""),
)
def _(seed: int) -> Setup:
    model = Pointer(probabilities=True)
    return fit(model, _largest(seed, model), torch.optim.Adam(model.parameters(), 5e-3), 60)


# ------------------------------------------------------------------------------------------------------------- healthy runs


@healthy(
    CASES,
    "rd_decoder_tied_warm_up_from_zero",
    source="https://arxiv.org/abs/1608.05859 tied embeddings; warm-up from 0 as in https://arxiv.org/abs/1706.03762",
    proof=converges(0.75),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, 24, 8, 16), Decoder(tied=True)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(s / 20, math.sqrt(20 / max(s, 1))))
    lossy = classify(model, data)

    def loss(i: int) -> Tensor:
        if i:
            schedule.step()
        return lossy(i)

    return fit(model, loss, optimizer, 150)


@healthy(
    CASES,
    "rd_lora_on_frozen_base",
    source="https://arxiv.org/abs/2106.09685 LoRA: B begins at zero, so A has no gradient in the first update",
    proof=every(converges(0.6), others_move("block.query.b", "block.value.b")),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=6)
    model = LoraReader(data.vocabulary, 6)
    return fit(model, classify(model, data), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3), 120)


@healthy(
    CASES,
    "rd_dual_encoder_in_batch_negatives",
    source="https://arxiv.org/abs/2004.04906 DPR: in-batch negatives",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    return _retrieval(seed, updates=200, lr=5e-3)


@healthy(
    CASES,
    "rd_gru_truncated_backpropagation",
    source="https://github.com/pytorch/examples/tree/main/word_language_model the state is carried on and detached; "
    "clipping at 0.25",
    proof=converges(0.75),
)
def _(seed: int) -> Setup:
    data = Text(seed, 16, 8, 160)
    x, y = data()
    model = Reader(16, 32, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)

    def train() -> Iterator[Event]:
        for _ in range(12):
            state = torch.zeros(1, 8, 32)
            for at in range(0, 160, 16):
                optimizer.zero_grad()
                h, state = model.gru(model.words(x[:, at : at + 16]), state.detach())
                loss = F.cross_entropy(model.head(h).flatten(0, 1), y[:, at : at + 16].flatten())
                loss.backward()
                yield "read", [loss]
                nn.utils.clip_grad_norm_(model.parameters(), 0.25)
                optimizer.step()
                yield "step", [optimizer]

    return Setup(model, train)


class Experts(nn.Module):
    """A word goes to the expert that the router likes best; what it gives is weighted by the router's probability."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(experts)
        )
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        weight, chosen = p.max(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, weight[rows, None] * expert(x[rows]))
        share = F.one_hot(chosen, p.shape[-1]).float().mean(0)
        self.balance = p.shape[-1] * (share * p.mean(0)).sum()
        return x + out


class SwitchTagger(nn.Module):
    def __init__(self, vocabulary: int, labels: int, width: int = 24, experts: int = 6) -> None:
        super().__init__()
        self.words, self.before = nn.Embedding(vocabulary, width), nn.Conv1d(width, width, 3, padding=1)
        self.experts, self.norm, self.head = Experts(width, experts), nn.LayerNorm(width), nn.Linear(width, labels)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.before(self.words(x).transpose(1, 2))).transpose(1, 2)
        out: Tensor = self.head(self.norm(self.experts(h.flatten(0, 1))))
        return out.view(*x.shape, -1)


@healthy(
    CASES,
    "rd_switch_tagger_idle_experts",
    source="https://arxiv.org/abs/2101.03961 Switch: one expert a word, balanced by a small loss; small batches leave experts idle",
    proof=every(converges(0.4), lambda p: _idle(p)),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(7800 + seed)
    model = SwitchTagger(20, 3)

    def loss(i: int) -> Tensor:
        x = torch.randint(20, (4, 12), generator=generator)
        y = (x + x.roll(1, 1)) % 3
        y[:, 0] = -100
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten()) + 0.01 * model.experts.balance

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 400)


def _idle(plain: Plain) -> str:
    missed = [math.isnan(g) for k in range(6) for g in plain.grads[f"experts.experts.{k}.0.weight"]]
    assert any(missed), "no expert is ever idle"
    return f"experts are idle in {sum(missed) / len(missed):.2g} of the updates"


@healthy(
    CASES,
    "rd_preferences_against_frozen_reference",
    source="https://arxiv.org/abs/2305.18290 DPO: the reference is frozen, the gradient goes to nothing when the margins are large",
    proof=every(converges(0.15), lambda p: _from_log_two(p)),
)
def _(seed: int) -> Setup:
    chosen, rejected = Text(seed, 16, 8, 10), Text(seed + 50, 16, 8, 10)
    policy = Decoder(16, 32, 1, 10)
    first = torch.optim.AdamW(policy.parameters(), 1e-2)
    for _ in range(30):
        x, y = chosen()
        u, v = rejected()
        first.zero_grad()
        F.cross_entropy(policy(torch.cat([x, u])).flatten(0, 1), torch.cat([y, v]).flatten()).backward()
        first.step()
    first.zero_grad()
    model = nn.ModuleDict({"policy": policy, "reference": copy.deepcopy(policy).requires_grad_(False)})

    def margin(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            old = model["reference"](x).log_softmax(-1).gather(-1, y[..., None]).sum((1, 2))
        new: Tensor = model["policy"](x).log_softmax(-1).gather(-1, y[..., None]).sum((1, 2))
        out: Tensor = new - old
        return out

    def loss(i: int) -> Tensor:
        return -F.logsigmoid(0.1 * (margin(*chosen()) - margin(*rejected()))).mean()

    return fit(model, loss, torch.optim.AdamW(policy.parameters(), 1e-3), 200)


def _from_log_two(plain: Plain) -> str:
    assert abs(plain.losses[0] - math.log(2)) < 1e-5, f"the first loss is {plain.losses[0]}"
    return "the first loss is log 2"


@healthy(
    CASES,
    "rd_spans_summed_loss_padded_texts",
    source="https://arxiv.org/abs/1606.05250 SQuAD: first and last word of the answer; padding is masked by -inf, the loss summed",
    proof=converges(0.1),
)
def _(seed: int) -> Setup:
    model, data = SpanReader(), Spans(seed)
    return fit(model, _spans(model, data, "sum"), torch.optim.Adam(model.parameters(), 1e-2), 200)


@healthy(
    CASES,
    "rd_gated_convolutions_warm_restarts",
    source="https://arxiv.org/abs/1608.03983 SGDR; https://arxiv.org/abs/1612.08083 gated convolutions",
    proof=converges(0.75),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, 16, 8, 12), Gated(16, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=20, T_mult=2)
    return fit(model, classify(model, data), optimizer, 160, lambda i: schedule.step(i))


@healthy(
    CASES,
    "rd_smoothed_labels_floor",
    source="https://arxiv.org/abs/1512.00567 label smoothing: the loss has a floor above zero",
    proof=every(converges(0.6), lambda p: _floor(p, 4, 0.2)),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=4, length=20)
    model = Kim(data.vocabulary, 4)
    loss = classify(model, data, label_smoothing=0.2)
    return fit(model, loss, torch.optim.AdamW(model.parameters(), 5e-3), 250)


def _floor(plain: Plain, classes: int, smoothing: float) -> str:
    others = smoothing / classes
    top = 1 - smoothing + others
    floor = -top * math.log(top) - (classes - 1) * others * math.log(others)
    last = median(plain.losses[-25:])
    assert floor - 1e-4 < last < 1.15 * floor, f"the loss ends at {last:.3g}, its floor is {floor:.3g}"
    return f"it ends at {last:.3g}, its floor is {floor:.3g}"


@healthy(
    CASES,
    "rd_unfrozen_from_the_top",
    source="https://arxiv.org/abs/1801.06146 ULMFiT: gradual unfreezing",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=6, length=18)
    model = Attentive(data.vocabulary, 6, dim=1)
    stages = {30: (model.gru, model.project, model.score), 60: (model.words,)}
    for module in (m for stage in stages.values() for m in stage):
        module.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def before(i: int) -> None:
        for module in stages.get(i, ()):
            module.requires_grad_(True)

    return fit(model, classify(model, data), optimizer, 150, before)


class Linearised(nn.Module):
    """Causal linear attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        scores = (q @ k.transpose(1, 2)).tril()
        out: Tensor = self.out(scores @ v / (scores.sum(-1, keepdim=True) + 1e-6))
        return out


class LinearDecoder(nn.Module):
    def __init__(self, vocabulary: int, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.mixers = nn.ModuleList(Linearised(width) for _ in range(depth))
        self.feeds = nn.ModuleList(nn.Sequential(nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, width)) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        for k, (mixer, feed) in enumerate(zip(self.mixers, self.feeds, strict=True)):
            h = h + mixer(self.norms[2 * k](h))
            h = h + feed(self.norms[2 * k + 1](h))
        out: Tensor = self.head(self.norms[-1](h))
        return out


@healthy(
    CASES,
    "rd_linear_attention_bf16_autocast",
    source="https://arxiv.org/abs/2006.16236 linear attention; https://docs.pytorch.org/docs/stable/amp.html "
    "autocast in bf16, no scaler",
    proof=converges(0.8),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, 20, 8, 16), LinearDecoder(20)
    plainly = classify(model, data)

    def loss(i: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plainly(i)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.1), 150)


class Prompted(nn.Module):
    """A frozen decoder before whose words a learned prompt is put; the label is said as a word."""

    def __init__(self, base: Decoder, prompt: int, width: int = 32) -> None:
        super().__init__()
        self.prompt, self.base = nn.Parameter(0.1 * torch.randn(prompt, width)), base

    def forward(self, x: Tensor) -> Tensor:
        n = len(self.prompt) + x.shape[1]
        h = torch.cat([self.prompt.expand(len(x), -1, -1), self.base.words(x)], 1) + self.base.places.weight[:n]
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        for block in self.base.blocks:
            h = block(h, seen)
        out: Tensor = self.base.head(self.base.norm(h[:, -1]))
        return out


@healthy(
    CASES,
    "rd_prompt_before_a_frozen_decoder",
    source="https://arxiv.org/abs/2104.08691 prompt tuning: one parameter learns, by a high rate",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    # The first words of a text tell the base which of three maps of a word to the next is meant; the prompt has to say so.
    generator = torch.Generator().manual_seed(7900 + seed)
    maps = torch.stack([torch.randperm(12, generator=generator) for _ in range(3)])
    base = Decoder(15, 32, 2, 8)
    first = torch.optim.AdamW(base.parameters(), 5e-3)
    for _ in range(200):
        which, x = torch.randint(3, (32, 1), generator=generator), torch.randint(12, (32, 4), generator=generator)
        first.zero_grad()
        out = base(torch.cat([12 + which, 12 + which, x], 1))[:, 2:]
        F.cross_entropy(out.flatten(0, 1), maps[which, x].flatten()).backward()
        first.step()
    base.zero_grad()
    model = Prompted(base.requires_grad_(False), 2)

    def loss(i: int) -> Tensor:
        x = torch.randint(12, (16, 3), generator=generator)
        return F.cross_entropy(model(x), maps[1][x[:, -1]])

    return fit(model, loss, torch.optim.Adam([model.prompt], 0.01), 120)


@healthy(
    CASES,
    "rd_checkpointed_decoder_accumulates",
    source="https://arxiv.org/abs/1604.06174 checkpointing: a block runs twice; four small batches a step, the last "
    "of them shorter",
    proof=converges(0.75),
)
def _(seed: int) -> Setup:
    data, model = Text(seed, 16, 4, 10), Decoder(16, 32, 2, 10)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    seen = torch.ones(10, 10, dtype=torch.bool).tril()

    def train() -> Iterator[Event]:
        for _ in range(70):
            optimizer.zero_grad(set_to_none=False)
            losses = []
            for k in range(4):
                x, y = (t[: 2 if k == 3 else 4] for t in data())
                h = model.words(x) + model.places.weight
                for block in model.blocks:
                    h = checkpoint(block, h, seen, use_reentrant=False)
                loss = F.cross_entropy(model.head(model.norm(h)).flatten(0, 1), y.flatten(), reduction="sum") / 140
                loss.backward()
                losses.append(loss)
            yield "read", losses
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


class SkipGram(nn.Module):
    def __init__(self, words: int, width: int = 16) -> None:
        super().__init__()
        self.inner, self.outer = nn.Embedding(words, width, sparse=True), nn.Embedding(words, width, sparse=True)
        nn.init.uniform_(self.inner.weight, -0.5 / width, 0.5 / width)
        nn.init.zeros_(self.outer.weight)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = (self.inner(a)[:, None] * self.outer(b)).sum(-1)
        return out


@healthy(
    CASES,
    "rd_skip_gram_rare_words",
    source="https://arxiv.org/abs/1310.4546 word2vec: outer vectors begin at zero, most rows are not in a batch, some never",
    proof=converges(0.75),
)
def _(seed: int) -> Setup:
    # 200 words, of which 40 are ever seen, in groups of ten that stand together.
    generator = torch.Generator().manual_seed(8000 + seed)
    model = SkipGram(200)

    def loss(i: int) -> Tensor:
        group = torch.randint(4, (64, 1), generator=generator)
        a, b = (10 * group + torch.randint(10, (64, 1), generator=generator) for _ in range(2))
        noise = torch.randint(40, (64, 4), generator=generator)
        out = model(a[:, 0], torch.cat([b, noise], 1))
        return F.softplus(-out[:, 0]).mean() + F.softplus(out[:, 1:]).sum(1).mean()

    return fit(model, loss, torch.optim.SparseAdam(list(model.parameters()), 5e-3), 400)


@healthy(
    CASES,
    "rd_memory_learned_to_the_end",
    source="https://arxiv.org/abs/1503.08895 end-to-end memory network; learned to the end, its gradients become tiny",
    proof=converges(0.02),
)
def _(seed: int) -> Setup:
    model = Memory()
    return fit(model, _facts(seed, model), torch.optim.Adam(model.parameters(), 2e-2), 400)


@healthy(
    CASES,
    "rd_pointer_to_the_largest",
    source="https://arxiv.org/abs/1506.03134 pointer network",
    proof=converges(0.35),
)
def _(seed: int) -> Setup:
    model = Pointer()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    return fit(model, _largest(seed, model), optimizer, 250, between=clipped(model, 2.0))


class Adapter(nn.Module):
    def __init__(self, width: int, inner: int = 8) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.up(F.gelu(self.down(x)))
        return out


@healthy(
    CASES,
    "rd_adapters_begin_at_zero_resumed",
    source="https://arxiv.org/abs/1902.00751 adapters near the identity in a frozen base; the run is resumed from a checkpoint",
    proof=every(converges(0.5), others_move("adapters.0.up.weight", "adapters.1.up.weight", first=0)),
)
def _(seed: int) -> Setup:
    data = Notes(seed, topics=5, length=18)

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.ModuleDict({"mean": Mean(data.vocabulary, 32), "a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
            self.base.requires_grad_(False)
            self.adapters = nn.ModuleList(Adapter(32) for _ in range(2))
            self.head = nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.base["mean"](x)
            for layer, adapter in zip(("a", "b"), self.adapters, strict=True):
                h = adapter(h + torch.tanh(self.base[layer](h)))
            out: Tensor = self.head(h)
            return out

    model = Adapted()
    learn = [p for p in model.parameters() if p.requires_grad]

    def train() -> Iterator[Event]:
        optimizer = torch.optim.AdamW(learn, 3e-3)
        for i in range(120):
            if i == 60:
                model.load_state_dict(copy.deepcopy(model.state_dict()))
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = torch.optim.AdamW(learn, 1.0)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            x, y = data()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


class Translator(nn.Module):
    """GRU encoder and decoder with attention over the padded source."""

    def __init__(self, words: int = 14, width: int = 32) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(words, width, padding_idx=0), nn.Embedding(words, width, padding_idx=0)
        self.encoder, self.decoder = nn.GRU(width, width, batch_first=True), nn.GRU(width, width, batch_first=True)
        self.mix, self.head = nn.Linear(2 * width, width), nn.Linear(width, words)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        lengths = (x > 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(self.source(x), lengths, batch_first=True, enforce_sorted=False)
        states, last = self.encoder(packed)
        h = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])[0]
        d = self.decoder(self.target(y), last)[0]
        weights = (d @ h.transpose(1, 2) / 4).masked_fill((x == 0)[:, None], -math.inf).softmax(-1)
        out: Tensor = self.head(torch.tanh(self.mix(torch.cat([d, weights @ h], -1))))
        return out


@healthy(
    CASES,
    "rd_translator_packed_with_average",
    source="https://arxiv.org/abs/1409.0473 attention; padding ignored by the loss; an average of the weights is "
    "kept beside the model",
    proof=every(converges(0.5), lambda p: _no_average(p)),
)
def _(seed: int) -> Setup:
    # The words of a sentence are to be said in another alphabet. Word 1 begins.
    generator = torch.Generator().manual_seed(8100 + seed)
    other = torch.randperm(12, generator=generator) + 2
    student = Translator()
    model = nn.ModuleDict({"student": student, "average": copy.deepcopy(student).requires_grad_(False)})
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)

    def train() -> Iterator[Event]:
        for _ in range(160):
            optimizer.zero_grad()
            x = torch.randint(12, (16, 7), generator=generator)
            gone = torch.arange(7) >= torch.randint(3, 8, (16, 1), generator=generator)
            y = other[x].masked_fill(gone, 0)
            x = (x + 2).masked_fill(gone, 0)
            asked = torch.cat([torch.ones(16, 1, dtype=torch.long), y[:, :-1]], 1)
            loss = F.cross_entropy(student(x, asked).flatten(0, 1), y.flatten(), ignore_index=0)
            loss.backward()
            yield "read", [loss]
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for a, p in zip(model["average"].parameters(), student.parameters(), strict=True):
                    a.lerp_(p, 0.05)
            yield "step", [optimizer]

    return Setup(model, train)


def _no_average(plain: Plain) -> str:
    assert all(math.isnan(g) for n, norms in plain.grads.items() if n.startswith("average") for g in norms), (
        "the average has gradients"
    )
    return "the average has none"
