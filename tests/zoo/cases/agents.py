"""Agents, adversaries, teachers and physics: runs that nobody has developed on.

Reinforcement learning, GANs, contrastive and self-supervised learning, distillation, graphs, physics-informed nets, forecasting and
densities. Each has its source and a proof in plain torch; they are only run to report.
"""

# torch types neither Tensor.backward nor the distributions:
# mypy: disable-error-code="no-untyped-call"

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

from tests.zoo.case import Blobs, Case, Event, Proof, Setup, evens, fit, healthy, mlp, sick
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
"""Runs that nobody has developed on, each with its source and a proof in plain torch: they are only run to report."""


def _rng(seed: int, salt: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(7000 + 100 * salt + seed)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Linear)
    return module.weight


def _learns(to: float, first: int = 0, last: int | None = None, window: int = 6) -> Proof:
    """The median loss of the last `window` updates before `last` is below `to` times that of the first after `first`."""

    def proof(plain: Plain) -> str:
        losses = plain.losses[first:last]
        a, b = median(losses[:window]), median(losses[-window:])
        assert b < to * a, f"the loss goes from {a:.4g} to {b:.4g}, not below {to:g} of it"
        return f"before, the loss falls from {a:.4g} to {b:.4g}"

    return proof


def _falls_by(amount: float) -> Proof:
    """For a loss that changes its sign: the median of the last tenth is at least `amount` below that of the first five."""

    def proof(plain: Plain) -> str:
        a, b = median(plain.losses[:5]), median(plain.losses[-(len(plain.losses) // 10) :])
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        assert a > 0 > b, f"the loss does not change its sign: {a:.4g}, {b:.4g}"
        assert a - b > amount, f"the loss goes from {a:.4g} to {b:.4g}"
        return f"the loss falls from {a:.4g} to {b:.4g}"

    return proof


def _measures(what: str, value: Callable[[Any], float], above: float = -math.inf, below: float = math.inf) -> Proof:
    """A number measured on the trained model lies between the two."""

    def proof(plain: Plain) -> str:
        assert all(math.isfinite(x) for x in plain.losses), "a loss is not finite"
        with torch.no_grad():
            found = value(plain.setup.model)
        assert above < found < below, f"{what} is {found:.4g}, not between {above:g} and {below:g}"
        return f"{what} is {found:.4g}"

    return proof


def _rises(module: str, size: float, update: int = 0) -> Proof:
    """The output of a module has at least this root mean square at an update."""

    def proof(plain: Plain) -> str:
        seen = plain.outputs[module][update]
        assert seen is not None
        assert seen.rms > size, f"the output of {module} has the size {seen.rms:.3g}, not above {size:g}"
        return f"the output of {module} has the size {seen.rms:.3g}"

    return proof


def _finite_until(update: int) -> Proof:
    """All losses and gradients are finite until the update, without it."""

    def proof(plain: Plain) -> str:
        assert all(math.isfinite(x) for x in plain.losses[:update]), "a loss before is not finite"
        assert all(n == 0 for counts in plain.nonfinite.values() for n in counts[:update]), "a gradient before is not finite"
        return f"all is finite before update {update}"

    return proof


# --------------------------------------------------------------------------------------------------------------------------------------
# Sick runs
# --------------------------------------------------------------------------------------------------------------------------------------


def _graph(generator: torch.Generator, nodes: int = 48, groups: int = 4, features: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """A graph of communities: (features, adjacency without loops, community)."""
    y = torch.arange(nodes) % groups
    same = y[:, None] == y[None, :]
    edges = torch.rand(nodes, nodes, generator=generator) < torch.where(same, 0.4, 0.05)
    adjacency = (edges | edges.T).float().fill_diagonal_(0)
    adjacency[torch.arange(nodes), (torch.arange(nodes) + groups) % nodes] = 1  # everyone has a neighbour of its own
    adjacency = torch.maximum(adjacency, adjacency.T)
    centres = torch.randn(groups, features, generator=generator)
    return centres[y] + 0.8 * torch.randn(nodes, features, generator=generator), adjacency, y


class _Convolution(nn.Module):
    """Kipf and Welling's layer: the symmetric normalised adjacency times a linear map."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor, smooth: Tensor) -> Tensor:
        out: Tensor = smooth @ self.linear(x)
        return out


class _GCN(nn.Module):
    def __init__(self, depth: int, features: int = 12, width: int = 32, classes: int = 4) -> None:
        super().__init__()
        sizes = [features] + [width] * depth
        self.convs = nn.ModuleList(_Convolution(a, b) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, smooth: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x, smooth))
        out: Tensor = self.head(x)
        return out


@sick(
    CASES,
    "hc_gcn_of_fourteen_layers",
    ("vanishing_gradient",),
    tuple(f"convs.{i}" for i in range(10)),
    source="https://arxiv.org/abs/1904.03751 Li et al., deep GCNs without skips: vanishing gradients and over-smoothing",
    proof=every(
        gradient_ratio("convs.0.linear.weight", "head.bias", 1e-4, last=15),
        gradient_ratio("convs.4.linear.weight", "convs.13.linear.weight", 1e-2, last=15),
        loss_stays(0.1),
    ),
    # over-smoothed nodes are all alike, so that half of the units are silent on all of them
    also=("loss_plateau", "dead_units"),
)
def _(seed: int) -> Setup:
    x, adjacency, y = _graph(_rng(seed, 1))
    loops = adjacency + torch.eye(len(x))
    d = loops.sum(1).rsqrt()
    smooth = d[:, None] * loops * d[None, :]
    model = _GCN(14)
    return fit(
        model,
        lambda i: F.cross_entropy(model(x, smooth), y),
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        updates=80,
    )


class _SpikeFunction(torch.autograd.Function):
    """A spike where the potential is above threshold; backwards a triangle, which has to be damped and is not."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.slope = slope
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        return grads[0] * ctx.slope * F.relu(1 - u.abs()), None


class _Spike(nn.Module):
    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, u: Tensor) -> Tensor:
        spikes: Tensor = _SpikeFunction.apply(u, self.slope)
        return spikes


@sick(
    CASES,
    "hc_spiking_net_with_steep_surrogate",
    ("exploding_gradient",),
    ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "11"),
    source="https://arxiv.org/abs/1803.09574 Bellec et al.: the pseudo-derivative of spikes must be damped (0.3) or training is unstable",
    proof=every(
        gradient_ratio("12.weight", "0.weight", 1e-2, last=15),
        gradient_ratio("8.weight", "0.weight", 0.05, last=15),
        gradient_ratio("12.weight", "8.weight", 0.5, last=15),
    ),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, spread=0.7)
    model = mlp(lambda: _Spike(10.0), 6, width=64)
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight)

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    def clip(i: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), updates=60, between=clip)


