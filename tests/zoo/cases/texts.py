"""Runs on sequences, text and users: recurrent nets, transformers, adapters, experts, CTC, recommenders."""

# mypy: disable-error-code="no-any-return,no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class Docs:
    """Documents of some classes: every class has favourite tokens; token 0 is padding and does not occur."""

    def __init__(self, seed: int, classes: int = 4, vocabulary: int = 40, batch: int = 32, length: int = 12) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.table = torch.softmax(1.5 * torch.randn(classes, vocabulary - 1, generator=self.generator), -1)
        self.batch, self.length = batch, length

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(len(self.table), (self.batch,), generator=self.generator)
        return 1 + torch.multinomial(self.table[y], self.length, replacement=True, generator=self.generator), y


class Attention(nn.Module):
    """Causal or full self-attention of some heads, with a mask of -inf."""

    def __init__(self, width: int, heads: int = 2, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(d / self.heads)
        if self.causal:
            scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, causal: bool = True, act: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 2 * width), act(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class LM(nn.Module):
    """A small causal language model; where `classes` are given, a classifier of the mean."""

    def __init__(
        self, vocabulary: int = 24, width: int = 32, depth: int = 2, classes: int = 0, act: Callable[[], nn.Module] = nn.GELU
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(32, width))
        nn.init.normal_(self.embed.weight, std=0.1)
        self.blocks = nn.ModuleList(Block(width, not classes, act) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes or vocabulary)
        self.pooled = bool(classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.pooled else x)


def adam(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)


def loss_is_infinite(update: int) -> Proof:
    """The loss is not finite at an update."""

    def proof(plain: Plain) -> str:
        assert not math.isfinite(plain.losses[update]), f"the loss is {plain.losses[update]}"
        return f"the loss of update {update} is {plain.losses[update]}"

    return proof


def loss_between(update: int, low: float, high: float = math.inf) -> Proof:
    """The loss of an update lies between two numbers."""

    def proof(plain: Plain) -> str:
        assert low < plain.losses[update] < high, f"the loss of update {update} is {plain.losses[update]:.3g}"
        return f"the loss of update {update} is {plain.losses[update]:.3g}"

    return proof


def loss_jumps(update: int, factor: float) -> Proof:
    """The loss of an update is more than `factor` times the median of the ten before it."""

    def proof(plain: Plain) -> str:
        ratio = plain.losses[update] / median(plain.losses[update - 10 : update])
        assert ratio > factor, f"the loss of update {update} is {ratio:.3g} times the median before it, not {factor:g}"
        return f"the loss of update {update} is {ratio:.3g} times the median before it"

    return proof


def saturated(module: str, least: float, last: int) -> Proof:
    """The root mean square of a tanh's output is above `least` in every update before `last`."""

    def proof(plain: Plain) -> str:
        rms = min(o.rms for o in plain.outputs[module][:last] if o is not None)
        assert rms > least, f"the outputs of {module} have the rms {rms:.3g}"
        return f"the outputs of {module} have an rms of {rms:.3g} or more"

    return proof


def never_stepped(*parameters: str) -> Proof:
    """Parameters that have gradients and are in the model, but that no step changes; some other does change."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert all(n > 0 for n in plain.grads[name]), f"{name} has no gradient"
            assert not any(plain.steps[name]), f"{name} moves"
        assert any(s > 0 for steps in plain.steps.values() for s in steps), "nothing moves"
        return f"{', '.join(parameters)}: gradients, and no step"

    return proof


# --- sick ---------------------------------------------------------------------------------------------------------------------


class DeepConv(nn.Module):
    """A temporal CNN over tokens without normalisation or shortcuts."""

    def __init__(self, depth: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.body = nn.Sequential(*(m for _ in range(depth) for m in (nn.Conv1d(24, 24, 3, padding=1), act())))
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x).transpose(1, 2)).mean(-1))


@sick(
    CASES,
    "hx_temporal_cnn_of_sigmoids",
    ("vanishing_gradient",),
    ("embed", "body"),
    source="https://proceedings.mlr.press/v9/glorot10a.html sigmoids in deep plain networks",
    proof=every(
        gradient_ratio("body.0.weight", "head.weight", 1e-4, 0, 15), gradient_ratio("embed.weight", "head.weight", 1e-4, 0, 15)
    ),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model = DeepConv(9, nn.Sigmoid)
    return fit(model, classify(model, Docs(seed)), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 50)


class GradMultiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grads[0] * ctx.scale, None


class Multiplied(LM):
    """Meant to damp the gradient at every block, it divides by the damping factor."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(GradMultiply.apply(x, 1 / 0.1))
        return self.head(self.norm(x))


@sick(
    CASES,
    "hx_gradient_multiplied_at_every_block",
    ("exploding_gradient",),
    ("embed", "blocks", ""),
    source="https://github.com/facebookresearch/fairseq/blob/main/fairseq/modules/grad_multiply.py with the inverse factor",
    proof=every(
        gradient_ratio("head.weight", "embed.weight", 1e-4, 0, 15),
        gradient_ratio("blocks.5.ffn.0.weight", "blocks.0.ffn.0.weight", 1e-3, 0, 15),
    ),
)
def _(seed: int) -> Setup:
    model = Multiplied(depth=6)
    return fit(model, classify(model, Text(seed)), adam(model, 1e-3), 40)


class Factors(nn.Module):
    """Matrix factorisation with biases."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(60, 8, sparse=sparse), nn.Embedding(50, 8, sparse=sparse)
        self.bias = nn.Embedding(50, 1, sparse=sparse)
        for e in (self.users, self.items, self.bias):
            nn.init.normal_(e.weight, std=0.3)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return (self.users(user) * self.items(item)).sum(-1) + self.bias(item)[:, 0]


class Ratings:
    """Standardised ratings of a world of rank 4; popular users and items come more often."""

    def __init__(self, seed: int, batch: int = 64) -> None:
        self.generator = torch.Generator().manual_seed(6000 + seed)
        self.users = torch.randn(60, 4, generator=self.generator) / 2
        self.items = torch.randn(50, 4, generator=self.generator)
        self.batch = batch

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        u = (60 * torch.rand(self.batch, generator=self.generator) ** 1.5).long()
        i = (50 * torch.rand(self.batch, generator=self.generator) ** 1.5).long()
        noise = 0.2 * torch.randn(self.batch, generator=self.generator)
        return u, i, (self.users[u] * self.items[i]).sum(-1) + noise


@sick(
    CASES,
    "hx_one_rating_in_another_unit",
    ("gradient_spike",),
    source="https://arxiv.org/abs/1708.05031 ratings of a recommender; one entry of 1000 among standardised ones",
    proof=gradient_spikes(30, 30),
    onset=30,
    also=("loss_spike",),
)
def _(seed: int) -> Setup:
    model, data = Factors(), Ratings(seed)

    def loss(i: int) -> Tensor:
        user, item, rating = data()
        if i == 30:
            rating[7] = 1000.0
        return F.mse_loss(model(user, item), rating)

    return fit(model, loss, adam(model, 0.05), 50)


class Pool(nn.Module):
    """The mean of the tokens that are no padding."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.pool, self.head = (
            nn.Embedding(40, 16, padding_idx=0),
            nn.GRU(16, 24, batch_first=True),
            Pool(),
            nn.Linear(24, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.rnn(self.embed(x))[0], (x != 0).float()))


