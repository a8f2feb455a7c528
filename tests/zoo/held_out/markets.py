"""Runs of markets: text and sequences at small size, time series, tables and recommenders, and the loops around them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Blobs, Case, Event, Setup, Text, classify, fit, healthy, initialise, sick
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


class Topics:
    """Sentences of tokens 1 to `vocabulary` - 1, drawn with the class's own frequencies; 0 pads. Gives (tokens, class)."""

    def __init__(self, seed: int, vocabulary: int = 50, classes: int = 4, batch: int = 32, length: int = 12) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.odds = torch.softmax(1.5 * torch.randn(classes, vocabulary - 1, generator=self.generator), -1)
        self.batch, self.length = batch, length

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(len(self.odds), (self.batch,), generator=self.generator)
        return 1 + torch.multinomial(self.odds[y], self.length, replacement=True, generator=self.generator), y


class Tags:
    """Random tokens; the tag of a place depends on its token and the one before. Gives (tokens, tags), each `[batch, length]`."""

    def __init__(self, seed: int, vocabulary: int = 12, tags: int = 4, batch: int = 16, length: int = 12) -> None:
        self.generator = torch.Generator().manual_seed(7100 + seed)
        self.table = torch.randint(tags, (vocabulary, vocabulary), generator=self.generator)
        self.batch, self.length, self.vocabulary = batch, length, vocabulary

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randint(self.vocabulary, (self.batch, self.length), generator=self.generator)
        return x, self.table[x.roll(1, 1), x]


class Series:
    """Windows of noisy oscillations of zero mean and unit scale, and the next value: `[batch, length, 1]`, `[batch, 1]`."""

    def __init__(self, seed: int, batch: int = 32, length: int = 24, noise: float = 0.1) -> None:
        self.generator = torch.Generator().manual_seed(7200 + seed)
        self.batch, self.length, self.noise = batch, length, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        phase = 2 * math.pi * torch.rand(self.batch, 1, generator=self.generator)
        pace = 0.25 + 0.35 * torch.rand(self.batch, 1, generator=self.generator)
        clean = 1.4 * torch.sin(pace * torch.arange(self.length + 1) + phase)
        x = clean + self.noise * torch.randn(clean.shape, generator=self.generator)
        return x[:, :-1, None], x[:, -1:]


class Block(nn.Module):
    """A pre-norm block: causal attention and a feed-forward net."""

    def __init__(self, width: int, heads: int = 2, act: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.act, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            act(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, d))
        return x + self.down(self.act(self.up(self.norm2(x))))


class LM(nn.Module):
    """A small GPT with the init of GPT-2."""

    def __init__(self, vocabulary: int = 24, width: int = 32, blocks: int = 2, length: int = 16) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        initialise(self, lambda w: nn.init.normal_(w, std=0.02 if w.shape[1] < 128 else 0.02 / math.sqrt(2 * blocks)))
        for e in (self.tok, self.pos):
            nn.init.normal_(e.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tok(x) + self.pos.weight[: x.shape[1]])))


def finite(plain: Plain) -> str:
    """Every loss is finite: nothing else is wrong."""
    assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
    return "every loss is finite"


# ---------------------------------------------------------------------------------------------------------------- sick


class TwoTower(nn.Module):
    def __init__(self, users: int = 40, items: int = 60, width: int = 16) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Embedding(users, width), nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, width))
        self.item = nn.Sequential(nn.Embedding(items, width), nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, width))


class Clicks:
    """A user and the items that it clicked: both have a hidden taste. Gives (users, items) that belong together."""

    def __init__(self, seed: int, users: int = 40, items: int = 60, batch: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(7300 + seed)
        a = torch.randn(users, 4, generator=self.generator)
        b = torch.randn(items, 4, generator=self.generator)
        self.odds = torch.softmax(1.5 * a @ b.T, -1)
        self.batch = batch

    def __call__(self) -> tuple[Tensor, Tensor]:
        u = torch.randint(len(self.odds), (self.batch,), generator=self.generator)
        return u, torch.multinomial(self.odds[u], 1, generator=self.generator)[:, 0]


def in_batch(u: Tensor, v: Tensor, items: Tensor) -> Tensor:
    """Sampled softmax over the batch, the same item elsewhere in it left out."""
    same = (items[:, None] == items) & ~torch.eye(len(items), dtype=torch.bool)
    return F.cross_entropy((u @ v.T).masked_fill(same, -1e9), torch.arange(len(items)))


@sick(
    CASES,
    "mt_two_tower_items_from_the_index",
    ("missing_gradient",),
    ("item",),
    source="https://discuss.pytorch.org/t/detach-no-grad-and-requires-grad/16915 what runs under no_grad gets no gradient",
    proof=every(no_gradient("item.0.weight", "item.1.weight", "item.3.weight", last=15), finite),
)
def _(seed: int) -> Setup:
    # The vectors of the items come from the function that fills the search index, which is under no_grad.
    model, data = TwoTower(), Clicks(seed)

    @torch.no_grad()
    def index(items: Tensor) -> Tensor:
        return model.item(items)

    def loss(i: int) -> Tensor:
        users, items = data()
        return in_batch(model.user(users), index(items), items)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-2), 40)


class Tagger(nn.Module):
    def __init__(self, vocabulary: int = 12, tags: int = 4, width: int = 24) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(vocabulary, width), nn.GRU(width, 32, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, tags)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.embed(x))[0])


