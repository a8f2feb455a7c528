"""Runs of language models, taggers, translators and speech recognisers: recurrent networks, transformers, adapters, mixtures."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
WORDS = 24


# Data


class Reviews:
    """Texts of a class, whose words come from the class's own distribution; padded with word 0 if `padded`."""

    def __init__(
        self, seed: int, words: int = 32, classes: int = 4, batch: int = 32, length: int = 12, padded: bool = False
    ) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.table = torch.softmax(2 * torch.randn(classes, words - 1, generator=self.generator), -1)
        self.batch, self.length, self.padded = batch, length, padded

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(len(self.table), (self.batch,), generator=self.generator)
        x = 1 + torch.multinomial(self.table[y], self.length, replacement=True, generator=self.generator)
        if self.padded:
            lengths = torch.randint(self.length // 2, self.length + 1, (self.batch, 1), generator=self.generator)
            x = x.masked_fill(torch.arange(self.length) >= lengths, 0)
        return x, y


class Pairs:
    """Sentences and their translation, word by word (a permutation of the vocabulary); word 0 begins a translation."""

    def __init__(self, seed: int, words: int = 10, batch: int = 32, length: int = 4) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.map = 1 + torch.randperm(words - 1, generator=self.generator)
        self.words, self.batch, self.length = words, batch, length

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randint(1, self.words, (self.batch, self.length), generator=self.generator)
        return x, self.map[x - 1]


class Speech:
    """Frames `[batch, 15, 8]` of three phones each, five frames a phone, and the phones `[batch, 3]` (1 to 5, 0 is the blank)."""

    def __init__(self, seed: int, batch: int = 16) -> None:
        self.generator = torch.Generator().manual_seed(6000 + seed)
        self.sounds = torch.randn(6, 8, generator=self.generator)
        self.batch = batch

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(1, 6, (self.batch, 3), generator=self.generator)
        x = self.sounds[y].repeat_interleave(5, 1)
        return x + 0.3 * torch.randn(x.shape, generator=self.generator), y


# Models


class Attention(nn.Module):
    """Attention by hand; `keep` `[batch, keys]` says which words may be looked at."""

    def __init__(self, width: int, heads: int = 2, causal: bool = True, rotary: bool = False, relative: int = 0) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.heads, self.causal, self.rotary = heads, causal, rotary
        self.relative = nn.Embedding(2 * relative + 1, heads) if relative else None
        if self.relative is not None:
            nn.init.zeros_(self.relative.weight)

    def forward(self, x: Tensor, keep: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        q, k, v = (
            m(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for m, t in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        if self.rotary:
            q, k = _rotate(q), _rotate(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if self.relative is not None:
            reach = self.relative.num_embeddings // 2
            at = torch.arange(x.shape[1])
            scores = scores + self.relative((at[None] - at[:, None]).clamp(-reach, reach) + reach).permute(2, 0, 1)
        if self.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None], -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def _rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] / 100 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Block(nn.Module):
    """A layer of a transformer; `norm` is "pre", "post" or "none"."""

    def __init__(
        self,
        width: int,
        norm: str = "pre",
        residual: bool = True,
        act: Callable[[], nn.Module] = nn.GELU,
        inner: nn.Module | None = None,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.attention = Attention(width, **attention)
        self.inner = inner or nn.Sequential(nn.Linear(width, 2 * width), act(), nn.Linear(2 * width, width))
        self.norm1, self.norm2 = (nn.LayerNorm(width) if norm != "none" else nn.Identity() for _ in range(2))
        self.pre, self.residual = norm == "pre", residual

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        skip = 1.0 if self.residual else 0.0
        if self.pre:
            x = skip * x + self.attention(self.norm1(x), keep)
            return skip * x + self.inner(self.norm2(x))
        x = self.norm1(skip * x + self.attention(x, keep))
        return self.norm2(skip * x + self.inner(x))


class Lm(nn.Module):
    """A language model of blocks; the head is the embedding's transpose if `tied`."""

    def __init__(self, blocks: list[nn.Module], width: int = 32, words: int = WORDS, tied: bool = False, std: float = 0.02) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(words, width), nn.Embedding(32, width)
        nn.init.normal_(self.embed.weight, std=std)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
        self.reentrant: bool | None = None

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        h = self.embed(x) + self.position.weight[: x.shape[1]]
        for block in self.blocks:
            if self.reentrant is None:
                h = block(h, keep)
            else:
                with warnings.catch_warnings():  # The reentrant one says it where no input requires a gradient.
                    warnings.simplefilter("ignore")
                    h = checkpoint(block, h, keep, use_reentrant=self.reentrant)
        return self.head(self.norm(h))


class Recurrent(nn.Module):
    """Embedding, recurrent layer, head: a prediction a word, or only one at the end if `last`."""

    def __init__(
        self, kind: type = nn.LSTM, width: int = 32, words: int = WORDS, outputs: int = WORDS, last: bool = False, **o: Any
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.rnn = kind(width, width, batch_first=True, **o)
        self.head = nn.Linear(width, outputs)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(self.embed(x))
        return self.head(h[:, -1] if self.last else h)


class Classifier(nn.Module):
    """Embedding, some encoder, mean over the words that are not padding, head."""

    def __init__(
        self, encoder: nn.Module, width: int = 32, words: int = 32, classes: int = 4, head: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.encoder = encoder
        self.head = head or nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        keep = (x != 0).unsqueeze(-1)
        h = self.encoder(self.embed(x))
        return self.head((h * keep).sum(1) / keep.sum(1))


class Seq2Seq(nn.Module):
    """LSTM encoder and decoder with teacher forcing."""

    def __init__(self, words: int = 10, width: int = 48) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"embed": nn.Embedding(words, width), "rnn": nn.LSTM(width, width, batch_first=True)})
        self.decoder = nn.ModuleDict(
            {"embed": nn.Embedding(words, width), "rnn": nn.LSTM(width, width, batch_first=True), "head": nn.Linear(width, words)}
        )
        self.cut = False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        _, state = self.encoder["rnn"](self.encoder["embed"](x))
        if self.cut:
            state = tuple(s.detach() for s in state)
        shifted = F.pad(y, (1, 0))[:, :-1]
        return self.decoder["head"](self.decoder["rnn"](self.decoder["embed"](shifted), state)[0])


class Lora(nn.Module):
    """A frozen linear layer and a correction of low rank, which starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4, scale: float = 2.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


class Experts(nn.Module):
    """A mixture of experts; `weight` makes the gates of the chosen experts from their logits and those of all."""

    def __init__(self, width: int, count: int, top: int, weight: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(count)
        )
        self.top, self.weight = top, weight
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        logits = self.router(flat)
        chosen, where = logits.topk(self.top, -1)
        gates = self.weight(chosen, logits)
        share = F.one_hot(where[:, 0], len(self.experts)).float().mean(0)
        self.balance = len(self.experts) * (share * logits.softmax(-1).mean(0)).sum()
        out = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            rows, slot = (where == k).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, gates[rows, slot, None] * expert(flat[rows]))
        return out.view_as(x)


def softmax_over_all(chosen: Tensor, logits: Tensor) -> Tensor:
    """Gates as in Switch: the chosen experts' share of the softmax over all."""
    return (chosen - logits.logsumexp(-1, keepdim=True)).exp()


def softmax_over_chosen(chosen: Tensor, logits: Tensor) -> Tensor:
    """Gates that are normalised over the chosen experts."""
    return chosen.softmax(-1)


def adam(model: nn.Module, lr: float = 3e-3, **options: Any) -> torch.optim.Optimizer:
    """AdamW on all that is trainable."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **options)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(model: nn.Module, norm: float = 1.0) -> Callable[[int], None]:
    """For `between`: clip the norm of the gradient."""

    def between(i: int) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)

    return between


def everything(model: str) -> tuple[str, ...]:
    """The root and its children, by a short word for the model."""
    return {
        "lm": ("", "embed", "position", "blocks", "norm", "head"),
        "recurrent": ("", "embed", "rnn", "head"),
        "classifier": ("", "embed", "encoder", "head"),
        "seq2seq": ("", "encoder", "decoder"),
    }[model]


# Proofs of this file


def first_loss(above: float, chance: float) -> Proof:
    """The very first loss is more than `above` times that of guessing."""

    def proof(plain: Plain) -> str:
        ratio = plain.losses[0] / chance
        assert ratio > above, f"the first loss is {ratio:.3g} times that of guessing, not {above:g}"
        return f"the first loss is {ratio:.3g} times that of guessing"

    return proof


def loss_spikes(update: int, factor: float) -> Proof:
    """The loss at one update is more than `factor` times the median of the ten before."""

    def proof(plain: Plain) -> str:
        ratio = plain.losses[update] / median(plain.losses[update - 10 : update])
        assert ratio > factor, f"at update {update} the loss is {ratio:.3g} times the median, not {factor:g}"
        return f"at update {update} the loss is {ratio:.3g} times the median before it"

    return proof


def recovers(update: int, to: float) -> Proof:
    """The median loss of the last ten updates is below `to` times that at one update."""

    def proof(plain: Plain) -> str:
        ratio = median(plain.losses[-10:]) / plain.losses[update]
        assert ratio < to, f"the loss ends at {ratio:.3g} times that of update {update}, not below {to:g}"
        return f"the loss ends at {ratio:.3g} times that of update {update}"

    return proof


def stays_high(times: float, onset: int = 0) -> Proof:
    """The median loss of the last ten updates is more than `times` that before the onset (or the first)."""

    def proof(plain: Plain) -> str:
        before = median(plain.losses[onset - 10 : onset]) if onset else plain.losses[0]
        ratio = median(plain.losses[-10:]) / before
        assert ratio > times, f"the loss ends at {ratio:.3g} times what it was, not {times:g}"
        return f"the loss ends at {ratio:.3g} times what it was"

    return proof


def turns(first: float, second: float) -> Proof:
    """Of two losses that take turns, each ends (median of its last ten) below so much of its first value."""

    def proof(plain: Plain) -> str:
        ratios = [median(plain.losses[k::2][-10:]) / plain.losses[k] for k in range(2)]
        assert ratios[0] < first, f"the first loss falls to {ratios[0]:.3g} of its first value"
        assert ratios[1] < second, f"the second loss falls to {ratios[1]:.3g} of its first value"
        return f"the losses fall to {ratios[0]:.3g} and {ratios[1]:.3g} of their first values"

    return proof


def never_called(module: str) -> Proof:
    """No forward of the module."""

    def proof(plain: Plain) -> str:
        assert all(o is None for o in plain.outputs[module]), f"{module} was called"
        return f"{module} is never called"

    return proof


def probabilities(module: str, classes: int) -> Proof:
    """The module gives probabilities, and the cross-entropy of them never gets below its floor of log(1 + (classes - 1) / e)."""

    def proof(plain: Plain) -> str:
        assert all(o is not None and o.low >= 0 and o.high <= 1 for o in plain.outputs[module]), f"{module} gives no probabilities"
        floor = math.log(1 + (classes - 1) / math.e)
        least = min(plain.losses)
        assert floor <= least < math.log(classes) + 0.5, f"the least loss is {least:.3g}, below {floor:.3g}"
        return f"{module or 'the model'} gives probabilities; the loss never gets below {floor:.3g}, its least is {least:.3g}"

    return proof


def skips(at_least: int, first: int = 0) -> Proof:
    """So many updates in a row from `first` on change nothing, for nothing stepped."""

    def proof(plain: Plain) -> str:
        steps = next(iter(plain.steps.values()))[first:]
        run = next((i for i, s in enumerate(steps) if not math.isnan(s)), len(steps))
        assert run >= at_least, f"{run} updates were skipped in a row, not {at_least}"
        return f"{run} updates in a row were skipped"

    return proof


def sometimes_idle(prefix: str, at_least: int) -> Proof:
    """Parameters below `prefix` miss so many updates in all, but none misses half of them."""

    def proof(plain: Plain) -> str:
        missed = {n: sum(math.isnan(g) for g in norms) for n, norms in plain.grads.items() if n.startswith(prefix)}
        assert sum(missed.values()) >= at_least, f"only {sum(missed.values())} misses"
        assert max(missed.values()) < len(plain.losses) / 2, f"one misses {max(missed.values())} updates"
        return f"parameters of {prefix} miss up to {max(missed.values())} of {len(plain.losses)} updates"

    return proof


def steps_begin_again(before: int) -> Proof:
    """Some of the first `before` updates are skipped, none later."""

    def proof(plain: Plain) -> str:
        steps = next(iter(plain.steps.values()))
        skipped = [i for i, s in enumerate(steps) if math.isnan(s)]
        assert skipped, "no update is skipped"
        assert max(skipped) < before, f"update {max(skipped)} is skipped"
        return f"{len(skipped)} of the first {before} updates are skipped, none later"

    return proof


def stale(parameter: str, share: float) -> Proof:
    """In more than `share` of the updates, the gradient that is used still contains that of the step before.

    Shown on a run of its own: a hook on the parameter sees what each backward pass adds, the rest was there before.
    """

    def proof(plain: Plain) -> str:
        torch.manual_seed(0)
        setup = plain.case.build(0)
        assert isinstance(setup.model, nn.Module)
        p = setup.model.get_parameter(parameter)
        fresh: list[Tensor] = []
        p.register_hook(lambda g: fresh.append(g.detach().clone()))
        kept, found = None, []
        for kind, what in setup.train():
            assert p.grad is not None or kind == "step"
            if kind == "read" and kept is not None and kept.norm() > 0:
                rest = p.grad - sum(fresh)
                found.append(float((rest - kept).norm() / kept.norm()) < 1e-3)
            elif kind == "step" and what:
                kept = None if p.grad is None else p.grad.detach().clone()
                if kept is None:
                    found.append(False)
                fresh.clear()
        ratio = sum(found) / len(found)
        assert ratio > share, f"{parameter} is stale in {ratio:.2g} of the updates, not {share:g}"
        return f"in {ratio:.2g} of the updates, {parameter}.grad still holds the gradient of the step before"

    return proof


def outside(parameters: int) -> Proof:
    """So many parameters with gradients live in plain lists, where the model does not see them."""

    def proof(plain: Plain) -> str:
        model: Any = plain.setup.model
        inside = {id(p) for p in model.parameters()}
        leaves = [p for layer in model.layers for p in layer.parameters()]
        assert len(leaves) >= parameters
        assert all(id(p) not in inside for p in leaves), "the model sees the layers"
        assert all(p.grad is not None and p.grad.norm() > 0 for p in leaves), "no gradient"
        return f"{len(leaves)} parameters get gradients but are not among the model's"

    return proof


def equal_rows(*parameters: str) -> Proof:
    """All rows of these matrices are the same, still after training."""

    def proof(plain: Plain) -> str:
        model: Any = plain.setup.model
        for name in parameters:
            w = model.get_parameter(name).detach()
            off = float((w - w[:1]).norm() / w.norm())
            assert off < 1e-3, f"rows of {name} differ by {off:.2g}"
        return f"{', '.join(parameters)}: all rows are the same, even after training"

    return proof


def flat_part(module: str, below: float, data: Callable[[], Callable[[], tuple[Tensor, Tensor]]]) -> Proof:
    """The median slope of a sigmoid or tanh on its own input is below `below` of its greatest, for the trained model."""

    def proof(plain: Plain) -> str:
        model: Any = plain.setup.model
        seen: list[Tensor] = []
        act = model.get_submodule(module)
        handle = act.register_forward_hook(lambda m, a, o: seen.append(o.detach().double()))
        model(data()()[0])
        handle.remove()
        t = torch.cat([s.flatten() for s in seen])
        slope = 1 - t**2 if isinstance(act, nn.Tanh) else 4 * t * (1 - t)
        ratio = float(slope.median())
        assert ratio < below, f"the median slope of {module} is {ratio:.2g} of its greatest"
        return f"the median slope of {module} is {ratio:.2g} of its greatest"

    return proof


def owned_but_none(*parameters: str, first: int = 0) -> Proof:
    """No gradient at all, though all of these require one."""

    def proof(plain: Plain) -> str:
        model: Any = plain.setup.model
        assert all(model.get_parameter(name).requires_grad for name in parameters), "frozen"
        return "trainable, but " + no_gradient(*parameters, first=first)(plain)

    return proof


# Sick: no gradient


class Captions(nn.Module):
    """Picture features and texts, matched by their similarity; the text encoder may be run under no_grad."""

    def __init__(self, blind: bool = False, swapped: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.text = nn.ModuleDict(
            {"embed": nn.Embedding(32, 32), "encoder": nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)}
        )
        self.picture = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32))
        self.project = nn.Linear(32, 32)
        self.blind, self.swapped = blind, swapped

    def forward(self, x: Tensor, picture: Tensor) -> Tensor:
        if self.blind:
            with torch.no_grad():
                words = self.text["encoder"](self.text["embed"](x))
        else:
            words = self.text["encoder"](self.text["embed"](x))
        a = F.normalize(self.project(words.mean(1)), dim=-1)
        b = F.normalize(self.picture(picture), dim=-1)
        return 10 * (a @ a.T if self.swapped else a @ b.T)


@sick(
    CASES,
    "s_text_encoder_under_no_grad",
    ("missing_gradient",),
    ("text",),
    source="https://github.com/edreisMD/ConVIRT-pytorch/issues/7: the text encoder is wrapped in torch.no_grad()",
    proof=owned_but_none(
        "text.embed.weight", "text.encoder.layers.0.linear1.weight", "text.encoder.layers.0.self_attn.in_proj_weight"
    ),
)
def text_encoder_under_no_grad(seed: int) -> Setup:
    data = Reviews(seed, batch=16)
    model = Captions(blind=True)

    def loss(i: int) -> Tensor:
        x, y = data()
        same = (y[:, None] == y).float()
        return F.cross_entropy(model(x, F.one_hot(y, 4).float()), same / same.sum(1, keepdim=True))

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), 40)


@sick(
    CASES,
    "s_second_tower_is_dropped_by_a_typo",
    ("missing_gradient",),
    ("picture",),
    source="https://github.com/vita-epfl/UniTraj/issues/59: parameters that were not used in producing the loss",
    proof=owned_but_none("picture.0.weight", "picture.0.bias", "picture.2.weight", "picture.2.bias"),
)
def second_tower_is_dropped_by_a_typo(seed: int) -> Setup:
    data = Reviews(seed, batch=16)
    model = Captions(swapped=True)

    def loss(i: int) -> Tensor:
        x, y = data()
        same = (y[:, None] == y).float()
        return F.cross_entropy(model(x, F.one_hot(y, 4).float()), same / same.sum(1, keepdim=True))

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), 40)


@sick(
    CASES,
    "s_reentrant_checkpoint_over_frozen_embedding",
    ("missing_gradient",),
    ("blocks",),
    source="https://github.com/huggingface/transformers/issues/21381: with a frozen embedding, gradient checkpointing yields no gradient",
    proof=owned_but_none(*(f"blocks.{i}.attention.query.{w}.weight" for i in (0, 1) for w in ("down", "up"))),
)
def reentrant_checkpoint_over_frozen_embedding(seed: int) -> Setup:
    model = Lm([Block(32), Block(32)])
    model.requires_grad_(False)
    for block in model.blocks:
        block.attention.query = Lora(block.attention.query)
    model.head.requires_grad_(True)
    model.reentrant = True
    return fit(model, classify(model, Text(seed)), adam(model, 1e-2), 40)


class Rewriter(nn.Module):
    """A writer rewrites a text, a reader classifies what was written: the hard choice of a word stops the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.writer = Recurrent(nn.GRU, words=32, outputs=32)
        self.reader = Classifier(nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(torch.where(x % 2 == 0, x, self.writer(x).argmax(-1)))


@sick(
    CASES,
    "s_argmax_between_writer_and_reader",
    ("missing_gradient",),
    ("writer",),
    source="https://www.codetd.com/en/article/13765068: out.argmax(-1) of a seq2seq model, loss.backward() gives it no gradient",
    proof=owned_but_none("writer.embed.weight", "writer.rnn.weight_ih_l0", "writer.rnn.bias_hh_l0", "writer.head.weight"),
)
def argmax_between_writer_and_reader(seed: int) -> Setup:
    model = Rewriter()
    return fit(model, classify(model, Reviews(seed)), adam(model), 40)


class WithPooler(nn.Module):
    """A classifier that has a pooler and does not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Classifier(nn.Sequential(nn.Linear(32, 32), nn.GELU()))
        self.pooler = nn.Sequential(nn.Linear(32, 32), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@sick(
    CASES,
    "s_pooler_is_never_called",
    ("missing_gradient",),
    ("pooler",),
    within=30,
    source="https://github.com/allenai/allennlp/issues/5682: a pooler that forward never reaches, unused parameters under DDP",
    proof=every(never_called("pooler.0"), owned_but_none("pooler.0.weight", "pooler.0.bias")),
)
def pooler_is_never_called(seed: int) -> Setup:
    model = WithPooler()
    return fit(model, classify(model, Reviews(seed)), torch.optim.AdamW(model.parameters(), lr=3e-3), 45)


@sick(
    CASES,
    "s_encoder_state_is_detached_in_the_second_phase",
    ("missing_gradient",),
    ("encoder",),
    onset=20,
    source="https://github.com/OpenNMT/OpenNMT-py/issues/1418: a detach_state on the encoder's side stops its gradient",
    proof=owned_but_none("encoder.embed.weight", "encoder.rnn.weight_ih_l0", "encoder.rnn.weight_hh_l0", first=20),
)
def encoder_state_is_detached_in_the_second_phase(seed: int) -> Setup:
    data, model = Pairs(seed), Seq2Seq()

    def loss(i: int) -> Tensor:
        x, y = data()
        model.cut = i >= 20
        return F.cross_entropy(model(x, y).flatten(0, 1), y.flatten())

    return fit(model, loss, adam(model, 1e-2), 45)


class DataTagger(Recurrent):
    """Takes the .data of the embedding, as old code did to "save memory"."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x).data)[0])


@sick(
    CASES,
    "s_embedding_through_dot_data",
    ("missing_gradient",),
    ("embed",),
    source="https://pytorch.org/blog/pytorch-0_4_0-migration-guide/: what about .data? it is not tracked by autograd",
    proof=owned_but_none("embed.weight"),
)
def embedding_through_dot_data(seed: int) -> Setup:
    model = DataTagger(nn.GRU)
    return fit(model, classify(model, Text(seed)), adam(model, 1e-2), 40)


@sick(
    CASES,
    "s_router_chooses_by_argmax_alone",
    ("missing_gradient",),
    ("blocks.0.inner.router",),
    source="https://github.com/lucidrains/mixture-of-experts/issues/7: top-1 is not differentiable, what moves the gate?",
    proof=owned_but_none("blocks.0.inner.router.weight"),
)
def router_chooses_by_argmax_alone(seed: int) -> Setup:
    model = Lm([Block(32, inner=Experts(32, 2, 1, lambda chosen, logits: torch.ones_like(chosen)))])
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), lr=3e-3), 40)


# Sick: a gradient of exactly zero


@sick(
    CASES,
    "s_softmax_over_the_one_chosen_expert",
    ("zero_gradient",),
    ("blocks.0.inner.router",),
    source="https://github.com/davidmrau/mixture-of-experts/issues/27: with k=1 the gate's gradient is always zero",
    proof=zero_gradient("blocks.0.inner.router.weight"),
)
def softmax_over_the_one_chosen_expert(seed: int) -> Setup:
    model = Lm([Block(32, inner=Experts(32, 2, 1, softmax_over_chosen))])
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0), 40)


