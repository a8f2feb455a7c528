"""Runs of signals: series, sound, tables, graphs, sensors and physics, sick and healthy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, Event, Proof, Setup, fit, healthy, initialise, sick
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


class Waves:
    """Windows of noisy two-tone series, standardised, and the values that follow them: `[batch, length]`, `[batch, ahead]`."""

    def __init__(self, seed: int, batch: int = 32, length: int = 24, ahead: int = 1, noise: float = 0.1) -> None:
        self.generator = torch.Generator().manual_seed(4000 + seed)
        self.batch, self.length, self.ahead, self.noise = batch, length, ahead, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        phase = 6.2832 * torch.rand(self.batch, 2, generator=self.generator)
        t = torch.arange(self.length + self.ahead)
        series = torch.sin(0.5 * t + phase[:, :1]) + 0.7 * torch.sin(0.21 * t + phase[:, 1:])
        series = (series + self.noise * torch.randn(series.shape, generator=self.generator)) / 0.87
        return series[:, : self.length], series[:, self.length :]


class Table:
    """Rows of standardised columns and a target, of mean 0 and a variance near 1, that depends on a few of them."""

    def __init__(self, seed: int, columns: int = 12, batch: int = 64, noise: float = 0.1) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.columns, self.batch, self.noise = columns, batch, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, self.columns, generator=self.generator)
        y = 0.7 * x[:, 0] - 0.5 * x[:, 1] + 0.5 * torch.sin(2 * x[:, 2]) + 0.3 * x[:, 3] * x[:, 4]
        return x, y + self.noise * torch.randn(self.batch, generator=self.generator)


class Tones:
    """Sound clips `[batch, samples]` of one of some pitches in noise, with the index of the pitch."""

    def __init__(self, seed: int, batch: int = 24, samples: int = 256, classes: int = 5, noise: float = 0.3) -> None:
        self.generator = torch.Generator().manual_seed(6000 + seed)
        self.batch, self.samples, self.classes, self.noise = batch, samples, classes, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(self.classes, (self.batch,), generator=self.generator)
        phase = 6.2832 * torch.rand(self.batch, 1, generator=self.generator)
        t = torch.arange(self.samples)
        wave = 1.3 * torch.sin((0.2 + 0.25 * y[:, None]) * t + phase)
        return wave + self.noise * torch.randn(wave.shape, generator=self.generator), y


class Communities:
    """A fixed graph of communities: node features, normalised adjacency (dense), and the community of each node."""

    def __init__(self, seed: int, nodes: int = 60, groups: int = 3, features: int = 12) -> None:
        g = torch.Generator().manual_seed(7000 + seed)
        self.y = torch.arange(nodes) % (groups + 2) % groups
        same = self.y[:, None] == self.y[None]
        edges = (torch.rand(nodes, nodes, generator=g) < torch.where(same, 0.25, 0.03)).float().triu(1)
        a = edges + edges.T + torch.eye(nodes)
        d = a.sum(1).rsqrt()
        self.a = d[:, None] * a * d
        self.x = torch.randn(groups, features, generator=g)[self.y] + torch.randn(nodes, features, generator=g)


class GraphConv(nn.Module):
    """A linear map and the mean over neighbours."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lin = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        return a @ self.lin(x)  # type: ignore[no-any-return]


def regress(model: nn.Module, data: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[int], Tensor]:
    """Squared error on a fresh batch an update."""

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x).reshape(y.shape), y)

    return loss


def shows(test: Callable[[Plain], tuple[bool, str]]) -> Proof:
    """A proof of one's own: whether it holds, and the words."""

    def proof(plain: Plain) -> str:
        holds, words = test(plain)
        assert holds, words
        return words

    return proof


def output_rms(module: str, above: float, last: int = 15) -> Proof:
    """The output of a module has a root mean square above a number in the first updates."""

    def test(plain: Plain) -> tuple[bool, str]:
        rms = median(o.rms for o in plain.outputs[module][:last] if o is not None)
        return rms > above, f"the output of {module or 'the model'} has the rms {rms:.3g} in the first {last} updates"

    return shows(test)


# Sick runs


@sick(
    CASES,
    "si_tcn_of_sigmoids",
    ("vanishing_gradient",),
    tuple(f"net.{i}" for i in range(16)),
    source="https://arxiv.org/abs/1803.01271 a temporal convolutional network, here deep, with sigmoids and no residual path",
    proof=every(
        gradient_ratio("net.0.weight", "head.weight", 1e-4, last=15),
        shows(lambda p: (median(p.losses[-15:]) > 0.8, f"the loss ends at {median(p.losses[-15:]):.3g}, the variance")),
    ),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers: list[nn.Module] = []
            for k in range(10):
                layers += [nn.Conv1d(12 if k else 1, 12, 3, padding=1), nn.Sigmoid()]
            self.net = nn.Sequential(*layers)
            self.head = nn.Linear(12, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net(x[:, None])[:, :, -1])  # type: ignore[no-any-return]

    model = initialise(Net(), nn.init.xavier_normal_, (nn.Conv1d, nn.Linear))
    return fit(model, regress(model, Waves(seed, batch=96)), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), updates=40)


@sick(
    CASES,
    "si_gcn_init_of_a_language_model",
    ("vanishing_gradient", "poor_init"),
    ("convs",),
    source="https://arxiv.org/abs/1609.02907 a graph convolutional network, here with a normal init of 0.01 at every layer",
    proof=every(gradient_ratio("convs.0.lin.weight", "convs.3.lin.bias", 1e-3, last=15), loss_stays(0.06)),
    also=("loss_plateau", "update_ratio_too_small"),
)
def _(seed: int) -> Setup:
    graph = Communities(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = [12, 24, 24, 24, 3]
            self.convs = nn.ModuleList(GraphConv(a, b) for a, b in itertools.pairwise(sizes))

        def forward(self, x: Tensor) -> Tensor:
            for k, conv in enumerate(self.convs):
                x = conv(x if k == 0 else F.relu(x), graph.a)
            return x

    model = Net()
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.01)
        else:
            nn.init.zeros_(p)
    return fit(
        model, lambda i: F.cross_entropy(model(graph.x), graph.y), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 50
    )