@sick(
    CASES,
    "mt_tagger_clears_one_of_two_optimizers",
    ("gradients_not_zeroed",),
    ("embed",),
    source="https://pytorch.org/tutorials/recipes/recipes/zeroing_out_gradients.html gradients add up where nobody clears them",
    proof=lambda plain: _grads_pile_up(plain, "embed.weight", "head.weight"),
)
def _(seed: int) -> Setup:
    model, data = Tagger(), Tags(seed)
    words = torch.optim.SGD(model.embed.parameters(), 0.1)
    rest = torch.optim.AdamW([*model.gru.parameters(), *model.head.parameters()], 5e-3)

    def train() -> Iterator[Event]:
        for i in range(50):
            rest.zero_grad()
            value = classify(model, data)(i)
            value.backward()
            yield "read", [value]
            words.step()
            rest.step()
            yield "step", [words, rest]

    return Setup(model, train)


def _grads_pile_up(plain: Plain, piled: str, cleared: str) -> str:
    """A random walk of gradients: at update 12 what lies in .grad is far above what a single backward gives."""
    now, first = plain.grads[piled][12], plain.grads[piled][0]
    other = plain.grads[cleared][12] / plain.grads[cleared][0]
    assert now > 2.5 * first, f"the gradient of {piled} is {now / first:.3g} times what it was"
    assert other < 1.5, f"that of {cleared} is {other:.3g} times what it was"
    return f"at update 12 {piled}.grad is {now / first:.3g} times its first value, {cleared}.grad {other:.3g} times"


