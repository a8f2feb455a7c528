"""What decides, ranks or reads tables: agents, bandits, recommenders, credit and survival models, classifiers of series and of short texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Blobs, Case, Event, Proof, Setup, classify, evens, fit, healthy, initialise, mlp, sick
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


class Table:
    """Rows of standardised columns and a number that depends on them, smoothly and with one interaction; `labels` makes it 0 or 1."""

    def __init__(self, seed: int, features: int = 12, batch: int = 64, labels: bool = False, shift: float = 0.0) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.slope = torch.randn(features, generator=self.generator)
        self.slope /= self.slope.norm()
        self.features, self.batch, self.labels, self.shift = features, batch, labels, shift

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, self.features, generator=self.generator)
        y = x @ self.slope + 0.3 * x[:, 0] * x[:, 1]
        if self.labels:
            y = (torch.rand(self.batch, generator=self.generator) < torch.sigmoid(4 * y + self.shift)).float()
        return x, y[:, None]


class Reviews:
    """Short texts as tokens, `[batch, length]`, and a class: half of the words are drawn from the class's own part of the dictionary."""

    def __init__(self, seed: int, classes: int = 3, batch: int = 32, length: int = 12, words: int = 60) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.classes, self.batch, self.length, self.words = classes, batch, length, words

    def __call__(self) -> tuple[Tensor, Tensor]:
        part = self.words // (self.classes + 1)
        y = torch.randint(self.classes, (self.batch,), generator=self.generator)
        any_word = torch.randint(1, self.words, (self.batch, self.length), generator=self.generator)
        own = torch.randint(part, (self.batch, self.length), generator=self.generator) + part * (1 + y[:, None])
        return torch.where(torch.rand(self.batch, self.length, generator=self.generator) < 0.5, own, any_word), y


class Waves:
    """Series `[batch, length, 1]` of unit variance; the class is their frequency."""

    def __init__(self, seed: int, classes: int = 3, batch: int = 32, length: int = 24, noise: float = 0.4) -> None:
        self.generator = torch.Generator().manual_seed(6000 + seed)
        self.classes, self.batch, self.length, self.noise = classes, batch, length, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(self.classes, (self.batch,), generator=self.generator)
        phase = 6.28 * torch.rand(self.batch, 1, generator=self.generator)
        t = torch.arange(self.length) * (0.3 + 0.45 * y[:, None])
        noise = torch.randn(self.batch, self.length, generator=self.generator)
        return (1.3 * torch.sin(t + phase) + self.noise * noise)[..., None], y


class Tastes:
    """Who (user) rates what (item) how (about unit variance): products of hidden tastes of rank 3."""

    def __init__(self, seed: int, users: int = 40, items: int = 60, batch: int = 128) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.users, self.items, self.batch = users, items, batch
        self.of_users = torch.randn(users, 3, generator=self.generator)
        self.of_items = torch.randn(items, 3, generator=self.generator) / math.sqrt(3)

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        u = torch.randint(self.users, (self.batch,), generator=self.generator)
        i = torch.randint(self.items, (self.batch,), generator=self.generator)
        noise = 0.1 * torch.randn(self.batch, generator=self.generator)
        return u, i, (self.of_users[u] * self.of_items[i]).sum(-1) + noise


class Arms:
    """A contextual bandit: each arm pays with a chance that depends on the context."""

    def __init__(self, seed: int, features: int = 8, arms: int = 4, batch: int = 64) -> None:
        self.generator = torch.Generator().manual_seed(8000 + seed)
        self.weights = torch.randn(features, arms, generator=self.generator)
        self.batch, self.features, self.arms = batch, features, arms

    def contexts(self) -> Tensor:
        return torch.randn(self.batch, self.features, generator=self.generator)

    def best(self, x: Tensor) -> Tensor:
        return (x @ self.weights).argmax(-1)

    def draw(self, logits: Tensor) -> Tensor:
        return torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=self.generator)[:, 0]

    def pay(self, x: Tensor, arm: Tensor) -> Tensor:
        chance = torch.sigmoid(2 * (x @ self.weights))[torch.arange(len(x)), arm]
        return (torch.rand(len(x), generator=self.generator) < chance).float()