@sick(
    CASES,
    "si_deeponet_bare_randn",
    ("poor_init",),
    ("branch", "trunk"),
    source="https://arxiv.org/abs/1910.03193 DeepONet, here with weights of torch.randn(n, m) that nobody scales",
    proof=every(
        output_rms("branch.2", 20),
        output_rms("branch.4", 100),
        shows(lambda p: (p.losses[0] > 1e4, f"the first loss is {p.losses[0]:.3g}")),
    ),
    also=("exploding_gradient", "loss_diverging"),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
            self.trunk = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))

        def forward(self, u: Tensor, t: Tensor) -> Tensor:
            return (self.branch(u) * self.trunk(t)).mean(-1)  # type: ignore[no-any-return]

    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) if p.ndim == 2 else torch.zeros(p.shape))

    def loss(i: int) -> Tensor:
        c = torch.randn(48, 3, generator=g)
        grid, t = torch.linspace(-1, 1, 20), 2 * torch.rand(48, 1, generator=g) - 1
        u = c[:, :1] + c[:, 1:2] * grid + c[:, 2:] * grid**2
        y = c[:, :1] * t + c[:, 1:2] * t**2 / 2 + c[:, 2:] * t**3 / 3
        return F.mse_loss(model(u, t), y[:, 0])

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), updates=40)


class _Quantise(torch.autograd.Function):
    """Rounds to sixteenths; its backward forgets that the forward divided again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(16 * x) / 16

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 16 * grad


class Quantise(nn.Module):
    """A layer for it."""

    def forward(self, x: Tensor) -> Tensor:
        return _Quantise.apply(x)  # type: ignore[no-any-return, no-untyped-call]


@sick(
    CASES,
    "si_straight_through_times_sixteen",
    ("exploding_gradient",),
    (*(f"net.{i}" for i in range(9)), "net.11"),
    source="https://arxiv.org/abs/1308.3432 the straight-through estimator, here with the scale of the quantiser left in the backward",
    proof=gradient_ratio("net.12.weight", "net.0.weight", 1e-3, last=15),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    layers: list[nn.Module] = []
    for k in range(4):
        layers += [nn.Linear(32 if k else 24, 32), nn.Tanh(), Quantise()]
    model = nn.Module()
    model.net = nn.Sequential(*layers, nn.Linear(32, 1))
    data = Waves(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model.net(x), y)  # type: ignore[operator]

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05), updates=50, between=clip)


@sick(
    CASES,
    "si_missing_value_code_in_one_window",
    ("gradient_spike", "loss_spike"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html what guards against one bad batch: "
    "here the code -9999 of a dead sensor",
    proof=every(
        gradient_spikes(40, 50),
        shows(lambda p: (p.losses[40] > 50 * median(p.losses[20:40]), f"loss {p.losses[40]:.3g} after {p.losses[39]:.3g}")),
        shows(lambda p: (p.losses[-1] < 0.5 * p.losses[0], f"it learns on: {p.losses[0]:.3g} to {p.losses[-1]:.3g}")),
    ),
    onset=40,
    also=("unnormalized_input",),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 1))
    data = Waves(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 40:
            x[3, 5:9] = -9999 / 25.0  # the scaler divides by the deviation of the good values
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=70)


@sick(
    CASES,
    "si_log_of_digital_silence",
    ("non_finite_activation",),
    ("logmel",),
    source="https://github.com/SeanNaren/deepspeech.pytorch/issues/272 a clip of zeros makes the loss NaN",
    proof=every(first_non_finite(25, "logmel"), first_non_finite(25)),
    onset=25,
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int) -> Setup:
    class LogMel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            power = torch.fft.rfft(x.unfold(1, 32, 16) * torch.hann_window(32), dim=-1).abs().square()
            return torch.log(power).transpose(1, 2) / 3

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logmel = LogMel()
            self.conv = nn.Conv1d(17, 24, 3, padding=1)
            self.norm = nn.BatchNorm1d(24)
            self.head = nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.norm(self.conv(self.logmel(x)))).mean(2))  # type: ignore[no-any-return]

    model, data = Net(), Tones(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 25:
            x[7] = 0.0
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=45)


@sick(
    CASES,
    "si_distance_of_equal_windows",
    ("non_finite_gradient",),
    ("encoder",),
    source="https://github.com/pytorch/pytorch/pull/2775 x.pow(2).sum().sqrt() has the gradient NaN at 0",
    proof=every(
        shows(lambda p: (all(math.isfinite(x) for x in p.losses[:21]), "every loss to 20 is finite")), first_non_finite(20)
    ),
    onset=20,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
)
def _(seed: int) -> Setup:
    model = nn.Module()
    model.encoder = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8))
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 24, generator=g)

    def loss(i: int) -> Tensor:
        y = torch.randint(6, (32,), generator=g)
        a = centres[y] + 0.5 * torch.randn(32, 24, generator=g)
        b = centres[y] + 0.5 * torch.randn(32, 24, generator=g)
        if i == 20:
            b[4] = a[4]  # the sampler drew the anchor itself as its positive
        ea, eb = model.encoder(a), model.encoder(b)  # type: ignore[operator]
        near = (ea - eb).pow(2).sum(1).sqrt()
        far = (ea - eb.roll(1, 0)).pow(2).sum(1).sqrt()
        return F.relu(near - far + 1.0)[y != y.roll(1, 0)].mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), updates=40)


@sick(
    CASES,
    "si_gamma_deviance_of_no_claim",
    ("non_finite_loss",),
    source="https://scikit-learn.org/stable/modules/model_evaluation.html mean Gamma deviance asks for targets above zero",
    proof=every(
        first_non_finite(18),
        shows(lambda p: (p.losses[18] == math.inf and not any(c[18] for c in p.nonfinite.values()), "loss inf, gradients finite")),
    ),
    onset=18,
)
def _(seed: int) -> Setup:
    model, data = nn.Sequential(nn.Linear(12, 24), nn.SiLU(), nn.Linear(24, 1)), Table(seed)

    def loss(i: int) -> Tensor:
        x, z = data()
        claims = torch.exp(0.8 * z)
        if i >= 18 and i % 3 == 0:
            claims[::9] = 0.0  # policies without a claim come in with the second file
        eta = model(x)[:, 0]
        return 2 * (eta - torch.log(claims) + (claims - eta.exp()) * torch.exp(-eta)).mean()  # type: ignore[no-any-return]

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=45)


@sick(
    CASES,
    "si_unit_length_of_the_padding_row",
    ("non_finite_weight",),
    ("items",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.Embedding.html the row of padding_idx is zeros: here it is "
    "divided by its length",
    proof=shows(
        lambda p: (
            all(math.isfinite(w) for w in p.weights["items.weight"][:10])
            and all(math.isfinite(w[10]) == (n != "items.weight") for n, w in p.weights.items()),
            "items.weight is the only weight with a NaN before the step of update 10, and good before",
        )
    ),
    onset=10,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient"),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(41, 16, padding_idx=0)
            self.tower = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 41))

        def forward(self, history: Tensor) -> Tensor:
            mask = (history > 0).float()[:, :, None]
            return self.tower((self.items(history) * mask).sum(1) / mask.sum(1))  # type: ignore[no-any-return]

    model = Net()

    def loss(i: int) -> Tensor:
        taste = torch.randint(4, (32, 1), generator=g)
        history = 1 + taste * 10 + torch.randint(10, (32, 6), generator=g)
        history[torch.rand(32, 6, generator=g).cumsum(1) > 3] = 0
        return F.cross_entropy(model(history), 1 + taste[:, 0] * 10 + torch.randint(10, (32,), generator=g))

    def renorm(i: int) -> None:
        if i == 10:  # after the first epoch of ten updates
            with torch.no_grad():
                model.items.weight.div_(model.items.weight.norm(dim=1, keepdim=True))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-2), updates=30, before=renorm)


@sick(
    CASES,
    "si_prior_bias_at_the_wrong_layer",
    ("dead_units",),
    ("2", "3"),
    source="https://arxiv.org/abs/1708.02002 the bias of the last layer starts at the log-odds of the prior: here that of the layer before",
    proof=every(dead_fraction("3", 0.95, last=15), shows(lambda p: (p.outputs["1"][0].zeros < 0.8, "the layer before fires"))),  # type: ignore[union-attr]
    also=("zero_gradient", "poor_init", "vanishing_gradient", "frozen_weights", "update_ratio_too_small", "loss_plateau"),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    nn.init.constant_(model[-3].bias, -math.log(0.95 / 0.05))  # type: ignore[arg-type]
    data = Table(seed, batch=256)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.binary_cross_entropy_with_logits(model(x)[:, 0], (y > 1.7).float())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=80)


@sick(
    CASES,
    "si_tanh_autoencoder_unit_normal",
    ("saturated_activation", "poor_init"),
    ("0", "1", "2", "3"),
    source="https://proceedings.mlr.press/v9/glorot10a.html saturation of tanh layers by their initialisation",
    proof=shows(
        lambda p: (
            min(o.rms for m in ("1", "3") for o in p.outputs[m][:15] if o is not None) > 0.9
            and min(o.rms for m in ("0", "2") for o in p.outputs[m][:15] if o is not None) > 6,
            "the inputs of both tanh have an rms above 6, their outputs above 0.9",
        )
    ),
    also=("exploding_gradient",),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 64))
    for k in (0, 2):
        nn.init.normal_(model[k].weight)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(6, 64, generator=g) / 6**0.5

    def loss(i: int) -> Tensor:
        x = torch.randn(48, 6, generator=g) @ basis + 0.2 * torch.randn(48, 64, generator=g)
        return F.mse_loss(model(x), x)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), updates=50)


@sick(
    CASES,
    "si_static_covariates_never_called",
    ("missing_gradient",),
    ("static",),
    source="https://arxiv.org/abs/1912.09363 static covariate encoders: here built, and left out of the forward",
    proof=every(no_gradient("static.0.weight", "static.2.weight"), converges(0.7)),
)
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.static = nn.Sequential(nn.Linear(3, 16), nn.ELU(), nn.Linear(16, 16))
            self.gru = nn.GRU(1, 16, batch_first=True)
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor, s: Tensor) -> Tensor:
            return self.head(self.gru(x[:, :, None])[0][:, -1])  # type: ignore[no-any-return]

    model, data = Net(), Waves(seed, length=12, ahead=4)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x, x[:, :3]), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-2), updates=60)


@sick(
    CASES,
    "si_user_tower_of_the_index_builder",
    ("missing_gradient",),
    ("user",),
    source="https://arxiv.org/abs/1708.05031 two towers of embeddings: here the users' runs under no_grad, as when the index is built",
    proof=every(
        no_gradient("user.0.weight", "user.2.weight", "user.2.bias"),
        shows(lambda p: (min(p.grads["item.0.weight"]) > 0, "the other tower has one")),
    ),
)
def _(seed: int) -> Setup:
    model = nn.ModuleDict({k: nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16)) for k in ("user", "item")})
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, 12, generator=g) / 12**0.5

    def loss(i: int) -> Tensor:
        u = torch.randn(32, 12, generator=g)
        v = u @ mix + 0.3 * torch.randn(32, 12, generator=g)
        with torch.no_grad():
            query = model["user"](u)
        return F.cross_entropy(query @ model["item"](v).T, torch.arange(32))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=40)


class Attention(nn.Module):
    """One head, in plain torch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / x.shape[-1] ** 0.5
        return torch.softmax(scores, -1) @ self.v(x)  # type: ignore[no-any-return]