class Rounded(nn.Module):
    """Sums the codes of the words; the codes are rounded, without a straight-through estimator."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encode = nn.Embedding(32, 32), nn.Linear(32, 32)
        self.decode = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.decode((3 * self.encode(self.embed(x))).round().mean(1))


@sick(
    CASES,
    "s_codes_rounded_without_straight_through",
    ("zero_gradient",),
    ("embed", "encode"),
    source="https://arxiv.org/abs/1308.3432: hard thresholds have a gradient of zero, hence the straight-through estimator",
    proof=zero_gradient("embed.weight", "encode.weight", "encode.bias"),
)
def codes_rounded_without_straight_through(seed: int) -> Setup:
    model = Rounded()
    return fit(model, classify(model, Reviews(seed)), torch.optim.Adam(model.parameters(), lr=3e-3), 40)


class TwoHeads(nn.Module):
    """A shared GRU with a head for the next word and one for the class of the text."""

    def __init__(self, words: int = 32, classes: int = 4) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(words, 32), nn.GRU(32, 32, batch_first=True)
        self.next, self.topic = nn.Linear(32, words), nn.Linear(32, classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h, _ = self.rnn(self.embed(x))
        return {"next": self.next(h), "topic": self.topic(h.mean(1))}


@sick(
    CASES,
    "s_loss_mask_of_a_head_turns_all_zero",
    ("zero_gradient",),
    ("next",),
    onset=20,
    source="https://github.com/nvidia-cosmos/cosmos-rl/pull/155: every label is masked, the loss is made zero; here for one head",
    proof=zero_gradient("next.weight", "next.bias", first=20),
)
def loss_mask_of_a_head_turns_all_zero(seed: int) -> Setup:
    data, model = Reviews(seed), TwoHeads()

    def loss(i: int) -> Tensor:
        x, y = data()
        out = model(x)
        losses = F.cross_entropy(out["next"][:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="none")
        mask = (x[:, 1:] < (32 if i < 20 else 0)).float().flatten()
        return F.cross_entropy(out["topic"], y) + (losses * mask).sum() / mask.sum().clamp(min=1)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 45)


# Sick: what the optimizer does not have, or does not move


class ListLm(nn.Module):
    """The hidden layers stand in a plain list."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, 32), nn.Linear(32, WORDS)
        self.layers = [nn.Linear(32, 32) if kind == "linear" else Block(32) for _ in range(2)]

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = h + layer(h).tanh()
        return self.head(h)