class _LastState(nn.Module):
    """A GRU; its last state."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.cell = nn.GRU(inputs, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cell(x)[0][:, -1]
        return out


# --- sick ---


@sick(
    CASES,
    "dc_critic_left_out",
    ("not_in_optimizer",),
    ("critic",),
    source="https://arxiv.org/abs/1602.01783 actor-critic with a network each; the optimizer was given the actor's parameters only",
    proof=every(unchanged("critic.0.weight", "critic.2.weight", "critic.2.bias"), loss_stays(0.6)),
)
def _(seed: int) -> Setup:
    arms = Arms(seed)
    model = nn.ModuleDict({"actor": mlp(nn.Tanh, 1, 32, 8, 4), "critic": mlp(nn.Tanh, 1, 32, 8, 1)})
    optimizer = torch.optim.Adam(model["actor"].parameters(), lr=3e-3)

    def loss(i: int) -> Tensor:
        x = arms.contexts()
        logits, value = model["actor"](x), model["critic"](x)[:, 0]
        arm = arms.draw(logits)
        reward = arms.pay(x, arm)
        chosen = torch.log_softmax(logits, -1)[torch.arange(len(x)), arm]
        total: Tensor = 0.5 * F.mse_loss(value, reward) - ((reward - value.detach()) * chosen).mean()
        return total

    def train() -> Iterator[Event]:
        for i in range(50):
            model.zero_grad()
            value = loss(i)
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


class _Intents(nn.Module):
    """A bag of words in the manner of fastText with one hidden layer."""

    def __init__(self, words: int = 60, width: int = 24, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(words, width, mode="mean")
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.hidden(self.embed(x))))
        return out


class _Mixture(nn.Module):
    """Four experts, weighted by a gate."""

    def __init__(self, features: int, width: int = 16) -> None:
        super().__init__()
        self.gate = nn.Linear(features, 4)
        self.experts = [nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, features)) for _ in range(4)]

    def forward(self, x: Tensor) -> Tensor:
        out = torch.stack([expert(x) for expert in self.experts], -2)
        mixed: Tensor = (torch.softmax(self.gate(x), -1)[..., None] * out).sum(-2)
        return x + mixed


class _MixtureModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(12, 16)
        self.moe = _Mixture(16)
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.moe(torch.relu(self.inputs(x))))
        return out


def _experts_outside(plain: Plain) -> str:
    model = plain.setup.model
    assert isinstance(model, _MixtureModel)
    weight = model.moe.experts[0].get_parameter("0.weight")
    assert all(weight is not p for p in model.parameters()), "the experts are registered"
    assert weight.grad is not None, "the experts have no gradient"
    norm, first = float(weight.grad.norm()), float(weight.detach().norm())
    assert norm > 1e-3, f"the gradient of an expert is {norm:.2g}"
    assert float(weight.detach().std()) < 0.16, "the expert has moved"
    return f"experts: gradient {norm:.3g} on a matrix of norm {first:.3g} that is no parameter of the model"


@sick(
    CASES,
    "dc_experts_in_plain_list",
    ("not_in_optimizer",),
    ("moe",),
    also=("gradients_not_zeroed",),  # nobody clears what nobody owns
    source="https://theflyingbirds.in/blog/pytorch-mysteries-lets-understand-nnmodule-nnparameter-modulelist-sequential-and-the-classic"
    "-layers-linear-activations-dropout layers in a plain list are unknown to the optimizer",
    proof=_experts_outside,
)
def _(seed: int) -> Setup:
    data, model = Table(seed), _MixtureModel()
    return fit(model, _regress(model, data), torch.optim.Adam(model.parameters(), lr=5e-3), 45)


def _regress(model: nn.Module, data: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[int], Tensor]:
    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return loss


def _binary(model: nn.Module, data: Callable[[], tuple[Tensor, Tensor]], **options: Any) -> Callable[[int], Tensor]:
    def loss(i: int) -> Tensor:
        x, y = data()
        return F.binary_cross_entropy_with_logits(model(x), y, **options)

    return loss


@sick(
    CASES,
    "dc_reinforce_rebuilt_log_probs",
    ("missing_gradient",),
    ("policy",),
    also=("not_in_optimizer",),  # the rebuilt tensor is a leaf that nobody owns
    source="https://devgem.io/posts/understanding-the-reinforce-algorithm-in-pytorch-a-dive-into-computational-graphs the saved "
    "log-probabilities must keep their graph; torch.tensor(list of numbers) cuts it",
    proof=no_gradient("policy.0.weight", "policy.0.bias", "policy.2.weight", "policy.2.bias"),
)
def _(seed: int) -> Setup:
    arms = Arms(seed, batch=32)
    model = nn.ModuleDict({"policy": mlp(nn.ReLU, 1, 32, 8, 4), "baseline": mlp(nn.ReLU, 1, 32, 8, 1)})
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def loss(i: int) -> Tensor:
        x = arms.contexts()
        logits, value = model["policy"](x), model["baseline"](x)[:, 0]
        arm = arms.draw(logits)
        reward = arms.pay(x, arm)
        saved = [float(row[a]) for row, a in zip(torch.log_softmax(logits.detach(), -1), arm, strict=True)]
        chosen = torch.tensor(saved, requires_grad=True)
        total: Tensor = F.mse_loss(value, reward) - ((reward - value.detach()) * chosen).mean()
        return total

    return fit(model, loss, optimizer, 45)


class _Reader(nn.Module):
    """A GRU over words, mean over time, and a head."""

    def __init__(self, words: int = 60, width: int = 20, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, classes)
        self.thawed = True

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.thawed):
            h = self.gru(self.embed(x))[0].mean(1)
        out: Tensor = self.head(h)
        return out


@sick(
    CASES,
    "dc_thawed_but_no_grad",
    ("missing_gradient",),
    ("embed", "gru"),
    source="https://arxiv.org/abs/1801.06146 gradual unfreezing; requires_grad is set back to True, but the encoder still runs without grad",
    proof=no_gradient("embed.weight", "gru.weight_ih_l0", "gru.weight_hh_l0", "gru.bias_ih_l0", first=20),
    onset=20,
)
def _(seed: int) -> Setup:
    data, model = Reviews(seed), _Reader()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    encoder = [*model.embed.parameters(), *model.gru.parameters()]
    model.thawed = False
    for p in encoder:
        p.requires_grad_(False)

    def before(i: int) -> None:
        if i == 20:
            for p in encoder:
                p.requires_grad_(True)

    return fit(model, classify(model, data), optimizer, 60, before=before)


class _Towers(nn.Module):
    """Users and items each through a tower; a tower for what the item is made of was planned for new items."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        self.items = nn.Sequential(nn.Embedding(60, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        self.contents = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, u: Tensor, i: Tensor) -> Tensor:
        out: Tensor = (self.users(u) * self.items(i)).sum(-1)
        return out


def _rate(model: nn.Module, data: Tastes) -> Callable[[int], Tensor]:
    def loss(i: int) -> Tensor:
        u, item, y = data()
        return F.mse_loss(model(u, item), y)

    return loss


@sick(
    CASES,
    "dc_content_tower_never_called",
    ("missing_gradient",),
    ("contents",),
    source="https://arxiv.org/abs/1606.07792 several parts are to be joined before the head; here one is built and never joined",
    proof=every(no_gradient("contents.0.weight", "contents.2.weight"), converges(0.9)),
)
def _(seed: int) -> Setup:
    data, model = Tastes(seed), _Towers()
    return fit(model, _rate(model, data), torch.optim.Adam(model.parameters(), lr=1e-2), 80)


def _first_output_above(module: str, rms: float) -> Proof:
    """What a module gives in the first update has a root mean square above `rms`."""

    def proof(plain: Plain) -> str:
        seen = plain.outputs[module][0]
        assert seen is not None, f"{module} was not called"
        assert seen.rms > rms, f"{module} gives {seen.rms:.3g}, not above {rms:g}"
        return f"the first output of {module} has the rms {seen.rms:.3g}"

    return proof


def _first_loss_above(loss: float) -> Proof:
    def proof(plain: Plain) -> str:
        assert plain.losses[0] > loss, f"the loss begins at {plain.losses[0]:.3g}, not above {loss:g}"
        return f"the loss begins at {plain.losses[0]:.3g}"

    return proof


def _loss_nan_at(update: int, finite: tuple[str, ...] = ()) -> Proof:
    """The loss of the update is NaN or Inf, while the outputs of these modules are finite."""

    def proof(plain: Plain) -> str:
        assert all(math.isfinite(x) for x in plain.losses[:update]), "a loss before is not finite"
        assert not math.isfinite(plain.losses[update]), f"the loss is {plain.losses[update]:.3g}"
        for name in finite:
            seen = plain.outputs[name][update]
            assert seen is not None, f"{name} was not called"
            assert not seen.nonfinite, f"{name} is not finite"
        return f"the loss at {update} is {plain.losses[update]}; finite are {', '.join(finite)}"

    return proof


def _loss_finite_at(update: int) -> Proof:
    def proof(plain: Plain) -> str:
        assert math.isfinite(plain.losses[update]), f"the loss at {update} is {plain.losses[update]}"
        return f"the loss at {update} is {plain.losses[update]:.3g}"

    return proof


@sick(
    CASES,
    "dc_income_in_euros",
    ("unnormalized_input",),
    ("",),
    source="https://arxiv.org/abs/2106.11959 columns of a table are standardised before a network; here income, debt and age come as they are",
    proof=every(_first_output_above("0", 2e3), _first_loss_above(20)),
)
def _(seed: int) -> Setup:
    data, model = Table(seed, features=8, labels=True), mlp(nn.ReLU, 2, 32, 8, 1)
    spread = torch.tensor([18000.0, 9000.0, 12.0, 3.0, 1.0, 1.0, 250.0, 5.0])
    centre = torch.tensor([42000.0, 11000.0, 41.0, 4.0, 0.0, 0.0, 600.0, 12.0])

    def rows() -> tuple[Tensor, Tensor]:
        x, y = data()
        return centre + spread * x, y

    return fit(model, _binary(model, rows), torch.optim.Adam(model.parameters(), lr=3e-3), 60)