@sick(
    CASES,
    "si_attention_over_one_step",
    ("zero_gradient",),
    ("attention.q", "attention.k"),
    source="https://arxiv.org/abs/1706.03762 attention, here over a sequence of one: the window became the feature dimension",
    proof=every(
        zero_gradient("attention.q.weight", "attention.k.weight", "attention.q.bias"),
        shows(lambda p: (min(p.grads["attention.v.weight"]) > 0, "v has a gradient")),
        converges(0.6),
    ),
)
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(24, 32)
            self.attention = Attention(32)
            self.norm = nn.LayerNorm(32)
            self.head = nn.Linear(32, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x[:, None, :])
            return self.head(self.norm(h + self.attention(h)))[:, 0]  # type: ignore[no-any-return]

    model = Net()
    return fit(model, regress(model, Waves(seed)), torch.optim.AdamW(model.parameters(), lr=2e-3), updates=50)


@sick(
    CASES,
    "si_demand_rounded_before_the_loss",
    ("zero_gradient",),
    ("demand",),
    source="https://discuss.pytorch.org/t/torch-round-gradient/28628/4 the gradient of torch.round is zero",
    proof=every(
        zero_gradient("demand.0.weight", "demand.2.weight", "demand.2.bias"),
        shows(lambda p: (min(p.grads["trunk.0.weight"]) > 0, "the trunk has a gradient, from the other head")),
    ),
    also=("frozen_weights",),
)
def _(seed: int) -> Setup:
    model = nn.ModuleDict(
        {
            "trunk": nn.Sequential(nn.Linear(12, 32), nn.ReLU()),
            "demand": nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1), nn.Softplus()),
            "sold_out": nn.Linear(32, 1),
        }
    )
    data = Table(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        h = model["trunk"](x)
        units = torch.round(model["demand"](h))[:, 0]
        out = F.binary_cross_entropy_with_logits(model["sold_out"](h)[:, 0], (y > 0.5).float())
        return out + 0.2 * F.smooth_l1_loss(units, torch.floor(torch.exp(0.7 * y)))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=45)


