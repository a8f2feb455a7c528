"""Further runs for the development half: drawn from reports and papers, each with a proof in plain torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import Blobs, Case, Event, Pictures, Proof, Setup, Text, classify, fit, healthy, initialise, mlp, sick
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


# Proofs that only these runs need


def loss_spikes(update: int, factor: float) -> Proof:
    """The loss at one update is more than `factor` times the median of the ten before it."""

    def proof(plain: Plain) -> str:
        ratio = plain.losses[update] / median(plain.losses[update - 10 : update])
        assert ratio > factor, f"at update {update} the loss is {ratio:.3g} times the median, not {factor:g}"
        return f"at update {update} the loss is {ratio:.3g} times the median before it"

    return proof


def loss_begins(above: float) -> Proof:
    """The first loss is above a number, far over that of a guess at random."""

    def proof(plain: Plain) -> str:
        assert plain.losses[0] > above, f"the first loss is {plain.losses[0]:.3g}, not above {above:g}"
        return f"the first loss is {plain.losses[0]:.3g}"

    return proof


def flat_share(module: str, edge: float, above: float, first: int = 0) -> Proof:
    """A tanh gives outputs whose root mean square is above `edge`, and its gradient would be below 1 - edge^2 on average.

    With the mean square s, the mean local derivative is 1 - s: it must be less than `above`.
    """

    def proof(plain: Plain) -> str:
        seen = [o.rms for o in plain.outputs[module][first:] if o is not None]
        derivative = 1 - median(seen) ** 2
        assert derivative < above, f"the mean derivative of {module} is {derivative:.3g}, not below {above:g}"
        assert median(seen) > edge, f"the outputs of {module} have rms {median(seen):.3g}, not above {edge:g}"
        return f"the mean derivative of {module} is {derivative:.3g}"

    return proof


def inputs_far(module: str, above: float) -> Proof:
    """What the first module (an identity that passes the batch on) gives has a root mean square above a number."""

    def proof(plain: Plain) -> str:
        rms = median(o.rms for o in plain.outputs[module] if o is not None)
        assert rms > above, f"the batch has rms {rms:.3g}, not above {above:g}"
        return f"the batch has rms {rms:.3g}"

    return proof


def simplex(module: str) -> Proof:
    """The module gives probabilities, and the loss can therefore not fall below what a second softmax allows."""

    def proof(plain: Plain) -> str:
        for o in plain.outputs[module]:
            assert o is not None, f"{module} was not called"
            assert 0 <= o.low <= o.high <= 1, f"{module} gives {o.low:.3g} to {o.high:.3g}"
        return f"{module} gives probabilities to a log-softmax; the loss ends at {plain.losses[-1]:.3g}"

    return proof


def never_moves(*parameters: str, first: int = 0) -> Proof:
    """Nothing ever changes these parameters, though they have gradients."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert all(s == 0.0 or math.isnan(s) for s in plain.steps[name][first:]), f"{name} moves"
            assert all(n > 0 or math.isnan(n) for n in plain.grads[name][first + 1 :]), f"{name} has no gradient"
            assert any(n > 0 for n in plain.grads[name][first:]), f"{name} has no gradient"
        return f"{', '.join(parameters)}: gradients, and never a change"

    return proof


def measured(what: str, number: Callable[[Plain], float], below: float) -> Proof:
    """A number of the trained model is below a bound."""

    def proof(plain: Plain) -> str:
        value = number(plain)
        assert value < below, f"{what} is {value:.4g}, not below {below:g}"
        return f"{what} is {value:.4g}"

    return proof


def equal_rows(*parameters: str) -> Proof:
    """At the end as at the beginning all rows of these matrices are the same."""

    def proof(plain: Plain) -> str:
        named = dict(plain.setup.model.named_parameters())  # type: ignore[union-attr]
        for name in parameters:
            weight = named[name].detach()
            apart = float((weight - weight[:1]).abs().max())
            assert apart < 1e-4, f"the rows of {name} differ by {apart:.3g}"
        return f"{', '.join(parameters)}: all units are the same unit"

    return proof


# Vanishing and exploding gradients


def conv_stack(depth: int, act: Callable[[], nn.Module], channels: int = 8, classes: int = 8, bias: bool = True) -> nn.Sequential:
    """`depth` 3 x 3 convolutions named conv0, conv1, ..., each with its activation, an average and a head."""
    model = nn.Sequential()
    for i in range(depth):
        model.add_module(f"conv{i}", nn.Conv2d(1 if i == 0 else channels, channels, 3, padding=1, bias=bias))
        model.add_module(f"act{i}", act())
    model.add_module("pool", nn.AdaptiveAvgPool2d((1, 8)))
    model.add_module("flat", nn.Flatten())
    model.add_module("head", nn.Linear(8 * channels, classes))
    return model