@sick(
    CASES,
    "hx_empty_document_in_masked_mean",
    ("non_finite_activation",),
    ("pool",),
    source="https://github.com/HabanaAI/vllm-fork/pull/318 an empty mask makes 0 divided by 0; here in a masked mean",
    proof=every(first_non_finite(20, "pool"), first_non_finite(20)),
    onset=20,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int) -> Setup:
    model, data = Bag(), Docs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 20:
            x[3] = 0
        return F.cross_entropy(model(x), y)

    return fit(model, loss, adam(model, 3e-3), 36)


class Speech:
    """Frames that show their letter, three frames a letter, and the letters (1 to 6; 0 is the blank)."""

    def __init__(self, seed: int, batch: int = 8, letters: int = 5) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.codes = torch.randn(7, 12, generator=self.generator)
        self.batch, self.letters = batch, letters

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(1, 7, (self.batch, self.letters), generator=self.generator)
        x = self.codes[y.repeat_interleave(3, 1)]
        return x + 0.3 * torch.randn(x.shape, generator=self.generator), y


class Recogniser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(12, 24, batch_first=True, bidirectional=True), nn.Linear(48, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0]).log_softmax(-1).transpose(0, 1)


@sick(
    CASES,
    "hx_ctc_target_longer_than_input",
    ("non_finite_loss",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CTCLoss.html zero_infinity: inputs too short for the targets",
    proof=every(first_non_finite(18), loss_is_infinite(18)),
    onset=18,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
)
def _(seed: int) -> Setup:
    model, data = Recogniser(), Speech(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        lengths = torch.full((8,), 15)
        if i == 18:
            lengths[2] = 3  # A recording cut off by the segmenter.
        return F.ctc_loss(model(x), y, lengths, torch.full((8,), 5))

    return fit(model, loss, adam(model, 5e-3), 34)


class Towers(nn.Module):
    """Users by what they have seen, items by name; the score is a cosine."""

    def __init__(self) -> None:
        super().__init__()
        self.history, self.project = nn.EmbeddingBag(41, 16, mode="mean", padding_idx=0), nn.Linear(16, 16, bias=False)
        self.items = nn.Embedding(4, 16)

    def forward(self, seen: Tensor) -> Tensor:
        user = self.project(self.history(seen))
        user = user / (user.square().sum(-1, keepdim=True).sqrt() + 1e-8)
        return 8 * user @ F.normalize(self.items.weight, dim=-1).T


def _nan_gradient(update: int, inside: tuple[str, ...], outside: tuple[str, ...]) -> Proof:
    def proof(plain: Plain) -> str:
        assert math.isfinite(plain.losses[update]), "the loss is not finite"
        assert any(plain.nonfinite[n][update] for n in inside), "the gradient is finite"
        assert not any(plain.nonfinite[n][update] for n in outside), "other gradients are not finite either"
        return f"at update {update} the loss is finite, the gradient of {', '.join(inside)} is not"

    return proof


@sick(
    CASES,
    "hx_cold_user_and_a_root_of_zero",
    ("non_finite_gradient",),
    ("project", "history"),
    source="https://docs.pytorch.org/docs/stable/notes/autograd.html the root at 0 has an infinite derivative: 0 * inf",
    proof=every(first_non_finite(22), _nan_gradient(22, ("project.weight",), ("items.weight",))),
    onset=22,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
)
def _(seed: int) -> Setup:
    model, data = Towers(), Docs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 22:
            x[5] = 0  # A user who has seen nothing yet.
        return F.cross_entropy(model(x), y)

    return fit(model, loss, adam(model, 5e-3), 38)


@sick(
    CASES,
    "hx_feed_forward_biases_of_minus_eight",
    ("dead_units",),
    ("blocks.1.ffn",),
    source="https://arxiv.org/abs/1903.06733 dying ReLU; the bias meant for the head was written into a feed-forward layer",
    proof=every(dead_fraction("blocks.1.ffn.1", 0.95, 0, 15), zero_gradient("blocks.1.ffn.0.weight", last=15)),
    also=("zero_gradient", "vanishing_gradient"),
)
def _(seed: int) -> Setup:
    model = LM(vocabulary=40, classes=4, act=nn.ReLU)
    nn.init.constant_(model.get_parameter("blocks.1.ffn.0.bias"), -8.0)
    return fit(model, classify(model, Docs(seed)), adam(model, 2e-3), 40)


class Net(nn.Module):
    """A recurrent text classifier: an embedding, a recurrent net, an activated hidden layer and a head."""

    def __init__(self, rnn: type[nn.GRU] | type[nn.LSTM] = nn.GRU, gain: float = 1.0) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(40, 16), rnn(16, 24, batch_first=True)
        self.hidden, self.act, self.head = nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.hidden(self.gain * self.rnn(self.embed(x))[0].mean(1))))