@sick(
    CASES,
    "si_second_optimizer_never_zeroed",
    ("gradients_not_zeroed",),
    ("decoder",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.zero_grad.html here called for one of two optimizers",
    proof=shows(
        lambda p: (
            p.grads["decoder.2.bias"][12] > 4 * p.grads["decoder.2.bias"][0]
            and p.grads["encoder.weight"][12] < 4 * p.grads["encoder.weight"][0],
            f"decoder.2.bias: its gradient goes from {p.grads['decoder.2.bias'][0]:.3g} to {p.grads['decoder.2.bias'][12]:.3g}",
        )
    ),
)
def _(seed: int) -> Setup:
    model = nn.Module()
    model.encoder = nn.Linear(24, 16)
    model.decoder = nn.Sequential(nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 4))
    first = torch.optim.SGD(model.encoder.parameters(), lr=0.02)
    second = torch.optim.SGD(model.decoder.parameters(), lr=0.002)
    data = Waves(seed, ahead=4)

    def train() -> Iterator[Event]:
        for _ in range(40):
            first.zero_grad()
            x, y = data()
            loss = F.mse_loss(model.decoder(model.encoder(x)), y + 0.5)  # type: ignore[operator]
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            first.step()
            second.step()
            yield "step", [first, second]

    return Setup(model, train)


@sick(
    CASES,
    "si_zero_grad_at_the_epoch",
    ("gradients_not_zeroed",),
    source="https://pytorch.org/tutorials/recipes/recipes/zeroing_out_gradients.html gradients add up: here they are zeroed once an "
    "epoch, outside the loop over batches",
    proof=shows(
        lambda p: (
            all(p.grads["3.bias"][k + 6] > 3 * p.grads["3.bias"][k] for k in (0, 20)),
            f"the gradient of 3.bias goes from {p.grads['3.bias'][20]:.3g} to {p.grads['3.bias'][26]:.3g} within an epoch",
        )
    ),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(12, 32), nn.SiLU(), nn.Dropout(0.1), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-3)
    data = Table(seed)

    def train() -> Iterator[Event]:
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(20):
                x, y = data()
                loss = F.mse_loss(model(x)[:, 0], y + 2)
                loss.backward()  # type: ignore[no-untyped-call]
                yield "read", [loss]
                optimizer.step()
                yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "si_graph_layers_in_a_python_list",
    ("not_in_optimizer",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.ModuleList.html modules in a plain list are not registered",
    proof=shows(
        lambda p: (
            not any("layers" in n for n in p.grads)
            and all(float(layer.lin.weight.grad.norm()) > 0 for layer in p.setup.model.layers)  # type: ignore[union-attr]
            and all(torch.equal(layer.lin.weight, w) for layer, w in zip(p.setup.model.layers, p.setup.model.born, strict=True)),  # type: ignore[arg-type, union-attr]
            "the layers of the list have gradients, are no parameters of the model, and keep their first weights",
        )
    ),
)
def _(seed: int) -> Setup:
    graph = Communities(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(12, 24)
            self.layers = [GraphConv(24, 24) for _ in range(3)]
            self.born = [layer.lin.weight.detach().clone() for layer in self.layers]  # for the proof
            self.head = nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            for layer in self.layers:
                h = h + F.relu(layer(h, graph.a))
            return self.head(h)  # type: ignore[no-any-return]

    model = Net()
    return fit(model, lambda i: F.cross_entropy(model(graph.x), graph.y), torch.optim.Adam(model.parameters(), lr=5e-3), 40)


@sick(
    CASES,
    "si_catalogue_grown_after_the_optimizer",
    ("not_in_optimizer",),
    ("items",),
    source="https://docs.pytorch.org/docs/stable/optim.html an optimizer holds the parameters that it was given: here the table of "
    "items is replaced by a larger one afterwards",
    proof=every(
        shows(
            lambda p: (
                min(p.grads["items.weight"]) > 0 and max(p.steps["items.weight"]) == 0 and min(p.steps["user.weight"]) > 0,
                "items.weight has a gradient in every update and never moves, user.weight does",
            )
        ),
    ),
    also=("frozen_weights",),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.items = nn.Embedding(40, 12)
            self.user = nn.Linear(10, 12)

        def forward(self, u: Tensor, i: Tensor) -> Tensor:
            return (self.user(u) * self.items(i)).sum(1) / 12**0.5  # type: ignore[no-any-return]

    model = Net()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    model.items = nn.Embedding(50, 12)
    tastes = torch.randn(50, 10, generator=g)

    def loss(i: int) -> Tensor:
        u, k = torch.randn(64, 10, generator=g), torch.randint(50, (64,), generator=g)
        return F.binary_cross_entropy_with_logits(model(u, k), ((u * tastes[k]).sum(1) > 0).float())

    return fit(model, loss, optimizer, updates=70)


@sick(
    CASES,
    "si_learning_rate_of_an_integer_division",
    ("frozen_weights",),
    source="https://arxiv.org/abs/1706.02677 the learning rate goes with the batch, lr * batch / 256: here with //, which makes it 0",
    proof=every(
        unchanged("gru.weight_ih_l0", "gru.weight_hh_l0", "head.weight", "head.bias"),
        shows(lambda p: (min(p.grads["head.weight"]) > 1e-2, "the head has gradients above 0.01")),
    ),
    also=("update_ratio_too_small", "loss_plateau"),
)
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(1, 24, batch_first=True)
            self.head = nn.Linear(24, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(x[:, :, None])[0][:, -1])  # type: ignore[no-any-return]

    model, batch = Net(), 48
    optimizer = torch.optim.SGD(model.parameters(), lr=0.8 * (batch // 256), momentum=0.9)
    return fit(model, regress(model, Waves(seed, batch=batch, length=12)), optimizer, updates=40)


@sick(
    CASES,
    "si_cleared_between_backward_and_step",
    ("frozen_weights",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.zero_grad.html here called after the backward and "
    "before the step",
    proof=unchanged("0.weight", "0.bias", "2.weight", "4.weight", "4.bias"),
    also=("update_ratio_too_small", "loss_plateau"),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(12, 32), nn.ELU(), nn.Linear(32, 32), nn.ELU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    data = Table(seed)

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, y = data()
            loss = F.huber_loss(model(x)[:, 0], y)
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            optimizer.zero_grad()
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "si_adam_lr_of_one_half",
    ("update_ratio_too_large", "loss_diverging"),
    source="https://arxiv.org/abs/1412.6980 Adam moves each weight by about its learning rate: here 0.5",
    proof=every(
        shows(
            lambda p: (
                max(p.update_ratio(k) for k in range(3)) > 1,
                f"the first update changes {p.update_ratio(0):.3g} of the weights",
            )
        ),
        loss_grows(20, last=15),
    ),
    also=("exploding_gradient", "dead_units", "loss_spike", "gradient_spike"),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(12, 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.LeakyReLU(), nn.Linear(64, 1))
    return fit(model, regress(model, Table(seed)), torch.optim.Adam(model.parameters(), lr=0.5), updates=40)


@sick(
    CASES,
    "si_learning_rate_minus_seven",
    ("update_ratio_too_small",),
    source="https://arxiv.org/abs/1506.01186 a learning rate far below the range that trains: here 1e-7 for 1e-3",
    proof=every(update_ratio(below=1e-5, last=15), loss_stays(0.15)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 256)),
        nn.Conv1d(1, 16, 16, 4),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(4),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    data = Tones(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-7), updates=60)


@sick(
    CASES,
    "si_ratings_maximised",
    ("loss_diverging", "exploding_gradient"),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html maximize=True, left from a script with rewards",
    proof=every(loss_grows(10, last=15), gradient_grows("items.weight", 5, 14)),
    also=("update_ratio_too_large",),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)
    tastes, traits = torch.randn(30, 4, generator=g), torch.randn(40, 4, generator=g)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.users, self.items = nn.Embedding(30, 8), nn.Embedding(40, 8)
            for table in (self.users, self.items):
                nn.init.normal_(table.weight, std=0.3)

        def forward(self, u: Tensor, i: Tensor) -> Tensor:
            return (self.users(u) * self.items(i)).sum(1)  # type: ignore[no-any-return]

    model = Net()

    def loss(i: int) -> Tensor:
        u, k = torch.randint(30, (256,), generator=g), torch.randint(40, (256,), generator=g)
        return F.mse_loss(model(u, k), (tastes[u] * traits[k]).sum(1) / 2)

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.7)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=4.0, maximize=True), updates=30, between=clip)


@sick(
    CASES,
    "si_target_of_the_wrong_shape",
    ("loss_plateau",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.MSELoss.html both shapes must be the same: [64, 1] and [64] broadcast, "
    "and the best answer to that is the mean",
    proof=every(loss_stays(0.1, last=100), loss_stays(0.1)),
)
def _(seed: int) -> Setup:
    model, data = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 1)), Table(seed, batch=192)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), updates=220)