@sick(
    CASES,
    "hc_policy_through_chaos",
    ("exploding_gradient",),
    source="https://arxiv.org/abs/2111.05803 Metz et al., Gradients are not all you need: backpropagation through chaotic dynamics",
    proof=every(gradient_grows("0.weight", 300, since=25, to=35), gradient_grows("2.weight", 300, since=25, to=35)),
    onset=25,
    also=("gradient_spike",),
)
def _(seed: int) -> Setup:
    """A controller of the logistic map; the horizon of its rollouts, 4 until update 24, then grows by 2 an update."""
    g = _rng(seed, 2)
    policy = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1), nn.Tanh())
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)

    def train() -> Iterator[Event]:
        for i in range(50):
            horizon = 4 + 2 * max(0, i - 24)
            x = 0.1 + 0.8 * torch.rand(256, 1, generator=g)
            for _ in range(horizon):
                x = (3.85 + 0.1 * policy(4 * x - 2)) * x * (1 - x)
            cost = (x - 0.6).square().mean()
            optimizer.zero_grad()
            cost.backward()
            yield "read", [cost]
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            yield "step", [optimizer]

    return Setup(policy, train)


@sick(
    CASES,
    "hc_dqn_with_one_unclipped_reward",
    ("gradient_spike",),
    source="https://arxiv.org/abs/1312.5602 Mnih et al.: rewards are clipped to limit the scale of the error derivatives; one slips through",
    proof=every(_learns(0.7, last=45), gradient_spikes(45, 30), _finite_until(80)),
    onset=45,
    also=("loss_spike",),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 3)
    truth = torch.randn(6, 3, generator=g)
    q = mlp(nn.ReLU, 2, width=48, inputs=6, outputs=3)
    target = copy.deepcopy(q).requires_grad_(False)
    optimizer = torch.optim.Adam(q.parameters(), lr=2e-3)

    def train() -> Iterator[Event]:
        for i in range(80):
            s, after = torch.randn(64, 6, generator=g), torch.randn(64, 6, generator=g)
            a = torch.randint(3, (64,), generator=g)
            reward = (s @ truth).tanh().gather(1, a[:, None])[:, 0]
            if i == 45:
                reward[7] = 900.0  # the bonus of a finished level, which does not pass by the clipping
            with torch.no_grad():
                wanted = reward + 0.7 * target(after).max(1).values
            loss = F.mse_loss(q(s).gather(1, a[:, None])[:, 0], wanted)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            if i % 10 == 9:
                target.load_state_dict(q.state_dict())

    return Setup(q, train)


def _supervised_contrast(z: Tensor, y: Tensor, temperature: float = 0.2) -> Tensor:
    """Khosla et al.'s loss, with a division by the number of positives."""
    itself = torch.eye(len(z), dtype=torch.bool)
    logits = (z @ z.T / temperature).masked_fill(itself, -1e9)
    positive = ((y[:, None] == y[None, :]) & ~itself).float()
    log_prob = logits - logits.logsumexp(1, keepdim=True)
    return -((positive * log_prob).sum(1) / positive.sum(1)).mean()


@sick(
    CASES,
    "hc_supcon_anchor_without_positive",
    ("non_finite_loss",),
    source="https://github.com/HobbitLong/SupContrast/issues/141 NaN loss where an anchor has no positive pair",
    proof=every(_learns(0.97, last=30), _finite_until(30), first_non_finite(30)),
    onset=30,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_activation"),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, features=20, classes=5, batch=48)
    encoder = mlp(nn.ReLU, 2, width=64, inputs=20, outputs=16)

    def loss(i: int) -> Tensor:
        x, y = data()
        if i >= 30:  # a rare class comes in, once in a batch
            x, y = torch.cat([x, 2 * torch.ones(1, 20)]), torch.cat([y, torch.tensor([5])])
        return _supervised_contrast(F.normalize(encoder(x), dim=1), y)

    return fit(encoder, loss, torch.optim.Adam(encoder.parameters(), lr=1e-3), updates=45)


@sick(
    CASES,
    "hc_siamese_pair_of_one_picture",
    ("non_finite_gradient",),
    source="https://pytorch.org/docs/stable/generated/torch.nn.PairwiseDistance.html its eps is for this: sqrt has no derivative at 0",
    proof=every(
        _learns(0.8, last=26),
        _finite_until(26),
        first_non_finite(26),
        lambda plain: _holds(math.isfinite(plain.losses[26]), "the loss of update 26 is finite"),
    ),
    onset=26,
    also=("non_finite_weight", "non_finite_activation", "non_finite_loss"),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, features=12, classes=6, batch=64, spread=0.5)
    net = mlp(nn.LeakyReLU, 2, width=32, inputs=12, outputs=8)

    def loss(i: int) -> Tensor:
        x, y = data()
        a, b, same = x[:32], x[32:].clone(), (y[:32] == y[32:]).float()
        if i == 26:  # the sampler draws one picture twice
            b[5], same[5] = a[5], 1.0
        distance = (net(a) - net(b)).pow(2).sum(1).sqrt()
        out: Tensor = (same * distance.pow(2) + (1 - same) * F.relu(1.5 - distance).pow(2)).mean()
        return out

    return fit(net, loss, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), updates=40)


def _holds(truth: bool, words: str) -> str:
    assert truth, f"not so: {words}"
    return words