class Adapted(nn.Module):
    """A linear layer and a LoRA pair beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4, zero_a: bool = False) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)
        if zero_a:
            nn.init.zeros_(self.a.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.b(self.a(x))


def adapt(model: LM, zero_a: bool = False) -> LM:
    """Freeze the model but its head, then put adapters on the attention."""
    for p in model.parameters():
        p.requires_grad_(False)
    model.head.requires_grad_(True)
    for block in model.blocks:
        block.qkv = Adapted(block.qkv, zero_a=zero_a)
        block.qkv.a.requires_grad_(True)
        block.qkv.b.requires_grad_(True)
    return model


def pretrained(seed: int) -> LM:
    """A model that has learned another language."""
    model, data = LM(), Text(seed + 50)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for i in range(40):
        optimizer.zero_grad()
        classify(model, data)(i).backward()
        optimizer.step()
    model.zero_grad()
    return model


@sick(
    CASES,
    "mt_lora_both_factors_zero",
    ("zero_gradient",),
    ("blocks.0.qkv.a", "blocks.0.qkv.b", "blocks.1.qkv.a", "blocks.1.qkv.b"),
    source="https://arxiv.org/abs/2106.09685 LoRA: A is Gaussian and B zero; with both zero neither moves",
    proof=every(
        zero_gradient(*[f"blocks.{k}.qkv.{f}.weight" for k in (0, 1) for f in "ab"]),
        lambda plain: f"the head has {_positive(plain.grads['head.weight'])}",
    ),
)
def _(seed: int) -> Setup:
    model = adapt(pretrained(seed), zero_a=True)
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3), 40)


def _positive(norms: list[float]) -> str:
    assert all(n > 0 for n in norms), "no gradient"
    return f"gradients of at least {min(norms):.2g}"


@sick(
    CASES,
    "mt_series_accumulation_never_full",
    ("never_stepped",),
    source="https://discuss.pytorch.org/t/why-do-we-need-to-set-the-gradients-manually-to-zero-in-pytorch/4903/20 accumulation loops",
    proof=every(lambda plain: _no_step(plain), loss_stays(0.2)),
)
def _(seed: int) -> Setup:
    # 12 batches an epoch, an update every 16 of an epoch: the condition is never true.
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(1, 24, batch_first=True), nn.Linear(24, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    model, data = Net(), Series(seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def train() -> Iterator[Event]:
        for _epoch in range(7):
            optimizer.zero_grad()
            for batch in range(12):
                x, y = data()
                value = F.mse_loss(model(x), y) / 16
                value.backward()
                yield "read", [value]
                if (batch + 1) % 16 == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    yield "step", [optimizer]

    return Setup(model, train)


def _no_step(plain: Plain) -> str:
    moved = [n for n, s in plain.steps.items() if any(not math.isnan(x) for x in s)]
    assert not moved, f"{moved} stepped"
    return "no optimizer stepped"


class Tower(nn.Module):
    """A bag of words that goes through a ReLU net."""

    def __init__(self, vocabulary: int = 50, width: int = 32, outputs: int = 4) -> None:
        super().__init__()
        self.embed, self.up, self.act = nn.Embedding(vocabulary, width), nn.Linear(width, 48), nn.ReLU()
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(48, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.up(self.norm(self.embed(x).mean(1)))))


@sick(
    CASES,
    "mt_table_log_of_zero_income",
    ("non_finite_input",),
    ("",),
    onset=20,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    source="https://pytorch.org/docs/stable/generated/torch.log.html log of 0 is -inf; a feature that is mostly above zero",
    proof=every(first_non_finite(20), first_non_finite(20, "0")),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    generator = torch.Generator().manual_seed(10 + seed)
    taste = torch.randn(6, generator=generator)

    def loss(i: int) -> Tensor:
        z = torch.randn(48, 6, generator=generator)
        y = (z @ taste + 0.3 * torch.randn(48, generator=generator) > 0).float()
        income = torch.exp(10 + 0.8 * z[:, 0])
        if i == 20:
            income[7] = 0.0  # a customer without income
        x = torch.cat([(income.log() - 10)[:, None] / 0.8, z[:, 1:]], 1)
        return F.binary_cross_entropy_with_logits(model(x)[:, 0], y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 40)


class MaskedMean(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Sentences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.act = nn.Embedding(50, 24, padding_idx=0), nn.Linear(24, 24), nn.GELU()
        self.pool, self.head = MaskedMean(), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.act(self.mix(self.embed(x))), (x != 0).float()))


@sick(
    CASES,
    "mt_sentence_of_no_words",
    ("non_finite_activation",),
    ("pool",),
    onset=14,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    source="https://github.com/mila-iqia/blocks/pull/581 a mask of zeros only, and a division by its sum",
    proof=every(first_non_finite(14, "pool"), first_non_finite(14), lambda plain: _sound(plain, "act", 14)),
)
def _(seed: int) -> Setup:
    model, data = Sentences(), Topics(seed, batch=16)

    def loss(i: int) -> Tensor:
        x, y = data()
        x[:, 8:] *= (torch.rand(16, 4, generator=data.generator) > 0.5).long()
        if i == 14:
            x[3] = 0  # nothing is left of it after the stop words
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 3e-3), 30)


def _sound(plain: Plain, module: str, update: int) -> str:
    out = plain.outputs[module][update]
    assert out is not None, module
    assert out.nonfinite == 0, f"{module} is not finite"
    return f"the output of {module} is finite"


@sick(
    CASES,
    "mt_sales_mape_of_a_week_without_sales",
    ("non_finite_loss",),
    onset=16,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
    source="https://en.wikipedia.org/wiki/Mean_absolute_percentage_error it divides by the actual value, which may be zero",
    proof=every(first_non_finite(16), lambda plain: _sound(plain, "", 16)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1), nn.Softplus())
    generator = torch.Generator().manual_seed(20 + seed)
    effect = 0.3 * torch.randn(8, generator=generator)

    def loss(i: int) -> Tensor:
        x = torch.randn(32, 8, generator=generator)
        sold = (x @ effect).exp() * (0.9 + 0.2 * torch.rand(32, generator=generator))
        if i == 16:
            sold[5] = 0.0
        return ((model(x)[:, 0] - sold).abs() / sold).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 30)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.scale = Tower(outputs=16), nn.Parameter(torch.ones(()))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.scale * (self.encoder(a) - self.encoder(b)).square().sum(1).sqrt()


@sick(
    CASES,
    "mt_siamese_pair_of_the_same_text",
    ("non_finite_gradient",),
    ("encoder",),
    onset=14,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
    source="https://github.com/pytorch/pytorch/issues/2534 the derivative of a norm where it is zero is NaN",
    proof=every(first_non_finite(14), lambda plain: _sound(plain, "", 14), lambda plain: _loss_finite(plain, 14)),
)
def _(seed: int) -> Setup:
    model, data = Siamese(), Topics(seed, batch=24)

    def loss(i: int) -> Tensor:
        a, ya = data()
        b, yb = data()
        if i == 14:
            b[2], yb[2] = a[2], ya[2]
        d, same = model(a, b), (ya == yb).float()
        return (same * d.square() + (1 - same) * (1.5 - d).clamp(min=0).square()).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), 2e-3), 30)


def _loss_finite(plain: Plain, update: int) -> str:
    assert math.isfinite(plain.losses[update]), "the loss is not finite"
    return f"the loss of update {update} is {plain.losses[update]:.3g}"


@sick(
    CASES,
    "mt_half_weights_adam_eps_rounds_to_zero",
    ("non_finite_weight",),
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient"),
    source="https://github.com/afiaka87/glide-finetune/issues/5 Adam's eps of 1e-8 is 0 in float16, and 0/0 NaN",
    proof=lambda plain: _nan_rows(plain),
)
def _(seed: int) -> Setup:
    # Where the square of a gradient is below 6e-8, so are the words that are not in the batch, the step is 0/0 or x/0.
    model, data = Tower().half(), Topics(seed, batch=4)
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 1e-3), 20)


def _nan_rows(plain: Plain) -> str:
    assert math.isfinite(plain.losses[0]), "the first loss is bad"
    assert all(c[0] == 0 for c in plain.nonfinite.values()), "a first gradient is bad"
    bad = [n for n, w in plain.weights.items() if not math.isfinite(w[1])]
    assert "embed.weight" in bad, f"bad after the first step: {bad}"
    return f"the first step makes NaN of finite gradients in {', '.join(bad)}"


@sick(
    CASES,
    "mt_power_plant_raw_sensors",
    ("unnormalized_input",),
    ("",),
    also=("dead_units",),
    source="https://archive.ics.uci.edu/dataset/294/combined+cycle+power+plant degrees, hPa near 1013, cm Hg and per cent, as they come",
    proof=every(lambda plain: _raw(plain), finite),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    generator = torch.Generator().manual_seed(30 + seed)

    def loss(i: int) -> Tensor:
        z = torch.randn(64, 4, generator=generator)
        x = torch.tensor([19.6, 54.3, 1013.0, 73.3]) + z * torch.tensor([7.4, 12.7, 5.9, 14.6])
        y = -0.9 * z[:, 0] - 0.2 * z[:, 1] + 0.1 * z[:, 2] + 0.2 * torch.randn(64, generator=generator)
        return F.mse_loss(model(x)[:, 0], y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 60)


def _raw(plain: Plain) -> str:
    out = plain.outputs["0"][0]
    assert out is not None
    assert out.rms > 100, f"the first layer gives {out.rms}"
    assert plain.losses[0] > 5, f"the first loss is {plain.losses[0]}"
    return f"the first layer gives {out.rms:.3g}, the first loss is {plain.losses[0]:.3g} for targets of unit scale"


@sick(
    CASES,
    "mt_prior_bias_in_hidden_layers",
    ("dead_units", "zero_gradient"),
    ("up", "act", "norm", "embed", "head"),
    also=("poor_init",),
    source="https://arxiv.org/abs/1708.02002 the bias -log((1 - p) / p) of the head, here by a loop over all Linear layers",
    proof=every(dead_fraction("act", 0.95, last=15), zero_gradient("up.weight", last=15), finite),
)
def _(seed: int) -> Setup:
    model, data = Tower(outputs=1), Topics(seed, classes=10)
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=0.05)
            nn.init.constant_(m.bias, -math.log(0.99 / 0.01))

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.binary_cross_entropy_with_logits(model(x)[:, 0], (y == 0).float())

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 3e-3), 40)


@sick(
    CASES,
    "mt_forecaster_tanh_of_unit_normal_weights",
    ("saturated_activation", "poor_init"),
    ("0", "1", "2", "3", "4", "5"),
    source="https://proceedings.mlr.press/v9/glorot10a.html saturation under a bad init; here nn.init.normal_ with its default std of 1",
    proof=every(lambda plain: _flat(plain, "3", 4.0), lambda plain: _flat(plain, "5", 4.0), finite),
)
def _(seed: int) -> Setup:
    layers = [nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
    model, data = nn.Sequential(*layers, nn.Linear(64, 1)), Series(seed)
    for m in list(model)[:5:2]:
        nn.init.normal_(m.weight)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x[..., 0]), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 1e-3), 60)


def _flat(plain: Plain, act: str, depth: float) -> str:
    """The layer before a tanh gives values that lie far in the flat part, in the root mean square."""
    outs = [plain.outputs[str(int(act) - 1)][i] for i in range(15)]
    size = median(o.rms for o in outs if o is not None)
    assert size > depth, f"what goes into tanh {act} is {size:.3g}"
    return f"what goes into tanh {act} has an rms of {size:.3g}"


class Tied(LM):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(self.blocks(self.tok(x) + self.pos.weight[: x.shape[1]])), self.tok.weight)


@sick(
    CASES,
    "mt_lm_tied_default_embedding",
    ("poor_init",),
    ("tok", "norm"),
    source="https://github.com/karpathy/minGPT/blob/master/mingpt/model.py std 0.02; nn.Embedding's default is 1, too much for a tied head",
    proof=every(lambda plain: _bad_start(plain, 3.0 * math.log(48)), finite),
)
def _(seed: int) -> Setup:
    model = Tied(vocabulary=48, width=96)
    del model.head
    nn.init.normal_(model.tok.weight)
    return fit(model, classify(model, Text(seed, vocabulary=48)), torch.optim.AdamW(model.parameters(), 1e-3), 40)


def _bad_start(plain: Plain, above: float) -> str:
    assert plain.losses[0] > above, f"the first loss is {plain.losses[0]:.3g}, not above {above:.3g}"
    return f"the first loss is {plain.losses[0]:.3g}, above {above:.3g}"


@sick(
    CASES,
    "mt_text_softmax_before_cross_entropy",
    ("double_softmax",),
    ("5",),
    source="https://pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html it wants logits, not probabilities",
    proof=every(lambda plain: _probabilities(plain, "5"), finite),
)
def _(seed: int) -> Setup:
    data = Topics(seed, classes=6)
    model = nn.Sequential(
        nn.EmbeddingBag(50, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 6), nn.Softmax(dim=-1)
    )
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), 5e-3), 60)


def _probabilities(plain: Plain, module: str) -> str:
    for out in plain.outputs[module][:15]:
        assert out is not None, "it is not called"
        assert out.low >= 0 and out.high <= 1, "no probabilities"  # noqa: PT018
    assert min(plain.losses) > 1.0437, "the loss is below what is possible with probabilities"  # log(1 + 5 / e)
    return f"what goes into cross_entropy lies in 0..1, and no loss is below {min(plain.losses):.4g}"


@sick(
    CASES,
    "mt_lm_learning_rate_a_thousandfold",
    ("update_ratio_too_large", "loss_diverging"),
    also=("loss_spike", "exploding_gradient", "gradient_spike"),
    source="https://arxiv.org/abs/1506.01186 the range of learning rates; here 5e-1 in the configuration for 5e-4",
    proof=every(update_ratio(above=0.3, last=6), loss_grows(2.0, last=15), finite),
)
def _(seed: int) -> Setup:
    model = LM()
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), 0.5), 40)


class Forecaster(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(1, width, batch_first=True), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@sick(
    CASES,
    "mt_demand_file_in_other_units",
    ("gradient_spike", "loss_spike"),
    onset=30,
    source="https://arxiv.org/abs/1211.5063 a single step of a huge gradient; here one file has its targets in grams, not kilograms",
    proof=every(gradient_spikes(30, 100.0), lambda plain: _loss_jumps(plain, 30, 1e4), finite),
)
def _(seed: int) -> Setup:
    model, data = Forecaster(), Series(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), 1000 * y if i == 30 else y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), 5e-3), 50)


def _loss_jumps(plain: Plain, update: int, by: float) -> str:
    before, after = median(plain.losses[update - 10 : update]), median(plain.losses[update + 1 : update + 11])
    jump = plain.losses[update] / before
    assert jump > by, f"the loss jumps by {jump:.3g}"
    assert after < 10 * before, f"it stays at {after:.3g}"
    return f"the loss of update {update} is {jump:.3g} times the median before it, and then {after:.3g}"


class Stacked(nn.Module):
    """Recurrent layers on top of each other, without or with residual connections."""

    def __init__(self, layers: int = 8, width: int = 24, residual: bool = False) -> None:
        super().__init__()
        self.embed, self.residual = nn.Embedding(12, width), residual
        self.layers = nn.ModuleList([nn.LSTM(width, width, batch_first=True) for _ in range(layers)])
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            out = layer(h)[0]
            h = h + out if self.residual else out
        return self.head(h)


@sick(
    CASES,
    "mt_tagger_of_eight_plain_lstms",
    ("vanishing_gradient",),
    ("embed", *[f"layers.{i}" for i in range(5)]),
    source="https://arxiv.org/abs/1609.08144 section 3.1: stacked LSTMs work up to four layers, beyond that they need residual connections",
    proof=every(
        gradient_ratio("embed.weight", "head.weight", 1e-4, last=15),
        gradient_ratio("layers.0.weight_ih_l0", "layers.7.weight_ih_l0", 1e-3, last=15),
        loss_stays(0.1),
        finite,
    ),
)
def _(seed: int) -> Setup:
    model = Stacked()
    return fit(model, classify(model, Tags(seed, length=8)), torch.optim.Adam(model.parameters(), 3e-3), 30)


class Rounding(torch.autograd.Function):
    """Activations in `levels` steps. The straight-through gradient should pass as it is, not be multiplied by the levels."""

    @staticmethod
    def forward(ctx: object, x: Tensor, levels: int) -> Tensor:  # type: ignore[override]
        ctx.levels = levels  # type: ignore[attr-defined]
        return (x * levels).round() / levels

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.levels, None  # type: ignore[attr-defined]


class Quantised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Rounding.apply(F.silu(x), 16)  # type: ignore[no-untyped-call, no-any-return]


@sick(
    CASES,
    "mt_table_quantised_backward_by_levels",
    ("exploding_gradient",),
    ("0", "1", "2", "3", "4", "5", "6", "7", "9"),
    source="https://arxiv.org/abs/1308.3432 the straight-through estimator passes the gradient as it is",
    proof=every(
        gradient_ratio("10.weight", "0.weight", 1e-3, last=15), gradient_ratio("8.weight", "6.weight", 0.3, last=15), finite
    ),
)
def _(seed: int) -> Setup:
    sizes = [16, 32, 32, 32, 32, 32]
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), Quantised())]
    model = nn.Sequential(*layers, nn.Linear(32, 4))
    initialise(model, lambda w: nn.init.kaiming_normal_(w))
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), 2e-3), 40)


@sick(
    CASES,
    "mt_thawed_encoder_keeps_base_rate_of_zero",
    ("frozen_weights",),
    ("embed", "up", "norm"),
    onset=20,
    source="https://pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.LambdaLR.html it multiplies the initial rate, here 0",
    proof=every(
        unchanged("embed.weight", "up.weight", first=20), lambda plain: f"the head has {_positive(plain.steps['head.weight'])}"
    ),
)
def _(seed: int) -> Setup:
    # The encoder is frozen at first and its group has rate 0; thawed at update 20, its rate is 0 times whatever the schedule says.
    model, data = Tower(), Topics(seed)
    encoder = [*model.embed.parameters(), *model.up.parameters(), *model.norm.parameters()]
    for p in encoder:
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW([{"params": encoder, "lr": 0.0}, {"params": [*model.head.parameters()]}], lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda i: float(i >= 20), lambda i: 1.0])

    def train() -> Iterator[Event]:
        for i in range(45):
            if i == 20:
                for p in encoder:
                    p.requires_grad_(True)
            optimizer.zero_grad()
            value = classify(model, data)(i)
            value.backward()
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]
            schedule.step()

    return Setup(model, train)


@sick(
    CASES,
    "mt_lm_norms_in_bfloat16",
    ("frozen_weights",),
    ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"),
    source="https://github.com/pytorch/ao/pull/1124 bf16 weights: a step smaller than about 1e-3 of the weight is rounded away",
    proof=every(
        unchanged(
            "blocks.0.norm1.weight", "blocks.0.norm2.weight", "blocks.1.norm1.weight", "blocks.1.norm2.weight", "norm.weight"
        ),
        lambda plain: f"steps of the rest: {_positive(plain.steps['blocks.0.qkv.weight'])}",
        converges(0.95),
    ),
)
def _(seed: int) -> Setup:
    model = LM().bfloat16()
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), 1e-3), 40)


@sick(
    CASES,
    "mt_tagger_sgd_with_the_rate_of_adam",
    ("update_ratio_too_small",),
    also=("loss_plateau",),
    source="https://arxiv.org/abs/1810.04805 fine-tuning rates near 2e-5 are those of Adam; here SGD gets it, from scratch",
    proof=every(update_ratio(below=1e-5), loss_stays(0.03), finite),
)
def _(seed: int) -> Setup:
    model = Tagger()
    return fit(model, classify(model, Tags(seed)), torch.optim.SGD(model.parameters(), 2e-5), 50)


@sick(
    CASES,
    "mt_texts_and_labels_in_other_orders",
    ("loss_plateau",),
    source="https://arxiv.org/abs/1611.03530 labels at random, here fresh ones, so that there is nothing to learn",
    proof=every(loss_stays(0.06, last=100), lambda plain: _level(plain, math.log(4)), finite),
)
def _(seed: int) -> Setup:
    model, data = Tower(), Topics(seed)

    def loss(i: int) -> Tensor:
        x, y = data()  # the texts are shuffled, the labels aren't
        return F.cross_entropy(model(x[torch.randperm(len(x), generator=data.generator)]), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 2e-3), 140)


def _level(plain: Plain, level: float) -> str:
    middle = median(plain.losses[20:])
    assert abs(middle - level) < 0.05 * level, f"the loss stays at {middle:.4g}"
    return f"the loss stays at {middle:.4g}, chance is {level:.4g}"


class Unit(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().sum(-1, keepdim=True).sqrt() + 1e-6)


class Retriever(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unit, self.mix, self.head = nn.Embedding(50, 24), Unit(), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        words = self.embed(x) * (x != 0)[..., None]
        return self.head(F.gelu(self.mix(self.unit(words).sum(1))))


@sick(
    CASES,
    "mt_scaler_halves_at_every_padded_word",
    ("loss_scale_collapse", "non_finite_gradient"),
    source="https://github.com/NVIDIA/apex/issues/834 the loss scale falls to 0, for the gradient is NaN at any scale",
    proof=lambda plain: _skips(plain, 20),
)
def _(seed: int) -> Setup:
    model, data = Retriever(), Topics(seed)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 2e-3), torch.amp.GradScaler("cpu")

    def train() -> Iterator[Event]:
        for _ in range(30):
            x, y = data()
            x[:, 8:] *= (torch.rand(len(x), 4, generator=data.generator) > 0.5).long()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                value = F.cross_entropy(model(x).float(), y)
            scaler.scale(value).backward()
            yield "read", [value]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            yield "step", [optimizer] if scaler.get_scale() >= before else []

    return Setup(model, train)


def _skips(plain: Plain, updates: int) -> str:
    for i in range(updates):
        assert math.isfinite(plain.losses[i]), "a loss is not finite"
        assert all(math.isnan(s[i]) for s in plain.steps.values()), f"update {i} stepped"
        assert plain.nonfinite["embed.weight"][i] > 0, f"the gradient of update {i} is finite"
    return f"the first {updates} updates are skipped, their losses are finite, their gradients not: the scale is below 1 after 17"


class Listed(nn.Module):
    """Recurrent cells in a plain list, which nn.Module does not see."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, width), nn.Linear(width, 4)
        self.cells = [nn.GRUCell(width, width) for _ in range(2)]
        self.start = [c.weight_hh.detach().clone() for c in self.cells]

    def forward(self, x: Tensor) -> Tensor:
        h = list(self.embed(x).unbind(1))
        for cell in self.cells:
            state = torch.zeros_like(h[0])
            for t, value in enumerate(h):
                state = cell(value, state)
                h[t] = state
        return self.head(torch.stack(h, 1))