class _Probabilities(nn.Module):
    """A small text classifier that ends in a softmax."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 24)
        self.attend = nn.MultiheadAttention(24, 2, batch_first=True)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, classes)
        self.softmax = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = self.norm(h + self.attend(h, h, h, need_weights=False)[0]).mean(1)
        out: Tensor = self.softmax(self.head(h))
        return out


def _sums_to_one(module: str, floor: float) -> Proof:
    """The outputs lie in 0..1, and the loss never gets below what log-softmax of probabilities allows."""

    def proof(plain: Plain) -> str:
        for seen in plain.outputs[module]:
            assert seen is not None, f"{module} was not called"
            assert 0 <= seen.low <= seen.high <= 1, "not probabilities"
        least = min(plain.losses)
        assert least > floor, f"the loss falls to {least:.3g}, below {floor}"
        return f"{module} gives probabilities, and the loss stays above {least:.3g}"

    return proof


@sick(
    CASES,
    "dc_intent_softmax_before_cross_entropy",
    ("double_softmax",),
    ("softmax",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html the input is expected to contain logits",
    proof=_sums_to_one("softmax", math.log(1 + 3 * math.exp(-1))),
)
def _(seed: int) -> Setup:
    data, model = Reviews(seed, classes=4), _Probabilities(4)
    return fit(model, classify(model, data), torch.optim.AdamW(model.parameters(), lr=3e-3), 60)


@sick(
    CASES,
    "dc_cloning_probabilities_as_logits",
    ("double_softmax",),
    ("probabilities",),
    source="https://docs.pytorch.org/docs/stable/distributions.html#categorical takes probs or logits; probabilities go in as logits",
    proof=_sums_to_one("probabilities", math.log(1 + 4 * math.exp(-1))),
)
def _(seed: int) -> Setup:
    arms = Arms(seed, arms=5, batch=48)
    model = nn.Sequential()
    for name, module in (("body", mlp(nn.ELU, 2, 32, 8, 5)), ("probabilities", nn.Softmax(dim=1))):
        model.add_module(name, module)

    def loss(i: int) -> Tensor:
        x = arms.contexts()
        policy = torch.distributions.Categorical(logits=model(x))
        total: Tensor = -policy.log_prob(arms.best(x)).mean()  # type: ignore[no-untyped-call]
        return total

    return fit(model, loss, torch.optim.RMSprop(model.parameters(), lr=2e-3), 60)


@sick(
    CASES,
    "dc_score_normal_init",
    ("poor_init", "exploding_gradient"),
    evens(0, 8),
    source="https://proceedings.mlr.press/v9/glorot10a.html variance must follow the width; nn.init.normal_(weight) has std 1 whatever it is",
    proof=every(_first_loss_above(300), _first_output_above("8", 300)),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed, features=16, batch=48), mlp(nn.ReLU, 4, 48, 16, 4)
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight)
    return fit(model, classify(model, data), torch.optim.Adam(model.parameters(), lr=1e-3), 45)


class _Lora(nn.Module):
    """A frozen Linear and a trained addition of low rank."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + 2 * self.b(self.a(x))
        return out


def _pretrained(seed: int, model: nn.Module, classes: int = 3, updates: int = 60) -> None:
    data = Reviews(seed + 50, classes=classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = classify(model, data)
    for i in range(updates):
        optimizer.zero_grad()
        loss(i).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()


@sick(
    CASES,
    "dc_lora_both_zero",
    ("zero_gradient", "poor_init"),
    ("hidden.a", "hidden.b"),
    source="https://arxiv.org/abs/2106.09685 one of the two factors begins at zero, the other at random; here both are zero",
    proof=zero_gradient("hidden.a.weight", "hidden.b.weight"),
)
def _(seed: int) -> Setup:
    data, model = Reviews(seed, classes=5), _Intents()
    _pretrained(seed, model)
    model.embed.requires_grad_(False)
    adapter = _Lora(model.hidden)
    nn.init.zeros_(adapter.a.weight)
    model.hidden = adapter  # type: ignore[assignment]
    model.head = nn.Linear(24, 5)
    trained = [p for p in model.parameters() if p.requires_grad]
    return fit(model, classify(model, data), torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0), 50)


@sick(
    CASES,
    "dc_default_risk_seven_sigmoids",
    ("vanishing_gradient",),
    tuple(str(i) for i in range(10)),
    also=("loss_plateau", "update_ratio_too_small"),
    source="https://proceedings.mlr.press/v9/glorot10a.html deep networks of sigmoids lose their gradient towards the input",
    proof=gradient_ratio("0.weight", "14.weight", 1e-3, last=15),
)
def _(seed: int) -> Setup:
    data, model = Table(seed, labels=True), mlp(nn.Sigmoid, 7, 24, 12, 1)
    initialise(model, nn.init.xavier_uniform_)
    return fit(model, _binary(model, data), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 60)


@sick(
    CASES,
    "dc_wide_model_sum_of_losses",
    ("loss_diverging", "exploding_gradient", "update_ratio_too_large"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.MSELoss.html reduction='sum' multiplies the gradient by the batch; "
    "the learning rate was that of the mean",
    proof=loss_grows(50, last=15),
)
def _(seed: int) -> Setup:
    data, model = Table(seed), nn.Linear(12, 1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y, reduction="sum")

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.025), 25)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None


class _Reversal(nn.Module):
    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Reverse.apply(x, self.strength)  # type: ignore[no-untyped-call]
        return out


class _Domains(nn.Module):
    """Classes to be told apart, by features that do not tell the domain."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.features = mlp(nn.ReLU, 2, 32, 16, 24)
        self.classes = nn.Sequential(nn.ReLU(), nn.Linear(24, 4))
        self.reversal = _Reversal(strength)
        self.domain = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.features(x)
        return self.classes(h), self.domain(self.reversal(h))


@sick(
    CASES,
    "dc_reversal_of_strength_3000",
    ("exploding_gradient",),
    ("features", "reversal"),
    also=("loss_diverging", "loss_spike", "loss_plateau"),
    source="https://arxiv.org/abs/1409.7495 the reversal's strength runs from 0 to 1; here it was multiplied by the number of steps",
    proof=every(
        gradient_ratio("domain.0.weight", "features.4.weight", 5e-3, last=15),
        gradient_ratio("classes.1.weight", "features.4.weight", 5e-2, last=15),
    ),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed, batch=64), _Domains(3000.0)
    shift = torch.randn(16, generator=data.generator)

    def loss(i: int) -> Tensor:
        x, y = data()
        domain = torch.arange(len(x)) % 2
        classes, domains = model(x + domain[:, None] * shift)
        return F.cross_entropy(classes, y) + F.cross_entropy(domains, domain)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 45)


@sick(
    CASES,
    "dc_one_shard_in_cents",
    ("gradient_spike", "loss_spike"),
    onset=40,
    source="http://karpathy.github.io/2019/04/25/recipe/ become one with the data; one shard of a price model has its targets in cents",
    proof=gradient_spikes(40, 30),
)
def _(seed: int) -> Setup:
    data, model = Table(seed), mlp(nn.SiLU, 2, 32, 12, 1)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), 100 * y if i == 40 else y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 60)


def _clip(model: nn.Module, norm: float) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), norm)


@sick(
    CASES,
    "dc_entropy_of_masked_actions",
    ("non_finite_loss",),
    onset=20,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
    source="https://github.com/Unity-Technologies/ml-agents/pull/4664 NaN where the log of a masked action's probability is taken",
    proof=every(first_non_finite(20), _loss_nan_at(20, ("0", "2", "4"))),
)
def _(seed: int) -> Setup:
    arms, model = Arms(seed, arms=6), mlp(nn.Tanh, 2, 32, 8, 6)

    def loss(i: int) -> Tensor:
        x = arms.contexts()
        logits = model(x)
        if i >= 20:  # from here on the last arm is not always open
            closed = torch.zeros_like(logits, dtype=torch.bool)
            closed[::4, -1] = True
            logits = logits.masked_fill(closed, -torch.inf)
        p = torch.softmax(logits, -1)
        entropy = -(p * p.log()).sum(-1).mean()
        return F.cross_entropy(logits, logits.detach().add(10 * (x @ arms.weights)).argmax(-1)) - 0.01 * entropy

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 40)


class _Places(nn.Module):
    """Items as places in a space: what belongs together is near."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.tower = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, item: Tensor) -> Tensor:
        out: Tensor = self.tower(self.embed(item))
        return out


