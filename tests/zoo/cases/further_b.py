"""Runs drawn later, of the messier kind: recurrent nets, adversaries, agents, flows, graphs, loops within loops, several optimizers."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import Blobs, Case, Event, Pictures, Proof, Setup, Text, fit, healthy, mlp, sick
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

NON_FINITE = ("non_finite_input", "non_finite_weight", "non_finite_activation", "non_finite_loss", "non_finite_gradient")
"""What a NaN becomes once it has been stepped with."""

# -- loops -------------------------------------------------------------------------------------------------------------------------


class Hand:
    """Stands in a ("step", ...) event for an update made by hand."""

    def __init__(self, lr: float) -> None:
        self.param_groups = [{"lr": lr}]


def turns(
    model: nn.Module | Mapping[str, nn.Module],
    turn: Callable[[int], tuple[torch.optim.Optimizer, Callable[[], Tensor]]],
    updates: int,
    after: Callable[[int], None] | None = None,
) -> Setup:
    """Several optimizers that take turns: `turn(i)` names the one of update i and what it minimises."""

    def train() -> Iterator[Event]:
        for i in range(updates):
            optimizer, loss = turn(i)
            optimizer.zero_grad()
            value = loss()
            value.backward()
            yield "read", [value]
            optimizer.step()
            if after:
                after(i)
            yield "step", [optimizer]

    return Setup(model, train)


def random(seed: int) -> torch.Generator:
    """A generator of data, apart from that of the weights."""
    return torch.Generator().manual_seed(7000 + seed)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


# -- proofs ------------------------------------------------------------------------------------------------------------------------


def shows(what: Callable[[Plain], float], least: float, text: str) -> Proof:
    """Some number of the run is above `least`."""

    def proof(plain: Plain) -> str:
        number = what(plain)
        assert number > least, f"{text}: {number:.4g}, not above {least:g}"
        return f"{text}: {number:.4g}"

    return proof


def loss_jumps(update: int, factor: float) -> Proof:
    """The loss of one update is more than `factor` times the largest of the 15 before it."""

    def proof(plain: Plain) -> str:
        before = max(plain.losses[update - 15 : update])
        ratio = plain.losses[update] / before
        assert ratio > factor, f"at update {update} the loss is {ratio:.3g} times the largest before it, not {factor:g}"
        return f"at update {update} the loss is {ratio:.3g} times the largest of the 15 before it"

    return proof


def well(until: int) -> Proof:
    """Before `until` the loss falls and everything is finite: the fault is not there from the start."""

    def proof(plain: Plain) -> str:
        losses = plain.losses[:until]
        a, b = median(losses[:5]), median(losses[-5:])
        assert all(math.isfinite(x) for x in losses), "a loss before the fault is not finite"
        assert b < a, f"the loss before the fault goes from {a:.4g} to {b:.4g}"
        return f"until update {until} the loss goes from {a:.4g} to {b:.4g}"

    return proof


def never_moves(first: int = 0) -> Proof:
    """From update `first` on no step is taken, though gradients are there, and the weights stay as they are."""

    def proof(plain: Plain) -> str:
        assert all(math.isnan(x) for steps in plain.steps.values() for x in steps[first:]), "a step is taken"
        for name, norms in plain.weights.items():
            assert len(set(norms[first:])) == 1, f"{name} moves"
        for i in range(first, len(plain.losses)):
            assert any(plain.grads[name][i] > 0 or plain.nonfinite[name][i] for name in plain.grads), f"there is no gradient at {i}"
        return f"from update {first} on nothing steps"

    return proof


def measured(what: Callable[[Plain], float], below: float, text: str) -> Proof:
    """A number of the trained model is below `below`, and every loss was finite: it has learned."""

    def proof(plain: Plain) -> str:
        number = what(plain)
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        assert number < below, f"{text}: {number:.4g}, not below {below:g}"
        return f"{text}: {number:.4g}"

    return proof


# == vanishing =====================================================================================================================


class Recall(nn.Module):
    """Encoder and decoder of plain tanh cells: after 40 steps of noise the decoder is to say which token came first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 16)
        self.encoder = nn.RNN(16, 24, batch_first=True)
        self.decoder = nn.RNN(4, 24, batch_first=True)
        self.head = nn.Linear(24, 8)

    def forward(self, tokens: Tensor, noise: Tensor) -> Tensor:
        _, state = self.encoder(self.embed(tokens))
        out, _ = self.decoder(noise, state)
        return self.head(out[:, -1])


@sick(
    CASES,
    "fb_recall_over_forty_plain_tanh_steps",
    ("vanishing_gradient",),
    ("embed", "encoder"),
    source="arXiv 1211.5063, On the difficulty of training recurrent neural networks: the temporal order task",
    proof=every(
        gradient_ratio("encoder.weight_ih_l0", "decoder.weight_hh_l0", 1e-4),
        gradient_ratio("embed.weight", "head.weight", 1e-4),
        loss_stays(0.1),
    ),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model, g = Recall(), random(seed)

    def loss(i: int) -> Tensor:
        tokens = torch.randint(8, (32, 6), generator=g)
        return F.cross_entropy(model(tokens, torch.randn(32, 40, 4, generator=g)), tokens[:, 0])

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 40)


class DeepGCN(nn.Module):
    """Graph convolutions with a logistic activation, around each of which a skip connection leads that can be faded out."""

    def __init__(self, adjacency: Tensor, depth: int = 10, width: int = 16) -> None:
        super().__init__()
        self.adjacency, self.skip = adjacency, 1.0
        self.embed = nn.Linear(8, width)
        self.convs = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.acts = nn.ModuleList(nn.Sigmoid() for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for conv, act in zip(self.convs, self.acts, strict=True):
            h = self.skip * h + act(self.adjacency @ conv(h)) - 0.5
        return self.head(h)


def ring(nodes: int, g: torch.Generator, extra: float = 0.1) -> Tensor:
    """The normalised adjacency of a ring with some chords and self-loops."""
    a = torch.eye(nodes)
    index = torch.arange(nodes)
    a[index, (index + 1) % nodes] = 1
    a = ((a + a.T + (torch.rand(nodes, nodes, generator=g) < extra / 2).float()) > 0).float()
    a = ((a + a.T) > 0).float()
    d = a.sum(1).rsqrt()
    return d[:, None] * a * d[None]


@sick(
    CASES,
    "fb_gcn_skips_faded_out_at_25_under_adam",
    ("vanishing_gradient",),
    ("embed", *(f"convs.{k}" for k in range(8)), *(f"acts.{k}" for k in range(8))),
    source="arXiv 1609.02907, Semi-supervised classification with graph convolutional networks, appendix B: depth without residuals",
    proof=every(
        well(25),
        gradient_ratio("head.weight", "convs.0.weight", 300.0, 0, 25),
        gradient_ratio("convs.0.weight", "convs.9.weight", 1e-4, 26),
        loss_stays(0.1, 30),
    ),
    onset=25,
    also=("loss_spike", "gradient_spike", "loss_diverging", "loss_plateau"),
)
def _(seed: int) -> Setup:
    g = random(seed)
    model = DeepGCN(ring(24, g, 0.0))
    classes = torch.arange(24) // 8
    centres = 2 * torch.randn(3, 8, generator=g)

    def loss(i: int) -> Tensor:
        return F.cross_entropy(model(centres[classes] + torch.randn(24, 8, generator=g)), classes)

    def before(i: int) -> None:
        model.skip = 1.0 if i < 25 else 0.0

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 50, before)


# == exploding =====================================================================================================================


class Siren(nn.Module):
    """Coordinates to a colour through sines of 30 W x, which want weights far smaller than those of nn.Linear."""

    def __init__(self, depth: int = 5, width: int = 48) -> None:
        super().__init__()
        sizes = [2] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        return self.head(x)


@sick(
    CASES,
    "fb_siren_with_the_init_of_linear_by_adam",
    ("exploding_gradient", "poor_init"),
    ("layers",),
    source="arXiv 2006.09661, Implicit neural representations with periodic activation functions, section 3.2: the init matters",
    proof=every(gradient_ratio("head.weight", "layers.1.weight", 1e-2), gradient_ratio("layers.4.weight", "layers.0.weight", 1e-2)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model, g = Siren(), random(seed)

    def loss(i: int) -> Tensor:
        x = 2 * torch.rand(64, 2, generator=g) - 1
        return F.mse_loss(model(x), torch.sin(4 * x[:, :1]) * torch.cos(3 * x[:, 1:]))

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-4), 30)


def critic(width: int = 32) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, width),
        nn.LeakyReLU(0.2), nn.Linear(width, 1),
    )  # fmt: skip


def generator(width: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def clip_weights(model: nn.Module, at: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-at, at)


@sick(
    CASES,
    "fb_wgan_resumed_without_its_weight_clipping",
    ("exploding_gradient",),
    ("D",),
    source="arXiv 1701.07875, Wasserstein GAN: without the constraint the critic has no bound",
    proof=every(
        gradient_grows("D.2.weight", 1e3, 44, since=28),
        shows(lambda p: 8 - p.grads["D.2.weight"][28] / p.grads["D.2.weight"][12], 0, "eight less the growth from update 12 to 28"),
    ),
    onset=30,
    also=("loss_diverging", "loss_spike", "gradient_spike", "update_ratio_too_large", *NON_FINITE),
    within=15,
)
def _(seed: int) -> Setup:
    d, made, g = critic(), generator(), random(seed)
    clip_weights(d, 0.2)
    of_d, of_g = torch.optim.SGD(d.parameters(), lr=0.1), torch.optim.Adam(made.parameters(), lr=1e-3)

    def turn(i: int) -> tuple[torch.optim.Optimizer, Callable[[], Tensor]]:
        real = torch.randn(64, 2, generator=g) * 0.3 + torch.tensor([2.0, -1.0])
        z = torch.randn(64, 4, generator=g)
        if i % 4 == 3:
            return of_g, lambda: -d(made(z)).mean()
        return of_d, lambda: d(made(z).detach()).mean() - d(real).mean()

    def after(i: int) -> None:
        if i < 30:
            clip_weights(d, 0.2)

    return turns({"D": d, "G": made}, turn, 50, after)


# == zero gradient =================================================================================================================


class Policy(nn.Module):
    """A Gaussian policy; the logarithm of its deviation is clamped."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 32), nn.ELU(), nn.Linear(32, 32), nn.ELU())
        self.mean = nn.Linear(32, 2)
        self.log_std = nn.Linear(32, 2)
        self.bounds = (-5.0, 2.0)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        return {"mean": self.mean(h), "log_std": self.log_std(h).clamp(*self.bounds)}


@sick(
    CASES,
    "fb_policy_deviation_clamped_flat_at_30",
    ("zero_gradient",),
    ("log_std",),
    source="https://github.com/leggedrobotics/rsl_rl/pull/190 bounds of log_std in PPO; here both bounds are the same in the second phase",
    proof=every(
        well(30),
        shows(lambda p: min(p.grads["log_std.weight"][:30]), 0, "least gradient of log_std.weight before"),
        zero_gradient("log_std.weight", "log_std.bias", first=30),
    ),
    onset=30,
)
def _(seed: int) -> Setup:
    model, g = Policy(), random(seed)
    expert = torch.randn(6, 2, generator=g) / 2

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 6, generator=g)
        action = torch.tanh(x @ expert) + 0.3 * (1 + x[:, :1].abs()) * torch.randn(64, 2, generator=g)
        out = model(x)
        return (out["log_std"] + 0.5 * ((action - out["mean"]) / out["log_std"].exp()) ** 2).mean()

    def before(i: int) -> None:
        if i == 30:
            model.bounds = (0.5, 0.5)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 55, before)


class LoRA(nn.Module):
    """A frozen Linear layer and a trained product of two thin matrices."""

    def __init__(self, base: nn.Linear, rank: int = 4, scale: float = 2.0) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


@sick(
    CASES,
    "fb_lora_both_factors_zero_under_adamw",
    ("zero_gradient",),
    ("0.down", "0.up", "2.down", "2.up"),
    source="arXiv 2106.09685, LoRA, section 4.1: one factor is random, only the other zero",
    proof=every(
        zero_gradient("0.down.weight", "0.up.weight", "2.down.weight", "2.up.weight"),
        shows(lambda p: min(p.grads["4.bias"]), 0, "least gradient of the head's bias"),
    ),
    also=("poor_init",),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, spread=1.5)
    model = nn.Sequential(LoRA(nn.Linear(16, 32)), nn.GELU(), LoRA(nn.Linear(32, 32)), nn.GELU(), nn.Linear(32, 4))
    for layer in (model[0], model[2]):
        nn.init.zeros_(layer.down.weight)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3), 40)


# == dead units ====================================================================================================================


class Detector(nn.Module):
    """A convolutional tower before a map of class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(inplace=True)
        )
        self.score = nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.tower(x))