@sick(
    CASES,
    "fa_convolutions_from_a_small_gaussian",
    ("vanishing_gradient",),
    (*(f"conv{i}" for i in range(10)), "head"),
    source="https://arxiv.org/abs/1502.01852 He et al.: a deep plain ReLU CNN drawn from a small fixed Gaussian stalls",
    proof=every(gradient_ratio("conv0.weight", "head.bias", 1e-4), loss_stays(0.03)),
    also=("poor_init", "update_ratio_too_small", "loss_plateau"),
)
def _(seed: int) -> Setup:
    model = initialise(conv_stack(10, nn.ReLU, bias=False), lambda w: nn.init.normal_(w, std=0.05), (nn.Conv2d,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return fit(model, classify(model, Pictures(seed)), optimizer, 30)


class Tunnel(nn.Module):
    """An encoder of the context, a recurrence without input, and a readout of its last state."""

    def __init__(self, steps: int, radius: float) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24))
        self.cell = nn.Linear(24, 24)
        self.act = nn.Tanh()
        self.readout = nn.Linear(24, 2)
        self.steps = steps
        nn.init.orthogonal_(self.cell.weight, gain=radius)
        nn.init.zeros_(self.cell.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        for _ in range(self.steps):
            h = self.act(self.cell(h))
        return self.readout(h)


class Regression:
    """A smooth function of Gaussian inputs, scaled to unit variance, with a little noise."""

    def __init__(self, seed: int, features: int = 8, targets: int = 2, batch: int = 32, noise: float = 0.1) -> None:
        self.generator = torch.Generator().manual_seed(5000 + seed)
        self.matrix = torch.randn(features, targets, generator=self.generator) / features**0.5
        self.batch, self.noise = batch, noise

    def __call__(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.batch, self.matrix.shape[0], generator=self.generator)
        y = x @ self.matrix
        return x, y + self.noise * torch.randn(y.shape, generator=self.generator)


def squares(model: nn.Module, data: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[int], Tensor]:
    """Mean squared error of the model on a fresh batch an update."""

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.mse_loss(model(x), y)

    return loss


@sick(
    CASES,
    "fa_recall_through_a_contracting_recurrence",
    ("vanishing_gradient",),
    ("encoder",),
    source="https://arxiv.org/abs/1211.5063 Pascanu et al.: recurrent weights with singular values below one forget what came first",
    proof=every(gradient_ratio("encoder.0.weight", "readout.bias", 1e-6), loss_stays(0.2)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model = Tunnel(24, 0.4)
    return fit(model, squares(model, Regression(seed)), torch.optim.Adam(model.parameters(), lr=1e-3), 40)


class GraphStack(nn.Module):
    """Graph convolutions over a ring with chords, one activation module each."""

    def __init__(self, depth: int, act: Callable[[], nn.Module], nodes: int = 24, width: int = 16, classes: int = 3) -> None:
        super().__init__()
        a = torch.eye(nodes) + torch.roll(torch.eye(nodes), 1, 0) + torch.roll(torch.eye(nodes), -1, 0)
        self.register_buffer("adjacency", a / a.sum(1, keepdim=True))
        self.convs = nn.ModuleList(nn.Linear(6 if i == 0 else width, width) for i in range(depth))
        self.acts = nn.ModuleList(act() for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for conv, act in zip(self.convs, self.acts, strict=True):
            x = act(self.adjacency @ conv(x))
        return self.head(x)


class Nodes:
    """Node features whose class is shared by neighbours on a ring of 24."""

    def __init__(self, seed: int, nodes: int = 24, classes: int = 3, batch: int = 8) -> None:
        self.generator = torch.Generator().manual_seed(6000 + seed)
        self.labels = (torch.arange(nodes) * classes // nodes).expand(batch, nodes)
        self.centres = torch.randn(classes, 6, generator=self.generator)

    def __call__(self) -> tuple[Tensor, Tensor]:
        shift = int(torch.randint(self.labels.shape[1], (1,), generator=self.generator))
        y = torch.roll(self.labels, shift, 1)
        return self.centres[y] + torch.randn(*y.shape, 6, generator=self.generator), y


@sick(
    CASES,
    "fa_graph_network_of_ten_sigmoids",
    ("vanishing_gradient",),
    tuple(f"convs.{i}" for i in range(9)),
    source="https://arxiv.org/abs/1801.07606 Li et al.: graph convolutions stacked deep do not train; sigmoids as in "
    "https://proceedings.mlr.press/v9/glorot10a.html",
    proof=every(gradient_ratio("convs.0.weight", "convs.9.weight", 1e-5), loss_stays(0.1)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model = GraphStack(10, nn.Sigmoid)
    return fit(model, classify(model, Nodes(seed)), torch.optim.AdamW(model.parameters(), lr=1e-3), 40)


@sick(
    CASES,
    "fa_chaotic_tanh_convolutions",
    ("exploding_gradient",),
    tuple(f"conv{i}" for i in range(18)),
    source="https://arxiv.org/abs/1806.05393 Xiao et al., https://arxiv.org/abs/1611.01232: in the chaotic phase of the weight "
    "variance gradients grow with depth",
    proof=gradient_ratio("conv17.weight", "conv0.weight", 0.02),
    also=("poor_init", "saturated_activation"),
)
def _(seed: int) -> Setup:
    model = initialise(conv_stack(18, nn.Tanh), lambda w: nn.init.normal_(w, std=3.5 / (w[0].numel()) ** 0.5), (nn.Conv2d,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return fit(
        model,
        classify(model, Pictures(seed, batch=8)),
        optimizer,
        24,
        between=lambda i: float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)) and None,
    )


class _Equalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain: float) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.gain = gain
        return x * gain

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        return grad / ctx.gain, None  # the fault: a product has to be multiplied by its factor


class Equalised(nn.Module):
    """A layer of unit weights with its gain at run time, through a backward of one's own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        nn.init.normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.gain = (2 / inputs) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return _Equalised.apply(self.linear(x), self.gain)


@sick(
    CASES,
    "fa_equalised_gain_divides_in_backward",
    ("exploding_gradient",),
    tuple(f"hidden{i}" for i in range(6)),
    source="https://arxiv.org/abs/1710.10196 Karras et al., section 4.1: weights of unit variance scaled at run time; here the "
    "backward divides by the gain",
    proof=gradient_ratio("head.weight", "hidden0.linear.weight", 1e-4),
)
def _(seed: int) -> Setup:
    model = nn.Sequential()
    for i in range(6):
        model.add_module(f"hidden{i}", Equalised(16 if i == 0 else 32, 32))
        model.add_module(f"act{i}", nn.LeakyReLU(0.2))
    model.add_module("head", nn.Linear(32, 4))
    return fit(model, classify(model, Blobs(seed)), torch.optim.Adam(model.parameters(), lr=1e-3), 30)


@sick(
    CASES,
    "fa_readout_rate_above_curvature",
    ("exploding_gradient",),
    ("",),
    onset=25,
    source="https://arxiv.org/abs/2103.00065 Cohen et al.: gradient descent on a quadratic diverges once the rate is above two over "
    "the sharpness",
    proof=every(gradient_grows("readout.weight", 1e4, 36, since=24), loss_grows(1e6, 24)),
    also=("loss_diverging", "update_ratio_too_large", "non_finite_gradient", "non_finite_loss"),
)
def _(seed: int) -> Setup:
    model = nn.Sequential()
    model.add_module("random", nn.Linear(8, 48).requires_grad_(requires_grad=False))
    model.add_module("act", nn.ReLU())
    model.add_module("readout", nn.Linear(48, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    def before(i: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.02 if i < 25 else 1.2

    return fit(model, squares(model, Regression(seed, batch=64)), optimizer, 42, before)


# Gradients that are exactly zero


class Coder(nn.Module):
    """An autoencoder with something between its halves."""

    def __init__(self, between: Callable[[Tensor], Tensor], inputs: int = 16, code: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, code))
        self.decoder = nn.Sequential(nn.Linear(code, 32), nn.ReLU(), nn.Linear(32, inputs))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.between(self.encoder(x)))


def rebuild(model: nn.Module, data: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[int], Tensor]:
    """Mean squared error of an autoencoder on a fresh batch an update."""

    def loss(i: int) -> Tensor:
        x, _ = data()
        return F.mse_loss(model(x), x)

    return loss


@sick(
    CASES,
    "fa_compression_rounding_without_estimator",
    ("zero_gradient",),
    ("encoder",),
    source="https://github.com/Justin-Tan/generative-compression/issues/51 tf.round in the quantizer stops the gradient of the encoder",
    proof=zero_gradient("encoder.0.weight", "encoder.2.weight", "encoder.2.bias"),
)
def _(seed: int) -> Setup:
    model = Coder(lambda z: torch.round(4 * z) / 4)
    return fit(model, rebuild(model, Blobs(seed)), torch.optim.Adam(model.parameters(), lr=3e-3), 30)


class Policy(nn.Module):
    """A Gaussian policy: mean and clamped log of the deviation."""

    def __init__(self, log_std: float) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 32), nn.Tanh())
        self.mu = nn.Linear(32, 2)
        self.log_std = nn.Linear(32, 2)
        nn.init.constant_(self.log_std.bias, log_std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.mu(h), self.log_std(h).clamp(-1.0, 2.0)


def likelihood(model: Policy, data: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[int], Tensor]:
    """Negative log-likelihood of actions under the policy."""

    def loss(i: int) -> Tensor:
        x, y = data()
        mu, log_std = model(x)
        return (0.5 * ((y - mu) / log_std.exp()) ** 2 + log_std + 2.0).mean()

    return loss


@sick(
    CASES,
    "fa_policy_deviation_below_its_clamp",
    ("zero_gradient",),
    ("log_std",),
    source="https://spinningup.openai.com/en/latest/algorithms/sac.html the log of the deviation of the policy is clamped; a head "
    "that begins outside has no gradient",
    proof=zero_gradient("log_std.weight", "log_std.bias"),
)
def _(seed: int) -> Setup:
    model = Policy(-5.0)
    return fit(model, likelihood(model, Regression(seed, noise=0.5)), torch.optim.RMSprop(model.parameters(), lr=1e-3), 30)


class Messages(nn.Module):
    """One round of messages between nodes, some of whose edges are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(6, 24)
        self.message = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24))
        self.act = nn.ReLU()
        self.head = nn.Linear(24, 3)
        self.keep = 1.0

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        mask = (torch.rand(2, x.shape[1], 1, generator=generator) < self.keep).float()
        m = self.message(x)
        got = mask[0] * torch.roll(m, 1, 1) + mask[1] * torch.roll(m, -1, 1)
        return self.head(self.act(self.own(x) + got))


@sick(
    CASES,
    "fa_dropped_edges_until_none_is_kept",
    ("zero_gradient",),
    ("message",),
    onset=20,
    source="https://arxiv.org/abs/1907.10903 Rong et al.: edges are masked at a rate; here the schedule of the rate ends at one",
    proof=zero_gradient("message.0.weight", "message.2.weight", first=20),
)
def _(seed: int) -> Setup:
    model, data = Messages(), Nodes(seed)

    def loss(i: int) -> Tensor:
        model.keep = max(0.0, 1 - i / 20)
        x, y = data()
        return F.cross_entropy(model(x, data.generator).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05), 44)


# Activations


@sick(
    CASES,
    "fa_channels_with_biases_below_reach",
    ("dead_units",),
    ("act1",),
    source="https://arxiv.org/abs/1903.06733 Lu et al.: ReLU units whose pre-activation is always negative are born dead",
    proof=dead_fraction("act1", 0.8),
    also=("poor_init",),
)
def _(seed: int) -> Setup:
    model = conv_stack(3, nn.ReLU, channels=16)
    with torch.no_grad():
        model.get_submodule("conv1").bias[2:] = -12.0
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 30)


class Sparse(nn.Module):
    """A sparse autoencoder: wide code under ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(16, 64)
        self.act = nn.ReLU()
        self.decoder = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.act(self.encoder(x))
        return self.decoder(z), z


@sick(
    CASES,
    "fa_sparse_code_penalty_turned_on",
    ("dead_units",),
    ("act",),
    onset=30,
    source="https://arxiv.org/abs/2406.04093 Gao et al.: the L1 penalty of sparse autoencoders leaves most latents dead",
    proof=dead_fraction("act", 0.6, first=33),
    also=("loss_spike", "gradient_spike", "update_ratio_too_large", "zero_gradient", "loss_plateau"),
)
def _(seed: int) -> Setup:
    model, data = Sparse(), Blobs(seed)

    def loss(i: int) -> Tensor:
        x = data()[0].abs()  # activations of a network are what such a code is trained on: not below zero
        out, z = model(x)
        return F.mse_loss(out, x) + (4.0 if i >= 30 else 0.001) * z.sum(1).mean()

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), 55)


class Additive(nn.Module):
    """A classifier of sequences by additive attention whose scores pass a tanh."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.keys = nn.Linear(8, 24)
        self.score_act = nn.Tanh()
        self.score = nn.Linear(24, 1, bias=False)
        self.values = nn.Linear(8, 24)
        self.head = nn.Linear(24, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.softmax(self.score(self.score_act(self.scale * self.keys(x))), 1)
        return self.head((weight * self.values(x)).sum(1))


class Marked:
    """Sequences in which one position, marked in the first feature, says the class."""

    def __init__(self, seed: int, length: int = 6, batch: int = 32) -> None:
        self.generator = torch.Generator().manual_seed(7000 + seed)
        self.centres = 2 * torch.randn(4, 8, generator=self.generator)
        self.length, self.batch = length, batch

    def __call__(self) -> tuple[Tensor, Tensor]:
        y = torch.randint(4, (self.batch,), generator=self.generator)
        x = torch.randn(self.batch, self.length, 8, generator=self.generator)
        at = torch.randint(self.length, (self.batch,), generator=self.generator)
        x[torch.arange(self.batch), at] += self.centres[y]
        return x, y


@sick(
    CASES,
    "fa_additive_attention_scores_multiplied",
    ("saturated_activation",),
    ("score_act",),
    source="https://arxiv.org/abs/1409.0473 Bahdanau et al.: additive attention; here multiplied by what "
    "https://arxiv.org/abs/1706.03762, section 3.2.1, divides by",
    proof=flat_share("score_act", 0.95, 0.06),
)
def _(seed: int) -> Setup:
    model = Additive(60.0)
    return fit(model, classify(model, Marked(seed)), torch.optim.Adagrad(model.parameters(), lr=0.01), 30)


@sick(
    CASES,
    "fa_tanh_layers_after_one_wild_step",
    ("saturated_activation",),
    ("act0", "act1"),
    onset=30,
    source="https://proceedings.mlr.press/v9/glorot10a.html Glorot and Bengio: hidden units driven into saturation stop the "
    "training; here by one step of a mistaken rate",
    proof=every(flat_share("act0", 0.95, 0.08, first=31), flat_share("act1", 0.95, 0.08, first=31)),
    also=("update_ratio_too_large", "loss_spike", "gradient_spike", "loss_diverging", "vanishing_gradient", "exploding_gradient"),
)
def _(seed: int) -> Setup:
    model = nn.Sequential()
    for i in range(2):
        model.add_module(f"layer{i}", nn.Linear(16 if i == 0 else 32, 32))
        model.add_module(f"act{i}", nn.Tanh())
    model.add_module("head", nn.Linear(32, 4))
    body = [p for n, p in model.named_parameters() if not n.startswith("head")]
    optimizer = torch.optim.SGD([{"params": body, "lr": 0.1}, {"params": model.get_submodule("head").parameters(), "lr": 0.1}])

    def before(i: int) -> None:
        optimizer.param_groups[0]["lr"] = 2000.0 if i == 30 else 0.1

    return fit(model, classify(model, Blobs(seed, spread=2.0)), optimizer, 52, before)


# Wrong from the first step


@sick(
    CASES,
    "fa_hidden_layers_all_one_constant",
    ("poor_init",),
    ("0", "2", "4"),
    source="https://cs231n.github.io/neural-networks-2/ weight initialization: units that start the same stay the same",
    proof=equal_rows("0.weight", "2.weight"),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 3, inputs=8, outputs=2)
    initialise(model[:5], lambda w: nn.init.constant_(w, 0.05))
    return fit(model, squares(model, Regression(seed)), torch.optim.Adam(model.parameters(), lr=3e-3), 30)


@sick(
    CASES,
    "fa_zeros_in_two_convolutions",
    ("poor_init",),
    ("conv0", "conv1"),
    source="https://cs231n.github.io/neural-networks-2/ the pitfall of all zero initialization",
    proof=zero_gradient("conv0.weight", "conv1.weight"),
    also=("zero_gradient", "loss_plateau", "update_ratio_too_small"),
)
def _(seed: int) -> Setup:
    model = initialise(conv_stack(2, nn.Tanh), nn.init.zeros_, (nn.Conv2d,))
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.1), 30)


class Tied(nn.Module):
    """A recurrent language model whose head shares the matrix of the embedding."""

    def __init__(self, std: float, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, width)
        nn.init.normal_(self.embed.weight, std=std)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, t: Tensor) -> Tensor:
        return self.head(self.norm(self.gru(self.embed(t))[0]))