@sick(
    CASES,
    "si_one_batch_in_other_units",
    ("loss_spike",),
    source="https://otexts.com/fpp3/accuracy.html errors that keep the scale of the data: here one file is in watts, all others in kilowatts",
    proof=every(
        shows(lambda p: (p.losses[45] > 100 * median(p.losses[25:45]), f"loss {p.losses[45]:.3g} after {p.losses[44]:.3g}")),
        shows(
            lambda p: (p.grads["2.weight"][45] < 10 * median(p.grads["2.weight"][25:45]), "its gradient is no larger than others")
        ),
    ),
    onset=45,
    also=("gradient_spike",),
)
def _(seed: int) -> Setup:
    model, data = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 1)), Waves(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.l1_loss(model(x), 1000 * y if i == 45 else y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=75)


@sick(
    CASES,
    "si_deviation_of_a_silent_channel",
    ("loss_scale_collapse", "non_finite_gradient"),
    source="https://github.com/pytorch/pytorch/issues/4320 the gradient of the deviation of a constant is NaN; with a GradScaler every step is "
    "skipped and the scale halves, as in https://github.com/lucidrains/stylegan2-pytorch/issues/100",
    proof=shows(
        lambda p: (
            all(c > 0 for c in p.nonfinite["conv.weight"])
            and all(math.isnan(s) for s in p.steps["head.weight"])
            and all(math.isfinite(x) for x in p.losses),
            "every gradient of conv.weight has a NaN, nothing moves, the losses are finite; 2**10 is below 1 after 11 skips",
        )
    ),
    also=("never_stepped",),
)
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 16, 16, 4, bias=False)
            self.head = nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.conv(x[:, None]))
            return self.head(torch.cat([h.mean(2), h.var(2).sqrt()], 1))  # type: ignore[no-any-return]

    model, data = Net(), Tones(seed)
    optimizer, scaler = torch.optim.Adam(model.parameters(), lr=3e-3), torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def train() -> Iterator[Event]:
        for _ in range(40):
            optimizer.zero_grad()
            x, y = data()
            x[5] = 0.0  # each batch has a clip of zeros
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            scaler.step(optimizer)
            scaler.update()
            yield "step", []

    return Setup(model, train)


@sick(
    CASES,
    "si_house_prices_in_raw_columns",
    ("unnormalized_input",),
    ("",),
    source="https://datascience.stackexchange.com/questions/39881/scaling-features-in-artificial-neural-networks why columns are scaled",
    proof=every(
        output_rms("0", 1000),
        shows(lambda p: (p.losses[0] > 1e4, f"the first loss is {p.losses[0]:.3g}, the target has variance 1")),
    ),
    also=("loss_diverging", "loss_spike", "gradient_spike", "exploding_gradient", "dead_units", "loss_plateau"),
)
def _(seed: int) -> Setup:
    model, data = nn.Sequential(nn.Linear(12, 32), nn.LeakyReLU(), nn.Linear(32, 1)), Table(seed)
    scale = torch.tensor([2.0e4, 12.0, 900.0, 1.5, 3.0, 4000.0, 0.2, 1.0, 60.0, 0.5, 5.0, 1.0])
    middle = torch.tensor([6.0e4, 40.0, 2100.0, 3.0, 1985.0, 9000.0, 47.5, -122.0, 98000.0, 0.5, 7.0, 2.0])

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(middle + scale * x)[:, 0], y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=50)


@sick(
    CASES,
    "si_keyword_spotter_with_a_softmax",
    ("double_softmax",),
    ("softmax",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html wants logits: here it gets probabilities",
    proof=shows(
        lambda p: (
            all(o.low >= 0 and o.high <= 1 for o in p.outputs[""] if o is not None)
            and min(p.losses) > math.log(1 + 4 / math.e) - 1e-4,
            f"the output lies within 0 and 1, and the loss above {math.log(1 + 4 / math.e):.3g}, the least there is",
        )
    ),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 16, 16, 4)
            self.norm = nn.BatchNorm1d(16)
            self.head = nn.Linear(32, 5)
            self.softmax = nn.Softmax(dim=1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.norm(self.conv(x[:, None])))
            return self.softmax(self.head(torch.cat([h.mean(2), h.amax(2)], 1)))  # type: ignore[no-any-return]

    model, data = Net(), Tones(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=60)


@sick(
    CASES,
    "si_every_weight_the_same",
    ("poor_init",),
    ("0", "2", "4"),
    source="https://www.deeplearningbook.org/contents/optimization.html 8.4: units with the same weights stay the same for ever",
    proof=shows(
        lambda p: (
            bool((p.setup.model[0].weight - p.setup.model[0].weight[:1]).abs().max() < 1e-5),  # type: ignore[index, operator]
            "at the end all units of the first layer have the same weights",
        )
    ),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    for p in model.parameters():
        nn.init.constant_(p, 0.05)
    return fit(model, regress(model, Table(seed)), torch.optim.Adam(model.parameters(), lr=3e-3), updates=60)


@sick(
    CASES,
    "si_accumulation_longer_than_the_epoch",
    ("never_stepped",),
    source="https://docs.pytorch.org/docs/stable/notes/amp_examples.html gradient accumulation: here of 8 batches, in epochs of 6 that "
    "start by zeroing",
    proof=shows(
        lambda p: (
            all(math.isnan(s) for s in p.steps["0.weight"]) and len(set(p.weights["0.weight"])) == 1,
            "no step, and the norm of 0.weight never changes",
        )
    ),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(12, 32), nn.Mish(), nn.Linear(32, 1))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    data = Table(seed, batch=32)

    def train() -> Iterator[Event]:
        for _ in range(8):
            optimizer.zero_grad()
            for k in range(6):
                x, y = data()
                loss = F.mse_loss(model(x)[:, 0], y) / 8
                loss.backward()  # type: ignore[no-untyped-call]
                yield "read", [loss]
                if (k + 1) % 8 == 0:
                    optimizer.step()
                    optimizer.zero_grad()
                    yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "si_gap_in_the_sensor_log",
    ("non_finite_input",),
    ("",),
    source="https://www.baeldung.com/cs/ml-training-nan-errors-fix a missing value is read as NaN and goes into the first layer",
    proof=every(
        first_non_finite(30, "0"),
        first_non_finite(30),
        shows(lambda p: (p.losses[29] < 0.5 * p.losses[0], "it learns until then")),
    ),
    onset=30,
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(24, 32), nn.Softplus(), nn.Linear(32, 3))
    data = Waves(seed, ahead=3)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i >= 30:
            x[i % 32, 7:11] = math.nan
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), updates=45)