@sick(
    CASES,
    "fb_focal_prior_bias_in_every_conv",
    ("dead_units",),
    ("tower.1", "tower.3"),
    source="arXiv 1708.02002, Focal loss: the bias -log((1 - p) / p) belongs to the last layer of the classification branch alone",
    proof=every(dead_fraction("tower.1", 0.9), dead_fraction("tower.3", 0.9)),
    also=("zero_gradient", "poor_init", "loss_plateau", "update_ratio_too_small"),
)
def _(seed: int) -> Setup:
    model, data = Detector(), Pictures(seed)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, 0.05)
            nn.init.constant_(m.bias, -math.log(0.99 / 0.01))

    def loss(i: int) -> Tensor:
        x, y = data()
        logits = model(x)
        target = torch.zeros_like(logits)
        target[torch.arange(len(y)), y, :, y % 8] = 1
        p = torch.sigmoid(logits)
        weight = torch.where(target > 0, 0.25 * (1 - p) ** 2, 0.75 * p**2)
        return (weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).sum() / target.sum()

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), 40)


class QNet(nn.Module):
    """Action values; one activation object serves both hidden layers."""

    def __init__(self, states: int = 6, actions: int = 3, width: int = 32) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(states, width), nn.Linear(width, width)
        self.value = nn.Linear(width, actions)
        self.act = nn.ReLU()

    def forward(self, s: Tensor) -> Tensor:
        return self.value(self.act(self.second(self.act(self.first(s)))))


def advantage_of(states: Tensor, table: Tensor) -> Tensor:
    """A reward for each action."""
    return torch.sin(states @ table)


@sick(
    CASES,
    "fb_convex_net_held_on_the_wrong_side_under_adam",
    ("dead_units",),
    ("3",),
    source="arXiv 1609.07152, Input convex neural networks: weights of hidden layers at zero or above; here from update 30 on at zero or below",
    proof=every(well(30), shows(lambda p: 0.3 - _dead(p, "3", 15, 30), 0, "0.3 less dead before"), dead_fraction("3", 0.8, 30)),
    onset=30,
    also=(
        "zero_gradient",
        "vanishing_gradient",
        "loss_spike",
        "gradient_spike",
        "loss_diverging",
        "loss_plateau",
        "update_ratio_too_large",
    ),
)
def _(seed: int) -> Setup:
    model, g = mlp(nn.ReLU, 2, 24, 4, 1), random(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def hold(i: int) -> None:
        with torch.no_grad():
            for layer in (model[2], model[4]):
                layer.weight.abs_() if i < 30 else layer.weight.abs_().neg_()

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 4, generator=g)
        return F.mse_loss(model(x)[:, 0], x.abs().sum(1))

    return fit(model, loss, optimizer, 60, hold)


def _dead(plain: Plain, module: str, first: int, last: int) -> float:
    fired = torch.stack([o.fired for o in plain.outputs[module][first:last] if o is not None]).any(0)
    return float((~fired).double().mean())


# == saturated =====================================================================================================================


class SumAggregation(nn.Module):
    """Message passing that sums over all neighbours, and does not divide by their number."""

    def __init__(self, adjacency: Tensor, width: int = 24) -> None:
        super().__init__()
        self.adjacency = adjacency
        self.first, self.second, self.head = nn.Linear(10, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.squash, self.squash2 = nn.Tanh(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.squash(self.adjacency @ self.first(x))
        h = self.squash2(self.adjacency @ self.second(h))
        return self.head(h)


def low_derivative(module: str, share: float, first: int = 0, last: int | None = None) -> Proof:
    """The outputs of a tanh are so near to one that the mean derivative, 1 - rms squared, is below `share`, in the median."""

    def proof(plain: Plain) -> str:
        derivative = median(1 - o.rms**2 for o in plain.outputs[module][first:last] if o is not None)
        assert derivative < share, f"the mean derivative of {module} is {derivative:.3g}, not below {share:g}"
        return f"the mean derivative of {module} is {derivative:.3g}"

    return proof


@sick(
    CASES,
    "fb_dense_graph_summed_into_tanh",
    ("saturated_activation",),
    ("squash", "squash2"),
    source="arXiv 1609.02907, section 2.1, the renormalisation trick: unnormalised sums lead to numerical instabilities",
    proof=every(low_derivative("squash", 0.1), low_derivative("squash2", 0.1)),
    also=("vanishing_gradient", "zero_gradient", "loss_plateau"),
)
def _(seed: int) -> Setup:
    g = random(seed)
    a = (torch.rand(200, 200, generator=g) < 0.9).float()
    model = SumAggregation(a)
    centre = torch.randn(3, 10, generator=g)
    y = torch.randint(3, (200,), generator=g)

    def loss(i: int) -> Tensor:
        x = centre[y] + 0.3 * torch.randn(200, 10, generator=g) + 0.5
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.01), 40)


@sick(
    CASES,
    "fb_actor_thrown_into_tanh_tails_by_a_restart",
    ("saturated_activation",),
    ("1", "3"),
    source="arXiv 1509.02971, Continuous control with deep reinforcement learning (tanh actors); arXiv 1608.03983 restarts",
    proof=every(well(30), shows(lambda p: 1 - p.outputs["3"][29].rms ** 2, 0.3, "mean derivative before"),
                low_derivative("1", 0.12, 34), low_derivative("3", 0.05, 34)),
    onset=31,
    also=("update_ratio_too_large", "loss_spike", "gradient_spike", "loss_diverging"),
)  # fmt: skip
def _(seed: int) -> Setup:
    model, g = mlp(nn.Tanh, 2, 32, 8, 2), random(seed)
    expert = torch.randn(8, 2, generator=g) / 3
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 8, generator=g)
        return F.mse_loss(model(x), torch.sin(x @ expert))

    def before(i: int) -> None:
        set_lr(optimizer, 3.0 if 30 <= i < 33 else 2e-3)

    return fit(model, loss, optimizer, 60, before)


# == poor init =====================================================================================================================


class TiedLM(nn.Module):
    """A causal transformer whose output weights are those of the embedding."""

    def __init__(self, vocabulary: int = 24, width: int = 64, length: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
        h = self.embed(x) + self.position[: x.shape[1]]
        return self.head(self.norm(self.block(h, src_mask=mask)))


@sick(
    CASES,
    "fb_tied_embedding_of_unit_variance",
    ("poor_init",),
    ("embed", "head"),
    source="https://github.com/huggingface/transformers/pull/26441 output weights of unit variance give a first cross-entropy of 110",
    proof=shows(lambda p: p.losses[0] / math.log(24), 4, "first loss over that of a uniform guess"),
)
def _(seed: int) -> Setup:
    model, data = TiedLM(), Text(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=1e-3), 30)