@sick(
    CASES,
    "fa_tied_embeddings_of_deviation_two",
    ("poor_init",),
    ("embed", "head"),
    source="https://github.com/huggingface/transformers/pull/26441 a head of unit variance gives an initial loss of 110; "
    "https://github.com/pytorch/pytorch/issues/3121",
    proof=loss_begins(20.0),
)
def _(seed: int) -> Setup:
    model = Tied(2.0)
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), lr=1e-3), 30)


class Watched(nn.Module):
    """A network behind an identity, whose output is the batch."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.batch = nn.Identity()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.batch(x))


@sick(
    CASES,
    "fa_pixels_from_zero_to_255",
    ("unnormalized_input",),
    ("",),
    source="https://github.com/hill-a/stable-baselines/issues/328 images between 0 and 255 are fed in as they are",
    proof=every(inputs_far("batch", 50.0), loss_begins(4.0)),
    also=("dead_units",),
)
def _(seed: int) -> Setup:
    data, model = Pictures(seed), Watched(conv_stack(2, nn.ReLU))

    def pixels() -> tuple[Tensor, Tensor]:
        x, y = data()
        return (110 + 50 * x).clamp(0, 255).round(), y

    return fit(model, classify(model, pixels), torch.optim.Adam(model.parameters(), lr=1e-3), 30)


@sick(
    CASES,
    "fa_columns_of_years_and_incomes",
    ("unnormalized_input",),
    ("",),
    source="https://scikit-learn.org/stable/modules/neural_networks_supervised.html multi-layer perceptrons are sensitive to "
    "feature scaling; columns as in a census",
    proof=every(inputs_far("batch", 1000.0), flat_share("body.1", 0.95, 0.1)),
    also=("saturated_activation", "zero_gradient", "vanishing_gradient"),
)
def _(seed: int) -> Setup:
    data, model = Regression(seed), Watched(mlp(nn.Tanh, 2, inputs=8, outputs=2))
    scale = torch.tensor([10.0, 20000.0, 12.0, 300.0, 1.0, 5.0, 40.0, 0.1])
    shift = torch.tensor([2005.0, 45000.0, 38.0, 900.0, 0.0, 51.0, 40.0, 0.5])

    def table() -> tuple[Tensor, Tensor]:
        x, y = data()
        return scale * x + shift, y

    return fit(model, squares(model, table), torch.optim.RMSprop(model.parameters(), lr=1e-3), 30)


@sick(
    CASES,
    "fa_softmax_layer_under_cross_entropy",
    ("double_softmax",),
    ("probabilities",),
    source="https://github.com/bowang-lab/Transformer-GCN-QA/pull/32 an erroneous softmax at the output of the model, under "
    "CrossEntropyLoss",
    proof=simplex("probabilities"),
)
def _(seed: int) -> Setup:
    model = conv_stack(2, nn.ReLU)
    model.add_module("probabilities", nn.Softmax(dim=-1))
    return fit(model, classify(model, Pictures(seed)), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 30)


class Speaker(nn.Module):
    """A head that gives probabilities."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, classes)

    def forward(self, h: Tensor) -> Tensor:
        return F.softmax(self.out(h), dim=-1)


class Tagger(nn.Module):
    """An LSTM over tokens, and a head at every position."""

    def __init__(self, head: nn.Module, width: int = 32, cell: type[nn.LSTM | nn.GRU] = nn.LSTM) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, width)
        self.rnn = cell(width, width, batch_first=True)
        self.head = head

    def forward(self, t: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(t))[0])


@sick(
    CASES,
    "fa_tagger_head_softmax_and_log_softmax",
    ("double_softmax",),
    ("head",),
    source="https://github.com/Lightning-Universe/lightning-bolts/issues/654 nll_loss(log_softmax(softmax(linear(x))))",
    proof=simplex("head"),
)
def _(seed: int) -> Setup:
    model, data = Tagger(Speaker(32, 24)), Text(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.nll_loss(F.log_softmax(model(x), -1).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 30)


# Weights that stay


class Residual(nn.Module):
    """Two convolutions with normalisation around a shortcut; `zero`: the last gain begins at zero."""

    def __init__(self, channels: int = 8, *, zero: bool = False, keep: float = 1.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.keep = keep
        if zero:
            nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.keep < 1 and torch.rand(()) > self.keep:
            return x
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class ResNet(nn.Module):
    """A stem, residual blocks and a head."""

    def __init__(self, blocks: int = 2, *, zero: bool = False, keep: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual(zero=zero, keep=keep) for _ in range(blocks)))
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(2).flatten(1))