# Healthy runs


def quality(test: Callable[[Plain], tuple[bool, str]]) -> Proof:
    """A measure of the trained model; every loss and gradient of the run is finite."""

    def wrapped(plain: Plain) -> tuple[bool, str]:
        if not all(math.isfinite(x) for x in plain.losses) or any(any(c) for c in plain.nonfinite.values()):
            return False, "a loss or a gradient is not finite"
        with torch.no_grad():
            return test(plain)

    return shows(wrapped)


@healthy(
    CASES,
    "si_ok_fraud_at_two_percent",
    source="https://arxiv.org/abs/1708.02002 focal loss and a prior bias for rare positives, at the last layer as it should be",
    proof=every(
        converges(0.45),
        quality(
            lambda p: (
                (auc := p.setup.model.score()) > 0.9,  # type: ignore[union-attr, operator]
                f"area under the curve {auc:.3f}",
            )
        ),
    ),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)
    way = torch.randn(20, generator=g)
    way = way / way.norm()

    def batch(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, 20, generator=g)
        y = (torch.rand(n, generator=g) < 0.02).float()
        return x + 2.5 * y[:, None] * way, y

    class Net(nn.Sequential):
        def score(self) -> float:
            x, y = batch(4000)
            s = self(x)[:, 0]
            return float((s[y == 1][:, None] > s[y == 0][None]).float().mean())

    model = Net(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    nn.init.constant_(model[-1].bias, -math.log(0.98 / 0.02))  # type: ignore[arg-type]

    def loss(i: int) -> Tensor:
        x, y = batch(256)
        z = model(x)[:, 0]
        p = torch.sigmoid(z)
        weight = y * (1 - p) ** 2 + (1 - y) * p**2
        return (weight * F.binary_cross_entropy_with_logits(z, y, reduction="none")).mean()  # some batches hold a positive or two

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), updates=250)


@healthy(
    CASES,
    "si_ok_bpr_with_sparse_tables",
    source="https://arxiv.org/abs/1205.2618 Bayesian personalised ranking, with sparse embeddings whose long tail is hardly ever drawn",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.users = nn.Embedding(400, 16, sparse=True)
            self.items = nn.Embedding(900, 16, sparse=True)
            for table in (self.users, self.items):
                nn.init.normal_(table.weight, std=0.1)

        def forward(self, u: Tensor, good: Tensor, bad: Tensor) -> Tensor:
            return (self.users(u) * (self.items(good) - self.items(bad))).sum(1)  # type: ignore[no-any-return]

    model = Net()

    def items(n: int) -> Tensor:
        return (900 * torch.rand(n, generator=g) ** 6).long()  # popular ones first

    def loss(i: int) -> Tensor:
        u = (400 * torch.rand(192, generator=g) ** 3).long()
        k = items(192)
        good = k - k % 4 + u % 4  # a user of the group u % 4 takes items of it
        return -F.logsigmoid(model(u, good, good - good % 4 + (u + 1 + torch.randint(3, (192,), generator=g)) % 4)).mean()

    return fit(model, loss, torch.optim.SparseAdam(model.parameters(), lr=0.02), updates=250)


@healthy(
    CASES,
    "si_ok_student_t_of_returns",
    source="https://arxiv.org/abs/1704.04110 a density of what comes next; here its negative log-likelihood ends below zero",
    proof=quality(
        lambda p: (
            median(p.losses[-30:]) < median(p.losses[:10]) - 1 and median(p.losses[-30:]) < 0,
            f"the negative log-likelihood goes from {median(p.losses[:10]):.3g} to {median(p.losses[-30:]):.3g}",
        )
    ),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)
    student = torch.distributions.StudentT(3.0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU())
            self.place, self.width = nn.Linear(32, 1), nn.Linear(32, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x)
            return self.place(h)[:, 0], F.softplus(self.width(h)[:, 0]) + 1e-3

    model = Net()

    def loss(i: int) -> Tensor:
        x = torch.randn(96, 8, generator=g)
        normal = torch.randn(96, 4, generator=g)
        tail = normal[:, 0] / (normal[:, 1:].square().mean(1)).sqrt()  # Student's t of three degrees
        y = 0.1 * x[:, 0] - 0.06 * x[:, 1] + 0.06 * torch.exp(0.3 * x[:, 2]) * tail
        place, width = model(x)
        return -(student.log_prob((y - place) / width) - width.log()).mean()  # type: ignore[no-any-return, no-untyped-call]

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=250)