class ActorCritic(nn.Module):
    """A policy and a value on one trunk."""

    def __init__(self, states: int = 6, actions: int = 3, width: int = 32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(states, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.pi, self.v = nn.Linear(width, actions), nn.Linear(width, 1)

    def forward(self, s: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(s)
        return self.pi(h), self.v(h)[:, 0]


def act(model: ActorCritic, s: Tensor, table: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """The loss of one step of a contextual bandit, and the rewards."""
    logits, v = model(s)
    a = torch.multinomial(logits.detach().softmax(1), 1, generator=g)[:, 0]
    reward = advantage_of(s, table)[torch.arange(len(a)), a]
    log_p = logits.log_softmax(1)
    gain = (reward - v).detach()
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    chosen = log_p[torch.arange(len(a)), a]
    return -(gain * chosen).mean() + 0.5 * F.mse_loss(v, reward) - 0.01 * entropy, reward


def _equal_rows(plain: Plain) -> float:
    w = plain.setup.model.get_parameter("trunk.2.weight").detach()  # type: ignore[union-attr]
    return float((w - w[0]).abs().max() / w.abs().max())


@sick(
    CASES,
    "fb_actor_critic_with_a_single_constant",
    ("poor_init",),
    ("trunk.0", "trunk.2", "pi", "v"),
    source="https://cs231n.github.io/neural-networks-2/ weight initialisation: all units alike compute the same gradients",
    proof=shows(lambda p: 1e-3 - _equal_rows(p), 0, "0.001 less the difference between rows of trunk.2.weight, trained"),
)
def _(seed: int) -> Setup:
    model, g = ActorCritic(), random(seed)
    table = 2 * torch.randn(6, 3, generator=g)
    for p in model.parameters():
        nn.init.constant_(p, 0.05 if p.ndim > 1 else 0.0)
    return fit(
        model,
        lambda i: act(model, torch.randn(64, 6, generator=g), table, g)[0],
        torch.optim.RMSprop(model.parameters(), lr=1e-3),
        40,
    )


# == unnormalised input ============================================================================================================


class Forecast(nn.Module):
    """A GRU over some sensors, and the next value of the first."""

    def __init__(self, features: int = 4, width: int = 24) -> None:
        super().__init__()
        self.gru = nn.GRU(features, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.gru(x)
        return self.head(out[:, -1])


def waves(g: torch.Generator, length: int = 12, batch: int = 32) -> tuple[Tensor, Tensor]:
    """Four sines of random phase with noise, and the next value of the first."""
    t = torch.arange(length + 1.0)[None, :, None] + 20 * torch.rand(batch, 1, 1, generator=g)
    x = torch.sin(t * torch.tensor([0.5, 0.7, 1.1, 1.3])) + 0.05 * torch.randn(batch, length + 1, 4, generator=g)
    return x[:, :-1], x[:, -1, :1]


class Scale:
    """The root mean square of what goes into a model."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[float] = []
        model.register_forward_pre_hook(self)
        model.__dict__["scale"] = self

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.seen.append(float(args[0].detach().double().square().mean().sqrt()))


def input_scale(above: float) -> Proof:
    return shows(lambda p: min(p.setup.model.__dict__["scale"].seen), above, "least rms of an input")


@sick(
    CASES,
    "fb_forecast_from_unix_days",
    ("unnormalized_input",),
    ("",),
    source="http://yann.lecun.com/exdb/publis/pdf/lecun-98b.pdf Efficient BackProp, section 4.3: normalise the inputs",
    proof=input_scale(1e3),
    also=("saturated_activation", "vanishing_gradient", "zero_gradient", "loss_plateau"),
)
def _(seed: int) -> Setup:
    model, g = Forecast(), random(seed)
    Scale(model)

    def loss(i: int) -> Tensor:
        x, y = waves(g)
        days = 19000 + torch.randint(365, (32, 1, 1), generator=g) + torch.arange(12.0)[None, :, None]
        return F.mse_loss(model(torch.cat([x[..., :3], days], -1)), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), 40)


class TwoTower(nn.Module):
    """Embeddings of a user and an item, with what is known of the item, and a small MLP."""

    def __init__(self, users: int = 40, items: int = 60, facts: int = 3, sparse: bool = False) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, 8, sparse=sparse), nn.Embedding(items, 8, sparse=sparse)
        self.mlp = nn.Sequential(nn.Linear(16 + facts, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, facts: Tensor, user: Tensor, item: Tensor) -> Tensor:
        return self.mlp(torch.cat([self.user(user), self.item(item), facts], 1))[:, 0]


class Clicks:
    """Who clicks on what: a table of tastes of rank 3."""

    def __init__(self, seed: int, users: int = 40, items: int = 60) -> None:
        self.g = random(seed)
        taste = torch.randn(users, 3, generator=self.g) @ torch.randn(3, items, generator=self.g)
        self.table, self.facts = torch.sigmoid(2 * taste), torch.randn(items, 3, generator=self.g)

    def __call__(self, batch: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u = torch.randint(len(self.table), (batch,), generator=self.g)
        v = torch.randint(self.table.shape[1], (batch,), generator=self.g)
        return self.facts[v], u, v, torch.bernoulli(self.table[u, v], generator=self.g)


@sick(
    CASES,
    "fb_recommender_with_prices_in_cents_adam",
    ("unnormalized_input",),
    ("",),
    source="https://developers.google.com/machine-learning/crash-course/numerical-data/normalization features of different ranges",
    proof=input_scale(1e3),
    also=("dead_units",),
)
def _(seed: int) -> Setup:
    model, clicks = TwoTower(), Clicks(seed)
    Scale(model)

    def loss(i: int) -> Tensor:
        facts, u, v, y = clicks()
        facts = torch.stack([2000 + 900 * facts[:, 0], 9000 + 4000 * facts[:, 1], facts[:, 2]], 1)
        return F.binary_cross_entropy_with_logits(model(facts, u, v), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 40)


# == softmax twice =================================================================================================================


def floor_of_two(classes: int, first: int = 0) -> Proof:
    """A cross-entropy of probabilities cannot fall below that of a certain and correct answer: log(1 + (K - 1) / e)."""
    least = math.log(1 + (classes - 1) / math.e)
    return shows(lambda p: min(p.losses[first:]) - least + 1e-6, 0, f"least loss above the floor of {least:.3g}")


def probabilities(module: str, first: int = 0) -> Proof:
    """A module gives numbers from 0 to 1."""

    def proof(plain: Plain) -> str:
        seen = [o for o in plain.outputs[module][first:] if o is not None]
        assert seen, f"{module} gives nothing"
        assert all(o.low >= 0 and o.high <= 1 for o in seen), f"{module} gives other numbers than probabilities"
        return f"{module} gives probabilities"

    return proof


class Reader(nn.Module):
    """A transformer encoder over padded tokens, which answers in a dict."""

    def __init__(self, classes: int = 6, softmax: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 24, padding_idx=0)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(24, 4, 48, 0.0, batch_first=True), 2, enable_nested_tensor=False
        )
        self.head = nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, classes))
        if softmax:
            self.head.append(nn.Softmax(-1))

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        pad = tokens == 0
        h = self.encoder(self.embed(tokens), src_key_padding_mask=pad)
        pooled = (h * ~pad[..., None]).sum(1) / (~pad).sum(1, keepdim=True)
        return {"logits": self.head(pooled), "pooled": pooled}


def sentences(g: torch.Generator, batch: int = 32, classes: int = 6) -> tuple[Tensor, Tensor]:
    """Token sequences of different lengths, padded with 0; two tokens of each class are frequent in it."""
    y = torch.randint(classes, (batch,), generator=g)
    x = torch.randint(13, 20, (batch, 10), generator=g)
    x = torch.where(torch.rand(batch, 10, generator=g) < 0.5, 1 + 2 * y[:, None] + torch.randint(2, (batch, 10), generator=g), x)
    length = torch.randint(4, 11, (batch,), generator=g)
    return x * (torch.arange(10)[None] < length[:, None]), y


@sick(
    CASES,
    "fb_reader_head_ends_in_softmax",
    ("double_softmax",),
    ("head.3",),
    source="https://discuss.pytorch.org/t/cross-entropy-loss-is-not-decreasing/43814/16 a softmax is passed into the cross-entropy",
    proof=every(probabilities("head.3"), floor_of_two(6)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model, g = Reader(softmax=True), random(seed)

    def loss(i: int) -> Tensor:
        x, y = sentences(g)
        return F.cross_entropy(model(x)["logits"], y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), 40)


class Speller(nn.Module):
    """GRU over GRU: says a sequence backwards. The decoder can give probabilities, for the beam search of the validation."""

    def __init__(self, vocabulary: int = 8, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary + 1, 16)
        self.encoder = nn.GRU(16, width, batch_first=True)
        self.decoder = Decoder(vocabulary, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        _, state = self.encoder(self.embed(x))
        return self.decoder(self.embed(F.pad(y[:, :-1], (1, 0), value=8)), state)


class Decoder(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(16, width, batch_first=True)
        self.out = nn.Linear(width, vocabulary)
        self.as_probabilities = False

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        logits = self.out(self.gru(x, state)[0])
        return F.softmax(logits, -1) if self.as_probabilities else logits


def words(g: torch.Generator, batch: int = 32, length: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randint(8, (batch, length), generator=g)
    return x, x.flip(1)


@sick(
    CASES,
    "fb_speller_stays_in_probabilities_after_validation",
    ("double_softmax",),
    ("decoder",),
    source="https://pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html the input is expected to contain logits",
    proof=every(well(60), probabilities("decoder", 60), floor_of_two(8, 60), loss_jumps(60, 1.15)),
    onset=60,
    also=("loss_spike", "gradient_spike", "loss_diverging", "loss_plateau"),
)
def _(seed: int) -> Setup:
    model, g = Speller(), random(seed)

    def loss(i: int) -> Tensor:
        x, y = words(g)
        return F.cross_entropy(model(x, y).flatten(0, 1), y.flatten())

    def before(i: int) -> None:
        model.decoder.as_probabilities = i >= 60

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), 85, before)


# == frozen weights ================================================================================================================


@sick(
    CASES,
    "fb_scheduler_factor_of_zero_after_30",
    ("frozen_weights",),
    ("embed", "encoder", "head"),
    source="https://github.com/LINCellularNeuroscience/VAME/issues/26 StepLR(gamma=0): the learning rate is 0 after the first period",
    proof=every(well(30), unchanged("embed.weight", "encoder.layers.0.linear1.weight", "head.2.weight", first=30)),
    onset=30,
    also=("update_ratio_too_small",),
)
def _(seed: int) -> Setup:
    model, g = Reader(), random(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30, 0.0)

    def train() -> Iterator[Event]:
        for _ in range(55):
            x, y = sentences(g)
            optimizer.zero_grad()
            value = F.cross_entropy(model(x)["logits"], y)
            value.backward()
            yield "read", [value]
            optimizer.step()
            scheduler.step()
            yield "step", [optimizer]

    return Setup(model, train)


class TwoTasks(nn.Module):
    """One LSTM, and a head that tags and one that rates."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(4, 24, batch_first=True)
        self.rate, self.tag = nn.Linear(24, 1), nn.Linear(24, 3)
        self.cut = False

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h, _ = self.encoder(x)
        h = h.detach() if self.cut else h
        return {"rate": self.rate(h[:, -1]), "tag": self.tag(h)}


def two_losses(model: TwoTasks, g: torch.Generator) -> dict[str, Tensor]:
    x, y = waves(g)
    out = model(x)
    tags = (x[..., 0] > 0.3).long() + (x[..., 0] > -0.3).long()
    return {"rate": F.mse_loss(out["rate"], y), "tag": F.cross_entropy(out["tag"].flatten(0, 1), tags.flatten())}


@sick(
    CASES,
    "fb_encoder_cleared_between_backward_and_step",
    ("frozen_weights",),
    ("encoder",),
    source="https://velog.io/@rhss10/기본-optimizer.zerograd는-어디에-넣어주어야-할까 zero_grad anywhere but between backward and step",
    proof=every(
        unchanged("encoder.weight_ih_l0", "encoder.weight_hh_l0"),
        shows(lambda p: min(p.steps["tag.weight"]), 0, "least step of tag"),
    ),
)
def _(seed: int) -> Setup:
    model, g = TwoTasks(), random(seed)
    of_encoder = torch.optim.Adam(model.encoder.parameters(), lr=2e-3)
    of_heads = torch.optim.Adam([*model.rate.parameters(), *model.tag.parameters()], lr=2e-3)

    def train() -> Iterator[Event]:
        for _ in range(40):
            of_heads.zero_grad()
            value = sum(two_losses(model, g).values())
            value.backward()
            yield "read", [value]
            of_heads.step()
            of_encoder.zero_grad()
            of_encoder.step()
            yield "step", [of_heads, of_encoder]

    return Setup(model, train)


# == update ratio ==================================================================================================================


@sick(
    CASES,
    "fb_loss_divided_by_everything_under_sgd",
    ("update_ratio_too_small",),
    source="https://karpathy.github.io/2019/04/25/recipe/ verify the loss at init; here it is divided once too often",
    proof=every(update_ratio(below=1e-6), loss_stays(0.05)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model, data = nn.Sequential(nn.Embedding(24, 16), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 24)), Text(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y[:, -1]) / (8 * 16 * 64)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.01), 40)


class Byol(nn.Module):
    """An online network with a predictor; its target is a moving average of it."""

    def __init__(self, features: int = 12, width: int = 32, out: int = 8) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, out))
        self.predictor = nn.Sequential(nn.Linear(out, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, out))
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            goal_a, goal_b = self.target(a), self.target(b)
        p, q = self.predictor(self.online(a)), self.predictor(self.online(b))
        return 2 - F.cosine_similarity(p, goal_b).mean() - F.cosine_similarity(q, goal_a).mean()

    @torch.no_grad()
    def follow(self, keep: float = 0.95) -> None:
        for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
            slow.lerp_(fast, 1 - keep)


def views(centres: Tensor, g: torch.Generator, batch: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Two noisy views of points around some centres, and the index of the centre."""
    y = torch.randint(len(centres), (batch,), generator=g)
    x = centres[y] + 0.3 * torch.randn(batch, centres.shape[1], generator=g)
    a, b = (x + 0.4 * torch.randn(x.shape, generator=g) for _ in range(2))
    return a, b, y


@sick(
    CASES,
    "fb_byol_warmup_that_counts_epochs",
    ("update_ratio_too_small",),
    source="arXiv 2006.07733, BYOL, whose rate is warmed up; here the warm-up of 10000 updates advances once an epoch",
    proof=every(update_ratio(below=1e-5), loss_stays(0.05)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model, g = Byol(), random(seed)
    centres = torch.randn(5, 12, generator=g)
    optimizer = torch.optim.AdamW([*model.online.parameters(), *model.predictor.parameters()], lr=1e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, (epoch + 1) / 10_000))

    def train() -> Iterator[Event]:
        for i in range(45):
            a, b, _ = views(centres, g)
            optimizer.zero_grad()
            value = model(a, b)
            value.backward()
            yield "read", [value]
            optimizer.step()
            model.follow()
            if i % 30 == 29:
                scheduler.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "fb_one_cycle_with_a_peak_of_one",
    ("update_ratio_too_large",),
    source="arXiv 1708.07120, Super-convergence: peaks of 1 and more are for SGD, not for Adam",
    proof=every(well(25), update_ratio(below=0.05, first=15, last=25), update_ratio(above=0.4, first=25, last=29)),
    onset=25,
    also=("loss_spike", "gradient_spike", "loss_diverging", "vanishing_gradient"),
)
def _(seed: int) -> Setup:
    model, g = Reader(), random(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)

    def loss(i: int) -> Tensor:
        x, y = sentences(g)
        return F.cross_entropy(model(x)["logits"], y)

    def before(i: int) -> None:
        set_lr(optimizer, 1.0 if i >= 25 else 5e-4)

    return fit(model, loss, optimizer, 45, before)


@sick(
    CASES,
    "fb_actor_critic_whose_adam_has_the_rate_of_sgd",
    ("update_ratio_too_large",),
    source="arXiv 1602.01783, A3C, tunes its rate from 1e-4 to 1e-2; here Adam has 0.5",
    proof=update_ratio(above=0.5, last=4),
    also=("saturated_activation", "loss_spike", "gradient_spike"),
)
def _(seed: int) -> Setup:
    model, g = ActorCritic(), random(seed)
    table = 2 * torch.randn(6, 3, generator=g)
    return fit(
        model, lambda i: act(model, torch.randn(64, 6, generator=g), table, g)[0], torch.optim.Adam(model.parameters(), lr=0.5), 40
    )


# == the loss ======================================================================================================================


@sick(
    CASES,
    "fb_steps_by_hand_with_the_sign_wrong",
    ("loss_diverging", "exploding_gradient"),
    source="https://cs231n.github.io/optimization-1/ following the gradient: the update is in its negative direction",
    proof=loss_grows(4, last=14),
    also=("update_ratio_too_large", "gradient_spike", "loss_spike", *NON_FINITE),
)
def _(seed: int) -> Setup:
    model, data = mlp(nn.ELU, 2), Blobs(seed)

    def train() -> Iterator[Event]:
        for _ in range(40):
            x, y = data()
            value = F.cross_entropy(model(x), y)
            value.backward()
            yield "read", [value]
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.15 * p.grad
                    p.grad = None
            yield "step", [Hand(0.15)]

    return Setup(model, train)


@sick(
    CASES,
    "fb_q_values_bootstrapped_on_themselves_by_sgd",
    ("loss_diverging", "exploding_gradient"),
    source="arXiv 1812.02648, Deep reinforcement learning and the deadly triad; no target network, a discount above 1",
    proof=every(well(30), loss_grows(8, 29, 45)),
    onset=30,
    also=("update_ratio_too_large", "gradient_spike", "loss_spike", *NON_FINITE),
)
def _(seed: int) -> Setup:
    model, g = QNet(), random(seed)
    table = torch.randn(6, 3, generator=g)
    target = copy.deepcopy(model).requires_grad_(False)

    def loss(i: int) -> Tensor:
        if i % 10 == 0:
            target.load_state_dict(model.state_dict())
        s, after = torch.randn(64, 6, generator=g), torch.randn(64, 6, generator=g)
        a = torch.randint(3, (64,), generator=g)
        reward = advantage_of(s, table)[torch.arange(64), a]
        with torch.no_grad():
            goal = reward + (0.5 * target(after) if i < 30 else 1.5 * model(s) + 0.5).max(1).values
        return F.mse_loss(model(s)[torch.arange(64), a], goal)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.08), 60)


@sick(
    CASES,
    "fb_one_shift_of_sensors_in_other_units",
    ("loss_spike", "gradient_spike"),
    source="https://karpathy.github.io/2019/04/25/recipe/ become one with the data: outliers; one batch has its targets in thousandths",
    proof=every(well(40), loss_jumps(40, 50), gradient_spikes(40, 50)),
    onset=40,
    also=("update_ratio_too_large", "loss_diverging"),
)
def _(seed: int) -> Setup:
    model, g = Forecast(), random(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss(i: int) -> Tensor:
        x, y = waves(g)
        return F.mse_loss(model(x), 30 * y if i == 40 else y)

    return fit(model, loss, optimizer, 60)


@sick(
    CASES,
    "fb_language_model_meets_a_foreign_tokenizer",
    ("loss_spike", "gradient_spike"),
    source="arXiv 2204.02311, PaLM, section 5.1: loss spikes from particular batches",
    proof=every(well(60), loss_jumps(60, 2.5)),
    onset=60,
)
def _(seed: int) -> Setup:
    data = Text(seed)
    model = Speaker()

    def loss(i: int) -> Tensor:
        x, y = data()
        if i == 60:
            y = data.table[x].min(-1).indices
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), 80)


class Speaker(nn.Module):
    """An LSTM language model."""

    def __init__(self, vocabulary: int = 24, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return self.out(self.lstm(self.embed(x), state)[0])


class Denoiser(nn.Module):
    """The noise in a point, given the time."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, width), nn.SiLU())
        self.into, self.mid, self.out = nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
        h = self.into(x) + self.time(torch.cat([phase.sin(), phase.cos()], 1))
        return self.out(F.silu(self.mid(F.silu(h))))


def noised(g: torch.Generator, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points of a ring with noise of time t: (clean, noise, noised)."""
    angle = 2 * math.pi * torch.rand(len(t), generator=g)
    x, e = 1.5 * torch.stack([angle.cos(), angle.sin()], 1), torch.randn(len(t), 2, generator=g)
    a = torch.cos(t * math.pi / 2)[:, None]
    return x, e, a * x + (1 - a**2).clamp(min=0).sqrt() * e


@sick(
    CASES,
    "fb_the_diffusion_weight_at_a_time_of_almost_zero",
    ("gradient_spike",),
    source="arXiv 2303.09556, Efficient diffusion training via min-SNR weighting: the weight of the clean image is unbounded at t = 0",
    proof=every(well(45), gradient_spikes(45, 100)),
    onset=45,
    also=("loss_spike", "update_ratio_too_large", "loss_diverging"),
)
def _(seed: int) -> Setup:
    model, g = Denoiser(), random(seed)

    def loss(i: int) -> Tensor:
        t = 0.3 + 0.65 * torch.rand(128, generator=g)
        if i == 45:
            t[0] = 1e-3
        _, e, x = noised(g, t)
        a = torch.cos(t * math.pi / 2)
        weight = a**2 / (1 - a**2)
        return (weight[:, None] * (model(x, t) - e) ** 2).mean()

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3), 65)


@sick(
    CASES,
    "fb_policy_ratio_to_logarithms_of_another_run_with_adam",
    ("gradient_spike",),
    source="https://github.com/radixark/miles/pull/1363 a few samples with extreme log-ratios; the clip does not bound the unclipped branch",
    proof=every(gradient_spikes(40, 50)),
    onset=40,
    also=("loss_spike", "update_ratio_too_large", "loss_diverging"),
)
def _(seed: int) -> Setup:
    model, g = ActorCritic(), random(seed)
    table = 2 * torch.randn(6, 3, generator=g)
    old = copy.deepcopy(model)

    def loss(i: int) -> Tensor:
        if i % 4 == 0:
            old.load_state_dict(model.state_dict())
        s = torch.randn(64, 6, generator=g)
        with torch.no_grad():
            log_old, v_old = old(s)[0].log_softmax(1), old(s)[1]
        a = torch.multinomial(log_old.exp(), 1, generator=g)[:, 0]
        row = torch.arange(64)
        reward = advantage_of(s, table)[row, a]
        gain = reward - v_old
        logits, v = model(s)
        log_old = log_old[row, a] - (9.0 if i == 40 else 0.0)
        ratio = (logits.log_softmax(1)[row, a] - log_old).exp()
        surrogate = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
        return -surrogate.mean() + 0.5 * F.mse_loss(v, reward)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 60)


@sick(
    CASES,
    "fb_clicks_shuffled_apart_from_their_users",
    ("loss_plateau",),
    source="https://karpathy.github.io/2019/04/25/recipe/ input and label that do not belong together",
    proof=loss_stays(0.02),
    within=100,
)
def _(seed: int) -> Setup:
    clicks = Clicks(seed)
    model = TwoTower()
    for table in (model.user, model.item):
        nn.init.normal_(table.weight, 0, 0.1)

    def loss(i: int) -> Tensor:
        facts, u, v, y = clicks(256)
        return F.binary_cross_entropy_with_logits(model(facts, u, v), y[torch.randperm(256, generator=clicks.g)])

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-4), 140)


@sick(
    CASES,
    "fb_epoch_two_shuffles_labels_alone",
    ("loss_plateau",),
    source="arXiv 1611.03530, Understanding deep learning requires rethinking generalization: random labels; here fresh ones in each batch",
    proof=every(well(60), loss_stays(0.03, 75)),
    onset=60,
    also=("loss_spike", "gradient_spike", "loss_diverging"),
    within=100,
)
def _(seed: int) -> Setup:
    data, g = Pictures(seed, batch=32), random(seed)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 8))

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y if i < 60 else y[torch.randperm(len(y), generator=g)])

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5), 200)


# == the graph =====================================================================================================================


@sick(
    CASES,
    "fb_both_heads_read_detached_states_from_30",
    ("missing_gradient",),
    ("encoder",),
    source="https://github.com/dpressel/dliss-tutorial/issues/1 which states to detach; here those that the heads read, after the first epoch",
    proof=every(
        well(30), shows(lambda p: min(p.grads["encoder.weight_hh_l0"][:30]), 0, "least gradient of the encoder before"),
        no_gradient("encoder.weight_ih_l0", "encoder.weight_hh_l0", first=30),
    ),
    onset=30,
)  # fmt: skip
def _(seed: int) -> Setup:
    model, g = TwoTasks(), random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)

    def before(i: int) -> None:
        model.cut = i >= 30

    return fit(model, lambda i: sum(two_losses(model, g).values()), optimizer, 60, before)


class Checkpointed(nn.Module):
    """A frozen embedding and two blocks under the checkpoint of old, which asks its inputs whether they need a gradient."""

    def __init__(self, reentrant: bool, frozen: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 24).requires_grad_(not frozen)
        self.first, self.second = (
            nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)) for _ in range(2)
        )
        self.out = nn.Linear(24, 24)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + checkpoint(self.first, h, use_reentrant=self.reentrant)
        h = self.out(h)
        h = h + checkpoint(self.second, h, use_reentrant=self.reentrant)
        return h @ self.embed.weight.T


@sick(
    CASES,
    "fb_block_after_a_frozen_embedding_checkpointed_using_adam",
    ("missing_gradient",),
    ("first",),
    source="https://github.com/TinyLLaVA/TinyLLaVA_Factory/issues/144 None of the inputs have requires_grad=True. Gradients will be None",
    proof=every(no_gradient("first.0.weight", "first.1.weight", "first.3.weight"),
                shows(lambda p: min(p.grads["second.1.weight"]), 0, "least gradient of second")),
)  # fmt: skip
def _(seed: int) -> Setup:
    model, data = Checkpointed(True, True), Text(seed)
    nn.init.normal_(model.embed.weight, 0, 0.2)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3), 40)


class GraphNet(nn.Module):
    """Two rounds of messages over edges. Either may lie in a plain list; the mean over neighbours may forget those without any."""

    def __init__(self, width: int = 24, listed: bool = False, guarded: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        rounds = [Round(width, guarded) for _ in range(2)]
        self.rounds = rounds if listed else nn.ModuleList(rounds)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = F.relu(self.embed(x))
        for each in self.rounds:
            h = each(h, edges)
        return self.head(h)


class Round(nn.Module):
    def __init__(self, width: int, guarded: bool) -> None:
        super().__init__()
        self.own, self.other = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.guarded = guarded

    def forward(self, h: Tensor, edges: Tensor) -> Tensor:
        total = torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])
        degree = torch.zeros(len(h)).index_add(0, edges[1], torch.ones(edges.shape[1]))[:, None]
        return F.relu(self.own(h) + self.other(total / (degree.clamp(min=1) if self.guarded else degree)))


class Graphs:
    """Nodes of three classes, linked mostly within their class; each has a link, unless it is to be lonely."""

    def __init__(self, seed: int, nodes: int = 45) -> None:
        self.g = random(seed)
        self.centres = torch.randn(3, 8, generator=self.g)
        self.nodes = nodes

    def __call__(self, lonely: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.arange(self.nodes) % 3
        near = (torch.arange(self.nodes) + 3) % self.nodes
        far = torch.randint(self.nodes, (2, 20), generator=self.g)
        edges = torch.cat([torch.stack([near, torch.arange(self.nodes)]), torch.stack([torch.arange(self.nodes), near]), far], 1)
        if lonely:
            edges = edges[:, (edges != 7).all(0)]
        return self.centres[y] + 1.2 * torch.randn(self.nodes, 8, generator=self.g), edges, y


@sick(
    CASES,
    "fb_message_rounds_in_a_plain_list_by_adam",
    ("not_in_optimizer",),
    source="https://runebook.dev/zh/docs/pytorch/generated/torch.nn.modulelist/torch.nn.ModuleList layers of a Python list are not registered",
    proof=shows(lambda p: _outside(p), 0, "gradient of the layers in the list, none of which has moved"),
)
def _(seed: int) -> Setup:
    model, graphs = GraphNet(listed=True), Graphs(seed)
    model.__dict__["at_first"] = [[p.detach().clone() for p in each.parameters()] for each in model.rounds]

    def loss(i: int) -> Tensor:
        x, edges, y = graphs()
        return F.cross_entropy(model(x, edges), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 40)


def _outside(plain: Plain) -> float:
    model: Any = plain.setup.model
    pairs = [pair for a, each in zip(model.at_first, model.rounds, strict=True) for pair in zip(a, each.parameters(), strict=True)]
    assert all(torch.equal(a, p.detach()) for a, p in pairs)
    assert "rounds" not in dict(model.named_children())
    return min(float(p.grad.norm()) for _, p in pairs)


@sick(
    CASES,
    "fb_wider_head_put_in_after_30_by_sgd",
    ("not_in_optimizer",),
    ("head",),
    source="https://github.com/nprithviraj24/utilities model.fc is replaced, then the optimizer is made; here the other way around",
    proof=every(well(30), shows(lambda p: _new_head(p), 0, "gradient of the new head, which has not moved")),
    onset=30,
    also=("loss_spike", "gradient_spike", "loss_diverging"),
)
def _(seed: int) -> Setup:
    model, data = nn.ModuleDict({"body": mlp(nn.GELU, 2, 32, 16, 32), "head": nn.Linear(32, 4)}), Blobs(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model["head"](model["body"](x)), y)

    def before(i: int) -> None:
        if i == 30:
            model["head"] = nn.Linear(32, 7)
            model.__dict__["put_in"] = model["head"].weight.detach().clone()
        if i >= 30:
            model["head"].zero_grad()

    return fit(model, loss, optimizer, 60, before)


def _new_head(plain: Plain) -> float:
    model: Any = plain.setup.model
    assert torch.equal(model["head"].weight.detach(), model.put_in)
    return float(model["head"].weight.grad.norm())


@sick(
    CASES,
    "fb_d_cleared_only_by_the_optimizer_of_g",
    ("gradients_not_zeroed",),
    ("D",),
    source="https://github.com/PaddlePaddle/Paddle/issues/67895 gradients were never cleared; here those of D in a least-squares GAN",
    proof=shows(lambda p: _stale(p), 0.9, "share of the updates of D that begin with the gradient of its last"),
    also=("exploding_gradient",),
)
def _(seed: int) -> Setup:
    d, made, g = critic(), generator(), random(seed)
    of_d, of_g = torch.optim.Adam(d.parameters(), lr=1e-3), torch.optim.Adam(made.parameters(), lr=1e-3)
    d.__dict__["stale"] = stale = []
    last: dict[str, Tensor] = {}

    def train() -> Iterator[Event]:
        for i in range(50):
            real = torch.randn(64, 2, generator=g) * 0.3 + torch.tensor([2.0, -1.0])
            z = torch.randn(64, 4, generator=g)
            of_g.zero_grad()
            if i % 2:
                of_d_kept = [p.requires_grad_(False) for p in d.parameters()]
                value = F.mse_loss(d(made(z)), torch.ones(64, 1))
                value.backward()
                yield "read", [value]
                of_g.step()
                for p in of_d_kept:
                    p.requires_grad_(True)
                yield "step", [of_g]
                continue
            if last:
                stale.append(all(torch.equal(last[n], p.grad) for n, p in d.named_parameters()))
            value = F.mse_loss(d(real), torch.ones(64, 1)) + F.mse_loss(d(made(z).detach()), torch.zeros(64, 1))
            value.backward()
            last.update({n: p.grad.clone() for n, p in d.named_parameters()})
            yield "read", [value]
            of_d.step()
            yield "step", [of_d]

    return Setup({"D": d, "G": made}, train)


def _stale(plain: Plain) -> float:
    seen = plain.setup.model["D"].__dict__["stale"]  # type: ignore[index]
    return sum(seen) / len(seen)


@sick(
    CASES,
    "fb_clearing_left_behind_in_the_warmup_with_sgd",
    ("gradients_not_zeroed",),
    ("embed", "lstm", "out"),
    source="https://thecodeforge.io/ml-ai/pytorch-training-loop/ missing zero_grad; here it stands in the branch of the first 30 updates",
    proof=every(well(30), shows(lambda p: p.setup.model.__dict__["cosine"], 0.9, "least cosine of a gradient with that before it")),
    onset=31,
)
def _(seed: int) -> Setup:
    model, data = Speaker(), Text(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model.__dict__["cosine"] = 1.0

    def train() -> Iterator[Event]:
        before = torch.zeros(1)
        for i in range(60):
            x, y = data()
            value = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            if i <= 30:
                optimizer.zero_grad()
            value.backward()
            now = torch.cat([p.grad.flatten() for p in model.parameters()])
            if i >= 40:
                model.__dict__["cosine"] = min(model.__dict__["cosine"], float(F.cosine_similarity(now, before, 0)))
            before = now
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@sick(
    CASES,
    "fb_scheduler_stepped_in_place_of_the_optimizer",
    ("never_stepped",),
    source="https://github.com/ClementPinard/SfmLearner-Pytorch/issues/5 scheduler.step() only changes the learning rate",
    proof=never_moves(),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model, g = Denoiser(), random(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)

    def train() -> Iterator[Event]:
        for _ in range(50):
            t = 0.3 + 0.65 * torch.rand(64, generator=g)
            _, e, x = noised(g, t)
            optimizer.zero_grad()
            value = F.mse_loss(model(x, t), e)
            value.backward()
            yield "read", [value]
            scheduler.step()
            yield "step", []

    return Setup(model, train)


@sick(
    CASES,
    "fb_budget_of_steps_spent_at_30_adamw",
    ("never_stepped",),
    source="https://github.com/pytorch/pytorch/issues/3814 a loop whose optimizer does not step; here not after max_steps",
    proof=every(well(30), never_moves(30)),
    onset=30,
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    model, graphs = GraphNet(), Graphs(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def train() -> Iterator[Event]:
        for i in range(60):
            x, edges, y = graphs()
            optimizer.zero_grad()
            value = F.cross_entropy(model(x, edges), y)
            value.backward()
            yield "read", [value]
            if i < 30:
                optimizer.step()
            yield "step", [optimizer] if i < 30 else []

    return Setup(model, train)


# == NaN and Inf ===================================================================================================================


def bad_input(update: int) -> Proof:
    def proof(plain: Plain) -> str:
        scale = plain.setup.model.__dict__["scale"].seen
        found = next(i for i, s in enumerate(scale) if not math.isfinite(s))
        assert found == update, f"the first batch with a NaN or Inf is {found}"
        return f"the batch of update {update} is the first with a NaN or Inf"

    return proof


@sick(
    CASES,
    "fb_gap_in_a_sensor_series_at_35_by_adam",
    ("non_finite_input",),
    ("",),
    source="https://github.com/pytorch/pytorch/issues/2769 an LSTM whose loss grows out of bounds; here a gap in the data is a NaN",
    proof=every(well(35), bad_input(35), first_non_finite(35)),
    onset=35,
    also=NON_FINITE,
)
def _(seed: int) -> Setup:
    model, g = Forecast(), random(seed)
    Scale(model)

    def loss(i: int) -> Tensor:
        x, y = waves(g)
        if i == 35:
            x[3, 5, 2] = math.nan
        return F.mse_loss(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 55)


@sick(
    CASES,
    "fb_logarithm_of_no_sales_among_the_facts",
    ("non_finite_input",),
    ("",),
    source="https://numpy.org/doc/stable/reference/generated/numpy.log.html log of zero is -inf; the feature is the logarithm of a count",
    proof=every(well(25), bad_input(25), first_non_finite(25)),
    onset=25,
    also=NON_FINITE,
)
def _(seed: int) -> Setup:
    model, clicks = TwoTower(), Clicks(seed)
    Scale(model)

    def loss(i: int) -> Tensor:
        facts, u, v, y = clicks(256)
        count = (4 * facts[:, 0].abs()).ceil()
        if i == 25:
            count[9] = 0
        facts = torch.cat([count.log()[:, None] - 1, facts[:, 1:]], 1)
        return F.binary_cross_entropy_with_logits(model(facts, u, v), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-2), 45)


class Attention(nn.Module):
    """Attention of one head over keys that are not masked: all keys of a row may be."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        score = self.q(x) @ self.k(x).transpose(1, 2) / math.sqrt(x.shape[-1])
        return score.masked_fill(pad[:, None], -math.inf).softmax(-1) @ self.v(x)


class Rater(nn.Module):
    """Attention over words, and a grade."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(20, 24), Attention(24)
        self.norm, self.out = nn.LayerNorm(24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = self.norm(h + self.attention(h, x == 0))
        return self.out(h.mean(1))


@sick(
    CASES,
    "fb_review_without_a_word_at_30_by_adam",
    ("non_finite_activation",),
    ("attention",),
    source="https://github.com/pytorch/pytorch/pull/131060 the softmax of a row that is masked altogether",
    proof=every(well(30), first_non_finite(30, "attention"), first_non_finite(30)),
    onset=30,
    also=NON_FINITE[1:],
)
def _(seed: int) -> Setup:
    model, g = Rater(), random(seed)

    def loss(i: int) -> Tensor:
        x, y = sentences(g)
        if i == 30:
            x[5] = 0
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 50)


@sick(
    CASES,
    "fb_node_without_neighbours_at_20_using_sgd",
    ("non_finite_activation",),
    ("rounds.0",),
    source="https://github.com/dmlc/dgl/issues/2777 SAGEConv gives NaN where there are no edges",
    proof=every(well(20), first_non_finite(20, "rounds.0"), first_non_finite(20)),
    onset=20,
    also=NON_FINITE[1:],
)
def _(seed: int) -> Setup:
    model, graphs = GraphNet(guarded=False), Graphs(seed)

    def loss(i: int) -> Tensor:
        x, edges, y = graphs(lonely=i == 20)
        return F.cross_entropy(model(x, edges), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 40)


@sick(
    CASES,
    "fb_prompt_that_leaves_no_label",
    ("non_finite_loss",),
    source="https://github.com/OpenRLHF/OpenRLHF/pull/583 the cross-entropy is NaN where all labels are IGNORE_INDEX",
    proof=every(
        well(40), shows(lambda p: float(math.isnan(p.losses[40])), 0.5, "the loss of update 40 is NaN"),
        shows(lambda p: sum(map(math.isfinite, p.losses)) - 58.5, 0, "finite losses, less 58.5, of 60"),
    ),
    onset=40,
)  # fmt: skip
def _(seed: int) -> Setup:
    model, data = TiedLM(), Text(seed)
    nn.init.normal_(model.embed.weight, 0, 0.05)

    def loss(i: int) -> Tensor:
        x, y = data()
        prompt = torch.arange(16)[None] < torch.randint(2, 8, (8, 1), generator=data.generator)
        y = y.masked_fill(prompt if i != 40 else torch.ones_like(prompt), -100)
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3), 60)


class Probable(nn.Module):
    """Clicks, as a probability: the loss is written out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.net(x))[:, 0]


@sick(
    CASES,
    "fb_cross_entropy_by_hand_of_a_certain_one_by_adam",
    ("non_finite_loss",),
    source="https://github.com/hwalsuklee/tensorflow-mnist-VAE/issues/4 the logarithm gets a 0 as its input",
    proof=every(well(30), shows(lambda p: float(p.losses[30] == math.inf), 0.5, "the loss of update 30 is Inf"),
                first_non_finite(30), shows(lambda p: 1 - p.outputs[""][30].nonfinite, 0, "one less the bad outputs then")),
    onset=30,
    also=(*NON_FINITE[1:], "loss_spike", "gradient_spike", "unnormalized_input"),
)  # fmt: skip
def _(seed: int) -> Setup:
    model, g = Probable(), random(seed)
    w = torch.randn(6, generator=g)

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 6, generator=g)
        y = (x @ w > 0).float()
        if i == 30:
            x[0], y[0] = 400 * w, 0.0
        p = model(x)
        return -torch.where(y > 0, p.log(), (1 - p).log()).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), 50)