@sick(
    CASES,
    "fa_layerwise_rates_of_integer_division",
    ("frozen_weights",),
    ("stem", "blocks"),
    source="https://github.com/leftthomas/SRGAN/issues/94 the rate of a schedule is zero and nothing trains; groups by depth as in "
    "https://arxiv.org/abs/1801.06146",
    proof=unchanged("stem.weight", "blocks.0.conv1.weight", "blocks.1.conv2.weight"),
)
def _(seed: int) -> Setup:
    model = ResNet()
    parts = [model.stem, *model.blocks, model.head]
    groups = [{"params": list(m.parameters()), "lr": 0.003 * ((k + 1) // len(parts))} for k, m in enumerate(parts)]
    return fit(model, classify(model, Pictures(seed)), torch.optim.AdamW(groups), 30)


class Layer(nn.Module):
    """One layer of a transformer, normalised before each half, with a causal mask of -inf."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.act = nn.GELU()
        self.heads = heads

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5 + mask.to(q.dtype)
        x = x + self.out((torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(b, t, c))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A small causal language model."""

    def __init__(self, layers: int = 2, width: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(24, width), nn.Embedding(16, width)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.1)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 24)
        self.register_buffer("mask", torch.full((16, 16), -math.inf).triu(1))

    def forward(self, t: Tensor) -> Tensor:
        x = self.embed(t) + self.place(torch.arange(t.shape[1]))
        for layer in self.layers:
            x = layer(x, self.mask[: t.shape[1], : t.shape[1]])
        return self.head(self.norm(x))


@sick(
    CASES,
    "fa_norm_gains_stay_one_in_bfloat16",
    ("frozen_weights",),
    ("layers.0.norm1", "layers.0.norm2", "layers.1.norm1", "layers.1.norm2", "norm"),
    source="https://github.com/vllm-project/speculators/pull/765 trained in bf16, the weights of all norms are exactly 1.0; "
    "https://github.com/fla-org/flame/issues/47",
    proof=unchanged(
        "layers.0.norm1.weight", "layers.0.norm2.weight", "layers.1.norm1.weight", "layers.1.norm2.weight", "norm.weight"
    ),
)
def _(seed: int) -> Setup:
    model, data = Transformer().bfloat16(), Text(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-4), 30)


@sick(
    CASES,
    "fa_a_callback_clears_before_the_step",
    ("frozen_weights",),
    ("",),
    onset=25,
    source="https://github.com/patrickloeber/pytorchTutorial/issues/19 zero_grad on the wrong side of backward: how could the "
    "optimizer update anything",
    proof=unchanged("embed.weight", "rnn.weight_hh_l0", "head.weight", first=25),
    also=("update_ratio_too_small", "loss_plateau"),
)
def _(seed: int) -> Setup:
    model = Tagger(nn.Linear(32, 24), cell=nn.GRU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def between(i: int) -> None:
        if i >= 25:
            model.zero_grad(set_to_none=False)

    return fit(model, classify(model, Text(seed)), optimizer, 46, between=between)


# Steps of the wrong size


@sick(
    CASES,
    "fa_autoencoder_with_a_rate_of_millionths",
    ("update_ratio_too_small",),
    source="http://karpathy.github.io/2019/04/25/recipe/ and https://cs231n.github.io/neural-networks-3/#ratio: updates over "
    "weights should be near a thousandth",
    proof=every(update_ratio(below=1e-6), loss_stays(0.05)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model = Coder(lambda z: z)
    return fit(model, rebuild(model, Blobs(seed, batch=256)), torch.optim.SGD(model.parameters(), lr=3e-6, momentum=0.5), 30)


@sick(
    CASES,
    "fa_transformer_clipped_to_almost_nothing",
    ("update_ratio_too_small",),
    source="https://github.com/wandb/senpai/pull/978 all batches are clipped and the step is a fraction of what the rate says",
    proof=every(update_ratio(below=1e-6), loss_stays(0.05)),
    also=("loss_plateau", "frozen_weights"),
)
def _(seed: int) -> Setup:
    model = Transformer()

    def between(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-4)

    return fit(model, classify(model, Text(seed)), torch.optim.SGD(model.parameters(), lr=0.05), 28, between=between)


@sick(
    CASES,
    "fa_tagger_adam_at_rate_one",
    ("update_ratio_too_large",),
    source="http://karpathy.github.io/2019/04/25/recipe/ Adam wants rates near 3e-4; here the exponent got lost",
    proof=every(update_ratio(above=2.0, last=1), update_ratio(above=0.1, last=10), loss_grows(2.0)),
    also=(
        "loss_diverging",
        "loss_spike",
        "gradient_spike",
        "exploding_gradient",
        "saturated_activation",
        "vanishing_gradient",
        "loss_plateau",
    ),
)
def _(seed: int) -> Setup:
    model = Tagger(nn.Linear(32, 24))
    nn.init.normal_(model.embed.weight, std=0.1)
    return fit(model, classify(model, Text(seed)), torch.optim.Adam(model.parameters(), lr=1.0), 30)


@sick(
    CASES,
    "fa_residual_rate_multiplied_at_milestone",
    ("update_ratio_too_large",),
    onset=30,
    source="https://arxiv.org/abs/1706.02677 Goyal et al.: a rate scaled without warm-up breaks the training; here a milestone "
    "multiplies where it should divide",
    proof=every(update_ratio(above=0.5, first=30, last=34), loss_grows(5.0, 29)),
    also=(
        "loss_diverging",
        "loss_spike",
        "gradient_spike",
        "exploding_gradient",
        "dead_units",
        "vanishing_gradient",
        "zero_gradient",
        "loss_plateau",
    ),
)
def _(seed: int) -> Setup:
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def before(i: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 if i < 30 else 20.0

    return fit(model, classify(model, Pictures(seed)), optimizer, 50, before)


# What the loss shows


@sick(
    CASES,
    "fa_bootstrapped_value_doubles",
    ("loss_diverging", "exploding_gradient", "update_ratio_too_large"),
    ("",),
    source="http://incompleteideas.net/book/the-book-2nd.html section 11.2: the w to 2w example of Tsitsiklis and Van Roy, "
    "semi-gradient TD without a target network",
    proof=every(loss_grows(1e3, last=16), gradient_grows("weight", 30.0, 15)),
)
def _(seed: int) -> Setup:
    model = nn.Linear(8, 1, bias=False)
    generator = torch.Generator().manual_seed(8000 + seed)
    base = torch.ones(8) / 8**0.5
    nn.init.constant_(model.weight, 0.5)

    def loss(i: int) -> Tensor:
        phi = base + 0.05 * torch.randn(32, 8, generator=generator)
        target = 0.99 * model(2 * phi).detach()
        return F.mse_loss(model(phi), target)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.2), 30)


@sick(
    CASES,
    "fa_unlearning_ascends_since_update_25",
    ("loss_diverging",),
    ("",),
    onset=25,
    source="https://arxiv.org/abs/2404.05868 Zhang et al.: gradient ascent on a language model collapses, its loss grows without bound",
    proof=loss_grows(3.0, 24, 36),
    also=("exploding_gradient", "loss_spike", "gradient_spike"),
)
def _(seed: int) -> Setup:
    model = Transformer()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.015)

    def before(i: int) -> None:
        optimizer.param_groups[0]["maximize"] = i >= 25

    return fit(model, classify(model, Text(seed)), optimizer, 46, before)


@sick(
    CASES,
    "fa_one_batch_of_garbage_pictures",
    ("loss_spike", "gradient_spike"),
    onset=35,
    source="https://github.com/stanford-crfm/mistral/issues/115 loss spikes from bad batches where the data is garbage, then it recovers",
    proof=loss_spikes(35, 8.0),
    also=("unnormalized_input", "update_ratio_too_large"),
)
def _(seed: int) -> Setup:
    data, model = Pictures(seed, batch=32), conv_stack(2, nn.ReLU)
    given = itertools.count()

    def spoiled() -> tuple[Tensor, Tensor]:
        x, y = data()
        return (100 * x.flip(3), y) if next(given) == 35 else (x, y)

    return fit(model, classify(model, spoiled), torch.optim.Adam(model.parameters(), lr=1e-3), 52)


class Forecast(nn.Module):
    """A GRU that says the next value of a series."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.rnn = nn.GRU(1, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Waves:
    """Noisy sines of random phase, and the value that follows."""

    def __init__(self, seed: int, batch: int = 32, length: int = 12) -> None:
        self.generator = torch.Generator().manual_seed(9000 + seed)
        self.batch, self.length = batch, length

    def __call__(self) -> tuple[Tensor, Tensor]:
        phase = 6.28 * torch.rand(self.batch, 1, generator=self.generator)
        x = torch.sin(phase + 0.5 * torch.arange(self.length + 1))
        x = x + 0.05 * torch.randn(x.shape, generator=self.generator)
        return x[:, :-1, None], x[:, -1:]


@sick(
    CASES,
    "fa_forecast_targets_once_in_other_units",
    ("loss_spike", "gradient_spike"),
    onset=42,
    source="https://github.com/stas00/ml-engineering/issues/32 toxic data points at certain iterations make the loss spike",
    proof=every(loss_spikes(42, 50.0), gradient_spikes(42, 10.0)),
)
def _(seed: int) -> Setup:
    data, model = Waves(seed), Forecast()
    given = itertools.count()

    def mixed() -> tuple[Tensor, Tensor]:
        x, y = data()
        if next(given) == 42:
            y = torch.where(torch.arange(len(y))[:, None] < 6, 100 * y, y)
        return x, y

    def between(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, squares(model, mixed), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8), 60, between=between)


class Cosine(nn.Module):
    """Word vectors, compared by the cosine."""

    def __init__(self, words: int = 40, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.context = nn.Linear(width, width)
        with torch.no_grad():
            self.embed.weight[-1] = 1e-5 * self.embed.weight[-1]

    def forward(self, centre: Tensor, other: Tensor) -> Tensor:
        a = F.normalize(self.embed(centre), dim=-1)
        b = F.normalize(self.context(self.embed(other)), dim=-1)
        return 5 * a @ b.T


@sick(
    CASES,
    "fa_rare_word_with_a_vector_near_zero",
    ("gradient_spike",),
    onset=30,
    source="https://github.com/tensorflow/tensorflow/issues/12071 the gradient of a norm is unbounded for small values; "
    "https://github.com/pytorch/pytorch/issues/2421",
    proof=gradient_spikes(30, 100.0),
)
def _(seed: int) -> Setup:
    model = Cosine()
    generator = torch.Generator().manual_seed(10000 + seed)

    def loss(i: int) -> Tensor:
        centre = torch.randperm(39, generator=generator)[:16]
        other = (centre + 1) % 39
        if i == 30:
            centre[0] = 39
        return F.cross_entropy(model(centre, other), torch.arange(16))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=0.01), 50)


@sick(
    CASES,
    "fa_importance_ratio_of_a_stale_rollout",
    ("gradient_spike",),
    onset=33,
    source="https://arxiv.org/abs/1707.06347 Schulman et al., section 3: without clipping the probability ratio leads to an "
    "excessively large policy update",
    proof=gradient_spikes(33, 50.0),
    also=("loss_spike",),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 2, inputs=8, outputs=4)
    generator = torch.Generator().manual_seed(11000 + seed)
    wanted = torch.randn(8, 4, generator=generator)

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 8, generator=generator)
        logp = torch.log_softmax(model(x), -1)
        action = torch.multinomial(logp.detach().exp(), 1, generator=generator)
        taken = logp.gather(1, action)
        old = taken.detach() - (7.0 if i == 33 else 0.0)
        reward = ((x @ wanted).argmax(1, keepdim=True) == action).float()
        return -((taken - old).exp() * (reward - 0.25)).mean()

    return fit(model, loss, torch.optim.RMSprop(model.parameters(), lr=1e-3), 52)


@sick(
    CASES,
    "fa_labels_taken_from_the_next_batch",
    ("loss_plateau",),
    within=100,
    source="https://arxiv.org/abs/1611.03530 Zhang et al.: labels without relation to the pictures; drawn anew, nothing can be learned",
    proof=loss_stays(0.02),
)
def _(seed: int) -> Setup:
    data, model = Pictures(seed, batch=40), conv_stack(2, nn.ReLU)
    with torch.no_grad():
        model.get_submodule("head").weight.mul_(0.1)

    def crossed() -> tuple[Tensor, Tensor]:
        return data()[0], data()[1]

    return fit(model, classify(model, crossed), torch.optim.SGD(model.parameters(), lr=0.05), 130)


@sick(
    CASES,
    "fa_forecast_column_against_a_row",
    ("loss_plateau",),
    within=100,
    source="https://github.com/pytorch/pytorch/pull/18349 mse_loss of shapes (n, 1) and (n,) broadcasts",
    proof=loss_stays(0.03),
)
def _(seed: int) -> Setup:
    data, model = Waves(seed, batch=128, length=8), Forecast(16)
    with torch.no_grad():
        model.head.weight.mul_(0.1)
        model.head.bias.zero_()

    def loss(i: int) -> Tensor:
        x, y = data()
        return (model(x) - y[:, 0]).square().mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 140)


@sick(
    CASES,
    "fa_norm_of_a_single_feature",
    ("loss_plateau",),
    within=100,
    source="https://pytorch.org/docs/stable/generated/torch.nn.LayerNorm.html over one feature the mean is the value: only the bias "
    "is left",
    proof=every(loss_stays(0.03), zero_gradient("1.weight", first=0)),
    also=("zero_gradient", "vanishing_gradient"),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(
        nn.LayerNorm(1, elementwise_affine=False), nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)
    )
    generator = torch.Generator().manual_seed(12000 + seed)

    def loss(i: int) -> Tensor:
        x = torch.randn(256, 1, generator=generator)
        return F.mse_loss(model(x), torch.sin(2 * x))

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-3), 140)


# Gradients and steps that do not arrive


class Speech(nn.Module):
    """Features, an encoder of them, and a classifier."""

    def __init__(self, encode: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 8)), nn.Flatten())
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 8)
        self.encode = encode

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.encode(self.features, x)))


@sick(
    CASES,
    "fa_features_detached_before_the_encoder",
    ("missing_gradient",),
    ("features",),
    source="https://github.com/speechbrain/speechbrain/issues/1396 enc(feats.detach()) takes what is before the encoder out of the graph",
    proof=no_gradient("features.0.weight", "features.0.bias"),
)
def _(seed: int) -> Setup:
    model = Speech(lambda features, x: features(x).detach())
    return fit(model, classify(model, Pictures(seed)), torch.optim.AdamW(model.parameters(), lr=3e-3), 30)


class Towers(nn.Module):
    """Two towers whose outputs are compared within the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.right = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 16))
        self.grad = True

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.grad):
            z = F.normalize(self.right(b), dim=-1)
        return 8 * F.normalize(self.left(a), dim=-1) @ z.T