class _MeanConvolution(nn.Module):
    """GraphSAGE with the mean of the neighbours, divided by their number."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.own, self.others = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        neighbours = adjacency @ x / adjacency.sum(-1, keepdim=True)
        return F.relu(self.own(x) + self.others(neighbours))


class _Sage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = _MeanConvolution(12, 32), _MeanConvolution(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        out: Tensor = self.head(self.conv2(self.conv1(x, adjacency), adjacency))
        return out


def _first_bad_is(module: str, inputs: tuple[str, ...], update: int) -> Proof:
    """The output of `module` goes bad at the update, and the named modules, which feed it, are good there."""

    def proof(plain: Plain) -> str:
        told = first_non_finite(update, module)(plain)
        for name in inputs:
            seen = plain.outputs[name][update]
            assert seen is None or seen.nonfinite == 0, f"{name} is bad too"
        return told

    return proof


@sick(
    CASES,
    "hc_sage_mean_over_no_neighbours",
    ("non_finite_activation",),
    ("conv1",),
    source="https://arxiv.org/abs/1706.02216 Hamilton et al., the mean aggregator of GraphSAGE; a node without neighbours makes it 0/0",
    proof=every(_learns(0.6, last=28), _finite_until(28), _first_bad_is("conv1", ("conv1.own",), 28)),
    onset=28,
    also=("non_finite_gradient", "non_finite_weight", "non_finite_loss"),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 4)
    centres = torch.randn(4, 12, generator=g)
    model = _Sage()

    def loss(i: int) -> Tensor:
        noise, adjacency, y = _graph(g, nodes=32)
        if i >= 28:
            adjacency[3], adjacency[:, 3] = 0, 0
        return F.cross_entropy(model(centres[y] + 0.3 * noise, adjacency), y)

    return fit(model, loss, torch.optim.AdamW(model.parameters(), lr=3e-3), updates=42)


def _first_bad_weight(update: int) -> Proof:
    """Before the step of the update all weights, outputs, gradients and the loss are finite; after it some weight is not."""

    def proof(plain: Plain) -> str:
        _finite_until(update + 1)(plain)
        bad = [n for n, w in plain.weights.items() if not math.isfinite(w[update + 1])]
        assert all(math.isfinite(w[update]) for w in plain.weights.values()), "a weight is bad before"
        assert bad, "no weight is bad"
        return f"after the step of update {update} {len(bad)} of {len(plain.weights)} parameters hold NaN or Inf"

    return proof


@sick(
    CASES,
    "hc_half_precision_adam",
    ("non_finite_weight",),
    source="https://discuss.pytorch.org/t/adam-half-precision-nans/1765 the eps of Adam, 1e-8, is 0 in float16",
    proof=_first_bad_weight(0),
    also=("non_finite_activation", "non_finite_loss", "non_finite_gradient"),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 5)
    model = mlp(nn.GELU, 2, width=32, inputs=10, outputs=1).half()
    direction = torch.randn(10, 1, generator=g)

    def loss(i: int) -> Tensor:
        x = torch.randn(64, 10, generator=g)
        return F.mse_loss(model(x.half()), (x @ direction / 3).sin().half())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=5e-3), updates=30)


@sick(
    CASES,
    "hc_click_bandit_prior_bias_everywhere",
    ("dead_units", "poor_init"),
    ("0", "1", "2", "3"),
    source="https://arxiv.org/abs/1708.02002 Lin et al., 4.1: the prior of rare positives belongs into the bias of the last layer (only)",
    proof=every(
        dead_fraction("1", 0.95, last=15),
        zero_gradient("0.weight", "2.weight", last=15),
        _measures("the share of clicks it foresees", lambda m: float(m(torch.zeros(1, 16)).sigmoid()), above=0.001, below=0.5),
    ),
    also=("zero_gradient", "loss_plateau"),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 6)
    model = mlp(nn.ReLU, 2, width=48, outputs=1)
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.constant_(m.bias, -math.log((1 - 0.01) / 0.01))
    taste = torch.randn(16, generator=g)

    def loss(i: int) -> Tensor:
        x = torch.randn(128, 16, generator=g)
        click = (torch.rand(128, generator=g) < torch.sigmoid(x @ taste - 3)).float()
        return F.binary_cross_entropy_with_logits(model(x)[:, 0], click)

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=2e-3), updates=40)


def _series(generator: torch.Generator, batch: int, length: int) -> Tensor:
    """Waves of several periods with noise, of mean 0 and size about 1: `[batch, length]`."""
    t = torch.arange(length) + 200 * torch.rand(batch, 1, generator=generator)
    season = 2 * math.pi * t / 24
    waves = season.sin() + 0.5 * (season * 2 + torch.rand(batch, 1, generator=generator)).cos()
    return waves + 0.2 * torch.randn(batch, length, generator=generator)


def _flat(module: str, size: float, last: int = 15) -> Proof:
    """The inputs of a tanh, which are the outputs of the module, have on average (root mean square) this size."""

    def proof(plain: Plain) -> str:
        found = min(o.rms for o in plain.outputs[module][:last] if o is not None)
        assert found > size, f"the inputs of the tanh after {module} have the size {found:.3g}, not above {size:g}"
        return f"the inputs of the tanh after {module} have the size {found:.3g}"

    return proof


@sick(
    CASES,
    "hc_forecaster_with_randn_weights",
    ("saturated_activation", "poor_init"),
    ("0", "1", "2", "3", "4", "5"),
    source="https://proceedings.mlr.press/v9/glorot10a.html Glorot and Bengio: weights that are not scaled by the fan-in saturate tanh",
    proof=every(_flat("2", 7), _flat("4", 7)),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 7)
    model = mlp(nn.Tanh, 3, width=96, inputs=48, outputs=6)
    for k in (0, 2, 4):
        linear = model[k]
        assert isinstance(linear, nn.Linear)
        linear.weight.data = torch.randn_like(linear.weight)

    def loss(i: int) -> Tensor:
        window = _series(g, 64, 54)
        return F.l1_loss(model(window[:, :48]), window[:, 48:])

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), updates=50)


def _regulator(generator: torch.Generator) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """A continuous bandit: the best action is a smooth function of the state; (a map, reward of state and action)."""
    gain = torch.randn(4, 2, generator=generator) / 2
    return gain, lambda s, a: -(a - (s @ gain).tanh()).square().sum(-1)


@sick(
    CASES,
    "hc_actor_through_numpy",
    ("missing_gradient",),
    ("actor",),
    source="https://discuss.pytorch.org/t/actor-critic-with-multivariate-normal-network-weights-fail-to-update/74548 the mean is detached",
    proof=every(no_gradient("actor.0.weight", "actor.0.bias", "actor.4.weight", "actor.4.bias"), _learns(0.9)),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 8)
    _, reward = _regulator(g)
    model = nn.ModuleDict({"actor": mlp(nn.Tanh, 2, inputs=4, outputs=2), "critic": mlp(nn.Tanh, 2, inputs=4, outputs=1)})
    actor = torch.optim.Adam(model["actor"].parameters(), lr=1e-3)
    critic = torch.optim.Adam(model["critic"].parameters(), lr=3e-3)

    def train() -> Iterator[Event]:
        for _ in range(60):
            s = torch.randn(64, 4, generator=g)
            mean = torch.from_numpy(model["actor"](s).detach().numpy())
            action = mean + 0.3 * torch.randn(64, 2, generator=g)
            log_prob = -((action - mean) / 0.3).square().sum(-1) / 2
            delta = reward(s, action) - model["critic"](s)[:, 0]
            losses = -(log_prob * delta.detach()).mean() * 0.1 + delta.square().mean()
            actor.zero_grad()
            critic.zero_grad()
            losses.backward()
            yield "read", [losses]
            actor.step()
            critic.step()
            yield "step", [actor, critic]

    return Setup(model, train)


def _cloud(generator: torch.Generator, n: int) -> Tensor:
    """What the GANs shall learn: a tilted Gaussian away from the origin."""
    z = torch.randn(n, 2, generator=generator)
    return torch.stack([1.5 + 0.6 * z[:, 0], -1 + 0.4 * z[:, 0] + 0.3 * z[:, 1]], 1)


@sick(
    CASES,
    "hc_gan_reuses_the_detached_fakes",
    ("missing_gradient",),
    ("generator",),
    source="https://pytorch.org/tutorials/beginner/dcgan_faces_tutorial.html fake.detach() belongs into the step of the discriminator only",
    proof=every(
        no_gradient("generator.0.weight", "generator.2.weight", "generator.4.weight", "generator.4.bias"),
        lambda plain: _holds(all(n > 0 for n in plain.grads["discriminator.0.weight"]), "the discriminator has gradients"),
    ),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 9)
    generator = mlp(nn.ReLU, 2, inputs=4, outputs=2)
    discriminator = mlp(lambda: nn.LeakyReLU(0.2), 2, inputs=2, outputs=1)
    of_g = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    of_d = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999))

    def train() -> Iterator[Event]:
        for _ in range(30):
            real, fake = _cloud(g, 64), generator(torch.randn(64, 4, generator=g)).detach()
            of_d.zero_grad()
            loss = F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake)).mean()
            loss.backward()
            yield "read", [loss]
            of_d.step()
            yield "step", [of_d]
            of_g.zero_grad()
            loss = F.softplus(-discriminator(fake)).mean()
            loss.backward()
            yield "read", [loss]
            of_g.step()
            yield "step", [of_g]

    return Setup({"generator": generator, "discriminator": discriminator}, train)


class _Hasher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 32), nn.LayerNorm(32))
        self.classifier = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(torch.sign(self.encoder(x)))
        return out


@sick(
    CASES,
    "hc_hash_codes_by_plain_sign",
    ("zero_gradient",),
    ("encoder",),
    source="https://arxiv.org/abs/1308.3432 Bengio et al.: a threshold has the derivative 0, hence the straight-through estimator",
    proof=every(
        zero_gradient("encoder.0.weight", "encoder.2.weight", "encoder.3.weight"),
        lambda plain: _holds(all(n > 1e-3 for n in plain.grads["classifier.weight"]), "the classifier has gradients"),
    ),
)
def _(seed: int) -> Setup:
    data = Blobs(seed, features=24, classes=6, batch=32, spread=1.5)
    model = _Hasher()

    def loss(i: int) -> Tensor:
        x, y = data()
        return F.cross_entropy(model(x), y)

    return fit(model, loss, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), updates=50)


class _Uncertain(nn.Module):
    """Kendall's weights of the losses of several tasks."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.log_vars = nn.Parameter(torch.zeros(tasks))

    def forward(self, losses: Tensor) -> Tensor:
        return (torch.exp(-self.log_vars) * losses + self.log_vars).sum()