def _triplets(model: nn.Module, same_from: int, seed: int, floor: float = 0.0) -> Callable[[int], Tensor]:
    """Items of ten groups; from an update on, one anchor is drawn as its own positive."""
    generator = torch.Generator().manual_seed(90 + seed)

    def loss(i: int) -> Tensor:
        group = torch.randint(10, (48,), generator=generator)
        anchor = 6 * group + torch.randint(3, (48,), generator=generator)
        positive = 6 * group + 3 + torch.randint(3, (48,), generator=generator)
        negative = (
            6 * (group + 1 + torch.randint(9, (48,), generator=generator)) + torch.randint(6, (48,), generator=generator)
        ) % 60
        if i >= same_from:
            positive[0] = anchor[0]
        a, p, n = model(anchor), model(positive), model(negative)
        near, far = ((a - p).square().sum(-1) + floor).sqrt(), ((a - n).square().sum(-1) + floor).sqrt()
        return F.relu(near - far + 1).mean()

    return loss


@sick(
    CASES,
    "dc_anchor_is_its_own_positive",
    ("non_finite_gradient",),
    ("embed", "tower"),
    onset=25,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
    source="https://github.com/adambielski/siamese-triplet/issues/18 the square root of a distance of 0 has no derivative",
    proof=every(first_non_finite(25), _loss_finite_at(25)),
)
def _(seed: int) -> Setup:
    model = _Places()
    return fit(model, _triplets(model, 25, seed), torch.optim.Adam(model.parameters(), lr=5e-3), 45)


@sick(
    CASES,
    "dc_missing_value_in_table",
    ("non_finite_input",),
    ("",),
    onset=18,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    source="http://karpathy.github.io/2019/04/25/recipe/ look at the data first; an empty field of a table is read as NaN",
    proof=every(first_non_finite(18), first_non_finite(18, "0")),
)
def _(seed: int) -> Setup:
    data = Table(seed, labels=True)
    model = nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 1))

    def rows() -> tuple[Tensor, Tensor]:
        x, y = data()
        return x, y

    def loss(i: int) -> Tensor:
        x, y = rows()
        if i == 18:
            x[7, 3] = torch.nan
        return F.binary_cross_entropy_with_logits(model(x), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), 35)


class _LogColumns(nn.Module):
    """The logarithm of the first columns, which are amounts."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, : self.columns].log(), x[:, self.columns :]], 1)


@sick(
    CASES,
    "dc_log_of_an_empty_account",
    ("non_finite_activation",),
    ("log",),
    onset=22,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.log1p.html log1p is for amounts that can be 0; this model takes log",
    proof=every(first_non_finite(22, "log"), first_non_finite(22)),
)
def _(seed: int) -> Setup:
    data, model = Table(seed), nn.Sequential()
    model.add_module("log", _LogColumns(4))
    model.add_module("body", mlp(nn.ReLU, 2, 32, 12, 1))

    def loss(i: int) -> Tensor:
        x, y = data()
        amounts = x.clone()
        amounts[:, :4] = x[:, :4].exp()
        if i >= 22 and i % 2 == 0:
            amounts[3, 1] = 0.0
        return F.smooth_l1_loss(model(amounts), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 40)


@sick(
    CASES,
    "dc_prior_bias_in_every_layer",
    ("dead_units", "zero_gradient", "poor_init"),
    ("0", "1", "2", "3", "4"),
    also=("vanishing_gradient", "loss_plateau"),
    source="https://arxiv.org/abs/1708.02002 the last bias begins at the log-odds of rare positives; here every bias does",
    proof=every(dead_fraction("1", 0.99, last=15), dead_fraction("3", 0.99, last=15)),
)
def _(seed: int) -> Setup:
    data, model = Table(seed, labels=True, shift=-4.6, batch=128), mlp(nn.ReLU, 2, 32, 12, 1)
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.constant_(m.bias, -3.9)
    return fit(model, _binary(model, data), torch.optim.Adam(model.parameters(), lr=2e-3), 45)


def _flat(module: str, above: float, last: int = 15) -> Proof:
    """The rms of a tanh's output is near 1: nearly all of it is in the flat part."""

    def proof(plain: Plain) -> str:
        rms = median(seen.rms for seen in plain.outputs[module][:last] if seen is not None)
        assert rms > above, f"the rms of {module} is {rms:.3g}, not above {above}"
        return f"the rms of the tanh {module} is {rms:.3g}"

    return proof


@sick(
    CASES,
    "dc_policy_gain_of_twenty",
    ("saturated_activation", "poor_init"),
    ("0", "1", "2", "3"),
    source="https://arxiv.org/abs/2006.05990 what matters in on-policy RL: orthogonal init; here with a gain of 20 for the tanh layers",
    proof=every(_flat("1", 0.9), _flat("3", 0.9)),
)
def _(seed: int) -> Setup:
    arms, model = Arms(seed), mlp(nn.Tanh, 2, 32, 8, 4)
    for m in (model[0], model[2]):
        assert isinstance(m, nn.Linear)
        nn.init.orthogonal_(m.weight, gain=20.0)
        nn.init.zeros_(m.bias)
    return fit(model, _imitate(model, arms), torch.optim.Adam(model.parameters(), lr=1e-3), 50)


def _imitate(model: nn.Module, arms: Arms, **options: Any) -> Callable[[int], Tensor]:
    def loss(i: int) -> Tensor:
        x = arms.contexts()
        return F.cross_entropy(model(x), arms.best(x), **options)

    return loss