@sick(
    CASES,
    "hx_pooled_states_in_percent",
    ("saturated_activation",),
    ("act", "hidden"),
    source="https://proceedings.mlr.press/v9/glorot10a.html saturated tanh; the pooled state is given in percent",
    proof=saturated("act", 0.9, 15),
    also=("vanishing_gradient", "poor_init"),
)
def _(seed: int) -> Setup:
    model = Net(gain=100.0)
    return fit(model, classify(model, Docs(seed)), adam(model, 3e-3), 40)


class Seq2Seq(nn.Module):
    """Copies a sequence backwards: a GRU encoder, a GRU decoder with attention."""

    def __init__(self, detach: bool = False) -> None:
        super().__init__()
        self.source, self.encoder = nn.Embedding(12, 24), nn.GRU(24, 32, batch_first=True)
        self.target, self.decoder = nn.Embedding(12, 24), nn.GRU(24, 32, batch_first=True)
        self.head, self.detach = nn.Linear(64, 12), detach

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, state = self.encoder(self.source(source))
        if self.detach:
            memory, state = memory.detach(), state.detach()
        out, _ = self.decoder(self.target(target), state)
        weights = (out @ memory.transpose(1, 2) / math.sqrt(32)).softmax(-1)
        return self.head(torch.cat((out, weights @ memory), -1))