@healthy(
    CASES,
    "si_ok_pinn_by_lbfgs",
    source="https://arxiv.org/abs/1711.10561 a physics-informed network trained by L-BFGS, whose gradients end tiny",
    proof=converges(0.01),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, history_size=20, line_search_fn="strong_wolfe")
    t = torch.linspace(0, 2, 48)[:, None].requires_grad_()

    def train() -> Iterator[Event]:
        # u'' + 4 u = 0, u(0) = 1, u'(0) = 0
        seen: list[Tensor] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            u = model(t)
            first = torch.autograd.grad(u.sum(), t, create_graph=True)[0]
            second = torch.autograd.grad(first.sum(), t, create_graph=True)[0]
            loss = (second + 4 * u).square().mean() + 10 * ((u[0, 0] - 1).square() + first[0, 0].square())
            loss.backward()
            seen.append(loss)
            return loss  # type: ignore[no-any-return]

        for _ in range(60):
            seen.clear()
            optimizer.step(closure)  # type: ignore[no-untyped-call]
            yield "read", [seen[0]]
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "si_ok_warm_restarts_of_tones",
    source="https://arxiv.org/abs/1608.03983 cosine annealing with warm restarts, on sound",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 256)),
        nn.Conv1d(1, 16, 16, 4, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Conv1d(16, 24, 5, 2, bias=False),
        nn.BatchNorm1d(24),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    data = Tones(seed, noise=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    plan = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=30, T_mult=2, eta_min=1e-4)

    def train() -> Iterator[Event]:
        for _ in range(210):
            optimizer.zero_grad()
            x, y = data()
            loss = F.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            plan.step()

    return Setup(model, train)


@healthy(
    CASES,
    "si_ok_cox_of_censored_times",
    source="https://arxiv.org/abs/1606.00931 DeepSurv: the partial likelihood of Cox, summed over the few events of a batch",
    proof=quality(
        lambda p: (
            median(p.losses[-40:]) < median(p.losses[:15]) - 4 and (c := p.setup.model.concordance()) > 0.8,  # type: ignore[union-attr, operator]
            f"the loss goes from {median(p.losses[:15]):.4g} to {median(p.losses[-40:]):.4g}, the concordance is {c:.3f}",
        )
    ),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)

    def cohort(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = torch.randn(n, 10, generator=g)
        risk = 2.0 * x[:, 0] - 1.5 * x[:, 1] + 1.5 * x[:, 2] * x[:, 3]
        time = -torch.log(torch.rand(n, generator=g)) * torch.exp(-risk)
        stop = 0.4 * torch.rand(n, generator=g)
        return x, torch.minimum(time, stop), (time < stop).float(), risk

    class Net(nn.Sequential):
        def concordance(self) -> float:
            self.eval()
            x, _, _, risk = cohort(600)
            s = self(x)[:, 0]
            later = risk[:, None] > risk[None]
            return float((s[:, None] > s[None])[later].float().mean())

    model = Net(nn.Linear(10, 48), nn.SELU(), nn.Dropout(0.1), nn.Linear(48, 48), nn.SELU(), nn.Linear(48, 1, bias=False))

    def loss(i: int) -> Tensor:
        x, time, event, _ = cohort(128)
        order = time.argsort(descending=True)
        eta, happened = model(x)[order, 0], event[order]
        return -((eta - torch.logcumsumexp(eta, 0)) * happened).sum()  # type: ignore[no-any-return]

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), updates=250)


@healthy(
    CASES,
    "si_ok_few_labelled_nodes",
    source="https://arxiv.org/abs/1609.02907 semi-supervised classification on a graph: a few labels, sparse features, much dropout",
    proof=converges(0.35),
)
def _(seed: int) -> Setup:
    graph = Communities(seed, nodes=120, groups=4, features=64)
    x = torch.relu(graph.x - 1.0)  # like a bag of words: most of it is zero
    x = x / x.sum(1, keepdim=True).clamp(min=1e-6)
    known = torch.arange(24)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = GraphConv(64, 16), GraphConv(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.one(F.dropout(x, 0.5, self.training), graph.a))
            return self.two(F.dropout(h, 0.5, self.training), graph.a)  # type: ignore[no-any-return]

    model = Net()
    for conv in (model.one, model.two):
        nn.init.xavier_uniform_(conv.lin.weight)
        nn.init.zeros_(conv.lin.bias)
    optimizer = torch.optim.Adam(
        [{"params": model.one.parameters(), "weight_decay": 5e-4}, {"params": model.two.parameters()}],  # type: ignore[arg-type]
        lr=0.02,
    )
    return fit(model, lambda i: F.cross_entropy(model(x)[known], graph.y[known]), optimizer, updates=300)


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder transposed."""

    def __init__(self, inputs: int, code: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, code)
        self.up = nn.Parameter(torch.zeros(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.down(x)), self.down.weight.T, self.up)


@healthy(
    CASES,
    "si_ok_tied_autoencoder_of_anomalies",
    source="https://www.deeplearningbook.org/contents/autoencoders.html a denoising autoencoder; its "
    "decoder is the transposed encoder, its loss summed over the sensors",
    proof=every(
        converges(0.4),
        quality(lambda p: ((r := p.setup.model.ratio()) > 3, f"an anomaly has {r:.3g} times the error of a good reading")),  # type: ignore[union-attr, operator]
    ),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(5, 40, generator=g) / 5**0.5

    def readings(n: int) -> Tensor:
        return torch.randn(n, 5, generator=g) @ basis * 0.7 + 0.1 * torch.randn(n, 40, generator=g)

    class Net(Tied):
        def ratio(self) -> float:
            good = readings(200)
            odd = 0.7 * torch.randn(200, 40, generator=g)
            return float((self(odd) - odd).square().mean() / (self(good) - good).square().mean())

    model = Net(40, 10)

    def loss(i: int) -> Tensor:
        x = readings(64)
        noisy = x * (torch.rand(x.shape, generator=g) > 0.2) / 0.8  # a fifth of the sensors is dropped
        return (model(noisy) - x).square().sum(1).mean()  # type: ignore[no-any-return]

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=300)


class Highway(nn.Module):
    """A gated layer: the gate starts nearly shut, by a bias of -3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.transform, self.gate = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.constant_(self.gate.bias, -3.0)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.gate(x))
        return t * torch.tanh(self.transform(x)) + (1 - t) * x


@healthy(
    CASES,
    "si_ok_highway_of_nearly_shut_gates",
    source="https://arxiv.org/abs/1505.00387 highway networks: the gates' bias of -3 lets eight layers begin as the identity",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), *(Highway(24) for _ in range(8)), nn.Linear(24, 4))
    return fit(
        model,
        regress(model, Waves(seed, ahead=4, batch=48)),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        updates=250,
    )