class _TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU())
        self.depth, self.slope = nn.Linear(48, 1), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.depth(h), self.slope(h)


def _never_moves(parameter: str, others: str) -> Proof:
    """A parameter has a gradient in every update and is the same in all, while another moves in every update."""

    def proof(plain: Plain) -> str:
        assert all(n > 0 for n in plain.grads[parameter]), f"{parameter} has no gradient"
        assert all(s == 0 for s in plain.steps[parameter]), f"{parameter} moves"
        assert all(s > 0 for s in plain.steps[others]), f"{others} does not move"
        return f"{parameter} has gradients and never moves, {others} does"

    return proof


@sick(
    CASES,
    "hc_loss_weights_not_given_to_adam",
    ("not_in_optimizer",),
    ("criterion",),
    source="https://arxiv.org/abs/1705.07115 Kendall et al., learned weights of losses; the optimizer was made of net.parameters() alone",
    proof=every(_never_moves("criterion.log_vars", "net.trunk.0.weight"), _learns(0.9)),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 10)
    net, criterion = _TwoTasks(), _Uncertain(2)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    w = torch.randn(8, 4, generator=g) / 2

    def train() -> Iterator[Event]:
        for _ in range(60):
            x = torch.randn(64, 8, generator=g)
            y = (x @ w).sin()
            depth, slope = net(x)
            optimizer.zero_grad()
            criterion.zero_grad()
            loss = criterion(torch.stack([F.mse_loss(depth, y[:, :1]), F.mse_loss(slope, y[:, 1:])]))
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup({"net": net, "criterion": criterion}, train)


def _piles_up(parameter: str, cleared: str, by: float, to: int) -> Proof:
    """The gradient of one parameter grows with the updates, that of another, which is cleared, does not."""

    def proof(plain: Plain) -> str:
        a, b = (max(plain.grads[n][:to]) / median(plain.grads[n][:2]) for n in (parameter, cleared))
        assert a > by, f"the gradient of {parameter} grows by {a:.3g}, not by {by:g}"
        assert b < a / 2, f"that of {cleared} grows as well, by {b:.3g}"
        return f"within {to} updates the gradient of {parameter} grows by {a:.3g}, that of {cleared} by {b:.3g}"

    return proof


@sick(
    CASES,
    "hc_critic_never_zeroed",
    ("gradients_not_zeroed",),
    ("critic",),
    source="https://pytorch.org/docs/stable/generated/torch.optim.Optimizer.zero_grad.html of two optimizers only one is zeroed",
    proof=_piles_up("critic.4.weight", "actor.4.weight", 3, 15),
    also=("exploding_gradient",),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 11)
    _, reward = _regulator(g)
    actor, critic = mlp(nn.Tanh, 2, inputs=4, outputs=2), mlp(nn.Tanh, 2, inputs=4, outputs=1)
    of_actor = torch.optim.Adam(actor.parameters(), lr=1e-3)
    of_critic = torch.optim.Adam(critic.parameters(), lr=1e-3)

    def train() -> Iterator[Event]:
        for _ in range(50):
            s = torch.randn(64, 4, generator=g)
            policy = torch.distributions.Normal(actor(s), 0.4)
            with torch.no_grad():
                action = policy.mean + 0.4 * torch.randn(64, 2, generator=g)
            delta = reward(s, action) - critic(s)[:, 0]
            of_actor.zero_grad()  # and of_critic.zero_grad() is forgotten
            of_the_actor = -(policy.log_prob(action).sum(-1) * delta.detach()).mean()
            of_the_critic = delta.square().mean()
            of_the_actor.backward()
            of_the_critic.backward()
            yield "read", [of_the_actor, of_the_critic]
            of_actor.step()
            of_critic.step()
            yield "step", [of_actor, of_critic]

    return Setup({"actor": actor, "critic": critic}, train)


def _weights_stay(*parameters: str) -> Proof:
    """The norms of these weights are the same in all updates, and their gradients are not zero."""

    def proof(plain: Plain) -> str:
        for name in parameters:
            assert len(set(plain.weights[name])) == 1, f"{name} moves"
            assert all(n > 0 for n in plain.grads[name]), f"{name} has no gradient"
        return f"{', '.join(parameters)}: gradients, but the weights are the same in all updates"

    return proof


@sick(
    CASES,
    "hc_imitation_steps_the_scheduler_only",
    ("never_stepped",),
    source="https://pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate scheduler.step() goes after optimizer.step(), not instead",
    proof=every(_weights_stay("0.weight", "2.weight", "4.weight", "4.bias"), loss_stays(0.2)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 12)
    expert, student = mlp(nn.Tanh, 1, inputs=6, outputs=3), mlp(nn.ReLU, 2, inputs=6, outputs=3)
    nn.init.normal_(_weight(expert[2]), std=1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)

    def train() -> Iterator[Event]:
        for _ in range(50):
            s = torch.randn(64, 6, generator=g)
            with torch.no_grad():
                action = expert(s).argmax(1)
            optimizer.zero_grad()
            loss = F.cross_entropy(student(s), action)
            loss.backward()
            yield "read", [loss]
            scheduler.step()
            yield "step", []

    return Setup(student, train)


def _soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1), reduction="batchmean"
    )


@sick(
    CASES,
    "hc_distillation_rate_ends_at_zero_early",
    ("frozen_weights",),
    source="https://pytorch.org/docs/stable/generated/torch.optim.lr_scheduler.LambdaLR.html total steps counted in epochs, stepped by batch",
    proof=every(
        _learns(0.9, last=25),
        unchanged("0.weight", "2.weight", "4.weight", "0.bias", first=25),
        lambda plain: _holds(all(s > 0 for s in plain.steps["0.weight"][:25]), "before update 25 the weights move"),
        lambda plain: _holds(
            median(plain.losses[-20:]) > 0.2 * median(plain.losses[:3]), "the loss is still above a fifth of the first"
        ),
    ),
    onset=25,
    also=("loss_plateau", "update_ratio_too_small"),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 13)
    teacher = mlp(nn.ReLU, 1, width=64, inputs=16, outputs=5)
    nn.init.normal_(_weight(teacher[2]), std=0.8)
    teacher.requires_grad_(False)
    student = mlp(nn.ReLU, 2, width=24, inputs=16, outputs=5)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: max(0.0, 1 - i / 25))

    def train() -> Iterator[Event]:
        for _ in range(70):
            x = torch.randn(64, 16, generator=g)
            optimizer.zero_grad()
            loss = _soft_targets(student(x), teacher(x), 2.0)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            scheduler.step()

    return Setup(student, train)