class Siamese(nn.Module):
    """The distance between two embeddings, by a square root."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return ((self.net(a) - self.net(b)) ** 2).sum(1).sqrt()


@sick(
    CASES,
    "fb_pair_of_one_picture_twice_under_a_root",
    ("non_finite_gradient",),
    ("net",),
    source="https://github.com/pytorch/pytorch/issues/6394 the gradient of sqrt at 0",
    proof=every(well(30), shows(lambda p: float(math.isfinite(p.losses[30])), 0.5, "the loss of update 30 is finite"),
                first_non_finite(30), shows(lambda p: p.nonfinite["net.0.weight"][30], 10, "bad elements of the gradient of net.0.weight")),
    onset=30,
    also=NON_FINITE[1:],
)  # fmt: skip
def _(seed: int) -> Setup:
    model, g = Siamese(), random(seed)
    centres = torch.randn(4, 10, generator=g)

    def loss(i: int) -> Tensor:
        y, z = torch.randint(4, (2, 48), generator=g)
        a, b = (centres[c] + 0.3 * torch.randn(48, 10, generator=g) for c in (y, z))
        if i == 30:
            b[4], z[4] = a[4], y[4]
        d = model(a, b)
        return torch.where(y == z, d**2, F.relu(2 - d) ** 2).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 50)


class Spectral(nn.Module):
    """Energies of tokens; the logarithm is taken of all, and then padding is set to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 24, padding_idx=0)
        self.lift = nn.Linear(24, 24, bias=False)
        self.out = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(self.embed(x)) ** 2
        h = torch.where((x == 0)[..., None], torch.zeros(()), h.log())
        return self.out(h.mean(1))