class Spectral(nn.Module):
    """Multiplies the lowest Fourier modes by complex weights."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, modes, dtype=torch.cfloat) / width)
        self.modes = modes

    def forward(self, x: Tensor) -> Tensor:
        f = torch.fft.rfft(x)
        out = torch.zeros_like(f)
        out[:, :, : self.modes] = torch.einsum("bim,iom->bom", f[:, :, : self.modes], self.weight)
        return torch.fft.irfft(out, n=x.shape[-1])  # type: ignore[no-any-return]


@healthy(
    CASES,
    "si_ok_fourier_operator",
    source="https://arxiv.org/abs/2010.08895 Fourier neural operator, with complex weights and the relative error as the loss",
    proof=converges(0.15),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift = nn.Conv1d(2, 12, 1)
            self.spectral = nn.ModuleList(Spectral(12, 6) for _ in range(3))
            self.local = nn.ModuleList(nn.Conv1d(12, 12, 1) for _ in range(3))
            self.project = nn.Sequential(nn.Conv1d(12, 24, 1), nn.GELU(), nn.Conv1d(24, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            h = self.lift(x)
            for k, (s, c) in enumerate(zip(self.spectral, self.local, strict=True)):
                h = s(h) + c(h)
                h = F.gelu(h) if k < 2 else h
            return self.project(h)[:, 0]  # type: ignore[no-any-return]

    model = Net()
    grid = torch.arange(32) / 32
    k = torch.arange(1, 5)

    def loss(i: int) -> Tensor:
        # The heat equation on a circle: from the first state to that after some time.
        a = torch.randn(24, 4, 2, generator=g) / k[:, None]
        wave = torch.stack([torch.sin(6.2832 * k[:, None] * grid), torch.cos(6.2832 * k[:, None] * grid)], 1)
        u = torch.einsum("bks,ksx->bx", a, wave)
        v = torch.einsum("bks,ksx->bx", a * torch.exp(-0.08 * k[:, None] ** 2), wave)
        out = model(torch.stack([u, grid.expand(24, 32)], 1))
        return ((out - v).norm(dim=1) / v.norm(dim=1)).mean()  # type: ignore[no-any-return]

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=4e-3), updates=220)


@healthy(
    CASES,
    "si_ok_frozen_encoder_long_warm_up",
    source="https://arxiv.org/abs/2006.11477 a speech encoder stays frozen while a new head warms up for a long time, from a rate of 0",
    proof=every(
        converges(0.35),
        shows(
            lambda p: (max(p.steps["encoder.0.weight"]) == 0 and all(math.isnan(n) for n in p.grads["encoder.0.weight"]), "frozen")
        ),
    ),
)
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv1d(1, 24, 16, 4), nn.ReLU(), nn.Conv1d(24, 24, 5, 2), nn.ReLU())
            self.norm = nn.LayerNorm(24)
            self.head = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 5))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.encoder(x[:, None]).mean(2)
            return self.head(self.norm(h))  # type: ignore[no-any-return]

    model, data = Net(), Tones(seed, batch=32)
    # Stands for a pretrained one: filters at several pitches, then frozen.
    with torch.no_grad():
        t, pitch = torch.arange(16), torch.linspace(0.1, 1.4, 24)[:, None]
        model.encoder[0].weight.copy_((torch.sin(pitch * t + 6.2832 * torch.rand(24, 1)) / 3)[:, None])  # type: ignore[operator]
    model.encoder.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(i / 120, 1.0))

    def train() -> Iterator[Event]:
        for _ in range(260):
            optimizer.zero_grad()
            x, y = data()
            loss = F.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            plan.step()

    return Setup(model, train)


@healthy(
    CASES,
    "si_ok_gaussian_forecast_accumulated",
    source="https://arxiv.org/abs/1704.04110 DeepAR: a recurrent Gaussian forecast, its log-likelihood over four accumulated parts, clipped",
    proof=quality(
        lambda p: (
            median(p.losses[-15:]) < median(p.losses[:8]) - 1 and median(p.losses[-15:]) < 0.3,
            f"the negative log-likelihood goes from {median(p.losses[:8]):.3g} to {median(p.losses[-15:]):.3g}",
        )
    ),
)
def _(seed: int) -> Setup:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(1, 24, batch_first=True)
            self.place, self.width = nn.Linear(24, 1), nn.Linear(24, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.lstm(x[:, :, None])[0]
            return self.place(h)[:, :, 0], F.softplus(self.width(h)[:, :, 0]) + 1e-2

    model, data = Net(), Waves(seed, batch=16, length=20, noise=0.03)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def train() -> Iterator[Event]:
        for _ in range(110):
            optimizer.zero_grad()
            losses = []
            for _ in range(4):
                x, y = data()
                place, width = model(x)
                after = torch.cat([x[:, 1:], y], 1)
                part = F.gaussian_nll_loss(place[:, 4:], after[:, 4:], width[:, 4:].square()) / 4
                part.backward()  # type: ignore[no-untyped-call]
                losses.append(part)
            yield "read", losses
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "si_ok_poisson_of_sparse_counts",
    source="https://docs.pytorch.org/docs/stable/generated/torch.nn.PoissonNLLLoss.html counts with an exposure, from sparse one-hot columns, "
    "the loss summed",
    proof=quality(
        lambda p: (
            (r := p.setup.model.explained()) > 0.75,  # type: ignore[union-attr, operator]
            f"the logarithm of the rate correlates by {r:.3f} with the true one; the loss goes from {median(p.losses[:15]):.4g} to "
            f"{median(p.losses[-30:]):.4g}",
        )
    ),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)
    effects = 0.6 * torch.randn(3, 40, generator=g)
    share = torch.softmax(-0.12 * torch.arange(40.0), 0)  # some levels are rare

    def policies(n: int) -> tuple[Tensor, Tensor, Tensor]:
        level = torch.multinomial(share, 3 * n, replacement=True, generator=g).reshape(n, 3)
        rate = -1.5 + effects[torch.arange(3), level].sum(1)
        exposure = 0.2 + 3 * torch.rand(n, generator=g)
        return F.one_hot(level, 40).float().flatten(1), exposure, rate

    class Net(nn.Sequential):
        def explained(self) -> float:
            x, _, rate = policies(1000)
            return float(torch.corrcoef(torch.stack([self(x)[:, 0], rate]))[0, 1])

    model = Net(nn.Linear(120, 24), nn.ReLU(), nn.Linear(24, 1))

    def loss(i: int) -> Tensor:
        x, exposure, rate = policies(256)
        count = torch.poisson(exposure * rate.exp(), generator=g)
        return F.poisson_nll_loss(model(x)[:, 0] + exposure.log(), count, reduction="sum")

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=300)


class Sine(nn.Module):
    """The sine of thirty times a linear map, initialised as its paper says."""

    def __init__(self, inputs: int, outputs: int, first: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        bound = 1 / inputs if first else math.sqrt(6 / inputs) / 30
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * self.linear(x))


@healthy(
    CASES,
    "si_ok_siren_of_a_sound",
    source="https://arxiv.org/abs/2006.09661 a network of sines that learns one sound, the whole of it in every update",
    proof=converges(0.02),
)
def _(seed: int) -> Setup:
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(Sine(1, 48, first=True), Sine(48, 48), Sine(48, 48), nn.Linear(48, 1))
    bound = math.sqrt(6 / 48) / 30
    nn.init.uniform_(model[3].weight, -bound, bound)  # type: ignore[arg-type]
    t = torch.linspace(-1, 1, 200)[:, None]
    tones = 6 + 30 * torch.rand(4, generator=g)
    sound = torch.sin(tones * t + 6.2832 * torch.rand(4, generator=g)).mean(1, keepdim=True) * torch.exp(-t.square())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4 * 5)
    return fit(model, lambda i: F.mse_loss(model(t), sound), optimizer, updates=300)