@sick(
    CASES,
    "s_blocks_in_a_python_list",
    ("not_in_optimizer",),
    source="https://www.engineermaxxing.com/micro/lessons/pytorch-internals.html: layers in a plain list are not in parameters()",
    proof=outside(20),
)
def blocks_in_a_python_list(seed: int) -> Setup:
    model = ListLm("blocks")
    return fit(model, classify(model, Text(seed)), adam(model), 40)


@sick(
    CASES,
    "s_feed_forward_layers_in_a_plain_list",
    ("not_in_optimizer",),
    source="https://shihaizhou.com/2020/05/17/Pytorch-nn-ModuleList-and-nn-Sequential/: parameters() ignores what stands in a list",
    proof=outside(4),
)
def feed_forward_layers_in_a_plain_list(seed: int) -> Setup:
    model = ListLm("linear")
    return fit(model, classify(model, Text(seed)), torch.optim.SGD(model.parameters(), lr=0.5), 30)


@sick(
    CASES,
    "s_head_replaced_after_the_optimizer_was_made",
    ("not_in_optimizer",),
    ("head",),
    source="https://theneuralbase.com/pytorch/learn/intermediate/replacing-the-classification-head/: a new head for a new task",
    proof=unchanged("head.weight", "head.bias"),
)
def head_replaced_after_the_optimizer_was_made(seed: int) -> Setup:
    model = Classifier(nn.Sequential(nn.Linear(32, 32), nn.GELU()), classes=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.head = nn.Linear(32, 4)
    return fit(model, classify(model, Reviews(seed)), optimizer, 40)


@sick(
    CASES,
    "s_only_the_encoder_is_passed_to_adam",
    ("not_in_optimizer",),
    ("decoder",),
    source="https://pytorch.org/tutorials/intermediate/seq2seq_translation_tutorial.html: encoder and decoder have an optimizer each",
    proof=unchanged("decoder.embed.weight", "decoder.rnn.weight_ih_l0", "decoder.rnn.bias_hh_l0", "decoder.head.weight"),
)
def only_the_encoder_is_passed_to_adam(seed: int) -> Setup:
    data, model = Pairs(seed), Seq2Seq()

    def loss(i: int) -> Tensor:
        model.decoder.zero_grad()
        x, y = data()
        return F.cross_entropy(model(x, y).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam(model.encoder.parameters(), lr=1e-2), 40)


@sick(
    CASES,
    "s_unfrozen_body_was_never_given_to_the_optimizer",
    ("not_in_optimizer",),
    ("encoder", "embed"),
    onset=20,
    source="https://arxiv.org/abs/1801.06146: gradual unfreezing; here without add_param_group",
    proof=unchanged("embed.weight", "encoder.0.weight", "encoder.0.bias", first=20),
)
def unfrozen_body_was_never_given_to_the_optimizer(seed: int) -> Setup:
    model = Classifier(nn.Sequential(nn.Linear(32, 32), nn.GELU()))
    model.embed.requires_grad_(False)
    model.encoder.requires_grad_(False)

    def before(i: int) -> None:
        if i == 20:
            model.requires_grad_(True)
        model.zero_grad()

    return fit(model, classify(model, Reviews(seed)), adam(model, 1e-2), 45, before)


@sick(
    CASES,
    "s_bfloat16_weights_absorb_the_update",
    ("frozen_weights",),
    everything("recurrent"),
    also=("update_ratio_too_small",),
    source="https://github.com/pytorch/ao/pull/1124: an update below 1e-3 of a bfloat16 weight changes nothing",
    proof=unchanged("embed.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight"),
)
def bfloat16_weights_absorb_the_update(seed: int) -> Setup:
    model = Recurrent(nn.RNN)
    with torch.no_grad():
        for p in model.parameters():  # As of a trained model: nothing so near to zero that a tiny update shows.
            p.copy_(torch.where(p.abs() < 0.01, 0.01, p))
    model.to(torch.bfloat16)
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0), 30)