@sick(
    CASES,
    "fb_log_energy_before_the_mask_by_sgd",
    ("non_finite_gradient",),
    ("embed", "lift"),
    source="https://github.com/pytorch/pytorch/issues/36923 torch.where passes the NaN of the branch that it did not take",
    proof=every(shows(lambda p: float(math.isfinite(p.losses[0])), 0.5, "the first loss is finite"), first_non_finite(0),
                shows(lambda p: p.nonfinite["lift.weight"][0], 10, "bad elements of the first gradient of lift.weight")),
    also=NON_FINITE[1:],
)  # fmt: skip
def _(seed: int) -> Setup:
    model, g = Spectral(), random(seed)

    def loss(i: int) -> Tensor:
        x, y = sentences(g)
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.01), 25)


class TransE(nn.Module):
    """Entities and relations as vectors: head + relation is near tail."""

    def __init__(self, entities: int = 30, relations: int = 4, width: int = 12) -> None:
        super().__init__()
        self.entity = nn.Embedding(entities + 1, width, padding_idx=0)
        self.relation = nn.Embedding(relations, width)

    def forward(self, h: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return (self.entity(h) + self.relation(r) - self.entity(t)).square().sum(-1)


def triples(g: torch.Generator, batch: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entities on a ring, relations that turn by 1 to 4; the last tensor is a wrong tail."""
    h, r = torch.randint(30, (batch,), generator=g), torch.randint(4, (batch,), generator=g)
    return h + 1, r, (h + r + 1) % 30 + 1, torch.randint(30, (batch,), generator=g) + 1


@sick(
    CASES,
    "fb_the_padding_row_brought_to_length_one",
    ("non_finite_weight",),
    ("entity",),
    source="https://papers.nips.cc/paper/5071-translating-embeddings-for-modeling-multi-relational-data TransE: entities of length 1",
    proof=every(well(25), shows(lambda p: float(math.isnan(p.weights["entity.weight"][25])), 0.5, "the weights are NaN at update 25"),
                shows(lambda p: float(math.isfinite(p.weights["entity.weight"][24])), 0.5, "and finite before it"),
                first_non_finite(25)),
    onset=25,
    also=NON_FINITE[1:],
)  # fmt: skip
def _(seed: int) -> Setup:
    model, g = TransE(), random(seed)

    def loss(i: int) -> Tensor:
        h, r, t, wrong = triples(g)
        t = torch.where(torch.rand(64, generator=g) < 0.1, 0, t)
        return F.relu(1 + model(h, r, t) - model(h, r, wrong)).mean()

    def before(i: int) -> None:
        with torch.no_grad():
            if i % 5 == 0:
                rows = model.entity.weight[1:] if i < 25 else model.entity.weight
                rows.div_(rows.norm(dim=1, keepdim=True))

    return fit(model, loss, torch.optim.Adagrad(model.parameters(), lr=0.1), 45, before)


@sick(
    CASES,
    "fb_scaler_halves_for_ever_after_15",
    ("loss_scale_collapse",),
    source="https://github.com/Junjue-Wang/FactSeg/issues/6 the loss scale is reduced until it is 0",
    proof=every(
        well(15), never_moves(15), shows(lambda p: 1 - p.setup.model.__dict__["scaler"].get_scale(), 0, "one less the last scale")
    ),
    onset=15,
    also=("non_finite_gradient", "never_stepped"),
    within=25,
)
def _(seed: int) -> Setup:
    model, g = Siamese(), random(seed)
    centres = torch.randn(4, 10, generator=g)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.__dict__["scaler"] = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def train() -> Iterator[Event]:
        for i in range(50):
            y, z = torch.randint(4, (2, 48), generator=g)
            a, b = (centres[c] + 0.3 * torch.randn(48, 10, generator=g) for c in (y, z))
            if i >= 15:
                b[0], z[0] = a[0], y[0]
            d = model(a, b)
            value = torch.where(y == z, d**2, F.relu(2 - d) ** 2).mean()
            optimizer.zero_grad()
            scaler.scale(value).backward()
            yield "read", [value]
            scaler.step(optimizer)
            was = scaler.get_scale()
            scaler.update()
            yield "step", [] if scaler.get_scale() < was else [optimizer]

    return Setup(model, train)


# == healthy =======================================================================================================================


def _miss(plain: Plain) -> float:
    """How far what G makes is from the data of the two GANs below, in mean and deviation."""
    with torch.no_grad():
        made = plain.setup.model["G"](torch.randn(512, 4, generator=random(99)))  # type: ignore[index]
    off = (made.mean(0) - torch.tensor([1.0, -0.5])).abs().max() + (made.std(0) - 0.5).abs().max()
    return float(off)


@healthy(
    CASES,
    "fb_wgan_with_clipping_whose_loss_is_near_zero",
    source="arXiv 1701.07875, Wasserstein GAN, algorithm 1",
    proof=measured(_miss, 0.7, "mean and deviation are missed by"),
)
def _(seed: int) -> Setup:
    d, made, g = critic(), generator(), random(seed)
    clip_weights(d, 0.1)
    of_d, of_g = torch.optim.RMSprop(d.parameters(), lr=2e-3), torch.optim.RMSprop(made.parameters(), lr=1.5e-3)

    def turn(i: int) -> tuple[torch.optim.Optimizer, Callable[[], Tensor]]:
        real = torch.randn(64, 2, generator=g) * 0.5 + torch.tensor([1.0, -0.5])
        z = torch.randn(64, 4, generator=g)
        if i % 4 == 3:
            return of_g, lambda: -d(made(z)).mean()
        return of_d, lambda: d(made(z).detach()).mean() - d(real).mean()

    return turns({"D": d, "G": made}, turn, 360, lambda i: clip_weights(d, 0.1))


@healthy(
    CASES,
    "fb_least_squares_gan_in_which_g_adds_to_d",
    source="arXiv 1611.04076, Least squares generative adversarial networks; G's backward leaves gradients in D, cleared before D's own",
    proof=measured(_miss, 0.7, "mean and deviation are missed by"),
)
def _(seed: int) -> Setup:
    d, made, g = critic(), generator(), random(seed)
    of_d, of_g = (torch.optim.Adam(m.parameters(), lr=2e-3, betas=(0.5, 0.99)) for m in (d, made))

    def turn(i: int) -> tuple[torch.optim.Optimizer, Callable[[], Tensor]]:
        real = torch.randn(64, 2, generator=g) * 0.5 + torch.tensor([1.0, -0.5])
        z = torch.randn(64, 4, generator=g)
        if i % 2:
            return of_g, lambda: (d(made(z)) - 1).square().mean()
        return of_d, lambda: (d(made(z).detach()) ** 2 + (d(real) - 1) ** 2).mean()

    return turns({"D": d, "G": made}, turn, 320)


class VAE(nn.Module):
    """Gaussian on both sides; the decoder learns its deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 48), nn.SiLU(), nn.Linear(48, 6))
        self.decoder = nn.Sequential(nn.Linear(3, 48), nn.SiLU(), nn.Linear(48, 12))
        self.log_sigma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, e: Tensor) -> dict[str, Tensor]:
        mean, log_var = self.encoder(x).chunk(2, 1)
        back = self.decoder(mean + e * (log_var / 2).exp())
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1)
        nll = (self.log_sigma + 0.5 * ((x - back) / self.log_sigma.exp()) ** 2).sum(1)
        return {"loss": (kl + nll).mean(), "reconstruction": back}