@sick(
    CASES,
    "dc_zero_grad_once_an_epoch",
    ("gradients_not_zeroed",),
    also=("loss_diverging", "exploding_gradient"),
    source="https://thecodeforge.io/ml-ai/pytorch-training-loop/ a missing zero_grad: here it stands in the loop over epochs",
    proof=gradient_grows("2.weight", 4.0, 14),
)
def _(seed: int) -> Setup:
    data, model = Table(seed, labels=True), mlp(nn.Tanh, 1, 24, 12, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    loss = _binary(model, data)

    def train() -> Iterator[Event]:
        for epoch in range(3):
            optimizer.zero_grad()
            for i in range(25):
                value = loss(25 * epoch + i)
                value.backward()  # type: ignore[no-untyped-call]
                yield "read", [value]
                optimizer.step()
                yield "step", [optimizer]

    return Setup(model, train)


def _never_stepped(plain: Plain) -> str:
    """There are gradients in every update, and no step follows one of them."""
    for name, norms in plain.grads.items():
        assert all(n > 0 for n in norms), f"{name} has no gradient"
        assert all(math.isnan(s) for s in plain.steps[name]), f"{name} was stepped"
        assert len(set(plain.weights[name])) == 1, f"{name} moves"
    return f"{len(plain.losses)} backward passes, no step, and every weight stays"


@sick(
    CASES,
    "dc_scheduler_in_place_of_optimizer",
    ("never_stepped",),
    also=("loss_plateau",),
    source="https://docs.pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate the scheduler steps after the optimizer; here alone",
    proof=every(_never_stepped, loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    data = Waves(seed, batch=24)
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=100)
    loss = classify(model, data)

    def train() -> Iterator[Event]:
        for i in range(50):
            optimizer.zero_grad()
            value = loss(i)
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            _clip(model, 1.0)
            scheduler.step()

    return Setup(model, train)


@sick(
    CASES,
    "dc_cleared_before_the_step",
    ("frozen_weights",),
    also=("loss_plateau", "update_ratio_too_small"),
    source="https://theneuralbase.com/pytorch/learn/beginner/forward-pass-loss-backward-step/ the order is zero, forward, backward, step",
    proof=every(unchanged("users.0.weight", "users.1.weight", "items.1.weight", "items.3.bias"), loss_stays(0.3)),
)
def _(seed: int) -> Setup:
    data, model = Tastes(seed), _Towers()
    del model.contents
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return fit(model, _rate(model, data), optimizer, 50, between=lambda i: optimizer.zero_grad())


class _Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attend(h, h, h, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _Sentiment(nn.Module):
    """A small transformer over words."""

    def __init__(self, classes: int = 3, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.embed(x))).mean(1))
        return out


@sick(
    CASES,
    "dc_layer_decay_rounds_to_zero",
    ("frozen_weights",),
    ("embed", "blocks.0", "blocks.1"),
    source="https://arxiv.org/abs/1801.06146 a learning rate per depth; here depth // blocks, which is 0 for all but the last",
    proof=every(unchanged("embed.weight", "blocks.0.mlp.0.weight", "blocks.1.mlp.2.weight", "blocks.1.norm1.bias"), converges(0.9)),
)
def _(seed: int) -> Setup:
    data, model = Reviews(seed), _Sentiment()
    parts = [model.embed, *model.blocks, nn.ModuleList([model.norm, model.head])]
    groups = [{"params": list(part.parameters()), "lr": 5e-3 * (depth // 3)} for depth, part in enumerate(parts)]
    return fit(model, classify(model, data), torch.optim.AdamW(groups), 50)


class _Columns(nn.Module):
    """A transformer over the columns of a table, as FT-Transformer."""

    def __init__(self, features: int = 12, width: int = 16, blocks: int = 2, outputs: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(0.5 * torch.randn(features, width))
        self.place = nn.Parameter(0.5 * torch.randn(features, width))
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x[..., None] * self.scale + self.place).mean(1))
        return out


@sick(
    CASES,
    "dc_columns_lr_of_one",
    ("update_ratio_too_large",),
    also=("loss_diverging", "loss_spike", "loss_plateau", "poor_init"),
    source="https://arxiv.org/abs/2106.11959 AdamW with 1e-4 is the default of FT-Transformer; here 1.0, which is Adadelta's",
    proof=every(update_ratio(above=1.5, last=1), update_ratio(above=0.25, last=6)),
)
def _(seed: int) -> Setup:
    data, model = Table(seed, labels=True), _Columns()
    return fit(model, _binary(model, data), torch.optim.AdamW(model.parameters(), lr=1.0), 40)


@sick(
    CASES,
    "dc_default_risk_lr_1e_minus_7",
    ("update_ratio_too_small",),
    also=("loss_plateau",),
    source="https://arxiv.org/abs/1711.05101 the weight decay of a configuration, 1e-7, was read as the learning rate",
    proof=every(update_ratio(below=2e-6), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    data = Table(seed, labels=True)
    model = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))
    return fit(model, _binary(model, data), torch.optim.AdamW(model.parameters(), lr=1e-7), 50)


@sick(
    CASES,
    "dc_targets_shuffled_apart",
    ("loss_plateau",),
    source="http://karpathy.github.io/2019/04/25/recipe/ inputs and labels were shuffled with a permutation each",
    proof=loss_stays(0.03, first=20, last=100),
)
def _(seed: int) -> Setup:
    data = Waves(seed, batch=48)
    model = nn.Sequential()
    model.add_module("conv", _Windows(20))
    model.add_module("head", nn.Linear(20, 3))

    def shuffled() -> tuple[Tensor, Tensor]:
        x, y = data()
        return x, y[torch.randperm(len(y), generator=data.generator)]

    return fit(model, classify(model, shuffled), torch.optim.Adam(model.parameters(), lr=2e-3), 150)


class _Windows(nn.Module):
    """Two convolutions over time and the mean over it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(1, width, 5), nn.ReLU(), nn.Conv1d(width, width, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x.transpose(1, 2)).mean(-1)
        return out


def _every_step_skipped(first: int, last: int) -> Proof:
    """Gradients are NaN, and no weight moves."""

    def proof(plain: Plain) -> str:
        for i in range(first, last):
            assert any(n[i] for n in plain.nonfinite.values()), f"every gradient of {i} is finite"
            assert all(math.isnan(s[i]) for s in plain.steps.values()), f"{i} was stepped"
        return f"updates {first} to {last} have NaN gradients and are skipped"

    return proof


@sick(
    CASES,
    "dc_scaler_skips_for_ever",
    ("loss_scale_collapse", "non_finite_gradient"),
    onset=20,
    also=("never_stepped",),
    source="https://github.com/Junjue-Wang/FactSeg/issues/6 the loss scale is reduced until it is 0, for the gradients are never finite",
    proof=_every_step_skipped(20, 45),
)
def _(seed: int) -> Setup:
    model = _Places()
    loss = _triplets(model, 20, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def train() -> Iterator[Event]:
        for i in range(45):
            optimizer.zero_grad()
            value = loss(i)
            scaler.scale(value).backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            yield "step", [optimizer] if scaler.get_scale() >= before else []

    return Setup(model, train)


# --- healthy ---


class _Told(nn.ModuleDict):
    """Parts of a run, and a measure of quality that the loop writes down."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__(parts)
        self.told: list[float] = []


def _rises(at_least: float, by: float, what: str) -> Proof:
    """What the loop wrote down ends above `at_least` and `by` above its beginning (the first three; the last tenth)."""

    def proof(plain: Plain) -> str:
        model = plain.setup.model
        assert isinstance(model, _Told)
        tenth = max(1, len(model.told) // 10)
        a, b = mean(model.told[:3]), mean(model.told[-tenth:])
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        assert b > max(at_least, a + by), f"{what} goes from {a:.3g} to {b:.3g}"
        return f"{what} rises from {a:.3g} to {b:.3g}"

    return proof


def _knows_the_way(plain: Plain) -> str:
    model = plain.setup.model
    assert isinstance(model, _Told)
    with torch.no_grad():
        q = model["q"](torch.eye(8))[:7]
    assert bool((q[:, 1] > q[:, 0]).all()), f"the greedy way is {q.argmax(-1).tolist()}"
    assert 0.5 < float(q[6, 1]) < 1.3, f"the last step is worth {float(q[6, 1]):.3g}"
    return f"the greedy way leads to the goal; the first step is worth {float(q[0, 1]):.3g}, the last {float(q[6, 1]):.3g}"


@healthy(
    CASES,
    "dc_dqn_of_seldom_rewards",
    source="https://arxiv.org/abs/1312.5602 replay, a target network that is copied now and then, a reward only at the end of a chain",
    proof=_knows_the_way,
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    model = _Told({"q": mlp(nn.ELU, 1, 32, 8, 2), "target": mlp(nn.ELU, 1, 32, 8, 2)})
    model["target"].load_state_dict(model["q"].state_dict())
    model["target"].requires_grad_(False)
    optimizer = torch.optim.Adam(model["q"].parameters(), lr=3e-3)
    state = torch.randint(7, (600,), generator=generator)  # what a random walk has seen
    action = torch.randint(2, (600,), generator=generator)
    after = (state + 2 * action - 1).clamp_min(0)
    eye = torch.eye(8)

    def train() -> Iterator[Event]:
        for i in range(320):
            if i % 16 == 0:
                model["target"].load_state_dict(model["q"].state_dict())
            k = torch.randint(600, (48,), generator=generator)
            with torch.no_grad():
                ahead = model["target"](eye[after[k]]).amax(-1)
            end = (after[k] == 7).float()
            value = F.smooth_l1_loss(model["q"](eye[state[k]]).gather(1, action[k, None])[:, 0], end + 0.9 * (1 - end) * ahead)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            nn.utils.clip_grad_norm_(model["q"].parameters(), 10.0)
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "dc_actor_critic_about_zero",
    source="https://arxiv.org/abs/1602.01783 advantages are about zero in the mean, and so is the loss; heads begin at zero",
    proof=_rises(0.7, 0.3, "the share of best arms"),
)
def _(seed: int) -> Setup:
    arms = Arms(seed)
    model = _Told({"body": nn.Sequential(nn.Linear(8, 32), nn.Tanh()), "actor": nn.Linear(32, 4), "critic": nn.Linear(32, 1)})
    for head in ("actor", "critic"):
        nn.init.zeros_(model.get_parameter(f"{head}.weight"))
        nn.init.zeros_(model.get_parameter(f"{head}.bias"))

    def loss(i: int) -> Tensor:
        x = arms.contexts()
        h = model["body"](x)
        logits, value = torch.log_softmax(model["actor"](h), -1), model["critic"](h)[:, 0]
        arm = arms.draw(logits)
        reward = arms.pay(x, arm) - 0.5
        model.told.append(float((logits.argmax(-1) == arms.best(x)).float().mean()))
        advantage = reward - value.detach()
        entropy = -(logits.exp() * logits).sum(-1).mean()
        total: Tensor = -(advantage * logits[torch.arange(len(x)), arm]).mean() + 0.5 * F.mse_loss(value, reward) - 0.01 * entropy
        return total

    return fit(model, loss, torch.optim.RMSprop(model.parameters(), lr=3e-3), 250)


@healthy(
    CASES,
    "dc_ppo_four_epochs",
    source="https://arxiv.org/abs/1707.06347 advantages of mean zero, a ratio that begins at 1 in every rollout, gradients clipped to 0.5",
    proof=_rises(0.65, 0.3, "the share of best arms"),
)
def _(seed: int) -> Setup:
    arms = Arms(seed, batch=96)
    model = _Told({"actor": mlp(nn.Tanh, 2, 24, 8, 4), "critic": mlp(nn.Tanh, 2, 24, 8, 1)})
    for part, gain in (("actor", 0.01), ("critic", 1.0)):
        for name, p in model[part].named_parameters():
            if p.ndim == 2:
                nn.init.orthogonal_(p, gain=gain if name.startswith("4") else math.sqrt(2))
            else:
                nn.init.zeros_(p)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-5)

    def train() -> Iterator[Event]:
        for _ in range(60):
            x = arms.contexts()
            with torch.no_grad():
                old = torch.log_softmax(model["actor"](x), -1)
                arm = arms.draw(old)
                old = old[torch.arange(len(x)), arm]
                reward = arms.pay(x, arm)
                advantage = reward - model["critic"](x)[:, 0]
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
            for _ in range(4):
                logits = torch.log_softmax(model["actor"](x), -1)
                model.told.append(float((logits.argmax(-1) == arms.best(x)).float().mean()))
                ratio = (logits[torch.arange(len(x)), arm] - old).exp()
                clipped = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                value = -clipped.mean() + 0.5 * F.mse_loss(model["critic"](x)[:, 0], reward)
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                yield "read", [value]
                _clip(model, 0.5)
                optimizer.step()
                yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "dc_clicks_rare_and_sparse",
    source="https://arxiv.org/abs/1906.00091 sparse embeddings with an optimizer of their own; few rows are positive, and many items unseen",
    proof=_rises(0.75, 0.15, "the AUC"),
)
def _(seed: int) -> Setup:
    generator = torch.Generator().manual_seed(seed)
    model = _Told({"goods": nn.Embedding(400, 8, sparse=True), "top": mlp(nn.ReLU, 1, 32, 16, 1)})
    nn.init.normal_(model.get_parameter("goods.weight"), std=0.1)
    nn.init.constant_(model.get_parameter("top.2.bias"), -2.9)  # the log-odds of a click
    liked, slope = 1.5 * torch.randn(400, generator=generator), torch.randn(8, generator=generator)
    optimizers = [
        torch.optim.SparseAdam(list(model["goods"].parameters()), lr=2e-2),
        torch.optim.Adam(model["top"].parameters(), lr=5e-3),
    ]

    def train() -> Iterator[Event]:
        for _ in range(200):
            item = (400 * torch.rand(256, generator=generator) ** 4).long()  # few items make most of the traffic
            x = torch.randn(256, 8, generator=generator)
            y = (torch.rand(256, generator=generator) < torch.sigmoid(liked[item] + x @ slope * 0.7 - 4.0)).float()
            score = model["top"](torch.cat([model["goods"](item), x], 1))[:, 0]
            value = F.binary_cross_entropy_with_logits(score, y)
            if 0 < y.sum() < 256:
                model.told.append(float((score[y > 0, None] > score[None, y == 0]).float().mean()))
            for optimizer in optimizers:
                optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            for optimizer in optimizers:
                optimizer.step()
            yield "step", optimizers

    return Setup(model, train)


class _Basket(nn.Module):
    """The next item from the mean of a padded history."""

    def __init__(self, items: int = 200, width: int = 16) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width, padding_idx=0)
        self.mix = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, width))
        nn.init.normal_(self.items.weight, std=0.3)
        with torch.no_grad():
            self.items.weight[0] = 0

    def forward(self, history: Tensor, better: Tensor, worse: Tensor) -> Tensor:
        seen = (history > 0).sum(1, keepdim=True).clamp_min(1)
        h = self.items(history).sum(1) / seen
        h = h + self.mix(h)
        out: Tensor = (h * (self.items(better) - self.items(worse))).sum(-1)
        return out