@sick(
    CASES,
    "s_rate_of_the_embedding_group_is_zero",
    ("frozen_weights",),
    ("embed",),
    source="https://arxiv.org/abs/1801.06146: a rate for each layer; here that of the embedding has been divided down to 0",
    proof=unchanged("embed.weight"),
)
def rate_of_the_embedding_group_is_zero(seed: int) -> Setup:
    model = Recurrent(nn.GRU)
    groups = [
        {"params": model.head.parameters(), "lr": 1e-2},
        {"params": model.rnn.parameters(), "lr": 4e-3},
        {"params": model.embed.parameters(), "lr": 1e-2 // 2.6},
    ]
    return fit(model, classify(model, Text(seed)), torch.optim.Adam(groups), 40)


@sick(
    CASES,
    "s_gradients_cleared_between_backward_and_step",
    ("frozen_weights",),
    everything("recurrent"),
    also=("update_ratio_too_small",),
    source="https://velog.io/@rhss10/기본-optimizer.zerograd는-어디에-넣어주어야-할까: anywhere but between backward and step",
    proof=unchanged("embed.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight", "head.bias"),
)
def gradients_cleared_between_backward_and_step(seed: int) -> Setup:
    model = Recurrent(nn.LSTM)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return fit(model, classify(model, Text(seed)), optimizer, 30, between=lambda i: optimizer.zero_grad())


@sick(
    CASES,
    "s_linear_decay_counts_micro_batches_and_ends_at_zero",
    ("frozen_weights",),
    everything("lm"),
    onset=25,
    source="https://github.com/huggingface/accelerate/issues/963: the scheduler steps at every micro-batch, so its end comes too early",
    proof=unchanged("embed.weight", "blocks.0.attention.query.weight", "blocks.0.inner.0.weight", "head.weight", first=25),
)
def linear_decay_counts_micro_batches_and_ends_at_zero(seed: int) -> Setup:
    model = Lm([Block(32)])
    optimizer = adam(model)
    return fit(model, classify(model, Text(seed)), optimizer, 50, lambda i: set_lr(optimizer, 3e-3 * max(0.0, 1 - i / 25)))


# Sick: the size of an update


@sick(
    CASES,
    "s_rate_of_1e_minus_7_from_scratch",
    ("update_ratio_too_small",),
    also=("frozen_weights", "loss_plateau"),
    source="https://arxiv.org/abs/2005.14165: 6e-4 to 6e-5 for GPT-3; here 1e-7, meant for another scale of model",
    proof=every(update_ratio(below=1e-5), loss_stays(0.02)),
)
def rate_of_1e_minus_7_from_scratch(seed: int) -> Setup:
    model = Lm([Block(32)])
    return fit(model, classify(model, Text(seed)), adam(model, 1e-7), 40)


@sick(
    CASES,
    "s_plain_sgd_with_the_rate_of_adam_over_a_thousand",
    ("update_ratio_too_small",),
    also=("frozen_weights", "loss_plateau"),
    source="https://github.com/pytorch/examples/issues/595: the LSTM language model, whose SGD needs a rate of 20; here 1e-6",
    proof=every(update_ratio(below=1e-6), loss_stays(0.02)),
)
def plain_sgd_with_the_rate_of_adam_over_a_thousand(seed: int) -> Setup:
    model = Recurrent(nn.LSTM)
    return fit(model, classify(model, Text(seed)), torch.optim.SGD(model.parameters(), lr=1e-6), 40)


@sick(
    CASES,
    "s_adam_with_a_rate_of_one",
    ("update_ratio_too_large",),
    also=("loss_diverging", "loss_spike", "exploding_gradient", "gradient_spike", "dead_units"),
    source="https://arxiv.org/abs/2004.08249: transformers fail to train when updates are too large",
    proof=update_ratio(above=1.0, last=2),
)
def adam_with_a_rate_of_one(seed: int) -> Setup:
    model = Lm([Block(32, act=nn.ReLU), Block(32, act=nn.ReLU)])
    return fit(model, classify(model, Text(seed)), torch.optim.Adam(model.parameters(), lr=1.0), 30)


@sick(
    CASES,
    "s_rate_jumps_at_the_second_stage",
    ("update_ratio_too_large",),
    onset=25,
    also=("loss_diverging", "loss_spike", "exploding_gradient", "gradient_spike", "saturated_activation"),
    source="https://arxiv.org/abs/1908.03265: Adam with too large a rate in a stage where its variance is not fit for it",
    proof=every(update_ratio(above=0.5, first=25, last=27), update_ratio(below=0.2, first=5, last=25)),
)
def rate_jumps_at_the_second_stage(seed: int) -> Setup:
    model = Recurrent(nn.GRU)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return fit(model, classify(model, Text(seed)), optimizer, 50, lambda i: set_lr(optimizer, 3e-3 if i < 25 else 1.0))


# Sick: gradients that fade or grow


class Question(nn.Module):
    """A question of two words, then a long passage of features, then an answer that depends on the question, by a plain RNN."""

    def __init__(self, length: int, gain: float | None = None) -> None:
        super().__init__()
        self.question = nn.Embedding(8, 32)
        self.passage = nn.Linear(8, 32)
        self.rnn = nn.RNN(32, 32, batch_first=True)
        self.head = nn.Linear(32, 4)
        self.length = length
        if gain is not None:
            nn.init.orthogonal_(self.rnn.weight_hh_l0, gain)

    def forward(self, x: Tensor, passage: Tensor) -> Tensor:
        h, _ = self.rnn(torch.cat([self.question(x), self.passage(passage)], 1))
        return self.head(h[:, -1])


def _questions(model: Question, seed: int, batch: int = 16) -> Callable[[int], Tensor]:
    generator = torch.Generator().manual_seed(7000 + seed)

    def loss(i: int) -> Tensor:
        x = torch.randint(8, (batch, 2), generator=generator)
        passage = torch.randn(batch, model.length, 8, generator=generator)
        return F.cross_entropy(model(x, passage), x[:, 0] % 4)

    return loss


@sick(
    CASES,
    "s_question_is_forgotten_by_a_plain_rnn",
    ("vanishing_gradient",),
    ("question",),
    source="https://arxiv.org/abs/1211.5063: the gradient of what lies many steps back vanishes",
    also=("loss_plateau",),
    proof=gradient_ratio("question.weight", "passage.weight", 1e-6),
)
def question_is_forgotten_by_a_plain_rnn(seed: int) -> Setup:
    model = Question(60)
    return fit(model, _questions(model, seed), torch.optim.SGD(model.parameters(), lr=0.1), 40)


@sick(
    CASES,
    "s_deep_stack_without_residuals_or_norms",
    ("vanishing_gradient",),
    ("embed", "position", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "blocks.5.attention"),
    source="https://arxiv.org/abs/2103.03404: without skips, attention loses rank and signal doubly exponentially with depth",
    also=("loss_plateau",),
    proof=every(
        gradient_ratio("blocks.0.attention.value.weight", "blocks.5.inner.2.weight", 1e-6),
        gradient_ratio("blocks.2.attention.value.weight", "blocks.5.inner.2.weight", 1e-3),
    ),
)
def deep_stack_without_residuals_or_norms(seed: int) -> Setup:
    model = Lm([Block(32, norm="none", residual=False) for _ in range(6)])
    return fit(model, classify(model, Text(seed)), torch.optim.SGD(model.parameters(), lr=0.1), 30)


@sick(
    CASES,
    "s_encoder_of_eight_sigmoid_layers",
    ("vanishing_gradient",),
    ("embed", "encoder.0", "encoder.2", "encoder.4", "encoder.6", "encoder.8", "encoder.10", "encoder.12"),
    source="https://proceedings.mlr.press/v9/glorot10a.html: sigmoid layers in depth",
    also=("loss_plateau",),
    proof=every(gradient_ratio("encoder.0.weight", "head.weight", 1e-4), gradient_ratio("embed.weight", "head.weight", 1e-4)),
)
def encoder_of_eight_sigmoid_layers(seed: int) -> Setup:
    model = Classifier(nn.Sequential(*itertools.chain(*((nn.Linear(32, 32), nn.Sigmoid()) for _ in range(8)))))
    return fit(model, classify(model, Reviews(seed)), torch.optim.SGD(model.parameters(), lr=0.1), 40)


@sick(
    CASES,
    "s_recurrent_weights_with_an_orthogonal_gain_of_four",
    ("exploding_gradient",),
    ("question", "passage", "rnn"),
    source="https://arxiv.org/abs/1211.5063: recurrent weights of a spectral radius far above one",
    also=("gradient_spike",),
    proof=gradient_ratio("head.weight", "question.weight", 1e-3, last=15),
)
def recurrent_weights_with_an_orthogonal_gain_of_four(seed: int) -> Setup:
    model = Question(40, gain=4.0)
    return fit(model, _questions(model, seed), torch.optim.SGD(model.parameters(), lr=0.05), 30, between=clip(model, 0.1))


class _Quantise(torch.autograd.Function):
    """Rounds to a grid; the backward forgets that the forward divided by the step again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float) -> Tensor:
        ctx.step = step
        return (x / step).round() * step

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.step, None


class Quantised(nn.Module):
    """A layer whose output is quantised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return _Quantise.apply(self.linear(x).tanh(), 0.05)


@sick(
    CASES,
    "s_quantiser_backward_without_its_step",
    ("exploding_gradient",),
    ("embed", "encoder"),
    source="https://arxiv.org/abs/1902.08153: the scale of a quantiser's gradient (LSQ); here a backward that leaves it out",
    proof=every(
        gradient_ratio("encoder.5.linear.weight", "encoder.0.linear.weight", 1e-3),
        gradient_ratio("head.weight", "encoder.0.linear.weight", 1e-4),
    ),
)
def quantiser_backward_without_its_step(seed: int) -> Setup:
    model = Classifier(nn.Sequential(*(Quantised(32) for _ in range(6))))
    return fit(model, classify(model, Reviews(seed)), torch.optim.SGD(model.parameters(), lr=0.1), 30, between=clip(model))


@sick(
    CASES,
    "s_weight_penalty_with_the_wrong_sign",
    ("exploding_gradient",),
    everything("recurrent"),
    also=("update_ratio_too_large", "loss_diverging", "saturated_activation", "non_finite_gradient", "non_finite_loss"),
    source="https://arxiv.org/abs/1711.05101: weight decay as a penalty in the loss; here it is subtracted",
    proof=every(gradient_grows("rnn.weight_hh_l0", 1e3, 39), gradient_grows("head.weight", 1e3, 39)),
)
def weight_penalty_with_the_wrong_sign(seed: int) -> Setup:
    data, model = Text(seed), Recurrent(nn.RNN)

    def loss(i: int) -> Tensor:
        x, y = data()
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten()) - penalty

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.2), 40)


class Readability(nn.Module):
    """The sum of the words' values, then a linear score."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(64, 32, mode="sum")
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bag(x))[:, 0]


@sick(
    CASES,
    "s_rate_of_a_regression_is_raised_too_far",
    (
        "exploding_gradient",
        "loss_diverging",
        "update_ratio_too_large",
        "non_finite_loss",
        "non_finite_gradient",
        "non_finite_weight",
    ),
    onset=30,
    also=("gradient_spike", "loss_spike"),
    source="https://github.com/mosaicml/llm-foundry/issues/232: the loss explodes; here a regression's rate is raised",
    proof=every(gradient_grows("head.weight", 100.0, 49, since=29), gradient_grows("bag.weight", 100.0, 49, since=29)),
)
def rate_of_a_regression_is_raised_too_far(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(8000 + seed)
    worth = torch.randn(64, generator=generator)
    model = Readability()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def loss(i: int) -> Tensor:
        x = torch.randint(64, (32, 10), generator=generator)
        return F.mse_loss(model(x), worth[x].sum(1))

    return fit(model, loss, optimizer, 50, lambda i: set_lr(optimizer, 2e-4 if i < 30 else 0.05))


# Sick: one bad update


@sick(
    CASES,
    "s_token_count_of_a_batch_is_one",
    ("gradient_spike", "loss_spike"),
    onset=30,
    source="https://github.com/stanford-crfm/mistral/issues/115: bad batches, large spikes, then recovery; here the sum is divided by 1",
    proof=every(gradient_spikes(30, 30.0), loss_spikes(30, 30.0)),
)
def token_count_of_a_batch_is_one(seed: int) -> Setup:
    data, model = Text(seed), Lm([Block(32)])

    def loss(i: int) -> Tensor:
        x, y = data()
        total = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
        return total / (1 if i == 30 else y.numel())

    return fit(model, loss, adam(model), 50, between=clip(model))


class Matcher(nn.Module):
    """Mean of the words' vectors of two texts, and their cosine."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(33, 32)
        self.project = nn.Linear(32, 32, bias=False)
        with torch.no_grad():
            self.embed.weight[32] *= 1e-5

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(*(self.project(self.embed(t).mean(1)) for t in (a, b)), dim=-1)


@sick(
    CASES,
    "s_cosine_of_an_almost_empty_text",
    ("gradient_spike",),
    onset=25,
    source="https://github.com/ml-explore/mlx-lm/issues/1658: the loss is as ever, the norm of the gradient is 1e3 to 1e8 times as large",
    proof=gradient_spikes(25, 50.0),
)
def cosine_of_an_almost_empty_text(seed: int) -> Setup:
    data, model = Reviews(seed), Matcher()

    def loss(i: int) -> Tensor:
        (a, y), (b, z) = data(), data()
        if i == 25:
            a[3:5] = 32
        return (model(a, b) - (y == z).float()).square().mean()

    return fit(model, loss, adam(model), 45, between=clip(model))


@sick(
    CASES,
    "s_a_batch_in_another_language",
    ("loss_spike", "gradient_spike"),
    onset=70,
    source="https://github.com/stas00/ml-engineering/issues/32: toxic data at certain iterations",
    proof=loss_spikes(70, 8.0),
)
def a_batch_in_another_language(seed: int) -> Setup:
    data, model = Reviews(seed), Classifier(nn.Sequential(nn.Linear(32, 32), nn.GELU()))

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), (y + 1) % 4 if i == 70 else y)

    return fit(model, loss, adam(model, 1e-2), 90, between=clip(model))


@sick(
    CASES,
    "s_one_batch_has_scores_in_percent",
    ("loss_spike", "gradient_spike"),
    onset=50,
    source="https://github.com/facebookresearch/metaseq/pull/521: detect and skip loss spikes; here scores of 0 to 100 for 0 to 1",
    proof=every(loss_spikes(50, 30.0), recovers(50, 0.1)),
)
def one_batch_has_scores_in_percent(seed: int) -> Setup:
    data, model = Reviews(seed), Recurrent(nn.GRU, words=32, outputs=1, last=True)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x)[:, 0], (100 if i == 50 else 1) * y / 3)

    return fit(model, loss, adam(model), 75, between=clip(model))


# Sick: the loss


@sick(
    CASES,
    "s_sgd_rate_of_three_hundred_without_clipping",
    ("loss_diverging", "exploding_gradient", "update_ratio_too_large"),
    also=("loss_spike", "gradient_spike"),
    source="https://github.com/pytorch/examples/issues/595: that model trains at a rate of 20 because it clips at 0.25",
    proof=every(loss_grows(5.0), stays_high(5.0)),
)
def sgd_rate_of_three_hundred_without_clipping(seed: int) -> Setup:
    model = Recurrent(nn.LSTM)
    return fit(model, classify(model, Text(seed)), torch.optim.SGD(model.parameters(), lr=300.0), 60)


@sick(
    CASES,
    "s_resumed_with_the_rate_of_another_run",
    ("loss_diverging", "exploding_gradient", "update_ratio_too_large"),
    onset=40,
    also=("loss_spike", "gradient_spike"),
    source="https://github.com/bigscience-workshop/Megatron-DeepSpeed/issues/347: norm and loss increase sharply",
    proof=stays_high(3.0, 40),
)
def resumed_with_the_rate_of_another_run(seed: int) -> Setup:
    model = Lm([Block(32)])
    optimizer = adam(model)
    return fit(model, classify(model, Text(seed)), optimizer, 80, lambda i: set_lr(optimizer, 3e-3 if i < 40 else 0.6))


@sick(
    CASES,
    "s_lengths_sorted_but_not_the_labels",
    ("loss_plateau",),
    within=100,
    source="https://city.shaform.com/en/2019/01/15/sort-sequences-in-pytorch/: sort by length, and unsort; here the labels stay as they were",
    proof=every(loss_stays(0.1), update_ratio(above=1e-4)),
)
def lengths_sorted_but_not_the_labels(seed: int) -> Setup:
    data, model = Reviews(seed, padded=True, batch=16), Recurrent(nn.LSTM, words=32, outputs=4, last=True)

    def loss(i: int) -> Tensor:
        x, y = data()
        order = (x != 0).sum(1).argsort(descending=True)
        return F.cross_entropy(model(x[order]), y)

    return fit(model, loss, adam(model, 1e-3), 150)