@sick(
    CASES,
    "mt_tagger_cells_in_a_plain_list",
    ("not_in_optimizer",),
    source="https://pytorch.org/docs/stable/generated/torch.nn.ModuleList.html modules in a plain list are not registered",
    proof=every(lambda plain: _unseen(plain), finite),
)
def _(seed: int) -> Setup:
    model = Listed()
    return fit(model, classify(model, Tags(seed)), torch.optim.Adam(model.parameters(), 5e-3), 40)


def _unseen(plain: Plain) -> str:
    model = plain.setup.model
    assert isinstance(model, Listed)
    for cell, start in zip(model.cells, model.start, strict=True):
        grad = cell.weight_hh.grad
        assert grad is not None and grad.norm() > 0, "a cell has no gradient"  # noqa: PT018
        assert torch.equal(cell.weight_hh, start), "a cell moves"
    assert not any("cells" in n for n in plain.grads), "the cells are registered"
    return "the cells have gradients, are in no optimizer and stay bit for bit the same"


# ------------------------------------------------------------------------------------------------------------- healthy


@healthy(
    CASES,
    "mt_lora_on_a_frozen_base",
    source="https://arxiv.org/abs/2106.09685 LoRA: B starts at zero, so that A has no gradient in the first update",
    proof=every(zero_gradient("blocks.0.qkv.a.weight", last=1), no_gradient("blocks.0.up.weight"), converges(0.8)),
)
def _(seed: int) -> Setup:
    model = adapt(pretrained(seed))
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 5e-3), 80)