@sick(
    CASES,
    "hc_quantile_forecast_second_stage_rate",
    ("update_ratio_too_large",),
    source="https://arxiv.org/abs/1711.11053 Wen et al., quantile forecasts; the rate of the second stage lacks two zeros",
    proof=every(
        _learns(0.8, last=30),
        update_ratio(below=0.1, first=10, last=30),
        update_ratio(above=0.5, first=30, last=36),
    ),
    onset=30,
    also=("loss_diverging", "loss_spike", "gradient_spike", "exploding_gradient", "dead_units"),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 14)
    levels = torch.tensor([0.1, 0.5, 0.9])
    model = mlp(nn.ReLU, 2, width=64, inputs=48, outputs=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def stage(i: int) -> None:
        optimizer.param_groups[0]["lr"] = 3e-3 if i < 30 else 5e-1  # 5e-3 was meant

    def loss(i: int) -> Tensor:
        window = _series(g, 64, 49)
        error = window[:, 48:] - model(window[:, :48])
        return torch.maximum(levels * error, (levels - 1) * error).mean()

    return fit(model, loss, optimizer, updates=50, before=stage)


def _second_derivative(u: Tensor, x: Tensor) -> Tensor:
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    return second


@sick(
    CASES,
    "hc_heat_in_si_units_under_eps",
    ("update_ratio_too_small",),
    source="https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html eps 1e-8 is far above a residual times a volume in m3",
    proof=every(update_ratio(below=1e-5, last=15), loss_stays(0.2), _finite_until(60)),
    also=("loss_plateau",),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 15)
    model = mlp(nn.Tanh, 2, inputs=1, outputs=1)

    def loss(i: int) -> Tensor:
        x = torch.rand(64, 1, generator=g).requires_grad_()  # and 1.25e-13 below: cells of 0.05 mm
        u = x * (1 - x) * model(2 * x - 1)
        source = math.pi**2 * torch.sin(math.pi * x)
        return 1.25e-13 * (_second_derivative(u, x) + source).square().mean()

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=3e-3), updates=60)


class _DLinear(nn.Module):
    """Zeng et al.: one linear map for the moving average and one for the rest."""

    def __init__(self, window: int, ahead: int) -> None:
        super().__init__()
        self.trend, self.season = nn.Linear(window, ahead), nn.Linear(window, ahead)

    def forward(self, x: Tensor) -> Tensor:
        smooth = F.avg_pool1d(F.pad(x[:, None], (4, 4), mode="replicate"), 9, 1)[:, 0]
        out: Tensor = self.trend(smooth) + self.season(x - smooth)
        return out


@sick(
    CASES,
    "hc_dlinear_rate_scaled_with_batch",
    ("loss_diverging",),
    source="https://arxiv.org/abs/1706.02677 Goyal et al., the linear scaling rule for rates, here past what SGD bears; DLinear 2205.13504",
    proof=every(_learns(0.5, last=40), loss_grows(20, first=40, last=50)),
    onset=40,
    also=("exploding_gradient", "update_ratio_too_large", "gradient_spike", "loss_spike"),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 16)
    model = _DLinear(48, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def rescale(i: int) -> None:
        if i == 40:
            optimizer.param_groups[0]["lr"] *= 24

    def loss(i: int) -> Tensor:
        window = _series(g, 32 if i < 40 else 768, 60)
        return F.mse_loss(model(window[:, :48]), window[:, 48:])

    return fit(model, loss, optimizer, updates=55, before=rescale)


@sick(
    CASES,
    "hc_weather_columns_as_they_come",
    ("unnormalized_input",),
    ("",),
    source="https://github.com/blackportal-ai/delta/issues/248 features of vastly different scales, not normalised: errors explode",
    proof=every(
        _rises("0", 1e3),
        lambda plain: _holds(plain.losses[0] > 1e3, f"targets of size 1 and a first loss of {plain.losses[0]:.3g}"),
    ),
    # behind inputs that hardly vary, a unit fires always or never
    also=("dead_units",),
)
def _(seed: int) -> Setup:
    """Pressure in Pa, temperature in K, hour since 1970, humidity in per cent and wind; the targets are standardised."""
    g = _rng(seed, 17)
    mean = torch.tensor([101325.0, 288.0, 450000.0, 60.0, 5.0])
    size = torch.tensor([900.0, 9.0, 4000.0, 20.0, 3.0])
    w = torch.randn(5, 1, generator=g) / 2
    model = mlp(nn.ReLU, 2, width=32, inputs=5, outputs=1)

    def loss(i: int) -> Tensor:
        z = torch.randn(64, 5, generator=g)
        return F.mse_loss(model(mean + size * z), (z @ w).tanh())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), updates=50)


@sick(
    CASES,
    "hc_cloning_with_unit_normal_weights",
    ("poor_init", "exploding_gradient"),
    evens(0, 8),
    source="https://arxiv.org/abs/1502.01852 He et al.: each layer of ReLU multiplies the signal by sqrt(n/2) times the size of the weights",
    proof=every(
        _rises("8", 1e3),
        gradient_ratio("8.bias", "0.bias", 1e-2, last=15),
        lambda plain: _holds(plain.losses[0] > 1e5, f"targets of size 1 and a first loss of {plain.losses[0]:.3g}"),
    ),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 18)
    model = mlp(nn.ReLU, 4, width=64, inputs=8, outputs=2)
    for m in model:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight)
    w = torch.randn(8, 2, generator=g) / 2

    def loss(i: int) -> Tensor:
        s = torch.randn(64, 8, generator=g)
        return F.mse_loss(model(s), (s @ w).tanh())

    return fit(model, loss, torch.optim.Adam(model.parameters(), lr=1e-3), updates=40)


# --------------------------------------------------------------------------------------------------------------------------------------
# Healthy runs
# --------------------------------------------------------------------------------------------------------------------------------------


@healthy(
    CASES,
    "hc_reinforce_on_a_corridor",
    source="https://doi.org/10.1007/BF00992696 Williams, REINFORCE with a baseline; reward at the end only, entropy bonus of A3C (1602.01783)",
    proof=_measures("the least chance of going right", lambda m: float(m(torch.eye(5)).softmax(-1)[:, 1].min()), above=0.75),
)
def _(seed: int) -> Setup:
    """Rare rewards: from the left end of five places, 1 for the one who leaves at the right within ten steps."""
    g = _rng(seed, 30)
    policy = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)

    def train() -> Iterator[Event]:
        baseline = 0.0
        for _ in range(150):
            place, running = torch.zeros(48, dtype=torch.long), torch.ones(48, dtype=torch.bool)
            log_probs, entropy, gain = torch.zeros(48), torch.zeros(48), torch.zeros(48)
            for t in range(10):
                log_p = policy(F.one_hot(place, 5).float()).log_softmax(-1)
                a = torch.multinomial(log_p.detach().exp(), 1, generator=g)[:, 0]
                log_probs = log_probs + running * log_p.gather(1, a[:, None])[:, 0]
                entropy = entropy - running * (log_p.exp() * log_p).sum(-1)
                place = (place + 2 * a - 1).clamp_min(0)
                gain = torch.where(running & (place == 5), 0.9**t, gain)
                running = running & (place < 5)
                place = place.clamp_max(4)
            loss = -(log_probs * (gain - baseline)).mean() - 0.003 * entropy.mean()
            baseline += 0.1 * (float(gain.mean()) - baseline)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup(policy, train)