@healthy(
    CASES,
    "fb_vae_whose_bound_changes_its_sign",
    source="arXiv 2006.13202, Simple and effective VAE training with calibrated decoders (sigma-VAE); arXiv 1312.6114",
    proof=measured(lambda p: median(p.losses[-10:]), -5.0, "last bound"),
)
def _(seed: int) -> Setup:
    model, g = VAE(), random(seed)
    mix = torch.randn(2, 12, generator=g)

    def loss(i: int) -> Tensor:
        x = torch.tanh(torch.randn(128, 2, generator=g) @ mix) + 0.05 * torch.randn(128, 12, generator=g)
        return model(x, torch.randn(128, 3, generator=g))["loss"]

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 300)


class Coupling(nn.Module):
    """One affine coupling: half of the numbers scales and shifts the other."""

    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 2))
        nn.init.zeros_(self.net[2].weight)
        nn.init.zeros_(self.net[2].bias)
        self.flip = flip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flip(1) if self.flip else x
        s, t = self.net(x[:, :1]).chunk(2, 1)
        s = torch.tanh(s) * 2
        return torch.cat([x[:, :1], x[:, 1:] * s.exp() + t], 1), s[:, 0]


class Flow(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(k > 0) for k in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(len(x))
        for each in self.couplings:
            x, log_det = each(x)
            total = total + log_det
        return 0.5 * (x**2).sum(1) + math.log(2 * math.pi) - total


@healthy(
    CASES,
    "fb_flow_with_last_layers_at_zero_and_negative_nll_by_adam",
    source="arXiv 1605.08803, Density estimation using Real NVP; zero init of the last layer as in arXiv 1807.03039",
    proof=measured(lambda p: median(p.losses[-10:]), -0.3, "last negative log-likelihood"),
)
def _(seed: int) -> Setup:
    model, g = Flow(), random(seed)

    def loss(i: int) -> Tensor:
        a = torch.randn(128, 1, generator=g) * 0.6
        return model(torch.cat([a, a**2 + 0.05 * torch.randn(128, 1, generator=g)], 1)).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=8e-3), 180)