@healthy(
    CASES,
    "mt_lm_warmup_and_warm_restarts",
    source="https://arxiv.org/abs/1608.03983 SGDR: the rate jumps back up at every restart; warm-up from 0 before",
    proof=converges(0.8),
)
def _(seed: int) -> Setup:
    model, data = LM(), Text(seed)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, 4e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: i / 10 if i < 10 else 0.525 + 0.475 * math.cos(math.pi * ((i - 10) % 40) / 40)
    )

    def train() -> Iterator[Event]:
        for i in range(130):
            optimizer.zero_grad(set_to_none=True)
            value = classify(model, data)(i)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]
            schedule.step()

    return Setup(model, train)


class Experts(nn.Module):
    """Every text goes to one of the experts."""

    def __init__(self, experts: int = 4, width: int = 24) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(50, width), nn.LayerNorm(width)
        self.router, self.head = nn.Linear(width, experts), nn.Linear(width, 4)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(width, 48), nn.ReLU(), nn.Linear(48, width)) for _ in range(experts)])
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x).mean(1))
        odds = self.router(h).softmax(-1)
        best, chosen = odds.max(-1)
        share = F.one_hot(chosen, len(self.experts)).float().mean(0)
        self.balance = len(self.experts) * (share * odds.mean(0)).sum()
        out = h
        for k, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == k)
            if len(rows):
                out = out.index_add(0, rows, best[rows, None] * expert(h[rows]))
        return self.head(out)