@sick(
    CASES,
    "s_padding_mask_is_inverted",
    ("loss_plateau",),
    within=100,
    source="https://github.com/pytorch/pytorch/issues/27968: True means ignore; a mask the other way round",
    proof=every(loss_stays(0.1), update_ratio(above=1e-4)),
)
def padding_mask_is_inverted(seed: int) -> Setup:
    data = Reviews(seed, padded=True, batch=16)
    model = nn.ModuleDict({"embed": nn.Embedding(32, 32), "attention": nn.MultiheadAttention(32, 2, batch_first=True)})
    model["query"], model["head"] = nn.Embedding(1, 32), nn.Linear(32, 4)

    def loss(i: int) -> Tensor:
        x, y = data()
        x = F.pad(x, (0, 1))
        h = model["embed"](x)
        query = model["query"].weight.expand(len(x), 1, 32)
        return F.cross_entropy(model["head"](model["attention"](query, h, h, key_padding_mask=x != 0)[0][:, 0]), y)

    return fit(model, loss, adam(model, 1e-3), 150)


# Sick: wrong from the first step


class SoftmaxLm(Recurrent):
    """Gives probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(super().forward(x), -1)


@sick(
    CASES,
    "s_language_model_returns_probabilities",
    ("double_softmax",),
    ("",),
    also=("loss_plateau",),
    source="https://discuss.pytorch.org/t/cross-entropy-loss-is-not-decreasing/43814/16: softmax passed into the cross-entropy",
    proof=probabilities("", WORDS),
)
def language_model_returns_probabilities(seed: int) -> Setup:
    model = SoftmaxLm(nn.LSTM)
    return fit(model, classify(model, Text(seed)), adam(model, 1e-2), 40)


@sick(
    CASES,
    "s_softmax_as_the_last_layer",
    ("double_softmax",),
    ("head.2", "head"),
    also=("loss_plateau",),
    source="https://discuss.pytorch.org/t/cross-entropy-loss-is-not-decreasing/43814/16: softmax passed into the cross-entropy",
    proof=probabilities("head.2", 4),
)
def softmax_as_the_last_layer(seed: int) -> Setup:
    head = nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 4), nn.Softmax(-1))
    model = Classifier(nn.Sequential(nn.Linear(32, 32), nn.GELU()), head=head)
    return fit(model, classify(model, Reviews(seed)), adam(model), 40)


@sick(
    CASES,
    "s_constant_initialisation",
    ("poor_init",),
    everything("classifier"),
    also=("loss_plateau",),
    source="https://github.com/keras-team/keras/issues/10273: what the initialisation of the embedding does; here all is 0.1",
    proof=equal_rows("encoder.0.weight", "encoder.2.weight"),
)
def constant_initialisation(seed: int) -> Setup:
    model = Classifier(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh()))
    for p in model.parameters():
        nn.init.constant_(p, 0.1)
    return fit(model, classify(model, Reviews(seed)), torch.optim.SGD(model.parameters(), lr=0.1), 40)


@sick(
    CASES,
    "s_tied_embedding_as_wide_as_a_normal",
    ("poor_init",),
    everything("lm"),
    source="https://github.com/huggingface/transformers/pull/26441: a head with variance 1 starts at a loss of 110 where 11 is right",
    proof=first_loss(20.0, math.log(WORDS)),
)
def tied_embedding_as_wide_as_a_normal(seed: int) -> Setup:
    model = Lm([Block(64)], width=64, tied=True, std=2.0)
    return fit(model, classify(model, Text(seed)), adam(model), 40)


# Sick: NaN and Inf


@sick(
    CASES,
    "s_empty_sentence_masks_a_whole_row",
    ("non_finite_activation",),
    ("attention",),
    onset=15,
    source="https://github.com/pytorch/pytorch/issues/40932: the whole input is padded, the attention gives NaN",
    proof=every(first_non_finite(15, "attention"), first_non_finite(15)),
)
def empty_sentence_masks_a_whole_row(seed: int) -> Setup:
    data = Reviews(seed, padded=True)
    model = nn.ModuleDict({"embed": nn.Embedding(32, 32), "attention": nn.MultiheadAttention(32, 2, batch_first=True)})
    model["head"] = nn.Linear(32, 4)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 15:
            x[7] = 0
        h = model["embed"](x)
        return F.cross_entropy(model["head"](model["attention"](h, h, h, key_padding_mask=x == 0)[0].mean(1)), y)

    return fit(model, loss, adam(model), 35)


@sick(
    CASES,
    "s_causal_and_padding_mask_leave_no_key",
    ("non_finite_activation",),
    ("blocks.0.attention",),
    source="https://github.com/pytorch/pytorch/pull/42323: the first word is masked by one mask, the rest by the other",
    proof=every(first_non_finite(0, "blocks.0.attention.out"), first_non_finite(0)),
)
def causal_and_padding_mask_leave_no_key(seed: int) -> Setup:
    data, model = Text(seed), Lm([Block(32), Block(32)])

    def loss(i: int) -> Tensor:
        x, y = data()
        keep = torch.arange(x.shape[1]).expand_as(x) >= torch.arange(len(x))[:, None] % 3  # Padding on the left.
        return F.cross_entropy(model(x, keep)[keep], y[keep])

    return fit(model, loss, adam(model), 25)


@sick(
    CASES,
    "s_new_token_rows_are_uninitialised",
    ("non_finite_weight",),
    ("embed",),
    source="https://github.com/huggingface/transformers/issues/30953: torch.empty holds NaN",
    proof=every(first_non_finite(0, "embed"), first_non_finite(0)),
)
def new_token_rows_are_uninitialised(seed: int) -> Setup:
    model = Recurrent(nn.GRU)
    with torch.no_grad():
        model.embed.weight[3, 5:9] = math.nan
    return fit(model, classify(model, Text(seed, batch=32)), adam(model), 25)


class Recogniser(nn.Module):
    """Frames to log-probabilities of phones."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0]).log_softmax(-1)


def _ctc(out: Tensor, y: Tensor, frames: list[int] | None = None, **options: Any) -> Tensor:
    lengths = torch.tensor(frames or [out.shape[1]] * len(out))
    return F.ctc_loss(out.transpose(0, 1), y, lengths, torch.full((len(y),), y.shape[1]), **options)


@sick(
    CASES,
    "s_target_longer_than_its_frames",
    ("non_finite_loss",),
    onset=12,
    source="https://github.com/ypwhs/captcha_break/issues/29: the input is too short for the target, CTC becomes nan",
    proof=first_non_finite(12),
)
def target_longer_than_its_frames(seed: int) -> Setup:
    data, model = Speech(seed), Recogniser()

    def loss(i: int) -> Tensor:
        x, y = data()
        return _ctc(model(x), y, [2 if i == 12 and k == 0 else 15 for k in range(len(x))])

    return fit(model, loss, adam(model), 30)


class Copier(nn.Module):
    """A pointer network: gives the probability of each word of the vocabulary by attention to the words of the text."""

    def __init__(self, words: int = 32) -> None:
        super().__init__()
        self.embed, self.query, self.words = nn.Embedding(words, 32), nn.Linear(32, 32), words

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        weights = (self.query(h[:, -1:]) @ h.transpose(1, 2) / 32**0.5).softmax(-1)[:, 0]
        return torch.zeros(len(x), self.words).scatter_add(1, x, weights)


@sick(
    CASES,
    "s_log_of_probability_zero",
    ("non_finite_loss",),
    onset=14,
    source="https://github.com/abisee/pointer-generator/issues/4: NaN by log(dist), where the probability is 0",
    proof=first_non_finite(14),
)
def log_of_probability_zero(seed: int) -> Setup:
    data, model = Reviews(seed), Copier()

    def loss(i: int) -> Tensor:
        x, _ = data()
        goal = x[:, -1].clone()
        if i == 14:
            goal[5] = 0  # No text holds word 0.
        return -model(x).gather(1, goal[:, None]).log().mean()

    return fit(model, loss, adam(model, 1e-2), 35)


@sick(
    CASES,
    "s_distance_of_a_text_to_itself",
    ("non_finite_gradient",),
    ("", "embed", "rnn"),
    onset=12,
    source="https://github.com/pytorch/pytorch/issues/1620: the loss is fine, the gradient is nan; here by sqrt at 0",
    proof=first_non_finite(12),
)
def distance_of_a_text_to_itself(seed: int) -> Setup:
    data = Reviews(seed, batch=16)
    model = nn.ModuleDict({"embed": nn.Embedding(32, 16), "rnn": nn.GRU(16, 16, batch_first=True)})

    def loss(i: int) -> Tensor:
        (a, y), (b, z) = data(), data()
        if i == 12:
            b[2], z[2] = a[2], y[2]
        u, v = (model["rnn"](model["embed"](t))[1][0] for t in (a, b))
        distance = (u - v).square().sum(-1).sqrt()
        return torch.where(y == z, distance, (1 - distance).clamp(min=0)).mean()

    return fit(model, loss, adam(model), 30)