@healthy(
    CASES,
    "dc_ranking_of_padded_baskets",
    source="https://arxiv.org/abs/1205.2618 BPR; padding, items that are never seen, and dropout of a half",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    generator, model = torch.Generator().manual_seed(seed), _Basket()

    def loss(i: int) -> Tensor:
        taste = torch.randint(5, (64, 1), generator=generator)
        history = 1 + 20 * taste + torch.randint(20, (64, 6), generator=generator)
        history = history * (torch.arange(6) < torch.randint(1, 7, (64, 1), generator=generator))
        better = 1 + 20 * taste[:, 0] + torch.randint(20, (64,), generator=generator)
        other = (taste[:, 0] + 1 + torch.randint(4, (64,), generator=generator)) % 5
        worse = 1 + 20 * other + torch.randint(20, (64,), generator=generator)
        return F.softplus(-model(history, better, worse)).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-5), 200)


class _Switch(nn.Module):
    """Each row goes to one of six experts; an expert without rows is not called."""

    def __init__(self, features: int, width: int = 16, experts: int = 6) -> None:
        super().__init__()
        self.router = nn.Linear(features, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, 1)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(self.router(x), -1)
        weight, chosen = p.max(-1)
        out = x.new_zeros(len(x), 1)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, weight[rows, None] * expert(x[rows]))
        share = F.one_hot(chosen, len(self.experts)).float().mean(0)
        return out, len(self.experts) * (share * p.mean(0)).sum()