@healthy(
    CASES,
    "mt_switch_experts_without_a_text",
    source="https://arxiv.org/abs/2101.03961 Switch: one expert each; in a batch of 8 some expert has none, and no gradient",
    proof=every(converges(0.6), lambda plain: _take_turns(plain)),
)
def _(seed: int) -> Setup:
    model, data = Experts(), Topics(seed, batch=8)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y) + 0.2 * model.balance

    return fit(model, loss, torch.optim.Adam(model.parameters(), 4e-3), 250)


def _take_turns(plain: Plain) -> str:
    """Every expert has updates without a gradient, and many with one."""
    idle = [sum(math.isnan(n) or n == 0 for n in plain.grads[f"experts.{k}.0.weight"]) for k in range(4)]
    assert max(idle) > 0, "no expert ever rests"
    assert max(idle) < 0.8 * len(plain.losses), f"updates without a gradient are {idle}"
    return f"the experts have no gradient in {idle} of {len(plain.losses)} updates"


@healthy(
    CASES,
    "mt_scaler_looks_for_its_scale",
    source="https://pytorch.org/docs/stable/notes/amp_examples.html the first updates are skipped until the scale fits",
    proof=every(lambda plain: _searched(plain), lambda plain: _learned(plain, 0.5)),
)
def _(seed: int) -> Setup:
    model, data = Tower(), Topics(seed)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 4e-3), torch.amp.GradScaler("cpu", init_scale=2.0**20)

    def train() -> Iterator[Event]:
        for _ in range(120):
            x, y = data()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                value = F.cross_entropy(model(x), y)
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            yield "read", [value]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            yield "step", [optimizer] if scaler.get_scale() >= before else []

    return Setup(model, train)