@sick(
    CASES,
    "s_half_precision_with_a_fixed_scale_of_2_to_24",
    ("non_finite_gradient",),
    everything("classifier"),
    source="https://github.com/karpathy/nanoGPT/issues/167: float16 does not work without carefully scaled values",
    proof=every(first_non_finite(0)),
)
def half_precision_with_a_fixed_scale_of_2_to_24(seed: int) -> Setup:
    data, model = Reviews(seed), Classifier(nn.Sequential(nn.Linear(32, 32), nn.Tanh()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(i: int) -> Tensor:
        x, y = data()
        with torch.autocast("cpu", torch.float16):
            out = model(x)
        return 2.0**24 * F.cross_entropy(out.float(), y)

    def unscale(i: int) -> None:
        for p in model.parameters():
            p.grad /= 2.0**24

    return fit(model, loss, optimizer, 25, between=unscale)


@sick(
    CASES,
    "s_a_frame_of_a_recording_is_nan",
    ("non_finite_input",),
    ("",),
    onset=14,
    source="https://github.com/allenai/olmoearth_pretrain/issues/135: a batch whose data turn the loss into nan",
    proof=every(first_non_finite(14, "rnn"), first_non_finite(14)),
)
def a_frame_of_a_recording_is_nan(seed: int) -> Setup:
    data, model = Speech(seed), Recogniser()

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 14:
            x[3, 4, 2] = math.nan
        return _ctc(model(x), y)

    return fit(model, loss, adam(model), 32)


# Sick: the loop


@sick(
    CASES,
    "s_nobody_calls_zero_grad",
    ("gradients_not_zeroed",),
    everything("recurrent"),
    also=("loss_diverging", "exploding_gradient"),
    source="https://discuss.pytorch.org/t/what-step-backward-and-zero-grad-do/33301: otherwise you accumulate the gradients of all calls",
    proof=stale("rnn.weight_hh_l0", 0.99),
)
def nobody_calls_zero_grad(seed: int) -> Setup:
    data, model = Text(seed), Recurrent(nn.LSTM)
    loss, optimizer = classify(model, data), torch.optim.Adam(model.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for i in range(30):
            value = loss(i)
            value.backward()
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "s_accumulation_clears_only_every_second_time",
    ("gradients_not_zeroed",),
    everything("lm"),
    source="https://openillumi.com/?p=43111: accumulation, and where zero_grad belongs; here it stands under the wrong count",
    proof=stale("blocks.0.inner.0.weight", 0.45),
)
def accumulation_clears_only_every_second_time(seed: int) -> Setup:
    data, model = Text(seed, batch=4), Lm([Block(32)])
    loss, optimizer = classify(model, data, scale=0.25), adam(model)

    def train() -> Iterator[Event]:
        for i in range(30):
            if i % 2 == 0:
                optimizer.zero_grad()
            values = [loss(i) for _ in range(4)]
            for value in values:
                value.backward()
            yield "read", values
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "s_optimizer_of_another_copy",
    ("never_stepped",),
    also=("not_in_optimizer", "loss_plateau"),
    source="https://androidkt.com/copy-pytorch-model-using-deepcopy-and-state_dict/: a deep copy has parameters of its own",
    proof=unchanged("embed.weight", "rnn.weight_hh_l0", "head.weight"),
)
def optimizer_of_another_copy(seed: int) -> Setup:
    data, model = Text(seed), Recurrent(nn.GRU)
    optimizer = torch.optim.Adam(copy.deepcopy(model).parameters(), lr=1e-2)
    return fit(model, classify(model, data), optimizer, 30, before=lambda i: model.zero_grad())


@sick(
    CASES,
    "s_accumulation_never_reaches_its_count",
    ("never_stepped",),
    also=("loss_plateau",),
    source="https://discuss.pytorch.org/t/what-step-backward-and-zero-grad-do/33301: what step() is for; here its condition never holds",
    proof=skips(30),
)
def accumulation_never_reaches_its_count(seed: int) -> Setup:
    data, model = Text(seed), Lm([Block(32)])
    loss, optimizer = classify(model, data, scale=0.25), adam(model)

    def train() -> Iterator[Event]:
        for i in range(30):
            micro = 0
            optimizer.zero_grad()
            value = loss(i)
            value.backward()
            micro += 1
            yield "read", [value]
            if micro == 4:
                optimizer.step()
                yield "step", [optimizer]
            else:
                yield "step", []

    return Setup(model, train)


def scaled(model: nn.Module, loss: Callable[[int], Tensor], optimizer: torch.optim.Optimizer, updates: int, scale: float) -> Setup:
    """The loop with a GradScaler; the loss is computed under float16 by the caller."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=200)

    def train() -> Iterator[Event]:
        for i in range(updates):
            optimizer.zero_grad()
            value = loss(i)
            scaler.scale(value).backward()
            yield "read", [value]
            scaler.step(optimizer)
            before = scaler.get_scale()
            scaler.update()
            yield "step", [optimizer] if scaler.get_scale() >= before else []

    return Setup(model, train)


@sick(
    CASES,
    "s_targets_too_large_for_half_precision",
    ("loss_scale_collapse",),
    also=("non_finite_gradient",),
    source="https://github.com/NVIDIA/apex/issues/834: overflow, skipping step, loss scale 0.5, 0.25, ...",
    proof=skips(25),
)
def targets_too_large_for_half_precision(seed: int) -> Setup:
    data, model = Reviews(seed), Classifier(nn.Sequential(nn.Linear(32, 32), nn.Tanh()), classes=1)

    def loss(i: int) -> Tensor:
        x, y = data()
        with torch.autocast("cpu", torch.float16):
            out = model(x)[:, 0]
        return (out.float() - 1e10 * (1 + y)).square().sum()

    return scaled(model, loss, adam(model), 40, 2.0**16)


@sick(
    CASES,
    "s_updates_overflow_after_the_new_loss",
    ("loss_scale_collapse", "non_finite_gradient"),
    onset=15,
    source="https://github.com/facebookresearch/fairseq/issues/512: overflow, and the scale falls until training ends",
    proof=skips(25, first=15),
)
def updates_overflow_after_the_new_loss(seed: int) -> Setup:
    data, model = Text(seed), Recurrent(nn.GRU)

    def loss(i: int) -> Tensor:
        x, y = data()
        h = model.rnn(model.embed(x))[0]
        with torch.autocast("cpu", torch.float16):
            out = model.head(h).float()
        value = F.cross_entropy(out.flatten(0, 1), y.flatten())
        if i >= 15:
            again = model.rnn(model.embed(x))[0]  # Without dropout the second pass is the first: sqrt at 0.
            value = value + 0.1 * (h - again).square().sum(-1).sqrt().mean()
        return value

    return scaled(model, loss, adam(model), 42, 2.0**10)


# Sick: units


class Squashed(nn.Module):
    """Words, a squashing layer, mean, head."""

    def __init__(self, act: nn.Module, scale: float) -> None:
        super().__init__()
        self.embed, self.project, self.act = nn.Embedding(32, 32), nn.Linear(32, 64), act
        self.head = nn.Linear(64, 4)
        with torch.no_grad():
            self.embed.weight *= scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.project(self.embed(x))).mean(1))


@sick(
    CASES,
    "s_tanh_layer_behind_word_vectors_times_100",
    ("saturated_activation",),
    ("act", "project"),
    source="https://github.com/keras-team/keras/issues/10273: word vectors with values of -12 to 9, the model is stuck; here larger",
    also=("vanishing_gradient", "poor_init"),
    proof=flat_part("act", 1e-6, lambda: Reviews(0)),
)
def tanh_layer_behind_word_vectors_times_100(seed: int) -> Setup:
    model = Squashed(nn.Tanh(), 100.0)
    return fit(model, classify(model, Reviews(seed)), adam(model), 40)


@sick(
    CASES,
    "s_sigmoid_layer_far_in_its_flat_part",
    ("saturated_activation",),
    ("act", "project"),
    source="https://proceedings.mlr.press/v9/glorot10a.html: saturated sigmoid layers let no gradient pass",
    also=("vanishing_gradient", "poor_init"),
    proof=flat_part("act", 1e-6, lambda: Reviews(0)),
)
def sigmoid_layer_far_in_its_flat_part(seed: int) -> Setup:
    model = Squashed(nn.Sigmoid(), 150.0)
    return fit(model, classify(model, Reviews(seed)), torch.optim.SGD(model.parameters(), lr=0.1), 40)


@sick(
    CASES,
    "s_feed_forward_of_a_block_never_fires",
    ("dead_units",),
    ("blocks.0.inner",),
    also=("zero_gradient",),
    source="https://arxiv.org/abs/1903.06733: dying ReLU; here biases of -8 from a bad checkpoint",
    proof=dead_fraction("blocks.0.inner.1", 0.99),
)
def feed_forward_of_a_block_never_fires(seed: int) -> Setup:
    model = Lm([Block(32, act=nn.ReLU), Block(32, act=nn.ReLU)])
    nn.init.constant_(model.blocks[0].inner[0].bias, -8.0)
    return fit(model, classify(model, Text(seed)), adam(model), 40)


@sick(
    CASES,
    "s_four_fifths_of_the_hidden_relu_are_dead",
    ("dead_units",),
    ("act", "project"),
    source="https://arxiv.org/abs/1903.06733: dying ReLU; here most units lie far below zero",
    proof=dead_fraction("act", 0.75),
)
def four_fifths_of_the_hidden_relu_are_dead(seed: int) -> Setup:
    model = Squashed(nn.ReLU(), 1.0)
    with torch.no_grad():
        model.project.bias[:51] -= 10
    return fit(model, classify(model, Reviews(seed)), adam(model), 40)


class Prompted(nn.Module):
    """A frozen encoder behind prompt vectors; `stale` takes a copy of the prompt made at the start."""

    def __init__(self, stale: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 32).requires_grad_(False)
        self.block = Block(32, causal=False).requires_grad_(False)
        self.prompt = nn.Embedding(6, 32)
        self.head = nn.Linear(32, 4)
        self.copy = self.prompt.weight.detach().clone() if stale else None

    def forward(self, x: Tensor) -> Tensor:
        prompt = self.prompt.weight if self.copy is None else self.copy
        h = self.block(torch.cat([prompt.expand(len(x), -1, -1), self.embed(x)], 1))
        return self.head(h.mean(1))


@sick(
    CASES,
    "s_prompt_is_a_copy_made_at_the_start",
    ("missing_gradient",),
    ("prompt",),
    within=30,
    source="https://arxiv.org/abs/2104.08691: prompt tuning; here forward uses a copy of the prompt",
    proof=owned_but_none("prompt.weight"),
)
def prompt_is_a_copy_made_at_the_start(seed: int) -> Setup:
    model = Prompted(stale=True)
    return fit(model, classify(model, Reviews(seed)), adam(model, 1e-2), 45)


class SparseTagger(nn.Module):
    """Sparse embedding, GRU, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(200, 32, sparse=True), nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0].mean(1))


@sick(
    CASES,
    "s_sparse_adam_alone_leaves_the_dense_part",
    ("not_in_optimizer",),
    ("rnn", "head"),
    source="https://github.com/huggingface/transformers/issues/30276: SparseAdam takes no dense gradients; the second one is missing",
    proof=unchanged("rnn.weight_ih_l0", "rnn.bias_hh_l0", "head.weight", "head.bias"),
)
def sparse_adam_alone_leaves_the_dense_part(seed: int) -> Setup:
    model = SparseTagger()
    optimizer = torch.optim.SparseAdam(model.embed.parameters(), lr=1e-2)

    def before(i: int) -> None:
        model.zero_grad()

    return fit(model, classify(model, Reviews(seed, words=200)), optimizer, 40, before)


@sick(
    CASES,
    "s_checkpoint_average_divides_by_zero",
    ("non_finite_weight",),
    ("blocks.1",),
    onset=15,
    source="https://github.com/learning-at-home/hivemind/pull/224: averaging puts NaN into the weights",
    proof=first_non_finite(15),
)
def checkpoint_average_divides_by_zero(seed: int) -> Setup:
    model = Lm([Block(32), Block(32)])

    def before(i: int) -> None:
        if i == 15:
            with torch.no_grad():
                for p in model.blocks[1].parameters():
                    p.copy_(torch.zeros_like(p) / 0)

    return fit(model, classify(model, Text(seed)), adam(model), 32, before)


@sick(
    CASES,
    "s_log_energy_of_silence_is_minus_infinity",
    ("non_finite_input",),
    ("",),
    onset=16,
    source="https://github.com/Kyubyong/tacotron/issues/30: spikes whenever a frame like silence appears; here the log of an energy of 0",
    proof=first_non_finite(16),
)
def log_energy_of_silence_is_minus_infinity(seed: int) -> Setup:
    data, model = Speech(seed), Recogniser()

    def loss(i: int) -> Tensor:
        x, y = data()
        energy = x.square()
        if i == 16:
            energy[2, 7] = 0
        return _ctc(model(energy.log()), y)

    return fit(model, loss, adam(model), 34)


@sick(
    CASES,
    "s_features_overflow_in_half_precision",
    ("non_finite_activation",),
    ("first",),
    source="https://github.com/pytorch/pytorch/issues/40497: NaN from the start under float16; here values above 65504",
    proof=every(first_non_finite(0, "first"), first_non_finite(0)),
)
def features_overflow_in_half_precision(seed: int) -> Setup:
    data = Reviews(seed)
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(32, 32))
    model.add_module("first", nn.Linear(32, 32))
    model.add_module("act", nn.ReLU())
    model.add_module("head", nn.Linear(32, 4))
    with torch.no_grad():
        model.embed.weight.mul_(300)
        model.first.weight.mul_(300)

    def loss(i: int) -> Tensor:
        x, y = data()
        with torch.autocast("cpu", torch.float16):
            out = model(x).mean(1)
        return F.cross_entropy(out.float(), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), 25)


# Healthy


def warm_up(optimizer: torch.optim.Optimizer, lr: float, updates: int) -> Callable[[int], None]:
    """For `before`: the rate grows from exactly 0."""
    return lambda i: set_lr(optimizer, lr * min(1.0, i / updates))