@sick(
    CASES,
    "fa_tower_without_grad_after_evaluation",
    ("missing_gradient",),
    ("right",),
    onset=20,
    source="https://pytorch.org/docs/stable/notes/autograd.html locally disabling gradient computation: what ran in no-grad mode is "
    "not in the graph; two towers as in https://arxiv.org/abs/2103.00020",
    proof=no_gradient("right.0.weight", "right.2.weight", first=20),
)
def _(seed: int) -> Setup:
    model = Towers()
    generator = torch.Generator().manual_seed(13000 + seed)
    mix = torch.randn(8, 16, generator=generator)

    def loss(i: int) -> Tensor:
        b = torch.randn(32, 8, generator=generator)
        a = b @ mix + 0.3 * torch.randn(32, 16, generator=generator)
        model.grad = i < 20  # the evaluation after update 19 turned it off
        return F.cross_entropy(model(a, b), torch.arange(32))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 48)


class Adapted(nn.Module):
    """A transformer layer beside an adapter that the forward forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer(1)
        self.adapter = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))

    def forward(self, t: Tensor) -> Tensor:
        return self.model(t)


@sick(
    CASES,
    "fa_adapter_never_called",
    ("missing_gradient",),
    ("adapter",),
    within=30,
    source="https://github.com/facebookresearch/fairchem/pull/317 parameters of a model that no forward uses have no gradient after "
    "backward",
    proof=no_gradient("adapter.0.weight", "adapter.2.weight"),
)
def _(seed: int) -> Setup:
    model = Adapted()
    return fit(model, classify(model, Text(seed)), torch.optim.AdamW(model.parameters(), lr=3e-3), 48)


@sick(
    CASES,
    "fa_head_exchanged_behind_the_optimizer",
    ("not_in_optimizer",),
    ("head",),
    source="https://github.com/microsoft/nni/issues/4521 layers are replaced after the optimizer was made, whose parameters are outdated",
    proof=never_moves("head.weight", "head.bias"),
)
def _(seed: int) -> Setup:
    model = ResNet(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.head = nn.Linear(64, 8)

    def loss(i: int) -> Tensor:
        model.zero_grad()
        return classify(model, data)(i)

    data = Pictures(seed)
    return fit(model, loss, optimizer, 30)


@sick(
    CASES,
    "fa_thawed_encoder_never_given_to_adam",
    ("not_in_optimizer",),
    ("encoder",),
    onset=25,
    source="https://arxiv.org/abs/1801.06146 Howard and Ruder: gradual unfreezing; here the optimizer was made of "
    "filter(requires_grad) before",
    proof=never_moves("encoder.0.weight", "encoder.2.weight", first=25),
)
def _(seed: int) -> Setup:
    model, data = Coder(lambda z: z), Blobs(seed)
    model.encoder.requires_grad_(requires_grad=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)

    def before(i: int) -> None:
        if i == 25:
            model.encoder.requires_grad_(requires_grad=True)
        model.zero_grad()

    return fit(model, rebuild(model, data), optimizer, 46, before)


class Lora(nn.Module):
    """A frozen layer and a low-rank addition to it."""

    def __init__(self, inputs: int, outputs: int, rank: int = 4) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(requires_grad=False)
        self.a = nn.Linear(inputs, rank, bias=False)
        self.b = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2 * self.b(self.a(x))


def piled(plain: Plain) -> str:
    """The gradients that are there sum up those of all updates: they are those of a sum of losses."""
    total = [math.sqrt(sum(g[i] ** 2 for g in plain.grads.values() if not math.isnan(g[i]))) for i in range(len(plain.losses))]
    growth = median(total[-5:]) / median(total[1:4])
    assert growth > 2, f"the gradient grows to {growth:.3g}"
    return f"the gradient, never cleared, grows to {growth:.3g} times while the loss ends at {plain.losses[-1]:.3g}"


@sick(
    CASES,
    "fa_adapters_of_low_rank_without_clearing",
    ("gradients_not_zeroed",),
    source="https://github.com/tenstorrent/tt-blacksmith/pull/711 the trainer of LoRA forgot zero_grad after each step",
    proof=piled,
    also=("loss_diverging", "exploding_gradient"),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(Lora(16, 32), nn.ReLU(), Lora(32, 32), nn.ReLU(), nn.Linear(32, 4))
    loss = classify(model, Blobs(seed, spread=2.0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def train() -> Iterator[Event]:
        for i in range(30):
            value = loss(i)
            value.backward()
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


def all_rest(plain: Plain) -> str:
    """No parameter is what it is because of a step: the norms at the end are those of the beginning."""
    for name, norms in plain.weights.items():
        assert norms[0] == norms[-1], f"{name} goes from {norms[0]} to {norms[-1]}"
    return f"{len(plain.losses)} updates, and no weight has changed"


@sick(
    CASES,
    "fa_reversed_condition_of_accumulation",
    ("never_stepped",),
    source="https://github.com/eriklindernoren/PyTorch-YOLOv3/issues/325 `if batches_done % gradient_accumulations:` with one batch "
    "never steps",
    proof=all_rest,
    also=("gradients_not_zeroed", "loss_plateau"),
)
def _(seed: int) -> Setup:
    model = conv_stack(2, nn.LeakyReLU)
    loss = classify(model, Pictures(seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train() -> Iterator[Event]:
        accumulations = 1
        for i in range(30):
            value = loss(i)
            value.backward()
            yield "read", [value]
            if i % accumulations:
                optimizer.step()
                optimizer.zero_grad()
                yield "step", [optimizer]
            else:
                yield "step", []

    return Setup(model, train)


def scaled(model: nn.Module, loss: Callable[[int], Tensor], scaler: torch.amp.GradScaler, updates: int, *, clear: bool) -> Setup:
    """Mixed precision with a scaler; without `clear` gradients are only cleared where the step was made."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def train() -> Iterator[Event]:
        for i in range(updates):
            if clear:
                optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                value = loss(i)
            scaler.scale(value).backward()
            yield "read", [value]
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped = scaler.get_scale() < scale
            if not skipped:
                optimizer.zero_grad()
            yield "step", [] if skipped else [optimizer]

    return Setup(model, train)