def _regret(plain: Plain) -> float:
    """What the greedy policy loses of the best reward, over that of chance."""
    model: Any = plain.setup.model
    s = torch.randn(400, 6, generator=random(98))
    reward = advantage_of(s, model.table)
    with torch.no_grad():
        out = model(s)
    chosen = (out[0] if isinstance(out, tuple) else out).argmax(1)
    best = reward.max(1).values.mean()
    return float((best - reward[torch.arange(400), chosen].mean()) / (best - reward.mean()))


@healthy(
    CASES,
    "fb_actor_critic_clipped_by_its_norm_by_adam",
    source="arXiv 1602.01783, Asynchronous methods for deep reinforcement learning",
    proof=measured(_regret, 0.5, "regret over that of chance"),
)
def _(seed: int) -> Setup:
    model, g = ActorCritic(), random(seed)
    model.__dict__["table"] = table = 0.7 * torch.randn(6, 3, generator=g)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    return fit(
        model, lambda i: act(model, torch.randn(128, 6, generator=g), table, g)[0], optimizer, 220,
        between=lambda i: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
    )  # fmt: skip


@healthy(
    CASES,
    "fb_ppo_four_epochs_a_batch_under_adam",
    source="arXiv 1707.06347, Proximal policy optimization algorithms",
    proof=measured(_regret, 0.5, "regret over that of chance"),
)
def _(seed: int) -> Setup:
    model, g = ActorCritic(), random(seed)
    model.__dict__["table"] = table = 0.7 * torch.randn(6, 3, generator=g)
    batch: dict[str, Tensor] = {}

    def loss(i: int) -> Tensor:
        row = torch.arange(256)
        if i % 4 == 0:
            s = torch.randn(256, 6, generator=g)
            with torch.no_grad():
                logits, v = model(s)
            a = torch.multinomial(logits.softmax(1), 1, generator=g)[:, 0]
            reward = advantage_of(s, table)[row, a]
            gain = reward - v
            batch.update(s=s, a=a, reward=reward, gain=(gain - gain.mean()) / gain.std(), old=logits.log_softmax(1)[row, a])
        logits, v = model(batch["s"])
        log_p = logits.log_softmax(1)
        ratio = (log_p[row, batch["a"]] - batch["old"]).exp()
        surrogate = torch.minimum(ratio * batch["gain"], ratio.clamp(0.8, 1.2) * batch["gain"])
        return -surrogate.mean() + 0.5 * F.mse_loss(v, batch["reward"]) + 0.01 * (log_p.exp() * log_p).sum(1).mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 260)


@healthy(
    CASES,
    "fb_dqn_whose_values_grow_with_their_target_with_adam",
    source="arXiv 1312.5602, Playing Atari with deep reinforcement learning; the values grow with each copy of the target",
    proof=measured(_regret, 0.5, "regret over that of chance"),
)
def _(seed: int) -> Setup:
    model, g = QNet(), random(seed)
    model.__dict__["table"] = table = 0.7 * torch.randn(6, 3, generator=g)
    target = copy.deepcopy(model).requires_grad_(False)

    def loss(i: int) -> Tensor:
        if i % 25 == 0:
            target.load_state_dict(model.state_dict())
        s, after = torch.randn(128, 6, generator=g), torch.randn(128, 6, generator=g)
        a = torch.randint(3, (128,), generator=g)
        reward = 1 + advantage_of(s, table)[torch.arange(128), a]
        goal = reward + 0.9 * target(after).max(1).values.mean()
        return F.smooth_l1_loss(model(s)[torch.arange(128), a], goal)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), 300)


@healthy(
    CASES,
    "fb_diffusion_with_noise_that_stays_noise",
    source="arXiv 2006.11239, Denoising diffusion probabilistic models",
    proof=measured(lambda p: median(p.losses[-20:]) / median(p.losses[:3]), 0.5, "last over first loss"),
)
def _(seed: int) -> Setup:
    model, g = Denoiser(), random(seed)

    def loss(i: int) -> Tensor:
        t = 0.3 + 0.69 * torch.rand(128, generator=g)
        _, e, x = noised(g, t)
        return F.mse_loss(model(x, t), e)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=2e-3), 250)


def _neighbours(plain: Plain) -> float:
    """The share of points whose nearest neighbour, by cosine of the features, is of another class."""
    model: Any = plain.setup.model
    a, b, y = views(model.centres, random(97), 300)
    model.eval()
    with torch.no_grad():
        za, zb = F.normalize(model.online(a), dim=1), F.normalize(model.online(b), dim=1)
    model.train()
    near = (za @ zb.T).fill_diagonal_(-2).argmax(1)
    return float((y[near] != y).double().mean())


@healthy(
    CASES,
    "fb_byol_with_a_target_that_no_optimizer_owns_by_adamw",
    source="arXiv 2006.07733, Bootstrap your own latent",
    proof=every(converges(0.5), measured(_neighbours, 0.2, "wrong neighbours")),
)
def _(seed: int) -> Setup:
    model, g = Byol(), random(seed)
    model.__dict__["centres"] = centres = torch.randn(5, 12, generator=g)
    optimizer = torch.optim.AdamW([*model.online.parameters(), *model.predictor.parameters()], lr=2e-3)

    def loss(i: int) -> Tensor:
        a, b, _ = views(centres, g)
        return model(a, b)

    def before(i: int) -> None:
        model.follow()

    return fit(model, loss, optimizer, 150, before)


class Contrast(nn.Module):
    """Features and their contrast with those of the other points."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        logits = F.normalize(self.online(a), dim=1) @ F.normalize(self.online(b), dim=1).T / 0.1
        return (F.cross_entropy(logits, torch.arange(len(a))) + F.cross_entropy(logits.T, torch.arange(len(a)))) / 2


@healthy(
    CASES,
    "fb_contrast_of_softmaxes_over_the_batch",
    source="arXiv 2002.05709, SimCLR: a softmax over the batch, whose loss ends far above zero",
    proof=every(
        measured(lambda p: median(p.losses[-20:]) / median(p.losses[:3]), 0.8, "last over first loss"),
        measured(_neighbours, 0.35, "wrong neighbours"),
    ),
)
def _(seed: int) -> Setup:
    model, g = Contrast(), random(seed)
    model.__dict__["centres"] = centres = torch.randn(40, 12, generator=g)

    def loss(i: int) -> Tensor:
        a, b, _ = views(centres, g)
        return model(a, b)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9), 200)


@healthy(
    CASES,
    "fb_recommender_with_sparse_rows_and_two_optimizers",
    source="https://pytorch.org/docs/stable/generated/torch.optim.SparseAdam.html with arXiv 1708.05031, Neural collaborative filtering",
    proof=converges(0.85),
)
def _(seed: int) -> Setup:
    model, clicks = TwoTower(sparse=True), Clicks(seed)
    of_rows = torch.optim.SparseAdam([model.user.weight, model.item.weight], lr=0.02)
    of_rest = torch.optim.Adam(model.mlp.parameters(), lr=5e-3)

    def train() -> Iterator[Event]:
        for _ in range(240):
            facts, u, v, y = clicks(128)
            of_rows.zero_grad()
            of_rest.zero_grad()
            value = F.binary_cross_entropy_with_logits(model(facts, u, v), y)
            value.backward()
            yield "read", [value]
            of_rows.step()
            of_rest.step()
            yield "step", [of_rows, of_rest]

    return Setup(model, train)


@healthy(
    CASES,
    "fb_pinn_of_second_derivatives_by_lbfgs",
    source="arXiv 1711.10561, Physics informed deep learning, part I (L-BFGS)",
    proof=every(converges(0.05), measured(lambda p: _ode(p), 0.15, "largest error of the solution")),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 2, 24, 1, 1)
    t = torch.linspace(0, 3, 40)[:, None].requires_grad_()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        u = model(t)
        (v,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        (a,) = torch.autograd.grad(v.sum(), t, create_graph=True)
        value = (a + u).square().mean() + 5 * (u[0] - 1).square().sum() + 5 * v[0].square().sum()
        value.backward()
        return value

    def train() -> Iterator[Event]:
        for _ in range(22):
            value = optimizer.step(closure)
            yield "read", [value]
            yield "step", [optimizer]

    return Setup(model, train)


def _ode(plain: Plain) -> float:
    t = torch.linspace(0, 3, 40)[:, None]
    with torch.no_grad():
        return float((plain.setup.model(t) - t.cos()).abs().max())  # type: ignore[operator]


@healthy(
    CASES,
    "fb_maml_through_one_inner_step_under_adam",
    source="arXiv 1703.03400, Model-agnostic meta-learning: sines of random amplitude and phase",
    proof=converges(0.75),
)
def _(seed: int) -> Setup:
    model, g = mlp(nn.ELU, 2, 32, 1, 1), random(seed)

    def loss(i: int) -> Tensor:
        total = torch.zeros(())
        for _ in range(6):
            amplitude, phase = 0.5 + torch.rand(1, generator=g), 3 * torch.rand(1, generator=g)
            x = 6 * torch.rand(2, 10, 1, generator=g) - 3
            y = amplitude * torch.sin(x + phase)
            own = dict(model.named_parameters())
            inner = F.mse_loss(model(x[0]), y[0])
            grads = torch.autograd.grad(inner, list(own.values()), create_graph=True)
            fast = {name: p - 0.1 * d for (name, p), d in zip(own.items(), grads, strict=True)}
            total = total + F.mse_loss(torch.func.functional_call(model, fast, (x[1],)), y[1]) / 6
        return total

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 60)


class Equilibrium(nn.Module):
    """The fixed point of z = tanh(W z + U x), with the gradient of the implicit function theorem, through a hook."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(width, width), nn.Linear(16, width)
        self.out = nn.Linear(width, 4)
        with torch.no_grad():
            self.w.weight *= 0.5

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = torch.zeros(len(x), self.w.in_features)
            for _ in range(25):
                z = torch.tanh(self.w(z) + self.u(x))
        z = torch.tanh(self.w(z) + self.u(x))
        z0 = z.detach().requires_grad_()
        f0 = torch.tanh(self.w(z0) + self.u(x))

        def backward(grad: Tensor) -> Tensor:
            g = grad
            for _ in range(20):
                g = torch.autograd.grad(f0, z0, g, retain_graph=True)[0] + grad
            return g

        if z.requires_grad:
            z.register_hook(backward)
        return self.out(z)