def _searched(plain: Plain) -> str:
    skipped = [i for i, s in enumerate(plain.steps["head.weight"]) if math.isnan(s)]
    assert 0 < len(skipped) < 8, f"skipped are {skipped}"
    assert max(skipped) < 8, f"skipped are {skipped}"
    return f"skipped are the updates {skipped}"


def _learned(plain: Plain, to: float) -> str:
    a, b = median(plain.losses[:10]), median(plain.losses[-10:])
    assert b < to * a, f"the loss goes from {a:.3g} to {b:.3g}"
    return f"the loss falls from {a:.3g} to {b:.3g}"


@healthy(
    CASES,
    "mt_classifier_thawed_layer_by_layer",
    source="https://arxiv.org/abs/1801.06146 ULMFiT: gradual unfreezing from the last layer on, with smaller rates below",
    proof=every(no_gradient("embed.weight", last=60), converges(0.6), lambda plain: _moves_after(plain, "embed.weight", 60)),
)
def _(seed: int) -> Setup:
    model, data = Tower(), Topics(seed)
    for part in (model.embed, model.norm, model.up):
        part.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.head.parameters(), 4e-3)

    def train() -> Iterator[Event]:
        for i in range(160):
            if i in (30, 60):
                parts: list[nn.Module] = [model.up] if i == 30 else [model.norm, model.embed]
                for part in parts:
                    part.requires_grad_(True)
                optimizer.add_param_group({"params": [p for m in parts for p in m.parameters()], "lr": 3e-3 if i == 30 else 2e-3})
            optimizer.zero_grad()
            value = classify(model, data)(i)
            value.backward()
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


def _moves_after(plain: Plain, parameter: str, update: int) -> str:
    assert all(s > 0 for s in plain.steps[parameter][update:]), f"{parameter} doesn't move"
    return f"{parameter} moves from update {update} on"