class _ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = mlp(nn.Tanh, 2, inputs=2, outputs=2), mlp(nn.Tanh, 2, inputs=2, outputs=1)
        self.log_std = nn.Parameter(torch.full((2,), -0.5))
        nn.init.normal_(_weight(self.actor[4]), std=0.01)

    def forward(self, s: Tensor) -> tuple[torch.distributions.Normal, Tensor]:
        return torch.distributions.Normal(self.actor(s), self.log_std.exp()), self.critic(s)[..., 0]


def _drive(actor: nn.Module, steps: int = 8) -> float:
    """Mean reward of the mean action on the way to the origin, from fixed places; doing nothing gets -2."""
    s, total = torch.randn(512, 2, generator=_rng(0, 99)), 0.0
    for _ in range(steps):
        s = s + 0.3 * actor(s).clamp(-2, 2)
        total -= float(s.square().sum(-1).mean())
    return total / steps


@healthy(
    CASES,
    "hc_ppo_point_mass",
    source="https://arxiv.org/abs/1707.06347 Schulman et al., PPO: clipped ratio, value loss, entropy bonus, several epochs, decayed rate",
    proof=_measures("the reward of the mean action", lambda m: _drive(m.actor), above=-0.9),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 31)
    model = _ActorCritic()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, eps=1e-5)

    def rollout() -> list[Tensor]:
        s, states, actions, rewards = torch.randn(64, 2, generator=g), [], [], []
        with torch.no_grad():
            for _ in range(8):
                mean = model(s)[0].mean
                a = mean + model.log_std.exp() * torch.randn(64, 2, generator=g)
                states.append(s)
                s = s + 0.3 * a.clamp(-2, 2)
                actions.append(a)
                rewards.append(-s.square().sum(-1))
            all_s, all_a = torch.stack(states), torch.stack(actions)
            policy, values = model(all_s)
            following = torch.cat([values[1:], model(s)[1][None]])
            advantage = torch.zeros(64)
            advantages: list[Tensor] = []
            for t in reversed(range(8)):
                advantage = rewards[t] + 0.9 * following[t] - values[t] + 0.9 * 0.95 * advantage
                advantages.insert(0, advantage)
            adv = torch.stack(advantages)
            returns = adv + values
            log_prob = policy.log_prob(all_a).sum(-1)
        return [t.flatten(0, 1) for t in (all_s, all_a, log_prob, (adv - adv.mean()) / adv.std(), returns)]

    def train() -> Iterator[Event]:
        for iteration in range(24):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - iteration / 24)
            data = rollout()
            for _ in range(4):
                for index in torch.randperm(512, generator=g).chunk(2):
                    s, a, old, adv, returns = (t[index] for t in data)
                    policy, value = model(s)
                    ratio = (policy.log_prob(a).sum(-1) - old).exp()
                    surrogate = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()
                    loss = -surrogate + 0.5 * F.mse_loss(value, returns) - 0.003 * policy.entropy().sum(-1).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    yield "read", [loss]
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    yield "step", [optimizer]

    return Setup(model, train)


@healthy(
    CASES,
    "hc_dqn_with_target_network",
    source="https://doi.org/10.1038/nature14236 Mnih et al., replay buffer and target network, here on a walk of eight places",
    proof=_measures(
        "the share of places where it walks right", lambda m: float(m["online"](torch.eye(8)).argmax(1).float().mean()), above=0.99
    ),
)
def _(seed: int) -> Setup:
    """The target network keeps requires_grad and is never given a gradient; the targets jump when it is renewed."""
    g = _rng(seed, 32)
    online = mlp(nn.Tanh, 2, width=48, inputs=8, outputs=2)
    target = copy.deepcopy(online)
    optimizer = torch.optim.Adam(online.parameters(), lr=2e-3)

    def train() -> Iterator[Event]:
        buffer: list[tuple[int, int, float, int, float]] = []
        place = 0
        for i in range(400):
            for _ in range(8):
                greedy = int(online(F.one_hot(torch.tensor([place]), 8).float()).argmax())
                explore = float(torch.rand((), generator=g)) < max(0.2, 1 - i / 200)
                a = int(torch.randint(2, (), generator=g)) if explore else greedy
                after = max(0, place + 2 * a - 1)
                done = after == 8
                buffer.append((place, a, float(done), min(after, 7), float(done)))
                place = int(torch.randint(8, (), generator=g)) if done else after
            if len(buffer) < 64:
                continue
            rows = [buffer[k] for k in torch.randint(len(buffer), (64,), generator=g).tolist()]
            s, a_, r, n, d = (torch.tensor(column) for column in zip(*rows, strict=True))
            with torch.no_grad():
                wanted = r + 0.9 * (1 - d) * target(F.one_hot(n, 8).float()).max(1).values
            q = online(F.one_hot(s, 8).float()).gather(1, a_[:, None])[:, 0]
            loss = F.smooth_l1_loss(q, wanted)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            if i % 20 == 19:
                target.load_state_dict(online.state_dict())

    return Setup({"online": online, "target": target}, train)


def _distance(model: Any) -> float:
    """How far mean and covariance of what the generator makes are from those of the cloud."""
    made, real = model["generator"](torch.randn(2000, 4, generator=_rng(0, 98))), _cloud(_rng(0, 97), 2000)
    return float((made.mean(0) - real.mean(0)).norm() + (made.T.cov() - real.T.cov()).norm())


@healthy(
    CASES,
    "hc_gan_at_equilibrium",
    source="https://arxiv.org/abs/1511.06434 Radford et al., Adam with beta1 0.5 for both; non-saturating loss, R1 penalty of 1801.04406",
    proof=_measures("the distance of the generated cloud", _distance, below=0.9),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 33)
    generator, discriminator = mlp(nn.ReLU, 2, inputs=4, outputs=2), mlp(lambda: nn.LeakyReLU(0.2), 2, inputs=2, outputs=1)
    of_g = torch.optim.Adam(generator.parameters(), lr=3e-3, betas=(0.5, 0.99))
    of_d = torch.optim.Adam(discriminator.parameters(), lr=3e-3, betas=(0.5, 0.99))

    def train() -> Iterator[Event]:
        for _ in range(200):
            real, fake = _cloud(g, 128).requires_grad_(), generator(torch.randn(128, 4, generator=g))
            judged = discriminator(real)
            (slope,) = torch.autograd.grad(judged.sum(), real, create_graph=True)
            of_d.zero_grad()
            loss = F.softplus(-judged).mean() + F.softplus(discriminator(fake.detach())).mean()
            loss = loss + 0.1 * slope.square().sum(1).mean()
            loss.backward()
            yield "read", [loss]
            of_d.step()
            yield "step", [of_d]
            of_g.zero_grad()
            loss = F.softplus(-discriminator(fake)).mean()
            loss.backward()
            yield "read", [loss]
            of_g.step()
            yield "step", [of_g]

    return Setup({"generator": generator, "discriminator": discriminator}, train)