def _experts_rest(plain: Plain) -> str:
    """Every expert is used, and some miss updates."""
    names = [f"experts.{k}.0.weight" for k in range(6)]
    missed = [sum(math.isnan(g) or g == 0 for g in plain.grads[n]) / len(plain.losses) for n in names]
    assert max(missed) < 0.7, f"an expert misses {max(missed):.2g} of the updates"
    return f"the experts miss {', '.join(f'{m:.2g}' for m in missed)} of the updates"


@healthy(
    CASES,
    "dc_switch_of_idle_experts",
    source="https://arxiv.org/abs/2101.03961 one expert a row and a loss that balances them; in a batch of 16 some have no row",
    proof=every(converges(0.6), _experts_rest),
)
def _(seed: int) -> Setup:
    data, model = Table(seed, features=8, batch=16), _Switch(8)

    def loss(i: int) -> Tensor:
        x, y = data()
        out, balance = model(x)
        total: Tensor = F.mse_loss(out, y) + 0.1 * balance
        return total

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 250)


@healthy(
    CASES,
    "dc_frozen_then_thawed",
    source="https://arxiv.org/abs/1801.06146 the head first, then what is below it with a smaller learning rate, as a new parameter group",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data, model = Reviews(seed, classes=5), _Intents()
    _pretrained(seed, model)
    model.head = nn.Linear(24, 5)
    below = [*model.embed.parameters(), *model.hidden.parameters()]
    for p in below:
        p.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)

    def before(i: int) -> None:
        if i == 40:
            for p in below:
                p.requires_grad_(True)
            optimizer.add_param_group({"params": below, "lr": 2e-3})

    return fit(model, classify(model, data), optimizer, 140, before=before)


@healthy(
    CASES,
    "dc_lora_on_frozen_words",
    source="https://arxiv.org/abs/2106.09685 everything frozen but the low-rank additions, whose second factor begins at zero, and the head",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data, model = Reviews(seed, classes=5), _Intents()
    _pretrained(seed, model)
    model.requires_grad_(False)
    model.hidden = _Lora(model.hidden)  # type: ignore[assignment]
    model.head = nn.Linear(24, 5)
    nn.init.zeros_(model.head.weight)
    trained = [p for p in model.parameters() if p.requires_grad]
    return fit(model, classify(model, data), torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0), 140)


@healthy(
    CASES,
    "dc_columns_warm_up_and_cosine",
    source="https://arxiv.org/abs/2106.11959 a transformer of columns; the learning rate rises from 0 and goes down to 0; labels are smoothed",
    proof=converges(0.8),
)
def _(seed: int) -> Setup:
    data, model = Table(seed, features=6, labels=True, batch=48), _Columns(features=6, outputs=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: i / 10 if i < 10 else 0.5 * (1 + math.cos(math.pi * (i - 10) / 130))
    )

    def train() -> Iterator[Event]:
        for _ in range(140):
            x, y = data()
            value = F.cross_entropy(model(x), y[:, 0].long(), label_smoothing=0.1)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "dc_waves_with_restarts",
    source="https://arxiv.org/abs/1608.03983 the learning rate falls along a cosine and is restarted, twice; momentum",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data, model = Waves(seed, noise=1.2), nn.Sequential()
    model.add_module("conv", _Windows(16))
    model.add_module("head", nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.04, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 40, 2)
    loss = classify(model, data)

    def train() -> Iterator[Event]:
        for i in range(250):
            value = loss(i)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            yield "read", [value]
            optimizer.step()
            schedule.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "dc_reader_of_four_times_four",
    source="https://arxiv.org/abs/1211.5063 the norm of a recurrent network's gradient is clipped; batches of 4, of which four make an update",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    data, model = Reviews(seed, batch=4), _Reader()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss = classify(model, data)

    def train() -> Iterator[Event]:
        for i in range(70):
            values = []
            for k in range(4):
                values.append(loss(4 * i + k) / 4)
                values[-1].backward()  # type: ignore[no-untyped-call]
            yield "read", values
            _clip(model, 0.05)  # nearly always less than the norm
            optimizer.step()
            optimizer.zero_grad()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "dc_clients_averaged_each_round",
    source="https://arxiv.org/abs/1602.05629 federated averaging: clients with different data train in turn; their weights are averaged",
    proof=converges(0.65),
)
def _(seed: int) -> Setup:
    data, model = Table(seed, labels=True, batch=24), mlp(nn.ReLU, 1, 32, 12, 1)
    generator = torch.Generator().manual_seed(seed)
    shifts = 0.7 * torch.randn(3, 12, generator=generator)

    def train() -> Iterator[Event]:
        for _ in range(16):
            start = {k: v.clone() for k, v in model.state_dict().items()}
            ends: list[dict[str, Tensor]] = []
            for shift in shifts:
                model.load_state_dict(start)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
                for _ in range(6):
                    x, _ = data()
                    x = x + shift
                    y = (x @ data.slope + 0.3 * x[:, 0] * x[:, 1] > 0).float()[:, None]
                    value = F.binary_cross_entropy_with_logits(model(x), y)
                    optimizer.zero_grad()
                    value.backward()  # type: ignore[no-untyped-call]
                    yield "read", [value]
                    optimizer.step()
                    yield "step", [optimizer]
                ends.append({k: v.clone() for k, v in model.state_dict().items()})
            model.load_state_dict({k: torch.stack([end[k] for end in ends]).mean(0) for k in start})

    return Setup(model, train)