@healthy(
    CASES,
    "s_tied_causal_lm_warms_up_from_zero",
    source="https://arxiv.org/abs/1608.05859: tied embeddings; https://arxiv.org/abs/1706.03762: warm-up, masks with -inf",
    proof=converges(0.65),
)
def tied_causal_lm_warms_up_from_zero(seed: int) -> Setup:
    model = Lm([Block(32), Block(32)], tied=True)
    optimizer = adam(model, 1e-2)
    return fit(model, classify(model, Text(seed)), optimizer, 80, warm_up(optimizer, 1e-2, 10), clip(model))


@healthy(
    CASES,
    "s_torch_encoder_with_a_padding_mask",
    source="https://pytorch.org/docs/stable/generated/torch.nn.TransformerEncoder.html: with src_key_padding_mask and padding_idx",
    proof=converges(0.3),
)
def torch_encoder_with_a_padding_mask(seed: int) -> Setup:
    data = Reviews(seed, padded=True)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model = Classifier(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))

    def loss(i: int) -> Tensor:
        x, y = data()
        keep = (x != 0).unsqueeze(-1)
        h = model.encoder(model.embed(x), src_key_padding_mask=x == 0)
        return F.cross_entropy(model.head((h * keep).sum(1) / keep.sum(1)), y)

    return fit(model, loss, adam(model), 60)


@healthy(
    CASES,
    "s_lora_on_a_frozen_base",
    source="https://arxiv.org/abs/2106.09685: LoRA; B is 0 at the start, so A has no gradient in the first update",
    proof=converges(0.75),
)
def lora_on_a_frozen_base(seed: int) -> Setup:
    model = Lm([Block(32), Block(32)], std=0.5)
    model.requires_grad_(False)
    for block in model.blocks:
        block.attention.query, block.attention.value = Lora(block.attention.query), Lora(block.attention.value)
        block.inner[0], block.inner[2] = Lora(block.inner[0]), Lora(block.inner[2])
    model.head.requires_grad_(True)
    return fit(model, classify(model, Text(seed)), adam(model, 1e-2), 60)


@healthy(
    CASES,
    "s_lora_with_checkpointing_that_is_not_reentrant",
    source="https://github.com/huggingface/transformers/issues/26221: use_reentrant=False is the cure for LoRA on a frozen embedding",
    proof=converges(0.75),
)
def lora_with_checkpointing_that_is_not_reentrant(seed: int) -> Setup:
    model = Lm([Block(32)], std=0.5)
    model.requires_grad_(False)
    for block in model.blocks:
        block.attention.value, block.inner[0] = Lora(block.attention.value), Lora(block.inner[0])
    model.head.requires_grad_(True)
    model.reentrant = False
    return fit(model, classify(model, Text(seed)), adam(model, 1e-2), 70)


class Adapter(nn.Module):
    """A bottleneck after a frozen module, zero at the start."""

    def __init__(self, base: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(width, 8), nn.Linear(8, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.base(x)
        return h + self.up(F.gelu(self.down(h)))


@healthy(
    CASES,
    "s_adapters_in_a_frozen_encoder",
    source="https://arxiv.org/abs/1902.00751: adapters that start at the identity; only they, the norms and the head are trained",
    proof=converges(0.3),
)
def adapters_in_a_frozen_encoder(seed: int) -> Setup:
    model = Classifier(nn.Sequential(Block(32, causal=False), Block(32, causal=False)))
    model.embed.requires_grad_(False)
    for block in model.encoder:
        block.attention.requires_grad_(False)
        block.inner = Adapter(block.inner)
    return fit(model, classify(model, Reviews(seed)), adam(model, 1e-2), 60)


@healthy(
    CASES,
    "s_prompt_tuning_of_a_frozen_encoder",
    source="https://arxiv.org/abs/2104.08691: prompt tuning",
    proof=converges(0.4),
)
def prompt_tuning_of_a_frozen_encoder(seed: int) -> Setup:
    model = Prompted()
    return fit(model, classify(model, Reviews(seed)), adam(model, 2e-2), 90)


@healthy(
    CASES,
    "s_switch_experts_some_idle",
    source="https://arxiv.org/abs/2101.03961: one expert a token and a loss for balance; in small batches some stay idle",
    proof=every(converges(0.7), sometimes_idle("blocks.0.inner.experts", 10)),
)
def switch_experts_some_idle(seed: int) -> Setup:
    model = Lm([Block(32, inner=Experts(32, 8, 1, softmax_over_all))])
    task = classify(model, Text(seed, batch=3))
    return fit(model, lambda i: task(i) + 0.05 * model.blocks[0].inner.balance, adam(model, 1e-2), 80, between=clip(model))


@healthy(
    CASES,
    "s_two_of_four_experts",
    source="https://arxiv.org/abs/1701.06538: the two best experts, with gates normalised over them",
    proof=converges(0.7),
)
def two_of_four_experts(seed: int) -> Setup:
    model = Lm([Block(32, inner=Experts(32, 4, 2, softmax_over_chosen))])
    task = classify(model, Text(seed, batch=6))
    return fit(model, lambda i: task(i) + 0.01 * model.blocks[0].inner.balance, adam(model, 1e-2), 100)


@healthy(
    CASES,
    "s_one_block_used_four_times",
    source="https://arxiv.org/abs/1909.11942: ALBERT shares its layer over the depth",
    proof=converges(0.7),
)
def one_block_used_four_times(seed: int) -> Setup:
    model = Lm([Block(32)])
    model.blocks = nn.ModuleList([model.blocks[0]] * 4)
    return fit(model, classify(model, Text(seed, batch=6)), adam(model, 5e-3), 80, between=clip(model))


@healthy(
    CASES,
    "s_reentrant_checkpointing_of_a_trained_embedding",
    source="https://pytorch.org/docs/stable/checkpoint.html: the reentrant variant, with inputs that require a gradient",
    proof=converges(0.7),
)
def reentrant_checkpointing_of_a_trained_embedding(seed: int) -> Setup:
    model = Lm([Block(32), Block(32)])
    model.reentrant = True
    return fit(model, classify(model, Text(seed)), adam(model, 1e-2), 70)


@healthy(
    CASES,
    "s_eight_micro_batches_and_sum_losses",
    source="https://github.com/huggingface/accelerate/issues/963: gradient accumulation; the losses are sums over words",
    proof=converges(0.65),
)
def eight_micro_batches_and_sum_losses(seed: int) -> Setup:
    data, model = Text(seed, batch=2), Recurrent(nn.GRU)
    loss, optimizer = classify(model, data, reduction="sum"), adam(model, 2e-2)

    def train() -> Iterator[Event]:
        for i in range(40):
            values = []
            for _ in range(8):
                values.append(loss(i))
                values[-1].backward()
            yield "read", values
            torch.nn.utils.clip_grad_norm_(model.parameters(), 50.0)
            optimizer.step()
            yield "step", [optimizer]
            optimizer.zero_grad()

    return Setup(model, train)


@healthy(
    CASES,
    "s_bfloat16_autocast_and_label_smoothing",
    source="https://github.com/pytorch/pytorch/issues/120376: autocast to bfloat16, weights in float32; label smoothing 0.1",
    proof=converges(0.75),
)
def bfloat16_autocast_and_label_smoothing(seed: int) -> Setup:
    data, model = Text(seed), Lm([Block(32)])

    def loss(i: int) -> Tensor:
        x, y = data()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
        return F.cross_entropy(out.float().flatten(0, 1), y.flatten(), label_smoothing=0.1)

    return fit(model, loss, adam(model, 1e-2), 90)


@healthy(
    CASES,
    "s_grad_scaler_finds_its_scale",
    source="https://github.com/facebookresearch/swav/issues/47: overflow in the first iterations is normal, the scale is tried from above",
    proof=every(converges(0.3), steps_begin_again(20)),
)
def grad_scaler_finds_its_scale(seed: int) -> Setup:
    data, model = Reviews(seed), Classifier(nn.Sequential(nn.Linear(32, 32), nn.GELU()))

    def loss(i: int) -> Tensor:
        x, y = data()
        with torch.autocast("cpu", torch.float16):
            out = model(x)
        return F.cross_entropy(out.float(), y)

    return scaled(model, loss, adam(model, 1e-2), 90, 2.0**24)


@healthy(
    CASES,
    "s_sparse_rows_and_dense_rest",
    source="https://github.com/pytorch/pytorch/issues/18404: SparseAdam for the embedding, an optimizer of its own for the rest",
    proof=converges(0.3),
)
def sparse_rows_and_dense_rest(seed: int) -> Setup:
    data, model = Reviews(seed, words=200), SparseTagger()
    loss = classify(model, data)
    first = torch.optim.SparseAdam(model.embed.parameters(), lr=1e-2)
    second = torch.optim.Adam([*model.rnn.parameters(), *model.head.parameters()], lr=1e-2)

    def train() -> Iterator[Event]:
        for i in range(100):
            first.zero_grad()
            second.zero_grad()
            value = loss(i)
            value.backward()
            yield "read", [value]
            first.step()
            second.step()
            yield "step", [first, second]

    return Setup(model, train)


@healthy(
    CASES,
    "s_bag_of_words_with_rare_ones",
    source="https://pytorch.org/docs/stable/generated/torch.nn.EmbeddingBag.html: most rows are in no batch",
    proof=converges(0.4),
)
def bag_of_words_with_rare_ones(seed: int) -> Setup:
    model = nn.Sequential(nn.EmbeddingBag(1000, 32), nn.Linear(32, 4))
    return fit(model, classify(model, Reviews(seed)), torch.optim.Adagrad(model.parameters(), lr=0.1), 120)


@healthy(
    CASES,
    "s_seq2seq_with_teacher_forcing",
    source="https://arxiv.org/abs/1409.3215: sequence to sequence, here a translation word by word",
    proof=converges(0.35),
)
def seq2seq_with_teacher_forcing(seed: int) -> Setup:
    data, model = Pairs(seed), Seq2Seq()

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x, y).flatten(0, 1), y.flatten())

    return fit(model, loss, adam(model, 1e-2), 140, between=clip(model))


@healthy(
    CASES,
    "s_phones_by_ctc",
    source="https://github.com/wenet-e2e/wenet/pull/2299: CTC with zero_infinity",
    proof=converges(0.2),
)
def phones_by_ctc(seed: int) -> Setup:
    data, model = Speech(seed), Recogniser()

    def loss(i: int) -> Tensor:
        x, y = data()
        return _ctc(model(x), y, zero_infinity=True)

    return fit(model, loss, adam(model, 1e-2), 80, between=clip(model))


class Dropping(Lm):
    """Leaves out a block now and then."""

    def __init__(self, seed: int) -> None:
        super().__init__([Block(32) for _ in range(3)])
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        h = self.embed(x) + self.position.weight[: x.shape[1]]
        for block in self.blocks:
            if torch.rand((), generator=self.generator) > 0.3:
                h = block(h)
        return self.head(self.norm(h))


@healthy(
    CASES,
    "s_layers_are_dropped_at_random",
    source="https://arxiv.org/abs/1909.11556: LayerDrop",
    proof=converges(0.7),
)
def layers_are_dropped_at_random(seed: int) -> Setup:
    model = Dropping(seed)
    return fit(model, classify(model, Text(seed)), adam(model, 5e-3), 80, between=clip(model))


@healthy(
    CASES,
    "s_two_tasks_take_turns",
    source="https://arxiv.org/abs/1706.05098: multi-task learning; every head is idle in every other update",
    proof=turns(0.8, 0.2),
)
def two_tasks_take_turns(seed: int) -> Setup:
    data, model = Reviews(seed, length=8), TwoHeads()

    def loss(i: int) -> Tensor:
        x, y = data()
        out = model(x)
        if i % 2:
            return F.cross_entropy(out["topic"], y)
        return F.cross_entropy(out["next"][:, :-1].flatten(0, 1), x[:, 1:].flatten())

    return fit(model, loss, adam(model, 1e-2), 120)