@healthy(
    CASES,
    "hc_wgan_gp_three_to_one",
    source="https://arxiv.org/abs/1704.00028 Gulrajani et al., WGAN-GP: second-order terms, several critic updates for one of the generator",
    proof=_measures("the distance of the generated cloud", _distance, below=0.9),
)
def _(seed: int) -> Setup:
    """The losses change their sign; in three of four updates the generator has no gradient."""
    g = _rng(seed, 34)
    generator, critic = mlp(nn.ReLU, 2, inputs=4, outputs=2), mlp(nn.SiLU, 2, width=48, inputs=2, outputs=1)
    of_g = torch.optim.Adam(generator.parameters(), lr=5e-3, betas=(0.0, 0.9))
    of_c = torch.optim.Adam(critic.parameters(), lr=5e-3, betas=(0.0, 0.9))

    def train() -> Iterator[Event]:
        for i in range(400):
            for o in (of_g, of_c):
                o.param_groups[0]["lr"] = 6e-3 * (1 - i / 420)
            if i % 4 < 3:
                real = _cloud(g, 128)
                with torch.no_grad():
                    fake = generator(torch.randn(128, 4, generator=g))
                share = torch.rand(128, 1, generator=g)
                between = (share * real + (1 - share) * fake).requires_grad_()
                (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
                loss = critic(fake).mean() - critic(real).mean() + (slope.norm(dim=1) - 1).square().mean()
                optimizer = of_c
            else:
                loss = -critic(generator(torch.randn(128, 4, generator=g))).mean()
                optimizer = of_g
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]

    return Setup({"generator": generator, "critic": critic}, train)


class _Byol(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(
            nn.Linear(24, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16)
        )
        self.predictor = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
        self.teacher = copy.deepcopy(self.online)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.normalize(self.teacher(b), dim=1)
        return (2 - 2 * (F.normalize(self.predictor(self.online(a)), dim=1) * wanted).sum(1)).mean()

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        for p, q in zip(self.teacher.parameters(), self.online.parameters(), strict=True):
            p.lerp_(q, 1 - momentum)


def _kinds_apart(model: nn.Module, data: Callable[[], tuple[Tensor, Tensor]]) -> float:
    """Spread between the classes over that within, of normalised embeddings of two batches."""
    batches = [data() for _ in range(4)]
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    z = F.normalize(model(x), dim=1)
    means = torch.stack([z[y == k].mean(0) for k in range(int(y.max()) + 1)])
    return float(means.var(0).sum() / torch.stack([z[y == k].var(0).sum() for k in range(len(means))]).mean())


@healthy(
    CASES,
    "hc_byol_with_moving_teacher",
    source="https://arxiv.org/abs/2006.07733 Grill et al., BYOL: the teacher is a moving average and gets no gradient",
    proof=every(
        converges(0.6),
        _measures("spread between over within classes", lambda m: _kinds_apart(m.online, Blobs(0, 24, 6, 128, 0.4)), above=0.5),
    ),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 35)
    data = Blobs(seed, features=24, classes=6, batch=128, spread=0.4)
    model = _Byol()
    optimizer = torch.optim.AdamW([*model.online.parameters(), *model.predictor.parameters()], lr=3e-3, weight_decay=1e-4)

    def train() -> Iterator[Event]:
        for _ in range(150):
            x, _ = data()
            a, b = (x + 0.4 * torch.randn(x.shape, generator=g) for _ in range(2))
            loss = model(a, b) + model(b, a)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            model.follow(0.97)

    return Setup(model, train)


class _Probed(nn.Module):
    """An encoder with a projector, and a linear probe that looks at its features without touching them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(nn.ReLU, 1, width=64, inputs=24, outputs=32)
        self.projector = nn.Sequential(nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
        self.probe = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        return F.normalize(self.projector(h), dim=1), self.probe(h.detach())


@healthy(
    CASES,
    "hc_simclr_with_warm_restarts_and_probe",
    source="https://arxiv.org/abs/2002.05709 Chen et al., SimCLR with a linear probe on detached features; rate of SGDR (1608.03983)",
    proof=converges(0.7),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 36)
    data = Blobs(seed, features=24, classes=6, batch=64, spread=1.0)
    model = _Probed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=40)

    def train() -> Iterator[Event]:
        for _ in range(160):
            x, y = data()
            (a, guess), (b, _) = (model(x + 0.3 * torch.randn(x.shape, generator=g)) for _ in range(2))
            contrast = F.cross_entropy(a @ b.T / 0.2, torch.arange(64)) + F.cross_entropy(b @ a.T / 0.2, torch.arange(64))
            loss = contrast + F.cross_entropy(guess, y)
            optimizer.zero_grad()
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            scheduler.step()

    return Setup(model, train)


@healthy(
    CASES,
    "hc_distillation_times_a_thousand",
    source="https://arxiv.org/abs/1503.02531 Hinton et al., soft targets of a frozen teacher, with the loss scaled by hand",
    proof=converges(0.25),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 37)
    teacher = mlp(nn.ReLU, 2, width=64)
    model = nn.ModuleDict({"teacher": teacher, "student": mlp(nn.GELU, 2, width=64)})
    model["teacher"].requires_grad_(False).eval()
    nn.init.normal_(_weight(teacher[4]), std=0.8)
    optimizer = torch.optim.AdamW(model["student"].parameters(), lr=3e-3)

    def loss(i: int) -> Tensor:
        x = torch.randn(96, 16, generator=g)
        with torch.no_grad():
            soft = model["teacher"](x)
        return 1e3 * _soft_targets(model["student"](x), soft, 3.0)

    return Setup(model, fit(model, loss, optimizer, updates=250).train)


@healthy(
    CASES,
    "hc_maml_on_waves",
    source="https://arxiv.org/abs/1703.03400 Finn et al., MAML: gradients through the inner step, here with waves of random amplitude",
    proof=converges(0.5),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 38)
    model = mlp(nn.Tanh, 2, width=40, inputs=1, outputs=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss(i: int) -> Tensor:
        total = torch.zeros(())
        for _ in range(6):
            size = 0.5 + 2 * torch.rand((), generator=g)
            x = 4 * torch.rand(40, 1, generator=g) - 2
            y = size * (2 * x).sin()
            weights: dict[str, Tensor] = dict(model.named_parameters())
            for _ in range(2):
                inner = F.mse_loss(torch.func.functional_call(model, weights, (x[:20],)), y[:20])
                grads = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
                weights = {n: w - 0.05 * d for (n, w), d in zip(weights.items(), grads, strict=True)}
            total = total + F.mse_loss(torch.func.functional_call(model, weights, (x[20:],)), y[20:])
        return total / 6

    return fit(model, loss, optimizer, updates=150)


@healthy(
    CASES,
    "hc_pinn_poisson_times_a_thousandth",
    source="https://arxiv.org/abs/1711.10561 Raissi et al., physics-informed nets: second derivatives in the loss, here scaled by 1e-3",
    proof=converges(0.005),
)
def _(seed: int) -> Setup:
    model = mlp(nn.Tanh, 2, width=24, inputs=1, outputs=1)
    x = torch.linspace(0, 1, 64)[:, None].requires_grad_()
    source = math.pi**2 * torch.sin(math.pi * x.detach())
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def loss(i: int) -> Tensor:
        u = x * (1 - x) * model(2 * x - 1)
        return 1e-3 * (_second_derivative(u, x) + source).square().mean()

    return fit(model, loss, optimizer, updates=350)


class _Flow(nn.Module):
    """dx/dt = f(x), integrated by Runge and Kutta's steps."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, x: Tensor, steps: int = 12, dt: float = 0.15) -> Tensor:
        path = []
        for _ in range(steps):
            a = self.field(x)
            b = self.field(x + dt / 2 * a)
            c = self.field(x + dt / 2 * b)
            d = self.field(x + dt * c)
            x = x + dt / 6 * (a + 2 * b + 2 * c + d)
            path.append(x)
        return torch.stack(path)


@healthy(
    CASES,
    "hc_neural_ode_to_tiny_gradients",
    source="https://arxiv.org/abs/1806.07366 Chen et al., neural ODEs, trained by backpropagation through the solver to the end",
    proof=every(
        converges(0.01),
        lambda plain: _holds(
            median(plain.grads["field.0.weight"][-30:]) < 0.05 * plain.grads["field.0.weight"][0], "the gradients become tiny"
        ),
    ),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 39)
    start = 2 * torch.rand(24, 2, generator=g) - 1
    turn = torch.tensor([[-0.3, 1.2], [-1.2, -0.3]])
    truth = torch.stack([start @ torch.matrix_exp(0.15 * (k + 1) * turn.T) for k in range(12)])
    model = _Flow()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200, eta_min=1e-4)

    def train() -> Iterator[Event]:
        for _ in range(200):
            optimizer.zero_grad()
            loss = F.mse_loss(model(start), truth)
            loss.backward()
            yield "read", [loss]
            optimizer.step()
            yield "step", [optimizer]
            scheduler.step()

    return Setup(model, train)