def backwards(seed: int, model: nn.Module, batch: int = 32, **options: float) -> Callable[[int], Tensor]:
    """The loss of a model that says a sequence of six letters backwards; token 0 begins."""
    generator = torch.Generator().manual_seed(8000 + seed)

    def loss(i: int) -> Tensor:
        x = torch.randint(1, 12, (batch, 6), generator=generator)
        y = x.flip(1)
        fed = torch.cat((torch.zeros(batch, 1, dtype=torch.long), y[:, :-1]), 1)
        return F.cross_entropy(model(x, fed).flatten(0, 1), y.flatten(), **options)  # type: ignore[arg-type]

    return loss


@sick(
    CASES,
    "hx_encoder_states_detached",
    ("missing_gradient",),
    ("source", "encoder"),
    source="https://docs.pytorch.org/tutorials/intermediate/seq2seq_translation_tutorial.html with detach on the encoder's states",
    proof=no_gradient("source.weight", "encoder.weight_ih_l0", "encoder.weight_hh_l0"),
)
def _(seed: int) -> Setup:
    model = Seq2Seq(detach=True)
    return fit(model, backwards(seed, model), adam(model, 5e-3), 50)


class LoRA(nn.Module):
    """A frozen Linear and a trained correction of low rank."""

    def __init__(self, base: nn.Linear, rank: int = 4, both_zero: bool = False) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.B.weight)
        if both_zero:
            nn.init.zeros_(self.A.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.B(self.A(x))


def adapted(both_zero: bool, classes: int = 4) -> LM:
    """A frozen classifier with LoRA at the first layer of every feed-forward block, norm and head trained."""
    model = LM(vocabulary=40, classes=classes).requires_grad_(False)
    nn.init.normal_(model.embed.weight, std=0.7)
    for block in model.blocks:
        ffn = block.get_submodule("ffn")
        assert isinstance(ffn, nn.Sequential)
        first = ffn[0]
        assert isinstance(first, nn.Linear)
        ffn[0] = LoRA(first, both_zero=both_zero)
    model.norm.requires_grad_(True)
    model.head.requires_grad_(True)
    return model


@sick(
    CASES,
    "hx_lora_with_both_factors_zero",
    ("zero_gradient",),
    ("blocks.0.ffn.0", "blocks.1.ffn.0"),
    source="https://arxiv.org/abs/2106.09685 one factor is random there; here both are zero",
    proof=zero_gradient(*(f"blocks.{i}.ffn.0.{f}.weight" for i in (0, 1) for f in "AB")),
    also=("vanishing_gradient",),
)
def _(seed: int) -> Setup:
    model = adapted(both_zero=True)
    return fit(model, classify(model, Docs(seed)), adam(model, 5e-3), 40)


@sick(
    CASES,
    "hx_embedding_enlarged_after_the_optimizer",
    ("not_in_optimizer",),
    ("embed",),
    source="https://github.com/huggingface/transformers/pull/3532 embeddings resized after the optimizer was made",
    proof=never_stepped("embed.weight"),
)
def _(seed: int) -> Setup:
    model = Net(nn.LSTM)
    model.embed = nn.Embedding(36, 16)
    optimizer = adam(model, 5e-3)
    model.embed = nn.Embedding(40, 16)  # Four tokens were added to the vocabulary.
    return fit(model, classify(model, Docs(seed)), optimizer, 40)


@sick(
    CASES,
    "hx_encoder_lr_becomes_zero",
    ("frozen_weights",),
    ("embed", "blocks", ""),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.LambdaLR.html an integer division ends at 0",
    proof=every(
        unchanged("embed.weight", "blocks.0.ffn.0.weight", "blocks.1.attention.qkv.weight", "position", first=20),
        lambda plain: f"before, embed.weight moves by {min(plain.steps['embed.weight'][:20]):.2g} or more, the head to the end",
    ),
    onset=20,
)
def _(seed: int) -> Setup:
    model = LM(vocabulary=40, classes=4)
    head = [*model.norm.parameters(), *model.head.parameters()]
    body = [p for p in model.parameters() if all(p is not q for q in head)]
    optimizer = torch.optim.Adam([{"params": body, "lr": 3e-4}, {"params": head, "lr": 1e-3}])

    def before(i: int) -> None:
        optimizer.param_groups[0]["lr"] = 3e-4 * ((39 - i) // 20)  # 1, then 0; a decay in whole numbers.

    return fit(model, classify(model, Docs(seed)), optimizer, 40, before=before)


@sick(
    CASES,
    "hx_gru_adam_lr_of_one",
    ("update_ratio_too_large",),
    source="https://karpathy.github.io/neural-networks-3/ the ratio of updates to weights should be about 1e-3",
    proof=every(update_ratio(above=0.8, last=1), update_ratio(above=0.15, last=10)),
    also=("loss_diverging", "saturated_activation", "exploding_gradient", "gradient_spike", "vanishing_gradient", "loss_spike"),
)
def _(seed: int) -> Setup:
    model = Net()
    return fit(model, classify(model, Docs(seed)), adam(model, 1.0), 40)


@sick(
    CASES,
    "hx_language_model_lr_of_2e_7",
    ("update_ratio_too_small",),
    source="https://karpathy.github.io/neural-networks-3/ the ratio of updates to weights should be about 1e-3",
    proof=every(update_ratio(below=1e-5, last=15), loss_stays(0.03)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model = LM()
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), lr=2e-7), 60)


class Forecast(nn.Module):
    """A temporal CNN that predicts the next value of a series."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(1, 16, 3), nn.ReLU(), nn.Conv1d(16, 16, 3, dilation=2), nn.ReLU())
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[:, None])[..., -1])[:, 0]


def waves(seed: int, batch: int = 32) -> Callable[[], tuple[Tensor, Tensor]]:
    """Sines of several phases and speeds with noise, and their next value."""
    generator = torch.Generator().manual_seed(9000 + seed)

    def draw() -> tuple[Tensor, Tensor]:
        t = torch.arange(13) * (0.4 + 0.3 * torch.rand(batch, 1, generator=generator))
        x = 1.4 * torch.sin(t + 6.28 * torch.rand(batch, 1, generator=generator))
        x = x + 0.1 * torch.randn(batch, 13, generator=generator)
        return x[:, :-1], x[:, -1]

    return draw


@sick(
    CASES,
    "hx_forecast_trained_uphill",
    ("loss_diverging",),
    source="https://docs.pytorch.org/docs/stable/optim.html maximize=True, switched on for one stage by a config",
    proof=every(loss_grows(10, first=25, last=36), loss_between(24, 0.0, 0.5)),
    onset=25,
    also=("exploding_gradient", "gradient_spike", "update_ratio_too_large", "loss_spike"),
)
def _(seed: int) -> Setup:
    model, data = Forecast(), waves(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def before(i: int) -> None:
        optimizer.param_groups[0]["maximize"] = i >= 24

    return fit(model, lambda i: F.mse_loss(model((b := data())[0]), b[1]), optimizer, 50, before=before)


@sick(
    CASES,
    "hx_one_batch_of_another_tokeniser",
    ("loss_spike",),
    source="https://arxiv.org/abs/2204.02311 loss spikes of PaLM, section 5.1; here one batch is of another vocabulary",
    proof=every(loss_jumps(60, 2.5), loss_between(63, 0, 1.6)),
    onset=60,
    also=("gradient_spike",),
)
def _(seed: int) -> Setup:
    model, data = LM(), Text(seed)
    data.table = torch.softmax(4 * torch.log(data.table), -1)  # Nearly sure of the next token.

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 60:
            x, y = (x * 7 + 3) % 24, (y * 7 + 3) % 24
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, adam(model, 3e-3), 80)


class Tied(LM):
    """The head is the embedding."""

    def __init__(self, std: float) -> None:
        super().__init__(width=64)
        self.head = nn.Linear(64, 24, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=std)


@sick(
    CASES,
    "hx_tied_embedding_of_unit_variance",
    ("poor_init",),
    ("embed", "head", ""),
    source="https://arxiv.org/abs/1608.05859 tied embeddings; nn.Embedding's own N(0, 1) makes logits of sqrt(width)",
    proof=loss_between(0, 2.5 * math.log(24)),
)
def _(seed: int) -> Setup:
    model = Tied(1.0)
    return fit(model, classify(model, Text(seed)), adam(model, 1e-3), 50)


class Softmaxed(nn.Module):
    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.bag, self.hidden = nn.EmbeddingBag(40, 24, mode="mean"), nn.Sequential(nn.Linear(24, 24), nn.ReLU())
        self.head, self.softmax = nn.Linear(24, 4), nn.Softmax(-1) if softmax else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.softmax(self.head(self.hidden(self.bag(x))))


def _sums_to_one(plain: Plain) -> str:
    floor = math.log(math.e + 3) - 1
    seen = [o for o in plain.outputs["softmax"] if o is not None]
    assert all(o.low >= 0 and o.high <= 1 for o in seen)
    assert min(plain.losses) > floor - 1e-6
    return f"cross_entropy gets numbers of 0 to 1, its least value is {min(plain.losses):.3g}, the floor {floor:.3g}"


@sick(
    CASES,
    "hx_embedding_bag_softmax_and_cross_entropy",
    ("double_softmax",),
    ("softmax",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html expects unnormalised logits",
    proof=_sums_to_one,
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model = Softmaxed(True)
    return fit(model, classify(model, Docs(seed)), adam(model, 5e-3), 60)


# --- healthy ------------------------------------------------------------------------------------------------------------------


def warm(optimizer: torch.optim.Optimizer, lr: float, updates: int) -> Callable[[int], None]:
    """The lr rises from 0 in so many updates."""

    def before(i: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, i / updates)

    return before


@healthy(
    CASES, "hx_lora_on_a_frozen_classifier", source="https://arxiv.org/abs/2106.09685 B is zero at first", proof=converges(0.5)
)
def _(seed: int) -> Setup:
    model = adapted(both_zero=False)
    return fit(model, classify(model, Docs(seed)), adam(model, 5e-3), 100)


@healthy(
    CASES,
    "hx_tied_language_model_warmed_up",
    source="https://arxiv.org/abs/1608.05859 tied embeddings; warm-up from lr 0, masks of -inf, clipping to 0.25",
    proof=converges(0.7),
)
def _(seed: int) -> Setup:
    model = Tied(0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)

    return fit(model, classify(model, Text(seed)), optimizer, 120, before=warm(optimizer, 3e-3, 20), between=clip)


@healthy(
    CASES,
    "hx_sparse_factors_with_rare_items",
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.SparseAdam.html sparse gradients of embeddings",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    model, data = Factors(sparse=True), Ratings(seed, batch=48)

    def loss(i: int) -> Tensor:
        user, item, rating = data()
        return F.mse_loss(model(user, item), rating)

    return fit(model, loss, torch.optim.SparseAdam(list(model.parameters()), lr=0.02), 250)


class Experts(nn.Module):
    """The best of six experts for every document, weighted by its probability, beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate = nn.EmbeddingBag(40, 24, mode="mean"), nn.Linear(24, 6)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24)) for _ in range(6))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 4)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(tokens)
        p = self.gate(x).softmax(-1)
        weight, best = p.max(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            chosen = (best == k).nonzero()[:, 0]
            if len(chosen):  # An expert that nobody chose is not called.
                out = out.index_add(0, chosen, weight[chosen, None] * expert(x[chosen]))
        share = F.one_hot(best, 6).float().mean(0)
        return self.head(self.norm(x + out)), 6 * (share * p.mean(0)).sum()


@healthy(
    CASES,
    "hx_switch_of_six_experts",
    source="https://arxiv.org/abs/2101.03961 top-1 routing with a balancing loss; some experts are idle in a batch",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model, data = Experts(), Docs(seed, batch=12)

    def loss(i: int) -> Tensor:
        x, y = data()
        logits, balance = model(x)
        return F.cross_entropy(logits, y) + 0.01 * balance

    return fit(model, loss, adam(model, 3e-3), 150)


@healthy(
    CASES,
    "hx_seq2seq_with_label_smoothing",
    source="https://arxiv.org/abs/1906.02629 smoothed labels: the loss has a floor; the norm is clipped to 0.1",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    model = Seq2Seq()

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    return fit(model, backwards(seed, model, label_smoothing=0.1), adam(model, 1e-2), 250, between=clip)


@healthy(
    CASES,
    "hx_ctc_recogniser",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CTCLoss.html blanks first, letters later",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    model, data = Recogniser(), Speech(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.ctc_loss(model(x), y, torch.full((8,), 15), torch.full((8,), 5))

    return fit(model, loss, adam(model, 1e-2), 120)


class ReZero(nn.Module):
    """Residual branches behind factors that are zero at first."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 32)
        self.branches = nn.ModuleList(
            m for _ in range(depth) for m in (Attention(32), nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)))
        )
        self.factors = nn.Parameter(torch.zeros(2 * depth))
        self.head = nn.Linear(32, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for branch, factor in zip(self.branches, self.factors, strict=True):
            x = x + factor * branch(x)
        return self.head(x)


@healthy(CASES, "hx_rezero_language_model", source="https://arxiv.org/abs/2003.04887 factors of zero", proof=converges(0.7))
def _(seed: int) -> Setup:
    model = ReZero(4)
    return fit(model, classify(model, Text(seed)), adam(model, 4e-3), 100)


class Tasks(nn.Module):
    """One GRU, a head for the class of a text and one for the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(40, 24, padding_idx=0), nn.GRU(24, 32, batch_first=True)
        self.topic, self.words = nn.Linear(32, 4), nn.Linear(32, 40)

    def forward(self, x: Tensor, words: bool) -> Tensor:
        h = self.rnn(self.embed(x))[0]
        return self.words(h[:, :-1]) if words else self.topic(h.mean(1))


@healthy(
    CASES,
    "hx_two_tasks_by_turns",
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.zero_grad.html None for the head whose turn it is not",
    proof=converges(0.85),
)
def _(seed: int) -> Setup:
    model, data = Tasks(), Docs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        x[::4, 8:] = 0
        if i % 2:
            return F.cross_entropy(model(x, True).flatten(0, 1), x[:, 1:].flatten(), ignore_index=0)
        return F.cross_entropy(model(x, False), y)

    return fit(model, loss, adam(model, 5e-3), 200)


class Masked(nn.Module):
    """A masked language model; the pooler's query is there for later tasks and not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 32)
        self.mask, self.query = nn.Parameter(0.1 * torch.randn(32)), nn.Parameter(torch.randn(32))
        self.position = nn.Parameter(0.1 * torch.randn(17, 32))
        layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True, norm_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 24)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        e = torch.where(hidden[..., None], self.mask, self.embed(x)) + self.position[: x.shape[1]]
        return self.head(self.encoder(e))


@healthy(
    CASES,
    "hx_masked_language_model",
    source="https://arxiv.org/abs/1810.04805 15 % of the tokens are masked; some batches mask none",
    proof=converges(0.75),
)
def _(seed: int) -> Setup:
    model, data = Masked(), Text(seed, batch=32)
    data.table = torch.softmax(3 * torch.log(data.table), -1)
    generator = torch.Generator().manual_seed(seed)

    def loss(i: int) -> Tensor:
        x, _ = data()
        asked = torch.rand(x.shape, generator=generator) < 0.15
        hidden = asked if i % 5 else torch.zeros_like(asked)  # Every fifth batch shows the asked tokens, as BERT does at times.
        return F.cross_entropy(model(x, hidden)[asked], x[asked])

    return fit(model, loss, adam(model, 3e-3), 200)


@healthy(
    CASES,
    "hx_lstm_that_remembers_the_first_token",
    source="https://arxiv.org/abs/1804.11188 chrono initialisation: forget gates near 1; accumulation over four batches",
    proof=converges(0.2),
)
def _(seed: int) -> Setup:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 16), "rnn": nn.LSTM(16, 32, batch_first=True), "head": nn.Linear(32, 8)})
    bias = model.get_parameter("rnn.bias_ih_l0")
    with torch.no_grad():
        bias[32:64] = 4.0
        bias[:32] = -2.0
    optimizer = adam(model, 5e-3)
    generator = torch.Generator().manual_seed(seed)

    def train() -> Iterator[Event]:
        for _ in range(80):
            optimizer.zero_grad()
            losses = []
            for _ in range(4):
                x = torch.randint(8, (16, 20), generator=generator)
                x[:, 1:] = x[:, 1:] % 2  # Only the first token is of the upper ones.
                loss = F.cross_entropy(model["head"](model["rnn"](model["embed"](x))[0][:, -1]), x[:, 0]) / 4
                loss.backward()
                losses.append(loss)
            yield "read", losses
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


class Recurrence(nn.Module):
    """A gated block with a diagonal linear recurrence whose decays lie between 0.5 and 0.999."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.decay = nn.Parameter(torch.linspace(0.5, 0.999, width).logit())
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.inner(self.norm(x)).chunk(2, -1)
        a = self.decay.sigmoid()
        h, out = torch.zeros_like(u[:, 0]), []
        for t in range(x.shape[1]):
            h = a * h + (1 - a * a).sqrt() * u[:, t]
            out.append(h)
        return x + self.outer(torch.stack(out, 1) * F.silu(gate))


@healthy(
    CASES,
    "hx_state_space_classifier",
    source="https://arxiv.org/abs/2303.06349 linear recurrent units; the outer layers are zero at first",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Embedding(24, 24), Recurrence(24), Recurrence(24), nn.LayerNorm(24), nn.Linear(24, 24))
    data = Text(seed, length=10)
    data.table = torch.softmax(3 * torch.log(data.table), -1)
    return fit(model, classify(model, data), adam(model, 5e-3), 120)


class Filters(nn.Module):
    """Convolutions of three widths over tokens, normalised; rows of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 24, padding_idx=0)
        self.filters = nn.ModuleList(
            nn.Sequential(nn.Conv1d(24, 16, k, padding=k // 2), nn.BatchNorm1d(16), nn.ReLU()) for k in (1, 3, 5)
        )
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        e = self.embed(x).transpose(1, 2)
        return self.head(self.dropout(torch.cat([f(e).amax(-1) for f in self.filters], -1)))


@healthy(
    CASES,
    "hx_text_cnn_in_small_noisy_batches",
    source="https://arxiv.org/abs/1408.5882 convolutions for sentences; biases before a normalisation, padding, dropout, batches of 6",
    proof=converges(0.65),
)
def _(seed: int) -> Setup:
    model, data = Filters(), Docs(seed, batch=6)

    def loss(i: int) -> Tensor:
        x, y = data()
        x[:2, 7:] = 0
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4), 300)