@healthy(
    CASES,
    "s_student_learns_the_softmax_of_its_teacher",
    source="https://arxiv.org/abs/1503.02531: distillation; a softmax of the teacher as the target is no double softmax",
    proof=converges(0.7),
)
def student_learns_the_softmax_of_its_teacher(seed: int) -> Setup:
    data = Reviews(seed)
    model = nn.ModuleDict(
        {"teacher": Classifier(nn.Identity()), "student": Classifier(nn.Sequential(nn.Linear(32, 32), nn.GELU()))}
    )
    model["teacher"].requires_grad_(False)
    with torch.no_grad():
        model["teacher"].embed.weight[1:] = (data.table.log() - data.table.log().mean(0)).T @ torch.eye(4, 32) * 3
        model["teacher"].head.weight.copy_(torch.eye(4, 32))

    def loss(i: int) -> Tensor:
        x, y = data()
        with torch.no_grad():
            target = F.softmax(model["teacher"](x) / 2, -1)
        out = model["student"](x)
        return F.kl_div(F.log_softmax(out / 2, -1), target, reduction="batchmean") * 4 + 0.5 * F.cross_entropy(out, y)

    return fit(model, loss, adam(model, 1e-2), 90)


class Mixture(Recurrent):
    """A mixture of three softmaxes, whose log goes into the NLL."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM)
        self.prior, self.latent = nn.Linear(32, 3), nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(self.embed(x))
        parts = self.head(self.latent(h).tanh().unflatten(-1, (3, 32))).softmax(-1)
        return ((self.prior(h).softmax(-1).unsqueeze(-1) * parts).sum(-2) + 1e-8).log()


@healthy(
    CASES,
    "s_mos_language_model",
    source="https://arxiv.org/abs/1711.03953: breaking the softmax bottleneck",
    proof=converges(0.65),
)
def mos_language_model(seed: int) -> Setup:
    data, model = Text(seed), Mixture()

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.nll_loss(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, adam(model, 1e-2), 90)


@dataclass
class PoolerOutput:
    """As the models of transformers give it."""

    loss: Tensor
    logits: Tensor
    pooled: Tensor


class Bert(nn.Module):
    """A small BERT with a mask token that fine-tuning never uses, a tanh pooler and an output object."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 32)
        self.cls, self.mask = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(32))
        self.layers = nn.ModuleList(Block(32, norm="post", causal=False) for _ in range(3))
        self.pooler = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
        self.classifier = nn.Linear(32, 4)

    def forward(self, x: Tensor, y: Tensor) -> PoolerOutput:
        h = torch.cat([self.cls.expand(len(x), 1, 32), torch.where((x == 0)[..., None], self.mask, self.embed(x))], 1)
        for layer in self.layers:
            h = layer(h)
        pooled = self.pooler(h[:, 0])
        logits = self.classifier(pooled)
        return PoolerOutput(F.cross_entropy(logits, y), logits, pooled)


@healthy(
    CASES,
    "s_fine_tuning_with_a_rate_for_each_layer",
    source="https://arxiv.org/abs/2003.10555: layer-wise decay of the rate (ELECTRA); here a factor of 10 a layer, 1e-3 over all",
    proof=converges(0.4),
)
def fine_tuning_with_a_rate_for_each_layer(seed: int) -> Setup:
    data, model = Reviews(seed), Bert()
    groups = [{"params": [*model.pooler.parameters(), *model.classifier.parameters()], "lr": 5e-3}]
    groups += [{"params": list(layer.parameters()), "lr": 5e-3 * 0.1**k} for k, layer in enumerate(reversed(model.layers))]
    groups += [{"params": [model.embed.weight, model.cls, model.mask], "lr": 5e-6}]

    def loss(i: int) -> Tensor:
        return model(*data()).loss

    return fit(model, loss, torch.optim.AdamW(groups), 60)


@healthy(
    CASES,
    "s_body_thaws_after_the_head",
    source="https://arxiv.org/abs/1801.06146: gradual unfreezing, the optimizer knows all parts from the start",
    proof=converges(0.3),
)
def body_thaws_after_the_head(seed: int) -> Setup:
    model = Classifier(nn.Sequential(nn.Linear(32, 32), nn.GELU()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def before(i: int) -> None:
        model.encoder.requires_grad_(i >= 20)
        model.embed.requires_grad_(i >= 30)

    return fit(model, classify(model, Reviews(seed)), optimizer, 90, before)


@healthy(
    CASES,
    "s_cosine_with_restarts_of_a_tagger",
    source="https://arxiv.org/abs/1608.03983: SGDR",
    proof=converges(0.8),
)
def cosine_with_restarts_of_a_tagger(seed: int) -> Setup:
    model = Recurrent(nn.GRU, bidirectional=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    return fit(
        model,
        classify(model, Text(seed)),
        optimizer,
        120,
        lambda i: set_lr(optimizer, 0.01 + 0.3 * (1 + math.cos(math.pi * (i % 30) / 30))),
        clip(model),
    )


@healthy(
    CASES,
    "s_eight_texts_by_heart",
    source="http://karpathy.github.io/2019/04/25/recipe/: overfit a single batch; the gradient falls to almost nothing",
    proof=converges(0.005),
)
def eight_texts_by_heart(seed: int) -> Setup:
    x, y = Reviews(seed, batch=8)()
    model = Recurrent(nn.LSTM, words=32, outputs=4, last=True)
    return fit(model, lambda i: F.cross_entropy(model(x), y), torch.optim.Adam(model.parameters(), lr=2e-2), 150)


@healthy(
    CASES,
    "s_two_texts_a_batch",
    source="https://arxiv.org/abs/1804.07612: small batches; the gradients are noisy",
    proof=converges(0.5),
)
def two_texts_a_batch(seed: int) -> Setup:
    model = Classifier(nn.Sequential(nn.Linear(32, 32), nn.GELU()))
    return fit(model, classify(model, Reviews(seed, batch=2)), adam(model), 300)


@healthy(
    CASES,
    "s_mean_teacher_follows_the_student",
    source="https://arxiv.org/abs/1703.01780: the teacher is an average of the student and has no gradient",
    proof=converges(0.35),
)
def mean_teacher_follows_the_student(seed: int) -> Setup:
    data = Reviews(seed)
    student = Classifier(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.1)))
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = adam(student, 1e-2)

    def train() -> Iterator[Event]:
        for _ in range(90):
            x, y = data()
            optimizer.zero_grad()
            out = student(x)
            value = F.cross_entropy(out, y) + 0.1 * F.mse_loss(out.softmax(-1), teacher(x).softmax(-1))
            value.backward()
            yield "read", [value]
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
                    p.lerp_(q, 0.1)
            yield "step", [optimizer]

    return Setup({"student": student, "teacher": teacher}, train)


@healthy(
    CASES,
    "s_rotary_decoder_clipped_hard",
    source="https://arxiv.org/abs/2104.09864: rotary positions; every gradient is clipped to 0.1",
    proof=converges(0.7),
)
def rotary_decoder_clipped_hard(seed: int) -> Setup:
    model = Lm([Block(32, rotary=True), Block(32, rotary=True)])
    return fit(model, classify(model, Text(seed)), adam(model, 1e-2), 90, between=clip(model, 0.1))


@healthy(
    CASES,
    "s_relative_positions_start_at_zero",
    source="https://arxiv.org/abs/1910.10683: T5's relative bias, zero at the start; far distances are never used",
    proof=converges(0.7),
)
def relative_positions_start_at_zero(seed: int) -> Setup:
    model = Lm([Block(32, relative=24)])
    return fit(model, classify(model, Text(seed)), adam(model, 1e-2), 100)


class Highway(nn.Module):
    """Layers behind gates that are shut almost wholly at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.change, self.gate, self.sigmoid = nn.Linear(32, 32), nn.Linear(32, 32), nn.Sigmoid()
        nn.init.constant_(self.gate.bias, -6.0)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.sigmoid(self.gate(x))
        return gate * self.change(x).tanh() + (1 - gate) * x


@healthy(
    CASES,
    "s_highway_gates_near_zero",
    source="https://arxiv.org/abs/1505.00387: highway networks begin with shut gates",
    proof=converges(0.3),
)
def highway_gates_near_zero(seed: int) -> Setup:
    model = Classifier(nn.Sequential(Highway(), Highway(), Highway()))
    return fit(model, classify(model, Reviews(seed)), adam(model, 1e-2), 80)


class Rezero(Block):
    """A block without norms whose branches begin at a factor of 0."""

    def __init__(self) -> None:
        super().__init__(32, norm="none")
        self.alpha = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = x + self.alpha[0] * self.attention(x, keep)
        return x + self.alpha[1] * self.inner(x)


@healthy(
    CASES,
    "s_rezero_branches_begin_at_nothing",
    source="https://arxiv.org/abs/2003.04887: ReZero; in the first update the branches have no gradient at all",
    proof=converges(0.7),
)
def rezero_branches_begin_at_nothing(seed: int) -> Setup:
    model = Lm([Rezero() for _ in range(3)], std=0.5)
    return fit(model, classify(model, Text(seed, batch=6)), adam(model, 1e-2), 90)


class Attentive(nn.Module):
    """GRU, and a softmax over the words as the weights of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(32, 32, padding_idx=0), nn.GRU(32, 16, batch_first=True, bidirectional=True)
        self.score, self.weigh, self.head = nn.Linear(32, 1), nn.Softmax(1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(self.embed(x))
        scores = self.score(h).masked_fill((x == 0).unsqueeze(-1), -math.inf)
        return self.head((self.weigh(scores) * h).sum(1))


@healthy(
    CASES,
    "s_attention_pooling_before_the_loss",
    source="https://arxiv.org/abs/1409.0473: attention weights by a softmax, padded words at -inf",
    proof=converges(0.35),
)
def attention_pooling_before_the_loss(seed: int) -> Setup:
    model = Attentive()
    return fit(model, classify(model, Reviews(seed, padded=True)), adam(model, 1e-2), 90)


@healthy(
    CASES,
    "s_loss_scaled_by_hand",
    source="https://arxiv.org/abs/1710.03740: loss scaling; here by hand, 1024 times, undone before the step",
    proof=converges(0.8),
)
def loss_scaled_by_hand(seed: int) -> Setup:
    model = Recurrent(nn.LSTM)

    def unscale(i: int) -> None:
        for p in model.parameters():
            p.grad /= 1024

    return fit(model, classify(model, Text(seed), scale=1024.0), torch.optim.SGD(model.parameters(), lr=5.0), 120, between=unscale)


class Translator(nn.Module):
    """nn.Transformer with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target, self.position = nn.Embedding(10, 32), nn.Embedding(10, 32), nn.Embedding(8, 32)
        self.body = nn.Transformer(32, 2, 1, 1, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        at = self.position.weight[: x.shape[1]]
        mask = torch.full((y.shape[1], y.shape[1]), -math.inf).triu(1)
        h = self.body(self.source(x) + at, self.target(F.pad(y, (1, 0))[:, :-1]) + at, tgt_mask=mask)
        return {"logits": self.head(h)}


@healthy(
    CASES,
    "s_torch_transformer_translates",
    source="https://arxiv.org/abs/1706.03762: encoder and decoder, teacher forcing, inverse square root of the update as the rate",
    proof=converges(0.4),
)
def torch_transformer_translates(seed: int) -> Setup:
    data, model = Pairs(seed), Translator()
    optimizer = adam(model, 0.0)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x, y)["logits"].flatten(0, 1), y.flatten())

    return fit(model, loss, optimizer, 120, lambda i: set_lr(optimizer, 0.05 * min((i + 1) ** -0.5, (i + 1) * 20**-1.5)))