@healthy(
    CASES,
    "fb_equilibrium_with_a_backward_of_its_own",
    source="arXiv 1909.01377, Deep equilibrium models",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model, data = Equilibrium(), Blobs(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 80)


class Experts(nn.Module):
    """A router and six small experts, of which each row goes to one; an expert without a row is not called."""

    def __init__(self, experts: int = 6) -> None:
        super().__init__()
        self.router = nn.Linear(16, experts)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(1)
        best, chosen = p.max(1)
        out = x.new_zeros(len(x), 4)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, best[rows, None] * expert(x[rows]))
        return out


@healthy(
    CASES,
    "fb_experts_of_which_some_get_no_row_under_adamw",
    source="arXiv 2101.03961, Switch transformers: top-1 routing",
    proof=every(converges(0.6), shows(lambda p: sum(math.isnan(x) for k in range(6) for x in p.grads[f"experts.{k}.0.weight"]), 0,
                                      "times that an expert has no gradient")),
)  # fmt: skip
def _(seed: int) -> Setup:
    model, data = Experts(), Blobs(seed, batch=10)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=5e-3), 150)


@healthy(
    CASES,
    "fb_lora_with_one_factor_zero_by_adamw",
    source="arXiv 2106.09685, LoRA: low-rank adaptation",
    proof=every(converges(0.6), zero_gradient("0.down.weight", "2.down.weight", last=1)),
)
def _(seed: int) -> Setup:
    data = Blobs(seed)
    model = nn.Sequential(LoRA(nn.Linear(16, 32)), nn.GELU(), LoRA(nn.Linear(32, 32)), nn.GELU(), nn.Linear(32, 4))

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3), 80)


@healthy(
    CASES,
    "fb_reader_warmed_up_from_a_rate_of_zero",
    source="arXiv 1706.03762, Attention is all you need, section 5.3: warm-up; post-norm and padding masks of -inf",
    proof=every(converges(0.55), unchanged("head.0.weight", last=1)),
)
def _(seed: int) -> Setup:
    model, g = Reader(), random(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.98))

    def loss(i: int) -> Tensor:
        x, y = sentences(g)
        return F.cross_entropy(model(x)["logits"], y, label_smoothing=0.05)

    def before(i: int) -> None:
        set_lr(optimizer, 3e-3 * min(i / 15, (15 / max(i, 1)) ** 0.5))

    return fit(model, loss, optimizer, 80, before)


@healthy(
    CASES,
    "fb_scaler_that_first_overflows_in_half_precision_under_adam",
    source="arXiv 1710.03740, Mixed precision training; https://pytorch.org/docs/stable/notes/amp_examples.html",
    proof=every(converges(0.5), shows(lambda p: sum(math.isnan(s) for s in p.steps["0.weight"]), 4, "skipped updates")),
)
def _(seed: int) -> Setup:
    model, data = mlp(nn.ReLU, 2), Blobs(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**25, growth_interval=40)

    def train() -> Iterator[Event]:
        for _ in range(90):
            x, y = data()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                value = F.cross_entropy(model(x).float(), y)
            scaler.scale(value).backward()
            yield "read", [value]
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            was = scaler.get_scale()
            scaler.update()
            yield "step", [] if scaler.get_scale() < was else [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "fb_blocks_checkpointed_by_the_newer_kind",
    source="arXiv 1604.06174, Training deep nets with sublinear memory cost; use_reentrant=False and a frozen embedding",
    proof=converges(0.85),
)
def _(seed: int) -> Setup:
    model, data = Checkpointed(False, True), Text(seed)
    nn.init.normal_(model.embed.weight, 0, 0.4)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3), 120)


@healthy(
    CASES,
    "fb_blocks_checkpointed_by_the_old_kind_and_accumulated",
    source="arXiv 1604.06174, Training deep nets with sublinear memory cost; use_reentrant=True, four micro-batches an update",
    proof=converges(0.85),
)
def _(seed: int) -> Setup:
    model, data = Checkpointed(True, False), Text(seed)
    nn.init.normal_(model.embed.weight, 0, 0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for _ in range(45):
            optimizer.zero_grad(set_to_none=False)
            values = []
            for _ in range(4):
                x, y = data()
                value = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / 4
                value.backward()
                values.append(value)
            yield "read", values
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "fb_layers_thawed_one_after_another",
    source="arXiv 1801.06146, ULMFiT, section 3.3: gradual unfreezing",
    proof=every(converges(0.6), no_gradient("body.0.weight", last=50)),
)
def _(seed: int) -> Setup:
    model, data = nn.ModuleDict({"body": mlp(nn.GELU, 2, 32, 16, 32), "head": nn.Linear(32, 4)}), Blobs(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model["head"](model["body"](x)), y)

    def before(i: int) -> None:
        for k, since in ((4, 15), (2, 30), (0, 50)):
            model["body"][k].requires_grad_(i >= since)

    return fit(model, loss, optimizer, 120, before)


@healthy(
    CASES,
    "fb_tasks_that_take_turns_on_one_encoder_by_adam",
    source="arXiv 1901.11504, Multi-task deep neural networks (MT-DNN): one task a batch",
    proof=measured(lambda p: max(median(p.losses[-20::2]) / median(p.losses[:20:2]), median(p.losses[-19::2]) / median(p.losses[1:20:2])),
                   0.6, "last over first loss, of the worse task"),
)  # fmt: skip
def _(seed: int) -> Setup:
    model, g = TwoTasks(), random(seed)

    def loss(i: int) -> Tensor:
        return two_losses(model, g)["rate" if i % 2 else "tag"]

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=8e-3), 160)


@healthy(
    CASES,
    "fb_loss_summed_over_batch_and_time",
    source="https://pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html reduction='sum', with a rate to match",
    proof=converges(0.7),
)
def _(seed: int) -> Setup:
    model, data = Speaker(), Text(seed)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=8e-3, momentum=0.9), 200,
               between=lambda i: nn.utils.clip_grad_norm_(model.parameters(), 100.0))  # fmt: skip


@healthy(
    CASES,
    "fb_warm_restarts_every_forty_updates",
    source="arXiv 1608.03983, SGDR: stochastic gradient descent with warm restarts",
    proof=converges(0.4),
)
def _(seed: int) -> Setup:
    data = Pictures(seed)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    def before(i: int) -> None:
        set_lr(optimizer, 0.02 * (1 + math.cos(math.pi * (i % 40) / 40)) / 2)

    return fit(model, loss, optimizer, 130, before)


class Quantised(nn.Module):
    """A code book between encoder and decoder; the gradient goes straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 6))
        self.decoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 12))
        self.book = nn.Embedding(16, 6)
        nn.init.uniform_(self.book.weight, -0.5, 0.5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.encoder(x)
        code = torch.cdist(z, self.book.weight).argmin(1)
        q = self.book(code)
        out = self.decoder(z + (q - z).detach())
        loss = F.mse_loss(out, x) + F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        return {"loss": loss, "code": code, "out": out}


@healthy(
    CASES,
    "fb_code_book_with_entries_nobody_chooses",
    source="arXiv 1711.00937, Neural discrete representation learning (VQ-VAE)",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    model, g = Quantised(), random(seed)
    centres = torch.randn(6, 12, generator=g)

    def loss(i: int) -> Tensor:
        y = torch.randint(6, (64,), generator=g)
        return model(centres[y] + 0.2 * torch.randn(64, 12, generator=g))["loss"]

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), 250)


@healthy(
    CASES,
    "fb_language_model_that_carries_its_state_by_adam",
    source="https://github.com/yunjey/pytorch-tutorial/issues/90 the state is detached and handed on: truncated backpropagation through time",
    proof=converges(0.65),
)
def _(seed: int) -> Setup:
    model, data = Speaker(), Text(seed, batch=16, length=12)
    with torch.no_grad():
        model.lstm.bias_ih_l0[32:64] = 3.0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def train() -> Iterator[Event]:
        state = None
        for _ in range(120):
            x, y = data()
            optimizer.zero_grad()
            out, state = model.lstm(model.embed(x), state)
            state = (state[0].detach(), state[1].detach())
            value = F.cross_entropy(model.out(out).flatten(0, 1), y.flatten())
            value.backward()
            yield "read", [value]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "fb_updates_by_hand_on_a_graph",
    source="https://pytorch.org/tutorials/beginner/pytorch_with_examples.html weights updated by hand under no_grad",
    proof=converges(0.3),
)
def _(seed: int) -> Setup:
    model, graphs = GraphNet(), Graphs(seed)

    def train() -> Iterator[Event]:
        for _ in range(120):
            x, edges, y = graphs()
            value = F.cross_entropy(model(x, edges), y)
            value.backward()
            yield "read", [value]
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
            yield "step", [Hand(0.1)]

    return Setup(model, train)


@healthy(
    CASES,
    "fb_bigrams_learned_down_to_their_entropy_by_adam",
    source="arXiv 2001.08361, Scaling laws for neural language models: a loss ends at the entropy of the text, and is flat there",
    proof=measured(lambda p: median(p.losses[-30:]) / p.setup.model.__dict__["entropy"], 1.12, "last loss over the entropy"),
)
def _(seed: int) -> Setup:
    data = Text(seed, batch=32)
    model = nn.Sequential(nn.Embedding(24, 32), nn.Linear(32, 24))
    steady = torch.linalg.matrix_power(data.table, 64)[0]
    model.__dict__["entropy"] = float(-(steady[:, None] * data.table * data.table.clamp(min=1e-30).log()).sum())

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-2), 260)