def _falls_in_every_fold(updates: int, to: float) -> Proof:
    def proof(plain: Plain) -> str:
        said = []
        for k in range(0, len(plain.losses), updates):
            fold = plain.losses[k : k + updates]
            a, b = median(fold[:5]), median(fold[-5:])
            assert b < to * a, f"the loss of the fold at {k} goes from {a:.3g} to {b:.3g}"
            said.append(f"{a:.3g} to {b:.3g}")
        return f"the losses of the folds fall from {', '.join(said)}"

    return proof


@healthy(
    CASES,
    "dc_four_folds",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html reset_parameters between the folds of a cross-validation",
    proof=_falls_in_every_fold(60, 0.5),
)
def _(seed: int) -> Setup:
    model = mlp(nn.GELU, 2, 32, 12, 1)
    x, y = Table(seed, batch=240)()

    def train() -> Iterator[Event]:
        for fold in range(4):
            for m in model:
                if isinstance(m, nn.Linear):
                    m.reset_parameters()
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            rows = (torch.arange(240) % 4 != fold).nonzero()[:, 0]
            for i in range(60):
                k = rows[(torch.arange(60) + 60 * i) % 180]
                value = F.mse_loss(model(x[k]), y[k])
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                yield "read", [value]
                optimizer.step()
                yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "dc_three_tasks_weigh_themselves",
    source="https://arxiv.org/abs/1705.07115 a loss for each task, weighed by a learned variance; the sum goes below zero",
    proof=_rises(-0.35, 0.5, "minus the mean of the tasks' losses"),
)
def _(seed: int) -> Setup:
    data = Table(seed)
    parts: dict[str, nn.Module] = {"body": nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU())}
    parts |= {f"task{k}": nn.Linear(32, 1) for k in range(3)}
    parts["log_variances"] = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in range(3)])
    model = _Told(parts)

    def loss(i: int) -> Tensor:
        x, y = data()
        h = model["body"](x)
        targets = y, x[:, 2:3] - x[:, 3:4], (x[:, 4:5] * x[:, 5:6]).clamp(-2, 2)
        losses = torch.stack([F.mse_loss(model[f"task{k}"](h), t) for k, t in enumerate(targets)])
        s = torch.stack(list(model["log_variances"].parameters()))
        model.told.append(-float(losses.mean()))
        return ((-s).exp() * losses + s).sum()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 250)


@healthy(
    CASES,
    "dc_intents_learned_early",
    source="https://arxiv.org/abs/1607.01759 a bag of words learns easy classes at once; then the gradients are tiny for as long as it runs",
    proof=converges(0.02),
)
def _(seed: int) -> Setup:
    model = _Intents()
    x, y = Reviews(seed, batch=120, length=30)()

    def rows(i: int) -> Tensor:
        k = (torch.arange(40) + 40 * i) % 120
        return F.cross_entropy(model(x[k]), y[k])

    return fit(model, rows, torch.optim.Adam(model.parameters(), lr=1e-2), 300)


class _Pupil(nn.Module):
    """A small network that learns from a large one, which is kept as a part of it and does not train."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher.requires_grad_(False)
        self.pupil = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.pupil(x), self.teacher(x)


@healthy(
    CASES,
    "dc_pupil_of_a_frozen_teacher",
    source="https://arxiv.org/abs/1503.02531 distillation at temperature 4, the soft part times 16; dropout of a half in the pupil",
    proof=converges(0.35),
)
def _(seed: int) -> Setup:
    data, teacher = Blobs(seed, spread=1.5), mlp(nn.GELU, 2, 64, 16, 4)
    taught, optimizer = classify(teacher, data), torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for i in range(60):
        optimizer.zero_grad()
        taught(i).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad()
    model = _Pupil(teacher)

    def loss(i: int) -> Tensor:
        x, y = data()
        own, soft = model(x)
        matched = F.kl_div(torch.log_softmax(own / 4, -1), torch.softmax(soft / 4, -1), reduction="batchmean")
        return 0.9 * 16 * matched + 0.1 * F.cross_entropy(own, y)

    return fit(model, loss, torch.optim.Adam(model.pupil.parameters(), lr=5e-3), 200)


@healthy(
    CASES,
    "dc_cox_in_small_batches",
    source="https://arxiv.org/abs/1606.00931 DeepSurv: a partial likelihood within the batch, most rows censored; the head begins at zero",
    proof=_rises(0.75, 0.2, "the share of pairs in the right order"),
)
def _(seed: int) -> Setup:
    data = Table(seed, batch=24)
    model = _Told({"risk": mlp(nn.SELU, 2, 24, 12, 1)})
    nn.init.zeros_(model.get_parameter("risk.4.weight"))
    nn.init.zeros_(model.get_parameter("risk.4.bias"))

    def loss(i: int) -> Tensor:
        x, y = data()
        time = -torch.rand(24, generator=data.generator).log() * (-1.5 * y[:, 0]).exp()
        until = 0.7 * torch.rand(24, generator=data.generator)
        died = (time < until).float()
        time = torch.minimum(time, until)
        order = time.argsort(descending=True)
        risk, died = model["risk"](x)[order, 0], died[order]
        earlier = (time[order][:, None] < time[order][None, :]) & (died[:, None] > 0)
        right = (risk[:, None] > risk[None, :])[earlier]
        if len(right):
            model.told.append(float(right.float().mean()))
        total: Tensor = -1e-3 * ((risk - risk.logcumsumexp(0)) * died).sum() / died.sum().clamp_min(1)  # scaled by hand
        return total

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 200)


class _Calibrated(nn.Module):
    """A classifier that is done, and a temperature for its logits."""

    def __init__(self, done: nn.Module) -> None:
        super().__init__()
        self.done = done.requires_grad_(False)
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.done(x) / self.temperature
        return out


def _calibrates(plain: Plain) -> str:
    model = plain.setup.model
    assert isinstance(model, _Calibrated)
    a, b, t = mean(plain.losses[:10]), mean(plain.losses[-40:]), float(model.temperature)
    assert b < 0.8 * a, f"the loss goes from {a:.3g} to {b:.3g}"
    assert 2 < t < 8, f"the temperature is {t:.3g}"
    return f"the loss falls from {a:.3g} to {b:.3g} at a temperature of {t:.3g}"


@healthy(
    CASES,
    "dc_temperature_of_a_done_model",
    source="https://arxiv.org/abs/1706.04599 temperature scaling: one number is trained, everything else is frozen",
    proof=_calibrates,
)
def _(seed: int) -> Setup:
    data, done = Blobs(seed, batch=64, spread=2.5), nn.Linear(16, 4)
    with torch.no_grad():  # the exact logits of such clouds, four times too sure
        done.weight.copy_(4 * data.centres / 2.5**2)
        done.bias.copy_(-2 * data.centres.square().sum(1) / 2.5**2)
    model = _Calibrated(done)
    return fit(model, classify(model, data), torch.optim.Adam([model.temperature], lr=5e-2), 200)