def always_bad(plain: Plain) -> str:
    """Every gradient of the head has Inf or NaN in it and no step is made."""
    for name in ("0.weight", "2.weight"):
        assert all(n > 0 for n in plain.nonfinite[name]), f"{name} has finite gradients"
        assert all(math.isnan(s) for s in plain.steps[name]), f"{name} was stepped"
    return f"all {len(plain.losses)} steps were skipped: the scale has been halved as often"


@sick(
    CASES,
    "fa_scaler_halves_until_nothing",
    ("loss_scale_collapse",),
    source="https://github.com/PaddlePaddle/Paddle/issues/67895 gradients are not cleared, so one overflow keeps the scale falling to zero",
    proof=always_bad,
    also=("non_finite_gradient", "gradients_not_zeroed", "never_stepped", "loss_plateau"),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    return scaled(model, classify(model, Blobs(seed)), scaler, 40, clear=False)


# NaN and Inf


@sick(
    CASES,
    "fa_empty_spots_in_the_batch",
    ("non_finite_input",),
    ("",),
    onset=22,
    source="https://github.com/ratschlab/DeepSpot/issues/9 the loss is NaN because of NaN in the input, from empty spots",
    proof=every(first_non_finite(22), first_non_finite(22, "batch")),
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int) -> Setup:
    data, model = Blobs(seed), Watched(mlp(nn.SiLU, 2))
    given = itertools.count()

    def spots() -> tuple[Tensor, Tensor]:
        x, y = data()
        if next(given) == 22:
            x[5] = math.nan
        return x, y

    return fit(model, classify(model, spots), torch.optim.AdamW(model.parameters(), lr=3e-3), 40)


class Pooled(nn.Module):
    """Attention over the positions of a sequence that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 32)
        self.attend = Attend(32)
        self.head = nn.Linear(32, 24)

    def forward(self, t: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.attend(self.embed(t), padding))


class Attend(nn.Module):
    """A pooling by scores, -inf where there is padding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        scores = self.score(x)[..., 0].masked_fill(padding, -math.inf)
        return (torch.softmax(scores, 1)[..., None] * self.value(x)).sum(1)


@sick(
    CASES,
    "fa_one_sequence_is_all_padding",
    ("non_finite_activation",),
    ("attend",),
    onset=18,
    source="https://github.com/pytorch/pytorch/issues/41508 softmax over a row that is masked with -inf throughout is NaN; "
    "https://github.com/pytorch/pytorch/pull/131060",
    proof=every(first_non_finite(18), first_non_finite(18, "attend"), first_non_finite(18, "head")),
    also=("non_finite_loss", "non_finite_gradient", "non_finite_weight"),
)
def _(seed: int) -> Setup:
    model, data = Pooled(), Text(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        length = torch.randint(2, 17, (len(x), 1), generator=data.generator)
        if i == 18:
            length[3] = 0
        return F.cross_entropy(model(x, torch.arange(16) >= length), y[:, -1])

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 36)


def only_the_loss(update: int) -> Proof:
    """The loss is NaN from an update on, and no gradient or weight ever is."""

    def proof(plain: Plain) -> str:
        bad = [not math.isfinite(x) for x in plain.losses]
        assert bad == [i >= update for i in range(len(bad))], f"the loss is bad at {[i for i, b in enumerate(bad) if b]}"
        assert not any(any(counts) for counts in plain.nonfinite.values()), "a gradient is bad"
        return f"the loss is NaN from update {update} on; no gradient is"

    return proof


@sick(
    CASES,
    "fa_divergence_to_targets_with_zeros",
    ("non_finite_loss",),
    onset=20,
    source="https://github.com/deeplearning4j/nd4j/pull/377 the loss is NaN where the target is zero and its logarithm is taken; "
    "https://pytorch.org/docs/stable/generated/torch.nn.KLDivLoss.html",
    proof=only_the_loss(20),
)
def _(seed: int) -> Setup:
    model, data = mlp(nn.ReLU, 2), Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        smooth = 0.2 if i < 20 else 0.0  # from here on the labels are hard
        target = (1 - smooth) * F.one_hot(y, 4).float() + smooth / 4
        logq = torch.log_softmax(model(x), -1)
        return (target * target.log() - target * logq).sum(1).mean()

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 42)


def only_gradients(update: int) -> Proof:
    """At that update the loss is finite, and gradients are not."""

    def proof(plain: Plain) -> str:
        assert math.isfinite(plain.losses[update]), "the loss is not finite"
        return f"the loss is {plain.losses[update]:.3g}"

    return every(first_non_finite(update), proof)


@sick(
    CASES,
    "fa_siamese_pair_of_one_picture",
    ("non_finite_gradient",),
    ("",),
    onset=24,
    source="https://github.com/pytorch/pytorch/issues/2421 the square root in a norm has an infinite derivative at zero, and zero "
    "times that is NaN",
    proof=only_gradients(24),
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
)
def _(seed: int) -> Setup:
    data = Pictures(seed)
    model = conv_stack(2, nn.ReLU)

    def loss(i: int) -> Tensor:
        (x1, y1), (x2, y2) = data(), data()
        if i == 24:
            x2[0], y2[0] = x1[0], y1[0]
        distance = (model(x1) - model(x2)).square().sum(1).sqrt()
        same = (y1 == y2).float()
        return (same * distance + (1 - same) * F.relu(2 - distance)).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 42)


def weights_break(parameter: str) -> Proof:
    """The first update has a finite loss and finite gradients, and after its step the parameter is not finite."""

    def proof(plain: Plain) -> str:
        assert math.isfinite(plain.losses[0]), "the first loss is not finite"
        assert not any(counts[0] for counts in plain.nonfinite.values()), "a gradient of the first update is not finite"
        assert math.isfinite(plain.weights[parameter][0]), f"{parameter} is not finite from the beginning"
        assert not math.isfinite(plain.weights[parameter][1]), f"{parameter} is finite after the first step"
        return f"{parameter} is not finite after the first step, all gradients are"

    return proof