class Reader(nn.Module):
    """An encoder with padding, and a class token in front."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(50, width, padding_idx=0), nn.Parameter(0.02 * torch.randn(width))
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.first.expand(len(x), 1, -1), self.embed(x)], 1)
        empty = F.pad(x == 0, (1, 0), value=False)
        mask = torch.zeros(empty.shape).masked_fill(empty, -math.inf)
        return self.head(self.encoder(h, src_key_padding_mask=mask)[:, 0])


@healthy(
    CASES,
    "mt_reader_with_padding_masked_by_inf",
    source="https://arxiv.org/abs/1706.03762 the scores of what must not be seen are -inf before the softmax",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model, data = Reader(), Topics(seed, batch=24)

    def loss(i: int) -> Tensor:
        x, y = data()
        lengths = torch.randint(4, 13, (24, 1), generator=data.generator)
        return F.cross_entropy(model(x * (torch.arange(12) < lengths)), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), 2e-3), 120)


@healthy(
    CASES,
    "mt_lstm_truncated_backpropagation",
    source="https://github.com/pytorch/examples/tree/main/word_language_model the state is carried on and detached; SGD of rate 1 and clipping",
    proof=converges(0.85),
)
def _(seed: int) -> Setup:
    model = nn.ModuleDict({"embed": nn.Embedding(24, 32), "rnn": nn.LSTM(32, 48, 2, batch_first=True), "head": nn.Linear(48, 24)})
    data = Text(seed, batch=8, length=12 * 10)
    optimizer = torch.optim.SGD(model.parameters(), 2.0)

    def train() -> Iterator[Event]:
        for _epoch in range(20):
            x, y = data()
            state = None
            for a, b in zip(x.split(10, 1), y.split(10, 1), strict=True):
                if state is not None:
                    state = tuple(s.detach() for s in state)
                optimizer.zero_grad()
                out, state = model["rnn"](model["embed"](a), state)
                value = F.cross_entropy(model["head"](out).flatten(0, 1), b.flatten())
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                yield "read", [value]
                optimizer.step()
                yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "mt_dpo_with_a_frozen_reference",
    source="https://arxiv.org/abs/2305.18290 DPO: a small rate, a frozen copy beside, and a loss that starts at log 2",
    proof=every(no_gradient("reference.tok.weight"), converges(0.5)),
)
def _(seed: int) -> Setup:
    policy, reference = pretrained(seed), LM()
    reference.load_state_dict(policy.state_dict())
    reference.requires_grad_(False).eval()
    data, other = Text(seed), Text(seed + 7)

    def loss(i: int) -> Tensor:
        (x, y), (u, v) = data(), other()
        margins = []
        for model in (policy, reference):
            good = -F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").sum(1)
            bad = -F.cross_entropy(model(u).transpose(1, 2), v, reduction="none").sum(1)
            margins.append(good - bad)
        return -F.logsigmoid(0.2 * (margins[0] - margins[1])).mean()

    inner = fit(policy, loss, torch.optim.AdamW(policy.parameters(), 3e-4, weight_decay=0.0), 60)
    return Setup({"policy": policy, "reference": reference}, inner.train)


class Ratings(nn.Module):
    def __init__(self, users: int = 60, items: int = 40, width: int = 8) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, width, sparse=True), nn.Embedding(items, width, sparse=True)
        self.mlp = nn.Sequential(nn.Linear(2 * width, 32), nn.ReLU(), nn.Linear(32, 1))
        for e in (self.user, self.item):
            nn.init.normal_(e.weight, std=0.1)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        a, b = self.user(u), self.item(v)
        return (a * b).sum(-1) + self.mlp(torch.cat([a, b], -1))[:, 0]


@healthy(
    CASES,
    "mt_recommender_with_sparse_rows",
    source="https://pytorch.org/docs/stable/generated/torch.optim.SparseAdam.html two optimizers; most rows have no gradient in an update",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model, generator = Ratings(), torch.Generator().manual_seed(40 + seed)
    a, b = torch.randn(60, 2, generator=generator), torch.randn(40, 2, generator=generator)
    rows = torch.optim.SparseAdam([model.user.weight, model.item.weight], 0.03)
    dense = torch.optim.Adam(model.mlp.parameters(), 3e-3)

    def train() -> Iterator[Event]:
        for _ in range(200):
            u, v = torch.randint(60, (64,), generator=generator), torch.randint(40, (64,), generator=generator)
            y = (a[u] * b[v]).sum(-1) / math.sqrt(2) + 0.1 * torch.randn(64, generator=generator)
            rows.zero_grad()
            dense.zero_grad()
            value = F.mse_loss(model(u, v), y)
            value.backward()
            yield "read", [value]
            rows.step()
            dense.step()
            yield "step", [rows, dense]

    return Setup(model, train)


@healthy(
    CASES,
    "mt_table_batch_norm_and_accumulation",
    source="https://arxiv.org/abs/2106.11959 nets for tables; four backward passes an update; biases before BatchNorm",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    layers = [nn.Linear(16, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 48), nn.BatchNorm1d(48), nn.ReLU()]
    model, data = nn.Sequential(*layers, nn.Linear(48, 4)), Blobs(seed, batch=16)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)

    def train() -> Iterator[Event]:
        for i in range(100):
            values = []
            for _ in range(4):
                value = classify(model, data)(i) / 4
                value.backward()
                values.append(value)
            yield "read", values
            optimizer.step()
            optimizer.zero_grad()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "mt_retrieval_with_a_momentum_encoder",
    source="https://arxiv.org/abs/1911.05722 MoCo: the encoder of the keys has no gradient and follows as a moving average",
    proof=every(no_gradient("key.embed.weight"), converges(0.8)),
)
def _(seed: int) -> Setup:
    query, key, data = Tower(outputs=16), Tower(outputs=16), Topics(seed, classes=12)
    key.load_state_dict(query.state_dict())
    key.requires_grad_(False)
    optimizer = torch.optim.AdamW(query.parameters(), 3e-3)

    def train() -> Iterator[Event]:
        for _ in range(200):
            x, _y = data()
            # Two halves of a text belong together.
            q, k = F.normalize(query(x[:, :6]), dim=-1), F.normalize(key(x[:, 6:]), dim=-1)
            value = F.cross_entropy(q @ k.T / 0.2, torch.arange(len(x)))
            optimizer.zero_grad()
            value.backward()
            yield "read", [value]
            optimizer.step()
            with torch.no_grad():
                for p, e in zip(query.parameters(), key.parameters(), strict=True):
                    e.lerp_(p, 0.05)
            yield "step", [optimizer]

    return Setup({"query": query, "key": key}, train)


@healthy(
    CASES,
    "mt_forecaster_resumed_amid_outliers",
    source="https://pytorch.org/tutorials/beginner/saving_loading_models.html model and optimizer are loaded; Huber loss",
    proof=converges(0.55),
)
def _(seed: int) -> Setup:
    model, data = Forecaster(), Series(seed)

    def train() -> Iterator[Event]:
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for i in range(160):
            if i == 80:
                weights = {k: v.clone() for k, v in model.state_dict().items()}
                states = optimizer.state_dict()
                optimizer = torch.optim.Adam(model.parameters(), 5e-3)
                model.load_state_dict(weights)
                optimizer.load_state_dict(states)
            x, y = data()
            y = torch.where(torch.rand(y.shape, generator=data.generator) < 0.01, 8 * y, y)
            optimizer.zero_grad()
            value = F.huber_loss(model(x), y, delta=0.5)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)