class _Mixture(nn.Module):
    def __init__(self, parts: int = 4) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(1, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh())
        self.share, self.mean, self.log_std = nn.Linear(48, parts), nn.Linear(48, parts), nn.Linear(48, parts)

    def forward(self, x: Tensor) -> torch.distributions.MixtureSameFamily:
        h = self.trunk(x)
        parts = torch.distributions.Normal(self.mean(h), F.softplus(self.log_std(h)) + 0.01, validate_args=False)
        shares = torch.distributions.Categorical(logits=self.share(h), validate_args=False)
        return torch.distributions.MixtureSameFamily(shares, parts, validate_args=False)


@healthy(
    CASES,
    "hc_mixture_density_below_zero",
    source="https://publications.aston.ac.uk/id/eprint/373/ Bishop, mixture density networks: two branches, a negative log-likelihood under 0",
    proof=_falls_by(1.0),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 40)
    model = _Mixture()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def loss(i: int) -> Tensor:
        x = 2 * torch.rand(128, 1, generator=g) - 1
        branch = torch.randint(2, (128, 1), generator=g) * 2 - 1
        y = branch * (0.6 + 0.4 * x) + (0.02 + 0.05 * x.abs()) * torch.randn(128, 1, generator=g)
        nll: Tensor = -model(x).log_prob(y[:, 0]).mean()
        return nll

    return fit(model, loss, optimizer, updates=300)


class _Coupling(nn.Module):
    def __init__(self, flip: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 4))
        self.flip = flip
        for p in self.net[2].parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.flip(1).chunk(2, 1) if self.flip else x.chunk(2, 1)
        scale, shift = self.net(a).chunk(2, 1)
        scale = 2 * torch.tanh(scale)
        return torch.cat([a, b * scale.exp() + shift], 1), scale.sum(1)


@healthy(
    CASES,
    "hc_realnvp_with_zero_couplings",
    source="https://arxiv.org/abs/1605.08803 Dinh et al., Real NVP; last layers of zeros as in Glow (1807.03039); the loss changes its sign",
    proof=_falls_by(1.0),
)
def _(seed: int) -> Setup:
    g = _rng(seed, 41)
    model = nn.ModuleList(_Coupling(k % 2 == 1) for k in range(6))
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)

    def loss(i: int) -> Tensor:
        u = torch.randn(128, 2, generator=g)
        noise = 0.04 * torch.randn(128, 2, generator=g)
        x = torch.cat([u, torch.stack([u[:, 0].sin(), u[:, 0] * u[:, 1] / 2], 1) + noise], 1)
        log_det = torch.zeros(128)
        for coupling in model:
            x, more = coupling(x)
            log_det = log_det + more
        return (x.square().sum(1) / 2 + 2 * math.log(2 * math.pi) - log_det).mean()

    return fit(model, loss, optimizer, updates=300)


@healthy(
    CASES,
    "hc_td3_with_delayed_actor",
    source="https://arxiv.org/abs/1802.09477 Fujimoto et al., TD3: twin critics, target networks, the actor is updated every second time",
    proof=_measures("the reward of the actor", lambda m: _drive(m["actor"]), above=-0.9),
)
def _(seed: int) -> Setup:
    """Replayed moves of a random policy on the way to the origin."""
    g = _rng(seed, 42)
    model = nn.ModuleDict(
        {
            "actor": nn.Sequential(*mlp(nn.Tanh, 2, inputs=2, outputs=2), nn.Tanh()),
            "one": mlp(nn.SiLU, 2, width=48, inputs=4, outputs=1),
            "two": mlp(nn.SiLU, 2, width=48, inputs=4, outputs=1),
        }
    )
    model["behind"] = copy.deepcopy(nn.ModuleDict(dict(model.items()))).requires_grad_(False)
    behind = model["behind"]
    assert isinstance(behind, nn.ModuleDict)
    of_critics = torch.optim.Adam([*model["one"].parameters(), *model["two"].parameters()], lr=3e-3)
    of_actor = torch.optim.Adam(model["actor"].parameters(), lr=1e-3)
    s0 = 1.2 * torch.randn(4000, 2, generator=g)
    a0 = 2 * torch.rand(4000, 2, generator=g) - 1
    s1 = s0 + 0.3 * a0

    def train() -> Iterator[Event]:
        for i in range(300):
            k = torch.randint(4000, (128,), generator=g)
            with torch.no_grad():
                noise = (0.2 * torch.randn(128, 2, generator=g)).clamp(-0.4, 0.4)
                sa = torch.cat([s1[k], (behind["actor"](s1[k]) + noise).clamp(-1, 1)], 1)
                wanted = -s1[k].square().sum(1, keepdim=True) + 0.8 * torch.minimum(behind["one"](sa), behind["two"](sa))
            sa = torch.cat([s0[k], a0[k]], 1)
            loss = F.mse_loss(model["one"](sa), wanted) + F.mse_loss(model["two"](sa), wanted)
            of_critics.zero_grad()
            loss.backward()
            yield "read", [loss]
            of_critics.step()
            yield "step", [of_critics]
            if i % 2:
                continue
            of_actor.zero_grad()
            loss = -model["one"](torch.cat([s0[k], model["actor"](s0[k])], 1)).mean()
            loss.backward()
            yield "read", [loss]
            of_actor.step()
            yield "step", [of_actor]
            with torch.no_grad():
                for name in ("actor", "one", "two"):
                    for p, q in zip(behind[name].parameters(), model[name].parameters(), strict=True):
                        p.lerp_(q, 0.05)

    return Setup(model, train)