@sick(
    CASES,
    "fa_adam_epsilon_underflows_in_half",
    ("non_finite_weight",),
    ("embed",),
    source="https://github.com/NVIDIA/apex/issues/240, https://github.com/google-deepmind/optax/issues/1754 Adam in float16: eps of "
    "1e-8 is zero, and elements without gradient become 0 / 0",
    proof=weights_break("embed.weight"),
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient"),
)
def _(seed: int) -> Setup:
    model, data = Tagger(nn.Linear(32, 24), cell=nn.GRU), Text(seed)
    model.embed.half()
    model.embed.register_forward_hook(lambda module, args, output: output.float())

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3, foreach=False), 24)


# Healthy runs, each with something in it that looks like a fault


@healthy(
    CASES,
    "fa_low_rank_adapters_on_a_frozen_body",
    source="https://arxiv.org/abs/2106.09685 Hu et al.: B begins at zero, so the first gradient of A is exactly zero, and the body "
    "is frozen",
    proof=every(converges(0.6), zero_gradient("0.a.weight", last=1)),
)
def _(seed: int) -> Setup:
    model = nn.Sequential(Lora(16, 32), nn.ReLU(), Lora(32, 32), nn.ReLU(), Lora(32, 4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return fit(model, classify(model, Blobs(seed)), optimizer, 60)


@healthy(
    CASES,
    "fa_causal_masks_and_rates_from_zero",
    source="https://arxiv.org/abs/1706.03762 Vaswani et al., sections 3.2.3 and 5.3: masks of -inf, and a rate that is warmed up from zero",
    proof=converges(0.8),
)
def _(seed: int) -> Setup:
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98))

    def before(i: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.006 * min(i / 20, 1.0)

    return fit(model, classify(model, Text(seed)), optimizer, 70, before)


class Mixture(nn.Module):
    """Experts of which each input takes the first in rank; some are not chosen in a batch."""

    def __init__(self, experts: int = 6) -> None:
        super().__init__()
        self.router = nn.Linear(16, experts)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(experts))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = torch.softmax(self.router(x), -1).max(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, weight[rows, None] * expert(x[rows]))
        return self.head(x + out)


@healthy(
    CASES,
    "fa_experts_that_miss_some_batches",
    source="https://arxiv.org/abs/2101.03961 Fedus et al.: each token goes to one expert; an expert without tokens has no gradient",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model = Mixture()
    return fit(model, classify(model, Blobs(seed, classes=4, batch=12)), torch.optim.Adam(model.parameters(), lr=5e-3), 80)


def generated_mean(plain: Plain) -> float:
    """How far the mean of what the generator gives is from that of the data, (3, -2)."""
    generator = plain.setup.model["generator"]  # type: ignore[index]
    with torch.no_grad():
        z = torch.randn(2000, 4, generator=torch.Generator().manual_seed(1))
        return float((generator(z).mean(0) - torch.tensor([3.0, -2.0])).norm())


@healthy(
    CASES,
    "fa_generator_against_discriminator",
    source="https://arxiv.org/abs/1406.2661 Goodfellow et al.: two networks with two optimizers, whose losses do not fall",
    proof=measured("the distance of the means", generated_mean, 0.6),
)
def _(seed: int) -> Setup:
    model = nn.ModuleDict(
        {
            "generator": nn.Sequential(nn.Linear(4, 24), nn.LeakyReLU(0.2), nn.Linear(24, 2)),
            "discriminator": nn.Sequential(nn.Linear(2, 24), nn.LeakyReLU(0.2), nn.Linear(24, 1)),
        }
    )
    g, d = model["generator"], model["discriminator"]
    first = torch.optim.Adam(g.parameters(), lr=0.01, betas=(0.0, 0.9))
    second = torch.optim.Adam(d.parameters(), lr=0.01, betas=(0.0, 0.9))
    generator = torch.Generator().manual_seed(14000 + seed)

    def train() -> Iterator[Event]:
        for _ in range(160):
            real = torch.tensor([3.0, -2.0]) + 0.7 * torch.randn(64, 2, generator=generator)
            fake = g(torch.randn(64, 4, generator=generator))
            second.zero_grad()
            value = F.softplus(-d(real)).mean() + F.softplus(d(fake.detach())).mean()
            value.backward()
            yield "read", [value]
            second.step()
            yield "step", [second]
            first.zero_grad()
            value = F.softplus(-d(fake)).mean()
            value.backward()
            yield "read", [value]
            first.step()
            yield "step", [first]

    return Setup(dict(model.items()), train)


class Coupling(nn.Module):
    """One affine coupling of a flow; the last layer begins at zero."""

    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 4))
        self.flip = flip
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        if self.flip:
            a, b = b, a
        log_scale, shift = self.net(a).chunk(2, 1)
        b = (b - shift) * log_scale.tanh().mul(2).exp()
        return torch.cat((b, a) if self.flip else (a, b), 1), log_scale.tanh().mul(2).sum(1)


class Flow(nn.Module):
    """Couplings in turn; gives the negative log-likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(k % 2 == 1) for k in range(4))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for coupling in self.couplings:
            x, log_det = coupling(x)
            total = total + log_det
        return (0.5 * x.square().sum(1) + 2 * math.log(2 * math.pi) - total).mean()


def falls_through_zero(plain: Plain) -> str:
    """The loss begins above zero and ends below it, finite throughout."""
    a, b = median(plain.losses[:5]), median(plain.losses[-10:])
    assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
    assert b < -0.5 < 0.5 < a, f"the loss goes from {a:.3g} to {b:.3g}"
    return f"the negative log-likelihood falls from {a:.3g} to {b:.3g}"


@healthy(
    CASES,
    "fa_flow_whose_likelihood_changes_sign",
    source="https://arxiv.org/abs/1605.08803 Dinh et al.: couplings whose last layers begin at zero; a density has a log-likelihood "
    "of either sign",
    proof=falls_through_zero,
)
def _(seed: int) -> Setup:
    model = Flow()
    generator = torch.Generator().manual_seed(15000 + seed)

    def loss(i: int) -> Tensor:
        z = 0.15 * torch.randn(128, 4, generator=generator)
        return model(torch.cat((z[:, :2], z[:, 2:] + z[:, :2].square()), 1))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=0.01), 100)


def skips_then(converged: Proof) -> Proof:
    """Some of the first updates are skipped, none of the last 20 is, and it converges."""

    def proof(plain: Plain) -> str:
        steps = plain.steps["0.weight"]
        skipped = [i for i, s in enumerate(steps) if math.isnan(s)]
        assert skipped, "no update is skipped"
        assert skipped[-1] < len(steps) - 20, f"skipped: {skipped}"
        return f"{len(skipped)} updates are skipped, the last is {skipped[-1]}; {converged(plain)}"

    return proof


@healthy(
    CASES,
    "fa_scaler_that_begins_too_high",
    source="https://pytorch.org/docs/stable/amp.html the first updates overflow while the scaler looks for its scale, and are skipped",
    proof=skips_then(converges(0.5)),
)
def _(seed: int) -> Setup:
    model = mlp(nn.ReLU, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    return scaled(model, classify(model, Blobs(seed)), scaler, 70, clear=True)


@healthy(
    CASES,
    "fa_stochastic_depth_with_zero_gains",
    source="https://arxiv.org/abs/1603.09382 Huang et al.: blocks are left out at random; https://arxiv.org/abs/1706.02677, section "
    "5.1: the last gain of each begins at zero",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model = ResNet(3, zero=True, keep=0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    return fit(model, classify(model, Pictures(seed)), optimizer, 60)


class Bag(nn.Module):
    """Documents as bags of words from a large vocabulary, in a sparse table."""

    def __init__(self, words: int = 2000) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(words, 16, sparse=True)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(16, 4))

    def forward(self, t: Tensor) -> Tensor:
        return self.head(self.words(t))


@healthy(
    CASES,
    "fa_table_of_words_mostly_unseen",
    source="https://pytorch.org/docs/stable/generated/torch.optim.SparseAdam.html sparse gradients beside dense ones, two "
    "optimizers, most rows untouched",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model = Bag()
    optimizers = [
        torch.optim.SparseAdam(model.words.parameters(), lr=0.05),
        torch.optim.Adam(model.head.parameters(), lr=0.01),
    ]
    generator = torch.Generator().manual_seed(16000 + seed)

    def train() -> Iterator[Event]:
        for _ in range(80):
            y = torch.randint(4, (32,), generator=generator)
            t = torch.randint(40, (32, 8), generator=generator) + 40 * y[:, None]
            for optimizer in optimizers:
                optimizer.zero_grad()
            value = F.cross_entropy(model(t), y)
            value.backward()
            yield "read", [value]
            for optimizer in optimizers:
                optimizer.step()
            yield "step", optimizers

    return Setup(model, train)


def reward_missed(plain: Plain) -> float:
    """The share of states in which the trained policy does not prefer the best action."""
    model = plain.setup.model
    with torch.no_grad():
        x = torch.eye(6)
        return float((model(x).argmax(1) != torch.arange(6) % 3).float().mean())  # type: ignore[operator]


@healthy(
    CASES,
    "fa_policy_gradient_on_bandits",
    source="http://incompleteideas.net/book/the-book-2nd.html section 13.4, REINFORCE with baseline: a noisy loss around zero that "
    "says nothing",
    proof=measured("the share of states with the wrong action", reward_missed, 0.01),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 1, inputs=6, outputs=3)
    generator = torch.Generator().manual_seed(17000 + seed)
    baseline = [0.0]

    def loss(i: int) -> Tensor:
        state = torch.randint(6, (32,), generator=generator)
        logp = torch.log_softmax(model(F.one_hot(state, 6).float()), -1)
        action = torch.multinomial(logp.detach().exp(), 1, generator=generator)[:, 0]
        reward = (action == state % 3).float() + 0.3 * torch.randn(32, generator=generator)
        advantage = reward - baseline[0]
        baseline[0] += 0.1 * (float(reward.mean()) - baseline[0])
        return -(advantage * logp[torch.arange(32), action]).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=0.01), 120)


class Folded(nn.Module):
    """A transformer whose layers are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer(1)

    def forward(self, t: Tensor) -> Tensor:
        m = self.model
        x = m.embed(t) + m.place(torch.arange(t.shape[1]))
        for layer in m.layers:
            x = checkpoint(layer, x, m.mask[: t.shape[1], : t.shape[1]], use_reentrant=False)
        return m.head(m.norm(x))


@healthy(
    CASES,
    "fa_checkpointed_layers_over_four_parts",
    source="https://arxiv.org/abs/1604.06174 Chen et al.; https://pytorch.org/docs/stable/checkpoint.html: forwards run twice, and "
    "four backward passes make an update",
    proof=converges(0.85),
)
def _(seed: int) -> Setup:
    model = Folded()
    loss = classify(model, Text(seed, batch=3, length=10), scale=0.25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def train() -> Iterator[Event]:
        for i in range(26):
            optimizer.zero_grad()
            values = []
            for _ in range(4):
                values.append(loss(i))
                values[-1].backward()
            yield "read", values
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


class Student(nn.Module):
    """A network with a moving average of itself, which gets no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.student = mlp(nn.ReLU, 2)
        self.teacher = mlp(nn.ReLU, 2)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(requires_grad=False)

    def follow(self) -> None:
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                t.lerp_(s, 0.05)


@healthy(
    CASES,
    "fa_student_of_its_own_average",
    source="https://arxiv.org/abs/1703.01780 Tarvainen and Valpola: the teacher is an average of the student, in no optimizer and "
    "without gradient",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    model, data = Student(), Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        noise = 0.2 * torch.randn(x.shape, generator=data.generator)
        out = model.student(x + noise)
        with torch.no_grad():
            target = torch.softmax(model.teacher(x), -1)
        return F.cross_entropy(out, y) + 0.5 * (torch.softmax(out, -1) - target).square().sum(1).mean()

    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.05, momentum=0.9)
    return fit(model, loss, optimizer, 70, before=lambda i: model.follow())


@healthy(
    CASES,
    "fa_cosine_rate_with_warm_restarts",
    source="https://arxiv.org/abs/1608.03983 Loshchilov and Hutter: the rate goes down to zero and jumps back, and the loss with it",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model = ResNet(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    def before(i: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * (i % 20) / 20))

    return fit(model, classify(model, Pictures(seed)), optimizer, 70, before)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return x.sign()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        return grad


@healthy(
    CASES,
    "fa_binary_codes_straight_through",
    source="https://arxiv.org/abs/1308.3432 Bengio et al.: the gradient passes a sign as if it were the identity",
    proof=converges(0.8),
)
def _(seed: int) -> Setup:
    model = Coder(_Straight.apply, code=16)
    return fit(model, rebuild(model, Blobs(seed, spread=0.5)), torch.optim.Adam(model.parameters(), lr=5e-3), 80)


class Distilled(nn.Module):
    """A classifier of sequences by attention (a softmax inside) taught by soft labels (a softmax beside)."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Additive(1.0)
        self.teacher = nn.Linear(8, 4).requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.pool(x), torch.softmax(4 * self.teacher(x).amax(1), -1)


@healthy(
    CASES,
    "fa_soft_labels_with_soft_attention",
    source="https://arxiv.org/abs/1503.02531 Hinton et al.: log-softmax of the student against a softmax of the teacher, at a temperature",
    proof=converges(0.6),
)
def _(seed: int) -> Setup:
    model, data = Distilled(), Marked(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        out, soft = model(x)
        target = 0.9 * F.one_hot(y, 4).float() + 0.1 * soft
        return F.kl_div(torch.log_softmax(out / 2, -1), torch.softmax(4 * target, -1), reduction="batchmean")

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=0.02), 80)


def waits_then_falls(plain: Plain) -> str:
    """The loss is flat in its first third and low at the end."""
    third = len(plain.losses) // 4
    a, b, c = median(plain.losses[:10]), median(plain.losses[third - 10 : third]), median(plain.losses[-10:])
    assert b > 0.85 * a, f"the loss has gone from {a:.3g} to {b:.3g} already"
    assert c < 0.2 * a, f"the loss ends at {c:.3g}, from {a:.3g}"
    return f"the loss is {a:.3g}, then {b:.3g}, and {c:.3g} at last"


@healthy(
    CASES,
    "fa_deep_linear_leaves_its_saddle",
    source="https://arxiv.org/abs/1312.6120 Saxe et al.: deep linear networks of small weights have a long plateau, then a sudden "
    "transition",
    proof=waits_then_falls,
)
def _(seed: int) -> Setup:
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    for layer in model:
        layer.weight.data = 0.14 * torch.eye(8) + 0.005 * torch.randn(8, 8)
    data = Regression(seed, targets=8, batch=64, noise=0.0)
    turn = nn.init.orthogonal_(torch.empty(8, 8), generator=data.generator)
    data.matrix = turn @ torch.diag(torch.linspace(0.9, 1.1, 8)) @ turn.T
    return fit(model, squares(model, data), torch.optim.SGD(model.parameters(), lr=0.5), 130)


@healthy(
    CASES,
    "fa_one_hot_code_in_a_wide_relu",
    source="https://arxiv.org/abs/2406.04093 Gao et al.: most of a sparse code is exactly zero in health",
    proof=every(converges(0.3), measured("what is not zero", lambda plain: 1 - plain.outputs["act"][-1].zeros, 0.6)),  # type: ignore[union-attr]
)
def _(seed: int) -> Setup:
    model = Sparse()
    generator = torch.Generator().manual_seed(18000 + seed)

    def loss(i: int) -> Tensor:
        x = F.one_hot(torch.randint(16, (64,), generator=generator), 16).float() * 4
        out, z = model(x)
        return F.mse_loss(out, x) + 0.002 * z.sum(1).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=0.01), 90)


class Variational(nn.Module):
    """A variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        mu, log_var = self.encoder(x).float().chunk(2, 1)
        z = mu + (0.5 * log_var).exp() * torch.randn(mu.shape, generator=generator)
        return self.decoder(z).float(), mu, log_var


def rebuilt(plain: Plain) -> float:
    """The squared error of what the trained autoencoder gives for new inputs, over their variance."""
    model = plain.setup.model
    centres = model.centres  # type: ignore[union-attr]
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        x = centres[torch.randint(4, (400,), generator=g)] + 0.5 * torch.randn(400, 16, generator=g)
        out = model(x, g)[0]  # type: ignore[operator]
        return float((out - x).square().mean() / (x - x.mean(0)).square().mean())


@healthy(
    CASES,
    "fa_variational_with_an_annealed_divergence",
    source="https://arxiv.org/abs/1511.06349 Bowman et al., section 3.1: the weight of the divergence grows, and the loss with it; "
    "in bfloat16",
    proof=measured("the squared error over the variance", rebuilt, 0.6),
)
def _(seed: int) -> Setup:
    model, data = Variational(), Blobs(seed, spread=0.5)
    model.register_buffer("centres", data.centres)

    def loss(i: int) -> Tensor:
        x, _ = data()
        with torch.autocast("cpu", torch.bfloat16):
            out, mu, log_var = model(x, data.generator)
        divergence = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        return (out - x).square().sum(1).mean() + min(i / 60, 1.0) * divergence

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 100)


@healthy(
    CASES,
    "fa_interpolation_until_nothing_left",
    source="https://arxiv.org/abs/1712.06559 Ma et al.: where a model interpolates its data, loss and gradient go to zero together",
    proof=converges(1e-3),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 1, width=64, inputs=8, outputs=2)
    x, y = Regression(seed, batch=12)()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return fit(model, lambda i: F.mse_loss(model(x), y), optimizer, 200)
